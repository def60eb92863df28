"""The loop goes on where it was stopped, to the same bits; two processes learn what one would; nothing is lost."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn
from vacli import VacliError
from vacli.extract import training
from vacli.extract.training import Fitted, Settings, fit, forget, seed_of, share, whole

# A job that a test can also hand to another process: a net with dropout, on numbers.
JOB = """
import sys, json, time
from pathlib import Path
import torch
from torch import nn
from vacli.extract.training import Settings, fit, seed_of, share, team, rank, whole, first_alone
from vacli.store.labels import ccc

X = torch.randn(48, 4, generator=torch.Generator().manual_seed(1))
Y = X[:, :2] * 2 + 0.3

def net(dropout=0.2):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 16), nn.GELU(), nn.Dropout(dropout), nn.Linear(16, 2))

def batches(epoch):
    return torch.randperm(48, generator=torch.Generator().manual_seed(seed_of(epoch))).split(9)

def square(net, rows):
    return (net(X[rows]) - Y[rows]).square().mean()

def judge(net):
    return {"score": -float((net(X) - Y).square().mean())}
"""
exec(JOB, job := {})  # its names, for the tests of this process
X, Y, make_net, batches, square, judge = (job[k] for k in ("X", "Y", "net", "batches", "square", "judge"))
STEPS = 6
SETTINGS = Settings(epochs=4, lr=1e-2, ema=0.9, accumulate=2)


def train(net: nn.Module, settings: Settings = SETTINGS, loss=square, judge=judge, **how) -> Fitted:
    groups = [{"params": [p for p in net.parameters() if p.requires_grad]}]
    return fit(net, groups, loss, batches, STEPS, settings, judge=judge, **how)


def assert_same(a: Fitted, b: Fitted) -> None:
    assert a.history == b.history
    assert a.best == b.best
    assert a.state.keys() == b.state.keys()
    assert all(torch.equal(a.state[k], b.state[k]) for k in a.state)


# ---- stopped and gone on ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("often", [True, False], ids=["after every update", "after every epoch"])
def test_stopped_before_any_batch_it_goes_on_to_the_same_bits(often, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "_CHECKPOINT_EVERY_S", 0.0 if often else 1e9)
    straight = train(make_net())
    for stop in range(1, 4 * STEPS, 3):
        left = stop

        def stopping(net, rows):
            nonlocal left
            if left == 0:
                raise KeyboardInterrupt
            left -= 1
            return square(net, rows)

        resume = tmp_path / f"{stop}.resume"
        with pytest.raises(KeyboardInterrupt):
            train(make_net(), loss=stopping, resume=resume)
        left = 4 * STEPS
        again = train(make_net(), loss=stopping, resume=resume)
        done = stop // 2 * 2 if often else stop // STEPS * STEPS
        assert left == done
        assert_same(straight, again)
        left = 0  # not a batch more
        assert_same(straight, train(make_net(), loss=stopping, resume=resume))


KILLED = """
import os, signal, vacli.extract.training as t

t._CHECKPOINT_EVERY_S = 0.0

def slow(net, rows):
    time.sleep(0.05)
    return square(net, rows)

def learn():
    n = net()
    settings = Settings(epochs=4, lr=1e-2, ema=0.9, accumulate=2)
    return fit(n, [{"params": n.parameters()}], slow, batches, 6, settings, judge=judge, resume=Path(sys.argv[1]))

