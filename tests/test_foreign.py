"""Features and labels of others: whatever the file, the same rows at the right times, or one line that says why not."""

from __future__ import annotations

import gzip
import io
import os
import sys
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from vacli import VacliError
from vacli.store import Store, Track, folder_name, foreign, tables
from vacli.store.foreign import import_features
from vacli.store.tables import open_table
from vacli.temporal.evaluate import evaluate, load_clips
from vacli.temporal.train import train

from .toy_store import tiny, walk

VALUES = np.array([[0.5, -1.0], [1.25, 2.0], [np.nan, np.nan], [3.0, 4.5]], np.float32)
TIMES_S = np.array([0.02, 0.06, 0.1, 0.14])


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "features.zarr", create=True)


@pytest.fixture
def files(tmp_path) -> Path:
    (tmp_path / "files").mkdir()
    return tmp_path / "files"


def write(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path


def track_of(store: Store, video_id: str, name: str) -> Track:
    address = store.videos()[video_id]["tracks"][name]
    return store.get(store.recipe_of(address["folder"]), address["media"])


def add_faces(
    store: Store, video_id: str, rows: int, rate_hz: float = 25.0, media: str = "ab" * 32
) -> np.ndarray:
    """A video that was extracted; returns the times of its frames."""
    times_s = np.arange(rows) / rate_hz
    recipe = {"track": "faces", "version": 1}
    store.put(recipe, media, Track(np.ones((rows, 15), np.float32), times_s))
    facts = {"root": "/videos", "media": media, "split": None}
    store.link(video_id, facts, {"faces": {"folder": folder_name(recipe), "media": media}})
    return times_s


def refused(source: Path, store: Store, track: str = "my.face", **how) -> str:
    """The one line that says why the one video of `source` was refused; nothing of it is stored."""
    before = store.entries()
    done = import_features(source, store, track, **how)
    assert not done.videos
    assert store.entries() == before
    (why,) = done.problems.values()
    assert "\n" not in why
    return why


# ---- every kind of file --------------------------------------------------------------------------------------


def rows_of(separator: str) -> list[str]:
    cells = [
        [f"{t}", *("" if np.isnan(v) else f"{v}" for v in row)]
        for t, row in zip(TIMES_S, VALUES, strict=True)
    ]
    return [separator.join(line) for line in [["time_s", "a", "b"], *cells]]


def write_csv(folder: Path) -> None:
    write(folder / "clip.csv", *rows_of(","))


def write_semicolons(folder: Path) -> None:
    write(folder / "clip.csv", *rows_of(";"))


def write_tsv_gz(folder: Path) -> None:
    (folder / "clip.tsv.gz").write_bytes(
        gzip.compress("\ufeff".encode() + "\r\n".join(rows_of("\t")).encode())
    )


def write_savetxt(folder: Path) -> None:
    np.savetxt(folder / "clip.txt", np.column_stack([TIMES_S, VALUES]), header="time_s a b")


def write_npz(folder: Path) -> None:
    np.savez_compressed(folder / "clip.npz", features=VALUES.astype(np.float64), time_s=TIMES_S)


def write_hdf5(folder: Path) -> None:
    with h5py.File(folder / "clip.h5", "w") as f:
        f.create_dataset("data/face", data=VALUES, chunks=(2, 2), compression="gzip")
        f["data/time_s"] = TIMES_S
        f["data/words"] = ["a", "b"]


def write_parquet(folder: Path) -> None:
    columns = {"time_s": TIMES_S, "a": pa.array([0.5, 1.25, None, 3.0]), "b": VALUES[:, 1]}
    parquet.write_table(pa.table(columns), folder / "clip.parquet")


WRITERS = [write_csv, write_semicolons, write_tsv_gz, write_savetxt, write_npz, write_hdf5, write_parquet]


@pytest.mark.parametrize("writer", WRITERS)
def test_every_kind_of_file_gives_the_same_track(writer, files, store):
    writer(files)
    done = import_features(files, store, "my.face")
    assert (done.videos, done.problems, done.notes) == ({"clip": "stored"}, {}, [])
    track = track_of(store, "clip", "my.face")
    np.testing.assert_array_equal(track.values, VALUES)
    np.testing.assert_array_equal(track.times_s, TIMES_S)
    assert track.values.dtype == np.float32


@pytest.mark.parametrize(
    "dtype", [np.float16, np.float32, np.float64, np.int64, np.uint8, bool, ">f2", ">f8"]
)
def test_float16_stays_and_all_else_becomes_float32(dtype, files, store):
    values = np.array([[0, 1], [1, 0], [1, 1]]).astype(dtype)
    np.save(files / "clip.npy", np.asfortranarray(values))
    import_features(files / "clip.npy", store, "my.face", times="25Hz")
    track = track_of(store, "clip", "my.face")
    assert track.values.dtype == (np.float16 if np.dtype(dtype).itemsize == 2 else np.float32)
    np.testing.assert_array_equal(track.values, values.astype(float))


def test_an_array_of_one_dimension_is_one_column(files, store):
    np.save(files / "clip.npy", np.arange(3.0))
    import_features(files, store, "my.face", times="1 hz")
    assert track_of(store, "clip", "my.face").values.shape == (3, 1)


def test_columns_are_chosen_and_ordered(files, store):
    write(files / "clip.csv", "frame,a,time,word,b", "1,10,0.1,hello,20", "2,11,0.2,world,21")
    import_features(files, store, "my.face", columns=["b", "a"])
    np.testing.assert_array_equal(track_of(store, "clip", "my.face").values, [[20, 10], [21, 11]])


def test_a_column_of_text_is_refused_by_name_with_its_line(files, store):
    write(files / "clip.csv", "time,a,word", "0.1,1,2", "0.2,1,hello")
    why = refused(files, store)
    assert "line 3" in why
    assert "'word' holds 'hello'" in why
    assert "--columns" in why


def test_a_column_of_text_in_parquet_is_refused_by_name(files, store):
    parquet.write_table(pa.table({"t": [0.1, 0.2], "word": ["x", "y"]}), files / "clip.parquet")
    assert "'word' holds string, no numbers" in refused(files, store)


def test_several_arrays_want_a_choice_and_take_it(files, store):
    np.savez(files / "clip.npz", face=VALUES, body=2 * VALUES, t=TIMES_S, names=np.array(["x"]))
    assert "face, body; wanted one array" in refused(files, store)
    import_features(files, store, "my.face", columns=["body"])
    np.testing.assert_array_equal(track_of(store, "clip", "my.face").values, 2 * VALUES)
    assert "nothing is called 'hand'" in refused(files, store, columns=["hand"])


def test_a_file_without_a_header_has_numbered_columns(files, store):
    write(files / "clip.csv", "0.5,3,4", "1.5,5,6")
    import_features(files, store, "my.face", times="1", columns=["3", "2"])
    track = track_of(store, "clip", "my.face")
    np.testing.assert_array_equal(track.values, [[4, 3], [6, 5]])
    np.testing.assert_array_equal(track.times_s, [0.5, 1.5])


def test_the_numbers_pandas_puts_above_columns_are_no_row(files, store):
    write(files / "clip.csv", "0,1,2", "7,8,9", "4,5,6")
    import_features(files, store, "my.face", times="1Hz")
    np.testing.assert_array_equal(track_of(store, "clip", "my.face").values, [[7, 8, 9], [4, 5, 6]])


def test_a_column_without_a_name_is_an_index_and_no_feature(files, store):
    write(files / "clip.csv", ",time,a", "0,0.1,5", "1,0.2,6")
    import_features(files, store, "my.face")
    np.testing.assert_array_equal(track_of(store, "clip", "my.face").values, [[5], [6]])


def test_a_name_borne_twice_is_refused(files, store):
    write(files / "clip.csv", "time,a,a", "0.1,5,6")
    assert "several columns are called 'a'" in refused(files, store)


def test_a_row_that_misses_a_value_is_missing_and_counted(files, store):
    write(files / "clip.csv", "time,a,b", "0.1,1,2", "0.2,n/a,2", "0.3,NaN,", "0.4,3,4")
    done = import_features(files, store, "my.face")
    assert done.notes == ["clip: 1 of 4 rows miss some values: they count as missing"]
    np.testing.assert_array_equal(track_of(store, "clip", "my.face").valid, [True, False, False, True])


def test_a_blank_line_is_a_missing_row_unless_only_blank_ones_follow(files, store):
    write(files / "clip.csv", "a", "1", "", "3", "", "")
    import_features(files, store, "my.face", times="1Hz")
    np.testing.assert_array_equal(track_of(store, "clip", "my.face").values[:, 0], [1, np.nan, 3])


@pytest.mark.parametrize("cell", ["inf", "-Infinity", "1e39", "-4e38"])
def test_infinities_and_what_float32_cannot_hold_are_refused(cell, files, store):
    write(files / "clip.csv", "time,a", "0.1,1", f"0.2,{cell}")
    assert "line 3: an infinity, or more than float32 holds" in refused(files, store)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["time,a", "0.1,1", "0.2"], "line 3: 1 cells, wanted 2"),
        (["time,a", "0.1,1,5"], "line 2: 3 cells, wanted 2"),
        (["time,a"], "holds (0, 1) values"),
        (["time"], "holds none"),
        ([""], "holds none"),
    ],
)
def test_a_ragged_or_empty_text_is_refused(lines, said, files, store):
    write(files / "clip.csv", *lines)
    assert said in refused(files, store)


