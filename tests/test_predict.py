"""Curves: a row for every row, filled where nobody is seen, smoothed by time, whole on the disk or absent."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vacli import VacliError
from vacli.store import Store, Track
from vacli.temporal.predict import (
    Run,
    face_stream_of,
    faces_of,
    finish,
    on_frames,
    open_run,
    predict,
    predict_raw,
    raw_curves,
)
from vacli.temporal.preset import WindowSpec, load_preset
from vacli.temporal.smoothing import Smoothing
from vacli.temporal.train import train
from vacli.temporal.windows import Clip, Windows

from .toy_store import make_store, tiny, tracks_of


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    return make_store(tmp_path_factory.mktemp("predict") / "features.zarr", train=3, validation=1)


@pytest.fixture(scope="module")
def run(store, tmp_path_factory) -> Run:
    return train(store, tiny("mamba", epochs=2), runs=tmp_path_factory.mktemp("runs"), tell=print)


def boxes(valence_s: float, arousal_s: float) -> Smoothing:
    return {"valence": {"kind": "box", "half_s": valence_s}, "arousal": {"kind": "box", "half_s": arousal_s}}


def clip(number: int, rows: int, run: Run) -> Clip:
    tracks = tracks_of(number, max(rows, 1))
    times_s = tracks["mae"].times_s[:rows]
    return Clip.on_clock(f"clip{number}", times_s, tracks, run.dims)


def curve(values: np.ndarray, times_s: np.ndarray | None = None) -> Track:
    """The same values for valence and arousal, at 10 rows a second unless told."""
    times_s = np.arange(len(values)) / 10 if times_s is None else times_s
    return Track(np.stack([values, values], axis=1).astype(np.float32), times_s)


# ---- from windows to curves ----------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [0, 1, 2, 49, 50, 51, 90, 91, 237])
def test_there_is_a_row_for_every_row_of_the_clip(run, rows):
    made = predict(run, [clip(5, rows, run)])["clip5"]
    assert made.values.shape == (rows, 2)
    np.testing.assert_array_equal(made.times_s, clip(5, rows, run).times_s)
    assert np.abs(made.values).max(initial=0) <= 1


def test_no_clips_give_no_curves(run):
    assert predict(run, []) == {}


def test_a_curve_does_not_depend_on_the_clips_beside_it(run):
    clips = [clip(number, rows, run) for number, rows in ((1, 30), (2, 1), (3, 0), (4, 173))]
    together = predict(run, clips)
    assert list(together) == [c.id for c in clips]
    for alone in clips:
        np.testing.assert_allclose(
            predict(run, [alone])[alone.id].values, together[alone.id].values, atol=1e-6
        )


def test_raw_curves_do_not_depend_on_the_size_of_a_batch(run):
    clips, spec = [clip(number, 130, run) for number in range(4)], WindowSpec(length=50, stride=20)
    net = run.network()
    wanted = raw_curves(net, Windows(clips, spec, 1))
    for batch in (2, 7, 1000):
        for video_id, made in raw_curves(net, Windows(clips, spec, batch)).items():
            np.testing.assert_allclose(made.values, wanted[video_id].values, atol=1e-6)


def test_without_smoothing_the_raw_curve_is_filled_and_clipped_only(run):
    one = clip(6, 120, run)
    raw = raw_curves(run.network(), Windows([one], run.preset.windows, 3))[one.id]
    face = faces_of(one)
    made = predict(run, [one], smooth=False)[one.id]
    assert 0 < face.sum() < 120
    np.testing.assert_allclose(made.values[face], np.clip(raw.values[face], -1, 1), atol=1e-6)


def test_a_network_that_gives_no_numbers_is_one_line(run):
    net = run.network()
    with torch.no_grad():
        next(net.tasks.parameters()).fill_(float("nan"))
    with pytest.raises(VacliError, match=r"not finite.*train\.lr"):
        raw_curves(net, Windows([clip(1, 20, run)], WindowSpec(length=50, stride=20), 4))


def test_rows_that_no_stream_saw_have_finite_values_and_change_no_other_video(run):
    whole, blind, holed = (clip(number, 130, run) for number in (1, 2, 3))
    for name, rows in blind.streams.items():
        blind.streams[name] = np.full_like(rows, np.nan)
        holed.streams[name] = np.where(np.arange(130)[:, None] % 70 > 40, np.nan, holed.streams[name])
    curves = predict(run, [whole, blind, holed])
    for made in curves.values():
        assert made.values.shape == (130, 2)
        assert np.abs(made.values).max() <= 1
    np.testing.assert_allclose(curves["clip1"].values, predict(run, [whole])["clip1"].values, atol=1e-6)


def test_a_run_of_whole_videos_predicts_whole_videos(store, tmp_path):
    """Packed together or alone, and from the first row to the last in one piece."""
    preset = tiny("mamba", also={"windows.whole": "true"}, epochs=1)
    run = train(store, preset, runs=tmp_path, tell=print)
    clips = [clip(1, 130, run), clip(2, 1, run), clip(3, 77, run)]
    made = predict_raw(run, clips, "cpu")
    net = run.network()
    for one in clips:
        streams = {
            name: torch.from_numpy(rows.astype(np.float32))[None] for name, rows in one.streams.items()
        }
        seen = {name: ~x[..., 0].isnan() for name, x in streams.items()}
        with torch.inference_mode():
            wanted = net({name: x.nan_to_num() for name, x in streams.items()}, seen)["va"][0]
        np.testing.assert_allclose(made[one.id].values, wanted.numpy(), atol=1e-5)


# ---- whose rows say where a face is --------------------------------------------------------------------------


SOUND = {"track": "wavlm", "rate_hz": 16000}
VGGISH = {"track": "vggish", "front_end": {"rate_hz": 16000, "bands": 64}}
FACE = {"track": "mae", "size": 224}


@pytest.mark.parametrize(
    ("recipes", "wanted"),
    [
        ([FACE, SOUND], 0),
        ([SOUND, VGGISH, FACE], 2),
        ([SOUND, VGGISH], 0),
        ([SOUND, {"track": "imported"}], 1),
        ([None, FACE], 0),
    ],
)
def test_the_face_is_looked_for_in_the_first_stream_not_made_from_sound(recipes, wanted):
    about = {"streams": {f"s{i}": {"recipe": recipe} for i, recipe in enumerate(recipes)}}
    assert face_stream_of(about) == f"s{wanted}"


def test_faces_are_where_their_stream_saw_something():
    seen, times_s = np.array([True, False, True]), np.arange(3) / 10
    face = np.where(seen[:, None], 1, np.nan).astype(np.float16)
    one = Clip("c", times_s, {"sound": np.ones((3, 2), np.float16), "mae": face})
    assert faces_of(one, "mae").tolist() == seen.tolist()
    assert faces_of(one).all()  # the first stream, where nobody says which
    assert faces_of(Clip("c", times_s, {}), "logmel").all()  # read as patches: nothing says where


# ---- finishing -----------------------------------------------------------------------------------------------


def test_rows_without_a_face_lie_between_their_neighbours_in_time():
    times_s = np.array([0.0, 1.0, 2.0, 5.0, 6.0])
    face = np.array([True, False, False, False, True])
    made = finish(curve(np.array([0.0, 9, 9, 9, 0.6]), times_s), face)
    np.testing.assert_allclose(made.values[:, 0], [0, 0.1, 0.2, 0.5, 0.6], atol=1e-6)


def test_rows_before_the_first_and_after_the_last_face_hold_its_value():
    face = np.array([False, False, True, True, False])
    made = finish(curve(np.array([0.9, 0.9, 0.1, 0.3, 0.9])), face)
    np.testing.assert_allclose(made.values[:, 1], [0.1, 0.1, 0.1, 0.3, 0.3], atol=1e-6)


def test_a_video_without_any_face_keeps_the_networks_values():
    values = np.array([0.1, -0.4, 0.2])
    made = finish(curve(values), np.zeros(3, bool))
    np.testing.assert_allclose(made.values[:, 0], values, atol=1e-7)


def test_values_never_leave_minus_one_to_one():
    made = finish(curve(np.array([-3.0, 0.5, 40.0])), np.ones(3, bool), boxes(0, 0.2))
    assert made.values[:, 0].tolist() == [-1, 0.5, 1]
    assert np.abs(made.values).max() <= 1


def smooth_by_a_plain_loop(values: np.ndarray, times_s: np.ndarray, face: np.ndarray, half_s: float) -> list:
    """The mean of the rows with a face no further than half_s, for each row with a face."""
    return [
        np.mean([values[j] for j in np.flatnonzero(face) if abs(times_s[j] - times_s[i]) <= half_s + 1e-9])
        for i in np.flatnonzero(face)
    ]


@given(
    st.lists(
        st.tuples(st.integers(1, 900), st.floats(-1, 1, width=32), st.booleans()), min_size=1, max_size=40
    ),
    st.sampled_from([0.0, 0.2, 0.8, 3.2]),
)
def test_smoothing_is_the_mean_within_reach_at_any_frame_rate(rows, half_s):
    times_s = np.cumsum([step for step, _, _ in rows]) / 1000
    values = np.array([value for _, value, _ in rows], np.float32)
    face = np.array([seen for _, _, seen in rows])
    face[0] |= not face.any()
    made = finish(curve(values, times_s), face, boxes(half_s, half_s))
    wanted = smooth_by_a_plain_loop(values.astype(np.float64), times_s, face, half_s)
    np.testing.assert_allclose(made.values[face, 0], wanted, atol=1e-6)


def test_smoothing_reaches_over_a_hole_shorter_than_itself_and_not_over_a_longer_one():
    face = np.ones(11, bool)
    face[3:8] = False  # nobody for 0.6 s
    values = np.array([0, 0, 0, 9, 9, 9, 9, 9, 0.8, 0.8, 0.8])
    short = finish(curve(values), face, boxes(0.4, 0.4))
    np.testing.assert_allclose(short.values[[0, 1, 2, 8, 9, 10], 0], [0, 0, 0, 0.8, 0.8, 0.8], atol=1e-6)
    far = finish(curve(values), face, boxes(0.6, 0.6))
    np.testing.assert_allclose(far.values[[2, 8], 0], [0.2, 0.6], atol=1e-6)


def test_valence_and_arousal_are_smoothed_each_by_its_own():
    values = np.array([0, 0, 0.9, 0, 0])
    made = finish(curve(values), np.ones(5, bool), boxes(0, 0.1))
    np.testing.assert_allclose(made.values[:, 0], values, atol=1e-7)
    np.testing.assert_allclose(made.values[:, 1], [0, 0.3, 0.3, 0.3, 0], atol=1e-6)


# ---- runs ----------------------------------------------------------------------------------------------------


def write_run(folder: Path, head: str = "linear", finished_at: str | None = None) -> Path:
    about: dict = {"preset": load_preset(head).model_dump()}
    if finished_at:
        about |= {"figures": {}, "finished_at": finished_at}
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(about))
    return folder


def test_the_newest_finished_run_is_opened_or_the_newest_of_a_head(tmp_path):
    write_run(tmp_path / "a", "linear", "2026-01-01T00:00:00+00:00")
    write_run(tmp_path / "b", "linear", "2026-01-03T00:00:00.5+00:00")
    write_run(tmp_path / "c", "mamba", "2026-01-02T00:00:00+00:00")
    write_run(tmp_path / "d", "mamba")
    assert open_run(None, tmp_path).path.name == "b"
    assert open_run("mamba", tmp_path).path.name == "c"
    assert open_run("a", tmp_path).path.name == "a"  # by its name
    assert open_run(tmp_path / "a").path.name == "a"  # or its folder


def test_a_run_that_is_unfinished_absent_or_broken_is_one_line(tmp_path):
    with pytest.raises(VacliError, match=r"no finished run .*there: none.*vacli train"):
        open_run(None, tmp_path)
    write_run(tmp_path / "going", "mamba")
    with pytest.raises(VacliError, match=r"no finished run .*there: going"):
        open_run(None, tmp_path)
    with pytest.raises(VacliError, match=r"going is not finished: go on"):
        open_run("going", tmp_path)
    with pytest.raises(VacliError, match=r"no run mamba .*there: going"):
        open_run("mamba", tmp_path)
    with pytest.raises(VacliError, match=r"no run other .*there: going"):
        open_run("other", tmp_path)
    for text in ("{", "[1, 2]", "7"):
        (tmp_path / "going" / "run.json").write_text(text)
        with pytest.raises(VacliError, match=r"cannot read .*run\.json"):
            open_run("going", tmp_path)


def test_where_no_run_is_found_folds_are_listed_and_the_head_is_trained(tmp_path):
    write_run(tmp_path / "going", "mamba")
    for name, text in (("six", '{"figures": {}}'), ("part", "{}"), ("torn", "{")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "folds.json").write_text(text)
    there = "going (not finished), part (folds, not finished), six (folds), torn (folds that cannot be read)"
    for wanted, head in (("crossattn", "crossattn"), ("nope", "mamba"), (None, "mamba")):
        with pytest.raises(VacliError) as refusal:
            open_run(wanted, tmp_path)
        assert f"(there: {there}): train one with `vacli train --head {head}`" in str(refusal.value)


def test_weights_that_are_missing_cut_or_of_another_network_are_one_line(run, tmp_path):
    weights = (run.path / "weights.safetensors").read_bytes()
    broken = Run(tmp_path, run.about)
    other = Run(tmp_path, {**run.about, "preset": load_preset("linear").model_dump()})
    for content, reader in ((None, broken), (b"", broken), (weights[:-10], broken), (weights, other)):
        if content is not None:
            (tmp_path / "weights.safetensors").write_bytes(content)
        with pytest.raises(VacliError, match=r"weights\.safetensors.*train") as e:
            reader.network()
        assert "\n" not in str(e.value)


def test_an_old_run_keeps_the_boxes_it_chose(tmp_path):
    about = {"preset": load_preset("linear").model_dump()}
    assert Run(tmp_path, {**about, "smooth_s": [0.2, 1.6]}).smoothing == boxes(0.2, 1.6)
    assert Run(tmp_path, {**about, "smoothing": boxes(0.4, 0)}).smoothing == boxes(0.4, 0)


@pytest.mark.parametrize(
    "odd",
    [
        {},
        [1, 2],
        "none",
        {"valence": {"kind": "box", "half_s": 1}},
        {**boxes(0, 0), "arousal": {"kind": "median", "half_s": 1}},
        {**boxes(0, 0), "arousal": {"kind": "box", "half_s": -1}},
        {**boxes(0, 0), "arousal": {"kind": "box", "half_s": float("nan")}},
        {**boxes(0, 0), "arousal": {"kind": ["box"], "half_s": 1}},
    ],
)
def test_a_smoothing_that_is_none_is_one_line(tmp_path, odd):
    with pytest.raises(VacliError, match=r"run\.json: smoothing is .*wanted.*kind") as e:
        _ = Run(tmp_path, {"smoothing": odd}).smoothing
    assert "\n" not in str(e.value)


# ---- clocks --------------------------------------------------------------------------------------------------


def test_frames_closer_than_the_labels_were_are_read_as_the_labels_were(run):
    slow = Run(run.path, {**run.about, "label": {**run.about["label"], "step_s": 1.0}})
    times_s = np.arange(100) / 10
    clock = slow.clock(times_s)
    np.testing.assert_allclose(clock, np.arange(10) + 0.5)
    for same in (times_s[::8], times_s[:1], times_s[:0]):
        assert np.array_equal(slow.clock(same), same)
    assert np.array_equal(run.clock(times_s), times_s)
    curve = on_frames(Track(np.stack([clock, -clock], 1).astype(np.float32) / 10, clock), times_s)
    np.testing.assert_allclose(curve.values[:, 0], np.clip(times_s, 0.5, 9.5) / 10, atol=1e-6)
    assert len(curve) == 100


def test_a_clip_of_other_streams_is_refused_in_one_line(run):
    times_s = np.arange(5) / 10
    dims = run.dims
    for wrong in (
        {**dims, "mae": 1},
        {**dims, "other": 3},
        {name: dim for name, dim in dims.items() if name != "mae"},
    ):
        clip = Clip("odd", times_s, {name: np.zeros((5, dim), np.float16) for name, dim in wrong.items()})
        with pytest.raises(VacliError, match="odd has the streams"):
            predict(run, [clip])


def test_a_neighbour_that_cannot_be_read_does_not_hide_the_newest_run(run, tmp_path):
    shutil.copytree(run.path, tmp_path / "good")
    for name, text in (("bad", "no json"), ("odd", '{"preset": {}, "figures": {}}'), ("list", "[]")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(text)
    assert open_run(None, tmp_path).path == tmp_path / "good"
    for name in ("bad", "odd", "list"):
        with pytest.raises(VacliError, match=r"run\.json"):
            open_run(name, tmp_path)
