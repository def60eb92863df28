"""What each head is worth on puppets (`python -m benchmarks.ablation`): what it remembers, hears, and does without."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from vacli import temporal
from vacli.extract.datasets import find
from vacli.extract.encoder import make_encoders
from vacli.extract.finetune import finetune
from vacli.extract.run import extract
from vacli.extract.synthetic import AROUSAL, CUE_S, VALENCE, end_with_parent, latents, make_puppets
from vacli.store import Store, Track
from vacli.temporal.evaluate import figures, load_clips
from vacli.temporal.fitting import make_optimizer, whole_loss
from vacli.temporal.model import Network
from vacli.temporal.predict import Run, faces_of, finish, raw_curves
from vacli.temporal.preset import Preset, load_preset
from vacli.temporal.train import train
from vacli.temporal.windows import Batch, Clip, Windows

from .report import spread

KEPT = Path(__file__).parent / "work" / "ablation"  # runs, so that a stopped benchmark goes on
BOTH = ("mae", "logmel")
FIELD_S = 12.1  # 121 rows at 10 Hz: how far the TCN sees
DROPOUT = 0.3
GONE = 0.3

SAYS = """\
## Heads

Puppets: {train} videos to train on, {validation} to stop by and to choose the learning rate and the smoothing by, and
{test} that nothing was chosen by, which are judged here ({length_s:g} s each at {rate_hz:g} Hz, every one another
person). A small ViT tuned on other puppets stands in for the MAE. The presets, made narrow so that all of it fits on
two cores: {dim} dims instead of 256 (crossattn is crossattn-light as it is; "not near": its attention as published,
which does not know what is near in time). All alike: a batch is one whole video of {length} rows, {epochs} epochs, and
the better of the learning rates {rates} for every head, by the validation videos and one seed. Mean and standard
deviation over {seeds} seeds. CCC is of the curves as the networks have them, but for "smoothed". Training: seconds on
one core, two runs side by side.

What a label is made of is known: valence = {v_face:g} face + {mood_v:g} mood, arousal = {a_face:g} face + {a_sound:g}
voice + {mood_a:g} mood. A mood is told by a cue of {cue_s:g} s (of valence: seen, of arousal: heard) and holds until
the next, 14 to 28 s later. How much of each part there is in a curve is its coefficient in a least-squares fit of the
curve by the parts, as a share of the label's own: 1 is all of it, 0 nothing. The moods are looked at only where the cue
ended more than {field_s:g} s ago, out of the sight of the presets' causal TCN.

| head | rate | valence | arousal | mean | smoothed | face | voice | mood seen | mood heard | parameters | training |
|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|
"""

SAYS_GAPS = """
## Gaps

The same judged videos with rows hidden from the network: {gone:.0%} of the rows of every stream, each for itself; the
whole of one stream. Mean CCC of valence and arousal over {seeds} seeds, and in brackets what is lost. Dropout: trained
with train.modality_dropout = {dropout:g}.

