"""Tuning moves what it should and nothing else, gives the same bytes for a seed, and says what it cannot do."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from vacli import VacliError
from vacli.extract import finetune as module
from vacli.extract import training
from vacli.extract.datasets import find
from vacli.extract.finetune import Tuned, finetune
from vacli.extract.labelled import fetch, find_labelled
from vacli.extract.mae import Mae, build_vit
from vacli.extract.synthetic import make_puppets
from vacli.store import Store
from vacli.store.labels import ccc

FAST = {"model": "test_vit", "from_scratch": True, "size": 32, "epochs": 1, "lr": 1e-2}
SOME = {"frames_per_video": 12, "batch": 8, "epochs": 2, "lr": 1e-2}


@pytest.fixture(scope="module")
def puppets(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("puppets")
    make_puppets(folder, train=2, validation=1, length_s=3, rate_hz=5, processes=1)
    return folder


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    """One for all tests: labels are found once."""
    return Store(tmp_path_factory.mktemp("store") / "features.zarr", create=True)


@pytest.fixture(scope="module")
def start(puppets, store, tmp_path_factory) -> Path:
    """Weights to go on from."""
    out = tmp_path_factory.mktemp("start") / "start.safetensors"
    finetune(find(puppets), store, out, **FAST, note="of puppets")
    return out


def moved(before: Path, after: Path) -> set[str]:
    old, new = load_file(before), load_file(after)
    assert old.keys() == new.keys()
    return {k for k in old if not torch.equal(old[k], new[k])}


# ---- what is frozen --------------------------------------------------------------------------------------------


def test_frozen_blocks_and_what_is_below_them_do_not_move(puppets, start, store, tmp_path, monkeypatch):
    """A typo in a published config froze nothing: here every tensor is looked at, and the optimizer's memory."""
    optimizers = []
    adamw = torch.optim.AdamW
    monkeypatch.setattr(
        torch.optim, "AdamW", lambda *a, **k: optimizers.append(adamw(*a, **k)) or optimizers[0]
    )
    out = tmp_path / "tuned.safetensors"
    finetune(find(puppets), store, out, weights=str(start), freeze=4, epochs=1, lr=1e-2, ema=0.5)
    free = {k for k in load_file(start) if k.startswith(("blocks.4.", "blocks.5.", "norm."))}
    assert moved(start, out) == free
    [optimizer] = optimizers
    tuned = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(tuned) == len(free) + 2  # and the head's weight and bias
    assert set(optimizer.state) == set(tuned)


def test_by_default_two_thirds_of_the_blocks_stay(puppets, start, store, tmp_path):
    out = tmp_path / "tuned.safetensors"
    finetune(find(puppets), store, out, weights=str(start), **SOME)
    assert {k.split(".")[1] for k in moved(start, out) if k.startswith("blocks.")} == {"4", "5"}
    with safe_open(out, "pt") as f:
        assert json.loads(f.metadata()["vacli"])["frozen_blocks"] == 4
    assert 24 * 2 // 3 == 16  # as in Mamba-VA


def test_from_scratch_everything_moves(start, puppets, store, tmp_path, monkeypatch):
    def standing_still(net, *_, **__):
        best = {"ccc_valence": 0.0, "ccc_arousal": 0.0}
        return training.Fitted({k: v.clone() for k, v in net.state_dict().items()}, [best], best)

    with monkeypatch.context() as patch:
        patch.setattr(training, "fit", standing_still)
        finetune(find(puppets), store, tmp_path / "unmoved.safetensors", **FAST)
    assert moved(tmp_path / "unmoved.safetensors", start) == set(load_file(start))


def a_net(freeze: int) -> Tuned:
    torch.manual_seed(0)
    return Tuned(build_vit("test_vit", 32), freeze, (0.5,) * 3, (0.25,) * 3)


