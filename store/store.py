"""The store: a content-addressed cache, (recipe, media) -> Track, in plain Zarr v3, each track whole or absent.

Layout (every folder is a Zarr group or array, so any Zarr v3 reader opens all of it):

    <store>/zarr.json                        group; its attributes hold the format number
    <store>/<track>@<recipe16>/zarr.json     group; attributes: the whole recipe, readable
    <store>/<track>@<recipe16>/<media24>/    one entry: arrays `values` and `times_s`, one raw chunk each
                                             (bytes + crc32c); its zarr.json is the commit record, written last
    <store>/videos/                          group; attributes: what people call things (ids, track names, splits)
    <store>/fingerprints/                    group; attributes: remembered digests of media
    <store>/.staging/  .quarantine/          groups: what is being written; what was found broken

An entry is made in .staging, flushed to the disk, its record written last, and then renamed to its place: at any
moment it is whole or not there. Nothing is changed in place.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from .. import VacliError, __version__
from .recipe import Fingerprints, canonical, digest, folder_name
from .track import Track

FORMAT = 1
_JSON_LIMIT = 64 * 1024  # of a record or an array's metadata; more is not ours
_DTYPES: dict[str, np.dtype[Any]] = {
    "float16": np.dtype("<f2"),
    "float32": np.dtype("<f4"),
    "float64": np.dtype("<f8"),
}


class StoreError(VacliError):
    """The store itself cannot be used: foreign, newer, full, read-only."""

    fatal = True


class Damaged(VacliError):
    """An entry does not hold what its record says; it has been set aside and is absent from now on."""


class Store:
    """A feature store in a folder; opening an existing one is a few milliseconds and imports no zarr.

    path: the folder. create: make it if absent (otherwise a missing store is a StoreError).
    """

    def __init__(self, path: str | Path, create: bool = False) -> None:
        self.path = Path(path)
        if not self.path.exists() or (
            self.path.is_dir() and {e.name for e in self.path.iterdir()} <= {".staging"}
        ):
            if not create:
                raise StoreError(
                    f"no feature store at {self.path}: make one with `vacli extract VIDEOS --store {self.path}`"
                )
            with _told("create the store", self.path):
                (self.path / ".staging").mkdir(parents=True, exist_ok=True)
                self._replace_group(self.path, {"store_format": FORMAT})
                self._replace_group(self.path / ".staging", {})
        self._check_format()
        if create:
            self._sweep_staging()
        self.fingerprints = Fingerprints(self._attributes("fingerprints"))

    def _check_format(self) -> None:
        try:
            attributes = _read_json(self.path / "zarr.json", limit=_JSON_LIMIT)["attributes"]["vacli"]
            found = int(attributes["store_format"])
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise StoreError(
                f"{self.path} is not a vacli store (no zarr.json with a vacli store_format); "
                "give another place with --store"
            ) from e
        if found > FORMAT:
            raise StoreError(
                f"{self.path} has store format {found}, this vacli {__version__} reads up to {FORMAT}: update vacli"
            )

    # ---- entries -------------------------------------------------------------------------------------------

    def entry(self, recipe: dict[str, Any], media: str) -> Path:
        """Where the track of this recipe and media lies, or would lie."""
        return self.path / folder_name(recipe) / media[:24]

    def has(self, recipe: dict[str, Any], media: str) -> bool:
        """Is it there and whole? Checks the record's own digest, its key and the sizes of the files; not the CRC."""
        entry = self.entry(recipe, media)
        if not entry.exists():
            return False
        try:
            _check_record(entry, digest(recipe), media)
        except Damaged as e:
            self._quarantine(entry, e)
            return False
        return True

    def get(self, recipe: dict[str, Any], media: str) -> Track:
        """The track, every checksum checked. Raises KeyError if absent, Damaged (and sets it aside) if broken."""
        entry = self.entry(recipe, media)
        if not entry.exists():
            raise KeyError(f"{entry.parent.name}/{entry.name}")
        try:
            record = _check_record(entry, digest(recipe), media)
            return _read_track(entry, record)
        except Damaged as e:
            self._quarantine(entry, e)
            raise

    def put(
        self, recipe: dict[str, Any], media: str, track: Track, provenance: dict[str, Any] | None = None
    ) -> None:
        """Store a track durably: when this returns it survives kill -9 and power cut. First complete one stays.

        Raises StoreError (disk full, no permission); then nothing is left behind.
        """
        entry = self.entry(recipe, media)
        with _told(f"store {entry.parent.name}", self.path):
            if not (entry.parent / "zarr.json").exists():
                self._replace_group(entry.parent, {"recipe": json.loads(canonical(recipe))})
            with self._staging() as staged:
                arrays = {
                    name: _write_array(staged / name, array)
                    for name, array in (("values", track.values), ("times_s", track.times_s))
                }
                record = {
                    "recipe": digest(recipe),
                    "media": media,
                    "arrays": arrays,
                    "provenance": {"vacli": __version__, **(provenance or {})},
                }
                _write_group(staged, {**record, "digest": digest(record)})
                _sync_dir(staged)
                if not self._place(staged, entry) and not self.has(recipe, media):
                    self._place(staged, entry)  # what was there was broken, and has been set aside
                _sync_dir(entry.parent)

    @staticmethod
    def _place(staged: Path, entry: Path) -> bool:
        """Rename into place. False if somebody was first: content-addressed, so theirs is as good as ours."""
        try:
            os.rename(staged, entry)
        except OSError as e:
            if e.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            return False
        return True

    def provenance(self, recipe: dict[str, Any], media: str) -> dict[str, Any]:
        """What was noted when the track was made. Raises Damaged if it is broken or absent."""
        return dict(_check_record(self.entry(recipe, media), digest(recipe), media)["provenance"])

    def verify(self) -> Iterator[tuple[str, str | None]]:
        """Read every entry with all checksums; yields (entry, None or what is wrong). Changes nothing."""
        for entry in self.entries():
            name = f"{entry.parent.name}/{entry.name}"
            try:
                record = _check_record(entry, None, None)
                _read_track(entry, record)
                yield name, None
            except Damaged as e:
                yield name, str(e)

    def entries(self) -> list[Path]:
        """The folders of all entries, sorted."""
        return sorted(e for g in self.path.glob("*@*") if g.is_dir() for e in g.iterdir() if e.is_dir())

    def recipe_of(self, folder: str) -> dict[str, Any]:
        """The whole recipe behind `<track>@<recipe16>`."""
        try:
            return _read_json(self.path / folder / "zarr.json", limit=_JSON_LIMIT)["attributes"]["vacli"][
                "recipe"
            ]
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise Damaged(f"{self.path / folder}: its recipe cannot be read; extract again") from e

    # ---- names ---------------------------------------------------------------------------------------------

    def link(self, video_id: str, facts: dict[str, Any], tracks: dict[str, dict[str, str]]) -> None:
        """Say what people call things: video `video_id` has these tracks.

        facts: "root", "media", "split". tracks: name -> {"folder": `<track>@<recipe16>`, "media": digest}.
        A name that was there points to the new track from now on; the old track stays in the store. An id
        stands for one medium only: another file of the same id from another root is refused (StoreError).
        """
        with _told("write the list of videos", self.path), self._locked():
            videos = self._attributes("videos")
            old = videos.get(video_id)
            new = {**facts, "tracks": dict(tracks)}
            if old and old["media"] == facts["media"]:
                new["tracks"] = {**old["tracks"], **tracks}
                # seen from another folder, it stays where it was
                new["split"] = facts["split"] or old["split"]
            elif old and old["root"] != facts["root"]:
                raise StoreError(
                    f"{facts['root']} has a video {video_id!r}, and {self.path} knows another one of that name "
                    f"from {old['root']}: use another --store"
                )
            if new != old:
                videos[video_id] = new
                self._replace_group(self.path / "videos", videos)

    def videos(self) -> dict[str, dict[str, Any]]:
        """id -> {"root", "split", "media", "tracks": {name: {"folder", "media"}}}, as last linked."""
        return dict(sorted(self._attributes("videos").items()))

    def remember_fingerprints(self) -> None:
        """Keep the media digests worked out so far, so that the next run hashes nothing twice."""
        if self.fingerprints.changed:
            with _told("remember media digests", self.path):
                self._replace_group(self.path / "fingerprints", self.fingerprints.memo)
            self.fingerprints.changed = False

    # ---- below the surface ---------------------------------------------------------------------------------

    def _attributes(self, group: str) -> dict[str, Any]:
        path = self.path / group / "zarr.json"
        if not path.exists():
            return {}
        try:
            return dict(_read_json(path)["attributes"]["vacli"])
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise StoreError(
                f"{path} cannot be read ({e}): remove it and run `vacli extract` again, features are kept"
            ) from e

    def _replace_group(self, group: Path, attributes: dict[str, Any]) -> None:
        """Write a group's attributes durably, all at once: a reader sees the old ones or the new ones."""
        with self._staging() as staged:
            _write_group(staged, attributes)
            group.mkdir(exist_ok=True)
            os.rename(staged / "zarr.json", group / "zarr.json")
            _sync_dir(group)
            _sync_dir(group.parent)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with open(self.path / "zarr.json", "rb") as f:
            fcntl.flock(f, fcntl.LOCK_EX)
            yield

    @contextlib.contextmanager
    def _staging(self) -> Iterator[Path]:
        """A fresh folder, locked while we live: a sweep by another process leaves it alone."""
        staged = self.path / ".staging" / uuid.uuid4().hex
        try:
            staged.mkdir()
            with _open_folder(staged) as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                yield staged
        finally:
            shutil.rmtree(staged, ignore_errors=True)  # gone already when it was renamed into place

    def _sweep_staging(self) -> None:
        """Remove what killed writers left: folders a minute old that no living writer holds locked."""
        for staged in (self.path / ".staging").glob("*/"):
            with contextlib.suppress(OSError), _open_folder(staged) as lock:
                if time.time() - os.fstat(lock).st_mtime > 60:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(staged, ignore_errors=True)

    def _quarantine(self, entry: Path, why: Damaged) -> None:
        with _told("set a damaged track aside", self.path):
            aside = self.path / ".quarantine" / f"{entry.parent.name}.{entry.name}.{uuid.uuid4().hex[:8]}"
            if not aside.parent.exists():
                self._replace_group(aside.parent, {})
            with contextlib.suppress(FileNotFoundError):  # somebody else set it aside
                os.rename(entry, aside)


