"""Curves on the disk: a line for every frame, whole or as before, and records that no stranger can lead astray."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from vacli import VacliError
from vacli.store.curves import (
    HEADER,
    RECORDS,
    About,
    Curve,
    read_csv,
    recall,
    remember,
    seen_from,
    whole_file,
    write_csv,
)
from vacli.store.names import folder_of
from vacli.store.track import Track


def curve(rows: int = 3, person: str = "main", spread: bool = False) -> Curve:
    values = np.linspace([-1, 0.5], [1, -0.5], rows, dtype=np.float32)
    face = np.arange(rows) % 2 == 0
    return Curve(Track(values, np.arange(rows) / 25), face, person, np.abs(values) if spread else None)


# ---- the file ------------------------------------------------------------------------------------------------


def test_a_curve_file_has_a_line_for_every_frame_counted_from_one(tmp_path):
    path = tmp_path / "new" / "folder" / "clip.csv"
    track = Track(np.array([[0.5, -1], [0.25, 1 / 3]], np.float32), np.array([0.02, 0.0600004]))
    write_csv(path, Curve(track, np.array([True, False])))
    assert path.read_bytes() == (
        b"frame,time_s,valence,arousal,face,person,valence_std,arousal_std\n"
        b"1,0.020000,0.500000,-1.000000,1,main,,\n2,0.060000,0.250000,0.333333,0,main,,\n"
    )
    assert [p.name for p in path.parent.iterdir()] == ["clip.csv"]


def test_the_spread_of_an_ensemble_and_the_person_stand_in_the_last_columns(tmp_path):
    track = Track(np.array([[0.5, -1], [0.25, 1 / 3]], np.float32), np.array([0.02, 0.06]))
    write_csv(
        tmp_path / "c.csv", Curve(track, np.ones(2, bool), "left", np.array([[0.125, 0], [0.03125, 1]]))
    )
    assert (tmp_path / "c.csv").read_text().splitlines()[1:] == [
        "1,0.020000,0.500000,-1.000000,1,left,0.125000,0.000000",
        "2,0.060000,0.250000,0.333333,1,left,0.031250,1.000000",
    ]


@pytest.mark.parametrize(
    "wrong",
    [
        {"face": np.ones(2, bool)},
        {"spread": np.zeros((1, 2))},
        {"spread": np.zeros(3)},
        {"spread": np.full((3, 2), -0.1)},
        {"spread": np.full((3, 2), np.inf)},
        {"spread": np.full((3, 2), 1e39)},
        {"person": "left,0.5"},
        {"person": 'the "main" one'},
        {"person": "main\n4,0.1"},
    ],
)
def test_a_curve_refuses_what_its_file_could_not_say(wrong):
    with pytest.raises(ValueError, match="wanted"):
        replace(curve(3), **wrong)


def test_a_curve_without_rows_is_a_header(tmp_path):
    write_csv(tmp_path / "c.csv", curve(0))
    assert (tmp_path / "c.csv").read_text() == ",".join(HEADER) + "\n"
    assert len(read_csv(tmp_path / "c.csv").track) == 0


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "clip.csv"
    write_csv(path, curve(3))
    old = path.read_bytes()
    with contextlib.suppress(ZeroDivisionError), whole_file(path) as f:
        f.write("half of it")
        raise ZeroDivisionError
    assert path.read_bytes() == old

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(VacliError, match=r"cannot write .*clip\.csv: No space left on device; .*--out"):
        write_csv(path, curve(5))
    assert path.read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == ["clip.csv"]


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(VacliError, match=r"cannot write .*clip\.csv"):
        write_csv(tmp_path / "file" / "clip.csv", curve(1))


@pytest.mark.parametrize("name", ["a" * 251 + ".csv", "🙂" * 60 + ".csv", ".csv", "-c.csv", "a\nb.csv"])
def test_every_name_that_a_file_may_have_can_be_written(tmp_path, name):
    write_csv(tmp_path / name, curve(2))
    assert len(read_csv(tmp_path / name).track) == 2
    assert os.listdir(tmp_path) == [name]


def test_names_that_begin_alike_are_written_at_once_without_touching_each_other(tmp_path):
    begun = threading.Barrier(2)

    def write(letter: str) -> None:
        with whole_file(tmp_path / ("x" * 120 + letter)) as f:
            begun.wait()
            f.write(letter * 10)
            f.flush()
            begun.wait()

    threads = [threading.Thread(target=write, args=(letter,)) for letter in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {p.name[-1]: p.read_text() for p in tmp_path.iterdir()} == {"a": "a" * 10, "b": "b" * 10}


@settings(max_examples=50)
@given(
    hnp.arrays(np.float32, st.tuples(st.integers(0, 20), st.just(2)), elements=st.floats(-1, 1, width=32)),
    st.sampled_from(["main", "left", "2"]),
    st.booleans(),
)
def test_what_is_written_is_read_again(tmp_path_factory, values, person, with_spread):
    path = tmp_path_factory.mktemp("c") / "c.csv"
    face = np.arange(len(values)) % 3 > 0
    made = Curve(
        Track(values, np.arange(len(values)) / 7), face, person, np.abs(values) if with_spread else None
    )
    write_csv(path, made)
    read = read_csv(path)
    np.testing.assert_allclose(read.track.values, values, atol=6e-7)
    np.testing.assert_allclose(read.track.times_s, made.track.times_s, atol=6e-7)
    assert read.face.tolist() == face.tolist()
    assert read.person == (person if len(values) else "main")
    assert (read.spread is not None) == (with_spread and len(values) > 0)
    if read.spread is not None:
        np.testing.assert_allclose(read.spread, np.abs(values), atol=6e-7)


def test_a_file_of_an_older_version_is_read(tmp_path):
    (tmp_path / "old.csv").write_bytes(
        b"\xef\xbb\xbfframe,time_s,valence,arousal,face\r\n1,0.0,0.5,-0.5,1\r\n"
    )
    read = read_csv(tmp_path / "old.csv")
    assert (read.person, read.spread, read.face.tolist()) == ("main", None, [True])
    assert read.track.values.tolist() == [[0.5, -0.5]]


_LINE = "1,0.0,0.5,-0.5,1,main,,\n"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "no column"),
        ("frame,time_s,valence,face\n1,0,0,1\n", "no column arousal"),
        (_LINE, "no column"),
        (_LINE + "2,0.1,here,0,1,main,,\n", "could not convert"),
        (_LINE + "2,0.1\n", "cannot read"),
        (_LINE + "2,0.1,0.5,0.5,1,left,,\n", "several people"),
        (_LINE + "2,0.0,0.5,0.5,1,main,,\n", "increasing"),
        (_LINE + "2,1.1e9,0.5,0.5,1,main,,\n", "times beyond"),
        ("1,-1e308,0.5,0.5,1,main,,\n", "times beyond"),
        ("1,0.0,0.5,0.5,1,main,-1,0\n", "negative or infinite"),
        ("1,0.0,0.5,0.5,1,main,0,1e39\n", "negative or infinite"),
        (_LINE + "2,nan,0.5,0.5,1,main,,\n", "finite"),
        (_LINE + "2,0.1,1e300,0.5,1,main,,\n", "infinity"),
        (_LINE + "2,0.1,nan,0.5,1,main,,\n", "partly NaN"),
        (_LINE + "3,0.1,0.5,0.5,1,main,,\n", "frames are not 1, 2, 3"),
        ("0,0.0,0.5,-0.5,1,main,,\n", "frames are not 1, 2, 3"),
        (_LINE + "1,0.1,0.5,0.5,1,main,,\n", "frames are not 1, 2, 3"),
        (_LINE + f"2,0.1,{'9' * 200_000},0.5,1,main,,\n", "cannot read"),
        (_LINE + '2,0.1,0.5,0.5,1,"main\n', "cannot read"),
    ],
)
def test_a_file_that_is_no_curve_is_one_line(tmp_path, text, told):
    lines = text if told.startswith("no column") else ",".join(HEADER) + "\n" + text
    (tmp_path / "odd.csv").write_text(lines)
    with pytest.raises(VacliError, match=told) as e:
        read_csv(tmp_path / "odd.csv")
    assert "odd.csv" in str(e.value)
    assert "\n" not in str(e.value)[:300]


@pytest.mark.parametrize(
    "content", [b"\xff\xfe\x00", b"frame,time_s,valence,arousal,face\n1,\xff,0,0,1\n", b"\0"]
)
def test_bytes_that_are_no_text_are_one_line(tmp_path, content):
    (tmp_path / "odd.csv").write_bytes(content)
    with pytest.raises(VacliError, match=r"odd\.csv"):
        read_csv(tmp_path / "odd.csv")


def test_a_curve_that_is_not_there_is_one_line(tmp_path):
    for path in (tmp_path / "none.csv", tmp_path):
        with pytest.raises(VacliError, match="cannot read the curve"):
            read_csv(path)


# ---- records -------------------------------------------------------------------------------------------------


def about(folder: Path, id: str = "clip", **more: Any) -> About:
    csv = folder / f"{id}.csv"
    write_csv(csv, curve(2))
    return replace(About(id, id, f"{id}.mp4", csv=csv), **more)


def test_what_is_remembered_is_recalled(tmp_path):
    folder = tmp_path / "predictions"
    name = "<script>alert(1)</script>\n\"b'c&d 🙂 \udcff.mp4"
    made = about(folder, "day/clip", name=name, video=tmp_path / "v" / "clip.mp4", run={"head": "mamba"})
    lost = About("gone", "gone", "gone.avi", problem="no video in it", warning="odd")
    for one in (made, lost):
        remember(folder, one)
    found = recall(folder)
    assert [a.id for a in found] == ["day/clip", "gone"]
    assert found[0].video is not None
    assert found[0].video.resolve() == (tmp_path / "v" / "clip.mp4").resolve()
    assert replace(found[0], video=None) == replace(made, video=None)
    assert found[1] == lost


def test_a_record_takes_the_place_of_the_earlier_one(tmp_path):
    made = about(tmp_path)
    remember(tmp_path, made)
    remember(tmp_path, replace(made, warning="again"))
    assert [a.warning for a in recall(tmp_path)] == ["again"]


def test_a_folder_that_is_moved_with_its_videos_is_recalled(tmp_path):
    folder = tmp_path / "before" / "predictions"
    (tmp_path / "before").mkdir()
    (tmp_path / "before" / "clip.mp4").write_bytes(b"")
    remember(folder, about(folder, video=tmp_path / "before" / "clip.mp4"))
    (tmp_path / "before").rename(tmp_path / "after")
    (found,) = recall(tmp_path / "after" / "predictions")
    assert found.video is not None
    assert found.video.is_file()
    assert found.csv == tmp_path / "after" / "predictions" / "clip.csv"


def test_the_video_is_found_from_a_folder_that_is_a_link(tmp_path, monkeypatch):
    (tmp_path / "disk" / "deep" / "curves").mkdir(parents=True)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "clip.mp4").write_bytes(b"")
    (tmp_path / "home" / "predictions").symlink_to(tmp_path / "disk" / "deep" / "curves")
    monkeypatch.chdir(tmp_path / "home")
    remember(Path("predictions"), about(Path("predictions"), video=Path("clip.mp4")))
    (found,) = recall(Path("predictions"))
    assert found.video is not None
    assert found.video.is_file()
    assert seen_from(Path("predictions"), Path("predictions/clip.csv")) == "clip.csv"


def test_a_curve_that_no_record_speaks_of_is_known_by_its_name(tmp_path):
    write_csv(tmp_path / "day" / "clip.csv", curve(2))
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    write_csv(tmp_path / ".hidden" / "clip.csv", curve(2))
    (found,) = recall(tmp_path)
    assert (found.id, found.name, found.video) == ("day/clip", "day/clip", None)
    assert found.csv == tmp_path / "day" / "clip.csv"


def test_a_folder_without_curves_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path, tmp_path / "none", tmp_path / "file"):
        with pytest.raises(VacliError, match=r"no curves in .*vacli predict"):
            recall(folder)


def test_a_record_whose_curve_is_gone_is_left_out(tmp_path):
    for name in ("here", "gone"):
        remember(tmp_path, about(tmp_path, name))
    (tmp_path / "gone.csv").unlink()
    assert [a.id for a in recall(tmp_path)] == ["here"]


def put(folder: Path, facts: object, name: str | None = None) -> None:
    (folder / RECORDS).mkdir(exist_ok=True)
    text = facts if isinstance(facts, str) else json.dumps(facts)
    found = facts.get("id") if isinstance(facts, dict) else None
    stem = name or (folder_of(found) if isinstance(found, str) else "odd")
    (folder / RECORDS / f"{stem}.json").write_text(text)


RIGHT = {"format": 1, **asdict(About("clip", "clip", "clip.mp4")), "csv": "clip.csv"}


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"id": "../clip"},
        {"id": "/etc/passwd"},
        {"id": ""},
        {"id": 5},
        {"id": None},
        {"id": ["clip"]},
        {"video_id": "../../clip"},
        {"video_id": {}},
        {"name": 5},
        {"person": None},
        {"csv": "../outside.csv"},
        {"csv": "a/../../outside.csv"},
        {"csv": "ABSOLUTE"},
        {"csv": 5},
        {"csv": ""},
        {"csv": "a\0b"},
        {"csv": "\ud800.csv"},
        {"name": "\ud800"},
        {"name": "n" * 5000},
        {"person": "p" * 5000},
        {"labels": "\ud800.txt"},
        {"id": "way_out/clip"},
        {"video_id": "way_out/clip"},
        {"id": "round/clip"},
        {"video": 5},
        {"video": "a\0b.mp4"},
        {"labels": ["x"]},
        {"problem": {"a": 1}},
        {"warning": 7},
        {"run": "text"},
        {"run": None},
        {"unknown": 1},
    ],
)
def test_a_record_that_none_of_us_wrote_is_left_out(tmp_path, change):
    folder = tmp_path / "predictions"
    write_csv(folder / "clip.csv", curve(2))
    write_csv(tmp_path / "outside.csv", curve(2))
    (folder / "way_out").symlink_to(tmp_path)
    (folder / "round").symlink_to(folder / "round")
    put(folder, RIGHT)
    assert recall(folder)[0].name == "clip.mp4"
    changed = {k: str(tmp_path / "outside.csv") if v == "ABSOLUTE" else v for k, v in change.items()}
    put(folder, {**RIGHT, **changed}, folder_of("clip"))
    put(folder, {**RIGHT, **changed})
    (found,) = [a for a in recall(folder) if a.csv]
    assert (found.id, found.name) == ("clip", "clip")  # the CSV by itself; nothing of the record


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "7", "null", '"text"', "[" * 100_000, '{"format": 1}', "\0", '{"format": 1e999}', "NaN"],
)
def test_a_record_that_is_no_record_is_left_out(tmp_path, text):
    remember(tmp_path, about(tmp_path))
    put(tmp_path, text, "odd")
    assert [a.name for a in recall(tmp_path)] == ["clip.mp4"]


def test_records_that_a_link_leads_out_of_the_folder_are_neither_read_nor_written(tmp_path):
    folder, home = tmp_path / "predictions", tmp_path / "home"
    made = about(folder)
    home.mkdir()
    remember(folder, replace(made, name="of another folder"))
    (folder / RECORDS).rename(home / RECORDS)
    (folder / RECORDS).symlink_to(home / RECORDS)
    before = {path: path.read_bytes() for path in (home / RECORDS).iterdir()}
    assert [a.name for a in recall(folder)] == ["clip"]
    with pytest.raises(VacliError, match=r"\.vacli is a link that leads out of .*--out"):
        remember(folder, made)
    assert {path: path.read_bytes() for path in (home / RECORDS).iterdir()} == before


def test_a_record_under_another_ones_name_does_not_take_its_place(tmp_path):
    remember(tmp_path, about(tmp_path))
    for name in ("0", "zzz"):
        put(tmp_path, {**RIGHT, "name": "forged"}, name)
    assert [a.name for a in recall(tmp_path)] == ["clip.mp4"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes have no name on this system")
def test_pipes_and_folders_called_like_curves_and_records_are_not_waited_for(tmp_path):
    remember(tmp_path, about(tmp_path))
    os.mkfifo(tmp_path / "pipe.csv")
    os.mkfifo(tmp_path / RECORDS / "pipe.json")
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / RECORDS / "folder.json").mkdir()
    assert [a.id for a in recall(tmp_path)] == ["clip"]


@settings(max_examples=100)
@given(
    st.dictionaries(
        st.sampled_from(sorted(RIGHT)),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.text(st.characters(), max_size=8) | st.floats(),
            lambda more: st.lists(more, max_size=2) | st.dictionaries(st.text(max_size=3), more, max_size=2),
            max_leaves=4,
        ),
    )
)
def test_whatever_stands_in_a_record_the_curves_are_recalled(tmp_path_factory, change):
    folder = tmp_path_factory.mktemp("hostile")
    write_csv(folder / "clip.csv", curve(2))
    put(folder, {**RIGHT, **change})
    for found in recall(folder):
        assert found.csv is None or found.csv == folder / "clip.csv"
        assert isinstance(found.name, str)
        assert isinstance(found.problem, str | None)
        for path in (found.video, found.labels):
            assert path is None or b"\0" not in os.fsencode(path)  # a path that can be asked for


def test_what_a_killed_process_left_goes_and_what_a_living_one_writes_stays(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    name, old_s = folder_of("x.csv"), time.time() - 7200
    parts = {
        "left": tmp_path / f".{name}.{gone.pid}.part",
        "of a living process": tmp_path / f".{name}.{os.getppid()}.part",
        "of another machine": tmp_path / f".{folder_of('y.csv')}.{gone.pid}.part",
        "somebody's": tmp_path / ".film.1.part",
    }
    for kind, part in parts.items():
        part.write_text("")
        if kind != "of another machine":
            os.utime(part, (old_s, old_s))
    with whole_file(tmp_path / "a.txt") as f:
        f.write("whole")
    assert {kind for kind, part in parts.items() if part.exists()} == parts.keys() - {"left"}
