"""What every test stands on: offline, two threads that do not spin, the random state left as it was."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is first imported

import numpy as np
import pytest
import torch
from hypothesis import settings
from safetensors.torch import save_file

from .commands import TINY, vacli

settings.register_profile(
    "vacli", deadline=None, database=None
)  # machines are slow at times; leave nothing behind
settings.load_profile("vacli")

SHARED = Path(__file__).resolve().parent.parent.parent / "shared"


@pytest.fixture(autouse=True)
def _same_randomness_after():
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    yield
    random.setstate(states[0])
    np.random.set_state(states[1])  # noqa: NPY002
    torch.set_rng_state(states[2])


@pytest.fixture(scope="session")
def lab(tmp_path_factory) -> Path:
    """A folder with puppets in the Aff-Wild2 layout, tiny encoder weights, features and a trained run."""
    from vacli.extract.finetune import initialise
    from vacli.extract.mae import build_vit
    from vacli.extract.synthetic import make_puppets

    lab = tmp_path_factory.mktemp("lab")
    make_puppets(lab / "data", train=2, validation=1, length_s=3, rate_hz=5, processes=1)
    torch.manual_seed(0)
    vit = build_vit("test_vit", 64)
    initialise(vit)
    about = {"model": "test_vit", "size": 64, "note": "made up for a test"}
    save_file(vit.state_dict(), lab / "vit.safetensors", metadata={"vacli": json.dumps(about)})
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(lab)
        vacli("extract", "data", "-o", "mae.weights=vit.safetensors")
        vacli("train", "--head", "mamba", *TINY)
    return lab


@pytest.fixture
def at(lab, tmp_path, monkeypatch) -> Path:
    """A copy of the lab to work in."""
    shutil.copytree(lab, tmp_path / "lab")
    (tmp_path / "lab" / "vit.safetensors").unlink()  # a run names its weights by their whole path
    (tmp_path / "lab" / "vit.safetensors").symlink_to(lab / "vit.safetensors")
    monkeypatch.chdir(tmp_path / "lab")
    return tmp_path / "lab"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium without a screen. Not for the whole session: while playwright runs, no event loop of others can."""
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    if os.environ.get("VACLI_REQUIRE_BROWSER") != "1":
        pytest.importorskip("playwright", reason="no playwright here (VACLI_REQUIRE_BROWSER=1 needs it)")
        if path is None:
            pytest.skip("no chromium here (VACLI_REQUIRE_BROWSER=1 makes this a failure)")
    from playwright.sync_api import sync_playwright

    assert path, f"VACLI_REQUIRE_BROWSER=1, and none of {', '.join(names)} is installed"
    with sync_playwright() as play:
        found = play.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def real_data() -> Path:
    """The real clips lent for tests; they are never part of the project."""
    folder = SHARED / "data"
    if not folder.is_dir():
        pytest.skip(f"the real clips are not here ({folder})")
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """needs_cuda is skipped without a GPU, unless VACLI_REQUIRE_CUDA=1: a GPU machine never passes by skipping."""
    if torch.cuda.is_available() or os.environ.get("VACLI_REQUIRE_CUDA") == "1":
        return
    for item in items:
        if item.get_closest_marker("needs_cuda"):
            item.add_marker(
                pytest.mark.skip(reason="no GPU here (VACLI_REQUIRE_CUDA=1 makes this a failure)")
            )
