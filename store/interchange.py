"""Tracks to and from the files other tools read; so far the CSV of a predicted curve."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import numpy as np

from .. import VacliError
from .track import Track

CURVE_HEADER = "frame,time_s,valence,arousal,face"


def write_curve_csv(path: Path, curve: Track, face: np.ndarray) -> None:
    """One line per decoded frame, numbered from 1: CURVE_HEADER. face (T,) bool: 0 where the row is filled in.

    The file is whole or as it was before: written aside, then renamed. Raises VacliError if it cannot be written.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    rows = zip(curve.times_s, curve.values, face, strict=True)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(aside, "w", encoding="utf-8", newline="\n") as f:
            f.write(CURVE_HEADER + "\n")
            for i, (time_s, (valence, arousal), seen) in enumerate(rows, start=1):
                f.write(f"{i},{time_s:.6f},{valence:.6f},{arousal:.6f},{int(seen)}\n")
        os.replace(aside, path)
    except OSError as e:
        raise VacliError(f"cannot write {path}: {e.strerror}; free some space, or use another --out") from e
    finally:
        with contextlib.suppress(OSError):
            aside.unlink()
