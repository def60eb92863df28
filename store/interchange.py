"""Tracks to and from the files other tools read; so far the CSV of a predicted curve."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import numpy as np

from .. import VacliError
from .track import Track

CURVE_HEADER = "frame,time_s,valence,arousal,face"
SPREAD_HEADER = ",valence_std,arousal_std"  # after it, where several runs were averaged


def write_curve_csv(path: Path, curve: Track, face: np.ndarray, spread: np.ndarray | None = None) -> None:
    """One line per decoded frame, numbered from 1: CURVE_HEADER. face (T,) bool: 0 where the row is filled in.

    spread: (T, 2), how far the runs of an ensemble lie apart in valence and arousal; two more columns where given.

    The file is whole or as it was before: written aside, then renamed. Raises VacliError if it cannot be written.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    beside = [()] * len(curve) if spread is None else spread
    rows = zip(curve.times_s, curve.values, face, beside, strict=True)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(aside, "w", encoding="utf-8", newline="\n") as f:
            f.write(CURVE_HEADER + ("" if spread is None else SPREAD_HEADER) + "\n")
            for i, (time_s, (valence, arousal), seen, apart) in enumerate(rows, start=1):
                more = "".join(f",{value:.6f}" for value in apart)
                f.write(f"{i},{time_s:.6f},{valence:.6f},{arousal:.6f},{int(seen)}{more}\n")
        os.replace(aside, path)
    except OSError as e:
        raise VacliError(f"cannot write {path}: {e.strerror}; free some space, or use another --out") from e
    finally:
        with contextlib.suppress(OSError):
            aside.unlink()
