"""Becoming the writer: what an earlier process left is settled, and that process is fenced."""

from __future__ import annotations

import logging

import pytest
import torch

import cloudckpt
from cloudckpt import CheckpointManager, ConflictError, FencedError, FormatError, Settings, State, StorageError
from cloudckpt.storage import MemoryStorage, Outcome, Unknown, Versioned
from cloudckpt.testing import Call, Crash, Fault, ScriptedStorage, check_store


def state_of(step: int) -> dict[str, torch.Tensor]:
    """A state whose every bit follows from its step."""
    return {"w": torch.full((100,), float(step))}


def die_at(inner: MemoryStorage, verb: str, key_part: str, fault: Fault) -> None:
    """A job that saves step 1, and dies in the save of step 2 at the first such call."""
    with CheckpointManager(probe := ScriptedStorage(MemoryStorage())) as ckpts:
        ckpts.save(1, state_of(1), block=True)
        start = len(probe.calls)
        ckpts.save(2, state_of(2), block=True)

    def matches(call: Call) -> bool:
        return call.verb == verb and key_part in call.keys[0]

    at = next(n for n, call in enumerate(probe.calls) if n >= start and matches(call))
    ckpts = CheckpointManager(ScriptedStorage(inner, at, fault))
    ckpts.save(1, state_of(1), block=True)
    with pytest.raises(Crash):
        ckpts.save(2, state_of(2), block=True)
    with pytest.raises(Crash):
        ckpts.close()


def test_a_save_killed_between_seal_and_commit_is_rolled_forward(caplog: pytest.LogCaptureFixture) -> None:
    """Sealed and whole, but not committed when its process died: the next claim commits it, and says so."""
    caplog.set_level(logging.INFO, logger="cloudckpt")
    storage = MemoryStorage()
    die_at(storage, "put", "checkpoint.json", Fault.CRASH_AFTER)
    state = state_of(0)
    with CheckpointManager(storage) as ckpts:
        resumed = ckpts.restore(state)
    assert resumed is not None
    assert resumed.step == 2
    assert torch.equal(state["w"], state_of(2)["w"])
    assert any("it was whole when its process died" in r.getMessage() for r in caplog.records)
    assert any("had not closed it" in r.getMessage() for r in caplog.records)


@pytest.mark.parametrize("harm", ["truncate", "remove", "index of another save", "garbled index"])
def test_a_sealed_save_that_is_not_whole_is_never_rolled_forward(harm: str) -> None:
    """An index alone proves nothing: a missing or short payload, or a wrong index, is retired with the reason."""
    storage = MemoryStorage()
    die_at(storage, "put", "checkpoint.json", Fault.CRASH_AFTER)
    folder = next(c.name for c in cloudckpt.open(storage).checkpoints(state=State.PENDING))
    payload = f"{folder}/w-00000-of-00001.safetensors"
    body = storage.read(payload, limit_bytes=10**6).body
    index = storage.read(f"{folder}/checkpoint.json", limit_bytes=10**6).body
    if harm == "truncate":
        storage.put(payload, [body[:-1]], size_bytes=len(body) - 1)
    elif harm == "remove":
        storage.delete([payload])
    elif harm == "garbled index":
        storage.put(
            f"{folder}/checkpoint.json", [index.replace(b'"step":2', b'"step":3')[:-9]], size_bytes=len(index) - 9
        )
    else:
        other = next(c.name for c in cloudckpt.open(storage).checkpoints())
        wrong = storage.read(f"{other}/checkpoint.json", limit_bytes=10**6).body
        storage.put(f"{folder}/checkpoint.json", [wrong], size_bytes=len(wrong))
    state = state_of(0)
    with CheckpointManager(storage) as ckpts:
        resumed = ckpts.restore(state)
        assert resumed is not None
        assert resumed.step == 1
    assert [c.step for c in cloudckpt.open(storage).checkpoints(state=None)] == [1]
    check_store(storage, settled=True)


def test_a_replaced_writer_is_fenced_and_deletes_nothing() -> None:
    """I6: after a second job has claimed, the first one's save fails with FencedError, and it sends no DELETE."""
    inner = MemoryStorage()
    first_view = ScriptedStorage(inner)
    first = CheckpointManager(first_view, keep_last=1)
    first.save(1, state_of(1), block=True)
    with CheckpointManager(inner, keep_last=1) as second:
        second.save(2, state_of(2), block=True)
        first_view.forget()
        with pytest.raises(FencedError, match=r"was replaced by writer 2, pid \d+ on .*: stop this process"):
            first.save(3, state_of(3), block=True)
        assert first_view.counts()["delete"] == 0
        assert first_view.counts()["put"] == 0
        first.close()
    assert [c.step for c in cloudckpt.open(inner).checkpoints()] == [2]
    check_store(inner, settled=True)


