"""The loss of valence and arousal: one less the concordance, over a batch or of each sequence, and a squared error."""

from __future__ import annotations

import torch
from torch import Tensor

from ..store.labels import ccc
from .lines import rows_since_start
from .preset import TrainSpec

# Shape legend: B lines (windows, or packs of whole videos), L rows, K targets, S sequences.


def va_loss(
    predicted: Tensor, labels: Tensor, labelled: Tensor, spec: TrainSpec, start: Tensor | None = None
) -> Tensor:
    """(1 - CCC_valence) + (1 - CCC_arousal) (Mamba-VA, eq. 5), and spec.mse times the mean squared error.

    predicted, labels: (B, L, 2). labelled: (B, L) bool; a row that is not counts nowhere, whatever it holds.
    spec.ccc: over all labelled rows together, or the mean over the sequences with at least two labelled rows: every
    line or, by start (B, L) bool, every video packed into a line. The sums run in float32 at least.
    Without any label the loss is 2, with a zero gradient. Waits for no device.
    """
    predicted = predicted.masked_fill(~labelled[..., None], 0)  # an unseen row may hold anything, NaN too
    labels = labels.masked_fill(~labelled[..., None], 0)
    if predicted.dtype != torch.float64:
        predicted, labels = predicted.float(), labels.float()
    weight = labelled[..., None].to(predicted.dtype)
    if spec.ccc == "batch":
        found = ccc(predicted.flatten(0, 1), labels.flatten(0, 1), weight.flatten(0, 1))
    else:
        found = _mean_over_sequences(predicted, labels, weight, start)
    loss = (1 - found).sum()
    if spec.mse:
        loss = loss + spec.mse * (predicted - labels).square().mean(-1).sum() / weight.sum().clamp_min(1)
    return loss


def _mean_over_sequences(predicted: Tensor, labels: Tensor, weight: Tensor, start: Tensor | None) -> Tensor:
    """(K,): the mean CCC of the sequences that have two labelled rows; 0 without any."""
    if start is None:
        found = ccc(*(x.transpose(0, 1) for x in (predicted, labels, weight)))  # over the rows: (B, K)
        rows = weight.sum(1)
    else:
        found, rows = _ccc_of_packed(predicted, labels, weight, start)
    counts = (rows >= 2).to(found.dtype)
    return (found * counts).sum(0) / counts.sum().clamp_min(1)


def _ccc_of_packed(predicted: Tensor, labels: Tensor, weight: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """CCC (S, K) and labelled rows (S, 1) of every packed video, in a place for each row: that of its video's first.

    The formula of labels.ccc with sums by video, from each video's first labelled row on; how many videos there are is
    known on the device alone.
    """
    B, L = start.shape
    video = torch.arange(B * L, device=start.device) - rows_since_start(start).flatten()
    x, y, w = (v.flatten(0, 1) for v in (predicted, labels, weight))

    def total(values: Tensor) -> Tensor:
        return values.new_zeros(B * L, values.shape[1]).index_add(0, video, values)

    rows = total(w)
    n = rows.clamp_min(1)
    labelled = w.long().cumsum(0)
    first = w * (labelled - (labelled - w.long())[video] == 1)
    first_x, first_y = total(first * x), total(first * y)
    dx, dy = w * (x - first_x[video]), w * (y - first_y[video])
    shift_x, shift_y = total(dx) / n, total(dy) / n
    dx, dy = dx - w * shift_x[video], dy - w * shift_y[video]
    spread = total(dx * dx) / n + total(dy * dy) / n + (first_x - first_y + (shift_x - shift_y)) ** 2
    return 2 * (total(dx * dy) / n) / (spread + (spread == 0)), rows
