"""Faces in video: found by MTCNN, the main one followed from frame to frame, aligned to the ArcFace template."""

from __future__ import annotations

import hashlib
import importlib.util
from bisect import bisect_left
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import VacliError
from ..store.track import Track

if TYPE_CHECKING:
    from .media import Video
    from .mtcnn import Nets

# Where the two eyes, the nose and the corners of the mouth lie in an aligned crop of 112x112 pixels (InsightFace's
# ArcFace template, which Aff-Wild2's cropped_aligned uses too).
ARCFACE_112 = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]]
)

# MTCNN (Zhang et al. 2016, "Joint Face Detection and Alignment Using Multitask Cascaded Convolutional Networks").
PYRAMID = 0.709  # each level of the picture pyramid is this much smaller than the one before
THRESHOLDS = (0.6, 0.7, 0.7)  # scores that P-Net, R-Net and O-Net must exceed
# Overlap beyond which the weaker box goes: within a level, across levels, after R-Net; after O-Net, of the smaller box.
OVERLAPS = (0.5, 0.7, 0.7, 0.7)
CELL, STRIDE = 12, 2  # pixels: what one P-Net output sees, and the step to the next
SIDES = (24, 48)  # input of R-Net and O-Net, pixels
FRAMES, CHUNK = 8, 64  # pictures and crops a pass: what stays in the processor's cache
MIN_FACE_PX, MIN_FACE = 20, 0.1  # smaller faces (pixels, or part of the shorter side) are not looked for

Owned = tuple[np.ndarray, np.ndarray]  # for each of N rows its frame, (N,) int; the rows themselves

# Following.
LINK_IOU = 0.4  # a detection belongs to a track if it overlaps the place foreseen by this much
COAST_S = 0.1  # a face is foreseen to go on as before for this long, then to stay
LOST_S = 0.5  # a track unseen for longer has ended
MIN_ROWS = 3  # a track seen less often is a false alarm
CUT_LEVELS = 16.0  # between frames whose mean difference at 32x32, in 8-bit levels, is larger lies a cut


def similarity(points: np.ndarray, template: np.ndarray) -> np.ndarray:
    """(2, 3) float64: the least-squares rotation, scale and shift that take points (N, 2) to template (N, 2).

    In complex numbers it is a straight line fit q = a p + b (Umeyama 1991 without reflections). Raises ValueError where
    all points coincide.
    """
    p, q = (np.asarray(xy, np.float64) @ [1, 1j] for xy in (points, template))
    spread = p - p.mean()
    if not np.any(spread):
        raise ValueError(f"points must not all coincide, got {points}")
    a = np.vdot(spread, q - q.mean()) / np.vdot(spread, spread)
    b = q.mean() - a * p.mean()
    return np.array([[a.real, -a.imag, b.real], [a.imag, a.real, b.imag]])


def align(frame_rgb: np.ndarray, points: np.ndarray, size: int = 112) -> np.ndarray:
    """(size, size, 3) uint8: the face turned, scaled and shifted to the ArcFace template; black outside the frame.

    points: the five points, (5, 2) or (10,), as in a row of the `faces` track. Bilinear.
    """
    import cv2

    matrix = similarity(np.reshape(points, (5, 2)), ARCFACE_112 * (size / 112))
    return cv2.warpAffine(frame_rgb, matrix, (size, size), flags=cv2.INTER_LINEAR, borderValue=0)


