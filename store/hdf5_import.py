"""A file made by `hdf5.export` comes into a store, and nothing of it is believed."""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import crc32c
import numpy as np

from .. import VacliError, __version__
from . import strangers
from .entry import ARRAYS, JSON_LIMIT, group_json, parse_record
from .names import FOLDER, check_facts, plain_id
from .recipe import digest, folder_name
from .store import Store
from .strangers import STRANGE, one_line
from .track import Track

FORMAT = 1  # of the file; hdf5.py describes it
_ENCODER = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")  # a name of our table; package.module:Class would run code


@dataclass
class Figures:
    """What an export or import did. problems and notes are lines for people; any problem means exit code 1."""

    tracks: int = 0  # copied by this call
    tombstones: int = 0  # likewise
    there: int = 0  # entries that were there before
    videos: int = 0
    size_bytes: int = 0  # of the HDF5 file
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def import_export(source: Path, store: Store) -> Figures:
    """Put every track and tombstone of a file made by `export` into the store, and link its videos.

    Nothing of the file is believed: links, filters, external and virtual storage, odd types and sizes are refused, and
    a track must have the digest of its record, which must have its own. What is wrong is listed and left out; what is
    there already is skipped, so an interrupted import goes on. A track comes out bit for bit as it went in.
    Raises VacliError if the file is no finished vacli export of a format known here, StoreError if the store is full.
    """
    from tqdm import tqdm

    figures, seen = Figures(), 0
    with opened(source) as (f, facts):
        if facts["progress"] != facts["entries"]:
            raise VacliError(
                f"{source} is an export cut short ({facts['progress']} of {facts['entries']} entries): finish it with "
                "the same `vacli store export`, then import"
            )
        figures.size_bytes = f.id.get_filesize()
        with tqdm(total=facts["entries"], desc="import", unit="track", mininterval=1) as bar:
            folders: list[str] = []
            with _listed("its list of tracks", figures.problems):
                folders += [name for name in strangers.names(f) if name not in ("progress", "videos")]
            for folder in folders:
                with _listed(folder, figures.problems):
                    group, recipe = _folder(f, folder)
                    for name in strangers.names(group):
                        seen += 1
                        with _listed(f"{folder}/{name}", figures.problems):
                            _entry(group, folder, name, recipe, store, figures)
                        bar.update()
        if seen != facts["entries"]:
            figures.problems.append(f"{source} says it has {facts['entries']} entries; {seen} were found")
        with _listed("videos", figures.problems):
            _videos(f, facts["videos_sha256"], store, figures)
    return figures


@contextlib.contextmanager
def opened(path: Path) -> Iterator[tuple[Any, dict[str, Any]]]:
    """The file and what its root says if it is a vacli export, finished or not; else VacliError."""
    import h5py

    if not path.is_file():
        raise VacliError(f"there is no file {path}; wanted one made by `vacli store export`")
    with contextlib.ExitStack() as stack:
        try:
            f = stack.enter_context(h5py.File(path, "r", locking=False))
            ours = h5py.h5a.exists(f.id, b"vacli_export")
            found = strangers.number(f, "vacli_export") if ours else 0
            facts: dict[str, Any] = {}
            if 0 < found <= FORMAT:
                facts |= {name: strangers.text(f, name) for name in ("content", "videos_sha256")}
                facts["entries"] = strangers.number(f, "entries")
                facts["progress"] = int(strangers.array(f, "progress", (1,), np.dtype("<u8"))[0])
        except STRANGE as e:
            raise VacliError(
                f"{path} cannot be read as HDF5 ({one_line(e)}); wanted a file made by `vacli store export`"
            ) from e
        if not ours:
            raise VacliError(
                f"{path} is no vacli export; features made elsewhere come in with `vacli store import FOLDER --track "
                "NAME`, from a folder with one file for each video"
            )
        if not facts:
            raise VacliError(
                f"{path} has export format {found}, this vacli {__version__} reads 1 to {FORMAT}: update it"
            )
        yield f, facts


def _folder(f: Any, folder: str) -> tuple[Any, dict[str, Any]]:
    """The group of a recipe, and the recipe, which must have the digest in the group's name."""
    if not FOLDER.fullmatch(folder):
        raise ValueError("is no part of a vacli export")
    group = strangers.group(f, folder)
    recipe = strangers.table(strangers.text(group, "recipe"))
    if folder_name(recipe) != folder or len(group_json({"recipe": recipe})) > JSON_LIMIT:
        raise ValueError("its recipe is not the one its name was made from")
    return group, recipe


