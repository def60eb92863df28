"""Stores of made-up tracks for the tests of stage two: valence shows in `mae`, arousal in `logmel`, no video at all."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from vacli.store import Store, Track, folder_name
from vacli.temporal.preset import Preset, load_preset

RATE_HZ = 10.0
ROWS = 120
LABEL_RECIPE = {"track": "label.va", "version": 1}


def recipe(name: str, made_by: str = "toy") -> dict[str, Any]:
    return {"track": name, "version": 1, "made_by": made_by}


def walk(rng: np.random.Generator, rows: int) -> np.ndarray:
    """(rows,) in [-0.9, 0.9], smooth over about a second."""
    path = np.convolve(rng.standard_normal(rows + 20), np.hanning(12), mode="same")[10:-10]
    return 0.9 * path / np.abs(path).max()


def tracks_of(number: int, rows: int = ROWS) -> dict[str, Track]:
    """One video. mae (8-d) has a row of NaN where nobody is seen, label.va where nobody judged."""
    rng = np.random.default_rng(number)
    times_s = (np.arange(rows) + 0.5) / RATE_HZ
    labels = np.stack([walk(rng, rows), walk(rng, rows)], axis=1).astype(np.float32)
    sound_s = np.arange(0.005, rows / RATE_HZ, 0.01)
    mae = np.outer(labels[:, 0], np.linspace(-2, 3, 8)) + 0.1 * rng.standard_normal((rows, 8))
    loudness = np.interp(sound_s, times_s, labels[:, 1])
    logmel = np.outer(loudness, np.linspace(-3, 2, 4)) + 0.1 * rng.standard_normal((len(sound_s), 4))
    mae[number % 17 :: 17], labels[::13] = np.nan, np.nan
    return {
        "mae": Track(mae.astype(np.float16), times_s),
        "logmel": Track(logmel.astype(np.float16), sound_s),
        "label.va": Track(labels, times_s),
    }


def add_video(
    store: Store,
    number: int,
    split: str | None = "train",
    names: Iterable[str] = ("mae", "logmel", "label.va"),
    made_by: str = "toy",
    rows: int = ROWS,
    instead: dict[str, Track] | None = None,
) -> str:
    """Put and link a made-up video with the tracks of `names`, some of them `instead`; returns its id."""
    video_id, linked = f"v{number:02}", {}
    made = tracks_of(number, rows) | (instead or {})
    for name in names:
        how = LABEL_RECIPE if name == "label.va" else recipe(name, made_by)
        media = f"{number:02}" * 32
        store.put(how, media, made[name])
        linked[name] = {"folder": folder_name(how), "media": media}
    store.link(video_id, {"root": "toy", "media": f"{number:02}" * 32, "split": split}, linked)
    return video_id


def real_logmel(number: int, rows: int = ROWS) -> Track:
    """Log-mel on the clock and with the bands of the encoder of that name, for a network that reads its patches."""
    rng = np.random.default_rng(number)
    times_s = np.arange(round(rows / RATE_HZ * 100)) * 0.01 + 0.0125
    return Track(rng.standard_normal((len(times_s), 64)).astype(np.float16), times_s)


def make_store(path: Path, train: int = 6, validation: int = 3) -> Store:
    store = Store(path, create=True)
    for number in range(train + validation):
        add_video(store, number, "train" if number < train else "validation")
    return store


TINY: dict[str, dict[str, str]] = {
    "linear": {"windows.length": "50", "windows.stride": "40", "train.batch": "4", "train.epochs": "3"},
    "mamba": {
        "encode.*.blocks": "[{linear = {dim = 8}}]",
        "decode": "[{tcn = {channels = [8], width = 3, dropout = 0.1}}, {norm = {}},"
        " {mamba = {layers = 1, state = 4, conv = 3, expand = 1}}]",
        "tasks.va.hidden": "8",
        "windows.length": "50",
        "windows.stride": "40",
        "train.batch": "4",
        "train.epochs": "3",
        "train.warmup_epochs": "1",
        "train.lr": "0.01",
    },
}


def tiny(
    head: str, streams: list[str] | None = None, also: dict[str, str] | None = None, **train: float | str
) -> Preset:
    """A preset that comes with vacli, small enough for a test; also: keys to change, train: those of [train]."""
    changes = TINY[head] | (also or {}) | {f"train.{key}": str(value) for key, value in train.items()}
    return load_preset(head, changes, streams)
