"""The catalogue tells of every encoder, quickly, and without asking anybody."""

from __future__ import annotations

import subprocess
import sys

import pytest
from safetensors.torch import save_file
from vacli.extract import ENCODERS
from vacli.extract.catalogue import FAMILIES, listing


@pytest.fixture(autouse=True)
def nowhere(tmp_path, monkeypatch):
    """A machine without weights."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VACLI_WEIGHTS", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))


def block(name: str) -> str:
    return next(b for b in listing().split("\n\n") if b.startswith(f"{name}\n"))


@pytest.mark.parametrize("name", ENCODERS)
def test_every_encoder_has_its_block_with_all_facts(name):
    told = block(name)
    for fact in ("dim", "eats", "weights", "licence"):
        (line,) = [text for text in told.splitlines() if text.startswith(f"  {fact} ")]
        assert line.split(maxsplit=1)[1]
    assert ("example" in told) == (name in FAMILIES)
    assert FAMILIES.get(name, "") in told
    assert max(map(len, told.splitlines())) <= 160


def test_weights_on_this_machine_are_found(tmp_path):
    (tmp_path / "weights").mkdir()
    for name, file in (("mae", "mae_pretrain_vit_large.pth"), ("iresnet", "backbone.pth")):
        assert "here     not on this machine" in block(name)
        save_file({}, tmp_path / "weights" / file)
        assert f"here     {tmp_path / 'weights' / file}" in block(name)


def test_the_hugging_face_cache_is_looked_through(tmp_path):
    model = tmp_path / "cache" / "models--timm--vit_large_patch16_224.mae"
    (model / "snapshots" / "abc").mkdir(parents=True)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("abc")
    save_file({}, model / "snapshots" / "abc" / "model.safetensors")
    assert f"here     {model / 'snapshots'}" in block("mae")


ALONE = """
import socket, sys
def refuse(*_): raise AssertionError("asked the network")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
from vacli.extract.catalogue import listing
assert listing()
heavy = {"torch", "timm", "transformers", "cv2", "av"} & set(sys.modules)
sys.exit(" ".join(heavy) or 0)
"""


def test_it_imports_nothing_heavy_and_asks_no_network(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
