"""What all commands have in common: --quiet, -v, exit codes, mishaps told in a line, strict JSON, completion."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from vacli import VacliError
from vacli.cli import main
from vacli.cli_shell import Shell, print_json, say

from .media_files import clicks, pictures, write_video
from .toy_store import make_store

VACLI = str(Path(sys.executable).with_name("vacli"))


def run(*words: object, **how: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([VACLI, *map(str, words)], capture_output=True, text=True, check=False, **how)


@pytest.fixture
def at(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def toy(deed) -> click.Group:
    """A group with one command `do` that does it."""

    @click.group(cls=Shell)
    def group() -> None: ...

    group.add_command(click.Command("do", callback=deed))
    return group


def of(deed, *words: str):
    return CliRunner().invoke(toy(deed), list(words) or ["do"])


def raising(e: BaseException):
    def deed() -> None:
        raise e

    return deed


# ---- exit codes and mishaps ----------------------------------------------------------------------------------


def test_help_names_the_exit_codes():
    told = CliRunner().invoke(main, ["--help"]).output
    assert [line.split()[0] for line in told[told.index("Exit codes:") :].splitlines()[1:5]] == [
        "0", "1", "2", "130",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("mishap", "code", "told"),
    [
        (VacliError("no such\nfile \x1b[2J; mend it"), 1, "Error: no such file \ufffd[2J; mend it"),
        (KeyboardInterrupt(), 130, "stopped; what is done is kept, the same command goes on from there"),
        (click.UsageError("which?"), 2, "Error: which?"),
        (PermissionError(13, "Permission denied", "x.csv"), 1, "Permission denied: 'x.csv'; mend that"),
        (MemoryError(), 1, "Error: out of memory"),
        (ZeroDivisionError("of ours"), 1, "Error: ZeroDivisionError: of ours; this is a bug in vacli"),
        (click.Abort(), 1, "Aborted!"),
        (SystemExit(1), 1, ""),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, BaseException) else "",
)
def test_every_end_has_its_code_and_its_line(mishap, code, told):
    result = of(raising(mishap))
    assert result.exit_code == code
    assert told in result.stderr
    assert "Traceback" not in result.output
    assert result.stdout == ""


def test_a_bug_shows_where_it_is_with_v_and_a_mistake_never_does():
    for words in (["-v", "do"], ["do", "-v"]):
        assert "in deed\n    raise e" in of(raising(ZeroDivisionError()), *words).stderr
        assert "Traceback" not in of(raising(VacliError("mend it")), *words).stderr


def test_the_real_program_ends_with_the_documented_codes(at):
    for words, code in (
        (["encoders"], 0),
        (["store", "ls", "--store", "none.zarr"], 1),
        (["nonsense"], 2),
        (["heads", "--nonsense"], 2),
    ):
        done = run(*words)
        assert done.returncode == code, words
        assert "Traceback" not in done.stderr
        assert bool(done.stderr) == (code != 0)


def test_a_reader_who_leaves_and_closed_outputs_are_no_drama(at):
    done = subprocess.run(
        ["bash", "-c", f"{VACLI} encoders | head -1; {VACLI} encoders >&- && {VACLI} encoders 2>&- | head -1"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.split() == ["mae", "mae"]
    assert done.stderr == ""


# ---- --quiet and -v ------------------------------------------------------------------------------------------


def walk(command: click.Command, name: str) -> list[tuple[str, click.Command]]:
    inner = command.commands if isinstance(command, click.Group) else {}
    return [(name, command), *(pair for n, c in inner.items() for pair in walk(c, f"{name} {n}"))]


def test_every_command_takes_the_switches_once():
    for name, command in walk(main, "vacli"):
        options = [option for p in command.params for option in p.opts]
        for switch in ("--quiet", "-q", "--verbose", "-v"):
            assert options.count(switch) == 1, name


@pytest.mark.parametrize("words", [["--quiet", "do"], ["do", "-q"], ["-q", "do", "-q"]])
def test_quiet_keeps_what_was_asked_for(words):
    def deed() -> None:
        say("a note")
        say("another", err=True)
        print_json({"a": 1})
        click.echo("one video is broken", err=True)
        raise VacliError("mend it")

    result = of(deed, *words)
    assert json.loads(result.stdout) == {"a": 1}
    assert result.stderr == "one video is broken\nError: mend it\n"
    assert "TQDM_DISABLE" not in os.environ
    loud = of(deed)
    assert "a note" in loud.stdout
    assert "another" in loud.stderr


def test_v_logs_what_is_done_and_without_it_nothing_changes(at):
    write_video(at / "clip.mp4", pictures(8), sound=clicks(0.3, [0.1]))
    words = ["extract", "clip.mp4", "--encoder", "logmel", "--store"]
    told = CliRunner().invoke(main, ["-v", *words, "a.zarr"])
    assert told.exit_code == 0, told.output
    [planned] = [line for line in told.stderr.splitlines() if "to be made" in line]
    assert "INFO    vacli.extract.run: clip.mp4: to be made: people, faces, logmel; there: nothing" in planned
    assert "INFO" not in CliRunner().invoke(main, [*words, "b.zarr"]).output


def test_vv_lets_the_decoders_speak_until_the_command_is_over(at, capfd):
    video = write_video(at / "clip.mkv", pictures(60, 96, 96))
    video.write_bytes(video.read_bytes()[: video.stat().st_size * 2 // 3])
    words = ["extract", "clip.mkv", "--encoder", "logmel"]
    for number, (switch, speaks) in enumerate([("-v", False), ("-vv", True), ("-v", False)]):
        CliRunner().invoke(main, [*words, "--store", f"{number}.zarr", switch])
        assert ("File ended prematurely" in capfd.readouterr().err) == speaks


def test_quiet_draws_no_bar_and_in_a_file_v_neither(at):
    make_store(at / "features.zarr", train=2, validation=1)
    loud, calm, logged = (run("store", "verify", *switch) for switch in ([], ["--quiet"], ["-v"]))
    assert "verify: 100%" in loud.stderr
    assert calm.stderr == logged.stderr == ""
    assert calm.stdout == logged.stdout == loud.stdout != ""


# ---- JSON ----------------------------------------------------------------------------------------------------


def test_json_is_strict():
    result = of(
        lambda: print_json({"a": [float("nan"), float("-inf"), 1.5], 2: Path("x"), "c": (None, True)})
    )
    assert json.loads(result.stdout) == {"a": [None, None, 1.5], "2": "x", "c": [None, True]}


@pytest.mark.parametrize(
    ("words", "look"),
    [
        (["heads"], lambda t: t["mamba"]["streams"] == ["mae", "logmel"]),
        (["heads", "linear"], lambda t: list(t) == ["linear"]),
        (["encoders"], lambda t: {e["name"] for e in t} >= {"mae", "logmel"}),
        (["store", "ls"], lambda t: [v["id"] for v in t] == ["v00", "v01", "v02"]),
        (["store", "show", "v00"], lambda t: t["tracks"]["mae"]["valid"] <= t["tracks"]["mae"]["shape"][0]),
        (["store", "du"], lambda t: all(v["tracks"] == 3 and v["bytes"] > 0 for v in t.values())),
        (["store", "verify"], lambda t: t["damaged"] == {} and t["tracks"] > 3),
        (["store", "gc", "--dry-run"], lambda t: t == {"garbage": [], "freed_bytes": 0}),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_tables_come_as_json_and_nothing_else_does(at, words, look):
    make_store(at / "features.zarr", train=2, validation=1)
    result = CliRunner().invoke(main, [*words, "--json"])
    assert result.exit_code == 0, result.output
    assert look(json.loads(result.stdout))


def test_training_folds_and_sweeps_tell_their_tables_as_json(at):
    make_store(at / "features.zarr", train=4, validation=2)
    quick = ["--head", "linear", "--stream", "mae", "--set", "train.epochs=1", "--json"]

    def tree(*words: str) -> dict:
        result = CliRunner().invoke(main, [*words, *quick])
        assert result.exit_code == 0, result.output
        assert "epoch 1/1" in result.stderr
        return json.loads(result.stdout)

    assert set(tree("train")["figures"]) >= {"valence", "arousal", "mean"}
    one = tree("train", "--folds", "3", "--fold", "1", "--name", "three")
    assert [f["trained"] for f in one["folds"]] == [False, True, False]
    assert "mean" not in one
    whole = tree("train", "--folds", "3", "--name", "three")
    assert [f["trained"] for f in whole["folds"]] == [True] * 3
    assert set(whole["mean"]) == {"valence", "arousal", "mean"}
    found = tree("sweep", "--over", "train.lr=1e-3,1e-2", "--trials", "2")
    assert found["known"] == 2
    assert found["command"].startswith("vacli train --head linear")
    assert {"train.lr"} == set(found["trials"][0]["changes"])
    quiet = CliRunner().invoke(
        main, ["-q", "sweep", "--over", "train.lr=1e-3,1e-2", "--trials", "2", *quick[:-1]]
    )
    assert quiet.stdout.splitlines()[-1] == found["command"]  # the table was asked for, the epochs were not
    assert "epoch 1/1" not in quiet.output


# ---- completion ----------------------------------------------------------------------------------------------


def completed(line: str) -> list[str]:
    words = [*line.split(), *([""] if line.endswith(" ") else [])]
    asked = {"COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1), "_VACLI_COMPLETE": "bash_complete"}
    told = run(env={**os.environ, **asked}).stdout
    return told.splitlines()


@pytest.mark.parametrize(
    ("line", "among"),
    [
        ("vacli tr", "plain,train"),
        ("vacli store ver", "plain,verify"),
        ("vacli train --fol", "plain,--folds"),
        ("vacli train --head mamba-", "plain,mamba-va"),
        ("vacli heads lin", "plain,linear"),
        ("vacli evaluate --run mi", "plain,mine"),
        ("vacli evaluate --run three/", "plain,three/fold-1"),
        ("vacli evaluate --runs other --run a", "plain,abc"),
        ("vacli doctor --encoder ", "plain,iresnet"),
        ("vacli doctor --encoder x=log", "plain,x=logmel"),
        ("vacli doctor --video ", "file,"),
        ("vacli store ls --store fea", "dir,fea"),
        ("vacli completion f", "plain,fish"),
    ],
)
def test_commands_options_names_and_paths_are_completed(at, line, among):
    for place in ("runs/mine", "runs/three/fold-1", "other/abc"):
        (at / place).mkdir(parents=True)
        (at / place / "run.json").write_text("{}")
    (at / "runs/three/folds.json").write_text("{}")
    assert among in completed(line)


def test_completing_is_quick_and_imports_nothing_heavy(at):
    code = (
        "import sys, vacli.cli\n"
        "try: vacli.cli.main(prog_name='vacli')\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'timm', 'zarr', 'cv2', 'av', 'numpy', 'pydantic'} & set(sys.modules)\n"
        "sys.exit(' '.join(heavy) or 0)"
    )
    asked = {"COMP_WORDS": "vacli train --head ", "COMP_CWORD": "3", "_VACLI_COMPLETE": "bash_complete"}
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, env={**os.environ, **asked})
    assert time.perf_counter() - began < 2.0  # 0.1 s alone; the room is for a busy machine


@pytest.mark.skipif(not shutil.which("bash"), reason="no bash here")
def test_bash_takes_the_script_and_completes_with_it(at):
    asked = """
        eval "$(vacli completion bash)"
        complete -p vacli
        COMP_WORDS=(vacli train --head cross) COMP_CWORD=3
        _vacli_completion vacli 2> /dev/null  # compopt wants a key to have been pressed
        echo "${COMPREPLY[@]}"
    """
    env = {**os.environ, "PATH": f"{Path(VACLI).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "--norc", "-c", asked], capture_output=True, text=True, check=True, env=env
    )
    assert done.stdout.splitlines() == [
        "complete -o nosort -F _vacli_completion vacli",
        "crossattn crossattn-light",
    ]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_says_how_to_install_it(shell):
    told = CliRunner().invoke(main, ["completion", shell]).stdout
    assert f"vacli completion {shell}" in told.splitlines()[-1]
    assert told.splitlines()[-1].startswith("#")
    if shell == "zsh":
        assert told.startswith("#compdef vacli")  # a file of its fpath must begin so
