"""Whole or absent, and many at once: disks that refuse, cut and lose, processes that are killed, crowds of them."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from vacli.store import Store, StoreError, disk, place

from . import fault_processes as processes
from .fault_deeds import (
    DEEDS,
    RECIPE,
    Scene,
    Step,
    contents,
    create,
    drop,
    fail,
    is_as_noted,
    left_in,
    link,
    media_of,
    notes_of,
    odd,
    put,
    remember,
    spoil,
)
from .fault_layer import CLEANING, REFUSALS, Cutting, Failing, Layer, NoLocks, Platter, survive, through, ways


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk():
    with through(Layer()):
        yield


@pytest.fixture
def folder(tmp_path) -> Iterator[Path]:
    """A folder in memory, where there is one: thousands of stores are made and removed."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(prefix="vacli-", dir=memory) as made:
        yield Path(made)


def fail_each_call(scene: Scene, errors_of: Callable[[int], tuple[int, ...]], for_good: bool = False) -> None:
    for n in itertools.count(1):
        for error in errors_of(n):
            with scene.store() as path:
                layer = Failing(n, error, for_good)
                left = left_in(path)
                said = scene.done_through(layer, path)
                if not layer.failed:
                    assert said is None
                    return
                if said is None:  # no false acknowledgement
                    assert set(layer.failed) <= {*CLEANING, "open"}
                    assert contents(path) == scene.after
                elif layer.failed[0] != "open":
                    assert said.startswith("cannot ")
                    assert os.strerror(error) in said
                if not set(layer.failed) & {*CLEANING}:
                    assert left_in(path) <= left, f"call {n}, {layer.failed}, left something behind"
                scene.check_after_failure(path)


@pytest.mark.parametrize("deed", DEEDS)
def test_whichever_call_fails_the_store_is_whole_and_says_so(deed, folder):
    fail_each_call(Scene(deed, folder), lambda n: (REFUSALS[n % 6],))


@pytest.mark.slow
@pytest.mark.parametrize("deed", DEEDS)
def test_whichever_call_fails_in_whichever_way(deed, folder):
    fail_each_call(Scene(deed, folder), lambda n: REFUSALS)


@pytest.mark.parametrize("deed", DEEDS)
def test_a_disk_that_fails_for_good_leaves_what_is_stored(deed, folder):
    fail_each_call(Scene(deed, folder), lambda n: (errno.EIO,), for_good=True)


@pytest.mark.parametrize("goes_on", [False, True])
@pytest.mark.parametrize("deed", DEEDS)
def test_a_write_cut_short_is_told_or_gone_on_with(deed, goes_on, folder):
    scene = Scene(deed, folder)
    for n in itertools.count(1):
        with scene.store() as path:
            layer = Cutting(n, goes_on)
            left = left_in(path)
            said = scene.done_through(layer, path)
            if goes_on or not layer.cut:
                assert said is None
                assert contents(path) == scene.after
            else:
                assert said is not None
                assert os.strerror(errno.ENOSPC) in said
                assert left_in(path) <= left
            if not layer.cut:
                return
            scene.check_after_failure(path)


# ---- a power cut ---------------------------------------------------------------------------------------------------


def check_every_cut(folder: Path, past: list[Step], deeds: list[Step], seeds: int) -> int:
    """Do the deeds; for a power cut before each call look at what it may leave. Returns how many that was."""
    base, left = folder / "disk", folder / "left"
    base.mkdir()
    for step in past:
        step(base / "s.zarr")
    said, first = [contents(base / "s.zarr")], []
    with through(Platter(base)) as platter:
        for deed in deeds:
            first.append(len(platter.cuts))  # the first call that is this deed's
            deed(base / "s.zarr")
            with through(Layer()):
                said.append(contents(base / "s.zarr"))
    cuts = [*platter.cuts, platter.now()]
    for number, cut in enumerate(cuts):
        done = sum(number >= n for n in first[1:]) + (cut is cuts[-1])  # acknowledged
        for choose in ways(number, seeds):
            survive(cut, left, choose)
            now = contents(left / "s.zarr")
            assert odd(now, said[done], said[min(done + 1, len(deeds))]) == {}, f"cut before call {number}"
            put(77)(create(left / "s.zarr").path)
            assert Store(left / "s.zarr").has(RECIPE, media_of(77))
            shutil.rmtree(left)
    return len(cuts) * (2 + seeds)


