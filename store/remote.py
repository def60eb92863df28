"""Stores elsewhere than on a disk: objects behind any fsspec URL, read through a cache that is an ordinary store.

The layout is that of a folder, and so is the promise: a track is whole or absent. An object store knows no rename and
no locks, but it puts each object whole; so

- the arrays of a track are put first, under a name of this attempt alone (`<entry>/<8 hex digits>/values/...`): no
  object is ever written over, two writers never mix. The record `<entry>/zarr.json` names its attempt and is put last;
  arrays without a record do not exist, and a day later they are garbage (`orphans`).
- The record is put on the condition that there is none (S3, Google, Azure and memory:// know it): the first complete
  track stays. Where a server does not know the condition, the last complete one does.
- A track is committed to this machine before it is sent, in `.upload/` of the cache: if the sending fails nothing
  that was computed is lost, and whoever asks for the track next sends it.
- The cache (`$VACLI_CACHE`, else `~/.cache/vacli`) holds what was read or written, byte for byte, each entry checked
  before it comes to its place. It serves nothing that the remote does not list, may be removed at any time, and can be
  opened as a store of its own where there is no network. What is fetched is not flushed: its checksums vouch for it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from . import disk, entry
from .bucket import ABSENT_S, RECORD, SMALL, Bucket, Gone, Object, Shelves
from .entry import Damaged
from .names import FOLDER
from .place import Place, StoreError
from .track import Track

_ORPHAN_S = 24 * 3600  # age of arrays without a record that belong to no writer any more
_ATTEMPT = re.compile(r"[0-9a-f]{8}")


def place_of(place: str | Path) -> Place:
    """The place behind a folder, a file:// URL of one, or any other fsspec URL (s3://bucket/features.zarr)."""
    scheme, mark, rest = str(place).partition("://")
    if isinstance(place, Path) or not mark:
        return Place(Path(place))
    return Place(Path(rest)) if scheme in ("file", "local") else RemotePlace(str(place))


