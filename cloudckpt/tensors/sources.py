"""Payload objects as sources: their bytes by range, from the arena or from the tensors' own memory.

Neither makes a copy of what lies in host memory as it is stored. What does not (GPU memory, odd strides) and what is
too small to be sent alone goes through a bounded number of buffers, one per part that is held.
"""

from __future__ import annotations

import contextlib
import threading
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

import torch

from cloudckpt.core.model import Cells, PayloadObject
from cloudckpt.core.text import format_bytes
from cloudckpt.errors import SaveError
from cloudckpt.storage.base import Part
from cloudckpt.tensors.arena import Arena
from cloudckpt.tensors.host import available_bytes, copy_large, copy_small
from cloudckpt.tensors.memory import byte_view, copy_elements, lies_flat
from cloudckpt.tensors.planning import Payload
from cloudckpt.tensors.sums import CELL_BYTES, Sums

__all__ = ["ArenaSource", "Buffers", "PayloadSource", "TensorSource"]

#: Whoever iterates gets slices of at most this size, so that progress moves and a cancel is noticed.
_SLICE_BYTES = 8 * 1024 * 1024

#: Smaller tensors are joined into one buffer: a view of its own for each would cost more than the copy.
_SMALL_BYTES = 64 * 1024

_ALIGNMENT = 64

_NOTHING = torch.empty(0, dtype=torch.uint8, device="cpu")


class PayloadSource(ABC):
    """A payload object of one save: a ``Source`` that can be stopped, and that knows its sums at the end."""

    def __init__(self, payload: Payload, together_bytes: int) -> None:
        self.payload = payload
        self.together_bytes = together_bytes
        self._sums = Sums(payload.bounds)
        self._stopped: str | None = None
        self._stopping: dict[int, Callable[[], None]] = {}
        # An interrupt may come to a thread that holds it, and stop the source itself.
        self._mutex = threading.RLock()
        self._asked_for = False
        # Shared by all threads that sum ahead: each takes the next.
        self._ahead = iter(range(0, payload.size_bytes, CELL_BYTES))

    @property
    def size_bytes(self) -> int:
        """See ``Source.size_bytes``."""
        return self.payload.size_bytes

    @abstractmethod
    def hold(self, start: int, length: int) -> AbstractContextManager[Part]:
        """See ``Source.hold``."""

    def __iter__(self) -> Iterator[memoryview]:
        for start in range(0, self.size_bytes, _SLICE_BYTES):
            with self.hold(start, min(_SLICE_BYTES, self.size_bytes - start)) as part:
                yield from part.views

    def sum_ahead(self) -> None:
        """Sum what lies in host memory as it is stored, from the front, until somebody asks for any of it."""
        for start in self._ahead:
            if self._asked_for or self._stopped is not None:
                return
            if views := self._at_rest(start, min(CELL_BYTES, self.size_bytes - start)):
                self._sums.cell(start, views)

    def asked_for(self) -> None:
        """From now on sums are taken by whoever holds the bytes."""
        self._asked_for = True

    @abstractmethod
    def _at_rest(self, start: int, length: int) -> tuple[memoryview, ...]:
        """The bytes where they are, without a copy; nothing if that is not how they are sent."""

    def stop(self, reason: str) -> None:
        """Give out no further bytes: whoever asks gets a ``SaveError`` with this reason."""
        with self._mutex:
            self._stopped = self._stopped or reason
            acts = [*self._stopping.values()]
        for act in acts:
            act()

    def let_go(self) -> None:
        """Its save has failed, and nobody holds any of it: whoever still knows of this keeps no tensor alive.

        The error does, by the frames it came through: that of a nested function keeps what the function closes over.
        """
        self.stop("its save has failed")
        self.payload = replace(self.payload, tensors=())

    @contextlib.contextmanager
    def stopping(self, act: Callable[[], None]) -> Iterator[None]:
        """See ``Source.stopping``."""
        with self._mutex:
            self._check(0, 0)
            self._stopping[id(act)] = act
        try:
            yield
        finally:
            with self._mutex:
                del self._stopping[id(act)]

    def seal(self) -> tuple[PayloadObject, list[int]]:
        """The object as the index records it, and the sum of each box. Once all of it has been put.

        Raises:
            SaveError: a tensor changed while it was being saved; names it.
        """
        self._check(0, 0)
        total, (_, *boxes) = self._sums.finish(self._again)
        cells = None
        if self.size_bytes > CELL_BYTES:
            cells = Cells(size_bytes=CELL_BYTES, crc32c=self._sums.cells(self._again))
        return PayloadObject(name=self.payload.name, size_bytes=self.size_bytes, crc32c=total, cells=cells), boxes

    def _again(self, start: int, length: int) -> None:
        with self.hold(start, length):
            """Held to be summed."""

    def _check(self, start: int, length: int) -> None:
        self.asked_for()
        if self._stopped is not None:
            raise SaveError(f"{self.payload.name} is not sent any further: {self._stopped}")
        if start < 0 or length < 0 or start + length > self.size_bytes:
            raise ValueError(f"{self.payload.name} has {self.size_bytes} bytes, not {start}..{start + length}")


