"""Attention along a line: it is the textbook's formula, blind where it should be, and safe where nothing is seen."""

import math

import pytest
import torch
from vacli.temporal import attention
from vacli.temporal.attention import CrossAttention, Transformer, attend, positions

B, T, DQ, DK = 2, 17, 6, 5


def rows(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def some_seen(seed=3):
    return rows(B, T, seed=seed) > 0


def packs():
    """Three videos in the first line, one of them of one row; two in the second."""
    start = torch.zeros(B, T, dtype=torch.bool)
    start[:, 0], start[0, 5], start[0, 6], start[1, 11] = True, True, True, True
    return start


def asking(**options):
    torch.manual_seed(0)
    return CrossAttention(DQ, DK, heads=2, **options).double()


def plain_attend(q, k, v, key_mask=None, start=None, *, causal=False, slopes=None):
    """One query after the other, from the formula: softmax(q k' / sqrt(E) - slope * rows apart) v over its keys."""
    found = torch.zeros_like(q)
    video = torch.zeros(B, T) if start is None else start[:, 1:].cumsum(1)
    if start is not None:
        video = torch.cat([torch.zeros(B, 1), video], dim=1)
    for b in range(B):
        for t in range(T):
            keys = [
                s
                for s in range(T)
                if (key_mask is None or key_mask[b, s])
                and video[b, s] == video[b, t]
                and (s <= t or not causal)
            ]
            if keys:
                score = torch.einsum("he,hse->hs", q[b, :, t], k[b][:, keys]) / math.sqrt(q.shape[-1])
                if slopes is not None:
                    score = score - slopes[:, None] * (torch.tensor(keys) - t).abs()
                found[b, :, t] = torch.einsum("hs,hse->he", score.softmax(-1), v[b][:, keys])
    return found


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("start", [None, packs()])
@pytest.mark.parametrize("mask", [None, some_seen(), torch.zeros(B, T, dtype=torch.bool)])
@pytest.mark.parametrize("near", [False, True])
def test_attention_is_the_formula_row_by_row(causal, start, mask, near, monkeypatch):
    """Gradients included; zeros, not NaN, where a row sees no key."""
    if near and causal:
        pytest.skip("no block wants both")
    monkeypatch.setattr(attention, "_QUERIES", 4)  # so that there are several parts
    slopes = torch.tensor([0.5, 0.125], dtype=torch.float64) if near else None
    results = []
    for function in (attend, plain_attend):
        inputs = [rows(B, 2, T, 3, seed=i).requires_grad_() for i in range(3)]
        y = function(*inputs, mask, start, causal=causal, slopes=slopes)
        gradients = torch.autograd.grad(y.sin().sum() + 0 * sum(x.sum() for x in inputs), inputs)
        results.append((y, *gradients))
    for fast, plain in zip(*results, strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("near", [False, True])
class TestCrossAttention:
    def test_a_masked_key_changes_nothing(self, gate, near):
        block, query, key, mask = asking(gate=gate, near=near), rows(B, T, DQ), rows(B, T, DK), some_seen()
        results = []
        for seen in (key, key.masked_fill(~mask[..., None], float("nan"))):
            y = block(query, seen, mask, packs())
            results.append((y, *torch.autograd.grad(y.sin().sum(), list(block.parameters()))))
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)

    @pytest.mark.parametrize("start", [None, packs()])
    def test_a_query_without_a_key_gets_exactly_nothing(self, gate, near, start):
        """A whole line, or one packed video of it, without a valid key: zeros there, finite gradients."""
        block, mask = asking(gate=gate, near=near), some_seen() | (torch.arange(T) == 13)
        mask[0, : T if start is None else 5] = False
        query = rows(B, T, DQ).requires_grad_()
        key = rows(B, T, DK).masked_fill(~mask[..., None], float("nan")).requires_grad_()
        y = block(query, key, mask, start)
        blind = torch.zeros(B, T, dtype=torch.bool)
        blind[0, : T if start is None else 5] = True
        if start is not None:
            blind[0, 5] = ~mask[0, 5]  # the video of one row
        assert (y[blind] == 0).all()
        assert (y[~blind] != 0).all()
        y.square().sum().backward()
        for tensor in (query, key, *block.parameters()):
            assert tensor.grad.isfinite().all()
        assert (key.grad[~mask] == 0).all()
        assert (query.grad[blind] == 0).all()

    def test_no_key_anywhere_is_zeros(self, gate, near):
        block, mask = asking(gate=gate, near=near), torch.zeros(B, T, dtype=torch.bool)
        y = block(rows(B, T, DQ), rows(B, T, DK) * float("nan"), mask)
        assert (y == 0).all()
        for gradient in torch.autograd.grad(y.sum(), list(block.parameters())):
            assert (gradient == 0).all()

    def test_a_packed_video_gets_what_it_gets_alone(self, gate, near):
        block, query, key, mask = asking(gate=gate, near=near), rows(B, T, DQ), rows(B, T, DK), some_seen()
        y = block(query, key, mask, packs())
        for line, part in ((0, slice(0, 5)), (0, slice(5, 6)), (0, slice(6, T)), (1, slice(0, 11))):
            here = (slice(line, line + 1), part)
            torch.testing.assert_close(y[here], block(query[here], key[here], mask[here]))

    def test_the_order_of_the_keys_counts_only_where_near_ones_count_more(self, gate, near):
        block, query, key, mask = asking(gate=gate, near=near), rows(B, T, DQ), rows(B, T, DK), some_seen()
        order = torch.randperm(T, generator=torch.Generator().manual_seed(5))
        shuffled, as_they_are = block(query, key[:, order], mask[:, order]), block(query, key, mask)
        assert torch.allclose(shuffled, as_they_are, rtol=1e-9, atol=1e-12) != near

    def test_a_row_sees_keys_before_and_after_it(self, gate, near):
        block, query, key = asking(gate=gate, near=near), rows(B, T, DQ), rows(B, T, DK).requires_grad_()
        (gradient,) = torch.autograd.grad(block(query, key)[:, 7].sin().sum(), key)
        assert (gradient[:, :7] != 0).any()
        assert (gradient[:, 8:] != 0).any()

    def test_an_all_true_mask_changes_nothing(self, gate, near):
        block, query, key = asking(gate=gate, near=near), rows(B, T, DQ), rows(B, T, DK)
        mask = torch.ones(B, T, dtype=torch.bool)
        torch.testing.assert_close(block(query, key, mask), block(query, key))
        torch.testing.assert_close(block(query, key, mask, packs()), block(query, key, None, packs()))

    def test_dropout_acts_in_training_only(self, gate, near):
        block, query, key = asking(gate=gate, near=near, dropout=0.5), rows(B, T, DQ), rows(B, T, DK)
        assert (block(query, key) != block(query, key)).any()
        block.eval()
        torch.testing.assert_close(block(query, key), block(query, key), rtol=0, atol=0)

    def test_runs_in_mixed_precision(self, gate, near):
        block, query, key, mask = asking(gate=gate, near=near), rows(B, T, DQ), rows(B, T, DK), some_seen()
        wanted = block(query, key, mask, packs()).float()
        block = block.float()
        with torch.autocast("cpu", torch.bfloat16):
            y = block(query.float(), key.float(), mask, packs()).float()
        assert (y - wanted).abs().mean() < 0.05 * wanted.abs().mean()
        y.sum().backward()


@pytest.mark.parametrize(("bias", "goes_to"), [(1e3, "query"), (-1e3, "attended")])
def test_the_gate_chooses_between_the_query_and_what_was_attended_to(bias, goes_to):
    gated, bare = asking(gate=True), asking()
    bare.load_state_dict({k: v for k, v in gated.state_dict().items() if not k.startswith("gate")})
    torch.nn.init.zeros_(gated.gate.weight)
    torch.nn.init.constant_(gated.gate.bias, bias)
    query, key = rows(B, T, DQ), rows(B, T, DK)
    wanted = query if goes_to == "query" else bare(query, key)
    torch.testing.assert_close(gated(query, key), wanted)


def test_heads_must_divide_the_dims():
    with pytest.raises(ValueError, match="4 heads do not divide 6 dims"):
        CrossAttention(6, 5, heads=4)
    with pytest.raises(ValueError, match="4 heads do not divide 6 dims"):
        Transformer(6, layers=1, heads=4, ff=8)


def test_positions_are_sines_of_the_place():
    place = torch.tensor([[0, 1, 700_000]])
    code = positions(place, 6)
    for i in range(3):
        for t, p in enumerate(place[0].tolist()):
            angle = p / 10_000 ** (2 * i / 6)
            assert code[0, t, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-6)
            assert code[0, t, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-6)
    assert positions(place, 5).shape == (1, 3, 5)


def test_a_transformer_takes_lines_of_any_length():
    torch.manual_seed(0)
    block = Transformer(6, layers=1, heads=2, ff=8)
    with torch.no_grad():
        assert block(torch.randn(1, 3000, 6)).isfinite().all()


def test_a_transformer_knows_the_order_of_rows():
    torch.manual_seed(0)
    block, x = Transformer(DQ, layers=1, heads=2, ff=8, causal=False).double(), rows(B, T, DQ)
    assert (block(x.flip(1)).flip(1) - block(x)).abs().max() > 0.01
