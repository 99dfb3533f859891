"""Conditional writes for stores that have none: look, compare, write. Good for one writer, and for no more.

Between the look and the write another *process* can write, and its work is then lost without anybody noticing. So
this is used only where the user has promised that there is a single writer.
"""

from __future__ import annotations

import os
import threading
from collections import defaultdict
from collections.abc import Callable

from cloudckpt.errors import ObjectNotFoundError, StorageError
from cloudckpt.storage.base import Landed, Lost, Outcome, Storage, Unknown, Versioned

__all__ = ["emulated_create", "emulated_replace"]

#: Threads of one process, at least, do not get between.
_locks: defaultdict[str, threading.RLock] = defaultdict(threading.RLock)
# A thread that held one when the process was forked does not exist in the child.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_locks.clear)


def _locked(storage: Storage, write: Callable[[], Outcome]) -> Outcome:
    with _locks[storage.url]:
        try:
            return write()
        except StorageError as exc:
            return Unknown(exc)


def _written(storage: Storage, key: str, body: bytes) -> Outcome:
    storage.put(key, [body], size_bytes=len(body))
    found = storage.read(key, limit_bytes=len(body) + 1)
    return Landed(found.version) if found.body == body else Lost(f"{key} was written by somebody else meanwhile")


def _found(storage: Storage, key: str) -> Versioned | None:
    try:
        return storage.read(key, limit_bytes=1 << 30)
    except ObjectNotFoundError:
        return None


def emulated_create(storage: Storage, key: str, body: bytes) -> Outcome:
    """Write a small object if nothing has this key; three requests."""

    def write() -> Outcome:
        return Lost(f"{key} exists") if _found(storage, key) is not None else _written(storage, key, body)

    return _locked(storage, write)


def emulated_replace(storage: Storage, key: str, body: bytes, *, expecting: str) -> Outcome:
    """Replace a small object if its version is ``expecting``; three requests."""

    def write() -> Outcome:
        found = _found(storage, key)
        if found is None or found.version != expecting:
            return Lost(f"{key} is at version {found.version if found else 'none: it is gone'}")
        return _written(storage, key, body)

    return _locked(storage, write)
