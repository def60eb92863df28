"""Stores behind a URL: the same promises as on a disk, against an S3 server in this process and memory://."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import numpy as np
import pytest
import zarr
from click.testing import CliRunner
from vacli.cli_store import store as store_commands
from vacli.store import Damaged, Store, StoreError, Track, digest, entry, folder_name, keeper
from vacli.store.place import Place
from vacli.store.remote import RemotePlace, place_of

from .s3_server import CALLS, CHANGES, Killed, Layer, environment, forget_connections, s3_server

RECIPE = {"track": "mae", "version": 1}
FOLDER = folder_name(RECIPE)
MEDIA = "ab" * 32
NAME = f"{FOLDER}/{MEDIA[:24]}"
NAMED = {"mae": {"folder": FOLDER, "media": MEDIA}}


def track(seed: int = 0, rows: int = 50) -> Track:
    values = np.random.default_rng(seed).normal(size=(rows, 8)).astype(np.float16)
    values[: rows // 5] = np.nan
    return Track(values, np.arange(rows) / 25)


def same(a: Track, b: Track) -> bool:
    return bool(np.array_equal(a.values, b.values, equal_nan=True) and np.array_equal(a.times_s, b.times_s))


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with s3_server() as address:
        yield address


@pytest.fixture
def machine(tmp_path, monkeypatch) -> Callable[..., Store]:
    """Opens a store as a machine (a cache of its own) of that name does."""

    def opened(url: str, name: str = "here", create: bool = True) -> Store:
        monkeypatch.setenv("VACLI_CACHE", str(tmp_path / name))
        return Store(url, create=create)

    return opened


@pytest.fixture
def memory() -> Iterator[str]:
    url = f"memory://{uuid.uuid4().hex}/features.zarr"
    yield url
    fs, root = fsspec.url_to_fs(url)
    for path in [p for p in fs.store if p.startswith(root)]:
        del fs.store[path]
    fs.pseudo_dirs[:] = [p for p in fs.pseudo_dirs if not f"{p}/".startswith(root.rpartition("/")[0])]


@pytest.fixture
def bucket(server) -> str:
    name = f"bucket-{uuid.uuid4().hex}"
    fsspec.filesystem("s3", use_listings_cache=False).mkdir(name)
    return f"s3://{name}/features.zarr"


@pytest.fixture(autouse=True)
def _unflushed(monkeypatch):
    """Whether the disk of the cache keeps what it was given is a matter of other tests, and takes most of the time."""
    monkeypatch.setattr("vacli.store.disk.os.fsync", lambda fd: None)


@pytest.fixture(params=["memory", "s3"])
def url(request) -> str:
    return request.getfixturevalue("memory" if request.param == "memory" else "bucket")


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    """What the listings take for the time; `later` moves it."""
    now = SimpleNamespace(late_s=0.0)
    now.later = lambda s: setattr(now, "late_s", now.late_s + s)
    moved = SimpleNamespace(
        monotonic=lambda: time.monotonic() + now.late_s, time=lambda: time.time() + now.late_s
    )
    monkeypatch.setattr("vacli.store.bucket.time", moved)
    monkeypatch.setattr("vacli.store.remote.time", moved)
    return now


def objects(url: str, below: str = "") -> dict[str, bytes]:
    """What lies behind a URL, by the path from there."""
    fs, root = fsspec.url_to_fs(url, use_listings_cache=False)
    found = fs.find(f"{root}/{below}".rstrip("/"))
    return {p.removeprefix(f"{root}/"): fs.cat_file(p) for p in found}


def overwrite(url: str, path: str, data: bytes | None) -> None:
    fs, root = fsspec.url_to_fs(url, use_listings_cache=False)
    if data is None:
        fs.rm_file(f"{root}/{path}")
    else:
        fs.pipe_file(f"{root}/{path}", data)


def only(paths: Any, ending: str) -> str:
    [found] = [p for p in paths if p.endswith(ending)]
    return found


def refused(doing: Callable[[], Any]) -> str:
    with pytest.raises(StoreError) as told:
        doing()
    assert "\n" not in str(told.value)
    return str(told.value)


# ---- the same as on a disk -----------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [0, 50])
def test_what_was_put_comes_back_the_same_everywhere(url, machine, rows):
    here = machine(url)
    here.put(RECIPE, MEDIA, track(rows=rows), {"note": "x"})
    here.link("v/1", {"root": "/r", "media": MEDIA, "split": "train"}, NAMED)
    there = machine(url, "there", create=False)
    for store in (here, there):
        assert store.has(RECIPE, MEDIA)
        assert same(store.get(RECIPE, MEDIA), track(rows=rows))
        assert same(store.map(RECIPE, MEDIA), track(rows=rows))
        assert store.provenance(RECIPE, MEDIA)["note"] == "x"
        assert store.entries() == [NAME]
        assert store.recipe_of(FOLDER) == RECIPE
        assert store.videos() == {"v/1": {"root": "/r", "media": MEDIA, "split": "train", "tracks": NAMED}}
        assert [what for _, _, what in store.verify()] == [None]
    assert not store.has({**RECIPE, "version": 2}, MEDIA)
    with pytest.raises(KeyError):
        store.get(RECIPE, "cd" * 32)


def test_the_cache_is_an_ordinary_store_of_the_same_files(url, machine):
    machine(url).put(RECIPE, MEDIA, track())
    there = machine(url, "there")
    there.link("v", {"root": "/r", "media": MEDIA, "split": None}, NAMED)
    there.get(RECIPE, MEDIA)
    for store in (machine(url), there):
        for path, data in objects(url).items():
            if path.startswith(("mae@", "zarr.json")):
                assert (store.path / path).read_bytes() == data
        offline = Store(store.path)
        assert same(offline.get(RECIPE, MEDIA), track())
        assert [what for _, _, what in offline.verify()] == [None]
    assert offline.videos() == there.videos()


def test_plain_zarr_reads_the_bucket(bucket, machine):
    store = machine(bucket)
    store.put(RECIPE, MEDIA, track())
    store.link("v", {"root": "/r", "media": MEDIA, "split": None}, NAMED)
    remote = zarr.storage.FsspecStore.from_url(bucket, read_only=True)
    try:
        root = zarr.open_group(remote, mode="r")
        arrays = {p: a for p, a in root.members(max_depth=None) if isinstance(a, zarr.Array)}
        assert same(track(), Track(*(arrays[only(arrays, f"/{n}")][:] for n in ("values", "times_s"))))
        assert root[FOLDER].attrs["vacli"]["recipe"] == RECIPE
    finally:
        zarr.core.sync.sync(close(remote.fs))


async def close(fs: Any) -> None:
    await (await fs.set_session()).close()


@pytest.mark.parametrize("number", [1, 2])
def test_a_folder_copied_into_a_bucket_is_the_same_store(number, memory, machine, tmp_path):
    """number: of the store's format."""
    if number == 1:
        local = Store(Path(__file__).parent / "data" / "store_format_1.zarr")
    else:
        local = Store(tmp_path / "local.zarr", create=True)
        local.put(RECIPE, MEDIA, track())
        local.link("v", {"root": "/r", "media": MEDIA, "split": None}, NAMED)
    fs, root = fsspec.url_to_fs(memory)
    for path in (p for p in local.path.rglob("*") if p.is_file()):
        fs.pipe_file(f"{root}/{path.relative_to(local.path)}", path.read_bytes())
    for create in (False, True):
        remote = machine(memory, create=create)
        assert remote.videos() == local.videos()
        assert remote.entries() == local.entries()
        assert all(same(remote.read(n), local.read(n)) for n in local.entries())
    remote.put(RECIPE, "cd" * 32, track(1))
    for path, data in objects(memory).items():
        (tmp_path / "back" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "back" / path).write_bytes(data)
    back = Store(tmp_path / "back")
    assert back.videos() == local.videos()
    assert same(back.get(RECIPE, "cd" * 32), track(1))
    assert [what for _, _, what in back.verify() if what] == []


