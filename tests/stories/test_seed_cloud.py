"""What an object store adds to the ways of failing (the C numbers of docs/seed-scenarios.md).

Here on storage in memory, whose faults are exact; the crash suite tries every call of a longer history.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import pytest
import torch

import cloudckpt
from cloudckpt import (
    CheckpointManager,
    CorruptCheckpointError,
    FencedError,
    SaveError,
    Settings,
    State,
    StorageError,
)
from cloudckpt.core import keys
from cloudckpt.storage import MemoryStorage, Outcome, Storage
from cloudckpt.testing import Call, Crash, Fault, ScriptedStorage, check_store

_T = TypeVar("_T")

FAST = Settings(retry_base_s=1e-5, retry_cap_s=1e-4)
WAIT_S = 60
LOSSES = {1: 3.0, 2: 1.0, 3: 2.0, 4: 2.5}


def state_of(step: int) -> dict[str, Any]:
    """A state whose every bit follows from its step."""
    return {"model": {"w": torch.full((5,), float(step))}, "extra": {"b": torch.full((3,), -float(step))}}


def same(state: dict[str, Any], step: int) -> bool:
    """Whether a state is that of this step, bit for bit."""
    want = state_of(step)
    return torch.equal(state["model"]["w"], want["model"]["w"]) and torch.equal(state["extra"]["b"], want["extra"]["b"])


def steps(run: Any) -> list[int]:
    """The committed steps, oldest first."""
    return [c.step for c in run.checkpoints()]


def run_of(*losses: float, keep_last: int = 2, keep_best: int = 1) -> MemoryStorage:
    """A closed run with steps 1, 2, ... of these losses."""
    storage = MemoryStorage()
    with CheckpointManager(storage, monitor="loss", mode="min", keep_last=keep_last, keep_best=keep_best) as ckpts:
        for step, loss in enumerate(losses, 1):
            ckpts.save(step, state_of(step), metrics={"loss": loss}, block=True)
    return storage


# -- C1 to C4: crashes at the four seams of a save ----------------------------------------------------------------


def calls_of_the_second_save() -> list[tuple[int, Call]]:
    """What the second save of a run requests, each with its number; the best and the newest are 1, then 2."""
    probe = ScriptedStorage(MemoryStorage())
    with CheckpointManager(probe, keep_last=1) as ckpts:
        ckpts.save(1, state_of(1), block=True)
        first = len(probe.calls)
        ckpts.save(2, state_of(2), block=True)
        return list(enumerate(probe.calls))[first:]


@pytest.mark.parametrize(
    ("number", "call", "fault", "left", "resumed_step"),
    [
        ("C1", "the announce", Fault.CRASH_AFTER, {1: State.COMMITTED, 2: State.PENDING}, 1),
        ("C2", "the index", Fault.CRASH_AFTER, {1: State.COMMITTED, 2: State.PENDING}, 2),
        ("C3", "the commit", Fault.CRASH_AFTER, {1: State.RETIRED, 2: State.COMMITTED}, 2),
        ("C4", "the delete", Fault.CRASH_HALF, {1: State.RETIRED, 2: State.COMMITTED}, 2),
    ],
)
def test_c1_to_c4_a_crash_at_each_seam_of_a_save(
    number: str, call: str, fault: Fault, left: dict[int, State], resumed_step: int
) -> None:
    """C1, C2, C3, C4: dead after the announce, the index, the commit, or in mid-delete: a reader sees whole ones only, and the next start settles it."""
    announce, model, extra, index, commit, delete, _ = calls_of_the_second_save()
    at = {"the announce": announce, "the index": index, "the commit": commit, "the delete": delete}[call][0]
    assert (model[1].verb, extra[1].verb) == ("put", "put")
    inner = MemoryStorage()
    dying = CheckpointManager(ScriptedStorage(inner, at, fault), keep_last=1)
    dying.save(1, state_of(1), block=True)
    with pytest.raises(Crash):
        dying.save(2, state_of(2), block=True)
        dying.close()
    with contextlib.suppress(Crash):
        dying.close()
    run = cloudckpt.open(inner)
    assert {c.step: c.state for c in run.checkpoints(state=None)} == left
    check_store(inner)
    assert cloudckpt.verify(inner, deep=True).ok
    state = state_of(0)
    with CheckpointManager(inner, keep_last=1) as ckpts:
        resumed = ckpts.restore(state)
        assert resumed is not None
        assert resumed.step == resumed_step
        assert same(state, resumed_step)
        ckpts.save(3, state_of(3), block=True)
    check_store(inner, settled=True)


# -- C5, C6: answers that do not come ---------------------------------------------------------------------------------


class Busy(ScriptedStorage):
    """Call number ``at`` is answered with a 503 and not carried out; asked again, it works."""

    def __init__(self, inner: Storage, at: int) -> None:
        super().__init__(inner, at, Fault.REFUSED)

    def _do(self, fault: Fault | None, verb: Callable[[], _T], *, half: Callable[[], object] | None = None) -> _T:
        if fault is not None:
            raise StorageError("503 SlowDown", retryable=True)
        return super()._do(fault, verb, half=half)


def live(storage: Storage) -> list[int]:
    """A job, its restart, a sweep and a gc; the steps whose save was told to have failed."""
    failed = []

    def save(ckpts: CheckpointManager, step: int) -> None:
        try:
            ckpts.save(step, state_of(step), metrics={"loss": LOSSES[step]}, block=True)
        except SaveError:
            failed.append(step)

    with CheckpointManager(storage, monitor="loss", mode="min", keep_last=1, keep_best=1, settings=FAST) as ckpts:
        assert ckpts.restore(state_of(0)) is None
        for step in (1, 2, 3):
            save(ckpts, step)
    with CheckpointManager(storage, settings=FAST) as ckpts:
        assert ckpts.restore(state_of(0), select="best") is not None
        save(ckpts, 4)
        ckpts.report_metrics(4, {"accuracy": 0.5})
        ckpts.prune()
    return failed


def step_of_put(call: Call) -> int | None:
    """The step whose upload a call is part of."""
    return keys.parse(call.keys[0]).step if call.verb == "put" else None


@pytest.mark.parametrize("kind", ["C5 busy", "C6 answer lost"])
def test_c5_c6_one_503_or_one_lost_answer_at_any_request_is_not_felt(kind: str) -> None:
    """C5, C6: whichever request it hits, training goes on: only an upload's own save is told to have failed, and the store is whole."""
    probe = ScriptedStorage(MemoryStorage())
    assert live(probe) == []
    assert steps(cloudckpt.open(probe.inner)) == [2, 4]
    for at, call in enumerate(list(probe.calls)):
        inner = MemoryStorage()
        storage = Busy(inner, at) if kind == "C5 busy" else ScriptedStorage(inner, at, Fault.ANSWER_LOST)
        failed = live(storage)
        assert storage.fired
        step = step_of_put(call)
        assert failed == ([] if step is None else [step]), f"{call} at {at}"
        if step is None:
            assert steps(cloudckpt.open(inner)) == [2, 4], f"{call} at {at}"
        check_store(inner, settled=True)


