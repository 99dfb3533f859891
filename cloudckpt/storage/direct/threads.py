"""Threads that take jobs in turn, and the end of a transfer as those who work on it see it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import TypeVar

__all__ = ["BrokenOff", "Stop", "Threads"]

_T = TypeVar("_T")


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


class Threads:
    """At most so many threads, which take jobs in turn; made when they are needed.

    No ``ThreadPoolExecutor``: that takes no work once the main thread has ended, and a save in the background goes on
    then; it keeps a job for whose thread there was no room; and it lets nobody go on after a ``close``.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._mutex = threading.Lock()
        self._open()

    def _open(self) -> None:
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._idle = threading.Semaphore(0)
        self._alive: list[threading.Thread] = []

    def submit(self, job: Callable[[Stop], _T], stop: Stop) -> Future[_T]:
        """Have the job done by a thread, or at once by the caller where not one can be started."""
        future: Future[_T] = Future()
        with self._mutex:
            jobs = self._jobs
            jobs.put(lambda: _carry_out(future, job, stop))
            # But those whose start was interrupted before they were.
            self._alive = [thread for thread in self._alive if thread.is_alive()]
            if not self._idle.acquire(blocking=False) and len(self._alive) < self._most:
                thread = threading.Thread(target=_work, args=(jobs, self._idle), name="cloudckpt-lane", daemon=True)
                # Noted first: an interrupt in ``start`` does not tell whether there is a thread.
                self._alive.append(thread)
                try:
                    thread.start()
                except RuntimeError:  # no more threads in this process: fewer will do
                    self._alive.remove(thread)
            has_none = not self._alive
        if has_none:
            with contextlib.suppress(Empty):
                (jobs.get_nowait() or (lambda: None))()
        return future

    def close(self) -> None:
        """End the threads once they have done what was submitted."""
        with self._mutex:
            jobs, alive = self._jobs, self._alive
            self._open()
        jobs.put(None)
        for thread in alive:
            if thread.ident is not None:
                thread.join()


def _work(jobs: SimpleQueue[Callable[[], None] | None], idle: threading.Semaphore) -> None:
    while (job := jobs.get()) is not None:
        job()
        del job
        idle.release()
    jobs.put(None)  # for the next thread, however many there are


def _carry_out(future: Future[_T], job: Callable[[Stop], _T], stop: Stop) -> None:
    if future.set_running_or_notify_cancel():
        try:
            future.set_result(job(stop))
        except BaseException as exc:  # noqa: BLE001 - raised by whoever waits for the future
            future.set_exception(exc)
