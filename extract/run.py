"""The run of stage one: find what is missing, decode, feed every encoder, store; go on from where it was stopped."""

from __future__ import annotations

import contextlib
import itertools
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tqdm import tqdm

from .. import VacliError
from ..store import Damaged, Store, Track
from ..store.labels import read_va
from . import canary
from .crops import Crops, aligned
from .datasets import Sample
from .encoder import Encoder
from .plan import Plan, Wanted

_PIECE_ROWS = 1024  # written at once: a long stretch without a face takes no memory
_REMEMBER_S = 5.0  # media digests are kept as often as this: they are one file that grows


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


def extract(
    samples: list[Sample],
    encoders: dict[str, Encoder],
    store: Store,
    link: bool = True,
    then: Callable[[Outcome], object] | None = None,
) -> list[Outcome]:
    """Make what is missing, sample by sample; one broken video never stops the others.

    link: tell the store's list of videos about the samples (so that training finds them). then: called with each
    outcome as soon as all its tracks are stored; what goes wrong in it is that sample's problem. What was stored
    before is not computed again; stop it at any time and call it again. Raises a fatal VacliError for what would
    befall every video: a store that cannot be written, weights that do not fit.
    """
    run = _Run(encoders, store, link)
    outcomes = []
    calm = 0.1 if sys.stderr.isatty() else 10.0  # a log file gets a line now and then
    due_s = time.monotonic() + _REMEMBER_S
    try:
        with tqdm(samples, desc="extract", unit="video", dynamic_ncols=True, mininterval=calm) as bar:
            for sample in bar:
                bar.set_postfix_str(sample.id[-40:], refresh=sys.stderr.isatty())
                outcomes.append(run.one(sample, then))
                if time.monotonic() > due_s:
                    store.remember_fingerprints()
                    due_s = time.monotonic() + _REMEMBER_S
    except BaseException:
        with contextlib.suppress(VacliError):  # the first mishap is the one to tell
            store.remember_fingerprints()
        raise
    store.remember_fingerprints()
    return outcomes


def _one_line(e: Exception) -> str:
    return " ".join(str(e).split())


# {"problem" | "damage" | "warning": text}; stored with the track, so without the file's name, which may change.
Notes = dict[str, str]