# -- C8, C13: two processes -------------------------------------------------------------------------------------------


def test_c8_of_two_managers_the_later_goes_on_and_nothing_is_lost() -> None:
    """C8: the earlier manager stops with an error that names both; every committed checkpoint of both is whole."""
    storage = MemoryStorage()
    first = CheckpointManager(storage, keep_last=None)
    first.save(1, state_of(1), block=True)
    with CheckpointManager(storage) as second:
        assert second.restore(state_of(0)) is not None
        with pytest.raises(FencedError, match="this process is writer 1 of the run and was replaced by writer 2"):
            first.save(2, state_of(2), block=True)
        second.save(2, state_of(20), block=True)
        with pytest.raises(FencedError):
            first.save(3, state_of(3), block=True)
        second.save(3, state_of(30), block=True)
    first.close()
    run = cloudckpt.open(storage)
    assert steps(run) == [1, 2, 3]
    assert [same(run.load(step), value) for step, value in {1: 1, 2: 20, 3: 30}.items()] == [True] * 3
    check_store(storage, settled=True)


class Sleepy:
    """A process's own view of a store: it falls asleep before, or after, one certain request, until it is woken."""

    def __init__(self) -> None:
        self.asleep, self.wake = threading.Event(), threading.Event()

    def sleep(self) -> None:
        """Until somebody wakes it."""
        self.asleep.set()
        assert self.wake.wait(WAIT_S)


