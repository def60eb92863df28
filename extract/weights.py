"""Files of weights: found here or on the hub, read so that no code in them runs, fitted whole into a network."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pickle
import socket
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import VacliError

if TYPE_CHECKING:  # 2 s to import: only where a model is built, never for a recipe that needs none
    import torch
    from torch import nn

WEIGHTS_DIR = "VACLI_WEIGHTS"  # environment variable: a folder of weights; ./weights is looked in as well
_log = logging.getLogger(__name__)
_HUB = "huggingface.co"
_OFFLINE = ("1", "TRUE", "YES", "ON")
_PERMISSIVE = ("apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0")


class EncoderError(VacliError):
    """An encoder that cannot be made: unreadable weights, weights or a model that do not fit."""

    fatal = True


def read(weights: Path) -> dict[str, torch.Tensor]:
    """The tensors of a .safetensors file, or of a .pth read with weights_only=True; {"model": ...} is opened.

    Raises EncoderError where the file is unreadable, holds more than tensors or no state dict.
    """
    import torch
    from safetensors.torch import load_file

    _log.info("reading %s", weights)
    try:
        if weights.suffix == ".safetensors":
            return load_file(weights)
        state = torch.load(weights, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as e:  # torch's text advises to run what is in there
        raise EncoderError(
            f"refused weights {weights}: damaged, or holding more than tensors, which could run code; "
            "wanted .safetensors, or a .pth of tensors alone; get them again from their makers"
        ) from e
    except Exception as e:  # safetensors and torch raise a dozen kinds for a broken file
        raise EncoderError(
            f"cannot read weights {weights} ({type(e).__name__}: {' '.join(str(e).split())[:120]}); "
            "wanted a whole .safetensors or .pth file; copy it again"
        ) from e
    for wrapper in ("model", "module", "state_dict"):
        state = state.get(wrapper, state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(
        isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in state.items()
    ):
        raise EncoderError(
            f"weights {weights} hold no state dict of tensors; wanted the layout of their makers; get them again"
        )
    return state


def fit(network: nn.Module, state: Mapping[str, torch.Tensor], weights: Path, mend: str) -> None:
    """Fill a network whole. Raises EncoderError naming missing, unexpected and misshapen keys, and the mend."""
    wanted = network.state_dict()
    misfits = [f"missing {k}" for k in wanted if k not in state]
    misfits += [f"unexpected {k}" for k in state if k not in wanted]
    misfits += [
        f"{k} is {tuple(state[k].shape)}, wanted {tuple(v.shape)}"
        for k, v in wanted.items()
        if k in state and state[k].shape != v.shape
    ]
    if misfits:
        more = f" and {len(misfits) - 3} more" if len(misfits) > 3 else ""
        raise EncoderError(
            f"weights {weights} do not fit the encoder: {'; '.join(sorted(misfits)[:3])}{more}; {mend}"
        )
    network.load_state_dict(state)


def described(weights: Path) -> dict[str, Any]:
    """What `save` wrote into the header: {} of weights from elsewhere. Raises EncoderError for an unreadable file."""
    if not weights.is_file():
        raise EncoderError(f"no weights at {weights}; wanted a .safetensors or .pth file; check the path")
    if weights.suffix != ".safetensors":
        return {}
    import safetensors

    try:
        with safetensors.safe_open(weights, "numpy") as f:  # "pt" would import torch
            return json.loads((f.metadata() or {}).get("vacli", "{}"))
    except (safetensors.SafetensorError, OSError, ValueError) as e:
        raise EncoderError(
            f"cannot read weights {weights}: {e}; wanted a whole .safetensors file; copy it again"
        ) from e


def claim(out: Path) -> None:
    """Refuses a place that `save` could not write, before hours of training and not after them."""
    if out.suffix != ".safetensors":
        raise VacliError(f"--out {out}: weights are written as .safetensors; wanted a name that ends so")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise VacliError(f"cannot write {out}: {e.strerror}; wanted a folder; use another --out") from e


def save(state: Mapping[str, torch.Tensor], about: dict[str, Any], out: Path) -> None:
    """Tensors, with what is needed to use them in the header; the file is whole, or as it was before."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    aside = out.with_name(f".{out.name}.{os.getpid()}")
    tensors = {k: v.detach().cpu().contiguous() for k, v in state.items()}
    try:
        save_file(tensors, aside, metadata={"vacli": json.dumps(about)})
        os.replace(aside, out)
    except (OSError, SafetensorError) as e:
        raise VacliError(f"cannot write {out}: {e}; free some space, or use another --out") from e
    finally:
        with contextlib.suppress(OSError):
            aside.unlink()


def licence_note(licence: str | None) -> str | None:
    """What a user is told of a licence, by its name on the hub; None where it is permissive and for his own weights."""
    if licence is None or licence in _PERMISSIVE:
        return None
    if licence == "cc-by-nc-4.0":
        return "weights under CC-BY-NC 4.0: not for commercial use"
    if licence == "unknown":
        return "nobody says under which licence these weights are: ask their makers before you use them"
    return f"weights under {licence}, which sets conditions on their use: read it first"


def folders() -> list[Path]:
    """Where weights are looked for: ./weights, then $VACLI_WEIGHTS."""
    return [Path("weights"), *([Path(os.environ[WEIGHTS_DIR])] if WEIGHTS_DIR in os.environ else [])]


def absent(who: str, source: str, file: str, option: str) -> EncoderError:
    """What to raise where no weights of `who` are. file: what to call them in `folders`. option: as mae.weights."""
    return EncoderError(
        f"no weights for {who}: get them from {source} and put them at {folders()[0] / file}, or give any file with "
        f"-o {option}=FILE; `vacli doctor` tells what is here"
    )


def local(names: Iterable[str]) -> Path | None:
    """The first of these file names that lies in one of the `folders`."""
    places = [folder / name for folder in folders() for name in names]
    return next((place.absolute() for place in places if place.is_file()), None)


def cached(hub_id: str, file: str = "model.safetensors") -> Path | None:
    """A file of the Hugging Face cache."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(hub_id, file)
    return Path(found) if isinstance(found, str) else None


def from_hub(hub_id: str, file: str = "model.safetensors") -> Path | None:
    """A file of the Hugging Face cache, else of the hub; None, at once, where neither has it or there is no network."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    if found := cached(hub_id, file):
        return found
    if not hub_answers():  # its client would try for 50 s
        return None
    _log.info("fetching %s of %s from the hub", file, hub_id)
    try:
        return Path(hf_hub_download(hub_id, file))
    except (OSError, HfHubHTTPError):
        return None


def hub_answers(wait_s: float = 3.0) -> bool:
    """Whether the Hugging Face hub can be reached; False after so long, as a name server may not answer for minutes."""
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() in _OFFLINE:
        return False
    over, reached = threading.Event(), threading.Event()

    def ask() -> None:
        with contextlib.suppress(OSError):
            socket.create_connection((_HUB, 443), timeout=wait_s).close()
            reached.set()
        over.set()

    threading.Thread(target=ask, name="vacli-hub", daemon=True).start()
    over.wait(wait_s)
    return reached.is_set()
