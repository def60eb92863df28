"""A frame's label is its own, frames are drawn as was said, and their crops come from the disk, never all in memory."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import cv2
import numpy as np
import pytest
from vacli import VacliError
from vacli.extract import labelled as module
from vacli.extract.datasets import find
from vacli.extract.labelled import SAMPLINGS, Labelled, draw, fetch, find_labelled
from vacli.extract.plan import Plan
from vacli.store import Store, Track

from .media_files import write_video

HEADER = "valence,arousal\n"


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "features.zarr", create=True)


def crop_folder(root: Path, name: str, numbers: list[int], labels: list[tuple[float, float]]) -> Path:
    """A subject in the Aff-Wild2 layout, without its video; crop number k is of grey 2 k."""
    folder = root / "cropped_aligned" / name
    folder.mkdir(parents=True)
    for k in numbers:
        cv2.imwrite(str(folder / f"{k:05d}.png"), np.full((112, 112, 3), 2 * k % 256, np.uint8))
    text = root / "annotations" / "VA_Estimation_Challenge" / "Train_Set" / f"{name}.txt"
    text.parent.mkdir(parents=True, exist_ok=True)
    text.write_text(HEADER + "".join(f"{v},{a}\n" for v, a in labels))
    return folder


# ---- a frame and its label -------------------------------------------------------------------------------------


def test_frame_k_of_a_video_has_label_k_and_shows_k(store, tmp_path, monkeypatch):
    """Off by one anywhere, the picture and the label of a row would not tell the same number."""
    folder = tmp_path / "data" / "train"
    folder.mkdir(parents=True)
    count = 40
    write_video(folder / "a.mkv", [np.full((160, 160, 3), 10 + 5 * k, np.uint8) for k in range(count)])
    (folder / "a.txt").write_text(HEADER + "".join(f"{k / 100},{-k / 100}\n" for k in range(count)))
    [sample] = find(tmp_path / "data")
    seen = np.full((count, 15), np.nan, np.float32)
    seen[5:] = [
        30,
        30,
        130,
        130,
        60,
        70,
        100,
        70,
        80,
        90,
        65,
        110,
        95,
        110,
        1,
    ]  # a face from the sixth frame on
    put_faces(store, sample, seen)
    frames = find_labelled([sample], store, "train")
    assert frames.row.tolist() == list(range(5, count))
    fetched = fetch(frames, np.arange(len(frames)), tmp_path / "crops")
    shown = (fetched.pixels()[:, 40:70, 40:70].mean((1, 2, 3)) - 10) / 5
    assert np.abs(shown - frames.row).max() < 0.45
    assert np.array_equal(frames.labels[:, 0], (frames.row / 100).astype(np.float32))
    assert np.array_equal(frames.labels[:, 1], (-frames.row / 100).astype(np.float32))
    assert frames.times_s == pytest.approx(frames.row / 25, abs=0.03)


def put_faces(store: Store, sample, values: np.ndarray) -> None:
    """What the store has to say of a video's faces, instead of what a detector finds in it."""
    wanted = module_plan().tracks(sample, sample.media(store.fingerprints), store.fingerprints)["faces"]
    store.put(wanted.recipe, wanted.media, Track(values, sample.frame_times_s()), {})


def module_plan() -> Plan:
    from vacli.extract.people import People

    return Plan({}, People())


def test_crop_number_k_has_line_k_of_the_annotation(store, tmp_path):
    crop_folder(tmp_path / "data", "1", [1, 2, 3, 7, 8, 9, 30], [(k / 100, 0.5) for k in range(1, 13)])
    frames = find_labelled(find(tmp_path / "data"), store, "train")
    assert frames.row.tolist() == [0, 1, 2, 6, 7, 8]  # the annotation ends before crop 30
    fetched = fetch(frames, np.arange(len(frames)), tmp_path / "crops")
    shown = fetched.pixels().mean((1, 2, 3)) / 2
    assert shown.tolist() == pytest.approx((frames.row + 1).tolist())
    assert frames.labels[:, 0].tolist() == pytest.approx(((frames.row + 1) / 100).tolist())


def test_minus_five_is_no_label(store, tmp_path):
    labels = [(0.1, 0.2), (-5, 0.2), (0.3, -5), (-5, -5), (0.5, -0.2)]
    crop_folder(tmp_path / "data", "1", [1, 2, 3, 4, 5], labels)
    frames = find_labelled(find(tmp_path / "data"), store, "train")
    assert frames.row.tolist() == [0, 4]
    assert frames.labels.min() >= -1


def test_without_a_labelled_face_it_says_what_there_was(store, tmp_path):
    crop_folder(tmp_path / "data", "1", [1, 2], [(-5, -5), (-5, -5)])
    with pytest.raises(VacliError, match="no labelled face to tune on: 1 of the 1 videos are labelled"):
        find_labelled(find(tmp_path / "data"), store, "train")
    with pytest.raises(VacliError, match="no labelled face to judge by: 0 of the 1 videos"):
        find_labelled(find(tmp_path / "data"), store, "validation")


