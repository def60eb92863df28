"""A curve in other programs' words: what is written can be read by their own readers, and says what the curve says."""

from __future__ import annotations

import json
import re
import sys
import warnings
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vacli import VacliError
from vacli.store.curves import HEADER, About, Curve, read_csv, write_csv
from vacli.store.exports import FORMATS, write
from vacli.store.track import Track

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # on newer Pythons it looks for a module that is gone
    from pympi import Elan

HOSTILE = [
    "<script>alert(1)</script>.mp4",
    "a\"b'c&d.mp4",
    "day --> night.mp4",
    "NOTE\n\n00:00.000 --> 99:00.000\nforged.mp4",
    "🙂‍↔️ é ب.mp4",
    "\x00\x1b[31m\x7f\ufffe.mp4",
    "caf\udce9.mp4",
    "x" * 200 + ".mp4",
    "]]>&amp;<!--.mp4",
]


def curve(times_s: np.ndarray, face: np.ndarray | None = None, **more: object) -> Curve:
    values = np.stack([np.sin(times_s / 3), np.cos(times_s / 5)], 1).astype(np.float32)
    seen = np.ones(len(times_s), bool) if face is None else face
    return replace(Curve(Track(values, times_s), seen), **more)


CLOCKS = {
    "25 Hz": np.arange(200) / 25,
    "one frame": np.array([0.0]),
    "one late frame": np.array([7.25]),
    "no rows": np.empty(0),
    "variable rate": np.cumsum(np.random.default_rng(0).exponential(0.2, 150)),
    "a hole of a minute": np.r_[np.arange(40) / 10, 64 + np.arange(40) / 10],
    "a thousand and more a second": np.arange(3000) / 2400,
    "before the start": np.arange(-30, 60) / 30,
}


def gaps(rows: int) -> np.ndarray:
    face = np.ones(rows, bool)
    face[rows // 4 : rows // 2] = False
    face[-1:] = False
    return face


ABOUT = About("day/clip", "day/clip", "day/clip.mp4", run={"head": "mamba", "mean": 0.5})


@pytest.fixture(params=CLOCKS)
def any_curve(request) -> Curve:
    clock = CLOCKS[request.param]
    return curve(clock, gaps(len(clock)))


# ---- all formats ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
def test_the_file_stands_where_it_was_asked_for_and_nothing_else_is_left(tmp_path, format):
    path = tmp_path / "new" / f"clip.v2.{format}"
    for _ in range(2):  # also in the place of an earlier one
        write(path, curve(CLOCKS["25 Hz"]), ABOUT, format)
        assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("format", FORMATS)
def test_a_write_that_fails_leaves_the_old_file(tmp_path, format, monkeypatch):
    path = tmp_path / f"clip.{format}"
    path.write_text("as before")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(VacliError, match=rf"cannot write .*clip\.{format}: No space"):
        write(path, curve(CLOCKS["25 Hz"]), ABOUT, format)
    assert path.read_text() == "as before"
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("format", "package", "extra"), [("parquet", "pyarrow", "parquet"), ("eaf", "pympi", "elan")]
)
def test_a_package_that_is_not_installed_is_named_with_the_line_that_installs_it(
    tmp_path, monkeypatch, format, package, extra
):
    for name in [package, *(n for n in sys.modules if n.startswith(f"{package}."))]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(VacliError, match=rf"{package}.*pip install 'vacli\[{extra}\]'"):
        write(tmp_path / "c", curve(CLOCKS["25 Hz"]), ABOUT, format)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_format_is_the_callers_mistake(tmp_path):
    with pytest.raises(ValueError, match="wanted one of parquet, json, eaf, vtt"):
        write(tmp_path / "c", curve(CLOCKS["25 Hz"]), ABOUT, "docx")


