"""Curves as they are handed out: a CSV for each person of a video, and beside it a record of where it comes from."""

from __future__ import annotations

import contextlib
import csv
import errno
import json
import os
import re
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache
from itertools import repeat
from pathlib import Path
from typing import IO, Any

import numpy as np

from .. import VacliError
from .names import folder_of, plain_id
from .track import Track

HEADER = ("frame", "time_s", "valence", "arousal", "face", "person", "valence_std", "arousal_std")
RECORDS = ".vacli"  # the folder of the records, in a folder of curves
_FORMAT = 1
_PART = re.compile(r"\.[0-9a-f]{24}\.(\d+)\.part")
_LEFT_S = 3600
_FULL = (errno.ENOSPC, errno.EDQUOT)
_PATHS = ("video", "labels", "csv")  # of a record
_LONGEST_NAME = 4096  # bytes, and those of a path on Linux
_LONGEST_S = 1e9  # some 30 years: a time stamp may count from anywhere


@dataclass(frozen=True)
class Curve:
    """Valence and arousal of one person in one video, a row for every decoded frame.

    track: (T, 2) in [-1, 1]; its times are seconds from the start of the video. face: (T,) bool, False where nobody was
    seen and the row is filled in. person: as `--person` has it, "main", "left", "2". spread: (T, 2), how far the runs
    of an ensemble lie apart (standard deviation); None where there is one run.
    """

    track: Track
    face: np.ndarray
    person: str = "main"
    spread: np.ndarray | None = None

    def __post_init__(self) -> None:
        rows = len(self.track)
        if self.track.values.shape[1:] != (2,) or self.face.shape != (rows,):
            raise ValueError(
                f"a curve of {self.track.values.shape} with faces {self.face.shape}; wanted (T, 2) and (T,)"
            )
        if self.spread is not None:
            if self.spread.shape != (rows, 2):
                raise ValueError(
                    f"a curve of {rows} rows with a spread of {self.spread.shape}; wanted ({rows}, 2)"
                )
            with np.errstate(over="ignore"):  # beyond float32 it is an infinity, and refused
                apart = self.spread.astype(np.float32)
            if (apart < 0).any() or np.isinf(apart).any():
                raise ValueError("a spread that is negative or infinite; wanted a standard deviation, or NaN")
        if not self.person.isprintable() or set(self.person) & set(',"'):
            raise ValueError(f"a person called {self.person!r:.80}; wanted main, left, right, or a number")


@dataclass(frozen=True)
class About:
    """What became of one person in one video: where his curve comes from, or why there is none.

    id: unique in the folder, and the CSV's name without its suffix. video_id: the same for everybody in one video.
    name: what people call the video, a path below the folder that was asked for; any characters. video: the file with
    the pictures. labels: a VA file of his (store.labels.read_va). csv: the curve; None where a problem left none.
    problem: what could not be had. warning: odd, but as it should be. trained_on: the run that made the curve was
    trained on this video: its agreement with labels says nothing of others. exports: format -> SHA-256 of that file
    beside the CSV, as it was written. run: what made the curve, for people.
    """

    id: str
    video_id: str
    name: str
    person: str = "main"
    video: Path | None = None
    labels: Path | None = None
    csv: Path | None = None
    problem: str | None = None
    warning: str | None = None
    trained_on: bool = False
    exports: dict[str, str] = field(default_factory=dict)
    run: dict[str, Any] = field(default_factory=dict)


def write_csv(path: Path, curve: Curve) -> None:
    """One line per decoded frame under HEADER, frames counted from 1; empty cells for a spread that is not known.

    The file is whole or as it was before. Raises VacliError if it cannot be written.
    """
    spread: Any = repeat(None) if curve.spread is None else curve.spread
    with whole_file(path) as f:
        f.write(",".join(HEADER) + "\n")
        rows = zip(curve.track.times_s, curve.track.values, curve.face, spread, strict=False)
        for frame, (time_s, values, seen, apart) in enumerate(rows, start=1):
            f.write(csv_line(frame, time_s, values, seen, curve.person, apart) + "\n")


