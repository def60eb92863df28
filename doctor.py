"""The doctor: looks at the machine, the weights, the store and a folder of videos, and says what is missing."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import sys
from collections.abc import Callable, Sequence
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
    """All there is to know, as a plain tree; "problems" has what is missing of what was asked for, each with its mend.

    video: a folder of which the disk space is estimated. encoders: those that will be used; the default ones if empty.
    Nothing is downloaded, nothing in here raises: a look that fails has {"error": why} for its result.
    """
    from .extract import checkup
    from .extract.checkup import DEFAULT_ENCODERS
    from .temporal.checkup import scan_here, torch_here

    encoders = list(encoders) or list(DEFAULT_ENCODERS)
    found: Tree = {
        "machine": _look(_machine),
        "packages": {name: _version(name) for name in _NEEDED_PACKAGES},
        "torch": _look(torch_here),
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
    """The trained runs, read as text: nothing of them is opened."""
    finished: list[tuple[str, str]] = []
    for glob in ("*/run.json", "*/folds.json"):
        for path in Path(runs).glob(glob):
            with contextlib.suppress(OSError, ValueError, AttributeError, TypeError):
                about = json.loads(path.read_text(encoding="utf-8"))
                if "figures" in about and "finished_at" in about:
                    finished.append((str(about["finished_at"]), str(path.parent)))
    return {"folder": runs, "finished": len(finished), "newest": max(finished)[1] if finished else None}


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


def _problems(found: Tree) -> list[str]:
    """What keeps the encoders asked for from being computed and their curves from being drawn, and what mends it."""
    problems = [
        f"{name} is missing: pip install vacli again" for name, v in found["packages"].items() if not v
    ]
    for section in ("torch", "codecs", "store", "weights", "videos"):
        if error := found.get(section, {}).get("error"):
            problems.append(f"{section}: {error}")
    if error := found["faces"]["mtcnn"].get("error"):
        problems.append(f"face detector: {error}")
    problems += _of_codecs(found["codecs"])
    problems += _of_encoders(found["encoders"])
    if "videos" in found and "error" not in found["videos"]:
        problems += _of_videos(found["videos"], found["disk"])
    return list(dict.fromkeys(problems))


def _of_codecs(codecs: Tree) -> list[str]:
    from .extract.checkup import NEEDED_CODECS

    lost = [name for name in NEEDED_CODECS if "error" not in codecs and not codecs["found"][name]["here"]]
    return [f"PyAV cannot decode {name}: pip install --force-reinstall av" for name in lost]


def _of_encoders(encoders: list[str]) -> list[str]:
    from .extract.checkup import lacking

    told = {spec: _look(lambda spec=spec: lacking(spec)) for spec in encoders}  # type: ignore[misc]
    told = {spec: text["error"] if isinstance(text, dict) else text for spec, text in told.items()}
    return [f"{spec}: {text}" for spec, text in told.items() if text]


def _of_videos(videos: Tree, disk: Tree) -> list[str]:
    problems = [f"{path}: {why}" for path, why in videos["problems"].items()]
    problems += [f"{t['name']}: {t['problem']}" for t in videos["tracks"] if "problem" in t]
    if "free_bytes" in disk and videos["bytes"] > disk["free_bytes"]:
        wanted, free = (f"{nbytes / 1e9:.1f} GB" for nbytes in (videos["bytes"], disk["free_bytes"]))
        problems.append(
            f"{videos['folder']} wants {wanted}, {disk['of']} has {free} free: "
            "choose another disk with --store, or fewer encoders"
        )
    return problems
