"""Crops made into a network's input: the one resize of all frame encoders, and the normalisation."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

RESIZE = "torch bicubic antialiased uint8"  # its name in recipes


def resize(crops: torch.Tensor, size: int) -> torch.Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, size, size) uint8; the one resize of all frame encoders.

    Within 1 level of PIL's bicubic.
    """
    import torch

    images = crops.permute(0, 3, 1, 2)
    if images.shape[-2:] == (size, size):
        return images
    pixels = images if images.device.type == "cpu" else images.float()  # torch resizes bytes on the CPU only
    resized = torch.nn.functional.interpolate(pixels, size=(size, size), mode="bicubic", antialias=True)
    return resized if resized.dtype == torch.uint8 else resized.round_().clamp_(0, 255).to(torch.uint8)


def normalise(images: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    """uint8 (B, 3, H, W) -> float32, (x / 255 - mean) / std by channel."""
    import torch

    scale = 1.0 / (255.0 * torch.tensor(std, device=images.device)).view(1, 3, 1, 1)
    shift = (torch.tensor(mean, device=images.device) / torch.tensor(std, device=images.device)).view(
        1, 3, 1, 1
    )
    return images.float() * scale - shift
