"""What stage one finds on this machine: codecs, detectors, weights; and what a folder of videos will take."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

from .. import lookup
from . import ENCODERS
from .catalogue import facts_of
from .encoder import track_name
from .weights import WEIGHTS_DIR, cached, described, folders, hub_answers, local

DEFAULT_ENCODERS = ("mae", "logmel")  # of `vacli extract`
_ON_THE_HUB = ("mae", "timm", "hf-audio")
# What is decoded and encoded, by the names that FFmpeg may have it under, and whether most folders need it.
_CODECS: dict[str, tuple[tuple[str, ...], Literal["r", "w"], str]] = {
    "h264": (("h264",), "r", "most videos"),
    "hevc": (("hevc",), "r", "videos of phones"),
    "vp9": (("vp9", "libvpx-vp9"), "r", ".webm"),
    "av1": (("libdav1d", "libaom-av1", "av1"), "r", "newer .webm and .mkv"),
    "aac": (("aac",), "r", "the sound of most videos"),
    "opus": (("opus", "libopus"), "r", "the sound of .webm"),
    "libx264": (("libx264",), "w", "vacli predict --overlay"),
}
NEEDED_CODECS = ("h264", "aac")
_TIME_BYTES = 8  # float64, of every row
_FACES_BYTES = 2 * (
    15 * 4 + _TIME_BYTES
)  # of a frame with one person: who is there, and the one chosen; float32
# Measured for one core of an AMD EPYC in bfloat16 (of faces: float32, one face in a small picture): images a second.
_PER_CORE_HZ = {"faces": 45.0, "mae": 1.5, "iresnet": 17.5, "vggish": 100.0, "logmel": 1e5}
_FLOAT32_COST = 2.07  # times as long, on a CPU without bfloat16
_OLD_TORCH = (
    b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # a .pth of torch before 1.6 begins so: its MAGIC_NUMBER
)
_SOUND_HZ = {"logmel": 100.0, "hf-audio": 50.0}  # rows a second; what is not here has one for each frame


def codecs_here() -> dict[str, Any]:
    """PyAV's version, and by name of the codec: whether its FFmpeg has it, and what it is for."""
    import av

    found: dict[str, dict[str, Any]] = {}
    for name, (called, mode, purpose) in _CODECS.items():
        here = None
        for known in called:
            with contextlib.suppress(av.codec.codec.UnknownCodecError):
                here = here or av.codec.Codec(known, mode).long_name
        found[name] = {"here": here, "for": purpose}
    return {"pyav": av.__version__, "found": found}


def mtcnn_here() -> str:
    """The hash of its weights, after a look at an empty picture with them. Raises what goes wrong."""
    import numpy as np

    from .faces import Detector

    detector = Detector()
    detector(np.zeros((1, 64, 64, 3), np.uint8))
    return detector.weights_sha256


def yunet_here() -> Path | None:
    """The file of YuNet among the weights, looked into. Raises EncoderError for one that is none."""
    from .yunet import FILES, YuNet

    found = local(FILES)
    return YuNet(found).file if found else None


def weights_here() -> dict[str, Any]:
    """Where weights are looked for, what lies there, and of every encoder of the table what `vacli encoders` tells.

    absent: those of the places that do not exist. "problem": why a file cannot be read as weights. Asks no network: of
    the hub, the cache alone.
    """
    from huggingface_hub import constants

    places = [folder.absolute() for folder in folders()]
    files = [
        {"path": path, "bytes": path.stat().st_size, **_said(path)}
        for folder in places
        for path in sorted(folder.glob("*"))
        if path.suffix in (".safetensors", ".pth", ".onnx") and path.is_file()
    ]
    encoders = [facts_of(name) for name in ENCODERS]
    return {
        "looked_in": places,
        "absent": [folder for folder in places if not folder.is_dir()],
        "hub_cache": constants.HF_HUB_CACHE,
        "files": files,
        "encoders": [{**e, "problem": e["here"] and _unreadable(e["here"])} for e in encoders],
    }


def _said(path: Path) -> dict[str, Any]:
    """What weights of ours say of themselves, or why they cannot be read."""
    if path.suffix == ".onnx":
        return {}  # of yunet_here
    if problem := _unreadable(path):
        return {"problem": problem}
    about = described(path)
    return {key: about[key] for key in ("model", "licence", "note") if about.get(key)}


