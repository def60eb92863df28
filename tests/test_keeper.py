"""Keeping house: what is listed is what is there, what is removed is what nobody needs, and nothing else."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import fsspec
import numpy as np
import pytest
from click.testing import CliRunner, Result
from vacli import VacliError
from vacli.cli import main
from vacli.extract.datasets import Sample
from vacli.extract.people import People
from vacli.extract.plan import Plan
from vacli.store import Store, StoreError, Track, digest, disk, folder_name, keeper, show

from .toy_store import LABEL_RECIPE, ROWS, add_video, make_store, recipe, tracks_of


@pytest.fixture
def store(tmp_path) -> Store:
    return make_store(tmp_path / "s.zarr", train=2, validation=1)


def vacli(*words: object, fails: bool = False) -> Result:
    result = CliRunner().invoke(main, [str(w) for w in words])
    told = f"{result.output}\n{result.exception!r}"
    assert result.exit_code == (1 if fails else 0), told
    assert "Traceback" not in result.output
    return result


def contents(store: Store) -> dict[str, bytes]:
    """Every file of every entry and of the names."""
    roots = [store.path / n for n in (*store.folders(), "videos")]
    return {
        str(p.relative_to(store.path)): p.read_bytes() for r in roots for p in r.rglob("*") if p.is_file()
    }


# ---- the index -------------------------------------------------------------------------------------------------


def test_the_index_is_what_the_records_say_read_or_remembered(store):
    first = keeper.index(store)
    assert list(first) == store.entries()
    for name, e in first.items():
        assert e.shape == store.read(name).values.shape
        assert e.nbytes == sum(p.stat().st_size for p in (store.path / name).rglob("c.*"))
    assert keeper.index(Store(store.path)) == first


def test_the_index_opens_no_record_it_knows_and_reads_only_what_is_new(store, monkeypatch):
    keeper.index(store)
    opened = []
    real = Store.record
    monkeypatch.setattr(Store, "record", lambda self, name: opened.append(name) or real(self, name))
    keeper.index(Store(store.path))
    assert opened == []
    add_video(store, 7)
    assert len(keeper.index(Store(store.path))) == 12
    assert len(opened) == 3


def test_an_entry_in_anothers_place_is_not_taken_for_it(store):
    name = store.entry_of(recipe("mae"), "00" * 32)
    keeper.index(store)
    store.drop(name)
    assert name not in keeper.index(store)
    store.fail(recipe("mae"), "00" * 32, "it was not there")
    assert keeper.index(store)[name].failed == "it was not there"
    store.put(recipe("mae"), "00" * 32, tracks_of(0, rows=5)["mae"])
    assert keeper.index(store)[name].shape == (5, 8)


ROWS_OF_OTHERS = [
    [],
    5,
    {"a": []},
    {"a": [1, 2]},
    {"a": ["1", ["x"], "float16", 3, "m", None]},
    {"a": [1] * 9},
]


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"attributes": {}}', "[" * 200_000]
    + [json.dumps({"attributes": {"vacli": {"rows": json.dumps(rows)}}}) for rows in ROWS_OF_OTHERS],
)
def test_a_broken_index_is_made_anew(store, text):
    first = keeper.index(store)
    (store.path / ".index" / "zarr.json").write_text(text)
    assert keeper.index(store) == first


def test_a_store_that_cannot_be_written_is_listed_all_the_same(store, monkeypatch):
    def refuse(*_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(store.at, "save_here", refuse)
    assert len(keeper.index(store)) == 9


# ---- ls, show, du ----------------------------------------------------------------------------------------------


def test_ls_shows_videos_by_tracks_with_rows_and_every_recipe_with_its_size(store):
    add_video(store, 3, None, names=("mae",), rows=7)
    lines = vacli("store", "ls", "--store", store.path).output.splitlines()
    assert lines[0].split() == ["video", "split", "label.va", "logmel", "mae"]
    assert lines[1].split() == ["v00", "train", str(ROWS), "1200", str(ROWS)]
    assert lines[4].split() == ["v03", "-", "-", "-", "7"]
    mae = next(line for line in lines[5:] if line.startswith("mae")).split()
    assert mae[:6] == ["mae", folder_name(recipe("mae")), "8", "float16", "4", str(3 * ROWS + 7)]
    nbytes = keeper.usage(store)[folder_name(recipe("mae"))][1]
    assert " ".join(mae[6:]) == show.size_text(nbytes)


def test_ls_json_is_what_is_there_and_says_what_is_not(store):
    add_video(store, 3, None, names=("mae", "logmel"))
    store.drop(store.entry_of(recipe("mae"), "03" * 32))
    chunk = next((store.path / store.entry_of(recipe("logmel"), "03" * 32)).rglob("c.0.0"))
    os.truncate(chunk, 10)
    videos = {v["id"]: v for v in json.loads(vacli("store", "ls", "--json", "--store", store.path).output)}
    assert {n: t["state"] for n, t in videos["v03"]["tracks"].items()} == {
        "mae": "absent",
        "logmel": "broken",
    }
    track = videos["v00"]["tracks"]["mae"]
    assert track["shape"] == [ROWS, 8]
    assert track["state"] == "whole"
    assert track["recipe"] == folder_name(recipe("mae"))
    told = vacli("store", "ls", "--store", store.path).output
    assert next(line for line in told.splitlines() if line.startswith("v03")).split()[2:] == [
        "-",
        "broken",
        "absent",
    ]


def test_ls_tells_recipes_apart_where_a_track_has_several(store):
    add_video(store, 3, made_by="another encoder")
    line = vacli("store", "ls", "--store", store.path).output.splitlines()[4]
    assert f"@{folder_name(recipe('mae', 'another encoder')).partition('@')[2][:6]}" in line


def test_show_tells_times_valid_rows_values_recipe_and_draws(store):
    track = tracks_of(0)["mae"]
    seen = track.values[track.valid].astype(np.float32)
    told = vacli("store", "show", "v00", "--store", store.path).output
    part = told[told.index("\nmae") :]
    assert f"{ROWS} x 8 float16" in part
    assert "times    0.050 to 11.950 s, 10 Hz" in part
    assert (
        f"valid    {int(track.valid.sum())} of {ROWS} rows, {100 * (1 - track.valid.mean()):.1f} % missing"
        in part
    )
    assert f"{seen.min():.4g} / {seen.mean(dtype=np.float64):.4g} / {seen.max():.4g}" in part
    assert json.dumps(recipe("mae"), sort_keys=True) in part
    assert "column 0" in told[told.index("\nlogmel") :]
    assert "valence  " in told[told.index("\nlabel.va") :]


def test_the_plot_rises_where_the_values_rise_and_dots_where_nothing_is():
    values = np.linspace(0, 1, 64)[:, None].astype(np.float32)
    values[20:23] = np.nan
    bars = show._plots(Track(values, np.arange(64.0)), ["rising"])[0].split()[1]
    assert len(bars) == 64
    assert bars[20:23] == "···"
    heights = ["▁▂▃▄▅▆▇█".index(b) for b in bars.replace("·", "")]
    assert heights == sorted(heights)
    assert (heights[0], heights[-1]) == (0, 7)


def test_show_of_a_constant_an_empty_and_an_unseen_track_is_no_error(store):
    tracks = {
        "constant": Track(np.ones((4, 2), np.float32), np.arange(4.0)),
        "none": Track(np.empty((0, 2), np.float32), np.empty(0)),
        "unseen": Track(np.full((4, 2), np.nan, np.float32), np.arange(4.0)),
    }
    for name, track in tracks.items():
        store.put(recipe(name), "aa" * 32, track)
    places = {n: {"folder": folder_name(recipe(n)), "media": "aa" * 32} for n in tracks}
    store.link("odd", {"root": "toy", "media": "aa" * 32, "split": None}, places)
    told = vacli("store", "show", "odd", "--store", store.path).output
    assert "no row" in told
    assert "0 of 4 rows, 100.0 % missing" in told
    assert "1 / 1 / 1" in told


def test_an_unknown_video_is_named_with_those_like_it(store):
    assert (
        "knows no video 'V0'; there is v00, v01, v02"
        in vacli("store", "show", "V0", "--store", store.path, fails=True).output
    )


def test_a_strangers_text_does_not_steer_the_terminal(store):
    facts = {"root": "\x1b[2J/data", "media": "00" * 32, "split": "\x1b]0;mine\x07"}
    store.link("evil", facts, {"mae": store.videos()["v00"]["tracks"]["mae"]})
    for words in (("ls",), ("show", "evil"), ("ls", "--json")):
        assert "\x1b" not in vacli("store", *words, "--store", store.path).output


def test_du_adds_up(store):
    told = vacli("store", "du", "--store", store.path).output.splitlines()
    on_disk = sum(p.stat().st_size for p in store.path.rglob("c.*"))
    assert told[-1].split() == [*show.size_text(on_disk).split(), "9", "total"]
    assert len(told) == 4


# ---- verify --repair -------------------------------------------------------------------------------------------


def test_verify_names_the_damaged_and_repair_makes_them_absent(store):
    name = store.entry_of(recipe("mae"), "01" * 32)
    chunk = store.path / name / "values" / "c.0.0"
    data = bytearray(chunk.read_bytes())
    data[100] ^= 8
    chunk.write_bytes(data)
    names = store.path / "videos" / next(iter(store.at.folders("videos"))) / "zarr.json"
    names.write_text("{")
    told = vacli("store", "verify", "--store", store.path, fails=True).output
    assert "2 damaged" in told
    assert name in told
    assert "--repair" in told
    assert "2 damaged" in vacli("store", "verify", "--repair", "--store", store.path).output
    assert "8 tracks read" in vacli("store", "verify", "--store", store.path).output
    assert not store.has(recipe("mae"), "01" * 32)
    assert len(store.at.hidden(".quarantine")) == 2
    assert len(store.videos()) == 2


# ---- gc --------------------------------------------------------------------------------------------------------


def run_on(folder: Path, store: Store, made_by: str) -> None:
    """A run.json that needs the toy features made by somebody."""
    recipes = {n: recipe(n, made_by) for n in ("mae", "logmel")}
    streams = {n: {"folder": folder_name(r), "recipe": r} for n, r in recipes.items()}
    folder.mkdir(parents=True)
    about = {"streams": streams, "label": {"folder": folder_name(LABEL_RECIPE)}}
    (folder / "run.json").write_text(json.dumps(about))


def old(path: Path) -> Path:
    os.utime(path, (1, 1))
    return path


def test_gc_removes_what_nobody_refers_to_and_nothing_else(tmp_path):
    runs, store = tmp_path / "runs", make_store(tmp_path / "s.zarr", train=2, validation=1)
    run_on(runs / "one", store, "an older encoder")
    for number in range(3):  # extracted twice more since: only the last is linked, a run needs the first
        for made_by in ("an older encoder", "nobody's encoder", "toy"):
            add_video(store, number, made_by=made_by)
    faces = recipe("faces")
    store.put(faces, "00" * 32, tracks_of(0)["mae"])  # not linked, but what is was made from it
    made = {**recipe("mae", "crops"), "made_from": digest(faces)}
    store.put(made, "00" * 32, tracks_of(0)["mae"])
    add_video(store, 4)
    store.link(
        "v04",
        {"root": "toy", "media": "04" * 32, "split": None},
        {"crops": {"folder": folder_name(made), "media": "00" * 32}},
    )
    predicted = {**recipe("mae", "an older encoder"), "made_from": digest(recipe("faces", "found otherwise"))}
    store.put(predicted, "00" * 32, tracks_of(0)["mae"])
    before = contents(store)
    unused = {folder_name(recipe(n, "nobody's encoder")) for n in ("mae", "logmel")}
    told = vacli("store", "gc", "--dry-run", "--runs", runs, "--store", store.path).output
    assert {line.split()[0] for line in told.splitlines()[:-1]} == unused
    assert contents(store) == before
    del store  # it would be in use
    vacli("store", "gc", "--yes", "--runs", runs, "--store", tmp_path / "s.zarr")
    after = contents(Store(tmp_path / "s.zarr"))
    assert after == {p: b for p, b in before.items() if p.partition("/")[0] not in unused}
    assert "nothing to remove" in vacli("store", "gc", "--runs", runs, "--store", tmp_path / "s.zarr").output


def test_gc_sweeps_leftovers_and_what_was_set_aside(store, tmp_path):
    left = store.path / ".staging" / "dead"
    left.mkdir()
    old(left)
    store.set_aside(store.entry_of(recipe("mae"), "00" * 32))
    found = keeper.garbage(store, [])
    assert {g.name.partition("/")[0] for g in found} == {".staging", ".quarantine"}
    before = contents(store)
    keeper.gc(store, found, [])
    assert keeper.garbage(store, []) == []
    assert contents(store) == before


def test_while_names_are_lost_no_recipe_is_taken_for_garbage(store):
    add_video(store, 0, made_by="nobody's encoder")
    add_video(store, 0)
    page = store.at.folders("videos")[0]
    (store.path / "videos" / page / "zarr.json").write_text("{")
    store.set_aside(f"videos/{page}")
    assert keeper.garbage(store, []) == []
    assert (
        "names of 1 videos were set aside" in vacli("store", "gc", "--dry-run", "--store", store.path).output
    )
    for number, split in enumerate(("train", "train", "validation")):
        add_video(store, number, split)
    assert {g.name.partition("@")[0] for g in keeper.garbage(store, []) if g.entries} == {"mae", "logmel"}
    assert any(g.name.startswith(".quarantine/videos.") for g in keeper.garbage(store, []))


def test_gc_lets_what_is_being_written_live(store):
    with store.at.staging() as staged:
        old(staged)
        assert keeper.garbage(store, []) == []


def test_gc_leaves_what_came_to_be_needed_after_it_was_listed(store):
    add_video(store, 0, made_by="nobody's encoder")
    add_video(store, 0)
    found = keeper.garbage(store, [])
    assert len(found) == 2
    add_video(store, 0, made_by="nobody's encoder")  # while the user was asked
    before = contents(store)
    assert keeper.gc(store, found, []) == 0
    assert contents(store) == before


@pytest.mark.parametrize(
    "words", [("gc", "--yes"), ("rm", "v00", "--yes"), ("verify", "--repair"), ("import", "x.h5")]
)
def test_a_mistyped_store_or_source_makes_no_store(tmp_path, words, monkeypatch):
    monkeypatch.chdir(tmp_path)
    told = vacli("store", *words, "--store", tmp_path / "typo.zarr", fails=True).output
    assert "no feature store at" in told or "no such file or folder: x.h5" in told
    assert not (tmp_path / "typo.zarr").exists()


def test_repair_leaves_what_only_cannot_be_read_for_now(store, monkeypatch):
    name, real = store.entry_of(recipe("mae"), "00" * 32), disk.read_small
    page = store.at.folders("videos")[0]

    def refuses(path, limit):
        if name in str(path) or page in str(path):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real(path, limit)

    before = contents(store)
    with monkeypatch.context() as m:
        m.setattr(disk, "read_small", refuses)
        told = vacli("store", "verify", "--repair", "--store", store.path, fails=True).output
    assert "0 of 2 set aside" in told
    assert "Permission denied" in told
    assert contents(store) == before


HOLDER = """
import sys
from vacli.store import Store
store = Store(sys.argv[1])
print("open", flush=True)
sys.stdin.read()
"""


def test_gc_refuses_while_another_process_has_the_store_open(store):
    add_video(store, 0, made_by="nobody's encoder")
    add_video(store, 0)
    words = [sys.executable, "-c", HOLDER, str(store.path)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "open\n"
        found = keeper.garbage(store, [])
        before = contents(store)
        with pytest.raises(StoreError, match="in use by another vacli process"):
            keeper.gc(store, found, [])
        assert contents(store) == before
        holder.communicate()
    assert keeper.gc(store, found, []) > 0


@pytest.mark.parametrize("text", ["{", "[]", '{"streams": 3}', '{"streams": {"a": {}}, "label": {}}'])
def test_a_run_that_cannot_be_read_stops_gc(store, tmp_path, text):
    (tmp_path / "runs" / "one").mkdir(parents=True)
    (tmp_path / "runs" / "one" / "run.json").write_text(text)
    with pytest.raises(VacliError, match=r"cannot read .*run\.json"):
        keeper.garbage(store, [tmp_path / "runs"])


def test_without_anybody_to_ask_nothing_is_removed(store):
    add_video(store, 0, made_by="nobody's encoder")
    add_video(store, 0)
    before = contents(store)
    assert "say --yes" in vacli("store", "gc", "--store", store.path, fails=True).output
    assert "say --yes" in vacli("store", "rm", "v00", "--store", store.path, fails=True).output
    assert contents(store) == before


# ---- rm --------------------------------------------------------------------------------------------------------


def test_rm_removes_a_video_but_not_what_another_one_shares(store):
    shared = {
        "folder": folder_name(recipe("logmel")),
        "media": "00" * 32,
    }  # 00_left and 00_right share the sound
    store.link("v00_left", {"root": "toy", "media": "99" * 32, "split": None}, {"logmel": shared})
    vacli("store", "rm", "v00", "--yes", "--store", store.path)
    assert "v00" not in store.videos()
    assert not store.has(recipe("mae"), "00" * 32)
    assert store.has(recipe("logmel"), "00" * 32)
    assert store.has(recipe("mae"), "01" * 32)


def test_rm_of_a_track_leaves_the_others(store):
    vacli("store", "rm", "v00", "v01", "--track", "mae", "--yes", "--store", store.path)
    assert set(store.videos()["v01"]["tracks"]) == {"logmel", "label.va"}
    assert [store.has(recipe("mae"), f"{i:02}" * 32) for i in range(3)] == [False, False, True]
    assert store.has(recipe("logmel"), "00" * 32)


def test_rm_takes_the_tombstones_of_a_video_along(store):
    store.fail(recipe("mae"), "77" * 32, "no video", {"sample": "broken"})
    vacli("store", "rm", "broken", "--yes", "--store", store.path)
    assert store.failure(recipe("mae"), "77" * 32) is None


def test_rm_of_what_is_not_there_says_what_is(store):
    assert (
        "knows no video 'v9'" in vacli("store", "rm", "v9", "--yes", "--store", store.path, fails=True).output
    )
    told = vacli("store", "rm", "v00", "--track", "vggish", "--yes", "--store", store.path, fails=True).output
    assert "v00 has no track vggish; its tracks: label.va, logmel, mae" in told


class Toy:
    """An encoder that was never run: its tracks are put by hand where the plan wants them."""

    def __init__(self, name: str, eats: str) -> None:
        self.name, self.eats = name, eats

    def options(self) -> dict[str, str]:
        return {}

    def recipe(self) -> dict[str, str]:
        return {"track": self.name}


PLAN = Plan({"toy_face": Toy("toy_face", "crops"), "toy_sound": Toy("toy_sound", "sound")}, People())


@pytest.fixture
def settled(monkeypatch) -> None:
    """Digests are remembered though the files are new."""
    monkeypatch.setattr("vacli.store.recipe._RACY_NS", -1)


def film(path: Path, text: str = "") -> Path:
    """A file of its own bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text or path.name)
    return path


