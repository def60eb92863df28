"""The sweep: what is tried is in the space, nothing is lost or tried twice, and many processes share the work."""

from __future__ import annotations

import itertools
import shlex
import shutil
import subprocess
import sys

import optuna
import pytest
from vacli import VacliError
from vacli.store import Store
from vacli.temporal.predict import open_run
from vacli.temporal.preset import load_preset
from vacli.temporal.sweep import Over, sweep
from vacli.temporal.train import train

from .toy_store import TINY, make_store

QUICK = {
    **{key: value for key, value in TINY["linear"].items() if key != "windows.length"},
    "windows.stride": "20",
    "train.epochs": "1",
}
SPACE = ["train.lr=1e-4..1e-1:log", "windows.length=20..60"]


# ---- the space -----------------------------------------------------------------------------------------------


def test_a_space_is_read_as_it_is_written():
    assert Over.parse("train.lr=1e-5..1e-3:log") == Over("train.lr", (), 1e-5, 1e-3, True)
    assert Over.parse("decode.2.mamba.layers=2..6") == Over("decode.2.mamba.layers", (), 2, 6)
    assert Over.parse("train.mse=0..0.5") == Over("train.mse", (), 0, 0.5)
    assert Over.parse("train.batch=4,8,16").choices == ("4", "8", "16")
    assert Over.parse("fuse=sum, concat").choices == ("sum", "concat")
    assert Over.parse('streams=["mae"],["mae","logmel"]').choices == ('["mae"]', '["mae","logmel"]')
    assert Over.parse("decode=[{gru = {dim = 4, layers = 1}}],[]").choices == (
        "[{gru = {dim = 4, layers = 1}}]",
        "[]",
    )
    assert Over.parse('train.init_from="a, b.safetensors",../c').choices == ('"a, b.safetensors"', "../c")


@pytest.mark.parametrize(
    "text",
    [
        "train.lr",
        "=1..2",
        "train.lr=",
        "train.lr=1e-3",
        "fuse=sum",
        "train.lr=1..x",
        "train.lr=1e-3..1e-5",
        "train.lr=2..2",
        "train.lr=0..1:log",
        "train.lr=1..2:lin",
        "train.lr=1..inf",
        "train.lr=nan..1",
        "train.batch=4,,8",
        "train.batch=4,4",
    ],
)
def test_a_space_that_is_none_is_refused_in_one_line(text):
    with pytest.raises(VacliError) as refusal:
        Over.parse(text)
    assert str(refusal.value).startswith(f"--over {text}: ")
    assert "\n" not in str(refusal.value)


# ---- sweeping ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("sweep") / "features.zarr", train=3, validation=1).path


def swept(features, runs, trials, space=SPACE, changes=QUICK, **how):
    told: list[str] = []
    best = sweep(
        Store(features),
        "linear",
        space,
        trials=trials,
        changes=changes,
        runs=runs,
        name="s",
        tell=told.append,
        **how,
    )
    return best, told


def journal(runs):
    """Trial number -> state, changes and mean CCC, read by optuna itself."""
    storages = optuna.storages
    backend = storages.journal.JournalFileBackend(str(runs / "s" / "journal.log"))
    study = optuna.load_study(storage=storages.JournalStorage(backend), study_name="vacli")
    assert [t.number for t in study.trials] == list(range(len(study.trials)))
    return {t.number: (t.state.name, t.user_attrs.get("changes"), t.value) for t in study.trials}


@pytest.fixture(scope="module")
def four(features, tmp_path_factory):
    runs = tmp_path_factory.mktemp("four")
    best, told = swept(features, runs, 4)
    return runs, best, told


def test_each_trial_is_a_run_of_its_own_settings_and_the_best_comes_back(four):
    runs, best, _ = four
    trials = journal(runs)
    assert len(trials) == 4
    means = {}
    for number, (state, changes, value) in trials.items():
        run = open_run(runs / "s" / f"trial-{number:03}")
        assert state == "COMPLETE"
        assert run.preset == load_preset("linear", {**QUICK, **changes})
        assert 1e-4 <= run.preset.train.lr <= 1e-1
        assert 20 <= run.preset.windows.length <= 60
        assert value == run.about["figures"]["mean"]
        means[run.path] = value
    assert len(set(means.values())) > 1
    assert means[best.path] == max(means.values())
    assert sorted(p.name for p in (runs / "s").iterdir()) == [
        "journal.log",
        "sweep.lock",
        *(f"trial-{n:03}" for n in range(4)),
    ]


