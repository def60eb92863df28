"""Attempts to make the store lie: forged records, pages that are no pages, links that lead out: refused or ignored."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vacli.store import Store

from . import hostile_stores
from .fault_layer import Layer, through
from .hostile_stores import MEDIA, RECIPE, TRACK

KINDS = ("record", "names", "page", "place", "link", "hole", "linked folder", "large")
Visits = dict[str, dict[str, dict[str, Any]]]  # kind -> name -> what the visitor told


@pytest.fixture(scope="module")
def visits(tmp_path_factory) -> Visits:
    """Every hostile store, visited by one process that has 300 MB and is watched."""
    top = tmp_path_factory.mktemp("hostile")
    done = subprocess.run(
        [sys.executable, "-m", "tests.hostile_stores", str(top)],
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    told: Visits = {kind: {} for kind in KINDS}
    for kind, name, found in map(json.loads, done.stdout.splitlines()):
        told[kind][name] = found
    return told


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_a_stranger_wrote_is_refused_in_one_line_or_ignored(visits, kind):
    """Within 300 MB and 5 s, else there is a MemoryError or TimeoutError. Nothing wrong is read or acknowledged."""
    assert {name: told["errors"] for name, told in visits[kind].items() if told["errors"]} == {}


@pytest.mark.parametrize("kind", KINDS[:-1])
def test_nothing_outside_a_store_is_opened_moved_or_removed(visits, kind):
    assert {name: told["seen"] for name, told in visits[kind].items() if told["seen"]} == {}


def test_verify_names_every_forged_record_and_every_forged_name(visits):
    for kind, wanted in (("record", hostile_stores.OWN), ("names", "videos/")):
        unseen = [
            n for n, told in visits[kind].items() if not any(x.startswith(wanted) for x in told["named"])
        ]
        assert unseen == []
        assert len(visits[kind]) > 50


def test_a_hole_of_the_right_size_is_mapped_and_one_of_1e13_rows_is_refused(visits):
    assert {name: told["sparse"] for name, told in visits["hole"].items()} == {
        "[64, 2097152]": [[64, 2097152], 0],
        "[10000000000000, 1]": None,
        "[8000000000000, 1]": None,
        "[274877906944, 1]": None,
    }


ODD = st.sampled_from(
    [
        None,
        True,
        0,
        -1,
        2**31,
        2**63,
        10**400,
        0.5,
        1e300,
        "",
        "x",
        "../..",
        "\ud800",
        [],
        {},
        [[]],
        RECIPE,
        "0" * 64,
    ]
)


@st.composite
def mutations(draw: st.DrawFn) -> Callable[[Any], None]:
    """A change of one place of a JSON: another value, one more, one less."""
    way, what, odd = (
        draw(st.lists(st.integers(0, 9), min_size=1, max_size=5)),
        draw(st.sampled_from("sda")),
        draw(ODD),
    )

    def change(found: Any) -> None:
        for number in way:
            inner = list(found) if isinstance(found, dict) else range(len(found))
            if not inner:
                break
            key = inner[number % len(inner)]
            if not isinstance(found[key], dict | list) or number == way[-1]:
                break
            found = found[key]
        if what == "a" or not inner:
            found.update({"more": odd}) if isinstance(found, dict) else found.append(odd)
        elif what == "d":
            del found[key]
        else:
            found[key] = odd

    return change


@pytest.mark.parametrize(
    "page", ["record", "recipe", "names", "memo", "root", "metadata", "index", "whole record"]
)
@pytest.mark.parametrize("examples", [25, pytest.param(1000, marks=pytest.mark.slow)])
def test_json_changed_anywhere_and_signed_again_is_refused_or_means_the_same(tmp_path, page, examples):
    good, place = tmp_path / "good", tmp_path / "s"
    with through(Layer()):
        hostile_stores.good(good)

    @settings(max_examples=examples)
    @given(mutations())
    def visit(change):
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(good, place)
        if page in ("metadata", "whole record"):  # as it stands in the file, and unsigned
            path = place / hostile_stores.PAGES[page.split()[-1]]
            text = json.loads(path.read_text())
            change(text)
            path.write_text(json.dumps(text))
        else:
            hostile_stores.forge(place, hostile_stores.PAGES[page], change)
        with through(Layer()):
            assert hostile_stores.Visit(place).errors == []

    visit()


# ---- what is written can be read -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "provenance",
    [
        {"x": "a" * 70_000},
        {"x": ["é"] * 20_000},
        {"x": hostile_stores._deep(20)},
        {"x": float("nan")},
        {1: 2},
    ],
    ids=["long", "wide", "deep", "NaN", "number"],
)
def test_notes_that_could_not_be_read_back_are_refused_before_they_are_acknowledged(tmp_path, provenance):
    store = Store(tmp_path / "s.zarr", create=True)
    with pytest.raises(ValueError, match=r"bytes|deep|JSON|text"):
        store.put(RECIPE, MEDIA, TRACK, provenance)
    assert store.entries() == []
    assert store.at.hidden(".staging") == []


@pytest.mark.parametrize("media", ["../../../../../x", "/etc", "a0", "A0" * 32, "", "a0" * 32 + "\n"])
def test_what_is_no_digest_of_a_medium_leads_nowhere(tmp_path, media):
    store = Store(tmp_path / "s.zarr", create=True)
    outside = tmp_path / "x"
    outside.mkdir()
    for call in (store.has, store.get, store.failure, store.provenance, store.entry_of):
        with pytest.raises(ValueError, match="SHA-256"):
            call(RECIPE, media)
    with pytest.raises(ValueError, match="SHA-256"):
        store.put(RECIPE, media, TRACK)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s.zarr", "x"]
