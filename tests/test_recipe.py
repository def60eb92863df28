"""Recipes are equal iff they say the same; a medium is known by its bytes alone."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from vacli import VacliError
from vacli.extract.logmel import LogMel
from vacli.store import Fingerprints, digest, folder_name
from vacli.store.labels import VA_RECIPE
from vacli.store.recipe import canonical

leaves = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
)
recipes = st.dictionaries(
    st.text(),
    st.recursive(leaves, lambda v: st.lists(v) | st.dictionaries(st.text(), v), max_leaves=12),
    max_size=5,
)
FROZEN = {
    "mae@3fdc7cd66d1c9cdc": {"track": "mae", "size": 224, "mean": [0.5, 0.25]},
    "mae@90a01e8d36a1b575": {
        "track": "mae",
        "size": 224.0,
        "mean": (0.5, 0.25),
        "faces": {"version": 1, "fit": None},
    },
    "a.b-c_d@aef06a836ede3cbb": {
        "track": "a.b-c_d",
        "π": "é\u202e\ud800",
        "": [[], {}, -0.0, 1e-300, 10**20, True],
    },
    "logmel@01407a2c3142d40a": LogMel().recipe(),
    "label.va@06309698b1d4948a": VA_RECIPE,
}


def spelled(value: Any) -> Any:
    """Every value as (kind, content): what matters of a recipe, however it was typed."""
    if isinstance(value, dict):
        return "table", frozenset((k, spelled(v)) for k, v in value.items())
    if isinstance(value, list | tuple):
        return "list", tuple(map(spelled, value))
    return type(value).__name__, repr(value)


def retyped(value: Any) -> Any:
    """The same recipe as another hand would type it: keys in another order, tuples for lists."""
    if isinstance(value, dict):
        return {k: retyped(v) for k, v in reversed(value.items())}
    return tuple(map(retyped, value)) if isinstance(value, list) else value


@given(recipes)
def test_neither_order_nor_spelling_nor_a_stay_on_disk_matters(recipe):
    assert digest(retyped(recipe)) == digest(recipe)
    assert digest(json.loads(json.dumps(recipe, indent=1))) == digest(recipe)


@given(recipes, recipes)
def test_recipes_are_equal_iff_every_part_is(one, other):
    assert (digest(one) == digest(other)) == (spelled(one) == spelled(other))


@given(recipes, st.data())
def test_any_value_changed_added_or_removed_anywhere_is_another_recipe(recipe, data):
    was, at = digest(recipe), recipe
    while (
        inner := [v for v in (at.values() if isinstance(at, dict) else at) if isinstance(v, dict | list)]
    ) and (data.draw(st.booleans(), label="deeper")):
        at = data.draw(st.sampled_from(inner), label="part")
    keys = list(at) if isinstance(at, dict) else list(range(len(at)))
    what = data.draw(st.sampled_from(["add", "remove", "change"] if keys else ["add"]), label="what")
    if what == "add" and isinstance(at, list):
        at.insert(data.draw(st.integers(0, len(at))), data.draw(leaves))
    elif what == "add":
        at[data.draw(st.text().filter(lambda k: k not in at))] = data.draw(leaves)
    else:
        key = data.draw(st.sampled_from(keys))
        if what == "change":
            at[key] = data.draw(leaves.filter(lambda v: spelled(v) != spelled(at[key])))
        else:
            del at[key]
    assert digest(recipe) != was


def test_one_as_integer_number_truth_and_text_are_four_recipes():
    """Decided: 1 and 1.0 differ. A size of 224.0 may take another path through code, and JSON keeps them apart."""
    spellings = [
        1,
        1.0,
        True,
        "1",
        "1.0",
        None,
        "None",
        "null",
        [1],
        {"1": 1},
        0,
        0.0,
        -0.0,
        False,
        "",
        [],
        {},
    ]
    assert len({digest({"x": spelling}) for spelling in spellings}) == len(spellings)


@pytest.mark.parametrize("change", [{"size": 112}, {"size": 224.5}, {"mean": [0.5]}, {"more": None}])
def test_any_changed_part_is_another_recipe(change):
    recipe = {"track": "mae", "size": 224, "mean": [0.1, 0.2]}
    assert digest({**recipe, **change}) != digest(recipe)


@pytest.mark.parametrize("name", FROZEN)
def test_a_frozen_example_keeps_its_digest(name):
    """If one of these changes, everybody's features are computed anew: raise `version` on purpose, never by chance."""
    assert folder_name(FROZEN[name]) == name


