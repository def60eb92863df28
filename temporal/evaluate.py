"""Judgement: CCC over a set of videos, how sure it is, where it is lost, and the smoothing that is chosen by it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from .. import VacliError
from ..store import Store, Track
from ..store.labels import Moments, mean_ccc
from . import baselines
from .predict import Run, best_device, faces_of, finish, patched_of, predict_raw
from .preset import check_preset
from .smoothing import CHOICES, TARGETS, Smoothing, in_words
from .windows import Clip

# Shape legend: T rows of a clip, V videos, R resamplings of them, K targets.

RESAMPLINGS = 1000  # of the videos, for an interval
TIME_EDGES_S = (0.0, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, np.inf)

Curves = Mapping[str, Track]  # clip id -> (T, 2)
Interval = tuple[float, float]  # of 95 %, by resampling the videos


@dataclass(frozen=True)
class Score:
    """One system: CCC of valence, arousal and their mean over all labelled frames of all videos concatenated.

    interval: of each of them; ahead: how far the mean of the system judged is above this one's, and the interval of
    that over the same resamplings. None where there is but one video.
    """

    valence: float
    arousal: float
    mean: float
    interval: dict[str, Interval] | None = None
    ahead: tuple[float, Interval] | None = None


@dataclass(frozen=True)
class Report:
    """What `vacli evaluate` finds; `figures` has valence, arousal, mean, videos and frames (labelled ones).

    systems: name -> Score, the one judged first. videos: clip id -> its own figures (0 where its labels never move).
    face: "found" and "missing" -> figures over the frames with and without a face. over_time: for each stretch since
    the start, from_s, to_s, frames and the mean absolute error of valence and arousal; CCC would fall with the labels'
    spread alone. All but `systems` is of the system judged.
    """

    figures: dict[str, float]
    systems: dict[str, Score]
    videos: dict[str, dict[str, float]]
    face: dict[str, dict[str, float]]
    over_time: list[dict[str, float]]
    about: str = ""
    notes: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """All of it as numbers, texts, lists and dicts; the end of the last stretch of time is None."""
        tree = asdict(self)
        for stretch in tree["over_time"]:
            stretch["to_s"] = stretch["to_s"] if np.isfinite(stretch["to_s"]) else None
        return tree

    def lines(self) -> list[str]:
        """What the command prints."""
        name, f = next(iter(self.systems)), self.figures
        told = [
            f"{name.partition(',')[0]:<10} validation CCC  V {f['valence']:.4f}  A {f['arousal']:.4f}  "
            f"mean {f['mean']:.4f}   ({f['videos']:.0f} videos, {f['frames']:.0f} labelled frames; {self.about})"
        ]
        width = max(map(len, self.systems))
        told += ["", f"{'':{width}}  {'valence':<21}{'arousal':<21}{'mean':<21}ahead by, in the mean"]
        told += [f"{name:{width}}  {_score_line(score)}".rstrip() for name, score in self.systems.items()]
        if self.systems[name].interval:
            told.append(f"in brackets: 95 % of {RESAMPLINGS} resamplings of the videos")
        told += self.notes
        told += ["", f"of {name}:"]
        told += [
            f"  face {where:<8} {x['frames']:9.0f} frames   CCC  {_words(x)}"
            for where, x in self.face.items()
            if x["frames"]
        ]
        told += [
            f"  from {x['from_s']:4g} s {x['frames']:11.0f} frames   mean absolute error  {_words(x)}"
            for x in self.over_time
        ]
        return told + self._video_lines()

    def _video_lines(self) -> list[str]:
        """The median of the videos' own CCC, and the two at the ends."""
        ranked = sorted(self.videos.items(), key=lambda item: item[1]["mean"])
        median = {key: float(np.median([x[key] for _, x in ranked])) for key in (*TARGETS, "mean")}
        told = [f"  median of the videos         CCC  {_words(median)}"]
        ends = (("worst", ranked[0]), ("best", ranked[-1])) if len(ranked) > 1 else ()
        return told + [f"  {which + ':':<26}   CCC  {_words(x)}   {id}" for which, (id, x) in ends]


def _words(x: Mapping[str, float]) -> str:
    found = f"V {x['valence']:.4f}  A {x['arousal']:.4f}"
    return found + (f"  mean {x['mean']:.4f}" if "mean" in x else "")


