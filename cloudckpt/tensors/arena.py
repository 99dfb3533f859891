"""The staging memory: page-aligned segments, made early and in the background, used again by every save.

Touching fresh memory costs several times the copy into it, and pinning it more still (docs/adr/0014). So a page is
touched once, by a thread of its own, and the saves that follow find it warm.
"""

from __future__ import annotations

import ctypes
import mmap
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from operator import attrgetter
from typing import Any

import torch

from cloudckpt.core.text import format_bytes
from cloudckpt.tensors.host import available_bytes

__all__ = ["PAGE_BYTES", "SEGMENT_BYTES", "Arena", "Segment", "aligned", "positions"]

#: Payload objects begin on multiples of this: what direct I/O asks for.
PAGE_BYTES = 4096

#: Small enough to be made and pinned piece by piece, large enough that few tensors cross from one to the next.
SEGMENT_BYTES = 256 * 1024 * 1024

#: The background touches this much at a time; between two steps it can be stopped.
_STEP_BYTES = 4 * 1024 * 1024

#: Pinned for every GPU of the process (``cudaHostRegisterPortable``).
_PORTABLE = 1

#: What is left to everybody else when the arena grows.
_RESERVE_BYTES = 64 * 1024 * 1024


class _Pages(Enum):
    UNTOUCHED = auto()
    BUSY = auto()
    TOUCHED = auto()


@dataclass(slots=True, eq=False)
class Segment:
    """One run of memory. ``memory`` and ``view`` are the same bytes, for torch and for sockets.

    Attributes:
        start: where it lies in the arena.
        address: where it lies in the process.
    """

    start: int
    memory: torch.Tensor
    view: memoryview
    address: int
    pinned: bool = False
    pages: _Pages = _Pages.UNTOUCHED

    @property
    def size_bytes(self) -> int:
        """Its size."""
        return self.view.nbytes

    @property
    def stop(self) -> int:
        """Where it ends in the arena."""
        return self.start + self.view.nbytes


