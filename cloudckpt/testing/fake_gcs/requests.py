"""What is asked of the fake: a method and a path become an operation."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias
from urllib.parse import unquote

from aiohttp import web
from multidict import CIMultiDictProxy

from cloudckpt.testing.fake_gcs.answers import RefusedError, unknown

__all__ = ["Asked", "Operation", "Place", "Seen", "condition_names", "integer"]

#: What a request asked for; "unknown" is no endpoint of this server.
Operation: TypeAlias = Literal[
    "get",
    "media",
    "insert",
    "resumable-start",
    "resumable-chunk",
    "resumable-query",
    "resumable-cancel",
    "list",
    "delete",
    "bucket-get",
    "copy",
    "patch",
    "xml-get",
    "xml-put",
    "xml-upload-start",
    "xml-upload-part",
    "xml-upload-complete",
    "xml-upload-abort",
    "xml-upload-list",
    "unknown",
]

#: Generations and their like are signed 64-bit numbers.
_MOST: Final = 1 << 63
_HTTP_CONDITIONS: Final = ("If-Match", "If-None-Match", "If-Modified-Since", "If-Unmodified-Since", "If-Range")
_PATH: Final = re.compile(r"/(?:(upload|download)/)?storage/v1/b/([^/]+)(/o(?:/([^/]+)(/.*)?)?)?")
_COPY: Final = re.compile(r"/(copyTo|rewriteTo)/b/([^/]+)/o/([^/]+)")
#: "https://storage.googleapis.com/BUCKET/KEY" ("Request endpoints"); a key's slashes may stand for themselves.
_XML_PATH: Final = re.compile(r"/(?!storage/|upload/|download/|batch/)([^/]+)(?:/(.*))?")
_INTEGER: Final = re.compile(r"[+-]?\d{1,19}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Seen:
    """One request that was answered.

    Attributes:
        method: of HTTP.
        operation: what it asked for.
        name: the object's, decoded; of a copy the written one's; of a listing its prefix; empty for a bucket, and
            where an upload was refused before it was read.
        status: the answer's; 0 where the connection broke before the body was there, so that nothing was answered.
    """

    method: str
    operation: Operation
    name: str
    status: int


@dataclass(slots=True)
class Asked:
    """A request, taken apart.

    Attributes:
        name: the object's, as soon as it is known; an upload has it in its body.
        whole: whether the body came to its end.
        base: the server's URL as the client knows it.
    """

    method: str
    operation: Operation
    place: Place
    name: str
    query: Mapping[str, str]
    headers: CIMultiDictProxy[str]
    body: bytearray
    whole: bool
    base: str

    @staticmethod
    def of(request: web.Request, body: bytearray, *, whole: bool) -> Asked:
        """A request of HTTP, with its body."""
        place = Place.of(request.raw_path)
        query, headers = request.query, request.headers
        operation = _operation(request.method, place, query, headers)
        listing = operation in {"list", "xml-upload-list"}
        name = query.get("prefix", "") if listing else place.target[1] or place.name
        base = f"{headers.get('X-Forwarded-Proto', 'http')}://{request.host}"
        return Asked(request.method, operation, place, name, query, headers, body, whole, base)

    @property
    def bucket(self) -> str:
        """The bucket's name."""
        return self.place.bucket

    @property
    def is_xml(self) -> bool:
        """Whether it came to the XML API."""
        return self.place.service == "xml"

    @property
    def payer(self) -> str:
        """The project that pays for the request, if it says so."""
        return self.query.get("userProject") or self.headers.get("x-goog-user-project") or ""

    @property
    def upload_id(self) -> str | None:
        """The session of a resumable upload."""
        return self.query.get("upload_id") if self.operation.startswith("resumable") else None

    def check_conditions_are_known(self) -> None:
        """A condition that is ignored is worse than one that is refused."""
        if self.upload_id is not None:
            return
        known: set[str] = set()
        if self.operation in {"get", "media", "insert", "resumable-start", "delete", "patch", "copy"}:
            known |= condition_names("if")
        if self.operation == "copy":
            known |= condition_names("ifSource")
        asked = {key for key in self.query if key.startswith("if")} - known
        asked |= {key for key in _HTTP_CONDITIONS if key in self.headers}
        if asked:
            raise unknown(f"the condition {', '.join(sorted(asked))} on {self.operation}")


