"""What the ranks of a job do when it is told to stop: each function runs on every rank."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import torch
import torch.distributed as dist

from cloudckpt import CheckpointManager, PerRank, PreemptionGuard, RankError, SaveError, StorageError
from tests.distributed.scenarios import QUICK

STEPS = 60


def state_of(step: int) -> dict[str, Any]:
    """A state whose every bit follows from its step and the rank."""
    return {"own": PerRank(torch.full((1000,), float(step))), "all": torch.full((1000,), float(step))}


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def stop_together(root: str, told: list[int], at: int) -> dict[str, Any]:
    """Some ranks get a signal in the middle of a step; every step has a collective of the training's own."""
    rank = dist.get_rank()
    signals = {"SIGUSR1": 100}
    with PreemptionGuard(signals=signals, settings=QUICK) as guard, CheckpointManager(root, settings=QUICK) as ckpts:
        for step in range(STEPS):
            dist.barrier()
            if rank in told and step == at:
                os.kill(os.getpid(), signal.SIGUSR1)
            if guard.should_stop(step):
                left_s = guard.left_s
                pending = ckpts.save(step, state_of(step), deadline_s=left_s)
                return {"step": step, "left_s": left_s, "reason": guard.reason, "id": pending.checkpoint.id}
    raise AssertionError("nobody stopped")


def stop_without_one(root: str, victim: int) -> dict[str, Any]:
    """A rank is killed, and the others are then told to stop: what they hear, and how soon."""
    rank = dist.get_rank()
    guard = PreemptionGuard(signals={"SIGUSR1": 100}, settings=QUICK).start()
    ckpts = CheckpointManager(root, settings=QUICK)
    ckpts.save(0, state_of(0)).wait(30)
    assert not guard.should_stop(0)
    dist.barrier()
    if rank == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGUSR1)
    began, stopping, saving = time.monotonic(), "", ""
    try:
        guard.should_stop(1)
    except RankError as exc:
        stopping = _said(exc)
    try:
        ckpts.save(1, state_of(1), deadline_s=15.0)
    except RankError as exc:
        saving = _said(exc)
    took = time.monotonic() - began
    try:
        ckpts.close()
    except RankError as exc:
        saving += _said(exc)
    guard.close()
    return {"stopping": stopping, "saving": saving, "took": took}


def decline_together(root: str, slow: int) -> dict[str, Any]:
    """One rank's saves have been slow: none of them begins another one."""
    with CheckpointManager(root, settings=QUICK) as ckpts:
        ckpts.save(0, state_of(0), block=True)
        if dist.get_rank() == slow:
            saver: Any = ckpts._saver
            saver._hurrying.note(1, 1000.0)
        pending = ckpts.save(1, state_of(1), deadline_s=100.0)
        return {"phase": pending.progress.phase}


def hurry_on_one(root: str) -> dict[str, Any]:
    """One rank saves with a deadline, the others without: they are told, before anything is written."""
    said = ""
    with CheckpointManager(root, settings=QUICK) as ckpts:
        try:
            ckpts.save(0, state_of(0), block=True, deadline_s=100.0 if dist.get_rank() else None)
        except RankError as exc:
            said = _said(exc)
    return {"said": said}


def absent(root: str, late: int) -> dict[str, Any]:
    """One rank comes too late to a save with a deadline: the others are told when that is over, and it the same."""
    said = ""
    ckpts = CheckpointManager(root, settings=QUICK)
    ckpts.save(0, state_of(0), block=True)
    if dist.get_rank() == late:
        dist.barrier()
    try:
        ckpts.save(1, state_of(1), deadline_s=5.0)
    except RankError as exc:
        said = _said(exc)
    if dist.get_rank() != late:
        dist.barrier()
    ckpts.save(2, state_of(2), block=True)
    ckpts.close()
    return {"said": said}


def hurry_after_a_failure(root: str, victim: int, fits: bool) -> dict[str, Any]:
    """A save fails on one rank, and nobody waits for it; then there is one against a deadline, and the end."""
    ckpts = CheckpointManager(root, settings=QUICK)
    ckpts.save(0, state_of(0), block=True)
    storage: Any = ckpts._store.unretried
    put = storage.put

    def failing(key: str, *_: Any, **__: Any) -> None:
        raise StorageError(f"{key}: the disk is on fire")

    if dist.get_rank() == victim:
        storage.put = failing
    ckpts.save(1, state_of(1)).wait_quietly()
    storage.put = put
    if not fits:
        saver: Any = ckpts._saver
        saver._hurrying.note(1, 1000.0)
    said, pending = "", ckpts.save(2, state_of(2), deadline_s=100.0)
    try:
        ckpts.close()
    except SaveError as exc:
        said = _said(exc)
    return {"declined": pending.progress.phase == "declined", "said": said}
