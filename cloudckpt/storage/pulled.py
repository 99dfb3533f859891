"""A folder that ``pull`` made, or a checkpoint's folder inside a local run, as a run of one checkpoint to be read.

It has an index and payload objects and no manifest; one is made up from the index, so that everything that reads a
run reads it as well: listing, verifying, loading, exporting, copying it into a run.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from cloudckpt.core import keys
from cloudckpt.core.index_json import INDEX_LIMIT_BYTES, decode_index, index_digest
from cloudckpt.core.manifest import recompute
from cloudckpt.core.manifest_json import encode_manifest, entry_from_bytes, entry_to_bytes
from cloudckpt.core.model import Checkpoint, Index, Manifest, State
from cloudckpt.errors import FormatError, ObjectNotFoundError, StorageError
from cloudckpt.storage.base import Buffer, Conditions, Listed, Outcome, Unknown, Versioned
from cloudckpt.storage.local import LocalStorage

__all__ = ["PULLED_NAME", "PulledFolder", "is_pulled", "pulled_note", "read_note"]

#: Beside the index: the manifest's entry when it was pulled (tags and metrics that came after the save).
PULLED_NAME = "pulled.json"

_NOTE_LIMIT_BYTES = 16 * 1024 * 1024
_WRITE_ID = "0" * 16


def is_pulled(folder: str) -> bool:
    """Whether a folder holds one checkpoint, and no run. What may not be looked at holds neither."""
    index, manifest = os.path.join(folder, keys.INDEX_NAME), os.path.join(folder, keys.MANIFEST)  # noqa: PTH118 - see below
    # Unlike Path's own, these are silent about what this user may not look at: whoever opens the folder tells it.
    return os.path.isfile(index) and not os.path.lexists(manifest)  # noqa: PTH113 - the same


def pulled_note(checkpoint: Checkpoint) -> bytes:
    """What ``PULLED_NAME`` holds."""
    return entry_to_bytes(checkpoint)


def read_note(body: bytes) -> Checkpoint | None:
    """The entry in ``body``; None where it is none."""
    try:
        return entry_from_bytes(body)
    except FormatError:
        return None


class PulledFolder:
    """A storage that can only be read: the one checkpoint in a folder, under the keys that it would have in a run.

    Args:
        folder: holds ``checkpoint.json``.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.conditions = Conditions.HONOURED
        self._inner = LocalStorage(folder)
        self._prefix: str | None = None

    def __repr__(self) -> str:
        return f"<PulledFolder {self.url}>"

    @property
    def url(self) -> str:
        """The folder's absolute path."""
        return self._inner.url

    def read(self, key: str, *, limit_bytes: int) -> Versioned:
        """See ``Storage.read``. The manifest is made up.

        Raises:
            FormatError: the folder's ``checkpoint.json`` is not an index of ours.
        """
        if key == keys.MANIFEST:
            return Versioned(self._manifest(), "pulled")
        return self._inner.read(self._name(key), limit_bytes=limit_bytes)

    def _index(self) -> tuple[bytes, Index]:
        body = self._inner.read(keys.INDEX_NAME, limit_bytes=INDEX_LIMIT_BYTES).body
        return body, decode_index(body, what=f"{self.url}/{keys.INDEX_NAME}")

    def _manifest(self) -> bytes:
        body, index = self._index()
        sealed = Checkpoint(
            id=index.id,
            step=index.step,
            seq=index.seq,
            state=State.COMMITTED,
            writer_epoch=index.writer_epoch,
            announced_at=index.announced_at,
            committed_at=index.sealed_at,
            metrics=index.metrics,
            size_bytes=sum(item.size_bytes for item in index.objects) + len(body),
            object_count=len(index.objects) + 1,
            world_size=index.world_size,
            tags=index.tags,
            pinned=index.pinned,
            index_digest=index_digest(body),
        )
        manifest = Manifest(
            run_id=index.run_id,
            revision=1,
            write_id=_WRITE_ID,
            history=(_WRITE_ID,),
            writer_epoch=index.writer_epoch,
            next_seq=index.seq + 1,
            commits=1,
            policy=index.policy,
            entries=(self._as_pulled(sealed),),
            updated_at=index.sealed_at,
        )
        return encode_manifest(recompute(manifest))

    def _as_pulled(self, sealed: Checkpoint) -> Checkpoint:
        """The entry with what the run knew of it when it was pulled."""
        try:
            noted = read_note(self._inner.read(PULLED_NAME, limit_bytes=_NOTE_LIMIT_BYTES).body)
        except ObjectNotFoundError:
            return sealed
        if noted is None or (noted.id, noted.index_digest) != (sealed.id, sealed.index_digest):
            return sealed
        return replace(
            sealed,
            committed_at=noted.committed_at or sealed.committed_at,
            metrics=noted.metrics,
            tags=noted.tags,
            pinned=noted.pinned,
            marks=noted.marks,
        )

    def _name(self, key: str) -> str:
        """Where the object of a key lies in the folder."""
        if self._prefix is None:
            _, index = self._index()
            self._prefix = keys.checkpoint_prefix(index.step, index.id)
        folder, _, name = key.rpartition("/")
        if folder != self._prefix:
            raise ObjectNotFoundError(f"{self.url} holds {self._prefix} alone, and no {key}")
        return name

    def create(self, key: str, body: bytes) -> Outcome:  # noqa: ARG002 - the verb's shape
        """See ``Storage.create``: refused."""
        return Unknown(self._refusal())

    def replace(self, key: str, body: bytes, *, expecting: str) -> Outcome:  # noqa: ARG002 - the same
        """See ``Storage.replace``: refused."""
        return Unknown(self._refusal())

    def put(
        self,
        key: str,  # noqa: ARG002 - the same
        buffers: Iterable[Buffer],  # noqa: ARG002 - the same
        *,
        size_bytes: int,  # noqa: ARG002 - the same
        progress: Callable[[int], None] | None = None,  # noqa: ARG002 - the same
    ) -> None:
        """See ``Storage.put``: refused."""
        raise self._refusal()

    def _refusal(self) -> StorageError:
        return StorageError(
            f"{self.url} is one checkpoint that was pulled: it can be read, and nothing is written into it. To go on "
            f"from it, bring it into a run: cloudckpt import {self.url} ROOT"
        )

    def read_into(self, key: str, start: int, *targets: memoryview) -> None:
        """See ``Storage.read_into``."""
        self._inner.read_into(self._name(key), start, *targets)

    def size(self, key: str) -> int:
        """See ``Storage.size``."""
        return self._inner.size(self._name(key))

    def list(self, prefix: str = "", *, limit: int | None = None) -> Iterator[Listed]:
        """See ``Storage.list``: the checkpoint's own objects."""
        _, index = self._index()
        folder = keys.checkpoint_prefix(index.step, index.id)
        known = {keys.INDEX_NAME, *(item.name for item in index.objects)}
        found = [Listed(f"{folder}/{item.key}", item.size_bytes) for item in self._inner.list("") if item.key in known]
        return iter([item for item in found if item.key.startswith(prefix)][:limit])

    def delete(self, keys: Iterable[str]) -> dict[str, StorageError]:
        """See ``Storage.delete``: refused."""
        return {key: self._refusal() for key in keys}

    def abort_uploads(
        self,
        prefix: str,  # noqa: ARG002 - the verb's shape
        *,
        spare: Callable[[str], bool] = lambda _: False,  # noqa: ARG002 - the same
    ) -> int:
        """See ``Storage.abort_uploads``."""
        return 0

    def close(self) -> None:
        """See ``Storage.close``."""
