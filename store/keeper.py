"""Keeping house in a store: an index of what is there, how big it is, what may go, and its removal."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from .. import VacliError
from . import disk, entry
from .entry import Damaged, Unreadable
from .names import folder_of
from .place import StoreError
from .recipe import SHA256, combine
from .store import Store

_INDEX = ".index/zarr.json"
_INDEX_LIMIT = 2**23  # bytes: 25,000 entries; of more the records are read


class Entry(NamedTuple):
    """One entry at a glance. shape: of its values, None for a tombstone or where `broken` says what is wrong.
    sample: the id it was made for; under another one, or under none, it may be linked."""

    shape: tuple[int, ...] | None
    dtype: str
    nbytes: int
    media: str = ""
    failed: str | None = None
    sample: str = ""
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
    sample = record["provenance"].get("sample")
    noted = sample if isinstance(sample, str) else ""
    return Entry(shape, dtype, entry.nbytes_of(record), record["media"], record.get("failed"), noted)


def _known(store: Store) -> dict[str, tuple[str, Entry]]:
    try:
        # text within the JSON: thousands of rows that are looked at here, and not before
        rows = json.loads(entry.parse_group(store.at.load_here(_INDEX, _INDEX_LIMIT))["rows"])
        return {name: (stamp, _entry(*row)) for name, (stamp, *row) in rows.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def _entry(shape: Any, dtype: Any, nbytes: Any, media: Any, failed: Any, sample: Any) -> Entry:
    """A row of the index, which may be a stranger's. Raises ValueError."""
    plain = type(nbytes) is int and {type(dtype), type(media), type(sample)} == {str}
    if not plain or (shape and set(map(type, shape)) != {int}):
        raise ValueError("not of our form")
    return Entry(tuple(shape) if shape else None, dtype, nbytes, media, failed and str(failed), sample)


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
    lost = lost_names(store)
    aside = [item for item in _aside(store) if item.path not in lost]
    used = set(store.folders()) if lost else _used(store, runs)
    unused: dict[str, list[Entry]] = {f: [] for f in store.folders() if f not in used}
    for name, e in index(store).items():
        if name.partition("/")[0] in unused:
            unused[name.partition("/")[0]].append(e)
    why = "no video and no run refers to this recipe"
    recipes = [Garbage(f, why, sum(e.nbytes for e in es), len(es)) for f, es in unused.items()]
    return left + _orphans(store) + aside + recipes


def _aside(store: Store) -> list[Garbage]:
    pages = store.at.hidden(".quarantine")
    return [Garbage(f".quarantine/{p.name}", "found damaged", _size(p), path=p) for p in pages]


def _orphans(store: Store) -> list[Garbage]:
    why = "an upload never finished, or found damaged"
    return [Garbage(name, why, nbytes) for name, nbytes in store.at.orphans().items()]


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
            _clear(store, item)
    return sum(item.nbytes for item in found)


def _clear(store: Store, item: Garbage) -> None:
    if item.path is not None:
        disk.remove(item.path)
    else:
        store.drop(item.name)


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


_Names = dict[str, list[str] | None]  # id -> its tracks that are meant, None: all


@dataclass(frozen=True)
class Doomed:
    """What `remove` takes away, and what it leaves.

    entries: name -> bytes; to so many as `unnamed` no name refers. names: id -> its tracks that are forgotten, None for
    all. aside: copies set aside as damaged. kept: entry -> the id of a video that stays and has it too. media: digests
    of which nothing is left then.
    """

    entries: dict[str, int]
    unnamed: int
    names: _Names
    aside: list[Garbage]
    kept: dict[str, str]
    media: set[str]

    @property
    def nbytes(self) -> int:
        return sum(self.entries.values()) + sum(item.nbytes for item in self.aside)


def doomed(store: Store, videos: str | Sequence[str | Path], tracks: Sequence[str] = ()) -> Doomed:
    """What goes with videos, given by id (text) or as the file itself (Path); changes nothing.

    Of an id: its name, every track it has, and whatever was made of the same media or noted as made for this id,
    linked or not (tombstones too, so that the next extraction tries again); but what another video has stays. With
    `tracks` only those, as the id has them. Of a file: all that was made of its bytes, whoever has it, and the
    ids that stand for it, as if they were given.

    Crops and labels are media of their own that combine the video's digest with another one: they are known by the
    names, and by the digests this machine remembers. Raises VacliError for what is unknown: an id, a track, a file of
    which there is nothing, one that cannot be read.
    """
    videos = [videos] if isinstance(videos, str) else videos
    ids = [v for v in videos if isinstance(v, str)]
    known, there = store.videos(), index(store)
    if tracks:
        return _doomed_tracks(store, videos, list(tracks), known, there)
    aside = [*_aside(store), *_orphans(store)]
    digits = {n.partition("/")[2] for n in there} | {_end(item.name) for item in aside}
    digits |= {m[:24] for facts in known.values() for m in _media(facts)}
    media: set[str] = set()
    for path in (v for v in videos if isinstance(v, Path)):
        made = _combined(store, {store.fingerprints.file(path)}, digits)
        if not any(m[:24] in digits for m in made):
            raise VacliError(
                f"{store} has nothing that was made of {path}: is it the very file, byte for byte? "
                "`vacli store ls` lists the ids, which may be given as well"
            )
        media |= made
    names = {v: some for v, f in known.items() if (some := _made_of(store, f, media)) != []}
    names |= {v: None for v in ids if v in known}
    whole = {v: known[v] for v, some in names.items() if some is None}
    mine, staying = _parted(known, names)
    noted = {
        n: e for n, e in there.items() if e.sample and e.sample in ids and (e.failed or n not in staying)
    }
    if unknown := set(ids) - names.keys() - {e.sample for e in noted.values()}:
        raise unknown_video(store, min(unknown))
    seeds = {facts["media"] for facts in whole.values() if facts["media"]}
    media |= _combined(store, seeds, digits).union(*map(_media, whole.values()))
    media |= {e.media for e in noted.values() if not e.failed}
    digits = {m[:24] for m in media}
    found = {n for n in there if n in mine or n in noted or n.partition("/")[2] in digits}
    kept = {n: staying[n] for n in found & staying.keys() - noted.keys()}
    left = {n.partition("/")[2] for n in kept}
    ends = digits - left | {folder_of(v) for v in (*ids, *whole)}
    aside = [item for item in aside if _end(item.name) in ends]
    entries = {n: there[n].nbytes for n in sorted(found - kept.keys())}
    unnamed = len(entries.keys() - mine - staying.keys())
    return Doomed(entries, unnamed, names, aside, kept, {m for m in media if m[:24] not in left})


