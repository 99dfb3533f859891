"""Defects of saving, waiting and closing that a review found, each as it was found."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from types import FrameType
from typing import Any

import pytest
import torch

import cloudckpt
from cloudckpt import CheckpointManager, ConflictError, FencedError, SaveError, Settings, State, StorageError, editing
from cloudckpt.events import Event, Warned
from cloudckpt.pending import PendingSave
from cloudckpt.storage import ManifestStore, MemoryStorage
from cloudckpt.testing import ScriptedStorage, builders, check_store

pytestmark = pytest.mark.memory_only

FAST = Settings(retry_base_s=1e-3, retry_cap_s=1e-2, manifest_deadline_s=1, storage_deadline_s=1)


def state_of(step: int) -> dict[str, Any]:
    """A state whose every bit follows from its step."""
    return {"w": torch.full((1000,), float(step))}


class Hooked(MemoryStorage):
    """Memory with something that happens before a put or a delete."""

    def __init__(self) -> None:
        super().__init__()
        self.before_put: Callable[[str], None] = lambda _: None
        self.deleted: list[str] = []
        self.refuse: StorageError | None = None

    def put(self, key: str, buffers: Any, *, size_bytes: int, progress: Any = None) -> None:
        self.before_put(key)
        super().put(key, buffers, size_bytes=size_bytes, progress=progress)

    def delete(self, keys: Iterable[str]) -> dict[str, StorageError]:
        going = [*keys]
        self.deleted += going
        if self.refuse is not None:
            return dict.fromkeys(going, self.refuse)
        return super().delete(going)


def raising(error: BaseException, part: str) -> Callable[[str], None]:
    """Raises at a put of a key with this part."""

    def before(key: str) -> None:
        if part in key:
            raise error

    return before


def test_a_replaced_writer_that_does_not_know_it_deletes_nothing_at_close() -> None:
    """Deletes failed, somebody else took over, the old one closes: it is told so, and has sent no DELETE."""
    storage = Hooked()
    old = CheckpointManager(storage, settings=FAST, keep_last=1)
    storage.refuse = StorageError("503", retryable=True)
    for step in (1, 2):
        old.save(step, state_of(step), block=True)
    new = CheckpointManager(storage, settings=FAST)
    new.restore(state_of(0))
    new.close()
    storage.refuse = None
    storage.deleted.clear()
    with pytest.raises(FencedError):
        old.close()
    assert storage.deleted == []


def test_a_writer_deletes_nothing_that_a_repair_has_admitted_again() -> None:
    """A repair fences: what it admitted and holds survives the close of the writer before it."""
    storage = Hooked()
    writer = CheckpointManager(storage, settings=FAST, keep_last=1)
    storage.refuse = StorageError("503", retryable=True)
    for step in (1, 2):
        writer.save(step, state_of(step), block=True)
    MemoryStorage.put(storage, "manifest.json", [b"garbled"], size_bytes=7)
    cloudckpt.repair(storage, dry_run=False)
    storage.refuse = None
    storage.deleted.clear()
    with pytest.raises(ConflictError):
        writer.close()
    assert storage.deleted == []
    check_store(storage)


def test_two_threads_that_save_at_once_save_what_they_were_given() -> None:
    """Threads queue up for the one arena; every checkpoint holds its own step's bits."""
    storage = MemoryStorage()
    with CheckpointManager(storage, settings=FAST, keep_last=None) as ckpts:
        with ThreadPoolExecutor(8) as pool:
            for pending in [*pool.map(lambda step: ckpts.save(step, state_of(step)), range(40))]:
                pending.wait()
    run = cloudckpt.open(storage)
    assert sorted(c.step for c in run.checkpoints()) == [*range(40)]
    for checkpoint in run.checkpoints():
        assert torch.equal(run.load(checkpoint.name)["w"], torch.full((1000,), float(checkpoint.step)))


def test_a_save_inside_of_a_save_is_refused() -> None:
    """A signal handler that saves while its thread is saving gets an error, and no deadlock."""

    class Handler:
        def state_dict(self) -> dict[str, Any]:
            with pytest.raises(SaveError, match="set a flag"):
                ckpts.save(2, state_of(2))
            return {"value": 1}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            """Not needed."""

    with CheckpointManager(MemoryStorage(), settings=FAST) as ckpts:
        ckpts.save(1, {"odd": Handler()}, block=True)
        assert [c.step for c in ckpts.checkpoints()] == [1]


