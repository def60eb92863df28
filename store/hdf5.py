"""A whole store as one HDF5 file and back: resumable, never half-written, and proof against strangers' files.

The file has the store's own tree, and h5py reads it without us: `h5py.File(f)["mae@…/…/values"][:]`.

    /                                    attributes: vacli_export (format), vacli (version), licence, entries (how
                                         many), content and videos_sha256 (digests)
    /progress                            how many entries are written; equal to `entries` in a finished file
    /videos                              bytes: a line of JSON for each video, with its "id"
    /<track>@<recipe16>/                 attribute recipe: JSON
    /<track>@<recipe16>/<media24>/       attribute record: JSON, as in the store (a tombstone has only this)
    /<track>@<recipe16>/<media24>/values, times_s    contiguous, little-endian, no filter; times in seconds

HDF5 does not survive a kill while it changes its structure. So the structure is laid down once, with room for all
data, and made durable; from then on plain bytes are written into the room, and `progress` counts what is on the disk.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import crc32c
import numpy as np

from .. import VacliError, __version__
from . import disk, strangers
from .entry import Damaged, Unreadable
from .hdf5_import import FORMAT, Figures, dtype_of, opened
from .recipe import digest
from .store import Store
from .strangers import one_line

LICENCE = "if any of it was made from Aff-Wild2: its licence forbids sharing features derived from it"
_NOTE_BYTES = 256 * 2**20  # written between two notes of progress: what a kill can cost
_ENTRY_BYTES = 8192  # of one entry beside its data, for the estimate of space


@dataclass
class _Plan:
    """What a file shall hold: records by entry, recipes by folder, the lines of the videos, the digest of it all."""

    records: dict[str, dict[str, Any]]
    recipes: dict[str, dict[str, Any]]
    videos: bytes
    content: str

    @property
    def nbytes(self) -> int:
        return sum(map(_nbytes, self.records.values()))


def export(store: Store, out: Path, tell: Callable[[str], object] = print) -> Figures:
    """Copy every track, tombstone, recipe and video of the store into one HDF5 file.

    The file is whole or as it was before: `<out>.part` is filled and renamed at the end. Killed at any moment, the
    same call goes on where it was, or begins again if the store has changed (`tell` says so). Damaged tracks are set
    aside as by `Store.get`, left out and listed. Raises VacliError if `out` is there and no vacli export, or cannot
    be written (a full disk: what is written is kept).
    """
    tell(f"note: {LICENCE}")
    out = Path(os.path.realpath(out))
    wrong: dict[str, str] = {}
    with _told(out), _alone(out):
        there = _content(out, finished=True)
        while True:
            plan = _plan(store, wrong)
            figures = Figures(videos=plan.videos.count(b"\n"), problems=list(wrong.values()))
            if there == plan.content:
                tell(f"{out} holds all of it already: nothing to do")
                figures.there = len(plan.records)
                break
            part = _part(plan, out, tell)
            found = _fill(store, plan, part, figures)
            if not found:
                os.replace(part, out)
                disk.sync_folder(out.parent)
                break
            wrong |= found
            disk.remove(part)
            tell(f"{len(found)} cannot be read: beginning again without")
        figures.size_bytes = out.stat().st_size
    return figures


def _plan(store: Store, wrong: dict[str, str]) -> _Plan:
    """What the store holds now, without what is wrong, to which it adds what it finds."""
    records: dict[str, dict[str, Any]] = {}
    recipes: dict[str, dict[str, Any]] = {}
    for entry in store.entries():
        folder = entry.partition("/")[0]
        if entry in wrong:
            continue
        try:
            recipe = recipes.get(folder) or store.recipe_of(folder)
            records[entry], recipes[folder] = store.record(entry), recipe
        except (Damaged, Unreadable, KeyError) as e:
            wrong[entry] = one_line(e)
    videos = "".join(json.dumps({"id": id, **facts}) + "\n" for id, facts in store.videos().items()).encode()
    whole = {
        "format": FORMAT,
        "entries": {entry: record["digest"] for entry, record in records.items()},
        "videos": hashlib.sha256(videos).hexdigest(),
    }
    return _Plan(records, recipes, videos, digest(whole))


def _part(plan: _Plan, out: Path, tell: Callable[[str], object]) -> Path:
    """The file to be filled: what a killed export of the same content left, or a new one, durable."""
    part, laying = out.with_name(f"{out.name}.part"), out.with_name(f".{out.name}.laying")
    disk.remove(laying)  # left by a kill
    found = _content(part)
    if found == plan.content:
        tell(f"going on with {part.name}")
    elif found is not None:
        tell(f"the store has changed since {part.name} was begun: beginning again")
    size_bytes = plan.nbytes + len(plan.videos) + _ENTRY_BYTES * len(plan.records)
    used_bytes = os.stat(part).st_blocks * 512 if found is not None else 0
    volume = os.statvfs(out.parent)
    free_bytes = volume.f_bavail * volume.f_frsize
    if size_bytes - used_bytes > free_bytes:
        raise VacliError(
            f"cannot write {out}: it takes {size_bytes / 1e9:.3f} GB, and its disk has {free_bytes / 1e9:.3f} GB left; "
            "free some space and run the same command again"
        )
    if found != plan.content:
        try:
            _lay(plan, laying)
            os.replace(laying, part)
            disk.sync_folder(part.parent)
        finally:
            disk.remove(laying)
    return part


def _lay(plan: _Plan, path: Path) -> None:
    """The structure of the file: everything but the values and times, whose room is there but not written."""
    import h5py

    # The format of HDF5 1.8: every reader since 2008 knows it, its structure has checksums, attributes may be large.
    # Aligned to 8 bytes, so that the count of progress is written at once or not at all, and arrays can be mapped.
    how = {"libver": ("v108", "v108"), "alignment_threshold": 1, "alignment_interval": 8, "locking": False}
    pages = _Pages()
    with h5py.File(pages, "w", **how) as f:
        f.attrs["vacli_export"], f.attrs["entries"] = np.int64(FORMAT), np.int64(len(plan.records))
        _note(f, "vacli", __version__)
        _note(f, "licence", LICENCE)
        _note(f, "content", plan.content)
        _note(f, "videos_sha256", hashlib.sha256(plan.videos).hexdigest())
        _room(f, "progress", (1,), "<u8")[:] = 0
        videos = _room(f, "videos", (len(plan.videos),), "u1")
        if plan.videos:
            videos[:] = np.frombuffer(plan.videos, np.uint8)
        for folder, recipe in plan.recipes.items():
            _note(f.create_group(folder), "recipe", json.dumps(recipe, allow_nan=False))
        for entry, record in plan.records.items():
            group = f.create_group(entry)
            _note(group, "record", json.dumps(record, allow_nan=False, separators=(",", ":")))
            for name, array in record.get("arrays", {}).items():
                made = _room(group, name, tuple(array["shape"]), dtype_of(array))
                if name == "times_s":
                    _note(made, "units", "s")
    with open(path, "xb", buffering=0) as written:
        pages.write_to(written.fileno())
        os.fsync(written.fileno())


class _Pages(io.RawIOBase):
    """A file in memory that keeps only the pages that are written: room costs nothing in it.

    HDF5 lays its structure down here, because on a disk that refuses a write it crashes.
    """

    _PAGE = 4096

    def __init__(self) -> None:
        self._pages: dict[int, bytearray] = {}
        self._at = self._size = 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def truncate(self, size: int | None = None) -> int:
        self._size = self._at if size is None else size
        return self._size

    def readinto(self, buffer: Any) -> int:
        for page, inner, outer in self._pieces(len(buffer)):
            buffer[outer] = page[inner]
        return len(buffer)

    def write(self, data: Any) -> int:
        for page, inner, outer in self._pieces(len(data)):
            page[inner] = data[outer]
        self._size = max(self._size, self._at)
        return len(data)

    def _pieces(self, count: int) -> Iterator[tuple[bytearray, slice, slice]]:
        """The pages that `count` bytes from here on touch; moves on by as many."""
        done = 0
        while done < count:
            number, start = divmod(self._at, self._PAGE)
            step = min(count - done, self._PAGE - start)
            page = self._pages.setdefault(number, bytearray(self._PAGE))
            yield page, slice(start, start + step), slice(done, done + step)
            done, self._at = done + step, self._at + step

    def write_to(self, fd: int) -> None:
        """Everything into an empty file, of the same size, with holes where nothing was written."""
        for number, page in sorted(self._pages.items()):
            _write(fd, page, number * self._PAGE)
        os.ftruncate(fd, self._size)


def _note(holder: Any, name: str, text: str) -> None:
    """Text of a length fixed in the file: it lies where the object lies, and a reader can bound it."""
    holder.attrs.create(name, np.bytes_(text.encode("ascii")))


def _room(group: Any, name: str, shape: tuple[int, ...], dtype: Any) -> Any:
    """A dataset whose place in the file is fixed now and whose bytes are not written."""
    import h5py

    how = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    how.set_layout(h5py.h5d.CONTIGUOUS)
    how.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    how.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    kind, space = h5py.h5t.py_create(np.dtype(dtype)), h5py.h5s.create_simple(shape)
    return h5py.Dataset(h5py.h5d.create(group.id, name.encode(), kind, space, how))


def _fill(store: Store, plan: _Plan, part: Path, figures: Figures) -> dict[str, str]:
    """Write what is missing into its room; returns what turned out wrong by entry, and then the part is useless."""
    wrong: dict[str, str] = {}
    places = _places(plan, part)
    fd = os.open(part, os.O_RDWR | os.O_CLOEXEC)
    try:
        done = int.from_bytes(os.pread(fd, 8, places["progress"]), "little")
        figures.there = done = done if done <= len(plan.records) else 0
        unsafe_bytes = 0
        try:
            for i, (entry, record) in _shown(plan, done):
                try:
                    _copy(store, entry, record, fd, places)
                except (Damaged, Unreadable, KeyError) as e:
                    wrong[entry] = one_line(e)
                    if isinstance(e, Damaged):
                        store.set_aside(entry)
                figures.tracks += "arrays" in record
                figures.tombstones += "arrays" not in record
                done, unsafe_bytes = done if wrong else i, unsafe_bytes + _nbytes(record)
                if unsafe_bytes >= _NOTE_BYTES:
                    _note_progress(fd, done, places)
                    unsafe_bytes = 0
        finally:  # also when it is stopped, or the disk is full
            _note_progress(fd, done, places)
    finally:
        os.close(fd)
    return wrong


def _shown(plan: _Plan, done: int) -> Iterator[tuple[int, tuple[str, dict[str, Any]]]]:
    """What is left to be written, numbered from 1, with a bar of the bytes."""
    from tqdm import tqdm

    with tqdm(total=plan.nbytes, desc="export", unit="B", unit_scale=True, mininterval=1) as bar:
        for i, (entry, record) in enumerate(plan.records.items(), start=1):
            if i > done:
                yield i, (entry, record)
            bar.update(_nbytes(record))


def _note_progress(fd: int, done: int, places: dict[str, int]) -> None:
    os.fsync(fd)  # first the data, then the note that it is there
    _write(fd, done.to_bytes(8, "little"), places["progress"])
    os.fsync(fd)


def _places(plan: _Plan, part: Path) -> dict[str, int]:
    """Where in the file the bytes of each dataset belong; one without elements has no place."""
    import h5py

    names = [f"{entry}/{name}" for entry, record in plan.records.items() for name in record.get("arrays", {})]
    with h5py.File(part, "r", locking=False) as f:
        return {name: h5py.h5d.open(f.id, name.encode()).get_offset() for name in ["progress", *names]}


def _copy(store: Store, entry: str, record: dict[str, Any], fd: int, places: dict[str, int]) -> None:
    """One track's bytes into their room. Raises Damaged, Unreadable, KeyError (it is gone, or is another by now)."""
    if "arrays" not in record:
        return
    track = store.read(entry)
    for name, array in record["arrays"].items():
        raw = strangers.raw(getattr(track, name))
        if crc32c.crc32c(raw.data) != array["crc32c"] or len(raw) != strangers.nbytes(
            array["shape"], array["dtype"]
        ):
            raise KeyError(f"{entry} was changed while it was exported; run the same command again")
        _write(fd, raw.data, places[f"{entry}/{name}"])


