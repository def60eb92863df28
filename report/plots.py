"""Figures for papers: a person's curves, the density in the circumplex, labels against predictions."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from .. import VacliError
from ..store.curves import About, Curve, read_csv, recall, whole_file
from ..store.labels import Moments, mean_ccc, read_va

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Shape legend: T rows of a curve, C cells along a side of a histogram.

TARGETS = ("valence", "arousal")
COLOURS = ("#0072B2", "#D55E00")  # Okabe and Ito's blue and vermilion: told apart by everybody, and in grey
_WIDTH_IN = 7.2  # two columns of most journals
_CELLS = 80  # along a side of the plane: 0.025 of a value
_COLUMNS = 1200  # stretches of time that are drawn apart: finer than 600 dpi would show
_LONG_S = 180.0  # from here on the axis counts minutes
_LONGEST_NAME = 70
_BAND = "± 1 std over runs"
_COUNT = "{x:,.0f}"
# the first draws what it can; the others, where they are installed, what it cannot
_FAMILIES = (
    "DejaVu Sans",
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Microsoft YaHei",
    "Hiragino Sans",
    "Yu Gothic",
)
_STYLE: dict[str, Any] = {
    "font.size": 8,
    "axes.titlesize": 8,
    "figure.titlesize": 9,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "legend.frameon": False,
    "savefig.dpi": 300,
    "text.parse_math": False,  # a name with two $ is a name
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "vacli",  # the same file every time
    "pdf.fonttype": 42,
}
_NO_DATE: dict[str, dict[str, Any]] = {
    "png": {"Software": None},
    "svg": {"Date": None},
    "pdf": {"CreationDate": None},
}
Format = Literal["png", "svg", "pdf"]


@dataclass(frozen=True)
class Plots:
    """The figures that were written, and id -> what kept a curve or its labels from being drawn."""

    paths: list[Path] = field(default_factory=list)
    problems: dict[str, str] = field(default_factory=dict)


def write_plots(
    folder: Path, out: Path, format: Format = "png", tell: Callable[[str], None] = print
) -> Plots:
    """Draw a folder of curves into `out`: <id>.curve, circumplex, and labels where there are any, each .<format>.

    The circumplex counts the frames in which a face was seen; labels, and every CCC, all labelled frames, as the
    challenge has it, but for the videos that the run was trained on. What cannot be read is among the problems and
    stops nothing else. The same curves give the same bytes.

    Raises VacliError where matplotlib is not installed, nothing can be drawn, or `out` cannot be written.
    """
    matplotlib = _import_matplotlib()
    plots, sums = Plots(), _Sums()
    with matplotlib.style.context(["default", _STYLE, {"font.family": _families()}]):
        for about in recall(Path(folder)):
            drawn = _read(about, plots.problems)
            if drawn is not None:
                sums.add(*drawn, about.trained_on)
                _save(_curve_figure(about, *drawn), Path(out) / f"{about.id}.curve.{format}", format, plots)
        if sums.rows:
            _save(_circumplex_figure(sums), Path(out) / f"circumplex.{format}", format, plots)
        if sums.moments is not None:
            _save(_label_figure(sums), Path(out) / f"labels.{format}", format, plots)
    if not plots.paths:
        odd = "".join(f" ({why})" for why in list(plots.problems.values())[:1])
        raise VacliError(
            f"no curve in {folder} can be drawn{odd}; make some with `vacli predict --video DIR --out {folder}`"
        )
    if sums.trained_on:
        tell(
            f"the run was trained on {sums.trained_on} of the labelled videos: they are not in the figure of labels"
        )
    tell(f"{len(plots.paths)} figures in {out}")
    return plots


def _import_matplotlib() -> Any:
    try:
        import matplotlib.style
    except ImportError as e:
        raise VacliError(f"figures need matplotlib ({e}): pip install 'vacli[plot]'") from e
    return matplotlib


def _read(about: About, problems: dict[str, str]) -> tuple[Curve, np.ndarray | None] | None:
    """The curve and its labels (T, 2), None without any; None where there is nothing to draw."""
    if about.csv is None:
        return None
    try:
        curve = read_csv(about.csv)
    except VacliError as e:
        problems[about.id] = str(e)
        return None
    if not len(curve.track):
        problems[about.id] = f"{about.csv} has no row; write it again with `vacli predict`"
        return None
    if about.labels is None:
        return curve, None
    try:
        labels = read_va(about.labels, curve.track.times_s).values
    except VacliError as e:
        problems[f"{about.id}, labels"] = str(e)
        return curve, None
    return curve, labels if np.isfinite(labels).any() else None


def _save(figure: Figure, path: Path, format: Format, plots: Plots) -> None:
    with whole_file(path, "wb") as f:
        figure.savefig(f, format=format, metadata=_NO_DATE[format])
    plots.paths.append(path)


class _Sums:
    """What the figures of all videos need, added up video by video: memory does not grow with their number."""

    def __init__(self) -> None:
        self.plane = np.zeros((_CELLS, _CELLS))  # valence by arousal
        self.against = np.zeros((2, _CELLS, _CELLS))  # of V and of A: label by prediction
        self.moments: Moments | None = None
        self.videos = 0
        self.trained_on = 0  # labelled, and left out

    @property
    def rows(self) -> int:
        return int(self.plane.sum())

    def add(self, curve: Curve, labels: np.ndarray | None, trained_on: bool = False) -> None:
        values = curve.track.values
        self.plane += _counts(*values[curve.face & curve.track.valid].T)
        self.videos += 1
        if labels is None:
            return
        if trained_on:
            self.trained_on += 1
            return
        moments = Moments.of(values, labels)
        self.moments = moments if self.moments is None else self.moments + moments
        known = np.isfinite(labels).all(axis=1) & curve.track.valid
        for k in range(len(TARGETS)):
            self.against[k] += _counts(labels[known, k], values[known, k])


def _counts(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(C, C) rows in each cell of [-1, 1] x [-1, 1]; what lies outside is counted at the edge."""
    found, _, _ = np.histogram2d(np.clip(x, -1, 1), np.clip(y, -1, 1), bins=_CELLS, range=[[-1, 1], [-1, 1]])
    return found


