"""The selective scan of Mamba: a plain loop over time, and a fast twin that works in chunks of rows.

Shape legend, after mamba-ssm: B windows, D dims, N states a dim, L rows of time; K rows of one chunk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_LOG2_E = math.log2(math.e)
# A chunk's (K, B, N, D) arrays should stay in the processor's cache; fewer rows than these save no memory.
_CHUNK_VALUES = 2**19
_CHUNK_ROWS_MIN = 8

Recurrence = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    resets: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The state-space recurrence whose step and input depend on the row (Gu & Dao 2023, section 3).

        delta = softplus(delta + delta_bias)            both parts optional
        h[l] = exp(delta[l] A) h[l-1] + delta[l] B[l] u[l],  h[-1] = 0
        out[l] = (C[l] . h[l] + D u[l]) * silu(z[l])    both parts optional

    Arguments, shapes and meaning are those of mamba-ssm's `selective_scan_fn` for real A:
    u, delta, z: (B, D, L). A: (D, N). B, C: (B, N, L). D, delta_bias: (D,).
    Ours alone is resets: (B, L) bool, True where h[l-1] counts as zero, the first row of a video packed behind others.

    Returns out (B, D, L) in u's dtype and, if asked, the last state (B, D, N). It runs in float32, or in float64
    if u is, autocast or not. Any of these may need a gradient; both results give one (once differentiable).
    """
    # An implementation for one kind of device is one more recurrence, chosen here by u.device.
    out, state = _scan(_chunked, u, delta, A, B, C, D, z, delta_bias, delta_softplus, resets)
    return (out, state) if return_last_state else out