def test_a_tombstone_gives_way_to_a_track_and_a_track_to_nothing(url, machine):
    here, there = machine(url), machine(url, "there")
    here.fail(RECIPE, MEDIA, "no sound")
    assert there.failure(RECIPE, MEDIA) == "no sound"
    assert not there.has(RECIPE, MEDIA)
    there.put(RECIPE, MEDIA, track(1))
    here.fail(RECIPE, MEDIA, "again")
    here.put(RECIPE, MEDIA, track(2))
    for store in (there, here, machine(url, "third")):
        assert same(store.get(RECIPE, MEDIA), track(1))
        assert store.failure(RECIPE, MEDIA) is None


def test_a_track_written_batch_by_batch_or_not_at_all(memory, machine):
    store = machine(memory)
    with contextlib.suppress(Killed), store.writing(RECIPE, MEDIA, 50, (8,), np.float16) as writer:
        writer.append(track().values[:20], track().times_s[:20])
        raise Killed
    assert not store.has(RECIPE, MEDIA)
    assert not objects(memory, NAME)
    with store.writing(RECIPE, MEDIA, 50, (8,), np.float16) as writer:
        writer.append(track().values[:20], track().times_s[:20])
        writer.append(track().values[20:], track().times_s[20:])
    assert same(store.get(RECIPE, MEDIA), track())