def test_text_that_is_not_utf8_is_refused(files, store):
    (files / "clip.csv").write_bytes("time,a\n0.1,1\n".encode("utf-16"))
    assert "not UTF-8" in refused(files, store)


def test_arrays_of_unequal_length_or_of_three_dimensions_are_refused(files, store):
    np.savez(files / "clip.npz", a=np.zeros(3), b=np.zeros(4), t=np.arange(3.0))
    assert "[3, 4] rows" in refused(files, store, columns=["a", "b"])
    np.savez(files / "clip.npz", a=np.zeros((2, 2, 2)), t=np.arange(2.0))
    assert "shape (2, 2, 2)" in refused(files, store)


# ---- times ---------------------------------------------------------------------------------------------------


def test_a_row_of_a_rate_stands_in_the_middle_of_what_it_saw(files, store):
    np.save(files / "clip.npy", np.zeros((4, 1)))
    import_features(files, store, "my.face", times="25Hz")
    np.testing.assert_allclose(track_of(store, "clip", "my.face").times_s, [0.02, 0.06, 0.1, 0.14])


def test_an_onset_with_a_duration_stands_in_the_middle(files, store):
    write(files / "clip.tsv", "onset\tduration\trms", "10.0\t0.5\t1", "11.0\t2.0\t2")
    import_features(files, store, "my.sound")
    track = track_of(store, "clip", "my.sound")
    np.testing.assert_array_equal(track.times_s, [10.25, 12.0])
    np.testing.assert_array_equal(track.values, [[1], [2]])