class Detector:
    """MTCNN on the CPU, with the weights that lie in the `mtcnn` wheel; nothing heavy is loaded before the first frame.

    Raises VacliError where the wheel is missing.
    """

    def __init__(self) -> None:
        self._files = _weights()
        self.weights_sha256 = hashlib.sha256(b"".join(file.read_bytes() for file in self._files)).hexdigest()

    @cached_property
    def _nets(self) -> Nets:
        from .mtcnn import Nets

        return Nets(self._files)

    def __call__(self, frames: np.ndarray) -> list[np.ndarray]:
        """frames (B, H, W, 3) uint8 RGB -> for each the faces (n, 15) float32, best first.

        Columns, in pixels of the frame: box x0, y0, x1, y1; x, y of left eye, right eye, nose, left and right corner
        of the mouth as seen in the picture; then the score.
        """
        found: list[np.ndarray] = []
        for some in (frames[i : i + FRAMES] for i in range(0, len(frames), FRAMES)):
            owner, boxes = self._propose(some)
            owner, boxes = self._refine(some, owner, boxes)
            owner, faces = self._finish(some, owner, boxes)
            found += [faces[owner == i] for i in range(len(some))]
        return found

    def _propose(self, frames: np.ndarray) -> Owned:
        """P-Net over the pyramids of all frames -> owner (N,), square boxes (N, 4)."""
        owners, found = [], []
        for level, (scale, pictures) in enumerate(_pyramid(frames)):
            score, moves = self._nets.pnet(pictures)
            b, y, x = np.nonzero(score > THRESHOLDS[0])
            corner = np.stack([x, y], axis=1) * STRIDE
            boxes = np.concatenate([corner, corner + CELL], axis=1) / scale
            levels = np.full((len(b), 1), level)
            owners.append(b)
            found.append(np.concatenate([boxes, score[b, y, x, None], levels, moves[b, :, y, x]], axis=1))
        if not found:
            return np.empty(0, int), np.empty((0, 4))
        owner, rows = np.concatenate(owners), np.concatenate(found)
        owner, rows = _per_frame(owner, rows, lambda r: _keep(r[:, :4], r[:, 4], OVERLAPS[0], within=r[:, 5]))
        owner, rows = _per_frame(owner, rows, lambda r: _keep(r[:, :4], r[:, 4], OVERLAPS[1]))
        return owner, _square(_moved(rows[:, :4], rows[:, 6:]))

    def _refine(self, frames: np.ndarray, owner: np.ndarray, boxes: np.ndarray) -> Owned:
        """R-Net over all proposals of the batch -> owner (N,), square boxes (N, 4)."""
        score, moves = _chunked(self._nets.rnet, frames, owner, boxes, SIDES[0])
        good = score > THRESHOLDS[1]
        rows = np.concatenate([_moved(boxes[good], moves[good]), score[good, None]], axis=1)
        owner, rows = _per_frame(owner[good], rows, lambda r: _keep(r[:, :4], r[:, 4], OVERLAPS[2]))
        return owner, _square(rows[:, :4])

    def _finish(self, frames: np.ndarray, owner: np.ndarray, boxes: np.ndarray) -> Owned:
        """O-Net over what is left -> owner (N,), faces (N, 15) float32."""
        score, moves, points = _chunked(self._nets.onet, frames, owner, boxes, SIDES[1])
        good = score > THRESHOLDS[2]
        boxes, side = boxes[good], (boxes[good, 2] - boxes[good, 0])[:, None]
        x, y = boxes[:, :1] + side * points[good, :5], boxes[:, 1:2] + side * points[good, 5:]
        five = np.stack([x, y], axis=2).reshape(-1, 10)
        rows = np.concatenate([_moved(boxes, moves[good]), five, score[good, None]], axis=1)
        owner, rows = _per_frame(
            owner[good], rows, lambda r: _keep(r[:, :4], r[:, 14], OVERLAPS[3], over="smaller")
        )
        return owner, rows.astype(np.float32)


def _weights() -> list[Path]:
    """The files of the three nets' weights, which the wheel carries."""
    spec = importlib.util.find_spec("mtcnn")  # found, not imported
    places = list(spec.submodule_search_locations or []) if spec else []
    nets = ("pnet", "rnet", "onet")
    files = [Path(place) / "assets" / "weights" / f"{net}.lz4" for place in places for net in nets]
    if len(files) != 3 or not all(file.is_file() for file in files):
        raise VacliError(
            "the face detector's weights are missing; wanted the mtcnn 1.0 wheel; pip install mtcnn==1.0.0"
        )
    return files


