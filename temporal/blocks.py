"""The blocks a temporal network is chained from; each takes (B, T, D) and gives (B, T, D').

Shape legend: B windows, T rows of time, D dims, N states a dim.

The contract of every class in BLOCKS: it is made as `Block(dim_in, **options)`, its `dim` says D', and it is called
as `block(x, mask, start)`, where mask (B, T) is True at the valid rows (None: all are) and start (B, T) at the first
row of each video packed into the same line (None: a line is one video). A masked row changes nothing elsewhere:
whatever it holds, NaN included, the other rows' outputs and all gradients are the same. Nothing passes from one
packed video to another: each gets what it gets alone. A block that can look both ways does so if not `causal`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.rnn import pack_sequence, unpack_sequence

from .attention import Transformer
from .lines import hide, reversed_start, videos, with_gaps
from .scan import selective_scan
from .ssd import ssd_scan

_ACTS = {"prelu": nn.PReLU, "leaky_relu": nn.LeakyReLU}  # the slope of the latter is 0.01


class Linear(nn.Module):
    """The same affine map for every row."""

    def __init__(self, dim_in: int, *, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.map = nn.Linear(dim_in, dim)

    def forward(self, x: Tensor, mask: Tensor | None = None, start: Tensor | None = None) -> Tensor:
        return self.map(hide(x, mask))


class Norm(nn.Module):
    """Each row standardised over its dims, nothing learnt: Mamba-VA's InstanceNorm1d, applied to (B, T, D)."""

    def __init__(self, dim_in: int) -> None:
        super().__init__()
        self.dim = dim_in

    def forward(self, x: Tensor, mask: Tensor | None = None, start: Tensor | None = None) -> Tensor:
        return F.layer_norm(hide(x, mask), (self.dim,))


