"""A race: contenders run in turns, round after round, so that a busy machine slows them all alike."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Literal


@dataclass(frozen=True)
class Target:
    """What a contender is held to: a ratio or a rate of at least `bound`, or seconds of less than it.

    goal: wished for, not promised.
    """

    of: Literal["ratio", "seconds", "gb_per_s"]
    bound: float
    goal: bool = False


@dataclass(frozen=True)
class Contender:
    """One way to do the job of a race.

    run: what is timed. after: what is not (it puts things back, so that each round finds the same). right: after the
    first warm-up, whether the job was really done: a wrong answer has no speed.
    """

    name: str
    run: Callable[[], object]
    targets: tuple[Target, ...] = ()
    after: Callable[[], object] = lambda: None
    right: Callable[[], bool] = lambda: True


@dataclass(frozen=True)
class Result:
    """What a race gave. seconds: for each contender, of each round; the first contender is the plain twin."""

    title: str
    says: str
    contenders: tuple[Contender, ...]
    seconds: tuple[tuple[float, ...], ...]
    nbytes: int = 0

    def median_s(self, which: int) -> float:
        return median(self.seconds[which])

    def gb_per_s(self, which: int) -> float:
        return self.nbytes / self.median_s(which) / 1e9

    def ratio(self, which: int) -> float:
        """The median, over the rounds, of the twin's time / this one's: how many times as fast as the plain twin."""
        return median(self._ratios(which))

    def spread(self, which: int) -> tuple[float, float]:
        """The quartiles of what `ratio` is the median of."""
        low, _, high = quantiles(self._ratios(which), n=4, method="inclusive")
        return low, high

    def met(self, which: int, target: Target) -> bool:
        if target.of == "seconds":
            return self.median_s(which) < target.bound
        return (self.ratio(which) if target.of == "ratio" else self.gb_per_s(which)) >= target.bound

    def _ratios(self, which: int) -> list[float]:
        return [twin / own for twin, own in zip(self.seconds[0], self.seconds[which], strict=True)]


def race(title: str, says: str, contenders: list[Contender], rounds: int, nbytes: int = 0) -> Result:
    """Run them in turns, each round starting with another one; two rounds of warm-up are not counted."""
    seconds: list[list[float]] = [[] for _ in contenders]
    for number in range(-2, rounds):
        for turn in range(len(contenders)):
            which = (turn + number) % len(contenders)
            contender = contenders[which]
            began = time.perf_counter()
            contender.run()
            took_s = time.perf_counter() - began
            if number >= 0:
                seconds[which].append(took_s)
            elif number == -2:
                assert contender.right(), f"{title}: {contender.name} gave a wrong answer"
            contender.after()
    return Result(title, says, tuple(contenders), tuple(map(tuple, seconds)), nbytes)
