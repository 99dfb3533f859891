"""Resumable uploads, by the rules of "Resumable uploads" in the documentation."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import quote

from cloudckpt.testing.fake_gcs.answers import Answer, RefusedError, invalid
from cloudckpt.testing.fake_gcs.json_api import json_object
from cloudckpt.testing.fake_gcs.objects import Conditions, Sum, claims, name_of
from cloudckpt.testing.fake_gcs.requests import Asked, Operation
from cloudckpt.testing.fake_gcs.store import Store

__all__ = ["ResumableUploads"]

#: "The chunk size must be a multiple of 256 KiB, unless it's the last chunk" ("Resumable uploads").
_CHUNK: Final = 256 * 1024
_CONTENT_RANGE: Final = re.compile(r"bytes (?:(\d{1,18})-(\d{1,18})|\*)/(\d{1,18}|\*)", re.ASCII)


@dataclass(slots=True)
class _Upload:
    """A resumable upload.

    ``ended`` is how it ended; every later request gets the same answer.
    """

    bucket: str
    name: str
    metadata: Mapping[str, object]
    conditions: Conditions
    total: int | None
    data: bytearray = field(default_factory=bytearray)
    sums: Sum = field(default_factory=Sum)
    ended: Answer | None = None

    def agreed(self, announced: str) -> int | None:
        """How large the object will be. It may be said late, but not changed."""
        if announced == "*":
            return self.total
        total = int(announced)
        if self.total not in {None, total} or total < len(self.data):
            raise invalid(f"{len(self.data)} of {self.total} bytes are stored, and now it shall be {total}.")
        return total

    def persisted(self) -> Answer:
        """How much has arrived, in the words of "Resume Incomplete"."""
        known = {"Range": f"bytes=0-{len(self.data) - 1}"} if self.data else {}
        return Answer(308, headers=known)

    def end(self, answer: Answer) -> None:
        """Every later request gets this answer."""
        self.ended = answer
        self.data = bytearray()  # not cleared: it may have become an object's


class ResumableUploads:
    """Sessions. Whoever calls holds the lock of ``FakeGCS``."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.uploads: dict[str, _Upload] = {}
        self.verbs: dict[Operation, Callable[[Asked], Answer]] = {
            "resumable-start": self._start,
            "resumable-chunk": self._chunk,
            "resumable-query": self._query,
            "resumable-cancel": self._cancel,
        }

    def _start(self, asked: Asked) -> Answer:
        bucket = self._store.bucket(asked.bucket)
        metadata = json_object(asked.body) if asked.body.strip() else {}
        asked.name = name = name_of(asked.query, metadata)
        self._store.permit("storage.objects.create")
        conditions = Conditions.of(asked.query)
        found = bucket.live.get(name)
        conditions.check(found)
        if found is not None:
            self._store.permit("storage.objects.delete")
        metadata = {"contentType": asked.headers.get("X-Upload-Content-Type"), **metadata}
        size = asked.headers.get("X-Upload-Content-Length", "*")
        if size != "*" and not (size.isascii() and size.isdecimal()):
            raise invalid(f"Invalid value for X-Upload-Content-Length: {size}.")
        upload_id = secrets.token_urlsafe(48)
        self.uploads[upload_id] = _Upload(
            bucket.name, name, metadata, conditions, total=None if size == "*" else int(size)
        )
        where = f"{asked.base}/upload/storage/v1/b/{quote(bucket.name, safe='')}/o"
        location = f"{where}?uploadType=resumable&upload_id={upload_id}"
        return Answer(200, headers={"Location": location, "X-GUploader-UploadID": upload_id})

    def _upload(self, asked: Asked) -> _Upload:
        found = self.uploads.get(asked.upload_id or "")
        if found is None:
            raise RefusedError(404, "notFound", "The upload session does not exist.")
        asked.name = found.name
        return found

    def _chunk(self, asked: Asked) -> Answer:
        upload = self._upload(asked)
        if upload.ended is not None:
            return upload.ended
        given = asked.headers.get("Content-Range")
        if given is None:  # the whole object in one request
            return self._take(asked, upload, 0, upload.agreed(str(len(asked.body)) if asked.whole else "*"))
        found = _CONTENT_RANGE.fullmatch(given)
        if found is None:
            raise invalid(f'Failed to parse Content-Range header "{given}".')
        start, end, total = int(found[1]), int(found[2]) + 1, upload.agreed(found[3])
        if end <= start or (asked.whole and len(asked.body) != end - start):
            raise invalid(f"Content-Range is {given}, and {len(asked.body)} bytes came.")
        if total is not None and end > total:
            raise invalid(f"Content-Range is {given}, beyond the {total} bytes of the object.")
        if end != total and (end - start) % _CHUNK:
            raise invalid(f"Only the last chunk may have a size that is no multiple of {_CHUNK} bytes.")
        return self._take(asked, upload, start, total)

    def _take(self, asked: Asked, upload: _Upload, start: int, total: int | None) -> Answer:
        stored = len(upload.data)
        if start > stored:
            raise RefusedError(503, "backendError", f"Bytes from {start} on came, and {stored} are stored.")
        view = memoryview(asked.body)
        if not asked.whole:
            # What came before the connection broke is kept, in whole steps.
            view = view[: max((start + len(view)) // _CHUNK * _CHUNK - start, 0)]
        # "Cloud Storage ignores any bytes you send at an offset that Cloud Storage has already persisted."
        fresh = view[stored - start :]
        upload.data += fresh
        upload.sums.add(fresh)
        upload.total = total
        complete = asked.whole and len(upload.data) == total
        return self._finish(asked, upload) if complete else upload.persisted()

    def _query(self, asked: Asked) -> Answer:
        upload = self._upload(asked)
        if upload.ended is not None:
            return upload.ended
        given = asked.headers["Content-Range"]
        found = _CONTENT_RANGE.fullmatch(given)
        if found is None or asked.body:
            raise invalid(f'Failed to parse Content-Range header "{given}" of {len(asked.body)} bytes.')
        upload.total = upload.agreed(found[3])
        return self._finish(asked, upload) if len(upload.data) == upload.total else upload.persisted()

    def _finish(self, asked: Asked, upload: _Upload) -> Answer:
        """Make the object of an upload that has every byte."""
        try:
            bucket = self._store.bucket(upload.bucket)
            upload.sums.check(claims(upload.metadata, asked.headers))
            stored = self._store.write(
                bucket,
                upload.name,
                upload.data,
                sums=upload.sums,
                metadata=upload.metadata,
                conditions=upload.conditions,
            )
        except RefusedError as exc:
            if exc.status in {400, 412}:  # no repetition can help
                upload.end(exc.answer())
            raise
        answer = Answer.json(stored.described(), headers={"ETag": stored.etag})
        upload.end(answer)
        return answer

    def _cancel(self, asked: Asked) -> Answer:
        upload = self._upload(asked)
        if upload.ended is not None:
            raise _gone()
        upload.end(_gone().answer())
        return Answer(499)


def _gone() -> RefusedError:
    return RefusedError(410, "gone", "The upload session is over.")
