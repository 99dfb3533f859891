"""Uploads in parts by the S3 API, and the parts of one that the session's client sends itself, side by side."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from typing import Any, Protocol

import crc32c

from cloudckpt.errors import ObjectNotFoundError, StorageError
from cloudckpt.storage.loop import Running
from cloudckpt.storage.multipart import Carried
from cloudckpt.storage.remote import crc32c_b64

__all__ = ["ClientParts", "Requests", "S3Uploads"]


class Requests(Protocol):
    """How an upload speaks to its bucket: each call is tried again under the store's own deadline."""

    def request(
        self, method: str, what: str, *, checksum: dict[str, str], field: str = "", **arguments: Any
    ) -> Running[Any]:
        """A request that is not sent yet, for one field of the answer: ``begin`` sends it, ``result`` waits for it."""
        ...

    def abort_strays(self, key: str) -> None:
        """Abort every unfinished upload of a key."""
        ...


class S3Uploads:
    """The uploads of one object. See ``Uploads``.

    Args:
        requests: the way to the bucket.
        what: an upload in words, for messages.
        key: the whole key.
    """

    def __init__(self, requests: Requests, *, what: str, key: str) -> None:
        self._requests = requests
        self._what = what
        self._key = key

    def begin(self) -> Running[str]:
        """See ``Uploads.begin``."""
        checksum = {"ChecksumAlgorithm": "CRC32C", "ChecksumType": "FULL_OBJECT"}
        return self._request("create_multipart_upload", checksum=checksum, field="UploadId")

    def part(self, upload_id: str, number: int, body: bytes, crc: int) -> Running[str]:
        """The request that sends a part, not sent yet; it gives the part's ETag."""
        return self._requests.request(
            "upload_part",
            f"{self._what}, part {number}",
            checksum={"ChecksumAlgorithm": "CRC32C", "ChecksumCRC32C": crc32c_b64(crc)},
            field="ETag",
            Key=self._key,
            UploadId=upload_id,
            PartNumber=number,
            Body=body,
        )

    def complete(self, upload_id: str, parts: Sequence[Carried]) -> str:
        """See ``Uploads.complete``. The store compares the whole object's sum itself, and refuses other bytes."""
        named = [{"PartNumber": number, "ETag": part.etag} for number, part in enumerate(parts, 1)]
        whole = crc32c_b64(Carried.of(parts).crc32c)
        self._request(
            "complete_multipart_upload",
            checksum={"ChecksumCRC32C": whole, "ChecksumType": "FULL_OBJECT"},
            UploadId=upload_id,
            MultipartUpload={"Parts": named},
        ).result()
        return whole

    def has_become(self, whole: Carried) -> bool:
        """See ``Uploads.has_become``: by its size, which every server tells."""
        return int(self._request("head_object", field="ContentLength").result()) == whole.size_bytes

    def abort(self, upload_id: str) -> None:
        """See ``Uploads.abort``."""
        what = f"aborting: {self._what}"
        with contextlib.suppress(ObjectNotFoundError):
            self._requests.request(
                "abort_multipart_upload", what, checksum={}, Key=self._key, UploadId=upload_id
            ).result()

    def abort_strays(self) -> None:
        """See ``Uploads.abort_strays``."""
        self._requests.abort_strays(self._key)

    def _request(self, method: str, *, checksum: dict[str, str] | None = None, **arguments: Any) -> Running[Any]:
        return self._requests.request(method, self._what, checksum=checksum or {}, Key=self._key, **arguments)


class ClientParts:
    """Sends the parts of one upload through the client: equal ones (some stores want them equal), side by side.

    Args:
        uploads: the object's.
        what: the upload in words, for messages.
        size_bytes: of the object.
        at_once: how many parts are under way together.
    """

    def __init__(self, uploads: S3Uploads, *, what: str, size_bytes: int, at_once: int) -> None:
        self._uploads = uploads
        self._what = what
        self._size_bytes = size_bytes
        self._at_once = at_once
        self._running: dict[int, Running[str]] = {}
        self._etags: dict[int, str] = {}
        self._sums: list[tuple[int, int]] = []

    def send(self, upload_id: str, parts: Iterator[bytearray], progress: Callable[[int], None]) -> list[Carried]:
        """Send every part, or break off those that are under way and raise what went wrong.

        Raises:
            StorageError: the store refused, or the parts do not add up to the size.
            BaseException: whatever ``parts`` or ``progress`` raised, as it was.
        """
        sent = 0
        try:
            for number, part in enumerate(parts, 1):
                sent += len(part)
                if sent > self._size_bytes:
                    raise self._does_not_add_up(sent)
                self._start_part(upload_id, number, part)
                progress(len(part))
            if sent != self._size_bytes:
                raise self._does_not_add_up(sent)
            for number in [*self._running]:
                self._collect(number)
        except BaseException:
            for task in self._running.values():
                task.cancel()
            raise
        return [Carried(self._etags[number], *known) for number, known in enumerate(self._sums, 1)]

    def _does_not_add_up(self, sent: int) -> StorageError:
        return StorageError(f"{self._what}: {sent} bytes came, {self._size_bytes} were announced")

    def _start_part(self, upload_id: str, number: int, part: bytearray) -> None:
        while len(self._running) >= self._at_once:
            wait([task.ended for task in self._running.values()], return_when=FIRST_COMPLETED)
            for done in [n for n, task in self._running.items() if task.ended.done()]:
                self._collect(done)
        value = crc32c.crc32c(part)
        self._sums.append((value, len(part)))
        self._running[number] = self._uploads.part(upload_id, number, bytes(part), value)
        # Listed before it begins, so that whatever happens in between, it is among those that are broken off.
        self._running[number].begin()

    def _collect(self, number: int) -> None:
        self._etags[number] = self._running.pop(number).result()
