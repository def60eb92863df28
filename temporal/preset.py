"""Presets: one TOML file for each system, checked key by key, with changes from outside."""

from __future__ import annotations

import difflib
import inspect
import json
import tomllib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

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

BlockSpec = dict[str, dict[str, Any]]


class _Strict(BaseModel):
    """Nothing is guessed: an unknown key, "10" for 10 and an infinite learning rate are all refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Vgg(_Strict):
    """A trainable VGGish network that reads the stored log-mel (vgg.LogMelVgg).

    width: share of the published channels. window: where a 0.96 s patch lies about its frame. weights: a file of
    torchvggish's to start from (of width 1).
    """

    width: float = Field(1.0, gt=0, le=4)
    window: Literal["centred", "look-ahead", "causal"] = "centred"
    weights: str | None = None


class Encode(_Strict):
    """What is done to one stream alone, before the fusion.

    standardise: by mean and deviation of the training rows (never before vgg). vgg: a network that reads the log-mel
    anew, before the blocks. blocks: one after the other, each its name with its options: `{ linear = { dim = 256 } }`.
    """

    standardise: bool = True
    vgg: Vgg | None = None
    blocks: list[BlockSpec] = []

    @field_validator("blocks")
    @classmethod
    def _known(cls, blocks: list[BlockSpec]) -> list[BlockSpec]:
        return _check_blocks(blocks)


class CrossAttn(_Strict):
    """fuse = "cross_attn": rows of the first stream ask every other stream (USTC, section 3.3).

    heads: of the attention, side by side. dropout: of its weights. gate: what was asked for and what was found are
    mixed by a learnt share, instead of standing side by side. near: rows near in time count more (the paper has no such
    thing, and no way to tell which sound is of a face's own time).
    """

    heads: int = Field(4, ge=1)
    dropout: float = Field(0.1, ge=0, lt=1)
    gate: bool = False
    near: bool = True


class Task(_Strict):
    """A head: LayerNorm where `norm`, Linear - act - Dropout - Linear with `hidden` units between, tanh where `tanh`.

    One Linear alone where hidden is 0.
    """

    hidden: int = Field(128, ge=0)
    act: Literal["relu", "gelu"] = "relu"
    norm: bool = False
    dropout: float = Field(0.0, ge=0, lt=1)
    tanh: bool = False


class WindowSpec(_Strict):
    """Rows of a training window, and rows from one window to the next.

    whole: videos are not cut; they are packed behind each other into lines of up to batch x length rows, nothing
    passing from one to the next.
    """

    length: int = Field(300, ge=1, lt=2**31)
    stride: int = Field(200, ge=1, lt=2**31)
    whole: bool = False

    @model_validator(mode="after")
    def _covering(self) -> WindowSpec:
        if self.stride > self.length:
            raise ValueError(
                f"stride {self.stride} is beyond length {self.length}: rows between windows would be lost"
            )
        return self


class TrainSpec(_Strict):
    """How a network is trained; early stop on the mean validation CCC.

    schedule: "cosine" (linear warm-up, then a half cosine down to lr_min, by steps) or "plateau" (after
    plateau_patience epochs without a better CCC the best weights are taken up again and the rate falls by
    plateau_factor, not below lr_min; the warm-up is by steps). A warm-up that would fill its stage takes a third of it.
    ccc: over all rows of a batch together, or of each window or video for itself. mse: weight of the mean squared error
    beside it. precision: what is computed in. ema: decay per step of the moving average of the weights that is judged
    and kept, 0 for none. modality_dropout: the chance that a window is shown without a stream; one always stays.
    alone_epochs: epochs in which every stream is trained with a head of its own, before the whole (USTC's stages).
    init_from: a run, whose streams are joined by name and recipe, or a file of weights to start from.
    """

    epochs: int = Field(50, ge=1)
    batch: int = Field(16, ge=1, lt=2**31)
    lr: float = Field(3e-4, gt=0)
    weight_decay: float = Field(1e-3, ge=0)
    optimizer: Literal["adamw", "adam"] = "adamw"
    schedule: Literal["cosine", "plateau"] = "cosine"
    warmup_epochs: float = Field(5, ge=0)
    lr_min: float = Field(0.0, ge=0)
    plateau_patience: int = Field(5, ge=0)
    plateau_factor: float = Field(0.1, gt=0, lt=1)
    clip_norm: float = Field(1.0, gt=0)
    patience: int = Field(15, ge=1)
    ccc: Literal["batch", "sequence"] = "batch"
    mse: float = Field(0.0, ge=0)
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    ema: float = Field(0.0, ge=0, lt=1)
    modality_dropout: float = Field(0.0, ge=0, lt=1)
    alone_epochs: int = Field(0, ge=0)
    init_from: str | None = None

    @model_validator(mode="after")
    def _falling(self) -> TrainSpec:
        if self.lr_min > self.lr:
            raise ValueError(
                f"lr_min {self.lr_min:g} is above lr {self.lr:g}: the rate falls from lr to lr_min"
            )
        return self


class Preset(_Strict):
    """One system, whole.

    name: what its runs are called. source: where it comes from, in words. streams: the tracks of the store that it
    reads; `mae@<digits>` names one of several recipes of a track. encode: by stream name; "first" for the first stream,
    "*" for every other one. fuse: how the encoded streams become one row: "sum" (all of one width), "concat" (one
    behind the other) or "cross_attn" (the first asks each other one; it and what it found stand one behind the other).
    cross_attn: how it asks, see there. decode: the blocks that read the fused rows, one after the other. tasks: the
    head that reads what `decode` gives; there is one, "va", of two values. windows, train: see there.
    causal: whether a row may see no later one, for every block that can do either and does not say itself; what a
    stream asks another (cross_attn) is always answered by the whole window.
    """

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    source: str = ""
    streams: list[str] = Field(min_length=1)
    causal: bool = True
    encode: dict[str, Encode] = {"*": Encode()}
    fuse: Literal["sum", "concat", "cross_attn"] = "concat"
    cross_attn: CrossAttn = CrossAttn()
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


_Count = Annotated[int, Field(ge=1, lt=2**31)]
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
    # an unknown key tells more than the one that is missing because of it
    first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    key = ".".join(map(str, first["loc"]))
    if first["type"] == "extra_forbidden":
        within = [_TABLES[part] for part in first["loc"][:-1] if part in _TABLES]
        return f"unknown key {key}; {_known((within or [top])[-1], str(first['loc'][-1]))}"
    if first["type"] == "value_error":  # our own: says what came
        return f"{key}: {first['ctx']['error']}"
    return f"{key}: {first['msg']}, got {str(first['input'])[:80]!r}"


def _known(table: type[BaseModel], meant: str) -> str:
    """The keys of a table, and the one most like the one that was meant, as it stands in a preset."""
    fields = table.model_fields
    if not fields:
        return "known there: none"
    near = difflib.get_close_matches(meant, fields, n=1, cutoff=0)[0]
    default = fields[near].get_default()
    example = f"{near} = {json.dumps(default)}" if isinstance(default, bool | int | float | str) else near
    return f"known there: {', '.join(fields)}; for example {example}"


_TABLES: dict[int | str, type[BaseModel]] = {
    "encode": Encode,
    "vgg": Vgg,
    "cross_attn": CrossAttn,
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
            raise VacliError(
                f"cannot read the preset {head}: {e}; wanted a TOML file such as `vacli heads mamba` prints"
            ) from e
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
        raise VacliError(f"preset {head} is not TOML: {e}; wanted such as `vacli heads mamba` prints") from e
    for key, value in (changes or {}).items():
        _change(tree, key, value, head)
    preset = check_preset(tree, head)
    own = {*preset.streams, *(streams or [])}
    own |= {name.partition("@")[0] for name in own}
    strangers = preset.encode.keys() - own - {"*", "first"}  # a typo here would go unheard
    if strangers:
        raise VacliError(
            f"preset {head}: encode.{min(strangers)} is for none of its streams; "
            f'wanted "*", "first" or one of {", ".join(sorted(own))}'
        )
    return check_preset({**tree, "streams": streams}, head) if streams else preset


def _change(tree: dict[str, Any], key: str, value: str, head: str) -> None:
    """One --set KEY=VALUE; a number in the key counts in a list from 0, as in decode.2.mamba.layers."""
    branch: Any = tree
    *path, last = key.split(".")
    for part in path:
        if isinstance(branch, list):
            branch = branch[_place(branch, part, key, value, head)]
        else:
            branch = branch.setdefault(part, {})
        if not isinstance(branch, dict | list):
            raise VacliError(
                f"--set {key}={value}: {part} is no table in preset {head}; `vacli heads {head}` prints it"
            )
    if isinstance(branch, list):
        branch[_place(branch, last, key, value, head)] = _toml_value(value)
    else:
        branch[last] = _toml_value(value)


def _place(branch: list[Any], part: str, key: str, value: str, head: str) -> int:
    if not part.isdecimal() or int(part) >= len(branch):
        raise VacliError(
            f"--set {key}={value}: {part} is no place in a list of {len(branch)} in preset {head}; counted from 0"
        )
    return int(part)


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
