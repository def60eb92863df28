"""Annotations are joined by frame number; CCC is the challenge's formula, defined everywhere."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from vacli import VacliError
from vacli.store.labels import Moments, ccc, ccc_of_tracks, mean_ccc, read_va

reals = st.floats(-1, 1)
columns = hnp.arrays(np.float64, st.tuples(st.integers(2, 60), st.just(2)), elements=st.floats(-1, 1))


def ones(x):
    return np.ones((len(x), 1))


def write(tmp_path, text):
    path = tmp_path / "v.txt"
    path.write_text(text)
    return path


def test_lines_are_frames_and_minus_five_is_unlabelled(tmp_path):
    path = write(tmp_path, "valence,arousal\n0.5,-0.25\n-5,-5\n-5,0.1\n1,1\n")
    track = read_va(path, np.arange(4) / 30)
    np.testing.assert_array_equal(track.valid, [True, False, False, True])
    np.testing.assert_array_equal(track.values[0], [0.5, -0.25])


def test_more_lines_than_frames_are_left_out_and_fewer_are_unlabelled(tmp_path):
    path = write(tmp_path, "valence,arousal\n" + "0.1,0.2\n" * 5)
    assert len(read_va(path, np.arange(3) / 30)) == 3
    np.testing.assert_array_equal(read_va(path, np.arange(7) / 30).valid, [True] * 5 + [False] * 2)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("v,a\n1,2\n", "wanted a header"),
        ("", "wanted a header"),
        ("valence,arousal\n0.1\n", "line 2.*two numbers"),
        ("valence,arousal\n0,0\nx,1\n", "line 3.*two numbers"),
        ("valence,arousal\n0.1,7\n", r"line 2.*outside \[-1, 1\]"),
    ],
)
def test_a_bad_annotation_names_its_line(tmp_path, text, complaint):
    with pytest.raises(VacliError, match=complaint):
        read_va(write(tmp_path, text), np.arange(9) / 30)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes have no name on this system")
def test_what_is_no_file_is_one_line_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    for path in (tmp_path / "pipe.txt", tmp_path, tmp_path / "none.txt", Path("\ud800.txt"), Path("a\0b")):
        with pytest.raises(VacliError, match="cannot read the annotations"):
            read_va(path, np.arange(3) / 30)


def test_a_field_without_an_end_is_one_line(tmp_path):
    path = write(tmp_path, 'valence,arousal\n0.1,"' + "9" * 200_000)
    with pytest.raises(VacliError, match="cannot read the annotations"):
        read_va(path, np.arange(3) / 30)


def test_ccc_is_one_for_itself_and_less_when_shifted_or_scaled():
    x = np.random.default_rng(0).normal(size=(500, 1))
    assert ccc(x, x, ones(x))[0] == pytest.approx(1)
    assert ccc(x, -x, ones(x))[0] == pytest.approx(-1, abs=0.01)
    assert ccc(x, x + 0.5, ones(x))[0] < 1
    assert ccc(x, 2 * x, ones(x))[0] < 1


def test_ccc_is_the_published_formula():
    x, y = np.random.default_rng(1).normal(size=(2, 1000, 1))
    y = 0.6 * x + 0.3 * y + 0.1
    rho = np.corrcoef(x[:, 0], y[:, 0])[0, 1]
    published = 2 * rho * x.std() * y.std() / (x.var() + y.var() + (x.mean() - y.mean()) ** 2)
    assert ccc(x, y, ones(x))[0] == pytest.approx(published, abs=1e-12)


@given(columns)
def test_ccc_is_symmetric_and_within_bounds(x):
    y = np.roll(x, 1, axis=0)
    a, b = ccc(x, y, ones(x)), ccc(y, x, ones(x))
    np.testing.assert_allclose(a, b, atol=1e-9)
    assert (np.abs(a) <= 1 + 1e-9).all()


def test_ccc_is_zero_where_it_is_undefined():
    flat = np.full((9, 2), 0.25)
    np.testing.assert_array_equal(ccc(flat, flat, ones(flat)), [0, 0])
    np.testing.assert_array_equal(ccc(flat, flat, 0 * ones(flat)), [0, 0])


def test_rows_of_no_weight_count_nowhere():
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(2, 40, 2))
    weight = (rng.random((40, 1)) < 0.5).astype(float)
    kept = weight[:, 0] > 0
    np.testing.assert_allclose(ccc(x, y, weight), ccc(x[kept], y[kept], ones(x[kept])), atol=1e-12)


def test_torch_gives_the_same_number_and_a_gradient():
    x, y = np.random.default_rng(3).normal(size=(2, 30, 2))
    predicted = torch.from_numpy(x).requires_grad_()
    value = ccc(predicted, torch.from_numpy(y), torch.ones(30, 1, dtype=torch.float64))
    np.testing.assert_allclose(value.detach().numpy(), ccc(x, y, ones(x)), atol=1e-12)
    value.sum().backward()
    assert predicted.grad.abs().sum() > 0


def test_an_all_masked_batch_has_a_finite_gradient():
    predicted = torch.zeros(5, 2, requires_grad=True)
    ccc(predicted, torch.zeros(5, 2), torch.zeros(5, 1)).sum().backward()
    assert torch.equal(predicted.grad, torch.zeros(5, 2))


def test_tracks_are_judged_over_all_valid_frames_together():
    rng = np.random.default_rng(4)
    pairs = [(rng.normal(size=(n, 2)), rng.normal(size=(n, 2))) for n in (5, 9)]
    pairs[0][1][2] = np.nan
    kept = np.arange(5) != 2
    x = np.concatenate([pairs[0][0][kept], pairs[1][0]])
    y = np.concatenate([pairs[0][1][kept], pairs[1][1]])
    np.testing.assert_allclose(ccc_of_tracks(pairs), ccc(x, y, ones(x)))


# ---- what the formula does -----------------------------------------------------------------------------------


def spread(x):
    """Beyond rounding: of a column that all but stands still CCC is the CCC of its rounding errors."""
    return (x.std(axis=0) > 1e-3).all()


@given(columns, columns)
def test_turning_one_sign_turns_the_ccc_of_columns_about_zero(x, y):
    n = min(len(x), len(y))
    x, y = x[:n] - x[:n].mean(axis=0), y[:n] - y[:n].mean(axis=0)
    assume(spread(x) and spread(y))
    np.testing.assert_allclose(ccc(-x, y, ones(x)), -ccc(x, y, ones(x)), atol=1e-9)


@given(columns, st.floats(0.1, 100), st.floats(-100, 100))
def test_a_shift_and_a_scale_of_both_leave_ccc_as_it_is(x, scale, shift):
    y = np.roll(x, 1, axis=0)
    assume(spread(x))
    for a in (scale, -scale):
        moved = ccc(a * x + shift, a * y + shift, ones(x))
        np.testing.assert_allclose(moved, ccc(x, y, ones(x)), atol=1e-7)
        np.testing.assert_allclose(Moments.of(a * x + shift, a * y + shift).ccc(), moved, atol=1e-7)


@given(columns, st.floats(0.1, 1), st.floats(-1, 1))
def test_a_shift_or_a_scale_of_one_never_brings_ccc_above_the_correlation(x, scale, shift):
    assume(spread(x))
    found = ccc(x, scale * x + shift, ones(x))
    assert (found <= 1 + 1e-9).all()
    if abs(shift) > 0.1:
        assert (found < 1).all()


@given(columns)
def test_ccc_with_itself_is_one(x):
    assume(spread(x))
    np.testing.assert_allclose(ccc(x, x, ones(x)), 1, atol=1e-9)
    np.testing.assert_allclose(Moments.of(x, x).ccc(), 1, atol=1e-9)


@given(columns, reals, reals)
def test_a_constant_has_ccc_zero_with_anything(x, here, there):
    flat, other = np.full_like(x, here), np.full_like(x, there)
    np.testing.assert_array_equal(Moments.of(flat, x).ccc(), 0)
    np.testing.assert_array_equal(Moments.of(x, flat).ccc(), 0)
    np.testing.assert_array_equal(Moments.of(flat, other).ccc(), 0)
    np.testing.assert_array_equal(Moments.of(flat, flat).ccc(), 0)
    for a, b in ((flat, x), (x, flat), (flat, other), (flat, flat)):
        for dtype in (np.float32, np.float64):
            a, b, weight = a.astype(dtype), b.astype(dtype), ones(x).astype(dtype)
            np.testing.assert_array_equal(ccc(a, b, weight), 0)
            np.testing.assert_array_equal(ccc(*map(torch.from_numpy, (a, b, weight))).numpy(), 0)


# ---- sums instead of rows ------------------------------------------------------------------------------------


def parts_of(x, y, cuts):
    return [Moments.of(a, b) for a, b in zip(np.split(x, cuts), np.split(y, cuts), strict=True)]


def assert_alike(found, wanted, rtol=1e-9, atol=1e-12):
    for name in vars(wanted):
        np.testing.assert_allclose(
            getattr(found, name), getattr(wanted, name), rtol=rtol, atol=atol, err_msg=name
        )


@given(columns, st.lists(st.integers(0, 60), max_size=6), st.sampled_from([0.0, 1e6]))
def test_moments_of_parts_add_up_to_those_of_the_whole(x, cuts, offset):
    x = x + offset
    y = np.roll(x, 1, axis=0) * 0.5
    y[::3] = np.nan
    parts = parts_of(x, y, sorted(min(cut, len(x)) for cut in cuts))
    total = sum(parts[1:], parts[0])
    assert_alike(total, Moments.of(x, y), atol=1e-9 if offset else 1e-12)
    back = sum(parts[-2::-1], parts[-1])
    assert_alike(back, total, atol=1e-9 if offset else 1e-12)


def test_moments_give_the_ccc_of_two_passes_over_all_rows():
    rng = np.random.default_rng(5)
    x, y = rng.normal(size=(2, 400, 2))
    np.testing.assert_allclose(Moments.of(x, y).ccc(), ccc(x, y, ones(x)), rtol=1e-13)
    x[::7] = np.nan
    y[::5, 1] = np.nan
    kept = ~np.isnan(x + y).any(axis=1)
    assert Moments.of(x, y).count == kept.sum()
    np.testing.assert_allclose(Moments.of(x, y).ccc(), ccc(x[kept], y[kept], ones(x[kept])), rtol=1e-13)


@pytest.mark.parametrize("offset", [0.0, 1e4, -1e6])
def test_three_million_rows_in_pieces_equal_two_passes_in_float64(offset):
    rng = np.random.default_rng(6)
    x = rng.normal(offset, 0.3, (3_000_000, 1))
    y = 0.5 * (x - offset) + offset + rng.normal(0.1, 0.2, x.shape)
    parts = parts_of(x, y, np.sort(rng.integers(0, len(x), 599)))
    found = sum(parts[1:], parts[0]).ccc()
    wanted = ccc(x, y, ones(x))
    np.testing.assert_allclose(found, wanted, rtol=1e-12 if not offset else 1e-9)


@given(
    st.lists(st.tuples(st.integers(0, 9), reals, reals), min_size=1, max_size=6), st.integers(0, 2**32 - 1)
)
def test_resamplings_pooled_at_once_equal_videos_added_one_by_one(drawn, seed):
    rng = np.random.default_rng(seed)
    videos = [Moments.of(rng.uniform(-1, 1, (n, 2)) + x, rng.uniform(-1, 1, (n, 2)) + y) for n, x, y in drawn]
    times = rng.multinomial(len(videos), np.full(len(videos), 1 / len(videos)), size=5)
    pooled = Moments.stack(videos).pooled(times.astype(float))
    for r, row in enumerate(times):
        first, *rest = [video for video, often in zip(videos, row, strict=True) for _ in range(often)]
        alone = sum(rest, first)
        if alone.count:
            mine = Moments(*(part[r] for part in vars(pooled).values()))
            assert_alike(mine, alone, atol=1e-9)
        np.testing.assert_allclose(pooled.ccc()[r], alone.ccc(), atol=1e-9)


def test_a_resampling_of_constant_videos_alone_has_ccc_zero():
    flat = [Moments.of(np.full((9, 2), c), np.full((9, 2), c)) for c in (0.1, -0.7)]
    pooled = Moments.stack(flat).pooled(np.array([[2.0, 0], [0, 2], [1, 1]]))
    np.testing.assert_allclose(pooled.ccc(), [[0, 0], [0, 0], [1, 1]], atol=1e-12)


# ---- the tables of the papers --------------------------------------------------------------------------------

MAMBA_VA_TABLES = """
0.5454 0.3848 0.4651
0.5423 0.3612 0.4517
0.5362 0.4310 0.4836
0.5231 0.3413 0.4322
0.5216 0.3540 0.4378
0.5305 0.4275 0.4790
0.2400 0.2000 0.2200
0.577 0.623 0.600
0.561 0.620 0.590
0.546 0.611 0.578
0.494 0.551 0.522
0.468 0.492 0.480
0.504 0.412 0.458
0.327 0.304 0.316
0.211 0.191 0.201
"""  # "Mamba-VA" (ABAW8), tables 1 and 2: valence, arousal, average


@pytest.mark.parametrize("line", MAMBA_VA_TABLES.split("\n")[1:-1])
def test_the_mean_is_the_one_of_the_published_tables(line):
    digits = len(line.split()[0]) - 2
    valence, arousal, published = map(float, line.split())
    # cells are rounded by themselves: half a last digit each way of both parts and of the whole
    assert mean_ccc(valence, arousal) == pytest.approx(published, abs=1.001 * 10**-digits)
