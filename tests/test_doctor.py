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
import torch
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


def problems(*words: str) -> list[tuple[str, str]]:
    return [(kind, text) for kind, told in tree(*words)["problems"].items() for text in told]


def write_run(folder: Path, finished_at: str, **encoders: dict | None) -> Path:
    """A trained run, as far as its run.json goes."""
    streams = {name: {"track": name, "encoder": made_by} for name, made_by in encoders.items()}
    about = {"preset": {"name": "mamba"}, "streams": streams, "figures": {}, "finished_at": finished_at}
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(about))
    return folder


def made_by(kind: str, **options: str) -> dict:
    return {"kind": kind, "options": options}


def test_without_weights_it_says_which_where_and_how_to_get_them():
    result = call()
    assert result.exit_code == 1
    [told] = result.stdout[result.stdout.index("missing (1):") :].splitlines()[1:]
    for word in ("mae", "timm/vit_large_patch16_224.mae", "weights/", "-o mae.weights=FILE"):
        assert word in told
    assert "CC-BY-NC 4.0" in result.stdout
    assert problems() == [("missing", told.strip())]
    assert result.stdout.startswith("1 thing is missing: see the end\n")


def test_with_weights_nothing_is_missing(weighty):
    result = call()
    assert result.exit_code == 0, result.stdout
    assert result.stdout.startswith("all well\n")
    assert str(weighty) in result.stdout
    found = tree()
    assert not any(found["problems"].values())
    assert {e["name"] for e in found["weights"]["encoders"]} == set(ENCODERS)
    assert found["codecs"]["found"]["h264"]["here"]
    assert found["faces"]["mtcnn"]["weights_sha256"]
    assert found["machine"]["cores"] >= 1


def test_what_is_asked_for_is_what_must_be_there(weighty):
    assert call("--encoder", "logmel").exit_code == 0
    for name, kind, word in (
        ("vggish", "missing", "torchvggish/releases"),
        ("x=iresnet", "missing", "-o x.weights=FILE"),
        ("mea", "wrong", "unknown encoder 'mea'"),
        ("hf-audio:microsoft/wavlm-large", "missing", "hf download microsoft/wavlm-large"),
        ("timm:vit_tiny_patch16_224", "missing", "hf download timm/vit_tiny_patch16_224"),
    ):
        [(told_as, problem)] = problems("--encoder", "mae", "--encoder", name)
        assert told_as == kind
        assert problem.startswith(f"{name}: ")
        assert word in problem


def test_weights_are_found_wherever_they_are_looked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("VACLI_WEIGHTS", str(tmp_path / "elsewhere"))
    (tmp_path / "elsewhere").mkdir()
    torch.save({}, tmp_path / "elsewhere" / "mae_pretrain_vit_large.pth")
    save_file({}, tmp_path / "elsewhere" / "mine.safetensors", {"vacli": '{"note": "tuned on puppets"}'})
    (tmp_path / "elsewhere" / "torn.safetensors").write_bytes(b"no")
    result = call()
    assert result.exit_code == 0, result.stdout
    assert "tuned on puppets" in result.stdout
    assert "torn.safetensors, 2 B: cannot be read as weights" in result.stdout


class Runs:
    """What runs code where it is unpickled."""

    def __reduce__(self):
        return print, ("code was run",)


@pytest.mark.parametrize("made", ["noise", "empty", "cut", "code", "whole", "old torch"])
def test_a_file_that_is_no_weights_is_not_taken_for_some(tmp_path, monkeypatch, capfd, made):
    monkeypatch.setenv("VACLI_WEIGHTS", str(tmp_path))
    file = tmp_path / "vggish.pth"
    torch.save(
        {"a": Runs() if made == "code" else torch.zeros(3)},
        file,
        _use_new_zipfile_serialization=made != "old torch",
    )
    whole = file.read_bytes()
    file.write_bytes({"noise": b"\x07noise" * 170, "empty": b"", "cut": whole[:-30]}.get(made, whole))
    result = call("-q", "--encoder", "vggish")
    assert "code was run" not in capfd.readouterr().out
    if made in ("whole", "old torch"):
        assert (result.exit_code, result.stdout) == (0, "")
    else:
        assert result.exit_code == 1
        assert result.stdout.startswith(f"cannot be read (1):\n  vggish: {file} cannot be read as weights")
        assert f"there is {file}, " in call().stdout


