"""Whatever is done to a store in whatever order, by two at once, killed and corrupted: it says what a dict would."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable
from gc import collect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from vacli import VacliError
from vacli.store import Store, StoreError, Track, digest, folder_name, keeper

from .fault_layer import Layer, through

FACES = {"track": "faces", "version": 1}
RECIPES = {
    "faces": FACES,
    "mae": {"track": "mae", "version": 1, "made_from": digest(FACES)},
    "mae-2": {"track": "mae", "version": 2},
}
MEDIA = ("a0" * 32, "b1" * 32)
KEYS = [(recipe, media) for recipe in RECIPES for media in MEDIA]

actors, keys, seeds, videos = (
    st.integers(0, 1),
    st.sampled_from(KEYS),
    st.integers(0, 3),
    st.sampled_from(["v1", "a/v2"]),
)
Key = tuple[str, str]


class Killed(BaseException):
    """The process is gone: nothing is cleaned up."""


class Killing(Layer):
    """From the n-th mutating call on none reaches the disk."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self._n = n

    def call(self, name: str, real: Callable[..., Any], *args: Any) -> Any:
        if len(self.calls) >= self._n:
            raise Killed
        return real(*args)


def made(seed: int) -> Track:
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(seed * 3, 2)).astype(np.float16)
    values[:1] = np.nan
    return Track(values, np.arange(seed * 3) / 25)


def same(a: Track, b: Track) -> bool:
    return a.values.tobytes() == b.values.tobytes() and a.times_s.tobytes() == b.times_s.tobytes()


def address(key: Key) -> dict[str, Any]:
    return {"folder": folder_name(RECIPES[key[0]]), "media": key[1]}


def name_of(key: Key) -> str:
    return f"{folder_name(RECIPES[key[0]])}/{key[1][:24]}"


