"""The run of stage one: plan what is missing, decode, feed every encoder, store; go on from where it was stopped."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable, Iterator
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
_BATCH = 64


class Encoder(Protocol):
    """What the run asks of an encoder.

    eats "crops": called with aligned faces (B, 112, 112, 3) uint8 RGB, returns (B, D) floats, and says `dim`.
    eats "sound": says `rate_hz`, is called with an iterator of mono sample blocks, returns a Track.
    options() are the arguments that make the same encoder again; `name` is its key in the table or its own path.
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
        name, _, kind = spec.partition("=")
        maker = lookup(ENCODERS, kind or name, "encoder")
        given: dict[str, Any] = dict(options.get(name, {}))
        takes = list(inspect.signature(maker).parameters)
        unknown = given.keys() - set(takes)
        if unknown:
            known = ", ".join(k for k in takes if k != "fingerprints") or "none"
            raise VacliError(
                f"encoder {name} has no option {', '.join(sorted(unknown))}; its options: {known}"
            )
        if "fingerprints" in takes:
            given["fingerprints"] = fingerprints
        encoders[name if kind or name in ENCODERS else maker.name] = maker(**given)
    strangers = options.keys() - encoders.keys()
    if strangers:
        raise VacliError(
            f"-o names {', '.join(sorted(strangers))}, but the encoders are {', '.join(encoders)}"
        )
    return encoders


def extract(
    samples: list[Sample], encoders: dict[str, Encoder], store: Store, link: bool = True
) -> list[Outcome]:
    """Make what is missing, sample by sample; one broken video never stops the others.

    link: tell the store's list of videos about the samples (so that training finds them). What was stored before
    is not computed again; stop it at any time and call it again. Raises a fatal
    VacliError for what would befall every video: a store that cannot be written, weights that do not fit.
    """
    faces = Faces()
    outcomes = []
    calm = 0.1 if sys.stderr.isatty() else 10.0  # a log file gets a line now and then
    with tqdm(samples, desc="extract", unit="video", dynamic_ncols=True, mininterval=calm) as bar:
        for sample in bar:
            bar.set_postfix_str(sample.id[-40:], refresh=sys.stderr.isatty())
            outcomes.append(_one(sample, encoders, faces, store, link))
            store.remember_fingerprints()
    return outcomes


def _one(sample: Sample, encoders: dict[str, Encoder], faces: Faces, store: Store, link: bool) -> Outcome:
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
    except VacliError as e:
        if e.fatal:
            raise
        outcome.problem = str(e)
    except Exception as e:  # a decoder's or a library's own surprise: this video's fault, not the others'
        outcome.problem = f"{sample.video or sample.crops}: {type(e).__name__}: {e}"
    return outcome


def _address(wanted: Wanted) -> dict[str, Any]:
    """Where the track lies, and how to make its encoder again for other videos."""
    address: dict[str, Any] = {"folder": folder_name(wanted.recipe), "media": wanted.media}
    if hasattr(wanted.maker, "eats"):
        address["encoder"] = {"kind": wanted.maker.name, "options": wanted.maker.options()}
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


Made = tuple[str, Track, dict[str, str]]  # name, track, notes: {"problem" | "warning": text}


