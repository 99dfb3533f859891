"""``save(deadline_s=)``: what is in flight first, a new save only if it fits, no deletes; memory is the store.

(Past 350 lines: one option, and all that it must not do.)
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

import cloudckpt
from cloudckpt import (
    CheckpointManager,
    CommitUnknownError,
    ConfigError,
    FencedError,
    SaveError,
    Settings,
    State,
    StorageError,
)
from cloudckpt.editing import pin
from cloudckpt.events import Event, SaveDeclined
from cloudckpt.saving import hurrying
from cloudckpt.storage import ManifestStore, MemoryStorage, Outcome, Unknown
from cloudckpt.storage.base import Source, Storage
from cloudckpt.testing import Crash, Fault, ScriptedStorage, check_store

LONG_S = 1000.0


def state_of(step: int) -> dict[str, torch.Tensor]:
    """A state whose every bit follows from its step."""
    return {"w": torch.full((1000,), float(step))}


class Watched(MemoryStorage):
    """Memory with something that happens while a payload object is put, once its first bytes are sent."""

    def __init__(self) -> None:
        super().__init__()
        self.amid: Callable[[Source], object] = lambda _: None

    def put(self, key: str, buffers: Any, *, size_bytes: int, progress: Any = None) -> None:
        if isinstance(buffers, Source):
            self.amid(buffers)
        super().put(key, buffers, size_bytes=size_bytes, progress=progress)


def until_refused(source: Source) -> None:
    """As a slow line: byte after byte, until there are no more to be had."""
    while True:
        with source.hold(0, 1):
            pass


def slow(ckpts: CheckpointManager, seconds: float) -> None:
    """As if a save of this size had taken so long."""
    saver: Any = ckpts._saver
    saver._hurrying.note(10**9, seconds)


def unmeasured(ckpts: CheckpointManager) -> None:
    """As if no save had been made yet: on a loaded machine the first one may have taken longer than there is."""
    saver: Any = ckpts._saver
    saver._hurrying._paces.clear()


def refuse(_: Source) -> None:
    """As a disk on fire."""
    raise StorageError("the disk is on fire")


def steps(storage: Storage) -> list[int]:
    """What is committed."""
    return [c.step for c in cloudckpt.open(storage).checkpoints()]


def test_a_save_that_fits_is_committed_when_the_call_returns() -> None:
    """Nobody has to wait for it, and the next start resumes from it."""
    storage = MemoryStorage()
    with CheckpointManager(storage) as ckpts:
        ckpts.save(1, state_of(1))
        pending = ckpts.save(2, state_of(2), deadline_s=LONG_S)
        assert pending.done()
        assert pending.checkpoint.committed_at is not None
        assert pending.progress.phase in {"delete", "done"}
    assert steps(storage) == [1, 2]
    state = state_of(0)
    with CheckpointManager(storage) as ckpts:
        assert ckpts.restore(state) is not None
    assert torch.equal(state["w"], state_of(2)["w"])


def test_the_first_save_of_a_process_is_tried() -> None:
    """Nothing was measured; leaving it out would lose for certain what trying may keep."""
    storage = MemoryStorage()
    with CheckpointManager(storage) as ckpts:
        ckpts.save(1, state_of(1), deadline_s=LONG_S)
    assert steps(storage) == [1]


def test_a_save_that_would_not_fit_is_not_begun(caplog: pytest.LogCaptureFixture) -> None:
    """One warning with all numbers and the newest that is committed; whoever waits for it is told; close() is not."""
    caplog.set_level(logging.WARNING, logger="cloudckpt")
    storage, events = ScriptedStorage(MemoryStorage()), list[Event]()
    with CheckpointManager(storage, listeners=[events.append]) as ckpts:
        first = ckpts.save(1, state_of(1), block=True).checkpoint
        slow(ckpts, LONG_S)
        storage.forget()
        pending = ckpts.save(2, state_of(2), deadline_s=LONG_S)
        assert not storage.counts()
        assert pending.done()
        assert (pending.checkpoint.step, pending.progress.phase) == (2, "declined")
        with pytest.raises(SaveError, match=r"step 2 was not saved: .* of which 70% may be used"):
            pending.wait()
        pending.wait_staged()
        pending.wait_announced()
    (event,) = [event for event in events if isinstance(event, SaveDeclined)]
    assert event.last is not None
    assert event.last.id == first.id
    (line,) = [r.getMessage() for r in caplog.records]
    assert line.startswith("not saving step 2: ")
    assert "would take about 17 min by the slowest of the last saves" in line
    assert line.endswith(f"the newest is {first.url}")
    assert steps(storage) == [1]


def test_what_was_slow_is_forgotten_after_three_saves() -> None:
    """One slow night does not keep the run from saving for ever."""
    storage = MemoryStorage()
    with CheckpointManager(storage, keep_last=None) as ckpts:
        ckpts.save(0, state_of(0), block=True)
        slow(ckpts, LONG_S)
        for step in (1, 2, 3):
            ckpts.save(step, state_of(step), block=True)
        ckpts.save(4, state_of(4), deadline_s=LONG_S)
    assert steps(storage) == [0, 1, 2, 3, 4]


def test_a_deadline_that_has_come_begins_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """Zero seconds left, and nothing committed: the warning says both."""
    caplog.set_level(logging.WARNING, logger="cloudckpt")
    storage = MemoryStorage()
    with CheckpointManager(storage) as ckpts:
        assert ckpts.save(1, state_of(1), deadline_s=0).progress.phase == "declined"
    assert [r.getMessage() for r in caplog.records] == [
        "not saving step 1: its deadline has come; nothing was committed before it"
    ]
    assert steps(storage) == []


def test_the_save_in_flight_is_finished_first() -> None:
    """The new one is announced after the other one's commit, and both are there."""
    storage, go = Watched(), threading.Event()
    storage.amid = lambda _: go.wait(60)
    with CheckpointManager(storage) as ckpts, ThreadPoolExecutor(1) as pool:
        first = ckpts.save(1, state_of(1))
        first.wait_announced()
        second = pool.submit(ckpts.save, 2, state_of(2), deadline_s=LONG_S)
        assert not first.done()
        go.set()
        assert second.result(60).checkpoint.seq > first.wait(60).seq
    assert steps(storage) == [1, 2]


