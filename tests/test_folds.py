"""Cross-validation: nobody on both sides of a fold, nothing trained twice, and a table that says what it is."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from vacli import VacliError
from vacli.store.labels import ccc_of_tracks
from vacli.store.names import plain_id
from vacli.temporal.evaluate import load_clips
from vacli.temporal.folds import _begin, folds_of, open_any, read_subjects, train_folds
from vacli.temporal.predict import Run, predict
from vacli.temporal.train import train

from .toy_store import make_store, tiny


def videos(rows: dict[str, int], validation: tuple[str, ...] = ()) -> dict[str, dict]:
    return {v: {"split": "validation" if v in validation else "train", "rows": n} for v, n in rows.items()}


def rows_of(found: dict, split: dict) -> int:
    return sum(found[v]["rows"] for v in split["validation"])


DATA_SET = st.lists(
    st.tuples(
        st.integers(0, 2000),
        st.lists(st.sampled_from(["", "_left", "_right", "_person2"]), min_size=1, unique=True),
    ),
    min_size=8,
    max_size=40,
).map(
    lambda found: videos(
        {f"{i}{who}": n for i, (n, whos) in enumerate(found) for who in whos}, ("0", "0_left")
    )
)


@given(DATA_SET, st.integers(3, 8), st.integers(0, 3))
def test_every_video_is_judged_once_and_nobody_is_on_both_sides(found, folds, seed):
    made = folds_of(found, folds, seed)
    judged = [v for split in made[1:] for v in split["validation"]]
    assert sorted(judged) == sorted(found)
    for split in made:
        assert sorted(split["train"] + split["validation"]) == sorted(found)
        assert split["train"]
        assert split["validation"]
    for split in made[1:]:
        assert not {v.split("_")[0] for v in split["train"]} & {v.split("_")[0] for v in split["validation"]}


@given(DATA_SET, st.integers(3, 8))
def test_two_parts_differ_by_at_most_the_largest_group(found, folds):
    sizes = [rows_of(found, split) for split in folds_of(found, folds, 0)[1:]]
    groups: dict[str, int] = {}
    for v, facts in found.items():
        groups[v.split("_")[0]] = groups.get(v.split("_")[0], 0) + facts["rows"]
    assert max(sizes) - min(sizes) <= max(groups.values())


def test_folds_of_a_real_data_sets_size_are_balanced_within_a_percent():
    worst = 0.0
    for number in range(30):  # Aff-Wild2 has some 430 videos, of 30 to 26,000 frames
        lengths = np.random.default_rng(number).lognormal(8, 1, 430).clip(30, 26_000).astype(int)
        found = videos({f"v{i}": int(n) for i, n in enumerate(lengths)}, ("v0",))
        sizes = np.array([rows_of(found, split) for split in folds_of(found, 6, number)[1:]])
        worst = max(worst, float(np.abs(sizes / sizes.mean() - 1).max()))
    assert worst < 0.01


def test_fold_0_is_the_data_sets_own_split():
    found = videos({f"v{i}": 10 for i in range(9)}, ("v3", "v7"))
    assert folds_of(found, 4, 0)[0]["validation"] == ["v3", "v7"]


@pytest.mark.parametrize("rows", [[10] * 12, list(range(1000, 1012))])
def test_the_seed_decides_among_about_equals_and_nothing_else_does(rows):
    found = videos({f"v{i}": n for i, n in enumerate(rows)}, ("v0",))
    assert folds_of(found, 4, 1) == folds_of(dict(reversed(found.items())), 4, 1)
    assert folds_of(found, 4, 1)[1:] != folds_of(found, 4, 2)[1:]
    assert folds_of(found, 4, 1)[0] == folds_of(found, 4, 2)[0]


def test_who_shares_a_video_or_a_subject_stays_together():
    found = videos({"a_left": 5, "a_right": 9, "b": 5, "c": 5, "d": 5, "e_person2": 5, "f": 5}, ("f",))
    subjects = {"a_left": "ann", "a_right": "bob", "b": "bob", "c": "cyd", "d": "dan", "e": "cyd", "f": "fay"}
    for split in folds_of(found, 3, 0, subjects)[1:]:
        here = set(split["validation"])
        assert len(here & {"a_left", "a_right", "b"}) in (0, 3)  # bob is in b, and with ann in a
        assert len(here & {"c", "e_person2"}) in (0, 2)


def test_two_sides_stay_together_where_their_id_had_to_be_made():
    left, right = plain_id("what?_left"), plain_id("what?_right")
    found = videos({left: 1, right: 1, "b": 1, "c": 1}, ("b",))
    assert any({left, right} <= set(split["validation"]) for split in folds_of(found, 3, 0)[1:])


@pytest.mark.parametrize(
    ("folds", "subjects", "message"),
    [
        (2, None, "2 folds: wanted at least 3"),
        (-1, None, "-1 folds: wanted at least 3"),
        (6, None, "4 videos make 4 groups.*too few for 6 folds"),
        (4, {"v0": "x", "v1": "x", "v2": "x", "v3": "y"}, "4 videos make 2 groups.*too few for 4 folds"),
        (3, {"v0": "x", "v1": "x", "v3": "y"}, "the file of subjects lacks v2"),
    ],
)
def test_impossible_folds_are_refused_in_one_line(folds, subjects, message):
    found = videos({f"v{i}": 10 for i in range(4)}, ("v0",))
    with pytest.raises(VacliError, match=message) as refusal:
        folds_of(found, folds, 0, subjects)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "text",
    [
        "video,subject\n1,ann\n2, bob\n",
        "1 ann\n\n2\tbob\n",
        "\ufeff1,ann\n2,bob",
        "Video,Subject\r\n1,ann\r\n2,bob",
    ],
)
def test_subjects_are_read_from_commas_and_blanks(tmp_path, text):
    path = tmp_path / "subjects.csv"
    path.write_text(text, encoding="utf-8", newline="")
    assert read_subjects(path) == {"1": "ann", "2": "bob"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"1,ann\n2,bob,3\n", "line 2: '2,bob,3'; wanted `video,subject`"),
        (b"1,ann\n2\n", "line 2"),
        (b"1,\n", "line 1"),
        (b"1,ann\n1,bob\n", "line 2: 1 has two subjects, ann and bob"),
        (b"video,subject\n", "names no subject"),
        (b"\xff\xfe\x00", "cannot read the subjects"),
        (None, "cannot read the subjects"),
    ],
)
def test_a_file_of_subjects_that_is_none_is_refused_in_one_line(tmp_path, content, message):
    path = tmp_path / "subjects.csv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(VacliError, match=message) as refusal:
        read_subjects(path)
    assert "\n" not in str(refusal.value)


# ---- training them -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(
        tmp_path_factory.mktemp("folds") / "features.zarr"
    )  # six to train on, three to judge by


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def lines():
    return []


@pytest.fixture(scope="module")
def whole(store, runs, lines):
    return train_folds(store, PRESET, folds=3, runs=runs, name="whole", tell=lines.append)


PRESET = tiny("linear", epochs=1)


def test_every_fold_is_a_run_trained_on_its_own_split(store, whole):
    assert sorted(whole.runs) == [0, 1, 2]
    for k, run in whole.runs.items():
        assert run.path == whole.path / f"fold-{k}"
        for part in ("train", "validation"):
            assert list(run.about[part]) == whole.about["folds"][k][part]
    assert whole.about["folds"][0]["validation"] == ["v06", "v07", "v08"]


def test_the_table_has_the_figures_of_every_fold_their_mean_and_deviation(whole):
    each = np.array(
        [[run.about["figures"][key] for key in ("valence", "arousal", "mean")] for run in whole.runs.values()]
    )
    table = whole.table().splitlines()
    cells = {line.split()[0]: [float(x) for x in line.split()[1:4]] for line in table[1:7]}
    assert list(cells) == ["0", "1", "2", "mean", "std", "out"]
    for k in range(3):
        assert cells[str(k)] == pytest.approx(each[k], abs=1e-4)
    assert cells["mean"] == pytest.approx(each.mean(0), abs=1e-4)
    assert cells["std"] == pytest.approx(each.std(0, ddof=1), abs=1e-4)
    stored = json.loads((whole.path / "folds.json").read_text())["figures"]
    assert stored["mean"]["mean"] == pytest.approx(each[:, 2].mean())


def test_the_out_of_fold_line_judges_every_video_by_the_run_that_did_not_train_on_it(store, whole):
    curves, clips = {}, []
    for k in (1, 2):
        of_fold = load_clips(store, whole.runs[k].about, "validation")
        curves |= predict(whole.runs[k], of_fold)
        clips += of_fold
    assert len(curves) == 9
    wanted = ccc_of_tracks([(curves[c.id].values, c.labels) for c in clips])
    found = whole.about["figures"]["out_of_fold"]
    assert [found["valence"], found["arousal"]] == pytest.approx(wanted, abs=1e-6)


def test_the_mean_of_the_folds_comes_with_their_spread(store, whole):
    clips = load_clips(store, whole.first.about, "validation")
    curves, spreads = whole.predict(clips)
    each = [predict(run, clips) for run in whole.runs.values()]
    for clip in clips:
        stack = np.stack([found[clip.id].values for found in each])
        np.testing.assert_allclose(curves[clip.id].values, stack.mean(0), atol=1e-6)
        np.testing.assert_allclose(spreads[clip.id].values, stack.std(0), atol=1e-6)
        assert np.array_equal(curves[clip.id].times_s, clip.times_s)
        assert spreads[clip.id].values.max() > 0


def test_folds_that_are_there_are_not_trained_again(store, runs, whole):
    before = {path: path.stat().st_mtime_ns for path in whole.path.rglob("*")}
    told = []
    again = train_folds(store, PRESET, folds=3, runs=runs, name="whole", tell=told.append)
    assert again == whole
    assert {path: path.stat().st_mtime_ns for path in whole.path.rglob("*") if path.is_file()} == {
        path: when for path, when in before.items() if path.is_file()
    }
    assert sum("nothing to train" in line for line in told) == 3


def test_one_fold_after_the_other_gives_what_all_at_once_gives(store, tmp_path, whole):
    parts = [
        train_folds(store, PRESET, folds=3, only=k, runs=tmp_path, name="x", tell=lambda _: None)
        for k in (2, 0, 1)
    ]
    assert [sorted(part.runs) for part in parts] == [[2], [0, 2], [0, 1, 2]]
    assert [part.finished for part in parts] == [False, False, True]
    assert parts[0].table().count("not trained yet") == 2
    assert parts[2].about["figures"] == whole.about["figures"]
    with pytest.raises(VacliError, match=r"x is not finished, it lacks fold 0 and 1"):
        parts[0].predict([])


def test_folds_that_were_stopped_go_on_to_the_same_table(store, tmp_path, whole):
    class Stopped(BaseException):
        pass

    def stop(line):
        if line.startswith("fold 2") or (line.startswith("epoch") and not stops):
            stops.append(line)
            raise Stopped

    stops: list[str] = []
    while True:
        try:
            found = train_folds(store, PRESET, folds=3, runs=tmp_path, name="x", tell=stop)
            break
        except Stopped:
            if len(stops) == 2:
                stop = lambda line: None  # noqa: E731
    assert len(stops) == 2
    assert found.about["figures"] == whole.about["figures"]
    assert found.table() == whole.table()


@pytest.mark.parametrize(
    ("changed", "message"),
    [({"seed": 1}, "another seed"), ({"folds": 4}, "another folds"), ({"preset": "p"}, "another preset")],
)
def test_other_folds_under_the_same_name_are_refused(store, runs, whole, changed, message):
    how = {"preset": PRESET, "folds": 3, "seed": 0, **changed}
    if changed.get("preset"):
        how["preset"] = tiny("linear", epochs=2)
    with pytest.raises(VacliError, match=f"whole holds other folds.*{message}"):
        train_folds(store, **how, runs=runs, name="whole", tell=lambda _: None)


def test_a_run_is_no_folder_for_folds_and_a_fold_beyond_is_refused(store, tmp_path, runs, whole):
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "run.json").write_text("{}")
    with pytest.raises(VacliError, match="r is a run of its own, no folds"):
        train_folds(store, PRESET, folds=3, runs=tmp_path, name="r", tell=lambda _: None)
    for beyond in (3, -1):
        with pytest.raises(VacliError, match=f"--fold {beyond}: with 3 folds there are the folds 0 to 2"):
            train_folds(store, PRESET, folds=3, only=beyond, runs=tmp_path, tell=lambda _: None)


def test_who_is_on_both_sides_of_the_own_split_is_said(store, tmp_path):
    told = []
    subjects = {f"v{i:02}": f"s{i % 6}" for i in range(9)}  # v00 and v06 are one
    train_folds(store, PRESET, folds=3, only=0, runs=tmp_path, subjects=subjects, tell=told.append)
    assert [line for line in told if line.startswith("note")] == [
        "note: fold 0, the split called validation, has 3 videos or people on both sides, as v00"
    ]


# ---- finding them again --------------------------------------------------------------------------------------


def test_folds_and_runs_are_found_by_folder_name_head_and_age(store, runs, whole):
    for wanted in (whole.path, "whole", "linear", None):
        assert open_any(wanted, runs) == whole
    assert open_any("whole/fold-1", runs) == whole.runs[1]
    assert open_any(whole.path / "fold-2", runs) == whole.runs[2]
    younger = train(store, PRESET, runs=runs, name="single", seed=5, tell=lambda _: None)
    try:
        assert [open_any(wanted, runs) for wanted in ("linear", None, "single")] == [younger] * 3
        assert open_any("whole", runs) == whole
    finally:
        shutil.rmtree(younger.path)


def test_what_cannot_be_opened_is_refused_in_one_line(store, tmp_path, whole):
    with pytest.raises(VacliError, match="no finished run"):
        open_any(None, tmp_path)
    with pytest.raises(VacliError, match="no run gru"):
        open_any("gru", whole.path.parent)
    part = train_folds(store, PRESET, folds=3, only=1, runs=tmp_path, name="part", tell=lambda _: None)
    with pytest.raises(VacliError, match=r"part is not finished, it lacks fold 0 and 2"):
        open_any("part", tmp_path)
    for text in (
        "{",
        "[]",
        '{"preset": 1}',
        '{"preset": 1, "seed": 0, "folds": 1, "rows": 1, "own": "", "settings": ""}',
    ):
        (part.path / "folds.json").write_text(text)
        with pytest.raises(VacliError, match=r"cannot read .*folds\.json") as refusal:
            open_any("part", tmp_path)
        assert "\n" not in str(refusal.value)


def test_folds_are_listed_and_a_neighbour_that_cannot_be_read_does_not_hide_them(runs, whole):
    torn = runs / "torn" / "folds.json"
    torn.parent.mkdir()
    torn.write_text("{")
    try:
        assert open_any(None, runs) == whole
        with pytest.raises(VacliError, match=r"no run nope .*there: .*whole \(folds\).*--head mamba"):
            open_any("nope", runs)
        with pytest.raises(VacliError, match=r"no run crossattn .*whole \(folds\).*--head crossattn"):
            open_any("crossattn", runs)
    finally:
        shutil.rmtree(torn.parent)


def test_folds_of_different_features_are_not_averaged(whole):
    of_fold = whole.runs[2].about
    changed = {**of_fold["streams"], "mae": {**of_fold["streams"]["mae"], "recipe": {"x": 1}}}
    other = {**of_fold, "streams": changed}
    mixed = replace(whole, runs={**whole.runs, 2: Run(whole.runs[2].path, other)})
    with pytest.raises(
        VacliError, match=r"fold-2 and .*fold-0 were trained on different features: mae differs"
    ):
        mixed.predict([])


def test_many_may_begin_the_same_folds_at_once(tmp_path):
    about = {"settings": "1", "preset": {}, "seed": 0, "folds": [], "rows": [], "own": ""}
    for number in range(10):
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda _, path=tmp_path / f"f{number}": _begin(path, about), range(8)))
        assert json.loads((tmp_path / f"f{number}" / "folds.json").read_text()) == about


def test_a_sweep_is_told_from_a_run(tmp_path):
    (tmp_path / "search").mkdir()
    (tmp_path / "search" / "journal.log").touch()
    with pytest.raises(VacliError, match=r"is a sweep: give one of its trials.*trial-000"):
        open_any("search", tmp_path)
