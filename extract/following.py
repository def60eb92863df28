"""Faces followed from frame to frame: detections linked, pixels tracked in between, nobody followed across a cut."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np

from .faces import align, overlap_of, reduced, similarity

BOX, POINTS, SCORE = slice(0, 4), slice(4, 14), 14  # columns of a face

# Following.
CUT_LEVELS = 16.0  # between frames whose mean difference at 32x32, in 8-bit levels, is larger lies a cut
LINK_IOU = 0.4  # a detection belongs to a face if it overlaps the place foreseen by this much
COAST_S = 0.1  # a face is foreseen to go on as before for this long, then to stay
LOST_S = 0.5  # a face unseen for longer is lost; a gap up to this long is bridged
REACH = 1.0  # who was hidden may come out this far from where he is foreseen, in widths of his face ...
LIKE = 0.4  # ... and as much larger or smaller, if he looks so much as before: of strangers 90 % do less
LOOK_PX, LOOK_KEEPS = 16, 0.5  # aligned; part of the remembered look that a new one leaves
LOOK_WEIGHS = 0.5  # between overlaps of which several would do, likeness counts this much
BRIDGED_SCORE = 0.1  # of rows that nobody saw: below what any detector calls a face

# Between detections.
FLOW_PX = 64  # the face is at most this wide, or high, in the patch that is searched
FLOW_WINDOW, FLOW_LEVELS = 11, 2  # Lucas-Kanade's own
FLOW_GRID = 5  # points a side, across the box
FLOW_BACK_PX = 1.0  # a point that does not come back to within this, in the patch, is not believed
FLOW_LEAST = 0.4  # part of the points that must be


class Detects(Protocol):
    """A face detector: frames (B, H, W, 3) uint8 RGB -> for each the faces (n, 15) float32, as `Detector` has them."""

    def recipe(self) -> dict[str, Any]: ...
    def __call__(self, frames: np.ndarray) -> list[np.ndarray]: ...


def recipe(every: int) -> dict[str, Any]:
    """All of following that decides the values, as plain JSON."""
    between = {
        "method": "Lucas-Kanade, similarity, mended at the next detection",
        "px": FLOW_PX,
        "window": FLOW_WINDOW,
        "levels": FLOW_LEVELS,
        "grid": FLOW_GRID,
        "back_px": FLOW_BACK_PX,
        "least": FLOW_LEAST,
    }
    return {
        "every": every,
        **({"between": between} if every > 1 else {}),
        "cut_levels": CUT_LEVELS,
        "link": {"iou": LINK_IOU, "coast_s": COAST_S, "lost_s": LOST_S, "reach": REACH},
        "look": {"like": LIKE, "px": LOOK_PX, "keeps": LOOK_KEEPS, "weighs": LOOK_WEIGHS},
        "bridged_score": BRIDGED_SCORE,
    }


class Face:
    """One face, followed without a break longer than LOST_S and with no cut within; a few bytes a row."""

    def __init__(self) -> None:
        self.rows, self.values = array("q"), array("f")  # 15 values a row
        self.seen = 0  # in so many rows by the detector
        self.unsure = 0  # so many of the last rows no detection has confirmed yet
        self.now = np.zeros(15)
        self.last_s = 0.0
        self._sure = self.now, self.last_s  # as of the last detection
        self.speed = np.zeros(4)  # of the edges, pixels a second, smoothed
        self.look: np.ndarray | None = None

    def add(self, row: int, face: np.ndarray, time_s: float, sure: bool = True) -> None:
        if self.rows:
            passed_s = max(time_s - self.last_s, 0.01)  # times may be nudged ones
            self.speed = 0.5 * self.speed + 0.5 * (face[BOX] - self.now[BOX]) / passed_s
        self.rows.append(row)
        self.values.extend(face.tolist())
        self.now, self.last_s = np.asarray(face, np.float64), time_s
        self.seen += sure
        self.unsure = 0 if sure else self.unsure + 1
        if sure:
            self._sure = self.now, self.last_s

    def confirm(
        self, row: int, face: np.ndarray, guess: np.ndarray | None, look: np.ndarray, time_s: float
    ) -> None:
        """Detected again. What the pixels said on the way is mended by how far they were off in the end."""
        n = self.unsure
        if n and guess is not None:
            recent = np.frombuffer(self.values, np.float32)[-15 * n :].reshape(n, 15)
            off = (face - guess)[:SCORE]
            recent[:, :SCORE] += np.arange(1, n + 1)[:, None] / (n + 1) * off
            del recent  # an array that is looked at cannot grow
        self.add(row, face, time_s)
        self.look = look if self.look is None else _unit(self.look * (1 - LOOK_KEEPS) + look * LOOK_KEEPS)

    def forget(self) -> None:
        """Not detected again: the rows since the last detection are withdrawn."""
        if self.unsure:
            del self.rows[-self.unsure :], self.values[-15 * self.unsure :]
            self.unsure = 0
            self.now, self.last_s = self._sure

    def foreseen(self, time_s: float, coast_s: float = COAST_S) -> np.ndarray:
        """(4,): where the box should be now."""
        return self.now[BOX] + self.speed * min(time_s - self.last_s, coast_s)

    def forget_past(self) -> None:
        """What is gone by is dropped but for the last detection and what is yet to be confirmed."""
        past = len(self.rows) - 1 - self.unsure
        del self.rows[:past], self.values[: 15 * past]

    def filled(self, times_s: np.ndarray) -> tuple[slice, np.ndarray]:
        """The rows from first to last and their values (n, 15); those in between that nobody saw are interpolated."""
        rows = np.frombuffer(self.rows, np.int64)
        values = np.frombuffer(self.values, np.float32).reshape(-1, 15)
        span = slice(int(rows[0]), int(rows[-1]) + 1)
        if span.stop - span.start == len(rows):
            return span, values
        out = np.stack([np.interp(times_s[span], times_s[rows], v) for v in values.T], axis=1)
        hidden = np.ones(len(out), bool)
        hidden[rows - rows[0]] = False
        out[hidden, SCORE] = BRIDGED_SCORE
        return span, out.astype(np.float32)


class Follower:
    """Frames in, one batch after the other; in the end everybody who was seen.

    alive: who is followed at present. times_s: seconds of the frames given.
    """

    def __init__(self, detector: Detects, every: int) -> None:
        self.times_s = array("d")
        self.alive: list[Face] = []
        self._detector, self._every = detector, every
        self._rows = 0  # frames given
        self._ended: list[Face] = []
        self._last: np.ndarray | None = None  # the frame before
        self._small: np.ndarray | None = None  # the same, 32x32
        self._since = every  # frames since the last detection

    def see(self, rgb: np.ndarray, times_s: np.ndarray) -> None:
        cuts = [self._cut(picture) for picture in rgb]
        due = [self._due(cut) for cut in cuts]
        found = iter(self._detector(rgb if all(due) else rgb[due]) if any(due) else ())
        for picture, time_s, cut, looked in zip(rgb, times_s.tolist(), cuts, due, strict=True):
            row = self._rows
            self._rows += 1
            self.times_s.append(time_s)
            if cut:
                self._ended += self.alive
                self.alive = []
            guesses = self._flow(picture, row)
            if looked:
                self._link(row, time_s, picture, next(found), guesses)
            else:
                for face, guess in zip(self.alive, guesses, strict=True):
                    if guess is not None:
                        face.add(row, guess, time_s, sure=False)
            self._last = picture
        if len(rgb):
            self._last = rgb[-1].copy()  # of the batch nothing is held

    def here(self) -> list[Face]:
        """Those of the living who are in the last frame."""
        return [face for face in self.alive if face.rows[-1] == self._rows - 1]

    def forget_past(self) -> None:
        """Nothing is kept that following goes on without; `finish` and `times_s` then know of what came after."""
        self._ended.clear()
        del self.times_s[:]
        for face in self.alive:
            face.forget_past()

    def finish(self) -> list[Face]:
        return self._ended + self.alive

    def _cut(self, picture: np.ndarray) -> bool:
        small, before = reduced(picture, (32, 32)).astype(np.int16), self._small
        self._small = small
        return before is not None and bool(np.abs(small - before).mean() > CUT_LEVELS)

    def _due(self, cut: bool) -> bool:
        self._since += 1
        if cut or self._since >= self._every:
            self._since = 0
        return not self._since

    def _flow(self, picture: np.ndarray, row: int) -> list[np.ndarray | None]:
        """Where the pixels say each of the living is now; None of whom they do not."""
        before = self._last if self._every > 1 else None
        return [
            None if before is None or face.rows[-1] != row - 1 else flow(before, picture, face.now)
            for face in self.alive
        ]

    def _link(
        self,
        row: int,
        time_s: float,
        picture: np.ndarray,
        faces: np.ndarray,
        guesses: list[np.ndarray | None],
    ) -> None:
        """Every detection given to one face: one it overlaps, else one that was hidden near by, else a new one."""
        lost = [time_s - f.last_s > LOST_S for f in self.alive]
        for face in (f for f, gone in zip(self.alive, lost, strict=True) if gone):
            face.forget()
            self._ended.append(face)
        self.alive = [f for f, gone in zip(self.alive, lost, strict=True) if not gone]
        guesses = [g for g, gone in zip(guesses, lost, strict=True) if not gone]
        looks = [_look(picture, face) for face in faces]
        new, left = set(range(len(faces))), set(range(len(self.alive)))
        if left and new:
            like = np.array([[_likeness(f.look, look) for look in looks] for f in self.alive])
            for fit in (self._overlaps(time_s, faces, guesses, like), self._near(time_s, faces, like)):
                fit[[i for i in range(len(fit)) if i not in left]] = -np.inf
                fit[:, [j for j in range(len(faces)) if j not in new]] = -np.inf
                for i, j in _best_pairs(fit):
                    self.alive[i].confirm(row, faces[j], guesses[i], looks[j], time_s)
                    left.discard(i)
                    new.discard(j)
        for i in left:
            self.alive[i].forget()
        for j in sorted(new):
            self.alive.append(Face())
            self.alive[-1].confirm(row, faces[j], None, looks[j], time_s)

    def _overlaps(
        self, time_s: float, faces: np.ndarray, guesses: list[np.ndarray | None], like: np.ndarray
    ) -> np.ndarray:
        there = [
            f.foreseen(time_s) if g is None else g[BOX] for f, g in zip(self.alive, guesses, strict=True)
        ]
        fit = overlap_of(np.stack(there), faces[:, BOX])
        return np.where(fit >= LINK_IOU, fit + LOOK_WEIGHS * like, -np.inf)

    def _near(self, time_s: float, faces: np.ndarray, like: np.ndarray) -> np.ndarray:
        there = np.stack([f.foreseen(time_s, LOST_S) for f in self.alive])
        size, new = (b[:, 2] - b[:, 0] for b in (there, faces[:, BOX]))
        middle, now = ((b[:, :2] + b[:, 2:4]) / 2 for b in (there, faces[:, BOX]))
        size = np.maximum(size, 1)
        away = np.linalg.norm(middle[:, None] - now, axis=2) / size[:, None]
        ratio = np.abs(np.log(new / size[:, None]))
        good = (away <= REACH) & (ratio <= np.log(1 + REACH)) & (like >= LIKE)
        return np.where(good, like - away, -np.inf)


def _best_pairs(fit: np.ndarray) -> Iterator[tuple[int, int]]:
    """(i, j) of the greatest values above -inf, each row and column once; changes `fit`."""
    while fit.max() > -np.inf:
        i, j = divmod(int(fit.argmax()), fit.shape[1])
        yield i, j
        fit[i], fit[:, j] = -np.inf, -np.inf


def _unit(look: np.ndarray) -> np.ndarray:
    return look / max(float(np.linalg.norm(look)), 1e-6)


def _look(picture: np.ndarray, face: np.ndarray) -> np.ndarray:
    """(LOOK_PX * LOOK_PX,): the aligned face, small and grey, without its brightness and contrast."""
    try:
        grey = align(picture, face[POINTS], LOOK_PX).mean(axis=2).ravel()
    except ValueError:  # points that coincide
        return np.zeros(LOOK_PX * LOOK_PX)
    return _unit(grey - grey.mean())


def _likeness(before: np.ndarray | None, now: np.ndarray) -> float:
    return 0.0 if before is None else float(before @ now)


def flow(before: np.ndarray, now: np.ndarray, face: np.ndarray) -> np.ndarray | None:
    """(15,): the face (15,) of the frame before, moved, turned and scaled as its pixels are now; None if they are lost.

    Pyramidal Lucas-Kanade (Bouguet 2000) on a grid of points in the box, forward and back (Kalal et al. 2010); the
    similarity that fits those that return, twice, the second time without the worse half.
    """
    import cv2

    if before.shape != now.shape or not np.isfinite(face).all():
        return None
    x0, y0, x1, y1 = face[BOX]
    side = max(x1 - x0, y1 - y0)
    low = np.floor(np.maximum([x0 - side / 2, y0 - side / 2], 0)).astype(int)
    high = np.ceil(np.minimum([x1 + side / 2, y1 + side / 2], before.shape[1::-1])).astype(int)
    if side < 4 or (high - low < 8).any():
        return None
    scale = min(1.0, FLOW_PX / side)
    size = tuple(np.maximum(np.round((high - low) * scale), 8).astype(int).tolist())
    zoom = np.array(size) / (high - low)
    first, second = (
        cv2.cvtColor(reduced(f[low[1] : high[1], low[0] : high[0]], size), cv2.COLOR_RGB2GRAY)
        for f in (before, now)
    )
    u, v = np.meshgrid(*[np.linspace(0.1, 0.9, FLOW_GRID)] * 2)
    grid = np.stack([x0 + u.ravel() * (x1 - x0), y0 + v.ravel() * (y1 - y0)], axis=1)
    start = ((grid - low + 0.5) * zoom - 0.5).astype(np.float32)
    window = (FLOW_WINDOW, FLOW_WINDOW)
    room = np.empty_like(start)
    end, there, _ = cv2.calcOpticalFlowPyrLK(first, second, start, room, winSize=window, maxLevel=FLOW_LEVELS)
    room = np.empty_like(start)
    back, again, _ = cv2.calcOpticalFlowPyrLK(second, first, end, room, winSize=window, maxLevel=FLOW_LEVELS)
    good = (np.asarray(there) & np.asarray(again)).ravel().astype(bool) & (
        np.linalg.norm(back - start, axis=1) < FLOW_BACK_PX
    )
    if good.sum() < FLOW_LEAST * len(grid):
        return None
    moved = (end + 0.5) / zoom - 0.5 + low
    matrix = similarity(grid[good], moved[good])
    off = np.linalg.norm(grid @ matrix[:, :2].T + matrix[:, 2] - moved, axis=1)
    good &= off <= np.median(off[good])
    matrix = similarity(grid[good], moved[good])
    return _carried(face, matrix)


def _carried(face: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """(15,): a face after a similarity; the box stays upright."""
    out = np.array(face, np.float64)
    out[POINTS] = (face[POINTS].reshape(5, 2) @ matrix[:, :2].T + matrix[:, 2]).ravel()
    middle = (face[:2] + face[2:4]) / 2 @ matrix[:, :2].T + matrix[:, 2]
    half = (face[2:4] - face[:2]) / 2 * np.sqrt(np.linalg.det(matrix[:, :2]))
    out[:2], out[2:4] = middle - half, middle + half
    return out
