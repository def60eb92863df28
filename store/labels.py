"""Annotations become Tracks, and CCC, the number everything here is judged by."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .. import VacliError
from .track import Track

UNLABELLED = -5.0  # Aff-Wild2's mark for a frame without a valid annotation
VA_RECIPE = {
    "track": "label.va",
    "version": 1,
    "rule": "line i after the header is frame i; -5 is unlabelled",
}


def read_va(path: Path, times_s: np.ndarray) -> Track:
    """Valence and arousal of an annotation file as a (T, 2) float32 track on the frames' times.

    The file's header names `valence` and `arousal`; line i after it belongs to frame i (Aff-Wild2). Where either
    value is -5, or the file ends before the frames do, the row is NaN; lines beyond the last frame are left out.
    Raises VacliError for what is no file (a pipe would be waited for), a missing header, text that is no number, or a
    label outside [-1, 1].
    """
    values = np.full((len(times_s), 2), np.nan, np.float32)
    try:
        if path.exists() and not path.is_file():
            raise OSError("it is no file")
        with open(path, newline="", encoding="utf-8-sig") as f:
            reader = csv.reader(f)
            columns = _columns(path, next(reader, []))
            for i, line in enumerate(reader):
                if i >= len(times_s):
                    break
                values[i] = _row(path, i + 2, line, columns)
    except (OSError, ValueError, csv.Error) as e:  # ValueError: bytes that are no text, a path that is none
        raise VacliError(
            f"cannot read the annotations {path}: {e}; wanted text under a header with valence,arousal"
        ) from e
    return Track(values, np.asarray(times_s, np.float64))


def _columns(path: Path, header: list[str]) -> tuple[int, int]:
    names = [name.strip().lower() for name in header]
    if "valence" not in names or "arousal" not in names:
        raise VacliError(
            f"{path}: its first line is {','.join(header)[:60]!r}; wanted a header with valence,arousal"
        )
    return names.index("valence"), names.index("arousal")


def _row(path: Path, number: int, line: list[str], columns: tuple[int, int]) -> tuple[float, float]:
    if not "".join(line).strip():
        return (np.nan, np.nan)
    try:
        pair = (float(line[columns[0]]), float(line[columns[1]]))
    except (ValueError, IndexError) as e:
        raise VacliError(f"{path} line {number}: {','.join(line)[:60]!r}; wanted two numbers") from e
    if UNLABELLED in pair or np.isnan(pair).any():
        return (np.nan, np.nan)
    if max(map(abs, pair)) > 1:
        raise VacliError(
            f"{path} line {number}: {pair} lies outside [-1, 1]; wanted labels in [-1, 1], or -5"
        )
    return pair


def ccc(x: Any, y: Any, weight: Any) -> Any:
    """Concordance correlation coefficient along the first axis, with population moments, as the challenge has it.

    x, y:   (N, K) arrays or tensors, finite everywhere. weight: (N, 1), 1 where the row counts and 0 where not.
    Returns (K,): 2 cov / (var_x + var_y + (mean_x - mean_y)^2), and 0 where that is undefined (no row counts, or
    both are constant; Mamba-VA, eq. 4). Of a column that never moves it is exactly 0, and so is the other's gradient.
    Numpy in, numpy out; torch in, gradient out: the loss is this, and the metric, which `Moments` takes from sums, is
    tested against it.
    """
    n = weight.sum(0)
    # from the first row that counts on: of a column that never moves the variance is 0, not what rounding leaves of it
    first = weight * (weight.cumsum(0) == 1)
    first_x, first_y = (first * x).sum(0), (first * y).sum(0)
    n = n + (n == 0)
    dx, dy = weight * (x - first_x), weight * (y - first_y)
    shift_x, shift_y = dx.sum(0) / n, dy.sum(0) / n
    dx, dy = dx - weight * shift_x, dy - weight * shift_y
    var_x, var_y, covariance = (dx * dx).sum(0) / n, (dy * dy).sum(0) / n, (dx * dy).sum(0) / n
    return _concordance(var_x, var_y, covariance, first_x - first_y + (shift_x - shift_y))


def _concordance(var_x: Any, var_y: Any, covariance: Any, shift: Any) -> Any:
    spread = var_x + var_y + shift**2
    return 2 * covariance / (spread + (spread == 0))


def mean_ccc(valence: Any, arousal: Any) -> Any:
    """The challenge's P_VA (Mamba-VA, eq. 3; USTC, eq. 16)."""
    return (valence + arousal) / 2


