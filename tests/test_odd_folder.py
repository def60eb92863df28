"""A folder as labs have them: whatever lies in it, predict gives the right files and one exit code."""

from __future__ import annotations

import csv
import json
import os
import shutil
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from vacli.cli import main
from vacli.extract.datasets import find_all
from vacli.extract.media import Video
from vacli.store.curves import HEADER, read_csv, recall

from .commands import TINY, vacli
from .media_files import clicks, pictures, write_video

LONG = "v" * 200
TONE = clicks(0.4, [0.1])


def puppet(data: Path) -> list[np.ndarray]:
    """Ten frames with one drawn face that MTCNN finds."""
    frames = np.concatenate([rgb for rgb, _ in Video(data / "batch2" / "puppet_val_00.mp4").frames()])
    return list(frames[:10])


def odd_folder(folder: Path, face: list[np.ndarray]) -> tuple[dict[str, int], set[str]]:
    """Fills the folder; by id the rows that are to come, and the ids of those that are broken."""
    (folder / "day 2").mkdir(parents=True)
    two = [np.concatenate([a, b], axis=1) for a, b in zip(face, face[::-1], strict=True)]
    uneven_s = [0, 0.04, 0.05, 0.3, 0.31, 0.7, 1.9, 1.95, 2.0, 2.5]
    good = write_video(folder / "plain.mp4", face, sound=TONE)
    write_video(folder / "silent.mp4", face)
    write_video(folder / "no_face.mp4", pictures(10, 96, 96), sound=TONE)
    write_video(folder / "two people.mp4", two, sound=TONE)
    write_video(folder / "phone.mp4", [np.rot90(f).copy() for f in face], sound=TONE, rotation=-90)
    write_video(folder / "uneven.mkv", face, times_s=uneven_s, sound=TONE)
    write_video(folder / "4k.mp4", pictures(2, 2160, 3840), options={"preset": "ultrafast"}, sound=TONE)
    write_video(folder / "8fps.mov", face, times_s=[i / 8 for i in range(10)], sound=TONE)
    write_video(folder / "one.mp4", face[:1], sound=TONE)
    write_video(folder / "odd sides.webm", [f[:255, :253] for f in face], sound=TONE)
    write_video(folder / "narrow pixels.mpg", face, sound=TONE, pixel_aspect=Fraction(4, 3))
    write_video(folder / "late.mp4", face, sound=TONE, sound_start_s=0.2)
    write_video(folder / "old.avi", face, sound=TONE)
    write_video(folder / "day 2" / "plain.mp4", face, sound=TONE)
    write_video(folder / f"{LONG}.mp4", face, sound=TONE)
    write_video(folder / "😀.mp4", face, sound=TONE)
    write_video(folder / "a\"b'c&d.mp4", face, sound=TONE)
    (folder / "<script>alert(1)<").mkdir()
    write_video(folder / "<script>alert(1)<" / "script>.mp4", face, sound=TONE)
    os.replace(write_video(folder / "upper.mp4", face, sound=TONE), folder / "UPPER.MP4")
    (folder / "cut.mp4").write_bytes(good.read_bytes()[: good.stat().st_size // 2])
    (folder / "text.mp4").write_text("I am a text file\n" * 100)
    (folder / "empty.mkv").write_bytes(b"")
    write_video(folder / "only sound.mkv", sound=TONE)
    # passed over: no videos by their names, hidden, or a way round in a circle
    (folder / "notes.txt").write_text("interview on Monday")
    (folder / "._plain.mp4").write_bytes(b"\0\5\x16\7")
    (folder / "photo.jpg").write_bytes(b"\xff\xd8")
    (folder / "circle").symlink_to(folder)
    rows = {s.id: 10 for s in find_all([folder])}
    broken = {"cut", "text", "empty", "only sound"}
    return {**rows, "4k": 2, "one": 1}, broken


@pytest.fixture
def face(lab) -> list[np.ndarray]:
    return puppet(lab / "data")


def test_a_folder_of_odd_videos_gives_the_right_files_and_one_exit_code(at, face):
    rows, broken = odd_folder(at / "odd", face)
    assert len(rows) == 23
    told = vacli("predict", "--video", "odd", fails=True).output
    listed = told[told.index(f"{len(broken)} of {len(rows)} videos had a problem:") :].splitlines()[1:]
    assert {line[2:].partition("  ")[0] for line in listed} == broken
    out = at / "predictions"
    curves = {about.id: about for about in recall(out)}
    assert curves.keys() == rows.keys()
    assert {id for id, about in curves.items() if about.csv is None} == broken
    assert {about.name for about in curves.values()} >= {
        f"{LONG}.mp4", "😀.mp4", "a\"b'c&d.mp4", "<script>alert(1)</script>.mp4", "day 2/plain.mp4", "UPPER.MP4",
    }  # fmt: skip
    for id in rows.keys() - broken:
        about = curves[id]
        assert about.csv is not None
        assert about.csv == out / f"{id}.csv"
        assert about.video is not None
        curve = read_csv(about.csv)
        assert len(curve.track) == rows[id], id
        np.testing.assert_allclose(curve.track.times_s, list(Video(about.video).times()), atol=1e-6)
        assert curve.face.all() == (id not in ("no_face", "4k")), id
    np.testing.assert_allclose(read_csv(out / "uneven.csv").track.times_s[[1, 6]], [0.04, 1.9], atol=1e-6)
    assert "silent.mp4: it has no sound; its curve rests on the picture alone" in told
    assert (out / "index.html").stat().st_size > 1000
    pages = {p.relative_to(out).as_posix() for p in out.rglob("*.html")} - {"index.html"}
    assert pages == {f"{id}.html" for id in rows.keys() - broken}
    again = vacli("predict", "--video", "odd", fails=True).output
    assert "nothing to compute" in again


def test_everybody_in_a_video_has_a_curve_and_they_share_a_page(at, face):
    odd_folder(at / "odd", face)
    vacli("predict", "odd/two people.mp4", "--person", "all")
    out = at / "predictions"
    abouts = recall(out)
    assert [(a.id, a.video_id, a.person) for a in abouts] == [
        ("two people_person1", "two people", "1"),
        ("two people_person2", "two people", "2"),
    ]
    for about in abouts:
        with open(out / f"{about.id}.csv", newline="") as f:
            rows = list(csv.DictReader(f))
        assert tuple(rows[0]) == HEADER
        assert {r["person"] for r in rows} == {about.person}
        assert len(rows) == 10
    assert [p.name for p in out.glob("*.html") if p.name != "index.html"] == ["two people.html"]


def test_left_and_right_have_curves_of_their_own_on_one_page(at, face):
    two = [np.concatenate([a, b], axis=1) for a, b in zip(face, face[::-1], strict=True)]
    write_video(at / "clip.mp4", two, sound=TONE)
    for side in ("left", "right"):
        vacli("predict", "clip.mp4", "--person", side)
    out = at / "predictions"
    assert [(a.id, a.video_id, a.person) for a in recall(out)] == [
        ("clip_left", "clip", "left"),
        ("clip_right", "clip", "right"),
    ]
    left, right = (read_csv(out / f"clip_{side}.csv").track.values for side in ("left", "right"))
    assert (left != right).any()
    assert [p.name for p in out.glob("*.html") if p.name != "index.html"] == ["clip.html"]


def test_a_list_and_several_paths_give_each_video_once(at, face):
    odd_folder(at / "odd", face)
    (at / "list.txt").write_text("# Monday\nodd/plain.mp4\n\nodd/gone.mp4\nodd/day 2/plain.mp4\n")
    told = vacli("predict", "--video", "list.txt", "odd/plain.mp4", "--json", "--no-report", fails=True)
    found = json.loads(told.stdout)
    assert {f["id"]: bool(f["csv"]) for f in found} == {"plain": True, "day 2/plain": True, "gone": False}
    assert "cannot read odd/gone.mp4: No such file" in told.stderr
    assert not (at / "predictions" / "index.html").exists()


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["nowhere.mp4"], "no such file or folder: nowhere.mp4"),
        (["--video", "empty_list.txt"], "names no file or folder that is there"),
        (["--video", "labels.txt"], "holds labels"),
    ],
)
def test_a_mistake_in_naming_videos_is_one_line(at, words, complaint):
    (at / "empty_list.txt").write_text("# nothing yet\n")
    (at / "labels.txt").write_text("valence,arousal\n0,0\n")
    told = vacli("predict", *words, fails=True).output
    assert told.count("\n") == 1
    assert complaint in told


