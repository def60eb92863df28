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


def _block(name: str) -> str:
    encoder: Any = lookup(ENCODERS, name, "encoder")
    facts = {"dim": encoder.card.dim, "eats": encoder.eats, "weights": encoder.card.weights}
    if hasattr(encoder, "found"):
        facts["here"] = str(encoder.found() or "not on this machine")
    facts["licence"] = encoder.card.licence
    if name in FAMILIES:
        facts["example"] = f"--encoder {FAMILIES[name]}"
    about = (sys.modules[encoder.__module__].__doc__ or "").partition("\n")[0]
    return "\n".join([name, f"  {about}", *(f"  {key:<8} {text}" for key, text in facts.items())])
