"""Faces are found where they are, one person is followed at a time, and crops lie on the template."""

from __future__ import annotations

import json

import cv2
import numpy as np
import pytest
from vacli import VacliError
from vacli.extract import faces as module
from vacli.extract.faces import ARCFACE_112, Detector, Faces, align, follow, similarity
from vacli.extract.media import Video

from .media_files import pictures, write_video


@pytest.fixture(scope="module")
def detector() -> Detector:
    return Detector()


def picture(path) -> np.ndarray:
    return cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)


def face(x: float, y: float = 100, size: float = 80, score: float = 0.99) -> np.ndarray:
    """A made-up detection (15,) around the middle (x, y)."""
    box = [x - size / 2, y - size / 2, x + size / 2, y + size / 2]
    points = (ARCFACE_112 / 112 - 0.5) * size + [x, y]
    return np.array([*box, *points.ravel(), score], np.float32)


def frames_of(*people: dict[int, np.ndarray], count: int) -> list[np.ndarray]:
    """For each of `count` frames the faces (n, 15) of those people who are seen in it."""
    return [np.array([p[i] for p in people if i in p], np.float32).reshape(-1, 15) for i in range(count)]


def middles(rows: np.ndarray) -> np.ndarray:
    return (rows[:, 0] + rows[:, 2]) / 2


CLOCK = np.arange(100) / 25


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


def test_nobody_gives_rows_of_nan():
    out = follow(frames_of(count=5), CLOCK[:5])
    assert out.shape == (5, 15)
    assert out.dtype == np.float32
    assert np.isnan(out).all()


def test_the_larger_face_is_followed_and_the_smaller_never_taken():
    main = {i: face(100 + i, size=90) for i in range(50)}
    other = {i: face(300 - i, size=60) for i in range(50)}
    out = follow(frames_of(other, main, count=50), CLOCK[:50])
    np.testing.assert_allclose(middles(out), 100 + np.arange(50), atol=1e-3)


def test_two_who_cross_are_not_swapped():
    main = {i: face(60 + 4 * i, y=100, size=80) for i in range(60)}
    other = {i: face(300 - 4 * i, y=110, size=70) for i in range(60)}
    out = follow(frames_of(other, main, count=60), CLOCK[:60])
    np.testing.assert_allclose(middles(out), 60 + 4 * np.arange(60), atol=1e-3)


def test_a_neighbour_does_not_stand_in_for_one_who_is_away_for_a_moment():
    main = {i: face(100, size=90) for i in range(100) if not 40 <= i < 48}
    neighbour = {i: face(160, size=80) for i in range(100)}
    out = follow(frames_of(main, neighbour, count=100), CLOCK)
    assert np.isnan(out[40:48]).all()
    np.testing.assert_allclose(middles(out[[*range(40), *range(48, 100)]]), 100)


def test_a_bystander_does_not_fill_a_long_absence_either():
    main = {i: face(100, size=90) for i in range(100) if not 30 <= i < 70}
    bystander = {i: face(300, size=60) for i in range(100)}
    out = follow(frames_of(main, bystander, count=100), CLOCK)
    assert np.isnan(out[30:70]).all()


def test_the_heavier_pair_in_turn_beats_one_who_is_longest_there():
    large = [{i: face(100, size=90) for i in rows} for rows in (range(45), range(60, 100))]
    small = {i: face(300, size=60) for i in range(100)}
    out = follow(frames_of(*large, small, count=100), CLOCK)
    assert np.isnan(out[45:60]).all()
    np.testing.assert_allclose(middles(out[[*range(45), *range(60, 100)]]), 100)


def test_the_next_person_takes_over_when_the_first_has_left():
    first = {i: face(100) for i in range(40)}
    second = {i: face(300, size=60) for i in range(30, 100)}
    out = follow(frames_of(first, second, count=100), CLOCK)
    np.testing.assert_allclose(middles(out), [100] * 40 + [300] * 60)


