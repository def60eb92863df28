"""The objects behind one fsspec URL, each put there whole, and what was lately seen of them; mishaps are one line."""

from __future__ import annotations

import base64
import contextlib
import errno
import hashlib
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from .. import VacliError
from .place import StoreError

_PIECE, _AT_ONCE = 2**23, 2**26  # bytes of one ranged read; of those under way together, all held in memory
_MD5 = re.compile(r'"?([0-9a-f]{32})"?')

# What a backend's exception is called (its classes, or the code a server sent) -> the mend.
_MENDS = {
    "make the bucket (or folder) first, or give another --store": {"NoSuchBucket", "FileNotFoundError"},
    "check the keys (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, for s3) and what they may do": {
        "PermissionError", "NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError",
        "TokenRetrievalError", "ProfileNotFound", "NoAuthTokenError", "SSOError",
    },
    "check the network and the endpoint (AWS_ENDPOINT_URL for s3)": {
        "ConnectionError", "TimeoutError", "HTTPClientError", "ClientConnectionError",
    },
    "check the name of the bucket": {"ParamValidationError"},
}  # fmt: skip


class Gone(Exception):
    """An object that was there is not there any more, or is another one."""


class Object(NamedTuple):
    """What a listing tells of an object: bytes, a stamp that another object in its place would not have, its MD5
    (hex) and the time of its writing (s since 1970) where the backend knows them."""

    size: int
    stamp: str
    md5: str | None
    written_s: float | None


