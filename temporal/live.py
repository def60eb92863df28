"""Live prediction: a causal head's features in, valence and arousal out, row by row, in constant memory.

What comes out is what the same network gives offline for the whole video as one line: `predict` cuts the line into
overlapping windows and takes their mean, unless the run was trained on whole videos. Nothing that looks ahead is here:
no smoothing, and where no face is, the last value with one is held, which `predict.finish` fills from both sides.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from .. import VacliError
from .blocks import BLOCKS
from .folds import Folds
from .live_blocks import TWINS, LiveNetwork
from .model import encode_of
from .predict import Run
from .preset import BlockSpec, Preset

Rows = Mapping[str, np.ndarray | None]
Value = tuple[np.ndarray, np.ndarray | None]  # valence and arousal (2,), and how far the folds are apart (2,)


class Moment(Protocol):
    """A frame with its features: stream -> (D,), None where the stream saw nothing."""

    @property
    def time_s(self) -> float: ...

    @property
    def rows(self) -> Rows: ...


M = TypeVar("M", bound=Moment)


def why_not_live(preset: Preset) -> str | None:
    """None where every row of this head rests on itself and those before it; else what does not, and the mend."""
    other = "train a head that goes row by row, as --head mamba"
    if preset.fuse == "cross_attn" and len(preset.streams) > 1:
        return f'fuse = "cross_attn" attends to later rows too; {other}, or with --set fuse=concat'
    for where, spec in _blocks_of(preset):
        ((name, options),) = spec.items()
        if name == "vgg":
            return f"{where} reads patches of sound, not rows of features; {other}"
        if BLOCKS[name] not in TWINS:
            return f"{where}, a {name}, looks at whole videos: what it remembers would grow with every row; {other}"
        takes = "causal" in inspect.signature(BLOCKS[name]).parameters
        if takes and not options.get("causal", preset.causal):
            key = f"{where}.{name}.causal" if "causal" in options else "causal"
            return f"{where}, a {name}, looks at later rows (causal = false); train it with --set {key}=true"
    return None


def _blocks_of(preset: Preset) -> Iterator[tuple[str, BlockSpec]]:
    """Every block, and where it stands in the preset."""
    for stream in preset.streams:
        encode = encode_of(preset, stream)
        (key,) = [k for k, found in preset.encode.items() if found is encode] or ["*"]
        if encode.vgg is not None:
            yield f"encode.{key}.vgg", {"vgg": {}}
        yield from ((f"encode.{key}.blocks.{n}", spec) for n, spec in enumerate(encode.blocks))
    yield from ((f"decode.{n}", spec) for n, spec in enumerate(preset.decode))


class LiveHead:
    """A trained run, or the mean of several folds, one row at a time.

    Making one opens the weights, and no video. Raises VacliError for a run that looks ahead (why_not_live), for weights
    that cannot be used, and for folds that are not whole.
    """

    def __init__(self, found: Run | Folds, device: torch.device | str = "cpu") -> None:
        if isinstance(found, Folds):
            found.check_whole()
        runs = [found.runs[k] for k in sorted(found.runs)] if isinstance(found, Folds) else [found]
        self.run = runs[0]  # whatever features and clock one fold has, all have
        if why := why_not_live(self.run.preset):
            raise VacliError(f"{found.path} cannot predict live: {why}")
        self._dims, self._device = self.run.dims, torch.device(device)
        self._nets = [LiveNetwork(run.network(device)) for run in runs]
        self._spread: np.ndarray | None = None

    @property
    def spread(self) -> np.ndarray | None:
        """(2,) how far the folds were apart at the last step, as deviation; None for one run."""
        return self._spread

    def reset(self) -> None:
        """Before another video: everything seen is forgotten."""
        for net in self._nets:
            net.reset()
        self._spread = None

    @torch.inference_mode()
    def step(self, rows: Rows) -> np.ndarray:
        """The next row: stream -> (D,), None or left out where it saw nothing -> valence, arousal (2,) in [-1, 1].

        The value is the network's own, whether there is a face or not. Rows are rounded to float16, as the store keeps
        them. Raises ValueError for rows of other streams or shapes or with infinities, VacliError for values beyond
        float16 and for a network that gives anything but numbers.
        """
        seen = self._seen(rows)
        values = np.stack([net.step(seen).float().cpu().numpy() for net in self._nets])
        if not np.isfinite(values).all():
            raise VacliError(
                "the network's values are not finite, its training diverged: train it with a lower train.lr"
            )
        values = np.clip(values, -1, 1)
        if len(values) == 1:
            return values[0]
        self._spread = values.std(0, dtype=np.float64).astype(np.float32)
        return values.mean(0, dtype=np.float64).astype(np.float32)

    def _seen(self, rows: Rows) -> dict[str, Tensor]:
        if strangers := rows.keys() - self._dims.keys():
            raise ValueError(f"a row of {min(strangers)}; wanted {', '.join(self._dims)}")
        seen = {}
        for name, row in rows.items():
            if row is None:
                continue
            if row.shape != (self._dims[name],):
                raise ValueError(f"a row of {name} of shape {row.shape}, wanted ({self._dims[name]},)")
            kept = stored(name, row)
            if kept is not None:
                seen[name] = torch.from_numpy(kept).to(self._device).float()
        return seen


def stored(stream: str, row: np.ndarray) -> np.ndarray | None:
    """The row as the store would give it back, float16; None for one of NaN.

    Raises VacliError for values beyond float16, ValueError for an infinity or a NaN among numbers.
    """
    try:
        with np.errstate(over="raise"):
            kept = row.astype(np.float16)
    except FloatingPointError as e:
        raise VacliError(
            f"stream {stream} has values up to {np.nanmax(np.abs(row)):.3g}; wanted what float16 holds, 65504 at most: "
            "scale them in the encoder, and train the head on such features"
        ) from e
    if np.isfinite(row).all():
        return kept
    if np.isnan(row).all():
        return None
    raise ValueError(
        f"a row of {stream} is partly NaN or infinite; wanted numbers, or NaN where nothing was seen"
    )


class Hold:
    """What is shown where nobody is seen: the last value with a face, before the first one the network's own."""

    def __init__(self) -> None:
        self._kept: Value | None = None

    def __call__(self, face: bool, value: Value) -> Value:
        if face:
            self._kept = value
        return value if self._kept is None else self._kept


