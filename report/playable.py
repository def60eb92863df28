"""A video as a browser can play it: itself where it can, else a small copy on the same clock."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av

from .. import VacliError
from .film import TIMED, Picture, Source, each, write_film

VERSION = 1  # another one when copies are made otherwise: the old ones are made again
HIGH_PX = 720
EARLY_S, LATE_S = 0.020, 0.0005  # t = 0 may lie so much before, or behind, what a browser calls 0
# What Chromium, Firefox and Safari play, by libav's names.
PLAYED = {"h264", "vp8", "vp9", "av1"}
PIXELS = {"yuv420p", "yuvj420p"}  # 8 bits, 4:2:0
SOUND = {"mov": {"aac", "mp3", "opus", "flac"}, "webm": {"opus", "vorbis"}}
NAMES = {"mov": {".mp4", ".m4v", ".mov"}, "webm": {".webm"}}  # browsers go by the name too
MP4_HOLDS = {"h264", "vp9", "av1"}


def playable(
    video: Path,
    copy: Path,
    source: Callable[[Path], Source],
    tell: Callable[[str], object] = lambda _: None,
    progress: Callable[[int], object] = lambda _: None,
) -> Path:
    """`video` where a browser plays it and calls 0 what its curve does; else `copy`, an mp4, made if need be.

    The copy has every frame at the time its curve has it. Its packets are the video's own where only container, sound
    or start are at fault; else it is encoded anew, H.264 of at most 720 px, upright. It knows size and time of the file
    it was made from, and is made again when that file is another; it is whole or as it was.

    source: opens a video, `extract.media.Video`. tell: gets a line before a copy is made; progress: how many frames
    more are done. Raises VacliError for what is no video, and for a copy that cannot be written.
    """
    try:
        stat = video.stat()
    except OSError as e:
        raise VacliError(f"{video}: {e.strerror}; wanted a video; check the path") from e
    own = source(video)
    with own.open() as (container, start):
        pictures = _pictures(video, container)
        if -EARLY_S <= start <= LATE_S and _plays(video, container, pictures):
            return video
        fits_mp4 = container.format.name in TIMED and _is_common(pictures, MP4_HOLDS)
    made_of = f"vacli playable {VERSION}: {stat.st_size} bytes of {stat.st_mtime_ns} ns"
    if copy.is_file():
        was = comment_of(source(copy)) or ""
        if was == made_of:
            return copy
        if not was.startswith("vacli playable"):
            raise VacliError(f"{copy} is a film that vacli did not make, and is left as it is: move it away")
    tell(f"{video.name}: browsers do not play it as it is; making {copy}")
    if fits_mp4:
        with contextlib.suppress(av.FFmpegError, ValueError):  # packets that mp4 refuses are decoded
            write_film(copy, own, None, comment=made_of)
            return copy
    write_film(copy, own, _counted(each(own), progress), HIGH_PX, made_of)
    return copy


def _pictures(video: Path, container: Any) -> Any:
    """The stream that `extract.media.Video` reads."""
    stream = container.streams.best("video")
    if stream is None or _is_cover(stream) or stream.codec_context is None:
        raise VacliError(f"{video}: no pictures that can be read; wanted a video; convert it to H.264")
    return stream


def _is_cover(stream: Any) -> bool:
    return bool(stream.disposition & av.stream.Disposition.attached_pic)


def _is_common(pictures: Any, codecs: set[str]) -> bool:
    context = pictures.codec_context
    return context.codec.canonical_name in codecs and context.pix_fmt in PIXELS


def _plays(video: Path, container: Any, pictures: Any) -> bool:
    """Whether browsers play the file and show the pictures we read."""
    kind = _kind(video, container)
    if kind is None or video.suffix.lower() not in NAMES[kind] or not _is_common(pictures, PLAYED):
        return False
    if sum(not _is_cover(s) for s in container.streams.video) > 1:
        return False  # which one would it show?
    sounds = {s.codec_context.codec.canonical_name for s in container.streams.audio if s.codec_context}
    undecoded = any(s.codec_context is None for s in container.streams.audio)
    return sounds <= SOUND[kind] and not undecoded


def _kind(video: Path, container: Any) -> str | None:
    if container.format.name.startswith("mov"):
        return "mov"
    with open(video, "rb") as f:  # libav has one name for Matroska and WebM; the file says which it is
        return "webm" if container.format.name.startswith("matroska") and b"webm" in f.read(64) else None


def comment_of(copy: Source) -> str | None:
    """What a film says of itself; None where it says nothing or cannot be read."""
    with contextlib.suppress(VacliError), copy.open() as (container, _):
        return container.metadata.get("comment")
    return None


def _counted(pictures: Iterator[Picture], progress: Callable[[int], object]) -> Iterator[Picture]:
    for picture in pictures:
        yield picture
        progress(1)
