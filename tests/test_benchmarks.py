"""The benchmarks run, measure the right answers, and write their table; how fast anything is, no test says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.report import replaced

ROOT = Path(__file__).resolve().parent.parent
UNITS = {"s": 1.0, "ms": 1e-3, "µs": 1e-6}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[str, Path]:
    """What a tiny run printed, and the folder where it could have left something."""
    place = tmp_path_factory.mktemp("benchmarks")
    done = subprocess.run(
        [
            sys.executable,
            "-W",
            "error",
            "-m",
            "benchmarks",
            "store",
            "decoding",
            "extraction",
            "gather",
            "epoch",
            "scan",
            "--small",
        ],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(place)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, place


def tables(text: str) -> dict[str, list[list[str]]]:
    """Title -> rows of cells: name, median, GB/s, ratio, quartiles, target, verdict; of the races alone."""
    found: dict[str, list[list[str]]] = {}
    for section in (s.partition("<!-- part")[0] for s in text.split("\n## ")[1:]):
        rows = [line[2:-2].split(" | ") for line in section.splitlines() if line.startswith("| ")]
        if len(rows) > 1 and "quartiles" in section and len(rows[1]) == 7:
            found[section.splitlines()[0]] = [[cell.strip() for cell in row] for row in rows[1:]]
    return found


def seconds(text: str) -> float:
    number, unit = text.split()
    return float(number) * UNITS[unit]


def test_every_figure_is_measured_beside_a_plain_twin(run):
    found = tables(run[0])
    ours = [cells[0] for rows in found.values() for cells in rows if "**Store" in cells[0]]
    for call in (
        "Store.get**, checksums",
        "Store.get** and copy",
        "Store.verify",
        "Store.has",
        "Store.put",
        "index",
    ):
        assert any(call in name for name in ours), call
    for other in ("zarr", "h5py", "np.load(mmap_mode)"):
        assert any(other in cells[0] for cells in found["Random windows"]), other
    for title, rows in found.items():
        assert rows[0][3] == "1", title
        assert all(float(cells[3]) >= 0 and seconds(cells[1]) > 0 for cells in rows), title


def test_a_verdict_is_what_the_figure_says(run):
    checked = 0
    for rows in tables(run[0]).values():
        for cells in rows:
            for wanted, verdict in zip(cells[5].split("<br>"), cells[6].split("<br>"), strict=True):
                if not wanted:
                    assert not verdict
                    continue
                kind, number, unit = re.fullmatch(
                    r"(?:goal: )?(ratio ≥|<|≥) ([\d.]+) ?(\S*)", wanted
                ).groups()
                bound = float(number) * UNITS.get(unit, 1)
                figure = {"ratio ≥": cells[3], "≥": cells[2]}.get(kind)
                value = seconds(cells[1]) if figure is None else float(figure)
                if abs(value - bound) > 0.01 * bound + 0.005:  # else rounding decides
                    assert (verdict == "met") == (value < bound if kind == "<" else value > bound), cells
                    checked += 1
    assert checked >= 6


def test_the_table_names_what_the_figures_depend_on(run):
    for name in ("machine", "disk", "load", "versions", "commit", "date"):
        assert re.search(rf"^\| {name} \| \S.* \|$", run[0], re.M), name
    assert all(package in run[0] for package in ("python 3", "numpy", "zarr", "h5py"))


def test_a_part_that_is_measured_anew_takes_the_place_of_the_old_one():
    order = ["a", "b", "c"]
    old = "# Results\n\n<!-- part: a -->\n# A\n1\n\n<!-- part: c -->\n# C\n3\n"
    new = replaced(old, "b", "<!-- part: b -->\n# B\n2\n", order)
    assert re.findall(r"part: (\w)", new) == order
    again = replaced(new, "a", "<!-- part: a -->\n# A\n9\n", order)
    assert "9" in again
    assert "1" not in again
    assert replaced(again, "a", "<!-- part: a -->\n# A\n9\n", order) == again


def test_nothing_is_left_behind(run):
    assert [p for p in run[1].iterdir() if not p.name.startswith("torchinductor")] == []  # torch's own


def test_results_in_the_repository_are_of_a_full_run():
    kept = tables((ROOT / "benchmarks" / "RESULTS.md").read_text())
    assert "Opening a store of 600 videos x 4 tracks" in kept
    assert "A durable write of 6.17 MB" in kept