def test_what_is_removed_is_gone_everywhere(url, machine, clock):
    here, there = machine(url), machine(url, "there")
    here.put(RECIPE, MEDIA, track())
    here.link("v", {"root": "/r", "media": MEDIA, "split": None}, NAMED)
    assert same(there.get(RECIPE, MEDIA), track())
    assert keeper.remove(here, "v", []) == [NAME]
    assert not here.has(RECIPE, MEDIA)
    assert not there.videos()
    assert not objects(url, NAME)
    assert not (here.path / NAME).exists()
    clock.later(61)  # a yes is believed for a minute
    assert not there.has(RECIPE, MEDIA)
    with pytest.raises(KeyError):
        there.get(RECIPE, MEDIA)  # although it lies in the cache there
    here.put(RECIPE, "cd" * 32, track())
    here.drop(FOLDER)
    assert not here.folders()
    assert not objects(url, FOLDER)


def test_house_keeping_works_on_a_url(memory, machine, tmp_path):
    pytest.importorskip("h5py")
    store = machine(memory)
    store.put(RECIPE, MEDIA, track())
    store.link("v", {"root": "/r", "media": MEDIA, "split": None}, NAMED)

    def vacli(*args: str) -> str:
        result = CliRunner().invoke(store_commands, [*args, "--store", memory], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output

    assert "50" in vacli("ls")
    assert FOLDER in vacli("show", "v")
    assert "0 damaged" in vacli("verify")
    assert "total" in vacli("du")
    assert "nothing" in vacli("gc", "--runs", str(tmp_path))
    vacli("export", str(tmp_path / "out.h5"))
    vacli("rm", "v", "--yes")
    assert not machine(memory, "there").entries()
    vacli("import", str(tmp_path / "out.h5"))
    assert same(machine(memory, "third").get(RECIPE, MEDIA), track())


# ---- round trips ---------------------------------------------------------------------------------------------


def test_a_second_read_fetches_nothing(url, machine):
    machine(url).put(RECIPE, MEDIA, track())
    store = machine(url, "there")
    store.get(RECIPE, MEDIA)
    layer = Layer.over(store)
    assert same(store.get(RECIPE, MEDIA), track())
    assert layer.calls == []


def test_the_next_process_lists_and_fetches_no_track(bucket, machine):
    machine(bucket).put(RECIPE, MEDIA, track())
    machine(bucket, "there").get(RECIPE, MEDIA)
    store = machine(bucket, "there")
    layer = Layer.over(store)
    assert same(store.get(RECIPE, MEDIA), track())
    assert [what for what, _ in layer.calls] == ["find"]  # S3 lists the MD5 of the record: it is the cache's


def many(url: str, videos: int, recipes: int) -> list[tuple[dict[str, Any], str]]:
    """The objects of many small entries, laid down without a store; their keys."""
    fs, root = fsspec.url_to_fs(url)
    keys = []
    for number in range(recipes):
        recipe = {"track": f"t{number}", "version": 1}
        fs.pipe_file(f"{root}/{folder_name(recipe)}/zarr.json", entry.group_json({"recipe": recipe}))
        for video in range(videos):
            media = f"{video:08x}" * 8
            arrays = {"values": ([1, 2], "float16"), "times_s": ([1], "float64")}
            about = {n: {"shape": s, "dtype": d, "crc32c": 0} for n, (s, d) in arrays.items()}
            record = {"recipe": digest(recipe), "media": media, "provenance": {}, "attempt": "0123abcd"}
            record["arrays"] = about
            base = f"{root}/{folder_name(recipe)}/{media[:24]}"
            fs.pipe_file(f"{base}/0123abcd/zarr.json", b"{}")
            for name, array in about.items():
                fs.pipe_file(f"{base}/0123abcd/{name}/zarr.json", b"{}")
                chunk = f"{base}/0123abcd/{name}/{entry.chunk_name(len(array['shape']))}"
                fs.pipe_file(chunk, bytes(entry.chunk_bytes(array)))
            fs.pipe_file(f"{base}/zarr.json", entry.group_json({**record, "digest": digest(record)}))
            keys.append((recipe, media))
    return keys


def test_asking_for_thousands_takes_a_few_round_trips(memory, machine):
    store = machine(memory)
    keys = many(memory, videos=600, recipes=4)
    layer = Layer.over(store)
    assert all(store.has(recipe, media) for recipe, media in keys)
    assert not any(store.has(recipe, "ff" * 32) for recipe, _ in keys)
    assert len(layer.calls) == 4 * 3  # of each recipe itself, a listing, and all its records together
    assert len(store.entries()) == 2400
    assert len(layer.calls) == 4 * 3 + 1


def test_names_are_read_together(memory, machine):
    store = machine(memory)
    for number in range(20):
        store.link(f"v{number}", {"root": "/r", "media": MEDIA, "split": None}, NAMED)
    there = machine(memory, "there")
    layer = Layer.over(there)
    assert len(there.videos()) == 20
    assert [what for what, _ in layer.calls] == ["find", "cat_ranges"]


def test_names_are_written_over_what_is_there_now(memory, machine):
    """Not over what was read when the names of all videos were."""
    here, there = machine(memory), machine(memory, "there")
    for number in range(3):
        here.link(f"v{number}", {"root": "/r", "media": MEDIA, "split": None}, NAMED)
    assert list(there.videos()) == ["v0", "v1", "v2"]
    there.at.folders("videos")  # as a listing that was stopped there
    for store, name in ((here, "logmel"), (there, "faces")):
        store.link("v0", {"root": "/r", "media": MEDIA, "split": None}, {name: NAMED["mae"]})
    assert here.videos()["v0"]["tracks"].keys() == {"mae", "logmel", "faces"}
    here.unlink("v1")
    assert list(there.videos()) == list(Store(there.path).videos()) == ["v0", "v2"]


def test_what_came_is_seen_seconds_later(memory, machine, clock):
    here, there = machine(memory), machine(memory, "there")
    assert not there.has(RECIPE, MEDIA)
    here.put(RECIPE, MEDIA, track())
    clock.later(6)
    assert there.has(RECIPE, MEDIA)


# ---- the cache -----------------------------------------------------------------------------------------------


def test_the_cache_may_be_removed_at_any_time(url, machine):
    store = machine(url)
    store.put(RECIPE, MEDIA, track())
    seen = store.get(RECIPE, MEDIA)
    shutil.rmtree(store.path)
    assert same(store.get(RECIPE, MEDIA), track())
    assert same(seen, track())
    shutil.rmtree(store.path)
    store.link("v", {"root": "/r", "media": MEDIA, "split": None}, NAMED)
    store.put(RECIPE, "cd" * 32, track(1))
    assert list(store.videos()) == ["v"]
    assert same(machine(url).get(RECIPE, "cd" * 32), track(1))


def test_what_is_damaged_in_the_cache_is_fetched_again(memory, machine):
    machine(memory).put(RECIPE, MEDIA, track())
    store = machine(memory, "there")
    store.get(RECIPE, MEDIA)
    for path in [p for p in (store.path / NAME).rglob("*") if p.is_file()]:
        whole = path.read_bytes()
        for broken in (whole[:-1], whole[:9] + bytes([whole[9] ^ 1]) + whole[10:], b"", None):
            path.unlink()
            if broken is not None:
                path.write_bytes(broken)
            fresh = machine(memory, "there")
            assert same(fresh.get(RECIPE, MEDIA), track())
    assert objects(memory, NAME).keys() == objects(memory, NAME).keys()
    assert not objects(memory, ".quarantine")


def test_the_cache_lies_where_it_is_told_and_else_where_caches_lie(monkeypatch, tmp_path):
    monkeypatch.setenv("VACLI_CACHE", str(tmp_path / "own"))
    assert place_of("memory://a/b").path.parent == tmp_path / "own"
    monkeypatch.delenv("VACLI_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    first = place_of("memory://a/features.zarr/")
    assert first.path.parent == tmp_path / "xdg" / "vacli"
    assert first.path == place_of("memory://a/features.zarr").path
    assert first.path != place_of("memory://a-features.zarr").path
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert place_of("memory://a/b").path.parent == tmp_path / ".cache" / "vacli"
    assert not list(tmp_path.iterdir())  # made when it is opened


def test_a_file_url_is_a_folder(tmp_path):
    assert type(place_of(f"file://{tmp_path}/x.zarr")) is Place
    assert place_of(f"file://{tmp_path}/x.zarr").path == tmp_path / "x.zarr"
    assert type(place_of("features.zarr")) is Place
    Store(f"file://{tmp_path}/x.zarr", create=True).put(RECIPE, MEDIA, track())
    assert same(Store(tmp_path / "x.zarr").get(RECIPE, MEDIA), track())


def test_a_full_cache_is_told_in_one_line(memory, machine, monkeypatch):
    machine(memory).put(RECIPE, MEDIA, track())
    store = machine(memory, "there")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vacli.store.disk.NewFile.write", full)
    with pytest.raises(StoreError, match="VACLI_CACHE") as told:
        store.get(RECIPE, MEDIA)
    assert "\n" not in str(told.value)
    monkeypatch.undo()
    assert not [p for p in (store.path / ".staging").iterdir() if p.is_dir()]


# ---- whole or absent -----------------------------------------------------------------------------------------


def put_of(seed: int) -> Callable[[Store], None]:
    return lambda store: store.put(RECIPE, MEDIA, track(seed))


STEPS = {
    "a first put": (lambda store: None, put_of(1)),
    "a put over a tombstone": (lambda store: store.fail(RECIPE, MEDIA, "no"), put_of(1)),
    "a put where another track is": (put_of(0), put_of(1)),
    "a tombstone": (lambda store: None, lambda store: store.fail(RECIPE, MEDIA, "no")),
    "a removal": (put_of(0), lambda store: store.drop(NAME)),
    "names": (
        put_of(0),
        lambda store: store.link("v", {"root": "/r", "media": MEDIA, "split": None}, NAMED),
    ),
}


def calls_of(step: str, url: str, machine: Callable[..., Store]) -> int:
    before, doing = STEPS[step]
    store = machine(f"{url}/counted")
    before(store)
    layer = Layer.over(store)
    doing(store)
    return len(layer.calls)


def sound(store: Store) -> Track | None:
    """The track, if it is there; all else must be right."""
    assert [what for _, _, what in store.verify() if what] == []
    found = store.get(RECIPE, MEDIA) if store.has(RECIPE, MEDIA) else None
    assert found is None or same(found, track(0)) or same(found, track(1))
    assert store.videos().keys() <= {"v"}
    return found


def stop_at(layer: Layer, number: int, how: str) -> None:
    def stop(n: int) -> None:
        if n == number:
            raise ConnectionError("the cable is out") if how == "fails" else Killed

    if how == "half":
        layer.half = number
    else:
        layer.before = stop


def fail_at_the_record(layer: Layer, mishap: BaseException) -> None:
    """The arrays are put, and then this."""

    def stop(n: int) -> None:
        called, paths = layer.calls[n]
        if puts_the_record(called, paths):
            raise mishap

    layer.before = stop


@pytest.mark.parametrize("how", ["before", "half", "fails"])
@pytest.mark.parametrize("step", STEPS)
def test_stopped_at_any_call_it_is_whole_or_absent(step, how, memory, machine):
    before, doing = STEPS[step]
    for number in range(calls_of(step, memory, machine)):
        url = f"{memory}/{number}"
        store = machine(url, f"here{number}")
        before(store)
        stop_at(Layer.over(store), number, how)
        with pytest.raises((StoreError, Killed)) as stopped:
            doing(store)
        if how == "fails":
            assert "\n" not in str(stopped.value)
            assert "network" in str(stopped.value)
        sound(machine(url, f"there{number}", create=False))
        again = machine(url, f"here{number}")
        sound(again)
        again.put(RECIPE, MEDIA, track(1))
        again.link("v", {"root": "/r", "media": MEDIA, "split": None}, NAMED)
        for after in (again, machine(url, f"there{number}")):
            assert sound(after) is not None
            assert list(after.videos()) == ["v"]


@pytest.mark.parametrize("begun", [False, True])
def test_a_store_whose_making_was_stopped_is_absent_and_can_be_made(begun, memory, machine):
    if begun:
        overwrite(memory, "videos/zarr.json", entry.group_json({}))
    assert "no feature store" in refused(lambda: machine(memory, create=False))
    machine(memory).put(RECIPE, MEDIA, track())
    assert sound(machine(memory, "there", create=False)) is not None


def test_what_could_not_be_sent_is_sent_when_it_is_asked_for(url, machine):
    store = machine(url)
    fail_at_the_record(Layer.over(store), ConnectionError("the cable is out"))
    with pytest.raises(StoreError, match=r"sent by the next run"):
        store.put(RECIPE, MEDIA, track())
    assert not machine(url, "there").has(RECIPE, MEDIA)
    again = machine(url)
    assert again.has(RECIPE, MEDIA)  # sent, not computed again
    assert same(machine(url, "third").get(RECIPE, MEDIA), track())
    assert not list((again.path / ".upload").glob("mae@*/*/"))


def test_what_could_not_be_sent_gives_way_to_what_came_meanwhile(memory, machine):
    store = machine(memory)
    fail_at_the_record(Layer.over(store), ConnectionError("the cable is out"))
    with pytest.raises(StoreError):
        store.put(RECIPE, MEDIA, track(0))
    machine(memory, "there").put(RECIPE, MEDIA, track(1))
    assert same(machine(memory).get(RECIPE, MEDIA), track(1))
    assert same(machine(memory, "third").get(RECIPE, MEDIA), track(1))


# ---- many at once --------------------------------------------------------------------------------------------


def puts_the_record(what: str, paths: list[str]) -> bool:
    return what == "pipe_file" and paths[0].endswith(f"{NAME}/zarr.json")


@pytest.mark.parametrize("knows_create", [True, False])
@pytest.mark.parametrize("step", ["a first put", "a put over a tombstone"])
def test_two_writers_of_one_key_never_mix(step, knows_create, memory, machine):
    """The second writes all of its own between any two calls of the first."""
    for number in range(calls_of(step, memory, machine)):
        url = f"{memory}/{number}"
        mine, theirs = machine(url, "mine"), machine(url, "theirs")
        STEPS[step][0](mine)
        layer = Layer.over(mine)
        layer.knows_create = Layer.over(theirs).knows_create = knows_create
        layer.before = lambda n, at=number, other=theirs: n == at and other.put(RECIPE, MEDIA, track(1))
        mine.put(RECIPE, MEDIA, track(0))
        found = sound(machine(url, f"third{number}"))
        assert found is not None
        for store in (machine(url, "mine"), machine(url, "theirs")):
            assert same(store.get(RECIPE, MEDIA), found)
        if knows_create and step == "a first put":  # the first complete one stays, and alone
            mine_put = [n for n, call in enumerate(layer.calls) if puts_the_record(*call)]
            assert same(found, track(0 if mine_put and mine_put[0] < number else 1))
            assert len({p.split("/")[2] for p in objects(url, NAME)} - {"zarr.json"}) == 1


def test_eight_machines_at_once(bucket, machine):
    stores = [machine(bucket, f"machine{n}") for n in range(8)]
    media = ["01" * 32, "02" * 32]

    def work(n: int) -> None:
        for m in media if n % 2 else media[::-1]:
            stores[n].put(RECIPE, m, track(n))
            stores[n].get(RECIPE, m)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    for m in media:
        [found] = {machine(bucket, f"look{n}").get(RECIPE, m).values.tobytes() for n in range(2)}
        assert found in {track(n).values.tobytes() for n in range(8)}
        for store in stores:
            assert store.get(RECIPE, m).values.tobytes() == found
    last = machine(bucket, "last")
    assert [what for _, _, what in last.verify() if what] == []
    assert len(last.entries()) == 2


def test_eight_writers_on_one_machine(memory, machine):
    stores = [machine(memory) for _ in range(8)]

    def work(n: int) -> None:
        stores[n].put(RECIPE, MEDIA, track(n))
        stores[n].link("v", {"root": "/r", "media": MEDIA, "split": None}, {f"t{n}": NAMED["mae"]})

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    found = machine(memory, "there").get(RECIPE, MEDIA)
    assert any(same(found, track(n)) for n in range(8))
    assert all(same(store.get(RECIPE, MEDIA), found) for store in stores)
    assert stores[0].videos()["v"]["tracks"].keys() == {f"t{n}" for n in range(8)}
    assert not [p for p in (stores[0].path / ".staging").iterdir() if p.is_dir()]
    assert not list((stores[0].path / ".upload").glob("mae@*/*/"))


PUT_FOR_EVER = """
import sys
from vacli.store import Store
from tests.test_remote import RECIPE, track
store = Store(sys.argv[1], create=True)
print("ready", flush=True)
for n in range(int(sys.argv[2]), 10**6):
    store.put(RECIPE, f"{n:08x}" * 8, track(n))
    print(n, flush=True)
"""


@pytest.mark.slow
def test_killed_at_any_moment_nothing_is_wrong_and_nothing_acknowledged_is_lost(server, bucket, machine):
    rng, said = np.random.default_rng(0), set()
    cache = str(machine(bucket).path.parent)
    for life in range(15):
        env = {**os.environ, **environment(server), "VACLI_CACHE": cache}
        command = [sys.executable, "-c", PUT_FOR_EVER, bucket, str(len(said))]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env=env, cwd=Path(__file__).parent.parent
        ) as p:
            assert p.stdout is not None
            assert p.stdout.readline() == "ready\n"
            threading.Timer(rng.uniform(0.1, 1.0), p.kill).start()
            said |= {int(line) for line in p.stdout.read().splitlines()}
        store = machine(bucket, f"look{life}")
        assert [what for _, _, what in store.verify() if what] == []
        for n in said:
            assert same(store.get(RECIPE, f"{n:08x}" * 8), track(n))
    assert len(said) > 15


# ---- damage --------------------------------------------------------------------------------------------------


def test_anything_changed_in_the_bucket_is_damage_or_the_right_track(memory, machine):
    machine(memory).put(RECIPE, MEDIA, track())
    whole = objects(memory, NAME)
    rng, damaged = np.random.default_rng(0), 0
    for path, data in whole.items():
        flips = [
            bytes(b ^ (i == at) << 3 for i, b in enumerate(data)) for at in rng.integers(len(data), size=2)
        ]
        swapped = next(other for p, other in whole.items() if p != path)
        for broken in (*flips, data[:-1], data + b"\0", b"", swapped, None):
            overwrite(memory, path, broken)
            shutil.rmtree(machine(memory, "there").path)
            store = machine(memory, "there")
            try:
                assert same(store.get(RECIPE, MEDIA), track())
                assert path.count("/") < 4  # a blank of the record, or the bare group above the arrays
            except (Damaged, KeyError):
                damaged += 1
                assert not store.has(RECIPE, MEDIA)
                store.put(RECIPE, MEDIA, track())
                assert same(store.get(RECIPE, MEDIA), track())
            overwrite_all(memory, whole)
    assert damaged > len(whole) * 3


def overwrite_all(url: str, whole: dict[str, bytes]) -> None:
    fs, root = fsspec.url_to_fs(url)
    for path in fs.find(f"{root}/{NAME}"):
        fs.rm_file(path)
    for path, data in whole.items():
        fs.pipe_file(f"{root}/{path}", data)


def test_a_flipped_bit_in_an_object_is_damage_and_set_aside(bucket, machine):
    machine(bucket).put(RECIPE, MEDIA, track())
    path = only(objects(bucket, NAME), "values/c.0.0")
    data = bytearray(objects(bucket)[path])
    data[700] ^= 4
    overwrite(bucket, path, bytes(data))
    store = machine(bucket, "there")
    assert store.has(RECIPE, MEDIA)  # its sizes are right
    with pytest.raises(Damaged, match="checksum"):
        store.get(RECIPE, MEDIA)
    assert not store.has(RECIPE, MEDIA)
    assert len([p for p in objects(bucket, ".quarantine") if p.endswith("c.0.0")]) == 1
    store.put(RECIPE, MEDIA, track())
    assert same(store.get(RECIPE, MEDIA), track())
    [name] = [n for n in store.at.orphans() if n.startswith(".quarantine/")]
    store.drop(name)
    assert not [p for p in objects(bucket, ".quarantine") if p.endswith("c.0.0")]


def test_verifying_reads_the_remote_and_not_the_cache(memory, machine):
    store = machine(memory)
    store.put(RECIPE, MEDIA, track())
    assert same(store.at.read(NAME, store.record(NAME), everything=True), track())
    path = only(objects(memory, NAME), "times_s/c.0")
    overwrite(memory, path, bytes(len(objects(memory)[path])))
    assert same(store.get(RECIPE, MEDIA), track())  # the cache's own is right
    with pytest.raises(Damaged):
        store.at.read(NAME, store.record(NAME), everything=True)


def test_uploads_that_were_stopped_are_garbage_a_day_later(url, machine, clock):
    store = machine(url)
    store.put(RECIPE, "cd" * 32, track())
    fail_at_the_record(Layer.over(store), Killed())
    with pytest.raises(Killed):
        store.put(RECIPE, MEDIA, track())
    there = machine(url, "there")
    attempts = {p.rpartition("/values")[0] for p in objects(url, NAME) if "/values/" in p}
    assert not there.at.orphans()
    clock.later(25 * 3600)
    assert there.at.orphans().keys() == attempts
    assert len(attempts) == 1
    left = attempts.pop()
    for name in there.at.orphans():
        there.drop(name)
    assert not objects(url, NAME)
    assert there.has(RECIPE, "cd" * 32)
    assert machine(url).has(RECIPE, MEDIA)  # its machine still sends it
    there.drop(left)  # an orphan no more since it was found
    assert same(machine(url, "third").get(RECIPE, MEDIA), track())


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record["arrays"].update({"../../../../../out": record["arrays"]["values"]}),
        lambda record: record.update(attempt="../../../../.."),
        lambda record: record["arrays"]["values"].update(shape=[2**47, 2**47]),
        lambda record: record["arrays"].update(times_s=[]),
    ],
)
def test_a_strangers_record_leads_to_no_file_outside_the_cache(change, memory, machine, tmp_path):
    machine(memory).put(RECIPE, MEDIA, track())
    record = entry.parse_group(objects(memory)[f"{NAME}/zarr.json"])
    record.pop("digest")
    change(record)
    overwrite(memory, f"{NAME}/zarr.json", entry.group_json({**record, "digest": digest(record)}))
    store = machine(memory, "there")
    with contextlib.suppress(Damaged, KeyError):
        assert same(store.get(RECIPE, MEDIA), track())
    outside = {p.relative_to(tmp_path).parts[0] for p in tmp_path.rglob("*")}
    assert outside == {"here", "there"}
    assert len(list((tmp_path / "there").iterdir())) == 1


