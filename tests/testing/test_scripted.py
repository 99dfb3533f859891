"""ScriptedStorage: what a fault does to its call, and to the calls after it."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import crc32c
import pytest

from cloudckpt.errors import StorageError
from cloudckpt.storage import Landed, MemoryStorage, Storage, Unknown
from cloudckpt.storage.base import Part, Source
from cloudckpt.storage.body import NeverStopped
from cloudckpt.testing import Call, Crash, Fault, ScriptedStorage, StorageContract

WRITES: dict[str, Callable[[Storage], object]] = {
    "create": lambda s: s.create("new", b"1"),
    "replace": lambda s: s.replace("old", b"2", expecting="1"),
    "put": lambda s: s.put("put", iter([b"12", b"345"]), size_bytes=5),
    "delete": lambda s: s.delete(["old", "older"]),
}
READS: dict[str, Callable[[Storage], object]] = {
    "read": lambda s: s.read("old", limit_bytes=9),
    "read_into": lambda s: s.read_into("old", 0, memoryview(bytearray(1))),
    "size": lambda s: s.size("old"),
    "list": lambda s: s.list("o"),
    "abort_uploads": lambda s: s.abort_uploads("o"),
}
VERBS = {**READS, **WRITES}


def filled() -> MemoryStorage:
    """Two objects, the older one of which has version "1"."""
    storage = MemoryStorage()
    storage.create("old", b"1")
    storage.create("older", b"1")
    return storage


def state(storage: MemoryStorage) -> dict[str, bytes]:
    """What is there."""
    return {item.key: storage.read(item.key, limit_bytes=99).body for item in storage.list()}


def carried_out(verb: str) -> dict[str, bytes]:
    """What is there after the verb, without any fault."""
    storage = filled()
    VERBS[verb](storage)
    return state(storage)


class TestScripted(StorageContract):
    """Without a fault it is the storage inside."""

    @pytest.fixture
    def storage(self, memory_storage: MemoryStorage) -> Storage:
        return ScriptedStorage(memory_storage)


def test_the_log_tells_verbs_and_keys_in_order() -> None:
    """Every request is logged with the keys it named; closing is none."""
    storage = ScriptedStorage(filled())
    for ask in VERBS.values():
        ask(storage)
    storage.close()

    assert [call.verb for call in storage.calls] == [*VERBS]
    assert storage.calls[-1] == Call("delete", ("old", "older"))
    assert storage.counts() == dict.fromkeys(VERBS, 1)
    assert storage.keys_of("create", "put") == ["new", "put"]
    storage.forget()
    assert storage.calls == []


@pytest.mark.parametrize("verb", VERBS)
def test_a_refused_call_does_nothing(verb: str) -> None:
    """The store says no for good; the process lives, and its next call is carried out."""
    inner = filled()
    storage = ScriptedStorage(inner, at=0, fault=Fault.REFUSED)
    try:
        outcome = VERBS[verb](storage)
        assert isinstance(outcome, Unknown)
        cause = outcome.cause
    except StorageError as exc:
        cause = exc

    assert isinstance(cause, StorageError)
    assert not cause.retryable
    assert state(inner) == state(filled())
    assert isinstance(storage.create("later", b"1"), Landed)


@pytest.mark.parametrize("verb", VERBS)
def test_a_lost_answer_hides_what_was_done(verb: str) -> None:
    """The store has done it, and what comes back says neither that nor the contrary."""
    inner = filled()
    storage = ScriptedStorage(inner, at=0, fault=Fault.ANSWER_LOST)
    try:
        outcome = VERBS[verb](storage)
        assert isinstance(outcome, Unknown)
        cause = outcome.cause
    except StorageError as exc:
        cause = exc

    assert isinstance(cause, StorageError)
    assert cause.retryable
    assert state(inner) == carried_out(verb)
    assert storage.fired
    assert not storage.dead


@pytest.mark.parametrize("verb", VERBS)
def test_a_late_call_is_carried_out_when_the_process_has_gone_on(verb: str) -> None:
    """The caller is told nothing in time; four calls later the store has done it, with the bytes of back then."""
    inner = filled()
    storage = ScriptedStorage(inner, at=0, fault=Fault.LATE)
    try:
        outcome = VERBS[verb](storage)
        assert isinstance(outcome, Unknown)
        cause = outcome.cause
    except StorageError as exc:
        cause = exc

    assert isinstance(cause, StorageError)
    assert cause.retryable
    for _ in range(4):
        storage.size("older")
        assert state(inner) == state(filled())
    with contextlib.suppress(StorageError):
        storage.size("older")  # which a late delete has taken away
    assert state(inner) == carried_out(verb)
    assert not storage.dead


def test_what_is_still_in_flight_at_the_end_lands_when_asked_to() -> None:
    """A late replace meets its own condition when it lands: if somebody was faster, it is lost."""
    for faster, left in ((False, b"2"), (True, b"theirs")):
        inner = filled()
        storage = ScriptedStorage(inner, at=0, fault=Fault.LATE)
        assert isinstance(storage.replace("old", b"2", expecting="1"), Unknown)
        if faster:
            assert isinstance(storage.replace("old", b"theirs", expecting="1"), Landed)
        storage.land()
        storage.land()
        assert inner.read("old", limit_bytes=9).body == left


@pytest.mark.parametrize("fault", [Fault.CRASH_BEFORE, Fault.CRASH_HALF, Fault.CRASH_AFTER])
@pytest.mark.parametrize("verb", VERBS)
def test_after_a_crash_the_process_is_dead(verb: str, fault: Fault) -> None:
    """A crash before does nothing, one after has done it, half-way shows no object, and nothing works ever after."""
    inner = filled()
    storage = ScriptedStorage(inner, at=1, fault=fault)
    storage.size("old")
    with pytest.raises(Crash):
        VERBS[verb](storage)

    left = state(inner)
    if fault is Fault.CRASH_HALF and verb == "delete":
        assert left == {"older": b"1"}
    else:
        assert left == (carried_out(verb) if fault is Fault.CRASH_AFTER else state(filled()))
    assert storage.dead
    for ask in (*VERBS.values(), ScriptedStorage.close):
        with pytest.raises(Crash):
            ask(storage)
    assert state(inner) == left
    assert len(storage.calls) == 2


def test_a_crash_ends_the_calls_under_way() -> None:
    """A put that another thread has under way when the process dies becomes no object."""
    inner = filled()
    storage = ScriptedStorage(inner, at=1, fault=Fault.CRASH_AFTER)

    def buffers() -> Iterator[bytes]:
        yield b"12"
        with pytest.raises(Crash):
            storage.size("old")
        yield b"345"

    with pytest.raises(Crash):
        storage.put("put", buffers(), size_bytes=5)
    assert state(inner) == state(filled())


class Parts(NeverStopped):
    """A source of ten bytes."""

    size_bytes = together_bytes = 10

    @contextmanager
    def hold(self, start: int, length: int) -> Iterator[Part]:
        view = memoryview(b"0123456789")[start : start + length]
        yield Part((view,), crc32c.crc32c(view))

    def __iter__(self) -> Iterator[memoryview]:
        for start in range(0, 10, 4):
            with self.hold(start, min(4, 10 - start)) as part:
                yield from part.views


class ByRange(MemoryStorage):
    """Takes parts of two bytes of a source, last ones first, and knows what it held."""

    def __init__(self) -> None:
        super().__init__()
        self.held: list[int] = []

    def put(self, key: str, buffers: Any, *, size_bytes: int, progress: Any = None) -> None:
        assert isinstance(buffers, Source)
        body = bytearray(size_bytes)
        for start in reversed(range(0, size_bytes, 2)):
            with buffers.hold(start, 2) as part:
                body[start : start + 2] = b"".join(part.views)
                self.held.append(start)
        super().put(key, [bytes(body)], size_bytes=size_bytes, progress=progress)


def test_a_source_stays_one() -> None:
    """The storage underneath may take ranges of it, and gets its bytes."""
    storage = ScriptedStorage(inner := ByRange())
    storage.put("put", Parts(), size_bytes=10)
    assert state(inner) == {"put": b"0123456789"}
    storage = ScriptedStorage(iterated := MemoryStorage())
    storage.put("put", Parts(), size_bytes=10)
    assert state(iterated) == {"put": b"0123456789"}


def test_a_crash_half_way_bites_a_source_too() -> None:
    """Half of its bytes may be held, in whatever order; then the process is dead, and no object is there."""
    inner = ByRange()
    storage = ScriptedStorage(inner, at=0, fault=Fault.CRASH_HALF)
    with pytest.raises(Crash):
        storage.put("put", Parts(), size_bytes=10)
    assert inner.held == [8, 6]
    assert state(inner) == {}
    assert storage.dead


def test_whoever_holds_a_part_when_the_process_dies_is_dead() -> None:
    """Another thread's crash ends a put between two parts."""
    inner = ByRange()
    storage = ScriptedStorage(inner, at=1, fault=Fault.CRASH_BEFORE)

    class Dying(Parts):
        @contextmanager
        def hold(self, start: int, length: int) -> Iterator[Part]:
            with super().hold(start, length) as part:
                with pytest.raises(Crash):
                    storage.size("old")
                yield part

    with pytest.raises(Crash):
        storage.put("put", Dying(), size_bytes=10)
    assert inner.held == [8]
    assert state(inner) == {}


def test_half_a_script_is_refused() -> None:
    """A fault without a call, or a call without a fault, is a mistake of the test."""
    with pytest.raises(TypeError, match="go together"):
        ScriptedStorage(MemoryStorage(), at=3)
    with pytest.raises(TypeError, match="cannot be emptied"):
        ScriptedStorage(MemoryStorage(), at=3, fault=Fault.REFUSED).forget()


@pytest.mark.processes
def test_importing_the_package_loads_no_test_tool() -> None:
    """``import cloudckpt.testing``, and its scripted storage, need neither pytest nor hypothesis nor torch."""
    code = (
        "import sys, cloudckpt.testing; cloudckpt.testing.ScriptedStorage; cloudckpt.testing.check_store; "
        "print(sorted({'pytest', 'hypothesis', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.stdout == "[]\n", done.stderr
