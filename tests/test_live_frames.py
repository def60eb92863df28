"""Frames in, features out one by one: they are what the stored tracks hold, and nothing is kept of what is past."""

from __future__ import annotations

import gc
import itertools
import tracemalloc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from vacli import VacliError
from vacli.extract import live, vggish
from vacli.extract.crops import aligned
from vacli.extract.datasets import Sample
from vacli.extract.following import SCORE
from vacli.extract.live import LiveFrames, Moment
from vacli.extract.logmel import LogMel
from vacli.extract.media import Video
from vacli.extract.people import People, Person
from vacli.extract.synthetic import make_puppets
from vacli.extract.vggish import VGGish, build_vggish
from vacli.store import Track

from .made_up import made_up
from .media_files import pictures, write_video
from .test_people import Told, face

VARIABLE_S = [0.0, 0.04, 0.12, 0.125, 0.3, 0.5, 0.533, 0.7, 0.71, 1.4]


class Mean:
    """Mean and deviation of the colours of a crop."""

    name, eats, dim = "mean", "crops", 6

    def recipe(self) -> dict[str, Any]:
        return {"track": self.name}

    def options(self) -> dict[str, Any]:
        return {}

    def __call__(self, crops: np.ndarray) -> np.ndarray:
        x = crops.astype(np.float32)
        return np.concatenate([x.mean((1, 2)), x.std((1, 2))], axis=1)


class Blind:
    """A detector that finds nobody."""

    def recipe(self) -> dict[str, Any]:
        return {}

    def __call__(self, frames: np.ndarray) -> list[np.ndarray]:
        return [np.zeros((0, 15), np.float32) for _ in frames]


def people(detector: Any, every: int = 1) -> People:
    found = People(every=every)
    found.detector = detector
    return found


@pytest.fixture
def causal(monkeypatch, tmp_path):
    """VGGish, narrow, with made-up weights."""
    monkeypatch.setattr(vggish, "_CHANNELS", (4, 0, 4, 0, 4, 0, 4, 0))
    monkeypatch.setattr(vggish, "_WIDTH", 8)
    torch.save(made_up(build_vggish(True)), tmp_path / "small.pth")

    def make(**options: object) -> VGGish:
        given = {"window": "causal", "dtype": "float32", "device": "cpu", **options}
        return VGGish(str(tmp_path / "small.pth"), **given)  # type: ignore[arg-type]

    return make


def stack(moments: Sequence[Moment], name: str, dim: int) -> np.ndarray:
    """(T, dim) float32, NaN for None."""
    rows = [moment.rows[name] for moment in moments]
    return np.array([np.full(dim, np.nan, np.float32) if row is None else row for row in rows])


def offline(video: Path) -> tuple[Track, np.ndarray]:
    """The faces track, and what `Mean` makes of its crops as the store keeps it."""
    faces = Person("main")(People()(Video(video).frames()))
    rows = np.full((len(faces), Mean.dim), np.nan, np.float16)
    for crops, at in aligned(Sample(video.stem, video.parent, video=video), faces):
        rows[at] = Mean()(crops)
    return faces, rows.astype(np.float32)


def same_but_for_a_bit(mine: np.ndarray, stored: np.ndarray) -> None:
    """float16 of numbers that differ in their last float32 bits, as those of other batches do."""
    np.testing.assert_array_equal(np.isnan(mine), np.isnan(stored))
    np.testing.assert_allclose(mine, stored, rtol=2**-10, atol=1e-6)


# ---- pictures ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def puppet(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("puppets")
    (name,) = make_puppets(root, train=1, validation=0, length_s=4.0, processes=1)
    return root / "batch1" / f"{name}.mp4"


def compare_with_stored(video: Path) -> int:
    """How many faces were found in both."""
    faces, stored = offline(video)
    moments = list(LiveFrames(video, {"mean": Mean(), "logmel": LogMel()}))
    assert [m.time_s for m in moments] == faces.times_s.tolist()
    assert [m.frame for m in moments] == list(range(1, len(faces) + 1))
    seen = np.array([m.face for m in moments])
    found = faces.valid & (np.nan_to_num(faces.values[:, SCORE]) > 0.5)  # not bridged
    np.testing.assert_array_equal(seen[found], True)
    assert (seen & ~faces.valid).sum() <= 2  # false alarms, which the end would tell
    boxes = np.array([m.box for m, ok in zip(moments, found, strict=True) if ok])
    np.testing.assert_allclose(boxes, faces.values[found, :4], atol=1e-3)
    np.testing.assert_allclose(
        stack(moments, "mean", 6)[found], stored[found], atol=0.13
    )  # a level in a pixel
    sound = LogMel()(Video(video).sound(16000)).at(faces.times_s).astype(np.float32)
    np.testing.assert_array_equal(stack(moments, "logmel", 64), sound)
    return int(found.sum())