def _unreadable(weights: Path) -> str | None:
    """Why a file cannot be read as weights; None where it can. Its header is read, of the numbers none.

    A .pth of torch before 1.6 has no header but its first bytes: of such a one nobody sees here where it was cut.
    """
    try:
        if weights.suffix == ".safetensors":
            if isinstance(described(weights), dict):
                return None
        elif _begins(weights) == _OLD_TORCH:
            return None
        else:
            import torch

            torch.load(weights, map_location="cpu", weights_only=True, mmap=True)
            return None
    except Exception:  # safetensors and torch raise a dozen kinds for a broken file, with long advice
        pass
    return "cannot be read as weights: wanted a whole .safetensors file, or a .pth of tensors alone; get it again"


def _begins(weights: Path) -> bytes:
    with weights.open("rb") as f:
        return f.read(len(_OLD_TORCH))


class Lack(NamedTuple):
    """What keeps an encoder from being used here, with its mend. kind: whether to get it, or to get it again."""

    kind: Literal["missing", "unreadable"]
    text: str


def lacking(spec: str) -> Lack | None:
    """What keeps an encoder, named as for --encoder, from being used here; None where nothing does.

    Weights that the hub has are not lacking where it can be reached: the first run fetches them. Raises VacliError for
    an unknown encoder or model.
    """
    family, model = _parted(spec)
    lookup(ENCODERS, family, "encoder")
    if family not in ENCODERS:
        return None  # of his own encoder its author knows
    facts = facts_of(family)
    own = spec.rpartition("=")[0] or (track_name(model) if model else family)
    if family == "hf-audio" and importlib.util.find_spec("transformers") is None:
        return Lack("missing", "wants the package transformers: pip install 'vacli[hf]'")
    if facts["get"] == "" or (family == "hf-audio" and _hub_config(model) is not None):
        return None
    found = facts["here"] if facts["files"] else _of_timm(family, model)
    if found:
        return _lack_in(found)
    if family in _ON_THE_HUB and _hub_answers():
        return None
    other = (
        "any folder as hf-audio:FOLDER" if family == "hf-audio" else f"any file with -o {own}.weights=FILE"
    )
    get = facts["get"].replace("MODEL", model or "MODEL")
    return Lack("missing", f"no weights: {get}; or name {other}{_astray()}")


def lacking_again(track: str, kind: str, options: Mapping[str, Any]) -> Lack | None:
    """The same of an encoder to be made again: of its kind and options, as the store and a run keep them.

    Nothing that is not of the table is imported: a run may be a stranger's. Raises what `lacking` raises.
    """
    if options.get("weights"):
        weights = Path(options["weights"])
        if weights.is_file():
            return _lack_in(weights)
        mend = f"put that very file there again, or name it with -o {track}.weights=FILE"
        return Lack("missing", f"no weights at {weights}, where they were when it was trained: {mend}")
    model = options.get("model")
    return lacking(f"{track}={kind}{f':{model}' if model else ''}") if kind in ENCODERS else None


def _lack_in(weights: Path) -> Lack | None:
    problem = _unreadable(weights)
    return Lack("unreadable", f"{weights} {problem}") if problem else None


def _astray() -> str:
    """What to add where weights are not found, as the folder that should have them may be misspelt."""
    named = os.environ.get(WEIGHTS_DIR)
    return f" (${WEIGHTS_DIR}, {named}, is no folder)" if named and not Path(named).is_dir() else ""


@cache
def _hub_answers() -> bool:
    """Asked once, and not for long: several encoders may want to know."""
    return hub_answers(wait_s=1.5)


def _parted(spec: str) -> tuple[str, str]:
    """NAME=timm:vit_tiny as ("timm", "vit_tiny"); one without a model, and a user's own, with "" behind it."""
    kind = spec.rpartition("=")[2]
    family, _, model = kind.partition(":")
    return (family, model) if family in ENCODERS else (kind, "")


def _of_timm(family: str, model: str) -> Path | None:
    """The weights of a timm model that is named, where they are on this machine."""
    if family != "timm" or not model:
        return None
    from .timm_encoder import on_this_machine, pretrained_config

    return on_this_machine(model, pretrained_config(model))


# ---- what a folder will take ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Footage:
    """What a folder holds by the headers of its videos. frames: of every sample; where two share a video, twice.

    unknown: videos that do not say how long they are. problems: by path, why it cannot be read.
    """

    videos: int
    samples: int
    frames: int
    hours: float
    sound_s: float
    unknown: int
    problems: dict[str, str]


