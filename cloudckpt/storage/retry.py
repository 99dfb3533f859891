"""One way to wait between tries, and a storage that retries what is safe to retry.

``create`` and ``replace`` pass through: only ``transact`` knows what an unknown answer means.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from cloudckpt.errors import StorageError
from cloudckpt.storage.base import (
    Attested,
    Attesting,
    Buffer,
    Conditions,
    Listed,
    Outcome,
    Paced,
    Storage,
    Versioned,
)

__all__ = ["Backoff", "RetryingStorage", "given_up"]

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Backoff:
    """Exponential pauses with full jitter under one deadline.

    The pause before try *n* is uniform in [0, min(cap, base * 2**(n-1))]; full jitter spreads colliding
    writers best (M. Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015).
    """

    deadline_s: float
    base_s: float = 0.1
    cap_s: float = 5.0
    now: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    uniform: Callable[[float, float], float] = random.uniform

    def pauses(self) -> Iterator[float]:
        """How long to wait before each further try, in seconds; ends when the deadline, counted from here, is over.

        There is always at least one: a first answer that took the whole deadline still gets a second look.
        """
        return self._until(self.now() + self.deadline_s)

    def _until(self, end: float) -> Iterator[float]:
        number = 0
        while number == 0 or self.now() < end:
            pause = self.uniform(0.0, min(self.cap_s, self.base_s * 2.0 ** min(number, 30)))
            number += 1
            yield max(0.0, min(pause, end - self.now()))

    def tries(self) -> Iterator[int]:
        """The numbers of the tries, from 0, each after its pause; there are always at least two."""
        pauses = self.pauses()
        yield 0
        for number, pause in enumerate(pauses, 1):
            self.sleep(pause)
            yield number


def given_up(last: StorageError, tries: int, deadline_s: float) -> StorageError:
    """What is told of a request that was refused until its deadline: the last answer, and how often it was tried."""
    return StorageError(f"{last} (tried {tries} times in {deadline_s:g} s)", retryable=True)


class RetryingStorage:
    """A storage that tries its reads, lists and deletes again while the store says that waiting may help.

    A ``put`` is not retried here: its buffers can be consumed only once. A backend that sends parts retries
    each part itself, from the memory it still holds.
    """

    def __init__(self, inner: Storage, backoff: Backoff) -> None:
        self._inner = inner
        self._backoff = backoff
        self.create: Callable[[str, bytes], Outcome] = inner.create
        self.close: Callable[[], None] = inner.close

    @property
    def conditions(self) -> Conditions:
        """See ``Storage.conditions``."""
        return self._inner.conditions

    @conditions.setter
    def conditions(self, found: Conditions) -> None:
        self._inner.conditions = found

    @property
    def reads_at_once(self) -> int | None:
        """See ``Paced.reads_at_once``; None if the storage underneath does not know."""
        return self._inner.reads_at_once if isinstance(self._inner, Paced) else None

    @property
    def inner(self) -> Storage:
        """The storage underneath."""
        return self._inner

    @property
    def url(self) -> str:
        """See ``Storage.url``."""
        return self._inner.url

    def _again(self, verb: Callable[[], _T]) -> _T:
        last: StorageError | None = None
        for _ in self._backoff.tries():
            try:
                return verb()
            except StorageError as exc:
                if not exc.retryable:
                    raise
                last = exc
        raise StorageError(f"{last} (tried again for {self._backoff.deadline_s:g} s)", retryable=True) from last

    def read(self, key: str, *, limit_bytes: int) -> Versioned:
        """See ``Storage.read``."""
        return self._again(lambda: self._inner.read(key, limit_bytes=limit_bytes))

    def replace(self, key: str, body: bytes, *, expecting: str) -> Outcome:
        """See ``Storage.replace``; not retried."""
        return self._inner.replace(key, body, expecting=expecting)

    def put(
        self, key: str, buffers: Iterable[Buffer], *, size_bytes: int, progress: Callable[[int], None] | None = None
    ) -> None:
        """See ``Storage.put``; not retried."""
        self._inner.put(key, buffers, size_bytes=size_bytes, progress=progress)

    def read_into(self, key: str, start: int, *targets: memoryview) -> None:
        """See ``Storage.read_into``."""
        self._again(lambda: self._inner.read_into(key, start, *targets))

    def size(self, key: str) -> int:
        """See ``Storage.size``."""
        return self._again(lambda: self._inner.size(key))

    def attest(self, key: str) -> Attested:
        """See ``Attesting.attest``; of a storage that knows no checksums, the size."""
        inner = self._inner
        if isinstance(inner, Attesting):
            return self._again(lambda: inner.attest(key))
        return Attested(self.size(key), None)

    def list(self, prefix: str = "", *, limit: int | None = None) -> Iterator[Listed]:
        """See ``Storage.list``; a listing is read to its end before the first key is given."""
        return iter(self._again(lambda: [*self._inner.list(prefix, limit=limit)]))

    def delete(self, keys: Iterable[str]) -> dict[str, StorageError]:
        """See ``Storage.delete``; the keys that failed retryably are tried again."""
        left = [*keys]
        refused: dict[str, StorageError] = {}
        failed: dict[str, StorageError] = {}
        for _ in self._backoff.tries() if left else ():
            try:
                failed = self._inner.delete(left)
            except StorageError as exc:
                if not exc.retryable:
                    raise
                # No answer about any of them; one deadline covers this and the single failures.
                failed = dict.fromkeys(left, exc)
            refused |= {key: exc for key, exc in failed.items() if not exc.retryable}
            left = [key for key, exc in failed.items() if exc.retryable]
            if not left:
                break
        return refused | {key: failed[key] for key in left}

    def abort_uploads(self, prefix: str, *, spare: Callable[[str], bool] = lambda _: False) -> int:
        """See ``Storage.abort_uploads``."""
        return self._again(lambda: self._inner.abort_uploads(prefix, spare=spare))
