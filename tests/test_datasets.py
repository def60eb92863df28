"""What lies in a folder is found once, under its own name, with its labels, its split and its times."""

from __future__ import annotations

import os
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from vacli import VacliError
from vacli.extract.datasets import CROPS_RATE_HZ, Sample, find, find_all
from vacli.store import Fingerprints, combine
from vacli.store.labels import read_va

from .media_files import pictures, write_video

VA = "valence,arousal\n0.1,0.2\n"


def put(root: Path, *names: str, text: str = "x") -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def put_crops(folder: Path, numbers: list[int], size: int = 8) -> Path:
    """A picture a number, each as bright as its number says."""
    folder.mkdir(parents=True, exist_ok=True)
    for n in numbers:
        cv2.imwrite(str(folder / f"{n:05d}.jpg"), np.full((size, size, 3), n, np.uint8))
    return folder


def old(*paths: Path) -> None:
    """As if written an hour ago, so that their digests are remembered."""
    for path in paths:
        os.utime(path, (time.time() - 3600, time.time() - 3600))


def by_id(root: Path) -> dict[str, Sample]:
    return {sample.id: sample for sample in find(root)}


# ---- plain folders -------------------------------------------------------------------------------------------


def test_every_video_below_a_plain_folder_is_found_by_its_path(tmp_path):
    put(tmp_path, "b.mp4", "day/a.MKV", "day/night/a.webm", "notes.txt", "day/cover.jpg")
    samples = find(tmp_path)
    assert [s.id for s in samples] == ["b", "day/a", "day/night/a"]
    assert all(s.video and s.video.is_file() and s.root == tmp_path.resolve() for s in samples)
    assert all(s.crops is s.annotation is s.split is None for s in samples)


def test_a_stem_with_two_suffixes_is_two_videos(tmp_path):
    put(tmp_path, "a.mp4", "a.mov", "b.mp4")
    assert [s.id for s in find(tmp_path)] == ["a.mov", "a.mp4", "b"]


def test_what_a_dot_hides_is_not_found(tmp_path):
    put(tmp_path, "a.mp4", "._a.mp4", ".trash/b.mp4", "day/.thumbnails/c.mp4")
    assert [s.id for s in find(tmp_path)] == ["a"]
    hidden = tmp_path / ".cache" / "data"
    put(hidden, "a.mp4")
    assert [s.id for s in find(hidden)] == ["a"]  # asked for by its name, it is no secret


@pytest.mark.parametrize(
    ("folder", "split"),
    [("train", "train"), ("Training", "train"), ("val", "validation"), ("validation/day", "validation"),
     ("Validation_Set", "validation"), ("test", "test"), ("latest", None), (".", None)],
)  # fmt: skip
def test_folders_named_after_a_split_make_it(folder, split, tmp_path):
    put(tmp_path, f"{folder}/a.mp4")
    assert [s.split for s in find(tmp_path)] == [split]


def test_the_folder_asked_for_makes_no_split(tmp_path):
    put(tmp_path, "train/a.mp4")
    assert find(tmp_path / "train")[0].split is None


def test_a_text_beside_a_clip_labels_it_if_it_speaks_of_valence_and_arousal(tmp_path):
    put(tmp_path, "a.mp4", "b.mp4", "c.mp4", "d.mp4")
    put(tmp_path, "a.txt", text=VA)
    put(tmp_path, "b.txt", text="a transcript\n")
    (tmp_path / "c.txt").write_bytes(b"\xff\xfe\x00valence,arousal")
    found = by_id(tmp_path)
    assert found["a"].annotation == tmp_path / "a.txt"
    assert [found[k].annotation for k in "bcd"] == [None] * 3


def test_a_single_file_is_the_sample_its_folder_would_have(tmp_path):
    put(tmp_path, "a.mp4", "b.mp4")
    put(tmp_path, "a.txt", text=VA)
    assert find(tmp_path / "a.mp4") == [by_id(tmp_path)["a"]]


def test_missing_and_empty_folders_are_told_from_each_other(tmp_path):
    with pytest.raises(VacliError, match=r"no such file or folder: .*nowhere; wanted a video or a folder"):
        find(tmp_path / "nowhere")
    put(tmp_path, "notes.txt")
    with pytest.raises(VacliError, match=r"no videos below .*; wanted files ending in .*\.mp4"):
        find(tmp_path)