def footage(folder: Path, looked: Callable[[], object] = lambda: None) -> Footage:
    """Opens every video of the folder and decodes its first picture. looked: called with each.

    Raises VacliError for a folder without videos; what is wrong with one of them is told in `problems`.
    """
    from .datasets import find

    samples = find(folder)
    videos = sorted({s.video for s in samples if s.video is not None})
    heads: dict[Path, tuple[int | None, float, bool]] = {}
    problems: dict[str, str] = {}

    def look(video: Path) -> None:
        try:
            heads[video] = _head(video)
        except Exception as e:  # whatever a stranger's file may do
            problems[str(video)] = " ".join(str(e).split()).removeprefix(f"{video}: ")
        looked()

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        list(pool.map(look, videos))
    frames = [
        (heads[s.video][0] or 0) if s.video in heads else max(s.crop_files(), default=-1) + 1
        for s in samples
        if s.video in heads or s.crops
    ]
    seconds = sum(length_s for _, length_s, _ in heads.values())
    sound_s = sum(length_s for _, length_s, has_sound in heads.values() if has_sound)
    unknown = sum(count is None for count, _, _ in heads.values())
    ordered = dict(sorted(problems.items()))
    return Footage(len(videos), len(samples), sum(frames), seconds / 3600, sound_s, unknown, ordered)


def _head(video: Path) -> tuple[int | None, float, bool]:
    """Frames, seconds, and whether there is sound, as the header has it."""
    from .media import Video

    streams = Video(video).check()
    length_s = streams.frames_hint / streams.rate_hz if streams.frames_hint and streams.rate_hz else 0.0
    return streams.frames_hint, length_s, streams.has_sound


def estimate(found: Footage, encoders: Sequence[str], cores: int) -> dict[str, Any]:
    """Bytes in the store and hours of one machine without a GPU, for each encoder; None where nobody measured that.

    Features are float16, times float64. What the store has already is counted too.
    """
    from .device import choose_dtype

    slower = 1.0 if choose_dtype(None, "cpu", True) == "bfloat16" else _FLOAT32_COST
    faces = {"name": "people and faces", "rows": found.frames, "bytes": found.frames * _FACES_BYTES}
    tracks = [{**faces, "dim": 15, "cpu_hours": found.frames / _PER_CORE_HZ["faces"] / cores / 3600}]
    for spec in encoders:
        try:
            tracks.append({"name": spec, **_of_encoder(*_parted(spec), found, cores / slower)})
        except Exception as e:
            tracks.append({"name": spec, "problem": " ".join(str(e).split())})
    return {**asdict(found), "tracks": tracks, "bytes": sum(t.get("bytes") or 0 for t in tracks)}


def _of_encoder(family: str, model: str, found: Footage, cores: float) -> dict[str, Any]:
    maker = lookup(ENCODERS, family, "encoder")
    rows = found.frames
    if maker.eats == "sound" and family in _SOUND_HZ:
        rows = round(found.sound_s * _SOUND_HZ[family])
    dim = _dim(maker, family, model)
    rate_hz = _PER_CORE_HZ.get(family)
    return {
        "rows": rows,
        "dim": dim,
        "bytes": None if dim is None else rows * (2 * dim + _TIME_BYTES),
        "cpu_hours": rows / rate_hz / cores / 3600 if rate_hz else None,
    }


def _dim(maker: Any, family: str, model: str) -> int | None:
    """Numbers in a row, without any weights: of the class, the catalogue, or the model's own description."""
    if isinstance(getattr(maker, "dim", None), int):
        return int(maker.dim)
    if family == "timm":
        return _timm_dim(model) if model else None
    if family == "hf-audio":
        return _hub_dim(model) if model else None
    said = re.match(r"\d+", maker.card.dim) if hasattr(maker, "card") else None
    return int(said[0]) if said else None


def _timm_dim(model: str) -> int:
    """The network is built without its numbers, which takes no memory; timm takes 4 s to import."""
    import torch

    from .timm_encoder import pretrained_config

    pretrained_config(model)
    import timm

    with torch.device("meta"):
        network: Any = timm.create_model(model, pretrained=False, num_classes=0)
    return int(network.num_features)


def _hub_dim(model: str) -> int | None:
    config = _hub_config(model)
    if config is None:
        return None
    about = json.loads(config.read_text(encoding="utf-8"))
    return about.get("hidden_size", about.get("d_model"))


def _hub_config(model: str) -> Path | None:
    """The config.json of a folder, of one of that name among the weights, or of the Hugging Face cache."""
    name = model.rstrip("/").rpartition("/")[2]
    places = [Path(model) / "config.json", *(folder / name / "config.json" for folder in folders())]
    return next((p for p in places if p.is_file()), None) or cached(model, "config.json")
