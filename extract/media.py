"""A video file as frames with their own timestamps and sound placed by its own, decoded once and in bounded memory."""

from __future__ import annotations

import contextlib
import errno
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from .. import VacliError
from . import SUFFIXES as SUFFIXES

WANTED = "wanted a video in mp4, mov, mkv, webm, avi, mpg, ts, flv, wmv, ogv or mxf"
MAX_PIXELS = 8192 * 8192  # a picture larger than this is an attack or an accident
# A batch of large pictures is cut short here: 8 of 1280x720. What takes 32 MiB glibc's malloc fetches from the system
# each time anew, and to touch such memory for the first time can take longer than to decode the picture.
BATCH_BYTES = 22 * 2**20
NUDGE_S = 1e-6  # a frame that is not later than the one before is put this far behind it
SLIP_S = 0.02  # sound nearer to its due time is timestamp jitter (Matroska rounds to 1 ms); farther, a hole or overlap
CUT_S = 0.1  # a file that ends this much before its header's promise was cut off
HOLE_SAMPLES = 2**16  # holes in the sound are filled by blocks of this many zeros
# Pixel formats of which libswscale makes each RGB pixel of that pixel's own samples alone, if both sides are even, so
# that a part of the picture can be converted by itself. Of 10 bits and odd sides it interpolates the chroma.
LOCAL_FORMATS = {"yuv420p", "yuvj420p", "yuv422p", "yuvj422p", "yuv444p", "yuvj444p"}
UNSAID = 2  # colours of which a video says nothing, by H.273
BLOCK_PX = 16  # such parts begin at multiples of this: at whole samples of chroma, at whole vectors
STEP_PX = 64  # their sides are multiples of this, if there is room: libswscale begins anew for each size

# Names of containers in libavformat. Playlists (hls, concat) and image sequences are not among them, and only local
# files may be opened, so a file in a data set cannot make us read another one.
_OPENING = {
    "format_whitelist": "mov,matroska,webm,avi,mpeg,mpegts,mpegvideo,m4v,flv,asf,ogg,mxf",
    "protocol_whitelist": "file",
}


class MediaError(VacliError):
    """What the bytes of a file are to blame for, so that it will be no other as long as they are the same.

    reason: the text without the file's name, which may change.
    """

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.reason = reason


@dataclass(frozen=True)
class Streams:
    """What a video holds; width and height (pixels) are those of the frames as they are seen and handed out."""

    has_sound: bool
    rate_hz: float | None  # average frames a second; the frames' own times may vary
    frames_hint: int | None  # how many frames to expect, for progress bars only
    width: int
    height: int


class Picture:
    """One frame as a player shows it, square pixels and turned upright, of which RGB is made only when asked for.

    time_s: seconds from the start of the video. shape: (H, W) in pixels.
    """

    def __init__(self, frame: Any, width: int, time_s: float, converter: _Converter) -> None:
        self._frame, self._width, self.time_s, self._converter = frame, width, time_s, converter
        self._turns = round(frame.rotation / 90)  # both count degrees counterclockwise
        self.shape = (width, frame.height) if self._turns % 2 else (frame.height, width)

    def rgb(self) -> np.ndarray:
        """(H, W, 3) uint8, not to be written to.

        libswscale heeds the colour matrix and range; with PyAV 18 it is also 2-5x faster than cv2.cvtColor.
        """
        return np.rot90(self._converter.rgb(self._frame, self._width), self._turns)

    def rgb_within(self, box: tuple[int, int, int, int]) -> np.ndarray:
        """(H, W, 3) uint8 that is the same as `rgb` inside the box and anything outside.

        box: x0, y0, x1, y1 in pixels, the last ones excluded; it may leave the picture. A small box costs a fraction of
        the whole. The array is overwritten by the next call for any picture of the same pass over the video.
        """
        if not self._is_local():
            return self.rgb()
        (x0, y0, x1, y1), (height, width) = box, self.shape
        for _ in range(self._turns % 4):  # back to the frame as it is stored, one quarter turn at a time
            x0, y0, x1, y1 = height - y1, x0, height - y0, x1
            height, width = width, height
        columns, rows = _span(x0, x1, width), _span(y0, y1, height)
        upright, stored = self._converter.canvas(self.shape, self._turns)
        if columns and rows:
            stored[rows, columns] = self._converter.part(self._frame, columns, rows)
        return upright

    def _is_local(self) -> bool:
        """Whether a part of the frame gives the same RGB as that part of the whole."""
        frame = self._frame
        return (
            frame.format.name in LOCAL_FORMATS
            and self._width == frame.width
            and frame.width % 2 == frame.height % 2 == 0
            and not frame.interlaced_frame  # whose chroma lines alternate between two fields
            and all(plane.line_size > 0 for plane in frame.planes)
        )