class TCN(nn.Module):
    """Temporal convolutional network (Bai et al. 2018, figure 1) with PReLU, as in Mamba-VA.

    One level for each of `channels`, its dilation twice that of the level before. A row sees
    1 + 2 (width - 1) (2**levels - 1) rows: itself and those before it, or around it if not `causal`.
    """

    def __init__(
        self,
        dim_in: int,
        *,
        channels: Sequence[int],
        width: int,
        dropout: float,
        causal: bool = True,
        act: Literal["prelu", "leaky_relu"] = "prelu",
    ) -> None:
        super().__init__()
        dims = [dim_in, *channels]
        self.dim = dims[-1]
        self.levels = nn.ModuleList(
            _Level(dims[i], dims[i + 1], width, 2**i, dropout, causal, _ACTS[act])
            for i in range(len(channels))
        )
        # the most rows that one convolution reaches to a side; hidden rows are zeros to every one of them
        self.gap = (width - 1) * 2 ** (len(channels) - 1)

    def forward(self, x: Tensor, mask: Tensor | None = None, start: Tensor | None = None) -> Tensor:
        return with_gaps(self._run, x, mask, start, self.gap)

    def _run(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = x.transpose(1, 2)
        for level in self.levels:
            x = level(x, mask)
        return x.transpose(1, 2)


class _Level(nn.Module):
    """Two dilated convolutions with weight norm beside a skip, 1x1 where the dims differ; (B, D, T) -> (B, D', T)."""

    def __init__(
        self,
        dim_in: int,
        dim: int,
        width: int,
        dilation: int,
        dropout: float,
        causal: bool,
        act: type[nn.Module],
    ) -> None:
        super().__init__()
        span = (width - 1) * dilation
        self.pad = (span, 0) if causal else (span - span // 2, span // 2)
        # torch's own initialisation: with the published N(0, 0.01) a toy task, a delay of 23 rows, was not learnt
        # in 250 steps that were plenty with this one
        self.conv1 = weight_norm(nn.Conv1d(dim_in, dim, width, dilation=dilation))
        self.conv2 = weight_norm(nn.Conv1d(dim, dim, width, dilation=dilation))
        self.skip = nn.Identity() if dim_in == dim else nn.Conv1d(dim_in, dim, 1)
        self.act1, self.act2, self.act = act(), act(), act()
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = hide(x, mask, dim=1)
        y = self.dropout(self.act1(self.conv1(F.pad(x, self.pad))))
        y = hide(y, mask, dim=1)
        y = self.dropout(self.act2(self.conv2(F.pad(y, self.pad))))
        return self.act(y + self.skip(x))


class MultiTCN(nn.Module):
    """A TCN for each width of `kernels`, what they give side by side, a Linear to `dim`: USTC's, with LeakyReLU."""

    def __init__(
        self,
        dim_in: int,
        *,
        channels: Sequence[int],
        dim: int,
        kernels: Sequence[int] = (3, 5, 7),
        dropout: float = 0.1,
        causal: bool = True,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.tcns = nn.ModuleList(
            TCN(dim_in, channels=channels, width=width, dropout=dropout, causal=causal, act="leaky_relu")
            for width in kernels
        )
        self.map = nn.Linear(channels[-1] * len(kernels), dim)

    def forward(self, x: Tensor, mask: Tensor | None = None, start: Tensor | None = None) -> Tensor:
        return self.map(torch.cat([tcn(x, mask, start) for tcn in self.tcns], dim=-1))


class _MixerStack(nn.Module):
    """`layers` times x = LN(mixer(x) + x), the post-norm order of Mamba-VA; a row sees itself and all before it.

    If not `causal` a layer has a second mixer, of its own weights, that reads each video backwards, and the two are
    summed: what a row sees of itself twice is for them to learn.
    """

    def __init__(
        self, dim: int, mixer: Callable[[], nn.Module], layers: int, dropout: float, causal: bool
    ) -> None:
        super().__init__()
        self.dim = dim
        self.mixers = nn.ModuleList(mixer() for _ in range(layers))
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(layers))
        self.backward_mixers = nn.ModuleList(mixer() for _ in range(0 if causal else layers))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None, start: Tensor | None = None) -> Tensor:
        x = hide(x, mask)
        back_mask = None if mask is None else mask.flip(1)
        back_start = None if start is None else reversed_start(start)
        for i, (mixer, norm) in enumerate(zip(self.mixers, self.norms, strict=True)):
            y = mixer(x, mask, start)
            if self.backward_mixers:
                y = y + self.backward_mixers[i](x.flip(1), back_mask, back_start).flip(1)
            x = norm(self.dropout(y) + x)
        return x


class MambaStack(_MixerStack):
    """Layers of Mamba-1, see _MixerStack."""

    def __init__(
        self,
        dim_in: int,
        *,
        layers: int,
        state: int,
        conv: int,
        expand: int,
        dropout: float = 0.0,
        causal: bool = True,
    ) -> None:
        super().__init__(dim_in, lambda: Mamba(dim_in, state, conv, expand), layers, dropout, causal)


class Mamba2Stack(_MixerStack):
    """Layers of Mamba-2, see _MixerStack. Raises ValueError where `heads_dim` does not divide expand * dim_in."""

    def __init__(
        self,
        dim_in: int,
        *,
        layers: int,
        state: int,
        conv: int,
        expand: int,
        heads_dim: int,
        dropout: float = 0.0,
        causal: bool = True,
    ) -> None:
        super().__init__(
            dim_in, lambda: Mamba2(dim_in, state, conv, expand, heads_dim), layers, dropout, causal
        )


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
        nn.init.uniform_(self.dt_proj.weight, -(rank**-0.5), rank**-0.5)
        with torch.no_grad():
            self.dt_proj.bias.copy_(_step_bias(inner))

    def forward(self, x: Tensor, mask: Tensor | None = None, start: Tensor | None = None) -> Tensor:
        """x (B, T, D) -> (B, T, D). A masked row adds nothing to the state and lets it not decay."""
        u, z = self.in_proj(hide(x, mask)).chunk(2, dim=-1)  # no bias: a hidden row stays zero
        u = F.silu(_convolve(self.conv1d, u, start))
        low_rank, B, C = self.x_proj(u).split(self.split, dim=-1)
        delta = F.linear(low_rank, self.dt_proj.weight)
        if mask is not None:  # softplus makes it 0: a step of no time
            delta = delta.masked_fill(~mask.unsqueeze(-1), -math.inf)
        u, delta, B, C, z = (v.transpose(1, 2) for v in (u, delta, B, C, z))
        A = -torch.exp(self.A_log)
        bias = self.dt_proj.bias
        y = selective_scan(u, delta, A, B, C, self.D, z, bias, delta_softplus=True, resets=start)
        return self.out_proj(cast(Tensor, y).transpose(1, 2))


class Mamba2(nn.Module):
    """The Mamba-2 block (Dao & Gu 2024, figure 6) with mamba-ssm's parameter names, shapes and initialisation.

    A checkpoint of `mamba_ssm.Mamba2(dim, d_state=state, d_conv=conv, expand=expand, headdim=heads_dim)` loads as it
    is. Raises ValueError where `heads_dim` does not divide expand * dim.
    """

    def __init__(self, dim: int, state: int, conv: int, expand: int, heads_dim: int) -> None:
        super().__init__()
        inner = expand * dim
        if inner % heads_dim:
            raise ValueError(f"heads of {heads_dim} dims do not divide expand * dim = {inner}")
        heads, mixed = inner // heads_dim, inner + 2 * state
        self.sizes, self.heads_dim = [inner, state], heads_dim
        self.in_proj = nn.Linear(dim, inner + mixed + heads, bias=False)
        self.conv1d = nn.Conv1d(mixed, mixed, conv, groups=mixed, padding=conv - 1)
        self.dt_bias = nn.Parameter(_step_bias(heads))
        self.A_log = nn.Parameter(torch.empty(heads).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(heads))
        self.norm = nn.RMSNorm(inner, eps=1e-5)
        self.out_proj = nn.Linear(inner, dim, bias=False)

    def forward(self, x: Tensor, mask: Tensor | None = None, start: Tensor | None = None) -> Tensor:
        """x (B, T, D) -> (B, T, D). A masked row adds nothing to the state and lets it not decay."""
        inner, state = self.sizes
        parts = [inner, inner + 2 * state, len(self.D)]
        z, mixed, dt = self.in_proj(hide(x, mask)).split(parts, dim=-1)  # no bias: a hidden row stays zero
        mixed = F.silu(_convolve(self.conv1d, mixed, start))
        u, B, C = mixed.split([inner, state, state], dim=-1)
        dt = F.softplus(dt + self.dt_bias)
        if mask is not None:
            dt = dt.masked_fill(~mask.unsqueeze(-1), 0)  # a step of no time
        u = u.unflatten(-1, (-1, self.heads_dim))
        y = ssd_scan(u, dt, -torch.exp(self.A_log), B, C, self.D, resets=start).flatten(2)
        gated = y.to(self.norm.weight.dtype) * F.silu(z)  # the norm is not computed in half precision
        return self.out_proj(self.norm(gated))


def _step_bias(n: int, low: float = 1e-3, high: float = 1e-1) -> Tensor:
    """(n,) biases that softplus makes into steps even in log from `low` to `high`: some states last 1/low rows."""
    step = torch.empty(n).uniform_(math.log(low), math.log(high)).exp()
    return step + torch.log(-torch.expm1(-step))  # the inverse of softplus


def _convolve(conv: nn.Conv1d, u: Tensor, start: Tensor | None) -> Tensor:
    """The causal convolution of each dim by itself, (B, T, D) -> (B, T, D), within each video."""
    past = conv.kernel_size[0] - 1

    def run(u: Tensor, _: Tensor | None) -> Tensor:
        # as an image of one line with the channels last it needs no transposed copies: 15 % of the block's time
        lines = u.contiguous().transpose(1, 2).unsqueeze(2)  # (B, D, 1, T)
        weight = conv.weight.unsqueeze(2)
        lines = F.conv2d(lines, weight, conv.bias, padding=(0, past), groups=conv.groups)
        return lines[..., : u.shape[1]].squeeze(2).transpose(1, 2)

    return with_gaps(run, u, None, start, past)


class GRU(nn.Module):
    """Layers of gated recurrent units (Cho et al. 2014) over the valid rows of each video; zeros in the others.

    If not `causal` it runs both ways, each with half of `dim`, which must then be even (ValueError).
    """

    def __init__(self, dim_in: int, *, dim: int, layers: int = 1, causal: bool = True) -> None:
        super().__init__()
        if not causal and dim % 2:
            raise ValueError(f"a GRU that runs both ways wants an even dim, got {dim}")
        self.dim = dim
        hidden = dim if causal else dim // 2
        self.gru = nn.GRU(dim_in, hidden, layers, batch_first=True, bidirectional=not causal)

    def forward(self, x: Tensor, mask: Tensor | None = None, start: Tensor | None = None) -> Tensor:
        if mask is None and start is None:
            return self.gru(x)[0]
        valid = x.new_ones(x.shape[:2], dtype=torch.bool) if mask is None else mask
        rows = valid.cpu()
        if start is None:
            counts = rows.sum(1).tolist()
        else:
            counts = [int(rows[line, part].sum()) for line, part in videos(start)]
        if not any(counts):  # nothing is known; it should have a gradient all the same
            return self.gru(hide(x, mask))[0] * 0
        sequences = [rows for rows in x[valid].split(counts) if len(rows)]
        packed = self.gru(pack_sequence(sequences, enforce_sorted=False))[0]
        values = torch.cat(unpack_sequence(packed))
        return values.new_zeros(*valid.shape, self.dim).index_put((valid,), values)


# The names a preset uses.
BLOCKS: dict[str, type[nn.Module]] = {
    "linear": Linear,
    "norm": Norm,
    "tcn": TCN,
    "multi_tcn": MultiTCN,
    "mamba": MambaStack,
    "mamba2": Mamba2Stack,
    "transformer": Transformer,
    "gru": GRU,
}
