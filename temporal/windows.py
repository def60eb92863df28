"""The store on the device: all rows of the streams resident, a batch of windows is one gather, fold undoes windows."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .. import VacliError
from ..store import Track
from ..store.labels import UNLABELLED
from .preset import WindowSpec
from .vgg import LogMelRows, gather

# Shape legend: N rows of all clips laid end to end, B lines of a batch, L rows of a line, T rows of a clip, D dims of a
# stream, K targets, M rows of a batch. A line is a window, or whole videos behind each other. A run is a stretch of
# rows of one clip: a window is one, and so is a whole video.

_PIECE_ROWS = 2**12  # summed at once in float32; the pieces are put together in float64
_SHARE = (
    0.7  # of the free memory that rows may take; the rest is the network's, its activations' and the caller's
)


@dataclass
class Clip:
    """One video's rows on one clock: the frame times, its streams read at them, its labels if it has any.

    streams: name -> (T, D), a row of NaN where the stream saw nothing. labels: (T, K) or None. tracks: name -> the
    log-mel on its own clock, for the streams that a network reads as patches.
    """

    id: str
    times_s: np.ndarray
    streams: dict[str, np.ndarray]
    labels: np.ndarray | None = None
    tracks: dict[str, Track] = field(default_factory=dict)

    @classmethod
    def on_clock(
        cls,
        id: str,
        times_s: np.ndarray,
        tracks: Mapping[str, Track],
        dims: Mapping[str, int],
        labels: Track | None = None,
        patched: Collection[str] = (),
    ) -> Clip:
        """Read tracks at the frames' times. A stream of `dims` that has no track saw nothing.

        A track on that very clock is not copied: mapped, it stays on the disk. patched: streams that keep their track.
        Raises VacliError if a track has another dimension than `dims` says.
        """
        streams = {}
        for name, dim in dims.items():
            found = tracks[name].values.shape[1:] if name in tracks else (dim,)
            if found != (dim,):
                raise VacliError(
                    f"stream {name} of {id} has rows of {found}, wanted ({dim},): another encoder made it; "
                    "extract with the one of run.json, or train again"
                )
            if name in patched:
                continue
            if name not in tracks:
                streams[name] = np.broadcast_to(np.float16(np.nan), (len(times_s), dim))  # takes no memory
            elif np.array_equal(tracks[name].times_s, times_s):
                streams[name] = tracks[name].values
            else:
                streams[name] = tracks[name].at(times_s)
        kept = {name: tracks[name] for name in patched if name in dims and name in tracks}
        return cls(id, times_s, streams, None if labels is None else _unmarked(labels).at(times_s), kept)


def _unmarked(labels: Track) -> Track:
    """With NaN where either value is -5, as others store what is not labelled; averaged, it would pass for a label."""
    marked = (labels.values == UNLABELLED).any(axis=1)
    if not marked.any():
        return labels
    return Track(
        np.where(marked[:, None], np.float32(np.nan), labels.values).astype(np.float32), labels.times_s
    )


@dataclass(frozen=True)
class Batch:
    """What a network is shown at once, on the device but for `rows`.

    rows:    (B, L) int64 on the CPU: which rows these are, of all clips laid end to end with their padding.
    streams: name -> (B, L, D) float32, zeros where not seen; a patched one (B, L, 96, 64).
    seen:    name -> (B, L) bool, False in padding.
    start:   (B, L) bool, the first row of each whole video; None for windows, each of one video.
    labels:  (B, L, K) float32, zeros where not labelled, and labelled (B, L) bool; None if no clip has any.
    """

    rows: Tensor
    streams: dict[str, Tensor]
    seen: dict[str, Tensor]
    start: Tensor | None = None
    labels: Tensor | None = None
    labelled: Tensor | None = None


class Windows:
    """Windows over clips, never across two of them: rows on the device as float16, converted in the gather.

    spec: rows of a window and to the next one. The last window of a clip is aligned to its end, so no row is lost; a
    clip shorter than that is padded with rows that are neither seen nor labelled. A length beyond the longest clip is
    cut to it. With spec.whole videos are not cut: they are packed behind each other into one line a batch, of up to
    batch x length rows, but for a video that is longer by itself.
    batch: windows at once. patched: stream -> where its log-mel patches lie (Network.patched).
    resident: whether all rows live on the device; else each batch is read from the clips' arrays (mapped, they may be
    larger than any memory) by a thread, into one of two buffers while the device computes on the other: the same
    batches, bit for bit. Unless told, they do where they take at most 0.7 of the free memory.

    Raises VacliError for a patched stream that is no log-mel, and for values beyond float16 (from batches, where the
    rows are not resident).
    """

    def __init__(
        self,
        clips: Sequence[Clip],
        spec: WindowSpec,
        batch: int,
        device: torch.device | str = "cpu",
        patched: Mapping[str, str] | None = None,
        resident: bool | None = None,
    ) -> None:
        patched = patched or {}
        if not clips or batch < 1:
            raise ValueError(f"wanted clips, and a batch of at least 1, got {len(clips)} and {batch}")
        if any(c.streams.keys() != clips[0].streams.keys() or c.streams.keys() & patched for c in clips):
            raise ValueError("wanted the same streams of every clip, and the patched ones as their tracks")
        self.batch, self.whole, self.device = batch, spec.whole, torch.device(device)
        self.times_s = {c.id: c.times_s for c in clips}
        rows = [len(c.times_s) for c in clips]
        self.length = min(spec.length, max(1, *rows))
        room = [max(n, 1 if spec.whole else self.length) for n in rows]
        self._offsets = np.concatenate([[0], np.cumsum(room)])
        self._first, self._count = self._all_runs(rows, room, spec.stride)
        self.steps = len(self._plan(None))
        self._labels, self._labelled = self._lay_labels([c.labels for c in clips])
        self._patches = {name: self._lay_patches(clips, name, at) for name, at in patched.items()}
        self._arrays = {name: [c.streams[name] for c in clips] for name in clips[0].streams}
        self._dims = {name: array.shape[1] for name, array in clips[0].streams.items()}
        nbytes = 2 * int(self._offsets[-1]) * sum(self._dims.values())
        self.resident = _fits(nbytes, self.device) if resident is None else resident
        if self.resident:
            self._rows = {name: self._lay_rows(name) for name in self._arrays}
            self._arrays = {}  # the caller may let them go

    def __len__(self) -> int:
        """Windows; or, of whole videos, lines in order."""
        return self.steps if self.whole else len(self._first)

    @property
    def labelled(self) -> bool:
        """Is any row labelled?"""
        return self._labelled is not None and bool(self._labelled.any())

    def batches(self, generator: torch.Generator | None = None) -> Iterator[Batch]:
        """One pass over all windows: `steps` batches, in order, or shuffled by the generator (of the CPU) alone.

        Whole videos are shuffled before they are packed, so a shuffled pass may take a few lines more or less.
        """
        plan = self._plan(generator)  # drawn now, not when the first batch is asked for
        return self._resident_pass(plan) if self.resident else self._staged_pass(plan)

    def fold(self, outputs: Iterable[tuple[Batch, Tensor]]) -> dict[str, Track]:
        """What a network made of batches (B, L, K) back to one float32 Track per clip, by clip id.

        A row's value is the mean over all windows that saw it, NaN where none did.
        """
        # not the batches, whose streams are large; the outputs stay on the device, so that no step waits for the last
        found = [(batch.rows, output.detach()) for batch, output in outputs]
        if not found:
            raise ValueError("wanted at least one batch's outputs")
        total = np.zeros((int(self._offsets[-1]), found[0][1].shape[-1]))
        count = np.zeros((len(total), 1))
        for rows, output in found:
            for line, values in zip(rows.numpy(), output.to("cpu", torch.float64).numpy(), strict=True):
                total[line] += values  # no row is twice in a line
                count[line] += 1
        mean = np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0).astype(np.float32)
        return {
            id: Track(mean[offset : offset + len(times_s)], times_s)
            for (id, times_s), offset in zip(self.times_s.items(), self._offsets[:-1], strict=True)
        }

    def moments(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Mean and standard deviation (D,) of each unpatched stream over the rows seen; for standardising."""
        return {
            name: _moments(self._pieces(name), torch.zeros(dim, dtype=torch.float64, device=self.device))
            for name, dim in self._dims.items()
        }

    # ---- which rows ------------------------------------------------------------------------------------------

    def _all_runs(self, rows: list[int], room: list[int], stride: int) -> tuple[Tensor, Tensor]:
        """First row and count of rows (R,) of every window, or of every video."""
        if self.whole:
            return torch.from_numpy(self._offsets[:-1]), torch.tensor(room)
        last = [max(0, n - self.length) for n in rows]
        first = [
            np.unique(np.append(np.arange(0, n + 1, stride), n)) + o
            for n, o in zip(last, self._offsets[:-1], strict=True)
        ]
        whole = torch.from_numpy(np.concatenate(first))
        return whole, torch.full_like(whole, self.length)

    def _plan(self, generator: torch.Generator | None) -> list[_Runs]:
        """The runs of each batch of a pass."""
        n = len(self._first)
        order = torch.arange(n) if generator is None else torch.randperm(n, generator=generator)
        first, count = self._first[order], self._count[order]
        sizes = _packed(count.tolist(), self.batch * self.length) if self.whole else self.batch
        parts = (first.split(sizes), count.split(sizes), first.to(self.device).split(sizes))
        return [_Runs(f, c, there) for f, c, there in zip(*parts, strict=True)]

    # ---- rows on the device ----------------------------------------------------------------------------------

    def _lay_rows(self, name: str) -> tuple[Tensor, Tensor]:
        """All clips' rows (N, D) float16, zeros where not seen, and which are (N,); one clip at a time beside them."""
        rows = int(self._offsets[-1])
        values = torch.zeros(rows, self._dims[name], dtype=torch.float16, device=self.device)
        seen = torch.zeros(len(values), dtype=torch.bool, device=self.device)
        for array, offset in zip(self._arrays[name], self._offsets[:-1].tolist(), strict=True):
            here = slice(offset, offset + len(array))
            values[here], seen[here] = _laid(name, array, self.device)
        return values, seen

    def _lay_labels(self, labels: Sequence[np.ndarray | None]) -> tuple[Tensor | None, Tensor | None]:
        """(N, K) float32, zeros where not labelled, and (N,) which are: every one of the K values is valid."""
        targets = {y.shape[1] for y in labels if y is not None}
        if not targets:
            return None, None
        (K,) = targets
        laid = np.full((int(self._offsets[-1]), K), np.nan, np.float32)
        for y, offset in zip(labels, self._offsets[:-1].tolist(), strict=True):
            if y is not None:
                laid[offset : offset + len(y)] = y
        valid = (np.isfinite(laid) & (laid != UNLABELLED)).all(1)
        laid[~valid] = 0
        return torch.from_numpy(laid).to(self.device), torch.from_numpy(valid).to(self.device)

    def _lay_patches(self, clips: Sequence[Clip], name: str, window: str) -> tuple[LogMelRows, Tensor]:
        """The log-mel of all clips, and (N,) the row of it that each row's patch begins with."""
        sound = LogMelRows([c.tracks.get(name) for c in clips], self.device)
        rows = int(self._offsets[-1])
        starts = torch.zeros(
            rows, dtype=torch.long, device=self.device
        )  # the first one is of silence, not heard
        for number, (clip, offset) in enumerate(zip(clips, self._offsets[:-1].tolist(), strict=True)):
            starts[offset : offset + len(clip.times_s)] = sound.starts(number, clip.times_s, window)
        return sound, starts

    def _gather(self, rows: Tensor, runs: _Runs) -> Tensor:
        """rows (N, ...) -> (B, L, ...)"""
        if not self.whole:
            return gather(rows, runs.there, self.length)
        return torch.cat([rows[first : first + n] for first, n in runs.spans()])[None]

    def _gather_float32(self, rows: Tensor, runs: _Runs) -> Tensor:
        """rows (N, D) float16 -> (B, L, D) float32"""
        if self.device.type != "cpu" and not self.whole:
            return self._gather(rows, runs).float()
        found = torch.empty(int(runs.count.sum()), rows.shape[1], device=self.device)
        place = 0
        for first, n in runs.spans():  # converted as they are copied: on a CPU 1.5 times as fast as by turns
            found[place : place + n] = rows[first : first + n]
            place += n
        return found.view(1 if self.whole else len(runs.first), -1, rows.shape[1])

    def _batch(self, runs: _Runs, streams: dict[str, Tensor], seen: dict[str, Tensor]) -> Batch:
        """The batch of these rows, whatever else it has put to them."""
        for name, (sound, starts) in self._patches.items():
            streams[name], seen[name] = sound.patches(self._gather(starts, runs))
        start = labels = labelled = None
        if self.whole:
            start = torch.zeros(1, int(runs.count.sum()), dtype=torch.bool)
            start[0, runs.count.cumsum(0) - runs.count] = True
            start = start.to(self.device)
        if self._labels is not None and self._labelled is not None:
            labels, labelled = self._gather(self._labels, runs), self._gather(self._labelled, runs)
        lines = 1 if self.whole else len(runs.first)
        return Batch(runs.rows(lines), streams, seen, start, labels, labelled)

    def _resident_pass(self, plan: list[_Runs]) -> Iterator[Batch]:
        for runs in plan:
            streams = {name: self._gather_float32(values, runs) for name, (values, _) in self._rows.items()}
            seen = {name: self._gather(seen, runs) for name, (_, seen) in self._rows.items()}
            yield self._batch(runs, streams, seen)

    # ---- rows elsewhere --------------------------------------------------------------------------------------

    def _staged_pass(self, plan: list[_Runs]) -> Iterator[Batch]:
        """One batch is shown while the thread fills the next one's buffer; it ends with this iterator."""
        most = max(int(runs.count.sum()) for runs in plan)
        buffers = [
            {name: _Stage(name, most, dim, self.device) for name, dim in self._dims.items()} for _ in range(2)
        ]
        with ThreadPoolExecutor(1, "vacli-rows") as thread:
            coming = thread.submit(self._fill, buffers[0], plan[0])
            for number, runs in enumerate(plan):
                coming.result()  # what went wrong in the thread is raised here
                if number + 1 < len(plan):
                    coming = thread.submit(self._fill, buffers[(number + 1) % 2], plan[number + 1])
                lines, rows = (1 if self.whole else len(runs.first)), int(runs.count.sum())
                shown = {name: stage.shown(lines, rows) for name, stage in buffers[number % 2].items()}
                streams = {name: values for name, (values, _) in shown.items()}
                seen = {name: known for name, (_, known) in shown.items()}
                yield self._batch(runs, streams, seen)

    def _fill(self, stages: dict[str, _Stage], runs: _Runs) -> None:
        """The rows of a batch, from the clips' arrays, into its buffers."""
        clips = np.searchsorted(self._offsets, runs.first.numpy(), side="right") - 1
        for name, stage in stages.items():
            stage.wait()
            place = 0
            for clip, (first, count) in zip(clips, runs.spans(), strict=True):
                begin = first - int(self._offsets[clip])
                stage.fill(place, self._arrays[name][clip][begin : begin + count], count)
                place += count

    def _pieces(self, name: str) -> Iterator[tuple[Tensor, Tensor]]:
        """A stream's rows (P, D) float16, zeros where not seen, and which are (P,), on the device, clip after clip."""
        for clip, (times_s, offset) in enumerate(zip(self.times_s.values(), self._offsets[:-1], strict=True)):
            for begin in range(0, len(times_s), _PIECE_ROWS):
                end = min(begin + _PIECE_ROWS, len(times_s))
                if self.resident:
                    values, seen = self._rows[name]
                    yield values[offset + begin : offset + end], seen[offset + begin : offset + end]
                else:
                    yield _laid(name, self._arrays[name][clip][begin:end], self.device)


