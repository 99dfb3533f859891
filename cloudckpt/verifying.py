"""Is what was sealed still there? Sizes from the store; ``deep`` reads every byte and checks every sum."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import crc32c

from cloudckpt.core import keys
from cloudckpt.core.checksum import format_crc32c
from cloudckpt.core.model import Checkpoint, Chunk, Index, PayloadObject
from cloudckpt.errors import CheckpointNotFoundError, CorruptCheckpointError, ObjectNotFoundError
from cloudckpt.storage import ManifestStore, Storage
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
    """What was looked at and what was found. ``bytes_read`` is 0 unless ``deep``."""

    checkpoints: tuple[Checkpoint, ...]
    findings: tuple[Finding, ...]
    deep: bool
    bytes_read: int

    @property
    def ok(self) -> bool:
        """Whether nothing was found."""
        return not self.findings


def verify_run(store: ManifestStore, select: str | int | None = None, *, deep: bool = False) -> VerifyReport:
    """Check one committed checkpoint, or all of them. Changes nothing.

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
    findings: list[Finding] = []
    read = 0
    for checkpoint in checkpoints:
        found, count = _verify_one(store.storage, checkpoint, deep=deep)
        if found and not _still_committed(view, checkpoint):
            continue  # retired while it was being looked at
        findings += found
        read += count
    return VerifyReport(checkpoints=checkpoints, findings=tuple(findings), deep=deep, bytes_read=read)


def _still_committed(view: RunView, checkpoint: Checkpoint) -> bool:
    try:
        return view.select(checkpoint.name).id == checkpoint.id
    except CheckpointNotFoundError:
        return False


def _verify_one(storage: Storage, checkpoint: Checkpoint, *, deep: bool) -> tuple[list[Finding], int]:
    index_key = keys.index_key(checkpoint.step, checkpoint.id)
    try:
        index = read_index(storage, checkpoint)
    except CorruptCheckpointError as exc:
        return [Finding(checkpoint=checkpoint, key=index_key, problem=str(exc))], 0
    findings: list[Finding] = []
    read = 0
    for item in index.objects:
        key = keys.payload_key(checkpoint.step, checkpoint.id, item.name)
        try:
            size = storage.size(key)
        except ObjectNotFoundError:
            findings.append(Finding(checkpoint=checkpoint, key=key, problem="missing"))
            continue
        if size != item.size_bytes:
            problem = f"has {size} bytes, sealed with {item.size_bytes}"
            findings.append(Finding(checkpoint=checkpoint, key=key, problem=problem))
        elif deep:
            findings += _verify_bytes(storage, checkpoint, index, item, key)
            read += size
    return findings, read


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
    if not named:
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
            yield name, chunk, found


def _sum(storage: Storage, key: str, start: int, length: int) -> int:
    block = memoryview(bytearray(min(_BLOCK_BYTES, length)))
    value = 0
    for at in range(0, length, _BLOCK_BYTES):
        piece = block[: min(_BLOCK_BYTES, length - at)]
        storage.read_into(key, start + at, piece)
        value = crc32c.crc32c(piece, value)
    return value