def test_what_predict_made_is_not_taken_for_a_video(at, face):
    (at / "clips").mkdir()
    write_video(at / "clips" / "clip.mp4", face, sound=TONE)
    write_video(at / "clips" / "old.avi", face, sound=TONE)  # of which the page has a copy
    words = ("predict", "clips", "--out", "clips/predictions", "--overlay")
    vacli(*words)
    assert (at / "clips" / "predictions" / "media" / "old.mp4").is_file()
    vacli(*words)
    assert [about.id for about in recall(at / "clips" / "predictions")] == ["clip", "old"]


def test_each_side_of_a_video_keeps_its_own_labels(at, face):
    root, labels = at / "wild", {"12": 0.1, "12_right": -0.2}
    folder = root / "annotations" / "VA_Set" / "Validation_Set"
    folder.mkdir(parents=True)
    for name, value in labels.items():
        (folder / f"{name}.txt").write_text("valence,arousal\n" + f"{value},{value}\n" * 10)
    (root / "batch1").mkdir()
    two = [np.concatenate([a, b], axis=1) for a, b in zip(face, face[::-1], strict=True)]
    write_video(root / "batch1" / "12.mp4", two, sound=TONE)
    vacli("predict", root)
    found = {about.id: about.labels for about in recall(at / "predictions")}
    assert {id: file.name for id, file in found.items() if file} == {id: f"{id}.txt" for id in labels}


