"""The run of stage one: find what is missing, decode, feed every encoder, store; go on from where it was stopped."""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import numpy as np
from tqdm import tqdm

from .. import VacliError
from ..store import Damaged, Store, Track
from ..store.names import plain_id
from . import canary
from .crops import Crops
from .datasets import Sample
from .encoder import Encoder
from .making import SILENT, Making, Notes
from .people import People
from .pipeline import Busy, Job, Machine, Rows
from .plan import EVERYBODY, Plan, Wanted
from .progress import Progress

_REMEMBER_S = 5.0  # media digests are kept as often as this: they are one file that grows
_POLL_S = 0.2  # how often is looked whether another process is done with a video
_MOST_READERS = 8  # videos read at once; more would only hold more pictures in memory
_log = logging.getLogger(__name__)


@dataclass
class Outcome:
    """What became of one sample. complete: every track planned is stored. problem: something asked for could not
    be had. warning: odd, but as it should be. media: digest of what its pictures are made from."""

    sample: Sample
    media: str = ""
    complete: bool = False
    tracks: dict[str, Wanted] = field(default_factory=dict)
    computed: list[str] = field(default_factory=list)
    problem: str | None = None
    warning: str | None = None

    def frames_and_faces(self, tracks: dict[str, Track]) -> tuple[np.ndarray, np.ndarray]:
        """(T,) seconds of every frame and (T,) bool, where a face was seen, of the stored tracks of this sample."""
        pictures = [n for n, w in self.tracks.items() if n == "faces" or w.eats == "crops"]
        if pictures:
            return tracks[pictures[0]].times_s, tracks[pictures[0]].valid
        times_s = self.sample.frame_times_s()
        return times_s, np.isin(np.arange(len(times_s)), list(self.sample.crop_files()))


def shard(samples: list[Sample], part: str) -> list[Sample]:
    """Part "i/n" of the samples, 1/n to n/n: every n-th video, in the order of their ids. Raises VacliError.

    The parts of one folder have nothing in common and are the whole together; people in one video stay together.
    """
    first, slash, count = part.partition("/")
    if not (slash and first.isdigit() and count.isdigit() and 1 <= int(first) <= int(count)):
        raise VacliError(f"--shard {part}: wanted I/N, as 1/4, 2/4, 3/4 and 4/4")
    samples = sorted(samples, key=lambda s: s.id)
    sources = {source: n for n, source in enumerate(dict.fromkeys(s.video or s.crops for s in samples))}
    return [s for s in samples if sources[s.video or s.crops] % int(count) == int(first) - 1]


def extract(
    samples: list[Sample],
    encoders: dict[str, Encoder],
    store: Store,
    link: bool = True,
    then: Callable[[Outcome], object] | None = None,
    people: People | None = None,
    tell: Callable[[str], object] = lambda _: None,
    outcomes: list[Outcome] | None = None,
    sound_is_asked_for: bool = True,
) -> list[Outcome]:
    """Make what is missing, several samples at a time; one broken video never stops the others.

    link: tell the store's list of videos about the samples (so that training finds them). then: called with each
    outcome as soon as all its tracks are stored; what goes wrong in it is that sample's problem. people: how faces are
    found; by MTCNN in every frame. tell: gets a line on where the time went. outcomes: a list to put the outcomes
    in as they come, for one who wants to know them though this is stopped. sound_is_asked_for: a video without any is
    a problem; else it is worth a warning, as a curve can be drawn from the pictures alone.

    Returns the outcomes in the order of the samples, those of a sample for everybody in its place. What was stored
    before is not computed again; stop it at any time and call it again. A video that another process is at is left to
    it, and looked at again when all others are done. Raises a fatal VacliError for what would befall every video: a
    store that cannot be written, weights that do not fit.
    """
    outcomes = [] if outcomes is None else outcomes
    run = _Run(encoders, store, link, then, people or People(), outcomes, sound_is_asked_for)
    try:
        run.all(samples, tell)
    except BaseException:
        with contextlib.suppress(VacliError):  # the first mishap is the one to tell
            store.remember_fingerprints()
        raise
    store.remember_fingerprints()
    place = {id(s): n for n, s in enumerate(samples)}
    outcomes.sort(key=lambda o: (place[id(run.stands_for.get(id(o.sample), o.sample))], o.sample.id))
    return outcomes


def _one_line(e: Exception) -> str:
    return " ".join(str(e).split())


