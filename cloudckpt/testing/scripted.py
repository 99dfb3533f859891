"""A storage that keeps a log and fails at one chosen call: stop the program at every call, do not pick one."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import TypeVar

from cloudckpt.errors import StorageError
from cloudckpt.storage.base import Buffer, Conditions, Listed, Outcome, Part, Source, Storage, Unknown, Versioned

__all__ = ["Call", "Crash", "Fault", "ScriptedStorage"]

_T = TypeVar("_T")

#: How many calls later a late one is carried out: the same process has tried again by then.
_LATE_BY = 4


class Fault(StrEnum):
    """What goes wrong at the chosen call.

    Attributes:
        REFUSED: the store says no and does nothing. Not retryable.
        ANSWER_LOST: the store does it, and the answer never comes. Retryable.
        LATE: the answer never comes, and the store does it some calls later, when the process has gone on: whatever a
            write says must hold then. Retryable. What only reads has nothing to do late.
        CRASH_BEFORE: the process dies before the request leaves.
        CRASH_HALF: the process dies on the way: half of a put's bytes are sent (nothing becomes visible), half of a
            delete's keys are gone; any other verb is not carried out.
        CRASH_AFTER: the process dies after the store did it, before the answer is read.
    """

    REFUSED = "refused"
    ANSWER_LOST = "answer lost"
    LATE = "lands late"
    CRASH_BEFORE = "crash before"
    CRASH_HALF = "crash half-way"
    CRASH_AFTER = "crash after"


class Crash(BaseException):
    """The process is dead. No ``Exception``, so that no handler goes on as if it were alive."""


@dataclass(frozen=True, slots=True)
class Call:
    """One request: its verb, and the keys (for ``list`` and ``abort_uploads``: the prefix) it named."""

    verb: str
    keys: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.verb}({', '.join(self.keys)})"


class ScriptedStorage:
    """A storage around a storage: logs each call and, at call number ``at`` (from 0), applies ``fault``.

    After a crash every further call raises ``Crash`` as well, calls of other threads that are under way
    included: the process is dead. What it left behind is in ``inner``, for the next process.

    ``close`` and ``url`` are no requests: they are neither logged nor counted.

    Attributes:
        calls: the log, in the order in which the calls began.
    """

    def __init__(self, inner: Storage, at: int | None = None, fault: Fault | None = None) -> None:
        if (at is None) != (fault is None):
            raise TypeError("at and fault go together: which call fails, and how")
        self.calls: list[Call] = []
        self._inner = inner
        self._at = at
        self._fault = fault
        self._mutex = threading.Lock()
        self._dead: str | None = None
        self._in_flight: Callable[[], object] | None = None

    @property
    def conditions(self) -> Conditions:
        """See ``Storage.conditions``."""
        return self._inner.conditions

    @conditions.setter
    def conditions(self, found: Conditions) -> None:
        self._inner.conditions = found

    def __repr__(self) -> str:
        return f"<ScriptedStorage {self._inner.url}: {len(self.calls)} calls, {self._fault} at {self._at}>"

    @property
    def inner(self) -> Storage:
        """The storage underneath: what is there, whoever died."""
        return self._inner

    @property
    def fired(self) -> bool:
        """Whether the chosen call was reached."""
        return self._at is not None and len(self.calls) > self._at

    @property
    def dead(self) -> bool:
        """Whether the process crashed."""
        return self._dead is not None

    def land(self) -> None:
        """Carry out what is still in flight, if anything: at the end of a history, whoever died."""
        with self._mutex:
            late, self._in_flight = self._in_flight, None
        if late is not None:
            late()

    def counts(self) -> Counter[str]:
        """How many requests of each verb were made."""
        with self._mutex:
            return Counter(call.verb for call in self.calls)

    def keys_of(self, *verbs: str) -> list[str]:
        """The keys that requests of these verbs named, in order."""
        with self._mutex:
            return [key for call in self.calls if call.verb in verbs for key in call.keys]

    def forget(self) -> None:
        """Empty the log, to count from here. Only without a fault, whose number it would shift."""
        if self._at is not None:
            raise TypeError("the log numbers the calls; it cannot be emptied under a fault")
        with self._mutex:
            self.calls.clear()

    # -- what happens to a call ------------------------------------------------------------------------------

    def _begin(self, verb: str, *keys: str) -> Fault | None:
        if self._at is not None and len(self.calls) > self._at + _LATE_BY:
            self.land()
        with self._mutex:
            self._check_alive()
            number = len(self.calls)
            call = Call(verb, keys)
            self.calls.append(call)
            fault = self._fault if number == self._at else None
            if fault is Fault.CRASH_BEFORE:
                self._dead = f"crashed before call {number}, {call}"
                self._check_alive()
            return fault

    def _check_alive(self) -> None:
        if self._dead is not None:
            raise Crash(self._dead)

    def _die(self, fault: Fault) -> Crash:
        with self._mutex:
            call = self.calls[self._at or 0]
            self._dead = f"{fault} in call {self._at}, {call}"
        return Crash(self._dead)

    def _do(
        self,
        fault: Fault | None,
        verb: Callable[[], _T],
        *,
        half: Callable[[], object] | None = None,
        late: Callable[[], object] | None = None,
    ) -> _T:
        if fault is Fault.REFUSED:
            raise StorageError(f"call {self._at} was refused", retryable=False)
        if fault is Fault.CRASH_HALF:
            if half is not None:
                half()
            raise self._die(fault)
        if fault is Fault.LATE:
            with self._mutex:
                self._in_flight = late or verb
            raise StorageError(f"call {self._at} was not answered in time", retryable=True)
        answer = verb()
        if fault is Fault.ANSWER_LOST:
            raise StorageError(f"the answer to call {self._at} was lost", retryable=True)
        if fault is Fault.CRASH_AFTER:
            raise self._die(fault)
        self._check_alive()
        return answer

    def _ask(self, fault: Fault | None, verb: Callable[[], _T]) -> _T:
        return self._do(fault, verb, late=lambda: None)

    def _write(self, fault: Fault | None, verb: Callable[[], Outcome]) -> Outcome:
        try:
            return self._do(fault, verb)
        except StorageError as exc:
            return Unknown(exc)

    # -- the verbs -------------------------------------------------------------------------------------------

    @property
    def url(self) -> str:
        """See ``Storage.url``."""
        return self._inner.url

    def read(self, key: str, *, limit_bytes: int) -> Versioned:
        """See ``Storage.read``."""
        return self._ask(self._begin("read", key), lambda: self._inner.read(key, limit_bytes=limit_bytes))

    def create(self, key: str, body: bytes) -> Outcome:
        """See ``Storage.create``."""
        return self._write(self._begin("create", key), lambda: self._inner.create(key, body))

    def replace(self, key: str, body: bytes, *, expecting: str) -> Outcome:
        """See ``Storage.replace``."""
        return self._write(self._begin("replace", key), lambda: self._inner.replace(key, body, expecting=expecting))

    def put(
        self, key: str, buffers: Iterable[Buffer], *, size_bytes: int, progress: Callable[[int], None] | None = None
    ) -> None:
        """See ``Storage.put``."""
        fault = self._begin("put", key)

        def send(stop_at: int | None = None) -> None:
            mortal: Iterable[Buffer] = (
                _MortalSource(buffers, self._pass, stop_at)
                if isinstance(buffers, Source)
                else _mortal(buffers, self._pass, stop_at)
            )
            self._inner.put(key, mortal, size_bytes=size_bytes, progress=progress)

        late: Callable[[], object] | None = None
        if fault is Fault.LATE:
            sent = b"".join(map(bytes, buffers))  # as they were when the request left
            late = partial(self._inner.put, key, [sent], size_bytes=size_bytes)
        self._do(fault, send, half=lambda: send(size_bytes // 2), late=late)

    def _pass(self, last: bool) -> None:  # noqa: FBT001 - called in one way
        """Before each buffer and part of a put: the dead send nothing, and ``last`` is where the process dies."""
        self._check_alive()
        if last:
            raise self._die(Fault.CRASH_HALF)

    def read_into(self, key: str, start: int, *targets: memoryview) -> None:
        """See ``Storage.read_into``."""
        self._ask(self._begin("read_into", key), lambda: self._inner.read_into(key, start, *targets))

    def size(self, key: str) -> int:
        """See ``Storage.size``."""
        return self._ask(self._begin("size", key), lambda: self._inner.size(key))

    def list(self, prefix: str = "", *, limit: int | None = None) -> Iterator[Listed]:
        """See ``Storage.list``; carried out when it is called, as one request."""
        return iter(self._ask(self._begin("list", prefix), lambda: [*self._inner.list(prefix, limit=limit)]))

    def delete(self, keys: Iterable[str]) -> dict[str, StorageError]:
        """See ``Storage.delete``."""
        going = [*keys]
        return self._do(
            self._begin("delete", *going),
            lambda: self._inner.delete(going),
            half=lambda: self._inner.delete(going[: len(going) // 2]),
        )

    def abort_uploads(self, prefix: str, *, spare: Callable[[str], bool] = lambda _: False) -> int:
        """See ``Storage.abort_uploads``."""
        fault = self._begin("abort_uploads", prefix)
        return self._ask(fault, lambda: self._inner.abort_uploads(prefix, spare=spare))

    def close(self) -> None:
        """See ``Storage.close``."""
        self._check_alive()
        self._inner.close()


def _mortal(buffers: Iterable[Buffer], passes: Callable[[bool], None], stop_at: int | None) -> Iterator[Buffer]:
    """The buffers up to ``stop_at``, where the process dies."""
    sent = 0
    for buffer in buffers:
        passes(False)
        view = memoryview(buffer)
        if stop_at is not None and sent + view.nbytes > stop_at:
            yield view.cast("B")[: stop_at - sent]
            break
        sent += view.nbytes
        yield buffer
    if stop_at is not None:
        passes(True)


class _MortalSource:
    """A source of a process that dies: its parts can be held in any order until ``stop_at`` bytes were given out."""

    def __init__(self, inner: Source, passes: Callable[[bool], None], stop_at: int | None) -> None:
        self._inner = inner
        self._passes = passes
        self._stop_at = stop_at
        self._given = 0
        self._mutex = threading.Lock()

    @property
    def size_bytes(self) -> int:
        """See ``Source.size_bytes``."""
        return self._inner.size_bytes

    @property
    def together_bytes(self) -> int:
        """See ``Source.together_bytes``."""
        return self._inner.together_bytes

    def hold(self, start: int, length: int) -> AbstractContextManager[Part]:
        """See ``Source.hold``; what is held when the process dies may have been sent, and is the last."""
        with self._mutex:
            self._passes(self._stop_at is not None and self._given + length > self._stop_at)
            self._given += length
        return self._held(start, length)

    @contextmanager
    def _held(self, start: int, length: int) -> Iterator[Part]:
        with self._inner.hold(start, length) as part:
            yield part
            self._passes(False)

    def stopping(self, act: Callable[[], None]) -> AbstractContextManager[None]:
        """See ``Source.stopping``."""
        return self._inner.stopping(act)

    def __iter__(self) -> Iterator[memoryview]:
        for buffer in _mortal(self._inner, self._passes, self._stop_at):
            yield memoryview(buffer)