def _score_line(score: Score) -> str:
    cells = []
    for key in (*TARGETS, "mean"):
        low_high = score.interval and score.interval[key]
        cells.append(
            f"{getattr(score, key):6.4f}" + (f" [{low_high[0]:.3f} {low_high[1]:.3f}]" if low_high else "")
        )
    if score.ahead is not None:
        by, (low, high) = score.ahead
        cells.append(f"{by:+.4f} [{low:+.3f} {high:+.3f}]")
    return "".join(f"{cell:<21}" for cell in cells)


# ---- figures -------------------------------------------------------------------------------------------------


def figures(curves: Curves, clips: Sequence[Clip]) -> dict[str, float]:
    """CCC of valence, of arousal and their mean over all labelled rows of all clips concatenated (ABAW's P_VA).

    Raises VacliError if no row is labelled.
    """
    return _figures(_total(_by_video(curves, _labelled(clips))))


def choose_smoothing(raw: Curves, clips: Sequence[Clip], face_stream: str | None = None) -> Smoothing:
    """The kernels, of CHOICES, that give the best CCC of valence and of arousal here; as a run.json keeps it.

    Where several are as good, the first of them. face_stream: Run.face_stream. Raises VacliError if no row is labelled.
    """

    def tried(clip: Clip) -> list[Moments]:
        face = faces_of(clip, face_stream)
        smoothings = (dict.fromkeys(TARGETS, kernel) for kernel in CHOICES)
        return [Moments.of(finish(raw[clip.id], face, s).values, _labels(clip)) for s in smoothings]

    with ThreadPoolExecutor(2) as pool:  # nearly all of it is numpy's, which lets go of the interpreter
        by_kernel = zip(*pool.map(tried, _labelled(clips)), strict=True)
    scores = [_total(moments).ccc() for moments in by_kernel]
    best = np.argmax(np.array(scores), axis=0)
    return {target: CHOICES[k] for target, k in zip(TARGETS, best, strict=True)}


def _labelled(clips: Sequence[Clip]) -> list[Clip]:
    """The clips with a labelled row. Raises VacliError if there is none."""
    labelled = [c for c in clips if c.labels is not None and np.isfinite(c.labels).all(axis=1).any()]
    if not labelled:
        raise VacliError(
            "the videos to judge by have no valid label: wanted at least one frame that is not -5; "
            "label more of them and run `vacli extract` again"
        )
    return labelled


def _labels(clip: Clip) -> np.ndarray:
    assert clip.labels is not None  # one of _labelled
    return clip.labels


def _by_video(curves: Curves, clips: Sequence[Clip]) -> list[Moments]:
    return [Moments.of(curves[c.id].values, _labels(c)) for c in clips]


def _total(moments: Sequence[Moments]) -> Moments:
    return sum(moments[1:], moments[0])


def _figures(moments: Moments) -> dict[str, float]:
    valence, arousal = (float(value) for value in moments.ccc())
    return {"valence": valence, "arousal": arousal, "mean": mean_ccc(valence, arousal)}


# ---- the report ----------------------------------------------------------------------------------------------


def evaluate(run: Run, store: Store, smooth: bool = True) -> Report:
    """The run on its validation videos, from the very features it was trained on, beside the built-in baselines.

    smooth: judge the curve smoothed as the run has it; both are in the report. Raises VacliError that says which
    feature is missing, or that no validation row is labelled. Where the training features are gone there are no
    baselines, and a note says so.
    """
    clips = load_clips(store, run.about, "validation")
    name, face = run.preset.name, run.face_stream
    _labelled(clips)  # before the work
    raw = predict_raw(run, clips)
    systems = {
        f"{name}, smoothed": _finished(raw, clips, face, run.smoothing),
        name: _finished(raw, clips, face),
    }
    if not smooth:
        systems = dict(reversed(systems.items()))
    notes = [f"smoothing of {name}, chosen on these videos: {in_words(run.smoothing)}"]
    crossed = _crossed(raw, clips, face)
    if crossed:
        systems[f"{name}, smoothing of the other half"] = crossed
        notes.append(
            "of the other half: chosen on every second video, judged on the others, and the other way round"
        )
    try:
        beside, more = _baselines(run, store, clips)
    except VacliError as e:
        beside, more = {}, [f"no baselines: {e}"]
    report = judge({**systems, **beside}, clips, face)
    report.notes.extend([*notes, *more])
    return replace(report, about=str(run.path))


