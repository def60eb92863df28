"""Models of Hugging Face give through `hf-audio` what they give when called directly, and long sound joins."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from vacli import VacliError
from vacli.extract import hf_audio
from vacli.extract.encoder import make_encoders
from vacli.extract.hf_audio import Grid, HfAudio, chunks
from vacli.extract.weights import EncoderError
from vacli.store import Fingerprints

transformers = pytest.importorskip("transformers")

RATE_HZ = 16000
KINDS = ("wavlm", "hubert", "wav2vec2", "ast", "whisper")
WAVES = {"wavlm": "WavLM", "hubert": "Hubert", "wav2vec2": "Wav2Vec2"}
_SMALL: dict[str, Any] = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-0.5, 0.5, round(seconds * RATE_HZ)).astype(np.float32)


def tiny(kind: str, **config: Any) -> tuple[Any, Any]:
    """A model of that kind and its feature extractor. Whisper hears 2 s at once, AST 0.655 s."""
    t = transformers
    torch.manual_seed(0)
    if kind == "ast":
        made = t.ASTConfig(
            **{**_SMALL, "num_hidden_layers": 2, "max_length": 64, "num_mel_bins": 64, **config}
        )
        return t.ASTForAudioClassification(made).eval(), t.ASTFeatureExtractor(max_length=64, num_mel_bins=64)
    if kind == "whisper":
        sizes = {f"{part}_{what}": n for part in ("encoder", "decoder")
                 for what, n in (("layers", 2), ("attention_heads", 2), ("ffn_dim", 32))}  # fmt: skip
        ids = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), 1)
        made = t.WhisperConfig(d_model=16, vocab_size=99, max_source_positions=100, **sizes, **ids)
        return t.WhisperModel(made).eval(), t.WhisperFeatureExtractor(chunk_length=2)
    convolved = {"conv_dim": (8,) * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2}
    made = getattr(t, f"{WAVES[kind]}Config")(**{**_SMALL, "num_hidden_layers": 2, **convolved, **config})
    model = getattr(t, f"{WAVES[kind]}Model")(made).eval()
    return model, t.Wav2Vec2FeatureExtractor(do_normalize=config.get("feat_extract_norm") != "layer")


@contextlib.contextmanager
def quietly():
    """transformers shows a bar when it saves."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers.utils.logging.disable_progress_bar()
        yield
        transformers.utils.logging.enable_progress_bar()


def saved(folder: Path, kind: str, **config: Any) -> tuple[Any, Any]:
    with quietly():
        model, prepare = tiny(kind, **config)
        model.save_pretrained(folder)
        prepare.save_pretrained(folder)
    return model, prepare


def make(folder: Path, **options: Any) -> HfAudio:
    return HfAudio(str(folder), **{"dtype": "float32", "device": "cpu", **options})


Direct = Callable[[np.ndarray, str], np.ndarray]


def directly(model: Any, prepare: Any) -> Direct:
    """What the model says when it is called without us: (samples, layer) -> (tokens, D)."""
    inner = getattr(model, "audio_spectrogram_transformer", getattr(model, "encoder", model))
    inner = model if isinstance(model, transformers.Wav2Vec2Model | transformers.HubertModel) else inner
    inner = model if isinstance(model, transformers.WavLMModel) else inner

    def call(samples: np.ndarray, layer: str) -> np.ndarray:
        given = prepare(samples, sampling_rate=RATE_HZ, return_tensors="pt")
        with torch.inference_mode():
            said = inner(next(iter(given.values())), output_hidden_states=True)
        chosen = {
            "last": lambda: said.last_hidden_state,
            "0": lambda: said.hidden_states[0],
            "1": lambda: said.hidden_states[1],
            "mean:2": lambda: (said.hidden_states[-1] + said.hidden_states[-2]) / 2,
        }[layer]()[0].numpy()
        return ast_in_time(chosen) if "spectrogram" in model.config.model_type else chosen

    return call


def ast_in_time(tokens: np.ndarray) -> np.ndarray:
    """(2 + 5 bands * 5 times, D) -> (5 times, D), token by token."""
    rows = [[tokens[2 + band * 5 + time] for band in range(5)] for time in range(5)]
    return np.array([np.mean(row, axis=0) for row in rows])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer", ["last", "0", "1", "mean:2"])