def _make(
    sample: Sample, tracks: dict[str, Wanted], missing: dict[str, Wanted], store: Store
) -> Iterator[Made]:
    """Compute the missing tracks. Faces are one pass over the video, all frame encoders together another one."""
    frame_times_s: np.ndarray | None = None
    eaters = {n: w.maker for n, w in missing.items() if getattr(w.maker, "eats", "") == "crops"}
    if sample.crops is None and missing:
        assert sample.video is not None
        if "faces" in missing:
            yield "faces", *_watched(sample, missing["faces"].maker)
        faces = store.get(tracks["faces"].recipe, tracks["faces"].media)
        frame_times_s = faces.times_s
        if eaters:
            yield from _encode(_aligned(sample, faces), eaters, frame_times_s)
    elif eaters or "label.va" in missing:
        frame_times_s = sample.frame_times_s()
        if eaters:
            yield from _encode(sample.read_crops(len(frame_times_s)), eaters, frame_times_s)
    for name, wanted in missing.items():
        if getattr(wanted.maker, "eats", "") == "sound":
            assert sample.video is not None
            track = wanted.maker(Video(sample.video).sound(wanted.maker.rate_hz))
            yield name, track, {} if len(track) else {"problem": _silent(sample, name)}
    if "label.va" in missing:
        assert sample.annotation is not None
        assert frame_times_s is not None
        yield "label.va", read_va(sample.annotation, frame_times_s), {}


def _silent(sample: Sample, name: str) -> str:
    return f"{sample.video} has no sound: {name} has no rows there; its curve rests on the picture alone"


def _watched(sample: Sample, faces: Faces) -> tuple[Track, dict[str, str]]:
    assert sample.video is not None
    video = Video(sample.video)
    hint = video.check().frames_hint
    with _frame_bar("faces", hint) as bar:
        track = faces(video, on_frames=bar.update)
    if video.damage:
        return track, {
            "problem": f"{sample.video}: {video.damage}; the frames before are kept: get a whole copy"
        }
    if not track.valid.any():
        return track, {"warning": f"{sample.video}: no face in any of its {len(track)} frames"}
    return track, {}


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
    batches: Iterable[tuple[np.ndarray, np.ndarray]], encoders: dict[str, Any], times_s: np.ndarray
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
            values[name] = np.full((len(times_s), encoder.dim), np.nan, np.float16)
        yield name, Track(values[name], times_s), {}


def _frame_bar(doing: str, total: int | None) -> tqdm:
    """The inner bar, over the frames of one video; only for eyes, not for log files."""
    return tqdm(total=total, desc=doing, unit="frame", leave=False, dynamic_ncols=True, disable=None)


def _take_notes(outcome: Outcome, encoders: dict[str, Encoder], store: Store) -> None:
    """The notes of all its tracks, also of those stored by an earlier run: what was wrong then still is."""
    notes = [store.provenance(w.recipe, w.media) for w in outcome.tracks.values()]
    problems = [n["problem"] for n in notes if "problem" in n]
    for name in (n for n, e in encoders.items() if e.eats == "sound" and n not in outcome.tracks):
        problems.append(
            f"{outcome.sample.crops}: no video of that name beside the crops, so no sound for {name}"
        )
    outcome.problem = "; ".join(problems) or None
    outcome.warning = "; ".join(n["warning"] for n in notes if "warning" in n) or None


def labelled_crops(sample: Sample, store: Store, most: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Up to `most` evenly spaced frames that have a face and a label: (crops (N, 112, 112, 3), labels (N, 2)).

    The faces and labels must be stored (`extract` with no encoder does it). None if there is no such frame.
    """
    tracks = plan(sample, {}, Faces(), store.fingerprints)
    labels = store.get(tracks["label.va"].recipe, tracks["label.va"].media)
    if sample.crops is None:
        faces = store.get(tracks["faces"].recipe, tracks["faces"].media)
        seen, batches = np.flatnonzero(labels.valid & faces.valid), _aligned(sample, faces)
    else:
        seen, batches = np.flatnonzero(labels.valid), sample.read_crops(len(labels))
        seen = np.intersect1d(seen, list(sample.crop_files()))
    chosen = (
        set(seen[np.linspace(0, len(seen) - 1, min(most, len(seen))).astype(int)].tolist())
        if len(seen)
        else set()
    )
    kept = [
        (crop, row)
        for crops, rows in batches
        for crop, row in zip(crops, rows, strict=True)
        if int(row) in chosen
    ]
    if not kept:
        return None
    return np.stack([crop for crop, _ in kept]), labels.values[[row for _, row in kept]]