def store_all(store: Store, sample: Sample, link: bool) -> list[str]:
    """What an extraction of the sample stores, or (not linked) a prediction; returns the entries."""
    media = sample.media(store.fingerprints)
    wanted = PLAN.tracks(sample, media, store.fingerprints)
    for w in wanted.values():
        store.put(w.recipe, w.media, tracks_of(1)["mae"], {"sample": sample.id})
    if link:
        facts = {"root": str(sample.root), "media": media, "split": None}
        store.link(sample.id, facts, {n: {**w.kind.address, "media": w.media} for n, w in wanted.items()})
    store.remember_fingerprints()
    return sorted({w.entry for w in wanted.values()})


def sample_of(video: Path, **more: object) -> Sample:
    return Sample(**{"id": video.stem, "root": video.parent, "video": video, **more})


def traces(store: Store, *words: str) -> list[str]:
    """The files of the store in whose path or bytes one of the words is."""
    files = [p for p in store.path.rglob("*") if p.is_file()]
    return [str(p) for p in files if any(w in str(p) or w.encode() in p.read_bytes() for w in words)]


@pytest.mark.usefixtures("settled")
def test_rm_of_a_file_leaves_no_trace_of_what_was_predicted_of_it(store, tmp_path):
    before = contents(store)
    anna = film(tmp_path / "in" / "anna.mp4")
    notes = film(tmp_path / "in" / "anna.txt")
    made = store_all(store, sample_of(anna, annotation=notes), link=False)
    assert {name.partition("@")[0] for name in made} == {
        "people",
        "faces",
        "toy_face",
        "toy_sound",
        "label.va",
    }
    film_digest = Store(store.path).fingerprints.file(anna)
    keeper.index(store)
    assert traces(store, film_digest)
    told = vacli("store", "rm", anna, "--yes", "--store", store.path).output
    assert f"{len(made)} tracks, {len(made)} of them under no name" in told
    assert f"{len(made)} tracks removed" in told
    left = contents(store)
    assert {k: v for k, v in left.items() if k in before} == before
    assert not [k for k in left.keys() - before.keys() if k.count("/") > 1]  # recipes stay, of nobody
    assert not traces(store, film_digest, film_digest[:24], "anna")