@dataclass(frozen=True)
class _Runs:
    """The runs of a batch: first rows and counts of rows (R,), and the first rows on the device."""

    first: Tensor
    count: Tensor
    there: Tensor

    def spans(self) -> list[tuple[int, int]]:
        return list(zip(self.first.tolist(), self.count.tolist(), strict=True))

    def rows(self, lines: int) -> Tensor:
        """(lines, L)"""
        return torch.cat([torch.arange(first, first + n) for first, n in self.spans()]).view(lines, -1)


class _Stage:
    """Room for rows (M, D) float16 and which are seen (M,), in memory that a GPU can read by itself."""

    def __init__(self, stream: str, rows: int, dim: int, device: torch.device) -> None:
        pinned = device.type == "cuda"
        self.stream, self.device = stream, device
        self.values = torch.empty(rows, dim, dtype=torch.float16, pin_memory=pinned)
        self.seen = torch.empty(rows, dtype=torch.bool, pin_memory=pinned)
        self._shown = torch.cuda.Event() if pinned else None

    def wait(self) -> None:
        """Until the device has what it was shown."""
        if self._shown is not None:
            self._shown.synchronize()

    def fill(self, place: int, rows: np.ndarray, count: int) -> None:
        """rows (n, D), NaN where not seen, from `place` on; what follows of `count` is not seen.

        Raises VacliError for values beyond float16.
        """
        end = place + len(rows)
        values, seen = self.values.numpy(), self.seen.numpy()
        try:
            with np.errstate(over="raise"):
                np.copyto(values[place:end], rows, casting="same_kind")
        except FloatingPointError as e:
            raise VacliError(
                f"stream {self.stream} has values up to {np.nanmax(np.abs(rows)):.3g}; wanted what float16 holds, "
                "65504 at most: scale them before they are stored"
            ) from e
        seen[place:end] = ~np.isnan(values[place:end, 0])
        seen[end : place + count] = False
        values[place : place + count][~seen[place : place + count]] = 0

    def shown(self, lines: int, rows: int) -> tuple[Tensor, Tensor]:
        """The first rows as (B, L, D) float32 and (B, L) bool on the device; what is put here later changes neither."""
        values = self.values[:rows].to(self.device, non_blocking=True).float()
        seen = self.seen[:rows].to(self.device, non_blocking=True, copy=True)
        if self._shown is not None:
            self._shown.record()
        return values.view(lines, -1, values.shape[1]), seen.view(lines, -1)