IMAGES = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_of_the_frozen_part_no_activation_and_no_gradient_is_kept():
    kept = {}
    for freeze in (0, 4, 6):
        net, sizes = a_net(freeze), []
        frozen = net.vit.blocks[:freeze]
        outs: list[torch.Tensor] = []
        for block in frozen:
            block.register_forward_hook(lambda _, __, out, outs=outs: outs.append(out))
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t
        ):
            loss = net(IMAGES).square().sum()
        loss.backward()
        kept[freeze] = sum(sizes)
        assert len(outs) == freeze
        assert not any(out.requires_grad for out in outs)
        still = {k for k, p in net.named_parameters() if p.grad is None}
        lower = (
            "vit.patch_embed.",
            "vit.pos_embed",
            "vit.cls_token",
            *(f"vit.blocks.{i}." for i in range(freeze)),
        )
        assert still == ({k for k, _ in net.named_parameters() if k.startswith(lower)} if freeze else set())
    assert kept[4] < 0.45 * kept[0]
    assert kept[6] < 0.1 * kept[0]


@pytest.mark.parametrize("freeze", [0, 4])
def test_checkpointing_gives_the_same_gradients_with_less_memory(freeze):
    gradients, kept = [], []
    for checkpointing in (False, True):
        net, sizes = a_net(freeze), []
        net.vit.set_grad_checkpointing(checkpointing)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t
        ):
            loss = net.train()(IMAGES).square().sum()
        kept.append(sum(sizes))
        loss.backward()
        gradients.append({k: p.grad for k, p in net.named_parameters()})
    assert {k for k, g in gradients[0].items() if g is None} == {
        k for k, g in gradients[1].items() if g is None
    }
    for k, gradient in gradients[0].items():
        assert gradient is None or torch.equal(gradient, gradients[1][k])
    assert kept[1] < 0.5 * kept[0]


def test_each_block_learns_at_its_share_of_the_rate_of_the_one_above():
    net = a_net(3)
    names = {id(p): k for k, p in net.named_parameters()}
    groups = net.groups(0.5, 0.05)
    scale = {names[id(p)]: group.get("lr_scale", 1.0) for group in groups for p in group["params"]}
    assert scale.keys() == {k for k, p in net.named_parameters() if p.requires_grad}
    for name, depth in (
        ("vit.blocks.5.", 1),
        ("vit.blocks.4.", 2),
        ("vit.blocks.3.", 3),
        ("vit.norm.", 1),
        ("head.", 0),
    ):
        assert {v for k, v in scale.items() if k.startswith(name)} == {0.5**depth}
    decay = {names[id(p)]: group["weight_decay"] for group in groups for p in group["params"]}
    narrow = {k for k, p in net.named_parameters() if p.ndim < 2}
    assert {k for k, v in decay.items() if v == 0} == narrow & decay.keys()


# ---- what the network sees and is told --------------------------------------------------------------------------


@pytest.mark.parametrize("size", [32, 112, 160])
def test_tuning_and_extraction_show_the_network_the_same_bits(size, puppets, store, tmp_path, monkeypatch):
    """Another resize in training than in extraction is one of the published bugs."""
    shown: dict[str, list[torch.Tensor]] = {"tuning": [], "extraction": []}
    phase = "tuning"

    def spied(model: str, pixels: int):
        vit = build_vit(model, pixels)
        vit.patch_embed.register_forward_pre_hook(
            lambda _, args: shown[phase].append(args[0].detach().clone())
        )
        return vit

    monkeypatch.setattr(module, "build_vit", spied)
    out = tmp_path / "a.safetensors"
    how = {**FAST, "size": size, "augment": "none", "frames_per_video": 3, "batch": 2}
    finetune(find(puppets), store, out, **how)
    mae = Mae(weights=str(out), dtype="float32", device="cpu")
    monkeypatch.setattr(type(mae), "_built", lambda self: spied(self.model_name, self.size), raising=True)
    phase = "extraction"
    frames = find_labelled(find(puppets), store, "train")
    fetched = fetch(frames, np.arange(len(frames)), tmp_path / "crops")
    mae(np.array(fetched.pixels()))
    extracted = {image.numpy().tobytes() for batch in shown["extraction"] for image in batch}
    tuned = {
        image.numpy().tobytes() for batch in shown["tuning"][:3] for image in batch
    }  # then comes validation
    assert len(tuned) == 6
    assert tuned <= extracted


