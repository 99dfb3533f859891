"""Bytes back into tensors: ranges read in parallel, every sum checked before any tensor reaches the caller."""

from __future__ import annotations

import math
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import crc32c
import torch

from cloudckpt.config import Settings
from cloudckpt.core import keys
from cloudckpt.core.checksum import format_crc32c
from cloudckpt.core.layout import ALIGNMENT
from cloudckpt.core.model import Checkpoint, Chunk, Index, TensorEntry
from cloudckpt.core.ranges import Extent, Wanted, pieces, plan_extents
from cloudckpt.errors import CorruptCheckpointError, ObjectNotFoundError
from cloudckpt.storage import Storage
from cloudckpt.tensors.dcp import plan_copies
from cloudckpt.tensors.memory import byte_view, copy_bits, dtype_named, typed_view

__all__ = ["Fetched", "fetch"]


@dataclass(frozen=True, slots=True)
class Fetched:
    """Tensors by component and name, on the CPU. Aliases are the very same tensor."""

    tensors: dict[tuple[str, str], torch.Tensor]

    def __call__(self, component: str, name: str) -> torch.Tensor:
        """One tensor.

        Raises:
            CorruptCheckpointError: the structure refers to a tensor that the index does not list.
        """
        found = self.tensors.get((component, name))
        if found is None:
            raise CorruptCheckpointError(f"the index refers to {component}.{name}, which it does not list")
        return found


@dataclass(slots=True)
class _Buffers:
    """One host buffer per extent, and where each wanted range begins in it."""

    of: dict[Wanted, tuple[torch.Tensor, int]]

    def at(self, chunk: Chunk) -> tuple[torch.Tensor, int]:
        if not chunk.length:
            return torch.empty(0, dtype=torch.uint8), 0
        return self.of[Wanted(chunk.object, chunk.start, chunk.length)]


def fetch(
    storage: Storage, checkpoint: Checkpoint, index: Index, wanted: Iterable[tuple[str, str]], settings: Settings
) -> Fetched:
    """Read the wanted tensors, each given as (component, name), and prove their bytes.

    Raises:
        CorruptCheckpointError: an object is missing, too short, or a checksum differs; names object and range.
        StorageError: the store refused.
    """
    asked = list(dict.fromkeys(wanted))
    stored = {(c, index.tensors[c][n].alias_of or n) for c, n in asked}
    entries = {(c, n): index.tensors[c][n] for c, n in sorted(stored)}
    for (component, name), entry in entries.items():
        _check_sizes(entry, f"{component}.{name}", checkpoint)
    chunks = [chunk for entry in entries.values() for chunk in entry.chunks]
    extents = plan_extents((Wanted(c.object, c.start, c.length) for c in chunks), gap_bytes=settings.read_gap_bytes)
    buffers = _read(storage, checkpoint, extents, settings)
    with ThreadPoolExecutor(settings.io_threads, thread_name_prefix="cloudckpt-check") as pool:
        # list() so that the first damage found is raised here.
        list(pool.map(lambda chunk: _check_sum(chunk, buffers, checkpoint), chunks))
    tensors = {place: _assemble(entry, buffers) for place, entry in entries.items()}
    return Fetched({(c, n): tensors[c, index.tensors[c][n].alias_of or n] for c, n in asked})


def _check_sizes(entry: TensorEntry, name: str, checkpoint: Checkpoint) -> None:
    item_size = dtype_named(entry.dtype).itemsize
    covered = 0
    for chunk in entry.chunks:
        if chunk.length != math.prod(chunk.lengths) * item_size or chunk.start % item_size:
            raise CorruptCheckpointError(
                f"{checkpoint.url}: {name}: a chunk of shape {chunk.lengths} of {entry.dtype} cannot lie at bytes "
                f"{chunk.start}..{chunk.start + chunk.length}",
                checkpoint_id=checkpoint.id,
            )
        covered += math.prod(chunk.lengths)
    if covered != math.prod(entry.shape):
        raise CorruptCheckpointError(
            f"{checkpoint.url}: {name}: its chunks hold {covered} of {math.prod(entry.shape)} elements",
            checkpoint_id=checkpoint.id,
        )


def _read(storage: Storage, checkpoint: Checkpoint, extents: Iterable[Extent], settings: Settings) -> _Buffers:
    buffers = _Buffers({})
    jobs: list[tuple[str, int, memoryview]] = []
    for extent in extents:
        # As far from the 64-byte boundary as in the object, so that every tensor in it stays aligned.
        pad = extent.start % ALIGNMENT
        buffer = torch.empty(pad + extent.length, dtype=torch.uint8)
        for item in extent.wanted:
            buffers.of[item] = (buffer, pad + item.start - extent.start)
        view = byte_view(buffer)[pad:]
        for start, length in pieces(extent.start, extent.length, most_bytes=settings.max_read_bytes):
            at = start - extent.start
            jobs.append((extent.object, start, view[at : at + length]))
    with ThreadPoolExecutor(settings.io_threads, thread_name_prefix="cloudckpt-read") as pool:
        list(pool.map(lambda job: _read_piece(storage, checkpoint, *job), jobs))
    return buffers


def _read_piece(storage: Storage, checkpoint: Checkpoint, name: str, start: int, target: memoryview) -> None:
    key = keys.payload_key(checkpoint.step, checkpoint.id, name)
    try:
        storage.read_into(key, start, target)
    except ObjectNotFoundError as exc:
        raise CorruptCheckpointError(str(exc), checkpoint_id=checkpoint.id, key=key) from exc


def _check_sum(chunk: Chunk, buffers: _Buffers, checkpoint: Checkpoint) -> None:
    buffer, start = buffers.at(chunk)
    found = crc32c.crc32c(byte_view(buffer)[start : start + chunk.length])
    if found != chunk.crc32c:
        key = keys.payload_key(checkpoint.step, checkpoint.id, chunk.object)
        raise CorruptCheckpointError(
            f"{checkpoint.url}/{chunk.object} bytes {chunk.start}..{chunk.start + chunk.length}: checksum "
            f"{format_crc32c(found)}, sealed as {format_crc32c(chunk.crc32c)}",
            checkpoint_id=checkpoint.id,
            key=key,
        )


def _assemble(entry: TensorEntry, buffers: _Buffers) -> torch.Tensor:
    dtype = dtype_named(entry.dtype)
    in_one_piece = typed_view(*buffers.at(entry.chunks[0]), dtype, entry.shape) if len(entry.chunks) == 1 else None
    if in_one_piece is not None and in_one_piece.data_ptr() % ALIGNMENT == 0:
        return in_one_piece  # used where it was read, without another copy
    # Away from where torch itself would have put it, some kernels add up in another order, and a resumed run
    # would differ in its last bits.
    whole = torch.empty(math.prod(entry.shape) * dtype.itemsize, dtype=torch.uint8).view(dtype).view(entry.shape)
    if in_one_piece is not None:
        copy_bits(whole, in_one_piece)
        return whole
    for copy in plan_copies(entry, offsets=[0] * len(entry.shape), lengths=entry.shape):
        chunk = entry.chunks[copy.chunk]
        source = typed_view(*buffers.at(chunk), dtype, chunk.lengths)
        copy_bits(_box(whole, copy.target_offsets, copy.lengths), _box(source, copy.chunk_offsets, copy.lengths))
    return whole


def _box(tensor: torch.Tensor, offsets: tuple[int, ...], lengths: tuple[int, ...]) -> torch.Tensor:
    for dimension, (offset, length) in enumerate(zip(offsets, lengths, strict=True)):
        tensor = tensor.narrow(dimension, offset, length)
    return tensor
