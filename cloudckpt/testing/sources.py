"""A payload in plain memory, for whoever tests a storage."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence

import crc32c

from cloudckpt.storage.base import Buffer, Part
from cloudckpt.storage.body import NeverStopped

__all__ = ["BytesSource"]


class BytesSource(NeverStopped):
    """A ``Source`` over buffers laid end to end.

    Args:
        buffers: the payload.
        slice_bytes: iterating gives slices of at most this size.

    Attributes:
        held: the ranges that were held, as (start, length), in order; a range held twice is listed twice.
        most_held: how many ranges were held at the same time, at most.
    """

    def __init__(self, *buffers: Buffer, slice_bytes: int = 64 * 1024) -> None:
        self._views = [memoryview(buffer).cast("B") for buffer in buffers if memoryview(buffer).nbytes]
        self._slice_bytes = slice_bytes
        self._mutex = threading.Lock()
        self._holding = 0
        self.held: list[tuple[int, int]] = []
        self.most_held = 0

    @property
    def size_bytes(self) -> int:
        """See ``Source.size_bytes``."""
        return sum(map(len, self._views))

    @property
    def together_bytes(self) -> int:
        """See ``Source.together_bytes``: it goes alone."""
        return self.size_bytes

    def __iter__(self) -> Iterator[memoryview]:
        """See ``Source.__iter__``."""
        for view in self._views:
            for start in range(0, len(view), self._slice_bytes):
                yield view[start : start + self._slice_bytes]

    @contextlib.contextmanager
    def hold(self, start: int, length: int) -> Iterator[Part]:
        """See ``Source.hold``."""
        with self._mutex:
            self.held.append((start, length))
            self._holding += 1
            self.most_held = max(self.most_held, self._holding)
        try:
            views = tuple(_cut(self._views, start, length))
            value = 0
            for view in views:
                value = crc32c.crc32c(view, value)
            yield Part(views, value)
        finally:
            with self._mutex:
                self._holding -= 1


def _cut(views: Sequence[memoryview], start: int, length: int) -> Iterator[memoryview]:
    end, at = start + length, 0
    for view in views:
        first, last = max(start - at, 0), min(end - at, len(view))
        if first < last:
            yield view[first:last]
        at += len(view)
