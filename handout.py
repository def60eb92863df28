"""From videos to curves that are handed out: what stage one makes is read by stage two, and each result is written."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import VacliError, __version__, printable
from .cli_extract import of_person, say_notes, told_when_stopped

if TYPE_CHECKING:
    from .extract.encoder import Encoder
    from .extract.run import Outcome
    from .store import Fingerprints
    from .store.curves import About, Curve
    from .temporal.folds import Folds
    from .temporal.predict import Run


_WRITING = ""  # in the place of the digest of an export


class HandOut:
    """Makes the features that a run needs of videos, and hands out each curve as soon as they are stored.

    A run that is stopped leaves the curves so far. abouts: by sample id. written: how many curves.
    """

    def __init__(
        self,
        found: Run | Folds,
        store: str,
        out: Path,
        smooth: bool,
        formats: tuple[str, ...],
        overlay: bool,
        tell: Callable[[str], object],
    ) -> None:
        from .store import Store

        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as e:  # before anything is computed for it
            raise VacliError(
                f"cannot write to {out}: {e.strerror}; wanted a folder: use another --out"
            ) from e
        self._found, self._place, self._store = found, store, Store(store, create=True)
        self._out, self._smooth, self._tell = out, smooth, tell
        self._formats, self._overlay = formats, overlay
        self._run: dict[str, Any] = {}
        self._trained_on: dict[str, set[str]] = {}  # by id, the digests of what the run was trained on
        self._labels: dict[str, Path] = {}  # by the id of a sample, before anybody's side or number
        self.abouts: dict[str, About] = {}
        self.written = 0

    def all(
        self, paths: list[Path], options: dict[str, dict[str, str]], person: str, detector: str, every: int
    ) -> list[Outcome]:
        """What became of each; those without a curve have a record too, so that the pages say why."""
        from .extract.datasets import find_all
        from .extract.people import People
        from .extract.run import extract
        from .temporal.folds import Folds

        samples = find_all(paths)
        self._labels = {s.id: s.annotation for s in samples if s.annotation}
        samples = [replace(s, annotation=None) for s in of_person(samples, person)]  # a curve needs no label
        # what one fold needs, all need
        run = self._found.first if isinstance(self._found, Folds) else self._found
        encoders = encoders_of(run, self._store.fingerprints, options)
        say_notes(encoders)
        self._run = {**_run_facts(self._found, self._smooth), "notes": _notes(encoders)}
        trained = self._found.runs.values() if isinstance(self._found, Folds) else [self._found]
        for each in trained:
            for id, media in each.about.get("train", {}).items():
                self._trained_on.setdefault(id, set()).update(media.values())
        with told_when_stopped(samples, self._place) as outcomes:
            extract(
                samples,
                encoders,
                self._store,
                link=False,
                then=self,
                people=People(detector, every),
                tell=self._tell,
                outcomes=outcomes,
                sound_is_asked_for=not any(e.eats == "crops" for e in encoders.values()),
            )
        self._remember_problems(outcomes)
        return outcomes

    def __call__(self, outcome: Outcome) -> None:
        from .store.curves import recall_one, remember, write_csv

        tracks = {name: self._store.get(w.recipe, w.media) for name, w in outcome.tracks.items()}
        curve = _curve(self._found, outcome, tracks, self._smooth)
        path = self._out / f"{outcome.sample.id}.csv"
        earlier = recall_one(self._out, outcome.sample.id)
        self._check_place(path, outcome, earlier)
        before = path.read_bytes() if path.is_file() else None
        write_csv(path, curve)
        about = self._about(outcome, path, earlier.exports if earlier else {})
        remember(self._out, about)
        self.abouts[about.id] = about
        self.written += 1
        film = path.with_name(f"{path.stem}.overlay.mp4")
        if before is not None and before != path.read_bytes() and self._is_our_film(film):
            film.unlink()  # it showed another curve
            if not self._overlay:
                self._tell(f"removed {film}: it showed another curve; --overlay makes it again")
        self._export(path, curve, about)
        if self._overlay and outcome.sample.video is not None:
            self._write_overlay(film, outcome, curve, tracks)

    def _check_place(self, path: Path, outcome: Outcome, earlier: About | None) -> None:
        """Raises VacliError for a CSV that is not ours; tells of a curve of another video, which goes."""
        from .store.curves import is_curve

        if path.is_file() and not is_curve(path):
            raise VacliError(f"{path} is no curve, and is left as it is: move it, or use another --out")
        other = earlier.video if earlier else None
        mine = outcome.sample.video
        if other and mine and other.is_file() and not other.samefile(mine):
            note = f"note: {path} was of another video, {earlier.name if earlier else ''}; another --out keeps both"
            click.echo(printable(note), err=True)

    def _export(self, path: Path, curve: Curve, about: About) -> None:
        """The formats asked for, and ours of an earlier call, lest they show another curve than the CSV.

        What is not (or no longer) as we wrote it is somebody's work, and is left as it is.
        """
        from .store import exports
        from .store.curves import remember

        ours, trouble = dict(about.exports), []
        for format in exports.FORMATS:
            beside = path.with_name(f"{path.stem}.{format}")
            is_asked = format in self._formats
            if not is_asked and (format not in ours or not beside.is_file()):
                ours.pop(format, None)
                continue
            if beside.is_file() and ours.get(format) not in (_WRITING, _sha256(beside)):
                ours.pop(format, None)
                if is_asked:
                    trouble.append(f"{beside} is not as vacli wrote it, and is left as it is: move it")
                continue
            ours[format] = _WRITING  # known for ours by the next call, if this one is killed or fails
            remember(self._out, replace(about, exports=ours))
            try:
                exports.write(beside, curve, about, format)
                ours[format] = _sha256(beside)
            except VacliError as e:
                if is_asked:
                    raise
                beside.unlink()
                ours.pop(format)
                self._tell(f"removed {beside}: it showed another curve, and cannot be written again: {e}")
        self.abouts[about.id] = about = replace(about, exports=ours)
        remember(self._out, about)
        if trouble:
            raise VacliError("; ".join(trouble))

    def _is_our_film(self, film: Path) -> bool:
        from .extract.media import Video
        from .report.overlay import MADE
        from .report.playable import comment_of

        return film.is_file() and comment_of(Video(film)) == MADE

    def _write_overlay(self, film: Path, outcome: Outcome, curve: Curve, tracks: dict[str, Any]) -> None:
        from .extract.following import BOX
        from .extract.media import Video
        from .report.overlay import write_overlay

        assert outcome.sample.video is not None
        if film.is_file() and not self._is_our_film(film):
            raise VacliError(f"{film} is a film that vacli did not make, and is left as it is: move it")
        boxes = tracks["faces"].values[:, BOX] if "faces" in tracks else None
        with self._progress(len(curve.track), f"overlay of {printable(outcome.sample.id[-30:])}") as bar:
            write_overlay(Video(outcome.sample.video), film, curve, boxes, bar.update)

    @staticmethod
    def _progress(frames: int, doing: str) -> Any:
        from tqdm import tqdm

        # below another bar, so not in a log file
        alone = {} if sys.stderr.isatty() else {"disable": True}
        return tqdm(total=frames, desc=doing, unit="frame", leave=False, dynamic_ncols=True, **alone)

    def _about(self, outcome: Outcome, csv: Path | None, exports: dict[str, str]) -> About:
        from .store.curves import About

        sample = outcome.sample
        # of all people in a video it is the main one's labels that lie beside it
        has_labels = sample.among is None or sample.person == "1"
        its_labels = self._labels.get(sample.among or sample.id) if has_labels else None
        return About(
            id=sample.id,
            video_id=sample.video_id,
            name=sample.name,
            person=sample.person,
            video=sample.video,
            labels=its_labels,
            csv=csv,
            problem=_without(sample.source, outcome.problem),
            warning=_without(sample.source, outcome.warning),
            trained_on=self._is_trained_on(outcome),
            exports=exports,
            run=self._run,
        )

    def _is_trained_on(self, outcome: Outcome) -> bool:
        """By the bytes; of a video of which the run may know nothing but somebody's crops, by its id."""
        media = {outcome.media, *(wanted.media for wanted in outcome.tracks.values())}
        if any(media & digests for digests in self._trained_on.values()):
            return True
        knows_files = any(wanted.eats == "sound" for wanted in outcome.tracks.values())
        ids = {outcome.sample.id, outcome.sample.video_id}
        return not knows_files and bool(ids & self._trained_on.keys())

    def _remember_problems(self, outcomes: list[Outcome]) -> None:
        """Of those without a curve, and what went wrong after a curve was written."""
        from .store.curves import recall_one, remember

        for outcome in outcomes:
            known = self.abouts.get(outcome.sample.id)
            if known is None or known.problem != _without(outcome.sample.source, outcome.problem):
                if known is None and (older := self._out / f"{outcome.sample.id}.csv").is_file():
                    click.echo(
                        printable(f"note: {older} is of an earlier call, when that video could be read"),
                        err=True,
                    )
                earlier = known or recall_one(self._out, outcome.sample.id)
                about = self._about(outcome, known.csv if known else None, earlier.exports if earlier else {})
                self.abouts[about.id] = about
                remember(self._out, about)


def _sha256(path: Path) -> str:
    import hashlib

    return hashlib.sha256(path.read_bytes()).hexdigest()


def _without(source: Path, said: str | None) -> str | None:
    """Where the video's name stands beside it, its path need not begin the text."""
    return said and said.removeprefix(f"{source}: ")


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
    judges = f"{len(run.about['validation'])} validation videos"
    if folds:
        judges = "data, each video by the fold that did not train on it"
    return {
        "run": found.path.name,
        "head": run.preset.name,
        "streams": list(run.dims),
        "folds": len(folds.runs) if folds else None,
        "judged": f"CCC V {ccc['valence']:.3f} A {ccc['arousal']:.3f} mean {ccc['mean']:.3f} on its {judges}",
        "smoothing": in_words(run.smoothing).replace("+-", "±") if smooth else "none",
        "made_by": f"vacli {__version__}",
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


def encoders_of(
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