# ---- what cannot be used -------------------------------------------------------------------------------------


def test_a_newer_format_is_refused_untouched(url, machine):
    machine(url)
    overwrite(url, "zarr.json", entry.group_json({"store_format": 3}))
    before = objects(url)
    for create in (True, False):
        assert "update vacli" in refused(lambda c=create: machine(url, "there", create=c))
    assert objects(url) == before


def test_a_place_with_other_things_in_it_is_no_store(url, machine):
    overwrite(url, "holiday.jpg", b"beach")
    for create in (True, False):
        assert "not a vacli store" in refused(lambda c=create: machine(url, create=c))
    assert list(objects(url)) == ["holiday.jpg"]


def test_no_bucket_no_keys_no_server_are_told_in_one_line(server, bucket, machine, monkeypatch):
    assert "bucket" in refused(lambda: machine("s3://there-is-none/features.zarr"))
    assert "bucket" in refused(lambda: machine("s3://there-is-none/features.zarr", create=False))
    assert "name of the bucket" in refused(lambda: machine("s3://Bad!Name/features.zarr"))
    assert "no feature store" in refused(lambda: machine(bucket, create=False))
    try:
        with monkeypatch.context() as without:
            without.delenv("AWS_ACCESS_KEY_ID")
            without.delenv("AWS_SECRET_ACCESS_KEY")
            forget_connections()
            assert "AWS_ACCESS_KEY_ID" in refused(lambda: machine(bucket))
        with monkeypatch.context() as without:
            without.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
            forget_connections()
            assert "network" in refused(lambda: machine(bucket))
    finally:
        forget_connections()


