"""What a run is made of: the videos of a store that can be trained on, their split, and the recipe of every stream."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import VacliError
from ..store import Store
from ..store.labels import UNLABELLED
from .model import Network
from .predict import open_run
from .preset import Preset
from .published import read_charon
from .vgg import read_weights

_HELD_OUT_SHARE = 0.2
_NO_FEATURES = {"label.va", "faces"}  # tracks that say where and what is known, and show nothing
# Who of a video an id means: Aff-Wild2's 12_left and 12_right, our own clip_person2; the digits of a plain_id after it.
_WHO = re.compile(r"((?:_(?:left|right|person\d+))+)(-[0-9a-f]{8})?$")
_UNSAID = "means, deviations and stand-ins of its streams, as it does not say which features those were"
Tell = Callable[[str], None]


def videos_of(store: Store, preset: Preset, tell: Tell = print) -> dict[str, dict[str, Any]]:
    """The videos that the preset can be trained on or judged by: id -> {"split", "rows"}, sorted by id.

    split: the data set's own, "train", "validation" or None; its test videos are not here. rows: those with a valid
    label. Raises VacliError as `train` does.
    """
    labelled, streams, label = _labelled(store, preset)
    members = _members(store, labelled, streams, label, tell)
    return {v: {"split": labelled[v]["split"], "rows": rows} for v, (_, rows) in members.items()}


def check_seed(seed: int) -> None:
    """Raises VacliError for a seed of more than 63 bits, which no random generator takes."""
    if not -(2**63) <= seed < 2**63:
        raise VacliError(
            f"the seed has {seed.bit_length()} bits; wanted one between -2^63 and 2^63 - 1, such as 0"
        )


def run_folder(runs: str | Path, name: str) -> Path:
    """Where the run `name` lies: in `runs`, a/b two folders deep. Raises VacliError for a name that leads elsewhere."""
    parts = Path(name).parts
    if not parts or Path(name).is_absolute() or ".." in parts or "\0" in name:
        raise VacliError(
            f"--name {name!r} is no name of a run; wanted that of a folder inside {runs}, such as mamba-1"
        )
    return Path(runs) / name


def make_plan(
    store: Store, preset: Preset, runs: Path, seed: int, tell: Tell, splits: dict[str, list[str]] | None
) -> dict[str, Any]:
    """The run.json of the run to be: preset, seed, splits, every stream's recipe, every video's media.

    "settings" is the digest of all that decides the result. Raises VacliError as `train` does.
    """
    check_seed(seed)
    labelled, streams, label = _labelled(store, preset)
    members = {v: media for v, (media, _) in _members(store, labelled, streams, label, tell).items()}
    if splits is None:
        splits = own_splits({v: labelled[v]["split"] for v in members}, seed, tell)
    else:
        _check_splits(splits, members)
    about: dict[str, Any] = {
        "preset": preset.model_dump(),
        "seed": seed,
        "streams": streams,
        "label": {**label, "step_s": _step_s(store, label, [members[v] for v in splits["train"]])},
        "started_from": _first_weights(store, preset, runs),
        **{split: {v: members[v] for v in sorted(splits[split])} for split in ("train", "validation")},
    }
    # where weights lie is no setting: the recipe has their hash, as `started_from` has
    of_streams = {name: {k: v for k, v in s.items() if k != "encoder"} for name, s in streams.items()}
    hashes = {
        key: {k: v for k, v in facts.items() if k != "file"} for key, facts in about["started_from"].items()
    }
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
    store: Store,
    labelled: dict[str, Any],
    streams: dict[str, dict[str, Any]],
    label: dict[str, Any],
    tell: Tell,
) -> dict[str, tuple[dict[str, str], int]]:
    """Labelled video -> the media of its labels and of the streams it has, and its rows with a valid label.

    One without a stream, or without a valid label, is nothing to learn from and not here.
    """
    found = {v: _media(facts, streams) for v, facts in labelled.items()}
    found = {v: media for v, media in found.items() if len(media) > 1}
    rows = {v: _valid_rows(store, label["recipe"], v, media["label.va"]) for v, media in found.items()}
    every, judged = len(store.videos()), sum(n > 0 for n in rows.values())
    if judged < every:
        tell(f"{every - judged} of {every} videos are left out: no valid label, or none of the streams")
    return {v: (media, rows[v]) for v, media in found.items() if rows[v]}


def _step_s(store: Store, label: dict[str, Any], members: list[dict[str, str]]) -> float | None:
    """Seconds from a label to the next, the median video's: what is learnt is read at such times (Run.clock)."""
    clocks = [store.get(label["recipe"], media["label.va"]).times_s for media in members]
    steps = [float(np.median(np.diff(times_s))) for times_s in clocks if len(times_s) > 1]
    return round(float(np.median(steps)), 6) if steps else None


