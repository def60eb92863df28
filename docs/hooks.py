"""What `mkdocs build` has to be told of our code: where `vacli` lies, how its docstrings and its help are read."""

from __future__ import annotations

import inspect
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import click
import griffe
from mkdocs.plugins import event_priority

ROOT = Path(__file__).resolve().parent.parent
_CODE = shutil.ignore_patterns("__pycache__")
_copies: list[tempfile.TemporaryDirectory] = []


@event_priority(100)  # before mkdocstrings looks at its paths
def on_config(config: Any) -> Any:
    """Give mkdocstrings, which looks for `vacli/` on paths, a copy of the code in a folder of that name to read.

    Nothing of it is run. Only what is part of the package is copied, not .venv/ and the tests.
    """
    copy = tempfile.TemporaryDirectory(prefix="vacli-docs-")
    _copies.append(copy)
    package = Path(copy.name, "vacli")
    package.mkdir()
    for path in ROOT.glob("*.py"):
        shutil.copy2(path, package)
    for path in ROOT.glob("*/__init__.py"):
        if path.parent.name not in ("tests", "benchmarks", "build"):
            shutil.copytree(path.parent, package / path.parent.name, ignore=_CODE)
    python = config.plugins["mkdocstrings"].config["handlers"]["python"]
    python["paths"] = [copy.name]
    return config


def on_startup(**_: Any) -> None:
    """Give mkdocs-click, which runs lines together and knows no epilog, a help that is Markdown."""
    from vacli.cli import main

    commands: list[click.Command] = [main]
    while commands:
        command = commands.pop()
        told = [inspect.cleandoc(part) for part in (command.help, command.epilog) if part]
        command.help, command.epilog = "\n\n".join(map(fenced, told)), None
        commands += command.commands.values() if isinstance(command, click.Group) else ()


def fenced(help: str) -> str:
    """The paragraphs that click does not wrap (a line of \\b stands above them) as blocks that keep their lines."""
    return re.sub(
        r"^\x08\n((?:.+(?:\n|\Z))+)", lambda found: f"```text\n{found[1].rstrip()}\n```\n", help, flags=re.M
    )


def on_shutdown() -> None:
    """The copies go with the build."""
    while _copies:
        _copies.pop().cleanup()


class Tables(griffe.Extension):
    """Indented lines of a docstring, a name and what it stands for, are a table: Markdown would run them together."""

    _ROWS = re.compile(r"^ {4}\S+ {2,}\S.*\n(?: {4}.*\n?)+", re.M)

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = self._ROWS.sub(r"\n\g<0>\n", obj.docstring.value)
