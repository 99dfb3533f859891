"""The copy that training waits for: tensors into host memory laid out as the payload objects themselves.

Offsets are known before a byte moves; the arena *is* the file, so an upload sends slices of it and nothing is
serialised a second time. Sums are not taken here but by the threads that upload: in the same pass they made the copy
half as long again (docs/adr/0014).
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import torch

from cloudckpt.tensors.arena import Arena, Segment, positions
from cloudckpt.tensors.host import copy_large, copy_small, cpus
from cloudckpt.tensors.memory import copy_elements, lies_flat
from cloudckpt.tensors.planning import Payload

__all__ = ["Staged", "Staging", "stage"]

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


class Staged:
    """A copy that was finished when ``stage`` returned."""

    def wait_staged(self) -> None:
        """Nothing to wait for."""


def stage(payloads: Sequence[Payload], arena: Arena) -> Staging:
    """Copy every payload object to its place in the arena (``arena.positions``), which is large enough.

    Returns when all of it is there: the state may change from now on.
    """
    starts, _ = positions([payload.size_bytes for payload in payloads])
    jobs: list[_Job] = []
    devices: set[torch.device] = set()
    for payload, start in zip(payloads, starts, strict=True):
        _put_header(arena, start, payload.layout.header)
        _collect(payload, start, arena, jobs, devices)
    _run(jobs, arena)
    for device in devices:
        torch.cuda.current_stream(device).synchronize()
    return Staged()


def _put_header(arena: Arena, start: int, header: bytes) -> None:
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


def _run(jobs: Sequence[_Job], arena: Arena) -> None:
    total = sum(job[3] for job in jobs)
    threads = max(1, min(_MOST_THREADS, cpus(), total // _THREAD_BYTES))
    if threads == 1:
        _copy(jobs, arena)
        return
    first, *others = _shares(jobs, total, threads)
    with ThreadPoolExecutor(threads - 1, thread_name_prefix="cloudckpt-stage") as pool:
        running = [pool.submit(_copy, share, arena) for share in others]
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