def test_a_folder_of_weights_that_is_not_there_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("VACLI_WEIGHTS", "/nonexist")
    assert "/nonexist (no such folder)" in call().stdout
    assert "($VACLI_WEIGHTS, /nonexist, is no folder)" in call("-q").stdout
    monkeypatch.setenv("VACLI_WEIGHTS", str(tmp_path))
    assert f"{tmp_path} (no such" not in call().stdout
    assert "is no folder" not in call().stdout


def test_quiet_says_only_what_is_wrong(videos, weighty):
    assert call("-q", "--encoder", "mae").stdout == ""
    lines = call("-q", "--video", "videos", "--encoder", "vggish").stdout.splitlines()
    assert [lines[i] for i in (0, 2)] == ["missing (1):", "cannot be read (1):"]
    assert [lines[i].partition(": ")[0] for i in (1, 3)] == ["  vggish", "  videos/c.mp4"]
    assert len(lines) == 4


def test_a_network_is_enough_where_the_hub_has_them(monkeypatch):
    monkeypatch.setattr(checkup, "hub_answers", lambda wait_s: True)
    assert problems() == []
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


# ---- what the newest run needs -------------------------------------------------------------------------------


def test_the_newest_run_is_judged_by_its_own_weights(tmp_path):
    own = tmp_path / "tuned.safetensors"
    save_file({}, own)
    write_run(tmp_path / "runs" / "old", "2026-01-01", mae=made_by("mae", weights="/nowhere.pth"))
    write_run(
        tmp_path / "runs" / "new",
        "2026-01-02",
        mae=made_by("mae", weights=str(own)),
        logmel=made_by("logmel"),
    )
    result = call()
    assert result.exit_code == 0, result.stdout
    assert result.stdout.startswith("all well with what is needed; not ready: extract (see below)\n")
    assert "predict     with runs/new, which reads mae, logmel: all is there" in result.stdout
    assert "extract     with mae, logmel: not ready\n            mae: no weights" in result.stdout
    assert call("--encoder", "mae").exit_code == 1  # asked for by name
    own.write_bytes(b"torn")
    [(kind, told)] = problems()
    assert (kind, told.startswith(f"mae: {own} cannot be read as weights")) == ("unreadable", True)
    own.unlink()
    result = call()
    assert result.exit_code == 1
    assert f"missing (1):\n  mae: no weights at {own}" in result.stdout
    assert "-o mae.weights=FILE" in result.stdout
    assert call("--encoder", "logmel").exit_code == 0


def test_whatever_else_a_run_reads_is_judged_as_extract_would(tmp_path, weighty):
    write_run(
        tmp_path / "runs" / "r", "2026-01-01",
        sound=made_by("vggish"), mine=made_by("not.installed:Encoder"), others=None, odd={"kind": "mae"},
    )  # fmt: skip
    found = tree()
    needs = found["needs"]["predict"]
    assert needs["sound"]["kind"] == "missing"
    assert "-o sound.weights=FILE" in needs["sound"]["text"]
    assert needs["mine"] is None  # nothing that a stranger's run names is imported
    assert needs["others"]["kind"] == "imported"
    assert needs["odd"]["kind"] == "wrong"
    assert [text.partition(":")[0] for told in found["problems"].values() for text in told] == [
        "sound",
        "odd",
    ]


def test_a_run_that_cannot_be_opened_is_said(tmp_path, weighty):
    write_run(tmp_path / "runs" / "r", "2026-01-01")
    (tmp_path / "runs" / "r" / "run.json").write_text('{"figures": {}, "finished_at": "2026"}')
    [(kind, told)] = problems()
    assert kind == "wrong"
    assert told.startswith("runs: no finished run in runs")


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
    assert result.stdout.startswith("1 cannot be read: see the end\n")
    assert "cannot be read (1):\n  videos/c.mp4: cannot be read as a video" in result.stdout
    assert "missing (" not in result.stdout
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
    assert not any(found["problems"].values())
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
    [(kind, problem)] = problems("--video", "videos")
    assert kind == "wrong"
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
    assert any(found["problems"].values()) == (made != "runs")


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
