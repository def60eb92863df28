"""Weights of the published Mamba-VA network under its own names, made into those of our preset `mamba-va`.

The published network (github.com/FreedomPuppy77/Charon) and ours, in the order in which they run; * is any number:

    published                              ours
    temporal.network.*.net.0, .net.4       decode.0.levels.*.conv1, .conv2      TCN
        weight_g, weight_v                     parametrizations.weight.original0, .original1
    temporal.network.*.net.2, .net.6       decode.0.levels.*.act1, .act2
    temporal.network.*.downsample          decode.0.levels.*.skip
    temporal.network.*.relu                decode.0.levels.*.act
    (InstanceNorm1d, has no weights)       decode.1                             norm
    mamba.mamba.layers.*.0                 decode.2.mixers.*                    mamba
    mamba.mamba.layers.*.1                 decode.2.norms.*
    mamba.mamba.proj                       decode.3.map                         linear
    dual_reg.0, dual_reg.2                 tasks.va.0, tasks.va.2               the head

The published network holds each convolution and activation of its TCN under two names, `conv1` and `net.0`. Where a
file has both, the last is taken, as torch does that loads them one after the other. Its `mamba.adaptor.0`, 512 of its
67,155,598 parameters, has no part in what it computes (golden/mamba_va_network.npz) and is left out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import VacliError
from .model import Network
from .preset import load_preset
from .vgg import read_weights

_DIM = 1024  # of the MAE features that it reads
_NEUTRAL = {  # what the published network has no counterpart of: an unseen row is zeros, a stream comes as it is
    "absent.0": torch.zeros(_DIM),
    "encode.0.mean": torch.zeros(_DIM),
    "encode.0.deviation": torch.ones(_DIM),
}

# from our names to theirs, one after the other
_RENAMED = (
    (r"^decode\.0\.levels\.(\d)\.", r"temporal.network.\1."),
    (r"\.conv1\.", ".net.0."),
    (r"\.act1\.", ".net.2."),
    (r"\.conv2\.", ".net.4."),
    (r"\.act2\.", ".net.6."),
    (r"\.act\.", ".relu."),
    (r"\.skip\.", ".downsample."),
    (r"parametrizations\.weight\.original0$", "weight_g"),
    (r"parametrizations\.weight\.original1$", "weight_v"),
    (r"^decode\.2\.mixers\.(\d)\.", r"mamba.mamba.layers.\1.0."),
    (r"^decode\.2\.norms\.(\d)\.", r"mamba.mamba.layers.\1.1."),
    (r"^decode\.3\.map\.", "mamba.mamba.proj."),
    (r"^tasks\.va\.", "dual_reg."),
)
_TWICE = {".net.0.": ".conv1.", ".net.2.": ".relu1.", ".net.4.": ".conv2.", ".net.6.": ".relu2."}
_UNUSED = {"mamba.adaptor.0.weight", "mamba.adaptor.0.bias"}
_WRAPPERS = ("state_dict", "model_state_dict", "model")


def from_charon(state: Mapping[str, Tensor], source: str = "the weights") -> dict[str, Tensor]:
    """A published state dict -> the whole one of Network(preset `mamba-va`, {"mae": 1024}), for load_state_dict.

    A prefix that all names share ("module.", of nn.DataParallel) is taken off.
    Raises VacliError, which begins with `source`, for names missing or unexpected and for shapes of another network.
    """
    state = _without_prefix(state)
    ours = _shapes()
    theirs = {name: _published(name) for name in ours}
    known = {*theirs.values(), *map(_second_name, theirs.values()), *_UNUSED}
    found = {name: state.get(p, state.get(_second_name(p))) for name, p in theirs.items()}
    faults = {
        "missing": [theirs[name] for name, value in found.items() if value is None],
        "unexpected": [name for name in state if name not in known],
        "misshapen": [
            f"{theirs[name]} {tuple(value.shape)} for {tuple(ours[name])}"
            for name, value in found.items()
            if value is not None and value.shape != ours[name]
        ],
    }
    if any(faults.values()):
        said = "; ".join(f"{len(names)} {fault}: {_some(names)}" for fault, names in faults.items() if names)
        raise VacliError(
            f"{source} do not fit the published Mamba-VA network: {said}; wanted a state dict of Charon's"
        )
    neutral = {name: value.clone() for name, value in _NEUTRAL.items()}
    return neutral | {name: value for name, value in found.items() if value is not None}


def read_charon(file: Path | str) -> dict[str, Tensor]:
    """`from_charon` of a file: .safetensors, or torch's, with or without a wrapper such as {"state_dict": ...}.

    Nothing in the file is run. Raises VacliError for what cannot be read, holds more than tensors, or does not fit.
    """
    file = Path(file)
    tensors = _unwrapped(read_weights(file))
    if not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in tensors.items()):
        raise VacliError(
            f"weights {file} hold no state dict of tensors; wanted the published network's file; get it again"
        )
    return from_charon(tensors, f"weights {file}")


def _unwrapped(state: object) -> dict[Any, Any]:
    """The innermost dict under the keys of a checkpoint; anything but a dict is one entry that is no tensor's."""
    if not isinstance(state, dict):
        return {None: state}
    inner = next((state[key] for key in _WRAPPERS if isinstance(state.get(key), dict)), None)
    return state if inner is None else _unwrapped(inner)


def _shapes() -> dict[str, torch.Size]:
    """Our names and shapes that have a published counterpart."""
    with torch.device("meta"):
        network = Network(load_preset("mamba-va"), {"mae": _DIM})
    return {name: value.shape for name, value in network.state_dict().items() if name not in _NEUTRAL}


def _published(name: str) -> str:
    for ours, theirs in _RENAMED:
        name = re.sub(ours, theirs, name)
    return name


def _second_name(published: str) -> str:
    """The other name of a tensor that is there twice, else its own."""
    for name, twin in _TWICE.items():
        if published.startswith("temporal.network."):
            published = published.replace(name, twin)
    return published


def _without_prefix(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    landmark = "dual_reg.2.bias"
    name = next((name for name in state if name.endswith(f".{landmark}")), landmark)
    prefix = name.removesuffix(landmark)
    if not all(name.startswith(prefix) for name in state):
        return dict(state)
    return {name.removeprefix(prefix): value for name, value in state.items()}


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
