"""A folder is split, shared and filled by many: the same tracks as by one, no video at the hands of two at once."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from click.testing import CliRunner, Result
from vacli import VacliError
from vacli.cli import main
from vacli.extract.datasets import Sample, find
from vacli.extract.encoder import make_encoders, track_name
from vacli.extract.people import People
from vacli.extract.run import Outcome, extract, shard
from vacli.store import Store

from .media_files import clicks, pictures, write_video

MODULE = '''
import time
import numpy as np

class Mean:
    name, eats, dim = "mean", "crops", 3
    calls, slow_s = [], 0.0
    def options(self): return {}
    def recipe(self): return {"track": "mean", "version": 1}
    def __call__(self, crops):
        Mean.calls.append(len(crops))
        time.sleep(Mean.slow_s)
        return crops.mean(axis=(1, 2), dtype="float32")

class Two:
    """Two outputs of one pass: how often was it made?"""
    name, eats, dim = "two", "crops", 3
    passes, built = [], 0
    def __init__(self, output="mean", scale="1"):
        self.output, self.scale, self.shared = output, float(scale), None
    def options(self): return {"output": self.output, "scale": self.scale}
    def recipe(self): return {"track": "two", "version": 1, **self.options()}
    @property
    def pass_key(self): return ("two", self.scale)
    def join(self, other): self.shared = other
    def encode(self, crops, outputs):
        Two.passes.append(len(crops))
        both = {"mean": crops.mean(axis=(1, 2), dtype="float32"), "max": crops.max(axis=(1, 2)).astype("float32")}
        return {o: self.scale * both[o] for o in outputs}
    def __call__(self, crops): return self.encode(crops, [self.output])[self.output]

class Ticks:
    """A row for every frame: the sound's power about it."""
    name, eats, dim, rate_hz, clock = "ticks", "sound", 1, 8000, "frames"
    def options(self): return {}
    def recipe(self): return {"track": "ticks", "version": 1}
    def __call__(self, blocks, times_s):
        from vacli.store import Track
        heard = np.concatenate([np.zeros(0, np.float32), *blocks])
        if not len(heard): return Track(np.zeros((0, 1), np.float32), np.zeros(0))
        return Track(np.stack([[heard[round(t * 8000) : round(t * 8000) + 80].sum()] for t in times_s]), times_s)