def test_rm_of_a_file_takes_every_name_and_person_it_has(store, tmp_path):
    video = film(tmp_path / "two.mp4")
    for person in ("left", "right"):
        store_all(store, sample_of(video, id=f"two_{person}", person=person), link=True)
    another = film(tmp_path / "other" / "two.mp4", "another film")
    store_all(store, sample_of(another, id="two"), link=True)
    moved = film(tmp_path / "elsewhere" / "renamed.mkv", "two.mp4")  # the same bytes
    vacli("store", "rm", moved, "--yes", "--store", store.path)
    assert set(store.videos()) == {"v00", "v01", "v02", "two"}
    assert not traces(store, Store(store.path).fingerprints.file(video)[:24])
    assert all(store.has(w.recipe, w.media) for w in PLAN.tracks(
        sample_of(another), store.fingerprints.file(another), store.fingerprints).values())  # fmt: skip


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize("link", [True, False])
def test_rm_of_a_file_takes_what_was_made_of_its_crops_and_their_labels(store, tmp_path, link):
    video, notes = film(tmp_path / "c.mp4"), film(tmp_path / "c.txt")
    film(tmp_path / "crops" / "c" / "00001.jpg")
    made = store_all(store, sample_of(video, crops=tmp_path / "crops" / "c", annotation=notes), link)
    assert len({name.partition("/")[2] for name in made}) == 3  # the sound, the crops, the labels
    vacli("store", "rm", video, "--yes", "--store", store.path)
    assert not set(made) & set(store.entries())
    assert "c" not in store.videos()