class Through(ScriptedStorage):
    """Falls asleep at the request that ``when`` chooses: ``before`` it is sent, or after it was carried out."""

    def __init__(self, inner: Storage, when: Callable[[str, str], bool], *, before: bool) -> None:
        super().__init__(inner)
        self.nap = Sleepy()
        self._when = when
        self._before = before

    def put(self, key: str, *args: Any, **kwargs: Any) -> None:
        chosen = self._when("put", key)
        if chosen and self._before:
            self.nap.sleep()
        super().put(key, *args, **kwargs)
        if chosen and not self._before:
            self.nap.sleep()

    def replace(self, key: str, body: bytes, *, expecting: str) -> Outcome:
        return super().replace(key, body, expecting=expecting)


def test_c13_a_process_that_wakes_in_mid_upload_commits_nothing_and_deletes_nothing() -> None:
    """C13: asleep before its last payload object while another job takes over: fenced, no DELETE, its late bytes are garbage that gc finds."""
    inner = run_of(0.5)
    view = Through(inner, lambda _, key: key.split("/")[-1].startswith("extra"), before=True)
    old = CheckpointManager(view)
    assert old.restore(state_of(0)) is not None
    pending = old.save(2, state_of(2), metrics={"loss": 0.1})
    assert view.nap.asleep.wait(WAIT_S)
    with CheckpointManager(inner) as new:
        resumed = new.restore(state_of(0))
        assert resumed is not None
        assert resumed.step == 1
        new.save(2, state_of(20), metrics={"loss": 0.3}, block=True)
        view.nap.wake.set()
        with pytest.raises(FencedError, match="stop this process"):
            pending.wait(WAIT_S)
        old.close()
        assert view.counts()["delete"] == 0
        new.save(3, state_of(30), metrics={"loss": 0.4}, block=True)
    run = cloudckpt.open(inner)
    assert steps(run) == [1, 2, 3] or steps(run) == [2, 3]
    assert same(run.load(2), 20)
    late = f"{pending.checkpoint.name}/"
    assert [item.key for item in inner.list(late)], "the late bytes are there"
    check_store(inner)
    report = cloudckpt.gc(inner, dry_run=False)
    assert report.garbage is not None
    assert {keys.parse(o.key).id for o in report.garbage.orphans} == {pending.checkpoint.id}
    assert [*inner.list(late)] == []
    check_store(inner, settled=True)


def test_c13_a_process_whose_sealed_save_was_completed_for_it_has_succeeded() -> None:
    """C13: asleep between index and commit while another job rolls its save forward: the save succeeded, and it still sends no DELETE."""
    inner = run_of(0.5)
    view = Through(inner, lambda _, key: key.endswith(keys.INDEX_NAME), before=False)
    old = CheckpointManager(view, keep_last=1)
    assert old.restore(state_of(0)) is not None
    pending = old.save(2, state_of(2), metrics={"loss": 0.1})
    assert view.nap.asleep.wait(WAIT_S)
    with CheckpointManager(inner) as new:
        state = state_of(0)
        resumed = new.restore(state)
        assert resumed is not None
        assert resumed.step == 2
        assert same(state, 2)
        view.nap.wake.set()
        assert pending.wait(WAIT_S).step == 2
        assert view.counts()["delete"] == 0
        with pytest.raises(FencedError):
            old.save(3, state_of(3), block=True)
        old.close()
        assert view.counts()["delete"] == 0
        new.save(3, state_of(30), metrics={"loss": 0.3}, block=True)
    check_store(inner, settled=True)


