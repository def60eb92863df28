"""What a frame costs a head live, on one thread, beside the offline network that has no memory of the frames before."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from vacli.temporal.live import LiveHead, why_not_live
from vacli.temporal.model import Network
from vacli.temporal.predict import Run
from vacli.temporal.preset import Preset, load_preset, preset_names

SLOWEST_MS = 3.0
CLOSE = 1e-4
_WARM_UP = 20  # rows


@dataclass(frozen=True)
class Sizes:
    """rows: of the video. window: rows that a frame's value would rest on, were they computed again for each frame."""

    rows: int
    window: int
    dims: dict[str, int]


FULL = Sizes(rows=1000, window=300, dims={"mae": 1024, "logmel": 64})
SMALL = Sizes(rows=40, window=10, dims={"mae": 16, "logmel": 64})
# tiny: the published one has 67 million parameters
SMALL_CHANGES = {"mamba-va": {"decode.0.tcn.channels": "[16, 8]", "decode.2.mamba.layers": "1"}}


def results(folder: Path, small: bool) -> str:
    """A Markdown section: a row for every preset that goes live."""
    sizes = SMALL if small else FULL
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        lines = [
            _line(preset, sizes, folder / name)
            for name in preset_names()
            if why_not_live(preset := load_preset(name, SMALL_CHANGES.get(name) if small else None)) is None
        ]
    finally:
        torch.set_num_threads(threads)
    said = (
        f"One thread, float32, {sizes.rows} rows of {', '.join(f'{n} ({d})' for n, d in sizes.dims.items())}, random "
        f"weights; features to values, the encoders apart. The twins are the offline network: over the last "
        f"{sizes.window} rows, as who keeps no state would run it for each frame, and over the whole video at once, a "
        f"row's share of it. Difference: the largest between live and the latter, at most {CLOSE:g} or nothing is "
        f"reported. Target: {SLOWEST_MS:g} ms a frame."
    )
    head = [
        f"| head | parameters | live, median | 99th percentile | last {sizes.window} rows again | whole, a row | "
        "difference | target |",
        "|---|--:|--:|--:|--:|--:|--:|---|",
    ]
    return "\n".join(["## A frame, live", "", said, "", *head, *lines]) + "\n"


def _line(preset: Preset, sizes: Sizes, folder: Path) -> str:
    run = _run(preset, sizes, folder)
    net, head = run.network(), LiveHead(run)
    rng = np.random.default_rng(0)
    video = {n: rng.standard_normal((sizes.rows, d)).astype(np.float16) for n, d in run.dims.items()}
    frames = [{n: x[t].astype(np.float32) for n, x in video.items()} for t in range(sizes.rows)]
    live_s, values = [], []
    for frame in frames:
        began = time.perf_counter()
        values.append(head.step(frame))
        live_s.append(time.perf_counter() - began)
    offline, whole_s = _timed(lambda: _offline(net, video))
    window_s = min(_timed(lambda: _offline(net, video, sizes.window))[1] for _ in range(5))
    apart = float(np.abs(np.stack(values) - offline).max())
    assert apart <= CLOSE, f"{preset.name}: live is {apart:g} off"  # a wrong answer has no speed
    median_ms, slow_ms = 1e3 * np.quantile(live_s[_WARM_UP:], [0.5, 0.99])
    verdict = "met" if slow_ms <= SLOWEST_MS else "median only" if median_ms <= SLOWEST_MS else "**missed**"
    cells = [
        preset.name,
        f"{sum(p.numel() for p in net.parameters()) / 1e6:.2f} M",
        *(f"{ms:.3g} ms" for ms in (median_ms, slow_ms, 1e3 * window_s, 1e3 * whole_s / sizes.rows)),
        f"{apart:.1e}",
        verdict,
    ]
    return f"| {' | '.join(cells)} |"


def _run(preset: Preset, sizes: Sizes, folder: Path) -> Run:
    """As if trained."""
    torch.manual_seed(0)
    dims = {name: sizes.dims[name] for name in preset.streams}
    folder.mkdir()
    save_file(Network(preset, dims).state_dict(), folder / "weights.safetensors")
    streams = {name: {"dim": dim} for name, dim in dims.items()}
    return Run(folder, {"preset": preset.model_dump(), "streams": streams})


@torch.inference_mode()
def _offline(net: Network, video: dict[str, np.ndarray], last: int = 0) -> np.ndarray:
    rows = {name: torch.from_numpy(x[-last:]).float()[None] for name, x in video.items()}
    seen = {name: torch.ones(x.shape[:2], dtype=torch.bool) for name, x in rows.items()}
    return net(rows, seen)["va"][0].clamp(-1, 1).numpy()


def _timed(run: Callable[[], np.ndarray]) -> tuple[np.ndarray, float]:
    began = time.perf_counter()
    found = run()
    return found, time.perf_counter() - began
