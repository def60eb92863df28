"""Live prediction: every head is either equal to its offline twin, row by row, or refused before anything is opened."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from vacli import VacliError
from vacli.store import Track
from vacli.temporal.blocks import BLOCKS
from vacli.temporal.folds import Folds
from vacli.temporal.live import Hold, LiveHead, follow, why_not_live
from vacli.temporal.live_blocks import TWINS, twins
from vacli.temporal.model import Network
from vacli.temporal.predict import Run, predict
from vacli.temporal.preset import Preset, load_preset, preset_names
from vacli.temporal.windows import Clip

from .test_blocks import CAUSAL, make
from .test_model import DIMS, SMALL

CLOSE = {"rtol": 0.0, "atol": 1e-5}  # the promise is 1e-4
# every block that goes live, in one small head
EVERY_BLOCK = {
    "encode.*.blocks": "[{linear = {dim = 8}}, {multi_tcn = {kernels = [2, 3], channels = [6, 8], dim = 8}}]",
    "decode": "[{tcn = {channels = [8, 6], width = 3, dropout = 0.1}}, {norm = {}}, {linear = {dim = 8}},"
    " {mamba = {layers = 2, state = 4, conv = 4, expand = 2}}, {gru = {dim = 8, layers = 2}},"
    " {mamba2 = {layers = 1, state = 4, conv = 3, expand = 1, heads_dim = 4}}]",
    "windows.length": "100000",
}
REMEMBERS = {  # whatever could drift or grow, and little beside it
    "decode": "[{tcn = {channels = [8], width = 3, dropout = 0.1}},"
    " {mamba = {layers = 1, state = 4, conv = 4, expand = 2}}, {gru = {dim = 8}},"
    " {mamba2 = {layers = 1, state = 4, conv = 3, expand = 1, heads_dim = 4}}]",
    "encode.*.blocks": "[{linear = {dim = 8}}]",
}
VGG = {"encode.logmel.vgg": "{ width = 0.01, window = 'causal' }"}


def trained(preset: Preset, path: Path, seed: int = 0, **about: Any) -> Run:
    """A run as if trained: random weights, nothing left at zero."""
    torch.manual_seed(seed)
    net = Network(preset, {name: DIMS[name] for name in preset.streams})
    for absent in net.absent:
        torch.nn.init.normal_(absent)
    for encoder in net.encode:
        for moment in (getattr(encoder, "mean", None), getattr(encoder, "deviation", None)):
            if moment is not None:
                torch.nn.init.uniform_(moment, 0.5, 1.5)
    path.mkdir(exist_ok=True)
    save_file(net.state_dict(), path / "weights.safetensors")
    streams = {name: {"dim": DIMS[name], "recipe": {"track": name}} for name in preset.streams}
    return Run(path, {"preset": preset.model_dump(), "streams": streams, "label": {}, "figures": {}, **about})


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    """One that has every block."""
    return trained(load_preset("mamba", EVERY_BLOCK), tmp_path_factory.mktemp("runs") / "every")


@pytest.fixture(scope="module")
def head(run) -> LiveHead:
    return LiveHead(run)


def video(run: Run, rows: int, seen: float = 0.7, seed: int = 0) -> dict[str, np.ndarray]:
    """stream -> (T, D) float32, rows of NaN where nothing is seen."""
    rng = np.random.default_rng(seed)
    values = {name: rng.standard_normal((rows, dim)).astype(np.float32) for name, dim in run.dims.items()}
    return {name: np.where(rng.random((rows, 1)) < seen, x, np.float32(np.nan)) for name, x in values.items()}


def rows_of(streams: dict[str, np.ndarray]) -> Iterator[dict[str, np.ndarray | None]]:
    for t in range(len(next(iter(streams.values())))):
        yield {name: None if np.isnan(x[t, 0]) else x[t] for name, x in streams.items()}


def live(head: LiveHead, streams: dict[str, np.ndarray]) -> np.ndarray:
    head.reset()
    return np.stack([head.step(rows) for rows in rows_of(streams)])


@torch.inference_mode()
def offline(run: Run, streams: dict[str, np.ndarray]) -> np.ndarray:
    """The network over the whole video as one line; rows as the store keeps them."""
    rows = {name: torch.from_numpy(x.astype(np.float16)).float()[None] for name, x in streams.items()}
    seen = {name: ~x[..., 0].isnan() for name, x in rows.items()}
    found = run.network()({name: x.nan_to_num() for name, x in rows.items()}, seen)["va"][0]
    return found.clamp(-1, 1).numpy()


@dataclass
class Moment:
    time_s: float
    rows: dict[str, np.ndarray | None]


def moments(streams: dict[str, np.ndarray], times_s: np.ndarray) -> Iterator[Moment]:
    return (Moment(float(t), rows) for t, rows in zip(times_s, rows_of(streams), strict=True))


# ---- blocks and presets --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "options"), [o for o in CAUSAL if BLOCKS[o[0]] in TWINS])
@pytest.mark.parametrize("hidden", [0.0, 0.4, 1.0])
@torch.inference_mode()
def test_a_block_gives_a_row_what_it_gives_it_in_a_line(name, options, hidden):
    """Masked rows too: what comes behind a block may see them."""
    block = make(name, options).eval()
    g = torch.Generator().manual_seed(1)
    x = torch.randn(1, 40, 6, generator=g, dtype=torch.float64)
    mask = torch.rand(1, 40, generator=g) >= hidden
    (twin,) = twins([block])
    found = [twin(row, bool(seen)).clone() for row, seen in zip(x[0], mask[0], strict=True)]
    wanted = block(x, mask)[0]
    if name == "gru" and hidden == 1:  # of a video without a single row the block makes anything
        wanted = torch.zeros_like(wanted)
    torch.testing.assert_close(torch.stack(found), wanted, rtol=0, atol=1e-12)
    for state in twin.states:
        state.zero_()
    again = [twin(row, bool(seen)).clone() for row, seen in zip(x[0], mask[0], strict=True)]
    torch.testing.assert_close(torch.stack(again), torch.stack(found), rtol=0, atol=1e-12)


@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("name", preset_names())
def test_every_preset_is_its_offline_twin_or_refused_with_a_reason(name, flipped, tmp_path):
    """As it comes, and with its `causal` the other way round."""
    causal = str(load_preset(name).causal != flipped).lower()
    preset = load_preset(name, SMALL.get(name, {}) | {"causal": causal})
    run = trained(preset, tmp_path)
    why = why_not_live(preset)
    if why is not None:
        assert "--head mamba" in why or "--set" in why
        with pytest.raises(VacliError, match="cannot predict live") as refused:
            LiveHead(run)
        assert why in str(refused.value)
        return
    head, streams = LiveHead(run), video(run, 140)  # the longest TCN sees 121
    for x in streams.values():
        x[:7] = np.nan
    np.testing.assert_allclose(live(head, streams), offline(run, streams), **CLOSE)
    whole = video(run, 40, seen=1.0)
    np.testing.assert_allclose(live(head, whole), offline(run, whole), **CLOSE)
    for missing in whole if len(whole) > 1 else ():
        deaf = whole | {missing: np.full_like(whole[missing], np.nan)}
        np.testing.assert_allclose(live(head, deaf), offline(run, deaf), **CLOSE)


def test_the_heads_that_go_live_are_those_said_to_be_causal():
    assert {name for name in preset_names() if why_not_live(load_preset(name)) is None} == {
        "gru", "linear", "mamba", "mamba-va", "mamba2", "tcn",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("mamba", {"causal": "false"}, r"decode\.0, a tcn, looks at later rows.*--set causal=true$"),
        ("gru", {"decode.0.gru.causal": "false"}, r"decode\.0, a gru.*--set decode\.0\.gru\.causal=true$"),
        ("mamba", EVERY_BLOCK | {"encode.*.blocks.1.multi_tcn.causal": "false"}, r"encode\.\*\.blocks\.1, a mul"),
        ("transformer", {"causal": "true"}, r"decode\.0, a transformer.*grow with every row.*--head mamba"),
        ("crossattn-light", {}, r'fuse = "cross_attn".*--head mamba'),
        ("linear", VGG, r"encode\.logmel\.vgg reads patches"),
    ],
)  # fmt: skip
def test_what_looks_ahead_is_named_with_its_mend_before_anything_is_opened(name, changes, says, tmp_path):
    preset = load_preset(name, changes)
    about = {"preset": preset.model_dump(), "streams": {n: {"dim": DIMS[n]} for n in preset.streams}}
    with pytest.raises(VacliError, match=says) as refused:
        LiveHead(Run(tmp_path / "no such folder", about))
    key, sign, value = str(refused.value).partition("train it with --set ")[2].partition("=")
    if sign:
        assert why_not_live(load_preset(name, changes | {key: value})) is None


def test_a_stream_that_asks_nobody_goes_live(tmp_path):
    run = trained(load_preset("crossattn-light", streams=["mae"]), tmp_path)
    streams = video(run, 50)
    np.testing.assert_allclose(live(LiveHead(run), streams), offline(run, streams), **CLOSE)


# ---- rows ----------------------------------------------------------------------------------------------------


@settings(max_examples=15)
@given(st.lists(st.sampled_from([(), ("mae",), ("logmel",), ("mae", "logmel")]), min_size=1, max_size=30))
def test_whatever_is_missing_live_is_offline(run, head, seen):
    streams = video(run, len(seen), seen=1.0)
    for name, x in streams.items():
        x[[name not in names for names in seen]] = np.nan
    if any(seen):
        np.testing.assert_allclose(live(head, streams), offline(run, streams), **CLOSE)
    assert np.isfinite(live(head, streams)).all()


def test_a_stream_left_out_none_and_nan_are_the_same(run, head):
    rows, other = video(run, 40, seen=1.0), {}
    for name in ("left out", "none", "nan"):
        head.reset()
        gone: dict[str, Any] = {"none": {"logmel": None}, "nan": {"logmel": np.full(64, np.nan)}}.get(
            name, {}
        )
        other[name] = np.stack([head.step({"mae": row} | gone) for row in rows["mae"]])
    np.testing.assert_array_equal(other["none"], other["left out"])
    np.testing.assert_array_equal(other["nan"], other["left out"])
    assert not np.allclose(other["none"], live(head, rows), **CLOSE)


def test_in_10_000_rows_nothing_drifts_nothing_grows_and_nothing_given_out_changes(tmp_path):
    run = trained(load_preset("mamba", REMEMBERS, ["mae"]), tmp_path)
    head, streams = LiveHead(run), video(run, 10_000)
    rows = list(rows_of(streams))
    given_out = [head.step(r) for r in rows[:100]]
    as_given, size = np.stack(given_out), len(pickle.dumps(head))
    given_out += [head.step(r) for r in rows[100:]]
    assert len(pickle.dumps(head)) == size
    np.testing.assert_array_equal(np.stack(given_out[:100]), as_given)
    np.testing.assert_allclose(np.stack(given_out), offline(run, streams), **CLOSE)


def test_after_a_reset_a_head_is_as_new(run, head):
    streams = video(run, 50)
    first = live(head, streams)
    live(head, video(run, 33, seed=1))
    np.testing.assert_array_equal(live(head, streams), first)


def test_values_stay_in_bounds(tmp_path):
    run = trained(load_preset("linear"), tmp_path)
    values = live(LiveHead(run), {name: 100 * x for name, x in video(run, 50).items()})
    assert np.abs(values).max() == 1
    assert values.dtype == np.float32


@pytest.mark.parametrize(
    ("rows", "error", "says"),
    [
        ({"iresnet": np.zeros(5)}, ValueError, "row of iresnet; wanted mae, logmel"),
        ({"mae": np.zeros((1, 6))}, ValueError, r"shape \(1, 6\), wanted \(6,\)"),
        ({"mae": np.array([0, 1, np.inf, 0, 0, 0])}, ValueError, "infinite"),
        ({"mae": np.array([0, 1, np.nan, 0, 0, 0])}, ValueError, "partly NaN"),
        ({"mae": np.full(6, 1e6, np.float32)}, VacliError, r"mae has values up to 1e\+06.*float16"),
    ],
)
def test_a_row_that_is_none_changes_nothing_and_says_why(run, head, rows, error, says):
    streams = video(run, 20)
    wanted = live(head, streams)
    head.reset()
    found = []
    for given_rows in rows_of(streams):
        with pytest.raises(error, match=says):
            head.step(rows)
        found.append(head.step(given_rows))
    np.testing.assert_array_equal(np.stack(found), wanted)


def test_a_network_that_gives_no_numbers_is_one_line(tmp_path):
    run = trained(load_preset("linear"), tmp_path)
    weights = run.network().state_dict()
    weights["tasks.va.bias"].fill_(float("nan"))
    save_file(weights, run.path / "weights.safetensors")
    with pytest.raises(VacliError, match=r"not finite.*train\.lr"):
        LiveHead(run).step({})


# ---- curves --------------------------------------------------------------------------------------------------


def clip(run: Run, streams: dict[str, np.ndarray], times_s: np.ndarray) -> Clip:
    tracks = {name: Track(x.astype(np.float16), times_s) for name, x in streams.items()}
    return Clip.on_clock("clip", run.clock(times_s), tracks, run.dims)


def test_with_a_face_in_every_frame_live_is_what_predict_gives_unsmoothed(run, head):
    streams, times_s = video(run, 120), np.arange(120) / 30
    streams["mae"] = video(run, 120, seen=1.0, seed=1)["mae"]
    shown = [values for _, values, _ in follow(head, moments(streams, times_s))]
    wanted = predict(run, [clip(run, streams, times_s)], smooth=False)["clip"].values
    np.testing.assert_allclose(np.stack(shown), wanted, **CLOSE)


def test_without_a_face_the_last_value_with_one_is_held(run, head):
    streams, times_s = video(run, 60, seen=1.0), np.arange(60) / 30
    streams["mae"][:5] = streams["mae"][20:30] = np.nan
    own = offline(run, streams)
    came = list(follow(head, moments(streams, times_s)))
    assert [m.time_s for m, _, _ in came] == times_s.tolist()
    shown = np.stack([values for _, values, _ in came])
    wanted = own.copy()
    wanted[20:30] = own[19]  # and the rows before the first face have the network's own
    np.testing.assert_allclose(shown, wanted, **CLOSE)
    hold = Hold()
    seen = [(False, 1.0), (True, 2.0), (False, 3.0), (True, 4.0), (False, 5.0)]
    held = [hold(face, (np.full(2, value), None))[0][0] for face, value in seen]
    assert held == [1, 2, 2, 4, 4]


def test_folds_give_the_mean_and_how_far_they_are_apart(tmp_path):
    preset = load_preset("mamba", EVERY_BLOCK)
    runs = {k: trained(preset, tmp_path / f"fold-{k}", seed=k) for k in range(3)}
    folds = Folds(tmp_path, {"folds": [{}, {}, {}], "figures": {}}, runs)
    streams, times_s = video(runs[0], 50, seen=1.0), np.arange(50) / 30
    came = list(follow(LiveHead(folds), moments(streams, times_s)))
    mean, apart = (t["clip"].values for t in folds.predict([clip(runs[0], streams, times_s)], smooth=False))
    np.testing.assert_allclose(np.stack([values for _, values, _ in came]), mean, **CLOSE)
    np.testing.assert_allclose(np.stack([spread for *_, spread in came]), apart, **CLOSE)
    assert apart.min() > 1e-3
    with pytest.raises(VacliError, match="lacks fold 1"):
        LiveHead(Folds(tmp_path, folds.about, {0: runs[0], 2: runs[2]}))


def stretches_over(clock_s: np.ndarray, times_s: np.ndarray) -> np.ndarray:
    """How many of the clock's stretches are over at each frame."""
    middles = (clock_s[1:] + clock_s[:-1]) / 2
    return np.searchsorted([*middles, 2 * clock_s[-1] - middles[-1]], times_s, side="right")


