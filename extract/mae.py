"""MAE: a masked autoencoder's ViT (any timm ViT by name) as a frame encoder; its CLS token after the final norm."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ..store import Fingerprints
from . import timm_encoder
from .encoder import Card
from .timm_encoder import SALIENT, Published, Timm, on_this_machine
from .weights import EncoderError, fit, read

if TYPE_CHECKING:  # 2 s to import: only where a model is built, never for a recipe that needs none
    import torch
    from torch import nn

DEFAULT_MODEL = "vit_large_patch16_224.mae"
# What the official MAE releases and fine-tuned checkpoints carry beside the encoder.
_NOT_ENCODER = ("decoder_", "decoder.", "mask_token", "head.", "fc_norm.", "head_drop.")
_SIZES = {"base": "vit_base_patch16_224.mae", "large": DEFAULT_MODEL, "huge": "vit_huge_patch14_224.mae"}
_WIDTHS = {768: "base", 1024: "large", 1280: "huge"}
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_MAKERS = "https://dl.fbaipublicfiles.com/mae/pretrain/mae_pretrain_vit_{}.pth"
# The official MAE weights as timm has them; they will not change, and a test compares.
_KNOWN = {
    name: Published((3, 224, 224), *_IMAGENET, "cc-by-nc-4.0", f"timm/{name}", _MAKERS.format(size))
    for size, name in _SIZES.items()
}


class Mae(Timm):
    """Aligned faces in, CLS embeddings out: crops (B, size, size, 3) uint8 RGB -> (B, dim) float32.

    model: any timm ViT with a CLS token. weights: a .safetensors file, or a .pth read with weights_only=True:
    timm's layout, the official MAE checkpoints ({"model": ...}), Hugging Face's (facebook/vit-mae-large), or what
    `vacli finetune` wrote (which names its own model and size). Without it the weights are looked for in ./weights and
    $VACLI_WEIGHTS, then in the Hugging Face cache, then on the hub. dtype: float32 or bfloat16 for the computation; by
    default bfloat16 on a GPU, and on a CPU that has it for models wide enough to gain. device: by default a GPU where
    there is one. output, of which one pass gives several: cls, mean, block:N, tokens and tokens:K, as `Timm` has them.

    Raises EncoderError when the weights are absent or unreadable; the first call does when they do not fit the model.
    """

    name = "mae"
    default_model = DEFAULT_MODEL
    card = Card(
        "1024 (ViT-L); 768 (ViT-B), 1280 (ViT-H)",
        f"weights/{DEFAULT_MODEL}.safetensors, else https://huggingface.co/timm/{DEFAULT_MODEL}",
        "CC-BY-NC 4.0: not for commercial use (what you tuned yourself: as you say)",
        (f"{DEFAULT_MODEL}.safetensors", f"{DEFAULT_MODEL}.pth", _MAKERS.rpartition("/")[2].format("large")),
        f"hf download timm/{DEFAULT_MODEL} model.safetensors (the first run does it where there is a network), "
        f"or put {_MAKERS.format('large')} into weights/",
    )
    outputs: ClassVar[dict[str, str]] = {
        "cls": "cls after final norm",
        "mean": "mean of the patch tokens after final norm",
        "tokens": "cls and all patch tokens after final norm",
        "tokens:": f"cls, then {SALIENT}, after final norm",
        "block:": "cls after block {}, without the final norm",
    }

    def __init__(
        self,
        model: str | None = None,
        weights: str | None = None,
        dtype: str | None = None,
        device: str | None = None,
        output: str = "cls",
        fingerprints: Fingerprints | None = None,
    ) -> None:
        super().__init__(model, weights, output, None, dtype, device, fingerprints)

    @staticmethod
    def found() -> Path | None:
        """The default model's weights, where they are on this machine."""
        return on_this_machine(DEFAULT_MODEL, _KNOWN[DEFAULT_MODEL])

    def options(self) -> dict[str, Any]:
        """What makes this encoder again: the arguments of `Mae(...)`."""
        more = {} if self.output == "cls" else {"output": self.output}
        return {"model": self.model_name, "weights": str(self.weights), "dtype": self.dtype, **more}

    def _published(self, model: str) -> Any:
        return pretrained_config(model)

    def _built(self) -> nn.Module:
        vit = build_vit(self.model_name, self.size)
        load_encoder(vit, self.weights)
        return vit


def pretrained_config(model: str) -> Any:
    """What timm says of a model's published weights, as `Published` has it. Raises EncoderError if unknown."""
    return _KNOWN.get(model) or timm_encoder.pretrained_config(model)


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
    """Fill the ViT from a checkpoint, whole: timm's or the official layout, or Hugging Face's ViTMAE.

    Raises EncoderError naming missing, unexpected and misshapen keys.
    """
    state = read(weights)
    if any(k.endswith("embeddings.patch_embeddings.projection.weight") for k in state):
        state = _from_hugging_face(state)
    state = {k: v for k, v in state.items() if not k.startswith(_NOT_ENCODER)}
    fit(vit, state, weights, f"{_told(state)}name the model they were made for with -o mae.model=NAME")


def _told(state: Mapping[str, torch.Tensor]) -> str:
    """Of which ViT the weights seem to be."""
    if "cls_token" not in state:
        return ""
    width = state["cls_token"].shape[-1]
    blocks = len({k.split(".")[1] for k in state if k.startswith("blocks.")})
    like = f", as {_SIZES[_WIDTHS[width]]} is" if width in _WIDTHS else ""
    return f"they are of a ViT {width} wide with {blocks} blocks{like}; "


_HF_NAMES = (  # of ViTMAE in Hugging Face's transformers, as its files have them
    (r"^(vit\.)?embeddings\.cls_token", "cls_token"),
    (r"^(vit\.)?embeddings\.position_embeddings", "pos_embed"),
    (r"^(vit\.)?embeddings\.patch_embeddings\.projection", "patch_embed.proj"),
    (r"^(vit\.)?encoder\.layer\.(\d+)\.", r"blocks.\2."),
    (r"^(vit\.)?layernorm\.", "norm."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
)


def _from_hugging_face(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """ViTMAE's names as timm's; query, key and value become one matrix."""
    import torch

    named: dict[str, torch.Tensor] = {}
    for name, value in state.items():
        for theirs, ours in _HF_NAMES:
            name = re.sub(theirs, ours, name)
        named[name] = value
    for query in [name for name in named if ".attention.attention.query." in name]:
        parts = [query.replace("query", part) for part in ("query", "key", "value")]
        if all(part in named for part in parts):
            ours = query.replace("attention.attention.query", "attn.qkv")
            named[ours] = torch.cat([named.pop(part) for part in parts])
    return named
