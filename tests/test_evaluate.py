"""Judgement: the challenge's CCC, how sure it is, where it is lost, beside baselines; validation alone chooses."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise

import numpy as np
import pytest
from vacli import VacliError
from vacli.store import Store, Track
from vacli.store.labels import ccc
from vacli.temporal import baselines
from vacli.temporal.evaluate import (
    RESAMPLINGS,
    TIME_EDGES_S,
    choose_smoothing,
    clips_of,
    evaluate,
    figures,
    judge,
    load_clips,
)
from vacli.temporal.predict import Run, faces_of, finish, predict, predict_raw
from vacli.temporal.smoothing import CHOICES, TARGETS, Smoothing
from vacli.temporal.train import train
from vacli.temporal.windows import Clip

from .toy_store import ROWS, add_video, make_store, real_logmel, recipe, tiny


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    return make_store(tmp_path_factory.mktemp("evaluate") / "features.zarr", train=4, validation=4)


@pytest.fixture(scope="module")
def run(store, tmp_path_factory) -> Run:
    return train(
        store, tiny("linear", epochs=6, lr=0.02), runs=tmp_path_factory.mktemp("runs"), tell=lambda _: None
    )


def made_up(
    seed: int = 0, videos: int = 4, rows: int = 40, noise: float = 0.4
) -> tuple[list[Clip], dict[str, Track]]:
    """Clips with some rows unlabelled and some without a face, and noisy curves for them."""
    rng = np.random.default_rng(seed)
    clips, curves = [], {}
    for number in range(videos):
        T = rows + 3 * number
        times_s = np.cumsum(rng.uniform(0.02, 0.2, T))
        labels = np.stack([np.sin(times_s * 2 + number), np.cos(times_s + number)], axis=1) * 0.8
        curve = np.clip(labels + noise * rng.standard_normal((T, 2)), -1, 1).astype(np.float32)
        labels[rng.random(T) < 0.2] = np.nan
        face = np.where(rng.random(T) < 0.8, 1, np.nan).astype(np.float16)
        clips.append(Clip(f"v{number}", times_s, {"mae": face[:, None]}, labels.astype(np.float32)))
        curves[f"v{number}"] = Track(curve, times_s)
    return clips, curves


def plain_ccc(pairs: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """(2,): all rows behind each other, the unlabelled left out, in two passes."""
    x, y = (np.concatenate(part).astype(np.float64) for part in zip(*pairs, strict=True))
    valid = ~np.isnan(y).any(axis=1)
    return ccc(x[valid], y[valid], np.ones((int(valid.sum()), 1)))


def pairs_of(clips: list[Clip], curves: dict[str, Track]) -> list[tuple[np.ndarray, np.ndarray]]:
    return [(curves[c.id].values, c.labels) for c in clips if c.labels is not None]


# ---- the number ----------------------------------------------------------------------------------------------


def test_figures_are_the_ccc_of_all_rows_behind_each_other():
    clips, curves = made_up()
    clips.append(Clip("unlabelled", np.arange(5) / 10.0, {}, None))
    valence, arousal = plain_ccc(pairs_of(clips, curves))
    wanted = {"valence": valence, "arousal": arousal, "mean": (valence + arousal) / 2}
    assert figures(curves, clips) == pytest.approx(wanted, abs=1e-12)


def test_without_a_valid_label_there_is_nothing_to_judge_by():
    clips, curves = made_up(videos=1)
    for labels in (None, np.full((40, 2), np.nan, np.float32)):
        blank = [Clip("v0", clips[0].times_s, clips[0].streams, labels)]
        for judged in (figures, choose_smoothing, lambda c, b: judge({"a": c}, b)):
            with pytest.raises(VacliError, match="no valid label"):
                judged(curves, blank)


# ---- smoothing is chosen -------------------------------------------------------------------------------------


def test_the_smoothing_chosen_is_the_best_for_valence_and_the_best_for_arousal_here():
    rng = np.random.default_rng(1)
    times_s = np.arange(600) / 10.0
    slow, fast = np.sin(times_s / 5), np.sin(times_s * 8)
    labels = np.stack([slow, fast], axis=1).astype(np.float32)
    noisy = labels + rng.normal(0, (1.0, 0.02), labels.shape).astype(np.float32)
    clips = [Clip("a", times_s, {"mae": np.ones((600, 3), np.float16)}, labels)]
    raw = {"a": Track(noisy.astype(np.float32), times_s)}
    found = choose_smoothing(raw, clips)
    for k, target in enumerate(TARGETS):
        tried = [
            plain_ccc(
                pairs_of(clips, {"a": finish(raw["a"], np.ones(600, bool), dict.fromkeys(TARGETS, c))})
            )[k]
            for c in CHOICES
        ]
        assert found[target] == CHOICES[int(np.argmax(tried))]
    assert found["valence"]["half_s"] > 0.5
    assert found["arousal"]["half_s"] == 0
    assert json.loads(json.dumps(found)) == found  # as run.json keeps it


def test_of_equally_good_smoothings_none_is_chosen():
    clips, _ = made_up()
    flat = {c.id: Track(np.full((len(c.times_s), 2), 0.25, np.float32), c.times_s) for c in clips}
    assert choose_smoothing(flat, clips) == dict.fromkeys(TARGETS, CHOICES[0])


def test_a_run_is_judged_with_the_smoothing_it_has_not_with_the_best_for_those_it_meets(store, run):
    odd: Smoothing = {
        "valence": {"kind": "gauss", "half_s": 6.4},
        "arousal": {"kind": "box", "half_s": 3.2},
    }
    other = Run(run.path, {**run.about, "smoothing": odd})
    clips = load_clips(store, run.about, "validation")
    found = evaluate(other, store)
    assert found.figures["mean"] == figures(predict(other, clips), clips)["mean"]
    assert found.figures["mean"] < evaluate(run, store).figures["mean"]


def test_a_runs_smoothing_is_that_of_its_validation_videos(store, run):
    clips = load_clips(store, run.about, "validation")
    raw = predict_raw(run, clips, "cpu")
    assert run.smoothing == choose_smoothing(raw, clips, run.face_stream)


# ---- how sure, and where -------------------------------------------------------------------------------------


def test_intervals_are_those_of_resampled_videos_behind_each_other():
    clips, curves = made_up(videos=5)
    other = {id: Track(track.values * np.float32(0.5), track.times_s) for id, track in curves.items()}
    report = judge({"judged": curves, "other": other}, clips)
    times = np.random.default_rng(0).multinomial(5, np.full(5, 0.2), size=RESAMPLINGS)
    by_hand = {}
    for name, these in (("judged", curves), ("other", other)):
        pairs = pairs_of(clips, these)
        each = np.array(
            [plain_ccc([p for p, n in zip(pairs, row, strict=True) for _ in range(n)]) for row in times]
        )
        each = np.column_stack([each, each.mean(axis=1)])
        by_hand[name] = each[:, 2]
        for k, key in enumerate(("valence", "arousal", "mean")):
            low, high = np.percentile(each[:, k], (2.5, 97.5))
            assert report.systems[name].interval[key] == pytest.approx((low, high), abs=1e-9)
    assert report.systems["judged"].ahead is None
    by, interval = report.systems["other"].ahead
    assert by == pytest.approx(report.figures["mean"] - figures(other, clips)["mean"], abs=1e-12)
    wanted = np.percentile(by_hand["judged"] - by_hand["other"], (2.5, 97.5))
    assert interval == pytest.approx(tuple(wanted), abs=1e-9)


def test_one_video_has_no_interval_and_is_judged_all_the_same():
    clips, curves = made_up(videos=1)
    report = judge({"a": curves, "b": curves}, clips)
    assert report.systems["a"].interval is None
    assert report.systems["b"].ahead is None
    assert "[" not in "".join(report.lines())


def test_every_video_has_its_own_ccc_and_zero_where_its_labels_never_move():
    clips, curves = made_up()
    clips[1].labels[:, 0] = np.where(np.isnan(clips[1].labels[:, 0]), np.nan, 0.3)
    report = judge({"a": curves}, clips)
    assert list(report.videos) == [c.id for c in clips]
    for c in clips:
        valence, arousal = plain_ccc(pairs_of([c], curves))
        found = report.videos[c.id]
        assert (found["valence"], found["arousal"]) == pytest.approx((valence, arousal), abs=1e-12)
        assert found["frames"] == np.isfinite(c.labels).all(axis=1).sum()
    assert report.videos["v1"]["valence"] == 0
    assert report.notes == ["1 of 4 videos have a label that never moves: 0 for themselves"]


def test_frames_with_and_without_a_face_are_judged_apart():
    clips, curves = made_up()
    report = judge({"a": curves}, clips)
    for where, wanted in (("found", True), ("missing", False)):
        pairs = [
            (p[faces_of(c) == wanted], y[faces_of(c) == wanted])
            for c, (p, y) in zip(clips, pairs_of(clips, curves), strict=True)
        ]
        found = report.face[where]
        assert (found["valence"], found["arousal"]) == pytest.approx(tuple(plain_ccc(pairs)), abs=1e-12)
    frames = [x["frames"] for x in report.face.values()]
    assert sum(frames) == report.figures["frames"]
    assert min(frames) > 0


def test_the_error_over_time_is_the_mean_absolute_error_of_each_stretch():
    clips, curves = made_up(rows=150)
    report = judge({"a": curves}, clips)
    times_s = np.concatenate([c.times_s for c in clips])
    error = np.concatenate([np.abs(p - y) for p, y in pairs_of(clips, curves)])
    stretches = list(pairwise(TIME_EDGES_S))
    for found, (low, high) in zip(report.over_time, stretches, strict=False):
        here = error[(times_s >= low) & (times_s < high)]
        assert (found["from_s"], found["to_s"]) == (low, high)
        assert found["frames"] == np.isfinite(here[:, 0]).sum()
        wanted = tuple(np.nanmean(here, axis=0))
        assert (found["valence"], found["arousal"]) == pytest.approx(wanted, abs=1e-6)
    assert sum(x["frames"] for x in report.over_time) == report.figures["frames"]


# ---- baselines -----------------------------------------------------------------------------------------------


def seen_now_and_then(seed: int, videos: int = 3) -> list[Clip]:
    """Two streams far from 0 +- 1, one with a dim that never moves; labels made of both and of what is missing."""
    rng = np.random.default_rng(seed)
    clips = []
    for number in range(videos):
        T = 50 + 10 * number
        face, sound = rng.normal(3, 0.5, (T, 3)), rng.normal(-20, 7, (T, 2))
        gone, silent = rng.random(T) < 0.3, rng.random(T) < 0.2
        face[:, 1] = 5
        face[gone], sound[silent] = np.nan, np.nan
        shown = np.nan_to_num(face[:, 0] - 3), np.nan_to_num((sound[:, 1] + 20) / 14)
        labels = np.stack([shown[0] - 0.3 * gone, shown[1] + 0.2 * silent], axis=1)
        labels += 0.05 * rng.standard_normal((T, 2))
        labels[::9] = np.nan
        streams = {"mae": face.astype(np.float16), "logmel": sound.astype(np.float16)}
        clips.append(
            Clip(f"v{number}", np.arange(T) / 10.0, streams, np.clip(labels, -1, 1).astype(np.float32))
        )
    return clips


def plain_ridge(clips: list[Clip], penalty: float, at: list[Clip]) -> np.ndarray:
    """All rows at once, in float64: standardised streams, zeros where missing, where that is, and a constant."""

    def columns(of: list[Clip], moments: dict | None, kept: np.ndarray) -> tuple[np.ndarray, dict]:
        found, used = [], dict(moments or {})
        for name in of[0].streams:
            x = np.concatenate([c.streams[name] for c in of]).astype(np.float64)[kept]
            missing = np.isnan(x[:, :1])
            if moments is None:
                deviation = np.nanstd(x, axis=0)
                used[name] = np.nanmean(x, axis=0), np.where(deviation < 1e-4, 1, deviation)
            found += [np.where(missing, 0, (x - used[name][0]) / used[name][1]), missing]
        return np.concatenate([*found, np.ones((len(found[0]), 1))], axis=1), used

    labels = np.concatenate([c.labels for c in clips]).astype(np.float64)
    labelled = ~np.isnan(labels[:, 0])
    X, moments = columns(clips, None, labelled)
    eye = np.eye(X.shape[1])
    eye[-1, -1] = 0
    weights = np.linalg.solve(X.T @ X + penalty * len(X) * eye, X.T @ labels[labelled])
    every = np.ones(sum(len(c.times_s) for c in at), bool)
    return columns(at, moments, every)[0] @ weights


def test_the_ridge_in_pieces_equals_the_plain_one(monkeypatch):
    training, judged = seen_now_and_then(0), seen_now_and_then(1, videos=2)
    for piece in (7, 1000):
        monkeypatch.setattr(baselines, "_PIECE_ROWS", piece)
        found = baselines.fit(iter(training)).linear(judged)
        assert tuple(found) == baselines.PENALTIES
        for penalty, curves in found.items():
            wanted = plain_ridge(training, penalty, judged)
            made = np.concatenate([curves[c.id].values for c in judged])
            np.testing.assert_allclose(made, wanted, atol=1e-4)


def test_the_ridge_learns_what_is_shown_and_that_something_is_missing():
    judged = seen_now_and_then(1, videos=2)
    curves = baselines.fit(seen_now_and_then(0)).linear(judged)[1e-3]
    assert figures(curves, judged)["mean"] > 0.9
    valence = np.concatenate([curves[c.id].values[:, 0] for c in judged])
    gone = np.concatenate([~faces_of(c) for c in judged])
    assert valence[gone].mean() == pytest.approx(-0.3, abs=0.05)


def test_a_stream_that_no_training_video_has_does_nothing():
    training, judged = seen_now_and_then(0), seen_now_and_then(1, videos=1)
    for c in training:
        c.streams["logmel"] = np.full_like(c.streams["logmel"], np.nan)
    fitted = baselines.fit(training)
    before = fitted.linear(judged)[1e-2]["v0"].values
    judged[0].streams["logmel"] = judged[0].streams["logmel"] * np.float16(3)
    np.testing.assert_allclose(fitted.linear(judged)[1e-2]["v0"].values, before, atol=1e-5)


def test_the_constant_is_the_mean_of_the_labelled_rows_and_has_ccc_zero():
    training = seen_now_and_then(0)
    fitted = baselines.fit(training)
    wanted = np.nanmean(np.concatenate([c.labels for c in training]), axis=0)
    np.testing.assert_allclose(fitted.mean, wanted, atol=1e-6)
    curves = fitted.constant(training)
    np.testing.assert_allclose(curves["v0"].values, np.tile(wanted, (50, 1)), atol=1e-6)
    assert figures(curves, training) == {"valence": 0, "arousal": 0, "mean": 0}


def test_there_are_no_baselines_without_a_label_and_none_of_rows_for_no_rows():
    with pytest.raises(VacliError, match="no valid label"):
        baselines.fit([Clip("a", np.arange(3.0), {"mae": np.ones((3, 2), np.float16)}, None)])
    empty = Clip("e", np.empty(0), {name: x[:0] for name, x in seen_now_and_then(0)[0].streams.items()})
    assert len(baselines.fit(seen_now_and_then(0)).linear([empty])[1.0]["e"]) == 0


# ---- a run, whole --------------------------------------------------------------------------------------------


def test_a_run_stands_beside_its_raw_curve_and_the_baselines(store, run):
    report = evaluate(run, store)
    assert list(report.systems) == [
        "linear, smoothed",
        "linear",
        "linear, smoothing of the other half",
        "baseline linear, smoothed",
        "baseline linear",
        "baseline constant",
    ]
    assert {key: report.figures[key] for key in run.about["figures"]} == run.about["figures"]
    assert report.figures["videos"] == 4
    clips = load_clips(store, run.about, "validation")
    assert report.systems["linear"].mean == figures(predict(run, clips, smooth=False), clips)["mean"]
    assert report.systems["baseline linear"].mean > 0.9
    raw_first = evaluate(run, store, smooth=False)
    assert next(iter(raw_first.systems)) == "linear"
    assert raw_first.figures["mean"] == report.systems["linear"].mean


def test_the_report_is_told_and_is_json(store, run):
    report = evaluate(run, store)
    told = report.lines()
    assert told[0].startswith("linear     validation CCC  V ")
    assert f"(4 videos, {report.figures['frames']} labelled frames; {run.path})" in told[0]
    assert all(sum(line.startswith(name) for line in told) for name in report.systems)
    assert max(map(len, told[1:])) <= 140
    tree = json.loads(json.dumps(report.as_json(), allow_nan=False))
    assert tree["figures"] == report.figures
    assert tree["systems"]["baseline constant"]["mean"] == 0
    assert evaluate(run, store).as_json() == report.as_json()


def test_where_the_training_features_are_gone_there_are_no_baselines_and_a_note(store, run, tmp_path):
    shutil.copytree(store.path, tmp_path / "s.zarr")
    copy = Store(tmp_path / "s.zarr")
    copy.drop(copy.entry_of(recipe("mae"), run.about["train"]["v01"]["mae"]))
    report = evaluate(run, copy)
    assert not [name for name in report.systems if name.startswith("baseline")]
    assert any("no baselines" in note and "lacks mae of v01" in note for note in report.notes)
    copy.drop(copy.entry_of(recipe("logmel"), run.about["validation"]["v05"]["logmel"]))
    with pytest.raises(VacliError, match=r"lacks logmel of v05.*vacli extract"):
        evaluate(run, copy)


def test_clips_come_one_by_one_as_they_come_together(store, run):
    together = load_clips(store, run.about, "train")
    for one, other in zip(clips_of(store, run.about, "train"), together, strict=True):
        assert one.id == other.id
        np.testing.assert_array_equal(one.labels, other.labels)
        for name in other.streams:
            np.testing.assert_array_equal(one.streams[name], other.streams[name])


def test_a_run_on_patches_of_log_mel_is_judged_beside_a_ridge_on_its_rows(tmp_path):
    store = Store(tmp_path / "s.zarr", create=True)
    for number in range(3):
        split = "validation" if number == 2 else "train"
        add_video(store, number, split, instead={"logmel": real_logmel(number)})
    patched = {"encode.logmel.vgg": "{width = 0.02}"}
    run = train(store, tiny("linear", also=patched, epochs=1), runs=tmp_path, tell=lambda _: None)
    assert run.patched == {"logmel"}
    (clip,) = load_clips(store, run.about, "validation")
    assert (set(clip.streams), set(clip.tracks)) == ({"mae"}, {"logmel"})
    report = evaluate(run, store)
    assert report.figures["videos"] == 1
    assert report.systems["baseline linear"].valence > 0.5
    assert len(predict(run, [clip])[clip.id]) == ROWS


def test_a_face_is_where_the_face_stream_saw_something_also_where_sound_comes_first(store, tmp_path):
    run = train(store, tiny("linear", ["logmel", "mae"], epochs=1), runs=tmp_path, tell=lambda _: None)
    streams = {name: dict(stream) for name, stream in run.about["streams"].items()}
    assert list(streams) == ["logmel", "mae"]
    clips = load_clips(store, run.about, "validation")
    assert [sum(faces_of(c, "mae")) for c in clips] != [ROWS] * 4
    rated = {**streams, "logmel": {**streams["logmel"], "recipe": {"track": "logmel", "rate_hz": 16000}}}
    assert Run(run.path, {**run.about, "streams": rated}).face_stream == "mae"
    report = judge({"a": predict(run, clips)}, clips, "mae")
    missing = sum(
        int((~faces_of(c, "mae") & np.isfinite(c.labels).all(axis=1)).sum())
        for c in clips
        if c.labels is not None
    )
    assert report.face["missing"]["frames"] == missing > 0


@pytest.mark.needs_cuda
def test_the_ridge_on_a_gpu_equals_the_one_on_the_cpu():
    training, judged = seen_now_and_then(0), seen_now_and_then(1, videos=1)
    here, there = (baselines.fit(training, device).linear(judged)[1e-2]["v0"] for device in ("cpu", "cuda"))
    np.testing.assert_allclose(here.values, there.values, atol=1e-4)
