"""Aligned crops of one person: warped out of the frames of a video, or read as the data set brings them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from .. import VacliError
from ..store import Track
from .datasets import Sample
from .faces import align

BATCH = 64
Crops = tuple[np.ndarray, np.ndarray]  # crops (n, H, W, 3) uint8 RGB, rows (n,): which frames they are of


def aligned(sample: Sample, faces: Track, wanted: np.ndarray | None = None) -> Iterator[Crops]:
    """Aligned crops (n, 112, 112, 3) of the followed face, in order, from the sample's video.

    faces: the `faces` track (T, 15). wanted: (T,) bool, the rows to be had; by default all with a face. Raises
    VacliError where the video has not as many frames as the track.
    """
    from .media import Video

    assert sample.video is not None
    points = faces.values[:, 4:14].reshape(-1, 5, 2)
    wanted = faces.valid if wanted is None else faces.valid & wanted
    crops: list[np.ndarray] = []
    rows: list[int] = []
    row = 0
    for frames, _ in Video(sample.video).frames():
        for frame in frames:
            if row < len(faces) and wanted[row]:
                crops.append(align(frame, points[row]))
                rows.append(row)
            row += 1
            if len(crops) == BATCH:
                yield np.stack(crops), np.array(rows)
                crops, rows = [], []
    if row != len(faces):
        raise VacliError(
            f"{sample.video} gave {row} frames, but {len(faces)} before: did it change? run again"
        )
    if crops:
        yield np.stack(crops), np.array(rows)
