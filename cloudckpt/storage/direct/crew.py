"""A few threads that carry parts side by side, as many as the store takes."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TypeVar

from cloudckpt.errors import StorageError
from cloudckpt.storage.retry import Backoff

__all__ = ["Attempts", "BrokenOff", "Crew", "Stop"]

_T = TypeVar("_T")

#: One slow-down a second: the refusals of parts that were under way together are one refusal.
_REFUSAL_S = 1.0


class BrokenOff(Exception):  # noqa: N818 - the reason is told elsewhere
    """The transfer has been given up, by Ctrl-C or by another part's failure."""


class Stop:
    """The end of one transfer, as those who work on it see it. Each can leave something to be done at once."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._mutex = threading.Lock()
        self._acts: dict[int, Callable[[], None]] = {}
        self._next = 0

    def __call__(self) -> None:
        """Give the transfer up: whoever waits for a socket is woken."""
        with self._mutex:
            self._event.set()
            acts = [*self._acts.values()]
        for act in acts:
            act()

    def check(self) -> None:
        """Raise ``BrokenOff`` once the transfer was given up."""
        if self._event.is_set():
            raise BrokenOff

    def sleep(self, seconds: float) -> None:
        """Wait, or be woken by the end of the transfer.

        Raises:
            BrokenOff: it was given up.
        """
        if seconds > 0:
            self._event.wait(seconds)
        self.check()

    @contextlib.contextmanager
    def calls(self, act: Callable[[], None]) -> Iterator[None]:
        """While the block runs, giving up calls ``act`` (from another thread)."""
        with self._mutex:
            self.check()
            number = self._next = self._next + 1
            self._acts[number] = act
        try:
            yield
        finally:
            with self._mutex:
                self._acts.pop(number, None)


class _Gate:
    """How many requests are under way: halved when the store says that it is too much, growing by one a success.

    Additive increase, multiplicative decrease (Chiu and Jain, "Analysis of the Increase and Decrease Algorithms for
    Congestion Avoidance in Computer Networks", 1989).
    """

    def __init__(self, most: int, now: Callable[[], float]) -> None:
        self._most = most
        self._now = now
        self._changed = threading.Condition()
        self._inside = 0
        self.limit = float(most)
        self._refused_at = -_REFUSAL_S

    @contextlib.contextmanager
    def passed(self, stop: Stop) -> Iterator[None]:
        with stop.calls(self._wake), self._changed:
            while self._inside >= max(1, int(self.limit)):
                stop.check()
                self._changed.wait()
            stop.check()
            self._inside += 1
        try:
            yield
        finally:
            with self._changed:
                self._inside -= 1
                self._changed.notify_all()

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def refused(self) -> None:
        with self._changed:
            now = self._now()
            if now - self._refused_at >= _REFUSAL_S:
                self._refused_at = now
                self.limit = max(1.0, self.limit / 2)

    def went_well(self) -> None:
        with self._changed:
            if self.limit < self._most:
                self.limit = min(float(self._most), self.limit + 1 / self.limit)
                self._changed.notify_all()


class Crew:
    """Threads shared by all transfers of one storage, made when they are first needed and again in a forked child.

    Args:
        most: how many requests are under way at once, while the store takes them.
        now: the clock, in seconds.
    """

    def __init__(self, most: int, *, now: Callable[[], float] = time.monotonic) -> None:
        self._most = most
        self._now = now
        self._mutex = threading.Lock()
        self._pid = os.getpid()
        self._pool: ThreadPoolExecutor | None = None
        self._gate = _Gate(most, now)

    @property
    def limit(self) -> int:
        """How many requests the store takes at once, as far as it has said."""
        return max(1, int(self._gate.limit))

    def _threads(self) -> ThreadPoolExecutor:
        if self._pid != os.getpid():
            # Neither the threads nor what a thread may have held exist in a forked child.
            self._mutex, self._pid, self._pool = threading.Lock(), os.getpid(), None
            self._gate = _Gate(self._most, self._now)
        with self._mutex:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(self._most, thread_name_prefix="cloudckpt-lane")
            return self._pool

    def each(self, jobs: Iterable[Callable[[Stop], _T]]) -> list[_T]:
        """Do every job, side by side, and return what they return, in order.

        Whatever ends the wait, ``KeyboardInterrupt`` included, ends the jobs: when this returns or raises, none runs.

        Raises:
            BaseException: what the first job to fail raised; the others were broken off.
        """
        pool, stop = self._threads(), Stop()
        running: list[Future[_T]] = []
        try:
            for job in jobs:  # one by one, so that an interrupt among them knows those that run already
                running.append(pool.submit(job, stop))  # noqa: PERF401
            left = set(running)
            while left:
                done, left = wait(left, return_when=FIRST_COMPLETED)
                for future in done:
                    future.result()
            return [future.result() for future in running]
        except BaseException:
            stop()
            for future in running:
                future.cancel()
            wait(running)
            raise

    def attempts(self, stop: Stop, backoff: Backoff) -> Attempts:
        """The tries of one request of a transfer."""
        return Attempts(self._gate, stop, backoff)

    def close(self) -> None:
        """Let the threads go. Idempotent; they are made again when needed."""
        if self._pid != os.getpid():
            return
        with self._mutex:
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(wait=True)


class Attempts:
    """Tries a request until the store takes it, while it says that waiting may help and the deadline is not over."""

    def __init__(self, gate: _Gate, stop: Stop, backoff: Backoff) -> None:
        self._gate = gate
        self._stop = stop
        self._backoff = backoff
        #: How often the request was sent.
        self.count = 0

    def run(self, attempt: Callable[[], _T], *, is_throttled: Callable[[StorageError], bool]) -> _T:
        """Try, and try again.

        Raises:
            StorageError: the store refused, or went on refusing until the deadline.
            BrokenOff: the transfer was given up.
        """
        pauses = self._backoff.pauses()
        while True:
            try:
                with self._gate.passed(self._stop):
                    self.count += 1
                    found = attempt()
            except StorageError as exc:
                self._stop.check()  # a socket that was closed under the request is no failure of its own
                if is_throttled(exc):
                    self._gate.refused()
                pause = next(pauses, None) if exc.retryable else None
                if pause is None:
                    raise
                self._stop.sleep(pause)
            else:
                self._gate.went_well()
                return found
