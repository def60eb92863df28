"""What stage one asks of an encoder, and encoders made from the names and options of a command line."""

from __future__ import annotations

import inspect
import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from .. import VacliError, lookup
from ..store import Fingerprints
from ..store.recipe import TRACK_NAME
from . import ENCODERS

OWN_TRACKS = ("people", "faces", "label.va")  # the names of tracks that no encoder makes


class Card(NamedTuple):
    """What `vacli encoders` tells of a kind of encoder, without making one."""

    dim: str  # as "1024" or "as the model has it"
    weights: str  # where they come from
    licence: str  # of the weights
    files: tuple[str, ...] = ()  # names by which they are found in `weights.folders()`
    get: str = ""  # how to come by them


class Encoder(Protocol):
    """What the run asks of an encoder.

    eats "crops": called with aligned faces (B, 112, 112, 3) uint8 RGB, returns (B, D) or (B, K, D) floats, and says
    `dim`, the D. (Where a data set brings its own crops they come in their own size.)
    eats "sound": says `rate_hz`, is called with an iterator of mono sample blocks, returns a Track. One whose `clock`
    is "frames" is called with (blocks, times_s): the times (T,) of the video's frames, one row for each.
    A run first calls it with a small fixed input of that kind, the canary, and compares with earlier runs.
    options() are the arguments that make the same encoder again; `name` is what its tracks are called by default.
    A class in the table also has a `card`.

    An encoder that can give several outputs of one pass has `output`, which of them it gives; `pass_key`, equal for
    those that differ in nothing else; `join(other)`, to take over the network of one with the same key; and
    `encode(crops, outputs) -> {output: (B, ...)}`, which makes one pass for all.
    """

    name: str
    eats: str

    def recipe(self) -> dict[str, Any]: ...
    def options(self) -> dict[str, Any]: ...
    def __call__(self, data: Any) -> Any: ...


def make_encoders(
    names: Iterable[str], options: Mapping[str, Mapping[str, str]], fingerprints: Fingerprints
) -> dict[str, Encoder]:
    """Encoders by track name.

    A name is one of the table (`mae`), one with the model it shall be (`timm:vit_base_patch16_clip_224.openai`), any
    `package.module:Class`, and `mae-tuned=mae` calls its track `mae-tuned`. options: track name -> keyword -> value, as
    given by -o NAME.KEY=VALUE; `output` may name several, as cls,mean: the others become tracks `NAME.mean`.
    Raises VacliError for what is unknown.
    """
    encoders: dict[str, Encoder] = {}
    for spec in names:
        own, sign, kind = spec.rpartition("=")
        family, _, model = kind.partition(":")
        kind, model = (family, model) if family in ENCODERS else (kind, "")
        maker = lookup(ENCODERS, kind, "encoder")
        if not all(hasattr(maker, part) for part in ("name", "eats", "options", "recipe")):
            raise VacliError(
                f"{kind} is no encoder; wanted a class with name, eats, options() and recipe(), as package.module:Class"
            )
        name = own if sign else track_name(model) if model else kind if kind in ENCODERS else maker.name
        given = {**({"model": model} if model else {}), **options.get(name, {})}
        for called, keywords in _per_output(name, given):
            _refuse_name(spec, called, encoders)
            made = _made(maker, called, keywords, fingerprints)
            _join(made, encoders.values())
            encoders[called] = made
    strangers = options.keys() - encoders.keys()
    if strangers:
        raise VacliError(
            f"-o names {', '.join(sorted(strangers))}, but the encoders are {', '.join(encoders)}; "
            "wanted one of these as -o NAME.KEY=VALUE"
        )
    return encoders


def track_name(model: str) -> str:
    """What the tracks of a model are called by default: microsoft/WavLM-large becomes wavlm-large."""
    last = model.rstrip("/").rpartition("/")[2].lower()
    return re.sub(r"[^a-z0-9._-]", "-", last).lstrip("._-")[:64] or "model"


def _per_output(name: str, given: dict[str, str]) -> list[tuple[str, dict[str, str]]]:
    outputs = [o.strip() for o in given.get("output", "").split(",") if o.strip()]
    if len(outputs) < 2:
        return [(name, given)]
    names = [name, *(f"{name}.{o.replace(':', '')}" for o in outputs[1:])]
    return [(called, {**given, "output": output}) for called, output in zip(names, outputs, strict=True)]


def _refuse_name(spec: str, name: str, encoders: Mapping[str, Encoder]) -> None:
    if not TRACK_NAME.fullmatch(name):
        raise VacliError(f"--encoder {spec}: a track cannot be called {name!r}; wanted {TRACK_NAME.pattern}")
    if name in (*OWN_TRACKS, *encoders):
        kind = spec.rpartition("=")[2]
        raise VacliError(f"--encoder {spec}: the name {name!r} is taken; wanted another one: NAME={kind}")


def _made(maker: Any, name: str, given: dict[str, str], fingerprints: Fingerprints) -> Encoder:
    takes = inspect.signature(maker).parameters
    known = [k for k in takes if k != "fingerprints"]
    unknown = sorted(given.keys() - set(known))
    if unknown:
        raise VacliError(
            f"encoder {name} has no option {', '.join(unknown)}; its options: {', '.join(known) or 'none'}"
        )
    return maker(**given, **({"fingerprints": fingerprints} if "fingerprints" in takes else {}))


# ---- several outputs of one pass -----------------------------------------------------------------------------


def pass_key(encoder: Encoder) -> Hashable | None:
    """Equal for encoders that one pass can serve; None for one that stands alone."""
    return getattr(encoder, "pass_key", None)


def _join(made: Any, others: Iterable[Any]) -> None:
    """One network for all that can share it."""
    key = pass_key(made)
    same = next((o for o in others if key is not None and pass_key(o) == key), None)
    if same is not None:
        made.join(same)


def encode(encoders: Sequence[Any], crops: np.ndarray) -> list[np.ndarray]:
    """What encoders that one pass can serve, or a single one, make of crops: an array (B, ...) for each."""
    if len(encoders) == 1:
        return [np.asarray(encoders[0](crops))]
    found = encoders[0].encode(crops, [e.output for e in encoders])
    return [np.asarray(found[e.output]) for e in encoders]
