"""What every encoder of the table keeps to, whoever wrote it: a newcomer is tested before he writes a test."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from vacli import VacliError, lookup
from vacli.extract import ENCODERS, ir50, vggish
from vacli.extract.encoder import encode, pass_key
from vacli.extract.ir50 import ArcFaceIR50, UstcIR50
from vacli.store import Fingerprints, Track
from vacli.store.recipe import TRACK_NAME, canonical

from .made_up import made_up

PLAIN = {"dtype": "float32", "device": "cpu"}


# ---- an encoder of each kind, small and with made-up weights -------------------------------------------------
# A line in the table of encoders needs one here: folder -> its options, in one or more ways.

Options = dict[str, Any]


def _mae(folder: Path) -> list[Options]:
    vit = timm.create_model("test_vit", num_classes=0, img_size=32)
    about = {"model": "test_vit", "size": 32, "mean": [0.5] * 3, "std": [0.25] * 3, "licence": None}
    save_file(made_up(vit), folder / "mae.safetensors", metadata={"vacli": json.dumps(about)})
    outputs = ("cls", "mean", "block:3", "tokens", "tokens:2")
    return [{"weights": str(folder / "mae.safetensors"), "output": o, **PLAIN} for o in outputs]


def _iresnet(folder: Path) -> list[Options]:
    for variant, network in (("arcface", ArcFaceIR50()), ("ustc", UstcIR50())):
        torch.save(made_up(network, 0.5), folder / f"{variant}.pth")
    return [{"variant": v, "weights": str(folder / f"{v}.pth"), **PLAIN} for v in ("arcface", "ustc")]


def _timm(folder: Path) -> list[Options]:
    made = []
    for model in ("test_vit2.r160_in1k", "test_efficientnet.r160_in1k"):
        save_file(made_up(timm.create_model(model)), folder / f"{model}.safetensors")
        given = {"model": model, "weights": str(folder / f"{model}.safetensors"), **PLAIN}
        made += [given, {**given, "output": "mean"}, {**given, "output": "tokens:3"}]
    return made


def _logmel(folder: Path) -> list[Options]:
    return [{}]


def _vggish(folder: Path) -> list[Options]:
    torch.save(made_up(vggish.build_vggish(True)), folder / "vggish.pth")
    ways: list[Options] = [{}, {"hop_s": 0.25, "window": "causal"}, {"window": "look-ahead", "relu": "yes"}]
    return [{"weights": str(folder / "vggish.pth"), **way, **PLAIN} for way in ways]


def _hf_audio(folder: Path) -> list[Options]:
    pytest.importorskip("transformers")
    from .test_hf_audio import saved

    for kind in ("wavlm", "whisper"):
        saved(folder / kind, kind)
    return [{"model": str(folder / kind), **PLAIN} for kind in ("wavlm", "whisper")]


FACTORIES: dict[str, Callable[[Path], list[Options]]] = {
    "mae": _mae,
    "iresnet": _iresnet,
    "timm": _timm,
    "logmel": _logmel,
    "vggish": _vggish,
    "hf-audio": _hf_audio,
}


def test_every_encoder_of_the_table_is_tested_here():
    assert FACTORIES.keys() == ENCODERS.keys()


KINDS = {name: lookup(ENCODERS, name, "encoder") for name in ENCODERS}


@pytest.fixture(scope="module")
def workshop(tmp_path_factory) -> Iterator[Callable[[str], list[Any]]]:
    """name -> the encoders of that name, made in its ways, once."""

    @cache
    def make(name: str) -> list[Any]:
        return [KINDS[name](**options) for options in FACTORIES[name](tmp_path_factory.mktemp("weights"))]

    with pytest.MonkeyPatch.context() as patch:  # VGGish has 72 million weights, IResNet 43
        patch.setattr(ir50, "_STAGES", ((4, 2), (8, 2), (16, 2), (32, 2)))
        patch.setattr(vggish, "_CHANNELS", (4, 0, 4, 0, 4, 0, 4, 0))
        patch.setattr(vggish, "_WIDTH", 8)
        yield make


@pytest.fixture(params=KINDS)
def made(request, workshop) -> list[Any]:
    return workshop(request.param)


@pytest.fixture(params=[name for name, kind in KINDS.items() if kind.eats == "crops"])
def crop_eaters(request, workshop) -> list[Any]:
    return workshop(request.param)


@pytest.fixture(params=[name for name, kind in KINDS.items() if hasattr(kind, "pass_key")])
def sharers(request, workshop) -> list[Any]:
    """Those of one kind that differ in nothing but their output."""
    made = workshop(request.param)
    return [e for e in made if pass_key(e) == pass_key(made[0])]


@pytest.fixture(params=[name for name, kind in KINDS.items() if kind.eats == "sound"])
def sound_eaters(request, workshop) -> list[Any]:
    return workshop(request.param)


# ---- all of them ---------------------------------------------------------------------------------------------


def test_it_says_what_it_is(made):
    maker = type(made[0])
    assert maker.eats in ("crops", "sound")
    assert TRACK_NAME.fullmatch(maker.name)
    assert all(isinstance(text, str) and text for text in maker.card[:3])
    files, get = maker.card[3:]
    assert isinstance(files, tuple)
    assert all(isinstance(file, str) and file for file in files)
    assert isinstance(get, str)
    assert maker.__doc__
    for encoder in made:
        assert getattr(encoder, "licence", None) is None or "\n" not in encoder.licence


def test_its_recipe_is_canonical_json_that_names_track_version_and_dtype(made):
    for encoder in made:
        recipe = encoder.recipe()
        assert json.loads(canonical(recipe)) == recipe
        assert TRACK_NAME.fullmatch(recipe["track"])
        assert isinstance(recipe["version"], int)
        assert recipe["version"] >= 1
        assert recipe["dtype"] == "float16"
    assert len({canonical(e.recipe()) for e in made}) == len(made)


def test_its_options_make_it_again_after_they_were_kept_as_json(made):
    for encoder in made:
        kept = json.loads(json.dumps(encoder.options()))
        again = type(encoder)(**{k: v for k, v in kept.items() if v is not None})
        assert again.recipe() == encoder.recipe()
        assert again.options() == encoder.options()


def test_no_path_stands_in_its_recipe(made, tmp_path_factory):
    for encoder in made:
        assert str(tmp_path_factory.getbasetemp()) not in canonical(encoder.recipe())


def test_it_takes_the_runs_fingerprints_if_it_hashes_files(made):
    for encoder in made:
        if "weights" in encoder.options():
            memo = Fingerprints()
            type(encoder)(**encoder.options(), fingerprints=memo).recipe()
            assert memo.memo or not memo.changed  # too young a file is hashed, and not remembered


def test_an_unknown_device_is_a_users_mistake(made):
    for encoder in made[:1]:
        if "dtype" in encoder.options():
            with pytest.raises(VacliError, match="abacus"):
                type(encoder)(**{**encoder.options(), "device": "abacus"})


# ---- of crops ------------------------------------------------------------------------------------------------


def crops(count: int, pixels: int = 112) -> np.ndarray:
    """Soft faces of noise: not so rough that a last bit decides which token is the most alike."""
    rough = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), np.uint8)
    scale = -(-pixels // 8)
    return rough.repeat(scale, 1).repeat(scale, 2)[:, :pixels, :pixels].copy()


def test_crops_become_finite_rows_of_its_dim(crop_eaters):
    for encoder in crop_eaters:
        rows = encoder(crops(3))
        assert rows.ndim in (2, 3)
        assert (len(rows), rows.shape[-1]) == (3, encoder.dim)
        assert np.issubdtype(rows.dtype, np.floating)
        assert np.isfinite(rows.astype(np.float16)).all()
        assert rows.std() > 0


def test_the_same_crops_give_the_same_rows_and_stay_as_they_are(crop_eaters):
    given = crops(2)
    before = given.copy()
    for encoder in crop_eaters:
        assert np.array_equal(encoder(given), encoder(given))
        assert np.array_equal(given, before)


def test_a_crop_alone_gives_its_row_of_the_batch(crop_eaters):
    given = crops(3)
    for encoder in crop_eaters:
        together = encoder(given)
        for row, crop in zip(together, given, strict=True):
            np.testing.assert_allclose(encoder(crop[None])[0], row, rtol=1e-3, atol=1e-4)


def test_other_crops_give_other_rows(crop_eaters):
    for encoder in crop_eaters:
        first, second = encoder(crops(2))
        assert not np.allclose(first, second, rtol=1e-3)


@pytest.mark.parametrize("pixels", [48, 160])
def test_crops_of_another_size_give_rows_of_the_same_shape(pixels, crop_eaters):
    for encoder in crop_eaters:
        assert encoder(crops(1, pixels)).shape == encoder(crops(1)).shape


@pytest.mark.parametrize("level", [0, 255])
def test_an_even_crop_is_no_trouble(level, crop_eaters):
    for encoder in crop_eaters:
        assert np.isfinite(encoder(np.full((1, 112, 112, 3), level, np.uint8))).all()


def test_several_outputs_of_one_pass_are_what_each_gives_alone(sharers):
    assert len(sharers) > 1
    alone = [e(crops(2)) for e in sharers]
    for one, together in zip(alone, encode(sharers, crops(2)), strict=True):
        assert np.array_equal(one, together)
    joined = type(sharers[-1])(**{**sharers[-1].options(), "device": "cpu"})
    joined.join(sharers[0])
    assert np.array_equal(joined(crops(2)), alone[-1])


# ---- of sound ------------------------------------------------------------------------------------------------


def heard(encoder: Any, blocks: list[np.ndarray]) -> Track:
    if getattr(encoder, "clock", "own") == "frames":
        return encoder(iter(blocks), np.arange(50) / 25)
    return encoder(iter(blocks))


def noise(encoder: Any, seconds: float = 2.0) -> np.ndarray:
    count = round(seconds * encoder.rate_hz)
    return np.random.default_rng(0).uniform(-0.5, 0.5, count).astype(np.float32)


def test_sound_becomes_rows_in_order(sound_eaters):
    for encoder in sound_eaters:
        track = heard(encoder, [noise(encoder)])
        assert len(track) > 1
        assert track.values.shape[-1] == encoder.dim
        assert track.values.dtype == np.float16
        assert (np.diff(track.times_s) > 0).all()
        assert track.times_s[0] >= 0
        assert track.times_s[-1] <= 2.0
        assert track.valid[track.times_s > 0].all()  # what ends at 0 has heard nothing
        assert track.values[track.valid].astype(np.float32).std() > 0


def test_no_sound_is_an_empty_track(sound_eaters):
    for encoder in sound_eaters:
        for blocks in ([], [np.zeros(0, np.float32)]):
            track = heard(encoder, blocks)
            assert len(track) == 0
            assert track.values.shape[-1] == encoder.dim


def test_the_cut_of_the_blocks_does_not_matter(sound_eaters):
    for encoder in sound_eaters:
        sound = noise(encoder)
        whole = heard(encoder, [sound])
        for pieces in (np.array_split(sound, 7), [sound[:1], sound[1:1000], sound[1000:]]):
            track = heard(encoder, pieces)
            assert np.array_equal(track.values, whole.values, equal_nan=True)
            assert np.array_equal(track.times_s, whole.times_s)


def test_silence_is_no_trouble(sound_eaters):
    for encoder in sound_eaters:
        track = heard(encoder, [np.zeros(2 * encoder.rate_hz, np.float32)])
        assert track.valid[track.times_s > 0].all()
