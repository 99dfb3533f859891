"""Pause the program before every storage call of one history, and let somebody else do something there.

Whoever reads, edits, collects garbage or takes over between two calls of a writer meets a run that is whole; and the
writer goes on, or is told, however the run was changed under it.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

import cloudckpt
from cloudckpt import CheckpointManager, CheckpointNotFoundError, CloudCkptError, Settings, editing
from cloudckpt.repairing import repair_run
from cloudckpt.storage import ManifestStore, MemoryStorage, Storage
from cloudckpt.sweeping import gc_run, sweep_run
from cloudckpt.testing import Crash, Fault, History, ScriptedStorage, check_recovery, check_store
from cloudckpt.verifying import verify_run
from tests.records import Recording

#: Nothing is refused here, so nobody waits; and however long the others take, no writer gives up for it.
FAST = Settings(retry_base_s=1e-5, retry_cap_s=1e-4, manifest_deadline_s=60, storage_deadline_s=60)

#: Steps of whoever takes over, which the history does not reach.
OTHERS = 100


class Pausing(ScriptedStorage):
    """A storage that lets somebody else act before a call; what the other does goes past it.

    Args:
        inner: the run.
        act: what is done; how it failed is in ``failures``.
        at: before which call, from 0; None for every one.
    """

    def __init__(self, inner: Storage, act: Callable[[], object], at: int | None = None) -> None:
        super().__init__(inner)
        self._act = act
        self._moment = at
        self._one = threading.Lock()
        self.pauses = 0
        self.failures: list[Exception] = []

    def _begin(self, verb: str, *keys: str) -> Fault | None:
        with self._one:
            due = self._moment is None or (not self.pauses and len(self.calls) >= self._moment)
            self.pauses += due
            if due:
                self._let()  # nobody else's call goes on meanwhile
        return super()._begin(verb, *keys)

    def _let(self) -> None:
        try:
            self._act()
        except Exception as exc:  # the history survives errors of its store, and this is none
            self.failures.append(exc)


def state_of(step: int) -> dict[str, Any]:
    """What the history saves at a step."""
    return {"model": {"w": torch.arange(64.0) * step}, "extra": {"bias": torch.full((7,), step), "step": step}}


def read(storage: Storage) -> None:
    """An evaluator: the latest and the best, and every bit of them."""
    run = cloudckpt.open(storage, settings=FAST)
    for select in ("latest", "best"):
        with contextlib.suppress(CheckpointNotFoundError):  # nothing is committed yet
            found = run.load(select)
            step = found["extra"]["step"]
            assert torch.equal(found["model"]["w"], state_of(step)["model"]["w"]), "torn or mixed (I1)"
            assert torch.equal(found["extra"]["bias"], state_of(step)["extra"]["bias"])


def look(storage: Storage) -> None:
    """Every invariant holds now, and what a reader gets is whole."""
    check_store(storage)
    read(storage)


def test_at_every_moment_the_run_is_whole(record: Recording) -> None:
    """Before each call of the whole history every invariant holds, and a reader gets the bits of one save."""
    with record("a history of two jobs", "looked at before every call", "memory") as case:
        storage = MemoryStorage()
        pausing = Pausing(storage, functools.partial(look, storage))
        history = History(pausing, FAST)
        history.run()
        assert not pausing.failures, pausing.failures[0]
        assert [c.step for c in history.acknowledged] == [1, 2, 3, 4, 5]
        assert pausing.pauses == len(pausing.calls) > 50
        check_recovery(storage, history, FAST)
        case.points = pausing.pauses


def edit(storage: Storage) -> None:
    """A person: pins what is best, adds a metric, and takes the pin away again."""
    store = ManifestStore(storage, FAST)
    with contextlib.suppress(CloudCkptError):
        name = editing.pin(store, "best").name
        editing.report_metrics(store, name, {"accuracy": 0.25})
        editing.pin(store, name, pinned=False)


def mark(storage: Storage) -> None:
    """A person marks the newest, and takes the mark away again."""
    store = ManifestStore(storage, FAST)
    with contextlib.suppress(CloudCkptError):
        name = editing.mark(store, "latest", "odd").name
        editing.mark(store, name, None)


def collect(storage: Storage) -> None:
    """A person collects garbage, and sweeps."""
    with contextlib.suppress(CheckpointNotFoundError):
        gc_run(ManifestStore(storage, FAST), dry_run=False)
        sweep_run(ManifestStore(storage, FAST), dry_run=False)


def verify(storage: Storage) -> None:
    """A person verifies every byte, and finds nothing."""
    with contextlib.suppress(CheckpointNotFoundError):
        assert verify_run(ManifestStore(storage, FAST), deep=True).findings == ()


def take_over(storage: Storage) -> None:
    """Another job claims the run, resumes, saves, and ends."""
    with CheckpointManager(storage, settings=FAST, monitor="loss", mode="min", keep_best=1, keep_last=1) as ckpts:
        ckpts.restore(state_of(0))
        ckpts.save(OTHERS, state_of(OTHERS), metrics={"loss": 10.0}, block=True)


def claim_and_die(storage: Storage) -> None:
    """Another job claims the run, announces a save, uploads it, and is gone before it commits (its seventh call)."""
    dying = ScriptedStorage(storage, 6, Fault.CRASH_BEFORE)
    ckpts = CheckpointManager(dying, settings=FAST, monitor="loss", mode="min", keep_best=1, keep_last=1)
    try:
        with contextlib.suppress(CloudCkptError, Crash):
            ckpts.save(OTHERS, state_of(OTHERS), metrics={"loss": 10.0}, block=True)
    finally:
        with contextlib.suppress(CloudCkptError, Crash):
            ckpts.close()
    assert dying.dead


def mend(storage: Storage) -> None:
    """A person repairs a run that needs none: whoever writes it is fenced, and nothing is lost."""
    with contextlib.suppress(CheckpointNotFoundError):
        repair_run(ManifestStore(storage, FAST), dry_run=False)


#: What somebody else does, and whether it fences the history's own jobs.
ACTS: dict[str, tuple[Callable[[Storage], None], bool]] = {
    "labels and metrics": (edit, False),
    "a mark, and none": (mark, False),
    "gc and sweep": (collect, False),
    "verify": (verify, False),
    "a whole job": (take_over, True),
    "a job that dies": (claim_and_die, True),
    "a repair": (mend, True),
}


def disturb(name: str, stride: int) -> int:
    """Let somebody do it before every ``stride``-th call of the history; how many moments those were."""
    act, fences = ACTS[name]
    plain = ScriptedStorage(MemoryStorage())
    History(plain).run()
    failures = []
    moments = range([*ACTS].index(name) % stride, len(plain.calls), stride)
    for at in moments:
        storage = MemoryStorage()
        pausing = Pausing(storage, functools.partial(act, storage), at)
        history = History(pausing, FAST)
        try:
            history.run()
            assert pausing.pauses == 1
            assert not pausing.failures, f"the other one failed: {pausing.failures}"
            if not fences:
                assert [c.step for c in history.acknowledged] == [1, 2, 3, 4, 5], "a save failed"
            # A replaced writer's bytes may land in a folder that nobody names any more; gc finds them.
            check_recovery(storage, history, FAST, late=fences)
        except (AssertionError, CloudCkptError) as exc:
            failures.append(f"before call {at} ({plain.calls[at]}): {type(exc).__name__}: {exc}")
    assert not failures, f"{name}: {len(failures)} of {len(moments)}:\n" + "\n".join(failures)
    return len(moments)


@pytest.mark.parametrize("name", ACTS)
def test_somebody_else_between_two_calls(name: str, record: Recording) -> None:
    """A sample of the moments: no save fails by an editor, and nothing good is lost by anybody."""
    with record("a history of two jobs", f"in between: {name}", "memory") as case:
        case.points = disturb(name, 4)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", ACTS)
def test_somebody_else_between_any_two_calls(name: str, record: Recording) -> None:
    """Every moment of the history."""
    with record("a history of two jobs", f"in between: {name}", "memory") as case:
        case.points = disturb(name, 1)