def _doomed_tracks(
    store: Store,
    videos: Sequence[str | Path],
    tracks: list[str],
    known: dict[str, dict[str, Any]],
    there: dict[str, Entry],
) -> Doomed:
    """As `doomed`, of some tracks of videos given by their ids."""
    names: _Names = {}
    for video in videos:
        if isinstance(video, Path):
            raise VacliError(f"{video}: of a file everything goes; single tracks go by a video's id")
        if video not in known:
            raise unknown_video(store, video)
        mine = known[video]["tracks"]
        if unknown := sorted(set(tracks) - mine.keys()):
            raise VacliError(
                f"{video} has no track {', '.join(unknown)}; its tracks: {', '.join(sorted(mine))}"
            )
        names[video] = tracks
    gone, staying = _parted(known, names)
    kept = {n: staying[n] for n in gone & staying.keys()}
    entries = {n: there[n].nbytes for n in sorted(gone & there.keys() - kept.keys())}
    return Doomed(entries, 0, names, [], kept, set())


def _combined(store: Store, media: set[str], digits: set[str]) -> set[str]:
    """The media, and those of such digits that combine one of them with another file: crops it times, labels of it
    (extract.plan)."""
    beside = {v for v in store.fingerprints.memo.values() if SHA256.fullmatch(v)}
    found, fresh = set(media), set(media)
    while fresh:  # labels of crops are combined twice
        fresh = {c for m in fresh for v in beside if (c := combine(v, m))[:24] in digits} - found
        found |= fresh
    return found


def _made_of(store: Store, facts: dict[str, Any], media: set[str]) -> list[str] | None:
    """Which tracks of a video are made of such media; None where the video itself is one.

    It is if its pictures are, or what we made of it: the sound, of crops. An import is made of another file.
    """
    tracks = {name: t for name, t in facts["tracks"].items() if t["media"] in media}
    ours = (t for t in tracks.values() if "imported" not in _recipe(store, t["folder"]))
    return None if facts["media"] in media or any(ours) else sorted(tracks)


def _parted(known: dict[str, dict[str, Any]], names: _Names) -> tuple[set[str], dict[str, str]]:
    """The entries that the names refer to, and those that others do, with the id of one of these."""
    mine, staying = set(), {}
    for video_id, facts in known.items():
        some = names.get(video_id, [])
        for name, track in facts["tracks"].items():
            if some is None or name in some:
                mine.add(_address(track))
            else:
                staying[_address(track)] = video_id
    return mine, staying


def _end(name: str) -> str:
    """The digits at the end of a name in .quarantine, without those that tell it from others; "" elsewhere."""
    return name.split(".")[-2] if name.startswith(".quarantine/") else ""


def remove(store: Store, videos: str | Sequence[str | Path], tracks: Sequence[str] = ()) -> list[str]:
    """Take away what is `doomed` now; returns the names of the entries that went. Raises VacliError as that does.

    Stopped half-way, or while an extraction of the same video goes on, some is left: do it again.
    """
    found = doomed(store, videos, tracks)
    # the names first: a name never points to what was removed on purpose
    for video_id, some in found.names.items():
        store.unlink(video_id, some)
    for name in found.entries:
        store.drop(name)
    for item in found.aside:
        _clear(store, item)
    memo = {key: media for key, media in store.fingerprints.memo.items() if media not in found.media}
    if memo != store.fingerprints.memo:
        store.fingerprints.memo = memo
        with store.at.told("forget media digests"):
            store.at.save_here("fingerprints/zarr.json", entry.group_json(memo))
    index(store)  # it forgets them as well
    return list(found.entries)


def _media(facts: dict[str, Any]) -> set[str]:
    """All that a video's tracks were made of."""
    return {m for m in (facts["media"], *(t["media"] for t in facts["tracks"].values())) if m}


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
