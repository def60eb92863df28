"""The selective scan on a CPU, forward and backward: beside its block's matrix products, a plain loop, and the SSD."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor
from vacli.temporal.scan import selective_scan, selective_scan_ref
from vacli.temporal.ssd import ssd_scan

from .race import Contender, Result, Target, race

SLOWEST = 1.5  # times the four matrix products
GRADIENT_ERROR = 1e-6


@dataclass(frozen=True)
class Sizes:
    """Shapes of the scan in a Mamba block of `expand` 1; `ssd_states`, as Mamba-2 has more of them."""

    windows: int
    rows: int
    dims: int
    states: int
    heads: int
    ssd_states: int
    rounds: int

    @property
    def rank(self) -> int:
        return math.ceil(self.dims / 16)


FULL = Sizes(windows=16, rows=300, dims=256, states=8, heads=4, ssd_states=64, rounds=21)
SMALL = Sizes(windows=2, rows=20, dims=32, states=4, heads=2, ssd_states=8, rounds=3)


def races(sizes: Sizes) -> Iterator[Result | str]:
    """Every race on one thread, the first also on all that torch has; then what float32 costs in exactness."""
    threads = torch.get_num_threads()
    try:
        for count in sorted({1, threads}):
            torch.set_num_threads(count)
            yield beside_products(sizes, count)
        torch.set_num_threads(1)
        yield beside_loop(sizes)
        yield beside_ssd(replace(sizes, states=sizes.ssd_states))
    finally:
        torch.set_num_threads(threads)
    yield exactness(sizes)


def beside_products(sizes: Sizes, threads: int) -> Result:
    scan, products = _Scan(sizes), _products(sizes)
    says = (
        f"Forward and backward, float32, {_shape(sizes)}. The twin is in_proj, x_proj, dt_proj and "
        f"out_proj of the same Mamba block and nothing else; the scan has softplus, D and gate with it. At most "
        f"{SLOWEST:g} times the twin's time is a ratio of at least {1 / SLOWEST:.3f}."
    )
    contenders = [
        Contender("the four matrix products of the block", products),
        Contender(
            "**selective_scan**",
            lambda: scan.run(selective_scan),
            (Target("ratio", round(1 / SLOWEST, 3)),),
            right=lambda: _same(scan.run(selective_scan), scan.run(selective_scan_ref)),
        ),
    ]
    plural = "one thread" if threads == 1 else f"{threads} threads"
    if threads > 1:
        # libgomp's threads spin while they wait: with other work on the cores that alone costs a factor of three
        says += f" OMP_WAIT_POLICY: {os.environ.get('OMP_WAIT_POLICY', 'not set (passive where cores are shared)')}."
    return race(f"The scan beside its block's matrix products, {plural}", says, contenders, sizes.rounds)


def beside_loop(sizes: Sizes) -> Result:
    scan = _Scan(sizes)
    says = f"Forward and backward, float32, {_shape(sizes)}, one thread. The twin is autograd through a loop over time."
    contenders = [
        Contender("selective_scan_ref", lambda: scan.run(selective_scan_ref)),
        Contender(
            "**selective_scan**",
            lambda: scan.run(selective_scan),
            (Target("ratio", 1.0),),
            right=lambda: _same(scan.run(selective_scan), scan.run(selective_scan_ref)),
        ),
    ]
    return race("The scan beside a plain loop", says, contenders, sizes.rounds)


def beside_ssd(sizes: Sizes) -> Result:
    """Both do the same recurrence: one decay a head, which the selective scan is given for each dim."""
    duality = _Duality(sizes)
    says = (
        f"Forward and backward, float32, {_shape(sizes)}, {sizes.heads} heads, one thread. One decay a head, the same "
        "numbers from both; the selective scan could have one for each dim and state."
    )
    contenders = [
        Contender("selective_scan", lambda: duality.run(duality.as_mamba_1)),
        duality.contender("**ssd_scan**, chunks of 64 rows", 64),
        duality.contender("ssd_scan, chunks of 32 rows", 32),
    ]
    return race("Mamba-2's scan beside Mamba's", says, contenders, sizes.rounds)


def exactness(sizes: Sizes) -> str:
    """A Markdown section: how far the gradients in float32 are from those in float64."""
    single = _Scan(sizes)
    double = _Scan(sizes, torch.float64)
    double.run(selective_scan_ref)
    errors: list[dict[str, float]] = []
    for scan in (selective_scan, selective_scan_ref):
        single.run(scan)
        errors.append({name: _error(x.grad, double.leaves[name].grad) for name, x in single.leaves.items()})
    fast, plain = errors
    worst = max(fast.values())
    verdict = "met" if worst <= GRADIENT_ERROR else "**missed**"
    lines = [
        "## Gradients of the scan in float32",
        "",
        f"{_shape(sizes)}. The norm of the difference from the plain loop in float64, over that one's norm.",
        "",
        "| gradient of | selective_scan | selective_scan_ref |",
        "|---|--:|--:|",
        *(f"| {name} | {fast[name]:.1e} | {plain[name]:.1e} |" for name in fast),
        "",
        f"The largest is {worst:.1e}; target at most {GRADIENT_ERROR:g}: {verdict}.",
    ]
    return "\n".join(lines) + "\n"


class _Scan:
    """A scan's arguments with the strides that a Mamba block gives them: parts of what linear layers made."""

    def __init__(self, sizes: Sizes, dtype: torch.dtype = torch.float32) -> None:
        g = torch.Generator().manual_seed(0)
        lines, dims, states = (sizes.windows, sizes.rows), sizes.dims, sizes.states
        step = torch.empty(dims).uniform_(math.log(1e-3), math.log(1e-1), generator=g).exp()
        values = {
            "u": torch.randn(*lines, dims, generator=g),
            "delta": torch.randn(*lines, dims, generator=g) / 2,
            "z": torch.randn(*lines, 2 * dims, generator=g)[..., dims:],
            "B and C": torch.randn(*lines, 2 * states, generator=g),
            "A": -torch.arange(1.0, states + 1).repeat(dims, 1),
            "D": torch.ones(dims),
            "delta_bias": step + torch.log(-torch.expm1(-step)),  # the inverse of softplus
        }
        self.leaves = {name: v.to(dtype).requires_grad_() for name, v in values.items()}
        self.grad_out = torch.randn(*lines, dims, generator=g).to(dtype)

    def run(self, scan: Callable[..., object]) -> list[Tensor]:
        """Forward and backward; the values and every gradient."""
        x = self.leaves
        for leaf in x.values():
            leaf.grad = None
        B, C = x["B and C"].chunk(2, dim=-1)
        u, delta, B, C, z = (v.transpose(1, 2) for v in (x["u"], x["delta"], B, C, x["z"]))
        out = scan(u, delta, x["A"], B, C, x["D"], z, x["delta_bias"], delta_softplus=True)
        out = cast(Tensor, out).transpose(1, 2)
        out.backward(self.grad_out)
        return [out.detach(), *(cast(Tensor, leaf.grad) for leaf in x.values())]