# ---- drawing ---------------------------------------------------------------------------------------------------


def some(times_s: list[np.ndarray], labels: np.ndarray | None = None) -> Labelled:
    """Labelled frames of videos with these times, and nothing on a disk."""
    video = np.repeat(np.arange(len(times_s)), [len(t) for t in times_s])
    if labels is None:
        labels = np.random.default_rng(0).uniform(-1, 1, (len(video), 2)).astype(np.float32)
    row = np.concatenate([np.arange(len(t)) for t in times_s])
    return Labelled(None, [], video, row, np.concatenate(times_s), labels, [])  # type: ignore[arg-type]


THREE = some(
    [np.arange(1000) / 30, np.arange(7) / 30, np.cumsum(np.random.default_rng(1).exponential(0.04, 400))]
)


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_draw_is_a_function_of_seed_and_epoch_has_nothing_twice_and_always_as_much(sampling):
    draws = [draw(THREE, sampling, 50, seed=3, epoch=epoch) for epoch in range(4)]
    assert len({len(d) for d in draws}) == 1
    for epoch, drawn in enumerate(draws):
        assert len(np.unique(drawn)) == len(drawn) <= 3 * 50
        assert np.array_equal(drawn, draw(THREE, sampling, 50, seed=3, epoch=epoch))
    anew = not np.array_equal(draws[0], draws[1])
    assert anew == (sampling != "even")
    assert np.array_equal(draws[0], draw(THREE, sampling, 50, seed=4, epoch=0)) == (sampling == "even")


def test_even_draws_are_spread_over_each_video_and_hold_its_ends():
    drawn = draw(THREE, "even", 50, 0, 0)
    counts = np.bincount(THREE.video[drawn])
    assert counts.tolist() == [50, 7, 50]
    first = drawn[:50]
    assert (first[0], first[-1]) == (0, 999)
    assert np.ptp(np.diff(first)) <= 1


def test_time_draws_one_frame_of_each_stretch_of_time_and_in_the_end_nearly_all():
    met = np.concatenate([draw(THREE, "time", 50, 0, epoch) for epoch in range(100)])
    for video in (0, 2):
        here = np.flatnonzero(THREE.video == video)
        times_s = THREE.times_s[here]
        for epoch in (0, 1):
            drawn = draw(THREE, "time", 50, 0, epoch)
            drawn_s = THREE.times_s[drawn[THREE.video[drawn] == video]]
            stretch_s = (times_s[-1] - times_s[0]) / 50
            slots = np.minimum(((drawn_s - times_s[0]) / stretch_s + 1e-9).astype(int), 49)
            assert len(np.unique(slots)) == len(slots) > 40
        assert np.isin(here, met).mean() > 0.95
    assert np.isin(np.flatnonzero(THREE.video == 1), met).all()


def test_balanced_draws_all_regions_alike_as_far_as_there_are_frames():
    random = np.random.default_rng(0)
    common = np.array([0.05, 0.05]) + random.uniform(-0.04, 0.04, (5000, 2))
    rare = np.array([-0.9, 0.7]) + random.uniform(-0.04, 0.04, (300, 2))
    single = np.array([[0.9, -0.9]] * 5)
    labels = np.concatenate([common, rare, single]).astype(np.float32)[random.permutation(5305)]
    frames = some([np.arange(5305) / 30], labels)
    drawn = draw(frames, "balanced", 250, 0, 0)
    there = labels[drawn]
    counts = [int(mask.sum()) for mask in (there[:, 0] > 0.5, there[:, 0] < -0.5, np.abs(there[:, 0]) < 0.5)]
    assert sum(counts) == 250
    assert counts[0] in range(6)  # every frame that the stretches of time gave
    assert counts[1] >= 40  # 6 % of the frames; all that the stretches of time gave
    plain = labels[draw(frames, "time", 250, 0, 0)]
    assert (plain[:, 0] < -0.5).sum() < 30


def test_balanced_gives_all_where_there_are_fewer_frames_than_asked_for():
    frames = some([np.arange(20) / 30])
    assert sorted(draw(frames, "balanced", 300, 0, 0)) == list(range(20))


def test_another_sampling_is_refused_with_the_names_of_those_there_are():
    with pytest.raises(VacliError, match="--sampling odd: wanted one of even, time, balanced"):
        draw(THREE, "odd", 5, 0, 0)


# ---- crops in a file -------------------------------------------------------------------------------------------


@pytest.fixture
def two(tmp_path, store) -> Labelled:
    """Two subjects of 30 and 20 frames."""
    for name, count in (("1", 30), ("2", 20)):
        crop_folder(tmp_path / "data", name, list(range(1, count + 1)), [(0.1, 0.1)] * count)
    return find_labelled(find(tmp_path / "data"), store, "train")


