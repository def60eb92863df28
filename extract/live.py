"""Frames in, features out one by one: what the stored tracks would hold, without waiting for the end of the video."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator, Hashable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from .. import VacliError
from ..store import Track
from .encoder import Encoder, encode, pass_key
from .faces import ARCFACE_112, align, overlap_of
from .following import BOX, POINTS, SCORE, Face, Follower
from .logmel import BANDS, HOP_S, LOG_OFFSET, LogMel, log_mel_blocks
from .people import AGAIN_IOU, AWAY_S, People
from .vggish import PATCH_ROWS, VGGish, patch_starts

_Frames = Generator[tuple[np.ndarray, float], None, None]  # rgb (H, W, 3) uint8, seconds
Rows = dict[str, np.ndarray | None]


@dataclass(frozen=True)
class Moment:
    """One frame. frame: from 1; time_s: from the start of the video, or from a camera's first frame.

    face: the person is seen in it. box: (4,) pixels x0, y0, x1, y1, None without a face. rows: of each encoder's track
    the row at this time, (D,) float32 (or (K, D), as the encoder has it), or None where nothing was seen or heard.
    """

    frame: int
    time_s: float
    face: bool
    box: np.ndarray | None
    rows: Rows


class LiveFrames:
    """The moments of a video file or of a camera, as they come, in constant memory.

    source: a file, or the number of a camera. encoders: by the names of their tracks. people: how faces are found.

    Who the main person is cannot wait for the end: it is the largest and surest face of the first frame with any, for
    as long as it is followed (extract/following.py: half a second unseen, or a cut, ends that); then who shows up where
    it was last seen within 2 s, else again the largest. So where one person is found in every frame the rows are those
    of the stored tracks; where a face is missed for a moment the stored ones are bridged from both sides, here there is
    none; and the stored ones know whom a longer video is about. Looked for in every n-th frame only, a face
    is where its pixels went in between; the stored ones are mended afterwards.

    Sound is heard no farther than is needed, up to a minute ahead of the frame in a file; a camera has none. Where the
    sound has a clock of its own a moment comes with the frame after it: a row is the mean of what lies halfway to its
    neighbours. Of the encoders of sound only those are streamed that hear nothing later than the moment.

    A camera goes on until the iterating is left off. Networks are loaded before it is opened, so that its first frame
    waits for none.

    Raises VacliError for an encoder that cannot be streamed. Iterating, of which there can be one at a time, raises it
    where there is no such camera or video, and where a camera stops giving pictures.
    """

    def __init__(
        self, source: Path | int, encoders: Mapping[str, Encoder], people: People | None = None
    ) -> None:
        self._source, self._people = source, people or People()
        self._seers = {name: e for name, e in encoders.items() if e.eats == "crops"}
        self._passes: dict[Hashable, list[str]] = {}  # names of the encoders that one pass serves
        for name, encoder in self._seers.items():
            self._passes.setdefault(pass_key(encoder) or name, []).append(name)
        self._hearers = {name: _hearer(name, e) for name, e in encoders.items() if e.eats != "crops"}

    def __iter__(self) -> Generator[Moment, None, None]:
        if isinstance(self._source, int):
            ears: dict[str, _Ear] = {}
            self._warm_up()
            frames = _camera(self._source)
        else:
            ears = {name: listen(self._source) for name, listen in self._hearers.items()}
            frames = _file(self._source)
        with contextlib.closing(self._seen(frames)) as seen:
            for before_s, moment, after_s in _with_neighbours(seen, any(ear.waits for ear in ears.values())):
                heard = {name: ear.row(before_s, moment.time_s, after_s) for name, ear in ears.items()}
                moment.rows.update(dict.fromkeys(self._hearers) | heard)
                yield moment

    def _seen(self, frames: _Frames) -> Generator[Moment, None, None]:
        """The moments with the rows of what is to be seen."""
        main = _Main(self._people)
        with contextlib.closing(frames):
            for frame, (rgb, time_s) in enumerate(frames, 1):
                face = main.face(rgb, time_s)
                rows: Rows = dict.fromkeys(self._seers)
                if face is not None:
                    rows = self._encoded(align(rgb, face[POINTS]))
                yield Moment(frame, time_s, face is not None, None if face is None else face[BOX], rows)

    def _warm_up(self) -> None:
        """Networks are built at the first picture they see: here, a black one."""
        black = np.zeros((480, 640, 3), np.uint8)
        self._people.detector(black[None])
        self._encoded(align(black, ARCFACE_112))

    def _encoded(self, crop: np.ndarray) -> Rows:
        rows: Rows = {}
        for names in self._passes.values():
            outputs = encode([self._seers[name] for name in names], crop[None])
            rows |= {name: _stored(output[0]) for name, output in zip(names, outputs, strict=True)}
        return {name: rows[name] for name in self._seers}


def _stored(row: np.ndarray) -> np.ndarray:
    """As it would come back from the store, which keeps float16."""
    return row.astype(np.float16).astype(np.float32)


def _with_neighbours(
    moments: Iterator[Moment], wait: bool
) -> Iterator[tuple[float | None, Moment, float | None]]:
    """Each with the times of those before and after it, None where there is none, or nobody waits."""
    before_s: float | None = None
    held: Moment | None = None
    for moment in moments:
        if not wait:
            yield None, moment, None
            continue
        if held is not None:
            yield before_s, held, moment.time_s
            before_s = held.time_s
        held = moment
    if held is not None:
        yield before_s, held, None


# ---- pictures ------------------------------------------------------------------------------------------------


def _file(path: Path) -> _Frames:
    from .media import Video

    for rgb, times_s in Video(path).frames(1):
        yield rgb[0], float(times_s[0])


def _camera(number: int) -> _Frames:
    """At the times they come, the first at 0, until nobody asks for more: that a camera has no more is an error."""
    import cv2

    quiet = cv2.utils.logging
    level = quiet.getLogLevel()
    quiet.setLogLevel(quiet.LOG_LEVEL_SILENT)  # that there is none we say ourselves
    try:
        camera = cv2.VideoCapture(number)
    finally:
        quiet.setLogLevel(level)
    try:
        camera.set(cv2.CAP_PROP_BUFFERSIZE, 1)  # who is slower than the camera shall see what is now
        start_s = last_s = None
        while True:
            there, bgr = camera.read()
            now_s = time.monotonic()
            if not there:
                break
            start_s = now_s if start_s is None else start_s
            if last_s is None or now_s > last_s:
                last_s = now_s
                yield np.ascontiguousarray(bgr[..., ::-1]), now_s - start_s
        if start_s is None:
            raise VacliError(
                f"no pictures from camera {number}; wanted one that is plugged in and that nothing else uses; "
                "name another with --camera N, or a file with --video"
            )
        raise VacliError(
            f"camera {number} gave no more pictures after {now_s - start_s:.1f} s; wanted them until Ctrl-C; plug it "
            "in again, see that nothing else uses it, and start anew"
        )
    finally:
        camera.release()


class _Main(Follower):
    """Who is followed as the main person, frame by frame; nothing is kept of what is past."""

    def __init__(self, people: People) -> None:
        super().__init__(people.detector, people.every)
        self._min_seen = people.min_seen
        self._who: Face | None = None
        self._last_seen: tuple[np.ndarray, float] | None = None  # box, seconds

    def face(self, rgb: np.ndarray, time_s: float) -> np.ndarray | None:
        """(15,) where the main person is in this frame, columns as of `Detector`; None where it is not seen."""
        self.see(rgb[None], np.array([time_s]))
        self.forget_past()
        here, gone = self.here(), self._who not in self.alive
        if here and (gone or (self._who is not None and self._who.seen < self._min_seen)):
            self._who = self._again(here, time_s) or max(here, key=_weight)
        if self._who not in here:
            return None
        assert self._who is not None
        self._last_seen = self._who.now[BOX], time_s
        return self._who.now.astype(np.float32)

    def _again(self, here: list[Face], time_s: float) -> Face | None:
        """Who shows up where the last one was."""
        if self._last_seen is None or time_s - self._last_seen[1] > AWAY_S:
            return None
        overlaps = overlap_of(self._last_seen[0][None], np.stack([face.now[BOX] for face in here]))[0]
        return here[int(overlaps.argmax())] if overlaps.max() >= AGAIN_IOU else None


def _weight(face: Face) -> float:
    x0, y0, x1, y1 = face.now[BOX]
    return float((x1 - x0) * (y1 - y0) * face.now[SCORE])


# ---- sound ---------------------------------------------------------------------------------------------------


class _Ear(Protocol):
    """waits: whether a row needs the time of the frame after it."""

    waits: bool

    def row(self, before_s: float | None, now_s: float, after_s: float | None) -> np.ndarray | None:
        """(D,) float32 at the time of a frame, whose neighbours' times are given; None where nothing is heard."""


