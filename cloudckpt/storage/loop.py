"""An event loop of our own in a thread of our own.

fsspec's shared loop cannot cancel: after a Ctrl-C the upload goes on in the background, and its object can appear
after the exception was caught. Here whoever waits takes the request down with him, clean-up included.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import weakref
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

__all__ = ["Loop", "Running"]

_T = TypeVar("_T")

#: How long a cancelled request may take for its clean-up (one abort of a multipart upload), in seconds.
CLEAN_UP_S = 10.0


class Running(Generic[_T]):
    """A coroutine under way on a ``Loop``.

    Attributes:
        attempts: how often its request was sent, counted by whoever sends it.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.attempts = 0
        self._loop = loop
        self._ended: Future[_T] = Future()
        self._task: asyncio.Task[_T] | None = None

    def begin(self, work: Callable[[], Coroutine[Any, Any, _T]]) -> Running[_T]:
        """Start; ``work`` makes the coroutine, on the loop."""
        self._loop.call_soon_threadsafe(self._begin, work)
        return self

    def _begin(self, work: Callable[[], Coroutine[Any, Any, _T]]) -> None:
        self._task = self._loop.create_task(work())
        self._task.add_done_callback(self._end)

    def _end(self, task: asyncio.Task[_T]) -> None:
        if task.cancelled():
            self._ended.set_exception(asyncio.CancelledError())
        elif (error := task.exception()) is not None:
            self._ended.set_exception(error)
        else:
            self._ended.set_result(task.result())

    @property
    def ended(self) -> Future[_T]:
        """A future to wait on among others; cancelling it does nothing, see ``cancel``."""
        return self._ended

    @property
    def repeated(self) -> bool:
        """Whether the request was sent more than once, so that more than one may have arrived."""
        return self.attempts > 1

    def result(self) -> _T:
        """What the coroutine returns or raises. If the wait itself is broken off, the coroutine is too."""
        try:
            return self._ended.result()
        except BaseException:
            self.cancel()
            raise

    def cancel(self) -> None:
        """Break off, and return when the coroutine's own clean-up is over (or has taken too long)."""
        if not self._ended.done():
            self._loop.call_soon_threadsafe(self._cancel)
            with contextlib.suppress(BaseException):
                self._ended.exception(CLEAN_UP_S)

    def _cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()


class Loop:
    """A running event loop in a daemon thread; ended by ``close``, by garbage collection, or with the process.

    Args:
        name: of the thread.
        clean_up: awaited on the loop before it ends. It must not refer to whoever owns the loop.
    """

    def __init__(self, name: str, clean_up: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self._loop = asyncio.new_event_loop()
        ended = asyncio.Event()
        self._thread = threading.Thread(target=_serve, args=(self._loop, ended, clean_up), name=name, daemon=True)
        self._thread.start()
        self._end = weakref.finalize(self, _end, self._loop, self._thread, ended)

    def new(self) -> Running[Any]:
        """Something to be run beside the caller; ``begin`` starts it."""
        return Running(self._loop)

    def run(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Run a coroutine to its end. Whatever ends the wait, ``KeyboardInterrupt`` included, ends the coroutine."""
        running: Running[_T] = Running(self._loop)
        return running.begin(lambda: work).result()

    def close(self) -> None:
        """Break off what still runs, clean up, stop. Idempotent."""
        self._end()

    def abandon(self) -> None:
        """Forget a loop whose thread does not exist in this process: a fork left only the object."""
        self._end.detach()


def _serve(
    loop: asyncio.AbstractEventLoop, ended: asyncio.Event, clean_up: Callable[[], Coroutine[Any, Any, None]]
) -> None:
    try:
        loop.run_until_complete(_until(ended, clean_up))
    finally:
        loop.close()


def _end(loop: asyncio.AbstractEventLoop, thread: threading.Thread, ended: asyncio.Event) -> None:
    with contextlib.suppress(RuntimeError):  # closed already
        loop.call_soon_threadsafe(ended.set)
    # The garbage collector may run this on the loop's own thread.
    if threading.current_thread() is not thread:
        thread.join(CLEAN_UP_S)


async def _until(ended: asyncio.Event, clean_up: Callable[[], Coroutine[Any, Any, None]]) -> None:
    await ended.wait()
    with contextlib.suppress(Exception):
        async with asyncio.timeout(CLEAN_UP_S):
            for task in _others():
                task.cancel()
            await _over()
            await clean_up()
            # A filesystem that is let go closes its session in a task of its own.
            await _over()
            await asyncio.get_running_loop().shutdown_asyncgens()


def _others() -> set[asyncio.Task[Any]]:
    return asyncio.all_tasks() - {asyncio.current_task()}


async def _over() -> None:
    while others := _others():
        await asyncio.gather(*others, return_exceptions=True)
