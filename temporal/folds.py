"""Cross-validation: videos dealt into folds that share nobody, a run for each fold, and the table of all of them."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import VacliError
from ..store import Store, Track, disk
from .evaluate import figures, load_clips
from .plan import check_seed, own_splits, run_folder, video_of, videos_of
from .predict import Run, open_run, predict
from .preset import Preset
from .train import replace_file, train
from .windows import Clip

Split = dict[str, list[str]]  # {"train": ids, "validation": ids}

_FEWEST = 3  # of two, the second would have nothing to train on


# ---- who is judged in which fold -----------------------------------------------------------------------------


def folds_of(
    videos: dict[str, dict[str, Any]], folds: int, seed: int = 0, subjects: dict[str, str] | None = None
) -> list[Split]:
    """Fold 0, the data set's own split, and folds 1 to folds-1 over all its videos: each is judged in exactly one.

    videos: id -> {"split", "rows"}, as videos_of() has them; without validation videos fold 0 is what train() holds
    out. subjects: video -> who is in it; of one video, as of one subject, everybody lands in the same of the folds
    1 to folds-1. Those are balanced in rows: the larger groups first, each to the part that is smallest so far, so that
    two parts never differ by more than the largest group; seed decides between groups of about one size.

    Raises VacliError for fewer than 3 folds, fewer groups than parts, and a video that `subjects` lacks.
    """
    if folds < _FEWEST:
        raise VacliError(
            f"{folds} folds: wanted at least {_FEWEST}: fold 0, the data set's own split, and two over all videos"
        )
    groups = _groups(videos, subjects)
    if len(groups) < folds - 1:
        shared = "of other people" if subjects else "of their own"
        raise VacliError(
            f"{len(videos)} videos make {len(groups)} groups {shared}, too few for {folds} folds: "
            f"wanted one or more for each of the folds 1 to {folds - 1}; give a smaller --folds"
        )
    size = {group: sum(videos[v]["rows"] for v in ids) for group, ids in groups.items()}
    parts: list[list[str]] = [[] for _ in range(folds - 1)]
    rows = [0] * len(parts)
    for group in sorted(groups, key=lambda g: (-_magnitude(size[g]), _drawn(seed, g))):
        # by count where a part is as small: with groups without rows none stays empty
        least = min(range(len(parts)), key=lambda i: (rows[i], len(parts[i])))
        parts[least] += groups[group]
        rows[least] += size[group]
    own = own_splits({v: facts["split"] for v, facts in videos.items()}, seed, lambda _: None)
    return [
        {"train": sorted(videos.keys() - judged), "validation": sorted(judged)}
        for judged in map(set, (own["validation"], *parts))
    ]


def _magnitude(rows: int) -> int:
    """The same for sizes within a quarter: by size alone every seed would give the same folds."""
    return round(math.log(1 + rows, 1.25))


def _drawn(seed: int, group: str) -> bytes:
    return hashlib.sha256(f"{seed} {group}".encode()).digest()


def _groups(videos: Iterable[str], subjects: dict[str, str] | None) -> dict[str, list[str]]:
    """Those who must not be torn apart, under the name of the first: by video and, where known, by subject."""
    leader: dict[str, str] = {}

    def lead(name: str) -> str:
        while leader.setdefault(name, name) != name:
            leader[name] = name = leader[leader[name]]
        return name

    for video_id in videos:
        marks = [f"video {video_of(video_id)}"]
        if subjects is not None:
            marks.append(f"subject {_subject_of(video_id, subjects)}")
        for mark in marks:
            leader[lead(mark)] = lead(f"id {video_id}")
    found: dict[str, list[str]] = {}
    for video_id in sorted(videos):
        found.setdefault(lead(f"id {video_id}"), []).append(video_id)
    return {ids[0]: ids for ids in found.values()}


def _subject_of(video_id: str, subjects: dict[str, str]) -> str:
    for name in (video_id, video_of(video_id)):
        if name in subjects:
            return subjects[name]
    raise VacliError(f"the file of subjects lacks {video_id}: wanted a line `{video_of(video_id)},subject`")


def read_subjects(path: str | Path) -> dict[str, str]:
    """Video -> subject, from lines `video,subject` (or with blanks between); a header `video,subject` may stand above.

    Raises VacliError for a file or line that cannot be read, and a video with two subjects.
    """
    found: dict[str, str] = {}
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise VacliError(f"cannot read the subjects {path}: {e}; wanted lines `video,subject`") from e
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        cells = next(csv.reader([line])) if "," in line else line.split()
        video, subject = (cell.strip() for cell in cells) if len(cells) == 2 else ("", "")
        if not video or not subject:
            raise VacliError(f"{path} line {number}: {line[:60]!r}; wanted `video,subject`")
        if number == 1 and (video.lower(), subject.lower()) == ("video", "subject"):
            continue
        if found.setdefault(video, subject) != subject:
            raise VacliError(f"{path} line {number}: {video} has two subjects, {found[video]} and {subject}")
    if not found:
        raise VacliError(f"{path} names no subject; wanted lines `video,subject`")
    return found


# ---- the folder of folds -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Folds:
    """The runs of a cross-validation: a folder with folds.json (`about`: preset, seed, splits) and a run for each fold.

    runs: by fold, those that are finished.
    """

    path: Path
    about: dict[str, Any]
    runs: dict[int, Run]

    @property
    def finished(self) -> bool:
        return "figures" in self.about

    @property
    def first(self) -> Run:
        """The run of fold 0: whatever encoders it needs, all need."""
        return self.runs[0]

    def table(self) -> str:
        """Per fold V, A and their mean on the videos it did not train on; over all folds their mean and deviation.

        The last line has the CCC over all videos together, each with the curve of the run that did not train on it.
        """
        lines = [f"{'fold':<6}{'CCC V':>8}{'A':>8}{'mean':>8}{'videos':>8}{'rows':>9}"]
        for k, (split, rows) in enumerate(zip(self.about["folds"], self.about["rows"], strict=True)):
            found = _cells(self.runs[k].about["figures"]) if k in self.runs else f"{'not trained yet':>24}"
            lines.append(f"{k:<6}{found}{len(split['validation']):>8}{rows:>9}{' *' if k == 0 else ''}")
        if self.finished:
            of_all = self.about["figures"]
            lines += [f"{word:<6}{_cells(of_all[word])}" for word in ("mean", "std")]
            last = len(self.about["folds"]) - 1
            lines += [f"{'out':<6}{_cells(of_all['out_of_fold'])}{sum(self.about['rows'][1:]):>17}"]
            lines += [
                f"* the split called {self.about['own']}. std: of the sample of folds (n - 1). out: the curves of "
                f"folds 1 to {last} on the videos they did not train on, concatenated.",
                "Epoch and smoothing were chosen on the videos that judge: all of it is somewhat optimistic.",
            ]
        return "\n".join(lines)

    def as_json(self) -> dict[str, Any]:
        """What `table` says as plain JSON; "trained": whether a fold is, as only then it has figures."""
        rows = []
        for k, (split, labelled) in enumerate(zip(self.about["folds"], self.about["rows"], strict=True)):
            found = self.runs[k].about["figures"] if k in self.runs else {}
            figures = {key: found[key] for key in _KEYS if key in found}
            counts = {"videos": len(split["validation"]), "rows": labelled, "trained": k in self.runs}
            rows.append({**figures, **counts})
        return {"run": str(self.path), **self.about.get("figures", {}), "folds": rows}

    def predict(
        self, clips: list[Clip], smooth: bool = True, device: torch.device | str | None = None
    ) -> tuple[dict[str, Track], dict[str, Track]]:
        """Clip id -> the mean (T, 2) of all folds' finished curves, and how far they are apart, as deviation (T, 2).

        The deviation is that of the folds themselves (population). Raises VacliError if a fold is missing or was
        trained on other features than the first.
        """
        self.check_whole()
        each = [predict(self.runs[k], clips, smooth, device) for k in sorted(self.runs)]
        stacks = {c.id: np.stack([curves[c.id].values for curves in each]).astype(np.float64) for c in clips}
        times_s = {c.id: each[0][c.id].times_s for c in clips}
        return (
            {id: Track(stack.mean(0).astype(np.float32), times_s[id]) for id, stack in stacks.items()},
            {id: Track(stack.std(0).astype(np.float32), times_s[id]) for id, stack in stacks.items()},
        )

    def check_whole(self) -> None:
        """Raises VacliError unless every fold is there and all were trained on the same features."""
        missing = [k for k in range(len(self.about["folds"])) if k not in self.runs]
        if missing or not self.finished:
            lacking = f"fold {' and '.join(map(str, missing))}" if missing else "its table"
            raise VacliError(
                f"{self.path} is not finished, it lacks {lacking}: "
                "go on with the `vacli train --folds` command that began it"
            )
        wanted = _features(self.first)
        for k, run in self.runs.items():
            for stream in sorted(wanted.keys() ^ _features(run).keys()) or sorted(
                name for name, recipe in _features(run).items() if recipe != wanted[name]
            ):
                raise VacliError(
                    f"{run.path} and {self.first.path} were trained on different features: {stream} differs; "
                    f"remove fold-{k} and train it again"
                )


def _features(run: Run) -> dict[str, Any]:
    return {name: (stream["recipe"], stream["dim"]) for name, stream in run.about["streams"].items()}


def _cells(found: dict[str, float]) -> str:
    return "".join(f"{found[key]:>8.4f}" for key in ("valence", "arousal", "mean"))


def train_folds(
    store: Store,
    preset: Preset,
    *,
    folds: int = 6,
    only: int | None = None,
    runs: str | Path = "runs",
    name: str | None = None,
    seed: int = 0,
    subjects: dict[str, str] | None = None,
    tell: Callable[[str], None] = print,
) -> Folds:
    """Train the preset once for each fold, or for the fold `only`, each a run below runs/<name>/; see folds_of().

    The split is kept in folds.json. The same command goes on where it was stopped, and trains no fold twice; several
    processes may train one fold each. Whoever finishes the last writes the table. Raises VacliError as train() and
    folds_of() do, and for a folder that holds another split.
    """
    if only is not None and not 0 <= only < max(folds, _FEWEST):
        raise VacliError(f"--fold {only}: with {folds} folds there are the folds 0 to {folds - 1}")
    check_seed(seed)
    if preset.train.init_from:
        tell("note: what train.init_from was trained on is held out of no fold")
    videos = videos_of(store, preset, tell)
    splits = folds_of(videos, folds, seed, subjects)
    own = set(splits[0]["validation"])
    about = _about(preset, seed, splits, videos)
    name = name or f"{preset.name}-{folds}folds-{about['settings'][:8]}"
    path = run_folder(runs, name)
    _begin(path, about)
    torn = [ids for ids in _groups(videos, subjects).values() if len({v in own for v in ids}) > 1]
    if torn:
        tell(
            f"note: fold 0, the split called {about['own']}, has {len(torn)} videos or people "
            f"on both sides, as {torn[0][0]}"
        )
    for k in range(folds) if only is None else [only]:
        split = splits[k]
        tell(
            f"fold {k} of 0 to {folds - 1}: {len(split['train'])} videos, judged by {len(split['validation'])}"
        )
        train(store, preset, runs=runs, name=f"{name}/fold-{k}", seed=seed, tell=tell, splits=split)
    found = _read_folds(path)
    assert found is not None
    return _finish(found, store) if len(found.runs) == folds else found


def _about(preset: Preset, seed: int, splits: list[Split], videos: dict[str, Any]) -> dict[str, Any]:
    about = {"preset": preset.model_dump(), "seed": seed, "folds": splits}
    settings = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
    rows = [sum(videos[v]["rows"] for v in split["validation"]) for split in splits]
    own = "validation" if any(facts["split"] == "validation" for facts in videos.values()) else "held out"
    return {**about, "settings": settings, "rows": rows, "own": own}


def _begin(path: Path, about: dict[str, Any]) -> None:
    """The folder with its folds.json, unless it is there already. Raises VacliError if it holds anything else."""
    if (path / "run.json").exists():
        raise VacliError(f"{path} is a run of its own, no folds: give another --name")
    with one_process(path, "folds"):
        old = _read_about(path)
        if old is None:
            _write(path, about)
        elif old["settings"] != about["settings"]:
            changed = [key for key in ("preset", "seed", "folds") if old[key] != about[key]]
            raise VacliError(
                f"{path} holds other folds, trained with another {' and '.join(changed)} "
                "(the split goes by videos, subjects and seed): give another --name"
            )


@contextlib.contextmanager
def one_process(path: Path, name: str) -> Iterator[None]:
    """In the folder, which is made, and no other process is in here. Raises VacliError where the disk cannot do it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = path / f"{name}.lock"
        if not lock.exists():
            lock.touch()
        with disk.one_at_a_time(lock, path / f"{name}.mark"):
            yield
    except OSError as e:
        raise VacliError(
            f"cannot use {path}: {e.strerror}; mend it and run again: what is done is kept"
        ) from e


