"""Windows: fold undoes them, no row is lost, none crosses two clips, what was not seen is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vacli import VacliError
from vacli.store import Track
from vacli.temporal.windows import Clip, Windows

lengths = st.lists(st.integers(1, 40), min_size=1, max_size=5)


def clip(number: int, rows: int, dim: int = 3) -> Clip:
    """Values say clip and row; every fifth row saw nothing, every third is unlabelled."""
    values = np.empty((rows, dim), np.float16)
    values[:, 0], values[:, 1], values[:, 2:] = number, np.arange(rows), 1
    values[::5] = np.nan
    labels = np.tile(np.linspace(-1, 1, rows, dtype=np.float32)[:, None], (1, 2))
    labels[::3] = np.nan
    return Clip(f"clip{number}", np.arange(rows) / 10, {"a": values}, labels)


@given(lengths, st.integers(1, 50), st.integers(1, 50))
def test_fold_undoes_windows(rows, length, stride):
    clips = [clip(i, n) for i, n in enumerate(rows)]
    windows = Windows(clips, length, stride)
    labels, _ = windows.targets(torch.arange(len(windows)))
    folded = windows.fold(labels)
    covered = stride <= windows.length
    for c in clips:
        assert len(folded[c.id]) == len(c.times_s)
        np.testing.assert_array_equal(folded[c.id].times_s, c.times_s)
        if covered:
            np.testing.assert_allclose(folded[c.id].values, np.nan_to_num(c.labels), atol=1e-6)


@given(lengths, st.integers(1, 50), st.integers(1, 50))
def test_no_window_crosses_two_clips_and_the_tail_is_kept(rows, length, stride):
    windows = Windows([clip(i, n) for i, n in enumerate(rows)], length, min(stride, length))
    streams, seen = windows.batch(torch.arange(len(windows)))
    last = np.zeros(len(rows))
    for values, mask in zip(streams["a"], seen["a"], strict=True):
        numbers = values[mask][:, 0].unique()
        assert len(numbers) <= 1
        if len(numbers):
            last[int(numbers[0])] = max(last[int(numbers[0])], float(values[mask][:, 1].max()))
    for number, n in enumerate(rows):
        rows_seen = [r for r in range(n) if r % 5]
        if rows_seen:
            assert last[number] == rows_seen[-1]


def test_what_was_not_seen_is_zero_and_masked():
    windows = Windows([clip(0, 20)], 20, 20)
    streams, seen = windows.batch(torch.tensor([0]))
    assert seen["a"][0].tolist() == [bool(i % 5) for i in range(20)]
    assert (streams["a"][0][::5] == 0).all()
    _, labelled = windows.targets(torch.tensor([0]))
    assert labelled[0].tolist() == [bool(i % 3) for i in range(20)]


def test_a_short_clip_is_padded_with_rows_that_count_nowhere():
    windows = Windows([clip(0, 4), clip(1, 30)], 25, 25)
    _, seen = windows.batch(torch.tensor([0]))
    _, labelled = windows.targets(torch.tensor([0]))
    assert not seen["a"][0][4:].any()
    assert not labelled[0][4:].any()


def test_moments_are_those_of_the_rows_seen():
    clips = [clip(0, 30), clip(1, 17)]
    seen = np.concatenate([c.streams["a"] for c in clips]).astype(np.float64)
    seen = seen[~np.isnan(seen[:, 0])]
    mean, deviation = Windows(clips, 10, 10).moments()["a"]
    np.testing.assert_allclose(mean, seen.mean(0), atol=1e-5)
    np.testing.assert_allclose(deviation[:2], seen.std(0)[:2], atol=1e-5)


def test_a_clip_reads_tracks_of_other_clocks_and_knows_missing_streams():
    times_s = np.arange(50) / 25
    sound = Track(np.ones((200, 4), np.float16), np.arange(200) / 100)
    label = Track(np.full((2, 2), 0.5, np.float32), np.array([0.5, 1.5]))
    made = Clip.on_clock("v", times_s, {"logmel": sound}, {"mae": 8, "logmel": 4}, label)
    assert made.streams["logmel"].shape == (50, 4)
    assert np.isnan(made.streams["mae"]).all()
    assert made.labels is not None
    assert len(made.labels) == 50


def test_a_stream_of_another_dimension_is_refused():
    with pytest.raises(VacliError, match=r"wanted \(8,\)"):
        Clip.on_clock("v", np.zeros(1), {"mae": Track(np.zeros((1, 4), np.float16), np.zeros(1))}, {"mae": 8})