def _entry(
    parent: Any, folder: str, name: str, recipe: dict[str, Any], store: Store, figures: Figures
) -> None:
    """Check one entry and put it into the store, unless it is there."""
    group = strangers.group(parent, name)
    text = group_json(strangers.table(strangers.text(group, "record")))
    if len(text) > JSON_LIMIT:
        raise ValueError(f"its record takes {len(text)} bytes; wanted at most {JSON_LIMIT}")
    record = parse_record(text, folder, name)
    media, failed = record["media"], record.get("failed")
    if record["recipe"] != digest(recipe):
        raise ValueError("its record belongs to another key")
    if sorted(strangers.names(group)) != ([] if "failed" in record else sorted(ARRAYS)):
        raise ValueError(f"it holds something else than {' and '.join(ARRAYS)}")
    if store.has(recipe, media) or ("failed" in record and store.failure(recipe, media) is not None):
        figures.there += 1
    elif "failed" in record:
        if not isinstance(failed, str):
            raise ValueError("the reason of its failure is no text")
        store.fail(recipe, media, failed, record["provenance"])
        figures.tombstones += 1
    else:
        arrays = {name: _array(group, name, record["arrays"][name]) for name in ARRAYS}
        store.put(recipe, media, Track(**arrays), record["provenance"])
        figures.tracks += 1


def _array(group: Any, name: str, array: dict[str, Any]) -> np.ndarray:
    """The array of a record, with the checksums the record says."""
    values = strangers.array(group, name, tuple(array["shape"]), dtype_of(array))
    raw = strangers.raw(values)
    if crc32c.crc32c(raw.data) != array["crc32c"]:
        raise ValueError(f"the checksum of {name} is wrong")
    return values


def _videos(f: Any, sha256: str, store: Store, figures: Figures) -> None:
    """Link the videos; an id that stands for another medium in the store stays as it is there."""
    lines = strangers.array(f, "videos", None, np.dtype("u1")).tobytes()
    if hashlib.sha256(lines).hexdigest() != sha256:
        raise ValueError("the checksum of the list is wrong; no name is taken from it")
    known, entries = store.videos(), set(store.entries())
    for number, line in enumerate(lines.splitlines(), start=1):
        with _listed(f"video {number}", figures.problems):
            facts = strangers.table(line)
            video_id, tracks = facts.pop("id"), facts.pop("tracks")
            _check_video(video_id, facts, tracks)
            old = known.get(video_id, {}).get("media")
            if None not in (old, facts["media"]) and old != facts["media"]:
                raise ValueError(
                    f"{video_id} is another medium in the store, and stays that; its tracks are stored"
                )
            for name, track in list(tracks.items()):
                if f"{track['folder']}/{track['media'][:24]}" not in entries:
                    figures.notes.append(
                        f"{video_id}: its track {name} did not come along, so it is not linked"
                    )
                    del tracks[name]
                elif "encoder" in track and not _is_plain(track["encoder"]):
                    figures.notes.append(
                        f"{video_id}: what made {name} ({track['encoder']!r:.80}) is not taken from a file: it may be "
                        "any code; to predict from video with it, extract again"
                    )
                    tracks[name] = {k: v for k, v in track.items() if k != "encoder"}
            store.link(video_id, facts, tracks)
            figures.videos += 1


def _check_video(video_id: Any, facts: dict[str, Any], tracks: dict[str, Any]) -> None:
    """Raises ValueError (or another of STRANGE) for what the store would not have written itself."""
    if plain_id(video_id) != video_id:
        raise ValueError(
            f"the id {video_id!r:.80} is not safe as a path; wanted one like {plain_id(video_id)!r}"
        )
    check_facts({**facts, "tracks": tracks})
    if facts.keys() != {"root", "media", "split"} or not f"{facts['root']}{facts['split']}".isprintable():
        raise ValueError(f"{video_id} has {', '.join(facts)!r:.80}; wanted root, media and split")
    for name, track in tracks.items():
        if not track.keys() <= {"folder", "media", "encoder"}:
            raise ValueError(f"{video_id} has a track {name} with {', '.join(track)!r:.80}")


def _is_plain(encoder: Any) -> bool:
    """An encoder by its name in our table, with simple options?"""
    try:
        kind, options = encoder["kind"], encoder["options"].values()
        return bool(_ENCODER.fullmatch(kind)) and all(
            isinstance(v, str | int | float | None) for v in options
        )
    except STRANGE:
        return False


@contextlib.contextmanager
def _listed(where: str, problems: list[str]) -> Iterator[None]:
    """What is wrong in the block becomes a line of `problems`; only what would befall everything goes on."""
    try:
        yield
    except VacliError as e:
        if e.fatal:
            raise
        problems.append(f"{where[:120]}: {one_line(e)}")
    except STRANGE as e:
        problems.append(f"{where[:120]}: {one_line(e)}")


def dtype_of(array: dict[str, Any]) -> np.dtype[Any]:
    return np.dtype(array["dtype"]).newbyteorder("<")
