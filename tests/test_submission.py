"""The challenge's hand-in: every row of the sample in its order, and no mutation of a right file passes the check."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from hypothesis import example, given, settings
from hypothesis import strategies as st
from vacli import VacliError
from vacli.cli_submit import submit
from vacli.store.curves import About, Curve, remember, write_csv
from vacli.store.submission import HEADERS, SHOWN, check_submission, write_submission
from vacli.store.track import Track

from .submission_faults import MUTATIONS, by_the_rules


def put_curve(
    folder: Path, id: str, rows: int = 6, person: str = "main", name: str | None = None, shift: float = 0
) -> np.ndarray:
    """A curve and its record; its values (T, 2)."""
    seed = np.random.default_rng(len(id) * 1000 + rows)
    values = (seed.uniform(-0.5, 0.5, (rows, 2)) + shift).astype(np.float32)
    csv = folder / f"{id}.csv"
    write_csv(csv, Curve(Track(values, np.arange(rows) / 30), np.ones(rows, bool), person))
    remember(folder, About(id, id, name or f"{id}.mp4", person, csv=csv))
    return values


def put_sample(path: Path, videos: dict[str, int], values: str = "-5,-5") -> list[str]:
    """A sample with that many frames of each video; its locations."""
    places = [f"{video}/{k:05d}.jpg" for video, count in videos.items() for k in range(1, count + 1)]
    path.write_text("image_location,valence,arousal\n" + "".join(f"{p},{values}\n" for p in places))
    return places


@pytest.fixture
def right(tmp_path) -> tuple[Path, Path]:
    """A right file, and its sample."""
    folder, sample, out = tmp_path / "predictions", tmp_path / "sample.txt", tmp_path / "out.txt"
    videos = {"12-24-1920x1080": 6, "5_left": 4, "5_right": 5, "video_b": 3}
    for video, count in videos.items():
        put_curve(folder, video, count)
    put_sample(sample, videos)
    write_submission(folder, sample, out)
    return out, sample


def wrong(path: Path, sample: Path | None = None) -> set[str]:
    return {finding.what for finding in check_submission(path, sample) if finding.wrong}


# ---- writing -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("filler", ["-5,-5", "0,0", "", "1,2,3"])
def test_what_is_written_passes_the_check_and_a_second_reading_of_the_rules(tmp_path, filler):
    folder, sample, out = tmp_path / "p", tmp_path / "s.txt", tmp_path / "new" / "out.txt"
    curves = {video: put_curve(folder, video, rows) for video, rows in {"b": 3, "a_left": 7, "c": 5}.items()}
    places = put_sample(sample, {"b": 3, "a_left": 4, "c": 5}, filler)
    made = write_submission(folder, sample, out)
    assert (made.rows, made.videos, made.held, made.empty, made.clipped) == (12, 3, {}, {}, 0)
    assert check_submission(out, sample) == []
    assert check_submission(out) == []
    assert by_the_rules(out.read_bytes(), sample.read_bytes())
    for line, place in zip(out.read_text().splitlines()[1:], places, strict=True):
        video, frame = re.fullmatch(r"(.+)/(\d{5})\.jpg", place).groups()  # type: ignore[union-attr]
        v, a = curves[video][int(frame) - 1]
        assert line == f"{place},{v:.6f},{a:.6f}".replace("-0.000000", "0.000000")


def test_the_order_is_the_samples_whatever_it_is(tmp_path):
    places = put_sample(tmp_path / "s.txt", {"x": 5, "y": 5, "z": 2})
    random.Random(0).shuffle(places)
    (tmp_path / "s.txt").write_text(
        "image_location,valence,arousal\n" + "".join(f"{p},0,0\n" for p in places)
    )
    values = {video: put_curve(tmp_path / "p", video, 5) for video in "xyz"}
    write_submission(tmp_path / "p", tmp_path / "s.txt", tmp_path / "o.txt")
    rows = [line.split(",") for line in (tmp_path / "o.txt").read_text().splitlines()[1:]]
    assert [row[0] for row in rows] == places
    for place, valence, _ in rows:
        assert abs(float(valence) - values[place[0]][int(place[2:7]) - 1, 0]) < 1e-6
    assert wrong(tmp_path / "o.txt", tmp_path / "s.txt") == set()


def test_a_sample_from_windows_is_read_and_ours_has_its_own_line_ends(tmp_path):
    put_curve(tmp_path / "p", "a")
    (tmp_path / "s.txt").write_bytes(
        b"\xef\xbb\xbfimage_location,valence,arousal\r\na/00001.jpg,0,0\r\na/00002.jpg,0,0\r\n\r\n"
    )
    write_submission(tmp_path / "p", tmp_path / "s.txt", tmp_path / "o.txt")
    assert b"\r" not in (tmp_path / "o.txt").read_bytes()
    assert check_submission(tmp_path / "o.txt", tmp_path / "s.txt") == []


@pytest.mark.parametrize(
    ("frames", "is_odd"), [(60, False), (66, False), (500, True), (54, False), (20, True)]
)
def test_a_sample_of_another_length_than_the_video_is_told_and_ends_with_one(tmp_path, frames, is_odd):
    put_curve(tmp_path / "p", "a", 60)
    put_sample(tmp_path / "s.txt", {"a": frames})
    made = write_submission(tmp_path / "p", tmp_path / "s.txt", tmp_path / "o.txt")
    assert made.unlike == ({"a": (frames, 60)} if is_odd else {})
    words = [str(tmp_path / "p"), "--sample", str(tmp_path / "s.txt"), "--out", str(tmp_path / "o.txt")]
    result = CliRunner().invoke(submit, words)
    assert result.exit_code == is_odd
    assert ("is it the same, whole video?" in result.output) == is_odd


def test_frames_beyond_the_end_of_the_curve_hold_its_last_row_and_are_counted(tmp_path):
    values = put_curve(tmp_path / "p", "a", 3)
    put_curve(tmp_path / "p", "b", 9)
    put_sample(tmp_path / "s.txt", {"a": 5, "b": 4})
    made = write_submission(tmp_path / "p", tmp_path / "s.txt", tmp_path / "o.txt")
    assert made.held == {"a": 2}
    lines = (tmp_path / "o.txt").read_text().splitlines()
    assert [line.split(",")[1:] for line in lines[4:6]] == [[f"{v:.6f}" for v in values[-1]]] * 2


def test_rows_without_a_value_have_the_nearest_and_values_out_of_range_are_clipped(tmp_path):
    nan = np.nan
    values = np.array(
        [[nan, nan], [0.5, 0.25], [nan, nan], [nan, nan], [nan, nan], [-3, 1.5], [nan, nan]], np.float32
    )
    csv = tmp_path / "p" / "a.csv"
    write_csv(csv, Curve(Track(values, np.arange(7) / 30), np.ones(7, bool)))
    put_sample(tmp_path / "s.txt", {"a": 8})
    made = write_submission(tmp_path / "p", tmp_path / "s.txt", tmp_path / "o.txt")
    assert (made.empty, made.clipped, made.held) == ({"a": 5}, 2, {"a": 1})
    rows = [line.split(",") for line in (tmp_path / "o.txt").read_text().splitlines()[1:]]
    assert [float(row[1]) for row in rows] == [0.5, 0.5, 0.5, -1, -1, -1, -1, -1]
    assert {row[2] for row in rows} == {"0.250000", "1.000000"}


def test_videos_without_a_curve_are_all_named_and_nothing_is_written(tmp_path):
    put_curve(tmp_path / "p", "here")
    remember(tmp_path / "p", About("broken", "broken", "broken.mp4", problem="no video in it"))
    put_sample(tmp_path / "s.txt", {"here": 2, "gone": 2, "5_left": 3, "broken": 1})
    (tmp_path / "o.txt").write_text("as before")
    with pytest.raises(VacliError) as e:
        write_submission(tmp_path / "p", tmp_path / "s.txt", tmp_path / "o.txt")
    for part in ("3 of 4", "gone, 5_left, broken (no video in it)", "vacli predict --video", "--person left"):
        assert part in str(e.value)
    assert (tmp_path / "o.txt").read_text() == "as before"


@pytest.mark.parametrize(
    ("id", "person", "name", "video"),
    [
        ("12", "main", "12.mp4", "12"),
        ("12_left", "left", "12.mp4", "12_left"),
        ("12_left", "main", "12_left", "12_left"),
        ("batch1/12", "main", "batch1/12.mp4", "12"),
        ("batch1/12", "left", "batch1/12.mp4", "12_left"),
        ("12", "right", "12.avi", "12_right"),
        ("batch1/12_left", "main", "batch1/12_left.mp4", "12_left"),
        ("clip-0123abcd", "main", "-clip.mp4", "-clip"),
        ("a.b", "main", "a.b", "a.b"),
        ("9_left_2", "main", "9_left_2.mp4", "9_left_2"),
    ],
)
def test_a_video_of_the_sample_finds_its_curve(tmp_path, id, person, name, video):
    values = put_curve(tmp_path / "p", id, 4, person, name)
    put_curve(tmp_path / "p", "other", 4, shift=0.4)
    put_sample(tmp_path / "s.txt", {video: 4})
    write_submission(tmp_path / "p", tmp_path / "s.txt", tmp_path / "o.txt")
    lines = (tmp_path / "o.txt").read_text().splitlines()[1:]
    np.testing.assert_allclose([[float(v) for v in line.split(",")[1:]] for line in lines], values, atol=6e-7)


@pytest.mark.parametrize(
    ("id", "person", "name", "video"),
    [
        ("12", "left", "12.mp4", "12"),
        ("12", "main", "12.mp4", "12_left"),
        ("12", "right", "12.mp4", "12_left"),
        ("12_person1", "1", "12.mp4", "12"),
        ("123", "main", "123.mp4", "12"),
        ("12/clip", "main", "12/clip.mp4", "12"),
    ],
)
def test_nobody_elses_curve_is_taken(tmp_path, id, person, name, video):
    put_curve(tmp_path / "p", id, 4, person, name)
    put_sample(tmp_path / "s.txt", {video: 4})
    with pytest.raises(VacliError, match=f"1 of 1 videos .* {video}"):
        write_submission(tmp_path / "p", tmp_path / "s.txt", tmp_path / "o.txt")


def test_of_two_curves_none_is_guessed(tmp_path):
    for batch in ("batch1", "batch2"):
        put_curve(tmp_path / "p", f"{batch}/12")
    put_sample(tmp_path / "s.txt", {"12": 2})
    with pytest.raises(VacliError, match=r"several curves .*12 \(batch1/12, batch2/12\)"):
        write_submission(tmp_path / "p", tmp_path / "s.txt", tmp_path / "o.txt")
    put_curve(tmp_path / "p", "12")  # the very id settles it
    assert write_submission(tmp_path / "p", tmp_path / "s.txt", tmp_path / "o.txt").rows == 2


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "no rows"),
        ("a/00001.jpg,0,0\n", "first line is"),
        (HEADERS["expr"] + "\na/00001.jpg,0\n", "wanted the sample of VA"),
        ("image_location,valence,arousal\n", "no rows"),
        ("image_location,valence,arousal\na/00001.jpg,0,0\nnonsense\n", "line 3: 'nonsense'"),
        ("image_location,valence,arousal\na/00000.jpg,0,0\n", "line 2"),
        ("image_location,valence,arousal\n/00001.jpg,0,0\n", "line 2"),
        ("image_location,valence,arousal\na/" + "9" * 5000 + ".jpg,0,0\n", "line 2"),
        ("image_location,valence,arousal\na/00001.jpg,0,0\na/00001.jpg,0,0\n", "1 rows twice"),
        ("image_location,valence,arousal\n" + "a" * 100_000, "bytes or more"),
        ("image_location,valence,arousal\na\x1b[31m/00001.png,0,0\n", "line 2"),
    ],
)
def test_a_sample_that_is_none_is_one_line(tmp_path, text, told):
    put_curve(tmp_path / "p", "a")
    (tmp_path / "s.txt").write_text(text)
    with pytest.raises(VacliError) as e:
        write_submission(tmp_path / "p", tmp_path / "s.txt", tmp_path / "o.txt")
    assert told in str(e.value)
    assert "\x1b" not in str(e.value)
    assert not (tmp_path / "o.txt").exists()


def test_what_cannot_be_had_is_refused(tmp_path):
    put_curve(tmp_path / "p", "a")
    sample = tmp_path / "s.txt"
    put_sample(sample, {"a": 2})
    for task in ("expr", "au"):
        with pytest.raises(VacliError, match=rf"valence and arousal.*{task}.*--check"):
            write_submission(tmp_path / "p", sample, tmp_path / "o.txt", task)
    with pytest.raises(VacliError, match="the sample itself"):
        write_submission(tmp_path / "p", sample, sample)
    with pytest.raises(VacliError, match="cannot read"):
        write_submission(tmp_path / "p", tmp_path / "none.txt", tmp_path / "o.txt")
    write_csv(
        tmp_path / "p" / "a.csv", Curve(Track(np.empty((0, 2), np.float32), np.empty(0)), np.empty(0, bool))
    )
    with pytest.raises(VacliError, match=r"1 curves .* hold no value: a;"):
        write_submission(tmp_path / "p", sample, tmp_path / "o.txt")
    assert "-5,-5" in sample.read_text()


# ---- checking ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MUTATIONS)
def test_no_mutation_of_a_right_file_passes(right, name):
    path, sample = right
    mutate, told = MUTATIONS[name]
    lines = path.read_bytes().split(b"\n")[:-1]
    assert check_submission(path, sample) == []
    mutate(lines)
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    assert any(what.startswith(told) for what in wrong(path, sample)), wrong(path, sample)
    assert not by_the_rules(path.read_bytes(), sample.read_bytes())


@settings(max_examples=300)
@given(
    st.lists(
        st.tuples(
            st.floats(0, 1, exclude_max=True),
            st.integers(0, 2),
            st.sampled_from([*b"0159.,-+e_\n\r\t /nafjpg\xff\xef", 0]),
        ),
        min_size=1,
        max_size=3,
    )
)
@example([(0.999, 1, ord("\r"))])
def test_the_check_and_the_second_reading_agree_on_any_file(tmp_path_factory, edits):
    """Bytes deleted, put in, or changed, anywhere: what one calls right the other does too."""
    folder = tmp_path_factory.mktemp("f")
    text = b"image_location,valence,arousal\na/00001.jpg,0.5,-0.25\na/00002.jpg,1.0,.5\nb/00001.jpg,-1,1e-3\n"
    (folder / "s.txt").write_bytes(text)
    changed = bytearray(text)
    for where, how, byte in edits:
        at = int(where * (len(changed) + 1))
        changed[at : at + (how != 1)] = bytes([byte] if how else [])
    (folder / "f.txt").write_bytes(changed)
    passed = not wrong(folder / "f.txt", folder / "s.txt")
    assert passed == by_the_rules(bytes(changed), text), bytes(changed)


def test_each_fault_has_its_line_and_its_text_and_the_rest_is_counted(right):
    path, sample = right
    lines = path.read_text().splitlines()
    lines[5:18] = [line + " " for line in lines[5:18]]
    lines[2] = lines[2].replace("/", "\x1b[31m/")
    path.write_text("\n".join(lines * 3))
    found = {one.what: one for one in check_submission(path, sample)}
    spaces = found["spaces beside a value"]
    assert (spaces.count, len(spaces.where)) == (39, SHOWN)
    assert spaces.where[0] == (6, lines[5])
    assert not any("\x1b" in text for one in found.values() for _, text in one.where)
    (missing,) = found["rows of the sample that are missing (its lines)"].where
    assert missing == (3, "12-24-1920x1080/00002.jpg,-5,-5")
    assert found["rows that were there before"].where[0] == (len(lines) + 2, lines[1])


EXPR = HEADERS["expr"] + "\n" + "".join(f"a/{k:05d}.jpg,{k % 8}\n" for k in range(1, 17))
AU = (
    HEADERS["au"]
    + "\n"
    + "".join(f"a/{k:05d}.jpg,{','.join(str((k >> j % 4) & 1) for j in range(12))}\n" for k in range(1, 17))
)


@pytest.mark.parametrize("text", [EXPR, AU])
def test_files_of_the_other_tasks_are_known_by_their_header(tmp_path, text):
    (tmp_path / "f.txt").write_text(text)
    assert check_submission(tmp_path / "f.txt") == []
    assert check_submission(tmp_path / "f.txt", tmp_path / "f.txt") == []


@pytest.mark.parametrize(
    ("text", "line", "told"),
    [
        (EXPR, "a/00003.jpg,8", "values that are not a whole number from 0 to 7"),
        (EXPR, "a/00003.jpg,3.0", "values that are not a whole number from 0 to 7"),
        (EXPR, "a/00003.jpg,-1", "values of -1, which marks a frame without annotation"),
        (EXPR, "a/00003.jpg,Anger", "values that are not a whole number from 0 to 7"),
        (EXPR, "a/00003.jpg,0,0,0,1,0,0,0,0", "rows with another number of values than 1"),
        (EXPR, "a/00003.jpg", "rows with another number of values than 1"),
        (AU, "a/00003.jpg" + ",1" * 11, "rows with another number of values than 12"),
        (AU, "a/00003.jpg" + ",0" * 11 + ",2", "values that are not 0 or 1"),
        (AU, "a/00003.jpg" + ",0" * 11 + ",0.7", "values that are not 0 or 1"),
        (AU, "a/00003.jpg" + ",-1" * 12, "values of -1, which marks a frame without annotation"),
    ],
)
def test_faults_of_the_other_tasks_are_found(tmp_path, text, line, told):
    lines = text.splitlines()
    lines[3] = line
    (tmp_path / "f.txt").write_text("\n".join(lines) + "\n")
    (finding,) = check_submission(tmp_path / "f.txt")
    assert (finding.what, finding.wrong, finding.where) == (told, True, [(4, line)])


def test_a_sample_of_another_task_is_told(tmp_path):
    (tmp_path / "f.txt").write_text(EXPR)
    (tmp_path / "s.txt").write_text(AU)
    assert wrong(tmp_path / "f.txt", tmp_path / "s.txt") == {"the sample s.txt is of another task"}


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ("a/00002.jpg,0,0\na/00003.jpg,.1,.1\n", "videos whose first frame is not 00001"),
        ("a/00001.jpg,0,0\na/00003.jpg,.1,.1\n", "frame numbers with gaps, or out of order"),
        (
            "a/00001.jpg,0,0\na/00003.jpg,.1,.1\na/00002.jpg,.1,.1\n",
            "frame numbers with gaps, or out of order",
        ),
        ("a/1.jpg,0,0\na/2.jpg,.1,.1\n", "frame numbers that are not of five digits"),
        ("a/00001.jpg,0,.1\na/00002.jpg,0,.2\n", "valence is the same in all rows"),
        ("a/00001.jpg,.2,.5\na/00002.jpg,.1,.5\nb/00001.jpg,.3,.5\n", "arousal is the same in all rows"),
    ],
)
def test_what_is_only_odd_is_a_warning(tmp_path, rows, told):
    (tmp_path / "f.txt").write_text(HEADERS["va"] + "\n" + rows)
    found = check_submission(tmp_path / "f.txt")
    assert told in [one.what for one in found]
    assert not any(one.wrong for one in found)


def test_a_frame_number_beyond_99999_has_six_digits(tmp_path):
    lines = [f"a/{k:05d}.jpg,{k / 1e6},{-k / 1e6}" for k in range(99_998, 100_003)]
    (tmp_path / "f.txt").write_text("\n".join([HEADERS["va"], *lines]))
    assert lines[-1].startswith("a/100002.jpg")
    (found,) = check_submission(tmp_path / "f.txt")
    assert (found.what, found.count) == ("videos whose first frame is not 00001", 1)


@pytest.mark.parametrize(
    "content", [b"\0" * 500, b"\xff\xfe" * 100, b",,,\n,,\n,\n", b"\n" * 50, b"a/00001.jpg"]
)
def test_whatever_the_file_is_it_is_judged(tmp_path, right, content):
    (tmp_path / "f.txt").write_bytes(content)
    assert wrong(tmp_path / "f.txt")
    assert wrong(tmp_path / "f.txt", right[1])


def test_a_file_that_cannot_be_read_is_one_line(tmp_path, right):
    for path in (tmp_path / "none.txt", tmp_path):
        with pytest.raises(VacliError, match="cannot read"):
            check_submission(path)
        with pytest.raises(VacliError, match="cannot read"):
            check_submission(right[0], path)
    (tmp_path / "long.txt").write_bytes(b"a" * 200_000)
    with pytest.raises(VacliError, match="bytes or more"):
        check_submission(tmp_path / "long.txt")


# ---- the command ---------------------------------------------------------------------------------------------


def run(*words: object) -> Result:
    return CliRunner().invoke(submit, [str(word) for word in words])


def test_the_command_writes_checks_and_tells_the_rules(tmp_path):
    put_curve(tmp_path / "p", "a", 3)
    put_sample(tmp_path / "s.txt", {"a": 4})
    told = run(tmp_path / "p", "--task", "va", "--sample", tmp_path / "s.txt", "--out", tmp_path / "o.txt")
    assert told.exit_code == 0, told.output
    assert "4 rows of 1 videos" in told.stdout
    assert "nothing wrong found" in told.stdout
    assert "a: 1 frame(s) beyond the end" in told.stderr
    assert "five submissions" in told.stderr
    assert "EULA" in told.stderr
    assert by_the_rules((tmp_path / "o.txt").read_bytes(), (tmp_path / "s.txt").read_bytes())


def test_the_command_checks_and_its_exit_code_says_it(right):
    path, sample = right
    assert run("--check", path, "--sample", sample).exit_code == 0
    assert "without --sample" in run("--check", path).stdout
    path.write_text(path.read_text().replace("video_b/00002.jpg,", "video_b/00002.jpg,9"))
    told = run("--check", path, "--sample", sample)
    assert told.exit_code == 1
    assert "wrong: 1 x values outside [-1, 1]\n  line 18: video_b/00002.jpg,9" in told.stdout
    told = run("--check", path, "--sample", sample, "--json")
    assert told.exit_code == 1
    (finding,) = json.loads(told.stdout)["findings"]
    assert (finding["what"], finding["wrong"], finding["count"]) == ("values outside [-1, 1]", True, 1)
    assert finding["where"][0]["line"] == 18


def test_the_command_says_what_it_needs(tmp_path):
    told = run(tmp_path)
    assert told.exit_code == 2
    assert "--sample FILE" in told.stderr