def test_a_save_that_is_still_in_flight_at_the_deadline_goes_on_alone(caplog: pytest.LogCaptureFixture) -> None:
    """It is not broken off for a new one, which is not begun."""
    caplog.set_level(logging.WARNING, logger="cloudckpt")
    storage, go = Watched(), threading.Event()
    storage.amid = lambda _: go.wait(60)
    with CheckpointManager(storage) as ckpts:
        first = ckpts.save(1, state_of(1))
        assert ckpts.save(2, state_of(2), deadline_s=0.2).progress.phase == "declined"
        go.set()
        first.wait(60)
    assert steps(storage) == [1]
    (line,) = [r.getMessage() for r in caplog.records]
    assert f"not saving step 2: its deadline came while {first.checkpoint.name} was still being saved" in line


def test_a_save_is_broken_off_at_its_deadline() -> None:
    """It does not fit after all: nothing of it becomes visible, and what was there stands."""
    storage = Watched()
    with CheckpointManager(storage) as ckpts:
        ckpts.save(1, state_of(1), block=True)
        unmeasured(ckpts)
        storage.amid = until_refused
        with pytest.raises(SaveError, match="its deadline has come"):
            ckpts.save(2, state_of(2), deadline_s=0.5)
        storage.amid = lambda _: None
        assert steps(storage) == [1]
        ckpts.save(3, state_of(3), block=True)
    assert steps(storage) == [1, 3]
    check_store(storage, settled=True)