def test_a_row_without_a_label_counts_for_nothing():
    generator = torch.Generator().manual_seed(0)
    predicted = torch.rand(10, 2, generator=generator).requires_grad_()
    labels = torch.rand(10, 2, generator=generator)
    labels[3:5] = torch.nan
    kept = [0, 1, 2, *range(5, 10)]
    for kind in module.LOSSES:
        [gradient] = torch.autograd.grad(module._loss(predicted, labels, kind), predicted)
        assert not gradient[3:5].any()
        [alone] = torch.autograd.grad(module._loss(predicted[kept], labels[kept], kind), predicted)
        torch.testing.assert_close(gradient, alone)
    x, y = predicted[kept].detach().numpy(), labels[kept].numpy()
    assert float(module._loss(predicted, labels, "mse").detach()) == pytest.approx(
        ((x - y) ** 2).mean(), rel=1e-5
    )
    wanted = 1 - ccc(x, y, np.ones((len(kept), 1))).mean()
    assert float(module._loss(predicted, labels, "ccc").detach()) == pytest.approx(wanted, rel=1e-4)
    nothing = module._loss(predicted, torch.full((10, 2), torch.nan), "mse")
    assert float(nothing.detach()) == 0


def test_no_target_is_minus_five_and_unreadable_crops_are_masked(puppets, store, tmp_path, monkeypatch):
    """-5 as a target is one of the published bugs."""
    shutil.copytree(puppets, tmp_path / "data")
    annotation = next((tmp_path / "data").glob("annotations/*/Train_Set/*_00.txt"))
    lines = annotation.read_text().splitlines()
    lines[3:9] = ["-5,-5", "-5,0.1", "0.1,-5", "-5.0,-5.0", "-5,-5", "-5,-5"]
    annotation.write_text("\n".join(lines))
    (tmp_path / "data" / "cropped_aligned" / "puppet_train_01" / "00002.jpg").write_bytes(b"torn")
    seen = []
    loss = module._loss
    monkeypatch.setattr(module, "_loss", lambda p, y, kind: seen.append(y) or loss(p, y, kind))
    finetune(find(tmp_path / "data"), store, tmp_path / "a.safetensors", **FAST | {"epochs": 2}, batch=8)
    targets = torch.cat(seen)
    assert len(targets) == 2 * (2 * 15 - 6)
    unknown = targets.isnan().any(1)
    assert int(unknown.sum()) == 2  # the torn picture, in both epochs
    assert targets[~unknown].abs().max() <= 1


# ---- the result -------------------------------------------------------------------------------------------------


def test_the_file_is_accepted_by_mae_and_carries_its_note(start):
    mae = Mae(weights=str(start))
    assert (mae.model_name, mae.size, mae.note, mae.licence) == ("test_vit", 32, "of puppets", None)
    assert mae(np.zeros((2, 112, 112, 3), np.uint8)).shape == (2, 64)
    with safe_open(start, "pt") as f:
        about = json.loads(f.metadata()["vacli"])
    assert about["frozen_blocks"] == 0
    assert about["settings"]["epochs"] == 1
    assert about["settings"]["sampling"] == "even"
    assert -1 <= about["ccc_valence"] <= 1


