"""The pages of a folder of curves, as text: whole whatever is broken, names and links that stay names and links."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urljoin

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from vacli import VacliError
from vacli.report.html import document, packed, text
from vacli.report.index import Row, clock, index_page, signed, small_picture, stretches
from vacli.report.pages import write_pages
from vacli.store.curves import About, Curve, remember, write_csv
from vacli.store.labels import ccc_of_tracks
from vacli.store.names import plain_id
from vacli.store.track import Track

HOSTILE = (
    "<script>alert(1)</script>.mp4",
    "a\"b'c&d.mp4",
    "\U0001f600 \U0001f3ac.mp4",
    "v" * 196 + ".mp4",
    "100%#?.mp4",
    "javascript:alert(1).mp4",
    "&lt;b&gt; $name {title} </title>.mp4",
)


class _Read(HTMLParser):
    """Every element, and the text within each kind of it."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self._open = [""]
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "input", "br", "link"):
            self._open.append(tag)

    def handle_endtag(self, tag):
        if tag in self._open:
            while self._open.pop() != tag:
                pass

    def handle_data(self, data):
        self.texts.setdefault(self._open[-1], []).append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.elements if name == tag]

    def data(self):
        return json.loads(next(t for t in self.texts["script"] if t.startswith("{")))


def a_curve(rows: int = 50, rate_hz: float = 25.0, person: str = "main", spread: bool = False) -> Curve:
    times_s = np.arange(rows) / rate_hz
    values = np.stack([np.sin(times_s), np.cos(times_s)], 1).astype(np.float32) * np.float32(0.5)
    face = np.ones(rows, bool)
    face[rows // 4 : rows // 2] = False
    return Curve(Track(values, times_s), face, person, np.full((rows, 2), 0.1) if spread else None)


def put(folder: Path, name: str, curve: Curve | None = None, **facts) -> About:
    """A curve with its record, as `vacli predict` leaves them."""
    own_id = plain_id(facts.pop("id", Path(name).with_suffix("").as_posix()))
    csv = folder / f"{own_id}.csv"
    write_csv(csv, curve or a_curve())
    about = About(own_id, facts.pop("video_id", own_id), name, csv=csv, **facts)
    remember(folder, about)
    return about


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_is_text_wherever_it_stands(tmp_path, name):
    video = tmp_path / "videos" / name
    video.parent.mkdir(parents=True)
    video.write_bytes(b"")
    about = put(tmp_path / "p", name, video=video, warning=name, run={"head": name})
    index = write_pages(tmp_path / "p").index
    page = _Read(index.parent / f"{about.id}.html")
    assert name in page.texts["title"]
    assert name in page.texts["bdi"]
    assert name in page.texts["dd"]
    assert len(page.all("script")) == 4  # data and three of ours
    assert not any(key.startswith("on") for _, attrs in page.elements for key in attrs)
    [source] = [attrs["src"] for attrs in page.all("video")]
    assert (index.parent / unquote(source)).resolve() == video.resolve()
    assert not re.search(r"[#?:<>\"'& ]", source)
    row = _Read(index)
    assert name in row.texts["bdi"]
    assert len(row.all("script")) == 3  # data and two of ours
    assert {(index.parent / unquote(a["href"])).is_file() for a in row.all("a")} == {True}


@given(st.text())
def test_text_reads_back_as_it_was_or_is_marked(said):
    shown = text(said)
    assert not set(shown) & set("<>\"'")
    shown.encode()  # no lone surrogate is left
    parser = HTMLParser()
    read: list[str] = []
    parser.handle_data = read.append  # type: ignore[method-assign]
    parser.feed(shown)
    parser.close()
    assert len("".join(read)) == len(said)


def test_data_reads_back_and_cannot_break_out():
    data = {"</script><script>": ["\u2028", "]]>", "<!--", "&amp;", "\udc80", 1.5]}
    page = document("t", "<p>b</p>", data, ["index.js"], ["page.css"])
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert json.loads(found[1]) == data
    assert page.count("<script") == 2
    with pytest.raises(ValueError, match="JSON"):
        document("t", "", [np.nan], [], [])


def test_only_our_own_scripts_may_run():
    page = document("t", "", {}, ["index.js"], ["page.css", "index.css"])
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1]
    assert policy.startswith("default-src 'none';")
    assert "unsafe" not in policy
    assert "http" not in policy
    for tag in ("script", "style"):
        for inside in re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL):
            assert base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode() in policy


