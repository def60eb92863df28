"""Each image is changed by its own numbers, by no more than was said, and in the same way whoever computes it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from vacli.extract.augment import LEVELS, Strength, augment, numbers


def faces(count: int = 8, side: int = 48) -> torch.Tensor:
    """Smooth pictures (count, 3, side, side) uint8, none like another."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 6, 6, generator=generator) * 255
    smooth = torch.nn.functional.interpolate(coarse, size=side, mode="bicubic", align_corners=False)
    return smooth.clamp(0, 255).to(torch.uint8)


def test_no_augmentation_gives_the_very_same_bytes():
    images = faces()
    assert augment(images, numbers(8, 0), LEVELS["none"]) is images


def test_a_seed_gives_the_same_images_and_another_one_others():
    images = faces()
    for strength in (LEVELS["light"], LEVELS["full"]):
        a, b, c = (augment(images, numbers(8, seed), strength) for seed in (1, 1, 2))
        assert torch.equal(a, b)
        assert (a != c).flatten(1).any(1).all()


@pytest.mark.parametrize("level", ["light", "full"])
def test_each_image_is_changed_by_its_own_numbers_whatever_stands_beside_it(level):
    images, drawn = faces(), numbers(8, 3)
    together = augment(images, drawn, LEVELS[level])
    for i in range(8):
        alone = augment(images[i : i + 1], drawn[i : i + 1], LEVELS[level])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-3)
    alike = augment(images[:1].expand(8, -1, -1, -1), drawn, LEVELS[level])
    assert len({x.numpy().tobytes() for x in alike}) == 8  # eight copies of one face, eight pictures


@pytest.mark.parametrize("level", ["light", "full"])
def test_pixels_stay_in_their_range_and_the_face_in_the_picture(level):
    images = faces(64)
    seen = augment(images, numbers(64, 5), LEVELS[level])
    assert seen.dtype == torch.float32
    assert seen.shape == images.shape
    assert seen.min() >= 0
    assert seen.max() <= 255.001  # the sampling rounds
    straight, mirrored = (
        torch.nn.functional.cosine_similarity(
            seen.flatten(1) - seen.mean((1, 2, 3), keepdim=True).flatten(1),
            other.float().flatten(1) - other.float().mean((1, 2, 3), keepdim=True).flatten(1),
        )
        for other in (images, images.flip(-1))
    )
    assert torch.maximum(straight, mirrored).min() > 0.5  # each is still recognisable
    assert (
        0.3 < (mirrored > straight).float().mean() < 0.7
    )  # and about half are mirrored, each by its own lot


def test_a_mirrored_image_is_the_image_from_right_to_left():
    images, drawn = faces(), numbers(8, 0)
    for strength in (Strength(flip=1.0), Strength(flip=1.0, shift=1e-9)):  # exactly, and by the sampling
        seen = augment(images, drawn, strength)
        torch.testing.assert_close(seen, images.flip(-1).float(), rtol=0, atol=0.01)
    assert torch.equal(augment(images, drawn, Strength(flip=0.0)), images.float())


@pytest.mark.parametrize(("column", "axis"), [(2, 3), (3, 2)], ids=["across", "down"])
def test_a_shift_moves_the_picture_by_at_most_its_share_of_the_side(column, axis):
    images = faces(2, 50)
    drawn = torch.full((2, 12), 0.5)
    drawn[:, column] = torch.tensor([0.0, 1.0])  # the ends of what can be drawn
    seen = augment(images, drawn, Strength(shift=0.04))  # two pixels of fifty
    right = torch.cat([images[:1].narrow(axis, 0, 1)] * 2 + [images[:1].narrow(axis, 0, 48)], axis)
    left = torch.cat([images[1:].narrow(axis, 2, 48)] + [images[1:].narrow(axis, 49, 1)] * 2, axis)
    torch.testing.assert_close(seen, torch.cat([right, left]).float(), rtol=0, atol=0.01)


def test_a_zoom_makes_the_middle_larger_or_smaller_by_at_most_its_share():
    image = torch.zeros(2, 3, 200, 200)
    image[:, :, 50:150, 50:150] = 255
    drawn = torch.full((2, 12), 0.5)
    drawn[:, 1] = torch.tensor([0.0, 1.0])
    widths = (augment(image, drawn, Strength(zoom=0.1))[:, 0, 100] > 127).sum(1)
    assert widths.tolist() == pytest.approx([100 / 1.1, 110], abs=1.5)


def test_colour_is_what_a_plain_loop_makes_of_it():
    images, drawn = faces(), numbers(8, 7)
    seen = augment(images, drawn, Strength(colour=0.3)).numpy()
    for image, factors, got in zip(
        images.numpy().astype(np.float64), drawn.double().numpy(), seen, strict=True
    ):
        light, contrast, saturation = 1 + 0.3 * (2 * factors[4:7] - 1)
        image = image * light
        grey = np.tensordot([0.299, 0.587, 0.114], image, 1)
        image = grey + saturation * (image - grey)
        wanted = np.clip(grey.mean() + contrast * (image - grey.mean()), 0, 255)
        np.testing.assert_allclose(got, wanted, atol=0.01)


def test_what_is_erased_is_one_rectangle_of_the_said_size_in_the_said_share_of_images():
    images = faces(400, 32).float() + torch.rand(400, 3, 32, 32)
    strength = Strength(erase=0.25)
    covered = (augment(images, numbers(400, 9), strength) != images).any(1)
    hit = covered.flatten(1).any(1)
    assert 0.18 < hit.float().mean() < 0.32
    shares = []
    for mask in covered[hit]:
        rows, columns = mask.any(1), mask.any(0)
        assert torch.equal(mask, rows[:, None] & columns[None])  # one rectangle
        shares.append(float(mask.float().mean()))
    low, high = strength.erase_area
    assert low * 0.6 < min(shares)
    assert max(shares) < high * 1.3  # whole pixels
    assert (covered.sum(2).amax(1) > covered.sum(1).amax(1)).any()
    assert (covered.sum(2).amax(1) < covered.sum(1).amax(1)).any()
    assert augment(images, numbers(400, 9), replace(strength, erase=0.0)).equal(images)
