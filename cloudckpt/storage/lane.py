"""What the direct payload lanes of both stores have in common: when they are used, and how parts are carried.

A lane of a store signs requests and says what an answer means. Which parts there are, when one is sent again, what a
forked child must not touch, and who is told why payload goes another way is the same for every store, and is here.

(Past 350 lines, because a part's whole way, from its first bytes to its last repetition, is told in one place.)
"""

from __future__ import annotations

import logging
import os
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Generic, Protocol, TypeVar

import crc32c

from cloudckpt.config import Settings
from cloudckpt.core.parts import plan_part_bytes
from cloudckpt.errors import ObjectNotFoundError, StorageError
from cloudckpt.storage.base import Part, Source
from cloudckpt.storage.direct import Answer, BrokenOff, Crew, Declined, Request, Stop, Throttle, Wire, WireError
from cloudckpt.storage.multipart import Carried
from cloudckpt.storage.redacting import Redactor
from cloudckpt.storage.retry import Backoff

__all__ = ["THROTTLED", "Lane", "NotYet", "Outgoing", "Shown", "check_memory"]

_LOG = logging.getLogger("cloudckpt")
#: How long what the session said of who asks is used without asking it again, in seconds; it renews that minutes ahead.
_FRESH_S = 20.0
_MEBIBYTE = 1024 * 1024
_MAX_PARTS = 9_000  # of the 10,000 that both APIs allow
#: Statuses by which a store says that it is too much at once.
THROTTLED = {429, 503}


class NotYet(Declined):
    """This request goes with the session, and the next one may not."""


class HasWire(Protocol):
    """How requests go, as far as all lanes need it."""

    @property
    def wire(self) -> Wire:
        """The connections."""
        ...


RouteT = TypeVar("RouteT", bound=HasWire)
ShownT = TypeVar("ShownT")


@dataclass(frozen=True, slots=True)
class Shown(Generic[ShownT]):
    """Who asks, as the session said it.

    Attributes:
        until: when to ask again, on the monotonic clock.
        value: what it said.
    """

    until: float
    value: ShownT


@dataclass(frozen=True, slots=True)
class Outgoing:
    """Where a part goes.

    Attributes:
        key: the whole key of the object.
        upload_id: the upload that it is a part of; None for a whole object.
        number: of the part, from 1.
    """

    key: str
    upload_id: str | None
    number: int