def test_somebody_elses_script_comes_with_its_licence():
    assert "The MIT License" in document("t", "", {}, ["uPlot.iife.min.js"], [])


def test_an_array_reads_back(tmp_path):
    values = np.array([[1.5, np.nan], [-0.25, 3]], ">f4")
    back = np.frombuffer(base64.b64decode(packed(values)), "<f4").reshape(2, 2)
    np.testing.assert_array_equal(back, values)


def test_the_data_of_a_page_is_that_of_its_csv(tmp_path):
    curve = a_curve(spread=True)
    put(tmp_path, "one.mp4", curve)
    write_pages(tmp_path)
    data = _Read(tmp_path / "one.html").data()
    [person] = data["people"]
    times_s = np.frombuffer(base64.b64decode(data["clocks"][person["clock"]]), "<f8")
    np.testing.assert_allclose(times_s, curve.track.times_s, atol=1e-6)
    for k, axis in enumerate(("valence", "arousal")):
        values, spread = (
            np.frombuffer(base64.b64decode(person[axis][key]), "<f4") for key in ("values", "spread")
        )
        np.testing.assert_allclose(values, curve.track.values[:, k], atol=1e-6)
        np.testing.assert_allclose(spread, 0.1, atol=1e-6)
    assert person["gaps"] == [[12, 25]]


def test_what_is_broken_is_listed_and_stops_nothing(tmp_path):
    put(tmp_path, "good.mp4")
    put(tmp_path, "lost.mp4", video=tmp_path / "gone.mp4")
    put(tmp_path, "no_labels.mp4", labels=tmp_path / "gone.txt")
    bad = put(tmp_path, "bad.mp4")
    bad.csv.write_text("frame,time_s,valence,arousal,face\n1,0,?,0,1\n")
    empty = put(tmp_path, "empty.mp4")
    empty.csv.write_text("frame,time_s,valence,arousal,face\n")
    remember(tmp_path, About("failed", "failed", "failed.mp4", problem="moov atom not found"))
    told: list[str] = []
    pages = write_pages(tmp_path, told.append)
    assert sorted(p.name for p in tmp_path.glob("*.html")) == [
        "good.html", "index.html", "lost.html", "no_labels.html",
    ]  # fmt: skip
    listed = " ".join(_Read(pages.index).texts["li"])
    for reason in ("moov atom not found", "'?'", "has no row", "gone.mp4 any more", "gone.txt"):
        assert reason in listed
    assert list(pages.problems) == ["bad.mp4", "empty.mp4"]  # not what failed in predict
    assert "'?'" in pages.problems["bad.mp4"]
    assert list(pages.unread_labels) == ["no_labels.mp4"]
    assert "gone.txt" in pages.unread_labels["no_labels.mp4"]
    assert [line.split(":")[0] for line in told] == ["lost.mp4"]  # its curve is shown all the same
    assert "gone.mp4 any more" in " ".join(_Read(tmp_path / "lost.html").texts["p"])


def test_bare_csvs_have_pages_without_a_video(tmp_path):
    write_csv(tmp_path / "deep" / "one.csv", a_curve())
    index = write_pages(tmp_path).index
    page = _Read(tmp_path / "deep" / "one.html")
    assert not page.all("video")
    assert "It is not known which video" in " ".join(page.texts["p"])
    [home] = [a["href"] for a in page.all("a") if a["href"].endswith("index.html")]
    assert (tmp_path / "deep" / home).resolve() == index.resolve()