def test_the_told_command_remakes_the_best(four, features, tmp_path):
    _, best, told = four
    words = shlex.split(told[-1])
    assert words[:4] == ["vacli", "train", "--head", "linear"]
    sets = dict(text.split("=", 1) for option, text in itertools.pairwise(words) if option == "--set")
    seed = int(words[words.index("--seed") + 1])
    preset = load_preset("linear", sets)
    again = train(Store(features), preset, runs=tmp_path, seed=seed, tell=lambda _: None)
    assert again.about["figures"] == best.about["figures"]
    assert again.about["settings"] == best.about["settings"]
    assert "optimistic" in told[-2]


def test_the_table_has_the_best_first(four):
    _, best, told = four
    begin = next(i for i, line in enumerate(told) if line.startswith("the best of 4 trials"))
    means = [float(line.split()[3]) for line in told[begin + 2 : begin + 6]]
    assert means == sorted(means, reverse=True)
    assert told[begin + 2].startswith(best.path.name)


def test_a_finished_sweep_trains_nothing_and_more_trials_go_on_from_it(four, features, tmp_path):
    runs, best, _ = four
    shutil.copytree(runs, tmp_path, dirs_exist_ok=True)
    again, told = swept(features, tmp_path, 4)
    assert again.about == best.about
    assert not any(" of 4 trials:" in line for line in told)
    swept(features, tmp_path, 5)
    trials = journal(tmp_path)
    assert len(trials) == 5
    assert {n: trials[n] for n in range(4)} == journal(runs)


def test_a_sweep_that_is_stopped_again_and_again_ends_as_one_that_is_not(four, features, tmp_path):
    stops = 0
    while True:

        def stop(line, stops=stops):
            words = line.split()
            if stops < 6 and (
                "epoch" in words if stops % 2 else words[0].startswith(f"trial-{stops // 2:03}")
            ):
                raise KeyboardInterrupt

        try:
            sweep(
                Store(features), "linear", SPACE, trials=4, changes=QUICK, runs=tmp_path, name="s", tell=stop
            )
            break
        except KeyboardInterrupt:
            stops += 1
    assert stops >= 4
    assert journal(tmp_path) == journal(four[0])


WORKER = """
import sys, time
from vacli.store import Store
from vacli.temporal.sweep import sweep
def tell(line):
    print(line, flush=True)
    if "epoch" in line.split(): time.sleep(60)
sweep(Store(sys.argv[1]), "linear", {space!r}, trials=3, changes={changes!r}, runs=sys.argv[2], name="s", tell=tell)
"""


