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

_TRACK_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_RACY_NS = 2_000_000_000  # a file changed this close to its hashing may change again within one clock tick


def canonical(recipe: dict[str, Any], of_json: bool = False) -> str:
    """The one JSON text of a recipe: sorted keys, no spaces. Raises ValueError on NaN or what is not JSON.

    of_json: it was read from JSON, so all its keys are text already.
    """
    if not of_json:
        _refuse_odd_keys(recipe)
    return json.dumps(recipe, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=True)


def _refuse_odd_keys(value: Any) -> None:
    if isinstance(value, dict):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise ValueError(f"recipe keys must be text, got {key!r}")
            _refuse_odd_keys(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            _refuse_odd_keys(inner)


def digest(recipe: dict[str, Any], of_json: bool = False) -> str:
    """SHA-256 (hex) of the canonical JSON: the identity of every track made by this recipe."""
    return hashlib.sha256(canonical(recipe, of_json).encode()).hexdigest()


def track_name(recipe: dict[str, Any]) -> str:
    """The recipe's own name for its tracks. Raises ValueError if it is not fit for the name of a folder."""
    name = recipe.get("track")
    if not isinstance(name, str) or not _TRACK_NAME.fullmatch(name):
        raise ValueError(f"recipe['track'] must match {_TRACK_NAME.pattern}, got {name!r}")
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
            raise VacliError(f"cannot read {path}: {e.strerror}") from e
        return self.memo[key]

    def folder(self, paths: Iterable[Path]) -> str:
        """SHA-256 (hex) over the names and bytes of the files of one folder, in the order of their names."""
        paths = sorted(paths)
        try:
            key, newest_ns = _stat_key(paths)
            if key not in self.memo:
                whole = hashlib.sha256()
                for path in paths:
                    whole.update(f"{path.name}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
                self._remember(key, newest_ns, whole.hexdigest())
                return whole.hexdigest()
        except OSError as e:
            raise VacliError(f"cannot read {e.filename}: {e.strerror}") from e
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
