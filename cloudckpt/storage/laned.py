"""A remote storage whose payload goes over a direct lane, and through the filesystem's session where that declines."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from cloudckpt.errors import StorageError
from cloudckpt.storage.base import Buffer, Source
from cloudckpt.storage.direct import Declined
from cloudckpt.storage.lane import Lane
from cloudckpt.storage.multipart import Carried, UploadInParts, Uploads
from cloudckpt.storage.remote import RemoteStorage

__all__ = ["LanedStorage"]

#: The id of no upload.
_NO_UPLOAD = "cloudckpt-no-such-upload"


class _Enough(Exception):  # noqa: N818 - nothing is wrong
    """Ends an upload before its first part."""


class LanedStorage(RemoteStorage):
    """Two ways for payload: the lane's, and ``RemoteStorage``'s own."""

    #: Set by the session's constructor.
    _lane: Lane[Any, Any]

    def put(
        self, key: str, buffers: Iterable[Buffer], *, size_bytes: int, progress: Callable[[int], None] | None = None
    ) -> None:
        """See ``Storage.put``: a ``Source`` goes over the direct lane, anything else by the session."""
        if isinstance(buffers, Source) and size_bytes and buffers.size_bytes == size_bytes:
            try:
                self._lane.check_uploads()
                is_whole = size_bytes <= self._lane.part_bytes(buffers)
                if is_whole and progress is not None:
                    # Once, whoever carries it, and before the object becomes visible: the caller may end it all here.
                    progress(size_bytes)
                    progress = None
                self._put_directly(key, buffers, progress or (lambda _: None), is_whole=is_whole)
            except Declined as exc:
                self._lane.decline_uploads(exc)
            else:
                return
        try:
            super().put(key, buffers, size_bytes=size_bytes, progress=progress)
        except StorageError:
            self._lane.reconsider_uploads()
            raise

    def _put_directly(self, key: str, source: Source, progress: Callable[[int], None], *, is_whole: bool) -> None:
        what, whole_key = self._named("writing", key), self._key(key)
        if is_whole:
            carried = self._lane.send_whole(what, whole_key, source)
        else:
            carried = UploadInParts(self._uploads_of(key), what=what).send_by(
                lambda upload_id: self._lane.send_parts(what, whole_key, source, progress, upload_id=upload_id)
            )
        self._check_stored(key, carried)

    @abstractmethod
    def _uploads_of(self, key: str) -> Uploads:
        """The uploads in parts of one object."""

    @abstractmethod
    def _check_stored(self, key: str, carried: Carried) -> None:
        """Hold what the store tells of an object against what was sent, where it has not done so itself.

        Raises:
            StorageError: other bytes are there; they were taken away again.
        """

    def try_upload(self, key: str) -> None:
        """Begin an upload in parts and abort it at once: nothing becomes visible. Tells whether that is permitted.

        Raises:
            StorageError: the store refused to begin, or takes no uploads in parts.
        """
        what = self._named("beginning an upload of", key)

        def stop(_: str) -> Sequence[Carried]:
            raise _Enough

        try:
            UploadInParts(self._uploads_of(key), what=what).send_by(stop)
        except _Enough:
            return
        except Declined as exc:
            raise StorageError(self._secrets.hide(f"{what}: {exc}")) from self._secrets.clean(exc)

    def try_abort(self, key: str) -> None:
        """Abort an upload that cannot be. Tells whether aborting is permitted: an unknown upload is aborted already.

        Raises:
            StorageError: the store refused.
        """
        self._uploads_of(key).abort(_NO_UPLOAD)

    def read_into(self, key: str, start: int, *targets: memoryview) -> None:
        """See ``Storage.read_into``: one ranged GET over the direct lane, or by the session where it declines."""
        if any(map(len, targets)):
            try:
                self._lane.receive(self._named("reading", key), self._key(key), start, targets)
            except Declined as exc:
                self._lane.decline(exc)
            else:
                return
        try:
            super().read_into(key, start, *targets)
        except StorageError:
            self._lane.reconsider()
            raise

    @property
    def reads_at_once(self) -> int:
        """See ``Paced.reads_at_once``."""
        return self._settings.io_threads if self._lane.declined is not None else self._lane.worthwhile

    def close(self) -> None:
        """See ``Storage.close``."""
        self._lane.close()
        super().close()
