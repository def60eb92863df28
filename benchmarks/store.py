"""Every race of the store, at two sizes: reading, opening, finding what is missing, and writing durably."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import h5py
import numpy as np
import zarr
from vacli.extract.datasets import find
from vacli.extract.encoder import make_encoders
from vacli.extract.people import People
from vacli.extract.plan import Plan
from vacli.extract.run import Outcome, extract
from vacli.store import Store, Track, keeper

from .race import Contender, Result, Target, race
from .reading import MAE, Features, into_one_array, medium, one_by_one, random_windows, verifying


@dataclass(frozen=True)
class Sizes:
    """How much is read and written. named: videos of the store that is opened and planned with, of four tracks each."""

    videos: int
    rows: int
    dim: int
    batches: int
    named: int
    put_rows: tuple[int, int]
    rounds: int
    put_rounds: int


FULL = Sizes(
    videos=60, rows=3000, dim=1024, batches=10, named=600, put_rows=(3000, 50), rounds=11, put_rounds=41
)
SMALL = Sizes(videos=3, rows=400, dim=16, batches=2, named=4, put_rows=(60, 2), rounds=3, put_rounds=3)


def races(folder: Path, sizes: Sizes) -> Iterator[Result]:
    """Every race, one after the other; the files lie in `folder`."""
    with Features(folder / "features", sizes.videos, sizes.rows, sizes.dim) as features:
        yield one_by_one(features, held=True, rounds=sizes.rounds)
        yield one_by_one(features, held=False, rounds=sizes.rounds)
        yield into_one_array(features, sizes.rounds)
        yield random_windows(features, sizes.batches, sizes.rounds)
        yield verifying(features, sizes.rounds)
    named = Named(folder / "named", sizes.named)
    yield opening(named, sizes.rounds)
    yield what_is_missing(named, sizes.rounds)
    for rows in sizes.put_rows:
        yield putting(folder / f"put{rows}", rows, sizes)


# ---- opening and planning ------------------------------------------------------------------------------------


class Named:
    """A complete store of many videos of four small tracks each (people, faces, mae, labels), and a copy of it with
    zarr's consolidated metadata.

    wanted: recipe and medium of every track, as stage one plans them for videos that are files of a few bytes.
    """

    def __init__(self, folder: Path, videos: int) -> None:
        self.path, self.consolidated = folder / "features.zarr", folder / "consolidated.zarr"
        self.source, self.weights = folder / "videos", folder / "weights.pth"
        self.source.mkdir(parents=True)
        self.weights.write_bytes(b"weights")
        for i in range(videos):
            (self.source / f"{i:03}.mp4").write_bytes(b"%d" % i)
            (self.source / f"{i:03}.txt").write_text(f"valence,arousal\n{i / videos},0\n")
        self.store, self.wanted = Store(self.path, create=True), []
        track = Track(np.ones((8, 4), np.float16), np.arange(8.0))
        with (  # what is opened here need not survive a power cut, and files a moment old are not hashed again
            mock.patch.object(os, "fsync"),
            mock.patch("vacli.store.recipe._RACY_NS", 0),
        ):
            plan, known = Plan(self.encoders(self.store), People()), self.store.fingerprints
            for sample in find(self.source):
                for one in plan.tracks(sample, sample.media(known), known).values():
                    self.wanted.append((one.recipe, one.media))
                    self.store.put(one.recipe, one.media, track, {"sample": sample.id})
            self.extract()
        self.entries = [self.store.entry_of(*one) for one in self.wanted]
        shutil.copytree(self.path, self.consolidated)
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # zarr says that consolidated metadata is not in the Zarr v3 specification
            zarr.consolidate_metadata(self.consolidated)

    def encoders(self, store: Store) -> dict[str, Any]:
        options = {"mae": {"weights": str(self.weights), "dtype": "float32"}}
        return make_encoders(["mae"], options, store.fingerprints)

    def extract(self) -> list[Outcome]:
        """All that `vacli extract` does, from the folder of the videos on."""
        store = Store(self.path, create=True)
        with contextlib.redirect_stderr(io.StringIO()):  # the bar
            return extract(find(self.source), self.encoders(store), store)


def opening(named: Named, rounds: int) -> Result:
    """From nothing but the path to what `vacli store ls` shows."""
    seen: list[Any] = []

    def plain() -> None:
        for name in named.entries:
            (named.path / name / "zarr.json").read_bytes()

    def ours() -> None:
        store = Store(named.path)
        seen[:] = [store.videos(), keeper.index(store)]

    def walk(path: Path, consolidated: bool) -> None:
        root = zarr.open_group(path, mode="r", use_consolidated=consolidated)
        seen[:] = [node.shape for _, node in root.members(max_depth=None) if isinstance(node, zarr.Array)]

    def all_seen() -> bool:
        return 4 * len(seen[0]) == len(seen[1]) and seen[1].keys() == set(named.entries)

    def all_walked() -> bool:
        return len(seen) == 2 * len(named.entries)

    return race(
        f"Opening a store of {len(named.wanted) // 4} videos x 4 tracks",
        """From the path to what `vacli store ls` shows: every video, every track's shape and size. The twin only reads
        the tracks' records as bytes, knowing their names. The index was written by an earlier look.""",
        [
            Contender("reading the records' bytes", plain),
            Contender(
                "**Store**, videos() and keeper.index", ours, (Target("seconds", 0.05),), right=all_seen
            ),
            Contender("zarr.open_group and a walk", lambda: walk(named.path, False), right=all_walked),
            Contender(
                "the same, consolidated metadata", lambda: walk(named.consolidated, True), right=all_walked
            ),
        ],
        rounds,
    )


