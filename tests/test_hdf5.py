"""A whole store as one HDF5 file and back: nothing lost, nothing half-written, nothing believed."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from vacli import VacliError
from vacli.store import Store, StoreError, Track, digest, folder_name, hdf5
from vacli.store.hdf5 import export
from vacli.store.hdf5_import import import_export

MAE = {"track": "mae", "version": 1, "crop": {"size": 224, "mean": [0.5, 0.25]}}
LOGMEL = {"track": "logmel", "version": 3}


def media(number: int) -> str:
    return hashlib.sha256(bytes([number])).hexdigest()


def track(number: int, rows: int = 40) -> Track:
    values = np.random.default_rng(number).normal(size=(rows, 8)).astype(np.float16)
    values[::7] = np.nan
    return Track(values, (np.arange(rows) + 0.5) / 25)


def filled(path: Path) -> Store:
    """Two recipes; float16, tokens of float32, a track without rows, a tombstone; videos with and without a split."""
    store = Store(path, create=True)
    for number in range(4):
        store.put(
            MAE, media(number), track(number), {"sample": f"vidéo {number}", "torch": "2.15", "loss": 0.1}
        )
    store.put(MAE, media(4), track(4, rows=0))
    store.fail(
        MAE, media(5), "no frame can be decoded", {"vacli": "0.0.1", "sample": "broken"}
    )  # of an older release
    tokens = np.random.default_rng(9).normal(size=(6, 3, 5)).astype(np.float32)
    store.put(LOGMEL, media(0), Track(tokens, np.cumsum(np.ones(6)) ** 1.5))
    for number in range(5):
        address = {"folder": folder_name(MAE), "media": media(number)}
        encoder = {"kind": "mae", "options": {"weights": "mae.pth", "size": 224, "tta": None}}
        facts = {"root": "/data/é", "media": media(number), "split": "train" if number % 2 else None}
        store.link(f"batch1/v{number}", facts, {"mae": {**address, "encoder": encoder}})
    return store


def kept(store: Store) -> dict[str, str]:
    """SHA-256 of every file of every entry and recipe."""
    files = [p for folder in store.folders() for p in (store.path / folder).rglob("*") if p.is_file()]
    return {str(p.relative_to(store.path)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Store:
    return filled(tmp_path_factory.mktemp("original") / "features.zarr")


@pytest.fixture(scope="module")
def exported(original, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "out.h5"
    assert not export(original, out, tell=lambda _: None).problems
    return out


@pytest.fixture
def store(tmp_path) -> Store:
    return filled(tmp_path / "features.zarr")


@pytest.fixture
def empty(tmp_path) -> Store:
    return Store(tmp_path / "empty.zarr", create=True)


@pytest.fixture
def copy(exported, tmp_path) -> Path:
    return Path(shutil.copy(exported, tmp_path / "copy.h5"))


# ---- there and back ------------------------------------------------------------------------------------------


def test_a_store_comes_back_bit_for_bit(original, exported, empty):
    figures = import_export(exported, empty)
    assert (figures.tracks, figures.tombstones, figures.videos, figures.problems) == (6, 1, 5, [])
    assert kept(empty) == kept(original)
    assert empty.videos() == original.videos()
    assert empty.failure(MAE, media(5)) == "no frame can be decoded"


def test_an_empty_store_comes_back_empty(empty, tmp_path):
    assert export(empty, tmp_path / "out.h5", tell=lambda _: None).problems == []
    other = Store(tmp_path / "other.zarr", create=True)
    assert import_export(tmp_path / "out.h5", other).problems == []
    assert other.entries() == []
    assert other.videos() == {}


def test_a_record_as_large_as_a_store_takes_comes_back(empty, tmp_path):
    empty.put(MAE, media(0), track(0), {"notes": ["x" * 60] * 900})
    assert 62_000 < (empty.path / empty.entries()[0] / "zarr.json").stat().st_size <= 65_536
    export(empty, tmp_path / "out.h5", tell=lambda _: None)
    other = Store(tmp_path / "other.zarr", create=True)
    assert import_export(tmp_path / "out.h5", other).problems == []
    assert kept(other) == kept(empty)


def test_h5py_alone_reads_it(original, exported):
    with h5py.File(exported) as f:
        group = f[original.entry_of(MAE, media(1))]
        assert np.array_equal(group["values"][:], track(1).values, equal_nan=True)
        assert np.array_equal(group["times_s"][:], track(1).times_s)
        assert group["times_s"].attrs["units"] == b"s"
        assert group["values"].chunks is None
        assert group["values"].id.get_offset() % 8 == 0
        assert json.loads(group.attrs["record"])["provenance"]["sample"] == "vidéo 1"
        assert json.loads(f[folder_name(MAE)].attrs["recipe"]) == MAE
        assert [json.loads(line)["id"] for line in f["videos"][:].tobytes().splitlines()] == sorted(
            original.videos()
        )
        assert b"Aff-Wild2" in f.attrs["licence"]


def test_what_is_there_already_is_skipped(original, exported, empty):
    empty.put(MAE, media(2), track(2))
    empty.fail(LOGMEL, media(0), "for the moment")
    assert import_export(exported, empty).there == 1
    assert empty.failure(LOGMEL, media(0)) is None
    assert empty.has(LOGMEL, media(0))
    again = import_export(exported, empty)
    assert (again.tracks, again.tombstones, again.there, again.problems) == (0, 0, 7, [])


def test_an_export_of_what_is_exported_does_nothing(original, exported):
    before, said = os.stat(exported), []
    figures = export(original, exported, tell=said.append)
    assert os.stat(exported) == before
    assert figures.there == 7
    assert figures.tracks == 0
    assert "Aff-Wild2" in said[0]
    assert "nothing to do" in said[1]


def test_a_store_that_grew_replaces_its_export(store, tmp_path):
    out = tmp_path / "out.h5"
    export(store, out, tell=lambda _: None)
    store.put(LOGMEL, media(1), track(1))
    figures = export(store, out, tell=lambda _: None)
    assert figures.tracks == 7
    assert sorted(p.name for p in tmp_path.iterdir()) == ["features.zarr", "out.h5"]
    with h5py.File(out) as f:
        assert store.entry_of(LOGMEL, media(1)) in f


# ---- kills and full disks ------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from pathlib import Path
import h5py, numpy
from vacli.store import Store, hdf5
hdf5._NOTE_BYTES = 1
store, out, first = sys.argv[1], Path(sys.argv[2]), os.fork

def child(kill_at):
    if pid := os.fork():
        return os.waitpid(pid, 0)[1]
    calls = 0
    def counted(call):
        def inner(*args, **how):
            nonlocal calls
            calls += 1
            if calls == kill_at:
                if call is plain_write:  # torn: half of the bytes arrive
                    plain_write(args[0], bytes(args[1])[: len(args[1]) // 2], args[2])
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **how)
        return inner
    plain_write = os.pwrite
    for name in ("open", "pwrite", "ftruncate", "fsync", "replace", "unlink"):
        setattr(os, name, counted(getattr(os, name)))
    hdf5.export(Store(store), out, tell=lambda text: print(text, flush=True))
    os._exit(0)

def tree():
    with h5py.File(out, "r") as f:
        found = {}
        def look(name, o):
            found[name] = o[:].tobytes() if isinstance(o, h5py.Dataset) else dict(o.attrs)
        f.visititems(look)
        return found

assert child(0) == 0
whole, kill_at, kills = tree(), 0, 0
while True:
    kill_at += 1
    out.unlink()
    if child(kill_at) == 0:
        break
    kills += 1
    if out.exists():
        assert tree() == whole, kill_at
    assert child(0) == 0, kill_at
    assert tree() == whole, kill_at
    assert os.listdir(out.parent) == [out.name], (kill_at, os.listdir(out.parent))
print("kills", kills)
"""


