"""Pre-training: a masked autoencoder (He et al. 2022) on face crops without labels; its encoder is what stays."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.layers import PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from timm.optim import param_groups_weight_decay
from torch import nn
from tqdm import tqdm

from .. import VacliError, __version__
from ..store import Store
from . import training
from .augment import Strength, augment, numbers
from .datasets import Sample
from .finetune import begun, dtype_of, initialise
from .labelled import Fetched, Labelled, draw, fetch
from .mae import Mae
from .pixels import normalise, resize
from .run import Outcome, extract
from .training import Settings, seed_of
from .weights import EncoderError, claim, read, save

HELD_OUT = 0.05  # share of the videos whose crops are only judged by
# The paper crops a fifth to all of the picture (its Table 1e). A face that is aligned comes to the encoder in one place
# and one size for ever after, and its positions may know where a mouth is: so, a little larger, smaller and beside.
AUGMENTATION = Strength(flip=0.5, zoom=0.15, shift=0.06)
_BETAS = (0.9, 0.95)  # of AdamW, as in the paper
_BASE_LR = 1.5e-4  # for 256 images a batch, as in the paper
_SCRATCH_LR = 2e-3
_PAPER_WIDTH, _PAPER_BLOCKS = 512, 8  # the decoder's, for ViT-B, L and H
_HEAD_WIDTH = 32  # of the decoder's attention: 16 heads in the paper's
_ORDER, _AUGMENTING, _MASKING, _JUDGING, _HOLDING_OUT = range(1, 6)  # streams of random numbers


def pretrain(
    samples: list[Sample],
    store: Store,
    out: Path,
    *,
    model: str | None = None,
    weights: str | None = None,
    from_scratch: bool = False,
    size: int | None = None,
    frames_per_video: int = 300,
    batch: int = 256,
    epochs: int = 100,
    lr: float | None = None,
    mask: float = 0.75,
    dtype: str | None = None,
    seed: int = 0,
    note: str | None = None,
) -> dict[str, float]:
    """Train a masked autoencoder on the faces of all videos, labelled or not, of any split; write its encoder.

    Where a figure is to be of people nobody has ever seen, give it the training videos alone. The file is one that
    `mae.weights` and `finetune(weights=...)` take.

    weights: where to start (looked for as in Mae); from_scratch starts from random ones instead. A decoder beside them
    is gone on with if it fits. size: input pixels (from scratch only). frames_per_video: evenly spaced, as neighbours
    show nearly the same face. batch: crops, over all processes. lr: by default the paper's 1.5e-4 for 256 crops a
    batch, in proportion; from scratch 2e-3, as small models and short trainings want. mask: share of the patches that
    is hidden. dtype: by default bfloat16 on a GPU, else float32.

    One video in twenty is held out, and the weights of the epoch that draws its hidden patches best are kept. Stopped
    at any moment, the same call goes on from OUT's .resume; under torchrun the processes share every batch.

    Returns {"loss": of the held-out crops (of the last epoch, if there is but one video), "train_loss": of the epoch
    kept}: the mean squared error of hidden patches, each normalised by itself, so that 1 is no better than each
    patch's mean colour. Raises VacliError without a face, and for an `out` that is no .safetensors file or cannot be
    written.
    """
    choices = Choices(mask, frames_per_video, batch)
    rate = lr if lr is not None else _SCRATCH_LR if from_scratch else _BASE_LR * batch / 256
    settings = Settings(epochs, rate, dtype=dtype_of(dtype), seed=seed)
    claim(out)
    with training.team() as device:
        torch.manual_seed(seed)
        net, about = _begin(model, weights, from_scratch, size, mask, store)
        crops, train, held_out = training.first_alone(lambda: _gather(samples, store, out, choices, seed))
        about |= asdict(choices)
        resume = out.with_suffix(".resume")
        fitted = _fit(net.to(device), crops, train, held_out, about, choices, settings, resume)
        figures = {"loss": -fitted.best.get("score", -fitted.best["loss"]), "train_loss": fitted.best["loss"]}
        if training.rank() == 0:
            about |= {"note": note or about["note"], "pretrained_by": f"vacli {__version__}", "seed": seed}
            about |= {"settings": asdict(choices) | asdict(settings), **figures}
            state = {k.removeprefix("vit."): v for k, v in fitted.state.items() if k.startswith("vit.")}
            save(state, about, out)
            training.forget(resume)
            crops.remove()
            for problem in crops.problems:
                tqdm.write(f"left out: {problem}")
    return figures


@dataclass(frozen=True)
class Choices:
    """What of a pre-training is no setting of the loop; `pretrain` says what it means."""

    mask: float
    frames_per_video: int
    batch: int

    def __post_init__(self) -> None:
        """Raises VacliError for what cannot be."""
        if self.frames_per_video < 1 or self.batch < 1:
            raise VacliError(
                f"--frames-per-video {self.frames_per_video} --batch {self.batch}: wanted at least 1 of each"
            )
        if not 0 < self.mask < 1:
            raise VacliError(f"--mask {self.mask}: wanted a share of the patches in (0, 1), as 0.75")


# ---- the network ---------------------------------------------------------------------------------------------


class MaskedAutoencoder(nn.Module):
    """A timm ViT that sees some patches of an image, and a small transformer that draws the others.

    Shape legend: B images, N patches, V visible ones, D and W the widths of encoder and decoder, P values of a patch.

    vit: with a CLS token and patches that do not overlap; its positions stay as they are, as in the paper. The decoder
    has two thirds of its blocks and of its width, at most the paper's 8 and 512, and fixed sine-cosine positions; its
    parameters are called as in the official checkpoints, which so fit. Raises EncoderError for a ViT whose patches
    cannot be left out.
    """

    def __init__(self, vit: Any) -> None:
        super().__init__()
        plain = isinstance(vit, VisionTransformer) and isinstance(vit.patch_embed, PatchEmbed)
        if not plain or vit.pos_embed is None:
            raise EncoderError(
                f"{type(vit).__name__}: its patches look at each other before the first block, or carry no position, "
                "so none can be left out; wanted a plain ViT such as vit_base_patch16_224"
            )
        self.vit = vit
        vit.patch_drop = _Visible(vit.num_prefix_tokens)
        vit.pos_embed.requires_grad_(False)
        self.grid: tuple[int, int] = vit.patch_embed.grid_size
        self.patch = int(vit.patch_embed.patch_size[0])
        width = min(_PAPER_WIDTH, max(2, vit.embed_dim * 2 // 3 // _HEAD_WIDTH) * _HEAD_WIDTH)
        decoder: Any = VisionTransformer(
            img_size=self.grid,
            patch_size=1,
            num_classes=0,
            embed_dim=width,
            depth=min(_PAPER_BLOCKS, max(1, len(vit.blocks) * 2 // 3)),
            num_heads=width // _HEAD_WIDTH,
        )
        initialise(decoder)
        self.decoder_embed = nn.Linear(vit.embed_dim, width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.decoder_pos_embed = decoder.pos_embed.requires_grad_(False)
        self.decoder_blocks, self.decoder_norm = decoder.blocks, decoder.norm
        self.decoder_pred = nn.Linear(width, 3 * self.patch**2)
        nn.init.normal_(self.mask_token, std=0.02)
        for linear in (self.decoder_embed, self.decoder_pred):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    @property
    def patches(self) -> int:
        """N, how many an image has."""
        return self.grid[0] * self.grid[1]

    def decoder(self) -> dict[str, torch.Tensor]:
        """All that is not the encoder, under the official checkpoints' names."""
        return {k: v for k, v in self.state_dict().items() if not k.startswith("vit.")}

    def encode(self, images: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) and the patches to be seen of each (B, V) -> (B, 1 + V, D), the CLS token first.

        The other patches cost nothing from the first block on: that is the speed of it.
        """
        self.vit.patch_drop.kept = kept
        tokens = self.vit.forward_features(images)
        return torch.cat([tokens[:, :1], tokens[:, self.vit.num_prefix_tokens :]], dim=1)

    def decode(self, latent: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        """What `encode` gave (B, 1 + V, D), and of which patches -> the pixels of all patches (B, N, P)."""
        seen = self.decoder_embed(latent)
        places = kept[..., None].expand(-1, -1, seen.shape[-1])
        drawn = self.mask_token.to(seen.dtype).repeat(len(seen), self.patches, 1)
        tokens = torch.cat([seen[:, :1], drawn.scatter(1, places, seen[:, 1:])], dim=1)
        tokens = self.decoder_blocks(tokens + self.decoder_pos_embed)
        return self.decoder_pred(self.decoder_norm(tokens))[:, 1:]

    def forward(self, images: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        """The loss of each image (B,): mean squared error of its hidden patches alone, each normalised by itself."""
        drawn = self.decode(self.encode(images, kept), kept).float()
        error = (drawn - normalised(patchify(images, self.patch))).square().mean(dim=2)  # (B, N)
        hidden = torch.ones_like(error).scatter(1, kept, 0.0)
        return (error * hidden).sum(dim=1) / hidden.sum(dim=1)


class _Visible(nn.Module):
    """In the place of timm's PatchDropout, between the positions and the blocks: only the patches `kept` go on."""

    kept: torch.Tensor  # (B, V)

    def __init__(self, prefix_tokens: int) -> None:
        super().__init__()
        self._prefix = prefix_tokens

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        prefix, patches = tokens[:, : self._prefix], tokens[:, self._prefix :]
        return torch.cat(
            [prefix, patches.gather(1, self.kept[..., None].expand(-1, -1, tokens.shape[-1]))], dim=1
        )


