"""Tuning moves what it should and nothing else, gives the same bytes for a seed, and says what it cannot do."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from vacli import VacliError
from vacli.extract import finetune as module
from vacli.extract.datasets import find
from vacli.extract.finetune import finetune
from vacli.extract.mae import Mae
from vacli.extract.synthetic import make_puppets
from vacli.store import Store

FAST = {"model": "test_vit", "from_scratch": True, "size": 32, "epochs": 1, "lr": 1e-2}


@pytest.fixture(scope="module")
def puppets(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("puppets")
    make_puppets(folder, train=2, validation=1, length_s=3, rate_hz=5, processes=1)
    return folder


@pytest.fixture(scope="module")
def start(puppets, tmp_path_factory) -> Path:
    """Weights to go on from."""
    lab = tmp_path_factory.mktemp("start")
    store = Store(lab / "a.zarr", create=True)
    finetune(find(puppets), store, lab / "start.safetensors", **FAST, note="of puppets")
    return lab / "start.safetensors"


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "features.zarr", create=True)


def test_frozen_blocks_and_what_is_below_them_do_not_move(puppets, start, store, tmp_path, monkeypatch):
    optimizers = []
    adamw = torch.optim.AdamW
    monkeypatch.setattr(
        torch.optim, "AdamW", lambda *a, **k: optimizers.append(adamw(*a, **k)) or optimizers[0]
    )
    out = tmp_path / "tuned.safetensors"
    finetune(find(puppets), store, out, weights=str(start), freeze=4, epochs=1, lr=1e-2)
    before, after = load_file(start), load_file(out)
    assert before.keys() == after.keys()
    moved = {k for k in before if not torch.equal(before[k], after[k])}
    free = {k for k in before if k.startswith(("blocks.4.", "blocks.5.", "norm."))}
    assert moved == free
    [optimizer] = optimizers
    tuned = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(tuned) == len(free) + 2  # and the head's weight and bias
    assert set(optimizer.state) == set(tuned)


def test_by_default_two_thirds_of_the_blocks_stay(puppets, start, store, tmp_path):
    out = tmp_path / "tuned.safetensors"
    finetune(find(puppets), store, out, weights=str(start), epochs=1, lr=1e-2)
    before, after = load_file(start), load_file(out)
    moved = {
        k.split(".")[1] for k in before if k.startswith("blocks.") and not torch.equal(before[k], after[k])
    }
    assert moved == {"4", "5"}


def test_from_scratch_everything_moves(start, puppets, store, tmp_path):
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_fit", lambda *_: None)
        finetune(find(puppets), store, tmp_path / "unmoved.safetensors", **FAST)
    before, after = load_file(tmp_path / "unmoved.safetensors"), load_file(start)
    assert [k for k in before if torch.equal(before[k], after[k])] == []


def test_the_file_is_accepted_by_mae_and_carries_its_note(start):
    mae = Mae(weights=str(start))
    assert (mae.model_name, mae.size, mae.note, mae.licence) == ("test_vit", 32, "of puppets", None)
    assert mae(np.zeros((2, 112, 112, 3), np.uint8)).shape == (2, 64)
    with safe_open(start, "pt") as f:
        about = json.loads(f.metadata()["vacli"])
    assert about["frozen_blocks"] == 0
    assert -1 <= about["ccc_valence"] <= 1


def test_the_licence_of_the_start_goes_with_the_tuned_weights(puppets, start, store, tmp_path):
    bound = tmp_path / "bound.safetensors"
    about = {"model": "test_vit", "size": 32, "licence": "cc-by-nc-4.0"}
    save_file(load_file(start), bound, metadata={"vacli": json.dumps(about)})
    finetune(find(puppets), store, tmp_path / "tuned.safetensors", weights=str(bound), epochs=1)
    assert "not for commercial use" in str(Mae(weights=str(tmp_path / "tuned.safetensors")).licence)


def test_a_seed_gives_the_same_bytes_and_another_one_others(puppets, store, tmp_path, start):
    outs = [tmp_path / f"{name}.safetensors" for name in "abc"]
    figures = [
        finetune(find(puppets), store, o, **FAST, seed=s) for o, s in zip(outs, (3, 3, 4), strict=True)
    ]
    assert outs[0].read_bytes() == outs[1].read_bytes() != outs[2].read_bytes()
    assert figures[0] == figures[1]


@pytest.mark.parametrize("epochs", [2, 10, 11])
def test_any_number_of_steps_can_be_scheduled(epochs, puppets, store, tmp_path):
    out = tmp_path / "a.safetensors"
    figures = finetune(find(puppets), store, out, **FAST | {"epochs": epochs}, frames_per_video=2)
    assert all(-1 <= ccc <= 1 for ccc in figures.values())
    assert Mae(weights=str(out)).model_name == "test_vit"


def test_a_broken_video_is_left_out(puppets, start, store, tmp_path, capsys):
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
    assert not out.exists()


@pytest.mark.parametrize(
    ("how", "complaint"),
    [
        ({"epochs": 0}, "0 epochs of 300 frames per video; wanted at least 1 of each"),
        ({"freeze": 7}, "--freeze 7: test_vit has 6 blocks; wanted 0 to 6"),
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


def test_weights_that_cannot_be_written_leave_the_old_ones(puppets, start, store, tmp_path, monkeypatch):
    out = tmp_path / "a.safetensors"
    out.write_bytes(b"old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(VacliError, match=r"cannot write .*a\.safetensors: .*No space left"):
        module._save(torch.nn.Linear(1, 1), {}, out)
    assert out.read_bytes() == b"old"
    assert [p.name for p in tmp_path.glob("*.safetensors*")] == ["a.safetensors"]
    assert list(tmp_path.glob(".a*")) == []
