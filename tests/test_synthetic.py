"""The puppets: layout, determinism, resuming, and that the truth is shown where it is said to be."""

from __future__ import annotations

import json
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from vacli import VacliError
from vacli.extract import puppet, synthetic
from vacli.extract.synthetic import CHIMES_HZ, CUE_S, SHOWN, SOUND_RATE_HZ, latents, make_puppets

LENGTH_S, RATE_HZ = 5.0, 10.0
NAMES = ["puppet_train_00", "puppet_val_00"]


@pytest.fixture(scope="module")
def puppets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("puppets")
    make_puppets(root, train=1, validation=1, length_s=LENGTH_S, rate_hz=RATE_HZ, processes=1)
    return root


@pytest.fixture(scope="module")
def many() -> list[dict[str, np.ndarray]]:
    return [latents(0, "val", n, 60.0, 10.0) for n in range(60)]


def files(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def rows(root: Path, name: str) -> np.ndarray:
    (path,) = (root / "annotations").rglob(f"{name}.txt")
    assert path.read_text().splitlines()[0] == "valence,arousal"
    return np.loadtxt(path, delimiter=",", skiprows=1)


def decoded(path: Path) -> tuple[list[np.ndarray], np.ndarray]:
    """Its frames, and its sound placed by its own timestamps."""
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    with av.open(str(path)) as container:
        pieces = [(frame.pts, frame.to_ndarray()[0]) for frame in container.decode(audio=0)]
    sound = np.zeros(pieces[-1][0] + len(pieces[-1][1]), np.float32)
    for first, piece in pieces:
        sound[max(first, 0) : first + len(piece)] = piece[max(-first, 0) :]
    return frames, sound


def joined(truths: list[dict[str, np.ndarray]], name: str) -> np.ndarray:
    return np.concatenate([truth[name] for truth in truths])


def ccc(x: np.ndarray, y: np.ndarray) -> float:
    covariance = np.mean((x - x.mean()) * (y - y.mean()))
    return 2 * covariance / (x.var() + y.var() + (x.mean() - y.mean()) ** 2)


def test_the_layout_is_that_of_aff_wild2(puppets: Path) -> None:
    found = {name for name in files(puppets) if not name.endswith(".jpg")}
    task = "annotations/VA_Estimation_Challenge"
    assert found == {
        "puppets.json",
        f"{task}/Train_Set/puppet_train_00.txt",
        f"{task}/Validation_Set/puppet_val_00.txt",
        "batch1/puppet_train_00.mp4",
        "batch2/puppet_val_00.mp4",
        *(f"latents/{name}.npz" for name in NAMES),
    }


def test_frames_rows_and_sound_agree(puppets: Path) -> None:
    for name in NAMES:
        frames, sound = decoded(next(puppets.glob(f"batch*/{name}.mp4")))
        assert len(frames) == len(rows(puppets, name)) == LENGTH_S * RATE_HZ
        assert {frame.shape for frame in frames} == {(256, 256, 3)}
        assert abs(len(sound) / SOUND_RATE_HZ - LENGTH_S) < 0.1


def test_labels_are_in_range_or_minus_five(puppets: Path) -> None:
    for name in NAMES:
        truth = np.load(puppets / "latents" / f"{name}.npz")
        written = rows(puppets, name)
        assert (np.abs(written[truth["labelled"]]) <= 1).all()
        assert (written[~truth["labelled"]] == -5).all()
        assert np.allclose(written[truth["labelled"], 0], truth["valence"][truth["labelled"]], atol=1e-4)


def test_crops_are_the_frames_that_show_a_face(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def with_hidden_faces(*arguments: object) -> dict[str, np.ndarray]:
        truth = latents(*arguments)  # type: ignore[arg-type]
        truth["face"][:] = np.arange(len(truth["face"])) % 4
        return truth

    monkeypatch.setattr(synthetic, "latents", with_hidden_faces)
    make_puppets(tmp_path, train=1, validation=0, length_s=2.0)
    crops = sorted((tmp_path / "cropped_aligned/puppet_train_00").iterdir())
    assert [crop.name for crop in crops] == [f"{i + 1:05d}.jpg" for i in range(0, 20, 4)]
    assert cv2.imread(str(crops[0])).shape == (112, 112, 3)


def test_hidden_and_unlabelled_stretches_are_few_but_there(many: list[dict[str, np.ndarray]]) -> None:
    assert 0.03 < np.mean(joined(many, "face") != SHOWN) < 0.06
    assert set(joined(many, "face")) == {0, 1, 2, 3}
    assert 0.01 < np.mean(~joined(many, "labelled")) < 0.04


def test_no_visible_cue_is_hidden(many: list[dict[str, np.ndarray]]) -> None:
    for truth in many:
        for start_s in truth["cue_v_s"]:
            during = (truth["times_s"] >= start_s) & (truth["times_s"] < start_s + CUE_S)
            assert (truth["face"][during] == SHOWN).all()


def test_a_seed_gives_the_same_bytes(puppets: Path, tmp_path: Path) -> None:
    make_puppets(tmp_path, train=1, validation=1, length_s=LENGTH_S, rate_hz=RATE_HZ, processes=1)
    assert files(tmp_path) == files(puppets)


@pytest.mark.slow
def test_a_seed_gives_the_same_bytes_in_any_number_of_processes(puppets: Path, tmp_path: Path) -> None:
    names = make_puppets(tmp_path, train=1, validation=1, length_s=LENGTH_S, rate_hz=RATE_HZ, processes=2)
    assert names == NAMES
    assert files(tmp_path) == files(puppets)


def test_every_video_shows_another_person() -> None:
    people = [
        puppet.Person.draw(synthetic._rng(0, split, n, 2)) for split in ("train", "val") for n in range(20)
    ]
    assert len({tuple(person.skin) for person in people}) == len(people)


def test_what_is_whole_is_not_made_again_and_what_is_cut_is(puppets: Path, tmp_path: Path) -> None:
    arguments = {"validation": 1, "length_s": 2.0, "processes": 1}
    assert make_puppets(tmp_path, train=1, **arguments) == NAMES
    before = files(tmp_path)
    (tmp_path / "annotations/VA_Estimation_Challenge/Train_Set/puppet_train_00.txt").unlink()
    (tmp_path / ".partial/puppet_train_00/crops").mkdir(parents=True)
    heard: list[str] = []
    make_puppets(tmp_path, train=1, **arguments, on_video=heard.append)
    assert heard == ["puppet_train_00"]
    assert files(tmp_path) == before
    make_puppets(tmp_path, train=2, **arguments, on_video=heard.append)
    assert heard[1:] == ["puppet_train_01"]
    after = files(tmp_path)
    assert all(after[name] == before[name] for name in before if name != "puppets.json")


def test_other_arguments_over_a_folder_are_refused(puppets: Path, tmp_path: Path) -> None:
    before = files(puppets)
    with pytest.raises(VacliError, match="same arguments"):
        make_puppets(puppets, train=1, validation=1, length_s=LENGTH_S, rate_hz=RATE_HZ, seed=1)
    with pytest.raises(VacliError, match="same arguments"):
        make_puppets(puppets, train=0, validation=1, length_s=LENGTH_S, rate_hz=RATE_HZ)
    assert files(puppets) == before
    (tmp_path / "holiday.mp4").touch()
    with pytest.raises(VacliError, match="holds no puppets"):
        make_puppets(tmp_path)
    with pytest.raises(VacliError, match="is a file"):
        make_puppets(tmp_path / "holiday.mp4")
    assert json.loads((puppets / "puppets.json").read_text())["length_s"] == LENGTH_S


def test_a_reader_without_memory_gets_part_of_the_labels_and_one_with_it_all(
    many: list[dict[str, np.ndarray]],
) -> None:
    for label, weights in (("valence", synthetic.VALENCE), ("arousal", synthetic.AROUSAL)):
        truth = joined(many, label)
        parts = {name: weight * joined(many, name) for name, weight in weights.items()}
        now = sum(part for name, part in parts.items() if not name.startswith("mood"))
        assert ccc(sum(parts.values()), truth) > 0.99
        assert 0.55 < ccc(now, truth) < max(ccc(gain * now, truth) for gain in np.linspace(1, 2, 21)) < 0.73


def test_a_mood_holds_longer_than_a_tcn_sees(many: list[dict[str, np.ndarray]]) -> None:
    seen_s = (1 + 2 * (5 - 1) * (2**4 - 1)) / 10.0  # four levels of two width-5 convolutions at 10 Hz
    for truth in many:
        for kind in "va":
            assert 2.0 <= truth[f"cue_{kind}_s"][0] <= 8.0
            assert (np.diff(truth[f"cue_{kind}_s"]) > seen_s).all()
            before = truth["times_s"] < truth[f"cue_{kind}_s"][0]
            assert (truth[f"mood_{kind}"][before] == 0).all()
            last = truth["times_s"] > truth[f"cue_{kind}_s"][-1] + 0.5
            assert np.allclose(truth[f"mood_{kind}"][last], truth[f"cue_{kind}"][-1])


def test_chimes_sound_when_and_where_they_should(tmp_path: Path) -> None:
    make_puppets(tmp_path, train=2, validation=0, length_s=9.5, rate_hz=2.0, processes=1)
    for n in range(2):
        truth = np.load(tmp_path / "latents" / f"puppet_train_{n:02d}.npz")
        _, sound = decoded(tmp_path / "batch1" / f"puppet_train_{n:02d}.mp4")
        start_s, sign = truth["cue_a_s"][0], int(truth["cue_a"][0])
        for when_s, there in (
            (start_s + 0.05, True),
            (start_s - 0.6, False),
            (start_s + CUE_S + 0.05, False),
        ):
            first = round(when_s * SOUND_RATE_HZ)
            piece = sound[first : first + SOUND_RATE_HZ // 2]
            loud = np.abs(np.fft.rfft(piece * np.hanning(len(piece))))
            hz = np.fft.rfftfreq(len(piece), 1 / SOUND_RATE_HZ)
            for chime, tones_hz in CHIMES_HZ.items():
                level = min(loud[np.abs(hz - tone_hz) < 5].max() for tone_hz in tones_hz) / len(piece)
                assert (level > 0.02) == (there and chime == sign)


def test_cheeks_tell_the_cue() -> None:
    drawn = puppet.Puppet(puppet.Person.draw(np.random.default_rng(0)))
    plain, red, pale = (drawn.sprite(0, 0, 0, False, flush).astype(int) for flush in (0, 1, -1))
    row, column = (np.array([17, 35]) * puppet.DENSITY + puppet.ORIGIN[::-1]).astype(int)
    warmth = [image[row, column, 0] - image[row, column, 2] for image in (pale, plain, red)]
    assert warmth[0] < warmth[1] - 30 < warmth[2] - 60


def test_landmarks_do_not_move_with_the_expression() -> None:
    drawn = puppet.Puppet(puppet.Person.draw(np.random.default_rng(0)))
    glad, sad = (drawn.sprite(v, 0, 0.5, False, 0)[..., :3].astype(int) for v in (0.9, -0.9))
    assert np.abs(glad - sad).max() > 100  # it shows ...
    for x, y in drawn.landmarks()[[0, 1, 2]]:  # ... but not in the eyes or at the nose
        column, row = (np.array([x, y]) * puppet.DENSITY + puppet.ORIGIN).astype(int)
        assert np.array_equal(
            glad[row - 4 : row + 4, column - 4 : column + 4], sad[row - 4 : row + 4, column - 4 : column + 4]
        )


def test_a_video_that_ends_before_its_first_cue_is_made(tmp_path: Path) -> None:
    assert make_puppets(tmp_path / "short", train=1, validation=0, length_s=1, rate_hz=5, processes=1)
    assert len(rows(tmp_path / "short", "puppet_train_00")) == 5
