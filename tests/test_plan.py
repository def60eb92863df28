"""Which videos a run is made of, in which split, from which recipes; and what it refuses to be made of."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from vacli import VacliError
from vacli.store import Store, Track, folder_name
from vacli.temporal.evaluate import figures, load_clips
from vacli.temporal.plan import own_splits, run_folder, videos_of
from vacli.temporal.predict import predict
from vacli.temporal.preset import Preset
from vacli.temporal.train import train

from .toy_store import ROWS, add_video, make_store, recipe, tiny, tracks_of

LABELLED = ROWS - math.ceil(ROWS / 13)


def refusal(store: Store, preset: Preset, tmp_path: Path, **how: object) -> str:
    with pytest.raises(VacliError) as e:
        train(store, preset, runs=tmp_path / "runs", tell=lambda line: None, **how)
    assert "\n" not in str(e.value)
    return str(e.value)


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


def test_a_run_knows_how_far_its_labels_are_apart(tmp_path):
    store = make_store(tmp_path / "s.zarr", train=2, validation=1)
    run = train(store, tiny("linear", epochs=1), runs=tmp_path, tell=print)
    assert run.about["label"]["step_s"] == pytest.approx(0.1)


def test_without_a_validation_set_a_seeded_fifth_is_held_out():
    names: dict[str, str | None] = {f"v{i}": None for i in range(20)}
    told: list[str] = []
    first = own_splits(names, 0, told.append)
    assert len(first["validation"]) == 4
    assert set(first["train"]).isdisjoint(first["validation"])
    assert set(first["train"]) | set(first["validation"]) == set(names)
    backwards = dict(reversed(names.items()))
    assert own_splits(backwards, 0, told.append) == first
    assert own_splits(names, 1, told.append) != first
    assert "held out 4 of 20 videos by seed 0" in told[0]


def test_people_of_one_video_are_held_out_together():
    names: dict[str, str | None] = dict.fromkeys(
        f"v{i}_{side}" for i in range(10) for side in ("left", "right")
    )
    for seed in range(5):
        held_out = own_splits(names, seed, print)["validation"]
        assert {v.replace("left", "right") for v in held_out if "left" in v} == {
            v for v in held_out if "right" in v
        }
        assert len(held_out) == 4


def test_the_data_sets_own_split_is_kept():
    names: dict[str, str | None] = {"a": "train", "b": "validation", "c": None}
    assert own_splits(names, 0, print) == {"train": ["a", "c"], "validation": ["b"]}


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
            clips = load_clips(store, run.about, "validation")
            curves = predict(run, clips)
            assert figures(curves, clips) == run.about["figures"]
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
    assert "1 video(s) with a valid label" in told
    assert "at least one to train on" in told
    add_video(store, 1, split="validation")
    told = refusal(store, tiny("linear", ["mea"]), tmp_path)
    assert "track mea" in told
    assert "there are logmel, mae:" in told
    assert "--encoder mea" in told
    assert "one width" in refusal(store, tiny("linear").model_copy(update={"fuse": "sum"}), tmp_path)
    assert not (tmp_path / "runs").exists()  # nothing was begun


def relabelled(store: Store, number: int, values: np.ndarray, split: str) -> str:
    labels = Track(values.astype(np.float32), tracks_of(number)["label.va"].times_s)
    return add_video(store, number, split, instead={"label.va": labels})


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("nothing", [np.nan, -5.0])
def test_labels_that_say_nothing_are_refused_before_training(tmp_path, split, nothing):
    store = make_store(tmp_path / "s.zarr", train=split == "validation", validation=split == "train")
    relabelled(store, 7, np.full((ROWS, 2), nothing), split)
    assert "1 video(s) with a valid label and a stream are too few" in refusal(
        store, tiny("linear"), tmp_path
    )
    assert not (tmp_path / "runs").exists()  # nothing was begun


def test_a_video_without_a_valid_label_is_left_out_and_said_and_the_rows_are_those_with_one(tmp_path):
    store = make_store(tmp_path / "s.zarr", train=2, validation=1)
    relabelled(store, 7, np.full((ROWS, 2), -5), "train")
    relabelled(store, 8, np.full((ROWS, 2), np.nan), "validation")
    few = np.full((ROWS, 2), np.nan)
    few[5:9], few[8, 1] = 0.5, -5
    relabelled(store, 9, few, "train")
    told: list[str] = []
    rows = {video: facts["rows"] for video, facts in videos_of(store, tiny("linear"), told.append).items()}
    assert rows == {"v00": LABELLED, "v01": LABELLED, "v02": LABELLED, "v09": 3}
    assert told == ["2 of 6 videos are left out: no valid label, or none of the streams"]
    run = train(store, tiny("linear", epochs=1), runs=tmp_path / "runs", tell=lambda line: None)
    assert (set(run.about["train"]), set(run.about["validation"])) == ({"v00", "v01", "v09"}, {"v02"})
    splits = {"train": ["v00"], "validation": ["v08"]}
    assert "names v08, which" in refusal(store, tiny("linear"), tmp_path, splits=splits)


def test_where_no_video_has_a_valid_label_that_is_one_line(tmp_path):
    store = Store(tmp_path / "s.zarr", create=True)
    for number in range(2):
        relabelled(store, number, np.full((ROWS, 2), -5), "train")
    assert "0 video(s) with a valid label" in refusal(store, tiny("linear"), tmp_path)


@pytest.mark.parametrize("columns", [1, 3])
def test_labels_of_other_than_two_columns_are_refused_by_name(tmp_path, columns):
    store = make_store(tmp_path / "s.zarr", train=1, validation=1)
    relabelled(store, 7, np.zeros((ROWS, columns)), "train")
    told = refusal(store, tiny("linear"), tmp_path)
    assert f"label.va of v07 has rows of ({columns},); wanted (2,), valence and arousal" in told


@pytest.mark.parametrize("name", ["label.va", "faces", "label.va@0123"])
def test_a_track_that_is_no_feature_is_no_stream(toy, tmp_path, name):
    told = refusal(toy, tiny("linear", [name]), tmp_path)
    assert "cannot be a stream: it is no feature; there are logmel, mae" in told


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_label_outside_its_range_is_named_with_video_and_row(tmp_path, split):
    store = make_store(tmp_path / "s.zarr", train=1, validation=1)
    values = np.zeros((ROWS, 2))
    values[:3], values[17] = -5, (0.5, -1.25)
    relabelled(store, 7, values, split)
    assert "v07 row 17: the label (0.5, -1.25) lies outside [-1, 1]" in refusal(
        store, tiny("linear"), tmp_path
    )


def test_labels_made_in_two_ways_are_refused_without_naming_an_option_that_is_none(tmp_path):
    store = make_store(tmp_path / "s.zarr", train=1, validation=1)
    other = {"track": "label.va", "version": 2}
    store.put(other, "00" * 32, tracks_of(0)["label.va"])
    facts = {"root": "toy", "media": "00" * 32, "split": "train"}
    store.link("v00", facts, {"label.va": {"folder": folder_name(other), "media": "00" * 32}})
    told = refusal(store, tiny("linear"), tmp_path)
    assert "label.va was made in 2 different ways" in told
    assert "--stream" not in told


# ---- splits from outside -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Store:
    store = make_store(tmp_path_factory.mktemp("toy") / "features.zarr", train=3, validation=2)
    add_video(store, 20, split=None, rows=50)
    add_video(store, 21, split="test")
    add_video(store, 22, names=("mae",))
    return store


def test_the_videos_for_folds_are_those_of_training_with_split_and_rows(toy):
    found = videos_of(toy, tiny("linear"), lambda line: None)
    rows = {"v20": 50 - math.ceil(50 / 13)}  # every 13th is unlabelled
    splits = {"v03": "validation", "v04": "validation", "v20": None}
    wanted = {
        v: {"split": splits.get(v, "train"), "rows": rows.get(v, LABELLED)} for v in ("v00", "v01", "v02")
    }
    wanted |= {v: {"split": splits[v], "rows": rows.get(v, LABELLED)} for v in splits}
    assert found == wanted


def test_splits_from_outside_take_the_place_of_the_data_sets_own(toy, tmp_path):
    splits = {"train": ["v20", "v03"], "validation": ["v00"]}
    run = train(toy, tiny("linear", epochs=1), runs=tmp_path, splits=splits, tell=print)
    assert (list(run.about["train"]), list(run.about["validation"])) == (["v03", "v20"], ["v00"])
    own = train(toy, tiny("linear", epochs=1), runs=tmp_path, tell=print)
    assert own.path != run.path  # they are settings like any other


def test_splits_that_share_name_strangers_or_are_empty_are_refused(toy, tmp_path):
    def told(train: list[str], validation: list[str]) -> str:
        return refusal(toy, tiny("linear"), tmp_path, splits={"train": train, "validation": validation})

    assert "v01 is in both splits" in told(["v00", "v01"], ["v01"])
    assert "the train split is empty" in told([], ["v01"])
    for stranger in ("v99", "v21", "v22"):  # unknown, of the test set, without labels
        assert f"the validation split names {stranger}" in told(["v00"], [stranger])
    assert not (tmp_path / "runs").exists()


# ---- names and seeds -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [".", "..", "a/../..", "../a", "a/..", "/tmp/a", "a\0b"])
def test_a_run_lies_strictly_below_the_folder_of_runs(toy, tmp_path, name):
    assert "is no name of a run" in refusal(toy, tiny("linear"), tmp_path, name=name)
    assert not any(tmp_path.iterdir())


def test_a_run_may_lie_deeper():
    assert run_folder("runs", "mine/fold-1") == Path("runs/mine/fold-1")


@pytest.mark.parametrize("seed", [2**63 - 1, -(2**63), 2**60, -1])
def test_any_seed_of_63_bits_trains_and_decides(toy, tmp_path, seed):
    preset = tiny("linear", epochs=1)
    one, other = (train(toy, preset, runs=tmp_path, seed=s, tell=print) for s in (seed, seed ^ 1))
    assert one.about["seed"] == seed
    assert (one.path / "weights.safetensors").read_bytes() != (
        other.path / "weights.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("seed", [2**63, -(2**63) - 1, 10**400], ids=["2^63", "-2^63 - 1", "10^400"])
def test_a_larger_seed_is_refused(toy, tmp_path, seed):
    assert "bits; wanted one between -2^63 and 2^63 - 1" in refusal(toy, tiny("linear"), tmp_path, seed=seed)
    assert not any(tmp_path.iterdir())
