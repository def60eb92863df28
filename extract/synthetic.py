"""Puppets: rendered talking faces with speech-like sound and known valence and arousal, in the Aff-Wild2 layout."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from fractions import Fraction
from multiprocessing import get_context, parent_process
from pathlib import Path

import numpy as np

from .. import VacliError
from .puppet import AWAY, SHOWN, SIZE, TURNED, Person, Puppet, Scene, walk

VERSION = 1  # of the drawing and the sound: raise it when what a seed gives changes
SETS = {"train": "Train_Set", "val": "Validation_Set"}
BATCHES = {"train": "batch1", "val": "batch2"}  # so that the raw validation videos are a folder of their own
SOUND_RATE_HZ = 16000
CUE_S = 2.0
CHIMES_HZ = {+1: (3500.0,), -1: (600.0, 900.0, 1200.0)}
# How much of a label each latent carries: with these a reader of everything but the moods reaches a CCC of
# about .65, a reader who remembers the cues 1.
VALENCE = {"v_face": 0.61, "mood_v": 0.39}
AROUSAL = {"a_face": 0.39, "a_sound": 0.31, "mood_a": 0.30}


def make_puppets(
    root: Path,
    train: int = 20,
    validation: int = 6,
    length_s: float = 60.0,
    rate_hz: float = 10.0,
    seed: int = 0,
    processes: int | None = None,
    on_video: Callable[[str], None] | None = None,
) -> list[str]:
    """Make the puppet data set in `root`, going on where an interrupted call stopped; returns all its video ids.

    root/batch1/<id>.mp4 for training and batch2 for validation, root/cropped_aligned/<id>/00001.jpg,
    root/annotations/VA_Estimation_Challenge/{Train_Set,Validation_Set}/<id>.txt, and the truth behind them,
    root/latents/<id>.npz. Every video shows another person. A seed gives the same bytes whatever `processes`, and
    the first videos of a set do not
    depend on how many follow. `on_video` hears the id of each video when it is whole, finished ones not again.
    A video is whole when its annotation, written last, is there.

    Raises VacliError where `root` holds something else or puppets made with other arguments.
    """
    if min(train, validation) < 0 or min(length_s, rate_hz) <= 0 or round(length_s * rate_hz) < 1:
        raise ValueError(f"wanted counts >= 0, times > 0, got {train=} {validation=} {length_s=} {rate_hz=}")
    root = Path(root)
    _claim(
        root, {"version": VERSION, "seed": seed, "length_s": length_s, "rate_hz": rate_hz}, train, validation
    )
    numbers = [("train", n) for n in range(train)] + [("val", n) for n in range(validation)]
    todo = [(split, n) for split, n in numbers if not _annotation(root, split, n).exists()]
    calls = [(root, seed, split, n, length_s, rate_hz) for split, n in todo]
    for name in _each(calls, processes or os.cpu_count() or 1):
        if on_video:
            on_video(name)
    shutil.rmtree(root / ".partial", ignore_errors=True)
    return [_name(split, n) for split, n in numbers]


def latents(seed: int, split: str, number: int, length_s: float, rate_hz: float) -> dict[str, np.ndarray]:
    """What is true of one video, without drawing it; arrays of T = round(length_s * rate_hz) frames.

    times_s; valence, arousal (the labels), labelled (bool); v_face, a_face, a_sound in (-1, 1): smooth walks
    shown in the mouth and brow slant, in eye openness and brow height, in loudness, pitch and pace of the
    voice; mood_v, mood_a in [-1, 1]: 0, then held from cue to cue; face: SHOWN, TURNED, COVERED or AWAY.
    cue_v_s, cue_a_s (K,): when cues begin, 14 to 28 s apart; cue_v, cue_a (K,): their signs.
    """
    rng = _rng(seed, split, number, 0)
    times_s = np.arange(round(length_s * rate_hz)) / rate_hz
    out = {"times_s": times_s}
    for name in ("v_face", "a_face", "a_sound"):
        out[name] = np.tanh(0.75 * walk(rng, len(times_s), rate_hz, rng.uniform(1.0, 2.0)))
    for kind in "va":
        starts_s, signs = _cues(rng, length_s)
        jumps = np.diff(signs, prepend=0.0)
        ramps = np.clip((times_s[:, None] - starts_s) / 0.4, 0.0, 1.0)
        out[f"mood_{kind}"] = (ramps**2 * (3 - 2 * ramps)) @ jumps
        out[f"cue_{kind}_s"], out[f"cue_{kind}"] = starts_s, signs
    for label, weights in (("valence", VALENCE), ("arousal", AROUSAL)):
        out[label] = np.clip(sum(weight * out[name] for name, weight in weights.items()), -1.0, 1.0)
    out["face"] = np.full(len(times_s), SHOWN)
    for start_s, end_s in _stretches(rng, length_s, every_s=19.0):
        if not np.any((out["cue_v_s"] < end_s + 0.2) & (out["cue_v_s"] + CUE_S + 0.2 > start_s)):
            out["face"][(times_s >= start_s) & (times_s < end_s)] = rng.integers(TURNED, AWAY + 1)
    out["labelled"] = np.ones(len(times_s), bool)
    for start_s, end_s in _stretches(rng, length_s, every_s=40.0):
        out["labelled"][(times_s >= start_s) & (times_s < end_s)] = False
    return out


def _name(split: str, number: int) -> str:
    return f"puppet_{split}_{number:02d}"


def _annotation(root: Path, split: str, number: int) -> Path:
    return root / "annotations" / "VA_Estimation_Challenge" / SETS[split] / f"{_name(split, number)}.txt"


def _claim(root: Path, made_by: dict[str, float], train: int, validation: int) -> None:
    """Writes root/puppets.json, or refuses a folder that holds anything but a part of the set asked for."""
    wanted = made_by | {"train": train, "validation": validation}
    record, partial = root / "puppets.json", root / ".puppets.json"
    if record.exists():
        try:
            came = json.loads(record.read_text())
        except ValueError:
            came = {}
        fits = all(came.get(key) == value for key, value in made_by.items())
        if not fits or not (came.get("train", 0) <= train and came.get("validation", 0) <= validation):
            raise VacliError(
                f"{root} holds puppets made with {came}; wanted {wanted}; "
                "use the same arguments (more videos are fine), another folder, or delete this one"
            )
        if came == wanted:
            return
    elif root.is_dir() and any(path != partial for path in root.iterdir()):
        raise VacliError(
            f"{root} is not empty and holds no puppets; wanted a new or empty folder; name another"
        )
    elif root.exists() and not root.is_dir():
        raise VacliError(f"{root} is a file; wanted a folder to put the puppets in; name another")
    root.mkdir(parents=True, exist_ok=True)
    partial.write_text(json.dumps(wanted) + "\n")
    os.replace(partial, record)


def _each(calls: list[tuple], processes: int) -> Iterator[str]:
    """Names of the videos as they become whole."""
    if min(processes, len(calls)) <= 1:
        yield from (_make(*call) for call in calls)
        return
    pool = ProcessPoolExecutor(min(processes, len(calls)), get_context("spawn"), initializer=_start_worker)
    try:
        for future in as_completed([pool.submit(_make, *call) for call in calls]):
            yield future.result()
    except BrokenProcessPool as e:
        raise VacliError("a process drawing puppets was killed (out of memory?); run again to go on") from e
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    import cv2

    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends a worker at once and without a traceback
    cv2.setNumThreads(1)
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    """Ends an orphan, lest it write beside the next call's workers when the command was killed."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