def _pyramid(frames: np.ndarray) -> Iterable[tuple[np.ndarray, np.ndarray]]:
    """Each level's scale (x, y, x, y) and pictures (B, h, w, 3); all levels are made from the first, which is small."""
    height, width = frames.shape[1:3]
    scale, source = CELL / max(MIN_FACE_PX, MIN_FACE * min(height, width)), frames
    while min(height, width) * scale >= CELL:
        size = (int(np.ceil(width * scale)), int(np.ceil(height * scale)))
        pictures = np.stack([_reduced(picture, size) for picture in source])
        if source is frames:
            source = pictures
        yield np.array([size[0] / width, size[1] / height] * 2), pictures
        scale *= PYRAMID


def _reduced(picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The picture averaged down to size (width, height); by halves first, which is up to 6x faster."""
    import cv2

    while picture.shape[0] >= 2 * size[1] and picture.shape[1] >= 2 * size[0]:
        half = (picture.shape[1] // 2, picture.shape[0] // 2)
        picture = cv2.resize(picture, half, interpolation=cv2.INTER_AREA)
    return cv2.resize(picture, size, interpolation=cv2.INTER_AREA)


def _chunked(
    net: Callable[[np.ndarray], tuple[np.ndarray, ...]],
    frames: np.ndarray,
    owner: np.ndarray,
    boxes: np.ndarray,
    side: int,
) -> list[np.ndarray]:
    """A net's outputs for every box, CHUNK crops of side x side pixels at a time."""
    parts = []
    for i in range(0, max(len(boxes), 1), CHUNK):
        some = zip(owner[i : i + CHUNK], boxes[i : i + CHUNK], strict=True)
        crops = np.array([_crop(frames[o], box, side) for o, box in some], np.uint8)
        parts.append(net(crops.reshape(-1, side, side, 3)))
    return [np.concatenate(part) for part in zip(*parts, strict=True)]


def _crop(frame: np.ndarray, box: np.ndarray, side: int) -> np.ndarray:
    """(side, side, 3): the whole-pixel box of the frame, averaged down; black where it leaves the frame."""
    import cv2

    x0, y0, x1, y1 = box.astype(int).tolist()
    inside = frame[max(y0, 0) : max(y1, 0), max(x0, 0) : max(x1, 0)]
    if inside.shape[0] != y1 - y0 or inside.shape[1] != x1 - x0:
        top, left = max(-y0, 0), max(-x0, 0)
        padded = np.zeros((y1 - y0, x1 - x0, 3), np.uint8)
        padded[top : top + inside.shape[0], left : left + inside.shape[1]] = inside
        inside = padded
    return cv2.resize(inside, (side, side), interpolation=cv2.INTER_AREA)


def _moved(boxes: np.ndarray, moves: np.ndarray) -> np.ndarray:
    """Boxes (N, 4) with each edge moved by the net's regression, in parts of the box."""
    size = boxes[:, 2:] - boxes[:, :2]
    return boxes + moves * np.concatenate([size, size], axis=1)


def _square(boxes: np.ndarray) -> np.ndarray:
    """The squares around boxes (N, 4) with the same middle, on whole pixels."""
    middle, side = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]).max(axis=1, keepdims=True)
    corner = np.round(middle - side / 2)
    return np.concatenate([corner, corner + np.maximum(np.round(side), 1)], axis=1)


def _per_frame(owner: np.ndarray, rows: np.ndarray, keep: Callable[[np.ndarray], np.ndarray]) -> Owned:
    """Each frame's rows thinned by `keep`, which gives the indices of those that stay."""
    kept = [np.empty(0, int)]
    for i in np.unique(owner):
        mine = np.flatnonzero(owner == i)
        kept.append(mine[keep(rows[mine])])
    index = np.concatenate(kept)
    return owner[index], rows[index]