| head | whole | {gone:.0%} of rows gone | no sound | no face |
|---|--:|--:|--:|--:|
"""


@dataclass(frozen=True)
class Case:
    """A line of the table. base: the case whose learning rate is taken, "" for its own."""

    name: str
    head: str
    changes: dict[str, str] = field(default_factory=dict)
    streams: Sequence[str] = BOTH
    base: str = ""


DIM = 64
_DIM = {"encode.*.blocks.0.linear.dim": f"{DIM}"}
_TCN = {**_DIM, "decode.0.tcn.channels": f"[{DIM}, {DIM}, {DIM}, {DIM}]"}
_DROPOUT = {"train.modality_dropout": f"{DROPOUT}"}
GAPPED = (
    Case("mamba", "mamba", _TCN),
    Case("mamba, dropout", "mamba", {**_TCN, **_DROPOUT}, base="mamba"),
    Case("crossattn", "crossattn-light"),
    Case("crossattn, dropout", "crossattn-light", _DROPOUT, base="crossattn"),
)
CASES = (
    Case("linear", "linear"),
    Case("tcn", "tcn", _TCN),
    Case("gru", "gru", {**_DIM, "decode.0.gru.dim": f"{DIM}"}),
    Case("transformer", "transformer", {**_DIM, "decode.0.transformer.ff": f"{4 * DIM}"}),
    Case("mamba2", "mamba2", _DIM),
    *GAPPED,
    Case("mamba, both ways", "mamba", {**_TCN, "causal": "false"}, base="mamba"),
    Case("mamba, no sound", "mamba", _TCN, ("mae",), base="mamba"),
    Case("crossattn, not near", "crossattn-light", {"cross_attn.near": "false"}, base="crossattn"),
    Case("crossattn, no sound", "crossattn-light", {}, ("mae",), base="crossattn"),
)
MAMBA_VA = Case("mamba-va", "mamba-va", streams=("mae",))  # 67 M parameters: as published, and one seed


@dataclass(frozen=True)
class Scale:
    """How much of everything. tuning: videos and epochs of the encoder's tuning. rates: tried by the first seed."""

    train: int = 60
    validation: int = 6
    test: int = 12
    length_s: float = 60.0
    rate_hz: float = 10.0
    tuning: tuple[int, int] = (64, 8)
    size: int = 96
    length: int = 600
    epochs: int = 12
    rates: tuple[float, ...] = (1e-3, 3e-3)
    seeds: int = 3
    cases: tuple[Case, ...] = CASES
    gapped: tuple[Case, ...] = GAPPED
    mamba_va_s: float = 3600.0  # skipped where it would take longer


FULL = Scale()
SMALL = Scale(
    2, 1, 2, 3.0, tuning=(2, 1), size=32, length=30, epochs=1, rates=(1e-3,), seeds=1,
    cases=CASES[:1], gapped=GAPPED[:1], mamba_va_s=0,
)  # fmt: skip


def results(folder: Path, small: bool = False) -> str:
    """Markdown: two sections with a table each. What `folder` holds of an earlier call is not computed again."""
    bench = _Bench(SMALL if small else FULL, folder)
    return bench.heads() + bench.gaps()


def shares(curves: dict[str, Track], truth: dict[str, dict[str, np.ndarray]]) -> dict[str, float]:
    """How much of the face, the voice and the old moods there is in curves (T, 2), where 1 is as much as in the labels.

    truth: clip id -> its `latents`. A mood is old where its cue ended more than FIELD_S ago; NaN where none is.
    """
    found = {}
    for column, (kind, weights) in enumerate((("v", VALENCE), ("a", AROUSAL))):
        y = np.concatenate([curves[id].values[:, column] for id in truth])
        parts = {name: np.concatenate([t[name] for t in truth.values()]) for name in weights}
        old = np.concatenate([_since_cue_s(t, kind) > CUE_S + FIELD_S for t in truth.values()])
        for name, share in _fit(y, parts, weights).items():
            found[name] = share
        found[f"mood_{kind}"] = _fit(y[old], {n: x[old] for n, x in parts.items()}, weights)[f"mood_{kind}"]
    return found


def _fit(y: np.ndarray, parts: dict[str, np.ndarray], weights: dict[str, float]) -> dict[str, float]:
    if not len(y):
        return dict.fromkeys(parts, float("nan"))
    columns = np.stack([np.ones(len(y)), *parts.values()], axis=1)
    coefficients = np.linalg.lstsq(columns, y, rcond=None)[0][1:]
    return {name: float(c / weights[name]) for name, c in zip(parts, coefficients, strict=True)}


def _since_cue_s(truth: dict[str, np.ndarray], kind: str) -> np.ndarray:
    """(T,) seconds since the last cue of a mood began; -inf before the first."""
    starts_s = np.concatenate([[np.inf], truth[f"cue_{kind}_s"]])
    return truth["times_s"] - starts_s[np.searchsorted(truth[f"cue_{kind}_s"], truth["times_s"], "right")]


