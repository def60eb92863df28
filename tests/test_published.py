"""The published Mamba-VA network: its weights under its own names are ours, and give its numbers."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from vacli import VacliError
from vacli.temporal.model import Network
from vacli.temporal.preset import load_preset
from vacli.temporal.published import from_charon, read_charon

from .made_up import made_up

DATA = Path(__file__).parent / "data"
SHAPES = json.loads((DATA / "mamba_va_shapes.json").read_text())
UNUSED = ("mamba.adaptor.0.weight", "mamba.adaptor.0.bias")
# The later name of a tensor that the published network has twice, and the first.
TWINS = {
    f"temporal.network.{level}.{later}.{name}": f"temporal.network.{level}.{first}.{name}"
    for level in range(4)
    for later, first in (("net.0", "conv1"), ("net.2", "relu1"), ("net.4", "conv2"), ("net.6", "relu2"))
    for name in (("weight",) if "relu" in first else ("bias", "weight_g", "weight_v"))
}


def hollow(value=0.0):
    """A published state dict that takes no memory, one number everywhere."""
    return {name: torch.tensor(value).expand(shape) for name, shape in SHAPES.items()}


def network():
    return Network(load_preset("mamba-va"), {"mae": 1024}).eval()


@pytest.fixture(scope="module")
def published():
    """The whole published state dict, made up by the rule of the golden vectors; tied tensors are the same one."""
    tied = TWINS.values()
    meta = {name: torch.empty(shape, device="meta") for name, shape in SHAPES.items() if name not in tied}
    state = made_up(SimpleNamespace(state_dict=lambda: meta))
    return state | {first: state[later] for later, first in TWINS.items()}


def test_the_published_network_has_as_many_parameters_as_published():
    counted = sum(math.prod(shape) for name, shape in SHAPES.items() if name not in TWINS)
    assert counted == 67_155_598
    with torch.device("meta"):
        ours = network()
    stand_in = sum(p.numel() for p in ours.absent)
    unused = sum(math.prod(SHAPES[name]) for name in UNUSED)
    assert sum(p.numel() for p in ours.parameters()) == counted - unused + stand_in


def test_the_published_weights_give_the_published_numbers(published):
    """Within 1e-4 of the range of y: what float32 leaves, y being 1.7e-4 off a float64 run of the same network."""
    golden = np.load(DATA / "mamba_va_network.npz")
    ours = network()
    ours.load_state_dict(from_charon(published))
    x = torch.from_numpy(golden["x"])
    with torch.no_grad():
        y = ours({"mae": x}, {"mae": torch.ones(x.shape[:2], dtype=torch.bool)})["va"]
    assert np.abs(y.numpy() - golden["y"]).max() < 1e-4 * np.abs(golden["y"]).max()


def test_every_tensor_of_ours_comes_from_one_of_theirs():
    """Each of theirs filled with a number of its own; none is used twice, and only the unused adaptor is left out."""
    numbers = {name: i for i, name in enumerate(SHAPES)}
    ours = from_charon({name: torch.tensor(i).expand(SHAPES[name]) for name, i in numbers.items()})
    taken = [int(v.flatten()[0]) for name, v in ours.items() if not name.startswith(("absent", "encode"))]
    wanted = [i for name, i in numbers.items() if name not in (*TWINS.values(), *UNUSED)]
    assert sorted(taken) == wanted
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in network().state_dict().items()}
    assert {name: value.shape for name, value in ours.items()} == shapes


def test_either_name_of_a_tied_tensor_will_do_and_the_last_wins():
    state = hollow(1.0) | {name: hollow(2.0)[name] for name in TWINS}
    firsts = {name: value for name, value in state.items() if name not in TWINS}
    lasts = {name: value for name, value in state.items() if name not in TWINS.values()}
    assert [from_charon(s)["decode.0.levels.0.conv1.bias"][0] for s in (state, firsts, lasts)] == [2, 1, 2]


@pytest.mark.parametrize("prefix", ["module.", "model.net."])
def test_a_prefix_of_all_names_is_taken_off(prefix):
    bare = from_charon(hollow())
    prefixed = from_charon({prefix + name: value for name, value in hollow().items()})
    assert {k: v.shape for k, v in prefixed.items()} == {k: v.shape for k, v in bare.items()}


def small(value=0.0):
    """The state dict with a head of other units: a file of it has few bytes, and `misshapen` says it was read."""
    return {"dual_reg.2.bias": torch.full((3,), value), "dual_reg.2.weight": torch.zeros(2, 128)}


@pytest.mark.parametrize("wrapper", [(), ("state_dict",), ("model",), ("model", "state_dict")])
def test_a_file_is_read_with_or_without_a_wrapper(tmp_path, wrapper):
    state = small()
    for key in wrapper:
        state = {key: state, "epoch": 3}
    torch.save(state, tmp_path / "best.pth")
    with pytest.raises(
        VacliError, match=r"best.pth do not fit .*1 misshapen: dual_reg.2.bias \(3,\) for \(2,\)"
    ):
        read_charon(tmp_path / "best.pth")


def test_a_whole_file_is_read(tmp_path):
    torch.save({"state_dict": hollow(0.5)}, tmp_path / "best.pth")
    ours = read_charon(tmp_path / "best.pth")
    assert ours["tasks.va.2.bias"].tolist() == [0.5, 0.5]
    assert ours["absent.0"].tolist() == [0.0] * 1024


def test_safetensors_are_read(tmp_path):
    save_file(small(), tmp_path / "best.safetensors")
    with pytest.raises(VacliError, match=r"1 misshapen: dual_reg\.2\.bias"):
        read_charon(tmp_path / "best.safetensors")


def test_what_does_not_fit_is_listed_in_one_line():
    state = hollow()
    del state["mamba.mamba.proj.bias"]
    state["temporal.attention.weight"] = torch.zeros(2)
    state["dual_reg.0.weight"] = torch.zeros(128, 512)
    with pytest.raises(VacliError) as e:
        from_charon(state, "weights x.pth")
    assert str(e.value) == (
        "weights x.pth do not fit the published Mamba-VA network: 1 missing: mamba.mamba.proj.bias; "
        "1 unexpected: temporal.attention.weight; 1 misshapen: dual_reg.0.weight (128, 512) for (128, 256); "
        "wanted a state dict of Charon's"
    )


class Evil:
    def __reduce__(self):
        return print, ("run",)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (Evil(), "refused weights .* more than tensors"),
        ({"state_dict": {"a": 1.0}}, "hold no state dict"),
        ([torch.zeros(2)], "hold no state dict"),
        ({3: torch.zeros(2)}, "hold no state dict"),
        ({}, "missing: temporal.network.0"),
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path, capsys, content, said):
    torch.save(content, tmp_path / "odd.pth")
    with pytest.raises(VacliError, match=said):
        read_charon(tmp_path / "odd.pth")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", ["none.pth", "text.pth", "text.safetensors"])
def test_a_file_that_cannot_be_read_is_one_line(tmp_path, name):
    (tmp_path / "text.pth").write_text("these are no weights")
    (tmp_path / "text.safetensors").write_text("these are no weights")
    with pytest.raises(VacliError, match=r"^(cannot read|refused) weights .*") as e:
        read_charon(tmp_path / name)
    assert "\n" not in str(e.value)
