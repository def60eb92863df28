"""Every call by which the store changes a disk stands here, each as durable as it says; a test may fail any of them."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path

_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
_KILLED_S = 30  # a mark that stands unchanged for so long was left by a killed process


class NewFile:
    """A file being written, exclusively ours; nothing of it is safe before `sync`.

    reserve: bytes to set aside at once, so that a full disk refuses before the first one is computed.
    """

    def __init__(self, path: Path, reserve: int = 0) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        self.size = 0
        try:
            if reserve:
                _allocate(self._fd, reserve)
        except BaseException:
            self.close()
            raise

    def write(self, data: bytes | memoryview) -> None:
        view = memoryview(data).cast("B")
        while len(view):
            written = os.write(self._fd, view)
            self.size += written
            view = view[written:]

    def sync(self) -> None:
        """Cut to what was written, and onto the disk with it."""
        if os.fstat(self._fd).st_size != self.size:
            os.ftruncate(self._fd, self.size)
        os.fsync(self._fd)

    def lock(self) -> None:
        """Ours while we live: a sweep by another process leaves it alone."""
        lock(self._fd)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> NewFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _allocate(fd: int, nbytes: int) -> None:
    try:
        os.posix_fallocate(fd, 0, nbytes)
    except OSError as e:
        if e.errno not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            raise  # some network file systems cannot; then a full disk is met later


def write_file(path: Path, data: bytes) -> None:
    """A new file, on the disk when this returns (its name is when the folder is synced)."""
    with NewFile(path) as f:
        f.write(data)
        f.sync()


def make_folder(path: Path) -> None:
    """A new folder. Raises FileExistsError."""
    os.mkdir(path)


def make_folders(path: Path) -> None:
    """The folder and those above it, where they are not there yet; each durable in the one above it.

    So is one found there: its maker may have been killed before it was, or not be that far yet.
    """
    missing = []
    while not path.exists():
        missing.append(path)
        path = path.parent
    if os.access(path.parent, os.R_OK):  # else it is none of ours
        sync_folder(path.parent)
    for folder in reversed(missing):
        with contextlib.suppress(FileExistsError):  # somebody else was quicker
            os.mkdir(folder)
        sync_folder(folder.parent)


def sync_folder(path: Path) -> None:
    """The names in a folder, onto the disk."""
    with open_folder(path) as fd:
        try:
            os.fsync(fd)
        except OSError as e:
            if (
                e.errno != errno.EINVAL
            ):  # some network file systems write names at once, and know no fsync of folders
                raise


def rename(old: Path, new: Path) -> None:
    """Moves a file (over another one) or a folder (onto no other one); atomic, durable when the folders are synced."""
    os.rename(old, new)


def remove(path: Path) -> None:
    """A file or folder and all in it, as far as we may; what is gone already is no error."""
    with contextlib.suppress(OSError):
        if stat.S_ISDIR(os.lstat(path).st_mode):
            for inner in sorted(os.scandir(path), key=lambda e: e.name):
                remove(Path(inner.path))
            os.rmdir(path)
        else:
            os.unlink(path)


@contextlib.contextmanager
def open_folder(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def lock(fd: int, shared: bool = False, wait: bool = True) -> bool | None:
    """flock: True if we have it, False if another has (without `wait`), None where the file system knows no locks."""
    how = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
    try:
        fcntl.flock(fd, how)
    except BlockingIOError:
        return False
    except OSError as e:
        if e.errno not in _NO_LOCKS:
            raise
        return None
    return True


@contextlib.contextmanager
def one_at_a_time(path: Path, mark: Path) -> Iterator[None]:
    """Waits until no other process, nor thread, is in here with the same file.

    It takes a file that may be written: over NFS a lock of a folder, or of a file opened for reading, ends at the
    machine. Where the disk knows no locks, it is whoever could make the file `mark`.
    """
    fd, locked = _waited_for(path)
    try:
        with contextlib.nullcontext() if locked else _by_making(mark):
            yield
    finally:
        os.close(fd)


def _waited_for(path: Path) -> tuple[int, bool]:
    """A descriptor of the file that stands there now, and whether it is locked: not if the disk knows no locks."""
    while True:
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            locked = lock(fd) is not None
            if os.path.samestat(os.fstat(fd), os.lstat(path)):  # else it was replaced while we waited
                return fd, locked
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def claim(path: Path) -> int | None:
    """A file of ours alone as long as the descriptor is open (so not longer than we live); None if another has it.

    Where the disk knows no locks everybody has it.
    """
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            if lock(fd, wait=False) is False:
                os.close(fd)
                return None
            if os.path.samestat(os.fstat(fd), os.lstat(path)):  # else its last owner removed it just now
                return fd
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def unclaim(path: Path, fd: int) -> None:
    """Give up what `claim` gave: the file goes first, while it is still ours."""
    remove(path)
    os.close(fd)


@contextlib.contextmanager
def _by_making(mark: Path) -> Iterator[None]:
    seen, since_s = None, time.monotonic()
    while True:
        try:
            NewFile(mark).close()
            break
        except FileExistsError:
            with contextlib.suppress(FileNotFoundError):
                s = os.stat(mark)
                if (s.st_ino, s.st_mtime_ns) != seen:
                    seen, since_s = (s.st_ino, s.st_mtime_ns), time.monotonic()
                elif time.monotonic() - since_s > _KILLED_S:
                    os.unlink(mark)
            time.sleep(0.002)
    try:
        yield
    finally:
        remove(mark)


def read_small(path: Path | str, limit: int) -> bytes:
    """A regular file of at most `limit` bytes; no link is followed, no pipe waited for. Raises OSError, ValueError."""
    fd = open_regular(path)
    try:
        size = os.fstat(fd).st_size
        if size > limit:
            raise ValueError(f"{os.path.basename(path)} has {size} bytes, more than {limit}")
        return os.read(fd, size)
    finally:
        os.close(fd)


def open_regular(path: Path | str) -> int:
    """A descriptor for reading a regular file; the last part of its path is no link. Raises OSError, ValueError."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise ValueError("no regular file")
    return fd
