"""YuNet, the fast face detector, from a user's .onnx file, through OpenCV."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path
from typing import Any

import numpy as np

from .faces import MIN_FACE, MIN_FACE_PX, reduced
from .weights import EncoderError, local

FILES = ("yunet.onnx", "face_detection_yunet_2023mar.onnx")  # what "yunet" may be called among the weights
SCORE, OVERLAP, TOP = 0.7, 0.3, 5000  # faces score more, overlap no better one by more; looked at before that
SHORT_PX = (
    240  # larger frames are made so small, by their shorter side: the smallest face is then 24 pixels wide
)
# What the net gives since 2023: scores, "objectness", boxes and points for every 8th, 16th and 32nd pixel.
OUTPUTS = [f"{what}_{stride}" for what in ("cls", "obj", "bbox", "kps") for stride in (8, 16, 32)]
_MEND = "wanted face_detection_yunet_2023mar.onnx of opencv_zoo (MIT), whole"
_QUIET = threading.Lock()


class YuNet:
    """YuNet (Wu, Peng, Yu 2023, "YuNet: A Tiny Millisecond-level Face Detector") on the CPU, through OpenCV.

    file: the .onnx. Raises EncoderError where there is none, or it does not speak of YuNet's outputs; what OpenCV then
    cannot run is found out at the first frame, an EncoderError too.
    """

    def __init__(self, file: Path) -> None:
        try:
            content = file.read_bytes()
        except OSError as e:
            raise EncoderError(f"no face detector at {file} ({e.strerror}); {_MEND}; check the path") from e
        missing = [name for name in OUTPUTS if name.encode() not in content]
        if missing:
            raise EncoderError(f"{file} is no YuNet: it has no output {missing[0]}; {_MEND}")
        self.file, self._content = file, content
        self._own = threading.local()
        self.weights_sha256 = hashlib.sha256(content).hexdigest()

    @classmethod
    def named(cls, detector: str) -> YuNet:
        """The one of a path, or of the name "yunet": one of FILES in ./weights or $VACLI_WEIGHTS."""
        if detector == "yunet":
            found = local(FILES)
            if found is None:
                raise EncoderError(
                    f"no {' or '.join(FILES)} in ./weights or $VACLI_WEIGHTS; {_MEND}; put it there or give its path"
                )
            return cls(found)
        if not detector.lower().endswith(".onnx"):
            raise EncoderError(
                f"no such face detector: {detector!r}; wanted mtcnn, yunet, or YuNet's .onnx file"
            )
        return cls(Path(detector))

    def recipe(self) -> dict[str, Any]:
        """All that decides what is found, as plain JSON; OpenCV's version moves it by rounding only."""
        return {
            "name": "yunet",
            "weights_sha256": self.weights_sha256,
            "score": SCORE,
            "overlap": OVERLAP,
            "short_px": SHORT_PX,
            "min_face": {"px": MIN_FACE_PX, "of_shorter_side": MIN_FACE},
        }

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_own"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _own=threading.local())

    def __call__(self, frames: np.ndarray) -> list[np.ndarray]:
        """frames (B, H, W, 3) uint8 RGB -> for each the faces (n, 15) float32, best first, as `Detector` has them."""
        height, width = frames.shape[1:3]
        scale = min(1.0, SHORT_PX / min(height, width))
        size = (max(round(width * scale), 1), max(round(height * scale), 1))
        least = max(MIN_FACE_PX, MIN_FACE * min(height, width))
        return [self._one(frame, size, least) for frame in frames]

    def _one(self, frame: np.ndarray, size: tuple[int, int], least: float) -> np.ndarray:
        import cv2

        try:
            _, found = self._net(size).detect(cv2.cvtColor(reduced(frame, size), cv2.COLOR_RGB2BGR))
        except cv2.error as e:
            why = " ".join(str(e).split())[:160]
            raise EncoderError(f"OpenCV {cv2.__version__} cannot run {self.file}: {why}; {_MEND}") from e
        if found is None:
            return np.empty((0, 15), np.float32)
        zoom = np.array([frame.shape[1] / size[0], frame.shape[0] / size[1]])
        rows = found[np.isfinite(found).all(axis=1)].astype(np.float64)
        # x, y, width, height; then the subject's right eye first, which is the left one in the picture, as ours.
        rows[:, 2:4] += rows[:, :2]
        rows[:, :14] = (rows[:, :14].reshape(-1, 7, 2) * zoom).reshape(-1, 14)
        rows = rows[np.minimum(rows[:, 2] - rows[:, 0], rows[:, 3] - rows[:, 1]) >= least]
        return rows[np.argsort(-rows[:, 14], kind="stable")].astype(np.float32)

    def _net(self, size: tuple[int, int]) -> Any:
        """OpenCV's detector for pictures of this size (width, height): each thread's own, as its size is its state."""
        import cv2

        if not hasattr(self._own, "net"):
            model, config = np.frombuffer(self._content, np.uint8), np.empty(0, np.uint8)
            logging = cv2.utils.logging
            with _QUIET:  # OpenCV 5 warns of a target nobody asked for, and tells of errors twice
                level = logging.setLogLevel(logging.LOG_LEVEL_SILENT)
                try:
                    self._own.net = cv2.FaceDetectorYN.create(
                        "onnx", model, config, size, SCORE, OVERLAP, TOP
                    )
                finally:
                    logging.setLogLevel(level)
        self._own.net.setInputSize(size)
        return self._own.net
