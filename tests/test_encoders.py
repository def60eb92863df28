"""Log-mel equals VGGish's front end however the sound is cut; a ViT's weights load in every layout or say why not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from vacli.extract import device as device_module
from vacli.extract import logmel
from vacli.extract import mae as mae_module
from vacli.extract.logmel import LogMel, log_mel, mel_filterbank
from vacli.extract.mae import Mae, build_vit, load_encoder
from vacli.extract.pixels import normalise, resize
from vacli.extract.timm_encoder import Published
from vacli.extract.weights import EncoderError

from .conftest import SHARED

DATA = Path(__file__).parent / "data"
RATE_HZ = 16000
MODEL, SIZE = "test_vit", 32


# ---- log-mel -------------------------------------------------------------------------------------------------


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-0.5, 0.5, round(seconds * RATE_HZ)).astype(np.float32)


def test_log_mel_equals_the_front_end_of_vggish():
    golden = np.load(DATA / "logmel.npz")
    got = log_mel(golden["waveform"], RATE_HZ)
    assert got.shape == golden["log_mel"].shape
    np.testing.assert_allclose(got, golden["log_mel"], atol=1e-4)
    track = LogMel()([golden["waveform"]])
    np.testing.assert_allclose(track.values, golden["log_mel"], atol=4e-3)  # stored as float16


@pytest.mark.parametrize("band", [0, 5, 20, 40, 63])
def test_a_tone_lands_in_its_mel_band(band):
    mels = np.linspace(*(1127 * np.log1p(hz / 700) for hz in (125.0, 7500.0)), 66)
    tone_hz = 700 * np.expm1(mels[band + 1] / 1127)
    tone = 0.5 * np.sin(2 * np.pi * tone_hz * np.arange(RATE_HZ) / RATE_HZ).astype(np.float32)
    loudest = LogMel()([tone]).values.argmax(axis=1)
    assert np.abs(loudest - band).max() <= 1  # the lowest bands are narrower than a bin


def test_the_filterbank_leaves_out_what_is_not_heard():
    bank = mel_filterbank(RATE_HZ, 512)
    hz = np.arange(257) * RATE_HZ / 512
    assert (bank[(hz <= 125) | (hz >= 7500)] == 0).all()
    assert (bank >= 0).all()
    assert (bank.max(axis=0) > 0).all()


@pytest.mark.parametrize("pieces", [[1], [160], [399, 1, 2], [1024], [5000, 1], [40_000]])
def test_the_cut_of_the_blocks_changes_nothing(pieces, monkeypatch):
    monkeypatch.setattr(logmel, "_BLOCK_ROWS", 30)  # so that the blocks of one pass are crossed many times
    sound = noise(2.5)
    whole = LogMel()([sound])
    lengths = np.resize(pieces, len(sound))
    cut = np.split(sound, np.cumsum(lengths)[np.cumsum(lengths) < len(sound)])
    assert len(cut) > 1 or pieces == [40_000]
    got = LogMel()(cut)
    assert np.array_equal(got.values, whole.values)
    assert np.array_equal(got.times_s, whole.times_s)


def test_passes_of_a_minute_join_without_a_seam():
    sound = noise(61.0)
    values = LogMel()(np.array_split(sound, 97)).values
    assert len(values) == 1 + (len(sound) - 400) // 160
    rows = slice(5980, 6020)
    around = log_mel(sound[rows.start * 160 : (rows.stop - 1) * 160 + 400], RATE_HZ)
    np.testing.assert_allclose(values[rows], around, atol=4e-3)


def test_a_row_is_the_middle_of_the_25_ms_it_saw():
    click = np.zeros(RATE_HZ, np.float32)
    click[round(0.5 * RATE_HZ)] = 1.0
    track = LogMel()([click])
    np.testing.assert_allclose(np.diff(track.times_s), 0.010)
    assert track.times_s[0] == 0.0125
    heard = track.times_s[track.values.max(axis=1) > track.values.min() + 1]
    assert np.abs(heard - 0.5).max() <= 0.0125


def test_silence_is_finite_and_no_sound_is_an_empty_track():
    silent = LogMel()([np.zeros(RATE_HZ, np.float32)])
    np.testing.assert_allclose(silent.values, np.log(0.01), atol=4e-3)
    for sound in ([], [np.zeros(0, np.float32)], [np.zeros(399, np.float32)]):
        track = LogMel()(sound)
        assert track.values.shape == (0, 64)
        assert track.values.dtype == np.float16


# ---- a ViT and its weights -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vit() -> torch.nn.Module:
    torch.manual_seed(1)
    return build_vit(MODEL, SIZE).eval()


@pytest.fixture
def crops() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (3, 112, 112, 3), np.uint8)


def described(path: Path, state: dict[str, torch.Tensor], **about: object) -> str:
    save_file(state, path, metadata={"vacli": json.dumps({"model": MODEL, "size": SIZE, **about})})
    return str(path)


@pytest.fixture
def made_for(monkeypatch):
    """Has timm say that test_vit takes SIZE pixels, for weights that do not say it themselves."""
    from vacli.extract import mae

    config = mae.pretrained_config(MODEL)
    config.input_size = (3, SIZE, SIZE)
    monkeypatch.setattr(mae, "pretrained_config", lambda _: config)


def test_every_layout_of_the_weights_gives_the_same_cls(vit, crops, made_for, tmp_path):
    state = vit.state_dict()
    decoder = {"mask_token": torch.zeros(1, 1, 8), "decoder_pos_embed": torch.zeros(1, 5, 8)}
    decoder |= {"decoder_blocks.0.attn.qkv.weight": torch.zeros(24, 8), "decoder_pred.bias": torch.zeros(9)}
    head = {"head.weight": torch.zeros(7, 64), "head.bias": torch.zeros(7)}
    files = [
        tmp_path / name
        for name in ("timm.safetensors", "plain.pth", "mae.pth", "tuned.pth", "own.safetensors")
    ]
    save_file(state, files[0])
    torch.save(state, files[1])
    torch.save({"model": {**state, **decoder}}, files[2])
    torch.save({"state_dict": {**state, **head}, "epoch": 3}, files[3])
    described(files[4], state)
    with torch.inference_mode():
        mae = Mae(MODEL, str(files[0]))
        wanted = vit.forward_features(normalise(resize(torch.from_numpy(crops), SIZE), mae.mean, mae.std))[
            :, 0
        ]
    for file in files:
        got = Mae(MODEL, str(file), dtype="float32", device="cpu")(crops)
        assert got.shape == (3, 64)
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, wanted, atol=1e-5, err_msg=str(file))


def test_bfloat16_is_near_float32(vit, crops, tmp_path):
    file = described(tmp_path / "a.safetensors", vit.state_dict())
    full, half = (Mae(weights=file, dtype=dtype)(crops) for dtype in ("float32", "bfloat16"))
    assert 0 < np.abs(full - half).max() < 0.1 * np.abs(full).max()


def test_weights_that_do_not_fit_are_named_key_by_key(vit, crops, tmp_path):
    state = vit.state_dict()
    without = {k: v for k, v in state.items() if k != "norm.weight"}
    wrong = {**state, "cls_token": torch.zeros(1, 1, 3)}
    for broken, complaint in (
        (without, "missing norm.weight"),
        ({**state, "extra.bias": torch.zeros(2)}, "unexpected extra.bias"),
        (wrong, "cls_token is (1, 1, 3), wanted (1, 1, 64)"),
        ({}, "and 75 more"),
    ):
        mae = Mae(weights=described(tmp_path / "a.safetensors", broken))
        with pytest.raises(EncoderError) as caught:
            mae(crops)
        assert complaint in str(caught.value)
        assert "do not fit the encoder" in str(caught.value)
        assert caught.value.fatal


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickle_with_code_is_refused_and_not_run(vit, crops, tmp_path):
    bomb = Bomb(tmp_path / "boom")
    for name, content in (("a.pth", bomb), ("b.pth", {"model": {"cls_token": bomb}})):
        torch.save(content, tmp_path / name)
        with pytest.raises(EncoderError, match=r"refused weights .* could run code") as caught:
            load_encoder(vit, tmp_path / name)
        assert "\n" not in str(caught.value)
        assert "weights_only" not in str(caught.value)
    assert not (tmp_path / "boom").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.safetensors", b"no weights"), ("a.safetensors", b""), ("a.pth", b"hello there"), ("a.pth", b""),
     ("a.pth", b"PK\x03\x04 a broken zip")],
)  # fmt: skip
def test_a_broken_file_of_weights_is_one_line(name, content, vit, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(EncoderError, match=r"(cannot read|refused) weights .*; wanted") as caught:
        load_encoder(vit, Mae(MODEL, str(tmp_path / name)).weights)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [[1, 2], {"model": 3}, {"a": "text"}, {3: torch.zeros(1)}])
def test_a_pth_without_a_state_dict_is_refused(content, vit, tmp_path):
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(EncoderError, match="hold no state dict of tensors"):
        load_encoder(vit, tmp_path / "a.pth")


def test_absent_weights_fail_at_once_and_say_what_to_get_and_where_to_put_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("vacli.extract.weights.WEIGHTS_DIR", "NOT_SET")
    start = time.monotonic()
    with pytest.raises(EncoderError) as caught:
        Mae()
    assert time.monotonic() - start < 2
    for part in (
        "https://huggingface.co/timm/vit_large_patch16_224.mae",
        "weights/vit_large_patch16_224.mae.safetensors",
        "-o mae.weights=FILE",
    ):
        assert part in str(caught.value)
    with pytest.raises(EncoderError, match=r"no weights at .*none\.pth"):
        Mae(weights="none.pth")


def test_hugging_faces_layout_gives_what_its_own_model_gives(crops, tmp_path, made_for):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(3)
    decoder = {f"decoder_{k}": 2 for k in ("num_hidden_layers", "num_attention_heads")}
    sizes = {"hidden_size": 64, "num_hidden_layers": 6, "num_attention_heads": 2, "intermediate_size": 192}
    sizes |= {"decoder_hidden_size": 32, "decoder_intermediate_size": 32, "image_size": SIZE}
    epsilon = (
        1e-6  # the authors' and timm's; theirs is 1e-12, which tells only where tokens are as small as here
    )
    config = transformers.ViTMAEConfig(**sizes, **decoder, mask_ratio=0.0, layer_norm_eps=epsilon)
    theirs = transformers.ViTMAEForPreTraining(config).eval()
    transformers.utils.logging.disable_progress_bar()
    theirs.save_pretrained(tmp_path)
    transformers.utils.logging.enable_progress_bar()
    mae = Mae(MODEL, str(tmp_path / "model.safetensors"), dtype="float32")
    with torch.inference_mode():
        images = normalise(resize(torch.from_numpy(crops), SIZE), mae.mean, mae.std)
        want = theirs.vit(images).last_hidden_state[:, 0].numpy()
    np.testing.assert_allclose(mae(crops), want, atol=1e-5)


def test_weights_of_another_size_are_told_clearly(crops, tmp_path):
    """A base model's file where the large one was asked for: which it is, and what to say."""
    state = {"cls_token": torch.zeros(1, 1, 768), "pos_embed": torch.zeros(1, 197, 768)}
    state |= {f"blocks.{n}.norm1.bias": torch.zeros(768) for n in range(12)}
    torch.save({"model": state}, tmp_path / "mae_pretrain_vit_base.pth")
    with torch.device("meta"):
        large = build_vit("vit_large_patch16_224.mae", 224)
    with pytest.raises(EncoderError) as caught:
        load_encoder(large, tmp_path / "mae_pretrain_vit_base.pth")
    for part in (
        "they are of a ViT 768 wide with 12 blocks, as vit_base_patch16_224.mae is",
        "name the model they were made for with -o mae.model=NAME",
        "blocks.0.norm1.bias is (768,), wanted (1024,)",
    ):
        assert part in str(caught.value)