class ArenaSource(PayloadSource):
    """A payload object staged in the arena.

    Args:
        start: where in the arena it begins.
    """

    def __init__(self, payload: Payload, arena: Arena, start: int, *, together_bytes: int = 0) -> None:
        super().__init__(payload, max(together_bytes, payload.size_bytes))
        self._arena = arena
        self._start = start

    def _at_rest(self, start: int, length: int) -> tuple[memoryview, ...]:
        return self._arena.views(self._start + start, length)

    @contextlib.contextmanager
    def hold(self, start: int, length: int) -> Iterator[Part]:
        """See ``Source.hold``."""
        self._check(start, length)
        views = self._arena.views(self._start + start, length)
        yield Part(views, self._sums.part(start, views))


class Buffers:
    """A bounded number of buffers for parts that cannot be sent from where they lie.

    Args:
        at_most: how many are lent at once; who comes later waits.
        pinned: whether a GPU copies into them.
    """

    def __init__(self, at_most: int, *, pinned: bool = False) -> None:
        self._free = threading.BoundedSemaphore(at_most)
        self._pinned = pinned
        self._kept: list[torch.Tensor] = []

    @contextlib.contextmanager
    def lend(self, size_bytes: int) -> Iterator[torch.Tensor]:
        """A buffer of at least this size (uint8).

        Raises:
            MemoryError: the host has not even that much.
        """
        with self._free:
            try:
                found = self._kept.pop()
            except IndexError:
                found = torch.empty(0, dtype=torch.uint8, device="cpu")
            if found.numel() < size_bytes:
                try:
                    found = torch.empty(size_bytes, dtype=torch.uint8, device="cpu", pin_memory=self._pinned)
                except RuntimeError as exc:
                    free = available_bytes()
                    has = "" if free is None else f", and the host has {format_bytes(free)} to give"
                    raise MemoryError(
                        f"a part that is sent needs {format_bytes(size_bytes)} of host memory{has}: free some, or make "
                        "part_size_bytes smaller"
                    ) from exc
            try:
                yield found
            finally:
                self._kept.append(found)


