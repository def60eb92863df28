"""The tutorial is run as a reader runs it: its commands, in order, in an empty folder, and what it says they give."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parent.parent / "docs" / "tutorial.md"
TOLERANCE = 0.1  # of a CCC; the page says so
_PART = re.compile(
    r"(?P<any>…)|(?P<decimal>-?\d+\.\d+(?![\w.]))|(?P<space>\s+)|(?P<text>[\w,/]+(?:\.\w+)*|[^\s\w…])"
)


@dataclass(frozen=True)
class Step:
    """A command of the page, and the lines that it says come of it."""

    command: str
    said: list[str]


def steps(page: str) -> list[Step]:
    """What stands behind `$ ` in the console blocks, each with the lines below it."""
    found: list[Step] = []
    for block in re.findall(r"^```console\n(.*?)^```", page, re.M | re.S):
        for line in block.splitlines():
            if line.startswith("$ "):
                found.append(Step(line[2:], []))
            else:
                found[-1].said.append(line)
    return found


def agrees(said: str, gave: str) -> bool:
    """Whether a line of output is what the page says: decimals within TOLERANCE, `…` anything, blanks any number."""
    pattern, numbers = "", []
    for part in _PART.finditer(said.strip()):
        if part["any"]:
            pattern += ".*?"
        elif part["space"]:
            pattern += r"\s+"
        elif part["decimal"]:
            numbers.append(float(part["decimal"]))
            pattern += r"(-?\d+\.\d+)"
        else:
            pattern += re.escape(part["text"])
    found = re.fullmatch(pattern, gave.strip())
    return found is not None and all(
        abs(number - float(came)) <= TOLERANCE for number, came in zip(numbers, found.groups(), strict=True)
    )


def missing(said: list[str], gave: list[str]) -> list[str]:
    """The lines that are said and do not come, in this order; other lines may stand between them."""
    rest = iter(gave)
    return [line for line in said if line.strip() != "…" and not any(agrees(line, came) for came in rest)]


def run(command: str, folder: Path) -> tuple[int, list[str]]:
    """Exit code and lines of a command, as a shell in `folder` gives them; progress bars are off."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("VACLI_")}
    env |= {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}",
        "HF_HUB_OFFLINE": "1",
        "TQDM_DISABLE": "1",
        "LC_ALL": "C",
    }
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    return done.returncode, done.stdout.splitlines()


def test_every_command_of_the_tutorial_gives_what_the_page_says(tmp_path):
    faults = []
    for step in steps(PAGE.read_text(encoding="utf-8")):
        code, lines = run(step.command, tmp_path)
        assert code == 0, f"$ {step.command}\n" + "\n".join(lines)
        if lost := missing(step.said, lines):
            faults.append("\n".join([f"$ {step.command}", "said:", *lost, "gave:", *lines]))
    assert not faults, "\n\n".join(faults)


def test_the_tutorial_trains_judges_predicts_and_looks():
    commands = [step.command for step in steps(PAGE.read_text(encoding="utf-8"))]
    for wanted in (
        "demo",
        "finetune",
        "extract",
        "train --head linear",
        "train --head mamba",
        "evaluate",
        "predict",
    ):
        assert any(command.startswith(f"vacli {wanted}") for command in commands), wanted


@pytest.mark.parametrize(
    ("said", "gave"),
    [
        ("CCC V 0.547 A 0.640", "CCC V 0.601 A 0.580"),
        ("CCC V -0.006, smoothed (…)", "CCC V 0.012, smoothed (valence none)"),
        ("runs/mamba-…: mean 0.593", "runs/mamba-336075c4: mean 0.593"),
        ("mamba      validation", "mamba validation"),
        ("(3,545,486 parameters) on 12 videos", "(3,545,486 parameters) on 12 videos"),
    ],
)
def test_a_line_that_differs_in_what_may_differ_agrees(said, gave):
    assert agrees(said, gave)


@pytest.mark.parametrize(
    ("said", "gave"),
    [
        ("CCC V 0.547", "CCC V 0.345"),
        ("CCC V 0.547", "CCC V nan"),
        ("48 tracks", "47 tracks"),
        ("runs/mamba-…: mean 0.593", "runs/linear-336075c4: mean 0.593"),
        ("(3,545,486 parameters)", "(3,545,487 parameters)"),
        ("1,0.200000,…,main,,", "2,0.200000,0.1,0.2,1,main,,"),
    ],
)
def test_a_line_that_differs_in_what_must_not_is_caught(said, gave):
    assert not agrees(said, gave)


def test_lines_in_another_order_are_missed():
    assert missing(["one", "…", "two"], ["one", "other", "two"]) == []
    assert missing(["one", "two"], ["two", "one"]) == ["two"]
