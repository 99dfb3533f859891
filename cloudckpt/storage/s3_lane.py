"""The direct payload lane of S3: parts and ranges, signed with the filesystem's own credentials, sent by our threads.

Nothing about the store is worked out a second time. The session's client has just sent a request (an announce comes
before every upload, an index before every load), and that request shows the way: endpoint, addressing style, region,
whether it is signed at all. What the client adds to an operation (requester pays, SSE-KMS) is asked of it as headers.
What cannot be shown that way declines the lane, and the client carries the payload itself.

Past 350 lines, because finding the way, signing and both directions share one route and one set of credentials.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, NoReturn, Protocol
from urllib.parse import SplitResult, urlsplit

import crc32c

from cloudckpt.config import Settings
from cloudckpt.core.parts import plan_part_bytes
from cloudckpt.errors import ObjectNotFoundError, StorageError
from cloudckpt.storage.base import Part, Source
from cloudckpt.storage.direct import Address, Answer, Crew, Declined, Request, Stop, Throttle, Wire, WireError, proxy_of
from cloudckpt.storage.direct.sigv4 import Credentials, quoted_path, quoted_query, signed
from cloudckpt.storage.remote import crc32c_b64
from cloudckpt.storage.retry import Backoff
from cloudckpt.storage.s3_errors import AnsweredError, ExpiredCredentialsError, code_of, is_unsupported, status_of
from cloudckpt.storage.s3_upload import Carried
from cloudckpt.storage.s3_way import Way, tls_context

__all__ = ["LaneFacts", "S3Lane"]

_LOG = logging.getLogger("cloudckpt")
_SCOPE = re.compile(r"AWS4-HMAC-SHA256 Credential=[^/]+/\d{8}/([^/]+)/([^/]+)/aws4_request")
_FIRST_BYTE = re.compile(r"(\d+)-", re.ASCII)
#: How long credentials are used without asking the session again, in seconds; it renews them minutes ahead.
_CREDENTIALS_S = 20.0
_MEBIBYTE = 1024 * 1024
_MAX_PARTS = 9_000  # of the API's 10,000
_THROTTLED = {429, 503}
_REFUSALS = {400, 403, 405, 501}


class LaneFacts(Protocol):
    """What the lane asks of the session that it belongs to."""

    def way(self) -> Way | None:
        """How the last request went; None if there was none."""
        ...

    def credentials(self) -> Credentials | None:
        """Fresh ones, from the session."""
        ...

    def renew_credentials(self) -> None:
        """Let the session read them anew."""
        ...

    def credentials_were_taken(self) -> None:
        """The store has accepted what it was shown."""
        ...

    def explain(self, exc: BaseException, what: str) -> StorageError:
        """An error of the store as one of ours."""
        ...

    @property
    def sends_checksums(self) -> bool:
        """Whether the store takes checksums; set to False when it does not."""
        ...

    @sends_checksums.setter
    def sends_checksums(self, value: bool) -> None: ...


class _NotShownYet(Declined):
    """Whoever comes first goes with the session; the next one will see how."""


@dataclass(frozen=True, slots=True)
class _Route:
    wire: Wire
    base_path: str
    region: str
    service: str
    is_signed: bool
    headers: Mapping[str, Mapping[str, str]]


class S3Lane:
    """Carries payload to and from one bucket.

    Args:
        facts: the session.
        bucket: the bucket's name, or an access point's ARN.
        settings: connections, part sizes, time-outs and the bandwidth cap.
    """

    def __init__(self, facts: LaneFacts, bucket: str, settings: Settings) -> None:
        self._facts = facts
        self._bucket = bucket
        self._settings = settings
        self._crew = Crew(settings.connections)
        self._throttle = Throttle(settings.max_bandwidth)
        self._mutex, self._pid = threading.Lock(), os.getpid()
        self._route: _Route | None = None
        self._credentials: tuple[float, Credentials | None] | None = None
        self._declined: str | None = None if settings.direct_lane else "Settings(direct_lane=False)"
        self._proven = False

    # -- whether it is used ----------------------------------------------------------------------------------

    @property
    def declined(self) -> str | None:
        """Why the lane is not used; None if it is."""
        return self._declined

    def decline(self, reason: Declined) -> None:
        """Leave the payload to the session from now on, and say so once."""
        if self._declined is None and not isinstance(reason, _NotShownYet):
            self._declined = str(reason)
            _LOG.info("payload goes through s3fs, not over the direct lane: %s", reason)

    def reconsider(self) -> None:
        """The session failed as well, so what refused the lane was not the lane."""
        if not self._proven and self._settings.direct_lane:
            self._declined = None

    def _find_route(self) -> _Route:
        if self._declined is not None:
            raise Declined(self._declined)
        _refuse_mock()
        if self._pid != os.getpid():
            # A thread that held it when the process was forked does not exist here.
            self._mutex, self._pid = threading.Lock(), os.getpid()
        with self._mutex:
            if self._route is None:
                way = self._facts.way()
                if way is None:
                    raise _NotShownYet("no request has been sent yet that shows the way")
                self._route = self._route_of(way)
            return self._route

    def _route_of(self, way: Way) -> _Route:
        if way.is_session_bound:
            raise Declined("the bucket wants sessions of its own (S3 Express)")
        scope = _SCOPE.match(way.authorization)
        if way.authorization and scope is None:
            raise Declined(f"requests are signed with {way.authorization.split(' ', 1)[0]}, not with AWS4-HMAC-SHA256")
        parts = urlsplit(way.url)
        origin = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
        tls = tls_context(way) if parts.scheme == "https" else None
        address = Address.of(origin, proxy=proxy_of(origin, way.proxies), tls=tls)
        wire = Wire(address, progress_s=self._settings.request_timeout_s, throttle=self._throttle)
        region, service = (scope[1], scope[2]) if scope else ("", "")
        base = self._base_path(parts.hostname or "", parts.path, urlsplit(way.endpoint))
        return _Route(wire, base, region, service, scope is not None, way.headers)

    def _base_path(self, host: str, path: str, endpoint: SplitResult) -> str:
        root = endpoint.path.rstrip("/")
        name = self._bucket.rpartition("/")[2].rpartition(":")[2]
        # Virtual-hosted, or an access point. The endpoint's own host is no bucket's, whatever it begins with.
        if host != endpoint.hostname and host.startswith((f"{self._bucket}.", f"{name}-")):
            return f"{root}/"
        in_path = f"{root}/{quoted_path(self._bucket)}"
        if path == in_path or path.startswith(f"{in_path}/"):
            return f"{in_path}/"
        raise Declined("the bucket is found neither in the host's name nor in the path")

    @property
    def worthwhile(self) -> int:
        """How many requests at once are worth having, as far as is known."""
        return self._crew.worthwhile

    # -- requests --------------------------------------------------------------------------------------------

    def _shown(self) -> Credentials:
        """What requests are signed with now."""
        with self._mutex:
            known = self._credentials
        if known is None or known[0] < time.monotonic():
            known = (time.monotonic() + _CREDENTIALS_S, self._facts.credentials())
            with self._mutex:
                self._credentials = known
        if known[1] is None:
            raise StorageError(f"{self._bucket}: the session has no credentials any more")
        return known[1]

    def _headers(
        self,
        route: _Route,
        method: str,
        target: tuple[str, str],
        headers: Mapping[str, str],
        credentials: Credentials | None,
    ) -> Mapping[str, str]:
        named = {"Host": route.wire.address.name, **headers}
        if credentials is None:
            return named
        return signed(
            method,
            *target,
            named,
            credentials=credentials,
            region=route.region,
            service=route.service,
            now=datetime.fromtimestamp(time.time(), UTC),
        )

    def _ask(self, route: _Route, what: str, request: _Wanted, stop: Stop) -> Answer:
        """One request, once; anything but a success is raised."""
        target = (route.base_path + quoted_path(request.key), quoted_query(request.query))
        credentials = self._shown() if route.is_signed else None
        headers = self._headers(route, request.method, target, request.headers, credentials)
        spelled = target[0] + (f"?{target[1]}" if target[1] else "")
        sent = Request(
            method=request.method, target=spelled, headers=headers, views=request.views, targets=request.targets
        )
        try:
            answer = route.wire.send(sent, stop)
        except WireError as exc:
            raise StorageError(f"{what}: {exc}", retryable=True) from exc
        if answer.status not in {200, 206}:
            self._refused(AnsweredError.of(answer.status, answer.headers, answer.body), what, credentials)
        self._facts.credentials_were_taken()
        return answer

    def _refused(self, exc: AnsweredError, what: str, credentials: Credentials | None) -> NoReturn:
        problem = self._facts.explain(exc, what)
        if isinstance(problem, ExpiredCredentialsError):
            # Once for all requests that showed these.
            with self._mutex:
                is_current = self._credentials is not None and self._credentials[1] is credentials
                if is_current:
                    self._credentials = None
            if is_current:
                self._facts.renew_credentials()
        elif not problem.retryable and not self._proven and status_of(exc) in _REFUSALS | {301, 307}:
            raise Declined(f"the store refused its first request ({status_of(exc)} {code_of(exc)})") from exc
        raise problem from exc

    def _backoff(self) -> Backoff:
        return Backoff(
            deadline_s=self._settings.storage_deadline_s,
            base_s=self._settings.retry_base_s,
            cap_s=self._settings.retry_cap_s,
        )

    # -- up --------------------------------------------------------------------------------------------------

    def part_bytes(self, source: Source) -> int:
        """How large the parts of an object are. See ``plan_part_bytes``."""
        return plan_part_bytes(
            source.size_bytes,
            source.together_bytes,
            connections=self._crew.worthwhile,
            least_bytes=self._settings.part_size_bytes,
            most_parts=_MAX_PARTS,
        )

    def check(self) -> None:
        """Raise ``Declined`` where the lane cannot be used; sends nothing."""
        self._find_route()

    def send(
        self, what: str, key: str, source: Source, progress: Callable[[int], None], *, upload_id: str | None
    ) -> list[Carried]:
        """Send all parts of an upload, or with no upload the whole object in one request.

        Raises:
            Declined: the store refused the very first request of this lane, or a way cannot be found.
            StorageError: the store refused.
        """
        route = self._find_route()
        size = source.size_bytes
        step = self.part_bytes(source) if upload_id is not None else size
        told = threading.Lock()

        def job(number: int, start: int) -> Callable[[Stop], Carried]:
            def carry(stop: Stop) -> Carried:
                with source.hold(start, min(step, size - start)) as part:
                    query = {} if upload_id is None else {"partNumber": str(number), "uploadId": upload_id}
                    named = what if upload_id is None else f"{what}, part {number}"
                    headers = route.headers["put_object" if upload_id is None else "upload_part"]
                    wanted = _Wanted("PUT", key, query, headers, views=part.views)
                    if upload_id is None:
                        progress(part.size_bytes)  # before it becomes visible: whoever raises here stops it
                    etag = self._carry(route, named, wanted, part, stop)
                if upload_id is not None:
                    with told:
                        progress(part.size_bytes)
                return Carried(etag, part.crc32c, part.size_bytes)

            return carry

        return self._crew.each(job(number, start) for number, start in enumerate(range(0, size, step), 1))

    def _carry(self, route: _Route, what: str, wanted: _Wanted, part: Part, stop: Stop) -> str:
        attempts = self._crew.attempts(stop, self._backoff())
        bare = False

        def attempt() -> str:
            nonlocal bare
            if attempts.count > 1 and _sum(part.views) != part.crc32c:
                raise StorageError(
                    f"{what}: the bytes in memory changed while they were being sent: a tensor was written to during "
                    "the save. Nothing of it becomes visible; save again, and let save() return (or wait_staged()) "
                    "before the state changes"
                )
            checksum = (
                {"x-amz-checksum-crc32c": crc32c_b64(part.crc32c), "x-amz-sdk-checksum-algorithm": "CRC32C"}
                if self._facts.sends_checksums and not bare
                else {}
            )
            summed = replace(wanted, headers={**wanted.headers, **checksum})
            try:
                etag = self._ask(route, what, summed, stop).headers.get("etag")
            except StorageError as exc:
                cause = exc.__cause__
                if code_of(cause or exc) == "BadDigest" and _sum(part.views) == part.crc32c:
                    raise StorageError(f"{exc}: damaged on the way", retryable=True) from cause
                if checksum and cause is not None and is_unsupported(cause):
                    bare = True  # whether that was the reason shows when it is taken without
                    raise StorageError(str(exc), retryable=True) from cause
                raise
            if not etag:
                # An answer that broke off in its headers looks like one without them.
                raise StorageError(f"{what}: the answer has no ETag", retryable=True)
            return etag

        found = attempts.run(attempt, is_throttled=_is_throttled, size_bytes=part.size_bytes)
        self._proven = True
        if bare:
            self._facts.sends_checksums = False
        return found

    # -- down ------------------------------------------------------------------------------------------------

    def receive(self, what: str, key: str, start: int, targets: Sequence[memoryview]) -> None:
        """Fill the targets with a range, by one request in the caller's thread.

        Raises:
            Declined: the lane cannot be used, or the store refused its very first request.
            ObjectNotFoundError: there is no such object, or it ends before the last target is full.
            StorageError: the store refused, or the answer broke off.
        """
        route = self._find_route()
        length = sum(map(len, targets))
        end = start + length
        headers = {**route.headers["get_object"], "Range": f"bytes={start}-{end - 1}"}
        missing = f"{what}: bytes {start}..{end} do not exist"
        try:
            stop = Stop()
            with self._crew.once(stop, length):
                answer = self._ask(route, what, _Wanted("GET", key, {}, headers, targets=targets), stop)
        except StorageError as exc:
            if status_of(exc.__cause__ or exc) == 416:
                raise ObjectNotFoundError(missing) from exc
            raise
        # An answer that broke off in its headers looks like one without them, and proves nothing.
        ranged = answer.headers.get("content-range")  # some servers send one with a plain 200
        said = answer.headers.get("content-length", "") if ranged is None and answer.status == 200 else ranged or ""
        total = said.rpartition("/")[2]
        first = _FIRST_BYTE.search(ranged or "")
        if total.isdecimal() and int(total) < end:
            raise ObjectNotFoundError(missing)
        if total.isdecimal() and ranged is None and (start or int(total) != end):
            raise Declined(f"the server does not answer ranges ({total} bytes came for {length})")
        if not total.isdecimal() or answer.filled != length or (first is not None and int(first[1]) != start):
            raise StorageError(
                f"{what}: {answer.filled} of {length} bytes came ({said or 'of no range'})", retryable=True
            )
        self._proven = True

    # -- the end ---------------------------------------------------------------------------------------------

    def describe(self) -> str:
        """The lane in words."""
        least = self._settings.part_size_bytes // _MEBIBYTE
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
            route, self._route, self._credentials = self._route, None, None
        if route is not None:
            route.wire.close()


@dataclass(frozen=True, slots=True)
class _Wanted:
    method: str
    key: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    views: Sequence[memoryview] = ()
    targets: Sequence[memoryview] = ()


def _sum(views: Sequence[memoryview]) -> int:
    value = 0
    for view in views:
        value = crc32c.crc32c(view, value)
    return value


def _is_throttled(exc: StorageError) -> bool:
    return status_of(exc.__cause__ or exc) in _THROTTLED


def _refuse_mock() -> None:
    models: Any = sys.modules.get("moto.core.models")
    if getattr(getattr(models, "botocore_stubber", None), "enabled", False):
        raise Declined("moto's mock_aws is active, and it must see every request")
