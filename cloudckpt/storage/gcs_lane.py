"""The direct payload lane of Google Cloud Storage: parts and whole objects up by the XML API, ranges down.

Every request carries the Authorization header that the session's own credentials make, asked for anew every few
seconds, so that a token that expires in mid-upload is another one in the next part. Ranges are read where the session
reads them, at the JSON API, which emulators know too. What the session does and this lane cannot do declines it, and
the session carries the payload itself.
"""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol
from urllib.parse import quote, urlencode

import crc32c

from cloudckpt.config import Settings
from cloudckpt.core.parts import plan_part_bytes
from cloudckpt.errors import ObjectNotFoundError, StorageError
from cloudckpt.storage.base import Part, Source
from cloudckpt.storage.direct import Crew, Declined, Request, Stop, Throttle, Wire, WireError
from cloudckpt.storage.gcs_errors import Answer
from cloudckpt.storage.gcs_parts import Carried
from cloudckpt.storage.gcs_way import Way, refuse_interception
from cloudckpt.storage.gcs_xml import NoXmlApi, refusal
from cloudckpt.storage.remote import crc32c_b64
from cloudckpt.storage.retry import Backoff

__all__ = ["GCSLane", "LaneFacts"]

_LOG = logging.getLogger("cloudckpt")
#: How long an Authorization header is used without asking the session again, in seconds; google-auth renews a token
#: minutes before it expires.
_PERMISSION_S = 20.0
_MEBIBYTE = 1024 * 1024
#: "Minimum part size: 5 MiB (no minimum for the last part)", and at most 10,000 of them ("Quotas & limits").
_LEAST_PART = 5 * _MEBIBYTE
_MAX_PARTS = 9_000
#: A Content-Range, or a Content-Length of the whole object.
_RANGE = re.compile(r"(?:bytes (?P<start>\d+)-\d+/)?(?P<total>\d+)", re.ASCII)
_CONTENT_TYPE = "application/octet-stream"
_THROTTLED = (429, 503)


class LaneFacts(Protocol):
    """What the lane asks of the session that it belongs to."""

    @property
    def endpoint(self) -> str:
        """The URL that requests are sent to."""
        ...

    def way(self) -> Way:
        """How requests go.

        Raises:
            Declined: in a way that the lane does not know.
        """
        ...

    def permission(self) -> Mapping[str, str]:
        """Fresh headers of the session: who asks."""
        ...

    def renew_permission(self) -> None:
        """Let the session read its credentials anew."""
        ...

    def permission_was_taken(self) -> None:
        """The store has accepted what it was shown."""
        ...

    def explain(self, answer: Answer, what: str) -> StorageError:
        """An answer that is no success as an error of ours."""
        ...


class _ThrottledError(StorageError):
    """The store says that it is too much."""


@dataclass(frozen=True, slots=True)
class _Route:
    wire: Wire
    way: Way