def test_a_model_gives_what_it_gives_when_called_directly(kind, layer, tmp_path):
    model, prepare = saved(tmp_path, kind)
    sound = noise(0.655)
    wanted = directly(model, prepare)(sound, layer)
    track = make(tmp_path, layer=layer)(np.array_split(sound, 7))
    rows = {"ast": 5, "whisper": 33}.get(kind, 32)
    assert track.values.shape == (rows, 16)
    np.testing.assert_allclose(track.values, wanted[:rows], atol=4e-3)  # stored as float16
    assert wanted.std(axis=0).max() > 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_a_click_is_heard_where_the_times_say(kind, tmp_path):
    """In what enters the first layer, without whose position convolution everything is local."""
    model, prepare = tiny(kind)
    if kind in WAVES:
        model.encoder.pos_conv_embed.forward = torch.zeros_like
        prepare.do_normalize = False
    with quietly():
        model.save_pretrained(tmp_path)
        prepare.save_pretrained(tmp_path)
    sound = np.zeros(round(0.655 * RATE_HZ), np.float32)
    sound += 1e-3 * noise(0.655)
    clicked, at_s = sound.copy(), 0.3127
    clicked[round(at_s * RATE_HZ)] = 0.5
    encoder = make(tmp_path, layer="0")
    if kind in WAVES:
        encoder._model.feature_extractor.conv_layers[
            0
        ].layer_norm = torch.nn.Identity()  # a mean over all of it
        encoder._model.encoder.pos_conv_embed.forward = torch.zeros_like
    a, b = encoder([sound]), encoder([clicked])
    change = np.abs(a.values.astype(np.float32) - b.values.astype(np.float32)).max(axis=1)
    if kind == "whisper":  # its loudest mel decides how deep the others may lie
        change = np.where(np.abs(a.times_s - at_s) < 0.2, change, 0)
    heard_s = a.times_s[change > 0.2 * change.max()]
    reach_s = {"ast": 0.0875, "whisper": 0.06}.get(kind, 0.0125)
    assert len(heard_s)
    assert np.abs(heard_s - at_s).max() <= reach_s + 0.001
    assert abs(heard_s.mean() - at_s) <= reach_s / 2 + 0.001


def test_the_grids_are_those_of_the_published_models(tmp_path):
    t = transformers
    t.Wav2Vec2Config().save_pretrained(tmp_path)
    waves = HfAudio.grid.func  # type: ignore[attr-defined]

    class Fake:
        family, rate_hz, _config = "wavlm", RATE_HZ, t.WavLMConfig()

    assert waves(Fake()) == Grid(hop=320, seen=400, middle=200, chunk=480_000, step=400_000)
    Fake.family, Fake._config = "audio-spectrogram-transformer", t.ASTConfig()
    assert waves(Fake()) == Grid(hop=1600, seen=2800, middle=1400, chunk=164_080, step=81_600)
    assert Grid(1600, 2800, 1400, 0, 0).rows(164_080) == 101
    Fake.family, Fake._prepare = "whisper", t.WhisperFeatureExtractor()
    assert waves(Fake()) == Grid(hop=320, seen=160, middle=0, chunk=480_000, step=400_000)
    assert Grid(320, 160, 0, 0, 0).rows(480_000) == 1500


# ---- long sound ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [0, 10, 39, 40, 41, 99, 100, 101, 139, 140, 141, 500, 501, 555])
@pytest.mark.parametrize("piece", [1, 7, 1000])
def test_chunks_cover_every_row_once_or_twice_and_begin_on_a_row(samples, piece):
    grid = Grid(hop=10, seen=15, middle=7.5, chunk=100, step=60)
    sound = np.arange(samples, dtype=np.float32)
    cut = [sound[i : i + piece] for i in range(0, samples, piece)]
    covered = np.zeros(grid.rows(samples), int)
    for first, chunk in chunks(iter(cut), grid):
        assert np.array_equal(chunk, sound[first * 10 : first * 10 + len(chunk)])
        assert len(chunk) <= 100
        assert len(chunk) > 90 or samples <= 90
        covered[first : first + grid.rows(len(chunk))] += 1
    assert (covered > 0).all()


