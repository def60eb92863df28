"""The training loop of stage one: what fine-tuning and pre-training share, on one device or under torchrun on many."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import pickle
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.scheduler.cosine_lr import CosineLRScheduler
from timm.utils.model_ema import ModelEmaV3
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from .. import VacliError
from ..store.disk import sync_folder

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_CHECKPOINT = "vacli training 1"  # what a checkpoint says it is
_CHECKPOINT_EVERY_S = 600.0  # within an epoch: one of Aff-Wild2 lasts for hours
_NEVER = timedelta(days=7)  # process 0 may look for faces for days; a dead one torchrun notices itself

Loss = Callable[[nn.Module, Any], torch.Tensor]
Judge = Callable[[nn.Module], dict[str, float]]


@dataclass(frozen=True)
class Settings:
    """How to train. AdamW; the rate climbs over the first `warm_up` share of all updates, then falls as a cosine.

    ema: decay of the moving average of the weights, which is then what is judged and kept. dtype: what the network
    computes in; the weights stay float32. patience: epochs without a better score after which it stops. accumulate:
    batches whose gradients make one update.
    """

    epochs: int
    lr: float
    weight_decay: float = 0.05
    warm_up: float = 0.1
    clip_norm: float = 1.0
    ema: float | None = None
    dtype: str = "float32"
    patience: int | None = None
    accumulate: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        whole = {"epochs": self.epochs, "accumulate": self.accumulate, "patience": self.patience}
        wrong = [f"--{name} {n}: wanted at least 1" for name, n in whole.items() if n is not None and n < 1]
        wrong += [] if 0 < self.lr < math.inf else [f"--lr {self.lr}: wanted more than 0"]
        wrong += [] if self.weight_decay >= 0 else [f"--weight-decay {self.weight_decay}: wanted 0 or more"]
        wrong += [] if 0 <= self.warm_up < 1 else [f"warm-up {self.warm_up}: wanted a share in [0, 1)"]
        wrong += [] if self.ema is None or 0 < self.ema < 1 else [f"--ema {self.ema}: wanted one in (0, 1)"]
        wrong += [] if self.seed >= 0 else [f"--seed {self.seed}: wanted 0 or more"]
        wrong += [] if self.dtype in DTYPES else [f"--dtype {self.dtype}: wanted one of {', '.join(DTYPES)}"]
        if wrong:
            raise VacliError("; ".join(wrong))


@dataclass(frozen=True)
class Fitted:
    """state: the weights kept, whole, on the CPU: the best by score, or the last where nobody judged.

    history: of every epoch {"epoch": from 1, "loss": mean, "lr": last, **what the judge said}. best: of the epoch kept.
    """

    state: dict[str, torch.Tensor]
    history: list[dict[str, float]]
    best: dict[str, float]


def fit(
    net: nn.Module,
    groups: list[dict[str, Any]],
    loss_of: Loss,
    batches: Callable[[int], Iterable[Any]],
    steps_per_epoch: int,
    settings: Settings,
    *,
    resume: Path | None = None,
    about: Mapping[str, Any] | None = None,
    judge: Judge | None = None,
    desc: str = "training",
) -> Fitted:
    """Train `net`, which is on its device; what has no gradient stays as it is.

    groups: the optimizer's, as timm's param_groups_* make them (`lr_scale` is heeded). loss_of(net, batch) -> scalar:
    it must reach the parameters by calling net(...) alone; the random state before it is a function of (seed, epoch,
    step, process). batches(epoch), epoch from 0, gives the same `steps_per_epoch` ones whenever it is called: make
    them cheap (row numbers) and read pixels in loss_of, as a resumed epoch draws those it has done again. judge(net)
    is called after every epoch in eval mode without gradients, under every process; its "score" is maximised.

    resume: a checkpoint, written after every epoch and every ten minutes; the same call goes on from there, on a
    CPU to the same bits. It holds what moves alone, so `about` (JSON) must name what the rest comes from; a
    checkpoint of another `about`, other settings or another net is refused, never written over: it may be a day's
    work. `forget` removes it, once what came of it is safe.

    Under torchrun every process calls this with the same arguments; gradients are averaged over them, so batches(...)
    are to be the whole ones, and loss_of takes its `share`, of equal size everywhere, and a loss that is no mean over
    rows (CCC) gathers by `whole`. Raises VacliError where training diverges or the checkpoint cannot be used.
    """
    if settings.patience and judge is None:
        raise ValueError("patience without a judge: nothing to be patient about")
    with team():
        loop = _Loop(net, groups, loss_of, steps_per_epoch, settings, resume, dict(about or {}))
        return loop.run(batches, judge, desc)


def forget(resume: Path) -> None:
    """Remove a checkpoint and what a killed process left beside it."""
    for path in (resume, _aside(resume)):
        path.unlink(missing_ok=True)


def seed_of(*parts: int) -> int:
    """One seed of several numbers, as seed, epoch, step: near ones give unrelated streams."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0])