@dataclass(eq=False)
class _Task:
    """What is to be done about a sample; making None: nothing. notes, failed: of what is there, tombstones apart."""

    outcome: Outcome
    notes: dict[str, Notes]
    failed: dict[str, dict[str, Any]]
    making: Making | None = None
    unclaim: Callable[[], None] = lambda: None
    error: Exception | None = None


class _Run:
    """What the samples of one run share: the plan, the names the store knew, the encoders whose canary is alive.

    What opens videos is imported where it is done: a run that finds nothing missing needs none of it.
    """

    def __init__(
        self,
        encoders: dict[str, Encoder],
        store: Store,
        link: bool,
        then: Callable[[Outcome], object] | None,
        people: People,
        outcomes: list[Outcome],
        sound_is_asked_for: bool,
    ) -> None:
        self._silence = "problem" if sound_is_asked_for else "warning"
        self._encoders, self._store, self._link, self._then = encoders, store, link, then
        self._plan, self._outcomes = Plan(encoders, people), outcomes
        self._named = store.videos() if link else {}
        self._row_shapes: dict[str, tuple[int, ...]] = {}  # by the recipe's digest
        self._met: set[str] = set()  # digests of recipes that the store has tracks of
        self._turns = {
            id(e): threading.Lock() for e in encoders.values()
        }  # one sound at a time through a network
        self._due_s = time.monotonic() + _REMEMBER_S
        self._wait: Callable[[], object] = lambda: time.sleep(_POLL_S)
        self._running: set[_Task] = set()
        self._everybody: set[int] = set()  # the id() of samples for everybody whose people are not known yet
        self._people: deque[Sample] = deque()  # those that were found in them
        self.stands_for: dict[int, Sample] = {}  # by the id() of a person's sample: the one for everybody

    def all(self, samples: list[Sample], tell: Callable[[str], object]) -> None:
        """Look at each; from the first one with something missing on, with the whole machine."""
        calm = 0.1 if sys.stderr.isatty() else 10.0  # a log file gets a line now and then
        tasks = self._tasks(samples)
        looking = tqdm(total=len(samples), desc="look", unit="video", mininterval=calm, delay=1, leave=False)
        done: set[int] = set()  # the id() of samples with nothing to do
        with looking as bar:
            for task in tasks:
                bar.update()
                if task.making:
                    break
                self._finish(task)
                done.add(id(task.outcome.sample))
                self._remember()
            else:
                return
        busy = Busy()
        readers = max(1, min(_MOST_READERS, (os.cpu_count() or 2) // 2, len(samples)))
        machine = Machine(readers, busy)
        _log.info("%d videos to look at, %d are read at once", len(samples) - len(done), readers)
        self._wait = machine.wait
        with Progress([s for s in samples if id(s) not in done], calm) as progress:
            jobs = self._jobs(chain([task], tasks), machine, busy, progress)
            finished = machine.run(
                jobs, lambda task: self._answer(task, progress), lambda: self._tick(progress)
            )
            try:
                for job in finished:
                    self._finish(job.about, job.error or job.about.making.error)
                    progress.done(job.about.outcome.sample, job.about.making.frames)
            finally:
                finished.close()
                for task in self._running:  # stopped on the way
                    task.unclaim()
        tell(busy.report(readers))

    # ---- looking what is missing; of this the machine has a thread -------------------------------------------

    def _tasks(self, samples: Iterable[Sample]) -> Iterator[_Task]:
        """Every sample, claimed where something is missing. Those that somebody is at come last."""
        at_others: deque[Sample] = deque()
        for sample in samples:
            if task := self._look(sample):
                yield task
            else:
                at_others.append(sample)
        while at_others or self._everybody or self._people:  # they are put there before it goes
            at_others.extend(self._people.popleft() for _ in range(len(self._people)))
            for _ in range(len(at_others)):
                sample = at_others.popleft()
                if task := self._look(sample):
                    yield task
                else:
                    at_others.append(sample)
            if at_others or self._everybody:
                self._wait()

    def _look(self, sample: Sample) -> _Task | None:
        """What is to be done about it; None where somebody is at it. Raises only what would befall the others too."""
        task = _Task(Outcome(sample), {}, {})
        outcome, unclaim = task.outcome, None
        try:
            outcome.media = sample.media(self._store.fingerprints)
            outcome.tracks = self._plan.tracks(sample, outcome.media, self._store.fingerprints)
            if self._missing(task):
                unclaim = self._claim(task)
                if unclaim is None:
                    return None
                if missing := self._missing(task):  # now that nobody else is at it
                    task.unclaim, unclaim = unclaim, None
                    task.making = Making(
                        sample, outcome.media, outcome.tracks, missing, self._store, self._row_shapes
                    )
                    self._running.add(task)
                    here = ", ".join(outcome.tracks.keys() - missing.keys()) or "nothing"
                    _log.info("%s: to be made: %s; there: %s", sample.source, ", ".join(missing), here)
        except VacliError as e:
            if e.fatal:
                raise
            task.error = e
        except Exception as e:
            task.error = e
        finally:
            if unclaim:
                unclaim()
        if task.making and sample.person == EVERYBODY:
            self._everybody.add(id(sample))
        return task

    def _claim(self, task: _Task) -> Callable[[], None] | None:
        """Its pictures, and the sound that other samples may share."""
        with contextlib.ExitStack() as claims:
            wanted = task.outcome.tracks.values()
            for media in dict.fromkeys([task.outcome.media, *(w.media for w in wanted if w.eats == "sound")]):
                unclaim = self._store.claim(media)
                if unclaim is None:
                    return None
                claims.callback(unclaim)
            return claims.pop_all().close

    def _missing(self, task: _Task) -> dict[str, Wanted]:
        """Tracks to be made; what is there goes into the task."""
        tracks = task.outcome.tracks
        records = {name: self._record(wanted) for name, wanted in tracks.items()}
        task.failed = {name: record for name, record in records.items() if record and "failed" in record}
        task.notes = {name: record["provenance"] for name, record in records.items() if record}
        if "people" in task.failed:  # there is nothing to make the others from
            return {}
        return {name: tracks[name] for name, record in records.items() if record is None}

    def _record(self, wanted: Wanted) -> dict[str, Any] | None:
        """The commit record of what the store has, be it a tombstone; None where it has nothing whole."""
        try:
            record = self._store.record(wanted.entry)
        except KeyError:
            return None
        except Damaged:
            record = {}
        if (record.get("recipe"), record.get("media")) != (wanted.kind.digest, wanted.media):
            self._store.has(wanted.recipe, wanted.media)  # sets it aside
            return None
        if wanted.kind.digest not in self._met:  # `record` goes by the entry's name alone
            self._store.has(wanted.recipe, wanted.media)  # mends the readable recipe beside the tracks
            self._met.add(wanted.kind.digest)
        return record

    def _name(self, outcome: Outcome) -> None:
        """Tell the store's list of videos what is new to it."""
        sample, old = outcome.sample, self._named.get(outcome.sample.id)
        linked = {name: {**w.kind.address, "media": w.media} for name, w in outcome.tracks.items()}
        same = old and old["media"] == outcome.media and sample.split in (None, old["split"])
        if not (old and same and all(old["tracks"].get(name) == track for name, track in linked.items())):
            facts = {"root": str(sample.root), "split": sample.split, "media": outcome.media}
            self._store.link(sample.id, facts, linked)

    # ---- making what is missing ------------------------------------------------------------------------------

    def _jobs(
        self, tasks: Iterable[_Task], machine: Machine, busy: Busy, progress: Progress
    ) -> Iterator[Job]:
        for task in tasks:
            machine.ask(task)
            if task.making:
                yield self._job(task, task.making, machine, busy, progress)

    def _job(self, task: _Task, making: Making, machine: Machine, busy: Busy, progress: Progress) -> Job:
        told = progress.of(task.outcome.sample, making.passes)

        def read(job: Job) -> Iterator[Crops]:
            def start(writing: Generator[None, Rows | None, None]) -> None:
                job.writing = writing

            return making.read(start, machine.watched, told, busy, self._turns)

        done = 0

        def encoded(rows: np.ndarray) -> None:
            nonlocal done
            told(int(rows[-1]) + 1 - done)
            done = int(rows[-1]) + 1

        return Job(read, {name: self._encoders[name] for name in making.eaters}, task, encoded)

    def _answer(self, task: _Task, progress: Progress) -> None:
        """In the main thread: a sample with nothing to do is done; else its encoders' canaries, before any decoding."""
        try:
            for wanted in task.making.missing.values() if task.making else ():
                if wanted.eats and wanted.kind.digest not in self._row_shapes:
                    shape = canary.check(self._store, wanted.recipe, wanted.maker)
                    self._row_shapes[wanted.kind.digest] = shape
        except Exception as e:  # an encoder's own surprise, met again at every sample
            if getattr(e, "fatal", False):
                raise
            task.error, task.making = e, None
        if task.making is None:
            self._finish(task)
            progress.done(task.outcome.sample, None)

    def _tick(self, progress: Progress) -> None:
        progress.show()
        self._remember()

    def _remember(self) -> None:
        if time.monotonic() > self._due_s:
            self._store.remember_fingerprints()
            self._due_s = time.monotonic() + _REMEMBER_S

    # ---- what became of it -----------------------------------------------------------------------------------

    def _finish(self, task: _Task, error: Exception | None = None) -> None:
        """The outcome of one sample, in the main thread. Raises only what would befall the others too."""
        outcome, sample = task.outcome, task.outcome.sample
        if task.making:
            outcome.computed = [name for name in outcome.tracks if name in task.making.notes]
            task.notes |= task.making.notes
        try:
            if error or task.error:
                raise error or task.error  # type: ignore[misc]
            self._complete(task)
        except VacliError as e:
            if e.fatal:
                raise
            outcome.problem = _one_line(e)
        except Exception as e:  # a decoder's or a library's own surprise: this video's fault, not the others'
            outcome.problem = f"{sample.source}: {type(e).__name__}: {_one_line(e)}"
            _log.info("%s: where that happened", sample.source, exc_info=e)
        if sample.person != EVERYBODY or outcome.problem:
            self._outcomes.append(outcome)
        if task.making or outcome.problem:
            _log.info("%s: %s", sample.id, outcome.problem or f"stored {', '.join(outcome.computed)}")
        task.unclaim()
        self._running.discard(task)
        self._everybody.discard(id(sample))

    def _complete(self, task: _Task) -> None:
        outcome, sample = task.outcome, task.outcome.sample
        if task.failed:
            raise VacliError(f"{sample.source}: {_known(sample, list(task.failed.values()))}")
        if sample.person == EVERYBODY:
            self._find_everybody(outcome)
            return
        outcome.complete = True
        _tell(outcome, list(task.notes.values()), self._encoders, self._silence)
        if self._link:
            self._name(outcome)
        if self._then:
            self._then(outcome)

    def _find_everybody(self, outcome: Outcome) -> None:
        """A sample for each of the people; the annotation is of the main one."""
        sample = outcome.sample
        count = self._store.record(outcome.tracks["people"].entry)["arrays"]["values"]["shape"][1]
        for k in range(1, count + 1):
            name = plain_id(f"{sample.id}_person{k}")
            annotation = sample.annotation if k == 1 else None
            person = replace(sample, id=name, person=str(k), annotation=annotation, among=sample.id)
            self.stands_for[id(person)] = sample
            self._people.append(person)


def _known(sample: Sample, tombstones: list[dict[str, Any]]) -> str:
    """What an earlier run found; the same bytes may have had another name then."""
    reasons = "; ".join(dict.fromkeys(t["failed"] for t in tombstones))
    name = shlex.quote(tombstones[0]["provenance"].get("sample", sample.id))
    return f"{reasons} (known from an earlier run; `vacli store rm {name}` to try again)"


def _tell(outcome: Outcome, notes: list[Notes], encoders: dict[str, Encoder], silence: str) -> None:
    """The notes of all its tracks, also of those stored by an earlier run: what was wrong then still is.

    silence: whether that is a "problem" or a "warning".
    """
    kind, said = silence, SILENT["problem"]
    if not any(e.eats == "crops" for e in encoders.values()):
        kind, said = "problem", "it has no sound, and nothing else of it is read"
    quiet = SILENT["problem"]
    notes = [dict((kind, said) if text == quiet else (k, text) for k, text in note.items()) for note in notes]
    told = {k: list(dict.fromkeys(n[k] for n in notes if k in n)) for k in ("damage", "problem", "warning")}
    if told["damage"]:
        told["problem"] += [*told["damage"], "what could be read is kept; get a whole copy"]
    for name in (n for n, e in encoders.items() if e.eats == "sound" and n not in outcome.tracks):
        told[silence].append(f"no video of that name beside the crops, so no sound for {name}")
    if told["problem"]:
        outcome.problem = f"{outcome.sample.source}: {'; '.join(told['problem'])}"
    if told["warning"]:
        outcome.warning = f"{outcome.sample.source}: {'; '.join(told['warning'])}"
