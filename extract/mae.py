"""MAE: a masked autoencoder's ViT (any timm ViT by name) as a frame encoder; its CLS token after the final norm."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..store import Fingerprints
from .device import choose_device, choose_dtype
from .pixels import RESIZE, normalise, resize
from .weights import EncoderError, described, fit, folders, from_hub, local, read

if TYPE_CHECKING:  # 2 s and 4 s to import: only where a model is built, never for a recipe that needs none
    import torch
    from torch import nn

DEFAULT_MODEL = "vit_large_patch16_224.mae"
LICENCES = {
    "cc-by-nc-4.0": "weights under CC-BY-NC 4.0: not for commercial use",
}
_SAID = ("licence", "size", "mean", "std")  # by tuned weights of themselves
# What the official MAE releases and fine-tuned checkpoints carry beside the encoder.
_NOT_ENCODER = ("decoder_", "mask_token", "head.", "fc_norm.", "head_drop.")
_OFFICIAL_FILES = {"vit_base": "mae_pretrain_vit_base.pth", "vit_large": "mae_pretrain_vit_large.pth"}


@dataclass(frozen=True)
class Published:
    """What is said of a model's published weights."""

    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    license: str | None
    hf_hub_id: str | None


_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
# The official MAE weights as timm has them; they will not change, and a test compares.
_KNOWN = {
    name: Published((3, 224, 224), *_IMAGENET, "cc-by-nc-4.0", f"timm/{name}")
    for name in ("vit_base_patch16_224.mae", DEFAULT_MODEL, "vit_huge_patch14_224.mae")
}


class Mae:
    """Aligned faces in, CLS embeddings out: crops (B, size, size, 3) uint8 RGB -> (B, dim) float32.

    model: any timm ViT with a CLS token. weights: a .safetensors file, or a .pth read with weights_only=True:
    timm's layout, the official MAE checkpoints ({"model": ...}), or what `vacli finetune` wrote (which names its
    own model and size). Without it the weights are looked for in ./weights and $VACLI_WEIGHTS, then in the
    Hugging Face cache, then on the hub. dtype: float32 or bfloat16 for the computation; by default bfloat16 on a
    GPU, and on a CPU that has it for models wide enough to gain. device: by default a GPU where there is one.

    Raises EncoderError when the weights are absent or unreadable; the first call does when they do not fit the model.
    """

    name, eats = "mae", "crops"

    def __init__(
        self,
        model: str | None = None,
        weights: str | None = None,
        dtype: str | None = None,
        device: str | None = None,
        fingerprints: Fingerprints | None = None,
    ) -> None:
        self.weights = Path(weights).absolute() if weights else _find_weights(model or DEFAULT_MODEL)
        about = described(self.weights)
        self.model_name = model or about.get("model", DEFAULT_MODEL)
        if self.model_name != about.get("model") or not about.keys() >= set(_SAID):
            config = pretrained_config(self.model_name)
            published = (config.license, config.input_size[-1], config.mean, config.std)
            about = dict(zip(_SAID, published, strict=True)) | about
        self.note = about.get("note")
        self.licence_id = about["licence"]  # None: the weights are the user's own
        self.licence = LICENCES.get(str(self.licence_id))
        self.size = int(about["size"])
        self.mean, self.std = tuple(about["mean"]), tuple(about["std"])
        self._asked_device = device
        if device is not None:
            choose_device(device)
        wide = any(size in self.model_name for size in ("base", "large", "huge", "giant"))
        self.dtype = choose_dtype(dtype, device, wide)
        self._fingerprints = fingerprints or Fingerprints()

    @cached_property
    def device(self) -> torch.device:
        return choose_device(self._asked_device)

    @cached_property
    def weights_sha256(self) -> str:
        return self._fingerprints.file(self.weights)

    def options(self) -> dict[str, Any]:
        """What makes this encoder again: the arguments of `Mae(...)`."""
        return {"model": self.model_name, "weights": str(self.weights), "dtype": self.dtype}

    def recipe(self) -> dict[str, Any]:
        """All that decides the values, but for the faces they are computed from."""
        return {
            "track": self.name,
            "version": 1,
            "model": self.model_name,
            "weights_sha256": self.weights_sha256,
            "output": "cls after final norm",
            "size": self.size,
            "resize": RESIZE,
            "mean": list(self.mean),
            "std": list(self.std),
            "compute_dtype": self.dtype,
            "dtype": "float16",
        }

    @cached_property
    def _vit(self) -> Any:
        """Built at the first crop: planning a run that has nothing to do loads no model."""
        vit = build_vit(self.model_name, self.size)
        load_encoder(vit, self.weights)
        return vit.eval().requires_grad_(False).to(self.device)

    @property
    def dim(self) -> int:
        return int(self._vit.num_features)

    def __call__(self, crops: np.ndarray) -> np.ndarray:
        import torch

        casting = torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == "bfloat16")
        with torch.inference_mode(), casting:
            images = resize(torch.from_numpy(crops).to(self.device), self.size)
            tokens = self._vit.forward_features(normalise(images, self.mean, self.std))
        return tokens[:, 0].float().cpu().numpy()


def pretrained_config(model: str) -> Any:
    """What timm says of a model's published weights, as `Published` has it. Raises EncoderError if unknown."""
    if model in _KNOWN:
        return _KNOWN[model]
    import timm

    with contextlib.suppress(RuntimeError):  # a known model with an unknown tag
        if config := timm.get_pretrained_cfg(model):
            return config
    raise EncoderError(
        f"timm knows no model {model!r}; `timm.list_models('vit_*', pretrained=True)` lists them"
    )


def build_vit(model: str, size: int) -> Any:
    """A timm ViT without its head. Raises EncoderError if it has no CLS token."""
    import timm

    try:
        vit = timm.create_model(model, pretrained=False, num_classes=0, img_size=size)
    except (TypeError, RuntimeError, AssertionError) as e:  # a model that takes no img_size, or not this one
        raise EncoderError(
            f"{model} cannot be built for {size} pixels: {' '.join(str(e).split())[:120]}; "
            f"wanted a ViT such as {DEFAULT_MODEL}"
        ) from e
    if getattr(vit, "cls_token", None) is None or getattr(vit, "global_pool", "") != "token":
        raise EncoderError(
            f"{model} has no CLS token read by its final norm; wanted a ViT such as {DEFAULT_MODEL}"
        )
    return vit


def load_encoder(vit: nn.Module, weights: Path) -> None:
    """Fill the ViT from a checkpoint, whole. Raises EncoderError naming missing, unexpected and misshapen keys."""
    state = {k: v for k, v in read(weights).items() if not k.startswith(_NOT_ENCODER)}
    fit(vit, state, weights, "name the model they were made for with -o mae.model=NAME")


def _find_weights(model: str) -> Path:
    """Local folders, then the Hugging Face cache, then the hub; an error at once where none has it."""
    official = [f for stem, f in _OFFICIAL_FILES.items() if model.startswith(stem) and model.endswith(".mae")]
    names = [f"{model}.safetensors", f"{model}.pth", *official]
    if found := local(names):
        return found
    hub_id = pretrained_config(model).hf_hub_id
    if hub_id and (found := from_hub(str(hub_id))):
        return found
    source = f"https://huggingface.co/{hub_id} (model.safetensors)" if hub_id else "its makers"
    raise EncoderError(
        f"no weights for {model} and no network: get them from {source} and put them at {folders()[0] / names[0]}, "
        "or give any file with -o mae.weights=FILE"
    )
