"""What people call videos: every id is one safe path on every system, two texts stay two, any change is seen."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path, PurePosixPath, PureWindowsPath

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from vacli.store import Store, StoreError, folder_name
from vacli.store.names import check_facts, checked, folder_of, plain_id, record

MEDIA = "ab" * 32
TRACK = {"folder": folder_name({"track": "mae", "version": 1}), "media": MEDIA}
FACTS = {"root": "/data", "media": MEDIA, "split": "train", "tracks": {"mae": TRACK}}
PLAIN = (
    "video1", "a/b/c", "30-30-1920x1080_left", "P1 (take 2)", "été", "видео", "日本語/一", "a.b.c", "v=1,x&y", "100%",
    "#1",
)  # fmt: skip
INVISIBLE = "\u200b\u200d\u2060\ufeff\u00ad\u034f\u115f\u1160\u3164\u2800\ufe0f\U000e0101\u180b"
BIDI = "\u202e\u2066\u200f\u061c"
NOT_PLAIN = (
    "../../x", "a/../b", "a/./b", ".staging/x", "/etc/passwd", "", "a//b", "a/", "a\\b", "C:\\x", "a:b",
    "a\0b", "a\nb", "a\x1b[31mb", "a\x7fb", "CON", "com1.mp4", "con .txt", "CONIN$", "a/Nul/b",
    "COM\u00b9", "a.", "a ", " a", "a /b", "-rf", "~root", "a?", "*", "a|b", 'a"b', "a<b", "a／b", "．．/a",
    "․․/a", "ﬁlm", "e\u0301", "a\u2028b", "a\u00a0b", "a\u1680b", "a\udcffb", "a\ue000b", "x" * 300,
    "日" * 100, "/".join(["part"] * 200), *(f"a{c}b" for c in INVISIBLE + BIDI),
)  # fmt: skip
WINDOWS_DEVICES = {"CON", "PRN", "AUX", "NUL", "CONIN$", "CONOUT$"} | {
    f"{p}{n}" for p in ("COM", "LPT") for n in "0123456789"
}
NASTY = st.sampled_from(
    ["/", "..", ".", "\\", "CON", "nul.", " ", "-", "~", ":", "\n", "\u202e", "／", "\udcff", "x" * 99]
)
TEXTS = st.text() | st.lists(NASTY | st.text(max_size=3), max_size=8).map("".join)


@pytest.mark.parametrize("text", PLAIN)
def test_a_plain_id_stays_what_it_is(text):
    assert plain_id(text) == text


@pytest.mark.parametrize("text", NOT_PLAIN, ids=lambda text: f"{text!r:.30}")
def test_what_is_not_plain_is_mapped_and_refused_as_an_id(tmp_path, text):
    assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*-[0-9a-f]{8}", plain_id(text))
    store = Store(tmp_path / "s.zarr", create=True)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="is not plain; wanted one such as"):
        store.link(text, {"root": "/r", "media": MEDIA, "split": None}, {})
    store.unlink(text)  # knows nothing of it, and goes nowhere
    assert [p for p in sorted(tmp_path.rglob("*")) if p not in before and "videos" not in str(p)] == []
    assert store.videos() == {}


@given(TEXTS)
@example("a" * 600)
def test_a_mapped_id_is_plain_itself(text):
    assert plain_id(plain_id(text)) == plain_id(text)


@given(st.lists(TEXTS, min_size=2, max_size=2, unique=True))
@example(["a/b", "a_b"])
@example(["a／b", "a/b"])
@example(["e\u0301", "é"])
@example(["a\u200b", "a\ufeff"])
@example(["..", "../.."])
@example(["x" * 300, "x" * 301])
@example(["\udc80", "\udc81"])
def test_two_texts_stay_two_ids_in_two_folders(texts):
    one, other = map(plain_id, texts)
    assert one != other
    assert folder_of(one) != folder_of(other)


@given(TEXTS)
@example("CON/ aux.x/..")
def test_every_id_is_a_path_below_a_folder_on_every_system(text):
    made = plain_id(text)
    assert len(made.encode()) <= 600
    assert PurePosixPath("/top", made).parts[:2] == ("/", "top")
    assert not PureWindowsPath(made).anchor
    assert PureWindowsPath(made).parts == PurePosixPath(made).parts
    assert unicodedata.normalize("NFC", made) == made  # a Mac keeps it as it is
    for part in made.split("/"):
        assert part not in ("", ".", "..")
        assert part == part.strip(" ").rstrip(".")
        assert part.partition(".")[0].rstrip(" ").upper() not in WINDOWS_DEVICES
        assert not any(c in '<>:"|?*\\' or ord(c) < 32 for c in part)
        assert len(f"{part}.predictions.csv".encode()) < 255
        assert not set(part) & set(INVISIBLE + BIDI)


def test_every_id_can_be_made_as_a_file(tmp_path):
    paths = {plain_id(text): tmp_path / plain_id(text) for text in PLAIN + NOT_PLAIN}
    for made, path in paths.items():
        path = path.with_name(path.name + ".csv")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(made)
        assert path.resolve().is_relative_to(tmp_path.resolve())
    assert len(list(tmp_path.rglob("*.csv"))) == len(paths)


def test_what_is_written_of_an_id_is_read_again_and_any_change_of_it_is_seen():
    whole = record("v", FACTS)
    assert checked(folder_of("v"), whole) == ("v", FACTS)
    for change in (
        {"split": "trajn"}, {"root": "/dat1"}, {"media": "cd" * 32}, {"media": None}, {"tracks": {}}, {"id": "w"},
        {"more": 1}, {"digest": "0" * 64}, {"tracks": {"mad": TRACK}},
        {"tracks": {"mae": {**TRACK, "media": "cd" * 32}}},
    ):  # fmt: skip
        with pytest.raises(ValueError, match="has been changed"):
            checked(folder_of("v"), {**whole, **change})


@pytest.mark.parametrize(
    "change",
    [
        {"root": 1}, {"split": ["train"]}, {"media": "../../../../x"}, {"media": "AB" * 32}, {"media": MEDIA + "\n"},
        {"tracks": {"../x": TRACK}}, {"tracks": {"": TRACK}}, {"tracks": {"Mae": TRACK}}, {"tracks": {"m" * 65: TRACK}},
        {"tracks": {"a\x1b[31m": TRACK}}, {"tracks": {"mae": {**TRACK, "folder": "../" + TRACK["folder"]}}},
        {"tracks": {"mae": {**TRACK, "folder": ".staging"}}}, {"tracks": {"mae": {**TRACK, "media": "../" * 8}}},
        {"tracks": {"mae": {**TRACK, "media": MEDIA[:24]}}},
    ],
)  # fmt: skip
def test_names_that_lead_elsewhere_are_refused_from_the_caller_and_from_the_disk(tmp_path, change):
    facts = {**FACTS, **change}
    with pytest.raises(ValueError, match=r"must be|must match|points to"):
        check_facts(facts)
    with pytest.raises(ValueError, match=r"must be|must match|points to"):
        checked(folder_of("v"), record("v", facts))
    store = Store(tmp_path / "s.zarr", create=True)
    with pytest.raises(ValueError, match=r"must be|must match|points to"):
        store.link("v", {k: facts[k] for k in ("root", "media", "split")}, facts["tracks"])
    assert store.videos() == {}


def test_names_in_a_folder_that_is_not_their_own_are_refused(tmp_path):
    store = Store(tmp_path / "s.zarr", create=True)
    store.link("v", {"root": "/r", "media": MEDIA, "split": None}, {"mae": TRACK})
    videos = Path(store.path, "videos")
    (videos / folder_of("v")).rename(videos / folder_of("w"))
    with pytest.raises(StoreError, match="does not belong here"):
        store.videos()