def test_times_are_taken_from_the_column_that_is_named(files, store):
    write(files / "clip.csv", "time,clock,a", "5,0.5,1", "4,1.5,2")
    assert "increase" in refused(files, store)
    import_features(files, store, "my.face", times="clock")
    track = track_of(store, "clip", "my.face")
    np.testing.assert_array_equal(track.times_s, [0.5, 1.5])
    assert track.values.shape == (2, 1)  # no clock is a feature


def write_times(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, TIMES_S)
    else:
        write(path, *(["when"] if path.suffix == ".csv" else []), *map(str, TIMES_S))


@pytest.mark.parametrize("name", ["times/sub/clip.npy", "times/sub/clip.csv", "times/clip.txt"])
def test_times_may_lie_in_a_folder_of_their_own(name, files, store):
    (files / "sub").mkdir()
    np.save(files / "sub" / "clip.npy", VALUES)
    write_times(files / name)  # below the features, and still no feature
    done = import_features(files, store, "my.face", times=str(files / "times"))
    assert done.videos == {"sub/clip": "stored"}
    np.testing.assert_array_equal(track_of(store, "sub/clip", "my.face").times_s, TIMES_S)


def test_times_may_be_a_file_and_must_be_as_many_as_the_rows(files, store, tmp_path):
    np.save(files / "clip.npy", VALUES)
    write_times(tmp_path / "times.npy")
    import_features(files, store, "my.face", times=str(tmp_path / "times.npy"))
    np.testing.assert_array_equal(track_of(store, "clip", "my.face").times_s, TIMES_S)
    np.save(files / "clip.npy", VALUES[:3])
    assert "3 rows and 4 times" in refused(files, store, times=str(tmp_path / "times.npy"))
    assert "no times of clip" in refused(files, store, times=str(tmp_path))


def test_frames_are_those_of_the_stored_video(files, store):
    times_s = add_faces(store, "clip", 4)
    np.save(files / "clip.npy", VALUES)
    import_features(files, store, "my.face", times="frames")
    np.testing.assert_array_equal(track_of(store, "clip", "my.face").times_s, times_s)
    np.save(files / "clip.npy", VALUES[:3])
    assert "3 rows and 4 times" in refused(files, store, times="frames")
    np.save(files / "clip.npy", VALUES)
    (files / "clip.npy").rename(files / "other.npy")
    assert "does not know the frames of other" in refused(files, store, times="frames")


def test_without_times_the_message_says_every_way_to_give_them(files, store):
    np.save(files / "clip.npy", VALUES)
    why = refused(files, store)
    for way in ("time_s", "--times NAME", "--times 25Hz", "--times frames", "--times FOLDER"):
        assert way in why


@pytest.mark.parametrize("time", ["0.1", "0.05", "", "inf", "nan"])
def test_times_that_do_not_increase_are_refused_with_their_line(time, files, store):
    write(files / "clip.csv", "time,a", "0.0,1", "0.1,1", f"{time},1", "0.4,1")
    assert "line 4" in refused(files, store)


def test_times_beyond_the_video_are_refused_and_such_that_reach_over_little_are_told(files, store):
    add_faces(store, "clip", 250)  # 9.96 s
    for last_s, fits in ((11.1, True), (11.2, False), (9960.0, False)):
        np.savez(files / "clip.npz", x=np.zeros((2, 1)), t=np.array([0.0, last_s]))
        done = import_features(files, store, "my.face")
        assert done.videos == ({"clip": "stored"} if fits else {})
        assert ("ends at 9.960 s" in "".join(done.problems.values())) != fits
        assert not done.notes
    np.savez(files / "clip.npz", x=np.zeros((2, 1)), t=np.array([1.0, 9.0]))
    assert "less than 90% of the video" in import_features(files, store, "my.face").notes[0]


