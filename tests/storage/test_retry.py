"""Retrying: bounded, jittered, and only what may be asked twice. No test sleeps: the clock is a number."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest

from cloudckpt.errors import ObjectNotFoundError, StorageError
from cloudckpt.storage import Attested, MemoryStorage, Storage, Unknown
from cloudckpt.storage.retry import Backoff, RetryingStorage
from cloudckpt.testing import Fault, ScriptedStorage, StorageContract


@dataclass
class Clock:
    """A clock that only sleeping moves; jitter always takes the whole of its range."""

    time_s: float = 0.0
    slept: list[float] = field(default_factory=list)
    asked: list[tuple[float, float]] = field(default_factory=list)

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.time_s += seconds

    def uniform(self, low: float, high: float) -> float:
        self.asked.append((low, high))
        return high

    def backoff(self, deadline_s: float = 10.0) -> Backoff:
        return Backoff(
            deadline_s=deadline_s,
            base_s=0.1,
            cap_s=2.0,
            now=lambda: self.time_s,
            sleep=self.sleep,
            uniform=self.uniform,
        )


@pytest.fixture
def clock() -> Clock:
    """A clock at zero."""
    return Clock()


class Busy(ScriptedStorage):
    """A storage that says "busy" to its first ``times`` requests."""

    def __init__(self, inner: Storage, times: int, *, retryable: bool = True) -> None:
        super().__init__(inner)
        self.times = times
        self.retryable = retryable

    def _begin(self, verb: str, *keys: str) -> Fault | None:
        super()._begin(verb, *keys)
        if len(self.calls) <= self.times:
            raise StorageError("busy", retryable=self.retryable)
        return None


class TestRetrying(StorageContract):
    """A storage that is tried again keeps the promises of the one inside."""

    @pytest.fixture
    def storage(self, memory_storage: MemoryStorage, clock: Clock) -> Storage:
        return RetryingStorage(memory_storage, clock.backoff())


# -- the pauses ----------------------------------------------------------------------------------------------


def test_pauses_double_up_to_the_cap_with_full_jitter(clock: Clock) -> None:
    """Before try n the pause is drawn from 0 to base * 2**(n-1), and never from beyond the cap."""
    for number in clock.backoff().tries():
        if number == 7:
            break

    assert clock.asked == [(0.0, 0.1), (0.0, 0.2), (0.0, 0.4), (0.0, 0.8), (0.0, 1.6), (0.0, 2.0), (0.0, 2.0)]
    assert clock.slept == [high for _, high in clock.asked]


def test_tries_end_with_the_deadline(clock: Clock) -> None:
    """The tries end when the deadline is over; the last pause is cut so that it ends with it, and no later."""
    numbers = [*clock.backoff(10.0).tries()]

    assert clock.time_s == pytest.approx(10.0)
    assert numbers == [*range(len(clock.slept) + 1)]
    assert all(pause <= 2.0 for pause in clock.slept)


def test_the_first_try_has_no_pause(clock: Clock) -> None:
    """Nobody waits before the first try."""
    assert next(clock.backoff().tries()) == 0
    assert clock.slept == []


def test_a_slow_answer_still_gets_a_second_look(clock: Clock) -> None:
    """If the first answer alone took the whole deadline, there is one more try, at once."""
    numbers = []
    for number in clock.backoff(10.0).tries():
        numbers.append(number)
        clock.time_s += 60.0

    assert numbers == [0, 1]
    assert clock.slept == [0.0]


def test_a_long_run_of_tries_does_not_overflow(clock: Clock) -> None:
    """However many tries there are, the pause stays at the cap."""
    tries = clock.backoff(1e6).tries()
    for _ in range(2000):
        next(tries)

    assert clock.asked[-1] == (0.0, 2.0)


# -- what is tried again -------------------------------------------------------------------------------------


READS: dict[str, Callable[[Storage], object]] = {
    "read": lambda s: s.read("object", limit_bytes=10).body,
    "read_into": lambda s: s.read_into("object", 0, memoryview(bytearray(5))),
    "size": lambda s: s.size("object"),
    "list": lambda s: [*s.list("object")],
    "delete": lambda s: s.delete(["object"]),
    "abort_uploads": lambda s: s.abort_uploads("object"),
}


@pytest.fixture
def stored(memory_storage: MemoryStorage) -> MemoryStorage:
    """A storage with one object."""
    memory_storage.put("object", [b"12345"], size_bytes=5)
    return memory_storage


@pytest.mark.parametrize("verb", READS)
def test_a_busy_store_is_asked_again(stored: MemoryStorage, clock: Clock, verb: str) -> None:
    """Where waiting helps, a read, list or delete is sent again until it is answered."""
    busy = Busy(stored, times=3)
    answer = READS[verb](RetryingStorage(busy, clock.backoff()))

    assert busy.counts() == {verb: 4}
    assert len(clock.slept) == 3
    assert answer == {"read": b"12345", "size": 5, "delete": {}, "abort_uploads": 0}.get(verb, answer)


@pytest.mark.parametrize("verb", sorted(READS.keys() - {"delete"}))
def test_a_busy_store_is_asked_until_the_deadline(stored: MemoryStorage, clock: Clock, verb: str) -> None:
    """When the deadline is over the last refusal comes out, and says for how long it was tried."""
    with pytest.raises(StorageError, match=r"busy \(tried again for 10 s\)") as raised:
        READS[verb](RetryingStorage(Busy(stored, times=10**6), clock.backoff()))

    assert raised.value.retryable
    assert clock.time_s == pytest.approx(10.0)


@pytest.mark.parametrize("verb", READS)
def test_a_refusal_is_raised_at_once(stored: MemoryStorage, clock: Clock, verb: str) -> None:
    """Where waiting does not help, the first answer is the last."""
    busy = Busy(stored, times=10**6, retryable=False)
    with pytest.raises(StorageError, match="busy"):
        READS[verb](RetryingStorage(busy, clock.backoff()))

    assert busy.counts() == {verb: 1}
    assert clock.slept == []


def test_a_checksum_is_asked_for_again_too(stored: MemoryStorage, clock: Clock) -> None:
    """What a store says of an object is retried like its size; of a store that keeps no checksums there is the size."""

    class Keeping(MemoryStorage):
        asked = 0

        def attest(self, key: str) -> Attested:
            self.asked += 1
            if self.asked < 3:
                raise StorageError("busy", retryable=True)
            return Attested(5, 7)

    keeping = Keeping()
    assert RetryingStorage(keeping, clock.backoff()).attest("object") == Attested(5, 7)
    assert keeping.asked == 3
    assert RetryingStorage(stored, clock.backoff()).attest("object") == Attested(5, None)


def test_what_is_missing_is_not_asked_for_again(clock: Clock) -> None:
    """A proof that an object does not exist is an answer."""
    inner = ScriptedStorage(MemoryStorage())
    with pytest.raises(ObjectNotFoundError):
        RetryingStorage(inner, clock.backoff()).size("object")

    assert inner.counts() == {"size": 1}


def test_conditional_writes_and_puts_are_sent_once(memory_storage: MemoryStorage, clock: Clock) -> None:
    """Only transact knows what an unknown answer means, and a put's buffers are gone: neither is repeated here."""
    for fault in (Fault.REFUSED, Fault.ANSWER_LOST):
        inner = ScriptedStorage(memory_storage, at=0, fault=fault)
        assert isinstance(RetryingStorage(inner, clock.backoff()).create("manifest.json", b"1"), Unknown)
        assert inner.counts() == {"create": 1}

        inner = ScriptedStorage(memory_storage, at=0, fault=fault)
        outcome = RetryingStorage(inner, clock.backoff()).replace("manifest.json", b"1", expecting="1")
        assert isinstance(outcome, Unknown)
        assert inner.counts() == {"replace": 1}

        inner = ScriptedStorage(memory_storage, at=0, fault=fault)
        with pytest.raises(StorageError):
            RetryingStorage(inner, clock.backoff()).put("object", iter([b"1"]), size_bytes=1)
        assert inner.counts() == {"put": 1}
    assert clock.slept == []


