"""Inference: a trained run on clips, from windows' outputs to finished curves."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from .. import VacliError
from ..store import Track
from .fitting import memory_told
from .model import Network, encode_of
from .preset import Preset, check_preset, preset_names
from .smoothing import TARGETS, Smoothing, check_smoothing, smoothed
from .windows import Batch, Clip, Windows

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """A trained run folder: preset, weights, and the recipe of every stream it saw (`about`, its run.json)."""

    path: Path
    about: dict[str, Any]

    @property
    def preset(self) -> Preset:
        return check_preset(self.about["preset"], str(self.path))

    @property
    def dims(self) -> dict[str, int]:
        return {name: stream["dim"] for name, stream in self.about["streams"].items()}

    @property
    def patched(self) -> set[str]:
        """The streams whose log-mel the network reads as patches: their clips keep the track itself."""
        return patched_of(self.preset)

    @property
    def face_stream(self) -> str:
        return face_stream_of(self.about)

    def clock(self, times_s: np.ndarray) -> np.ndarray:
        """The times (N,) to read a video's tracks at, whose frames are at times_s (T,): on a clock like the labels'.

        Labels of a second, say, teach what a mean over a second means. Frames that are not much closer than the labels
        were are taken as they are.
        """
        step_s = self.about.get("label", {}).get("step_s")
        if step_s is None or len(times_s) < 2 or step_s < 1.5 * np.median(np.diff(times_s)):
            return times_s
        return np.arange(times_s[0] + step_s / 2, max(times_s[-1], times_s[0] + step_s), step_s)

    @property
    def smoothing(self) -> Smoothing:
        """What was chosen on its validation videos. Raises VacliError if run.json has something else there."""
        found = self.about.get("smoothing")
        if found is None:  # a run of an older vacli: half-widths of boxes
            half_s = self.about.get("smooth_s", ())
            found = {target: {"kind": "box", "half_s": s} for target, s in zip(TARGETS, half_s, strict=False)}
        return check_smoothing(found, str(self.path / "run.json"))

    @property
    def finished(self) -> bool:
        return "figures" in self.about

    def network(self, device: torch.device | str = "cpu") -> Network:
        """The trained network in eval mode. Raises VacliError if its weights cannot be read or do not fit."""
        net = Network(self.preset, self.dims)
        weights = self.path / "weights.safetensors"
        _log.info("reading %s for %s", weights, device)
        try:
            net.load_state_dict(load_file(weights))
        except (OSError, SafetensorError, RuntimeError) as e:
            why = str(e).partition("\n")[0]
            raise VacliError(f"cannot use {weights}: {why}; train the run again under another --name") from e
        return net.eval().to(device)

    def __hash__(self) -> int:
        return hash(self.path)


@lru_cache(maxsize=8)
def _kept_network(run: Run, device: str, written_ns: int) -> Network:
    """The networks of a run's folds: `vacli predict` asks for each again with every video."""
    return run.network(device)


def open_run(wanted: str | Path | None, runs: str | Path = "runs") -> Run:
    """A finished run: a folder, a name in `runs`, the newest one of a head by the head's name, or the newest of all.

    Raises VacliError if there is none, or if the one asked for is not finished.
    """
    if wanted is not None:
        run = _read_run(Path(wanted)) or _read_run(Path(runs) / wanted)
        if run is not None and not run.finished:
            raise VacliError(
                f"run {run.path} is not finished: go on with the `vacli train` command that began it"
            )
        if run is not None:
            return run
    every = [r for r in map(_whole_run, Path(runs).glob("*/run.json")) if r]
    finished = [r for r in every if r.finished and wanted in (None, r.about["preset"]["name"])]
    if not finished:
        there = {r.path.name: "" if r.finished else " (not finished)" for r in every}
        there |= {p.parent.name: f" ({_folds_in(p)})" for p in Path(runs).glob("*/folds.json")}
        known = ", ".join(f"{name}{state}" for name, state in sorted(there.items()))
        asked = "finished run" if wanted is None else f"run {wanted}"
        head = wanted if wanted in preset_names() else "mamba"
        raise VacliError(
            f"no {asked} in {runs} (there: {known or 'none'}): train one with `vacli train --head {head}`"
        )
    return max(finished, key=lambda r: r.about["finished_at"])


def _whole_run(record: Path) -> Run | None:
    """One of several runs: what cannot be read does not keep the others from being found."""
    try:
        return _read_run(record.parent)
    except VacliError:
        return None


def _folds_in(record: Path) -> str:
    """What a folds.json is of, in words; folds.py opens them."""
    try:
        return "folds" if "figures" in json.loads(record.read_text()) else "folds, not finished"
    except (OSError, ValueError, TypeError):
        return "folds that cannot be read"


def _read_run(path: Path) -> Run | None:
    try:
        about = json.loads((path / "run.json").read_text())
        if not isinstance(about["preset"]["name"], str):
            raise ValueError("it does not say which preset")
        if "figures" in about and not isinstance(about["finished_at"], str):
            raise ValueError("it does not say when it was finished")
        return Run(path, about)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as e:
        raise VacliError(f"cannot read {path / 'run.json'}: {e}; train the run again") from e