@pytest.mark.usefixtures("settled")
def test_rm_of_a_file_finds_linked_crops_though_their_digests_are_forgotten(store, tmp_path):
    video = film(tmp_path / "c.mp4")
    film(tmp_path / "crops" / "c" / "00001.jpg")
    made = store_all(store, sample_of(video, crops=tmp_path / "crops" / "c"), link=True)
    shutil.rmtree(store.path / "fingerprints")
    vacli("store", "rm", video, "--yes", "--store", store.path)
    assert not set(made) & set(store.entries())


def test_rm_of_an_id_takes_along_what_predictions_made_of_the_same_medium(store, tmp_path):
    anna, bert = film(tmp_path / "anna.mp4"), film(tmp_path / "bert.mp4")
    made = store_all(store, sample_of(anna), link=True)
    again = store_all(store, sample_of(anna, id="copy of it", person="left"), link=False)
    stays = store_all(store, sample_of(bert), link=False)
    told = vacli("store", "rm", "anna", "--dry-run", "--store", store.path).output
    assert f"{len({*made, *again})} tracks, {len({*again} - {*made})} of them under no name" in told
    assert {*made, *again} <= set(store.entries())
    vacli("store", "rm", "anna", "--yes", "--store", store.path)
    assert not {*made, *again} & set(store.entries())
    assert set(stays) <= set(store.entries())


