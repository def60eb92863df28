"""Stores made to do harm, and a visitor that does with one all that can be done, watched: what it opens, takes, raises.

python -m tests.hostile_stores FOLDER    a line of JSON for each store
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import resource
import shutil
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import crc32c
import numpy as np
from vacli import VacliError
from vacli.store import Store, Track, digest, entry, folder_name, keeper, names

from .fault_layer import Layer, through

RECIPE = {"track": "mae", "version": 1}
FOLDER = folder_name(RECIPE)
MEDIA, FAILED, NEW, SPARSE = ("a0" * 32, "d3" * 32, "e4" * 32, "f5" * 32)
TRACK = Track(np.arange(12, dtype=np.float16).reshape(6, 2), np.arange(6) / 25)
VIDEO, FACTS = "v1", {"root": "/data", "media": MEDIA, "split": "train"}
PLACES = {"mae": {"folder": FOLDER, "media": MEDIA}}
MEMORY_BYTES, PATIENCE_S = 300 * 2**20, 5
OWN, OTHER = f"{FOLDER}/{MEDIA[:24]}", f"{FOLDER}/{FAILED[:24]}"  # entries
NAMES = f"videos/{names.folder_of(VIDEO)}"
PAGES = {
    "root": "zarr.json",
    "recipe": f"{FOLDER}/zarr.json",
    "record": f"{OWN}/zarr.json",
    "metadata": f"{OWN}/values/zarr.json",
    "names": f"{NAMES}/zarr.json",
    "videos": "videos/zarr.json",
    "memo": "fingerprints/zarr.json",
    "index": ".index/zarr.json",
    "staging": ".staging/zarr.json",
}
Case = Callable[[Path], object]  # done to a good store


def good(place: Path) -> None:
    """One track, one tombstone, one video, a remembered digest, an index."""
    store = Store(place, create=True)
    store.put(RECIPE, MEDIA, TRACK)
    store.fail(RECIPE, FAILED, "no picture")
    store.link(VIDEO, FACTS, PLACES)
    store.fingerprints.memo["key"] = MEDIA
    store.fingerprints.changed = True
    store.remember_fingerprints()
    keeper.index(store)


# ---- forging ---------------------------------------------------------------------------------------------------


def forge(place: Path, page: str, change: Callable[[dict[str, Any]], object]) -> None:
    """Change what a page says and sign it, as somebody who knows our code would."""
    whole = json.loads((place / page).read_bytes())
    facts = whole["attributes"]["vacli"]
    signed = facts.pop("digest", None)
    change(facts)
    if signed:
        text = json.dumps(facts, sort_keys=True, separators=(",", ":"))
        facts["digest"] = hashlib.sha256(text.encode()).hexdigest()
    (place / page).write_text(json.dumps(whole))


def setting(value: Any, *path: str) -> Callable[[dict[str, Any]], None]:
    def change(facts: dict[str, Any]) -> None:
        for part in path[:-1]:
            facts = facts[part]
        if value is ...:
            del facts[path[-1]]
        else:
            facts[path[-1]] = value

    return change


def _rows(n: Any) -> Callable[[dict[str, Any]], None]:
    def change(record: dict[str, Any]) -> None:
        record["arrays"]["values"]["shape"][0] = record["arrays"]["times_s"]["shape"][0] = n

    return change


def _sparse(place: Path, shape: list[int]) -> None:
    """An entry whose chunk is a hole of the size its record says, with its checksum unless it is far too large."""
    fields = {"recipe": digest(RECIPE), "media": SPARSE, "provenance": {}}
    folder = place / FOLDER / SPARSE[:24]
    times_s = np.arange(shape[0] if shape[0] < 1000 else 0) / 25
    arrays = {}
    for name, dtype, size, own in (("values", "float16", shape, 2), ("times_s", "float64", shape[:1], 8)):
        (folder / name).mkdir(parents=True)
        (folder / name / "zarr.json").write_bytes(entry.array_json(size, dtype))
        nbytes = own * int(np.prod(size, dtype=object))
        with open(folder / name / entry.chunk_name(len(size)), "wb") as f:
            if name == "times_s" and len(times_s):
                f.write(times_s.tobytes())
                crc = crc32c.crc32c(times_s.tobytes())
            else:
                with contextlib.suppress(OSError):  # more than this file system can hold
                    f.truncate(nbytes + 4)
                crc = _crc_of_zeros(nbytes) if nbytes < 2**31 else 0
            with contextlib.suppress(OSError):
                f.seek(nbytes)
                f.write(crc.to_bytes(4, "little"))
        arrays[name] = {"shape": size, "dtype": dtype, "crc32c": crc}
    record = {**fields, "arrays": arrays}
    (folder / "zarr.json").write_bytes(entry.group_json({**record, "digest": digest(record)}))


def _crc_of_zeros(nbytes: int) -> int:
    crc, block = 0, bytes(2**20)
    for start in range(0, nbytes, len(block)):
        crc = crc32c.crc32c(block[: nbytes - start], crc)
    return crc


def _deep(levels: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for _ in range(levels):
        found = {"x": found}
    return found


VALUES, TIMES = ("arrays", "values"), ("arrays", "times_s")
ROWS = (10**13, 2**40, 2**63, 10**30, 10**4000, -1, True, 6.0, "6", None, [], 7)
ODD: dict[
    str, tuple[tuple[str, ...], tuple[Any, ...]]
] = {  # of a record: where, and what is put there; ... takes away
    "shape": (
        (*VALUES, "shape"),
        (
            [],
            [6],
            [6, 2, 1, 1],
            [6, 0],
            [6, 2**30],
            [0, 2**40],
            [6, -2],
            [6, 2.0],
            [6, True],
            {},
            "62",
            6,
            None,
            [[6], 2],
        ),
    ),
    "dtype": ((*VALUES, "dtype"), ("float64", "float128", "object", "<U9", [], {}, None, 2, "O\0")),
    "clock": ((*TIMES, "dtype"), ("float32", "float16", "int64", None)),
    "crc": ((*VALUES, "crc32c"), ([], {}, "1", None, 1.5, True, -1, 2**40, 0, ...)),
    "attempt": (("attempt",), ("../..", "..", "/", "00000000", "0000000\n", 5, [], {}, None, True)),
    "failed": (("failed",), (None, [], {}, 1, False)),
    "media": (("media",), (FAILED, MEDIA[:24] + "/../../../etc", MEDIA[:24], [MEDIA], None, 7, {})),
    "recipe": (("recipe",), ("0" * 64, digest(RECIPE)[:16] + "/..", [], None, 1)),
    "provenance": (("provenance",), ([], None, "x", _deep(20), _deep(900), ...)),
    "arrays": (("arrays",), ([], None, {}, {"values": 1}, {"values": {}, "times_s": {}}, ...)),
    "values": (VALUES, ([], ...)),
    "times": (TIMES, (1, ...)),
}
FORGED_RECORDS = {f"rows {n!r:.20}": _rows(n) for n in ROWS} | {
    f"{name} {value!r:.60}": setting(value, *way) for name, (way, values) in ODD.items() for value in values
}
IDS = (
    "../../x", "/etc/passwd", "a\x1b]0;x\x07", "a\nb", "a\0", "CON", "a.", "a ", "a:b", "a\u202eb", "a\u200bb", "a／b",
    "x" * 300, "a\ud800", "", ["v1"], 1, None, {},
)  # fmt: skip
MAE = ("tracks", "mae")
ODD_NAMES: dict[str, tuple[tuple[str, ...], tuple[Any, ...]]] = {
    "root": (("root",), ([], {}, 1, True, ...)),
    "medium": (("media",), ([], {}, 1, True, "../x", "/etc/passwd", MEDIA[:24], ...)),
    "split": (("split",), ([], {}, 1, True, _deep(900), ...)),
    "tracks": (
        ("tracks",),
        ([], None, 1, *({n: PLACES["mae"]} for n in ("../x", "", "a\x1b")), {"mae": None}, {"mae": {}}),
    ),
    "folder": ((*MAE, "folder"), ("../../x", "..", ".staging", "/etc", "", None, [], 1)),
    "address": ((*MAE, "media"), ("../" * 8, "/etc/passwd", "", None, [], 1)),
}
FORGED_NAMES = {
    f"{name} {value!r:.60}": setting(value, *way)
    for name, (way, values) in ODD_NAMES.items()
    for value in values
}


# ---- what is no page at all ------------------------------------------------------------------------------------


def _gigabyte(path: Path) -> None:
    path.unlink()
    with open(path, "wb") as f:
        f.truncate(2**30)


def _text(text: str | bytes) -> Case:
    return lambda path: path.write_bytes(
        text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
    )


def _pipe(path: Path) -> None:
    _away(path)
    os.mkfifo(path)


def _socket(path: Path) -> None:
    _away(path)
    with socket.socket(socket.AF_UNIX) as s, contextlib.chdir(path.parent):  # its name may have 108 bytes
        s.bind(path.name)


def _device(path: Path) -> None:
    _away(path)
    try:
        os.mknod(path, 0o20666, os.makedev(1, 5))  # /dev/zero: reading it never ends
    except PermissionError:
        path.symlink_to("/dev/zero")


def _away(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _emptied(path: Path) -> None:
    _away(path)
    path.mkdir()


def _loop(path: Path) -> None:
    _away(path)
    path.symlink_to(path.name)


def _ours(text: str) -> Case:
    return _text(f'{{"attributes": {{"vacli": {text}}}}}')


TEXTS = {
    "brackets": "[" * 200_000, "few brackets": "[" * 60_000, "tables": '{"a":' * 10_000, "empty": "", "null": "null",
    "text": '"x"', "latin": b'{"\xe9": 1}', "utf-16": "{}".encode("utf-16"),
    "surrogate": b'{"attributes": {"vacli": "\xed\xa0\x80"}}',
    "list": "[1]", "number": "1", "no attributes": '{"attributes": []}', "none of ours": '{"attributes": {}}',
}  # fmt: skip
OURS = {
    "list": "[]", "null": "null", "NaN": "NaN", "infinite": "-Infinity", "NaN inside": '{"x": NaN}',
    "large": '{"x": 1e999}', "twice": '{"id": 1, "id": 2}', "too long a number": f'{{"x": {"9" * 5000}}}',
    "a long number": f'{{"x": {"9" * 4000}}}',
    "deep": f'{{"x": {"[" * 900}1{"]" * 900}}}', "surrogate": '{"\\ud800": "\\ud800"}',
    "wide": json.dumps({str(i): [] for i in range(3000)}),
}  # fmt: skip
NO_PAGES: dict[str, Case] = {
    **{name: _text(text) for name, text in TEXTS.items()},
    **{f"ours {name}": _ours(text) for name, text in OURS.items()},
    "gigabyte": _gigabyte,
    "pipe": _pipe,
    "socket": _socket,
    "device": _device,
    "folder": _emptied,
    "loop": _loop,
}
FEW = [(name, NO_PAGES[name]) for name in ("brackets", "gigabyte", "list", "pipe", "folder", "loop")]


def lead_out(place: Path, name: str, outside: Path) -> None:
    """Put a link in the place of a part of the store; where it leads, all is right."""
    if not os.path.lexists(outside / name):
        (outside / name).mkdir()
        (outside / name / "precious").mkdir()
        (outside / name / "precious" / "thesis.doc").write_text("do not touch")
        os.utime(outside / name / "precious", (1, 1))
    _away(place / name)
    (place / name).symlink_to(outside / name)


def cases() -> Iterator[tuple[str, str, Callable[[Path, Path], object]]]:
    """Kind, name and making of every hostile store: what is done to (a good one, a folder outside with a copy)."""
    for name, change in FORGED_RECORDS.items():
        yield "record", name, lambda place, _, change=change: forge(place, PAGES["record"], change)
    for name, change in FORGED_NAMES.items():
        yield "names", name, lambda place, _, change=change: forge(place, PAGES["names"], change)
    for odd in IDS:
        yield "names", f"id {odd!r:.20}", lambda place, _, odd=odd: _named(place, odd)
    for page, path in PAGES.items():
        for name, change in NO_PAGES.items() if page in ("root", "recipe", "record", "names") else FEW:
            yield "page", f"{page}: {name}", lambda place, _, path=path, change=change: change(place / path)
    for name in (OWN, f"{OWN}/values", f"{OWN}/values/c.0.0", FOLDER, "videos", NAMES, ".staging"):
        for kind in (_pipe, _socket, _device, _emptied, _away):
            yield (
                "place",
                f"{kind.__name__} {name}",
                lambda place, _, name=name, kind=kind: kind(place / name),
            )
    for name in (OWN, f"{OWN}/values", f"{OWN}/values/c.0.0", *PAGES.values()):
        yield "link", name, partial(_linked, name)
    for name in (FOLDER, "videos", NAMES, "fingerprints", ".staging", ".trash", ".quarantine", ".index"):
        yield "linked folder", name, partial(_linked, name)
        yield "linked folder", f"loop {name}", lambda place, _, name=name: _loop(place / name)
    for shape in ([64, 2**21], [10**13, 1], [8 * 10**12, 1], [2**38, 1]):
        yield "hole", f"{shape}", lambda place, _, shape=shape: _sparse(place, shape)
    yield "large", "clock", lambda place, _: _sparse(place, [2**25, 1])
    for page in ("memo", "index"):
        yield "large", page, lambda place, _, page=page: _many(place / PAGES[page])


def _many(path: Path) -> None:
    """16 MB of JSON that are 350 MB of Python."""
    _ours(f'{{"x": [{"[]," * (2**24 // 3)}[]]}}')(path)


def _linked(name: str, place: Path, outside: Path) -> None:
    lead_out(place, name, outside)


def _named(place: Path, odd: Any) -> None:
    """Names of an id that no plain_id gave, in the folder that would be its own."""
    old = place / NAMES
    forge(place, PAGES["names"], setting(odd, "id"))
    old.rename(place / "videos" / names.folder_of(odd if isinstance(odd, str) else "x"))


# ---- visiting --------------------------------------------------------------------------------------------------


class Visit:
    """All that can be done with a store. errors: what was raised but VacliError and KeyError, or is not right."""

    def __init__(self, place: Path) -> None:
        self.errors: list[str] = []
        self.sparse: Any = None
        self.named: list[str] = []
        store = self._try("open", Store, place)
        if store is not None:
            self._read(store)
        store = self._try("open for writing", Store, place, create=True)
        if store is not None:
            self._write(store)
            self._keep_house(store)

    def _try(self, what: str, call: Callable[..., Any], *args: Any, **options: Any) -> Any:
        try:
            return call(*args, **options)
        except (VacliError, KeyError) as e:
            if "\n" in str(e) or len(str(e)) > 1000:
                self.errors.append(f"{what}: not one line: {e!r:.300}")
        except Exception as e:  # TimeoutError too, from `main`
            self.errors.append(f"{what}: {e!r:.300}")
        return None

    def _read(self, store: Store) -> None:
        self.named = [n for n, _, wrong in self._try("verify", lambda: list(store.verify())) or [] if wrong]
        for name in self._try("entries", store.entries) or []:
            self._try("record", store.record, name)
            self._try("read", store.read, name)
            self._try("recipe", store.recipe_of, name.partition("/")[0])
        for facts in (self._try("videos", store.videos) or {}).values():
            for track in facts["tracks"].values():
                self._try("recipe of names", store.recipe_of, track["folder"])
                self._try("get by names", store.get, RECIPE, track["media"])
        self._try("index", keeper.index, store)
        self._try("usage", keeper.usage, store)
        got = self._try("get sparse", store.get, RECIPE, SPARSE)
        self.sparse = got and [got.values.shape, int(got.values[-1].astype(np.int64).sum())]
        for look in (store.get, store.map):
            self._get(look, MEDIA, TRACK)
        for media in (MEDIA, FAILED, NEW):
            for call in (store.has, store.failure, store.provenance):
                self._try(call.__name__, call, RECIPE, media)

    def _get(self, look: Callable[..., Track], media: str, wanted: Track) -> bool:
        got = self._try(look.__name__, look, RECIPE, media)
        if got is not None and not (
            np.array_equal(got.values, wanted.values) and np.array_equal(got.times_s, wanted.times_s)
        ):
            self.errors.append(f"get gave another track: {got!r}")
        return got is not None

    def _write(self, store: Store) -> None:
        for media in (NEW, MEDIA):
            done = self._try("put", lambda media=media: store.put(RECIPE, media, TRACK) or True)
            if done and not self._get(store.get, media, TRACK):
                self.errors.append("put said it was done, and nothing is there")
        self._try("fail", store.fail, RECIPE, FAILED, "no picture")
        for video in (VIDEO, "v2"):
            done = self._try("link", lambda video=video: store.link(video, FACTS, PLACES) or True)
            if done and video not in (self._try("videos", store.videos) or {video: 0}):
                self.errors.append("link said it was done, and nothing is there")
        self._try("unlink", store.unlink, "v2")
        store.fingerprints.changed = True
        self._try("remember", store.remember_fingerprints)

    def _keep_house(self, store: Store) -> None:
        found = self._try("garbage", keeper.garbage, store, [])
        self._try("gc", lambda: keeper.gc(store, found or [], []))
        self._try("remove", keeper.remove, store, VIDEO, [])
        self._try("drop", store.drop, OTHER)


_BY_PATH = {"open"} | {
    f"os.{n}" for n in ("scandir", "listdir", "rename", "remove", "rmdir", "mkdir", "utime", "truncate")
}


def watch(outside: Path, seen: list[str]) -> None:
    """Whatever this process does from now on in `outside`, by whatever path, is noted in `seen`."""
    bait = os.path.realpath(outside)

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event not in _BY_PATH or not isinstance(args[0], str | bytes | os.PathLike):
            return
        path = os.path.abspath(os.fsdecode(args[0]))
        follows = event in ("os.scandir", "os.listdir") or (
            event == "open" and not (args[2] or 0) & os.O_NOFOLLOW
        )
        real = os.path.realpath(path if follows else os.path.dirname(path))
        if f"{real}/".startswith(f"{bait}/"):
            seen.append(f"{event} {path}")

    sys.addaudithook(hook)


def main(top: Path) -> None:
    """Makes, visits and removes one hostile store after the other below `top`; a line of JSON for each."""

    def too_long(*_: Any) -> None:
        raise TimeoutError(f"after {PATIENCE_S} s")

    signal.signal(signal.SIGALRM, too_long)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
    seen: list[str] = []
    watch(top / "outside", seen)
    with through(Layer()):  # which waits for no disk
        good(top / "good")
        shutil.copytree(top / "good", top / "outside")
        assert Store(top / "outside").has(RECIPE, MEDIA)
        assert seen  # it does watch
        for kind, name, make in cases():
            place = Path(shutil.copytree(top / "good", top / "s.zarr"))
            make(place, top / "outside")
            seen.clear()
            signal.alarm(PATIENCE_S)
            visit = Visit(place)
            signal.alarm(0)
            found = {
                "errors": visit.errors,
                "seen": sorted(set(seen)),
                "sparse": visit.sparse,
                "named": visit.named,
            }
            print(json.dumps([kind, name, found]), flush=True)
            shutil.rmtree(place)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
