"""What a browser gets to play has every frame at its curve's time, sound in step, and is made once, whole or absent."""

from __future__ import annotations

import contextlib
import os
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from vacli import VacliError
from vacli.extract.media import Video
from vacli.report.playable import HIGH_PX, playable

from .media_files import SOUND_HZ, clicks, pictures, write_video

VARIABLE_S = [0.0, 0.04, 0.12, 0.125, 0.3, 0.5, 0.533, 0.7, 0.71, 1.0]
CLICKS_S = (0.2, 0.6)
CLIPS = ("bbaf2n.mpg", "face_noface.mov", "no_face.mp4", "short_hamilton_clip.mp4", "single_face.mp4")


def times(path: Path) -> np.ndarray:
    return np.array(list(Video(path).times()))


def onsets_s(path: Path) -> list[float]:
    """When the clicks are heard, on the clock of `Video`."""
    sound = np.abs(np.concatenate([np.zeros(1, np.float32), *Video(path).sound(SOUND_HZ)])) > 0.2
    loud = np.flatnonzero(sound)
    return [] if not len(loud) else [loud[0] / SOUND_HZ, *(loud[1:][np.diff(loud) > 2000] / SOUND_HZ)]


def packets(path: Path, kind: str) -> list[bytes]:
    with av.open(str(path)) as container:
        return [bytes(p) for p in container.demux(container.streams.best(kind)) if p.size]


def codecs(path: Path) -> list[str]:
    with av.open(str(path)) as container:
        return [s.codec_context.codec.canonical_name for s in container.streams]


def film(path: Path, count: int = 10, sound: bool = True, **how) -> Path:
    return write_video(path, pictures(count), sound=clicks(1.0, CLICKS_S) if sound else None, **how)


class Untouched(Video):
    """Decodes nothing."""

    def frames(self, batch: int = 32):
        raise AssertionError("it was decoded")

    sound = frames


def damaged(path: Path, suffix: str, first: int = 7, count: int = 30) -> Path:
    """MPEG-TS with AAC of which from the first packet on each 13th has no header any more.

    suffix: of the file whose pictures these are, MPEG-2 of .mpg, H.264 of .mp4.
    """
    seen = write_video(path.with_name(f"seen{suffix}"), pictures(count))
    heard = write_video(path.with_name("heard.mp4"), sound=clicks(1.0, CLICKS_S))
    with av.open(str(path), "w") as out, av.open(str(seen)) as a, av.open(str(heard)) as b:
        streams = [container.streams[0] for container in (a, b)]
        into = {stream: out.add_stream_from_template(stream) for stream in streams}
        for packet in [p for container in (a, b) for p in container.demux() if p.size]:
            packet.stream = into[packet.stream]
            out.mux(packet)
    seen.unlink()
    heard.unlink()
    content, place = bytearray(path.read_bytes()), 0
    for i, packet in enumerate(packets(path, "audio")):
        place = content.index(packet[:7], place) + 7
        if i >= first and not (i - first) % 13:
            content[place - 7 : place] = bytes(7)
    path.write_bytes(content)
    return path