def _keep(
    boxes: np.ndarray,
    score: np.ndarray,
    overlap: float,
    over: str = "union",
    within: np.ndarray | None = None,
) -> np.ndarray:
    """Non-maximum suppression: indices, best first, of boxes (N, 4) that overlap no better one by more than `overlap`.

    Overlap is measured in parts of the union or of the smaller box; boxes with different `within` do not compete.
    """
    order = np.argsort(-score, kind="stable")
    clash = _overlap(boxes[order], boxes[order], over) > overlap
    if within is not None:
        clash &= within[order][:, None] == within[order]
    stays = np.ones(len(order), bool)
    for i in range(len(order)):
        if stays[i]:
            stays[i + 1 :] &= ~clash[i, i + 1 :]
    return order[stays]


def _overlap(a: np.ndarray, b: np.ndarray, over: str = "union") -> np.ndarray:
    """(N, M): what boxes a (N, 4) share with boxes b (M, 4), in parts of their union or of the smaller one."""
    low, high = np.maximum(a[:, None, :2], b[None, :, :2]), np.minimum(a[:, None, 2:], b[None, :, 2:])
    shared = np.maximum(high - low, 0).prod(axis=2)
    area_a, area_b = (np.maximum(x[:, 2:4] - x[:, :2], 0).prod(axis=1) for x in (a, b))
    whole = area_a[:, None] + area_b - shared if over == "union" else np.minimum(area_a[:, None], area_b)
    return shared / np.maximum(whole, 1e-9)


@dataclass
class _Person:
    """One face through the frames."""

    rows: list[int] = field(default_factory=list)
    faces: list[np.ndarray] = field(default_factory=list)
    last_s: float = 0.0
    speed: np.ndarray = field(default_factory=lambda: np.zeros(4))  # of the edges, pixels a second, smoothed

    def add(self, row: int, face: np.ndarray, time_s: float) -> None:
        if self.rows:
            now = (face[:4] - self.faces[-1][:4]) / max(
                time_s - self.last_s, 0.01
            )  # times may be nudged ones
            self.speed = 0.5 * self.speed + 0.5 * now
        self.rows.append(row)
        self.faces.append(face)
        self.last_s = time_s

    def foreseen(self, time_s: float) -> np.ndarray:
        """(4,): where the box should be now."""
        return self.faces[-1][:4] + self.speed * min(time_s - self.last_s, COAST_S)

    @property
    def weight(self) -> float:
        """Area times score, summed over the rows: large, sure and long."""
        faces = np.stack(self.faces).astype(np.float64)
        return float(((faces[:, 2] - faces[:, 0]) * (faces[:, 3] - faces[:, 1]) * faces[:, 14]).sum())


def follow(detections: list[np.ndarray], times_s: np.ndarray, cuts: np.ndarray | None = None) -> np.ndarray:
    """The main face through the video: (T, 15) float32, a row of NaN where it is not seen.

    detections: for each of the T frames the faces (n, 15) that `Detector` found; times_s: (T,) strictly increasing;
    cuts: (T,) bool, True where a frame follows a cut: nobody is followed across one.

    Faces are linked from frame to frame by the overlap with the place foreseen. Of all ways to have one person at a
    time, the one of greatest weight (area x score, summed over rows) is taken. Others then take over in what is free,
    but only where most of their own time is: a bystander does not fill the main person's absences.
    """
    people = [p for p in _link(detections, times_s, cuts) if len(p.rows) >= min(MIN_ROWS, len(detections))]
    out = np.full((len(detections), 15), np.nan, np.float32)
    taken = np.zeros(len(detections), bool)
    for person in _in_turn(people) + sorted(people, key=lambda p: -p.weight):
        rows = np.array(person.rows)
        free = ~taken[rows]
        if 2 * free.sum() > len(rows):
            out[rows[free]] = np.stack(person.faces)[free]
            taken[rows[0] : rows[-1] + 1] = True
    return out


