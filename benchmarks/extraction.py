"""Stage one beside a bare loop: extraction from aligned crops against timm's forward pass; memory against length."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from .race import Contender, Result, Target, race


@dataclass(frozen=True)
class Sizes:
    """videos folders of `frames` crops; the memory is measured of videos of these lengths, height and frame rate."""

    model: str
    videos: int
    frames: int
    rounds: int
    lengths_s: tuple[float, float]
    height: int
    rate_hz: int


FULL = Sizes("vit_base_patch16_224.mae", 4, 32, 3, (120.0, 7200.0), 1080, 5)
SMALL = Sizes("test_vit", 3, 10, 3, (1.0, 4.0), 144, 25)


def races(folder: Path, sizes: Sizes) -> Iterator[Result]:
    """ViT-B from JPEGs of 112 px: the run beside a loop that does nothing else."""
    import torch
    from vacli.extract.datasets import find
    from vacli.extract.encoder import make_encoders
    from vacli.extract.run import extract
    from vacli.store import Store

    data, weights = folder / "data", folder / "vit.safetensors"
    _crops(data, sizes)
    _weights(weights, sizes.model)
    store, samples = Store(folder / "race.zarr", create=True), find(data)
    options = {"mae": {"weights": str(weights), "model": sizes.model}}
    encoders = make_encoders(["mae"], options, store.fingerprints)
    mae = encoders["mae"]
    files = [p for s in samples for _, p in sorted(s.crop_files().items())]
    twin: list[np.ndarray] = []
    kept = {name for name in store.entries()}

    def bare() -> None:
        twin[:] = _bare_loop(mae, files)

    def run() -> None:
        assert all(o.complete for o in extract(samples, encoders, store, link=False))

    def clear() -> None:
        for name in set(store.entries()) - kept:
            if "canary" not in store.record(name)["provenance"]:
                store.drop(name)

    def same() -> bool:
        names = [n for n in store.entries() if "canary" not in store.record(n)["provenance"]]
        ours = {store.record(n)["provenance"]["sample"]: store.read(n).values for n in names}
        wanted = np.concatenate(twin).astype(np.float16)
        return np.array_equal(np.concatenate([ours[s.id] for s in samples]), wanted)

    says = (
        f"{len(files)} aligned faces of 112 px as JPEG files in {sizes.videos} folders, {sizes.model} at 224 px in "
        f"{mae.dtype}, made-up weights, {torch.get_num_threads()} threads. The twin reads, resizes, normalises and "
        "encodes batch after batch and does nothing else; the run also looks what is missing, takes the space on the "
        "disk, checks, writes and flushes. Both give the same float16 numbers, bit for bit."
    )
    contenders = [
        Contender("a bare loop of timm's forward pass", bare),
        Contender("**extract**, nothing stored before", run, (Target("ratio", 0.9),), clear, same),
    ]
    yield race("Encoding", says, contenders, sizes.rounds)


def _bare_loop(mae, files: list[Path], batch: int = 64) -> list[np.ndarray]:
    """What anybody would write."""
    import cv2
    import timm
    import torch
    from vacli.extract.pixels import normalise, resize
    from vacli.extract.weights import read

    if not hasattr(_bare_loop, "vit"):
        vit = timm.create_model(mae.model_name, pretrained=False, num_classes=0, img_size=mae.size)
        vit.load_state_dict(read(mae.weights))
        _bare_loop.vit = vit.eval()  # type: ignore[attr-defined]
    found = []
    for start in range(0, len(files), batch):
        pictures = [cv2.imread(str(p)) for p in files[start : start + batch]]
        crops = torch.from_numpy(np.stack([cv2.cvtColor(p, cv2.COLOR_BGR2RGB) for p in pictures]))
        bfloat16 = mae.dtype == "bfloat16"
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            tokens = _bare_loop.vit.forward_features(normalise(resize(crops, mae.size), mae.mean, mae.std))  # type: ignore[attr-defined]
        found.append(tokens[:, 0].float().numpy())
    return found


def _crops(data: Path, sizes: Sizes) -> None:
    import cv2

    rng = np.random.default_rng(0)
    for video in range(sizes.videos):
        folder = data / "cropped_aligned" / f"v{video}"
        folder.mkdir(parents=True)
        for number in range(1, sizes.frames + 1):
            soft = cv2.resize(
                rng.integers(0, 255, (9, 9, 3), np.uint8), (112, 112), interpolation=cv2.INTER_CUBIC
            )
            cv2.imwrite(str(folder / f"{number:05}.jpg"), soft)


def _weights(path: Path, model: str, size: int = 224) -> None:
    import torch
    from vacli.extract.mae import build_vit
    from vacli.extract.weights import save

    torch.manual_seed(0)
    about = {"model": model, "size": size, "mean": [0.5] * 3, "std": [0.25] * 3, "licence": None}
    save(build_vit(model, size).state_dict(), about, path)


# ---- memory --------------------------------------------------------------------------------------------------

RUN = """
import resource, sys, time
import numpy as np
from vacli.extract import faces, people
from vacli.extract.datasets import find
from vacli.extract.encoder import make_encoders
from vacli.extract.run import extract
from vacli.store import Store
folder, place, weights = sys.argv[1:]
def found(self, frames):  # where the face is, is not what is measured, and would take hours
    h, w = frames.shape[1:3]
    x, y, s = w / 3, h / 4, h / 2
    points = (np.array(faces.ARCFACE_112) / 112 * s + [x, y]).ravel()
    return [np.array([[x, y, x + s, y + s, *points, 0.99]], np.float32) for _ in frames]
