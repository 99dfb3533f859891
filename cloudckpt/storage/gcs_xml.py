"""Uploads in parts by the XML API: begun, completed, aborted and listed over the session; the lane sends the parts.

"XML API multipart uploads" and its siblings in the Cloud Storage documentation. There is no limit to how long an
unfinished upload stays, and its parts are billed, so each is either completed or aborted.
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlencode
from xml.etree import ElementTree as ET
from xml.sax.saxutils import escape

from cloudckpt.errors import ObjectNotFoundError, StorageError
from cloudckpt.storage.direct import Declined
from cloudckpt.storage.gcs_errors import Answer
from cloudckpt.storage.loop import Loop, Running

__all__ = ["NoXmlApi", "Session", "XmlUploads", "refusal"]

_OK = (200, 204)
_REFUSALS = (400, 403, 404, 405, 501)
#: What is wrong with one request, or with what it asks for, at a store that knows the API.
_KNOWING = {
    *("NoSuchBucket", "NoSuchKey", "NoSuchUpload", "UserProjectMissing", "KeyTooLong"),
    *("BadDigest", "InvalidDigest", "IncompleteBody", "RequestTimeout", "ExpiredToken", "InvalidToken"),
}


class NoXmlApi(Declined):
    """The store answers in no word of the XML API: whoever asks it again gets the same."""


@dataclass(frozen=True, slots=True)
class Session:
    """How an upload speaks to the store.

    Attributes:
        loop: where requests run.
        run: a coroutine to its end.
        again: tries under the store's deadline while waiting may help.
        send: one request, once, whatever its answer.
        explained: an answer that is no success as an error.
    """

    loop: Callable[[], Loop]
    run: Callable[[Coroutine[Any, Any, Any]], Any]
    again: Callable[[Callable[[], Awaitable[Any]]], Coroutine[Any, Any, Any]]
    send: Callable[..., Awaitable[Answer]]
    explained: Callable[[Answer, str], StorageError]


def refusal(answer: Answer) -> Declined | None:
    """Why a store does not take uploads by the XML API at all, if that is what an answer to the first one means.

    An emulator without this API answers with no error document of it. Whoever may create objects but not uploads in
    parts gets 403, and a bucket of a kind that has none of them 400: there the JSON API may still do.
    """
    if answer.status not in _REFUSALS or answer.code in _KNOWING:
        return None
    if not answer.code:
        return NoXmlApi(f"the store does not know the XML API (it answers {answer.status})")
    return Declined(f"the store takes no upload by the XML API here ({answer.status} {answer.code})")


class XmlUploads:
    """Uploads of one bucket. Keys are whole ones.

    Args:
        session: the way to the store.
        bucket: its name.
    """

    def __init__(self, session: Session, bucket: str) -> None:
        self._session = session
        self._path = f"/{quote(bucket, safe='')}"

    def begin(self, what: str, key: str, content_type: str) -> Running[str]:
        """Open an upload; its id. ``repeated`` where there may be another one that nobody knows.

        Raises:
            Declined: the store does not take uploads in parts.
        """

        async def attempt() -> str:
            running.attempts += 1
            answer = await self._send(what, "POST", key, "uploads", headers={"Content-Type": content_type}, data=b"")
            if reason := refusal(answer):
                raise reason
            self._check(answer, what)
            if not (found := _text(answer, "UploadId")):
                raise Declined("the store answers no upload id to the beginning of an upload in parts")
            return found

        running: Running[str] = Running(self._session.loop(), lambda: self._session.again(attempt))
        return running

    def complete(self, what: str, key: str, upload_id: str, etags: Sequence[str]) -> Answer:
        """Make the object of the parts, numbered from 1.

        Raises:
            ObjectNotFoundError: there is no such upload (any more).
        """
        parts = "".join(
            f"<Part><PartNumber>{number}</PartNumber><ETag>{escape(etag)}</ETag></Part>"
            for number, etag in enumerate(etags, 1)
        )
        document = f"<CompleteMultipartUpload>{parts}</CompleteMultipartUpload>".encode()

        async def attempt() -> Answer:
            answer = await self._send(
                what, "POST", key, _of(upload_id), headers={"Content-Type": "application/xml"}, data=document
            )
            self._check(answer, what)
            if answer.code:  # as S3 may do: 200 to begin with, and in the end an error
                raise StorageError(str(self._session.explained(answer, what)), retryable=True)
            return answer

        found: Answer = self._session.run(self._session.again(attempt))
        return found

    def abort(self, what: str, key: str, upload_id: str) -> bool:
        """Give an upload up; whether it was still there."""
        return bool(self._session.run(self._session.again(lambda: self._abort(what, key, upload_id))))

    def abort_strays(self, key: str) -> None:
        """Give up every unfinished upload of this very key."""

        async def attempt() -> None:
            for name, upload_id in await self._find(f"listing unfinished uploads of {key}", key):
                if name == key:  # one that only begins alike is somebody else's
                    await self._abort(f"aborting an upload of {key}", key, upload_id)

        self._session.run(self._session.again(attempt))

    def find(self, what: str, prefix: str) -> list[tuple[str, str]]:
        """Keys and ids of the unfinished uploads whose key starts with a prefix.

        Raises:
            Declined: the store does not know uploads in parts.
        """
        found: list[tuple[str, str]] = self._session.run(self._find(what, prefix))
        return found

    def abort_each(self, uploads: Sequence[tuple[str, str]]) -> int:
        """Give uploads up; how many were still there."""

        async def work() -> int:
            return sum([await self._abort(f"aborting an upload of {key}", key, found) for key, found in uploads])

        return int(self._session.run(work()))

    # -- requests --------------------------------------------------------------------------------------------

    async def _send(self, what: str, method: str, key: str, query: str, **arguments: Any) -> Answer:
        path = f"{self._path}/{quote(key, safe='/~')}" if key else self._path
        return await self._session.send(what, method, path, query=query, **arguments)

    def _check(self, answer: Answer, what: str) -> None:
        if answer.status not in _OK:
            raise self._session.explained(answer, what)

    async def _abort(self, what: str, key: str, upload_id: str) -> bool:
        answer = await self._send(what, "DELETE", key, _of(upload_id))
        with contextlib.suppress(ObjectNotFoundError):  # it has ended meanwhile
            self._check(answer, what)
            return True
        return False

    async def _find(self, what: str, prefix: str) -> list[tuple[str, str]]:
        found: list[tuple[str, str]] = []
        while True:
            # Where the last page ended, not what it calls its end: that may be spelled otherwise.
            after = {"key-marker": found[-1][0], "upload-id-marker": found[-1][1]} if found else {}
            query = urlencode({"prefix": prefix, **after}, quote_via=quote)
            answer = await self._send(what, "GET", "", f"uploads&{query}")
            if answer.status != 403 and (reason := refusal(answer)):
                raise reason
            self._check(answer, what)
            page = [
                (_inside(upload, "Key"), _inside(upload, "UploadId"))
                for upload in _document(answer, what).iter()
                if _plain(upload.tag) == "Upload"
            ]
            found += [upload for upload in page if upload[0].startswith(prefix)]
            if not page or _text(answer, "IsTruncated") != "true":
                return found


def _of(upload_id: str) -> str:
    return f"uploadId={quote(upload_id, safe='')}"


def _document(answer: Answer, what: str) -> ET.Element:
    try:
        return ET.fromstring(answer.body)  # noqa: S314 - the store's own answer, and expat bounds what it expands
    except ET.ParseError as exc:
        raise StorageError(f"{what}: the answer is no XML document ({exc})", retryable=True) from exc


def _text(answer: Answer, name: str) -> str:
    with contextlib.suppress(StorageError):
        return _inside(_document(answer, ""), name)
    return ""


def _inside(element: ET.Element, name: str) -> str:
    return next((child.text or "" for child in element if _plain(child.tag) == name), "")


def _plain(tag: str) -> str:
    return tag.rpartition("}")[2]
