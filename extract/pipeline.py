"""The run's machine: readers, full batches across videos through the encoders, and a writer, all at the same time."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from .. import VacliError
from .crops import BATCH
from .encoder import encode, pass_key

T = TypeVar("T")
_WAITING = 8  # pieces of crops read ahead of the encoders, and of values ahead of the writer
_IDLE_S = 10.0  # so long nothing came: what waits for a full batch is encoded as it is
_TICK_S = 0.2  # how often a waiting thread looks whether the run was stopped


class Busy:
    """Seconds that each stage of the run worked, over all its threads."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._lock = threading.Lock()
        self._began_s = time.monotonic()

    @contextlib.contextmanager
    def at(self, stage: str) -> Iterator[None]:
        began_s = time.monotonic()
        try:
            yield
        finally:
            self.add(stage, time.monotonic() - began_s)

    def add(self, stage: str, seconds: float) -> None:
        with self._lock:
            self._seconds[stage] = self._seconds.get(stage, 0.0) + seconds

    def seconds(self, stage: str) -> float:
        return self._seconds.get(stage, 0.0)

    def each(self, stage: str, pieces: Iterable[T]) -> Iterator[T]:
        """The same pieces; the time to make each of them is the stage's."""
        pieces = iter(pieces)
        while True:
            with self.at(stage):
                piece = next(pieces, None)
            if piece is None:
                return
            yield piece

    def report(self, readers: int) -> str:
        """One line: how much of its time each stage was busy, and which of them the others waited for."""
        wall_s = max(time.monotonic() - self._began_s, 1e-9)
        threads = {"read": readers, "faces": readers, "sound": readers, "encode": 1, "write": 1}
        shares = {name: self._seconds.get(name, 0.0) / wall_s / n for name, n in threads.items()}
        told = ", ".join(f"{name} {share:.0%}" for name, share in shares.items() if name in self._seconds)
        reading = shares["read"] + shares["faces"] + shares["sound"]  # they take turns in the same threads
        of_three = max(("read", "faces", "sound"), key=shares.__getitem__)
        slowest = max(
            ((reading, of_three), (shares["encode"], "encode"), (shares["write"], "write")),
            key=lambda s: s[0],
        )
        return f"{wall_s:.1f} s; busy: {told}; the bottleneck is {slowest[1]}"


class Stopped(Exception):
    """The run is over; a thread that meets this lets go of what it holds."""


def ahead(pieces: Iterable[T], depth: int = 2) -> Generator[T, None, None]:
    """The same pieces, in order, made in a thread of their own up to `depth` ahead; its exception comes through."""
    made: queue.Queue[tuple[bool, Any]] = queue.Queue(depth)
    over = threading.Event()

    def put(item: tuple[bool, Any]) -> None:
        while not over.is_set():
            with contextlib.suppress(queue.Full):
                made.put(item, timeout=_TICK_S)
                return
        raise Stopped

    def make() -> None:
        try:
            for piece in pieces:
                put((True, piece))
            put((False, None))
        except Stopped:
            pass
        except BaseException as e:
            with contextlib.suppress(Stopped):
                put((False, e))

    thread = threading.Thread(target=make, name="vacli-ahead", daemon=True)
    thread.start()
    try:
        while True:
            more, piece = made.get()
            if more:
                yield piece
            elif piece is None:
                return
            else:
                raise piece
    finally:
        over.set()
        thread.join()


Rows = tuple[dict[str, np.ndarray], np.ndarray]  # by encoder, values (n, ...); of which rows (n,)