@pytest.mark.parametrize("seconds", [0.7, 1.0, 1.007, 2.9, 3.21])
def test_where_a_model_is_local_chunks_join_as_if_it_had_heard_the_whole(seconds, tmp_path, monkeypatch):
    """Tolerance 4e-3, that of float16: layer 0 is local, as are normalisation by layer and none of the sound."""
    model, prepare = saved(tmp_path, "wav2vec2", feat_extract_norm="layer", do_stable_layer_norm=True)
    monkeypatch.setattr(hf_audio, "_CHUNK_S", 1.0)
    # 12 rows on either side of a seam, where the positions' convolution reaches 8; as published, 125 and 64
    monkeypatch.setattr(hf_audio, "_OVERLAP", {**hf_audio._OVERLAP, "wav2vec2": 2})
    sound = noise(seconds)
    wanted = directly(model, prepare)(sound, "0")
    track = make(tmp_path, layer="0")(np.array_split(sound, 13))
    assert track.values.shape == wanted.shape
    np.testing.assert_allclose(track.values, wanted, atol=4e-3)
    np.testing.assert_allclose(track.times_s, np.arange(len(wanted)) * 0.02 + 0.0125)
    assert wanted.std(axis=0).max() > 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_across_the_seams_there_are_as_many_rows_as_of_the_whole_at_their_times(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(hf_audio, "_CHUNK_S", 1.0)
    saved(tmp_path, kind)
    encoder = make(tmp_path)
    sound = noise(7.777)
    track = encoder(np.array_split(sound, 100))
    hop_s = 0.1 if kind == "ast" else 0.02
    wanted = {"ast": 77, "whisper": 389}.get(kind, 388)  # of 124,432 samples, by the formulas of their layers
    assert len(track) == wanted
    np.testing.assert_allclose(np.diff(track.times_s), hop_s)
    assert track.valid.all()
    pieces = list(encoder.pieces(np.array_split(sound, 100)))
    assert len(pieces) > 1
    assert np.array_equal(np.concatenate([p.values for p in pieces]), track.values)
    assert abs(track.times_s[-1] - 7.777) < 0.1 + hop_s


def test_every_row_is_of_the_chunk_where_it_lies_deeper(tmp_path):
    model, prepare = saved(tmp_path, "whisper")
    sound = noise(3.5)
    encoder = make(tmp_path)
    step = encoder.grid.step
    assert (encoder.grid.chunk, step) == (32_000, 26_560)
    first = directly(model, prepare)(sound[:32_000], "last")
    last = directly(model, prepare)(sound[-32_000:], "last")  # begins on a row
    got = encoder([sound]).values
    assert len(got) == 175
    np.testing.assert_allclose(
        got[:87], first[:87], atol=4e-3
    )  # the second chunk begins at row 75, the first has 100
    np.testing.assert_allclose(got[87:], last[12:100], atol=4e-3)


def test_memory_holds_a_chunk_and_not_the_sound(tmp_path, monkeypatch):
    monkeypatch.setattr(hf_audio, "_CHUNK_S", 1.0)
    saved(tmp_path, "hubert")
    encoder = make(tmp_path)
    alive: list[int] = []
    whole = HfAudio._rows

    def rows(self: HfAudio, samples: np.ndarray) -> np.ndarray:
        base = samples if samples.base is None else samples.base
        alive.append(len(base))
        return whole(self, samples)

    monkeypatch.setattr(HfAudio, "_rows", rows)
    encoder(noise(0.064) for _ in range(300))
    assert len(alive) > 20
    assert max(alive) <= (1.0 + 1.0 + 0.064) * RATE_HZ + 1


@pytest.mark.parametrize("kind", KINDS)
def test_too_little_sound_is_an_empty_track(kind, tmp_path):
    saved(tmp_path, kind)
    for sound in ([], [np.zeros(0, np.float32)], [np.zeros(100, np.float32)]):
        track = make(tmp_path)(sound)
        assert track.values.shape == (0, 16)
        assert track.values.dtype == np.float16


# ---- files, options, recipe ----------------------------------------------------------------------------------


def test_bfloat16_is_near_float32(tmp_path):
    saved(tmp_path, "wavlm")
    full, half = (make(tmp_path, dtype=dtype)([noise(1.0)]).values for dtype in ("float32", "bfloat16"))
    assert 0 < np.abs(full - half).max() < 0.1 * np.abs(full).max()


def test_pth_weights_and_shards_load_as_safetensors_do(tmp_path):
    model, prepare = saved(tmp_path / "one", "wavlm")
    wanted = make(tmp_path / "one")([noise(1.0)]).values
    with quietly():
        model.save_pretrained(tmp_path / "shards", max_shard_size="4KB")
        prepare.save_pretrained(tmp_path / "shards")
        prepare.save_pretrained(tmp_path / "bin")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    (tmp_path / "bin" / "config.json").write_bytes((tmp_path / "one" / "config.json").read_bytes())
    torch.save(model.state_dict(), tmp_path / "bin" / "pytorch_model.bin")
    for folder in ("shards", "bin"):
        encoder = make(tmp_path / folder)
        np.testing.assert_allclose(encoder([noise(1.0)]).values, wanted, atol=2e-3)
    sharded = make(tmp_path / "shards").recipe()["files_sha256"]
    assert {f.name for f in (tmp_path / "shards").glob("model*")} <= sharded.keys()


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path):
    saved(tmp_path, "hubert")
    (tmp_path / "model.safetensors").unlink()
    torch.save({"a": Bomb(tmp_path / "boom")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(EncoderError, match="cannot load the model") as caught:
        make(tmp_path)([noise(1.0)])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "boom").exists()


def test_code_beside_the_model_is_never_run(tmp_path):
    saved(tmp_path, "hubert")
    about = json.loads((tmp_path / "config.json").read_text())
    about["auto_map"] = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}
    (tmp_path / "config.json").write_text(json.dumps(about))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'boom')!r}, 'w')\n")
    assert len(make(tmp_path)([noise(0.5)])) == 24
    assert not (tmp_path / "boom").exists()


