"""VGGish: AudioSet's VGG over 0.96 s of log-mel, 128-d before PCA, as a sound encoder; a row for each video frame."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..store import Fingerprints, Track
from .device import choose_device, choose_dtype
from .encoder import Card
from .logmel import BANDS, HOP_S, LOG_OFFSET, WINDOW_S, LogMel, joined, log_mel_blocks
from .weights import EncoderError, absent, described, fit, local, read

if TYPE_CHECKING:  # 2 s to import: only where a network is built, never for a recipe that needs none
    import torch
    from torch import nn

PATCH_ROWS = 96
SEEN_S = (PATCH_ROWS - 1) * HOP_S + WINDOW_S  # 0.975 s: 96 rows of 25 ms, one every 10 ms
DIM = 128
WINDOWS = ("centred", "look-ahead", "causal")
_CHANNELS = (64, 0, 128, 0, 256, 256, 0, 512, 512, 0)  # of the convolutions; 0 halves both sides
_WIDTH = 4096  # of the two layers behind them
_FILES = ("vggish-10086976.pth", "vggish.safetensors", "vggish.pth")  # the first is torchvggish's own name
_SOURCE = "https://github.com/harritaylor/torchvggish/releases/download/v0.1/vggish-10086976.pth"
_BATCH = 128  # patches; 0.2 GB of activations in float32


class VGGish:
    """Sound in, (T, 128) out: the embedding of the 96 log-mel rows (0.96 s) that lie around each row's time.

    window: "centred" (what is seen has its middle at the row's time), "look-ahead" (it starts there, as published
    systems have it) or "causal" (it ends there: nothing later is heard). It lies on the 10 ms grid of the log-mel, so
    at most 5 ms from the wished place; a causal one at most 10 ms earlier. Whatever the window, `times_s` of the
    Track is the moment a row stands for: of the frame, not the middle of what a look-ahead or causal window saw.
    hop_s: without it one row for each video frame, at the frame's time; with it a row every hop_s seconds from 0 to
    the end of the sound. relu: "yes" for the embedding after the network's last ReLU, as torchvggish gives it.

    Where a window reaches beyond the sound it sees silence, log(0.01); a row that would hear nothing at all is NaN.

    weights: torchvggish's file, or its tensors as .safetensors; by default looked for in ./weights and
    $VACLI_WEIGHTS. dtype, device: as of `Mae`.

    Network: Hershey et al. 2017, "CNN architectures for large-scale audio classification", in torchvggish's names.
    Raises EncoderError for a wrong option and absent or unreadable weights; the first call does if they do not fit.
    """

    name, eats, rate_hz, dim = "vggish", "sound", 16000, DIM
    card = Card(
        str(DIM),
        f"{_FILES[0]} of torchvggish, put into ./weights",
        "Apache-2.0",
        _FILES,
        f"put {_SOURCE} into weights/",
    )

    def __init__(
        self,
        weights: str | None = None,
        window: str = "centred",
        hop_s: str | float | None = None,
        relu: str = "no",
        dtype: str | None = None,
        device: str | None = None,
        fingerprints: Fingerprints | None = None,
    ) -> None:
        if window not in WINDOWS:
            raise EncoderError(f"vggish.window is {window!r}; wanted one of {', '.join(WINDOWS)}")
        if relu not in ("no", "yes"):
            raise EncoderError(f"vggish.relu is {relu!r}; wanted no or yes")
        self.window, self.relu = window, relu
        self.hop_s = None if hop_s is None else _seconds(hop_s)
        self.clock = "frames" if self.hop_s is None else "own"
        self.weights = Path(weights).absolute() if weights else _find_weights()
        described(self.weights)  # is there, and readable
        self._asked_device = device
        if device is not None:
            choose_device(device, "vggish")
        self.dtype = choose_dtype(dtype, device, True, "vggish")
        self._fingerprints = fingerprints or Fingerprints()

    @staticmethod
    def found() -> Path | None:
        """The weights, where they are on this machine."""
        return local(_FILES)

    @cached_property
    def device(self) -> torch.device:
        return choose_device(self._asked_device, "vggish")

    def options(self) -> dict[str, Any]:
        """What makes this encoder again: the arguments of `VGGish(...)`."""
        own = {"window": self.window, "hop_s": self.hop_s, "relu": self.relu, "dtype": self.dtype}
        return {"weights": str(self.weights), **own}

    def recipe(self) -> dict[str, Any]:
        """All that decides the values, but for the times of the frames."""
        front_end = LogMel().recipe()
        return {
            "track": self.name,
            "version": 1,
            "front_end": {k: v for k, v in front_end.items() if k not in ("track", "dtype")},
            "patch_rows": PATCH_ROWS,
            "window": self.window,
            "row_time": "the moment it stands for",
            "hop_s": self.hop_s,  # null: a row for each frame
            "beyond_the_sound": "silence; nan where nothing is heard",
            "output": "before pca, " + ("after" if self.relu == "yes" else "before") + " the last relu",
            "weights_sha256": self._fingerprints.file(self.weights),
            "compute_dtype": self.dtype,
            "dtype": "float16",
        }

    @cached_property
    def _network(self) -> nn.ModuleDict:
        """Built at the first sound: planning a run that has nothing to do loads none."""
        import torch

        network = build_vggish(last_relu=self.relu == "yes")
        load_vggish(network, self.weights)
        network = network.eval().requires_grad_(False).to(self.device, getattr(torch, self.dtype))
        return network.to(memory_format=torch.channels_last)  # 1.4 times as fast on a CPU

    def __call__(self, blocks: Iterable[np.ndarray], times_s: np.ndarray | None = None) -> Track:
        """blocks: float32 mono samples at rate_hz in pieces of any length, the first sample at t = 0.

        times_s: (T,) seconds of the video's frames, where there is no hop_s. Without sound the Track is empty.
        """
        return joined(self.pieces(blocks, times_s), DIM)

    def pieces(self, blocks: Iterable[np.ndarray], times_s: np.ndarray | None = None) -> Iterator[Track]:
        """The Track of a call in pieces of about a minute, as the sound comes; none without sound."""
        if (times_s is None) != (self.clock == "own"):
            raise ValueError("wanted times_s, one for each row, if and only if there is no hop_s")
        silence = np.full((PATCH_ROWS, BANDS), math.log(LOG_OFFSET), np.float32)
        held, rows, done = silence, 0, 0  # held: the log-mel rows up to row `rows`
        for block in log_mel_blocks(blocks, self.rate_hz):
            if len(block):
                held, rows = np.concatenate([held[1 - PATCH_ROWS :], block]), rows + len(block)
                now_s = self._times(rows, times_s)
                starts = patch_starts(now_s, self.window)
                ready = max(done, int(np.searchsorted(starts, rows - PATCH_ROWS, side="right")))
                if ready > done:
                    here = slice(done, ready)
                    yield Track(self.embed(held, rows - len(held), starts[here], rows), now_s[here])
                done = ready
        rest_s = self._times(rows, times_s)[done:]
        if rows and len(rest_s):
            held = np.concatenate([held[1 - PATCH_ROWS :], silence])
            starts = patch_starts(rest_s, self.window)
            yield Track(self.embed(held, rows + PATCH_ROWS - len(held), starts, rows), rest_s)

    def _times(self, rows: int, times_s: np.ndarray | None) -> np.ndarray:
        """The frames' times, or those of its own clock inside what `rows` rows of log-mel see."""
        if times_s is not None:
            return np.asarray(times_s, np.float64)
        assert self.hop_s is not None
        end_s = (rows - 1) * HOP_S + WINDOW_S if rows else 0.0
        return np.arange(math.ceil(end_s / self.hop_s)) * self.hop_s

    def embed(self, held: np.ndarray, first: int, starts: np.ndarray, rows: int) -> np.ndarray:
        """The patches that begin at log-mel rows `starts` (n,), of `held` whose first row is row `first`: (n, 128).

        Equal patches are computed once; one without any of the rows 0 to `rows` is NaN.
        """
        import torch

        values = np.full((len(starts), DIM), np.nan, np.float16)
        hears = (starts > -PATCH_ROWS) & (starts < rows)
        different, which = np.unique(starts[hears], return_inverse=True)
        if not len(different):
            return values
        views = torch.from_numpy(held).to(self.device).unfold(0, PATCH_ROWS, 1)  # (n, 64, 96)
        index = torch.from_numpy(different - first).to(self.device)
        with torch.inference_mode():
            batches = [embed(self._network, views[i].transpose(1, 2)) for i in index.split(_BATCH)]
        values[hears] = torch.cat(batches).cpu().numpy().astype(np.float16)[which]
        return values