@dataclass(eq=False)
class Job:
    """One video on its way through the machine.

    read: gives (crops (n, H, W, 3), rows (n,)), doing on the way whatever else is to be made of the video; it may set
    `writing`. encoders: those that eat the crops. writing: a generator, started, that is sent Rows in order and None
    at the end. encoded: told, in the calling thread, of which rows the crops were encoded. error: why it could not be
    done.
    """

    read: Callable[[Job], Iterator[tuple[np.ndarray, np.ndarray]]]
    encoders: dict[str, Any]
    about: Any = None
    encoded: Callable[[np.ndarray], None] = lambda _: None
    writing: Generator[None, Rows | None, None] | None = None
    error: Exception | None = None
    waiting: int = field(default=0, init=False)  # crops that were read and are not with the writer yet
    been_read: bool = field(default=False, init=False)
    ended: bool = field(default=False, init=False)  # the writer was told that no more is to come

    def let_go(self) -> None:
        """What was written of it so far is nothing."""
        if self.writing is not None:
            self.writing.close()
            self.writing = None


class Machine:
    """Runs jobs; see `run`. readers: how many videos are read at the same time."""

    def __init__(self, readers: int, busy: Busy) -> None:
        self._readers, self._busy = readers, busy
        self._stop, self._awaited = threading.Event(), threading.Event()
        self._room = threading.Semaphore(_WAITING + readers)
        self._events: queue.SimpleQueue[tuple[str, Any, Any]] = queue.SimpleQueue()
        self._to_read: queue.Queue[Job | None] = queue.Queue(readers)
        self._to_write: queue.Queue[tuple[Job, Rows | None]] = queue.Queue(_WAITING)
        self._batches = Batches(busy)
        self._alive: set[Job] = set()

    def run(
        self, jobs: Iterator[Job], asked: Callable[[Any], None], tick: Callable[[], None]
    ) -> Generator[Job, None, None]:
        """The jobs as they are done, one way or the other: `error` says why one could not be.

        jobs: iterated in a thread of its own, as far ahead as there are readers. asked: called here, in the calling
        thread, with what that thread hands to `ask`. tick: called here every now and then. An error that is `fatal`,
        and what interrupts the calling thread, stops everything and is raised.
        """
        threads = [threading.Thread(target=self._read, name=f"vacli-read-{i}") for i in range(self._readers)]
        threads += [
            threading.Thread(target=self._plan, args=(jobs,), name="vacli-plan"),
            threading.Thread(target=self._write, name="vacli-write"),
        ]
        for thread in threads:
            thread.daemon = True  # a second Ctrl-C need not wait for a decoder
            thread.start()
        try:
            yield from self._conduct(asked, tick)
        finally:
            self._stop.set()
            for thread in threads:
                thread.join()
            for job in self._alive:
                job.let_go()

    def ask(self, question: Any) -> None:
        """For the thread that iterates the jobs: have `asked` called in the main thread, and wait for it."""
        answered = threading.Event()
        self._events.put(("ask", question, answered))
        while not answered.wait(_TICK_S):
            self._go_on()

    def wait(self) -> None:
        """A moment, for the thread that iterates the jobs: there is none before something else is done."""
        self._awaited.set()
        self._stop.wait(_TICK_S)
        self._awaited.clear()
        self._go_on()

    def watched(self, pieces: Iterable[T]) -> Iterator[T]:
        """The same pieces, for a thread that reads: it ends when the run does."""
        for piece in pieces:
            self._go_on()
            yield piece

    # ---- the calling thread: it encodes ----------------------------------------------------------------------

    def _conduct(self, asked: Callable[[Any], None], tick: Callable[[], None]) -> Iterator[Job]:
        planned, last_s = False, time.monotonic()
        while self._alive or not planned:
            tick()
            try:
                kind, subject, more = self._events.get(timeout=_TICK_S)
            except queue.Empty:
                self._encode_the_rest(planned or self._awaited.is_set(), time.monotonic() - last_s)
                continue
            last_s = time.monotonic()
            if kind == "fatal":
                raise subject
            if kind == "ask":
                asked(subject)
                more.set()
            elif kind == "planned":
                planned = True
            elif kind == "done":
                self._alive.discard(subject)
                yield subject
            else:
                self._advance(kind, subject, more)
            self._encode_the_rest(planned, 0.0)

    def _encode_the_rest(self, no_more: bool, idle_s: float) -> None:
        """Where nothing is to come that could fill a batch, or not for long."""
        if idle_s > _IDLE_S or (no_more and all(job.been_read for job in self._alive)):
            self._hand_over(self._batches.rest())

    def _advance(self, kind: str, job: Job, what: Any) -> None:
        if kind == "job":
            self._alive.add(job)
        elif kind == "crops":
            self._room.release()
            if not job.error:
                self._hand_over(self._batches.add(job, *what))
        else:  # read, to its end or to an error
            job.been_read = True
            if what is not None:
                self._fail(job, what)
            self._end(job)

    def _hand_over(self, encoded: Iterable[tuple[Job, Rows | Exception]]) -> None:
        for job, rows in encoded:
            if isinstance(rows, Exception):
                self._fail(job, rows)
            else:
                job.waiting -= len(rows[1])
                self._put(self._to_write, (job, rows))
                job.encoded(rows[1])
            self._end(job)

    def _fail(self, job: Job, error: Exception) -> None:
        if getattr(error, "fatal", False):
            raise error
        job.error = job.error or error
        self._batches.forget(job)

    def _end(self, job: Job) -> None:
        """The writer is told once nothing more is to come of it."""
        if job.been_read and not job.ended and (job.error or not job.waiting):
            job.ended = True
            self._put(self._to_write, (job, None))

    # ---- the other threads -----------------------------------------------------------------------------------

    def _plan(self, jobs: Iterator[Job]) -> None:
        try:
            for job in jobs:
                self._events.put(("job", job, None))
                self._put(self._to_read, job)
            for _ in range(self._readers):
                self._put(self._to_read, None)
            self._events.put(("planned", None, None))
        except Stopped:
            pass
        except BaseException as e:
            self._events.put(("fatal", e, None))

    def _read(self) -> None:
        with contextlib.suppress(Stopped):
            while (job := self._get(self._to_read)) is not None:
                try:
                    for crops, rows in self.watched(job.read(job)):
                        if job.error:  # of encoding or writing it
                            break
                        while not self._room.acquire(timeout=_TICK_S):
                            self._go_on()
                        self._events.put(("crops", job, (crops, rows)))
                    self._events.put(("read", job, None))
                except Stopped:
                    raise
                except Exception as e:
                    self._events.put(("read", job, e))
                except BaseException as e:  # an encoder's SystemExit must not end this thread unheard
                    self._events.put(("fatal", e, None))

    def _write(self) -> None:
        with contextlib.suppress(Stopped):
            while True:
                job, rows = self._get(self._to_write)
                try:
                    if not job.error and job.writing is not None:
                        with self._busy.at("write"), contextlib.suppress(StopIteration):
                            job.writing.send(rows)
                except Exception as e:
                    job.error = e
                    if getattr(e, "fatal", False):
                        self._events.put(("fatal", e, None))
                if rows is None:
                    with contextlib.suppress(OSError):  # it is nothing already
                        job.let_go()
                    self._events.put(("done", job, None))

    def _put(self, where: queue.Queue, what: Any) -> None:
        while True:
            self._go_on()
            with contextlib.suppress(queue.Full):
                where.put(what, timeout=_TICK_S)
                return

    def _get(self, where: queue.Queue) -> Any:
        while True:
            self._go_on()
            with contextlib.suppress(queue.Empty):
                return where.get(timeout=_TICK_S)

    def _go_on(self) -> None:
        if self._stop.is_set():
            raise Stopped


