"""VGGish equals torchvggish's on the golden sound, and its windows lie where they are said to, however sound is cut."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from vacli.extract import logmel, vggish
from vacli.extract.encoder import make_encoders
from vacli.extract.logmel import LogMel, log_mel
from vacli.extract.media import Video
from vacli.extract.vggish import SEEN_S, WINDOWS, VGGish, build_vggish, embed, patch_starts
from vacli.extract.weights import EncoderError
from vacli.store import Fingerprints

from .conftest import SHARED
from .made_up import made_up

DATA = Path(__file__).parent / "data"
RATE_HZ = 16000


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(DATA / "logmel.npz") as sound, np.load(DATA / "vggish.npz") as embeddings:
        return {**sound, **embeddings}


@pytest.fixture(scope="module")
def networks() -> dict[str, torch.nn.ModuleDict]:
    """relu -> the whole network with the made-up weights."""
    found = {"yes": build_vggish(True).eval().requires_grad_(False)}
    found["yes"].load_state_dict(made_up(found["yes"]))
    layers = found["yes"]["embeddings"][:-1]
    found["no"] = torch.nn.ModuleDict({"features": found["yes"]["features"], "embeddings": layers})
    return found


@pytest.fixture
def small(monkeypatch, tmp_path) -> Path:
    """A narrow VGGish, and a file of weights for it."""
    monkeypatch.setattr(vggish, "_CHANNELS", (4, 0, 4, 0, 4, 0, 4, 0))
    monkeypatch.setattr(vggish, "_WIDTH", 8)
    torch.save(made_up(build_vggish(True)), tmp_path / "small.pth")  # torch's own would make all sounds alike
    return tmp_path / "small.pth"


def make(weights: Path, **options: object) -> VGGish:
    return VGGish(str(weights), **{"dtype": "float32", "device": "cpu", **options})  # type: ignore[arg-type]


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-0.5, 0.5, round(seconds * RATE_HZ)).astype(np.float32)


# ---- the network ---------------------------------------------------------------------------------------------


def test_the_network_is_torchvggishs(networks, golden):
    examples = torch.from_numpy(golden["log_mel"][:192].reshape(2, 96, 64))
    for relu, key in (("yes", "embedding"), ("no", "embedding_before_last_relu")):
        got = embed(networks[relu], examples).numpy()
        assert got.shape == (2, 128)
        np.testing.assert_allclose(got, golden[key], atol=1e-4)
    assert golden["embedding_before_last_relu"].min() < 0 <= golden["embedding"].min()


@pytest.mark.parametrize(("relu", "key"), [("yes", "embedding"), ("no", "embedding_before_last_relu")])
def test_the_encoder_gives_torchvggishs_embeddings_of_the_sound(relu, key, networks, golden, tmp_path):
    (tmp_path / "any.pth").touch()
    encoder = make(tmp_path / "any.pth", relu=relu, hop_s=0.96, window="look-ahead")
    encoder.__dict__["_network"] = networks[relu]
    track = encoder([golden["waveform"]])
    np.testing.assert_allclose(
        track.times_s, [0.0, 0.96, 1.92]
    )  # the last sees 0.58 s of sound, then silence
    np.testing.assert_allclose(track.values[:2], golden[key], atol=4e-3)  # stored as float16
    assert track.valid.all()


def test_the_names_and_shapes_are_those_of_the_published_weights():
    shapes = SHARED / "golden" / "state_dict_shapes.json"
    if not shapes.is_file():
        pytest.skip(f"the golden shapes are not here ({shapes})")
    with torch.device("meta"):
        state = build_vggish(False).state_dict()
    wanted = json.loads(shapes.read_text())["torchvggish VGG"]
    assert {k: list(v.shape) for k, v in state.items()} == wanted


def test_bfloat16_is_near_float32(small):
    full, half = (
        make(small, hop_s=0.5, dtype=dtype)([noise(2.0)]).values for dtype in ("float32", "bfloat16")
    )
    assert 0 < np.abs(full - half).max() < 0.05 * np.abs(full).max()


# ---- where a window lies -------------------------------------------------------------------------------------


def test_a_window_lies_where_its_name_says():
    times_s = np.concatenate([np.random.default_rng(0).uniform(0, 100, 1000), np.arange(300) / 25])
    begin_s = {window: patch_starts(times_s, window) * 0.01 for window in WINDOWS}
    assert np.abs(begin_s["centred"] + SEEN_S / 2 - times_s).max() <= 0.005 + 1e-9
    assert np.abs(begin_s["look-ahead"] - times_s).max() <= 0.005 + 1e-9
    ends_before_s = times_s - (begin_s["causal"] + SEEN_S)
    assert ends_before_s.min() > -1e-6
    assert ends_before_s.max() < 0.010 + 1e-9


@pytest.mark.parametrize(("window", "same"), [("causal", slice(0, 51)), ("look-ahead", slice(51, 100))])
def test_what_a_window_shall_not_hear_changes_nothing(window, same, small):
    sound, times_s = noise(4.0), np.arange(100) / 25
    other = sound.copy()
    changed = slice(2 * RATE_HZ, None) if window == "causal" else slice(None, 2 * RATE_HZ)
    other[changed] *= 0.01
    encoder = make(small, window=window)
    a, b = (encoder([s], times_s).values for s in (sound, other))
    np.testing.assert_allclose(a[same], b[same], atol=1e-3)
    rest = np.setdiff1d(np.arange(100), np.arange(100)[same])
    assert (np.abs(a[rest] - b[rest]).max(axis=1) > 1e-2).mean() > 0.9


def plain(encoder: VGGish, sound: np.ndarray, times_s: np.ndarray) -> np.ndarray:
    """One patch after the other, of the log-mel of the whole."""
    rows = log_mel(sound, RATE_HZ)
    silence = np.full((200, 64), np.log(0.01), np.float32)
    padded = np.concatenate([silence, rows, silence])
    found = []
    for time_s in times_s:
        start = int(patch_starts(np.array([time_s]), encoder.window)[0])
        if start + 96 <= 0 or start >= len(rows):
            found.append(np.full(128, np.nan, np.float32))
        else:
            patch = torch.from_numpy(padded[200 + start : 296 + start])
            found.append(embed(encoder._network, patch[None])[0].numpy())
    return np.array(found)


IRREGULAR_S = np.cumsum(np.random.default_rng(1).choice([0.002, 0.03, 0.04, 0.3], 60)) - 0.1


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("pieces", [[1024], [5000, 1], [100_000]])
def test_blocks_and_batches_change_nothing(window, pieces, small, monkeypatch):
    monkeypatch.setattr(logmel, "_BLOCK_ROWS", 30)
    monkeypatch.setattr(vggish, "_BATCH", 3)
    sound = noise(4.0)
    lengths = np.resize(pieces, len(sound))
    cut = np.split(sound, np.cumsum(lengths)[np.cumsum(lengths) < len(sound)])
    assert IRREGULAR_S[0] < 0
    assert IRREGULAR_S[-1] > 4.5
    for encoder, times_s in (
        (make(small, window=window), IRREGULAR_S),
        (make(small, window=window, hop_s=0.05), np.arange(80) * 0.05),
    ):
        track = encoder(cut, IRREGULAR_S) if encoder.clock == "frames" else encoder(cut)
        np.testing.assert_allclose(track.times_s, times_s)
        np.testing.assert_allclose(track.values, plain(encoder, sound, times_s), atol=2e-3)
        assert np.nanstd(track.values.astype(np.float32), axis=0).max() > 0.05  # they are not all alike


def test_equal_patches_are_computed_once(small, monkeypatch):
    computed = []
    monkeypatch.setattr(vggish, "embed", lambda n, p: computed.append(len(p)) or embed(n, p))
    times_s = np.repeat(np.arange(20) * 0.1, 5) + np.tile(np.arange(5) * 1e-4, 20)
    track = make(small)([noise(2.0)], times_s)
    assert sum(computed) == 20
    assert len(track) == 100
    assert (track.values.reshape(20, 5, 128) == track.values.reshape(20, 5, 128)[:, :1]).all()


def test_where_nothing_is_heard_the_row_is_nan_and_half_a_window_is_enough(small):
    times_s = np.arange(100) * 0.05  # to 4.95 s, of sound that ends at 2 s
    for window, heard_until_s in (("centred", 2 + SEEN_S / 2), ("look-ahead", 2.0), ("causal", 2 + SEEN_S)):
        track = make(small, window=window)([noise(2.0)], times_s)
        assert track.valid[times_s > 0.03].sum() > 30
        assert not track.valid[times_s > heard_until_s].any()
        assert track.valid[(times_s > 0.03) & (times_s < heard_until_s - 0.04)].all()


def test_no_sound_is_an_empty_track(small):
    for sound in ([], [np.zeros(0, np.float32)], [np.zeros(399, np.float32)]):
        for encoder, given in ((make(small), [np.arange(9) / 25]), (make(small, hop_s=0.1), [])):
            track = encoder(sound, *given)
            assert track.values.shape == (0, 128)
            assert track.values.dtype == np.float16
    assert len(make(small)([noise(1.0)], np.zeros(0))) == 0


def test_a_long_sound_is_never_held(small, monkeypatch):
    monkeypatch.setattr(logmel, "_BLOCK_ROWS", 30)
    lengths = []
    whole = VGGish.embed
    monkeypatch.setattr(
        VGGish, "embed", lambda s, held, *rest: lengths.append(len(held)) or whole(s, held, *rest)
    )
    make(small, hop_s=1.0)(iter([noise(0.1)] * 200))
    assert len(lengths) == 20
    assert max(lengths) <= 30 + 95 + 96


def test_pieces_come_as_the_sound_does_and_are_the_whole(small, monkeypatch):
    monkeypatch.setattr(logmel, "_BLOCK_ROWS", 30)
    sound = np.array_split(noise(4.0), 50)
    for encoder, given in ((make(small), [IRREGULAR_S]), (make(small, hop_s=0.05), []), (LogMel(), [])):
        read = []
        blocks = (read.append(1) or block for block in sound)
        pieces = [(piece, len(read)) for piece in encoder.pieces(blocks, *given)]
        assert len(pieces) > 5
        assert all(len(piece) for piece, _ in pieces)
        assert pieces[0][1] < 25  # long before the end
        whole = encoder(sound, *given)
        assert np.array_equal(np.concatenate([p.values for p, _ in pieces]), whole.values, equal_nan=True)
        assert np.array_equal(np.concatenate([p.times_s for p, _ in pieces]), whole.times_s)
        assert list(encoder.pieces([np.zeros(399, np.float32)], *given)) == []


def test_times_come_from_the_frames_or_from_its_own_clock(small):
    with pytest.raises(ValueError, match="times_s"):
        make(small)([noise(1.0)])
    with pytest.raises(ValueError, match="times_s"):
        make(small, hop_s=0.1)([noise(1.0)], np.arange(3) / 25)
    assert (make(small).clock, make(small, hop_s="0.1").clock) == ("frames", "own")


@pytest.mark.parametrize("name", ["face_noface.mov", "bbaf2n.mpg"])
def test_of_a_real_clip_the_rows_end_with_its_sound(name, small, real_data):
    samples = list(Video(real_data / "video" / name).sound(RATE_HZ))
    end_s = sum(map(len, samples)) / RATE_HZ
    times_s = np.arange(0, end_s + 1, 0.04)
    track = make(small)(iter(samples), times_s)
    assert 2.9 < end_s < 6.5
    np.testing.assert_array_equal(track.valid, times_s < end_s + SEEN_S / 2 - 0.02)


# ---- weights, options, recipe --------------------------------------------------------------------------------


def test_absent_weights_fail_at_once_and_say_what_to_get_and_where_to_put_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VACLI_WEIGHTS", raising=False)
    with pytest.raises(EncoderError) as caught:
        VGGish()
    for part in (
        "https://github.com/harritaylor/torchvggish/releases",
        "weights/vggish-10086976.pth",
        "Apache-2.0",
        "-o vggish.weights=FILE",
    ):
        assert part in str(caught.value)
    with pytest.raises(EncoderError, match=r"no weights at .*none\.pth"):
        VGGish("none.pth")


@pytest.mark.parametrize("file", ["vggish-10086976.pth", "vggish.safetensors", "vggish.pth"])
def test_weights_are_found_in_the_folders_for_them(file, small, tmp_path, monkeypatch):
    from safetensors.torch import save_file

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VACLI_WEIGHTS", str(tmp_path / "elsewhere"))
    (tmp_path / "elsewhere").mkdir()
    state = torch.load(small, weights_only=True)
    (save_file if file.endswith("safetensors") else torch.save)(state, tmp_path / "elsewhere" / file)
    found = VGGish(hop_s=0.5, dtype="float32", device="cpu")
    assert found.weights == tmp_path / "elsewhere" / file
    assert np.array_equal(found([noise(1.0)]).values, make(small, hop_s=0.5)([noise(1.0)]).values)


def test_the_pca_beside_the_weights_is_left_out(small, tmp_path):
    state = torch.load(small, weights_only=True)
    pca = {"pproc.pca_eigen_vectors": torch.zeros(128, 128), "pproc.pca_means": torch.zeros(128, 1)}
    torch.save({**state, **pca}, tmp_path / "pca.pth")
    a, b = (make(file, hop_s=0.5)([noise(1.0)]).values for file in (small, tmp_path / "pca.pth"))
    assert np.array_equal(a, b)


def test_weights_that_do_not_fit_are_named_key_by_key(small, tmp_path):
    state = torch.load(small, weights_only=True)
    without = {k: v for k, v in state.items() if k != "embeddings.4.bias"}
    for broken, complaint in (
        (without, "missing embeddings.4.bias"),
        ({**state, "extra.bias": torch.zeros(2)}, "unexpected extra.bias"),
        ({**state, "features.0.bias": torch.zeros(3)}, "features.0.bias is (3,), wanted (4,)"),
    ):
        torch.save(broken, tmp_path / "broken.pth")
        with pytest.raises(EncoderError) as caught:
            make(tmp_path / "broken.pth", hop_s=0.5)([noise(1.0)])
        assert complaint in str(caught.value)
        assert "vggish-10086976.pth" in str(caught.value)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"window": "center"}, "vggish.window is 'center'; wanted one of centred, look-ahead, causal"),
        ({"relu": "true"}, "vggish.relu is 'true'; wanted no or yes"),
        ({"hop_s": "fast"}, "vggish.hop_s is 'fast'; wanted seconds"),
        ({"hop_s": "0"}, "vggish.hop_s is '0'"),
        ({"hop_s": "nan"}, "vggish.hop_s is 'nan'"),
        ({"hop_s": "inf"}, "vggish.hop_s is 'inf'"),
        ({"dtype": "float16"}, "vggish.dtype is 'float16'"),
        ({"device": "abacus"}, "vggish.device is 'abacus'"),
    ],
)
def test_wrong_options_are_told(options, complaint, small):
    with pytest.raises(EncoderError) as caught:
        make(small, **options)
    assert complaint in str(caught.value)


def test_the_command_lines_names_make_it(small):
    options = {"weights": str(small), "hop_s": "0.5", "relu": "yes", "window": "causal", "dtype": "float32"}
    made = make_encoders(["ears=vggish"], {"ears": options}, Fingerprints())["ears"]
    assert isinstance(made, VGGish)
    again = VGGish(**{k: v for k, v in made.options().items() if v is not None})
    assert again.recipe() == made.recipe()
    sound = [noise(1.0)]
    assert np.array_equal(again(sound).values, made(sound).values, equal_nan=True)
    assert made([noise(1.0)]).values[1:].min() == 0  # relu


def test_the_recipe_knows_what_decides_the_values_and_nothing_else(small, tmp_path):
    first = make(small).recipe()
    (tmp_path / "copy.pth").write_bytes(small.read_bytes())
    assert make(tmp_path / "copy.pth").recipe() == first
    front_end = {k: v for k, v in LogMel().recipe().items() if k not in ("track", "dtype")}
    assert first["front_end"] == front_end
    state = torch.load(small, weights_only=True)
    torch.save({**state, "embeddings.4.bias": state["embeddings.4.bias"] + 1}, tmp_path / "other.pth")
    options = [
        {"window": "causal"},
        {"window": "look-ahead"},
        {"relu": "yes"},
        {"hop_s": 0.1},
        {"dtype": "bfloat16"},
    ]
    others = [*(make(small, **o).recipe() for o in options), make(tmp_path / "other.pth").recipe()]
    assert len({json.dumps(r, sort_keys=True) for r in (first, *others)}) == 7


def test_a_recipe_needs_no_torch(tmp_path):
    (tmp_path / "any.pth").touch()
    code = (
        "import sys; from vacli.extract.vggish import VGGish\n"
        "print(VGGish(sys.argv[1], dtype='float32').recipe()['track'])\n"
        "sys.exit(' '.join({'torch', 'timm', 'transformers'} & set(sys.modules)) or 0)"
    )
    words = [sys.executable, "-c", code, str(tmp_path / "any.pth")]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "vggish"), done.stderr


LOGMEL_RECIPE = {
    "track": "logmel", "version": 1, "rate_hz": 16000, "window_s": 0.025, "hop_s": 0.010, "bands": 64,
    "low_hz": 125.0, "high_hz": 7500.0, "log_offset": 0.01, "dtype": "float16",
}  # fmt: skip


def test_the_recipe_of_log_mel_is_what_it_was_when_stores_were_filled():
    assert LogMel().recipe() == LOGMEL_RECIPE