def test_the_licence_and_the_note_of_the_start_go_with_the_tuned_weights(puppets, start, store, tmp_path):
    bound = tmp_path / "bound.safetensors"
    about = {"model": "test_vit", "size": 32, "licence": "cc-by-nc-4.0", "note": "careful"}
    save_file(load_file(start), bound, metadata={"vacli": json.dumps(about)})
    finetune(find(puppets), store, tmp_path / "tuned.safetensors", weights=str(bound), **SOME)
    tuned = Mae(weights=str(tmp_path / "tuned.safetensors"))
    assert "not for commercial use" in str(tuned.licence)
    assert tuned.note == "careful"


def test_a_seed_gives_the_same_bytes_and_another_one_others(puppets, store, tmp_path):
    how = FAST | SOME | {"augment": "full", "sampling": "balanced"}
    outs = [tmp_path / f"{name}.safetensors" for name in "abc"]
    figures = [finetune(find(puppets), store, o, **how, seed=s) for o, s in zip(outs, (3, 3, 4), strict=True)]
    assert outs[0].read_bytes() == outs[1].read_bytes() != outs[2].read_bytes()
    assert figures[0] == figures[1]


def test_the_figures_are_those_of_the_weights_that_are_kept(puppets, store, tmp_path, monkeypatch):
    judged = []
    judge = module._judge

    def spying(net, *args):
        judged.append((judge(net, *args), {k: v.clone() for k, v in net.vit.state_dict().items()}))
        return judged[-1][0]

    monkeypatch.setattr(module, "_judge", spying)
    out = tmp_path / "a.safetensors"
    figures = finetune(find(puppets), store, out, **FAST | SOME | {"epochs": 5})
    best, weights = max(judged, key=lambda pair: pair[0]["score"])
    assert figures == {k: best[k] for k in ("ccc_valence", "ccc_arousal")}
    assert all(torch.equal(v, weights[k]) for k, v in load_file(out).items())
    assert best["score"] == pytest.approx(sum(figures.values()) / 2)


@pytest.mark.slow
def test_it_learns_what_puppets_feel(tmp_path, store):
    """Valence; arousal takes more puppets than a test can draw (`make demo` has them)."""
    make_puppets(tmp_path / "data", train=24, validation=4, length_s=4, rate_hz=5, processes=1)
    how = {"from_scratch": True, "model": "test_vit", "size": 48, "epochs": 6, "batch": 32}
    figures = finetune(find(tmp_path / "data"), store, tmp_path / "a.safetensors", **how)
    assert figures["ccc_valence"] > 0.4


@pytest.mark.parametrize(
    "how",
    [
        {"loss": "mse", "sampling": "time"},
        {"sampling": "balanced", "augment": "full", "patience": 1},
        {"dtype": "bfloat16", "checkpointing": True, "ema": 0.9},
    ],
    ids=lambda how: "-".join(map(str, how.values())),
)
def test_every_choice_gives_weights_that_mae_takes(how, puppets, start, store, tmp_path):
    out = tmp_path / "a.safetensors"
    figures = finetune(find(puppets), store, out, weights=str(start), freeze=2, **SOME, **how)
    assert all(-1 <= ccc <= 1 for ccc in figures.values())
    assert Mae(weights=str(out)).model_name == "test_vit"
    assert not any(v.isnan().any() for v in load_file(out).values())
    assert {k.split(".")[1] for k in moved(start, out) if k.startswith("blocks.")} == {"2", "3", "4", "5"}
    with safe_open(out, "pt") as f:
        settings = json.loads(f.metadata()["vacli"])["settings"]
    assert {k: settings[k] for k in how} == how


@pytest.mark.parametrize("epochs", [2, 10, 11])
def test_any_number_of_steps_can_be_scheduled(epochs, puppets, store, tmp_path):
    out = tmp_path / "a.safetensors"
    figures = finetune(find(puppets), store, out, **FAST | {"epochs": epochs}, frames_per_video=2)
    assert all(-1 <= ccc <= 1 for ccc in figures.values())
    assert Mae(weights=str(out)).model_name == "test_vit"


# ---- stopped, broken, impossible ---------------------------------------------------------------------------------


