"""The page of a folder of curves: a row with a small picture for each, and first of all what went wrong."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..store.curves import Curve
from ..store.labels import Moments
from .html import document, fill, text

_WIDTH, _HEIGHT, _STEPS = 170, 40, 85  # of a small curve: units of its picture, and columns it is averaged to
_FEW = 8  # notes that are shown at once


@dataclass(frozen=True)
class Row:
    """One person in one video, as a folder's page has him.

    link: URL of his page, relative to the folder, empty where there is none. person: empty where he is the only one.
    mean: valence and arousal. problem, warning, trained_on: as store.curves.About has them, and what was found since.
    """

    name: str
    person: str
    link: str = ""
    problem: str = ""
    warning: str = ""
    picture: str = ""
    mean: tuple[float, float] = (np.nan, np.nan)
    length_s: float = np.nan
    face_share: float = np.nan
    agreement: Moments | None = field(default=None, repr=False)
    trained_on: bool = False
    labels: Path | None = None


def index_page(rows: Sequence[Row]) -> str:
    """The document for all rows, in the order of their names; those without a curve are among the failures only."""
    rows = sorted(rows, key=lambda row: (_natural(row.name), row.person))
    curves = [row for row in rows if row.link]
    labelled = [row for row in curves if row.agreement is not None]
    heads = ["Video", "Curve", "Valence", "Arousal", "Length", "Face"]
    heads += ["CCC valence", "CCC arousal"] if labelled else []
    failed = [row for row in rows if row.problem]
    odd = [row for row in rows if row.warning]
    body = fill(
        "index.html",
        lead=text(_lead(curves, failed)),
        notices=_notes("bad", "Failed", [(row, row.problem) for row in failed])
        + _notes("odd", "Worth knowing", [(row, row.warning) for row in odd]),
        figures=_figures(labelled),
        heads="".join(_head(head, i) for i, head in enumerate(heads)),
        rows="\n".join(_line(row, place, bool(labelled)) for place, row in enumerate(curves)),
    )
    return document("Valence and arousal", body, {}, ["table.js", "index.js"], ["page.css", "index.css"])


def clock(length_s: float) -> str:
    """Seconds as people read them: 8.4 s, 1:05, 1:00:05."""
    if not np.isfinite(length_s):
        return ""
    if length_s < 60:
        return f"{length_s:.1f} s"
    minutes, seconds = divmod(round(length_s), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def signed(value: float, digits: int = 2) -> str:
    """A number with a true minus; empty for NaN."""
    if not np.isfinite(value):
        return ""
    return f"{value:.{digits}f}".replace("-", "−") if round(value, digits) else f"{0:.{digits}f}"


def small_picture(curve: Curve) -> str:
    """Both curves as an SVG of a kilobyte: means over equal stretches of time; stretches without a face are grey."""
    times_s = curve.track.times_s
    span_s = max(float(times_s[-1] - times_s[0]), 1e-9)
    column = np.minimum((times_s - times_s[0]) / span_s * _STEPS, _STEPS - 1).astype(int)
    valid = curve.track.valid
    count = np.bincount(column[valid], minlength=_STEPS)
    seen = np.bincount(column, weights=curve.face, minlength=_STEPS)
    every = np.bincount(column, minlength=_STEPS)
    x = (np.arange(_STEPS) + 0.5) * _WIDTH / _STEPS
    parts = [
        f'<svg class="spark" viewBox="0 0 {_WIDTH} {_HEIGHT}" preserveAspectRatio="none" aria-hidden="true">'
    ]
    parts += [
        f'<rect x="{from_ * _WIDTH / _STEPS:g}" width="{(to - from_) * _WIDTH / _STEPS:g}" height="{_HEIGHT}"/>'
        for from_, to in stretches((every > 0) & (seen < every / 2))
    ]
    parts.append(f'<path class="zero" d="M0 {_HEIGHT / 2:g}H{_WIDTH}"/>')
    for name, values in zip(("valence", "arousal"), curve.track.values.T, strict=True):
        sums = np.bincount(column[valid], weights=values[valid], minlength=_STEPS)
        means = sums[count > 0] / count[count > 0]
        y = _HEIGHT / 2 - np.clip(means, -1, 1) * (_HEIGHT / 2 - 1)
        points = " ".join(f"{a:g} {b:.1f}" for a, b in zip(x[count > 0], y, strict=True))
        parts.append(f'<path class="{name}" d="M{points}h1"/>' if points else "")
    return "".join([*parts, "</svg>"])


def stretches(mask: np.ndarray) -> list[tuple[int, int]]:
    """The half-open ranges in which a mask (T,) is true."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8)))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


