"""Training runs and folds as they lie in a folder: read with care, for whatever is damaged or half-written."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import VacliError

KEYS = ("valence", "arousal", "mean")
_DEEPEST = 6  # folders below the one asked for
_LARGEST_BYTES = 64 * 2**20  # of a file that is read whole: run.json names every video
_MOST_LEVELS = 40  # of a JSON: ours have ten, and what shows them goes down level by level
_MOST_AXES = 16  # of a tensor
_BUFFERS = ("mean", "deviation", "running_mean", "running_var", "num_batches_tracked")  # no parameters
Figures = dict[str, float]  # CCC of valence and of arousal, and their mean


@dataclass(frozen=True)
class Epoch:
    """One line of metrics.jsonl: the training loss, and CCC on the validation videos before any smoothing.

    number: counted from 1 in its stage. alone: in the stage where every stream is trained by itself; it has no figures.
    """

    number: int
    alone: bool
    loss: float | None
    figures: Figures | None
    seconds: float | None


@dataclass(frozen=True)
class TrainingRun:
    """A folder with a run.json. name: its path below the folder asked for. unread: lines of metrics that are none."""

    name: str
    about: dict[str, Any]
    epochs: list[Epoch]
    parameters: int | None
    unread: int = 0

    @property
    def preset(self) -> dict[str, Any]:
        return self.about["preset"]

    @property
    def finished(self) -> bool:
        return "figures" in self.about

    @property
    def best(self) -> Epoch | None:
        """The epoch with the best mean CCC, the first of equals: its weights are the run's."""
        judged = [epoch for epoch in self.epochs if epoch.figures]
        return max(judged, key=lambda epoch: (epoch.figures or {})["mean"], default=None)

    @property
    def figures(self) -> Figures | None:
        """Of the finished run, smoothed; before that those of the best epoch so far, as they are."""
        return figures_of(self.about.get("figures")) or (self.best.figures if self.best else None)


@dataclass(frozen=True)
class TrainingFolds:
    """A folder with a folds.json; runs: those that are there, by fold."""

    name: str
    about: dict[str, Any]
    runs: dict[int, TrainingRun]

    @property
    def finished(self) -> bool:
        return "figures" in self.about


@dataclass
class Found:
    """What lies in a folder. problems: path -> what is wrong with it, or that it is no run."""

    runs: list[TrainingRun] = field(default_factory=list)
    folds: list[TrainingFolds] = field(default_factory=list)
    problems: dict[str, str] = field(default_factory=dict)


def find_runs(folder: Path) -> Found:
    """The runs and folds in a folder (which may be one itself), sorted by name; links are not followed.

    Raises VacliError if it is no folder, or there is nothing in it that is or was to be a run.
    """
    if not folder.is_dir():
        raise VacliError(f"no folder {folder}; wanted a folder of runs, such as runs/")
    found = Found()
    _look(folder, folder, found)
    if not (found.runs or found.folds):
        odd = "; ".join(f"{name}: {why}" for name, why in sorted(found.problems.items())[:3])
        raise VacliError(
            f"no run in {folder} ({odd or 'it is empty'}): train one with `vacli train --head mamba`"
        )
    return found


def _look(here: Path, top: Path, found: Found) -> bool:
    """Whether there is a run, or what is left of one, at or below `here`."""
    name = _name(here, top)
    try:
        if (here / "folds.json").is_file():
            found.folds.append(_read_folds(here, top, found))
        elif (here / "run.json").is_file():
            found.runs.append(_read_run(here, name))
        else:
            return _look_below(here, top, found)
    except (OSError, ValueError, RecursionError) as e:
        found.problems[name] = f"cannot be read: {_reason(e)}"
    return True


def _look_below(here: Path, top: Path, found: Found) -> bool:
    depth = len(here.relative_to(top).parts)
    with os.scandir(here) as entries:
        below = sorted(e.name for e in entries if e.is_dir(follow_symlinks=False) and e.name[0] != ".")
    any_run = False
    for name in below if depth < _DEEPEST else []:
        is_run = _look(here / name, top, found)
        if not is_run and depth == 0:
            found.problems[name] = "no run in it"
        any_run |= is_run
    return any_run


def _name(here: Path, top: Path) -> str:
    return top.resolve().name if here == top else here.relative_to(top).as_posix()


def _reason(e: Exception) -> str:
    return (getattr(e, "strerror", None) or str(e) or type(e).__name__).partition("\n")[0][:200]


# ---- what is read --------------------------------------------------------------------------------------------


def _read_run(path: Path, name: str) -> TrainingRun:
    """Raises OSError, ValueError, RecursionError for a run.json that is none."""
    about = _json(path / "run.json")
    if not isinstance(about.get("preset"), dict) or not isinstance(about["preset"].get("name"), str):
        raise ValueError("run.json names no preset")
    if "figures" in about and figures_of(about["figures"]) is None:
        raise ValueError("run.json has figures that are no numbers")
    epochs, unread = _metrics(path / "metrics.jsonl")
    return TrainingRun(name, about, epochs, _parameters(path / "weights.safetensors"), unread)