def patch_starts(times_s: np.ndarray, window: str) -> np.ndarray:
    """(T,) seconds -> (T,) int64, the log-mel row that the patch for each begins with; below 0 before the sound."""
    if window == "causal":  # rounded down, so that nothing later is heard
        return np.floor((times_s - SEEN_S) / HOP_S + 1e-6).astype(np.int64)
    lead_s = SEEN_S / 2 if window == "centred" else 0.0
    return np.rint((times_s - lead_s) / HOP_S).astype(np.int64)


def build_vggish(last_relu: bool) -> nn.ModuleDict:
    """The network with torchvggish's parameter names, for `embed`."""
    from torch import nn

    features: list[nn.Module] = []
    before = 1
    for channels in _CHANNELS:
        if channels:
            features += [nn.Conv2d(before, channels, 3, padding=1), nn.ReLU(inplace=True)]
            before = channels
        else:
            features.append(nn.MaxPool2d(2))
    wide = before * PATCH_ROWS * BANDS // 4 ** _CHANNELS.count(0)
    embeddings: list[nn.Module] = []
    for inputs, outputs in ((wide, _WIDTH), (_WIDTH, _WIDTH), (_WIDTH, DIM)):
        embeddings += [nn.Linear(inputs, outputs), nn.ReLU(inplace=True)]
    embeddings = embeddings if last_relu else embeddings[:-1]
    return nn.ModuleDict({"features": nn.Sequential(*features), "embeddings": nn.Sequential(*embeddings)})


