"""Faces are found where they are, and crops lie on the template."""

from __future__ import annotations

import json

import cv2
import numpy as np
import pytest
from vacli import VacliError
from vacli.extract import faces as module
from vacli.extract.faces import ARCFACE_112, Detector, align, similarity


@pytest.fixture(scope="module")
def detector() -> Detector:
    return Detector()


def picture(path) -> np.ndarray:
    return cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)


def test_similarity_finds_a_known_transform():
    angle, scale, shift = 0.7, 1.8, np.array([30.0, -12.0])
    turn = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    points = np.random.default_rng(0).normal(size=(5, 2)) * 40
    matrix = similarity(points, points @ turn.T + shift)
    np.testing.assert_allclose(matrix, np.column_stack([turn, shift]), atol=1e-9)


def test_similarity_is_the_least_squares_one():
    noise = np.random.default_rng(1)
    points, template = noise.normal(size=(5, 2)), noise.normal(size=(5, 2))
    x, y, zero, one = *points.T, np.zeros(5), np.ones(5)
    rows = np.concatenate([np.stack([x, -y, one, zero], 1), np.stack([y, x, zero, one], 1)])
    a, b, dx, dy = np.linalg.lstsq(rows, template.T.ravel(), rcond=None)[0]
    np.testing.assert_allclose(similarity(points, template), [[a, -b, dx], [b, a, dy]], atol=1e-12)


def test_similarity_never_mirrors():
    mirrored = ARCFACE_112 * [-1, 1]
    assert np.linalg.det(similarity(mirrored, ARCFACE_112)[:, :2]) > 0


def test_points_that_coincide_are_refused():
    with pytest.raises(ValueError, match="coincide"):
        similarity(np.ones((5, 2)), ARCFACE_112)


def test_align_leaves_an_aligned_face_as_it_is():
    crop = np.random.default_rng(0).integers(0, 255, (112, 112, 3), np.uint8)
    assert np.array_equal(align(crop, ARCFACE_112), crop)


@pytest.mark.parametrize("size", [112, 224])
def test_align_moves_the_points_onto_the_template(size):
    turn = 1.5 * np.array([[np.cos(0.3), -np.sin(0.3)], [np.sin(0.3), np.cos(0.3)]])
    points = ARCFACE_112 @ turn.T + [60, 20]
    frame = np.zeros((300, 300, 3), np.uint8)
    for x, y in points:
        cv2.circle(frame, (round(x * 16), round(y * 16)), 4 * 16, (255, 255, 255), -1, cv2.LINE_AA, 4)
    crop = align(frame, points.ravel().astype(np.float32), size)
    assert crop.shape == (size, size, 3)
    for x, y in ARCFACE_112 * size / 112:
        around = crop[int(y) - 5 : int(y) + 7, int(x) - 5 : int(x) + 7, 0].astype(float)
        v, u = np.mgrid[int(y) - 5 : int(y) + 7, int(x) - 5 : int(x) + 7]
        middle = np.array([(around * u).sum(), (around * v).sum()]) / around.sum()
        np.testing.assert_allclose(middle, [x, y], atol=0.7)


# Five: the fifth in pyfeat_multi_face.jpg wears sunglasses.
@pytest.mark.parametrize(
    ("name", "count"), [("astronaut.png", 1), ("two_people.jpg", 2), ("pyfeat_multi_face.jpg", 5)]
)
def test_every_face_of_a_real_picture_is_found(name, count, real_data, detector):
    rgb = picture(real_data / "image" / name)
    (found,) = detector(rgb[None])
    assert found.shape == (count, 15)
    assert found.dtype == np.float32
    x, y = found[:, 4:14:2], found[:, 5:14:2]
    assert ((found[:, :1] < x) & (x < found[:, 2:3]) & (found[:, 1:2] < y) & (y < found[:, 3:4])).all()
    assert (x[:, [0, 3]] < x[:, [1, 4]]).all()  # left in the picture comes first
    assert (y[:, :2].max(axis=1) < y[:, 2]).all()
    assert (y[:, 2] < y[:, 3:].min(axis=1)).all()
    assert (np.diff(found[:, 14]) <= 0).all()


def test_a_face_is_found_again_where_it_was_moved_to(real_data, detector):
    rgb = picture(real_data / "image" / "astronaut.png")
    moved = cv2.warpAffine(rgb, np.array([[0.5, 0, 37], [0, 0.5, 90.0]]), (400, 380))
    (here,), (there,) = detector(rgb[None]), detector(moved[None])
    np.testing.assert_allclose(
        there[0, 4:14].reshape(5, 2), here[0, 4:14].reshape(5, 2) / 2 + [37, 90], atol=2
    )


def test_a_batch_finds_what_its_frames_find_one_by_one(real_data, detector):
    rgb = picture(real_data / "image" / "two_people.jpg")
    frames = np.stack([np.roll(rgb, 9 * i, axis=1) for i in range(module.FRAMES + 2)])[:, ::2, ::2].copy()
    frames[3] = 0
    together = detector(frames)
    alone = [detector(frame[None])[0] for frame in frames]
    assert [len(found) for found in together] == [len(found) for found in alone]
    assert [len(found) for found in together][2:5] == [2, 0, 2]
    for a, b in zip(together, alone, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-2)


def test_the_same_frames_give_the_same_bits(real_data, detector):
    rgb = picture(real_data / "image" / "two_people.jpg")[None]
    assert np.array_equal(detector(rgb)[0], detector(rgb)[0])


@pytest.mark.parametrize("shape", [(1, 1), (10, 300), (20, 20), (48, 64), (31, 1200)])
def test_empty_and_odd_frames_hold_no_face(shape, detector):
    frames = np.full((2, *shape, 3), 90, np.uint8)
    assert [found.shape for found in detector(frames)] == [(0, 15), (0, 15)]


def test_a_missing_wheel_is_said_with_its_mend(monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(VacliError, match="pip install mtcnn"):
        Detector()


def test_the_recipe_is_plain_json_that_names_the_weights(detector):
    recipe = detector.recipe()
    assert json.loads(json.dumps(recipe)) == recipe
    assert recipe["name"] == "mtcnn"
    assert len(recipe["weights_sha256"]) == 64