def test_an_import_is_measured_by_the_features_of_an_earlier_one_but_not_by_its_labels(files, store):
    write(files / "clip.csv", "time,valence,arousal", "0.5,0,0", "1.5,0,0")
    import_features(files, store, "label.va")
    np.save(files / "clip2.npy", np.zeros((10, 1)))
    (files / "clip.csv").unlink()
    (files / "clip2.npy").rename(files / "clip.npy")
    assert import_features(files, store, "my.face", times="1Hz").videos == {"clip": "stored"}
    np.save(files / "clip.npy", np.zeros((100, 1)))
    assert "ends at 9.500 s (so say my.face)" in refused(files, store, "my.sound", times="1Hz")


# ---- which video ---------------------------------------------------------------------------------------------


def test_ids_are_paths_below_the_folder_and_folders_split(files, store):
    for name in ("train/a.npy", "Validation_Set/b.npy", "c.npy", ".hidden/d.npy", ".e.npy", "notes.md"):
        path = files / name
        path.parent.mkdir(exist_ok=True)
        np.save(path.with_suffix(".npy"), VALUES)
        path.with_suffix(".npy").rename(path)
    import_features(files, store, "my.face", times="1Hz")
    splits = {video_id: facts["split"] for video_id, facts in store.videos().items()}
    assert splits == {"train/a": "train", "Validation_Set/b": "validation", "c": None}


def test_a_stored_video_is_found_by_its_id_or_by_the_end_of_it(files, store):
    add_faces(store, "train/clip", 4, media="aa" * 32)
    add_faces(store, "other", 4, media="bb" * 32)
    (files / "sub").mkdir()
    for name in ("clip.npy", "sub/other.npy", "sub/clip.npy", "new.npy"):
        np.save(files / name, VALUES)
    done = import_features(files, store, "my.face", times="25Hz")
    assert set(done.videos) == {"train/clip", "other", "sub/clip", "new"}
    assert "2 joined by the end of the id: sub/other for other, clip for train/clip" in done.notes
    assert any("2 of 4 name no video of the store and are new: new, sub/clip" in note for note in done.notes)
    facts = store.videos()["train/clip"]
    assert (facts["root"], facts["media"], set(facts["tracks"])) == (
        "/videos",
        "aa" * 32,
        {"faces", "my.face"},
    )


def test_what_was_imported_before_an_interruption_changes_no_id(files, store, monkeypatch):
    for name in ("a/x.npy", "b/x.npy", "x.npy"):
        (files / name).parent.mkdir(exist_ok=True)
        np.save(files / name, np.full((4, 1), len(name)))
    link, linked = store.link, []

    def stop_at_second(*args):
        if len(linked) == 1:
            raise KeyboardInterrupt
        linked.append(args)
        link(*args)

    monkeypatch.setattr(store, "link", stop_at_second)
    with pytest.raises(KeyboardInterrupt):
        import_features(files, store, "my.face", times="1Hz")
    monkeypatch.undo()
    assert set(store.videos()) == {"a/x"}
    done = import_features(files, store, "my.face", times="1Hz")
    assert sorted(done.videos.items()) == [("a/x", "kept"), ("b/x", "kept"), ("x", "stored")]
    assert set(store.videos()) == {"a/x", "b/x", "x"}


def test_two_files_for_one_video_are_refused(files, store):
    np.save(files / "clip.npy", VALUES)
    write(files / "clip.csv", *rows_of(","))
    assert "2 files for one video" in refused(files, store, times="1Hz")


def test_an_id_that_is_no_safe_path_is_mapped_to_a_plain_one(files, store):
    np.save(files / "con.npy", VALUES)
    import_features(files, store, "my.face", times="1Hz")
    (video_id,) = store.videos()
    assert video_id.startswith("con-")


def test_a_broken_file_does_not_stop_the_others(files, store):
    np.save(files / "b.npy", VALUES)
    for name in ("a", "c"):
        (files / f"{name}.npy").write_bytes(b"\x93NUMPY torn")
    done = import_features(files, store, "my.face", times="1Hz")
    assert (set(done.videos), set(done.problems)) == ({"b"}, {"a", "c"})


# ---- the store's side ----------------------------------------------------------------------------------------


def test_the_same_bytes_and_options_again_are_kept(files, store):
    np.save(files / "clip.npy", VALUES)
    import_features(files, store, "my.face", times="1Hz")
    os.utime(files / "clip.npy", (1, 1))
    before = store.entries(), store.videos()
    assert import_features(files, store, "my.face", times="1Hz").videos == {"clip": "kept"}
    files.rename(files.with_name("moved"))
    assert import_features(files.with_name("moved"), store, "my.face", times="1Hz").videos == {"clip": "kept"}
    assert (store.entries(), store.videos()) == before


