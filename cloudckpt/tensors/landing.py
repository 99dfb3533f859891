"""Memory for what is read: one arena for all fresh tensors of the host, and pinned buffers on the way to a device."""

from __future__ import annotations

import contextlib
import math
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from cloudckpt.core.layout import ALIGNMENT

__all__ = ["Buffer", "Ferry", "HostMemory", "blank", "byte_tensor", "fresh_tensors", "over"]

#: A flat array of bytes.
HostMemory = np.ndarray[Any, np.dtype[np.uint8]]


def fresh_tensors(wanted: Sequence[tuple[torch.dtype, Sequence[int]]]) -> list[torch.Tensor]:
    """Host tensors without values, over one arena: each on its own 64-byte boundary, each with its own storage.

    Elsewhere than on such a boundary, where torch itself puts them, some kernels add up in another order, and a resumed
    run would differ in its last bits. A storage of its own keeps a ``deepcopy`` or ``torch.save`` of one tensor from
    taking the whole arena along.

    Raises:
        MemoryError: the host has not that much.
    """
    starts, end = [], 0
    for dtype, shape in wanted:
        starts.append(end)
        size = math.prod(shape) * dtype.itemsize
        end += size + -size % ALIGNMENT
    try:
        arena = np.empty(end + ALIGNMENT, dtype=np.uint8)
    except ValueError as exc:  # more than an array can have at all
        raise MemoryError(f"tensors of {end} bytes are asked for, and no host has that much") from exc
    first = -arena.ctypes.data % ALIGNMENT
    return [over(arena, first + start, dtype, shape) for start, (dtype, shape) in zip(starts, wanted, strict=True)]


def over(memory: HostMemory, start: int, dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
    """A tensor over host memory from byte ``start``, whose storage is its own bytes only; it keeps the memory alive."""
    length = math.prod(shape) * dtype.itemsize
    if not length:
        return blank(dtype, shape, torch.device("cpu"))
    # Never an inference tensor: what is loaded is trained on, wherever it was loaded.
    with torch.inference_mode(mode=False):
        return torch.from_numpy(memory[start : start + length]).view(dtype).view(tuple(shape))


def blank(dtype: torch.dtype, shape: Sequence[int], device: torch.device) -> torch.Tensor:
    """A tensor without values on any device."""
    with torch.inference_mode(mode=False):
        # As bytes first: of some dtypes torch warns, or has no tensors of its own making.
        raw = torch.empty(math.prod(shape) * dtype.itemsize, dtype=torch.uint8, device=device)
        return raw.view(dtype).view(tuple(shape))


def byte_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a contiguous tensor of any device, as a flat tensor that shares them."""
    flat = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    start = tensor.storage_offset() * tensor.dtype.itemsize
    return flat.set_(tensor.untyped_storage(), start, (tensor.numel() * tensor.dtype.itemsize,))  # type: ignore[call-overload, no-any-return]  # torch's stub lacks the untyped overload


@dataclass(slots=True)
class Buffer:
    """Host memory, and what tells when the copies out of it are done."""

    memory: torch.Tensor
    copied: list[torch.cuda.Event] = field(default_factory=list)


class Ferry:
    """Brings bytes to devices: read into pinned host memory, copied on streams of their own beside the next reads.

    Args:
        devices: where to.
        buffers: at most this many pieces are on their way at once. Each is made when it is first needed; torch keeps
            pinned memory for the next time.
        size_bytes: how large a piece may be.
    """

    def __init__(self, devices: Iterable[torch.device], *, buffers: int, size_bytes: int) -> None:
        self._size_bytes = size_bytes
        cuda: Any = torch.cuda  # its streams and events are untyped
        self._streams: dict[torch.device, Any] = {d: cuda.Stream(d) for d in devices if d.type == "cuda"}
        for device, stream in self._streams.items():
            # Fresh device memory may still be in use by kernels that were queued before it was given back.
            stream.wait_stream(torch.cuda.current_stream(device))
        self._room = threading.Semaphore(buffers)
        self._free: deque[Buffer] = deque()

    @contextlib.contextmanager
    def buffer(self) -> Iterator[Buffer]:
        """A buffer that nobody else has until it is given back; it may be filled at once."""
        with self._room:
            try:
                found = self._free.popleft()
            except IndexError:
                found = self._made()
            for event in found.copied:
                event.synchronize()
            found.copied.clear()
            try:
                yield found
            finally:
                self._free.append(found)

    def _made(self) -> Buffer:
        pinned = bool(self._streams)
        return Buffer(torch.empty(self._size_bytes, dtype=torch.uint8, device="cpu", pin_memory=pinned))

    def carry(self, buffer: Buffer, start: int, target: torch.Tensor) -> None:
        """Copy bytes of a buffer from ``start`` into all of ``target`` (flat bytes). Returns at once for CUDA."""
        stream = self._streams.get(target.device)
        source = buffer.memory[start : start + target.numel()]
        if stream is None:
            target.copy_(source)
            return
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)

    def carried(self, buffer: Buffer) -> None:
        """Everything out of this buffer is on its way: it must not be filled again before that is done."""
        for stream in self._streams.values():
            buffer.copied.append(stream.record_event())

    def finish(self) -> None:
        """Wait until everything that was carried is there."""
        for stream in self._streams.values():
            stream.synchronize()
