"""A preset made into one network: streams -> encode -> fuse -> decode -> task heads."""

from __future__ import annotations

import inspect
import tomllib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import torch
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    create_model,
    field_validator,
    model_validator,
)
from torch import nn

from .. import VacliError
from .blocks import BLOCKS

# Shape legend: B windows, L rows, D dims of a stream, H dims after encoding, K targets of a task.

BlockSpec = dict[str, dict[str, Any]]
TASK_TARGETS = {"va": 2}


class _Strict(BaseModel):
    """Nothing is guessed: an unknown key, "10" for 10 and an infinite learning rate are all refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Encode(_Strict):
    """What is done to one stream alone. standardise: by mean and deviation of the training rows."""

    standardise: bool = True
    blocks: list[BlockSpec] = []

    @field_validator("blocks")
    @classmethod
    def _known(cls, blocks: list[BlockSpec]) -> list[BlockSpec]:
        return _check_blocks(blocks)


class Task(_Strict):
    """A head: Linear - ReLU - Linear with `hidden` units between, or one Linear where hidden is 0."""

    hidden: int = Field(128, ge=0)


class WindowSpec(_Strict):
    """Rows of a training window, and rows from one window to the next."""

    length: int = Field(300, ge=1)
    stride: int = Field(200, ge=1)

    @model_validator(mode="after")
    def _covering(self) -> WindowSpec:
        if self.stride > self.length:
            raise ValueError(
                f"stride {self.stride} is beyond length {self.length}: rows between windows would be lost"
            )
        return self


class TrainSpec(_Strict):
    """AdamW, linear warm-up then cosine to zero by steps, early stop on the mean validation CCC."""

    epochs: int = Field(50, ge=1)
    batch: int = Field(16, ge=1)
    lr: float = Field(3e-4, gt=0)
    weight_decay: float = Field(1e-3, ge=0)
    warmup_epochs: float = Field(5, ge=0)
    clip_norm: float = Field(1.0, gt=0)
    patience: int = Field(15, ge=1)


class Preset(_Strict):
    """One system, whole. encode: by stream name, "*" for every other stream."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    source: str = ""
    streams: list[str] = Field(min_length=1)
    encode: dict[str, Encode] = {"*": Encode()}
    fuse: Literal["sum", "concat"] = "concat"
    decode: list[BlockSpec] = []
    tasks: dict[Literal["va"], Task] = Field({"va": Task()}, min_length=1)
    windows: WindowSpec = WindowSpec()
    train: TrainSpec = TrainSpec()

    @field_validator("decode")
    @classmethod
    def _known(cls, blocks: list[BlockSpec]) -> list[BlockSpec]:
        return _check_blocks(blocks)

    @field_validator("streams")
    @classmethod
    def _once(cls, streams: list[str]) -> list[str]:
        if len(set(streams)) < len(streams):
            raise ValueError(f"a stream is named twice: {', '.join(streams)}")
        return streams


def _check_blocks(blocks: list[BlockSpec]) -> list[BlockSpec]:
    for spec in blocks:
        if len(spec) != 1:
            raise ValueError(
                f"a block is one name with its options, such as {{ linear = {{ dim = 256 }} }}, got {spec}"
            )
        ((name, options),) = spec.items()
        if name not in BLOCKS:
            raise ValueError(f"unknown block {name!r}; known: {', '.join(BLOCKS)}")
        known = _options_of(BLOCKS[name])
        try:
            known.model_validate(options)
        except ValidationError as e:
            raise ValueError(f"block {name}: {_one_line(e, known)}") from e
    return blocks


_Count = Annotated[int, Field(ge=1)]
_COUNTS: dict[Any, Any] = {int: _Count, Sequence[int]: Annotated[Sequence[_Count], Field(min_length=1)]}


def _options_of(block: type[nn.Module]) -> type[BaseModel]:
    """A block's keyword options, read from its signature; whole numbers among them count from 1."""
    hints = get_type_hints(block.__init__)
    fields: dict[str, Any] = {
        p.name: (_COUNTS.get(hints[p.name], hints[p.name]), ... if p.default is p.empty else p.default)
        for p in inspect.signature(block).parameters.values()
        if p.kind is p.KEYWORD_ONLY
    }
    return create_model(block.__name__, __base__=_Strict, **fields)


def _one_line(error: ValidationError, top: type[BaseModel]) -> str:
    """The first thing wrong: its key, what came, and for an unknown key those known in its table."""
    first = error.errors()[0]
    key = ".".join(map(str, first["loc"]))
    if first["type"] == "extra_forbidden":
        table = _TABLES.get(first["loc"][0], top) if len(first["loc"]) > 1 else top
        return f"unknown key {key}; known there: {', '.join(table.model_fields) or 'none'}"
    if first["type"] == "value_error":  # our own: says what came
        return f"{key}: {first['ctx']['error']}"
    return f"{key}: {first['msg']}, got {str(first['input'])[:80]!r}"


_TABLES: dict[int | str, type[BaseModel]] = {
    "encode": Encode,
    "tasks": Task,
    "windows": WindowSpec,
    "train": TrainSpec,
}


def preset_names() -> list[str]:
    """The presets that come with vacli."""
    return sorted(p.name.removesuffix(".toml") for p in _folder().iterdir() if p.name.endswith(".toml"))


def preset_text(head: str) -> str:
    """The TOML of a preset by name, or of a user's file. Raises VacliError that lists the known names."""
    if head.endswith(".toml"):
        try:
            return Path(head).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as e:
            raise VacliError(f"cannot read the preset {head}: {e}; wanted a TOML file") from e
    if head not in preset_names():
        raise VacliError(f"unknown head {head!r}; known: {', '.join(preset_names())}; or a file my.toml")
    return (_folder() / f"{head}.toml").read_text(encoding="utf-8")


