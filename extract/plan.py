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
from .faces import Faces

_DECODER = f"PyAV {version('av').split('.')[0]}"  # asked of the package's record: importing it takes a while
PICTURES = {"decoder": _DECODER, "pictures": "every frame, upright, square pixels, at its own time"}
SOUND = {"decoder": _DECODER, "sound": "mono, placed by its own timestamps, holes are silence"}
GIVEN_CROPS = {
    "track": "faces",
    "version": 1,
    "source": "aligned crops of the data set; file %05d is frame number, from 1",
    "rate_hz_without_video": CROPS_RATE_HZ,
}


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
            path = f"{type(maker).__module__}:{type(maker).__qualname__}"
            kind = next((name for name, known in ENCODERS.items() if known == path), path)
            address["encoder"] = {"kind": kind, "options": maker.options()}
        return cls(recipe, digest(recipe), maker, address)


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
    def entry(self) -> str:
        """Its name in the store."""
        return f"{self.kind.address['folder']}/{self.media[:24]}"


class Plan:
    """Which tracks a sample should have, for one choice of encoders."""

    def __init__(self, encoders: Mapping[str, Any]) -> None:
        faces, pictures = Faces(), digest(PICTURES)
        self._faces = Kind.of(faces, faces.recipe(), pictures)
        self._labels = Kind.of(read_va, VA_RECIPE, pictures)
        given = digest({**GIVEN_CROPS, "made_from": pictures})
        self._encoded = {
            crops_given: {
                name: Kind.of(e, e.recipe(), seen_by if e.eats == "crops" else digest(SOUND))
                for name, e in encoders.items()
            }
            for crops_given, seen_by in ((False, self._faces.digest), (True, given))
        }

    def tracks(self, sample: Sample, media: str, fingerprints: Fingerprints) -> dict[str, Wanted]:
        """Every track of the sample, whose pictures have the digest `media`, in the order they are made.

        Faces, encoders, labels. Raises VacliError for a file that cannot be read.
        """
        tracks = {"faces": Wanted(self._faces, media)} if sample.crops is None else {}
        for name, kind in self._encoded[sample.crops is not None].items():
            if kind.maker.eats == "crops":
                tracks[name] = Wanted(kind, media)
            elif sample.video is not None:
                heard = media if sample.crops is None else fingerprints.file(sample.video)
                tracks[name] = Wanted(kind, heard)
        if sample.annotation is not None:
            tracks["label.va"] = Wanted(self._labels, combine(fingerprints.file(sample.annotation), media))
        return tracks
