"""The pages of a folder of curves: one for each video with everybody in it, and an index; they need no network."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from .. import VacliError
from ..store.curves import About, Curve, lies_in, read_csv, recall, seen_from, whole_file
from ..store.labels import Moments, read_va
from ..store.track import Track
from .html import document, fill, packed, text
from .index import Row, clock, index_page, signed, small_picture, stretches

MEDIA = "media"  # the folder of copies a browser can play, in a folder of curves
_AXES = ("valence", "arousal")


@dataclass(frozen=True)
class Pages:
    """What was written: the page of the folder, and by name why a curve, or its labels, could not be shown."""

    index: Path
    problems: dict[str, str] = field(default_factory=dict)
    unread_labels: dict[str, str] = field(default_factory=dict)


Playable = Callable[[Path, Path], Path | None]
"""(video, wanted copy) -> the file a browser plays: the video, the copy, or None. Raises VacliError."""


@dataclass(frozen=True)
class _Person:
    """One person of a video, with his curve; labels (T, 2) where there are some."""

    about: About
    curve: Curve
    labels: Track | None = None
    agreement: Moments | None = None

    @property
    def length_s(self) -> float:
        times_s = self.curve.track.times_s
        return float(times_s[-1] + (np.median(np.diff(times_s)) if len(times_s) > 1 else 0))


def write_pages(
    folder: Path,
    tell: Callable[[str], object] = lambda line: None,
    playable: Playable = lambda video, copy: video,
) -> Pages:
    """Write folder/<video_id>.html for each video, and folder/index.html.

    A CSV or labels that cannot be read, a page that cannot be written: the pages and what is returned say so, and the
    others go on. Of a lost video the pages say so and `tell` is told: its curve is shown without it. A video in which
    nobody has a curve any more loses its page. Raises VacliError where there is no curve at all, or the index cannot
    be written.
    """
    folder = Path(folder)
    pages = Pages(folder / "index.html")
    videos: dict[str, list[About]] = {}
    for about in recall(folder):
        videos.setdefault(about.video_id, []).append(about)
    rows: list[Row] = []
    for video_id, people in videos.items():
        rows += _write_video(folder, video_id, people, pages, tell, playable)
    with whole_file(pages.index) as f:
        f.write(index_page(rows))
    return pages


def _write_video(
    folder: Path,
    video_id: str,
    abouts: Sequence[About],
    pages: Pages,
    tell: Callable[[str], object],
    playable: Playable,
) -> list[Row]:
    """One page, if anybody in the video has a curve; a row for each person either way."""
    is_alone = len(abouts) == 1

    def note(notes: dict[str, str], about: About, e: VacliError) -> None:
        name = about.name if is_alone else f"{about.name} ({about.person})"
        notes[name] = _joined(notes.get(name), e)

    people: list[_Person] = []
    failed: list[About] = []
    for about in abouts:
        try:
            if about.csv is None:
                failed.append(about)
            else:
                people.append(_person(about, read_csv(about.csv), partial(note, pages.unread_labels)))
        except VacliError as e:
            note(pages.problems, about, e)
            failed.append(replace(about, problem=_joined(about.problem, e)))
    page = folder / _page_of(video_id)
    odd = ""
    try:
        if people:
            odd = _write_page(page, folder, people, failed, tell, playable)
        else:
            _remove(page)
    except VacliError as e:
        for about in [p.about for p in people] or failed[:1]:
            note(pages.problems, about, e)
        failed += [replace(p.about, problem=_joined(p.about.problem, e)) for p in people]
        people = []
    link = _url(page, folder)
    rows = [
        _row(p, f"{link}#person-{i}" if len(people) > 1 else link, is_alone, odd)
        for i, p in enumerate(people)
    ]
    return rows + [
        Row(a.name, "" if is_alone else a.person, problem=a.problem or "no curve", warning=a.warning or "")
        for a in failed
    ]


def _write_page(
    page: Path,
    folder: Path,
    people: Sequence[_Person],
    failed: Sequence[About],
    tell: Callable[[str], object],
    playable: Playable,
) -> str:
    """Returns why there is no video on it, where there should be one. Raises VacliError if it cannot be written."""
    copy = folder / MEDIA / f"{people[0].about.video_id}.mp4"
    source, lost = _source(page, folder, copy, people, playable)
    with whole_file(page) as f:
        f.write(_video_page(page, folder, source, lost, people, failed))
    if not lost or not any(p.about.video for p in people):  # a bare CSV has none, and that is as it should be
        return ""
    tell(f"{people[0].about.name}: {lost}")
    return lost


def _remove(page: Path) -> None:
    """The page of an earlier time, when there was a curve. Raises VacliError if it stays."""
    try:
        page.unlink(missing_ok=True)
    except OSError as e:
        raise VacliError(f"cannot remove {page}: {e.strerror or e}; it is of an earlier curve") from e


def _person(about: About, curve: Curve, note: Callable[[About, VacliError], None]) -> _Person:
    """Raises VacliError for a curve without a row. Labels that cannot be read are noted, and a warning."""
    if not len(curve.track):
        raise VacliError(f"the curve {about.csv} has no row; write it again with `vacli predict`")
    if about.labels is None:
        return _Person(about, curve)
    try:
        labels = read_va(about.labels, curve.track.times_s)
    except VacliError as e:
        note(about, e)
        return _Person(replace(about, warning=_joined(about.warning, e)), curve)
    agreement = Moments.of(curve.track.values, labels.values)
    return _Person(about, curve, labels, agreement if agreement.count else None)


def _row(person: _Person, link: str, is_alone: bool, lost: str) -> Row:
    about, curve = person.about, person.curve
    return Row(
        about.name,
        "" if is_alone else about.person,
        link,
        about.problem or "",
        _joined(about.warning, lost),
        small_picture(curve),
        _means(curve),
        person.length_s,
        float(curve.face.mean()),
        person.agreement,
        about.trained_on,
        about.labels,
    )


def _means(curve: Curve) -> tuple[float, float]:
    values = curve.track.values[curve.track.valid].astype(np.float64)
    valence, arousal = values.mean(axis=0) if len(values) else (np.nan, np.nan)
    return float(valence), float(arousal)


def _joined(*said: object) -> str:
    return "; ".join(str(each) for each in said if each)


# ---- where things lie ----------------------------------------------------------------------------------------


def _page_of(video_id: str) -> str:
    """`index` is taken: a video of that name has another page."""
    if video_id.casefold() == "index":
        video_id += f"-{hashlib.sha256(video_id.encode()).hexdigest()[:8]}"
    return f"{video_id}.html"


def _url(path: Path, start: Path) -> str:
    """A URL relative to the folder, percent-encoded: no character of a name has a meaning in it.

    Of a folder that is a link a browser takes `..` where it stands, not where it leads: then it is an absolute one.
    """
    try:
        seen = seen_from(start, path)
    except ValueError:  # on another drive of Windows
        return path.resolve().as_uri()
    if seen.startswith("../") and start.resolve() != Path(os.path.abspath(start)):
        return path.resolve().as_uri()
    return quote(os.fsencode(seen), safe="/")


def _source(
    page: Path, folder: Path, copy: Path, people: Sequence[_Person], playable: Playable
) -> tuple[str, str]:
    """The URL of what the page plays, and why there is none; one of them is empty."""
    video = next((p.about.video for p in people if p.about.video is not None), None)
    if video is None:
        return "", "It is not known which video this curve is of"
    if not video.is_file():
        return "", f"the video is not at {os.path.normpath(video)} any more"
    if not lies_in(folder, copy):
        return "", f"{copy.parent} is a link that leads out of {folder}, and nothing is written there"
    try:
        found = playable(video, copy)
    except VacliError as e:
        return "", str(e)
    return (
        (_url(found, page.parent), "") if found else ("", f"a browser cannot play {os.path.normpath(video)}")
    )


# ---- the page of a video -------------------------------------------------------------------------------------


def _video_page(
    page: Path, folder: Path, source: str, lost: str, people: Sequence[_Person], failed: Sequence[About]
) -> str:
    name = people[0].about.name
    is_what = f'src="{text(source)}" aria-label="{text(name)}"'
    video = f'<video id="video" {is_what} controls preload="metadata" playsinline></video>'
    body = fill(
        "video.html",
        home=_url(folder / "index.html", page.parent),
        name=text(name),
        lead=text(_lead(people)),
        notices=_notices([p.about for p in people] + list(failed)),
        people=_choice(people),
        filled=": filled in from its neighbours" if any(p.curve.face.any() for p in people) else "",
        video=video if source else "",
        video_problem=text(f"{lost[:1].upper()}{lost[1:]}. The curves work without it.") if lost else "",
        video_problem_hidden="" if lost else " hidden",
        facts="\n".join(_facts(i, person, page.parent) for i, person in enumerate(people)),
    )
    scripts = ["uPlot.iife.min.js", "chart.js", "video.js"]
    return document(name, body, _data(people), scripts, ["uPlot.min.css", "page.css", "video.css"])


def _data(people: Sequence[_Person]) -> dict[str, Any]:
    """What chart.js draws. Everybody in a video mostly has the same clock; it is kept once."""
    clocks: dict[str, int] = {}
    found = []
    for person in people:
        track, spread, labels = person.curve.track, person.curve.spread, person.labels
        ccc = person.agreement.ccc() if person.agreement else None
        axes = {
            axis: {
                "values": packed(track.values[:, k].astype(np.float32)),
                "spread": None if spread is None else packed(spread[:, k].astype(np.float32)),
                "labels": None if person.agreement is None or labels is None else packed(labels.values[:, k]),
                "ccc": None if ccc is None else float(ccc[k]),
            }
            for k, axis in enumerate(_AXES)
        }
        clock_at = clocks.setdefault(packed(track.times_s), len(clocks))
        found.append({"clock": clock_at, "gaps": stretches(~person.curve.face), **axes})
    return {"clocks": list(clocks), "people": found}


def _lead(people: Sequence[_Person]) -> str:
    first = people[0]
    frames = len(first.curve.track)
    said = [clock(first.length_s), f"{frames:,} frame{'' if frames == 1 else 's'}"]
    if len(people) > 1:
        # main, left and 1 may be the same person, chosen otherwise
        return " · ".join([*said, f"{len(people)} curves"])
    return " · ".join([*said, f"a face in {first.curve.face.mean():.0%}"])


def _notices(abouts: Sequence[About]) -> str:
    def told(kind: str, about: About, said: str | None) -> str:
        who = f"<b>{text(about.person)}</b>: " if len(abouts) > 1 else ""
        return f'<div class="notice {kind}"><p>{who}{text(said)}</p></div>' if said else ""

    return "".join(told("bad", a, a.problem) + told("odd", a, a.warning) for a in abouts)


def _choice(people: Sequence[_Person]) -> str:
    if len(people) == 1:
        return ""
    choices = (
        f'<label><input type="radio" name="person" value="{i}"{"" if i else " checked"}>'
        f"{text(person.about.person)}</label>"
        for i, person in enumerate(people)
    )
    return f'<fieldset class="people"><legend>Person</legend>{"".join(choices)}</fieldset>'


def _facts(index: int, person: _Person, here: Path) -> str:
    about, curve = person.about, person.curve
    valence, arousal = _means(curve)
    facts: dict[str, Any] = {
        "Person": "" if about.person == "main" else about.person,
        "Frames": f"{len(curve.track):,}",
        "Length": clock(person.length_s),
    }
    step_s = np.median(np.diff(curve.track.times_s)) if len(curve.track) > 1 else 0
    if step_s >= 1e-6:  # a stranger's times may lie so near each other that there is no rate
        facts["Rate"] = f"{1 / step_s:.3g} frames a second"
    facts["Face"] = f"seen in {curve.face.mean():.1%} of the frames"
    facts["Mean"] = f"valence {signed(valence, 3)}, arousal {signed(arousal, 3)}"
    if curve.spread is not None and len(found := curve.spread[~np.isnan(curve.spread).any(axis=1)]):
        facts["Spread"] = "valence {:.3f}, arousal {:.3f} on average".format(*found.mean(axis=0))
    if person.agreement is not None:
        facts["CCC"] = "valence {}, arousal {}".format(*(signed(c, 3) for c in person.agreement.ccc()))
        facts["Labelled"] = f"{int(person.agreement.count):,} frames"
    if about.trained_on:
        vain = ": the CCC says nothing of others" if person.agreement else ""
        facts["Training"] = f"the run was trained on this video{vain}"
    facts |= {_titled(key): _said(value) for key, value in about.run.items()}
    lines = [f"<dt>{text(key)}</dt><dd>{text(value)}</dd>" for key, value in facts.items() if value != ""]
    if about.csv is not None:
        lines.append(f'<dt>Values</dt><dd><a href="{_url(about.csv, here)}">{text(about.csv.name)}</a></dd>')
    hidden = " hidden" if index else ""
    facts_of_him = f'<h2>Facts</h2><dl class="facts">{"".join(lines)}</dl>'
    return f'<div class="card" data-person="{index}"{hidden}>{facts_of_him}</div>'


def _titled(key: str) -> str:
    """smoothing_s: "Smoothing (s)"."""
    words, _, unit = key.rpartition("_")
    named = f"{words} ({unit.replace('hz', 'Hz')})" if words and unit in ("s", "ms", "hz") else key
    return (named[:1].upper() + named[1:]).replace("_", " ")


def _said(value: Any) -> str:
    if isinstance(value, list | tuple) and all(isinstance(each, str | int | float) for each in value):
        return ", ".join(map(str, value))
    if isinstance(value, dict | list | tuple):
        return json.dumps(value, default=str, ensure_ascii=False)
    return "" if value is None else str(value)