def test_a_changed_file_or_option_is_a_new_track_that_the_name_points_to(files, store):
    np.save(files / "clip.npy", VALUES)
    import_features(files, store, "my.face", times="1Hz")
    np.save(files / "clip.npy", 2 * VALUES)
    assert import_features(files, store, "my.face", times="1Hz").videos == {"clip": "stored"}
    np.testing.assert_array_equal(track_of(store, "clip", "my.face").values, 2 * VALUES)
    assert import_features(files, store, "my.face", times="2Hz").videos == {"clip": "stored"}
    np.testing.assert_array_equal(track_of(store, "clip", "my.face").times_s, [0.25, 0.75, 1.25, 1.75])
    assert len(store.entries()) == 3


def test_changed_times_are_a_new_track(files, store, tmp_path):
    np.save(files / "clip.npy", VALUES)
    for shift_s in (0, 1):
        np.save(tmp_path / "times.npy", TIMES_S + shift_s)
        done = import_features(files, store, "my.face", times=str(tmp_path / "times.npy"))
        assert done.videos == {"clip": "stored"}
        np.testing.assert_array_equal(track_of(store, "clip", "my.face").times_s, TIMES_S + shift_s)


def test_the_recipe_says_columns_and_times_and_no_path(files, store, tmp_path):
    write(files / "clip.csv", *rows_of(","))
    import_features(files, store, "my.face", columns=["b"])
    recipe = store.recipe_of(store.videos()["clip"]["tracks"]["my.face"]["folder"])
    rules = {"columns": ["b"], "times": "the file's own"}
    assert recipe == {"track": "my.face", "version": 1, "imported": rules}


def test_very_many_columns_fit_a_recipe(files, store):
    names = [f"dim_ü{i:05}" for i in range(4000)]
    write(files / "clip.csv", ",".join(["time", *names]), ",".join(["0.5", *["1"] * 4000]))
    assert import_features(files, store, "my.face").videos == {"clip": "stored"}
    assert track_of(store, "clip", "my.face").values.shape == (1, 4000)


def test_other_columns_never_mix_silently(files, store):
    write(files / "a.csv", "time,x,y", "0.5,1,2")
    write(files / "b.csv", "time,y,x", "0.5,1,2")
    done = import_features(files, store, "my.face")
    assert any("2 different sets of columns" in note for note in done.notes)
    assert len({f["tracks"]["my.face"]["folder"] for f in store.videos().values()}) == 2


def test_a_file_that_changes_while_it_is_read_is_not_stored(files, store, monkeypatch):
    np.save(files / "clip.npy", VALUES)
    monkeypatch.setattr(
        foreign._Job, "_check_reach", lambda job, times_s: np.save(files / "clip.npy", 2 * VALUES)
    )
    assert "changed while it was read" in refused(files, store, times="1Hz")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"track": "faces"}, "face tracker"),
        ({"track": "../up"}, "wanted a name"),
        ({"track": "My.Face"}, "wanted a name"),
        ({"track": "x" * 65}, "wanted a name"),
        ({"track": "my.face", "scale": "1..9"}, "is for labels"),
        ({"track": "my.face", "times": "0Hz"}, "above 0"),
        ({"track": "label.va", "scale": "9..1"}, "lower end first"),
        ({"track": "label.va", "scale": "1-9"}, "LOW..HIGH"),
        ({"track": "label.va", "scale": "nan..1"}, "LOW..HIGH"),
    ],
)
def test_options_without_sense_are_refused_before_anything_is_read(options, said, tmp_path, store):
    with pytest.raises(VacliError, match=said):
        import_features(tmp_path / "not there", store, **options)


def test_a_source_that_is_absent_or_empty_is_refused(files, store):
    for source in (files, files / "absent", files / ("x" * 300)):
        with pytest.raises(VacliError, match="wanted"):
            import_features(source, store, "my.face")


# ---- labels --------------------------------------------------------------------------------------------------


def labels_of(store: Store, video_id: str = "clip") -> np.ndarray:
    return track_of(store, video_id, "label.va").values


@pytest.mark.parametrize(
    ("scale", "values", "expected"),
    [
        (None, [-1, 0, 0.5, 1], [-1, 0, 0.5, 1]),
        ("1..9", [1, 5, 7, 9], [-1, 0, 0.5, 1]),
        ("0..1", [0, 0.5, 0.75, 1], [-1, 0, 0.5, 1]),
        ("-1000..1000", [-1000, 0, 500, 1000], [-1, 0, 0.5, 1]),
    ],
)
def test_a_scale_maps_to_minus_one_to_one(scale, values, expected, files, store):
    write(
        files / "clip.csv",
        "Arousal,note,time,VALENCE",
        *(f"{-v if scale is None else v},x,{i},{v}" for i, v in enumerate(values)),
    )
    import_features(files, store, "label.va", scale=scale)
    np.testing.assert_allclose(labels_of(store)[:, 0], expected, atol=1e-6)
    np.testing.assert_allclose(
        labels_of(store)[:, 1], np.negative(expected) if scale is None else expected, atol=1e-6
    )


