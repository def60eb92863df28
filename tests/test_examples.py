"""The examples do what their own comments say they should give."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from vacli.store import Store

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def call(script: str, *words: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run an example as a user with vacli's environment activated does."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = ["bash", str(EXAMPLES / script), *map(str, words)]
    env = {**os.environ, "PATH": path, "TMPDIR": str(cwd)}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.sh")), ids=lambda p: p.name)
def test_an_example_stops_at_the_first_mishap_and_says_what_it_should_give(path):
    text = path.read_text()
    assert "\nset -euo pipefail\n" in text
    assert "# This should give:" in text
    assert os.access(path, os.X_OK)


def check_judgements(store: Store) -> None:
    """The first event of run 1: FORREST alone, 12 s from 192 s. The events of run 3 lie on a grid from 0.92 s."""
    tracks = {}
    for video_id in ("run-1", "run-3"):
        address = store.videos()[video_id]["tracks"]["label.va"]
        tracks[video_id] = store.get(store.recipe_of(address["folder"]), address["media"])
    first = np.flatnonzero(tracks["run-1"].valid)[:12]
    np.testing.assert_allclose(tracks["run-1"].times_s[first], np.arange(192.5, 204))
    np.testing.assert_allclose(tracks["run-1"].values[first], [[2 / 3, -2 / 3]] * 12, rtol=1e-6)
    np.testing.assert_allclose(tracks["run-3"].times_s[:3], [1.42, 2.42, 3.42])


def test_studyforrest_has_the_rows_it_promises(real_data, tmp_path):
    first = call("studyforrest.sh", real_data / "studyforrest", "sf.zarr", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    promised = re.findall(r"^#   (.*refused)$", (EXAMPLES / "studyforrest.sh").read_text(), re.M)
    assert len(promised) == 3
    assert all(line in first.stdout for line in promised)
    assert "vacli train" in first.stdout

    store = Store(tmp_path / "sf.zarr")
    check_judgements(store)
    rows, dims = (
        {"sf.audio": 0, "sf.visual": 0, "label.va": 0},
        {"sf.audio": 2, "sf.visual": 4, "label.va": 2},
    )
    labelled = 0
    for facts in store.videos().values():
        for name, address in facts["tracks"].items():
            track = store.get(store.recipe_of(address["folder"]), address["media"])
            assert track.values.shape[1] == dims[name]
            rows[name] += len(track)
            labelled += int(track.valid.sum()) if name == "label.va" else 0
    assert sorted(store.videos()) == [f"run-{run}" for run in range(1, 9)]
    assert (rows, labelled) == ({"sf.audio": 180_759, "sf.visual": 180_783, "label.va": 7_055}, 4_842)
    assert {path.name for path in tmp_path.iterdir()} == {"sf.zarr"}  # its working folder is gone


def test_studyforrest_says_what_is_missing(tmp_path):
    assert "usage:" in call("studyforrest.sh", cwd=tmp_path).stderr
    (tmp_path / "data").mkdir()
    done = call("studyforrest.sh", tmp_path / "data", cwd=tmp_path)
    assert done.returncode == 2
    assert "has no conf_audio_run-1_events.tsv.gz" in done.stderr
