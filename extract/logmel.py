"""LogMel: the log-mel spectrogram of VGGish's front end, 64 bands at 100 Hz, as a sound encoder."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from ..store import Track
from .encoder import Card

WINDOW_S, HOP_S = 0.025, 0.010
BANDS, LOW_HZ, HIGH_HZ = 64, 125.0, 7500.0
LOG_OFFSET = 0.01  # keeps the log of silence finite
_BLOCK_ROWS = 6000  # one minute at a time: memory does not grow with the recording


def mel_filterbank(rate_hz: int, fft: int) -> np.ndarray:
    """(fft // 2 + 1, BANDS) float32 triangles on the HTK mel scale, 1127 ln(1 + f / 700); the DC bin counts nowhere."""
    to_mel = lambda hz: 1127.0 * np.log1p(np.asarray(hz) / 700.0)  # noqa: E731
    edges = np.linspace(to_mel(LOW_HZ), to_mel(HIGH_HZ), BANDS + 2)
    bins = to_mel(np.arange(fft // 2 + 1) * rate_hz / fft)[:, None]
    rising = (bins - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - bins) / (edges[2:] - edges[1:-1])
    weights = np.maximum(0.0, np.minimum(rising, falling))
    weights[0] = 0.0
    return weights.astype(np.float32)


class LogMel:
    """Sound in, (T, 64) out: row i sees the 25 ms from i * 10 ms on, so its time is i * 0.010 + 0.0125 s.

    Values: log(mel + 0.01) of the magnitude spectrum, periodic Hann window, no padding (Hershey et al. 2017,
    the front end of VGGish).
    """

    name, eats, rate_hz, dim = "logmel", "sound", 16000, BANDS
    card = Card(str(BANDS), "needs none", "needs none")

    def options(self) -> dict[str, Any]:
        """What makes this encoder again: it has no options."""
        return {}

    def recipe(self) -> dict[str, Any]:
        return {
            "track": self.name,
            "version": 1,
            "rate_hz": self.rate_hz,
            "window_s": WINDOW_S,
            "hop_s": HOP_S,
            "bands": BANDS,
            "low_hz": LOW_HZ,
            "high_hz": HIGH_HZ,
            "log_offset": LOG_OFFSET,
            "dtype": "float16",
        }

    def __call__(self, blocks: Iterable[np.ndarray]) -> Track:
        """blocks: float32 mono samples at rate_hz in pieces of any length, the first sample at t = 0."""
        return joined(self.pieces(blocks), BANDS)

    def pieces(self, blocks: Iterable[np.ndarray]) -> Iterator[Track]:
        """The Track of a call in pieces of up to a minute, as the sound comes; none without sound."""
        done = 0
        for block in log_mel_blocks(blocks, self.rate_hz):
            rows = np.arange(done, done + len(block))
            if len(rows):
                yield Track(block.astype(np.float16), rows * HOP_S + WINDOW_S / 2)
            done += len(rows)


def joined(pieces: Iterable[Track], dim: int) -> Track:
    """Pieces of a Track behind each other as one; without any, an empty one with rows of (dim,) float16."""
    parts = [Track(np.zeros((0, dim), np.float16), np.zeros(0)), *pieces]
    return Track(np.concatenate([p.values for p in parts]), np.concatenate([p.times_s for p in parts]))


def log_mel_blocks(blocks: Iterable[np.ndarray], rate_hz: int) -> Iterator[np.ndarray]:
    """Sample blocks of any length -> the rows of `log_mel` of them all, (n, 64) float32, up to a minute at a time.

    The last block of rows may be empty; a recording of hours is never held.
    """
    window, hop = round(WINDOW_S * rate_hz), round(HOP_S * rate_hz)
    seen, step = (_BLOCK_ROWS - 1) * hop + window, _BLOCK_ROWS * hop  # samples
    held, length = [np.zeros(0, np.float32)], 0
    for block in blocks:
        held.append(block)
        length += len(block)
        while length >= seen:  # always as many rows: the last bits of a matrix product depend on it
            samples = np.concatenate(held)
            yield log_mel(samples[:seen], rate_hz)
            held, length = [samples[step:]], length - step
    yield log_mel(np.concatenate(held), rate_hz)


def log_mel(samples: np.ndarray, rate_hz: int) -> np.ndarray:
    """(S,) float32 samples -> (1 + (S - window) // hop, 64) float32 log-mel rows; no row if S < window."""
    import torch

    window, hop = round(WINDOW_S * rate_hz), round(HOP_S * rate_hz)
    if len(samples) < window:
        return np.zeros((0, BANDS), np.float32)
    fft = 1 << (window - 1).bit_length()
    frames = torch.from_numpy(np.ascontiguousarray(samples, np.float32)).unfold(0, window, hop)
    magnitude = torch.fft.rfft(frames * torch.hann_window(window), n=fft).abs()
    return torch.log(magnitude @ torch.from_numpy(mel_filterbank(rate_hz, fft)) + LOG_OFFSET).numpy()