class Model(RuleBasedStateMachine):
    """kept: key -> the seed of its track, or the reason of its tombstone. rotten: key -> what of it was corrupted.

    names: id -> facts. Two actors have the store open, each with what it remembers.
    """

    def __init__(self) -> None:
        super().__init__()
        self.top = Path(tempfile.mkdtemp(prefix="vacli-model-"))
        self.layer = contextlib.ExitStack()
        self.layer.enter_context(through(Layer()))  # no test waits for the disk
        self.kept: dict[Key, int | str] = {}
        self.rotten: dict[Key, str] = {}
        self.names: dict[str, dict[str, Any]] = {}

    @initialize()
    def two_open_it(self) -> None:
        self.stores = [Store(self.top / "s.zarr", create=True), Store(self.top / "s.zarr", create=True)]

    def teardown(self) -> None:
        self.stores = []
        self.layer.close()
        shutil.rmtree(self.top)

    # ---- tracks --------------------------------------------------------------------------------------------

    def _gone_if_rotten(self, key: Key) -> None:
        """What is broken is absent once somebody has met it."""
        if self.rotten.pop(key, None):
            del self.kept[key]

    @rule(actor=actors, key=keys, seed=seeds)
    def put(self, actor: int, key: Key, seed: int) -> None:
        self.stores[actor].put(RECIPES[key[0]], key[1], made(seed))
        self._put(key, seed)

    def _put(self, key: Key, seed: int) -> None:
        self._gone_if_rotten(key)
        if not isinstance(self.kept.get(key), int):  # the first complete one stays, a tombstone does not
            self.kept[key] = seed

    @rule(actor=actors, key=keys, reason=st.text(max_size=5))
    def fail(self, actor: int, key: Key, reason: str) -> None:
        self.stores[actor].fail(RECIPES[key[0]], key[1], reason)
        self._gone_if_rotten(key)
        self.kept.setdefault(key, reason)

    @rule(actor=actors, key=keys)
    def get(self, actor: int, key: Key) -> None:
        wanted = self.kept.get(key)
        if key in self.rotten or not isinstance(wanted, int):
            with pytest.raises(VacliError if key in self.rotten else KeyError):
                self.stores[actor].get(RECIPES[key[0]], key[1])
            self._gone_if_rotten(key)
        else:
            assert same(self.stores[actor].get(RECIPES[key[0]], key[1]), made(wanted))

    @rule(actor=actors, key=keys)
    def has(self, actor: int, key: Key) -> None:
        """A flipped bit in a chunk is not seen by this look at sizes; a changed record is."""
        wanted = isinstance(self.kept.get(key), int) and self.rotten.get(key) != "record"
        assert self.stores[actor].has(RECIPES[key[0]], key[1]) == wanted
        if self.rotten.get(key) == "record":
            self._gone_if_rotten(key)

    @rule(actor=actors, key=keys)
    def drop(self, actor: int, key: Key) -> None:
        self.stores[actor].drop(name_of(key))
        self.kept.pop(key, None)
        self.rotten.pop(key, None)

    @precondition(lambda self: self.kept.keys() - self.rotten.keys())
    @rule(data=st.data())
    def corrupt(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.kept.keys() - self.rotten.keys())), label="key")
        folder = self.top / "s.zarr" / name_of(key)
        path = data.draw(st.sampled_from(sorted([*folder.glob("*/c.*"), folder / "zarr.json"])), label="file")
        bytes_ = bytearray(path.read_bytes())
        if path.name == "zarr.json":
            at = bytes_.index(b'"digest": "') + 11 + data.draw(st.integers(0, 63), label="digit")
        else:
            at = data.draw(st.integers(0, len(bytes_) - 1), label="byte")
        bytes_[at] ^= 1
        path.unlink()
        path.write_bytes(bytes_)
        os.utime(
            path, ns=(len(self.rotten), data.draw(st.integers(0, 2**60), label="time"))
        )  # seen as another file
        self.rotten[key] = "record" if path.name == "zarr.json" else "chunk"

    @rule(actor=actors)
    def verify(self, actor: int) -> None:
        found = {name: wrong is not None for name, _, wrong in self.stores[actor].verify()}
        assert found == {name_of(key): key in self.rotten for key in self.kept}

    @rule(actor=actors)
    def repair(self, actor: int) -> None:
        for name, _, wrong in list(self.stores[actor].verify()):
            if wrong is not None:
                self.stores[actor].set_aside(name)
        for key in list(self.rotten):
            self._gone_if_rotten(key)

    # ---- names ---------------------------------------------------------------------------------------------

    @rule(
        actor=actors,
        video=videos,
        root=st.sampled_from(["/x", "/y"]),
        media=st.sampled_from([None, *MEDIA]),
        split=st.sampled_from([None, "train"]),
        linked=st.lists(keys, max_size=2),
        killed=st.sampled_from([0, 1, 2, 3, 5, 8]),
    )
    def link(
        self,
        actor: int,
        video: str,
        root: str,
        media: str | None,
        split: str | None,
        linked: list[Key],
        killed: int,
    ) -> None:
        facts, tracks = (
            {"root": root, "media": media, "split": split},
            {key[0]: address(key) for key in linked},
        )
        old = self.names.get(video)
        new = {**facts, "tracks": tracks}
        if old and (media is None or old["media"] in (None, media)):
            known = old if old["media"] else new
            both = {**old["tracks"], **tracks}
            new = {
                "root": known["root"],
                "media": known["media"],
                "split": split or old["split"],
                "tracks": both,
            }
        elif old and old["root"] != root:
            with pytest.raises(StoreError, match="knows another one of that name"):
                self.stores[actor].link(video, facts, tracks)
            return
        with through(Killing(killed) if killed else Layer()), contextlib.suppress(Killed):
            self.stores[actor].link(video, facts, tracks)
            self.names[video] = new
        if Store(self.top / "s.zarr").videos().get(video) == new:  # it was done, or killed when it was
            self.names[video] = new

    @rule(actor=actors, video=videos, some=st.none() | st.lists(st.sampled_from([*RECIPES]), min_size=1))
    def unlink(self, actor: int, video: str, some: list[str] | None) -> None:
        self.stores[actor].unlink(video, some)
        if video in self.names:
            tracks = self.names[video]["tracks"]
            left = {n: t for n, t in tracks.items() if some and n not in some}
            if left:
                self.names[video] = {**self.names[video], "tracks": left}
            else:
                del self.names[video]

    # ---- the process, the house ----------------------------------------------------------------------------

    @rule(actor=actors, key=keys, seed=seeds, n=st.integers(1, 45))
    def put_and_be_killed(self, actor: int, key: Key, seed: int, n: int) -> None:
        """Done or not done. What was broken may be gone already, and nothing come in its place."""
        before, broken = self.kept.get(key), self.rotten.get(key)
        with through(Killing(n)):
            try:
                self.stores[actor].put(RECIPES[key[0]], key[1], made(seed))
                acknowledged = True
            except Killed:
                acknowledged = False
        if acknowledged:
            self._put(key, seed)
        elif not (self.top / "s.zarr" / name_of(key)).exists():
            assert broken or not isinstance(before, int)
            self.kept.pop(key, None)
            self.rotten.pop(key, None)
        elif [wrong for _, _, wrong in Store(self.top / "s.zarr").verify([name_of(key)])] == [None]:
            if broken or not isinstance(before, int):
                reason = Store(self.top / "s.zarr").failure(RECIPES[key[0]], key[1])
                assert reason is None or reason == before
                self.kept[key] = seed if reason is None else reason
                self.rotten.pop(key, None)
        else:
            assert broken
        self.stores[actor] = Store(self.top / "s.zarr", create=True)

    @rule(actor=actors, key=keys)
    def drop_and_be_killed(self, actor: int, key: Key) -> None:
        with through(Killing(2)), contextlib.suppress(Killed):
            self.stores[actor].drop(name_of(key))
        if not (self.top / "s.zarr" / name_of(key)).exists():
            self.kept.pop(key, None)
            self.rotten.pop(key, None)
        self.stores[actor] = Store(self.top / "s.zarr", create=True)

    @rule(actor=actors, create=st.booleans())
    def reopen(self, actor: int, create: bool) -> None:
        self.stores[actor] = Store(self.top / "s.zarr", create=create)

    @rule(alone=st.booleans())
    def gc(self, alone: bool) -> None:
        """What no name refers to goes, with what it was made from; never while another has the store open."""
        if not alone:
            with pytest.raises(StoreError, match="in use"):
                keeper.gc(self.stores[0], keeper.garbage(self.stores[0], []), [])
            return
        del self.stores[1]
        collect()  # and those that were killed, whose last frames may still be in memory
        keeper.gc(self.stores[0], keeper.garbage(self.stores[0], []), [])
        assert self.stores[0].at.hidden(".quarantine") == []
        used = {t["folder"] for facts in self.names.values() for t in facts["tracks"].values()}
        mae = folder_name(RECIPES["mae"])
        if (
            mae in used and (self.top / "s.zarr" / mae / "zarr.json").exists()
        ):  # which says what it was made from
            used.add(folder_name(FACES))
        for key in list(self.kept):
            if address(key)["folder"] not in used:
                del self.kept[key]
                self.rotten.pop(key, None)
        self.stores.append(Store(self.top / "s.zarr", create=True))

    # ---- what always holds ---------------------------------------------------------------------------------

    @invariant()
    def both_say_what_the_model_says(self) -> None:
        for store in self.stores:
            assert store.videos() == dict(sorted(self.names.items()))
            assert store.entries() == sorted(map(name_of, self.kept))
            for key, what in self.kept.items():
                if key not in self.rotten and isinstance(what, str):
                    assert store.failure(RECIPES[key[0]], key[1]) == what
                elif key not in self.rotten:
                    assert same(store.get(RECIPES[key[0]], key[1]), made(what))


@pytest.mark.parametrize(
    ("examples", "steps"), [(60, 30), pytest.param(500, 50, marks=pytest.mark.slow)], ids=["some", "many"]
)
def test_a_store_does_what_a_dict_would_whatever_happens_to_it(examples, steps):
    run_state_machine_as_test(Model, settings=settings(max_examples=examples, stateful_step_count=steps))
