"""Bytes that somebody has in one piece, as a ``Source``: an index goes the way that payload goes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import crc32c

from cloudckpt.storage.base import Part

__all__ = ["Body", "NeverStopped"]

#: Whoever iterates gets slices of at most this size.
_SLICE_BYTES = 8 * 1024 * 1024


class NeverStopped:
    """Of a ``Source`` whose bytes are sent to the end, or until somebody else gives up."""

    def stopping(self, act: Callable[[], None]) -> AbstractContextManager[None]:  # noqa: ARG002 - the protocol's
        """See ``Source.stopping``: nobody does."""
        return contextlib.nullcontext()


class Body(NeverStopped):
    """A ``Source`` over one piece of bytes that never change.

    Args:
        body: the bytes; they are not copied.
    """

    def __init__(self, body: bytes) -> None:
        self._view = memoryview(body)

    @property
    def size_bytes(self) -> int:
        """See ``Source.size_bytes``."""
        return self._view.nbytes

    @property
    def together_bytes(self) -> int:
        """See ``Source.together_bytes``: it goes alone."""
        return self._view.nbytes

    @contextlib.contextmanager
    def hold(self, start: int, length: int) -> Iterator[Part]:
        """See ``Source.hold``."""
        view = self._view[start : start + length]
        yield Part((view,), crc32c.crc32c(view))

    def __iter__(self) -> Iterator[memoryview]:
        """See ``Source.__iter__``."""
        for start in range(0, self.size_bytes, _SLICE_BYTES):
            yield self._view[start : start + _SLICE_BYTES]