class RemotePlace(Place):
    """A store behind a URL. `path` is its cache on this machine, an ordinary store folder; see the module's docstring.

    What others do is seen late: a track that came is seen after 5 s, one that was removed may be served from the cache
    for a minute. Names of videos are read anew each time. Two machines that name the same video in the same fraction
    of a second: the later one stays, and what the other named is named by its next run; on one machine they wait for
    each other.

    Raises StoreError for what the remote refuses; OSError (see `told`) is of the cache alone.
    """

    def __init__(self, url: str) -> None:
        super().__init__(_cache_of(url.rstrip("/")), url.rstrip("/"))
        self._bucket = Bucket(self.name)
        self._cache, self._unsent = Place(self.path), Place(self.path / ".upload")
        self._shelves = Shelves(self._bucket, self._cached_text)
        self._ahead: dict[str, bytes] = {}  # what was read together or before, each for one `load`

    @property
    def attempt(self) -> str:
        """A fresh name: no two writers put their arrays under the same one."""
        return uuid.uuid4().hex[:8]

    @contextlib.contextmanager
    def told(self, doing: str) -> Iterator[None]:
        """What the disk of the cache refuses, in one line: a StoreError."""
        try:
            yield
        except OSError as e:
            raise StoreError(
                f"cannot {doing} in {self.path}, the cache of {self.name}: {e.strerror or e}; free some space or set "
                "VACLI_CACHE to another folder, and run again: what is stored is kept"
            ) from e

    def absent(self) -> bool:
        """Nothing there, or what a creation stopped half-way leaves."""
        self._ahead = self._bucket.read({RECORD: SMALL})
        return not self._ahead and self._bucket.names() <= {"videos"}

    def create(self, attributes: dict[str, Any]) -> None:
        """Make it; the group's zarr.json comes last."""
        self._bucket.write(f"videos/{RECORD}", entry.group_json({}))
        self._bucket.write(RECORD, entry.group_json(attributes))

    def open(self) -> None:
        """Make the cache ready; what the remote is used for elsewhere nobody can see."""
        disk.make_folders(self.path)
        for place in (self._cache, self._unsent):
            if not (place.path / RECORD).exists():
                place.create({})
        self._keep(RECORD, self.load(RECORD, entry.JSON_LIMIT))
        super().open()
        self.locks = False

    # ---- files and folders ---------------------------------------------------------------------------------

    def load(self, path: str, limit: int) -> bytes:
        """A file, as it is now. Raises FileNotFoundError, ValueError (larger than `limit` bytes)."""
        text = self._ahead.pop(path, None)
        if text is None:
            text = self._bucket.read({path: limit + 1}).get(path)
        if text is None:
            raise FileNotFoundError(errno.ENOENT, "no such object", path)
        if len(text) > limit:
            raise ValueError(f"{path} has more than {limit} bytes")
        if path != RECORD:
            with contextlib.suppress(OSError):  # the cache can do without
                self._keep(path, text)
        return text

    def folders(self, path: str) -> list[str]:
        """The names of the folders in a folder; of a folder of entries, of those with a record."""
        if not path:  # some backends keep the names of empty folders
            return [
                f for f in self._bucket.names() if FOLDER.fullmatch(f) and self._shelves.entries(f, ABSENT_S)
            ]
        if path == "videos":
            self._read_ahead()
        return [m for m, objects in self._shelves.entries(path, ABSENT_S).items() if RECORD in objects]

    def stamps(self, folder: str) -> dict[str, str]:
        """The names of the entries in a folder, each with a stamp that another entry in its place would not have."""
        entries = self._shelves.entries(folder, ABSENT_S).items()
        return {m: o[RECORD].stamp for m, o in entries if RECORD in o and entry.NAME.fullmatch(m)}

    def save(self, path: str, data: bytes) -> None:
        """Replace a file all at once, and in the cache."""
        self._bucket.write(path, data)
        self._keep(path, data)

    @contextlib.contextmanager
    def locked(self, folder: str) -> Iterator[None]:
        """One writer in a folder at a time on this machine."""
        self._ahead.clear()
        with super().locked(folder):
            yield

    def _read_ahead(self) -> None:
        """The names of all videos, in one listing and one reading of those that the cache has not."""
        listed = self._shelves.entries("videos", 0)
        for name, objects in list(listed.items()):
            with contextlib.suppress(FileNotFoundError):
                self._ahead[f"videos/{name}/{RECORD}"] = self._shelves.text(f"videos/{name}", objects)
        for name in set(self._cache.folders("videos")) - listed.keys():
            disk.remove(self.path / "videos" / name)

    def _keep(self, path: str, data: bytes) -> None:
        """A small file in the cache."""
        if self._cached_text(path) == data:
            return
        with self.staging() as staged:
            _spill(staged / RECORD, data)
            _make_folder((self.path / path).parent)
            disk.rename(staged / RECORD, self.path / path)

    def _cached_text(self, path: str) -> bytes:
        with contextlib.suppress(OSError, ValueError):
            return disk.read_small(self.path / path, SMALL)
        return b""

    # ---- entries -------------------------------------------------------------------------------------------

    def claim(self, what: str) -> Callable[[], None] | None:
        """As on a disk, for the processes of this machine; whoever gets it sees what the one before it has sent."""
        given = super().claim(what)
        if given is not None:
            self._shelves.age()
        return given

    def record(self, name: str) -> dict[str, Any]:
        """The checked record of an entry; the sizes of its objects are those of the listing, which also brings the
        records of its neighbours: asking for thousands takes a few round trips. What an earlier run could not send is
        sent now. Raises FileNotFoundError, Damaged.
        """
        if (self._unsent.path / name).exists():
            with self.told("send a track"):
                self._send(name)
        objects = self._shelves.objects(name)
        with contextlib.suppress(ValueError, FileNotFoundError):
            return self._checked(name, objects)
        objects = self._shelves.look(name)  # a listing is no moment: look again before it is called damaged
        try:
            return self._checked(name, objects)
        except ValueError as e:
            raise entry.damaged(Path(name), str(e)) from e

    def _checked(self, name: str, objects: dict[str, Object]) -> dict[str, Any]:
        """The record among an entry's objects. Raises FileNotFoundError, ValueError (not all of it is there)."""
        text = self._shelves.text(name, objects)
        if len(text) > entry.JSON_LIMIT:
            raise ValueError(f"its record has more than {entry.JSON_LIMIT} bytes")
        record = entry.parse_record(text, *name.split("/"))
        for path, size in _files(record).items():
            if path not in objects or size not in (None, objects[path].size):
                raise ValueError(f"{path} is not there, or not the {size} bytes its record says")
        return record

    def read(
        self, name: str, record: dict[str, Any], mapped: bool = False, everything: bool = False
    ) -> Track:
        """The Track of a checked record, from the cache; fetched first where the cache has it not, or not whole.

        everything: fetched anyhow, and looked at throughout. Raises Damaged if the remote's is, FileNotFoundError.
        """
        if not everything:
            with contextlib.suppress(FileNotFoundError, Damaged):
                return self._cached(name, record, mapped)
        try:
            with self.told("fetch a track"), self.staging() as staged:
                fetched = staged / name
                self._fetch(name, record, fetched)
                track = entry.read(fetched, record, mapped, everything=True)
                self._settle(fetched, name)
                return track
        except Gone as e:
            self._shelves.look(name)
            self.record(name)  # damaged, if there is still one that says what is not there
            raise FileNotFoundError(errno.ENOENT, "removed while it was read", name) from e

    def _cached(self, name: str, record: dict[str, Any], mapped: bool) -> Track:
        mine = entry.check(self.path / name)
        if mine["digest"] != record["digest"]:
            raise FileNotFoundError(errno.ENOENT, "another entry", name)
        return entry.read(self.path / name, mine, mapped)

    def _fetch(self, name: str, record: dict[str, Any], target: Path) -> None:
        """The files of an entry, byte for byte. Raises Gone if they are no longer those of the record."""
        try:
            objects, files = self._shelves.objects(name), _files(record)
            text = self._shelves.text(name, objects)
            sizes = {p: min(objects[p].size, SMALL) if n is None else n for p, n in files.items()}
            if entry.parse_record(text, *name.split("/"))["digest"] != record["digest"]:
                raise Gone(name)
        except (FileNotFoundError, KeyError, ValueError) as e:
            raise Gone(name) from e
        _make_folder(target)
        _spill(target / RECORD, text)
        pieces = self._bucket.pieces({f"{name}/{p}": n for p, n in sizes.items()})
        for path, run in itertools.groupby(pieces, key=lambda piece: piece[0]):
            inside = path.removeprefix(f"{name}/")
            _make_folder((target / inside).parent)
            with disk.NewFile(target / inside, sizes[inside]) as f:
                for _, data in run:
                    f.write(data)

    def _settle(self, whole: Path, name: str) -> None:
        """A whole entry to its place in the cache, instead of one that may be there; with its recipe."""
        folder = name.partition("/")[0]
        _make_folder(self.path / folder)
        if not (self.path / folder / RECORD).exists():
            with contextlib.suppress(FileNotFoundError, ValueError):
                self.load(f"{folder}/{RECORD}", SMALL)
        for _ in range(3):
            if self._rename_to(whole, self.path / name):
                return
            if gone := self._cache.move(name, ".trash"):
                disk.remove(gone)

    def commit(self, staged: Path, name: str, tombstone: bool) -> None:
        """Safe on this machine, then sent. Raises StoreError if it cannot be sent; it is when somebody asks for it."""
        with self._unsent.locked(name.partition("/")[0]):
            self._unsent.commit(staged, name, tombstone)
        if staged.exists():  # another process has one to send, and ours is not needed
            self._send(name)
        else:
            self._upload(name)  # locked as long as its staging lasts

    def _send(self, name: str) -> None:
        """What lies in .upload, to the remote, one process of this machine at a time."""
        local = self._unsent.path / name
        for _ in range(3):
            try:
                with disk.open_folder(local) as fd:
                    disk.lock(fd)
                    if os.path.samestat(os.fstat(fd), os.stat(local)):
                        return self._upload(name)
            except FileNotFoundError:
                if not local.exists():
                    return  # another process has sent it
        raise StoreError(f"{self.name}: others keep sending {name}; run again")

    def _upload(self, name: str) -> None:
        """The arrays, then the record, unless a complete track is there; then the entry is the cache's."""
        local = self._unsent.path / name
        record = self._sound(name, local)
        text = disk.read_small(local / RECORD, entry.JSON_LIMIT)
        try:
            if self._put_there(name, record, text):
                self._shelves.look(name)
                self._settle(local, name)
            elif gone := self._unsent.move(name, ".trash"):
                disk.remove(gone)
        except StoreError as e:
            what = f"what was computed lies in {self._unsent.path} and is sent by the next run"
            raise StoreError(f"{e}; {what}") from e

    def _put_there(self, name: str, record: dict[str, Any], text: bytes) -> bool:
        """False if a complete one is there already: content-addressed, it is as good as ours, and stays."""
        files = {f"{name}/{p}": self._unsent.path / name / p for p in _files(record)}
        sent = False
        for _ in range(3):
            there, theirs = self._theirs(name)
            if theirs and theirs["digest"] == record["digest"]:
                return True  # ours, sent before
            if theirs and ("failed" in record or "failed" not in theirs):
                with contextlib.suppress(StoreError):  # else they are orphans, and go a day later
                    self._bucket.remove(name, list(files) if sent else [])
                return False
            if not sent:
                self._bucket.upload(files)
                sent = True
            if there:  # a tombstone, or a record without its arrays
                self._bucket.write(f"{name}/{RECORD}", text)
                return True
            if self._bucket.create(f"{name}/{RECORD}", text):
                return True
        raise StoreError(f"{self.name}: others keep writing {name}; run again")

    def _theirs(self, name: str) -> tuple[bool, dict[str, Any] | None]:
        """Is there a record now? It, if it is whole."""
        for _ in range(2):  # somebody may write between the listing and the reading
            objects = self._shelves.look(name)
            if RECORD not in objects:
                return False, None
            with contextlib.suppress(FileNotFoundError, ValueError):
                return True, self._checked(name, objects)
        return True, None

    def _sound(self, name: str, local: Path) -> dict[str, Any]:
        """The record of what is to be sent; its disk may have failed since it was written. Raises Damaged."""
        try:
            record = entry.check(local)
            if "failed" not in record:
                entry.read(local, record, mapped=True)
        except Damaged:
            self._unsent.move(name, ".quarantine")
            raise
        return record

    def move(self, name: str, hidden: str) -> Path | None:
        """To .quarantine there, or away for good: an entry (its record first), a recipe, names of a video, an orphan.

        Returns where the cache's copy lies, if it had one. What nobody may set aside stays: an OSError.
        """
        parts = name.split("/")
        if len(parts) == 3:  # an orphan; unless its upload has gone on since it was found
            above = "/".join(parts[:2])
            if name in self._orphans_of(above, self._shelves.look(above)):
                self._remove(name, self._bucket.listing(name))
            return None
        if hidden == ".trash":
            self._remove(name, self._bucket.listing(name))
            if gone := self._unsent.move(name, hidden):
                disk.remove(gone)
        else:
            try:
                self._set_aside(name, f"{hidden}/{name.replace('/', '.')}.{self.attempt}")
            except StoreError as e:
                raise OSError(errno.EACCES, str(e)) from e
        return self._cache.move(name, hidden)

    def _set_aside(self, name: str, aside: str) -> None:
        found = self._bucket.listing(name)
        if found:
            self._bucket.write(f"{aside.partition('/')[0]}/{RECORD}", entry.group_json({}))
            self._bucket.copy({p: aside + p.removeprefix(name) for p in found})
            self._remove(name, found)

    def _remove(self, name: str, found: dict[str, Object]) -> None:
        records = [p for p in found if p.count("/") == 2 and p.endswith(f"/{RECORD}")]
        self._bucket.remove(name, records)
        self._bucket.remove(name, [p for p in found if p not in records])
        self._shelves.forget(name.partition("/")[0])

    # ---- leftovers -----------------------------------------------------------------------------------------

    def leftovers(self) -> list[Path]:
        """What killed processes left in the cache."""
        return [*super().leftovers(), *self._unsent.leftovers()]

    def orphans(self) -> dict[str, int]:
        """Arrays that no record names, a day old, of uploads that were stopped; and what was set aside as damaged."""
        found: dict[str, int] = {}
        for folder in self.folders(""):
            for media, objects in list(self._shelves.entries(folder, 0).items()):
                found.update(self._orphans_of(f"{folder}/{media}", objects))
        for path, listed in self._bucket.listing(".quarantine").items():
            if path.count("/") > 1:
                name = "/".join(path.split("/")[:2])
                found[name] = found.get(name, 0) + listed.size
        return found

    def _orphans_of(self, name: str, objects: dict[str, Object]) -> dict[str, int]:
        live = ""
        found: dict[str, int] = {}
        if RECORD in objects:
            try:
                live = self._checked(name, objects).get("attempt", "")
            except (FileNotFoundError, ValueError):
                return {}  # damaged: what belongs to it is not for us to say
        for path, listed in objects.items():
            attempt = path.partition("/")[0]
            old = listed.written_s is not None and time.time() - listed.written_s > _ORPHAN_S
            if old and _ATTEMPT.fullmatch(attempt) and attempt != live:
                found[f"{name}/{attempt}"] = found.get(f"{name}/{attempt}", 0) + listed.size
        return found


