"""A store made by the first release reads as it lies and is brought up to date without loss; a newer one is left."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from vacli import VacliError, __version__
from vacli.store import Store, StoreError, Track, digest

from .fault_layer import Failing, Layer, through
from .toy_store import LABEL_RECIPE, recipe, tracks_of

OLD = (
    Path(__file__).parent / "data" / "store_format_1.zarr"
)  # made by tests/toy_store.py of the first release
ROWS = {"v00": 12, "v01": 7}
MADE = {  # video -> its tracks
    "v00": ("mae", "logmel", "label.va"),
    "v01": ("mae", "label.va"),
}
SPLITS = {"v00": "train", "v01": "validation"}


@pytest.fixture
def old(tmp_path) -> Path:
    return Path(shutil.copytree(OLD, tmp_path / "old.zarr"))


def key(video: str, name: str) -> tuple[dict[str, Any], str]:
    return LABEL_RECIPE if name == "label.va" else recipe(name), video[1:] * 32


def tree(path: Path) -> dict[str, tuple[bytes, int]]:
    """Every file with its bytes and its time."""
    files = (p for p in path.rglob("*") if p.is_file())
    return {str(p.relative_to(path)): (p.read_bytes(), p.stat().st_mtime_ns) for p in files}


def entries(path: Path) -> dict[str, tuple[bytes, int]]:
    return {name: was for name, was in tree(path).items() if "@" in name}


def same(a: Track, b: Track) -> bool:
    return a.values.tobytes() == b.values.tobytes() and a.times_s.tobytes() == b.times_s.tobytes()


def check_all(store: Store) -> None:
    """Every name and every track is what the first release was given."""
    assert {v: (f["root"], f["split"]) for v, f in store.videos().items()} == {
        v: ("toy", split) for v, split in SPLITS.items()
    }
    for video, names in MADE.items():
        facts, wanted = store.videos()[video], tracks_of(int(video[1:]), ROWS[video])
        assert facts["media"] == video[1:] * 32
        assert set(facts["tracks"]) == set(names)
        for name in names:
            how, media = key(video, name)
            assert facts["tracks"][name] == {"folder": f"{name}@{digest(how)[:16]}", "media": media}
            assert store.recipe_of(facts["tracks"][name]["folder"]) == how
            assert store.has(how, media)
            assert same(store.get(how, media), wanted[name])
    assert [what for *_, what in store.verify()] == [None] * 5


def test_a_store_of_the_first_release_reads_without_a_byte_changed(old):
    before = tree(old)
    check_all(Store(old))
    assert tree(old) == before


def test_opened_for_writing_it_is_brought_up_to_date_and_its_entries_are_untouched(old):
    before = entries(old)
    check_all(Store(old, create=True))
    assert entries(old) == before
    assert json.loads((old / "zarr.json").read_text())["attributes"]["vacli"]["store_format"] == 2
    done = tree(old)
    check_all(Store(old, create=True))
    assert tree(old) == done


def test_it_takes_new_tracks_and_names_once_it_is_up_to_date(old):
    store = Store(old, create=True)
    new, media = tracks_of(7, 9)["mae"], "07" * 32
    store.put(recipe("mae"), media, new)
    place = {"folder": f"mae@{digest(recipe('mae'))[:16]}", "media": media}
    store.link("v07", {"root": "toy", "media": media, "split": None}, {"mae": place})
    store.unlink("v00", ["logmel"])
    again = Store(old)
    assert same(again.get(recipe("mae"), media), new)
    assert list(again.videos()) == ["v00", "v01", "v07"]
    assert set(again.videos()["v00"]["tracks"]) == {"mae", "label.va"}


def test_stopped_anywhere_on_the_way_it_is_right_in_the_one_format_or_the_other(old, tmp_path):
    formats = []
    for n in itertools.count(1):
        place = Path(shutil.copytree(old, tmp_path / f"{n}.zarr"))
        with through(Failing(n, errno.EIO, for_good=True)) as disk, contextlib.suppress(VacliError):
            Store(place, create=True)
        if not disk.failed:
            break
        check_all(Store(place))  # nothing that came later reached the disk, as after a kill
        formats.append(json.loads((place / "zarr.json").read_text())["attributes"]["vacli"]["store_format"])
        with through(Layer()):
            check_all(Store(place, create=True))
        assert entries(place) == entries(old)
        shutil.rmtree(place)
    assert len(formats) > 20
    assert formats == sorted(formats)
    assert set(formats) == {1, 2}


def of_format(path: Path, found: Any) -> Path:
    root = json.loads((path / "zarr.json").read_text())
    root["attributes"]["vacli"]["store_format"] = found
    (path / "zarr.json").write_text(json.dumps(root))
    return path


@pytest.mark.parametrize("create", [False, True])
@pytest.mark.parametrize("newer", [3, 10, 10**30])
def test_a_newer_store_is_left_alone_and_told_from_a_foreign_one(old, newer, create):
    before = tree(of_format(old, newer))
    with pytest.raises(
        StoreError, match=f"has store format {newer}, this vacli {__version__} reads up to 2: update vacli"
    ):
        Store(old, create=create)
    assert tree(old) == before


@pytest.mark.parametrize("create", [False, True])
@pytest.mark.parametrize("odd", [0, -1, "1", "2", 1.0, 2.0, True, None, [1], {"1": 1}, float("nan"), 1e400])
def test_what_is_no_format_number_is_no_store_of_ours(old, odd, create):
    before = tree(of_format(old, odd))
    with pytest.raises(StoreError, match="is not a vacli store"):
        Store(old, create=create)
    assert tree(old) == before


@pytest.mark.parametrize(
    "odd", ["{", "[]", '{"attributes": {"vacli": [1]}}', '{"attributes": {"vacli": {"v": {}}}}', "\xff"]
)
def test_names_of_the_old_form_that_cannot_be_read_are_one_line_and_the_tracks_stay(old, odd):
    (old / "videos" / "zarr.json").write_text(odd, "latin-1")
    before = tree(old)
    for create in (False, True):
        with pytest.raises(
            StoreError, match=r"videos/zarr.json cannot be read .*remove it and run .*features are kept"
        ):
            Store(old, create=create).videos()
    assert tree(old) == before
    assert same(Store(old).get(*key("v00", "mae")), tracks_of(0, 12)["mae"])


def test_an_id_of_the_first_release_that_is_not_safe_comes_over_under_a_safe_one(old):
    names = old / "videos" / "zarr.json"
    names.write_text(names.read_text().replace('"v01"', '"../v01"'))
    assert list(Store(old).videos()) == list(Store(old, create=True).videos()) == ["v00", "v01-227ba5ff"]
