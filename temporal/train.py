"""Training: a preset on the labelled videos of a store, straight from the cache, into a run folder."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import io
import json
import logging
import math
import os
import platform
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as as_safetensors

from .. import VacliError, __version__
from ..store import Store, disk
from .evaluate import choose_smoothing, figures, load_clips
from .fitting import Alone, Fit, check_alone, memory_told, warmup_epochs, whole_loss
from .model import Network
from .plan import Tell, make_plan, run_folder, start_from, videos_of
from .predict import Run, best_device, face_stream_of, faces_of, finish, open_run, raw_curves
from .preset import Preset
from .windows import Clip, Windows

__all__ = ["replace_file", "train", "videos_of"]

_log = logging.getLogger(__name__)
_DIGEST_BYTES = hashlib.sha256().digest_size
_UNREADABLE = "is damaged or cannot be read; remove it to train from the start"
_UNSURE = (
    ", where two runs of one seed may differ in the last digits (attention's backward pass, sums over packed videos); "
    "on a CPU they are the same"
)


def train(
    store: Store,
    preset: Preset,
    *,
    runs: str | Path = "runs",
    name: str | None = None,
    seed: int = 0,
    tell: Tell = print,
    splits: dict[str, list[str]] | None = None,
) -> Run:
    """Train the preset; stops early on the mean CCC of the validation videos and keeps the best weights.

    A run of the same settings goes on where it was stopped, to the same result; a finished one is returned as it
    is. tell: gets a line of progress per epoch. splits: {"train": ids, "validation": ids} instead of the data set's
    own. Raises VacliError if the store lacks a stream, a video or labels, if the preset cannot be built for these
    streams or on this device, if another process is training in the same folder, if memory does not suffice, or if
    training diverges.
    """
    spec = preset.train
    less = (
        f"set train.batch (now {spec.batch}), windows.length (now {preset.windows.length}) or train.precision "
        f"(now {spec.precision}) to less, or take a smaller head or fewer streams; what is done is kept"
    )
    device = best_device()
    if spec.precision == "float16" and device.type == "cpu":
        raise VacliError("train.precision = float16 wants a GPU; set bfloat16 or float32 on a CPU")
    if name:
        run_folder(runs, name)
    with memory_told(less):
        about = make_plan(store, preset, Path(runs), seed, tell, splits)
        net = _built(preset, about)  # before the folder: a preset that cannot be built leaves nothing behind
        path = run_folder(runs, name or f"{preset.name}-{about['settings'][:8]}")
        _log.info("%s of %s into %s, seed %d, on %s", preset.name, store, path, seed, device)
        try:
            with _alone_in(path):
                if _is_finished(path, about):
                    tell(
                        f"{path} is finished already, with the same settings, videos and features: nothing to train"
                    )
                else:
                    _Training(store, preset, net.to(device), path, about, tell).run()
        except OSError as e:  # a full disk, no permission, a file in the way
            why = e.strerror or str(e)
            raise VacliError(f"cannot use {path}: {why}; mend it and run again: what is done is kept") from e
    return open_run(path)


def _built(preset: Preset, about: dict[str, Any]) -> Network:
    """The network with its first weights, by the seed. Raises VacliError for a preset that cannot be built."""
    torch.manual_seed(about["seed"])
    dims = {stream: facts["dim"] for stream, facts in about["streams"].items()}
    try:
        with memory_told(f"preset {preset.name} is too large: set its widths, or the layers, to less"):
            net = Network(preset, dims)
    except (TypeError, OverflowError, RuntimeError) as e:  # sizes beyond what torch can count
        why = str(e).partition("\n")[0][:200]
        raise VacliError(f"preset {preset.name} cannot be built: {why}; set its sizes to less") from e
    check_alone(net, preset.train)
    return net


# ---- the training --------------------------------------------------------------------------------------------


class _Training:
    """One run being trained: its rows on the device, its folder, and where it is."""

    def __init__(
        self, store: Store, preset: Preset, net: Network, path: Path, about: dict[str, Any], tell: Tell
    ) -> None:
        self.preset, self.spec, self.net, self.path, self.about = preset, preset.train, net, path, about
        self.device = next(net.parameters()).device
        self.tell = tell
        self.windows, self.judges = _load(store, preset, about, net, self.device, tell)
        self.rows = {split: sum(map(len, w.times_s.values())) for split, w in self.windows.items()}
        self.best: dict[str, float] = {"mean": -math.inf, "epoch": -1}
        self.fell = -1  # the epoch after which the rate last fell
        self.done = 0  # epochs, of both stages
        self.state = _read_state(path / "last.pt") if (path / "last.pt").exists() else {}
        self._begin()

    def run(self) -> None:
        """Train what is left to train, and finish the run."""
        with _board(self.path, self.done) as self.board:
            if self.done < self.spec.alone_epochs or self._stopped_in("alone"):
                self._alone()
            fit = Fit(self.net, whole_loss(self.net, self.spec), self.spec, self.spec.epochs, self.spec.ema)
            if self._stopped_in("whole"):
                self._take_up(fit)
            while self._goes_on():
                self._whole(fit)
        net = fit.judged
        assert isinstance(net, Network)
        _finish(self.path, self.about, net, self.windows["validation"], self.judges)

    def _begin(self) -> None:
        """Where it stopped, or the network's first weights; then the run folder says what it is."""
        state = self.state
        if state:
            self.done, self.best, self.fell = state["epoch"], state["best"], state["fell"]
            self.tell(f"going on with {self.path} after epoch {self.done}")
            _log.info("read %s: stage %s", self.path / "last.pt", state["stage"])
        else:
            self.net.standardise_by(self.windows["train"].moments())
            self.net.start_vgg()
            if self.spec.init_from:
                start_from(self.net, self.about, self.tell)
        replace_file(self.path / "run.json", json.dumps(_record(self.about), indent=1).encode())
        metrics = self.path / "metrics.jsonl"
        lines: list[str] = []
        if self.done and metrics.exists():  # nothing rests on it: whatever is left of it will do
            lines = metrics.read_text(encoding="utf-8", errors="replace").splitlines()[: self.done]
        replace_file(metrics, "".join(f"{line}\n" for line in lines).encode())
        parameters = sum(p.numel() for p in self.net.parameters())
        self.tell(
            f"training {self.preset.name} ({parameters:,} parameters) on {len(self.about['train'])} videos, "
            f"{self.rows['train']} rows; judged by {len(self.judges)} videos, {self.rows['validation']} rows; "
            f"on {self.device}{_UNSURE if self.device.type == 'cuda' else ''}"
        )
        for key, epochs in (("alone_epochs", self.spec.alone_epochs), ("epochs", self.spec.epochs)):
            warm_up = warmup_epochs(self.spec, epochs)
            if epochs and warm_up < self.spec.warmup_epochs:
                self.tell(
                    f"train.warmup_epochs = {self.spec.warmup_epochs:g} is all of train.{key} = {epochs} or more: "
                    f"the rate rises over {warm_up:.2g} epochs"
                )

    def _take_up(self, fit: Fit) -> None:
        try:
            fit.load(self.state["fit"])
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as e:  # another torch's
            raise VacliError(f"{self.path / 'last.pt'} {_UNREADABLE}") from e

    def _stopped_in(self, stage: str) -> bool:
        return self.state.get("stage") == stage

    def _goes_on(self) -> bool:
        epoch = self.done - self.spec.alone_epochs
        return epoch < self.spec.epochs and epoch - 1 - self.best["epoch"] < self.spec.patience

    def _alone(self) -> None:
        """The streams by themselves, each with a head that is thrown away in the end."""
        alone = Alone(self.net, self.spec).to(self.device)
        fit = Fit(alone, alone.loss, self.spec, self.spec.alone_epochs)
        if self._stopped_in("alone"):
            self._take_up(fit)
        while self.done < self.spec.alone_epochs:
            began = time.perf_counter()
            loss = self._pass(fit, self.done)
            seconds = time.perf_counter() - began
            line = {"epoch": self.done + 1, "stage": "alone", "loss": loss, "seconds": seconds}
            self._save(fit, "alone", line)
            self.tell(
                f"alone {self.done}/{self.spec.alone_epochs}  loss {loss:.3f}  "
                f"{self.rows['train'] / seconds:,.0f} rows/s"
            )

    def _whole(self, fit: Fit) -> None:
        """One epoch of the whole network: train, judge, keep what is best, lower the rate on a plateau."""
        began = time.perf_counter()
        epoch = self.done - self.spec.alone_epochs
        loss = self._pass(fit, epoch)
        net = fit.judged
        assert isinstance(net, Network)
        found = _judge(net.eval(), self.windows["validation"], self.judges, self.about)
        weights = self.path / "weights.safetensors"
        if found["mean"] > self.best["mean"]:
            self.best = {"mean": found["mean"], "epoch": epoch}
            replace_file(weights, _weights_bytes(net))
        # as torch's ReduceLROnPlateau counts: with a patience of 0 the first epoch that is no better is enough
        no_better = epoch - max(self.best["epoch"], self.fell)
        if self.spec.schedule == "plateau" and no_better > self.spec.plateau_patience:
            fit.fall(_best_weights(self.path))
            self.fell = epoch
        seconds = time.perf_counter() - began
        self._save(fit, "whole", {"epoch": epoch + 1, "loss": loss, "ccc": found, "seconds": seconds})
        left_s = (self.spec.epochs - epoch - 1) * seconds
        self.tell(
            f"epoch {epoch + 1}/{self.spec.epochs}  loss {loss:.3f}  CCC V {found['valence']:.3f} "
            f"A {found['arousal']:.3f} mean {found['mean']:.3f}  best {self.best['mean']:.3f}  "
            f"{self.rows['train'] / seconds:,.0f} rows/s  at most {left_s:.0f} s left"
        )

    def _pass(self, fit: Fit, epoch: int) -> float:
        """Its randomness depends on the run's seed and the epoch alone, so a resumed run repeats it exactly."""
        seed = (self.about["seed"] * 100_003 + self.done) % 2**63  # as large as torch takes
        return fit.epoch(self.windows["train"], epoch, seed, self.tell)

    def _save(self, fit: Fit, stage: str, line: dict[str, Any]) -> None:
        self.done += 1
        self.board(self.done, line)
        _append(self.path / "metrics.jsonl", json.dumps(line))
        where = {"stage": stage, "epoch": self.done, "best": self.best, "fell": self.fell}
        # last: killed before this, the whole epoch is done again, to the same weights and the same line
        replace_file(self.path / "last.pt", _state_bytes({**where, "fit": fit.state()}))


