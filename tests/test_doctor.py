"""The doctor tells what is here and what is missing, downloads nothing, never faints, and is right about the disk."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from safetensors.torch import save_file
from vacli import doctor
from vacli.cli import main
from vacli.extract import ENCODERS, checkup
from vacli.store import Store
from vacli.store.show import listing

from .media_files import clicks, pictures, write_video

ROOT = Path(__file__).resolve().parent.parent
MAE = "vit_large_patch16_224.mae.safetensors"


@pytest.fixture(autouse=True)
def nowhere(tmp_path, monkeypatch):
    """A machine without weights and without a network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VACLI_WEIGHTS", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    checkup._hub_answers.cache_clear()


@pytest.fixture
def weighty(tmp_path) -> Path:
    """Now it has the default encoder's."""
    (tmp_path / "weights").mkdir()
    save_file({}, tmp_path / "weights" / MAE)
    return tmp_path / "weights" / MAE


def call(*words: str) -> Result:
    result = CliRunner().invoke(main, ["doctor", *words])
    assert isinstance(result.exception, SystemExit | None), result.output
    return result


def tree(*words: str) -> dict:
    return json.loads(call("--json", *words).stdout)


def test_without_weights_it_says_which_where_and_how_to_get_them():
    result = call()
    assert result.exit_code == 1
    [told] = result.stdout[result.stdout.index("missing (1):") :].splitlines()[1:]
    for word in ("mae", "timm/vit_large_patch16_224.mae", "weights/", "-o mae.weights=FILE"):
        assert word in told
    assert "CC-BY-NC 4.0" in result.stdout
    assert tree()["problems"] == [told.strip()]


def test_with_weights_nothing_is_missing(weighty):
    result = call()
    assert result.exit_code == 0, result.stdout
    assert result.stdout.rstrip().endswith("nothing is missing")
    assert str(weighty) in result.stdout
    found = tree()
    assert found["problems"] == []
    assert {e["name"] for e in found["weights"]["encoders"]} == set(ENCODERS)
    assert found["codecs"]["found"]["h264"]["here"]
    assert found["faces"]["mtcnn"]["weights_sha256"]
    assert found["machine"]["cores"] >= 1


def test_what_is_asked_for_is_what_must_be_there(weighty):
    assert call("--encoder", "logmel").exit_code == 0
    for name, word in (
        ("vggish", "torchvggish/releases"),
        ("x=iresnet", "-o x.weights=FILE"),
        ("mea", "unknown encoder 'mea'"),
        ("hf-audio:microsoft/wavlm-large", "hf download microsoft/wavlm-large"),
        ("timm:vit_tiny_patch16_224", "hf download timm/vit_tiny_patch16_224"),
    ):
        found = tree("--encoder", "mae", "--encoder", name)
        [problem] = found["problems"]
        assert problem.startswith(f"{name}: ")
        assert word in problem


def test_weights_are_found_wherever_they_are_looked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("VACLI_WEIGHTS", str(tmp_path / "elsewhere"))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "mae_pretrain_vit_large.pth").write_bytes(b"")
    save_file({}, tmp_path / "elsewhere" / "mine.safetensors", {"vacli": '{"note": "tuned on puppets"}'})
    (tmp_path / "elsewhere" / "torn.safetensors").write_bytes(b"no")
    result = call()
    assert result.exit_code == 0, result.stdout
    assert "tuned on puppets" in result.stdout
    assert "cannot read weights" in result.stdout


def test_a_network_is_enough_where_the_hub_has_them(monkeypatch):
    monkeypatch.setattr(checkup, "hub_answers", lambda wait_s: True)
    assert tree()["problems"] == []
    checkup._hub_answers.cache_clear()