def test_a_head_that_only_hears_has_no_curve_of_a_silent_video(at, face):
    write_video(at / "silent.mp4", face)
    vacli("train", "--head", "linear", "--stream", "logmel", "--set", "train.epochs=1", "--name", "ears")
    told = vacli("predict", "silent.mp4", "--run", "ears", fails=True).output
    assert "1 of 1 videos had a problem" in told
    assert "it has no sound" in told


def test_a_name_that_is_no_text_is_shown_all_the_same(at, face):
    file = at / os.fsdecode(b"caf\xe9\x1b[31m.avi")
    os.replace(write_video(at / "plain.avi", face, sound=TONE), file)
    told = vacli("predict", file).output
    assert "\x1b" not in told
    (about,) = recall(at / "predictions")
    assert about.csv is not None
    assert (at / "predictions" / f"{about.video_id}.html").is_file()


def test_other_formats_never_show_another_curve_than_the_csv(at, face):
    write_video(at / "clip.mp4", face, sound=TONE)
    vacli("predict", "clip.mp4", "--format", "json", "--overlay", "--no-report")
    out = at / "predictions"
    vacli("predict", "clip.mp4", "--no-report")
    assert (out / "clip.overlay.mp4").is_file()  # the curve is the same
    vacli("train", "--head", "linear", "--set", "train.epochs=1")
    told = vacli("predict", "clip.mp4", "--no-report").output
    curve, found = read_csv(out / "clip.csv"), json.loads((out / "clip.json").read_text())
    np.testing.assert_allclose(found["valence"], curve.track.values[:, 0], atol=1e-6)
    assert not (out / "clip.overlay.mp4").exists()
    assert "--overlay makes it again" in told


def test_what_vacli_did_not_write_is_left_as_it_is(at, face):
    own = at / "own"
    (own / "media").mkdir(parents=True)
    write_video(own / "talk.mp4", face, sound=TONE)
    write_video(own / "old.avi", face, sound=TONE)  # whose copy would be media/old.mp4
    write_video(own / "media" / "old.mp4", face[:4], sound=TONE)
    write_video(own / "talk.overlay.mp4", face[:3], sound=TONE)
    for name in ("talk.json", "talk.vtt", "talk.eaf"):
        (own / name).write_text("mine")
    before = {p: p.read_bytes() for p in own.rglob("*") if p.is_file()}
    vacli("predict", "own", "--out", "own")
    vacli("train", "--head", "linear", "--set", "train.epochs=1")
    vacli("predict", "own", "--out", "own")  # another curve
    told = vacli("predict", "own/talk.mp4", "--out", "own", "--format", "eaf", "--overlay", fails=True).output
    assert "talk.eaf is not as vacli wrote it, and is left as it is" in told
    assert {p: p.read_bytes() for p in before} == before
    assert {a.id for a in recall(own)} == {"talk", "old", "media/old", "talk.overlay"}
    (own / "talk.csv").write_text("mine\n")
    told = vacli("predict", "own/talk.mp4", "--out", "own", fails=True).output
    assert "talk.csv is no curve, and is left as it is" in told
    assert (own / "talk.csv").read_text() == "mine\n"


