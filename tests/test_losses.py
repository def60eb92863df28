"""The loss: what it is by the metric's own formula, what does not count in it, and its gradient beside a plain twin."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vacli.store.labels import ccc
from vacli.temporal.losses import va_loss
from vacli.temporal.preset import TrainSpec

BATCH, SEQUENCE = TrainSpec(ccc="batch"), TrainSpec(ccc="sequence")


def rows(lines: int, length: int, seed: int = 0, share: float = 0.7) -> tuple[torch.Tensor, ...]:
    """predicted and labels (B, L, 2) float64, the first with a gradient; labelled (B, L)."""
    torch.manual_seed(seed)
    labels = torch.rand(lines, length, 2, dtype=torch.float64) * 2 - 1
    predicted = (0.5 * labels + 0.3 * torch.randn_like(labels)).requires_grad_()
    return predicted, labels, torch.rand(lines, length) < share


def gradient(loss: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
    (found,) = torch.autograd.grad(loss, of)
    return found


def loss_of_parts(predicted, labels, labelled, parts: list[tuple[int, slice]]) -> torch.Tensor:
    """The plain twin: the metric of one sequence after the other, those with two labelled rows, and their mean."""
    found = []
    for line, where in parts:
        here = labelled[line, where]
        if here.sum() >= 2:
            x, y = predicted[line, where][here], labels[line, where][here]
            found.append(ccc(x, y, torch.ones(len(x), 1, dtype=x.dtype)))
    return (1 - torch.stack(found).mean(0)).sum()


def test_the_loss_of_a_batch_is_two_less_the_ccc_of_its_labelled_rows():
    predicted, labels, labelled = rows(2, 50)
    x, y = (v.detach()[labelled].numpy() for v in (predicted, labels))
    wanted = 2 - ccc(x, y, np.ones((len(x), 1))).sum()
    assert va_loss(predicted, labels, labelled, BATCH).item() == pytest.approx(wanted, abs=1e-12)


def test_the_squared_error_of_the_labelled_rows_stands_beside_it():
    predicted, labels, labelled = rows(2, 50)
    plain = va_loss(predicted, labels, labelled, BATCH)
    both = va_loss(predicted, labels, labelled, TrainSpec(mse=0.25))
    wanted = (predicted - labels)[labelled].square().mean()
    assert (both - plain).item() == pytest.approx(0.25 * wanted.item(), abs=1e-12)


def test_sequences_are_the_lines_each_by_itself():
    predicted, labels, labelled = rows(4, 30)
    labelled[1], labelled[2] = False, torch.arange(30) == 7  # none labelled; one, which has no concordance
    fast = va_loss(predicted, labels, labelled, SEQUENCE)
    plain = loss_of_parts(predicted, labels, labelled, [(line, slice(0, 30)) for line in range(4)])
    torch.testing.assert_close(fast, plain)
    torch.testing.assert_close(gradient(fast, predicted), gradient(plain, predicted), rtol=1e-10, atol=1e-12)


@given(st.integers(0, 10_000), st.lists(st.lists(st.integers(1, 9), min_size=1), min_size=1, max_size=3))
def test_packed_videos_are_each_by_itself_gradients_included(seed, packs):
    length = max(map(sum, packs))
    packs = [[*pack, length - sum(pack)] if sum(pack) < length else pack for pack in packs]
    predicted, labels, labelled = rows(len(packs), length, seed)
    labelled[0, :2] = True  # so that a sequence counts, where one can
    parts, start = [], torch.zeros(len(packs), length, dtype=torch.bool)
    for line, pack in enumerate(packs):
        for first, count in zip(np.cumsum([0, *pack]), pack, strict=False):
            parts.append((line, slice(int(first), int(first) + count)))
            start[line, first] = True
    fast = va_loss(predicted, labels, labelled, SEQUENCE, start)
    if not any(labelled[line, where].sum() >= 2 for line, where in parts):
        assert fast.item() == 2
        return
    plain = loss_of_parts(predicted, labels, labelled, parts)
    torch.testing.assert_close(fast, plain)
    torch.testing.assert_close(gradient(fast, predicted), gradient(plain, predicted), rtol=1e-8, atol=1e-10)


def test_where_one_video_is_a_line_both_ways_to_say_so_agree():
    predicted, labels, labelled = rows(3, 20)
    start = torch.zeros(3, 20, dtype=torch.bool)
    start[:, 0] = True
    one, other = (va_loss(predicted, labels, labelled, SEQUENCE, how) for how in (None, start))
    torch.testing.assert_close(one, other)
    torch.testing.assert_close(gradient(one, predicted), gradient(other, predicted))


@pytest.mark.parametrize("how", [{"ccc": "batch"}, {"ccc": "sequence"}, {"ccc": "sequence", "mse": 1.0}])
@pytest.mark.parametrize("packed", [False, True])
def test_a_row_without_label_counts_nowhere_whatever_it_holds(how: dict[str, Any], packed: bool):
    predicted, labels, labelled = rows(2, 20)
    start = torch.zeros(2, 20, dtype=torch.bool)
    start[:, 0], start[0, 11] = True, True
    found = []
    for odd in (0.0, 1e30, float("nan"), float("inf")):
        x = torch.where(labelled[..., None], predicted.detach(), odd).requires_grad_()
        y = torch.where(labelled[..., None], labels, odd)
        loss = va_loss(x, y, labelled, TrainSpec(**how), start if packed else None)
        found.append((loss.detach(), gradient(loss, x)))
    for loss, grad in found[1:]:
        assert torch.equal(loss, found[0][0])
        assert torch.equal(grad, found[0][1])
    assert not found[0][1][~labelled].any()
    assert found[0][1][labelled].all()


@pytest.mark.parametrize("how", [{"ccc": "batch"}, {"ccc": "sequence"}, {"ccc": "sequence", "mse": 1.0}])
@pytest.mark.parametrize("packed", [False, True])
def test_a_batch_without_labels_gives_2_and_a_zero_gradient(how: dict[str, Any], packed: bool):
    predicted, labels, labelled = rows(2, 5, share=0.0)
    start = torch.ones(2, 5, dtype=torch.bool) if packed else None
    loss = va_loss(predicted, labels, labelled, TrainSpec(**how), start)
    assert loss.item() == 2
    assert torch.equal(gradient(loss, predicted), torch.zeros(2, 5, 2))


def test_half_precision_is_summed_in_float32():
    predicted, labels, labelled = rows(2, 3000)
    exact = va_loss(predicted, labels, labelled, SEQUENCE).item()
    coarse = predicted.detach().bfloat16()
    found = va_loss(coarse, labels, labelled, SEQUENCE)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(exact, abs=1e-3)  # 3,000 squares summed in bfloat16 would be far off


def test_gradients_are_those_of_finite_differences():
    predicted, labels, labelled = rows(2, 6, seed=3)
    start = torch.tensor([[1, 0, 0, 1, 0, 0], [1, 0, 0, 0, 0, 0]], dtype=torch.bool)
    labelled[:, :2], labelled[0, 3:5] = True, True
    for how in (TrainSpec(mse=0.5), TrainSpec(ccc="sequence")):
        assert torch.autograd.gradcheck(
            lambda x, how=how: va_loss(x, labels, labelled, how, start), predicted
        )


@given(
    st.integers(0, 10_000),
    st.floats(-1, 1, width=32),
    st.sampled_from([torch.float32, torch.float64]),
    st.sampled_from([(BATCH, False), (SEQUENCE, False), (SEQUENCE, True)]),
)
def test_labels_that_never_move_have_no_gradient_at_all(seed, label, dtype, how):
    predicted, labels, labelled = rows(2, 40, seed)
    predicted = predicted.detach().to(dtype).requires_grad_()
    labels = torch.full_like(labels, label, dtype=dtype)
    start = torch.zeros(2, 40, dtype=torch.bool)
    start[:, 0], start[0, 17] = True, True
    spec, packed = how
    loss = va_loss(predicted, labels, labelled, spec, start if packed else None)
    assert loss.item() == 2
    assert torch.equal(gradient(loss, predicted), torch.zeros_like(predicted))


def test_labels_that_differ_by_little_far_from_zero_are_still_learnt_from_in_float32():
    labelled = rows(2, 40)[2]
    labels = 0.9 + 1e-6 * torch.randn(2, 40, 2, dtype=torch.float64)
    near = (labels + 1e-7 * torch.randn_like(labels)).float()
    labels = labels.float()  # what is left of them is what the exact sums are of
    exact = va_loss(near.double(), labels.double(), labelled, BATCH).item()
    assert va_loss(near, labels, labelled, BATCH).item() == pytest.approx(exact, abs=1e-5)
    start = torch.zeros(2, 40, dtype=torch.bool)
    start[:, 0], start[0, 17] = True, True
    exact = va_loss(near.double(), labels.double(), labelled, SEQUENCE, start).item()
    assert va_loss(near, labels, labelled, SEQUENCE, start).item() == pytest.approx(exact, abs=1e-5)