def test_a_silent_name_server_is_not_waited_for(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    waiting = threading.Event()

    def ask(*_: object, **__: object) -> None:
        waiting.wait()
        raise OSError("no answer")

    monkeypatch.setattr("socket.create_connection", ask)
    assert not checkup.hub_answers(wait_s=0.1)
    waiting.set()


# ---- videos and the disk -------------------------------------------------------------------------------------


@pytest.fixture
def videos(tmp_path) -> Path:
    """Two videos that can be read, one of them silent, and one that cannot."""
    (tmp_path / "videos").mkdir()
    write_video(tmp_path / "videos" / "a.mp4", pictures(50), sound=clicks(2.0, [0.1]))
    write_video(tmp_path / "videos" / "b.mp4", pictures(25))
    (tmp_path / "videos" / "c.mp4").write_text("no video")
    return tmp_path / "videos"


def test_videos_are_counted_and_broken_ones_named(weighty, videos):
    result = call("--video", "videos")
    assert result.exit_code == 1
    assert "videos/c.mp4: cannot be read as a video" in result.stdout
    found = tree("--video", "videos")["videos"]
    assert (found["videos"], found["frames"]) == (3, 75)
    assert found["hours"] == pytest.approx(3 / 3600, rel=0.05)
    assert list(found["problems"]) == ["videos/c.mp4"]
    rows = {t["name"]: (t["rows"], t["dim"]) for t in found["tracks"]}
    assert rows["mae"] == (75, 1024)
    assert rows["logmel"][0] == pytest.approx(200, rel=0.05)


def test_the_estimate_is_what_an_extraction_then_takes(videos, tmp_path):
    (videos / "c.mp4").unlink()
    words = ["--encoder", "tests.test_doctor:Bright", "--encoder", "logmel"]
    found = tree("--video", "videos", *words)
    assert found["problems"] == []
    assert CliRunner().invoke(main, ["extract", "videos", *words]).exit_code == 1  # b is silent
    taken = {"people and faces": 0}
    for name, track in ((n, t) for v in listing(Store("features.zarr")) for n, t in v["tracks"].items()):
        name = "people and faces" if name in ("people", "faces") else name
        taken[name] = taken.get(name, 0) + track["bytes"]
    for track in found["videos"]["tracks"]:
        name = "bright" if ":" in track["name"] else track["name"]
        assert track["bytes"] == pytest.approx(taken[name], rel=0.05)


class Bright:
    """An encoder of somebody else's, without weights."""

    name, eats, dim = "bright", "crops", 512

    def options(self):
        return {}

    def recipe(self):
        return {"track": self.name, "version": 1, "dtype": "float16"}

    def __call__(self, crops):
        return crops.reshape(len(crops), -1)[:, :512].astype("float32")


def test_a_disk_that_is_too_small_is_a_problem(weighty, videos, monkeypatch):
    (videos / "c.mp4").unlink()
    assert call("--video", "videos").exit_code == 0
    usage = type("Usage", (), {"free": 1000, "total": 2000})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    [problem] = tree("--video", "videos")["problems"]
    assert "--store" in problem


def test_what_nobody_measured_has_no_time(weighty, videos):
    tracks = tree("--video", "videos", "--encoder", "tests.test_doctor:Bright")["videos"]["tracks"]
    assert [t["cpu_hours"] is None for t in tracks] == [False, True]


# ---- never fainting ------------------------------------------------------------------------------------------


def faint(*_: object, **__: object) -> None:
    raise RuntimeError("\x1b[2Jas sick\nas can be")


@pytest.mark.parametrize(
    "place",
    [
        "vacli.doctor._machine", "vacli.doctor._store", "vacli.doctor._runs", "vacli.doctor._disk",
        "vacli.doctor._videos", "vacli.temporal.checkup.torch_here", "vacli.temporal.checkup.scan_here",
        "vacli.extract.checkup.codecs_here", "vacli.extract.checkup.mtcnn_here",
        "vacli.extract.checkup.yunet_here", "vacli.extract.checkup.weights_here",
        "vacli.extract.checkup.lacking",
    ],
)  # fmt: skip
def test_whatever_is_broken_the_rest_is_told(weighty, videos, monkeypatch, place):
    monkeypatch.setattr(place, faint)
    result = call("--video", "videos")
    assert "RuntimeError: \ufffd[2Jas sick as can be" in result.stdout
    assert "\x1b" not in result.stdout
    assert "extras" in result.stdout
    assert "RuntimeError" in json.dumps(tree("--video", "videos"))


@pytest.mark.parametrize("made", ["text", "folder", "runs"])
def test_strange_files_where_ours_are_looked_for(weighty, tmp_path, made):
    if made == "text":
        (tmp_path / "features.zarr").write_text("no store")
        (tmp_path / "runs").write_text("no runs")
    elif made == "folder":
        (tmp_path / "features.zarr").mkdir()
    else:
        (tmp_path / "runs" / "a").mkdir(parents=True)
        (tmp_path / "runs" / "a" / "run.json").write_text("[]")
    found = tree()
    assert found["runs"]["finished"] == 0
    assert bool(found["problems"]) == (made != "runs")


def test_a_store_elsewhere_is_not_asked(weighty):
    assert "store ls" in tree("--store", "s3://bucket/features.zarr")["store"]["note"]


def test_every_extra_that_users_install_is_looked_for():
    optional = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert doctor.EXTRAS.keys() >= optional.keys() - {"dev", "docs"}


ALONE = """
import sys, time
from vacli.cli import main
def refuse(*_, **__): raise AssertionError("asked the network")
import socket
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
sys.argv = ["vacli", "doctor"]
try: main()
except SystemExit as e: code = e.code
sys.exit("timm is here" if "timm" in sys.modules else code)
"""


def test_it_is_quick_asks_no_network_when_told_so_and_imports_no_timm(weighty):
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert time.perf_counter() - began < 20  # 2.6 s alone; the room is for a busy machine
