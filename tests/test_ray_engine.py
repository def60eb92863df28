"""The same run as Ray tasks: two workers fill the store that one process would have filled, track for track."""

from __future__ import annotations

import builtins
import os
import subprocess
import sys
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from vacli import VacliError
from vacli.extract import ray_engine
from vacli.extract.datasets import find
from vacli.extract.encoder import make_encoders
from vacli.extract.people import People
from vacli.extract.ray_engine import extract_with_ray
from vacli.extract.run import extract
from vacli.store import Store

ENCODER = """
class Mean:
    name, eats, dim = "mean", "crops", 3
    def __init__(self, scale="1"): self.scale = float(scale)
    def options(self): return {"scale": self.scale}
    def recipe(self): return {"track": "mean", "version": 1, **self.options()}
    def __call__(self, crops): return self.scale * crops.mean(axis=(1, 2), dtype="float32")
"""
WORDS = ["--encoder", "ray_toys:Mean", "-o", "mean.scale=2", "--engine", "ray", "--workers", "2"]


def test_two_workers_fill_the_same_store(tmp_path, monkeypatch):
    lab, data = tmp_path / "lab", tmp_path / "data"
    lab.mkdir()
    (lab / "ray_toys.py").write_text(ENCODER)
    rng = np.random.default_rng(0)
    for name in ("a", "b", "c"):
        (data / "cropped_aligned" / name).mkdir(parents=True)
        for number in range(1, 9):
            picture = rng.integers(0, 255, (112, 112, 3), np.uint8)
            cv2.imwrite(str(data / "cropped_aligned" / name / f"{number:05}.jpg"), picture)
    (data / "torn.mp4").write_text("no film")
    monkeypatch.syspath_prepend(lab)
    alone = Store(tmp_path / "alone.zarr", create=True)
    extract(find(data), make_encoders(["ray_toys:Mean"], {"mean": {"scale": "2"}}, alone.fingerprints), alone)
    sys.modules.pop("ray_toys", None)
    vacli = [sys.executable, "-c", "from vacli.cli import main; main()"]
    ran = subprocess.run(
        [*vacli, "extract", str(data), "--store", str(tmp_path / "ray.zarr"), *WORDS],
        env={**os.environ, "PYTHONPATH": str(lab)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 1, ran.stderr  # of torn.mp4
    assert "torn.mp4: cannot be read as a video" in ran.stderr
    assert "Traceback" not in ran.stderr
    assert "computed 3 tracks" in ran.stdout
    filled = Store(tmp_path / "ray.zarr")
    assert filled.videos() == alone.videos()
    assert filled.entries() == alone.entries()
    for name in filled.entries():
        if "failed" not in filled.record(name):
            assert filled.record(name)["arrays"] == alone.record(name)["arrays"]


def test_without_ray_it_is_said_how_to_get_it(tmp_path, monkeypatch):
    real = builtins.__import__

    def absent(name: str, *args, **kwargs):
        if name == "ray" or name.startswith("ray."):
            raise ImportError("No module named 'ray'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(VacliError, match=r"pip install 'vacli\[ray\]'"):
        extract_with_ray([], {}, Store(tmp_path / "s.zarr", create=True), People())


@pytest.mark.parametrize(("before", "then"), [(None, "0"), ("1", "1")])
def test_ray_reports_nothing_home_unless_its_user_wants_it(tmp_path, monkeypatch, before, then):
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "")  # so that what is set meanwhile is undone
    monkeypatch.delenv("RAY_USAGE_STATS_ENABLED") if before is None else monkeypatch.setenv(
        "RAY_USAGE_STATS_ENABLED", before
    )
    seen = []

    def init(**_):
        seen.append(os.environ["RAY_USAGE_STATS_ENABLED"])
        raise VacliError("enough")

    monkeypatch.setattr(ray_engine, "_ray", lambda: SimpleNamespace(init=init))
    with pytest.raises(VacliError, match="enough"):
        extract_with_ray([], {}, Store(tmp_path / "s.zarr", create=True), People())
    assert seen == [then]
