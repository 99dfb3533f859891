"""The copy that training waits for: tensors into host memory laid out as the payload objects themselves.

Offsets are known before a byte moves; the arena *is* the file, so an upload sends slices of it and nothing is
serialised a second time. Sums are not taken here but by the threads that upload: in the same pass they made the copy
half as long again (docs/adr/0014).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import torch

from cloudckpt.tensors.arena import Arena, Segment, positions
from cloudckpt.tensors.host import copy_large, copy_small, cpus
from cloudckpt.tensors.memory import copy_elements, lies_flat
from cloudckpt.tensors.planning import Payload

__all__ = ["Staged", "Staging", "put_header", "stage"]

#: Below this much for each, a second thread is not worth its start.
_THREAD_BYTES = 16 * 1024 * 1024

#: More threads than this gain nothing: a few fill the memory's own speed.
_MOST_THREADS = 4

_SMALL_BYTES = 64 * 1024

#: A copy of plain memory: segment, address to copy to, address to copy from, size in bytes.
_Job = tuple[Segment, int, int, int]


class Staging(Protocol):
    """A copy into the arena, finished or on its way."""

    def wait_staged(self) -> None:
        """Wait until every byte is in the arena and the state may change.

        Raises:
            SaveError: the state changed before it was copied; names the tensor.
        """
        ...

    def confirm(self) -> None:
        """Look once more, before the save is sealed, whether anything was written to under the copy.

        Raises:
            SaveError: the same.
        """
        ...

    def give_back(self) -> None:
        """Wait until the state may be changed in whatever way. For the thread that trains.

        Raises:
            SaveError: the same.
        """
        ...


class Staged:
    """A copy that is finished when ``stage`` returns. If that is interrupted, its helpers may still be at work."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._at_work = 0
        self._over = False

    @contextlib.contextmanager
    def helping(self) -> Iterator[bool]:
        """While a helper copies. False: it comes too late, and must not begin."""
        with self._changed:
            in_time = not self._over
            self._at_work += in_time
        try:
            yield in_time
        finally:
            with self._changed:
                self._at_work -= in_time
                self._changed.notify_all()

    def wait_staged(self) -> None:
        """Wait until no helper is at work; from now on none begins."""
        with self._changed:
            self._over = True
            while self._at_work:
                self._changed.wait()

    def confirm(self) -> None:
        """Nothing can have changed."""

    def give_back(self) -> None:
        """Nothing to wait for."""


def stage(payloads: Sequence[Payload], arena: Arena, staged: Staged | None = None) -> Staged:
    """Copy every payload object to its place in the arena (``arena.positions``), which is large enough.

    Returns when all of it is there: the state may change from now on.

    Args:
        staged: what is returned; the caller's own where it must be known however this ends: if it is interrupted,
            that is what to wait for before the arena is used again.
    """
    staged = staged or Staged()
    starts, _ = positions([payload.size_bytes for payload in payloads])
    jobs: list[_Job] = []
    devices: set[torch.device] = set()
    for payload, start in zip(payloads, starts, strict=True):
        put_header(arena, start, payload.layout.header)
        _collect(payload, start, arena, jobs, devices)
    try:
        _run(jobs, arena, staged)
    finally:
        for device in devices:
            torch.cuda.current_stream(device).synchronize()
    return staged


def put_header(arena: Arena, start: int, header: bytes) -> None:
    """Copy the header of a payload object to where the object begins in the arena."""
    done = 0
    for segment, at, size in arena.pieces(start, len(header)):
        arena.claim(segment)
        segment.view[at : at + size] = header[done : done + size]
        done += size


def _collect(payload: Payload, start: int, arena: Arena, jobs: list[_Job], devices: set[torch.device]) -> None:
    """Note what is plain memory as jobs; begin to copy the rest."""
    segments = iter(arena.segments)
    segment = next(segments)
    for tensor, place in zip(payload.tensors, payload.layout.places, strict=True):
        if not place.size_bytes:
            continue
        at, left = start + place.start, place.size_bytes
        flat = lies_flat(tensor)
        source = tensor.data_ptr() if flat else 0
        done = 0
        while left:
            while segment.stop <= at:
                segment = next(segments)
            size = min(left, segment.stop - at)
            if flat:
                jobs.append((segment, segment.address + at - segment.start, source + done, size))
            else:
                # Elements never lie across segments: both begin on multiples of the element size.
                arena.claim(segment)
                begin, item = at - segment.start, tensor.dtype.itemsize
                target = segment.memory[begin : begin + size].view(tensor.dtype)
                first, last = done // item, (done + size) // item
                copy_elements(target, tensor.detach(), first, last, non_blocking=tensor.is_cuda)
                if tensor.is_cuda:
                    devices.add(tensor.device)
            at, done, left = at + size, done + size, left - size


def _run(jobs: Sequence[_Job], arena: Arena, staged: Staged) -> None:
    total = sum(job[3] for job in jobs)
    threads = max(1, min(_MOST_THREADS, cpus(), total // _THREAD_BYTES))
    if threads == 1:
        _copy(jobs, arena)
        return
    first, *others = _shares(jobs, total, threads)
    with ThreadPoolExecutor(threads - 1, thread_name_prefix="cloudckpt-stage") as pool:
        running = [pool.submit(_help, share, arena, staged) for share in others]
        _copy(first, arena)
        for copied in running:
            copied.result()


def _shares(jobs: Sequence[_Job], total: int, threads: int) -> list[list[_Job]]:
    """Equal shares, each of neighbours, so that every copy is as long as it can be."""
    shares: list[list[_Job]] = [[]]
    each, room = -(-total // threads), -(-total // threads)
    for segment, target, source, size in jobs:
        done = 0
        while done < size:
            if not room:
                shares.append([])
                room = each
            step = min(room, size - done)
            shares[-1].append((segment, target + done, source + done, step))
            done, room = done + step, room - step
    return shares


def _help(jobs: Sequence[_Job], arena: Arena, staged: Staged) -> None:
    with staged.helping() as in_time:
        if in_time:
            _copy(jobs, arena)


def _copy(jobs: Sequence[_Job], arena: Arena) -> None:
    claimed = None
    for segment, target, source, size in jobs:
        if segment is not claimed:
            arena.claim(segment)
            claimed = segment
        if size < _SMALL_BYTES:
            copy_small(target, source, size)
        else:
            copy_large(target, source, size)
