"""How fast tracks are read: all of them, windows of them, every byte of them verified; each beside its plain twin."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import zarr
from vacli.store import Store, Track, entry

from .race import Contender, Result, Target, race

PAGE_BYTES = 4096
WINDOW_ROWS, BATCH = 300, 32

MAE = {  # as large as an encoder's own: its digest is part of what is timed
    "track": "mae",
    "version": 1,
    "model": "vit_large_patch16_224.mae",
    "weights_sha256": "5a" * 32,
    "output": "cls after final norm",
    "size": 224,
    "resize": "torch bicubic antialiased uint8",
    "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225],
    "compute_dtype": "bfloat16",
    "dtype": "float16",
    "made_from": "c3" * 32,
}


def medium(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()


class Features:
    """The same tracks as a store, as .npy files, as one HDF5 file, and in memory.

    whole: (N, D) float16, all rows of all videos. spans: which of them are a video's.
    """

    def __init__(self, folder: Path, videos: int, rows: int, dim: int) -> None:
        rng = np.random.default_rng(0)
        self.rows = rows
        self.store = Store(folder / "features.zarr", create=True)
        self.media = [medium(i) for i in range(videos)]
        self.spans = [slice(i * rows, (i + 1) * rows) for i in range(videos)]
        self.whole = rng.standard_normal((videos * rows, dim), np.float32).astype(np.float16)
        self.times_s = (np.arange(rows) + 0.5) / 30
        for media, span in zip(self.media, self.spans, strict=True):
            self.store.put(MAE, media, Track(self.whole[span], self.times_s))
        self.entries = [self.store.entry_of(MAE, media) for media in self.media]
        self.chunks = [
            (self.store.path / name / "values" / "c.0.0", self.store.path / name / "times_s" / "c.0")
            for name in self.entries
        ]
        self.nbytes = sum(path.stat().st_size for pair in self.chunks for path in pair)
        self.npy = [folder / f"{media}.npy" for media in self.media]
        for path, span in zip(self.npy, self.spans, strict=True):
            np.save(path, self.whole[span])
        with h5py.File(folder / "features.h5", "w") as f:
            f.create_dataset("values", data=self.whole)
        for path in folder.rglob("*"):
            if path.is_file():
                _read_again(path)
        self.h5 = h5py.File(folder / "features.h5", "r")

    def __enter__(self) -> Features:
        return self

    def __exit__(self, *_: object) -> None:
        self.h5.close()

    def plain(self, video: int) -> tuple[np.ndarray, np.ndarray]:
        """The bytes of its two chunk files."""
        values, times_s = self.chunks[video]
        return np.fromfile(values, np.uint8), np.fromfile(times_s, np.uint8)

    def get(self, video: int) -> Track:
        return self.store.get(MAE, self.media[video])

    def map(self, video: int) -> Track:
        return self.store.map(MAE, self.media[video])

    def zarr_array(self, video: int, name: str = "values") -> zarr.Array:
        return zarr.open_array(self.store.path / self.entries[video] / name, mode="r", zarr_format=3)


def _read_again(path: Path) -> None:
    """Into the page cache from the disk, as after a restart: no file is quick because of how it was written."""
    with open(path, "rb", buffering=0) as f:
        os.fsync(f.fileno())
        os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        f.read()


def forget_checksums() -> None:
    """As a process that has just begun: the next map of each chunk verifies it."""
    entry._seen_right.clear()


def touch(values: np.ndarray) -> int:
    """One byte of every page, so that a map is really read."""
    return int(values.reshape(-1).view(np.uint8)[::PAGE_BYTES].sum())


def aligned(shape: tuple[int, ...]) -> np.ndarray:
    """Zeros that begin at a multiple of 64 bytes, as torch's tensors do; numpy's begin 16 bytes behind a page.

    From a map, which begins with a page, to there a copy takes twice as long: benchmarks/LOG.md.
    """
    raw = np.zeros(2 * int(np.prod(shape)) + 64, np.uint8)
    begin = -raw.ctypes.data % 64
    return raw[begin : begin + raw.size - 64].view(np.float16).reshape(shape)


def one_by_one(has: Features, held: bool, rounds: int) -> Result:
    """Each video's rows are handed over; held: and kept until the last one is there, else let go at once."""
    kept: list[Any] = []

    def take(found: Any) -> None:
        if held:
            kept.append(found)

    def each(read: Callable[[int], Any], mapping: Any = map, check: bool = False) -> Callable[[], None]:
        def run() -> None:
            if check:
                forget_checksums()
            for _ in mapping(lambda video: take(read(video)), range(len(has.media))):
                pass

        return run

    def mapped(video: int) -> Any:
        track = has.map(video)
        touch(track.values)
        return track

    def by_zarr(video: int) -> Any:
        return tuple(has.zarr_array(video, array)[:] for array in entry.ARRAYS)

    def by_map(video: int) -> Any:
        values = np.load(has.npy[video], mmap_mode="r")
        touch(values)
        return values

    checked, unchecked, goal = Target("ratio", 0.75), Target("ratio", 0.95), Target("ratio", 1.0, goal=True)
    how = "all are held until the last is there" if held else "each is let go before the next"
    with ThreadPoolExecutor(2) as pool:
        contenders = [
            Contender("np.fromfile of the chunk files", each(has.plain)),
            Contender("the same, two threads", each(has.plain, pool.map)),
            Contender("**Store.get**, checksums verified", each(has.get), (checked,)),
            Contender("**Store.get**, checksums verified, two threads", each(has.get, pool.map), (goal,)),
            Contender("**Store.map**, checksums verified", each(mapped, check=True)),
            Contender("**Store.map**, verified before in this process", each(mapped), (unchecked,)),
            Contender("zarr-python, the same files", each(by_zarr)),
            Contender("h5py, one contiguous file", each(lambda video: has.h5["values"][has.spans[video]])),
            Contender(".npy per video, np.load", each(lambda video: np.load(has.npy[video]))),
            Contender(".npy per video, np.load(mmap_mode)", each(by_map)),
        ]
        return race(
            f"Everything, {'held' if held else 'one video after the other'}",
            f"""{len(has.media)} videos of {has.rows} x {has.whole.shape[1]} float16 and their times; {how}. The twin
            reads the chunk files into arrays of its own, as get does; of a map one byte of every page is read.""",
            [replace(c, after=kept.clear) for c in contenders],
            rounds,
            has.nbytes,
        )


