"""Figures for papers: names are text, the same bytes every time, no peak lost, CCC as the challenge has it."""

from __future__ import annotations

import shutil
import sys
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from vacli import VacliError
from vacli.report import plots
from vacli.report.plots import Plots, drawable, write_plots
from vacli.store.curves import About, Curve, recall, remember, write_csv
from vacli.store.labels import ccc_of_tracks
from vacli.store.names import plain_id
from vacli.store.track import Track

SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = [
    "<script>alert(1)</script>.mp4",
    "a\"b'c&d.mp4",
    "$\\frac{x}$ and $5",
    "smile \U0001f600 \U0001f9d1\u200d\U0001f3a4 \u6f22\u5b57.mp4",
    "undecodable \udcff, a\x00b, two\nlines",
    "long " * 40,
]


def curve_of(number: int, rows: int = 90, spread: bool = False) -> Curve:
    rng = np.random.default_rng(number)
    values = np.clip(np.cumsum(rng.normal(0, 0.05, (rows, 2)), axis=0), -1, 1).astype(np.float32)
    face = np.ones(rows, bool)
    face[10:20] = False
    return Curve(
        Track(values, np.arange(rows) / 30), face, spread=np.full((rows, 2), 0.1) if spread else None
    )


def labelled(folder: Path, name: str, curve: Curve, labels: np.ndarray | None = None) -> None:
    """The curve under this name in a folder of curves; labels (T, 2), NaN where unlabelled."""
    id, file = plain_id(name), None
    write_csv(folder / f"{id}.csv", curve)
    if labels is not None:
        file = folder / "labels" / f"{id}.txt"
        file.parent.mkdir(exist_ok=True)
        lines = (f"{v:.6f},{a:.6f}" for v, a in np.nan_to_num(labels, nan=-5))
        file.write_text("valence,arousal\n" + "\n".join(lines) + "\n")
    remember(folder, About(id, id, name, labels=file, csv=folder / f"{id}.csv"))


