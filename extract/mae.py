"""MAE: a masked autoencoder's ViT (any timm ViT by name) as a frame encoder; its CLS token after the final norm."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import socket
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import VacliError
from ..store import Fingerprints

if TYPE_CHECKING:  # 2 s and 4 s to import: only where a model is built, never for a recipe that needs none
    import torch
    from torch import nn

DEFAULT_MODEL = "vit_large_patch16_224.mae"
WEIGHTS_DIR = "VACLI_WEIGHTS"  # environment variable: a folder of weights; ./weights is looked in as well
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


class EncoderError(VacliError):
    """An encoder that cannot be made: unreadable weights, weights or a model that do not fit."""

    fatal = True


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
        described = _description(self.weights)
        self.model_name = model or described.get("model", DEFAULT_MODEL)
        if self.model_name != described.get("model") or not described.keys() >= set(_SAID):
            config = pretrained_config(self.model_name)
            published = (config.license, config.input_size[-1], config.mean, config.std)
            described = dict(zip(_SAID, published, strict=True)) | described
        self.note = described.get("note")
        self.licence_id = described["licence"]  # None: the weights are the user's own
        self.licence = LICENCES.get(str(self.licence_id))
        self.size = int(described["size"])
        self.mean, self.std = tuple(described["mean"]), tuple(described["std"])
        self._asked_device = device
        if device is not None:
            _device(device)
        self.dtype = _dtype(dtype, device, self.model_name)
        self._fingerprints = fingerprints or Fingerprints()

    @cached_property
    def device(self) -> torch.device:
        return _device(self._asked_device)

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
            "resize": "torch bicubic antialiased uint8",
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


def resize(crops: torch.Tensor, size: int) -> torch.Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, size, size) uint8; the one resize of all frame encoders.

    Within 1 level of PIL's bicubic.
    """
    import torch

    images = crops.permute(0, 3, 1, 2)
    if images.shape[-2:] == (size, size):
        return images
    pixels = images if images.device.type == "cpu" else images.float()  # torch resizes bytes on the CPU only
    resized = torch.nn.functional.interpolate(pixels, size=(size, size), mode="bicubic", antialias=True)
    return resized if resized.dtype == torch.uint8 else resized.round_().clamp_(0, 255).to(torch.uint8)


