"""Curves as they are handed out: a CSV for each person of a video, and beside it a record of where it comes from."""

from __future__ import annotations

import contextlib
import csv
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import IO, Any

import numpy as np

from .. import VacliError
from .names import folder_of, plain_id
from .track import Track

HEADER = ("frame", "time_s", "valence", "arousal", "face", "person", "valence_std", "arousal_std")
RECORDS = ".vacli"  # the folder of the records, in a folder of curves
_FORMAT = 1


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
        if self.spread is not None and self.spread.shape != (rows, 2):
            raise ValueError(
                f"a curve of {rows} rows with a spread of {self.spread.shape}; wanted ({rows}, 2)"
            )


@dataclass(frozen=True)
class About:
    """What became of one person in one video: where his curve comes from, or why there is none.

    id: unique in the folder, and the CSV's name without its suffix. video_id: the same for everybody in one video.
    name: what people call the video, a path below the folder that was asked for; any characters. video: the file with
    the pictures. labels: a VA file of his (store.labels.read_va). csv: the curve; None where a problem left none.
    problem: what could not be had. warning: odd, but as it should be. run: what made the curve, for people to read.
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
    run: dict[str, Any] = field(default_factory=dict)


def write_csv(path: Path, curve: Curve) -> None:
    """One line per decoded frame under HEADER, frames counted from 1; empty cells for a spread that is not known.

    The file is whole or as it was before. Raises VacliError if it cannot be written.
    """
    rows = zip(curve.track.times_s, curve.track.values, curve.face, strict=True)
    with whole_file(path) as f:
        f.write(",".join(HEADER) + "\n")
        for i, (time_s, (valence, arousal), seen) in enumerate(rows):
            apart = "," if curve.spread is None else "{:.6f},{:.6f}".format(*curve.spread[i])
            f.write(f"{i + 1},{time_s:.6f},{valence:.6f},{arousal:.6f},{int(seen)},{curve.person},{apart}\n")


def read_csv(path: Path) -> Curve:
    """What `write_csv` wrote; also files of older versions, which lack the last columns.

    Raises VacliError for a file that cannot be read, a missing column, text that is no number, and times that do not
    rise.
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
        numbers = np.array([[float(row[name]) for name in HEADER[1:5]] for row in rows]).reshape(-1, 4)
        has_spread = bool(rows) and bool(rows[0].get("valence_std"))
        spread = np.array([[float(row[name]) for name in HEADER[6:]] for row in rows]) if has_spread else None
        people = {row.get("person") or "main" for row in rows}
        if len(people) > 1:
            raise ValueError(f"it is of several people: {', '.join(sorted(people)[:5])}")
        return Curve(
            Track(numbers[:, 1:3].astype(np.float32), numbers[:, 0]),
            numbers[:, 3] > 0,
            *people or ["main"],
            spread,
        )
    except (OSError, UnicodeDecodeError, csv.Error, ValueError, TypeError) as e:
        raise VacliError(f"cannot read the curve {path}: {e}; write it again with `vacli predict`") from e


@contextlib.contextmanager
def whole_file(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """A file that is whole or as it was before: written aside, renamed at the end. mode: "w" (UTF-8) or "wb".

    Its folder is made. Raises VacliError if it cannot be written.
    """
    aside = path.with_name(f".{path.name[:100]}.{os.getpid()}.part")
    as_text = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(aside, mode, **as_text) as f:  # type: ignore[call-overload]
            yield f
        os.replace(aside, path)
    except OSError as e:
        raise VacliError(
            f"cannot write {path}: {e.strerror or e}; free some space, or use another --out"
        ) from e
    finally:
        with contextlib.suppress(OSError):
            aside.unlink()


# ---- the records of a folder of curves -----------------------------------------------------------------------


def remember(folder: Path, about: About) -> None:
    """Put the record into folder/.vacli, in the place of an earlier one of the same id; paths relative to the folder.

    Raises VacliError if it cannot be written.
    """
    facts: dict[str, Any] = {"format": _FORMAT, **asdict(about)}
    for key in ("video", "labels", "csv"):
        if facts[key] is not None:
            facts[key] = Path(os.path.relpath(facts[key], folder)).as_posix()
    with whole_file(folder / RECORDS / f"{folder_of(about.id)}.json") as f:
        json.dump(facts, f, indent=1)


def recall(folder: Path) -> list[About]:
    """The records of a folder of curves, sorted by id; a CSV that none speaks of has one without a video.

    Paths are below, or relative to, the folder given. A record whose CSV is gone, or that cannot be read, is left out.
    Raises VacliError where there is neither a record nor a curve.
    """
    folder = Path(folder)
    found = {
        about.id: about
        for about in map(lambda p: _read(folder, p), folder.glob(f"{RECORDS}/*.json"))
        if about
    }
    known = {about.csv for about in found.values()}
    for path in sorted(folder.rglob("*.csv")):
        inside = path.relative_to(folder)
        if path not in known and not any(part.startswith(".") for part in inside.parts) and _is_curve(path):
            name = inside.with_suffix("").as_posix()
            found.setdefault(name, About(plain_id(name), plain_id(name), name, csv=path))
    if not found:
        raise VacliError(f"no curves in {folder}; make some with `vacli predict --video DIR --out {folder}`")
    return [found[key] for key in sorted(found)]


def _read(folder: Path, path: Path) -> About | None:
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        if facts.pop("format") != _FORMAT or facts.keys() != {f.name for f in fields(About)}:
            return None
        for key in ("video", "labels", "csv"):
            facts[key] = None if facts[key] is None else folder / str(facts[key])
        about = About(**facts)
        strings = (about.id, about.video_id, about.name, about.person)
        if not all(isinstance(s, str) for s in strings) or plain_id(about.id) != about.id:
            return None  # it would lead out of the folder
        if plain_id(about.video_id) != about.video_id or not isinstance(about.run, dict):
            return None
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        return None
    return about if about.csv is None or about.csv.is_file() else None


def _is_curve(path: Path) -> bool:
    try:
        with open(path, encoding="utf-8-sig") as f:
            return f.readline(300).strip().split(",")[:5] == list(HEADER[:5])
    except (OSError, UnicodeDecodeError):
        return False
