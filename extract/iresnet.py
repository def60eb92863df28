"""IResNet: ResNet-50-IR face networks, InsightFace's and the one of the USTC line, as frame encoders."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..store import Fingerprints
from .encoder import Card
from .frame_encoder import FrameEncoder
from .pixels import RESIZE
from .weights import EncoderError, absent, described, fit, licence_note, local, read

if TYPE_CHECKING:  # 2 s to import: only where the network is built
    import torch
    from torch import nn


class _Variant(NamedTuple):
    """One of the published networks. resized: pixels of the crop before the middle `size` of it is taken."""

    size: int
    resized: int
    files: tuple[str, ...]  # names by which the weights go
    source: str
    licence: str  # by the hub's name, or in words


_VARIANTS = {
    "arcface": _Variant(
        112,
        112,
        ("iresnet50.pth", "iresnet50.safetensors", "backbone.pth"),
        "InsightFace's model zoo (arcface_torch, a folder such as ms1mv3_arcface_r50: backbone.pth)",
        "weights of InsightFace: for non-commercial research only",
    ),
    "ustc": _Variant(
        40,
        48,
        ("res50_ir_0.887.pth", "res50_ir_0.887.safetensors"),
        "the makers of ABAW3 (github.com/sucv/ABAW3: res50_ir_0.887.pth)",
        "weights made from MS-Celeb-1M and FER+, without a licence of their own: ask their makers before you use them",
    ),
}


class IResNet(FrameEncoder):
    """Aligned faces in, face embeddings out: crops (B, H, W, 3) uint8 RGB -> (B, 512) float32.

    variant arcface: iresnet50 of InsightFace's arcface_torch (Deng et al. 2019), 112x112 RGB, (x - 127.5) / 127.5;
    the embedding as it leaves the last batch norm, not scaled to length 1. Checked against values of that code.

    variant ustc: the visual backbone of the USTC line (ABAW3 and the ABAW8 winner): IR-50 trained on MS-Celeb-1M, then
    on FER+. The crop is resized to 48x48, its middle 40x40 taken, (x / 255 - 0.5) / 0.5, RGB; the embedding has length
    1. Known, from the published code that loads res50_ir_0.887.pth: the structure, every name (`backbone.` before each,
    and `logits.`, the eight expressions, which are left out) and the centre crop at extraction. Not known, as their
    preprocessing was not published with it: with which alignment and which interpolation their 48x48 faces were made;
    no values of theirs were at hand to compare with.

    weights: a .safetensors file, or a .pth read with weights_only=True. Without it they are looked for in ./weights and
    $VACLI_WEIGHTS. dtype: float32 or bfloat16; by default bfloat16 on a GPU, and on a CPU that has it.

    Raises EncoderError when the weights are absent or unreadable; the first call does when they do not fit.
    """

    name, dim = "iresnet", 512
    card = Card(
        "512",
        "weights/backbone.pth or iresnet50.pth of arcface_torch; variant ustc: weights/res50_ir_0.887.pth",
        "InsightFace's: non-commercial research only; ustc: none stated",
        _VARIANTS["arcface"].files,
        f"put those of {_VARIANTS['arcface'].source} into weights/; variant ustc: of {_VARIANTS['ustc'].source}",
    )
    mean = std = (0.5, 0.5, 0.5)

    def __init__(
        self,
        variant: str = "arcface",
        weights: str | None = None,
        dtype: str | None = None,
        device: str | None = None,
        fingerprints: Fingerprints | None = None,
    ) -> None:
        if variant not in _VARIANTS:
            raise EncoderError(f"iresnet.variant is {variant!r}; wanted {' or '.join(_VARIANTS)}")
        self.variant, self._published = variant, _VARIANTS[variant]
        self.size = self._published.resized
        found = Path(weights).absolute() if weights else self._find()
        about = described(found)
        self.note = about.get("note")
        self.licence = licence_note(about["licence"]) if "licence" in about else self._published.licence
        super().__init__(found, dtype, device, fingerprints, wide=True)

    @staticmethod
    def found() -> Path | None:
        """InsightFace's weights, where they are on this machine."""
        return local(_VARIANTS["arcface"].files)

    def _find(self) -> Path:
        if found := local(self._published.files):
            return found
        published = self._published
        raise absent(f"iresnet ({self.variant})", published.source, published.files[0], "iresnet.weights")

    def options(self) -> dict[str, Any]:
        """What makes this encoder again: the arguments of `IResNet(...)`."""
        return {"variant": self.variant, "weights": str(self.weights), "dtype": self.dtype}

    def recipe(self) -> dict[str, Any]:
        """All that decides the values, but for the faces they are computed from."""
        return {
            "track": self.name,
            "version": 1,
            "variant": self.variant,
            "weights_sha256": self.weights_sha256,
            "size": self._published.resized,
            "centre_crop": self._published.size,
            "resize": RESIZE,
            "mean": list(self.mean),
            "std": list(self.std),
            "compute_dtype": self.dtype,
            "dtype": "float16",
        }

    def _built(self) -> nn.Module:
        from .ir50 import ArcFaceIR50, UstcIR50

        network: nn.Module = ArcFaceIR50() if self.variant == "arcface" else UstcIR50()
        state = read(self.weights)
        state = _without_classifier(state) if self.variant == "ustc" else state
        other = next(v for v in _VARIANTS if v != self.variant)
        mend = f"wanted those of {self._published.source}, or another network: -o iresnet.variant={other}"
        fit(network, state, self.weights, mend)
        return network

    def __call__(self, crops: np.ndarray) -> np.ndarray:
        edge = (self._published.resized - self._published.size) // 2
        with self._computing():
            images = self._images(crops)
            middle = images[..., edge : edge + self._published.size, edge : edge + self._published.size]
            embedded = self._network(middle)
        return embedded.float().cpu().numpy()


def _without_classifier(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The names of the backbone alone, also of a file of the backbone alone."""
    return {k.removeprefix("backbone."): v for k, v in state.items() if not k.startswith("logits.")}
