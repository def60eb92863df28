"""Search for settings: a preset trained many times over a space of its keys, by optuna, in any number of processes."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from .. import VacliError
from ..store import Store, disk
from .folds import one_process
from .plan import check_seed, run_folder, videos_of
from .predict import Run, open_run
from .preset import Preset, load_preset
from .train import train

if TYPE_CHECKING:
    import optuna

_STUDY = "vacli"
_SHOWN = 5
Changes = dict[str, str]  # key of the preset -> TOML value, as load_preset() has them


# ---- the space -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Over:
    """One key of the preset and what it may be: one of `choices` (TOML values), or a number from low to high.

    Whole numbers where both ends are. log: evenly over the orders of magnitude.
    """

    key: str
    choices: tuple[str, ...] = ()
    low: float = 0
    high: float = 0
    log: bool = False

    @classmethod
    def parse(cls, text: str) -> Over:
        """KEY=LOW..HIGH, KEY=LOW..HIGH:log or KEY=VALUE,VALUE,... Raises VacliError."""
        key, _, values = text.partition("=")
        choices = tuple(_pieces(values))
        if not key or not values or "" in choices:
            raise VacliError(
                f"--over {text}: wanted KEY=LOW..HIGH[:log] or KEY=VALUE,VALUE, as train.lr=1e-5..1e-3:log"
            )
        if len(choices) > 1:
            if len(set(choices)) < len(choices):
                raise VacliError(f"--over {text}: a value is there twice; wanted each once")
            return cls(key, choices)
        ends, _, how = values.partition(":")
        low, dots, high = ends.partition("..")
        try:
            found = cls(key, (), _number(low), _number(high), how == "log")
        except ValueError as e:
            raise VacliError(
                f"--over {text}: one value is nothing to choose from; wanted LOW..HIGH[:log] or VALUE,VALUE"
            ) from e
        if how not in ("", "log") or not dots or not found.low < found.high or (how and found.low <= 0):
            raise VacliError(
                f"--over {text}: wanted LOW..HIGH with LOW below HIGH; with :log, LOW above 0 and nothing behind it"
            )
        return found

    @property
    def extremes(self) -> tuple[str, ...]:
        """Values enough to see whether a preset has such a key."""
        return self.choices or (repr(self.low), repr(self.high))

    def suggest(self, trial: optuna.Trial) -> str:
        """A TOML value; of a trial that has this key already, the one it has."""
        if self.choices:
            return trial.suggest_categorical(self.key, self.choices)
        if isinstance(self.low, int) and isinstance(self.high, int):
            return repr(trial.suggest_int(self.key, self.low, self.high, log=self.log))
        exact = trial.suggest_float(self.key, self.low, self.high, log=self.log)
        return repr(
            min(max(float(f"{exact:.3g}"), self.low), self.high)
        )  # three digits: fit to be typed again


def _number(text: str) -> float:
    number = int(text) if re.fullmatch(r"[+-]?\d+", text) else float(text)
    if not math.isfinite(number):
        raise ValueError(text)
    return number


def _pieces(text: str) -> Iterator[str]:
    """The text cut at its commas, but for those in brackets and quotes."""
    depth, quote, begin = 0, "", 0
    for i, c in enumerate(text):
        if quote:
            quote = "" if c == quote else quote
        elif c in "\"'":
            quote = c
        elif c in "[{":
            depth += 1
        elif c in "]}":
            depth -= 1
        elif c == "," and depth == 0:
            yield text[begin:i].strip()
            begin = i + 1
    yield text[begin:].strip()


def _space(texts: Sequence[str], load: Callable[[Changes], Preset], changes: Changes) -> list[Over]:
    """The space, each key known to the preset. Raises VacliError."""
    space = [Over.parse(text) for text in texts]
    if not space:
        raise VacliError("nothing to search: wanted --over KEY=LOW..HIGH or KEY=VALUE,VALUE, once or more")
    keys = [over.key for over in space]
    for key in keys:
        if keys.count(key) > 1 or key in changes:
            raise VacliError(f"{key} is given twice: wanted it in one --over, and not in --set")
    for over in space:
        refused = []
        for value in over.extremes:
            try:
                load({over.key: value})
            except VacliError as e:
                refused.append(e)
        if len(refused) == len(over.extremes):  # some may be right only together with another key's
            raise refused[0]
    return space


# ---- the sweep -----------------------------------------------------------------------------------------------


def sweep(
    store: Store,
    head: str,
    space: Sequence[str],
    *,
    trials: int = 20,
    changes: Changes | None = None,
    streams: list[str] | None = None,
    runs: str | Path = "runs",
    name: str | None = None,
    seed: int = 0,
    tell: Callable[[str], None] = print,
    show: Callable[[Ranking], object] | None = None,
) -> Run:
    """Train a head with `trials` settings out of a space, each a run below runs/<name>/; returns the best of them.

    space: texts as Over.parse() takes them. trials: how many are to be finished or failed, over all processes and
    calls. The same call goes on, also with trials that were stopped half-way; several processes share the work. What is
    proposed depends on seed and on the trials so far, so a single process always does the same. Judged by the mean CCC
    of the validation videos; the best of many tries on them is optimistic, which the last lines say too. show: gets
    what was found; without it `tell` gets its lines.

    Proposals: TPE as optuna has it (Bergstra et al. 2011, Algorithms for Hyper-Parameter Optimization). Raises
    VacliError where optuna is not installed, for a space that is none, a folder of another sweep, and if every trial
    failed.
    """
    if trials < 1:
        raise VacliError(f"{trials} trials: wanted 1 or more")
    check_seed(seed)
    changes = dict(changes or {})

    def load(more: Changes) -> Preset:
        return load_preset(head, {**changes, **more}, streams)

    preset = load({})
    overs = _space(space, load, changes)
    settings = _settings(preset, overs, seed, videos_of(store, preset, tell))
    name = name or f"{preset.name}-sweep-{_digest(settings)[:8]}"
    searched = _Sweep(run_folder(runs, name), overs, seed, settings)
    while (trial := searched.next(trials)) is not None:
        with trial:
            tell(f"{trial.name} of {trials} trials: {' '.join(_said(trial.changes))}")
            try:
                run = train(
                    store,
                    load(trial.changes),
                    runs=runs,
                    name=f"{name}/{trial.name}",
                    seed=seed,
                    tell=functools.partial(_tell_of, trial.name, tell),
                )
            except VacliError as e:
                if e.fatal or isinstance(e.__cause__, OSError):  # of the machine, not of these settings
                    raise
                searched.failed(trial, str(e))
                tell(f"{trial.name} failed: {e}")
            else:
                searched.finished(trial, run.about["figures"])
    again = ["vacli", "train", "--head", head, *(w for s in streams or [] for w in ("--stream", s))]
    again += ["--store", str(store.path), "--runs", str(runs)]
    ranking = searched.ranking(again, changes)
    if show is None:
        for line in ranking.lines():
            tell(line)
    else:
        show(ranking)
    return open_run(searched.path / ranking.trials[0].name)


def _settings(preset: Preset, overs: list[Over], seed: int, videos: dict[str, Any]) -> dict[str, Any]:
    """What trials must have in common to be compared, as plain JSON."""
    space = [repr(over) for over in sorted(overs, key=lambda o: o.key)]
    settings = {"head": preset.model_dump(), "space": space, "seed": seed, "videos": _digest(videos)}
    return json.loads(json.dumps(settings))


def _digest(tree: Any) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def _tell_of(name: str, tell: Callable[[str], None], line: str) -> None:
    tell(f"{name}  {line}")


def _said(changes: Changes) -> list[str]:
    return [f"{key}={value}" for key, value in changes.items()]


@dataclass(frozen=True)
class Tried:
    """A finished trial: what it changed, and its figures on the validation videos."""

    name: str
    changes: Changes
    figures: dict[str, float]


@dataclass(frozen=True)
class Ranking:
    """What a sweep found: the finished trials that differ, best first, and the command that remakes the best one.

    known: trials there are, those that failed and those that are being trained included.
    """

    path: Path
    trials: list[Tried]
    known: int
    failed: int
    running: int
    command: str

    def lines(self) -> list[str]:
        """A table of the best ones, a warning, and the command."""
        lines = [
            f"the best of {self.known} trials in {self.path} ({len(self.trials)} different ones finished, "
            f"{self.failed} failed, {self.running} being trained by other processes)",
            f"{'trial':<10}{'CCC V':>8}{'A':>8}{'mean':>8}",
        ]
        for t in self.trials[:_SHOWN]:
            found = "".join(f"{t.figures[key]:>8.4f}" for key in ("valence", "arousal", "mean"))
            lines.append(f"{t.name} {found}  {' '.join(_said(t.changes))}")
        lines.append(
            f"the best of {len(self.trials)} on the same validation videos is optimistic: judge it on others, "
            f"or with --folds 6 behind this command, which remakes {self.path}/{self.trials[0].name}:"
        )
        return [*lines, self.command]

    def as_json(self) -> dict[str, Any]:
        """All of it, as plain JSON."""
        return {**asdict(self), "path": str(self.path)}


@dataclass
class _Trial:
    """A trial that is this process's own while its lock is held; given up before its end, whoever comes goes on."""

    record: optuna.Trial
    changes: Changes
    lock: Path
    held: int

    @property
    def name(self) -> str:
        return f"trial-{self.record.number:03}"

    def __enter__(self) -> _Trial:
        return self

    def __exit__(self, *_: object) -> None:
        disk.unclaim(self.lock, self.held)


