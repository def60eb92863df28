"""How well people are found and followed in real clips (`python -m benchmarks.faces DATA`): swaps, jitter, speed."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from vacli.extract import yunet
from vacli.extract.faces import ARCFACE_112, similarity
from vacli.extract.following import BRIDGED_SCORE
from vacli.extract.media import Video
from vacli.extract.people import People, Person
from vacli.extract.weights import local
from vacli.store import Track

CLIPS = (
    "bbaf2n.mpg",
    "brbk7n.mpg",
    "lbbc2a.mpg",
    "sbwe5n.mpg",
    "single_face.mp4",
    "face_noface.mov",
    "no_face.mp4",
)
CUTS_CLIP = "short_hamilton_clip.mp4"


class Seen(NamedTuple):
    """Somebody a human sees: in frames first to last, the middle of his face within x0..x1, y0..y1 (pixels)."""

    who: str
    first: int
    last: int
    x0: int = 0
    x1: int = 10000
    y0: int = 0
    y1: int = 10000


# What a human sees, looked at frame by frame; cuts lie where one ends and the next begins.
SEEN = {
    CUTS_CLIP: [
        Seen("pianist", 0, 19, 40, 90, 180, 220),
        Seen("singer", 0, 19, 500, 580, 55, 95),
        Seen(
            "musician", 20, 81, 350, 640, 90, 290
        ),  # in profile; from 44 on at the edge, turned away or half outside
        Seen("singer", 82, 210, 150, 370, 60, 150),
        Seen("man behind", 211, 274, 40, 110, 80, 125),
        Seen("woman behind", 211, 274, 160, 225, 105, 150),
        Seen("man in front", 211, 274, 325, 385, 65, 110),
        Seen("woman in front", 211, 274, 390, 450, 110, 155),
    ],
    "face_noface.mov": [Seen("man", 0, 71)],  # then black, then a drawn title
    "no_face.mp4": [],
}

PICTURE = (360, 640)
HEAD = 256  # pixels a side of what is cut out around a face
CROSSINGS_RATE_HZ, CROSSINGS_FRAMES = 25, 70
Walk = Callable[[int], tuple[float, float]]
# Width of the face behind and of the one in front, and where their middles are in frame i.
SCENES: dict[str, tuple[int, int, Walk, Walk]] = {
    "cross": (70, 80, lambda i: (90 + 6.5 * i, 180), lambda i: (550 - 6.5 * i, 190)),
    "cross, one higher": (70, 70, lambda i: (90 + 6.5 * i, 150), lambda i: (550 - 6.5 * i, 200)),
    "cross fast": (70, 70, lambda i: (60 + 12 * _step(i), 180), lambda i: (580 - 12 * _step(i), 180)),
    "one passes before the other": (70, 80, lambda i: (320, 180), lambda i: (20 + 9 * i, 190)),
    "close together": (70, 75, lambda i: (290 + 10 * np.sin(i / 5), 180), lambda i: (365 + 14 * np.sin(i / 3), 185)),
    "meet and turn back": (70, 75, lambda i: (120 + _back(i), 180), lambda i: (520 - _back(i), 185)),
}  # fmt: skip
PAIRS = (("bbaf2n.mpg", "brbk7n.mpg"), ("brbk7n.mpg", "single_face.mp4"))


def _step(i: int) -> int:
    return min(max(i - 12, 0), 44)


def _back(i: int) -> float:
    return 5.5 * min(i, CROSSINGS_FRAMES - i)


@dataclass
class Figures:
    """What became of one clip.

    visible: faces a human sees, row by row; found: so many of them were. unfounded: faces found where he sees none.
    swaps: how often a place went over to somebody else within a shot. jitter_px: second difference of the five points
    in the aligned 112 px picture, its mean over the points: median over the rows, and what nine tenths have less.
    """

    frames: int
    people: int
    visible: int
    found: int
    bridged: int
    unfounded: int
    swaps: int
    jitter_px: tuple[float, float]
    frames_per_s: float


def followed(frames: np.ndarray, times_s: np.ndarray, people: People) -> tuple[Track, float]:
    """The people of frames in memory, and how many of them a second."""
    people(iter([(frames[:1], times_s[:1])]))  # weights are loaded
    began = time.perf_counter()
    track = people((frames[i : i + 32], times_s[i : i + 32]) for i in range(0, len(frames), 32))
    return track, len(frames) / (time.perf_counter() - began)


def measured(track: Track, seen: list[Seen], frames_per_s: float) -> Figures:
    values = track.values
    sure, there = values[:, :, 14] > BRIDGED_SCORE, values[:, :, 14] > 0
    who = identities(values, seen)
    sighted = [(row, name) for row, names in enumerate(who) for k, name in enumerate(names) if sure[row, k]]
    return Figures(
        frames=len(track),
        people=int(there.any(axis=0).sum()),
        visible=sum(s.last - s.first + 1 for s in seen),
        found=len({sight for sight in sighted if sight[1]}),
        bridged=int((there & ~sure).sum()),
        unfounded=sum(not name for _, name in sighted),
        swaps=swaps(who, seen),
        jitter_px=jitter_px(values),
        frames_per_s=frames_per_s,
    )


def identities(values: np.ndarray, seen: list[Seen]) -> list[list[str | None]]:
    """For each row of values (T, K, 15) who is in each place: a name, "" where a human sees nobody, None if empty."""
    return [
        [_who(row, face, seen) if face[14] > 0 else None for face in faces]
        for row, faces in enumerate(values)
    ]


def _who(row: int, face: np.ndarray, seen: list[Seen]) -> str:
    x, y = (face[0] + face[2]) / 2, (face[1] + face[3]) / 2
    return next(
        (s.who for s in seen if s.first <= row <= s.last and s.x0 <= x <= s.x1 and s.y0 <= y <= s.y1), ""
    )


def swaps(who: list[list[str | None]], seen: list[Seen]) -> int:
    """How often a place holds one person and then another within a shot; what is nobody is passed over."""
    shots = sorted({s.first for s in seen} | {s.last + 1 for s in seen} | {0, len(who)})
    count = 0
    for first, last in pairwise(shots):
        for place in zip(*who[first:last], strict=True):
            names = [name for name in place if name]
            count += sum(a != b for a, b in pairwise(names))
    return count


def jitter_px(values: np.ndarray) -> tuple[float, float]:
    """(median, 90 %) over the rows of the mean second difference of the five points, in the aligned 112 px picture."""
    off = []
    for place in values.transpose(1, 0, 2):
        sure = place[:, 14] > BRIDGED_SCORE
        for row in np.flatnonzero(sure[:-2] & sure[1:-1] & sure[2:]) + 1:
            before, now, after = place[row - 1 : row + 2, 4:14].reshape(3, 5, 2).astype(float)
            scale = np.sqrt(np.linalg.det(similarity(now, ARCFACE_112)[:, :2]))
            off.append(scale * np.linalg.norm(before - 2 * now + after, axis=1).mean())
    return (float(np.median(off)), float(np.quantile(off, 0.9))) if off else (0.0, 0.0)


def decoded(path: Path) -> tuple[np.ndarray, np.ndarray]:
    batches = list(Video(path).frames())
    return np.concatenate([rgb for rgb, _ in batches]), np.concatenate([times_s for _, times_s in batches])


# ---- crossings -----------------------------------------------------------------------------------------------


def crossings(data: Path) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Heads cut out of two clips, moved over a soft background so that they meet, as SCENES has it.

    Yields frames (T, 360, 640, 3) and, by construction, the middles of both faces, (T, 2) each.
    """
    detector = People()
    for behind, before in PAIRS:
        clips = [decoded(data / "video" / name)[0][:CROSSINGS_FRAMES] for name in (behind, before)]
        boxes = [Person("main")(detector(iter([(clip[:1], np.zeros(1))]))).values[0, :4] for clip in clips]
        for width_a, width_b, walk_a, walk_b in SCENES.values():
            heads = [_heads(c, b, w) for c, b, w in zip(clips, boxes, (width_a, width_b), strict=True)]
            paths = [np.array([walk(i) for i in range(CROSSINGS_FRAMES)]) for walk in (walk_a, walk_b)]
            yield _composed(heads, [_mask(width_a), _mask(width_b)], paths), *paths