def _write(path: Path, about: dict[str, Any]) -> None:
    replace_file(path / "folds.json", json.dumps(about, indent=1).encode())


def _finish(found: Folds, store: Store) -> Folds:
    """The figures over all folds, written into folds.json: from now on the folds are finished."""
    each = np.array([[run.about["figures"][key] for key in _KEYS] for _, run in sorted(found.runs.items())])
    per_fold = [dict(zip(_KEYS, row, strict=True)) for row in each.tolist()]
    if found.finished and found.about["figures"]["folds"] == per_fold:
        return found
    of_all = {
        "mean": dict(zip(_KEYS, each.mean(0).tolist(), strict=True)),
        "std": dict(zip(_KEYS, each.std(0, ddof=1).tolist(), strict=True)),
        "folds": per_fold,
        "out_of_fold": _out_of_fold(found, store),
    }
    finished_at = max(run.about["finished_at"] for run in found.runs.values())
    about = {**found.about, "figures": of_all, "finished_at": finished_at}
    with one_process(found.path, "folds"):
        _write(found.path, about)
    return Folds(found.path, about, found.runs)


_KEYS = ("valence", "arousal", "mean")


def _out_of_fold(found: Folds, store: Store) -> dict[str, float]:
    """CCC over all videos concatenated, each with the curve of the one run of folds 1, 2, ... that left it out."""
    curves: dict[str, Track] = {}
    judges: list[Clip] = []
    for k in range(1, len(found.runs)):
        clips = load_clips(store, found.runs[k].about, "validation")
        curves |= predict(found.runs[k], clips)
        judges += [Clip(c.id, c.times_s, {}, c.labels) for c in clips]  # the features may go
    of_all = figures(curves, judges)
    return {key: of_all[key] for key in _KEYS}


