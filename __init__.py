"""vacli turns videos of people into valence-arousal curves: two stages around a cached feature store."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from math import isfinite
from pathlib import PurePath
from typing import Any

__version__ = "0.1.0"


class VacliError(Exception):
    """A mishap the user can mend: its text says what came, what was wanted and how to mend it.

    fatal: it would befall every other video too (weights that do not fit, a full disk), so a run stops at it.
    """

    fatal = False


def printable(text: str) -> str:
    """A stranger's text without what would steer a terminal or break its line."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


def plain(tree: Any) -> Any:
    """The tree for JSON that every reader takes: no NaN or infinity (null then), paths as text, text as UTF-8."""
    if isinstance(tree, dict):
        return {plain(str(key)): plain(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [plain(value) for value in tree]
    if isinstance(tree, float) and not isfinite(tree):
        return None
    # the name of a file may hold bytes that are no text
    return str(tree).encode("utf-8", "replace").decode() if isinstance(tree, str | PurePath) else tree


def lookup(table: Mapping[str, str], name: str, kind: str) -> Any:
    """The object a name stands for, imported only now.

    `table` maps names to "package.module:Attribute"; any such path works as a name too, so a user's own
    encoder needs no line in the project. Raises VacliError that lists the known names.
    """
    path = table.get(name, name)
    module, _, attribute = path.partition(":")
    if not attribute:
        raise VacliError(
            f"unknown {kind} {name!r}; known: {', '.join(sorted(table))}; or your own as package.module:Name"
        )
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as e:
        raise VacliError(f"{kind} {name!r} cannot be imported: {e}; wanted package.module:Name") from e