def _load(
    store: Store, preset: Preset, about: dict[str, Any], net: Network, device: torch.device, tell: Tell
) -> tuple[dict[str, Windows], list[Clip]]:
    """The windows of both splits, and the validation clips to judge by; the training clips are let go."""
    windows: dict[str, Windows] = {}
    for split in ("train", "validation"):
        clips = load_clips(store, about, split)
        windows[split] = Windows(clips, preset.windows, preset.train.batch, device, net.patched)
    wanted, length = preset.windows.length, windows["train"].length
    if not preset.windows.whole and length < wanted:
        tell(f"windows of {wanted} rows are longer than every training video: they are cut to {length} rows")
    return windows, clips


def _judge(net: Network, windows: Windows, clips: list[Clip], about: dict[str, Any]) -> dict[str, float]:
    """CCC of the curves before any smoothing."""
    raw = raw_curves(net, windows)
    return figures({c.id: finish(raw[c.id], faces_of(c, face_stream_of(about))) for c in clips}, clips)


def _finish(path: Path, about: dict[str, Any], net: Network, windows: Windows, clips: list[Clip]) -> None:
    """Choose the smoothing with the best weights, write the figures: from now on the run is finished."""
    net.load_state_dict(_best_weights(path))
    raw = raw_curves(net.eval(), windows)
    face = face_stream_of(about)
    smoothing = choose_smoothing(raw, clips, face)
    curves = {c.id: finish(raw[c.id], faces_of(c, face), smoothing) for c in clips}
    finished = {
        **_record(about),
        "smoothing": smoothing,
        "figures": figures(curves, clips),
        "finished_at": datetime.now(UTC).isoformat(),
    }
    replace_file(path / "run.json", json.dumps(finished, indent=1).encode())
    (path / "last.pt").unlink(missing_ok=True)


