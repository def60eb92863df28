"""The trainable VGG of stage two is the VGGish of stage one, and its patches are those of the stored log-mel."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from vacli import VacliError
from vacli.extract import vggish
from vacli.extract.logmel import LogMel, log_mel
from vacli.store import Track
from vacli.temporal import vgg
from vacli.temporal.vgg import SILENCE, WINDOWS, LogMelRows, LogMelVgg, gather, gather_plain

RATE_HZ = 16000


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-0.5, 0.5, round(seconds * RATE_HZ)).astype(np.float32)


@pytest.fixture(scope="module")
def network() -> LogMelVgg:
    torch.manual_seed(0)
    return LogMelVgg().eval().requires_grad_(False)


@pytest.fixture
def trained(network):
    """The same network, to be differentiated; its gradients are gone afterwards."""
    yield network.requires_grad_(True)
    network.requires_grad_(False)
    network.zero_grad(set_to_none=True)


def some(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, 96, 64, generator=torch.Generator().manual_seed(seed))


# ---- the network ---------------------------------------------------------------------------------------------


def test_it_is_the_vggish_of_stage_one(network):
    """The two are written twice, as the stages never import each other; here they are held equal."""
    twin = vggish.build_vggish(last_relu=False)
    twin.load_state_dict(network.state_dict())  # strict: equal names and shapes
    patches = some(2, 3)
    with torch.inference_mode():
        wanted = vggish.embed(twin, patches.flatten(0, 1))
        got = network(patches)
    assert got.shape == (2, 3, 128)
    np.testing.assert_allclose(got.flatten(0, 1), wanted, atol=1e-4)
    assert wanted.std() > 0.1


def test_the_two_stages_mean_the_same_by_a_window():
    same = ("PATCH_ROWS", "BANDS", "DIM", "HOP_S", "WINDOWS")
    assert [getattr(vgg, name) for name in same] == [getattr(vggish, name) for name in same]
    assert (np.log(vggish.LOG_OFFSET), vggish.WINDOW_S) == (vgg.SILENCE, vgg.ROW_S)
    times_s = np.concatenate([np.arange(200) / 25, np.random.default_rng(0).uniform(0, 8, 100)])
    rows = LogMelRows([LogMel()([noise(10.0)])])
    for window in WINDOWS:
        wanted = vggish.patch_starts(times_s, window)
        inside = wanted >= -96
        assert np.array_equal(rows.starts(0, times_s, window).numpy()[inside] - 96, wanted[inside])


def test_of_one_sound_both_stages_give_the_same_embeddings(network, tmp_path):
    (tmp_path / "any.pth").touch()
    twin = vggish.build_vggish(last_relu=False)
    twin.load_state_dict(network.state_dict())
    encoder = vggish.VGGish(str(tmp_path / "any.pth"), dtype="float32", device="cpu")
    encoder.__dict__["_network"] = twin.eval().requires_grad_(False)
    sound, times_s = noise(1.5), np.arange(0, 2.5, 0.2)
    wanted = encoder([sound], times_s)
    rows = LogMelRows([LogMel()([sound])])
    patches, heard = rows.patches(rows.starts(0, times_s)[None])
    with torch.inference_mode():
        got = network(patches, heard)[0]
    assert np.array_equal(heard[0].numpy(), wanted.valid)
    assert 0 < wanted.valid.sum() < len(times_s)
    np.testing.assert_allclose(got[heard[0]], wanted.values[wanted.valid], atol=2e-2)  # float16, twice
    assert (got[~heard[0]] == 0).all()


def test_pieces_change_neither_values_nor_gradients(trained, monkeypatch):
    patches = some(2, 3)
    found = []
    for piece in (2, 100):  # computed again in the backward pass; all at once
        monkeypatch.setattr(vgg, "_PIECE", piece)
        trained.zero_grad()
        x = patches.clone().requires_grad_()
        y = trained(x)
        y.square().sum().backward()
        grads = {
            k: v.grad.clone() for k, v in trained.named_parameters() if not k.startswith("embeddings.0.w")
        }
        found.append((y.detach(), x.grad, grads))
    (y, x, grads), (y_once, x_once, grads_once) = found
    torch.testing.assert_close(y, y_once, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(x, x_once, rtol=1e-3, atol=1e-3 * float(x.abs().max()))
    for name, grad in grads.items():
        torch.testing.assert_close(grad, grads_once[name], rtol=1e-3, atol=1e-3 * float(grad.abs().max()))
        assert grad.abs().max() > 0


def test_a_masked_patch_changes_nothing_and_is_not_computed(trained, monkeypatch):
    patches, mask = some(2, 3), torch.tensor([[True, False, True], [False, False, True]])
    counted = []
    whole = trained._embed
    monkeypatch.setattr(trained, "_embed", lambda p: counted.append(len(p)) or whole(p))
    outs, grads = [], []
    for hidden in (0.0, float("nan")):
        trained.zero_grad()
        x = patches.masked_fill(~mask[..., None, None], hidden).requires_grad_()
        y = trained(x, mask)
        y.sum().backward()
        outs.append(y.detach())
        grads.append((x.grad, trained.embeddings[2].weight.grad.clone()))
    assert counted == [3, 3]
    assert torch.equal(outs[0], outs[1])
    assert (outs[0][~mask] == 0).all()
    torch.testing.assert_close(outs[0][mask], trained(patches)[mask].detach(), rtol=1e-4, atol=1e-4)
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)
        assert torch.isfinite(a).all()


def test_where_nothing_is_heard_at_all_there_are_zeros(network):
    got = network(some(2, 3), torch.zeros(2, 3, dtype=torch.bool))
    assert got.shape == (2, 3, 128)
    assert (got == 0).all()


def test_a_fresh_network_neither_fades_nor_explodes(network):
    with torch.inference_mode():
        assert 0.2 < float(network(some(1, 8)).std()) < 10


def test_bfloat16_is_near_float32(network):
    patches = some(1, 4)
    with torch.inference_mode():
        full = network(patches)
        with torch.autocast("cpu", torch.bfloat16):
            half = network(patches, torch.ones(1, 4, dtype=torch.bool)).float()
    assert 0 < (full - half).abs().max() < 0.05 * full.abs().max()


@pytest.mark.parametrize("file", ["vggish-10086976.pth", "vggish.safetensors"])
def test_it_starts_from_vggishs_weights(file, network, tmp_path):
    state = {k: v + 0.5 for k, v in network.state_dict().items()}
    pca = {"pproc.pca_eigen_vectors": torch.zeros(128, 128), "pproc.pca_means": torch.zeros(128, 1)}
    (save_file if file.endswith("safetensors") else torch.save)({**state, **pca}, tmp_path / file)
    fresh = LogMelVgg()
    fresh.start_from(tmp_path / file)
    assert all(torch.equal(v, state[k]) for k, v in fresh.state_dict().items())


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_weights_that_are_none_are_one_line(network, tmp_path):
    state = {k: v[:0] for k, v in network.state_dict().items()}
    for content, complaint in (
        (state, "do not fit VGGish: missing, unexpected or misshapen embeddings.0.bias"),
        ({"extra": torch.zeros(1)}, "do not fit VGGish"),
        ({"a": Bomb(tmp_path / "boom")}, "refused weights"),
        ([1, 2], "hold no state dict of tensors"),
    ):
        torch.save(content, tmp_path / "odd.pth")
        with pytest.raises(VacliError, match=complaint) as caught:
            network.start_from(tmp_path / "odd.pth")
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "boom").exists()
    with pytest.raises(VacliError, match="cannot read weights"):
        network.start_from(tmp_path / "none.safetensors")


# ---- the gather ----------------------------------------------------------------------------------------------


def test_the_gather_is_its_plain_twin_gradients_included():
    starts = torch.tensor([[0, 1, 30, 204], [204, 7, 7, 100]])
    grads = []
    found = []
    for way in (gather, gather_plain):
        rows = torch.randn(300, 64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        patches = way(rows, starts)
        assert patches.shape == (2, 4, 96, 64)
        (patches * torch.arange(96.0)[:, None] * (1 + starts)[..., None, None]).sum().backward()
        grads.append(rows.grad)
        found.append(patches.detach())
    assert torch.equal(*found)
    torch.testing.assert_close(*grads)
    assert grads[0].abs().max() > 0


@pytest.mark.parametrize("window", WINDOWS)
def test_patches_are_slices_of_the_log_mel_with_silence_around_it(window):
    sounds = [noise(1.2, 1), noise(0.05, 2), noise(2.0, 3)]
    tracks: list[Track | None] = [LogMel()([s]) for s in sounds]
    tracks.insert(1, None)
    sounds.insert(1, np.zeros(0, np.float32))
    rows = LogMelRows(tracks)
    times_s = np.arange(0, 4, 0.07)
    for clip, sound in enumerate(sounds):
        patches, heard = rows.patches(rows.starts(clip, times_s, window))
        whole = np.pad(log_mel(sound, RATE_HZ), ((600, 600), (0, 0)), constant_values=SILENCE)
        first = vggish.patch_starts(times_s, window)
        wanted = np.stack([whole[600 + f : 696 + f] for f in first])
        np.testing.assert_allclose(patches, wanted, atol=4e-3)
        length = len(whole) - 1200
        assert np.array_equal(heard.numpy(), (length > 0) & (first > -96) & (first < length))
    assert not heard.numpy()[times_s > 3].any()


def test_rows_of_nan_are_silence_that_nobody_heard():
    track = LogMel()([noise(3.0)])
    values = track.values.copy()
    values[50:200] = np.nan
    rows = LogMelRows([Track(values, track.times_s)])
    patches, heard = rows.patches(rows.starts(0, np.array([0.3, 1.2, 1.25, 2.5])))
    assert heard.tolist() == [True, False, False, True]
    assert torch.isfinite(patches).all()
    np.testing.assert_allclose(patches[1], SILENCE, atol=4e-3)


def test_tracks_of_another_encoder_are_refused():
    times_s = np.arange(10) * 0.01 + 0.0125
    for track in (
        Track(np.zeros((10, 32), np.float16), times_s),
        Track(np.zeros((10, 2, 64), np.float16), times_s),
        Track(np.zeros((10, 64), np.float16), times_s * 2),
        Track(np.zeros((10, 64), np.float16), times_s + 0.005),
    ):
        with pytest.raises(VacliError, match="another encoder"):
            LogMelRows([track])
    with pytest.raises(ValueError, match="window"):
        LogMelRows([None]).starts(0, times_s, "center")