def test_a_request_that_never_ends_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The call raises at the deadline; close() does not tell the same a second time."""
    monkeypatch.setattr(hurrying, "_LAST_WORD_S", 0.1)
    storage, go = Watched(), threading.Event()
    with CheckpointManager(storage) as ckpts:
        ckpts.save(1, state_of(1), block=True)
        unmeasured(ckpts)
        storage.amid = lambda _: go.wait(60)
        with pytest.raises(SaveError, match="its last request has not ended yet"):
            ckpts.save(2, state_of(2), deadline_s=0.5)
        go.set()
    assert steps(storage) == [1]


def test_an_earlier_failure_does_not_keep_the_last_save_from_being_made(caplog: pytest.LogCaptureFixture) -> None:
    """The log has told it, and the later checkpoint makes good for it: nothing is raised at the end."""
    storage = Watched()
    with CheckpointManager(storage) as ckpts:
        storage.amid = refuse
        ckpts.save(1, state_of(1)).wait_quietly()
        storage.amid = lambda _: None
        ckpts.save(2, state_of(2), deadline_s=LONG_S)
    assert steps(storage) == [2]
    assert [r for r in caplog.records if r.levelno == logging.ERROR and "the disk is on fire" in r.getMessage()]


def test_an_earlier_failure_is_still_told_if_the_last_save_is_not_begun() -> None:
    """I10: what is declined makes good for nothing; ``close()`` raises what nobody was told."""
    storage = Watched()
    ckpts = CheckpointManager(storage)
    ckpts.save(0, state_of(0), block=True)
    slow(ckpts, LONG_S)
    storage.amid = refuse
    ckpts.save(1, state_of(1)).wait_quietly()
    assert ckpts.save(2, state_of(2), deadline_s=LONG_S).progress.phase == "declined"
    with pytest.raises(SaveError, match=r"saving step 1 .*the disk is on fire"):
        ckpts.close()
    assert steps(storage) == [0]


@pytest.mark.parametrize("by_hand", [True, False])
def test_an_earlier_failure_is_still_told_if_the_last_save_fails_as_well(by_hand: bool) -> None:
    """I10: each failure is raised once, the last save's by its own call and the earlier one to whoever asks first."""
    storage = Watched()
    ckpts = CheckpointManager(storage)
    storage.amid = refuse
    first = ckpts.save(1, state_of(1))
    first.wait_quietly()
    with pytest.raises(SaveError, match="saving step 2 "):
        ckpts.save(2, state_of(2), deadline_s=LONG_S)
    ask: Callable[[], object] = first.wait if by_hand else ckpts.wait
    with pytest.raises(SaveError, match="saving step 1 "):
        ask()
    ckpts.wait()
    ckpts.close()
    assert steps(storage) == []


def test_an_earlier_failure_is_still_told_if_the_last_save_cannot_be_planned() -> None:
    """I10: the state holds what nothing can store; nothing was begun, and nothing is forgotten."""
    storage = Watched()
    ckpts = CheckpointManager(storage)
    storage.amid = refuse
    ckpts.save(1, state_of(1)).wait_quietly()
    with pytest.raises(TypeError):
        ckpts.save(2, {"w": object()}, deadline_s=LONG_S)
    with pytest.raises(SaveError, match="saving step 1 "):
        ckpts.close()


def test_a_replaced_writer_saves_nothing_in_a_hurry() -> None:
    """I6: it is told at once, and deletes nothing."""
    storage = MemoryStorage()
    first = CheckpointManager(view := ScriptedStorage(storage))
    first.save(1, state_of(1), block=True)
    with CheckpointManager(storage) as second:
        second.save(2, state_of(2), block=True)
        with pytest.raises(FencedError):
            first.save(3, state_of(3), deadline_s=LONG_S)
        with pytest.raises(FencedError):
            first.save(4, state_of(4), deadline_s=LONG_S)
        first.close()
    assert view.counts()["delete"] == 0
    assert steps(storage) == [1, 2]


def test_in_a_hurry_nothing_is_deleted_until_the_next_start(caplog: pytest.LogCaptureFixture) -> None:
    """Retention decides as ever, in the same commit; the bytes of what it lets go stay until somebody has the time."""
    caplog.set_level(logging.INFO, logger="cloudckpt")
    storage = ScriptedStorage(MemoryStorage())
    with CheckpointManager(storage, keep_last=1) as ckpts:
        ckpts.save(1, state_of(1), block=True)
        ckpts.save(2, state_of(2), deadline_s=LONG_S)
    assert storage.counts()["delete"] == 0
    found = cloudckpt.open(storage).checkpoints(state=None)
    assert [(c.step, c.state) for c in found] == [(1, State.RETIRED), (2, State.COMMITTED)]
    assert not [r for r in caplog.records if "Training complete" in r.getMessage()]
    with CheckpointManager(storage, keep_last=1) as ckpts:
        assert ckpts.restore(state_of(0)) is not None
    assert storage.counts()["delete"] > 0
    assert [c.step for c in cloudckpt.open(storage).checkpoints(state=None)] == [2]
    check_store(storage.inner, settled=True)