def test_every_output_has_a_recipe_of_its_own_and_cls_the_one_it_always_had(vit, tmp_path):
    file = described(tmp_path / "a.safetensors", vit.state_dict())
    said = {
        output: Mae(weights=file, output=output).recipe()["output"]
        for output in ("cls", "mean", "block:4", "tokens", "tokens:9")
    }
    assert said["cls"] == "cls after final norm"
    assert said["block:4"] == "cls after block 4, without the final norm"
    assert len({*said.values()}) == 5
    assert "output" not in Mae(weights=file).options()
    with pytest.raises(
        EncoderError, match=r"mae.output is 'pooled'; wanted cls, mean, tokens, tokens:N, block:N"
    ):
        Mae(weights=file, output="pooled")


def test_the_outputs_of_a_vit_are_rows_of_its_last_tokens(vit, crops, tmp_path):
    mae = Mae(weights=described(tmp_path / "a.safetensors", vit.state_dict()), dtype="float32")
    found = mae.encode(crops, ["cls", "mean", "tokens", "block:6"])
    with torch.inference_mode():
        images = normalise(resize(torch.from_numpy(crops), SIZE), mae.mean, mae.std)
        tokens = vit.forward_features(images).numpy()
        last_block = vit.norm(torch.from_numpy(found["block:6"])).numpy()
    assert np.array_equal(found["tokens"], tokens)
    assert np.array_equal(found["cls"], mae(crops))
    np.testing.assert_allclose(found["mean"], tokens[:, 1:].mean(1), atol=1e-6)
    np.testing.assert_allclose(last_block, found["cls"], atol=1e-5)  # the norm is all that lies between