def _folder() -> Any:
    return resources.files(f"{__package__}.presets")


def load_preset(head: str, changes: dict[str, str] | None = None, streams: list[str] | None = None) -> Preset:
    """A checked preset. changes: dotted key -> TOML value, as in --set train.epochs=10. streams: instead of its own.

    Raises VacliError that names the key, what came, and the keys known there.
    """
    try:
        tree = tomllib.loads(preset_text(head))
    except tomllib.TOMLDecodeError as e:
        raise VacliError(f"preset {head} is not TOML: {e}") from e
    for key, value in (changes or {}).items():
        *path, last = key.split(".")
        branch = tree
        for part in path:
            branch = branch.setdefault(part, {})
            if not isinstance(branch, dict):
                raise VacliError(f"--set {key}={value}: {part} is no table in preset {head}")
        branch[last] = _toml_value(value)
    preset = check_preset(tree, head)
    strangers = preset.encode.keys() - {"*", *preset.streams}  # a typo here would go unheard
    if strangers:
        raise VacliError(
            f"preset {head}: encode.{min(strangers)} is for none of its streams; "
            f'wanted "*" or one of {", ".join(preset.streams)}'
        )
    return check_preset({**tree, "streams": streams}, head) if streams else preset


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"x = {text}")["x"]
    except tomllib.TOMLDecodeError:
        return text  # a bare word


def check_preset(tree: dict[str, Any], where: str) -> Preset:
    """Raises VacliError that names the key, what came, and the keys known there."""
    try:
        return Preset.model_validate(tree)
    except ValidationError as e:
        raise VacliError(f"preset {where}: {_one_line(e, Preset)}") from e


class Network(nn.Module):
    """streams {name: (B, L, D)}, seen {name: (B, L) bool} -> {task: (B, L, K)}.

    Where a stream saw nothing, a learned vector of its own stands in after encoding; a whole stream may be missing
    from the inputs. Blocks are told which rows have any stream at all.
    """

    def __init__(self, preset: Preset, dims: dict[str, int]) -> None:
        super().__init__()
        self.fuse = preset.fuse
        self.streams = list(preset.streams)
        # in the order of the streams, not by name: torch refuses names with a dot, and "half" or "type"
        encoders = [_StreamEncoder(_encode_of(preset, name), dims[name]) for name in self.streams]
        widths = [encoder.dim for encoder in encoders]
        self.encode = nn.ModuleList(encoders)
        self.absent = nn.ParameterList(nn.Parameter(torch.zeros(width)) for width in widths)
        if self.fuse == "sum" and len(set(widths)) > 1:
            raise VacliError(
                f"fuse = sum wants streams of one width, got {dict(zip(self.streams, widths, strict=True))}: "
                "end each stream's blocks with the same dim, or use fuse = concat"
            )
        dim = widths[0] if self.fuse == "sum" else sum(widths)
        self.decode, dim = _chain(preset.decode, dim)
        self.tasks = nn.ModuleDict(
            {name: _head(task, dim, TASK_TARGETS[name]) for name, task in preset.tasks.items()}
        )

    def standardise_by(self, moments: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Take mean and deviation (D,) of each stream, once, from the training rows."""
        for name, encoder in zip(self.streams, self.encode, strict=True):
            assert isinstance(encoder, _StreamEncoder)
            mean, deviation = moments[name]
            encoder.mean.copy_(mean)
            encoder.deviation.copy_(deviation)

    def forward(
        self, streams: dict[str, torch.Tensor], seen: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        any_seen = torch.stack(list(seen.values())).any(0)
        parts = []
        for name, encoder, absent in zip(self.streams, self.encode, self.absent, strict=True):
            part = absent.expand(*any_seen.shape, -1)
            if name in streams:
                part = torch.where(seen[name][..., None], encoder(streams[name], seen[name]), part)
            parts.append(part)
        x = torch.stack(parts).sum(0) if self.fuse == "sum" else torch.cat(parts, dim=-1)
        for block in self.decode:
            x = block(x, any_seen)
        return {name: head(x) for name, head in self.tasks.items()}


def _encode_of(preset: Preset, stream: str) -> Encode:
    """What is done to a stream: `mae@<digits>` is encoded as `mae` is."""
    names = (stream, stream.partition("@")[0], "*")
    return next((preset.encode[n] for n in names if n in preset.encode), Encode())


class _StreamEncoder(nn.Module):
    mean: torch.Tensor
    deviation: torch.Tensor

    def __init__(self, spec: Encode, dim: int) -> None:
        super().__init__()
        self.standardise = spec.standardise
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("deviation", torch.ones(dim))
        self.blocks, self.dim = _chain(spec.blocks, dim)

    def forward(self, x: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        if self.standardise:
            x = (x - self.mean) / self.deviation
        for block in self.blocks:
            x = block(x, seen)
        return x


def _chain(specs: list[BlockSpec], dim: int) -> tuple[nn.ModuleList, int]:
    """The blocks behind each other, and the dims of what comes out."""
    blocks = nn.ModuleList()
    for spec in specs:
        ((name, options),) = spec.items()
        try:
            block: Any = BLOCKS[name](dim, **options)
        except ValueError as e:  # a dropout of 2
            raise VacliError(f"block {name} with {options}: {e}") from e
        blocks.append(block)
        dim = block.dim
    return blocks, dim


def _head(task: Task, dim: int, targets: int) -> nn.Module:
    if task.hidden == 0:
        return nn.Linear(dim, targets)
    return nn.Sequential(nn.Linear(dim, task.hidden), nn.ReLU(), nn.Linear(task.hidden, targets))
