"""The catalogue of encoders: what each gives and eats, and whose weights it needs; for `vacli encoders`."""

from __future__ import annotations

import sys
from typing import Any

from .. import lookup
from . import ENCODERS
from .weights import folders

FAMILIES = {  # these take any model of theirs by name
    "timm": "timm:vit_base_patch16_clip_224.openai",
    "hf-audio": "hf-audio:microsoft/wavlm-large",
}


def listing() -> str:
    """One block of lines for each encoder of the table. It asks no network and imports no torch.

    A class with a method `found()` is asked where its weights are on this machine.
    """
    places = ", ".join(str(folder) for folder in folders())
    looked = f"Weights are looked for in {places}; VACLI_WEIGHTS names another folder, -o NAME.weights=FILE any file."
    return "\n\n".join([*(_block(name) for name in ENCODERS), looked])


def facts_of(name: str) -> dict[str, Any]:
    """What there is to tell of an encoder of the table: about, dim, eats, weights, here, licence, files, get, example.

    here: where its weights are on this machine; None where they are not, or where that is a question of the model.
    """
    encoder: Any = lookup(ENCODERS, name, "encoder")
    card = encoder.card
    return {
        "name": name,
        "about": (sys.modules[encoder.__module__].__doc__ or "").partition("\n")[0],
        "dim": card.dim,
        "eats": encoder.eats,
        "weights": card.weights,
        "here": encoder.found() if hasattr(encoder, "found") else None,
        "licence": card.licence,
        "files": card.files,
        "get": card.get,
        "example": f"--encoder {FAMILIES[name]}" if name in FAMILIES else None,
    }


def _block(name: str) -> str:
    facts = facts_of(name)
    told = {key: facts[key] for key in ("dim", "eats", "weights", "here", "licence", "example")}
    if facts["files"] and not facts["here"]:
        told["here"] = "not on this machine"
    lines = (f"  {key:<8} {text}" for key, text in told.items() if text is not None)
    return "\n".join([name, f"  {facts['about']}", *lines])
