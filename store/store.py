"""The store: a content-addressed cache, (recipe, media) -> Track, in plain Zarr v3, each track whole or absent.

Layout (every folder is a Zarr group or array, so any Zarr v3 reader opens it; more in docs/store-format.md):

    <store>/zarr.json                        group; its attributes hold the format number
    <store>/<track>@<recipe16>/zarr.json     group; attributes: the whole recipe, readable
    <store>/<track>@<recipe16>/<media24>/    one entry: arrays `values` and `times_s`, one raw chunk each
                                             (bytes + crc32c); its zarr.json is the commit record, written last
    <store>/videos/<digest of an id>/        group; attributes: what people call things (id, track names, split)
    <store>/fingerprints/                    group; attributes: remembered digests of media
    <store>/.staging/  .quarantine/  .trash/ what is being written; was found broken; is being removed

An entry is made in .staging, flushed to the disk, its record written last, and then renamed to its place: at any
moment it is whole or not there. Nothing is changed in place.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from .. import __version__
from . import disk, entry, names
from .entry import Damaged, Unreadable, Writer
from .place import StoreError
from .recipe import SHA256, Fingerprints, canonical, digest, folder_name, track_name
from .remote import place_of
from .track import Track

FORMAT = 2  # 1: the names of all videos in one file, videos/zarr.json
_NAMES_LIMIT, _MEMO_LIMIT = 2**20, 2**23  # bytes of JSON: of one video's names, of the remembered digests
_MEMO_LINES = 50_000  # remembered digests, the newest: what fits


class Store:
    """A feature store in a folder; opening one is a few milliseconds and imports no zarr.

    place: the folder. create: make it if absent, and be ready to write (otherwise a missing store is a StoreError).
    """

    def __init__(self, place: str | Path, create: bool = False) -> None:
        self.at = place_of(place)
        if self.at.absent():
            if not create:
                raise StoreError(
                    f"no feature store at {place}: make one with `vacli extract VIDEOS --store {place}`"
                )
            with self.at.told("create the store"):
                self.at.create({"store_format": FORMAT})
        with self.at.told("open the store"):
            self._format = self._check_format()
            self.at.open()
        if create:
            with self.at.told("write"), self.at.staging():  # what cannot be written refuses before any work
                for path in self.at.leftovers():
                    disk.remove(path)
                self._upgrade()
        self.fingerprints = Fingerprints(self._memo())
        self._recipes_right: set[str] = set()  # whose readable recipe this process has seen to be right

    @property
    def path(self) -> Path:
        """The folder on this machine: the store's own, or the cache of one elsewhere."""
        return self.at.path

    def __str__(self) -> str:
        return self.at.name

    # ---- tracks --------------------------------------------------------------------------------------------

    def has(self, recipe: dict[str, Any], media: str) -> bool:
        """Is it there and whole? Checks the record's own digest, its key and the sizes of the files; not the CRC."""
        record = self._find(recipe, media)
        return record is not None and "failed" not in record

    def get(self, recipe: dict[str, Any], media: str) -> Track:
        """The track, read whole, its checksums verified. Its arrays are read-only.

        Raises KeyError if it is absent, Damaged (and sets it aside) if it is broken.
        """
        return self._get(recipe, media, mapped=False)

    def map(self, recipe: dict[str, Any], media: str) -> Track:
        """As `get`, but the values stay on the disk, mapped; their checksum is verified when they are first mapped."""
        return self._get(recipe, media, mapped=True)

    def _get(self, recipe: dict[str, Any], media: str, mapped: bool) -> Track:
        key = digest(recipe)
        name = _entry_name(recipe, key, media)
        try:
            record = self._record_of(name, key, media)
            if "failed" in record:
                raise KeyError(f"{name}: {record['failed']}")
            return self.at.read(name, record, mapped)
        except FileNotFoundError as e:
            raise KeyError(name) from e
        except Damaged:
            self._set_aside_if_broken(name, recipe, media)
            raise

    def put(
        self, recipe: dict[str, Any], media: str, track: Track, provenance: dict[str, Any] | None = None
    ) -> None:
        """Store a track durably: when this returns it survives kill -9 and power cut. First complete one stays.

        Raises StoreError (disk full, no permission); then nothing is left behind.
        """
        values = track.values
        with self.writing(recipe, media, len(track), values.shape[1:], values.dtype, provenance) as writer:
            writer.add(track)

    @contextlib.contextmanager
    def writing(
        self,
        recipe: dict[str, Any],
        media: str,
        rows: int,
        row_shape: tuple[int, ...],
        dtype: Any,
        provenance: dict[str, Any] | None = None,
    ) -> Iterator[Writer]:
        """A track written batch by batch: `writer.append(values, times_s)`; stored durably when the block is left.

        rows: as many as are expected; their space is set aside at once, so a full disk refuses here. An exception
        leaves nothing behind. Raises StoreError.
        """
        with self._committing(recipe, media, provenance) as (staged, facts):
            told = partial(self.at.told, f"store {track_name(recipe)}")
            with told():
                writer = Writer(staged, rows, tuple(row_shape), dtype, self.at.attempt, told)
            with contextlib.closing(writer):
                yield writer
                with told():
                    writer.commit(facts)

    def fail(
        self, recipe: dict[str, Any], media: str, reason: str, provenance: dict[str, Any] | None = None
    ) -> None:
        """A tombstone: of this medium the recipe can never make a track. A track put later takes its place."""
        committing = self._committing(recipe, media, provenance, tombstone=True)
        with committing as (staged, facts), self.at.told("store a tombstone"):
            entry.write_record(staged, {**facts, "failed": reason[:2000]})

    def failure(self, recipe: dict[str, Any], media: str) -> str | None:
        """The reason on the tombstone, if there is one."""
        return (self._find(recipe, media) or {}).get("failed")

    def provenance(self, recipe: dict[str, Any], media: str) -> dict[str, Any]:
        """What was noted when the track was made. Raises KeyError if it is absent or broken."""
        record = self._find(recipe, media)
        if record is None:
            raise KeyError(_entry_name(recipe, digest(recipe), media))
        return dict(record["provenance"])

    def claim(self, media: str) -> Callable[[], None] | None:
        """The work on a medium, for us alone: call what is returned when it is done (the end of the process will do).

        None if another process, or thread, is at it. Over a disk without locks, and between machines that fill a store
        on a bucket, everybody gets it: a track made twice is still stored once. Raises StoreError.
        """
        with self.at.told("claim a video"):
            return self.at.claim(media[:24])

    # ---- entries, by name ----------------------------------------------------------------------------------

    def entry_of(self, recipe: dict[str, Any], media: str) -> str:
        """`<track>@<recipe16>/<media24>`: the name under which the track is, or would be, kept."""
        return _entry_name(recipe, digest(recipe), media)

    def folders(self) -> list[str]:
        """`<track>@<recipe16>` of every recipe that has been written, sorted."""
        return sorted(n for n in self.at.folders("") if names.FOLDER.fullmatch(n))

    def entries(self) -> list[str]:
        """The names of all entries, tombstones included, sorted."""
        return [
            f"{f}/{m}" for f in self.folders() for m in sorted(self.at.folders(f)) if entry.NAME.fullmatch(m)
        ]

    def record(self, name: str) -> dict[str, Any]:
        """The checked commit record of an entry. Raises KeyError if there is none, Damaged if it is broken."""
        try:
            return self.at.record(name)
        except FileNotFoundError as e:
            raise KeyError(name) from e

    def read(self, name: str) -> Track:
        """The track of an entry, as `get`. Raises KeyError (also for a tombstone), Damaged."""
        record = self.record(name)
        if "failed" in record:
            raise KeyError(f"{name}: {record['failed']}")
        try:
            return self.at.read(name, record)
        except FileNotFoundError as e:  # removed since
            raise KeyError(name) from e

    def recipe_of(self, folder: str) -> dict[str, Any]:
        """The whole recipe behind `<track>@<recipe16>`. Raises Damaged."""
        try:
            recipe = entry.parse_group(self.at.load(f"{folder}/zarr.json", entry.JSON_LIMIT))["recipe"]
            if folder_name(recipe) != folder:
                raise ValueError("it is another one")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
            raise Damaged(
                f"{self}/{folder}: its recipe cannot be read ({e}); run `vacli extract` again"
            ) from e
        return recipe

    def verify(self, wanted: list[str] | None = None) -> Iterator[tuple[str, int, str | None]]:
        """Read entries with all checksums: (entry, bytes read, None or what is wrong). Changes nothing.

        wanted: their names; by default all, and what is wrong with recipes and names as well.
        """
        if wanted is None:
            yield from self._what_is_wrong_beside()
        for name in self.entries() if wanted is None else wanted:
            try:
                record = self.at.record(name)
                if "failed" not in record:
                    self.at.read(name, record, everything=True)
                yield name, entry.nbytes_of(record), None
            except (Damaged, Unreadable) as e:
                yield name, 0, str(e)
            except FileNotFoundError:  # removed since it was listed
                continue

    def _what_is_wrong_beside(self) -> Iterator[tuple[str, int, str]]:
        """Recipes and names that cannot be read; the tracks are whole without them."""
        for folder in filter(self.at.folders, self.folders()):  # without tracks: a writer was killed there
            try:
                self.recipe_of(folder)
            except Damaged as e:
                yield f"{folder}/zarr.json", 0, str(e)
        for folder in self.at.folders("videos"):
            try:
                self.named(folder)
            except (StoreError, Unreadable) as e:
                yield f"videos/{folder}", 0, str(e)

    def set_aside(self, name: str) -> None:
        """Move a broken entry to .quarantine: absent from now on, not lost. What cannot be moved stays broken."""
        with contextlib.suppress(OSError):
            self.at.move(name, ".quarantine")

    def drop(self, name: str) -> None:
        """Remove a whole entry, or everything of one recipe; a reader that has it mapped keeps what it sees."""
        with self.at.told(f"remove {name}"):
            gone = self.at.move(name, ".trash")
            if gone:
                disk.remove(gone)

    # ---- names ---------------------------------------------------------------------------------------------

    def link(self, video_id: str, facts: dict[str, Any], tracks: dict[str, dict[str, Any]]) -> None:
        """Say what people call things: video `video_id` has these tracks.

        facts: "root", "media", "split". tracks: name -> {"folder": `<track>@<recipe16>`, "media": digest}.
        A name that was there points to the new track from now on; the old track stays in the store. An id
        stands for one medium only: another file of the same id from another root is refused (StoreError). A
        medium of None is an id known by imported tracks only; an extraction of the video adopts it.
        Raises ValueError for an id that is not plain (names.plain_id).
        """
        if names.plain_id(video_id) != video_id:
            raise ValueError(
                f"the id {video_id!r} is not plain; wanted one such as {names.plain_id(video_id)!r}"
            )
        names.check_facts({**facts, "tracks": tracks})
        folder = names.folder_of(video_id)
        with self._naming():
            for _ in range(5):  # without locks somebody may write between our look and our writing
                _, old = self.named(folder) or (None, None)
                try:
                    new = names.merge(old, facts, tracks)
                except names.Taken as e:
                    raise StoreError(
                        f"{facts['root']} has a video {video_id!r}, and {self} knows another one of that name "
                        f"from {e}: use another --store"
                    ) from e
                if new == old:
                    return
                self.at.save(f"videos/{folder}/zarr.json", entry.group_json(names.record(video_id, new)))
                if self.at.locks:
                    return

    def unlink(self, video_id: str, tracks: list[str] | None = None) -> None:
        """Forget the names of a video, or some of its tracks; the tracks themselves stay."""
        folder = names.folder_of(video_id)
        with self._naming():
            known = self.named(folder)
            if known is None:
                return
            left = {n: t for n, t in known[1]["tracks"].items() if tracks and n not in tracks}
            if left:
                whole = names.record(video_id, {**known[1], "tracks": left})
                self.at.save(f"videos/{folder}/zarr.json", entry.group_json(whole))
            else:
                self.drop(f"videos/{folder}")

    @contextlib.contextmanager
    def _naming(self) -> Iterator[None]:
        """One writer of names at a time, in a store that is up to date."""
        with self.at.told("write the names of the video"):
            self._upgrade()
            with self.at.locked("videos"):
                yield

    def videos(self) -> dict[str, dict[str, Any]]:
        """id -> {"root", "split", "media", "tracks": {name: {"folder", "media"}}}, as last linked, sorted by id."""
        found = dict(self._old_names())
        found.update(known for folder in self.at.folders("videos") if (known := self.named(folder)))
        return dict(sorted(found.items()))

    def named(self, folder: str) -> tuple[str, dict[str, Any]] | None:
        """(id, facts) that lie in `videos/<folder>`. Raises StoreError if they are damaged, Unreadable."""
        path = f"videos/{folder}/zarr.json"
        try:
            return names.checked(folder, entry.parse_group(self.at.load(path, _NAMES_LIMIT)))
        except FileNotFoundError:
            return None
        except OSError as e:
            raise Unreadable(
                f"cannot read {self}/{path}: {e.strerror}; mend it and run again: what is stored is kept"
            ) from e
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise StoreError(
                f"{self}/{path} cannot be read ({e}): `vacli store verify --repair`, then extract again; "
                "features are kept"
            ) from e

    def _old_names(self) -> dict[str, dict[str, Any]]:
        """The names as a store of format 1 has them: all in one file."""
        if self._format > 1:
            return {}
        try:
            known = entry.parse_group(self.at.load("videos/zarr.json", _MEMO_LIMIT))
            return {names.plain_id(v): names.check_facts(facts) for v, facts in known.items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
            raise StoreError(
                f"{self}/videos/zarr.json cannot be read ({e}): remove it and run `vacli extract` again, "
                "features are kept"
            ) from e

    def _upgrade(self) -> None:
        """From format 1, when something is next written. Stopped half-way it is still of format 1."""
        if self._format == 1:
            with self.at.locked("videos"):
                self._format = self._check_format()  # somebody may have been quicker
                for video_id, facts in self._old_names().items():
                    folder = names.folder_of(video_id)
                    if self.named(folder) is None:
                        whole = names.record(video_id, facts)
                        self.at.save(f"videos/{folder}/zarr.json", entry.group_json(whole))
                self.at.save("zarr.json", entry.group_json({"store_format": FORMAT}))
                self._format = FORMAT
                self.at.save("videos/zarr.json", entry.group_json({}))

    def remember_fingerprints(self) -> None:
        """Keep the media digests worked out so far, so that the next run hashes nothing twice."""
        if self.fingerprints.changed:
            with self.at.told("remember media digests"):
                memo = dict([*{**self._memo(), **self.fingerprints.memo}.items()][-_MEMO_LINES:])
                self.at.save_here("fingerprints/zarr.json", entry.group_json(memo))
            self.fingerprints.changed = False

    def _memo(self) -> dict[str, str]:
        with contextlib.suppress(OSError, ValueError):  # it can be worked out again
            text = self.at.load_here("fingerprints/zarr.json", _MEMO_LIMIT)
            return {k: v for k, v in entry.parse_group(text).items() if isinstance(v, str)}
        return {}

    # ---- below the surface ---------------------------------------------------------------------------------

    def _check_format(self) -> int:
        try:
            found = entry.parse_group(self.at.load("zarr.json", entry.JSON_LIMIT))["store_format"]
            if type(found) is not int or found < 1:
                raise ValueError(f"store_format is {found!r:.40}")
        except (FileNotFoundError, NotADirectoryError, ValueError, KeyError) as e:
            raise StoreError(
                f"{self} is not a vacli store (no zarr.json with a vacli store_format); "
                "give another place with --store"
            ) from e
        if found > FORMAT:
            raise StoreError(
                f"{self} has store format {found}, this vacli {__version__} reads up to {FORMAT}: update vacli"
            )
        return found

    def _find(self, recipe: dict[str, Any], media: str) -> dict[str, Any] | None:
        """The record under a key, None if there is none; a broken one is set aside and there is none."""
        key = digest(recipe)
        name = _entry_name(recipe, key, media)
        try:
            record = self._record_of(name, key, media)
            self._heal(name.partition("/")[0], recipe)
            return record
        except FileNotFoundError:
            return None
        except Damaged:
            self._set_aside_if_broken(name, recipe, media)
            return None

    def _set_aside_if_broken(self, name: str, recipe: dict[str, Any], media: str) -> None:
        """As `set_aside`, but what a writer has put in its place since it was looked at stays."""
        with contextlib.suppress(OSError), self.at.replacing():
            try:
                record = self._record_of(name, digest(recipe), media)
                if "failed" not in record:
                    self.at.read(name, record, everything=True)
            except FileNotFoundError:
                pass
            except Damaged:
                self.at.move(name, ".quarantine")

    def _record_of(self, name: str, key: str, media: str) -> dict[str, Any]:
        record = self.at.record(name)
        if (record["recipe"], record["media"]) != (key, media):  # the same first digits
            raise entry.damaged(self.path / name, "its record belongs to another key")
        return record

    @contextlib.contextmanager
    def _committing(
        self, recipe: dict[str, Any], media: str, provenance: dict[str, Any] | None, tombstone: bool = False
    ) -> Iterator[tuple[Path, dict[str, Any]]]:
        """A folder aside to make an entry in, and the facts for its record; committed when the block is left."""
        key = digest(recipe)
        name = _entry_name(recipe, key, media)
        folder = name.partition("/")[0]
        notes = dict(provenance or {})
        if "vacli" not in notes:  # an imported one keeps its own
            notes = {"vacli": __version__, **notes}
        with contextlib.ExitStack() as stack:
            with self.at.told(f"store {folder}"):
                self._write_recipe(folder, recipe)
                staged = stack.enter_context(self.at.staging())
            yield staged, {"recipe": key, "media": media, "provenance": notes}
            with self.at.told(f"store {folder}"):
                self.at.commit(staged, name, tombstone)

    def _heal(self, folder: str, recipe: dict[str, Any]) -> None:
        """Its readable recipe may have been damaged since; whoever asks for a track by its recipe has it in hand."""
        if folder not in self._recipes_right:
            with contextlib.suppress(OSError, StoreError):  # a store that cannot be written
                self._write_recipe(folder, recipe)

    def _write_recipe(self, folder: str, recipe: dict[str, Any]) -> None:
        try:
            self.recipe_of(folder)
        except Damaged:  # not there yet, or broken
            readable = json.loads(canonical(recipe))
            text = entry.group_json({"recipe": readable})
            if len(text) > entry.JSON_LIMIT:
                raise ValueError(f"{folder}: a recipe of {len(text)} bytes cannot be read back") from None
            self.at.save(f"{folder}/zarr.json", text)
        self._recipes_right.add(folder)


def _entry_name(recipe: dict[str, Any], key: str, media: str) -> str:
    """The name of an entry, of a recipe's digest known already (working it out is half the cost of `has`).

    Raises ValueError for a medium that is no digest: it would lead elsewhere.
    """
    if not SHA256.fullmatch(media):
        raise ValueError(f"a medium is known by its SHA-256, got {media!r:.80}")
    return f"{track_name(recipe)}@{key[:16]}/{media[:24]}"