def _valid_rows(store: Store, recipe: dict[str, Any], video_id: str, media: str) -> int:
    """How many rows of a video's labels are valid. Raises VacliError for labels that are none.

    Imported ones are checked nowhere else.
    """
    try:
        values = store.get(recipe, media).values
    except KeyError as e:
        raise VacliError(f"{store} lost the labels of {video_id}; extract or import them again") from e
    if values.shape[1:] != (2,):
        raise VacliError(
            f"label.va of {video_id} has rows of {values.shape[1:]}; wanted (2,), valence and arousal: import it again"
        )
    known = np.isfinite(values).all(1) & (values != UNLABELLED).all(1)
    odd = known & (np.abs(np.nan_to_num(values)) > 1).any(1)
    if odd.any():
        row = int(odd.argmax())
        pair = ", ".join(f"{v:g}" for v in values[row])
        raise VacliError(
            f"{video_id} row {row}: the label ({pair}) lies outside [-1, 1]; wanted valence and arousal in [-1, 1], "
            "NaN or -5 where unknown: scale them and import them again"
        )
    return int(known.sum())


def _stream(store: Store, name: str, videos: dict[str, Any]) -> dict[str, Any]:
    """The one recipe of a stream, with its dimension and encoder. `mae@<digits>` names one of several."""
    plain, _, wanted = name.partition("@")
    if plain in _NO_FEATURES:
        known = sorted(_features(videos))
        raise VacliError(
            f"the track {plain} cannot be a stream: it is no feature; there are {', '.join(known) or 'none'}"
        )
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
    return {t for facts in videos.values() for t in facts["tracks"]} - _NO_FEATURES


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
    if not held_out and rest:
        order = sorted(rest, key=lambda v: (hashlib.sha256(f"{seed} {video_of(v)}".encode()).digest(), v))
        last = video_of(order[max(1, round(_HELD_OUT_SHARE * len(order))) - 1])
        held_out = order[: max(i for i, v in enumerate(order, start=1) if video_of(v) == last)]
        rest = order[len(held_out) :]
        tell(f"no validation set: held out {len(held_out)} of {len(of)} videos by seed {seed}")
    if not rest:
        raise VacliError(
            f"{len(of)} video(s) with a valid label and a stream are too few: wanted at least one to train on and one "
            "to judge by; run `vacli extract` on more labelled videos"
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
                f"the {split} split names {min(unknown)}, which the store has no valid label of, or none of the "
                f"streams; wanted some of its {len(members)} videos that have"
            )
        if not splits[split]:
            raise VacliError(f"the {split} split is empty: wanted at least one video")


# ---- weights to start from -----------------------------------------------------------------------------------


def _first_weights(store: Store, preset: Preset, runs: Path) -> dict[str, dict[str, Any]]:
    """Key of the preset that names weights -> their file and SHA-256: tomorrow it may hold others.

    Of a run also "fuse" and "streams", the folders of its streams: which of its weights were fitted to what.
    """
    files = {
        f"encode.{name}.vgg.weights": Path(encode.vgg.weights)
        for name, encode in preset.encode.items()
        if encode.vgg is not None and encode.vgg.weights
    }
    of_run: dict[str, Any] = {}
    if preset.train.init_from:
        files["train.init_from"], of_run = _weights_of(preset.train.init_from, runs)
    found: dict[str, dict[str, Any]] = {
        key: {"file": str(file), "sha256": store.fingerprints.file(file)} for key, file in files.items()
    }
    if of_run:
        found["train.init_from"] |= of_run
    return found


def _weights_of(init_from: str, runs: Path) -> tuple[Path, dict[str, Any]]:
    """The weights of a run (its folder, its name in `runs`, or they themselves) and what they were fitted to.

    Or a file of weights, and nothing. Not by a head's name: its newest run is another one tomorrow. Raises VacliError.
    """
    given = Path(init_from)
    folders = [given.parent] if given.name == "weights.safetensors" else [given, runs / init_from]
    for folder in folders:
        if (folder / "run.json").exists():
            run = open_run(folder, runs)
            try:
                streams = [stream["folder"] for stream in run.about["streams"].values()]
            except (AttributeError, KeyError, TypeError) as e:
                raise VacliError(
                    f"cannot read {run.path / 'run.json'}: no streams in it; train the run again"
                ) from e
            return run.path / "weights.safetensors", {"fuse": run.preset.fuse, "streams": streams}
    if not given.is_file():
        raise VacliError(
            f"train.init_from = {init_from} is neither a run, here or in {runs}, nor a file; wanted a run's folder or "
            "name, a .safetensors of a run, or a published Mamba-VA checkpoint"
        )
    return given, {}


