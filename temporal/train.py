"""Training: a preset on the labelled videos of a store, straight from the cache, into a run folder."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import pickle
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from safetensors.torch import save as as_safetensors
from torch import nn

from .. import VacliError, __version__
from ..store import Store
from ..store.labels import ccc
from .evaluate import choose_smoothing, figures, load_clips
from .model import Network, Preset
from .predict import Run, best_device, faces_of, finish, open_run, raw_curves
from .windows import Clip, Windows

_HELD_OUT_SHARE = 0.2


def train(
    store: Store,
    preset: Preset,
    *,
    runs: str | Path = "runs",
    name: str | None = None,
    seed: int = 0,
    tell: Callable[[str], None] = print,
) -> Run:
    """Train the preset; stops early on the mean CCC of the validation videos and keeps the best weights.

    A run of the same settings goes on where it was stopped, to the same result; a finished one is returned as it
    is. tell: gets a line of progress per epoch. Raises VacliError if the store lacks a stream or labels, if the
    preset cannot be built for these streams, or if training diverges.
    """
    about = _plan(store, preset, seed, tell)
    torch.manual_seed(seed)
    dims = {stream: facts["dim"] for stream, facts in about["streams"].items()}
    net = Network(preset, dims)  # before the folder: a preset that cannot be built leaves nothing behind
    path = Path(runs) / (name or f"{preset.name}-{about['settings'][:8]}")
    try:
        state = _open(path, about)
        if state is None:
            tell(f"{path} is finished already, with the same settings, videos and features: nothing to train")
        else:
            _fit(store, preset, net, path, about, state, tell)
    except OSError as e:  # a full disk, no permission, a file in the way
        why = e.strerror or str(e)
        raise VacliError(f"cannot use {path}: {why}; mend it and run again: what is done is kept") from e
    return open_run(path)


# ---- what to train on ----------------------------------------------------------------------------------------


def _plan(store: Store, preset: Preset, seed: int, tell: Callable[[str], None]) -> dict[str, Any]:
    """The run.json of the run to be: preset, seed, every stream's recipe, every video's media."""
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
    label = {
        "folder": _one_folder("label.va", {f["tracks"]["label.va"]["folder"] for f in labelled.values()})
    }
    members = {v: _media(facts, streams) for v, facts in labelled.items()}
    members = {
        v: media for v, media in members.items() if len(media) > 1
    }  # a label alone is nothing to learn from
    if len(members) < len(videos):
        tell(
            f"{len(videos) - len(members)} of {len(videos)} videos are left out: no label, or none of the streams"
        )
    splits = _splits({v: labelled[v]["split"] for v in members}, seed, tell)
    about: dict[str, Any] = {
        "preset": preset.model_dump(),
        "seed": seed,
        "streams": streams,
        "label": {**label, "recipe": store.recipe_of(label["folder"])},
        **{split: {v: members[v] for v in ids} for split, ids in splits.items()},
    }
    # where the weights lie is no setting: the recipe has their hash
    of_streams = {name: {k: v for k, v in s.items() if k != "encoder"} for name, s in streams.items()}
    settings = json.dumps({**about, "streams": of_streams}, sort_keys=True)
    about["settings"] = hashlib.sha256(settings.encode()).hexdigest()
    return {**about, "versions": {"vacli": __version__, "torch": torch.__version__, "numpy": np.__version__}}


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
        dim = store.get(recipe, tracks[0]["media"]).values.shape[-1]
    except KeyError as e:  # it was found damaged, and set aside
        raise VacliError(f"{store.path} lost {folder}; run `vacli extract` on its videos again") from e
    return {
        "track": plain,
        "folder": folder,
        "recipe": recipe,
        "dim": dim,
        "encoder": tracks[0].get("encoder"),
    }


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


def _splits(of: dict[str, str | None], seed: int, tell: Callable[[str], None]) -> dict[str, list[str]]:
    """The data set's own split; where it has no validation videos, a seeded fifth of them is held out."""
    held_out = [v for v, split in of.items() if split == "validation"]
    rest = [v for v, split in of.items() if split != "validation"]
    if not held_out:
        order = sorted(rest, key=lambda v: hashlib.sha256(f"{seed} {v}".encode()).digest())
        held_out = order[: max(1, round(_HELD_OUT_SHARE * len(order)))]
        rest = order[len(held_out) :]
        tell(f"no validation set: held out {len(held_out)} of {len(of)} videos by seed {seed}")
    if not rest:
        raise VacliError(
            f"{len(of)} labelled video(s) are too few: wanted at least one to train on and one to judge by"
        )
    return {"train": sorted(rest), "validation": sorted(held_out)}


