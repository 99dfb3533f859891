"""Stored bytes into memory: what is needed of which object, and where each byte of it belongs."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from cloudckpt.config import Settings
from cloudckpt.core.model import Checkpoint, Chunk, TensorEntry
from cloudckpt.core.ranges import contiguous_start
from cloudckpt.progress import Meter
from cloudckpt.storage import Storage
from cloudckpt.tensors.boxes import plan_boxes
from cloudckpt.tensors.dcp import plan_copies
from cloudckpt.tensors.extents import Extent, WholeChunk, narrowed
from cloudckpt.tensors.landing import blank, byte_tensor, fresh_tensors
from cloudckpt.tensors.memory import copy_bits, dtype_named, typed_view
from cloudckpt.tensors.outline import Outline, Place
from cloudckpt.tensors.reading import Reading
from cloudckpt.tensors.targets import Homes

__all__ = ["fetch", "read_chunks"]


def fetch(
    storage: Storage,
    outline: Outline,
    homes: Homes,
    settings: Settings,
    *,
    done: Collection[Place] = (),
    meter: Meter | None = None,
) -> None:
    """Give every tensor of the outline its memory, and fill it with proven bytes.

    Args:
        homes: which of them are read into the caller's own tensors, or onto a device.
        done: those that have their bytes already.
        meter: told how far it is.

    Raises:
        CorruptCheckpointError: an object is missing, too short, or a checksum differs; names object and range.
        StorageError: the store refused.
        MemoryError: there is no room. In each case the memory that was given may hold anything.
    """
    needed = {place: entry for place, entry in outline.wanted() if place not in done}
    wanted = {place: entry for place, entry in needed.items() if place not in homes.parts}
    memory = _memory_for(wanted, outline, homes)
    scattered: list[tuple[Place, list[torch.Tensor]]] = []
    boxes = plan_boxes(
        [(needed[place], homes.parts[place]) for place in needed if place in homes.parts], outline.objects, settings
    )
    extents: list[Extent] = [*boxes.extents]
    for place, entry in wanted.items():
        pieces = _where_chunks_go(entry, memory[place])
        if pieces is None:
            pieces = [torch.empty(chunk.length, dtype=torch.uint8, device="cpu") for chunk in entry.chunks]
            scattered.append((place, pieces))
        extents += [WholeChunk.of(chunk, home) for chunk, home in zip(entry.chunks, pieces, strict=True)]
    Reading(storage, outline.checkpoint, extents, settings, meter).run()
    boxes.assemble()
    for place, pieces in scattered:
        _assemble(wanted[place], pieces, memory[place])
    for place, tensor in memory.items():
        outline.settle(place, tensor)


def read_chunks(
    storage: Storage, checkpoint: Checkpoint, wanted: Sequence[tuple[Chunk, torch.Tensor]], settings: Settings
) -> None:
    """Fill flat byte tensors of any device with the proven bytes of a chunk each.

    Raises:
        CorruptCheckpointError: an object is missing, too short, or a checksum differs; names object and range.
        StorageError: the store refused. In each case the memory may hold anything.
    """
    Reading(storage, checkpoint, [WholeChunk.of(chunk, home) for chunk, home in wanted], settings).run()


def _memory_for(wanted: dict[Place, TensorEntry], outline: Outline, homes: Homes) -> dict[Place, torch.Tensor]:
    memory = {place: tensor.detach() for place, tensor in homes.targets.items() if place in wanted}
    memory |= {place: array for place, array in outline.arrays.items() if place in wanted}
    fresh = {place: (dtype_named(e.dtype), e.shape) for place, e in wanted.items() if place not in memory}
    for place in fresh.keys() & homes.devices.keys():
        memory[place] = blank(*fresh.pop(place), homes.devices[place])
    return memory | dict(zip(fresh, fresh_tensors(list(fresh.values())), strict=True))


def _where_chunks_go(entry: TensorEntry, whole: torch.Tensor) -> list[torch.Tensor] | None:
    """The flat bytes of each chunk inside the whole; None if one of them has no place of its own in row-major order."""
    flat = byte_tensor(whole)
    if len(entry.chunks) == 1 and entry.chunks[0].lengths == entry.shape:
        return [flat]
    found = []
    for chunk in entry.chunks:
        start = contiguous_start(entry.shape, chunk.offsets, chunk.lengths)
        if start is None:
            return None
        found.append(flat[start * whole.dtype.itemsize :][: chunk.length])
    return found


def _assemble(entry: TensorEntry, pieces: Sequence[torch.Tensor], whole: torch.Tensor) -> None:
    for copy in plan_copies(entry, offsets=[0] * len(entry.shape), lengths=entry.shape):
        source = typed_view(pieces[copy.chunk], 0, whole.dtype, entry.chunks[copy.chunk].lengths)
        target = narrowed(whole, copy.target_offsets, copy.lengths)
        copy_bits(target, narrowed(source, copy.chunk_offsets, copy.lengths))
