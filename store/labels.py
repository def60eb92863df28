"""Annotations become Tracks, and CCC, the number everything here is judged by."""

from __future__ import annotations

import csv
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
    Raises VacliError for a missing header, text that is no number, or a label outside [-1, 1].
    """
    values = np.full((len(times_s), 2), np.nan, np.float32)
    try:
        with open(path, newline="", encoding="utf-8-sig") as f:
            reader = csv.reader(f)
            columns = _columns(path, next(reader, []))
            for i, line in enumerate(reader):
                if i >= len(times_s):
                    break
                values[i] = _row(path, i + 2, line, columns)
    except (OSError, UnicodeDecodeError) as e:
        raise VacliError(f"cannot read the annotations {path}: {e}") from e
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
    both are constant). Numpy in, numpy out; torch in, gradient out: metric and loss are this one function.
    """
    n = weight.sum(0)
    n = n + (n == 0)
    mean_x, mean_y = (weight * x).sum(0) / n, (weight * y).sum(0) / n
    dx, dy = x - mean_x, y - mean_y
    var_x, var_y = (weight * dx * dx).sum(0) / n, (weight * dy * dy).sum(0) / n
    covariance = (weight * dx * dy).sum(0) / n
    spread = var_x + var_y + (mean_x - mean_y) ** 2
    return 2 * covariance / (spread + (spread == 0))


def ccc_of_tracks(pairs: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """CCC (K,) over all valid rows of all videos concatenated; pairs are (predicted, labelled), each (T, K)."""
    predicted = np.concatenate([p for p, _ in pairs]).astype(np.float64)
    labelled = np.concatenate([y for _, y in pairs]).astype(np.float64)
    valid = ~(np.isnan(predicted) | np.isnan(labelled)).any(axis=1)
    return ccc(predicted[valid], labelled[valid], np.ones((int(valid.sum()), 1)))
