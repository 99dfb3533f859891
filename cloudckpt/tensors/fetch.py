"""Stored bytes into memory: one plan over all objects, ranges read side by side straight to where they belong.

Each thread sums what it has just read, while that is warm in its cache; the sums of a chunk's pieces are joined without
touching its bytes again.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

import crc32c
import torch

from cloudckpt.config import Settings
from cloudckpt.core import keys
from cloudckpt.core.checksum import combine_all, format_crc32c
from cloudckpt.core.model import Checkpoint, Chunk, TensorEntry
from cloudckpt.core.ranges import Read, Wanted, contiguous_start, plan_reads
from cloudckpt.errors import CorruptCheckpointError, ObjectNotFoundError
from cloudckpt.storage import Paced, Storage
from cloudckpt.tensors.dcp import Copy, plan_copies
from cloudckpt.tensors.landing import Buffer, Ferry, blank, byte_tensor, fresh_tensors
from cloudckpt.tensors.memory import byte_view, copy_bits, dtype_named, typed_view
from cloudckpt.tensors.outline import Outline, Place
from cloudckpt.tensors.targets import Homes, Part

__all__ = ["fetch", "read_chunks"]


def fetch(
    storage: Storage, outline: Outline, homes: Homes, settings: Settings, *, done: Collection[Place] = ()
) -> None:
    """Give every tensor of the outline its memory, and fill it with proven bytes.

    Args:
        homes: which of them are read into the caller's own tensors, or onto a device.
        done: those that have their bytes already.

    Raises:
        CorruptCheckpointError: an object is missing, too short, or a checksum differs; names object and range.
        StorageError: the store refused.
        MemoryError: there is no room. In each case the memory that was given may hold anything.
    """
    needed = {place: entry for place, entry in outline.wanted() if place not in done}
    wanted = {place: entry for place, entry in needed.items() if place not in homes.parts}
    memory = _memory_for(wanted, outline, homes)
    scattered: list[tuple[Place, list[torch.Tensor]]] = []
    chunks: list[_Chunk] = []
    boxes: list[_Box] = []
    for place in needed.keys() & homes.parts.keys():
        box = _Box.of(needed[place], homes.parts[place])
        boxes.append(box)
        chunks += box.chunks
    for place, entry in wanted.items():
        pieces = _where_chunks_go(entry, memory[place])
        if pieces is None:
            pieces = [torch.empty(chunk.length, dtype=torch.uint8, device="cpu") for chunk in entry.chunks]
            scattered.append((place, pieces))
        chunks += [_Chunk(chunk, home) for chunk, home in zip(entry.chunks, pieces, strict=True)]
    _Reading(storage, outline.checkpoint, chunks, settings).run()
    for box in boxes:
        box.assemble()
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
    _Reading(storage, checkpoint, [_Chunk(chunk, home) for chunk, home in wanted], settings).run()


@dataclass(slots=True)
class _Box:
    """The part of a tensor that this process needs, out of the chunks that reach into it.

    Attributes:
        chunks: what is read.
        left: what then is copied from where it was read to, with where from and where to.
    """

    part: Part
    chunks: list[_Chunk]
    left: list[tuple[Copy, torch.Tensor, Chunk]]

    @classmethod
    def of(cls, entry: TensorEntry, part: Part) -> _Box:
        """Chunks that lie in the box as they are stored are read straight into it."""
        found = cls(part, [], [])
        local = part.local
        if not local.numel():
            return found
        flat = byte_tensor(local)
        for copy in plan_copies(entry, offsets=part.offsets, lengths=tuple(local.shape)):
            chunk = entry.chunks[copy.chunk]
            start = contiguous_start(tuple(local.shape), copy.target_offsets, copy.lengths)
            if copy.lengths == chunk.lengths and start is not None:
                home = flat[start * local.dtype.itemsize :][: chunk.length]
            else:
                home = torch.empty(chunk.length, dtype=torch.uint8, device="cpu")
                found.left.append((copy, home, chunk))
            found.chunks.append(_Chunk(chunk, home))
        return found

    def assemble(self) -> None:
        """Copy what was read elsewhere."""
        local = self.part.local
        for copy, piece, chunk in self.left:
            source = typed_view(piece, 0, local.dtype, chunk.lengths)
            copy_bits(_box(local, copy.target_offsets, copy.lengths), _box(source, copy.chunk_offsets, copy.lengths))


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
        copy_bits(_box(whole, copy.target_offsets, copy.lengths), _box(source, copy.chunk_offsets, copy.lengths))


def _box(tensor: torch.Tensor, offsets: tuple[int, ...], lengths: tuple[int, ...]) -> torch.Tensor:
    for dimension, (offset, length) in enumerate(zip(offsets, lengths, strict=True)):
        tensor = tensor.narrow(dimension, offset, length)
    return tensor


@dataclass(slots=True)
class _Chunk:
    """A chunk on its way.

    Attributes:
        sealed: what the index says of it.
        home: the flat bytes where it belongs, on whatever device.
        view: the same as a plain buffer, on the host only.
        sums: start, sum and length of what has come of it.
        missing: bytes that have not come yet.
    """

    sealed: Chunk
    home: torch.Tensor
    view: memoryview | None = field(init=False)
    sums: list[tuple[int, int, int]] = field(default_factory=list)
    missing: int = field(init=False)

    def __post_init__(self) -> None:
        self.view = memoryview(self.home.numpy()) if _on_host(self.home) else None  # type: ignore[arg-type]  # an ndarray is a buffer; its stub says so from 3.12 on
        self.missing = self.sealed.length


def _on_host(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu"


class _Reading:
    """All reads of one load."""

    def __init__(self, storage: Storage, checkpoint: Checkpoint, chunks: Sequence[_Chunk], settings: Settings) -> None:
        self._storage = storage
        self._checkpoint = checkpoint
        self._chunks = chunks
        self._settings = settings
        self._mutex = threading.Lock()
        # Bytes between two wanted ranges go here, from every thread; nobody looks at them.
        self._waste = memoryview(bytearray(min(settings.read_gap_bytes, settings.max_read_bytes)))
        self._ferry: Ferry | None = None
        # No thread reads before all are there: beside one that reads, starting the next takes 10 ms.
        self._begun = threading.Event()

    def run(self) -> None:
        """Read everything. When it returns or raises, nothing is written any more.

        Raises:
            CorruptCheckpointError: see ``fetch``.
            StorageError: the store refused.
        """
        for chunk in self._chunks:
            if not chunk.missing:
                self._prove(chunk)
        paced = self._storage
        known = paced.reads_at_once if isinstance(paced, Paced) else None
        threads = known or self._settings.io_threads
        reads = plan_reads(
            [Wanted(c.sealed.object, c.sealed.start, c.sealed.length) for c in self._chunks],
            gap_bytes=self._settings.read_gap_bytes,
            most_bytes=self._settings.max_read_bytes,
            lanes=threads,
        )
        if not reads:
            return
        if devices := {chunk.home.device for chunk in self._chunks if chunk.view is None}:
            self._ferry = Ferry(devices, buffers=threads, size_bytes=reads[0].length)
        pool = ThreadPoolExecutor(min(threads, len(reads)), thread_name_prefix="cloudckpt-read")
        try:
            running = [pool.submit(self._read, read) for read in reads]
            self._begun.set()
            wait(running, return_when=FIRST_EXCEPTION)
        finally:
            self._begun.set()
            # What is under way writes into memory that somebody owns: it has to end first, whatever ended us.
            pool.shutdown(cancel_futures=True)
            if self._ferry is not None:
                self._ferry.finish()
        _raise_first(running)

    def _read(self, read: Read) -> None:
        self._begun.wait()
        views = self._views(read)
        if views is not None:
            self._ask(read, views)
            self._sum(read, views)
        elif self._ferry is not None:
            with self._ferry.buffer() as buffer:
                whole = byte_view(buffer.memory)[: read.length]
                self._ask(read, [whole])
                views = list(_cut(whole, read))
                # Summed before it leaves the host, and on its way while the next range is read.
                self._sum(read, views)
                self._hand_out(read, views, buffer, self._ferry)

    def _views(self, read: Read) -> list[memoryview] | None:
        """Where each span goes; None if any belongs on a device."""
        found = []
        for span in read.spans:
            if span.item is None:
                found.append(self._waste[: span.length])  # wherever in a gap it begins
                continue
            view = self._chunks[span.item].view
            if view is None:
                return None
            found.append(view[span.start : span.start + span.length])
        return found

    def _ask(self, read: Read, targets: Sequence[memoryview]) -> None:
        key = self._key(read.object)
        try:
            self._storage.read_into(key, read.start, *targets)
        except ObjectNotFoundError as exc:
            raise CorruptCheckpointError(str(exc), checkpoint_id=self._checkpoint.id, key=key) from exc

    def _hand_out(self, read: Read, views: Sequence[memoryview], buffer: Buffer, ferry: Ferry) -> None:
        start = 0
        for span, view in zip(read.spans, views, strict=True):
            if span.item is not None:
                chunk = self._chunks[span.item]
                if chunk.view is not None:
                    chunk.view[span.start : span.start + span.length] = view
                else:
                    ferry.carry(buffer, start, chunk.home[span.start : span.start + span.length])
            start += span.length
        ferry.carried(buffer)

    def _sum(self, read: Read, views: Sequence[memoryview]) -> None:
        for span, view in zip(read.spans, views, strict=True):
            if span.item is None:
                continue
            found, chunk = crc32c.crc32c(view), self._chunks[span.item]
            with self._mutex:
                chunk.sums.append((span.start, found, span.length))
                chunk.missing -= span.length
                complete = not chunk.missing
            if complete:
                self._prove(chunk)

    def _prove(self, chunk: _Chunk) -> None:
        """Compare what came of a chunk with what was sealed."""
        sealed = chunk.sealed
        found = combine_all((value, length) for _, value, length in sorted(chunk.sums))
        if found != sealed.crc32c:
            raise CorruptCheckpointError(
                f"{self._checkpoint.url}/{sealed.object} bytes {sealed.start}..{sealed.start + sealed.length}: "
                f"checksum {format_crc32c(found)}, sealed as {format_crc32c(sealed.crc32c)}",
                checkpoint_id=self._checkpoint.id,
                key=self._key(sealed.object),
            )

    def _key(self, name: str) -> str:
        return keys.payload_key(self._checkpoint.step, self._checkpoint.id, name)


def _cut(whole: memoryview, read: Read) -> Iterator[memoryview]:
    start = 0
    for span in read.spans:
        yield whole[start : start + span.length]
        start += span.length


def _raise_first(running: Sequence[Future[None]]) -> None:
    """Raise what went wrong first in the plan's order; what is no proof of damage comes before what is."""
    errors = [e for f in running if not f.cancelled() and (e := f.exception()) is not None]
    for error in sorted(errors, key=lambda e: isinstance(e, CorruptCheckpointError)):
        raise error
