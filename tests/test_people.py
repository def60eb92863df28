"""People keep their places while they move, cross, hide and come back; one of them is chosen and never swapped."""

from __future__ import annotations

import importlib.util
import json
import sys
import weakref
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path
from types import ModuleType
from typing import Any

import cv2
import numpy as np
import pytest
from vacli import VacliError
from vacli.extract import people as module
from vacli.extract.faces import ARCFACE_112
from vacli.extract.following import BRIDGED_SCORE, flow
from vacli.extract.people import MOST_PEOPLE, People, Person
from vacli.store import Track

RATE_HZ = 25
HEIGHT, WIDTH = 200, 400
Someone = dict[int, np.ndarray]  # frame -> the face (15,) found in it


def face(x: float, y: float = 100, size: float = 80, score: float = 0.99) -> np.ndarray:
    """A made-up detection (15,) around the middle (x, y)."""
    box = [x - size / 2, y - size / 2, x + size / 2, y + size / 2]
    points = (ARCFACE_112 / 112 - 0.5) * size + [x, y]
    return np.array([*box, *points.ravel(), score], np.float32)


class Told:
    """A detector that finds what it is told, frame by frame; pictures carry their number in the first pixel."""

    def __init__(self, someone: Sequence[Someone]) -> None:
        self.someone, self.asked = someone, []

    def recipe(self) -> dict[str, Any]:
        return {}

    def __call__(self, frames: np.ndarray) -> list[np.ndarray]:
        numbers = [int(frame[0, 0] @ [1, 256, 0]) for frame in frames]
        self.asked += numbers
        return [np.array([p[i] for p in self.someone if i in p], np.float32).reshape(-1, 15) for i in numbers]


def blank(count: int) -> np.ndarray:
    return np.full((count, 40, 60, 3), 90, np.uint8)


