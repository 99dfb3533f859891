"""Where a run lies, for objects that DCP may send to another process before they are used."""

from __future__ import annotations

import os
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cloudckpt.config import Settings
from cloudckpt.storage import ManifestStore, Storage, open_storage

__all__ = ["Place", "Root"]

Root = str | os.PathLike[str] | Storage


@dataclass(slots=True)
class Place:
    """A run's root, opened when it is first needed: what goes to another process is not."""

    root: Root
    options: Mapping[str, object] | None
    settings: Settings | None
    _finalizers: dict[int, Any] = field(default_factory=dict)

    def open(self, owner: object, **words: Any) -> ManifestStore:
        """Open it, for as long as ``owner`` lives at most."""
        storage = open_storage(self.root, storage_options=self.options, settings=self.settings)
        store = ManifestStore(storage, self.settings, **words)
        if storage is not self.root:
            self._finalizers[id(store)] = weakref.finalize(owner, storage.close)
        return store

    def close(self, store: ManifestStore) -> None:
        """Give connections and threads back, unless the storage is the caller's own."""
        if finalizer := self._finalizers.pop(id(store), None):
            finalizer()