def test_chosen_crops_are_those_of_the_frames_in_their_order(two, tmp_path):
    chosen = np.array([0, 1, 5, 29, 30, 31, 49])
    fetched = fetch(two, chosen, tmp_path / "crops")
    assert fetched.pixels().shape == (7, 112, 112, 3)
    assert (fetched.pixels() == 2 * (two.row[chosen] + 1)[:, None, None, None]).all()
    assert fetched.seen.all()
    assert fetched.problems == []
    fetched.remove()
    assert list(tmp_path.glob("crops*")) == []


def test_a_whole_file_of_the_same_frames_is_not_written_again(two, tmp_path, monkeypatch):
    chosen = np.arange(10)
    fetch(two, chosen, tmp_path / "crops")
    calls = []
    write = module._write
    monkeypatch.setattr(module, "_write", lambda *a: calls.append(1) or write(*a))
    assert (fetch(two, chosen, tmp_path / "crops").pixels()[3] == 8).all()
    assert calls == []
    assert (fetch(two, np.arange(20, 30), tmp_path / "crops").pixels()[0] == 42).all()  # others
    with open(tmp_path / "crops", "r+b") as f:
        f.truncate(1000)
    assert (fetch(two, np.arange(20, 30), tmp_path / "crops").pixels()[9] == 60).all()  # cut
    (tmp_path / "crops.json").write_text("{")
    fetch(two, np.arange(20, 30), tmp_path / "crops")  # a torn mark
    assert len(calls) == 3


def test_stopped_while_it_writes_the_file_is_not_taken_for_whole(two, tmp_path, monkeypatch):
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    chosen = np.arange(50)
    fetch(two, chosen[:40], tmp_path / "crops")
    with monkeypatch.context() as patch:
        patch.setattr(module, "_put", stopped)
        with pytest.raises(KeyboardInterrupt):
            fetch(two, chosen, tmp_path / "crops")
    assert not (tmp_path / "crops.json").exists()
    assert (fetch(two, chosen, tmp_path / "crops").pixels()[49] == 40).all()


def test_a_picture_that_cannot_be_read_is_not_seen(two, tmp_path):
    (tmp_path / "data" / "cropped_aligned" / "1" / "00003.png").write_bytes(b"no picture")
    (tmp_path / "data" / "cropped_aligned" / "2" / "00020.png").write_bytes(b"no picture")
    fetched = fetch(two, np.arange(50), tmp_path / "crops")
    assert np.flatnonzero(~fetched.seen).tolist() == [2, 49]
    assert not fetched.pixels()[[2, 49]].any()
    assert (fetched.pixels()[3] == 8).all()
    assert np.array_equal(fetch(two, np.arange(50), tmp_path / "crops").seen, fetched.seen)  # from the file


def test_a_video_that_cannot_be_read_is_named_and_the_others_are_there(two, tmp_path, monkeypatch):
    crops = module._crops

    def breaking(frames, video, rows):
        batches = crops(frames, video, rows)
        if video == 0:
            yield next(batches)
            raise VacliError("1.mp4: it broke\n off")
        yield from batches

    monkeypatch.setattr(module, "_crops", breaking)
    fetched = fetch(two, np.arange(50), tmp_path / "crops")
    assert fetched.problems == ["1.mp4: it broke off"]
    assert fetched.seen[30:].all()
    assert (fetched.pixels()[49] == 40).all()


def test_crops_of_several_sizes_are_refused(two, tmp_path):
    odd = np.zeros((50, 60, 3), np.uint8)
    cv2.imwrite(str(tmp_path / "data" / "cropped_aligned" / "2" / "00007.png"), odd)
    with pytest.raises(
        VacliError, match=r"2: crops of several sizes \(60x50 after 112x112\); wanted one size"
    ):
        fetch(two, np.arange(50), tmp_path / "crops")


def test_a_full_disk_is_told_with_what_it_takes(two, tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_put", full)
    with pytest.raises(
        VacliError, match=r"cannot write .*crops: No space left on device; 50 crops need about 0\.0 GB"
    ):
        fetch(two, np.arange(50), tmp_path / "crops")


def test_crops_pass_through_memory_a_batch_at_a_time(tmp_path, store):
    """Six times the frames, the same memory: 64 crops of 38 kB are 2.4 MB, all of them would be 23 MB."""
    crop_folder(tmp_path / "data", "1", list(range(1, 613)), [(0.1, 0.1)] * 612)
    frames = find_labelled(find(tmp_path / "data"), store, "train")
    peaks = []
    for count in (100, 612):
        tracemalloc.start()
        fetched = fetch(frames, np.arange(count), tmp_path / f"crops{count}")
        assert fetched.pixels()[count - 1].max() == 2 * count % 256
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 15e6
    assert peaks[1] < 1.3 * peaks[0]