def test_rows_are_those_of_the_stored_tracks(puppet):
    assert compare_with_stored(puppet) >= 30


@pytest.mark.parametrize("name", ["single_face.mp4", "bbaf2n.mpg"])
def test_of_a_real_clip_rows_are_those_of_the_stored_tracks(name, real_data):
    assert compare_with_stored(real_data / "video" / name) >= 72


def numbered(count: int, cut: int | None = None) -> Iterator[tuple[np.ndarray, float]]:
    """Frames as `Told` reads them, at 25 Hz; another scene from `cut` on."""
    for i in range(count):
        rgb = np.full((200, 400, 3), 90 if cut is None or i < cut else 200, np.uint8)
        rgb[0, 0] = (i % 256, i // 256, 0)
        yield rgb, i / 25


def boxes_of(monkeypatch, *someone, count: int, cut: int | None = None, every: int = 1) -> list[Any]:
    """The middle of the main person's box, frame by frame; None where it is not seen."""
    monkeypatch.setattr(live, "_file", lambda _: numbered(count, cut))
    moments = LiveFrames(Path("told"), {"mean": Mean()}, people(Told(someone), every))
    return [None if m.box is None else float(m.box[[0, 2]].mean()) for m in moments]


def test_the_largest_face_is_followed_though_a_larger_one_comes(monkeypatch):
    first = {i: face(100 + i, size=60) for i in range(20)}
    small = {i: face(200, size=40) for i in range(20)}
    large = {i: face(320, size=120) for i in range(8, 20)}
    assert boxes_of(monkeypatch, small, first, large, count=20) == [100 + i for i in range(20)]


def test_a_false_alarm_is_left_at_once(monkeypatch):
    alarm = {0: face(320, size=120)}
    first = {i: face(100, size=60) for i in range(6)}
    assert boxes_of(monkeypatch, alarm, first, count=6) == [320, *[100] * 5]


def test_who_is_hidden_for_a_moment_is_waited_for(monkeypatch):
    first = {i: face(100, size=60) for i in range(30) if not 10 <= i < 16}
    other = {i: face(300, size=80) for i in range(5, 30)}
    found = boxes_of(monkeypatch, first, other, count=30)
    assert found == [*[100] * 10, *[None] * 6, *[100] * 14]


def test_who_is_gone_is_followed_by_the_largest_there(monkeypatch):
    first = {i: face(100, size=60) for i in range(10)}
    other = {i: face(300, size=80) for i in range(5, 40)}
    found = boxes_of(monkeypatch, first, other, count=40)
    assert found[:10] == [100] * 10
    assert found[10:22] == [None] * 12  # half a second
    assert found[-15:] == [300] * 15


def test_who_comes_again_within_two_seconds_is_the_same(monkeypatch):
    first = {i: face(100, size=60) for i in [*range(10), *range(40, 50)]}
    other = {i: face(300, size=80) for i in range(40, 50)}
    assert boxes_of(monkeypatch, first, other, count=50)[40:] == [100] * 10


def test_nobody_is_followed_across_a_cut(monkeypatch):
    before = {i: face(100, size=60) for i in range(10)}
    after = {i: face(300, size=60) for i in range(10, 20)}
    assert boxes_of(monkeypatch, before, after, count=20, cut=10) == [*[100] * 10, *[300] * 10]


def test_a_frame_is_asked_for_only_when_its_moment_is_wanted(monkeypatch):
    asked: list[int] = []

    def frames(_: Path) -> Iterator[tuple[np.ndarray, float]]:
        for i, frame in enumerate(numbered(9)):
            asked.append(i)
            yield frame

    monkeypatch.setattr(live, "_file", frames)
    for i, _ in enumerate(LiveFrames(Path("told"), {"mean": Mean()}, people(Blind()))):
        assert asked == list(range(i + 1))


@pytest.mark.parametrize("every", [1, 3])
def test_nothing_is_kept_of_what_is_past(every, monkeypatch):
    told = Told([{i: face(100 + i % 7) for i in range(4000)}])
    main = live._Main(people(told, every))
    frames = numbered(4000)
    held = []
    tracemalloc.start()
    for rows in (50, 300):
        for rgb, time_s in itertools.islice(frames, rows):
            main.face(rgb, time_s)
            told.asked.clear()
        gc.collect()  # Python's free lists too
        held.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    assert held[1] - held[0] < 10_000  # 300 rows of a face alone would be twice that
    assert all(len(someone.rows) <= every + 1 for someone in main.alive)


class Shared(Mean):
    """One of several outputs of one pass; counts the passes."""

    pass_key = "toy"
    passes = 0

    def __init__(self, output: str) -> None:
        self.output = output

    def encode(self, crops: np.ndarray, outputs: Sequence[str]) -> dict[str, np.ndarray]:
        Shared.passes += 1
        return {o: np.full((len(crops), 2), float(o), np.float32) for o in outputs}


def test_encoders_that_share_a_pass_make_one(monkeypatch):
    monkeypatch.setattr(live, "_file", lambda _: numbered(4))
    told = people(Told([{i: face(100) for i in range(3)}]))
    encoders = {"a": Shared("1"), "mean": Mean(), "b": Shared("2")}
    moments = list(LiveFrames(Path("told"), encoders, told))
    assert Shared.passes == 3
    assert [list(m.rows) for m in moments] == [["a", "mean", "b"]] * 4
    assert [None if m.rows["b"] is None else m.rows["b"].tolist() for m in moments] == [*[[2, 2]] * 3, None]
    assert moments[3].rows == {"a": None, "mean": None, "b": None}


# ---- sound ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("even.mp4", {}),
        ("variable.mkv", {"times_s": VARIABLE_S}),
        ("late_sound.mkv", {"times_s": VARIABLE_S, "sound_start_s": 0.31}),
        ("late_pictures.mkv", {"times_s": [t + 0.5 for t in VARIABLE_S]}),
        ("sound_ends.mp4", {"times_s": [t * 3 for t in VARIABLE_S]}),
        ("one_frame.mp4", {"count": 1}),
        ("two_frames.mp4", {"count": 2, "times_s": [0.0, 1.0]}),
        ("silent.mp4", {"sound": None}),
    ],
)  # fmt: skip
def test_rows_of_sound_are_those_of_the_whole_track_at_the_frames_times(name, how, causal, tmp_path):
    noise = np.random.default_rng(3).uniform(-0.3, 0.3, 48000 * 2).astype(np.float32)
    how = {"sound": noise, **how}
    video = write_video(tmp_path / name, pictures(how.pop("count", 10)), **how)
    encoders = {"logmel": LogMel(), "at_frames": causal(), "own_clock": causal(hop_s=0.07)}
    moments = list(LiveFrames(video, encoders, people(Blind())))
    times_s = np.array(list(Video(video).times()))
    assert [m.time_s for m in moments] == times_s.tolist()
    heard = 0
    for key, encoder in encoders.items():
        clock = (times_s,) if key == "at_frames" else ()
        track = encoder(Video(video).sound(encoder.rate_hz), *clock)
        stored = track.at(times_s).astype(np.float32)
        same_but_for_a_bit(stack(moments, key, encoder.dim), stored)
        heard += int(np.isfinite(stored[:, 0]).sum())
    assert heard > 0 or how["sound"] is None