def draw_kept(images: int, patches: int, mask: float, seed: int) -> torch.Tensor:
    """(B, V) the patches that each image shows, ascending; each its own, drawn without return. The same for a seed."""
    generator = torch.Generator().manual_seed(seed)
    visible = patches - round(patches * mask)
    return torch.rand(images, patches, generator=generator).argsort(dim=1)[:, :visible].sort(dim=1).values


def patchify(images: torch.Tensor, patch: int) -> torch.Tensor:
    """(B, 3, H, W) -> (B, N, P): patches row by row, in each its pixels row by row, of each pixel the colours."""
    tiles = images.unfold(2, patch, patch).unfold(3, patch, patch)  # (B, 3, rows, columns, patch, patch)
    return tiles.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)


def normalised(patches: torch.Tensor) -> torch.Tensor:
    """(B, N, P) with mean 0 and variance 1 in every patch: what is drawn there, not how light it is (Table 1d)."""
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return (patches - mean) / (variance + 1e-6).sqrt()


def _begin(
    model: str | None, weights: str | None, from_scratch: bool, size: int | None, mask: float, store: Store
) -> tuple[MaskedAutoencoder, dict[str, Any]]:
    """The network as it begins, and what its weights will say of themselves."""
    tuned, about = begun(model, weights, from_scratch, size, 0, store)
    net = MaskedAutoencoder(tuned.vit)
    if not 0 < round(net.patches * mask) < net.patches:
        raise VacliError(
            f"--mask {mask} of the {net.patches} patches of {about['size']} pixels: wanted some hidden and some seen; "
            "take another share, or a larger --size"
        )
    if not from_scratch:
        _take_decoder(net, Mae(model, weights).weights)
    about["pretrained_from"] = about.pop("tuned_from")
    about.pop("frozen_blocks")
    return net, about