LIFE = [
    create,
    put(0),
    link(0, "mae"),
    fail(1),
    put(1),
    link(1, "mae"),
    link(0, "other"),
    remember,
    drop(0),
    put(2),
]


def test_a_power_cut_at_any_call_loses_nothing_acknowledged(folder):
    assert check_every_cut(folder, [], LIFE, seeds=1) > 400


@pytest.mark.slow
def test_a_power_cut_at_any_call_in_twenty_ways(folder):
    assert check_every_cut(folder, [], LIFE, seeds=18) > 3000


def test_a_power_cut_while_an_old_store_is_brought_up_to_date_keeps_it(folder):
    assert check_every_cut(folder, DEEDS["bringing an old store up to date"][0], [create], seeds=2) > 50


def test_what_a_killed_process_did_not_sync_is_safe_once_another_is_done(folder):
    base, left = folder / "disk", folder / "left"
    for n in itertools.count(1):
        base.mkdir()
        with through(Platter(base, dies=n)) as platter:
            try:
                put(0)(create(base / "deep" / "s.zarr").path)
            except StoreError:
                platter.dies = None
                put(0)(create(base / "deep" / "s.zarr").path)
            else:
                return
            cut = platter.now()
        survive(cut, left, lambda values: values[0])
        assert Store(left / "deep" / "s.zarr").has(RECIPE, media_of(0)), f"killed at call {n}"
        shutil.rmtree(left)
        shutil.rmtree(base)


def test_what_is_set_aside_survives_a_power_cut(folder):
    base, left = folder / "disk", folder / "left"
    base.mkdir()
    for step in (create, put(0), spoil(0, "size")):
        step(base / "s.zarr")
    with through(Platter(base)) as platter:
        assert not Store(base / "s.zarr").has(RECIPE, media_of(0))
    survive(platter.now(), left, lambda values: values[0])
    [aside] = (left / "s.zarr" / ".quarantine").glob("*/")
    assert list(aside.glob("values/c.*"))


# ---- kill -9 -------------------------------------------------------------------------------------------------------


def test_a_process_killed_at_any_call_leaves_all_whole_or_absent(folder):
    assert processes.apart(processes.die_at_every_call, folder) > 250


def test_a_hundred_kills_lose_nothing_acknowledged(tmp_path):
    assert processes.apart(processes.kill_at_random, tmp_path, 100) > 300


@pytest.mark.slow
def test_a_thousand_kills_lose_nothing_acknowledged(folder):
    assert processes.apart(processes.kill_at_random, folder, 1000) > 3000


@pytest.mark.parametrize("tracks", [40, pytest.param(400, marks=pytest.mark.slow)])
def test_a_job_killed_again_and_again_ends_as_one_left_alone(folder, tracks):
    assert processes.apart(processes.interrupt, folder, tracks) > tracks // 10


# ---- many at once --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("locks", [True, False], ids=["locks", "no locks"])
def test_eight_writers_and_two_readers_see_the_first_complete_track_and_nothing_else(folder, locks):
    assert processes.apart(processes.crowd, folder, 8, 125 if locks else 25, 150 if locks else 10, locks) > 2


@pytest.mark.slow
@pytest.mark.parametrize("locks", [True, False], ids=["locks", "no locks"])
def test_a_large_crowd(folder, locks):
    assert processes.apart(processes.crowd, folder, 8, 500, 300, locks) > 2


@pytest.mark.parametrize("locks", [True, False], ids=["locks", "no locks"])
@pytest.mark.parametrize("past", ["nothing", "a tombstone", "a broken track"])
def test_of_sixteen_that_put_one_track_the_first_stays_and_all_have_it(folder, past, locks):
    assert processes.apart(processes.race, folder, 16, past, locks) < 16


def test_a_track_removed_while_it_is_read_is_absent_and_not_damaged(folder, monkeypatch):
    path, real = folder / "s.zarr", place.Place.read

    def removed_meanwhile(self, *args, **options):
        drop(0)(path)
        return real(self, *args, **options)

    create(path)
    monkeypatch.setattr(place.Place, "read", removed_meanwhile)
    store = Store(path)
    for look in (lambda: store.get(RECIPE, media_of(0)), lambda: store.read(store.entries()[0])):
        put(0)(path)
        with pytest.raises(KeyError):
            look()
    put(0)(path)
    assert list(store.verify()) == []
    assert not (path / ".quarantine").exists()


