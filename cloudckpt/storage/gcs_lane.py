"""The direct payload lane of Google Cloud Storage: parts and whole objects up by the XML API, ranges down.

Every request carries the Authorization header that the session's own credentials make, asked for anew every few
seconds, so that a token that expires in mid-upload is another one in the next part. Ranges are read where the session
reads them, at the JSON API, which emulators know too. What the session does and this lane cannot do declines it, and
the session carries the payload itself.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol
from urllib.parse import quote, urlencode

from cloudckpt.config import Settings
from cloudckpt.errors import ObjectNotFoundError, StorageError
from cloudckpt.storage.base import Part
from cloudckpt.storage.direct import Declined, Request, Stop, Wire
from cloudckpt.storage.gcs_errors import Answer
from cloudckpt.storage.gcs_way import Way, refuse_interception
from cloudckpt.storage.gcs_xml import NoXmlApi, refusal
from cloudckpt.storage.lane import THROTTLED, Lane, Outgoing, check_memory
from cloudckpt.storage.multipart import Carried
from cloudckpt.storage.redacting import Redactor
from cloudckpt.storage.remote import crc32c_b64

__all__ = ["GCSLane", "LaneFacts"]

_LOG = logging.getLogger("cloudckpt")
#: A Content-Range, or a Content-Length of the whole object.
_RANGE = re.compile(r"(?:bytes (?P<start>\d+)-\d+/)?(?P<total>\d+)", re.ASCII)
_CONTENT_TYPE = "application/octet-stream"


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


class GCSLane(Lane[_Route, Mapping[str, str]]):
    """Carries payload to and from one bucket.

    Args:
        facts: the session.
        bucket: its name.
        settings: connections, part sizes, time-outs and the bandwidth cap.
        secrets: the session's.
    """

    session_name = "gcsfs"
    #: "Minimum part size: 5 MiB (no minimum for the last part)" ("Quotas & limits").
    least_part_bytes = 5 * 1024 * 1024
    #: Endpoints without the XML API that this process has met, and how they said so.
    _without_xml: ClassVar[dict[str, str]] = {}

    def __init__(self, facts: LaneFacts, bucket: str, settings: Settings, secrets: Redactor) -> None:
        super().__init__(settings, secrets)
        self._facts = facts
        self._bucket = quote(bucket, safe="")
        self._uploads_declined: str | None = None

    # -- whether it is used ----------------------------------------------------------------------------------

    def check_uploads(self) -> None:
        """See ``Lane.check_uploads``."""
        self._find_route()
        if (reason := self._no_uploads) is not None:
            raise Declined(reason)

    @property
    def _no_uploads(self) -> str | None:
        """Why uploads go with the session, though ranges need not; None if they take the lane."""
        return self._uploads_declined or self._without_xml.get(self._facts.endpoint)

    def decline_uploads(self, reason: Declined) -> None:
        """Leave uploads to the session from now on, and say so once. Ranges may still be read directly."""
        if self._declined is None and self._uploads_declined is None:
            self._uploads_declined = self._secrets.hide(str(reason))
            _LOG.info("payload is uploaded through gcsfs, not over the direct lane: %s", self._uploads_declined)
        if isinstance(reason, NoXmlApi):
            self._without_xml[self._facts.endpoint] = self._secrets.hide(str(reason))

    def reconsider(self) -> None:
        """See ``Lane.reconsider``. What declines all of this lane is what the session is, and that stays."""

    def reconsider_uploads(self) -> None:
        """See ``Lane.reconsider_uploads``."""
        if self._uploads_declined is not None and not self._proven:
            self._uploads_declined = None
            self._without_xml.pop(self._facts.endpoint, None)

    def knows_no_uploads(self) -> bool:
        """Whether this process has met the endpoint, and it had no uploads in parts. Sends nothing."""
        return bool(self._without_xml) and self._facts.endpoint in self._without_xml

    def describe(self, otherwise: str) -> str:
        """See ``Lane.describe``."""
        if self._declined is None and (reason := self._no_uploads) is not None:
            return f"{otherwise}: {reason}; ranges are read directly"
        return super().describe(otherwise)

    def _refuse_interception(self) -> None:
        refuse_interception()

    def _make_route(self) -> _Route:
        way = self._facts.way()
        return _Route(Wire(way.address, progress_s=self._settings.request_timeout_s, throttle=self._throttle), way)

    # -- requests --------------------------------------------------------------------------------------------

    def _ask_who(self) -> Mapping[str, str]:
        return self._facts.permission()

    def _ask(self, route: _Route, what: str, request: Request, stop: Stop) -> tuple[Answer, int]:
        """One request, once: the answer, whatever its status, and how many bytes went into the targets."""
        shown = self._who_asks()
        headers = {"Host": route.wire.address.name, **shown.value, **request.headers}
        sent = replace(request, target=route.way.path + request.target, headers=headers)
        found = self._over(route, what, sent, stop)
        if found.status == 401:
            # Once for all requests that showed these credentials.
            if self._forget(shown):
                self._facts.renew_permission()
        elif found.status < 400:
            self._facts.permission_was_taken()
        return Answer(found.status, found.headers, found.body), found.filled

    # -- up --------------------------------------------------------------------------------------------------

    def _put(self, route: _Route, what: str, outgoing: Outgoing, part: Part, stop: Stop) -> Carried:
        target = f"/{self._bucket}/{quote(outgoing.key, safe='/~')}"
        headers = {"x-goog-hash": f"crc32c={crc32c_b64(part.crc32c)}"}
        if route.way.payer:
            headers["x-goog-user-project"] = route.way.payer
        if outgoing.upload_id is None:
            headers["Content-Type"] = _CONTENT_TYPE
        else:
            target += f"?{urlencode({'partNumber': outgoing.number, 'uploadId': outgoing.upload_id})}"
        request = Request(method="PUT", target=target, headers=headers, views=part.views)
        answer, _ = self._ask(route, what, request, stop)
        if answer.status == 200:
            return Carried(answer.headers.get("etag", ""), part.crc32c, part.size_bytes, answer.told_crc32c)
        # Of an upload in parts the beginning has told.
        if outgoing.upload_id is None and not self._proven and (reason := refusal(answer)) is not None:
            raise reason
        problem = self._facts.explain(answer, what)
        if answer.code == "BadDigest":
            check_memory(what, part)
            raise StorageError(f"{problem}: damaged on the way", retryable=True)
        if answer.status in THROTTLED:
            raise _ThrottledError(str(problem), retryable=True)
        raise problem

    @staticmethod
    def _is_throttled(exc: StorageError) -> bool:
        return isinstance(exc, _ThrottledError)

    # -- down ------------------------------------------------------------------------------------------------

    def receive(self, what: str, key: str, start: int, targets: Sequence[memoryview]) -> None:
        """See ``Lane.receive``."""
        route = self._find_route()
        length = sum(map(len, targets))
        end = start + length
        query = urlencode({"alt": "media", **({"userProject": route.way.payer} if route.way.payer else {})})
        target = f"/download/storage/v1/b/{self._bucket}/o/{quote(key, safe='')}?{query}"
        headers = {"Range": f"bytes={start}-{end - 1}"}
        stop = Stop()
        with self._crew.once(stop, length, is_throttled=self._is_throttled):
            answer, filled = self._ask(
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
            raise StorageError(
                f"{what}: {filled} of {length} bytes came ({self._secrets.hide(said) or 'of no range'})", retryable=True
            )
