"""A film: pictures at their own times and the sound of their source, as an mp4 that browsers play, whole or absent."""

from __future__ import annotations

import contextlib
import heapq
import os
from collections.abc import Iterable, Iterator
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import av
import numpy as np
from av.video.reformatter import Colorspace, VideoReformatter

from .. import VacliError
from ..store.curves import whole_file

CLOCK = Fraction(1, 90000)  # of the pictures: times of any rate, and of none, within 6 us
# x264's own scale of quality, and its speed. A key frame every 2 s of 25 Hz: a seek decodes no more than that. Nothing
# is reordered: see `_copied`.
PICTURE_OPTIONS = {"crf": "23", "preset": "veryfast", "g": "50", "bf": "0"}
UNEVEN_S = 0.002  # steps that differ by more are a variable rate; by 1 ms do those of Matroska
MOST_REORDERED = 16  # pictures, by H.264
MOST_PX = 4096  # a side; what many players' decoders refuse is scaled down
SOUND_HZ, SOUND_BITS_S = 48000, 96000  # of sound that is encoded anew, mono
COPIED_SOUND = {"aac", "mp3", "opus", "flac"}  # what mp4 holds and browsers play
# Containers whose packets have presentation times to be trusted, by libav's names. AVI and MPEG-1/2 do not say when
# every packet is due.
TIMED = {"mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "mpegts", "flv"}

Picture = tuple[np.ndarray, float]  # rgb (H, W, 3) uint8, its time in seconds
_Packets = Iterator[tuple[float, Any]]  # seconds to put them in order by, and packets to write


class Source(Protocol):
    """A video as `extract.media.Video` reads it; t = 0 is the earliest start of its pictures and its sound.

    open: its file as a libav container, opened as a stranger's, and where on its own clock t = 0 is, in seconds.
    frames: every frame, upright, square pixels: rgb (B, H, W, 3) uint8 and times_s (B,); the arrays are the caller's.
    sound: contiguous mono blocks (S,) float32, the first sample at t = 0; none where there is no sound.
    """

    path: Path

    def open(self) -> contextlib.AbstractContextManager[tuple[Any, Fraction]]: ...
    def frames(self) -> Iterator[tuple[np.ndarray, np.ndarray]]: ...
    def sound(self, rate_hz: int) -> Iterator[np.ndarray]: ...


def each(source: Source) -> Iterator[Picture]:
    """Frame by frame; a frame may be drawn into."""
    for rgb, times_s in source.frames():
        yield from zip(rgb, times_s.tolist(), strict=True)


def write_film(
    out: Path,
    source: Source,
    pictures: Iterable[Picture] | None,
    most_high_px: int = MOST_PX,
    comment: str = "",
) -> None:
    """H.264 (8 bit 4:2:0) with AAC, MP3, Opus or FLAC, at the times the pictures bring; on the clock of the source.

    pictures: all of the first one's size, made even by a doubled row or column, and scaled to `most_high_px` if they
    are higher; others are fitted into it. None: the source's own packets as they are. Sound that mp4 can hold and
    browsers play is copied, any other encoded as mono AAC; both stay where they are in time. comment: of the file.

    Memory is bounded. Raises VacliError for a source without pictures and a film that cannot be made or written;
    without `pictures` ValueError or av.FFmpegError for packets of the source's that mp4 cannot hold.
    """
    try:
        _write(out, source, pictures, most_high_px, comment)
    except av.FFmpegError as e:
        if pictures is None:
            raise
        why = f"no mp4 can be made of it ({e.strerror}); wanted a whole video; convert it to H.264"
        raise VacliError(f"{source.path}: {why}") from e


def _write(
    out: Path, source: Source, pictures: Iterable[Picture] | None, most_high_px: int, comment: str
) -> None:
    options = {"movie_timescale": str(CLOCK.denominator)}  # of what comes before a late stream
    with contextlib.ExitStack() as stack:
        source_file, start = stack.enter_context(source.open())
        sound_file, _ = stack.enter_context(source.open())  # once more: it is read beside the pictures
        aside = stack.enter_context(whole_file(out, "wb"))
        film = stack.enter_context(av.open(f"file:{aside.name}", "w", "mp4", container_options=options))
        film.metadata["comment"] = comment
        if pictures is None:
            seen = _copied(film, source_file, source_file.streams.best("video"), start)
        else:
            seen = _encoded(film, source, pictures, most_high_px)
        heard = _heard(film, source, sound_file, start)
        for _, packets in heapq.merge(seen, heard, key=lambda due: due[0]):
            film.mux(packets)


# ---- packets to be written -----------------------------------------------------------------------------------


def _copied(film: Any, container: Any, stream: Any, start: Fraction) -> _Packets:
    """A stream's own packets, `start` seconds earlier. Raises ValueError for pictures that would not be in their place.

    mp4 knows how far apart pictures are decoded, and browsers take that for how long each is shown: where they are
    reordered and come at a variable rate, a seek would show a neighbour.
    """
    into = film.add_stream_from_template(stream)
    shift, pictures = round(start / stream.time_base), stream.type == "video"
    uneven = max(1, round(UNEVEN_S / stream.time_base))

    def packets() -> _Packets:
        last = highest = None
        steps: tuple[int, int] | None = None
        reordered = False
        for packet in _timed(container, stream):
            if last is not None and packet.dts <= last:  # as damage has it; mp4 cannot hold it
                if pictures:
                    raise ValueError("pictures out of order")
                continue
            if last is not None:
                step = packet.dts - last
                steps = (step, step) if steps is None else (min(steps[0], step), max(steps[1], step))
            reordered |= highest is not None and packet.pts < highest
            if pictures and reordered and steps and steps[1] - steps[0] > uneven:
                raise ValueError("reordered pictures at a variable rate")
            last, highest = packet.dts, packet.pts
            packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, into
            yield float(packet.dts * stream.time_base), packet

    return packets()


def _timed(container: Any, stream: Any) -> Iterator[Any]:
    """Those that hold something, each with both its times: Matroska's first ones have none to be decoded at."""
    waiting: list[Any] = []
    for packet in _demuxed(container, stream):
        if packet.pts is None or len(waiting) > MOST_REORDERED:
            raise ValueError("packets without a time")
        if packet.dts is None:
            waiting.append(packet)
            continue
        for back, earlier in enumerate(reversed(waiting), 1):
            earlier.dts = packet.dts - back * (packet.duration or 1)
        yield from waiting
        waiting = []
        yield packet
    if waiting:
        raise ValueError("packets without a time")


def _demuxed(container: Any, stream: Any) -> Iterator[Any]:
    # IndexError: PyAV 18 at the end of a file in which damage made streams appear on the way
    with contextlib.suppress(IndexError):
        yield from (packet for packet in container.demux(stream) if packet.size)


def _encoded(film: Any, source: Source, pictures: Iterable[Picture], most_high_px: int) -> _Packets:
    pictures = iter(pictures)
    first = next(pictures, None)
    if first is None:
        raise VacliError(f"{source.path}: no picture decodes; wanted a whole video; copy it again")
    width, height = _size(first[0], most_high_px)
    if "libx264" not in av.codecs_available:
        raise VacliError(
            "this PyAV cannot write H.264; wanted its own wheel: pip install --force-reinstall av"
        )
    video = film.add_stream("libx264", rate=25, options=PICTURE_OPTIONS)
    context = video.codec_context
    context.width, context.height, context.pix_fmt, context.time_base = width, height, "yuv420p", CLOCK
    # BT.709, limited range, and said so: untold, players guess by the size of the picture
    context.colorspace = context.color_primaries = context.color_trc = context.color_range = 1

    def packets() -> _Packets:
        ticks, lasts, converter = -1, round(Fraction(1, 25) / CLOCK), VideoReformatter()
        for rgb, time_s in chain([first], pictures):
            picture = av.VideoFrame.from_ndarray(_fitted(rgb, width, height), format="rgb24")
            picture = converter.reformat(picture, format="yuv420p", dst_colorspace=Colorspace.ITU709)
            now = max(ticks + 1, round(time_s / CLOCK))
            lasts = now - ticks if ticks >= 0 else lasts
            picture.pts, picture.time_base, picture.duration, ticks = now, CLOCK, lasts, now
            yield time_s, video.encode(picture)
        yield float(ticks * CLOCK), video.encode(None)

    return packets()


def _heard(film: Any, source: Source, container: Any, start: Fraction) -> _Packets:
    stream = container.streams.best("audio")
    if stream is None or stream.codec_context is None:
        return iter(())
    if (
        stream.codec_context.codec.canonical_name in COPIED_SOUND
        and container.format.name in TIMED
        and _copies_whole(source)
    ):
        return _copied(film, container, stream, start)
    blocks = source.sound(SOUND_HZ)
    first = next(blocks, None)
    if first is None:
        return iter(())
    audio = film.add_stream("aac", rate=SOUND_HZ, layout="mono", bit_rate=SOUND_BITS_S)

    def packets() -> _Packets:
        done = 0
        for block in chain([first], blocks):
            for i in range(0, len(block), SOUND_HZ):
                some = np.nan_to_num(block[None, i : i + SOUND_HZ]).clip(-1, 1)  # others AAC refuses
                samples = av.AudioFrame.from_ndarray(some, "fltp", "mono")
                samples.sample_rate, samples.pts, samples.time_base = SOUND_HZ, done, Fraction(1, SOUND_HZ)
                yield done / SOUND_HZ, audio.encode(samples)
                done += samples.samples
        yield done / SOUND_HZ, audio.encode(None)

    return packets()


def _copies_whole(source: Source) -> bool:
    """Whether mp4 takes every packet of the sound: tried at once, as damage would else show when the pictures are made.

    A damaged packet of AAC in MPEG-TS has no header to be read, and one of any kind may have no time.
    """
    with (
        source.open() as (container, start),
        contextlib.suppress(av.FFmpegError, ValueError),
        av.open(f"file:{os.devnull}", "w", "mp4") as nowhere,
    ):
        for _, packet in _copied(nowhere, container, container.streams.best("audio"), start):
            nowhere.mux(packet)
        return True
    return False


# ---- sizes ---------------------------------------------------------------------------------------------------


def _size(rgb: np.ndarray, most_high_px: int) -> tuple[int, int]:
    """Width and height of the film, even as H.264 wants them."""
    height, width = rgb.shape[:2]
    scale = min(1.0, most_high_px / height, MOST_PX / width)
    if scale == 1:
        return width + width % 2, height + height % 2
    return max(2, round(width * scale / 2) * 2), max(2, round(height * scale / 2) * 2)


def _fitted(rgb: np.ndarray, width: int, height: int) -> np.ndarray:
    """(height, width, 3): scaled only if need be, the rest black; a lacking row or column is the last one again."""
    import cv2

    high, wide = rgb.shape[:2]
    if (high, wide) == (height, width):
        return rgb
    if not (0 <= height - high <= 1 and 0 <= width - wide <= 1):
        scale = min(height / high, width / wide)
        fit = (min(width, max(1, round(wide * scale))), min(height, max(1, round(high * scale))))
        rgb = cv2.resize(rgb, fit, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
        high, wide = rgb.shape[:2]
    down, right = height - high, width - wide
    how = cv2.BORDER_REPLICATE if max(down, right) <= 1 else cv2.BORDER_CONSTANT
    return cv2.copyMakeBorder(rgb, down // 2, down - down // 2, right // 2, right - right // 2, how)