def test_weights_that_are_not_whole_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    saved(tmp_path, "wav2vec2")
    state = load_file(tmp_path / "model.safetensors")
    key = next(k for k in state if k.endswith("final_layer_norm.weight"))
    save_file({k: v for k, v in state.items() if k != key}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(EncoderError, match=f"missing .*{key}"):
        make(tmp_path)([noise(0.5)])
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(EncoderError, match=r"cannot load the model in .*; wanted the whole") as caught:
        make(tmp_path)([noise(0.5)])
    assert "\n" not in str(caught.value)
    assert caught.value.fatal


def test_absent_models_fail_at_once_and_say_what_to_get_and_where_to_put_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VACLI_WEIGHTS", raising=False)
    began = time.monotonic()
    with pytest.raises(EncoderError) as caught:
        HfAudio("microsoft/wavlm-large")
    assert time.monotonic() - began < 3
    assert "hf download microsoft/wavlm-large --local-dir weights/wavlm-large" in str(caught.value)
    for model, complaint in (
        (None, "hf-audio wants a model"),
        ("/no/such", "no folder /no/such"),
        ("./none", "no folder ./none"),
        ("a--b", "no folder a--b"),
        (str(tmp_path), "holds no config.json"),
    ):
        with pytest.raises(EncoderError, match=complaint):
            HfAudio(model)


def test_a_model_is_found_among_the_weights_and_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved(tmp_path / "weights" / "wavlm-large", "wavlm")
    found = HfAudio("microsoft/wavlm-large")
    assert found.folder == tmp_path / "weights" / "wavlm-large"
    assert found.options()["model"] == "microsoft/wavlm-large"
    cache, revision = tmp_path / "hub" / "models--facebook--hubert", "0" * 40
    saved(cache / "snapshots" / revision, "hubert")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(revision)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(tmp_path / "hub"), raising=False)
    found = HfAudio("facebook/hubert", dtype="float32", device="cpu")
    assert found.folder == cache / "snapshots" / revision
    assert len(found([noise(0.5)])) == 24


