"""One history of a run, small and with everything in it, and what must hold after any of it went wrong.

Two jobs save, prune, report late metrics, pin, restore, collect garbage. Whatever fails on the way, ``check_recovery``
says whether the promises held and whether the next job can go on. The crash suites stop it at every call; a storage
of your own deserves the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch

import cloudckpt
from cloudckpt import CheckpointManager, CloudCkptError, Settings, State
from cloudckpt.core import keys
from cloudckpt.storage import Storage
from cloudckpt.testing.invariants import check_store
from cloudckpt.testing.scripted import Crash

__all__ = ["History", "check_recovery"]

_FAST = Settings(retry_base_s=1e-5, retry_cap_s=1e-4, manifest_deadline_s=0.05, storage_deadline_s=0.05)
_LOSSES = {1: 3.0, 2: 1.0, 3: 2.0, 4: 2.5, 5: 0.5}


def _state_of(step: int) -> dict[str, object]:
    """Different bits at every step, in two components."""
    return {"model": {"w": torch.arange(64.0) * step}, "extra": {"bias": torch.full((7,), step), "step": step}}


class History:
    """One save, prune, restore and claim history, and what it was told had succeeded.

    Args:
        storage: where it happens; usually one that fails on purpose.
        settings: deadlines; short ones by default, for storages that answer at once.

    Attributes:
        acknowledged: the checkpoints whose saves were reported as committed, oldest first.
    """

    def __init__(self, storage: Storage, settings: Settings = _FAST) -> None:
        self.storage = storage
        self._settings = settings
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
            pending = ckpts.save(step, _state_of(step), metrics={"loss": _LOSSES[step]}, block=True)
            self.acknowledged.append(pending.checkpoint)

        self._try(act)

    def _first_job(self) -> None:
        ckpts = CheckpointManager(
            self.storage, monitor="loss", mode="min", keep_best=1, keep_last=1, settings=self._settings
        )
        try:
            self._try(lambda: ckpts.restore(_state_of(0)))
            for step in (1, 2):
                self._save(ckpts, step)
            self._try(lambda: ckpts.report_metrics(2, {"accuracy": 0.5}))
            self._save(ckpts, 3)
            self._try(lambda: ckpts.pin(3))
        finally:
            self._try(ckpts.close)

    def _second_job(self) -> None:
        ckpts = CheckpointManager(self.storage, settings=self._settings)
        try:
            self._try(lambda: ckpts.restore(_state_of(0), select="best"))
            self._save(ckpts, 4)
            self._try(lambda: ckpts.unpin(3))
            self._try(ckpts.prune)
            self._save(ckpts, 5)
            self._try(lambda: cloudckpt.gc(self.storage, dry_run=False, settings=self._settings))
        finally:
            self._try(ckpts.close)


def _check_every_object_is_named(storage: Storage, run: cloudckpt.Run) -> None:
    """No byte lies in a folder that the manifest does not name: it is announced before the upload."""
    named = {c.id for c in run.checkpoints(state=None)}
    keys_there = [keys.parse(item.key) for item in storage.list("")]
    assert not [key.text for key in keys_there if key.id is not None and key.id not in named], "unnamed bytes (I7)"


def check_recovery(storage: Storage, history: History, settings: Settings = _FAST, *, late: bool = False) -> None:
    """The store is consistent, nothing acknowledged and good is lost, and the next job goes on and settles the rest.

    Args:
        storage: the run as it was left; past whatever failed.
        history: what was lived through there.
        settings: deadlines of the next job.
        late: whether a request landed after its caller had given up. It can leave bytes in a folder that was named and
            is named no more, which the next ``gc`` finds; otherwise there are none of the kind at any time.
    """
    check_store(storage)
    run = cloudckpt.open(storage)
    if not late:
        _check_every_object_is_named(storage, run)
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

    fresh = _state_of(0)
    with CheckpointManager(storage, monitor="loss", mode="min", keep_best=1, keep_last=1, settings=settings) as ckpts:
        resumed = ckpts.restore(fresh)
        assert (resumed is not None) == bool(committed or ckpts.checkpoints())
        if resumed is not None:
            assert fresh["extra"] == {"bias": fresh["extra"]["bias"], "step": resumed.step}  # type: ignore[index]  # a dict
        ckpts.save(9, _state_of(9), metrics={"loss": 9.0}, block=True)
    cloudckpt.gc(storage, dry_run=False, settings=settings)
    check_store(storage, settled=True)
    entries = cloudckpt.open(storage).checkpoints(state=None)
    assert {c.state for c in entries} == {State.COMMITTED}