# ---- finding them again --------------------------------------------------------------------------------------


def open_any(wanted: str | Path | None, runs: str | Path = "runs") -> Run | Folds:
    """Finished folds or a finished run: by folder, by name in `runs`, the newest of a head, or the newest of all.

    Raises VacliError if there is none, or if the one asked for is not finished.
    """
    for path in [] if wanted is None else [Path(wanted), Path(runs) / wanted]:
        if (path / "run.json").exists():
            return open_run(path, runs)
        named = _read_folds(path)
        if named is not None:
            named.check_whole()
            return named
        if (path / "journal.log").exists():
            raise VacliError(f"{path} is a sweep: give one of its trials, as --run {path}/trial-000")
    every = [f for f in map(_readable_folds, sorted(Path(runs).glob("*/folds.json"))) if f]
    whole = [f for f in every if f.finished and wanted in (None, f.about["preset"]["name"])]
    if not whole:
        return open_run(wanted, runs)
    newest = max(whole, key=lambda f: f.about["finished_at"])
    newest.check_whole()
    try:
        run = open_run(wanted, runs)
    except VacliError:  # no such run: then it is the folds
        return newest
    return run if run.about["finished_at"] > newest.about["finished_at"] else newest


def _read_about(path: Path) -> dict[str, Any] | None:
    record = path / "folds.json"
    try:
        about = json.loads(record.read_text(encoding="utf-8"))
        missing = {"preset", "seed", "folds", "rows", "own", "settings"} - about.keys()
        if missing or not isinstance(about["folds"], list):
            raise ValueError(f"it lacks {', '.join(sorted(missing)) or 'the splits'}")
        return about
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, AttributeError) as e:
        raise VacliError(f"cannot read {record}: {e}; remove {path} or give another --name") from e


def _read_folds(path: Path) -> Folds | None:
    about = _read_about(path)
    if about is None:
        return None
    opened = {k: _finished_run(path / f"fold-{k}") for k in range(len(about["folds"]))}
    return Folds(path, about, {k: run for k, run in opened.items() if run is not None})


def _readable_folds(record: Path) -> Folds | None:
    """One of several: what cannot be read does not keep the others from being found."""
    try:
        return _read_folds(record.parent)
    except VacliError:
        return None


def _finished_run(path: Path) -> Run | None:
    if not (path / "run.json").exists():
        return None
    try:
        return open_run(path)
    except VacliError:  # begun, or damaged: `vacli train` goes on with it, or says what is wrong
        return None
