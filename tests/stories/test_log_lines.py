"""The log says each thing once, in words people can act on."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest
import torch

import cloudckpt
from cloudckpt import CheckpointManager, Settings
from cloudckpt.events import Event, SaveCommitted, SaveFailed
from cloudckpt.storage import MemoryStorage
from cloudckpt.testing import Fault, ScriptedStorage


def state_of(step: int) -> dict[str, torch.Tensor]:
    """A state whose every bit follows from its step."""
    return {"w": torch.full((300,), float(step))}


def test_a_run_logs_these_lines_and_no_others(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Two saves, a best, a deletion and a close give exactly these lines, once each, on a logger that propagates."""
    caplog.set_level(logging.INFO, logger="cloudckpt")
    root = str(tmp_path)
    with CheckpointManager(root, monitor="loss", mode="min", keep_best=1, keep_last=1) as ckpts:
        first = ckpts.save(1, state_of(1), metrics={"loss": 0.5}, block=True).checkpoint
        second = ckpts.save(2, state_of(2), metrics={"loss": 0.25}, block=True).checkpoint
    lines = [re.sub(r"\d+(\.\d+)? (ms|s|MiB/s|KiB/s)\b", "N", r.getMessage()) for r in caplog.records]
    size = "2.2 KiB"
    assert lines == [
        f"saving {first.name} at {root}/{first.name}",
        f"saved checkpoint-1 ({size}, 2 objects, N, N, blocked N) loss=0.5000 [best #1]",
        f"New best checkpoint: {root}/{first.name} (loss=0.5000)",
        "Best checkpoints:",
        f"  {root}/{first.name} (loss=0.5000)",
        f"saving {second.name} at {root}/{second.name}",
        f"saved checkpoint-2 ({size}, 2 objects, N, N, blocked N) loss=0.2500 [best #1]",
        f"New best checkpoint: {root}/{second.name} (loss=0.2500)",
        "Best checkpoints:",
        f"  {root}/{second.name} (loss=0.2500)",
        f"deleted checkpoint-1 ({size}): not in best 1, not in last 1",
        "=" * 60,
        "Training complete!",
        "Best checkpoints (N=1):",
        f"  {root}/{second.name}: loss=0.2500",
        "=" * 60,
    ]
    assert {r.name for r in caplog.records} == {"cloudckpt"}
    assert logging.getLogger("cloudckpt").propagate


def test_without_a_best_the_summary_says_so(caplog: pytest.LogCaptureFixture) -> None:
    """A run without a monitor ends with "No best checkpoints tracked"."""
    caplog.set_level(logging.INFO, logger="cloudckpt")
    with CheckpointManager(MemoryStorage()) as ckpts:
        ckpts.save(1, state_of(1))
    messages = [r.getMessage() for r in caplog.records]
    assert messages[-3:] == ["Training complete!", "No best checkpoints tracked", "=" * 60]
    assert ckpts.get_best_checkpoints_summary() == "No best checkpoints tracked"


def test_an_exception_in_training_prints_no_summary(caplog: pytest.LogCaptureFixture) -> None:
    """Leaving the with statement by an exception finishes the save in flight, and claims no completed training."""
    caplog.set_level(logging.INFO, logger="cloudckpt")
    storage = MemoryStorage()
    with pytest.raises(ZeroDivisionError), CheckpointManager(storage) as ckpts:
        ckpts.save(1, state_of(1))
        raise ZeroDivisionError
    assert not [r for r in caplog.records if "Training complete" in r.getMessage()]
    latest = cloudckpt.open(storage).latest()
    assert latest is not None
    assert latest.step == 1


def test_a_manager_that_only_read_prints_no_summary(caplog: pytest.LogCaptureFixture) -> None:
    """A manager that never became the writer closes in silence, and changes nothing."""
    caplog.set_level(logging.INFO, logger="cloudckpt")
    storage = ScriptedStorage(MemoryStorage())
    with CheckpointManager(storage) as ckpts:
        assert ckpts.latest() is None
    assert not caplog.records
    assert set(storage.counts()) <= {"read", "list"}