def _read_folds(path: Path, top: Path, found: Found) -> TrainingFolds:
    """Raises OSError, ValueError, RecursionError for a folds.json that is none; a fold's own go to the problems."""
    about = _json(path / "folds.json")
    splits = about.get("folds")
    if not isinstance(splits, list) or not all(isinstance(split, dict) for split in splits):
        raise ValueError("folds.json has no splits")
    if "figures" in about and not all(
        isinstance(about["figures"], dict) and figures_of(about["figures"].get(word))
        for word in ("mean", "std", "out_of_fold")
    ):
        raise ValueError("folds.json has figures that are no numbers")
    runs = {}
    for k in range(len(splits)):
        fold = path / f"fold-{k}"
        if (fold / "run.json").is_file():
            try:
                runs[k] = _read_run(fold, _name(fold, top))
            except (OSError, ValueError, RecursionError) as e:
                found.problems[_name(fold, top)] = f"cannot be read: {_reason(e)}"
    return TrainingFolds(_name(path, top), about, runs)


def _json(path: Path) -> dict[str, Any]:
    with open(path, "rb") as f:
        data = f.read(_LARGEST_BYTES + 1)
    if len(data) > _LARGEST_BYTES:
        raise ValueError(f"{path.name} is larger than {_LARGEST_BYTES // 2**20} MB")
    tree = json.loads(data)
    if not isinstance(tree, dict):
        raise ValueError(f"{path.name} holds no table")
    if _is_deeper(tree, _MOST_LEVELS):
        raise ValueError(f"{path.name} is nested more than {_MOST_LEVELS} deep")
    return tree


def _is_deeper(tree: object, levels: int) -> bool:
    inside = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else None
    return inside is not None and (not levels or any(_is_deeper(each, levels - 1) for each in inside))


def _metrics(path: Path) -> tuple[list[Epoch], int]:
    """The epochs, and how many lines are none; the last may be half-written, and is left out unsaid."""
    if not path.is_file():
        return [], 0
    with open(path, "rb") as f:
        lines = f.read(_LARGEST_BYTES).split(b"\n")[:-1]
    epochs = [epoch for epoch in map(_epoch, lines) if epoch is not None]
    return epochs, len(lines) - len(epochs)


def _epoch(line: bytes) -> Epoch | None:
    try:
        facts = json.loads(line)
    except (ValueError, RecursionError):
        return None
    number = facts.get("epoch") if isinstance(facts, dict) else None
    if not isinstance(number, int):
        return None
    loss, seconds = number_of(facts.get("loss")), number_of(facts.get("seconds"))
    return Epoch(number, facts.get("stage") == "alone", loss, figures_of(facts.get("ccc")), seconds)


def number_of(found: object) -> float | None:
    """A finite number; None for whatever else."""
    try:
        number = float(found) if isinstance(found, int | float) and not isinstance(found, bool) else math.nan
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def under(tree: object, *keys: str) -> Any:
    """What lies under the keys, one within the other; "" where there is none."""
    for key in keys:
        tree = tree.get(key, "") if isinstance(tree, Mapping) else ""
    return tree


def figures_of(found: object) -> Figures | None:
    """Three finite numbers under KEYS; None for whatever else."""
    numbers = {key: number_of(found.get(key)) for key in KEYS} if isinstance(found, Mapping) else {}
    known = {key: number for key, number in numbers.items() if number is not None}
    return known if len(known) == len(KEYS) else None


def _parameters(path: Path) -> int | None:
    """How many numbers were learnt, from the header of the weights alone; None where there are no weights yet.

    Format: https://huggingface.co/docs/safetensors, a length of 8 bytes and a JSON of that length.
    """
    if not path.is_file():
        return None
    try:
        with open(path, "rb") as f:
            header = json.loads(f.read(min(int.from_bytes(f.read(8), "little"), _LARGEST_BYTES)))
        shapes = [
            tensor["shape"]
            for name, tensor in header.items()
            if name != "__metadata__" and name.rpartition(".")[2] not in _BUFFERS
        ]
        count = sum(map(_size, shapes))
        return None if number_of(count) is None else count  # a number no one can print is none
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _size(shape: Any) -> int:
    """How many numbers a tensor holds; ValueError for a shape that no tensor has."""
    if len(shape) > _MOST_AXES or not all(isinstance(size, int) and 0 <= size < 2**63 for size in shape):
        raise ValueError(f"no shape of a tensor: {shape!r:.80}")
    return math.prod(shape)


# ---- what differs --------------------------------------------------------------------------------------------


def differences(
    runs: list[TrainingRun], presets: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, object]]:
    """Run's name -> the keys in which it differs from its head's own preset, dotted as in --set.

    presets: head -> its preset as it comes. Of a head that is not there: the keys in which its runs differ among
    themselves. The streams are left out, which have a column of their own.
    """
    flat = {run.name: dict(_flat(run.preset)) for run in runs}
    found: dict[str, dict[str, object]] = {}
    for head in {run.preset["name"] for run in runs}:
        alike = [run.name for run in runs if run.preset["name"] == head]
        own = dict(_flat(presets[head])) if head in presets else None
        for name in alike:
            others = [own] if own is not None else [flat[other] for other in alike]
            keys = sorted({key for other in (flat[name], *others) for key in other})
            found[name] = {
                key: flat[name].get(key)
                for key in keys
                if any(o.get(key) != flat[name].get(key) for o in others)
            }
    return found


def _flat(tree: object, key: str = "") -> Iterator[tuple[str, object]]:
    """The leaves of a preset, but for what has a column of its own; of a list each entry by its place."""
    items = tree.items() if isinstance(tree, Mapping) else enumerate(tree) if isinstance(tree, list) else None
    if items is None or (not tree and key):
        yield key, tree
        return
    for part, value in items:
        inner = f"{key}.{part}" if key else str(part)
        if inner not in ("name", "source", "streams"):
            yield from _flat(value, inner)