def test_a_process_that_begins_in_a_hurry_deletes_nothing_either() -> None:
    """Its first call is the last save: what earlier processes left to delete waits on, and so do copies of the manifest."""
    storage = ScriptedStorage(MemoryStorage())
    with CheckpointManager(storage, keep_last=1) as ckpts:
        ckpts.save(1, state_of(1), block=True)
    for step in (2, 3, 4):
        with CheckpointManager(storage) as ckpts:
            ckpts.save(step, state_of(step), deadline_s=LONG_S)
    assert storage.counts()["delete"] == 0
    found = cloudckpt.open(storage).checkpoints(state=None)
    assert [c.step for c in found if c.state is State.RETIRED] == [1, 2, 3]
    with CheckpointManager(storage) as ckpts:
        ckpts.save(5, state_of(5), block=True)
    assert [c.step for c in cloudckpt.open(storage).checkpoints(state=None)] == [5]
    check_store(storage.inner, settled=True)


def test_a_false_alarm_leaves_nothing_behind() -> None:
    """Whoever goes on training after all deletes with the next save, and closes as ever."""
    storage = MemoryStorage()
    with CheckpointManager(storage, keep_last=1) as ckpts:
        for step, deadline_s in ((1, None), (2, LONG_S), (3, None)):
            ckpts.save(step, state_of(step), deadline_s=deadline_s).wait(60)
    assert [c.step for c in cloudckpt.open(storage).checkpoints(state=None)] == [3]
    check_store(storage, settled=True)


def test_killed_between_seal_and_commit_it_is_completed_by_the_next_start() -> None:
    """The margin was too short by one request: nothing is lost."""
    probe = ScriptedStorage(MemoryStorage())
    with CheckpointManager(probe) as ckpts:
        ckpts.save(1, state_of(1), deadline_s=LONG_S)
    sealed = next(n for n, call in enumerate(probe.calls) if call.verb == "put" and "checkpoint.json" in call.keys[0])
    storage = MemoryStorage()
    ckpts = CheckpointManager(ScriptedStorage(storage, sealed, Fault.CRASH_AFTER))
    with pytest.raises(Crash):
        ckpts.save(1, state_of(1), deadline_s=LONG_S)
    with pytest.raises(Crash):
        ckpts.close()
    state = state_of(0)
    with CheckpointManager(storage) as after:
        assert after.restore(state) is not None
    assert torch.equal(state["w"], state_of(1)["w"])


def test_a_store_that_never_tells_is_not_asked_longer_than_there_is_time() -> None:
    """Hours, by the settings; the deadline is before that."""

    class Silent(MemoryStorage):
        def replace(self, key: str, body: bytes, *, expecting: str) -> Outcome:
            return Unknown(StorageError("no answer", retryable=True))

    storage = MemoryStorage()
    with CheckpointManager(storage) as ckpts:
        ckpts.save(1, state_of(1), block=True)
    silent = Silent()
    for item in storage.list(""):
        body = storage.read(item.key, limit_bytes=10**8).body
        silent.put(item.key, [body], size_bytes=len(body))
    store = ManifestStore(silent, Settings(manifest_deadline_s=36_000, retry_base_s=0.01, retry_cap_s=0.01))
    store.hurry_until = time.monotonic() + 0.2
    with pytest.raises(CommitUnknownError, match="the store never told"):
        pin(store, "latest")


@pytest.mark.parametrize("deadline_s", [True, "25", float("nan")])
def test_what_is_no_deadline_is_refused(deadline_s: Any) -> None:
    """Before anything happens, with what to write."""
    storage = ScriptedStorage(MemoryStorage())
    with CheckpointManager(storage) as ckpts, pytest.raises(ConfigError, match="write how many seconds there are"):
        ckpts.save(1, state_of(1), deadline_s=deadline_s)
    assert not storage.counts()
