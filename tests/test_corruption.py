"""Bits that rot, files that are cut, swapped, gone or something else: seen, never read as right, and mended."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import random
import shutil
import stat
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from vacli import VacliError
from vacli.store import Store, Track, folder_name

from .fault_layer import Layer, through

MAE, LABEL = {"track": "mae", "version": 1}, {"track": "label.va", "version": 1}
Key = tuple[str, str]  # track, media


def made(rows: int, *row_shape: int, dtype: str = "float16") -> Track:
    values = np.random.default_rng(rows).normal(size=(rows, *row_shape)).astype(dtype)
    values[1:2] = np.nan
    return Track(values, np.arange(rows) / 25)


RECIPES = {"mae": MAE, "label.va": LABEL}
WANTED: dict[Key, Track | str] = {
    ("mae", "a0" * 32): made(3, 2),
    ("mae", "b1" * 32): made(4, 2, 3, dtype="float32"),
    ("mae", "c2" * 32): made(0, 2),
    ("mae", "d3" * 32): "no picture in it",
    ("label.va", "a0" * 32): made(3, 2, dtype="float32"),
}
VIDEOS = {"v1": "a0" * 32, "a/v2": "b1" * 32}


def fill(store: Store, keys: Iterable[Key] = tuple(WANTED)) -> None:
    """Put what is missing, as an extraction would."""
    for name, media in keys:
        wanted = WANTED[name, media]
        if isinstance(wanted, str):
            store.fail(RECIPES[name], media, wanted)
        else:
            store.put(RECIPES[name], media, wanted)


def link(store: Store) -> None:
    for video, media in VIDEOS.items():
        tracks = {name: {"folder": folder_name(RECIPES[name]), "media": media} for name in ("mae",)}
        store.link(video, {"root": "/data", "media": media, "split": "train"}, tracks)


def same(a: Track, b: Track) -> bool:
    return (
        a.values.dtype == b.values.dtype
        and a.values.shape == b.values.shape
        and a.values.tobytes() == b.values.tobytes()
        and a.times_s.tobytes() == b.times_s.tobytes()
    )


def right(store: Store, key: Key) -> bool:
    """True: mapped and read it is what was put. False: absent or refused. Anything else is a lie."""
    address, wanted = (RECIPES[key[0]], key[1]), WANTED[key]
    try:
        for look in (store.map, store.get):
            found = look(*address)
            assert isinstance(wanted, Track)
            assert same(found, wanted)
    except KeyError:
        assert store.failure(*address) in (None, wanted)
        return store.failure(*address) is not None
    except VacliError:
        return False
    return True


# ---- corruption ------------------------------------------------------------------------------------------------


def content(path: Path | str) -> Any:
    """What a file or folder is, not following links; of JSON that holds something of ours, only that."""
    try:
        mode = os.lstat(path).st_mode
    except OSError:
        return None
    if stat.S_ISDIR(mode):
        return {name: content(f"{path}/{name}") for name in os.listdir(path)}
    if not stat.S_ISREG(mode):
        return "a link" if stat.S_ISLNK(mode) else "a pipe"
    with open(path, "rb") as f:
        data = f.read()
    try:
        return (
            json.dumps(json.loads(data)["attributes"]["vacli"]) if str(path).endswith("zarr.json") else data
        )
    except (ValueError, LookupError, TypeError):
        return data


def states(place: Path) -> dict[str, Any]:
    """All that verify vouches for, under the names it gives: entries, recipes, names; and the store's own page."""
    groups = [g for g in os.listdir(place) if "@" in g or g == "videos"]
    inside = {f"{g}/{n}": content(place / g / n) for g in groups for n in os.listdir(place / g)}
    inside.pop("videos/zarr.json", None)
    return {"zarr.json": content(place / "zarr.json"), **inside}


Damage = Callable[[random.Random, Path, Path], None]  # to a path; what is moved away goes to the other


def _rewritten(change: Callable[[random.Random, bytearray], None]) -> Damage:
    def damage(rng: random.Random, path: Path, _: Path) -> None:
        data = bytearray(path.read_bytes())
        change(rng, data)
        path.unlink()
        path.write_bytes(data)

    return damage


def _flip(rng: random.Random, data: bytearray) -> None:
    if data:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def _truncate(rng: random.Random, data: bytearray) -> None:
    del data[rng.randrange(len(data) + 1) :]


def _extend(rng: random.Random, data: bytearray) -> None:
    data.extend(rng.choice([bytes(4), data[-8:], rng.randbytes(rng.randrange(1, 99))]))


