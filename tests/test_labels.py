"""Annotations are joined by frame number; CCC is the challenge's formula, defined everywhere."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from vacli import VacliError
from vacli.store.labels import ccc, ccc_of_tracks, read_va

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
