"""Windows: fold undoes them, no row is lost, none crosses two clips, rows from the disk are those from memory."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vacli import VacliError
from vacli.store import Store, Track
from vacli.temporal.preset import WindowSpec
from vacli.temporal.vgg import LogMelRows
from vacli.temporal.windows import Batch, Clip, Windows

lengths = st.lists(st.integers(1, 40), min_size=1, max_size=5)
batches = st.integers(1, 6)


some = settings(max_examples=30)


@st.composite
def specs(draw, whole: bool | None = None) -> WindowSpec:
    length = draw(st.integers(1, 50))
    stride = draw(st.integers(1, length))
    return WindowSpec(length=length, stride=stride, whole=draw(st.booleans()) if whole is None else whole)


def clip(number: int, rows: int) -> Clip:
    """Values say clip and row; every fifth row saw nothing, every third is unlabelled; `c` was never made."""
    values = np.ones((rows, 3), np.float16)
    values[:, 0], values[:, 1] = number, np.arange(rows)
    values[::5] = np.nan
    labels = np.tile(np.linspace(-1, 1, rows, dtype=np.float32)[:, None], (1, 2))
    labels[::3] = np.nan
    times_s = np.arange(rows) / 10
    sound = Track(np.full((10 * rows, 64), number, np.float16), np.arange(10 * rows) * 0.01 + 0.0125)
    tracks = {
        "a": Track(values, times_s),
        "b": Track(values.astype(np.float32) / 3, times_s),
        "logmel": sound,
    }
    dims = {"a": 3, "b": 3, "c": 2, "logmel": 64}
    return Clip.on_clock(f"clip{number}", times_s, tracks, dims, Track(labels, times_s), {"logmel"})


def clips_of(rows: list[int]) -> list[Clip]:
    return [clip(number, n) for number, n in enumerate(rows)]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tensors(batch: Batch) -> dict[str, torch.Tensor | None]:
    of_streams = {f"{name} values": x for name, x in batch.streams.items()}
    of_streams |= {f"{name} seen": x for name, x in batch.seen.items()}
    return {**of_streams, **{name: getattr(batch, name) for name in ("rows", "start", "labels", "labelled")}}


def assert_same_passes(one: Windows, other: Windows, seed: int | None = None) -> None:
    passes = [w.batches(None if seed is None else seeded(seed)) for w in (one, other)]
    for mine, yours in zip(*passes, strict=True):
        mine, yours = tensors(mine), tensors(yours)
        assert mine.keys() == yours.keys()
        for name, x in mine.items():
            y = yours[name]
            assert (x is y is None) or (x.dtype == y.dtype and torch.equal(x.cpu(), y.cpu())), name


# ---- which rows ----------------------------------------------------------------------------------------------


@some
@given(lengths, specs(), batches, st.none() | st.integers(0, 9))
def test_fold_undoes_windows(rows, spec, batch, seed):
    clips = clips_of(rows)
    windows = Windows(clips, spec, batch)
    passed = windows.batches(None if seed is None else seeded(seed))
    folded = windows.fold((b, b.labels) for b in passed)
    assert list(folded) == [c.id for c in clips]
    for c in clips:
        np.testing.assert_array_equal(folded[c.id].times_s, c.times_s)
        np.testing.assert_allclose(folded[c.id].values, np.nan_to_num(c.labels), atol=1e-6)


def test_a_row_of_two_windows_is_their_mean_and_one_of_none_is_missing():
    windows = Windows([clip(0, 6)], WindowSpec(length=4, stride=2), 1)
    (first, second) = windows.batches()
    both = windows.fold((b, torch.full((1, 4, 2), float(i))) for i, b in enumerate((first, second)))["clip0"]
    assert both.values[:, 1].tolist() == [0, 0, 0.5, 0.5, 1, 1]
    one = windows.fold([(first, torch.zeros(1, 4, 2))])["clip0"]
    assert one.valid.tolist() == [True] * 4 + [False] * 2


@some
@given(lengths, specs(whole=False), batches)
def test_no_window_crosses_two_clips_and_the_tail_is_kept(rows, spec, batch):
    windows = Windows(clips_of(rows), spec, batch)
    found: set[tuple[int, int]] = set()
    for b in windows.batches():
        assert b.start is None
        assert b.rows.shape[1] == windows.length == min(spec.length, max(rows))
        for values, seen in zip(b.streams["a"], b.seen["a"], strict=True):
            assert len(values[seen][:, 0].unique()) <= 1
            found |= {(int(number), int(row)) for number, row, _ in values[seen].tolist()}
    assert found == {(number, row) for number, n in enumerate(rows) for row in range(n) if row % 5}


@some
@given(lengths, specs(whole=True), batches, st.none() | st.integers(0, 9))
def test_whole_videos_are_packed_with_every_row_once_and_their_borders_marked(rows, spec, batch, seed):
    windows = Windows(clips_of(rows), spec, batch)
    shown, order = [], []
    for b in windows.batches(None if seed is None else seeded(seed)):
        assert b.rows.shape[0] == 1
        assert b.start[0, 0]
        videos = b.start[0].cumsum(0)
        for video in videos.unique():
            here = b.rows[0][videos == video]
            number = int(np.searchsorted(np.cumsum(rows), int(here[0]), side="right"))
            assert (here - here[0]).tolist() == list(range(rows[number]))
            order.append(number)
        assert len(videos) <= batch * windows.length or videos.max() == 1
        shown += b.rows[0].tolist()
    assert sorted(shown) == list(range(sum(rows)))
    assert sorted(order) == list(range(len(rows)))
    if seed is None:
        assert order == sorted(order)


def test_whole_videos_are_shuffled_before_they_are_packed():
    windows = Windows(clips_of([10] * 12), WindowSpec(length=10, stride=10, whole=True), 3)
    packs = [{frozenset(b.rows[0].tolist()) for b in windows.batches(seeded(seed))} for seed in range(2)]
    assert packs[0] != packs[1]
    assert windows.steps == len(windows) == len(packs[0]) == 4


@some
@given(lengths, specs(whole=False), batches, st.integers(0, 99))
def test_a_shuffled_pass_shows_every_window_once_in_an_order_of_the_generator_alone(rows, spec, batch, seed):
    windows = Windows(clips_of(rows), spec, batch)
    torch.manual_seed(seed)
    first = [b.rows for b in windows.batches(seeded(seed))]
    torch.manual_seed(seed + 1)
    assert len(first) == windows.steps
    assert sum(map(len, first)) == len(windows)
    assert torch.equal(torch.cat(first), torch.cat([b.rows for b in windows.batches(seeded(seed))]))
    inorder = torch.cat([b.rows for b in windows.batches()])
    assert (inorder[:, 0].diff() > 0).all()
    assert torch.equal(torch.cat(first).sort(0).values, inorder)


def test_what_a_generator_gives_is_drawn_when_the_pass_is_asked_for():
    windows = Windows([clip(0, 40)], WindowSpec(length=2, stride=2), 4)
    generator = seeded()
    first, second = windows.batches(generator), windows.batches(generator)
    late = torch.cat([b.rows for b in second])
    generator = seeded()
    assert torch.equal(
        torch.cat([b.rows for b in first]), torch.cat([b.rows for b in windows.batches(generator)])
    )
    assert torch.equal(late, torch.cat([b.rows for b in windows.batches(generator)]))


# ---- what is in them -----------------------------------------------------------------------------------------


def test_what_was_not_seen_is_zero_and_masked():
    (b,) = Windows([clip(0, 20)], WindowSpec(length=20, stride=20), 1).batches()
    assert b.seen["a"][0].tolist() == [bool(i % 5) for i in range(20)]
    assert (b.streams["a"][0][::5] == 0).all()
    assert b.streams["a"].dtype == b.labels.dtype == torch.float32
    assert b.labelled[0].tolist() == [bool(i % 3) for i in range(20)]
    assert not b.seen["c"].any()
    assert (b.streams["c"] == 0).all()


@pytest.mark.parametrize("resident", [True, False])
def test_a_short_clip_is_padded_with_rows_that_count_nowhere(resident):
    windows = Windows(
        [clip(0, 4), clip(1, 30)], WindowSpec(length=25, stride=25), 1, "cpu", {"logmel": "centred"}, resident
    )
    b = next(windows.batches())
    assert b.seen["a"][0, 1:4].all()
    assert b.seen["logmel"][0, :4].all()
    assert not any(seen[0, 4:].any() for seen in b.seen.values())
    assert not b.labelled[0, 4:].any()
    assert (b.streams["a"][0, 4:] == 0).all()


def test_a_label_counts_only_where_both_values_are_valid():
    labels = np.array([[0, 1], [np.nan, 1], [0.5, np.nan], [-5, 0], [0, -5], [-1, 0]], np.float32)
    values = {"a": np.ones((6, 1), np.float16)}
    clips = [Clip("a", np.arange(6.0), values, labels), Clip("b", np.arange(6.0), values)]
    windows = Windows(clips, WindowSpec(length=6, stride=6), 2)
    (b,) = windows.batches()
    assert windows.labelled
    assert b.labelled.tolist() == [[True, False, False, False, False, True], [False] * 6]
    assert b.labels[0].tolist() == [[0, 1], [0, 0], [0, 0], [0, 0], [0, 0], [-1, 0]]


def test_windows_know_whether_any_row_is_labelled():
    spec, values = WindowSpec(length=6, stride=6), {"a": np.ones((6, 1), np.float16)}
    none = Windows([Clip("a", np.arange(6.0), values)], spec, 2)
    assert not none.labelled
    assert next(none.batches()).labels is None
    labels = np.full((6, 2), np.nan, np.float32)
    assert not Windows([Clip("a", np.arange(6.0), values, labels)], spec, 2).labelled


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("whole", [True, False])
def test_moments_are_those_of_the_rows_seen(resident, whole, monkeypatch):
    monkeypatch.setattr("vacli.temporal.windows._PIECE_ROWS", 7)
    clips = clips_of([30, 17])
    moments = Windows(clips, WindowSpec(length=20, stride=9, whole=whole), 2, resident=resident).moments()
    for name in ("a", "b"):
        seen = np.concatenate([c.streams[name] for c in clips]).astype(np.float64)
        seen = seen[~np.isnan(seen[:, 0])]
        mean, deviation = moments[name]
        np.testing.assert_allclose(
            mean, seen.mean(0), rtol=1e-3 if name == "b" else 1e-6
        )  # b becomes float16
        np.testing.assert_allclose(deviation[:2], seen.std(0)[:2], rtol=1e-3 if name == "b" else 1e-6)
        assert deviation[2] == 1  # it never moves
    assert moments["c"][0].tolist() == [0, 0]  # nothing was seen
    assert moments["c"][1].tolist() == [1, 1]


@pytest.mark.parametrize("whole", [True, False])
def test_clips_without_a_row_are_harmless(whole):
    none = Clip("none", np.empty(0), {"a": np.empty((0, 3), np.float16)}, np.empty((0, 2), np.float32))
    for clips in ([none], [none, Clip("some", np.arange(4.0), {"a": np.ones((4, 3), np.float16)})]):
        windows = Windows(clips, WindowSpec(length=3, stride=3, whole=whole), 2)
        assert not windows.labelled
        assert windows.moments()["a"][0].isfinite().all()
        folded = windows.fold((b, b.labels) for b in windows.batches())
        assert [len(track) for track in folded.values()] == [len(c.times_s) for c in clips]


# ---- rows that do not fit ------------------------------------------------------------------------------------


@some
@given(lengths, specs(), batches, st.none() | st.integers(0, 9))
def test_rows_elsewhere_give_the_batches_of_rows_resident(rows, spec, batch, seed):
    one, other = (
        Windows(clips_of(rows), spec, batch, "cpu", {"logmel": "causal"}, resident)
        for resident in (True, False)
    )
    assert (one.resident, one.steps) == (True, other.steps)
    assert_same_passes(one, other, seed)
    for name, moments in one.moments().items():
        assert all(map(torch.equal, moments, other.moments()[name]))


def test_a_batch_stays_as_it_was_while_the_next_ones_are_read():
    windows = Windows(clips_of([40]), WindowSpec(length=4, stride=4), 2, resident=False)
    kept = list(windows.batches())
    for b, again in zip(kept, windows.batches(), strict=True):
        assert torch.equal(b.streams["a"], again.streams["a"])
        assert torch.equal(b.seen["a"], again.seen["a"])


@pytest.mark.parametrize("resident", [True, False])
def test_rows_mapped_from_a_store_are_not_copied_before_the_gather(tmp_path, resident):
    store, clips, wanted = Store(tmp_path / "s.zarr", create=True), [], clips_of([30, 12])
    for number, c in enumerate(wanted):
        media = f"{number:02}" * 32
        store.put({"track": "a"}, media, Track(c.streams["a"], c.times_s))
        mapped = store.map({"track": "a"}, media)
        clips.append(Clip.on_clock(c.id, mapped.times_s, {"a": mapped}, {"a": 3}))
        assert np.shares_memory(clips[-1].streams["a"], mapped.values)
    spec = WindowSpec(length=9, stride=5)
    plain = [Clip(c.id, c.times_s, {"a": c.streams["a"]}) for c in wanted]
    assert_same_passes(Windows(clips, spec, 2, resident=resident), Windows(plain, spec, 2), seed=1)


def threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("vacli-rows")]


def test_the_thread_ends_with_the_pass_however_it_ends():
    windows = Windows(clips_of([40]), WindowSpec(length=4, stride=4), 2, resident=False)
    running = windows.batches()
    next(running)
    assert threads()
    running.close()
    assert not threads()

    def fail() -> None:
        for _ in windows.batches():
            raise RuntimeError("the device is on fire")

    with pytest.raises(RuntimeError, match="on fire"):
        fail()
    list(windows.batches())
    assert not threads()


@pytest.mark.parametrize("resident", [True, False])
def test_values_beyond_float16_are_refused_also_from_the_thread(resident):
    values = np.ones((8, 2), np.float32)
    values[1] = np.nan  # is no such value
    values[6] = 1e5
    with pytest.raises(VacliError, match=r"stream a has values up to 1e\+05; wanted"):
        list(
            Windows(
                [Clip("a", np.arange(8.0), {"a": values})],
                WindowSpec(length=2, stride=2),
                1,
                resident=resident,
            ).batches()
        )
    assert not threads()


def test_rows_live_on_the_device_only_where_they_fit():
    spec = WindowSpec(length=2, stride=2)
    assert Windows([clip(0, 10)], spec, 1).resident
    endless = np.broadcast_to(np.float16(1), (10, 10**13))  # takes no memory
    assert not Windows([Clip("a", np.arange(10.0), {"a": endless})], spec, 1).resident


# ---- log-mel patches -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", ["centred", "look-ahead", "causal"])
@pytest.mark.parametrize("whole", [True, False])
def test_a_patched_stream_is_the_patch_of_each_row_of_its_own_clip(window, whole):
    clips = clips_of([30, 7])
    del clips[0].tracks["logmel"]
    windows = Windows(clips, WindowSpec(length=10, stride=10, whole=whole), 2, "cpu", {"logmel": window})
    sound = LogMelRows([c.tracks.get("logmel") for c in clips])
    starts = torch.cat([sound.starts(i, c.times_s, window) for i, c in enumerate(clips)])
    room = 37 if whole else 40  # a clip of 7 rows takes 10
    found, heard = torch.zeros(room, 96, 64), torch.zeros(room, dtype=torch.bool)
    for b in windows.batches(seeded()):
        found[b.rows.flatten()] = b.streams["logmel"].flatten(0, 1)
        heard[b.rows.flatten()] = b.seen["logmel"].flatten()
    patches, hears = sound.patches(starts)
    assert torch.equal(found[:37], patches)
    assert torch.equal(heard[:37], hears)
    assert not heard[:30].any()
    assert heard[31:37].all()
    assert not heard[37:].any()


def test_a_stream_of_another_kind_is_no_log_mel():
    track = Track(np.zeros((5, 64), np.float16), np.arange(5.0))
    made = Clip.on_clock("v", np.arange(5.0), {"x": track}, {"x": 64}, patched={"x"})
    with pytest.raises(VacliError, match="every 10 ms"):
        Windows([made], WindowSpec(length=2, stride=2), 1, "cpu", {"x": "centred"})


def test_a_patched_stream_must_come_as_its_track():
    with pytest.raises(ValueError, match="as their tracks"):
        Windows([clip(0, 5)], WindowSpec(length=2, stride=2), 1, "cpu", {"a": "centred"})


# ---- clips ---------------------------------------------------------------------------------------------------


def test_a_clip_reads_tracks_of_other_clocks_and_knows_missing_streams():
    times_s = np.arange(50) / 25
    sound = Track(np.ones((200, 4), np.float16), np.arange(200) / 100)
    label = Track(np.full((2, 2), 0.5, np.float32), np.array([0.5, 1.5]))
    made = Clip.on_clock("v", times_s, {"logmel": sound}, {"mae": 8, "logmel": 4}, label)
    assert made.streams["logmel"].shape == (50, 4)
    assert np.isnan(made.streams["mae"]).all()
    assert made.labels is not None
    assert len(made.labels) == 50


@pytest.mark.parametrize("patched", [(), ("mae",)])
def test_a_stream_of_another_dimension_is_refused(patched):
    track = Track(np.zeros((1, 4), np.float16), np.zeros(1))
    with pytest.raises(VacliError, match=r"wanted \(8,\)"):
        Clip.on_clock("v", np.zeros(1), {"mae": track}, {"mae": 8}, patched=patched)


@pytest.mark.needs_cuda
@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("whole", [True, False])
def test_a_gpu_sees_what_the_cpu_sees(resident, whole):
    clips = clips_of([40, 23, 4, 31])
    spec = WindowSpec(length=9, stride=5, whole=whole)
    there, here = (
        Windows(clips, spec, 3, device, {"logmel": "centred"}, resident) for device in ("cuda", "cpu")
    )
    assert_same_passes(there, here, seed=3)
    folded, wanted = (w.fold((b, b.labels) for b in w.batches()) for w in (there, here))
    for id, track in wanted.items():
        np.testing.assert_array_equal(folded[id].values, track.values)


def test_a_stored_minus_five_is_no_label_on_any_clock():
    values = np.array([[0.1, 0.2], [-5, 0.3], [0.4, -5], [0.5, 0.6]], np.float32)
    unknown = np.where((values == -5).any(1, keepdims=True), np.float32(np.nan), values)
    times_s = np.arange(4) / 2
    for clock in (times_s, np.arange(8) / 4, np.array([0.25, 1.25])):
        made = [
            Clip.on_clock("a", clock, {}, {"x": 1}, Track(v.astype(np.float32), times_s)).labels
            for v in (values, unknown)
        ]
        np.testing.assert_array_equal(*made)
