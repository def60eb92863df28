"""Aligned crops of one person: warped out of the frames of a video, or read as the data set brings them."""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil, floor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .. import VacliError
from ..store import Track
from .datasets import Sample
from .faces import ARCFACE_112, align, similarity

if TYPE_CHECKING:
    from .media import Picture

BATCH = 64
# So many frames, fewer if they have this many pixels, are decoded before their faces are cropped: right after a frame
# was decoded a crop takes up to three times as long, as nothing it needs is in the processor's caches.
HELD_FRAMES, HELD_PIXELS = 8, 2**24
CORNERS = (0, 111, 111j, 111 + 111j)  # x + iy of a crop's first and last pixels
MARGIN = 2  # pixels beyond the corners: the bilinear neighbours, and rounding
Crops = tuple[np.ndarray, np.ndarray]  # crops (n, H, W, 3) uint8 RGB, rows (n,): which frames they are of


def aligned(sample: Sample, faces: Track, wanted: np.ndarray | None = None) -> Iterator[Crops]:
    """Aligned crops (n, 112, 112, 3) of the followed face, in order, from the sample's video.

    faces: the `faces` track (T, 15). wanted: (T,) bool, the rows to be had; by default all with a face. Only what lies
    around a wanted face is made into RGB, which gives the same as `align` of the whole frame. Raises VacliError where
    the video has not as many frames as the track.
    """
    assert sample.video is not None
    wanted = faces.valid if wanted is None else faces.valid & wanted
    crops: list[np.ndarray] = []
    rows: list[int] = []
    for row, crop in _cropped(sample.video, faces.values[:, 4:14].reshape(-1, 5, 2), wanted):
        crops.append(crop)
        rows.append(row)
        if len(crops) == BATCH:
            yield np.stack(crops), np.array(rows)
            crops, rows = [], []
    if crops:
        yield np.stack(crops), np.array(rows)


def _cropped(video: Path, points: np.ndarray, wanted: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """The wanted rows with their crops; points (T, 5, 2), wanted (T,)."""
    from .media import Video

    held: list[tuple[int, Picture]] = []
    row = -1
    for row, picture in enumerate(Video(video).pictures()):
        if row < len(wanted) and wanted[row]:
            held.append((row, picture))
            if len(held) == HELD_FRAMES or len(held) * picture.shape[0] * picture.shape[1] >= HELD_PIXELS:
                yield from ((i, _crop(p, points[i])) for i, p in held)
                held = []
    if row + 1 != len(wanted):
        raise VacliError(f"{video} gave {row + 1} frames, but {len(wanted)} before: did it change? run again")
    yield from ((i, _crop(p, points[i])) for i, p in held)


def _crop(picture: Picture, points: np.ndarray) -> np.ndarray:
    return align(picture.rgb_within(_reach(points)), points)


def _reach(points: np.ndarray) -> tuple[int, int, int, int]:
    """x0, y0, x1, y1 in whole pixels: all of a picture that the crop of these points is made of.

    In complex numbers a similarity is q = a p + b, as in `similarity`.
    """
    (ax, _, bx), (ay, _, by) = similarity(points, ARCFACE_112).tolist()
    a, b = complex(ax, ay), complex(bx, by)
    places = [(corner - b) / a if a else 0j for corner in CORNERS]  # OpenCV too takes 0 where a is
    x, y = [place.real for place in places], [place.imag for place in places]
    left, top, right, bottom = floor(min(x)), floor(min(y)), ceil(max(x)) + 1, ceil(max(y)) + 1
    return left - MARGIN, top - MARGIN, right + MARGIN, bottom + MARGIN
