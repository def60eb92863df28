"""People in a video: faces found, followed from frame to frame without being swapped, and one of them chosen."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from .. import VacliError
from ..store.track import Track
from .faces import Detector, overlap_of
from .following import BOX, SCORE, Detects, Face, Follower
from .following import recipe as following
from .yunet import YuNet

Frames = Iterable[tuple[np.ndarray, np.ndarray]]  # rgb (B, H, W, 3) uint8, times_s (B,)

# Who has a place of his own.
MIN_SEEN, MIN_SEEN_EVERY = (
    3,
    2,
)  # found less often is a false alarm; the second where not every frame is looked at
AWAY_S, AGAIN_IOU = 2.0, 0.3  # who shows up within this time, overlapping the last one of a place, takes it
MOST_PEOPLE, MIN_SHARE = 8, 0.01  # places; from the second on, one filled in fewer of the rows is dropped

# Choosing one.
APART_IOU = 0.3  # neighbouring rows of a place that overlap less are of two faces
TOGETHER = 0.1  # in this part of the rows with anybody two must be seen at once for there to be a left and a right one


class People:
    """The `people` track of a video: everybody in it, each followed in a place of his own.

    detector: "mtcnn"; or YuNet: the path of its .onnx file, or "yunet" where that lies among the weights. every: look
    for faces in every n-th frame, and follow the pixels in between. Raises VacliError for a detector there is none of
    (EncoderError for a file that is no YuNet), ValueError where `every` is not at least 1.
    """

    name = "people"

    def __init__(self, detector: str = "mtcnn", every: int = 1) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        self.every = every
        self.detector: Detects = Detector() if detector == "mtcnn" else YuNet.named(detector)

    def recipe(self) -> dict[str, Any]:
        """All that decides the values, as plain JSON. A change to the code that moves them raises `version`."""
        return {
            "track": self.name,
            "version": 1,
            "detector": self.detector.recipe(),
            **following(self.every),
            "min_seen": self.min_seen,
            "again": {"away_s": AWAY_S, "iou": AGAIN_IOU},
            "places": {"most": MOST_PEOPLE, "min_share": MIN_SHARE},
        }

    @property
    def min_seen(self) -> int:
        """In how many rows the detector must find a face for it to be none of its false alarms."""
        return MIN_SEEN if self.every == 1 else MIN_SEEN_EVERY

    def __call__(self, frames: Frames, on_frames: Callable[[int], None] | None = None) -> Track:
        """(T, K, 15) float32, T the frames given: who is where, in K places, the heaviest first.

        Columns of a person as `Detector` has them: box 4, five points 10, score. Zeros where he is not seen in a row
        in which somebody else is; a row of NaN where nobody is; K = 1 and NaN throughout where nobody ever is. Without
        frames (0, 1, 15). Weight: area x score, summed over the rows.

        A gap of up to half a second (LOST_S, from frame seen to frame seen) with no cut in it is filled by
        interpolation in time, with a score of BRIDGED_SCORE; a row between two detections has the score of the first.
        A cut ends everybody's track. Who then, or after an absence, has a place: whoever shows up within AWAY_S about
        where the last one of that place was seen; the others, heaviest first, wherever it is free the while. Faces
        found fewer than 3 times (2 where not every frame is looked at) are false alarms; at most MOST_PEOPLE places.

        `on_frames` is told how many frames were done since it was last called. No frame is held longer than until the
        next batch has come.
        """
        follower = Follower(self.detector, self.every)
        for rgb, times_s in frames:
            follower.see(rgb, times_s)
            if on_frames is not None:
                on_frames(len(rgb))
        times_s = np.array(follower.times_s, np.float64)
        return Track(_placed(follower.finish(), times_s, self.min_seen), times_s)


class Person:
    """The `faces` track: one of the people, chosen.

    who: "main": of all ways to have one person at a time the heaviest (weighted interval scheduling), so who is large,
    surely seen and long there, and in his absence the next. "1", "2", ...: a place of the people track. "left" and
    "right": of those in the two heaviest places the one farther left or right in the picture while both are seen, for
    as long as either is followed; who is seen alone is on the side whose usual place is nearer; where two are hardly
    ever seen at once (TOGETHER), left = right = main. Raises VacliError for anything else.
    """

    name = "faces"

    def __init__(self, who: str) -> None:
        if who not in ("main", "left", "right") and not (who.isdecimal() and who.isascii() and int(who) >= 1):
            raise VacliError(f"no such person: {who!r}; wanted main, left, right, or a number: 1, 2, ...")
        self.who = who if who in ("main", "left", "right") else str(int(who))

    def recipe(self) -> dict[str, Any]:
        """All that decides the values, as plain JSON. A change to the code that moves them raises `version`."""
        sides = {"together": TOGETHER} if self.who in ("left", "right") else {}
        how = {"apart_iou": APART_IOU} if self.who in ("main", "left", "right") else {}
        return {"track": self.name, "version": 2, "person": self.who, **how, **sides}

    def __call__(self, people: Track) -> Track:
        """people (T, K, 15) -> (T, 15), a row of NaN where that person is not seen."""
        values = people.values
        if self.who == "main":
            chosen = _main(values)
        elif self.who in ("left", "right"):
            chosen = _side(values, self.who)
        else:
            place = int(self.who) - 1
            chosen = np.full(len(values), place if place < values.shape[1] else -1)
        rows = np.flatnonzero(chosen >= 0)
        rows = rows[values[rows, chosen[rows], SCORE] > 0]
        out = np.full((len(values), 15), np.nan, np.float32)
        out[rows] = values[rows, chosen[rows]]
        return Track(out, people.times_s)


# ---- places --------------------------------------------------------------------------------------------------


class _Chain:
    """Faces in turn that show up where the one before was last seen: one person, as far as can be told."""

    def __init__(self) -> None:
        self.parts: list[tuple[slice, np.ndarray]] = []
        self.weight = 0.0

    def add(self, span: slice, values: np.ndarray) -> None:
        self.parts.append((span, values))
        self.weight += _weight(values)


def _weight(values: np.ndarray) -> float:
    """Area times score, summed over the rows (n, 15): large, sure and long."""
    x = values.astype(np.float64)
    return float(((x[:, 2] - x[:, 0]) * (x[:, 3] - x[:, 1]) * x[:, SCORE]).sum())


def _placed(faces: list[Face], times_s: np.ndarray, min_seen: int) -> np.ndarray:
    """(T, K, 15): the faces in places, the heaviest person first."""
    least = min(min_seen, len(times_s))
    parts = [face.filled(times_s) for face in faces if face.seen >= least]
    chains = sorted(_chained(parts, times_s), key=lambda c: -c.weight)
    places: list[list[tuple[slice, np.ndarray]]] = []
    taken = np.zeros((MOST_PEOPLE, len(times_s)), bool)
    for chain in chains:
        for k in range(MOST_PEOPLE):
            if not any(taken[k, span].any() for span, _ in chain.parts):
                if k == len(places):
                    places.append([])
                places[k] += chain.parts
                for span, _ in chain.parts:
                    taken[k, span] = True
                break
    share = taken.mean(axis=1) if len(times_s) else taken.sum(axis=1)
    places = [p for k, p in enumerate(places) if not k or share[k] >= MIN_SHARE]
    places.sort(key=lambda parts: -sum(_weight(values) for _, values in parts))
    out = np.zeros((len(times_s), max(len(places), 1), 15), np.float32)
    for k, place in enumerate(places):
        for span, values in place:
            out[span, k] = values
    out[~(out[:, :, SCORE] > 0).any(axis=1)] = np.nan
    return out


def _chained(parts: list[tuple[slice, np.ndarray]], times_s: np.ndarray) -> list[_Chain]:
    chains: list[_Chain] = []
    recent: list[_Chain] = []
    for span, values in sorted(parts, key=lambda p: p[0].start):
        begin_s = times_s[span.start]
        recent = [c for c in recent if begin_s - times_s[c.parts[-1][0].stop - 1] <= AWAY_S]
        free = [c for c in recent if c.parts[-1][0].stop <= span.start]
        fit = [overlap_of(c.parts[-1][1][-1:, BOX], values[:1, BOX])[0, 0] for c in free]
        if fit and max(fit) >= AGAIN_IOU:
            chain = free[int(np.argmax(fit))]
        else:
            chain = _Chain()
            chains.append(chain)
            recent.append(chain)
        chain.add(span, values)
    return chains


# ---- choosing ------------------------------------------------------------------------------------------------


def _stretches(place: np.ndarray) -> list[slice]:
    """Runs of rows of one place (T, 15) in which one face is seen throughout: no gap, and no jump as at a cut."""
    seen = place[:, SCORE] > 0  # NaN is not
    low = np.maximum(place[1:, :2], place[:-1, :2])
    high = np.minimum(place[1:, 2:4], place[:-1, 2:4])
    shared = np.maximum(high - low, 0).prod(axis=1)
    area = np.maximum(place[:, 2:4] - place[:, :2], 0).prod(axis=1)
    joined = shared >= APART_IOU * (area[1:] + area[:-1] - shared)
    begins = seen & ~np.r_[False, seen[:-1] & joined]
    ends = seen & ~np.r_[seen[1:] & joined, False]
    return [
        slice(int(a), int(b) + 1) for a, b in zip(np.flatnonzero(begins), np.flatnonzero(ends), strict=True)
    ]


def _main(values: np.ndarray) -> np.ndarray:
    """(T,) int: the place (of values (T, K, 15)) where the main person is, row by row; -1 where he is not.

    Of all ways to have one person at a time, the one of greatest weight. Others then take over in what is free, but
    only where most of their own time is: a bystander does not fill the main person's absences.
    """
    runs = [
        (span, k, _weight(values[span, k]))
        for k in range(values.shape[1])
        for span in _stretches(values[:, k])
    ]
    chosen = np.full(len(values), -1)
    for span, k, _ in _in_turn(runs) + sorted(runs, key=lambda run: -run[2]):
        free = chosen[span] < 0
        if 2 * free.sum() > len(free):
            chosen[span][free] = k
    return chosen


_Run = tuple[slice, int, float]  # rows, place, weight


def _in_turn(runs: Sequence[_Run]) -> list[_Run]:
    """The runs of greatest weight together of which no two overlap in time (weighted interval scheduling)."""
    runs = sorted(runs, key=lambda run: run[0].stop)
    stops = [span.stop - 1 for span, _, _ in runs]
    best: list[tuple[float, Any]] = [(0.0, ())]  # of the first i runs: weight, (last, (last but one, ...))
    for i, run in enumerate(runs):
        weight, before = best[bisect_left(stops, run[0].start)]
        best.append(max(best[i], (weight + run[2], (run, before)), key=lambda b: b[0]))
    chosen, chain = [], best[-1][1]
    while chain:
        run, chain = chain
        chosen.append(run)
    return chosen


def _side(values: np.ndarray, side: str) -> np.ndarray:
    """(T,) int: the place, 0 or 1, of the person on that side; -1 where nobody is there."""
    seen = values[:, :2, SCORE] > 0
    both = seen.sum(axis=1) == 2
    if both.sum() <= TOGETHER * seen.any(axis=1).sum():
        return _main(values)
    x = values[:, :2, [0, 2]].mean(axis=2)
    leftmost = np.full(len(values), -1)  # the place of the left one
    usual = np.array([np.median(x[both].min(axis=1)), np.median(x[both].max(axis=1))])
    for rows in _companies(values):
        together = rows.start + np.flatnonzero(both[rows])
        if len(together):
            leftmost[rows] = int((x[together, 0] - x[together, 1]).sum() > 0)
        else:
            k = int(seen[rows.start, 1])
            on_the_left = np.abs(np.median(x[rows, k]) - usual).argmin() == 0
            leftmost[rows] = k if on_the_left else 1 - k
    chosen = leftmost if side == "left" else np.where(leftmost < 0, -1, 1 - leftmost)
    return chosen


def _companies(values: np.ndarray) -> list[slice]:
    """Rows that belong together: stretches of the first two places that overlap in time, or one by itself."""
    spans = sorted((s for k in (0, 1) for s in _stretches(values[:, k])), key=lambda s: s.start)
    out: list[slice] = []
    for span in spans:
        if out and span.start < out[-1].stop:
            out[-1] = slice(out[-1].start, max(out[-1].stop, span.stop))
        else:
            out.append(span)
    return out