class _Run:
    """What the samples of one run share: the plan, the names the store knew, the encoders whose canary is alive.

    What opens videos is imported where it is done: a run that finds nothing missing needs none of it.
    """

    def __init__(self, encoders: dict[str, Encoder], store: Store, link: bool) -> None:
        self._encoders, self._store, self._link = encoders, store, link
        self._plan = Plan(encoders)
        self._named = store.videos() if link else {}
        self._row_shapes: dict[str, tuple[int, ...]] = {}  # by the recipe's digest
        self._met: set[str] = set()  # digests of recipes that the store has tracks of

    def one(self, sample: Sample, then: Callable[[Outcome], object] | None) -> Outcome:
        """Everything for one sample. Raises only what would befall the others too."""
        outcome = Outcome(sample)
        try:
            self._fill(outcome)
            if then:
                then(outcome)
        except VacliError as e:
            if e.fatal:
                raise
            outcome.problem = _one_line(e)
        except Exception as e:  # a decoder's or a library's own surprise: this video's fault, not the others'
            outcome.problem = f"{sample.source}: {type(e).__name__}: {_one_line(e)}"
        return outcome

    def _fill(self, outcome: Outcome) -> None:
        sample = outcome.sample
        outcome.media = sample.media(self._store.fingerprints)
        outcome.tracks = self._plan.tracks(sample, outcome.media, self._store.fingerprints)
        records = {name: self._record(wanted) for name, wanted in outcome.tracks.items()}
        failed = {name: record for name, record in records.items() if record and "failed" in record}
        missing = {name: outcome.tracks[name] for name, record in records.items() if record is None}
        notes = {name: record["provenance"] for name, record in records.items() if record}
        if missing and "faces" not in failed:  # else there is nothing to make the others from
            for name, new in self._make(outcome, missing):
                notes[name] = new
                outcome.computed.append(name)
        if failed:
            raise VacliError(f"{sample.source}: {_known(sample, list(failed.values()))}")
        outcome.complete = True
        _tell(outcome, list(notes.values()), self._encoders)
        if self._link:
            self._name(outcome)

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

    def _make(self, outcome: Outcome, missing: dict[str, Wanted]) -> Iterator[tuple[str, Notes]]:
        """Compute and store tracks, each told with its notes once it is stored.

        Faces are one pass over the video, all frame encoders together another one, each sound encoder its own.
        """
        sample = outcome.sample
        eaters, hearers = (
            {n: w for n, w in missing.items() if w.eats == food} for food in ("crops", "sound")
        )
        for wanted in (eaters | hearers).values():  # before anything is decoded
            if wanted.kind.digest not in self._row_shapes:
                shape = canary.check(self._store, wanted.recipe, wanted.maker)
                self._row_shapes[wanted.kind.digest] = shape
        if "faces" in missing:
            with self._burying(outcome, ["faces"]):
                track, notes = _watched(sample, missing["faces"].maker)
            yield self._put(outcome, "faces", track, notes)
        by_frame = [name for name in missing if name in (*eaters, "label.va")]
        if by_frame:
            with self._burying(outcome, by_frame):
                times_s, batches, notes = self._frames(outcome)
        if eaters:
            with self._burying(outcome, eaters):
                notes = self._encode(outcome, eaters, batches, times_s, notes)
            yield from ((name, notes) for name in eaters)
        for name, wanted in hearers.items():
            with self._burying(outcome, [name]):
                track, notes = _heard(sample, wanted.maker)
            yield self._put(outcome, name, track, notes)
        if "label.va" in missing:
            assert sample.annotation is not None
            yield self._put(outcome, "label.va", read_va(sample.annotation, times_s), notes)

    def _frames(self, outcome: Outcome) -> tuple[np.ndarray, Iterator[Crops], Notes]:
        """The times of all frames (T,), and the crops to be had of them."""
        sample = outcome.sample
        if sample.crops is None:
            wanted = outcome.tracks["faces"]
            faces = self._store.get(wanted.recipe, wanted.media)
            return faces.times_s, aligned(sample, faces), {}
        times_s, damage = sample.frame_clock()
        return times_s, sample.read_crops(len(times_s)), _damaged(damage)

    def _encode(
        self,
        outcome: Outcome,
        eaters: dict[str, Wanted],
        batches: Iterator[Crops],
        times_s: np.ndarray,
        notes: Notes,
    ) -> Notes:
        """One pass of crops through every encoder and on to the disk; rows without a crop are NaN.

        The space on the disk is taken before the first crop is encoded. Returns what there is to note of the tracks.
        """
        first = list(itertools.islice(batches, 1))
        notes = notes if first else notes | _unseen(len(times_s))
        with contextlib.ExitStack() as stack, _frame_bar("encode", len(times_s)) as bar:
            writers = {
                name: stack.enter_context(
                    self._store.writing(
                        wanted.recipe,
                        wanted.media,
                        len(times_s),
                        self._row_shapes[wanted.kind.digest],
                        np.float16,
                        {"sample": outcome.sample.id, **notes},
                    )
                )
                for name, wanted in eaters.items()
            }
            done = 0
            for crops, rows in itertools.chain(first, batches):
                end = int(rows[-1]) + 1
                for name, wanted in eaters.items():
                    _append(writers[name], times_s[:end], done, wanted.maker(crops), rows)
                bar.update(end - done)
                done = end
            for name, wanted in eaters.items():
                nothing = np.empty((0, *self._row_shapes[wanted.kind.digest]), np.float16)
                _append(writers[name], times_s, done, nothing, np.empty(0, int))
            self._refuse_changed(outcome)
        return notes

    def _put(self, outcome: Outcome, name: str, track: Track, notes: Notes) -> tuple[str, Notes]:
        wanted = outcome.tracks[name]
        self._refuse_changed(outcome)
        self._store.put(wanted.recipe, wanted.media, track, {"sample": outcome.sample.id, **notes})
        return name, notes

    def _refuse_changed(self, outcome: Outcome) -> None:
        """What was read while it was being written is of no medium that has a name."""
        if outcome.sample.media(self._store.fingerprints) != outcome.media:
            raise VacliError(f"{outcome.sample.source}: it changed while it was read; run again")

    @contextlib.contextmanager
    def _burying(self, outcome: Outcome, names: Iterable[str]) -> Iterator[None]:
        """Of what the bytes are to blame for the next run is told at once: these tracks can never be made of them."""
        from .media import MediaError

        try:
            yield
        except MediaError as e:
            self._refuse_changed(outcome)
            for wanted in (outcome.tracks[name] for name in names):
                self._store.fail(wanted.recipe, wanted.media, e.reason, {"sample": outcome.sample.id})
            raise


