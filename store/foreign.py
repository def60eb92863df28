"""Features and labels of others into the store: joined by video id, on their own times, scaled, raters averaged."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from .. import VacliError
from .entry import Damaged
from .names import plain_id, split_of
from .ratings import TARGETS, mean_of_raters, on_scale, rater_columns, scale_of
from .recipe import combine, folder_name
from .store import Store
from .tables import SUFFIXES, Table, open_table, shown, suffix_of
from .track import Track

# Shape legend: T rows of time, D dims, R raters.

LABELS = "label.va"
_OVER_S, _OVER_SHARE, _REACH_SHARE = 1.0, 0.02, 0.9  # what still fits a video; what should be reached over


@dataclass
class Imported:
    """What an import did. videos: id -> "stored" or "kept" (it was there). problems: id -> why it has no track."""

    videos: dict[str, str] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def import_features(
    source: Path,
    store: Store,
    track: str,
    times: str | None = None,
    columns: Sequence[str] = (),
    scale: str | None = None,
) -> Imported:
    """Store the rows of every file below `source` (or of this one file) as the track of the video it is named after.

    track: the name; `label.va` takes valence and arousal, in [-1, 1] or on `scale` ("1..9"), and averages raters.
    times: None (the file's own), NAME of a column or array, "25Hz" (row i at (i + 0.5) / 25 s: the middle of what it
    saw), "frames" (row i is decoded frame i of the stored video), or a folder or file of times.
    columns: which, in this order; by default all of a file, which must be numbers, without the times.

    Same bytes and options again: nothing is done. Each video is stored by itself: stop at any time, call it again.
    A file that is refused is one of the `problems`; the others go on. Raises VacliError for options that make no
    sense and for a source without files, and a fatal one for a store that cannot be written.
    """
    how = _How.of(track, times, tuple(columns), scale)
    known = store.videos()
    groups = _by_video(_files(Path(source), how.times_at), known, track == LABELS)
    done, folders, raters = Imported(), set[str](), Counter[int]()
    done.notes += _notes_on_ids(groups, known, track == LABELS)
    calm = 0.1 if sys.stderr.isatty() else 10.0  # a log file gets a line now and then
    what = f"import {track}"
    with tqdm(groups.items(), what, unit="video", dynamic_ncols=True, mininterval=calm) as bar:
        for video_id, files in bar:
            job = _Job(video_id, files, how, store, known.get(video_id, _NOTHING), done.notes)
            try:
                done.videos[video_id] = job.run(str(Path(source).resolve()))
            except VacliError as e:
                if e.fatal:
                    raise
                done.problems[video_id] = " ".join(str(e).split())
            else:
                folders.add(job.folder)
                raters[job.raters] += 1
    store.remember_fingerprints()
    done.notes += [f"the mean of {r} raters, in {n} video(s)" for r, n in sorted(raters.items()) if r > 1]
    if len(folders) > 1:
        done.notes.append(
            f"the files have {len(folders)} different sets of columns; they never train together"
        )
    return done


_NOTHING: dict[str, Any] = {"media": None, "tracks": {}}  # what is known of a new video


@dataclass(frozen=True)
class _How:
    """The options, understood. rate_hz, times_at (a folder or file), scale (low, high): None if not so."""

    track: str
    times: str | None
    columns: tuple[str, ...]
    rate_hz: float | None
    times_at: Path | None
    scale: tuple[float, float] | None

    @classmethod
    def of(cls, track: str, times: str | None, columns: tuple[str, ...], scale: str | None) -> _How:
        try:
            folder_name({"track": track})
        except ValueError as e:
            raise VacliError(
                f"--track {track!r}: wanted a name such as my.audio: a-z 0-9 . _ - , 64 at most"
            ) from e
        if track == "faces":
            raise VacliError("--track faces: that is the face tracker's own track; give another name")
        if scale is not None and track != LABELS:
            raise VacliError(
                f"--scale {scale} is for labels (--track {LABELS}); features are stored as they are"
            )
        rate = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*hz", times or "", re.IGNORECASE)
        rate_hz = float(rate[1]) if rate else None
        if rate_hz == 0:
            raise VacliError(f"--times {times}: wanted a rate above 0, as 25Hz")
        is_path = times is not None and not rate and times != "frames" and os.path.exists(times)  # no OSError
        return cls(track, times, columns, rate_hz, Path(str(times)) if is_path else None, scale_of(scale))

    @property
    def named(self) -> str | None:
        """The column or array that holds the times, if one was named."""
        return None if self.rate_hz or self.times_at or self.times == "frames" else self.times

    def recipe(self, columns: list[str] | str) -> dict[str, Any]:
        """All that decides the values beside the bytes; no path."""
        times = f"column {self.named}" if self.named else self.times or "the file's own"
        if self.rate_hz:
            times = f"row i at (i + 0.5) / {self.rate_hz!r} s"
        elif self.times_at:
            times = "from a file of times"
        rules: dict[str, Any] = {"columns": columns, "times": times}
        if self.track == LABELS:
            rules |= {"scale": self.scale and list(self.scale), "raters": "the mean of those who judged"}
        return {"track": self.track, "version": 1, "imported": rules}


# ---- which file is which video -------------------------------------------------------------------------------


@dataclass(frozen=True)
class _File:
    """parts: the path below the source, without its suffix."""

    path: Path
    parts: tuple[str, ...]

    @property
    def split(self) -> str | None:
        """train/, validation/ and test/ folders split, as in a plain folder of videos."""
        return split_of(self.parts[:-1])

    @property
    def rater(self) -> tuple[str, ...]:
        """The folders (or the name) that say whose ratings these are: called rater1, rater_anna, ..."""
        return tuple(part for part in self.parts if part.lower().startswith("rater"))

    def id(self, raters: bool) -> str:
        parts = [part for part in self.parts if not (raters and part in self.rater)]
        return plain_id("/".join(parts or self.parts))


def _files(source: Path, times_at: Path | None) -> list[_File]:
    """The tables below a folder, without hidden ones and those of times; or the one file. Sorted."""
    if not os.path.exists(source):
        raise VacliError(f"no such file or folder: {source}; wanted a file of features, or a folder of them")
    root, found = (source, source.rglob("*")) if source.is_dir() else (source.parent, iter([source]))
    apart = times_at.resolve() if times_at else None
    if apart and source.resolve() not in apart.parents:
        apart = None
    files = []
    for path in sorted(found):
        below, suffix, whole = path.relative_to(root), suffix_of(path), path.resolve()
        hidden = any(part.startswith(".") for part in below.parts)
        if suffix and path.is_file() and not hidden and apart not in (whole, *whole.parents):
            files.append(_File(path, (*below.parts[:-1], below.name[: -len(suffix)])))
    if not files:
        raise VacliError(f"nothing to import in {source}; wanted files ending in {' '.join(SUFFIXES)}")
    return files


def _by_video(files: list[_File], known: dict[str, Any], raters: bool) -> dict[str, list[_File]]:
    """The files of each video id: the very id the store knows; else the only stored id that ends as ours does (or
    ours as it: `features/clip` is `clip`) and that no other file bears; else a new one.
    """
    own: dict[str, list[_File]] = {}
    for file in files:
        own.setdefault(file.id(raters), []).append(file)
    free: dict[str, list[str]] = {}
    for video_id in known.keys() - own.keys():
        free.setdefault(video_id.rpartition("/")[2], []).append(video_id)
    groups: dict[str, list[_File]] = {}
    for video_id, members in own.items():
        a = f"/{video_id}"
        near = [k for k in free.get(a.rpartition("/")[2], ()) if a.endswith(f"/{k}") or f"/{k}".endswith(a)]
        stored = near[0] if len(near) == 1 and video_id not in known else video_id
        groups.setdefault(stored, []).extend(members)
    return dict(sorted(groups.items()))


def _notes_on_ids(groups: dict[str, list[_File]], known: dict[str, Any], raters: bool) -> list[str]:
    pairs = [(file.id(raters), video_id) for video_id, files in groups.items() for file in files]
    near = [f"{own} for {video_id}" for own, video_id in pairs if own != video_id]
    new = [video_id for video_id in groups if known and video_id not in known]
    notes = [f"{len(near)} joined by the end of the id: {shown(near)}"] if near else []
    if new:
        notes.append(f"{len(new)} of {len(groups)} name no video of the store and are new: {shown(new)}")
    return notes


# ---- one video -----------------------------------------------------------------------------------------------


@dataclass
class _Job:
    """The files of one video, made into its track. facts: what the store knows of it. notes: told at the end."""

    video_id: str
    files: list[_File]
    how: _How
    store: Store
    facts: dict[str, Any]
    notes: list[str]
    folder: str = ""
    raters: int = 1

    def run(self, root: str) -> str:
        """Store and link the track: "stored", or "kept" if it was there. Raises VacliError."""
        self._refuse_doubles()
        tables = [open_table(file.path) for file in self.files]
        chosen = [self._columns(table) for table in tables]
        recipe, media = self.how.recipe(self._spelled(chosen[0])), self._media()
        self.folder = folder_name(recipe)
        address = {"folder": self.folder, "media": media}
        there = self.store.has(recipe, media)
        if there:
            self.raters = self.store.provenance(recipe, media).get("raters", 1)
            if self.facts["tracks"].get(self.how.track) == address:
                return "kept"
            self._check_reach(self.store.get(recipe, media).times_s)
        else:
            track = self._track(tables, chosen)
            self._check_reach(track.times_s)
            if self._media() != media:
                raise VacliError(f"{self.files[0].path} changed while it was read; run the import again")
            self.store.put(recipe, media, track, {"sample": self.video_id, "raters": self.raters})
        split = next((file.split for file in self.files if file.split), None)
        facts = {"root": root, "media": None, "split": split}
        self.store.link(self.video_id, facts, {self.how.track: address})
        return "kept" if there else "stored"

    def _refuse_doubles(self) -> None:
        raters = {file.rater for file in self.files} if self.how.track == LABELS else {()}
        if len(self.files) > 1 and (() in raters or len(raters) < len(self.files)):
            mend = "; several raters lie in folders rater1, rater2, ..." if self.how.track == LABELS else ""
            paths = shown([str(file.path) for file in self.files])
            raise VacliError(f"{len(self.files)} files for one video: {paths}; wanted one{mend}")

    def _columns(self, table: Table) -> list[list[str]]:
        """The columns that are taken: of features one list, of labels one for each rater."""
        names = list(self.how.columns)
        if not names:
            names = [n for n in table.value_names() if n != self.how.named]
        if self.how.track == LABELS:
            return rater_columns(table, [n for n in names if n.lower() != "rater"], bool(self.how.columns))
        if not names or (len(names) > 1 and not (table.columns or self.how.columns)):
            raise VacliError(
                f"{table.path} holds {shown(names)}; wanted one array, choose it with --columns NAME"
            )
        return [names]

    def _spelled(self, chosen: list[list[str]]) -> list[str] | str:
        """The columns as the recipe says them; so many that they would fill its page, as a digest of their names."""
        names = chosen[0] if self.how.track != LABELS else list(self.how.columns or TARGETS)
        text = json.dumps(names)
        return names if len(text) < 8_000 else f"{len(names)}, {hashlib.sha256(text.encode()).hexdigest()}"

    def _media(self) -> str:
        """Digest of the bytes that decide the track: of each file, and of what gives its times."""
        digests = []
        for file in self.files:
            digest = self.store.fingerprints.file(file.path)
            if self.how.times_at:
                digest = combine(digest, self.store.fingerprints.file(self._times_file(file)))
            elif self.how.times == "frames":
                digest = combine(digest, hashlib.sha256(self._frame_times_s.tobytes()).hexdigest())
            digests.append(digest)
        return digests[0] if len(digests) == 1 else combine(*sorted(digests))  # raters are no order

    def _track(self, tables: list[Table], chosen: list[list[list[str]]]) -> Track:
        if self.how.track != LABELS:
            values, _ = tables[0].matrix(chosen[0][0])
            times_s = self._times(self.files[0], tables[0], np.arange(len(values)), len(values))
            return Track(self._whole_rows(_floats(tables[0], values)), times_s)
        found = zip(self.files, tables, chosen, strict=True)
        parts = [part for file, table, raters in found for part in self._rated(file, table, raters)]
        self.raters = len(parts)
        times_s, labels = mean_of_raters(self.files[0].path, parts)
        return Track(self._whole_rows(labels.astype(np.float32)), times_s)

    def _rated(
        self, file: _File, table: Table, raters: list[list[str]]
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """(times_s (T,), labels (T, 2) in [-1, 1], NaN where not judged) of each rater of a file."""
        who = next((n for n in table.names if n.lower() == "rater"), None) if table.columns else None
        values, codes = table.matrix([name for columns in raters for name in columns], who)
        if values.shape[1] != len(TARGETS) * len(raters):
            raise VacliError(f"{table.path} has rows of {values.shape[1]} values; wanted valence and arousal")
        labels = on_scale(table, values, self.how.scale).reshape(len(values), len(raters), len(TARGETS))
        parts = []
        for code in np.unique(codes):
            rows = np.flatnonzero(codes == code)
            times_s = self._times(file, table, rows, len(values))
            parts += [(times_s, labels[rows, r]) for r in range(len(raters))]
        return parts

    def _whole_rows(self, values: np.ndarray) -> np.ndarray:
        """A row with a missing value is missing as a whole, as in every Track; told."""
        missing = np.isnan(values)
        rows = missing.any(axis=1)
        partly = int((rows & ~missing.all(axis=1)).sum())
        if partly:
            self.notes.append(
                f"{self.video_id}: {partly} of {len(rows)} rows miss some values: they count as missing"
            )
        if rows.all():
            self.notes.append(f"warning: {self.video_id}: no row of it holds values")
        values[rows] = np.nan
        return values

    # ---- times ----

    def _times(self, file: _File, table: Table, rows: np.ndarray, of: int) -> np.ndarray:
        """(T,) float64 seconds of `rows` of a table of `of` rows: as many, finite and increasing."""
        if self.how.rate_hz:
            times_s = (np.arange(len(rows)) + 0.5) / self.how.rate_hz
        elif self.how.times == "frames":
            times_s = self._frame_times_s
        elif self.how.times_at:
            times_s = open_table(self._times_file(file)).times_s(alone=True)
        else:
            times_s = table.times_s(self.how.named)
            if len(times_s) == of:
                times_s = times_s[rows]
        if len(times_s) != len(rows):
            raise VacliError(
                f"{table.path}: {len(rows)} rows and {len(times_s)} times; wanted one time for each row"
            )
        wrong = ~np.isfinite(times_s)
        wrong[1:] |= ~(np.diff(times_s) > 0)
        if wrong.any():
            at = int(wrong.argmax())
            raise VacliError(
                f"{table.path} {table.row(rows[at])}: the time {times_s[at]} is not a later one than the row's before;"
                " wanted seconds that increase from row to row"
            )
        return times_s

    def _times_file(self, file: _File) -> Path:
        at = self.how.times_at
        assert at is not None
        if at.is_file():
            return at
        for below in (Path(*file.parts), Path(self.video_id), Path(file.parts[-1])):
            for suffix in SUFFIXES:
                path = (at / below).with_name(below.name + suffix)
                if path.is_file():
                    return path
        raise VacliError(
            f"no times of {self.video_id}: wanted {at / Path(*file.parts)}.npy (or .csv, .txt, ...)"
        )

    @cached_property
    def _frame_times_s(self) -> np.ndarray:
        """The clock of the decoded frames: that of the faces, else of extracted labels, else of frame features."""
        tracks = self._extracted()
        names = [n for n in ("faces", LABELS) if n in tracks][:1]
        names = names or [n for n, address in tracks.items() if address["media"] == self.facts["media"]]
        clocks = {clock.tobytes(): clock for n in names if (clock := self._clock(tracks[n])) is not None}
        if len(clocks) != 1:
            raise VacliError(
                f"--times frames: the store does not know the frames of {self.video_id}; `vacli extract` its video "
                "first, or give other --times"
            )
        return next(iter(clocks.values()))

    def _extracted(self, imported: bool = False) -> dict[str, dict[str, str]]:
        """The video's tracks that were made from it, or else those that were imported."""
        tracks = self.facts["tracks"].items()
        found = {}
        for name, address in tracks:
            with contextlib.suppress(Damaged):  # it tells nothing
                if ("imported" in self.store.recipe_of(address["folder"])) == imported:
                    found[name] = address
        return found

    def _clock(self, address: dict[str, str]) -> np.ndarray | None:
        try:
            return self.store.get(self.store.recipe_of(address["folder"]), address["media"]).times_s
        except (KeyError, Damaged):  # lost or broken: it tells nothing
            return None

    def _check_reach(self, times_s: np.ndarray) -> None:
        """Do the times fit the stored video? Its faces tell how long it is; else all that was extracted from it; else
        imported features (labels may end early). Raises VacliError beyond its end; notes what covers too little.
        """
        made = self._extracted()
        others = {
            n: t for n, t in self._extracted(imported=True).items() if n not in (LABELS, self.how.track)
        }
        tellers = {"faces": made["faces"]} if "faces" in made else made or others
        ends_s = [float(c[-1]) for t in tellers.values() if (c := self._clock(t)) is not None and len(c)]
        if not ends_s:
            return
        what = f"the times of {self.files[0].path} are {times_s[0]:.3f}..{times_s[-1]:.3f} s"
        end = f"{self.video_id} ends at {max(ends_s):.3f} s (so say {', '.join(tellers)})"
        if times_s[-1] > max(ends_s) * (1 + _OVER_SHARE) + _OVER_S:
            raise VacliError(
                f"{what}, but {end}: is it that video, in seconds from its start? give other --times"
            )
        if times_s[-1] - times_s[0] < max(ends_s) * _REACH_SHARE:
            self.notes.append(f"warning: {what}, less than {_REACH_SHARE:.0%} of the video: {end}")


def _floats(table: Table, values: np.ndarray) -> np.ndarray:
    """A copy of values (T, D), float16 as they are and all else as float32. Raises VacliError for infinities."""
    with np.errstate(over="ignore"):
        half = values.dtype.kind == "f" and values.dtype.itemsize == 2
        floats = values.astype(np.float16 if half else np.float32, order="C")
    odd = np.isinf(floats).any(axis=1)
    if odd.any():
        raise VacliError(
            f"{table.path} {table.row(int(odd.argmax()))}: an infinity, or more than float32 holds; wanted finite "
            "numbers, and an empty cell (NaN) where nothing was seen"
        )
    return floats