def follow(
    head: LiveHead, moments: Iterable[M], frame_s: float | None = None
) -> Iterator[tuple[M, np.ndarray, np.ndarray | None]]:
    """Each moment as it comes, with what is to be shown: valence and arousal (2,), and the folds' spread (2,) or None.

    Rows without the run's face stream hold the last value with it (Hold). frame_s: seconds from a frame to the next,
    where the source says; unless told, the first two frames do. By it is decided, as in Run.clock, whether frames are
    much closer than the labels of the training were: then all rows between two labels are averaged into one, which is
    shown when they are over, until the next one is.
    """
    head.reset()
    clock: _FrameClock | _SlowClock = _FrameClock(head)
    first: M | None = None
    for number, moment in enumerate(moments):
        if first is not None:  # this is the second one
            clock = _slow_clock(head, first, frame_s or moment.time_s - first.time_s) or clock
        first = None if number else moment
        yield moment, *clock.step(moment)


class _FrameClock:
    """Steps a head with every frame."""

    def __init__(self, head: LiveHead) -> None:
        self._head, self._hold = head, Hold()

    def step(self, moment: Moment) -> Value:
        row = moment.rows.get(self._head.run.face_stream)
        face = row is not None and not np.isnan(row[0])
        return self._hold(face, (self._head.step(moment.rows), self._head.spread))


def _slow_clock(head: LiveHead, first: Moment, frame_s: float) -> _SlowClock | None:
    """The clock of the run's labels, where it is slower than that of the frames, with the first frame on it."""
    frames_s = np.array([first.time_s, first.time_s + frame_s])
    if head.run.clock(frames_s) is frames_s:
        return None
    slow = _SlowClock(head, first.time_s, head.run.about["label"]["step_s"], frame_s)
    slow.step(first)
    return slow


class _SlowClock:
    """Steps a head on the clock of its labels (Run.clock): a row is the mean of what was seen in its stretch of time.

    It is what Track.at makes of it, who may look ahead by a frame, though, where a stretch of less than two is empty.
    """

    def __init__(self, head: LiveHead, begin_s: float, step_s: float, frame_s: float) -> None:
        self._head, self._hold = head, Hold()
        self._reach_s = frame_s * (1 + 1e-9)
        self._middle_s = begin_s + step_s / 2
        # rounded as by np.arange, so that a frame between two stretches falls to the one it falls to offline
        self._step_s = self._middle_s + step_s - self._middle_s
        self._done = 0
        self._shown: Value | None = None
        self._begin()

    def _begin(self) -> None:
        self._sums: dict[str, np.ndarray] = {}
        self._times_s: dict[str, list[float]] = {}

    def step(self, moment: Moment) -> Value:
        """The value of the last stretch that is over; while the first one lasts, that of its rows so far."""
        while moment.time_s >= self._end_s():
            if self._shown is None:
                self._head.reset()
            means = self._means()
            self._shown = self._hold(self._head.run.face_stream in means, self._value(means))
            self._done += 1
            self._begin()
        self._add(moment)
        if self._shown is not None:
            return self._shown
        self._head.reset()
        return self._value(self._means())

    def _middle(self, number: int) -> float:
        return self._middle_s + number * self._step_s

    def _end_s(self) -> float:
        """Halfway from this stretch's middle to the next one's."""
        return (self._middle(self._done + 1) + self._middle(self._done)) / 2

    def _add(self, moment: Moment) -> None:
        for name, row in moment.rows.items():
            kept = None if row is None else stored(name, row)
            if kept is not None:
                self._sums[name] = kept.astype(np.float64) + self._sums.get(name, 0)
                self._times_s.setdefault(name, []).append(moment.time_s)

    def _means(self) -> Rows:
        """One row alone stands for the stretch only where it is within a frame of its middle, as for Track.at."""
        middle_s = self._middle(self._done)
        return {
            name: total / len(times_s)
            for (name, total), times_s in zip(self._sums.items(), self._times_s.values(), strict=True)
            if len(times_s) > 1 or abs(times_s[0] - middle_s) <= self._reach_s
        }

    def _value(self, means: Rows) -> Value:
        return self._head.step(means), self._head.spread
