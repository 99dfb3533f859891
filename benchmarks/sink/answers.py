"""What the sink answers to each kind of S3 request."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar
from urllib.parse import unquote
from xml.sax.saxutils import escape, unescape

from benchmarks.sink.objects import Body, Object, Objects
from benchmarks.sink.wire import Connection, Head

__all__ = ["Answer", "Answers", "kind_of"]

_THEN = "2026-01-01T00:00:00.000Z"
_XMLNS = 'xmlns="http://s3.amazonaws.com/doc/2006-03-01/"'
_STATUS = {
    "NoSuchKey": "404 Not Found",
    "NoSuchUpload": "404 Not Found",
    "PreconditionFailed": "412 Precondition Failed",
    "InvalidRange": "416 Range Not Satisfiable",
    "NotImplemented": "501 Not Implemented",
}


@dataclass(frozen=True, slots=True)
class Answer:
    """A status, header lines, and either XML or a range of an object."""

    status: str = "200 OK"
    fields: tuple[str, ...] = ()
    xml: str = ""
    found: Object | None = None
    start: int = 0
    end: int = 0


def refusal(code: str) -> Answer:
    """An error as S3 words it."""
    return Answer(_STATUS[code], xml=f"<Error><Code>{code}</Code><Message>{code}</Message></Error>")


def kind_of(head: Head) -> str:  # noqa: PLR0911, C901 - a table of kinds
    """The S3 operation a request asks for, in one word, as it is counted."""
    query, fields = head.query, head.fields
    match head.method:
        case "PUT" if not head.key:
            return "CreateBucket"
        case "PUT" if "partNumber" in query:
            return "UploadPart"
        case "PUT":
            return "Copy" if "x-amz-copy-source" in fields else "Put"
        case "POST" if "uploads" in query:
            return "CreateMultipart"
        case "POST" if "uploadId" in query:
            return "CompleteMultipart"
        case "POST" if "delete" in query:
            return "DeleteMany"
        case "DELETE":
            return "AbortMultipart" if "uploadId" in query else "Delete"
        case "GET" if not head.key:
            return "ListUploads" if "uploads" in query else "Location" if "location" in query else "List"
        case "GET" | "HEAD" if head.key:
            return head.method.title()
        case "HEAD":
            return "HeadBucket"
    return "Other"


class Answers:
    """Answers requests from the objects, after ``delay_s``.

    Args:
        discard: drop payload of 1 MiB and more; what ends in ``.json`` or ``.metadata`` is kept all the same.
    """

    def __init__(self, objects: Objects, *, discard: bool, delay_s: float = 0.0) -> None:
        self._objects = objects
        self._discard = discard
        self._delay_s = delay_s

    def serve(self, connection: Connection) -> None:
        """One request after another until the client goes."""
        while True:
            head = connection.head()
            keep = not self._discard or head.key.endswith((".json", ".metadata"))
            body = connection.body(head, keep=keep)
            if head.bucket == "_sink":
                self._about_itself(connection, head.key)
                continue
            kind = kind_of(head)
            answer = self._answers.get(kind, Answers._other)(self, head, body)
            self._objects.count(kind, bytes_in=body.size_bytes, bytes_out=answer.end - answer.start)
            if self._delay_s:
                time.sleep(self._delay_s)
            self._send(connection, head, answer)
            if head.fields.get("connection", "").lower() == "close":
                return

    @staticmethod
    def _send(connection: Connection, head: Head, answer: Answer) -> None:
        xml = answer.xml.encode()
        length = len(xml) if answer.found is None else answer.end - answer.start
        lines = [f"HTTP/1.1 {answer.status}", "x-amz-request-id: 0", *answer.fields]
        if not answer.status.startswith("204"):
            kind = "application/xml" if answer.found is None else "binary/octet-stream"
            lines += [f"Content-Type: {kind}", f"Content-Length: {length}"]
        first = ("\r\n".join(lines) + "\r\n\r\n").encode()
        if head.method == "HEAD":
            connection.send(first)
        elif answer.found is None:
            connection.send(first + xml)
        else:
            connection.send(first)
            connection.send_bodies(answer.found.bodies, answer.start, answer.end)

    def _about_itself(self, connection: Connection, asked: str) -> None:
        if asked == "clear":
            self._objects.clear()
        counts = self._objects.counted()
        said = {"requests": counts.requests, "bytes_in": counts.bytes_in, "bytes_out": counts.bytes_out}
        text = json.dumps(said)
        connection.send(f"HTTP/1.1 200 OK\r\nContent-Length: {len(text)}\r\n\r\n{text}".encode())

    # -- one method a kind -----------------------------------------------------------------------------------

    def _put(self, head: Head, body: Body) -> Answer:
        new = Object((body,), self._objects.etag_of(body))
        code = self._objects.put(
            head.place,
            new,
            if_match=head.fields.get("if-match"),
            if_none_match=head.fields.get("if-none-match") == "*",
        )
        return refusal(code) if code else Answer(fields=(f'ETag: "{new.etag}"',))

    def _upload_part(self, head: Head, body: Body) -> Answer:
        etag = self._objects.add_part(head.query["uploadId"], int(head.query["partNumber"]), body)
        return refusal("NoSuchUpload") if etag is None else Answer(fields=(f'ETag: "{etag}"',))

    def _create_multipart(self, head: Head, _: Body) -> Answer:
        name = self._objects.begin(head.place)
        inner = f"<Bucket>{head.bucket}</Bucket><Key>{escape(head.key)}</Key><UploadId>{name}</UploadId>"
        return Answer(xml=f"<InitiateMultipartUploadResult {_XMLNS}>{inner}</InitiateMultipartUploadResult>")

    def _complete_multipart(self, head: Head, _: Body) -> Answer:
        if (made := self._objects.finish(head.query["uploadId"])) is None:
            return refusal("NoSuchUpload")
        inner = f"<Bucket>{head.bucket}</Bucket><Key>{escape(head.key)}</Key><ETag>&quot;{made.etag}&quot;</ETag>"
        return Answer(xml=f"<CompleteMultipartUploadResult {_XMLNS}>{inner}</CompleteMultipartUploadResult>")

    def _abort_multipart(self, head: Head, _: Body) -> Answer:
        there = self._objects.abort(head.query["uploadId"])
        return Answer("204 No Content") if there else refusal("NoSuchUpload")

    def _copy(self, head: Head, _: Body) -> Answer:
        source = self._objects.get(unquote(head.fields["x-amz-copy-source"]).lstrip("/"))
        if source is None:
            return refusal("NoSuchKey")
        self._objects.put(head.place, source)
        inner = f"<LastModified>{_THEN}</LastModified><ETag>&quot;{source.etag}&quot;</ETag>"
        return Answer(xml=f"<CopyObjectResult {_XMLNS}>{inner}</CopyObjectResult>")

    def _delete(self, head: Head, _: Body) -> Answer:
        self._objects.delete(head.place)
        return Answer("204 No Content")

    def _delete_many(self, head: Head, body: Body) -> Answer:
        asked = (body.small or b"").decode()
        keys = [unescape(key, {"&quot;": '"', "&apos;": "'"}) for key in re.findall(r"<Key>(.*?)</Key>", asked)]
        self._objects.delete(*(f"{head.bucket}/{key}" for key in keys))
        quiet = "<Quiet>true</Quiet>" in asked
        inner = "" if quiet else "".join(f"<Deleted><Key>{escape(key)}</Key></Deleted>" for key in keys)
        return Answer(xml=f"<DeleteResult {_XMLNS}>{inner}</DeleteResult>")

    def _list(self, head: Head, _: Body) -> Answer:
        query = head.query
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        after = query.get("continuation-token") or query.get("start-after") or query.get("marker") or ""
        limit = int(query.get("max-keys", 1000))
        page = self._objects.page(head.bucket, prefix, delimiter, after, limit)
        count = len(page.found) + len(page.prefixes)
        more = str(page.next_after is not None).lower()
        told = [
            f"<Name>{head.bucket}</Name><Prefix>{escape(prefix)}</Prefix><Delimiter>{escape(delimiter)}</Delimiter>",
            f"<MaxKeys>{limit}</MaxKeys><KeyCount>{count}</KeyCount><IsTruncated>{more}</IsTruncated>",
        ]
        if page.next_after is not None:
            token = escape(page.next_after)
            told.append(f"<NextContinuationToken>{token}</NextContinuationToken><NextMarker>{token}</NextMarker>")
        told += [
            f"<Contents><Key>{escape(key)}</Key><LastModified>{_THEN}</LastModified><ETag>&quot;{found.etag}&quot;"
            f"</ETag><Size>{found.size_bytes}</Size><StorageClass>STANDARD</StorageClass></Contents>"
            for key, found in page.found
        ]
        told += [f"<CommonPrefixes><Prefix>{escape(found)}</Prefix></CommonPrefixes>" for found in page.prefixes]
        return Answer(xml=f"<ListBucketResult {_XMLNS}>{''.join(told)}</ListBucketResult>")

    def _list_uploads(self, head: Head, _: Body) -> Answer:
        found = self._objects.uploads(head.bucket, head.query.get("prefix", ""))
        inner = "".join(
            f"<Upload><Key>{escape(key)}</Key><UploadId>{name}</UploadId><Initiated>{_THEN}</Initiated></Upload>"
            for key, name in found
        )
        told = f"<Bucket>{head.bucket}</Bucket><IsTruncated>false</IsTruncated>{inner}"
        return Answer(xml=f"<ListMultipartUploadsResult {_XMLNS}>{told}</ListMultipartUploadsResult>")

    def _get(self, head: Head, _: Body) -> Answer:
        if (found := self._objects.get(head.place)) is None:
            return refusal("NoSuchKey")
        size = found.size_bytes
        fields = (f'ETag: "{found.etag}"', "Accept-Ranges: bytes", "Last-Modified: Thu, 01 Jan 2026 00:00:00 GMT")
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", head.fields.get("range", ""))
        if asked is None:
            return Answer(fields=fields, found=found, end=size)
        first, last = asked[1], asked[2]
        start = int(first) if first else max(0, size - int(last))
        end = min(size, int(last) + 1) if first and last else size
        if start >= end:
            return refusal("InvalidRange")
        ranged = f"Content-Range: bytes {start}-{end - 1}/{size}"
        return Answer("206 Partial Content", (*fields, ranged), found=found, start=start, end=end)

    def _location(self, _: Head, __: Body) -> Answer:
        return Answer(xml=f"<LocationConstraint {_XMLNS}/>")

    def _nothing(self, _: Head, __: Body) -> Answer:
        return Answer()

    def _other(self, _: Head, __: Body) -> Answer:
        return refusal("NotImplemented")

    _answers: ClassVar[dict[str, Callable[[Answers, Head, Body], Answer]]] = {
        "Put": _put,
        "UploadPart": _upload_part,
        "CreateMultipart": _create_multipart,
        "CompleteMultipart": _complete_multipart,
        "AbortMultipart": _abort_multipart,
        "Copy": _copy,
        "Delete": _delete,
        "DeleteMany": _delete_many,
        "List": _list,
        "ListUploads": _list_uploads,
        "Get": _get,
        "Head": _get,
        "Location": _location,
        "HeadBucket": _nothing,
        "CreateBucket": _nothing,
    }