def start_from(net: Network, about: dict[str, Any], tell: Tell) -> None:
    """Take the tensors that a run.json's started_from["train.init_from"] names, where they mean here what they meant.

    Those of a run: of each stream that it had in the very recipe, wherever it stands, if its encoder is built alike;
    and all that lies behind the streams, by name and shape, if they are the same in the same order, fused alike.
    Those of a file, ours or a published Mamba-VA checkpoint, by name and shape: it does not say for which features, so
    where a stream is standardised it is by the training rows here, and what stands in for it is learned again.
    Raises VacliError for a file that cannot be read, or has nothing that fits.
    """
    started = about["started_from"]["train.init_from"]
    file, ours = Path(started["file"]), net.state_dict()
    found = _read_weights(file, ours)
    if "streams" in started:
        folders = [stream["folder"] for stream in about["streams"].values()]
        found, left_out = _renamed(found, ours, net, started, folders)
    else:
        strange = {
            name
            for i, encoder in enumerate(net.encode)
            if encoder.standardise
            for name in (f"absent.{i}", f"encode.{i}.mean", f"encode.{i}.deviation")
        }
        left_out = [_UNSAID] if strange & found.keys() else []
        found = {name: value for name, value in found.items() if name not in strange}
    fitting = {k: v for k, v in found.items() if k in ours and v.shape == ours[k].shape}
    if not fitting:
        raise VacliError(
            f"train.init_from = {file}: none of its {len(found)} tensors is one of this network's "
            f"{len(ours)} by name and shape; wanted weights of a like preset and like streams"
        )
    net.load_state_dict(fitting, strict=False)
    without = f"; left out: {'; '.join(left_out)}" if left_out else ""
    tell(f"{len(fitting)} of the network's {len(ours)} tensors come from {file}{without}")


_Tensors = dict[str, torch.Tensor]


def _read_weights(file: Path, ours: _Tensors) -> _Tensors:
    """Of our own names as they are; of another's, the published network's under ours."""
    found = read_weights(file) if file.suffix == ".safetensors" else {}
    return found if found.keys() & ours.keys() else read_charon(file)


def _renamed(
    found: _Tensors, ours: _Tensors, net: Network, started: dict[str, Any], folders: list[str]
) -> tuple[_Tensors, list[str]]:
    """A run's tensors that mean the same here, under the names they have here; and what was left out, in words.

    folders: of this run's streams, <track>@<recipe>.
    """
    theirs: list[str] = started["streams"]
    taken: _Tensors = {}
    left_out: list[str] = []
    tracks = [folder.partition("@")[0] for folder in theirs]
    for here, (stream, folder) in enumerate(zip(net.streams, folders, strict=True)):
        if folder not in theirs:
            why = "was made in another way there" if folder.partition("@")[0] in tracks else "was not there"
            left_out.append(f"{stream}, which {why}")
            continue
        there = theirs.index(folder)
        encoder = _moved(found, f"encode.{there}.", f"encode.{here}.")
        if {k: v.shape for k, v in encoder.items()} != {
            k: v.shape for k, v in ours.items() if k.startswith(f"encode.{here}.")
        }:
            left_out.append(f"{stream}, which is encoded in another way there")
            continue
        taken |= encoder
        if f"absent.{there}" in found:
            taken[f"absent.{here}"] = found[f"absent.{there}"]
        if here and there and theirs[0] == folders[0]:  # what the first stream asks this one
            taken |= _moved(found, f"ask.{there - 1}.", f"ask.{here - 1}.")
    if (theirs, started["fuse"]) == (folders, net.fuse):
        taken |= {k: v for k, v in found.items() if not k.startswith(("encode.", "absent.", "ask."))}
    else:
        was = f"{started['fuse']} of {', '.join(tracks)}"
        left_out.append(f"all behind the streams, which were fused as {was}")
    return taken, left_out


def _moved(tensors: _Tensors, there: str, here: str) -> _Tensors:
    return {here + k.removeprefix(there): v for k, v in tensors.items() if k.startswith(there)}
