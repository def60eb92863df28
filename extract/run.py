"""The run of stage one: plan what is missing, decode, feed every encoder, store; go on from where it was stopped."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import av
import numpy as np
from tqdm import tqdm

from .. import VacliError, lookup
from ..store import Fingerprints, Store, Track, combine, digest, folder_name
from ..store.labels import VA_RECIPE, read_va
from . import ENCODERS
from .datasets import CROPS_RATE_HZ, Sample
from .faces import Faces, align
from .media import Video

_DECODER = f"PyAV {av.__version__.split('.')[0]}"
PICTURES = {"decoder": _DECODER, "pictures": "every frame, upright, square pixels, at its own time"}
SOUND = {"decoder": _DECODER, "sound": "mono, placed by its own timestamps, holes are silence"}
GIVEN_CROPS = {
    "track": "faces",
    "version": 1,
    "source": "aligned crops of the data set; file %05d is frame number, from 1",
    "rate_hz_without_video": CROPS_RATE_HZ,
}
OWN_TRACKS = ("faces", "label.va")  # the names of tracks that no encoder makes
_BATCH = 64


class Encoder(Protocol):
    """What the run asks of an encoder.

    eats "crops": called with aligned faces (B, 112, 112, 3) uint8 RGB, returns (B, D) floats, and says `dim`.
    (Where a data set brings its own crops they come in their own size.)
    eats "sound": says `rate_hz`, is called with an iterator of mono sample blocks, returns a Track.
    options() are the arguments that make the same encoder again; `name` is what its tracks are called by default.
    """

    name: str
    eats: str

    def recipe(self) -> dict[str, Any]: ...
    def options(self) -> dict[str, Any]: ...
    def __call__(self, data: Any) -> Any: ...


@dataclass(frozen=True)
class Wanted:
    """A track some sample should have: where the store keeps it and who makes it."""

    recipe: dict[str, Any]
    media: str
    maker: Any


@dataclass
class Outcome:
    """What became of one sample. complete: every track planned is stored. problem: something asked for could not
    be had. warning: odd, but as it should be."""

    sample: Sample
    complete: bool = False
    tracks: dict[str, Wanted] = field(default_factory=dict)
    computed: list[str] = field(default_factory=list)
    problem: str | None = None
    warning: str | None = None

    def frames_and_faces(self, tracks: dict[str, Track]) -> tuple[np.ndarray, np.ndarray]:
        """(T,) seconds of every frame and (T,) bool, where a face was seen, of the stored tracks of this sample."""
        pictures = [
            n for n, w in self.tracks.items() if n == "faces" or getattr(w.maker, "eats", "") == "crops"
        ]
        if pictures:
            return tracks[pictures[0]].times_s, tracks[pictures[0]].valid
        times_s = self.sample.frame_times_s()
        return times_s, np.isin(np.arange(len(times_s)), list(self.sample.crop_files()))


def make_encoders(
    names: Iterable[str], options: dict[str, dict[str, str]], fingerprints: Fingerprints
) -> dict[str, Encoder]:
    """Encoders by track name. A name is one of the table, or `mae-tuned=mae`: an encoder under a name of your own.

    options: track name -> keyword -> value, as given by -o NAME.KEY=VALUE. Raises VacliError for what is unknown.
    """
    encoders: dict[str, Encoder] = {}
    for spec in names:
        own, sign, kind = spec.rpartition("=")
        maker = lookup(ENCODERS, kind, "encoder")
        if not all(hasattr(maker, part) for part in ("name", "eats", "options", "recipe")):
            raise VacliError(f"{kind} is no encoder: wanted a class with name, eats, options() and recipe()")
        name = own if sign else kind if kind in ENCODERS else maker.name
        if name in ("", *OWN_TRACKS, *encoders):
            raise VacliError(f"--encoder {spec}: the name {name!r} is taken; wanted another one: NAME={kind}")
        encoders[name] = _made(maker, name, options.get(name, {}), fingerprints)
    strangers = options.keys() - encoders.keys()
    if strangers:
        raise VacliError(
            f"-o names {', '.join(sorted(strangers))}, but the encoders are {', '.join(encoders)}"
        )
    return encoders


def _made(maker: Any, name: str, given: dict[str, str], fingerprints: Fingerprints) -> Encoder:
    takes = inspect.signature(maker).parameters
    known = [k for k in takes if k != "fingerprints"]
    unknown = sorted(given.keys() - set(known))
    if unknown:
        raise VacliError(
            f"encoder {name} has no option {', '.join(unknown)}; its options: {', '.join(known) or 'none'}"
        )
    return maker(**given, **({"fingerprints": fingerprints} if "fingerprints" in takes else {}))


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
    faces = Faces()
    outcomes = []
    calm = 0.1 if sys.stderr.isatty() else 10.0  # a log file gets a line now and then
    with tqdm(samples, desc="extract", unit="video", dynamic_ncols=True, mininterval=calm) as bar:
        for sample in bar:
            bar.set_postfix_str(sample.id[-40:], refresh=sys.stderr.isatty())
            outcomes.append(_one(sample, encoders, faces, store, link, then))
            store.remember_fingerprints()
    return outcomes


def _one(
    sample: Sample,
    encoders: dict[str, Encoder],
    faces: Faces,
    store: Store,
    link: bool,
    then: Callable[[Outcome], object] | None,
) -> Outcome:
    outcome = Outcome(sample)
    try:
        outcome.tracks = plan(sample, encoders, faces, store.fingerprints)
        missing = {n: w for n, w in outcome.tracks.items() if not store.has(w.recipe, w.media)}
        for name, track, notes in _make(sample, outcome.tracks, missing, store):
            wanted = outcome.tracks[name]
            store.put(wanted.recipe, wanted.media, track, {"sample": sample.id, **notes})
            outcome.computed.append(name)
        outcome.complete = True
        _take_notes(outcome, encoders, store)
        if link:
            facts = {
                "root": str(sample.root),
                "split": sample.split,
                "media": sample.media(store.fingerprints),
            }
            store.link(sample.id, facts, {n: _address(w) for n, w in outcome.tracks.items()})
        if then:
            then(outcome)
    except VacliError as e:
        if e.fatal:
            raise
        outcome.problem = _one_line(e)
    except Exception as e:  # a decoder's or a library's own surprise: this video's fault, not the others'
        outcome.problem = f"{sample.source}: {type(e).__name__}: {_one_line(e)}"
    return outcome


def _one_line(e: Exception) -> str:
    return " ".join(str(e).split())


def _address(wanted: Wanted) -> dict[str, Any]:
    """Where the track lies, and how to make its encoder again for other videos."""
    address: dict[str, Any] = {"folder": folder_name(wanted.recipe), "media": wanted.media}
    if hasattr(wanted.maker, "eats"):
        made_by = type(wanted.maker)
        path = f"{made_by.__module__}:{made_by.__qualname__}"
        kind = next((name for name, known in ENCODERS.items() if known == path), path)
        address["encoder"] = {"kind": kind, "options": wanted.maker.options()}
    return address


def plan(
    sample: Sample, encoders: dict[str, Encoder], faces: Faces, fingerprints: Fingerprints
) -> dict[str, Wanted]:
    """Every track the sample should have, in the order they are made: faces, encoders, labels."""
    pictures = sample.media(fingerprints)
    tracks: dict[str, Wanted] = {}
    if sample.crops is None:
        seen_by = {**faces.recipe(), "made_from": digest(PICTURES)}
        tracks["faces"] = Wanted(seen_by, pictures, faces)
    else:
        seen_by = {**GIVEN_CROPS, "made_from": digest(PICTURES)}
    for name, encoder in encoders.items():
        if encoder.eats == "crops":
            tracks[name] = Wanted({**encoder.recipe(), "made_from": digest(seen_by)}, pictures, encoder)
        elif sample.video is not None:
            sound = fingerprints.file(sample.video)
            tracks[name] = Wanted({**encoder.recipe(), "made_from": digest(SOUND)}, sound, encoder)
    if sample.annotation is not None:
        media = combine(fingerprints.file(sample.annotation), pictures)
        tracks["label.va"] = Wanted({**VA_RECIPE, "made_from": digest(PICTURES)}, media, read_va)
    return tracks


# {"problem" | "damage" | "warning": text}; stored with the track, so without the file's name, which may change.
Notes = dict[str, str]
Made = tuple[str, Track, Notes]  # name, track, notes


def _make(
    sample: Sample, tracks: dict[str, Wanted], missing: dict[str, Wanted], store: Store
) -> Iterator[Made]:
    """Compute the missing tracks. Faces are one pass over the video, all frame encoders together another one."""
    frame_times_s: np.ndarray | None = None
    notes: Notes = {}
    eaters = {n: w.maker for n, w in missing.items() if getattr(w.maker, "eats", "") == "crops"}
    if sample.crops is None and missing:
        assert sample.video is not None
        if "faces" in missing:
            yield "faces", *_watched(sample, missing["faces"].maker)
        faces = store.get(tracks["faces"].recipe, tracks["faces"].media)
        frame_times_s = faces.times_s
        if eaters:
            yield from _encode(_aligned(sample, faces), eaters, frame_times_s, notes)
    elif eaters or "label.va" in missing:
        frame_times_s, damage = sample.frame_clock()
        notes = _damaged(damage)
        if eaters:
            yield from _encode(sample.read_crops(len(frame_times_s)), eaters, frame_times_s, notes)
    for name, wanted in missing.items():
        if getattr(wanted.maker, "eats", "") == "sound":
            assert sample.video is not None
            video = Video(sample.video)
            track = wanted.maker(video.sound(wanted.maker.rate_hz))
            yield name, track, _damaged(video.damage) | ({} if len(track) else SILENT)
    if "label.va" in missing:
        assert sample.annotation is not None
        assert frame_times_s is not None
        yield "label.va", read_va(sample.annotation, frame_times_s), notes


SILENT = {"problem": "it has no sound; its curve rests on the picture alone"}


def _damaged(damage: str | None) -> Notes:
    return {"damage": damage} if damage else {}


def _unseen(rows: int) -> Notes:
    return {"warning": f"no face in any of its {rows} frames"}


def _watched(sample: Sample, faces: Faces) -> tuple[Track, Notes]:
    assert sample.video is not None
    video = Video(sample.video)
    hint = video.check().frames_hint
    with _frame_bar("faces", hint) as bar:
        track = faces(video, on_frames=bar.update)
    return track, _damaged(video.damage) | ({} if track.valid.any() else _unseen(len(track)))


def _aligned(sample: Sample, faces: Track) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Aligned crops of the followed face: (crops (n, 112, 112, 3), rows (n,)), in order."""
    assert sample.video is not None
    points, valid = faces.values[:, 4:14].reshape(-1, 5, 2), faces.valid
    crops: list[np.ndarray] = []
    rows: list[int] = []
    row = 0
    for frames, _ in Video(sample.video).frames():
        for frame in frames:
            if row < len(faces) and valid[row]:
                crops.append(align(frame, points[row]))
                rows.append(row)
            row += 1
            if len(crops) == _BATCH:
                yield np.stack(crops), np.array(rows)
                crops, rows = [], []
    if row != len(faces):
        raise VacliError(
            f"{sample.video} gave {row} frames, but {len(faces)} before: did it change? run again"
        )
    if crops:
        yield np.stack(crops), np.array(rows)


