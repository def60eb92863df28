"""What is done to a store while it is disturbed, and what the store says afterwards."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from vacli import VacliError
from vacli.store import Store, StoreError, Track, folder_name

from .fault_layer import through

OLD_STORE = Path(__file__).parent / "data" / "store_format_1.zarr"
RECIPE = {"track": "mae", "version": 1}
Step = Callable[[Path], Any]


def media_of(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()


def track_of(number: int, by: int = 0) -> Track:
    """Every valid row says whose it is, so that a mixture shows."""
    values = np.full((12, 4), number % 2048, np.float16)
    values[:, 1] = by
    values[3] = np.nan
    return Track(values, np.arange(12) / 25 + number)


def place_of(number: int) -> dict[str, str]:
    return {"folder": folder_name(RECIPE), "media": media_of(number)}


def facts_of(number: int) -> dict[str, Any]:
    return {"root": "/data", "media": media_of(number), "split": None}


def notes_of(number: int, by: int = 0) -> dict[str, Any]:
    return {"number": number, "by": by}


def is_as_noted(track: Track, notes: dict[str, Any]) -> bool:
    return digest_of(track) == digest_of(track_of(notes["number"], notes["by"]))


create = partial(Store, create=True)


def put(number: int, by: int = 0) -> Step:
    return lambda path: Store(path).put(RECIPE, media_of(number), track_of(number, by), notes_of(number, by))


def fail(number: int) -> Step:
    return lambda path: Store(path).fail(RECIPE, media_of(number), "nobody in it")


def link(number: int, *tracks: str) -> Step:
    return lambda path: Store(path).link(
        f"v{number}", facts_of(number), dict.fromkeys(tracks, place_of(number))
    )


def drop(number: int) -> Step:
    return lambda path: Store(path).drop(Store(path).entry_of(RECIPE, media_of(number)))


def spoil(number: int, part: str) -> Step:
    """One byte of a track's values is lost ("size") or another one ("checksum")."""

    def step(path: Path) -> None:
        [chunk] = (path / Store(path).entry_of(RECIPE, media_of(number)) / "values").glob("c.*")
        data = bytearray(chunk.read_bytes())
        data[9] ^= 1
        chunk.write_bytes(data if part == "checksum" else data[:-1])

    return step


def remember(path: Path) -> None:
    store = Store(path)
    store.fingerprints.memo["a file"] = "its digest"
    store.fingerprints.changed = True
    store.remember_fingerprints()


def leave(path: Path) -> None:
    """What a writer killed long ago leaves."""
    left = path / ".staging" / "left"
    (left / "values").mkdir(parents=True)
    (left / "values" / "c.0.0").write_bytes(b"half")
    age(path)


def age(path: Path) -> None:
    """The leftovers of a store are old from now on."""
    for left in (path / ".staging").iterdir():
        os.utime(left, (1, 1))


def _link_in_old(path: Path) -> None:
    Store(path).link("v00", {"root": "toy", "media": "00" * 32, "split": None}, {"tuned": place_of(0)})


DEEDS: dict[str, tuple[list[Step], Step]] = {  # what was done before, and the deed
    "creating a store": ([], create),
    "the first put": ([create], put(0)),
    "another put": ([create, put(0)], put(1)),
    "a put of what is there": ([create, put(0)], put(0, by=1)),
    "a put over a tombstone": ([create, put(0), fail(1)], put(1)),
    "a put over a track cut short": ([create, put(0), put(1), spoil(1, "size")], put(1)),
    "a put over a track with a flipped bit": ([create, put(0), put(1), spoil(1, "checksum")], put(1)),
    "a tombstone": ([create, put(0)], fail(1)),
    "the first link": ([create, put(0)], link(0, "mae")),
    "another link of the video": ([create, put(0), link(0, "mae")], link(0, "tuned", "other")),
    "forgetting a video": ([create, put(0), link(0, "mae")], lambda path: Store(path).unlink("v0")),
    "remembering digests": ([create, put(0)], remember),
    "removing a track": ([create, put(0), put(1)], drop(1)),
    "removing a recipe": ([create, put(0), put(1)], lambda path: Store(path).drop(folder_name(RECIPE))),
    "bringing an old store up to date": ([partial(shutil.copytree, OLD_STORE)], create),
    "a link in an old store": ([partial(shutil.copytree, OLD_STORE)], _link_in_old),
    "sweeping what was left": ([create, put(0), leave], create),
}


def contents(path: Path) -> dict[str, str]:
    """All that a store says, with every checksum verified; {} if there is no store."""
    try:
        store = Store(path)
    except StoreError as e:
        if "no feature store" not in str(e):
            raise
        return {}
    found = {"store": "is there", **{f"digest of {k}": v for k, v in store.fingerprints.memo.items()}}
    found |= {f"video {v}": json.dumps(facts, sort_keys=True) for v, facts in store.videos().items()}
    for name, _, what in store.verify():
        found[name] = "broken" if what else _said(store, name)
    return found


def _said(store: Store, name: str) -> str:
    record = store.record(name)
    if "failed" in record:
        return f"a tombstone: {record['failed']}"
    track = store.read(name)
    return f"by {record['provenance'].get('by')}: {track} {digest_of(track)}"


def digest_of(track: Track) -> str:
    return hashlib.sha256(track.values.tobytes() + track.times_s.tobytes()).hexdigest()


def odd(now: dict[str, str], before: dict[str, str], after: dict[str, str]) -> dict[str, str | None]:
    """What is neither as before a deed nor as after it; a track that takes another's place may be absent in between."""
    found: dict[str, str | None] = {}
    for key in {**now, **before, **after}:
        old, new, is_now = before.get(key), after.get(key), now.get(key)
        replaced = "@" in key and old != new
        if is_now not in (old, new) and not (replaced and is_now is None):
            found[key] = is_now
    return found


def left_in(path: Path) -> set[str]:
    """What lies in .staging."""
    staging = path / ".staging"
    return {p.name for p in staging.iterdir()} - {"zarr.json"} if staging.is_dir() else set()


class Scene:
    """A deed, the store it is done to, and what the store says before and after."""

    def __init__(self, deed: str, folder: Path) -> None:
        self.folder, (past, self.deed) = folder, DEEDS[deed]
        for step in past:
            step(folder / "before")
        self.before = contents(folder / "before")
        with self.store() as path:
            self.deed(path)
            self.after = contents(path)
            assert "broken" not in self.after.values()

    @contextmanager
    def store(self) -> Iterator[Path]:
        """A copy of the store as it is before the deed."""
        path = self.folder / "s.zarr"
        if self.before:
            shutil.copytree(self.folder / "before", path)
        yield path
        if path.exists():
            shutil.rmtree(path)

    def done_through(self, layer: Any, path: Path) -> str | None:
        """Do it; what it says if it fails: one line, meant for the user, and no descriptor is left open."""
        opened = len(os.listdir("/proc/self/fd"))
        try:
            with through(layer):
                self.deed(path)
            said = None
        except VacliError as e:
            said = str(e)
            assert "\n" not in said
        assert (
            len(os.listdir("/proc/self/fd")) <= opened
        )  # fewer: the stores of tests before are let go any time
        return said

    def check_after_failure(self, path: Path) -> None:
        """All is as before or as after, and the same deed succeeds now."""
        assert odd(contents(path), self.before, self.after) == {}
        self.deed(path)
        assert contents(path) == self.after