def test_a_mark_on_a_save_in_flight_fails_nothing() -> None:
    """Marked while it is uploaded, let go by the very commit: a warning says so, and training goes on."""
    storage = Hooked()
    reached, go_on = threading.Event(), threading.Event()
    events: list[Event] = []

    def hold(key: str) -> None:
        if key.startswith("checkpoint-2."):
            reached.set()
            assert go_on.wait(30)

    with CheckpointManager(storage, settings=FAST, keep_last=1, listeners=[events.append]) as ckpts:
        ckpts.save(1, state_of(1), block=True)
        storage.before_put = hold
        pending = ckpts.save(2, state_of(2))
        assert reached.wait(30)
        ckpts.mark(2, "diverged")
        go_on.set()
        pending.wait()
        ckpts.save(3, state_of(3), block=True)
    assert [e.message for e in events if isinstance(e, Warned) and "is let go already" in e.message]
    assert [c.step for c in cloudckpt.open(storage).checkpoints()][-1] == 3


def test_a_restore_after_the_claim_sees_what_others_wrote_meanwhile() -> None:
    """Another process reports metrics, tags and marks: the next restore of this one goes by them."""
    storage = MemoryStorage()
    with CheckpointManager(storage, settings=FAST, monitor="acc", mode="max", keep_last=None) as ckpts:
        for step in (1, 2, 3):
            ckpts.save(step, state_of(step), metrics={}, block=True)
        store = ManifestStore(storage, FAST)
        editing.report_metrics(store, 1, {"acc": 0.9})
        editing.tag(store, 2, add=["good"])
        editing.mark(store, 3, "diverged")
        for select, step in (("best", 1), ("tag:good", 2), ("latest", 2)):
            resumed = ckpts.restore(state_of(0), select)
            assert resumed is not None
            assert resumed.step == step


def test_a_store_that_deletes_nothing_delays_no_save() -> None:
    """DELETE answers 503 for good: each clean-up tries once, saves go on, and the next run catches up."""
    storage = Hooked()
    storage.refuse = StorageError("503", retryable=True)
    with CheckpointManager(storage, settings=FAST, keep_last=1) as ckpts:
        for step in range(6):
            storage.deleted.clear()
            ckpts.save(step, state_of(step), block=True)
            assert len(storage.deleted) <= step
    storage.refuse = None
    with CheckpointManager(storage, settings=FAST) as ckpts:
        ckpts.save(6, state_of(6), block=True)
    cloudckpt.gc(storage, dry_run=False)
    check_store(storage, settled=True)


def test_an_interrupted_wait_does_not_swallow_the_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while waiting, then the save fails: close() raises it."""
    storage = Hooked()
    with pytest.raises(SaveError, match="no space left"), CheckpointManager(storage, settings=FAST) as ckpts:
        storage.before_put = raising(StorageError("no space left"), "checkpoint-1.")
        pending = ckpts.save(1, state_of(1))
        pending.wait_quietly()
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(pending, "_sleep", _interrupted)
            pending.wait()


def test_an_interrupt_at_any_call_of_a_wait_leaves_the_failure_to_be_told() -> None:
    """Wherever Ctrl-C comes once the save has failed: the wait raises the failure, or it is still to be told."""
    here = sys._getframe().f_code
    outcomes: list[type[BaseException]] = []
    while SaveError not in outcomes:
        pending = PendingSave(builders.checkpoint(1, state=State.PENDING), 0)
        pending.end(SaveError("no space left"))
        left = len(outcomes)  # calls that go well before the interrupt

        def interrupt(frame: FrameType, event: str, _: object) -> None:
            nonlocal left
            if event in {"call", "c_call"} and frame.f_code is not here:
                left -= 1
                if left < 0:
                    sys.setprofile(None)
                    raise KeyboardInterrupt

        sys.setprofile(interrupt)
        try:
            pending.wait()
        except (KeyboardInterrupt, SaveError) as exc:
            outcomes.append(type(exc))
        finally:
            sys.setprofile(None)
        assert (pending.failure is None) == (outcomes[-1] is SaveError), outcomes
    assert len(outcomes) > 3


def _interrupted(_seconds: float) -> bool:
    raise KeyboardInterrupt


def test_a_fenced_manager_does_not_prune() -> None:
    """A manager that knows it was replaced raises instead of deleting."""
    storage = Hooked()
    old = CheckpointManager(storage, settings=FAST, keep_last=None)
    for step in (1, 2):
        old.save(step, state_of(step), block=True)
    with CheckpointManager(storage, settings=FAST, keep_last=1) as new:
        new.restore(state_of(0))
    with pytest.raises(FencedError):
        old.save(3, state_of(3), block=True)
    storage.deleted.clear()
    with pytest.raises(FencedError, match="deletes nothing any more"):
        old.prune()
    assert storage.deleted == []
    old.close()


def test_block_means_this_save_even_where_others_are_skipped() -> None:
    """With on_busy="skip" a blocking save waits for its turn and returns its own outcome."""
    storage = Hooked()
    go_on = threading.Event()
    storage.before_put = lambda key: None if not key.startswith("checkpoint-1.") else _wait(go_on)
    settings = Settings(on_busy="skip", retry_base_s=1e-3)
    with CheckpointManager(storage, settings=settings, keep_last=None) as ckpts:
        ckpts.save(1, state_of(1))
        threading.Timer(0.05, go_on.set).start()
        pending = ckpts.save(2, state_of(2), block=True)
        assert pending.checkpoint.step == 2
        assert [c.step for c in ckpts.checkpoints()] == [1, 2]


def _wait(event: threading.Event) -> None:
    assert event.wait(30)


def test_close_tells_the_failure_of_the_save_first() -> None:
    """The save failed, and closing fails too: the save's error is raised, with the other as a note."""
    storage = Hooked()
    with pytest.raises(SaveError, match="quota") as failed, CheckpointManager(storage, settings=FAST) as ckpts:
        ckpts.save(1, state_of(1), block=True)

        def gone(key: str) -> None:
            if "checkpoint-2." in key:
                MemoryStorage.delete(storage, ["manifest.json"])
                raise StorageError("bucket quota exceeded")

        storage.before_put = gone
        ckpts.save(2, state_of(2))
    assert any("closing the run failed as well" in note for note in failed.value.__notes__)