def _heads(clip: np.ndarray, box: np.ndarray, width: int) -> list[np.ndarray]:
    scale = width / (box[2] - box[0])
    shift = HEAD / 2 - scale * (box[:2] + box[2:]) / 2
    matrix = np.array([[scale, 0, shift[0]], [0, scale, shift[1]]], float)
    return [cv2.warpAffine(frame, matrix, (HEAD, HEAD)) for frame in clip]


def _mask(width: int) -> np.ndarray:
    mask = np.zeros((HEAD, HEAD), np.float32)
    cv2.ellipse(mask, (HEAD // 2, HEAD // 2 - 4), (int(width * 0.75), int(width * 1.05)), 0, 0, 360, 1.0, -1)
    return cv2.GaussianBlur(mask, (0, 0), 2)[..., None]


def _composed(heads: list[list[np.ndarray]], masks: list[np.ndarray], paths: list[np.ndarray]) -> np.ndarray:
    height, width = PICTURE
    noise = np.random.default_rng(0).integers(40, 140, (height, width, 3)).astype(np.uint8)
    background = cv2.GaussianBlur(noise, (0, 0), 9)
    frames = np.empty((CROSSINGS_FRAMES, height, width, 3), np.uint8)
    for i in range(CROSSINGS_FRAMES):
        canvas = np.pad(background, ((HEAD, HEAD), (HEAD, HEAD), (0, 0))).astype(np.float32)
        for head, mask, path in zip(heads, masks, paths, strict=True):
            x, y = (path[i] + HEAD / 2).astype(int)
            canvas[y : y + HEAD, x : x + HEAD] *= 1 - mask
            canvas[y : y + HEAD, x : x + HEAD] += mask * head[i]
        frames[i] = canvas[HEAD:-HEAD, HEAD:-HEAD]
    return frames


def crossing_swaps(track: Track, behind: np.ndarray, before: np.ndarray) -> int:
    """How often a place went from one head to the other; rows in which they are near each other do not count."""
    count = 0
    for place in track.values.transpose(1, 0, 2):
        middles = (place[:, :2] + place[:, 2:4]) / 2
        to = np.stack([np.linalg.norm(middles - path, axis=1) for path in (behind, before)])
        clear = (
            (place[:, 14] > BRIDGED_SCORE)
            & (np.linalg.norm(behind - before, axis=1) > 40)
            & (to.min(axis=0) < 40)
        )
        count += int((np.diff(to.argmin(axis=0)[clear]) != 0).sum())
    return count


# ---- the table -----------------------------------------------------------------------------------------------


def makers() -> dict[str, Callable[[], People]]:
    """The ways to find people that are measured, YuNet among them where its weights are at hand."""
    ways: dict[str, Callable[[], People]] = {
        "MTCNN, every frame": lambda: People(every=1),
        "MTCNN, every 3rd": lambda: People(every=3),
    }
    if local(yunet.FILES) is not None:
        ways["YuNet, every frame"] = lambda: People("yunet")
        ways["YuNet, every 3rd"] = lambda: People("yunet", every=3)
    return ways


SAYS = """## Faces

Clips lent for trials, against what a human sees in them (data in benchmarks/faces.py). Found: of the faces he
sees, row by row; bridged rows are not counted. Nobody: faces found where he sees none. Swaps: a place goes over
to somebody else within a shot. Jitter: second difference of the five points, in pixels of the aligned 112 px
picture, median and 90 %. Frames/s: finding and following, frames in memory. Crossings: heads cut out of two
clips, moved so that they hide each other ({scenes}).

| clip | | frames | found | nobody | bridged | people | swaps | jitter | frames/s |
|---|---|--:|--:|--:|--:|--:|--:|--:|--:|"""


def results(data: Path) -> str:
    """Markdown: a section with a paragraph and a table. data: the folder that has `video/` in it."""
    ways = {name: make() for name, make in makers().items()}
    lines = [SAYS.format(scenes="; ".join(SCENES))]
    for clip in (*CLIPS, CUTS_CLIP):
        frames, times_s = decoded(data / "video" / clip)
        seen = SEEN.get(clip, [Seen("speaker", 0, len(frames) - 1)])
        for name, way in ways.items():
            track, frames_per_s = followed(frames, times_s, way)
            lines.append(_row(clip, name, measured(track, seen, frames_per_s)))
    made = list(crossings(data))
    times_s = np.arange(CROSSINGS_FRAMES) / CROSSINGS_RATE_HZ
    for name, way in ways.items():
        tracks = [way(iter([(frames, times_s)])) for frames, _, _ in made]
        count = sum(crossing_swaps(track, a, b) for track, (_, a, b) in zip(tracks, made, strict=True))
        people = f"{sum(track.values.shape[1] for track in tracks)} of {2 * len(made)}"
        total = len(made) * CROSSINGS_FRAMES
        lines.append(f"| {len(made)} crossings | {name} | {total} |  |  |  | {people} | {count} |  |  |")
    return "\n".join(lines) + "\n"


def _row(clip: str, name: str, f: Figures) -> str:
    jitter = f"{f.jitter_px[0]:.2f}, {f.jitter_px[1]:.2f}" if f.found else ""
    cells = [
        clip,
        name,
        f.frames,
        f"{f.found} of {f.visible}",
        f.unfounded,
        f.bridged,
        f.people,
        f.swaps,
        jitter,
    ]
    return f"| {' | '.join(map(str, cells))} | {f.frames_per_s:.0f} |"


if __name__ == "__main__":
    print(results(Path(sys.argv[1])))