def _write(fd: int, data: bytes | bytearray | memoryview, offset: int) -> None:
    view = memoryview(data)
    while len(view):
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written


@contextlib.contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Nobody else exports to `out` meanwhile; the lock that a kill leaves is taken over."""
    disk.make_folders(out.parent)
    path = out.with_name(f".{out.name}.lock")
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        held = disk.lock(fd, wait=False)
        if held is False or not path.exists() or not os.path.samestat(os.fstat(fd), os.stat(path)):
            raise VacliError(f"another vacli is exporting to {out}: wait for it, or use another name")
        try:
            yield
        finally:
            disk.remove(path)
    finally:
        os.close(fd)


@contextlib.contextmanager
def _told(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        why = os.strerror(e.errno) if e.errno else one_line(e)
        raise VacliError(
            f"cannot write {out}: {why}; mend that (free some space?) and run the same command "
            "again: what is written is kept"
        ) from e


def _content(path: Path, finished: bool = False) -> str | None:
    """The digest of what an export holds, "" if it should be finished and is not; None if nothing is there."""
    if not os.path.lexists(path):
        return None
    try:
        with opened(path) as (_, facts):
            whole = facts["progress"] == facts["entries"] or not finished
            return facts["content"] if whole else ""
    except VacliError as e:
        raise VacliError(f"{one_line(e)}; it is not overwritten: remove it, or use another name") from e


def _nbytes(record: dict[str, Any]) -> int:
    """Bytes of the arrays of a record, without the checksums that follow them in a store; 0 for a tombstone."""
    return sum(strangers.nbytes(a["shape"], a["dtype"]) for a in record.get("arrays", {}).values())