class Video:
    """One video file; t = 0 is the earliest start of its pictures and its sound.

    Making one opens nothing. `check`, `pictures`, `frames`, `times` and `sound` each open the file afresh and read it
    once from its beginning. They raise MediaError for what is no video of a known container; all but the last also for
    one that has no pictures or has some of more than 8192x8192 pixels. What may pass (the disk fails, memory is short)
    is a plain VacliError. `open` raises the same, but looks for no pictures.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._damage: dict[str, str] = {}

    def __repr__(self) -> str:
        return f"Video({str(self.path)!r})"

    @property
    def damage(self) -> str | None:
        """What the finished passes of `frames` and `sound` had to leave out, or None for an undamaged file."""
        return "; ".join(f"{kind}: {what}" for kind, what in self._damage.items()) or None

    def check(self) -> Streams:
        """Opens the file and decodes its first picture. Raises MediaError where there is none."""
        with self.open() as (container, _):
            stream = self._pictures(container)
            first, _ = next(self._decode(container, stream, "pictures"), (None, None))
            if first is None:
                why = "no picture could be decoded; wanted a whole video; copy it again or leave it out"
                raise MediaError(self.path, why)
            height, width = self._picture(first, stream, 0.0, _Converter()).rgb().shape[:2]
            rate_hz = float(stream.average_rate) if stream.average_rate else None
            hint = stream.frames or round((container.duration or 0) / 1e6 * (rate_hz or 0))
            return Streams(self._audio(container) is not None, rate_hz, hint or None, width, height)

    def pictures(self) -> Iterator[Picture]:
        """Every frame that decodes, in order, at strictly increasing times; of RGB only what is asked for is made."""
        with self.open() as (container, start_s):
            stream = self._pictures(container)
            clock, converter = _Clock(start_s, stream.average_rate), _Converter()
            for frame, stamp in self._decode(container, stream, "pictures"):
                yield self._picture(frame, stream, clock(stamp, stream.time_base), converter)

    def frames(self, batch: int = 32) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The RGB of every frame, in order: rgb (B, H, W, 3) uint8 and times_s (B,) float64, strictly increasing.

        Rotation and non-square pixels are applied. B is at most `batch`; less where the size of the frames changes,
        where the frames are large (22 MiB a batch) and at the end. The arrays belong to the caller.
        """
        held: list[Picture] = []
        room = batch
        with self._telling():
            for picture in self.pictures():
                if held and (len(held) == room or picture.shape != held[0].shape):
                    yield _made(held)
                    held = []
                room = max(1, min(batch, BATCH_BYTES // (3 * picture.shape[0] * picture.shape[1])))
                held.append(picture)
            if held:
                yield _made(held)

    def times(self) -> Iterator[float]:
        """The time of every frame in seconds, as `frames` has them, without making pictures of them."""
        return (picture.time_s for picture in self.pictures())

    def sound(self, rate_hz: int = 16000) -> Iterator[np.ndarray]:
        """The sound as contiguous blocks (S,) float32: the mean of the channels at `rate_hz`, first sample at t = 0.

        Sound is placed by its own timestamps: a late start and holes are zeros, what overlaps is cut. Yields nothing
        where there is no sound.
        """
        with self.open() as (container, start_s):
            stream = self._audio(container)
            if stream is None:
                return
            given = place = 0  # samples handed out; where the next resampled one belongs
            decoded = (frame for frame, _ in self._decode(container, stream, "sound"))
            for begin_s, block in _resampled(decoded, rate_hz, start_s):
                place = place if begin_s is None else round(begin_s * rate_hz)
                while given < place:
                    hole = np.zeros(min(place - given, HOLE_SAMPLES), np.float32)
                    given += len(hole)
                    yield hole
                fresh = block[given - place :]
                place += len(block)
                if len(fresh):
                    given += len(fresh)
                    yield fresh

    @contextlib.contextmanager
    def open(self) -> Iterator[tuple[Any, Fraction]]:
        """The file as a libav container, opened as a stranger's, and where on its own clock, in seconds, t = 0 is."""
        if not self.path.is_file():
            raise VacliError(f"{self.path}: no such file; {WANTED}; check the path")
        try:
            container = av.open(f"file:{self.path}", options=_OPENING, metadata_errors="replace")
        except (av.FFmpegError, OSError) as e:
            why = f"cannot be read as a video ({e.strerror}); {WANTED}, whole; copy or convert it again"
            # The machine may be to blame, or its FFmpeg. (Of Matroska cut off in its header that is said too, as an I/O
            # error; to try it again costs little.)
            if isinstance(e, OSError | MemoryError | LookupError):
                raise VacliError(f"{self.path}: {why}") from e
            raise MediaError(self.path, why) from e
        with self._telling(), container:
            yield container, _start_s(container)

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        """What the machine is to blame for, told in one line."""
        try:
            yield
        except (OSError, MemoryError) as e:
            why = getattr(e, "strerror", None) or "out of memory"
            raise VacliError(f"{self.path}: cannot be read to its end ({why}); run again") from e

    def _pictures(self, container: Any) -> Any:
        stream = container.streams.best("video")
        if stream is None or stream.disposition & av.stream.Disposition.attached_pic:
            has = "only sound" if container.streams.audio else "neither pictures nor sound"
            raise MediaError(self.path, f"no pictures, {has}; wanted a video; leave it out")
        if stream.codec_context is None:
            raise VacliError(
                f"{self.path}: no decoder for its pictures; wanted a common codec; convert it to H.264"
            )
        # Threads over slices, not over frames: the latter lose frames behind a damaged packet, and how many depends on
        # the number of cores.
        stream.thread_type = "SLICE"
        stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
        self._refuse_huge(stream.codec_context.width, stream.codec_context.height)
        return stream

    def _audio(self, container: Any) -> Any | None:
        stream = container.streams.best("audio")
        return None if stream is None or stream.codec_context is None else stream

    def _refuse_huge(self, width: int, height: int) -> None:
        if width * height > MAX_PIXELS:
            raise MediaError(
                self.path, f"pictures of {width}x{height}; wanted at most 8192x8192; scale it down"
            )

    def _picture(self, frame: Any, stream: Any, time_s: float, converter: _Converter) -> Picture:
        width = max(1, round(frame.width * (stream.sample_aspect_ratio or 1)))
        self._refuse_huge(width, frame.height)
        return Picture(frame, width, time_s, converter)

    def _decode(self, container: Any, stream: Any, kind: str) -> Iterator[tuple[Any, int | None]]:
        """Each frame of the stream and its presentation stamp; what was lost is noted once the end is reached."""
        self._damage.pop(kind, None)
        lost: list[str] = []
        count, failed, corrupt, end_s = 0, 0, 0, 0.0
        # AVI knows no presentation times: what passes for them is out of order where there are B-frames. Its frames
        # come at a constant rate, so the k-th frame shown takes the stamp of the k-th packet.
        due: deque[int | None] | None = deque() if container.format.name == "avi" else None
        for packet in _packets(container, lost):
            if packet is not None:
                end_s = max(end_s, _end_s(packet))
                if packet.stream is not stream:
                    continue
            try:
                frames = stream.decode(packet)  # None: what the decoder still holds back
            except MemoryError:  # of FFmpeg too
                raise
            except av.FFmpegError:
                failed += 1
                continue
            if due is not None and packet is not None:
                due.append(packet.dts)
            for frame in frames:
                count += 1
                corrupt += frame.is_corrupt
                yield frame, frame.pts if due is None else due.popleft() if due else None
        lost += [f"damaged packets: {failed}"] if failed else []
        lost += [f"damaged frames: {corrupt}"] if corrupt else []
        promised_s = _promised_s(container, stream)
        if end_s + CUT_S < promised_s:
            lost.append(f"cut off after {count} frames, at {end_s:.2f} s of {promised_s:.2f} s")
        if lost:
            self._damage[kind] = ", ".join(lost)


def _made(pictures: list[Picture]) -> tuple[np.ndarray, np.ndarray]:
    """rgb (B, H, W, 3) uint8 and times_s (B,) float64 of pictures of one shape."""
    rgb = np.empty((len(pictures), *pictures[0].shape, 3), np.uint8)
    for own, picture in zip(rgb, pictures, strict=True):
        own[:] = picture.rgb()
    return rgb, np.array([picture.time_s for picture in pictures])


class _Converter:
    """What the pictures of one pass share, so that it is not made anew for each: libswscale's state and memory."""

    def __init__(self) -> None:
        self._reformatter = VideoReformatter()
        nothing = np.empty((0, 0, 3), np.uint8)
        self._canvas: tuple[Any, Any, tuple[np.ndarray, np.ndarray]] = None, None, (nothing, nothing)
        self._part: tuple[Any, Any, list[np.ndarray]] = None, None, []

    def rgb(self, frame: Any, width: int) -> np.ndarray:
        """(H, width, 3) uint8 of a frame, as it is stored."""
        try:
            made = self._reformatter.reformat(frame, width, frame.height, "rgb24", threads=1)
        except OSError as e:
            if e.errno != errno.ENOTSUP:
                raise
            # Damage has given it colours that there are none of.
            frame.colorspace = frame.color_primaries = frame.color_trc = UNSAID
            made = self._reformatter.reformat(frame, width, frame.height, "rgb24", threads=1)
        return made.to_ndarray()

    def canvas(self, shape: tuple[int, int], turns: int) -> tuple[np.ndarray, np.ndarray]:
        """(H, W, 3) uint8 upright, and the same memory seen as the frame is stored; the same for the same arguments."""
        if self._canvas[:2] != (shape, turns):
            upright = np.zeros((*shape, 3), np.uint8)
            self._canvas = shape, turns, (upright, np.rot90(upright, -turns))
        return self._canvas[2]

    def part(self, frame: Any, columns: slice, rows: slice) -> np.ndarray:
        """(h, w, 3) uint8 of a part of a frame of LOCAL_FORMATS."""
        kind = frame.format.name, columns.stop - columns.start, rows.stop - rows.start
        if self._part[0] != kind:
            part = av.VideoFrame(kind[1], kind[2], kind[0])
            self._part = kind, part, [_samples(p, 0, 0, (p.height, p.width)) for p in part.planes]
        _, part, planes = self._part
        part.colorspace, part.color_range = frame.colorspace, frame.color_range
        for whole, own in zip(frame.planes, planes, strict=True):
            x, y = columns.start * whole.width // frame.width, rows.start * whole.height // frame.height
            own[:] = _samples(whole, x, y, own.shape)
        return self.rgb(part, kind[1])


def _samples(plane: Any, x: int, y: int, shape: tuple[int, ...]) -> np.ndarray:
    """(h, w) uint8: a part of a plane's own memory."""
    assert y + shape[0] <= plane.height
    assert x + shape[1] <= plane.width
    return np.ndarray(shape, np.uint8, plane, y * plane.line_size + x, (plane.line_size, 1))


def _span(low: int, high: int, size: int) -> slice | None:
    """What to convert of a side of `size` pixels to have those from low to high; None for nothing."""
    if low >= size or high <= 0 or low >= high:
        return None
    low, high = max(low, 0), min(high, size)
    start = low // BLOCK_PX * BLOCK_PX
    length = -(-(high - low + BLOCK_PX - 1) // STEP_PX) * STEP_PX  # enough wherever in its block it begins
    if start + length <= size:
        return slice(start, start + length)
    return slice(max(0, -(-(size - length) // BLOCK_PX) * BLOCK_PX), size)


class _Clock:
    """Stamps to seconds since the start, strictly increasing, so that every frame keeps its row."""

    def __init__(self, start_s: Fraction, rate_hz: Fraction | None) -> None:
        self.start_s, self.step_s, self.last_s = start_s, float(1 / rate_hz) if rate_hz else NUDGE_S, -np.inf

    def __call__(self, stamp: int | None, time_base: Fraction) -> float:
        if stamp is not None:
            time_s = float(stamp * time_base - self.start_s)
        else:  # unstamped: as the average rate has it
            time_s = self.last_s + self.step_s if np.isfinite(self.last_s) else 0.0
        self.last_s = time_s if time_s > self.last_s else self.last_s + NUDGE_S
        return self.last_s


def _packets(container: Any, lost: list[str]) -> Iterator[Any]:
    """Every packet of every stream that holds data, then None, also where damage ends the reading on the way."""
    try:
        for packet in container.demux():
            if packet.size:  # empty ones mark the end of a stream, or AVI's "same picture again"
                yield packet
    except (OSError, MemoryError):  # of FFmpeg too: the machine failed, not the file
        raise
    except av.FFmpegError as e:
        lost.append(f"reading stopped: {e.strerror}")
    except IndexError:  # PyAV 18 at the end of a file in which damage made streams appear on the way
        pass
    yield None


def _start_s(container: Any) -> Fraction:
    """The earliest start of the pictures and the sound, exactly."""
    streams = [container.streams.best("video"), container.streams.best("audio")]
    starts = [s.start_time * s.time_base for s in streams if s is not None and s.start_time is not None]
    return min(starts, default=Fraction(0))


def _end_s(packet: Any) -> float:
    stamp = packet.dts if packet.pts is None else packet.pts
    return 0.0 if stamp is None else float((stamp + (packet.duration or 0)) * packet.time_base)


def _promised_s(container: Any, stream: Any) -> float:
    """Where the file should end by its header, on the container's clock; 0 where the header does not say."""
    if (
        container.format.name == "avi"
    ):  # its durations are recomputed from what is there, its frame count is not
        counts = stream.type == "video" and stream.average_rate
        return float(stream.frames / stream.average_rate) if counts else 0.0
    return ((container.start_time or 0) + (container.duration or 0)) / 1e6


def _resampled(
    frames: Iterable[Any], rate_hz: int, start_s: Fraction
) -> Iterator[tuple[float | None, np.ndarray]]:
    """Decoded sound -> (begin_s, samples (S,)); begin_s is None where the samples continue those before.

    A run of frames that follow each other is resampled as one; a slip of more than SLIP_S or another sample format
    begins a new run, placed by its own timestamp.
    """
    resampler, kind = None, None
    begin_s, count = 0.0, 0  # of the present run, at the source's rate
    for frame in frames:
        end_s = begin_s + (count / kind[0] if kind else 0)
        time_s = end_s if frame.pts is None else float(frame.pts * frame.time_base - start_s)
        now = (frame.sample_rate, frame.format.name, frame.layout.name)
        fresh = now != kind or abs(time_s - end_s) > SLIP_S
        if fresh:
            yield from _mono(resampler, None, None)
            resampler = av.AudioResampler(format="fltp", layout=frame.layout, rate=rate_hz)
            kind, begin_s, count = now, time_s, 0
        count += frame.samples
        frame.pts = None  # the run is placed by its first frame; within it samples count
        yield from _mono(resampler, frame, begin_s if fresh else None)
    yield from _mono(resampler, None, None)


def _mono(resampler: Any, frame: Any, begin_s: float | None) -> Iterator[tuple[float | None, np.ndarray]]:
    """The mean of the channels of what the resampler gives for a frame, or for None what it still holds back."""
    if begin_s is not None:
        yield begin_s, np.empty(0, np.float32)
    if resampler is not None:
        for block in resampler.resample(frame):
            yield None, block.to_ndarray().mean(axis=0, dtype=np.float32)