@dataclass(frozen=True, slots=True)
class Place:
    """What a path names.

    Attributes:
        service: "buckets", "objects", "upload" or "download" of the JSON API, or "xml"; empty where the path is none
            of ours.
        bucket: its name.
        name: the object's; empty where the path names none.
        verb: "copyTo", "rewriteTo", or empty.
        target: what a copy writes, as bucket and name.
    """

    service: str = ""
    bucket: str = ""
    name: str = ""
    verb: str = ""
    target: tuple[str, str] = ("", "")

    @staticmethod
    def of(raw_path: str) -> Place:
        """Take a path apart before it is decoded, since names may hold slashes and percent signs."""
        path = raw_path.partition("?")[0]
        found = _PATH.fullmatch(path)
        xml = _XML_PATH.fullmatch(path)
        copy = _COPY.fullmatch(found[5]) if found and found[5] else None
        if found is not None and (not found[5] or copy is not None):
            parts = [found[2], found[4] or "", *((copy[2], copy[3]) if copy else ("", ""))]
            service = found[1] or ("objects" if found[3] else "buckets")
        elif xml is not None:
            parts, service = [xml[1], xml[2] or "", "", ""], "xml"
        else:
            return Place()
        try:
            bucket, name, *target = (unquote(part, errors="strict") for part in parts)
        except UnicodeDecodeError:
            return Place()
        return Place(service, bucket, name, copy[1] if copy else "", (target[0], target[1]))


#: (service, whether the path names an object, method) -> operation.
_OPERATIONS: Final[dict[tuple[str, bool, str], Operation]] = {
    ("buckets", False, "GET"): "bucket-get",
    ("objects", False, "GET"): "list",
    ("objects", True, "GET"): "get",
    ("objects", True, "DELETE"): "delete",
    ("objects", True, "PATCH"): "patch",
    ("download", True, "GET"): "media",
}
#: (whether the path names an object, the subresource in the query, method) -> operation.
_XML_OPERATIONS: Final[dict[tuple[bool, str, str], Operation]] = {
    (True, "", "GET"): "xml-get",
    (True, "", "PUT"): "xml-put",
    (True, "uploads", "POST"): "xml-upload-start",
    (True, "uploadId", "PUT"): "xml-upload-part",
    (True, "uploadId", "POST"): "xml-upload-complete",
    (True, "uploadId", "DELETE"): "xml-upload-abort",
    (False, "uploads", "GET"): "xml-upload-list",
}


def _operation(method: str, place: Place, query: Mapping[str, str], headers: Mapping[str, str]) -> Operation:
    if place.service == "xml":
        subresource = next((name for name in ("uploads", "uploadId") if name in query), "")
        return _XML_OPERATIONS.get((bool(place.name), subresource, method), "unknown")
    if place.verb:
        return "copy" if (place.service, method) == ("objects", "POST") else "unknown"
    if place.service == "upload" and not place.name:
        return _upload_operation(method, query, headers)
    found = _OPERATIONS.get((place.service, bool(place.name), method), "unknown")
    return "media" if found == "get" and query.get("alt") == "media" else found


def _upload_operation(method: str, query: Mapping[str, str], headers: Mapping[str, str]) -> Operation:
    if "upload_id" in query:
        if method == "DELETE":
            return "resumable-cancel"
        # Google takes POST for PUT here, and gcsfs sends it.
        if method not in {"PUT", "POST"}:
            return "unknown"
        return "resumable-query" if headers.get("Content-Range", "").startswith("bytes */") else "resumable-chunk"
    if method != "POST":
        return "unknown"
    return "resumable-start" if query.get("uploadType") == "resumable" else "insert"


def condition_names(prefix: str) -> set[str]:
    """The four preconditions of a generation and a metageneration."""
    return {
        f"{prefix}{subject}{test}" for subject in ("Generation", "Metageneration") for test in ("Match", "NotMatch")
    }


def integer(query: Mapping[str, str], name: str) -> int:
    """A parameter's 64-bit number."""
    text = query[name]
    if _INTEGER.fullmatch(text) is None or not -_MOST <= int(text) < _MOST:
        raise RefusedError(400, "invalid", f'Invalid long value: "{text}".', location=("parameter", name))
    return int(text)