def test_a_bucket_that_vanishes_is_no_empty_store(bucket, machine, clock):
    store = machine(bucket)
    store.put(RECIPE, MEDIA, track())
    fsspec.filesystem("s3", use_listings_cache=False).rm(bucket.split("/")[2], recursive=True)
    assert "bucket" in refused(lambda: store.put(RECIPE, "cd" * 32, track()))
    clock.later(61)
    assert "bucket" in refused(lambda: store.has(RECIPE, MEDIA))
    assert "bucket" in refused(store.videos)
    assert "bucket" in refused(store.entries)


def failing(store: Store, calls: set[str], mishap: Exception) -> None:
    """From now on these calls of the store's file system fail."""
    layer = Layer.over(store)

    def fail(n: int) -> None:
        if layer.calls[n][0] in calls:
            raise mishap

    layer.before = fail


def test_with_keys_for_reading_only_one_can_read(memory, machine):
    machine(memory).put(RECIPE, MEDIA, track())
    store = machine(memory, "there", create=False)
    failing(store, CHANGES, PermissionError("Access Denied"))
    assert same(store.get(RECIPE, MEDIA), track())
    assert "keys" in refused(lambda: store.put(RECIPE, "cd" * 32, track()))
    assert "keys" in refused(lambda: store.drop(NAME))
    overwrite(memory, only(objects(memory, NAME), "times_s/c.0"), b"short")
    other = machine(memory, "third", create=False)
    failing(other, CHANGES, PermissionError("Access Denied"))
    assert not other.has(RECIPE, MEDIA)  # it cannot be set aside; it is not served


def test_offline_the_remote_is_told_and_the_cache_can_be_read(memory, machine):
    store = machine(memory)
    store.put(RECIPE, MEDIA, track())
    store.get(RECIPE, MEDIA)
    failing(store, CALLS, ConnectionError("no route to host"))
    assert same(store.get(RECIPE, MEDIA), track())  # what was listed a moment ago
    assert "network" in refused(store.videos)
    assert same(Store(store.path).get(RECIPE, MEDIA), track())


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "fsspec", None)
    assert "pip install 'vacli[s3]'" in refused(lambda: place_of("s3://bucket/features.zarr"))


@pytest.mark.parametrize("url", ["s3://", "s3:///", "nonsense://x/y", "s3://bucket/*.zarr"])
def test_what_is_no_address_is_refused(url):
    refused(lambda: place_of(url))


def test_a_remote_place_overrides_what_touches_the_store():
    """A method added to Place is looked at here: does it speak of the folder, or of the store?"""
    local = {"staging", "load_here", "save_here", "hidden", "alone", "replacing"}
    public = {
        n
        for n, what in vars(Place).items()
        if (not n.startswith("_") and callable(what)) or isinstance(what, property)
    }
    assert public - vars(RemotePlace).keys() == local