def test_what_vacli_wrote_stays_its_own_though_a_call_was_killed_or_a_video_was_away(at, face, monkeypatch):
    video = write_video(at / "clip.mp4", face, sound=TONE)
    words = ("predict", "clip.mp4", "--no-report", "--format", "json", "--format", "eaf")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("vacli.handout._sha256", killed)  # the first file is written, and nothing after it
        assert CliRunner().invoke(main, words).exit_code == 130
    assert (at / "predictions" / "clip.json").is_file()
    vacli(*words)
    video.rename(at / "away")
    (at / "list.txt").write_text("clip.mp4\ndata/batch2/puppet_val_00.mp4\n")
    vacli("predict", "list.txt", "--no-report", fails=True)
    (at / "away").rename(video)
    vacli(*words)
    (at / "predictions" / "clip.csv").unlink()
    vacli(*words)


def test_the_bytes_say_whether_a_run_was_trained_on_a_video(at, face):
    (at / "other").mkdir()
    shutil.copy(at / "data" / "batch1" / "puppet_train_00.mp4", at / "other" / "renamed.mp4")
    write_video(at / "other" / "puppet_train_01.mp4", face, sound=TONE)  # the name alone is that of one
    vacli("predict", "other", "--no-report")
    found = {about.id: about.trained_on for about in recall(at / "predictions")}
    assert found == {"renamed": True, "puppet_train_01": False}


def test_a_curve_of_another_video_of_that_name_is_told_before_it_goes(at, face):
    for day in ("monday", "tuesday"):
        (at / day).mkdir()
        write_video(at / day / "clip.mp4", face if day == "monday" else face[::-1], sound=TONE)
        told = vacli("predict", day, "--no-report").output
    assert "clip.csv was of another video, clip.mp4; another --out keeps both" in told
    assert "was of another" not in vacli("predict", "tuesday", "--no-report").output
    both = vacli("predict", "monday", "tuesday", "--out", "both", "--json", "--no-report").stdout
    assert [one["name"] for one in json.loads(both)] == ["monday/clip.mp4", "tuesday/clip.mp4"]


def test_live_lines_are_the_curve_of_the_whole_video_as_one_line(at, face):
    vacli("train", "--head", "mamba", *TINY, "--set", "windows.whole=true", "--name", "whole")
    times_s = [i / 5 for i in range(10)]  # frames as far apart as the labels of the training were
    write_video(at / "clip.mkv", face, times_s=times_s, sound=clicks(2.0, [0.1]))
    vacli("predict", "clip.mkv", "--run", "whole", "--no-smooth", "--no-report")
    offline = read_csv(at / "predictions" / "clip.csv")
    told = vacli("predict", "--live", "--video", "clip.mkv", "--run", "whole").stdout.splitlines()
    live = list(csv.DictReader(told))
    assert tuple(live[0]) == HEADER
    np.testing.assert_allclose([float(r["time_s"]) for r in live], offline.track.times_s, atol=1e-6)
    values = [[float(r["valence"]), float(r["arousal"])] for r in live]
    # the head itself is equal to 1e-6 (test_live.py); of a face encoded alone a feature may round to the next float16
    np.testing.assert_allclose(values, offline.track.values, atol=2e-3)


@pytest.mark.parametrize(
    "words",
    [
        ["predict"],
        ["predict", "--live"],
        ["predict", "a.mp4", "--live", "--overlay"],
        ["predict", "a.mp4", "--camera", "0"],
    ],
)
def test_a_call_that_makes_no_sense_is_wrong_usage(at, words):
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 2, result.output
    assert "Usage: " in result.output


def test_every_form_of_a_curve_has_a_row_for_every_frame(at, face):
    write_video(at / "clip.mp4", face, sound=TONE)
    words = [word for name in ("parquet", "json", "eaf", "vtt") for word in ("--format", name)]
    vacli("predict", "clip.mp4", *words, "--overlay")
    out = at / "predictions"
    assert len(json.loads((out / "clip.json").read_text())["time_s"]) == 10
    from pyarrow import parquet

    assert parquet.read_table(out / "clip.parquet").column_names == list(HEADER)
    assert "valence" in (out / "clip.vtt").read_text()
    assert "TIER" in (out / "clip.eaf").read_text()
    assert len(list(Video(out / "clip.overlay.mp4").times())) == 10
