"""A curve for other programs: parquet for tables, JSON, ELAN's .eaf for annotators, WebVTT subtitles for players."""

from __future__ import annotations

import contextlib
import html
import json
import re
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from .. import VacliError, __version__, plain
from .curves import HEADER, About, Curve, facts_of, seen_from, whole_file

# Shape legend: T rows of the curve, S stretches of time.

_UNITS = {
    "frame": "decoded frames, counted from 1",
    "time_s": "seconds from the start of the video",
    "valence": "-1 (negative) to 1 (positive)",
    "arousal": "-1 (passive) to 1 (active)",
    "face": "false: nobody was seen and the row is filled in",
    "person": "whose curve it is",
    "valence_std": "standard deviation over the runs of an ensemble",
    "arousal_std": "standard deviation over the runs of an ensemble",
}


def write(path: Path, curve: Curve, about: About, format: str) -> None:
    """The curve as one of FORMATS; the file at `path` is whole or as it was before.

    eaf: beside it `<stem>_tsconf.xml`, by which ELAN draws the CSV of `about`.

    Raises VacliError if it cannot be written or the format's package is not installed, ValueError for another format.
    """
    if format not in FORMATS:
        raise ValueError(f"no such format: {format!r}; wanted one of {', '.join(FORMATS)}")
    FORMATS[format](path, curve, about)


def require(format: str) -> None:
    """Raises VacliError if the format's package is not installed: before anything is computed for it."""
    with _extra({"eaf": "elan"}.get(format, format)):
        if format == "parquet":
            import pyarrow.parquet  # noqa: F401
        elif format == "eaf":
            import pympi  # noqa: F401


@contextlib.contextmanager
def _extra(extra: str) -> Iterator[None]:
    try:
        yield
    except ImportError as e:
        raise VacliError(
            f"this format needs {e.name or 'a package'}, which is not here: pip install 'vacli[{extra}]'"
        ) from e


# ---- columns: parquet and JSON -------------------------------------------------------------------------------


def _columns(curve: Curve) -> dict[str, np.ndarray]:
    """The numbers of the CSV by its names, each (T,); NaN where something is not known."""
    rows = len(curve.track)
    values, spread = curve.track.values, curve.spread
    spread = np.full((rows, 2), np.nan, np.float32) if spread is None else spread
    columns = (
        np.arange(1, rows + 1, dtype=np.int32),
        curve.track.times_s,
        *values.T.astype(np.float32),
        curve.face.astype(bool),
        *spread.T.astype(np.float32),
    )
    return dict(zip((name for name in HEADER if name != "person"), columns, strict=True))


def _parquet(path: Path, curve: Curve, about: About) -> None:
    with _extra("parquet"):
        import pyarrow as pa
        import pyarrow.parquet as parquet

    arrays = {
        name: pa.array(column, mask=np.isnan(column) if column.dtype == np.float32 else None)
        for name, column in _columns(curve).items()
    }
    who = np.zeros(len(curve.track), np.int32)
    arrays["person"] = pa.DictionaryArray.from_arrays(who, pa.array([plain(curve.person)]))
    facts = {"vacli": __version__, "id": about.id, "video": about.name, "person": curve.person}
    metadata = {key: plain(text) for key, text in facts.items()}
    metadata |= {"run": json.dumps(plain(about.run)), "units": json.dumps(_UNITS)}
    table = pa.table({name: arrays[name] for name in HEADER}).replace_schema_metadata(metadata)
    with whole_file(path, "wb") as f:
        parquet.write_table(table, f, compression="zstd")


def _json(path: Path, curve: Curve, about: About) -> None:
    columns = {name: _plain(column) for name, column in _columns(curve).items()}
    columns["person"] = [curve.person] * len(curve.track)
    whole = {
        "vacli": __version__,
        "about": facts_of(about, path.parent),
        "units": _UNITS,
        **{name: columns[name] for name in HEADER},
    }
    with whole_file(path) as f:
        f.write(json.dumps(plain(whole), allow_nan=False) + "\n")


def _plain(column: np.ndarray) -> list[Any]:
    """As the CSV has it: six decimals."""
    return (np.round(column.astype(np.float64), 6) if column.dtype.kind == "f" else column).tolist()


_UNSAYABLE = re.compile("[\x00-\x1f\x7f-\x9f\ufffe\uffff]")  # no character of XML 1.0, or the end of a line


def _line(text: str) -> str:
    return _UNSAYABLE.sub("\ufffd", plain(text))


# ---- stretches of time: ELAN and WebVTT ----------------------------------------------------------------------


def _milliseconds(curve: Curve) -> np.ndarray:
    """(T,) int64, none before the start of the video."""
    return np.round(np.clip(curve.track.times_s, 0, 1e12) * 1000).astype(np.int64)


