"""One entry: a Track as a folder of plain Zarr v3 files with a commit record, written aside, checked, and mapped."""

from __future__ import annotations

import errno
import json
import math
import mmap
import os
import re
import stat
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import crc32c
import numpy as np

from .. import VacliError
from . import disk
from .recipe import SHA256, check_json, digest
from .track import Track, check_rows, check_times

JSON_LIMIT = 64 * 1024  # of a record or an array's metadata; more is not ours
ARRAYS = ("values", "times_s")
_DTYPES: dict[str, np.dtype[Any]] = {
    "float16": np.dtype("<f2"),
    "float32": np.dtype("<f4"),
    "float64": np.dtype("<f8"),
}
_BLOCK = 512 * 1024  # bytes read and checked at once: what stays in the processor's cache
_ALIGN = 64  # bytes: copies between places that differ modulo this run at half speed
NAME = re.compile(r"[0-9a-f]{24}")  # of an entry in its folder
_CHUNK_LIMIT = 2**40  # bytes; a sparse file could claim more, and reading it would take an hour
_FEW_BRACKETS = 64  # however they are nested, that is not too deep
_HOLLOW_LIMIT = 2**30  # bytes of a chunk that takes less than half of them on the disk
_ROW_LIMIT = 2**24  # numbers in a row
_ATTEMPT = re.compile(r"[0-9a-f]{8}")
_seen_right: set[tuple[int, ...]] = set()  # chunks whose checksum this process has verified


class Damaged(VacliError):
    """An entry does not hold what its record says; it has been set aside and is absent from now on."""


class Unreadable(VacliError):
    """An entry that the machine cannot read now (no permission, too many open files); it stays where it is."""


# ---- writing -------------------------------------------------------------------------------------------------


