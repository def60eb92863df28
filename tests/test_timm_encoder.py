"""Any timm model by name gives what timm itself gives, from every layout of its weights; one pass for all outputs."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from vacli import VacliError
from vacli.extract import timm_encoder
from vacli.extract.encoder import encode, make_encoders, pass_key
from vacli.extract.timm_encoder import Timm, load, salient
from vacli.extract.weights import EncoderError
from vacli.store import Fingerprints

VIT = "test_vit.r160_in1k"  # CLS, six blocks
AVERAGED = "test_vit2.r160_in1k"  # no CLS, one register token, pooled by the mean
CONVOLUTIONS = "test_efficientnet.r160_in1k"  # its map is (B, D, H, W)
SWIN = "swin_tiny_patch4_window7_224.ms_in1k"  # its map is (B, H, W, D)


def network(model: str, **options) -> torch.nn.Module:
    """With weights that say something: a fresh timm head is zeros in places."""
    torch.manual_seed(7)
    made = timm.create_model(model, **options).eval()
    with torch.no_grad():
        for entry in made.state_dict().values():
            if entry.is_floating_point() and entry.ndim:
                entry.add_(0.02 * torch.rand_like(entry))
    return made


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    """Weights with their classifier, as they are published."""
    folder = tmp_path_factory.mktemp("timm")
    paths = {model: str(folder / f"{model}.safetensors") for model in (VIT, AVERAGED, CONVOLUTIONS, SWIN)}
    for model, path in paths.items():
        save_file({k: v.contiguous() for k, v in network(model).state_dict().items()}, path)
    return paths


@pytest.fixture
def crops() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (2, 112, 112, 3), np.uint8)


def encoder(files: dict[str, str], model: str = VIT, output: str = "pooled", **options) -> Timm:
    return Timm(model, files[model], output, dtype="float32", device="cpu", **options)


def images(made: Timm, crops: np.ndarray) -> torch.Tensor:
    """The preprocessing written out: torch's antialiased bicubic, then the model's own mean and deviation."""
    pixels = torch.from_numpy(crops).permute(0, 3, 1, 2)
    sized = torch.nn.functional.interpolate(pixels, size=(made.size,) * 2, mode="bicubic", antialias=True)
    config = timm.get_pretrained_cfg(made.model_name)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (config.mean, config.std))
    return (sized / 255 - mean) / std


# ---- outputs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [VIT, AVERAGED, CONVOLUTIONS, SWIN])
def test_pooled_is_what_timm_itself_gives_without_a_classifier(model, files, crops):
    made = encoder(files, model)
    own = timm.create_model(
        model, pretrained=True, num_classes=0, pretrained_cfg_overlay={"file": files[model]}
    )
    with torch.inference_mode():
        want = own.eval()(images(made, crops)).numpy()
    got = made(crops)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want, atol=1e-4)
    assert got.shape == (2, made.dim)


@pytest.mark.parametrize(
    ("model", "patches"), [(VIT, 100), (AVERAGED, 100), (CONVOLUTIONS, 25), (SWIN, 49)], ids=lambda v: str(v)
)
def test_tokens_are_the_places_of_the_picture_and_their_mean_is_mean(model, patches, files, crops):
    found = encoder(files, model).encode(crops, ["tokens", "mean", "tokens:3"])
    first = int(model == VIT)  # CLS
    assert found["tokens"].shape[:2] == (2, first + patches)
    np.testing.assert_allclose(found["tokens"][:, first:].mean(1), found["mean"], atol=1e-5)
    assert found["tokens:3"].shape == (2, 4, found["mean"].shape[1])
    lead = found["tokens"][:, 0] if first else found["mean"]
    np.testing.assert_allclose(found["tokens:3"][:, 0], lead, atol=1e-6)


@pytest.mark.parametrize("model", [CONVOLUTIONS, SWIN])
def test_the_mean_of_the_map_is_what_such_a_model_pools(model, files, crops):
    found = encoder(files, model).encode(crops, ["pooled", "mean"])
    np.testing.assert_allclose(found["pooled"], found["mean"], atol=1e-5)


@pytest.mark.parametrize("model", [VIT, CONVOLUTIONS, SWIN])
def test_tokens_lie_row_by_row(model, files):
    """What changes with a mark in the upper right corner is the last token of the first row more than any other."""
    plain = np.full((1, 160, 160, 3), 128, np.uint8)
    marked = plain.copy()
    marked[:, :20, -20:] = np.random.default_rng(0).integers(0, 256, (1, 20, 20, 3))
    made = encoder(files, model)
    first = int(model == VIT)
    change = np.abs(made.encode(marked, ["tokens"])["tokens"] - made.encode(plain, ["tokens"])["tokens"])
    change = change[0, first:].sum(-1)
    assert change.argmax() == int(np.sqrt(len(change))) - 1


def test_register_tokens_are_left_out(files, crops, monkeypatch):
    with_registers = network("test_vit", reg_tokens=4, num_classes=0)
    monkeypatch.setattr(timm_encoder, "build", lambda *_: with_registers)
    monkeypatch.setattr(timm_encoder, "load", lambda *_: None)
    made = encoder(files)
    found = made.encode(crops, ["tokens", "cls", "mean"])
    with torch.inference_mode():
        last = with_registers.forward_features(images(made, crops)).numpy()
    assert last.shape[1] == 1 + 4 + 100
    np.testing.assert_allclose(found["tokens"], np.delete(last, [1, 2, 3, 4], axis=1), atol=1e-5)
    np.testing.assert_allclose(found["mean"], last[:, 5:].mean(1), atol=1e-5)


def test_an_inner_block_is_what_a_hook_sees_there(files, crops):
    made = encoder(files, output="block:4")
    seen = []
    handle = made._network.blocks[3].register_forward_hook(lambda *a: seen.append(a[2][:, 0]))
    got = made(crops)
    handle.remove()
    assert np.array_equal(got, seen[0].numpy())
    assert not np.allclose(got, encoder(files, output="cls")(crops), atol=1e-2)


def test_one_pass_gives_all_outputs_bit_for_bit(files, crops, monkeypatch):
    outputs = ["pooled", "cls", "mean", "tokens", "tokens:16", "block:2", "block:5"]
    alone = {output: encoder(files, output=output)(crops) for output in outputs}
    made = encoder(files)
    passes = []
    made._network.patch_embed.register_forward_hook(lambda *_: passes.append(1))
    found = made.encode(crops, outputs)
    assert len(passes) == 1
    assert list(found) == outputs
    for output in outputs:
        assert np.array_equal(found[output], alone[output]), output


def test_encoders_that_differ_in_nothing_but_the_output_share_a_network(files, crops, monkeypatch):
    built = []
    monkeypatch.setattr(timm_encoder, "load", lambda *a: (built.append(1), load(*a)))
    given = {"weights": files[VIT], "dtype": "float32", "device": "cpu"}
    encoders = make_encoders(
        [f"timm:{VIT}", f"other=timm:{VIT}"],
        {
            VIT: {**given, "output": "cls,mean,tokens:4"},
            "other": {**given, "size": "96"},
        },
        Fingerprints(),
    )
    assert [*encoders] == [VIT, f"{VIT}.mean", f"{VIT}.tokens4", "other"]
    three, other = [*encoders.values()][:3], encoders["other"]
    assert len({pass_key(e) for e in three}) == 1
    assert pass_key(other) not in {pass_key(e) for e in three}
    found = encode(three, crops)
    assert [f.shape for f in found] == [(2, 64), (2, 64), (2, 5, 64)]
    other(crops)
    assert len(built) == 2
    assert len({json.dumps(e.recipe()) for e in encoders.values()}) == 4


def test_salient_is_the_plain_search():
    random = np.random.default_rng(3)
    patches = random.integers(-2, 3, (4, 20, 3)).astype(np.float32)  # whole numbers, so that there are ties
    first = random.integers(-2, 3, (4, 1, 3)).astype(np.float32)
    for count in (1, 7, 20):
        got = salient(torch.from_numpy(patches), torch.from_numpy(first), count).numpy()
        for row, lead, found in zip(patches, first, got, strict=True):
            ranked = sorted(range(20), key=lambda i: (-float(row[i] @ lead[0]), i))
            assert np.array_equal(found, row[sorted(ranked[:count])])


@pytest.mark.parametrize(
    ("model", "output", "complaint"),
    [
        (CONVOLUTIONS, "cls", "has no CLS token"),
        (AVERAGED, "block:1", "has no CLS token"),
        (VIT, "block:7", "test_vit.r160_in1k has 6 blocks"),
        (VIT, "tokens:101", "has 100 patch tokens"),
    ],
)
def test_an_output_that_a_model_has_not_stops_the_run(model, output, complaint, files, crops):
    with pytest.raises(EncoderError, match=complaint) as caught:
        encoder(files, model, output)(crops)
    assert caught.value.fatal


@pytest.mark.parametrize(
    "output", ["clss", "tokens:", "tokens:many", "block", "block:0", "block:-1", "mean:2"]
)
def test_an_output_that_no_model_has_is_refused_at_once(output, files):
    with pytest.raises(
        EncoderError, match=r"timm.output is .*; wanted pooled, cls, mean, tokens, tokens:N, block:N"
    ):
        encoder(files, output=output)


# ---- weights -------------------------------------------------------------------------------------------------


def changed(path: str, tmp_path: Path, change) -> str:
    from safetensors.torch import load_file

    state = load_file(path)
    change(state)
    save_file(state, tmp_path / "changed.safetensors")
    return str(tmp_path / "changed.safetensors")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda s: s.pop("blocks.3.attn.qkv.bias"), "missing blocks.3.attn.qkv.bias"),
        (lambda s: s.update({"blocks.6.norm1.bias": torch.zeros(64)}), "unexpected blocks.6.norm1.bias"),
        (lambda s: s.update({"norm.weight": torch.zeros(65)}), r"norm.weight is \(65,\), wanted \(64,\)"),
        (lambda s: s.update({"neck.weight": torch.zeros(65)}), "unexpected neck.weight"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(change, complaint, files, crops, tmp_path):
    path = changed(files[VIT], tmp_path, change)
    with pytest.raises(EncoderError, match=complaint):
        Timm(VIT, path, device="cpu")(crops)


def test_a_classifier_in_the_file_changes_nothing(files, crops, tmp_path):
    path = changed(files[VIT], tmp_path, lambda s: [s.pop("head.weight"), s.pop("head.bias")])
    assert np.array_equal(Timm(VIT, path, dtype="float32", device="cpu")(crops), encoder(files)(crops))


def small_clip() -> torch.nn.Module:
    return network(
        "vit_base_patch16_clip_224", embed_dim=64, depth=2, num_heads=2, img_size=32, num_classes=0
    )


def as_clip(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Names of OpenAI's CLIP, with pieces of its text tower beside them."""
    named = {}
    for name, value in state.items():
        for ours, theirs in (
            ("patch_embed.proj", "conv1"),
            ("norm_pre", "ln_pre"),
            ("blocks.", "transformer.resblocks."),
            ("norm1", "ln_1"),
            ("norm2", "ln_2"),
            ("attn.qkv.", "attn.in_proj_"),
            ("attn.proj", "attn.out_proj"),
            ("mlp.fc1", "mlp.c_fc"),
            ("mlp.fc2", "mlp.c_proj"),
        ):
            name = name.replace(ours, theirs)
        name = "ln_post" + name[4:] if name.startswith("norm.") else name
        if name == "cls_token":
            name, value = "class_embedding", value[0, 0]
        elif name == "pos_embed":
            name, value = "positional_embedding", value[0]
        named[f"visual.{name}"] = value
    text = {"token_embedding.weight": torch.zeros(5, 8), "logit_scale": torch.zeros(())}
    return {**named, **text, "visual.proj": torch.zeros(64, 8)}


