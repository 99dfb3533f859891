"""One upload in parts, at whatever store: begun, carried, completed, and aborted by any exit.

Parts that are neither completed nor aborted are billed and invisible. So every way out of here ends the upload, and
whatever a lost answer may have begun is looked for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from cloudckpt.core.checksum import combine_all
from cloudckpt.errors import ObjectNotFoundError, StorageError
from cloudckpt.storage.direct import Declined
from cloudckpt.storage.loop import CLEAN_UP_S, Running
from cloudckpt.storage.remote import crc32c_b64

__all__ = ["Carried", "UploadInParts", "Uploads"]


@dataclass(frozen=True, slots=True)
class Carried:
    """A part, or a whole object, as the store has it.

    Attributes:
        etag: names a part at the completion.
        crc32c: of its bytes.
        size_bytes: how many they are.
        told: the CRC-32C that the store has found itself, as ``crc32c_b64`` spells it; empty if it did not say.
    """

    etag: str
    crc32c: int
    size_bytes: int
    told: str = ""

    @classmethod
    def of(cls, parts: Iterable[Carried]) -> Carried:
        """The object that these parts make, laid end to end. Nobody has told its ETag or its sum yet."""
        found = [(part.crc32c, part.size_bytes) for part in parts]
        return cls("", combine_all(found), sum(size for _, size in found))


class Uploads(Protocol):
    """The uploads of one object. Each call is tried again under the store's deadline."""

    def begin(self) -> Running[str]:
        """The request that opens an upload, not sent yet; it gives the upload's id, and counts its attempts.

        Raises:
            Declined: by the request: the store takes no uploads in parts.
        """
        ...

    def complete(self, upload_id: str, parts: Sequence[Carried]) -> str:
        """Make the object of its parts, in order; the sum that the store tells of it, or nothing.

        Raises:
            ObjectNotFoundError: there is no such upload (any more).
        """
        ...

    def has_become(self, whole: Carried) -> bool:
        """Whether the object that is there is this one, by all that the store tells of it.

        Raises:
            ObjectNotFoundError: there is no object.
        """
        ...

    def abort(self, upload_id: str) -> None:
        """Give an upload up; one that has ended meanwhile is given up already."""
        ...

    def abort_strays(self) -> None:
        """Give up every unfinished upload of this very key."""
        ...


class UploadInParts:
    """An object on its way.

    Args:
        uploads: the object's, at its store.
        what: the upload in words, for messages.
    """

    def __init__(self, uploads: Uploads, *, what: str) -> None:
        self._uploads = uploads
        self._what = what
        self._id = ""
        #: There may be uploads of this key whose ids nobody knows: a begin was broken off, or its answer lost.
        self._strays = False

    def send_by(self, carry: Callable[[str], Sequence[Carried]]) -> Carried:
        """Begin, let ``carry`` send every part under the upload's id and give them in order, and complete; or abort.

        Raises:
            Declined: the store does not take uploads in parts; nothing was sent.
            StorageError: the store refused.
            BaseException: whatever ``carry`` raised, as it was.
        """
        try:
            self._begin()
            whole = self._complete(carry(self._id))
        except BaseException:
            self._abort()
            raise
        if self._strays:
            with contextlib.suppress(StorageError, Declined):
                self._uploads.abort_strays()
        return whole

    def _begin(self) -> None:
        begun = self._uploads.begin()
        try:
            self._id = begun.begin().ended.result()
        except BaseException:
            # Not broken off at once, so that what it has begun can be aborted by its id.
            with contextlib.suppress(BaseException):
                self._id = begun.ended.result(CLEAN_UP_S)
            begun.cancel()
            self._strays = begun.repeated or not (self._id or _was_refused(begun))
            raise
        self._strays = begun.repeated

    def _complete(self, parts: Sequence[Carried]) -> Carried:
        whole = Carried.of(parts)
        try:
            told = self._uploads.complete(self._id, parts)
        except ObjectNotFoundError as exc:
            # No such upload: an earlier answer was lost, or somebody aborted it. The object tells which.
            try:
                is_ours = self._uploads.has_become(whole)
            except ObjectNotFoundError:
                raise StorageError(f"{self._what}: the upload was aborted by somebody else; save again") from exc
            if not is_ours:
                raise StorageError(f"{self._what}: another object of this name is there") from exc
            told = crc32c_b64(whole.crc32c)
        return Carried("", whole.crc32c, whole.size_bytes, told)

    def _abort(self) -> None:
        # The first error is the one to tell; a claim or gc aborts what is left.
        with contextlib.suppress(StorageError, Declined):
            if self._id:
                self._uploads.abort(self._id)
            if self._strays:
                self._uploads.abort_strays()


def _was_refused(begun: Running[Any]) -> bool:
    """Whether the store has answered that it opens no upload. No answer, or half of one, is no such proof."""
    error = begun.ended.exception() if begun.ended.done() else None
    return isinstance(error, Declined) or (isinstance(error, StorageError) and not error.retryable)
