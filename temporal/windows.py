"""The store on the device: all rows of the streams resident, a batch of windows is one gather, fold undoes windows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .. import VacliError
from ..store import Track

# Shape legend: N all rows, W windows, B windows of a batch, L rows of a window, D dims of a stream, K targets.

_PIECE_ROWS = 2**12  # summed at once in float32; the sums of the pieces are added in float64


@dataclass
class Clip:
    """One video's rows on one clock: the frame times, its streams read at them, its labels if it has any.

    streams: name -> (T, D), a row of NaN where the stream saw nothing. labels: (T, K) or None.
    """

    id: str
    times_s: np.ndarray
    streams: dict[str, np.ndarray]
    labels: np.ndarray | None = None

    @classmethod
    def on_clock(
        cls,
        id: str,
        times_s: np.ndarray,
        tracks: dict[str, Track],
        dims: dict[str, int],
        labels: Track | None = None,
    ) -> Clip:
        """Read tracks at the frames' times. A stream of `dims` that has no track saw nothing.

        Raises VacliError if a track has another dimension than `dims` says.
        """
        streams = {}
        for name, dim in dims.items():
            found = tracks[name].values.shape[1:] if name in tracks else (dim,)
            if found != (dim,):
                raise VacliError(
                    f"stream {name} of {id} has rows of {found}, wanted ({dim},): another encoder made it"
                )
            empty = np.full((len(times_s), dim), np.nan, np.float16)
            streams[name] = tracks[name].at(times_s) if name in tracks else empty
        return cls(id, times_s, streams, None if labels is None else labels.at(times_s))


class Windows:
    """Windows over clips, never across two of them; rows live on the device as float16 and are converted in the gather.

    length, stride: rows. The last window of a clip is aligned to its end, so no row is lost; a clip shorter than
    `length` is padded with rows that are neither seen nor labelled. A length beyond the longest clip is cut to it.
    """

    def __init__(
        self, clips: Sequence[Clip], length: int, stride: int, device: torch.device | str = "cpu"
    ) -> None:
        if not clips or length < 1 or stride < 1:
            raise ValueError(
                f"wanted clips, length and stride at least 1, got {len(clips)}, {length}, {stride}"
            )
        self.times_s = {c.id: c.times_s for c in clips}  # not the clips: the caller may let their rows go
        rows = [len(c.times_s) for c in clips]
        self.length = min(length, max([1, *rows]))
        room = [max(n, self.length) for n in rows]
        self.offsets = np.concatenate([[0], np.cumsum(room)])
        starts = [self._starts(n, stride) + offset for n, offset in zip(rows, self.offsets[:-1], strict=True)]
        self.starts = torch.from_numpy(np.concatenate(starts)).to(device)
        self.streams: dict[str, torch.Tensor] = {}
        self.seen: dict[str, torch.Tensor] = {}
        for name in clips[0].streams:
            packed = self._pack([c.streams[name] for c in clips], np.float16)
            self.streams[name], self.seen[name] = packed
        if all(c.labels is not None for c in clips):
            labels = [c.labels for c in clips if c.labels is not None]
            self.labels, self.labelled = self._pack(labels, np.float32)

    def _starts(self, rows: int, stride: int) -> np.ndarray:
        last = max(0, rows - self.length)
        return np.unique(np.append(np.arange(0, last + 1, stride), last))

    def _pack(self, arrays: Sequence[np.ndarray], dtype: type) -> tuple[torch.Tensor, torch.Tensor]:
        """All clips' rows in one tensor (N, D) on the device, zeros where NaN, and which rows are not (N,).

        Clip by clip: beside the clips and the tensor there is never another copy of the whole.
        """
        device, rows = self.starts.device, int(self.offsets[-1])
        torch_dtype = torch.from_numpy(np.empty(0, dtype)).dtype
        packed = torch.zeros(rows, arrays[0].shape[1], dtype=torch_dtype, device=device)
        known = torch.zeros(rows, dtype=torch.bool, device=device)
        for array, offset in zip(arrays, self.offsets[:-1], strict=True):
            here = slice(int(offset), int(offset) + len(array))
            valid = ~np.isnan(array[:, 0])
            known[here] = torch.from_numpy(valid).to(device)
            clean: np.ndarray = np.where(valid[:, None], array, 0).astype(dtype, copy=False)
            packed[here] = torch.from_numpy(clean).to(device)
        return packed, known

    def __len__(self) -> int:
        return len(self.starts)

    def _gather(self, rows: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
        """(N, ...) -> (B, L, ...): windows are overlapping views of the rows, so a batch is one index_select."""
        shape = (len(rows) - self.length + 1, self.length, *rows.shape[1:])
        view = rows.as_strided(shape, (rows.stride(0), *rows.stride()))  # no copy
        return view.index_select(0, starts)

    def batch(self, index: torch.Tensor) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """The inputs of windows `index` (B,): streams {name: (B, L, D) float32} and seen {name: (B, L) bool}."""
        starts = self.starts[index]
        streams = {name: self._gather(rows, starts).float() for name, rows in self.streams.items()}
        return streams, {name: self._gather(rows, starts) for name, rows in self.seen.items()}

    def targets(self, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Labels (B, L, K) float32 and where they count (B, L) bool."""
        starts = self.starts[index]
        return self._gather(self.labels, starts), self._gather(self.labelled, starts)

    def moments(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Mean and standard deviation (D,) of each stream over the rows seen; for standardising."""
        return {name: _moments(rows, self.seen[name]) for name, rows in self.streams.items()}

    def fold(self, outputs: torch.Tensor) -> dict[str, Track]:
        """Windows' outputs (W, L, K) back to one float32 Track per clip: the mean of all windows over a row."""
        total = torch.zeros(int(self.offsets[-1]), outputs.shape[-1], dtype=torch.float64)
        count = torch.zeros(int(self.offsets[-1]), 1, dtype=torch.float64)
        for start, window in zip(self.starts.tolist(), outputs.detach().cpu().double(), strict=True):
            total[start : start + self.length] += window
            count[start : start + self.length] += 1
        mean = (total / count.clamp_min(1)).float().numpy()
        return {
            id: Track(mean[offset : offset + len(times_s)], times_s)
            for (id, times_s), offset in zip(self.times_s.items(), self.offsets[:-1], strict=True)
        }


def _moments(rows: torch.Tensor, seen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation (D,) of the rows seen, summed by pieces; (0, 1) without any row.

    A dim that never moves keeps deviation 1: divided by next to nothing, one step of float16 would drown all else.
    """
    pieces = list(zip(rows.split(_PIECE_ROWS), seen.split(_PIECE_ROWS), strict=True))
    count = seen.sum().clamp_min(1)
    total = torch.zeros(rows.shape[1], dtype=torch.float64, device=rows.device)
    mean = sum((x.float().sum(0).double() for x, _ in pieces), total) / count  # rows not seen are zeros
    squares = (((x.float() - mean.float()) * valid[:, None]).square().sum(0).double() for x, valid in pieces)
    deviation = (sum(squares, total) / count).sqrt()
    return mean.float(), torch.where(deviation < 1e-4, 1.0, deviation).float()