'''


@pytest.fixture
def toys(tmp_path, monkeypatch):
    lab = tmp_path / "lab"
    lab.mkdir()
    (lab / "crowd_toys.py").write_text(MODULE)
    monkeypatch.syspath_prepend(lab)
    import crowd_toys

    yield crowd_toys
    sys.modules.pop("crowd_toys", None)


@pytest.fixture
def crops_only(tmp_path) -> Path:
    """Eight people in the Aff-Wild2 layout, without videos: 20 crops each, some numbers missing."""
    rng = np.random.default_rng(0)
    for name in (f"p{n}" for n in range(8)):
        folder = tmp_path / "data" / "cropped_aligned" / name
        folder.mkdir(parents=True)
        for number in sorted({*range(1, 21)} - {3, 11}):
            cv2.imwrite(str(folder / f"{number:05}.jpg"), rng.integers(0, 255, (112, 112, 3), np.uint8))
    for path in (tmp_path / "data").rglob("*"):
        os.utime(path, (1e9, 1e9))  # so that digests are remembered
    return tmp_path / "data"


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "features.zarr", create=True)


def go(samples: list[Sample], store: Store, *names: str, **how) -> dict[str, Outcome]:
    encoders = make_encoders(names, how.pop("options", {}), store.fingerprints)
    return {o.sample.id: o for o in extract(samples, encoders, store, **how)}


def content(store: Path) -> dict[str, bytes]:
    return {str(p.relative_to(store)): p.read_bytes() for p in store.glob("*@*/**/*") if p.is_file()}


# ---- shards --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 20])
def test_the_shards_of_a_folder_are_the_whole_folder_once(crops_only, n):
    samples = find(crops_only)
    parts = [shard(samples, f"{i}/{n}") for i in range(1, n + 1)]
    assert sorted(s.id for part in parts for s in part) == [s.id for s in samples]
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert parts == [shard(samples[::-1], f"{i}/{n}") for i in range(1, n + 1)]


def test_people_of_one_video_stay_in_one_shard(tmp_path):
    both = [
        Sample(f"{n}_{side}", tmp_path, tmp_path / f"{n}.mp4") for n in range(5) for side in ("left", "right")
    ]
    for i in (1, 2):
        ids = {s.id for s in shard(both, f"{i}/2")}
        assert all((f"{n}_left" in ids) == (f"{n}_right" in ids) for n in range(5))


@pytest.mark.parametrize("part", ["0/2", "3/2", "1", "a/b", "/2", "1/", "1/0", "-1/2", "1.0/2"])
def test_a_shard_that_is_none_is_told(part):
    with pytest.raises(VacliError, match="wanted I/N"):
        shard([], part)


# ---- several processes ---------------------------------------------------------------------------------------

FILL = """
import json, sys, time
import crowd_toys
from vacli.extract import making
from vacli.extract.datasets import find
from vacli.extract.encoder import make_encoders
from vacli.extract.run import extract
from vacli.store import Store
folder, place, log = sys.argv[1:]
read = making.Making.read
def told(self, *args):
    began = time.time()
    yield from read(self, *args)
    with open(log, "a") as f:
        f.write(json.dumps([self.sample.id, began, time.time()]) + "\\n")
making.Making.read = told
crowd_toys.Mean.slow_s = 0.05
store = Store(place, create=True)
done = extract(find(folder), make_encoders(["crowd_toys:Mean"], {}, store.fingerprints), store)
sys.exit(not all(o.complete for o in done))
"""


def fill(toys, folder: Path, place: Path, log: Path) -> subprocess.Popen:
    words = [sys.executable, "-c", FILL, str(folder), str(place), str(log)]
    path = str(Path(toys.__file__).parent)
    return subprocess.Popen(words, env={**os.environ, "PYTHONPATH": path}, stderr=subprocess.PIPE, text=True)


def test_two_processes_on_one_folder_fill_the_same_store_and_share_the_work(toys, crops_only, tmp_path):
    alone = Store(tmp_path / "alone.zarr", create=True)
    go(find(crops_only), alone, "crowd_toys:Mean")
    together, log = tmp_path / "together.zarr", tmp_path / "log"
    Store(together, create=True)
    running = [fill(toys, crops_only, together, log) for _ in range(2)]
    assert [(p.communicate()[1], p.returncode)[1] for p in running] == [0, 0]
    assert content(together) == content(alone.path)
    assert Store(together).videos() == alone.videos()
    made = [json.loads(line)[0] for line in log.read_text().splitlines()]
    assert sorted(made) == [f"p{n}" for n in range(8)]  # each once, by one of the two
    assert [p.name for p in (together / ".staging").iterdir()] == ["zarr.json"]


def test_a_video_that_another_process_is_at_is_left_to_it_until_it_is_killed(toys, crops_only, store):
    [first, *_] = samples = find(crops_only)
    media = first.media(store.fingerprints)
    code = (
        "import sys, time\nfrom vacli.store import Store\ns = Store(sys.argv[1])\nc = s.claim(sys.argv[2])\n"
    )
    code += "print(1, flush=True)\ntime.sleep(60)"
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(store.path), media], stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None
    assert other.stdout.readline() == "1\n"
    order: list[str] = []

    def then(outcome: Outcome) -> None:
        order.append(outcome.sample.id)
        if len(order) == len(samples) - 1:  # all the others are done
            assert first.id not in order
            os.kill(other.pid, signal.SIGKILL)
            other.wait()

    done = go(samples, store, "crowd_toys:Mean", then=then)
    other.stdout.close()
    assert order[-1] == first.id
    assert done[first.id].complete
    assert list(done) == [s.id for s in samples]  # told in their own order


def test_a_claim_is_for_one_and_ends_when_it_is_given_up(store):
    give_up = store.claim("ab" * 32)
    assert give_up is not None
    assert store.claim("ab" * 32) is None
    other = store.claim("cd" * 32)
    assert other is not None
    give_up()
    again = store.claim("ab" * 32)
    assert again is not None
    again()
    other()
    assert [p.name for p in (store.path / ".staging").iterdir()] == ["zarr.json"]


def test_samples_that_are_one_medium_are_made_one_after_the_other(toys, store, tmp_path):
    video = write_video(tmp_path / "a.mkv", pictures(4), sound=clicks(0.2, [0.1]))
    samples = [Sample(name, tmp_path, video) for name in ("a", "b", "c")]
    began_s = time.monotonic()
    done = go(samples, store, "logmel")
    assert [o.computed for o in done.values()] == [["people", "faces", "logmel"], [], []]
    assert all(o.complete for o in done.values())
    assert time.monotonic() - began_s < 8  # nobody waited for a batch to fill


# ---- what encoders may be ------------------------------------------------------------------------------------


def test_several_outputs_of_one_pass_are_tracks_of_their_own(toys, crops_only, store):
    options = {"two": {"output": "mean,max"}}
    done = go(find(crops_only), store, "two=crowd_toys:Two", "crowd_toys:Mean", options=options)
    assert sum(toys.Two.passes) == 8 * 18 + 2 * 4  # crops, and the canary of each output
    tracks = {n: store.get(w.recipe, w.media) for n, w in done["p0"].tracks.items()}
    assert set(tracks) == {"two", "two.max", "mean"}
    assert np.array_equal(tracks["two"].values, tracks["mean"].values, equal_nan=True)
    seen = tracks["mean"].valid
    assert (tracks["two.max"].values[seen] >= tracks["two"].values[seen]).all()
    assert seen.tolist() == [n not in (3, 11) for n in range(1, 21)]
    # a second time, only the output that is new
    toys.Two.passes.clear()
    assert go(find(crops_only), store, "two=crowd_toys:Two", options=options)["p0"].computed == []
    assert toys.Two.passes == []


def test_outputs_are_remade_from_what_the_store_says_of_them(toys, crops_only, store):
    go(
        find(crops_only)[:1],
        store,
        "two=crowd_toys:Two",
        options={"two": {"output": "mean, max", "scale": "2"}},
    )
    said = store.videos()["p0"]["tracks"]["two.max"]["encoder"]
    [again] = make_encoders([f"x={said['kind']}"], {"x": said["options"]}, store.fingerprints).values()
    assert again.output == "max"
    assert again.scale == 2.0


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("microsoft/WavLM-large", "wavlm-large"),
        ("vit_base_patch16_clip_224.openai", "vit_base_patch16_clip_224.openai"),
        ("/some/Folder/my model/", "my-model"),
        ("x" * 99, "x" * 64),
        ("___", "model"),
    ],
)
def test_a_model_gives_its_tracks_their_name(model, name):
    assert track_name(model) == name


def test_a_sound_encoder_on_the_frames_clock_gives_a_row_a_frame(toys, store, tmp_path):
    times_s = [0.0, 0.05, 0.2, 0.25, 0.5]
    folder = tmp_path / "videos"
    folder.mkdir()
    write_video(folder / "a.mkv", pictures(5), times_s, sound=clicks(0.6, [0.2]))
    write_video(folder / "mute.mkv", pictures(5))
    done = go(find(folder), store, "crowd_toys:Ticks")
    wanted = done["a"].tracks["ticks"]
    track = store.get(wanted.recipe, wanted.media)
    np.testing.assert_allclose(track.times_s, times_s, atol=0.002)
    assert int(np.abs(track.values[:, 0]).argmax()) == 2
    assert "no sound" in (done["mute"].problem or "")


# ---- whose face ----------------------------------------------------------------------------------------------


@pytest.fixture
def two_people(monkeypatch):
    """The detector sees two people in every frame, the left one larger."""
    points = np.array([[15, 20], [30, 20], [22, 26], [16, 34], [29, 34]], np.float32)
    left = [4, 8, 44, 48, *points.ravel(), 0.99]
    right = [100, 8, 128, 40, *(points + np.float32([85, 0])).ravel(), 0.9]

    def found(self, frames: np.ndarray) -> list[np.ndarray]:
        return [np.array([left, right], np.float32) for _ in frames]

    monkeypatch.setattr("vacli.extract.faces.Detector.__call__", found)


def test_each_person_is_a_track_and_people_are_looked_for_once(toys, two_people, store, tmp_path):
    (tmp_path / "videos").mkdir()
    write_video(tmp_path / "videos" / "pair.mkv", pictures(12, 96, 160))
    [pair] = find(tmp_path / "videos")
    x = {}
    for who in ("left", "right", "main"):
        done = go([replace(pair, person=who)], store, "crowd_toys:Mean")["pair"]
        assert done.complete
        assert ("people" in done.computed) == (who == "left")
        x[who] = store.get(done.tracks["faces"].recipe, done.tracks["faces"].media).values[:, 0]
    assert (x["left"] == 4).all()
    assert (x["right"] == 100).all()
    assert np.array_equal(x["main"], x["left"])


def test_everybody_is_a_sample_for_each(toys, two_people, store, tmp_path):
    (tmp_path / "videos").mkdir()
    for name in ("a", "b"):
        write_video(tmp_path / "videos" / f"{name}.mkv", pictures(12 if name == "a" else 13, 96, 160))
    (tmp_path / "videos" / "a.txt").write_text("valence,arousal\n" + "0.5,0.5\n" * 12)
    (tmp_path / "videos" / "torn.mkv").write_text("no film")
    samples = [replace(s, person="all") for s in find(tmp_path / "videos")]
    done = go(samples, store, "crowd_toys:Mean")
    assert list(done) == ["a_person1", "a_person2", "b_person1", "b_person2", "torn"]
    assert all(o.complete for name, o in done.items() if name != "torn")
    assert "cannot be read as a video" in (done["torn"].problem or "")
    assert ["label.va" in o.tracks for o in done.values()] == [True, False, False, False, False]
    assert store.videos().keys() == {"a_person1", "a_person2", "b_person1", "b_person2"}
    assert sum(len(o.computed) for o in go(samples, store, "crowd_toys:Mean").values()) == 0


def test_another_way_to_find_people_is_another_track(toys, two_people, store, tmp_path):
    (tmp_path / "videos").mkdir()
    write_video(tmp_path / "videos" / "pair.mkv", pictures(12, 96, 160))
    go(find(tmp_path / "videos"), store, "crowd_toys:Mean")
    again = go(find(tmp_path / "videos"), store, "crowd_toys:Mean", people=People(every=3))
    assert again["pair"].computed == ["people", "faces", "mean"]


# ---- stopped on the way --------------------------------------------------------------------------------------


def test_what_was_done_is_known_though_the_run_was_stopped(toys, crops_only, store):
    outcomes: list[Outcome] = []

    def stop(outcome: Outcome) -> None:
        if len(outcomes) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        go(find(crops_only), store, "crowd_toys:Mean", then=stop, outcomes=outcomes)
    assert len(outcomes) == 2
    assert all(o.complete for o in outcomes)
    assert [p.name for p in (store.path / ".staging").iterdir()] == ["zarr.json"]  # no claim is left behind
    again = go(find(crops_only), store, "crowd_toys:Mean")
    assert all(o.complete for o in again.values())


def test_the_run_tells_its_bottleneck(toys, crops_only, store):
    told: list[str] = []
    toys.Mean.slow_s = 0.2
    go(find(crops_only), store, "crowd_toys:Mean", tell=told.append)
    assert len(told) == 1
    assert told[0].endswith("the bottleneck is encode")
    go(find(crops_only), store, "crowd_toys:Mean", tell=told.append)
    assert len(told) == 1  # there was nothing to do


# ---- on the command line -------------------------------------------------------------------------------------


def vacli(*words: object) -> Result:
    return CliRunner().invoke(main, [str(w) for w in words])


def test_shards_on_the_command_line_fill_one_store(toys, crops_only, tmp_path):
    place = tmp_path / "shards.zarr"
    for part, done in (("1/2", 4), ("2/2", 4)):
        told = vacli("extract", crops_only, "--store", place, "--encoder", "crowd_toys:Mean", "--shard", part)
        assert told.exit_code == 0, told.output
        assert f"computed {done} tracks" in told.stdout
        assert "the bottleneck is" in told.stdout
    assert len(Store(place).videos()) == 8
    told = vacli("extract", crops_only, "--store", place, "--encoder", "crowd_toys:Mean")
    assert "nothing to compute; 8 tracks of 8 videos" in told.stdout


@pytest.mark.parametrize("trouble", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_a_run_that_is_stopped_names_what_is_not_done(trouble, toys, crops_only, tmp_path, monkeypatch):
    place, done = tmp_path / "stopped.zarr", []
    link = Store.link

    def stop(self, name, *args):
        if len(done) == 3:
            with self.at.told("write the names"):
                raise trouble
        done.append(name)
        link(self, name, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "link", stop)
        told = vacli("extract", crops_only, "--store", place, "--encoder", "crowd_toys:Mean")
    assert told.exit_code == (130 if isinstance(trouble, KeyboardInterrupt) else 1)
    left = [f"p{n}" for n in range(8) if f"p{n}" not in done]
    assert f"3 of 8 videos are whole in {place}; not done: {', '.join(left)}" in told.stderr
    assert "Traceback" not in told.output
    assert vacli("extract", crops_only, "--store", place, "--encoder", "crowd_toys:Mean").exit_code == 0
    assert len(Store(place).videos()) == 8


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--shard", "3/2"], "--shard 3/2: wanted I/N"),
        (["--person", "nobody"], "no such person: 'nobody'; wanted main, left, right"),
        (["--detector", "none.onnx"], "none.onnx"),
        (["--workers", "2"], "--workers is for --engine ray"),
    ],
)
def test_mistakes_are_one_line(words, complaint, toys, crops_only, tmp_path):
    told = vacli(
        "extract", crops_only, "--store", tmp_path / "s.zarr", "--encoder", "crowd_toys:Mean", *words
    )
    assert told.exit_code == 1
    assert complaint in told.stderr
    assert "Traceback" not in told.output


# ---- one track that fails keeps the others -------------------------------------------------------------------


def test_a_bad_label_does_not_throw_away_what_was_encoded(toys, crops_only, store):
    bad = crops_only / "annotations" / "Train_Set" / "p0.txt"
    bad.parent.mkdir(parents=True)
    bad.write_text("valence,arousal\n" + "0.1,0.1\n" * 7 + "1.5,0\n" * 13)
    first = go(find(crops_only), store, "crowd_toys:Mean")["p0"]
    assert "1.5" in (first.problem or "")
    assert first.computed == ["mean"]
    toys.Mean.calls.clear()
    again = go(find(crops_only), store, "crowd_toys:Mean")["p0"]
    assert "1.5" in (again.problem or "")
    assert toys.Mean.calls == []
    bad.write_text("valence,arousal\n" + "0.1,0.1\n" * 20)
    assert go(find(crops_only), store, "crowd_toys:Mean")["p0"].computed == ["label.va"]


def test_crops_of_several_sizes_in_one_folder_keep_their_rows(toys, crops_only, store):
    folder = crops_only / "cropped_aligned" / "p0"
    for number in (2, 5, 6, 15):
        cv2.imwrite(str(folder / f"{number:05}.jpg"), np.full((50, 60, 3), 10 * number, np.uint8))
    done = go(find(crops_only), store, "crowd_toys:Mean")["p0"]
    assert done.problem is None
    wanted = done.tracks["mean"]
    values = store.get(wanted.recipe, wanted.media).values
    for number in (2, 5, 6, 15):
        np.testing.assert_allclose(values[number - 1], 10 * number, atol=1)
    assert np.isfinite(values[:, 0]).sum() == 18


def test_the_sound_of_two_people_in_one_video_is_heard_once(toys, store, tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    write_video(tmp_path / "data" / "7.mkv", pictures(5), sound=clicks(0.3, [0.1]))
    for side in ("left", "right"):
        folder = tmp_path / "data" / "cropped_aligned" / f"7_{side}"
        folder.mkdir(parents=True)
        cv2.imwrite(str(folder / "00001.jpg"), np.full((112, 112, 3), 90, np.uint8))
    heard: list[int] = []
    listen = toys.Ticks.__call__
    monkeypatch.setattr(toys.Ticks, "__call__", lambda *a: heard.append(1) or listen(*a))
    done = go(find(tmp_path / "data"), store, "crowd_toys:Ticks", "crowd_toys:Mean")
    assert all(o.complete for o in done.values())
    assert len(heard) == 2  # the canary, and once
    assert sum("ticks" in o.computed for o in done.values()) == 1