def _hearer(name: str, encoder: Any) -> Callable[[Path], _Ear]:
    """What listens to a file for an encoder of sound."""
    from .media import Video

    if isinstance(encoder, LogMel):
        return lambda path: _OnItsClock(encoder.pieces(Video(path).sound(encoder.rate_hz)), HOP_S)
    if isinstance(encoder, VGGish) and encoder.window == "causal":
        if encoder.hop_s is None:
            return lambda path: _AtFrames(encoder, Video(path).sound(encoder.rate_hz))
        hop_s = encoder.hop_s
        return lambda path: _OnItsClock(encoder.pieces(Video(path).sound(encoder.rate_hz)), hop_s)
    raise VacliError(
        f"{name} cannot be had live: {encoder.name} hears what comes after the moment; wanted logmel, or vggish with "
        f"window=causal; predict without --live, or train a run on those"
    )


class _OnItsClock:
    """Rows of a sound's own clock, read at the frames' times as `Track.at` reads the whole track."""

    waits = True

    def __init__(self, pieces: Iterator[Track], step_s: float) -> None:
        self._pieces, self._step_s = pieces, step_s
        self._track: Track | None = None  # what is still needed, and what came with it
        self._ended = False

    def row(self, before_s: float | None, now_s: float, after_s: float | None) -> np.ndarray | None:
        clock = np.array([t for t in (before_s, now_s, after_s) if t is not None])
        reach_s = 2 * self._step_s  # more than any row within reach is away
        low_s, high_s = float(clock[0]) - reach_s, float(2 * clock[-1] - clock[0]) + reach_s
        self._listen(low_s, high_s)
        if self._track is None:
            return None
        near = slice(*np.searchsorted(self._track.times_s, [low_s, high_s]))
        near_by = Track.trusted(self._track.values[near], self._track.times_s[near])
        row = near_by.at(clock, self._step_s)[0 if before_s is None else 1]
        return None if np.isnan(row).any() else row.astype(np.float32)

    def _listen(self, low_s: float, high_s: float) -> None:
        """On to `high_s`; what lies before `low_s` is forgotten."""
        while not self._ended and (self._track is None or self._track.times_s[-1] < high_s):
            piece = next(self._pieces, None)
            if piece is None:
                self._ended = True
            elif self._track is None:
                self._track = piece
            else:
                first = int(np.searchsorted(self._track.times_s, low_s))
                values = np.concatenate([self._track.values[first:], piece.values])
                times_s = np.concatenate([self._track.times_s[first:], piece.times_s])
                self._track = Track.trusted(values, times_s)


