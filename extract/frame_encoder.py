"""What frame encoders share: aligned crops through a torch network that is built at the first of them."""

from __future__ import annotations

import contextlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from ..store import Fingerprints
from .device import choose_device, choose_dtype
from .pixels import normalise, resize

if TYPE_CHECKING:
    import torch

_log = logging.getLogger(__name__)


class FrameEncoder(ABC):
    """Aligned faces in, embeddings out: crops (B, H, W, 3) uint8 RGB -> (B, dim) or (B, K, dim) float32.

    Planning a run that has nothing to do builds no network. wide: bfloat16 gains on a CPU too (see choose_dtype).
    Raises EncoderError for a device or dtype that is not to be had.
    """

    name: str
    eats = "crops"
    size: int  # input pixels
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __init__(
        self,
        weights: Path,
        dtype: str | None,
        device: str | None,
        fingerprints: Fingerprints | None,
        wide: bool,
    ) -> None:
        self.weights = weights
        self._asked_device = device
        if device is not None:
            choose_device(device, self.name)
        self.dtype = choose_dtype(dtype, device, wide, self.name)
        self._fingerprints = fingerprints or Fingerprints()
        self._joined: Self | None = None

    @abstractmethod
    def options(self) -> dict[str, Any]: ...
    @abstractmethod
    def recipe(self) -> dict[str, Any]: ...

    @abstractmethod
    def _built(self) -> Any:
        """The network, filled. Raises EncoderError where the weights do not fit."""

    @abstractmethod
    def __call__(self, crops: np.ndarray) -> np.ndarray: ...

    @cached_property
    def device(self) -> torch.device:
        return choose_device(self._asked_device, self.name)

    @cached_property
    def weights_sha256(self) -> str:
        return self._fingerprints.file(self.weights)

    @cached_property
    def dim(self) -> int:
        return int(self(np.zeros((1, self.size, self.size, 3), np.uint8)).shape[-1])

    def join(self, other: Self) -> None:
        """Take over the network of one that differs in nothing but its output."""
        self._joined = other

    @cached_property
    def _network(self) -> Any:
        if self._joined is not None:
            return self._joined._network
        _log.info("%s computes on %s in %s", self.name, self.device, self.dtype)
        return self._built().eval().requires_grad_(False).to(self.device)

    @contextlib.contextmanager
    def _computing(self) -> Iterator[None]:
        """Without gradients, in the chosen precision."""
        import torch

        with (
            torch.inference_mode(),
            torch.autocast(self.device.type, torch.bfloat16, self.dtype == "bfloat16"),
        ):
            yield

    def _images(self, crops: np.ndarray) -> torch.Tensor:
        """What the network takes, (B, 3, size, size) float32."""
        import torch

        return normalise(resize(torch.from_numpy(crops).to(self.device), self.size), self.mean, self.std)