class Writer:
    """A track being written into a folder of its own, batch by batch; `commit` makes the folder an entry.

    rows: as many as are expected, for reserving the space; fewer or more may come. attempt: below which name in the
    folder the arrays lie, "" for right in it. told: put around what the disk may refuse. notes: what else is to go into
    the provenance, as it is found out on the way. Raises OSError.
    """

    def __init__(
        self,
        folder: Path,
        rows: int,
        row_shape: tuple[int, ...],
        dtype: Any,
        attempt: str,
        told: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._folder, self._attempt, self._row_shape = folder, attempt, tuple(row_shape)
        self._told, self.notes = told, dict[str, Any]()
        self._dtype = _DTYPES[np.dtype(dtype).name]
        self._times: list[np.ndarray] = []
        self._crc = 0
        if attempt:
            disk.make_folder(folder / attempt)
            disk.write_file(folder / attempt / "zarr.json", group_json({}))
        self._inner = folder / attempt
        for name in ARRAYS:
            disk.make_folder(self._inner / name)
        room = rows * int(np.prod(self._row_shape)) * self._dtype.itemsize
        self._chunk = disk.NewFile(
            self._inner / "values" / chunk_name(1 + len(self._row_shape)), room and room + 4
        )

    def append(self, values: np.ndarray, times_s: np.ndarray) -> None:
        """values (n, *row_shape), times_s (n,) float64, after those before. Raises ValueError for what is no Track."""
        with np.errstate(over="ignore"):  # what does not fit becomes an infinity, which the Track refuses
            self.add(Track(np.asarray(values, self._dtype), times_s))

    def add(self, batch: Track) -> None:
        """As `append`, of rows that are a Track already."""
        if (batch.values.shape[1:], batch.values.dtype) != (self._row_shape, self._dtype):
            wanted = f"{self._row_shape} {self._dtype}"
            raise ValueError(f"rows must be {wanted}, got {batch.values.shape[1:]} {batch.values.dtype}")
        if self._times and len(batch) and batch.times_s[0] <= self._times[-1][-1]:
            raise ValueError("times_s must be strictly increasing from batch to batch")
        if len(batch):
            with self._told():
                for block in _blocks(batch.values):
                    self._crc = crc32c.crc32c(block.data, self._crc)
                    self._chunk.write(block.data)
            self._times.append(batch.times_s)

    def commit(self, facts: dict[str, Any]) -> None:
        """Everything onto the disk, the record last. facts: recipe and media digests, provenance."""
        times_s = np.concatenate([np.empty(0), *self._times])
        shapes = {"values": (len(times_s), *self._row_shape), "times_s": times_s.shape}
        self._finish(self._chunk, self._crc)
        sums = {"values": (self._dtype, self._crc), "times_s": self._write_times(times_s)}
        arrays = {}
        for name, (dtype, crc) in sums.items():
            shape, inner = list(shapes[name]), self._inner / name
            if not shape[0]:  # Zarr: an array without elements has no chunk
                disk.remove(inner / chunk_name(len(shape)))
            disk.write_file(inner / "zarr.json", array_json(shape, dtype.name))
            disk.sync_folder(inner)
            arrays[name] = {"shape": shape, "dtype": dtype.name, "crc32c": crc}
        if self._attempt:
            disk.sync_folder(self._inner)
            facts = {**facts, "attempt": self._attempt}
        noted = {"provenance": {**facts["provenance"], **self.notes}} if self.notes else {}
        write_record(self._folder, {**facts, **noted, "arrays": arrays})

    def _write_times(self, times_s: np.ndarray) -> tuple[np.dtype[Any], int]:
        raw = times_s.astype(_DTYPES["float64"]).tobytes()
        crc = crc32c.crc32c(raw)
        with disk.NewFile(self._inner / "times_s" / chunk_name(1)) as chunk:
            chunk.write(raw)
            self._finish(chunk, crc)
        return _DTYPES["float64"], crc

    @staticmethod
    def _finish(chunk: disk.NewFile, crc: int) -> None:
        with chunk:
            if chunk.size:
                chunk.write(crc.to_bytes(4, "little"))
            chunk.sync()

    def close(self) -> None:
        """Lets the file go; what is not committed is nothing."""
        self._chunk.close()


def _blocks(array: np.ndarray) -> Iterator[np.ndarray]:
    """The bytes of an array, little-endian, in read-only pieces."""
    raw = np.ascontiguousarray(array, array.dtype.newbyteorder("<")).view(np.uint8).reshape(-1)
    raw.flags.writeable = False
    for start in range(0, raw.size, _BLOCK):
        yield raw[start : start + _BLOCK]


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """The commit record with its own digest; the folder is an entry from now on.

    Raises ValueError for a record that could not be read back: a provenance of 64 kB, a medium that is no digest.
    """
    text = group_json({**record, "digest": digest(record)})
    if len(text) > JSON_LIMIT:
        raise ValueError(
            f"the record of a track has {len(text)} bytes, more than {JSON_LIMIT}: note less in it"
        )
    parse_record(text, f"@{record['recipe'][:16]}", record["media"][:24])
    disk.write_file(folder / "zarr.json", text)
    disk.sync_folder(folder)


def group_json(attributes: dict[str, Any]) -> bytes:
    """The zarr.json of a Zarr v3 group whose attributes are ours."""
    body = {"zarr_format": 3, "node_type": "group", "attributes": {"vacli": attributes}}
    return json.dumps(body, indent=1, allow_nan=False).encode()


def array_json(shape: list[int], dtype: str) -> bytes:
    """The zarr.json of an array in one raw chunk: bytes little-endian, then crc32c."""
    metadata = {
        "zarr_format": 3,
        "node_type": "array",
        "shape": shape,
        "data_type": dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [max(1, n) for n in shape]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "fill_value": "NaN",
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
        "attributes": {},
    }
    return json.dumps(metadata, indent=1).encode()


def chunk_name(ndim: int) -> str:
    return ".".join(["c", *["0"] * ndim])


# ---- checking and reading ------------------------------------------------------------------------------------


def _refuse_constant(name: str) -> None:
    raise ValueError(f"it holds {name}, which is no JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


def parse_group(text: bytes) -> dict[str, Any]:
    """Our attributes in a group's zarr.json. Raises ValueError."""
    try:
        attributes = _DECODER.decode(text.decode())["attributes"]["vacli"]
        if text.count(b"{") + text.count(b"[") > _FEW_BRACKETS:  # a usual record has ten
            check_json(attributes)
    except (RecursionError, KeyError, TypeError) as e:  # 200,000 nested brackets; not ours
        raise ValueError(f"no attributes of vacli ({type(e).__name__})") from e
    if not isinstance(attributes, dict):
        raise ValueError("no attributes of vacli")
    return attributes


def parse_record(text: bytes, folder: str, name: str) -> dict[str, Any]:
    """The record of entry `<folder>/<name>`, with its digest. Raises ValueError if it is not whole or not its own."""
    record = parse_group(text)
    try:
        own = record.pop("digest")
        if own != digest(record, of_json=True):
            raise ValueError("its record has been changed")
        if not all(SHA256.fullmatch(record[key]) for key in ("recipe", "media")):
            raise ValueError("its record belongs to another key, which is no digest")
        if not folder.endswith(f"@{record['recipe'][:16]}") or name != record["media"][:24]:
            raise ValueError("its record belongs to another track")
        if not isinstance(record["provenance"], dict) or not isinstance(record.get("failed", ""), str):
            raise ValueError("its provenance is no table, or its failure no text")
        if "failed" not in record:
            _check_arrays(record)
    except (KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"its record is not of our form ({type(e).__name__}: {e})") from e
    return {**record, "digest": own}


def _check_arrays(record: dict[str, Any]) -> None:
    attempt = record.get("attempt", "")
    if attempt != "" and not _ATTEMPT.fullmatch(attempt):
        raise ValueError(f"its attempt is {attempt!r:.40}")
    for name in ARRAYS:
        array = record["arrays"][name]
        shape, dtype = array["shape"], array["dtype"]
        if (
            not isinstance(shape, list)
            or not all(type(n) is int and n >= 0 for n in shape)
            or dtype not in _DTYPES
            or math.prod(shape[1:]) > _ROW_LIMIT
            or chunk_bytes(array) > _CHUNK_LIMIT
        ):
            raise ValueError(f"{name} has shape {shape!r:.80} and dtype {dtype!r:.40}")
        if type(array["crc32c"]) is not int:
            raise ValueError(f"{name} has the checksum {array['crc32c']!r:.40}")
    values, times_s = (record["arrays"][n] for n in ARRAYS)
    if (
        len(values["shape"]) not in (2, 3)
        or 0 in values["shape"][1:]
        or times_s["shape"] != values["shape"][:1]
        or times_s["dtype"] != "float64"
        or values["dtype"] == "float64"
    ):
        raise ValueError(f"values {values!r:.160} and times_s {times_s!r:.160} do not fit")


def nbytes_of(record: dict[str, Any]) -> int:
    """Bytes of the chunks of a record's arrays, checksums included; 0 for a tombstone."""
    return sum(chunk_bytes(record["arrays"][name]) for name in ARRAYS) if "arrays" in record else 0


def chunk_bytes(array: dict[str, Any]) -> int:
    """Bytes of the chunk of one array of a record; 0 where it has no element and so no chunk."""
    count = 1
    for n in array["shape"]:
        count *= n
    return count and count * _DTYPES[array["dtype"]].itemsize + 4


def check(entry: Path) -> dict[str, Any]:
    """The record of an entry whose files have the sizes it says.

    Raises FileNotFoundError if there is no such entry, Damaged, Unreadable.
    """
    try:
        _refuse_links(str(entry.parent), str(entry))
        text = disk.read_small(entry / "zarr.json", JSON_LIMIT)
        record = parse_record(text, entry.parent.name, entry.name)
        if "arrays" in record:
            _check_files(str(entry), record)
        return record
    except (OSError, ValueError) as e:
        if not os.path.lexists(entry):
            raise FileNotFoundError(errno.ENOENT, "no such entry", str(entry)) from e
        raise _told(entry, e) from e


def _check_files(entry: str, record: dict[str, Any]) -> None:
    """Folders that are folders, chunks of the right size. Plain text paths: it is done for thousands."""
    inner = _inner(entry, record)
    _refuse_links(inner, *(f"{inner}/{name}" for name in ARRAYS))
    for name in ARRAYS:
        wanted = chunk_bytes(record["arrays"][name])
        if wanted:
            found = os.lstat(_chunk(inner, record, name))
            if not stat.S_ISREG(found.st_mode) or found.st_size != wanted:
                raise ValueError(f"{name} is not the {wanted} bytes its record says")


def _refuse_links(*folders: str) -> None:
    """Before anything in them is opened: what lies elsewhere is not the store's."""
    if any(stat.S_ISLNK(os.lstat(folder).st_mode) for folder in folders):
        raise ValueError("a link stands in the place of a folder")


def _inner(entry: str, record: dict[str, Any]) -> str:
    return f"{entry}/{record['attempt']}" if record.get("attempt") else entry


def _chunk(inner: str, record: dict[str, Any], name: str) -> str:
    return f"{inner}/{name}/{chunk_name(len(record['arrays'][name]['shape']))}"


def damaged(entry: Path, why: str) -> Damaged:
    return Damaged(
        f"damaged track {entry.parent.name}/{entry.name}: {why}; run `vacli extract` again to make it anew"
    )


def _told(entry: Path, e: OSError | ValueError) -> Damaged | Unreadable:
    """Bytes that are wrong or missing are damage; what the machine refuses for now is not."""
    if isinstance(e, OSError) and e.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO):
        return Unreadable(
            f"cannot read track {entry.parent.name}/{entry.name}: {e.strerror}; mend it and run again: "
            "what is stored is kept"
        )
    what = f"{Path(e.filename or '').name}: {e.strerror}" if isinstance(e, OSError) else str(e)
    return damaged(entry, what)


def read(entry: Path, record: dict[str, Any], mapped: bool = False, everything: bool = False) -> Track:
    """The Track of a checked entry, its checksums verified.

    mapped: the values are a read-only map of the chunk, whose checksum is verified when this process maps it first,
    and again when the file has changed (inode, size, times). everything: each row is looked at as well, and the
    metadata that other readers go by. Raises Damaged, Unreadable.
    """
    try:
        values, times_s = (
            _array(entry, record, name, _map if mapped and name == "values" else _read) for name in ARRAYS
        )
        check_times(times_s, len(values))
        if everything:
            check_rows(values)
            _check_metadata(entry, record)
        return Track.trusted(values, times_s)
    except (OSError, ValueError) as e:
        if not os.path.lexists(entry):  # removed since its record was read
            raise FileNotFoundError(errno.ENOENT, "no such entry", str(entry)) from e
        raise _told(entry, e) from e


def _array(
    entry: Path, record: dict[str, Any], name: str, how: Callable[[int, int, int], np.ndarray]
) -> np.ndarray:
    array = record["arrays"][name]
    shape, dtype, wanted = array["shape"], _DTYPES[array["dtype"]], chunk_bytes(array)
    if not wanted:
        return np.empty(shape, dtype)
    fd = disk.open_regular(Path(_chunk(_inner(str(entry), record), record, name)))
    try:
        found = os.fstat(fd)
        if found.st_size != wanted:
            raise ValueError(f"{name} is not the {wanted} bytes its record says")
        if found.st_blocks * 512 < wanted // 2:  # mostly holes, or a disk that compresses
            if wanted > _HOLLOW_LIMIT:
                raise ValueError(f"{name} claims {wanted} bytes, of which there are {found.st_blocks * 512}")
            how = _map  # which takes no memory
        raw = how(fd, wanted, array["crc32c"])
    except _Wrong as e:
        raise ValueError(f"the checksum of {name} is wrong") from e
    finally:
        os.close(fd)
    return raw[:-4].view(dtype).reshape(shape)


class _Wrong(ValueError):
    """A checksum does not match."""


def _read(fd: int, wanted: int, crc: int) -> np.ndarray:
    """The bytes of a chunk, in memory. Each block is checked while it is in the processor's cache."""
    room = np.empty(wanted + _ALIGN, np.uint8)
    start = -room.ctypes.data % _ALIGN
    raw, found = room[start : start + wanted], 0
    for low in range(0, wanted, _BLOCK):
        block = raw[low : low + _BLOCK]
        if os.preadv(fd, [block.data], low) != len(block):
            raise ValueError("it was cut while it was read")
        found = crc32c.crc32c(block[: max(0, wanted - 4 - low)].data, found)
    if found != crc or int.from_bytes(raw[-4:], "little") != crc:
        raise _Wrong
    raw.flags.writeable = False
    return raw


def _map(fd: int, wanted: int, crc: int) -> np.ndarray:
    """The bytes of a chunk, mapped."""
    raw = np.frombuffer(mmap.mmap(fd, wanted, prot=mmap.PROT_READ), np.uint8)
    s = os.fstat(fd)
    key = (s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns, crc)
    if key not in _seen_right:
        if crc32c.crc32c(raw[:-4].data) != crc or int.from_bytes(raw[-4:], "little") != crc:
            raise _Wrong
        _seen_right.add(key)
    return raw


def _check_metadata(entry: Path, record: dict[str, Any]) -> None:
    inner = Path(_inner(str(entry), record))
    wanted = {
        name: array_json(record["arrays"][name]["shape"], record["arrays"][name]["dtype"]) for name in ARRAYS
    }
    if inner != entry:
        wanted["."] = group_json({})
    for name, text in wanted.items():
        if disk.read_small(inner / name / "zarr.json", JSON_LIMIT) != text:
            raise ValueError(f"the metadata of {name} has been changed")
