"""Stage one: rows are frames, what is stored is never made again, a broken video is one line and stops nobody."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from vacli import VacliError
from vacli.extract.datasets import find
from vacli.extract.encoder import make_encoders
from vacli.extract.finetune import initialise
from vacli.extract.logmel import LogMel
from vacli.extract.mae import Mae, build_vit
from vacli.extract.media import Video
from vacli.extract.run import Outcome, extract
from vacli.extract.synthetic import make_puppets
from vacli.extract.weights import EncoderError
from vacli.store import Store, Track

from .media_files import clicks, pictures, write_video

TOY = '''
"""Another's encoder."""
import numpy as np

class Brightness:
    name, eats, dim = "brightness", "crops", 1
    def __init__(self, scale="1"): self.scale = float(scale)
    def options(self): return {"scale": str(self.scale)}
    def recipe(self): return {"track": "brightness", "version": 1, "scale": self.scale}
    def __call__(self, crops): return self.scale * crops.mean(axis=(1, 2, 3), dtype="float32")[:, None] / 255

class Surprise(Brightness):
    def __call__(self, crops): raise RuntimeError("two lines\\nof surprise")

class NoOptions:
    name, eats = "no", "crops"
'''


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> Path:
    """Puppets in the Aff-Wild2 layout, tiny weights, and a module with another's encoder."""
    lab = tmp_path_factory.mktemp("lab")
    make_puppets(lab / "puppets", train=2, validation=1, length_s=3, rate_hz=5, processes=1)
    torch.manual_seed(0)
    for name in ("a", "b"):
        vit = build_vit("test_vit", 32)
        initialise(vit)
        about = json.dumps({"model": "test_vit", "size": 32})
        save_file(vit.state_dict(), lab / f"{name}.safetensors", metadata={"vacli": about})
    (lab / "toy_encoders.py").write_text(TOY)
    return lab


@pytest.fixture
def folder(lab, tmp_path) -> Path:
    """Two plain videos with a face and sound, the first with labels; the second at odd times."""
    folder = tmp_path / "videos"
    folder.mkdir()
    shutil.copy(lab / "puppets" / "batch1" / "puppet_train_00.mp4", folder / "face.mp4")
    labels = ["valence,arousal", "-5,-5", "0.25,-0.5", "0.5,-5", *["0.1,0.2"] * 7]
    (folder / "face.txt").write_text("\n".join(labels))
    write_video(folder / "odd.mkv", pictures(6), [0.0, 0.1, 0.15, 0.4, 0.41, 0.9], sound=clicks(1.0, [0.5]))
    return folder


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "features.zarr", create=True)


@pytest.fixture(autouse=True)
def _another_module(lab, monkeypatch):
    monkeypatch.syspath_prepend(lab)
    yield
    sys.modules.pop("toy_encoders", None)


def run(folder: Path, store: Store, *names: str, **options: dict[str, str]) -> dict[str, Outcome]:
    encoders = make_encoders(names, options, store.fingerprints)
    return {o.sample.id: o for o in extract(find(folder), encoders, store)}


def get(store: Store, outcome: Outcome, name: str) -> Track:
    return store.get(outcome.tracks[name].recipe, outcome.tracks[name].media)


def mae(lab: Path, which: str = "a", **more: str) -> dict[str, str]:
    return {"weights": str(lab / f"{which}.safetensors"), "dtype": "float32", **more}


def computed(outcomes: dict[str, Outcome]) -> dict[str, list[str]]:
    return {k: o.computed for k, o in outcomes.items()}


def forbid(monkeypatch, *methods: tuple[type, str]) -> None:
    for owner, name in methods:
        monkeypatch.setattr(owner, name, property(lambda _, name=name: pytest.fail(f"{name} was used")))


# ---- what a run gives ----------------------------------------------------------------------------------------


def test_a_row_is_a_decoded_frame_at_its_own_time(lab, folder, store):
    done = run(folder, store, "mae", "logmel", mae=mae(lab))
    for outcome in done.values():
        assert outcome.complete
        assert outcome.problem is None
        times_s = np.concatenate([t for _, t in Video(outcome.sample.video).frames()])
        for name in ("faces", "mae"):
            assert np.array_equal(get(store, outcome, name).times_s, times_s)
        assert get(store, outcome, "mae").values.shape == (len(times_s), 64)
        assert get(store, outcome, "mae").values.dtype == np.float16
        faces = get(store, outcome, "faces").valid
        assert np.array_equal(get(store, outcome, "mae").valid, faces)
    assert get(store, done["face"], "faces").valid.any()
    assert store.videos()["odd"]["tracks"].keys() == {"people", "faces", "mae", "logmel"}


def test_a_video_without_a_face_is_a_warning_and_rows_of_nan(lab, folder, store):
    for _ in range(2):
        odd = run(folder, store, "mae", mae=mae(lab))["odd"]
        assert odd.complete
        assert odd.problem is None
        assert odd.warning == f"{folder / 'odd.mkv'}: no face in any of its 6 frames"
        assert not get(store, odd, "mae").valid.any()


def test_labels_of_minus_five_and_missing_lines_are_rows_of_nan(folder, store):
    face = run(folder, store)["face"]
    labels = get(store, face, "label.va")
    assert np.array_equal(labels.times_s, get(store, face, "faces").times_s)
    assert labels.valid.tolist() == [False, True, False] + [True] * 7 + [False] * 5
    np.testing.assert_allclose(labels.values[1], [0.25, -0.5])
    (folder / "face.txt").write_text("valence,arousal\n0.5,0.5\n")
    again = run(folder, store)["face"]
    assert again.computed == ["label.va"]
    assert get(store, again, "label.va").valid.sum() == 1


def test_the_crops_of_a_data_set_are_used_and_their_holes_are_nan(lab, store, tmp_path):
    shutil.copytree(lab / "puppets", tmp_path / "data")
    for path in (tmp_path / "data").glob("cropped_aligned/*/0000[379].jpg"):
        path.unlink()
    done = run(tmp_path / "data", store, "mae", "logmel", mae=mae(lab))
    for outcome in done.values():
        assert outcome.tracks.keys() == {"mae", "logmel", "label.va"}  # the data set has its own faces
        assert outcome.problem is None
        crops = outcome.sample.crop_files()
        features = get(store, outcome, "mae")
        assert len(features) == 15
        assert 2 not in crops
        assert np.flatnonzero(features.valid).tolist() == sorted(crops)
    assert {o.sample.split for o in done.values()} == {"train", "validation"}


def test_crops_without_video_have_a_clock_and_no_sound(lab, store, tmp_path):
    shutil.copytree(lab / "puppets" / "cropped_aligned", tmp_path / "data" / "cropped_aligned")
    (tmp_path / "data" / "cropped_aligned" / "empty").mkdir()
    done = run(tmp_path / "data", store, "mae", "logmel", mae=mae(lab))
    one = done["puppet_train_00"]
    assert one.complete
    assert (one.problem or "").endswith("no video of that name beside the crops, so no sound for logmel")
    np.testing.assert_allclose(np.diff(get(store, one, "mae").times_s), 1 / 30)
    assert "no face in any of its 0 frames" in (done["empty"].warning or "")
    assert len(get(store, done["empty"], "mae")) == 0


def test_features_do_not_depend_on_what_else_is_asked_for(lab, folder, tmp_path):
    alone, both = (Store(tmp_path / name, create=True) for name in ("alone", "both"))
    one = run(folder, alone, "mae", mae=mae(lab))["face"]
    two = run(folder, both, "logmel", "other=mae", "mae", mae=mae(lab), other=mae(lab, "b"))["face"]
    assert np.array_equal(get(alone, one, "mae").values, get(both, two, "mae").values, equal_nan=True)
    assert not np.array_equal(get(both, two, "other").values, get(both, two, "mae").values, equal_nan=True)


# ---- what is stored is not made again ------------------------------------------------------------------------


def test_a_second_run_decodes_nothing_builds_no_model_and_computes_nothing(lab, folder, store, monkeypatch):
    first = run(folder, store, "mae", "logmel", mae=mae(lab))
    assert computed(first)["face"] == ["people", "faces", "mae", "logmel", "label.va"]
    forbid(monkeypatch, (Video, "frames"), (Video, "sound"), (Video, "times"), (Mae, "_network"))
    second = run(folder, Store(store.path), "mae", "logmel", mae=mae(lab))
    assert computed(second) == {"face": [], "odd": []}
    assert all(o.complete and o.problem is None for o in second.values())


def test_another_option_makes_that_track_alone(lab, folder, store, monkeypatch):
    run(folder, store, "mae", "logmel", mae=mae(lab))
    forbid(monkeypatch, (Video, "sound"))
    again = run(folder, store, "mae", "logmel", mae=mae(lab, "b"))
    assert computed(again) == {"face": ["mae"], "odd": ["mae"]}
    assert computed(run(folder, store, "mae", "logmel", mae=mae(lab))) == {
        "face": [],
        "odd": [],
    }  # both are kept


def test_a_changed_video_of_the_same_name_is_made_anew(lab, folder, store):
    run(folder, store, "mae", mae=mae(lab))
    shutil.copy(lab / "puppets" / "batch1" / "puppet_train_01.mp4", folder / "face.mp4")
    again = run(folder, store, "mae", mae=mae(lab))
    assert computed(again) == {"face": ["people", "faces", "mae", "label.va"], "odd": []}
    assert store.videos()["face"]["tracks"]["mae"]["media"] == again["face"].tracks["mae"].media


def test_a_renamed_video_is_not_made_anew_and_its_old_name_is_not_told(folder, store):
    write_video(folder / "still.mp4", pictures(6))
    run(folder, store, "logmel")
    (folder / "still.mp4").rename(folder / "quiet.mp4")
    quiet = run(folder, store, "logmel")["quiet"]
    assert quiet.computed == []
    assert quiet.problem == f"{folder / 'quiet.mp4'}: it has no sound, and nothing else of it is read"
    assert "still" not in (quiet.warning or "")


KILLED = """
import os, signal, sys
from pathlib import Path
from vacli.extract.datasets import find
from vacli.extract.encoder import make_encoders
from vacli.extract.run import extract
from vacli.store import Store
import toy_encoders, vacli.extract.crops, vacli.extract.pipeline
folder, path, where = sys.argv[1:]
die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
store, calls = Store(path, create=True), []
def counted(at, then, counts=lambda *_: True):
    def call(*args):
        calls.append(counts(*args))
        if calls.count(True) == at: die()
        return then(*args)
    return call
if where == "encoding":  # the canary, and then some
    vacli.extract.crops.BATCH = vacli.extract.pipeline.BATCH = 8
    toy_encoders.Brightness.__call__ = counted(3, toy_encoders.Brightness.__call__)
if where == "writing":  # when the seventh track is about to become an entry
    os.rename = counted(7, os.rename, lambda old, new: "@" in str(new) and not str(new).endswith("zarr.json"))
extract(find(folder), make_encoders(["logmel", "toy_encoders:Brightness"], {}, store.fingerprints), store)
"""


def content(store: Path) -> dict[str, bytes]:
    return {str(p.relative_to(store)): p.read_bytes() for p in store.glob("*@*/**/*") if p.is_file()}


def tracks_of(store: Store) -> list[str]:
    """The entries that are tracks of videos, not canaries."""
    return [name for name in store.entries() if "canary" not in store.record(name)["provenance"]]


@pytest.mark.parametrize("where", ["encoding", "writing"])
def test_after_a_kill_the_next_run_goes_on_and_ends_in_the_same_bytes(where, lab, folder, tmp_path):
    shutil.copy(lab / "puppets" / "batch1" / "puppet_train_01.mp4", folder / "other.mp4")
    for p in folder.iterdir():
        os.utime(p, (1e9, 1e9))
    names = ("logmel", "toy_encoders:Brightness")
    whole = Store(tmp_path / "whole.zarr", create=True)
    run(folder, whole, *names)
    cut = tmp_path / "cut.zarr"
    words = [sys.executable, "-c", KILLED, str(folder), str(cut), where]
    died = subprocess.run(words, env={**os.environ, "PYTHONPATH": str(lab)}, capture_output=True, text=True)
    assert died.returncode == -signal.SIGKILL, died.stderr
    before = content(cut)
    entries = {cut / name: (cut / name).stat().st_mtime_ns for name in Store(cut).entries()}
    there = len(tracks_of(Store(cut)))
    assert 0 < there < len(tracks_of(whole))
    done = run(folder, Store(cut, create=True), *names)
    assert sum(len(o.computed) for o in done.values()) == len(tracks_of(whole)) - there
    assert all(p.stat().st_mtime_ns == then for p, then in entries.items())
    assert [what for *_, what in Store(cut).verify() if what] == []
    after = content(cut)
    assert before.items() <= after.items()
    assert after == content(whole.path)
    assert Store(cut).videos() == whole.videos()


# ---- what goes wrong -----------------------------------------------------------------------------------------


def test_each_broken_video_is_one_line_and_the_others_are_complete(lab, folder, store):
    (folder / "text.mp4").write_text("not a film\n" * 99)
    whole = write_video(folder / "whole.mkv", pictures(60), sound=clicks(2.4, [0.1]))
    (folder / "torn.mkv").write_bytes(whole.read_bytes()[: whole.stat().st_size * 3 // 4])
    (folder / "cut.mp4").write_bytes((folder / "face.mp4").read_bytes()[:5000])
    write_video(folder / "blind.mkv", sound=clicks(0.4, [0.1]))
    write_video(folder / "silent.mp4", pictures(5))
    done = run(folder, store, "mae", "logmel", mae=mae(lab))
    problems = {name: o.problem for name, o in done.items() if o.problem}
    assert problems.keys() == {"text", "torn", "cut", "blind", "silent"}
    for name, problem in problems.items():
        assert "\n" not in problem
        assert "Traceback" not in problem
        assert str(done[name].sample.video) in problem
    assert "cannot be read as a video" in problems["text"]
    assert "cannot be read as a video" in problems["cut"]
    assert "no pictures, only sound" in problems["blind"]
    assert {name for name, o in done.items() if not o.complete} == {"text", "cut", "blind"}
    assert len(get(store, done["silent"], "logmel")) == 0
    assert 0 < len(get(store, done["torn"], "mae")) < 60
    for part in ("pictures: cut off after", "sound: cut off after", "what could be read is kept"):
        assert problems["torn"].count(part) == 1
    again = run(folder, store, "mae", "logmel", mae=mae(lab))
    for name, problem in problems.items():
        known = (
            ""
            if again[name].complete
            else f" (known from an earlier run; `vacli store rm {name}` to try again)"
        )
        assert again[name].problem == problem + known
    assert {name for name, o in again.items() if o.problem} == problems.keys()
    assert all(o.computed == [] for o in again.values())


def test_a_cut_video_is_a_problem_where_the_data_set_brings_the_crops_too(lab, store, tmp_path):
    shutil.copytree(lab / "puppets" / "cropped_aligned", tmp_path / "data" / "cropped_aligned")
    video = write_video(tmp_path / "data" / "puppet_train_00.mkv", pictures(60))
    video.write_bytes(video.read_bytes()[: video.stat().st_size * 3 // 4])
    for _ in range(2):
        problem = run(tmp_path / "data", store, "mae", mae=mae(lab))["puppet_train_00"].problem
        assert (problem or "").startswith(f"{video}: pictures: cut off after")


def test_bad_labels_are_a_problem_of_that_video_alone(folder, store):
    (folder / "face.txt").write_text("valence,arousal\n0.1,0.2\n0.3,7\n")
    done = run(folder, store, "logmel")
    assert "line 3" in (done["face"].problem or "")
    assert done["odd"].complete


def test_an_encoders_own_surprise_is_one_line(folder, store):
    done = run(folder, store, "toy_encoders:Surprise")
    for name, path in (("face", "face.mp4"), ("odd", "odd.mkv")):
        assert done[name].problem == f"{folder / path}: RuntimeError: two lines of surprise"
    assert store.entries() == []


def test_weights_that_do_not_fit_stop_the_run_at_once(lab, folder, store):
    options = mae(lab, model="vit_tiny_patch16_224")
    with pytest.raises(EncoderError, match="do not fit the encoder"):
        run(folder, store, "mae", mae=options)


# ---- encoders by name ----------------------------------------------------------------------------------------


def test_two_names_for_one_encoder_are_two_tracks(lab, folder, store):
    done = run(folder, store, "mae", "mae-tuned=mae", **{"mae": mae(lab), "mae-tuned": mae(lab, "b")})
    assert done["face"].computed == ["people", "faces", "mae", "mae-tuned", "label.va"]
    linked = store.videos()["face"]["tracks"]
    assert linked["mae"]["folder"] != linked["mae-tuned"]["folder"]
    assert linked["mae-tuned"]["encoder"]["kind"] == "mae"


def test_anothers_encoder_is_made_by_its_path_and_again_by_what_the_store_says_of_it(folder, store):
    done = run(folder, store, "toy_encoders:Brightness", "dim=toy_encoders:Brightness", dim={"scale": "0.5"})
    bright, dim = (get(store, done["face"], name) for name in ("brightness", "dim"))
    np.testing.assert_allclose(dim.values, bright.values / 2, rtol=1e-3)
    said = store.videos()["face"]["tracks"]["dim"]["encoder"]
    assert said == {"kind": "toy_encoders:Brightness", "options": {"scale": "0.5"}}
    again = make_encoders([f"dim={said['kind']}"], {"dim": said["options"]}, store.fingerprints)
    assert again["dim"].recipe()["scale"] == 0.5
    assert make_encoders(["toy_encoders:Brightness"], {"brightness": {"scale": "3"}}, store.fingerprints)


@pytest.mark.parametrize(
    ("names", "options", "complaint"),
    [
        (
            ["mea"],
            {},
            "unknown encoder 'mea'; known: hf-audio, iresnet, logmel, mae, timm, vggish; or your own as",
        ),
        (["x="], {}, "unknown encoder ''; known: hf-audio"),
        (["toy_encoders:None"], {}, "encoder 'toy_encoders:None' cannot be imported"),
        (["os:path"], {}, "os:path is no encoder; wanted a class with name, eats"),
        (["toy_encoders:NoOptions"], {}, "toy_encoders:NoOptions is no encoder"),
        (
            ["mae"],
            {"mae": {"weight": "x"}},
            "encoder mae has no option weight; its options: model, weights, dtype",
        ),
        (["mae"], {"mae": {"fingerprints": "x"}}, "encoder mae has no option fingerprints"),
        (["logmel"], {"logmel": {"bands": "9"}}, "encoder logmel has no option bands; its options: none"),
        (["logmel"], {"mae": {}}, "-o names mae, but the encoders are logmel"),
        (["logmel", "logmel"], {}, "the name 'logmel' is taken; wanted another one: NAME=logmel"),
        (["faces=logmel"], {}, "the name 'faces' is taken"),
        (["=logmel"], {}, "cannot be called ''"),
    ],
)
def test_unknown_encoders_and_options_are_told_with_the_known_ones(names, options, complaint, store):
    with pytest.raises(VacliError) as caught:
        make_encoders(names, options, store.fingerprints)
    assert complaint in str(caught.value)


def test_every_encoder_of_the_table_keeps_the_contract(lab, store):
    made = make_encoders(["mae", "logmel"], {"mae": mae(lab)}, store.fingerprints)
    assert isinstance(made["logmel"], LogMel)
    for name, encoder in made.items():
        [again] = make_encoders([name], {name: encoder.options()}, store.fingerprints).values()
        assert again.recipe() == encoder.recipe()
        assert encoder.recipe()["track"] == encoder.name == name
        assert encoder.eats in ("crops", "sound")