def test_an_export_killed_at_any_call_goes_on_and_ends_the_same(empty, tmp_path):
    store = empty
    store.put(MAE, media(0), track(0))
    store.put(MAE, media(1), track(1))
    store.fail(LOGMEL, media(0), "no sound")
    (tmp_path / "out").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", KILLED, store.path, tmp_path / "out" / "out.h5"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(re.search(r"kills (\d+)", done.stdout)[1]) > 30
    assert done.stdout.count("going on with out.h5.part") > 10
    assert "beginning again" not in done.stdout


def killed_at_random(code: str, delays_s: list[float]) -> int:
    """Run the code again and again, killed after each of the delays, then to its end; how often was it killed?"""
    kills = 0
    for delay_s in [*delays_s, 60.0]:
        running = subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        running.stdout.readline()  # it has begun
        try:
            running.wait(delay_s)
        except subprocess.TimeoutExpired:
            running.send_signal(signal.SIGKILL)
            kills += 1
        _, said = running.communicate()
        assert running.returncode in (0, -signal.SIGKILL), said.decode()[-2000:]
    return kills


@pytest.mark.slow
def test_random_kills_of_export_and_import_cost_nothing(tmp_path):
    store = Store(tmp_path / "features.zarr", create=True)
    for number in range(60):
        store.put(MAE, media(number), track(number, rows=40_000))
        facts = {"root": "/data", "media": media(number), "split": None}
        store.link(f"v{number}", facts, {"mae": {"folder": folder_name(MAE), "media": media(number)}})
    out, other = tmp_path / "out.h5", tmp_path / "other.zarr"
    start = f"""
from pathlib import Path
from vacli.store import Store, hdf5, hdf5_import
hdf5._NOTE_BYTES, store, out, other = 2**20, {str(store.path)!r}, Path({str(out)!r}), {str(other)!r}
"""
    delays_s = [random.Random(0).uniform(0.01, 0.15) for _ in range(20)]
    export_it = "hdf5.export(Store(store), out, tell=lambda text: print(text, flush=True))"
    import_it = "other = Store(other, create=True); print(flush=True); hdf5_import.import_export(out, other)"
    kills = [killed_at_random(start + code, delays_s) for code in (export_it, import_it)]
    assert min(kills) > 0
    assert kept(Store(other)) == kept(store)
    assert Store(other).videos() == store.videos()


