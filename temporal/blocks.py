"""The blocks a temporal network is chained from; each takes (B, T, D) and gives (B, T, D').

Shape legend: B windows, T rows of time, D dims, N states a dim.

The contract of every class in BLOCKS: it is made as `Block(dim_in, **options)`, its `dim` says D', and it is called
as `block(x, mask)`, where mask (B, T) is True at the valid rows (None: all are). A masked row changes nothing
elsewhere: whatever it holds, NaN included, the other rows' outputs and all gradients are the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from .scan import selective_scan


def _hide(x: Tensor, mask: Tensor | None, dim: int = -1) -> Tensor:
    """x with zeros in the masked rows; `dim` is the one that mask lacks: (B, T, D) unless told."""
    return x if mask is None else x.masked_fill(~mask.unsqueeze(dim), 0)


class Linear(nn.Module):
    """The same affine map for every row."""

    def __init__(self, dim_in: int, *, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.map = nn.Linear(dim_in, dim)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.map(_hide(x, mask))


class Norm(nn.Module):
    """Each row standardised over its dims, nothing learnt: Mamba-VA's InstanceNorm1d, applied to (B, T, D)."""

    def __init__(self, dim_in: int) -> None:
        super().__init__()
        self.dim = dim_in

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return F.layer_norm(_hide(x, mask), (self.dim,))


class TCN(nn.Module):
    """Temporal convolutional network (Bai et al. 2018, figure 1) with PReLU, as in Mamba-VA.

    One level for each of `channels`, its dilation twice that of the level before. A row sees
    1 + 2 (width - 1) (2**levels - 1) rows: itself and those before it, or around it if not `causal`.
    """

    def __init__(
        self, dim_in: int, *, channels: Sequence[int], width: int, dropout: float, causal: bool = True
    ) -> None:
        super().__init__()
        dims = [dim_in, *channels]
        self.dim = dims[-1]
        self.levels = nn.ModuleList(
            _Level(dims[i], dims[i + 1], width, 2**i, dropout, causal) for i in range(len(channels))
        )

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x.transpose(1, 2)
        for level in self.levels:
            x = level(x, mask)
        return x.transpose(1, 2)


class _Level(nn.Module):
    """Two dilated convolutions with weight norm beside a skip, 1x1 where the dims differ; (B, D, T) -> (B, D', T)."""

    def __init__(
        self, dim_in: int, dim: int, width: int, dilation: int, dropout: float, causal: bool
    ) -> None:
        super().__init__()
        span = (width - 1) * dilation
        self.pad = (span, 0) if causal else (span - span // 2, span // 2)
        # torch's own initialisation: with the published N(0, 0.01) a toy task, a delay of 23 rows, was not learnt
        # in 250 steps that were plenty with this one
        self.conv1 = weight_norm(nn.Conv1d(dim_in, dim, width, dilation=dilation))
        self.conv2 = weight_norm(nn.Conv1d(dim, dim, width, dilation=dilation))
        self.skip = nn.Identity() if dim_in == dim else nn.Conv1d(dim_in, dim, 1)
        self.act1, self.act2, self.act = nn.PReLU(), nn.PReLU(), nn.PReLU()
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = _hide(x, mask, dim=1)
        y = self.dropout(self.act1(self.conv1(F.pad(x, self.pad))))
        y = _hide(y, mask, dim=1)
        y = self.dropout(self.act2(self.conv2(F.pad(y, self.pad))))
        return self.act(y + self.skip(x))


class MambaStack(nn.Module):
    """`layers` times x = LN(Mamba(x) + x), the post-norm order of Mamba-VA; a row sees itself and all before it."""

    def __init__(
        self, dim_in: int, *, layers: int, state: int, conv: int, expand: int, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.dim = dim_in
        self.mixers = nn.ModuleList(Mamba(dim_in, state, conv, expand) for _ in range(layers))
        self.norms = nn.ModuleList(nn.LayerNorm(dim_in) for _ in range(layers))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = _hide(x, mask)
        for mixer, norm in zip(self.mixers, self.norms, strict=True):
            x = norm(self.dropout(mixer(x, mask)) + x)
        return x


class Mamba(nn.Module):
    """The Mamba-1 block (Gu & Dao 2023, figure 3) with mamba-ssm's parameter names, shapes and initialisation.

    A checkpoint of `mamba_ssm.Mamba(dim, d_state=state, d_conv=conv, expand=expand)` loads as it is.
    """

    def __init__(self, dim: int, state: int, conv: int, expand: int) -> None:
        super().__init__()
        inner, rank = expand * dim, math.ceil(dim / 16)
        self.split = [rank, state, state]
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False)
        self.conv1d = nn.Conv1d(inner, inner, conv, groups=inner, padding=conv - 1)
        self.x_proj = nn.Linear(inner, sum(self.split), bias=False)
        self.dt_proj = nn.Linear(rank, inner)
        self.A_log = nn.Parameter(torch.arange(1.0, state + 1).log().repeat(inner, 1))  # (D, N)
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, dim, bias=False)
        self._init_step(rank)

    def _init_step(self, rank: int, low: float = 1e-3, high: float = 1e-1) -> None:
        """Steps spread evenly in log between `low` and `high`, so that some states last 1/low rows."""
        nn.init.uniform_(self.dt_proj.weight, -(rank**-0.5), rank**-0.5)
        with torch.no_grad():
            log_step = torch.empty_like(self.dt_proj.bias).uniform_(math.log(low), math.log(high))
            step = log_step.exp()
            self.dt_proj.bias.copy_(step + torch.log(-torch.expm1(-step)))  # the inverse of softplus

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x (B, T, D), mask (B, T) -> (B, T, D). A masked row adds nothing to the state and lets it not decay."""
        u, z = self.in_proj(_hide(x, mask)).chunk(2, dim=-1)  # no bias: a hidden row stays zero
        u = F.silu(self._convolve(u))
        low_rank, B, C = self.x_proj(u).split(self.split, dim=-1)
        delta = F.linear(low_rank, self.dt_proj.weight)
        if mask is not None:
            delta = delta.masked_fill(
                ~mask.unsqueeze(-1), -math.inf
            )  # softplus makes it 0: a step of no time
        u, delta, B, C, z = (v.transpose(1, 2) for v in (u, delta, B, C, z))
        A = -torch.exp(self.A_log)
        y = selective_scan(u, delta, A, B, C, self.D, z, self.dt_proj.bias, delta_softplus=True)
        return self.out_proj(cast(Tensor, y).transpose(1, 2))

    def _convolve(self, u: Tensor) -> Tensor:
        """The causal convolution of each dim by itself, (B, T, D) -> (B, T, D).

        As an image of one line with the channels last it needs no transposed copies: 15 % of the block's time.
        """
        conv, T = self.conv1d, u.shape[1]
        lines = u.contiguous().transpose(1, 2).unsqueeze(2)  # (B, D, 1, T)
        padding = (0, *conv.padding)
        lines = F.conv2d(lines, conv.weight.unsqueeze(2), conv.bias, padding=padding, groups=conv.groups)
        return lines[..., :T].squeeze(2).transpose(1, 2)


# The names a preset uses.
BLOCKS: dict[str, type[nn.Module]] = {"linear": Linear, "norm": Norm, "tcn": TCN, "mamba": MambaStack}