def _take_decoder(net: MaskedAutoencoder, weights: Path) -> None:
    """The decoder that lies beside the encoder, as in the official full checkpoints; one that does not fit is told."""
    beside = {k: v for k, v in read(weights).items() if k.startswith(("decoder_", "decoder.", "mask_token"))}
    wanted = net.decoder()
    if not beside:
        return
    if {k: v.shape for k, v in beside.items()} == {k: v.shape for k, v in wanted.items()}:
        net.load_state_dict({**net.state_dict(), **beside})
    elif training.rank() == 0:
        tqdm.write(
            f"left out: the decoder in {weights}, which is of another shape than {net.decoder_embed.out_features} wide "
            f"with {len(net.decoder_blocks)} blocks; the encoder goes on with a new one"
        )


# ---- the crops -----------------------------------------------------------------------------------------------


def _gather(
    samples: list[Sample], store: Store, out: Path, choices: Choices, seed: int
) -> tuple[Fetched, torch.Tensor, torch.Tensor]:
    """The crops of all videos in a file; which of them (n,) to train on, and which (m,) to judge by."""
    faces = find_faces(samples, store)
    chosen = draw(faces, "even", choices.frames_per_video, seed, 0)
    crops = fetch(faces, chosen, out.with_suffix(".crops"))
    of = np.array([str(o.sample.video or o.sample.id) for o in faces.outcomes])[faces.video[chosen]]
    named = np.unique(of)  # two people of one video are held out together
    few = max(1, round(HELD_OUT * len(named))) if len(named) > 1 else 0
    apart = np.random.default_rng((seed, _HOLDING_OUT)).permutation(named)[:few]
    judged = np.isin(of, apart)
    train, held_out = (np.flatnonzero(some & crops.seen) for some in (~judged, judged))
    if not len(train):
        raise VacliError(f"no crop to train on could be read; {'; '.join(crops.problems[:1])}")
    return crops, torch.from_numpy(train), torch.from_numpy(held_out)