def test_rows_of_sound_do_not_depend_on_where_a_minute_ends(causal, tmp_path, monkeypatch):
    monkeypatch.setattr("vacli.extract.logmel._BLOCK_ROWS", 37)
    test_rows_of_sound_are_those_of_the_whole_track_at_the_frames_times(
        "cut.mkv", {"times_s": VARIABLE_S}, causal, tmp_path
    )


def test_of_a_long_sound_little_is_held(causal, tmp_path):
    def noise() -> Iterator[np.ndarray]:
        rng = np.random.default_rng(0)
        for _ in range(200):  # seconds
            yield rng.uniform(-0.1, 0.1, 16000).astype(np.float32)

    own, patches = live._OnItsClock(LogMel().pieces(noise()), 0.01), live._AtFrames(causal(), noise())
    for i in range(0, 199):
        assert own.row(i - 1.0 if i else None, float(i), i + 1.0) is not None
        assert patches.row(None, i + 1.0, None) is not None
        assert own._track is not None
        assert len(own._track) < 6600
        assert len(patches._held) < 6300


def test_what_hears_the_future_is_refused_by_name(causal, tmp_path):
    class Whole:
        name, eats, rate_hz = "whole", "sound", 16000

    for refused in (causal(window="centred"), causal(window="look-ahead"), Whole()):
        with pytest.raises(VacliError, match=r"^speech cannot be had live: .*window=causal"):
            LiveFrames(tmp_path / "a.mp4", {"logmel": LogMel(), "speech": refused})


# ---- sources -------------------------------------------------------------------------------------------------