def test_nobody_is_followed_across_a_cut():
    """Two shots with a face at the same place: the tracks end at the cut, so each shot chooses anew."""
    first = {i: face(100, size=60) for i in range(50)}
    same_place = {i: face(100, size=60) for i in range(50, 100)}
    larger = {i: face(300, size=80) for i in range(50, 100)}
    cuts = np.arange(100) == 50
    out = follow(frames_of(first, same_place, larger, count=100), CLOCK, cuts)
    np.testing.assert_allclose(middles(out), [100] * 50 + [300] * 50)
    uncut = follow(frames_of(first, same_place, larger, count=100), CLOCK)
    np.testing.assert_allclose(middles(uncut), 100)


def test_a_face_seen_for_a_moment_only_is_a_false_alarm():
    glimpse = {i: face(100) for i in (10, 11)}
    assert np.isnan(follow(frames_of(glimpse, count=50), CLOCK[:50])).all()


def test_a_video_of_one_frame_keeps_its_face():
    assert not np.isnan(follow(frames_of({0: face(100)}, count=1), CLOCK[:1])).any()


def test_nudged_times_do_not_lose_a_moving_face():
    times_s = np.arange(60) / 25
    times_s[20:40] = times_s[19] + 1e-6 * np.arange(1, 21)
    main = {i: face(60 + 5 * i) for i in range(60)}
    assert not np.isnan(follow(frames_of(main, count=60), times_s)).any()


def test_the_recipe_is_plain_json_that_names_the_weights():
    recipe = Faces().recipe()
    assert json.loads(json.dumps(recipe)) == recipe
    assert recipe["track"] == "faces"
    assert len(recipe["weights_sha256"]) == 64


def test_a_track_has_a_row_for_every_frame_and_progress_adds_up(tmp_path):
    done: list[int] = []
    times_s = [0.0, 0.04, 0.1, 0.3]
    track = Faces()(Video(write_video(tmp_path / "a.mp4", pictures(4), times_s)), on_frames=done.append)
    np.testing.assert_allclose(track.times_s, times_s, atol=1e-3)
    assert track.values.shape == (4, 15)
    assert not track.valid.any()
    assert sum(done) == 4


def test_a_video_that_gives_no_frame_is_refused(tmp_path):
    video = Video(write_video(tmp_path / "a.mp4", pictures(2)))
    video.frames = lambda batch=32: iter(())  # type: ignore[method-assign]
    with pytest.raises(VacliError, match="no picture decodes"):
        Faces()(video)


def test_one_face_is_followed_through_a_real_clip(real_data):
    track = Faces()(Video(real_data / "video" / "single_face.mp4"))
    assert len(track) == 72
    assert track.valid.mean() > 0.95
    assert np.abs(np.diff(middles(track.values[track.valid]))).max() < 15


def test_a_real_clip_without_a_face_is_all_nan(real_data):
    track = Faces()(Video(real_data / "video" / "no_face.mp4"))
    assert len(track) == 95
    assert not track.valid.any()


def test_a_face_that_leaves_a_real_clip_leaves_nan(real_data):
    track = Faces()(Video(real_data / "video" / "face_noface.mov"))
    assert len(track) == 169
    assert track.valid[:70].all()
    assert not track.valid[75:].any()


@pytest.mark.slow
def test_a_real_clip_with_cuts_never_jumps_within_a_shot(real_data):
    track = Faces()(Video(real_data / "video" / "short_hamilton_clip.mp4"))
    assert track.valid.mean() > 0.8
    cuts = [20, 82, 211]
    for shot in np.split(np.arange(275), cuts):
        rows = shot[track.valid[shot]]
        gap = np.diff(rows) == 1
        assert np.abs(np.diff(middles(track.values[rows]))[gap]).max() < 40
    assert (
        middles(track.values[209:210])[0] < 330 < middles(track.values[211:212])[0]
    )  # another person behind the cut