@pytest.mark.parametrize("layout", ["safetensors", "shards", "bin"])
def test_a_model_is_fetched_file_by_file_where_there_is_a_network(layout, tmp_path, monkeypatch):
    hub, cache = tmp_path / "hub", tmp_path / "cache"
    model, _ = saved(hub, "hubert")
    (hub / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    if layout != "safetensors":
        (hub / "model.safetensors").unlink()
    if layout == "shards":
        with quietly():
            model.save_pretrained(hub, max_shard_size="4KB")
    elif layout == "bin":
        torch.save(model.state_dict(), hub / "pytorch_model.bin")
    asked = []

    def fetch(name: str, file: str) -> Path | None:
        asked.append((name, file))
        cache.mkdir(exist_ok=True)
        return Path(shutil.copy(hub / file, cache / file)) if (hub / file).is_file() else None

    monkeypatch.setattr(hf_audio, "from_hub", fetch)
    first = HfAudio("a/b", dtype="float32", device="cpu")
    assert "not for commercial use" in str(first.licence)
    assert len(first([noise(0.5)])) == 24
    assert {name for name, _ in asked} == {"a/b"}
    asked.clear()
    assert HfAudio("a/b", dtype="float32").recipe() == first.recipe()
    assert asked == [("a/b", "config.json")]  # the rest is there


@pytest.mark.parametrize("file", ["preprocessor_config.json", "model.safetensors"])
def test_a_folder_that_is_not_whole_is_told(file, tmp_path):
    saved(tmp_path, "hubert")
    (tmp_path / file).unlink()
    with pytest.raises(EncoderError, match=f"lacks {file}"):
        make(tmp_path)


def test_another_kind_of_model_is_told(tmp_path):
    transformers.BertConfig().save_pretrained(tmp_path)
    with pytest.raises(
        EncoderError, match="of type 'bert'; hf-audio knows wavlm, hubert, wav2vec2, whisper, audio"
    ):
        make(tmp_path)


def test_wrong_options_are_told(tmp_path):
    saved(tmp_path, "hubert")
    for options, complaint in (
        ({"layer": "first"}, "hf-audio.layer is 'first'; wanted last, a number"),
        ({"layer": -1}, "hf-audio.layer is -1"),
        ({"layer": "mean:0"}, "hf-audio.layer is 'mean:0'"),
        ({"dtype": "float16"}, "hf-audio.dtype is 'float16'"),
        ({"device": "abacus"}, "hf-audio.device is 'abacus'"),
    ):
        with pytest.raises(EncoderError) as caught:
            make(tmp_path, **options)
        assert complaint in str(caught.value)
    for layer in ("3", "mean:4"):
        with pytest.raises(EncoderError, match=f"layer is {layer}, but .* has the hidden states 0 to 2"):
            make(tmp_path, layer=layer)([noise(0.5)])
    for layer in ("2", "mean:3"):
        assert len(make(tmp_path, layer=layer)([noise(0.5)])) == 24


def test_without_transformers_it_says_what_to_install(tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "transformers" else found(name, *a)
    )
    with pytest.raises(VacliError, match=r"pip install 'vacli\[hf\]'"):
        HfAudio(str(tmp_path))


@pytest.mark.parametrize(
    ("card", "note"),
    [
        ("---\nlicense: cc-by-nc-4.0\ntags:\n- x\n---\n# x", "weights under CC-BY-NC 4.0: not for commercial use"),
        ("---\nlanguage: en\nlicense: 'openrail'\n---\n", "weights under openrail"),
        ("---\nlicense: apache-2.0\n---\n", None),
        ("---\nlanguage: en\n---\nlicense: mine", None),
        ("no front matter", None),
    ],
)  # fmt: skip
def test_the_licence_is_what_the_card_says(card, note, tmp_path):
    saved(tmp_path, "hubert")
    assert make(tmp_path).licence is None
    (tmp_path / "README.md").write_text(card)
    licence = make(tmp_path).licence
    assert licence is None if note is None else str(licence).startswith(note)


def test_the_command_lines_names_make_it(tmp_path):
    saved(tmp_path / "WavLM-tiny", "wavlm")
    options = {"wavlm-tiny": {"layer": "mean:2", "dtype": "float32"}}
    made = make_encoders([f"hf-audio:{tmp_path / 'WavLM-tiny'}"], options, Fingerprints())["wavlm-tiny"]
    assert isinstance(made, HfAudio)
    again = HfAudio(**made.options())
    assert again.recipe() == made.recipe()
    assert np.array_equal(again([noise(0.5)]).values, made([noise(0.5)]).values)


def test_the_recipe_knows_what_decides_the_values_and_nothing_else(tmp_path):
    saved(tmp_path / "a", "hubert")
    first = make(tmp_path / "a").recipe()
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert make(tmp_path / "b").recipe() == first
    saved(tmp_path / "c", "hubert", hidden_size=32)
    said = json.loads((tmp_path / "b" / "preprocessor_config.json").read_text())
    (tmp_path / "b" / "preprocessor_config.json").write_text(json.dumps({**said, "do_normalize": False}))
    others = [
        make(tmp_path / "a", layer=1),
        make(tmp_path / "a", layer="mean:1"),
        make(tmp_path / "a", dtype="bfloat16"),
        make(tmp_path / "b"),
        make(tmp_path / "c"),
    ]
    assert len({json.dumps(r, sort_keys=True) for r in (first, *(o.recipe() for o in others))}) == 6


def test_a_recipe_needs_neither_torch_nor_transformers(tmp_path):
    saved(tmp_path, "hubert")
    code = (
        "import sys; from vacli.extract.hf_audio import HfAudio\n"
        "print(HfAudio(sys.argv[1], dtype='float32').recipe()['track'])\n"
        "sys.exit(' '.join({'torch', 'timm', 'transformers', 'huggingface_hub'} & set(sys.modules)) or 0)"
    )
    words = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, env={**os.environ})
    assert (done.returncode, done.stdout.strip()) == (0, "hf-audio"), done.stderr


def test_loading_says_nothing_on_the_terminal(tmp_path, capfd):
    saved(tmp_path, "ast")  # its head is left out, which transformers reports
    capfd.readouterr()
    make(tmp_path)([noise(0.5)])
    assert capfd.readouterr() == ("", "")