def into_one_array(has: Features, rounds: int) -> Result:
    """All rows end in one array, as a loader wants them: here a map has to be copied."""
    out = aligned(has.whole.shape)

    def plain(video: int) -> None:
        with open(has.chunks[video][0], "rb", buffering=0) as f:
            f.readinto(out[has.spans[video]].data)
        np.fromfile(has.chunks[video][1])

    def fresh(video: int) -> None:
        raw = has.plain(video)[0][:-4]
        np.copyto(out[has.spans[video]], raw.view(np.float16).reshape(has.rows, -1))

    def got(video: int) -> None:
        np.copyto(out[has.spans[video]], has.get(video).values)

    def mapped(video: int) -> None:
        np.copyto(out[has.spans[video]], has.map(video).values)

    def by_zarr(video: int) -> None:
        out[has.spans[video]] = has.zarr_array(video)[:]

    def by_npy(video: int) -> None:
        np.copyto(out[has.spans[video]], np.load(has.npy[video], mmap_mode="r"))

    def each(read: Callable[[int], None], mapping: Any = map, check: bool = False) -> Callable[[], None]:
        def run() -> None:
            if check:
                forget_checksums()
            list(mapping(read, range(len(has.media))))

        return run

    def right() -> bool:
        same = np.array_equal(out.view(np.uint16), has.whole.view(np.uint16))
        out[:] = 0
        return same

    with ThreadPoolExecutor(2) as pool:
        contenders = [
            Contender("readinto from the chunk files", each(plain)),
            Contender("memcpy of the same bytes", lambda: np.copyto(out, has.whole)),
            Contender("np.fromfile of the chunk files and copy", each(fresh)),
            Contender("**Store.get** and copy, checksums verified", each(got)),
            Contender("**Store.get** and copy, checksums verified, two threads", each(got, pool.map)),
            Contender("**Store.map** and copy, checksums verified", each(mapped, check=True)),
            Contender("**Store.map** and copy, verified before in this process", each(mapped)),
            Contender("zarr-python, the same files", each(by_zarr)),
            Contender("h5py, one contiguous file", lambda: has.h5["values"].read_direct(out)),
            Contender(".npy per video, np.load(mmap_mode) and copy", each(by_npy)),
        ]
        return race(
            "Everything, into one array",
            """All rows of the same videos end in one array that was there before. The twin reads them where they shall
            be; from what hands over rows of its own, as Store.get does, they are copied. No target: what it costs.""",
            [replace(c, right=right) for c in contenders],
            rounds,
            has.nbytes,
        )


