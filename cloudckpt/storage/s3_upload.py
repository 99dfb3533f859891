"""One multipart upload: parts side by side, each tried again, and aborted by whatever ends it early."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from dataclasses import dataclass
from typing import Any, Protocol

import crc32c

from cloudckpt.core.checksum import combine_all
from cloudckpt.errors import ObjectNotFoundError, StorageError
from cloudckpt.storage.loop import CLEAN_UP_S, Running
from cloudckpt.storage.remote import crc32c_b64

__all__ = ["Carried", "MultipartUpload", "Requests"]


@dataclass(frozen=True, slots=True)
class Carried:
    """One part as the store has it."""

    etag: str
    crc32c: int
    size_bytes: int


class Requests(Protocol):
    """How an upload speaks to its bucket: each call is tried again under the store's own deadline."""

    def request(self, method: str, what: str, *, checksum: dict[str, str], **arguments: Any) -> Running[Any]:
        """A request that is not sent yet: ``begin`` sends it beside the caller, ``result`` waits for it."""
        ...

    def abort_strays(self, key: str) -> None:
        """Abort every unfinished upload of a key."""
        ...


class MultipartUpload:
    """An object on its way, in equal parts (some stores want them equal).

    Args:
        requests: the way to the bucket.
        what: the upload in words, for messages.
        key: the whole key.
        size_bytes: of the object.
        at_once: how many parts are under way together.
    """

    def __init__(self, requests: Requests, *, what: str, key: str, size_bytes: int, at_once: int) -> None:
        self._requests = requests
        self._what = what
        self._key = key
        self._size_bytes = size_bytes
        self._at_once = at_once
        self._id = ""
        #: There may be uploads of this key whose ids nobody knows: a begin was broken off, or its answer lost.
        self._strays = False
        self._running: dict[int, Running[Any]] = {}
        self._etags: dict[int, str] = {}
        self._sums: list[tuple[int, int]] = []

    def send(self, parts: Iterator[bytearray], progress: Callable[[int], None]) -> None:
        """Send every part and complete, or abort and raise what went wrong.

        Raises:
            StorageError: the store refused, or the parts do not add up to the size.
            BaseException: whatever ``parts`` or ``progress`` raised, as it was.
        """
        self._whole(lambda: self._send_each(parts, progress))

    def send_by(self, carry: Callable[[str], Sequence[Carried]]) -> None:
        """As ``send``, where ``carry`` is given the upload's id, sends every part itself and returns them in order."""
        self._whole(lambda: self._note(carry(self._id)))

    def _note(self, carried: Sequence[Carried]) -> None:
        self._etags = {number: part.etag for number, part in enumerate(carried, 1)}
        self._sums = [(part.crc32c, part.size_bytes) for part in carried]

    def _send_each(self, parts: Iterator[bytearray], progress: Callable[[int], None]) -> None:
        sent = 0
        for number, part in enumerate(parts, 1):
            sent += len(part)
            if sent > self._size_bytes:
                raise self._does_not_add_up(sent)
            self._start_part(number, part)
            progress(len(part))
        if sent != self._size_bytes:
            raise self._does_not_add_up(sent)
        for number in [*self._running]:
            self._collect(number)

    def _whole(self, send: Callable[[], None]) -> None:
        try:
            self._begin()
            send()
            self._complete()
        except BaseException:
            self._abort()
            raise
        if self._strays:
            with contextlib.suppress(StorageError):
                self._requests.abort_strays(self._key)

    def _does_not_add_up(self, sent: int) -> StorageError:
        return StorageError(f"{self._what}: {sent} bytes came, {self._size_bytes} were announced")

    def _ask(self, method: str, what: str, *, checksum: dict[str, str], **arguments: Any) -> Any:
        return self._requests.request(method, what, checksum=checksum, Key=self._key, **arguments).result()

    def _begin(self) -> None:
        checksum = {"ChecksumAlgorithm": "CRC32C", "ChecksumType": "FULL_OBJECT"}
        self._strays = True
        begun = self._requests.request("create_multipart_upload", self._what, checksum=checksum, Key=self._key)
        try:
            answer = begun.begin().ended.result()
        except BaseException:
            # Not broken off, so that what it has begun can be found and aborted.
            with contextlib.suppress(BaseException):
                begun.ended.exception(CLEAN_UP_S)
            begun.cancel()
            raise
        self._id = str(answer["UploadId"])
        self._strays = begun.repeated

    def _start_part(self, number: int, part: bytearray) -> None:
        while len(self._running) >= self._at_once:
            wait([task.ended for task in self._running.values()], return_when=FIRST_COMPLETED)
            for done in [n for n, task in self._running.items() if task.ended.done()]:
                self._collect(done)
        value = crc32c.crc32c(part)
        self._sums.append((value, len(part)))
        self._running[number] = self._requests.request(
            "upload_part",
            f"{self._what}, part {number}",
            checksum={"ChecksumAlgorithm": "CRC32C", "ChecksumCRC32C": crc32c_b64(value)},
            Key=self._key,
            UploadId=self._id,
            PartNumber=number,
            Body=bytes(part),
        )
        # Listed before it begins, so that whatever happens in between, it is among those that are broken off.
        self._running[number].begin()

    def _collect(self, number: int) -> None:
        self._etags[number] = str(self._running.pop(number).result()["ETag"])

    def _complete(self) -> None:
        parts = [{"PartNumber": number, "ETag": self._etags[number]} for number in sorted(self._etags)]
        checksum = {"ChecksumCRC32C": crc32c_b64(combine_all(self._sums)), "ChecksumType": "FULL_OBJECT"}
        try:
            self._ask(
                "complete_multipart_upload",
                self._what,
                checksum=checksum,
                UploadId=self._id,
                MultipartUpload={"Parts": parts},
            )
        except ObjectNotFoundError as exc:
            # No such upload: an earlier answer was lost, or somebody aborted it. The object tells which.
            try:
                answer = self._ask("head_object", self._what, checksum={})
            except ObjectNotFoundError:
                raise StorageError(f"{self._what}: the upload was aborted by somebody else") from exc
            if int(answer["ContentLength"]) != self._size_bytes:
                raise StorageError(f"{self._what}: another object of this name is there") from exc

    def _abort(self) -> None:
        for task in self._running.values():
            task.cancel()
        # The first error is the one to tell; a claim or gc aborts what is left.
        with contextlib.suppress(StorageError):
            if self._id:
                with contextlib.suppress(ObjectNotFoundError):
                    self._ask("abort_multipart_upload", f"aborting: {self._what}", checksum={}, UploadId=self._id)
            if self._strays:
                self._requests.abort_strays(self._key)