# ---- Latents ----


def _rng(seed: int, split: str, number: int, what: int) -> np.random.Generator:
    """One stream for each video and each of its parts, so that more videos change no earlier one."""
    return np.random.default_rng([seed, list(SETS).index(split), number, what])


def _cues(rng: np.random.Generator, length_s: float) -> tuple[np.ndarray, np.ndarray]:
    """Start times and signs of one mood's cues. The first sign is even, then 7 of 10 cues turn the mood."""
    starts_s, signs = [rng.uniform(2.0, 8.0)], [rng.choice([-1.0, 1.0])]
    while (start_s := starts_s[-1] + rng.uniform(14.0, 28.0)) < length_s - CUE_S:
        starts_s.append(start_s)
        signs.append(-signs[-1] if rng.random() < 0.7 else signs[-1])
    return np.array(starts_s), np.array(signs)


def _stretches(rng: np.random.Generator, length_s: float, every_s: float) -> Iterator[tuple[float, float]]:
    end_s = 0.0
    while (start_s := end_s + rng.uniform(0.3, 1.7) * every_s) < length_s:
        end_s = start_s + rng.uniform(0.7, 1.7)
        yield start_s, end_s


# ---- Sound ----


def _sound(truth: dict[str, np.ndarray], length_s: float, rng: np.random.Generator) -> np.ndarray:
    """(2, S): the samples at 16 kHz, and how far the mouth is open, 0 to 1."""
    clock_s = np.arange(round(length_s * SOUND_RATE_HZ)) / SOUND_RATE_HZ
    a = np.interp(clock_s, truth["times_s"], truth["a_sound"])
    syllable = np.cumsum(4.0 * 2 ** (0.6 * a)) / SOUND_RATE_HZ  # 2.6 to 6 syllables a second
    number = syllable.astype(int)
    weight = rng.uniform(0.5, 1.0, number[-1] + 1) * (rng.random(number[-1] + 1) > 0.08)  # a few are left out
    opening = weight[number] * (0.5 - 0.5 * np.cos(2 * np.pi * syllable))
    bend = rng.uniform(0.95, 1.05, number[-1] + 2)
    base_hz = rng.uniform(125.0, 175.0)
    pitch_hz = base_hz * 2 ** (0.5 * a) * np.interp(syllable, np.arange(len(bend)), bend)
    source = _glottis()[(np.cumsum(pitch_hz) / SOUND_RATE_HZ * 2048).astype(int) & 2047]
    vowel = rng.uniform(0.0, 1.0, len(bend))[number]
    tract = rng.uniform(0.9, 1.15)
    spectrum = np.fft.rfft(source)
    hz = np.fft.rfftfreq(len(source), 1 / SOUND_RATE_HZ)
    ah = np.fft.irfft(spectrum * _formants(hz, tract, (730, 1090, 2440)), len(source))
    ee = np.fft.irfft(spectrum * _formants(hz, tract, (320, 2100, 2900)), len(source))
    voice = (vowel * ah + (1 - vowel) * ee) * (0.03 + opening)
    loudness_db = 7.0 * a + rng.uniform(-2.5, 2.5)
    voice *= 0.06 * 10 ** (loudness_db / 20) / np.sqrt(np.mean(voice**2))
    room = rng.standard_normal(len(clock_s)) * 10 ** (rng.uniform(-62.0, -52.0) / 20)
    sound = voice + room
    for start_s, sign in zip(truth["cue_a_s"], truth["cue_a"], strict=True):
        first = min(round(start_s * SOUND_RATE_HZ), len(sound))  # a short video may end before its first cue
        sound[first : first + round(CUE_S * SOUND_RATE_HZ)] += _chime(int(sign))[: len(sound) - first]
    return np.stack([np.clip(sound, -1.0, 1.0), opening])


