"""The thin shell: the verbs of a store, and the one loop that writes the manifest. fsspec is imported here only."""

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
from cloudckpt.storage.urls import open_storage

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
    "utc_now",
]
