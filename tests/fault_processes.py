"""Processes that are killed, and crowds of them; all is called by `apart`, in a process where forking is safe."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vacli import VacliError
from vacli.store import Store, disk, folder_name

from .fault_deeds import (
    DEEDS,
    OLD_STORE,
    RECIPE,
    Scene,
    age,
    contents,
    create,
    facts_of,
    fail,
    is_as_noted,
    left_in,
    media_of,
    notes_of,
    place_of,
    put,
    spoil,
    track_of,
)
from .fault_layer import DIED, Dying, Layer, NoLocks, through

Say = Callable[[str], Any]


def apart(function: Callable[..., Any], *args: Any) -> Any:
    """What a function of this module returns, called in a process of its own."""
    words = [sys.executable, "-m", "tests.fault_processes", function.__name__, json.dumps(args, default=str)]
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(words, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


class Child:
    """A fork of this process that does work(say, *args); the lines it says are heard even if it is killed."""

    def __init__(self, work: Callable[..., None], *args: Any) -> None:
        self._ear, mouth = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            try:
                work(lambda line: os.write(mouth, f"{line}\n".encode()), *args)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        os.close(mouth)

    def kill(self) -> list[str]:
        os.kill(self.pid, signal.SIGKILL)
        return self.end()[1]

    def end(self) -> tuple[int, list[str]]:
        """Its exit status (negative: the signal that ended it) and the lines it said, a torn last one left out."""
        with open(self._ear, encoding="utf-8") as heard:
            lines = heard.read().split("\n")[:-1]
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1]), lines


# ---- one that dies -----------------------------------------------------------------------------------------------


def die_at_every_call(folder: str) -> int:
    """Returns at how many points a process was ended; after each the store is looked at."""
    points = 0
    for number, deed in enumerate(DEEDS):
        scene = Scene(deed, Path(folder, str(number)))
        for torn in (False, True):
            for n in itertools.count(1):
                with scene.store() as path:
                    status, _ = Child(_die, scene, n, torn, path).end()
                    if status == 0:
                        break
                    assert status == DIED
                    scene.check_after_failure(path)
                    if (path / ".staging").exists():
                        age(path)
                    create(path)
                    assert not left_in(path)
                    points += 1
    return points


def _die(_: Say, scene: Scene, n: int, torn: bool, path: Path) -> None:
    with through(Dying(n, torn)):
        scene.deed(path)


# ---- many that are killed ----------------------------------------------------------------------------------------

FAILS, DROPS = {"track": "fails", "version": 1}, {"track": "drops", "version": 1}
SHARED = {"root": "/data", "media": None, "split": None}


def _life(say: Say, path: Path, seed: float) -> None:
    rng = random.Random(seed)
    store = create(path)
    while True:
        n = rng.randrange(10**6)
        [deed] = rng.choices(("put", "link", "name", "fail", "drop"), (6, 2, 1, 1, 1))
        if deed == "put":
            store.put(RECIPE, media_of(n), track_of(n), notes_of(n))
        elif deed == "link":
            store.link(f"v{n}", facts_of(n), {"mae": place_of(n)})
        elif deed == "name":
            store.link("shared", SHARED, {f"t{n}": place_of(n)})
        elif deed == "fail":
            store.fail(FAILS, media_of(n), "nobody in it")
        else:
            store.put(DROPS, media_of(n % 5), track_of(n % 5), notes_of(n % 5))
            store.drop(store.entry_of(DROPS, media_of(n % 5)))
        say(f"{deed} {n}")


def kill_at_random(folder: str, kills: int, at_once: int = 3, a_store: int = 12) -> int:
    """Writers are killed, some while they make a store or bring an old one up to date. Returns what they got done."""
    rng = random.Random(kills)
    done = 0
    for start in range(0, kills, a_store):
        path = Path(folder, f"{start}.zarr")
        if start // a_store % 2:
            shutil.copytree(OLD_STORE, path)
        alive: list[Child] = []
        said: list[str] = []
        for seed in range(start, min(start + a_store, kills)):
            while len(alive) < at_once:
                alive.append(Child(_life, path, rng.random()))
            time.sleep(rng.uniform(0, 0.03 if seed > start else 0.015))
            said += alive.pop(rng.randrange(at_once)).kill()
        said += [line for child in alive for line in child.kill()]
        _check_lives(path, said)
        done += len(said)
    return done


def _check_lives(path: Path, said: list[str]) -> None:
    """Everything that was acknowledged is there, everything that is there is right, and all of it goes on."""
    store = create(path)
    names = store.videos()
    assert [what for *_, what in store.verify() if what] == []
    for name in store.entries():
        notes = store.record(name)["provenance"]
        assert "number" not in notes or is_as_noted(store.read(name), notes)
    for line in said:
        deed, number = line.split()
        n = int(number)
        if deed == "put":
            assert is_as_noted(store.get(RECIPE, media_of(n)), notes_of(n)), line
        elif deed == "link":
            assert names[f"v{n}"] == {**facts_of(n), "tracks": {"mae": place_of(n)}}, line
        elif deed == "name":
            assert names["shared"]["tracks"][f"t{n}"] == place_of(n), line
        elif deed == "fail":
            assert store.failure(FAILS, media_of(n)), line
    if (path / "videos" / "zarr.json").exists():
        assert "v00" not in names or len(names["v00"]["tracks"]) == 3
    age(path)
    create(path)
    assert not left_in(path)


def interrupt(folder: str, tracks: int) -> int:
    """A job, killed again and again, beside the same job left alone: the same files. Returns the number of kills."""
    rng = random.Random(tracks)
    broken_off, whole = Path(folder, "broken_off.zarr"), Path(folder, "whole.zarr")
    kills, finished = 0, False
    while not finished:
        child = Child(_job, broken_off, tracks)
        time.sleep(rng.uniform(0, 0.02 + kills / 1000))  # ever later: in the end it has time to finish
        os.kill(child.pid, signal.SIGKILL)  # a child that has ended is there until it is waited for
        finished = child.end()[0] == 0
        kills += not finished
    _job(print, whole, tracks)
    assert _sums(broken_off) == _sums(whole)
    return kills


def _job(_: Say, path: Path, tracks: int) -> None:
    store = create(path)
    for n in range(tracks):
        if not store.has(RECIPE, media_of(n)):
            store.put(RECIPE, media_of(n), track_of(n), notes_of(n))
        store.link(f"v{n}", facts_of(n), {"mae": place_of(n)})


def _sums(path: Path) -> dict[str, str]:
    """SHA-256 of every file that is not hidden, and of every folder the empty text."""
    inside = {p.relative_to(path): p for p in path.rglob("*")}
    return {
        str(name): hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else ""
        for name, p in inside.items()
        if not name.parts[0].startswith(".")
    }


# ---- many at once ------------------------------------------------------------------------------------------------


def crowd(folder: str, members: int, puts: int, keys: int, locks: bool) -> int:
    """Writers of the same tracks and videos, and two readers. Returns how often the readers read all of the store."""
    path = Path(folder, "s.zarr")
    if not locks:
        disk.fcntl = NoLocks()
    create(path)
    readers = [Child(_read, path) for _ in range(2)]
    writers = [Child(_write, path, who, puts, keys) for who in range(members)]
    ends = [w.end() for w in writers]
    told = [line for r in readers for line in r.kill()]
    assert [status for status, _ in ends] == [0] * members
    assert [line for line in told if line != "all is right"] == []
    store, names = Store(path), Store(path).videos()
    assert [what for *_, what in store.verify() if what] == []
    for who, (_, lines) in enumerate(ends):
        assert len(lines) == puts
        for n in map(int, lines):
            name = store.entry_of(RECIPE, media_of(n))
            assert is_as_noted(store.read(name), store.record(name)["provenance"])
            assert names[f"v{n}"]["tracks"][f"t{who}"] == place_of(n), f"t{who} of v{n} is lost"
    assert not left_in(path)
    assert not (path / ".quarantine").exists()
    return len(told)


def _write(say: Say, path: Path, who: int, puts: int, keys: int) -> None:
    rng = random.Random(who)
    store = create(path)
    for _ in range(puts):
        n = rng.randrange(keys)
        if rng.random() < 0.2:
            store.fail(RECIPE, media_of(n), "nobody in it")
        store.put(RECIPE, media_of(n), track_of(n, who), notes_of(n, who))
        store.link(f"v{n}", facts_of(n), {f"t{who}": place_of(n)})
        say(str(n))


def _read(say: Say, path: Path) -> None:
    """Says what is not as it must be: whole, what its record says, and the same for ever."""
    seen: dict[str, int] = {}
    while True:
        store = Store(path)
        for name in {*seen, *store.entries()}:
            try:
                track = store.read(name)
                notes = store.record(name)["provenance"]
                if not is_as_noted(track, notes) or not store.has(RECIPE, media_of(notes["number"])):
                    say(f"{name} is not what its record says")
                if seen.setdefault(name, notes["by"]) != notes["by"]:
                    say(f"{name} has changed")
            except KeyError as e:
                if name in seen:
                    say(f"{name} has gone: {e}")
        for name, _, what in store.verify():
            if what:
                say(f"{name}: {what}")
        store.videos()
        say("all is right")
        time.sleep(0.02)


def race(folder: str, racers: int, past: str, locks: bool) -> int:
    """All put other values under one key at the same moment; past: what was there. Returns the one that all have."""
    path = Path(folder, "s.zarr")
    if not locks:
        disk.fcntl = NoLocks()
    steps = {"nothing": [], "a tombstone": [fail(0)], "a broken track": [put(0, 77), spoil(0, "size")]}[past]
    for step in [create, *steps]:
        step(path)
    children = [Child(_race, path, who) for who in range(racers)]
    (path.parent / "go").touch()
    ends = [c.end() for c in children]
    assert [status for status, _ in ends] == [0] * racers
    [by] = {line for _, lines in ends for line in lines}
    assert not left_in(path)
    assert [what for *_, what in Store(path).verify()] == [None]
    return int(by)


def _race(say: Say, path: Path, who: int) -> None:
    store = create(path)
    while not (path.parent / "go").exists():
        pass
    store.put(RECIPE, media_of(0), track_of(0, who), notes_of(0, who))
    name = store.entry_of(RECIPE, media_of(0))
    notes = store.record(name)["provenance"]
    assert is_as_noted(store.read(name), notes)
    say(str(notes["by"]))


# ---- another's store ---------------------------------------------------------------------------------------------


def not_ours(folder: str) -> dict[str, str]:
    """What a user who may only read is told, who may not even read, and who may not even look."""
    Path(folder).chmod(0o755)
    for name in ("read", "closed", "above/inner"):
        Path(folder, name).parent.mkdir(exist_ok=True)
        put(0)(create(Path(folder, name)).path)
    for path in Path(folder, "read").rglob("*"):
        path.chmod(path.stat().st_mode & ~0o222)
    Path(folder, "read").chmod(0o555)
    for name in ("closed", "above"):
        Path(folder, name).chmod(0)
    status, lines = Child(_as_nobody, folder).end()
    for name in ("read", "closed", "above"):
        Path(folder, name).chmod(0o700)
    for path in Path(folder, "read").rglob("*"):
        path.chmod(path.stat().st_mode | 0o200)
    assert status == 0
    return dict(line.split("|", 1) for line in lines)


def _as_nobody(say: Say, folder: str) -> None:
    os.chdir(folder)
    if os.geteuid() == 0:
        os.setgid(65534)
        os.setuid(65534)
    store = Store("read")
    assert store.has(RECIPE, media_of(0))
    assert is_as_noted(store.get(RECIPE, media_of(0)), notes_of(0))
    assert list(contents(Path("read"))) == ["store", f"{folder_name(RECIPE)}/{media_of(0)[:24]}"]
    tries: dict[str, Callable[[], Any]] = {
        "put": lambda: put(1)(Path("read")),
        "create": lambda: Store("read", create=True),
        "new": lambda: Store("read/new.zarr", create=True),
        "closed": lambda: Store("closed"),
        "above": lambda: Store("above/inner"),
    }
    for name, work in tries.items():
        try:
            work()
            say(f"{name}|")
        except VacliError as e:
            say(f"{name}|{e}")


if __name__ == "__main__":
    with through(Layer()):
        answer = globals()[sys.argv[1]](*json.loads(sys.argv[2]))
    print(json.dumps(answer))
