"""Frames keep their own times, sound lies where its timestamps put it, damage is said and never fatal."""

from __future__ import annotations

import os
import struct
import tracemalloc
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from vacli import VacliError
from vacli.extract import media
from vacli.extract.media import SUFFIXES, Video

from .media_files import CODECS, clicks, pictures, write_video

MILLISECOND = 1e-3
RED, BLUE = (200, 20, 20), (20, 20, 200)
UNEVEN_S = [0.0, 0.033, 0.05, 0.3, 0.302, 0.9, 1.0, 1.01, 1.05, 1.5]


def everything(video: Video, batch: int = 32) -> tuple[np.ndarray, np.ndarray]:
    parts = list(video.frames(batch))
    return np.concatenate([rgb for rgb, _ in parts]), np.concatenate([times_s for _, times_s in parts])


def listen(video: Video) -> np.ndarray:
    return np.concatenate([*video.sound(), np.empty(0, np.float32)])


def onsets_s(sound: np.ndarray, rate_hz: int = 16000) -> np.ndarray:
    """Where the clicks begin: loud samples with 50 ms of quiet before them."""
    loud = np.flatnonzero(np.abs(sound) > 0.3)
    return loud[np.diff(loud, prepend=-rate_hz) > rate_hz // 20] / rate_hz


def close(pixel: np.ndarray, colour: tuple[int, int, int]) -> bool:
    return bool(np.abs(pixel.astype(int) - colour).max() < 40)


@pytest.mark.parametrize("suffix", sorted(CODECS))
def test_every_container_gives_all_its_frames_and_its_sound(suffix, tmp_path):
    path = write_video(tmp_path / f"a{suffix}", pictures(30), sound=clicks(1.2, [0.5]))
    video = Video(path)
    streams = video.check()
    rgb, times_s = everything(video)
    assert rgb.shape == (30, 48, 64, 3)
    assert rgb.dtype == np.uint8
    assert (streams.width, streams.height, streams.has_sound) == (64, 48, True)
    # Opus and AAC start before t = 0, so the pictures may start a little after it.
    np.testing.assert_allclose(np.diff(times_s), 0.04, atol=MILLISECOND)
    assert 0 <= times_s[0] < 0.03
    np.testing.assert_allclose(onsets_s(listen(video)) - times_s[0], [0.5], atol=2 * MILLISECOND)
    assert close(rgb[0, 10, 10], RED)
    assert close(rgb[-1, 40, 50], BLUE)
    assert video.damage is None
    assert suffix in SUFFIXES


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov", ".webm"])
def test_frames_keep_their_own_times(suffix, tmp_path):
    _, got = everything(Video(write_video(tmp_path / f"v{suffix}", pictures(10), UNEVEN_S)))
    np.testing.assert_allclose(got, UNEVEN_S, atol=MILLISECOND / 2)


def test_a_video_that_starts_late_starts_at_zero(tmp_path):
    _, times_s = everything(Video(write_video(tmp_path / "late.mpg", pictures(5))))
    np.testing.assert_allclose(
        times_s, np.arange(5) / 25, atol=1e-9
    )  # MPEG program streams start at about 0.5 s


def test_frames_held_back_by_the_decoder_are_not_lost(tmp_path):
    path = write_video(tmp_path / "b.mp4", pictures(23), options={"bf": "4", "preset": "slow"})
    assert len(everything(Video(path))[1]) == 23


def test_b_frames_in_avi_come_at_a_constant_rate(tmp_path):
    path = write_video(tmp_path / "b.avi", pictures(20), codec="libx264", options={"bf": "3"})
    _, times_s = everything(Video(path))
    np.testing.assert_allclose(times_s, np.arange(20) / 25, atol=1e-9)


@pytest.mark.parametrize(
    ("stamps", "times_s"),
    [
        ([0, 40, 40, 80], [0, 0.04, 0.040001, 0.08]),
        ([0, 40, 20, 80], [0, 0.04, 0.040001, 0.08]),
        ([0, None, None, 120], [0, 0.04, 0.08, 0.12]),
        ([None, 40], [0, 0.04]),
        ([40, 40, 40], [0.04, 0.040001, 0.040002]),
    ],
    ids=["equal", "backward", "missing", "missing at first", "frozen"],
)
def test_bad_timestamps_are_nudged_just_past_the_frame_before(stamps, times_s):
    clock = media._Clock(Fraction(0), Fraction(25))
    got = [clock(stamp, Fraction(1, 1000)) for stamp in stamps]
    np.testing.assert_allclose(got, times_s, atol=1e-9)
    assert (np.diff(got) > 0).all()


def test_batches_are_cut_at_their_length_and_never_reordered(tmp_path):
    path = write_video(tmp_path / "a.mp4", pictures(10))
    lengths = [len(times_s) for _, times_s in Video(path).frames(batch=4)]
    assert lengths == [4, 4, 2]
    assert np.array_equal(everything(Video(path), 3)[0], everything(Video(path), 32)[0])


@pytest.mark.parametrize("rotation", [0, 90])
def test_pictures_are_the_frames_before_they_are_made(rotation, tmp_path):
    path = write_video(
        tmp_path / "a.mov", pictures(10), pixel_aspect=Fraction(4, 3), rotation=rotation, times_s=UNEVEN_S
    )
    rgb, times_s = everything(Video(path))
    seen = list(Video(path).pictures())
    assert all(picture.shape == rgb.shape[1:3] for picture in seen)
    assert np.array_equal(np.stack([picture.rgb() for picture in seen]), rgb)
    assert np.array_equal([picture.time_s for picture in seen], times_s)
    assert np.array_equal(list(Video(path).times()), times_s)


def test_large_frames_make_small_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(media, "BATCH_BYTES", 3 * 48 * 64 * 3)
    path = write_video(tmp_path / "a.mp4", pictures(7))
    assert [len(times_s) for _, times_s in Video(path).frames()] == [3, 3, 1]


def test_a_change_of_frame_size_starts_a_new_batch(tmp_path, monkeypatch):
    mixed = [av.VideoFrame.from_ndarray(p, format="rgb24") for p in [*pictures(4), *pictures(5, 96, 128)]]
    path = write_video(tmp_path / "a.mp4", pictures(1))
    monkeypatch.setattr(Video, "_decode", lambda *_: ((frame, i) for i, frame in enumerate(mixed)))
    shapes = [rgb.shape for rgb, _ in Video(path).frames()]
    assert shapes == [(4, 48, 64, 3), (5, 96, 128, 3)]


# The corners at which the red and the blue quarter are seen after the player has turned the picture.
@pytest.mark.parametrize(
    ("rotation", "red", "blue"),
    [(0, (0, 0), (-1, -1)), (90, (-1, 0), (0, -1)), (180, (-1, -1), (0, 0)), (-90, (0, -1), (-1, 0))],
)
def test_pictures_are_turned_upright(rotation, red, blue, tmp_path):
    path = write_video(tmp_path / "r.mp4", pictures(3), rotation=rotation)
    rgb, _ = everything(Video(path))
    streams = Video(path).check()
    assert (
        (streams.height, streams.width) == rgb.shape[1:3] == ((64, 48) if rotation in (90, -90) else (48, 64))
    )
    assert close(rgb[0][red], RED)
    assert close(rgb[0][blue], BLUE)


def test_the_matrix_of_a_phone_held_upright_turns_clockwise(tmp_path):
    """Sign check against the file format itself: ISO 14496-12, (x, y) -> (a x + c y, b x + d y), y downward."""
    path = write_video(tmp_path / "p.mp4", pictures(3))
    data = bytearray(path.read_bytes())
    one = 1 << 16
    straight = struct.pack(">9i", one, 0, 0, 0, one, 0, 0, 0, 1 << 30)
    clockwise = struct.pack(">9i", 0, one, 0, -one, 0, 0, 48 * one, 0, 1 << 30)
    place = data.index(straight, data.index(b"tkhd"))
    data[place : place + 36] = clockwise
    path.write_bytes(data)
    rgb, _ = everything(Video(path))
    assert rgb.shape[1:3] == (64, 48)
    assert close(rgb[0, 0, -1], RED)  # top left has gone to top right


@pytest.mark.parametrize(("aspect", "width"), [(Fraction(4, 3), 85), (Fraction(1, 2), 32)])
def test_pixels_are_made_square(aspect, width, tmp_path):
    path = write_video(tmp_path / "a.mkv", pictures(3), pixel_aspect=aspect)
    rgb, _ = everything(Video(path))
    assert rgb.shape == (3, 48, width, 3)
    assert (Video(path).check().width, Video(path).check().height) == (width, 48)
    assert close(rgb[0, 10, 5], RED)
    assert close(rgb[0, 40, -5], BLUE)


def test_odd_sizes_and_full_range_keep_their_colours(tmp_path):
    path = write_video(tmp_path / "odd.avi", pictures(2, 47, 63), codec="ffv1")
    rgb, _ = everything(Video(path))
    assert rgb.shape[1:] == (47, 63, 3)
    assert np.abs(rgb[0][2:20, 2:28].astype(int) - RED).max() <= 3  # lossless but for the colour space


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv", ".webm", ".mpg"])
def test_late_sound_lies_where_its_timestamps_put_it(suffix, tmp_path):
    path = write_video(tmp_path / f"s{suffix}", pictures(50), sound=clicks(1.5, [0.7]), sound_start_s=0.5)
    _, times_s = everything(Video(path))
    sound = listen(Video(path))
    np.testing.assert_allclose(onsets_s(sound) - times_s[0], [1.2], atol=2 * MILLISECOND)
    assert np.abs(sound[: round(0.45 * 16000)]).max() == 0


def test_holes_in_the_sound_are_zeros_and_nothing_behind_them_moves(tmp_path):
    path = write_video(
        tmp_path / "h.mkv", pictures(50), sound=clicks(2, [0.2, 0.8, 1.7]), sound_holes_s=[(0.6, 1.2)]
    )
    sound = listen(Video(path))
    np.testing.assert_allclose(onsets_s(sound), [0.2, 1.7], atol=MILLISECOND)
    assert np.abs(sound[round(0.65 * 16000) : round(1.15 * 16000)]).max() == 0
    assert abs(len(sound) / 16000 - 2) < 2 * MILLISECOND


def made_frames(starts_s: list[float], sound: list[np.ndarray]) -> list[av.AudioFrame]:
    frames = []
    for start_s, samples in zip(starts_s, sound, strict=True):
        frame = av.AudioFrame.from_ndarray(samples[None].astype(np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.time_base, frame.pts = 16000, Fraction(1, 16000), round(start_s * 16000)
        frames.append(frame)
    return frames


def test_a_frame_of_colours_that_there_are_none_of_is_shown_as_if_it_said_nothing_of_them():
    colourful = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    seen = []
    for colours in (media.UNSAID, 78):  # the second as damage has it
        frame = av.VideoFrame.from_ndarray(colourful, format="rgb24").reformat(format="yuv420p")
        frame.colorspace = frame.color_primaries = frame.color_trc = colours
        picture = media.Picture(frame, 64, 0.0, media._Converter())
        seen.append(
            [
                picture.rgb_within((0, 0, 64, 48)).copy(),
                picture.rgb_within((8, 8, 9, 9)).copy(),
                picture.rgb(),
            ]
        )
    assert seen[0][0].std() > 10
    for unsaid, unknown in zip(*seen, strict=True):
        np.testing.assert_array_equal(unsaid, unknown)


def test_jitter_of_timestamps_leaves_the_sound_whole():
    wave = np.sin(np.arange(16000) / 5).astype(np.float32)
    jitter_s = np.random.default_rng(0).uniform(-0.01, 0.01, 10)
    frames = made_frames((np.arange(10) / 10 + jitter_s - jitter_s[0]).tolist(), np.split(wave, 10))
    runs = list(media._resampled(frames, 16000, Fraction(0)))
    assert [begin_s for begin_s, _ in runs if begin_s is not None] == [0.0]
    np.testing.assert_allclose(np.concatenate([block for _, block in runs]), wave, atol=1e-6)


def test_overlapping_sound_is_cut(tmp_path, monkeypatch):
    ramp = np.arange(3200, dtype=np.float32)
    frames = made_frames([0, 0.1], [ramp[:3200], ramp[:3200]])  # the second begins in the middle of the first
    path = write_video(tmp_path / "a.mp4", pictures(2), sound=clicks(0.3, []))
    monkeypatch.setattr(Video, "_decode", lambda *_: ((frame, None) for frame in frames))
    monkeypatch.setattr(media, "_start_s", lambda _: Fraction(0))
    np.testing.assert_allclose(listen(Video(path)), [*range(3200), *range(1600, 3200)])


def test_the_channels_are_averaged_at_the_asked_for_rate(tmp_path):
    path = write_video(tmp_path / "a.mov", pictures(3), sound=clicks(1.0, [0.5]))
    at_44k = np.concatenate(list(Video(path).sound(44100)))
    assert at_44k.dtype == np.float32
    assert abs(len(at_44k) - 44100) <= 2
    assert 0.75 < np.abs(at_44k).max() < 0.85  # not louder than one channel


def test_no_sound_yields_nothing(tmp_path):
    path = write_video(tmp_path / "a.mp4", pictures(3))
    assert list(Video(path).sound()) == []
    assert not Video(path).check().has_sound


def test_making_a_video_opens_nothing():
    assert Video("nowhere.mp4").path == Path("nowhere.mp4")


def refused(path: Path) -> str:
    for read in (Video(path).check, lambda: list(Video(path).frames())):
        with pytest.raises(VacliError) as caught:
            read()
        message = str(caught.value)
        assert str(path) in message
        assert "wanted" in message
        assert "\n" not in message
    return message


def test_what_is_no_video_is_refused_in_one_line(tmp_path):
    text = tmp_path / "text.mp4"
    text.write_text("this is not a film\n" * 100)
    assert "cannot be read as a video" in refused(text)
    (tmp_path / "empty.mp4").touch()
    assert "cannot be read as a video" in refused(tmp_path / "empty.mp4")
    assert "no such file" in refused(tmp_path / "absent.mp4")
    assert "no such file" in refused(tmp_path)


def test_sound_without_pictures_is_refused(tmp_path):
    path = write_video(tmp_path / "sound.mp4", sound=clicks(0.5, [0.1]))
    assert "no pictures, only sound" in refused(path)


@pytest.mark.parametrize(
    "playlist",
    [
        "ffconcat version 1.0\nfile film.mpg\n",
        "#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfilm.mpg\n#EXT-X-ENDLIST\n",
    ],
)
def test_playlists_that_open_other_files_are_refused(playlist, tmp_path):
    write_video(tmp_path / "film.mpg", pictures(5))
    (tmp_path / "list.mp4").write_text(playlist)
    assert "cannot be read as a video" in refused(tmp_path / "list.mp4")


def test_pictures_beyond_the_limit_are_refused(tmp_path, monkeypatch):
    path = write_video(tmp_path / "a.mp4", pictures(3))
    monkeypatch.setattr(media, "MAX_PIXELS", 48 * 64 - 1)
    assert "pictures of 64x48" in refused(path)


def test_pixels_that_would_stretch_beyond_the_limit_are_refused(tmp_path, monkeypatch):
    path = write_video(tmp_path / "a.mkv", pictures(3), pixel_aspect=Fraction(20, 1))
    monkeypatch.setattr(media, "MAX_PIXELS", 48 * 64 * 10)
    assert "pictures of 1280x48" in refused(path)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi", ".webm"])
@pytest.mark.parametrize("part", [0.5, 0.7, 0.9])
def test_a_cut_file_gives_its_frames_up_to_the_cut_and_says_so(suffix, part, tmp_path, capfd):
    path = write_video(
        tmp_path / f"a{suffix}",
        [np.random.default_rng(i).integers(0, 255, (48, 64, 3), np.uint8) for i in range(60)],
        container_options={"movflags": "faststart"} if suffix == ".mp4" else None,
    )
    whole, times_s = everything(Video(path))
    data = path.read_bytes()
    path.write_bytes(data[: int(part * len(data))])
    video = Video(path)
    rgb, cut_s = everything(video)
    assert 0.6 * part * 60 < len(rgb) < 60
    assert np.array_equal(rgb[: len(rgb) - 6], whole[: len(rgb) - 6])  # the last ones may be pieced together
    np.testing.assert_allclose(cut_s, times_s[: len(cut_s)], atol=0.05)
    assert video.damage is not None
    assert "pictures: " in video.damage
    assert capfd.readouterr() == ("", "")


def test_a_cut_file_without_its_index_is_refused(tmp_path):
    path = write_video(tmp_path / "a.mp4", pictures(30))
    path.write_bytes(path.read_bytes()[:-200])
    assert "cannot be read as a video" in refused(path)


def test_damage_in_the_middle_is_passed_over_and_said_always_alike(tmp_path, capfd):
    noise = np.random.default_rng(0)
    frames = [noise.integers(0, 255, (48, 64, 3), np.uint8) for _ in range(60)]
    path = write_video(tmp_path / "a.mp4", frames, container_options={"movflags": "faststart"})
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 3000] = noise.bytes(3000)
    path.write_bytes(data)
    first, second = Video(path), Video(path)
    once, twice = everything(first), everything(second)
    assert len(once[0]) > 50
    assert np.array_equal(once[0], twice[0])
    assert first.damage == second.damage
    assert "damaged" in (first.damage or "")
    assert capfd.readouterr() == ("", "")


def test_memory_does_not_grow_with_the_length(tmp_path):
    def peak(count: int) -> int:
        path = write_video(tmp_path / f"{count}.mov", [pictures(1)[0]] * count, sound=clicks(count / 25, []))
        tracemalloc.start()
        for _ in Video(path).frames():
            pass
        for _ in Video(path).sound():
            pass
        held = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return held

    assert peak(600) < 1.2 * peak(100)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from Linux's /proc")
def test_the_process_does_not_grow_with_the_frames_it_has_read(tmp_path):
    """What libav holds too, of which tracemalloc knows nothing."""
    path = write_video(tmp_path / "a.mov", pictures(1, 144, 176) * 1500)
    frame_bytes = 144 * 176 * 3 // 2

    def read() -> int:
        for _ in Video(path).frames():
            pass
        for picture in Video(path).pictures():
            picture.rgb_within((20, 20, 60, 60))
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = read()
    assert read() - before < 0.1 * 3000 * frame_bytes


@pytest.mark.parametrize(
    ("name", "rows"),
    [("bbaf2n.mpg", 75), ("brbk7n.mpg", 75), ("lbbc2a.mpg", 75), ("sbwe5n.mpg", 75), ("no_face.mp4", 95),
     ("face_noface.mov", 169), ("single_face.mp4", 72), ("short_hamilton_clip.mp4", 275)],
)  # fmt: skip
def test_real_clips_give_one_row_a_decoded_frame(name, rows, real_data):
    video = Video(real_data / "video" / name)
    times_s = np.concatenate([times_s for _, times_s in video.frames()])
    assert len(times_s) == rows
    assert (np.diff(times_s) > 0).all()
    assert video.check().has_sound
    assert video.damage is None


def test_a_real_clip_with_variable_rate_and_late_sound(real_data):
    video = Video(real_data / "video" / "face_noface.mov")
    times_s = np.concatenate([times_s for _, times_s in video.frames()])
    steps = np.diff(times_s)
    assert steps.max() > 1.5 * steps.min()
    assert abs(times_s[-1] + 0.042 - 6.4) < 0.01
    sound = listen(video)
    assert not sound[: round(2.42 * 16000)].any()  # its sound begins at 2.43 s
    assert sound[round(2.44 * 16000) : round(2.6 * 16000)].any()
    assert abs(len(sound) / 16000 - 6.4) < 0.05