@pytest.mark.parametrize(
    ("folder", "name", "model"),
    [
        ("weights", f"{MODEL}.safetensors", MODEL),
        ("weights", f"{MODEL}.pth", MODEL),
        ("elsewhere", f"{MODEL}.pth", MODEL),
        ("weights", "vit_large_patch16_224.mae.safetensors", None),
        ("elsewhere", "mae_pretrain_vit_large.pth", None),
        ("weights", "mae_pretrain_vit_base.pth", "vit_base_patch16_224.mae"),
    ],
)
def test_weights_are_found_in_the_folders_for_them(folder, name, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VACLI_WEIGHTS", str(tmp_path / "elsewhere"))
    (tmp_path / folder).mkdir()
    save_file({"a": torch.zeros(1)}, tmp_path / folder / name)
    assert Mae(model).weights == tmp_path / folder / name


def test_weights_that_were_found_are_described_by_themselves(vit, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").mkdir()
    described(tmp_path / "weights" / f"{MODEL}.safetensors", vit.state_dict(), note="for puppets only")
    mae = Mae(MODEL)
    assert (mae.size, mae.note) == (SIZE, "for puppets only")


def test_the_licence_is_that_of_the_weights_and_not_of_the_model(tmp_path):
    name = "vit_large_patch16_224.mae"
    torch.save({}, tmp_path / "official.pth")
    save_file(
        {}, tmp_path / "own.safetensors", metadata={"vacli": json.dumps({"model": name, "licence": None})}
    )
    assert "not for commercial use" in str(Mae(weights=str(tmp_path / "official.pth")).licence)
    assert Mae(weights=str(tmp_path / "own.safetensors")).licence is None


def test_unknown_models_and_options_are_told(vit, tmp_path):
    file = described(tmp_path / "a.safetensors", vit.state_dict())
    for options, complaint in (
        ({"model": "vit_gigantic"}, "timm knows no model 'vit_gigantic'"),
        ({"weights": None, "model": "vit_gigantic"}, "timm knows no model 'vit_gigantic'"),
        ({"model": "vit_tiny_patch16_224.mea"}, "timm knows no model 'vit_tiny_patch16_224.mea'"),
        ({"dtype": "float16"}, "mae.dtype is 'float16'; wanted float32 or bfloat16"),
        ({"device": "abacus"}, "mae.device is 'abacus'"),
    ):
        with pytest.raises(EncoderError) as caught:
            Mae(**{"weights": file, **options})
        assert complaint in str(caught.value)


@pytest.mark.parametrize(
    ("model", "complaint"),
    [
        ("vit_relpos_small_patch16_224", "has no CLS token"),
        ("resnet18", "resnet18 cannot be built for 32 pixels"),
    ],
)
def test_a_model_without_a_cls_token_stops_the_run(model, complaint, vit, crops, tmp_path):
    mae = Mae(model, described(tmp_path / "a.safetensors", vit.state_dict()))
    with pytest.raises(EncoderError, match=complaint) as caught:
        mae(crops)
    assert caught.value.fatal


def test_the_recipe_knows_what_decides_the_values_and_nothing_else(vit, tmp_path):
    state = vit.state_dict()
    file = described(tmp_path / "a.safetensors", state)
    first = Mae(weights=file).recipe()
    assert Mae(weights=described(tmp_path / "elsewhere.safetensors", state)).recipe() == first
    assert Mae(**Mae(weights=file).options()).recipe() == first
    json.dumps(first)
    changed = {**state, "norm.bias": state["norm.bias"] + 1}
    others = [
        Mae(weights=file, dtype="bfloat16"),
        Mae("vit_tiny_patch16_224", weights=file),
        Mae(weights=described(tmp_path / "b.safetensors", changed)),
        Mae(weights=described(tmp_path / "c.safetensors", state, size=48)),
        Mae(weights=described(tmp_path / "d.safetensors", state, mean=[0, 0, 0])),
    ]
    texts = {json.dumps(mae.recipe(), sort_keys=True) for mae in others}
    assert len(texts | {json.dumps(first, sort_keys=True)}) == 6


def test_a_recipe_needs_no_model(tmp_path, monkeypatch):
    torch.save({}, tmp_path / "empty.pth")
    monkeypatch.setattr("vacli.extract.mae.build_vit", lambda *_: pytest.fail("built a model"))
    assert Mae(weights=str(tmp_path / "empty.pth")).recipe()["model"] == "vit_large_patch16_224.mae"


RECIPES = """
import sys
from vacli.extract.logmel import LogMel
from vacli.extract.mae import Mae
own, official = sys.argv[1:]
print(*[e.recipe()["track"] for e in (LogMel(), *(Mae(weights=w, dtype="float32") for w in (own, official)))])
heavy = {"torch", "timm", "huggingface_hub"} & set(sys.modules)
sys.exit(" ".join(heavy) or 0)
"""


def test_a_recipe_of_described_or_official_weights_needs_neither_torch_nor_timm(vit, tmp_path):
    about = {"mean": [0.5] * 3, "std": [0.5] * 3, "licence": None}
    own = described(tmp_path / "own.safetensors", vit.state_dict(), **about)
    torch.save({}, tmp_path / "official.pth")
    words = [sys.executable, "-c", RECIPES, own, str(tmp_path / "official.pth")]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "logmel mae mae"), done.stderr


def test_what_is_known_of_the_official_weights_is_what_timm_says():
    for name, known in mae_module._KNOWN.items():
        said = timm.get_pretrained_cfg(name)
        for field in fields(Published):
            assert getattr(known, field.name) == getattr(said, field.name), (name, field.name)


@pytest.mark.parametrize("model", ["vit_large_patch16_224.mae", "vit_tiny_patch16_224"])
@pytest.mark.parametrize("device", [None, "cpu"])
def test_a_look_at_the_machine_chooses_the_dtype_that_torch_would(model, device, monkeypatch):
    wide = "large" in model
    quick = device_module.choose_dtype(None, device, wide)
    monkeypatch.setattr(device_module, "_cpu_has_bfloat16", lambda: False)
    monkeypatch.setattr(device_module, "_no_gpu", lambda: False)
    if device == "cpu" and model == "vit_tiny_patch16_224":
        assert quick == "float32"  # whatever the machine
    assert device_module.choose_dtype(None, device, wide) == quick


@pytest.mark.parametrize("size", [32, 96, 160, 224])
def test_resize_is_pils_bicubic_within_a_level(size, crops):
    got = resize(torch.from_numpy(crops), size).permute(0, 2, 3, 1).numpy().astype(int)
    pil = np.stack(
        [np.asarray(Image.fromarray(crop).resize((size, size), Image.Resampling.BICUBIC)) for crop in crops]
    )
    assert got.shape == (3, size, size, 3)
    assert np.abs(got - pil).max() <= 1


def test_a_crop_of_the_right_size_is_not_resized(crops):
    assert np.array_equal(resize(torch.from_numpy(crops), 112).permute(0, 2, 3, 1).numpy(), crops)


@pytest.mark.needs_cuda
def test_resize_is_the_same_on_a_gpu_within_a_level(crops):
    here, there = (resize(torch.from_numpy(crops).to(device), 224).cpu().int() for device in ("cpu", "cuda"))
    assert (here - there).abs().max() <= 1


def test_normalise_takes_a_channels_mean_to_zero():
    pixels = torch.tensor([[0, 51, 255]], dtype=torch.uint8).view(1, 3, 1, 1)
    got = normalise(pixels, (0.0, 0.2, 0.5), (1.0, 0.5, 0.25)).flatten()
    np.testing.assert_allclose(got, [0.0, 0.0, 2.0], atol=1e-6)


def test_the_default_model_has_the_names_and_shapes_of_the_published_weights():
    shapes = SHARED / "golden" / "state_dict_shapes.json"
    if not shapes.is_file():
        pytest.skip(f"the golden shapes are not here ({shapes})")
    golden = json.loads(shapes.read_text())["timm vit_large_patch16_224.mae (num_classes=0)"]
    with torch.device("meta"):
        state = build_vit("vit_large_patch16_224.mae", 224).state_dict()
    assert {k: list(v.shape) for k, v in state.items()} == golden


def test_tests_run_offline():
    assert os.environ["HF_HUB_OFFLINE"] == "1"
