"""Causal networks a row at a time: every block beside its twin in blocks.py, with what it remembers in fixed tensors.

Shape legend: D dims of a row, K taps of a convolution, N states a dim, H heads, P dims of a head.

A twin is called as `twin(row (D,), seen) -> row (D',)`, row after row. Where not `seen`, what the row holds is not
read, as in a masked row of blocks.py, and the twin gives what the block gives there. All that it remembers lies in
`states`, tensors whose shapes never change, zeros before the first row. Weights are shared with the
block, which is to be left as it is; convolutions have a copy, in the order in which it is read.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import GRU, TCN, Linear, Mamba2, Mamba2Stack, MambaStack, MultiTCN, Norm
from .model import Network


class State(Protocol):
    """What a twin remembers: a tensor, or the past of a convolution."""

    def zero_(self) -> object: ...


class Twin(Protocol):
    """A block that goes row by row, see the top of this file."""

    states: list[State]

    def __call__(self, row: Tensor, seen: bool) -> Tensor: ...


class LiveNetwork:
    """`Network.forward` over one line, row by row: {stream: (D,)} of those that saw something -> valence, arousal (2,).

    The network must be causal (live.why_not_live), and in eval mode.
    """

    def __init__(self, net: Network) -> None:
        assert not net.patched
        assert not net.training
        assert net.fuse != "cross_attn" or len(net.streams) == 1
        self._streams = {
            name: (_Standardise(encoder), twins(encoder.get_submodule("blocks").children()), absent.detach())
            for name, encoder, absent in zip(net.streams, net.encode, net.absent, strict=True)
        }
        self._sum = net.fuse == "sum"
        self._decode = twins(net.decode)
        self._head = net.tasks["va"]
        every = chain(self._decode, *(blocks for _, blocks, _ in self._streams.values()))
        self._states = [state for twin in every for state in twin.states]

    def reset(self) -> None:
        """Forget every row."""
        for state in self._states:
            state.zero_()

    def step(self, rows: Mapping[str, Tensor]) -> Tensor:
        """To be called in inference mode."""
        parts = []
        for name, (standardise, blocks, absent) in self._streams.items():
            seen = name in rows
            x = standardise(rows[name]) if seen else standardise.nothing
            for block in blocks:
                x = block(x, seen)
            parts.append(x if seen else absent)
        x = torch.stack(parts).sum(0) if self._sum else torch.cat(parts)
        for block in self._decode:
            x = block(x, bool(rows))
        return self._head(x)


class _Standardise:
    """What a stream's rows go through before its blocks; `nothing` stands for a row that was not seen."""

    def __init__(self, encoder: Any) -> None:
        self.mean, self.deviation = encoder.mean, encoder.deviation
        self.nothing = torch.zeros_like(self.mean)
        self._on = encoder.standardise

    def __call__(self, row: Tensor) -> Tensor:
        return (row - self.mean) / self.deviation if self._on else row


def twins(blocks: Iterable[nn.Module]) -> list[Twin]:
    """The twin of each block."""
    return [TWINS[type(block)](block) for block in blocks]


class _Past:
    """The last K rows that are `dilation` apart, oldest first, as one contiguous view (K * D,).

    Each row is written twice, K places apart in the ring of its phase, so that no window wraps and nothing is moved.
    """

    def __init__(self, taps: int, dilation: int, dim: int, like: Tensor) -> None:
        self._rings = like.new_zeros(dilation, 2, taps, dim)
        self._places = [
            (ring[:, tap], ring.view(2 * taps, dim)[tap + 1 : tap + 1 + taps].view(-1))
            for tap in range(taps)
            for ring in self._rings
        ]
        self._next = 0

    def zero_(self) -> None:
        self._rings.zero_()
        self._next = 0

    def push(self, row: Tensor | None) -> Tensor:
        """The window that ends with this row; None is one of zeros. It is good until the next call."""
        slots, window = self._places[self._next]
        self._next = (self._next + 1) % len(self._places)
        if row is None:
            slots.zero_()
        else:
            slots.copy_(row)
        return window


class _Affine:
    """weight @ row + bias."""

    def __init__(self, layer: nn.Module) -> None:
        self.weight = layer.get_parameter("weight").detach().flatten(1)  # that of a 1x1 convolution too
        self.bias = layer.get_parameter("bias").detach()

    def __call__(self, row: Tensor) -> Tensor:
        return torch.addmv(self.bias, self.weight, row)


