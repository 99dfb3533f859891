"""Sealed bytes on their way: what the index has a sum for, and where it goes.

An extent is a chunk as a whole, or a cell of an object that holds parts of several. A home is where bytes belong: flat
memory of any device, or for what is scattered over its tensor a detour through host memory.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from cloudckpt.core.model import Chunk
from cloudckpt.tensors.memory import copy_bits, same_bits_dtype

__all__ = ["Cell", "Detour", "Extent", "Flat", "Home", "Piece", "WholeChunk", "narrowed", "on_host"]


class Home(ABC):
    """Where some bytes of an object belong.

    Attributes:
        on_host: whether it is host memory.
    """

    on_host = True

    @abstractmethod
    def view(self) -> memoryview | None:
        """All of it as a plain buffer; None if it is on a device."""

    @abstractmethod
    def flat(self) -> torch.Tensor:
        """The same as a tensor of bytes, on whatever device."""

    @abstractmethod
    def expect(self) -> None:
        """One more extent brings something of it."""

    @abstractmethod
    def proven(self) -> None:
        """What one extent brings of it is there, and is what was sealed."""


class Flat(Home):
    """Memory in which the bytes lie as they are stored."""

    def __init__(self, flat: torch.Tensor) -> None:
        self._flat = flat
        self.on_host = on_host(flat)
        self._view = memoryview(flat.numpy()) if self.on_host else None  # type: ignore[arg-type]  # an ndarray is a buffer; its stub says so from 3.12 on

    def view(self) -> memoryview | None:
        """See ``Home.view``."""
        return self._view

    def flat(self) -> torch.Tensor:
        """See ``Home.flat``."""
        return self._flat

    def expect(self) -> None:
        """See ``Home.expect``. Nothing is left to be done."""

    def proven(self) -> None:
        """See ``Home.proven``. Nothing is left to be done."""


class Detour(Home):
    """Host memory for a block of which the elements lie apart in their tensor. Made when its first bytes come.

    Args:
        target: the box of the tensor that the block fills.
        strides: how the block's elements lie in it, elements per dimension.
        size_bytes: the block's size.
    """

    def __init__(self, target: torch.Tensor, strides: Sequence[int], size_bytes: int) -> None:
        self._target = target
        self._strides = tuple(strides)
        self._size_bytes = size_bytes
        self._mutex = threading.Lock()
        self._memory: torch.Tensor | None = None
        self._view = memoryview(b"")
        self._missing = 0

    def view(self) -> memoryview:
        """See ``Home.view``."""
        self.flat()
        return self._view

    def flat(self) -> torch.Tensor:
        """See ``Home.flat``."""
        with self._mutex:
            if self._memory is None:
                self._memory = torch.empty(self._size_bytes, dtype=torch.uint8, device="cpu")
                self._view = memoryview(self._memory.numpy())  # type: ignore[arg-type]  # as above
            return self._memory

    def expect(self) -> None:
        """See ``Home.expect``."""
        self._missing += 1

    def proven(self) -> None:
        """See ``Home.proven``. After the last one, its elements are copied to where they belong."""
        with self._mutex:
            self._missing -= 1
            if self._missing or self._memory is None:
                return
            memory, self._memory, self._view = self._memory, None, memoryview(b"")
        typed = memory.view(same_bits_dtype(self._target.dtype))
        # Threads of their own have none of the caller's modes; torch writes to inference tensors in no other.
        with torch.inference_mode(mode=self._target.is_inference()):
            copy_bits(self._target.view(typed.dtype), typed.as_strided(self._target.shape, self._strides))


@dataclass(frozen=True, slots=True)
class Piece:
    """``length`` bytes of an extent from its byte ``start`` that belong at byte ``at`` of a home."""

    start: int
    length: int
    home: Home
    at: int


@dataclass(slots=True, kw_only=True)
class Extent(ABC):
    """Bytes of an object that were sealed with one sum, on their way.

    Attributes:
        object: the payload object they lie in.
        start: the first of them there.
        length: how many.
        crc32c: the sum they were sealed with.
        sums: start, sum and length of what has come of it.
        missing: bytes that have not come yet.
    """

    object: str
    start: int
    length: int
    crc32c: int
    sums: list[tuple[int, int, int]] = field(default_factory=list)
    missing: int = field(init=False)

    def __post_init__(self) -> None:
        self.missing = self.length

    @abstractmethod
    def views(self, start: int, length: int, scratch: Callable[[int], memoryview]) -> Sequence[memoryview] | None:
        """Where some of its bytes go, one after the other; None if any of them belongs on a device.

        Args:
            scratch: gives memory for so many bytes that nobody wants.
        """

    @abstractmethod
    def pieces(self, start: int, length: int) -> Iterator[Piece]:
        """What is wanted of some of its bytes; each piece begins at that byte of the extent."""

    @abstractmethod
    def devices(self) -> Iterable[torch.device]:
        """Of what does not belong on the host."""

    @abstractmethod
    def proven(self) -> None:
        """It is what was sealed."""


@dataclass(slots=True, kw_only=True)
class WholeChunk(Extent):
    """A chunk of which all bytes go to one place."""

    home: Flat

    @classmethod
    def of(cls, chunk: Chunk, home: torch.Tensor) -> WholeChunk:
        """A chunk, and the flat bytes where it belongs."""
        return cls(object=chunk.object, start=chunk.start, length=chunk.length, crc32c=chunk.crc32c, home=Flat(home))

    def views(
        self,
        start: int,
        length: int,
        scratch: Callable[[int], memoryview],  # noqa: ARG002 - all of it is wanted
    ) -> Sequence[memoryview] | None:
        """See ``Extent.views``."""
        view = self.home.view()
        return None if view is None else (view[start : start + length],)

    def pieces(self, start: int, length: int) -> Iterator[Piece]:
        """See ``Extent.pieces``."""
        yield Piece(start, length, self.home, start)

    def devices(self) -> Iterable[torch.device]:
        """See ``Extent.devices``."""
        return () if self.home.on_host else (self.home.flat().device,)

    def proven(self) -> None:
        """See ``Extent.proven``. It is where it belongs."""


@dataclass(slots=True, kw_only=True)
class Cell(Extent):
    """A cell of an object: some of its bytes are wanted, the others only prove them.

    Attributes:
        wanted: what is wanted of it, in the order of its bytes; none overlap.
    """

    wanted: Sequence[Piece]

    def views(self, start: int, length: int, scratch: Callable[[int], memoryview]) -> Sequence[memoryview] | None:
        """See ``Extent.views``."""
        found, at = [], start
        for piece in self.pieces(start, length):
            view = piece.home.view()
            if view is None:
                return None
            if piece.start > at:
                found.append(scratch(piece.start - at))
            found.append(view[piece.at : piece.at + piece.length])
            at = piece.start + piece.length
        if at < start + length:
            found.append(scratch(start + length - at))
        return found

    def pieces(self, start: int, length: int) -> Iterator[Piece]:
        """See ``Extent.pieces``."""
        for piece in self.wanted:
            first, stop = max(start, piece.start), min(start + length, piece.start + piece.length)
            if first < stop:
                yield Piece(first, stop - first, piece.home, piece.at + first - piece.start)

    def devices(self) -> Iterable[torch.device]:
        """See ``Extent.devices``."""
        return (piece.home.flat().device for piece in self.wanted if not piece.home.on_host)

    def proven(self) -> None:
        """See ``Extent.proven``."""
        for piece in self.wanted:
            piece.home.proven()


def on_host(tensor: torch.Tensor) -> bool:
    """Whether a tensor can be read into."""
    return tensor.device.type == "cpu"


def narrowed(tensor: torch.Tensor, offsets: Sequence[int], lengths: Sequence[int]) -> torch.Tensor:
    """A box of a tensor, as a view of it."""
    for dimension, (offset, length) in enumerate(zip(offsets, lengths, strict=True)):
        tensor = tensor.narrow(dimension, offset, length)
    return tensor