def test_an_import_that_was_cut_short_goes_on(original, exported, empty, monkeypatch):
    put, times = empty.put, iter(range(100))

    def stopping(*args):
        if next(times) == 3:
            raise KeyboardInterrupt
        put(*args)

    monkeypatch.setattr(empty, "put", stopping)
    with pytest.raises(KeyboardInterrupt):
        import_export(exported, empty)
    figures = import_export(exported, empty)
    assert figures.there == 3 + (figures.tombstones == 0)
    assert figures.problems == []
    assert kept(empty) == kept(original)


def test_a_full_disk_is_one_line_and_the_part_is_kept(store, tmp_path, monkeypatch):
    out, write, calls = tmp_path / "out.h5", os.pwrite, iter(range(1000))
    monkeypatch.setattr(hdf5, "_NOTE_BYTES", 1)

    def full(*args):
        if next(calls) > 7:
            raise OSError(28, "No space left on device")
        return write(*args)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(VacliError, match=r"No space left on device.*same command again"):
        export(store, out, tell=lambda _: None)
    assert not out.exists()
    monkeypatch.setattr(os, "pwrite", write)
    said: list[str] = []
    figures = export(store, out, tell=said.append)
    assert said[1:] == ["going on with out.h5.part"]
    assert figures.there > 0
    assert figures.there + figures.tracks + figures.tombstones == 7


LIMITED = """
import resource, sys
from pathlib import Path
from vacli import VacliError
from vacli.store import Store, hdf5

store, out = Store(sys.argv[1]), Path(sys.argv[2])
for limit in (*range(0, 12_000, 500), resource.RLIM_INFINITY):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        hdf5.export(store, out, tell=lambda _: None)
        print("done")
    except VacliError as e:
        assert "File too large; mend that" in str(e), e
"""