@pytest.mark.parametrize("frame_s", [None, 1 / 30])
def test_on_a_slower_clock_a_stretch_is_shown_when_it_is_over(tmp_path, frame_s):
    run = trained(load_preset("mamba", EVERY_BLOCK), tmp_path, label={"step_s": 0.11})
    streams, times_s = video(run, 200, seen=0.9), np.arange(200) / 30
    streams["mae"][60:90] = np.nan  # nine stretches without a face
    streams["logmel"][60:90] = 0.5
    head, clock_s = LiveHead(run), run.clock(times_s)
    shown = np.stack([values for _, values, _ in follow(head, moments(streams, times_s), frame_s)])
    read = clip(run, streams, times_s)
    own = offline(run, read.streams)
    faces = np.maximum.accumulate(np.where(np.isnan(read.streams["mae"][:, 0]), 0, np.arange(len(clock_s))))
    over = stretches_over(clock_s, times_s) - 1
    late = over >= 0
    np.testing.assert_allclose(shown[late], own[faces[over[late]]], **CLOSE)
    assert np.isfinite(shown[~late]).all()
    assert (~late).sum() == 4


def test_on_a_slower_clock_a_pause_of_the_frames_is_so_many_stretches_of_nothing(tmp_path):
    run = trained(load_preset("mamba", EVERY_BLOCK), tmp_path, label={"step_s": 0.11})
    streams = video(run, 40, seen=1.0)
    times_s = np.arange(40) / 30 + np.where(np.arange(40) < 20, 0.0, 0.75)
    shown = np.stack([values for _, values, _ in follow(LiveHead(run), moments(streams, times_s))])
    read = clip(run, streams, times_s)
    own = offline(run, read.streams)
    assert 5 <= np.isnan(read.streams["mae"][:, 0]).sum() <= 7
    np.testing.assert_allclose(shown[-1], own[stretches_over(read.times_s, times_s)[-1] - 1], **CLOSE)


def test_frames_about_as_far_apart_as_the_labels_are_taken_as_they_are(run, tmp_path):
    slower = trained(run.preset, tmp_path, label={"step_s": 1 / 25})
    streams, times_s = video(slower, 40, seen=1.0), np.arange(40) / 30
    shown = np.stack([values for _, values, _ in follow(LiveHead(slower), moments(streams, times_s))])
    np.testing.assert_allclose(shown, offline(slower, streams), **CLOSE)


def test_nothing_and_a_single_frame_come_through(head, run):
    assert list(follow(head, [])) == []
    streams = video(run, 1, seen=1.0)
    ((_, values, spread),) = follow(head, moments(streams, np.zeros(1)))
    np.testing.assert_allclose(values, offline(run, streams)[0], **CLOSE)
    assert spread is None
