"""Is what was sealed still there? What the store itself says of each object; ``deep`` reads every byte as well."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import crc32c

from cloudckpt.core import keys
from cloudckpt.core.checksum import format_crc32c
from cloudckpt.core.model import Checkpoint, Chunk, Index, PayloadObject
from cloudckpt.errors import CheckpointNotFoundError, CorruptCheckpointError, ObjectNotFoundError
from cloudckpt.storage import Attested, Attesting, ManifestStore, Storage
from cloudckpt.view import RunView, read_index

__all__ = ["Finding", "VerifyReport", "verify_run"]

_BLOCK_BYTES = 8 * 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that is not as it was sealed. ``start`` and ``length`` where only some bytes are damaged."""

    checkpoint: Checkpoint
    key: str
    problem: str
    start: int | None = None
    length: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """What was looked at and what was found.

    Attributes:
        checkpoints: what was looked at.
        findings: what is not as it was sealed.
        deep: whether every byte was read.
        bytes_read: 0 unless ``deep``, or where the store keeps another checksum than the index.
        objects: payload objects that were asked for.
        attested: those of which the store keeps a checksum of its own, and it is the right one: they were not read.
    """

    checkpoints: tuple[Checkpoint, ...]
    findings: tuple[Finding, ...]
    deep: bool
    bytes_read: int
    objects: int = 0
    attested: int = 0

    @property
    def ok(self) -> bool:
        """Whether nothing was found."""
        return not self.findings


@dataclass(slots=True)
class _Look:
    """What has been found so far."""

    findings: list[Finding]
    bytes_read: int = 0
    objects: int = 0
    attested: int = 0


def verify_run(store: ManifestStore, select: str | int | None = None, *, deep: bool = False) -> VerifyReport:
    """Check one committed checkpoint, or all of them. Changes nothing.

    One request an object: its size, and the checksum that the store keeps of it, where it keeps one (S3 since it has
    whole-object checksums, Google Cloud Storage always). Neither is downloaded; only what differs is read as well.

    Args:
        select: a selector; None for every committed checkpoint.
        deep: read every payload byte and compare checksums.

    Raises:
        CheckpointNotFoundError: the selector means nothing, or there is no run.
        StorageError: the store refused.
    """
    view = RunView(store)
    view.manifest()
    checkpoints = view.checkpoints() if select is None else (view.select(select),)
    look = _Look([])
    for checkpoint in checkpoints:
        before = len(look.findings)
        _verify_one(store.storage, checkpoint, look, deep=deep)
        if len(look.findings) > before and not _still_committed(view, checkpoint):
            del look.findings[before:]  # retired while it was being looked at
    return VerifyReport(
        checkpoints=checkpoints,
        findings=tuple(look.findings),
        deep=deep,
        bytes_read=look.bytes_read,
        objects=look.objects,
        attested=look.attested,
    )


def _still_committed(view: RunView, checkpoint: Checkpoint) -> bool:
    try:
        return view.select(checkpoint.name).id == checkpoint.id
    except CheckpointNotFoundError:
        return False


def _verify_one(storage: Storage, checkpoint: Checkpoint, look: _Look, *, deep: bool) -> None:
    index_key = keys.index_key(checkpoint.step, checkpoint.id)
    try:
        index = read_index(storage, checkpoint)
    except CorruptCheckpointError as exc:
        look.findings.append(Finding(checkpoint=checkpoint, key=index_key, problem=str(exc)))
        return
    for item in index.objects:
        key = keys.payload_key(checkpoint.step, checkpoint.id, item.name)
        look.objects += 1
        try:
            told = _told(storage, key)
        except ObjectNotFoundError:
            look.findings.append(Finding(checkpoint=checkpoint, key=key, problem="missing"))
            continue
        look.attested += told.crc32c == item.crc32c
        if told.size_bytes != item.size_bytes:
            problem = f"has {told.size_bytes} bytes, sealed with {item.size_bytes}"
            look.findings.append(Finding(checkpoint=checkpoint, key=key, problem=problem))
        elif deep or told.crc32c not in {None, item.crc32c}:
            # Where the store keeps another sum, the bytes say what is wrong, and whether anything is.
            look.findings += _verify_bytes(storage, checkpoint, index, item, key)
            look.bytes_read += told.size_bytes


def _told(storage: Storage, key: str) -> Attested:
    """What the store says of an object, in one request."""
    return storage.attest(key) if isinstance(storage, Attesting) else Attested(storage.size(key), None)


def _verify_bytes(
    storage: Storage, checkpoint: Checkpoint, index: Index, item: PayloadObject, key: str
) -> Iterator[Finding]:
    found = _sum(storage, key, 0, item.size_bytes)
    if found == item.crc32c:
        return
    named = list(_damaged_chunks(storage, key, _chunks(index, item.name)))
    for name, chunk, value in named:
        yield Finding(
            checkpoint=checkpoint,
            key=key,
            problem=f"{name}: checksum {format_crc32c(value)}, sealed as {format_crc32c(chunk.crc32c)}",
            start=chunk.start,
            length=chunk.length,
        )
    # Bytes can change on the way as well: what lies in the store like that is found like that again.
    if not named and (found := _sum(storage, key, 0, item.size_bytes)) != item.crc32c:
        yield Finding(
            checkpoint=checkpoint,
            key=key,
            problem=f"checksum {format_crc32c(found)}, sealed as {format_crc32c(item.crc32c)}; no tensor is affected",
        )


def _chunks(index: Index, name: str) -> Iterator[tuple[str, Chunk]]:
    for component, tensors in index.tensors.items():
        for tensor_name, tensor in tensors.items():
            for chunk in tensor.chunks:
                if chunk.object == name:
                    yield f"{component}.{tensor_name}", chunk


def _damaged_chunks(
    storage: Storage, key: str, chunks: Iterable[tuple[str, Chunk]]
) -> Iterator[tuple[str, Chunk, int]]:
    for name, chunk in chunks:
        found = _sum(storage, key, chunk.start, chunk.length)
        if found != chunk.crc32c:
            found = _sum(storage, key, chunk.start, chunk.length)  # the same: one look is no proof
        if found != chunk.crc32c:
            yield name, chunk, found


def _sum(storage: Storage, key: str, start: int, length: int) -> int:
    block = memoryview(bytearray(min(_BLOCK_BYTES, length)))
    value = 0
    for at in range(0, length, _BLOCK_BYTES):
        piece = block[: min(_BLOCK_BYTES, length - at)]
        storage.read_into(key, start + at, piece)
        value = crc32c.crc32c(piece, value)
    return value