# ---- batches -------------------------------------------------------------------------------------------------


class Batches:
    """Crops of many videos made into full batches, encoded, and given back to each video in its order."""

    def __init__(self, busy: Busy) -> None:
        self._busy = busy
        self._waiting: dict[Any, list[tuple[Job, np.ndarray, np.ndarray]]] = {}
        self._most: dict[tuple[str, ...], int] = {}  # of encoders that met the end of the memory

    def add(self, job: Job, crops: np.ndarray, rows: np.ndarray) -> Iterator[tuple[Job, Rows | Exception]]:
        """Takes crops (n, H, W, 3); gives what the batches that are full now were encoded to."""
        key = (crops.shape[1:], tuple(job.encoders))
        for (
            size,
            others,
        ) in self._waiting.items():  # its rows go to the writer in order, so those before first
            while size != key and any(p[0] is job for p in others):
                yield from self._encode(_taken(others, BATCH))
        if job.error:
            return
        job.waiting += len(rows)
        pieces = self._waiting.setdefault(key, [])
        pieces.append((job, crops, rows))
        while sum(len(p[2]) for p in pieces) >= BATCH:
            yield from self._encode(_taken(pieces, BATCH))

    def rest(self) -> Iterator[tuple[Job, Rows | Exception]]:
        """All that still waits for a full batch, encoded as it is."""
        for pieces in self._waiting.values():
            while pieces:
                yield from self._encode(_taken(pieces, BATCH))

    def forget(self, job: Job) -> None:
        """Nothing of it waits any more."""
        job.waiting = 0
        for pieces in self._waiting.values():
            pieces[:] = [p for p in pieces if p[0] is not job]

    def _encode(
        self, pieces: list[tuple[Job, np.ndarray, np.ndarray]]
    ) -> Iterator[tuple[Job, Rows | Exception]]:
        """One batch. An encoder's surprise is the fault of one video: then each is encoded alone to see whose."""
        encoders = pieces[0][0].encoders
        try:
            with self._busy.at("encode"):
                values = self._within_memory(encoders, np.concatenate([crops for _, crops, _ in pieces]))
        except Exception as e:
            if getattr(e, "fatal", False) or len({id(job) for job, _, _ in pieces}) == 1:
                yield pieces[0][0], e
                return
            for job in dict.fromkeys(job for job, _, _ in pieces):
                yield from self._encode([p for p in pieces if p[0] is job])
            return
        start = 0
        for job, _, rows in pieces:
            end = start + len(rows)
            yield job, ({name: v[start:end] for name, v in values.items()}, rows)
            start = end

    def _within_memory(self, encoders: dict[str, Any], crops: np.ndarray) -> dict[str, np.ndarray]:
        """By encoder, values (n, ...). A batch that does not fit the memory is halved, and stays so."""
        values: dict[str, np.ndarray] = {}
        for names in _passes(encoders):
            group, parts, start = [encoders[n] for n in names], [], 0
            while start < len(crops):
                most = self._most.get(names, len(crops))
                try:
                    parts.append(encode(group, crops[start : start + most]))
                    start += most
                except Exception as e:
                    size = min(most, len(crops) - start)
                    if not _out_of_memory(e):
                        raise
                    if size == 1:
                        raise _TooSmall(
                            f"{names[0]}: the memory does not hold one crop ({e}); wanted more"
                        ) from e
                    self._most[names] = size // 2
                    _free_memory()
            values |= {n: np.concatenate(p) for n, p in zip(names, zip(*parts, strict=True), strict=True)}
        return values


class _TooSmall(VacliError):
    fatal = True


def _taken(
    pieces: list[tuple[Job, np.ndarray, np.ndarray]], most: int
) -> list[tuple[Job, np.ndarray, np.ndarray]]:
    """The first `most` crops of the pieces, which they are taken from."""
    taken = []
    while pieces and most:
        job, crops, rows = pieces[0]
        taken.append((job, crops[:most], rows[:most]))
        if len(rows) > most:
            pieces[0] = (job, crops[most:], rows[most:])
        else:
            pieces.pop(0)
        most -= len(taken[-1][2])
    return taken


def _passes(encoders: dict[str, Any]) -> list[tuple[str, ...]]:
    """The names of the encoders, those together that one pass serves."""
    groups: dict[Any, list[str]] = {}
    for name, encoder in encoders.items():
        key = pass_key(encoder)
        groups.setdefault(name if key is None else (key,), []).append(name)
    return [tuple(names) for names in groups.values()]


def _out_of_memory(e: Exception) -> bool:
    """Of the GPU, as torch says it, or of the machine."""
    text = str(e).lower()
    says = isinstance(e, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)
    return isinstance(e, MemoryError) or type(e).__name__ == "OutOfMemoryError" or says


def _free_memory() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
