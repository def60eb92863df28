"""A video with what was seen in it drawn on: the face's box, and where valence and arousal stand on the circumplex."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np

from ..store.curves import Curve
from .film import Picture, Source, each, write_film

Colour = tuple[int, int, int]  # RGB

# Of Okabe and Ito's set, told apart by the colour-blind too.
VALENCE, AROUSAL, WARNING = (86, 180, 233), (240, 170, 30), (240, 228, 66)
INK, PALE, PANEL = (255, 255, 255), (185, 185, 185), (18, 20, 26)
OPACITY = 0.72  # of the panels
NAMES, COLOURS = ("valence", "arousal"), (VALENCE, AROUSAL)
CORNERS = ("bottom left", "bottom right", "top right")  # where a gauge may be; the signs are at the top left
# Sizes in units of 1/360 of the picture's shorter side; to be read below 270 pixels too they are what they are there,
# but in tiny pictures the gauge is no higher than half of them.
UNIT_AT_PX, LEAST_UNIT, LEAST_PX = 360, 0.75, 200
PAD, RADIUS, WORDS = 9, 40, 62  # of the gauge; of its circle; width of its words
SMALL, SIGN, LARGE = 0.42, 0.44, 0.62  # of letters, as OpenCV has it, at a unit of 1
MADE = "vacli overlay"  # the comment of such a film: by it we know it again
TAIL_S = 1.5  # the dot's way so far
REACH_S = 0.1  # a frame this far from any row of the curve has no values, unless rows lie farther apart


def write_overlay(
    video: Source,
    out: Path,
    curve: Curve,
    boxes: np.ndarray | None = None,
    progress: Callable[[int], object] = lambda _: None,
) -> None:
    """Write the mp4 `out`: every frame of the video at its own time with a gauge of the curve, and the sound.

    boxes: (T, 4) pixels x0, y0, x1, y1 of the face in the rows of the curve, as the first columns of the `faces` track;
    a row of NaN where it is not seen. Rows without a face are marked as such: their values were filled in.
    A frame at which the curve has no row is marked too. progress: told how many frames more are done.

    The file is whole or absent, and memory is bounded. Raises VacliError for a video that cannot be read and a file
    that cannot be written, ValueError for boxes of another curve.
    """
    if boxes is not None and boxes.shape != (len(curve.track), 4):
        raise ValueError(f"boxes of {boxes.shape} for a curve of {len(curve.track)} rows; wanted (T, 4)")
    write_film(out, video, _drawn(each(video), curve, boxes, progress), comment=MADE)


def _drawn(
    pictures: Iterator[Picture], curve: Curve, boxes: np.ndarray | None, progress: Callable[[int], object]
) -> Iterator[Picture]:
    times_s, values = curve.track.times_s, curve.track.values
    reach_s = max([REACH_S, float(np.median(np.diff(times_s))) if len(times_s) > 1 else 0.0])
    who = {"main": []}.get(curve.person, [(_called(curve.person), INK)])
    corner: str | None = None
    for rgb, time_s in pictures:
        pen = _Pen(rgb)
        corner = corner or pen.free_corner(boxes)
        row = _row(times_s, time_s, reach_s)
        if row is None:
            pen.signs([*who, ("no values", WARNING)])
        else:
            seen = bool(curve.face[row])
            if seen and boxes is not None and np.isfinite(boxes[row]).all():
                pen.box(boxes[row])
            absent = "no face: filled in" if curve.face.any() else "no face"
            pen.signs(who if seen else [*who, (absent, WARNING)])
            first = int(np.searchsorted(times_s, times_s[row] - TAIL_S))
            pen.gauge(corner, values[first : row + 1], seen)
        yield rgb, time_s
        progress(1)


def _called(person: str) -> str:
    return f"person {person}" if person.isdecimal() else person


def _row(times_s: np.ndarray, time_s: float, reach_s: float) -> int | None:
    """The curve's row for a frame: the nearest."""
    right = int(np.searchsorted(times_s, time_s))
    near = [i for i in (right - 1, right) if 0 <= i < len(times_s)]
    row = min(near, key=lambda i: abs(float(times_s[i]) - time_s), default=None)
    return None if row is None or abs(float(times_s[row]) - time_s) > reach_s else row