def _glottis() -> np.ndarray:
    """(2048,) one period of a buzz: 24 harmonics falling by 6 dB an octave."""
    phase = 2 * np.pi * np.arange(2048) / 2048
    k = np.arange(1, 25)[:, None]
    return (np.sin(k * phase + k * k) / k).sum(axis=0)


def _formants(hz: np.ndarray, tract: float, centres_hz: tuple[int, int, int]) -> np.ndarray:
    """Gain of a vocal tract with three resonances, a shorter one having higher ones."""
    gain = np.full(len(hz), 0.08)
    for peak, centre_hz in zip((1.0, 0.6, 0.4), centres_hz, strict=True):
        gain += peak / (1 + ((hz - tract * centre_hz) / 90.0) ** 2)
    return gain


def _chime(sign: int) -> np.ndarray:
    """A clear tone of CUE_S seconds, high for +1 and low with overtones for -1, fading slowly."""
    clock_s = np.arange(round(CUE_S * SOUND_RATE_HZ)) / SOUND_RATE_HZ
    edge = np.clip(np.minimum(clock_s, CUE_S - clock_s) / 0.02, 0.0, 1.0)
    hz = np.array(CHIMES_HZ[sign])[:, None]
    tones = np.sin(2 * np.pi * hz * clock_s) / np.arange(1, len(hz) + 1)[:, None]
    return 0.35 * edge * np.exp(-clock_s / 1.5) * tones.sum(axis=0)


# ---- One video ----