class _Alone:
    """The journal's own lock would outlive a kill -9: instead every touch of the journal is inside _Sweep._alone()."""

    def acquire(self) -> bool:
        return True

    def release(self) -> None:
        pass


class _Sweep:
    """The folder of a sweep: the journal of optuna, and for each trial its run and, while it is trained, its lock.

    A trial that is RUNNING in the journal and whose lock is free was left by a process that is no more. On a disk that
    knows no locks this cannot be told: one process at a time there.
    """

    def __init__(self, path: Path, space: list[Over], seed: int, settings: dict[str, Any]) -> None:
        self.optuna = _import_optuna()
        self.path, self.space, self.seed = path, space, seed
        if (path / "run.json").exists() or (path / "folds.json").exists():
            raise VacliError(f"{path} is a run or folds, no sweep: give another --name")
        with self._alone():
            self.study = self._open(settings)

    def _alone(self) -> contextlib.AbstractContextManager[None]:
        return one_process(self.path, "sweep")

    def _open(self, settings: dict[str, Any]) -> optuna.Study:
        storages = self.optuna.storages
        journal = self.path / "journal.log"
        _cut_what_is_half(journal)
        try:
            backend = storages.journal.JournalFileBackend(str(journal), lock_obj=cast(Any, _Alone()))
            kept = storages.JournalStorage(backend)
            if kept.get_all_studies():
                study = self.optuna.load_study(storage=kept, study_name=_STUDY)
            else:
                study = self.optuna.create_study(storage=kept, study_name=_STUDY, direction="maximize")
            known = study.user_attrs.get("settings", {})
            changed = [key for key in settings if known.get(key) != settings[key]]
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise VacliError(f"{journal} is damaged ({e}); remove {self.path} or give another --name") from e
        if not known:
            study.set_user_attr("settings", settings)
        elif changed:
            raise VacliError(
                f"{self.path} is a sweep with another {' and '.join(changed)}: give another --name"
            )
        return study

    def next(self, trials: int) -> _Trial | None:
        """A trial to train: one that was left half-way, else a new one; None where `trials` are done or in hand."""
        with self._alone():
            known = self.study.get_trials(deepcopy=False)
            for frozen in known:
                if frozen.state == self.optuna.trial.TrialState.RUNNING:
                    mine = self._claim(frozen.number)
                    if mine is not None:
                        self.study.sampler = self._sampler(frozen.number)  # in case it lacks some key yet
                        return self._settle(self.optuna.Trial(self.study, frozen._trial_id), *mine)
            while len(known) < trials:
                self.study.sampler = self._sampler(len(known))
                trial = self.study.ask()
                mine = self._claim(trial.number)
                assert mine is not None
                found = self._settle(trial, *mine)
                twin = self._twin(found)
                if twin is None:
                    return found
                with found:
                    trial.set_user_attr("same_as", twin.number)
                    self.study.tell(trial, twin.value)
                known = self.study.get_trials(deepcopy=False)
        return None

    def _sampler(self, number: int) -> optuna.samplers.BaseSampler:
        """One for each trial, with a seed of its own: processes that began alike would all propose the same."""
        seed = int.from_bytes(hashlib.sha256(f"{self.seed} {number}".encode()).digest()[:4])
        return self.optuna.samplers.TPESampler(seed=seed)

    def _claim(self, number: int) -> tuple[Path, int] | None:
        lock = self.path / f"trial-{number:03}.lock"
        held = disk.claim(lock)
        return None if held is None else (lock, held)

    def _settle(self, trial: optuna.Trial, lock: Path, held: int) -> _Trial:
        changes = {over.key: over.suggest(trial) for over in self.space}
        trial.set_user_attr("changes", changes)
        return _Trial(trial, changes, lock, held)

    def _twin(self, trial: _Trial) -> optuna.trial.FrozenTrial | None:
        """A finished trial with the same settings: its result stands for this one's."""
        return next((t for t in self._complete() if t.user_attrs["changes"] == trial.changes), None)

    def _complete(self) -> list[optuna.trial.FrozenTrial]:
        complete = self.optuna.trial.TrialState.COMPLETE
        return [
            t
            for t in self.study.get_trials(deepcopy=False, states=(complete,))
            if "same_as" not in t.user_attrs
        ]

    def finished(self, trial: _Trial, figures: dict[str, float]) -> None:
        with self._alone():
            trial.record.set_user_attr(
                "figures", {key: figures[key] for key in ("valence", "arousal", "mean")}
            )
            self.study.tell(trial.record, figures["mean"])

    def failed(self, trial: _Trial, problem: str) -> None:
        with self._alone():
            trial.record.set_user_attr("problem", problem)
            self.study.tell(trial.record, state=self.optuna.trial.TrialState.FAIL)

    def ranking(self, again: list[str], changes: Changes) -> Ranking:
        """What there is so far. again: how the command that remakes the best begins. Raises VacliError if none."""
        with self._alone():
            known = self.study.get_trials(deepcopy=False)
            # of equals the first
            ranked = sorted(self._complete(), key=lambda t: -t.user_attrs["figures"]["mean"])
        problems = [t.user_attrs["problem"] for t in known if "problem" in t.user_attrs]
        running = sum(not t.state.is_finished() for t in known)
        if not ranked:
            why = f"; the first: {problems[0]}" if problems else ""
            raise VacliError(
                f"no trial of {self.path} is finished, {len(problems)} failed and {running} are being trained{why}"
            )
        found = [
            Tried(f"trial-{t.number:03}", t.user_attrs["changes"], t.user_attrs["figures"]) for t in ranked
        ]
        sets = [w for text in _said({**changes, **found[0].changes}) for w in ("--set", text)]
        command = shlex.join([*again, *sets, "--seed", str(self.seed)])
        return Ranking(self.path, found, len(known), len(problems), running, command)


def _cut_what_is_half(journal: Path) -> None:
    """The last line of a process that was killed while it wrote it: what comes behind it could not be read."""
    if not journal.exists():
        return
    with open(journal, "r+b") as f:
        whole = f.read().rfind(b"\n") + 1
        f.truncate(whole)


def _import_optuna() -> Any:
    try:
        import optuna
        import optuna.storages.journal
    except ImportError as e:
        raise VacliError(
            f"a sweep needs optuna, which cannot be imported ({e}): pip install 'vacli[sweep]'"
        ) from e
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # we tell what there is to tell
    return optuna