class _AtFrames:
    """VGGish's patches that end at the frames' times, embedded one by one."""

    waits = False

    def __init__(self, encoder: VGGish, sound: Iterator[np.ndarray]) -> None:
        self._encoder = encoder
        self._blocks = log_mel_blocks(sound, encoder.rate_hz)
        self._silence = np.full((PATCH_ROWS, BANDS), np.log(LOG_OFFSET), np.float32)
        # Log-mel rows from row `first` on; so many were heard. Before and after them it is silent.
        self._held, self._first, self._heard, self._ended = self._silence, -PATCH_ROWS, 0, False

    def row(self, before_s: float | None, now_s: float, after_s: float | None) -> np.ndarray | None:
        starts = patch_starts(np.array([now_s]), self._encoder.window)
        self._listen(int(starts[0]))
        if not self._heard:
            return None
        row = self._encoder.embed(self._held, self._first, starts, self._heard)[0]
        return None if np.isnan(row).any() else row.astype(np.float32)

    def _listen(self, start: int) -> None:
        """On to the end of the patch that begins with log-mel row `start`; the rows before it are forgotten."""
        while not self._ended and self._heard < start + PATCH_ROWS:
            block = next(self._blocks, None)
            self._ended = block is None
            self._heard += 0 if block is None else len(block)
            past = min(max(start - self._first, 0), len(self._held))
            self._held = np.concatenate([self._held[past:], self._silence if block is None else block])
            self._first += past
