"""What a training loop holds: whether to stop after this step, and how long is left."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self

from cloudckpt.config import Settings, settings_of
from cloudckpt.coordination import find_group
from cloudckpt.core.arguments import checked_step
from cloudckpt.core.deadline import earlier
from cloudckpt.errors import ConfigError
from cloudckpt.events import Listener, Listeners, LoggingListener, StopAgreed, StopNoticed, Warned
from cloudckpt.preemption.agreeing import Agreement, Alone, Stop, Together
from cloudckpt.preemption.metadata import aws_watches, gcp_watches
from cloudckpt.preemption.signals import Handlers, checked_signal
from cloudckpt.preemption.watching import Asked, FileThere, Sighting, Watch, Watcher

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["PreemptionGuard"]


class PreemptionGuard:
    """Notices that this machine is about to be taken away, and stops all ranks after the same step.

        with PreemptionGuard(aws=True) as guard, CheckpointManager(root) as ckpts:
            ...
                if guard.should_stop(step):
                    ckpts.save(step, state, deadline_s=guard.left_s)
                    break

    It keeps a flag and a deadline and does nothing else: what is saved, and with which code the process ends, is the
    loop's business (``exit_code`` is there for it). Notices are best effort on every cloud; what bounds the work that
    can be lost is how often you save.

    Args:
        signals: which signals are notices, by name, or names with the seconds of each: ``{"SIGUSR1": 110}``. Handlers
            that were there before are called as ever, and come back at the end.
        notice_s: how long there is after a signal without a number of its own, a file, or ``when``. Of the 30 s that
            Kubernetes, torchrun, Slurm and Compute Engine give by default, 5 are left for the way out.
        aws: look for EC2's notice to a spot instance, every 5 s.
        rebalance: take EC2's rebalance recommendation for a notice as well: earlier, and without a deadline.
        gcp: wait for Compute Engine's notice of a preemption, or of maintenance that ends the machine.
        file: a file whose appearance is a notice.
        when: a function whose true answer is a notice; called in a thread of its own. A text is the reason.
        poll_s: how often to look at the file, and to ask ``when``.
        process_group: the ranks that stop together, as for ``CheckpointManager``: all by default, False for this
            process alone.
        settings: for ``coordination_timeout_s``, which is how long the ranks look for each other at the first call.
        listeners: called with each event, after the log lines.

    Raises:
        ConfigError: an argument cannot be used; or this process is not in the group.
    """

    def __init__(
        self,
        *,
        signals: Iterable[str | int] | Mapping[str, float] = ("SIGTERM",),
        notice_s: float = 25.0,
        aws: bool = False,
        rebalance: bool = False,
        gcp: bool = False,
        file: str | os.PathLike[str] | None = None,
        when: Callable[[], object] | None = None,
        poll_s: float = 5.0,
        process_group: ProcessGroup | Literal[False] | None = None,
        settings: Settings | None = None,
        listeners: Iterable[Listener] = (),
    ) -> None:
        self._notice_s = _checked_seconds("notice_s", notice_s)
        every_s = _checked_seconds("poll_s", poll_s)
        self._signals = _checked_signals(signals, self._notice_s)
        if rebalance and not aws:
            raise ConfigError("rebalance=True is about EC2: pass aws=True as well")
        watches: list[Watch] = aws_watches(os.environ, rebalance=rebalance) if aws else []
        if gcp:
            watches += gcp_watches(os.environ)
        if file is not None:
            watches.append(FileThere(Path(file), notice_s=self._notice_s, every_s=every_s))
        if when is not None:
            watches.append(Asked(when, notice_s=self._notice_s, every_s=every_s))
        group = find_group(process_group)
        timeout_s = settings_of(settings).coordination_timeout_s
        self._agreement: Agreement = Together(group, timeout_s=timeout_s) if group else Alone()
        self._rank, self._ranks = (group.rank, group.world_size) if group else (0, 1)
        self._listener = Listeners([LoggingListener(self._rank), *listeners])
        self._watchers = [Watcher(watch, self._sighted, self._warn) for watch in watches]
        self._handlers = Handlers(self._signals, self._note)
        # What a handler may touch: appending to a deque is one step, and needs no lock that its victim may hold.
        self._noted: deque[tuple[int, float]] = deque()
        self._mutex = threading.Lock()
        self._reasons: dict[str, None] = {}
        self._warned: set[str] = set()
        self._ends_at: float | None = None
        self._stop: Stop | None = None
        self._pid = os.getpid()
        self._state: Literal["new", "open", "closed"] = "new"

    # -- for the training loop -------------------------------------------------------------------------------

    def should_stop(self, step: int) -> bool:
        """Whether the training ends after this step: the same answer, after the same step, on every rank.

        Call it once after each step, on every rank. As long as nothing happens the ranks say nothing to each other;
        then they agree on the first step that none of them has gone past, within milliseconds and without a
        collective, and all answer True after it, and from then on.

        Args:
            step: the training step that has just ended.

        Raises:
            RankError: it is time to stop, and a rank is gone: no save can be made. Leave without one.
            ConfigError: the guard is not started, is closed, or came into this process by a fork; or a bad step.
        """
        self._check_usable()
        step = checked_step(step)
        self._take_noted()
        found = self._agreement.passes(step)
        if found is None:
            return False
        if self._stop is None:
            with self._mutex:
                self._stop = found
            if self._rank == 0:
                self._listener(StopAgreed(step=step, reason=found.reason, left_s=self.left_s, ranks=self._ranks))
        return True

    @property
    def left_s(self) -> float | None:
        """How long there is from now on, in seconds, by the earliest deadline heard of; None if nobody named any.

        Once ``should_stop`` is True, it is what the ranks have agreed on: None on all of them, or a number on all.
        """
        with self._mutex:
            together = self._stop if self._ranks > 1 else None
            ends_at = self._ends_at if together is None else together.ends_at
        return None if ends_at is None else max(0.0, ends_at - time.monotonic())

    @property
    def reason(self) -> str | None:
        """Why the ranks stop, once they do; None before."""
        return None if self._stop is None else self._stop.reason

    @property
    def noticed(self) -> bool:
        """Whether this process alone was told to stop: good for leaving a long evaluation early, not for a save."""
        return bool(self._noted or self._reasons)

    @property
    def exit_code(self) -> int:
        """For ``sys.exit``, if whoever starts the job tells a training that stopped from one that ended by its code.

        143 once the ranks stop, whatever told them to: what shells and schedulers know of a process that SIGTERM ended.
        0 before. The same on every rank.
        """
        return 0 if self._stop is None else 128 + signal.SIGTERM

    # -- beginning and end -----------------------------------------------------------------------------------

    def start(self) -> Self:
        """Set the handlers and begin to look. In the main thread, if there are signals. ``with`` does this.

        Raises:
            ConfigError: not the main thread, or a second start.
        """
        if self._state != "new":
            raise ConfigError("a PreemptionGuard is started once: make a new one")
        self._handlers.install()
        self._state = "open"
        for watcher in self._watchers:
            watcher.start()
        return self

    def close(self) -> None:
        """Put the handlers back, look no more, and leave the other ranks. Idempotent. ``with`` does this."""
        self._close("it closed its PreemptionGuard", in_order=True)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self._close(f"its training ended with {type(error).__name__}: {error}"[:500], in_order=False)

    def _close(self, reason: str, *, in_order: bool) -> None:
        if self._state != "open" or self._pid != os.getpid():
            return
        self._state = "closed"
        self._handlers.remove()
        for watcher in self._watchers:
            watcher.close()
        self._agreement.leave(reason, in_order=in_order)

    def _check_usable(self) -> None:
        if self._pid != os.getpid():
            raise ConfigError(
                "this PreemptionGuard came into this process by a fork, and notices nothing here: ask the process that "
                "made it"
            )
        if self._state != "open":
            unstarted = "use a PreemptionGuard in a with statement, or call start() first"
            raise ConfigError("this PreemptionGuard is closed" if self._state == "closed" else unstarted)

    # -- notices ---------------------------------------------------------------------------------------------

    def _note(self, number: int, at: float) -> None:
        """In a signal handler: nothing but this."""
        self._noted.append((number, at))

    def _take_noted(self) -> None:
        while self._noted:
            number, at = self._noted.popleft()
            found = signal.Signals(number)
            self._take(Sighting(reason=found.name, notice_s=self._signals[found]), at)

    def _sighted(self, sighting: Sighting) -> None:
        self._take(sighting, time.monotonic())

    def _take(self, sighting: Sighting, at: float) -> None:
        """A notice. The same one again says nothing new, and never brings the deadline forward."""
        with self._mutex:
            if sighting.reason in self._reasons:
                return
            self._reasons[sighting.reason] = None
            if sighting.notice_s is not None:
                self._ends_at = earlier(self._ends_at, at + sighting.notice_s)
        left_s = None if sighting.notice_s is None else max(0.0, at + sighting.notice_s - time.monotonic())
        self._agreement.tell(sighting.reason, left_s)
        self._listener(StopNoticed(reason=sighting.reason, left_s=left_s))

    def _warn(self, message: str) -> None:
        with self._mutex:
            if message in self._warned:
                return
            self._warned.add(message)
        self._listener(Warned(message=message))


def _checked_seconds(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        raise ConfigError(f"{name}={value!r}: write a positive number of seconds")
    return float(value)


def _checked_signals(asked: Iterable[str | int] | Mapping[str, float], notice_s: float) -> dict[signal.Signals, float]:
    if isinstance(asked, str):
        raise ConfigError(f"signals={asked!r}: expected a list, write [{asked!r}]")
    if isinstance(asked, Mapping):
        return {checked_signal(name): _checked_seconds(f"signals[{name!r}]", own) for name, own in asked.items()}
    return {checked_signal(name): notice_s for name in asked}
