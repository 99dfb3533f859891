"""What the fake answers, in the words of either API."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final
from xml.etree import ElementTree as ET

from aiohttp import web
from multidict import CIMultiDict

__all__ = ["Answer", "RefusedError", "document", "invalid", "no_bucket", "no_object", "no_permission", "unknown"]

#: An answer goes out in pieces of this size, so that others are served in between.
_PIECE: Final = 1024 * 1024
#: The XML API's codes for the JSON API's reasons ("HTTP status and error codes for XML").
_CODES: Final = {
    "invalid": "InvalidArgument",
    "badRequest": "IncompleteBody",
    "notFound": "NoSuchKey",
    "forbidden": "AccessDenied",
    "required": "AuthenticationRequired",
    "authError": "AuthenticationRequired",
    "rateLimitExceeded": "SlowDown",
    "requestedRangeNotSatisfiable": "InvalidRange",
    "notImplemented": "NotImplemented",
}


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer of HTTP."""

    status: int
    body: bytes | memoryview = b""
    headers: Mapping[str, str] = field(default_factory=dict)

    @staticmethod
    def json(content: Mapping[str, object], status: int = 200, headers: Mapping[str, str] | None = None) -> Answer:
        """An answer of the JSON API."""
        body = json.dumps(content, indent=2).encode()
        return Answer(status, body, {"Content-Type": "application/json; charset=UTF-8", **(headers or {})})

    @staticmethod
    def xml(body: bytes, status: int = 200, headers: Mapping[str, str] | None = None) -> Answer:
        """An answer of the XML API."""
        return Answer(status, body, {"Content-Type": "application/xml; charset=UTF-8", **(headers or {})})

    async def send(self, request: web.Request) -> web.StreamResponse:
        """To whoever asked."""
        headers = CIMultiDict(self.headers)
        if sums := headers.popall("x-goog-hash", []):  # Google sends a line for each
            for one in ",".join(sums).split(","):
                headers.add("x-goog-hash", one)
        if len(self.body) <= _PIECE:
            return web.Response(status=self.status, headers=headers, body=bytes(self.body))
        response = web.StreamResponse(status=self.status, headers=headers)
        response.content_length = len(self.body)
        with contextlib.suppress(ConnectionError):  # the client has left
            await response.prepare(request)
            view = memoryview(self.body)
            for start in range(0, len(view), _PIECE):
                await response.write(view[start : start + _PIECE])
            await response.write_eof()
        return response


class RefusedError(Exception):
    """A request that is not carried out, as Google says it.

    Args:
        status: of HTTP.
        reason: the JSON API's word for it.
        message: for people.
        domain: the JSON API's.
        location: what the JSON API points at.
        headers: of the answer.
        code: the XML API's word for it; by default what stands beside the reason.
    """

    def __init__(
        self,
        status: int,
        reason: str,
        message: str,
        *,
        domain: str = "global",
        location: tuple[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        code: str = "",
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = dict(headers or {})
        self.code = code or _CODES.get(reason, "InvalidArgument")
        self.detail: dict[str, object] = {"message": message, "domain": domain, "reason": reason}
        if location is not None:
            self.detail |= {"locationType": location[0], "location": location[1]}

    def answer(self, *, xml: bool = False) -> Answer:
        """In the words of the API that was asked."""
        if self.status == 304:
            return Answer(304, headers=self.headers)
        if xml:
            body = document("Error", {"Code": self.code, "Message": str(self.detail["message"])})
            return Answer.xml(body, self.status, self.headers)
        error = {"code": self.status, "message": self.detail["message"], "errors": [self.detail]}
        return Answer.json({"error": error}, self.status, self.headers)


def document(name: str, content: Mapping[str, object], *, namespace: str = "") -> bytes:
    """An XML document: text for a scalar, one element each for the mappings of a list."""
    root = ET.Element(name, {"xmlns": namespace} if namespace else {})
    for key, value in content.items():
        if not isinstance(value, list):
            ET.SubElement(root, key).text = str(value)
            continue
        for row in value:
            element = ET.SubElement(root, key)
            for column, text in row.items():
                ET.SubElement(element, column).text = str(text)
    return b"<?xml version='1.0' encoding='UTF-8'?>" + ET.tostring(root)


def invalid(message: str, *, code: str = "InvalidArgument") -> RefusedError:
    """What was sent is no good."""
    return RefusedError(400, "invalid", message, code=code)


def no_bucket() -> RefusedError:
    """There is no such bucket."""
    return RefusedError(404, "notFound", "The specified bucket does not exist.", code="NoSuchBucket")


def no_object(bucket: str, name: str) -> RefusedError:
    """There is no such object."""
    return RefusedError(404, "notFound", f"No such object: {bucket}/{name}", code="NoSuchKey")


def no_permission(permission: str) -> RefusedError:
    """Nobody may do this."""
    on_bucket = permission.startswith("storage.buckets.") or permission.endswith(".list")
    message = (
        f"tester@fake.iam.gserviceaccount.com does not have {permission} access to the Google Cloud Storage "
        f"{'bucket' if on_bucket else 'object'}. Permission '{permission}' denied on resource (or it may not exist)."
    )
    return RefusedError(403, "forbidden", message)


def unknown(what: str) -> RefusedError:
    """What this fake has not learnt."""
    # Not 501, which clients take for a passing trouble and repeat.
    return RefusedError(400, "notImplemented", f"FakeGCS does not know {what}.")
