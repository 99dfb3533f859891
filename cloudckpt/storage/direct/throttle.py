"""A cap on the bytes a second of one lane."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

__all__ = ["Throttle"]


class Throttle:
    """Lets bytes pass at a rate that all threads together do not exceed by more than one slice each.

    Args:
        rate: bytes a second; None for no cap.
        now: the clock, in seconds.
    """

    def __init__(self, rate: float | None, *, now: Callable[[], float] = time.monotonic) -> None:
        self._rate = rate
        self._now = now
        self._mutex, self._pid = threading.Lock(), os.getpid()
        self._free_at = 0.0

    @property
    def slice_bytes(self) -> int | None:
        """How much to ask for at once, so that the cap is smooth; None without a cap."""
        return None if self._rate is None else max(16 * 1024, min(int(self._rate / 20), 1024 * 1024))

    def pause(self, size_bytes: int) -> float:
        """How long to wait before this many bytes may leave, in seconds. They count as sent from here on."""
        if self._rate is None:
            return 0.0
        if self._pid != os.getpid():
            # A thread that held it when the process was forked will never give it back.
            self._mutex, self._pid = threading.Lock(), os.getpid()
        with self._mutex:
            now = self._now()
            at = max(now, self._free_at)
            self._free_at = at + size_bytes / self._rate
            return at - now
