"""The encoder never sees what is hidden, only that counts in the loss, and what comes out is a ViT as any other."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from vacli import VacliError
from vacli.extract import pretrain as module
from vacli.extract.datasets import find
from vacli.extract.finetune import finetune
from vacli.extract.mae import Mae, build_vit
from vacli.extract.pixels import normalise, resize
from vacli.extract.pretrain import MaskedAutoencoder, draw_kept, patchify, pretrain
from vacli.extract.synthetic import make_puppets
from vacli.extract.weights import EncoderError, save
from vacli.store import Store

FAST = {"model": "test_vit", "from_scratch": True, "size": 32, "epochs": 2, "batch": 16, "lr": 1e-3}
SIZE, PATCH = 64, 16  # 16 patches


@pytest.fixture(scope="module")
def puppets(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("puppets")
    make_puppets(folder, train=2, validation=1, length_s=3, rate_hz=5, processes=1)
    return folder


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "features.zarr", create=True)


@pytest.fixture
def net() -> MaskedAutoencoder:
    torch.manual_seed(0)
    vit = build_vit("test_vit", SIZE)
    module.initialise(vit)
    return MaskedAutoencoder(vit).eval()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def kept(net) -> torch.Tensor:
    return draw_kept(3, net.patches, 0.75, seed=2)


def pixels_of(kept: torch.Tensor) -> torch.Tensor:
    """(B, 1, SIZE, SIZE) bool: where the patches are that are seen."""
    side = SIZE // PATCH
    seen = torch.zeros(len(kept), side * side, dtype=torch.bool).scatter(1, kept, True)
    return seen.view(-1, 1, side, side).repeat_interleave(PATCH, 2).repeat_interleave(PATCH, 3)


# ---- masking -------------------------------------------------------------------------------------------------


def test_three_quarters_of_the_patches_are_hidden_in_every_image_and_others_in_each():
    kept = draw_kept(500, 36, 0.75, seed=0)
    assert kept.shape == (500, 9)
    assert (kept.diff(dim=1) > 0).all()  # none twice
    assert len(kept.unique(dim=0)) == 500
    often = torch.bincount(kept.flatten(), minlength=36) / 500
    assert ((often - 0.25).abs() < 0.1).all()  # five standard deviations
    assert torch.equal(kept, draw_kept(500, 36, 0.75, seed=0))
    assert not torch.equal(kept, draw_kept(500, 36, 0.75, seed=1))


def test_a_patch_is_its_pixels_row_by_row_and_patches_come_row_by_row():
    images = torch.arange(2 * 3 * 4 * 6).view(2, 3, 4, 6)
    patches = patchify(images, 2)
    assert patches.shape == (2, 6, 12)
    expected = [images[1, colour, y, x] for y in (2, 3) for x in (4, 5) for colour in range(3)]
    assert patches[1, 5].tolist() == [int(value) for value in expected]


def test_the_encoder_never_sees_a_hidden_patch(net, images, kept):
    changed = torch.where(pixels_of(kept), images, images + 100)
    assert torch.equal(net.encode(images, kept), net.encode(changed, kept))
    touched = torch.where(pixels_of(kept), images + 100, images)
    assert not torch.allclose(net.encode(images, kept), net.encode(touched, kept))


def test_no_block_works_on_more_than_what_is_seen(net, images, kept):
    lengths = []
    for block in net.vit.blocks:
        block.register_forward_pre_hook(lambda _, tokens: lengths.append(tokens[0].shape[1]))
    net(images, kept)
    assert lengths == [1 + 4] * len(net.vit.blocks)


def test_what_is_seen_keeps_its_position(net, images, kept):
    entering = []
    net.vit.blocks[0].register_forward_pre_hook(lambda _, tokens: entering.append(tokens[0]))
    net.encode(images, kept)
    kernel, bias = net.vit.patch_embed.proj.weight, net.vit.patch_embed.proj.bias
    colours_last = kernel.permute(0, 2, 3, 1).flatten(1)
    plain = patchify(images, PATCH) @ colours_last.T + bias + net.vit.pos_embed[:, 1:]
    for image, seen, tokens in zip(plain, kept, entering[0], strict=True):
        torch.testing.assert_close(tokens[1:], image[seen], rtol=1e-4, atol=1e-5)


def test_what_was_seen_goes_back_to_its_place_among_mask_tokens(net, images, kept):
    entering = []
    net.decoder_blocks[0].register_forward_pre_hook(lambda _, tokens: entering.append(tokens[0]))
    latent = net.encode(images, kept)
    net.decode(latent, kept)
    for tokens, tells, seen in zip(entering[0], net.decoder_embed(latent), kept.tolist(), strict=True):
        plain = [tells[0]]
        plain += [tells[1 + seen.index(n)] if n in seen else net.mask_token[0, 0] for n in range(net.patches)]
        assert torch.equal(tokens, torch.stack(plain) + net.decoder_pos_embed[0])
    assert not net.decoder_pos_embed[0, 0].any()
    assert len(net.decoder_pos_embed[0].unique(dim=0)) == 1 + net.patches


def test_with_nothing_hidden_it_is_maes_own_pass(net, tmp_path):
    about = {"model": "test_vit", "size": SIZE, "mean": [0.5] * 3, "std": [0.25] * 3, "licence": None}
    save(net.vit.state_dict(), about, tmp_path / "same.safetensors")
    crops = np.random.default_rng(0).integers(0, 256, (5, 112, 112, 3), np.uint8)
    images = normalise(resize(torch.from_numpy(crops), SIZE), (0.5,) * 3, (0.25,) * 3)
    everything = torch.arange(net.patches).expand(5, -1)
    with torch.no_grad():
        ours = net.encode(images, everything)[:, 0]
    np.testing.assert_allclose(ours, Mae(weights=str(tmp_path / "same.safetensors"))(crops), atol=1e-5)


# ---- the loss ------------------------------------------------------------------------------------------------


def test_the_loss_is_the_plain_one(net, images, kept):
    """Patch by patch, as the paper has it: over the hidden ones, against pixels normalised within the patch."""
    drawn = net.decode(net.encode(images, kept), kept)
    for i, loss in enumerate(net(images, kept)):
        errors = []
        for n in set(range(net.patches)) - set(kept[i].tolist()):
            y, x = divmod(n, SIZE // PATCH)
            pixels = images[i, :, y * PATCH :, x * PATCH :][:, :PATCH, :PATCH].permute(1, 2, 0).flatten()
            errors.append(((drawn[i, n] - (pixels - pixels.mean()) / pixels.std()) ** 2).mean())
        assert len(errors) == 12
        torch.testing.assert_close(loss, torch.stack(errors).mean(), rtol=1e-4, atol=1e-5)


def test_only_hidden_patches_count(net, images, kept):
    drawn = []

    def keep(_module: object, _given: object, out: torch.Tensor) -> None:
        out.retain_grad()
        drawn.append(out)

    net.decoder_pred.register_forward_hook(keep)
    net(images, kept).sum().backward()
    weight = drawn[0].grad[:, 1:].abs().sum(dim=2)
    seen = torch.zeros_like(weight, dtype=torch.bool).scatter(1, kept, True)
    assert (weight[seen] == 0).all()
    assert (weight[~seen] > 0).all()


def test_how_light_or_flat_a_hidden_patch_is_does_not_matter(net, images, kept):
    lit = torch.where(pixels_of(kept), images, 0.3 * images + 2)
    torch.testing.assert_close(net(lit, kept), net(images, kept), rtol=1e-3, atol=1e-4)


def test_positions_are_not_learnt(net, images, kept):
    net(images, kept).sum().backward()
    still = {name for name, p in net.named_parameters() if p.grad is None}
    assert still == {"vit.pos_embed", "decoder_pos_embed"}


# ---- where it starts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "width"), [("base", 768), ("large", 1024)])
def test_the_official_decoders_have_its_names_and_shapes(model, width):
    with torch.device("meta"):
        ours = MaskedAutoencoder(build_vit(f"vit_{model}_patch16_224.mae", 224)).decoder()
    shapes = {
        "mask_token": (1, 1, 512),
        "decoder_embed.weight": (512, width),
        "decoder_embed.bias": (512,),
        "decoder_pos_embed": (1, 197, 512),
        "decoder_norm.weight": (512,),
        "decoder_norm.bias": (512,),
        "decoder_pred.weight": (768, 512),
        "decoder_pred.bias": (768,),
    }
    linear = {
        "attn.qkv": (1536, 512),
        "attn.proj": (512, 512),
        "mlp.fc1": (2048, 512),
        "mlp.fc2": (512, 2048),
    }
    for block in range(8):
        for name, shape in {**linear, "norm1": (512,), "norm2": (512,)}.items():
            shapes[f"decoder_blocks.{block}.{name}.weight"] = shape
            shapes[f"decoder_blocks.{block}.{name}.bias"] = shape[:1]
    assert {k: tuple(v.shape) for k, v in ours.items()} == shapes


def official(net: MaskedAutoencoder, path: Path) -> Path:
    """A full checkpoint as its makers lay it out: encoder and decoder side by side."""
    state = {f"{k}": v + 0.01 for k, v in net.vit.state_dict().items()}
    torch.save({"model": {**state, **{k: v + 0.01 for k, v in net.decoder().items()}}}, path)
    return path


def test_an_official_checkpoint_brings_encoder_and_decoder(net, store, tmp_path, capsys):
    vit = build_vit("test_vit", 160)  # the size that timm says of it
    path = official(MaskedAutoencoder(vit), tmp_path / "full.pth")
    began, about = module._begin("test_vit", str(path), False, None, 0.75, store)
    theirs = torch.load(path, weights_only=True)["model"]
    ours = {k.removeprefix("vit."): v for k, v in began.state_dict().items()}
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)
    assert about["size"] == 160
    assert len(about["pretrained_from"]) == 64
    assert "left out" not in capsys.readouterr().out


def test_a_decoder_of_another_shape_is_left_out_and_told(store, tmp_path, capsys):
    donor = MaskedAutoencoder(build_vit("test_vit", 160))
    donor.decoder_blocks = donor.decoder_blocks[:2]
    path = official(donor, tmp_path / "full.pth")
    began, _ = module._begin("test_vit", str(path), False, None, 0.75, store)
    theirs = torch.load(path, weights_only=True)["model"]
    assert torch.equal(began.vit.cls_token, theirs["cls_token"])
    assert not torch.equal(began.decoder_pred.weight, theirs["decoder_pred.weight"])
    told = capsys.readouterr().out
    assert f"left out: the decoder in {path}" in told
    assert "64 wide with 4 blocks; the encoder goes on with a new one" in told


def test_a_vit_whose_patches_look_at_each_other_is_refused():
    with pytest.raises(EncoderError, match="wanted a plain ViT"):
        MaskedAutoencoder(build_vit("vit_tiny_r_s16_p8_224", 224))


# ---- a whole run ---------------------------------------------------------------------------------------------


def test_the_file_is_one_that_mae_and_finetune_take(puppets, store, tmp_path):
    out = tmp_path / "faces.safetensors"
    figures = pretrain(find(puppets), store, out, **FAST, note="of puppets")
    mae = Mae(weights=str(out))
    assert (mae.model_name, mae.size, mae.note, mae.licence) == ("test_vit", 32, "of puppets", None)
    assert mae(np.zeros((2, 112, 112, 3), np.uint8)).shape == (2, 64)
    assert load_file(out).keys() == build_vit("test_vit", 32).state_dict().keys()
    with safe_open(out, "pt") as f:
        about = json.loads(f.metadata()["vacli"])
    assert (about["settings"]["mask"], about["seed"], about["loss"]) == (0.75, 0, figures["loss"])
    assert set(tmp_path.iterdir()) == {out, tmp_path / "features.zarr"}
    tuned = tmp_path / "tuned.safetensors"
    finetune(find(puppets), store, tuned, weights=str(out), epochs=1)
    moved = {k for k, v in load_file(out).items() if not torch.equal(v, load_file(tuned)[k])}
    assert {k.split(".")[0] for k in moved} == {"blocks", "norm"}


def test_it_goes_on_from_its_own_file_whose_licence_and_note_travel(puppets, store, tmp_path, capsys):
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    net = build_vit("test_vit", 32)
    about = {"model": "test_vit", "size": 32, "mean": [0.5] * 3, "std": [0.5] * 3}
    save(net.state_dict(), about | {"licence": "cc-by-nc-4.0", "note": "of strangers"}, first)
    pretrain(find(puppets), store, second, weights=str(first), epochs=1, batch=32)
    with safe_open(second, "pt") as f:
        told = json.loads(f.metadata()["vacli"])
    assert {k: told[k] for k in about} == about
    assert (told["licence"], told["note"]) == ("cc-by-nc-4.0", "of strangers")
    assert told["pretrained_from"] == hashlib.sha256(first.read_bytes()).hexdigest()
    assert told["settings"]["lr"] == 1.5e-4 / 8  # the paper's, for an eighth of the batch
    still = {k for k, v in load_file(second).items() if torch.equal(v, net.state_dict()[k])}
    assert still == {"pos_embed"}
    assert "left out" not in capsys.readouterr().out


def test_it_learns_to_draw_what_is_hidden(puppets, store, tmp_path):
    """1 is what one gets who knows each patch's mean colour, and how much it varies, but not what is in it."""
    figures = pretrain(find(puppets), store, tmp_path / "a.safetensors", **FAST | {"epochs": 8, "lr": 4e-3})
    assert figures["loss"] < 0.9
    assert figures["train_loss"] < 0.9


