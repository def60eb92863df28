"""The loop of training: passes over batches with one optimizer, its schedule and a moving average, all resumable."""

from __future__ import annotations

import contextlib
import copy
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from .. import VacliError
from .losses import va_loss
from .model import TASK_TARGETS, Network
from .preset import TrainSpec
from .windows import Batch, Windows

_UNDECAYED = (".A_log", ".D", ".dt_bias", ".dt_proj.bias")  # names of Mamba's parameters
# how torch, the system's allocator and cuBLAS say it; a GPU that is full may fail any of these ways
_FULL = ("can't allocate memory", "not enough memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
_TIMED_STEPS = 2  # how long an epoch will take is said after so many
_SLOW_EPOCH_S = 1800.0  # an epoch on a CPU that takes longer is warned of


class Fit:
    """A module fitted to `loss`, which gives a scalar for a batch, over `epochs` passes.

    A step whose gradient is zero throughout (nothing in the batch is labelled) is no step: neither the optimizer nor
    the moving average moves. Nothing in a step waits for the device. `judged` is what is to be judged and kept: the
    moving average of the weights where `ema` is above 0, else the module itself.
    """

    def __init__(
        self,
        module: nn.Module,
        loss: Callable[[Batch], Tensor],
        spec: TrainSpec,
        epochs: int,
        ema: float = 0.0,
    ) -> None:
        self.module, self.loss, self.spec, self.epochs, self.ema = module, loss, spec, epochs, ema
        self.judged = copy.deepcopy(module) if ema else module
        self.device = next(module.parameters()).device
        self.optimizer = make_optimizer(module, spec)
        self.optimizer.register_step_pre_hook(self._mark)
        # float16's gradients underflow without it; that a step overflowed stays on the device, as `_idle` does
        self.scaler = torch.amp.GradScaler("cuda", enabled=spec.precision == "float16")
        self.steps, self.falls, self._timed = 0, 0, False
        self._idle = torch.zeros((), device=self.device)  # 1 where the present step is none

    def epoch(self, windows: Windows, epoch: int, seed: int, tell: Callable[[str], None]) -> float:
        """One pass over all windows; returns the mean loss of its steps.

        epoch: passes before this one, for the schedule. seed: all that is random in the pass depends on it alone.
        tell: gets one line if a CPU will take long. Raises VacliError if the loss is not finite in the end, or if no
        batch gave a gradient.
        """
        torch.manual_seed(seed)
        order = torch.Generator().manual_seed(seed)
        self.module.train()
        total = torch.zeros(2, device=self.device)  # loss, steps
        began = time.perf_counter()
        with _deterministic_convolutions():
            for i, batch in enumerate(windows.batches(order)):
                rate = learning_rate(self.spec, epoch + i / windows.steps, self.epochs, self.falls)
                total += self._step(batch, rate)
                if i + 1 == _TIMED_STEPS and not self._timed:
                    self._warn_if_slow((time.perf_counter() - began) / (i + 1) * windows.steps, tell)
        loss, steps = total.tolist()
        if not steps:
            raise VacliError(self._why_idle())
        if not math.isfinite(loss):
            raise VacliError(
                f"training diverged in epoch {epoch + 1}: the loss is {loss / steps}; "
                f"lower train.lr, now {self.spec.lr:g}"
            )
        return loss / steps

    def fall(self, best: dict[str, Tensor]) -> None:
        """The plateau's end: go on from the best weights, at a lower rate. The optimizer's moments stay."""
        self.module.load_state_dict(best)
        self.judged.load_state_dict(best)
        self.falls += 1

    def state(self) -> dict[str, Any]:
        """All that `load` needs to go on as if nothing had happened; for torch.save, weights_only."""
        averaged = self.judged.state_dict() if self.ema else None
        return {
            "module": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "averaged": averaged,
            "steps": self.steps,
            "falls": self.falls,
        }

    def load(self, state: dict[str, Any]) -> None:
        self.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.ema:
            self.judged.load_state_dict(state["averaged"])
        self.steps, self.falls = state["steps"], state["falls"]

    def _step(self, batch: Batch, rate: float) -> Tensor:
        """(2,): the loss and 1, or zeros if this was no step."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        dtype = getattr(torch, self.spec.precision)
        with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
            loss = self.loss(batch)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.module.parameters(), self.spec.clip_norm)
        self._idle = (norm == 0).float()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        idle = self._idle if not self.scaler.is_enabled() else 1 - norm.isfinite().float() * (norm != 0)
        if self.ema:
            self._average(idle)
        return torch.stack([torch.where(idle > 0, 0.0, loss.detach()), 1 - idle])

    def _mark(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Before the optimizer's step: its own switch, the one GradScaler uses, turns an idle step into none."""
        idle = self._idle
        if self.scaler.is_enabled():
            idle = torch.maximum(idle, optimizer.found_inf)  # type: ignore[attr-defined]
        optimizer.found_inf = idle  # type: ignore[attr-defined]

    @torch.no_grad()
    def _average(self, idle: Tensor) -> None:
        """The average starts to remember gradually: it would hold on to the random start for 1 / (1 - ema) steps."""
        self.steps += 1
        weight = (1 - min(self.ema, self.steps / (9 + self.steps))) * (1 - idle)
        for mean, now in zip(self.judged.parameters(), self.module.parameters(), strict=True):
            mean.lerp_(now, weight)

    def _why_idle(self) -> str:
        if self.scaler.is_enabled():
            return "every step overflowed float16: set train.precision=bfloat16, or lower train.lr"
        return "nothing to learn from: no batch has two labelled rows that differ; wanted labels that vary"

    def _warn_if_slow(self, epoch_s: float, tell: Callable[[str], None]) -> None:
        self._timed = True
        if self.device.type == "cpu" and epoch_s > _SLOW_EPOCH_S:
            tell(
                f"about {epoch_s / 3600:.1f} hours for an epoch on this CPU; wanted: a GPU, a lighter head "
                "(`vacli heads`), fewer streams, or a VGG of less width (encode.logmel.vgg.width=0.125)"
            )


@contextlib.contextmanager
def _deterministic_convolutions() -> Iterator[None]:
    """cuDNN may choose a backward pass that adds in another order each time; not in here."""
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    try:
        yield
    finally:
        torch.backends.cudnn.deterministic = before


@contextlib.contextmanager
def memory_told(what_to_set: str) -> Iterator[None]:
    """What is done in here may take all memory: raises VacliError then, "out of memory: <what_to_set>"."""
    try:
        yield
    except (MemoryError, RuntimeError) as e:  # torch.OutOfMemoryError is one of the latter
        said = str(e)
        if not isinstance(e, MemoryError | torch.OutOfMemoryError) and not any(s in said for s in _FULL):
            raise
        where = " of the GPU" if "CUDA" in said or "CUBLAS" in said else ""
        raise VacliError(f"out of memory{where}: {what_to_set}") from e


def check_alone(net: Network, spec: TrainSpec) -> None:
    """Raises VacliError if the streams are to be trained alone, and none has anything to train."""
    if spec.alone_epochs and not any(True for _ in net.encode.parameters()):
        raise VacliError(
            f"train.alone_epochs = {spec.alone_epochs}, but no stream has blocks of its own to train: "
            "wanted encode.<stream>.blocks, or alone_epochs = 0"
        )


class Alone(nn.Module):
    """Every stream's encoder with a linear head of its own: the first stage of the USTC network's training.

    Of a network that passes check_alone.
    """

    def __init__(self, net: Network, spec: TrainSpec) -> None:
        super().__init__()
        self.net, self.spec = net, spec
        dims = [cast(int, encoder.dim) for encoder in net.encode]
        self.heads = nn.ModuleList(nn.Linear(dim, TASK_TARGETS["va"]) for dim in dims)

    def loss(self, batch: Batch) -> Tensor:
        """The mean of the streams' losses, each over the labelled rows that it saw."""
        assert batch.labels is not None
        assert batch.labelled is not None
        encoded = self.net.encoded(batch.streams, batch.seen, batch.start)
        losses = []
        for name, head in zip(self.net.streams, self.heads, strict=True):
            seen = batch.seen[name]
            predicted = head(encoded[name].masked_fill(~seen[..., None], 0))
            losses.append(va_loss(predicted, batch.labels, batch.labelled & seen, self.spec, batch.start))
        return torch.stack(losses).mean()


def whole_loss(net: Network, spec: TrainSpec) -> Callable[[Batch], Tensor]:
    """The loss of the network's own output, for a Fit."""

    def loss(batch: Batch) -> Tensor:
        assert batch.labels is not None
        assert batch.labelled is not None
        predicted = net(batch.streams, batch.seen, batch.start)["va"]
        return va_loss(predicted, batch.labels, batch.labelled, spec, batch.start)

    return loss


def make_optimizer(module: nn.Module, spec: TrainSpec) -> torch.optim.Optimizer:
    """AdamW or Adam, fused; Mamba's A, D and dt bias do not decay.

    Towards zero A would mean remembering everything, and the bias a step of 0.7: mamba-ssm exempts them as well.
    """
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    kept = [p for name, p in named if f".{name}".endswith(_UNDECAYED)]
    rest = [p for name, p in named if not f".{name}".endswith(_UNDECAYED)]
    groups = [{"params": rest, "weight_decay": spec.weight_decay}, {"params": kept, "weight_decay": 0.0}]
    kind = torch.optim.AdamW if spec.optimizer == "adamw" else torch.optim.Adam
    return kind([g for g in groups if g["params"]], lr=spec.lr, fused=True)


def learning_rate(spec: TrainSpec, epoch: float, epochs: int, falls: int) -> float:
    """The rate at a fractional epoch: linear up, then half a cosine down to lr_min, or by plateau_factor a fall."""
    warm_up = warmup_epochs(spec, epochs)
    if epoch < warm_up:
        return spec.lr * min(1.0, (epoch + 1e-3) / warm_up)
    if spec.schedule == "plateau":
        return max(spec.lr * spec.plateau_factor**falls, min(spec.lr, spec.lr_min))
    share = min(1.0, (epoch - warm_up) / (epochs - warm_up))
    return spec.lr_min + (spec.lr - spec.lr_min) * 0.5 * (1 + math.cos(math.pi * share))


def warmup_epochs(spec: TrainSpec, epochs: int) -> float:
    """As the preset says; a third of a stage of `epochs` that it would fill: the rate would never get to lr."""
    return spec.warmup_epochs if spec.warmup_epochs < epochs else epochs / 3
