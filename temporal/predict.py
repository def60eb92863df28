"""Inference: a trained run on clips, from windows' outputs to finished curves."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from .. import VacliError
from ..store import Track
from .model import Network, Preset, check_preset
from .windows import Clip, Windows

SMOOTH_CHOICES_S = (0.0, 0.2, 0.4, 0.8, 1.6, 3.2)  # half-widths of the moving average tried on validation


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
    def smooth_s(self) -> tuple[float, float]:
        valence, arousal = self.about["smooth_s"]
        return valence, arousal

    @property
    def finished(self) -> bool:
        return "figures" in self.about

    def network(self, device: torch.device | str = "cpu") -> Network:
        """The trained network in eval mode. Raises VacliError if its weights cannot be read or do not fit."""
        net = Network(self.preset, self.dims)
        weights = self.path / "weights.safetensors"
        try:
            net.load_state_dict(load_file(weights))
        except (OSError, SafetensorError, RuntimeError) as e:
            why = str(e).partition("\n")[0]
            raise VacliError(f"cannot use {weights}: {why}; train the run again under another --name") from e
        return net.eval().to(device)


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
    every = [r for r in (_read_run(p.parent) for p in Path(runs).glob("*/run.json")) if r]
    finished = [r for r in every if r.finished and wanted in (None, r.about["preset"]["name"])]
    if not finished:
        known = ", ".join(sorted(r.path.name + ("" if r.finished else " (not finished)") for r in every))
        asked = "finished run" if wanted is None else f"run {wanted}"
        raise VacliError(
            f"no {asked} in {runs} (there: {known or 'none'}): train one with `vacli train --head mamba`"
        )
    return max(finished, key=lambda r: r.about["finished_at"])


def _read_run(path: Path) -> Run | None:
    try:
        about = json.loads((path / "run.json").read_text())
        if "preset" not in about:
            raise ValueError("it does not say which preset")
        return Run(path, about)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as e:
        raise VacliError(f"cannot read {path / 'run.json'}: {e}; train the run again") from e


def best_device() -> torch.device:
    """The GPU, where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@torch.inference_mode()
def raw_curves(net: Network, windows: Windows, batch: int = 16) -> dict[str, Track]:
    """Clip id -> (T, 2) track, overlapping windows averaged, as the network has it: not filled, smoothed or clipped.

    Raises VacliError if the network gives anything but numbers.
    """
    index = torch.arange(len(windows), device=windows.starts.device)
    outputs = torch.cat([net(*windows.batch(part))["va"].cpu() for part in index.split(batch)])
    if not outputs.isfinite().all():
        raise VacliError(
            "the network's values are not finite, its training diverged: train it with a lower train.lr"
        )
    return windows.fold(outputs)


def finish(raw: Track, face: np.ndarray, smooth_s: tuple[float, float]) -> Track:
    """A raw curve made fit to hand out: smoothed, filled where no face is, clipped to [-1, 1].

    face: (T,) bool. Rows without a face are interpolated between their neighbours in time; without any face the
    network's own values stand (they rest on the sound, or on nothing). smooth_s: half-widths of the moving
    average for valence and arousal, in seconds; it averages rows with a face only, those beyond a shorter hole
    included, and never reaches further than its half-width.
    """
    if not face.any():
        face = np.ones(len(raw), bool)
    columns = []
    for column, half_s in zip(raw.values.T, smooth_s, strict=True):
        smooth = _moving_average(column[face].astype(np.float64), raw.times_s[face], half_s)
        columns.append(np.interp(raw.times_s, raw.times_s[face], smooth))
    return Track(np.clip(np.stack(columns, axis=1), -1, 1).astype(np.float32), raw.times_s)


def _moving_average(values: np.ndarray, times_s: np.ndarray, half_s: float) -> np.ndarray:
    """Mean of the rows within half_s of each row, by their times: right for any frame rate."""
    low = np.searchsorted(times_s, times_s - half_s - 1e-9)
    high = np.searchsorted(times_s, times_s + half_s + 1e-9, side="right")
    sums = np.concatenate([[0.0], np.cumsum(values)])
    return (sums[high] - sums[low]) / (high - low)


def faces_of(clip: Clip) -> np.ndarray:
    """(T,) bool: rows where the first stream, the one of the face, saw something."""
    return ~np.isnan(next(iter(clip.streams.values()))[:, 0])


def predict(
    run: Run, clips: list[Clip], smooth: bool = True, device: torch.device | str | None = None
) -> dict[str, Track]:
    """Clip id -> finished (T, 2) curve, valence and arousal in [-1, 1], a row for every row of the clip.

    device: best_device() unless told.
    """
    filled = [c for c in clips if len(c.times_s)]
    curves = {
        c.id: Track(np.empty((0, 2), np.float32), np.empty(0)) for c in clips
    }  # in the order of the clips
    if filled:
        device = device or best_device()
        windows = Windows(filled, run.preset.windows.length, run.preset.windows.stride, device)
        raw = raw_curves(run.network(device), windows)
        smooth_s = run.smooth_s if smooth else (0.0, 0.0)
        curves |= {c.id: finish(raw[c.id], faces_of(c), smooth_s) for c in filled}
    return curves