def _zero(rng: random.Random, data: bytearray) -> None:
    start = rng.randrange(len(data) + 1)
    stop = min(len(data), start + rng.randrange(1, 64))
    data[start:stop] = bytes(stop - start)


def _delete(_: random.Random, path: Path, __: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _folder(rng: random.Random, path: Path, aside: Path) -> None:
    _delete(rng, path, aside)
    path.mkdir()


def _link_to_itself_elsewhere(_: random.Random, path: Path, aside: Path) -> None:
    """What is linked to is right, and yet not the store's."""
    path.rename(aside)
    path.symlink_to(aside)


def _dangling(rng: random.Random, path: Path, aside: Path) -> None:
    _delete(rng, path, aside)
    path.symlink_to(aside / "nowhere")


def _fifo(rng: random.Random, path: Path, aside: Path) -> None:
    _delete(rng, path, aside)
    os.mkfifo(path)


def _file(rng: random.Random, path: Path, aside: Path) -> None:
    _delete(rng, path, aside)
    path.write_bytes(b"")


ON_FILES: dict[str, Damage] = {
    "flip": _rewritten(_flip),
    "truncate": _rewritten(_truncate),
    "extend": _rewritten(_extend),
    "zero": _rewritten(_zero),
}
ON_ANY: dict[str, Damage] = {
    "empty": _file, "delete": _delete, "folder": _folder, "fifo": _fifo, "link": _link_to_itself_elsewhere,
    "dangling link": _dangling,
}  # fmt: skip


class Corrupting:
    """A copy of a store, damaged in one place after the other and mended each time."""

    def __init__(self, whole: Path, place: Path, seed: int) -> None:
        self.whole, self.place, self.aside = (
            whole,
            Path(shutil.copytree(whole, place)),
            place.with_name("aside"),
        )
        self.rng, self.before, self.names = random.Random(seed), states(whole), Store(whole).videos()
        paths = sorted(p for p in whole.rglob("*") if not p.relative_to(whole).parts[0].startswith("."))
        self.files = [str(p.relative_to(whole)) for p in paths if p.is_file()]
        self.folders = [
            str(p.relative_to(whole)) for p in paths if p.is_dir() and len(p.relative_to(whole).parts) > 1
        ]

    def damage(self) -> str:
        """One file, or folder of an entry or of a video's names; returns what was done to it."""
        files, rng = self.rng.random() < 0.8, self.rng
        name = rng.choice(self.files if files else self.folders)
        how = rng.choice([*ON_ANY, "swap", *(2 * [*ON_FILES] if files else ())])
        if how == "swap":
            alike = [
                n
                for n in (self.files if files else self.folders)
                if len(Path(n).name) == len(Path(name).name)
            ]
            self._swap(self.place / name, self.place / rng.choice(alike))
        else:
            (ON_ANY | ON_FILES)[how](rng, self.place / name, self.aside)
        if how in ON_FILES:  # a checksum is verified once for each (inode, size, times)
            at_ns = rng.randrange(10**18)
            os.utime(self.place / name, ns=(at_ns, at_ns))
        return f"{how} {name}"

    def _swap(self, one: Path, other: Path) -> None:
        if one == other or one in other.parents or other in one.parents:
            return
        one.rename(self.aside)
        other.rename(one)
        self.aside.rename(other)

    def one(self) -> None:
        """Damage; nothing wrong is read; what has changed is named; and putting it again mends it."""
        what = self.damage()
        now = states(self.place)
        try:
            store = Store(self.place)
        except VacliError:
            if now["zarr.json"] == self.before["zarr.json"]:
                raise
            self._restore("zarr.json")
            store = Store(self.place)
        named = {name for name, _, wrong in store.verify() if wrong is not None}
        self._check(store, what, now, named)
        self._mend(named)
        assert states(self.place) == self.before, what
        if os.path.lexists(self.aside):
            _delete(self.rng, self.aside, self.aside)

    def _restore(self, page: str) -> None:
        if os.path.lexists(self.place / page):
            _delete(self.rng, self.place / page, self.aside)
        shutil.copy(self.whole / page, self.place / page)

    def _check(self, store: Store, what: str, now: dict[str, Any], named: set[str]) -> None:
        listed = {*store.entries(), *(f"videos/{n}" for n in store.at.folders("videos"))}
        for name in (self.before.keys() | now.keys()) - {"zarr.json"}:
            if now.get(name) == self.before.get(name):
                assert name not in named, f"{what}: {name} is named, and it is right"
            elif name.endswith("zarr.json") or (name in listed and (now[name] or "@" in name)):
                assert name in named, f"{what}: verify does not see {name}"
        for key in WANTED:
            name = store.entry_of(RECIPES[key[0]], key[1])
            if not right(store, key):
                assert now.get(name) != self.before[name], f"{what}: {name} is refused, and it is right"
        with contextlib.suppress(VacliError):
            assert all(facts == self.names[video] for video, facts in store.videos().items()), what

    def _mend(self, named: set[str]) -> None:
        """As a user would: `vacli store verify --repair`, then the same extraction again."""
        store = Store(self.place, create=True)
        for name in named:
            store.set_aside(name)
        for page in (self.place / n for n in ("videos/zarr.json", *self.folders) if n.startswith("videos/")):
            right_kind = page.is_file() if page.suffix else page.is_dir()
            if os.path.lexists(page) and (
                page.is_symlink() or not right_kind
            ):  # "check the folder", one is told
                _delete(self.rng, page, self.aside)
        fill(
            store,
            [(n, m) for n, m in WANTED if not (store.has(RECIPES[n], m) or store.failure(RECIPES[n], m))],
        )
        link(store)


@pytest.fixture
def whole(tmp_path) -> Path:
    """A small store of every kind of entry; with `through(Layer())` no test waits for the disk."""
    with through(Layer()):
        store = Store(tmp_path / "whole.zarr", create=True)
        fill(store)
        link(store)
    return store.path


@pytest.mark.parametrize("rounds", [1500, pytest.param(10_000, marks=pytest.mark.slow)])
def test_no_corruption_is_believed_unseen_or_beyond_mending(whole, tmp_path, rounds):
    corrupting = Corrupting(whole, tmp_path / "s.zarr", seed=rounds)
    with through(Layer()):
        for number in range(rounds):
            corrupting.one()
            if number % 100 == 0:
                shutil.rmtree(corrupting.place / ".quarantine", ignore_errors=True)
    assert [what for *_, what in Store(corrupting.place).verify()] == [None] * len(WANTED)


def test_mapping_trusts_a_file_that_looks_the_same_and_reading_and_verify_do_not(whole):
    """A checksum is verified once for each (inode, size, times) that is mapped: what a disk loses is not seen."""
    store, key = Store(whole), (MAE, "a0" * 32)
    name = store.entry_of(*key)
    [path] = (whole / name / "values").glob("c.*")
    with path.open("r+b") as f, mmap.mmap(f.fileno(), 0) as written:
        written[0] = written[0]  # from now on its page is being written, and the times stay as they are
        wanted = store.map(*key).values.copy()
        before = path.stat()
        written[0] ^= 1
        after = path.stat()
        if (before.st_mtime_ns, before.st_ctime_ns) == (after.st_mtime_ns, after.st_ctime_ns):  # as on Linux
            assert not np.array_equal(store.map(*key).values, wanted, equal_nan=True)
        with pytest.raises(VacliError, match="checksum of values"):
            store.read(name)
        assert [n for n, _, wrong in store.verify() if wrong] == [name]
    os.utime(path)  # now it looks changed
    with pytest.raises(VacliError, match="checksum of values"):
        store.map(*key)


# ---- other readers ---------------------------------------------------------------------------------------------


def by_zarr(path: Path) -> np.ndarray:
    return np.asarray(zarr.open_array(path, mode="r")[...])


def by_tensorstore(path: Path) -> np.ndarray:
    tensorstore = pytest.importorskip("tensorstore")
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{path}/"}}
    return np.asarray(tensorstore.open(spec, read=True).result().read().result())


@pytest.mark.parametrize("read", [by_zarr, by_tensorstore])
def test_zarr_and_tensorstore_read_every_array_equal(whole, read):
    store = Store(whole)
    for key, wanted in WANTED.items():
        if isinstance(wanted, Track):
            for name in ("values", "times_s"):
                got = read(whole / store.entry_of(RECIPES[key[0]], key[1]) / name)
                assert got.dtype == getattr(wanted, name).dtype
                np.testing.assert_array_equal(got, getattr(wanted, name))


@pytest.mark.parametrize("read", [by_zarr, by_tensorstore])
def test_a_flipped_bit_of_a_chunk_is_seen_by_zarr_and_tensorstore(whole, read):
    for path in whole.glob("*@*/*/*/c.*"):
        right_bytes = path.read_bytes()
        for at in {0, len(right_bytes) // 2, len(right_bytes) - 5, len(right_bytes) - 1}:
            path.write_bytes(right_bytes[:at] + bytes([right_bytes[at] ^ 4]) + right_bytes[at + 1 :])
            with pytest.raises(ValueError, match=r"(?i)checksum|crc-?32c|digest"):
                read(path.parent)
        path.write_bytes(right_bytes)
