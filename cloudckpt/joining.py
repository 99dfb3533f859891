"""Becoming the writer together: rank zero claims the run, the others make sure that it is the same one for them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

from cloudckpt.claiming import Claim
from cloudckpt.coordination import Coordinator
from cloudckpt.core import keys
from cloudckpt.errors import ConfigError, StorageError
from cloudckpt.storage import LocalStorage, ManifestStore

__all__ = ["claim_together"]


def claim_together(
    store: ManifestStore, coordinator: Coordinator, claim: Callable[[], Claim]
) -> tuple[Claim | None, int]:
    """Claim the run once for all ranks. Collective.

    Args:
        claim: takes the run, on rank zero.

    Returns:
        the claim, on rank zero only; and the writer's epoch.

    Raises:
        ConfigError: the root is a folder that not all ranks share.
        CloudCkptError: as ``claim`` raises, the same on every rank.
    """
    held: list[Claim] = []

    def claimed(words: Sequence[bytes]) -> list[bytes]:
        held.append(claim())
        return [json.dumps({"writer_epoch": held[0].writer_epoch}).encode()] * len(words)

    probe: bytes = b""
    word: bytes | BaseException = b""
    try:
        if coordinator.world_size > 1 and isinstance(store.unretried, LocalStorage):
            probe = coordinator.exchange("root", b"", lambda words: [_put_probe(store)] * len(words))
            word = _look_for(store, probe.decode())
        said = json.loads(coordinator.exchange("claim", word, claimed, patient=True))
    finally:
        if probe and coordinator.rank == 0:
            store.storage.delete([probe.decode()])
    return (held[0] if held else None), int(said["writer_epoch"])


def _put_probe(store: ManifestStore) -> bytes:
    key = f"{keys.PROBE_PREFIX}{store.token(8)}"
    store.storage.create(key, b"written by rank 0 to see whether all ranks share this folder\n")
    return key.encode()


def _look_for(store: ManifestStore, key: str) -> bytes | BaseException:
    try:
        store.storage.size(key)
    except StorageError:
        return ConfigError(
            f"{store.storage.url} is not the folder that rank 0 writes to: the ranks do not share this disk (or have "
            "different working directories). Use a folder on a file system that all nodes mount, or an object store "
            "(s3://..., gs://...), where nothing has to be shared"
        )
    return b""
