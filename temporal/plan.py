"""What a run is made of: the videos of a store that can be trained on, their split, and the recipe of every stream."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .. import VacliError
from ..store import Store
from .predict import open_run
from .preset import Preset

_HELD_OUT_SHARE = 0.2
# Who of a video an id means: Aff-Wild2's 12_left and 12_right, our own clip_person2; the digits of a plain_id after it.
_WHO = re.compile(r"((?:_(?:left|right|person\d+))+)(-[0-9a-f]{8})?$")
Tell = Callable[[str], None]


def videos_of(store: Store, preset: Preset, tell: Tell = print) -> dict[str, dict[str, Any]]:
    """The videos that the preset can be trained on or judged by: id -> {"split", "rows"}, sorted by id.

    split: the data set's own, "train", "validation" or None; its test videos are not here. rows: of the labels, one
    a frame. Raises VacliError as `train` does.
    """
    labelled, streams, label = _labelled(store, preset)
    rows = {}
    for video_id in _members(store, labelled, streams, tell):
        entry = store.entry_of(label["recipe"], labelled[video_id]["tracks"]["label.va"]["media"])
        try:
            rows[video_id] = store.record(entry)["arrays"]["values"]["shape"][0]
        except KeyError as e:
            raise VacliError(f"{store} lost the labels of {video_id}; extract or import them again") from e
    return {v: {"split": labelled[v]["split"], "rows": n} for v, n in rows.items()}


def make_plan(
    store: Store, preset: Preset, runs: Path, seed: int, tell: Tell, splits: dict[str, list[str]] | None
) -> dict[str, Any]:
    """The run.json of the run to be: preset, seed, splits, every stream's recipe, every video's media.

    "settings" is the digest of all that decides the result. Raises VacliError as `train` does.
    """
    labelled, streams, label = _labelled(store, preset)
    members = _members(store, labelled, streams, tell)
    if splits is None:
        splits = own_splits({v: labelled[v]["split"] for v in members}, seed, tell)
    else:
        _check_splits(splits, members)
    about: dict[str, Any] = {
        "preset": preset.model_dump(),
        "seed": seed,
        "streams": streams,
        "label": label,
        "started_from": _first_weights(store, preset, runs),
        **{split: {v: members[v] for v in sorted(splits[split])} for split in ("train", "validation")},
    }
    # where weights lie is no setting: the recipe has their hash, as `started_from` has
    of_streams = {name: {k: v for k, v in s.items() if k != "encoder"} for name, s in streams.items()}
    hashes = {key: facts["sha256"] for key, facts in about["started_from"].items()}
    settings = json.dumps({**about, "streams": of_streams, "started_from": hashes}, sort_keys=True)
    about["settings"] = hashlib.sha256(settings.encode()).hexdigest()
    return about


def _labelled(
    store: Store, preset: Preset
) -> tuple[dict[str, Any], dict[str, dict[str, Any]], dict[str, Any]]:
    """The labelled videos but for test ones; the one recipe of each stream, and of the labels."""
    videos = store.videos()
    labelled = {
        v: facts for v, facts in videos.items() if "label.va" in facts["tracks"] and facts["split"] != "test"
    }
    if not labelled:
        raise VacliError(
            f"none of the {len(videos)} videos of {store.path} is labelled; extract an Aff-Wild2 folder, "
            "or put clip.txt (header valence,arousal; a line per frame) beside clip.mp4"
        )
    streams = {name: _stream(store, name, labelled) for name in preset.streams}
    folder = _one_folder("label.va", {f["tracks"]["label.va"]["folder"] for f in labelled.values()})
    return labelled, streams, {"folder": folder, "recipe": store.recipe_of(folder)}


def _members(
    store: Store, labelled: dict[str, Any], streams: dict[str, dict[str, Any]], tell: Tell
) -> dict[str, dict[str, str]]:
    """Labelled video -> the media of its labels and of the streams it has; one without any is nothing to learn from."""
    found = {v: _media(facts, streams) for v, facts in labelled.items()}
    found = {v: media for v, media in found.items() if len(media) > 1}
    every = len(store.videos())
    if len(found) < every:
        tell(f"{every - len(found)} of {every} videos are left out: no label, or none of the streams")
    return found


def _stream(store: Store, name: str, videos: dict[str, Any]) -> dict[str, Any]:
    """The one recipe of a stream, with its dimension and encoder. `mae@<digits>` names one of several."""
    plain, _, wanted = name.partition("@")
    tracks = [f["tracks"][plain] for f in videos.values() if plain in f["tracks"]]
    known = sorted({t["folder"] for t in tracks} if tracks else _features(videos))
    tracks = [t for t in tracks if t["folder"].partition("@")[2].startswith(wanted)]
    if not tracks:
        raise VacliError(
            f"no labelled video of {store.path} has a track {name}; there are {', '.join(known) or 'none'}: "
            f"extract it with `vacli extract --encoder {plain}`, or choose with --stream"
        )
    folder = _one_folder(plain, {t["folder"] for t in tracks})
    recipe = store.recipe_of(folder)
    try:
        dim = store.map(recipe, tracks[0]["media"]).values.shape[-1]
    except KeyError as e:  # it was found damaged, and set aside
        raise VacliError(f"{store.path} lost {folder}; run `vacli extract` on its videos again") from e
    encoder = tracks[0].get("encoder")
    return {"track": plain, "folder": folder, "recipe": recipe, "dim": dim, "encoder": encoder}


def _features(videos: dict[str, Any]) -> set[str]:
    """The names of all tracks that can be a stream."""
    return {t for facts in videos.values() for t in facts["tracks"]} - {"label.va", "faces"}


def _one_folder(name: str, folders: set[str]) -> str:
    if len(folders) > 1:
        mend = "extract all videos alike"
        if name != "label.va":  # a stream can be chosen
            mend += ", or choose " + " or ".join(f"--stream {f}" for f in sorted(folders))
        raise VacliError(
            f"the videos' {name} was made in {len(folders)} different ways, which never mix: {mend}"
        )
    (folder,) = folders
    return folder


def _media(facts: dict[str, Any], streams: dict[str, dict[str, Any]]) -> dict[str, str]:
    tracks = facts["tracks"]
    found = {"label.va": tracks["label.va"]["media"]}
    for name, stream in streams.items():
        track = tracks.get(stream["track"])
        if track is not None and track["folder"] == stream["folder"]:
            found[name] = track["media"]
    return found


def own_splits(of: dict[str, str | None], seed: int, tell: Tell) -> dict[str, list[str]]:
    """The data set's own split; where it has no validation videos, a seeded fifth of them is held out.

    People of one video are held out together.
    """
    held_out = [v for v, split in of.items() if split == "validation"]
    rest = [v for v, split in of.items() if split != "validation"]
    if not held_out:
        order = sorted(rest, key=lambda v: (hashlib.sha256(f"{seed} {video_of(v)}".encode()).digest(), v))
        last = video_of(order[max(1, round(_HELD_OUT_SHARE * len(order))) - 1])
        held_out = order[: max(i for i, v in enumerate(order, start=1) if video_of(v) == last)]
        rest = order[len(held_out) :]
        tell(f"no validation set: held out {len(held_out)} of {len(of)} videos by seed {seed}")
    if not rest:
        raise VacliError(
            f"{len(of)} labelled video(s) are too few: wanted at least one to train on and one to judge by"
        )
    return {"train": rest, "validation": held_out}


def video_of(video_id: str) -> str:
    """The id of the video that a person's id is of: 12 of 12_left."""
    return _WHO.sub("", video_id)