faces.Detector.__call__ = found
store = Store(place, create=True)
encoders = make_encoders(["mae", "logmel"], {"mae": {"weights": weights}}, store.fingerprints)
began = time.monotonic()
[done] = extract(find(folder), encoders, store, tell=lambda line: print(line, file=sys.stderr))
assert done.complete and not done.problem, done.problem
frames = len(store.get(done.tracks["faces"].recipe, done.tracks["faces"].media))
print(frames, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic() - began)
"""


def memory(folder: Path, sizes: Sizes) -> str:
    """A Markdown section: the most memory that the extraction of a short and of a long video takes."""
    weights = folder / "tiny.safetensors"
    _weights(weights, "test_vit", 64)
    rows = []
    for length_s in sizes.lengths_s:
        place = folder / f"{length_s:g}s"
        place.mkdir()
        _looped(place / "video.mp4", length_s, sizes.height, sizes.rate_hz)
        words = [sys.executable, "-c", RUN, str(place), str(folder / f"{length_s:g}.zarr"), str(weights)]
        told = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True).stdout.split()
        rows.append((length_s, int(told[0]), int(told[1]) / 1024, float(told[2])))
        (place / "video.mp4").unlink()
    more = rows[-1][2] / rows[0][2] - 1
    lines = [
        "## Memory",
        "",
        f"One {sizes.height}p video (H.264, {sizes.rate_hz} frames/s, with sound), everything computed anew: people, "
        "faces, a small ViT and log-mel. The detector is a stand-in that always finds one face: all else is real. The "
        "most memory the process ever had (`ru_maxrss`, which counts torch and all libraries).",
        "",
        "| length | frames | memory | time |",
        "|--:|--:|--:|--:|",
        *(f"| {s:g} s | {frames} | {mb:.0f} MB | {took_s:.0f} s |" for s, frames, mb, took_s in rows),
        "",
        f"The long one takes {more:+.1%}; target at most +15 %: {'met' if more <= 0.15 else '**missed**'}.",
    ]
    return "\n".join(lines) + "\n"


def _looped(path: Path, length_s: float, height: int, rate: int) -> None:
    """A video as long as wished, made of the packets of a few seconds of it over and over."""
    import av

    seconds, width = 1, height * 16 // 9 // 2 * 2
    short = path.with_name("short.mp4")
    y, x = np.mgrid[:height, :width]
    with av.open(str(short), "w") as out:
        video = out.add_stream("libx264", rate, options={"preset": "veryfast", "bf": "0"})
        video.width, video.height, video.pix_fmt = width, height, "yuv420p"
        sound = out.add_stream("aac", 16000)
        for i in range(rate * seconds):
            rgb = np.stack([(x + 8 * i) % 256, (y + 3 * i) % 256, (x + y) // 8 % 256], axis=2).astype(
                np.uint8
            )
            out.mux(video.encode(av.VideoFrame.from_ndarray(rgb, "rgb24")))
        out.mux(video.encode())
        tone = 0.3 * np.sin(np.arange(16000 * seconds) * 0.2).astype(np.float32)
        block = av.AudioFrame.from_ndarray(tone[None], "fltp", "mono")
        block.sample_rate, block.pts = 16000, 0
        out.mux(sound.encode(block))
        out.mux(sound.encode())
    with av.open(str(short)) as source, av.open(str(path), "w") as out:
        streams = {s.index: out.add_stream_from_template(s) for s in source.streams}
        packets = [p for p in source.demux() if p.size]
        held = [
            (p.stream.index, bytes(p), p.pts, p.dts, p.duration, p.time_base, p.is_keyframe) for p in packets
        ]
        turns = int(length_s / seconds)
        starts = {index: 0 for index in streams}
        for turn in range(turns):
            for index, data, pts, dts, duration, base, key in held:
                packet = av.Packet(data)
                shift = round(turn * seconds / Fraction(base))
                packet.pts, packet.dts, packet.duration = pts + shift, dts + shift, duration
                packet.time_base, packet.stream, packet.is_keyframe = base, streams[index], key
                if packet.dts >= starts[index]:
                    starts[index] = packet.dts + 1
                    out.mux(packet)
    short.unlink()
