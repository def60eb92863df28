"""The canary: a small fixed input that an encoder embeds before anything else, so that no store mixes what differs."""

from __future__ import annotations

import hashlib
import platform
from importlib.metadata import version
from typing import Any

import numpy as np

from .. import VacliError, __version__
from ..store import Damaged, Store, Track

FRAMES_S = np.arange(1, 7) / 4  # for an encoder that asks for the times of the frames
AGREE = 0.9999  # cosine; threads and batch sizes stay above it, another computation does not


class CanaryError(VacliError):
    """An encoder gives other values here than those that the store has of the same recipe."""

    fatal = True


def check(store: Store, recipe: dict[str, Any], encoder: Any) -> tuple[int, ...]:
    """Let the encoder embed the canary and compare with the one kept under its recipe (kept now, if there is none).

    Returns the shape of a row. Raises CanaryError where a row has a cosine below AGREE.
    """
    eaten = sound(encoder.rate_hz) if encoder.eats == "sound" else crops()
    media = hashlib.sha256(f"canary 1 {eaten.shape}".encode() + eaten.tobytes()).hexdigest()
    if encoder.eats == "sound":
        clock = (FRAMES_S,) if getattr(encoder, "clock", "") == "frames" else ()
        now = encoder(iter([eaten]), *clock)
    else:
        rows = np.asarray(encoder(eaten))
        with np.errstate(over="ignore"):  # the Track refuses the infinity
            now = Track(rows.astype(np.float16), np.arange(len(rows), dtype=np.float64))
    versions = [f"{name} {version(name)}" for name in ("numpy", "torch", "timm")]
    here = ", ".join(
        [f"vacli {__version__}", *versions, platform.machine(), str(getattr(encoder, "device", "cpu"))]
    )
    try:
        then = store.get(recipe, media)
    except (KeyError, Damaged):
        store.put(recipe, media, now, {"canary": here})
        then = store.get(recipe, media)  # another process may have been first
    if (cosine := _least_cosine(now, then)) < AGREE:
        raise CanaryError(
            f"{recipe['track']} gives other values than those in the store: cosine {cosine:.5f} on the canary, wanted "
            f"{AGREE}; it was made with {store.provenance(recipe, media).get('canary')}; this is {here}; use another "
            "--store, or the versions it was made with"
        )
    return now.values.shape[1:]


def crops() -> np.ndarray:
    """(4, 112, 112, 3) uint8: soft waves, made of whole numbers alone, so the same bytes everywhere and for ever."""
    k, y, x, c = np.ogrid[:4, :112, :112, :3]
    waves = _triangle(x * (k + 1)) + _triangle(y * (c + 2)) + _triangle(x + y * k + 40 * c)
    return (waves * 255 // 192).astype(np.uint8)


def sound(rate_hz: int) -> np.ndarray:
    """(2 s,) float32 in [-0.5, 0.5]: a triangle wave that rises to half the band, made of whole numbers alone."""
    n = np.arange(2 * rate_hz, dtype=np.int64)
    return (_triangle(n * n * 8 // rate_hz) - 32).astype(np.float32) / 64


def _triangle(n: np.ndarray) -> np.ndarray:
    return 64 - np.abs(n % 128 - 64)  # up from 0 to 64 and down again


def _least_cosine(a: Track, b: Track) -> float:
    """Of the rows seen in both; 0 where they are not the same rows."""
    if a.values.shape != b.values.shape or not np.array_equal(a.valid, b.valid):
        return 0.0
    x, y = (t.values[t.valid].reshape(int(t.valid.sum()), -1).astype(np.float64) for t in (a, b))
    lengths = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    cosines = (x * y).sum(axis=1) / np.where(lengths > 0, lengths, 1)
    return float(np.where((x == y).all(axis=1), 1.0, cosines).min(initial=1.0))  # rows of zeros are alike