@dataclass(frozen=True)
class Moments:
    """What CCC needs to know of pairs of columns, in float64: of all rows at once, or of parts that are added up.

    Shape legend: K columns; V videos, where many moments are stacked; R resamplings of them.

    count: () or (V,) or (R,). mean_x, mean_y, and the sums of squares and products about them xx, yy, xy: (..., K).
    Kept about the means, they lose nothing to a large offset (Chan, Golub and LeVeque, "Algorithms for computing the
    sample variance", 1983, eq. 2.1).
    """

    count: np.ndarray
    mean_x: np.ndarray
    mean_y: np.ndarray
    xx: np.ndarray
    yy: np.ndarray
    xy: np.ndarray

    @classmethod
    def of(cls, x: np.ndarray, y: np.ndarray) -> Moments:
        """Of x and y (T, K), of the rows in which neither has a NaN."""
        x, y = np.asarray(x).T, np.asarray(y).T  # one column after the other: sums over short rows are slow
        valid = np.ones(x.shape[1], bool)
        for column in (*x, *y):
            valid &= ~np.isnan(column)
        n = np.count_nonzero(valid)
        if not n:
            return cls(np.array(0.0), *(np.zeros(len(x)) for _ in range(5)))
        dx, dy = x[:, valid].astype(np.float64), y[:, valid].astype(np.float64)
        # from the first row on: of a column that never moves the variance is 0, not what rounding leaves of it
        first_x, first_y = dx[:, 0].copy(), dy[:, 0].copy()
        dx -= first_x[:, None]
        dy -= first_y[:, None]
        shift_x, shift_y = dx.mean(axis=1), dy.mean(axis=1)
        dx -= shift_x[:, None]
        dy -= shift_y[:, None]
        sums = (np.vecdot(a, b) for a, b in ((dx, dx), (dy, dy), (dx, dy)))
        return cls(np.array(float(n)), first_x + shift_x, first_y + shift_y, *sums)

    @classmethod
    def stack(cls, parts: Sequence[Moments]) -> Moments:
        """Many moments (of one video each) as one with a leading axis."""
        fields = ("count", "mean_x", "mean_y", "xx", "yy", "xy")
        return cls(*(np.stack([getattr(part, field) for part in parts]) for field in fields))

    def __add__(self, other: Moments) -> Moments:
        """The moments of all rows of both."""
        n = self.count + other.count
        share = np.asarray(other.count / np.maximum(n, 1))[..., None]
        dx, dy = other.mean_x - self.mean_x, other.mean_y - self.mean_y
        weight = np.asarray(self.count)[..., None] * share
        # of an empty part the mean says nothing: with share 1 or 0 the other's stands as it is
        mean_x = np.where(share == 1, other.mean_x, self.mean_x + share * dx)
        mean_y = np.where(share == 1, other.mean_y, self.mean_y + share * dy)
        xx, yy = self.xx + other.xx + weight * dx * dx, self.yy + other.yy + weight * dy * dy
        return Moments(n, mean_x, mean_y, xx, yy, self.xy + other.xy + weight * dx * dy)

    def pooled(self, times: np.ndarray) -> Moments:
        """R resamplings at once of V stacked moments; times (R, V): how often each video is in each of them.

        The same as adding them one by one, as matrix products about the common mean.
        """
        n = times @ self.count
        share = self.count[:, None] / max(1.0, float(self.count.sum()))
        centre_x, centre_y = (share * self.mean_x).sum(axis=0), (share * self.mean_y).sum(axis=0)
        dx, dy, count = self.mean_x - centre_x, self.mean_y - centre_y, self.count[:, None]
        per_row = 1 / np.maximum(n, 1)[:, None]
        mean_x, mean_y = (times @ (count * dx)) * per_row, (times @ (count * dy)) * per_row

        def about(
            sums: np.ndarray, da: np.ndarray, db: np.ndarray, ma: np.ndarray, mb: np.ndarray
        ) -> np.ndarray:
            whole = times @ (sums + count * da * db)
            left = whole - n[:, None] * ma * mb
            return np.where(np.abs(left) <= 1e-12 * np.abs(whole), 0, left)  # no more than rounding is left

        sums = (
            about(self.xx, dx, dx, mean_x, mean_x),
            about(self.yy, dy, dy, mean_y, mean_y),
            about(self.xy, dx, dy, mean_x, mean_y),
        )
        return Moments(n, centre_x + mean_x, centre_y + mean_y, *sums)

    def ccc(self) -> np.ndarray:
        """(..., K); 0 where it is undefined."""
        n = np.maximum(self.count, 1)[..., None]
        return _concordance(self.xx / n, self.yy / n, self.xy / n, self.mean_x - self.mean_y)


def ccc_of_tracks(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """CCC (K,) over all valid rows of all videos concatenated; pairs are (predicted, labelled), each (T, K)."""
    first, *rest = (Moments.of(predicted, labelled) for predicted, labelled in pairs)
    return sum(rest, first).ccc()
