"""Keeping house in a store: an index of what is there, how big it is, what may go, and its removal."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from .. import VacliError
from . import disk, entry
from .entry import Damaged, Unreadable
from .place import StoreError
from .store import Store

_INDEX = ".index/zarr.json"
_INDEX_LIMIT = 2**23  # bytes: 30,000 entries; of more the records are read


class Entry(NamedTuple):
    """One entry at a glance. shape: of its values, None for a tombstone or where `broken` says what is wrong."""

    shape: tuple[int, ...] | None
    dtype: str
    nbytes: int
    media: str = ""
    failed: str | None = None
    broken: str | None = None


def index(store: Store) -> dict[str, Entry]:
    """Every entry of the store by its name, without opening those that are known.

    Records are remembered in .index/, each with a stamp of its folder (inode, time): entries never change in place, so
    a folder of the same stamp has the same record. Derived: it may be deleted, and is never used for reading a track.
    """
    known, found, fresh = _known(store), {}, False
    stamps = {
        f"{folder}/{m}": stamp for folder in store.folders() for m, stamp in store.at.stamps(folder).items()
    }
    for name, stamp in stamps.items():
        if known.get(name, ("", None))[0] == stamp:
            found[name] = known[name][1]
        elif look := _look(store, name):
            found[name], fresh = look, True
    if fresh or known.keys() - stamps.keys():
        rows = {name: [stamps[name], *e[:-1]] for name, e in found.items() if e.broken is None}
        with contextlib.suppress(OSError):  # a store that cannot be written is read without
            store.at.save_here(_INDEX, entry.group_json({"rows": json.dumps(rows)}))
    return found


def _look(store: Store, name: str) -> Entry | None:
    try:
        record = store.record(name)
    except KeyError:
        return None
    except (Damaged, Unreadable) as e:
        return Entry(None, "", 0, broken=str(e))
    values = record.get("arrays", {}).get("values")
    shape = tuple(values["shape"]) if values else None
    dtype = values["dtype"] if values else ""
    return Entry(shape, dtype, entry.nbytes_of(record), record["media"], record.get("failed"))


def _known(store: Store) -> dict[str, tuple[str, Entry]]:
    try:
        # text within the JSON: thousands of rows that are looked at here, and not before
        rows = json.loads(entry.parse_group(store.at.load_here(_INDEX, _INDEX_LIMIT))["rows"])
        return {name: (stamp, _entry(*row)) for name, (stamp, *row) in rows.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def _entry(shape: Any, dtype: Any, nbytes: Any, media: Any, failed: Any) -> Entry:
    """A row of the index, which may be a stranger's. Raises ValueError."""
    plain = type(nbytes) is int and type(dtype) is str and type(media) is str
    if not plain or (shape and set(map(type, shape)) != {int}):
        raise ValueError("not of our form")
    return Entry(tuple(shape) if shape else None, dtype, nbytes, media, failed and str(failed))


# ---- what may go -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Garbage:
    """Something that nobody needs: the entries of a recipe, or a leftover on the disk, and why it may go."""

    name: str
    why: str
    nbytes: int
    entries: int = 0
    path: Path | None = None


def garbage(store: Store, runs: list[Path]) -> list[Garbage]:
    """What killed writers left, what was set aside as damaged, and the tracks of recipes nobody refers to.

    A recipe is referred to by a video's names, by a run below one of `runs` (whose encoder it is), or by a recipe that
    is referred to and was made from it; one that cannot be read is left alone. Raises VacliError where a run cannot
    be read: its features would be taken for garbage.
    """
    left = [
        Garbage(f".staging/{p.name}", "left by a killed process", _size(p), path=p)
        for p in store.at.leftovers()
    ]
    aside = [
        Garbage(f".quarantine/{p.name}", "found damaged", _size(p), path=p)
        for p in store.at.hidden(".quarantine")
    ]
    lost = lost_names(store)
    aside = [item for item in aside if item.path not in lost]
    used = set(store.folders()) if lost else _used(store, runs)
    unused: dict[str, list[Entry]] = {f: [] for f in store.folders() if f not in used}
    for name, e in index(store).items():
        if name.partition("/")[0] in unused:
            unused[name.partition("/")[0]].append(e)
    why = "no video and no run refers to this recipe"
    left += [
        Garbage(name, "an upload never finished, or found damaged", n)
        for name, n in store.at.orphans().items()
    ]
    return left + aside + [Garbage(f, why, sum(e.nbytes for e in es), len(es)) for f, es in unused.items()]


def lost_names(store: Store) -> list[Path]:
    """Names of videos that were set aside as damaged and not linked again: nobody knows what they referred to, so no
    recipe is garbage while there are any.
    """
    known = set(store.at.folders("videos"))
    pages = [p for p in store.at.hidden(".quarantine") if p.name.startswith("videos.")]
    return [p for p in pages if p.name.split(".")[1] not in known]