# -- C10, C15, C17 ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["the whole folder", "one object"])
@pytest.mark.parametrize(("select", "gone", "then"), [("best", 1, 3), ("latest", 4, 3)])
def test_c10_an_object_removed_behind_our_back_is_noticed_and_stepped_over(
    what: str, select: str, gone: int, then: int
) -> None:
    """C10: the best, the newest, or one shard of it removed by hand: verify names it, restore takes the next one, the rules count without it."""
    storage = run_of(0.1, 0.5, 0.2, 0.3, keep_last=2)
    assert steps(cloudckpt.open(storage)) == [1, 3, 4]
    folder = cloudckpt.open(storage).select(gone).name
    victims = [item.key for item in storage.list(f"{folder}/")]
    removed = [key for key in victims if what == "the whole folder" or "/extra" in key]
    storage.delete(removed)
    assert {f.checkpoint.step for f in cloudckpt.verify(storage).findings} == {gone}
    state = state_of(0)
    with CheckpointManager(storage) as ckpts:
        with pytest.raises(CorruptCheckpointError):
            ckpts.restore(state, select=gone)
        assert same(state, 0)
        resumed = ckpts.restore(state, select=select)
        assert resumed is not None
        assert resumed.step == then
        assert same(state, then)
        for step, loss in {5: 0.6, 6: 0.7}.items():
            ckpts.save(step, state_of(step), metrics={"loss": loss}, block=True)
        usable = [c.step for c in ckpts.checkpoints() if not c.damaged]
        assert usable == ([3, 5, 6] if gone == 1 else [1, 5, 6])


def test_c15_a_step_that_is_reached_again_is_newer_than_what_came_after_it() -> None:
    """C15: back to step 1 of 3 and on to 2 again: latest is the new 2, step 2 means the new one, and 3 is older than both."""
    storage = run_of(0.5, 0.4, 0.3, keep_last=3, keep_best=2)
    with CheckpointManager(storage) as ckpts:
        assert ckpts.restore(state_of(0), select=1) is not None
        ckpts.save(2, state_of(20), metrics={"loss": 0.45}, block=True)
        latest, best = ckpts.latest(), ckpts.best()
        assert latest is not None
        assert best is not None
        assert (latest.step, best.step) == (2, 3)
        assert latest.metrics["loss"] == 0.45
        assert same(ckpts.load(2), 20)
        assert [(c.step, c.metrics["loss"]) for c in ckpts.checkpoints()] == [(2, 0.4), (3, 0.3), (2, 0.45)]
    state = state_of(0)
    with CheckpointManager(storage) as ckpts:
        resumed = ckpts.restore(state)
        assert resumed is not None
        assert same(state, 20)
    check_store(storage, settled=True)


def test_c17_a_refusal_in_mid_upload_costs_that_save_only() -> None:
    """C17: credentials that expire in mid-upload fail the save at once by name; nothing is retried for minutes, and the next one works."""
    numbers = [at for at, call in calls_of_the_second_save() if call.verb == "put"]
    for at in numbers:
        inner = MemoryStorage()
        storage = ScriptedStorage(inner, at, Fault.REFUSED)
        with CheckpointManager(storage, keep_last=1) as ckpts:
            ckpts.save(1, state_of(1), block=True)
            with pytest.raises(SaveError, match=r"saving step 2 to .* failed at (upload|seal): call \d+ was refused"):
                ckpts.save(2, state_of(2), block=True)
            assert same(ckpts.load(), 1)
            ckpts.save(3, state_of(3), block=True)
            assert steps(ckpts) == [3]
        check_store(inner, settled=True)