def test_stopped_and_called_again_it_gives_the_same_bytes(puppets, start, store, tmp_path, monkeypatch):
    how = {"weights": str(start), **SOME, "epochs": 3, "ema": 0.9, "sampling": "time", "augment": "full"}
    straight, stopped = tmp_path / "straight.safetensors", tmp_path / "stopped.safetensors"
    finetune(find(puppets), store, straight, **how)
    judge, calls = module._judge, []

    def stopping(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return judge(*args)

    monkeypatch.setattr(module, "_judge", stopping)
    with pytest.raises(KeyboardInterrupt):
        finetune(find(puppets), store, stopped, **how)
    assert (tmp_path / "stopped.resume").exists()
    finetune(find(puppets), store, stopped, **how)
    assert len(calls) == 4  # the first epoch was not done again
    assert straight.read_bytes() == stopped.read_bytes()
    assert {p.name for p in tmp_path.iterdir()} == {"straight.safetensors", "stopped.safetensors"}


def test_what_was_stopped_is_not_gone_on_with_from_other_weights(
    puppets, start, store, tmp_path, monkeypatch
):
    out = tmp_path / "a.safetensors"

    def full(*_: object) -> None:
        raise VacliError("no space")

    with monkeypatch.context() as patch:
        patch.setattr(module, "save", full)
        with pytest.raises(VacliError, match="no space"):
            finetune(find(puppets), store, out, weights=str(start), **SOME)
    other = {k: v + 1e-3 for k, v in load_file(start).items()}
    with safe_open(start, "pt") as f:
        save_file(other, tmp_path / "other.safetensors", metadata=f.metadata())
    with pytest.raises(VacliError, match=r"a\.resume is of a run that was stopped, with tuned_from "):
        finetune(find(puppets), store, out, weights=str(tmp_path / "other.safetensors"), **SOME)
    with pytest.raises(VacliError, match="with frozen_blocks 4, now 3"):
        finetune(find(puppets), store, out, weights=str(start), freeze=3, **SOME)
    finetune(find(puppets), store, out, weights=str(start), **SOME)
    assert out.exists()


def test_two_processes_tune_to_what_one_does(puppets, start, store, tmp_path):
    """A real torchrun; equal but for the order of sums."""
    how = {"weights": str(start), **SOME, "batch": 10, "augment": "light", "freeze": 4}
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    figures = finetune(find(puppets), store, one, **how)
    script = tmp_path / "team.py"
    script.write_text(
        "import json, sys\n"
        "from pathlib import Path\n"
        "from vacli.extract.datasets import find\n"
        "from vacli.extract.finetune import finetune\n"
        "from vacli.store import Store\n"
        "data, out, store, how = sys.argv[1:]\n"
        "print(json.dumps(finetune(find(data), Store(store), Path(out), **json.loads(how))))\n"
    )
    args = [str(script), str(puppets), str(two), str(store.path), json.dumps(how)]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *args],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert told[0] == told[1]
    assert told[0] == pytest.approx(figures, abs=1e-3)
    of_one, of_two = load_file(one), load_file(two)
    for k, v in of_one.items():
        torch.testing.assert_close(of_two[k], v, rtol=1e-3, atol=1e-3)
    assert moved(start, two) == moved(start, one)
    assert {p.name for p in tmp_path.iterdir()} == {"one.safetensors", "two.safetensors", "team.py"}


def test_a_broken_video_is_left_out_and_named(puppets, store, tmp_path, capsys):
    shutil.copytree(puppets, tmp_path / "data")
    (tmp_path / "data" / "batch1" / "puppet_train_00.mp4").write_text("not a film")
    finetune(find(tmp_path / "data"), store, tmp_path / "a.safetensors", **FAST)
    told = capsys.readouterr().out
    assert "left out: " in told
    assert "puppet_train_00.mp4: cannot be read as a video" in told
    finetune(find(puppets), store, tmp_path / "b.safetensors", **FAST)
    assert (tmp_path / "a.safetensors").read_bytes() != (tmp_path / "b.safetensors").read_bytes()


