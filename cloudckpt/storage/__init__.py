"""The thin shell: the verbs of a store, and the one loop that writes the manifest. fsspec is imported here only.

What a module of it gives is imported when it is asked for: a look at a local run waits for no client of a store.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cloudckpt.storage.base import (
        Attested,
        Attesting,
        Buffer,
        Conditions,
        Connecting,
        Copying,
        Described,
        Governed,
        Landed,
        Listed,
        Lost,
        Outcome,
        Paced,
        Part,
        Source,
        Storage,
        Unknown,
        Versioned,
    )
    from cloudckpt.storage.body import Body
    from cloudckpt.storage.gcs import GCSStorage
    from cloudckpt.storage.generic import GenericFsspecStorage
    from cloudckpt.storage.local import LocalStorage
    from cloudckpt.storage.manifest_store import Held, ManifestStore, utc_now
    from cloudckpt.storage.memory import MemoryStorage
    from cloudckpt.storage.pulled import PulledFolder
    from cloudckpt.storage.retry import RetryingStorage
    from cloudckpt.storage.s3 import S3Storage
    from cloudckpt.storage.urls import open_storage, open_store

__all__ = [
    "Attested",
    "Attesting",
    "Body",
    "Buffer",
    "Conditions",
    "Connecting",
    "Copying",
    "Described",
    "GCSStorage",
    "GenericFsspecStorage",
    "Governed",
    "Held",
    "Landed",
    "Listed",
    "LocalStorage",
    "Lost",
    "ManifestStore",
    "MemoryStorage",
    "Outcome",
    "Paced",
    "Part",
    "PulledFolder",
    "RetryingStorage",
    "S3Storage",
    "Source",
    "Storage",
    "Unknown",
    "Versioned",
    "open_storage",
    "open_store",
    "utc_now",
]

_PLACES = {
    "Attested": "base",
    "Attesting": "base",
    "Body": "body",
    "Buffer": "base",
    "Conditions": "base",
    "Connecting": "base",
    "Copying": "base",
    "Described": "base",
    "GCSStorage": "gcs",
    "GenericFsspecStorage": "generic",
    "Governed": "base",
    "Held": "manifest_store",
    "Landed": "base",
    "Listed": "base",
    "LocalStorage": "local",
    "Lost": "base",
    "ManifestStore": "manifest_store",
    "MemoryStorage": "memory",
    "Outcome": "base",
    "Paced": "base",
    "Part": "base",
    "PulledFolder": "pulled",
    "RetryingStorage": "retry",
    "S3Storage": "s3",
    "Source": "base",
    "Storage": "base",
    "Unknown": "base",
    "Versioned": "base",
    "open_storage": "urls",
    "open_store": "urls",
    "utc_now": "manifest_store",
}


if not TYPE_CHECKING:  # to type checkers it would say that there is whatever name they meet

    def __getattr__(name: str) -> Any:
        if name in _PLACES:
            found = getattr(importlib.import_module(f"cloudckpt.storage.{_PLACES[name]}"), name)
            globals()[name] = found  # from now on without a question
            return found
        # cloudckpt.storage.s3, say, as if the module had been imported with this one.
        if name.isidentifier() and not name.startswith("_") and importlib.util.find_spec(f"{__name__}.{name}"):
            return importlib.import_module(f"{__name__}.{name}")
        raise AttributeError(f"module 'cloudckpt.storage' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