def test_rm_of_an_id_that_was_only_predicted_needs_no_file(store, tmp_path):
    anna = film(tmp_path / "anna.mp4")
    made = store_all(store, sample_of(anna), link=False)
    anna.unlink()
    vacli("store", "rm", "anna", "--yes", "--store", store.path)
    assert not set(made) & set(store.entries())
    assert len(store.entries()) == 9


@pytest.mark.usefixtures("settled")
def test_rm_of_one_of_two_people_says_what_stays_for_the_other(store, tmp_path):
    video = film(tmp_path / "two.mp4")
    left, right = (
        store_all(store, sample_of(video, id=f"two_{p}", person=p), link=True) for p in ("left", "right")
    )
    told = vacli("store", "rm", "two_left", "--yes", "--store", store.path).output
    assert f"{len(right)} more stay, that two_right shares" in told
    assert set(right) <= set(store.entries())
    assert not ({*left} - {*right}) & set(store.entries())
    assert Store(store.path).fingerprints.file(video) in Store(store.path).fingerprints.memo.values()


def test_rm_takes_damaged_copies_and_several_words_for_one_video_at_once(store, tmp_path):
    anna = film(tmp_path / "anna.mp4")
    made = store_all(store, sample_of(anna), link=True)
    store.set_aside(made[0])
    assert len(store.at.hidden(".quarantine")) == 1
    told = vacli("store", "rm", "anna", anna, "--yes", "--store", store.path).output
    assert "1 set aside as damaged" in told
    assert store.at.hidden(".quarantine") == []
    assert len(store.entries()) == 9


