"""Batches of windows: gathered from resident rows, read from a mapped store, and by a DataLoader over .npz files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from vacli.store import Store, Track
from vacli.temporal.preset import WindowSpec
from vacli.temporal.vgg import gather, gather_plain
from vacli.temporal.windows import Clip, Windows

from .race import Contender, Result, Target, race
from .reading import MAE, medium


@dataclass(frozen=True)
class Sizes:
    """Videos of so many rows of float16, cut into windows. workers: of the DataLoaders beside the one without any."""

    videos: int
    rows: int
    dim: int
    spec: WindowSpec
    batch: int
    workers: tuple[int, ...]
    rounds: int


FULL = Sizes(20, 3000, 1024, WindowSpec(length=300, stride=200), 16, (2,), 9)
SMALL = Sizes(3, 100, 16, WindowSpec(length=30, stride=20), 4, (), 3)


def races(folder: Path, sizes: Sizes) -> Iterator[Result]:
    """Every race, one after the other; the files lie in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    values = rng.standard_normal((sizes.videos * sizes.rows, sizes.dim), np.float32).astype(np.float16)
    whole = torch.from_numpy(values)
    yield copying(whole, sizes)
    clips = _clips(folder / "features.zarr", values, sizes)
    resident = Windows(clips, sizes.spec, sizes.batch, resident=True)
    mapped = Windows(clips, sizes.spec, sizes.batch, resident=False)
    yield loading(folder / "npz", whole, resident, sizes)
    yield mapping(resident, mapped, sizes)


def _clips(path: Path, values: np.ndarray, sizes: Sizes) -> list[Clip]:
    """Every video's rows in a store, mapped from there, and labels of its own."""
    store, rng = Store(path, create=True), np.random.default_rng(1)
    times_s, clips = (np.arange(sizes.rows) + 0.5) / 30, []
    for number, rows in enumerate(np.split(values, sizes.videos)):
        store.put(MAE, medium(number), Track(rows, times_s))
        labels = Track(rng.uniform(-1, 1, (sizes.rows, 2)).astype(np.float32), times_s)
        mapped = store.map(MAE, medium(number))
        clips.append(Clip.on_clock(str(number), times_s, {"mae": mapped}, {"mae": sizes.dim}, labels))
    return clips


def copying(rows: Tensor, sizes: Sizes) -> Result:
    """Windows that begin anywhere in rows (N, D), against as many bytes in one piece."""
    length, batch, batches = sizes.spec.length, sizes.batch, 20
    draw = torch.Generator().manual_seed(0)
    starts = torch.randint(len(rows) - length + 1, (batches, batch), generator=draw)
    pieces = torch.randint(len(rows) - batch * length + 1, (batches,), generator=draw).tolist()
    room = torch.empty(batch * length, rows.shape[1], dtype=torch.float16)
    last: list[Tensor] = []

    def copied() -> None:
        for begin in pieces:
            room.copy_(rows[begin : begin + batch * length])

    def each(read: Callable[[Tensor], Tensor]) -> Callable[[], None]:
        def run() -> None:
            for some in starts:
                last.clear()  # as a step lets the batch before go: its memory is used again
                last.append(read(some))

        return run

    def right() -> bool:
        windows = [rows[start : start + length] for start in starts[-1].tolist()]
        return torch.equal(last[0].half(), torch.stack(windows))

    return race(
        "Gathering windows from resident rows",
        f"""{batches} batches of {batch} windows of {length} x {rows.shape[1]} float16, {torch.get_num_threads()}
        threads. The twin copies as many bytes in one piece, from anywhere, into a buffer that was there before; gather
        makes its own, of memory used before. GB/s and the target count the float16 rows alone; a network is given
        float32, twice as many bytes to write: that conversion is in the row that says so.""",
        [
            Contender("memcpy of the same bytes", copied),
            Contender(
                "**gather**",
                each(lambda some: gather(rows, some, length)),
                (Target("ratio", 0.8),),
                right=right,
            ),
            Contender(
                "**gather**, then float32", each(lambda some: gather(rows, some, length).float()), right=right
            ),
            Contender(
                "one window after the other", each(lambda some: gather_plain(rows, some, length)), right=right
            ),
        ],
        sizes.rounds,
        starts.numel() * length * rows[0].nbytes,
    )


