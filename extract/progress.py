"""The bars of a run of stage one: videos, and frames done of those to do, how many a second, and the time left."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

from tqdm import tqdm

from .datasets import Sample


class Progress:
    """A bar over the samples and one over their frames; how many of these to expect is found out beside the work.

    calm: seconds between two looks of it. Where no terminal is, as in a log file, the bar of frames tells both.
    """

    def __init__(self, samples: Sequence[Sample], calm: float) -> None:
        self._lock = threading.Lock()
        self._expected: dict[int, float] = {}  # frames, by the id() of the sample
        self._done: dict[int, float] = {}
        self._over_with: set[str] = set()  # by video_id
        self._samples, self._over = samples, threading.Event()
        look: dict[str, Any] = {"dynamic_ncols": True, "mininterval": calm}
        alone = {} if sys.stderr.isatty() else {"disable": True}
        videos = len({s.video_id for s in samples})
        self._videos = tqdm(desc="videos", unit="video", total=videos, **look, **alone)
        self._bar = tqdm(desc="frames", unit="frame", **look)
        self._counting = threading.Thread(target=self._count, name="vacli-count", daemon=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, at: TracebackType | None
    ) -> None:
        self._over.set()
        if self._counting.ident:
            self._counting.join()
        self.show()
        self._bar.close()
        self._videos.close()

    def of(self, sample: Sample, passes: int) -> Callable[[int], None]:
        """Told how many frames one of the sample's passes has done since it was last told; the first asks for all."""
        if not self._counting.ident:
            self._counting.start()

        def told(frames: int) -> None:
            with self._lock:
                self._done[id(sample)] = self._done.get(id(sample), 0.0) + frames / passes

        return told

    def done(self, sample: Sample, frames: int | None) -> None:
        """It is over: it had so many frames; None: it is not counted."""
        with self._lock:
            known = self._done.get(id(sample), 0.0) if frames is None else float(frames)
            self._done[id(sample)] = self._expected[id(sample)] = known
            self._over_with.add(sample.video_id)

    def show(self) -> None:
        with self._lock:
            done = int(sum(self._done.values()))
            expected = sum(max(n, self._done.get(key, 0.0)) for key, n in self._expected.items())
            videos = len(self._over_with)
        if videos != self._videos.n:
            self._videos.n = videos
            if self._videos.disable:
                self._bar.set_postfix_str(f"{videos} of {self._videos.total} videos", refresh=False)
            else:
                self._videos.refresh()
        if done != self._bar.n or expected != self._bar.total:
            self._bar.total = max(int(expected), done)
            self._bar.update(max(0, done - self._bar.n))

    def _count(self) -> None:
        for sample in self._samples:
            frames = _frames_of(sample)
            with self._lock:
                self._expected.setdefault(id(sample), frames)
            if self._over.is_set():
                return


def _frames_of(sample: Sample) -> float:
    """As the header has it, which may be wrong; 0 where it does not say."""
    from .media import Video

    try:
        if sample.video is None:
            return max(sample.crop_files(), default=-1) + 1
        return Video(sample.video).check().frames_hint or 0
    except Exception:  # it is for the bar alone: whoever reads the video tells what is wrong with it
        return 0