def _files(record: dict[str, Any]) -> dict[str, int | None]:
    """The files of an entry beside its record, by their path in it, with the sizes that the record tells."""
    inner = f"{record['attempt']}/" if record.get("attempt") else ""
    files: dict[str, int | None] = {f"{inner}{RECORD}": None} if inner else {}
    for name in entry.ARRAYS if "arrays" in record else ():
        array = record["arrays"][name]
        files[f"{inner}{name}/{RECORD}"] = None
        if size := entry.chunk_bytes(array):
            files[f"{inner}{name}/{entry.chunk_name(len(array['shape']))}"] = size
    return files


def _cache_of(url: str) -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    base = Path(os.environ.get("VACLI_CACHE") or Path(home, "vacli"))
    readable = re.sub(r"[^A-Za-z0-9._-]+", "-", url.partition("://")[2]).strip("-.")[-40:]
    return base / f"{readable}-{hashlib.sha256(url.encode()).hexdigest()[:16]}"


def _make_folder(path: Path) -> None:
    """As disk.make_folders, but not flushed."""
    for folder in (*reversed(path.parents), path):
        if not folder.exists():
            with contextlib.suppress(FileExistsError):
                disk.make_folder(folder)


def _spill(path: Path, data: bytes) -> None:
    """A new file that is not flushed."""
    with disk.NewFile(path) as f:
        f.write(data)