# ---- Aff-Wild2 -----------------------------------------------------------------------------------------------


@pytest.fixture
def affwild2(tmp_path) -> Path:
    sets = "annotations/VA_Estimation_Challenge"
    put(tmp_path, f"{sets}/Train_Set/12_left.txt", f"{sets}/Train_Set/12_right.txt", text=VA)
    put(tmp_path, f"{sets}/Train_Set/new.txt", f"{sets}/Validation_Set/7.txt", text=VA)
    put(tmp_path, f"{sets}/Validation_Set/lost.txt", f"{sets}/Train_Set/._7.txt", text=VA)
    put(tmp_path, "annotations/EXPR_Classification_Challenge/Train_Set/expr.txt", text="Neutral,Anger\n0\n")
    put(
        tmp_path,
        "batch1/12.mp4",
        "batch1/7.avi",
        "batch2/test.mp4",
        "batch2/expr.mp4",
        "batch2/turn_left.mp4",
    )
    for name in ("12_left", "12_right", "7", "cropsonly", ".ipynb_checkpoints"):
        put_crops(tmp_path / "cropped_aligned" / name, [1])
    put_crops(tmp_path / "cropped_aligned_new_50_vids" / "new", [1])
    (tmp_path / "cropped_aligned" / ".DS_Store").touch()
    return tmp_path


def test_aff_wild2_gives_one_sample_a_person(affwild2):
    found = by_id(affwild2)
    assert sorted(found) == ["12_left", "12_right", "7", "cropsonly", "expr", "new", "test", "turn_left"]
    assert len(find(affwild2)) == len(found)


def test_left_and_right_share_the_bare_video_and_keep_their_own_crops_and_labels(affwild2):
    left, right = by_id(affwild2)["12_left"], by_id(affwild2)["12_right"]
    assert left.video == right.video == affwild2 / "batch1" / "12.mp4"
    assert (left.crops, right.crops) == tuple(
        affwild2 / "cropped_aligned" / f"12_{s}" for s in ("left", "right")
    )
    assert left.annotation != right.annotation
    assert (
        by_id(affwild2)["turn_left"].video == affwild2 / "batch2" / "turn_left.mp4"
    )  # its own name comes first


def test_the_sets_of_the_annotations_are_the_splits(affwild2):
    splits = {name: s.split for name, s in by_id(affwild2).items()}
    assert splits == {
        "12_left": "train", "12_right": "train", "new": "train", "7": "validation",
        "cropsonly": None, "expr": None, "test": None, "turn_left": None,
    }  # fmt: skip


def test_crops_without_a_video_and_videos_without_crops_or_labels_are_samples_too(affwild2):
    found = by_id(affwild2)
    assert (found["new"].video, found["cropsonly"].video, found["cropsonly"].annotation) == (None, None, None)
    assert found["new"].crops == affwild2 / "cropped_aligned_new_50_vids" / "new"
    assert (found["test"].crops, found["test"].annotation) == (None, None)
    assert found["expr"].annotation is None  # its file is about expressions


def test_videos_without_crops_are_read_by_the_annotations_alone(affwild2, tmp_path):
    for folder in affwild2.glob("cropped_aligned*"):
        folder.rename(tmp_path / f"away_{folder.name}")
    left = by_id(affwild2)["12_left"]
    assert (left.crops, left.video) == (None, affwild2 / "batch1" / "12.mp4")


def test_two_people_whom_nobody_cropped_are_followed_by_their_side(affwild2, tmp_path):
    assert {s.person for s in find(affwild2)} == {"main"}  # their crops say who they are
    for folder in affwild2.glob("cropped_aligned*"):
        folder.rename(tmp_path / f"away_{folder.name}")
    people = {name: s.person for name, s in by_id(affwild2).items()}
    assert {k: v for k, v in people.items() if v != "main"} == {"12_left": "left", "12_right": "right"}
    assert people["turn_left"] == "main"  # its video is its own


def test_an_annotation_without_video_and_crops_is_no_sample(affwild2):
    assert "lost" not in by_id(affwild2)


