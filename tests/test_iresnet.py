"""IResNet gives the values of arcface_torch, and the USTC line's network is built and fed as theirs was."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from vacli import VacliError
from vacli.extract import ir50
from vacli.extract.encoder import make_encoders
from vacli.extract.ir50 import ArcFaceIR50, UstcIR50
from vacli.extract.iresnet import IResNet
from vacli.extract.weights import EncoderError
from vacli.store import Fingerprints

from .conftest import SHARED
from .made_up import made_up

DATA = Path(__file__).parent / "data"


@pytest.fixture
def narrow(monkeypatch):
    """Fewer than 43 million weights, where neither the values nor the shapes are the question."""
    monkeypatch.setattr(ir50, "_STAGES", ((4, 2), (8, 2), (16, 2), (32, 2)))


@pytest.fixture
def arcface(narrow, tmp_path) -> Path:
    """Weights as arcface_torch saves them: the bare state dict."""
    torch.save(made_up(ArcFaceIR50(), 0.5), tmp_path / "arcface.pth")
    return tmp_path / "arcface.pth"


@pytest.fixture
def ustc(narrow, tmp_path) -> Path:
    """Weights as the USTC line has them: a backbone and the classifier of eight expressions."""
    backbone = {f"backbone.{k}": v for k, v in made_up(UstcIR50(), 0.5).items()}
    logits = {"logits.weight": torch.zeros(8, 512), "logits.bias": torch.zeros(8)}
    torch.save({**backbone, **logits}, tmp_path / "ustc.pth")
    return tmp_path / "ustc.pth"


def iresnet(path: Path, variant: str = "arcface", **options) -> IResNet:
    return IResNet(variant, str(path), dtype="float32", device="cpu", **options)


@pytest.fixture
def crops() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (3, 112, 112, 3), np.uint8)


def test_the_values_are_those_of_arcface_torch(tmp_path):
    torch.save(made_up(ArcFaceIR50(), 0.5), tmp_path / "backbone.pth")
    golden = np.load(DATA / "iresnet50.npz")
    got = iresnet(tmp_path / "backbone.pth")(golden["image_rgb"])
    assert got.shape == (2, 512)
    np.testing.assert_allclose(got, golden["embedding"], atol=1e-4)


def test_the_parameters_have_the_names_and_shapes_of_arcface_torch():
    shapes = SHARED / "golden" / "state_dict_shapes.json"
    if not shapes.is_file():
        pytest.skip(f"the golden shapes are not here ({shapes})")
    golden = json.loads(shapes.read_text())["arcface_torch iresnet50"]
    with torch.device("meta"):
        state = ArcFaceIR50().state_dict()
    assert {k: list(v.shape) for k, v in state.items()} == golden


def test_colours_are_read_as_rgb(arcface, crops):
    encoder = iresnet(arcface)
    assert not np.allclose(encoder(crops), encoder(crops[..., ::-1].copy()), atol=1e-3)


def test_the_ustc_network_has_the_names_of_its_published_code():
    """Names and shapes that its strict load asks for, written down from its code."""
    with torch.device("meta"):
        shapes = {k: tuple(v.shape) for k, v in UstcIR50().state_dict().items()}
    assert len([k for k in shapes if k.endswith("res_layer.1.weight")]) == 24
    for name, shape in {
        "input_layer.0.weight": (64, 3, 3, 3),
        "input_layer.2.weight": (64,),
        "body.0.res_layer.0.running_var": (64,),
        "body.0.res_layer.2.weight": (64,),
        "body.3.shortcut_layer.0.weight": (128, 64, 1, 1),
        "body.3.shortcut_layer.1.bias": (128,),
        "body.7.res_layer.3.weight": (256, 256, 3, 3),
        "body.23.res_layer.4.running_mean": (512,),
        "output_layer.0.weight": (512,),
        "output_layer.3.weight": (512, 512 * 25),
        "output_layer.4.bias": (512,),
    }.items():
        assert shapes[name] == shape
    grown = {int(k.split(".")[1]) for k in shapes if "shortcut_layer" in k}
    assert grown == {3, 7, 21}  # nowhere else is there anything on the shortcut


def test_the_ustc_network_sees_the_middle_40_of_48_pixels(ustc, crops):
    encoder = iresnet(ustc, "ustc")
    got = encoder(crops)
    assert got.shape == (3, 512)
    np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1.0, atol=1e-5)
    small = [np.asarray(Image.fromarray(c).resize((48, 48), Image.Resampling.BICUBIC)) for c in crops]
    middle = np.stack(small)[:, 4:44, 4:44].transpose(0, 3, 1, 2)
    network = UstcIR50().eval()
    network.load_state_dict(made_up(network, 0.5))
    with torch.inference_mode():
        want = network((torch.from_numpy(middle) / 255 - 0.5) / 0.5)
    assert torch.nn.functional.cosine_similarity(torch.from_numpy(got), want).min() > 0.999


def test_the_rim_of_a_crop_of_48_pixels_is_not_seen_by_the_ustc_network(ustc):
    crops = np.random.default_rng(1).integers(0, 256, (1, 48, 48, 3), np.uint8)
    other = np.zeros_like(crops)
    other[:, 4:44, 4:44] = crops[:, 4:44, 4:44]
    encoder = iresnet(ustc, "ustc")
    assert np.array_equal(encoder(crops), encoder(other))


def test_the_ustc_backbone_alone_loads_as_well(ustc, crops, tmp_path):
    bare = tmp_path / "bare.safetensors"
    save_file(made_up(UstcIR50(), 0.5), bare)
    assert np.array_equal(iresnet(bare, "ustc")(crops[:1]), iresnet(ustc, "ustc")(crops[:1]))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda s: s.pop("layer3.1.bn2.bias"), "missing layer3.1.bn2.bias"),
        (lambda s: s.update({"logits.weight": torch.zeros(8, 512)}), "unexpected logits.weight"),
        (lambda s: s.update({"fc.weight": torch.zeros(512, 800)}), r"fc.weight is \(512, 800\), wanted"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(change, complaint, arcface, crops, tmp_path):
    state = torch.load(arcface, weights_only=True)
    change(state)
    torch.save(state, tmp_path / "changed.pth")
    with pytest.raises(EncoderError, match=complaint):
        iresnet(tmp_path / "changed.pth")(crops)


def test_weights_of_the_other_variant_are_told(arcface, ustc, crops):
    for path, variant, other in ((arcface, "ustc", "arcface"), (ustc, "arcface", "ustc")):
        with pytest.raises(EncoderError, match=f"-o iresnet.variant={other}") as caught:
            iresnet(path, variant)(crops)
        assert caught.value.fatal


@pytest.mark.parametrize(
    ("variant", "file"),
    [("arcface", "backbone.pth"), ("arcface", "iresnet50.safetensors"), ("ustc", "res50_ir_0.887.pth")],
)
def test_weights_are_found_under_their_own_names(variant, file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VACLI_WEIGHTS", str(tmp_path))
    save_file({}, tmp_path / file)
    assert IResNet(variant).weights == tmp_path / file


def test_absent_weights_are_told_at_once_with_the_file_and_its_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VACLI_WEIGHTS", raising=False)
    assert IResNet.found() is None
    with pytest.raises(EncoderError, match=r"arcface_torch.*weights/iresnet50.pth.*iresnet.weights=FILE"):
        IResNet()
    with pytest.raises(EncoderError, match=r"ABAW3.*weights/res50_ir_0.887.pth"):
        IResNet("ustc")
    with pytest.raises(VacliError, match=r"iresnet.variant is 'r100'; wanted arcface or ustc"):
        IResNet("r100")


def test_the_licence_is_told_where_the_weights_are_met(arcface, ustc):
    assert "non-commercial" in iresnet(arcface).licence
    assert "ask their makers" in iresnet(ustc, "ustc").licence


def test_it_is_made_by_its_name_and_made_again_by_its_options(arcface, ustc):
    own = {"variant": "ustc", "weights": str(ustc), "dtype": "float32"}
    encoders = make_encoders(
        ["iresnet", "fer=iresnet"],
        {"iresnet": {"weights": str(arcface), "dtype": "float32"}, "fer": own},
        Fingerprints(),
    )
    assert [e.variant for e in encoders.values()] == ["arcface", "ustc"]
    for encoder in encoders.values():
        assert IResNet(**encoder.options()).recipe() == encoder.recipe()
    assert encoders["iresnet"].recipe() != encoders["fer"].recipe()


def test_a_recipe_needs_no_network(arcface, monkeypatch):
    monkeypatch.setattr(IResNet, "_built", lambda self: pytest.fail("built a network"))
    assert iresnet(arcface).recipe()["size"] == 112
