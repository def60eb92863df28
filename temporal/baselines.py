"""The baselines every run is judged beside: the training labels' mean, and a ridge on the standardised streams."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from .. import VacliError
from ..store import Track
from .windows import Clip

# Shape legend: T rows of a clip, P rows of a piece, D dims of a stream, F columns of the design, K targets.

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # of a weight squared, per row: the streams are standardised

_PIECE_ROWS = 2**13  # multiplied at once in float32; their sums are added up in float64
_STILL = 1e-4  # a dim that moves less than this does not move: what is below is a step of float16


@dataclass(frozen=True)
class Baselines:
    """Fitted once, by `fit`. mean: (K,) of the training labels. weights: penalty -> (F, K) float64."""

    mean: np.ndarray
    weights: dict[float, torch.Tensor]
    _design: _Design

    def constant(self, clips: Iterable[Clip]) -> dict[str, Track]:
        """Clip id -> the mean of the training labels, at every row."""
        return {
            c.id: Track(np.tile(self.mean.astype(np.float32), (len(c.times_s), 1)), c.times_s) for c in clips
        }

    def linear(self, clips: Iterable[Clip]) -> dict[float, dict[str, Track]]:
        """Penalty -> clip id -> the ridge's own curve (T, K): not filled, smoothed or clipped."""
        together = torch.cat(list(self.weights.values()), dim=1).float().to(self._design.device)
        curves: dict[float, dict[str, Track]] = {penalty: {} for penalty in self.weights}
        for clip in clips:
            every = slice(0, len(clip.times_s))
            parts = [np.empty((0, together.shape[1]), np.float32)]
            parts += [(x @ together).cpu().numpy() for x, _ in self._design.pieces(clip, every)]
            values = np.split(np.concatenate(parts), len(curves), axis=1)
            for found, of_penalty in zip(curves.values(), values, strict=True):
                found[clip.id] = Track(of_penalty, clip.times_s)
        return curves


def fit(clips: Iterable[Clip], device: torch.device | str = "cpu") -> Baselines:
    """The baselines for these training clips, taken one at a time: their labelled rows are seen once, by pieces.

    The ridge sees each stream standardised by the rows that have it, zeros where it is missing, and beside it a column
    that says where; all are penalised but the constant. Raises VacliError if no row is labelled.
    """
    design, sums = _Design(torch.device(device)), _Sums()
    for clip in clips:
        if clip.labels is not None:
            labelled = np.flatnonzero(np.isfinite(clip.labels).all(axis=1))
            design.begin(clip)
            for x, rows in design.pieces(clip, labelled):
                sums.add(x, torch.from_numpy(clip.labels[rows].astype(np.float64)))
    if not sums.rows:
        raise VacliError(
            "the training videos have no valid label: wanted at least one frame that is not -5; "
            "label more of them and run `vacli extract` again"
        )
    return Baselines((sums.xy[-1] / sums.rows).numpy(), _solved(sums, design), design)


@dataclass
class _Sums:
    """X'X (F, F) and X'Y (F, K) of all rows so far, float64 on the CPU; the last column of X is ones."""

    rows: int = 0
    xx: torch.Tensor = field(default_factory=lambda: torch.zeros(()))
    xy: torch.Tensor = field(default_factory=lambda: torch.zeros(()))

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        self.rows += len(x)
        self.xx = self.xx + (x.T @ x).double().cpu()
        self.xy = self.xy + (x.T @ y.float().to(x.device)).double().cpu()


class _Design:
    """Clips' rows as columns: of each stream its dims, brought near 0 +- 1 by the first clip that has it, zeros where
    it is missing, and where it is; at last ones."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.dims: dict[str, int] = {}
        self.near: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}  # centre and width (D,)

    def begin(self, clip: Clip) -> None:
        """Look at a clip for streams that no clip before it had."""
        self.dims = self.dims or {name: rows.shape[1] for name, rows in clip.streams.items()}
        for name in clip.streams.keys() - self.near.keys():
            some = np.asarray(clip.streams[name][:_PIECE_ROWS], np.float32)
            some = some[~np.isnan(some[:, 0])]
            if len(some):
                width = some.std(axis=0)
                near = (some.mean(axis=0), np.where(width < _STILL, 1, width))
                self.near[name] = (
                    torch.from_numpy(near[0]).to(self.device),
                    torch.from_numpy(near[1]).to(self.device),
                )

    def pieces(self, clip: Clip, rows: np.ndarray | slice) -> Iterator[tuple[torch.Tensor, np.ndarray]]:
        """(P, F) float32 on the device, of these rows of the clip, and which (P,) they are."""
        wanted = np.arange(len(clip.times_s))[rows]
        for begin in range(0, len(wanted), _PIECE_ROWS):
            some = wanted[begin : begin + _PIECE_ROWS]
            columns = [part for name in self.dims for part in self._columns(name, clip.streams[name][some])]
            yield torch.cat([*columns, torch.ones(len(some), 1, device=self.device)], dim=1), some

    def _columns(self, name: str, rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.from_numpy(np.ascontiguousarray(rows)).to(self.device).float()
        missing = x[:, :1].isnan()
        if name in self.near:
            centre, width = self.near[name]
            x = (x - centre) / width
        return x.masked_fill(missing, 0), missing.float()


def _solved(sums: _Sums, design: _Design) -> dict[float, torch.Tensor]:
    """Penalty -> weights (F, K) for the design's columns, of the ridge on the standardised ones.

    A standardised column is (z - m) / d where the stream is there: a combination of z, the column that says where it is
    missing, and the ones. So the sums over z give those over it, and no second pass is needed.
    """
    n, columns = sums.rows, len(sums.xx)
    change, place = torch.eye(columns, dtype=torch.float64), 0
    for dim in design.dims.values():
        here, missing = slice(place, place + dim), place + dim
        there = max(1.0, n - float(sums.xx[missing, -1]))
        mean = sums.xx[here, -1] / there
        deviation = (sums.xx.diagonal()[here] / there - mean**2).clamp_min(0).sqrt()
        deviation = torch.where(deviation < _STILL, 1, deviation)
        change[here, here] = torch.diag(1 / deviation)
        change[-1, here], change[missing, here] = -mean / deviation, mean / deviation
        place = missing + 1
    xx, xy = change.T @ sums.xx @ change, change.T @ sums.xy
    penalised = torch.ones(columns, dtype=torch.float64)
    penalised[-1] = 0
    return {
        penalty: change @ torch.linalg.solve(xx + torch.diag(penalty * n * penalised), xy)
        for penalty in PENALTIES
    }
