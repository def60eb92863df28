"""Who imports whom: read from the import statements, so no arrow can point the wrong way unseen."""

from __future__ import annotations

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("store", "extract", "temporal", "report")
ROOF = ("doctor", "handout")
MAY_IMPORT = {  # cli -> {extract, temporal, report} -> store -> __init__
    "__init__": set(),
    "store": {"__init__"},
    "extract": {"store", "__init__"},
    "temporal": {"store", "__init__"},
    "report": {"store", "__init__"},
    "cli": {"extract", "temporal", "report", "store", "__init__"},  # the roof: every cli*.py, and ROOF
}
FILES = [
    ROOT / "__init__.py",
    *sorted(ROOT.glob("cli*.py")),
    *(ROOT / f"{name}.py" for name in ROOF),
    *sorted(p for room in ROOMS for p in (ROOT / room).rglob("*.py")),
]


def room_of(parts: tuple[str, ...]) -> str:
    first = parts[0].partition("_")[0] if parts else ""
    return "cli" if first in ROOF else first if first in (*ROOMS, "cli") else "__init__"


def imports(path: Path) -> list[tuple[str, ...]]:
    """Dotted places inside the package that a file imports from, as parts below `vacli`."""
    here = path.relative_to(ROOT).parts[:-1]
    found: list[tuple[str, ...]] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            module = tuple((node.module or "").split(".")) if node.module else ()
            if node.level:
                base = here[: len(here) - node.level + 1]
                found += [(*base, *module)] if module else [(*base, alias.name) for alias in node.names]
            elif module[:1] == ("vacli",):
                found.append(module[1:])
        elif isinstance(node, ast.Import):
            found += [tuple(a.name.split("."))[1:] for a in node.names if a.name.split(".")[0] == "vacli"]
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_arrow_points_the_wrong_way(path):
    mine = room_of(path.relative_to(ROOT).with_suffix("").parts)
    for place in imports(path):
        theirs = room_of(place)
        assert theirs == mine or theirs in MAY_IMPORT[mine], (
            f"{path.name} imports {'.'.join(place) or 'vacli'}"
        )


def test_no_circle_inside_a_room():
    graph = {
        path.relative_to(ROOT).with_suffix("").parts: {
            p for p in imports(path) if ROOT.joinpath(*p).with_suffix(".py").exists()
        }
        for path in FILES
        if path.name != "__init__.py"
    }
    done: set[tuple[str, ...]] = set()

    def visit(place: tuple[str, ...], trail: tuple[tuple[str, ...], ...]) -> None:
        assert place not in trail, f"circle: {' -> '.join('.'.join(p) for p in (*trail, place))}"
        if place not in done:
            for following in graph.get(place, ()):
                visit(following, (*trail, place))
            done.add(place)

    for place in graph:
        visit(place, ())


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_opens_with_one_sentence(path):
    docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
    assert docstring.split("\n")[0].rstrip().endswith("."), path


def test_the_store_needs_no_torch():
    code = "import sys, vacli.store, vacli.store.labels, vacli.store.curves; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_help_is_quick_and_imports_nothing_heavy():
    code = (
        "import sys, vacli.cli\n"
        "try: vacli.cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'timm', 'zarr', 'cv2', 'av', 'numpy', 'pydantic'} & set(sys.modules)\n"
        "sys.exit(' '.join(heavy) or 0)"
    )
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert time.perf_counter() - began < 2.0  # 0.2 s alone; the room is for a busy machine
