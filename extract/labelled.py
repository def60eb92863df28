"""Labelled frames: which frames of which videos have a face and a label, a draw of them, and their crops in a file."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from tqdm import tqdm

from .. import VacliError
from ..store import Store, digest
from .crops import Crops, aligned
from .datasets import Sample
from .run import Outcome, extract

SAMPLINGS = {
    "even": "evenly spaced frames of each video, the same in every epoch",
    "time": "a random frame of each stretch of time, another one in every epoch",
    "balanced": "as time, but all regions of the valence-arousal plane alike, as far as there are frames",
}
_BINS = 10  # along each of valence and arousal
_CANDIDATES = 4  # of each frame drawn by `balanced`: as dense as neighbours may be in the rare regions


@dataclass(frozen=True)
class Labelled:
    """All labelled frames of one split, the videos one after the other.

    Shape legend: N labelled frames.

    outcomes: the videos, whose faces and labels are stored. video (N,): which of them. row (N,): frame number, from
    0. times_s (N,). labels (N, 2): valence and arousal in [-1, 1]. problems: what was left out, and why.
    """

    store: Store
    outcomes: list[Outcome]
    video: np.ndarray
    row: np.ndarray
    times_s: np.ndarray
    labels: np.ndarray
    problems: list[str]

    def __len__(self) -> int:
        return len(self.row)


def find_labelled(samples: list[Sample], store: Store, split: str) -> Labelled:
    """The frames of a split that have a label (-5 is none) and a face, or a crop that the data set brings.

    Faces and labels are stored; what is stored is not computed again. A frame and its label are of one row of two
    tracks on one clock, so nothing is matched by counting. Raises VacliError where there is no such frame.
    """
    wanted = [s for s in samples if s.annotation is not None and s.split == split]
    outcomes = extract(wanted, {}, store, link=False)
    problems = [o.problem for o in outcomes if o.problem]
    outcomes = [o for o in outcomes if o.complete]
    found = [_labelled_rows(o, store) for o in outcomes]
    if not any(len(rows) for rows, _, _ in found):
        use = "tune on" if split == "train" else "judge by"
        why = f"{len(wanted)} of the {len(samples)} videos are labelled and in the {split} set"
        mend = f"wanted {split}/clip.mp4 with clip.txt, or the Aff-Wild2 layout"
        raise VacliError(f"no labelled face to {use}: {why}; {problems[0] if problems else mend}")
    rows, times_s, labels = (np.concatenate(part) for part in zip(*found, strict=True))
    video = np.repeat(np.arange(len(found)), [len(r) for r, _, _ in found])
    return Labelled(store, outcomes, video, rows, times_s, labels, problems)


def _labelled_rows(outcome: Outcome, store: Store) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows (n,), their times_s (n,) and labels (n, 2)."""
    wanted = outcome.tracks["label.va"]
    labels = store.get(wanted.recipe, wanted.media)
    if outcome.sample.crops is None:
        wanted = outcome.tracks["faces"]
        rows = np.flatnonzero(labels.valid & store.get(wanted.recipe, wanted.media).valid)
    else:
        rows = np.intersect1d(np.flatnonzero(labels.valid), list(outcome.sample.crop_files()))
    rows = rows.astype(np.int64)
    return rows, labels.times_s[rows], labels.values[rows]


# ---- drawing frames ------------------------------------------------------------------------------------------


def draw(frames: Labelled, sampling: str, per_video: int, seed: int, epoch: int) -> np.ndarray:
    """Indices (n,) into the labelled frames: those of one epoch, in no order. A function of its arguments.

    sampling: one of SAMPLINGS. per_video: at most so many of each video (`balanced`: on average). Neighbouring
    frames show nearly the same face, so none is drawn twice. n is the same for all epochs.
    """
    random = np.random.default_rng((seed, epoch))
    if sampling == "even":
        return np.concatenate([_even(some, per_video) for some in _per_video(frames)])
    if sampling == "time":
        return _timed(frames, per_video, random)
    if sampling == "balanced":
        candidates = _timed(frames, _CANDIDATES * per_video, random)
        videos = len(np.unique(frames.video))
        return candidates[_balanced(frames.labels[candidates], per_video * videos, random)]
    raise VacliError(f"--sampling {sampling}: wanted one of {', '.join(SAMPLINGS)}")


