"""Where a store's files lie: a folder on a disk, in which every change is durable and comes all at once."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import platform
import stat
import time
import uuid
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from .. import VacliError
from . import disk, entry
from .entry import Damaged
from .track import Track

# Age of leftovers that may be swept; of those whose lock we might not see: over NFS, another machine's.
_LEFT_S, _LEFT_UNLOCKED_S = 60, 24 * 3600
_HERE = hashlib.sha256(platform.node().encode()).hexdigest()[:8]


class StoreError(VacliError):
    """The store itself cannot be used: foreign, newer, full, read-only."""

    fatal = True


class Place:
    """A folder that holds a store. Paths are relative to it, with slashes; entries are `<folder>/<name>`.

    Methods raise OSError; `told` makes it a StoreError.
    """

    def __init__(self, folder: Path, name: str | None = None) -> None:
        self.path, self.name = folder, name or str(folder)
        self._session: int | None = None
        self.locks = True

    @property
    def attempt(self) -> str:
        """Below which name in its entry a new track's arrays lie: on a disk, right in it."""
        return ""

    @contextlib.contextmanager
    def told(self, doing: str) -> Iterator[None]:
        """What the disk refuses, in one line: a StoreError."""
        try:
            yield
        except OSError as e:
            mend = (
                "free some space"
                if e.errno in (errno.ENOSPC, errno.EDQUOT)
                else "check the folder, or use another --store"
            )
            raise StoreError(
                f"cannot {doing} in {self.name}: {e.strerror or e}; {mend} and run again: what is stored is kept"
            ) from e

    def absent(self) -> bool:
        """Nothing there, or what a creation stopped half-way leaves."""
        with self.told("look for a store"):
            if not self.path.exists():
                return True
            return self.path.is_dir() and {e.name for e in self.path.iterdir()} <= {".staging"}

    def create(self, attributes: dict[str, Any]) -> None:
        """Make it; the group's zarr.json comes last."""
        self.save("zarr.json", entry.group_json(attributes))

    def open(self) -> None:
        """From now on others see that the store is in use."""
        fd = self._session = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, fd)
        self.locks = disk.lock(fd, shared=True) is not None

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """While nobody else has the store open, as far as this disk's locks tell. Raises StoreError if somebody has."""
        assert self._session is not None
        if self.locks and not disk.lock(self._session, wait=False):
            disk.lock(self._session, shared=True)
            raise StoreError(f"{self.name} is in use by another vacli process: wait until it is done")
        try:
            yield
        finally:
            if self.locks:
                disk.lock(self._session, shared=True)

    # ---- files and folders ---------------------------------------------------------------------------------

    def load(self, path: str, limit: int) -> bytes:
        """A file. Raises FileNotFoundError, OSError, ValueError (larger than `limit` bytes, no regular file)."""
        return self.load_here(path, limit)

    def load_here(self, path: str, limit: int) -> bytes:
        """As `load`, and only on this machine."""
        folder, _, name = path.rpartition("/")
        return disk.read_small(f"{self._unlinked(folder)}/{name}", limit)

    def _inside(self, folder: str, name: str = "") -> Path:
        """A folder of the store, or what lies in it; not through a link (`_unlinked`)."""
        return Path(self._unlinked(folder), name)

    def _unlinked(self, folder: str) -> str:
        """The path of a folder of the store, as text: it is asked for thousands of times.

        Raises NotADirectoryError if it, or one above it, is a link: what that leads to is not ours to read, to change
        or to remove.
        """
        inside = str(self.path)
        for part in folder.split("/") if folder else ():
            inside = f"{inside}/{part}"
            with contextlib.suppress(FileNotFoundError):
                if stat.S_ISLNK(os.lstat(inside).st_mode):
                    raise NotADirectoryError(errno.ENOTDIR, f"{part} is a link, wanted a folder", inside)
        return inside

    def folders(self, path: str) -> list[str]:
        """The names of the folders in a folder; none if it is not there."""
        try:
            with os.scandir(self._inside(path)) as found:
                return [e.name for e in found if e.is_dir(follow_symlinks=False)]
        except (FileNotFoundError, NotADirectoryError):
            return []

    def stamps(self, folder: str) -> dict[str, str]:
        """The names of the entries in a folder, each with a stamp that another entry in its place would not have."""
        try:
            with os.scandir(self._inside(folder)) as found:
                inside = {
                    e.name: e.stat(follow_symlinks=False) for e in found if e.is_dir(follow_symlinks=False)
                }
        except (FileNotFoundError, NotADirectoryError):
            return {}
        return {n: f"{s.st_ino} {s.st_mtime_ns}" for n, s in inside.items() if entry.NAME.fullmatch(n)}

    def save(self, path: str, data: bytes) -> None:
        """Replace a file durably and all at once: a reader sees the old one or the new one."""
        self.save_here(path, data)

    def save_here(self, path: str, data: bytes) -> None:
        """As `save`, and only on this machine."""
        target, aside = self._inside(*path.rpartition("/")[::2]), self._staging() / _fresh()
        try:
            with disk.NewFile(aside) as f:
                f.lock()
                f.write(data)
                f.sync()
                disk.make_folders(target.parent)
                disk.rename(aside, target)
            disk.sync_folder(target.parent)
        except BaseException:
            disk.remove(aside)
            raise

    @contextlib.contextmanager
    def locked(self, folder: str) -> Iterator[None]:
        """One writer in a folder (a group, made if absent) at a time."""
        page = self._inside(folder, "zarr.json")
        if not page.exists():
            self.save_here(f"{folder}/zarr.json", entry.group_json({}))
        with disk.one_at_a_time(page, self._staging() / f"{folder}.lock"):
            yield

    def claim(self, what: str) -> Callable[[], None] | None:
        """The work on something, for one process (and thread) of those that see this disk's locks; None if another is
        at it. Calling what is returned gives it up; so does the end of the process."""
        path = self._staging() / f"claim-{what}"
        fd = disk.claim(path)
        return None if fd is None else partial(disk.unclaim, path, fd)

    def _staging(self) -> Path:
        """The folder of what is being written, which a copy of a store may lack."""
        inside = self._inside(".staging")
        if not (inside / "zarr.json").exists():
            disk.make_folders(inside)
            aside = inside / _fresh()
            try:
                disk.write_file(aside, entry.group_json({}))
                disk.rename(aside, inside / "zarr.json")
            except BaseException:
                disk.remove(aside)
                raise
        return inside

    # ---- entries -------------------------------------------------------------------------------------------

    def record(self, name: str) -> dict[str, Any]:
        """The checked record of an entry. Raises FileNotFoundError, Damaged."""
        return entry.check(self.path / name)

    def read(
        self, name: str, record: dict[str, Any], mapped: bool = False, everything: bool = False
    ) -> Track:
        """The Track of a checked record (entry.read). Raises Damaged, Unreadable."""
        return entry.read(self.path / name, record, mapped, everything)

    @contextlib.contextmanager
    def staging(self) -> Iterator[Path]:
        """A fresh folder, locked while we live: a sweep by another process leaves it alone."""
        staged = self._staging() / _fresh()
        try:
            disk.make_folder(staged)
            with disk.open_folder(staged) as fd:
                disk.lock(fd)
                yield staged
        finally:
            disk.remove(staged)  # gone already when it was renamed into place

    def commit(self, staged: Path, name: str, tombstone: bool) -> None:
        """Make a finished folder the entry, unless somebody was first: content-addressed, theirs is as good as ours."""
        if not self._rename_to(staged, self._inside(*name.split("/"))):
            with self.replacing():
                self._replace(staged, name, tombstone)
        disk.sync_folder((self.path / name).parent)

    def _replace(self, staged: Path, name: str, tombstone: bool) -> None:
        """A whole entry stays, but a tombstone gives way to a track; what is broken is set aside."""
        ours = entry.parse_group(disk.read_small(staged / "zarr.json", entry.JSON_LIMIT))
        for _ in range(3):
            try:
                theirs = self.record(name)
                if any(theirs[key] != ours[key] for key in ("recipe", "media")):  # the same first digits
                    raise entry.damaged(self.path / name, "its record belongs to another key")
                if "failed" not in theirs:
                    self.read(name, theirs, everything=True)
                if tombstone or "failed" not in theirs:
                    return
                self.move(name, ".trash")
            except FileNotFoundError:
                pass  # moved away since
            except Damaged:
                self.move(name, ".quarantine")
            if self._rename_to(staged, self.path / name):
                return
        raise OSError(errno.EBUSY, "others keep writing the same track")

    @contextlib.contextmanager
    def replacing(self) -> Iterator[None]:
        """One at a time looks whether what stands in an entry's place is still to go, and takes it away."""
        staging = self._staging()
        with disk.one_at_a_time(staging / "zarr.json", staging / "replacing.lock"):
            yield

    @staticmethod
    def _rename_to(staged: Path, place: Path) -> bool:
        try:
            disk.rename(staged, place)
        except OSError as e:
            if e.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            return False
        return True

    def move(self, name: str, hidden: str) -> Path | None:
        """Out of sight, into a hidden folder; None if it is not there."""
        if not self._inside(hidden, "zarr.json").exists():
            self.save_here(f"{hidden}/zarr.json", entry.group_json({}))
        aside = self.path / hidden / f"{name.replace('/', '.')}.{uuid.uuid4().hex[:8]}"
        try:
            disk.rename(self._inside(*name.rpartition("/")[::2]), aside)
        except FileNotFoundError:
            return None
        disk.sync_folder(aside.parent)
        disk.sync_folder((self.path / name).parent)
        return aside

    # ---- leftovers -----------------------------------------------------------------------------------------

    def leftovers(self) -> list[Path]:
        """What killed writers and removals left."""
        return [*filter(_is_left, self.hidden(".staging")), *self.hidden(".trash")]

    def orphans(self) -> dict[str, int]:
        """What belongs to no entry and lies elsewhere than on a disk: name, for `move`, -> bytes."""
        return {}

    def hidden(self, folder: str) -> list[Path]:
        """What lies in .staging, .trash or .quarantine."""
        try:
            return sorted(p for p in self._inside(folder).iterdir() if p.name != "zarr.json")
        except (FileNotFoundError, NotADirectoryError):
            return []


def _fresh() -> str:
    """A name in .staging that nobody has, and that says which machine sees its lock."""
    return f"{_HERE}{uuid.uuid4().hex}"


def _is_left(path: Path) -> bool:
    """No living writer holds it: a minute old and not locked; a day old where a lock would not be seen."""
    with contextlib.suppress(OSError):
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            free = disk.lock(fd, wait=False)
            age_s = time.time() - os.fstat(fd).st_mtime
        finally:
            os.close(fd)
        seen = free and path.name.startswith(_HERE)
        return free is not False and age_s > (_LEFT_S if seen else _LEFT_UNLOCKED_S)
    return False