def words(path: Path) -> list[str]:
    return ["".join(node.itertext()).strip() for node in ET.parse(path).iter(f"{SVG}text")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Three people, two of them labelled, one of several folds; and a CSV that is none."""
    folder = tmp_path_factory.mktemp("predictions")
    for number, name in enumerate(("ann", "bob", "cyd")):
        curve = curve_of(number, spread=name == "bob")
        labels = None if name == "cyd" else 0.5 * curve.track.values + 0.1
        if labels is not None:
            labels[30:40] = np.nan
        labelled(folder, name, curve, labels)
    (folder / "broken.csv").write_text("frame,time_s,valence,arousal,face\n1,0,x,0,1\n")
    return folder


@pytest.fixture(scope="module")
def written(folder, tmp_path_factory) -> tuple[Plots, list[str]]:
    """The figures of `folder` as SVG, and what was told."""
    told: list[str] = []
    return write_plots(folder, tmp_path_factory.mktemp("plots"), "svg", told.append), told


@pytest.fixture
def drawn(written) -> Path:
    return written[0].paths[0].parent


def test_every_person_and_all_together_are_drawn_and_what_cannot_be_is_a_problem(written, drawn):
    found, told = written
    names = ["ann.curve", "bob.curve", "cyd.curve", "circumplex", "labels"]
    assert [path.name for path in found.paths] == [f"{name}.svg" for name in names]
    assert sorted(drawn.iterdir()) == sorted(found.paths)
    assert list(found.problems) == ["broken"]
    assert "broken.csv" in found.problems["broken"]
    assert "could not convert" in found.problems["broken"]
    assert told == [f"5 figures in {drawn}"]  # the problems are for the caller to tell


@pytest.mark.parametrize(("format", "begin"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_the_same_curves_give_the_same_bytes_whatever_a_readers_own_settings(tmp_path, format, begin):
    labelled(tmp_path / "curves", "ann", curve_of(0, spread=True))
    one = write_plots(tmp_path / "curves", tmp_path / "one", format, lambda line: None)
    with matplotlib.rc_context({"lines.linewidth": 9, "font.size": 30, "axes.grid": True}):
        two = write_plots(tmp_path / "curves", tmp_path / "two", format, lambda line: None)
        assert matplotlib.rcParams["font.size"] == 30  # and ours do not stay
    assert [p.name for p in one.paths] == [f"ann.curve.{format}", f"circumplex.{format}"]
    assert [p.read_bytes() for p in one.paths] == [p.read_bytes() for p in two.paths]
    assert all(p.read_bytes().startswith(begin) for p in one.paths)
    if format == "png":
        assert int.from_bytes(one.paths[0].read_bytes()[16:20]) == 7.2 * 300  # IHDR: the width at 300 dpi


def test_ccc_is_that_of_the_person_and_of_all_labelled_frames_together(drawn):
    pairs = {}
    for number, name in enumerate(("ann", "bob")):
        values = curve_of(number).track.values
        labels = 0.5 * values + 0.1
        labels[30:40] = np.nan
        pairs[name] = (values, labels)
    valence, arousal = ccc_of_tracks([pairs["ann"]])
    said = " ".join(words(drawn / "ann.curve.svg"))
    assert f"V {valence:.3f} A {arousal:.3f} mean {(valence + arousal) / 2:.3f}" in " ".join(said.split())
    valence, arousal = ccc_of_tracks(list(pairs.values()))
    said = " ".join(words(drawn / "labels.svg"))
    assert f"Valence, CCC {valence:.3f}" in said
    assert f"Arousal, CCC {arousal:.3f}" in said
    assert "160 labelled frames" in said
    assert "CCC" not in " ".join(words(drawn / "cyd.curve.svg"))


def test_the_figure_of_labels_is_without_what_the_run_was_trained_on(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "p")
    (ann,) = [about for about in recall(tmp_path / "p") if about.id == "ann"]
    remember(tmp_path / "p", replace(ann, trained_on=True))
    told: list[str] = []
    write_plots(tmp_path / "p", tmp_path / "drawn", "svg", told.append)
    said = " ".join(words(tmp_path / "drawn" / "labels.svg"))
    labels = 0.5 * curve_of(1).track.values + 0.1
    labels[30:40] = np.nan
    assert f"Valence, CCC {ccc_of_tracks([(curve_of(1).track.values, labels)])[0]:.3f}" in said
    assert any("trained on 1 of the labelled videos" in line for line in told)


def test_legend_names_what_is_there_and_nothing_else(drawn):
    marks = {"no face", "prediction", "label", "± 1 std over runs"}
    shown = {name: marks & set(words(drawn / f"{name}.curve.svg")) for name in ("ann", "bob", "cyd")}
    assert shown == {
        "ann": marks - {"± 1 std over runs"},
        "bob": marks,
        "cyd": {"no face", "prediction"},
    }


def test_the_circumplex_counts_frames_with_a_face_only(drawn):
    assert "240 frames with a face, 3 curves" in words(drawn / "circumplex.svg")  # 3 x (90 - 10)


def test_a_hostile_name_is_text(tmp_path):
    """A glyph that no font has would be a warning, which is an error here."""
    for number, name in enumerate(HOSTILE):
        labelled(tmp_path / "curves", name, curve_of(number, 10))
    found = write_plots(tmp_path / "curves", tmp_path / "plots", "svg", lambda line: None)
    assert not found.problems
    assert len(found.paths) == len(HOSTILE) + 1
    shown = {path: words(path) for path in found.paths}
    for path, said in shown.items():
        assert path.parent == tmp_path / "plots"
        assert not list(ET.parse(path).iter(f"{SVG}script"))
        assert said
    titles = {text for said in shown.values() for text in said}
    assert {*HOSTILE[:3]} <= titles


def test_what_no_font_has_becomes_a_box_and_a_long_name_keeps_both_ends():
    assert drawable("a\x00b\nc\u200d\udcffd", 70) == "a□b c□d"
    assert drawable("e\u0301", 70) == "é"
    cut = drawable("begin" + "x" * 300 + "end", 70)
    assert len(cut) == 70
    assert cut.startswith("begin")
    assert cut.endswith("end")


def test_an_hour_is_a_small_svg(tmp_path):
    rows = 60 * 60 * 30
    rng = np.random.default_rng(0)
    values = rng.uniform(-1, 1, (rows, 2)).astype(np.float32)
    curve = Curve(
        Track(values, np.arange(rows) / 30), rng.random(rows) > 0.3, spread=rng.uniform(0, 0.2, (rows, 2))
    )
    labelled(tmp_path, "hour", curve)
    write_plots(tmp_path, tmp_path / "plots", "svg", lambda line: None)
    for path in (tmp_path / "plots").iterdir():
        assert path.stat().st_size < 1_000_000
    assert "Time (min)" in words(tmp_path / "plots" / "hour.curve.svg")


def test_no_peak_is_lost_however_long_the_curve():
    times = np.cumsum(np.random.default_rng(0).uniform(0.01, 0.1, 50_000))  # a variable rate
    values = np.zeros(50_000, np.float32)
    values[31_234], values[40_001] = 0.9, -0.8
    values[10_000:20_000] = np.nan
    ax = Figure().subplots()
    plots._draw_line(ax, times, values, plots._columns(times))
    x, y = ax.lines[0].get_data()
    assert len(x) < 3000
    assert (np.diff(x) > 0).all()
    assert x[np.nanargmax(y)] == times[31_234]
    assert x[np.nanargmin(y)] == times[40_001]
    inside = (x > times[10_100]) & (x < times[19_900])
    assert inside.any()
    assert np.isnan(y[inside]).all()


def test_a_gap_is_shaded_from_halfway_to_its_neighbours_and_seen_in_an_hour():
    times = np.arange(100.0)
    ax = Figure().subplots()
    plots._draw_missing(ax, times, (times >= 10) & (times < 20), plots._columns(times))
    assert ax.collections[0].get_datalim(ax.transData).intervalx.tolist() == [9.5, 19.5]
    hour = np.arange(108_000) / 30
    ax = Figure().subplots()
    plots._draw_missing(ax, hour, hour == 1000.0, plots._columns(hour))
    (spans,) = ax.collections
    assert len(spans.get_paths()) == 1
    assert 0.5 * 3600 / plots._COLUMNS < spans.get_datalim(ax.transData).width < 2 * 3600 / plots._COLUMNS


def test_one_frame_and_no_face_at_all_are_drawn(tmp_path):
    one = Curve(Track(np.zeros((1, 2), np.float32), np.zeros(1)), np.ones(1, bool))
    nobody = Curve(Track(np.zeros((9, 2), np.float32), np.arange(9.0)), np.zeros(9, bool))
    unknown = Curve(Track(np.full((9, 2), np.nan, np.float32), np.arange(9.0)), np.zeros(9, bool))
    for name, curve in (("one", one), ("nobody", nobody), ("unknown", unknown)):
        labelled(tmp_path, name, curve)
    found = write_plots(tmp_path, tmp_path / "plots", "svg", lambda line: None)
    assert [p.name for p in found.paths] == [
        "nobody.curve.svg",
        "one.curve.svg",
        "unknown.curve.svg",
        "circumplex.svg",
    ]


def test_broken_labels_leave_the_curve(tmp_path):
    labelled(tmp_path, "ann", curve_of(0), np.zeros((90, 2)))
    (tmp_path / "labels" / "ann.txt").write_text("valence,arousal\n0.1,7\n")
    found = write_plots(tmp_path, tmp_path / "plots", "svg", lambda line: None)
    assert list(found.problems) == ["ann, labels"]
    assert "outside" in found.problems["ann, labels"]
    assert [p.name for p in found.paths] == ["ann.curve.svg", "circumplex.svg"]


def test_nothing_to_draw_is_said(tmp_path):
    (tmp_path / "x.csv").write_text("frame,time_s,valence,arousal,face\n")
    with pytest.raises(
        VacliError, match=r"no curve in .* can be drawn \(.*has no row.*\); make some with `vacli predict"
    ):
        write_plots(tmp_path, tmp_path / "plots", "png", lambda line: None)


def test_without_matplotlib_the_extra_is_named(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(VacliError, match=r"pip install 'vacli\[plot\]'"):
        write_plots(folder, tmp_path, "png", lambda line: None)