class _Linear:
    def __init__(self, block: Linear) -> None:
        self.states: list[State] = []
        self._map = _Affine(block.map)

    def __call__(self, row: Tensor, seen: bool) -> Tensor:
        return self._map(row) if seen else self._map.bias


class _Norm:
    def __init__(self, block: Norm) -> None:
        self.states: list[State] = []
        self._shape = (block.dim,)

    def __call__(self, row: Tensor, seen: bool) -> Tensor:
        return F.layer_norm(_hide(row, seen), self._shape)


class _Convolution:
    """A dilated causal convolution, its weight norm folded in."""

    def __init__(self, conv: nn.Conv1d) -> None:
        weight = conv.weight.detach()  # (D', D, K)
        assert conv.bias is not None
        self._weight, self._bias = weight.transpose(1, 2).flatten(1).contiguous(), conv.bias.detach()
        self.past = _Past(weight.shape[2], conv.dilation[0], weight.shape[1], weight)

    def __call__(self, row: Tensor | None) -> Tensor:
        return torch.addmv(self._bias, self._weight, self.past.push(row))


class _TCN:
    def __init__(self, block: TCN) -> None:
        self._levels = [_Level(level) for level in block.levels]
        self.states: list[State] = [state for level in self._levels for state in level.states]

    def __call__(self, row: Tensor, seen: bool) -> Tensor:
        for level in self._levels:
            row = level(row, seen)
        return row


class _Level:
    def __init__(self, level: Any) -> None:
        assert level.pad[1] == 0
        self._conv1, self._conv2 = _Convolution(level.conv1), _Convolution(level.conv2)
        self._skip = None if isinstance(level.skip, nn.Identity) else _Affine(level.skip)
        self._slopes = [_slope(act) for act in (level.act1, level.act2, level.act)]
        self.states: list[State] = [self._conv1.past, self._conv2.past]

    def __call__(self, row: Tensor, seen: bool) -> Tensor:
        slope1, slope2, slope = self._slopes
        y = F.leaky_relu_(self._conv1(row if seen else None), slope1)
        y = F.leaky_relu_(self._conv2(y if seen else None), slope2)
        row = _hide(row, seen)
        y += row if self._skip is None else self._skip(row)
        return F.leaky_relu_(y, slope)


def _slope(act: nn.Module) -> float:
    if isinstance(act, nn.LeakyReLU):
        return act.negative_slope
    assert isinstance(act, nn.PReLU)
    return act.weight.item()  # one for all dims


class _MultiTCN:
    def __init__(self, block: MultiTCN) -> None:
        self._tcns = [_TCN(tcn) for tcn in block.tcns if isinstance(tcn, TCN)]
        self._map = _Affine(block.map)
        self.states: list[State] = [state for tcn in self._tcns for state in tcn.states]

    def __call__(self, row: Tensor, seen: bool) -> Tensor:
        return self._map(torch.cat([tcn(row, seen) for tcn in self._tcns]))


class _MixerStack:
    def __init__(self, block: MambaStack | Mamba2Stack) -> None:
        assert not block.backward_mixers
        self._mixers: list[_Mamba | _Mamba2] = [
            _Mamba2(mixer) if isinstance(mixer, Mamba2) else _Mamba(mixer) for mixer in block.mixers
        ]
        self._norms = [_LayerNorm(norm) for norm in block.norms]
        self.states: list[State] = [state for mixer in self._mixers for state in mixer.states]

    def __call__(self, row: Tensor, seen: bool) -> Tensor:
        row = _hide(row, seen)
        for mixer, norm in zip(self._mixers, self._norms, strict=True):
            y = mixer(row if seen else None)
            row = norm(row if y is None else y.add_(row))
        return row


class _LayerNorm:
    def __init__(self, norm: Any) -> None:
        self._shape, self._eps = norm.normalized_shape, norm.eps
        self._weight, self._bias = norm.weight.detach(), norm.bias.detach()

    def __call__(self, row: Tensor) -> Tensor:
        return F.layer_norm(row, self._shape, self._weight, self._bias, self._eps)