def _encode(
    batches: Iterable[tuple[np.ndarray, np.ndarray]],
    encoders: dict[str, Any],
    times_s: np.ndarray,
    notes: Notes,
) -> Iterator[Made]:
    """One pass of crops through every encoder. Rows without a crop stay NaN."""
    values: dict[str, np.ndarray] = {}
    with _frame_bar("encode", len(times_s)) as bar:
        for crops, rows in batches:
            for name, encoder in encoders.items():
                out = encoder(crops)
                if name not in values:
                    values[name] = np.full((len(times_s), *out.shape[1:]), np.nan, np.float16)
                values[name][rows] = out
            bar.update(int(rows[-1]) + 1 - bar.n)
    for name, encoder in encoders.items():
        if name not in values:  # no face in any frame
            nothing = np.full((len(times_s), encoder.dim), np.nan, np.float16)
            yield name, Track(nothing, times_s), notes | _unseen(len(times_s))
        else:
            yield name, Track(values[name], times_s), notes


def _frame_bar(doing: str, total: int | None) -> tqdm:
    """The inner bar, over the frames of one video; only for eyes, not for log files."""
    return tqdm(total=total, desc=doing, unit="frame", leave=False, dynamic_ncols=True, disable=None)


def _take_notes(outcome: Outcome, encoders: dict[str, Encoder], store: Store) -> None:
    """The notes of all its tracks, also of those stored by an earlier run: what was wrong then still is."""
    notes = [store.provenance(w.recipe, w.media) for w in outcome.tracks.values()]
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
        seen, batches = np.flatnonzero(labels.valid & faces.valid), _aligned(sample, faces)
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