def test_an_hour_is_a_file_of_sane_size(tmp_path):
    rows = 60 * 60 * 30
    noise = np.random.default_rng(0).normal(0, 0.05, (rows, 2))
    values = np.clip(np.cumsum(noise, axis=0), -1, 1).astype(np.float32)
    hour = Curve(Track(values, np.arange(rows) / 30), gaps(rows))
    most = {"parquet": 2_000_000, "json": 8_000_000, "eaf": 4_000_000, "vtt": 600_000}
    for format in FORMATS:
        write(tmp_path / "c", hour, ABOUT, format)
        assert 10_000 < (tmp_path / "c").stat().st_size < most[format], format


# ---- parquet and JSON ----------------------------------------------------------------------------------------


def test_parquet_holds_the_columns_of_the_csv_in_types_of_their_own(tmp_path, any_curve):
    write(tmp_path / "c.parquet", any_curve, ABOUT, "parquet")
    table = parquet.read_table(tmp_path / "c.parquet")
    assert tuple(table.column_names) == HEADER
    person = pa.dictionary(pa.int32(), pa.string())
    types = [
        pa.int32(),
        pa.float64(),
        pa.float32(),
        pa.float32(),
        pa.bool_(),
        person,
        pa.float32(),
        pa.float32(),
    ]
    assert [table.schema.field(name).type for name in HEADER] == types
    assert table["frame"].to_pylist() == list(range(1, len(any_curve.track) + 1))
    np.testing.assert_array_equal(table["time_s"].to_numpy(), any_curve.track.times_s)
    np.testing.assert_array_equal(table["arousal"].to_numpy(), any_curve.track.values[:, 1])
    assert table["face"].to_pylist() == any_curve.face.tolist()
    assert set(table["person"].to_pylist()) <= {"main"}
    assert table["valence_std"].null_count == len(any_curve.track)
    assert json.loads(table.schema.metadata[b"run"]) == ABOUT.run
    assert table.schema.metadata[b"video"].decode() == "day/clip.mp4"
    assert json.loads(table.schema.metadata[b"units"]).keys() == set(HEADER)


def test_json_says_what_the_csv_says(tmp_path, any_curve):
    write_csv(tmp_path / "c.csv", any_curve)
    about = replace(ABOUT, csv=tmp_path / "c.csv", video=tmp_path.parent / "clip.mp4")
    write(tmp_path / "c.json", any_curve, about, "json")
    whole = json.loads((tmp_path / "c.json").read_text())
    read, columns = read_csv(tmp_path / "c.csv"), {name: whole[name] for name in HEADER}
    assert list(whole) == ["vacli", "about", "units", *HEADER]
    np.testing.assert_allclose(columns["time_s"], read.track.times_s, atol=1e-9)
    for k, name in enumerate(("valence", "arousal")):
        np.testing.assert_allclose(columns[name], read.track.values[:, k], atol=1e-7)
    assert columns["face"] == read.face.tolist()
    assert columns["frame"] == list(range(1, len(read.track) + 1))
    assert columns["valence_std"] == [None] * len(read.track)
    assert (whole["about"]["video"], whole["about"]["csv"]) == ("../clip.mp4", "c.csv")


def test_the_spread_of_an_ensemble_and_the_person_are_exported(tmp_path):
    made = curve(CLOCKS["25 Hz"], person="left", spread=np.full((200, 2), 0.25))
    for format in FORMATS:
        write(tmp_path / f"c.{format}", made, ABOUT, format)
    table = parquet.read_table(tmp_path / "c.parquet")
    assert set(table["arousal_std"].to_pylist()) == {0.25}
    columns = json.loads((tmp_path / "c.json").read_text())
    assert (set(columns["valence_std"]), set(columns["person"])) == ({0.25}, {"left"})
    assert all(text.startswith("left: ") for _, _, text in cues(tmp_path / "c.vtt"))
    tiers = Elan.Eaf(str(tmp_path / "c.eaf")).get_tier_names()
    assert set(tiers) == {f"{t}@left" for t in ("valence", "arousal", "quadrant", "no face")}


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is no JSON")


