"""How much the threads of a lane compute, as against waiting for the store."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["Computing"]

#: What a lane may have of the processors; the rest is the training's, or the store's where it runs next door.
_SHARE = 0.5


@dataclass(slots=True)
class _Thread:
    """One that is inside.

    Attributes:
        read: its processor time, asked from any thread, in seconds.
        began: what that was when it entered.
        seen: what that was when somebody looked.
    """

    read: Callable[[], float]
    began: float
    seen: float


class Computing:
    """Processor time of the threads that are inside. Not thread-safe: its owner holds a lock.

    Args:
        clock: gives the calling thread's processor time as something that any thread can read while that one lives.
        processors: how many the machine lends this process.
    """

    def __init__(self, clock: Callable[[], Callable[[], float]] | None = None, processors: int | None = None) -> None:
        self._clock = clock or _this_thread
        self._inside: dict[int, _Thread] = {}
        self._left_s = 0.0
        #: How many processors the lane may keep busy.
        self.allowed = max(1.0, _SHARE * (processors or _usable()))

    def enter(self) -> None:
        """The calling thread begins to move bytes."""
        read = self._clock()
        now = read()
        self._inside[threading.get_ident()] = _Thread(read, now, now)

    def leave(self) -> float:
        """The calling thread has done so; what it computed meanwhile, in seconds."""
        thread = self._inside.pop(threading.get_ident())
        now = thread.read()
        self._left_s += now - thread.seen
        return now - thread.began

    def since_last(self) -> float:
        """What all of them have computed since this was asked before, in seconds."""
        spent, self._left_s = self._left_s, 0.0
        for thread in self._inside.values():
            now = thread.read()
            spent += now - thread.seen
            thread.seen = now
        return spent


def _usable() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _this_thread() -> Callable[[], float]:
    if not hasattr(time, "pthread_getcpuclockid"):  # what it computes is known when it has ended
        owner, began = threading.get_ident(), time.thread_time()
        return lambda: time.thread_time() if threading.get_ident() == owner else began
    clock = time.pthread_getcpuclockid(threading.get_ident())
    return lambda: time.clock_gettime(clock)