def best_device() -> torch.device:
    """The GPU, where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def patched_of(preset: Preset) -> set[str]:
    """The streams that a trainable VGG reads; what Network.patched has, without building one."""
    return {name for name in preset.streams if encode_of(preset, name).vgg is not None}


def face_stream_of(about: dict[str, Any]) -> str:
    """The stream of a run.json whose rows say where a face was: its first that is not made from sound.

    What hears says at which rate, in its recipe or in that of its front end. A run on sound alone has its first
    stream for it; so has one on imported features, which do not say what they are.
    """
    streams = list(about["streams"])
    return next((name for name in streams if not _hears(about["streams"][name].get("recipe"))), streams[0])


def _hears(recipe: Any) -> bool:
    return isinstance(recipe, dict) and ("rate_hz" in recipe or any(map(_hears, recipe.values())))


@torch.inference_mode()
def raw_curves(net: Network, windows: Windows) -> dict[str, Track]:
    """Clip id -> (T, 2) track, overlapping windows averaged, as the network has it: not filled, smoothed or clipped.

    The network is taken as it is: in eval mode, on the device of the windows. Raises VacliError if it gives anything
    but numbers.
    """

    def outputs() -> Iterator[tuple[Batch, torch.Tensor]]:
        finite = torch.ones((), dtype=torch.bool, device=windows.device)
        for batch in windows.batches():
            values = net(batch.streams, batch.seen, batch.start)["va"].float()
            finite &= values.isfinite().all()  # asked once at the end: asking would wait for the device
            yield batch, values
        if not finite:
            raise VacliError(
                "the network's values are not finite, its training diverged: train it with a lower train.lr"
            )

    return windows.fold(outputs())


def finish(raw: Track, face: np.ndarray, smooth: Smoothing | None = None) -> Track:
    """A raw curve made fit to hand out: smoothed, filled where no face is, clipped to [-1, 1].

    face: (T,) bool. Rows without a face are interpolated between their neighbours in time; without any face the
    network's own values stand (they rest on the sound, or on nothing). smooth: a kernel for valence and one for
    arousal, None for neither; it averages rows with a face only, those beyond a shorter hole included, and never
    reaches further than it says.
    """
    if not face.any():
        face = np.ones(len(raw), bool)
    values, times_s = raw.values[face].astype(np.float64), raw.times_s[face]
    if smooth is not None and smooth["valence"] == smooth["arousal"]:
        values = smoothed(values, times_s, smooth["valence"])
    elif smooth is not None:
        columns = [
            smoothed(values[:, k : k + 1], times_s, smooth[target]) for k, target in enumerate(TARGETS)
        ]
        values = np.concatenate(columns, axis=1)
    whole = np.empty(raw.values.shape)
    whole[face] = values
    if not face.all():
        columns = [np.interp(raw.times_s[~face], times_s, column) for column in values.T]
        whole[~face] = np.stack(columns, axis=1)
    return Track(np.clip(whole, -1, 1).astype(np.float32), raw.times_s)


def faces_of(clip: Clip, stream: str | None = None) -> np.ndarray:
    """(T,) bool: rows where the stream of the face (Run.face_stream) saw something; the first stream unless told.

    Every row, where the network reads no stream but patches of log-mel.
    """
    if stream is None or stream not in clip.streams:
        stream = next(iter(clip.streams), None)
    return np.ones(len(clip.times_s), bool) if stream is None else ~np.isnan(clip.streams[stream][:, 0])


def predict(
    run: Run, clips: list[Clip], smooth: bool = True, device: torch.device | str | None = None
) -> dict[str, Track]:
    """Clip id -> finished (T, 2) curve, valence and arousal in [-1, 1], a row for every row of the clip.

    device: best_device() unless told. Raises VacliError for weights that cannot be used, and what Windows raises.
    """
    smoothing = run.smoothing if smooth else None
    raw = predict_raw(run, clips, device)
    return {c.id: finish(raw[c.id], faces_of(c, run.face_stream), smoothing) for c in clips}


def on_frames(curve: Track, times_s: np.ndarray) -> Track:
    """The curve (N, 2), of Run.clock, at the frames' times (T,): linear between its rows, the ends held."""
    if np.array_equal(curve.times_s, times_s):
        return curve
    columns = [np.interp(times_s, curve.times_s, column) for column in curve.values.T]
    return Track(np.stack(columns, axis=1).astype(np.float32), times_s)


def predict_raw(run: Run, clips: list[Clip], device: torch.device | str | None = None) -> dict[str, Track]:
    """Clip id -> the network's own (T, 2) curve; by windows as in training, or whole videos where it saw whole ones."""
    filled = [c for c in clips if len(c.times_s)]
    for clip in filled:
        _check_streams(run, clip)
    curves = {
        c.id: Track(np.empty((0, 2), np.float32), np.empty(0)) for c in clips
    }  # in the order of the clips
    if filled:
        device = device or best_device()
        weights = run.path / "weights.safetensors"
        net = _kept_network(run, str(device), weights.stat().st_mtime_ns if weights.exists() else 0)
        preset = run.preset
        with memory_told("predict on a CPU (CUDA_VISIBLE_DEVICES=), or fewer or shorter videos at once"):
            windows = Windows(filled, preset.windows, preset.train.batch, device, net.patched)
            curves |= raw_curves(net, windows)
    return curves


def _check_streams(run: Run, clip: Clip) -> None:
    """Raises VacliError unless the clip has the streams of the run, of their dims."""
    dims = run.dims
    found = {name: values.shape[1] for name, values in clip.streams.items()}
    wanted = {name: dim for name, dim in dims.items() if name not in run.patched}
    if found != wanted:
        raise VacliError(
            f"{clip.id} has the streams {found}, {run.path} was trained on {wanted}: make the clip with "
            "Clip.on_clock(..., run.dims, patched=run.patched)"
        )
