"""LogMelVgg: VGGish's network as a trainable branch over the stored log-mel, and the gather of its 0.96 s patches.

It lives in stage two because it is trained there, with the rest of the network, as the second audio branch of the USTC
system ("Interactive multimodal fusion with temporal modeling", ABAW8). It reads the log-mel rows that stage one stored
once: a patch for every frame would take 96 / 3.3 times their space, and is one gather from the rows.

Its dozen lines of layers stand in extract/vggish.py too. The stages never import each other, and what they share, the
store, needs no torch; of the ways left (torch in the store, layers built from a table in the store, a package for one
network) two copies held equal by a test (tests/test_vgg_block.py) are the least to read and cannot drift unseen.

Shape legend: B windows, T rows of time, N log-mel rows of all clips, M any number of patches.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .. import VacliError
from ..store import Track

PATCH_ROWS, BANDS, DIM = 96, 64, 128
HOP_S, ROW_S = 0.010, 0.025  # from a log-mel row to the next, and what one sees
SILENCE = math.log(0.01)
WINDOWS = ("centred", "look-ahead", "causal")
_SEEN_S = (PATCH_ROWS - 1) * HOP_S + ROW_S
_PARALLEL = 2**15  # values: at::internal::GRAIN_SIZE
_PIECE = 128  # patches: 0.8 GB of activations


class LogMelVgg(nn.Module):
    """Log-mel patches (B, T, 96, 64) -> (B, T, 128): VGGish's network before PCA and without its last ReLU.

    72 million parameters, in torchvggish's names; `start_from` takes its weights. width: share of the published
    channels and units, for what a CPU can train. The convolutions of a few patches at a time are computed again in
    the backward pass, so memory does not grow with B * T but for the results.
    """

    dim = DIM

    def __init__(self, width: float = 1.0) -> None:
        super().__init__()
        features: list[nn.Module] = []
        before, hidden = 1, max(1, round(4096 * width))
        for published in (64, 0, 128, 0, 256, 256, 0, 512, 512, 0):  # 0 halves both sides
            if published:
                channels = max(1, round(published * width))
                features += [nn.Conv2d(before, channels, 3, padding=1), nn.ReLU(inplace=True)]
                before = channels
            else:
                features.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*features)
        self.embeddings = nn.Sequential(
            nn.Linear(before * PATCH_ROWS * BANDS // 4**4, hidden),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, hidden),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, DIM),
        )
        for layer in (*self.features, *self.embeddings):
            if isinstance(layer, nn.Conv2d | nn.Linear):  # torch's own would fade by 6 with every layer
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.constant_(layer.get_parameter("bias"), 0)

    def forward(self, patches: Tensor, mask: Tensor | None = None) -> Tensor:
        """patches (B, T, 96, 64), mask (B, T), True where something is heard -> (B, T, 128), zeros elsewhere.

        A masked patch changes nothing, whatever it holds, and is not computed.
        """
        if mask is None:
            return self._embed(patches.flatten(0, 1)).unflatten(0, patches.shape[:2])
        values = self._embed(patches[mask])
        return values.new_zeros(*mask.shape, DIM).index_put((mask,), values)

    def _embed(self, patches: Tensor) -> Tensor:
        """(M, 96, 64) -> (M, 128)."""
        flat = [self._flat(piece) for piece in patches.split(_PIECE)]
        return self.embeddings(torch.cat(flat))

    def _flat(self, piece: Tensor) -> Tensor:
        if len(piece) < _PIECE or not torch.is_grad_enabled():
            return self._features(piece)
        # autocast's state is kept; there is no randomness to keep
        return checkpoint(self._features, piece, use_reentrant=False, preserve_rng_state=False)

    def _features(self, patches: Tensor) -> Tensor:
        """(M, 96, 64) -> (M, 24 C), channels last, as in TensorFlow, where the weights come from."""
        return self.features(patches[:, None]).permute(0, 2, 3, 1).flatten(1)

    def start_from(self, weights: Path) -> None:
        """Take VGGish's weights: torchvggish's file or a .safetensors of the same names; PCA's are left out.

        Raises VacliError for what is unreadable or does not fit.
        """
        found = read_weights(weights)
        if not isinstance(found, dict):
            raise VacliError(
                f"weights {weights} hold no state dict of tensors; wanted torchvggish's file; get it again"
            )
        state = {k: v for k, v in found.items() if isinstance(v, Tensor) and not str(k).startswith("pproc.")}
        own = self.state_dict()
        odd = sorted(own.keys() ^ state.keys()) or sorted(k for k in own if own[k].shape != state[k].shape)
        if odd:
            raise VacliError(
                f"weights {weights} do not fit VGGish: missing, unexpected or misshapen {', '.join(odd[:3])}; "
                "wanted those of torchvggish (vggish-10086976.pth)"
            )
        self.load_state_dict(state)


class LogMelRows:
    """The stored log-mel of clips, resident on a device as float16: (N, 64), from which patches are gathered.

    Around every clip lie 96 rows of silence, so no patch sees another clip. tracks: of the encoder `logmel`, None for
    a clip without; rows of NaN in them are silence that was not heard. Raises VacliError for tracks of another kind.
    """

    def __init__(self, tracks: Sequence[Track | None], device: torch.device | str = "cpu") -> None:
        for track in tracks:
            _check(track)
        self.lengths = [0 if track is None else len(track) for track in tracks]
        places = np.cumsum([PATCH_ROWS, *(n + PATCH_ROWS for n in self.lengths)])
        self.offsets = places[:-1]
        self.rows = torch.full((int(places[-1]), BANDS), SILENCE, dtype=torch.float16, device=device)
        heard = torch.zeros(len(self.rows), dtype=torch.bool)
        for track, offset in zip(tracks, self.offsets.tolist(), strict=True):
            if track is not None:
                here, valid = slice(offset, offset + len(track)), track.valid
                heard[here] = torch.from_numpy(valid)
                clean = np.where(valid[:, None], track.values, SILENCE).astype(np.float16, copy=False)
                self.rows[here] = torch.from_numpy(clean).to(device)
        count = torch.cat([torch.zeros(1, dtype=torch.long), heard.cumsum(0)])
        self.hears = (count[PATCH_ROWS:] > count[:-PATCH_ROWS]).to(
            device
        )  # (N - 95,): by a patch's first row

    def starts(self, clip: int, times_s: np.ndarray, window: str = "centred") -> Tensor:
        """(T,) int64 on the device: the row that the patch for each time begins with; for `patches`.

        window: where a patch lies relative to its time, as in the encoder `vggish`: "centred", "look-ahead" (it
        begins there) or "causal" (nothing later is heard).
        """
        if window not in WINDOWS:
            raise ValueError(f"wanted a window of {', '.join(WINDOWS)}, got {window!r}")
        times_s = np.asarray(times_s, np.float64)
        if window == "causal":
            first = np.floor((times_s - _SEEN_S) / HOP_S + 1e-6)
        else:
            first = np.rint((times_s - (_SEEN_S / 2 if window == "centred" else 0.0)) / HOP_S)
        first = first.clip(-PATCH_ROWS, self.lengths[clip]).astype(np.int64)
        return torch.from_numpy(first + self.offsets[clip]).to(self.rows.device)

    def patches(self, starts: Tensor) -> tuple[Tensor, Tensor]:
        """starts (...) -> patches (..., 96, 64) float32, and (...) bool, which of them hear anything."""
        return gather(self.rows, starts).float(), self.hears[starts]


def gather(rows: Tensor, starts: Tensor, length: int = PATCH_ROWS) -> Tensor:
    """rows (N, ...), starts (...) -> (..., length, ...): one index_select of stretches that lie within the windows."""
    rows = rows.contiguous()
    width = rows[0].numel()
    # as many rows as divide a window and stay below what torch copies by several threads at a time: it then hands
    # whole stretches to its threads, faster on a CPU; single rows are slower again than whole windows
    fitting = [n for n in range(8, length + 1) if length % n == 0 and n * width < _PARALLEL]
    stretch = max(fitting, default=length)
    view = rows.as_strided((len(rows) - stretch + 1, stretch * width), (width, 1))  # no copy
    inside = torch.arange(0, length, stretch, device=starts.device)
    found = view.index_select(0, (starts.reshape(-1, 1) + inside).flatten())
    return found.view(*starts.shape, length, *rows.shape[1:])


def gather_plain(rows: Tensor, starts: Tensor, length: int = PATCH_ROWS) -> Tensor:
    """The plain twin of `gather`: one window after the other."""
    windows = [rows[start : start + length] for start in starts.flatten().tolist()]
    return torch.stack(windows).unflatten(0, starts.shape)


def _check(track: Track | None) -> None:
    """Raises VacliError for a Track that is not of the encoder `logmel`."""
    if track is None or not len(track):
        return
    if track.values.shape[1:] != (BANDS,):
        raise VacliError(
            f"log-mel has rows of {BANDS}, got {track.values.shape[1:]}, of another encoder; "
            "wanted those of `vacli extract --encoder logmel`"
        )
    wanted = np.arange(len(track)) * HOP_S + ROW_S / 2
    if np.abs(track.times_s - wanted).max() > 1e-3:
        raise VacliError(
            "log-mel has a row every 10 ms from 12.5 ms on, these are of another encoder; "
            "wanted those of `vacli extract --encoder logmel`"
        )


def read_weights(weights: Path) -> Any:
    """What a .safetensors or a torch file holds; no code in it runs. Raises VacliError where it cannot be read."""
    from safetensors.torch import load_file

    try:
        if weights.suffix == ".safetensors":
            return load_file(weights)
        return torch.load(weights, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as e:  # torch's text advises to run what is in there
        raise VacliError(
            f"refused weights {weights}: damaged, or holding more than tensors, which could run code; "
            "wanted .safetensors, or a .pth of tensors alone; get them again from their makers"
        ) from e
    except Exception as e:  # safetensors and torch raise a dozen kinds for a broken file
        raise VacliError(
            f"cannot read weights {weights} ({type(e).__name__}: {' '.join(str(e).split())[:120]}); "
            "wanted a whole .safetensors or .pth file; copy it again"
        ) from e