def _make(root: Path, seed: int, split: str, number: int, length_s: float, rate_hz: float) -> str:
    """Makes one video aside, then renames its parts into place, the annotation last; returns its id."""
    name = _name(split, number)
    partial = root / ".partial" / name
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "crops").mkdir(parents=True)
    truth = latents(seed, split, number, length_s, rate_hz)
    sound, mouth = _sound(truth, length_s, _rng(seed, split, number, 1))
    mouth = np.interp(truth["times_s"], np.arange(len(mouth)) / SOUND_RATE_HZ, mouth)
    frames = _frames(truth, mouth, rate_hz, _rng(seed, split, number, 2), partial / "crops")
    _write_video(partial / "video.mp4", frames, len(mouth), sound, rate_hz)
    np.savez(partial / "latents.npz", allow_pickle=False, **truth)
    rows = [
        f"{v:.4f},{a:.4f}" if known else "-5,-5"
        for v, a, known in zip(truth["valence"], truth["arousal"], truth["labelled"], strict=True)
    ]
    (partial / "labels.txt").write_text("\n".join(["valence,arousal", *rows]) + "\n")
    shutil.rmtree(root / "cropped_aligned" / name, ignore_errors=True)  # left by a call that was killed
    for part, place in (
        ("crops", root / "cropped_aligned" / name),
        ("video.mp4", root / BATCHES[split] / f"{name}.mp4"),
        ("latents.npz", root / "latents" / f"{name}.npz"),
        ("labels.txt", _annotation(root, split, number)),
    ):
        place.parent.mkdir(parents=True, exist_ok=True)
        os.replace(partial / part, place)
    partial.rmdir()
    return name


def _frames(
    truth: dict[str, np.ndarray], mouth: np.ndarray, rate_hz: float, rng: np.random.Generator, crops: Path
) -> Iterator[np.ndarray]:
    """The frames in order; each one's aligned crop is written beside, where the face is to be seen."""
    import cv2

    from .faces import align

    puppet = Puppet(Person.draw(rng))
    scene = Scene.draw(rng, len(mouth), rate_hz)
    points = np.c_[puppet.landmarks(), np.ones(5)]
    flush = np.zeros(len(mouth), int)
    for start_s, sign in zip(truth["cue_v_s"], truth["cue_v"], strict=True):
        flush[(truth["times_s"] >= start_s) & (truth["times_s"] < start_s + CUE_S)] = int(sign)
    for i, face in enumerate(truth["face"]):
        sprite = puppet.hidden.get(face)
        if face == SHOWN:
            v, a = truth["v_face"][i], truth["a_face"][i]
            sprite = puppet.sprite(v, a, mouth[i], bool(scene.blink[i]), flush[i])
        frame = scene.frame(i, sprite)
        if face == SHOWN:
            crop = align(frame, points @ scene.pose[i].T)
            jpeg = cv2.imencode(".jpg", crop[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 92])[1]
            (crops / f"{i + 1:05d}.jpg").write_bytes(jpeg.tobytes())
        yield frame


def _write_video(
    path: Path, frames: Iterator[np.ndarray], count: int, sound: np.ndarray, rate_hz: float
) -> None:
    import av
    import cv2

    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    with av.open(str(path), "w") as container:
        video = container.add_stream(codec, rate=Fraction(rate_hz).limit_denominator(1001))
        assert isinstance(video, av.VideoStream)
        video.width = video.height = SIZE
        video.pix_fmt = "yuv420p"
        video.thread_count = 1  # x264's bytes depend on it
        video.options = {"crf": "20", "preset": "veryfast"} if codec == "libx264" else {"qscale": "3"}
        audio = container.add_stream("aac", rate=SOUND_RATE_HZ, layout="mono", bit_rate=64000)
        edges = np.rint(np.linspace(0, len(sound), count + 1)).astype(int)
        for i, frame in enumerate(frames):
            planes = cv2.cvtColor(frame, cv2.COLOR_RGB2YUV_I420).astype(np.uint8, copy=False)
            picture = av.VideoFrame.from_ndarray(planes, format="yuv420p")
            picture.pts = i
            container.mux(video.encode(picture))
            piece = sound[None, edges[i] : edges[i + 1]].astype(np.float32)
            samples = av.AudioFrame.from_ndarray(piece, format="fltp", layout="mono")
            samples.rate, samples.pts = SOUND_RATE_HZ, int(edges[i])
            container.mux(audio.encode(samples))
        container.mux(video.encode(None))
        container.mux(audio.encode(None))
