"""Timm: any image model of timm by its name (CLIP, DINOv2, ConvNeXt, Swin, BEiT ...) as a frame encoder."""

from __future__ import annotations

import contextlib
import inspect
import json
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ..store import Fingerprints
from .encoder import Card, track_name
from .frame_encoder import FrameEncoder
from .pixels import RESIZE
from .weights import EncoderError, absent, cached, described, fit, from_hub, licence_note, local, read

if TYPE_CHECKING:  # 2 s and 4 s to import: only where a model is built or asked about
    import torch
    from torch import nn

EXAMPLE = "timm:vit_base_patch16_clip_224.openai"
_SAID = ("licence", "size", "mean", "std")  # by tuned weights of themselves
SALIENT = "the {} patch tokens of the largest dot product with it, in their places"


@dataclass(frozen=True)
class Published:
    """What is said of a model's published weights, as timm says it."""

    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    license: str | None
    hf_hub_id: str | None
    url: str = ""
    fixed_input_size: bool = True


class Timm(FrameEncoder):
    """Aligned faces in, what a timm model makes of them out: crops (B, H, W, 3) uint8 RGB -> (B, dim) float32.

    model: a name of `timm.list_models(pretrained=True)`. weights: a .safetensors file, or a .pth read with
    weights_only=True, in timm's layout or an original one that timm converts; a classifier in it is left out. Without
    it the weights are looked for in ./weights and $VACLI_WEIGHTS, then in the Hugging Face cache, then on the hub.
    output, of which one pass gives several:
        pooled    what timm's own classifier would see
        cls       the CLS token
        mean      the mean of the patch tokens, or of the places of a convolutional network's last map
        tokens    (B, K, dim): CLS where there is one (register tokens are left out), then all patches row by row
        tokens:K  (B, 1 + K, dim): CLS (where there is none, the mean), then the K patch tokens of the largest dot
                  product with it, in the order of their places
        block:N   CLS after block N (from 1), as it is there, without the final norm
    The whole crop is resized, by the one resize of all encoders: interpolation and centre crop of the model's
    configuration are not followed; its size, mean and standard deviation are. size: other pixels than those, where
    the model takes them. dtype: float32 or bfloat16; by default bfloat16 on a GPU, and for large models on a CPU too.

    Raises EncoderError when the model is unknown or its weights are absent or unreadable; the first call does when
    they do not fit, or when the model has no such output.
    """

    name = "timm"
    default_model: ClassVar[str | None] = None
    card = Card(
        "as the model has it",
        "by model: weights/MODEL.safetensors, else the Hugging Face hub (timm/MODEL)",
        "the model's own, told when it is used",
        get="the first run fetches them where there is a network; else hf download timm/MODEL model.safetensors",
    )
    outputs: ClassVar[dict[str, str]] = {  # and what recipes say of each
        "pooled": "pooled, as timm's classifier sees it",
        "cls": "cls of the last features",
        "mean": "mean of the patch tokens or places of the last features",
        "tokens": "cls where there is one and all patch tokens or places of the last features",
        "tokens:": f"cls or mean, then {SALIENT}, of the last features",
        "block:": "cls after block {}, without the final norm",
    }

    def __init__(
        self,
        model: str | None = None,
        weights: str | None = None,
        output: str = "pooled",
        size: int | str | None = None,
        dtype: str | None = None,
        device: str | None = None,
        fingerprints: Fingerprints | None = None,
    ) -> None:
        self.output = self._canonical(output)
        found = Path(weights).absolute() if weights else self._find(model or self._default())
        about = described(found)
        self.model_name = model or about.get("model") or self._default()
        if self.model_name != about.get("model") or not about.keys() >= set(_SAID):
            config = self._published(self.model_name)
            licence = config.license or ("unknown" if config.hf_hub_id or config.url else None)
            said = (licence, _square(config, self.model_name), config.mean, config.std)
            about = dict(zip(_SAID, said, strict=True)) | about
        self.note = about.get("note")
        self.licence_id = about["licence"]  # None: the weights are the user's own
        self.licence = licence_note(self.licence_id)
        self.size = _pixels(size, self.name) if size else int(about["size"])
        self.mean, self.std = tuple(about["mean"]), tuple(about["std"])
        wide = any(word in self.model_name for word in ("base", "large", "huge", "giant"))
        super().__init__(found, dtype, device, fingerprints, wide)

    # ---- what a kind of model may say otherwise --------------------------------------------------------------

    def _default(self) -> str:
        if self.default_model is None:
            raise EncoderError(f"{self.name} of which model? wanted one, as {EXAMPLE}")
        return self.default_model

    def _published(self, model: str) -> Any:
        return pretrained_config(model)

    def _find(self, model: str) -> Path:
        track = track_name(model) if self.default_model is None else self.name
        return find_weights(model, self._published(model), track)

    def _built(self) -> nn.Module:
        network = build(self.model_name, self.size)
        load(network, self.model_name, self.weights)
        return network

    # ---- the encoder -----------------------------------------------------------------------------------------

    def options(self) -> dict[str, Any]:
        """What makes this encoder again: the arguments of `Timm(...)`."""
        return {
            "model": self.model_name,
            "weights": str(self.weights),
            "output": self.output,
            "size": self.size,
            "dtype": self.dtype,
        }

    def recipe(self) -> dict[str, Any]:
        """All that decides the values, but for the faces they are computed from."""
        kind, number = _parsed(self.output)
        return {
            "track": self.name,
            "version": 1,
            "model": self.model_name,
            "weights_sha256": self.weights_sha256,
            "output": self.outputs[kind].format(number),
            "size": self.size,
            "resize": RESIZE,
            "mean": list(self.mean),
            "std": list(self.std),
            "compute_dtype": self.dtype,
            "dtype": "float16",
        }

    @property
    def pass_key(self) -> str:
        return json.dumps([self.name, {**self.options(), "output": ""}, self._asked_device], sort_keys=True)

    def __call__(self, crops: np.ndarray) -> np.ndarray:
        return self.encode(crops, [self.output])[self.output]

    def encode(self, crops: np.ndarray, outputs: Sequence[str]) -> dict[str, np.ndarray]:
        """One pass for all outputs: each (B, dim) or (B, K, dim) float32."""
        wanted = {output: _parsed(output) for output in outputs}
        with self._computing():
            passed = _Pass(self._network, self.model_name, self._images(crops), wanted.values())
            found = {output: passed.read(kind, number) for output, (kind, number) in wanted.items()}
        return {output: values.float().cpu().numpy() for output, values in found.items()}

    def _canonical(self, output: str) -> str:
        """tokens:016 as tokens:16. Raises EncoderError for what this kind of encoder does not give."""
        with contextlib.suppress(ValueError):
            kind, number = _parsed(output)
            if kind in self.outputs and (number is None or number > 0):
                return kind if number is None else f"{kind}{number}"
        known = ", ".join(k + "N" if k.endswith(":") else k for k in self.outputs)
        raise EncoderError(f"{self.name}.output is {output!r}; wanted {known} (N from 1)")