# -- deletes -------------------------------------------------------------------------------------------------


@dataclass
class Answers:
    """A delete that gives prepared answers: per request, which keys failed and whether waiting helps."""

    answers: list[dict[str, bool] | StorageError]
    asked: list[list[str]] = field(default_factory=list)

    def delete(self, keys: list[str]) -> dict[str, StorageError]:
        self.asked.append([*keys])
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, StorageError):
            raise answer
        return {key: StorageError(f"{key} failed", retryable=retryable) for key, retryable in answer.items()}


def delete(clock: Clock, answers: list[dict[str, bool] | StorageError]) -> tuple[list[str], list[list[str]]]:
    """The keys that are reported as failed, and what was asked for."""
    inner = MemoryStorage()
    prepared = Answers(answers)
    inner.delete = prepared.delete  # type: ignore[method-assign,assignment]  # a fake by hand
    failed = RetryingStorage(inner, clock.backoff()).delete(["a", "b", "c"])
    return sorted(failed), prepared.asked


def test_only_failed_keys_are_deleted_again(clock: Clock) -> None:
    """A second request names the keys whose failure may pass, and no others."""
    assert delete(clock, [{"a": True, "c": True}, {"c": True}, {}]) == ([], [["a", "b", "c"], ["a", "c"], ["c"]])


def test_a_key_that_was_refused_is_reported_whatever_comes_after(clock: Clock) -> None:
    """A key that was refused for good is not gone, even if the others are deleted by a later request."""
    assert delete(clock, [{"a": False, "b": True}, {}]) == (["a"], [["a", "b", "c"], ["b"]])


def test_keys_that_fail_until_the_deadline_are_reported(clock: Clock) -> None:
    """When the deadline is over the keys that never went are reported, each with its reason."""
    failed, asked = delete(clock, [{"b": True}])
    assert failed == ["b"]
    assert asked[0] == ["a", "b", "c"]
    assert all(keys == ["b"] for keys in asked[1:])
    assert clock.time_s == pytest.approx(10.0)


def test_no_answer_to_a_delete_means_all_keys_are_in_doubt(clock: Clock) -> None:
    """A delete without an answer is sent again whole; unanswered until the deadline, it reports every key."""
    busy = StorageError("busy", retryable=True)
    assert delete(clock, [busy, {"a": True}, {}]) == ([], [["a", "b", "c"], ["a", "b", "c"], ["a"]])
    assert delete(replace(clock, time_s=0.0), [busy])[0] == ["a", "b", "c"]


def test_nothing_to_delete_is_no_request(clock: Clock) -> None:
    """An empty delete asks the store nothing."""
    inner = ScriptedStorage(MemoryStorage())
    assert RetryingStorage(inner, clock.backoff()).delete([]) == {}
    assert inner.calls == []
