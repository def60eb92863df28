"""A crop is the same whether the whole frame was made into RGB for it or only what lies around the face."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from vacli import VacliError
from vacli.extract import crops, media
from vacli.extract.crops import aligned
from vacli.extract.datasets import Sample
from vacli.extract.faces import ARCFACE_112, align
from vacli.extract.media import LOCAL_FORMATS, Picture, Video
from vacli.store import Track

from .media_files import CODECS, write_video

TEMPLATE = ARCFACE_112 - 56  # around the middle of the crop


def textured(count: int, height: int = 96, width: int = 128) -> list[np.ndarray]:
    """Frames of coloured blocks of two pixels, no two alike, so that nothing can lie in a wrong place unseen."""
    rng = np.random.default_rng(0)
    half = (height + 1) // 2, (width + 1) // 2, 3
    blocks = [np.repeat(np.repeat(rng.integers(0, 255, half, np.uint8), 2, 0), 2, 1) for _ in range(count)]
    return [block[:height, :width] for block in blocks]


def faces_everywhere(height: int, width: int) -> np.ndarray:
    """(T, 5, 2) points of faces inside, across each border, beyond it, minute, larger than the frame, and turned."""
    across = [(x, y) for x in (0, width / 2, width) for y in (0, height / 2, height)]
    beyond = [(-3 * width, 5), (5, -3 * height), (4 * width, 5), (5, 4 * height), (-20.3, -20.6)]
    places = [(x, y, size, turn) for x, y in across for size, turn in ((30.4, 0.0), (17.0, 0.7))]
    places += [(x, y, 25.0, 0.0) for x, y in beyond]
    places += [(width / 3, height / 3, size, 2.5) for size in (0.4, 3.0, 112.0, 3.0 * width, 90.0 * width)]
    points = []
    for x, y, size, turn in places:
        turned = TEMPLATE @ np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
        points.append(turned * size / 112 + (x, y))
    return np.array(points)


FACES = len(faces_everywhere(1, 1))


def track(points: np.ndarray) -> Track:
    """A `faces` track of five points a row (T, 5, 2), rows of NaN among them."""
    values = np.zeros((len(points), 15), np.float32)
    values[:, 4:14] = points.reshape(-1, 10)
    values[np.isnan(points).any(axis=(1, 2))] = np.nan
    return Track(values, np.arange(len(points)) / 25)


def whole_way(path: Path, faces: Track) -> np.ndarray:
    """The plain twin: every frame made into RGB as it is, then aligned."""
    frames = [frame for rgb, _ in Video(path).frames() for frame in rgb]
    points = faces.values[:, 4:14]
    return np.stack([align(f, p) for f, p, v in zip(frames, points, faces.valid, strict=True) if v])


def fast_way(path: Path, faces: Track) -> np.ndarray:
    return np.concatenate([some for some, _ in aligned(Sample("a", path.parent, path), faces)])


def same_both_ways(path: Path) -> np.ndarray:
    """Asserts that all faces of `faces_everywhere` are cropped alike; the crops."""
    seen = Video(path).check()
    faces = track(faces_everywhere(seen.height, seen.width))
    plain, fast = whole_way(path, faces), fast_way(path, faces)
    assert np.array_equal(plain, fast)
    return fast


def forbid_whole_pictures(monkeypatch) -> None:
    monkeypatch.setattr(Picture, "rgb", lambda _: pytest.fail("a whole picture was made"))


@pytest.mark.parametrize("suffix", sorted(CODECS))
def test_crops_of_every_container_are_the_same(suffix, tmp_path):
    found = same_both_ways(write_video(tmp_path / f"a{suffix}", textured(FACES)))
    assert len({crop.tobytes() for crop in found}) > FACES // 2  # there is something to be seen in them


@pytest.mark.parametrize("rotation", [0, 90, 180, -90])
@pytest.mark.parametrize(("height", "width"), [(96, 128), (90, 118)])
def test_crops_of_turned_pictures_are_the_same(rotation, height, width, tmp_path, monkeypatch):
    path = write_video(tmp_path / "a.mp4", textured(FACES, height, width), rotation=rotation)
    same_both_ways(path)
    forbid_whole_pictures(monkeypatch)  # nor is any needed
    assert len(fast_way(path, track(faces_everywhere(height, width)))) == FACES


@pytest.mark.parametrize("aspect", [Fraction(4, 3), Fraction(1, 2)])
@pytest.mark.parametrize("rotation", [0, 90])
def test_crops_of_pixels_that_are_not_square_are_the_same(aspect, rotation, tmp_path):
    same_both_ways(write_video(tmp_path / "a.mov", textured(FACES), pixel_aspect=aspect, rotation=rotation))


@pytest.mark.parametrize(("height", "width"), [(47, 63), (48, 63), (47, 64), (2, 2), (1, 1)])
def test_crops_of_odd_and_tiny_pictures_are_the_same(height, width, tmp_path):
    same_both_ways(write_video(tmp_path / "a.avi", textured(FACES, height, width), codec="ffv1"))


@pytest.mark.parametrize(
    "pixel_format",
    ["yuv420p", "yuvj420p", "yuv422p", "yuvj422p", "yuv444p", "yuvj444p", "yuv420p10le", "yuv422p10le", "gray"],
)  # fmt: skip
@pytest.mark.parametrize("more", ["tff=1", "colormatrix=bt709:range=pc", "colormatrix=bt2020nc"])
def test_crops_of_every_kind_of_pixels_are_the_same(pixel_format, more, tmp_path):
    options = {"x264-params": more, "preset": "ultrafast"}
    path = write_video(tmp_path / "a.mp4", textured(FACES), pixel_format=pixel_format, options=options)
    same_both_ways(path)
    first = next(Video(path).pictures())._frame
    assert first.interlaced_frame == (more == "tff=1")


@pytest.mark.parametrize("pixel_format", ["bgr0", "yuv411p", "yuv410p", "gray16le"])
def test_crops_of_rare_kinds_of_pixels_are_the_same(pixel_format, tmp_path):
    same_both_ways(write_video(tmp_path / "a.avi", textured(FACES), codec="ffv1", pixel_format=pixel_format))


def test_crops_of_frames_that_change_their_size_are_the_same(tmp_path, monkeypatch):
    mixed = [*textured(9), *textured(8, 90, 118), *textured(FACES - 17)]
    mixed = [av.VideoFrame.from_ndarray(rgb, format="rgb24").reformat(format="yuv420p") for rgb in mixed]
    path = write_video(tmp_path / "a.mp4", textured(1))
    monkeypatch.setattr(Video, "_decode", lambda *_: ((frame, i) for i, frame in enumerate(mixed)))
    same_both_ways(path)


@pytest.mark.parametrize("pixel_format", sorted(LOCAL_FORMATS))
def test_any_part_of_a_picture_is_that_part_of_the_whole(pixel_format):
    rng = np.random.default_rng(0)
    converter = media._Converter()
    for height, width in [(48, 64), (62, 90), (240, 426), (2, 18)]:
        for matrix, levels in [(1, 1), (2, 0), (5, 2), (9, 1)]:
            frame = av.VideoFrame(width, height, pixel_format)
            frame.colorspace, frame.color_range = matrix, levels
            for plane in frame.planes:
                plane.update(rng.bytes(plane.buffer_size))
            picture = Picture(frame, width, 0.0, converter)
            whole = picture.rgb()
            assert np.array_equal(
                whole, frame.to_ndarray(format="rgb24")
            )  # by a converter of its own, in threads
            for _ in range(20):
                (x0, x1), (y0, y1) = (sorted(rng.integers(0, n + 1, 2)) for n in (width, height))
                part = picture.rgb_within((x0, y0, x1, y1))
                assert np.array_equal(part[y0:y1, x0:x1], whole[y0:y1, x0:x1])


def test_a_part_of_a_picture_that_lies_upside_down_in_memory_is_that_part_of_the_whole():
    graph = av.filter.Graph()
    ends = [
        graph.add_buffer(width=64, height=48, format="yuv420p", time_base=Fraction(1, 25)),
        graph.add("vflip"),
        graph.add("buffersink"),
    ]
    graph.link_nodes(*ends).configure()
    graph.push(av.VideoFrame.from_ndarray(textured(1, 48, 64)[0], format="rgb24").reformat(format="yuv420p"))
    frame = graph.pull()
    assert frame.planes[0].line_size < 0
    picture = Picture(frame, 64, 0.0, media._Converter())
    assert np.array_equal(picture.rgb_within((3, 5, 30, 40))[5:40, 3:30], picture.rgb()[5:40, 3:30])


@pytest.mark.parametrize(
    "name",
    ["bbaf2n.mpg", "brbk7n.mpg", "lbbc2a.mpg", "sbwe5n.mpg", "no_face.mp4", "face_noface.mov", "single_face.mp4",
     "short_hamilton_clip.mp4"],
)  # fmt: skip
def test_crops_of_real_clips_are_the_same(name, real_data):
    path = real_data / "video" / name
    seen, rows = Video(path).check(), sum(1 for _ in Video(path).times())
    faces = track(np.resize(faces_everywhere(seen.height, seen.width), (rows, 5, 2)))
    assert np.array_equal(whole_way(path, faces), fast_way(path, faces))


def test_only_what_lies_around_wanted_faces_is_made_into_rgb(tmp_path, monkeypatch):
    path = write_video(tmp_path / "a.mp4", textured(10))
    points = np.tile(TEMPLATE * 20 / 112 + (40, 40), (10, 1, 1))
    points[3:5] = np.nan
    wanted = np.arange(10) != 7
    plain = whole_way(path, track(points))
    made = []
    convert = media._Converter.rgb
    monkeypatch.setattr(
        media._Converter, "rgb", lambda self, f, w: made.append((f.width, f.height)) or convert(self, f, w)
    )
    (found, rows), *more = aligned(Sample("a", tmp_path, path), track(points), wanted)
    assert not more
    assert rows.tolist() == [0, 1, 2, 5, 6, 8, 9]
    assert np.array_equal(found, plain[[0, 1, 2, 3, 4, 6, 7]])
    assert made == [(64, 64)] * 7  # of 128x96; the crop spans 30 to 50, and whole steps of 64 are taken


@pytest.mark.parametrize(("held", "pixels"), [(1, 10**9), (3, 10**9), (100, 5 * 96 * 128), (100, 1)])
def test_however_many_frames_are_held_the_batches_are_the_same(held, pixels, tmp_path, monkeypatch):
    monkeypatch.setattr(crops, "BATCH", 4)
    monkeypatch.setattr(crops, "HELD_FRAMES", held)
    monkeypatch.setattr(crops, "HELD_PIXELS", pixels)
    path = write_video(tmp_path / "a.mp4", textured(FACES))
    faces = track(faces_everywhere(96, 128))
    parts = list(aligned(Sample("a", tmp_path, path), faces))
    assert [len(rows) for _, rows in parts[:-1]] == [4] * ((FACES - 1) // 4)
    assert np.array_equal(np.concatenate([some for some, _ in parts]), whole_way(path, faces))
    assert np.concatenate([rows for _, rows in parts]).tolist() == list(range(FACES))


@pytest.mark.parametrize("rows", [9, 11])
def test_a_video_of_another_length_is_refused(rows, tmp_path):
    path = write_video(tmp_path / "a.mp4", textured(10))
    points = np.tile(TEMPLATE * 20 / 112 + (40, 40), (rows, 1, 1))
    with pytest.raises(VacliError, match=f"gave 10 frames, but {rows} before"):
        list(aligned(Sample("a", tmp_path, path), track(points)))