def csv_line(
    frame: int, time_s: float, values: np.ndarray, face: bool, person: str, spread: np.ndarray | None
) -> str:
    """One row under HEADER: values (2,), valence and arousal; spread (2,) or None."""
    apart = "," if spread is None else f"{spread[0]:.6f},{spread[1]:.6f}"
    return f"{frame},{time_s:.6f},{values[0]:.6f},{values[1]:.6f},{int(face)},{person},{apart}"


def read_csv(path: Path) -> Curve:
    """What `write_csv` wrote; also files of older versions, which lack the last columns.

    Raises VacliError for a file that cannot be read, a missing column, text that is no number, frames that are not
    counted from 1, times that do not rise, and times no video reaches.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as f:
            reader = csv.DictReader(f)
            missing = set(HEADER[:5]) - set(reader.fieldnames or ())
            if missing:
                raise VacliError(
                    f"{path}: no column {', '.join(sorted(missing))}; wanted a curve of `vacli predict`"
                )
            rows = list(reader)
        if any(row["frame"] != str(i) for i, row in enumerate(rows, 1)):
            raise ValueError("its frames are not 1, 2, 3 and so on: lines are missing or out of place")
        numbers = np.array([[float(row[name]) for name in HEADER[1:5]] for row in rows]).reshape(-1, 4)
        if (np.abs(numbers[:, 0]) > _LONGEST_S).any():
            raise ValueError(f"it has times beyond {_LONGEST_S:g} s")
        has_spread = bool(rows) and bool(rows[0].get("valence_std"))
        spread = np.array([[float(row[name]) for name in HEADER[6:]] for row in rows]) if has_spread else None
        people = {row.get("person") or "main" for row in rows}
        if len(people) > 1:
            raise ValueError(f"it is of several people: {', '.join(map(repr, sorted(people)[:5]))}")
        with np.errstate(over="ignore"):  # it is an infinity then, and refused
            values = numbers[:, 1:3].astype(np.float32)
        person = people.pop() if people else "main"
        return Curve(Track(values, numbers[:, 0]), numbers[:, 3] > 0, person, spread)
    except (OSError, UnicodeDecodeError, csv.Error, ValueError, TypeError) as e:
        raise VacliError(f"cannot read the curve {path}: {e}; write it again with `vacli predict`") from e


@contextlib.contextmanager
def whole_file(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """A file that is whole or as it was before: written aside, renamed at the end. mode: "w" (UTF-8) or "wb".

    So it is whoever stops the process; it is not synced, and when the power fails it may be lost or empty: all that is
    written so can be made again. Its folder is made. Raises VacliError if it cannot be written.
    """
    aside = path.with_name(f".{folder_of(path.name)}.{os.getpid()}.part")  # a long name has no room for more
    _sweep(path.parent)
    as_text = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(aside, mode, **as_text) as f:  # type: ignore[call-overload]
            yield f
        os.replace(aside, path)
    except OSError as e:
        mend = "free some space, or " if e.errno in _FULL else ""
        raise VacliError(f"cannot write {path}: {e.strerror or e}; {mend}use another --out") from e
    finally:
        with contextlib.suppress(OSError):
            aside.unlink()


@lru_cache(maxsize=1024)
def _sweep(folder: Path) -> None:
    """Remove what killed processes left in the folder; once is enough, as to look costs a listing.

    A number may be that of a process on another machine that shares the disk: what changed of late stays as well.
    """
    for part in folder.glob(".*.part"):
        name = _PART.fullmatch(part.name)
        with contextlib.suppress(OSError):
            if name and time.time() - part.stat().st_mtime > _LEFT_S and not _lives(int(name[1])):
                part.unlink()


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


# ---- the records of a folder of curves -----------------------------------------------------------------------


def remember(folder: Path, about: About) -> None:
    """Put the record into folder/.vacli, in the place of an earlier one of the same id; paths relative to the folder.

    Raises VacliError if it cannot be written, or folder/.vacli is a link that leads out of the folder.
    """
    path = folder / RECORDS / f"{folder_of(about.id)}.json"
    if not lies_in(folder, path):
        raise VacliError(
            f"{path.parent} is a link that leads out of {folder}; remove it, or use another --out"
        )
    with whole_file(path) as f:
        json.dump({"format": _FORMAT, **facts_of(about, folder)}, f, indent=1)


def facts_of(about: About, folder: Path) -> dict[str, Any]:
    """The record for JSON; paths as they are seen from the folder."""
    facts = asdict(about)
    for key in _PATHS:
        if facts[key] is not None:
            facts[key] = seen_from(folder, facts[key])
    return facts


def seen_from(folder: Path, path: Path) -> str:
    """The path relative to the folder, with slashes.

    A folder that is a link has its `..` where it leads to, not where it stands; the file itself may be a link.
    """
    return Path(os.path.relpath(path.parent.resolve() / path.name, folder.resolve())).as_posix()


def lies_in(folder: Path, path: Path) -> bool:
    """Whether a file written to the path lies in the folder, wherever links on the way lead; it need not be there."""
    try:
        return path.parent.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError):  # links that lead to each other
        return False


def recall_one(folder: Path, id: str) -> About | None:
    """The record of that id, also where its CSV is gone; None where there is none that can be read."""
    return _read(folder, folder / RECORDS / f"{folder_of(id)}.json")


def recall(folder: Path) -> list[About]:
    """The records of a folder of curves, sorted by id; a CSV that none speaks of has one without a video.

    Paths are below, or relative to, the folder given. A record is left out whose CSV is gone, that cannot be read, or
    whose id leads out of the folder, also by a link in it. Raises VacliError where there is neither a record nor a
    curve.
    """
    folder = Path(folder)
    records = [path for path in folder.glob(f"{RECORDS}/*.json") if lies_in(folder, path)]
    read = [about for about in (_read(folder, path) for path in records) if about]
    found = {about.id: about for about in read if about.csv is None or about.csv.is_file()}
    known = {about.csv for about in found.values()}
    for path in sorted(folder.rglob("*.csv")):
        inside = path.relative_to(folder)
        if path not in known and not any(part.startswith(".") for part in inside.parts) and is_curve(path):
            name = inside.with_suffix("").as_posix()
            found.setdefault(name, About(plain_id(name), plain_id(name), name, csv=path))
    if not found:
        raise VacliError(f"no curves in {folder}; make some with `vacli predict --video DIR --out {folder}`")
    return [found[key] for key in sorted(found)]


def _read(folder: Path, path: Path) -> About | None:
    try:
        facts = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
        if not isinstance(facts, dict) or facts.pop("format", None) != _FORMAT:
            return None
        if facts.keys() != {f.name for f in fields(About)} or not isinstance(facts["run"], dict):
            return None
        if not all(isinstance(facts[key], str) for key in ("id", "video_id", "name", "person")):
            return None
        if not isinstance(facts["trained_on"], bool) or not isinstance(facts["exports"], dict):
            return None
        if not all(isinstance(facts[key], str | None) for key in (*_PATHS, "problem", "warning")):
            return None
        for key in ("id", "video_id", "name", "person", *_PATHS):
            # UnicodeEncodeError: a lone surrogate that stands for no byte of a file's name
            if facts[key] is not None and len(os.fsencode(facts[key])) > _LONGEST_NAME:
                return None
    except (OSError, ValueError, RecursionError):
        return None
    if path.stem != folder_of(facts["id"]) or any("\0" in facts[key] for key in _PATHS if facts[key]):
        return None
    inside = facts["csv"] is None or not (
        Path(facts["csv"]).is_absolute() or ".." in Path(facts["csv"]).parts
    )
    if not inside or not all(
        plain_id(facts[key]) == facts[key] and lies_in(folder, folder / facts[key])
        for key in ("id", "video_id")
    ):
        return None  # it would lead out of the folder
    about = About(**{**facts, **{key: folder / facts[key] for key in _PATHS if facts[key] is not None}})
    return about


def is_curve(path: Path) -> bool:
    """Whether its first line is that of a curve."""
    if not path.is_file():
        return False  # a pipe would be waited for
    try:
        with open(path, encoding="utf-8-sig") as f:
            return f.readline(300).strip().split(",")[:5] == list(HEADER[:5])
    except (OSError, UnicodeDecodeError):
        return False
