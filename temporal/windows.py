"""The store on the device: all rows of the streams resident, a batch of windows is one gather, fold undoes windows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .. import VacliError
from ..store import Track

# Shape legend: N all rows, W windows, B windows of a batch, L rows of a window, D dims of a stream, K targets.


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
        self.clips = list(clips)
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
            seen = ~np.isnan(packed[:, 0])
            self.seen[name] = torch.from_numpy(seen).to(device)
            self.streams[name] = torch.from_numpy(np.where(seen[:, None], packed, np.float16(0))).to(device)
        if all(c.labels is not None for c in clips):
            packed = self._pack([c.labels for c in clips if c.labels is not None], np.float32)
            labelled = ~np.isnan(packed).any(axis=1)
            self.labelled = torch.from_numpy(labelled).to(device)
            self.labels = torch.from_numpy(np.where(labelled[:, None], packed, np.float32(0))).to(device)

    def _starts(self, rows: int, stride: int) -> np.ndarray:
        last = max(0, rows - self.length)
        return np.unique(np.append(np.arange(0, last + 1, stride), last))

    def _pack(self, arrays: list[np.ndarray], dtype: type) -> np.ndarray:
        packed = np.full((self.offsets[-1], arrays[0].shape[1]), np.nan, dtype)
        for array, offset in zip(arrays, self.offsets, strict=False):
            packed[offset : offset + len(array)] = array
        return packed

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
        found = {}
        for name, rows in self.streams.items():
            seen = rows[self.seen[name]].double()
            if len(seen) == 0:
                found[name] = (torch.zeros(rows.shape[1]), torch.ones(rows.shape[1]))
            else:
                found[name] = (seen.mean(0).float(), seen.std(0, correction=0).clamp_min(1e-4).float())
        return found

    def fold(self, outputs: torch.Tensor) -> dict[str, Track]:
        """Windows' outputs (W, L, K) back to one float32 Track per clip: the mean of all windows over a row."""
        total = torch.zeros(int(self.offsets[-1]), outputs.shape[-1], dtype=torch.float64)
        count = torch.zeros(int(self.offsets[-1]), 1, dtype=torch.float64)
        for start, window in zip(self.starts.tolist(), outputs.detach().cpu().double(), strict=True):
            total[start : start + self.length] += window
            count[start : start + self.length] += 1
        mean = (total / count.clamp_min(1)).float().numpy()
        return {
            clip.id: Track(mean[offset : offset + len(clip.times_s)], clip.times_s)
            for clip, offset in zip(self.clips, self.offsets, strict=False)
        }