class _Pen:
    """Draws into a frame (H, W, 3) uint8, larger in larger ones."""

    def __init__(self, rgb: np.ndarray) -> None:
        self._rgb = rgb
        side = min(rgb.shape[:2])
        self._unit = min(max(LEAST_UNIT, side / UNIT_AT_PX), side / LEAST_PX)

    def box(self, box: np.ndarray) -> None:
        """White on a dark edge: to be seen on any picture."""
        import cv2

        limit = 4 * max(self._rgb.shape)  # a stranger's track may say anything
        x0, y0, x1, y1 = np.clip(np.rint(box), -limit, limit).astype(int).tolist()
        for colour, width in ((PANEL, 4), (INK, 2)):
            cv2.rectangle(self._rgb, (x0, y0), (x1, y1), colour, self._px(width), cv2.LINE_AA)

    def signs(self, signs: list[tuple[str, Colour]]) -> None:
        """Below each other at the top left."""
        pad = top = self._px(PAD)
        for text, colour in signs:
            width, height = self._measure(text, SIGN)
            self._panel(pad, top, width + 2 * pad, height + 2 * pad)
            self._text(text, 2 * pad, top + pad + height, SIGN, colour)
            top += height + 2 * pad + pad // 2

    def free_corner(self, boxes: np.ndarray | None) -> str:
        """The corner in which a gauge hides least of the faces (T, 4) of the whole video."""
        if boxes is None or not np.isfinite(boxes).any():
            return CORNERS[0]
        boxes = boxes[np.isfinite(boxes).all(axis=1)]
        hidden = []
        for corner in CORNERS:
            left, top, width, height = self._gauge_at(corner)
            wide = np.minimum(boxes[:, 2], left + width) - np.maximum(boxes[:, 0], left)
            high = np.minimum(boxes[:, 3], top + height) - np.maximum(boxes[:, 1], top)
            hidden.append(float((np.maximum(wide, 0) * np.maximum(high, 0)).sum()))
        return CORNERS[int(np.argmin(hidden))]

    def gauge(self, corner: str, way: np.ndarray, seen: bool) -> None:
        """The circumplex with the dot and its tail, and the values as text.

        way: (n, 2) valence and arousal of the last rows, the present one last; hollow where it is filled in.
        """
        pad, radius = self._px(PAD), self._px(RADIUS)
        left, top, width, height = self._gauge_at(corner)
        self._panel(left, top, width, height)
        self._circle(left + pad + radius, top + pad + radius, radius, way, seen)
        x, line = left + 2 * radius + 2 * pad, height / 4.6
        for i, (name, value, colour) in enumerate(zip(NAMES, way[-1].tolist(), COLOURS, strict=True)):
            self._text(name, x, round(top + (2 * i + 1) * line), SMALL, PALE)
            number = f"{value:+.2f}" if np.isfinite(value) else "-"
            self._text(number, x, round(top + (2 * i + 2) * line), LARGE, colour if seen else PALE)

    def _gauge_at(self, corner: str) -> tuple[int, int, int, int]:
        """Left, top, width, height in pixels."""
        pad, radius = self._px(PAD), self._px(RADIUS)
        width, height = 2 * radius + 3 * pad + self._px(WORDS), 2 * (radius + pad)
        left = pad if "left" in corner else self._rgb.shape[1] - width - pad
        top = pad if "top" in corner else self._rgb.shape[0] - height - pad
        return left, top, width, height

    def _circle(self, x: int, y: int, radius: int, way: np.ndarray, seen: bool) -> None:
        import cv2

        rgb, thin = self._rgb, self._px(1)
        cv2.circle(rgb, (x, y), radius, PALE, thin, cv2.LINE_AA)
        cv2.line(rgb, (x - radius, y), (x + radius, y), VALENCE, thin, cv2.LINE_AA)
        cv2.line(rgb, (x, y - radius), (x, y + radius), AROUSAL, thin, cv2.LINE_AA)
        dots = np.rint([x, y] + way[np.isfinite(way).all(axis=1)] * [radius, -radius]).astype(int).tolist()
        for i, (before, now) in enumerate(pairwise(dots), 1):
            part = i / len(dots)  # it fades into the panel
            colour = tuple(round(p + (c - p) * part) for c, p in zip(INK, PANEL, strict=True))
            cv2.line(rgb, before, now, colour, self._px(1.5), cv2.LINE_AA)
        if dots:
            cv2.circle(rgb, dots[-1], self._px(4.5), PANEL, -1, cv2.LINE_AA)
            cv2.circle(rgb, dots[-1], self._px(3.5), INK, -1 if seen else thin, cv2.LINE_AA)

    # ---- in units --------------------------------------------------------------------------------------------

    def _px(self, units: float) -> int:
        return max(1, round(units * self._unit))

    def _panel(self, left: int, top: int, width: int, height: int) -> None:
        there = self._rgb[max(0, top) : max(0, top + height), max(0, left) : left + width]
        there[:] = (there * (1 - OPACITY) + np.array(PANEL) * OPACITY).astype(np.uint8)

    def _measure(self, text: str, size: float) -> tuple[int, int]:
        import cv2

        (width, height), _ = cv2.getTextSize(
            text, cv2.FONT_HERSHEY_SIMPLEX, size * self._unit, max(2, self._px(1))
        )
        return width, height

    def _text(self, text: str, x: int, y: int, size: float, colour: Colour) -> None:
        """From (x, y) on, the left end of its base line."""
        import cv2

        font, thick = cv2.FONT_HERSHEY_SIMPLEX, max(2, self._px(1))
        cv2.putText(self._rgb, text, (x, y), font, size * self._unit, colour, thick, cv2.LINE_AA)
