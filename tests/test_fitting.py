"""The loop: what a step is and when there is none, the rate, the average, the stage alone; what is said of it."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn
from vacli import VacliError
from vacli.temporal import fitting
from vacli.temporal.blocks import Mamba, Mamba2
from vacli.temporal.fitting import (
    Alone,
    Fit,
    check_alone,
    learning_rate,
    make_optimizer,
    memory_told,
    warmup_epochs,
    whole_loss,
)
from vacli.temporal.model import Network
from vacli.temporal.preset import TrainSpec, WindowSpec
from vacli.temporal.windows import Batch, Clip, Windows

from .toy_store import tiny, tracks_of

DIMS = {"mae": 8, "logmel": 4}


def clips(videos: int = 4, labelled: bool = True) -> list[Clip]:
    found = []
    for number in range(videos):
        made = tracks_of(number)
        labels = made["label.va"] if labelled or number else None
        found.append(Clip.on_clock(f"v{number}", made["mae"].times_s, made, DIMS, labels))
    return found


def windows(**how: bool) -> Windows:
    return Windows(clips(**how), WindowSpec(length=50, stride=40), 4)


def network(head: str = "mamba", **train: float | str) -> Network:
    torch.manual_seed(0)
    return Network(tiny(head, **train), DIMS)


def fit_of(net: Network, **train: object) -> Fit:
    spec = TrainSpec(**{"lr": 0.01, "warmup_epochs": 0, "epochs": 4, **train})
    return Fit(net, whole_loss(net, spec), spec, spec.epochs, spec.ema)


def weights_of(net: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in net.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def quiet(line: str) -> None:
    pass


# ---- a step ----------------------------------------------------------------------------------------------------


class Mixed:
    """Windows whose batches have every label, then none, then every one again."""

    def __init__(self, every: Windows, blank: tuple[bool, ...]) -> None:
        self.every, self.blank, self.steps = every, blank, len(blank)

    def batches(self, order: torch.Generator | None = None):
        source = itertools.cycle(self.every.batches())
        for blank in self.blank:
            batch = next(source)
            labelled = torch.zeros_like(batch.labelled) if blank else batch.labelled
            yield Batch(batch.rows, batch.streams, batch.seen, batch.start, batch.labels, labelled)


@pytest.mark.parametrize("how", [{}, {"optimizer": "adam"}, {"ema": 0.9}, {"ccc": "sequence", "mse": 1.0}])
def test_a_batch_without_labels_moves_nothing(how):
    fit = fit_of(network("linear"), weight_decay=0.1, **how)
    fit.epoch(Mixed(windows(), (False, False)), 0, 0, quiet)
    before, average = weights_of(fit.module), weights_of(fit.judged)
    optimizer = [p.clone() for state in fit.optimizer.state.values() for p in state.values()]
    batch = next(iter(Mixed(windows(), (True,)).batches()))
    assert fit._step(batch, 0.01).tolist() == [0, 0]
    assert same(weights_of(fit.module), before)
    assert same(weights_of(fit.judged), average)
    after = [p for state in fit.optimizer.state.values() for p in state.values()]
    assert all(torch.equal(a, b) for a, b in zip(after, optimizer, strict=True))
    assert fit._step(next(windows().batches()), 0.01)[1] == 1  # and then it goes on
    assert not same(weights_of(fit.module), before)


def test_the_loss_of_an_epoch_is_the_mean_over_its_steps_alone():
    fits = [fit_of(network("linear"), lr=1e-30) for _ in range(2)]
    losses = [
        fit.epoch(Mixed(windows(), blank), 0, 0, quiet)
        for fit, blank in zip(fits, [(False,), (True, False, True)], strict=True)
    ]
    first = next(windows().batches())
    wanted = fits[0].loss(first).item()
    assert losses[0] == pytest.approx(wanted)
    assert losses[1] != pytest.approx(wanted)  # another batch, the second
    assert losses[1] == pytest.approx(fits[1].loss(list(windows().batches())[1]).item())


@pytest.mark.parametrize("how", [{}, {"ccc": "sequence"}])
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("label", [0.25, 0.1, -0.7])  # of which but one is a sum of halves
def test_labels_that_never_move_are_nothing_to_learn_from(label, whole, how):
    still = clips(2)
    for clip in still:
        clip.labels[np.isfinite(clip.labels)] = label
    fit = fit_of(network("linear"), **how)
    with pytest.raises(VacliError, match="nothing to learn from"):
        fit.epoch(Windows(still, WindowSpec(length=50, stride=40, whole=whole), 4), 0, 0, quiet)


def test_the_gradient_is_clipped_to_its_norm():
    seen = []
    net = network("linear")
    fit = fit_of(net, clip_norm=1e-3)
    fit.optimizer.register_step_pre_hook(
        lambda *_: seen.append(torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None]))
    )
    fit.epoch(windows(), 0, 0, quiet)
    assert len(seen) == windows().steps
    assert all(g.norm() <= 1e-3 * 1.001 for g in seen)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_precision_is_that_of_the_products_and_the_weights_stay_float32(precision):
    net = network("linear")
    seen = []
    net.tasks["va"].register_forward_hook(lambda _, args, out: seen.append(out.dtype))
    fit_of(net, precision=precision).epoch(windows(), 0, 0, quiet)
    assert set(seen) == {getattr(torch, precision)}
    assert all(p.dtype == torch.float32 for p in net.parameters())


@pytest.mark.needs_cuda
def test_float16_skips_what_overflows_and_learns():
    net = network("mamba").cuda()
    fit = fit_of(net, precision="float16", ema=0.9)
    rows = Windows(clips(), WindowSpec(length=50, stride=40), 4, "cuda")
    losses = [fit.epoch(rows, epoch, epoch, quiet) for epoch in range(4)]
    assert losses[-1] < losses[0]
    assert all(p.isfinite().all() for p in fit.judged.parameters())


@pytest.mark.needs_cuda
@pytest.mark.parametrize("head", ["linear", "mamba"])
def test_a_step_waits_for_no_device(head):
    net = network(head, modality_dropout=0.3).cuda()
    rows = Windows(clips(), WindowSpec(length=50, stride=40), 4, "cuda")
    for how in ({}, {"ccc": "sequence", "mse": 1.0}, {"ema": 0.9, "precision": "bfloat16"}):
        fit = fit_of(net, **how)
        batches = list(rows.batches())
        fit._step(batches[0], 0.01)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for batch in batches[1:]:
                fit._step(batch, 0.01)
        finally:
            torch.cuda.set_sync_debug_mode("default")


# ---- the optimizer and the rate --------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [Mamba(8, 4, 3, 1), Mamba2(8, 4, 3, 1, 4)])
def test_what_mamba_remembers_with_does_not_decay(block):
    net = nn.Sequential(nn.Linear(8, 8), block)
    before = weights_of(net)
    optimizer = make_optimizer(net, TrainSpec(lr=1e-30, weight_decay=1e29))  # 10 % a step
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    kept = {name for name, value in net.named_parameters() if torch.equal(value, before[name])}
    zeros = {name for name, value in before.items() if not value.any()}
    bias = "dt_bias" if isinstance(block, Mamba2) else "dt_proj.bias"
    assert kept - zeros == {"1.A_log", "1.D", f"1.{bias}"}


def test_adam_pulls_by_the_gradient_and_adamw_by_the_weight():
    found = {}
    for kind in ("adam", "adamw"):
        net = nn.Linear(2, 1, bias=False)
        nn.init.constant_(net.weight, 2.0)
        net.weight.grad = torch.zeros_like(net.weight)
        make_optimizer(net, TrainSpec(optimizer=kind, lr=0.1, weight_decay=0.5)).step()
        found[kind] = net.weight[0, 0].item()
    assert found["adamw"] == pytest.approx(2 * (1 - 0.1 * 0.5))
    assert found["adam"] == pytest.approx(2 - 0.1, abs=1e-6)  # Adam's step is the rate, whatever the size


def test_the_rate_goes_up_in_a_line_and_down_in_half_a_cosine_to_its_least():
    spec = TrainSpec(lr=1.0, lr_min=0.2, warmup_epochs=5)

    def rate(epoch: float, spec: TrainSpec = spec, epochs: int = 50) -> float:
        return learning_rate(spec, epoch, epochs, 0)

    assert 0 < rate(0) < 0.001
    assert rate(2.5) == pytest.approx(0.5, abs=1e-3)
    assert rate(5) == 1
    assert rate(27.5) == pytest.approx(0.6)
    assert rate(50) == pytest.approx(0.2)
    assert rate(50.3) == pytest.approx(0.2)  # a pass over packed videos may take a line more
    assert rate(0, TrainSpec(lr=1.0, warmup_epochs=0)) == 1
    assert rate(0, TrainSpec(lr=1.0, warmup_epochs=1e-4)) == 1  # never above
    values = [rate(epoch / 100) for epoch in range(500, 5000)]
    assert values == sorted(values, reverse=True)


@pytest.mark.parametrize("epochs", [1, 3, 5])
@pytest.mark.parametrize("schedule", ["cosine", "plateau"])
def test_a_warm_up_that_would_fill_its_stage_takes_a_third_of_it(epochs, schedule):
    spec = TrainSpec(lr=1.0, warmup_epochs=5, schedule=schedule)
    rates = [learning_rate(spec, epochs * i / 300, epochs, 0) for i in range(300)]
    assert rates[:101] == sorted(rates[:101])
    assert rates[50] == pytest.approx(0.5, abs=1e-2)
    assert rates[100] == 1
    assert rates[100:] == sorted(rates[100:], reverse=True)
    assert warmup_epochs(spec, 6) == 5  # it leaves an epoch: as the preset says


def test_on_a_plateau_the_rate_stays_and_falls_by_its_factor_to_its_least():
    spec = TrainSpec(lr=1.0, lr_min=0.05, warmup_epochs=2, schedule="plateau", plateau_factor=0.3)
    rates = [learning_rate(spec, 30, 50, falls) for falls in range(5)]
    assert rates == pytest.approx([1, 0.3, 0.09, 0.05, 0.05])
    assert learning_rate(spec, 1, 50, 3) == pytest.approx(0.5, abs=1e-3)


def test_the_rate_is_set_for_every_step_of_an_epoch():
    net = network("linear")
    fit = fit_of(net, warmup_epochs=2)
    seen = []
    fit.optimizer.register_step_pre_hook(lambda o, *_: seen.append({g["lr"] for g in o.param_groups}))
    for epoch in range(2):
        fit.epoch(windows(), epoch, 0, quiet)
    steps = windows().steps
    assert seen == [{learning_rate(fit.spec, i / steps, 4, 0)} for i in range(2 * steps)]


def test_a_fall_goes_on_from_the_best_weights_at_a_lower_rate():
    fit = fit_of(network(), schedule="plateau", ema=0.9)
    best = weights_of(fit.judged)
    fit.epoch(windows(), 0, 0, quiet)
    assert not same(weights_of(fit.module), best)
    fit.fall(best)
    assert same(weights_of(fit.module), best)
    assert same(weights_of(fit.judged), best)
    assert fit.falls == 1


# ---- the average -----------------------------------------------------------------------------------------------


def test_the_average_is_the_one_of_its_definition():
    fit = fit_of(network(), ema=0.6)
    mean = {name: p.detach().double() for name, p in fit.module.named_parameters()}
    for step, batch in enumerate(windows().batches(), start=1):
        fit._step(batch, 0.01)
        decay = min(0.6, step / (9 + step))
        now = dict(fit.module.named_parameters())
        mean = {name: decay * m + (1 - decay) * now[name].detach().double() for name, m in mean.items()}
    assert step >= 3
    for name, p in fit.judged.named_parameters():
        torch.testing.assert_close(p.detach().double(), mean[name], rtol=1e-5, atol=1e-6)
    assert not same(weights_of(fit.judged), weights_of(fit.module))


def test_without_an_average_the_network_itself_is_judged():
    fit = fit_of(network())
    assert fit.judged is fit.module


# ---- all of it, resumed ----------------------------------------------------------------------------------------

EVERYTHING = {"ema": 0.9, "schedule": "plateau", "precision": "bfloat16", "ccc": "sequence", "mse": 0.1}


def test_a_state_taken_up_again_goes_on_to_the_same_bits():
    whole = fit_of(network("mamba", modality_dropout=0.4), **EVERYTHING)
    losses = [whole.epoch(windows(), epoch, epoch, quiet) for epoch in range(3)]
    cut = fit_of(network("mamba", modality_dropout=0.4), **EVERYTHING)
    cut.epoch(windows(), 0, 0, quiet)
    state = cut.state()
    other = fit_of(network("mamba", modality_dropout=0.4), **EVERYTHING)
    nn.init.normal_(other.module.tasks["va"][0].weight)
    other.load(state)
    assert [other.epoch(windows(), epoch, epoch, quiet) for epoch in (1, 2)] == losses[1:]
    assert same(weights_of(other.module), weights_of(whole.module))
    assert same(weights_of(other.judged), weights_of(whole.judged))


# ---- alone -----------------------------------------------------------------------------------------------------


def test_alone_every_stream_learns_what_it_shows_and_nothing_else_moves():
    net = network()
    before = weights_of(net)
    spec = TrainSpec(lr=0.02, warmup_epochs=0, weight_decay=0.1, alone_epochs=20)
    alone = Alone(net, spec)
    fit = Fit(alone, alone.loss, spec, 20)
    losses = [fit.epoch(windows(), epoch, epoch, quiet) for epoch in range(20)]
    assert losses[-1] < 1.15 < losses[0]  # each stream shows one of the two targets, and the other not
    moved = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {f"encode.{i}.blocks.0.map.{part}" for i in (0, 1) for part in ("weight", "bias")}


def test_alone_a_row_that_a_stream_did_not_see_counts_nowhere_in_it():
    net = network()
    alone = Alone(net, TrainSpec(alone_epochs=1))
    batch = next(windows().batches())
    hidden = {**batch.seen, "mae": batch.seen["mae"] & (torch.arange(50) < 20)}
    grads = []
    for odd in (0.0, 1e6, math.nan):
        streams = {**batch.streams, "mae": batch.streams["mae"].masked_fill(~hidden["mae"][..., None], odd)}
        alone.zero_grad()
        loss = alone.loss(Batch(batch.rows, streams, hidden, batch.start, batch.labels, batch.labelled))
        loss.backward()
        grads.append((loss.item(), [p.grad.clone() for p in alone.parameters() if p.grad is not None]))
    for loss, grad in grads:
        assert loss == grads[0][0]
        assert all(torch.equal(a, b) for a, b in zip(grad, grads[0][1], strict=True))


def test_encoders_without_anything_to_train_cannot_be_trained_alone():
    with pytest.raises(VacliError, match=r"alone_epochs = 3.*encode\.<stream>\.blocks"):
        check_alone(network("linear"), TrainSpec(alone_epochs=3))
    check_alone(network("linear"), TrainSpec())
    check_alone(network("mamba"), TrainSpec(alone_epochs=3))


# ---- what is said ----------------------------------------------------------------------------------------------


def test_a_network_that_is_too_big_for_a_cpu_is_warned_of_after_the_first_steps(monkeypatch):
    told: list[str] = []
    fit_of(network("linear")).epoch(windows(), 0, 0, told.append)
    assert told == []
    monkeypatch.setattr(fitting, "_SLOW_EPOCH_S", 0.0)
    fit = fit_of(network("linear"))
    for epoch in range(2):
        fit.epoch(windows(), epoch, 0, told.append)
    assert len(told) == 1
    assert "hours for an epoch on this CPU; wanted: a GPU" in told[0]


def test_diverging_is_one_line_that_names_the_learning_rate():
    with pytest.raises(VacliError, match=r"diverged in epoch 1.*train\.lr, now 1e\+30"):
        fit_of(network("linear"), lr=1e30).epoch(windows(), 0, 0, quiet)


@pytest.mark.parametrize(
    ("error", "where"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), " of the GPU"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), " of the GPU"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 10 bytes\nframe #0"), ""),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 10 bytes."), ""),
        (MemoryError("Unable to allocate 16 EiB for an array"), ""),
    ],
)
def test_however_it_is_said_memory_that_is_full_is_one_line_with_the_mend(error, where):
    with pytest.raises(VacliError) as e, memory_told("set train.batch to less"):
        raise error
    assert str(e.value) == f"out of memory{where}: set train.batch to less"


def test_memory_that_a_tensor_cannot_have_is_told_and_nothing_else_is_taken_for_it():
    with pytest.raises(VacliError, match=r"^out of memory: a mend$"), memory_told("a mend"):
        torch.empty(2**58)
    with pytest.raises(RuntimeError, match="must match the size"), memory_told("a mend"):
        torch.ones(2) + torch.ones(3)
    with pytest.raises(VacliError, match=r"^mine$"), memory_told("a mend"):
        raise VacliError("mine")
