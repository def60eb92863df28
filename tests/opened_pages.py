"""A folder of pages of all kinds, and a page of it as a test has it open in a browser."""

from __future__ import annotations

import shutil
from pathlib import Path

import cv2
import numpy as np
from vacli.report.pages import write_pages
from vacli.store.curves import About, Curve, remember, write_csv
from vacli.store.names import plain_id
from vacli.store.track import Track

from .media_files import write_video

RATE_HZ = 25
ROWS = 150  # 6 s
HOUR_ROWS = 108_000
SPIKE_ROW = 60_001
HOSTILE = {
    "script": "<script>alert(1)</script>.mp4",
    "quotes": "a\"b'c&d.mp4",
    "emoji": "\U0001f600 \U0001f3ac.mp4",
    "long": "v" * 196 + ".mp4",
    "percent": "100%#?.mp4",
}


def _shades(count: int) -> list[np.ndarray]:
    """Frame i is 40 + i all over: the screen says which frame it shows."""
    return [np.full((96, 160, 3), 40 + i, np.uint8) for i in range(count)]


def a_curve(rows: int = ROWS, rate_hz: float = RATE_HZ, phase: float = 0.0, spread: bool = False) -> Curve:
    times_s = np.arange(rows) / rate_hz
    values = 0.6 * np.stack([np.sin(times_s + phase), np.cos(0.7 * times_s + phase)], 1).astype(np.float32)
    face = np.ones(rows, bool)
    face[rows // 2 : rows * 2 // 3] = False  # of 6 s: from 3 to 4
    return Curve(Track(values, times_s), face, "main", np.full((rows, 2), 0.15) if spread else None)


def _put(folder: Path, own_id: str, curve: Curve, name: str | None = None, **facts) -> Path:
    csv = folder / f"{plain_id(own_id)}.csv"
    write_csv(csv, curve)
    about = About(own_id, facts.pop("video_id", own_id), name or f"{own_id}.mp4", csv=csv, **facts)
    remember(folder, about)
    return csv


def write_labels(path: Path, curve: Curve) -> np.ndarray:
    rated = np.round(np.clip(0.5 * curve.track.values + 0.2, -1, 1), 3)
    rated[20:30] = -5
    path.write_text("valence,arousal\n" + "".join(f"{v:.3f},{a:.3f}\n" for v, a in rated))
    return np.where(rated == -5, np.nan, rated).astype(np.float32)


def _hour() -> Curve:
    curve = a_curve(HOUR_ROWS, 30.0, spread=True)
    curve.track.values[SPIKE_ROW] = 1.0  # one frame of an hour
    return curve


def write_folder(root: Path) -> Path:
    """Pages of videos plain and odd, of hostile names, of two people, and of an hour; returns their folder."""
    out, videos = root / "predictions", root / "videos"
    videos.mkdir()
    often = {"g": "12", "preset": "ultrafast", "crf": "12"}
    plain = write_video(videos / "plain.mp4", _shades(ROWS), options=often)
    _put(out, "plain", a_curve(), video=plain)
    write_labels(root / "labels.txt", a_curve())
    _put(out, "labelled", a_curve(spread=True), video=plain, labels=root / "labels.txt")
    for i, person in enumerate(("left", "right")):
        _put(out, f"two_{person}", a_curve(phase=i), "two.mp4", video_id="two", person=person, video=plain)
    times_s = np.round(np.cumsum(np.tile([0.02, 0.06, 0.1], 30)), 3) - 0.02
    vfr = write_video(videos / "vfr.mp4", _shades(90), times_s.tolist(), options=often)
    _put(out, "vfr", Curve(Track(a_curve(90).track.values, times_s), np.ones(90, bool)), video=vfr)
    _put(out, "lost", a_curve(), video=videos / "gone.mp4")
    (videos / "unplayable.mp4").write_bytes(b"this is no video" * 100)
    _put(out, "unplayable", a_curve(), video=videos / "unplayable.mp4")
    remember(out, About("failed", "failed", "failed.mp4", problem="moov atom not found"))
    for own_id, name in HOSTILE.items():
        video = videos / name
        video.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(plain, video)
        _put(out, own_id, a_curve(), name, video=video)
    _put(out, "hour", _hour())
    write_pages(out)
    return out


class Opened:
    """A page that a test works with, and all it said and asked for."""

    def __init__(self, browser, path: Path, **looks) -> None:
        self.context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **looks})
        self.context.set_default_timeout(8000)
        self.page = self.context.new_page()
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda line: self.said.append(line.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.said.append("dialog"), dialog.dismiss()))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.refused: dict[str, str | None] = {}
        self.page.on("requestfailed", lambda request: self.refused.update({request.url: request.failure}))
        self.page.goto(path.as_uri())

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()

    def js(self, code: str):
        return self.page.evaluate(code)

    def until(self, code: str) -> None:
        """Wait until it is so; playwright's own way needs `eval`, which the pages forbid."""
        for _ in range(400):
            if self.js(f"Boolean({code})"):
                return
            self.page.wait_for_timeout(20)
        raise AssertionError(f"never so: {code}; said: {self.said}")

    def video_is_ready(self) -> None:
        self.until("document.getElementById('video').readyState >= 2")

    def x_of(self, time_s: float) -> float:
        return self.js(f"vacli.page.curves.panels[0].plot.valToPos({time_s}, 'x')")

    def at(self, axis: str, time_s: float, **how) -> None:
        self.page.locator(f"#{axis} .u-over").click(position={"x": self.x_of(time_s), "y": 60}, **how)

    def shade(self) -> float:
        """What the picture on the screen has in its middle, away from the player's own controls."""
        self.until("!document.getElementById('video').seeking")
        self.page.mouse.move(0, 0)
        self.js("new Promise((go) => requestAnimationFrame(() => requestAnimationFrame(go)))")
        shot = self.page.locator("#video").screenshot()
        image = cv2.imdecode(np.frombuffer(shot, np.uint8), cv2.IMREAD_GRAYSCALE)
        return float(image[8 : len(image) // 5, 8:-8].mean())
