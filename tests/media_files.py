"""Tiny videos with known pictures, times and sound, made with PyAV for the tests."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

SOUND_HZ = 48000
CLOCK = Fraction(1, 1000)  # frames are stamped in whole milliseconds

# By suffix: a codec for the pictures and one for the sound that the wheel of PyAV has and the container takes.
CODECS = {
    ".mp4": ("libx264", "aac"),
    ".mov": ("mpeg4", "pcm_s16le"),
    ".mkv": ("libx264", "flac"),
    ".webm": ("vp9", "libopus"),
    ".avi": ("mpeg4", "pcm_s16le"),
    ".mpg": ("mpeg2video", "mp2"),
}


def pictures(count: int, height: int = 48, width: int = 64) -> list[np.ndarray]:
    """Grey frames, each a little brighter than the last, with a red top left quarter and a blue bottom right one."""
    frames = []
    for i in range(count):
        frame = np.full((height, width, 3), 60 + 2 * i % 120, np.uint8)
        frame[: height // 2, : width // 2] = (200, 20, 20)
        frame[height // 2 :, width // 2 :] = (20, 20, 200)
        frames.append(frame)
    return frames


def clicks(length_s: float, at_s: Sequence[float]) -> np.ndarray:
    """(S,) float32 at SOUND_HZ: silence, with 4 ms of 1.5 kHz from each of the times on."""
    sound = np.zeros(round(length_s * SOUND_HZ), np.float32)
    tone = 0.8 * np.sin(2 * np.pi * 1500 * np.arange(round(0.004 * SOUND_HZ)) / SOUND_HZ)
    for time_s in at_s:
        first = round(time_s * SOUND_HZ)
        sound[first : first + len(tone)] = tone
    return sound


def write_video(
    path: Path,
    frames: Sequence[np.ndarray] = (),
    times_s: Sequence[float] | None = None,  # default 25 Hz from 0
    sound: np.ndarray | None = None,  # (S,) at SOUND_HZ, both channels alike
    sound_start_s: float = 0.0,
    sound_holes_s: Sequence[tuple[float, float]] = (),  # stretches of `sound` whose packets are left out
    codec: str | None = None,
    pixel_format: str = "yuv420p",
    pixel_aspect: Fraction | None = None,
    rotation: int | None = None,  # degrees counterclockwise that a player should turn the pictures
    options: dict[str, str] | None = None,  # of the picture encoder
    container_options: dict[str, str] | None = None,
) -> Path:
    """Writes a video in the container that the suffix names and returns its path."""
    picture_codec, sound_codec = CODECS[path.suffix]
    with av.open(str(path), "w", container_options=container_options or {}) as out:
        video = audio = None
        if len(frames):
            video = out.add_stream(codec or picture_codec, rate=25, options=options or {})
            video.height, video.width = frames[0].shape[:2]
            video.pix_fmt = pixel_format
            if path.suffix not in (".mpg", ".avi"):  # those know only constant rates
                video.codec_context.time_base = CLOCK
            if pixel_aspect is not None:
                video.codec_context.sample_aspect_ratio = pixel_aspect
            if rotation is not None:
                video.set_display_rotation(rotation)
        if sound is not None:
            audio = out.add_stream(sound_codec, rate=SOUND_HZ, layout="stereo")
        if video is not None:
            _write_pictures(out, video, frames, times_s)
        if audio is not None:
            _write_sound(out, audio, sound, sound_start_s, sound_holes_s)
    return path


def _write_pictures(out, video, frames, times_s) -> None:
    times_s = [i / 25 for i in range(len(frames))] if times_s is None else times_s
    for picture, time_s in zip(frames, times_s, strict=True):
        frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
        frame.pts, frame.time_base = round(time_s / CLOCK), CLOCK
        if video.codec_context.time_base == Fraction(1, 25):
            frame.pts, frame.time_base = round(time_s * 25), Fraction(1, 25)
        out.mux(video.encode(frame))
    out.mux(video.encode(None))


def _write_sound(out, audio, sound, start_s, holes_s) -> None:
    kind = audio.codec_context.format.name
    step = audio.codec_context.frame_size or 960
    for i in range(0, len(sound), step):
        if any(low <= i / SOUND_HZ < high for low, high in holes_s):
            continue
        block = np.stack([sound[i : i + step]] * 2)
        if not kind.startswith("flt"):
            block = np.round(block * 32767).astype(np.int16)
        if not kind.endswith("p"):
            block = np.ascontiguousarray(block.T.reshape(1, -1))
        frame = av.AudioFrame.from_ndarray(block, format=kind, layout="stereo")
        frame.sample_rate = SOUND_HZ
        frame.pts, frame.time_base = i + round(start_s * SOUND_HZ), Fraction(1, SOUND_HZ)
        out.mux(audio.encode(frame))
    out.mux(audio.encode(None))