@pytest.mark.parametrize(
    "folder",
    ["annotations/VA_Set/Training_Set", "6th ABAW Annotations/VA_Estimation_Challenge/Train_Set",
     "Annotations/annotations/VA_Estimation_Challenge/Train_Set", "VA_Estimation_Challenge/Train_Set"],
)  # fmt: skip
def test_the_annotations_of_any_year_are_found(folder, tmp_path):
    put(tmp_path, f"{folder}/12_left.txt", text=VA)
    put(tmp_path, f"{folder}/../Validation_Set/7.txt", text=VA)
    put(tmp_path, "batch1/12.mp4", "batch2/7.mp4")
    found = by_id(tmp_path)
    assert {name: (s.split, s.person) for name, s in found.items()} == {
        "12_left": ("train", "left"),
        "7": ("validation", "main"),
    }


def test_a_folder_of_other_annotations_leaves_a_plain_folder_plain(tmp_path):
    put(tmp_path, "my annotations/notes.txt", "day/a.mp4")
    assert [s.id for s in find(tmp_path)] == ["day/a"]


def test_crops_in_both_folders_are_refused_unless_one_holds_none(affwild2):
    again = affwild2 / "cropped_aligned_new_50_vids" / "7"
    again.mkdir()
    (again / "notes.txt").touch()
    assert by_id(affwild2)["7"].crops == affwild2 / "cropped_aligned" / "7"
    put_crops(again, [2])
    with pytest.raises(
        VacliError, match=r"7 has several crops: .*cropped_aligned/7, .*new_50_vids/7; wanted one"
    ):
        find(affwild2)


def test_a_second_video_of_a_name_is_refused(affwild2):
    put(affwild2, "batch3/12.mkv")
    with pytest.raises(
        VacliError, match=r"12 has several videos: .*batch1/12.mp4, .*batch3/12.mkv; wanted one"
    ):
        find(affwild2)


def test_labels_said_twice_are_one_and_contradictions_are_refused(affwild2):
    copy = "annotations/2022/VA_Estimation_Challenge/Validation_Set/7.txt"
    put(affwild2, copy, text=VA)
    assert by_id(affwild2)["7"].split == "validation"
    put(affwild2, copy, text=VA.replace("0.1", "0.3"))
    with pytest.raises(VacliError, match="7 has several annotations"):
        find(affwild2)
    (affwild2 / copy).unlink()
    put(affwild2, copy.replace("Validation", "Train"), text=VA)
    with pytest.raises(VacliError, match="7 has several annotations"):
        find(affwild2)


# ---- crops ---------------------------------------------------------------------------------------------------


def test_crop_numbers_with_holes_keep_their_frames(tmp_path):
    sample = Sample("a", tmp_path, crops=put_crops(tmp_path / "a", [2, 3, 7, 12]))
    put(tmp_path / "a", "00000.jpg", "notes.txt", "x00005.jpg", "._00004.jpg")
    assert sorted(sample.crop_files()) == [1, 2, 6, 11]
    np.testing.assert_allclose(sample.frame_times_s(), np.arange(12) / CROPS_RATE_HZ)
    seen = list(sample.read_crops(rows=10, batch=2))
    assert [rows.tolist() for _, rows in seen] == [[1, 2], [6]]
    assert [crops[:, 0, 0, 0].tolist() for crops, _ in seen] == [[2, 3], [7]]
    assert all(crops.dtype == np.uint8 and crops.shape[1:] == (8, 8, 3) for crops, _ in seen)


def test_crops_beside_their_video_take_its_times(tmp_path):
    video = write_video(tmp_path / "a.mp4", pictures(5), [0.0, 0.1, 0.3, 0.35, 0.5])
    sample = Sample("a", tmp_path, video, put_crops(tmp_path / "a", [1, 4, 9]))
    np.testing.assert_allclose(sample.frame_times_s(), [0.0, 0.1, 0.3, 0.35, 0.5], atol=1e-3)
    assert sample.frame_clock()[1] is None
    assert [rows.tolist() for _, rows in sample.read_crops(5)] == [[0, 3]]  # no frame is numbered 9