class _Files(Dataset[tuple[Tensor, Tensor]]):
    """What anybody would write: a window is an .npz file of features and labels."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        with np.load(self.paths[index]) as window:
            return torch.from_numpy(window["features"]), torch.from_numpy(window["labels"])


def loading(folder: Path, values: Tensor, windows: Windows, sizes: Sizes) -> Result:
    """A shuffled pass over all windows, which lie in values (N, D): what a step of training is given."""
    order = torch.randperm(len(windows), generator=_seeded())
    begins = torch.cat([batch.rows[:, 0] for batch in windows.batches()])
    parts = begins[order].split(sizes.batch)
    wanted = gather_plain(values, parts[-1], windows.length)
    last: list[Tensor] = []

    def loader(paths: list[Path], workers: int = 0) -> Callable[[], None]:
        more: dict[str, Any] = (
            {"persistent_workers": True, "multiprocessing_context": "spawn"} if workers else {}
        )
        batches = DataLoader(_Files(paths), sizes.batch, sampler=order.tolist(), num_workers=workers, **more)

        def run() -> None:
            for features, _ in batches:
                last[:] = [features]

        return run

    def gathered() -> None:
        for starts in parts:
            last.clear()
            last.append(gather(values, starts, windows.length))

    def batched() -> None:
        for batch in windows.batches(_seeded()):
            last[:] = [batch.streams["mae"]]

    def right() -> bool:
        return torch.equal(last[0].half(), wanted)

    packed, plain = "np.savez_compressed, float16", "np.savez"
    small = _written(folder / "compressed", windows, torch.float16, np.savez_compressed)
    half, full = (
        _written(folder / str(dtype), windows, dtype, np.savez) for dtype in (torch.float16, torch.float32)
    )
    return race(
        "Beside a DataLoader over .npz windows",
        f"""{len(windows)} windows of {windows.length} x {sizes.dim}, each an .npz file of features and labels, shuffled
        alike, in batches of {sizes.batch}. The twin is what published code does: float32, not compressed. The
        DataLoaders give what is in the files, gather gives float16 rows; Windows.batches all that a network is given:
        float32 rows, which of them are seen, labels.""",
        [
            replace(c, right=right)
            for c in [
                Contender(f"DataLoader, {plain}, float32", loader(full)),
                *(
                    Contender(f"the same, {n} workers that run already", loader(full, n))
                    for n in sizes.workers
                ),
                Contender(f"DataLoader, {plain}, float16", loader(half)),
                Contender(f"DataLoader, {packed}", loader(small)),
                Contender("**gather**", gathered, (Target("ratio", 30),)),
                Contender("**Windows.batches**, rows resident", batched),
            ]
        ],
        sizes.rounds,
        _nbytes(windows, sizes),
    )


def mapping(resident: Windows, mapped: Windows, sizes: Sizes) -> Result:
    """The same pass with the rows left in the store."""
    wanted = _last_of(resident)
    last: list[Tensor] = []

    def each(windows: Windows) -> Callable[[], None]:
        def run() -> None:
            last[:] = [_last_of(windows)]

        return run

    def right() -> bool:
        return torch.equal(last[0], wanted)

    return race(
        "Rows that do not fit",
        """The same pass from the maps of a store, all in the page cache, through the two buffers of the thread. Nobody
        computes on a batch here, so the thread has nothing to hide behind. No target: what it costs.""",
        [
            Contender("**Windows.batches**, rows resident", each(resident), right=right),
            Contender("**Windows.batches**, rows mapped from the store", each(mapped), right=right),
        ],
        sizes.rounds,
        _nbytes(resident, sizes),
    )


def _written(folder: Path, windows: Windows, dtype: torch.dtype, save: Callable[..., None]) -> list[Path]:
    """A file for each window, in order."""
    folder.mkdir(parents=True)
    paths: list[Path] = []
    for batch in windows.batches():
        assert batch.labels is not None
        for features, labels in zip(batch.streams["mae"].to(dtype), batch.labels, strict=True):
            paths.append(folder / f"{len(paths):05}.npz")
            save(paths[-1], features=features.numpy(), labels=labels.numpy())
    return paths


def _last_of(windows: Windows) -> Tensor:
    """The rows of a shuffled pass's last batch."""
    for batch in windows.batches(_seeded()):
        rows = batch.streams["mae"]
    return rows


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _nbytes(windows: Windows, sizes: Sizes) -> int:
    """Of the windows' features, as float16."""
    return len(windows) * windows.length * sizes.dim * 2