class Bucket:
    """The objects below a URL, by their path relative to it.

    No method changes an object in place: it is there whole, old or new, or not at all. All raise StoreError, in one
    line with the mend, for what the backend refuses.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        if "://" not in url or any(c in url for c in "*?["):
            raise StoreError(
                f"{url} is not the address of a store; wanted one such as s3://bucket/features.zarr"
            )
        try:
            import fsspec

            # Listings are remembered where their age is known (RemotePlace), and not twice.
            self._fs, root = fsspec.url_to_fs(url, use_listings_cache=False)
        except ImportError as e:
            raise StoreError(
                f"{url} cannot be opened: {e}; s3:// needs `pip install 'vacli[s3]'`, other addresses fsspec and "
                "the package it names"
            ) from e
        except Exception as e:
            raise self._refused("open", e) from e
        self._root = root.rstrip("/") + "/"

    # ---- reading -------------------------------------------------------------------------------------------

    def listing(self, below: str) -> dict[str, Object]:
        """Every object below a path, at any depth."""
        with self._telling("list"):
            found = self._fs.find(self._root + below, detail=True)
        return {
            name.removeprefix(self._root): _object(info)
            for name, info in found.items()
            if name.startswith(self._root) and not name.endswith("/")  # which marks an empty folder
        }

    def names(self) -> set[str]:
        """The first parts of the paths there are."""
        with self._telling("list"):
            try:
                found = self._fs.ls(self._root.rstrip("/"), detail=False)
            except FileNotFoundError as e:
                if _code(e) == "NoSuchBucket":
                    raise
                found = []  # nothing there yet
        return {n.removeprefix(self._root).rstrip("/") for n in found if n.startswith(self._root)} - {""}

    def read(self, wanted: dict[str, int]) -> dict[str, bytes]:
        """The first bytes of objects, at most so many of each, all at once; what is not there is left out."""
        paths = list(wanted)
        found = self._ranges([(p, 0, wanted[p]) for p in paths])
        return {p: data for p, data in zip(paths, found, strict=True) if data is not None}

    def pieces(self, sizes: dict[str, int]) -> Iterator[tuple[str, bytes]]:
        """Objects of known sizes piece by piece, each in order. Raises Gone."""
        queue = [(p, at, min(at + _PIECE, n)) for p, n in sizes.items() for at in range(0, n, _PIECE)]
        many = _AT_ONCE // _PIECE
        for start in range(0, len(queue), many):
            some = queue[start : start + many]
            for (path, begin, end), data in zip(some, self._ranges(some), strict=True):
                if data is None or len(data) != end - begin:
                    raise Gone(path)
                yield path, data

    def _ranges(self, wanted: list[tuple[str, int, int]]) -> list[bytes | None]:
        """(path, begin, end) -> bytes, all at once; None where there is no such object."""
        if not wanted:
            return []
        with self._telling("read"):
            found = self._fs.cat_ranges(
                [self._root + p for p, _, _ in wanted], [b for _, b, _ in wanted], [e for _, _, e in wanted]
            )
        return [self._content(data) for data in found]

    def _content(self, found: Any) -> bytes | None:
        if not isinstance(found, BaseException):
            return bytes(found)
        if _code(found) == "InvalidRange":
            return b""  # an object without bytes
        if isinstance(found, FileNotFoundError) and _code(found) != "NoSuchBucket":
            return None
        raise self._refused("read", found) from found

    # ---- writing -------------------------------------------------------------------------------------------

    def write(self, path: str, data: bytes) -> None:
        """An object, in the place of one that may be there."""
        with self._telling("write"):
            self._fs.pipe_file(self._root + path, data)

    def create(self, path: str, data: bytes) -> bool:
        """An object where there is none; False if there is one. A backend that cannot do so writes over it."""
        with self._telling("write"):
            try:
                self._fs.pipe_file(self._root + path, data, mode="create")
            except FileExistsError:
                return False
            except (NotImplementedError, OSError) as e:
                code = _code(e)
                if code in ("PreconditionFailed", "ConditionalRequestConflict"):
                    return False
                if code != "NotImplemented" and not isinstance(e, NotImplementedError):
                    raise
                self._fs.pipe_file(self._root + path, data)
        return True

    def upload(self, files: dict[str, Path]) -> None:
        """Local files to objects, all at once."""
        with self._telling("write"):
            self._fs.put([str(f) for f in files.values()], [self._root + p for p in files])

    def copy(self, pairs: dict[str, str]) -> None:
        """Objects to other paths, where they lie."""
        with self._telling("copy"):
            self._fs.copy([self._root + p for p in pairs], [self._root + p for p in pairs.values()])

    def remove(self, below: str, paths: list[str]) -> None:
        """Those objects below a path; what is gone already is no error."""
        if not paths:
            return
        for _ in range(2):  # a refusal to remove many at once is told by no backend: look
            left = sorted(self.listing(below).keys() & set(paths))
            if not left:
                return
            with self._telling("remove"), contextlib.suppress(FileNotFoundError):
                self._fs.rm([self._root + p for p in left])
        if self.listing(below).keys() & set(paths):
            raise StoreError(f"cannot remove {below} from {self.url}: check what your keys may do")

    # ---- errors --------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _telling(self, doing: str) -> Iterator[None]:
        # Each backend has its own exceptions, most of them no OSError: whatever comes out of it is the same to us.
        try:
            yield
        except VacliError:
            raise
        except Exception as e:
            raise self._refused(doing, e) from e

    def _refused(self, doing: str, e: BaseException) -> StoreError:
        called = {_code(e), *(c.__name__ for c in type(e).__mro__)}
        mend = next((m for m, names in _MENDS.items() if names & called), "run again when it is mended")
        why = " ".join(str(e).split())[:300] or type(e).__name__
        return StoreError(f"cannot {doing} {self.url}: {why}; {mend}: what is stored is kept")


def _code(e: BaseException | None) -> str | None:
    """What an S3 server called the mishap."""
    response = getattr(e, "response", None) or getattr(getattr(e, "__cause__", None), "response", None)
    return response.get("Error", {}).get("Code") if isinstance(response, dict) else None


_WRITTEN = ("LastModified", "last_modified", "updated", "mtime", "created")  # as the backends call it


def _object(info: dict[str, Any]) -> Object:
    written = next((info[key] for key in _WRITTEN if key in info), None)
    with contextlib.suppress(ValueError):
        written = datetime.fromisoformat(written) if isinstance(written, str) else written
    written_s = written.timestamp() if isinstance(written, datetime) else written
    stamp = hashlib.sha256(repr(sorted(info.items(), key=lambda pair: pair[0])).encode()).hexdigest()[:16]
    return Object(info["size"], stamp, _md5(info), written_s if isinstance(written_s, int | float) else None)


def _md5(info: dict[str, Any]) -> str | None:
    """The MD5 of an object that was written in one part and not encrypted by a key of its own (then it is no MD5,
    matches nothing we hold, and costs a reading)."""
    if found := _MD5.fullmatch(str(info.get("ETag", ""))):
        return found[1]
    with contextlib.suppress(ValueError, TypeError):
        return base64.b64decode(info["md5Hash"]).hex() if "md5Hash" in info else None
    return None


# ---- what was seen -------------------------------------------------------------------------------------------

RECORD = "zarr.json"
SMALL = 2**20  # bytes: no record, recipe or names of a video are larger
_THERE_S, ABSENT_S = 60, 5  # for how long a listing is believed: that an entry is there, that it is not


@dataclass
class _Shelf:
    """A listing of a folder: the objects of each entry by their path in it; when, on the monotonic clock."""

    entries: dict[str, dict[str, Object]]
    listed_s: float


class Shelves:
    """The entries `<folder>/<name>` of a bucket, as listed not long ago, and their records, read many at once.

    cached: the text of a small object as this machine has it, b"" if it has none; it is used where the listing says
    that the object's is the same.
    """

    def __init__(self, bucket: Bucket, cached: Callable[[str], bytes]) -> None:
        self._bucket, self._cached = bucket, cached
        self._shelves: dict[str, _Shelf] = {}
        self._one = (
            threading.RLock()
        )  # a listing under way must not hide what another thread stores meanwhile
        self._texts: dict[str, tuple[str, bytes]] = {}  # with the stamp they were read under

    def entries(self, folder: str, age_s: float = _THERE_S) -> dict[str, dict[str, Object]]:
        """The objects of each entry of a folder, listed at most so long ago."""
        with self._one:
            shelf, now_s = self._shelves.get(folder), time.monotonic()
            if shelf is None or now_s - shelf.listed_s >= age_s:
                shelf = _Shelf({}, now_s)
                for path, listed in self._bucket.listing(folder).items():
                    name, mark, inside = path.removeprefix(f"{folder}/").partition("/")
                    if mark:
                        shelf.entries.setdefault(name, {})[inside] = listed
                self._shelves[folder] = shelf
            return shelf.entries

    def objects(self, path: str) -> dict[str, Object]:
        """The objects of an entry. Raises FileNotFoundError if it has no record."""
        folder, _, name = path.partition("/")
        for age_s in (_THERE_S, ABSENT_S):
            found = self.entries(folder, age_s).get(name, {})
            if RECORD in found:
                return found
        raise FileNotFoundError(errno.ENOENT, "no such entry", path)

    def look(self, path: str) -> dict[str, Object]:
        """The objects of an entry, listed now."""
        folder, _, name = path.partition("/")
        with self._one:
            found = {p.removeprefix(f"{path}/"): o for p, o in self._bucket.listing(path).items()}
            self.entries(folder)[name] = found
        return found

    def age(self) -> None:
        """What was not there when it was last listed may be by now."""
        now_s = time.monotonic()
        for shelf in list(self._shelves.values()):
            shelf.listed_s = min(shelf.listed_s, now_s - ABSENT_S)

    def forget(self, folder: str) -> None:
        self._shelves.pop(folder, None)

    def text(self, path: str, objects: dict[str, Object]) -> bytes:
        """The record among an entry's objects. Raises FileNotFoundError if it has none, or not the listed one."""
        listed = objects.get(RECORD)
        if listed and self._texts.get(path, ("",))[0] != listed.stamp:
            self._gather(path.partition("/")[0])
        stamp, text = self._texts.get(path, ("", b""))
        if listed is None or stamp != listed.stamp:
            raise FileNotFoundError(errno.ENOENT, "no such entry", path)
        return text

    def _gather(self, folder: str) -> None:
        """All records of a folder: the cache's where the listing says that they are the same, the rest at once."""
        wanted = {}
        for name, objects in list(self.entries(folder).items()):
            path, listed = f"{folder}/{name}", objects.get(RECORD)
            if listed and self._texts.get(path, ("",))[0] != listed.stamp:
                mine = self._cached(f"{path}/{RECORD}") if listed.md5 else b""
                if mine and hashlib.md5(mine, usedforsecurity=False).hexdigest() == listed.md5:
                    self._texts[path] = (listed.stamp, mine)
                else:
                    wanted[path] = listed
        found = self._bucket.read({f"{p}/{RECORD}": min(o.size, SMALL) for p, o in wanted.items()})
        texts = {p: found[f"{p}/{RECORD}"] for p in wanted if f"{p}/{RECORD}" in found}
        self._texts.update({p: (wanted[p].stamp, text) for p, text in texts.items()})