# ---- which -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
def test_what_browsers_play_is_left_alone(suffix, tmp_path):
    video = film(tmp_path / f"a{suffix}")
    assert playable(video, tmp_path / "copies" / "a.mp4", Untouched) == video
    assert not (tmp_path / "copies").exists()


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("a.mpg", {}),
        ("a.avi", {}),
        ("mpeg4.mov", {"times_s": VARIABLE_S}),
        ("a.mkv", {"times_s": VARIABLE_S}),
        ("vp9.mkv", {"codec": "vp9", "times_s": VARIABLE_S}),
        ("late.mp4", {"times_s": [t + 0.75 for t in VARIABLE_S], "sound_start_s": 0.5}),
        ("late_pictures.mkv", {"times_s": [t + 0.5 for t in VARIABLE_S]}),
        ("late_sound.mkv", {"times_s": VARIABLE_S, "sound_start_s": 0.25}),
        ("ten_bits.mp4", {"pixel_format": "yuv420p10le"}),
        ("silent.mkv", {"sound": False}),
        ("silent.avi", {"sound": False}),
        ("one_frame.avi", {"count": 1, "sound": False}),
        ("holes.mov", {"sound_holes_s": [(0.3, 0.5)]}),
        ("turned.mov", {"rotation": 90, "times_s": VARIABLE_S}),
        ("wide.mkv", {"pixel_aspect": Fraction(3, 2)}),
        ("wide.avi", {"pixel_aspect": Fraction(3, 2)}),
    ],
)  # fmt: skip
def test_a_copy_has_every_frame_at_its_time_and_the_sound_where_it_was(name, how, tmp_path):
    video = film(tmp_path / name, **how)
    copy = playable(video, tmp_path / "copy.mp4", Video)
    assert copy == tmp_path / "copy.mp4"
    assert set(codecs(copy)) <= {"h264", "vp9", "aac", "mp3", "opus", "flac"}
    assert len(times(copy)) == how.get("count", 10)
    np.testing.assert_allclose(times(copy), times(video), atol=1e-3)
    np.testing.assert_allclose(onsets_s(copy), onsets_s(video), atol=2e-3)
    assert len(onsets_s(video)) == (2 if how.get("sound", True) else 0)
    before, now = (next(Video(path).frames())[0][0].astype(float) for path in (video, copy))
    assert before.shape == now.shape
    assert np.abs(before - now).mean() < 6  # upright, and of the same colours
    assert playable(copy, tmp_path / "again.mp4", Untouched) == copy  # which a browser plays


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("a.mkv", {}),
        ("late.mp4", {"times_s": [0.75 + i / 25 for i in range(10)], "sound_start_s": 0.5}),
        ("wide.mkv", {"pixel_aspect": Fraction(3, 2)}),
        ("sound.mov", {"codec": "libx264"}),  # whose sound alone, PCM, browsers do not play
    ],
)
def test_pictures_are_not_encoded_anew_where_only_what_is_around_them_is_at_fault(name, how, tmp_path):
    video = film(tmp_path / name, **how)
    copy = playable(video, tmp_path / "copy.mp4", Video)
    assert packets(copy, "video") == packets(video, "video")


def test_a_copy_is_no_higher_than_720_pixels_and_even(tmp_path):
    video = write_video(tmp_path / "high.avi", pictures(2, 1080, 606))
    copy = playable(video, tmp_path / "copy.mp4", Video)
    seen = Video(copy).check()
    assert (seen.width, seen.height) == (404, HIGH_PX)


def test_odd_sides_are_made_even(tmp_path):
    video = write_video(tmp_path / "odd.mov", pictures(2, 49, 65), codec="png", pixel_format="rgb24")
    copy = playable(video, tmp_path / "copy.mp4", Video)
    seen = Video(copy).check()
    assert (seen.width, seen.height) == (66, 50)


# ---- once, whole or absent ---------------------------------------------------------------------------------


def test_a_copy_is_made_once_and_again_when_the_video_is_another(tmp_path):
    video, copy, told = film(tmp_path / "a.avi"), tmp_path / "copy.mp4", []
    playable(video, copy, Video, told.append)
    assert len(told) == 1
    assert playable(video, copy, Untouched, told.append) == copy
    assert len(told) == 1
    film(video, count=7)
    playable(video, copy, Video, told.append)
    assert len(told) == 2
    assert len(times(copy)) == 7


@pytest.mark.parametrize("is_film", [True, False])
def test_what_lies_in_the_copys_place_and_is_not_ours_is_left_as_it_is(is_film, tmp_path):
    video, copy = film(tmp_path / "a.avi"), tmp_path / "copy.mp4"
    film(copy) if is_film else copy.write_text("no video")
    before = copy.read_bytes()
    with pytest.raises(VacliError, match="vacli did not make, and is left as it is"):
        playable(video, copy, Video)
    assert copy.read_bytes() == before


@pytest.mark.parametrize("content", [b"", b"no video at all\n" * 99])
def test_what_is_no_video_is_told_in_one_line_and_leaves_nothing(content, tmp_path):
    video = tmp_path / "a.mp4"
    video.write_bytes(content)
    with pytest.raises(VacliError, match=r"a\.mp4: cannot be read as a video") as told:
        playable(video, tmp_path / "copies" / "copy.mp4", Video)
    assert "\n" not in str(told.value)
    assert os.listdir(tmp_path) == ["a.mp4"]