def _stretches(curve: Curve, length_ms: int, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The frames of each length_ms, as begin and end in ms (S + 1,), first rows (S,) and mean values (S, 2).

    A stretch begins with a frame and lasts until the next one does, so stretches meet, never overlap, and a frame that
    is shown for long (variable rate) is not cut. The last ends 1 ms after its last frame began: how long that is shown
    is not in the curve, and nothing may last longer than the video. Only rows that count (T,) are averaged; NaN where
    none does.
    """
    ms = _milliseconds(curve)
    first = np.flatnonzero(np.diff(ms // length_ms, prepend=-1))
    if not len(first):
        return np.zeros(1, np.int64), first, np.empty((0, 2))
    values = np.where(counts[:, None], curve.track.values.astype(np.float64), 0)
    n = np.add.reduceat(counts.astype(np.int64), first)
    means = np.add.reduceat(values, first) / np.maximum(n, 1)[:, None]
    means[n == 0] = np.nan
    return np.append(ms[first], ms[-1] + 1), first, means


def _two_decimals(value: float) -> str:
    return f"{round(value, 2) + 0.0:+.2f}"  # + 0.0: never -0.00


# ---- WebVTT (https://www.w3.org/TR/webvtt1/) -----------------------------------------------------------------

_CUE_MS = 500  # long enough to be read, short enough to follow a face


def _vtt(path: Path, curve: Curve, about: About) -> None:
    edges, first, means = _stretches(curve, _CUE_MS, curve.track.valid)
    seen = np.add.reduceat(curve.face.astype(np.int64), first) > 0 if len(first) else np.empty(0, bool)
    who = "" if curve.person == "main" else f"{_escaped(curve.person)}: "
    cues: list[tuple[int, int, str]] = []
    for (start, end), (valence, arousal), face in zip(pairwise(edges.tolist()), means, seen, strict=True):
        if np.isnan(valence):
            continue
        text = f"{who}valence {_two_decimals(valence)} arousal {_two_decimals(arousal)}"
        text += "" if face else " (no face)"
        if cues and cues[-1][1:] == (start, text):  # the same as before: one cue, until it changes
            start = cues.pop()[0]
        cues.append((start, end, text))
    with whole_file(path) as f:
        f.write(f"WEBVTT\n\nNOTE {_escaped(about.name)}: valence and arousal by vacli {__version__}\n")
        for start, end, text in cues:
            f.write(f"\n{_timestamp(start)} --> {_timestamp(end)}\n{text}\n")


def _escaped(text: str) -> str:
    return html.escape(_line(text), quote=False)


def _timestamp(ms: int) -> str:
    seconds, ms = divmod(ms, 1000)
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{f'{hours:02d}:' if hours else ''}{minutes:02d}:{seconds:02d}.{ms:03d}"


# ---- ELAN ----------------------------------------------------------------------------------------------------
# EAF 3.0 as pympi writes it. The time-series file is what ELAN's own reader takes (TSConfigurationParser,
# CSVServiceProvider): a relative source works because LinkedFileDescriptorUtil looks for a linked file beside the .eaf,
# and takes a source of the same name along. Links are plain file names there: no percent signs.

# An annotation is an interval that people click on and read: a second is wide enough for its number at ELAN's usual
# zoom, and about as fast as people rate affect. What is faster is in the time series.
_ANNOTATION_MS = 1000
_NEAR_ZERO = 0.1
_MIME = {".mp4": "video/mp4", ".m4v": "video/mp4", ".mpg": "video/mpeg", ".mov": "video/quicktime"}
_PROVIDER = "mpi.eudico.client.annotator.timeseries.csv.CSVServiceProvider"
_COLOURS = {"valence": "0,114,178", "arousal": "213,94,0"}  # Okabe and Ito: told apart by everybody
_Annotation = tuple[str, int, int, str]  # tier, begin and end in ms, value


def _eaf(path: Path, curve: Curve, about: About) -> None:
    with _extra("elan"):
        from pympi import Elan

    links = []
    if about.csv is not None:
        tsconf = path.with_name(f"{path.stem}_tsconf.xml")
        csv = seen_from(path.parent, about.csv)
        with whole_file(tsconf, "wb") as f:
            f.write(_time_series(csv))
        links = [(csv, "unknown"), (tsconf.name, "text/xml")]
    eaf = Elan.Eaf(author="vacli")
    eaf.remove_tier("default")
    eaf.adocument |= {
        "VERSION": "3.0",
        "FORMAT": "3.0",
        "DATE": datetime.now(UTC).isoformat(timespec="seconds"),
        "xsi:noNamespaceSchemaLocation": "http://www.mpi.nl/tools/elan/EAFv3.0.xsd",
    }
    eaf.header = {"MEDIA_FILE": "", "TIME_UNITS": "milliseconds"}
    if about.video is not None:
        video = _line(seen_from(path.parent, about.video))
        eaf.add_linked_file(video, _dotted(video), _MIME.get(about.video.suffix.lower(), "video/*"))
    for link, mime in links:
        eaf.add_secondary_linked_file(_line(link), _dotted(_line(link)), mime)
    _annotate(eaf, curve)
    run = json.dumps(plain(about.run))
    facts = {"vacli": __version__, "video": about.name, "run": run}
    eaf.properties = [("lastUsedAnnotationId", eaf.maxaid), *((k, _line(v)) for k, v in facts.items())]
    with whole_file(path, "wb") as f:
        f.write(b'<?xml version="1.0" encoding="UTF-8"?>\n' + Elan.to_string(eaf, encoding="UTF-8"))


def _dotted(link: str) -> str:
    """As ELAN writes a relative path."""
    return link if link.startswith("..") else f"./{link}"


def _annotate(eaf: Any, curve: Curve) -> None:
    """Tiers and annotations; the slots in the order of their times, which pympi leaves to its caller."""
    person = _line(curve.person)
    of = "" if person == "main" else f"@{person}"  # files of several people can be merged in ELAN
    for tier in ("valence", "arousal", "quadrant", "no face"):
        eaf.add_tier(tier + of, part=person)
    annotations = [*_means(curve), *_absences(curve)]
    edges = sorted(
        (ms, k, side) for k, (_, *span, _) in enumerate(annotations) for side, ms in enumerate(span)
    )
    slots = {(k, side): eaf.generate_ts_id(ms) for ms, k, side in edges}
    for k, (tier, _, _, text) in enumerate(annotations):
        eaf.tiers[tier + of][0][eaf.generate_annotation_id()] = (slots[k, 0], slots[k, 1], text, None)


def _means(curve: Curve) -> Iterator[_Annotation]:
    """Mean valence and arousal of each second's rows with a face (of all, where there is none), and their quadrant."""
    seen = curve.track.valid & curve.face
    edges, _, means = _stretches(curve, _ANNOTATION_MS, seen if seen.any() else curve.track.valid)
    words: list[_Annotation] = []
    for (start, end), (valence, arousal) in zip(pairwise(edges.tolist()), means, strict=True):
        if np.isnan(valence):
            continue
        yield "valence", start, end, _two_decimals(valence)
        yield "arousal", start, end, _two_decimals(arousal)
        word = _quadrant(valence, arousal)
        if words and words[-1][2:] == (start, word):
            start = words.pop()[1]
        words.append(("quadrant", start, end, word))
    yield from words


def _quadrant(valence: float, arousal: float) -> str:
    """A quarter of the circumplex in the words of its axes; emotions have no business here."""
    if max(abs(valence), abs(arousal)) < _NEAR_ZERO:
        return "near zero"
    return f"{'positive' if valence >= 0 else 'negative'} {'active' if arousal >= 0 else 'passive'}"


def _absences(curve: Curve) -> Iterator[_Annotation]:
    """The stretches without a face, to the frame."""
    ms = _milliseconds(curve)
    edges = np.flatnonzero(np.diff(np.r_[True, curve.face, True].astype(np.int8)))
    ends = np.append(ms, ms[-1:] + 1)
    for begin, end in edges.reshape(-1, 2).tolist():
        if ends[end] > ms[begin]:
            yield "no face", int(ms[begin]), int(ends[end]), "no face"


def _time_series(csv: str) -> bytes:
    """What `_tsconf.xml` says: two tracks of the CSV's columns over its times."""
    root = ElementTree.Element(
        "timeseries", date=datetime.now(UTC).isoformat(timespec="seconds"), version="1.0"
    )
    place = {"source-url": _line(csv), "sample-type": "Discontinuous Rate"}
    source = ElementTree.SubElement(root, "tracksource", place | {"time-column": str(HEADER.index("time_s"))})
    ElementTree.SubElement(source, "property", key="provider", value=_PROVIDER)
    for name, colour in _COLOURS.items():
        track = ElementTree.SubElement(source, "track", name=name, derivative="0")
        ElementTree.SubElement(track, "property", {"key": "detect-range", "value": "false"})
        position = ElementTree.SubElement(track, "sample-position")
        ElementTree.SubElement(position, "pos", row="0", col=str(HEADER.index(name)))
        ElementTree.SubElement(track, "description")
        ElementTree.SubElement(track, "units")
        ElementTree.SubElement(track, "range", min="-1.0", max="1.0")
        ElementTree.SubElement(track, "color").text = colour
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="UTF-8", xml_declaration=True)


FORMATS: dict[str, Callable[[Path, Curve, About], None]] = {
    "parquet": _parquet,
    "json": _json,
    "eaf": _eaf,
    "vtt": _vtt,
}
