"""Faces in pictures: found by MTCNN with their five points, and aligned to the ArcFace template."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import VacliError

if TYPE_CHECKING:
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

    def recipe(self) -> dict[str, Any]:
        """All that decides what is found, as plain JSON."""
        return {
            "name": "mtcnn",
            "weights_sha256": self.weights_sha256,
            "dtype": "float32",
            "thresholds": list(THRESHOLDS),
            "overlaps": list(OVERLAPS),
            "pyramid": PYRAMID,
            "min_face": {"px": MIN_FACE_PX, "of_shorter_side": MIN_FACE},
        }

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
        pictures = np.stack([reduced(picture, size) for picture in source])
        if source is frames:
            source = pictures
        yield np.array([size[0] / width, size[1] / height] * 2), pictures
        scale *= PYRAMID


def reduced(picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
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
    clash = overlap_of(boxes[order], boxes[order], over) > overlap
    if within is not None:
        clash &= within[order][:, None] == within[order]
    stays = np.ones(len(order), bool)
    for i in range(len(order)):
        if stays[i]:
            stays[i + 1 :] &= ~clash[i, i + 1 :]
    return order[stays]


def overlap_of(a: np.ndarray, b: np.ndarray, over: str = "union") -> np.ndarray:
    """(N, M): what boxes a (N, 4) share with boxes b (M, 4), in parts of their union or of the smaller one."""
    low, high = np.maximum(a[:, None, :2], b[None, :, :2]), np.minimum(a[:, None, 2:], b[None, :, 2:])
    shared = np.maximum(high - low, 0).prod(axis=2)
    area_a, area_b = (np.maximum(x[:, 2:4] - x[:, :2], 0).prod(axis=1) for x in (a, b))
    whole = area_a[:, None] + area_b - shared if over == "union" else np.minimum(area_a[:, None], area_b)
    return shared / np.maximum(whole, 1e-9)