class Lane(ABC, Generic[RouteT, ShownT]):
    """Carries payload to and from one bucket.

    Args:
        settings: connections, part sizes, time-outs and the bandwidth cap.
        secrets: takes what is secret out of what the store says.
    """

    #: Who carries the payload where the lane does not, for the log.
    session_name: ClassVar[str]
    #: The smallest part but for the last one, in bytes.
    least_part_bytes: ClassVar[int] = 1

    def __init__(self, settings: Settings, secrets: Redactor) -> None:
        self._settings = settings
        self._secrets = secrets
        self._crew = Crew(settings.connections)
        self._throttle = Throttle(settings.max_bandwidth)
        self._mutex, self._pid = threading.Lock(), os.getpid()
        self._route: RouteT | None = None
        self._shown: Shown[ShownT] | None = None
        self._declined: str | None = None if settings.direct_lane else "Settings(direct_lane=False)"
        #: The store has taken what the lane sent it, so a refusal is none of the lane.
        self._proven = False

    # -- whether it is used ----------------------------------------------------------------------------------

    @property
    def declined(self) -> str | None:
        """Why the lane is not used; None if it is."""
        return self._declined

    def check_uploads(self) -> None:
        """Raise ``Declined`` where the lane cannot be used for an upload; sends nothing."""
        self._find_route()

    def decline(self, reason: Declined) -> None:
        """Leave the payload to the session from now on, and say so once."""
        if self._declined is None and not isinstance(reason, NotYet):
            self._declined = self._secrets.hide(str(reason))
            _LOG.info("payload goes through %s, not over the direct lane: %s", self.session_name, self._declined)

    def decline_uploads(self, reason: Declined) -> None:
        """As ``decline``, for what goes up."""
        self.decline(reason)

    @abstractmethod
    def reconsider(self) -> None:
        """The session could not read either, so what refused the lane was perhaps not the lane."""

    @abstractmethod
    def reconsider_uploads(self) -> None:
        """The session could not write either, so what refused the lane was perhaps not the lane."""

    def _find_route(self) -> RouteT:
        if self._declined is not None:
            raise Declined(self._declined)
        self._refuse_interception()
        if self._pid != os.getpid():
            # A thread that held the mutex when the process was forked will never give it back.
            self._mutex, self._pid = threading.Lock(), os.getpid()
        with self._mutex:
            route = self._route
        if route is None:
            made = self._make_route()
            with self._mutex:
                route = self._route = self._route or made
        return route

    @abstractmethod
    def _refuse_interception(self) -> None:
        """Raise ``Declined`` where somebody in this process stands in for the session and must see every request."""

    @abstractmethod
    def _make_route(self) -> RouteT:
        """How the session's requests go; sends nothing.

        Raises:
            Declined: in a way that the lane does not know.
        """

    # -- requests --------------------------------------------------------------------------------------------

    def _who_asks(self) -> Shown[ShownT]:
        with self._mutex:
            known = self._shown
        if known is not None and time.monotonic() <= known.until:
            return known
        fresh = Shown(time.monotonic() + _FRESH_S, self._ask_who())
        with self._mutex:
            # Parts that begin together ask together: all show what came first, so that one refusal is of one showing.
            if self._shown is None or self._shown is known:
                self._shown = fresh
            return self._shown

    @abstractmethod
    def _ask_who(self) -> ShownT:
        """What the session says now."""

    def _forget(self, known: Shown[ShownT]) -> bool:
        """Ask the session again the next time; whether nobody else has found that out before."""
        with self._mutex:
            is_current = self._shown is known
            if is_current:
                self._shown = None
        return is_current

    def _over(self, route: RouteT, what: str, request: Request, stop: Stop) -> Answer:
        try:
            return route.wire.send(request, stop)
        except WireError as exc:
            cause = self._secrets.clean(exc)  # a proxy that refuses a tunnel says why in its own words
            raise StorageError(f"{what}: {self._secrets.hide(str(exc))}", retryable=True) from cause

    # -- up --------------------------------------------------------------------------------------------------

    @property
    def worthwhile(self) -> int:
        """How many requests at once are worth having, as far as is known."""
        return self._crew.worthwhile

    @property
    def _least(self) -> int:
        return max(self._settings.part_size_bytes, self.least_part_bytes)

    def part_bytes(self, source: Source) -> int:
        """How large the parts of an object are. See ``plan_part_bytes``."""
        return plan_part_bytes(
            source.size_bytes,
            source.together_bytes,
            connections=self._crew.worthwhile,
            least_bytes=self._least,
            most_parts=_MAX_PARTS,
        )

    def send_whole(self, what: str, key: str, source: Source) -> Carried:
        """Send a whole object in one request.

        Raises:
            Declined: the lane cannot be used, or the store refused what only the lane sends.
            StorageError: the store refused.
        """
        outgoing = Outgoing(key, None, 1)
        (carried,) = self._send(what, source, source.size_bytes, lambda _: outgoing, lambda _: None)
        return carried

    def send_parts(
        self, what: str, key: str, source: Source, progress: Callable[[int], None], *, upload_id: str
    ) -> list[Carried]:
        """Send all parts of an upload, as many at once as is worthwhile; in order.

        Raises:
            Declined: the lane cannot be used, or the store refused what only the lane sends.
            StorageError: the store refused.
        """
        return self._send(what, source, self.part_bytes(source), lambda n: Outgoing(key, upload_id, n), progress)

    def _send(
        self,
        what: str,
        source: Source,
        step: int,
        outgoing: Callable[[int], Outgoing],
        progress: Callable[[int], None],
    ) -> list[Carried]:
        route = self._find_route()
        size = source.size_bytes
        told = threading.Lock()

        def job(number: int, start: int) -> Callable[[Stop], Carried]:
            def carry(stop: Stop) -> Carried:
                stop.check()
                with source.hold(start, min(step, size - start)) as part:
                    carried = self._carry(route, what, outgoing(number), part, stop)
                with told:
                    progress(part.size_bytes)
                return carried

            return carry

        jobs = (job(number, start) for number, start in enumerate(range(0, size, step), 1))
        try:
            return self._crew.each(jobs, source.stopping)
        except BrokenOff:
            with source.hold(0, 0):  # says why the source was stopped
                raise

    def _carry(self, route: RouteT, what: str, outgoing: Outgoing, part: Part, stop: Stop) -> Carried:
        backoff = Backoff(
            deadline_s=self._settings.storage_deadline_s,
            base_s=self._settings.retry_base_s,
            cap_s=self._settings.retry_cap_s,
        )
        attempts = self._crew.attempts(stop, backoff)
        named = what if outgoing.upload_id is None else f"{what}, part {outgoing.number}"

        def attempt() -> Carried:
            if attempts.count > 1:
                check_memory(named, part)
            try:
                carried = self._put(route, named, outgoing, part, stop)
            except ObjectNotFoundError as exc:
                if outgoing.upload_id is None:
                    raise
                raise StorageError(f"{named}: the upload was aborted by somebody else; save again") from exc
            if not carried.etag:  # an answer that broke off in its headers looks like one without them
                raise StorageError(f"{named}: the answer has no ETag", retryable=True)
            return carried

        carried = attempts.run(attempt, is_throttled=self._is_throttled, size_bytes=part.size_bytes)
        self._proven = True
        return carried

    @abstractmethod
    def _put(self, route: RouteT, what: str, outgoing: Outgoing, part: Part, stop: Stop) -> Carried:
        """Send a part, or a whole object, once.

        Raises:
            Declined: the store refused what only the lane sends.
            ObjectNotFoundError: there is no such upload (any more).
            StorageError: the store refused.
        """

    @staticmethod
    @abstractmethod
    def _is_throttled(exc: StorageError) -> bool:
        """Whether a refusal means that it was too much at once."""

    # -- down ------------------------------------------------------------------------------------------------

    @abstractmethod
    def receive(self, what: str, key: str, start: int, targets: Sequence[memoryview]) -> None:
        """Fill the targets with a range, by one request in the caller's thread.

        Raises:
            Declined: the lane cannot be used, or the server does not answer ranges.
            ObjectNotFoundError: there is no such object, or it ends before the last target is full.
            StorageError: the store refused, or the answer broke off.
        """

    # -- the end ---------------------------------------------------------------------------------------------

    def describe(self, otherwise: str) -> str:
        """The lane in words, or what is done ``otherwise`` and why. May ask the session, so not on its loop."""
        if self._declined is not None:
            return f"{otherwise}: {self._declined}"
        cap = self._settings.max_bandwidth
        least = self._least // _MEBIBYTE
        return f"direct, up to {self._settings.connections} connections, parts of {least} MiB and more with CRC-32C" + (
            f", at most {cap / _MEBIBYTE:g} MiB/s" if cap else ""
        )

    def close(self) -> None:
        """Let threads and connections go; both come again when needed."""
        if self._pid != os.getpid():
            return  # they are the parent's
        self._crew.close()
        with self._mutex:
            route, self._route, self._shown = self._route, None, None
        if route is not None:
            route.wire.close()


def check_memory(what: str, part: Part) -> None:
    """Raise ``StorageError`` where a part has other bytes by now than it was summed with."""
    value = 0
    for view in part.views:
        value = crc32c.crc32c(view, value)
    if value != part.crc32c:
        raise StorageError(
            f"{what}: the bytes in memory changed while they were being sent: a tensor was written to during the save. "
            "Nothing of it becomes visible; save again, and let save() return (or wait_staged()) before the state "
            "changes"
        )
