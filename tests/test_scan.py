"""The two twins of the selective scan: golden values, and agreement with each other."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vacli.temporal.scan import selective_scan, selective_scan_ref

DATA = Path(__file__).parent / "data"
TWINS = [selective_scan, selective_scan_ref]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}  # absolute
NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")


def random_inputs(batch, dims, states, rows, dtype=torch.float64, seed=0):
    """Leaves for every argument; steps of the size that Mamba begins with."""
    g = torch.Generator().manual_seed(seed)
    shapes = {"u": (batch, dims, rows), "B": (batch, states, rows), "C": (batch, states, rows), "D": (dims,)}
    shapes |= {
        "delta": (batch, dims, rows),
        "z": (batch, dims, rows),
        "delta_bias": (dims,),
        "A": (dims, states),
    }
    x = {name: torch.randn(shapes[name], generator=g, dtype=dtype) for name in NAMES}
    x["A"] = -x["A"].exp()
    x["delta_bias"] -= 2
    return {name: v.requires_grad_() for name, v in x.items()}


def values_and_gradients(scan, inputs, resets=None):
    """Both results and the gradient of every input, for a weight on the last state too."""
    leaves = {name: v.detach().clone().requires_grad_() for name, v in inputs.items()}
    out, state = scan(**leaves, delta_softplus=True, return_last_state=True, resets=resets)
    (out.sin().sum() + (state * 3).cos().sum()).backward()
    return {"out": out, "state": state} | {name: v.grad for name, v in leaves.items()}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", ["small", "long", "bare"])
@pytest.mark.parametrize("scan", TWINS)
def test_values_and_gradients_are_those_of_mamba_ssm(scan, name, dtype):
    golden = np.load(DATA / f"selective_scan_{name}.npz")
    inputs = {k: torch.tensor(golden[k], dtype=dtype, requires_grad=True) for k in NAMES if k in golden}
    out, state = scan(**inputs, delta_softplus=True, return_last_state=True)
    out.backward(torch.tensor(golden["grad_out"], dtype=dtype))
    got = {"out": out, "last_state": state} | {f"grad_{k}": v.grad for k, v in inputs.items()}
    for key, value in got.items():
        assert value.dtype == dtype
        np.testing.assert_allclose(
            value.detach().numpy(), golden[key], rtol=0, atol=TOLERANCE[dtype], err_msg=key
        )


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 3),
    dims=st.integers(1, 5),
    states=st.integers(1, 9),
    rows=st.integers(1, 40),
    chunk=st.integers(1, 40),
    packed=st.booleans(),
)
def test_twins_agree_for_any_shape_chunk_and_resets(batch, dims, states, rows, chunk, packed):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vacli.temporal.scan._CHUNK_VALUES", 0)
        patch.setattr("vacli.temporal.scan._CHUNK_ROWS_MIN", chunk)
        inputs = random_inputs(batch, dims, states, rows, seed=rows)
        resets = torch.rand(batch, rows, generator=torch.Generator().manual_seed(chunk)) < 0.3
        fast, plain = (values_and_gradients(scan, inputs, resets if packed else None) for scan in TWINS)
    for key in plain:
        torch.testing.assert_close(fast[key], plain[key], rtol=1e-9, atol=1e-11, msg=key)


@pytest.mark.parametrize("scan", TWINS)
def test_packed_videos_are_as_each_alone(scan):
    """Lines of videos of 5, 1 and 14 rows, and of 12 and 8: values, and gradients of a loss over all."""
    inputs = random_inputs(2, 3, 4, 20)
    ends = [[0, 5, 6, 20], [0, 12, 20]]
    resets = torch.zeros(2, 20, dtype=torch.bool)
    alone = {name: torch.zeros_like(v) for name, v in inputs.items()}
    outs = torch.zeros(2, 3, 20, dtype=torch.float64)
    for line, borders in enumerate(ends):
        for first, end in pairwise(borders):
            resets[line, first] = True
            where = (slice(line, line + 1), slice(None), slice(first, end))
            leaves = {
                k: v.detach()[where if v.ndim == 3 else ...].clone().requires_grad_()
                for k, v in inputs.items()
            }
            out = scan(**leaves, delta_softplus=True)
            out.sin().sum().backward()
            outs[where] = out.detach()
            for name, leaf in leaves.items():
                alone[name][where if leaf.ndim == 3 else ...] += leaf.grad
    packed = scan(**inputs, delta_softplus=True, resets=resets)
    packed.sin().sum().backward()
    torch.testing.assert_close(packed, outs, rtol=1e-12, atol=1e-12)
    for name, v in inputs.items():
        torch.testing.assert_close(v.grad, alone[name], rtol=1e-10, atol=1e-12, msg=name)


def test_twins_agree_where_long_steps_would_underflow_a_cumulative_sum():
    """exp(sum of delta A) is 0 after a few rows here: the log-space form divides by it."""
    inputs = random_inputs(2, 4, 8, 200)
    inputs["delta_bias"] = torch.full((4,), 8.0, dtype=torch.float64)
    fast, plain = (values_and_gradients(scan, inputs) for scan in TWINS)
    for key in plain:
        torch.testing.assert_close(fast[key], plain[key], rtol=1e-9, atol=1e-11, msg=key)


@pytest.mark.parametrize("name", NAMES)
def test_gradient_is_the_slope_of_the_values(name):
    inputs = {k: v.detach() for k, v in random_inputs(2, 3, 2, 9).items()}
    inputs[name].requires_grad_()  # this one alone: an input without a gradient is no obstacle

    def scan_of(x):
        return selective_scan(**(inputs | {name: x}), delta_softplus=True, return_last_state=True)

    assert torch.autograd.gradcheck(scan_of, inputs[name])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_values_are_the_same_without_gradients(mode):
    inputs = random_inputs(2, 3, 4, 17)
    with mode():
        out = selective_scan(**inputs)
    assert not out.requires_grad
    torch.testing.assert_close(out, selective_scan_ref(**inputs).detach())


@pytest.mark.parametrize("scan", TWINS)
def test_autocast_does_not_reach_the_state(scan):
    inputs = random_inputs(2, 3, 4, 17, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = scan(**inputs, delta_softplus=True, return_last_state=True)
    wanted = scan(**inputs, delta_softplus=True, return_last_state=True)
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)


def test_half_precision_is_computed_in_float32():
    inputs = {k: v.detach() for k, v in random_inputs(2, 3, 4, 17, torch.float32).items()}
    halves = {k: inputs[k].bfloat16() for k in ("u", "delta", "B", "C", "z")}
    out = selective_scan(**(inputs | halves), delta_softplus=True)
    wanted = selective_scan(**(inputs | {k: v.float() for k, v in halves.items()}), delta_softplus=True)
    torch.testing.assert_close(out, wanted.bfloat16())


def test_a_step_of_no_time_leaves_the_state_alone():
    inputs = {k: v.detach() for k, v in random_inputs(2, 3, 4, 6).items()}
    inputs["delta"][..., 3:] = -torch.inf
    _, state = selective_scan(**inputs, delta_softplus=True, return_last_state=True)
    cut = {k: v[..., :3] if v.ndim == 3 else v for k, v in inputs.items()}
    torch.testing.assert_close(
        state, selective_scan(**cut, delta_softplus=True, return_last_state=True)[1], rtol=0, atol=0
    )
