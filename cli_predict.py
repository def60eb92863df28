"""The commands that people look at the results of: predict, report, plot."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import VacliError, printable
from .cli_extract import OPTIONS, by_name, on_people, say_notes, summarise
from .cli_shell import JSON, print_json, say
from .cli_store import STORE
from .cli_temporal import RUN, RUNS

if TYPE_CHECKING:
    from .report.pages import Pages
    from .store.curves import About
    from .temporal.folds import Folds
    from .temporal.predict import Run

_FORMATS = ("parquet", "json", "eaf", "vtt")


@click.command()
@click.argument("videos", nargs=-1, type=click.Path(path_type=Path))
@click.option(
    "--video", "more", multiple=True, type=click.Path(path_type=Path), metavar="PATH",
    help="A folder of videos, a video, or a list of them (.txt, a path a line). May be repeated.",
)  # fmt: skip
@RUN
@RUNS
@STORE
@click.option("--out", type=click.Path(path_type=Path), default=Path("predictions"), show_default=True)
@click.option(
    "--format", "formats", multiple=True, type=click.Choice(_FORMATS),
    help="Beside the CSV: parquet, JSON, ELAN (eaf) or subtitles (vtt). May be repeated.",
)  # fmt: skip
@click.option("--overlay", is_flag=True, help="Write a video with face box and gauge beside each curve.")
@click.option("--no-report", is_flag=True, help="Make no pages.")
@click.option("--no-smooth", is_flag=True, help="Write the raw curves.")
@click.option(
    "--live", is_flag=True, help="Print values frame by frame as they come (causal heads); write nothing."
)
@click.option(
    "--camera", type=click.IntRange(min=0), metavar="N", help="Live from camera N instead of a video."
)
@JSON
@OPTIONS
@on_people
def predict(
    videos: tuple[Path, ...],
    more: tuple[Path, ...],
    run_path: str | None,
    runs: str,
    store: str,
    out: Path,
    formats: tuple[str, ...],
    overlay: bool,
    no_report: bool,
    no_smooth: bool,
    live: bool,
    camera: int | None,
    as_json: bool,
    options: tuple[str, ...],
    person: str,
    detector: str,
    every: int,
) -> None:
    """Write one CSV per video and person: valence and arousal for every decoded frame; and a page to look at them.

    VIDEOS are folders (searched through), files, or a list of them. Of a run of several folds the curves are the mean;
    valence_std and arousal_std say how far the folds lie apart. What fails is listed at the end; the rest goes on.
    """
    from .handout import HandOut
    from .store import exports
    from .temporal.folds import open_any

    paths = [*videos, *more]
    if live or camera is not None:
        if formats or overlay or as_json or person != "main":
            raise click.UsageError(
                "--live prints one person's values: no --format, --overlay, --json or --person"
            )
        if len(paths) != (camera is None):
            raise click.UsageError("--live takes one video, or --camera N")
        _live(open_any(run_path, runs), paths, camera, options, detector, every)
        return
    if not paths:
        raise click.UsageError("which videos? vacli predict --video DIR (or a file, or a list)")
    for format in formats:
        exports.require(format)
    found, tell = open_any(run_path, runs), partial(say, err=as_json)
    hand_out = HandOut(found, store, out, not no_smooth, formats, overlay, tell)
    outcomes = hand_out.all(paths, by_name(options), person, detector, every)
    tell(f"{hand_out.written} of {len(outcomes)} curves in {out}/ by {found.path}")
    pages = None if no_report else _report(out, tell)
    if as_json:
        print_json([_told(hand_out.abouts[o.sample.id]) for o in outcomes])
    summarise(outcomes, store, tell)
    if pages and pages.problems:  # that labels cannot be read takes nothing from a prediction
        sys.exit(1)


@click.command()
@click.argument("folder", type=click.Path(path_type=Path), default=Path("predictions"))
def report(folder: Path) -> None:
    """Make the pages of a folder of curves (or of trained runs), to be opened in any browser, without a network.

    FOLDER is what `vacli predict` wrote (a page for each video, and index.html), a folder of runs, or one run
    (loss and CCC per epoch, folds, all runs beside each other, and the configuration).
    """
    trained = ("run.json", "folds.json")
    if any(any(folder.glob(f"{below}{name}")) for name in trained for below in ("", "*/", "*/*/")):
        from .report.training_page import write_training_page
        from .temporal.preset import load_preset, preset_names

        presets = {name: load_preset(name).model_dump() for name in preset_names()}
        say(f"{write_training_page(folder, say, presets)}: open it in a browser")
    else:
        pages = _report(folder, say)
        sys.exit(bool(pages.problems or pages.unread_labels))


@click.command()
@click.argument("folder", type=click.Path(path_type=Path), default=Path("predictions"))
@click.option("--out", type=click.Path(path_type=Path), default=Path("plots"), show_default=True)
@click.option("--format", type=click.Choice(["png", "svg", "pdf"]), default="png", show_default=True)
def plot(folder: Path, out: Path, format: Any) -> None:
    """Draw figures for papers of a folder of curves: curves, circumplex density, labels against predictions."""
    from .report.plots import write_plots

    plots = write_plots(folder, out, format, say)
    for name, problem in plots.problems.items():
        click.echo(printable(f"not drawn: {name}: {problem}"), err=True)
    if plots.problems:
        sys.exit(1)


# ---- between the commands and the stages ---------------------------------------------------------------------


def _told(about: About) -> dict[str, Any]:
    return {
        key: str(value) if isinstance(value, Path) else value
        for key in ("id", "name", "person", "video", "csv", "problem", "warning")
        for value in (getattr(about, key),)
    }


def _report(folder: Path, tell: Callable[[str], object]) -> Pages:
    """The pages; copies for the browser show a bar each. What could not be shown is told, and returned."""
    from tqdm import tqdm

    from .extract.media import Video
    from .report.pages import write_pages
    from .report.playable import playable

    def played(video: Path, copy: Path) -> Path:
        doing = f"copy of {printable(video.name[-30:])}"
        alone = {} if sys.stderr.isatty() else {"disable": True}
        with tqdm(desc=doing, unit="frame", delay=1, leave=False, dynamic_ncols=True, **alone) as bar:
            return playable(video, copy, Video, tell, bar.update)

    pages = write_pages(folder, tell, played)
    for name, problem in [*pages.problems.items(), *pages.unread_labels.items()]:
        click.echo(printable(f"not shown: {name}: {problem}"), err=True)
    tell(f"{pages.index}: open it in a browser")
    return pages


def _live(
    found: Run | Folds,
    videos: list[Path],
    camera: int | None,
    options: tuple[str, ...],
    detector: str,
    every: int,
) -> None:
    """Frames in, lines of CSV out as they come, until the video ends or Ctrl-C."""
    from .extract.live import LiveFrames
    from .extract.media import Video
    from .extract.people import People
    from .handout import encoders_of
    from .store import Fingerprints
    from .store.curves import HEADER, csv_line
    from .temporal.live import LiveHead, follow

    head = LiveHead(found)  # whether it can go row by row is known before anything is opened
    encoders = encoders_of(head.run, Fingerprints(), by_name(options))
    say_notes(encoders)
    if (
        camera is None
        and all(e.eats == "sound" for e in encoders.values())
        and not Video(videos[0]).check().has_sound
    ):
        raise VacliError(f"{videos[0]} has no sound, and {found.path} reads nothing else; give another --run")
    frames = LiveFrames(videos[0] if camera is None else camera, encoders, People(detector, every))
    frame_s = _usual_step_s(videos[0]) if camera is None else None
    for number, (moment, values, spread) in enumerate(follow(head, frames, frame_s)):
        if not number:  # now it is known that there are frames
            click.echo(",".join(HEADER))
        click.echo(csv_line(moment.frame, moment.time_s, values, moment.face, "main", spread))


def _usual_step_s(video: Path) -> float | None:
    """Seconds from a frame to the next, by the frames themselves: a header may say anything."""
    import numpy as np

    from .extract.media import Video

    steps_s = np.diff(list(islice(Video(video).times(), 300)))
    return float(np.median(steps_s)) if len(steps_s) else None
