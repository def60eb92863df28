"""The store: whole or absent, never stale, readable by anybody, and clear when it cannot be used."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
import zarr
from vacli import VacliError
from vacli.store import Damaged, Store, StoreError, Track, disk, entry, folder_name

RECIPE = {"track": "mae", "version": 1}
MEDIA = "ab" * 32
PLACE = {"folder": folder_name(RECIPE), "media": MEDIA}


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
    store.link("v", {"root": "/r", "media": MEDIA, "split": None}, {"mae": PLACE})
    root = zarr.open_group(store.path, mode="r")
    entry = f"{folder_name(RECIPE)}/{MEDIA[:24]}"
    np.testing.assert_array_equal(root[f"{entry}/values"][:], track().values)
    np.testing.assert_array_equal(root[f"{entry}/times_s"][:], track().times_s)
    arrays = [name for name, node in root.members(max_depth=None) if isinstance(node, zarr.Array)]
    assert len(arrays) == 4
    assert dict(root[folder_name(RECIPE)].attrs)["vacli"]["recipe"] == RECIPE


def folder(store: Store, media: str = MEDIA) -> Path:
    return store.path / store.entry_of(RECIPE, media)


def chunk(store: Store, name: str = "values"):
    return next((folder(store) / name).glob("c.*"))


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
    record = folder(store) / "zarr.json"
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
        [(_, _, what)] = list(store.verify())
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
    a, b = folder(store), folder(store, other)
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
    found = list(store.verify())
    assert sorted(what is not None for *_, what in found) == [False, True]
    assert list(store.verify()) == found


def test_what_a_killed_writer_left_is_swept(store):
    left = store.path / ".staging" / "dead"
    left.mkdir()
    (left / "part").write_bytes(b"x")
    Store(store.path, create=True)
    assert left.exists()  # younger than a minute: it may be somebody's
    os.utime(left, (1, 1))
    Store(store.path, create=True)
    assert not left.exists()


def test_names_are_linked_relinked_and_never_shared(store):
    facts = {"root": "/data/a", "media": MEDIA, "split": "train"}
    store.link("v", facts, {"mae": PLACE})
    store.link("v", facts, {"logmel": PLACE})
    assert set(store.videos()["v"]["tracks"]) == {"mae", "logmel"}
    store.link("v", {**facts, "media": "cd" * 32}, {"mae": PLACE})
    # another file: what was made of the old one is not its
    assert set(store.videos()["v"]["tracks"]) == {"mae"}
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
            (path / "zarr.json").read_text().replace('"store_format": 2', '"store_format": 9')
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
    record = folder(store) / "zarr.json"
    record.write_text(record.read_text().replace("50", str(10**13)))
    assert not store.has(RECIPE, MEDIA)


def test_imported_tracks_and_the_video_come_together_in_either_order(store):
    imported, video = (
        {"root": "/csv", "media": None, "split": None},
        {"root": "/data", "media": MEDIA, "split": "train"},
    )
    for name, order in {"a": (imported, video), "b": (video, imported)}.items():
        store.link(name, order[0], {"one": PLACE})
        store.link(name, order[1], {"two": PLACE})
        assert store.videos()[name] == {**video, "tracks": {"one": PLACE, "two": PLACE}}


def test_unlinking_forgets_names_and_keeps_tracks(store):
    store.put(RECIPE, MEDIA, track())
    store.link("v", {"root": "/r", "media": MEDIA, "split": None}, {"one": PLACE, "two": PLACE})
    store.unlink("v", ["one"])
    assert set(store.videos()["v"]["tracks"]) == {"two"}
    store.unlink("v")
    assert store.videos() == {}
    assert store.has(RECIPE, MEDIA)


def test_batches_written_one_by_one_are_one_track(store):
    whole = track(50)
    with store.writing(RECIPE, MEDIA, 60, (8,), np.float16) as writer:
        for start in range(0, 50, 7):
            writer.append(whole.values[start : start + 7], whole.times_s[start : start + 7])
        assert not store.has(RECIPE, MEDIA)
    assert same(store.get(RECIPE, MEDIA), whole)
    assert all(what is None for *_, what in store.verify())


@pytest.mark.parametrize("wrong", ["infinite", "too large", "partly missing", "earlier", "wider"])
def test_a_batch_that_is_no_track_is_refused_and_nothing_is_left(store, wrong):
    good, bad, at = np.zeros((3, 8), np.float32), np.zeros((3, 8), np.float32), np.arange(3.0) + 3
    if wrong == "infinite":
        bad[1, 1] = np.inf
    elif wrong == "too large":
        bad[1, 1] = 1e6  # beyond float16
    elif wrong == "partly missing":
        bad[1, 1] = np.nan
    elif wrong == "earlier":
        at = at - 1
    else:
        bad = np.zeros((3, 9), np.float32)
    batches = [(good, np.arange(3.0)), (bad, at)]

    def write() -> None:
        with store.writing(RECIPE, MEDIA, 6, (8,), np.float16) as writer:
            for batch in batches:
                writer.append(*batch)

    with pytest.raises(ValueError, match=r"infinity|partly NaN|increasing|rows must be"):
        write()
    assert not store.has(RECIPE, MEDIA)
    assert not list((store.path / ".staging").glob("*/"))


def test_an_error_of_the_writers_caller_is_not_told_as_the_stores(store):
    with pytest.raises(OSError, match="camera"), store.writing(RECIPE, MEDIA, 6, (8,), np.float16):
        raise OSError(5, "the camera is gone")


def test_a_tombstone_is_no_track_and_gives_way_to_one(store):
    store.fail(RECIPE, MEDIA, "no video in it")
    assert not store.has(RECIPE, MEDIA)
    assert store.failure(RECIPE, MEDIA) == "no video in it"
    with pytest.raises(KeyError, match="no video"):
        store.get(RECIPE, MEDIA)
    assert [what for *_, what in store.verify()] == [None]
    store.put(RECIPE, MEDIA, track())
    assert store.failure(RECIPE, MEDIA) is None
    store.fail(RECIPE, MEDIA, "too late")
    assert same(store.get(RECIPE, MEDIA), track())


@pytest.mark.parametrize("how", [Store.get, Store.map])
def test_what_was_read_outlives_its_removal_and_cannot_be_changed(store, how):
    store.put(RECIPE, MEDIA, track(5000, 64))
    got = how(store, RECIPE, MEDIA)
    with pytest.raises(ValueError, match="read-only"):
        got.values[0] = 0
    store.drop(store.entry_of(RECIPE, MEDIA))
    assert same(got, track(5000, 64))
    assert not store.has(RECIPE, MEDIA)


@pytest.mark.parametrize("rows", [0, 1, 50, 40_000])
def test_a_map_is_what_is_read(store, rows):
    store.put(RECIPE, MEDIA, track(rows, 16))
    read, mapped = store.get(RECIPE, MEDIA), store.map(RECIPE, MEDIA)
    assert same(read, mapped)
    assert read.values.dtype == mapped.values.dtype
    assert not rows or read.values.ctypes.data % 64 == mapped.values.ctypes.data % 64 == 0


def test_a_maps_checksum_is_worked_out_once_until_the_file_changes(store, monkeypatch):
    store.put(RECIPE, MEDIA, track())
    worked_out = []
    real = entry.crc32c.crc32c
    monkeypatch.setattr(
        entry.crc32c, "crc32c", lambda raw, *before: worked_out.append(len(raw)) or real(raw, *before)
    )
    for _ in range(3):
        store.map(RECIPE, MEDIA)
    assert sorted(worked_out) == [400, 400, 400, 800]  # the times each time, the values once
    flip(chunk(store), 40)
    with pytest.raises(Damaged, match="checksum"):
        store.map(RECIPE, MEDIA)


def test_a_chunk_of_holes_takes_no_memory(store):
    store.put(RECIPE, MEDIA, track(50, 1024))
    path = chunk(store)
    size = path.stat().st_size
    os.truncate(path, 0)
    os.truncate(path, size)
    seen = []
    with pytest.MonkeyPatch.context() as m:
        m.setattr(entry, "_read", lambda fd, wanted, crc: seen.append(wanted) or np.zeros(wanted, np.uint8))
        with pytest.raises(Damaged):
            store.get(RECIPE, MEDIA)
    assert size not in seen


@pytest.mark.parametrize("refused", [errno.EACCES, errno.EMFILE, errno.EIO])
def test_what_the_machine_refuses_for_now_is_not_taken_for_damage(store, monkeypatch, refused):
    store.put(RECIPE, MEDIA, track())

    def opens(path, limit):
        raise OSError(refused, os.strerror(refused), str(path))

    with monkeypatch.context() as m:
        m.setattr(disk, "read_small", opens)
        for look in (store.has, store.get):
            with pytest.raises(VacliError, match=os.strerror(refused)):
                look(RECIPE, MEDIA)
    assert same(store.get(RECIPE, MEDIA), track())


def test_a_recipe_that_is_not_the_folders_is_seen_and_healed(store):
    store.put(RECIPE, MEDIA, track())
    group = store.path / folder_name(RECIPE) / "zarr.json"
    group.write_text(group.read_text().replace('"version": 1', '"version": 2'))
    with pytest.raises(Damaged, match="another one"):
        store.recipe_of(folder_name(RECIPE))
    assert [what is None for *_, what in store.verify()] == [False, True]
    assert Store(store.path).has(
        RECIPE, MEDIA
    )  # the track is whole, and whoever asks for it knows its recipe
    assert store.recipe_of(folder_name(RECIPE)) == RECIPE
    assert [what for *_, what in store.verify()] == [None]


def test_a_second_opening_remembers_fingerprints(store, tmp_path):
    medium = tmp_path / "a.mp4"
    medium.write_bytes(b"x")
    os.utime(medium, (1, 1))
    store.fingerprints.memo["key"] = "value"
    store.fingerprints.changed = True
    store.remember_fingerprints()
    assert Store(store.path).fingerprints.memo == {"key": "value"}
