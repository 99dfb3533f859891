"""A checkpoint from one run into another: a save like any other at the target, and nothing else there is touched."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import cloudckpt
from cloudckpt import (
    CheckpointManager,
    CheckpointNotFoundError,
    ConfigError,
    ConflictError,
    CorruptCheckpointError,
    State,
    StorageError,
)
from cloudckpt.copying import copy_checkpoint
from cloudckpt.progress import Meter
from cloudckpt.pulling import pull_checkpoint
from cloudckpt.storage import ManifestStore, MemoryStorage, Storage
from cloudckpt.testing import check_store


def state_of(step: int) -> dict[str, Any]:
    """A state whose every bit follows from its step, in more than one object."""
    return {"model": {"w": torch.full((700_000,), float(step))}, "optimizer": {"m": torch.ones(3), "lr": 0.1}}


def saved(storage: Storage, *steps: int, **words: Any) -> ManifestStore:
    """A closed run with these steps, the lower the better."""
    with CheckpointManager(storage, monitor="loss", mode="min", keep_last=None, **words) as ckpts:
        for step in steps:
            ckpts.save(step, state_of(step), metrics={"loss": float(step)}, tags=[f"t{step}"], block=True)
    return ManifestStore(storage)


def test_the_copy_is_a_checkpoint_of_a_run_of_its_own() -> None:
    """State, step, metrics and tags come along; the new run ranks by the same metric, keeps all, and is closed."""
    source, there = saved(MemoryStorage("memory://one"), 1, 2, 3), MemoryStorage("memory://two")
    copied = copy_checkpoint(source, "best", ManifestStore(there), tags=["v1"])
    copy_checkpoint(source, 3, ManifestStore(there), pin=True)
    run = cloudckpt.open(there)
    assert [c.step for c in run.checkpoints()] == [1, 3]
    best = run.best()
    assert best is not None
    assert (best.step, best.tags, best.metrics) == (1, ("t1", "v1"), {"loss": 1.0})
    assert run.select(3).pinned
    assert torch.equal(run.load("best")["model"]["w"], state_of(1)["model"]["w"])
    assert copied.new_run
    assert copied.checkpoint.id != copied.source.id
    assert run.manifest().policy.keep_last is None
    owner = run.manifest().owner
    assert owner is not None
    assert owner.closed
    assert any(e.event == "copy" and copied.source.url in (e.detail or "") for e in run.journal())
    check_store(there, settled=True)
    check_store(source.unretried)


def test_a_dry_run_writes_nothing() -> None:
    """It says what would be copied, and whether the target is a new run."""
    source, there = saved(MemoryStorage("memory://one"), 1), MemoryStorage("memory://two")
    planned = copy_checkpoint(source, "latest", ManifestStore(there), dry_run=True)
    assert (planned.dry_run, planned.new_run, planned.source.step) == (True, True, 1)
    assert not [*there.list("")]


def test_a_target_goes_by_its_own_policy() -> None:
    """Copied into a run that keeps the last one: the older one goes with this commit, as a dry run said before."""
    source, there = saved(MemoryStorage("memory://one"), 1, 2), MemoryStorage("memory://two")
    with CheckpointManager(there, keep_last=1) as ckpts:
        ckpts.save(9, state_of(9), block=True)
    planned = copy_checkpoint(source, 2, ManifestStore(there), dry_run=True)
    done = copy_checkpoint(source, 2, ManifestStore(there))
    assert [c.id for c in planned.retired] == [c.id for c in done.retired]
    assert [c.step for c in done.retired] == [9]
    assert [c.step for c in cloudckpt.open(there).checkpoints()] == [2]
    check_store(there, settled=True)


def test_a_run_that_somebody_holds_is_refused_unless_it_is_taken_over() -> None:
    """A live trainer is never fenced by a copy; with takeover="last_wins" it is, and says so."""
    source, there = saved(MemoryStorage("memory://one"), 1), MemoryStorage("memory://two")
    ckpts = CheckpointManager(there)
    ckpts.save(5, state_of(5), block=True)
    with pytest.raises(ConflictError, match="is held by pid"):
        copy_checkpoint(source, 1, ManifestStore(there))
    ckpts.save(6, state_of(6), block=True)  # undisturbed
    copy_checkpoint(source, 1, ManifestStore(there), takeover="last_wins")
    with pytest.raises(ConflictError):
        ckpts.save(7, state_of(7), block=True)
    with contextlib.suppress(ConflictError):
        ckpts.close()
    assert [c.step for c in cloudckpt.open(there).checkpoints()] == [5, 6, 1]


def test_onto_itself_and_from_nothing_are_refused() -> None:
    """The run itself is no target; a selector that means nothing, or a misspelled word, copies nothing."""
    source, there = saved(MemoryStorage("memory://one"), 1), MemoryStorage("memory://two")
    with pytest.raises(ConfigError, match="is the run that is copied from"):
        copy_checkpoint(source, 1, source)
    with pytest.raises(CheckpointNotFoundError):
        copy_checkpoint(source, 77, ManifestStore(there))
    with pytest.raises(ConfigError, match="takeover='refues'"):
        copy_checkpoint(source, 1, ManifestStore(there), takeover="refues")
    assert not [*there.list("")]


@pytest.mark.memory_only
def test_a_damaged_source_is_noticed_and_the_target_is_as_before() -> None:
    """Bytes that are not what was sealed: the copy fails by name, is let go at the target, and the next one works."""
    storage, there = MemoryStorage("memory://one"), MemoryStorage("memory://two")
    source = saved(storage, 1, 2)
    key = next(i.key for i in storage.list("checkpoint-2.") if "/model-" in i.key)
    body = bytearray(storage.read(key, limit_bytes=2**24).body)
    body[100_000] ^= 1
    storage.put(key, [bytes(body)], size_bytes=len(body))
    with pytest.raises(CorruptCheckpointError, match=key):
        copy_checkpoint(source, 2, ManifestStore(there))
    assert cloudckpt.open(there).checkpoints(state=None) == ()
    copy_checkpoint(source, 1, ManifestStore(there))
    assert [c.step for c in cloudckpt.open(there).checkpoints()] == [1]
    check_store(there, settled=True)


@pytest.mark.memory_only
@pytest.mark.parametrize("object_number", [0, 1, 2])
def test_a_copy_that_breaks_off_costs_nothing_but_itself(object_number: int) -> None:
    """Whichever object fails, the index included: nothing becomes visible, and the next copy goes through."""

    class Breaks(MemoryStorage):
        numbers = itertools.count()
        broken = True

        def put(self, key: str, *args: Any, **kwargs: Any) -> None:
            if "checkpoint-" in key and next(self.numbers) == object_number and self.broken:
                raise StorageError("the disk is full")
            super().put(key, *args, **kwargs)

    source, there = saved(MemoryStorage("memory://one"), 1), Breaks("memory://two")
    with pytest.raises(StorageError, match="the disk is full"):
        copy_checkpoint(source, 1, ManifestStore(there))
    run = cloudckpt.open(there)
    assert run.checkpoints() == ()
    assert not [e for e in run.checkpoints(state=None) if e.state is State.PENDING]
    there.broken = False
    copy_checkpoint(source, 1, ManifestStore(there))
    assert [c.step for c in run.checkpoints()] == [1]
    check_store(there, settled=True)


def test_from_a_pulled_folder_into_a_run(tmp_path: Path) -> None:
    """What was pulled, copied or marked included, goes back into a run."""
    source = saved(MemoryStorage(), 1, 2)
    folder = pull_checkpoint(source, 2, tmp_path).folder
    there = MemoryStorage()
    cloudckpt.import_folder(folder, there)
    run = cloudckpt.open(there)
    assert torch.equal(run.load()["model"]["w"], state_of(2)["model"]["w"])
    assert run.select(2).tags == ("t2",)


@pytest.mark.parametrize("kind", ["moto", "seaweedfs", "gcs"])
def test_one_store_copies_by_itself(new_storage: Callable[[str], Storage], kind: str) -> None:
    """Two runs in one bucket: not a byte of payload passes through this process, and the copy is whole."""
    source, there = saved(new_storage(kind), 1), new_storage(kind)
    copied = copy_checkpoint(source, 1, ManifestStore(there))
    assert copied.carried_bytes == 0
    assert copied.stored_bytes == sum(item.size_bytes for item in source.storage.list("") if "-of-" in item.key)
    check_store(there)


@pytest.mark.parametrize(("one", "two"), [("memory", "moto"), ("moto", "gcs"), ("gcs", "local"), ("local", "moto")])
def test_from_any_store_to_any_other(new_storage: Callable[[str], Storage], one: str, two: str) -> None:
    """The bytes are carried, each proven on the way, whatever the two stores are."""
    source, there = saved(new_storage(one), 1), new_storage(two)
    meter = Meter("copying")
    copied = copy_checkpoint(source, 1, ManifestStore(there), meter=meter)
    assert copied.stored_bytes == 0
    assert meter.transfer.bytes_done == meter.transfer.bytes_total == copied.carried_bytes
    check_store(there)
