"""Fine-tuning: the upper blocks of a ViT and a VA head on labelled frames, so that its CLS token knows affect."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.optim import param_groups_layer_decay
from torch import nn
from tqdm import tqdm

from .. import VacliError, __version__
from ..store import Store
from ..store.labels import ccc
from . import training
from .augment import LEVELS, augment, numbers
from .datasets import Sample
from .labelled import SAMPLINGS, Fetched, draw, fetch, find_labelled
from .mae import DEFAULT_MODEL, Mae, build_vit, load_encoder, pretrained_config
from .pixels import normalise, resize
from .training import Settings, seed_of
from .weights import claim, save

LOSSES = ("ccc", "mse")
_ORDER, _AUGMENTING = 1, 2  # streams of random numbers beside the loop's own


@dataclass(frozen=True)
class Choices:
    """What of a tuning is no setting of the loop; `finetune` says what it means."""

    loss: str
    layer_decay: float
    augment: str
    sampling: str
    frames_per_video: int
    batch: int
    checkpointing: bool

    def __post_init__(self) -> None:
        """Raises VacliError for what cannot be."""
        if self.frames_per_video < 1 or self.batch < 2:
            raise VacliError(
                f"--frames-per-video {self.frames_per_video} --batch {self.batch}: wanted at least 1, and 2"
            )
        if not 0 < self.layer_decay <= 1:
            raise VacliError(f"--layer-decay {self.layer_decay}: wanted a factor in (0, 1]")
        for name, known in (("loss", LOSSES), ("augment", LEVELS), ("sampling", SAMPLINGS)):
            if getattr(self, name) not in known:
                raise VacliError(f"--{name} {getattr(self, name)}: wanted one of {', '.join(known)}")


def finetune(
    samples: list[Sample],
    store: Store,
    out: Path,
    *,
    model: str | None = None,
    weights: str | None = None,
    from_scratch: bool = False,
    freeze: int | None = None,
    size: int | None = None,
    frames_per_video: int = 300,
    sampling: str = "even",
    augment: str = "light",
    loss: str = "ccc",
    batch: int = 64,
    epochs: int = 10,
    lr: float | None = None,
    layer_decay: float | None = None,
    weight_decay: float = 0.05,
    ema: float | None = None,
    patience: int | None = None,
    dtype: str | None = None,
    checkpointing: bool = False,
    seed: int = 0,
    note: str | None = None,
) -> dict[str, float]:
    """Tune a ViT on the labelled frames of the train split; write encoder weights that `mae.weights` takes.

    weights: where to start (looked for as in Mae); from_scratch starts from random ones instead. freeze: how many
    lower blocks stay as they are, with patch embedding, positions and CLS token (two thirds of them by default, as in
    Mamba-VA: 16 of 24; none from scratch). size: input pixels (from scratch only).

    sampling: one of labelled.SAMPLINGS. augment: one of augment.LEVELS. loss: "ccc" (1 - CCC over the batch, mean of
    both dimensions) or "mse". batch: frames, over all processes. layer_decay: each block learns at this share of the
    rate of the one above it (Bao et al. 2021; by default 0.75, from scratch 1). checkpointing: activations of the
    tuned blocks are computed again instead of kept. dtype: by default bfloat16 on a GPU, else float32. epochs, lr,
    weight_decay, ema, patience and seed: see training.Settings.

    The weights of the epoch that is best on the validation frames are kept. Stopped at any moment, the same call goes
    on from OUT's .resume; that file and the crops beside it are removed at the end. Under torchrun the processes share
    every batch.

    Returns the CCC of valence and arousal on the validation frames. Raises VacliError without labelled frames, and for
    an `out` that is no .safetensors file or cannot be written.
    """
    decay = layer_decay if layer_decay is not None else 1.0 if from_scratch else 0.75
    choices = Choices(loss, decay, augment, sampling, frames_per_video, batch, checkpointing)
    settings = Settings(
        epochs,
        lr if lr is not None else 2e-3 if from_scratch else 1e-4,
        weight_decay,
        ema=ema,
        dtype=dtype_of(dtype),
        patience=patience,
        seed=seed,
    )
    claim(out)
    with training.team() as device:
        torch.manual_seed(seed)
        net, about = begun(model, weights, from_scratch, size, freeze, store)
        net.vit.set_grad_checkpointing(checkpointing)
        train, held_out = training.first_alone(lambda: _both(samples, store, out, choices, settings))
        resume = out.with_suffix(".resume")
        fitted = _fit(net.to(device), train, held_out, about, choices, settings, resume)
        figures = {k: fitted.best[k] for k in ("ccc_valence", "ccc_arousal")}
        if training.rank() == 0:
            about |= {"note": note or about["note"], "tuned_by": f"vacli {__version__}", "seed": seed}
            about |= {"settings": asdict(choices) | asdict(settings), **figures}
            state = {k.removeprefix("vit."): v for k, v in fitted.state.items() if k.startswith("vit.")}
            save(state, about, out)
            training.forget(resume)
            for frames in (train, held_out):
                frames.crops.remove()
                for problem in frames.crops.problems:
                    tqdm.write(f"left out: {problem}")
    return figures


def dtype_of(asked: str | None) -> str:
    """What to compute in, where nothing is asked what suits the machine. Raises VacliError for float16 on a CPU."""
    on_gpu = torch.cuda.is_available()
    if asked == "float16" and not on_gpu:
        raise VacliError(
            "--dtype float16: a CPU takes a hundred times as long in it; wanted bfloat16 or float32"
        )
    return asked or ("bfloat16" if on_gpu else "float32")


# ---- the network ---------------------------------------------------------------------------------------------


class Tuned(nn.Module):
    """A ViT with a VA head on its CLS token: images (B, 3, size, size) in [0, 255] -> (B, 2) float32.

    freeze: of so many lower blocks, and all that comes before them, nothing has a gradient: autograd records nothing
    there, and no activation is kept. With 0 all is tuned.
    """

    def __init__(self, vit: Any, freeze: int, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.vit, self._mean, self._std = vit, mean, std
        self.head = nn.Linear(vit.num_features, 2)
        if freeze:
            vit.requires_grad_(False)
            vit.blocks[freeze:].requires_grad_(True)
            vit.norm.requires_grad_(True)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        tokens = self.vit.forward_features(normalise(images, self._mean, self._std))
        return self.head(tokens[:, 0]).float()

    def groups(self, layer_decay: float, weight_decay: float) -> list[dict[str, Any]]:
        """What is tuned, for an optimizer: each block's share of the head's rate, and no decay of biases and norms."""
        still = self.vit.no_weight_decay()
        groups = param_groups_layer_decay(self.vit, weight_decay, still, layer_decay=layer_decay)
        return [  # timm counts from the upper block, as this ViT has no head of its own
            *({**group, "lr_scale": layer_decay * group["lr_scale"]} for group in groups),
            {"params": [self.head.weight], "weight_decay": weight_decay},
            {"params": [self.head.bias], "weight_decay": 0.0},
        ]


def begun(
    model: str | None,
    weights: str | None,
    from_scratch: bool,
    size: int | None,
    freeze: int | None,
    store: Store,
) -> tuple[Tuned, dict[str, Any]]:
    """The network as it begins, and what its weights will say of themselves."""
    if from_scratch:
        name = model or DEFAULT_MODEL
        config = pretrained_config(name)
        about = {"model": name, "size": size or config.input_size[-1], "mean": config.mean, "std": config.std}
        about |= {"licence": None, "note": None, "tuned_from": None}
        vit = build_vit(name, about["size"])
        initialise(vit)
    else:
        mae = Mae(model, weights, fingerprints=store.fingerprints)
        about = {"model": mae.model_name, "size": mae.size, "mean": mae.mean, "std": mae.std}
        about |= {"licence": mae.licence_id, "note": mae.note, "tuned_from": mae.weights_sha256}
        vit = build_vit(mae.model_name, mae.size)
        load_encoder(vit, mae.weights)
    blocks = len(vit.blocks)
    freeze = (0 if from_scratch else blocks * 2 // 3) if freeze is None else freeze
    if not 0 <= freeze <= blocks:
        raise VacliError(f"--freeze {freeze}: {about['model']} has {blocks} blocks; wanted 0 to {blocks}")
    about["frozen_blocks"] = freeze
    return Tuned(vit, freeze, tuple(about["mean"]), tuple(about["std"])), about


def initialise(vit: Any) -> None:
    """MAE's own start (He et al. 2022): xavier weights and sine-cosine positions.

    timm's 0.02 leaves a narrow ViT without a signal for its first thousand steps. The lowest frequency is one turn
    over 16 patches, as a small grid has no use for MAE's 10,000.
    """
    for module in vit.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    patches = vit.patch_embed.proj.weight
    nn.init.xavier_uniform_(patches.view(len(patches), -1))
    rows, columns = vit.patch_embed.grid_size
    quarter = len(patches) // 4
    turns = 16.0 ** -(torch.arange(quarter) / quarter)
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    waves = [wave(place.reshape(-1, 1) * turns) for place in (x, y) for wave in (torch.sin, torch.cos)]
    with torch.no_grad():
        vit.pos_embed.zero_()
        vit.pos_embed[0, -rows * columns :, : 4 * quarter] = torch.cat(waves, dim=1)


# ---- the frames ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Frames:
    """What the processes share of a split. labels (n, 2): NaN where the crop could not be read.

    draws: of every epoch (one draw for all if there is one), positions (m,) among the n.
    """

    crops: Fetched
    labels: torch.Tensor
    draws: list[torch.Tensor]

    def digest(self) -> str:
        """Of all that decides what is learnt from them."""
        parts = [self.labels, *self.draws]
        whole = hashlib.sha256(self.crops.digest.encode())
        for part in parts:
            whole.update(part.numpy().tobytes())
        return whole.hexdigest()


def _both(
    samples: list[Sample], store: Store, out: Path, choices: Choices, settings: Settings
) -> tuple[_Frames, _Frames]:
    """The frames to tune on, and those to judge by: evenly spaced, whatever is tuned on."""
    epochs = 1 if choices.sampling == "even" else settings.epochs
    found = {split: find_labelled(samples, store, split) for split in ("train", "validation")}
    made = []
    for split, sampling, rounds in (("train", choices.sampling, epochs), ("validation", "even", 1)):
        frames = found[split]
        drawn = [draw(frames, sampling, choices.frames_per_video, settings.seed, e) for e in range(rounds)]
        chosen = np.unique(np.concatenate(drawn))
        crops = fetch(frames, chosen, out.with_suffix(f".{split}.crops"))
        labels = np.where(crops.seen[:, None], frames.labels[chosen], np.nan).astype(np.float32)
        places = [torch.from_numpy(np.searchsorted(chosen, d)) for d in drawn]
        made.append(_Frames(crops, torch.from_numpy(labels), places))
    return made[0], made[1]


# ---- tuning --------------------------------------------------------------------------------------------------


def _fit(
    net: Tuned,
    train: _Frames,
    held_out: _Frames,
    about: dict[str, Any],
    choices: Choices,
    settings: Settings,
    resume: Path,
) -> training.Fitted:
    device = net.head.weight.device
    read, read_held_out = _Reader(train, about["size"], device), _Reader(held_out, about["size"], device)
    steps = math.ceil(len(train.draws[0]) / choices.batch)

    def batches(epoch: int) -> Iterator[tuple[int, int, torch.Tensor]]:
        drawn = train.draws[epoch % len(train.draws)]
        generator = torch.Generator().manual_seed(seed_of(settings.seed, epoch, _ORDER))
        order = torch.randperm(len(drawn), generator=generator)
        for step, rows in enumerate(
            order.tensor_split(steps)
        ):  # no last batch of one frame, which has no CCC
            yield epoch, step, drawn[rows]

    def loss_of(net: nn.Module, batch: tuple[int, int, torch.Tensor]) -> torch.Tensor:
        epoch, step, places = batch
        images, labels = read(training.share(places))
        drawn = numbers(len(places), seed_of(settings.seed, epoch, step, _AUGMENTING))
        images = augment(images, training.share(drawn), LEVELS[choices.augment])
        return _loss(training.whole(net(images)), training.whole(labels), choices.loss)

    def judge(net: nn.Module) -> dict[str, float]:
        return _judge(net, read_held_out, held_out.draws[0], choices.batch)

    return training.fit(
        net,
        net.groups(choices.layer_decay, settings.weight_decay),
        loss_of,
        batches,
        steps,
        settings,
        resume=resume,
        about={**about, **asdict(choices), "train": train.digest(), "validation": held_out.digest()},
        judge=judge,
        desc="finetune",
    )


class _Reader:
    """What the network is shown: places (B,) -> images (B, 3, size, size) uint8 and labels (B, 2), on the device.

    The pixels are those of extraction: the same crops, the same resize. A place of -1 has no label.
    """

    def __init__(self, frames: _Frames, size: int, device: torch.device) -> None:
        self._pixels, self._labels, self._size, self._device = (
            frames.crops.pixels(),
            frames.labels,
            size,
            device,
        )

    def __call__(self, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        crops = torch.from_numpy(self._pixels[places.clamp(min=0).numpy()])
        labels = self._labels[places].masked_fill((places < 0)[:, None], torch.nan)
        return resize(crops.to(self._device), self._size), labels.to(self._device)


def _loss(predicted: torch.Tensor, labels: torch.Tensor, kind: str) -> torch.Tensor:
    """Of predicted and labels (B, 2); a row without a label (NaN) counts for nothing."""
    known = ~labels.isnan().any(1, keepdim=True)
    weight, target = known.float(), labels.where(known, 0.0)
    if kind == "mse":
        return (weight * (predicted - target) ** 2).sum() / (2 * weight.sum()).clamp(min=1)
    return (1 - ccc(predicted, target, weight)).mean()


def _judge(net: nn.Module, read: _Reader, places: torch.Tensor, batch: int) -> dict[str, float]:
    """CCC over all frames of all videos, as the challenge has it."""
    predicted, labels = [], []
    for some in places.split(batch):
        images, truth = read(training.share(some))
        predicted.append(training.whole(net(images))[: len(some)])
        labels.append(training.whole(truth)[: len(some)])
    x, y = torch.cat(predicted).double(), torch.cat(labels).double()
    known = ~y.isnan().any(1)
    v, a = ccc(x[known], y[known], x.new_ones(int(known.sum()), 1)).tolist()
    return {"ccc_valence": v, "ccc_arousal": a, "score": (v + a) / 2}