def normalise(images: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    """uint8 (B, 3, H, W) -> float32, (x / 255 - mean) / std by channel."""
    import torch

    scale = 1.0 / (255.0 * torch.tensor(std, device=images.device)).view(1, 3, 1, 1)
    shift = (torch.tensor(mean, device=images.device) / torch.tensor(std, device=images.device)).view(
        1, 3, 1, 1
    )
    return images.float() * scale - shift


def load_encoder(vit: nn.Module, weights: Path) -> None:
    """Fill the ViT from a checkpoint, whole. Raises EncoderError naming missing, unexpected and misshapen keys."""
    state = {k: v for k, v in _state(weights).items() if not k.startswith(_NOT_ENCODER)}
    wanted = vit.state_dict()
    misfits = [f"missing {k}" for k in wanted if k not in state]
    misfits += [f"unexpected {k}" for k in state if k not in wanted]
    misfits += [
        f"{k} is {tuple(state[k].shape)}, wanted {tuple(v.shape)}"
        for k, v in wanted.items()
        if k in state and state[k].shape != v.shape
    ]
    if misfits:
        more = f" and {len(misfits) - 3} more" if len(misfits) > 3 else ""
        raise EncoderError(
            f"weights {weights} do not fit the encoder: {'; '.join(sorted(misfits)[:3])}{more}; "
            "name the model they were made for with -o mae.model=NAME"
        )
    vit.load_state_dict(state)


def _state(weights: Path) -> dict[str, torch.Tensor]:
    import torch
    from safetensors.torch import load_file

    try:
        if weights.suffix == ".safetensors":
            return load_file(weights)
        state = torch.load(weights, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as e:  # torch's text advises to run what is in there
        raise EncoderError(
            f"refused weights {weights}: damaged, or holding more than tensors, which could run code; "
            "wanted .safetensors, or a .pth of tensors alone"
        ) from e
    except Exception as e:  # safetensors and torch raise a dozen kinds for a broken file
        raise EncoderError(
            f"cannot read weights {weights} ({type(e).__name__}: {' '.join(str(e).split())[:120]}); "
            "wanted a whole .safetensors or .pth file; copy it again"
        ) from e
    for wrapper in ("model", "state_dict"):
        state = state.get(wrapper, state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(
        isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in state.items()
    ):
        raise EncoderError(f"weights {weights} hold no state dict of tensors; wanted timm's or MAE's layout")
    return state


def _description(weights: Path) -> dict[str, Any]:
    """What `vacli finetune` wrote into the header of its weights: model, size, mean, std, note, licence."""
    if not weights.is_file():
        raise EncoderError(f"no weights at {weights}; wanted a .safetensors or .pth file")
    if weights.suffix != ".safetensors":
        return {}
    import safetensors

    try:
        with safetensors.safe_open(weights, "numpy") as f:  # "pt" would import torch
            return json.loads((f.metadata() or {}).get("vacli", "{}"))
    except (safetensors.SafetensorError, OSError, ValueError) as e:
        raise EncoderError(
            f"cannot read weights {weights}: {e}; wanted a whole .safetensors file; copy it again"
        ) from e


def _find_weights(model: str) -> Path:
    """Local folders, then the Hugging Face cache, then the hub; an error at once where none has it."""
    official = [f for stem, f in _OFFICIAL_FILES.items() if model.startswith(stem) and model.endswith(".mae")]
    names = [f"{model}.safetensors", f"{model}.pth", *official]
    folders = [Path("weights"), *([Path(os.environ[WEIGHTS_DIR])] if WEIGHTS_DIR in os.environ else [])]
    for path in (folder / name for folder in folders for name in names):
        if path.is_file():
            return path.absolute()
    hub_id = pretrained_config(model).hf_hub_id
    if hub_id:
        found = _from_hub(str(hub_id))
        if found:
            return found
    source = f"https://huggingface.co/{hub_id} (model.safetensors)" if hub_id else "its makers"
    raise EncoderError(
        f"no weights for {model} and no network: get them from {source} and put them at {folders[0] / names[0]}, "
        "or give any file with -o mae.weights=FILE"
    )


def _from_hub(hub_id: str) -> Path | None:
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError

    cached = try_to_load_from_cache(hub_id, "model.safetensors")
    if isinstance(cached, str):
        return Path(cached)
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "TRUE", "YES", "ON"):
        return None
    try:  # a look before the hub client retries for 50 s
        socket.create_connection(("huggingface.co", 443), timeout=3).close()
        return Path(hf_hub_download(hub_id, "model.safetensors"))
    except (OSError, HfHubHTTPError):
        return None


def _device(asked: str | None) -> torch.device:
    import torch

    try:
        return torch.empty(0, device=asked or ("cuda" if torch.cuda.is_available() else "cpu")).device
    except (RuntimeError, AssertionError, NotImplementedError) as e:  # unknown, or not on this machine
        raise EncoderError(f"mae.device is {asked!r}, which torch has not here; wanted cpu or cuda") from e


def _dtype(asked: str | None, device: str | None, model: str) -> str:
    """bfloat16 on a GPU; on a CPU for models wide enough to gain, as narrow ones lose more to casting.

    torch is asked (2 s to import) only where a look at the machine does not settle it.
    """
    if asked is not None:
        if asked not in ("float32", "bfloat16"):
            raise EncoderError(f"mae.dtype is {asked!r}; wanted float32 or bfloat16")
        return asked
    wide = any(size in model for size in ("base", "large", "huge", "giant"))
    if wide and _cpu_has_bfloat16():
        return "bfloat16"  # whichever of the two it will be
    if not wide and (device == "cpu" or (device is None and _no_gpu())):
        return "float32"
    import torch

    if _device(device).type == "cuda" or (wide and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return "bfloat16"
    return "float32"


def _cpu_has_bfloat16() -> bool:
    """Linux lists what oneDNN asks of a CPU for bfloat16, and nobody told oneDNN to use less; False if in doubt."""
    if {"ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"} & os.environ.keys():
        return False
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as f:
        flags: set[str] = next((set(line.split()) for line in f if line.startswith("flags")), set())
        return flags >= {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
    return False


def _no_gpu() -> bool:
    """No driver of NVIDIA's, of WSL's or of AMD's; False if in doubt."""
    drivers = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")
    return sys.platform == "linux" and not any(map(os.path.exists, drivers))
