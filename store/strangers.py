"""HDF5 and JSON that nobody vouches for: every size, type and link is checked before anything is believed."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from .entry import JSON_LIMIT

# What h5py, and our look at what it gives, may raise on bytes that make no sense; a test tries thousands of them.
STRANGE = (
    OSError,
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    MemoryError,
)
_DEPTH = 16  # of nested JSON; ours has 5


def one_line(e: BaseException) -> str:
    """What an exception says, on one line of bounded length, without characters that steer a terminal."""
    said = " ".join(str(e.args[0] if isinstance(e, KeyError) and e.args else e).split())[:400]
    return "".join(c if c.isprintable() else "?" for c in said) or type(e).__name__


def table(text: str | bytes) -> dict[str, Any]:
    """A JSON object of at most JSON_LIMIT bytes, not nested deep, its numbers finite. Raises ValueError."""

    def refuse(constant: str) -> None:
        raise ValueError(f"JSON has {constant}; wanted finite numbers")

    if len(text) > JSON_LIMIT:
        raise ValueError(f"{len(text)} bytes of JSON; wanted at most {JSON_LIMIT}")
    try:
        found = json.loads(text, parse_constant=refuse)
    except RecursionError as e:
        raise ValueError("JSON nested too deep") from e
    level: list[Any] = [found]
    for _ in range(_DEPTH):
        level = [
            i for v in level if isinstance(v, dict | list) for i in (v.values() if isinstance(v, dict) else v)
        ]
    if level:
        raise ValueError("JSON nested too deep")
    if not isinstance(found, dict):
        raise ValueError("JSON is no object")
    return found


def group(parent: Any, name: str) -> Any:
    """The h5py.Group of this name right in `parent`. Raises one of STRANGE."""
    import h5py

    _refuse_link(parent, name)
    return h5py.Group(h5py.h5g.open(parent.id, name.encode()))


def names(parent: Any) -> list[str]:
    """What a group holds, links included; odd characters are escaped. Raises one of STRANGE."""
    return [raw.decode("latin-1").encode("unicode_escape").decode("ascii") for raw in parent.id]


def text(holder: Any, name: str) -> str:
    """An ASCII attribute of fixed length, at most JSON_LIMIT. Raises one of STRANGE."""
    import h5py

    attribute = h5py.h5a.open(holder.id, name.encode())
    kind = attribute.get_type()
    fixed = isinstance(kind, h5py.h5t.TypeStringID) and not kind.is_variable_str()
    if not fixed or attribute.shape != () or kind.get_size() > JSON_LIMIT:
        raise ValueError(f"its attribute {name} is no text of at most {JSON_LIMIT} bytes")
    found = np.empty((), f"S{kind.get_size()}")
    attribute.read(found)
    return found.item().decode("ascii")


def number(holder: Any, name: str) -> int:
    """An integer attribute. Raises one of STRANGE."""
    import h5py

    attribute = h5py.h5a.open(holder.id, name.encode())
    if attribute.shape != () or attribute.dtype != np.dtype("<i8"):
        raise ValueError(f"its attribute {name} is no number")
    found = np.empty((), "<i8")
    attribute.read(found)
    return int(found)


def array(parent: Any, name: str, shape: tuple[int, ...] | None, dtype: np.dtype[Any]) -> np.ndarray:
    """A dataset that lies as plain bytes in this very file, of this shape (None: any) and dtype.

    Its size is held against the file's before memory is taken. Raises one of STRANGE.
    """
    import h5py

    _refuse_link(parent, name)
    found = h5py.h5d.open(parent.id, name.encode())
    how = found.get_create_plist()
    if how.get_layout() != h5py.h5d.CONTIGUOUS or how.get_external_count() or how.get_nfilters():
        raise ValueError(
            f"{name} is not plain bytes in this file; wanted nothing chunked, filtered, virtual, external"
        )
    if found.dtype != dtype or shape not in (None, found.shape):
        raise ValueError(f"{name} is {found.dtype!s:.40} {found.shape!s:.40}; wanted {dtype} {shape}")
    size_bytes, offset = nbytes(found.shape, dtype), found.get_offset()
    missing = size_bytes and (offset is None or offset + size_bytes > parent.file.id.get_filesize())
    if missing or found.get_storage_size() != size_bytes:
        raise ValueError(f"{name} says it has {size_bytes} bytes, and the file does not have them")
    values = np.empty(found.shape, dtype)
    if size_bytes:
        found.read(h5py.h5s.ALL, h5py.h5s.ALL, values)
    return values


def raw(values: np.ndarray) -> np.ndarray:
    """(n,) uint8: the bytes of an array, little-endian, read-only."""
    found = np.ascontiguousarray(values, values.dtype.newbyteorder("<")).reshape(-1).view(np.uint8)
    found.flags.writeable = False
    return found


def nbytes(shape: tuple[int, ...] | list[int], dtype: Any) -> int:
    """Bytes of an array, in Python's integers: a lie about its shape cannot overflow."""
    count = np.dtype(dtype).itemsize
    for n in shape:
        count *= n
    return count


def _refuse_link(parent: Any, name: str) -> None:
    import h5py

    if parent.id.links.get_info(name.encode()).type != h5py.h5l.TYPE_HARD:
        raise ValueError(f"{name!r:.80} is a link to elsewhere; links are not followed")