def _in_turn(people: list[_Person]) -> list[_Person]:
    """The people of greatest weight together of whom no two overlap in time (weighted interval scheduling)."""
    people = sorted(people, key=lambda p: p.rows[-1])
    ends = [p.rows[-1] for p in people]
    best: list[tuple[float, Any]] = [(0.0, ())]  # of the first i people: weight, (last, (last but one, ...))
    for i, person in enumerate(people):
        weight, before = best[bisect_left(ends, person.rows[0])]
        best.append(max(best[i], (weight + person.weight, (person, before)), key=lambda b: b[0]))
    chosen, chain = [], best[-1][1]
    while chain:
        person, chain = chain
        chosen.append(person)
    return chosen


def _link(detections: list[np.ndarray], times_s: np.ndarray, cuts: np.ndarray | None) -> list[_Person]:
    """Every detection given to one person; the best overlaps are served first."""
    people: list[_Person] = []
    alive: list[_Person] = []
    for row, (faces, time_s) in enumerate(zip(detections, times_s.tolist(), strict=True)):
        alive = [p for p in alive if time_s - p.last_s <= LOST_S and (cuts is None or not cuts[row])]
        new = set(range(len(faces)))
        if alive and len(faces):
            fit = _overlap(np.stack([p.foreseen(time_s) for p in alive]), faces[:, :4])
            while fit.max() >= LINK_IOU:
                i, j = divmod(int(fit.argmax()), fit.shape[1])
                alive[i].add(row, faces[j], time_s)
                new.discard(j)
                fit[i], fit[:, j] = 0, 0
        for j in sorted(new):
            person = _Person()
            person.add(row, faces[j], time_s)
            people.append(person)
            alive.append(person)
    return people


class Faces:
    """The `faces` track of a video: who is followed, where his five points are."""

    name = "faces"

    def __init__(self) -> None:
        self._detector = Detector()

    def recipe(self) -> dict[str, Any]:
        """All that decides the values, as plain JSON. A change to the code that moves them raises `version`."""
        return {
            "track": self.name,
            "version": 1,
            "detector": "mtcnn",
            "weights_sha256": self._detector.weights_sha256,
            "dtype": "float32",
            "thresholds": list(THRESHOLDS),
            "overlaps": list(OVERLAPS),
            "pyramid": PYRAMID,
            "min_face": {"px": MIN_FACE_PX, "of_shorter_side": MIN_FACE},
            "link_iou": LINK_IOU,
            "coast_s": COAST_S,
            "lost_s": LOST_S,
            "min_rows": MIN_ROWS,
            "cut_levels": CUT_LEVELS,
        }

    def __call__(self, video: Video, on_frames: Callable[[int], None] | None = None) -> Track:
        """(T, 15) float32, one row a decoded frame, NaN where nobody is seen; columns as `Detector` has them.

        `on_frames` is told how many frames were done since it was last called. Raises MediaError where no frame
        decodes.
        """
        detections: list[np.ndarray] = []
        times: list[np.ndarray] = []
        cuts: list[bool] = []
        before = None
        for rgb, times_s in video.frames():
            detections += self._detector(rgb)
            times.append(times_s)
            for picture in rgb:
                now = _reduced(picture, (32, 32)).astype(np.int16)
                cuts.append(before is not None and bool(np.abs(now - before).mean() > CUT_LEVELS))
                before = now
            if on_frames is not None:
                on_frames(len(rgb))
        if not times:
            from .media import MediaError

            raise MediaError(video.path, "no picture decodes; wanted a whole video; copy it again")
        times_s = np.concatenate(times)
        return Track(follow(detections, times_s, np.array(cuts)), times_s)
