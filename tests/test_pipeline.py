"""The machine keeps batches full, gives every video its own rows in order, overlaps its stages and can be stopped."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from vacli import VacliError
from vacli.extract.pipeline import BATCH, Busy, Job, Machine, ahead


class Fatal(VacliError):
    fatal = True


class Spy:
    """An encoder that gives the value of each crop's first pixel and remembers what it was called with."""

    eats = "crops"

    def __init__(self, fits: int = 10**9, slow_s: float = 0.0) -> None:
        self.fits, self.slow_s, self.sizes = fits, slow_s, []

    def __call__(self, crops: np.ndarray) -> np.ndarray:
        if len(crops) > self.fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        if (crops == 255).any():
            raise RuntimeError("a crop it does not like")
        time.sleep(self.slow_s)
        self.sizes.append(len(crops))
        return crops[:, 0, 0, :1].astype(np.float32)


class Video:
    """A job: `count` crops whose pixel is the video's number, of every second row, in pieces."""

    def __init__(self, number: int, count: int, encoder: Spy, piece: int = 5, slow_s: float = 0.0) -> None:
        self.number, self.count, self.piece, self.slow_s = number, count, piece, slow_s
        self.values: list[float] = []
        self.rows: list[int] = []
        self.ended = self.let_go = False
        self.write_error: Exception | None = None
        self.job = Job(self.read, {"spy": encoder}, self)

    def read(self, job: Job) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        job.writing = self.write()
        next(job.writing)
        for low in range(0, self.count, self.piece):
            n = min(self.piece, self.count - low)
            time.sleep(self.slow_s)
            yield np.full((n, 4, 4, 3), self.number, np.uint8), 2 * np.arange(low, low + n)

    def write(self):
        try:
            while (sent := (yield)) is not None:
                if self.write_error:
                    raise self.write_error
                self.values += sent[0]["spy"][:, 0].tolist()
                self.rows += sent[1].tolist()
                time.sleep(self.slow_s)
            self.ended = True
        finally:
            self.let_go = not self.ended


def run(videos: list[Video], readers: int = 2, busy: Busy | None = None) -> list[Video]:
    machine = Machine(readers, busy or Busy())
    return [job.about for job in machine.run((v.job for v in videos), lambda _: None, lambda: None)]


def threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("vacli-")]


@pytest.mark.parametrize("readers", [1, 3])
def test_short_videos_share_full_batches(readers):
    spy = Spy()
    videos = [Video(n, 13, spy) for n in range(40)]
    done = run(videos, readers)
    assert sorted(v.number for v in done) == list(range(40))
    assert sum(spy.sizes) == 40 * 13
    assert all(size == BATCH for size in spy.sizes[:-1])


@pytest.mark.parametrize("piece", [1, 7, BATCH, 3 * BATCH])
def test_every_video_gets_its_own_rows_in_order(piece):
    spy = Spy()
    videos = [Video(n, 30 * n, spy, piece) for n in range(8)]
    run(videos, readers=3)
    for v in videos:
        assert v.values == [float(v.number)] * v.count
        assert v.rows == list(range(0, 2 * v.count, 2))
        assert v.ended
    assert threads() == []


def test_crops_of_another_size_wait_for_a_batch_of_their_own():
    spy, big = Spy(), Video(9, 3, Spy())
    big.job.encoders = {"spy": spy}
    read = big.read
    big.job.read = lambda job: ((np.repeat(crops, 2, 1), rows) for crops, rows in read(job))
    run([Video(1, 3, spy), big, Video(2, 3, spy)])
    assert sorted(spy.sizes) == [3, 6]
    assert big.values == [9.0] * 3


def test_a_batch_that_does_not_fit_is_halved_and_stays_so():
    spy = Spy(fits=20)
    videos = [Video(n, 50, spy) for n in range(6)]
    run(videos)
    assert max(spy.sizes) == 16  # 64, 32, 16
    assert all(v.values == [float(v.number)] * 50 and v.ended for v in videos)


def test_where_not_one_crop_fits_the_run_stops_and_says_so():
    with pytest.raises(VacliError, match="the memory does not hold one crop") as caught:
        run([Video(n, 5, Spy(fits=0)) for n in range(3)])
    assert caught.value.fatal
    assert threads() == []


