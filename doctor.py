"""The doctor: looks at the machine, the weights, the store and a folder of videos, and says what is missing."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from . import VacliError, __version__

EXTRAS = {  # of pyproject.toml: the package that each brings, and what for
    "s3": ("s3fs", "a store on S3"),
    "parquet": ("pyarrow", "Parquet in and out"),
    "elan": ("pympi-ling", "ELAN files"),
    "hf": ("transformers", "speech models: hf-audio"),
    "ray": ("ray", "extract --engine ray"),
    "sweep": ("optuna", "vacli sweep"),
    "tensorboard": ("tensorboard", "TensorBoard's events"),
    "plot": ("matplotlib", "vacli plot"),
}
_NEEDED_PACKAGES = (
    "numpy",
    "zarr",
    "torch",
    "timm",
    "safetensors",
    "av",
    "opencv-python-headless",
    "pydantic",
)

Tree = dict[str, Any]


def examine(video: Path | None, encoders: Sequence[str], store: str, runs: str) -> Tree:
    """All there is to know, as a plain tree; "problems" has what is wrong with what is needed, each with its mend.

    video: a folder of which the disk space is estimated. encoders: those that will be used. Needed, "judged_by", are
    these; where none are named those of the newest run, and where nothing is trained the default ones. "needs": what
    each encoder lacks, for `vacli extract` and for `vacli predict` with the newest run. "problems": by KINDS.
    Nothing is downloaded, nothing in here raises: a look that fails has {"error": why} for its result.
    """
    from .extract import checkup
    from .extract.checkup import DEFAULT_ENCODERS
    from .extract.device import choose_dtype
    from .temporal.checkup import scan_here, torch_here

    named, encoders = bool(encoders), list(encoders) or list(DEFAULT_ENCODERS)
    found: Tree = {
        "machine": _look(_machine),
        "packages": {name: _version(name) for name in _NEEDED_PACKAGES},
        "torch": _look(lambda: {**torch_here(), "bfloat16": choose_dtype(None, None, True) == "bfloat16"}),
        "scan": _look(scan_here),
        "codecs": _look(checkup.codecs_here),
        "faces": {
            "mtcnn": _look(lambda: {"weights_sha256": checkup.mtcnn_here()}),
            "yunet": _look(lambda: {"file": checkup.yunet_here()}),
        },
        "weights": _look(checkup.weights_here),
        "extras": {
            extra: {"version": _version(package), "package": package, "for": purpose}
            for extra, (package, purpose) in EXTRAS.items()
        },
        "store": _look(lambda: _store(store)),
        "runs": _look(lambda: _runs(runs)),
        "disk": _look(lambda: _disk(store)),
        "encoders": encoders,
    }
    if video is not None:
        found["videos"] = _look(lambda: _videos(video, encoders))
    again = found["runs"].get("encoders")
    found["needs"] = {
        "extract": {spec: _lack(partial(_lacking, spec)) for spec in encoders},
        "predict": None if again is None else {t: _lack(partial(_lacking_again, t, again[t])) for t in again},
    }
    found["judged_by"] = "extract" if named or again is None else "predict"
    return {"vacli": __version__, **found, "problems": _problems(found)}


def _look(at: Callable[[], Any]) -> Any:
    try:
        return at()
    except Exception as e:  # a doctor who faints is no help
        text = " ".join(str(e).split())
        return {"error": text if isinstance(e, VacliError) else f"{type(e).__name__}: {text}"}


def _version(package: str) -> str | None:
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    return None


def _machine() -> Tree:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {
        "python": platform.python_version(),
        "executable": sys.executable,
        "installed_in": str(Path(__file__).parent),
        "system": platform.platform(),
        "cores": cores,
        "memory_bytes": _memory(),
    }


def _memory() -> int | None:
    """What this process may have: of the machine, or of the container it is in."""
    if not hasattr(os, "sysconf"):
        return None
    of_all = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):
        return min(of_all, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return of_all


def _store(place: str) -> Tree:
    from .store import Store, keeper

    if "://" in place:
        return {"place": place, "note": "elsewhere: look with vacli store ls"}
    if not Path(place).exists():
        return {"place": place, "note": "not there yet: vacli extract makes it"}
    opened = Store(place)
    sizes = keeper.usage(opened)
    entries, nbytes = (sum(size[i] for size in sizes.values()) for i in (0, 1))
    return {"place": place, "videos": len(opened.videos()), "tracks": entries, "bytes": nbytes}


def _runs(runs: str) -> Tree:
    """How many trained runs and folds there are, and the one `vacli predict` takes, with what made each of its streams.

    They are counted as text; the newest is opened, without its weights. Raises VacliError where that cannot be.
    """
    from .temporal.folds import Folds, open_any

    finished = 0
    for glob in ("*/run.json", "*/folds.json"):
        for path in Path(runs).glob(glob):
            with contextlib.suppress(OSError, ValueError, TypeError):
                about = json.loads(path.read_text(encoding="utf-8"))
                finished += "figures" in about and "finished_at" in about
    if not finished:
        return {"folder": runs, "finished": 0, "newest": None}
    newest = open_any(None, runs)
    streams = (newest.first if isinstance(newest, Folds) else newest).about["streams"]
    made_by = {track: stream["encoder"] for track, stream in streams.items()}
    return {"folder": runs, "finished": finished, "newest": str(newest.path), "encoders": made_by}


def _disk(store: str) -> Tree:
    """Of the disk that the store is on, or will be on."""
    place = Path("." if "://" in store else store).absolute()
    while not place.exists():
        place = place.parent
    usage = shutil.disk_usage(place)
    return {"of": str(place), "free_bytes": usage.free, "total_bytes": usage.total}


def _videos(folder: Path, encoders: list[str]) -> Tree:
    from tqdm import tqdm

    from .extract.checkup import estimate, footage

    with tqdm(desc="look", unit="video", delay=2, leave=False) as bar:
        found = footage(folder, looked=bar.update)
    return {"folder": str(folder), **estimate(found, encoders, _machine()["cores"])}


# ---- what is missing -----------------------------------------------------------------------------------------

KINDS = {
    "missing": "missing",
    "unreadable": "cannot be read",
    "wrong": "wrong",
}  # of problems, and what they are called


def _lack(at: Callable[[], Any]) -> Tree | None:
    """What an encoder lacks, as {"kind", "text"}; None where that is nothing."""
    found = _look(at)
    if isinstance(found, dict):
        return {"kind": "wrong", "text": found["error"]}
    return found and {"kind": found[0], "text": found[1]}


def _lacking(spec: str) -> Any:
    from .extract import checkup

    return checkup.lacking(spec)


def _lacking_again(track: str, made_by: Tree | None) -> Any:
    """As `lacking_again` has it; of features that were imported nothing is lacking that could be got."""
    from .extract import checkup

    if made_by is None:
        return "imported", "was imported, no encoder makes it from video: name another run with --run"
    return checkup.lacking_again(track, made_by["kind"], made_by["options"])


def _problems(found: Tree) -> dict[str, list[str]]:
    """By kind, what keeps that from being done which things are here for, and what mends it."""
    told: list[tuple[str, str]] = [
        ("missing", f"{name}: pip install vacli again") for name, v in found["packages"].items() if not v
    ]
    for section in ("torch", "codecs", "store", "runs", "weights", "videos"):
        if error := found.get(section, {}).get("error"):
            told.append(("wrong", f"{section}: {error}"))
    if error := found["faces"]["mtcnn"].get("error"):
        told.append(("wrong", f"face detector: {error}"))
    told += _of_codecs(found["codecs"])
    needs = found["needs"][found["judged_by"]]
    told += [(lack["kind"], f"{name}: {lack['text']}") for name, lack in needs.items() if lack]
    if "videos" in found and "error" not in found["videos"]:
        told += _of_videos(found["videos"], found["disk"])
    return {kind: list(dict.fromkeys(text for k, text in told if k == kind)) for kind in KINDS}


def _of_codecs(codecs: Tree) -> list[tuple[str, str]]:
    from .extract.checkup import NEEDED_CODECS

    lost = [name for name in NEEDED_CODECS if "error" not in codecs and not codecs["found"][name]["here"]]
    mend = "pip install --force-reinstall av"
    return [("missing", f"{name}: PyAV cannot decode it: {mend}") for name in lost]


def _of_videos(videos: Tree, disk: Tree) -> list[tuple[str, str]]:
    problems = [("unreadable", f"{path}: {why}") for path, why in videos["problems"].items()]
    problems += [("wrong", f"{t['name']}: {t['problem']}") for t in videos["tracks"] if "problem" in t]
    if "free_bytes" in disk and videos["bytes"] > disk["free_bytes"]:
        wanted, free = (f"{nbytes / 1e9:.1f} GB" for nbytes in (videos["bytes"], disk["free_bytes"]))
        mend = "choose another disk with --store, or fewer encoders"
        problems.append(("wrong", f"{videos['folder']} wants {wanted}, {disk['of']} has {free} free: {mend}"))
    return problems