def test_takeover_refuse_fails_the_second_job_and_not_the_first() -> None:
    """takeover="refuse" raises ConflictError, naming the holder; after a clean close it lets the next job in."""
    storage = MemoryStorage()
    first = CheckpointManager(storage)
    first.save(1, state_of(1), block=True)
    with pytest.raises(ConflictError, match=r"is held by pid \d+ on .*last_wins"):
        CheckpointManager(storage, takeover="refuse").restore(state_of(0))
    first.save(2, state_of(2), block=True)
    first.close()
    with CheckpointManager(storage, takeover="refuse") as second:
        assert second.restore(state_of(0)) is not None


def test_two_jobs_that_restart_each_other_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three claims by alternating jobs without a commit are a duel: refused with exit code 5, unless forced."""
    storage = MemoryStorage()

    def claim(job: str, takeover: str = "last_wins") -> CheckpointManager:
        monkeypatch.setenv("SLURM_JOB_ID", job)
        ckpts = CheckpointManager(storage, takeover=takeover)
        ckpts.restore(state_of(0))
        return ckpts

    managers = [claim("a"), claim("b")]
    with pytest.raises(ConflictError, match="two jobs fight over this run") as refused:
        claim("a")
    assert refused.value.exit_code == 5
    managers.append(claim("a", takeover="force"))
    managers[-1].save(1, state_of(1), block=True)
    managers.append(claim("b"))
    for ckpts in managers[:-1]:
        with pytest.raises(FencedError):
            ckpts.close()
    managers[-1].close()


def test_a_job_that_crashes_again_and_again_is_no_duel(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same job may be restarted any number of times without a commit."""
    monkeypatch.setenv("SLURM_JOB_ID", "a")
    storage = MemoryStorage()
    managers = []
    for _ in range(5):
        managers.append(CheckpointManager(storage, settings=Settings()))
        assert managers[-1].restore(state_of(0)) is None
    for ckpts in managers[:-1]:
        with pytest.raises(FencedError):
            ckpts.close()
    managers[-1].close()


@pytest.mark.memory_only
def test_a_claim_whose_answer_was_lost_never_shares_an_epoch() -> None:
    """I6: A's claim lands, its answer is lost, B claims on top: A is fenced at once and does not take B's epoch."""
    inner = MemoryStorage()
    with CheckpointManager(inner) as earlier:
        earlier.save(1, state_of(1))
    second = CheckpointManager(inner)

    class LosesTheFirstAnswer(MemoryStorage):
        """Shares the objects of ``inner``; B claims before A has read its answer."""

        lost = False

        def replace(self, key: str, body: bytes, *, expecting: str) -> Outcome:
            answer = inner.replace(key, body, expecting=expecting)
            if not self.lost:
                self.lost = True
                second.restore(state_of(0))
                return Unknown(StorageError("the answer was lost", retryable=True))
            return answer

        def read(self, key: str, *, limit_bytes: int) -> Versioned:
            return inner.read(key, limit_bytes=limit_bytes)

    first = CheckpointManager(LosesTheFirstAnswer())
    with pytest.raises(FencedError, match="while this process was claiming it"):
        first.restore(state_of(0))
    second.save(2, state_of(2), block=True)
    second.close()
    check_store(inner, settled=True)


def test_a_sealed_save_of_a_newer_version_is_not_thrown_away() -> None:
    """A pending save whose index has a newer format makes the claim refuse with "upgrade"; nothing is retired."""
    storage = MemoryStorage()
    die_at(storage, "put", "checkpoint.json", Fault.CRASH_AFTER)
    folder = next(c.name for c in cloudckpt.open(storage).checkpoints(state=State.PENDING))
    key = f"{folder}/checkpoint.json"
    newer = storage.read(key, limit_bytes=10**6).body.replace(b'"format": 1', b'"format": 2')
    storage.put(key, [newer], size_bytes=len(newer))
    with pytest.raises(FormatError, match="upgrade cloudckpt"):
        CheckpointManager(storage).restore(state_of(0))
    assert [c.state for c in cloudckpt.open(storage).checkpoints(state=None)] == [State.COMMITTED, State.PENDING]