def test_rows_without_a_value_and_odd_numbers_are_null_in_strict_json(tmp_path):
    made = curve(CLOCKS["25 Hz"])
    made.track.values[3:5] = np.nan
    run = {
        "a": float("nan"),
        "b": [float("inf"), 1.5],
        "c": {"caf\udce9": "\udce9", "n": 3, "t": (True, None)},
    }
    about = replace(ABOUT, name="caf\udce9.mp4", run=run)
    for format in FORMATS:
        write(tmp_path / f"c.{format}", made, about, format)
    whole = json.loads((tmp_path / "c.json").read_bytes().decode("ascii"), parse_constant=refuse)
    assert whole["valence"][2:6].count(None) == 2
    assert whole["about"]["run"] == {
        "a": None,
        "b": [None, 1.5],
        "c": {"caf?": "?", "n": 3, "t": [True, None]},
    }
    assert whole["about"]["name"] == "caf?.mp4"
    assert parquet.read_table(tmp_path / "c.parquet")["valence"].null_count == 2
    assert "nan" not in (tmp_path / "c.vtt").read_text()
    assert "nan" not in (tmp_path / "c.eaf").read_text()


# ---- WebVTT --------------------------------------------------------------------------------------------------

_TIME = r"(?:(\d{2,}):)?([0-5]\d):([0-5]\d)\.(\d{3})"


def cues(path: Path) -> list[tuple[int, int, str]]:
    """Begin and end in ms and text, read by the syntax of https://www.w3.org/TR/webvtt1/ (sections 4.1 to 4.5)."""
    text = path.read_bytes().decode("utf-8")
    assert "\0" not in text
    head, *blocks = re.split(r"\n{2,}", text.rstrip("\n"))
    assert re.fullmatch(r"WEBVTT([ \t][^\n]*)?", head)
    found = []
    for block in blocks:
        if re.match(r"NOTE([ \t\n]|$)", block):
            assert "-->" not in block
            continue
        first, _, body = block.partition("\n")
        timing = re.fullmatch(rf"{_TIME}[ \t]+-->[ \t]+{_TIME}", first)
        assert timing, first
        h1, m1, s1, f1, h2, m2, s2, f2 = (int(part or 0) for part in timing.groups())
        start, end = ((h1 * 60 + m1) * 60 + s1) * 1000 + f1, ((h2 * 60 + m2) * 60 + s2) * 1000 + f2
        assert start < end
        assert body
        assert "-->" not in body
        assert not re.search(r"&(?!(amp|lt|gt);)|<|\r", body), body
        found.append((start, end, body))
    assert all(a[1] <= b[0] for a, b in pairwise(found))
    return found


def test_cues_follow_each_other_and_show_the_mean_of_their_frames(tmp_path, any_curve):
    write(tmp_path / "c.vtt", any_curve, ABOUT, "vtt")
    found = cues(tmp_path / "c.vtt")
    ms = np.round(np.maximum(any_curve.track.times_s, 0) * 1000)
    assert bool(found) == bool(len(ms))
    told = np.zeros(len(ms), bool)
    for start, end, text in found:
        rows = (ms >= start) & (ms < end)
        told |= rows
        valence, arousal = map(float, re.findall(r"[+-]\d\.\d\d", text))
        values = any_curve.track.values[rows]
        for shown, column in ((valence, values[:, 0]), (arousal, values[:, 1])):
            assert column.min() - 0.006 <= shown <= column.max() + 0.006
        assert ("no face" in text) == (not any_curve.face[rows].any())
    assert told.all()
    assert not found or found[-1][1] == ms[-1] + 1


def test_a_curve_that_does_not_change_is_one_cue(tmp_path):
    flat = curve(CLOCKS["25 Hz"])
    flat.track.values[:] = [-0.001, 1]
    write(tmp_path / "c.vtt", flat, ABOUT, "vtt")
    assert cues(tmp_path / "c.vtt") == [(0, 7961, "valence +0.00 arousal +1.00")]


