"""Which cells of a payload object a process reads that needs only parts of its chunks.

The index has a sum for each chunk and, in larger objects, for each cell: a piece of one size, counted from the object's
first byte. Of a chunk that is needed only in part, the cells that this part reaches into are read and proven.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Block", "CellPlan", "Grid", "Reached", "plan_blocks", "plan_cells"]

#: Less than one eighth saved is not worth a second way of reading.
_WORTHWHILE = 7 / 8


@dataclass(frozen=True, slots=True)
class Block:
    """A box of an array, and the bytes from its first element to its last.

    Attributes:
        start: the byte of the array at which it begins.
        length: how many bytes from there to the end of its last element; others may lie between.
        offsets: where it begins, elements per dimension.
        lengths: its own shape.
    """

    start: int
    length: int
    offsets: tuple[int, ...]
    lengths: tuple[int, ...]


def plan_blocks(
    shape: Sequence[int],
    offsets: Sequence[int],
    lengths: Sequence[int],
    *,
    item_bytes: int,
    gap_bytes: int,
    most_bytes: int,
) -> tuple[Block, ...]:
    """A box of a row-major array as blocks, in the order of their bytes: together they are the box, none overlaps.

    Args:
        shape: the array's shape.
        offsets: where the box begins, elements per dimension.
        lengths: the box's own shape; nothing is planned for an empty one.
        item_bytes: the size of an element.
        gap_bytes: runs with no more than this between them are one block.
        most_bytes: larger blocks are cut, if they have more than one element.
    """
    strides = [item_bytes] * len(shape)
    for dimension in reversed(range(len(shape) - 1)):
        strides[dimension] = strides[dimension + 1] * shape[dimension + 1]
    if not all(lengths):
        return ()
    cutting = _Cutting(strides, item_bytes, gap_bytes, most_bytes)
    return tuple(cutting.blocks(tuple(offsets), tuple(lengths)))


@dataclass(frozen=True, slots=True)
class _Cutting:
    """A box into blocks: the array's strides in bytes, and what is too far apart or too large."""

    strides: Sequence[int]
    item_bytes: int
    gap_bytes: int
    most_bytes: int

    def blocks(self, offsets: tuple[int, ...], lengths: tuple[int, ...]) -> Iterator[Block]:
        """The outermost dimension that is longer than 1 is walked if its slices lie apart, or are too much together.

        Slices further in never lie further apart.
        """
        start = sum(offset * stride for offset, stride in zip(offsets, self.strides, strict=True))
        length = self._extent(lengths)
        outer = next((d for d, n in enumerate(lengths) if n > 1), None)
        together = 1 if outer is None else self._together(outer, lengths, length)
        if outer is None or together == lengths[outer]:
            yield Block(start, length, offsets, lengths)
            return
        for first in range(0, lengths[outer], together):
            moved = (*offsets[:outer], offsets[outer] + first, *offsets[outer + 1 :])
            some = (*lengths[:outer], min(together, lengths[outer] - first), *lengths[outer + 1 :])
            yield from self.blocks(moved, some)

    def _together(self, outer: int, lengths: tuple[int, ...], length: int) -> int:
        """How many slices of a dimension are one block."""
        stride, in_slice = self.strides[outer], self._extent((*lengths[:outer], 1, *lengths[outer + 1 :]))
        if stride - in_slice > self.gap_bytes:
            return 1
        return lengths[outer] if length <= self.most_bytes else max(1, (self.most_bytes - in_slice) // stride + 1)

    def _extent(self, lengths: Sequence[int]) -> int:
        return sum((n - 1) * stride for n, stride in zip(lengths, self.strides, strict=True)) + self.item_bytes


@dataclass(frozen=True, slots=True)
class Grid:
    """A payload object's size, and that of its cells, in bytes."""

    size_bytes: int
    cell_bytes: int

    def reached(self, start: int, length: int) -> range:
        """The numbers of the cells that a range of bytes reaches into."""
        return range(start // self.cell_bytes, -(-(start + length) // self.cell_bytes))

    def extent(self, number: int) -> tuple[int, int]:
        """Where a cell begins, and its length."""
        start = number * self.cell_bytes
        return start, min(self.cell_bytes, self.size_bytes - start)


@dataclass(frozen=True, slots=True)
class Reached:
    """A chunk of which something is needed.

    Attributes:
        object: the payload object it lies in.
        start: its first byte there.
        length: its size in bytes.
        runs: start and length of what is needed, in bytes of the object; None if it can only be taken as a whole.
    """

    object: str
    start: int
    length: int
    runs: tuple[tuple[int, int], ...] | None


@dataclass(frozen=True, slots=True)
class CellPlan:
    """What is read by cells.

    Attributes:
        chunks: the numbers of the chunks that are filled from cells; the others are read as a whole.
        cells: by object, the numbers of the cells that are read, in order, each once.
    """

    chunks: frozenset[int]
    cells: Mapping[str, tuple[int, ...]]


def plan_cells(chunks: Sequence[Reached], grids: Mapping[str, Grid]) -> CellPlan:
    """Which chunks to read by the cells that their runs reach into: where that is clearly less than the whole.

    What another chunk's cells bring along anyway is taken from them. Chunks that share bytes, which no writer of ours
    makes, are read as a whole, each for itself.

    Args:
        chunks: all chunks of which something is needed.
        grids: the objects that have cells.
    """
    chosen: set[int] = set()
    cells: dict[str, set[int]] = {}
    able = [n for n in _apart(chunks) if chunks[n].object in grids]
    for number in able:
        chunk = chunks[number]
        grid = grids[chunk.object]
        reached = {cell for run in chunk.runs or () for cell in grid.reached(*run)}
        if sum(grid.extent(cell)[1] for cell in reached) < chunk.length * _WORTHWHILE:
            chosen.add(number)
            cells.setdefault(chunk.object, set()).update(reached)
    for number in able:
        chunk = chunks[number]
        if cells.get(chunk.object, set()).issuperset(grids[chunk.object].reached(chunk.start, chunk.length)):
            chosen.add(number)
    return CellPlan(frozenset(chosen), {name: tuple(sorted(numbers)) for name, numbers in cells.items()})


def _apart(chunks: Sequence[Reached]) -> list[int]:
    """The chunks that may be taken in parts, unless they share bytes with another one of their object."""
    order = sorted(range(len(chunks)), key=lambda n: (chunks[n].object, chunks[n].start, chunks[n].length))
    sharing = {
        chunks[one].object
        for one, two in itertools.pairwise(n for n in order if chunks[n].length)
        if chunks[one].object == chunks[two].object and chunks[one].start + chunks[one].length > chunks[two].start
    }
    return [n for n in order if chunks[n].object not in sharing and chunks[n].runs and chunks[n].length]
