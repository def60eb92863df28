"""The two twins of Mamba-2's scan: agreement with each other, with Mamba-1's, and with each video alone."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vacli.temporal.scan import selective_scan
from vacli.temporal.ssd import ssd_scan, ssd_scan_ref

TWINS = [ssd_scan, ssd_scan_ref]
NAMES = ("x", "dt", "A", "B", "C", "D")


def random_inputs(batch=2, rows=20, heads=3, dims=4, states=5, dtype=torch.float64, seed=0):
    """Leaves for every argument; dt is what a softplus gave, some of it zero: masked rows."""
    g = torch.Generator().manual_seed(seed)
    shapes = {
        "x": (batch, rows, heads, dims),
        "dt": (batch, rows, heads),
        "A": (heads,),
        "B": (batch, rows, states),
        "C": (batch, rows, states),
        "D": (heads,),
    }
    x = {name: torch.randn(shapes[name], generator=g, dtype=dtype) for name in NAMES}
    x["A"] = -x["A"].exp()
    masked = torch.rand(batch, rows, 1, generator=g) < 0.2
    x["dt"] = torch.nn.functional.softplus(x["dt"]).masked_fill(masked, 0)
    return {name: v.requires_grad_() for name, v in x.items()}


def values_and_gradients(scan, inputs, **options):
    leaves = {name: v.detach().clone().requires_grad_() for name, v in inputs.items()}
    y = scan(**leaves, **options)
    y.sin().sum().backward()
    return {"y": y} | {name: v.grad for name, v in leaves.items()}


def assert_same(got, wanted, tolerance=1e-10):
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], rtol=tolerance, atol=tolerance, msg=name)


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 3),
    rows=st.integers(1, 40),
    heads=st.integers(1, 3),
    dims=st.integers(1, 4),
    states=st.integers(1, 5),
    chunk=st.integers(1, 45),
    packed=st.booleans(),
)
def test_twins_agree_for_any_shape_chunk_and_resets(batch, rows, heads, dims, states, chunk, packed):
    inputs = random_inputs(batch, rows, heads, dims, states, seed=rows)
    resets = torch.rand(batch, rows, generator=torch.Generator().manual_seed(chunk)) < 0.3
    resets = resets if packed else None
    fast = values_and_gradients(ssd_scan, inputs, resets=resets, chunk=chunk)
    assert_same(fast, values_and_gradients(ssd_scan_ref, inputs, resets=resets))


@pytest.mark.parametrize("scan", TWINS)
def test_is_mamba_1_with_one_decay_a_head(scan):
    inputs = random_inputs()
    batch, rows, heads, dims = inputs["x"].shape
    resets = torch.rand(batch, rows, generator=torch.Generator().manual_seed(1)) < 0.2

    def as_mamba_1(x, dt, A, B, C, D, resets):
        u = x.flatten(2).transpose(1, 2)
        delta, A, D = (v.repeat_interleave(dims, -1) for v in (dt, A, D))
        A = A[:, None].expand(-1, B.shape[2])
        B, C, delta = (v.transpose(1, 2) for v in (B, C, delta))
        return selective_scan(u, delta, A, B, C, D, resets=resets).transpose(1, 2).unflatten(2, (heads, dims))

    wanted = values_and_gradients(as_mamba_1, inputs, resets=resets)
    assert_same(values_and_gradients(scan, inputs, resets=resets), wanted)


@pytest.mark.parametrize("scan", TWINS)
def test_packed_videos_are_as_each_alone(scan):
    """One line of videos of 5, 1, 64 and 70 rows: borders within a chunk and at its edge."""
    inputs = random_inputs(batch=1, rows=140)
    borders = [0, 5, 6, 70, 140]
    resets = torch.zeros(1, 140, dtype=torch.bool)
    resets[0, borders[:-1]] = True
    alone = {name: torch.zeros_like(v) for name, v in inputs.items()} | {"y": torch.zeros_like(inputs["x"])}
    for first, end in pairwise(borders):
        cut = {k: v[:, first:end] if v.ndim > 1 else v for k, v in inputs.items()}
        for name, value in values_and_gradients(scan, cut).items():
            where = (slice(None), slice(first, end)) if value.ndim > 1 else ...
            alone[name][where] += value.detach()
    assert_same(values_and_gradients(scan, inputs, resets=resets), alone)


@pytest.mark.parametrize("name", NAMES)
def test_gradient_is_the_slope_of_the_values(name):
    inputs = {k: v.detach() for k, v in random_inputs(2, 7, 2, 2, 2).items()}
    resets = torch.zeros(2, 7, dtype=torch.bool)
    resets[1, 4] = True

    def scan_of(x):
        return ssd_scan(**(inputs | {name: x}), resets=resets, chunk=3)

    assert torch.autograd.gradcheck(scan_of, inputs[name].requires_grad_())


@pytest.mark.parametrize("scan", TWINS)
def test_a_step_of_no_time_leaves_the_state_alone(scan):
    """Rows of dt = 0 in the middle, as long as two chunks: the rows behind them go on as if they were not there."""
    inputs = {k: v.detach() for k, v in random_inputs(rows=160).items()}
    inputs["dt"][:, 10:150] = 0
    kept = torch.tensor([*range(10), *range(150, 160)])
    without = {k: v[:, kept] if v.ndim > 1 else v for k, v in inputs.items()}
    torch.testing.assert_close(scan(**inputs)[:, kept], scan(**without), rtol=1e-12, atol=1e-12)


def test_long_steps_neither_overflow_nor_blur_what_follows():
    """Sums of dt A far below what exp can hold, then small steps: in float32 as exact there as elsewhere."""
    inputs = random_inputs(rows=200, heads=2)
    with torch.no_grad():
        inputs["dt"][:, ::50] = 3e4
        inputs["x"][:, ::50] /= 3e4
        inputs["dt"][:, 1::50] = 1e-3
    singles = {name: v.detach().float() for name, v in inputs.items()}
    wanted = values_and_gradients(ssd_scan_ref, {k: v.double() for k, v in singles.items()})
    for name, got in values_and_gradients(ssd_scan, singles).items():
        assert got.isfinite().all(), name
        error = torch.linalg.vector_norm(got.double() - wanted[name]) / torch.linalg.vector_norm(wanted[name])
        assert error < 1e-5, (name, error)  # differences of cumulative sums give 1e-3


def test_half_precision_and_autocast_are_computed_in_float32():
    inputs = {k: v.detach() for k, v in random_inputs(dtype=torch.float32).items()}
    halves = inputs | {k: inputs[k].bfloat16() for k in ("x", "B", "C")}
    wanted = ssd_scan(**{k: v.float() for k, v in halves.items()}).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        got, single = ssd_scan(**halves), ssd_scan(**inputs)
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)
    torch.testing.assert_close(single, ssd_scan(**inputs), rtol=0, atol=0)
