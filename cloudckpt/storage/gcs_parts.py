"""One upload in parts by the XML API: begun, carried by the lane, completed and compared, or aborted by any exit."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from cloudckpt.core.checksum import combine_all
from cloudckpt.errors import ObjectNotFoundError, StorageError
from cloudckpt.storage.gcs_errors import Answer
from cloudckpt.storage.gcs_xml import XmlUploads
from cloudckpt.storage.loop import CLEAN_UP_S

__all__ = ["Carried", "Stored", "UploadInParts"]


@dataclass(frozen=True, slots=True)
class Carried:
    """One part as the store has it.

    Attributes:
        etag: names it at the completion.
        crc32c: of its bytes.
        size_bytes: how many they are.
        told: the CRC-32C that the store found, in its own spelling; empty if it did not say.
    """

    etag: str
    crc32c: int
    size_bytes: int
    told: str


class Stored(Protocol):
    """How an upload looks at the object it has become."""

    def look(self) -> Answer:
        """Its metadata.

        Raises:
            ObjectNotFoundError: it is not there.
        """
        ...

    def fits(self, found: Answer, size_bytes: int, crc: int) -> bool:
        """Whether metadata are those of these bytes."""
        ...

    def check(self, told: str, size_bytes: int, crc: int) -> None:
        """Hold the checksum that the store told, or its metadata, against what was sent; take damage away again.

        Raises:
            StorageError: other bytes are there than were sent.
        """
        ...


class UploadInParts:
    """An object on its way.

    Args:
        uploads: the bucket's.
        stored: the object, once it is there.
        what: the upload in words, for messages.
        key: the whole key.
        content_type: what the object will be.
    """

    def __init__(self, uploads: XmlUploads, stored: Stored, *, what: str, key: str, content_type: str) -> None:
        self._uploads = uploads
        self._stored = stored
        self._what = what
        self._key = key
        self._content_type = content_type
        self._id = ""
        #: There may be uploads of this key whose ids nobody knows: a begin was broken off, or its answer lost.
        self._strays = False

    def send_by(self, carry: Callable[[str], Sequence[Carried]]) -> None:
        """Begin, let ``carry`` send every part under the upload's id, and complete; or abort.

        Raises:
            Declined: the store does not take uploads in parts; nothing was sent.
            StorageError: the store refused, or other bytes arrived than were sent.
            BaseException: whatever ``carry`` raised, as it was.
        """
        try:
            self._begin()
            carried = carry(self._id)
            told = self._complete(carried)
        except BaseException:
            self._abort()
            raise
        if self._strays:
            with contextlib.suppress(StorageError):
                self._uploads.abort_strays(self._key)
        if told is not None:
            self._stored.check(told, *_whole(carried))

    def _begin(self) -> None:
        begun = self._uploads.begin(self._what, self._key, self._content_type)
        try:
            self._id = begun.begin().ended.result()
        except BaseException:
            # Not broken off, so that what it has begun can be found and aborted.
            with contextlib.suppress(BaseException):
                self._id = begun.ended.result(CLEAN_UP_S)
            begun.cancel()
            self._strays = begun.attempts > 1 or not begun.ended.done()
            raise
        self._strays = begun.repeated

    def _complete(self, carried: Sequence[Carried]) -> str | None:
        """The checksum that the store told; None if the object was looked at already."""
        try:
            answer = self._uploads.complete(self._what, self._key, self._id, [part.etag for part in carried])
        except ObjectNotFoundError as exc:
            # No such upload: an earlier answer was lost, or somebody aborted it. The object tells which.
            try:
                found = self._stored.look()
            except ObjectNotFoundError:
                raise StorageError(f"{self._what}: the upload was aborted by somebody else; save again") from exc
            if not self._stored.fits(found, *_whole(carried)):
                raise StorageError(f"{self._what}: another object of this name is there") from exc
            return None
        return answer.told_crc32c

    def _abort(self) -> None:
        # The first error is the one to tell; a claim or gc aborts what is left.
        with contextlib.suppress(StorageError):
            if self._id:
                self._uploads.abort(f"aborting: {self._what}", self._key, self._id)
            if self._strays:
                self._uploads.abort_strays(self._key)


def _whole(carried: Sequence[Carried]) -> tuple[int, int]:
    """Size and sum of the parts laid end to end."""
    return sum(part.size_bytes for part in carried), combine_all((part.crc32c, part.size_bytes) for part in carried)