def test_a_mark_that_a_killed_process_left_where_there_are_no_locks_holds_nobody_up_for_ever(
    folder, monkeypatch
):
    monkeypatch.setattr(disk, "fcntl", NoLocks())
    monkeypatch.setattr(disk, "_KILLED_S", 0.1)
    store = create(folder / "s.zarr")
    (store.path / ".staging" / "videos.lock").touch()
    link(0, "mae")(store.path)
    assert set(store.videos()) == {"v0"}
    assert not left_in(store.path)


def test_only_what_this_machine_would_see_locked_is_swept_within_a_day(folder):
    store = create(folder / "s.zarr")
    with store.at.staging() as staged:
        ours = staged.with_name(staged.name + "0")
    theirs = ours.with_name("another machine's")
    for minutes, swept in ((0, set()), (2, {ours}), (2000, {ours, theirs})):
        for left in (ours, theirs):
            left.mkdir(exist_ok=True)
            os.utime(left, (time.time() - 60 * minutes,) * 2)
        create(store.path)
        assert {left for left in (ours, theirs) if not left.exists()} == swept


# ---- a store that is not ours, or cannot be written ----------------------------------------------------------------


def test_who_may_only_read_reads_and_is_refused_the_rest_in_one_line(folder):
    told = processes.apart(processes.not_ours, folder)
    assert set(told) == {"put", "create", "new", "closed", "above"}
    for line in told.values():
        assert line.startswith("cannot ")
        assert "Permission denied" in line


@pytest.mark.parametrize("error", [errno.EROFS, errno.EACCES, errno.ENOSPC], ids=errno.errorcode.get)
def test_a_store_that_cannot_be_written_is_read_and_refuses_before_any_work(folder, error):
    path = folder / "s.zarr"
    for step in (create, put(0), link(0, "mae")):
        step(path)
    before = contents(path)
    with through(Failing(1, error, for_good=True, opens=False)):
        store = Store(path)
        assert contents(path) == before
        assert store.has(RECIPE, media_of(0))
        assert is_as_noted(store.get(RECIPE, media_of(0)), notes_of(0))
        assert not store.has(RECIPE, media_of(1))
        for step in (put(1), fail(1), link(0, "other"), remember, drop(0), create):
            with pytest.raises(StoreError, match=os.strerror(error)):
                step(path)
        with (
            pytest.raises(StoreError, match=os.strerror(error)),
            store.writing(RECIPE, media_of(1), 10**6, (4,), np.float16),
        ):
            pytest.fail("work has begun")
    assert contents(path) == before


def test_what_was_mended_since_it_was_found_broken_is_not_set_aside(folder, monkeypatch):
    path = folder / "s.zarr"
    for step in (create, put(0), spoil(0, "size")):
        step(path)
    reader, real = Store(path), place.Place.replacing

    def mended_meanwhile(self):
        monkeypatch.setattr(place.Place, "replacing", real)
        put(0)(path)
        return real(self)

    monkeypatch.setattr(place.Place, "replacing", mended_meanwhile)
    reader.has(RECIPE, media_of(0))
    assert is_as_noted(Store(path).get(RECIPE, media_of(0)), notes_of(0))
    assert len(list((path / ".quarantine").glob("*/"))) == 1


def test_a_copy_without_the_hidden_folders_is_a_store(folder):
    for step in (create, put(0), link(0, "mae")):
        step(folder / "s.zarr")
    shutil.copytree(folder / "s.zarr", folder / "copy.zarr", ignore=shutil.ignore_patterns(".*"))
    for step in (put(1), link(0, "other"), create):
        step(folder / "copy.zarr")
    assert len(contents(folder / "copy.zarr")) == 4


def test_a_file_system_that_knows_no_fsync_of_folders_is_written(folder):
    class Remote(Layer):
        def call(self, name, real, *args):
            if name == "fsync" and stat.S_ISDIR(os.fstat(args[0]).st_mode):
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            return real(*args)

    with through(Remote()):
        for step in (create, put(0), link(0, "mae")):
            step(folder / "s.zarr")
    assert len(contents(folder / "s.zarr")) == 3
