"""The ground: Tracks, and the store that keeps them (numpy and zarr, never torch)."""

from .recipe import Fingerprints, combine, digest, folder_name
from .store import Damaged, Store, StoreError
from .track import Track

__all__ = ["Damaged", "Fingerprints", "Store", "StoreError", "Track", "combine", "digest", "folder_name"]