class _Depthwise:
    """The causal convolution of each dim by itself, and SiLU."""

    def __init__(self, conv: nn.Conv1d) -> None:
        assert conv.bias is not None
        self._weight = conv.weight.detach()[:, 0].t().flatten()  # (K * D,)
        self._bias = conv.bias.detach()
        self._shape = (conv.kernel_size[0], len(self._bias))
        self.past = _Past(*self._shape[:1], 1, self._shape[1], self._weight)

    def __call__(self, row: Tensor) -> Tensor:
        return F.silu((self.past.push(row) * self._weight).view(self._shape).sum(0).add_(self._bias))


class _Mamba:
    """A row not seen is None and gives None for zeros: no projection has a bias, and the gate is silu(0)."""

    def __init__(self, block: Any) -> None:
        self._in, self._x, self._out = (
            p.weight.detach() for p in (block.in_proj, block.x_proj, block.out_proj)
        )
        self._conv, self._step, self._split = _Depthwise(block.conv1d), _Affine(block.dt_proj), block.split
        self._D = block.D.detach()
        self._A = -block.A_log.detach().exp().t().contiguous() / math.log(2)  # (N, D), for exp2
        self._state = torch.zeros_like(self._A)
        self.states: list[State] = [self._conv.past, self._state]

    def __call__(self, row: Tensor | None) -> Tensor | None:
        if row is None:
            self._conv.past.push(None)
            return None
        u, z = torch.mv(self._in, row).chunk(2)
        u = self._conv(u)
        low_rank, B, C = torch.mv(self._x, u).split(self._split)
        delta = F.softplus(self._step(low_rank))
        self._state.mul_((self._A * delta).exp2_()).addr_(B, delta * u)
        y = torch.mv(self._state.t(), C).addcmul_(u, self._D)
        return torch.mv(self._out, y.mul_(F.silu(z)))


class _Mamba2:
    """As _Mamba; the norm of zeros is zeros too."""

    def __init__(self, block: Mamba2) -> None:
        self._in, self._out = (p.weight.detach() for p in (block.in_proj, block.out_proj))
        self._conv, self._norm = _Depthwise(block.conv1d), block.norm
        self._A, self._bias = -block.A_log.detach().exp(), block.dt_bias.detach()
        self._D = block.D.detach().repeat_interleave(block.heads_dim)
        inner, states = block.sizes
        self._parts, self._mixed = [inner, inner + 2 * states, len(self._A)], [inner, states, states]
        self._state = self._A.new_zeros(states, inner)
        self._by_head = self._state.view(states, len(self._A), block.heads_dim)  # (N, H, P)
        self.states: list[State] = [self._conv.past, self._state]

    def __call__(self, row: Tensor | None) -> Tensor | None:
        if row is None:
            self._conv.past.push(None)
            return None
        z, mixed, dt = torch.mv(self._in, row).split(self._parts)
        u, B, C = self._conv(mixed).split(self._mixed)
        dt = F.softplus(dt + self._bias)
        self._by_head.mul_((dt * self._A).exp_().unsqueeze(1))
        self._state.addr_(B, (u.view(len(dt), -1) * dt.unsqueeze(1)).view(-1))
        y = torch.mv(self._state.t(), C).addcmul_(u, self._D)
        return torch.mv(self._out, self._norm(y.mul_(F.silu(z))))


class _GRU:
    """Where a row is not seen it gives zeros, also in a video where none is, whose offline twin gives anything."""

    def __init__(self, block: GRU) -> None:
        assert not block.gru.bidirectional
        self._layers = [[w.detach() for w in layer] for layer in block.gru.all_weights]
        self._hidden = [layer[1].new_zeros(1, block.dim) for layer in self._layers]
        self._nothing = torch.zeros_like(self._hidden[0][0])
        self.states: list[State] = [*self._hidden]

    def __call__(self, row: Tensor, seen: bool) -> Tensor:
        if not seen:
            return self._nothing
        x = row.unsqueeze(0)
        for weights, hidden in zip(self._layers, self._hidden, strict=True):
            x = hidden.copy_(torch.gru_cell(x, hidden, *weights))
        return x[0].clone()


def _hide(row: Tensor, seen: bool) -> Tensor:
    return row if seen else torch.zeros_like(row)


# What goes live. A block that is not here is refused, and so is one that looks both ways.
TWINS: dict[type[nn.Module], Any] = {
    Linear: _Linear,
    Norm: _Norm,
    TCN: _TCN,
    MultiTCN: _MultiTCN,
    MambaStack: _MixerStack,
    Mamba2Stack: _MixerStack,
    GRU: _GRU,
}