def test_hours_are_written_when_there_are_some(tmp_path):
    write(tmp_path / "c.vtt", curve(np.arange(3590, 3610, 0.5)), ABOUT, "vtt")
    text = (tmp_path / "c.vtt").read_text()
    assert "\n59:59.500 --> 01:00:00.000\n" in text
    write(tmp_path / "c.vtt", curve(np.array([360_000.0, 360_001.0])), ABOUT, "vtt")
    assert cues(tmp_path / "c.vtt")[-1][0] == 360_001_000
    assert "\n100:00:01.000 --> " in (tmp_path / "c.vtt").read_text()


@pytest.mark.parametrize("name", HOSTILE)
def test_no_name_breaks_the_subtitles(tmp_path, name):
    write(tmp_path / "c.vtt", curve(CLOCKS["25 Hz"], person="<b>&-->"), replace(ABOUT, name=name), "vtt")
    found = cues(tmp_path / "c.vtt")
    assert len(found) == 16
    assert found[0][2].startswith("&lt;b&gt;&amp;--&gt;: valence")
    (note,) = re.findall(r"^NOTE .*$", (tmp_path / "c.vtt").read_text(), re.MULTILINE)
    assert "<" not in note
    assert note.isprintable() or "‍" in note  # an emoji may be joined


# ---- ELAN ----------------------------------------------------------------------------------------------------

ORDER = ["LICENSE", "HEADER", "TIME_ORDER", "TIER", "LINGUISTIC_TYPE", "LOCALE", "LANGUAGE", "CONSTRAINT"]
ATTRIBUTES = {  # element: needed, allowed; EAF 3.0
    "ANNOTATION_DOCUMENT": ({"DATE", "AUTHOR", "VERSION"}, {"FORMAT"}),
    "HEADER": (set(), {"MEDIA_FILE", "TIME_UNITS"}),
    "MEDIA_DESCRIPTOR": ({"MEDIA_URL", "MIME_TYPE"}, {"RELATIVE_MEDIA_URL"}),
    "LINKED_FILE_DESCRIPTOR": ({"LINK_URL", "MIME_TYPE"}, {"RELATIVE_LINK_URL"}),
    "PROPERTY": (set(), {"NAME"}),
    "TIME_ORDER": (set(), set()),
    "TIME_SLOT": ({"TIME_SLOT_ID"}, {"TIME_VALUE"}),
    "TIER": ({"TIER_ID", "LINGUISTIC_TYPE_REF"}, {"PARTICIPANT"}),
    "ANNOTATION": (set(), set()),
    "ALIGNABLE_ANNOTATION": ({"ANNOTATION_ID", "TIME_SLOT_REF1", "TIME_SLOT_REF2"}, set()),
    "ANNOTATION_VALUE": (set(), set()),
    "LINGUISTIC_TYPE": ({"LINGUISTIC_TYPE_ID"}, {"TIME_ALIGNABLE", "GRAPHIC_REFERENCES"}),
    "CONSTRAINT": ({"STEREOTYPE"}, {"DESCRIPTION"}),
}
SCHEMA = "{http://www.w3.org/2001/XMLSchema-instance}noNamespaceSchemaLocation"
Annotations = dict[str, list[tuple[int, int, str]]]