def judge(systems: Mapping[str, Curves], clips: Sequence[Clip], face_stream: str | None = None) -> Report:
    """The report on ready curves of any systems, the first of them the one judged.

    Raises VacliError if no row is labelled.
    """
    clips = _labelled(clips)
    moments = {name: Moments.stack(_by_video(curves, clips)) for name, curves in systems.items()}
    curves, own = next(iter(systems.values())), next(iter(moments.values()))
    per_video = own.ccc()
    videos = {
        c.id: {"valence": float(v), "arousal": float(a), "mean": float(mean_ccc(v, a)), "frames": int(n)}
        for c, (v, a), n in zip(clips, per_video, own.count, strict=True)
    }
    scores = _scores(moments)
    first = next(iter(scores.values()))
    main = {"valence": first.valence, "arousal": first.arousal, "mean": first.mean}
    still = int(((own.yy == 0).any(axis=1)).sum())
    notes = (
        [f"{still} of {len(clips)} videos have a label that never moves: 0 for themselves"] if still else []
    )
    return Report(
        figures={**main, "videos": len(clips), "frames": int(own.count.sum())},
        systems=scores,
        videos=videos,
        face=_by_face(curves, clips, face_stream),
        over_time=_over_time(curves, clips),
        notes=notes,
    )


def _scores(moments: dict[str, Moments]) -> dict[str, Score]:
    """Of V stacked videos each. All systems see the same resamplings, so what one is ahead by has an interval too."""
    videos = len(next(iter(moments.values())).count)
    times = np.random.default_rng(0).multinomial(videos, np.full(videos, 1 / videos), size=RESAMPLINGS)
    scores: dict[str, Score] = {}
    judged, judged_mean = np.empty(0), 0.0
    for name, of_system in moments.items():
        found = _figures(_unstacked(of_system))
        score = Score(found["valence"], found["arousal"], found["mean"])
        if videos < 2:
            scores[name] = score
            continue
        each = of_system.pooled(times.astype(np.float64)).ccc()
        means = mean_ccc(each[:, 0], each[:, 1])
        interval = {
            key: _interval(x)
            for key, x in (("valence", each[:, 0]), ("arousal", each[:, 1]), ("mean", means))
        }
        ahead = (judged_mean - found["mean"], _interval(judged - means)) if scores else None
        if not scores:
            judged, judged_mean = means, found["mean"]
        scores[name] = replace(score, interval=interval, ahead=ahead)
    return scores


def _unstacked(moments: Moments) -> Moments:
    """All videos of a stack added up."""
    return _total([Moments(*parts) for parts in zip(*vars(moments).values(), strict=True)])


def _interval(values: np.ndarray) -> Interval:
    low, high = np.percentile(values, (2.5, 97.5))
    return float(low), float(high)


def _by_face(curves: Curves, clips: Sequence[Clip], face_stream: str | None) -> dict[str, dict[str, float]]:
    faces = [faces_of(c, face_stream) for c in clips]
    found = {}
    for where, wanted in (("found", True), ("missing", False)):
        parts = [
            Moments.of(curves[c.id].values[face == wanted], _labels(c)[face == wanted])
            for c, face in zip(clips, faces, strict=True)
        ]
        total = _total(parts)
        found[where] = {**_figures(total), "frames": int(total.count)}
    return found


def _over_time(curves: Curves, clips: Sequence[Clip]) -> list[dict[str, float]]:
    bins = len(TIME_EDGES_S) - 1
    frames, errors = np.zeros(bins), np.zeros((bins, len(TARGETS)))
    for c in clips:
        error = np.abs(curves[c.id].values.astype(np.float64) - _labels(c))
        valid = ~np.isnan(error).any(axis=1)
        stretch = np.searchsorted(TIME_EDGES_S[1:-1], c.times_s[valid], side="right")
        frames += np.bincount(stretch, minlength=bins)
        for k in range(len(TARGETS)):
            errors[:, k] += np.bincount(stretch, weights=error[valid, k], minlength=bins)
    return [
        {"from_s": low, "to_s": high, "frames": int(n), "valence": float(v / n), "arousal": float(a / n)}
        for low, high, n, (v, a) in zip(TIME_EDGES_S, TIME_EDGES_S[1:], frames, errors, strict=False)
        if n
    ]


