"""Strangers' tables: named columns of CSV, NumPy, HDF5 and Parquet files, read without trusting a byte of them."""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import itertools
import math
import zipfile
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from .. import VacliError

TEXT_SUFFIXES = (".csv", ".tsv", ".txt")
_MISSING = {"", "nan", "na", "n/a", "none", "null"}
_LINE_CHARS = 2**23  # of one line of text; longer is no table
_ROOM_BYTES, _ROOM_TIMES = 2**25, 100  # a file may unpack to this much, or to this many times its own size
_MOST_NAMES = 100_000  # in one HDF5 file
TIME_NAMES = ("time_s", "time", "timestamp", "timestamps", "t", "onset", "seconds")
_NO_TIMES = (
    f"no times: wanted a column or array called {', '.join(TIME_NAMES)}, or --times NAME of another one, "
    "--times 25Hz (row i is the middle of the i-th 1/25 s), --times frames (row i is frame i of the stored video), "
    "or --times FOLDER with a file of times for each video"
)
_NUMBERS = "fiub"  # dtype kinds: floats, integers, booleans


@dataclass(frozen=True)
class Table:
    """What a file offers. Shape legend: T rows, D dims.

    names: of what can be asked for: columns (T,), or arrays (T,) and (T, D). columns: is every name a column?
    unusable: name -> why it cannot be asked for. first_line: the line of row 0 in a text file, else None.
    headed: do the names come from the file? (Columns without a header are called 1, 2, ...)
    """

    path: Path
    names: list[str]
    columns: bool
    _load: Callable[[Sequence[str], str | None], list[np.ndarray]]
    unusable: dict[str, str] = field(default_factory=dict)
    first_line: int | None = None
    headed: bool = True

    def load(self, names: Sequence[str], words: str | None = None) -> list[np.ndarray]:
        """The columns or arrays of these names, float or integer; a missing cell is NaN.

        words: a column of text among them, given as numbers 0, 1, ... for its different texts. Raises VacliError.
        """
        for name in names:
            if name in self.unusable and name != words:
                raise VacliError(f"{self.path}: {name!r} {self.unusable[name]}; choose others with --columns")
            if self.names.count(name) != 1:
                many = "several columns are" if name in self.names else "nothing is"
                raise VacliError(f"{self.path}: {many} called {name!r}; it has {shown(self.names)}")
        with _told(self.path):
            return self._load(names, words)

    def _word(self, name: str) -> str:
        return name.lower() if self.columns else name.lower().rpartition("/")[2]

    def value_names(self) -> list[str]:
        """The names that are not of times; no column without a name (an index), no array of anything but numbers."""
        words = {self._word(n) for n in self.names}
        times = {*TIME_NAMES, "duration"} if "onset" in words else {*TIME_NAMES}
        if self.columns:
            times.add("")
        names = [n for n in self.names if self._word(n) not in times]
        return names if self.columns else [n for n in names if n not in self.unusable] or names

    def matrix(self, names: Sequence[str], words: str | None = None) -> tuple[np.ndarray, np.ndarray]:
        """(values (T, D), codes (T,)): columns or arrays side by side, and a number for each text of column `words`."""
        arrays = self.load([*names, words] if words else names, words)
        codes = arrays.pop() if words else np.zeros(len(arrays[0]))
        rows = [len(a) for a in arrays]
        if len(set(rows)) > 1:
            raise VacliError(f"{self.path}: {shown(names)} have {rows} rows; wanted as many in each")
        values = np.hstack([a[:, None] if a.ndim == 1 else a for a in arrays])
        if 0 in values.shape:
            raise VacliError(f"{self.path}: it holds {values.shape} values; wanted rows of them")
        return values, codes

    def times_s(self, name: str | None = None, alone: bool = False) -> np.ndarray:
        """(T,) float64: the column or array of times, by name or of TIME_NAMES; the middle of onset and duration.

        alone: the file is one of times, and its only column will do whatever its name. Raises VacliError.
        """
        lower = {self._word(n): n for n in reversed(self.names)}
        name = name or next((lower[n] for n in TIME_NAMES if n in lower), None)
        if name is None and alone and len(self.names) == 1:
            name = self.names[0]
        if name is None:
            raise VacliError(f"{self.path}: {_NO_TIMES}")
        lasting = self._word(name) == "onset" and "duration" in lower
        arrays = self.load([name, lower["duration"]] if lasting else [name])
        flat = [a.reshape(-1).astype(np.float64) for a in arrays if a.size == len(a)]
        if len(flat) < len(arrays) or len({len(a) for a in flat}) > 1:
            raise VacliError(
                f"{self.path}: {name!r} has shape {arrays[0].shape}; wanted one time for each row"
            )
        return flat[0] + flat[1] / 2 if lasting else flat[0]

    def row(self, index: int) -> str:
        """What a message calls row `index`."""
        return f"row {index}" if self.first_line is None else f"line {index + self.first_line}"