@pytest.mark.parametrize(
    ("scale", "label"), [(None, "1.01"), (None, "-4"), ("1..9", "0"), ("1..9", "-5"), ("1..9", "inf")]
)
def test_a_label_outside_the_scale_is_refused_with_its_line(scale, label, files, store):
    write(files / "clip.csv", "time,valence,arousal", "0.5,1,1", f"1.5,1,{label}")
    why = refused(files, store, "label.va", scale=scale)
    assert "line 3: the label" in why
    assert "--scale" in why


def test_minus_five_is_unlabelled_as_in_affwild2(files, store):
    add_faces(store, "clip", 3)
    write(files / "clip.txt", "valence,arousal", "0.1,0.2", "-5,0.3", "-5,-5")
    import_features(files, store, "label.va", times="frames")
    np.testing.assert_allclose(labels_of(store), [[0.1, 0.2], [np.nan] * 2, [np.nan] * 2], atol=1e-6)


def test_an_array_of_labels_is_valence_then_arousal(files, store):
    np.save(files / "clip.npy", np.array([[0.1, 0.2], [0.3, 0.4]]))
    import_features(files, store, "label.va", times="1Hz")
    np.testing.assert_allclose(labels_of(store), [[0.1, 0.2], [0.3, 0.4]], atol=1e-6)
    np.save(files / "clip.npy", np.zeros((2, 3)))
    assert "rows of 3 values" in refused(files, store, "label.va", times="1Hz")


def test_two_columns_of_other_names_are_taken_if_chosen(files, store):
    write(files / "clip.csv", "time,pleasure,energy", "0.5,0.1,0.2")
    assert "no columns valence and arousal among pleasure, energy" in refused(files, store, "label.va")
    import_features(files, store, "label.va", columns=["energy", "pleasure"])
    np.testing.assert_allclose(labels_of(store), [[0.2, 0.1]], atol=1e-6)


def raters_wide(files: Path) -> None:
    write(
        files / "clip.csv",
        "time,valence_1,arousal_1,r2_valence,r2_arousal,Valence-anna,Arousal-anna",
        "0.5,0.1,0.2,0.3,0.4,0.5,0.6",
        "1.5,0.1,0.2,,,0.5,0.6",
        "2.5,,,,,,",
    )


def raters_long(files: Path) -> None:
    rows = ["0.5,a,0.1,0.2", "0.5,b,0.3,0.4", "0.5,c,0.5,0.6", "1.5,a,0.1,0.2", "1.5,c,0.5,0.6", "2.5,c,,"]
    write(files / "clip.csv", "time,Rater,valence,arousal", *rows)


def raters_in_parquet(files: Path) -> None:
    columns = {
        "time": [0.5, 1.5, 0.5, 0.5, 1.5, 2.5],
        "rater": ["a", "a", "b", "c", "c", "c"],
        "valence": [0.1, 0.1, 0.3, 0.5, 0.5, None],
        "arousal": [0.2, 0.2, 0.4, 0.6, 0.6, None],
    }
    parquet.write_table(pa.table(columns), files / "clip.parquet")


def raters_in_folders(files: Path) -> None:
    write(files / "rater1" / "clip.csv", "time,valence,arousal", "0.5,0.1,0.2", "1.5,0.1,0.2")
    write(files / "rater_2" / "clip.csv", "time,valence,arousal", "0.5,0.3,0.4")
    write(files / "Rater-anna" / "clip.csv", "time,valence,arousal", "0.5,0.5,0.6", "1.5,0.5,0.6", "2.5,,")


def raters_in_files(files: Path) -> None:
    raters_in_folders(files)
    (files / "clip").mkdir()
    for folder in sorted(files.glob("[rR]ater*")):
        (folder / "clip.csv").rename(files / "clip" / f"{folder.name}.csv")


@pytest.mark.parametrize(
    "writer", [raters_wide, raters_long, raters_in_parquet, raters_in_folders, raters_in_files]
)
def test_raters_are_averaged_over_those_who_judged(writer, files, store):
    writer(files)
    done = import_features(files, store, "label.va")
    assert (done.problems, done.videos) == ({}, {"clip": "stored"})
    assert done.notes[-1] == "the mean of 3 raters, in 1 video(s)"
    track = track_of(store, "clip", "label.va")
    np.testing.assert_array_equal(track.times_s, [0.5, 1.5, 2.5])
    np.testing.assert_allclose(track.values, [[0.3, 0.4], [0.3, 0.4], [np.nan, np.nan]], atol=1e-6)
    again = import_features(files, store, "label.va")
    assert again.videos == {"clip": "kept"}
    assert "the mean of 3 raters" in "".join(again.notes)