def embed(network: nn.ModuleDict, patches: torch.Tensor) -> torch.Tensor:
    """Log-mel patches (N, 96, 64) -> embeddings (N, 128) float32."""
    dtype = next(network.parameters()).dtype
    maps = network["features"](patches[:, None].to(dtype))  # (N, 512, 6, 4)
    flat = maps.permute(0, 2, 3, 1).flatten(1)  # channels last, as in TensorFlow, where the weights come from
    return network["embeddings"](flat).float()


def load_vggish(network: nn.ModuleDict, weights: Path) -> None:
    """Fill the network from torchvggish's layout, whole; the PCA that may lie beside it is left out.

    Raises EncoderError naming missing, unexpected and misshapen keys.
    """
    state = {k: v for k, v in read(weights).items() if not k.startswith("pproc.")}
    fit(network, state, weights, f"get {_FILES[0]} from {_SOURCE}")


def _seconds(hop_s: str | float) -> float:
    with contextlib.suppress(ValueError):
        if 0 < (seconds := float(hop_s)) < math.inf:
            return seconds
    raise EncoderError(f"vggish.hop_s is {hop_s!r}; wanted seconds above 0, such as 0.1")


def _find_weights() -> Path:
    if found := VGGish.found():
        return found
    raise absent("vggish", f"{_SOURCE} (Apache-2.0)", _FILES[0], "vggish.weights")