def test_an_encoders_surprise_is_the_fault_of_one_video_alone():
    spy = Spy()
    videos = [Video(n if n != 2 else 255, 10, spy) for n in range(5)]
    done = run(videos)
    assert len(done) == 5
    for v in videos:
        guilty = v.number == 255
        assert (v.job.error is not None) == guilty == v.let_go
        assert v.ended == (not guilty)


@pytest.mark.parametrize("stage", ["read", "write"])
def test_a_surprise_of_one_video_does_not_stop_the_others(stage):
    spy = Spy()
    videos = [Video(n, 200, spy) for n in range(4)]
    if stage == "write":
        videos[1].write_error = RuntimeError("disk of its own")
    else:
        broken = videos[1].read
        videos[1].job.read = lambda job: itertools.chain(itertools.islice(broken(job), 3), broken_off())
    run(videos)
    assert [v.job.error is not None for v in videos] == [False, True, False, False]
    assert [v.ended for v in videos] == [True, False, True, True]
    assert videos[1].let_go


def broken_off():
    raise RuntimeError("no more of it")
    yield


@pytest.mark.parametrize("stage", ["plan", "read", "encode", "write"])
def test_what_would_befall_every_video_stops_the_run_and_leaves_nothing_open(stage):
    spy = Spy(slow_s=0.001)
    videos = [Video(n, 500, spy) for n in range(4)]
    jobs: Iterator[Job] = (v.job for v in videos)
    if stage == "plan":
        jobs = itertools.chain(itertools.islice(jobs, 2), fatal())
    elif stage == "read":
        videos[1].job.read = lambda job: fatal()
    elif stage == "write":
        videos[1].write_error = Fatal("the disk is full")
    else:
        spy.__class__ = type("Broken", (Spy,), {"__call__": lambda self, crops: next(fatal())})
    with pytest.raises(Fatal, match="the disk is full"):
        list(Machine(2, Busy()).run(jobs, lambda _: None, lambda: None))
    assert threads() == []
    assert all(v.ended or v.let_go or v.job.writing is None for v in videos)


def fatal():
    raise Fatal("the disk is full")
    yield


def test_an_interrupt_lets_go_of_all_that_was_not_whole():
    class Interrupted(Spy):
        def __call__(self, crops):
            if len(self.sizes) == 3:
                raise KeyboardInterrupt
            return super().__call__(crops)

    spy = Interrupted()
    videos = [Video(n, 90, spy) for n in range(6)]
    with pytest.raises(KeyboardInterrupt):
        run(videos)
    assert threads() == []
    assert not any(v.job.writing for v in videos if not v.ended)
    assert any(v.let_go for v in videos)


def test_reading_encoding_and_writing_overlap():
    spy = Spy(slow_s=0.03)
    video = Video(1, 20 * BATCH, spy, piece=BATCH, slow_s=0.03)
    began_s = time.monotonic()
    run([video])
    took_s = time.monotonic() - began_s
    assert took_s < 0.75 * 3 * 20 * 0.03  # one after the other they take 1.8 s, overlapped a third of it


def test_the_bottleneck_is_named():
    for slow in ("read", "encode", "write"):
        busy = Busy()
        with busy.at(slow):
            time.sleep(0.05)
        for other in ("read", "encode", "write"):
            busy.add(other, 0.005)
        assert busy.report(readers=1).endswith(f"the bottleneck is {slow}")


def test_ahead_gives_the_same_pieces_and_is_never_far_ahead():
    made = []

    def pieces():
        for i in range(50):
            made.append(i)
            yield i

    for taken, piece in enumerate(ahead(pieces(), depth=2)):
        assert piece == taken
        assert len(made) <= taken + 1 + 2 + 1  # given, in the queue, in the hand
    assert made == list(range(50))


def test_aheads_exception_comes_through_and_letting_go_ends_its_thread():
    with pytest.raises(RuntimeError, match="no more of it"):
        list(ahead(itertools.chain([1, 2], broken_off())))
    endless = ahead(itertools.count())
    assert next(endless) == 0
    endless.close()
    assert threads() == []
