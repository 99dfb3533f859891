"""Stop the program at every storage call of one history, in every way a call can go wrong."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import cloudckpt
from cloudckpt import CheckpointManager, CloudCkptError, Settings, State
from cloudckpt.core import keys
from cloudckpt.storage import LocalStorage, MemoryStorage, Storage
from cloudckpt.testing import Crash, Fault, ScriptedStorage, check_store

FAST = Settings(retry_base_s=1e-5, retry_cap_s=1e-4, manifest_deadline_s=0.05, storage_deadline_s=0.05)
LOSSES = {1: 3.0, 2: 1.0, 3: 2.0, 4: 2.5, 5: 0.5}


def state_of(step: int) -> dict[str, object]:
    """Different bits at every step, in two components."""
    return {"model": {"w": torch.arange(64.0) * step}, "extra": {"bias": torch.full((7,), step), "step": step}}


class History:
    """One save/prune/restore/claim history, and what it was told had succeeded."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self.acknowledged: list[cloudckpt.Checkpoint] = []

    def run(self) -> None:
        """Live through it. What the store refuses is survived, as a training loop would; a crash is not."""
        with contextlib.suppress(Crash):
            self._first_job()
            self._second_job()

    def _try(self, act: Callable[[], object]) -> None:
        with contextlib.suppress(CloudCkptError):
            act()

    def _save(self, ckpts: CheckpointManager, step: int) -> None:
        def act() -> None:
            pending = ckpts.save(step, state_of(step), metrics={"loss": LOSSES[step]}, block=True)
            self.acknowledged.append(pending.checkpoint)

        self._try(act)

    def _first_job(self) -> None:
        ckpts = CheckpointManager(self.storage, monitor="loss", mode="min", keep_best=1, keep_last=1, settings=FAST)
        try:
            self._try(lambda: ckpts.restore(state_of(0)))
            for step in (1, 2):
                self._save(ckpts, step)
            self._try(lambda: ckpts.report_metrics(2, {"accuracy": 0.5}))
            self._save(ckpts, 3)
            self._try(lambda: ckpts.pin(3))
        finally:
            self._try(ckpts.close)

    def _second_job(self) -> None:
        ckpts = CheckpointManager(self.storage, settings=FAST)
        try:
            self._try(lambda: ckpts.restore(state_of(0), select="best"))
            self._save(ckpts, 4)
            self._try(lambda: ckpts.unpin(3))
            self._try(ckpts.prune)
            self._save(ckpts, 5)
            self._try(lambda: cloudckpt.gc(self.storage, dry_run=False))
        finally:
            self._try(ckpts.close)


def make_storage(kind: str, folder: Path) -> Storage:
    """An empty storage."""
    return MemoryStorage() if kind == "memory" else LocalStorage(folder)


def count_calls(storage: Storage) -> int:
    """How many requests the history makes when nothing goes wrong."""
    scripted = ScriptedStorage(storage)
    history = History(scripted)
    history.run()
    assert [c.step for c in history.acknowledged] == [1, 2, 3, 4, 5]
    return len(scripted.calls)


def check_every_object_is_named(storage: Storage, run: cloudckpt.Run) -> None:
    """No byte lies in a folder that the manifest does not name: announced before the upload, forgotten after the delete."""
    named = {c.id for c in run.checkpoints(state=None)}
    keys_there = [keys.parse(item.key) for item in storage.list("")]
    assert not [key.text for key in keys_there if key.id is not None and key.id not in named], "unnamed bytes (I7)"


def check_recovery(storage: Storage, history: History) -> None:
    """The store is consistent, nothing acknowledged and good is lost, and the next job goes on and settles the rest."""
    check_store(storage)
    run = cloudckpt.open(storage)
    check_every_object_is_named(storage, run)
    committed = {c.id: c for c in run.checkpoints()}
    if history.acknowledged:
        newest = history.acknowledged[-1]
        latest = run.latest()
        assert latest is not None
        assert latest.seq >= newest.seq, f"the newest acknowledged {newest.name} is not there (I5)"
        best_loss = min(c.metrics["loss"] for c in history.acknowledged)
        assert any(c.metrics["loss"] <= best_loss for c in committed.values()), "the best acknowledged is lost (I9)"
    for checkpoint in committed.values():
        loaded = run.load(checkpoint.name)
        assert torch.equal(loaded["model"]["w"], torch.arange(64.0) * checkpoint.step), "torn or mixed (I1)"
        assert loaded["extra"]["step"] == checkpoint.step

    fresh = state_of(0)
    with CheckpointManager(storage, monitor="loss", mode="min", keep_best=1, keep_last=1, settings=FAST) as ckpts:
        resumed = ckpts.restore(fresh)
        assert (resumed is not None) == bool(committed or ckpts.checkpoints())
        if resumed is not None:
            assert fresh["extra"] == {"bias": fresh["extra"]["bias"], "step": resumed.step}  # type: ignore[index]  # a dict
        ckpts.save(9, state_of(9), metrics={"loss": 9.0}, block=True)
    cloudckpt.gc(storage, dry_run=False)
    check_store(storage, settled=True)
    entries = cloudckpt.open(storage).checkpoints(state=None)
    assert {c.state for c in entries} == {State.COMMITTED}


@pytest.mark.parametrize("fault", list(Fault))
@pytest.mark.parametrize("kind", ["memory", "local"])
def test_the_store_survives_every_fault_at_every_call(kind: str, fault: Fault, tmp_path: Path) -> None:
    """Whatever call fails, and however, every invariant holds and the next writer can go on."""
    total = count_calls(make_storage(kind, tmp_path / "count"))
    assert total > 50
    failures = []
    for call in range(total):
        inner = make_storage(kind, tmp_path / f"run-{call}")
        scripted = ScriptedStorage(inner, call, fault)
        history = History(scripted)
        history.run()
        assert scripted.fired
        try:
            check_recovery(inner, history)
        except (AssertionError, CloudCkptError) as exc:
            failures.append(f"call {call} ({scripted.calls[call]}): {type(exc).__name__}: {exc}")
    assert not failures, f"{len(failures)} of {total}:\n" + "\n".join(failures)