# ---- many processes ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def team() -> Iterator[torch.device]:
    """The device to train on: a GPU where there is one. Under torchrun the processes join, and part at the end.

    Within another `team` it only tells the device.
    """
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or distributed.is_initialized():
        yield device
        return
    distributed.init_process_group(
        "nccl" if cuda else "gloo", timeout=_NEVER, device_id=device if cuda else None
    )
    try:
        yield device
    finally:
        distributed.destroy_process_group()


def rank() -> int:
    """Which process of the team this is; 0 speaks and writes."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def world() -> int:
    """How many processes there are."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def first_alone(work: Callable[[], Any]) -> Any:
    """What `work` returns, done by process 0 alone; the others wait and are sent it (it must be picklable)."""
    done = [work() if rank() == 0 else None]
    if world() > 1:
        distributed.broadcast_object_list(done, src=0)
    return done[0]


def share(rows: torch.Tensor) -> torch.Tensor:
    """This process's part of rows (N, ...): (ceil(N / world), ...), the last ones filled up with -1."""
    each = -(-len(rows) // world())
    filled = rows.new_full((each * world(), *rows.shape[1:]), -1)
    filled[: len(rows)] = rows
    return filled[rank() * each : (rank() + 1) * each]


def whole(part: torch.Tensor) -> torch.Tensor:
    """The parts (n, ...) of all processes, in order: (world * n, ...); all of the same shape.

    The gradient of what is computed of it is as if one process had all rows: every process sends back through its
    own part, `world` times, since DistributedDataParallel takes the mean.
    """
    if world() == 1:
        return part
    parts = [torch.empty_like(part) for _ in range(world())]
    distributed.all_gather(parts, part.detach().contiguous())
    if part.requires_grad:
        parts[rank()] = part.view_as(part)
        parts[rank()].register_hook(lambda gradient: gradient * world())
    return torch.cat(parts)


# ---- the loop ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Place:
    """Where a run is: epochs done, batches done in the next one and the sum of their losses, updates in all."""

    epoch: int = 0
    step: int = 0
    loss_sum: float = 0.0
    updates: int = 0


class _Loop:
    """A net in training with all that belongs to it: what a checkpoint has to hold."""

    def __init__(
        self,
        net: nn.Module,
        groups: list[dict[str, Any]],
        loss_of: Loss,
        steps_per_epoch: int,
        settings: Settings,
        resume: Path | None,
        about: dict[str, Any],
    ) -> None:
        self.settings, self._loss_of, self._steps, self._resume = settings, loss_of, steps_per_epoch, resume
        self._net = net
        self._device = next(net.parameters()).device
        self._ema = ModelEmaV3(net, settings.ema, use_warmup=True) if settings.ema else None
        self._optimizer = torch.optim.AdamW(groups, lr=settings.lr, weight_decay=settings.weight_decay)
        self._scaler = torch.amp.GradScaler(self._device.type, enabled=settings.dtype == "float16")
        updates = settings.epochs * math.ceil(steps_per_epoch / settings.accumulate)
        warm_up = int(settings.warm_up * updates)
        fall = updates + 1 - warm_up  # it ends one update before zero
        self._schedule = CosineLRScheduler(
            self._optimizer, fall, warmup_t=warm_up, warmup_prefix=True, t_in_epochs=False
        )
        said = {**about, **asdict(settings), "steps_per_epoch": steps_per_epoch}
        self._about = json.loads(json.dumps(said))
        self._place = _Place()
        self._history: list[dict[str, float]] = []
        self._best: dict[str, float] = {}
        self._kept: dict[str, torch.Tensor] = {}
        if resume is not None and resume.exists():
            self._load(_read(resume))
        if world() > 1:
            self._refuse_disagreement()
            net = DistributedDataParallel(net, gradient_as_bucket_view=True)
        self._wrapped = net

    def run(self, batches: Callable[[int], Iterable[Any]], judge: Judge | None, desc: str) -> Fitted:
        with tqdm(
            total=self.settings.epochs * self._steps,
            initial=self._place.epoch * self._steps + self._place.step,
            desc=desc,
            unit="batch",
            dynamic_ncols=True,
            mininterval=1,
            **({"disable": True} if rank() else {}),  # not False, as the default heeds --quiet
        ) as bar:
            while self._place.epoch < self.settings.epochs and not self._out_of_patience():
                loss = self._epoch(batches(self._place.epoch), bar)
                rate = max(group["lr"] for group in self._optimizer.param_groups)
                line = self._judged(judge, {"epoch": self._place.epoch + 1, "loss": loss, "lr": rate})
                self._place = _Place(self._place.epoch + 1, updates=self._place.updates)
                self._save()
                bar.set_postfix_str(" ".join(f"{k} {v:.3g}" for k, v in line.items() if k != "lr"))
        state = {k: v.detach().cpu().clone() for k, v in self._net.state_dict().items()}
        return Fitted(state | self._kept, self._history, self._best)

    def _epoch(self, batches: Iterable[Any], bar: tqdm) -> float:
        """What is left of an epoch; returns its mean loss."""
        self._net.train()
        start = self._place
        loss_sum, step = start.loss_sum, start.step
        losses: list[torch.Tensor] = []  # on the device, summed up when somebody has to wait for it anyway
        due_s = time.monotonic() + _CHECKPOINT_EVERY_S
        for step, batch in enumerate(itertools.islice(batches, start.step, None), start.step + 1):
            losses.append(self._step(step - 1, batch))
            bar.update()
            if self._closes(step) and step < self._steps and time.monotonic() > due_s:
                loss_sum = self._sum(loss_sum, losses)
                self._place = replace(self._place, step=step, loss_sum=loss_sum)
                self._save()
                due_s = time.monotonic() + _CHECKPOINT_EVERY_S
        if step != self._steps:
            raise ValueError(f"epoch {start.epoch} had {step} batches; wanted {self._steps}")
        mean = torch.tensor([self._sum(loss_sum, losses) / self._steps], dtype=torch.float64)
        return float(whole(mean.to(self._device)).mean())

    def _sum(self, loss_sum: float, losses: list[torch.Tensor]) -> float:
        """The sum with the losses, which are taken. Raises VacliError where it is no number."""
        for loss in torch.stack(losses).tolist() if losses else []:
            loss_sum += loss  # one by one: a run that was stopped between has the same sum
        losses.clear()
        if math.isfinite(loss_sum):
            return loss_sum
        mend = "try a lower --lr" + (", or --dtype bfloat16" if self.settings.dtype == "float16" else "")
        raise VacliError(f"training diverged in epoch {self._place.epoch + 1}: the loss is no number; {mend}")

    def _closes(self, done: int) -> bool:
        """Whether an update follows after so many batches of an epoch."""
        return done % self.settings.accumulate == 0 or done == self._steps

    def _step(self, step: int, batch: Any) -> torch.Tensor:
        """One batch, and the update if it is the last of those that make one; returns its loss, detached."""
        settings, place = self.settings, self._place
        torch.manual_seed(seed_of(settings.seed, place.epoch, step, rank()))
        updates = self._closes(step + 1)
        group = min(settings.accumulate, self._steps - step // settings.accumulate * settings.accumulate)
        alone = isinstance(self._wrapped, DistributedDataParallel) and not updates
        with self._wrapped.no_sync() if alone else contextlib.nullcontext():  # type: ignore[operator]
            with casting(self._device, settings.dtype):
                loss = self._loss_of(self._wrapped, batch)
            self._scaler.scale(loss / group).backward()
        if updates:
            self._update()
        return loss.detach()

    def _update(self) -> None:
        updates = self._place.updates + 1
        self._schedule.step_update(updates)
        self._scaler.unscale_(self._optimizer)
        tuned = [p for g in self._optimizer.param_groups for p in g["params"]]
        nn.utils.clip_grad_norm_(tuned, self.settings.clip_norm)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad()
        if self._ema:
            self._ema.update(self._net, updates)
        self._place = replace(self._place, updates=updates)

    @torch.no_grad()
    def _judged(self, judge: Judge | None, line: dict[str, float]) -> dict[str, float]:
        """Add the epoch to the history; keep its weights if they are the best so far, or nobody judges."""
        candidate = self._ema.module if self._ema else self._net
        if judge is not None:
            self._net.eval()
            with casting(self._device, self.settings.dtype):
                verdict = judge(candidate)
            line |= first_alone(lambda: verdict)  # one for all processes, who may differ in the last bit
        self._history.append(line)
        if judge is None or not self._best or _worth(line) > _worth(self._best):
            self._best = line
            self._kept = {k: v.detach().cpu().clone() for k, v in self._moving(candidate).items()}
        return line

    def _out_of_patience(self) -> bool:
        patience = self.settings.patience
        return bool(patience and self._best and self._history[-1]["epoch"] - self._best["epoch"] >= patience)

    # ---- the checkpoint --------------------------------------------------------------------------------------

    def _moving(self, net: nn.Module) -> dict[str, torch.Tensor]:
        """What training changes: parameters with a gradient, and buffers."""
        still = {name for name, p in self._net.named_parameters() if not p.requires_grad}
        return {k: v for k, v in net.state_dict().items() if k not in still}

    def _save(self) -> None:
        """No random state in it, nor the schedule's: both are functions of the place."""
        if self._resume is None or rank() != 0:
            return
        _write(
            self._resume,
            {
                "kind": _CHECKPOINT,
                "about": json.dumps(self._about),
                "place": asdict(self._place),
                "net": self._moving(self._net),
                "ema": self._moving(self._ema.module) if self._ema else {},
                "optimizer": self._optimizer.state_dict(),
                "scaler": self._scaler.state_dict(),
                "history": self._history,
                "best": self._best,
                "kept": self._kept,
            },
        )

    def _load(self, state: dict[str, Any]) -> None:
        path = self._resume
        try:
            theirs = json.loads(state["about"])
            other = [k for k in {**self._about, **theirs} if self._about.get(k) != theirs.get(k)]
            if other:
                both = [(k, json.dumps(theirs.get(k)), json.dumps(self._about.get(k))) for k in other[:3]]
                parts = [f"{k} {there:.40}, now {here:.40}" for k, there, here in both]
                raise VacliError(
                    f"{path} is of a run that was stopped, with {'; '.join(parts)}: run that one again, "
                    "remove the file, or give another --out"
                )
            _fill(self._net, self._moving(self._net), state["net"])
            if self._ema:
                _fill(self._ema.module, self._moving(self._ema.module), state["ema"])
            self._optimizer.load_state_dict(state["optimizer"])
            self._scaler.load_state_dict(state["scaler"])
            self._place = _Place(**state["place"])
            self._history, self._best, self._kept = state["history"], state["best"], state["kept"]
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as e:
            raise VacliError(f"{path} is no checkpoint of this training; remove it to start anew") from e

    def _refuse_disagreement(self) -> None:
        places: list[Any] = [None] * world()
        distributed.all_gather_object(places, (self._place.epoch, self._place.step))
        if len(set(places)) > 1:
            raise VacliError(
                f"the processes do not see the same {self._resume}; use an --out on a disk that all share"
            )


def casting(device: torch.device, dtype: str) -> torch.autocast:
    """The context in which a network computes in `dtype`."""
    return torch.autocast(device.type, DTYPES[dtype], enabled=dtype != "float32")


def _worth(line: Mapping[str, float]) -> float:
    return line["score"] if math.isfinite(line["score"]) else -math.inf


def _fill(net: nn.Module, moving: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]) -> None:
    if moving.keys() != state.keys():
        raise KeyError("other parameters")
    net.load_state_dict({**net.state_dict(), **state})


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.part")


def _write(path: Path, state: dict[str, Any]) -> None:
    """Whole or as before, through kill -9 and power cut; what a killed process left aside is written over."""
    try:
        with open(_aside(path), "wb") as f:
            torch.save(state, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(_aside(path), path)
        sync_folder(path.parent)
    except (OSError, RuntimeError) as e:  # torch's writer makes a RuntimeError of a full disk
        with contextlib.suppress(OSError):
            _aside(path).unlink()
        why = " ".join(str(e).split())[:120]
        raise VacliError(f"cannot write {path}: {why}; free some space and run again: it goes on") from e


def _read(path: Path) -> dict[str, Any]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["kind"] != _CHECKPOINT:
            raise ValueError("of something else")
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, TypeError, pickle.UnpicklingError) as e:
        raise VacliError(f"{path} is damaged, or no checkpoint of vacli; remove it to train anew") from e
    return state
