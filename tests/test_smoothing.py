"""Smoothing is a mean over time: right at any frame rate, its fast form equal to the plain one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from vacli.temporal.smoothing import CHOICES, Kernel, in_words, smoothed

kernels = st.sampled_from(CHOICES)
rows = st.lists(
    st.tuples(st.integers(1, 900), st.floats(-1, 1, width=32), st.floats(-1, 1, width=32)), max_size=40
)


def of(drawn: list[tuple[int, float, float]]) -> tuple[np.ndarray, np.ndarray]:
    """values (T, 2) and times_s (T,), the steps drawn in milliseconds."""
    times_s = np.cumsum([step for step, _, _ in drawn]) / 1000
    return np.array([pair for _, *pair in drawn], np.float64).reshape(-1, 2), times_s


def plainly(values: np.ndarray, times_s: np.ndarray, kernel: Kernel) -> np.ndarray:
    """The mean of the rows no further away, row by row; of a Gaussian three times over a third as far."""
    passes = 3 if kernel["kind"] == "gauss" else 1
    for _ in range(passes):
        values = np.array(
            [values[np.abs(times_s - t) <= kernel["half_s"] / passes + 1e-9].mean(axis=0) for t in times_s]
        ).reshape(values.shape)
    return values


@given(rows, kernels)
def test_the_fast_smoother_equals_the_plain_one(drawn, kernel):
    values, times_s = of(drawn)
    np.testing.assert_allclose(smoothed(values, times_s, kernel), plainly(values, times_s, kernel), atol=1e-9)


@given(rows, kernels, st.floats(-3, 3), st.floats(-1000, 1000))
def test_smoothing_is_linear_keeps_what_is_constant_and_never_leaves_the_range(drawn, kernel, scale, shift):
    values, times_s = of(drawn)
    made = smoothed(values, times_s, kernel)
    np.testing.assert_allclose(
        smoothed(scale * values + shift, times_s, kernel), scale * made + shift, atol=1e-8
    )
    if len(values):
        assert (made.min(axis=0) >= values.min(axis=0) - 1e-9).all()
        assert (made.max(axis=0) <= values.max(axis=0) + 1e-9).all()


@given(rows, kernels)
def test_smoothing_backwards_in_time_is_smoothing(drawn, kernel):
    values, times_s = of(drawn)
    forth = smoothed(values, times_s, kernel)
    back = smoothed(values[::-1], -times_s[::-1], kernel)[::-1]
    np.testing.assert_allclose(forth, back, atol=1e-9)


@pytest.mark.parametrize("half_s", [0.75, 3.0])
def test_a_gauss_is_nearly_a_gaussian_and_ends_where_it_says(half_s):
    times_s = np.arange(-6000, 6001) / 1000
    impulse = np.where(times_s == 0, 1.0, 0.0)[:, None]
    made = smoothed(impulse, times_s, {"kind": "gauss", "half_s": half_s})[:, 0]
    wanted = np.exp(-0.5 * (times_s / (half_s / 3)) ** 2)
    wanted /= wanted.sum()
    assert np.abs(made - wanted).max() < 0.07 * wanted.max()
    assert np.sqrt((made * times_s**2).sum()) == pytest.approx(half_s / 3, rel=0.01)
    assert not made[np.abs(times_s) > half_s + 0.001].any()


def test_the_frame_rate_may_change_midway_without_moving_the_curve():
    times_s = np.concatenate([np.arange(0, 10, 0.1), np.arange(10, 20, 0.02)])
    ramp = times_s[:, None]
    for kind in ("box", "gauss"):
        made = smoothed(ramp, times_s, {"kind": kind, "half_s": 0.6})
        inner = ((times_s > 1) & (times_s < 9)) | ((times_s > 11) & (times_s < 19))
        np.testing.assert_allclose(made[inner], ramp[inner], atol=1e-9)


def test_every_kind_and_none_can_be_chosen_and_is_told():
    assert {kernel["kind"] for kernel in CHOICES} == {"box", "gauss"}
    assert CHOICES[0]["half_s"] == 0  # first: of equals the first is chosen
    told = in_words({"valence": {"kind": "gauss", "half_s": 0.8}, "arousal": CHOICES[0]})
    assert told == "valence gauss +-0.8 s, arousal none"
