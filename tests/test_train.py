"""Training: the same twice, the same through any interruption, on the right videos; and what it refuses."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from vacli import VacliError
from vacli.store import Store, Track, folder_name
from vacli.store.labels import ccc
from vacli.temporal import train as training
from vacli.temporal.evaluate import choose_smoothing, evaluate, figures, load_clips
from vacli.temporal.model import Preset
from vacli.temporal.predict import SMOOTH_CHOICES_S, Run, finish, predict
from vacli.temporal.train import train, va_loss
from vacli.temporal.windows import Clip

from .toy_store import ROWS, add_video, make_store, recipe, tiny, tracks_of


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
    for key in ("figures", "smooth_s", "settings", "train", "validation"):
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
    assert {p.name for p in run.path.iterdir()} == {"run.json", "weights.safetensors", "metrics.jsonl"}
    assert [line["epoch"] for line in metrics(run)] == [1, 2, 3]
    assert run.about["versions"]["torch"] == torch.__version__
    assert run.about["streams"]["mae"]["recipe"] == recipe("mae")


def test_a_finished_run_is_not_trained_again(store, run, monkeypatch):
    monkeypatch.setattr(training, "_fit", None)
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


def test_interrupted_at_any_line_and_resumed_it_is_the_same_run(store, run, tmp_path):
    lines = 0
    for stop_at in range(1, 10):
        lines = 0

        def tell(line: str, stop_at: int = stop_at) -> None:
            nonlocal lines
            lines += 1
            if lines == stop_at:
                raise Interrupted

        try:
            train(store, tiny("mamba"), runs=tmp_path, name=str(stop_at), tell=tell)
        except Interrupted:
            told: list[str] = []
            assert_same(train(store, tiny("mamba"), runs=tmp_path, name=str(stop_at), tell=told.append), run)
            assert len([line for line in told if line.startswith("epoch")]) == 3 - max(0, stop_at - 1)
        else:
            break
    assert lines == 4  # one before, one for each epoch: each was interrupted once


def test_killed_between_any_two_files_and_resumed_it_is_the_same_run(store, tmp_path, monkeypatch):
    """Every write of a run folder fails once, before it and (for appended lines) half-way through it."""
    writes = 0
    stop_at: int | None = None
    replace, append = training._replace, training._append

    def counted(half: bool, write, path: Path, data) -> None:
        nonlocal writes
        writes += 1
        if writes == stop_at:
            if half:
                with open(path, "a") as f:
                    f.write(data[:9])
            raise Interrupted
        write(path, data)

    monkeypatch.setattr(training, "_replace", lambda path, data: counted(False, replace, path, data))
    monkeypatch.setattr(training, "_append", lambda path, line: counted(True, append, path, line))
    preset = tiny("mamba", epochs=2)
    run = train(store, preset, runs=tmp_path, name="counting", tell=lambda line: None)
    every = writes
    assert every >= 2 + 2 * 2 + 1
    for stop in range(1, every + 1):
        name = f"stopped{stop}"
        writes, stop_at = 0, stop
        with pytest.raises(Interrupted):
            train(store, preset, runs=tmp_path, name=name, tell=lambda line: None)
        stop_at = None
        assert_same(train(store, preset, runs=tmp_path, name=name, tell=lambda line: None), run)


def test_killed_while_training_and_resumed_it_is_the_same_run(store, tmp_path):
    script = (
        "import sys; from vacli.store import Store; from vacli.temporal.model import check_preset;"
        "from vacli.temporal.train import train; import json;"
        "train(Store(sys.argv[1]), check_preset(json.loads(sys.argv[2]), ''), runs=sys.argv[3], name='killed',"
        " tell=lambda line: print(line, flush=True))"
    )
    preset = tiny("mamba", epochs=12)
    given = [str(store.path), json.dumps(preset.model_dump()), str(tmp_path)]
    child = subprocess.Popen([sys.executable, "-c", script, *given], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    with child.stdout:
        for line in child.stdout:
            if line.startswith("epoch 3"):
                break
        os.kill(child.pid, signal.SIGKILL)  # somewhere in a later epoch
    assert child.wait() == -signal.SIGKILL
    with pytest.raises(VacliError, match="not finished"):
        training.open_run("killed", tmp_path)
    told: list[str] = []
    killed = train(store, preset, runs=tmp_path, name="killed", tell=told.append)
    assert told[0].startswith("going on with")
    assert [line["epoch"] for line in metrics(killed)] == list(range(1, 13))
    assert_same(killed, train(store, preset, runs=tmp_path, name="whole", tell=told.append))
    assert not [p.name for p in killed.path.iterdir() if p.name.startswith((".", "last"))]


def test_a_run_folder_that_cannot_be_read_is_one_line(store, tmp_path):
    preset = tiny("linear")
    (tmp_path / "runs" / "broken").mkdir(parents=True)
    for text in ("", "[]", "{}", "{"):
        (tmp_path / "runs" / "broken" / "run.json").write_text(text)
        assert "run.json" in refusal(store, preset, tmp_path, name="broken")

    def stop(line: str) -> None:
        if line.startswith("epoch 1"):
            raise Interrupted

    with pytest.raises(Interrupted):
        train(store, preset, runs=tmp_path / "runs", name="cut", tell=stop)
    state = tmp_path / "runs" / "cut" / "last.pt"
    whole = state.read_bytes()
    for damaged in (b"", whole[:1000], b"x" * 5000):
        state.write_bytes(damaged)
        assert "last.pt" in refusal(store, preset, tmp_path, name="cut")


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
    unsmoothed = evaluate(run, store, smooth=False)
    assert {key: unsmoothed[key] for key in best["ccc"]} == pytest.approx(best["ccc"], abs=1e-12)


def test_diverging_is_one_line_that_names_the_learning_rate(store, tmp_path):
    told = refusal(store, tiny("linear", lr=1e30, warmup_epochs=0), tmp_path)
    assert "diverged" in told
    assert "train.lr, now 1e+30" in told


def test_a_batch_without_labels_gives_loss_2_and_a_zero_gradient():
    predicted = torch.randn(2, 5, 2, requires_grad=True)
    loss = va_loss(predicted, torch.zeros(2, 5, 2), torch.zeros(2, 5, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 2
    assert torch.equal(predicted.grad, torch.zeros(2, 5, 2))


def test_the_loss_is_two_less_the_ccc_of_the_labelled_rows():
    torch.manual_seed(0)
    predicted, labels = torch.randn(2, 50, 2), torch.randn(2, 50, 2)
    labelled = torch.rand(2, 50) < 0.5
    rows = [x[labelled].double().numpy() for x in (predicted, labels)]
    wanted = 2 - ccc(*rows, np.ones((int(labelled.sum()), 1))).sum()
    assert va_loss(predicted, labels, labelled).item() == pytest.approx(wanted, abs=1e-6)
    junk = labels.masked_fill(~labelled[..., None], 1e6)
    assert va_loss(predicted, junk, labelled).item() == pytest.approx(wanted, abs=1e-6)


def test_what_mamba_remembers_with_does_not_decay(store, tmp_path):
    decay_only = tiny("mamba", lr=1e-30, weight_decay=1e29, warmup_epochs=0, epochs=1)  # 10 % a step at first
    trained = load_file(train(store, decay_only, runs=tmp_path, tell=print).path / "weights.safetensors")
    began = torch.arange(1.0, 5).log().repeat(8, 1)
    torch.testing.assert_close(trained["decode.2.mixers.0.A_log"], began, atol=1e-9, rtol=0)
    assert torch.equal(trained["decode.2.mixers.0.D"], torch.ones(8))
    assert (trained["decode.2.norms.0.weight"] < 0.95).all()  # began as ones


def test_the_learning_rate_goes_up_in_a_line_and_down_in_half_a_cosine():
    share = training._warmup_cosine
    assert 0 < share(0, 5, 50) < 0.001
    assert share(2.5, 5, 50) == pytest.approx(0.5, abs=1e-3)
    assert share(5, 5, 50) == 1
    assert share(27.5, 5, 50) == pytest.approx(0.5)
    assert share(50, 5, 50) == pytest.approx(0)
    assert share(0, 0, 50) == 1
    assert share(0, 1e-4, 50) == 1  # never above
    assert share(2, 5, 3) == pytest.approx(0.4, abs=1e-3)  # a warm-up longer than the training
    values = [share(epoch / 100, 5, 50) for epoch in range(5000)]
    assert max(values) == 1
    assert min(values) > 0


# ---- which videos --------------------------------------------------------------------------------------------


def test_a_video_that_lacks_a_stream_is_used_with_it_missing(tmp_path):
    store = make_store(tmp_path / "s.zarr", train=2, validation=1)
    no_sound = add_video(store, 20, names=("mae", "label.va"))
    no_face = add_video(store, 21, names=("logmel", "label.va"))
    nothing = add_video(store, 22, names=("label.va",))
    unlabelled = add_video(store, 23, names=("mae", "logmel"))
    told: list[str] = []
    run = train(store, tiny("linear", epochs=1), runs=tmp_path, tell=told.append)
    assert set(run.about["train"]) == {"v00", "v01", no_sound, no_face}
    assert not {nothing, unlabelled} & run.about["validation"].keys()
    assert told[0].startswith("2 of 7 videos are left out")
    clips = {c.id: c for c in load_clips(store, run.about, "train")}
    assert np.isnan(clips[no_sound].streams["logmel"]).all()
    assert np.isnan(clips[no_face].streams["mae"]).all()
    assert clips[no_face].streams["logmel"].shape == (ROWS, 4)  # a row for a frame, not for a row of sound
    np.testing.assert_array_equal(clips[no_face].times_s, tracks_of(21)["label.va"].times_s)


def test_test_videos_never_train_nor_judge(tmp_path):
    store = make_store(tmp_path / "s.zarr", train=2, validation=1)
    kept_away = add_video(store, 30, split="test")
    run = train(store, tiny("linear", epochs=1), runs=tmp_path, tell=print)
    assert (set(run.about["train"]), set(run.about["validation"])) == ({"v00", "v01"}, {"v02"})
    assert kept_away not in json.dumps(run.about)


def test_without_a_validation_set_a_seeded_fifth_is_held_out():
    names: dict[str, str | None] = {f"v{i}": None for i in range(20)}
    told: list[str] = []
    first = training._splits(names, 0, told.append)
    assert len(first["validation"]) == 4
    assert set(first["train"]).isdisjoint(first["validation"])
    assert set(first["train"]) | set(first["validation"]) == set(names)
    backwards = dict(reversed(names.items()))
    assert training._splits(backwards, 0, told.append) == first
    assert training._splits(names, 1, told.append) != first
    assert "held out 4 of 20 videos by seed 0" in told[0]


def test_the_data_sets_own_split_is_kept():
    names: dict[str, str | None] = {"a": "train", "b": "validation", "c": None}
    assert training._splits(names, 0, print) == {"train": ["a", "c"], "validation": ["b"]}


def mixed(path: Path) -> Store:
    """Two videos for each of two ways `mae` was made."""
    store = Store(path, create=True)
    for number in range(6):
        add_video(
            store, number, "train" if number % 3 else "validation", made_by="old" if number < 3 else "new"
        )
    return store


def test_streams_made_in_two_ways_are_refused_until_one_is_chosen(tmp_path):
    store = mixed(tmp_path / "s.zarr")
    told = refusal(store, tiny("linear", ["mae"]), tmp_path)
    for made_by in ("old", "new"):
        folder = folder_name(recipe("mae", made_by))
        assert f"--stream {folder}" in told
        for chosen in (folder, folder[:10]):  # the digits as told, or the first few of them
            run = train(store, tiny("linear", [chosen], epochs=2), runs=tmp_path, tell=print)
            assert set(run.about["train"]) == ({"v01", "v02"} if made_by == "old" else {"v04", "v05"})
            assert list(run.dims) == [chosen]
            found = evaluate(run, store)
            assert {key: found[key] for key in run.about["figures"]} == run.about["figures"]
            curves = predict(run, load_clips(store, run.about, "validation"))
            assert [len(curve) for curve in curves.values()] == [ROWS]


def test_digits_nobody_has_list_those_there_are(tmp_path):
    store = mixed(tmp_path / "s.zarr")
    told = refusal(store, tiny("linear", ["mae@ffff"]), tmp_path)
    assert "mae@ffff" in told
    assert folder_name(recipe("mae", "old")) in told


def test_what_cannot_be_trained_on_is_one_line_with_the_mend(tmp_path):
    store = Store(tmp_path / "s.zarr", create=True)
    assert "none of the 0 videos" in refusal(store, tiny("linear"), tmp_path)
    add_video(store, 0, names=("mae", "logmel"))
    assert "none of the 1 videos" in refusal(store, tiny("linear"), tmp_path)
    add_video(store, 0)
    told = refusal(store, tiny("linear"), tmp_path)
    assert "1 labelled video" in told
    assert "at least one to train on" in told
    add_video(store, 1, split="validation")
    told = refusal(store, tiny("linear", ["mea"]), tmp_path)
    assert "track mea" in told
    assert "there are logmel, mae:" in told
    assert "--encoder mea" in told
    assert "one width" in refusal(store, tiny("linear").model_copy(update={"fuse": "sum"}), tmp_path)
    assert not (tmp_path / "runs").exists()  # nothing was begun


def test_labels_that_say_nothing_are_refused_before_training(tmp_path):
    store = make_store(tmp_path / "s.zarr", train=1, validation=0)
    blank = Track(np.full((ROWS, 2), np.nan, np.float32), tracks_of(0)["mae"].times_s)
    other = {"track": "label.va", "version": 1}
    store.put(other, "ab" * 32, blank)
    mae = store.videos()["v00"]["tracks"]["mae"]
    facts = {"root": "toy", "media": "ab" * 32, "split": "validation"}
    store.link("blank", facts, {"mae": mae, "label.va": {"folder": folder_name(other), "media": "ab" * 32}})
    assert "the validation videos have no valid label" in refusal(store, tiny("linear"), tmp_path)


def test_labels_made_in_two_ways_are_refused_without_naming_an_option_that_is_none(tmp_path):
    store = make_store(tmp_path / "s.zarr", train=1, validation=1)
    other = {"track": "label.va", "version": 2}
    store.put(other, "00" * 32, tracks_of(0)["label.va"])
    facts = {"root": "toy", "media": "00" * 32, "split": "train"}
    store.link("v00", facts, {"label.va": {"folder": folder_name(other), "media": "00" * 32}})
    told = refusal(store, tiny("linear"), tmp_path)
    assert "label.va was made in 2 different ways" in told
    assert "--stream" not in told


# ---- judging -------------------------------------------------------------------------------------------------


def test_evaluating_gives_the_figures_of_training_every_time(store, run):
    for found in (evaluate(run, store), evaluate(run, store)):
        assert {key: found[key] for key in run.about["figures"]} == run.about["figures"]
        assert found["videos"] == 3
        assert found["frames"] == 3 * (ROWS - math.ceil(ROWS / 13))


def test_figures_are_the_ccc_of_all_rows_behind_each_other():
    rng = np.random.default_rng(0)
    clips, curves = [], {}
    for number, rows in enumerate((30, 70)):
        labels = rng.uniform(-1, 1, (rows, 2)).astype(np.float32)
        labels[::4] = np.nan
        clips.append(Clip(f"{number}", np.arange(rows) / 10.0, {}, labels))
        curves[f"{number}"] = Track(rng.uniform(-1, 1, (rows, 2)).astype(np.float32), clips[-1].times_s)
    clips.append(Clip("unlabelled", np.arange(5) / 10.0, {}, None))
    x = np.concatenate([curves[c.id].values for c in clips[:2]]).astype(np.float64)
    y = np.concatenate([c.labels for c in clips[:2]]).astype(np.float64)
    x, y = x[~np.isnan(y[:, 0])], y[~np.isnan(y[:, 0])]
    valence, arousal = ccc(x, y, np.ones((len(x), 1)))
    assert figures(curves, clips) == {
        "valence": valence,
        "arousal": arousal,
        "mean": (valence + arousal) / 2,
    }
    with pytest.raises(VacliError, match="no valid label"):
        figures(curves, [Clip("0", clips[0].times_s, {}, np.full((30, 2), np.nan, np.float32))])


def test_the_smoothing_chosen_is_the_best_on_these_videos():
    rng = np.random.default_rng(1)
    times_s = np.arange(600) / 10.0
    slow, fast = np.sin(times_s / 5), np.sin(times_s * 8)
    labels = np.stack([slow, fast], axis=1).astype(np.float32)
    noisy = labels + rng.normal(0, (1.0, 0.02), labels.shape).astype(np.float32)
    clips = [Clip("a", times_s, {"mae": np.ones((600, 3), np.float16)}, labels)]
    raw = {"a": Track(noisy.astype(np.float32), times_s)}
    found = choose_smoothing(raw, clips)
    faces = np.ones(600, bool)
    tried = [figures({"a": finish(raw["a"], faces, (s, s))}, clips) for s in SMOOTH_CHOICES_S]
    best = [
        max(zip(SMOOTH_CHOICES_S, tried, strict=True), key=lambda pair: pair[1][key])[0]
        for key in ("valence", "arousal")
    ]
    assert list(found) == best
    assert found[0] > 0.5
    assert found[1] == 0


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