def test_ways_of_giving_raters_train_together(files, store):
    raters_wide(files)
    write(files / "one.csv", "time,valence,arousal", "0.5,0.1,0.2")
    import_features(files, store, "label.va")
    assert len({f["tracks"]["label.va"]["folder"] for f in store.videos().values()}) == 1


def test_raters_on_clocks_of_their_own_are_refused(files, store):
    write(files / "rater1" / "clip.csv", "time,valence,arousal", "0.5,0.1,0.2", "1.5,0.1,0.2")
    write(files / "rater2" / "clip.csv", "time,valence,arousal", "0.6,0.1,0.2", "1.6,0.1,0.2")
    assert "different times" in refused(files, store, "label.va")
    write(files / "rater2" / "clip.csv", "time,valence,arousal", *(f"{i / 2},0.1,0.2" for i in range(8)))
    assert "different times" in refused(files, store, "label.va")


def test_two_files_of_one_rater_are_refused(files, store):
    write(files / "rater1" / "clip.csv", "time,valence,arousal", "0.5,0.1,0.2")
    write(files / "rater1" / "clip.txt", "time,valence,arousal", "0.5,0.1,0.2")
    assert "2 files for one video" in refused(files, store, "label.va")


@pytest.mark.parametrize(
    "header",
    [
        "valence_mean,arousal_mean,valence_std,arousal_std",
        "valence_positive,valence_negative,arousal,x",
        "valence_a,arousal_a,valence_b,x",
    ],
)
def test_statistics_and_half_raters_are_no_raters(header, files, store):
    write(files / "clip.csv", f"time,{header}", "0.5,0.1,0.2,0.3,0.4")
    assert "not valence and arousal of a rater" in refused(files, store, "label.va")


def test_a_label_file_with_plain_columns_needs_no_choice(files, store):
    write(files / "clip.csv", "time,valence,arousal,valence_std,word", "0.5,0.1,0.2,0.9,hello")
    import_features(files, store, "label.va")
    np.testing.assert_allclose(labels_of(store), [[0.1, 0.2]], atol=1e-6)


# ---- strangers' files ----------------------------------------------------------------------------------------


def test_hdf5_never_reaches_out_of_the_file(files, store, tmp_path):
    secret = tmp_path / "secret.h5"
    with h5py.File(secret, "w") as f:
        f["x"] = np.zeros((4, 2))
    (tmp_path / "raw").write_bytes(bytes(64))
    path = files / "clip.h5"
    with h5py.File(path, "w") as f:
        f["x"] = h5py.ExternalLink(str(secret), "/x")
    assert "link to another file" in refused(files, store, times="1Hz")
    with h5py.File(path, "w") as f:
        f.create_dataset("x", (4, 2), "f8", external=[(str(tmp_path / "raw"), 0, 64)])
    assert "lies in another file" in refused(files, store, times="1Hz")
    layout = h5py.VirtualLayout((4, 2), "f8")
    layout[:] = h5py.VirtualSource(str(secret), "x", (4, 2))
    with h5py.File(path, "w") as f:
        f.create_virtual_dataset("x", layout)
    assert "lies in another file" in refused(files, store, times="1Hz")
    with h5py.File(path, "w") as f:
        f["x"] = h5py.SoftLink("/nowhere")
    assert "wanted one array" in refused(files, store, times="1Hz")
    assert "nothing is called 'x'" in refused(files, store, times="1Hz", columns=["x"])


def test_hdf5_of_objects_references_and_loops_is_no_crash(files, store):
    with h5py.File(files / "clip.h5", "w") as f:
        f.create_dataset("x", (2,), h5py.ref_dtype)
        f["words"] = ["a", "b"]
        f.create_dataset("pair", (2,), [("a", "f4"), ("b", "f4")])
        f["g/loop"] = f["/"]
    assert "wanted one array" in refused(files, store, times="1Hz")
    for name in ("x", "words", "pair"):
        assert "no numbers" in refused(files, store, times="1Hz", columns=[name])


def test_pickles_are_never_opened(files, store):
    np.save(files / "clip.npy", np.array([{"a": 1}], object), allow_pickle=True)
    assert "no numbers" in refused(files, store, times="1Hz")
    (files / "clip.npy").unlink()
    np.savez(files / "clip.npz", x=np.array([print], object), allow_pickle=True)
    assert "no numbers" in refused(files, store, times="1Hz", columns=["x"])


def npy_header(shape: tuple[int, ...]) -> bytes:
    f = io.BytesIO()
    np.lib.format.write_array_header_1_0(f, {"descr": "<f8", "fortran_order": False, "shape": shape})
    return f.getvalue()


@pytest.mark.parametrize("shape", [(10**13, 4), (3, 4), (-2, -4), (2**40, 2**40)])
def test_a_npy_whose_header_lies_is_refused_before_memory_is_taken(shape, files, store):
    (files / "clip.npy").write_bytes(npy_header(shape) + bytes(64))
    assert "cannot be read" in refused(files, store, times="1Hz")


