"""What pre-training is worth with few labels (`python -m benchmarks.pretraining`): puppets, a tiny ViT, two starts."""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from vacli.extract.datasets import Sample, find
from vacli.extract.finetune import finetune
from vacli.extract.pretrain import pretrain
from vacli.extract.synthetic import make_puppets
from vacli.store import Store

from .report import spread

BATCH = 64
SAYS = """\
## Pre-training

A {model} at {size} pixels is tuned on the labelled frames of a few puppet videos: from random weights, and from the
encoder that `vacli pretrain` made of the crops of all {train} training videos, without their labels ({epochs} epochs;
the loss of held-out crops is {loss}). Both are tuned whole, on the same frames, with the same {updates} updates, and
judged alike at their best epoch, by {validation} videos of other people, which the pre-training has not seen. From
random weights the best of the learning rates {lrs} is shown, chosen by the very mean in the last
column; the pre-trained start has {lr:g} throughout. Mean and standard deviation over {seeds} seeds, each with other
labelled videos, another pre-training and another order; CCC frame by frame.

| labelled videos (frames) | start | learning rate | valence | arousal | mean |
|--:|---|--:|--:|--:|--:|
"""


@dataclass(frozen=True)
class Scale:
    """How much of everything. labelled: numbers of videos. updates: of each fine-tuning."""

    train: int = 240
    validation: int = 32
    length_s: float = 20.0
    rate_hz: float = 1.0
    model: str = "test_vit"
    size: int = 64
    epochs: int = 30
    pretraining_lr: float = 4e-3
    labelled: tuple[int, ...] = (8, 16, 32)
    updates: int = 240
    lrs: tuple[float, ...] = (5e-4, 1e-3, 2e-3)  # from random weights
    lr: float = 2e-3  # from pre-trained ones
    seeds: int = 3


FULL = Scale()
SMALL = Scale(4, 1, 3.0, 5.0, size=32, epochs=1, labelled=(1, 2), updates=2, lrs=(1e-3, 2e-3), seeds=2)


def results(small: bool = False) -> str:
    """Markdown: a section with a paragraph and a table."""
    scale = SMALL if small else FULL
    with tempfile.TemporaryDirectory(prefix="vacli-pretraining-") as folder:
        bench = _Bench(scale, Path(folder))
        losses = [bench.pretrain(seed) for seed in range(scale.seeds)]
        rows = [row for count in scale.labelled for row in bench.rows(count)]
    lrs = ", ".join(f"{lr:g}" for lr in scale.lrs)
    says = SAYS.format(**vars(scale) | {"loss": spread(np.array(losses)), "lrs": lrs})
    return says + "\n".join(rows) + "\n"


class _Bench:
    """The puppets, and what is learnt of them."""

    def __init__(self, scale: Scale, folder: Path) -> None:
        self._scale, self._folder = scale, folder
        make_puppets(folder / "puppets", scale.train, scale.validation, scale.length_s, scale.rate_hz)
        samples = find(folder / "puppets")
        self._train = [s for s in samples if s.split == "train"]
        self._validation = [s for s in samples if s.split == "validation"]
        self._store = Store(folder / "features.zarr", create=True)

    def pretrain(self, seed: int) -> float:
        """Held-out loss; no validation video is looked at."""
        scale = self._scale
        figures = pretrain(
            self._train,
            self._store,
            self._pretrained(seed),
            model=scale.model,
            from_scratch=True,
            size=scale.size,
            epochs=scale.epochs,
            batch=BATCH,
            lr=scale.pretraining_lr,
            seed=seed,
        )
        return figures["loss"]

    def rows(self, count: int) -> Iterator[str]:
        """Of the table, for so many labelled videos: from random weights, then from pre-trained ones."""
        seeds, seconds = range(self._scale.seeds), self._scale.length_s
        for start, lrs in (("random", self._scale.lrs), ("pre-trained", (self._scale.lr,))):
            tried = {lr: np.array([self._tune(count, start, lr, seed) for seed in seeds]) for lr in lrs}
            best = max(lrs, key=lambda lr: float(tried[lr][:, 2].mean()))
            cells = [spread(column) for column in tried[best].T]
            frames = count * round(seconds * self._scale.rate_hz)
            yield f"| {count} ({frames}) | {start} | {best:g} | {' | '.join(cells)} |"

    def _tune(self, count: int, start: str, lr: float, seed: int) -> tuple[float, float, float]:
        """CCC of valence and arousal on the validation videos, and their mean."""
        scale = self._scale
        frames = round(scale.length_s * scale.rate_hz)
        figures = finetune(
            [*self._labelled(count, seed), *self._validation],
            self._store,
            self._folder / "tuned.safetensors",
            **self._start(start, seed),
            freeze=0,
            layer_decay=1.0,
            frames_per_video=frames,
            batch=BATCH,
            epochs=math.ceil(scale.updates / math.ceil(count * frames / BATCH)),
            lr=lr,
            seed=seed,
        )
        v, a = figures["ccc_valence"], figures["ccc_arousal"]
        return v, a, (v + a) / 2

    def _labelled(self, count: int, seed: int) -> list[Sample]:
        return [self._train[i] for i in np.random.default_rng(seed).permutation(len(self._train))[:count]]

    def _start(self, start: str, seed: int) -> dict:
        if start == "pre-trained":
            return {"weights": str(self._pretrained(seed))}
        return {"model": self._scale.model, "from_scratch": True, "size": self._scale.size}

    def _pretrained(self, seed: int) -> Path:
        return self._folder / f"faces-{seed}.safetensors"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pretraining", description=__doc__)
    parser.add_argument("--small", action="store_true", help="tiny data, a table that says nothing")
    print(results(parser.parse_args().small))