class Gaps(nn.Module):
    """A trained network with rows hidden from it: a share of every stream's at random, or the whole of one stream."""

    def __init__(self, net: Network, share: float = 0.0, stream: str | None = None, seed: int = 0) -> None:
        super().__init__()
        self.net, self.share, self.stream = net, share, stream
        self.draw = torch.Generator().manual_seed(seed)

    def forward(
        self, streams: dict[str, Tensor], seen: dict[str, Tensor], start: Tensor | None = None
    ) -> dict[str, Tensor]:
        kept = {name: rows & self._stays(name, rows) for name, rows in seen.items()}
        blank = {
            name: x.masked_fill(~kept[name].reshape(*kept[name].shape, *[1] * (x.ndim - 2)), torch.nan)
            for name, x in streams.items()
        }
        return self.net(blank, kept, start)

    def _stays(self, name: str, rows: Tensor) -> Tensor:
        if name == self.stream:
            return torch.zeros_like(rows)
        return (torch.rand(rows.shape, generator=self.draw) >= self.share).to(rows.device)


class _Bench:
    """The puppets' features, and the runs on them."""

    def __init__(self, scale: Scale, folder: Path) -> None:
        self._scale, self._folder = scale, folder
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".gitignore").write_text("*\n")
        self._store = _features(scale, folder)
        names = [f"puppet_val_{n:02d}" for n in range(scale.validation + scale.test)]
        self._splits = {
            "train": [f"puppet_train_{n:02d}" for n in range(scale.train)],
            "validation": names[: scale.validation],
        }
        self._judged = names[scale.validation :]
        self._truth = {
            id: latents(0, "val", scale.validation + n, scale.length_s, scale.rate_hz)
            for n, id in enumerate(self._judged)
        }

    def heads(self) -> str:
        scale = self._scale
        self._train_all()
        rates = " and ".join(f"{rate:g}" for rate in scale.rates)
        facts = {**vars(scale), **VALENCE, **AROUSAL, "rates": rates}
        text = SAYS.format(**facts, field_s=FIELD_S, cue_s=CUE_S, dim=DIM)
        text += "".join(f"{self._row(case, scale.seeds)}\n" for case in scale.cases)
        needed_s = self._needs_s()
        if needed_s <= scale.mamba_va_s:
            return text + f"{self._row(MAMBA_VA, 1)}\n\nmamba-va as published, by one seed at one rate.\n"
        return text + (
            f"\nNot trained: mamba-va, which would take {needed_s / 60:.0f} min here, and is given "
            f"{scale.mamba_va_s / 60:.0f}.\n"
        )

    def gaps(self) -> str:
        names = ("whole", "rows", *reversed(BOTH))
        return SAYS_GAPS.format(gone=GONE, dropout=DROPOUT, seeds=self._scale.seeds) + "".join(
            f"| {case.name} | {' | '.join(self._gap_cells(case, names))} |\n" for case in self._scale.gapped
        )

    def _train_all(self) -> None:
        """All runs of the tables, a process a core: what is trained one after the other later is there already."""
        scale = self._scale
        cases = {c.name: c for c in (*scale.cases, *scale.gapped)}.values()
        tried = [(c, rate, 0) for c in cases if not c.base for rate in scale.rates]
        train_all([self._call(*what) for what in tried])
        train_all([self._call(c, self._rate(c), seed) for c in cases for seed in range(scale.seeds)])

    def _rate(self, case: Case) -> float:
        """The learning rate that the validation videos like best."""
        if case is MAMBA_VA:
            return self._scale.rates[0]
        base = next((c for c in (*CASES, *GAPPED) if c.name == case.base), case)
        scores = {rate: self._run(base, rate, 0).about["figures"]["mean"] for rate in self._scale.rates}
        return max(scores, key=lambda rate: scores[rate])

    def _row(self, case: Case, seeds: int) -> str:
        rate = self._rate(case)
        found: dict[str, list[float]] = {}
        for seed in range(seeds):
            for key, value in self._measured(self._run(case, rate, seed)).items():
                found.setdefault(key, []).append(value)
        cells = [spread(values) for values in list(found.values())[:-2]]
        parameters, seconds = found["parameters"][0], np.mean(found["seconds"])
        return f"| {case.name} | {rate:g} | {' | '.join(cells)} | {parameters:,.0f} | {seconds:.0f} s |"

    def _measured(self, run: Run) -> dict[str, float]:
        """In the order of the table's columns."""
        clips = self._clips(run)
        net = run.network()
        raw = _curves(run, net, clips)
        face = run.face_stream
        as_it_is = {c.id: finish(raw[c.id], faces_of(c, face)) for c in clips}
        smoothed = {c.id: finish(raw[c.id], faces_of(c, face), run.smoothing) for c in clips}
        ccc, part = figures(as_it_is, clips), shares(as_it_is, self._truth)
        lines = (run.path / "metrics.jsonl").read_text().splitlines()
        return {
            **ccc,
            "smoothed": figures(smoothed, clips)["mean"],
            "face": (part["v_face"] + part["a_face"]) / 2,
            "voice": part["a_sound"],
            "mood_v": part["mood_v"],
            "mood_a": part["mood_a"],
            "parameters": sum(p.numel() for p in net.parameters()),
            "seconds": sum(json.loads(line)["seconds"] for line in lines),
        }

    def _gap_cells(self, case: Case, names: Sequence[str]) -> Iterator[str]:
        rate, seeds = self._rate(case), range(self._scale.seeds)
        found = np.array([self._gapped(self._run(case, rate, seed), names) for seed in seeds])
        for name, column in zip(names, found.T, strict=True):
            lost = "" if name == "whole" else f" ({column.mean() - found[:, 0].mean():+.3f})"
            yield spread(column) + lost

    def _gapped(self, run: Run, names: Sequence[str]) -> list[float]:
        clips, net, face = self._clips(run), run.network(), run.face_stream
        means = []
        for name in names:
            gaps = Gaps(net, GONE if name == "rows" else 0.0, name if name in BOTH else None).eval()
            raw = _curves(run, gaps, clips)
            means.append(figures({c.id: finish(raw[c.id], faces_of(c, face)) for c in clips}, clips)["mean"])
        return means

    def _clips(self, run: Run) -> list[Clip]:
        """The videos to judge by, from the tracks the run was trained on."""
        media: dict[str, Any] = {}
        videos = self._store.videos()
        for id in self._judged:
            tracks = videos[id]["tracks"]
            names = {name: stream["track"] for name, stream in run.about["streams"].items()}
            media[id] = {name: tracks[of]["media"] for name, of in {**names, "label.va": "label.va"}.items()}
        return load_clips(self._store, {**run.about, "judged": media}, "judged")

    def _run(self, case: Case, rate: float, seed: int) -> Run:
        return train_here(*self._call(case, rate, seed))

    def _call(self, case: Case, rate: float, seed: int) -> tuple[Any, ...]:
        """What train_here wants. Runs of other code than today's lie in another folder."""
        name = f"{case.name.replace(', ', '-').replace(' ', '-')}-{rate:g}-{seed}"
        return (
            self._store.path,
            self._preset(case, rate),
            self._folder / f"runs-{code()}",
            name,
            seed,
            self._splits,
        )

    def _preset(self, case: Case, rate: float) -> Preset:
        scale = self._scale
        alike = {
            "windows.length": scale.length,
            "windows.stride": scale.length,
            "train.batch": 1,
            "train.lr": rate,
            "train.epochs": scale.epochs,
            "train.patience": scale.epochs,
        }
        changes = {key: str(value) for key, value in alike.items()} | case.changes
        return load_preset(case.head, changes, list(case.streams))

    def _needs_s(self) -> float:
        """Seconds that Mamba-VA's training would take, from a step on noise (the second: the first one warms up)."""
        scale, preset = self._scale, self._preset(MAMBA_VA, self._rate(MAMBA_VA))
        dim = self._run(CASES[0], self._rate(CASES[0]), 0).dims["mae"]
        net = Network(preset, {"mae": dim})
        loss, optimizer = whole_loss(net, preset.train), make_optimizer(net, preset.train)
        known = torch.ones(1, scale.length, dtype=torch.bool)
        batch = Batch(
            rows=torch.arange(scale.length)[None],
            streams={"mae": torch.randn(1, scale.length, dim)},
            seen={"mae": known},
            labels=torch.rand(1, scale.length, 2),
            labelled=known,
        )
        for _ in range(2):
            began = time.perf_counter()
            loss(batch).backward()
            optimizer.step()
            took_s = time.perf_counter() - began
        return took_s * scale.train * scale.epochs


