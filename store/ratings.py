"""Valence and arousal as others rated them: which columns, on which scale, and the mean of several raters."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .. import VacliError
from .labels import UNLABELLED
from .tables import Table, shown

# Shape legend: T rows of time, R raters.

TARGETS = ("valence", "arousal")
_NO_RATERS = {
    "mean",
    "avg",
    "average",
    "median",
    "std",
    "sd",
    "var",
    "se",
    "sem",
    "ci",
    "min",
    "max",
    "count",
    "n",
}
_NO_RATERS |= {"pos", "neg", "positive", "negative", "confidence"}


def rater_columns(table: Table, columns: Sequence[str], chosen: bool) -> list[list[str]]:
    """For each rater the columns of valence and arousal (or the one array (T, 2) that holds both, in that order).

    columns: those to choose from, in order; chosen: the user named them. `valence` and `arousal` are found by name,
    in any case; else as `valence_1`, `r2_arousal`, ... of several raters. Two columns without such names are taken
    in their order where the file has no names, or the user named just them. Raises VacliError.
    """
    exact = {name.lower(): name for name in columns}
    if all(target in exact for target in TARGETS):
        return [[exact[target] for target in TARGETS]]
    of: dict[str, dict[str, str]] = {}
    for name in columns:
        words = re.findall("|".join(TARGETS), name.lower())
        if len(words) == 1:
            before, _, after = name.lower().partition(words[0])
            of.setdefault("_".join(filter(None, (before.strip(" _.-/"), after.strip(" _.-/")))), {})[
                words[0]
            ] = name
    if of:
        return _complete(table, of)
    unnamed = not table.headed or not table.columns
    if columns and (unnamed or chosen):
        return [list(columns)]
    raise VacliError(
        f"{table.path}: no columns valence and arousal among {shown(columns)}; choose the two with --columns a,b"
    )


def _complete(table: Table, of: dict[str, dict[str, str]]) -> list[list[str]]:
    odd = [name for pair in of.values() if len(pair) != len(TARGETS) for name in pair.values()]
    if len(of) > 1:
        odd += [pair["valence"] for rater, pair in of.items() if "valence" in pair and rater in _NO_RATERS]
    if odd:
        raise VacliError(
            f"{table.path}: {shown(odd)}: these are not valence and arousal of a rater; "
            "choose the columns with --columns a,b,..."
        )
    return [[pair[target] for target in TARGETS] for _, pair in sorted(of.items())]


def scale_of(text: str | None) -> tuple[float, float] | None:
    """The ends of "1..9". Raises VacliError."""
    if text is None:
        return None
    try:
        low, high = map(float, text.split(".."))
    except ValueError:
        low = high = np.nan
    if not (np.isfinite([low, high]).all() and low < high):
        raise VacliError(f"--scale {text}: wanted LOW..HIGH, the lower end first, as 1..9 or -1000..1000")
    return low, high


def on_scale(table: Table, values: np.ndarray, scale: tuple[float, float] | None) -> np.ndarray:
    """Labels (T, 2 R) of `scale` as ones of [-1, 1], float64. NaN stays; without a scale -5 is unlabelled too.

    Raises VacliError that names the first row with a label outside the scale.
    """
    low, high = scale or (-1.0, 1.0)
    values = values.astype(np.float64)
    if scale is None:
        values[values == UNLABELLED] = np.nan
    slack = 1e-6 * (high - low)  # of numbers that were written with few digits
    outside = (values < low - slack) | (values > high + slack)
    if outside.any():
        row, column = np.argwhere(outside)[0]
        mend = "mend the file, or give its scale with --scale LOW..HIGH"
        raise VacliError(
            f"{table.path} {table.row(row)}: the label {values[row, column]:g} lies outside {low:g}..{high:g}; {mend}"
        )
    return np.clip(values if scale is None else (values - low) * (2 / (high - low)) - 1, -1, 1)


def mean_of_raters(path: Path, parts: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """(times_s (T,), labels (T, 2)): at each time the mean of those who judged, NaN where nobody did.

    parts: (times_s, labels) of each rater. Times are the same if equal to the microsecond. Raises VacliError if the
    raters' clocks interleave instead of agreeing: then nothing would be averaged.
    """
    if len(parts) == 1:
        return parts[0]
    times_s = np.concatenate([t for t, _ in parts])
    ticks, first, row = np.unique(
        np.round(times_s * 1e6).astype(np.int64), return_index=True, return_inverse=True
    )
    steps = [float(np.median(np.diff(t))) for t, _ in parts if len(t) > 1]
    apart_s = np.diff(ticks) * 1e-6
    if steps and (max(steps) > 1.5 * min(steps) or (len(apart_s) and apart_s.min() < 0.5 * min(steps))):
        raise VacliError(
            f"{path}: its raters judged at different times (steps of {min(steps):g}..{max(steps):g} s, up to "
            f"{apart_s.min():g} s apart); put them on one clock, or give their rate with --times"
        )
    labels = np.concatenate([values for _, values in parts])
    judged = ~np.isnan(labels)
    total, count = np.zeros((len(ticks), 2)), np.zeros((len(ticks), 2))
    np.add.at(total, row, np.where(judged, labels, 0))
    np.add.at(count, row, judged)
    return times_s[first], np.where(count > 0, total / np.maximum(count, 1), np.nan)
