"""The documentation is built without a warning, loads nothing from elsewhere, and what it shows works."""

from __future__ import annotations

import html
import importlib.util
import inspect
import os
import re
import shlex
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import click
import numpy as np
import pytest
from vacli import __version__
from vacli.cli import main
from vacli.extract import ENCODERS
from vacli.store import Store
from vacli.store.curves import HEADER
from vacli.store.exports import FORMATS
from vacli.temporal.blocks import BLOCKS
from vacli.temporal.preset import CrossAttn, Encode, Preset, Vgg, preset_names

from .commands import vacli
from .toy_store import make_store, tracks_of

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = {p.relative_to(DOCS).as_posix(): p.read_text(encoding="utf-8") for p in sorted(DOCS.rglob("*.md"))}
SHELL = re.compile(r"^```(?:bash|console)\n(.*?)^```", re.M | re.S)


def code(page: str, language: str, number: int = 0) -> str:
    """A block of a language in a page, by default the first."""
    return re.findall(rf"^```{language}\n(.*?)^```", PAGES[page], re.M | re.S)[number]


def command_lines() -> list[tuple[str, list[str]]]:
    """(page, words behind `vacli`) of every command line in every block for a shell."""
    found = []
    for page, text in PAGES.items():
        for block in SHELL.findall(text):
            for line in block.replace("\\\n", " ").splitlines():
                shown = re.match(r"(?:\$ )?(?:torchrun .*? )?vacli (.*)", line)
                if shown:
                    variables = re.sub(r"\$\{?\w+\}?", "1", shown[1])
                    words = shlex.split(variables, comments=True)
                    end = min(words.index(sign) if sign in words else len(words) for sign in (">", "||"))
                    found.append((page, words[:end]))
    return found


def all_commands(group: click.Group, prefix: str = "vacli") -> dict[str, click.Command]:
    found: dict[str, click.Command] = {}
    for name, command in group.commands.items():
        path = f"{prefix} {name}"
        found |= all_commands(command, path) if isinstance(command, click.Group) else {path: command}
    return found


# ---- the built site --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    if importlib.util.find_spec("mkdocs") is None:
        pytest.skip("mkdocs is not installed: pip install 'vacli[docs]'")
    out = tmp_path_factory.mktemp("site")
    nowhere = "http://127.0.0.1:9"  # whoever asks the network gets an error
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "http_proxy": nowhere, "https_proxy": nowhere}
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", out],  # --quiet would stop it counting
        cwd=ROOT, env=env, capture_output=True, text=True,
    )  # fmt: skip
    assert built.returncode == 0, built.stdout + built.stderr
    assert "Documentation built" in built.stderr
    assert "WARNING" not in built.stderr
    return out


