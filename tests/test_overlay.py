"""An overlay has every frame at its own time, the sound in step, and drawn on it what the curve says of that frame."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pytest
from vacli import VacliError
from vacli.extract.media import Video
from vacli.report.overlay import write_overlay
from vacli.store import Track
from vacli.store.curves import Curve

from .media_files import clicks, pictures, write_video
from .test_playable import CLIPS, VARIABLE_S, damaged, onsets_s, packets, times

HEIGHT, WIDTH = 240, 320
GREY = np.full((HEIGHT, WIDTH, 3), 110, np.uint8)


def curve(times_s, values=(0.0, 0.0), face=True, person="main") -> Curve:
    rows = len(times_s)
    track = Track(np.broadcast_to(np.float32(values), (rows, 2)).copy(), np.array(times_s, np.float64))
    return Curve(track, np.broadcast_to(face, rows).copy(), person)


def frames(path: Path) -> np.ndarray:
    return np.concatenate([rgb for rgb, _ in Video(path).frames()])


def drawn(tmp_path: Path, of: Curve, boxes=None, count: int = 2) -> np.ndarray:
    """(T, H, W): by how much each pixel of a grey video was changed."""
    video = write_video(tmp_path / "grey.mp4", [GREY] * count)
    write_overlay(Video(video), tmp_path / "out.mp4", of, boxes)
    return np.abs(frames(tmp_path / "out.mp4").astype(int) - frames(video)).max(axis=3)


def white(rgb: np.ndarray) -> np.ndarray:
    """(n, 2) x, y of the pixels of the gauge's dot and tail, in the lower half."""
    y, x = np.nonzero((rgb[HEIGHT // 2 :] > 235).all(axis=2))
    return np.stack([x, y + HEIGHT // 2], 1)


# ---- time and sound ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("a.mp4", {"times_s": VARIABLE_S}),
        ("late.mp4", {"times_s": [t + 0.75 for t in VARIABLE_S], "sound_start_s": 0.5}),
        ("late_sound.mkv", {"times_s": VARIABLE_S, "sound_start_s": 0.25}),
        ("pcm.mov", {"times_s": VARIABLE_S, "sound_start_s": 0.25}),
        ("vp9.webm", {"times_s": VARIABLE_S}),
        ("mp2.mpg", {}),
        ("pcm.avi", {}),
        ("turned.mov", {"rotation": 90, "times_s": VARIABLE_S}),
        ("silent.mp4", {"sound": None}),
        ("one_frame.mp4", {"count": 1}),
    ],
)  # fmt: skip
def test_every_frame_is_there_at_its_time_and_the_sound_where_it_was(name, how, tmp_path):
    how = {"sound": clicks(1.0, [0.2, 0.6]), **how}
    video = write_video(tmp_path / name, pictures(how.pop("count", 10)), **how)
    out, done = tmp_path / "out.mp4", []
    write_overlay(Video(video), out, curve(times(video)), progress=done.append)
    np.testing.assert_allclose(times(out), times(video), atol=1e-3)
    np.testing.assert_allclose(onsets_s(out), onsets_s(video), atol=2e-3)
    assert len(onsets_s(video)) == (0 if how["sound"] is None else 2)
    assert sum(done) == len(times(video))
    assert sorted(os.listdir(tmp_path)) == sorted([name, "out.mp4"])
    with av.open(str(out)) as container:
        context = container.streams.video[0].codec_context
        assert (context.name, context.pix_fmt) == ("h264", "yuv420p")


@pytest.mark.parametrize("codec", ["aac", "opus", "flac"])
def test_sound_that_mp4_can_hold_is_copied(codec, tmp_path, monkeypatch):
    encoder = {"opus": "libopus"}.get(codec, codec)
    monkeypatch.setitem(write_video.__globals__["CODECS"], ".mkv", ("libx264", encoder))
    video = write_video(tmp_path / "a.mkv", pictures(10), sound=clicks(1.0, [0.2, 0.6]))
    write_overlay(Video(video), tmp_path / "out.mp4", curve(times(video)))
    assert packets(tmp_path / "out.mp4", "audio") == packets(video, "audio")
    np.testing.assert_allclose(onsets_s(tmp_path / "out.mp4"), onsets_s(video), atol=2e-3)


def test_sound_that_mp4_refuses_is_decoded_before_anything_is_drawn(tmp_path):
    video = damaged(tmp_path / "a.ts", ".mpg")
    out, done = tmp_path / "out.mp4", []
    write_overlay(Video(video), out, curve(times(video)), progress=done.append)
    assert sum(done) == 30
    np.testing.assert_allclose(times(out), times(video), atol=1e-3)
    np.testing.assert_allclose(onsets_s(out), onsets_s(video), atol=2e-3)


@pytest.mark.parametrize("name", CLIPS)
def test_of_a_real_clip_frames_and_sound_stay_in_their_place(name, real_data, tmp_path):
    video, out = real_data / "video" / name, tmp_path / "out.mp4"
    write_overlay(Video(video), out, curve(times(video)))
    np.testing.assert_allclose(times(out), times(video), atol=1e-3)
    before, now = (np.concatenate(list(Video(path).sound())) for path in (video, out))
    length = min(len(before), len(now))
    assert abs(len(before) - len(now)) < 0.05 * 16000
    assert np.corrcoef(before[:length], now[:length])[0, 1] > 0.95
    if video.suffix in (".mp4", ".mov"):  # AAC, MP3
        assert packets(out, "audio") == packets(video, "audio")


def test_colours_stay_what_they_were(tmp_path):
    shown = np.full((HEIGHT, WIDTH, 3), (200, 60, 30), np.uint8)
    shown[:, WIDTH // 2 :] = (30, 90, 210)
    video = write_video(tmp_path / "a.mp4", [shown])
    write_overlay(Video(video), tmp_path / "out.mp4", curve([0.0]))
    change = frames(tmp_path / "out.mp4")[0].astype(int) - frames(video)[0]
    assert np.abs(np.median(change[: HEIGHT // 2].reshape(-1, 3), axis=0)).max() <= 3


# ---- what is drawn -------------------------------------------------------------------------------------------


def test_the_box_is_where_the_face_is_and_nowhere_else(tmp_path):
    boxes = np.array([[120, 40, 180, 110], [np.nan] * 4, [60, 40, 120, 110]], np.float32)
    change = drawn(tmp_path, curve([0, 0.04, 0.08]), boxes, 3)[:, :120] > 60
    for row, (left, right) in ((0, (120, 180)), (2, (60, 120))):
        assert change[row, 70:80, left - 2 : left + 3].any(axis=1).all()
        assert change[row, 70:80, right - 2 : right + 3].any(axis=1).all()
        assert not change[row, 70:80, left + 8 : right - 8].any()
    assert not change[1].any()


def test_a_row_without_a_face_has_a_sign_and_no_box(tmp_path):
    boxes = np.full((2, 4), (120, 60, 180, 110), np.float32)
    change = drawn(tmp_path, curve([0, 0.04], face=[True, False]), boxes) > 60
    assert change[0, 55:115, 110:190].any()
    assert not change[1, 55:115, 110:190].any()
    assert not change[0, :40, :100].any()
    assert change[1, :40, :100].any()


@pytest.mark.parametrize(("valence", "arousal"), [(0.9, 0.0), (-0.9, 0.0), (0.0, 0.9), (0.0, -0.9)])
def test_the_dot_stands_where_the_values_are(valence, arousal, tmp_path):
    video = write_video(tmp_path / "a.mp4", [GREY])
    places = []
    for values in ((0, 0), (valence, arousal)):
        write_overlay(Video(video), tmp_path / "out.mp4", curve([0.0], values))
        places.append(white(frames(tmp_path / "out.mp4")[0]).mean(axis=0))
    moved = (places[1] - places[0]) / (0.9 * 40 * 0.75)  # by the circle's radius in pixels
    np.testing.assert_allclose(moved, (np.sign(valence), -np.sign(arousal)), atol=0.1)


def test_a_tail_shows_where_the_dot_was_of_late(tmp_path):
    rows = np.array([[-0.9, 0.5], [0.9, 0.5], [0.9, 0.5]], np.float32)
    of = Curve(Track(rows, np.array([0.0, 0.04, 9.0])), np.ones(3, bool))
    video = write_video(tmp_path / "a.mp4", [GREY] * 3, times_s=[0, 0.04, 9.0])
    write_overlay(Video(video), tmp_path / "out.mp4", of)
    bright = (frames(tmp_path / "out.mp4")[:, 150:200, 16:70] > 100).all(axis=3).sum(axis=(1, 2))
    assert bright[1] > bright[2] + 15  # a second and a half later it is gone


def test_the_gauge_keeps_off_the_face(tmp_path):
    low_left = np.full((2, 4), (5, 130, 120, 235), np.float32)
    here = drawn(tmp_path, curve([0, 0.04]), low_left)[0] > 30
    assert not here[150:230, 20:100].any()  # inside the box
    assert here[150:230, 200:].any()


def test_where_the_curve_has_no_row_nothing_is_made_up(tmp_path):
    change = drawn(tmp_path, curve([0, 0.04]), count=10) > 40
    gauge, sign = change[:, 150:, :160].any(axis=(1, 2)), change[:, :40, :100].any(axis=(1, 2))
    assert gauge.tolist() == [True] * 4 + [False] * 6  # within a tenth of a second of a row
    assert sign.tolist() == [False] * 4 + [True] * 6


def test_a_curve_without_rows_is_an_overlay_without_values(tmp_path):
    assert drawn(tmp_path, curve([]))[:, :40, :100].any()


def test_people_are_told_apart_by_name(tmp_path):
    main, left, second = (
        drawn(tmp_path, curve([0, 0.04], person=person))[0, :40, :120] for person in ("main", "left", "2")
    )
    assert not (main > 40).any()
    assert (left > 40).any()
    assert (second > 40).sum() > (left > 40).sum()  # "person 2"


@pytest.mark.parametrize(
    ("height", "width"), [(2160, 3840), (181, 321), (1138, 640), (48, 64), (2, 2), (1, 1)]
)
def test_pictures_of_any_size_can_be_drawn_on(height, width, tmp_path):
    class Blank(Video):
        def frames(self, batch: int = 32) -> Iterator[tuple[np.ndarray, np.ndarray]]:
            yield np.full((2, height, width, 3), 90, np.uint8), np.array([0.0, 0.04])

    video = write_video(tmp_path / "a.mp4", [GREY] * 2)
    box = np.full((2, 4), (-width, height / 4, 9 * width, np.inf), np.float32)
    box[1] = (0.3 * width, 0.1 * height, 0.6 * width, 0.6 * height)
    write_overlay(Blank(video), tmp_path / "out.mp4", curve([0, 0.04], face=[False, True]), box)
    seen = frames(tmp_path / "out.mp4")
    assert seen.shape == (2, height + height % 2, width + width % 2, 3)
    if min(height, width) > 40:
        changed = (np.abs(seen[1].astype(int) - 90) > 20).any(axis=2).mean()
        assert 0.01 < changed < 0.6  # readable, and the picture is still to be seen


def test_pictures_that_change_their_size_fit_into_the_first(tmp_path):
    class Changing(Video):
        def frames(self, batch: int = 32) -> Iterator[tuple[np.ndarray, np.ndarray]]:
            yield np.full((1, 240, 320, 3), 90, np.uint8), np.array([0.0])
            yield np.full((1, 300, 100, 3), 200, np.uint8), np.array([0.04])

    video = write_video(tmp_path / "a.mp4", [GREY] * 2)
    write_overlay(Changing(video), tmp_path / "out.mp4", curve([0, 0.04]))
    second = frames(tmp_path / "out.mp4")[1].astype(int)
    assert second.shape == (240, 320, 3)
    np.testing.assert_allclose(second[20, 160], 200, atol=6)
    np.testing.assert_allclose(second[20, 20], 0, atol=6)


# ---- whole or absent -----------------------------------------------------------------------------------------


class Stopped(Video):
    """Ctrl-C at the second frame."""

    def frames(self, batch: int = 32) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        yield next(super().frames(1))
        raise KeyboardInterrupt


def test_ctrl_c_leaves_what_was_there_before(tmp_path):
    video = write_video(tmp_path / "a.mp4", pictures(5), sound=clicks(0.5, [0.1]))
    out = tmp_path / "out" / "a.overlay.mp4"
    with pytest.raises(KeyboardInterrupt):
        write_overlay(Stopped(video), out, curve(times(video)))
    assert os.listdir(out.parent) == []
    write_overlay(Video(video), out, curve(times(video)))
    whole = out.read_bytes()
    with pytest.raises(KeyboardInterrupt):
        write_overlay(Stopped(video), out, curve(times(video)))
    assert os.listdir(out.parent) == ["a.overlay.mp4"]
    assert out.read_bytes() == whole


def test_what_cannot_be_had_is_told_and_leaves_nothing(tmp_path):
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(VacliError, match="cannot be read as a video"):
        write_overlay(Video(tmp_path / "text.mp4"), tmp_path / "out.mp4", curve([0.0]))
    video = write_video(tmp_path / "a.mp4", pictures(2))
    with pytest.raises(VacliError, match="cannot write"):
        write_overlay(Video(video), tmp_path / "text.mp4" / "out.mp4", curve([0.0]))
    with pytest.raises(ValueError, match="wanted \\(T, 4\\)"):
        write_overlay(Video(video), tmp_path / "out.mp4", curve([0.0]), np.zeros((2, 4)))
    assert sorted(os.listdir(tmp_path)) == ["a.mp4", "text.mp4"]


def test_frames_are_not_held(tmp_path):
    alive: list[weakref.ref] = []
    most = 0

    class Long(Video):
        def frames(self, batch: int = 32) -> Iterator[tuple[np.ndarray, np.ndarray]]:
            nonlocal most
            for i in range(60):
                rgb = np.zeros((1, 120, 160, 3), np.uint8)
                alive.append(weakref.ref(rgb))
                yield rgb, np.array([i / 25])
                del rgb
                most = max(most, sum(ref() is not None for ref in alive))

    video = write_video(tmp_path / "a.mp4", [GREY], sound=clicks(2.4, [0.1]))
    write_overlay(Long(video), tmp_path / "out.mp4", curve(np.arange(60) / 25))
    assert len(times(tmp_path / "out.mp4")) == 60
    assert most <= 3