def selective_scan_ref(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    resets: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The plain twin of `selective_scan`: same signature, same meaning, autograd through a loop over time."""
    out, state = _scan(_loop, u, delta, A, B, C, D, z, delta_bias, delta_softplus, resets)
    return (out, state) if return_last_state else out


def _scan(
    recurrence: Recurrence,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    resets: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """What stands around the recurrence, the same for every implementation."""
    out_dtype = u.dtype
    dtype = torch.promote_types(out_dtype, torch.float32)
    with torch.autocast(u.device.type, enabled=False):
        u, delta, A, B, C = (x.to(dtype) for x in (u, delta, A, B, C))
        if delta_bias is not None:
            delta = delta + delta_bias.to(dtype)[:, None]
        if delta_softplus:
            delta = F.softplus(delta)
        out, state = recurrence(u, delta, A, B, C, resets)
        if D is not None:
            out = torch.addcmul(out, u, D.to(dtype)[:, None])
        if z is not None:
            out = out * F.silu(z.to(dtype))
    return out.to(out_dtype), state


def _loop(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, resets: Tensor | None
) -> tuple[Tensor, Tensor]:
    state = u.new_zeros(*u.shape[:2], A.shape[1])  # (B, D, N)
    rows = []
    if resets is None:
        resets = torch.zeros(u.shape[0], u.shape[2], dtype=torch.bool, device=u.device)
    # unbind, not indexing: the gradient of an index is as large as the whole, quadratic in L
    for u_l, delta_l, B_l, C_l, reset_l in zip(
        *(x.unbind(-1) for x in (u, delta, B, C, resets)), strict=True
    ):
        state = state.masked_fill(reset_l[:, None, None], 0)
        state = torch.exp(delta_l[..., None] * A) * state + (delta_l * u_l)[..., None] * B_l[:, None]
        rows.append((state * C_l[:, None]).sum(-1))
    return torch.stack(rows, dim=-1), state


def _chunked(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, resets: Tensor | None
) -> tuple[Tensor, Tensor]:
    u, delta, B, C = (x.permute(2, 0, 1).contiguous() for x in (u, delta, B, C))
    resets = None if resets is None else resets.t()
    out, state = _ChunkedScan.apply(u, delta, A.t().contiguous(), B, C, resets)
    return out.permute(1, 2, 0), state.transpose(1, 2)


class _ChunkedScan(torch.autograd.Function):
    """The recurrence on u, delta (L, B, D), A (N, D), B, C (L, B, N) -> out (L, B, D), last state (B, N, D).

    Time comes first, so that a step reads and writes one contiguous (B, N, D) block. All but the step itself is
    done for a chunk of rows at once. Only the state before each chunk is kept; backward makes the others again.
    """

    @staticmethod
    def forward(ctx, u, delta, A, B, C, resets):
        state = u.new_zeros(u.shape[1], *A.shape)
        out, driven = torch.empty_like(u), u * delta
        before = []
        chunks, (decays, inputs) = _chunks(u, A, arrays=2)
        for rows in chunks:
            before.append(state)
            delta_k = delta[rows]
            decay, states = decays[: len(delta_k)], inputs[: len(delta_k)]
            _decay_and_input(driven[rows], delta_k, A, B[rows], decay, states)
            _forget(decay, resets, rows)
            state = _run(decay.unbind(), states.unbind(), state).clone()  # the next chunk overwrites it
            _sum_states(C[rows], states, out[rows])
        ctx.save_for_backward(u, delta, A, B, C, resets, torch.stack(before))
        return out, state

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out, grad_state):
        u, delta, A, B, C, resets, before = ctx.saved_tensors
        grad_driven, grad_delta, grad_B, grad_C = (torch.empty_like(x) for x in (u, delta, B, C))
        grad_A = torch.zeros_like(A)
        grad_out, driven = grad_out.contiguous(), u * delta
        chunks, scratch = _chunks(u, A, arrays=3)
        for rows, start in reversed(list(zip(chunks, before.unbind(), strict=True))):
            delta_k, B_k, grad_k = delta[rows], B[rows], grad_out[rows]
            decay, states, grads = (array[: len(delta_k)] for array in scratch)
            _decay_and_input(driven[rows], delta_k, A, B_k, decay, states)
            _forget(decay, resets, rows)
            _run(decay.unbind(), states.unbind(), start)
            _sum_dims(grad_k, states, grad_C[rows])
            # the gradient of a state: from its own row, and from the next state through that one's decay
            torch.mul(C[rows].unsqueeze(-1), grad_k.unsqueeze(-2), out=grads)
            grads[-1] += grad_state
            grad_state = decay[0] * _run(decay.unbind()[:0:-1], grads.unbind()[-2::-1], grads[-1])
            _sum_states(B_k, grads, grad_driven[rows])
            _sum_dims(driven[rows], grads, grad_B[rows])
            # from here on `grads` is the gradient of the exponent, delta A
            grads[0] *= start
            grads[1:] *= states[:-1]
            grads *= decay
            torch.sum(torch.mul(grads, A, out=states), 2, out=grad_delta[rows])
            grad_A += grads.mul_(delta_k.unsqueeze(2)).sum((0, 1))
        grad_delta.addcmul_(grad_driven, u)
        return grad_driven.mul_(delta), grad_delta, grad_A, grad_B, grad_C, None


def _chunks(u: Tensor, A: Tensor, arrays: int) -> tuple[list[slice], tuple[Tensor, ...]]:
    """The rows of each chunk, and `arrays` empty (K, B, N, D) to work in: fresh ones for every chunk cost page
    faults, which can double the time."""
    L, K = len(u), max(_CHUNK_ROWS_MIN, _CHUNK_VALUES // (u.shape[1] * A.numel()))
    chunks = [slice(first, first + K) for first in range(0, L, K)]
    return chunks, u.new_empty(arrays, min(K, L), u.shape[1], *A.shape).unbind()


def _decay_and_input(
    driven: Tensor, delta: Tensor, A: Tensor, B: Tensor, decay: Tensor, added: Tensor
) -> None:
    """Writes for each row of a chunk what its state keeps of the one before, and what it adds to that."""
    torch.mul(delta.unsqueeze(2), A * _LOG2_E, out=decay).exp2_()  # a third of the time of exp on a CPU
    torch.mul(B.unsqueeze(-1), driven.unsqueeze(2), out=added)


def _forget(decay: Tensor, resets: Tensor | None, rows: slice) -> None:
    """A decay of nothing where a state starts anew: neither it nor a gradient passes that row."""
    if resets is not None:
        decay[resets[rows]] = 0


def _run(decay: Sequence[Tensor], added: Sequence[Tensor], state: Tensor) -> Tensor:
    """Turns what each step adds into the state after it, in place; returns the last."""
    for decay_l, state_l in zip(decay, added, strict=True):
        state = state_l.addcmul_(decay_l, state)
    return state


def _sum_states(weights: Tensor, states: Tensor, out: Tensor) -> None:
    """(K, B, N) and (K, B, N, D) -> (K, B, D)"""
    _row_times_matrix(weights, states, out)


def _sum_dims(weights: Tensor, states: Tensor, out: Tensor) -> None:
    """(K, B, D) and (K, B, N, D) -> (K, B, N); row times matrix is ten times as fast here as matrix times column."""
    _row_times_matrix(weights, states.transpose(-1, -2), out)


def _row_times_matrix(row: Tensor, matrix: Tensor, out: Tensor) -> None:
    torch.bmm(row.flatten(0, 1).unsqueeze(1), matrix.flatten(0, 1), out=out.flatten(0, 1).unsqueeze(1))
