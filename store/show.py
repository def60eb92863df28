"""What a store holds, as text for people and as JSON for programs."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from .. import printable
from .entry import Damaged, Unreadable
from .keeper import Entry, index, unknown_video
from .store import Store
from .track import Track

_BARS, _MISSING, _PLOT_COLUMNS = "▁▂▃▄▅▆▇█", "·", 64


def listing(store: Store) -> list[dict[str, Any]]:
    """One table a video: id, split, root, media, and for each track its recipe, shape, dtype, bytes and state.

    state: "whole", "absent" (named, but not there: extract again), "failed" or "broken".
    """
    known = index(store)
    return [
        {
            "id": video_id,
            "split": facts["split"] and printable(facts["split"]),
            "root": printable(facts["root"]),
            "media": facts["media"],
            "tracks": {n: _state(t, known) for n, t in sorted(facts["tracks"].items())},
        }
        for video_id, facts in store.videos().items()
    ]


def _state(track: dict[str, Any], known: dict[str, Entry]) -> dict[str, Any]:
    found = known.get(f"{track['folder']}/{track['media'][:24]}")
    state = "absent" if found is None else "broken" if found.broken else "failed" if found.failed else "whole"
    shape = list(found.shape) if found and found.shape else None
    return {
        "recipe": track["folder"],
        "media": track["media"],
        "shape": shape,
        "dtype": found.dtype if found else "",
        "bytes": found.nbytes if found else 0,
        "state": state,
    }


def table(videos: list[dict[str, Any]]) -> list[str]:
    """The listing as lines: videos x tracks with their rows, then every recipe with its dims, videos, rows and size."""
    names = sorted({n for v in videos for n in v["tracks"]})
    several = {n for n in names if len({v["tracks"][n]["recipe"] for v in videos if n in v["tracks"]}) > 1}
    rows = [["video", "split", *names]]
    for video in videos:
        cells = [_cell(video["tracks"].get(n), n in several) for n in names]
        rows.append([video["id"], video["split"] or "-", *cells])
    return [*_aligned(rows, left=2), "", *_recipes(videos)]


def _cell(track: dict[str, Any] | None, mark: bool) -> str:
    if track is None:
        return "-"
    rows = str(track["shape"][0]) if track["state"] == "whole" else track["state"]
    return f"{rows} @{track['recipe'].rpartition('@')[2][:6]}" if mark else rows


def _recipes(videos: list[dict[str, Any]]) -> list[str]:
    by_folder: dict[str, list[dict[str, Any]]] = {}
    names: dict[str, set[str]] = {}
    for name, track in ((n, t) for v in videos for n, t in v["tracks"].items()):
        by_folder.setdefault(track["recipe"], []).append(track)
        names.setdefault(track["recipe"], set()).add(name)
    rows = [["track", "recipe", "dims", "dtype", "videos", "rows", "size"]]
    for folder, tracks in sorted(by_folder.items()):
        whole = [t for t in tracks if t["state"] == "whole"]
        dims = "/".join(sorted({"x".join(map(str, t["shape"][1:])) for t in whole})) or "-"
        dtype = "/".join(sorted({t["dtype"] for t in whole})) or "-"
        count = str(sum(t["shape"][0] for t in whole))
        size = size_text(sum(t["bytes"] for t in {t["media"]: t for t in tracks}.values()))
        rows.append([",".join(sorted(names[folder])), folder, dims, dtype, str(len(tracks)), count, size])
    return _aligned(rows, left=2)


def _aligned(rows: list[list[str]], left: int) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def size_text(nbytes: int) -> str:
    """1234567 -> `1.2 MB`."""
    size, units = float(nbytes), ["B", "kB", "MB", "GB", "TB"]
    while size >= 999.5 and len(units) > 1:
        size, units = size / 1000, units[1:]
    return f"{size:.0f} B" if units[0] == "B" else f"{size:.3g} {units[0]}"


def show(store: Store, video_id: str) -> list[str]:
    """Every track of a video: times, valid rows, values, recipe, and a plot as wide as a line. Raises VacliError."""
    facts = _facts_of(store, video_id)
    lines = [
        f"{video_id}  split {facts['split'] or '-'}  from {facts['root']}  medium {(facts['media'] or '-')[:24]}"
    ]
    for name, track in sorted(facts["tracks"].items()):
        entry = f"{track['folder']}/{track['media'][:24]}"
        lines += ["", f"{name}  {entry}"]
        try:
            recipe = store.recipe_of(track["folder"])
            lines += [f"  {line}" for line in _described(store.read(entry), _columns(recipe))]
            lines.append(f"  made by  {_noted(store.record(entry)['provenance'])}")
            lines.append(f"  recipe   {json.dumps(recipe, sort_keys=True)}")
        except KeyError:
            lines.append("  not there: run `vacli extract` again")
        except (Damaged, Unreadable) as e:
            lines.append(f"  {e}")
    return [printable(line) for line in lines]


def shown(store: Store, video_id: str) -> dict[str, Any]:
    """What `show` says as a tree for programs; seconds in begin_s, end_s and step_s. Raises VacliError."""
    facts = _facts_of(store, video_id)
    tracks: dict[str, dict[str, Any]] = {}
    for name, track in sorted(facts["tracks"].items()):
        entry = f"{track['folder']}/{track['media'][:24]}"
        found: dict[str, Any] = {"entry": entry, "problem": None}
        tracks[name] = found
        try:
            found["recipe"] = store.recipe_of(track["folder"])
            values = store.read(entry)
            found |= {"shape": values.values.shape, "dtype": str(values.values.dtype)}
            found |= {"bytes": values.values.nbytes, "valid": int(values.valid.sum())}
            if len(values):
                found |= {"begin_s": float(values.times_s[0]), "end_s": float(values.times_s[-1])}
            if len(values) > 1:
                found["step_s"] = float(np.median(np.diff(values.times_s)))
            found["provenance"] = store.record(entry)["provenance"]
        except KeyError:
            found["problem"] = "not there: run `vacli extract` again"
        except (Damaged, Unreadable) as e:
            found["problem"] = str(e)
    return {"id": video_id, **{key: facts[key] for key in ("split", "root", "media")}, "tracks": tracks}


def _facts_of(store: Store, video_id: str) -> dict[str, Any]:
    videos = store.videos()
    if video_id not in videos:
        raise unknown_video(store, video_id)
    return videos[video_id]


def _noted(provenance: dict[str, Any]) -> str:
    return ", ".join(
        f"{k} {v if isinstance(v, str) else json.dumps(v)}" for k, v in sorted(provenance.items())
    )


def _columns(recipe: dict[str, Any]) -> list[str]:
    """What the columns are called, where somebody named them."""
    if recipe["track"] == "label.va":
        return ["valence", "arousal"]
    imported = recipe.get("imported")
    names = imported.get("columns") if isinstance(imported, dict) else None
    return [str(n) for n in names] if isinstance(names, list) else []


def _described(track: Track, columns: list[str]) -> list[str]:
    shape = " x ".join(map(str, track.values.shape))
    if not len(track):
        return [f"values   {shape} {track.values.dtype}, no row"]
    steps = np.diff(track.times_s)
    rate = f", {1 / np.median(steps):.6g} Hz" if len(steps) else ""
    valid = track.valid
    lines = [
        f"values   {shape} {track.values.dtype}, {size_text(track.values.nbytes)}",
        f"times    {track.times_s[0]:.3f} to {track.times_s[-1]:.3f} s{rate}",
        f"valid    {int(valid.sum())} of {len(track)} rows, {100 * (1 - valid.mean()):.1f} % missing",
    ]
    if valid.any():
        seen = track.values[valid].reshape(int(valid.sum()), -1).astype(np.float32)
        lines.append(f"min/mean/max  {seen.min():.4g} / {seen.mean(dtype=np.float64):.4g} / {seen.max():.4g}")
        lines += _plots(track, columns)
    return lines


def _plots(track: Track, columns: list[str]) -> list[str]:
    """Each column of a narrow track, the mean of a wide one."""
    flat = track.values.reshape(len(track), -1)
    if flat.shape[1] > 4:
        return [f"mean     {_plot(flat.mean(axis=1, dtype=np.float32))}"]
    names = columns if len(columns) == flat.shape[1] else [f"column {i}" for i in range(flat.shape[1])]
    return [f"{name:<8.16} {_plot(flat[:, i])}" for i, name in enumerate(names)]


def _plot(values: np.ndarray) -> str:
    """A line of bars, each the mean of its share of the rows, from least to largest; a dot where none is valid."""
    shares = np.array_split(values.astype(np.float64), min(_PLOT_COLUMNS, len(values)))
    means = np.array([s[~np.isnan(s)].mean() if not np.isnan(s).all() else np.nan for s in shares])
    low, high = np.nanmin(means), np.nanmax(means)
    heights = np.nan_to_num((means - low) / (high - low if high > low else 1.0))
    bars = (_BARS[min(int(h * len(_BARS)), len(_BARS) - 1)] for h in heights)
    line = "".join(_MISSING if np.isnan(m) else b for m, b in zip(means, bars, strict=True))
    return f"{line}  {low:.3g} to {high:.3g}"