def test_a_folder_that_is_a_link_leads_to_its_videos(tmp_path):
    (tmp_path / "scratch" / "far" / "p").mkdir(parents=True)
    video = tmp_path / "scratch" / "far" / "one.mp4"
    video.write_bytes(b"")
    linked = tmp_path / "predictions"
    linked.symlink_to(tmp_path / "scratch" / "far" / "p")
    put(linked, "one.mp4", video=video)
    index = write_pages(linked).index
    [source] = [attrs["src"] for attrs in _Read(linked / "one.html").all("video")]
    assert urljoin((linked / "one.html").as_uri(), source) == video.as_uri()  # as a browser has it
    assert [a["href"] for a in _Read(index).all("a")] == ["one.html"]


def test_nothing_to_show_is_a_users_mistake(tmp_path):
    with pytest.raises(VacliError, match="vacli predict"):
        write_pages(tmp_path)


def test_a_video_called_index_does_not_take_the_indexs_place(tmp_path):
    put(tmp_path, "index.mp4")
    index = write_pages(tmp_path).index
    [link] = [a["href"] for a in _Read(index).all("a")]
    assert link != "index.html"
    assert "index.mp4" in _Read(tmp_path / link).texts["title"]


def test_the_browser_gets_what_it_can_play(tmp_path):
    video = tmp_path / "videos" / "old.avi"
    video.parent.mkdir()
    video.write_bytes(b"")
    for name in ("copied", "hopeless", "failing"):
        put(tmp_path, f"{name}.avi", video=video)

    def playable(video: Path, copy: Path) -> Path | None:
        if copy.stem == "failing":
            raise VacliError("no codec for it")
        return copy if copy.stem == "copied" else None

    write_pages(tmp_path, playable=playable)
    assert _Read(tmp_path / "copied.html").all("video")[0]["src"] == "media/copied.mp4"
    for name, reason in (("hopeless", "cannot play"), ("failing", "No codec for it")):
        page = _Read(tmp_path / f"{name}.html")
        assert not page.all("video")
        assert reason in " ".join(page.texts["p"])


def test_everybody_in_a_video_is_on_one_page(tmp_path):
    for person in ("left", "right"):
        put(tmp_path, "two.mp4", a_curve(person=person), id=f"two_{person}", video_id="two", person=person)
    remember(tmp_path, About("two_3", "two", "two.mp4", "third", problem="his face is never seen"))
    index = write_pages(tmp_path).index
    page = _Read(tmp_path / "two.html")
    assert page.texts["label"] == ["left", "right"]
    assert len(page.data()["people"]) == 2
    assert len(page.data()["clocks"]) == 1  # the same for both
    assert "his face is never seen" in " ".join(page.texts["p"])
    assert [a["href"] for a in _Read(index).all("a")] == ["two.html#person-0", "two.html#person-1"]


def test_ccc_is_that_of_the_labels(tmp_path):
    curve = a_curve(200)
    labels = np.clip(curve.track.values * 0.7 + 0.1, -1, 1)
    labels[30:40] = -5
    path = tmp_path / "labels.txt"
    path.write_text("valence,arousal\n" + "".join(f"{v:.6f},{a:.6f}\n" for v, a in labels))
    put(tmp_path / "p", "one.mp4", curve, labels=path)
    put(tmp_path / "p", "other.mp4", curve)
    index = write_pages(tmp_path / "p").index
    rated = np.where(labels == -5, np.nan, labels).astype(np.float32)
    valence, arousal = ccc_of_tracks([(curve.track.values, rated)])
    [person] = _Read(index.parent / "one.html").data()["people"]
    assert person["valence"]["ccc"] == pytest.approx(valence, abs=1e-5)
    assert person["arousal"]["ccc"] == pytest.approx(arousal, abs=1e-5)
    assert f"{valence:.3f}" in _Read(index).texts["b"]
    keys = [td["data-key"] for td in _Read(index).all("td") if td.get("data-name") == "CCC valence"]
    assert float(keys[0]) == pytest.approx(valence, abs=1e-5)
    assert keys[1] == ""  # without labels there is none