def find_faces(samples: list[Sample], store: Store) -> Labelled:
    """All frames with a face, or a crop that the data set brings; their labels are NaN, whatever the data set says.

    Raises VacliError where there is no such frame.
    """
    outcomes = extract([replace(s, annotation=None) for s in samples], {}, store, link=False)
    problems = [o.problem for o in outcomes if o.problem]
    outcomes = [o for o in outcomes if o.complete]
    found = [_rows_with_faces(o, store) for o in outcomes]
    if not any(map(len, found)):
        why = problems[0] if problems else "wanted videos of people, or their aligned crops"
        raise VacliError(f"no face to train on in {len(samples)} videos; {why}")
    rows = np.concatenate(found)
    video = np.repeat(np.arange(len(found)), [len(r) for r in found])
    nowhere = np.full(len(rows), np.nan)
    return Labelled(store, outcomes, video, rows, nowhere, np.stack([nowhere] * 2, axis=1), problems)


def _rows_with_faces(outcome: Outcome, store: Store) -> np.ndarray:
    if outcome.sample.crops is not None:
        return np.array(sorted(outcome.sample.crop_files()), np.int64)
    wanted = outcome.tracks["faces"]
    return np.flatnonzero(store.get(wanted.recipe, wanted.media).valid).astype(np.int64)


# ---- training ------------------------------------------------------------------------------------------------


def _fit(
    net: MaskedAutoencoder,
    crops: Fetched,
    train: torch.Tensor,
    held_out: torch.Tensor,
    about: Mapping[str, Any],
    choices: Choices,
    settings: Settings,
    resume: Path,
) -> training.Fitted:
    show = _Shown(crops, about, net.mask_token.device)
    steps = -(-len(train) // choices.batch)
    patches, mask, seed = net.patches, choices.mask, settings.seed

    def batches(epoch: int) -> Iterator[tuple[int, int, torch.Tensor]]:
        generator = torch.Generator().manual_seed(seed_of(seed, epoch, _ORDER))
        order = torch.randperm(len(train), generator=generator)
        for step, rows in enumerate(order.tensor_split(steps)):
            yield epoch, step, train[rows]

    def loss_of(net: nn.Module, batch: tuple[int, int, torch.Tensor]) -> torch.Tensor:
        epoch, step, places = batch
        moved = numbers(len(places), seed_of(seed, epoch, step, _AUGMENTING))
        kept = draw_kept(len(places), patches, mask, seed_of(seed, epoch, step, _MASKING))
        return _mean_loss(net, show, places, kept, moved)

    def judge(net: nn.Module) -> dict[str, float]:
        kept = draw_kept(len(held_out), patches, mask, seed_of(seed, _JUDGING))  # the same in every epoch
        parts = zip(held_out.split(choices.batch), kept.split(choices.batch), strict=True)
        losses = [_mean_loss(net, show, some, seen).double() * len(some) for some, seen in parts]
        return {"score": -float(sum(losses)) / len(held_out)}

    return training.fit(
        net,
        [{**g, "betas": _BETAS} for g in param_groups_weight_decay(net, settings.weight_decay)],
        loss_of,
        batches,
        steps,
        settings,
        resume=resume,
        about={**about, "crops": crops.digest},
        judge=judge if len(held_out) else None,
        desc="pretrain",
    )


class _Shown:
    """What the network is shown of the crops at places (B,): (B, 3, size, size) float32, on the device.

    The pixels are those of extraction: the same crops, the same resize.
    """

    def __init__(self, crops: Fetched, about: Mapping[str, Any], device: torch.device) -> None:
        self._pixels, self._device, self._size = crops.pixels(), device, int(about["size"])
        self._mean, self._std = tuple(about["mean"]), tuple(about["std"])

    def __call__(self, places: torch.Tensor, moved: torch.Tensor | None) -> torch.Tensor:
        crops = torch.from_numpy(self._pixels[places.numpy()]).to(self._device)
        images = resize(crops, self._size)
        if moved is not None:
            images = augment(images, moved, AUGMENTATION)
        return normalise(images, self._mean, self._std)


def _mean_loss(
    net: nn.Module, show: _Shown, places: torch.Tensor, kept: torch.Tensor, moved: torch.Tensor | None = None
) -> torch.Tensor:
    """Over all processes, each of which has its share; what fills up the shares counts for nothing."""
    mine = training.share(places)
    images = show(mine.clamp(min=0), None if moved is None else training.share(moved))
    losses = net(images, training.share(kept).clamp(min=0).to(images.device))
    return training.whole(losses)[: len(places)].mean()