def annotations(path: Path) -> Annotations:
    """Tier -> begin and end in ms and value, once the file is found to have the structure of EAF 3.0."""
    root = ElementTree.parse(path).getroot()
    assert root.attrib.pop(SCHEMA) == "http://www.mpi.nl/tools/elan/EAFv3.0.xsd"
    assert (root.tag, root.attrib["VERSION"], root.attrib["FORMAT"]) == ("ANNOTATION_DOCUMENT", "3.0", "3.0")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d", root.attrib["DATE"])
    assert [ORDER.index(child.tag) for child in root] == sorted(ORDER.index(child.tag) for child in root)
    for element in root.iter():
        needed, allowed = ATTRIBUTES[element.tag]
        assert needed <= element.attrib.keys() <= needed | allowed, element.tag
    ids = [e.attrib[k] for e in root.iter() for k in ("TIME_SLOT_ID", "ANNOTATION_ID") if k in e.attrib]
    assert len(ids) == len(set(ids))
    slots = {s.attrib["TIME_SLOT_ID"]: int(s.attrib["TIME_VALUE"]) for s in root.iter("TIME_SLOT")}
    assert list(slots.values()) == sorted(slots.values())
    types = {t.attrib["LINGUISTIC_TYPE_ID"] for t in root.iter("LINGUISTIC_TYPE")}
    found: Annotations = {}
    for tier in root.iter("TIER"):
        assert tier.attrib["LINGUISTIC_TYPE_REF"] in types
        rows = found.setdefault(tier.attrib["TIER_ID"], [])
        for one in tier.iter("ALIGNABLE_ANNOTATION"):
            start, end = (slots[one.attrib[f"TIME_SLOT_REF{k}"]] for k in (1, 2))
            assert 0 <= start < end
            rows.append((start, end, one[0].text or ""))
        assert all(a[1] <= b[0] for a, b in pairwise(sorted(rows)))
    return found


def test_elan_files_have_the_structure_of_eaf_and_reopen_with_pympi(tmp_path, any_curve):
    write(tmp_path / "c.eaf", any_curve, ABOUT, "eaf")
    found = annotations(tmp_path / "c.eaf")
    assert set(found) == {"valence", "arousal", "quadrant", "no face"}
    opened = Elan.Eaf(str(tmp_path / "c.eaf"))
    for tier, rows in found.items():
        assert sorted(tuple(row) for row in opened.get_annotation_data_for_tier(tier)) == sorted(rows)
    ms = np.round(np.maximum(any_curve.track.times_s, 0) * 1000)
    ends = [end for rows in found.values() for _, end, _ in rows]
    assert max(ends, default=0) <= (ms[-1] + 1 if len(ms) else 0)  # inside the video


def test_annotations_are_the_means_of_the_rows_with_a_face(tmp_path, any_curve):
    write(tmp_path / "c.eaf", any_curve, ABOUT, "eaf")
    found = annotations(tmp_path / "c.eaf")
    ms = np.round(np.maximum(any_curve.track.times_s, 0) * 1000)
    counts = any_curve.face if any_curve.face.any() else np.ones(len(ms), bool)
    told = np.zeros(len(ms), bool)
    for column, tier in enumerate(("valence", "arousal")):
        for start, end, text in found[tier]:
            rows = (ms >= start) & (ms < end) & counts
            told |= rows
            assert abs(float(text) - any_curve.track.values[rows, column].mean()) < 0.006
            assert ms[rows].max() - start < 1000
    assert told[counts].all()


def test_stretches_without_a_face_are_marked_to_the_frame(tmp_path):
    face = np.ones(100, bool)
    face[[0, 1, 30, 31, 32, 99]] = False
    write(tmp_path / "c.eaf", curve(np.arange(100) / 25, face), ABOUT, "eaf")
    absent = annotations(tmp_path / "c.eaf")["no face"]
    assert [row[:2] for row in absent] == [(0, 80), (1200, 1320), (3960, 3961)]


def test_the_quadrant_is_in_the_words_of_the_axes_and_one_annotation_while_it_lasts(tmp_path):
    corners = np.array([[0.5, 0.5], [-0.5, 0.5], [-0.5, -0.5], [0.5, -0.5], [0.05, -0.05]], np.float32)
    track = Track(np.repeat(corners, 50, axis=0), np.arange(250) / 25)
    write(tmp_path / "c.eaf", Curve(track, np.ones(250, bool)), ABOUT, "eaf")
    words = ["positive active", "negative active", "negative passive", "positive passive", "near zero"]
    found = annotations(tmp_path / "c.eaf")["quadrant"]
    assert found == [(k * 2000, min(k * 2000 + 2000, 9961), word) for k, word in enumerate(words)]