def _used(store: Store, runs: list[Path]) -> set[str]:
    folders = {f: _recipe(store, f) for f in store.folders()}
    used = {t["folder"] for facts in store.videos().values() for t in facts["tracks"].values()}
    used |= {f for f, recipe in folders.items() if not recipe}
    for about in _runs(runs):
        used |= {s["folder"] for s in about["streams"].values()} | {about["label"]["folder"]}
        # prediction takes the run's encoder to faces found otherwise than those it was trained on
        encoders = [_but_for_its_source(s.get("recipe", {})) for s in about["streams"].values()]
        used |= {f for f, recipe in folders.items() if recipe and _but_for_its_source(recipe) in encoders}
    by_digits = {f.rpartition("@")[2]: f for f in folders}
    waiting = [f for f in used if f in folders]
    while waiting:
        source = by_digits.get(str(folders[waiting.pop()].get("made_from"))[:16])
        if source and source not in used:
            used.add(source)
            waiting.append(source)
    return used


def _recipe(store: Store, folder: str) -> dict[str, Any]:
    try:
        return store.recipe_of(folder)
    except Damaged:
        return {}


def _but_for_its_source(recipe: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in recipe.items() if k != "made_from"}


def _runs(runs: list[Path]) -> Iterator[dict[str, Any]]:
    for path in (p for folder in runs for p in sorted(folder.glob("*/run.json"))):
        try:
            about = json.loads(path.read_text())
            if not all(isinstance(s["folder"], str) for s in (*about["streams"].values(), about["label"])):
                raise TypeError("a folder that is no text")
            yield about
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
            raise VacliError(
                f"cannot read {path} ({e}), so it is not known which features it needs: mend or remove the run"
            ) from e


def gc(store: Store, agreed: list[Garbage], runs: list[Path]) -> int:
    """Remove what was agreed on and still is garbage: somebody may have come to need it since. Returns the bytes freed.

    Raises StoreError while others have the store open.
    """
    with store.at.alone():
        names = {item.name for item in agreed}
        found = [item for item in garbage(store, runs) if item.name in names]
        for item in found:
            if item.path is not None:
                disk.remove(item.path)
            else:
                store.drop(item.name)
    return sum(item.nbytes for item in found)


def repair(store: Store, name: str) -> bool:
    """Set aside what `verify` found wrong, if it still is; False if it is not, or only cannot be read or moved now."""
    with store.at.told(f"repair {name}"), store.at.replacing():
        try:
            _look_closely(store, name)
        except (Damaged, StoreError):
            store.set_aside(name)
            return not (store.path / name).exists()
        except (FileNotFoundError, Unreadable):
            pass
    return False


def _look_closely(store: Store, name: str) -> None:
    folder, _, page = name.partition("/")
    if folder == "videos":
        store.named(page)
    elif page == "zarr.json":
        store.recipe_of(folder)
    else:
        record = store.at.record(name)
        if "failed" not in record:
            store.at.read(name, record, everything=True)


def unknown_video(store: Store, video_id: str) -> VacliError:
    """What to raise where the store does not know a video; it names those whose names are like it."""
    close = [v for v in store.videos() if video_id.lower() in v.lower()][:5]
    hint = f"there is {', '.join(close)}" if close else "`vacli store ls` lists them"
    return VacliError(f"{store} knows no video {video_id!r}; {hint}")


def remove(store: Store, video_id: str, tracks: list[str]) -> list[str]:
    """Forget a video, or some of its tracks, and remove the tracks that no other video has; returns those removed.

    The tombstones of a video go with it, so that the next extraction tries again. Raises VacliError for an unknown
    id or track.
    """
    videos = store.videos()
    failed = [
        n
        for n, e in index(store).items()
        if e.failed and store.record(n)["provenance"].get("sample") == video_id
    ]
    if video_id not in videos and (tracks or not failed):
        raise unknown_video(store, video_id)
    mine = videos.pop(video_id, {"tracks": {}})["tracks"]
    unknown = sorted(set(tracks) - mine.keys())
    if unknown:
        raise VacliError(
            f"{video_id} has no track {', '.join(unknown)}; its tracks: {', '.join(sorted(mine))}"
        )
    others = {_address(t) for facts in videos.values() for t in facts["tracks"].values()}
    others |= {_address(t) for name, t in mine.items() if tracks and name not in tracks}
    gone = {_address(t) for name, t in mine.items() if not tracks or name in tracks} - others
    # the names first: a name never points to what was removed on purpose
    store.unlink(video_id, tracks or None)
    gone |= set() if tracks else set(failed)
    for name in sorted(gone):
        store.drop(name)
    return sorted(gone)


def _address(track: dict[str, Any]) -> str:
    return f"{track['folder']}/{track['media'][:24]}"


def _size(path: Path) -> int:
    try:
        inside = path.rglob("*") if path.is_dir() and not path.is_symlink() else [path]
        return sum(p.lstat().st_size for p in inside)
    except OSError:
        return 0


def usage(store: Store) -> dict[str, tuple[int, int]]:
    """`<track>@<recipe16>` -> (entries, bytes), and the hidden folders that hold something."""
    found: dict[str, tuple[int, int]] = dict.fromkeys(store.folders(), (0, 0))
    for name, e in index(store).items():
        folder = name.partition("/")[0]
        count, nbytes = found.get(folder, (0, 0))
        found[folder] = (count + 1, nbytes + e.nbytes)
    for hidden in (".quarantine", ".staging", ".trash"):
        inside = store.at.hidden(hidden)
        if inside:
            found[hidden] = (len(inside), sum(map(_size, inside)))
    return found
