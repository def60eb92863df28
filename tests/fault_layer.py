"""Layers that stand in for `os` below the store: they fail, cut short, die, or keep what a power cut would leave."""

from __future__ import annotations

import contextlib
import errno
import os
import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from vacli.store import disk

MUTATING = ("mkdir", "write", "posix_fallocate", "ftruncate", "fsync", "rename", "unlink", "rmdir")
CLEANING = ("unlink", "rmdir")
REFUSALS = (errno.ENOSPC, errno.EIO, errno.EMFILE, errno.EACCES, errno.EXDEV, errno.EROFS)
DIED = 9  # exit status of a child that a layer ended


# ---- layers ------------------------------------------------------------------------------------------------------


class Layer:
    """Passes every call on and numbers the mutating ones from 1; fsync is not made: no test waits for the disk.

    calls: the names of the numbered calls so far; "create" is an open that makes a file.
    """

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, "fstat" if name == "fsync" else name)
        return partial(self._number, name, real) if name in MUTATING else real

    def open(self, path: Path, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_CREAT:
            return self._number("create", os.open, path, flags, mode)
        return os.open(path, flags, mode)

    def _number(self, name: str, real: Callable[..., Any], *args: Any) -> Any:
        self.calls.append(name)
        return self.call(name, real, *args)

    def call(self, name: str, real: Callable[..., Any], *args: Any) -> Any:
        return real(*args)


class Failing(Layer):
    """The n-th call raises, and those after it too if `for_good`; with `opens`, opening for reading counts as one."""

    def __init__(self, n: int, error: int, for_good: bool = False, opens: bool = True) -> None:
        super().__init__()
        self._opens = opens
        self._n, self._error, self._for_good = n, error, for_good
        self.failed: list[str] = []

    def open(self, path: Path, flags: int, mode: int = 0o777) -> int:
        if self._opens and not flags & os.O_CREAT:
            return self._number("open", os.open, path, flags, mode)
        return super().open(path, flags, mode)

    def call(self, name: str, real: Callable[..., Any], *args: Any) -> Any:
        number = len(self.calls)
        if number == self._n or (self._for_good and number > self._n):
            self.failed.append(name)
            raise OSError(self._error, os.strerror(self._error))
        return real(*args)


class Cutting(Layer):
    """Half of the n-th write is written; then the disk is full, or (`goes_on`) takes the rest when asked again."""

    def __init__(self, n: int, goes_on: bool) -> None:
        super().__init__()
        self._n, self._goes_on = n, goes_on
        self.cut = False

    def call(self, name: str, real: Callable[..., Any], *args: Any) -> Any:
        if name == "write" and self.cut and not self._goes_on:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if name == "write" and self.calls.count("write") == self._n:
            self.cut = True
            return real(args[0], args[1][: len(args[1]) // 2])
        return real(*args)


class Dying(Layer):
    """The process ends before the n-th call, so right after the one before; or half-way in the n-th write (`torn`)."""

    def __init__(self, n: int, torn: bool) -> None:
        super().__init__()
        self._n, self._torn = n, torn

    def call(self, name: str, real: Callable[..., Any], *args: Any) -> Any:
        if not self._torn and len(self.calls) == self._n:
            os._exit(DIED)
        if self._torn and name == "write" and self.calls.count("write") == self._n:
            real(args[0], args[1][: len(args[1]) // 2])
            os._exit(DIED)
        return real(*args)


@contextlib.contextmanager
def through(layer: Any) -> Iterator[Any]:
    """The store's calls go through the layer."""
    real, disk.os = disk.os, layer
    try:
        yield layer
    finally:
        disk.os = real


class NoLocks:
    """Stands in for `fcntl` below the store: a file system without locks."""

    LOCK_SH = LOCK_EX = LOCK_NB = 0

    @staticmethod
    def flock(fd: int, how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


# ---- a power cut -------------------------------------------------------------------------------------------------


class File:
    """What was written, and what of it is safe: its bytes as of the last fsync."""

    def __init__(self, data: bytes = b"", safe: bytes = b"") -> None:
        self.data, self.safe = bytearray(data), safe

    def survivors(self) -> list[bytes]:
        """First what is safe, last what was written; between them what a disk may make of it."""
        data = bytes(self.data)
        if data == self.safe:
            return [data]
        half = len(data) // 2
        return [self.safe, b"", bytes(len(data)), data[:half], data[:half] + bytes(len(data) - half), data]


class Folder:
    """names: as they are now. maybe: name -> what it stood for at the last fsync and since, None for nothing."""

    def __init__(self) -> None:
        self.names: dict[str, File | Folder] = {}
        self.maybe: dict[str, list[File | Folder | None]] = {}

    def set(self, name: str, node: File | Folder | None) -> None:
        self.maybe.setdefault(name, []).append(self.names.pop(name, None))
        if node is not None:
            self.names[name] = node


class Platter(Layer):
    """Makes the calls, and models what a power cut before each would leave of the folder `base`; see `survive`.

    The model is harsher than ext4, which keeps the order of names: bytes are safe as of the last fsync of their
    file, names as of the last fsync of their folder. Of what came later each change by itself has happened or not:
    a file renamed from one folder to another may be in both or in neither, a folder may be there without what was
    put in it, a file may be empty, zeros, a prefix, or a prefix and zeros.

    dies: the process is gone at that call: none is made from there on.
    """

    def __init__(self, base: Path, dies: int | None = None) -> None:
        super().__init__()
        self.dies = dies
        self._base, self._root = base, _safe(base)
        self._opened: dict[int, tuple[Any, int]] = {}  # descriptor -> file or folder, position
        self.cuts: list[Folder] = []  # before each call

    def open(self, path: Path, flags: int, mode: int = 0o777) -> int:
        fd = super().open(path, flags, mode)
        self._opened[fd] = (self._node(path), 0)
        return fd

    def call(self, name: str, real: Callable[..., Any], *args: Any) -> Any:
        if self.dies is not None and len(self.calls) >= self.dies:
            raise OSError(errno.EIO, "the process is gone")
        self.cuts.append(self.now())
        done = real(*args)
        getattr(self, f"_{name}")(*args, done) if name == "write" else getattr(self, f"_{name}")(*args)
        return done

    def now(self) -> Folder:
        return _copy(self._root, {})

    def _node(self, path: Path | str) -> Any:
        path = Path(path)
        node: Any = self._root
        if not path.is_relative_to(self._base):
            return Folder()  # whatever lies outside
        for part in path.relative_to(self._base).parts:
            node = node.names[part]
        return node

    def _create(self, path: Path, flags: int, mode: int) -> None:
        self._node(path.parent).set(path.name, File())

    def _mkdir(self, path: Path) -> None:
        self._node(path.parent).set(path.name, Folder())

    def _write(self, fd: int, data: memoryview, done: int) -> None:
        file, at = self._opened[fd]
        file.data[at : at + done] = data[:done]
        self._opened[fd] = (file, at + done)

    def _posix_fallocate(self, fd: int, start: int, nbytes: int) -> None:
        data = self._opened[fd][0].data
        data.extend(bytes(max(0, start + nbytes - len(data))))

    def _ftruncate(self, fd: int, nbytes: int) -> None:
        del self._opened[fd][0].data[nbytes:]

    def _fsync(self, fd: int) -> None:
        node = self._opened[fd][0]
        if isinstance(node, File):
            node.safe = bytes(node.data)
        else:
            node.maybe.clear()

    def _rename(self, old: Path, new: Path) -> None:
        node = self._node(old)
        self._node(old.parent).set(old.name, None)
        self._node(new.parent).set(new.name, node)

    def _unlink(self, path: Path) -> None:
        self._node(path.parent).set(path.name, None)

    _rmdir = _unlink


def _safe(path: Path) -> Folder:
    """A folder that has lain on the disk for long."""
    folder = Folder()
    for p in path.iterdir():
        folder.names[p.name] = _safe(p) if p.is_dir() else File(p.read_bytes(), p.read_bytes())
    return folder


def _copy(node: Any, copies: dict[int, Any]) -> Any:
    """A copy of all below a folder; what is in two places stays one (copy.deepcopy takes ten times as long)."""
    if node is None or id(node) in copies:
        return copies.get(id(node))
    if isinstance(node, File):
        copies[id(node)] = File(node.data, node.safe)
        return copies[id(node)]
    made = copies[id(node)] = Folder()
    made.names = {name: _copy(inner, copies) for name, inner in node.names.items()}
    made.maybe = {name: [_copy(n, copies) for n in nodes] for name, nodes in node.maybe.items()}
    return made


def survive(folder: Folder, path: Path, choose: Callable[[list[Any]], Any]) -> None:
    """Write to `path` what is there after a power cut; `choose` one of what may be, the oldest first."""
    path.mkdir()
    for name in folder.names.keys() | folder.maybe.keys():
        node = choose([*folder.maybe.get(name, []), folder.names.get(name)])
        if isinstance(node, Folder):
            survive(node, path / name, choose)
        elif node is not None:
            (path / name).write_bytes(choose(node.survivors()))


def ways(number: int, seeds: int) -> list[Callable[[list[Any]], Any]]:
    """Nothing has happened that was not synced; all has; and by chance."""
    return [
        lambda values: values[0],
        lambda values: values[-1],
        *(random.Random(f"{number} {s}").choice for s in range(seeds)),
    ]