@pytest.mark.parametrize("trained_on", [("one",), ("one", "two")])
def test_what_the_run_was_trained_on_does_not_flatter_its_ccc(tmp_path, trained_on):
    figures = {}
    for name, error in (("one", 0.0), ("two", 0.5)):
        curve = a_curve(200)
        labels = np.clip(curve.track.values + error, -1, 1)
        path = tmp_path / f"{name}.txt"
        path.write_text("valence,arousal\n" + "".join(f"{v:.6f},{a:.6f}\n" for v, a in labels))
        put(tmp_path / "p", f"{name}.mp4", curve, labels=path, trained_on=name in trained_on)
        figures[name] = (curve.track.values, labels)
    index = _Read(write_pages(tmp_path / "p").index)
    judged = [figures[name] for name in figures if name not in trained_on] or list(figures.values())
    assert index.texts["b"][:2] == [f"{c:.3f}" for c in ccc_of_tracks(judged)]
    said = " ".join(index.texts["li"])
    assert ("it says nothing of others" in said) == (len(trained_on) == 2)
    assert ("1 more, of videos that the run was trained on, are left out" in said) == (len(trained_on) == 1)
    assert index.texts["small"] == ["the run was trained on it"] * len(trained_on)
    assert "the run was trained on this video" in " ".join(_Read(tmp_path / "p" / "one.html").texts["dd"])


def test_a_row_of_the_index_says_what_its_curve_says(tmp_path):
    curve = a_curve(100, rate_hz=10)
    put(tmp_path, "one.mp4", curve)
    cells = {
        td["data-name"]: td["data-key"]
        for td in _Read(write_pages(tmp_path).index).all("td")
        if "data-name" in td
    }
    assert float(cells["Valence"]) == pytest.approx(curve.track.values[:, 0].mean(), abs=1e-5)
    assert float(cells["Arousal"]) == pytest.approx(curve.track.values[:, 1].mean(), abs=1e-5)
    assert float(cells["Length"]) == pytest.approx(10)
    assert float(cells["Face"]) == pytest.approx(0.75)


def test_one_frame_and_no_known_value_have_pages_too(tmp_path):
    put(tmp_path, "one.mp4", a_curve(1))
    put(
        tmp_path,
        "none.mp4",
        Curve(Track(np.full((3, 2), np.nan, np.float32), np.arange(3.0)), np.zeros(3, bool)),
    )
    write_pages(tmp_path)
    assert (tmp_path / "one.html").is_file()
    assert "nan" not in " ".join(_Read(tmp_path / "none.html").texts["dd"])


def test_the_index_of_a_thousand_videos_stays_small(tmp_path):
    picture = small_picture(a_curve(300))
    rows = [Row(f"clip {i}.mp4", "", f"clip {i}.html", picture=picture, mean=(0.5, 0)) for i in range(1000)]
    page = tmp_path / "index.html"
    page.write_text(index_page(rows[::-1]), encoding="utf-8")
    assert page.stat().st_size < 20_000 + 1000 * 3_500
    assert _Read(page).texts["bdi"] == [row.name for row in rows]  # clip 2 before clip 10


def test_a_number_in_a_name_may_be_of_any_length(tmp_path):
    names = ["clip 2", "clip 007", "clip 10", "clip " + "9" * 5000, "clip 1" + "0" * 5000]
    (tmp_path / "index.html").write_text(index_page([Row(name, "", "a.html") for name in names[::-1]]))
    assert _Read(tmp_path / "index.html").texts["bdi"] == names