def test_a_failed_save_is_one_error_line_and_is_raised_at_the_next_call(caplog: pytest.LogCaptureFixture) -> None:
    """I10: a failed background save logs one ERROR, is raised once by the next call, and the save after it works."""
    inner = MemoryStorage()
    events: list[Event] = []
    probe = ScriptedStorage(MemoryStorage())
    with CheckpointManager(probe) as ckpts:
        ckpts.save(1, state_of(1), block=True)
        first_put = next(n for n, call in enumerate(probe.calls) if call.verb == "put")
    caplog.clear()
    with CheckpointManager(ScriptedStorage(inner, first_put, Fault.REFUSED), listeners=[events.append]) as ckpts:
        pending = ckpts.save(1, state_of(1))
        with pytest.raises(cloudckpt.SaveError, match=r"step 1 .* failed at upload: call \d+ was refused"):
            ckpts.save(2, state_of(2))
        assert pending.done()
        ckpts.save(2, state_of(2), block=True)
        assert pending.progress.phase == "failed"
    errors = [r for r in caplog.records if r.levelno == logging.ERROR]
    assert len(errors) == 1
    assert [type(e) for e in events if isinstance(e, SaveFailed | SaveCommitted)] == [SaveFailed, SaveCommitted]
    assert [c.step for c in cloudckpt.open(inner).checkpoints(state=None)] == [2]


def test_a_failure_nobody_asked_about_is_raised_by_close() -> None:
    """I10: if no further call comes, close() raises what the last save failed with, after cleaning up."""
    probe = ScriptedStorage(MemoryStorage())
    with CheckpointManager(probe) as ckpts:
        ckpts.save(1, state_of(1), block=True)
        first_put = next(n for n, call in enumerate(probe.calls) if call.verb == "put")
    inner = MemoryStorage()
    ckpts = CheckpointManager(ScriptedStorage(inner, first_put, Fault.REFUSED))
    ckpts.save(1, state_of(1))
    with pytest.raises(cloudckpt.SaveError):
        ckpts.close()
    ckpts.close()
    assert cloudckpt.open(inner).checkpoints(state=None) == ()


@pytest.mark.memory_only
def test_on_busy_skip_returns_the_save_in_flight(caplog: pytest.LogCaptureFixture) -> None:
    """With on_busy="skip" a second save is left out with one warning while the first is in flight."""
    import threading

    go = threading.Event()

    class Slow(MemoryStorage):
        def put(self, *args: object, **kwargs: object) -> None:
            go.wait(60)
            super().put(*args, **kwargs)  # type: ignore[arg-type]  # handed through

    with CheckpointManager(Slow(), settings=Settings(on_busy="skip")) as ckpts:
        first = ckpts.save(1, state_of(1))
        assert ckpts.save(2, state_of(2)) is first
        assert first.progress.bytes_total > 0
        go.set()
        assert first.wait(60).step == 1
        assert first.progress.bytes_done == first.progress.bytes_total
        assert [c.step for c in ckpts.checkpoints()] == [1]
    assert [r.getMessage() for r in caplog.records if "skipped" in r.getMessage()] == [
        f"skipped the save of step 2: still saving {first.checkpoint.name}"
    ]


@pytest.mark.memory_only
def test_waiting_has_a_limit() -> None:
    """PendingSave.wait(timeout_s) raises TimeoutError while the save is on its way, and loses nothing."""
    import threading

    go = threading.Event()

    class Slow(MemoryStorage):
        def put(self, *args: object, **kwargs: object) -> None:
            go.wait(60)
            super().put(*args, **kwargs)  # type: ignore[arg-type]  # handed through

    with CheckpointManager(Slow()) as ckpts:
        pending = ckpts.save(1, state_of(1))
        pending.wait_staged()
        with pytest.raises(TimeoutError, match="still at"):
            pending.wait(0.01)
        assert not pending.done()
        go.set()
        assert pending.wait().step == 1


def test_a_broken_listener_disturbs_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """A listener that raises is logged with its traceback; the save succeeds."""

    def broken(event: Event) -> None:
        raise RuntimeError("dashboard is down")

    with CheckpointManager(MemoryStorage(), listeners=[broken]) as ckpts:
        assert ckpts.save(1, state_of(1), block=True).checkpoint.step == 1
    assert [r for r in caplog.records if "a listener failed on SaveCommitted" in r.getMessage()]
