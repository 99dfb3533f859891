"""How many requests each story makes: exact numbers, because somebody pays for each."""

from __future__ import annotations

from collections import Counter

import torch

import cloudckpt
from cloudckpt import CheckpointManager
from cloudckpt.storage import MemoryStorage
from cloudckpt.testing import ScriptedStorage


def state_of(step: int) -> dict[str, object]:
    """Two components with tensors, one without."""
    return {"model": {"w": torch.full((100,), float(step))}, "optimizer": {"m": torch.zeros(100)}, "epoch": 3}


def test_the_claim_of_a_new_run_looks_once_and_writes_once() -> None:
    """A new run costs one GET that finds nothing, one LIST that proves it is empty, and one conditional PUT."""
    storage = ScriptedStorage(MemoryStorage())
    ckpts = CheckpointManager(storage)
    assert ckpts.restore(state_of(0)) is None
    assert storage.counts() == {"read": 1, "list": 1, "create": 1}
    ckpts.close()


def test_the_claim_of_a_closed_run_reads_once_and_lists_nothing() -> None:
    """A clean claim is one GET and one conditional PUT."""
    inner = MemoryStorage()
    with CheckpointManager(inner) as first:
        first.save(1, state_of(1))
    storage = ScriptedStorage(inner)
    second = CheckpointManager(storage)
    second.save(2, state_of(2), block=True)
    assert storage.counts() == {"read": 1, "replace": 1 + 2, "put": 3}
    second.close()


def test_a_steady_save_is_its_payload_one_index_and_two_manifest_writes() -> None:
    """In the steady state a save makes no GET, no LIST, no HEAD: payload objects + 1 index + 2 manifest PUTs."""
    storage = ScriptedStorage(MemoryStorage())
    with CheckpointManager(storage, keep_last=None) as ckpts:
        ckpts.save(0, state_of(0), block=True)
        for step in range(1, 6):
            storage.forget()
            ckpts.save(step, state_of(step), block=True)
            assert storage.counts() == {"put": 2 + 1, "replace": 2}


def test_retention_adds_two_bulk_deletes_and_nothing_else() -> None:
    """A save that lets one checkpoint go deletes its payload in one request and its index in another."""
    storage = ScriptedStorage(MemoryStorage())
    with CheckpointManager(storage, keep_last=2) as ckpts:
        for step in range(3):
            ckpts.save(step, state_of(step), block=True)
        for step in range(3, 6):
            storage.forget()
            ckpts.save(step, state_of(step), block=True)
            assert storage.counts() == {"put": 3, "replace": 2, "delete": 2}


def test_a_copy_of_the_manifest_costs_one_request_every_twenty_revisions() -> None:
    """Over 100 saves the copies add one PUT, and from the third on one DELETE, per 20 revisions."""
    storage = ScriptedStorage(MemoryStorage())
    with CheckpointManager(storage, keep_last=None) as ckpts:
        ckpts.save(0, state_of(0), block=True)
        storage.forget()
        for step in range(1, 101):
            ckpts.save(step, state_of(step), block=True)
        assert storage.counts() == Counter(put=300, replace=200, create=10, delete=8)


def test_a_restore_reads_the_index_and_the_ranges() -> None:
    """A restore is its claim (1 GET, 1 PUT), 1 index, and one range per payload object; nothing is listed."""
    inner = MemoryStorage()
    with CheckpointManager(inner) as first:
        first.save(1, state_of(1))
    storage = ScriptedStorage(inner)
    second = CheckpointManager(storage)
    fresh = state_of(0)
    assert second.restore(fresh) is not None
    assert storage.counts() == {"read": 2, "replace": 1, "read_into": 2}
    second.close()


def test_a_reader_asks_for_the_manifest_once_a_question() -> None:
    """Finding the newest among many is one GET, and loading it one more for the index, then ranges."""
    inner = MemoryStorage()
    with CheckpointManager(inner, keep_last=None) as ckpts:
        for step in range(50):
            ckpts.save(step, state_of(step), block=True)
    storage = ScriptedStorage(inner)
    run = cloudckpt.open(storage)
    assert run.latest() is not None
    assert storage.counts() == {"read": 1}
    storage.forget()
    run.load("latest", components=["model"])
    assert storage.counts() == {"read": 2, "read_into": 1}


def test_an_edit_is_one_read_and_one_write() -> None:
    """A pin by a process that has seen nothing yet is 1 GET and 1 conditional PUT."""
    inner = MemoryStorage()
    with CheckpointManager(inner) as ckpts:
        ckpts.save(1, state_of(1))
    storage = ScriptedStorage(inner)
    CheckpointManager(storage).pin(1)
    assert storage.counts() == {"read": 1, "replace": 1}
