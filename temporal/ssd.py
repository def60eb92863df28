"""The state-space duality of Mamba-2: a plain loop over time, and a twin made of matrix products over chunks of rows.

Shape legend: B windows, T rows of time, H heads, P dims of a head, N states; c chunks of Q rows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Recurrence = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], Tensor]


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    resets: Tensor | None = None,
    chunk: int = 64,
) -> Tensor:
    """The state-space recurrence with one decay a head (Dao & Gu 2024, section 6), chunks of it as matrix products.

        h[t] = exp(dt[t] A) h[t-1] + dt[t] B[t] x[t]^T,  h[-1] = 0      h: (N, P) of each window and head
        y[t] = C[t]^T h[t] + D x[t]                                     the second part optional

    x: (B, T, H, P), T at least 1. dt: (B, T, H), after the softplus; a row of dt = 0 leaves the state alone.
    A: (H,), negative. B, C: (B, T, N), the same for all heads. D: (H,).
    resets: (B, T) bool, True where h[t-1] counts as zero, the first row of a video packed behind others.
    chunk: rows of a chunk; the work beside the products grows with it, the number of steps falls.

    Returns y (B, T, H, P) in x's dtype; the recurrence runs in float32, or in float64 if x is, autocast or not.
    """

    def recurrence(log_decay: Tensor, driven: Tensor, B: Tensor, C: Tensor, resets: Tensor | None) -> Tensor:
        return _chunked(log_decay, driven, B, C, resets, chunk)

    return _scan(recurrence, x, dt, A, B, C, D, resets)


def ssd_scan_ref(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    resets: Tensor | None = None,
) -> Tensor:
    """The plain twin of `ssd_scan`: same meaning, autograd through a loop over time."""
    return _scan(_loop, x, dt, A, B, C, D, resets)


def _scan(
    recurrence: Recurrence,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    resets: Tensor | None,
) -> Tensor:
    """What stands around the recurrence, the same for both twins."""
    out_dtype = x.dtype
    dtype = torch.promote_types(out_dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        x, dt, A, B, C = (v.to(dtype) for v in (x, dt, A, B, C))
        y = recurrence(dt * A, x * dt.unsqueeze(-1), B, C, resets)
        if D is not None:
            y = torch.addcmul(y, x, D.to(dtype)[:, None])
    return y.to(out_dtype)


def _loop(log_decay: Tensor, driven: Tensor, B: Tensor, C: Tensor, resets: Tensor | None) -> Tensor:
    state = driven.new_zeros(len(B), driven.shape[2], B.shape[2], driven.shape[3])  # (B, H, N, P)
    if resets is None:
        resets = torch.zeros(B.shape[:2], dtype=torch.bool, device=B.device)
    rows = []
    for decay_t, driven_t, B_t, C_t, reset_t in zip(
        *(v.unbind(1) for v in (log_decay.exp(), driven, B, C, resets)), strict=True
    ):
        state = state.masked_fill(reset_t[:, None, None, None], 0)
        state = decay_t[..., None, None] * state + B_t[:, None, :, None] * driven_t.unsqueeze(2)
        rows.append((C_t[:, None, :, None] * state).sum(2))
    return torch.stack(rows, dim=1)


def _chunked(
    log_decay: Tensor, driven: Tensor, B: Tensor, C: Tensor, resets: Tensor | None, chunk: int
) -> Tensor:
    """Rows see those of their own chunk through a (Q, Q) matrix, and all before it through the state at its border."""
    T, heads = driven.shape[1], driven.shape[2:]
    Q = min(chunk, T)
    log_decay, driven, B, C = (_cut(v, Q) for v in (log_decay, driven, B, C))
    within, since_border = _decays(log_decay.transpose(2, 3).contiguous())
    if resets is not None:
        within, since_border = _forget(within, since_border, _cut(resets.cumsum(1), Q))
    to_end = within[..., -1, :].transpose(2, 3)  # (B, c, Q, H)
    added = B.transpose(2, 3) @ (driven * to_end.unsqueeze(-1)).flatten(3)  # (B, c, N, H P)
    before = _carry(added.unflatten(3, heads), since_border[..., -1])
    from_before = (C @ before.flatten(3)).unflatten(3, heads) * since_border.transpose(2, 3).unsqueeze(-1)
    mixing = (C @ B.transpose(2, 3)).unsqueeze(2) * within  # (B, c, H, Q, Q)
    y = from_before + (mixing @ driven.transpose(2, 3)).transpose(2, 3)
    return y.flatten(1, 2)[:, :T]


def _cut(rows: Tensor, Q: int) -> Tensor:
    """(B, T, ...) -> (B, c, Q, ...), with rows of zeros behind the last: no time passes there."""
    missing = -rows.shape[1] % Q
    return F.pad(rows, (*(0, 0) * (rows.ndim - 2), 0, missing)).unflatten(1, (-1, Q))


def _decays(log_decay: Tensor) -> tuple[Tensor, Tensor]:
    """(B, c, H, Q) -> what a row keeps of each row of its chunk (B, c, H, Q, Q), and of the state before the chunk.

    Every exponent is a sum of its own rows alone: differences of cumulative sums would lose what is small beside
    what came before, and dividing their exponentials overflows (the paper's `segsum`).
    """
    Q = log_decay.shape[-1]
    later = torch.ones(Q, Q, dtype=torch.bool, device=log_decay.device).tril(-1)
    exponent = log_decay.unsqueeze(-1).expand(*log_decay.shape, Q).masked_fill(~later, 0).cumsum(-2)
    past = later.logical_or(torch.eye(Q, dtype=torch.bool, device=later.device))
    return exponent.masked_fill(~past, -torch.inf).exp(), log_decay.cumsum(-1).exp()


def _forget(within: Tensor, since_border: Tensor, video: Tensor) -> tuple[Tensor, Tensor]:
    """Nothing is kept of another video's rows. video: (B, c, Q), which one of its line a row belongs to."""
    before = F.pad(video[:, :-1, -1], (1, 0)).unsqueeze(-1)  # that of the row before the chunk
    other = video.unsqueeze(-1) != video.unsqueeze(-2)
    return (
        within.masked_fill(other.unsqueeze(2), 0),
        since_border.masked_fill((video != before).unsqueeze(2), 0),
    )


def _carry(added: Tensor, kept: Tensor) -> Tensor:
    """The state before each chunk, of what each adds (B, c, N, H, P) and keeps (B, c, H) of the one before it."""
    state = torch.zeros_like(added[:, 0])
    before = []
    for added_c, kept_c in zip(added.unbind(1), kept.unbind(1), strict=True):
        before.append(state)
        state = torch.addcmul(added_c, state, kept_c[:, None, :, None])
    return torch.stack(before, dim=1)