class TensorSource(PayloadSource):
    """A payload object in the tensors' own memory; they must not change until it is sealed.

    A change is noticed by the tensor's version counter, as autograd notices it. What goes past the counter (``.data``,
    NumPy, another process on shared memory) goes past this as well.

    Args:
        buffers: where parts are put together that cannot be sent from where they lie.
    """

    def __init__(self, payload: Payload, buffers: Buffers, *, together_bytes: int = 0) -> None:
        super().__init__(payload, max(together_bytes, payload.size_bytes))
        self._buffers = buffers
        self._header = memoryview(payload.layout.header)
        self._versions = [_version(tensor) for tensor in payload.tensors]
        # Asked once, by one thread: torch lets go of the interpreter's lock to answer, and threads that send parts side
        # by side then wait for it far longer than the answer takes. The aliases keep the memory that was asked about,
        # should somebody give a tensor other memory meanwhile.
        self._aliases = [tensor.detach() for tensor in payload.tensors]
        self._flat = [lies_flat(alias) for alias in self._aliases]
        self._held: set[tuple[int, int]] = set()

    @contextlib.contextmanager
    def hold(self, start: int, length: int) -> Iterator[Part]:
        """See ``Source.hold``."""
        self._check(start, length)
        if (start, length) in self._held:
            self.check_unchanged()  # sent again: the same bytes, or none
        self._held.add((start, length))
        runs = self._runs(start, start + length)
        need = sum(stop - begin + 4 * _ALIGNMENT for begin, stop, alone in runs if not alone)
        with self._buffers.lend(need) if need else contextlib.nullcontext(_NOTHING) as buffer:
            views, at = [], 0
            for begin, stop, alone in runs:
                if alone:
                    views.append(self._own(begin, stop))
                else:
                    # As far from the boundary as in the object, so that every tensor is aligned to its element.
                    at += -at % _ALIGNMENT + _ALIGNMENT + begin % _ALIGNMENT
                    self._join(buffer, at, begin, stop)
                    views.append(byte_view(buffer[at : at + stop - begin]))
                    at += stop - begin + _ALIGNMENT // 4
            yield Part(tuple(views), self._sums.part(start, views))

    def _at_rest(self, start: int, length: int) -> tuple[memoryview, ...]:
        runs = self._runs(start, start + length)
        return tuple(self._own(begin, stop) for begin, stop, _ in runs) if all(alone for *_, alone in runs) else ()

    def _runs(self, start: int, stop: int) -> list[tuple[int, int, bool]]:
        """The range as runs: a large tensor's own memory stands alone, what lies between is joined."""
        bounds, flat = self.payload.bounds, self._flat
        runs: list[tuple[int, int, bool]] = []
        number, at = bisect_right(bounds, start) - 1, start
        joined = start
        while at < stop:
            close = bounds[number + 1]
            if number == 0 or (close - bounds[number] >= _SMALL_BYTES and flat[number - 1]):
                if at > joined:
                    runs.append((joined, at, False))
                joined = min(stop, close)
                runs.append((at, joined, True))
            at = close
            number += 1
        if stop > joined:
            runs.append((joined, stop, False))
        return runs

    def _own(self, start: int, stop: int) -> memoryview:
        number = bisect_right(self.payload.bounds, start) - 1
        view = self._header if number == 0 else byte_view(self._aliases[number - 1])
        base = self.payload.bounds[number]
        return view[start - base : stop - base]

    def _join(self, buffer: torch.Tensor, at: int, start: int, stop: int) -> None:
        """Bytes ``start`` to ``stop`` of the object to ``at`` in the buffer, which has room to its left and right."""
        bounds, tensors, flat = self.payload.bounds, self._aliases, self._flat
        address, shift = buffer.data_ptr(), at - start
        number = bisect_right(bounds, start) - 1
        devices = set()
        while start < stop:
            base, end = bounds[number], bounds[number + 1]
            end = min(end, stop)
            tensor = tensors[number - 1]
            if end == start:
                pass
            elif flat[number - 1]:
                copy = copy_small if end - start < _SMALL_BYTES else copy_large
                copy(address + shift + start, tensor.data_ptr() + start - base, end - start)
            else:
                size = tensor.dtype.itemsize
                first, last = (start - base) // size, -(-(end - base) // size)
                begin = shift + base + first * size
                elements = buffer[begin : begin + (last - first) * size].view(tensor.dtype)
                copy_elements(elements, tensor, first, last, non_blocking=tensor.is_cuda)
                if tensor.is_cuda:
                    devices.add(tensor.device)
            start = end
            number += 1
        for device in devices:
            torch.cuda.current_stream(device).synchronize()

    def let_go(self) -> None:
        """See ``PayloadSource.let_go``."""
        super().let_go()
        self._aliases = []

    def check_unchanged(self) -> None:
        """Compare every tensor's version with the one it had when the save began.

        Raises:
            SaveError: names the first tensor that changed.
        """
        now: Sequence[int | None] = [_version(tensor) for tensor in self.payload.tensors]
        if now == self._versions:
            return
        changed = next(n for n, (a, b) in enumerate(zip(now, self._versions, strict=True)) if a != b)
        raise SaveError(
            f"{self.payload.component}.{self.payload.boxes[changed].name} changed while it was being saved. "
            "save(block=True), and a save that finds no memory to stage in, send tensors from where they are: change "
            "nothing until the call returns. Nothing of this save became visible"
        )

    def seal(self) -> tuple[PayloadObject, list[int]]:
        """See ``PayloadSource.seal``."""
        sealed = super().seal()
        self.check_unchanged()
        return sealed


def _version(tensor: torch.Tensor) -> int | None:
    # Made under inference_mode: torch keeps no version, and refuses to tell one.
    return None if tensor.is_inference() else tensor._version  # noqa: SLF001 - documented by torch under this name
