"""The page of training: every run's loss and CCC per epoch, the folds, what differs between runs, the configuration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from ..store.curves import whole_file
from .configuration import configuration, smoothing_in_words, toml
from .html import document, fill, text
from .runs import (
    KEYS,
    Epoch,
    Figures,
    Found,
    TrainingFolds,
    TrainingRun,
    differences,
    figures_of,
    find_runs,
    number_of,
    under,
)

_SCRIPTS = ("uPlot.iife.min.js", "table.js", "training.js")
_STYLES = ("page.css", "uPlot.min.css", "training.css")
_COLUMNS = {  # heading -> whether it holds numbers; what a reader looks for stands beside the name
    "Run": False,
    "V": True,  # CCC, as the note beneath says
    "A": True,
    "Mean": True,
    "Head": False,
    "Streams": False,
    "What differs": False,
    "Parameters": True,
    "Seed": True,
    "Epochs": True,
    "Best epoch": True,
    "Smoothing": False,
    "State": False,
}
Cell = tuple[str, object]  # HTML, and what it is sorted by ("" comes last)


def write_training_page(
    path: Path,
    tell: Callable[[str], None] = print,
    presets: Mapping[str, Mapping[str, Any]] | None = None,
) -> Path:
    """Write <path>/index.html over a folder of runs, over one run, or over a folder of folds; returns where it is.

    presets: head -> its preset as it comes, to say what a run has otherwise; without, what differs between the runs of
    a head. What is damaged, half-written or no run is listed on the page and stops nothing. Raises VacliError where
    there is no run, or the page cannot be written.
    """
    found = find_runs(Path(path))
    every = [*found.runs, *(run for folds in found.folds for run in folds.runs.values())]
    differ = differences(every, presets or {})
    body = fill(
        "training.html",
        heading=text(f"Training: {Path(path).resolve().name}"),
        lead=text(_lead(found)),
        notices=_notices(found),
        table=_table(found, differ, own=presets is not None),
        folds="\n".join(_folds_card(folds, number) for number, folds in enumerate(found.folds)),
        runs="\n".join(_run_card(run, number) for number, run in enumerate(every)),
        written=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S %z"),
    )
    title = f"{Path(path).resolve().name}, training"
    page = Path(path) / "index.html"
    with whole_file(page) as f:
        f.write(document(title, body, {"runs": [_series(run) for run in every]}, _SCRIPTS, _STYLES))
    tell(f"{page}: {_lead(found)}")
    return page


def _lead(found: Found) -> str:
    done = sum(run.finished for run in found.runs)
    said = [f"{_many(done, 'run')} finished"] if done else []
    said += [f"{len(found.runs) - done} not finished"] if done < len(found.runs) else []
    said += [f"{_many(len(found.folds), 'cross-validation')}"] if found.folds else []
    return ", ".join(said)


def _many(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _notices(found: Found) -> str:
    if not found.problems:
        return ""
    items = "".join(
        f"<li><b>{text(name)}</b>: {text(why)}</li>" for name, why in sorted(found.problems.items())
    )
    heading = f"{_many(len(found.problems), 'folder')} left out"
    return f'<details class="notice odd"><summary>{heading}</summary><ul>{items}</ul></details>'


def _series(run: TrainingRun) -> dict[str, Any]:
    """The lines of its charts, epoch by epoch of both stages: None where one has nothing to say."""
    found: dict[str, Any] = {
        "epoch": list(range(1, len(run.epochs) + 1)),
        "loss": [None if epoch.alone else epoch.loss for epoch in run.epochs],
        "best": run.epochs.index(run.best) + 1 if run.best else None,
        **{key: [epoch.figures and epoch.figures[key] for epoch in run.epochs] for key in KEYS},
    }
    if any(epoch.alone for epoch in run.epochs):
        found["alone"] = [epoch.loss if epoch.alone else None for epoch in run.epochs]
    return found


# ---- the table of all runs -----------------------------------------------------------------------------------


def _table(found: Found, differ: Mapping[str, Mapping[str, object]], own: bool) -> str:
    """A row for each run, and one for the folds of a cross-validation together; the best mean first."""
    rows = [_run_row(run, number, differ) for number, run in enumerate(found.runs)]
    rows += [_folds_row(folds, number, differ) for number, folds in enumerate(found.folds)]
    at = list(_COLUMNS).index("Mean")
    rows.sort(key=lambda row: -float(str(row[at][1])) if row[at][1] != "" else 2.0)
    best_first = ' aria-sort="descending"'
    heads = "".join(
        f'<th scope="col"{" class=number" * is_number}{best_first * (k == at)}>'
        f'<button type="button">{name}</button></th>'
        for k, (name, is_number) in enumerate(_COLUMNS.items())
    )
    what = "from the preset as it comes" if own else "between runs of the same head"
    lines = "".join(map(_row, rows))
    table = f'<table class="runs sortable"><thead><tr>{heads}</tr></thead><tbody>{lines}</tbody></table>'
    return (
        f'<section class="card"><h2>Runs</h2>{_scrolling(table, "All runs")}'
        '<p class="note">V, A and mean: CCC on the validation videos, of a finished run smoothed, of another (*) that '
        f"of its best epoch so far, as it is. What differs: {what}; the streams have their own column.</p></section>"
    )


def _scrolling(table: str, name: str) -> str:
    """A table that scrolls within its card, by keyboard too."""
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{text(name)}">{table}</div>'


def _heads(first: str, *others: str) -> str:
    numbers = "".join(f'<th scope="col" class="number">{name}</th>' for name in others)
    return f'<thead><tr><th scope="col">{first}</th>{numbers}</tr></thead>'


def _numbers(*cells: str) -> str:
    return "".join(f'<td class="number">{cell}</td>' for cell in cells)


def _row(cells: list[Cell]) -> str:
    ((first, key), *rest), (_, *columns) = cells, _COLUMNS.items()
    classes = {"What differs": ' class="differs"', "State": ' class="state"'}
    told = [f'<th scope="row" data-key="{text(key)}">{first}</th>']
    for (name, is_number), (shown, key) in zip(columns, rest, strict=True):
        kind = ' class="number"' if is_number else classes.get(name, "")
        told.append(f'<td{kind} data-key="{text(key)}">{shown}</td>')
    return f"<tr>{''.join(told)}</tr>"


def _run_row(run: TrainingRun, number: int, differ: Mapping[str, Mapping[str, object]]) -> list[Cell]:
    whole = [epoch for epoch in run.epochs if not epoch.alone]
    wanted = under(run.preset, "train", "epochs")
    state = "finished" if run.finished else "not finished"
    return [
        (f'<a href="#run-{number}">{text(run.name)}</a>', run.name),
        *_ccc_cells(run.figures, "" if run.finished else " *"),
        *_preset_cells(run.preset, differ.get(run.name, {})),
        _whole_number(run.parameters),
        _whole_number(run.about.get("seed")),
        (f"{len(whole)} of {text(wanted)}", len(whole)),
        _whole_number(run.best and run.best.number),
        _plain(smoothing_in_words(run.about.get("smoothing"))),
        _plain(state),
    ]


def _folds_row(folds: TrainingFolds, number: int, differ: Mapping[str, Mapping[str, object]]) -> list[Cell]:
    first = next(iter(folds.runs.values()), None)
    count = len(folds.about["folds"])
    done = sum(run.finished for run in folds.runs.values())
    preset = folds.about.get("preset")
    return [
        (f'<a href="#folds-{number}">{text(folds.name)}</a>, mean of {_many(count, "fold")}', folds.name),
        *_ccc_cells(_of_folds(folds, "mean"), ""),
        *_preset_cells(
            preset if isinstance(preset, dict) else {}, differ.get(first.name, {}) if first else {}
        ),
        _whole_number(first and first.parameters),
        _whole_number(folds.about.get("seed")),
        _plain(""),
        _plain(""),
        _plain(""),
        _plain("finished" if folds.finished else f"{done} of {count} folds"),
    ]


def _preset_cells(preset: Mapping[str, Any], differ: Mapping[str, object]) -> list[Cell]:
    streams = preset.get("streams")
    named = ", ".join(map(str, streams)) if isinstance(streams, list) else ""
    said = {key: f"{key}={toml(value) if value is not None else 'none'}" for key, value in differ.items()}
    shown = "".join(f"<span>{text(each)}</span>" for each in said.values())
    return [_plain(preset.get("name", "")), _plain(named), (shown, " ".join(said.values()))]


def _plain(said: object) -> Cell:
    return text(said), said


def _whole_number(found: object) -> Cell:
    return (f"{found:,}", found) if isinstance(found, int) and not isinstance(found, bool) else ("", "")


def _ccc_cells(figures: Figures | None, mark: str) -> list[Cell]:
    return [(f"{figures[key]:.4f}{mark}", repr(figures[key])) if figures else ("", "") for key in KEYS]


# ---- cross-validation ----------------------------------------------------------------------------------------


def _of_folds(folds: TrainingFolds, word: str) -> Figures | None:
    return figures_of(under(folds.about, "figures", word))


def _folds_card(folds: TrainingFolds, number: int) -> str:
    """Its table, with what `vacli train --folds` prints."""
    splits, rows = folds.about["folds"], folds.about.get("rows")
    known = rows if isinstance(rows, list) and len(rows) == len(splits) else [None] * len(splits)
    sizes = [int(number_of(n) or 0) for n in known]
    lines = []
    for k, split in enumerate(splits):
        run = folds.runs.get(k)
        figures = figures_of(run.about.get("figures")) if run else None
        judged = split.get("validation")
        videos = len(judged) if isinstance(judged, list) else 0
        lines.append(_fold_row(f"{k}{' *' * (k == 0)}", figures, f"{videos:,}", f"{sizes[k]:,}"))
    for word, name in (("mean", "mean"), ("std", "std"), ("out_of_fold", "out of fold")):
        figures = _of_folds(folds, word)
        if figures:
            size = f"{sum(sizes[1:]):,}" if word == "out_of_fold" else ""
            lines.append(_fold_row(name, figures, "", size, "summary"))
    heads = _heads("Fold", "CCC V", "CCC A", "CCC mean", "Videos", "Rows")
    table = f'<table class="folds">{heads}<tbody>{"".join(lines)}</tbody></table>'
    named = f"folds-{number}-name"
    return (
        f'<section class="card" id="folds-{number}" aria-labelledby="{named}">'
        f'<h2 id="{named}">{text(folds.name)}: {_many(len(splits), "fold")}</h2>'
        f"{_scrolling(table, f'Folds of {folds.name}')}"
        f'<p class="note">* the split called {text(folds.about.get("own", ""))}. std: of the sample of folds (n - 1). '
        f"Out of fold: the curves of folds 1 to {len(splits) - 1} on the videos they did not train on, concatenated. "
        "Epoch and smoothing were chosen on the videos that judge: all of it is somewhat optimistic.</p></section>"
    )


def _fold_row(name: str, figures: Figures | None, videos: str, rows: str, kind: str = "fold") -> str:
    cells = [f"{figures[key]:.4f}" for key in KEYS] if figures else ["not trained yet", "", ""]
    return f'<tr class="{kind}"><th scope="row">{name}</th>{_numbers(*cells, videos, rows)}</tr>'


# ---- one run -------------------------------------------------------------------------------------------------


def _run_card(run: TrainingRun, number: int) -> str:
    named = f"run-{number}-name"
    charts = _charts(run, number) if run.epochs else '<p class="note">No epoch is done yet.</p>'
    return (
        f'<section class="card" id="run-{number}" aria-labelledby="{named}"><h2 id="{named}">{text(run.name)}</h2>'
        f'<p class="status">{text(_status(run))}</p>{charts}{_epochs(run)}{configuration(run)}</section>'
    )


def _status(run: TrainingRun) -> str:
    done, wanted = sum(not epoch.alone for epoch in run.epochs), under(run.preset, "train", "epochs")
    state = "finished" if run.finished else "not finished"
    said = f"{run.preset['name']}, {state} after epoch {done} of at most {wanted}"
    if run.best and run.best.figures:
        said += f"; best mean CCC {run.best.figures['mean']:.4f} in epoch {run.best.number}, before smoothing"
    if run.figures and run.finished:
        said += f"; {run.figures['mean']:.4f} after it ({smoothing_in_words(run.about.get('smoothing'))})"
    return said + (f"; {_many(run.unread, 'line')} of metrics.jsonl cannot be read" if run.unread else "")


def _charts(run: TrainingRun, number: int) -> str:
    losses = [("loss", "third", "loss")]
    if any(epoch.alone for epoch in run.epochs):
        losses.append(("alone", "soft dashed", "each stream alone"))
    ccc = [
        ("valence", "valence", "valence"),
        ("arousal", "arousal dashed", "arousal"),
        ("mean", "thick", "mean"),
    ]
    return (
        f'<div class="charts">{_chart("Training loss per epoch", losses, "loss", number)}'
        f"{_chart('Validation CCC per epoch, dotted where it is best', ccc, 'ccc', number)}</div>"
    )


def _chart(caption: str, lines: list[tuple[str, str, str]], kind: str, number: int) -> str:
    """lines: what it is in the data, how it looks, what it is called."""
    mark = '<svg width="22" height="4" aria-hidden="true"><line x1="0" y1="2" x2="22" y2="2"/></svg>'
    keys = "".join(
        f'<li class="{looks}" data-series="{series}">{mark}<span class="words">{word}</span>'
        '<span class="value"></span></li>'
        for series, looks, word in lines
    )
    return (
        f'<figure><figcaption>{caption}</figcaption><ul class="keys">{keys}</ul>'
        f'<div class="chart" data-run="{number}" data-kind="{kind}" role="img" aria-label="{caption}"></div></figure>'
    )


def _epochs(run: TrainingRun) -> str:
    """The charts as a table, for whoever reads rather than looks."""
    heads = _heads("Epoch", "Loss", "CCC V", "CCC A", "CCC mean", "Seconds")
    table = f'<table class="epochs">{heads}<tbody>{"".join(map(_epoch_row, run.epochs))}</tbody></table>'
    scrolling = _scrolling(table, f"Epochs of {run.name}")
    return f'<details class="more"><summary>Epoch by epoch</summary>{scrolling}</details>'


def _epoch_row(epoch: Epoch) -> str:
    figures = [epoch.figures and epoch.figures[key] for key in KEYS]
    cells = [f"{x:.4f}" if x is not None else "" for x in (epoch.loss, *figures)]
    cells.append(f"{epoch.seconds:.2f}" if epoch.seconds is not None else "")
    name = f"{'alone ' * epoch.alone}{epoch.number}"
    return f'<tr><th scope="row">{name}</th>{_numbers(*cells)}</tr>'
