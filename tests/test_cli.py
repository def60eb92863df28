"""The commands as a user types them: the three lines on both layouts, and every bad input told in one line."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import save_file
from vacli.extract import ENCODERS
from vacli.extract.mae import build_vit
from vacli.store.curves import HEADER

from .commands import vacli
from .media_files import clicks, pictures, write_video


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


def test_the_three_lines_on_the_aff_wild2_layout(at):
    told = vacli("extract", "data", "-o", "mae.weights=vit.safetensors").output
    assert "nothing to compute; 9 tracks of 3 videos were in features.zarr already" in told
    assert "note: mae: made up for a test" in told
    vacli("train", "--head", "linear", "--set", "train.epochs=1")
    assert "1 of 1 curves" in vacli("predict", "--video", "data/batch2").output
    curve = rows(at / "predictions" / "puppet_val_00.csv")
    assert list(curve[0]) == list(HEADER)
    assert {(r["person"], r["valence_std"], r["arousal_std"]) for r in curve} == {("main", "", "")}
    assert [int(r["frame"]) for r in curve] == list(range(1, 16))
    np.testing.assert_allclose([float(r["time_s"]) for r in curve], np.arange(15) / 5, atol=1e-5)
    assert all(-1 <= float(r[k]) <= 1 for r in curve for k in ("valence", "arousal"))


def test_the_three_lines_on_a_plain_folder_of_labelled_videos(at):
    plain = at / "plain"
    for number in range(3):
        video = write_video(plain_path(plain, number), pictures(12, 96, 96), sound=clicks(0.48, [0.1]))
        labels = np.linspace(-0.5, 0.5, 12)
        text = "valence,arousal\n" + "".join(f"{v:.3f},{-v:.3f}\n" for v in labels)
        video.with_suffix(".txt").write_text(text)
    store = ("--store", "plain.zarr")
    vacli("extract", plain, *store, "-o", "mae.weights=vit.safetensors")
    told = vacli("train", "--head", "linear", *store, "--set", "train.epochs=2").output
    assert "no validation set: held out 1 of 3" in told
    vacli("predict", "--video", plain, *store)
    assert len(rows(at / "predictions" / "day0" / "clip0.csv")) == 12


def plain_path(plain: Path, number: int) -> Path:
    (plain / f"day{number}").mkdir(parents=True)
    return plain / f"day{number}" / f"clip{number}.mp4"


def test_evaluate_gives_the_figures_of_the_run_every_time(at):
    told = vacli("evaluate").output
    assert told == vacli("evaluate", "--run", "mamba").output
    run = json.loads(next((at / "runs").glob("*/run.json")).read_text())
    assert f"mean {run['figures']['mean']:.4f}" in told


def test_folds_are_trained_told_and_averaged(at):
    how = ("--head", "linear", "--set", "train.epochs=1", "--folds", "3", "--name", "three")
    told = vacli("train", *how, "--fold", "1").output
    assert told.count("not trained yet") == 2
    assert "not finished" in vacli("predict", "--video", "data/batch2", "--run", "three", fails=True).output
    told = vacli("train", *how).output
    table = [line.split()[0] for line in told[told.index("fold     CCC V") :].splitlines()]
    assert table[:7] == ["fold", "0", "1", "2", "mean", "std", "out"]
    assert vacli("evaluate", "--run", "three").output in told
    assert len(json.loads(vacli("evaluate", "--run", "three", "--json").output)["folds"]) == 3
    assert "fold-0" in vacli("evaluate", "--run", "three", "--no-smooth", fails=True).output
    vacli("predict", "--video", "data/batch2", "--run", "three")
    averaged = rows(at / "predictions" / "puppet_val_00.csv")
    assert list(averaged[0])[-2:] == ["valence_std", "arousal_std"]
    each = []
    for k in range(3):
        vacli("predict", "--video", "data/batch2", "--run", f"runs/three/fold-{k}", "--out", f"fold{k}")
        each.append([float(r["arousal"]) for r in rows(at / f"fold{k}" / "puppet_val_00.csv")])
    np.testing.assert_allclose([float(r["arousal"]) for r in averaged], np.mean(each, axis=0), atol=2e-6)
    np.testing.assert_allclose([float(r["arousal_std"]) for r in averaged], np.std(each, axis=0), atol=2e-6)


def test_a_sweep_tries_settings_and_goes_on(at):
    how = ("sweep", "--head", "linear", "--set", "train.epochs=1", "--over", "train.lr=1e-3..1e-1:log")
    told = vacli(*how, "--trials", "2", "--name", "search").output
    assert "vacli train --head linear" in told
    assert {p.name for p in (at / "runs" / "search").glob("trial-*")} == {"trial-000", "trial-001"}
    vacli(*how, "--trials", "3", "--name", "search")
    assert (at / "runs" / "search" / "trial-002" / "run.json").exists()


def test_a_network_with_a_trainable_vgg_goes_the_whole_way(at):
    tiny = "encode.logmel.vgg.width=0.01"
    changes = ["--set", tiny, "--set", "train.epochs=1", "--set", "train.alone_epochs=1"]
    vacli("train", "--head", "crossattn", "--stream", "mae", "--stream", "logmel", *changes)
    vacli("evaluate", "--run", "crossattn")
    assert "1 of 1 curves" in vacli("predict", "--video", "data/batch2", "--run", "crossattn").output
    assert len(rows(at / "predictions" / "puppet_val_00.csv")) == 15


def test_an_evaluation_for_programs_has_the_same_figures(at):
    report = json.loads(vacli("evaluate", "--json").output)
    run = json.loads(next((at / "runs").glob("*/run.json")).read_text())
    assert report["figures"]["mean"] == pytest.approx(run["figures"]["mean"], abs=1e-6)
    assert {"constant", "linear"} <= {name.removeprefix("baseline ") for name in report["systems"]}


def test_a_second_prediction_extracts_nothing_and_is_the_same(at):
    vacli("predict", "--video", "data/batch2")
    first = (at / "predictions" / "puppet_val_00.csv").read_bytes()
    told = vacli("predict", "--video", "data/batch2").output
    assert "nothing to compute" in told
    assert (at / "predictions" / "puppet_val_00.csv").read_bytes() == first


def test_a_damaged_track_costs_one_curve_and_the_next_run_has_it(at):
    (at / "clips").mkdir()
    for number in range(2):
        write_video(at / f"clips/c{number}.mp4", pictures(6, 96, 96), sound=clicks(0.24, [0.1]))
    vacli("predict", "--video", "clips")
    shutil.rmtree(at / "predictions")
    chunk = sorted((at / "features.zarr").glob("faces@*/*/values/c.0.0"))[0]
    chunk.write_bytes(bytes([chunk.read_bytes()[0] ^ 1]) + chunk.read_bytes()[1:])
    told = vacli("predict", "--video", "clips", fails=True).output
    assert "1 of 2 curves" in told
    assert "damaged track faces@" in told
    assert "2 of 2 curves" in vacli("predict", "--video", "clips").output


def test_the_licence_of_aff_wild2_is_told_where_its_layout_is_met(at):
    words = ["extract", "data", "-o", "mae.weights=vit.safetensors"]
    assert "forbids sharing" not in vacli(*words).output  # these are puppets
    (at / "data" / "puppets.json").unlink()
    assert "its licence forbids sharing features derived from it" in vacli(*words).output


def test_a_bad_annotation_does_not_keep_a_curve_from_being_drawn(at):
    label = next((at / "data").glob("annotations/*/*/puppet_val_00.txt"))
    label.write_text("valence,arousal\n7,7\n")
    assert (
        "lies outside [-1, 1]"
        in vacli("extract", "data", "-o", "mae.weights=vit.safetensors", fails=True).output
    )
    told = vacli("predict", "--video", "data").output
    assert "3 of 3 curves" in told


def test_the_store_lists_and_verifies(at):
    line = next(x for x in vacli("store", "ls").output.splitlines() if x.startswith("puppet_val_00"))
    assert line.split() == ["puppet_val_00", "validation", "15", "299", "15"]
    assert "11 tracks read" in vacli("store", "verify").output  # nine, and a canary of each encoder
    chunk = next((at / "features.zarr").glob("mae@*/*/values/c.0.0"))
    chunk.write_bytes(bytes(64) + chunk.read_bytes()[64:])
    told = vacli("store", "verify", fails=True).output
    assert "damaged track mae@" in told
    assert "1 damaged" in told


def test_a_damaged_track_is_made_again_and_the_others_are_not(at):
    chunk = next((at / "features.zarr").glob("logmel@*/*/values/c.0.0"))
    chunk.write_bytes(chunk.read_bytes()[:-9])
    told = vacli("extract", "data", "-o", "mae.weights=vit.safetensors").output
    assert "computed 1 tracks; 8 tracks" in told


def test_heads_and_encoders_are_listed():
    assert {"linear", "mamba"} <= {line.split()[0] for line in vacli("heads").output.splitlines()}
    assert vacli("heads", "mamba").output.startswith("#")
    assert {
        line.split()[0] for line in vacli("encoders").output.splitlines() if line and line[0] != " "
    } >= set(ENCODERS)


# ---- bad input -----------------------------------------------------------------------------------------------


def bad_media(folder: Path) -> Path:
    """One good video, and one of each kind that is not."""
    folder.mkdir()
    good = write_video(folder / "good.mp4", pictures(10, 96, 96), sound=clicks(0.4, [0.1]))
    (folder / "text.mp4").write_text("I am a text file\n" * 100)
    (folder / "cut.mp4").write_bytes(good.read_bytes()[: good.stat().st_size // 2])
    write_video(folder / "silent.mp4", pictures(10, 96, 96))
    write_video(folder / "blind.mkv", sound=clicks(0.4, [0.1]))
    write_video(folder / "whole.mkv", pictures(60, 96, 96), sound=clicks(2.4, [0.1]))
    whole = (folder / "whole.mkv").read_bytes()
    (folder / "torn.mkv").write_bytes(whole[: len(whole) * 3 // 4])
    return folder


def test_broken_videos_are_listed_and_the_others_go_on(at):
    folder = bad_media(at / "bad")
    told = vacli("predict", "--video", folder, fails=True).output
    listed = told[told.index("videos had a problem") :]
    for name, complaint in (
        ("text", "cannot be read as a video"),
        ("cut", "cannot be read as a video"),
        ("blind", "no pictures"),
        ("torn", "cut off after"),
    ):
        [line] = [line for line in listed.splitlines() if line.split()[:1] == [name]]
        assert complaint in line
    assert not {"good", "whole", "silent"} & {line.split()[0] for line in listed.splitlines()}
    assert re.search(r"warning: .*silent\.mp4: .*it has no sound; its curve rests on the picture alone", told)
    written = {p.stem: len(rows(p)) for p in (at / "predictions").glob("*.csv")}
    torn = written.pop("torn")
    assert 1 <= torn < 60
    assert written == {"good": 10, "silent": 10, "whole": 60}
    again = vacli("predict", "--video", folder, fails=True).output
    again = again[again.index("videos had a problem") :]
    for line, later in zip(listed.splitlines(), again.splitlines(), strict=True):
        name = line.split()[0]
        known = f" (known from an earlier run; `vacli store rm {name}` to try again)"
        assert later == line + (known if name in ("blind", "cut", "text") else "")


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["extract", "nowhere"], "no such file or folder: nowhere; wanted a video or a folder of videos"),
        (["extract", "empty"], "no videos below empty; wanted files ending in .3g2"),
        (
            ["extract", "data", "--encoder", "mea"],
            "unknown encoder 'mea'; known: hf-audio, iresnet, logmel, mae, timm, vggish",
        ),
        (
            ["extract", "data", "-o", "mae.weight=x"],
            "encoder mae has no option weight; its options: model, weights",
        ),
        (["extract", "data", "-o", "weights=x"], "wanted NAME.KEY=VALUE"),
        (["extract", "data", "-o", "mae.weights=none.pth"], "no weights at"),
        (["extract", "data"], "no weights for vit_large_patch16_224.mae and no network: get them from https"),
        (
            ["extract", "data", "-o", "mae.weights=vit.safetensors", "-o", "mae.model=vit_tiny_patch16_224"],
            "do not fit the encoder",
        ),
        (["extract", "data", "--store", "empty.txt"], "is not a vacli store"),
        (["extract", "data", "--store", "foreign"], "is not a vacli store"),
        (["train", "--head", "mambo"], "unknown head 'mambo'; known: crossattn, crossattn-light"),
        (["train", "--fold", "9"], "--fold 9: with 6 folds there are the folds 0 to 5"),
        (["train", "--folds", "2"], "2 folds: wanted at least 3"),
        (["train", "--folds", "0"], "0 folds: wanted at least 3"),
        (["train", "--subjects", "empty.txt"], "--subjects is for --folds"),
        (["train", "--folds", "3", "--subjects", "none.csv"], "none.csv"),
        (["train", "--set", "train.init_from=none"], "none"),
        (["train", "--set", "train.precision=float16"], "float16 wants a GPU"),
        (["train", "--set", "cross_attn.heads=5", "--head", "crossattn-light"], "5 heads do not divide 64"),
        (["sweep", "--over", "train.lrr=1..2"], "unknown key train.lrr"),
        (["sweep", "--over", "train.lr"], "wanted KEY=LOW..HIGH"),
        (["train", "--store", "none.zarr"], "no feature store at none.zarr: make one with `vacli extract"),
        (["train", "--set", "train.epoch=3"], "unknown key train.epoch; known there: epochs"),
        (["train", "--set", "train.epochs"], "wanted KEY=VALUE"),
        (["train", "--stream", "vggish"], "no labelled video of features.zarr has a track vggish"),
        (["evaluate", "--run", "none"], "no run none in runs"),
        (["evaluate", "--store", "none.zarr"], "no feature store at none.zarr"),
        (["predict", "--video", "nowhere"], "no such file or folder: nowhere"),
        (["predict", "--video", "data", "--runs", "empty"], "no finished run in empty"),
        (["finetune", "empty"], "no videos below empty"),
        (["heads", "mambo"], "unknown head 'mambo'"),
        (["store", "ls", "--store", "none.zarr"], "no feature store at none.zarr"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_a_users_mistake_is_one_line_and_loses_nothing(at, words, complaint):
    (at / "empty").mkdir()
    (at / "empty.txt").write_text("")
    (at / "foreign").mkdir()
    (at / "foreign" / "thesis.doc").write_text("mine")
    before = {p: p.read_bytes() for p in at.rglob("*") if p.is_file()}
    told = vacli(*words, fails=True).output
    errors = [line for line in told.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1
    assert complaint in errors[0]
    # digests of media that were worked out before the mistake was met may be remembered
    assert all(p.read_bytes() == b for p, b in before.items() if p.parent.name != "fingerprints")


def test_a_run_refuses_features_of_other_weights(at, lab):
    about = {"model": "test_vit", "size": 64}
    save_file(
        build_vit("test_vit", 64).state_dict(),
        at / "other.safetensors",
        metadata={"vacli": json.dumps(about)},
    )
    words = ["-o", "mae.weights=other.safetensors"]
    told = vacli("predict", "--video", "data/batch2", *words, fails=True).output
    assert "was trained on another mae: weights_sha256" in told


def test_two_recipes_of_one_stream_never_mix(at):
    words = ["--store", "mix.zarr", "-o", "mae.weights=vit.safetensors"]
    vacli("extract", "data", *words)
    for path in at.glob("data/*/**/puppet_val_00*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    vacli("extract", "data", *words, "-o", "mae.dtype=bfloat16")
    told = vacli("train", "--head", "linear", "--store", "mix.zarr", fails=True).output
    assert "made in 2 different ways, which never mix" in told
    [choice, _] = [word for word in told.split() if word.startswith("mae@")]
    quick = ["--head", "linear", "--set", "train.epochs=1"]
    told = vacli("train", "--store", "mix.zarr", *quick, "--stream", choice).output
    assert "left out" in told
