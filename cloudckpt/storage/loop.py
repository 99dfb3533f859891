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

from cloudckpt.errors import StorageError

__all__ = ["Loop", "LoopClosed", "Running", "hang_up"]

_T = TypeVar("_T")

#: How long a cancelled request may take for its clean-up (one abort of a multipart upload), in seconds.
CLEAN_UP_S = 10.0
#: How long the connections may take to close, in seconds; nothing is asked over them any more.
_CLOSE_S = 5.0
#: Turns of the loop after which a connection that was closed or cut has let go of its socket: asyncio takes one or two.
_TURNS_TO_CLOSE = 10


class LoopClosed(Exception):  # noqa: N818 - a state of affairs
    """The loop takes no more work; another one will."""


class Running(Generic[_T]):
    """A coroutine that is to run, or runs, on a ``Loop``.

    Args:
        loop: where.
        work: makes the coroutine, on the loop.

    Attributes:
        attempts: how often its request was sent, counted by whoever sends it.
    """

    def __init__(self, loop: Loop, work: Callable[[], Coroutine[Any, Any, _T]]) -> None:
        self.attempts = 0
        self._on = loop
        self._work = work
        self._ended: Future[_T] = Future()
        self._task: asyncio.Task[_T] | None = None
        self._begun = False
        self._broken_off = False

    def begin(self) -> Running[_T]:
        """Start beside the caller.

        Raises:
            LoopClosed: the loop takes no more work; nothing was started.
        """
        self._begun = True
        try:
            self._on.take(self)
        except LoopClosed:
            self._begun = False
            raise
        return self

    def start(self) -> None:
        """On the loop: make the coroutine and run it."""
        if self._broken_off:
            self.fail(asyncio.CancelledError())
            return
        self._task = asyncio.get_running_loop().create_task(self._work())
        self._task.add_done_callback(self._end)

    def _end(self, task: asyncio.Task[_T]) -> None:
        if task.cancelled():
            self.fail(asyncio.CancelledError() if self._broken_off else _closed())
        elif (error := task.exception()) is not None:
            self.fail(error)
        elif not self._ended.done():
            self._ended.set_result(task.result())

    def fail(self, error: BaseException) -> None:
        """End with an error, unless it has ended already."""
        if not self._ended.done():
            self._ended.set_exception(error)

    @property
    def ended(self) -> Future[_T]:
        """A future to wait on among others; cancelling it does nothing, see ``cancel``."""
        return self._ended

    @property
    def repeated(self) -> bool:
        """Whether the request was sent more than once, so that more than one may have arrived."""
        return self.attempts > 1

    def result(self) -> _T:
        """What the coroutine returns or raises; begins it if need be.

        If the wait is broken off, by ``KeyboardInterrupt`` for example, the coroutine is broken off too.
        """
        try:
            if not self._begun:
                self.begin()
            return self._ended.result()
        except LoopClosed:
            raise
        except BaseException:
            self.cancel()
            raise

    def cancel(self) -> None:
        """Break off, and return when the coroutine's own clean-up is over (or has taken too long)."""
        self._broken_off = True
        if self._begun and not self._ended.done():
            self._on.call(self._cancel)
            with contextlib.suppress(BaseException):
                self._ended.exception(CLEAN_UP_S)

    def _cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()
        else:
            self.fail(asyncio.CancelledError())


def _closed() -> StorageError:
    return StorageError("the storage was closed while this request was under way", retryable=True)