def test_a_disk_that_refuses_the_structure_is_one_line(store, tmp_path):
    command = [sys.executable, "-c", LIMITED, store.path, tmp_path / "out" / "out.h5"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr[-2000:]
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["out.h5"]


def test_a_disk_too_small_is_told_before_anything_is_written(store, tmp_path, monkeypatch):
    volume = os.statvfs(tmp_path)

    class Full:
        f_bavail, f_frsize = 3, volume.f_frsize

    monkeypatch.setattr(os, "statvfs", lambda _: Full)
    with pytest.raises(VacliError, match=r"it takes 0\.000 GB, and its disk has"):
        export(store, tmp_path / "out" / "out.h5", tell=lambda _: None)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_store_that_changed_since_the_kill_begins_again(store, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(hdf5, "_copy", interrupted)
        with pytest.raises(KeyboardInterrupt):
            export(store, tmp_path / "out.h5", tell=lambda _: None)
    store.drop(store.entry_of(LOGMEL, media(0)))
    said: list[str] = []
    export(store, tmp_path / "out.h5", tell=said.append)
    assert said[1:] == ["the store has changed since out.h5.part was begun: beginning again"]
    with h5py.File(tmp_path / "out.h5") as f:
        assert folder_name(LOGMEL) not in f


def test_two_exports_to_one_file_do_not_mix(store, tmp_path, monkeypatch):
    copied = hdf5._copy
    refused = []

    def meanwhile(*args):
        with pytest.raises(VacliError, match=r"another vacli is exporting to .*out\.h5"):
            export(store, tmp_path / "out.h5", tell=lambda _: None)
        refused.append(args)
        copied(*args)

    monkeypatch.setattr(hdf5, "_copy", meanwhile)
    assert not export(store, tmp_path / "out.h5", tell=lambda _: None).problems
    assert len(refused) == 7


# ---- damage and strangers' files -----------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["values", "times_s", "record", "recipe"])
def test_a_damaged_track_is_left_out_and_listed(store, tmp_path, part):
    entry = store.path / store.entry_of(LOGMEL, media(0))
    chunk = {
        "values": "values/c.0.0.0",
        "times_s": "times_s/c.0",
        "record": "zarr.json",
        "recipe": "../zarr.json",
    }
    broken = bytearray((entry / chunk[part]).read_bytes())
    broken[len(broken) // 2] ^= 1
    (entry / chunk[part]).write_bytes(broken)
    figures = export(store, tmp_path / "out.h5", tell=lambda _: None)
    assert len(figures.problems) == 1
    assert "logmel@" in figures.problems[0]
    assert figures.tracks == 5
    assert figures.tombstones == 1
    other = Store(tmp_path / "other.zarr", create=True)
    assert import_export(tmp_path / "out.h5", other).problems == []
    assert kept(other) == {name: sha for name, sha in kept(store).items() if name.startswith("mae@")}


@pytest.mark.parametrize("name", ["out.h5", "out.h5.part"])
@pytest.mark.parametrize("kind", ["text", "hdf5", "folder"])
def test_what_is_no_export_is_never_overwritten(store, tmp_path, name, kind):
    place = tmp_path / name
    if kind == "folder":
        place.mkdir()
    elif kind == "text":
        place.write_text("my thesis")
    else:
        h5py.File(place, "w").close()
    before = place.read_bytes() if place.is_file() else None
    with pytest.raises(VacliError, match="not overwritten"):
        export(store, tmp_path / "out.h5", tell=lambda _: None)
    assert before == (place.read_bytes() if place.is_file() else None)


def test_a_file_that_is_no_export_is_refused_with_the_way_to_go(empty, tmp_path):
    with h5py.File(tmp_path / "other.h5", "w") as f:
        f["features"] = np.ones((3, 4))
    (tmp_path / "text.h5").write_text("no")
    for name, wanted in (
        ("other.h5", r"no vacli export.*vacli store import FOLDER --track NAME"),
        ("text.h5", "cannot be read as HDF5"),
        ("absent.h5", "there is no file"),
        (".", "there is no file"),
    ):
        with pytest.raises(VacliError, match=wanted):
            import_export(tmp_path / name, empty)


def test_an_export_of_a_newer_format_is_refused(copy, empty):
    with h5py.File(copy, "r+") as f:
        f.attrs["vacli_export"] = np.int64(2)
    with pytest.raises(VacliError, match=r"export format 2, this vacli .* reads 1 to 1"):
        import_export(copy, empty)


def test_an_unfinished_export_is_refused_and_finished_by_export(original, copy, empty):
    with h5py.File(copy, "r+") as f:
        f["progress"][:] = 3
    with pytest.raises(VacliError, match=r"cut short \(3 of 7 entries\)"):
        import_export(copy, empty)
    export(original, copy, tell=lambda _: None)
    assert import_export(copy, empty).problems == []


def replace(group: h5py.Group, **how) -> None:
    """The same values, stored in another way."""
    values = group["values"][:]
    del group["values"]
    group.create_dataset("values", data=values, **how)


def external_storage(group: h5py.Group) -> None:
    aside = Path(group.file.filename).with_name("secret.bin")
    aside.write_bytes(group["values"][:].tobytes())
    shape = group["values"].shape
    del group["values"]
    group.create_dataset("values", shape, np.float16, external=[(str(aside), 0, h5py.h5f.UNLIMITED)])


def virtual(group: h5py.Group) -> None:
    name = group["values"].name
    layout = h5py.VirtualLayout(shape=group["values"].shape, dtype=np.float16)
    layout[:] = h5py.VirtualSource(".", "/real", shape=group["values"].shape)
    group.file["real"] = group["values"][:]
    del group["values"]
    group.file.create_virtual_dataset(name, layout)


def link(kind) -> object:
    def to(group: h5py.Group) -> None:
        group.file.move(group["values"].name, "elsewhere")
        group["values"] = kind

    return to


def dtype(kind, value) -> object:
    def to(group: h5py.Group) -> None:
        del group["values"]
        group.create_dataset("values", (40, 8), kind, data=np.full((40, 8), value, dtype=kind))

    return to


def huge(group: h5py.Group) -> None:
    """A consistent lie: record and shape agree on 10^9 rows that take no room in the file."""
    rewrite(group, lambda r: [r["arrays"][n]["shape"].__setitem__(0, 10**9) for n in ("values", "times_s")])
    for name, shape in (("values", (10**9, 8)), ("times_s", (10**9,))):
        kind = group[name].dtype
        del group[name]
        group.create_dataset(name, shape, kind)


def rewrite(group: h5py.Group, change) -> None:
    """A record that is changed and has its own digest again."""
    record = json.loads(group.attrs["record"])
    del record["digest"]
    change(record)
    text = json.dumps({**record, "digest": digest(record)})
    group.attrs["record"] = np.bytes_(text.encode())


def with_sums(change) -> object:
    """Other values, and a record with their sums: only the Track can tell."""

    def to(group: h5py.Group) -> None:
        import google_crc32c

        for name in ("values", "times_s"):
            array = group[name][:]
            change(name, array)
            group[name][:] = array
            raw = group[name][:].tobytes()
            sums = {"crc32c": google_crc32c.value(raw), "sha256": hashlib.sha256(raw).hexdigest()}
            rewrite(group, lambda r, name=name, sums=sums: r["arrays"][name].update(sums))

    return to


def partly_nan(name: str, array: np.ndarray) -> None:
    if name == "values":
        array[3, 2] = np.nan


def disordered(name: str, array: np.ndarray) -> None:
    if name == "times_s":
        array[:] = array[::-1].copy()


def flipped(group: h5py.Group) -> None:
    group["values"][5, 5] += 1


def text_record(text: bytes) -> object:
    return lambda group: group.attrs.__setitem__("record", np.bytes_(text))


def variable_text(group: h5py.Group) -> None:
    group.attrs["record"] = group.attrs["record"].decode()


REFUSED = {
    "soft link": (link(h5py.SoftLink("/elsewhere")), "is a link"),
    "external link": (link(h5py.ExternalLink("other.h5", "/values")), "is a link"),
    "external storage": (external_storage, "not plain bytes in this file"),
    "virtual": (virtual, "not plain bytes in this file"),
    "chunked": (lambda g: replace(g, chunks=(10, 8)), "not plain bytes in this file"),
    "gzip": (lambda g: replace(g, compression="gzip"), "not plain bytes in this file"),
    "compound": (dtype(np.dtype([("a", "<f2")]), 0), "wanted float16"),
    "object": (dtype(h5py.string_dtype(), "x"), "wanted float16"),
    "reference": (dtype(h5py.ref_dtype, h5py.Reference()), "wanted float16"),
    "vlen": (dtype(np.float64, 0.0), "wanted float16"),
    "big-endian": (dtype(np.dtype(">f2"), 0), "wanted float16"),
    "huge": (huge, "the file does not have them"),
    "other shape": (lambda g: rewrite(g, lambda r: r["arrays"]["values"]["shape"].__setitem__(1, 4)), "wanted float16"),
    "flipped": (flipped, "checksum of values"),
    "wrong crc": (lambda g: rewrite(g, lambda r: r["arrays"]["values"].update(crc32c=1)), "checksum of values"),
    "partly NaN": (with_sums(partly_nan), "partly NaN"),
    "times disordered": (with_sums(disordered), "strictly increasing"),
    "record changed": (lambda g: g.attrs.__setitem__("record", np.bytes_(g.attrs["record"].replace(b"2.15", b"2.16"))),
                       "record has been changed"),
    "other media": (lambda g: rewrite(g, lambda r: r.update(media="0" * 64)), "belongs to another track"),
    "media no digest": (lambda g: rewrite(g, lambda r: r.update(media=r["media"][:24] + "/../etc")), "digest"),
    "other recipe": (lambda g: rewrite(g, lambda r: r.update(recipe="0" * 64)), "belongs to another track"),
    "deep JSON": (text_record(b'{"a":' * 5000 + b"1" + b"}" * 5000), "nested too deep"),
    "deeper JSON": (text_record(b"[" * 60_000), "nested too deep"),
    "long JSON": (text_record(b'"' + b"x" * 70_000 + b'"'), "is no text of at most 65536"),
    "JSON that grows": (lambda g: rewrite(g, lambda r: r["provenance"].update(x=[[]] * 15_000)), "its record takes"),
    "not JSON": (text_record(b"\x1b[31mred"), "Expecting value"),
    "NaN in JSON": (lambda g: text_record(g.attrs["record"].replace(b"0.1}", b"NaN}"))(g), "JSON has NaN"),
    "text of no fixed length": (variable_text, "is no text of at most"),
    "no record": (lambda g: g.attrs.__delitem__("record"), "record"),
    "something more": (lambda g: g.create_group("more"), "it holds something else"),
    "something less": (lambda g: g.__delitem__("times_s"), "it holds something else"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_a_bad_entry_is_refused_and_stops_no_other(copy, empty, original, kind):
    spoil, said = REFUSED[kind]
    entry = original.entry_of(MAE, media(0))
    with h5py.File(copy, "r+") as f:
        spoil(f[entry])
    figures = import_export(copy, empty)
    listed = [p for p in figures.problems if p.startswith(f"{entry}: ")]
    assert len(listed) == 1
    assert said in listed[0]
    assert "\x1b" not in listed[0]
    assert entry not in empty.entries()
    assert figures.tracks == 5
    assert any("did not come along" in note for note in figures.notes)


def test_what_is_no_part_of_an_export_is_listed(copy, empty, original):
    with h5py.File(copy, "r+") as f:
        f["thesis"] = np.ones(3)
        f["\x1b[31m"] = np.ones(3)
        f["mae@0123456789abcdef"] = h5py.SoftLink(f"/{folder_name(MAE)}")
        f["mae@0123456789abcdee"] = f[folder_name(MAE)]  # a second name, which is not its digest
        f[folder_name(LOGMEL)].attrs["recipe"] = np.bytes_(b'{"track":"logmel","version":4}')
        f[f"{folder_name(MAE)}/{'0' * 24}"] = h5py.ExternalLink("/etc/passwd", "/")
    figures = import_export(copy, empty)
    said = "\n".join(figures.problems)
    assert "thesis: is no part" in said
    assert "\\x1b[31m: is no part" in said
    assert "\x1b" not in said
    assert "mae@0123456789abcdef: 'mae@0123456789abcdef' is a link" in said
    assert "mae@0123456789abcdee: its recipe is not the one" in said
    assert f"{folder_name(LOGMEL)}: its recipe is not the one" in said
    assert f"{'0' * 24}' is a link" in said
    assert (figures.tracks, figures.tombstones, figures.videos) == (5, 1, 5)
    assert not any(name.startswith("logmel") for name in empty.entries())


def with_videos(path: Path, *lines: dict | bytes) -> None:
    text = b"".join(line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n" for line in lines)
    with h5py.File(path, "r+") as f:
        del f["videos"]
        f["videos"] = np.frombuffer(text, np.uint8)
        f.attrs["videos_sha256"] = np.bytes_(hashlib.sha256(text).hexdigest().encode())


def video(**facts) -> dict:
    tracks = {"mae": {"folder": folder_name(MAE), "media": media(1)}}
    return {"id": "good", "root": "/data", "media": media(1), "split": None, "tracks": tracks, **facts}


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (video(id="../../etc/passwd"), "not safe as a path"),
        (video(id="/etc/passwd"), "not safe as a path"),
        (video(id="con"), "not safe as a path"),
        (video(id=7), "7|int"),
        (video(root=None), "must be text"),
        (video(root="\x1b[31m"), "wanted root, media and split"),
        (video(media="../x"), "must be a SHA-256"),
        (video(more=1), "wanted root, media and split"),
        (video(tracks={"mae": {"folder": "../mae", "media": media(1)}}), "points to"),
        (video(tracks={"../mae": {"folder": folder_name(MAE), "media": media(1)}}), "name of a track"),
        (
            video(tracks={"mae": {"folder": folder_name(MAE), "media": media(1), "more": 1}}),
            "has a track mae with",
        ),
        (video(tracks=[1]), "list"),
        ({"root": "/data"}, "id"),
        (b"[1, 2]\n", "no object"),
        (b"[" * 60_000 + b"\n", "nested too deep"),
        (b'{"id": "' + b"x" * 70_000 + b'"}\n', "wanted at most 65536"),
    ],
)
def test_a_bad_video_is_refused_and_stops_no_other(copy, empty, bad, said):
    with_videos(copy, bad, video(id="better"))
    figures = import_export(copy, empty)
    assert len(figures.problems) == 1
    assert re.match(f"video 1: .*({said})", figures.problems[0])
    assert list(empty.videos()) == ["better"]
    assert figures.tracks == 6


def test_a_changed_list_of_videos_names_nothing(copy, empty):
    with h5py.File(copy, "r+") as f:
        f["videos"][10] ^= 1
    figures = import_export(copy, empty)
    assert figures.problems == ["videos: the checksum of the list is wrong; no name is taken from it"]
    assert empty.videos() == {}
    assert figures.tracks == 6


def test_an_id_of_another_medium_stays_what_it_was(exported, empty, original):
    facts = {"root": "/mine", "media": "ab" * 32, "split": "validation"}
    empty.link("batch1/v1", facts, {})
    figures = import_export(exported, empty)
    assert len(figures.problems) == 1
    assert "batch1/v1 is another medium" in figures.problems[0]
    assert empty.videos()["batch1/v1"] == {**facts, "tracks": {}}
    assert figures.tracks == 6
    assert figures.videos == 4
    assert empty.has(MAE, media(1))


@pytest.mark.parametrize(
    "encoder",
    [
        {"kind": "os:system", "options": {}},
        {"kind": "mae", "options": {"weights": ["a", "b"]}},
        {"kind": 7, "options": {}},
        {"kind": "mae"},
        "mae",
    ],
)
def test_an_encoder_that_may_be_code_is_not_taken_from_a_file(copy, empty, encoder):
    track = {"folder": folder_name(MAE), "media": media(1)}
    with_videos(copy, video(tracks={"mae": {**track, "encoder": encoder}}))
    figures = import_export(copy, empty)
    assert empty.videos()["good"]["tracks"] == {"mae": track}
    assert figures.problems == []
    assert "may be any code" in figures.notes[0]


def test_a_full_store_stops_the_import(exported, empty, monkeypatch):
    def full(*_):
        raise StoreError("no space")

    monkeypatch.setattr(empty, "put", full)
    with pytest.raises(StoreError, match="no space"):
        import_export(exported, empty)


# ---- fuzz ----------------------------------------------------------------------------------------------------

FUZZ = """
import os, random, sys, time
from pathlib import Path
import h5py, numpy as np
from vacli import VacliError
from vacli.store import Store
from vacli.store.hdf5_import import import_export

source, store, count = Path(sys.argv[1]), Store(sys.argv[2]), int(sys.argv[3])
whole, random = source.read_bytes(), random.Random(int(sys.argv[4]))
tracks = {(store.record(e)["recipe"], store.record(e)["media"]): e for e in store.entries()}
spoiled = source.with_name("spoiled.h5")

class Memory:
    "A store that keeps nothing and checks all."
    def __init__(self): self.put_in = 0
    def has(self, recipe, media): return False
    def failure(self, recipe, media): return None
    def entries(self): return store.entries()
    def videos(self): return {}
    def put(self, recipe, media, track, provenance):
        entry = store.entry_of(recipe, media)
        right = store.read(entry)
        assert np.array_equal(track.values.view(np.uint8), right.values.view(np.uint8)), entry
        assert np.array_equal(track.times_s, right.times_s) and provenance == store.record(entry)["provenance"]
        self.put_in += 1
    def fail(self, recipe, media, reason):
        assert reason == store.failure(recipe, media)
    def link(self, video_id, facts, tracks):
        known = store.videos()[video_id]
        assert facts == {k: known[k] for k in facts} and tracks.items() <= known["tracks"].items()

said = slowest_s = 0
for number in range(count):
    bytes_ = bytearray(whole)
    kind = number % 4
    for _ in range(random.choice((1, 1, 1, 4, 30))):
        at = random.randrange(len(bytes_)) if kind else random.randrange(96)
        bytes_[at] = random.choice((bytes_[at] ^ 1 << random.randrange(8), 0, 255, random.randrange(256)))
    if kind == 1:
        del bytes_[random.randrange(len(bytes_)):]
    elif kind == 2:
        at = random.randrange(len(bytes_)); bytes_[at : at + 64] = random.randbytes(64)
    spoiled.write_bytes(bytes_)
    memory, began = Memory(), time.perf_counter()
    try:
        figures = import_export(spoiled, memory)
        said += bool(figures.problems)
        assert figures.problems or memory.put_in == len(tracks) - 1 or bytes_ == whole, (number, figures)
    except VacliError:
        said += 1
    slowest_s = max(slowest_s, time.perf_counter() - began)
peak_mb = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024
print(said, slowest_s, peak_mb)
"""


@pytest.mark.parametrize(
    "libver", ["as exported", "earliest"]
)  # with checksums in the structure, and without
@pytest.mark.parametrize("count", [200, pytest.param(10_000, marks=pytest.mark.slow)])
def test_torn_and_flipped_files_give_good_tracks_or_a_line(exported, original, tmp_path, count, libver):
    whole = tmp_path / "whole.h5"
    if libver == "earliest":
        with h5py.File(exported) as theirs, h5py.File(whole, "w", libver="earliest") as ours:
            for name, value in theirs.attrs.items():
                ours.attrs[name] = value
            for name in theirs:
                theirs.copy(name, ours)
    else:
        shutil.copy(exported, whole)
    command = [sys.executable, "-c", FUZZ, whole, original.path, str(count), str(count)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, (done.returncode, done.stderr[-3000:])
    said, slowest_s, peak_mb = map(float, done.stdout.split())
    assert said > count / 3
    assert slowest_s < 5
    assert peak_mb < 300