def test_processes_share_the_trials_and_one_that_is_killed_loses_none(features, tmp_path):
    """Another process hangs in the first trial while this one trains the rest; killed, this one goes on with it."""
    code = WORKER.format(space=SPACE, changes=QUICK)
    command = [sys.executable, "-c", code, str(features), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        try:
            assert any("epoch" in line.split() for line in other.stdout)
            _, told = swept(features, tmp_path, 3)
            assert [line.split()[0] for line in told if " of 3 trials:" in line] == ["trial-001", "trial-002"]
            assert any("1 being trained by other processes" in line for line in told)
            state, settings, _ = journal(tmp_path)[0]
            assert state == "RUNNING"
        finally:
            other.kill()
    _, told = swept(features, tmp_path, 3)
    assert [line.split()[0] for line in told if " of 3 trials:" in line] == ["trial-000"]
    trials = journal(tmp_path)
    assert [state for state, *_ in trials.values()] == ["COMPLETE"] * 3
    assert trials[0][1] == settings
    assert len({str(changes) for _, changes, _ in trials.values()}) == 3


def test_a_line_cut_in_half_by_a_kill_costs_nothing(four, features, tmp_path):
    shutil.copytree(four[0], tmp_path, dirs_exist_ok=True)
    with open(tmp_path / "s" / "journal.log", "ab") as f:
        f.write(b'{"op_code":5,"worker')
    swept(features, tmp_path, 5)
    assert len(journal(tmp_path)) == 5


def test_a_trial_that_fails_is_noted_and_the_rest_goes_on(features, tmp_path):
    best, told = swept(features, tmp_path, 4, ["windows.length=50,10,15,5"])  # the stride is 20
    failed = [line for line in told if " failed: " in line]
    assert failed
    assert all("stride 20 is beyond length" in line for line in failed)
    assert best.preset.windows.length == 50
    states = [state for state, *_ in journal(tmp_path).values()]
    assert len(states) == 4
    assert states.count("FAIL") == len(failed)


def test_where_every_trial_fails_the_first_reason_is_told(features, tmp_path, monkeypatch):
    def fails(*args, **kwargs):
        raise VacliError("out of memory: set train.batch to less")

    monkeypatch.setattr("vacli.temporal.sweep.train", fails)
    with pytest.raises(VacliError, match=r"no trial of .*2 failed.*the first: out of memory"):
        swept(features, tmp_path, 2)


@pytest.mark.parametrize("fatal", [True, False])
def test_what_would_befall_every_trial_stops_the_sweep(features, tmp_path, monkeypatch, fatal):
    def fails(*args, **kwargs):
        problem = VacliError("the disk is full")
        problem.fatal = fatal
        raise problem from (None if fatal else OSError(28, "No space left on device"))

    with monkeypatch.context() as patched:
        patched.setattr("vacli.temporal.sweep.train", fails)
        with pytest.raises(VacliError, match="the disk is full"):
            swept(features, tmp_path, 2)
    swept(features, tmp_path, 2)
    assert [state for state, *_ in journal(tmp_path).values()] == ["COMPLETE", "COMPLETE"]


def test_the_same_settings_are_not_trained_twice(features, tmp_path):
    _, told = swept(
        features,
        tmp_path,
        6,
        ["fuse=sum,concat"],
        changes={**QUICK, "encode.*.blocks": "[{linear = {dim = 4}}]"},
    )
    assert len([line for line in told if " of 6 trials:" in line]) == 2
    assert len(list((tmp_path / "s").glob("trial-*"))) == 2
    assert len(journal(tmp_path)) == 6


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"space": SPACE[:1]}, "s is a sweep with another space"),
        ({"changes": {**QUICK, "train.mse": "0.5"}}, "s is a sweep with another head"),
        ({"streams": ["mae"]}, "s is a sweep with another head"),
        ({"seed": 1}, "s is a sweep with another seed"),
        ({"space": []}, "nothing to search"),
        ({"space": ["train.lrr=1..2"]}, "unknown key train.lrr"),
        ({"space": ["decode.2.mamba.layers=2..6"]}, "decode.2.mamba.layers=2"),
        ({"space": ["train.lr=1e-3..1e-2", "train.lr=1..2"]}, "train.lr is given twice"),
        ({"space": ["train.epochs=1..2"]}, "train.epochs is given twice"),
        ({"trials": 0}, "0 trials: wanted 1 or more"),
    ],
)
def test_another_sweep_and_a_space_that_is_none_are_refused_in_one_line(four, features, how, message):
    runs = four[0]
    before = (runs / "s" / "journal.log").read_bytes()
    with pytest.raises(VacliError) as refusal:
        swept(features, runs, **{"trials": 4, **how})
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert (runs / "s" / "journal.log").read_bytes() == before


def test_a_folder_of_a_run_and_a_journal_that_is_none_are_refused_in_one_line(features, tmp_path):
    (tmp_path / "s").mkdir()
    for name, text, message in (
        ("journal.log", "[]\n", "is damaged"),
        ("journal.log", "hello\n{}\n", "is damaged"),
        ("run.json", "{}", "is a run or folds, no sweep"),
    ):
        (tmp_path / "s" / name).write_text(text)
        with pytest.raises(VacliError, match=message) as refusal:
            swept(features, tmp_path, 1)
        assert "\n" not in str(refusal.value)


def test_a_folder_that_cannot_be_written_is_refused_in_one_line(features, tmp_path):
    (tmp_path / "s").write_text("a file in the way")
    with pytest.raises(VacliError, match=r"cannot use .*s: File exists"):
        swept(features, tmp_path, 1)


def test_without_optuna_the_extra_is_named(features, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(VacliError, match=r"pip install 'vacli\[sweep\]'"):
        swept(features, tmp_path, 1)
    assert not list(tmp_path.iterdir())