def _known(sample: Sample, tombstones: list[dict[str, Any]]) -> str:
    """What an earlier run found; the same bytes may have had another name then."""
    reasons = "; ".join(dict.fromkeys(t["failed"] for t in tombstones))
    name = shlex.quote(tombstones[0]["provenance"].get("sample", sample.id))
    return f"{reasons} (known from an earlier run; `vacli store rm {name}` to try again)"


SILENT = {"problem": "it has no sound; its curve rests on the picture alone"}


def _damaged(damage: str | None) -> Notes:
    return {"damage": damage} if damage else {}


def _unseen(rows: int) -> Notes:
    return {"warning": f"no face in any of its {rows} frames"}


def _watched(sample: Sample, faces: Any) -> tuple[Track, Notes]:
    from .media import Video

    assert sample.video is not None
    video = Video(sample.video)
    hint = video.check().frames_hint
    with _frame_bar("faces", hint) as bar:
        track = faces(video, on_frames=bar.update)
    return track, _damaged(video.damage) | ({} if track.valid.any() else _unseen(len(track)))


def _heard(sample: Sample, encoder: Any) -> tuple[Track, Notes]:
    from .media import Video

    assert sample.video is not None
    video = Video(sample.video)
    track = encoder(video.sound(encoder.rate_hz))
    return track, _damaged(video.damage) | ({} if len(track) else SILENT)


def _append(writer: Any, times_s: np.ndarray, done: int, values: np.ndarray, rows: np.ndarray) -> None:
    """Rows `done` to len(times_s) onto a writer: `values` at `rows`, else NaN."""
    for low in range(done, len(times_s), _PIECE_ROWS):
        here = (low <= rows) & (rows < low + _PIECE_ROWS)
        times = times_s[low : low + _PIECE_ROWS]
        piece = np.full((len(times), *values.shape[1:]), np.nan, np.result_type(values, np.float16))
        piece[rows[here] - low] = values[here]
        writer.append(piece, times)


def _frame_bar(doing: str, total: int | None) -> tqdm:
    """The inner bar, over the frames of one video; only for eyes, not for log files."""
    return tqdm(total=total, desc=doing, unit="frame", leave=False, dynamic_ncols=True, disable=None)


def _tell(outcome: Outcome, notes: list[Notes], encoders: dict[str, Encoder]) -> None:
    """The notes of all its tracks, also of those stored by an earlier run: what was wrong then still is."""
    told = {k: list(dict.fromkeys(n[k] for n in notes if k in n)) for k in ("damage", "problem", "warning")}
    if told["damage"]:
        told["problem"] += [*told["damage"], "what could be read is kept; get a whole copy"]
    for name in (n for n, e in encoders.items() if e.eats == "sound" and n not in outcome.tracks):
        told["problem"].append(f"no video of that name beside the crops, so no sound for {name}")
    if told["problem"]:
        outcome.problem = f"{outcome.sample.source}: {'; '.join(told['problem'])}"
    if told["warning"]:
        outcome.warning = f"{outcome.sample.source}: {'; '.join(told['warning'])}"


def labelled_crops(outcome: Outcome, store: Store, most: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Up to `most` evenly spaced frames that have a face and a label: (crops (N, H, W, 3), labels (N, 2)).

    outcome: complete, of `extract` (with no encoder will do). None if there is no such frame. Crops are 112x112, or as
    the data set brings them; raises VacliError where those differ in size.
    """
    sample, tracks = outcome.sample, outcome.tracks
    labels = store.get(tracks["label.va"].recipe, tracks["label.va"].media)
    if sample.crops is None:
        faces = store.get(tracks["faces"].recipe, tracks["faces"].media)
        seen, batches = np.flatnonzero(labels.valid & faces.valid), aligned(sample, faces)
    else:
        seen, batches = np.flatnonzero(labels.valid), sample.read_crops(len(labels))
        seen = np.intersect1d(seen, list(sample.crop_files()))
    if not len(seen):
        return None
    chosen = seen[np.linspace(0, len(seen) - 1, min(most, len(seen))).astype(int)]
    kept = [(crops[here], rows[here]) for crops, rows in batches if (here := np.isin(rows, chosen)).any()]
    if not kept:
        return None
    if len({crops.shape[1:] for crops, _ in kept}) > 1:
        raise VacliError(f"{sample.crops}: crops of several sizes; wanted one size, 112x112")
    rows = np.concatenate([rows for _, rows in kept])
    return np.concatenate([crops for crops, _ in kept]), labels.values[rows]
