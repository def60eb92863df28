"""Made-up weights that say something: the rule by which the golden vectors of ../shared/golden were computed."""

from __future__ import annotations

import zlib

import numpy as np
import torch


def made_up(network: torch.nn.Module, gain: float = 1.0) -> dict[str, torch.Tensor]:
    """A state dict, each entry from a random state seeded by its name; gain: 0.5 for IResNet."""
    state = {}
    for name, entry in network.state_dict().items():
        random = np.random.RandomState(zlib.crc32(name.encode()))
        shape = tuple(entry.shape)
        if name.endswith("num_batches_tracked"):
            values = np.zeros(shape)
        elif name.endswith("running_var"):
            values = 0.5 + random.rand(*shape)
        elif name.endswith("running_mean"):
            values = 0.1 * random.randn(*shape)
        elif entry.ndim <= 1:
            values = 0.05 * random.randn(*shape) + name.endswith("weight")
        else:
            values = random.randn(*shape) * np.sqrt(1.6 / np.prod(shape[1:])) * gain
        state[name] = torch.from_numpy(np.asarray(values, np.float32))
    return state