@pytest.mark.parametrize("name", HOSTILE)
def test_no_name_breaks_an_elan_file_and_its_video_is_linked_relatively(tmp_path, name):
    folder = tmp_path / "predictions" / "day"
    video = tmp_path / "videos" / name.replace("\0", "").replace("/", "")
    about = replace(ABOUT, name=name, video=video, run={"note": name})
    write(folder / "c.eaf", curve(CLOCKS["25 Hz"], person="<&>"), about, "eaf")
    assert len(annotations(folder / "c.eaf")["valence@<&>"]) == 8
    (media,) = Elan.Eaf(str(folder / "c.eaf")).get_linked_files()
    assert media["RELATIVE_MEDIA_URL"].startswith("../../videos/")
    assert (media["MEDIA_URL"], media["MIME_TYPE"]) == (media["RELATIVE_MEDIA_URL"], "video/mp4")
    if video.name.isprintable():
        assert (folder / media["RELATIVE_MEDIA_URL"]).resolve() == video.resolve()


def test_elan_is_told_to_draw_the_whole_curve(tmp_path):
    """As its own TSConfigurationParser and CSVServiceProvider read it: columns from 0, the source a linked file."""
    made = curve(CLOCKS["25 Hz"])
    write_csv(tmp_path / "clip.v2.csv", made)
    write(tmp_path / "clip.v2.eaf", made, replace(ABOUT, csv=tmp_path / "clip.v2.csv"), "eaf")
    assert {p.name for p in tmp_path.iterdir()} == {"clip.v2.csv", "clip.v2.eaf", "clip.v2_tsconf.xml"}
    links = [d["LINK_URL"] for d in Elan.Eaf(str(tmp_path / "clip.v2.eaf")).get_secondary_linked_files()]
    assert links == ["clip.v2.csv", "clip.v2_tsconf.xml"]
    source = ElementTree.parse(tmp_path / "clip.v2_tsconf.xml").getroot().find("tracksource")
    assert source is not None
    assert source.attrib["source-url"] in links
    lines = (tmp_path / source.attrib["source-url"]).read_text().splitlines()
    cells = np.array([line.split(",") for line in lines[1:]])
    np.testing.assert_allclose(
        cells[:, int(source.attrib["time-column"])].astype(float), made.track.times_s, atol=1e-6
    )
    for k, track in enumerate(source.findall("track")):
        column = int(track.find("sample-position/pos").attrib["col"])  # type: ignore[union-attr]
        assert lines[0].split(",")[column] == track.attrib["name"]
        np.testing.assert_allclose(cells[:, column].astype(float), made.track.values[:, k], atol=1e-6)
        assert {float(v) for v in track.find("range").attrib.values()} == {-1, 1}  # type: ignore[union-attr]


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.integers(1, 90_000_000), st.booleans(), st.floats(-1, 1, width=32)), max_size=30)
)
def test_any_curve_gives_right_subtitles_and_annotations(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("e")
    times_s = np.cumsum([step for step, _, _ in rows]) / 1e6
    values = np.array([[v, -v] for _, _, v in rows], np.float32).reshape(-1, 2)
    made = Curve(Track(values, times_s.astype(np.float64)), np.array([seen for _, seen, _ in rows], bool))
    write(folder / "c.vtt", made, ABOUT, "vtt")
    write(folder / "c.eaf", made, ABOUT, "eaf")
    assert bool(cues(folder / "c.vtt")) == bool(rows)
    found = annotations(folder / "c.eaf")
    assert bool(found["valence"]) == bool(rows)
    assert len(found["valence"]) == len(found["arousal"])