class _Loaded(HTMLParser):
    """What a page makes a browser load by itself, and the text of its headings."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.ids: set[str] = set()
        self.components: set[str] = set()
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag != "a" and "canonical" not in (given.get("rel") or ""):
            self.loaded += [v for k, v in attrs if k in ("src", "srcset", "href", "poster", "data") and v]
        self.ids.add(given.get("id") or "")
        self.components.add(given.get("data-md-component") or "")


def test_every_page_is_built(site):
    for page in PAGES:
        assert (site / page).with_suffix(".html").is_file(), page


def test_no_page_loads_anything_from_elsewhere(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > len(PAGES)
    for page in pages:
        found = _Loaded(page)
        assert found.loaded, page
        assert not [url for url in found.loaded if re.match(r"(https?:)?//", url)], page
        assert "source" not in found.components, (
            "the theme asks api.github.com about a repository that it shows"
        )
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*[\"']?(https?:)?//", sheet.read_text()), sheet


def test_what_a_page_loads_is_there(site):
    for page in site.rglob("*.html"):
        for url in _Loaded(page).loaded:
            target = url.partition("#")[0].partition("?")[0]
            if target and not target.startswith(("data:", "/")) and page.name != "404.html":
                assert (page.parent / target).resolve().exists(), f"{page}: {url}"


def test_every_command_is_in_the_reference(site):
    text = (site / "reference" / "commands.html").read_text(encoding="utf-8")
    assert "Sentinel" not in text, "click's own word for no default has slipped in"
    for name, command in all_commands(main).items():
        assert f'id="{name.replace(" ", "-")}"' in text, name
        for param in command.params:
            if isinstance(param, click.Option) and not param.hidden:
                assert param.opts[-1] in text, f"{name} {param.opts[-1]}"


def test_what_is_not_wrapped_in_a_terminal_keeps_its_lines_in_the_reference(site):
    """Paragraphs below a line of \\b, in a help or below it: examples, the exit codes."""
    page = (site / "reference" / "commands.html").read_text(encoding="utf-8")
    text = html.unescape(re.sub(r"<[^>]+>", "", page))
    commands = [main, *all_commands(main).values()]
    helps = [inspect.cleandoc(part) for c in commands for part in (c.help, c.epilog) if part]
    kept = [part for told in helps for part in re.findall(r"^\x08\n((?:.+\n?)+)", told, re.M)]
    assert len(kept) >= 3
    for part in kept:
        assert part.strip() in text, part


@pytest.mark.parametrize(
    "name",
    [
        *("store.track.Track", "store.store.Store", "store.curves.Curve", "extract.media.Video"),
        *("extract.encoder.Encoder", "temporal.windows.Windows", "temporal.model.Network"),
        *("temporal.predict.Run", "temporal.predict.predict"),
    ],
)
def test_the_python_reference_comes_from_the_docstrings(site, name):
    page = site / "reference" / "python.html"
    assert f"vacli.{name}" in _Loaded(page).ids


def test_the_changes_are_those_of_the_repository(site):
    assert __version__ in (site / "changelog.html").read_text(encoding="utf-8")


# ---- what the pages say ------------------------------------------------------------------------------------------


def test_every_command_line_that_is_shown_is_understood():
    lines = command_lines()
    assert len(lines) > 50
    for page, words in lines:
        command: click.Command = main
        args = list(words)
        while isinstance(command, click.Group) and not args[0].startswith("-"):
            assert args[0] in command.commands, f"{page}: vacli {' '.join(words)}"
            command = command.commands[args.pop(0)]
        try:
            command.make_context("vacli", args)
        except click.exceptions.Exit:
            pass  # --version
        except click.UsageError as e:
            pytest.fail(f"{page}: vacli {' '.join(words)}: {e.message}")


def test_every_option_that_is_named_exists():
    known = {"--help"} | {o for c in all_commands(main).values() for p in c.params for o in p.opts}
    for page, text in PAGES.items():
        for word in re.findall(r"(?<![\w-])--[a-z][a-z-]*", SHELL.sub("", text)):
            assert word in known, f"{page}: {word}"


def test_every_head_is_in_the_reference():
    for name in preset_names():
        assert f"presets/{name}.toml" in PAGES["reference/heads.md"], name
        assert f"`{name}`" in PAGES["reference/heads.md"], name


@pytest.mark.parametrize("table", [Preset, Encode, Vgg, CrossAttn])
def test_every_key_of_a_preset_is_explained(table):
    for key in table.model_fields:
        assert re.search(rf"\b{key}(,|:)", table.__doc__), key


def test_every_encoder_is_in_the_reference():
    for name, path in ENCODERS.items():
        assert f"\n## {name}\n" in PAGES["reference/encoders.md"], name
        assert f"::: {path.replace(':', '.')}" in PAGES["reference/encoders.md"], path


def test_every_block_is_told_with_its_options():
    for name, block in BLOCKS.items():
        row = re.search(rf"^\| `{name}` \|.*$", PAGES["how-to/your-head.md"], re.M)
        assert row is not None, name
        options = [p.name for p in inspect.signature(block).parameters.values() if p.kind is p.KEYWORD_ONLY]
        assert re.findall(r"`(\w+)`", row[0].split("|")[3]) == options, name


def test_every_column_and_format_of_a_curve_is_told():
    for name in (*HEADER, *(f"<id>.{f}" for f in FORMATS)):
        assert f"`{name}`" in PAGES["reference/files.md"], name


def test_every_variable_of_the_environment_is_told():
    rooms = (ROOT, ROOT / "store", ROOT / "extract", ROOT / "temporal", ROOT / "report")
    sources = [path for room in rooms for path in room.glob("*.py")]
    ours = {
        name
        for path in sources
        for name in re.findall(r'"(VACLI_[A-Z_]+)"', path.read_text(encoding="utf-8"))
    }
    assert ours
    for name in ours:
        assert f"`{name}`" in PAGES["reference/exit-codes.md"], name


def test_pictures_are_small():
    for path in (DOCS / "assets").iterdir():
        assert path.stat().st_size <= 200_000, path


# ---- what a reader copies ---------------------------------------------------------------------------------------


def test_the_encoder_of_the_page_is_extracted_with_and_trained_on(at, monkeypatch):
    (at / "mine.py").write_text(code("how-to/your-encoder.md", "python"), encoding="utf-8")
    monkeypatch.syspath_prepend(at)
    vacli("extract", "data", "--encoder", "mine:Asymmetry", "-o", "asymmetry.bands=8")
    told = vacli("train", "--head", "linear", "--stream", "asymmetry", "--set", "train.epochs=1").output
    assert "validation CCC" in told
    store = Store(at / "features.zarr")
    place = next(iter(store.videos().values()))["tracks"]["asymmetry"]
    track = store.get(store.recipe_of(place["folder"]), place["media"])
    assert track.values.shape[1] == 8
    assert track.valid.any()


def test_the_head_of_the_page_is_trained(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_store(tmp_path / "features.zarr")
    Path("mine.toml").write_text(code("how-to/your-head.md", "toml"), encoding="utf-8")
    assert "runs/mine-" in vacli("train", "--head", "mine.toml", "--set", "train.epochs=1").output
    told = vacli("train", "--head", "mine.toml", "--set", "train.epoch=1", fails=True).output
    assert code("how-to/your-head.md", "text").split(", ...")[0].strip() in told


def test_the_lines_about_the_store_read_and_write_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(code("how-to/your-features.md", "python"), {})
    exec(code("reference/python.md", "python").replace('"mae"', '"mine"'), {})
    assert "anna Track((100, 8) float32" in capsys.readouterr().out


def test_a_store_is_read_without_us_and_without_zarr(tmp_path, monkeypatch):
    make_store(tmp_path / "features.zarr", train=1, validation=0)
    lines = code("store-format.md", "python", 1)
    assert "vacli." not in lines
    assert "import zarr" not in lines
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(lines.replace("clip0", "v00"), names)
    wanted = tracks_of(0)["mae"]
    np.testing.assert_array_equal(names["values"], wanted.values)
    np.testing.assert_array_equal(names["times_s"], wanted.times_s)
