"""Training: the same twice, the same through any interruption, in every mode; what it learns, and what it refuses."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from vacli import VacliError
from vacli.store import Store
from vacli.temporal import fitting, plan
from vacli.temporal import train as training
from vacli.temporal.evaluate import evaluate, figures, load_clips
from vacli.temporal.model import Network
from vacli.temporal.predict import Run, open_run, predict
from vacli.temporal.preset import Preset
from vacli.temporal.train import train

from .toy_store import ROWS, add_video, make_store, real_logmel, recipe, tiny


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    return make_store(tmp_path_factory.mktemp("toy") / "features.zarr")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def run(store, runs) -> Run:
    """A finished run of three epochs of a tiny Mamba."""
    return train(store, tiny("mamba"), runs=runs, name="whole", tell=print)


def weights(run: Run) -> str:
    return hashlib.sha256((run.path / "weights.safetensors").read_bytes()).hexdigest()


def metrics(run: Run) -> list[dict]:
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def assert_same(run: Run, other: Run) -> None:
    assert weights(run) == weights(other)
    assert metrics(run) == metrics(other)
    for key in ("figures", "smoothing", "settings", "train", "validation"):
        assert run.about[key] == other.about[key]


def refusal(store: Store, preset: Preset, tmp_path: Path, **how: object) -> str:
    with pytest.raises(VacliError) as e:
        train(store, preset, runs=tmp_path / "runs", tell=lambda line: None, **how)
    assert "\n" not in str(e.value)
    return str(e.value)


# ---- the same, through whatever happens ----------------------------------------------------------------------


def test_the_same_seed_gives_the_same_run_and_another_seed_another(store, run, tmp_path):
    torch.manual_seed(123)  # what happened before must not matter
    assert_same(train(store, tiny("mamba"), runs=tmp_path, name="again"), run)
    assert weights(train(store, tiny("mamba"), runs=tmp_path, seed=1)) != weights(run)


def test_a_finished_run_holds_what_is_needed_and_nothing_else(run):
    names = {
        p.name for p in run.path.iterdir() if not p.name.startswith("events.out.tfevents")
    }  # TensorBoard's
    assert names == {"run.json", "weights.safetensors", "metrics.jsonl"}
    assert [line["epoch"] for line in metrics(run)] == [1, 2, 3]
    assert run.about["versions"]["torch"] == torch.__version__
    assert run.about["device"].startswith("cpu") or torch.cuda.is_available()
    assert run.about["streams"]["mae"]["recipe"] == recipe("mae")


def test_a_finished_run_is_not_trained_again(store, run, monkeypatch):
    monkeypatch.setattr(training, "_Training", None)
    told: list[str] = []
    again = train(store, tiny("mamba"), runs=run.path.parent, name="whole", tell=told.append)
    assert again.about == run.about
    assert "finished already" in told[-1]


def test_a_name_taken_by_other_settings_is_refused(store, run):
    for preset, seed in ((tiny("mamba", epochs=4), 0), (tiny("mamba"), 1), (tiny("mamba", ["mae"]), 0)):
        with pytest.raises(VacliError, match=r"other settings.*--name"):
            train(store, preset, runs=run.path.parent, name="whole", seed=seed, tell=lambda line: None)


class Interrupted(Exception):
    pass


def stop_at(beginning: str) -> Callable[[str], None]:
    def tell(line: str) -> None:
        if line.startswith(beginning):
            raise Interrupted

    return tell


MODES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("mamba", {}),
    "ema, bfloat16, modality dropout": (
        "mamba",
        {"ema": 0.9, "precision": "bfloat16", "modality_dropout": 0.4},
    ),
    "plateau": (
        "linear",
        {"schedule": "plateau", "plateau_patience": 0, "lr": 0.5, "ema": 0.5, "warmup_epochs": 0},
    ),
    "alone": ("mamba", {"alone_epochs": 2, "epochs": 2, "ccc": "sequence", "mse": 0.1}),
    "whole videos": ("mamba", {"also": {"windows.whole": "true"}, "ccc": "sequence", "optimizer": "adam"}),
}


@pytest.mark.parametrize("mode", MODES)
def test_stopped_after_every_epoch_and_resumed_it_is_the_same_run(store, tmp_path, mode):
    head, how = MODES[mode]
    preset = tiny(head, **how)
    whole = train(store, preset, runs=tmp_path, name="whole", tell=lambda line: None)
    stops = ["training", *["alone"] * preset.train.alone_epochs, *["epoch"] * preset.train.epochs]

    def tell(line: str) -> None:
        if line.startswith(stops[0]):
            stops.pop(0)
            raise Interrupted

    while stops:
        with pytest.raises(Interrupted):
            train(store, preset, runs=tmp_path, name="stopped", tell=tell)
    told: list[str] = []
    assert_same(train(store, preset, runs=tmp_path, name="stopped", tell=told.append), whole)
    assert not [line for line in told if line.startswith(("epoch", "alone"))]  # only the end was left


def test_killed_between_any_two_files_and_resumed_it_is_the_same_run(store, tmp_path, monkeypatch):
    """Every write of a run folder fails once, before it and (for appended lines) half-way through it."""
    writes = 0
    stop_at: int | None = None
    replace, append = training.replace_file, training._append

    def counted(half: bool, write, path: Path, data) -> None:
        nonlocal writes
        writes += 1
        if writes == stop_at:
            if half:
                with open(path, "a") as f:
                    f.write(data[:9])
            raise Interrupted
        write(path, data)

    monkeypatch.setattr(training, "replace_file", lambda path, data: counted(False, replace, path, data))
    monkeypatch.setattr(training, "_append", lambda path, line: counted(True, append, path, line))
    preset = tiny("mamba", alone_epochs=1, epochs=1, ema=0.9)
    run = train(store, preset, runs=tmp_path, name="counting", tell=lambda line: None)
    every = writes
    assert every == 2 + 2 * 2 + 1 + 1  # record, metrics; two an epoch; the best weights; the record
    for stop in range(1, every + 1):
        name = f"stopped{stop}"
        writes, stop_at = 0, stop
        with pytest.raises(Interrupted):
            train(store, preset, runs=tmp_path, name=name, tell=lambda line: None)
        stop_at = None
        assert_same(train(store, preset, runs=tmp_path, name=name, tell=lambda line: None), run)


def test_killed_while_training_and_resumed_it_is_the_same_run(store, tmp_path):
    script = (
        "import sys; from vacli.store import Store; from vacli.temporal.preset import check_preset;"
        "from vacli.temporal.train import train; import json;"
        "train(Store(sys.argv[1]), check_preset(json.loads(sys.argv[2]), ''), runs=sys.argv[3], name='killed',"
        " tell=lambda line: print(line, flush=True))"
    )
    preset = tiny("mamba", epochs=5, alone_epochs=2, ema=0.9, precision="bfloat16", modality_dropout=0.3)
    given = [str(store.path), json.dumps(preset.model_dump()), str(tmp_path)]
    child = subprocess.Popen([sys.executable, "-c", script, *given], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    with child.stdout:
        for line in child.stdout:
            if line.startswith("epoch 2"):
                break
        os.kill(child.pid, signal.SIGKILL)  # somewhere in a later epoch
    assert child.wait() == -signal.SIGKILL
    with pytest.raises(VacliError, match="not finished"):
        open_run("killed", tmp_path)
    told: list[str] = []
    killed = train(store, preset, runs=tmp_path, name="killed", tell=told.append)
    assert told[0].startswith("going on with")
    assert [line["epoch"] for line in metrics(killed)] == [1, 2, *range(1, 6)]
    assert [line.get("stage") for line in metrics(killed)] == ["alone"] * 2 + [None] * 5
    assert_same(killed, train(store, preset, runs=tmp_path, name="whole", tell=told.append))
    assert not [p.name for p in killed.path.iterdir() if p.name.startswith((".", "last"))]


def test_a_run_folder_that_cannot_be_read_is_one_line(store, tmp_path):
    preset = tiny("linear")
    (tmp_path / "runs" / "broken").mkdir(parents=True)
    for text in ("", "[]", "{}", "{"):
        (tmp_path / "runs" / "broken" / "run.json").write_text(text)
        assert "run.json" in refusal(store, preset, tmp_path, name="broken")

    with pytest.raises(Interrupted):
        train(store, preset, runs=tmp_path / "runs", name="cut", tell=stop_at("epoch 1"))
    state = tmp_path / "runs" / "cut" / "last.pt"
    whole = state.read_bytes()
    torch.save({"stage": "whole"}, tmp_path / "another.pt")
    another = (tmp_path / "another.pt").read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1  # torch by itself may read it without a word
    of_another = hashlib.sha256(another).digest() + another
    for damaged in (b"", whole[:1000], b"x" * 5000, bytes(flipped), another, of_another):
        state.write_bytes(damaged)
        assert "last.pt is damaged or cannot be read; remove it" in refusal(
            store, preset, tmp_path, name="cut"
        )
    state.write_bytes(whole)
    with pytest.raises(Interrupted):
        train(store, preset, runs=tmp_path / "runs", name="cut", tell=stop_at("epoch 3"))
    (tmp_path / "runs" / "cut" / "weights.safetensors").write_bytes(b"x" * 100)
    assert "weights.safetensors" in refusal(store, preset, tmp_path, name="cut")


def test_metrics_that_are_lost_or_cannot_be_read_stop_nothing(store, tmp_path):
    preset = tiny("linear")
    whole = train(store, preset, runs=tmp_path, name="whole", tell=lambda line: None)
    for left, kept in ((None, []), (b"\xff\xfe\n", ["\ufffd\ufffd"])):
        with pytest.raises(Interrupted):
            train(store, preset, runs=tmp_path, name=f"cut{len(kept)}", tell=stop_at("epoch 1"))
        metrics_file = tmp_path / f"cut{len(kept)}" / "metrics.jsonl"
        metrics_file.unlink()
        if left:
            metrics_file.write_bytes(left)
        run = train(store, preset, runs=tmp_path, name=f"cut{len(kept)}", tell=lambda line: None)
        assert weights(run) == weights(whole)
        lines = metrics_file.read_text().splitlines()
        assert lines[: len(kept)] == kept
        assert [json.loads(line)["epoch"] for line in lines[len(kept) :]] == [2, 3]


def test_a_run_folder_that_cannot_be_written_is_one_line_and_keeps_what_is_done(
    store, run, tmp_path, monkeypatch
):
    (tmp_path / "file").write_text("")
    with pytest.raises(VacliError, match=r"cannot use .*file"):
        train(store, tiny("mamba"), runs=tmp_path / "file", tell=lambda line: None)
    fsync, calls = os.fsync, 0

    def full_in_the_end(fd: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 12:
            raise OSError(28, "No space left on device")
        fsync(fd)

    monkeypatch.setattr(os, "fsync", full_in_the_end)
    told: list[str] = []
    with pytest.raises(VacliError, match=r"No space left on device.*run again: what is done is kept"):
        train(store, tiny("mamba"), runs=tmp_path, name="full", tell=told.append)
    assert told[-1].startswith("epoch 1")
    assert_same(train(store, tiny("mamba"), runs=tmp_path, name="full", tell=told.append), run)


# ---- learning ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("head", "how"), [("linear", {"epochs": 12}), ("mamba", {"epochs": 15})])
def test_it_learns_what_the_streams_show(store, tmp_path, head, how):
    found = train(store, tiny(head, lr=0.03, **how), runs=tmp_path, tell=print).about["figures"]
    assert found["valence"] > 0.8
    assert found["arousal"] > 0.8


def test_each_stream_is_needed_where_it_alone_shows_the_label(store, tmp_path):
    preset = tiny("linear", ["mae"], lr=0.03, epochs=12)
    found = train(store, preset, runs=tmp_path, tell=print).about["figures"]
    assert found["valence"] > 0.8
    assert found["arousal"] < 0.5  # it is in the sound


def test_it_stops_when_nothing_gets_better_and_keeps_the_best(store, tmp_path):
    preset = tiny("linear", lr=1e-30, epochs=20, patience=3)
    stopped = train(store, preset, runs=tmp_path, tell=print)
    assert [line["epoch"] for line in metrics(stopped)] == [1, 2, 3, 4]


def test_the_best_epoch_is_kept_not_the_last(store, tmp_path):
    run = train(store, tiny("linear", lr=0.5, warmup_epochs=0, epochs=8), runs=tmp_path, tell=print)
    best = max(metrics(run), key=lambda line: line["ccc"]["mean"])
    clips = load_clips(store, run.about, "validation")
    assert figures(predict(run, clips, smooth=False), clips) == best["ccc"]


def test_diverging_is_one_line_that_names_the_learning_rate(store, tmp_path):
    told = refusal(store, tiny("linear", lr=1e30, warmup_epochs=0), tmp_path)
    assert "diverged" in told
    assert "train.lr, now 1e+30" in told


# ---- judging -------------------------------------------------------------------------------------------------


def test_evaluating_gives_the_figures_of_training_every_time(store, run):
    for found in (evaluate(run, store).figures, evaluate(run, store).figures):
        assert {key: found[key] for key in run.about["figures"]} == run.about["figures"]
        assert found["videos"] == 3
        assert found["frames"] == 3 * (ROWS - math.ceil(ROWS / 13))


def test_a_missing_feature_is_named_with_the_mend(store, run, tmp_path):
    shutil.copytree(store.path, tmp_path / "s.zarr")
    copy = Store(tmp_path / "s.zarr")
    media = run.about["validation"]["v07"]["logmel"]
    copy.drop(copy.entry_of(recipe("logmel"), media))
    with pytest.raises(VacliError, match=r"lacks logmel of v07.*vacli extract"):
        evaluate(run, copy)
    for number in range(9):
        copy.drop(copy.entry_of(recipe("mae"), f"{number:02}" * 32))
    assert "vacli extract" in refusal(copy, tiny("mamba"), tmp_path)


# ---- where the weights begin ---------------------------------------------------------------------------------


def first_weights(
    store: Store, preset: Preset, runs: Path, told: list[str], **how: Any
) -> dict[str, torch.Tensor]:
    """The weights after an epoch in which nothing moves."""
    still = preset.model_copy(
        update={"train": preset.train.model_copy(update={"lr": 1e-30, "weight_decay": 0.0})}
    )
    run = train(store, still, runs=runs, name=f"still{len(list(runs.iterdir()))}", tell=told.append, **how)
    return load_file(run.path / "weights.safetensors")


def test_it_starts_from_the_weights_of_a_run(store, run, tmp_path):
    trained = load_file(run.path / "weights.safetensors")
    shutil.copytree(run.path, tmp_path / "before")
    for init_from in ("before", str(run.path), str(run.path / "weights.safetensors")):
        told: list[str] = []
        found = first_weights(store, tiny("mamba", epochs=1, init_from=init_from), tmp_path, told, seed=3)
        assert found.keys() == trained.keys()
        assert all(torch.equal(found[name], trained[name]) for name in found)
        assert told[0].startswith(f"{len(trained)} of the network's {len(trained)} tensors come from")


def test_of_weights_to_start_from_those_that_fit_are_taken(store, run, tmp_path):
    trained = load_file(run.path / "weights.safetensors")
    wider = tiny("mamba", epochs=1, init_from=str(run.path), also={"tasks.va.hidden": "16"})
    told: list[str] = []
    found = first_weights(store, wider, tmp_path, told, seed=3)
    other = {name for name in found if name.startswith("tasks.")} - {"tasks.va.2.bias"}
    assert f"{len(found) - len(other)} of the network's {len(found)} tensors" in told[0]
    assert all(torch.equal(found[name], trained[name]) for name in found.keys() - other)


def test_weights_to_start_from_that_are_none_are_one_line(store, tmp_path):
    (tmp_path / "broken.safetensors").write_bytes(b"x" * 100)
    save_file({"mine": torch.zeros(3)}, tmp_path / "foreign.safetensors")
    for init_from, why in (
        ("nowhere", "neither a run, here or in"),
        ("mamba", "neither a run, here or in"),  # a head's newest run is another one tomorrow
        (str(tmp_path / "broken.safetensors"), "broken.safetensors"),
        (str(tmp_path / "foreign.safetensors"), "foreign.safetensors"),
    ):
        assert why in refusal(store, tiny("mamba", init_from=init_from), tmp_path)
    assert not list((tmp_path / "runs").glob("*"))  # nothing was begun


def test_a_published_checkpoint_gives_what_has_a_place_here(store, tmp_path, monkeypatch):
    net = Network(tiny("mamba"), {"mae": 8, "logmel": 4})
    given = {"tasks.va.2.bias": torch.tensor([0.25, -0.5]), "decode.9.odd": torch.zeros(2)}
    monkeypatch.setattr(plan, "read_charon", lambda file: given)
    told: list[str] = []
    about = {"streams": {}, "started_from": {"train.init_from": {"file": str(tmp_path / "published.pth")}}}
    plan.start_from(net, about, told.append)
    assert net.state_dict()["tasks.va.2.bias"].tolist() == [0.25, -0.5]
    assert told[0].startswith(f"1 of the network's {len(net.state_dict())} tensors")
    given.pop("tasks.va.2.bias")
    with pytest.raises(VacliError, match=r"none of its 1 tensors"):
        plan.start_from(net, about, told.append)


def started(net: Network, ours: list[str], tmp_path: Path, **of_run: Any) -> str:
    """Start from weights of 7 throughout, of the shapes that `net` has or `made` says; what was told."""
    made = of_run.pop("made", net)
    file = tmp_path / "weights.safetensors"
    save_file({name: torch.full_like(value, 7.0) for name, value in made.state_dict().items()}, file)
    about = {
        "streams": {name: {"folder": folder} for name, folder in zip(net.streams, ours, strict=True)},
        "started_from": {"train.init_from": {"file": str(file), "sha256": "", **of_run}},
    }
    told: list[str] = []
    plan.start_from(net, about, told.append)
    return told[0]


def taken(net: Network) -> set[str]:
    return {name for name, value in net.state_dict().items() if (value == 7).all()}


def of(net: Network, *beginnings: str) -> set[str]:
    return {name for name in net.state_dict() if name.startswith(beginnings)}


DIMS = {"mae": 8, "logmel": 4, "iresnet": 8}


def small(streams: list[str], fuse: str = "concat") -> Network:
    blocks = "[{linear = {dim = 8}}]"
    return Network(tiny("mamba", streams, {"fuse": fuse, "encode.*.blocks": blocks}), DIMS)


def test_streams_are_joined_by_their_recipes_not_by_their_places(tmp_path):
    made = small(["mae", "logmel"])
    net = small(["logmel", "mae"])
    told = started(
        net, ["logmel@1", "mae@1"], tmp_path, made=made, fuse="concat", streams=["mae@1", "logmel@1"]
    )
    assert taken(net) == of(net, "encode.", "absent.")
    assert "all behind the streams, which were fused as concat of mae, logmel" in told

    net = small(["mae", "iresnet"])  # as wide as each other
    told = started(
        net,
        ["mae@2", "iresnet@1"],
        tmp_path,
        made=small(["iresnet", "mae"]),
        fuse="concat",
        streams=["iresnet@1", "mae@1"],
    )
    assert taken(net) == of(net, "encode.1.", "absent.1")
    assert "mae, which was made in another way there" in told

    net = small(["mae", "logmel"])
    told = started(
        net, ["mae@1", "logmel@1"], tmp_path, made=small(["mae"]), fuse="concat", streams=["mae@1"]
    )
    assert taken(net) == of(net, "encode.0.", "absent.0")
    assert "logmel, which was not there" in told


def test_what_one_stream_asks_another_goes_with_both(tmp_path):
    made = small(["mae", "logmel", "iresnet"], "cross_attn")
    net = small(["mae", "iresnet"], "cross_attn")
    theirs = ["mae@1", "logmel@1", "iresnet@1"]
    started(net, ["mae@1", "iresnet@1"], tmp_path, made=made, fuse="cross_attn", streams=theirs)
    assert taken(net) == of(net, "encode.", "absent.", "ask.")
    net = small(["iresnet", "mae"], "cross_attn")  # another one asks
    started(net, ["iresnet@1", "mae@1"], tmp_path, made=made, fuse="cross_attn", streams=theirs)
    assert taken(net) == of(net, "encode.", "absent.")


def test_what_lies_behind_streams_that_are_fused_in_another_way_is_learned_again(tmp_path):
    net = small(["mae", "iresnet"])  # what comes out is as wide
    made, streams = small(["mae", "iresnet"], "cross_attn"), ["mae@1", "iresnet@1"]
    told = started(net, streams, tmp_path, made=made, fuse="cross_attn", streams=streams)
    assert taken(net) == of(net, "encode.", "absent.")
    assert "fused as cross_attn of mae, iresnet" in told


def test_a_stream_that_was_encoded_in_another_way_brings_nothing_its_standardising_neither(tmp_path):
    made = Network(tiny("mamba", ["mae"], {"encode.*.blocks": "[{linear = {dim = 6}}]"}), DIMS)
    net = small(["mae"])
    told = started(net, ["mae@1"], tmp_path, made=made, fuse="concat", streams=["mae@1"])
    assert not taken(net) & of(net, "encode.", "absent.")
    assert of(net, "tasks.") <= taken(net)
    assert "mae, which is encoded in another way there" in told


def test_a_file_of_weights_alone_says_nothing_of_standardised_features(tmp_path):
    net = small(["mae", "logmel"])
    told = started(net, ["mae@1", "logmel@1"], tmp_path)
    left_out = {
        n for n in of(net, "absent.", "encode.") if n.startswith("absent") or n.endswith(("mean", "tion"))
    }
    assert taken(net) == net.state_dict().keys() - left_out
    assert len(left_out) == 6
    assert "left out: means, deviations and stand-ins" in told
    net = Network(tiny("mamba", ["mae"], {"encode.*.standardise": "false"}), DIMS)
    told = started(net, ["mae@1"], tmp_path)  # as the published network
    assert taken(net) == net.state_dict().keys()
    assert "left out" not in told


def test_other_weights_to_start_from_are_other_settings(store, tmp_path):
    file = tmp_path / "w.safetensors"
    preset, names = tiny("linear", epochs=1, init_from=str(file)), []
    for value in (0.0, 1.0):
        save_file({"tasks.va.bias": torch.full((2,), value)}, file)
        run = train(store, preset, runs=tmp_path / "runs", tell=lambda line: None)
        names.append(run.path.name)
        assert run.about["started_from"]["train.init_from"]["file"] == str(file)
    assert names[0] != names[1]


def test_a_vgg_takes_its_weights_once_and_reads_patches(tmp_path, monkeypatch):
    store = Store(tmp_path / "s.zarr", create=True)
    for number in range(3):
        split = "validation" if number == 2 else "train"
        add_video(store, number, split, rows=40, instead={"logmel": real_logmel(number, 40)})
    started: list[int] = []
    monkeypatch.setattr(training.Network, "start_vgg", lambda net: started.append(1))
    also = {"encode.logmel": "{vgg = {width = 0.05}, blocks = [{linear = {dim = 8}}]}"}
    preset = tiny("mamba", also=also | {"windows.length": "10", "windows.stride": "10"}, epochs=2)
    with pytest.raises(Interrupted):
        train(store, preset, runs=tmp_path, name="vgg", tell=stop_at("epoch 1"))
    run = train(store, preset, runs=tmp_path, name="vgg", tell=lambda line: None)
    assert started == [1]
    assert_same(train(store, preset, runs=tmp_path, name="again", tell=lambda line: None), run)


# ---- what is said, shown and refused -------------------------------------------------------------------------


def test_a_second_trainer_in_a_run_folder_is_refused(store, tmp_path):
    preset, told = tiny("linear", epochs=1), []

    def tell(line: str) -> None:
        if line.startswith("epoch 1"):
            told.append(refusal(store, preset, tmp_path, name="one"))

    first = train(store, preset, runs=tmp_path / "runs", name="one", tell=tell)
    assert "one is being trained by another process" in told[0]
    assert train(store, preset, runs=tmp_path / "runs", name="one", tell=told.append).about == first.about


def test_windows_longer_than_every_video_are_cut_and_that_is_said(store, tmp_path):
    told: list[str] = []
    longer = tiny("linear", epochs=1, also={"windows.length": "1000", "windows.stride": "1000"})
    train(store, longer, runs=tmp_path, tell=told.append)
    assert (
        told[0] == f"windows of 1000 rows are longer than every training video: they are cut to {ROWS} rows"
    )
    whole = tiny("linear", epochs=1, also={"windows.length": "1000", "windows.whole": "true"})
    train(store, whole, runs=tmp_path, tell=told.append)
    assert len([line for line in told if "are cut" in line]) == 1


def test_float16_wants_a_gpu_and_nothing_is_begun(store, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "best_device", lambda: torch.device("cpu"))
    assert "set bfloat16 or float32" in refusal(store, tiny("linear", precision="float16"), tmp_path)
    assert not (tmp_path / "runs").exists()


def test_out_of_memory_says_what_to_set_and_loses_nothing(store, tmp_path, monkeypatch):
    preset, steps = tiny("linear", epochs=3), 0
    whole = train(store, preset, runs=tmp_path, name="whole", tell=lambda line: None)
    step = fitting.Fit._step

    def full(fit: fitting.Fit, batch: Any, rate: float) -> torch.Tensor:
        nonlocal steps
        steps += 1
        if steps == 8:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return step(fit, batch, rate)

    monkeypatch.setattr(fitting.Fit, "_step", full)
    told = refusal(store, preset, tmp_path, name="cut")
    assert told.startswith(
        "out of memory of the GPU: set train.batch (now 4), windows.length (now 50) or train."
    )
    monkeypatch.undo()
    lines: list[str] = []
    assert_same(train(store, preset, runs=tmp_path / "runs", name="cut", tell=lines.append), whole)
    assert "after epoch 1" in lines[0]


@pytest.mark.parametrize("dim", [10**22, 2**62, 2**31])
def test_a_network_beyond_all_sizes_is_refused_with_its_preset(dim):
    with pytest.raises(VacliError, match=r"block linear: dim: .*less than 2147483648"):
        tiny("mamba", also={"encode.*.blocks": f"[{{linear = {{dim = {dim}}}}}]"})


def test_streams_without_blocks_are_not_trained_alone_and_nothing_is_begun(store, tmp_path):
    assert "alone_epochs = 2" in refusal(store, tiny("linear", alone_epochs=2), tmp_path)
    assert not (tmp_path / "runs").exists()


def test_a_warm_up_that_would_fill_a_stage_is_told(store, tmp_path):
    told: list[str] = []
    preset = tiny("mamba", epochs=2, alone_epochs=1, warmup_epochs=2)
    train(store, preset, runs=tmp_path, tell=told.append)
    assert [line for line in told if "warmup" in line] == [
        f"train.warmup_epochs = 2 is all of train.{stage} or more: the rate rises over {third} epochs"
        for stage, third in (("alone_epochs = 1", "0.33"), ("epochs = 2", "0.67"))
    ]
    told.clear()
    train(store, tiny("mamba", epochs=2, warmup_epochs=1), runs=tmp_path, tell=told.append)
    assert not [line for line in told if "warmup" in line]


def test_a_plateau_lowers_the_rate_after_its_patience_again_and_again(store, tmp_path, monkeypatch):
    fell: list[int] = []
    fall = fitting.Fit.fall

    def counted(fit: fitting.Fit, best: dict[str, torch.Tensor]) -> None:
        fell.append(len((tmp_path / "p" / "metrics.jsonl").read_text().splitlines()))
        fall(fit, best)

    monkeypatch.setattr(fitting.Fit, "fall", counted)
    how = {"lr": 1e-30, "epochs": 20, "patience": 6, "schedule": "plateau", "plateau_patience": 1}
    run = train(store, tiny("linear", **how), runs=tmp_path, name="p", tell=lambda line: None)
    assert fell == [2, 4, 6]  # the best is epoch 0; two that are no better, and two, and two
    assert len(metrics(run)) == 7


def test_metrics_go_to_tensorboard_where_it_is_installed(store, tmp_path, monkeypatch):
    shown: list[tuple[str, float, int]] = []
    begun: list[tuple[str, int]] = []

    class Writer:
        def __init__(self, place: str, purge_step: int) -> None:
            begun.append((place, purge_step))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            shown.append((name, value, step))

        def flush(self) -> None:
            pass

        def close(self) -> None:
            begun.append(("closed", 0))

    board = types.ModuleType("tensorboardX")
    board.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setitem(sys.modules, "tensorboardX", board)
    preset, place = tiny("linear", epochs=2), str(tmp_path / "board")
    with pytest.raises(Interrupted):
        train(store, preset, runs=tmp_path, name="board", tell=stop_at("epoch 1"))
    run = train(store, preset, runs=tmp_path, name="board", tell=lambda line: None)
    assert begun == [
        (place, 1),
        ("closed", 0),
        (place, 2),
        ("closed", 0),
    ]  # what a killed epoch showed is purged
    for line in metrics(run):
        assert ("loss", line["loss"], line["epoch"]) in shown
        for key, value in line["ccc"].items():
            assert (key, value, line["epoch"]) in shown


def test_without_tensorboard_there_is_nothing_but_the_lines(store, tmp_path, monkeypatch):
    for name in ("torch.utils.tensorboard", "tensorboardX"):
        monkeypatch.setitem(sys.modules, name, None)
    run = train(store, tiny("linear", epochs=1), runs=tmp_path, tell=lambda line: None)
    assert {p.name for p in run.path.iterdir()} == {"run.json", "weights.safetensors", "metrics.jsonl"}
