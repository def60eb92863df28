"""What blocks share about lines of rows: hiding what is masked, and keeping packed videos apart.

Shape legend: B lines, T rows of a line, D dims. mask (B, T) bool: True at the valid rows (None: all are).
start (B, T) bool: True at the first row of each video packed into a line (None: a line is one video).
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor


def hide(x: Tensor, mask: Tensor | None, dim: int = -1) -> Tensor:
    """x with zeros in the masked rows; `dim` is the one that mask lacks: (B, T, D) unless told."""
    return x if mask is None else x.masked_fill(~mask.unsqueeze(dim), 0)


def videos(start: Tensor) -> list[tuple[int, slice]]:
    """Line and rows of each packed video, line by line; row 0 begins one, marked or not."""
    parts = []
    for line, marks in enumerate(start.cpu()):
        edges = [0, *(marks[1:].nonzero().flatten() + 1).tolist(), len(marks)]
        parts += [(line, slice(a, b)) for a, b in pairwise(edges)]
    return parts


def rows_since_start(start: Tensor) -> Tensor:
    """(B, T) int64: how many rows of its own video come before each row."""
    row = torch.arange(start.shape[1], device=start.device)
    return row - torch.where(start, row, 0).cummax(1).values


def reversed_start(start: Tensor) -> Tensor:
    """`start` of the lines read backwards: a video then begins with its last row."""
    return F.pad(start[:, 1:], (0, 1), value=True).flip(1)


def any_in_video(mask: Tensor | None, start: Tensor | None) -> Tensor | None:
    """(B, T), or (B, 1) for all rows of a line: has the row's video any valid row? None without a mask."""
    if mask is None:
        return None
    if start is None:
        return mask.any(1, keepdim=True)
    video = F.pad(start[:, 1:], (1, 0)).cumsum(1)
    count = torch.zeros_like(video).scatter_add(1, video, mask.long())
    return count.gather(1, video) > 0


def with_gaps(
    run: Callable[[Tensor, Tensor | None], Tensor],
    x: Tensor,
    mask: Tensor | None,
    start: Tensor | None,
    gap: int,
) -> Tensor:
    """run(x, mask), (B, T, D) -> (B, T, D'), where no row sees one of another video in its line.

    For what reaches at most `gap` rows and takes a masked row for zeros: that many masked rows are put between
    videos, and those rows taken out of the result again. Without `start` it is run(x, mask) itself.
    """
    if start is None:
        return run(x, mask)
    before = F.pad(start[:, 1:], (1, 0)).cumsum(1)  # videos in the line before the row's own
    place = torch.arange(start.shape[1], device=start.device) + gap * before
    length = start.shape[1] + gap * int(before.max())
    valid = torch.ones_like(start) if mask is None else mask
    spread_valid = valid.new_zeros(len(x), length).scatter(1, place, valid)
    spread = x.new_zeros(len(x), length, x.shape[2]).scatter(1, place[..., None].expand_as(x), x)
    y = run(spread, spread_valid)
    return y.gather(1, place[..., None].expand(-1, -1, y.shape[2]))
