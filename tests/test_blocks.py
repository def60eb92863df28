"""The contract of every temporal block, and what single blocks can and cannot do."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from vacli.temporal.blocks import BLOCKS, TCN, Mamba, MambaStack

DATA = Path(__file__).parent / "data"
MAMBA = {"layers": 2, "state": 4, "conv": 4, "expand": 2}
# One or more ways to make every block; a newcomer's needs a line here, and is held to the contract below.
OPTIONS = [
    ("linear", {"dim": 7}),
    ("norm", {}),
    ("tcn", {"channels": [5, 7, 7], "width": 3, "dropout": 0.0}),
    ("tcn", {"channels": [7], "width": 4, "dropout": 0.0, "causal": False}),
    ("mamba", MAMBA),
]
CAUSAL = [option for option in OPTIONS if option[1].get("causal", True)]
B, T, DIM_IN = 2, 23, 6


def make(name, options):
    torch.manual_seed(0)
    return BLOCKS[name](DIM_IN, **options).double()


def rows(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def some_valid():
    mask = rows(B, T) > 0
    mask[:, 0], mask[0, -5:], mask[:, 9] = False, False, True
    return mask


def gradient_reach(block, x, row):
    """(T,) how much the output at `row` depends on each row of x (1, T, D)."""
    x = x.clone().requires_grad_()
    y = block(x)[0, row]
    (y @ rows(len(y)).to(y.dtype)).backward()  # not the sum: after a norm that is a constant
    return x.grad.abs().sum((0, 2))


def test_every_block_is_held_to_the_contract():
    assert {name for name, _ in OPTIONS} == set(BLOCKS)


@pytest.mark.parametrize(("name", "options"), OPTIONS)
class TestContract:
    @pytest.mark.parametrize("length", [1, 2, T])
    def test_gives_a_row_for_a_row(self, name, options, length):
        block = make(name, options)
        assert block(rows(B, length, DIM_IN)).shape == (B, length, block.dim)

    def test_an_all_true_mask_changes_nothing(self, name, options):
        block, x = make(name, options), rows(B, T, DIM_IN)
        torch.testing.assert_close(block(x, torch.ones(B, T, dtype=torch.bool)), block(x))

    @pytest.mark.parametrize("content", [0.0, 1e3, float("nan")])
    def test_a_masked_row_changes_nothing_elsewhere(self, name, options, content):
        block, x, mask = make(name, options), rows(B, T, DIM_IN), some_valid()
        results = []
        for seen in (x, x.masked_fill(~mask[..., None], content)):
            y = block(seen, mask)[mask]
            gradients = (
                torch.autograd.grad(y.sin().sum(), list(block.parameters())) if y.requires_grad else ()
            )
            results.append((y, *gradients))
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)

    def test_gradients_are_finite(self, name, options):
        block, mask = make(name, options), some_valid()
        x = rows(B, T, DIM_IN).requires_grad_()
        mask[1] = False  # a window where nothing was seen
        block(x, mask).square().sum().backward()
        for tensor in (x, *block.parameters()):
            assert tensor.grad is not None
            assert tensor.grad.isfinite().all()
        assert (x.grad[~mask] == 0).all()

    def test_state_dict_restores_the_block(self, name, options):
        block, x = make(name, options), rows(B, T, DIM_IN)
        twin = BLOCKS[name](DIM_IN, **options).double()
        twin.load_state_dict(block.state_dict())
        torch.testing.assert_close(twin(x), block(x), rtol=0, atol=0)


@pytest.mark.parametrize(("name", "options"), CAUSAL)
def test_a_causal_block_does_not_see_the_future(name, options):
    block, x = make(name, options), rows(B, T, DIM_IN)
    changed = x.clone()
    changed[:, 11] += 1
    before, after = block(x), block(changed)
    torch.testing.assert_close(before[:, :11], after[:, :11], rtol=0, atol=1e-12)
    if name != "norm":  # adding the same to every dim is what a norm takes away
        assert (before[:, 11] != after[:, 11]).any()


@pytest.mark.parametrize("width", [3, 4])
def test_a_centred_tcn_sees_both_ways(width):
    block = make("tcn", {"channels": [7], "width": width, "dropout": 0.0, "causal": False})
    seen = gradient_reach(block, rows(1, 21, DIM_IN), 10).nonzero().flatten()
    assert len(seen) == 1 + 2 * (width - 1)
    assert abs(seen.double().mean() - 10) < width - 2 + 1e-9


def test_a_tcn_sees_exactly_its_receptive_field():
    """1 + 2 (k - 1) (2^n - 1) rows, systems.md section 0: 121 for four levels of width 5."""
    torch.manual_seed(0)
    block = TCN(8, channels=[256] * 4, width=5, dropout=0.0).double()
    reach = gradient_reach(block, rows(1, 401, 8), 400)
    field = 1 + 2 * (5 - 1) * (2**4 - 1)
    assert (reach[: 401 - field] == 0).all()
    assert (reach[401 - field :] > 0).all()


def test_a_mamba_stack_remembers_what_a_tcn_cannot_see():
    """With the weights it begins with, row 0 still moves row 400, and not much less than row 200 does."""
    torch.manual_seed(0)
    block = MambaStack(64, layers=4, state=8, conv=4, expand=1)
    reach = gradient_reach(block, rows(1, 401, 64).float(), 400)
    assert reach[0] > 0.1 * reach[200] > 0


def test_mamba_gives_the_values_of_mamba_ssm():
    golden = np.load(DATA / "mamba_block.npz")
    weights = {k.removeprefix("param."): torch.tensor(golden[k]) for k in golden if k.startswith("param.")}
    block = Mamba(24, state=8, conv=4, expand=1)
    assert {k: v.shape for k, v in block.state_dict().items()} == {k: v.shape for k, v in weights.items()}
    block.load_state_dict(weights)
    x = torch.tensor(golden["x"])
    # y was stored in float32, so a float64 run can be no nearer than that
    np.testing.assert_allclose(block(x).detach().numpy(), golden["y"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(block.double()(x.double()).detach().numpy(), golden["y"], rtol=0, atol=1e-7)


def test_mamba_begins_with_steps_between_a_thousandth_and_a_tenth():
    torch.manual_seed(0)
    block = Mamba(64, state=8, conv=4, expand=2)
    step = nn.functional.softplus(block.dt_proj.bias)
    assert 1e-3 - 1e-6 < step.min() < 2e-3
    assert 5e-2 < step.max() < 0.1 + 1e-6
    torch.testing.assert_close(block.A_log.exp()[0], torch.arange(1.0, 9.0))


def test_a_mamba_stack_passes_over_masked_rows_as_if_time_had_stood_still():
    """With a convolution of one row, valid rows get the values they have without the masked ones between."""
    block = make("mamba", MAMBA | {"conv": 1})
    x, mask = rows(1, T, DIM_IN), some_valid()[:1]
    torch.testing.assert_close(block(x, mask)[mask], block(x[mask][None])[0])


def test_dropout_acts_in_training_only():
    for name, options in (("tcn", OPTIONS[2][1]), ("mamba", MAMBA)):
        block, x = make(name, options | {"dropout": 0.5}), rows(B, T, DIM_IN)
        assert (block(x) != block(x)).any()
        block.eval()
        torch.testing.assert_close(block(x), block(x), rtol=0, atol=0)


def test_blocks_learn():
    """Adam brings a delay of three rows below a fifth of the target's variance in 100 steps."""
    for name, options in (("tcn", {"channels": [32] * 2, "width": 3, "dropout": 0.0}), ("mamba", MAMBA)):
        torch.manual_seed(0)
        block = BLOCKS[name](DIM_IN, **options)
        head = nn.Linear(block.dim, 1)
        optimiser = torch.optim.Adam([*block.parameters(), *head.parameters()], 1e-2)
        for _ in range(100):
            x = torch.randn(16, 32, DIM_IN)
            loss = (head(block(x))[:, 3:, 0] - x[:, :-3, 0]).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        assert loss < 0.2, name
