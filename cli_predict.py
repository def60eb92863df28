"""The commands that people look at the results of: predict, report, plot."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import VacliError, __version__
from .cli_extract import OPTIONS, by_name, of_person, on_people, say_notes, summarise, told_when_stopped
from .cli_shell import JSON, print_json, say
from .cli_store import STORE
from .cli_temporal import RUN, RUNS

if TYPE_CHECKING:
    from .extract.encoder import Encoder
    from .extract.run import Outcome
    from .store import Fingerprints, Store
    from .store.curves import About, Curve
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
@click.option("--camera", type=int, metavar="N", help="Live from camera N instead of a video.")
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
    from .extract.datasets import find_all
    from .extract.people import People
    from .extract.run import extract as run_extract
    from .store import Store
    from .temporal.folds import Folds, open_any

    found = open_any(run_path, runs)
    trained = found.first if isinstance(found, Folds) else found  # whatever features one fold needs, all need
    if live or camera is not None:
        if formats or overlay or person != "main":
            raise click.UsageError(
                "--live prints one person's values: no --format, --overlay or --person with it"
            )
        _live(found, [*videos, *more], camera, options, detector, every)
        return
    if not videos and not more:
        raise click.UsageError("which videos? vacli predict --video DIR (or a file, or a list)")
    # a curve needs no label
    samples = [replace(s, annotation=None) for s in of_person(find_all([*videos, *more]), person)]
    labels = {s.source: s.annotation for s in find_all([*videos, *more]) if s.annotation}
    opened = Store(store, create=True)
    encoders = _encoders_of(trained, opened.fingerprints, by_name(options))
    people = People(detector, every)
    say_notes(encoders)
    hand_out = _HandOut(found, opened, out, not no_smooth, formats, overlay, _notes(encoders), labels)
    tell = partial(say, err=as_json)
    with told_when_stopped(samples, store) as outcomes:
        run_extract(
            samples,
            encoders,
            opened,
            link=False,
            then=hand_out,
            people=people,
            tell=tell,
            outcomes=outcomes,
            sound_is_asked_for=False,
        )
    hand_out.failed(outcomes)
    tell(f"{hand_out.written} of {len(outcomes)} curves in {out}/ by {found.path}")
    if not no_report:
        _report(out, tell)
    if as_json:
        print_json([_told(hand_out.abouts[o.sample.id]) for o in outcomes])
    summarise(outcomes, store, tell)


@click.command()
@click.argument("folder", type=click.Path(path_type=Path), default=Path("predictions"))
def report(folder: Path) -> None:
    """Make the pages of a folder of curves (or of trained runs), to be opened in any browser, without a network.

    FOLDER is what `vacli predict` wrote (a page for each video, and index.html), a folder of runs, or one run
    (loss and CCC per epoch, folds, all runs beside each other, and the configuration).
    """
    if any((folder / name).exists() for name in ("run.json", "folds.json")) or any(
        any(folder.glob(f"*/{name}")) for name in ("run.json", "folds.json")
    ):
        from .report.training_page import write_training_page
        from .temporal.preset import load_preset, preset_names

        presets = {name: load_preset(name).model_dump() for name in preset_names()}
        say(f"{write_training_page(folder, say, presets)}: open it in a browser")
    else:
        _report(folder, say)


@click.command()
@click.argument("folder", type=click.Path(path_type=Path), default=Path("predictions"))
@click.option("--out", type=click.Path(path_type=Path), default=Path("plots"), show_default=True)
@click.option("--format", type=click.Choice(["png", "svg", "pdf"]), default="png", show_default=True)
def plot(folder: Path, out: Path, format: Any) -> None:
    """Draw figures for papers of a folder of curves: curves, circumplex density, labels against predictions."""
    from .report.plots import write_plots

    if write_plots(folder, out, format, say).problems:
        sys.exit(1)


# ---- between the commands and the stages ---------------------------------------------------------------------


class _HandOut:
    """Called with each video as soon as its features are stored: its curve, in every form asked for, and the record.

    A run that is stopped leaves the curves so far. abouts: by sample id. written: how many curves.
    """

    def __init__(
        self,
        found: Run | Folds,
        store: Store,
        out: Path,
        smooth: bool,
        formats: tuple[str, ...],
        overlay: bool,
        notes: list[str],
        labels: dict[Path, Path],
    ) -> None:
        self._found, self._store, self._out, self._smooth = found, store, out, smooth
        self._formats, self._overlay, self._labels = formats, overlay, labels
        self._run = {**_run_facts(found, smooth), "notes": notes}
        self.abouts: dict[str, About] = {}
        self.written = 0

    def __call__(self, outcome: Outcome) -> None:
        from .store.curves import remember, write_csv

        tracks = {name: self._store.get(w.recipe, w.media) for name, w in outcome.tracks.items()}
        curve = _curve(self._found, outcome, tracks, self._smooth)
        path = self._out / f"{outcome.sample.id}.csv"
        write_csv(path, curve)
        about = self._about(outcome, path)
        remember(self._out, about)
        self.abouts[about.id] = about
        self.written += 1
        self._export(path, curve, about)
        if self._overlay and outcome.sample.video is not None:
            self._write_overlay(outcome, curve, tracks)

    def _export(self, path: Path, curve: Curve, about: About) -> None:
        if self._formats:
            from .store import exports

            for format in self._formats:
                exports.write(path.with_name(f"{path.stem}.{format}"), curve, about, format)

    def _write_overlay(self, outcome: Outcome, curve: Curve, tracks: dict[str, Any]) -> None:
        from .extract.following import BOX
        from .extract.media import Video
        from .report.overlay import write_overlay

        video = outcome.sample.video
        assert video is not None
        boxes = tracks["faces"].values[:, BOX] if "faces" in tracks else None
        out = self._out / f"{outcome.sample.id}.overlay.mp4"
        with self._progress(len(curve.track), f"overlay of {outcome.sample.id[-30:]}") as bar:
            write_overlay(Video(video), out, curve, boxes, bar.update)

    @staticmethod
    def _progress(frames: int, doing: str) -> Any:
        from tqdm import tqdm

        return tqdm(total=frames, desc=doing, unit="frame", leave=False, dynamic_ncols=True, mininterval=1)

    def _about(self, outcome: Outcome, csv: Path | None) -> About:
        from .store.curves import About

        sample = outcome.sample
        return About(
            id=sample.id,
            video_id=sample.video_id,
            name=sample.name,
            person=sample.person,
            video=sample.video,
            labels=self._labels.get(sample.source) if sample.person in ("main", "1") else None,
            csv=csv,
            problem=outcome.problem,
            warning=outcome.warning,
            run=self._run,
        )

    def failed(self, outcomes: list[Outcome]) -> None:
        """Records of those that have no curve, so that the pages say why; a problem met since is put down too."""
        from .store.curves import remember

        for outcome in outcomes:
            known = self.abouts.get(outcome.sample.id)
            if known is None or known.problem != outcome.problem:
                about = self._about(outcome, known.csv if known else None)
                self.abouts[about.id] = about
                remember(self._out, about)


def _curve(found: Run | Folds, outcome: Outcome, tracks: dict[str, Any], smooth: bool) -> Curve:
    """The curve of one video, from its stored tracks."""
    from .store.curves import Curve
    from .temporal.folds import Folds
    from .temporal.predict import on_frames, predict
    from .temporal.windows import Clip

    run = found.first if isinstance(found, Folds) else found
    times_s, face = outcome.frames_and_faces(tracks)
    clip = Clip.on_clock(outcome.sample.id, run.clock(times_s), tracks, run.dims, patched=run.patched)
    spread = None
    if isinstance(found, Folds):
        curves, spreads = found.predict([clip], smooth)
        spread = on_frames(spreads[clip.id], times_s).values
    else:
        curves = predict(run, [clip], smooth)
    return Curve(on_frames(curves[clip.id], times_s), face, outcome.sample.person, spread)


def _run_facts(found: Run | Folds, smooth: bool) -> dict[str, Any]:
    """What made the curves, for the pages: short words and numbers."""
    from .temporal.folds import Folds
    from .temporal.smoothing import in_words

    run, folds = (found.first, found) if isinstance(found, Folds) else (found, None)
    ccc = folds.about["figures"]["out_of_fold"] if folds else run.about["figures"]
    return {
        "run": found.path.name,
        "head": run.preset.name,
        "streams": list(run.dims),
        "folds": len(folds.runs) if folds else None,
        "validation": f"CCC V {ccc['valence']:.3f} A {ccc['arousal']:.3f} mean {ccc['mean']:.3f}",
        "smoothing": in_words(run.smoothing) if smooth else "none",
        "vacli": __version__,
    }


def _notes(encoders: dict[str, Encoder]) -> list[str]:
    """Licences and warnings of the weights that went into a curve."""
    told = (
        f"{name}: {note}"
        for name, e in encoders.items()
        for note in (getattr(e, "licence", None), getattr(e, "note", None))
        if note
    )
    return list(dict.fromkeys(told))


def _told(about: About) -> dict[str, Any]:
    return {
        key: str(value) if isinstance(value, Path) else value
        for key in ("id", "name", "person", "video", "csv", "problem", "warning")
        for value in (getattr(about, key),)
    }


def _report(folder: Path, tell: Callable[[str], object]) -> None:
    """Copies for the browser show a bar each."""
    from tqdm import tqdm

    from .extract.media import Video
    from .report.pages import write_pages
    from .report.playable import playable

    def played(video: Path, copy: Path) -> Path:
        with tqdm(
            desc=f"copy of {video.name[-30:]}", unit="frame", delay=1, leave=False, dynamic_ncols=True
        ) as bar:
            return playable(video, copy, Video, tell, bar.update)

    tell(f"{write_pages(folder, tell, played)}: open it in a browser")


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
    from .store import Fingerprints
    from .store.curves import HEADER, csv_line
    from .temporal.live import LiveHead, follow

    if len(videos) != (camera is None):
        raise click.UsageError("--live takes one video, or --camera N")
    head = LiveHead(found)  # whether it can go row by row is known before anything is opened
    encoders = _encoders_of(head.run, Fingerprints(), by_name(options))
    say_notes(encoders)
    frames = LiveFrames(videos[0] if camera is None else camera, encoders, People(detector, every))
    rate_hz = Video(videos[0]).check().rate_hz if camera is None else None
    for number, (moment, values, spread) in enumerate(follow(head, frames, 1 / rate_hz if rate_hz else None)):
        if not number:  # now it is known that there are frames
            click.echo(",".join(HEADER))
        click.echo(csv_line(moment.frame, moment.time_s, values, moment.face, "main", spread))


def _encoders_of(
    run: Run, fingerprints: Fingerprints, options: dict[str, dict[str, str]]
) -> dict[str, Encoder]:
    """The encoders a run was trained on, made again; refuses one that gives other features than the run saw."""
    from .extract.encoder import make_encoders

    strangers = (
        options.keys() - run.about["streams"].keys() - {s["track"] for s in run.about["streams"].values()}
    )
    if strangers:
        raise VacliError(
            f"-o names {', '.join(sorted(strangers))}, but {run.path} reads {', '.join(run.dims)}"
        )
    made: dict[str, Encoder] = {}
    for name, stream in run.about["streams"].items():
        if stream["encoder"] is None:
            raise VacliError(
                f"run {run.path} needs stream {name}, which was imported: no encoder makes it from video"
            )
        given = {k: v for k, v in stream["encoder"]["options"].items() if v is not None}
        given.update(options.get(name) or options.get(stream["track"], {}))
        made.update(make_encoders([f"{name}={stream['encoder']['kind']}"], {name: given}, fingerprints))
        now = {**made[name].recipe(), "made_from": stream["recipe"]["made_from"]}
        if now != stream["recipe"]:
            keys = sorted(
                k for k in now.keys() | stream["recipe"].keys() if now.get(k) != stream["recipe"].get(k)
            )
            raise VacliError(
                f"run {run.path} was trained on another {name}: {', '.join(keys)} differ(s); "
                f"give the encoder it was trained on with -o {name}.KEY=VALUE, or train again"
            )
    return made