def random_windows(has: Features, batches: int, rounds: int) -> Result:
    """Batches of windows that begin anywhere, from what is open already."""
    rng, rows = np.random.default_rng(1), min(WINDOW_ROWS, has.rows)
    out = aligned((BATCH, rows, has.whole.shape[1]))
    which = rng.integers(0, len(has.media), (batches, BATCH)).tolist()
    begins = rng.integers(0, has.rows - rows + 1, (batches, BATCH)).tolist()
    windows = [list(enumerate(zip(*both, strict=True))) for both in zip(which, begins, strict=True)]
    maps = [has.map(video).values for video in range(len(has.media))]
    npy = [np.load(path, mmap_mode="r") for path in has.npy]
    arrays = [has.zarr_array(video) for video in range(len(has.media))]

    def each(read: Callable[[int, int, int], None]) -> Callable[[], None]:
        def run() -> None:
            for batch in windows:
                for i, (video, begin) in batch:
                    read(i, video, begin)

        return run

    def plain(i: int, video: int, begin: int) -> None:
        begin += has.spans[video].start
        np.copyto(out[i], has.whole[begin : begin + rows])

    def ours(i: int, video: int, begin: int) -> None:
        np.copyto(out[i], maps[video][begin : begin + rows])

    def by_npy(i: int, video: int, begin: int) -> None:
        np.copyto(out[i], npy[video][begin : begin + rows])

    def by_zarr(i: int, video: int, begin: int) -> None:
        out[i] = arrays[video][begin : begin + rows]

    def by_h5py(i: int, video: int, begin: int) -> None:
        begin += has.spans[video].start
        has.h5["values"].read_direct(out, np.s_[begin : begin + rows], np.s_[i])

    def right() -> bool:
        last = [has.whole[has.spans[v]][b : b + rows] for _, (v, b) in windows[-1]]
        same = np.array_equal(out, np.stack(last))
        out[:] = 0
        return same

    contenders = [
        Contender("memcpy from one array in memory", each(plain)),
        Contender("**Store.map**, then copies from the maps", each(ours), (Target("ratio", 0.8),)),
        Contender("zarr-python, the same files", each(by_zarr)),
        Contender("h5py, one contiguous file", each(by_h5py)),
        Contender(".npy per video, np.load(mmap_mode)", each(by_npy)),
    ]
    return race(
        "Random windows",
        f"""{batches} batches of {BATCH} windows of {rows} rows, each copied into its place in the batch,
        which lies as torch lays tensors (64 bytes); everybody opened, and we verified, the tracks before.""",
        [replace(c, right=right) for c in contenders],
        rounds,
        sum(map(len, windows)) * out[0].nbytes,
    )


def verifying(has: Features, rounds: int) -> Result:
    """All that can be wrong is looked for, checksums verified before or not."""

    def plain() -> None:
        for video in range(len(has.media)):
            has.plain(video)

    def hashed() -> None:
        for pair in has.chunks:
            for path in pair:
                with open(path, "rb") as f:
                    hashlib.file_digest(f, "sha256")

    def sound() -> bool:
        found = list(has.store.verify())
        return len(found) == len(has.media) and not any(wrong for _, _, wrong in found)

    return race(
        "Verifying everything",
        "One thread: the records, every checksum, every row and the metadata of the same tracks.",
        [
            Contender("np.fromfile of the chunk files", plain),
            Contender(
                "**Store.verify**", lambda: list(has.store.verify()), (Target("gb_per_s", 1.0),), right=sound
            ),
            Contender("SHA-256 of the chunk files", hashed),
        ],
        rounds,
        has.nbytes,
    )
