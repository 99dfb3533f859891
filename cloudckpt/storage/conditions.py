"""Who may write the manifest, and how: nothing is written with a condition that the store might ignore."""

from __future__ import annotations

from collections.abc import Callable

from cloudckpt.config import Settings
from cloudckpt.errors import StorageError, UnsafeStorageError
from cloudckpt.storage.base import Conditions, Outcome, Storage
from cloudckpt.storage.emulated import emulated_create, emulated_replace
from cloudckpt.storage.probe import probe
from cloudckpt.storage.retry import Backoff

__all__ = ["ConditionalWrites", "conditional_writes"]


class ConditionalWrites:
    """The two conditional verbs of a storage that was found to have them, or their emulation."""

    def __init__(self, storage: Storage, *, emulated: bool) -> None:
        self._storage = storage
        self._emulated = emulated

    def create(self, key: str, body: bytes) -> Outcome:
        """See ``Storage.create``."""
        return emulated_create(self._storage, key, body) if self._emulated else self._storage.create(key, body)

    def replace(self, key: str, body: bytes, *, expecting: str) -> Outcome:
        """See ``Storage.replace``."""
        if self._emulated:
            return emulated_replace(self._storage, key, body, expecting=expecting)
        return self._storage.replace(key, body, expecting=expecting)


def conditional_writes(
    storage: Storage, *, single_writer: bool, settings: Settings, tell: Callable[[str], None] = lambda _: None
) -> ConditionalWrites:
    """The conditional writes of a storage, after a probe where nobody vouches for them.

    Args:
        storage: as it is, without retries around it.
        single_writer: the user's promise that no two processes ever write; then emulation will do.
        settings: the deadline and pauses for a probe that meets trouble.
        tell: is given one sentence when the promise is what the run depends on.

    Raises:
        UnsafeStorageError: the store ignores conditions, or always refuses them.
        StorageError: the store could not be asked.
    """
    if storage.conditions is Conditions.UNPROVEN:
        storage.conditions = _asked(storage, settings)
    if storage.conditions is Conditions.HONOURED:
        return ConditionalWrites(storage, emulated=False)
    if not single_writer:
        raise UnsafeStorageError(
            f"{storage.url}: this store does not honour conditional writes, so two writers could destroy each other's "
            "checkpoints. Use a store that does (docs/providers.md lists them), or promise with single_writer=True "
            "that never more than one process writes to this run (pin, tag, gc and prune from elsewhere included)"
        )
    tell(f"{storage.url} has no conditional writes: safe only as long as no second process writes to this run")
    return ConditionalWrites(storage, emulated=True)


def _asked(storage: Storage, settings: Settings) -> Conditions:
    backoff = Backoff(deadline_s=settings.storage_deadline_s, base_s=settings.retry_base_s, cap_s=settings.retry_cap_s)
    refused_at_once = 0
    found = probe(storage)
    for pause in backoff.pauses():
        if found.conditions is not Conditions.UNPROVEN:
            return found.conditions
        if found.trouble is not None and not found.trouble.retryable:
            raise found.trouble
        if found.trouble is None:
            # A create under a name nobody else has was refused. Once, that is a lost answer; again, it is the store.
            refused_at_once += 1
            if refused_at_once == 3:
                return Conditions.ABSENT
        backoff.sleep(pause)
        found = probe(storage)
    raise found.trouble or StorageError(f"{storage.url}: the store could not be probed", retryable=True)