def _per_video(frames: Labelled) -> Iterator[np.ndarray]:
    edges = np.flatnonzero(np.diff(frames.video)) + 1
    yield from np.split(np.arange(len(frames)), edges)


def _even(some: np.ndarray, most: int) -> np.ndarray:
    return some[np.linspace(0, len(some) - 1, min(most, len(some))).astype(int)]


def _timed(frames: Labelled, slots: int, random: np.random.Generator) -> np.ndarray:
    """One frame of each of so many equal stretches of each video's time, where there is one."""
    drawn = []
    for some in _per_video(frames):
        times_s = frames.times_s[some]
        span_s = max(times_s[-1] - times_s[0], 1e-9)
        slot = np.minimum((times_s - times_s[0]) / span_s * slots, slots - 1).astype(int)
        first = np.flatnonzero(np.diff(slot, prepend=-1))  # times ascend, so a slot's frames are neighbours
        count = np.diff(first, append=len(some))
        drawn.append(some[first + random.integers(0, count)])
    return np.concatenate(drawn)


def _balanced(labels: np.ndarray, total: int, random: np.random.Generator) -> np.ndarray:
    """Indices of `total` rows of labels (n, 2): every cell of the plane gives as many, or all it has.

    With fewer rows than that, all.
    """
    column = np.clip(((labels + 1) / 2 * _BINS).astype(int), 0, _BINS - 1)
    cell = column[:, 0] * _BINS + column[:, 1]
    order = random.permutation(len(labels))
    order = order[np.argsort(cell[order], kind="stable")]
    held = np.unique(cell, return_counts=True)[1]
    turn = np.concatenate([np.arange(n) for n in held])  # a row's turn within its cell
    # All rows of turn 0, then of turn 1, ...: the cells that have more than others are cut at the same height.
    taken = np.lexsort((random.random(len(turn)), turn))[:total]
    return order[taken]


# ---- crops in a file -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fetched:
    """The crops of n frames in a file. seen (n,) bool: which could be read; the others are black.

    digest: of what they were made from. problems: what was left out, and why.
    """

    path: Path
    shape: tuple[int, ...]
    seen: np.ndarray
    digest: str
    problems: list[str]

    def pixels(self) -> np.memmap:
        """(n, H, W, 3) uint8, mapped: memory of it is the system's to take back."""
        return np.memmap(self.path, np.uint8, "r", shape=(len(self.seen), *self.shape))

    def remove(self) -> None:
        for file in (self.path, _mark(self.path)):
            file.unlink(missing_ok=True)


def fetch(frames: Labelled, chosen: np.ndarray, path: Path) -> Fetched:
    """The crops of chosen frames, in a file at `path`.

    chosen: indices (n,), ascending. Aff-Wild2 has 2.7 million crops of 38 kB: they pass through memory a batch at a
    time, and go to the disk raw, as decoding the videos in every epoch would take longer than training. The file is
    whole when the one beside it (.json) says so; a whole one of the same frames is used as it is. A video that
    cannot be read is told in the problems. Raises VacliError for crops of several sizes, or a disk that is full.
    """
    what = _digest(frames, chosen)
    try:
        mark = json.loads(_mark(path).read_text())
        size = int(np.prod([len(chosen), *mark["shape"]]))
        known = mark["frames"] == what and path.stat().st_size == size
    except (OSError, ValueError, KeyError, TypeError):
        known = False
    if not known:
        try:
            _mark(path).unlink(missing_ok=True)
            mark = {"frames": what, **_write(frames, chosen, path)}
            _mark(path).write_text(json.dumps(mark))
        except OSError as e:
            why = f"{e.strerror or e}; {len(chosen)} crops need about {len(chosen) * 37632 / 1e9:.1f} GB"
            mend = "free some space, give another --out, or fewer --frames-per-video"
            raise VacliError(f"cannot write {path}: {why}: {mend}") from e
    seen = np.ones(len(chosen), bool)
    seen[mark["missing"]] = False
    return Fetched(path, tuple(mark["shape"]), seen, what, frames.problems + mark["problems"])