def suffix_of(path: Path) -> str | None:
    """The suffix that says how a file is read (`.csv.gz` is one), or None if it is not one of ours."""
    name = path.name.lower()
    return next((s for s in _OPENERS if name.endswith(s) and len(name) > len(s)), None)


def open_table(path: Path) -> Table:
    """What is in a file, without reading its numbers. Raises VacliError for a torn, foreign or hostile file."""
    suffix = suffix_of(path)
    if suffix is None:
        raise VacliError(f"{path}: wanted a file ending in {' '.join(_OPENERS)}")
    with _told(path):
        return _OPENERS[suffix](path)


def shown(names: Sequence[str]) -> str:
    """The names, cut where there are very many."""
    text = "".join(c if c.isprintable() else "?" for c in ", ".join(names[:12])) or "none"
    return f"{text[:300]}{' ...' if len(names) > 12 or len(text) > 300 else ''}"


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except VacliError:
        raise
    except ImportError as e:
        raise VacliError(
            f"{path}: it needs pyarrow, which cannot be imported: pip install 'vacli[parquet]'"
        ) from e
    except UnicodeDecodeError as e:
        raise VacliError(f"{path}: it is not UTF-8 text (byte {e.start}); save it as UTF-8") from e
    except (
        Exception
    ) as e:  # five libraries parse strangers' bytes here: whatever they raise, the file is broken
        why = " ".join(str(e).split())[:200]
        raise VacliError(
            f"{path}: it cannot be read ({type(e).__name__}: {why}); it may be cut off, make it anew"
        ) from e


def _room(path: Path) -> int:
    """Bytes that a file of this size may unpack to."""
    return _ROOM_BYTES + _ROOM_TIMES * path.stat().st_size


def _huge(path: Path, nbytes: int) -> str:
    return (
        f"its {path.stat().st_size} bytes would unpack to {nbytes} or more, over {_ROOM_TIMES} times as many; "
        "if that is right, save it uncompressed"
    )


def _check_room(path: Path, nbytes: int) -> None:
    """Before memory is taken: a small file that unpacks to something huge is refused."""
    if nbytes > _room(path):
        raise VacliError(f"{path}: {_huge(path, nbytes)}")


def _nbytes(shape: Sequence[int], dtype: np.dtype[Any]) -> int:
    return math.prod(shape) * dtype.itemsize


def _why_not(shape: Sequence[int] | None, dtype: np.dtype[Any]) -> str | None:
    """Why an array is no use as a column or as rows of values."""
    if dtype.kind not in _NUMBERS or dtype.hasobject:
        return f"holds {dtype}, no numbers"
    if shape is None or len(shape) not in (1, 2):
        return f"has shape {shape}, wanted (rows,) or (rows, dims)"
    return None


# ---- text ----------------------------------------------------------------------------------------------------


def _text(path: Path) -> Table:
    first = next(_lines(path), [])
    names = [cell.strip() for cell in first]
    headed = not all(map(_is_number, names)) or _counts(names)
    if not headed:
        names = [str(i + 1) for i in range(len(names))]

    def load(chosen: Sequence[str], words: str | None) -> list[np.ndarray]:
        lines = itertools.islice(_lines(path), int(headed), None)
        rows = _Rows(path, names, chosen, words)
        for number, cells in enumerate(lines, 1 + headed):
            rows.take(number, cells)
        return rows.arrays()

    return Table(path, names, True, load, first_line=1 + headed, headed=headed)


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _counts(names: list[str]) -> bool:
    """0,1,2,... or 1,2,3,...: the header pandas gives to columns without names."""
    return len(names) > 1 and names in ([str(i + k) for i in range(len(names))] for k in (0, 1))


