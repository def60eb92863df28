"""Training beside a bare loop: an epoch over all windows against as many steps on one batch that never changes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from .race import Contender, Result, Target, race


@dataclass(frozen=True)
class Sizes:
    """videos of `rows` rows of `dim` float16 features; heads: (preset, changes to it)."""

    videos: int
    rows: int
    dim: int
    rounds: int
    heads: tuple[tuple[str, dict[str, str]], ...]


FULL = Sizes(16, 3400, 1024, 9, (("linear", {}), ("mamba", {})))
_SHORT = {"windows.length": "40", "windows.stride": "40"}
_NARROW = {
    "encode.*.blocks": "[{linear = {dim = 8}}]",
    "decode": "[{mamba = {layers = 1, state = 4, conv = 3, expand = 1}}]",
}
SMALL = Sizes(3, 120, 16, 3, (("linear", _SHORT), ("mamba", _SHORT | _NARROW)))


def races(sizes: Sizes) -> Iterator[Result]:
    """On the CPU, and on a GPU where there is one."""
    import torch

    clips = _clips(sizes)
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        for head, changes in sizes.heads:
            yield _race(clips, head, changes, torch.device(device), sizes)


def _clips(sizes: Sizes) -> list[Any]:
    from vacli.temporal.windows import Clip

    rng = np.random.default_rng(0)
    clips = []
    for number in range(sizes.videos):
        features = rng.standard_normal((sizes.rows, sizes.dim), np.float32).astype(np.float16)
        labels = rng.uniform(-1, 1, (sizes.rows, 2)).astype(np.float32)
        times_s = np.arange(sizes.rows) / 30.0
        clips.append(Clip(f"v{number}", times_s, {"mae": features}, labels))
    return clips


def _race(clips: list[Any], head: str, changes: dict[str, str], device: Any, sizes: Sizes) -> Result:
    import torch
    from vacli.temporal.fitting import Fit, whole_loss
    from vacli.temporal.losses import va_loss
    from vacli.temporal.model import Network
    from vacli.temporal.preset import load_preset
    from vacli.temporal.windows import Windows

    preset = load_preset(head, changes, ["mae"])
    spec = preset.train
    windows = Windows(clips, preset.windows, spec.batch, device, resident=True)
    nets = []
    for _ in range(2):
        torch.manual_seed(0)
        net = Network(preset, {"mae": sizes.dim}).to(device)
        net.standardise_by(windows.moments())
        nets.append(net)
    fixed = next(windows.batches())
    optimizer = torch.optim.AdamW(nets[0].parameters(), lr=1e-9, fused=True)
    # no rate to speak of: the same weights in every round, so the same work
    slow = spec.model_copy(update={"lr": 1e-9})
    fit = Fit(nets[1], whole_loss(nets[1], slow), slow, spec.epochs)
    losses: list[float] = []

    def bare() -> None:
        nets[0].train()
        for _ in range(windows.steps):
            predicted = nets[0](fixed.streams, fixed.seen)["va"]
            loss = va_loss(predicted, fixed.labels, fixed.labelled, spec)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(nets[0].parameters(), spec.clip_norm)
            optimizer.step()
        loss.item()  # the device is done

    def epoch() -> None:
        losses.append(fit.epoch(windows, 0, len(losses), lambda line: None))

    def right() -> bool:
        seen = torch.cat([batch.rows.flatten() for batch in windows.batches()]).unique()
        return len(seen) == sizes.videos * sizes.rows and 1.5 < losses[-1] < 2.5  # labels are noise: CCC 0

    parameters = sum(p.numel() for p in nets[0].parameters())
    kind = "GPU" if device.type == "cuda" else "CPU"
    where = torch.cuda.get_device_name() if kind == "GPU" else f"{torch.get_num_threads()} threads"
    says = (
        f"{head} ({parameters:,} parameters) on {sizes.videos} videos of {sizes.rows} rows of {sizes.dim} dims, kept "
        f"as float16 on the device: {windows.steps} steps of {spec.batch} windows of {windows.length} rows ({where}). "
        "The twin is a bare loop over one float32 batch that is on the device already; the epoch also draws an order, "
        "gathers and converts every batch from the float16 rows, sets the rate, skips what has no label, and sums up."
    )
    contenders = [
        Contender("bare steps on one fixed batch", bare),
        Contender(
            "**Fit.epoch**, an epoch over all windows",
            epoch,
            (Target("ratio", 1 / 1.15), Target("ratio", 1 / 1.05, goal=True)),
            right=right,
        ),
    ]
    return race(
        f"An epoch of {head} on {'a GPU' if device.type == 'cuda' else 'a CPU'}",
        says,
        contenders,
        sizes.rounds,
    )