torch.set_num_threads(1)  # a fork has no other threads
for wait_s in (0.11, 0.2, 0.17, 0.13):
    if child := os.fork():
        time.sleep(wait_s)
        os.kill(child, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    else:
        learn()
        os._exit(0)
f = learn()
torch.save([f.state, f.history, f.best], sys.argv[2])
"""


def test_killed_at_moments_nobody_chose_it_goes_on_to_the_same_bits(tmp_path):
    """kill -9 four times; it checkpoints after every update, so some of them fall into the writing."""
    resume, out = tmp_path / "a.resume", tmp_path / "out.pt"
    subprocess.run(
        [sys.executable, "-c", JOB + KILLED, str(resume), str(out)], check=True, capture_output=True
    )
    state, history, best = torch.load(out, weights_only=True)
    assert_same(train(make_net()), Fitted(state, history, best))
    forget(resume)
    assert [p.name for p in tmp_path.iterdir()] == ["out.pt"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            {"settings": replace(SETTINGS, lr=1e-3)},
            r"with lr 0\.01, now 0\.001: run that one again, remove the file",
        ),
        ({"about": {"data": "b"}}, r'with data "a", now "b"'),
        ({"settings": replace(SETTINGS, epochs=9, ema=None)}, r"epochs 4, now 9; ema 0\.9, now null"),
    ],
)
def test_the_checkpoint_of_another_run_is_refused_and_left_alone(change, told, tmp_path):
    resume = tmp_path / "a.resume"
    train(make_net(), resume=resume, about={"data": "a"})
    before = resume.read_bytes()
    with pytest.raises(VacliError, match=told) as caught:
        train(make_net(), **{"resume": resume, "about": {"data": "a"}, **change})
    assert "\n" not in str(caught.value)
    assert resume.read_bytes() == before


def test_a_checkpoint_of_another_net_is_refused(tmp_path):
    resume = tmp_path / "a.resume"
    train(make_net(), resume=resume)
    for other in (nn.Linear(4, 2), nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Dropout(), nn.Linear(8, 2))):
        with pytest.raises(VacliError, match="is no checkpoint of this training; remove it to start anew"):
            train(other, resume=resume)


def test_a_torn_or_foreign_checkpoint_is_one_clear_line(tmp_path):
    resume = tmp_path / "a.resume"
    train(make_net(), resume=resume)
    data = resume.read_bytes()
    torch.save({"kind": "something else"}, tmp_path / "other")
    torch.save([1, 2], tmp_path / "list")
    foreign = [(tmp_path / name).read_bytes() for name in ("other", "list")]
    for content in (b"", data[:100], data[: len(data) // 2], b"no checkpoint", *foreign):
        resume.write_bytes(content)
        with pytest.raises(
            VacliError, match=r"a\.resume is damaged, or no checkpoint of vacli; remove it"
        ) as caught:
            train(make_net(), resume=resume)
        assert "\n" not in str(caught.value)


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"kind": training._CHECKPOINT, "about": Trap()}, tmp_path / "a.resume")
    with pytest.raises(VacliError, match="damaged, or no checkpoint"):
        train(make_net(), resume=tmp_path / "a.resume")
    assert not (tmp_path / "ran").exists()


def test_a_full_disk_leaves_the_old_checkpoint_and_says_so(tmp_path, monkeypatch):
    resume = tmp_path / "a.resume"
    saved = torch.save

    def full(state, file):
        if state["place"]["epoch"] == 3:
            file.write(b"half")
            raise OSError(28, "No space left on device")
        saved(state, file)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(
            VacliError, match=r"cannot write .*a\.resume: .*No space left.* run again: it goes on"
        ):
            train(make_net(), resume=resume)
    assert [p.name for p in tmp_path.iterdir()] == ["a.resume"]
    assert_same(train(make_net()), train(make_net(), resume=resume))


# ---- what is learnt --------------------------------------------------------------------------------------------


def test_it_is_what_a_plain_loop_of_torch_does():
    settings = Settings(epochs=4, lr=1e-2, warm_up=0.25, clip_norm=0.5)
    fitted = train(make_net(0), settings, judge=None)
    net = make_net(0).train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0.05)
    updates = 0
    for epoch in range(4):
        for rows in batches(epoch):
            updates += 1
            share_done = (updates - 6) / 19  # of the fall, after a quarter of the 24 updates
            rate = updates / 6 if updates < 6 else 0.5 * (1 + math.cos(math.pi * share_done))
            for group in optimizer.param_groups:
                group["lr"] = 1e-2 * rate
            optimizer.zero_grad()
            square(net, rows).backward()
            nn.utils.clip_grad_norm_(net.parameters(), 0.5)
            optimizer.step()
    for k, v in net.state_dict().items():
        torch.testing.assert_close(fitted.state[k], v, rtol=1e-5, atol=1e-6)


def test_gradients_of_several_batches_make_one_update():
    thirds = Settings(epochs=3, lr=1e-2, accumulate=3, warm_up=0.0)
    alike = lambda epoch: torch.arange(48).split(8)  # noqa: E731
    groups = lambda net: [{"params": list(net.parameters())}]  # noqa: E731
    one, other = make_net(0), make_net(0)
    in_thirds = fit(one, groups(one), square, alike, 6, thirds)
    at_once = fit(
        other, groups(other), square, lambda _: torch.arange(48).split(24), 2, replace(thirds, accumulate=1)
    )
    for k, v in at_once.state.items():
        torch.testing.assert_close(in_thirds.state[k], v, rtol=1e-5, atol=1e-6)
    assert in_thirds.history[-1]["loss"] == pytest.approx(at_once.history[-1]["loss"], rel=1e-5)


def test_what_has_no_gradient_stays_and_takes_no_memory(tmp_path, monkeypatch):
    optimizers = []
    adamw = torch.optim.AdamW
    monkeypatch.setattr(
        torch.optim, "AdamW", lambda *a, **k: optimizers.append(adamw(*a, **k)) or optimizers[0]
    )
    net = make_net()
    net[0].requires_grad_(False)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    fitted = train(net, resume=tmp_path / "a.resume")
    assert {k for k in before if not torch.equal(before[k], fitted.state[k])} == {"3.weight", "3.bias"}
    assert all(p.grad is None for p in net[0].parameters())
    [optimizer] = optimizers
    assert set(optimizer.state) == {net[3].weight, net[3].bias}
    saved = torch.load(tmp_path / "a.resume", weights_only=True)
    for held in ("net", "ema", "kept"):
        assert saved[held].keys() == {"3.weight", "3.bias"}


def test_the_rate_climbs_then_falls_and_heeds_each_groups_share(monkeypatch):
    seen = []
    step = torch.optim.AdamW.step

    def spying(self, *args, **kwargs):
        seen.append([group["lr"] for group in self.param_groups])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", spying)
    net = make_net()
    groups = [{"params": net[0].parameters(), "lr_scale": 0.25}, {"params": net[3].parameters()}]
    fit(net, groups, square, batches, STEPS, Settings(epochs=5, lr=1.0, warm_up=0.2))
    low, high = zip(*seen, strict=True)
    assert len(high) == 30
    assert low == pytest.approx([0.25 * rate for rate in high])
    top = high.index(max(high))
    assert (top, high[top]) == (5, 1.0)
    assert list(high[: top + 1]) == sorted(high[: top + 1])
    assert list(high[top:]) == sorted(high[top:], reverse=True)
    assert 0 < high[-1] < 0.01
    assert high[0] == pytest.approx(1 / 6)


def test_the_best_epoch_is_kept_and_patience_ends_it(tmp_path):
    scores = iter([0.1, 0.5, float("nan"), 0.4, 0.3, 0.9])
    seen = []

    def judging(net):
        assert not net.training
        seen.append({k: v.clone() for k, v in net.state_dict().items()})
        return {"score": next(scores), "ccc": 1.0}

    resume = tmp_path / "a.resume"
    fitted = train(make_net(), Settings(epochs=9, lr=1e-2, patience=3), judge=judging, resume=resume)
    assert [line["epoch"] for line in fitted.history] == [1, 2, 3, 4, 5]
    assert (fitted.best["epoch"], fitted.best["score"], fitted.best["ccc"]) == (2, 0.5, 1.0)
    assert all(torch.equal(fitted.state[k], seen[1][k]) for k in seen[1])
    assert not torch.equal(fitted.state["3.bias"], seen[4]["3.bias"])
    again = train(make_net(), Settings(epochs=9, lr=1e-2, patience=3), judge=judging, resume=resume)
    assert again.best == fitted.best
    assert len(seen) == 5  # impatient still


def test_without_a_judge_the_last_weights_are_kept():
    nets = [make_net(), make_net()]
    last = train(nets[0], Settings(epochs=3, lr=1e-2), judge=None)
    assert all(torch.equal(last.state[k], v) for k, v in nets[0].state_dict().items())
    assert last.best == last.history[-1]
    with pytest.raises(ValueError, match="patience without a judge"):
        train(nets[1], Settings(epochs=3, lr=1e-2, patience=1), judge=None)


def test_the_moving_average_is_what_is_judged_and_kept():
    net, judged = make_net(0), []
    path = [{k: v.clone() for k, v in net.state_dict().items()}]

    def remembering(net, rows):
        path.append({k: v.clone() for k, v in net.state_dict().items()})
        return square(net, rows)

    def judging(net):
        judged.append(net.state_dict()["3.bias"].clone())
        return {"score": float(len(judged))}

    fitted = train(net, Settings(epochs=3, lr=1e-2, ema=0.5), loss=remembering, judge=judging)
    weights = [state["3.bias"] for state in path[2:]] + [net.state_dict()["3.bias"]]  # after each update
    mean = weights[0]
    for update, now in enumerate(weights[1:], start=1):
        decay = min(0.5, 1 - (1 + update) ** (-2 / 3))  # timm's warm-up of it
        mean = decay * mean + (1 - decay) * now
    torch.testing.assert_close(fitted.state["3.bias"], mean)
    assert torch.equal(fitted.state["3.bias"], judged[-1])
    assert not torch.equal(mean, net.state_dict()["3.bias"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_in_half_precision_it_learns_too_and_the_weights_stay_whole(dtype, tmp_path):
    seen = set()

    def loss(net, rows):
        out = net(X[rows])
        seen.add(out.dtype)
        return (out.float() - Y[rows]).square().mean()

    resume = tmp_path / "a.resume"
    settings = replace(SETTINGS, dtype=dtype, accumulate=1)
    fitted = train(make_net(), settings, loss=loss, resume=resume)
    assert seen == {getattr(torch, dtype)}
    assert {v.dtype for v in fitted.state.values()} == {torch.float32}
    assert fitted.history[-1]["loss"] < 0.9 * fitted.history[0]["loss"]
    scaler = torch.load(resume, weights_only=True)["scaler"]
    assert bool(scaler) == (dtype == "float16")


def test_an_overflow_in_float16_costs_an_update_and_no_more():
    """The scale begins at 65,536: gradients that burst then are thrown away, the scale is halved, and it learns."""
    first = []

    def steep(net, rows):
        first.append(1)
        return square(net, rows) * (1e4 if len(first) == 1 else 1.0)

    fitted = train(make_net(0), Settings(epochs=2, lr=1e-2, dtype="float16"), loss=steep, judge=None)
    assert all(v.isfinite().all() for v in fitted.state.values())
    assert fitted.history[1]["loss"] < 5


def test_a_loss_that_is_no_number_ends_it_and_leaves_the_last_whole_epoch(tmp_path):
    calls = []

    def bursting(net, rows):
        calls.append(1)
        return square(net, rows) * (float("nan") if len(calls) == 2 * STEPS + 3 else 1)

    resume = tmp_path / "a.resume"
    with pytest.raises(
        VacliError, match="training diverged in epoch 3: the loss is no number; try a lower --lr"
    ):
        train(make_net(), loss=bursting, resume=resume)
    assert torch.load(resume, weights_only=True)["place"]["epoch"] == 2


@pytest.mark.parametrize("count", [5, 7])
def test_another_number_of_batches_than_was_said_is_refused(count):
    net = make_net()
    with pytest.raises(ValueError, match=f"had {count} batches; wanted 6"):
        fit(net, [{"params": net.parameters()}], square, lambda _: [torch.arange(9)] * count, 6, SETTINGS)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"epochs": 0}, "epochs 0: wanted at least 1"),
        ({"lr": 0.0}, r"lr 0\.0: wanted more than 0"),
        ({"lr": float("nan")}, "lr nan: wanted more than 0"),
        ({"weight_decay": -1.0}, "weight-decay"),
        ({"warm_up": 1.0}, "warm-up 1.0: wanted a share"),
        ({"ema": 1.0}, "ema 1.0: wanted one in"),
        ({"patience": 0}, "patience 0: wanted at least 1"),
        ({"accumulate": 0}, "accumulate 0"),
        ({"seed": -1}, "seed -1: wanted 0 or more"),
        ({"dtype": "int8"}, "dtype int8: wanted one of float32, bfloat16, float16"),
    ],
)
def test_settings_that_cannot_be_are_refused(wrong, told):
    with pytest.raises(VacliError, match=told):
        Settings(**{"epochs": 1, "lr": 1.0, **wrong})


# ---- several processes -----------------------------------------------------------------------------------------

TEAM = """
def concordance(net, rows):
    mine = share(rows)
    weight = (mine >= 0).float()[:, None]  # share fills up with -1
    x, y, w = whole(net(X[mine])), whole(Y[mine]), whole(weight)
    return (1 - ccc(x, y, w)).mean()

def learn(settings):
    n = net(0)
    with team():
        if rank():
            for p in n.parameters(): torch.nn.init.zeros_(p)  # those of process 0 count
        f = fit(n, [{'params': list(n.parameters())}], concordance, batches, 6, settings, judge=judge)
        return rank(), f.state, f.history, first_alone(lambda: ("said by", rank()))
"""


def test_two_processes_learn_what_one_learns_of_the_whole_batch(tmp_path):
    """CCC is no mean over rows: only with the statistics of the whole batch are the gradients those of one process."""
    script = tmp_path / "team.py"
    script.write_text(
        JOB + TEAM + "r, *told = learn(Settings(epochs=3, lr=1e-2, ema=0.9, accumulate=2))\n"
        f"torch.save(told, Path({str(tmp_path)!r}) / f'{{r}}.pt')\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr.count("training:") == done.stderr.count("training: ") > 0
    zero, one = (torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in (0, 1))
    assert all(torch.equal(zero[0][k], one[0][k]) for k in zero[0])
    assert zero[1] == one[1]
    assert zero[2] == one[2] == ("said by", 0)
    exec(JOB + TEAM, alone := {})
    _, state, history, _ = alone["learn"](Settings(epochs=3, lr=1e-2, ema=0.9, accumulate=2))
    for k, v in state.items():
        torch.testing.assert_close(zero[0][k], v, rtol=1e-4, atol=1e-5)
    assert [line["loss"] for line in zero[1]] == pytest.approx([line["loss"] for line in history], rel=1e-4)


def test_a_share_has_the_same_size_everywhere_and_all_rows_are_in_one(monkeypatch):
    monkeypatch.setattr(training, "world", lambda: 3)
    parts = []
    for process in range(3):
        monkeypatch.setattr(training, "rank", lambda process=process: process)
        parts.append(share(torch.arange(10)))
    assert {len(part) for part in parts} == {4}
    assert torch.cat(parts).tolist() == [*range(10), -1, -1]


def test_alone_the_whole_is_the_part():
    part = torch.arange(3.0)
    assert whole(part) is part
    assert share(part).tolist() == part.tolist()
    assert training.first_alone(lambda: 7) == 7


def test_near_seeds_give_unrelated_numbers():
    seeds = {seed_of(a, b, c) for a in range(9) for b in range(9) for c in range(9)}
    assert len(seeds) == 729
    assert seed_of(1, 2) == seed_of(1, 2) != seed_of(2, 1)
    torch.manual_seed(seed_of(2**40, 1))  # fits torch