def test_without_labelled_frames_nothing_is_tuned(puppets, store, tmp_path):
    out = tmp_path / "a.safetensors"
    with pytest.raises(
        VacliError, match=r"no labelled face to tune on: 0 of the 1 videos .* train set; wanted train/"
    ):
        finetune(find(puppets / "batch1" / "puppet_train_00.mp4"), store, out, **FAST)
    train = [s for s in find(puppets) if s.split == "train"]
    with pytest.raises(VacliError, match="no labelled face to judge by: 0 of the 2 videos"):
        finetune(train, store, out, **FAST)
    assert list(tmp_path.iterdir()) == []


def test_crops_of_several_sizes_are_refused(puppets, store, tmp_path):
    shutil.copytree(puppets, tmp_path / "data")
    odd = tmp_path / "data" / "cropped_aligned" / "puppet_train_01" / "00003.jpg"
    cv2.imwrite(str(odd), np.zeros((50, 50, 3), np.uint8))
    with pytest.raises(VacliError, match="puppet_train_01: crops of several sizes"):
        finetune(find(tmp_path / "data"), store, tmp_path / "a.safetensors", **FAST)


@pytest.mark.parametrize(
    ("how", "complaint"),
    [
        ({"epochs": 0}, "epochs 0: wanted at least 1"),
        ({"frames_per_video": 0}, "--frames-per-video 0 --batch 64: wanted at least 1, and 2"),
        ({"batch": 1}, "--frames-per-video 300 --batch 1: wanted at least 1, and 2"),
        ({"lr": 0.0}, "lr 0.0: wanted more than 0"),
        ({"freeze": 7}, "--freeze 7: test_vit has 6 blocks; wanted 0 to 6"),
        ({"layer_decay": 1.5}, "--layer-decay 1.5: wanted a factor in (0, 1]"),
        ({"loss": "mae"}, "--loss mae: wanted one of ccc, mse"),
        ({"augment": "wild"}, "--augment wild: wanted one of none, light, full"),
        ({"sampling": "odd"}, "--sampling odd: wanted one of even, time, balanced"),
        ({"dtype": "float16"}, "--dtype float16: a CPU takes a hundred times as long"),
        ({"dtype": "int4"}, "dtype int4: wanted one of float32, bfloat16, float16"),
        ({"model": "vit_gigantic"}, "timm knows no model 'vit_gigantic'"),
        ({"from_scratch": False, "weights": "none.pth"}, "no weights at"),
        ({"out": Path("a.pth")}, "--out a.pth: weights are written as .safetensors"),
        ({"out": Path(__file__) / "a.safetensors"}, "cannot write"),
    ],
)
def test_what_cannot_be_done_is_told_before_anything_is_tuned(how, complaint, puppets, store, tmp_path):
    with pytest.raises(VacliError) as caught:
        finetune(find(puppets), store, **{"out": tmp_path / "a.safetensors", **FAST, **how})
    assert complaint in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_weights_that_cannot_be_written_leave_the_old_ones_and_all_that_was_done(
    puppets, store, tmp_path, monkeypatch
):
    out = tmp_path / "a.safetensors"
    out.write_bytes(b"old")
    replace = os.replace

    def full(old, new) -> None:
        if new == out:
            raise OSError(28, "No space left on device")
        replace(old, new)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(VacliError, match=r"cannot write .*a\.safetensors: .*No space left"):
            finetune(find(puppets), store, out, **FAST)
    assert out.read_bytes() == b"old"
    monkeypatch.setattr(module, "_loss", None)  # nothing is tuned again
    finetune(find(puppets), store, out, **FAST)
    assert {p.name for p in tmp_path.iterdir()} == {"a.safetensors"}
    assert Mae(weights=str(out)).size == 32
