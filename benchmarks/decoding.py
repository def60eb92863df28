"""From 720p H.264 to crops of known faces on one core, beside whole frames in RGB and beside decoding alone."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import cycle, islice
from pathlib import Path
from statistics import median

import av
import cv2
import numpy as np
from vacli.extract.crops import aligned
from vacli.extract.datasets import Sample
from vacli.extract.faces import ARCFACE_112, align
from vacli.extract.media import Video
from vacli.extract.synthetic import make_puppets
from vacli.store import Track

from . import report
from .race import Contender, Result, Target, race

RATE_HZ = 25


@dataclass(frozen=True)
class Sizes:
    """The video: its height, at 16:9, its frames, of which `drawn` differ, and how well it is compressed."""

    height: int
    frames: int
    drawn: int
    rates_mbit: tuple[float, ...]
    rounds: int


FULL = Sizes(height=720, frames=400, drawn=200, rates_mbit=(2.0, 4.0), rounds=7)
SMALL = Sizes(height=72, frames=30, drawn=10, rates_mbit=(0.1,), rounds=3)
WANTED_PER_S = 300  # frames, per core


def races(folder: Path, sizes: Sizes) -> Iterator[Result]:
    """One race for each bit rate, the first of which is held to WANTED_PER_S; the files lie in `folder`."""
    make_puppets(folder / "puppets", train=1, validation=0, length_s=sizes.drawn / RATE_HZ, rate_hz=RATE_HZ)
    [source] = (folder / "puppets").glob("*/*.mp4")
    for rate_mbit in sizes.rates_mbit:
        path = folder / f"{rate_mbit:g}.mp4"
        _enlarge(source, path, sizes, rate_mbit)
        with _one_core():
            yield cropping(path, sizes, held=rate_mbit == sizes.rates_mbit[0])


def cropping(path: Path, sizes: Sizes, held: bool) -> Result:
    """Every frame decoded, the one face in it cropped."""
    faces = _known_faces(sizes)
    sample = Sample(path.stem, path.parent, path)

    def whole() -> Iterator[np.ndarray]:
        frames = (frame for rgb, _ in Video(path).frames() for frame in rgb)
        return (align(frame, row[4:14]) for frame, row in zip(frames, faces.values, strict=True))

    def ours() -> Iterator[np.ndarray]:
        return (crop for crops, _ in aligned(sample, faces) for crop in crops)

    def alone() -> None:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            stream.thread_type = "SLICE"
            _count(container.decode(stream))

    targets = (Target("seconds", sizes.frames / WANTED_PER_S),) if held else ()
    cpu_s: dict[str, list[float]] = {}
    result = race(
        f"Crops from {sizes.height}p H.264, {path.stat().st_size * 8 * RATE_HZ / sizes.frames / 1e6:.1f} Mbit/s",
        f"""{sizes.frames} frames, a face in each, on one core; {WANTED_PER_S} frames/s are wanted. The faces are known:
        nothing is detected. The twin makes each frame into RGB and aligns the face in it; `aligned` makes RGB of what
        lies around the face; both give the same crops, bit for bit. The last one only decodes: no cropping can be
        faster. How fast that is depends on the bit rate more than on anything else.""",
        [
            Contender("whole frames in RGB, align", _timed("plain", lambda: _count(whole()), cpu_s)),
            Contender(
                "**aligned**",
                _timed("ours", lambda: _count(ours()), cpu_s),
                targets,
                right=lambda: all(map(np.array_equal, ours(), whole())),
            ),
            Contender("decoding alone", _timed("alone", alone, cpu_s)),
        ],
        sizes.rounds,
    )
    named = [
        replace(contender, name=f"{contender.name}: {_rates(sizes.frames, result.median_s(i), seconds)}")
        for i, (contender, seconds) in enumerate(zip(result.contenders, cpu_s.values(), strict=True))
    ]
    return replace(result, contenders=tuple(named))


def _count(many: Iterator[object]) -> int:
    """How many come, each let go before the next."""
    return sum(1 for _ in many)


def _timed(name: str, run: Callable[[], object], cpu_s: dict[str, list[float]]) -> Callable[[], None]:
    """`run`, which notes its processor time: what others do on the machine disturbs that less."""
    cpu_s[name] = []

    def timed() -> None:
        began = time.process_time()
        run()
        cpu_s[name].append(time.process_time() - began)

    return timed


def _rates(frames: int, wall_s: float, cpu_s: list[float]) -> str:
    return f"{frames / wall_s:.0f} frames/s, {frames / median(cpu_s[2:]):.0f} per second of the processor"


@contextlib.contextmanager
def _one_core() -> Iterator[None]:
    """Where the system can do it, this thread and those it starts share one core."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _known_faces(sizes: Sizes) -> Track:
    """One face a frame, a third of the height wide, that moves about and turns."""
    turn = 0.2 * np.sin(np.arange(sizes.frames) / 30)
    middle = np.exp(1j * np.arange(sizes.frames) / 25) * sizes.height / 8 + sizes.height * (8 / 9 + 0.5j)
    points = (ARCFACE_112 - 56) @ [1, 1j] * sizes.height / 3 / 112
    placed = np.exp(1j * turn)[:, None] * points + middle[:, None]
    values = np.zeros((sizes.frames, 15), np.float32)
    values[:, 4:14:2], values[:, 5:14:2] = placed.real, placed.imag
    return Track(values, np.arange(sizes.frames) / RATE_HZ)


def _enlarge(source: Path, path: Path, sizes: Sizes, rate_mbit: float) -> None:
    """The puppet to and fro at the height wished, its mirror images to both sides, and a camera's noise over all."""
    rng = np.random.default_rng(0)
    with av.open(str(source)) as container:
        small = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    width, edge = sizes.height * 16 // 9, (sizes.height * 16 // 9 - sizes.height) // 2
    noise = rng.normal(0, 1.5, (7, sizes.height, width, 1))
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", RATE_HZ, options={"preset": "fast", "threads": "1"})
        stream.width, stream.height, stream.pix_fmt = width, sizes.height, "yuv420p"
        stream.bit_rate = round(rate_mbit * 1e6)
        for i, picture in enumerate(islice(cycle(small + small[::-1]), sizes.frames)):
            large = cv2.resize(picture, (sizes.height, sizes.height), interpolation=cv2.INTER_CUBIC)
            wide = np.pad(large, ((0, 0), (edge, width - sizes.height - edge), (0, 0)), "symmetric")
            noisy = np.clip(np.rint(wide + noise[i % 7]), 0, 255).astype(np.uint8)
            frame = av.VideoFrame.from_ndarray(noisy, "rgb24")
            frame.pts, frame.time_base = i, Fraction(1, RATE_HZ)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())


def main() -> None:
    """`python -m benchmarks.decoding`: only printed."""
    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="vacli-benchmarks-") as folder:
        print(report.part("decoding", [*races(Path(folder), FULL)], Path(folder), load_before))


if __name__ == "__main__":
    main()