# ---- the run folder ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _alone_in(path: Path) -> Iterator[None]:
    """The run folder, for this process alone; one that was made for nothing is removed. Raises VacliError, OSError."""
    path.mkdir(parents=True, exist_ok=True)
    with disk.open_folder(path) as fd:
        if disk.lock(fd, wait=False) is False:
            raise VacliError(
                f"{path} is being trained by another process: wait for it, or give another --name"
            )
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # it is not empty, as a rule
                path.rmdir()


def _is_finished(path: Path, about: dict[str, Any]) -> bool:
    """Raises VacliError for a run of other settings, and for one that cannot be read."""
    record = path / "run.json"
    if not record.exists():
        for other in ("folds.json", "journal.log"):
            if (path / other).exists():
                raise VacliError(f"{path} holds folds or a sweep ({other}): give another --name")
        return False
    try:
        old = json.loads(record.read_text())
        same, finished = old["settings"] == about["settings"], "figures" in old
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise VacliError(f"cannot read {record}: {e}; remove {path} or give another --name") from e
    if not same:
        raise VacliError(f"{path} was trained with other settings, videos or features: give another --name")
    return finished


def _record(about: dict[str, Any]) -> dict[str, Any]:
    """The plan, and what it is carried out with."""
    device = best_device()
    versions = {"vacli": __version__, "python": platform.python_version(), "torch": torch.__version__}
    return {
        **about,
        "versions": {**versions, "numpy": np.__version__},
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"cpu {platform.machine()}",
    }


