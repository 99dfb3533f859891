"""The thin shell: the verbs of a store, and the one loop that writes the manifest. fsspec is imported here only."""

from cloudckpt.storage.base import Buffer, Landed, Listed, Lost, Outcome, Storage, Unknown, Versioned
from cloudckpt.storage.local import LocalStorage
from cloudckpt.storage.manifest_store import Held, ManifestStore, utc_now
from cloudckpt.storage.memory import MemoryStorage
from cloudckpt.storage.urls import open_storage

__all__ = [
    "Buffer",
    "Held",
    "Landed",
    "Listed",
    "LocalStorage",
    "Lost",
    "ManifestStore",
    "MemoryStorage",
    "Outcome",
    "Storage",
    "Unknown",
    "Versioned",
    "open_storage",
    "utc_now",
]
