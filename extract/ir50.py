"""The two ResNet-50-IR face networks, with the parameter names that their published weights have."""

from __future__ import annotations

import torch
from torch import nn

DIM = 512
_STAGES = ((64, 3), (128, 4), (256, 14), (512, 3))  # width, blocks


def _conv(width_in: int, width: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(width_in, width, 3, stride, 1, bias=False)


def _shortcut(width_in: int, width: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(width_in, width, 1, stride, bias=False), nn.BatchNorm2d(width))


class ArcFaceBlock(nn.Module):
    """Norm, convolution, norm, PReLU, convolution, norm; the shortcut is a convolution where the picture shrinks."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(width_in)
        self.conv1 = _conv(width_in, width)
        self.bn2 = nn.BatchNorm2d(width)
        self.prelu = nn.PReLU(width)
        self.conv2 = _conv(width, width, stride)
        self.bn3 = nn.BatchNorm2d(width)
        self.downsample = _shortcut(width_in, width, stride) if stride > 1 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.prelu(self.bn2(self.conv1(self.bn1(x))))
        return self.bn3(self.conv2(y)) + self.downsample(x)


class ArcFaceIR50(nn.Module):
    """iresnet50 of InsightFace's arcface_torch: (B, 3, 112, 112) -> (B, 512); every stage halves the picture."""

    def __init__(self) -> None:
        super().__init__()
        width_in = _STAGES[0][0]
        self.conv1, self.bn1, self.prelu = _conv(3, width_in), nn.BatchNorm2d(width_in), nn.PReLU(width_in)
        for stage, (width, blocks) in enumerate(_STAGES, 1):
            first = ArcFaceBlock(width_in, width, 2)
            others = (ArcFaceBlock(width, width, 1) for _ in range(blocks - 1))
            self.add_module(f"layer{stage}", nn.Sequential(first, *others))
            width_in = width
        self.bn2 = nn.BatchNorm2d(width_in)
        self.fc = nn.Linear(width_in * 7 * 7, DIM)
        self.features = nn.BatchNorm1d(DIM)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.prelu(self.bn1(self.conv1(x)))
        for stage in range(1, len(_STAGES) + 1):
            x = self.get_submodule(f"layer{stage}")(x)
        return self.features(self.fc(self.bn2(x).flatten(1)))


class UstcBlock(nn.Module):
    """Norm, convolution, PReLU, convolution, norm; the shortcut is a convolution where the width grows."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.shortcut_layer = nn.Identity() if width_in == width else _shortcut(width_in, width, stride)
        self.res_layer = nn.Sequential(
            nn.BatchNorm2d(width_in),
            _conv(width_in, width),
            nn.PReLU(width),
            _conv(width, width, stride),
            nn.BatchNorm2d(width),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.res_layer(x) + self.shortcut_layer(x)


class UstcIR50(nn.Module):
    """The IR-50 of sucv/ABAW3: (B, 3, 40, 40) -> (B, 512) of length 1; the first stage keeps the size, 5x5 remain."""

    def __init__(self) -> None:
        super().__init__()
        width_in = _STAGES[0][0]
        self.input_layer = nn.Sequential(_conv(3, width_in), nn.BatchNorm2d(width_in), nn.PReLU(width_in))
        body: list[nn.Module] = []
        for width, blocks in _STAGES:
            body.append(UstcBlock(width_in, width, 1 if width_in == width else 2))
            body += [UstcBlock(width, width, 1) for _ in range(blocks - 1)]
            width_in = width
        self.body = nn.Sequential(*body)
        self.output_layer = nn.Sequential(  # the dropout of training has no weights, but a number
            nn.BatchNorm2d(width_in),
            nn.Identity(),
            nn.Flatten(),
            nn.Linear(width_in * 5 * 5, DIM),
            nn.BatchNorm1d(DIM),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.normalize(self.output_layer(self.body(self.input_layer(x))).float())