def train_here(
    store: Path, preset: Preset, runs: Path, name: str, seed: int, splits: dict[str, list[str]]
) -> Run:
    """Trained, or taken from `runs` where it is."""
    if not (runs / name / "run.json").exists():
        print(f"  training {name}", file=sys.stderr)
    return train(Store(store), preset, runs=runs, name=name, seed=seed, tell=lambda _: None, splits=splits)


def train_all(calls: Sequence[tuple[Any, ...]]) -> None:
    """train_here of every call, a process with one thread for each core; one after the other on a GPU."""
    processes = 1 if torch.cuda.is_available() else os.cpu_count() or 1
    with ProcessPoolExecutor(processes, get_context("spawn"), initializer=_start_worker) as pool:
        for future in [pool.submit(train_here, *call) for call in calls]:
            future.result()


def _start_worker() -> None:
    torch.set_num_threads(1)
    threading.Thread(target=end_with_parent, daemon=True).start()


def code() -> str:
    """A digest of stage two's source: what was trained by other code says nothing of today's."""
    digest = hashlib.sha256()
    for path in sorted(Path(temporal.__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _features(scale: Scale, folder: Path) -> Store:
    """The puppets, an encoder tuned on other puppets, and its features and the log-mel of all of them in a store."""
    make_puppets(
        folder / "puppets", scale.train, scale.validation + scale.test, scale.length_s, scale.rate_hz
    )
    store = Store(folder / "features.zarr", create=True)
    encoder, (videos, epochs) = folder / "encoder.safetensors", scale.tuning
    if not encoder.exists():
        other = folder / "tuning"
        make_puppets(other, videos, max(1, videos // 8), scale.length_s / 6, scale.rate_hz, seed=1)
        finetune(
            find(other),
            store,
            encoder,
            model="test_vit",
            from_scratch=True,
            size=scale.size,
            frames_per_video=100,
            epochs=epochs,
        )
    encoders = make_encoders(BOTH, {"mae": {"weights": str(encoder)}}, store.fingerprints)
    outcomes = extract(find(folder / "puppets"), encoders, store)
    assert all(outcome.complete for outcome in outcomes), [o.problem for o in outcomes if o.problem]
    return store


def _curves(run: Run, net: nn.Module, clips: list[Clip]) -> dict[str, Track]:
    preset = run.preset
    patched = Network(preset, run.dims).patched
    return raw_curves(cast(Network, net), Windows(clips, preset.windows, preset.train.batch, "cpu", patched))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ablation", description=__doc__)
    parser.add_argument("--small", action="store_true", help="tiny data, tables that say nothing")
    parser.add_argument("--folder", type=Path, default=KEPT, help="where features and runs are kept")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="vacli-ablation-") as aside:
        print(results(Path(aside) if asked.small else asked.folder, asked.small))
