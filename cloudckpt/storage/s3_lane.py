"""The direct payload lane of S3: parts and ranges, signed with the filesystem's own credentials, sent by our threads.

Nothing about the store is worked out a second time. The session's client has just sent a request (an announce comes
before every upload, an index before every load), and that request shows the way: endpoint, addressing style, region,
whether it is signed at all. What the client adds to an operation (requester pays, SSE-KMS) is asked of it as headers.
What cannot be shown that way declines the lane, and the client carries the payload itself.

Past 350 lines, because finding the way, signing and both directions share one route and one set of credentials.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, NoReturn, Protocol
from urllib.parse import SplitResult, urlsplit

from cloudckpt.config import Settings
from cloudckpt.errors import ObjectNotFoundError, StorageError
from cloudckpt.storage.base import Part
from cloudckpt.storage.direct import Address, Answer, Declined, Request, Stop, Wire, proxy_of
from cloudckpt.storage.direct.sigv4 import Credentials, quoted_path, quoted_query, signed
from cloudckpt.storage.lane import THROTTLED, Lane, NotYet, Outgoing, Shown, check_memory
from cloudckpt.storage.multipart import Carried
from cloudckpt.storage.redacting import Redactor
from cloudckpt.storage.remote import crc32c_b64
from cloudckpt.storage.s3_errors import AnsweredError, ExpiredCredentialsError, code_of, is_unsupported, status_of
from cloudckpt.storage.s3_way import Way, tls_context

__all__ = ["LaneFacts", "S3Lane"]

_SCOPE = re.compile(r"AWS4-HMAC-SHA256 Credential=[^/]+/\d{8}/([^/]+)/([^/]+)/aws4_request")
_FIRST_BYTE = re.compile(r"(\d+)-", re.ASCII)
_REFUSALS = {301, 307, 400, 403, 405, 501}


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


@dataclass(frozen=True, slots=True)
class _Route:
    wire: Wire
    base_path: str
    region: str
    service: str
    is_signed: bool
    headers: Mapping[str, Mapping[str, str]]


class S3Lane(Lane[_Route, Credentials]):
    """Carries payload to and from one bucket.

    Args:
        facts: the session.
        bucket: the bucket's name, or an access point's ARN.
        settings: connections, part sizes, time-outs and the bandwidth cap.
        secrets: the session's.
    """

    session_name = "s3fs"

    def __init__(self, facts: LaneFacts, bucket: str, settings: Settings, secrets: Redactor) -> None:
        super().__init__(settings, secrets)
        self._facts = facts
        self._bucket = bucket

    # -- whether it is used ----------------------------------------------------------------------------------

    def reconsider(self) -> None:
        """See ``Lane.reconsider``."""
        if not self._proven and self._settings.direct_lane:
            self._declined = None

    def reconsider_uploads(self) -> None:
        """See ``Lane.reconsider_uploads``."""
        self.reconsider()

    def _refuse_interception(self) -> None:
        models: Any = sys.modules.get("moto.core.models")
        if getattr(getattr(models, "botocore_stubber", None), "enabled", False):
            raise Declined("moto's mock_aws is active, and it must see every request")

    def _make_route(self) -> _Route:
        way = self._facts.way()
        if way is None:
            raise NotYet("no request has been sent yet that shows the way")
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

    # -- requests --------------------------------------------------------------------------------------------

    def _ask_who(self) -> Credentials:
        found = self._facts.credentials()
        if found is None:
            raise StorageError(f"{self._bucket}: the session has no credentials any more")
        return found

    def _ask(self, route: _Route, what: str, request: _Wanted, stop: Stop) -> Answer:
        """One request, once; anything but a success is raised."""
        path, query = route.base_path + quoted_path(request.key), quoted_query(request.query)
        headers: Mapping[str, str] = {"Host": route.wire.address.name, **request.headers}
        shown = self._who_asks() if route.is_signed else None
        if shown is not None:
            headers = signed(
                request.method,
                path,
                query,
                headers,
                credentials=shown.value,
                region=route.region,
                service=route.service,
                now=datetime.fromtimestamp(time.time(), UTC),
            )
        target = path + (f"?{query}" if query else "")
        sent = Request(
            method=request.method, target=target, headers=headers, views=request.views, targets=request.targets
        )
        answer = self._over(route, what, sent, stop)
        if answer.status not in {200, 206}:
            self._refused(AnsweredError.of(answer.status, answer.headers, answer.body), what, shown)
        self._facts.credentials_were_taken()
        return answer

    def _refused(self, exc: AnsweredError, what: str, shown: Shown[Credentials] | None) -> NoReturn:
        problem = self._facts.explain(exc, what)
        if isinstance(problem, ExpiredCredentialsError):
            # Once for all requests that showed these credentials.
            if shown is None or self._forget(shown):
                self._facts.renew_credentials()
        elif not problem.retryable and not self._proven and status_of(exc) in _REFUSALS:
            raise Declined(f"the store refused its first request ({status_of(exc)} {code_of(exc)})") from exc
        raise problem from exc

    # -- up --------------------------------------------------------------------------------------------------

    def _put(self, route: _Route, what: str, outgoing: Outgoing, part: Part, stop: Stop) -> Carried:
        is_whole = outgoing.upload_id is None
        query = {} if is_whole else {"partNumber": str(outgoing.number), "uploadId": str(outgoing.upload_id)}
        own = route.headers["put_object" if is_whole else "upload_part"]

        def send(checksum: Mapping[str, str]) -> Carried:
            wanted = _Wanted("PUT", outgoing.key, query, {**own, **checksum}, views=part.views)
            answer = self._ask(route, what, wanted, stop)
            return Carried(answer.headers.get("etag", ""), part.crc32c, part.size_bytes)

        if not self._facts.sends_checksums:
            return send({})
        try:
            return send({"x-amz-checksum-crc32c": crc32c_b64(part.crc32c), "x-amz-sdk-checksum-algorithm": "CRC32C"})
        except StorageError as exc:
            cause = exc.__cause__
            if code_of(cause or exc) == "BadDigest":
                check_memory(what, part)
                raise StorageError(f"{exc}: damaged on the way", retryable=True) from cause
            if cause is None or not is_unsupported(cause):
                raise
        check_memory(what, part)
        carried = send({})
        # Only now is it known that the checksum was the reason.
        self._facts.sends_checksums = False
        return carried

    @staticmethod
    def _is_throttled(exc: StorageError) -> bool:
        return status_of(exc.__cause__ or exc) in THROTTLED

    # -- down ------------------------------------------------------------------------------------------------

    def receive(self, what: str, key: str, start: int, targets: Sequence[memoryview]) -> None:
        """See ``Lane.receive``. A store that refuses its very first request declines the lane."""
        route = self._find_route()
        length = sum(map(len, targets))
        end = start + length
        headers = {**route.headers["get_object"], "Range": f"bytes={start}-{end - 1}"}
        missing = f"{what}: bytes {start}..{end} do not exist"
        try:
            stop = Stop()
            with self._crew.once(stop, length, is_throttled=self._is_throttled):
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
                f"{what}: {answer.filled} of {length} bytes came ({self._secrets.hide(said) or 'of no range'})",
                retryable=True,
            )
        self._proven = True


@dataclass(frozen=True, slots=True)
class _Wanted:
    method: str
    key: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    views: Sequence[memoryview] = ()
    targets: Sequence[memoryview] = ()
