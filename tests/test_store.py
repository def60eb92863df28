"""The store: whole or absent, never stale, readable by anybody, and clear when it cannot be used."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import zarr
from vacli.store import Damaged, Store, StoreError, Track, folder_name

RECIPE = {"track": "mae", "version": 1}
MEDIA = "ab" * 32


def track(rows: int = 50, dim: int = 8, seed: int = 0) -> Track:
    values = np.random.default_rng(seed).normal(size=(rows, dim)).astype(np.float16)
    values[: rows // 5] = np.nan
    return Track(values, np.arange(rows) / 25)


def same(a: Track, b: Track) -> bool:
    return bool(np.array_equal(a.values, b.values, equal_nan=True) and np.array_equal(a.times_s, b.times_s))


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "features.zarr", create=True)


@pytest.mark.parametrize("rows", [0, 1, 50])
def test_what_was_put_comes_back_the_same(store, rows):
    store.put(RECIPE, MEDIA, track(rows))
    assert store.has(RECIPE, MEDIA)
    assert same(store.get(RECIPE, MEDIA), track(rows))


def test_tokens_and_float32_come_back_the_same(store):
    tokens = Track(np.ones((4, 3, 5), np.float32), np.arange(4.0))
    store.put(RECIPE, MEDIA, tokens)
    assert same(store.get(RECIPE, MEDIA), tokens)


def test_another_recipe_or_medium_is_another_track(store):
    store.put(RECIPE, MEDIA, track())
    assert not store.has({**RECIPE, "version": 2}, MEDIA)
    assert not store.has(RECIPE, "cd" * 32)
    with pytest.raises(KeyError):
        store.get(RECIPE, "cd" * 32)


def test_the_first_complete_one_stays(store):
    store.put(RECIPE, MEDIA, track(seed=0))
    store.put(RECIPE, MEDIA, track(seed=1))
    assert same(store.get(RECIPE, MEDIA), track(seed=0))
    assert not list((store.path / ".staging").glob("*/"))


def test_plain_zarr_opens_every_array(store):
    store.put(RECIPE, MEDIA, track())
    store.put(RECIPE, "cd" * 32, track(0))
    store.link("v", {"root": "/r", "media": MEDIA, "split": None}, {"mae": {"folder": "x", "media": MEDIA}})
    root = zarr.open_group(store.path, mode="r")
    entry = f"{folder_name(RECIPE)}/{MEDIA[:24]}"
    np.testing.assert_array_equal(root[f"{entry}/values"][:], track().values)
    np.testing.assert_array_equal(root[f"{entry}/times_s"][:], track().times_s)
    arrays = [name for name, node in root.members(max_depth=None) if isinstance(node, zarr.Array)]
    assert len(arrays) == 4
    assert dict(root[folder_name(RECIPE)].attrs)["vacli"]["recipe"] == RECIPE


def chunk(store: Store, name: str = "values"):
    return next((store.entry(RECIPE, MEDIA) / name).glob("c.*"))


def flip(path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("at", [0, 33, -1])
@pytest.mark.parametrize("name", ["values", "times_s"])
def test_a_flipped_bit_is_an_error_and_then_absent(store, name, at):
    store.put(RECIPE, MEDIA, track())
    flip(chunk(store, name), at)
    with pytest.raises(Damaged, match="checksum"):
        store.get(RECIPE, MEDIA)
    assert not store.has(RECIPE, MEDIA)
    store.put(RECIPE, MEDIA, track())
    assert same(store.get(RECIPE, MEDIA), track())


def test_any_flipped_bit_of_the_record_is_seen(store):
    store.put(RECIPE, MEDIA, track(3))
    record = store.entry(RECIPE, MEDIA) / "zarr.json"
    whole = record.read_bytes()
    blanks = {i for i, b in enumerate(whole) if chr(b).isspace()}
    for at in range(0, len(whole), 7):
        if at in blanks:
            continue  # a blank turned into another character may still be the same JSON
        record.parent.mkdir(exist_ok=True)
        record.write_bytes(whole)
        flip(record, at)
        try:
            found = json.loads(record.read_bytes())["attributes"]["vacli"]
        except (ValueError, KeyError):
            found = None
        if found == json.loads(whole)["attributes"]["vacli"]:
            continue  # the bit lay outside our part
        [(_, what)] = list(store.verify())
        assert what is not None, f"bit {at} went unseen"


@pytest.mark.parametrize("size", [0, 10, -5, +8])
def test_a_chunk_of_another_length_is_absent(store, size):
    store.put(RECIPE, MEDIA, track())
    path = chunk(store)
    os.truncate(path, size if size >= 0 else path.stat().st_size + size)
    assert not store.has(RECIPE, MEDIA)
    assert list((store.path / ".quarantine").glob("*/"))


def test_two_entries_swapped_are_seen(store):
    other = "cd" * 32
    store.put(RECIPE, MEDIA, track(seed=0))
    store.put(RECIPE, other, track(seed=1))
    a, b = store.entry(RECIPE, MEDIA), store.entry(RECIPE, other)
    a.rename(a.with_name("t"))
    b.rename(a)
    a.with_name("t").rename(b)
    assert not store.has(RECIPE, MEDIA)
    assert not store.has(RECIPE, other)


def test_a_link_out_of_the_store_is_not_followed(store, tmp_path):
    store.put(RECIPE, MEDIA, track())
    path = chunk(store)
    secret = tmp_path / "secret"
    path.rename(secret)
    path.symlink_to(secret)
    assert not store.has(RECIPE, MEDIA)


def test_verify_names_the_damaged_and_changes_nothing(store):
    store.put(RECIPE, MEDIA, track())
    store.put(RECIPE, "cd" * 32, track())
    flip(chunk(store), 40)
    found = dict(store.verify())
    assert sorted(what is not None for what in found.values()) == [False, True]
    assert dict(store.verify()) == found


def _snapshot(store: Store) -> list[str]:
    return sorted(str(p.relative_to(store.path)) for p in store.path.rglob("*"))


class FailingDisk:
    """The n-th call of one file-system function fails as on a full disk."""

    def __init__(self, monkeypatch, name: str) -> None:
        self.real, self.fail_at, self.calls = getattr(os, name), -1, 0
        monkeypatch.setattr(os, name, self)

    def __call__(self, *args, **kwargs):
        self.calls += 1
        if self.calls - 1 == self.fail_at:
            raise OSError(28, "No space left on device")
        return self.real(*args, **kwargs)


@pytest.mark.parametrize("call", ["posix_fallocate", "fsync", "rename", "open"])
def test_a_failing_disk_leaves_nothing_and_says_so(store, monkeypatch, call):
    other = "cd" * 32
    store.put(RECIPE, MEDIA, track())
    before = _snapshot(store)
    disk = FailingDisk(monkeypatch, call)
    for disk.fail_at in range(30):
        disk.calls = 0
        try:
            store.put(RECIPE, other, track())
        except StoreError as e:
            told = str(e)
        else:
            break  # it makes fewer calls than that
        assert re.search("No space left.*free some space", told)
        if not store.entry(RECIPE, other).exists():  # the last fsync fails after the rename: then it is whole
            assert _snapshot(store) == before
    assert disk.fail_at > 0
    assert same(store.get(RECIPE, MEDIA), track())
    assert same(store.get(RECIPE, other), track())


WRITER = """
import hashlib, sys, numpy as np
from vacli.store import Store, Track
store = Store(sys.argv[1], create=True)
seed = int(sys.argv[2])
print("ready", flush=True)
for i in range(100_000):
    media = hashlib.sha256(f"{seed} {i}".encode()).hexdigest()
    store.put({"track": "mae", "version": 1}, media, Track(np.full((200, 64), i % 1000, np.float16), np.arange(200.0)))
    print(media, i, flush=True)
