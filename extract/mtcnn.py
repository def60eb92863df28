"""MTCNN's three nets in torch on the CPU, with the weights that lie in the `mtcnn` wheel: crops in, scores out."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import joblib
import numpy as np
import torch
from torch.nn import functional as F

Weights = list[torch.Tensor]


class Nets:
    """P-Net, R-Net and O-Net; each takes pictures (N, H, W, 3) uint8 RGB and gives arrays of N rows.

    files: the weights of the three as joblib wrote them. The wheel's own code is not used: it wants TensorFlow.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self._pnet, self._rnet, self._onet = ([_tensor(a) for a in joblib.load(file)] for file in files)

    @torch.inference_mode()
    def pnet(self, pictures: np.ndarray) -> tuple[np.ndarray, ...]:
        """(N, H, W, 3) -> score (N, h, w), box moves (N, 4, h, w); one output for every 12x12 pixels, 2 apart."""
        w = self._pnet
        x = F.max_pool2d(_conv(w, 0, _normal(pictures)), 2, 2, ceil_mode=True)
        x = _conv(w, 6, _conv(w, 3, x))
        return F.conv2d(x, w[11], w[12]).softmax(1)[:, 1].numpy(), F.conv2d(x, w[9], w[10]).numpy()

    @torch.inference_mode()
    def rnet(self, pictures: np.ndarray) -> tuple[np.ndarray, ...]:
        """(N, 24, 24, 3) -> score (N,), box moves (N, 4)."""
        w = self._rnet
        x = F.max_pool2d(_conv(w, 0, _normal(pictures)), 3, 2, ceil_mode=True)
        x = F.max_pool2d(_conv(w, 3, x), 3, 2)
        x = F.prelu(_dense(w, 9, _flat(_conv(w, 6, x))), w[11])
        return _dense(w, 14, x).softmax(1)[:, 1].numpy(), _dense(w, 12, x).numpy()

    @torch.inference_mode()
    def onet(self, pictures: np.ndarray) -> tuple[np.ndarray, ...]:
        """(N, 48, 48, 3) -> score (N,), box moves (N, 4), points (N, 10): five x, then five y, in parts of the box."""
        w = self._onet
        x = F.max_pool2d(_conv(w, 0, _normal(pictures)), 3, 2, ceil_mode=True)
        x = F.max_pool2d(_conv(w, 3, x), 3, 2)
        x = F.max_pool2d(_conv(w, 6, x), 2, 2, ceil_mode=True)
        x = F.prelu(_dense(w, 12, _flat(_conv(w, 9, x))), w[14])
        return _dense(w, 19, x).softmax(1)[:, 1].numpy(), _dense(w, 15, x).numpy(), _dense(w, 17, x).numpy()


def _tensor(array: np.ndarray) -> torch.Tensor:
    value = torch.from_numpy(np.asarray(array, np.float32))
    if value.ndim == 4:
        return value.permute(3, 2, 0, 1).contiguous(memory_format=torch.channels_last)
    return value.flatten() if value.ndim == 3 else value.contiguous()  # PReLU slopes; dense layers and biases


def _normal(pictures: np.ndarray) -> torch.Tensor:
    """(N, H, W, 3) uint8 -> (N, 3, H, W) float32 in about [-1, 1], channels last in memory."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float().sub_(127.5).div_(128)


def _conv(w: Weights, i: int, x: torch.Tensor) -> torch.Tensor:
    """Convolution and PReLU with the weights w[i], w[i+1], w[i+2]."""
    return F.prelu(F.conv2d(x, w[i], w[i + 1]), w[i + 2])


def _dense(w: Weights, i: int, x: torch.Tensor) -> torch.Tensor:
    return torch.addmm(w[i + 1], x, w[i])


def _flat(x: torch.Tensor) -> torch.Tensor:
    return x.permute(0, 3, 2, 1).flatten(1)  # width before height: the weights come from a column-major world