class GCSLane:
    """Carries payload to and from one bucket.

    Args:
        facts: the session.
        bucket: its name.
        settings: connections, part sizes, time-outs and the bandwidth cap.
    """

    #: Endpoints without the XML API that this process has met, and how they said so.
    _without_xml: ClassVar[dict[str, str]] = {}

    def __init__(self, facts: LaneFacts, bucket: str, settings: Settings) -> None:
        self._facts = facts
        self._bucket = quote(bucket, safe="")
        self._settings = settings
        self._crew = Crew(settings.connections)
        self._throttle = Throttle(settings.max_bandwidth)
        self._pid = os.getpid()
        self._mutex = threading.Lock()
        self._route: _Route | None = None
        self._permission: tuple[float, Mapping[str, str]] | None = None
        self._declined: str | None = None if settings.direct_lane else "Settings(direct_lane=False)"
        self._uploads_declined: str | None = None
        self._uploads_proven = False

    # -- whether it is used ----------------------------------------------------------------------------------

    def check_uploads(self) -> None:
        """Raise ``Declined`` where the lane cannot be used for an upload; sends nothing."""
        self._find_route()
        if (reason := self._uploads_declined or self._without_xml.get(self._facts.endpoint)) is not None:
            raise Declined(reason)

    def decline_uploads(self, reason: Declined) -> None:
        """Leave uploads to the session from now on, and say so once."""
        if self._declined is None and self._uploads_declined is None:
            self._uploads_declined = str(reason)
            _LOG.info("payload is uploaded through gcsfs, not over the direct lane: %s", reason)
        if isinstance(reason, NoXmlApi):
            self._without_xml[self._facts.endpoint] = str(reason)

    def decline(self, reason: Declined) -> None:
        """Leave everything to the session from now on, and say so once."""
        if self._declined is None:
            self._declined = str(reason)
            _LOG.info("payload goes through gcsfs, not over the direct lane: %s", reason)

    def reconsider_uploads(self) -> None:
        """The session failed as well, so what refused the lane was not the lane."""
        if self._uploads_declined is not None and not self._uploads_proven:
            self._uploads_declined = None
            self._without_xml.pop(self._facts.endpoint, None)

    def knows_no_uploads(self) -> bool:
        """Whether this process has met the endpoint, and it had no uploads in parts. Sends nothing."""
        return bool(self._without_xml) and self._facts.endpoint in self._without_xml

    def _find_route(self) -> _Route:
        if self._declined is not None:
            raise Declined(self._declined)
        refuse_interception()
        if self._pid != os.getpid():
            # A thread that held the mutex when the process was forked will never give it back.
            self._mutex, self._pid = threading.Lock(), os.getpid()
        with self._mutex:
            route = self._route
        if route is None:
            way = self._facts.way()
            wire = Wire(way.address, progress_s=self._settings.request_timeout_s, throttle=self._throttle)
            with self._mutex:
                route = self._route = self._route or _Route(wire, way)
        return route

    # -- requests --------------------------------------------------------------------------------------------

    def _send(self, route: _Route, what: str, request: Request, stop: Stop) -> tuple[Answer, int]:
        """One request, once: the answer, whatever its status, and how many bytes went into the targets."""
        with self._mutex:
            known = self._permission
        if known is None or known[0] < time.monotonic():
            known = (time.monotonic() + _PERMISSION_S, self._facts.permission())
            with self._mutex:
                self._permission = known
        headers = {"Host": route.wire.address.name, **known[1], **request.headers}
        try:
            found = route.wire.send(replace(request, target=route.way.path + request.target, headers=headers), stop)
        except WireError as exc:
            raise StorageError(f"{what}: {exc}", retryable=True) from exc
        if found.status == 401:
            # Once for all requests that showed these credentials.
            with self._mutex:
                is_current, self._permission = self._permission is known, None
            if is_current:
                self._facts.renew_permission()
        elif found.status < 400:
            self._facts.permission_was_taken()
        return Answer(found.status, found.headers, found.body), found.filled

    def _backoff(self) -> Backoff:
        return Backoff(
            deadline_s=self._settings.storage_deadline_s,
            base_s=self._settings.retry_base_s,
            cap_s=self._settings.retry_cap_s,
        )

    # -- up --------------------------------------------------------------------------------------------------

    @property
    def is_used(self) -> bool:
        """Whether reads go over the lane."""
        return self._declined is None

    @property
    def worthwhile(self) -> int:
        """How many requests at once are worth having, as far as is known."""
        return self._crew.worthwhile

    def part_bytes(self, source: Source) -> int:
        """How large the parts of an object are. See ``plan_part_bytes``."""
        return plan_part_bytes(
            source.size_bytes,
            source.together_bytes,
            connections=self._crew.worthwhile,
            least_bytes=max(self._settings.part_size_bytes, _LEAST_PART),
            most_parts=_MAX_PARTS,
        )

    def send(
        self, what: str, key: str, source: Source, progress: Callable[[int], None], *, upload_id: str | None
    ) -> list[Carried]:
        """Send all parts of an upload, or with no upload the whole object in one request.

        Raises:
            Declined: the store does not take the whole object by the XML API.
            StorageError: the store refused.
        """
        route = self._find_route()
        size = source.size_bytes
        step = self.part_bytes(source) if upload_id is not None else size
        path = f"/{self._bucket}/{quote(key, safe='/~')}"
        about = {"x-goog-user-project": route.way.payer} if route.way.payer else {}
        if upload_id is None:
            about["Content-Type"] = _CONTENT_TYPE
        told = threading.Lock()

        def job(number: int, start: int) -> Callable[[Stop], Carried]:
            query = "" if upload_id is None else f"?{urlencode({'partNumber': number, 'uploadId': upload_id})}"
            named = what if upload_id is None else f"{what}, part {number}"

            def carry(stop: Stop) -> Carried:
                stop.check()
                with source.hold(start, min(step, size - start)) as part:
                    headers = {**about, "x-goog-hash": f"crc32c={crc32c_b64(part.crc32c)}"}
                    request = Request(method="PUT", target=path + query, headers=headers, views=part.views)
                    answer = self._carry(route, named, request, part, stop)
                with told:
                    progress(part.size_bytes)
                return Carried(answer.headers.get("etag", ""), part.crc32c, part.size_bytes, answer.told_crc32c)

            return carry

        return self._crew.each(job(number, start) for number, start in enumerate(range(0, size, step), 1))

    def _carry(self, route: _Route, what: str, request: Request, part: Part, stop: Stop) -> Answer:
        attempts = self._crew.attempts(stop, self._backoff())

        def attempt() -> Answer:
            if attempts.count > 1:
                _check_memory(what, part)
            answer, _ = self._send(route, what, request, stop)
            if answer.status == 200:
                if not answer.headers.get("etag"):  # it broke off in its headers
                    raise StorageError(f"{what}: the answer has no ETag", retryable=True)
                return answer
            # Of an upload in parts the beginning has told.
            if "?" not in request.target and not self._uploads_proven and (reason := refusal(answer)) is not None:
                raise reason
            problem = self._facts.explain(answer, what)
            if isinstance(problem, ObjectNotFoundError):
                raise StorageError(f"{what}: the upload was aborted by somebody else; save again")
            if answer.code == "BadDigest":
                _check_memory(what, part)
                raise StorageError(f"{problem}: damaged on the way", retryable=True)
            if answer.status in _THROTTLED:
                raise _ThrottledError(str(problem), retryable=True)
            raise problem

        answer = attempts.run(
            attempt, is_throttled=lambda exc: isinstance(exc, _ThrottledError), size_bytes=part.size_bytes
        )
        self._uploads_proven = True
        return answer

    # -- down ------------------------------------------------------------------------------------------------

    def receive(self, what: str, key: str, start: int, targets: Sequence[memoryview]) -> None:
        """Fill the targets with a range, by one request in the caller's thread.

        Raises:
            Declined: the lane cannot be used, or the server does not answer ranges.
            ObjectNotFoundError: there is no such object, or it ends before the last target is full.
            StorageError: the store refused, or the answer broke off.
        """
        route = self._find_route()
        length = sum(map(len, targets))
        end = start + length
        query = urlencode({"alt": "media", **({"userProject": route.way.payer} if route.way.payer else {})})
        target = f"/download/storage/v1/b/{self._bucket}/o/{quote(key, safe='')}?{query}"
        headers = {"Range": f"bytes={start}-{end - 1}"}
        stop = Stop()
        with self._crew.once(stop, length):
            answer, filled = self._send(
                route, what, Request(method="GET", target=target, headers=headers, targets=targets), stop
            )
            if answer.status not in {200, 206, 416}:  # which says nothing about how fast the line is
                raise self._facts.explain(answer, what)
        said = answer.headers.get("content-range" if answer.status == 206 else "content-length", "")
        found = _RANGE.fullmatch(said)
        if answer.status == 416 or (found is not None and int(found["total"]) < end):
            raise ObjectNotFoundError(f"{what}: bytes {start}..{end} do not exist")
        if answer.status == 200 and found is not None and (start or int(found["total"]) != end):
            raise Declined("the server does not answer ranges")
        # An answer that broke off in its headers looks like one without them.
        if found is None or int(found["start"] or 0) != start or filled != length:
            raise StorageError(f"{what}: {filled} of {length} bytes came ({said or 'of no range'})", retryable=True)

    # -- the end ---------------------------------------------------------------------------------------------

    def describe(self, endpoint: str, otherwise: str) -> str:
        """The lane in words, or what is done otherwise and why."""
        if self._declined is not None:
            return f"{otherwise}: {self._declined}"
        if (reason := self._uploads_declined or self._without_xml.get(endpoint)) is not None:
            return f"{otherwise}: {reason}; ranges are read directly"
        least = max(self._settings.part_size_bytes, _LEAST_PART) // _MEBIBYTE
        cap = self._settings.max_bandwidth
        return f"direct, up to {self._settings.connections} connections, parts of {least} MiB and more with CRC-32C" + (
            f", at most {cap / _MEBIBYTE:g} MiB/s" if cap else ""
        )

    def close(self) -> None:
        """Let threads and connections go; both come again when needed."""
        if self._pid != os.getpid():
            return  # they are the parent's
        self._crew.close()
        with self._mutex:
            route, self._route, self._permission = self._route, None, None
        if route is not None:
            route.wire.close()


def _check_memory(what: str, part: Part) -> None:
    value = 0
    for view in part.views:
        value = crc32c.crc32c(view, value)
    if value != part.crc32c:
        raise StorageError(
            f"{what}: the bytes in memory changed while they were being sent: a tensor was written to during the save. "
            "Nothing of it becomes visible; save again, and let save() return (or wait_staged()) before the state "
            "changes"
        )
