"""The plan of stage one: which tracks a sample should have, with recipes that say all they are made from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from ..store import Fingerprints, combine, digest, folder_name
from ..store.labels import VA_RECIPE, read_va
from . import ENCODERS
from .datasets import CROPS_RATE_HZ, Sample
from .people import People, Person

_DECODER = f"PyAV {version('av').split('.')[0]}"  # asked of the package's record: importing it takes a while
PICTURES = {"decoder": _DECODER, "pictures": "every frame, upright, square pixels, at its own time"}
SOUND = {"decoder": _DECODER, "sound": "mono, placed by its own timestamps, holes are silence"}
GIVEN_CROPS = {
    "track": "faces",
    "version": 1,
    "source": "aligned crops of the data set; file %05d is frame number, from 1",
    "rate_hz_without_video": CROPS_RATE_HZ,
}
EVERYBODY = "all"  # the `person` of a sample that stands for one sample for each of the people in it


@dataclass(frozen=True)
class Kind:
    """A track by what makes it, whatever the medium; worked out once a run.

    address: "folder", where the store keeps such tracks, and of an encoder's "encoder": how to make it again.
    """

    recipe: dict[str, Any]
    digest: str
    maker: Any
    address: dict[str, Any]

    @classmethod
    def of(cls, maker: Any, recipe: dict[str, Any], made_from: str) -> Kind:
        recipe = {**recipe, "made_from": made_from}
        address: dict[str, Any] = {"folder": folder_name(recipe)}
        if hasattr(maker, "eats"):
            address["encoder"] = {"kind": kind_of(maker), "options": maker.options()}
        return cls(recipe, digest(recipe), maker, address)


def kind_of(encoder: Any) -> str:
    """The name that makes such an encoder: of the table, else `package.module:Class`."""
    path = f"{type(encoder).__module__}:{type(encoder).__qualname__}"
    return next((name for name, known in ENCODERS.items() if known == path), path)


@dataclass(frozen=True)
class Wanted:
    """A track that some sample should have: who makes it, of which medium."""

    kind: Kind
    media: str

    @property
    def recipe(self) -> dict[str, Any]:
        return self.kind.recipe

    @property
    def maker(self) -> Any:
        return self.kind.maker

    @property
    def eats(self) -> str:
        """What an encoder's track is made of, "crops" or "sound"; "" of the others."""
        return getattr(self.kind.maker, "eats", "")

    @property
    def by_frame(self) -> bool:
        """Made at the times of the frames, so not before these are known."""
        return (
            self.eats == "crops" or self.kind.maker is read_va or getattr(self.maker, "clock", "") == "frames"
        )

    @property
    def entry(self) -> str:
        """Its name in the store."""
        return f"{self.kind.address['folder']}/{self.media[:24]}"


class Plan:
    """Which tracks a sample should have, for one choice of encoders and one way to find people."""

    def __init__(self, encoders: Mapping[str, Any], people: People) -> None:
        self._encoders = encoders
        pictures = digest(PICTURES)
        self._people = Kind.of(people, people.recipe(), pictures)
        self._labels = Kind.of(read_va, VA_RECIPE, pictures)
        self._sounds = {
            n: Kind.of(e, e.recipe(), digest(SOUND)) for n, e in encoders.items() if e.eats == "sound"
        }
        self._given = self._encoded(digest({**GIVEN_CROPS, "made_from": pictures}))
        self._followed: dict[
            str, tuple[Kind, dict[str, Kind]]
        ] = {}  # by person: the faces, what is made of them

    def tracks(self, sample: Sample, media: str, fingerprints: Fingerprints) -> dict[str, Wanted]:
        """Every track of the sample, whose pictures have the digest `media`, in the order they are made.

        People, faces, encoders, labels; of a sample that stands for everybody the people alone. Raises VacliError for a
        file that cannot be read, and for a person that is none.
        """
        if sample.crops is not None:
            tracks, encoded = {}, self._given
        else:
            tracks = {"people": Wanted(self._people, media)}
            if sample.person == EVERYBODY:
                return tracks
            faces, encoded = self._of(sample.person)
            tracks["faces"] = Wanted(faces, media)
        tracks |= {name: Wanted(kind, media) for name, kind in encoded.items()}
        if self._sounds and sample.video is not None:
            heard = media if sample.crops is None else fingerprints.file(sample.video)
            tracks |= {name: Wanted(kind, heard) for name, kind in self._sounds.items()}
        if sample.annotation is not None:
            tracks["label.va"] = Wanted(self._labels, combine(fingerprints.file(sample.annotation), media))
        return tracks

    def _of(self, person: str) -> tuple[Kind, dict[str, Kind]]:
        if person not in self._followed:
            chosen = Person(person)
            faces = Kind.of(chosen, chosen.recipe(), self._people.digest)
            self._followed[person] = faces, self._encoded(faces.digest)
        return self._followed[person]

    def _encoded(self, made_from: str) -> dict[str, Kind]:
        eaters = {name: e for name, e in self._encoders.items() if e.eats == "crops"}
        return {name: Kind.of(e, e.recipe(), made_from) for name, e in eaters.items()}