def test_sound_alone_and_a_lost_file_are_told(tmp_path):
    sound = write_video(tmp_path / "sound.mp4", sound=clicks(1.0, CLICKS_S))
    with pytest.raises(VacliError, match="no pictures"):
        playable(sound, tmp_path / "copy.mp4", Video)
    with pytest.raises(VacliError, match="check the path"):
        playable(tmp_path / "lost.mp4", tmp_path / "copy.mp4", Video)
    assert os.listdir(tmp_path) == ["sound.mp4"]


def test_of_a_video_that_is_cut_off_what_decodes_is_shown(tmp_path):
    video = film(tmp_path / "a.mpg")
    video.write_bytes(video.read_bytes()[: video.stat().st_size // 2])
    copy = playable(video, tmp_path / "copy.mp4", Video)
    assert len(times(copy)) > 0
    np.testing.assert_allclose(times(copy), times(video), atol=1e-3)


@pytest.mark.parametrize("first", [0, 7])
@pytest.mark.parametrize("suffix", [".mpg", ".mp4"])
def test_sound_that_mp4_refuses_is_decoded_and_the_rest_stays_in_its_place(suffix, first, tmp_path):
    video = damaged(tmp_path / "a.ts", suffix, first)
    source, done = Video(video), []
    copy = playable(video, tmp_path / "copy.mp4", lambda _: source, progress=done.append)
    assert codecs(copy) == ["h264", "aac"]
    np.testing.assert_allclose(times(copy), times(video), atol=1e-3)
    assert len(done) == (30 if suffix == ".mpg" else 0)  # once, or never
    np.testing.assert_allclose(onsets_s(copy), onsets_s(video), atol=2e-3)
    assert len(onsets_s(video)) == 2


class Ending:
    """A libav container at whose end PyAV stumbles, as over streams that have appeared on the way."""

    def __init__(self, container) -> None:
        self._container = container

    def __getattr__(self, name: str):
        return getattr(self._container, name)

    def demux(self, *streams):
        yield from self._container.demux(*streams)
        raise IndexError("list index out of range")


class Stumbling(Video):
    @contextlib.contextmanager
    def open(self):
        with super().open() as (container, start_s):
            yield Ending(container), start_s


@pytest.mark.parametrize("suffix", [".mkv", ".avi"])
def test_streams_that_appear_on_the_way_cost_no_frame(suffix, tmp_path):
    video = film(tmp_path / f"a{suffix}")
    copy = playable(video, tmp_path / "copy.mp4", Stumbling)
    np.testing.assert_allclose(times(copy), times(video), atol=1e-3)
    np.testing.assert_allclose(onsets_s(copy), onsets_s(video), atol=2e-3)
    assert list(Stumbling(video).times()) == times(video).tolist()


def test_sound_that_is_no_number_is_heard_as_silence(tmp_path):
    class Broken(Video):
        def sound(self, rate_hz: int = 16000):
            for block in super().sound(rate_hz):
                block[: len(block) // 4] = np.nan
                block[-10:] = 1e30
                yield block

    copy = playable(film(tmp_path / "a.avi"), tmp_path / "copy.mp4", Broken)
    assert codecs(copy) == ["h264", "aac"]
    assert np.isfinite(np.concatenate(list(Video(copy).sound()))).all()


def test_what_no_film_can_be_made_of_is_told_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("vacli.report.film.PICTURE_OPTIONS", {"profile": "no such profile"})
    video = film(tmp_path / "a.avi")
    with pytest.raises(VacliError, match=r"a\.avi: no mp4 can be made of it .*convert it to H\.264$"):
        playable(video, tmp_path / "copy.mp4", Video)
    assert os.listdir(tmp_path) == ["a.avi"]


class Stopped(Video):
    """Ctrl-C at the second frame."""

    def frames(self, batch: int = 32):
        yield from list(super().frames(1))[:1]
        raise KeyboardInterrupt


def test_ctrl_c_leaves_nothing_behind(tmp_path):
    video = film(tmp_path / "a.avi")
    with pytest.raises(KeyboardInterrupt):
        playable(video, tmp_path / "copy.mp4", Stopped)
    assert os.listdir(tmp_path) == ["a.avi"]


def test_a_copy_that_cannot_be_written_is_told(tmp_path):
    video = film(tmp_path / "a.avi")
    (tmp_path / "file").write_text("")
    with pytest.raises(VacliError, match="cannot write"):
        playable(video, tmp_path / "file" / "copy.mp4", Video)


def test_a_name_that_looks_like_an_address_or_an_option_is_a_name(tmp_path):
    video = film(tmp_path / "http:-i %d 'a\".avi")
    copy = playable(video, tmp_path / "-y concat:b%03d.mp4", Video)
    assert len(times(copy)) == 10


# ---- real clips, a real browser ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def copies(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("copies")


@pytest.mark.parametrize("name", CLIPS)
def test_of_a_real_clip_frames_and_sound_stay_in_their_place(name, real_data, copies):
    video = real_data / "video" / name
    copy = playable(video, copies / f"{name}.mp4", Video)
    assert (copy == video) == (name in ("no_face.mp4", "single_face.mp4"))
    np.testing.assert_allclose(times(copy), times(video), atol=1e-3)
    before, now = (np.concatenate(list(Video(path).sound())) for path in (video, copy))
    length = min(len(before), len(now))
    assert abs(len(before) - len(now)) < 0.05 * 16000
    assert np.corrcoef(before[:length], now[:length])[0, 1] > 0.95  # 1 ms aside it is far less


@pytest.fixture(scope="module")
def page(browser):
    return browser.new_page()


SEEK = """async (t) => {
  const video = document.querySelector("video");
  const shown = new Promise(r => video.requestVideoFrameCallback((_, frame) => r(frame.mediaTime)));
  video.currentTime = t;
  return await Promise.race([shown, new Promise(r => setTimeout(() => r(null), 5000))]);
}"""
PLAY = """async () => {
  const video = document.querySelector("video");
  video.currentTime = 0;
  await video.play();
  await new Promise(r => setTimeout(r, 300));
  video.pause();
  return video.currentTime;
}"""
WITHIN_S = 1e-3  # a page seeks to so much behind a frame's time, which a browser and a CSV each round


def watch(page, video: Path, tmp_path: Path) -> None:
    html = tmp_path / "page.html"
    html.write_text(f'<video src="{video.resolve().as_uri()}" muted preload="auto"></video>')
    page.goto(html.as_uri())
    page.wait_for_function(
        "() => { const v = document.querySelector('video'); return v.readyState > 1 || v.error }"
    )
    assert page.evaluate("() => document.querySelector('video').error?.message ?? null") is None


@pytest.mark.parametrize("name", [name for name in CLIPS if name != "no_face.mp4"])
def test_a_browser_plays_a_real_clip_and_a_seek_shows_the_frame_of_that_time(
    name, page, copies, real_data, tmp_path
):
    video = real_data / "video" / name
    watch(page, playable(video, copies / f"{name}.mp4", Video), tmp_path)
    clock = times(video)
    for time_s in clock[np.linspace(len(clock) - 1, 0, 5).astype(int)]:
        assert page.evaluate(SEEK, time_s + WITHIN_S) == pytest.approx(time_s, abs=2e-3)
    assert page.evaluate(PLAY) > 0.1


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("a.mp4", {}),
        ("a.webm", {}),
        ("a.mpg", {}),
        ("a.mkv", {"times_s": VARIABLE_S}),
        ("late.mp4", {"times_s": [t + 0.75 for t in VARIABLE_S], "sound_start_s": 0.5}),
        ("turned.mov", {"rotation": 90, "times_s": VARIABLE_S}),
        ("one_frame.avi", {"count": 1, "sound": False}),
    ],
)  # fmt: skip
def test_a_browser_shows_the_very_picture_of_a_rows_time(name, how, page, tmp_path):
    import cv2

    how = {"count": 10, "sound": True} | how
    count, sound = how.pop("count"), how.pop("sound")
    shades = [np.full((96, 160, 3), 40 + 20 * i, np.uint8) for i in range(count)]
    video = write_video(tmp_path / name, shades, sound=clicks(1.0, CLICKS_S) if sound else None, **how)
    watch(page, playable(video, tmp_path / "copy.mp4", Video), tmp_path)
    for i, time_s in reversed(list(enumerate(times(video)))):
        if count > 1:
            assert page.evaluate(SEEK, time_s + WITHIN_S) is not None
        shot = np.frombuffer(page.locator("video").screenshot(), np.uint8)
        assert cv2.imdecode(shot, cv2.IMREAD_COLOR).mean() == pytest.approx(40 + 20 * i, abs=8)
