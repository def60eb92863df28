"""A Track refuses nonsense, and its reading on another clock is what the docstring says."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from vacli.store import Track


def ramp(rows: int, rate_hz: float, dtype: type = np.float32) -> Track:
    """Values are the times themselves, so what was read tells from when."""
    times_s = np.arange(rows) / rate_hz
    return Track(times_s[:, None].astype(dtype), times_s)


@pytest.mark.parametrize(
    ("values", "times_s", "complaint"),
    [
        (np.zeros((3, 2)), np.arange(3.0), "float16 or float32"),
        (np.zeros(3, np.float32), np.arange(3.0), r"\(T, D\)"),
        (np.zeros((3, 0), np.float32), np.arange(3.0), "at least 1"),
        (np.zeros((3, 2), np.float32), np.arange(4.0), "one for each row"),
        (np.zeros((3, 2), np.float32), np.arange(3), "float64"),
        (np.zeros((3, 2), np.float32), np.array([0.0, 1.0, 1.0]), "strictly increasing"),
        (np.zeros((3, 2), np.float32), np.array([0.0, np.nan, 1.0]), "finite"),
        (np.array([[0, np.inf]], np.float32), np.zeros(1), "infinity"),
        (np.array([[0, np.nan]], np.float32), np.zeros(1), "partly NaN"),
    ],
)
def test_nonsense_is_refused_at_birth(values, times_s, complaint):
    with pytest.raises(ValueError, match=complaint):
        Track(values, times_s)


def test_a_row_of_nan_is_not_valid_and_an_empty_track_is_fine():
    track = Track(np.array([[1, 2], [np.nan, np.nan]], np.float16), np.array([0.0, 1.0]))
    assert track.valid.tolist() == [True, False]
    assert len(Track(np.zeros((0, 4), np.float16), np.zeros(0))) == 0


def test_its_own_clock_gives_the_same_rows_back():
    track = Track(np.random.default_rng(0).normal(size=(50, 3)).astype(np.float16), np.arange(50) / 25)
    np.testing.assert_array_equal(track.at(track.times_s), track.values)


def test_a_denser_track_is_averaged_over_each_stretch():
    times_s = (np.arange(100) + 0.5) / 100
    at_25_hz = np.arange(1, 20) / 25
    read = Track(times_s[:, None].astype(np.float32), times_s).at(at_25_hz)[:, 0]
    np.testing.assert_allclose(read, at_25_hz, atol=1e-6)  # four rows around each, two before and two behind


def test_a_sparser_track_is_held_within_its_reach_and_not_beyond():
    read = ramp(3, 1).at(np.array([0.2, 0.8, 2.9, 3.1]))[:, 0]
    np.testing.assert_array_equal(read[:3], [0, 1, 2])
    assert np.isnan(read[3])


def test_a_hole_stays_a_hole():
    values = np.arange(20, dtype=np.float32)[:, None]
    values[8:14] = np.nan
    read = Track(values, np.arange(20) / 10).at(np.arange(20) / 10 + 0.01)
    assert np.isnan(read[9:13]).all()
    assert not np.isnan(read[:8]).any()
    assert not np.isnan(read[14:]).any()


def test_tokens_keep_their_shape_and_nothing_seen_gives_nothing():
    track = Track(np.ones((4, 5, 6), np.float16), np.arange(4.0))
    assert track.at(np.array([0.5, 1.5])).shape == (2, 5, 6)
    blind = Track(np.full((4, 2), np.nan, np.float32), np.arange(4.0))
    assert np.isnan(blind.at(np.array([1.0]))).all()


@given(
    st.integers(1, 40), st.integers(1, 40), st.floats(0.5, 200), st.floats(0.5, 200), st.floats(-1, 1)
)  # fmt: skip
def test_what_is_read_was_seen_near_by(rows, asked, rate_hz, asked_hz, offset_s):
    track = ramp(rows, rate_hz, np.float32)
    times_s = np.arange(asked) / asked_hz + offset_s
    read = track.at(times_s)[:, 0]
    reach_s = max(1 / rate_hz if rows > 1 else np.inf, 1 / asked_hz)
    seen = ~np.isnan(read)
    assert (np.abs(read[seen] - times_s[seen]) <= reach_s + 1e-4).all()