def test_rm_of_an_imported_file_takes_the_import_and_leaves_the_video(store, tmp_path):
    features = film(tmp_path / "anna.csv")
    media, how = store.fingerprints.file(features), {"track": "openface", "imported": {}}
    store.put(how, media, tracks_of(1)["mae"])
    place = {"folder": folder_name(how), "media": media}
    store.link("v00", {"root": "toy", "media": None, "split": None}, {"openface": place})
    vacli("store", "rm", features, "--yes", "--store", store.path)
    assert set(store.videos()["v00"]["tracks"]) == {"mae", "logmel", "label.va"}
    assert len(store.entries()) == 9


def test_a_word_that_is_an_id_and_a_file_is_the_id_and_a_path_is_the_file(store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = store_all(store, sample_of(film(tmp_path / "v00"), id="w"), link=False)
    vacli("store", "rm", "v00", "--yes", "--store", store.path)
    assert "v00" not in store.videos()
    assert set(made) <= set(store.entries())
    vacli("store", "rm", "./v00", "--yes", "--store", store.path)
    assert not set(made) & set(store.entries())


def test_rm_of_a_file_nothing_was_made_of_says_so_and_removes_nothing_else(store, tmp_path):
    before = contents(store)
    stranger = film(tmp_path / "stran\x1bger.mp4")
    told = vacli("store", "rm", "v00", stranger, "--yes", "--store", store.path, fails=True).output
    assert "has nothing that was made of" in told
    assert "\x1b" not in told
    told = vacli("store", "rm", stranger, "--track", "mae", "--yes", "--store", store.path, fails=True).output
    assert "of a file everything goes" in told
    assert contents(store) == before


def test_rm_of_a_file_goes_by_a_bucket_too(tmp_path, monkeypatch):
    monkeypatch.setenv("VACLI_CACHE", str(tmp_path / "cache"))
    url = f"memory://{tmp_path.name}/features.zarr"
    store = Store(url, create=True)
    anna, bert = film(tmp_path / "anna.mp4"), film(tmp_path / "bert.mp4")
    made = store_all(store, sample_of(anna), link=False)
    store.set_aside(made[0])
    stays = store_all(store, sample_of(bert), link=True)
    vacli("store", "rm", anna, "--yes", "--store", url)
    fs, root = fsspec.url_to_fs(url)
    media = made[0].partition("/")[2]
    assert [p for p in fs.find(root) if bert.name in p or stays[0] in p]
    assert not [p for p in fs.find(root) if media in p]
    assert not traces(store, media)
    fs.rm(root, recursive=True)


def test_rm_of_an_empty_word_is_not_of_what_was_made_for_nobody(store):
    store.put(recipe("faces"), "00" * 32, tracks_of(0)["mae"])
    before = contents(store)
    assert "knows no video ''" in vacli("store", "rm", "", "--yes", "--store", store.path, fails=True).output
    assert contents(store) == before


def test_rm_of_a_file_finds_it_though_every_copy_was_set_aside(store, tmp_path):
    anna = film(tmp_path / "anna.mp4")
    for name in store_all(store, sample_of(anna), link=False):
        store.set_aside(name)
    vacli("store", "rm", anna, "--yes", "--store", store.path)
    assert store.at.hidden(".quarantine") == []
    assert len(store.entries()) == 9


def test_the_help_of_rm_says_what_it_does_not_remove():
    told = " ".join(vacli("store", "rm", "--help").output.split())
    for what in ("predictions/", "copies", "exports", "trained runs"):
        assert what in told[told.index("Not removed") :]


def test_a_store_of_the_first_format_is_listed_without_being_changed(tmp_path):
    shutil.copytree(Path(__file__).parent / "data" / "store_format_1.zarr", tmp_path / "old.zarr")
    before = contents(Store(tmp_path / "old.zarr"))
    assert vacli("store", "ls", "--store", tmp_path / "old.zarr").output.splitlines()[1].split()[0] == "v00"
    assert contents(Store(tmp_path / "old.zarr")) == before
