"""The ground: Tracks, and the store that keeps them (numpy and zarr, never torch)."""

from .entry import Damaged
from .place import StoreError
from .recipe import Fingerprints, combine, digest, folder_name
from .store import Store
from .track import Track

__all__ = [
    "Damaged",
    "Fingerprints",
    "Store",
    "StoreError",
    "Track",
    "combine",
    "digest",
    "folder_name",
]