def _check_splits(splits: dict[str, list[str]], members: dict[str, Any]) -> None:
    """Raises VacliError for splits that share a video, lack any, or name one that cannot be trained on."""
    both = set(splits["train"]) & set(splits["validation"])
    if both:
        raise VacliError(f"{min(both)} is in both splits: nothing can be judged by what it was trained on")
    for split in ("train", "validation"):
        unknown = set(splits[split]) - members.keys()
        if unknown:
            raise VacliError(
                f"the {split} split names {min(unknown)}, which the store has no labels or none of the streams of; "
                f"wanted some of its {len(members)} videos that have"
            )
        if not splits[split]:
            raise VacliError(f"the {split} split is empty: wanted at least one video")


# ---- weights to start from -----------------------------------------------------------------------------------


def _first_weights(store: Store, preset: Preset, runs: Path) -> dict[str, dict[str, str]]:
    """Key of the preset that names weights -> their file and SHA-256: tomorrow it may hold others."""
    files = {
        f"encode.{name}.vgg.weights": Path(encode.vgg.weights)
        for name, encode in preset.encode.items()
        if encode.vgg is not None and encode.vgg.weights
    }
    if preset.train.init_from:
        files["train.init_from"] = _weights_of(preset.train.init_from, runs)
    return {key: {"file": str(file), "sha256": store.fingerprints.file(file)} for key, file in files.items()}


def _weights_of(init_from: str, runs: Path) -> Path:
    """The weights of a run (its folder, or its name in `runs`), or a file of weights. Raises VacliError.

    Not by a head's name: its newest run is another one tomorrow.
    """
    for folder in (Path(init_from), runs / init_from):
        if (folder / "run.json").exists():
            return open_run(folder, runs).path / "weights.safetensors"
    if not Path(init_from).is_file():
        raise VacliError(
            f"train.init_from = {init_from} is neither a run, here or in {runs}, nor a file; wanted a run's folder or "
            "name, a .safetensors of a run, or a published Mamba-VA checkpoint"
        )
    return Path(init_from)
