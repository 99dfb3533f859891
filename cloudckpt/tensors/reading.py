"""Extents read side by side, straight to where they belong, and proven as they come.

Each thread sums what it has just read, while that is warm in its cache; the sums of an extent's pieces are joined
without touching its bytes again.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait

import numpy as np
import torch
from crc32c import crc32c

from cloudckpt.config import Settings
from cloudckpt.core import keys
from cloudckpt.core.checksum import combine_all, format_crc32c
from cloudckpt.core.model import Checkpoint
from cloudckpt.core.ranges import Read, Span, Wanted, plan_reads
from cloudckpt.errors import CorruptCheckpointError, ObjectNotFoundError, StorageError
from cloudckpt.progress import Meter
from cloudckpt.storage import Paced, Storage
from cloudckpt.tensors.extents import Extent, Piece
from cloudckpt.tensors.landing import Buffer, Ferry
from cloudckpt.tensors.memory import byte_view

__all__ = ["Reading"]

#: A span of a read, and where its bytes go.
_Placed = tuple[Span, Sequence[memoryview]]


class _Scratch(threading.local):
    """Memory of each thread for bytes that only prove others."""

    def __init__(self, size_bytes: int) -> None:
        self._size_bytes = size_bytes
        self._memory: memoryview | None = None
        self._at = 0

    def begin(self) -> None:
        """What was taken for the read before is free again."""
        self._at = 0

    def take(self, length: int) -> memoryview:
        """Some of it. All that one read takes is no more than a read is long."""
        if self._memory is None:
            self._memory = memoryview(np.empty(self._size_bytes, dtype=np.uint8))  # type: ignore[arg-type]  # an ndarray is a buffer; its stub says so from 3.12 on
        self._at += length
        return self._memory[self._at - length : self._at]


class Reading:
    """All reads of one load."""

    def __init__(
        self,
        storage: Storage,
        checkpoint: Checkpoint,
        extents: Sequence[Extent],
        settings: Settings,
        meter: Meter | None = None,
    ) -> None:
        self._storage = storage
        self._checkpoint = checkpoint
        self._extents = extents
        self._settings = settings
        self._meter = meter
        self._mutex = threading.Lock()
        # Bytes between two wanted ranges go here, from every thread; nobody looks at them.
        self._waste = memoryview(bytearray(min(settings.read_gap_bytes, settings.max_read_bytes)))
        self._scratch = _Scratch(0)
        self._ferry: Ferry | None = None
        # Extents that came with one sum and then with another: read once more when all else is done.
        self._doubted: list[Extent] = []
        # No thread reads before all are there: beside one that reads, starting the next takes 10 ms.
        self._begun = threading.Event()

    def run(self) -> None:
        """Read everything. When it returns or raises, nothing is written any more.

        Raises:
            CorruptCheckpointError: an object is missing, too short, or a checksum differs twice; names object, range.
            StorageError: the store refused.
        """
        for extent in self._extents:
            if not extent.missing:
                self._prove(extent)
        paced = self._storage
        known = paced.reads_at_once if isinstance(paced, Paced) else None
        threads = known or self._settings.io_threads
        reads = plan_reads(
            [Wanted(extent.object, extent.start, extent.length) for extent in self._extents],
            gap_bytes=self._settings.read_gap_bytes,
            most_bytes=self._settings.max_read_bytes,
            lanes=threads,
        )
        if not reads:
            return
        if self._meter is not None:
            self._meter.expect(sum(read.length for read in reads))
        self._scratch = _Scratch(reads[0].length)
        if devices := {device for extent in self._extents for device in extent.devices()}:
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
        for extent in self._doubted:
            self._bring_again(extent)

    def _read(self, read: Read) -> None:
        self._begun.wait()
        placed = self._placed(read)
        if placed is not None:
            self._ask(read.object, read.start, [view for _, views in placed for view in views])
            self._count(read)
            self._sum(placed)
        elif self._ferry is not None:
            with self._ferry.buffer() as buffer:
                whole = byte_view(buffer.memory)[: read.length]
                self._ask(read.object, read.start, [whole])
                self._count(read)
                placed = _cut(whole, read)
                self._to_host(placed)
                # Summed before it leaves the host, and on its way while the next range is read.
                self._sum(placed)
                self._carry(placed, buffer, self._ferry)

    def _placed(self, read: Read) -> list[_Placed] | None:
        """Where each span goes; None if any of it belongs on a device."""
        found: list[_Placed] = []
        self._scratch.begin()
        for span in read.spans:
            if span.item is None:
                found.append((span, (self._waste[: span.length],)))  # wherever in a gap it begins
                continue
            views = self._extents[span.item].views(span.start, span.length, self._scratch.take)
            if views is None:
                return None
            found.append((span, views))
        return found

    def _ask(self, name: str, start: int, targets: Sequence[memoryview]) -> None:
        key, meter = self._key(name), self._meter
        try:
            with meter.carrying(name) if meter is not None else contextlib.nullcontext():
                self._storage.read_into(key, start, *targets)
        except ObjectNotFoundError as exc:
            raise CorruptCheckpointError(str(exc), checkpoint_id=self._checkpoint.id, key=key) from exc

    def _count(self, read: Read) -> None:
        # A second look at the same bytes is not progress.
        if self._meter is not None:
            self._meter.advance(read.length)

    def _to_host(self, placed: Sequence[_Placed]) -> None:
        """What came by way of a buffer and stays on the host."""
        for span, (view,) in placed:
            for piece in self._pieces(span):
                if (home := piece.home.view()) is not None:
                    at = piece.start - span.start
                    home[piece.at : piece.at + piece.length] = view[at : at + piece.length]

    def _carry(self, placed: Sequence[_Placed], buffer: Buffer, ferry: Ferry) -> None:
        begin = 0
        for span, _ in placed:
            for piece in self._pieces(span):
                if not piece.home.on_host:
                    target = piece.home.flat()[piece.at : piece.at + piece.length]
                    ferry.carry(buffer, begin + piece.start - span.start, target)
            begin += span.length
        ferry.carried(buffer)

    def _pieces(self, span: Span) -> Iterable[Piece]:
        return () if span.item is None else self._extents[span.item].pieces(span.start, span.length)

    def _sum(self, placed: Sequence[_Placed]) -> None:
        for span, views in placed:
            if span.item is None:
                continue
            found, extent = 0, self._extents[span.item]
            for view in views:
                found = crc32c(view, found)
            with self._mutex:
                extent.sums.append((span.start, found, span.length))
                extent.missing -= span.length
                complete = not extent.missing
            if complete:
                self._prove(extent)

    def _prove(self, extent: Extent) -> None:
        """Compare what came of an extent with what was sealed.

        Bytes can change on the way as well, and a fault of the network is no damage: only what is wrong twice, and in
        the same way, lies in the store like that.
        """
        found = combine_all((value, length) for _, value, length in sorted(extent.sums))
        if found == extent.crc32c:
            extent.proven()
        elif self._sum_again(extent) != found:
            with self._mutex:
                self._doubted.append(extent)
        else:
            raise CorruptCheckpointError(
                f"{self._where(extent)}: checksum {format_crc32c(found)}, sealed as {format_crc32c(extent.crc32c)}",
                checkpoint_id=self._checkpoint.id,
                key=self._key(extent.object),
            )

    def _sum_again(self, extent: Extent) -> int:
        """The sum of an extent's bytes, read once more, past the memory where they belong."""
        found = 0
        for _, block in self._blocks(extent):
            found = crc32c(block, found)
        return found

    def _bring_again(self, extent: Extent) -> None:
        """Read an extent to where it belongs, when nobody else writes there any more.

        Raises:
            StorageError: its bytes are wrong again, and not as they were wrong before.
        """
        found = 0
        for at, block in self._blocks(extent):
            found = crc32c(block, found)
            for piece in extent.pieces(at, len(block)):
                source = block[piece.start - at : piece.start - at + piece.length]
                if (home := piece.home.view()) is not None:
                    home[piece.at : piece.at + piece.length] = source
                else:
                    target = piece.home.flat()[piece.at : piece.at + piece.length]
                    target.copy_(torch.frombuffer(source, dtype=torch.uint8))
        if found != extent.crc32c:
            raise StorageError(
                f"{self._where(extent)}: the same range was read several times, and other bytes came each time. "
                "Something between the store and this process changes them (memory, a proxy, a network card); nothing "
                "is known to be wrong with what is stored",
                retryable=True,
            )
        extent.proven()

    def _blocks(self, extent: Extent) -> Iterator[tuple[int, memoryview]]:
        """All bytes of an extent, from its first one on; each block is good until the next is asked for."""
        most = self._settings.max_read_bytes
        memory = memoryview(bytearray(min(most, extent.length)))
        for at in range(0, extent.length, most):
            block = memory[: min(most, extent.length - at)]
            self._ask(extent.object, extent.start + at, [block])
            yield at, block

    def _where(self, extent: Extent) -> str:
        return f"{self._checkpoint.url}/{extent.object} bytes {extent.start}..{extent.start + extent.length}"

    def _key(self, name: str) -> str:
        return keys.payload_key(self._checkpoint.step, self._checkpoint.id, name)


def _cut(whole: memoryview, read: Read) -> list[_Placed]:
    start = 0
    found: list[_Placed] = []
    for span in read.spans:
        found.append((span, (whole[start : start + span.length],)))
        start += span.length
    return found


def _raise_first(running: Sequence[Future[None]]) -> None:
    """Raise what went wrong first in the plan's order; what is no proof of damage comes before what is."""
    errors = [e for f in running if not f.cancelled() and (e := f.exception()) is not None]
    for error in sorted(errors, key=lambda e: isinstance(e, CorruptCheckpointError)):
        raise error