def _laid(stream: str, rows: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """A stream's rows (n, D) as float16 on the device, zeros where not seen, and which are (n,)."""
    stage = _Stage(stream, len(rows), rows.shape[1], torch.device("cpu"))
    stage.fill(0, rows, len(rows))
    return stage.values.to(device), stage.seen.to(device)


def _packed(counts: list[int], room: int) -> list[int]:
    """How many of the videos, in this order, go into each line of up to `room` rows; at least one does."""
    lines: list[int] = []
    used = room + 1
    for count in counts:
        if used + count > room:
            lines.append(0)
            used = 0
        lines[-1] += 1
        used += count
    return lines


def _fits(nbytes: int, device: torch.device) -> bool:
    """Would so much leave enough memory free on the device? Yes, where nobody says what is free."""
    if device.type == "cuda":
        return nbytes <= _SHARE * torch.cuda.mem_get_info(device)[0]
    try:
        (line,) = (x for x in Path("/proc/meminfo").read_text().splitlines() if x.startswith("MemAvailable:"))
    except (OSError, ValueError):
        return True
    return nbytes <= _SHARE * 1024 * int(line.split()[1])


def _moments(pieces: Iterable[tuple[Tensor, Tensor]], zeros: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation (D,) of the rows seen, piece by piece (Chan, Golub and LeVeque 1979); (0, 1) without any row.

    A dim that never moves keeps deviation 1: divided by next to nothing, one step of float16 would drown all else.
    zeros: (D,) float64, to begin with.
    """
    count, mean, squares = zeros.sum(), zeros, zeros
    for values, seen in pieces:
        n, x = seen.sum().double(), values.float()
        here = x.sum(0).double() / n.clamp_min(1)  # rows not seen are zeros
        apart = here - mean
        total = (count + n).clamp_min(1)
        spread = ((x - here.float()) * seen[:, None]).square().sum(0).double()
        squares = squares + spread + apart.square() * (count * n / total)
        mean, count = mean + apart * (n / total), count + n
    deviation = (squares / count.clamp_min(1)).sqrt()
    return mean.float(), torch.where(deviation < 1e-4, 1.0, deviation).float()
