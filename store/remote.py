"""Stores elsewhere than on a disk: any fsspec URL, through a local cache that is an ordinary store."""

from __future__ import annotations

from pathlib import Path

from .place import Place


def place_of(place: str | Path) -> Place:
    """The place behind a folder or a URL (s3://bucket/features.zarr)."""
    return Place(Path(place))