# ---- the curves of one person --------------------------------------------------------------------------------


def _curve_figure(about: About, curve: Curve, labels: np.ndarray | None) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH_IN, 3.6), layout="constrained")
    axes = figure.subplots(2, sharex=True)
    times_s = curve.track.times_s
    per_unit_s, unit = (60.0, "min") if times_s[-1] - times_s[0] >= _LONG_S else (1.0, "s")
    times = times_s / per_unit_s
    first = _columns(times)
    width_pt = 0.9 if len(first) == len(times) else 0.5
    for k, ax in enumerate(axes):
        _draw_missing(ax, times, ~curve.face, first)
        if curve.spread is not None:
            _draw_band(ax, times, curve.track.values[:, k], curve.spread[:, k], COLOURS[k], first)
        _draw_line(
            ax, times, curve.track.values[:, k], first, color=COLOURS[k], lw=width_pt, label="prediction"
        )
        if labels is not None:
            dashed = {"color": "black", "lw": width_pt, "ls": (0, (3, 1.5)), "label": "label"}
            _draw_line(ax, times, labels[:, k], first, **dashed)
        ax.axhline(0, color="0.6", lw=0.5, zorder=0)
        ax.set(ylim=(-1.02, 1.02), yticks=(-1, -0.5, 0, 0.5, 1), ylabel=TARGETS[k].capitalize())
    half = 0.5 * (times[-1] == times[0])
    axes[-1].set(xlim=(times[0] - half, times[-1] + half), xlabel=f"Time ({unit})")
    figure.suptitle(_title(about, curve, labels))
    _add_legend(figure, axes)
    return figure


def _add_legend(figure: Figure, axes: Any) -> None:
    """One for all axes: a word stands beside its marks in each of them."""
    from matplotlib.legend_handler import HandlerTuple

    marks: dict[str, list[Any]] = {}
    for ax in axes:
        for mark, word in zip(*ax.get_legend_handles_labels(), strict=True):
            marks.setdefault(word, []).append(mark)
    handles: Any = [tuple(each) if word in ("prediction", _BAND) else each[0] for word, each in marks.items()]
    figure.legend(
        handles,
        list(marks),
        loc="outside lower center",
        ncols=len(marks),
        handlelength=3,
        handler_map={tuple: HandlerTuple(ndivide=None, pad=0.3)},
    )


def _title(about: About, curve: Curve, labels: np.ndarray | None) -> str:
    person = "" if curve.person == "main" else f", {curve.person}"
    title = drawable(about.name, _LONGEST_NAME) + drawable(person, 20)
    if labels is None:
        return title
    valence, arousal = Moments.of(curve.track.values, labels).ccc()
    mark = "  (trained on it)" if about.trained_on else ""
    return f"{title}\nCCC  V {valence:.3f}  A {arousal:.3f}  mean {mean_ccc(valence, arousal):.3f}{mark}"


def drawable(text: str, longest: int) -> str:
    """The text as far as the fonts can draw it, on one line, with a box for any other character; cut in its middle."""
    known = _characters()
    kept = " ".join(unicodedata.normalize("NFC", text).split())
    kept = "".join(c if ord(c) in known else "□" for c in kept if unicodedata.category(c) != "Cf")
    return kept if len(kept) <= longest else f"{kept[: longest // 2]}…{kept[1 - longest // 2 :]}"


@cache
def _families() -> list[str]:
    from matplotlib.font_manager import fontManager

    installed = {font.name for font in fontManager.ttflist}
    return [name for name in _FAMILIES if name in installed]


