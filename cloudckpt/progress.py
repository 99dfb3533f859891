"""How far a transfer has come: bytes, rate, what is left, and which object keeps everybody waiting.

Whoever carries bytes tells a ``Meter``. A ``Watch`` looks at it now and then and says so: about once a minute while it
goes on, and once when nothing moves any more.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from cloudckpt.config import Settings
from cloudckpt.core.text import format_bytes, format_duration, format_rate
from cloudckpt.events import Listener, TransferProgress, TransferStalled

__all__ = ["Meter", "Transfer", "Watch", "watched"]

#: The rate is that of about so many seconds, so that it follows the line and not its history.
_WINDOW_S = 30.0

#: How often a watch looks, in seconds; it speaks far more rarely.
_LOOK_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """A transfer at one moment.

    Attributes:
        what: in words, such as "saving checkpoint-1500.9f3ac2e1".
        rank: of the process.
        bytes_done: what has been handed over.
        bytes_total: what there is; 0 while nobody knows.
        rate: bytes a second, of late.
        eta_s: seconds that the rest takes at this rate; None if it cannot be told.
        idle_s: seconds since the last byte.
        objects: those that are under way.
    """

    what: str
    rank: int
    bytes_done: int
    bytes_total: int
    rate: float
    eta_s: float | None
    idle_s: float
    objects: tuple[str, ...]

    def __str__(self) -> str:
        share = f" ({100 * self.bytes_done // self.bytes_total} %)" if self.bytes_total else ""
        of = f" of {format_bytes(self.bytes_total)}" if self.bytes_total else ""
        left = f", {format_duration(self.eta_s)} left" if self.eta_s is not None else ""
        return f"{self.what}: {format_bytes(self.bytes_done)}{of}{share}, {format_rate(self.rate, 1.0)}{left}"


class Meter:
    """Counts the bytes of one transfer. Safe to tell from several threads.

    Args:
        what: the transfer in words.
        total: its bytes; 0 if nobody knows yet.
        rank: of this process.
        now: a clock that never goes back, in seconds.
    """

    def __init__(self, what: str, total: int = 0, *, rank: int = 0, now: Callable[[], float] = time.monotonic) -> None:
        self._what = what
        self._total = total
        self._rank = rank
        self._now = now
        self._mutex = threading.Lock()
        self._done = 0
        self._moved_at = now()
        self._samples: deque[tuple[float, int]] = deque([(self._moved_at, 0)])
        self._objects: dict[str, int] = {}

    def expect(self, total: int) -> None:
        """Note how many bytes there are."""
        with self._mutex:
            self._total = total

    def expect_further(self, count: int) -> None:
        """Note that there are so many bytes more."""
        with self._mutex:
            self._total += count

    def advance(self, count: int) -> None:
        """Note further bytes."""
        with self._mutex:
            now = self._now()
            if count:
                self._moved_at = now
            self._done += count
            if now - self._samples[-1][0] >= _LOOK_S:
                self._samples.append((now, self._done))
            while len(self._samples) > 2 and now - self._samples[1][0] > _WINDOW_S:
                self._samples.popleft()

    @contextlib.contextmanager
    def carrying(self, name: str) -> Iterator[None]:
        """An object is under way while the block runs."""
        with self._mutex:
            self._objects[name] = self._objects.get(name, 0) + 1
        try:
            yield
        finally:
            with self._mutex:
                self._objects[name] -= 1
                if not self._objects[name]:
                    del self._objects[name]

    @property
    def transfer(self) -> Transfer:
        """Where it is now."""
        with self._mutex:
            now = self._now()
            begun, before = self._samples[0]
            rate = (self._done - before) / max(now - begun, 1e-3)
            left = self._total - self._done
            return Transfer(
                what=self._what,
                rank=self._rank,
                bytes_done=self._done,
                bytes_total=self._total,
                rate=rate,
                eta_s=left / rate if self._total and rate > 0 else None,
                idle_s=now - self._moved_at,
                objects=tuple(self._objects),
            )


class Watch:
    """Says how a transfer goes, as events.

    Args:
        meter: the transfer.
        listener: is told.
        every_s: seconds between two words on a transfer that goes on.
        stall_after_s: seconds without a byte after which it is said to stall; said once, until bytes move again.
        now: the meter's clock.
    """

    def __init__(
        self,
        meter: Meter,
        listener: Listener,
        *,
        every_s: float,
        stall_after_s: float,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._meter = meter
        self._listener = listener
        self._every_s = every_s
        self._stall_after_s = stall_after_s
        self._now = now
        self._spoke_at = now()
        self._stalled = False

    def look(self) -> None:
        """Look at the meter, and speak if it is time."""
        found, now = self._meter.transfer, self._now()
        if found.idle_s < self._stall_after_s:
            self._stalled = False
        elif not self._stalled:
            self._stalled = True
            self._spoke_at = now
            self._listener(
                TransferStalled(
                    what=found.what,
                    rank=found.rank,
                    objects=found.objects,
                    seconds=found.idle_s,
                    bytes_done=found.bytes_done,
                    bytes_total=found.bytes_total,
                )
            )
            return
        if now - self._spoke_at >= self._every_s and not self._stalled:
            self._spoke_at = now
            self._listener(
                TransferProgress(
                    what=found.what,
                    rank=found.rank,
                    bytes_done=found.bytes_done,
                    bytes_total=found.bytes_total,
                    rate=found.rate,
                    eta_s=found.eta_s,
                    line=str(found),
                )
            )


@contextlib.contextmanager
def watched(meter: Meter, listener: Listener, settings: Settings) -> Iterator[None]:
    """Watch a transfer while the block runs, from a thread of its own."""
    watch = Watch(meter, listener, every_s=settings.progress_every_s, stall_after_s=settings.stall_after_s)
    ended = threading.Event()

    def look_now_and_then() -> None:
        while not ended.wait(_LOOK_S):
            watch.look()

    thread = threading.Thread(target=look_now_and_then, name="cloudckpt-watch", daemon=True)
    with contextlib.suppress(RuntimeError):  # no further thread is to be had: nobody watches
        thread.start()
    try:
        yield
    finally:
        ended.set()
        if thread.ident is not None:
            thread.join()
