"""Smoothing of a curve over time: a box or a Gaussian, in seconds, right for any frame rate."""

from __future__ import annotations

import math
from typing import Any, Literal, TypedDict

import numpy as np

from .. import VacliError


class Kernel(TypedDict):
    """kind: "box", the mean of all rows within half_s; "gauss", nearly a Gaussian of deviation half_s / 3.

    half_s: how far a row looks to either side, in seconds; 0 leaves it as it is.
    """

    kind: Literal["box", "gauss"]
    half_s: float


Smoothing = dict[str, Kernel]  # "valence" and "arousal": as a run's run.json has it, under "smoothing"

TARGETS = ("valence", "arousal")
AS_IT_IS: Kernel = {"kind": "box", "half_s": 0.0}
# the published baseline's best is a box of +-50 frames, 1.7 s; a Gaussian as wide as a box reaches 1.7 times as far
CHOICES: tuple[Kernel, ...] = (
    AS_IT_IS,
    *(Kernel(kind="box", half_s=half_s) for half_s in (0.2, 0.4, 0.8, 1.6, 3.2)),
    *(Kernel(kind="gauss", half_s=half_s) for half_s in (0.4, 0.8, 1.6, 3.2, 6.4)),
)

_SLACK_S = 1e-9  # a row just at the edge is within it, whatever rounding did to the times


def smoothed(values: np.ndarray, times_s: np.ndarray, kernel: Kernel) -> np.ndarray:
    """values (T, K) at times_s (T,), every row a mean of those within reach: (T, K) float64.

    A box is a difference of running sums. A Gaussian is the box of a third of the reach three times over (Wells,
    "Efficient synthesis of Gaussian filters by cascaded uniform filters", PAMI 1986): off by at most 7 % of its peak,
    and as cheap for any reach. Rows far from all others stay as they are.
    """
    values = np.asarray(values, np.float64)
    if not kernel["half_s"] or not len(values):
        return values
    passes = 3 if kernel["kind"] == "gauss" else 1
    reach_s = kernel["half_s"] / passes + _SLACK_S
    low = np.searchsorted(times_s, times_s - reach_s)
    high = np.searchsorted(times_s, times_s + reach_s, side="right")
    share = 1 / (high - low)[:, None]
    sums = np.zeros((len(values) + 1, values.shape[1]))
    for _ in range(passes):
        np.cumsum(values, axis=0, out=sums[1:])
        values = (sums[high] - sums[low]) * share
    return values


def check_smoothing(found: Any, where: str) -> Smoothing:
    """The smoothing of a run.json. Raises VacliError for what is none."""
    try:
        smoothing: Smoothing = {
            target: {"kind": found[target]["kind"], "half_s": float(found[target]["half_s"])}
            for target in TARGETS
        }
    except (KeyError, TypeError, ValueError):
        smoothing = {}
    odd = [
        k for k in smoothing.values() if k["kind"] not in ("box", "gauss") or not 0 <= k["half_s"] < math.inf
    ]
    if odd or not smoothing:
        raise VacliError(
            f"{where}: smoothing is {str(found)[:80]}; wanted for valence and arousal a kind (box, gauss) and half_s; "
            "train the run again"
        )
    return smoothing


def in_words(smoothing: Smoothing) -> str:
    """As valence box +-0.8 s, arousal none."""
    parts = []
    for target in TARGETS:
        kernel = smoothing[target]
        parts.append(
            f"{target} {kernel['kind']} +-{kernel['half_s']:g} s" if kernel["half_s"] else f"{target} none"
        )
    return ", ".join(parts)