"""


def _kill_a_writer(path, seed: int, after_s: float) -> list[tuple[str, int]]:
    """Media, with their numbers, that were acknowledged before the kill."""
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path), str(seed)], stdout=subprocess.PIPE, text=True
    )
    assert writer.stdout is not None
    assert writer.stdout.readline() == "ready\n"
    time.sleep(after_s)
    writer.send_signal(signal.SIGKILL)
    *acknowledged, _torn = writer.stdout.read().split("\n")
    writer.wait()
    writer.stdout.close()
    return [(line.split()[0], int(line.split()[1])) for line in acknowledged]


def _check_after_kills(path, kills: int) -> None:
    rng = np.random.default_rng(0)
    acknowledged: list[tuple[str, int]] = []
    for seed in range(kills):
        acknowledged += _kill_a_writer(path, seed, rng.uniform(0, 0.3))
    store = Store(path)
    assert all(what is None for _, what in store.verify())
    for media, number in acknowledged:
        assert (store.get(RECIPE, media).values == number % 1000).all()
    assert len(acknowledged) > kills


def test_kill_9_loses_nothing_acknowledged_and_leaves_nothing_half_written(tmp_path):
    _check_after_kills(tmp_path / "s.zarr", 10)


@pytest.mark.slow
def test_kill_9_two_hundred_times(tmp_path):
    _check_after_kills(tmp_path / "s.zarr", 200)


def test_what_a_killed_writer_left_is_swept(store):
    left = store.path / ".staging" / "dead"
    left.mkdir()
    (left / "part").write_bytes(b"x")
    Store(store.path, create=True)
    assert left.exists()  # younger than a minute: it may be somebody's
    os.utime(left, (1, 1))
    Store(store.path, create=True)
    assert not left.exists()


RACER = """
import hashlib, sys, numpy as np
from vacli.store import Store, Track
store = Store(sys.argv[1], create=True)
for i in range(40):
    media = hashlib.sha256(str(i).encode()).hexdigest()
    store.put({"track": "mae", "version": 1}, media, Track(np.full((50, 8), i, np.float16), np.arange(50.0)))
    store.link(f"v{i}", {"root": "/r", "media": media, "split": None}, {sys.argv[2]: {"folder": "f", "media": "m"}})
