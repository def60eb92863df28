"""Recipes are equal iff they say the same; a medium is known by its bytes alone."""

from __future__ import annotations

import os
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vacli import VacliError
from vacli.store import Fingerprints, digest, folder_name
from vacli.store.recipe import canonical

leaves = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
)
recipes = st.dictionaries(
    st.text(), st.recursive(leaves, lambda v: st.lists(v) | st.dictionaries(st.text(), v))
)


@given(recipes)
def test_the_order_of_keys_does_not_matter(recipe):
    assert digest(dict(reversed(recipe.items()))) == digest(recipe)


@given(recipes, recipes)
def test_other_content_is_another_recipe(one, other):
    assert (digest(one) == digest(other)) == (canonical(one) == canonical(other))


@pytest.mark.parametrize("change", [{"size": 112}, {"size": 224.5}, {"mean": [0.5]}, {"more": None}])
def test_any_changed_part_is_another_recipe(change):
    recipe = {"track": "mae", "size": 224, "mean": [0.1, 0.2]}
    assert digest({**recipe, **change}) != digest(recipe)


def test_a_frozen_example_keeps_its_digest():
    assert folder_name({"track": "mae", "size": 224, "mean": [0.5, 0.25]}) == "mae@3fdc7cd66d1c9cdc"


@pytest.mark.parametrize("recipe", [{"x": float("nan")}, {"x": {1: 2}}, {"x": float("inf")}])
def test_what_has_no_canonical_text_is_refused(recipe):
    with pytest.raises(ValueError, match=r".+"):
        digest(recipe)


@pytest.mark.parametrize("name", ["../x", "", "A", "a/b", "a" * 65, None, ".hidden"])
def test_a_track_name_cannot_leave_the_store(name):
    with pytest.raises(ValueError, match="must match"):
        folder_name({"track": name})


def test_a_file_is_known_by_its_bytes_and_hashed_once(tmp_path, monkeypatch):
    a, b = tmp_path / "a.mp4", tmp_path / "b.mp4"
    for path in (a, b):
        path.write_bytes(b"the same")
        os.utime(path, (time.time() - 60,) * 2)
    monkeypatch.setattr("vacli.store.recipe._RACY_NS", 0)
    fingerprints = Fingerprints()
    assert fingerprints.file(a) == fingerprints.file(b)
    monkeypatch.setattr("hashlib.file_digest", None)  # hashing again would fail
    assert Fingerprints(fingerprints.memo).file(a) == fingerprints.file(b)


def test_a_changed_file_is_another_medium_and_a_touched_one_is_not(tmp_path):
    path = tmp_path / "a.mp4"
    path.write_bytes(b"one")
    fingerprints = Fingerprints()
    first = fingerprints.file(path)
    os.utime(path, (1, 1))
    assert fingerprints.file(path) == first
    path.write_bytes(b"two")
    assert fingerprints.file(path) != first


def test_a_fresh_file_is_not_remembered(tmp_path):
    path = tmp_path / "a.mp4"
    path.write_bytes(b"one")
    fingerprints = Fingerprints()
    fingerprints.file(path)
    assert fingerprints.memo == {}


def test_a_folder_is_known_by_names_and_bytes(tmp_path):
    paths = [tmp_path / f"{i:05d}.jpg" for i in range(3)]
    for path in paths:
        path.write_bytes(path.name.encode())
    fingerprints = Fingerprints()
    whole = fingerprints.folder(paths)
    assert fingerprints.folder(reversed(paths)) == whole
    assert fingerprints.folder(paths[:2]) != whole
    paths[0].rename(tmp_path / "00009.jpg")
    assert fingerprints.folder([tmp_path / "00009.jpg", *paths[1:]]) != whole


def test_an_unreadable_medium_is_one_line(tmp_path):
    with pytest.raises(VacliError, match="cannot read"):
        Fingerprints().file(tmp_path / "none.mp4")
