"""A save on its way, as the training loop holds it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass

from cloudckpt.core.model import Checkpoint
from cloudckpt.progress import Meter

__all__ = ["PendingSave", "Progress"]

#: A signal that comes between a thread's last look at signals and its going to sleep does not wake it: Python sees it
#: when the wait is over, and Ctrl-C is lost until then. So nobody sleeps longer than this at a time.
_SLEEP_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a save is, on this rank.

    Attributes:
        phase: announce, upload, seal, commit, delete, done or failed; declined, if a deadline left no time to begin it.
        bytes_done: of payload, handed to the store.
        bytes_total: of payload that there is.
        rate: bytes a second, of late; 0 before the upload.
        eta_s: seconds that the rest of the upload takes at this rate; None if that cannot be told.
        rank: whose bytes these are.
    """

    phase: str
    bytes_done: int
    bytes_total: int
    rate: float = 0.0
    eta_s: float | None = None
    rank: int = 0


class PendingSave:
    """A save on its way. ``wait()`` for it, or let the next call or ``close()`` raise what went wrong."""

    def __init__(self, checkpoint: Checkpoint, bytes_total: int) -> None:
        self._checkpoint = checkpoint
        self._bytes_total = bytes_total
        self._bytes_done = 0
        self._phase = "announce"
        self._meter: Meter | None = None
        self._mutex = threading.Lock()
        self._staged = threading.Event()
        self._announced = threading.Event()
        self._outcome: Future[Checkpoint] = Future()
        self._seen = False
        self._keeps_state = False
        self._on_interrupt: Callable[[str], None] | None = None
        self._give_back: Callable[[], None] | None = None

    def __repr__(self) -> str:
        return f"<PendingSave {self._checkpoint.name}: {self.progress.phase}>"

    @property
    def checkpoint(self) -> Checkpoint:
        """The entry: pending until the save is committed, then as committed."""
        if self._outcome.done() and self._outcome.exception() is None:
            return self._outcome.result()
        return self._checkpoint

    @property
    def progress(self) -> Progress:
        """How far it is."""
        found = self._meter.transfer if self._meter is not None else None
        with self._mutex:
            return Progress(
                phase=self._phase,
                bytes_done=self._bytes_done,
                bytes_total=self._bytes_total,
                rate=found.rate if found is not None else 0.0,
                eta_s=found.eta_s if found is not None else None,
                rank=found.rank if found is not None else 0,
            )

    def done(self) -> bool:
        """Whether it has ended, one way or the other."""
        return self._outcome.done()

    def wait(self, timeout_s: float | None = None) -> Checkpoint:
        """Wait until the save is committed.

        Raises:
            SaveError: it did not become visible; the cause is chained.
            ConflictError: this process was replaced by a newer writer, or the run was changed under it.
            TimeoutError: it is still on its way after ``timeout_s`` seconds.
        """
        # An interrupted wait has learnt nothing: what becomes of the save is still to be told.
        if not _slept(self._sleep, timeout_s):
            raise TimeoutError(f"{self._checkpoint.name} is still at {self.progress.phase}")
        failure = self._outcome.exception()
        if failure is None:
            return self._outcome.result()
        try:
            # Python looks for Ctrl-C when it calls something, and nothing is called between these two: an interrupt
            # comes before, and the failure is still to be told, or after it was raised.
            self._seen = True
            raise failure
        finally:
            del failure  # with this frame in its traceback it would keep itself alive, and with it the state

    def wait_quietly(self, timeout_s: float | None = None) -> bool:
        """Wait until it has ended, one way or the other, without taking note of its failure; whether it has."""
        return _slept(self._sleep, timeout_s)

    def _sleep(self, seconds: float) -> bool:
        return bool(wait([self._outcome], seconds).done)

    def wait_staged(self) -> None:
        """Wait until the state may be changed in whatever way.

        Already so when ``save()`` returned, but with ``Settings(stage="overlap")``: then forward, backward and the
        optimizer's own step need no call, and everything else that writes to weights or optimizer state does.
        """
        give_back = self._give_back
        try:
            if give_back is not None:
                give_back()
            else:
                _slept(self._staged.wait)
        except BaseException:
            self.break_off("the call that saves was interrupted")
            raise

    def when_done(self, act: Callable[[], None]) -> None:
        """Call ``act`` once it has ended, one way or the other, in the thread that ends it; at once if it has."""
        self._outcome.add_done_callback(lambda _: act())

    def wait_announced(self) -> None:
        """Wait until the manifest names the save, or it has ended."""
        _slept(self._announced.wait)

    # -- for the saver ---------------------------------------------------------------------------------------

    @property
    def failure(self) -> BaseException | None:
        """What went wrong, if nobody has been told yet."""
        if self._seen or not self._outcome.done():
            return None
        return self._outcome.exception()

    def keep_state(self, on_interrupt: Callable[[str], None]) -> None:
        """``save()`` must not return before the state is sent; what to do, and why, if it does all the same."""
        self._on_interrupt = on_interrupt
        self._keeps_state = True
        if self._staged.is_set():
            self._on_interrupt = None

    def lend_state(self, give_back: Callable[[], None]) -> None:
        """The state may still be copied when ``save()`` returns; what ``wait_staged`` waits for."""
        self._give_back = give_back
        if self._outcome.done():
            self._give_back = None

    def wait_for_state(self) -> None:
        """Wait until ``save()`` may return."""
        if self._keeps_state:
            self.wait_staged()

    def break_off(self, reason: str) -> None:
        """Give the state back at once: what was not sent by now is never sent. Nothing happens once all of it is."""
        act = self._on_interrupt
        if act is not None and not self._staged.is_set():
            act(reason)

    def mark_announced(self) -> None:
        """The manifest names the save."""
        self._announced.set()

    def raise_common(self, cause: BaseException) -> None:
        """It failed in the call itself: wait for what all ranks are told, and raise that."""
        self.wait_quietly()
        failure = self._outcome.exception()
        if failure is not None and failure is not cause:
            raise failure from cause
        raise cause

    def mark_seen(self) -> None:
        """The caller learns of the failure in another way."""
        self._seen = True

    def enter(self, phase: str) -> None:
        """Note the phase."""
        with self._mutex:
            self._phase = phase

    def measure_by(self, meter: Meter) -> None:
        """Note what counts the upload."""
        self._meter = meter

    def advance(self, count: int) -> None:
        """Note further bytes handed to the store."""
        with self._mutex:
            self._bytes_done += count

    def mark_staged(self) -> None:
        """The caller's state may change from now on."""
        self._staged.set()
        self._on_interrupt = None  # which would keep the state alive as long as this

    def decline(self, error: BaseException) -> None:
        """It is not begun; told to whoever waits for it, and to nobody else."""
        self.mark_seen()
        self.mark_staged()
        self.end(error)
        self.enter("declined")

    def end(self, outcome: Checkpoint | BaseException) -> None:
        """Note how it ended; the first word counts."""
        if self._outcome.done():
            return
        if isinstance(outcome, Checkpoint):
            self._outcome.set_result(outcome)
        else:
            self.enter("failed")
            self._outcome.set_exception(outcome)
        self._give_back = None  # nothing copies any more; and it would keep the state alive as long as this
        self._announced.set()


def _slept(sleep: Callable[[float], bool], timeout_s: float | None = None) -> bool:
    """Sleep until what is waited for is there, or so many seconds are over; whether it is there."""
    until = None if timeout_s is None else time.monotonic() + timeout_s
    while True:
        left_s = _SLEEP_S if until is None else min(_SLEEP_S, max(0.0, until - time.monotonic()))
        if sleep(left_s):
            return True
        if until is not None and time.monotonic() >= until:
            return False