def test_the_rate_of_crops_without_a_video_is_stated(affwild2, tmp_path):
    found = {s.id: s for s in find(affwild2, crops_rate_hz=25.0)}
    np.testing.assert_allclose(found["new"].frame_times_s(), [0.0])
    crops = put_crops(tmp_path / "a", [1, 4])
    sample = Sample("a", tmp_path, crops=crops, crops_rate_hz=25)
    np.testing.assert_allclose(sample.frame_times_s(), np.arange(4) / 25)
    as_ever = Sample("a", tmp_path, crops=crops).media(Fingerprints())
    assert as_ever == Sample("a", tmp_path, crops=crops, crops_rate_hz=30).media(Fingerprints())
    assert as_ever == combine(
        Fingerprints().folder(sorted(crops.iterdir())), "30.0 Hz"
    )  # as in stores of 0.1
    assert as_ever != sample.media(Fingerprints())
    video = write_video(tmp_path / "a.mp4", pictures(2))
    timed = [Sample("a", tmp_path, video, crops, crops_rate_hz=rate) for rate in (25.0, 30.0)]
    assert timed[0].media(Fingerprints()) == timed[1].media(Fingerprints())  # the video says when
    for rate in (0.0, -1.0, np.nan, np.inf):
        with pytest.raises(VacliError, match="wanted a rate above 0"):
            find(affwild2, crops_rate_hz=rate)


@pytest.mark.parametrize("lines", [2, 4, 9])  # fewer than there are frames, as many, more
@pytest.mark.parametrize("with_video", [True, False])
def test_labels_and_crops_meet_at_the_frame_number(lines, with_video, tmp_path):
    """Line i, frame i and %05d.jpg of i belong together, whatever is missing of one of them."""
    labels = np.linspace(-0.9, 0.9, 2 * lines).round(3).reshape(lines, 2)
    rows = "".join(f"{v},{a}\n" for v, a in labels)
    put(
        tmp_path,
        "annotations/VA_Estimation_Challenge/Train_Set/12_right.txt",
        text="valence,arousal\n" + rows,
    )
    put_crops(tmp_path / "cropped_aligned" / "12_right", [2, 4])
    times_s = [0.0, 0.1, 0.3, 0.35] if with_video else np.arange(4) / 30
    if with_video:
        (tmp_path / "batch1").mkdir()
        write_video(tmp_path / "batch1" / "12.mp4", pictures(4), list(times_s))
    (sample,) = find(tmp_path)
    clock = sample.frame_times_s()
    np.testing.assert_allclose(clock, times_s, atol=1e-3)
    assert sample.annotation is not None
    track = read_va(sample.annotation, clock)
    assert len(track) == 4
    np.testing.assert_array_equal(track.valid, np.arange(4) < lines)
    np.testing.assert_allclose(track.values[: min(lines, 4)], labels[:4], atol=1e-6)
    ((crops, numbers),) = sample.read_crops(len(clock))
    assert numbers.tolist() == [1, 3]
    assert crops[:, 0, 0, 0].tolist() == [2, 4]


def test_an_unreadable_crop_counts_as_missing(tmp_path, capfd):
    sample = Sample("a", tmp_path, crops=put_crops(tmp_path / "a", [1, 2, 3]))
    (tmp_path / "a" / "00002.jpg").write_bytes(b"not a picture")
    assert [rows.tolist() for _, rows in sample.read_crops(3)] == [[0, 2]]
    assert len(sample.frame_times_s()) == 3
    (tmp_path / "a" / "00003.jpg").write_bytes(b"")
    assert [rows.tolist() for _, rows in sample.read_crops(3)] == [[0]]


def test_crops_of_other_sizes_come_in_batches_of_their_own_in_order(tmp_path):
    sample = Sample("a", tmp_path, crops=put_crops(tmp_path / "a", [1, 2, 4]))
    put_crops(tmp_path / "a", [3], size=12)
    assert [rows.tolist() for _, rows in sample.read_crops(4)] == [[0, 1], [2], [3]]