def _mark(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _digest(frames: Labelled, chosen: np.ndarray) -> str:
    videos = [[o.sample.id, o.media, *(w.kind.digest for w in o.tracks.values())] for o in frames.outcomes]
    rows = np.stack([frames.video[chosen], frames.row[chosen]]).astype(np.int64)
    return digest({"videos": videos, "rows": hashlib.sha256(rows.tobytes()).hexdigest()})


def _write(frames: Labelled, chosen: np.ndarray, path: Path) -> dict[str, object]:
    """Fill the file; returns the crops' shape, which are missing, and why."""
    shape: tuple[int, ...] = ()
    seen = np.zeros(len(chosen), bool)
    problems = []
    with open(path, "wb") as file, _bar(len(chosen)) as bar:
        for video in np.unique(frames.video[chosen]):
            places = np.flatnonzero(frames.video[chosen] == video)
            rows = frames.row[chosen[places]]
            try:
                for crops, of in _crops(frames, video, rows):
                    shape = shape or crops.shape[1:]
                    _refuse_sizes(frames.outcomes[video].sample, shape, crops.shape[1:])
                    at = places[np.searchsorted(rows, of)]
                    _put(file, at, crops)
                    seen[at] = True
                    bar.update(len(at))
            except VacliError as e:
                if e.fatal:
                    raise
                problems.append(" ".join(str(e).split()))
        if not shape:
            raise VacliError(f"none of {len(chosen)} faces could be read; {'; '.join(problems[:1])}")
        file.truncate(len(chosen) * int(np.prod(shape)))
        file.flush()
        os.fsync(file.fileno())  # before the mark that says so
    return {"shape": shape, "missing": np.flatnonzero(~seen).tolist(), "problems": problems}


def _crops(frames: Labelled, video: int, rows: np.ndarray) -> Iterator[Crops]:
    """The crops of some rows of a video, in order; rows (n,) ascend. They need have no label."""
    outcome = frames.outcomes[video]
    if outcome.sample.crops is None:
        wanted = outcome.tracks["faces"]
        faces = frames.store.get(wanted.recipe, wanted.media)
        mask = np.isin(np.arange(len(faces)), rows)
        batches: Iterable[Crops] = aligned(outcome.sample, faces, mask)
    else:
        mask = np.isin(np.arange(rows[-1] + 1), rows)
        batches = outcome.sample.read_crops(len(mask))
    for crops, of in batches:
        here = mask[of]
        if here.any():
            yield crops[here], of[here]


def _put(file: IO[bytes], at: np.ndarray, crops: np.ndarray) -> None:
    """Crops at their places, which ascend; places between stay holes."""
    each = crops[0].nbytes
    for run in np.split(np.arange(len(at)), np.flatnonzero(np.diff(at) != 1) + 1):
        file.seek(int(at[run[0]]) * each)
        file.write(np.ascontiguousarray(crops[run[0] : run[-1] + 1]).data)


class _SizesDiffer(VacliError):
    fatal = True


def _refuse_sizes(sample: Sample, wanted: tuple[int, ...], shape: tuple[int, ...]) -> None:
    if shape != wanted:
        raise _SizesDiffer(
            f"{sample.crops}: crops of several sizes ({shape[1]}x{shape[0]} after {wanted[1]}x{wanted[0]}); "
            "wanted one size, 112x112"
        )


def _bar(total: int) -> tqdm:
    # tqdm's own default, which heeds --quiet, but for a log file: that needs no such bar
    calm: dict[str, bool] = {} if sys.stderr.isatty() else {"disable": True}
    return tqdm(total=total, desc="crops", unit="crop", dynamic_ncols=True, mininterval=1, **calm)