def test_interrupted_and_called_again_it_comes_to_the_same_bytes(puppets, store, tmp_path, monkeypatch):
    whole, cut = tmp_path / "whole.safetensors", tmp_path / "cut.safetensors"
    how = FAST | {"epochs": 4}
    figures = pretrain(find(puppets), store, whole, **how)
    fit = module._mean_loss
    calls = []

    def stop(*given: object) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 7:  # two batches and two looks at the held-out crops each epoch
            raise KeyboardInterrupt
        return fit(*given)

    with monkeypatch.context() as patch:
        patch.setattr(module, "_mean_loss", stop)
        with pytest.raises(KeyboardInterrupt):
            pretrain(find(puppets), store, cut, **how)
    assert not cut.exists()
    assert pretrain(find(puppets), store, cut, **how) == figures
    assert cut.read_bytes() == whole.read_bytes()
    assert not list(tmp_path.glob("cut.[!s]*"))


def test_two_processes_learn_what_one_does(puppets, store, tmp_path, monkeypatch):
    """A real torchrun, on an odd number of crops a batch, so that a share is filled up; equal but for sums' order."""
    how = FAST | {"epochs": 1}
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    batches = []
    loss = module._mean_loss

    def told_of(net: object, show: object, places: torch.Tensor, *more: object) -> torch.Tensor:
        batches.extend([places] if len(more) == 2 else [])  # augmented: it is trained on
        return loss(net, show, places, *more)

    monkeypatch.setattr(module, "_mean_loss", told_of)
    figures = pretrain(find(puppets), store, one, **how)
    assert len(batches) == 2
    assert all(len(places) % 2 for places in batches)
    script = tmp_path / "team.py"
    script.write_text(
        "import json, sys\n"
        "from pathlib import Path\n"
        "from vacli.extract.datasets import find\n"
        "from vacli.extract.pretrain import pretrain\n"
        "from vacli.store import Store\n"
        "data, out, store, how = sys.argv[1:]\n"
        "print(json.dumps(pretrain(find(data), Store(store), Path(out), **json.loads(how))))\n"
    )
    args = [str(script), str(puppets), str(two), str(store.path), json.dumps(how)]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *args],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert told[0] == told[1] == pytest.approx(figures, abs=1e-3)
    of_two = load_file(two)
    for name, of_one in load_file(one).items():
        torch.testing.assert_close(of_two[name], of_one, rtol=1e-3, atol=1e-3)


