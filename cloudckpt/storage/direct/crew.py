"""A few threads that carry parts side by side, as many as the store takes."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

from cloudckpt.errors import StorageError
from cloudckpt.storage.direct.computing import Computing
from cloudckpt.storage.direct.threads import BrokenOff, Stop, Threads
from cloudckpt.storage.retry import Backoff, given_up

__all__ = ["Attempts", "BrokenOff", "Crew", "Stop"]

_T = TypeVar("_T")
#: Given what gives a transfer up; entered while it runs.
Stopping = Callable[[Stop], AbstractContextManager[None]]

#: Bytes a second that all connections together should carry: what a large machine is lent, and a small one computes.
_ENOUGH = 2.7e9
#: Never fewer than this: one that waits for its answer leaves the line idle.
_LEAST = 2
#: With so many connections a lane begins.
_FIRST = 4
#: How long nothing may arrive before more connections are tried, in seconds: twice the answer of a store in the region.
_MOMENT_S = 0.03
#: Requests of less say more about the latency than about the rate.
_TELLING_BYTES = 4 * 1024 * 1024
#: So many requests make up the rate that is remembered.
_MEMORY = 8
#: Of the processors that the lane may have: where its threads keep so much busy, more of them wait for each other.
_BUSY = 0.7
#: One slow-down a second: the refusals of parts that were under way together are one refusal.
_REFUSAL_S = 1.0


class _Gate:
    """How many requests are under way.

    *Enough*: as many connections as would carry ``_ENOUGH`` together at the rate that each has shown. A store next
    door fills two, and each further one costs its switches; a store far away needs all there are. Until a rate is
    known the number doubles every moment in which no part has arrived.

    *No more than the processors carry*: with TLS a byte costs four times as much. Connections that share what the
    machine computes show a low rate each, and more of them would only wait for each other (for the interpreter's lock,
    which a TLS read wants every 16 KiB): on two processors 32 of them take twice as long as two.

    *No more than the store takes*: halved when it says that it is too much, growing by one a round of successes.
    Additive increase, multiplicative decrease (Chiu and Jain, "Analysis of the Increase and Decrease Algorithms for
    Congestion Avoidance in Computer Networks", 1989).
    """

    def __init__(self, most: int, now: Callable[[], float], computing: Computing) -> None:
        self._most = most
        self._now = now
        self._computing = computing
        self._changed = threading.Condition()
        self._inside = 0
        self._enough = min(_FIRST, most)
        #: Bytes a second of one connection, and processor seconds a byte.
        self._rate: float | None = None
        self._cost_s: float | None = None
        self._looked_at = 0.0
        self.limit = float(most)
        self._refused_at = -_REFUSAL_S

    @property
    def room(self) -> int:
        """How many requests may be under way now."""
        return max(1, min(int(self.limit), self._enough))

    @property
    def enough(self) -> int:
        """How many connections are worth having, as far as is known; all of them while nothing is."""
        return self._most if self._rate is None else self._enough

    @contextlib.contextmanager
    def passed(self, stop: Stop, size_bytes: int) -> Iterator[None]:
        """The block is one request that carries so many bytes; it is waited until there is room for it."""
        with stop.calls(self._wake), self._changed:
            while self._inside >= self.room:
                stop.check()
                if not self._changed.wait(self.patience):
                    self._grow()
            stop.check()
            if not self._inside:
                self._look()
            self._inside += 1
            self._computing.enter()
        began, succeeded = self._now(), False
        try:
            yield
            succeeded = True
        finally:
            with self._changed:
                self._inside -= 1
                computed_s = self._computing.leave()
                if succeeded:
                    self._went_well(size_bytes, self._now() - began, computed_s)
                self._changed.notify_all()

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    @property
    def patience(self) -> float | None:
        """How long to wait for something to arrive before more is tried, in seconds."""
        return _MOMENT_S if self._rate is None and self._enough < self._most else None

    def grow(self) -> None:
        """Nothing has arrived for a moment: try more at once, unless a rate is known."""
        with self._changed:
            self._grow()

    def _grow(self) -> None:
        if self._rate is None and self._now() - self._looked_at >= _MOMENT_S and not self._look():
            self._enough = min(self._most, 2 * self._enough)
            self._changed.notify_all()

    def _look(self) -> bool:
        """Whether, since this was asked before, the threads have kept busy what they may have of the processors."""
        now = self._now()
        passed_s, self._looked_at = now - self._looked_at, now
        return self._computing.since_last() >= _BUSY * self._computing.allowed * passed_s

    def refused(self) -> None:
        with self._changed:
            now = self._now()
            if now - self._refused_at >= _REFUSAL_S:
                self._refused_at = now
                self.limit = max(1.0, self.limit / 2)

    def _went_well(self, size_bytes: int, seconds: float, computed_s: float) -> None:
        if size_bytes >= _TELLING_BYTES:
            self._rate = _remembered(self._rate, size_bytes / max(seconds, 1e-6))
            self._cost_s = _remembered(self._cost_s, computed_s / size_bytes)
            carried = _BUSY * self._computing.allowed / max(self._cost_s, 1e-12)
            self._enough = min(self._most, max(_LEAST, int(min(_ENOUGH, carried) / self._rate)))
        if self.limit < self._most:
            self.limit = min(float(self._most), self.limit + 1 / self.limit)


def _remembered(known: float | None, fresh: float) -> float:
    return fresh if known is None else known + (fresh - known) / _MEMORY


class Crew:
    """Threads shared by all transfers of one storage, made when they are first needed and again in a forked child.

    Args:
        most: how many requests are under way at once, while the store takes them.
        now: the clock, in seconds.
        computing: what the threads compute, for tests.
    """

    def __init__(
        self, most: int, *, now: Callable[[], float] = time.monotonic, computing: Callable[[], Computing] = Computing
    ) -> None:
        self._most = most
        self._now = now
        self._computing = computing
        self._mutex = threading.Lock()
        self._pid = os.getpid()
        self._pool: Threads | None = None
        self._gate = _Gate(most, now, computing())

    @property
    def limit(self) -> int:
        """How many requests the store takes at once, as far as it has said."""
        return max(1, int(self._gate.limit))

    @property
    def worthwhile(self) -> int:
        """How many connections are worth having to this store, as far as is known."""
        return self._gate.enough

    def _threads(self) -> Threads:
        if self._pid != os.getpid():
            # Neither the threads nor what a thread may have held exist in a forked child.
            self._mutex, self._pid, self._pool = threading.Lock(), os.getpid(), None
            self._gate = _Gate(self._most, self._now, self._computing())
        with self._mutex:
            if self._pool is None:
                self._pool = Threads(self._most)
            return self._pool

    def each(self, jobs: Iterable[Callable[[Stop], _T]], stopping: Stopping = lambda _: nullcontext()) -> list[_T]:
        """Do every job, side by side, and return what they return, in order.

        Whatever ends the wait, ``KeyboardInterrupt`` included, ends the jobs: when this returns or raises, none runs.

        Args:
            stopping: entered meanwhile, with what gives all of them up.

        Raises:
            BaseException: what the first job to fail raised; the others were broken off.
        """
        stop = Stop()
        with stopping(stop):
            return self._each(jobs, stop)

    def _each(self, jobs: Iterable[Callable[[Stop], _T]], stop: Stop) -> list[_T]:
        pool, gate = self._threads(), self._gate
        running: list[Future[_T]] = []
        waiting = iter(jobs)
        left: set[Future[_T]] = set()
        more = True
        try:
            while more or left:
                while more and len(left) < gate.room:
                    job = next(waiting, None)
                    if job is None:
                        more = False
                    else:
                        # One by one: an interrupt in between knows all that run.
                        running.append(pool.submit(job, stop))
                        left.add(running[-1])
                done, left = wait(left, gate.patience if more else None, FIRST_COMPLETED)
                for future in done:
                    future.result()
                if not done:
                    gate.grow()
            return [future.result() for future in running]
        except BaseException:
            stop()
            for future in running:
                future.cancel()
            wait(running)
            raise

    def attempts(self, stop: Stop, backoff: Backoff) -> Attempts:
        """The tries of one request of a transfer."""
        self._threads()
        return Attempts(self._gate, stop, backoff)

    @contextlib.contextmanager
    def once(
        self, stop: Stop, size_bytes: int, *, is_throttled: Callable[[StorageError], bool] = lambda _: False
    ) -> Iterator[None]:
        """One request of so many bytes in the caller's thread, in its turn."""
        self._threads()
        gate = self._gate
        with gate.passed(stop, size_bytes):
            try:
                yield
            except StorageError as exc:
                if is_throttled(exc):
                    gate.refused()
                raise

    def close(self) -> None:
        """Let the threads go. Idempotent; they are made again when needed."""
        if self._pid != os.getpid():
            return
        with self._mutex:
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.close()


class Attempts:
    """Tries a request until the store takes it, while it says that waiting may help and the deadline is not over."""

    def __init__(self, gate: _Gate, stop: Stop, backoff: Backoff) -> None:
        self._gate = gate
        self._stop = stop
        self._backoff = backoff
        #: How often the request was sent.
        self.count = 0

    def run(
        self, attempt: Callable[[], _T], *, is_throttled: Callable[[StorageError], bool], size_bytes: int = 0
    ) -> _T:
        """Try, and try again.

        Args:
            is_throttled: whether a refusal means that it was too much at once.
            size_bytes: what the request carries.

        Raises:
            StorageError: the store refused, or went on refusing until the deadline.
            BrokenOff: the transfer was given up.
        """
        pauses = self._backoff.pauses()
        while True:
            try:
                with self._gate.passed(self._stop, size_bytes):
                    self.count += 1
                    return attempt()
            except StorageError as exc:
                self._stop.check()  # a socket that was closed under the request is no failure of its own
                if is_throttled(exc):
                    self._gate.refused()
                if not exc.retryable:
                    raise
                pause = next(pauses, None)
                if pause is None:
                    raise given_up(exc, self.count, self._backoff.deadline_s) from exc
                self._stop.sleep(pause)