# ---- reading what was asked for off one pass -----------------------------------------------------------------


def _parsed(output: str) -> tuple[str, int | None]:
    """ "tokens:16" -> ("tokens:", 16), "cls" -> ("cls", None). Raises ValueError where there is no whole number."""
    kind, colon, number = output.partition(":")
    return (kind + colon, int(number)) if colon else (kind, None)


class _Pass:
    """One forward pass, and all that can be read off it."""

    def __init__(
        self, network: Any, model: str, images: torch.Tensor, wanted: Collection[tuple[str, int | None]]
    ) -> None:
        self._network, self._model = network, model
        self._has_cls = getattr(network, "cls_token", None) is not None
        kinds = {kind for kind, _ in wanted}
        if not self._has_cls and kinds & {"cls", "block:"}:
            raise EncoderError(f"{model} has no CLS token; wanted -o NAME.output=mean or tokens")
        depths = sorted({number for kind, number in wanted if kind == "block:" and number is not None})
        self._blocks: dict[int, torch.Tensor] = {}
        if depths:
            self._last = self._through_blocks(images, depths)
        else:
            self._last = network.forward_features(images)
        if kinds - {"pooled"} and getattr(self._last, "ndim", 0) not in (
            3,
            4,
        ):  # CoaT and CrossViT have several
            raise EncoderError(f"{model} has no single map of features; wanted -o NAME.output=pooled")

    def _through_blocks(self, images: torch.Tensor, depths: list[int]) -> torch.Tensor:
        """forward_features, keeping the CLS token of some blocks on the way."""
        stages = getattr(self._network, "forward_intermediates", None)
        if stages is None or "return_prefix_tokens" not in inspect.signature(stages).parameters:
            raise EncoderError(
                f"{self._model} does not give the CLS token of its blocks; wanted -o NAME.output=cls"
            )
        if depths[-1] > len(self._network.blocks):
            raise EncoderError(
                f"output block:{depths[-1]}: {self._model} has {len(self._network.blocks)} blocks; wanted one of them"
            )
        last, kept = stages(
            images, indices=[n - 1 for n in depths], return_prefix_tokens=True, output_fmt="NLC"
        )
        self._blocks = {n: prefix[:, 0] for n, (_, prefix) in zip(depths, kept, strict=True)}
        return last

    def read(self, kind: str, number: int | None) -> torch.Tensor:
        if kind == "pooled":
            return self._network.forward_head(self._last, pre_logits=True)
        if kind == "cls":
            return self._last[:, 0]
        if kind == "block:":
            assert number is not None
            return self._blocks[number]
        import torch

        patches = self._patches()
        if kind == "mean":
            return patches.mean(1)
        first = self._last[:, :1].float() if self._has_cls else patches.mean(1, keepdim=True)
        if kind == "tokens:":
            assert number is not None
            if number > patches.shape[1]:
                raise EncoderError(
                    f"output tokens:{number}: {self._model} has {patches.shape[1]} patch tokens; "
                    "wanted so many or fewer"
                )
            return torch.cat([first, salient(patches, first, number)], 1)
        return torch.cat([first, patches], 1) if self._has_cls else patches

    def _patches(self) -> torch.Tensor:
        """(B, n, D) float32, row by row of the picture."""
        last = self._last.float()
        if last.ndim == 3:
            return last[:, getattr(self._network, "num_prefix_tokens", int(self._has_cls)) :]
        if getattr(self._network, "output_fmt", "NCHW") == "NCHW":
            last = last.permute(0, 2, 3, 1)
        return last.flatten(1, 2)


