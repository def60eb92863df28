"""How the missing tracks of one sample are made: people and faces, labels and sound, crops read and values written."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any

import numpy as np

from .. import VacliError
from ..store import Store, Track
from ..store.labels import read_va
from .crops import Crops, aligned
from .datasets import Sample
from .pipeline import Busy, Rows, Stopped, ahead
from .plan import Wanted

_PIECE_ROWS = 1024  # written at once: a long stretch without a face takes no memory
_FACES_BATCH = 8  # frames decoded at once while people are looked for: a few of them wait in memory
# {"problem" | "damage" | "warning": text}; stored with the track, so without the file's name, which may change.
Notes = dict[str, str]
SILENT: Notes = {"problem": "it has no sound; its curve rests on the picture alone"}


class Making:
    """The tracks of one sample that are missing, made step by step by the thread that reads it.

    row_shapes: of the encoders' tracks, by the digest of their recipe. progress: told how many frames one of `passes`
    over the video has done. watch: put around what is iterated for long; turns: one for each encoder of sound.
    """

    def __init__(
        self,
        sample: Sample,
        media: str,
        tracks: dict[str, Wanted],
        missing: dict[str, Wanted],
        store: Store,
        row_shapes: dict[str, tuple[int, ...]],
    ) -> None:
        self.sample, self.media, self.tracks, self.missing = sample, media, tracks, missing
        self._store, self._row_shapes = store, row_shapes
        self.eaters = {n: w for n, w in missing.items() if w.eats == "crops"}
        self._hearers = {n: w for n, w in missing.items() if w.eats == "sound"}
        self.passes = ("people" in missing) + bool(self.eaters) or 1
        self.notes: dict[str, Notes] = {}  # of the tracks stored so far
        self.error: Exception | None = None  # of a track that others do not wait for
        self.frames: int | None = None  # of the video, once it is known

    def read(
        self,
        start: Callable[[Generator[None, Rows | None, None]], None],
        watch: Callable[[Iterable[Any]], Iterator[Any]],
        progress: Callable[[int], None],
        busy: Busy,
        turns: dict[int, threading.Lock],
    ) -> Iterator[Crops]:
        """Makes what one thread can make alone and gives the crops of the rest; `start` gets the started writing.

        Raises VacliError; MediaError, after a tombstone was put where the tracks would lie.
        """
        if "people" in self.missing:
            self._look_for_people(watch, progress, busy)
        if "faces" in self.missing:
            self._choose_face()
        if any(wanted.by_frame for wanted in self.missing.values()):
            with self._burying(n for n, w in self.missing.items() if w.by_frame):
                times_s, crops, notes = self._frames(busy)
            self.frames = len(times_s)
            if self.eaters:
                with self._burying(self.eaters):
                    first = list(itertools.islice(crops, 1))
                    notes = notes if first else notes | _unseen(len(times_s))
                    writing = self._write(times_s, notes)
                    next(writing)
                    start(writing)
                    yield from itertools.chain(first, crops)
            if "label.va" in self.missing:
                assert self.sample.annotation is not None
                with self._apart():
                    self._put("label.va", read_va(self.sample.annotation, times_s), notes)
        else:
            times_s = np.empty(0)
        for name, wanted in self._hearers.items():
            with self._apart(), turns[id(wanted.maker)], self._burying([name]):
                self._hear(name, times_s, watch, busy)

    # ---- what one thread makes alone -------------------------------------------------------------------------

    def _look_for_people(
        self, watch: Callable[[Iterable[Any]], Iterator[Any]], progress: Callable[[int], None], busy: Busy
    ) -> None:
        from .media import MediaError, Video

        assert self.sample.video is not None
        video = Video(self.sample.video)
        with (
            self._burying(["people"]),
            contextlib.closing(ahead(busy.each("read", video.frames(_FACES_BATCH)))) as frames,
        ):
            waited = _Waited(watch(frames))
            with busy.at("faces"):
                track = self.missing["people"].maker(waited, progress)
            busy.add("faces", -waited.seconds)  # that was the reading's time
            self.frames = len(track)
            if not len(track):
                raise MediaError(video.path, "no picture decodes; wanted a whole video; copy it again")
        self._put("people", track, _damaged(video.damage))

    def _choose_face(self) -> None:
        people = self.tracks["people"]
        track = self.tracks["faces"].maker(self._store.get(people.recipe, people.media))
        self._put("faces", track, {} if track.valid.any() else _unseen(len(track)))

    def _frames(self, busy: Busy) -> tuple[np.ndarray, Iterator[Crops], Notes]:
        """The times of all frames (T,), and the crops to be had of them."""
        if self.sample.crops is None:
            wanted = self.tracks["faces"]
            faces = self._store.get(wanted.recipe, wanted.media)
            return faces.times_s, busy.each("read", aligned(self.sample, faces)), {}
        with busy.at("read"):
            times_s, damage = self.sample.frame_clock()
        return times_s, busy.each("read", self.sample.read_crops(len(times_s))), _damaged(damage)

    def _hear(
        self, name: str, times_s: np.ndarray, watch: Callable[[Iterable[Any]], Iterator[Any]], busy: Busy
    ) -> None:
        """A sound encoder's track, onto the disk piece by piece where it comes so."""
        from .media import Video

        assert self.sample.video is not None
        wanted, video = self.tracks[name], Video(self.sample.video)
        encoder = wanted.maker
        blocks = _Waited(watch(busy.each("read", video.sound(encoder.rate_hz))))
        clock = (times_s,) if getattr(encoder, "clock", "") == "frames" else ()
        if hasattr(encoder, "pieces"):
            pieces = encoder.pieces(blocks, *clock)
        else:
            pieces = (encoder(b, *clock) for b in (blocks,))
        timed = busy.each("sound", pieces)
        first = next(timed, None)
        shape, dtype = (
            (first.values.shape[1:], first.values.dtype)
            if first is not None
            else (self._row_shape(wanted), "f2")
        )
        with self._store.writing(
            wanted.recipe,
            wanted.media,
            len(times_s) if clock else 0,
            shape,
            dtype,
            {"sample": self.sample.id},
        ) as writer:
            heard = 0
            for piece in itertools.chain([first] if first is not None else [], timed):
                writer.add(piece)
                heard += len(piece)
            busy.add("sound", -blocks.seconds)  # that was the reading's time
            notes = _damaged(video.damage) | ({} if heard else SILENT)
            writer.notes.update(notes)
            self._refuse_changed()
        self.notes[name] = notes

    # ---- storing ---------------------------------------------------------------------------------------------

    def _write(self, times_s: np.ndarray, notes: Notes) -> Generator[None, Rows | None, None]:
        """The encoders' tracks, onto the disk row by row as they are sent; rows that are never sent are NaN.

        The space is taken at once. It ends, and the tracks are stored, when None is sent.
        """
        with contextlib.ExitStack() as stack:
            writers = {
                name: stack.enter_context(
                    self._store.writing(
                        wanted.recipe,
                        wanted.media,
                        len(times_s),
                        self._row_shape(wanted),
                        np.float16,
                        {"sample": self.sample.id, **notes},
                    )
                )
                for name, wanted in self.eaters.items()
            }
            done = 0
            while (sent := (yield)) is not None:
                values, rows = sent
                end = int(rows[-1]) + 1
                for name, writer in writers.items():
                    _append(writer, times_s[:end], done, values[name], rows)
                done = end
            for name, writer in writers.items():
                nothing = np.empty((0, *self._row_shape(self.eaters[name])), np.float16)
                _append(writer, times_s, done, nothing, np.empty(0, int))
            self._refuse_changed()
        self.notes |= dict.fromkeys(self.eaters, notes)

    def _row_shape(self, wanted: Wanted) -> tuple[int, ...]:
        """As the canary's."""
        return self._row_shapes[wanted.kind.digest]

    def _put(self, name: str, track: Track, notes: Notes) -> None:
        wanted = self.tracks[name]
        self._refuse_changed()
        self._store.put(wanted.recipe, wanted.media, track, {"sample": self.sample.id, **notes})
        self.notes[name] = notes

    def _refuse_changed(self) -> None:
        """What was read while it was being written is of no medium that has a name."""
        if self.sample.media(self._store.fingerprints) != self.media:
            raise VacliError(f"{self.sample.source}: it changed while it was read; run again")

    @contextlib.contextmanager
    def _apart(self) -> Iterator[None]:
        """What goes wrong with one track is told at the end; the others are kept."""
        try:
            yield
        except Stopped:
            raise
        except Exception as e:
            if getattr(e, "fatal", False):
                raise
            self.error = self.error or e

    @contextlib.contextmanager
    def _burying(self, names: Iterable[str]) -> Iterator[None]:
        """Of what the bytes are to blame for the next run is told at once: these tracks can never be made of them."""
        from .media import MediaError

        try:
            yield
        except MediaError as e:
            self._refuse_changed()
            for wanted in (self.tracks[name] for name in names):
                self._store.fail(wanted.recipe, wanted.media, e.reason, {"sample": self.sample.id})
            raise


class _Waited:
    """An iterator that measures how long was waited for its pieces."""

    def __init__(self, pieces: Iterable[Any]) -> None:
        self._pieces, self._busy = pieces, Busy()

    def __iter__(self) -> Iterator[Any]:
        return self._busy.each("waited", self._pieces)

    @property
    def seconds(self) -> float:
        return self._busy.seconds("waited")


def _damaged(damage: str | None) -> Notes:
    return {"damage": damage} if damage else {}


def _unseen(rows: int) -> Notes:
    return {"warning": f"no face in any of its {rows} frames"}


def _append(writer: Any, times_s: np.ndarray, done: int, values: np.ndarray, rows: np.ndarray) -> None:
    """Rows `done` to len(times_s) onto a writer: `values` at `rows`, else NaN."""
    for low in range(done, len(times_s), _PIECE_ROWS):
        here = (low <= rows) & (rows < low + _PIECE_ROWS)
        times = times_s[low : low + _PIECE_ROWS]
        piece = np.full((len(times), *values.shape[1:]), np.nan, np.result_type(values, np.float16))
        piece[rows[here] - low] = values[here]
        writer.append(piece, times)