def test_labels_are_not_looked_at(puppets, store, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(puppets, data)
    for annotation in (data / "annotations").rglob("*.txt"):
        annotation.write_text("valence,arousal\nnot a number\n")
    outs = [tmp_path / f"{name}.safetensors" for name in "ab"]
    figures = [pretrain(find(d), store, o, **FAST) for d, o in zip((puppets, data), outs, strict=True)]
    assert figures[0] == figures[1]
    assert outs[0].read_bytes() == outs[1].read_bytes()


def test_a_video_is_held_out_whole_with_all_its_people(puppets, store, tmp_path):
    samples = find(puppets)
    two = [replace(s, id=f"{s.id}_left") for s in samples]
    choices = module.Choices(0.75, 4, 16)
    crops, train, held_out = module._gather(samples + two, store, tmp_path / "a.safetensors", choices, 0)
    assert len(crops.seen) == 6 * 4
    assert sorted([*train.tolist(), *held_out.tolist()]) == list(range(24))
    people = np.repeat([s.video for s in samples + two], 4)
    assert len(held_out) == 8
    assert not set(people[train.numpy()]) & set(people[held_out.numpy()])
    other = {str(module._gather(samples, store, tmp_path / "a", choices, seed)[2]) for seed in range(8)}
    assert len(other) > 1


def test_one_video_without_crops_or_labels_will_do(puppets, store, tmp_path):
    video = find(puppets / "batch1" / "puppet_train_00.mp4")
    assert video[0].crops is None
    figures = pretrain(video, store, tmp_path / "a.safetensors", **FAST)
    assert figures["loss"] == figures["train_loss"] > 0


def test_without_a_face_there_is_one_clear_error(store, tmp_path):
    (tmp_path / "clip.mp4").write_text("not a film")
    with pytest.raises(VacliError, match=r"no face to train on in 1 videos; .*clip\.mp4: cannot be read"):
        pretrain(find(tmp_path / "clip.mp4"), store, tmp_path / "a.safetensors", **FAST)
    assert not (tmp_path / "a.safetensors").exists()


@pytest.mark.parametrize(
    ("how", "complaint"),
    [
        ({"epochs": 0}, "epochs 0: wanted at least 1"),
        ({"frames_per_video": 0}, "--frames-per-video 0 --batch 16: wanted at least 1 of each"),
        ({"mask": 1.0}, "--mask 1.0: wanted a share of the patches in (0, 1)"),
        ({"mask": 0.01}, "--mask 0.01 of the 4 patches of 32 pixels: wanted some hidden and some seen"),
        ({"from_scratch": False, "weights": "none.pth"}, "no weights at"),
        ({"out": Path("a.pth")}, "--out a.pth: weights are written as .safetensors"),
    ],
)
def test_what_cannot_be_done_is_told_before_anything_is_learnt(how, complaint, puppets, store, tmp_path):
    with pytest.raises(VacliError) as caught:
        pretrain(find(puppets), store, **{"out": tmp_path / "a.safetensors", **FAST, **how})
    assert complaint in str(caught.value)
