"""The participants themselves: what happens at a chosen request, and what a call does that sleeps there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from cloudckpt.errors import StorageError
from cloudckpt.storage import Landed, MemoryStorage, Storage, Unknown
from cloudckpt.storage.base import Listed
from cloudckpt.testing import Crash
from tests.stateful.participants import Call, Clock, Gate, Trouble


@pytest.fixture
def inner() -> MemoryStorage:
    """One object, at version 1."""
    storage = MemoryStorage()
    storage.create("old", b"1")
    return storage


VERBS: dict[str, Callable[[Storage], Any]] = {
    "read": lambda s: s.read("old", limit_bytes=9).body,
    "read_into": lambda s: s.read_into("old", 0, memoryview(bytearray(1))),
    "size": lambda s: s.size("old"),
    "list": lambda s: [*s.list()],
    "put": lambda s: s.put("new", [b"12", b"3"], size_bytes=3),
    "delete": lambda s: s.delete(["old"]),
    "abort_uploads": lambda s: s.abort_uploads("o"),
}


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_passes_unless_something_is_armed(inner: MemoryStorage, verb: str) -> None:
    """The answer is the store's; with a fault armed at the second request the first one passes and the second fails."""
    gate = Gate(inner, [])
    expected = VERBS[verb](MemoryStorage() if verb in {"put", "abort_uploads"} else inner)
    inner.put("old", [b"1"], size_bytes=1)
    gate.arm(Trouble.REFUSED, 1)
    assert VERBS[verb](gate) == expected
    inner.put("old", [b"1"], size_bytes=1)
    with pytest.raises(StorageError, match="says no"):
        VERBS[verb](gate)
    VERBS[verb](gate)


@pytest.mark.parametrize(
    ("trouble", "retryable", "written"),
    [(Trouble.REFUSED, False, False), (Trouble.LOST, True, True), (Trouble.LATE, True, False)],
)
def test_a_conditional_write_has_three_outcomes(
    inner: MemoryStorage, trouble: Trouble, retryable: bool, written: bool
) -> None:
    """Refused, done without an answer, or on its way: unknown each time; what is on its way arrives when it is let."""
    late: list[Callable[[], object]] = []
    gate = Gate(inner, late)
    version = inner.read("old", limit_bytes=9).version
    gate.arm(trouble, 0)
    answer = gate.replace("old", b"2", expecting=version)
    assert isinstance(answer, Unknown)
    assert isinstance(answer.cause, StorageError)
    assert answer.cause.retryable is retryable
    assert inner.read("old", limit_bytes=9).body == (b"2" if written else b"1")
    assert len(late) == (trouble is Trouble.LATE)
    for request in late:
        assert isinstance(request(), Landed)
        assert inner.read("old", limit_bytes=9).body == b"2"


def test_the_dead_send_nothing(inner: MemoryStorage) -> None:
    """Before a request, or after it was carried out: from then on every request ends the process once more."""
    before, after = Gate(inner, []), Gate(inner, [])
    before.arm(Trouble.DIES_BEFORE, 0)
    after.arm(Trouble.DIES_AFTER, 0)
    with pytest.raises(Crash):
        before.put("before", [b"1"], size_bytes=1)
    with pytest.raises(Crash):
        after.put("after", [b"1"], size_bytes=1)
    for gate in (before, after):
        with pytest.raises(Crash):
            gate.size("old")
    assert [*inner.list()] == [Listed("after", 1), Listed("old", 1)]


def test_a_call_sleeps_and_wakes(inner: MemoryStorage) -> None:
    """It rests at its second request, nothing of which has happened, and ends when it is woken; or finds itself dead."""
    for dead in (False, True):
        gate = Gate(inner, [])
        gate.arm(Trouble.SLEEPS, 1)

        def act(gate: Gate = gate) -> int:
            gate.size("old")
            gate.put(f"by {gate.dead}", [b"1"], size_bytes=1)
            return 7

        call = Call("a call", gate, act)
        assert not call.rest()
        assert "asleep" in repr(call)
        assert [item.key for item in inner.list("by ")] == (["by False"] if dead else [])
        gate.wake(dead=dead)
        assert call.rest()
        assert "ended" in repr(call)
        assert call.value == (None if dead else 7)
        assert isinstance(call.error, Crash) is dead
        if dead:
            assert [item.key for item in inner.list("by ")] == ["by False"]


def test_a_call_tells_what_it_raised(inner: MemoryStorage) -> None:
    """An error ends the call, and is kept for whoever asks."""
    call = Call("a call", Gate(inner, []), lambda: inner.size("nothing"))
    assert call.rest()
    assert isinstance(call.error, StorageError)


def test_a_gate_knows_what_its_store_knows(inner: MemoryStorage) -> None:
    """URL and conditions are the store's; closing a gate closes nobody else's."""
    gate = Gate(inner, [])
    gate.conditions = inner.conditions
    gate.close()
    assert (gate.url, gate.conditions) == (inner.url, inner.conditions)
    assert isinstance(gate.create("new", b"1"), Landed)


def test_the_clock_goes_on_by_itself() -> None:
    """Each look is a moment later, and a pause costs nothing but what it says."""
    clock = Clock()
    first = clock.now()
    clock.sleep(5)
    assert 5 < clock.now() - first < 6