def test_a_video_that_fails_now_loses_the_page_of_its_earlier_curve(tmp_path):
    put(tmp_path, "good.mp4")
    for person in ("left", "right"):
        put(tmp_path, "two.mp4", a_curve(person=person), id=f"two_{person}", video_id="two", person=person)
    bad = put(tmp_path, "bad.mp4")
    write_pages(tmp_path)
    assert (tmp_path / "bad.html").is_file()
    remember(tmp_path, About("bad", "bad", "bad.mp4", problem="moov atom not found"))
    remember(tmp_path, About("two_right", "two", "two.mp4", "right", problem="his face is never seen"))
    bad.csv.unlink()
    pages = write_pages(tmp_path)
    assert sorted(p.name for p in tmp_path.glob("*.html")) == ["good.html", "index.html", "two.html"]
    assert pages.problems == {}


def test_a_page_that_cannot_be_written_is_a_problem_and_the_others_are(tmp_path):
    put(tmp_path, "good.mp4")
    for person in ("left", "right"):
        put(tmp_path, "two.mp4", a_curve(person=person), id=f"two_{person}", video_id="two", person=person)
    remember(tmp_path, About("gone", "gone", "gone.mp4", problem="no video in it"))
    for name in ("two.html", "gone.html"):  # no file can be put in the place of a folder
        (tmp_path / name).mkdir()
    pages = write_pages(tmp_path)
    assert list(pages.problems) == ["gone.mp4", "two.mp4 (left)", "two.mp4 (right)"]
    assert "cannot write" in pages.problems["two.mp4 (left)"]
    assert "cannot remove" in pages.problems["gone.mp4"]
    assert [a["href"] for a in _Read(pages.index).all("a")] == ["good.html"]


def test_no_link_leads_what_is_written_out_of_the_folder(tmp_path):
    folder, home = tmp_path / "predictions", tmp_path / "home"
    home.mkdir()
    (home / "x.html").write_text("mine")
    put(folder, "good.mp4", video=home / "x.html")
    for name in ("sub", "media"):
        (folder / name).symlink_to(home)
    remember(folder, About("sub/x", "sub/x", "x.mp4", csv=folder / "good.csv"))
    remember(folder, About("x", "sub/x", "x.mp4", csv=folder / "good.csv"))
    pages = write_pages(folder, playable=lambda video, copy: copy.write_text("a copy"))
    assert [a["href"] for a in _Read(pages.index).all("a")] == ["good.html", "good.html"]
    assert "leads out of" in " ".join(_Read(folder / "good.html").texts["p"])
    assert {path.name: path.read_text() for path in home.iterdir()} == {"x.html": "mine"}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes have no name on this system")
def test_hostile_records_and_curves_stop_nothing(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    put(tmp_path, "pipe.mp4", labels=tmp_path / "pipe.txt")
    put(tmp_path, "9" * 4000)
    times_s = {"far": ("-1e308", "1e308"), "near": ("0", "5e-324")}
    for name, (first, last) in times_s.items():
        (tmp_path / f"{name}.csv").write_text(
            f"frame,time_s,valence,arousal,face\n1,{first},0,0,1\n2,{last},0,0,1\n"
        )
    pages = write_pages(tmp_path)
    assert list(pages.problems) == ["far"]
    assert "times beyond" in pages.problems["far"]
    assert "no file" in pages.unread_labels["pipe.mp4"]


@pytest.mark.parametrize(
    ("length_s", "shown"),
    [(8.44, "8.4 s"), (65, "1:05"), (3605.4, "1:00:05"), (59.99, "60.0 s"), (np.nan, "")],
)
def test_a_length_is_read_at_a_glance(length_s, shown):
    assert clock(length_s) == shown


def test_a_number_has_a_true_minus_and_no_negative_zero():
    assert [signed(x) for x in (-0.5, 0.25, -0.001, np.nan)] == ["−0.50", "0.25", "0.00", ""]


@given(st.lists(st.booleans()))
def test_stretches_are_where_the_mask_is_true(mask):
    found = np.zeros(len(mask), bool)
    for first, last in stretches(np.array(mask, bool)):
        assert not found[first:last].any()
        found[first:last] = True
    assert found.tolist() == mask