# ---- the run folder ------------------------------------------------------------------------------------------


def _open(path: Path, about: dict[str, Any]) -> dict[str, Any] | None:
    """Begin the run folder, or find where it stopped: the last epoch's state, {} at the start, None if finished."""
    record = path / "run.json"
    if record.exists():
        try:
            old = json.loads(record.read_text())
            same, finished = old["settings"] == about["settings"], "figures" in old
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise VacliError(f"cannot read {record}: {e}; remove {path} or give another --name") from e
        if not same:
            raise VacliError(
                f"{path} was trained with other settings, videos or features: give another --name"
            )
        if finished:
            return None
    path.mkdir(parents=True, exist_ok=True)
    _replace(record, json.dumps(about, indent=1).encode())
    return _read_state(path / "last.pt") if (path / "last.pt").exists() else {}


def _read_state(path: Path) -> dict[str, Any]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as e:
        raise VacliError(f"{path} is damaged or cannot be read; remove it to train from the start") from e


def _state_bytes(state: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def _weights_bytes(net: nn.Module) -> bytes:
    return as_safetensors({k: v.detach().cpu().contiguous() for k, v in net.state_dict().items()})


def _replace(path: Path, data: bytes) -> None:
    """Whole or as before, through kill -9 and power cut; what a killed run left aside is written over."""
    aside = path.with_name(f".{path.name}.part")
    with open(aside, "wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())
    os.replace(aside, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _append(path: Path, line: str) -> None:
    with open(path, "a", encoding="utf-8") as f:
        f.write(line + "\n")
        f.flush()
        os.fsync(f.fileno())


# ---- the loop ------------------------------------------------------------------------------------------------


def _fit(
    store: Store,
    preset: Preset,
    net: Network,
    path: Path,
    about: dict[str, Any],
    state: dict[str, Any],
    tell: Callable[[str], None],
) -> None:
    device = best_device()
    windows, judges = _load(store, preset, about, device)
    net.to(device).standardise_by(windows["train"].moments())
    optimizer = _optimizer(net, preset)
    epoch, best = 0, {"mean": -math.inf, "epoch": -1}
    if state:
        net.load_state_dict(state["net"])
        optimizer.load_state_dict(state["optimizer"])
        epoch, best = state["epoch"], state["best"]
        tell(f"going on with {path} after epoch {epoch}")
    parameters = sum(p.numel() for p in net.parameters())
    rows = {split: sum(map(len, w.times_s.values())) for split, w in windows.items()}
    tell(
        f"training {preset.name} ({parameters:,} parameters) on {len(about['train'])} videos, {rows['train']} rows; "
        f"judged by {len(judges)} videos, {rows['validation']} rows; on {device}"
    )
    metrics = path / "metrics.jsonl"
    lines = metrics.read_text().splitlines()[:epoch] if epoch else []
    _replace(metrics, "".join(f"{line}\n" for line in lines).encode())
    while epoch < preset.train.epochs and epoch - 1 - best["epoch"] < preset.train.patience:
        began = time.perf_counter()
        loss = _epoch(net, optimizer, windows["train"], preset, about["seed"], epoch)
        found = _judge(net.eval(), windows["validation"], judges)
        if found["mean"] > best["mean"]:
            best = {"mean": found["mean"], "epoch": epoch}
            _replace(path / "weights.safetensors", _weights_bytes(net))
        epoch += 1
        seconds = time.perf_counter() - began
        _append(metrics, json.dumps({"epoch": epoch, "loss": loss, "ccc": found, "seconds": seconds}))
        state = {"net": net.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch, "best": best}
        # last: killed before this, the whole epoch is done again, to the same weights and the same line
        _replace(path / "last.pt", _state_bytes(state))
        tell(
            f"epoch {epoch}/{preset.train.epochs}  loss {loss:.3f}  CCC V {found['valence']:.3f} "
            f"A {found['arousal']:.3f} mean {found['mean']:.3f}  best {best['mean']:.3f}  "
            f"{rows['train'] / seconds:,.0f} rows/s  at most {(preset.train.epochs - epoch) * seconds:.0f} s left"
        )
    _finish(path, about, net, windows["validation"], judges)


def _load(
    store: Store, preset: Preset, about: dict[str, Any], device: torch.device
) -> tuple[dict[str, Windows], list[Clip]]:
    """The windows of both splits, and the validation clips to judge by; the training clips are let go."""
    spec = preset.windows
    windows = {"train": Windows(load_clips(store, about, "train"), spec.length, spec.stride, device)}
    judges = load_clips(store, about, "validation")
    windows["validation"] = Windows(judges, spec.length, spec.stride, device)
    for split, split_windows in windows.items():
        if not split_windows.labelled.any():
            raise VacliError(
                f"the {split} videos have no valid label: wanted at least one frame that is not -5"
            )
    return windows, judges


def _judge(net: Network, windows: Windows, clips: list[Clip]) -> dict[str, float]:
    """CCC of the curves before any smoothing."""
    raw = raw_curves(net, windows)
    return figures({c.id: finish(raw[c.id], faces_of(c), (0, 0)) for c in clips}, clips)


def _optimizer(net: Network, preset: Preset) -> torch.optim.Optimizer:
    """AdamW; Mamba's A and D do not decay, as in mamba-ssm: towards zero A would mean remembering everything."""
    kept = [p for name, p in net.named_parameters() if name.endswith((".A_log", ".D"))]
    rest = [p for name, p in net.named_parameters() if not name.endswith((".A_log", ".D"))]
    decays = [
        {"params": rest, "weight_decay": preset.train.weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(decays, lr=preset.train.lr)


def _epoch(
    net: Network, optimizer: torch.optim.Optimizer, windows: Windows, preset: Preset, seed: int, epoch: int
) -> float:
    """One pass over all windows in a seeded order; returns the mean loss, finite or VacliError. Its randomness
    depends on (seed, epoch) alone, so a resumed run repeats it exactly."""
    spec = preset.train
    torch.manual_seed(seed * 100_003 + epoch)
    order = torch.randperm(len(windows)).to(windows.starts.device)
    batches = order.split(spec.batch)
    net.train()
    total = torch.zeros((), device=order.device)
    for i, index in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = spec.lr * _warmup_cosine(epoch + i / len(batches), spec.warmup_epochs, spec.epochs)
        loss = va_loss(net(*windows.batch(index))["va"], *windows.targets(index))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), spec.clip_norm)
        optimizer.step()
        total += loss.detach()
    mean = float(total) / len(batches)
    if not math.isfinite(mean):
        raise VacliError(
            f"training diverged in epoch {epoch + 1}: the loss is {mean}; lower train.lr, now {spec.lr:g}"
        )
    return mean


def va_loss(predicted: torch.Tensor, labels: torch.Tensor, labelled: torch.Tensor) -> torch.Tensor:
    """(1 - CCC_valence) + (1 - CCC_arousal) over all labelled rows of the batch together (Mamba-VA, eq. 5).

    predicted, labels: (B, L, 2). labelled: (B, L) bool; the other rows count nowhere. A batch without any label
    gives 2 and a zero gradient.
    """
    weight = labelled.reshape(-1, 1).to(predicted.dtype)
    return (1 - ccc(predicted.reshape(-1, 2), labels.reshape(-1, 2), weight)).sum()


def _warmup_cosine(epoch: float, warmup_epochs: float, epochs: int) -> float:
    """Share of the learning rate at a fractional epoch: linear up, then half a cosine down to 0."""
    if epoch < warmup_epochs:
        return min(1.0, (epoch + 1e-3) / warmup_epochs)
    return 0.5 * (1 + math.cos(math.pi * (epoch - warmup_epochs) / max(1e-9, epochs - warmup_epochs)))


def _finish(path: Path, about: dict[str, Any], net: Network, windows: Windows, clips: list[Clip]) -> None:
    """Choose the smoothing with the best weights, write the figures: from now on the run is finished."""
    net.load_state_dict(load_file(path / "weights.safetensors"))
    raw = raw_curves(net.eval(), windows)
    smooth_s = choose_smoothing(raw, clips)
    curves = {c.id: finish(raw[c.id], faces_of(c), smooth_s) for c in clips}
    finished = {
        **about,
        "smooth_s": smooth_s,
        "figures": figures(curves, clips),
        "finished_at": datetime.now(UTC).isoformat(),
    }
    _replace(path / "run.json", json.dumps(finished, indent=1).encode())
    (path / "last.pt").unlink(missing_ok=True)