def test_small_files_that_unpack_to_huge_ones_are_refused(files, store, monkeypatch):
    monkeypatch.setattr(tables, "_ROOM_BYTES", 2**18)
    archive = zipfile.ZipFile(files / "a.npz", "w", zipfile.ZIP_DEFLATED)
    with archive, archive.open("x.npy", "w") as f:
        f.write(npy_header((2**20,)) + bytes(2**23))
    (files / "b.csv.gz").write_bytes(gzip.compress(b"time,a\n" + b"1,2\n" * 2**19))
    (files / "c.csv.gz").write_bytes(gzip.compress(bytes(2**24)))
    with h5py.File(files / "d.h5", "w") as f:
        f.create_dataset("x", (10**13, 4), "f8", chunks=(1000, 4))
    with h5py.File(files / "e.h5", "w") as f:
        f.create_dataset("x", (10, 4), "f8", chunks=(10**7, 4), maxshape=(None, 4))
    parquet.write_table(pa.table({"a": np.zeros(2**21)}), files / "f.parquet")
    done = import_features(files, store, "my.face", times="1Hz")
    assert not done.videos
    assert all("unpack" in done.problems[name] for name in "abdef"), done.problems
    assert "a line of more than" in done.problems["c"]


def test_parquet_without_pyarrow_says_what_to_install(files, store, monkeypatch):
    write_parquet(files)
    for name in ("pyarrow", "pyarrow.parquet", "pyarrow.types"):
        monkeypatch.setitem(sys.modules, name, None)
    assert "pip install 'vacli[parquet]'" in refused(files, store)


def test_names_of_strangers_put_no_control_characters_on_the_terminal(files, store):
    write(files / "clip.csv", "valence\x1b[2J,b", "0.1,0.2")
    assert "\x1b" not in refused(files, store, "label.va", times="1Hz")


@pytest.mark.parametrize("writer", WRITERS)
def test_torn_and_flipped_files_are_a_line_never_a_crash(writer, files, store):
    writer(files)
    (path,) = files.iterdir()
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    told = 0
    for attempt in range(60):
        torn = bytearray(whole[: rng.integers(len(whole))] if attempt % 3 == 0 else whole)
        for _ in range(rng.integers(0 if attempt % 3 == 0 else 1, 4)):
            if torn:
                torn[rng.integers(len(torn))] = rng.integers(256)
        path.write_bytes(torn)
        try:
            table = open_table(path)
            table.load(table.value_names())
            table.times_s()
        except VacliError:
            told += 1
    assert told > 10


# ---- and then ------------------------------------------------------------------------------------------------


def test_a_head_trains_on_imported_features_and_labels_on_clocks_of_their_own(tmp_path, store):
    """Features at 25 Hz, labels at 1 Hz with gaps on a scale of 1 to 9, and a video that lacks a stream."""
    rng, seconds = np.random.default_rng(0), 60
    for number in range(5):
        split = "train" if number < 3 else "validation"
        labels = np.stack([walk(rng, seconds), walk(rng, seconds)], axis=1)
        clock_s = (np.arange(seconds * 25) + 0.5) / 25
        curves = [np.interp(clock_s, np.arange(seconds) + 0.5, labels[:, k]) for k in range(2)]
        noise = 0.1 * rng.standard_normal((2, len(clock_s), 3))
        name = f"{split}/v{number}"
        for k, kind in enumerate(("face", "sound")):
            if (number, kind) != (1, "sound"):
                path = tmp_path / kind / f"{name}.npy"
                path.parent.mkdir(parents=True, exist_ok=True)
                np.save(path, (np.outer(curves[k], [1, -2, 3]) + noise[k]).astype(np.float16))
        lines = [f"{i}.5,{5 + 4 * v:.3f},{5 + 4 * a:.3f}" for i, (v, a) in enumerate(labels)]
        lines[10:15] = [f"{i}.5,," for i in range(10, 15)]
        del lines[30:33]
        write(tmp_path / "labels" / f"{name}.csv", "time_s,valence,arousal", *lines)
    for kind in ("face", "sound"):
        assert not import_features(tmp_path / kind, store, f"my.{kind}", times="25Hz").problems
    assert not import_features(tmp_path / "labels", store, "label.va", scale="1..9").problems

    run = train(
        store,
        tiny("linear", ["my.face", "my.sound"], epochs=30, lr=0.02, batch=1),
        runs=tmp_path / "runs",
        seed=0,
        tell=lambda line: None,
    )
    assert set(run.about["train"]) == {"train/v0", "train/v1", "train/v2"}
    assert "my.sound" not in run.about["train"]["train/v1"]
    clip = load_clips(store, run.about, "validation")[0]
    assert clip.streams["my.face"].shape == (57, 3)
    figures = evaluate(run, store).figures
    assert (figures["videos"], figures["frames"]) == (2, 2 * 52)
    assert figures["mean"] > 0.9