def as_dinov2(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {**state, "mask_token": torch.zeros(1, 64)}


def small_dinov2() -> torch.nn.Module:
    return network("vit_small_patch14_dinov2", embed_dim=64, depth=2, num_heads=2, img_size=28, num_classes=0)


def small_swin() -> torch.nn.Module:
    return network(
        "swin_tiny_patch4_window7_224",
        embed_dim=16,
        depths=(1, 1, 1, 1),
        num_heads=(1, 1, 2, 2),
        num_classes=0,
    )


def as_swin(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Microsoft's names: what merges patches stands at the end of a stage, and masks are kept."""
    named = {
        "layers.0.blocks.0.attn.relative_position_index": torch.zeros(49, 49),
        "head.weight": torch.zeros(9, 128),
        "head.bias": torch.zeros(9),
    }
    for name, value in state.items():
        stage, _, rest = name.partition(".downsample")
        named[f"layers.{int(stage[-1]) - 1}.downsample{rest}" if rest else name] = value
    return named


@pytest.mark.parametrize(
    ("make", "originally", "wrapped", "model", "pixels"),
    [
        (small_clip, as_clip, None, "vit_base_patch16_clip_224.openai", 32),
        (small_dinov2, as_dinov2, None, "vit_small_patch14_dinov2.lvd142m", 28),
        (small_swin, as_swin, "model", "swin_tiny_patch4_window7_224.ms_in1k", 224),
    ],
    ids=["clip", "dinov2", "swin"],
)
def test_the_layouts_of_the_makers_load_as_timms(make, originally, wrapped, model, pixels, tmp_path):
    filled = make()
    state = originally(filled.state_dict())
    assert state.keys() != filled.state_dict().keys()
    torch.save({wrapped: state} if wrapped else state, tmp_path / "original.pth")
    empty = make()
    with torch.no_grad():
        for parameter in empty.parameters():
            parameter.zero_()
    load(empty, model, tmp_path / "original.pth")
    x = torch.randn(1, 3, pixels, pixels, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(empty(x), filled(x))


def test_another_size_resamples_the_positions_as_timm_does(files, crops):
    made = encoder(files, output="cls", size="96")
    assert made.recipe()["size"] == 96
    overlay = {"file": files[VIT]}
    own = timm.create_model(VIT, pretrained=True, num_classes=0, img_size=96, pretrained_cfg_overlay=overlay)
    with torch.inference_mode():
        want = own.eval()(images(made, crops)).numpy()
    np.testing.assert_allclose(made(crops), want, atol=1e-4)
    assert encoder(files, CONVOLUTIONS, "tokens", size=96)(crops).shape == (2, 9, 256)
    with pytest.raises(EncoderError, match=r"cannot be built for 50 pixels: .*divisible.*its own size, 160"):
        encoder(files, size=50)(crops)
    for nonsense in ("wide", "-3"):
        with pytest.raises(EncoderError, match=f"timm.size is '{nonsense}'; wanted a number of pixels"):
            encoder(files, size=nonsense)


def test_absent_weights_are_told_at_once_with_the_file_and_its_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VACLI_WEIGHTS", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    began = time.perf_counter()
    for model, source, place in (
        ("vit_base_patch16_clip_224.openai", "huggingface.co/timm/vit_base_patch16_clip_224.openai", None),
        (
            "gcvit_tiny.in1k",
            "github.com/rwightman/pytorch-image-models",
            "gcvit_tiny_224_nvidia-ac783954.pth",
        ),
    ):
        with pytest.raises(EncoderError) as caught:
            Timm(model)
        text = str(caught.value)
        assert source in text
        assert f"weights/{place or model + '.safetensors'}" in text
        assert f"-o {model}.weights=FILE" in text
    assert time.perf_counter() - began < 5


@pytest.mark.parametrize("file", [f"{VIT}.safetensors", f"{VIT}.pth"])
def test_weights_in_their_folder_are_found(file, files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VACLI_WEIGHTS", str(tmp_path / "elsewhere"))
    (tmp_path / "elsewhere").mkdir()
    save_file({}, tmp_path / "elsewhere" / file)
    assert Timm(VIT).weights == tmp_path / "elsewhere" / file


def test_a_licence_that_sets_conditions_is_told(tmp_path):
    save_file({}, tmp_path / "any.safetensors")
    file = str(tmp_path / "any.safetensors")
    assert Timm("vit_base_patch16_clip_224.openai", file).licence is None
    assert "not for commercial use" in str(Timm("vit_base_patch16_224.mae", file).licence)
    assert "dinov3-license" in str(Timm("vit_small_patch16_dinov3.lvd1689m", file).licence)
    assert "ask their makers" in str(Timm("csatv2.r512_in1k", file).licence)


def test_mistaken_models_are_told(files, tmp_path):
    save_file({}, tmp_path / "any.safetensors")
    for options, complaint in (
        ({}, r"timm of which model\? wanted one, as timm:vit_base_patch16_clip_224.openai"),
        ({"weights": str(tmp_path / "any.safetensors")}, "timm of which model"),
        ({"model": "vit_gigantic"}, "timm knows no model 'vit_gigantic'"),
        ({"model": "vit_base_patch16_sapiens2.fb", "weights": files[VIT]}, "takes 3x1024x768"),
        ({"model": VIT, "weights": str(tmp_path / "none.pth")}, "no weights at"),
    ):
        with pytest.raises(VacliError, match=complaint):
            Timm(**options)


def test_tuned_weights_say_their_model_and_pixels_themselves(tmp_path, crops):
    about = {"model": "test_vit", "size": 32, "mean": [0.5] * 3, "std": [0.5] * 3, "licence": None}
    made = network("test_vit", num_classes=0, img_size=32)
    save_file(made.state_dict(), tmp_path / "own.safetensors", metadata={"vacli": json.dumps(about)})
    own = Timm(weights=str(tmp_path / "own.safetensors"), dtype="float32", device="cpu")
    assert (own.model_name, own.size, own.licence) == ("test_vit", 32, None)
    assert own(crops).shape == (2, 64)


# ---- recipes -------------------------------------------------------------------------------------------------


def test_the_recipe_says_the_models_own_preprocessing_and_builds_nothing(files, monkeypatch):
    monkeypatch.setattr(timm_encoder, "build", lambda *_: pytest.fail("built a model"))
    recipe = encoder(files, output="tokens:016").recipe()
    config = timm.get_pretrained_cfg(VIT)
    assert (recipe["size"], recipe["mean"], recipe["std"]) == (160, list(config.mean), list(config.std))
    assert "16 patch tokens of the largest dot product" in recipe["output"]
    assert recipe == encoder(files, output="tokens:16").recipe()
    for output in ("pooled", "cls", "mean", "tokens", "tokens:2", "block:2", "block:3"):
        made = encoder(files, output=output)
        assert Timm(**made.options()).recipe() == made.recipe() != recipe
