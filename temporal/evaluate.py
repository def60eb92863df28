"""Judgement: CCC over all valid frames of a set of videos, and the smoothing chosen by it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from .. import VacliError
from ..store import Store, Track
from ..store.labels import ccc_of_tracks
from .predict import SMOOTH_CHOICES_S, Run, faces_of, finish, predict
from .windows import Clip


def figures(curves: dict[str, Track], clips: list[Clip]) -> dict[str, float]:
    """CCC of valence, of arousal and their mean over all labelled rows of all clips concatenated (ABAW's P_VA).

    Raises VacliError if no row is labelled.
    """
    pairs = [(curves[c.id].values, c.labels) for c in clips if c.labels is not None]
    if not any(np.isfinite(labels).any() for _, labels in pairs):
        raise VacliError(
            "the videos to judge by have no valid label: wanted at least one frame that is not -5"
        )
    valence, arousal = ccc_of_tracks(pairs)
    return {"valence": float(valence), "arousal": float(arousal), "mean": float(valence + arousal) / 2}


def choose_smoothing(raw: dict[str, Track], clips: list[Clip]) -> tuple[float, float]:
    """The half-widths in seconds, of SMOOTH_CHOICES_S, that give the best CCC of valence and of arousal here."""
    scores = []
    for half_s in SMOOTH_CHOICES_S:
        found = figures({c.id: finish(raw[c.id], faces_of(c), (half_s, half_s)) for c in clips}, clips)
        scores.append((found["valence"], found["arousal"]))
    valence, arousal = np.argmax(np.array(scores), axis=0)
    return SMOOTH_CHOICES_S[valence], SMOOTH_CHOICES_S[arousal]


def evaluate(run: Run, store: Store, smooth: bool = True) -> dict[str, Any]:
    """The run on its validation videos, from the very features it was trained on.

    Returns figures(), plus "videos" and "frames". Raises VacliError that says which feature is missing.
    """
    clips = load_clips(store, run.about, "validation")
    labels = [c.labels for c in clips if c.labels is not None]
    frames = int(sum(np.isfinite(y).all(axis=1).sum() for y in labels))
    return {**figures(predict(run, clips, smooth), clips), "videos": len(clips), "frames": frames}


def load_clips(store: Store, about: dict[str, Any], split: str) -> list[Clip]:
    """The clips of a run's split, by the recipes and media its run.json names; nothing else will do.

    Their clock is that of the labels, one row for a frame: also where a video has only the sound, at its own rate.
    Raises VacliError that says which track the store lacks.
    """
    dims = {name: stream["dim"] for name, stream in about["streams"].items()}

    def load(video_id: str, media: dict[str, str]) -> Clip:
        tracks = {name: _track(store, about, video_id, name, of) for name, of in media.items()}
        labels = tracks.pop("label.va")
        return Clip.on_clock(video_id, labels.times_s, tracks, dims, labels)

    with ThreadPoolExecutor(2) as pool:  # reading, checksums and copying all let go of the interpreter
        return list(pool.map(load, about[split].keys(), about[split].values()))


def _track(store: Store, about: dict[str, Any], video_id: str, name: str, media: str) -> Track:
    recipe = about["label"]["recipe"] if name == "label.va" else about["streams"][name]["recipe"]
    try:
        return store.get(recipe, media)
    except KeyError as e:
        raise VacliError(
            f"{store} lacks {name} of {video_id} in the recipe this run was trained on; "
            "run `vacli extract` on its videos again, with the encoder of run.json"
        ) from e