def _finished(
    raw: Curves, clips: Sequence[Clip], face_stream: str | None, smoothing: Smoothing | None = None
) -> dict[str, Track]:
    return {c.id: finish(raw[c.id], faces_of(c, face_stream), smoothing) for c in clips}


def _crossed(raw: Curves, clips: Sequence[Clip], face_stream: str | None) -> dict[str, Track]:
    """Every second video smoothed as is best for the others, the other way round too: no video chose its own.

    Nothing, where there are fewer than four videos to choose by.
    """
    labelled = _labelled(clips)
    if len(labelled) < 4:
        return {}
    curves: dict[str, Track] = {}
    for here, there in ((labelled[::2], labelled[1::2]), (labelled[1::2], labelled[::2])):
        curves |= _finished(raw, here, face_stream, choose_smoothing(raw, there, face_stream))
    return curves


def _baselines(run: Run, store: Store, clips: list[Clip]) -> tuple[dict[str, Curves], list[str]]:
    """The constant, the ridge and the ridge smoothed, and what was chosen on these videos."""
    if run.patched:  # a ridge reads the log-mel as any other stream
        clips = load_clips(store, run.about, "validation", patched=())
    fitted = baselines.fit(clips_of(store, run.about, "train", patched=()), best_device())
    face = run.face_stream
    found = fitted.linear(clips)
    scores = {p: figures(_finished(raw, clips, face), clips)["mean"] for p, raw in found.items()}
    penalty = max(scores, key=lambda p: scores[p])
    smoothing = choose_smoothing(found[penalty], clips, face)
    curves: dict[str, Curves] = {
        "baseline linear, smoothed": _finished(found[penalty], clips, face, smoothing),
        "baseline linear": _finished(found[penalty], clips, face),
        "baseline constant": fitted.constant(clips),
    }
    return curves, [
        f"baseline linear: a ridge of penalty {penalty:g}, smoothing {in_words(smoothing)}, both chosen on these videos"
    ]


# ---- the clips -----------------------------------------------------------------------------------------------


def load_clips(
    store: Store, about: dict[str, Any], split: str, patched: Collection[str] | None = None
) -> list[Clip]:
    """The clips of a run's split, by the recipes and media its run.json names; nothing else will do.

    Their clock is that of the labels, one row for a frame: also where a video has only the sound, at its own rate.
    patched: streams that keep their track on its own clock; those of the preset unless told.
    Raises VacliError that says which track the store lacks.
    """
    with ThreadPoolExecutor(2) as pool:  # reading, checksums and copying all let go of the interpreter
        return list(pool.map(_loader(store, about, patched), about[split].keys(), about[split].values()))


def clips_of(
    store: Store, about: dict[str, Any], split: str, patched: Collection[str] | None = None
) -> Iterator[Clip]:
    """The same clips one after the other, none of them kept."""
    return map(_loader(store, about, patched), about[split].keys(), about[split].values())


def _loader(
    store: Store, about: dict[str, Any], patched: Collection[str] | None
) -> Callable[[str, dict[str, str]], Clip]:
    if patched is None:
        patched = patched_of(check_preset(about["preset"], "of the run"))
    dims = {name: stream["dim"] for name, stream in about["streams"].items()}

    def load(video_id: str, media: dict[str, str]) -> Clip:
        tracks = {name: _track(store, about, video_id, name, of) for name, of in media.items()}
        labels = tracks.pop("label.va")
        return Clip.on_clock(video_id, labels.times_s, tracks, dims, labels, patched)

    return load


def _track(store: Store, about: dict[str, Any], video_id: str, name: str, media: str) -> Track:
    try:
        if name == "label.va":
            return store.get(about["label"]["recipe"], media)
        return store.map(about["streams"][name]["recipe"], media)  # all of a data set may not fit into memory
    except KeyError as e:
        raise VacliError(
            f"{store} lacks {name} of {video_id} in the recipe this run was trained on; "
            "run `vacli extract` on its videos again, with the encoder of run.json"
        ) from e
