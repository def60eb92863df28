"""A preset made into one network: streams -> encode -> fuse -> decode -> task heads."""

from __future__ import annotations

import inspect
import tomllib
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from torch import nn

from .. import VacliError
from .blocks import BLOCKS

# Shape legend: B windows, L rows, D dims of a stream, H dims after encoding, K targets of a task.

BlockSpec = dict[str, dict[str, Any]]
TASK_TARGETS = {"va": 2}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


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
            raise ValueError(f"stride {self.stride} is beyond length {self.length}: rows between windows would be lost")
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
    tasks: dict[Literal["va"], Task] = {"va": Task()}
    windows: WindowSpec = WindowSpec()
    train: TrainSpec = TrainSpec()

    @field_validator("decode")
    @classmethod
    def _known(cls, blocks: list[BlockSpec]) -> list[BlockSpec]:
        return _check_blocks(blocks)


def _check_blocks(blocks: list[BlockSpec]) -> list[BlockSpec]:
    for spec in blocks:
        if len(spec) != 1:
            raise ValueError(
                f"a block is one name with its options, such as {{ linear = {{ dim = 256 }} }}, got {spec}"
            )
        ((name, options),) = spec.items()
        if name not in BLOCKS:
            raise ValueError(f"unknown block {name!r}; known: {', '.join(BLOCKS)}")
        known = [k for k in inspect.signature(BLOCKS[name]).parameters if k != "dim_in"]
        unknown = set(options) - set(known)
        if unknown:
            raise ValueError(
                f"block {name} has no option {', '.join(sorted(unknown))}; known: {', '.join(known)}"
            )
    return blocks


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
    """A checked preset. changes: dotted key -> TOML value, as in --set train.epochs=10. streams: instead of its own."""
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
    if streams:
        tree["streams"] = streams
    return check_preset(tree, head)


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
        first = e.errors()[0]
        key = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            raise VacliError(
                f"preset {where}: unknown key {key}; known there: {_known_keys(first['loc'])}"
            ) from e
        raise VacliError(f"preset {where}: {key}: {first['msg']}, got {str(first['input'])[:80]!r}") from e


def _known_keys(location: tuple[int | str, ...]) -> str:
    tables: dict[Any, type[BaseModel]] = {
        "encode": Encode,
        "tasks": Task,
        "windows": WindowSpec,
        "train": TrainSpec,
    }
    table = tables.get(location[0], Preset) if len(location) > 1 else Preset
    return ", ".join(table.model_fields)


class Network(nn.Module):
    """streams {name: (B, L, D)}, seen {name: (B, L) bool} -> {task: (B, L, K)}.

    Where a stream saw nothing, a learned vector of its own stands in after encoding; a whole stream may be missing
    from the inputs. Blocks are told which rows have any stream at all.
    """

    def __init__(self, preset: Preset, dims: dict[str, int]) -> None:
        super().__init__()
        self.fuse = preset.fuse
        self.encode = nn.ModuleDict()
        self.absent = nn.ParameterDict()
        for name in preset.streams:
            spec = preset.encode.get(name) or preset.encode.get("*") or Encode()
            self.encode[name] = _StreamEncoder(spec, dims[name])
            self.absent[name] = nn.Parameter(torch.zeros(self.encode[name].dim))
        widths = [e.dim for e in self.encode.values()]
        if self.fuse == "sum" and len(set(widths)) > 1:
            raise VacliError(
                f"fuse = sum wants streams of one width, got {dict(zip(self.encode, widths, strict=True))}"
            )
        dim = widths[0] if self.fuse == "sum" else sum(widths)
        self.decode = nn.ModuleList(_chain(preset.decode, dim))
        dim = self.decode[-1].dim if len(self.decode) else dim
        self.tasks = nn.ModuleDict(
            {name: _head(task, dim, TASK_TARGETS[name]) for name, task in preset.tasks.items()}
        )

    def standardise_by(self, moments: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Take mean and deviation (D,) of each stream, once, from the training rows."""
        for name, (mean, deviation) in moments.items():
            self.encode[name].mean.copy_(mean)
            self.encode[name].deviation.copy_(deviation)

    def forward(
        self, streams: dict[str, torch.Tensor], seen: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        any_seen = torch.stack(list(seen.values())).any(0)
        parts = []
        for name, encoder in self.encode.items():
            absent = self.absent[name].expand(*any_seen.shape, -1)
            if name not in streams:
                parts.append(absent)
                continue
            parts.append(torch.where(seen[name][..., None], encoder(streams[name], seen[name]), absent))
        x = torch.stack(parts).sum(0) if self.fuse == "sum" else torch.cat(parts, dim=-1)
        for block in self.decode:
            x = block(x, any_seen)
        return {name: head(x) for name, head in self.tasks.items()}


class _StreamEncoder(nn.Module):
    mean: torch.Tensor
    deviation: torch.Tensor

    def __init__(self, spec: Encode, dim: int) -> None:
        super().__init__()
        self.standardise = spec.standardise
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("deviation", torch.ones(dim))
        self.blocks = nn.ModuleList(_chain(spec.blocks, dim))
        self.dim: int = self.blocks[-1].dim if len(self.blocks) else dim

    def forward(self, x: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        if self.standardise:
            x = (x - self.mean) / self.deviation
        for block in self.blocks:
            x = block(x, seen)
        return x


def _chain(specs: list[BlockSpec], dim: int) -> list[nn.Module]:
    blocks: list[nn.Module] = []
    for spec in specs:
        ((name, options),) = spec.items()
        try:
            blocks.append(BLOCKS[name](dim, **options))
        except (TypeError, ValueError) as e:
            raise VacliError(f"block {name} with {options}: {e}") from e
        dim = blocks[-1].dim
    return blocks


def _head(task: Task, dim: int, targets: int) -> nn.Module:
    if task.hidden == 0:
        return nn.Linear(dim, targets)
    return nn.Sequential(nn.Linear(dim, task.hidden), nn.ReLU(), nn.Linear(task.hidden, targets))