def test_an_interrupt_before_the_save_is_handed_over_hangs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C between the plan and the background: the save has failed, and close() returns."""
    with CheckpointManager(MemoryStorage(), settings=FAST) as ckpts:
        ckpts.save(1, state_of(1), block=True)
        assert ckpts._saver is not None
        with monkeypatch.context() as patched:
            patched.setattr(ckpts._saver._pool, "submit", raising(KeyboardInterrupt(), ""))
            with pytest.raises((KeyboardInterrupt, TypeError)):
                ckpts.save(2, state_of(2))
        ckpts.save(3, state_of(3), block=True)


def test_an_index_that_no_reader_would_take_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a gigabyte of plain values is refused by name, and the good checkpoint before it stays."""
    monkeypatch.setattr("cloudckpt.saving.recording.INDEX_LIMIT_BYTES", 100_000)
    storage = MemoryStorage()
    with CheckpointManager(storage, settings=FAST, keep_last=1) as ckpts:
        ckpts.save(1, state_of(1), block=True)
        with pytest.raises(SaveError, match=r"index of checkpoint-2.* belong into tensors.*'blob'"):
            ckpts.save(2, {**state_of(2), "blob": b"x" * 200_000}, block=True)
    run = cloudckpt.open(storage)
    assert [c.step for c in run.checkpoints()] == [1]
    assert torch.equal(run.load("latest")["w"], state_of(1)["w"])


def test_the_reason_of_a_failed_save_is_cut() -> None:
    """A store's message of a megabyte does not end up in the manifest."""
    storage = Hooked()
    with CheckpointManager(storage, settings=FAST) as ckpts:
        ckpts.save(1, state_of(1), block=True)
        storage.before_put = raising(StorageError("x" * 1_000_000), "checkpoint-2.")
        with pytest.raises(SaveError):
            ckpts.save(2, state_of(2), block=True)
        storage.before_put = lambda _: None
        ckpts.save(3, state_of(3), block=True)
    assert len(storage.read("manifest.json", limit_bytes=10**8).body) < 20_000


def test_a_clean_close_costs_no_read() -> None:
    """Only a writer with something left to delete looks again before it does."""
    storage = ScriptedStorage(MemoryStorage())
    with CheckpointManager(storage, settings=FAST, keep_last=1) as ckpts:
        for step in (1, 2):
            ckpts.save(step, state_of(step), block=True)
        storage.forget()
    assert storage.counts()["read"] == 0
    assert {c.state for c in cloudckpt.open(storage).checkpoints(state=None)} == {State.COMMITTED}