def _read_state(path: Path) -> dict[str, Any]:
    """What the last whole epoch left. Raises VacliError."""
    try:
        data = path.read_bytes()
        digest, payload = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
        if hashlib.sha256(payload).digest() != digest:
            raise ValueError("its bytes are not those that were written")
        state = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
        missing = {"stage", "epoch", "best", "fell", "fit"} - state.keys()
        if missing:
            raise ValueError(f"it lacks {min(missing)}")
    except MemoryError:
        raise
    except Exception as e:  # whatever an unpickler can raise
        raise VacliError(f"{path} {_UNREADABLE}") from e
    return state


def _state_bytes(state: dict[str, Any]) -> bytes:
    """Behind the SHA-256 of what torch writes: torch itself notices few bits that flipped."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    payload = buffer.getvalue()
    return hashlib.sha256(payload).digest() + payload


def _best_weights(path: Path) -> dict[str, torch.Tensor]:
    """Those of the best epoch so far. Raises VacliError, OSError."""
    try:
        return load_file(path / "weights.safetensors")
    except (FileNotFoundError, SafetensorError) as e:
        raise VacliError(
            f"cannot read {path / 'weights.safetensors'}: {e}; remove {path / 'last.pt'} to train from the start"
        ) from e


def _weights_bytes(net: Network) -> bytes:
    return as_safetensors({k: v.detach().cpu().contiguous() for k, v in net.state_dict().items()})


def replace_file(path: Path, data: bytes) -> None:
    """Whole or as before, through kill -9 and power cut; what a killed run left aside is written over."""
    aside = path.with_name(f".{path.name}.part")
    with open(aside, "wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())
    os.replace(aside, path)
    disk.sync_folder(path.parent)


def _append(path: Path, line: str) -> None:
    with open(path, "a", encoding="utf-8") as f:
        f.write(line + "\n")
        f.flush()
        os.fsync(f.fileno())


@contextlib.contextmanager
def _board(path: Path, done: int) -> Iterator[Callable[[int, dict[str, Any]], None]]:
    """What shows an epoch's metrics in TensorBoard, where it is installed: called with the epoch and its line."""
    writer = _summary_writer()
    if writer is None:
        yield lambda epoch, line: None
        return
    board = writer(str(path), purge_step=done + 1)  # a killed run's epoch is shown once

    def show(epoch: int, line: dict[str, Any]) -> None:
        for key, value in {**line, **line.get("ccc", {})}.items():
            if isinstance(value, float):
                board.add_scalar(key, value, epoch)
        board.flush()

    with contextlib.closing(board):
        yield show


def _summary_writer() -> Any:
    for name in ("torch.utils.tensorboard", "tensorboardX"):
        with contextlib.suppress(ImportError):
            return importlib.import_module(name).SummaryWriter
    return None
