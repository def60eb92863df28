"""A preset made into one network: streams -> encode -> fuse -> decode -> task heads."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from .. import VacliError
from .attention import CrossAttention
from .blocks import BLOCKS
from .lines import any_in_video
from .preset import BlockSpec, Encode, Preset, Task
from .vgg import BANDS, LogMelVgg

# Shape legend: B lines (windows, or packs of whole videos), L rows, D dims of a stream, H dims after encoding,
# K targets of a task.

TASK_TARGETS = {"va": 2}


class Network(nn.Module):
    """streams {name: (B, L, D)}, seen {name: (B, L) bool}, start (B, L) bool or None -> {task: (B, L, K)}.

    Where a stream saw nothing, a learned vector of its own stands in after encoding (to attention it is not there); a
    whole stream may be missing from the inputs. Blocks are told which rows have any stream at all, and where in a
    line the next video begins. patched: the streams that come as log-mel patches (B, L, 96, 64), and where those lie.
    """

    def __init__(self, preset: Preset, dims: dict[str, int]) -> None:
        super().__init__()
        self.fuse = preset.fuse
        self.modality_dropout = preset.train.modality_dropout
        self.streams = list(preset.streams)
        # in the order of the streams, not by name: torch refuses names with a dot, and "half" or "type"
        encoders = [
            _StreamEncoder(encode_of(preset, name), name, dims[name], preset.causal) for name in self.streams
        ]
        widths = [encoder.dim for encoder in encoders]
        self.patched = {
            name: encoder.vgg_spec.window
            for name, encoder in zip(self.streams, encoders, strict=True)
            if encoder.vgg_spec is not None
        }
        self.encode = nn.ModuleList(encoders)
        self.absent = nn.ParameterList(nn.Parameter(torch.zeros(width)) for width in widths)
        if self.fuse == "sum" and len(set(widths)) > 1:
            raise VacliError(
                f"fuse = sum wants streams of one width, got {dict(zip(self.streams, widths, strict=True))}: "
                "end each stream's blocks with the same dim, or use fuse = concat"
            )
        dim = widths[0] if self.fuse == "sum" else sum(widths)
        if self.fuse == "cross_attn":
            self.ask = nn.ModuleList(_ask(preset, widths[0], width) for width in widths[1:])
            dim = widths[0] * len(widths)
        self.decode, dim = _chain(preset.decode, dim, preset.causal)
        self.tasks = nn.ModuleDict(
            {name: _head(task, dim, TASK_TARGETS[name]) for name, task in preset.tasks.items()}
        )

    def standardise_by(self, moments: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Take mean and deviation (D,) of each stream, once, from the training rows."""
        for name, encoder in zip(self.streams, self.encode, strict=True):
            assert isinstance(encoder, _StreamEncoder)
            if name not in self.patched:
                mean, deviation = moments[name]
                encoder.mean.copy_(mean)
                encoder.deviation.copy_(deviation)

    def start_vgg(self) -> None:
        """Take the weights that the preset names for a VGG. Raises VacliError where they do not fit."""
        for encoder in self.encode:
            assert isinstance(encoder, _StreamEncoder)
            if encoder.vgg_spec is not None and encoder.vgg_spec.weights:
                assert encoder.vgg is not None
                encoder.vgg.start_from(Path(encoder.vgg_spec.weights))

    def encoded(
        self,
        streams: dict[str, torch.Tensor],
        seen: dict[str, torch.Tensor],
        start: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """Every given stream after its own blocks, {name: (B, L, H)}; a row it did not see holds anything."""
        encoders = dict(zip(self.streams, self.encode, strict=True))
        return {name: encoders[name](x, seen[name], start) for name, x in streams.items()}

    def forward(
        self,
        streams: dict[str, torch.Tensor],
        seen: dict[str, torch.Tensor],
        start: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        if self.training and self.modality_dropout and len(seen) > 1:
            seen = drop_streams(seen, start, self.modality_dropout)
        any_seen = torch.stack(list(seen.values())).any(0)
        encoded = self.encoded(streams, seen, start)
        x = self._fused(encoded, seen, any_seen, start)
        for block in self.decode:
            x = block(x, any_seen, start)
        return {name: head(x) for name, head in self.tasks.items()}

    def _fused(
        self,
        encoded: dict[str, torch.Tensor],
        seen: dict[str, torch.Tensor],
        any_seen: torch.Tensor,
        start: torch.Tensor | None,
    ) -> torch.Tensor:
        parts = []
        for name, absent in zip(self.streams, self.absent, strict=True):
            part = absent.expand(*any_seen.shape, -1)
            if name in encoded:
                part = torch.where(seen[name][..., None], encoded[name], part)
            parts.append(part)
        if self.fuse == "sum":
            return torch.stack(parts).sum(0)
        if self.fuse == "concat":
            return torch.cat(parts, dim=-1)
        query, found = parts[0], [parts[0]]
        for name, part, ask in zip(self.streams[1:], parts[1:], self.ask, strict=True):
            heard = seen[name] if name in encoded else torch.zeros_like(any_seen)
            found.append(ask(query, part, heard, start))
        return torch.cat(found, dim=-1)


def drop_streams(
    seen: dict[str, torch.Tensor], start: torch.Tensor | None, chance: float
) -> dict[str, torch.Tensor]:
    """seen {name: (B, L)} with every stream of every video gone with this chance; one that saw something stays."""
    every = torch.stack(list(seen.values()), dim=1)  # (B, S, L)
    B, S, L = every.shape
    draw = torch.rand(B, S, L, device=every.device)
    if start is None:
        first = torch.zeros(B, 1, L, dtype=torch.long, device=every.device)
    else:  # the row that each row's video begins with
        place = torch.arange(L, device=every.device)
        first = torch.where(start, place, 0).cummax(1).values[:, None]
    saw = torch.cat([cast(torch.Tensor, any_in_video(x, start)).expand(B, L) for x in seen.values()], dim=1)
    draw = draw.gather(2, first.expand(B, S, L)).masked_fill(~saw.view(B, S, L), -1)
    kept = (draw >= chance) | (draw == draw.amax(1, keepdim=True))
    return dict(zip(seen, (every & kept).unbind(1), strict=True))


def _ask(preset: Preset, dim_query: int, dim_key: int) -> nn.Module:
    spec = preset.cross_attn
    try:
        return CrossAttention(dim_query, dim_key, **spec.model_dump())
    except ValueError as e:  # heads that do not divide the width
        raise VacliError(f"preset {preset.name}: cross_attn: {e}") from e


def encode_of(preset: Preset, stream: str) -> Encode:
    """What is done to a stream: `mae@<digits>` is encoded as `mae` is."""
    first = ("first",) if stream == preset.streams[0] else ()
    names = (stream, stream.partition("@")[0], *first, "*")
    return next((preset.encode[n] for n in names if n in preset.encode), Encode())


class _StreamEncoder(nn.Module):
    mean: torch.Tensor
    deviation: torch.Tensor

    def __init__(self, spec: Encode, name: str, dim: int, causal: bool) -> None:
        super().__init__()
        self.standardise = spec.standardise
        self.vgg_spec = spec.vgg
        self.vgg: LogMelVgg | None = None
        if spec.vgg is None:
            self.register_buffer("mean", torch.zeros(dim))
            self.register_buffer("deviation", torch.ones(dim))
        else:
            if dim != BANDS:
                raise VacliError(
                    f"encode.{name}.vgg reads log-mel of {BANDS} bands, got a stream of {dim} dims; "
                    "wanted the track of `vacli extract --encoder logmel`"
                )
            self.vgg = LogMelVgg(spec.vgg.width)
            dim = self.vgg.dim
        self.blocks, self.dim = _chain(spec.blocks, dim, causal)

    def forward(self, x: torch.Tensor, seen: torch.Tensor, start: torch.Tensor | None) -> torch.Tensor:
        if self.vgg is not None:
            x = self.vgg(x, seen)
        elif self.standardise:
            x = (x - self.mean) / self.deviation
        for block in self.blocks:
            x = block(x, seen, start)
        return x


def _chain(specs: list[BlockSpec], dim: int, causal: bool) -> tuple[nn.ModuleList, int]:
    """The blocks behind each other, and the dims of what comes out."""
    blocks = nn.ModuleList()
    for spec in specs:
        ((name, options),) = spec.items()
        if "causal" in inspect.signature(BLOCKS[name]).parameters:
            options = {"causal": causal, **options}
        try:
            block: Any = BLOCKS[name](dim, **options)
        except ValueError as e:  # a dropout of 2
            raise VacliError(f"block {name} with {options}: {e}") from e
        blocks.append(block)
        dim = block.dim
    return blocks, dim


def _head(task: Task, dim: int, targets: int) -> nn.Module:
    layers: list[nn.Module] = [nn.LayerNorm(dim)] if task.norm else []
    if task.hidden:
        act = nn.GELU() if task.act == "gelu" else nn.ReLU()
        layers += [nn.Linear(dim, task.hidden), act]
        layers += [nn.Dropout(task.dropout)] if task.dropout else []
        dim = task.hidden
    layers += [nn.Linear(dim, targets)]
    layers += [nn.Tanh()] if task.tanh else []
    return nn.Sequential(*layers) if len(layers) > 1 else layers[0]
