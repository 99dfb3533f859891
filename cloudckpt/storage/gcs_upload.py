"""One resumable upload: chunk after chunk, and after any doubt the store is asked how much it has."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import crc32c

from cloudckpt.core.checksum import combine_all
from cloudckpt.errors import ObjectNotFoundError, StorageError
from cloudckpt.storage.gcs_errors import Answer
from cloudckpt.storage.remote import crc32c_b64

__all__ = ["ResumableUpload", "Session"]

_INCOMPLETE = 308  # "Resume Incomplete"


@dataclass(frozen=True, slots=True)
class Session:
    """How an upload speaks to the store.

    Attributes:
        run: a coroutine to its end, or down with the caller.
        again: tries under the store's deadline while waiting may help.
        begin: opens an upload session; its URL.
        send: one request, once: method, URL, headers, body.
        stored: the metadata of the finished object.
        compare: holds what the store says it has against what was sent: the answer, size and sum.
        explained: an answer that is no success as an error.
    """

    run: Callable[[Coroutine[Any, Any, Any]], Any]
    again: Callable[[Callable[[], Awaitable[Any]]], Coroutine[Any, Any, Any]]
    begin: Callable[[], Awaitable[str]]
    send: Callable[[str, str, dict[str, str], bytes | None], Coroutine[Any, Any, Answer]]
    stored: Callable[[], Awaitable[Answer]]
    compare: Callable[[Answer, int, int], Awaitable[None]]
    explained: Callable[[Answer, str], StorageError]


class ResumableUpload:
    """An object on its way ("Resumable uploads", Cloud Storage documentation).

    Args:
        session: the way to the store.
        what: the upload in words, for messages.
        size_bytes: of the object.
    """

    def __init__(self, session: Session, *, what: str, size_bytes: int) -> None:
        self._session = session
        self._what = what
        self._size_bytes = size_bytes
        self._url = ""
        self._sums: list[tuple[int, int]] = []

    def send(self, parts: Iterator[bytearray], progress: Callable[[int], None]) -> None:
        """Send every part, or cancel the upload and raise what went wrong.

        Raises:
            StorageError: the store refused, or the parts do not add up to the size.
            BaseException: whatever ``parts`` or ``progress`` raised, as it was.
        """
        start = 0
        try:
            self._url = self._session.run(self._session.again(self._session.begin))
            part: bytearray | None = next(parts)
            while part is not None:
                # Looked at before the last part leaves, since with it the object becomes visible.
                following = next(parts, None)
                end = start + len(part)
                if end > self._size_bytes or (end == self._size_bytes) != (following is None):
                    raise StorageError(f"{self._what}: {end} bytes or more came, {self._size_bytes} were announced")
                self._sums.append((crc32c.crc32c(part), len(part)))
                progress(len(part))
                chunk = _Chunk(bytes(part), start, combine_all(self._sums) if following is None else None)
                self._session.run(self._session.again(partial(self._deliver, chunk)))
                start, part = end, following
        except BaseException:
            if self._url:
                # A session that is not cancelled holds nothing visible, costs nothing and ends after a week.
                with contextlib.suppress(StorageError):
                    self._session.run(self._session.send("DELETE", self._url, {"Content-Length": "0"}, None))
            raise

    async def _deliver(self, chunk: _Chunk) -> None:
        while not chunk.delivered:
            here, chunk.at = chunk.at, None  # unless an answer says so, nobody knows how much has arrived
            answer = await self._session.send("PUT", self._url, *chunk.request(here, self._size_bytes))
            if answer.status == _INCOMPLETE:
                chunk.at = self._persisted(answer, chunk)
                if chunk.at == here:
                    raise StorageError(f"{self._what}: the store takes no further bytes", retryable=True)
            elif answer.status in {200, 201} and chunk.whole_crc is not None:
                await self._session.compare(answer, self._size_bytes, chunk.whole_crc)
                return
            elif answer.status in {404, 410} and chunk.whole_crc is not None:
                # The session is over: perhaps the answer that said so was lost. The object tells.
                await self._look(chunk.whole_crc)
                return
            else:
                problem = self._session.explained(answer, f"{self._what}, bytes from {chunk.start}")
                if isinstance(problem, ObjectNotFoundError):
                    raise StorageError(f"{self._what}: the store has lost the upload session; save again")
                raise problem

    def _persisted(self, answer: Answer, chunk: _Chunk) -> int:
        stored = int(answer.headers.get("Range", "bytes=0--1").partition("=")[2].partition("-")[2]) + 1
        if not chunk.start <= stored <= chunk.end:
            raise StorageError(f"{self._what}: the store has {stored} bytes after {chunk.start}..{chunk.end} were sent")
        if stored == self._size_bytes:
            raise StorageError(f"{self._what}: the store has every byte and does not finish", retryable=True)
        return stored

    async def _look(self, crc: int) -> None:
        try:
            found = await self._session.stored()
        except ObjectNotFoundError as exc:
            raise StorageError(f"{self._what}: the store has lost the upload session; save again") from exc
        await self._session.compare(found, self._size_bytes, crc)


class _Chunk:
    """A part, and how far into it the store has come; None after a doubt."""

    def __init__(self, body: bytes, start: int, whole_crc: int | None) -> None:
        self.body = body
        self.start = start
        self.end = start + len(body)
        self.at: int | None = start
        #: The sum of the whole object; only the last chunk has one.
        self.whole_crc = whole_crc

    @property
    def delivered(self) -> bool:
        """Whether the store has all of it. The last chunk ends with the object's metadata instead."""
        return self.whole_crc is None and self.at == self.end

    def request(self, at: int | None, total: int) -> tuple[dict[str, str], bytes | None]:
        """Headers and body: the rest from ``at`` on, or the question how much has arrived."""
        if at is None:
            return {"Content-Range": f"bytes */{total}"}, None
        headers = {"Content-Range": f"bytes {at}-{self.end - 1}/{total}"}
        if self.whole_crc is not None:
            headers["X-Goog-Hash"] = f"crc32c={crc32c_b64(self.whole_crc)}"
        return headers, self.body[at - self.start :]
