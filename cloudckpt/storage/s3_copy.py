"""Objects that S3 copies by itself: in one request where they are small, in parts side by side where they are not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cloudckpt.errors import StorageError
from cloudckpt.storage.loop import Running
from cloudckpt.storage.multipart import Carried, UploadInParts
from cloudckpt.storage.remote import crc32c_b64
from cloudckpt.storage.s3_upload import Requests, S3Uploads

__all__ = ["StoreCopies"]

#: What a store copies within a few seconds, so that each request ends well within its time-out. (The API would take
#: 5 GiB in one request, and needs parts of 5 MiB at least.)
COPY_PART_BYTES = 256 * 1024 * 1024

#: How many parts are copied side by side; no byte of them passes here.
_AT_ONCE = 16


class StoreCopies:
    """The copy of one object.

    Args:
        requests: the way to the bucket that is written.
        uploads: the uploads of the object that is written.
        what: the copy in words, for messages.
        key: the whole key that is written.
        source: bucket and whole key that are read.
        size_bytes: of the object.
        checksum: its CRC-32C.
    """

    def __init__(
        self,
        requests: Requests,
        uploads: S3Uploads,
        *,
        what: str,
        key: str,
        source: Mapping[str, str],
        size_bytes: int,
        checksum: int,
    ) -> None:
        self._requests = requests
        self._uploads = uploads
        self._what = what
        self._key = key
        self._source = dict(source)
        self._size_bytes = size_bytes
        self._checksum = checksum

    def run(self) -> None:
        """Copy it.

        Raises:
            StorageError: the store refused, or says that other bytes arrived.
        """
        if self._size_bytes > COPY_PART_BYTES:
            UploadInParts(self._uploads, what=self._what).send_by(self._send)
            return
        answer = self._requests.request(
            "copy_object",
            self._what,
            checksum={"ChecksumAlgorithm": "CRC32C"},
            field="CopyObjectResult",
            Key=self._key,
            CopySource=self._source,
        ).result()
        told = str(answer.get("ChecksumCRC32C", ""))
        # A sum with a dash is one of parts' sums, which says nothing about the bytes laid end to end.
        if told and "-" not in told and told != crc32c_b64(self._checksum):
            raise StorageError(f"{self._what}: the store tells the checksum {told} of its copy: other bytes arrived")

    def _send(self, upload_id: str) -> list[Carried]:
        starts = range(0, self._size_bytes, COPY_PART_BYTES)
        running: dict[int, Running[Any]] = {}
        etags: list[str] = []
        try:
            for number, start in enumerate(starts, 1):
                if len(running) >= _AT_ONCE:
                    etags.append(_collected(running))
                running[number] = self._part(upload_id, number, start)
                running[number].begin()
            while running:
                etags.append(_collected(running))
        except BaseException:
            for task in running.values():
                task.cancel()
            raise
        # Nobody has summed the parts. Sums of zero join to nothing, so that the last one stands for the whole object,
        # which is what the store compares.
        sums = [0] * (len(etags) - 1) + [self._checksum]
        lengths = [min(COPY_PART_BYTES, self._size_bytes - start) for start in starts]
        return [Carried(*part) for part in zip(etags, sums, lengths, strict=True)]

    def _part(self, upload_id: str, number: int, start: int) -> Running[Any]:
        end = min(start + COPY_PART_BYTES, self._size_bytes) - 1
        return self._requests.request(
            "upload_part_copy",
            f"{self._what}, part {number}",
            checksum={},
            field="CopyPartResult",
            Key=self._key,
            UploadId=upload_id,
            PartNumber=number,
            CopySource=self._source,
            CopySourceRange=f"bytes={start}-{end}",
        )


def _collected(running: dict[int, Running[Any]]) -> str:
    """The ETag of the part that was begun first."""
    return str(running.pop(next(iter(running))).result()["ETag"])