# ---- parts of the page ---------------------------------------------------------------------------------------


def _natural(name: str) -> list[str | tuple[int, str]]:
    """A key that has clip 2 before clip 10; a number may be of any length, and is not made one."""
    parts = re.split(r"([0-9]+)", name)
    return [_digits(part) if i % 2 else part.casefold() for i, part in enumerate(parts)]


def _digits(part: str) -> tuple[int, str]:
    digits = part.lstrip("0")
    return len(digits), digits


def _lead(curves: Sequence[Row], failed: Sequence[Row]) -> str:
    total_s = float(np.nansum([row.length_s for row in curves])) if curves else 0.0
    said = [f"{len(curves)} curve{'' if len(curves) == 1 else 's'}", clock(total_s)]
    whole = sum(not row.link for row in failed)
    said += [f"{whole} failed"] if whole else []
    return " · ".join([*said, f"{len(failed) - whole} failed in part"] if len(failed) > whole else said)


def _figures(labelled: Sequence[Row]) -> str:
    """CCC over all rows of all labelled videos, as the challenge has it; without those the run was trained on."""
    # main, left and 1 may be one person, whose labels count once
    once = {
        row.labels or row.link: row for row in sorted(labelled, key=lambda row: row.person in ("", "main"))
    }
    labelled = list(once.values())
    others = [row for row in labelled if not row.trained_on]
    found = [row.agreement for row in others or labelled if row.agreement is not None]
    if not found:
        return ""
    valence, arousal = sum(found[1:], found[0]).ccc()
    many = f"over all frames of {len(found)} labelled curve{'' if len(found) == 1 else 's'}"
    seen = len(labelled) - len(others)
    if not others:
        many += ", all of videos that the run was trained on: it says nothing of others"
    elif seen:
        many += f"; {seen} more, of videos that the run was trained on, are left out"
    return (
        f'<ul class="figures"><li><b class="valence">{signed(valence, 3)}</b>CCC valence</li>'
        f'<li><b class="arousal">{signed(arousal, 3)}</b>CCC arousal</li>'
        f'<li class="soft">{many}</li></ul>'
    )


def _notes(kind: str, title: str, notes: Sequence[tuple[Row, str]]) -> str:
    if not notes:
        return ""
    items = "".join(f"<li>{_link(row)}: {text(said)}</li>" for row, said in notes)
    is_open = " open" if len(notes) <= _FEW else ""
    return f'<details class="notice {kind}"{is_open}><summary>{title}: {len(notes)}</summary><ul>{items}</ul></details>'


def _link(row: Row) -> str:
    name = f"<bdi>{text(row.name)}</bdi>"
    person = f' <span class="soft">{text(row.person)}</span>' if row.person else ""
    return (f'<a href="{text(row.link)}">{name}</a>' if row.link else name) + person


def _head(name: str, column: int) -> str:
    if name == "Curve":
        return '<th scope="col">Curve</th>'
    kind = ' class="number"' if column > 1 else ' aria-sort="ascending"'
    return f'<th scope="col"{kind if column else ""}><button type="button">{name}</button></th>'


def _line(row: Row, place: int, has_labels: bool) -> str:
    """data-key is what the column is sorted by: of names their place among the names."""
    notes = "".join(
        f'<small class="{kind}">{word}</small>'
        for kind, word, said in (
            ("bad", "failed in part", row.problem),
            ("odd", "see notes", row.warning),
            ("soft", "the run was trained on it", row.trained_on),
        )
        if said
    )
    cells = [
        _number("Valence", row.mean[0], signed(row.mean[0])),
        _number("Arousal", row.mean[1], signed(row.mean[1])),
        _number("Length", row.length_s, clock(row.length_s)),
        _number("Face", row.face_share, f"{row.face_share:.0%}"),
    ]
    if has_labels:
        found = (np.nan, np.nan) if row.agreement is None else row.agreement.ccc()
        cells += [
            _number(f"CCC {axis}", c, signed(c))
            for axis, c in zip(("valence", "arousal"), found, strict=True)
        ]
    name = f'<th scope="row" data-key="{place}">{_link(row)}{notes}</th>'
    return f'<tr>{name}<td class="curve">{row.picture}</td>{"".join(cells)}</tr>'


def _number(name: str, value: float, shown: str) -> str:
    key = f"{value:.6g}" if np.isfinite(value) else ""
    return f'<td class="number" data-name="{name}" data-key="{key}">{shown}</td>'