class Loop:
    """A running event loop in a daemon thread; ended by ``close``, by garbage collection, or with the process.

    Args:
        name: of the thread.
        clean_up: awaited on the loop before it ends. It must not refer to whoever owns the loop.
    """

    def __init__(self, name: str, clean_up: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self.asyncio = asyncio.new_event_loop()
        self._inside = _Inside()
        work = (self.asyncio, self._inside, clean_up)
        self._thread = threading.Thread(target=_serve, args=work, name=name, daemon=True)
        self._thread.start()
        self._finish = weakref.finalize(self, _end, self.asyncio, self._thread, self._inside)

    def take(self, running: Running[Any]) -> None:
        """Run it.

        Raises:
            LoopClosed: it is too late for that.
        """
        with self._inside.mutex:
            if self._inside.closed:
                raise LoopClosed
            self._inside.running.add(running)
            running.ended.add_done_callback(lambda _: self._inside.running.discard(running))
            self.asyncio.call_soon_threadsafe(running.start)

    def call(self, act: Callable[[], None]) -> None:
        """Call something on the loop, if it is still there."""
        with contextlib.suppress(RuntimeError):
            self.asyncio.call_soon_threadsafe(act)

    def run(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Run a coroutine to its end. Whatever ends the wait, ``KeyboardInterrupt`` included, ends the coroutine.

        Raises:
            LoopClosed: the loop takes no more work; the coroutine was not started.
        """
        return Running(self, lambda: work).result()

    def close(self) -> None:
        """Break off what still runs, clean up, stop. Idempotent."""
        self._finish()

    def abandon(self) -> None:
        """Forget a loop whose thread does not exist in this process: a fork left only the object."""
        self._finish.detach()


class _Inside:
    """What a loop and its thread share; it does not refer to the ``Loop``, which may be collected."""

    def __init__(self) -> None:
        self.mutex = threading.Lock()
        self.closed = False
        self.running: set[Running[Any]] = set()
        self.ended = asyncio.Event()


def _serve(loop: asyncio.AbstractEventLoop, inside: _Inside, clean_up: Callable[[], Coroutine[Any, Any, None]]) -> None:
    try:
        loop.run_until_complete(_until(inside.ended, clean_up))
    finally:
        loop.close()
        for running in [*inside.running]:
            running.fail(_closed())


def _end(loop: asyncio.AbstractEventLoop, thread: threading.Thread, inside: _Inside) -> None:
    with inside.mutex:
        inside.closed = True
    with contextlib.suppress(RuntimeError):  # closed already
        loop.call_soon_threadsafe(inside.ended.set)
    # The garbage collector may run this on the loop's own thread.
    if threading.current_thread() is not thread:
        thread.join(CLEAN_UP_S + _CLOSE_S)


async def _until(ended: asyncio.Event, clean_up: Callable[[], Coroutine[Any, Any, None]]) -> None:
    await ended.wait()
    with contextlib.suppress(Exception):
        async with asyncio.timeout(CLEAN_UP_S):
            for task in _others():
                task.cancel()
            await _over()
    # Whatever has become of the requests: one that does not end keeps no connection open.
    with contextlib.suppress(Exception):
        async with asyncio.timeout(_CLOSE_S):
            await clean_up()
            # A filesystem that is let go closes its session in a task of its own.
            await _over()
            await asyncio.get_running_loop().shutdown_asyncgens()
    await hang_up()


def _others() -> set[asyncio.Task[Any]]:
    return asyncio.all_tasks() - {asyncio.current_task()}


async def _over() -> None:
    # Not by gather: under a time-out it would wait on for a task that goes on after it was cancelled.
    while others := _others():
        done, _ = await asyncio.wait(others)
        for task in done:
            if not task.cancelled():
                task.exception()  # looked at, or asyncio complains that nobody did


async def hang_up() -> None:
    """Let go of every socket of the running loop, sent or not. For a loop's last turns: nothing can be asked after it.

    Whoever closes a connection waits for what is still to be sent, and so for a peer that does not read. A loop that
    ends meanwhile would leave the socket open.
    """
    # asyncio has no public list of them; a loop of another kind closes its own.
    for transport in [*getattr(asyncio.get_running_loop(), "_transports", {}).values()]:
        transport.abort()
    for _ in range(_TURNS_TO_CLOSE):
        await asyncio.sleep(0)