# ---- files ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _told(doing: str, path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        mend = (
            "free some space"
            if e.errno in (errno.ENOSPC, errno.EDQUOT)
            else "check the folder, or use another --store"
        )
        raise StoreError(
            f"cannot {doing} in {path}: {e.strerror}; {mend} and run again: what is stored is kept"
        ) from e


def _write_group(folder: Path, attributes: dict[str, Any]) -> None:
    """A Zarr v3 group whose attributes are ours."""
    body = {"zarr_format": 3, "node_type": "group", "attributes": {"vacli": attributes}}
    _write_file(folder / "zarr.json", json.dumps(body, indent=1, allow_nan=False).encode())


def _write_file(path: Path, data: bytes) -> None:
    with open(path, "xb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())


@contextlib.contextmanager
def _open_folder(folder: Path) -> Iterator[int]:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield fd
    finally:
        os.close(fd)


def _sync_dir(folder: Path) -> None:
    with _open_folder(folder) as fd:
        os.fsync(fd)


def _write_array(folder: Path, array: np.ndarray) -> dict[str, Any]:
    """One Zarr v3 array in one raw chunk (bytes little-endian + crc32c); returns what the record says of it."""
    folder.mkdir()
    name = array.dtype.name
    raw = np.ascontiguousarray(array, dtype=_DTYPES[name]).view(np.uint8).reshape(-1)
    raw.flags.writeable = False
    crc = google_crc32c.value(raw)
    if raw.size:
        with open(folder / _chunk_name(array.ndim), "xb") as f:
            os.posix_fallocate(f.fileno(), 0, raw.size + 4)  # a full disk refuses here, before the first byte
            f.write(raw.data)
            f.write(crc.to_bytes(4, "little"))
            f.flush()
            os.fsync(f.fileno())
    metadata = {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(array.shape),
        "data_type": name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [max(1, n) for n in array.shape]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "fill_value": "NaN",
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
        "attributes": {},
    }
    _write_file(folder / "zarr.json", json.dumps(metadata, indent=1).encode())
    _sync_dir(folder)
    sha256 = hashlib.sha256(raw.data).hexdigest()
    return {"shape": list(array.shape), "dtype": name, "crc32c": crc, "sha256": sha256}


def _chunk_name(ndim: int) -> str:
    return ".".join(["c", *["0"] * ndim])


def _read_json(path: Path, limit: int | None = None) -> dict[str, Any]:
    with open(path, "rb") as f:
        text = f.read() if limit is None else f.read(limit + 1)
    if limit is not None and len(text) > limit:
        raise ValueError(f"more than {limit} bytes of JSON")
    try:
        return json.loads(text)
    except RecursionError as e:  # 200,000 nested brackets
        raise ValueError("JSON nested too deep") from e


def _check_record(entry: Path, recipe_digest: str | None, media: str | None) -> dict[str, Any]:
    """The entry's record if it is its own, for this key, and the files have the sizes it says; else Damaged."""
    where = f"{entry.parent.name}/{entry.name}"
    try:
        record = _read_json(entry / "zarr.json", limit=_JSON_LIMIT)["attributes"]["vacli"]
        own = record.pop("digest")
        if own != digest(record):
            raise ValueError("its record has been changed")
        folder = f"@{record['recipe'][:16]}"
        if not entry.parent.name.endswith(folder) or entry.name != record["media"][:24]:
            raise ValueError("its record belongs to another track")
        if recipe_digest not in (None, record["recipe"]) or media not in (None, record["media"]):
            raise ValueError("its record belongs to another key")
        for name in ("values", "times_s"):
            shape, dtype = _declared(record, name)
            nbytes = int(np.prod(shape, dtype=object)) * dtype.itemsize
            chunk = entry / name / _chunk_name(len(shape))
            if nbytes and (chunk.is_symlink() or not chunk.is_file() or chunk.stat().st_size != nbytes + 4):
                raise ValueError(f"{name} is not the {nbytes + 4} bytes its record says")
        return record
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise Damaged(f"damaged track {where}: {e}; run `vacli extract` again to make it anew") from e


def _declared(record: dict[str, Any], name: str) -> tuple[tuple[int, ...], np.dtype]:
    shape = tuple(record["arrays"][name]["shape"])
    if not all(isinstance(n, int) and n >= 0 for n in shape):
        raise ValueError(f"{name} has shape {shape}")
    return shape, _DTYPES[record["arrays"][name]["dtype"]]


def _read_track(entry: Path, record: dict[str, Any]) -> Track:
    try:
        arrays = {name: _read_array(entry / name, record, name) for name in ("values", "times_s")}
        return Track(**arrays)
    except (OSError, ValueError) as e:
        raise Damaged(
            f"damaged track {entry.parent.name}/{entry.name}: {e}; run `vacli extract` again to make it anew"
        ) from e


def _read_array(folder: Path, record: dict[str, Any], name: str) -> np.ndarray:
    shape, dtype = _declared(record, name)
    if 0 in shape:
        return np.empty(shape, dtype)
    raw = np.fromfile(folder / _chunk_name(len(shape)), dtype=np.uint8)
    raw.flags.writeable = False
    crc = google_crc32c.value(raw[:-4])
    if crc != int.from_bytes(raw[-4:].tobytes(), "little") or crc != record["arrays"][name]["crc32c"]:
        raise ValueError(f"the checksum of {name} is wrong")
    return raw[:-4].view(dtype).reshape(shape)