def salient(patches: torch.Tensor, first: torch.Tensor, count: int) -> torch.Tensor:
    """The `count` of patches (B, n, D) with the largest dot product with first (B, 1, D), in the order of their places.

    Of equal ones the earlier. What CLS is like after the last block is what it has attended to.
    """
    scores = (patches * first).sum(-1)
    best = scores.argsort(dim=1, descending=True, stable=True)[:, :count].sort(dim=1).values
    return patches.gather(1, best[..., None].expand(-1, -1, patches.shape[-1]))


# ---- models and their weights --------------------------------------------------------------------------------


def pretrained_config(model: str) -> Any:
    """What timm says of a model's published weights; it has the fields of `Published`.

    Raises EncoderError for a model that timm does not know.
    """
    import timm

    with contextlib.suppress(RuntimeError):  # a known model with an unknown tag
        if config := timm.get_pretrained_cfg(model):
            return config
    raise EncoderError(
        f"timm knows no model {model!r}; `timm.list_models('vit_*', pretrained=True)` lists them"
    )


def on_this_machine(model: str, config: Any) -> Path | None:
    """The model's weights in the folders for them, else in the Hugging Face cache."""
    found = local(_file_names(model, config))
    return found or (cached(str(config.hf_hub_id)) if config.hf_hub_id else None)


def find_weights(model: str, config: Any, track: str) -> Path:
    """Those on this machine, else from the hub; an error at once where neither has them.

    track: whose option is named in the error.
    """
    found = on_this_machine(model, config)
    if found or (config.hf_hub_id and (found := from_hub(str(config.hf_hub_id)))):
        return found
    names, source = _file_names(model, config), config.url or "their makers"
    if config.hf_hub_id:
        source = f"https://huggingface.co/{config.hf_hub_id} (model.safetensors)"
    file = names[0 if config.hf_hub_id else -1]
    raise absent(f"{model} and no network", source, file, f"{track}.weights")


def _file_names(model: str, config: Any) -> list[str]:
    """The last is what the makers call it, where that is known."""
    published = [config.url.rpartition("/")[2]] if config.url else []
    return [f"{model}.safetensors", f"{model}.pth", *published]


def build(model: str, size: int) -> Any:
    """A timm model without its classifier, for `size` pixels. Raises EncoderError if it cannot be had so."""
    import timm
    import torch

    config = pretrained_config(model)
    own = size == config.input_size[-1]
    sized: dict[str, Any] = {"img_size": size} if config.fixed_input_size and not own else {}
    try:
        network: Any = timm.create_model(model, pretrained=False, num_classes=0, **sized).eval()
        if not own:  # many a model is built for any size, and then cannot compute
            with torch.inference_mode():
                network.forward_features(torch.zeros(1, 3, size, size))
    except Exception as e:  # each of timm's models refuses in its own words
        raise EncoderError(
            f"{model} cannot be built for {size} pixels: {' '.join(str(e).split())[:120]}; "
            f"wanted its own size, {config.input_size[-1]}"
        ) from e
    return network


def load(network: Any, model: str, weights: Path) -> None:
    """Fill a timm model from a checkpoint, whole: an original layout by timm's own conversion, the classifier left out.

    Raises EncoderError naming missing, unexpected and misshapen keys.
    """
    import timm

    state = read(weights)
    module = sys.modules[timm.models.model_entrypoint(model.partition(".")[0]).__module__]
    if convert := getattr(module, "checkpoint_filter_fn", None):
        try:
            state = convert(state, network)
        except Exception as e:  # written for the layouts it knows
            raise EncoderError(
                f"weights {weights} do not fit {model}: {type(e).__name__}: {' '.join(str(e).split())[:120]}; "
                "wanted timm's layout or that of their makers; get them again"
            ) from e
    said = network.pretrained_cfg.get("classifier") or ()
    heads = {name.partition(".")[0] for name in ((said,) if isinstance(said, str) else said)}
    wanted = network.state_dict()
    state = {k: v for k, v in state.items() if k in wanted or k.partition(".")[0] not in heads}
    fit(network, state, weights, f"wanted those of {model}")


def _square(config: Any, model: str) -> int:
    channels, height, width = config.input_size
    if channels != 3 or height != width:
        raise EncoderError(
            f"{model} takes {channels}x{height}x{width}; wanted a model for square RGB pictures"
        )
    return int(width)


def _pixels(size: int | str, who: str) -> int:
    with contextlib.suppress(ValueError):
        if int(size) > 0:
            return int(size)
    raise EncoderError(f"{who}.size is {size!r}; wanted a number of pixels, such as 224")