def nested(depth: int, inside: type = list) -> dict[str, Any]:
    value: Any = 0
    for _ in range(depth - 1):
        value = [value] if inside is list else {"x": value}
    return {"x": value}


circle: dict[str, Any] = {"track": "mae"}
circle["x"] = [circle]


@pytest.mark.parametrize(
    "recipe",
    [
        {"x": float("nan")}, {"x": [float("inf")]}, {"x": {"y": -float("inf")}}, {"x": np.float64("nan")},
        {"x": {1: 2}}, {None: 1}, {"x": [{True: 1}]}, {"x": ({1.0: 2},)}, {b"x": 1},
        {"x": {1, 2}}, {"x": Path("/a")}, {"x": b"1"}, {"x": np.int64(1)}, {"x": np.float32(1)}, {"x": np.zeros(2)},
        {"x": 1j}, nested(13), nested(13, dict), nested(100_000), circle,
    ],
)  # fmt: skip
def test_what_has_no_canonical_text_is_refused(recipe):
    with pytest.raises(ValueError, match=r".+"):
        digest(recipe)


def test_numbers_of_numpy_that_are_numbers_of_python_say_the_same():
    assert digest({"x": np.float64(0.1)}) == digest({"x": 0.1})


def test_a_recipe_knows_no_path_no_date_and_no_host(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HOSTNAME", "elsewhere")
    for module, name in (("time", "time"), ("time", "time_ns"), ("socket", "gethostname"), ("os", "uname")):
        monkeypatch.setattr(f"{module}.{name}", lambda *_: pytest.fail("a recipe asked where and when it is"))
    text = canonical(LogMel().recipe()) + canonical(VA_RECIPE)
    assert folder_name(LogMel().recipe()) in FROZEN
    assert not re.search(r'"/|\\\\|\d{4}-\d\d-\d\d|' + re.escape(str(tmp_path)), text)


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
    path.chmod(0o600)
    assert fingerprints.file(path) == first
    assert fingerprints.folder([path]) == fingerprints.folder([path])
    path.rename(tmp_path / "b.mp4")
    assert fingerprints.file(tmp_path / "b.mp4") == first
    (tmp_path / "b.mp4").write_bytes(b"two")
    assert fingerprints.file(tmp_path / "b.mp4") != first


def test_a_touched_folder_of_crops_keeps_its_digest(tmp_path):
    paths = [tmp_path / f"{i:05d}.jpg" for i in range(3)]
    for path in paths:
        path.write_bytes(path.name.encode())
    fingerprints = Fingerprints()
    whole = fingerprints.folder(paths)
    os.utime(paths[1], (1, 1))
    assert fingerprints.folder(paths) == whole
    paths[1].write_bytes(b"another crop")
    assert fingerprints.folder(paths) != whole


def test_a_fresh_file_is_not_remembered_so_a_change_in_the_same_tick_is_seen(tmp_path):
    path = tmp_path / "a.mp4"
    path.write_bytes(b"one")
    fingerprints = Fingerprints()
    first = fingerprints.file(path)
    assert fingerprints.memo == {}
    assert not fingerprints.changed
    with path.open("r+b") as f:  # the same inode, size and, on a coarse clock, the same times
        f.write(b"two")
    assert fingerprints.file(path) != first


def test_a_settled_file_is_remembered_and_seen_when_it_is_changed_with_its_old_time(tmp_path, monkeypatch):
    path = tmp_path / "a.mp4"
    path.write_bytes(b"one")
    os.utime(path, (1, 1))
    later_ns = time.time_ns() + 3_000_000_000
    monkeypatch.setattr("vacli.store.recipe.time.time_ns", lambda: later_ns)
    fingerprints = Fingerprints()
    first = fingerprints.file(path)
    assert list(fingerprints.memo.values()) == [first]
    time.sleep(0.02)  # a tick of the file system's clock
    path.write_bytes(b"two")
    os.utime(path, (1, 1))
    assert fingerprints.file(path) != first


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


def test_a_crop_whose_name_is_no_text_is_a_crop(tmp_path):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.jpg"))
    path.write_bytes(b"x")
    assert len(Fingerprints().folder([path])) == 64


def test_an_unreadable_medium_is_one_line(tmp_path):
    with pytest.raises(VacliError, match="cannot read"):
        Fingerprints().file(tmp_path / "none.mp4")