def what_is_missing(named: Named, rounds: int) -> Result:
    """A run that was done before finds that it has nothing to do."""
    records = [str(named.path / name / "zarr.json") for name in named.entries]
    outcomes: list[Outcome] = []

    def ours() -> list[str]:
        return [media for recipe, media in named.wanted if not named.store.has(recipe, media)]

    def again() -> None:
        outcomes[:] = named.extract()

    def nothing_to_do() -> bool:
        return sum(len(o.tracks) for o in outcomes if o.complete and not o.computed) == len(records)

    return race(
        f"What is missing, of {len(named.wanted) // 4} videos x 4 recipes",
        """Nothing is, which takes longest. `has` finds the key, reads and checks the record and the sizes of the files;
        the twin looks whether there is a file of that name, which it knows. The whole run again finds the videos, knows
        their digests, plans, checks each record and the notes beside it.""",
        [
            Contender("os.stat of the records", lambda: [os.stat(path) for path in records]),
            Contender("**Store.has**", ours, (Target("seconds", 0.2),), right=lambda: not ours()),
            Contender("the whole run again", again, right=nothing_to_do),
        ],
        rounds,
    )


# ---- writing -------------------------------------------------------------------------------------------------


def putting(folder: Path, rows: int, sizes: Sizes) -> Result:
    """One track, safe on the disk when it is said to be stored."""
    store = Store(folder / "features.zarr", create=True)
    values = np.random.default_rng(2).standard_normal((rows, sizes.dim), np.float32).astype(np.float16)
    track, media = Track(values, (np.arange(rows) + 0.5) / 30), medium(0)
    file = folder / "file"

    def plain() -> None:
        with open(file, "xb", buffering=0) as f:
            f.write(track.values.data)
            f.write(track.times_s.data)
            os.fsync(f.fileno())

    def by_npy() -> None:
        with open(file, "xb") as f:
            np.savez(f, values=track.values, times_s=track.times_s)
            f.flush()
            os.fsync(f.fileno())

    def by_h5py() -> None:
        with h5py.File(file, "w-") as f:
            f.create_dataset("values", data=track.values)
            f.create_dataset("times_s", data=track.times_s)
        with open(file, "rb") as written:
            os.fsync(written.fileno())

    def by_zarr() -> None:
        group = zarr.create_group(file)
        group.create_array("values", data=track.values, chunks=track.values.shape, compressors=None)
        group.create_array("times_s", data=track.times_s, chunks=track.times_s.shape, compressors=None)

    def removed() -> None:
        store.drop(store.entry_of(MAE, media))

    nbytes = track.values.nbytes + track.times_s.nbytes
    # What was written is removed each time, so nobody has to wait for memory that was never used before: on a virtual
    # machine the first use of a page costs ten times the write.
    return race(
        f"A durable write of {nbytes / 1e6:.3g} MB",
        """put: checked, checksummed, on the disk with its record and all its folders, and only then in its place. The
        twin writes the same bytes into one file and flushes that.""",
        [
            Contender("write and fsync", plain, after=file.unlink),
            Contender(
                "**Store.put**",
                lambda: store.put(MAE, media, track),
                (Target("ratio", 0.55), Target("ratio", 0.8, goal=True)) if rows == sizes.put_rows[0] else (),
                after=removed,
                right=lambda: store.has(MAE, media),
            ),
            Contender("np.savez and fsync", by_npy, after=file.unlink),
            Contender("h5py, one file, and fsync", by_h5py, after=file.unlink),
            Contender("zarr-python, nothing is flushed", by_zarr, after=lambda: shutil.rmtree(file)),
        ],
        sizes.put_rounds,
        nbytes,
    )
