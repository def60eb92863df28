"""Augmentation: faces mirrored, moved, coloured and covered, each image by its own numbers, on the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch

_NUMBERS = 12  # drawn for each image; the columns are named in `augment`


@dataclass(frozen=True)
class Strength:
    """How much. Strengths are for aligned faces, whose expression has to stay what it was.

    flip: share of images mirrored. zoom, shift: up to so much larger or smaller, and moved, in shares of the side.
    colour: brightness, contrast and saturation each change by up to this share. erase: share of images of which a
    rectangle is covered; erase_area: least and most share of the picture that it has.
    """

    flip: float = 0.0
    zoom: float = 0.0
    shift: float = 0.0
    colour: float = 0.0
    erase: float = 0.0
    erase_area: tuple[float, float] = (0.02, 0.15)


LEVELS = {
    "none": None,
    "light": Strength(flip=0.5, shift=0.04),
    "full": Strength(flip=0.5, zoom=0.1, shift=0.06, colour=0.3, erase=0.25),
}


def numbers(images: int, seed: int) -> torch.Tensor:
    """What decides the augmentation of so many images: (images, 12) in [0, 1), on the CPU; the same for a seed."""
    return torch.rand(images, _NUMBERS, generator=torch.Generator().manual_seed(seed))


def augment(images: torch.Tensor, drawn: torch.Tensor, strength: Strength | None) -> torch.Tensor:
    """(B, 3, H, W) in [0, 255], uint8 or float -> the same in float32, each image changed by its row of `drawn`.

    drawn: of `numbers`. Without a strength the images come back as they are. Expression is told by the mouth's and
    the brows' shape: no rotation, as the faces are aligned, and never more than a few pixels cut off.
    """
    if strength is None:
        return images
    flip, zoom, x, y, *rest = drawn.to(images.device, non_blocking=True).unbind(1)
    moved = _moved(images.float(), flip < strength.flip, 2 * torch.stack([zoom, x, y]) - 1, strength)
    if strength.colour:
        moved = _coloured(moved, 1 + strength.colour * (2 * torch.stack(rest[:3]) - 1))
    return _erased(moved, rest[3:], strength) if strength.erase else moved


def _moved(
    images: torch.Tensor, mirrored: torch.Tensor, moves: torch.Tensor, strength: Strength
) -> torch.Tensor:
    """Mirrored, zoomed and shifted in one sampling; what comes in from beyond the edge repeats the edge.

    mirrored: (B,) bool. moves: (3, B) in [-1, 1], shares of the most that may be: zoom, across, down.
    """
    zoom, x, y = moves
    if not (strength.zoom or strength.shift):
        return torch.where(mirrored.view(-1, 1, 1, 1), images.flip(-1), images)
    sign = torch.where(mirrored, -1.0, 1.0)
    scale = (1 + strength.zoom) ** -zoom  # as often larger as smaller
    nil = torch.zeros_like(scale)
    across = torch.stack([sign * scale, nil, 2 * strength.shift * x], dim=1)
    down = torch.stack([nil, scale, 2 * strength.shift * y], dim=1)
    grid = torch.nn.functional.affine_grid(
        torch.stack([across, down], dim=1), list(images.shape), align_corners=False
    )
    return torch.nn.functional.grid_sample(images, grid, padding_mode="border", align_corners=False)


def _coloured(images: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """factors (3, B): of the light, of the distance from the mean grey, of that from each pixel's grey."""
    brightness, contrast, saturation = factors.view(3, -1, 1, 1, 1)
    weights = torch.tensor([0.299, 0.587, 0.114], device=images.device).view(1, 3, 1, 1)
    images = images * brightness
    grey = (images * weights).sum(1, keepdim=True)
    images = grey + saturation * (images - grey)
    middle = grey.mean((2, 3), keepdim=True)
    return (middle + contrast * (images - middle)).clamp(0, 255)


def _erased(images: torch.Tensor, drawn: list[torch.Tensor], strength: Strength) -> torch.Tensor:
    """A rectangle of some images becomes their mean colour (Zhong et al. 2020, with a mean instead of noise)."""
    chosen, area, aspect, x, y = drawn
    height, width = images.shape[-2:]
    low, high = strength.erase_area
    area = low + (high - low) * area
    aspect = 3.0 ** (2 * aspect - 1)  # from three times as wide as high to the other way round
    tall, wide = height * (area * aspect).sqrt(), width * (area / aspect).sqrt()
    top, left = y * (height - tall), x * (width - wide)
    rows = torch.arange(height, device=images.device) + 0.5
    columns = torch.arange(width, device=images.device) + 0.5
    down = (rows >= top[:, None]) & (rows < (top + tall)[:, None])
    across = (columns >= left[:, None]) & (columns < (left + wide)[:, None])
    covered = down[:, :, None] & across[:, None, :] & (chosen < strength.erase).view(-1, 1, 1)
    return torch.where(covered[:, None], images.mean((2, 3), keepdim=True), images)