def test_crops_are_rgb(tmp_path):
    crops = put_crops(tmp_path / "a", [])
    cv2.imwrite(str(crops / "00001.png"), np.full((8, 8, 3), (250, 10, 20), np.uint8))  # blue, green, red
    [(read, _)] = Sample("a", tmp_path, crops=crops).read_crops(1)
    assert read[0, 0, 0].tolist() == [20, 10, 250]


# ---- what pictures are made from -----------------------------------------------------------------------------


def test_media_change_with_the_content_and_not_with_a_touch_or_the_place(tmp_path):
    crops, video = put_crops(tmp_path / "a", [1, 2]), write_video(tmp_path / "a.mp4", pictures(2))
    sample = Sample("a", tmp_path, video, crops)
    first = sample.media(Fingerprints())
    old(video, *crops.iterdir())
    memory = Fingerprints()
    assert sample.media(memory) == sample.media(Fingerprints(memory.memo)) == first
    (tmp_path / "moved").mkdir()
    moved = Sample(
        "b", tmp_path, video.rename(tmp_path / "moved" / "b.mp4"), crops.rename(tmp_path / "moved" / "b")
    )
    assert moved.media(memory) == first
    cv2.imwrite(str(moved.crops / "00002.jpg"), np.full((8, 8, 3), 99, np.uint8))
    second = moved.media(memory)
    assert second != first
    (moved.crops / "00002.jpg").rename(moved.crops / "00003.jpg")
    third = moved.media(memory)
    moved.video.write_bytes(moved.video.read_bytes() + b"\0")
    assert len({first, second, third, moved.media(memory)}) == 4


def test_media_of_crops_say_whether_a_video_times_them(tmp_path):
    crops, video = put_crops(tmp_path / "a", [1, 2]), write_video(tmp_path / "a.mp4", pictures(2))
    samples = [
        Sample("a", tmp_path, video),
        Sample("a", tmp_path, video, crops),
        Sample("a", tmp_path, None, crops),
    ]
    assert len({sample.media(Fingerprints()) for sample in samples}) == 3
    assert samples[0].media(Fingerprints()) == Fingerprints().file(video)


def test_a_cut_video_says_so_while_it_times_the_crops(tmp_path):
    video = write_video(tmp_path / "a.mkv", pictures(60))
    video.write_bytes(video.read_bytes()[: video.stat().st_size * 3 // 4])
    times_s, damage = Sample("a", tmp_path, video, put_crops(tmp_path / "a", [1])).frame_clock()
    assert 0 < len(times_s) < 60
    assert "cut off after" in (damage or "")


def test_of_several_folders_every_file_comes_once_under_an_id_of_its_own(tmp_path):
    for name in ("X/a/clip.mp4", "X/b/clip.mp4", "Y/a/clip.mp4", "Y/clip.mp4", "Y/clip.mov"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    x, y = tmp_path / "X", tmp_path / "Y"
    found = find_all([x / "a" / "clip.mp4", x / "b" / "clip.mp4", y, x, y / "clip.mp4", y / "clip.mov"])
    assert len(found) == 5
    assert len({s.id for s in found}) == 5
    assert len({s.source.resolve() for s in found}) == 5
    alone = find_all([x])
    assert [s.id for s in alone] == [s.id for s in find(x)]


def test_two_roots_of_aff_wild2_stay_two(tmp_path):
    for root in ("R1", "R2"):
        folder = tmp_path / root / "annotations" / "Train_Set"
        folder.mkdir(parents=True)
        for name in ("12", "12_right"):
            (folder / f"{name}.txt").write_text("valence,arousal\n0,0\n")
        (tmp_path / root / "batch1").mkdir()
        (tmp_path / root / "batch1" / "12.mp4").write_bytes(root.encode())
    found = find_all([tmp_path / "R1", tmp_path / "R2"])
    assert [s.id for s in found] == ["R1/12", "R1/12_right", "R2/12", "R2/12_right"]
    assert [s.video_id for s in found][:2] == ["R1/12", "R1/12"]


def test_prose_is_no_list_of_videos(tmp_path):
    (tmp_path / "notes.txt").write_text("We met on Monday. " * 100 + "\nThen\u2028we talked.\n\0\n")
    with pytest.raises(VacliError, match=r"names no file or folder that is there; wanted a path a line"):
        find_all([tmp_path / "notes.txt"])
