"""Processes that can be caught in the middle of a call: asleep, dead, or waiting for an answer that never comes.

Each participant has a ``Gate`` to the run. At a chosen request something happens to it; a call that sleeps there leaves
its thread where it is, and everybody else goes on. Nothing here waits for time to pass: a call rests when it has ended
or sleeps, and says so.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from enum import StrEnum
from typing import TypeVar

from cloudckpt.errors import StorageError
from cloudckpt.storage import Conditions, Listed, Outcome, Storage, Unknown, Versioned
from cloudckpt.storage.base import Buffer
from cloudckpt.testing import Crash

_T = TypeVar("_T")

#: Nobody waits as long as this for anything; a test that does has hung.
_HUNG_S = 60


class Trouble(StrEnum):
    """What happens at the chosen request.

    Attributes:
        REFUSED: the store says no and does nothing.
        LOST: the store does it, and the answer never comes.
        LATE: no answer comes, and the request arrives at any later moment. Only for writes; others get no answer.
        DIES_BEFORE: the process dies before the request leaves.
        DIES_AFTER: the process dies before it has read the answer.
        SLEEPS: the process stands still before the request leaves, until somebody wakes it.
    """

    REFUSED = "refused"
    LOST = "lost"
    LATE = "late"
    DIES_BEFORE = "dies before"
    DIES_AFTER = "dies after"
    SLEEPS = "sleeps"


class Gate:
    """One process's way to the store. See ``Storage`` for the verbs.

    Args:
        inner: the run, as this process sees it.
        late: where requests wait that are on their way.

    Attributes:
        changed: notified when the process falls asleep, or a call of it ends.
        asleep: whether it stands still before a request.
        dead: whether it is dead: every further request of it ends it once more.
    """

    def __init__(self, inner: Storage, late: list[Callable[[], object]]) -> None:
        self.changed = threading.Condition()
        self.asleep = False
        self.dead = False
        self._inner = inner
        self._late = late
        self._trouble: Trouble | None = None
        self._left = 0

    def arm(self, trouble: Trouble | None, request: int) -> None:
        """Let something happen at a later request, counted from here (0: the next one)."""
        with self.changed:
            self._trouble, self._left = trouble, request

    def wake(self, *, dead: bool = False) -> None:
        """Let a sleeping process go on, or find itself dead."""
        with self.changed:
            self.dead = self.dead or dead
            self.asleep = False
            self.changed.notify_all()

    def _pass(self) -> Trouble | None:
        """Before each request: what happens at it."""
        with self.changed:
            due = self._trouble if self._trouble is not None and self._left == 0 else None
            if self._trouble is not None:
                self._left -= 1
            if due is not None:
                self._trouble = None
            if due is Trouble.SLEEPS:
                self.asleep = True
                self.changed.notify_all()
            if due is Trouble.DIES_BEFORE:
                self.dead = True
            # Whatever thread of it asks: a process stands still as a whole.
            assert self.changed.wait_for(lambda: not self.asleep, _HUNG_S), "nobody wakes it"
            self._check_alive()
            return due

    def _check_alive(self) -> None:
        if self.dead:
            raise Crash("this process is dead")

    def _do(self, verb: Callable[[], _T], *, writes: bool = False) -> _T:
        trouble = self._pass()
        if trouble is Trouble.REFUSED:
            raise StorageError("the store says no", retryable=False)
        if trouble is Trouble.LATE:
            if writes:
                self._late.append(verb)
            raise StorageError("no answer", retryable=True)
        answer = verb()
        if trouble is Trouble.LOST:
            raise StorageError("the answer is lost", retryable=True)
        if trouble is Trouble.DIES_AFTER:
            self.dead = True
        self._check_alive()
        return answer

    # -- the verbs -------------------------------------------------------------------------------------------

    @property
    def conditions(self) -> Conditions:
        return self._inner.conditions

    @conditions.setter
    def conditions(self, found: Conditions) -> None:
        self._inner.conditions = found

    @property
    def url(self) -> str:
        return self._inner.url

    def read(self, key: str, *, limit_bytes: int) -> Versioned:
        return self._do(lambda: self._inner.read(key, limit_bytes=limit_bytes))

    def create(self, key: str, body: bytes) -> Outcome:
        return self._write(lambda: self._inner.create(key, body))

    def replace(self, key: str, body: bytes, *, expecting: str) -> Outcome:
        return self._write(lambda: self._inner.replace(key, body, expecting=expecting))

    def _write(self, verb: Callable[[], Outcome]) -> Outcome:
        try:
            return self._do(verb, writes=True)
        except StorageError as exc:
            return Unknown(exc)

    def put(
        self, key: str, buffers: Iterable[Buffer], *, size_bytes: int, progress: Callable[[int], None] | None = None
    ) -> None:
        # What arrives late is what was sent: the caller's memory may be something else by then.
        body = b"".join(bytes(buffer) for buffer in buffers)
        if progress is not None:
            progress(len(body))
        self._do(lambda: self._inner.put(key, [body], size_bytes=size_bytes), writes=True)

    def read_into(self, key: str, start: int, *targets: memoryview) -> None:
        self._do(lambda: self._inner.read_into(key, start, *targets))

    def size(self, key: str) -> int:
        return self._do(lambda: self._inner.size(key))

    def list(self, prefix: str = "", *, limit: int | None = None) -> Iterator[Listed]:
        return iter(self._do(lambda: [*self._inner.list(prefix, limit=limit)]))

    def delete(self, keys: Iterable[str]) -> dict[str, StorageError]:
        going = [*keys]
        return self._do(lambda: self._inner.delete(going))

    def abort_uploads(self, prefix: str, *, spare: Callable[[str], bool] = lambda _: False) -> int:
        return self._do(lambda: self._inner.abort_uploads(prefix, spare=spare))

    def close(self) -> None:
        pass


class Call:
    """A call of the product in a thread of its own.

    Attributes:
        ended: whether it has returned or raised.
        value: what it returned.
        error: what it raised.
    """

    def __init__(self, name: str, gate: Gate, act: Callable[[], object]) -> None:
        self.name = name
        self.gate = gate
        self.ended = False
        self.value: object = None
        self.error: BaseException | None = None
        self._act = act
        self._thread = threading.Thread(target=self._run, name=name)
        self._thread.start()

    def __repr__(self) -> str:
        return f"<{self.name}: {'ended' if self.ended else 'asleep' if self.gate.asleep else 'running'}>"

    def _run(self) -> None:
        try:
            self.value = self._act()
        except BaseException as exc:
            self.error = exc
        with self.gate.changed:
            self.ended = True
            self.gate.changed.notify_all()

    def rest(self) -> bool:
        """Wait until it has ended or sleeps; whether it has ended."""
        with self.gate.changed:
            rests = self.gate.changed.wait_for(lambda: self.ended or self.gate.asleep, _HUNG_S)
        assert rests, f"{self.name} hangs"
        if self.ended:
            self._thread.join()
        return self.ended


class Clock:
    """The only time there is. It goes on when somebody looks, sleeps, or says so; and it may jump back.

    Attributes:
        minutes: the label that entries get, in minutes.
    """

    def __init__(self) -> None:
        self.minutes = 0
        self._seconds = 0.0

    def now(self) -> float:
        """The monotonic clock."""
        self._seconds += 0.001
        return self._seconds

    def sleep(self, seconds: float) -> None:
        """A pause, which takes no time."""
        self._seconds += seconds