class _Rows:
    """The chosen columns of a text, line by line; a blank line is a missing row, unless only blank ones follow."""

    def __init__(self, path: Path, names: list[str], chosen: Sequence[str], words: str | None) -> None:
        self.path, self.names, self.words = path, names, words
        self.picked = [names.index(c) for c in chosen]
        self.numbers = [i for i in self.picked if names[i] != words]
        self.texts: dict[str, int] = {}
        self.cells, self.codes, self.blank = array("d"), array("d"), 0

    def take(self, number: int, cells: list[str]) -> None:
        if not any(cell.strip() for cell in cells):
            self.blank += 1
            return
        for _ in range(self.blank):
            self.cells.extend([math.nan] * len(self.numbers))
            self.codes.append(math.nan)
        self.blank = 0
        if len(cells) != len(self.names):
            raise VacliError(
                f"{self.path} line {number}: {len(cells)} cells, wanted {len(self.names)} as in its first line"
            )
        try:
            self.cells.extend([float(cells[i]) for i in self.numbers])
        except ValueError:  # an empty cell, or text
            self.cells.extend([self._number(number, cells, i) for i in self.numbers])
        text = cells[self.names.index(self.words)].strip() if self.words else ""
        self.codes.append(self.texts.setdefault(text, len(self.texts)))

    def _number(self, number: int, cells: list[str], i: int) -> float:
        cell = cells[i].strip()
        if cell.lower() in _MISSING:
            return math.nan
        try:
            return float(cell)
        except ValueError as e:
            raise VacliError(
                f"{self.path} line {number}: column {self.names[i]!r} holds {cell[:40]!r}, no number; "
                "choose the columns wanted with --columns a,b,..."
            ) from e

    def arrays(self) -> list[np.ndarray]:
        table = np.frombuffer(self.cells).reshape(len(self.codes), len(self.numbers))
        columns = {i: table[:, k] for k, i in enumerate(self.numbers)}
        return [columns[i] if i in columns else np.frombuffer(self.codes) for i in self.picked]


def _lines(path: Path) -> Iterator[list[str]]:
    """The cells of each line; what parts them is seen from the first: tab, semicolon, comma, or else spaces."""
    packed = path.suffix.lower() == ".gz"
    with (
        gzip.open(path) if packed else open(path, "rb") as raw,
        io.TextIOWrapper(raw, "utf-8-sig", newline="") as text,
    ):
        lines = _bounded(path, text)
        first = next(lines, "").lstrip("# ")  # np.savetxt puts it before a header
        sign = next((s for s in "\t;," if s in first), " ")
        lines = itertools.chain([first] if first else [], lines)
        if sign == " ":
            lines = (line.strip() for line in lines)
        yield from csv.reader(lines, delimiter=sign, skipinitialspace=True)


def _bounded(path: Path, text: io.TextIOWrapper) -> Iterator[str]:
    chars, room = 0, _room(path)
    while line := text.readline(_LINE_CHARS + 1):
        chars += len(line)
        if len(line) > _LINE_CHARS:
            raise VacliError(f"{path}: a line of more than {_LINE_CHARS} characters; wanted a table")
        if chars > room:
            _check_room(path, chars)
        yield line


# ---- NumPy ---------------------------------------------------------------------------------------------------


def _npy(path: Path) -> Table:
    with open(path, "rb") as f:
        why = _check_npy(path, f, path.stat().st_size)

    def load(chosen: Sequence[str], words: str | None) -> list[np.ndarray]:
        with open(path, "rb") as f:
            return [np.lib.format.read_array(f, allow_pickle=False) for _ in chosen]

    return Table(path, [""], False, load, {"": why} if why else {}, headed=False)


def _npz(path: Path) -> Table:
    names, unusable = [], {}
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if member.filename.endswith(".npy"):
                names.append(member.filename.removesuffix(".npy"))
                with archive.open(member) as f:
                    why = _check_npy(path, f, member.file_size)
                if why:
                    unusable[names[-1]] = why

    def load(chosen: Sequence[str], words: str | None) -> list[np.ndarray]:
        with zipfile.ZipFile(path) as archive:
            found = []
            for name in chosen:
                with archive.open(f"{name}.npy") as f:
                    found.append(np.lib.format.read_array(f, allow_pickle=False))
            return found

    return Table(path, names, False, load, unusable)


