"""Fine-tuning: the upper blocks of a ViT and a VA head on labelled frames, so that its CLS token knows affect."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from .. import VacliError, __version__
from ..store import Store
from ..store.labels import ccc
from .datasets import Sample
from .mae import DEFAULT_MODEL, Mae, build_vit, load_encoder, pretrained_config
from .pixels import normalise, resize
from .run import extract, labelled_crops
from .weights import claim, save

_BATCH = 64
_SHIFT_PX = 4  # the crops of another detector sit a few pixels elsewhere


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
    epochs: int = 10,
    lr: float | None = None,
    seed: int = 0,
    note: str | None = None,
) -> dict[str, float]:
    """Tune a ViT on the labelled frames of the train split; write encoder weights that `mae.weights` takes.

    weights: where to start (looked for as in Mae); from_scratch starts from random ones instead. freeze: how many
    lower blocks stay as they are with the patch embedding (two thirds of them by default, as in Mamba-VA: 16 of
    24; none from scratch). size: input pixels (from scratch only). Loss: 1 - CCC over the batch, both dimensions.
    Returns the CCC of valence and arousal on the validation frames. Raises VacliError without labelled frames, and for
    an `out` that is no .safetensors file or cannot be written.
    """
    if epochs < 1 or frames_per_video < 1:
        raise VacliError(f"{epochs} epochs of {frames_per_video} frames per video; wanted at least 1 of each")
    claim(out)
    torch.manual_seed(seed)
    vit, about = _start(model, weights, from_scratch, size)
    blocks = len(vit.blocks)
    freeze = (0 if from_scratch else blocks * 2 // 3) if freeze is None else freeze
    if not 0 <= freeze <= blocks:
        raise VacliError(f"--freeze {freeze}: {about['model']} has {blocks} blocks; wanted 0 to {blocks}")
    _freeze(vit, freeze)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    net = nn.ModuleDict({"vit": vit, "head": nn.Linear(vit.num_features, 2)}).to(device)
    train = _gather(samples, store, "train", frames_per_video)
    held_out = _gather(samples, store, "validation", frames_per_video)
    _fit(net, train, about, epochs, lr or (2e-3 if from_scratch else 1e-4), seed)
    figures = _judge(net, held_out, about)
    about |= {
        "note": note or about.get("note"),  # a warning about where it started holds for what it became
        "frozen_blocks": freeze,
        "tuned_by": f"vacli {__version__}",
        "seed": seed,
        **figures,
    }
    save(vit.state_dict(), about, out)
    return figures


def _start(
    model: str | None, weights: str | None, from_scratch: bool, size: int | None
) -> tuple[Any, dict[str, Any]]:
    if not from_scratch:
        mae = Mae(model, weights)
        vit = build_vit(mae.model_name, mae.size)
        load_encoder(vit, mae.weights)
        return vit, {
            "model": mae.model_name,
            "size": mae.size,
            "mean": mae.mean,
            "std": mae.std,
            "licence": mae.licence_id,
            "note": mae.note,
        }
    name = model or DEFAULT_MODEL
    config = pretrained_config(name)
    size = size or config.input_size[-1]
    about = {"model": name, "size": size, "mean": config.mean, "std": config.std, "licence": None}
    vit = build_vit(name, size)
    _initialise(vit)
    return vit, about


def _initialise(vit: Any) -> None:
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


def _freeze(vit: Any, blocks: int) -> None:
    """Freeze the lower blocks and all that comes before them: no gradient, so no optimiser memory either."""
    if blocks:
        vit.requires_grad_(False)
        vit.blocks[blocks:].requires_grad_(True)
        vit.norm.requires_grad_(True)


Frames = tuple[torch.Tensor, torch.Tensor]  # crops (N, H, W, 3) uint8, labels (N, 2) float32


def _gather(samples: list[Sample], store: Store, split: str, frames_per_video: int) -> Frames:
    """Evenly spaced labelled frames of every video of a split; neighbours show nearly the same face."""
    wanted = [s for s in samples if s.annotation is not None and s.split == split]
    outcomes = extract(wanted, {}, store, link=False)
    problems = [o.problem for o in outcomes if o.problem]
    for problem in problems:
        tqdm.write(f"left out: {problem}")
    gathered = [labelled_crops(o, store, frames_per_video) for o in outcomes if not o.problem]
    found = [frames for frames in gathered if frames is not None]
    if not found:
        use = "tune on" if split == "train" else "judge by"
        why = f"{len(wanted)} of the {len(samples)} videos are labelled and in the {split} set"
        mend = f"wanted {split}/clip.mp4 with clip.txt, or the Aff-Wild2 layout"
        raise VacliError(f"no labelled face to {use}: {why}; {problems[0] if problems else mend}")
    if len({crops.shape[1:] for crops, _ in found}) > 1:
        raise VacliError(f"the {split} set has aligned crops of several sizes; wanted one size, 112x112")
    crops = np.concatenate([c for c, _ in found])
    labels = np.concatenate([y for _, y in found]).astype(np.float32)
    return torch.from_numpy(crops), torch.from_numpy(labels)


def _fit(
    net: nn.ModuleDict, frames: Frames, about: dict[str, Any], epochs: int, lr: float, seed: int
) -> None:
    crops, labels = frames
    device = next(net.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=lr, weight_decay=0.05)
    steps_per_epoch = math.ceil(len(crops) / _BATCH)
    steps = epochs * steps_per_epoch
    warm_up = 0.1 if steps > 10 else 0.05  # a warm-up of exactly one step makes OneCycleLR divide by zero
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=warm_up)
    net.train()
    with tqdm(
        total=epochs * len(crops), desc="finetune", unit="frame", dynamic_ncols=True, mininterval=1
    ) as bar:
        for epoch in range(epochs):
            for rows in torch.randperm(len(crops), generator=generator).split(_BATCH):
                images = _jitter(resize(crops[rows].to(device), about["size"]), generator)
                predicted = _predict(net, images, about)
                one = torch.ones(len(rows), 1, device=device)
                loss = (1 - ccc(predicted, labels[rows].to(device), one)).mean()
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(net.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                bar.update(len(rows))
            bar.set_postfix_str(f"epoch {epoch + 1}/{epochs} loss {loss.item():.3f}")


def _jitter(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Mirror half of the time; shift the batch by a few pixels."""
    if torch.rand((), generator=generator) < 0.5:
        images = images.flip(-1)
    shift = torch.randint(-_SHIFT_PX, _SHIFT_PX + 1, (2,), generator=generator).tolist()
    return images.roll(shift, dims=(-2, -1))


def _predict(net: nn.ModuleDict, images: torch.Tensor, about: dict[str, Any]) -> torch.Tensor:
    with torch.autocast(images.device.type, torch.bfloat16, enabled=images.is_cuda):
        vit: Any = net["vit"]
        tokens = vit.forward_features(normalise(images, tuple(about["mean"]), tuple(about["std"])))
        return net["head"](tokens[:, 0]).float()


@torch.inference_mode()
def _judge(net: nn.ModuleDict, frames: Frames, about: dict[str, Any]) -> dict[str, float]:
    crops, labels = frames
    device = next(net.parameters()).device
    net.eval()
    batches = crops.split(_BATCH)
    predicted = torch.cat([_predict(net, resize(b.to(device), about["size"]), about).cpu() for b in batches])
    v, a = ccc(predicted.double(), labels.double(), torch.ones(len(labels), 1, dtype=torch.float64)).tolist()
    return {"ccc_valence": v, "ccc_arousal": a}