def aligned(size_bytes: int) -> int:
    """Rounded up to whole pages."""
    return -(-size_bytes // PAGE_BYTES) * PAGE_BYTES


def positions(sizes: Sequence[int]) -> tuple[list[int], int]:
    """Where objects of these sizes begin in the arena, each on a page, and the size of all."""
    starts, at = [], 0
    for size in sizes:
        starts.append(at)
        at += aligned(size)
    return starts, at


def _allocate(size_bytes: int, start: int) -> Segment:
    if hasattr(mmap, "MAP_ANONYMOUS"):
        memory = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_DONTFORK"):
            # A forked data loader would otherwise make every page of the next save fault and be copied.
            memory.madvise(mmap.MADV_DONTFORK)
    else:
        memory = mmap.mmap(-1, size_bytes)
    tensor = torch.frombuffer(memory, dtype=torch.uint8)
    return Segment(start=start, memory=tensor, view=memoryview(memory), address=tensor.data_ptr())


@dataclass(slots=True, eq=False)
class Arena:
    """Host memory for one save at a time.

    Args:
        limit_bytes: it never grows past this.
        available: how much memory can still be touched, in bytes; None if nobody knows.
        tell: told, once, that memory could not be pinned.
        segment_bytes: how large a segment is, but the last one; whole pages.
    """

    limit_bytes: int | None = None
    available: Callable[[], int | None] = available_bytes
    tell: Callable[[str], None] = lambda _: None
    segment_bytes: int = SEGMENT_BYTES
    _segments: list[Segment] = field(default_factory=list)
    _changed: threading.Condition = field(default_factory=threading.Condition)
    _worker: threading.Thread | None = None
    _stop: bool = False
    _pinning: bool = False
    _told: bool = False

    @property
    def size_bytes(self) -> int:
        """What it holds, touched or not."""
        return self._segments[-1].stop if self._segments else 0

    @property
    def segments(self) -> tuple[Segment, ...]:
        """Its segments in order."""
        return tuple(self._segments)

    # -- its size --------------------------------------------------------------------------------------------

    def fit(self, size_bytes: int, *, soon_bytes: int = 0) -> None:
        """Have at least this much, and give back the segments nobody needs then. Between saves only.

        Args:
            soon_bytes: what will be needed soon: what is there of it is kept.

        Raises:
            MemoryError: that is more than the limit, or than the host has; names both sizes.
        """
        with self._changed:
            self._grow(size_bytes)
            self._shrink(max(size_bytes, soon_bytes))

    def prepare(self, size_bytes: int, *, pinned: bool = False) -> None:
        """Have at least this much, and begin to touch (and pin) it in the background.

        Raises:
            MemoryError: as for ``fit``.
        """
        with self._changed:
            self._grow(size_bytes)
            self._pinning = pinned and torch.cuda.is_available()
            if self._worker is None:
                self._stop = False
                worker = threading.Thread(target=self._work, name="cloudckpt-arena", daemon=True)
                worker.start()
                self._worker = worker

    def _grow(self, size_bytes: int) -> None:
        have, wanted = self.size_bytes, aligned(size_bytes)
        if self.limit_bytes is not None and wanted > self.limit_bytes:
            raise MemoryError(
                f"staging needs {format_bytes(wanted)}, and staging_limit_bytes is {format_bytes(self.limit_bytes)}"
            )
        if wanted <= have:
            return
        untouched = sum(s.size_bytes for s in self._segments if s.pages is _Pages.UNTOUCHED)
        free = self.available()
        if free is not None and wanted - have + untouched > free - _RESERVE_BYTES:
            raise MemoryError(
                f"staging needs {format_bytes(wanted - have + untouched)} more host memory, and the host has "
                f"{format_bytes(free)} to give"
            )
        before = have
        # A state that grows by a little at every save would end up with as many segments as saves.
        wanted = max(wanted, min(aligned(have + have // 8), self.limit_bytes or wanted)) if have else wanted
        while have < wanted:
            size = min(self.segment_bytes, wanted - have)
            try:
                self._segments.append(_allocate(size, have))
            except (OSError, ValueError, MemoryError) as exc:
                self._shrink(before)
                raise MemoryError(
                    f"staging needs {format_bytes(wanted)} of host memory, and no more than {format_bytes(have)} could "
                    "be had"
                ) from exc
            have += size

    def _shrink(self, size_bytes: int) -> None:
        while self._segments and self._segments[-1].start >= size_bytes:
            last = self._segments[-1]
            while last.pages is _Pages.BUSY:
                self._changed.wait()
            self._segments.pop()
            _unpin(last)

    # -- its pages -------------------------------------------------------------------------------------------

    def _work(self) -> None:
        segment: Segment | None = None
        fresh = whole = False
        pause = 0.0
        try:
            while True:
                with self._changed:
                    if segment is not None:
                        segment.pages = _Pages.TOUCHED if whole or not fresh else _Pages.UNTOUCHED
                        self._changed.notify_all()
                        if pause and not self._stop:
                            # The driver's lock is not fair: without a breath in between, training would wait for the
                            # whole arena to be pinned before it could launch its next kernel.
                            self._changed.wait(pause)
                    segment = self._next()
                    if segment is None:
                        # In one go with the look: whoever prepares right now finds a worker that works, or none.
                        self._worker = None
                        self._changed.notify_all()
                        return
                    fresh, segment.pages = segment.pages is _Pages.UNTOUCHED, _Pages.BUSY
                pause = 0.0
                if self._pinning:
                    # Pinning touches the pages by itself, and is quicker on those that nobody has touched.
                    began = time.monotonic()
                    self._pin(segment)
                    pause = time.monotonic() - began
                whole = not fresh or segment.pinned or self._touch(segment)
        except BaseException:
            with self._changed:
                if segment is not None:
                    segment.pages = _Pages.UNTOUCHED
                self._worker = None
                self._changed.notify_all()
            raise

    def _next(self) -> Segment | None:
        if self._stop:
            return None
        untouched = (segment for segment in self._segments if segment.pages is _Pages.UNTOUCHED)
        # Pinned last: those that a save was in time to fill first.
        pageable = (segment for segment in self._segments if self._pinning and not segment.pinned)
        return next(untouched, None) or next(pageable, None)

    def _touch(self, segment: Segment) -> bool:
        for at in range(0, segment.size_bytes, _STEP_BYTES):
            if self._stop:
                return False
            # Not torch's own fill: it would take the processors that training computes on.
            ctypes.memset(segment.address + at, 0, min(_STEP_BYTES, segment.size_bytes - at))
        return True

    def _pin(self, segment: Segment) -> None:
        try:
            code = int(_cuda().cudaHostRegister(segment.address, segment.size_bytes, _PORTABLE))
        except RuntimeError as exc:
            code, reason = -1, str(exc)
        else:
            reason = f"CUDA error {code}"
        segment.pinned = code == 0
        if code:
            self._pinning = False
            if not self._told:
                self._told = True
                self.tell(
                    f"{format_bytes(segment.size_bytes)} of staging memory could not be pinned ({reason}): copies from "
                    "the GPU will be slower. Check the memlock limit (ulimit -l)"
                )

    def claim(self, segment: Segment) -> None:
        """Say that the caller is about to fill a segment: waits if its pages are just being touched."""
        if segment.pages is _Pages.TOUCHED:
            return
        with self._changed:
            while segment.pages is _Pages.BUSY:
                self._changed.wait()
            segment.pages = _Pages.TOUCHED  # by whatever is copied there now

    def wait_prepared(self) -> None:
        """Wait until the background has nothing left to do."""
        with self._changed:
            while self._worker is not None:
                self._changed.wait()

    def close(self) -> None:
        """End the background and give everything back. No view of it may be in use any more. Idempotent."""
        self._stop = True
        self.wait_prepared()
        with self._changed:
            for segment in self._segments:
                _unpin(segment)
            self._segments.clear()

    # -- its bytes -------------------------------------------------------------------------------------------

    def pieces(self, start: int, length: int) -> Iterator[tuple[Segment, int, int]]:
        """A range as ``(segment, offset in it, length)``, in order."""
        segments, stop = self._segments, start + length
        number = bisect_right(segments, start, key=attrgetter("start")) - 1
        while start < stop and number < len(segments):
            segment = segments[number]
            end = min(stop, segment.stop)
            yield segment, start - segment.start, end - start
            start, number = end, number + 1

    def views(self, start: int, length: int) -> tuple[memoryview, ...]:
        """A range as views, in order."""
        return tuple(segment.view[at : at + size] for segment, at, size in self.pieces(start, length))


def _cuda() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]  # CUDA's own runtime; torch gives it no types


def _unpin(segment: Segment) -> None:
    if segment.pinned:
        segment.pinned = False
        _cuda().cudaHostUnregister(segment.address)
