"""What made a track: the canonical recipe with its digest, and the fingerprint of the medium it was made from."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .. import VacliError

TRACK_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
SHA256 = re.compile(r"[0-9a-f]{64}")  # as a recipe's digest and a medium's are written
JSON_DEPTH, _RECIPE_DEPTH = 16, 12  # of nested JSON, ours has 6; a recipe has room for what is put around it
_ENCODER = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=True)
_RACY_NS = 2_000_000_000  # a file changed this close to its hashing may change again within one clock tick


def canonical(recipe: dict[str, Any], of_json: bool = False) -> str:
    """The one JSON text of a recipe: sorted keys, no spaces; 1, 1.0, true and "1" are four different values.

    of_json: it was read from JSON by `check_json`'s rules, so it need not be looked through again.
    Raises ValueError for NaN, infinities, keys that are no text, what is nested too deep, what is not JSON.
    """
    if not of_json:
        check_json(recipe, _RECIPE_DEPTH)
    try:
        return _ENCODER.encode(recipe)
    except TypeError as e:
        raise ValueError(f"a recipe is JSON: {e}") from e


def check_json(value: Any, depth: int = JSON_DEPTH) -> None:
    """Raises ValueError for a key that is no text, and for nesting that would overflow somebody's stack."""
    if not isinstance(value, dict | list | tuple):
        return
    if not depth:
        raise ValueError("JSON nested too deep")
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise ValueError(f"keys must be text, got {key!r:.80}")
        value = value.values()
    for inner in value:
        check_json(inner, depth - 1)


def digest(recipe: dict[str, Any], of_json: bool = False) -> str:
    """SHA-256 (hex) of the canonical JSON: the identity of every track made by this recipe."""
    return hashlib.sha256(canonical(recipe, of_json).encode()).hexdigest()


def track_name(recipe: dict[str, Any]) -> str:
    """The recipe's own name for its tracks. Raises ValueError if it is not fit for the name of a folder."""
    name = recipe.get("track")
    if not isinstance(name, str) or not TRACK_NAME.fullmatch(name):
        raise ValueError(f"recipe['track'] must match {TRACK_NAME.pattern}, got {name!r}")
    return name


def folder_name(recipe: dict[str, Any]) -> str:
    """`<track>@<first 16 hex digits>`: where tracks of this recipe lie in a store."""
    return f"{track_name(recipe)}@{digest(recipe)[:16]}"


def combine(*digests: str) -> str:
    """One media digest for what is made of several media (crops and the video that times them)."""
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


class Fingerprints:
    """Content digests of files and folders, remembered by what the file system says of them.

    A remembered digest is used while (device, inode, size, mtime, ctime) are unchanged and the file was not
    changed within 2 s of its hashing. Touching a file costs one more hashing, never a recomputed feature.
    """

    def __init__(self, memo: dict[str, str] | None = None) -> None:
        self.memo = dict(memo or {})
        self.changed = False

    def file(self, path: Path) -> str:
        """SHA-256 (hex) of a file's bytes. Raises VacliError if it cannot be read."""
        try:
            key, newest_ns = _stat_key([path])
            if key not in self.memo:
                with open(path, "rb") as f:
                    value = hashlib.file_digest(f, "sha256").hexdigest()
                self._remember(key, newest_ns, value)
                return value
        except OSError as e:
            raise VacliError(f"cannot read {path}: {e.strerror}; mend that and run again") from e
        return self.memo[key]

    def folder(self, paths: Iterable[Path]) -> str:
        """SHA-256 (hex) over the names and bytes of the files of one folder, in the order of their names."""
        paths = sorted(paths)
        try:
            key, newest_ns = _stat_key(paths)
            if key not in self.memo:
                whole = hashlib.sha256()
                for path in paths:
                    one = hashlib.sha256(path.read_bytes()).hexdigest()
                    whole.update(os.fsencode(path.name) + f"\0{one}\n".encode())
                self._remember(key, newest_ns, whole.hexdigest())
                return whole.hexdigest()
        except OSError as e:
            raise VacliError(f"cannot read {e.filename}: {e.strerror}; mend that and run again") from e
        return self.memo[key]

    def _remember(self, key: str, newest_ns: int, value: str) -> None:
        if time.time_ns() - newest_ns > _RACY_NS:
            self.memo[key] = value
            self.changed = True


def _stat_key(paths: list[Path]) -> tuple[str, int]:
    whole, newest_ns = hashlib.sha256(), 0
    for path in paths:
        s = os.stat(path)
        newest_ns = max(newest_ns, s.st_mtime_ns, s.st_ctime_ns)
        fields = (path.name, s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns)
        whole.update(repr(fields).encode())
    return whole.hexdigest()[:32], newest_ns