def _check_npy(path: Path, f: IO[bytes], size: int) -> str | None:
    """Why the array in f is no use, or None. Raises if its header does not say the size that is there."""
    version = np.lib.format.read_magic(f)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        return f"is written in version {version} of .npy, wanted numbers in version (1, 0)"
    shape, _, dtype = readers[version](f)
    why = _why_not(shape, dtype)
    if why is None:
        if min(shape) < 0 or f.tell() + _nbytes(shape, dtype) != size:
            raise ValueError(f"its header says {shape} {dtype}, its size another one")
        _check_room(path, size)
    return why


# ---- HDF5 and Parquet ----------------------------------------------------------------------------------------


def _hdf5(path: Path) -> Table:
    import h5py

    names: list[str] = []
    unusable: dict[str, str] = {}

    def look(name: str, link: Any) -> str | None:  # what it returns ends the visit
        if isinstance(link, h5py.ExternalLink):
            return f"{name!r} is a link to another file, which is never followed; copy the data in"
        if len(names) > _MOST_NAMES:
            return f"more than {_MOST_NAMES} names; wanted the features of one video"
        if isinstance(link, h5py.HardLink) and f.get(name, getclass=True) is h5py.Dataset:
            names.append(name)
            if f[name].is_virtual or f[name].external:
                return f"{name!r} lies in another file, which is never opened; copy the data in"
            if why := _why_not(f[name].shape, f[name].dtype):
                unusable[name] = why
            elif (size := _stretched(f[name])) > room:
                return _huge(path, size)
        return None

    room = _room(path)
    with h5py.File(path, "r") as f:
        wrong = f.visititems_links(look)  # a soft link is only another name: it is not followed
    if wrong:
        raise VacliError(f"{path}: {wrong}")

    def load(chosen: Sequence[str], words: str | None) -> list[np.ndarray]:
        with h5py.File(path, "r") as f:
            return [f[name][...] for name in chosen]

    return Table(path, names, False, load, unusable)


def _stretched(data: Any) -> int:
    """Bytes that reading a dataset may take: its own, or those of one chunk."""
    return max(_nbytes(data.shape, data.dtype), _nbytes(data.chunks or (0,), data.dtype))


def _parquet(path: Path) -> Table:
    import pyarrow.parquet as parquet
    import pyarrow.types as types

    with parquet.ParquetFile(path) as f:
        names, rows = list(f.schema_arrow.names), f.metadata.num_rows
        unusable = {
            name: f"holds {kind}, no numbers"
            for name, kind in zip(names, f.schema_arrow.types, strict=True)
            if not (
                types.is_floating(kind)
                or types.is_integer(kind)
                or types.is_boolean(kind)
                or types.is_null(kind)
            )
        }
    _check_room(path, rows * 8)  # of one column; the rows are told by the footer

    def load(chosen: Sequence[str], words: str | None) -> list[np.ndarray]:
        _check_room(path, rows * 8 * len(chosen))
        with parquet.ParquetFile(path) as f:
            table = f.read(columns=list(chosen), use_threads=False)
        found = []
        for name in chosen:
            if name == words:
                texts = table[name].to_pylist()
                known = {text: float(i) for i, text in enumerate(dict.fromkeys(texts))}
                found.append(np.array([known[text] for text in texts]))
            else:
                values = table[name].to_numpy()  # a null is NaN, unless among booleans
                found.append(table[name].cast("float64").to_numpy() if values.dtype == object else values)
        return found

    return Table(path, names, True, load, unusable)


_OPENERS: dict[str, Callable[[Path], Table]] = {
    **{suffix + packed: _text for suffix in TEXT_SUFFIXES for packed in ("", ".gz")},
    ".npy": _npy,
    ".npz": _npz,
    ".h5": _hdf5,
    ".hdf5": _hdf5,
    ".parquet": _parquet,
}
SUFFIXES = tuple(_OPENERS)
