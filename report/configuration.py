"""The configuration of a training run as HTML: its preset as TOML, and of every stream the recipe."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from .html import text
from .runs import KEYS, TrainingRun, number_of, under

_MOST_IDS = 2000  # of a split, named one by one
_LICENCES = (
    "A run does not say under which licence its features' weights are: <code>vacli encoders</code> does, for each. "
    "The licence of Aff-Wild2 forbids sharing what was made from it, these weights among it."
)


def configuration(run: TrainingRun) -> str:
    """What made the run, to be unfolded: preset, seed, versions, the videos of both splits, fingerprints, licences."""
    about = run.about
    versions = about.get("versions")
    facts = {
        "Head": about["preset"].get("source") or run.preset["name"],
        "Seed": about.get("seed", ""),
        "Smoothing": smoothing_in_words(about.get("smoothing")) or "chosen in the end",
        "Finished": about.get("finished_at", "not yet"),
        "Device": about.get("device", ""),
        "Versions": ", ".join(f"{k} {v}" for k, v in versions.items())
        if isinstance(versions, Mapping)
        else "",
        "Settings": about.get("settings", ""),
    }
    shown = "".join(f"<dt>{name}</dt><dd>{text(value)}</dd>" for name, value in facts.items())
    return (
        f'<details class="more"><summary>Configuration</summary><dl class="facts">{shown}</dl>'
        f"<h3>Preset as used</h3>{_code(preset_toml(run.preset), 'Preset')}{_streams(about)}"
        f"{_split(about, 'train', 'Trained on')}{_split(about, 'validation', 'Judged by')}"
        f'<h3>Licences</h3><p class="note">{_LICENCES}</p></details>'
    )


def smoothing_in_words(found: object) -> str:
    """As V box ±0.8 s, A none; nothing for what is no smoothing."""
    said = []
    for letter, key in (("V", KEYS[0]), ("A", KEYS[1])):
        half_s = number_of(under(found, key, "half_s"))
        if half_s is None:
            return ""
        said.append(f"{letter} {under(found, key, 'kind')} ±{half_s:g} s" if half_s else f"{letter} none")
    return ", ".join(said)


def _streams(about: Mapping[str, Any]) -> str:
    """Of each stream, and of the labels: the fingerprint, and the recipe it stands for."""
    streams = about.get("streams")
    tracks = [*(streams.items() if isinstance(streams, Mapping) else ()), ("labels", about.get("label"))]
    told = ""
    for name, facts in tracks:
        dim = under(facts, "dim")
        heading = f"{name}: {under(facts, 'folder')}" + (f", {dim} dims" if dim != "" else "")
        recipe = {key: under(facts, key) for key in ("recipe", "encoder") if under(facts, key)}
        told += f"<h3>{text(heading)}</h3>{_code(_json(recipe), f'Recipe of {name}')}"
    started = about.get("started_from")
    if started:
        told += f"<h3>Started from</h3>{_code(_json(started), 'Started from')}"
    return told


def _code(said: str, name: str) -> str:
    return f'<pre tabindex="0" role="region" aria-label="{text(name)}">{text(said)}</pre>'


def _json(tree: object) -> str:
    return json.dumps(tree, indent=1, ensure_ascii=False)


def _split(about: Mapping[str, Any], split: str, heading: str) -> str:
    members = about.get(split)
    ids = sorted(map(str, members)) if isinstance(members, Mapping | list) else []
    named = ", ".join(ids[:_MOST_IDS])
    if len(ids) > _MOST_IDS:
        named += f" and {len(ids) - _MOST_IDS:,} more"
    videos = f"{len(ids):,} video{'' if len(ids) == 1 else 's'}"
    region = f'class="ids" tabindex="0" role="region" aria-label="{heading}"'
    return f"<h3>{heading} {videos}</h3><div {region}>{text(named)}</div>"


def preset_toml(preset: Mapping[str, Any]) -> str:
    """A preset as the TOML that `vacli train --head my.toml` reads; a key without a value is left out."""
    lines = [
        f"{key} = {toml(value)}" for key, value in preset.items() if not isinstance(value, Mapping | None)
    ]
    for key, value in preset.items():
        if isinstance(value, Mapping):
            lines += ["", f"[{_toml_key(key)}]", *_toml_lines(value)]
    return "\n".join(lines)


def _toml_lines(table: Mapping[str, Any]) -> Iterator[str]:
    return (f"{_toml_key(key)} = {toml(value)}" for key, value in table.items() if value is not None)


def toml(value: object) -> str:
    if isinstance(value, Mapping):
        inner = ", ".join(_toml_lines(value))
        return f"{{ {inner} }}" if inner else "{}"
    if isinstance(value, list):
        return f"[{', '.join(map(toml, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


def _toml_key(key: str) -> str:
    return key if key.isascii() and key.replace("_", "").replace("-", "").isalnum() else json.dumps(key)