def test_a_lost_and_a_broken_file_are_told(tmp_path):
    (tmp_path / "text.mp4").write_text("no video")
    for name, why in (("lost.mp4", "no such file"), ("text.mp4", "cannot be read as a video")):
        with pytest.raises(VacliError, match=why):
            list(LiveFrames(tmp_path / name, {"logmel": LogMel()}, people(Blind())))


class Camera:
    """cv2.VideoCapture with three pictures, blue ones, as OpenCV orders colours."""

    opened = released = 0

    def __init__(self, number: int) -> None:
        Camera.opened += 1
        self.left = 3 if number == 0 else 0

    def set(self, *_: object) -> bool:
        return True

    def read(self) -> tuple[bool, np.ndarray | None]:
        self.left -= 1
        return (True, np.full((200, 400, 3), (255, 0, 0), np.uint8)) if self.left >= 0 else (False, None)

    def release(self) -> None:
        Camera.released += 1


def until_unplugged(frames: LiveFrames) -> list[Moment]:
    """The moments of a camera that stops giving pictures, which is told in one line."""
    moments: list[Moment] = []
    with pytest.raises(VacliError, match=r"^camera 0 gave no more pictures after \d+\.\d s; .*anew$"):
        moments.extend(frames)
    return moments


def test_a_camera_gives_pictures_at_the_times_they_come_and_no_sound(monkeypatch):
    shown: list[np.ndarray] = []

    class Sees(Blind):
        def __call__(self, frames: np.ndarray) -> list[np.ndarray]:
            shown.extend(frames)
            return [face(200)[None] for _ in frames]

    monkeypatch.setattr(cv2, "VideoCapture", Camera)
    clock = iter([100.0, 100.04, 100.04, 100.2])
    monkeypatch.setattr("vacli.extract.live.time.monotonic", lambda: next(clock))
    before = Camera.released
    moments = until_unplugged(LiveFrames(0, {"mean": Mean(), "logmel": LogMel()}, people(Sees())))
    assert [m.time_s for m in moments] == pytest.approx([0, 0.04])  # two at one time are one
    assert [m.frame for m in moments] == [1, 2]
    assert all(m.face and m.rows["mean"] is not None and m.rows["logmel"] is None for m in moments)
    assert shown[-1][0, 0].tolist() == [0, 0, 255]  # RGB
    assert Camera.released == before + 1


def test_a_camera_that_stops_giving_pictures_is_told_after_all_that_came(monkeypatch):
    monkeypatch.setattr(cv2, "VideoCapture", Camera)
    before = Camera.released
    moments = until_unplugged(LiveFrames(0, {"mean": Mean()}, people(Blind())))
    assert [m.frame for m in moments] == [1, 2, 3]
    assert Camera.released == before + 1


def test_networks_are_built_before_the_camera_is_opened(monkeypatch):
    monkeypatch.setattr(cv2, "VideoCapture", Camera)
    before, met = Camera.opened, []

    class Lazy(Shared):
        def encode(self, crops: np.ndarray, outputs: Sequence[str]) -> dict[str, np.ndarray]:
            met.append(("network", Camera.opened - before, crops.shape))
            return super().encode(crops, outputs)

    class Finds(Blind):
        def __call__(self, frames: np.ndarray) -> list[np.ndarray]:
            met.append(("detector", Camera.opened - before, frames.dtype))
            return super().__call__(frames)

    next(iter(LiveFrames(0, {"a": Lazy("1"), "b": Lazy("2")}, people(Finds()))))
    assert met == [("detector", 0, np.uint8), ("network", 0, (1, 112, 112, 3)), ("detector", 1, np.uint8)]


def test_who_presses_ctrl_c_is_told_of_no_camera(monkeypatch):
    class Interrupted(Camera):
        def read(self) -> tuple[bool, np.ndarray | None]:
            there, picture = super().read()
            if not there:
                raise KeyboardInterrupt
            return there, picture

    monkeypatch.setattr(cv2, "VideoCapture", Interrupted)
    before = Camera.released
    with pytest.raises(KeyboardInterrupt):
        list(LiveFrames(0, {}, people(Blind())))
    assert Camera.released == before + 1


def test_who_stops_looking_frees_the_camera(monkeypatch):
    monkeypatch.setattr(cv2, "VideoCapture", Camera)
    before = Camera.released
    moments = iter(LiveFrames(0, {}, people(Blind())))
    next(moments)
    moments.close()  # type: ignore[attr-defined]
    assert Camera.released == before + 1


def test_a_camera_that_is_not_there_is_told_in_one_line(capfd):
    with pytest.raises(VacliError, match=r"camera 97.*--camera N") as told:
        list(LiveFrames(97, {"mean": Mean()}, people(Blind())))
    assert "\n" not in str(told.value)
    assert capfd.readouterr() == ("", "")