@cache
def _characters() -> frozenset[int]:
    """The code points that the families can draw."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    fonts = [get_font(findfont(FontProperties(family=name))) for name in _families()]
    return frozenset(code for font in fonts for code in font.get_charmap())


def _columns(times: np.ndarray) -> np.ndarray:
    """The first row of each stretch of time that is as wide as a line: (C,), rising; every row where there are few."""
    if len(times) <= 2 * _COLUMNS:
        return np.arange(len(times))
    edges = np.linspace(times[0], times[-1], _COLUMNS + 1)
    return np.unique(np.searchsorted(times, edges[:-1]))


def _draw_line(ax: Axes, times: np.ndarray, values: np.ndarray, first: np.ndarray, **how: Any) -> None:
    """Of each stretch the lowest and the highest row, so that no peak is lost; a row of NaN interrupts the line."""
    rows: list[int] = []
    for stretch in np.split(np.arange(len(times)), first[1:]):
        known = stretch[~np.isnan(values[stretch])]
        ends = known[[values[known].argmin(), values[known].argmax()]] if len(known) else stretch[:1]
        rows += np.unique(ends).tolist()
    alone: dict[str, Any] = {"marker": ".", "ms": 3} if len(rows) == 1 else {}
    ax.plot(times[rows], values[rows], **how, **alone)


def _draw_band(
    ax: Axes, times: np.ndarray, values: np.ndarray, spread: np.ndarray, colour: str, first: np.ndarray
) -> None:
    low = np.fmin.reduceat(np.clip(values - spread, -1, 1), first)
    high = np.fmax.reduceat(np.clip(values + spread, -1, 1), first)
    ax.fill_between(times[first], low, high, color=colour, alpha=0.25, lw=0, label=_BAND)


def _draw_missing(ax: Axes, times: np.ndarray, missing: np.ndarray, first: np.ndarray) -> None:
    """Each run of rows without a face, from halfway to its neighbours, and no narrower than a stretch."""
    if not missing.any():
        return
    borders = np.concatenate([times[:1], (times[1:] + times[:-1]) / 2, times[-1:]])
    gone = np.logical_or.reduceat(missing, first)
    changes = np.flatnonzero(np.diff(np.concatenate([[False], gone, [False]]).astype(int)))
    starts, ends = first[changes[::2]], np.append(first, len(times))[changes[1::2]]
    spans = [(borders[a], borders[b] - borders[a]) for a, b in zip(starts, ends, strict=True)]
    ax.broken_barh(spans, (-1.02, 2.04), facecolor="0.87", lw=0, zorder=0, label="no face")


# ---- all videos together -------------------------------------------------------------------------------------


def _circumplex_figure(sums: _Sums) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.4, 3.7), layout="compressed")
    ax = figure.subplots()
    image = _density(ax, sums.plane)
    turn = np.linspace(0, 2 * np.pi, 200)
    ax.plot(np.cos(turn), np.sin(turn), color="0.6", lw=0.6, clip_on=False)
    ax.axhline(0, color="0.6", lw=0.5)
    ax.axvline(0, color="0.6", lw=0.5)
    ax.set(xlabel="Valence (unpleasant to pleasant)", ylabel="Arousal (calm to active)")
    ax.set_title(f"{_many(sums.rows, 'frame')} with a face, {_many(sums.videos, 'curve')}")
    figure.colorbar(image, ax=ax, label="Frames", format=_COUNT)
    return figure


def _label_figure(sums: _Sums) -> Figure:
    from matplotlib.figure import Figure

    assert sums.moments is not None  # asked for where there are labels
    figure = Figure(figsize=(_WIDTH_IN, 3.25), layout="compressed")
    axes = figure.subplots(1, 2)
    highest = float(sums.against.max())
    ccc = sums.moments.ccc()
    for k, ax in enumerate(axes):
        image = _density(ax, sums.against[k], highest)
        ax.plot((-1, 1), (-1, 1), color="black", lw=0.7, ls=(0, (4, 2)))
        name = TARGETS[k].capitalize()
        ax.set(xlabel=f"{name}, label", ylabel=f"{name}, prediction", title=f"{name}, CCC {ccc[k]:.3f}")
    figure.suptitle(f"{_many(int(sums.moments.count), 'labelled frame')}, mean CCC {mean_ccc(*ccc):.3f}")
    figure.colorbar(image, ax=axes, label="Frames", format=_COUNT)
    return figure


def _density(ax: Axes, counts: np.ndarray, highest: float | None = None) -> Any:
    """Counts (C, C) in a plane from -1 to 1, in logarithmic colours; an image in SVG too, as 6,400 squares are slow."""
    from matplotlib.colors import LogNorm

    top = max(highest or float(counts.max()), 2.0)
    image = ax.imshow(
        np.ma.masked_equal(counts.T, 0),
        norm=LogNorm(1, top),
        cmap="viridis_r",  # rises evenly in lightness, for every kind of sight
        origin="lower",
        extent=(-1, 1, -1, 1),
        interpolation="nearest",
    )
    ticks = (-1, -0.5, 0, 0.5, 1)
    ax.set(xticks=ticks, yticks=ticks)
    return image


def _many(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"
