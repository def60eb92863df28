"""A Track: rows of values, each with its time; what every stage of vacli hands to the next."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

_BLOCK_VALUES = 2**16  # looked at at once: what stays in the processor's cache


@dataclass(frozen=True, eq=False)
class Track:
    """Values with their times; refuses nonsense when it is made.

    Shape legend: T rows of time, D dims, K tokens a row, N asked-for times.

    values:  (T, D) or (T, K, D), float16 or float32. A row of NaN means nothing was seen there: no face,
             no sound, no label. A partly-NaN row or an infinity is refused.
    times_s: (T,) float64, strictly increasing: the middle of what each row saw, in seconds from the start
             of the medium.

    Raises ValueError naming what is wrong.
    """

    values: np.ndarray
    times_s: np.ndarray

    def __post_init__(self) -> None:
        values, times_s = np.asarray(self.values), np.asarray(self.times_s)
        if values.dtype not in (np.float16, np.float32):
            raise ValueError(f"values must be float16 or float32, got {values.dtype}")
        if values.ndim not in (2, 3) or 0 in values.shape[1:]:
            raise ValueError(
                f"values must be (T, D) or (T, K, D) with D and K at least 1, got {values.shape}"
            )
        check_times(times_s, len(values))
        check_rows(values)
        object.__setattr__(self, "values", values)
        object.__setattr__(self, "times_s", times_s)

    @classmethod
    def trusted(cls, values: np.ndarray, times_s: np.ndarray) -> Track:
        """A Track of arrays whose checksums say that a Track they were: their rows are not looked at again."""
        track = object.__new__(cls)
        object.__setattr__(track, "values", values)
        object.__setattr__(track, "times_s", times_s)
        return track

    def __len__(self) -> int:
        return len(self.times_s)

    def __getitem__(self, rows: slice) -> Track:
        return Track(self.values[rows], self.times_s[rows])

    def __repr__(self) -> str:
        span = f"{self.times_s[0]:.3f}..{self.times_s[-1]:.3f} s" if len(self) else "empty"
        return f"Track({self.values.shape} {self.values.dtype}, {span}, {int(self.valid.sum())} valid)"

    @property
    def valid(self) -> np.ndarray:
        """(T,) bool: rows where something was seen."""
        return ~np.isnan(_flat(self.values)[:, 0])

    def at(self, times_s: np.ndarray, reach_s: float | None = None) -> np.ndarray:
        """The values on another clock; the one place where two clocks meet.

        Each asked-for time owns the stretch halfway to its neighbours. The valid rows inside it are averaged
        (a 100 Hz track read at 25 Hz); where there is none, the nearest valid row within `reach_s` stands in
        (a 1 Hz track read at 25 Hz); beyond reach the row is NaN, never a guess. `reach_s` defaults to the
        track's own median step, so a hole in the track stays a hole.

        times_s: (N,) strictly increasing seconds. Returns (N, D) or (N, K, D) in the track's dtype.
        """
        times_s = np.asarray(times_s, dtype=np.float64)
        shape = (len(times_s), *self.values.shape[1:])
        valid = self.valid
        if not len(times_s) or not valid.any():
            return np.full(shape, np.nan, self.values.dtype)
        if len(self) == len(times_s) and np.array_equal(self.times_s, times_s):
            return self.values.copy()
        rows, clock = self.values[valid], self.times_s[valid]
        if reach_s is None:
            reach_s = float(np.median(np.diff(self.times_s))) if len(self) > 1 else np.inf
        out = _nearest(rows, clock, times_s, reach_s)
        low, high = _stretches(clock, times_s)
        many = high - low > 1  # with one row inside, the nearest row is that one or as near
        if many.any():
            out[many] = _means(rows, low[many], high[many])
        return out


def check_times(times_s: np.ndarray, rows: int) -> None:
    """Raises ValueError unless times_s are (rows,) float64, finite and strictly increasing."""
    if times_s.dtype != np.float64 or times_s.shape != (rows,):
        raise ValueError(
            f"times_s must be float64 ({rows},), one for each row, got {times_s.dtype} {times_s.shape}"
        )
    for start in range(0, rows, _BLOCK_VALUES):  # block by block: a stranger's store may claim a billion
        some = times_s[max(0, start - 1) : start + _BLOCK_VALUES]
        if not np.isfinite(some).all() or (np.diff(some) <= 0).any():
            raise ValueError("times_s must be finite and strictly increasing")


def check_rows(values: np.ndarray) -> None:
    """Raises ValueError for an infinity or a partly-NaN row in values (T, ...) of float16 or float32."""
    for odd in _not_finite(_flat(values)):
        if np.isinf(odd).any():
            raise ValueError("values hold an infinity; wanted finite rows, or NaN where nothing was seen")
        if not np.isnan(odd).all():
            raise ValueError("a row is partly NaN; wanted a whole row of NaN where nothing was seen")


def _not_finite(rows: np.ndarray) -> Iterator[np.ndarray]:
    """Those of (T, D) rows with a value whose exponent bits are all ones, block by block.

    np.isfinite takes ten times as long on float16.
    """
    half = rows.dtype.itemsize == 2
    bits = rows.view(np.uint16 if half else np.uint32)
    exponent = bits.dtype.type(0x7C00 if half else 0x7F800000)
    step = max(1, _BLOCK_VALUES // bits.shape[1])
    room = np.empty((min(step, len(bits)), bits.shape[1]), bits.dtype)
    for start in range(0, len(bits), step):
        some = bits[start : start + step]
        masked = np.bitwise_and(some, exponent, out=room[: len(some)])
        if masked.max() == exponent:  # rare: most blocks are finite throughout
            yield rows[start : start + step][(masked == exponent).any(axis=1)]


def _flat(values: np.ndarray) -> np.ndarray:
    return values.reshape(len(values), int(np.prod(values.shape[1:])))


def _stretches(clock: np.ndarray, times_s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each asked-for time the half-open range of rows nearer to it than to its neighbours."""
    if len(times_s) == 1:
        edges = np.array([times_s[0], times_s[0]])
    else:
        middles = (times_s[1:] + times_s[:-1]) / 2
        first, last = 2 * times_s[0] - middles[0], 2 * times_s[-1] - middles[-1]
        edges = np.concatenate([[first], middles, [last]])
    index = np.searchsorted(clock, edges, side="left")
    return index[:-1], index[1:]


def _nearest(rows: np.ndarray, clock: np.ndarray, times_s: np.ndarray, reach_s: float) -> np.ndarray:
    right = np.clip(np.searchsorted(clock, times_s), 0, len(clock) - 1)
    left = np.maximum(right - 1, 0)
    nearest = np.where(np.abs(times_s - clock[left]) <= np.abs(clock[right] - times_s), left, right)
    out = rows[nearest]  # a copy
    out[np.abs(clock[nearest] - times_s) > reach_s * (1 + 1e-9)] = np.nan
    return out


def _means(rows: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Mean of rows[low:high] for each pair; every range holds at least one row. Sums run in float64."""
    flat = _flat(rows).astype(np.float64)
    sums = np.concatenate([np.zeros((1, flat.shape[1])), np.cumsum(flat, axis=0)])
    means = (sums[high] - sums[low]) / (high - low)[:, None]
    return means.reshape(len(low), *rows.shape[1:]).astype(rows.dtype)