class _Duality:
    """The arguments of `ssd_scan`, and the same for `selective_scan`."""

    def __init__(self, sizes: Sizes) -> None:
        g = torch.Generator().manual_seed(0)
        lines, heads = (sizes.windows, sizes.rows), sizes.heads
        x = torch.randn(*lines, heads, sizes.dims // heads, generator=g)
        dt = torch.rand(*lines, heads, generator=g) / 10
        B, C = torch.randn(2, *lines, sizes.states, generator=g)
        self.leaves = [
            v.requires_grad_() for v in (x, dt, -torch.arange(1.0, heads + 1), B, C, torch.ones(heads))
        ]
        self.grad_y = torch.randn(x.shape, generator=g)

    def run(self, scan: Callable[[], Tensor]) -> list[Tensor]:
        for leaf in self.leaves:
            leaf.grad = None
        y = scan()
        y.backward(self.grad_y)
        return [y.detach(), *(cast(Tensor, leaf.grad) for leaf in self.leaves)]

    def contender(self, name: str, chunk: int) -> Contender:
        def ssd() -> list[Tensor]:
            return self.run(lambda: self.as_ssd(chunk))

        return Contender(name, ssd, right=lambda: _same(ssd(), self.run(self.as_mamba_1)))

    def as_ssd(self, chunk: int) -> Tensor:
        return ssd_scan(*self.leaves, chunk=chunk)

    def as_mamba_1(self) -> Tensor:
        x, dt, A, B, C, D = self.leaves
        u, dims = x.flatten(2).transpose(1, 2), x.shape[-1]
        dt, A, D = (v.repeat_interleave(dims, -1) for v in (dt, A, D))
        B, C, dt = (v.transpose(1, 2) for v in (B, C, dt))
        y = selective_scan(u, dt, A[:, None].expand(-1, B.shape[1]), B, C, D)
        return cast(Tensor, y).transpose(1, 2).unflatten(2, x.shape[2:])


def _products(sizes: Sizes) -> Callable[[], None]:
    """Forward and backward of the block's four linear layers, each on an input of its own."""
    g = torch.Generator().manual_seed(0)
    dims, rank = sizes.dims, sizes.rank
    widths = [(dims, 2 * dims), (dims, rank + 2 * sizes.states), (rank, dims), (dims, dims)]
    weights = [torch.randn(after, before, generator=g).requires_grad_() for before, after in widths]
    inputs = [torch.randn(sizes.windows, sizes.rows, n, generator=g).requires_grad_() for n, _ in widths]
    grads = [torch.randn(sizes.windows, sizes.rows, n, generator=g) for _, n in widths]

    def run() -> None:
        for weight, x, grad in zip(weights, inputs, grads, strict=True):
            weight.grad = x.grad = None
            torch.nn.functional.linear(x, weight).backward(grad)

    return run


def _same(got: list[Tensor], wanted: list[Tensor]) -> bool:
    return all(_error(a, b) < 1e-5 for a, b in zip(got, wanted, strict=True))


def _error(got: Tensor | None, wanted: Tensor | None) -> float:
    """The norm of the difference over the norm of what was wanted, both in float64."""
    got, wanted = (cast(Tensor, x).double() for x in (got, wanted))
    return float(torch.linalg.vector_norm(got - wanted) / torch.linalg.vector_norm(wanted))


def _shape(sizes: Sizes) -> str:
    return f"{sizes.windows} windows of {sizes.rows} rows, {sizes.dims} dims, {sizes.states} states"