def people_in(
    *someone: Someone,
    count: int,
    pictures: np.ndarray | None = None,
    every: int = 1,
    batch: int = 32,
    times_s: np.ndarray | None = None,
) -> Track:
    pictures = blank(count) if pictures is None else pictures.copy()
    pictures[:, 0, 0] = np.stack([np.arange(count) % 256, np.arange(count) // 256, np.zeros(count)], axis=1)
    times_s = np.arange(count) / RATE_HZ if times_s is None else times_s
    people = People(every=every)
    people.detector = Told(someone)
    return people((pictures[i : i + batch], times_s[i : i + batch]) for i in range(0, count, batch))


def main_of(*someone: Someone, count: int, **how: Any) -> np.ndarray:
    return Person("main")(people_in(*someone, count=count, **how)).values


def middles(rows: np.ndarray) -> np.ndarray:
    return (rows[..., 0] + rows[..., 2]) / 2


def cut_at(count: int, *rows: int) -> np.ndarray:
    """Blank frames that are dark, then bright, then dark again, from cut to cut."""
    pictures = blank(count)
    for row in rows:
        pictures[row:] = 255 - pictures[row:]
    return pictures


def texture(seed: int, size: int = 80) -> np.ndarray:
    """A face's pixels: blobs that nobody else has."""
    noise = np.random.default_rng(seed).integers(0, 255, (12, 12, 3)).astype(np.uint8)
    return cv2.resize(noise, (size, size), interpolation=cv2.INTER_CUBIC)


def painted(count: int, *someone: tuple[int, Someone]) -> np.ndarray:
    """(count, HEIGHT, WIDTH, 3): everybody's texture, by its seed, over a soft background; the last are in front."""
    background = cv2.resize(texture(99, 16) // 3, (WIDTH, HEIGHT))
    pictures = np.stack([background] * count)
    for seed, places in someone:
        for i, found in places.items():
            size = found[2] - found[0]
            matrix = np.array([[size / 80, 0, found[0]], [0, size / 80, found[1]]], float)
            warped = cv2.warpAffine(texture(seed), matrix, (WIDTH, HEIGHT))
            inside = cv2.warpAffine(
                np.ones((80, 80), np.uint8), matrix, (WIDTH, HEIGHT), flags=cv2.INTER_NEAREST
            )
            pictures[i][inside > 0] = warped[inside > 0]
    return pictures


# ---- everybody -----------------------------------------------------------------------------------------------


def test_nobody_gives_rows_of_nan():
    track = people_in(count=5)
    assert track.values.shape == (5, 1, 15)
    assert track.values.dtype == np.float32
    assert np.isnan(track.values).all()
    assert not Person("main")(track).valid.any()


def test_no_frames_give_an_empty_track():
    track = People()(iter(()))
    assert track.values.shape == (0, 1, 15)
    for who in ("main", "left", "right", "1", "2"):
        assert Person(who)(track).values.shape == (0, 15)


def test_everybody_has_a_place_the_heaviest_first():
    small = {i: face(300, size=50) for i in range(5, 60)}
    large = {i: face(100, size=90) for i in range(20, 60)}
    values = people_in(small, large, count=70).values
    assert values.shape == (70, 2, 15)
    assert np.isnan(values[[*range(5), *range(60, 70)]]).all()
    assert not values[5:20, 0].any()  # seen is somebody else
    np.testing.assert_array_equal(values[20:60, 0], np.stack([large[i] for i in range(20, 60)]))
    np.testing.assert_array_equal(values[5:60, 1], np.stack([small[i] for i in range(5, 60)]))


def test_each_of_two_who_cross_keeps_his_place():
    one = {i: face(60 + 4 * i, y=100, size=80) for i in range(60)}
    two = {i: face(300 - 4 * i, y=110, size=70) for i in range(60)}
    values = people_in(two, one, count=60).values
    np.testing.assert_allclose(middles(values[:, 0]), 60 + 4 * np.arange(60), atol=1e-3)
    np.testing.assert_allclose(middles(values[:, 1]), 300 - 4 * np.arange(60), atol=1e-3)


def test_who_is_hidden_by_another_for_a_moment_is_not_taken_for_him():
    """Two at nearly the same place, of whom only one is found for a while: looks tell who it is."""
    still = {i: face(200, size=80) for i in range(60) if not 27 <= i < 33}
    passing = {i: face(50 + 5 * i, y=104, size=80) for i in range(60)}
    pictures = painted(60, (1, {i: face(200, size=80) for i in range(60)}), (2, passing))
    values = people_in(still, passing, count=60, pictures=pictures).values
    ends = {round(float(middles(values[59, k]))) for k in range(2)}
    assert values.shape[1] == 2
    assert ends == {200, 345}
    stays = int(np.abs(middles(values[0]) - 200).argmin())
    np.testing.assert_allclose(middles(values[:, stays]), 200, atol=1e-3)


def test_of_two_whose_places_overlap_the_one_that_looks_so_is_meant():
    """One of two is hidden for a row; the other is found nearer to him than to where he is foreseen himself."""
    still, passing = (
        {i: face(x(i), size=80) for i in range(60)} for x in (lambda i: 200, lambda i: 50 + 5 * i)
    )
    pictures = painted(60, (1, still), (2, passing))
    del still[29]
    passing[29] = face(199, size=80)  # foreseen at 195
    values = people_in(still, passing, count=60, pictures=pictures).values
    stays = int(np.abs(middles(values[0]) - 200).argmin())
    assert values[29, stays, 14] == np.float32(BRIDGED_SCORE)
    np.testing.assert_array_equal(values[29, 1 - stays], passing[29])


def test_who_comes_out_from_behind_something_is_the_same_and_the_way_is_bridged():
    walks = {i: face(60 + 6 * i, size=60) for i in range(45)}
    seen = {i: f for i, f in walks.items() if not 18 <= i < 28}
    pictures = painted(45, (1, walks))
    values = people_in(seen, count=45, pictures=pictures).values
    assert values.shape == (45, 1, 15)
    np.testing.assert_allclose(middles(values[:, 0]), 60 + 6 * np.arange(45), atol=1e-3)
    assert (values[18:28, 0, 14] == np.float32(BRIDGED_SCORE)).all()
    assert (values[[*range(18), *range(28, 45)], 0, 14] > 0.9).all()


def test_a_stranger_who_comes_out_there_is_not_bridged_to():
    first = {i: face(60 + 6 * i, size=60) for i in range(18)}
    stranger = {i: face(60 + 6 * i, size=60) for i in range(28, 45)}
    pictures = painted(45, (1, first), (2, stranger))
    assert np.isnan(people_in(first, stranger, count=45, pictures=pictures).values[18:28]).all()


def test_a_short_gap_is_filled_by_interpolation_in_time():
    times_s = np.array([0, 0.04, 0.08, 0.12, 0.2, 0.4, 0.5, 0.54, 0.58])
    seen = {i: face(100 + 100 * times_s[i], size=80 + 20 * times_s[i]) for i in range(9) if i not in (4, 5)}
    values = people_in(seen, count=9, times_s=times_s).values[:, 0]
    for i in (4, 5):
        expected = face(100 + 100 * times_s[i], size=80 + 20 * times_s[i])[:14]
        np.testing.assert_allclose(values[i, :14], expected, rtol=1e-5)
        assert values[i, 14] == np.float32(BRIDGED_SCORE)


@pytest.mark.parametrize(
    ("missing", "bridged"), [(11, True), (12, False)]
)  # 0.48 s and 0.52 s from seen to seen
def test_a_gap_of_more_than_half_a_second_stays_a_gap(missing, bridged):
    seen = {i: face(100) for i in range(60) if not 20 <= i < 20 + missing}
    gap = main_of(seen, count=60)[20 : 20 + missing]
    assert np.isnan(gap).all() != bridged
    assert not bridged or not np.isnan(gap).any()


def test_a_gap_with_a_cut_in_it_is_not_filled():
    seen = {i: face(100) for i in range(40) if not 18 <= i < 24}
    assert np.isnan(main_of(seen, count=40, pictures=cut_at(40, 21))[18:24]).all()
    assert not np.isnan(main_of(seen, count=40)[18:24]).any()


def test_who_was_away_for_a_while_comes_back_to_his_place():
    away = {i: face(100, size=90) for i in range(120) if not 40 <= i < 80}
    other = {i: face(200, size=80) for i in range(120)}
    late = {i: face(300, size=60) for i in range(50, 120)}
    values = people_in(away, other, late, count=120).values
    assert values.shape[1] == 3
    places = {round(float(np.median(middles(values[values[:, k, 14] > 0, k])))) for k in range(3)}
    assert places == {100, 200, 300}
    assert not any(np.ptp(middles(values[values[:, k, 14] > 0, k])) > 1 for k in range(3))


def test_a_crowd_gets_no_more_places_than_there_are():
    crowd = [{i: face(30 * k, size=20 + k) for i in range(10)} for k in range(MOST_PEOPLE + 3)]
    values = people_in(*crowd, count=10).values
    assert values.shape == (10, MOST_PEOPLE, 15)
    np.testing.assert_allclose(np.sort(middles(values[5])), 30 * np.arange(3, MOST_PEOPLE + 3), atol=1e-3)


def test_who_is_hardly_ever_there_gets_no_place_of_his_own():
    long = {i: face(100) for i in range(600)}
    glimpse = {i: face(300) for i in range(100, 105)}
    assert people_in(long, glimpse, count=600).values.shape[1] == 1
    assert people_in(glimpse, count=600).values[102, 0, 14] > 0  # the only one


def test_a_face_seen_for_a_moment_only_is_a_false_alarm():
    assert np.isnan(main_of({i: face(100) for i in (10, 11)}, count=50)).all()


def test_a_video_of_one_frame_keeps_its_face():
    assert not np.isnan(main_of({0: face(100)}, count=1)).any()


def test_nudged_times_do_not_lose_a_moving_face():
    times_s = np.arange(60) / 25
    times_s[20:40] = times_s[19] + 1e-6 * np.arange(1, 21)
    moving = {i: face(60 + 5 * i) for i in range(60)}
    assert not np.isnan(main_of(moving, count=60, times_s=times_s)).any()


def test_a_change_of_the_frame_size_is_survived():
    one, two = blank(10), np.full((10, 80, 50, 3), 90, np.uint8)
    for first, pictures in ((0, one), (10, two)):
        pictures[:, 0, 0] = np.arange(first, first + 10)[:, None] * [1, 0, 0]
    for every in (1, 3):
        people = People(every=every)
        people.detector = Told([{i: face(30, y=30, size=30) for i in range(20)}])
        track = people([(one, np.arange(10) / 25), (two, np.arange(10, 20) / 25)])
        assert (~track.valid).sum() <= (every - 1)


@pytest.mark.parametrize("every", [1, 4])
def test_how_frames_are_batched_changes_nothing(every):
    walks = {i: face(60 + 4 * i, size=60) for i in range(50) if not 20 <= i < 26}
    stays = {i: face(300, size=70) for i in range(10, 50)}
    pictures = painted(50, (2, stays), (1, walks))
    pictures[30:] = 255 - pictures[30:]
    whole = people_in(walks, stays, count=50, pictures=pictures, every=every, batch=50).values
    assert np.isfinite(whole).any()
    for batch in (1, 7):
        again = people_in(walks, stays, count=50, pictures=pictures, every=every, batch=batch).values
        np.testing.assert_array_equal(again, whole)


@pytest.mark.parametrize("every", [1, 3])
def test_no_frame_is_held_longer_than_until_the_next_batch(every):
    alive: list[weakref.ref[np.ndarray]] = []

    def batches() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for i in range(8):
            assert sum(ref() is not None for ref in alive) <= 1
            rgb = blank(4)
            rgb[:, 0, 0] = np.arange(4 * i, 4 * i + 4)[:, None] * [1, 0, 0]
            alive.append(weakref.ref(rgb))
            yield rgb, (4 * i + np.arange(4)) / 25
            del rgb

    people = People(every=every)
    people.detector = Told([{i: face(30, y=20, size=24) for i in range(32)}])
    assert people(batches()).valid[:31].all()  # every third is looked at, and the last one seen is the 31st


def test_progress_adds_up():
    done: list[int] = []
    people = People()
    people.detector = Told([])
    people(((blank(n), np.arange(n) + 100.0 * n) for n in (3, 5)), done.append)
    assert done == [3, 5]


# ---- between detections --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("turn", "scale", "shift"), [(0, 1, (7, -4)), (3, 1, (0, 0)), (0, 1.06, (2, 3)), (-2, 0.97, (-5, 2))]
)
def test_the_flow_finds_how_a_face_moved(turn, scale, shift):
    before = painted(1, (1, {0: face(200)}))[0]
    matrix = cv2.getRotationMatrix2D((200, 100), turn, scale)
    matrix[:, 2] += shift
    now = cv2.warpAffine(before, matrix, (WIDTH, HEIGHT), borderMode=cv2.BORDER_REPLICATE)
    moved = flow(before, now, face(200).astype(float))
    points = face(200)[4:14].reshape(5, 2) @ matrix[:, :2].T + matrix[:, 2]
    np.testing.assert_allclose(moved[4:14].reshape(5, 2), points, atol=0.3)
    np.testing.assert_allclose((moved[:2] + moved[2:4]) / 2, np.add((200, 100), shift), atol=0.3)
    assert moved[2] - moved[0] == pytest.approx(80 * scale, abs=0.5)


def test_pixels_that_are_gone_say_nothing():
    before = painted(1, (1, {0: face(200)}))[0]
    assert flow(before, np.zeros_like(before), face(200).astype(float)) is None
    assert flow(before, before[:-1], face(200).astype(float)) is None
    assert flow(before, painted(1, (2, {0: face(200)}))[0], face(200).astype(float)) is None
    assert flow(before, before, face(900).astype(float)) is None  # outside the picture


def test_rows_between_detections_are_where_the_face_is():
    x = 200 + 60 * np.sin(np.arange(60) / 6)
    moving = {i: face(x[i]) for i in range(60)}
    pictures = painted(60, (1, moving))
    every = people_in(moving, count=60, pictures=pictures).values[:, 0]
    third = people_in(moving, count=60, pictures=pictures, every=3).values[:, 0]
    assert third.shape == (60, 15)
    np.testing.assert_allclose(third[:, :14], every[:, :14], atol=0.5)
    straight = np.interp(np.arange(60), np.arange(0, 60, 3), x[::3])
    assert np.abs(middles(third) - x)[:58].max() < np.abs(straight - x)[:58].max()  # more than a ruler knows


def test_what_the_pixels_got_wrong_is_mended_at_the_next_detection():
    """The detector sees him drift where the pixels stand still: no jump is left, and no row is off by more."""
    drifts = {i: face(200 + i) for i in range(31)}
    pictures = painted(31, (1, {i: face(200) for i in range(31)}))
    values = people_in(drifts, count=31, pictures=pictures, every=5).values[:, 0]
    np.testing.assert_allclose(middles(values), 200 + np.arange(31), atol=0.1)
    assert (values[:, 14] == np.float32(0.99)).all()


def test_the_detector_looks_at_every_nth_frame_and_behind_every_cut():
    people = People(every=5)
    people.detector = told = Told([])
    pictures = cut_at(24, 12)
    pictures[:, 0, 0] = np.stack([np.arange(24), np.zeros(24), np.zeros(24)], axis=1)
    people((pictures[i : i + 7], np.arange(i, min(i + 7, 24)) / 25) for i in range(0, 24, 7))
    assert told.asked == [0, 5, 10, 12, 17, 22]


def test_rows_that_no_later_detection_confirms_are_withdrawn_but_a_shot_is_followed_to_its_end():
    leaves = {i: face(200) for i in range(20)}
    pictures = painted(40, (1, {i: face(200) for i in range(40)}))  # something there still looks as he did
    values = people_in(leaves, count=40, pictures=pictures, every=4).values
    assert not np.isnan(values[:17]).any()
    assert np.isnan(values[17:]).all()
    stays = {i: face(200) for i in range(40)}
    assert not np.isnan(people_in(stays, count=40, pictures=pictures, every=7).values).any()


def test_what_was_withdrawn_makes_no_gap_shorter():
    stays = {i: face(200) for i in range(51)}
    pictures = painted(51, (1, stays))
    missed = {i: f for i, f in stays.items() if i != 20}  # unseen from 10 to 30, 0.8 s
    values = people_in(missed, count=51, pictures=pictures, every=10).values
    assert np.isnan(values[11:30]).all()
    assert not np.isnan(values[[*range(11), *range(30, 51)]]).any()


def test_crossing_people_keep_their_places_between_detections_too():
    one = {i: face(60 + 5 * i, y=96, size=80) for i in range(56)}
    two = {i: face(340 - 5 * i, y=104, size=70) for i in range(56)}
    pictures = painted(56, (2, two), (1, one))
    hidden = {i: f for i, f in two.items() if abs(middles(f) - middles(one[i])) > 40}
    values = people_in(hidden, one, count=56, pictures=pictures, every=3).values
    assert values.shape[1] == 2
    np.testing.assert_allclose(middles(values[:55, 0]), 60 + 5 * np.arange(55), atol=3)
    there = values[:55, 1, 14] > 0
    assert there.mean() > 0.9
    np.testing.assert_allclose(middles(values[:55, 1])[there], (340 - 5 * np.arange(55))[there], atol=6)


# ---- the main person -----------------------------------------------------------------------------------------


def test_the_larger_face_is_followed_and_the_smaller_never_taken():
    main = {i: face(100 + i, size=90) for i in range(50)}
    other = {i: face(300 - i, size=60) for i in range(50)}
    np.testing.assert_allclose(middles(main_of(other, main, count=50)), 100 + np.arange(50), atol=1e-3)


def test_a_neighbour_does_not_stand_in_for_one_who_is_away_for_a_moment():
    main = {i: face(100, size=90) for i in range(100) if not 40 <= i < 48}
    neighbour = {i: face(160, size=80) for i in range(100)}
    out = main_of(main, neighbour, count=100)
    np.testing.assert_allclose(middles(out), 100)
    assert (out[40:48, 14] == np.float32(BRIDGED_SCORE)).all()


def test_a_bystander_does_not_fill_a_long_absence_either():
    main = {i: face(100, size=90) for i in range(100) if not 30 <= i < 70}
    bystander = {i: face(300, size=60) for i in range(100)}
    assert np.isnan(main_of(main, bystander, count=100)[30:70]).all()


def test_the_heavier_pair_in_turn_beats_one_who_is_longest_there():
    large = [{i: face(100, size=90) for i in rows} for rows in (range(45), range(60, 100))]
    small = {i: face(300, size=60) for i in range(100)}
    out = main_of(*large, small, count=100)
    assert np.isnan(out[45:60]).all()
    np.testing.assert_allclose(middles(out[[*range(45), *range(60, 100)]]), 100)


def test_the_next_person_takes_over_when_the_first_has_left():
    first = {i: face(100) for i in range(40)}
    second = {i: face(300, size=60) for i in range(30, 100)}
    track = people_in(first, second, count=100)
    np.testing.assert_allclose(middles(Person("main")(track).values), [100] * 40 + [300] * 60)
    by_place = {
        round(float(np.nanmedian(middles(Person(k)(track).values)))): Person(k)(track).valid for k in "12"
    }
    assert by_place[100].sum() == 40  # those who are asked for by number do not change
    assert by_place[300].sum() == 70


def test_each_shot_chooses_anew():
    first = {i: face(100, size=60) for i in range(50)}
    elsewhere = {i: face(200, size=60) for i in range(50, 100)}
    larger = {i: face(300, size=80) for i in range(50, 100)}
    out = main_of(first, elsewhere, larger, count=100, pictures=cut_at(100, 50))
    np.testing.assert_allclose(middles(out), [100] * 50 + [300] * 50)


def test_who_is_at_the_same_place_behind_a_cut_keeps_it():
    """A jump cut: a track ends there, but the place goes on, though another is now a little heavier."""
    stays = {i: face(100, size=60) for i in range(100)}
    larger = {i: face(300, size=62) for i in range(50, 100)}
    out = main_of(stays, larger, count=100, pictures=cut_at(100, 50))
    np.testing.assert_allclose(middles(out), 100)


def test_the_choice_in_turn_is_the_heaviest_there_is():
    rng = np.random.default_rng(5)
    for _ in range(50):
        starts, lengths, weights = rng.integers(0, 20, 8), rng.integers(1, 9, 8), rng.random(8)
        runs = [
            (slice(int(s), int(s + n)), 0, float(w)) for s, n, w in zip(starts, lengths, weights, strict=True)
        ]
        chosen = module._in_turn(runs)
        assert _apart(chosen)
        best = max(
            sum(w for *_, w in some) for n in range(9) for some in combinations(runs, n) if _apart(some)
        )
        assert sum(w for *_, w in chosen) == pytest.approx(best)


def _apart(runs: Sequence[tuple[slice, int, float]]) -> bool:
    return all(a.stop <= b.start or b.stop <= a.start for (a, *_), (b, *_) in combinations(runs, 2))


# ---- the others ----------------------------------------------------------------------------------------------


def test_left_and_right_are_the_two_by_their_side():
    left = {i: face(100, size=60) for i in range(80)}
    right = {i: face(300, size=70) for i in range(10, 80)}
    track = people_in(right, left, count=80)
    np.testing.assert_allclose(middles(Person("left")(track).values), 100)
    there = Person("right")(track)
    np.testing.assert_allclose(middles(there.values[10:]), 300)
    assert not there.valid[:10].any()


def test_who_is_left_stays_so_though_they_change_sides_for_a_while():
    left = {
        i: face(100 + (250 * np.sin(np.pi * (i - 30) / 20) if 30 <= i < 50 else 0), y=90) for i in range(100)
    }
    right = {i: face(250, y=110, size=70) for i in range(100)}
    pictures = painted(100, (2, right), (1, left))
    track = people_in(right, left, count=100, pictures=pictures)
    np.testing.assert_allclose(
        middles(Person("left")(track).values), [middles(left[i]) for i in range(100)], atol=1e-3
    )
    np.testing.assert_allclose(middles(Person("right")(track).values), 250, atol=1e-3)


def test_behind_a_cut_the_sides_are_looked_at_anew_and_one_alone_goes_where_he_belongs():
    """Left and right together; then the right one alone, close; then both, the left one now the larger."""
    one = {i: face(100, size=50) for i in range(40)} | {i: face(90, size=80) for i in range(80, 120)}
    two = {i: face(300, size=70) for i in range(40)} | {i: face(310, size=60) for i in range(80, 120)}
    alone = {i: face(270, size=100) for i in range(40, 80)}
    track = people_in(one, two, alone, count=120, pictures=cut_at(120, 40, 80))
    left, right = Person("left")(track), Person("right")(track)
    np.testing.assert_allclose(middles(left.values[left.valid]), [100] * 40 + [90] * 40)
    np.testing.assert_allclose(middles(right.values), [300] * 40 + [270] * 40 + [310] * 40)


@pytest.mark.parametrize("visit", [0, 8])
def test_one_alone_is_left_and_right_and_main(visit):
    alone = {i: face(100) for i in range(100)}
    visitor = {i: face(300, size=60) for i in range(40, 40 + visit)}
    track = people_in(alone, visitor, count=100)
    for who in ("left", "right"):
        np.testing.assert_array_equal(Person(who)(track).values, Person("main")(track).values)


def test_a_place_that_nobody_has_is_empty():
    track = people_in({i: face(100) for i in range(10)}, count=10)
    assert Person("1")(track).valid.all()
    assert not Person("2")(track).valid.any()
    assert Person("2")(track).values.shape == (10, 15)


@pytest.mark.parametrize("who", ["0", "-1", "all", "", "1.5", "\u00b2", "MAIN"])
def test_anybody_else_is_refused(who):
    with pytest.raises(VacliError, match="no such person"):
        Person(who)


def test_recipes_are_plain_json_that_differ_where_values_do():
    recipes = [People().recipe(), People(every=3).recipe(), People(every=2).recipe()]
    recipes += [Person(who).recipe() for who in ("main", "left", "right", "1", "2")]
    assert all(json.loads(json.dumps(recipe)) == recipe for recipe in recipes)
    assert len({json.dumps(recipe) for recipe in recipes}) == len(recipes)
    assert Person("02").recipe() == Person("2").recipe()
    assert len(People().recipe()["detector"]["weights_sha256"]) == 64


def test_every_nth_frame_means_at_least_every_first():
    with pytest.raises(ValueError, match="every must be at least 1, got 0"):
        People(every=0)


# ---- real clips ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    """benchmarks/faces.py, which knows what a human sees in the clips and counts swaps."""
    path = Path(__file__).resolve().parent.parent / "benchmarks" / "faces.py"
    spec = importlib.util.spec_from_file_location("benchmarks_faces", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_swap_and_a_face_that_is_none_are_counted(bench):
    seen = [
        bench.Seen("a", 0, 39, 50, 150),
        bench.Seen("b", 0, 19, 250, 350),
        bench.Seen("b", 20, 39, 250, 350),
    ]
    values = np.zeros((40, 2, 15), np.float32)
    values[:, 0], values[:, 1] = face(100), face(300)
    track = Track(values, np.arange(40) / 25)
    right = bench.measured(track, seen, 1.0)
    assert (right.found, right.visible, right.swaps, right.unfounded, right.people) == (80, 80, 0, 0, 2)
    swapped = values.copy()
    swapped[10:20] = swapped[10:20, ::-1]  # and back at 20, behind a cut: that is none
    swapped[25, 1] = face(200)
    wrong = bench.measured(Track(swapped, track.times_s), seen, 1.0)
    assert (wrong.found, wrong.swaps, wrong.unfounded) == (79, 2, 1)
    there, here = np.full((40, 2), 100.0), np.full((40, 2), [300.0, 100.0])
    assert bench.crossing_swaps(track, there, here) == 0
    assert bench.crossing_swaps(Track(swapped, track.times_s), there, here) == 4


def test_jitter_is_the_second_difference_in_the_aligned_picture(bench):
    steps = np.cumsum(np.arange(30) * 0.5)  # moved by 0, 0.5, 1, ...: the second difference is 0.5
    for size, expected in ((112, 0.5), (56, 1.0)):
        values = np.stack([face(x, size=size) for x in steps])[:, None]
        assert bench.jitter_px(values) == pytest.approx((expected, expected), rel=1e-3)


@pytest.mark.parametrize(
    ("clip", "every", "people"),
    [("single_face.mp4", 1, 1), ("single_face.mp4", 3, 1), ("no_face.mp4", 1, 0), ("face_noface.mov", 3, 1),
     ("lbbc2a.mpg", 3, 1)],
)  # fmt: skip
def test_who_is_in_a_real_clip_is_followed_and_nobody_else(clip, every, people, bench, real_data):
    frames, times_s = bench.decoded(real_data / "video" / clip)
    track = People(every=every)(iter([(frames, times_s)]))
    seen = bench.SEEN.get(clip, [bench.Seen("speaker", 0, len(frames) - 1)])
    figures = bench.measured(track, seen, 1.0)
    assert (figures.frames, figures.people) == (len(frames), people)
    assert (figures.unfounded, figures.swaps) == (0, 0)
    assert figures.found >= 0.98 * figures.visible
    assert figures.jitter_px[0] < 1.0


@pytest.mark.slow
@pytest.mark.parametrize("every", [1, 3])
def test_nobody_is_swapped_in_a_real_clip_with_cuts_and_several_people(every, bench, real_data):
    frames, times_s = bench.decoded(real_data / "video" / bench.CUTS_CLIP)
    track = People(every=every)(iter([(frames, times_s)]))
    seen = bench.SEEN[bench.CUTS_CLIP]
    figures = bench.measured(track, seen, 1.0)
    assert (figures.people, figures.swaps) == (4, 0)
    assert figures.found >= 0.9 * figures.visible
    assert figures.unfounded <= 6
    shots = [(2, 18, "singer"), (22, 40, "musician"), (84, 208, "singer"), (213, 272, "man in front")]
    who = bench.identities(Person("main")(track).values[:, None], seen)
    for first, last, name in shots:
        assert {names[0] for names in who[first : last + 1]} - {None} == {name}
    left, right = (bench.identities(Person(side)(track).values[:, None], seen) for side in ("left", "right"))
    assert (left[10], right[10]) == (["pianist"], ["singer"])
    assert (left[240], right[240]) == (["man in front"], ["woman in front"])


@pytest.mark.slow
@pytest.mark.parametrize("every", [1, 3])
def test_heads_that_hide_each_other_are_not_swapped(every, bench, real_data):
    for frames, behind, before in bench.crossings(real_data):
        track = People(every=every)(iter([(frames, np.arange(len(frames)) / bench.CROSSINGS_RATE_HZ)]))
        assert track.values.shape[1] == 2
        assert bench.crossing_swaps(track, behind, before) == 0
        assert (track.values[:, :, 14] > 0).mean() > 0.75
