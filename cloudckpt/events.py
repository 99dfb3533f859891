"""What happened, as frozen values; who wants to know; and the listener that writes the log lines.

Rank zero emits what happens to the job, once; every rank emits its own failures. Lines go to the standard
logger ``cloudckpt`` and propagate: no handler, no filter, no level is set here.

(Past 350 lines: one class for each thing that can happen, and the line in which people read it.)
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from cloudckpt.core.model import Checkpoint
from cloudckpt.core.summary import summary_lines, valued
from cloudckpt.core.text import format_bytes, format_duration, format_rate
from cloudckpt.errors import SaveError

__all__ = [
    "BestChanged",
    "Claimed",
    "DeleteFailed",
    "Deleted",
    "Event",
    "FellBack",
    "Listener",
    "Listeners",
    "LoggingListener",
    "NothingToResume",
    "PolicyTightened",
    "Resumed",
    "RunClosed",
    "SaveCommitted",
    "SaveDeclined",
    "SaveFailed",
    "SaveSkipped",
    "SaveStarted",
    "StopAgreed",
    "StopNoticed",
    "TransferProgress",
    "TransferStalled",
    "Warned",
]

logger = logging.getLogger("cloudckpt")


@dataclass(frozen=True, slots=True, kw_only=True)
class Claimed:
    """This process became the writer. ``rolled_forward`` and ``abandoned`` are what an earlier one left."""

    url: str
    writer_epoch: int
    took_over_from: str | None
    rolled_forward: tuple[Checkpoint, ...]
    abandoned: tuple[Checkpoint, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyTightened:
    """The policy given now is tighter than the stored one; the next commit will retire these."""

    url: str
    before: str
    after: str
    will_retire: tuple[Checkpoint, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveStarted:
    """The save was announced: the manifest names it, and its upload begins."""

    checkpoint: Checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveCommitted:
    """The save is durable and visible. Durations in seconds; how long training stood still, where that is known."""

    checkpoint: Checkpoint
    seconds: float
    blocked_seconds: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class BestChanged:
    """The newest commit is the best by ``metric``; ``best`` are the ones kept for it, best first."""

    metric: str
    values: tuple[float, ...]
    best: tuple[Checkpoint, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveSkipped:
    """A save was asked for while one was in flight, and ``on_busy="skip"``."""

    step: int
    busy_with: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveDeclined:
    """A save with a deadline was not begun: it would not be committed in time. ``last`` is the newest that is."""

    step: int
    reason: str
    last: Checkpoint | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveFailed:
    """A save did not become visible. Earlier checkpoints are untouched."""

    url: str
    step: int
    error: BaseException


@dataclass(frozen=True, slots=True, kw_only=True)
class Deleted:
    """The bytes of a retired checkpoint are gone."""

    checkpoint: Checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class DeleteFailed:
    """Some bytes of a retired checkpoint are still there; tried again at the next save."""

    checkpoint: Checkpoint
    error: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumed:
    """The state was restored. ``not_restored`` are components of the checkpoint that the state did not name."""

    checkpoint: Checkpoint
    seconds: float
    components: tuple[str, ...]
    not_restored: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class NothingToResume:
    """The run has never committed anything: training starts from the beginning."""

    url: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FellBack:
    """A checkpoint is proven damaged; the one before is tried."""

    checkpoint: Checkpoint
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RunClosed:
    """The manager was closed without an exception. ``best`` with ``values`` of ``metric``, best first."""

    metric: str | None
    values: tuple[float, ...]
    best: tuple[Checkpoint, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StopNoticed:
    """This process was told that it is about to be ended; ``left_s`` is None if nobody said when."""

    reason: str
    left_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class StopAgreed:
    """All ranks stop after this step."""

    step: int
    reason: str
    left_s: float | None
    ranks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferProgress:
    """A save or a load is on its way for long; about once a minute.

    Attributes:
        what: in words, such as "saving checkpoint-1500.9f3ac2e1".
        rank: of the process that carries these bytes.
        bytes_done: what has been carried.
        bytes_total: what there is; 0 if nobody knows.
        rate: bytes a second, of late.
        eta_s: seconds that the rest takes at this rate; None if it cannot be told.
        line: all of this in words.
    """

    what: str
    rank: int
    bytes_done: int
    bytes_total: int
    rate: float
    eta_s: float | None
    line: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferStalled:
    """Nothing has moved for ``seconds``. ``objects`` are those under way on this rank; told once, until bytes move."""

    what: str
    rank: int
    objects: tuple[str, ...]
    seconds: float
    bytes_done: int
    bytes_total: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Warned:
    """Something a person should know that has no event of its own."""

    message: str


Event = (
    BestChanged
    | Claimed
    | DeleteFailed
    | Deleted
    | FellBack
    | NothingToResume
    | PolicyTightened
    | Resumed
    | RunClosed
    | SaveCommitted
    | SaveDeclined
    | SaveFailed
    | SaveSkipped
    | SaveStarted
    | StopAgreed
    | StopNoticed
    | TransferProgress
    | TransferStalled
    | Warned
)


class Listener(Protocol):
    """Anything that can be called with an event. Called in the thread where it happened; keep it quick."""

    def __call__(self, event: Event, /) -> None:
        """Take note of ``event``."""
        ...


class Listeners:
    """Several listeners as one. One that raises is logged and does not disturb the others or the save."""

    def __init__(self, listeners: Iterable[Listener] = ()) -> None:
        self._listeners = tuple(listeners)

    def __call__(self, event: Event, /) -> None:
        """Tell every listener."""
        for listener in self._listeners:
            try:
                listener(event)
            except Exception:
                # A broken dashboard must not fail a save; what it broke on is in the log with its traceback.
                logger.exception("a listener failed on %s", type(event).__name__)


def _left(left_s: float | None) -> str:
    return "nobody said how long is left" if left_s is None else f"{format_duration(left_s)} left"


def _noticed(event: StopNoticed) -> str:
    return f"told to stop: {event.reason}; {_left(event.left_s)}"


def _stall(event: TransferStalled) -> str:
    objects = ", ".join(event.objects[:5]) or "nothing by name"
    return (
        f"[rank {event.rank}] {event.what}: nothing has moved for {format_duration(event.seconds)}, at "
        f"{format_bytes(event.bytes_done)} of {format_bytes(event.bytes_total)}; under way: {objects}"
    )


def _names(checkpoints: Sequence[Checkpoint]) -> str:
    return ", ".join(checkpoint.name for checkpoint in checkpoints)


class LoggingListener:
    """Writes each event as the log lines people know.

    What concerns the whole job comes from rank zero; the other ranks add their own warnings and errors, and say who
    they are.

    Args:
        rank: of this process.
    """

    def __init__(self, rank: int = 0) -> None:
        self._rank = rank

    def __call__(self, event: Event, /) -> None:
        """Log ``event``."""
        if self._rank:
            self._of_another_rank(event)
            return
        match event:
            case SaveCommitted():
                self._committed(event)
            case BestChanged():
                self._best(event)
            case Claimed():
                self._claimed(event)
            case Resumed():
                self._resumed(event)
            case RunClosed():
                self._closed(event)
            case TransferProgress():
                logger.info("%s", event.line)
            case TransferStalled():
                logger.warning("%s", _stall(event))
            case StopNoticed() | StopAgreed() | SaveDeclined():
                self._stopping(event)
            case _:
                self._one_line(event)

    def _of_another_rank(self, event: Event) -> None:
        match event:
            case Warned():
                logger.warning("[rank %d] %s", self._rank, event.message)
            case StopNoticed():
                logger.warning("[rank %d] %s", self._rank, _noticed(event))
            case TransferStalled():
                logger.warning("%s", _stall(event))
            case SaveFailed() if event.error.__cause__ is not None:  # it failed here; rank zero tells what all share
                logger.error("[rank %d] saving step %d failed: %s", self._rank, event.step, event.error.__cause__)

    def _one_line(self, event: Event) -> None:  # noqa: C901 - a table of lines
        match event:
            case SaveStarted(checkpoint=c):
                logger.info("saving %s at %s", c.name, c.url)
            case SaveSkipped():
                logger.warning("skipped the save of step %d: still saving %s", event.step, event.busy_with)
            case SaveFailed(error=SaveError()):
                logger.error("%s", event.error)
            case SaveFailed():
                logger.error("saving step %d to %s failed: %s", event.step, event.url, event.error)
            case Deleted(checkpoint=c):
                logger.info("deleted checkpoint-%d (%s): %s", c.step, format_bytes(c.size_bytes), c.retired_because)
            case DeleteFailed(checkpoint=c):
                logger.warning("could not delete %s yet, will try again: %s", c.url, event.error)
            case NothingToResume():
                logger.info("nothing to resume at %s: starting from the beginning", event.url)
            case FellBack(checkpoint=c):
                logger.warning("%s is damaged (%s); trying the one before", c.url, event.reason)
            case PolicyTightened():
                logger.warning(
                    "%s: the policy was %s and is now %s; the next commit will retire %s",
                    event.url,
                    event.before,
                    event.after,
                    _names(event.will_retire) or "nothing",
                )
            case Warned():
                logger.warning("%s", event.message)
            case _:  # every other event has a method of its own
                raise TypeError(event)

    def _stopping(self, event: StopNoticed | StopAgreed | SaveDeclined) -> None:
        match event:
            case StopNoticed():
                logger.warning("%s", _noticed(event))
            case StopAgreed():
                who = f"all {event.ranks} ranks stop" if event.ranks > 1 else "stopping"
                logger.warning("%s after step %d: %s; %s", who, event.step, event.reason, _left(event.left_s))
            case SaveDeclined(last=newest):
                instead = "nothing was committed before it" if newest is None else f"the newest is {newest.url}"
                logger.warning("not saving step %d: %s; %s", event.step, event.reason, instead)

    def _committed(self, event: SaveCommitted) -> None:
        c = event.checkpoint
        best = [reason for reason in c.kept_because if reason.startswith("best #")]
        metrics = "".join(f" {valued(name, value)}" for name, value in sorted(c.metrics.items()))
        logger.info(
            "saved checkpoint-%d (%s, %d objects, %s, %s%s)%s%s",
            c.step,
            format_bytes(c.size_bytes),
            c.object_count,
            format_duration(event.seconds),
            format_rate(c.size_bytes, event.seconds),
            "" if event.blocked_seconds is None else f", blocked {format_duration(event.blocked_seconds)}",
            metrics,
            f" [{', '.join(best)}]" if best else "",
        )

    def _best(self, event: BestChanged) -> None:
        lines = [f"{c.url} ({valued(event.metric, value)})" for c, value in zip(event.best, event.values, strict=True)]
        logger.info("New best checkpoint: %s", lines[0])
        logger.info("Best checkpoints:")
        for line in lines:
            logger.info("  %s", line)

    def _claimed(self, event: Claimed) -> None:
        if event.took_over_from is not None:
            logger.warning("took over %s from %s, which had not closed it", event.url, event.took_over_from)
        if event.rolled_forward:
            logger.info("completed %s: it was whole when its process died", _names(event.rolled_forward))
        for c in event.abandoned:
            logger.info("discarded %s: %s", c.name, c.retired_because)

    def _resumed(self, event: Resumed) -> None:
        c = event.checkpoint
        logger.info(
            "resumed from %s (%s, %s): %s",
            c.url,
            format_bytes(c.size_bytes),
            format_duration(event.seconds),
            ", ".join(event.components),
        )
        if event.not_restored:
            logger.warning("not restored, because the state does not name them: %s", ", ".join(event.not_restored))

    def _closed(self, event: RunClosed) -> None:
        for line in ["=" * 60, "Training complete!", *summary_lines(event.metric, event.values, event.best), "=" * 60]:
            logger.info("%s", line)
