"""The documents say what is: commands, options, files, limits and the example encoder of the README."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import click
import numpy as np
import pytest
from vacli import __version__
from vacli.cli import main

from .toy_store import make_store, tracks_of

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()


def commands(group: click.Group, prefix: str = "vacli") -> dict[str, click.Command]:
    found: dict[str, click.Command] = {}
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            found |= commands(command, f"{prefix} {name}")
        else:
            found[f"{prefix} {name}"] = command
    return found


@pytest.mark.parametrize("name", commands(main))
def test_every_command_is_in_the_readme_and_has_help(name):
    assert re.search(rf"`[^`]*{re.escape(name)}\b", README), name
    assert commands(main)[name].help


def test_the_readme_is_one_screen():
    assert len(README.splitlines()) <= 55


def test_every_option_the_readme_names_exists():
    known = {o for c in commands(main).values() for p in c.params for o in p.opts} | {"--help"}
    for word in re.findall(r"(?<![\w-])--[a-z][a-z-]*", README):
        assert word in known, word


def test_every_command_line_the_readme_shows_is_known():
    known = {name.removeprefix("vacli ") for name in commands(main)}
    shown = re.findall(r"(?:`|bin/|^)vacli ((?:store )?[a-z]+)", README, re.M)
    assert len(shown) > 10
    assert set(shown) <= known


def test_every_make_target_the_readme_names_exists():
    targets = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.M))
    for target in re.findall(r"(?:^|`)make ([a-z-]+)", README, re.M):
        assert target in targets, target


def test_every_variable_of_make_help_is_used():
    said = re.search(r"variables: (.*)'", MAKEFILE)
    assert said is not None
    for name in re.findall(r"([A-Z]+)=", said[1]):
        assert f"$({name})" in MAKEFILE, name


def test_every_module_stands_in_the_tree_of_the_documentation():
    text = (ROOT / "docs" / "developing.md").read_text()
    tree = text[text.index("## The tree") :]
    for room in ("store", "extract", "temporal", "report"):
        for path in (ROOT / room).glob("*.py"):
            assert path.name == "__init__.py" or path.name in tree, path


def test_the_changelog_knows_this_version():
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_store_formats_own_lines_read_a_store_without_us(tmp_path, monkeypatch):
    make_store(tmp_path / "features.zarr", train=1, validation=0)
    code = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "store-format.md").read_text(), re.S)
    assert code is not None
    assert "vacli." not in code[1]
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(code[1].replace("clip0", "v00"), names)
    wanted = tracks_of(0)["mae"]
    np.testing.assert_array_equal(names["values"], wanted.values)
    np.testing.assert_array_equal(names["times_s"], wanted.times_s)


def test_make_help_lists_every_target():
    told = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    phony = re.search(r"^\.PHONY: (.*)$", MAKEFILE, re.M)
    assert phony is not None
    for target in phony[1].split():
        assert re.search(rf"^{target}\s", told, re.M), target