"""


def test_writers_of_the_same_tracks_do_not_mix(tmp_path):
    path = tmp_path / "s.zarr"
    racers = [subprocess.Popen([sys.executable, "-c", RACER, str(path), f"t{n}"]) for n in range(3)]
    assert [r.wait() for r in racers] == [0, 0, 0]
    store = Store(path)
    assert len(store.entries()) == 40
    for i in range(40):
        assert (store.get(RECIPE, hashlib.sha256(str(i).encode()).hexdigest()).values == i).all()
    assert all(set(facts["tracks"]) == {"t0", "t1", "t2"} for facts in store.videos().values())


def test_names_are_linked_relinked_and_never_shared(store):
    facts = {"root": "/data/a", "media": MEDIA, "split": "train"}
    store.link("v", facts, {"mae": {"folder": "f1", "media": MEDIA}})
    store.link("v", facts, {"logmel": {"folder": "f2", "media": MEDIA}})
    assert set(store.videos()["v"]["tracks"]) == {"mae", "logmel"}
    store.link("v", {**facts, "media": "cd" * 32}, {"mae": {"folder": "f1", "media": "cd" * 32}})
    assert set(store.videos()["v"]["tracks"]) == {
        "mae"
    }  # another file: what was made of the old one is not its
    with pytest.raises(StoreError, match="another one of that name"):
        store.link("v", {"root": "/data/b", "media": "ef" * 32, "split": None}, {})


def test_a_video_seen_from_another_folder_keeps_its_split(store):
    store.link("v", {"root": "/data", "media": MEDIA, "split": "validation"}, {})
    store.link("v", {"root": "/data/batch2", "media": MEDIA, "split": None}, {})
    assert store.videos()["v"]["split"] == "validation"


@pytest.mark.parametrize("kind", ["file", "folder", "zarr", "newer", "absent", "torn"])
def test_what_is_no_store_of_ours_is_refused_untouched(tmp_path, kind):
    path = tmp_path / "s.zarr"
    if kind == "file":
        path.write_text("hello")
    elif kind == "folder":
        path.mkdir()
        (path / "thesis.doc").write_text("do not touch")
    elif kind == "zarr":
        zarr.open_group(path, mode="w").attrs["made_by"] = "somebody else"
    elif kind == "newer":
        Store(path, create=True)
        (path / "zarr.json").write_text(
            (path / "zarr.json").read_text().replace('"store_format": 1', '"store_format": 9')
        )
    elif kind == "torn":
        Store(path, create=True)
        (path / "zarr.json").write_text("{")
    before = sorted(str(p) for p in tmp_path.rglob("*"))
    with pytest.raises(StoreError, match="no feature store" if kind == "absent" else "--store|update vacli"):
        Store(path, create=kind != "absent")
    assert sorted(str(p) for p in tmp_path.rglob("*")) == before


def test_a_shape_that_lies_takes_no_memory(store):
    store.put(RECIPE, MEDIA, track())
    record = store.entry(RECIPE, MEDIA) / "zarr.json"
    record.write_text(record.read_text().replace("50", str(10**13)))
    assert not store.has(RECIPE, MEDIA)


def test_a_second_opening_remembers_fingerprints(store, tmp_path):
    medium = tmp_path / "a.mp4"
    medium.write_bytes(b"x")
    os.utime(medium, (1, 1))
    store.fingerprints.memo["key"] = "value"
    store.fingerprints.changed = True
    store.remember_fingerprints()
    assert Store(store.path).fingerprints.memo == {"key": "value"}
