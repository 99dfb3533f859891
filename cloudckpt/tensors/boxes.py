"""Parts of tensors, as each rank of a job has them: which bytes a box needs, and how they come into its memory.

A chunk of which a box needs little is read by cells (see ``core.cells``); one that it needs for the most part, as a
whole. What lies in the box as it is stored is read straight into it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from cloudckpt.config import Settings
from cloudckpt.core.cells import Block, CellPlan, Grid, Reached, plan_blocks, plan_cells
from cloudckpt.core.model import Chunk, PayloadObject, TensorEntry
from cloudckpt.core.ranges import contiguous_start
from cloudckpt.tensors.dcp import Copy, plan_copies
from cloudckpt.tensors.extents import Cell, Detour, Extent, Flat, Home, Piece, WholeChunk, narrowed, on_host
from cloudckpt.tensors.landing import byte_tensor
from cloudckpt.tensors.memory import copy_bits, typed_view
from cloudckpt.tensors.targets import Part

__all__ = ["Boxes", "plan_boxes"]


@dataclass(frozen=True, slots=True)
class Boxes:
    """What is read for some boxes, and what is left to do afterwards.

    Attributes:
        extents: what is read.
        left: copies of what was read as a whole and belongs elsewhere.
    """

    extents: Sequence[Extent]
    left: Sequence[Callable[[], None]]

    def assemble(self) -> None:
        """Copy what was read elsewhere."""
        for copy in self.left:
            copy()


@dataclass(frozen=True, slots=True)
class _Need:
    """What one chunk has for one box.

    Attributes:
        local: the box's memory.
        copy: from where in the chunk to where in it.
        chunk: the chunk.
        blocks: the same by bytes, each with the element of the box's memory where it lies flat; None if the chunk must
            be read as a whole.
    """

    local: torch.Tensor
    copy: Copy
    chunk: Chunk
    blocks: Sequence[tuple[Block, int | None]] | None

    def reached(self) -> Reached:
        chunk, runs = self.chunk, None
        if self.blocks is not None:
            runs = tuple((chunk.start + block.start, block.length) for block, _ in self.blocks)
        return Reached(chunk.object, chunk.start, chunk.length, runs)


def plan_boxes(
    boxes: Sequence[tuple[TensorEntry, Part]], objects: Sequence[PayloadObject], settings: Settings
) -> Boxes:
    """Plan to fill the boxes, all of them together: tensors beside each other share cells.

    Args:
        boxes: of which tensor, and the part of it.
        objects: the payload objects that the tensors lie in.
    """
    with_cells = {item.name: item for item in objects if item.cells is not None}
    grids = {item.name: Grid(item.size_bytes, item.cells.size_bytes) for item in with_cells.values() if item.cells}
    needs = [
        _need(part.local, copy, entry.chunks[copy.chunk], grids, settings)
        for entry, part in boxes
        if part.local.numel()
        for copy in plan_copies(entry, offsets=part.offsets, lengths=tuple(part.local.shape))
    ]
    plan = plan_cells([need.reached() for need in needs], grids)
    extents: list[Extent] = []
    left: list[Callable[[], None]] = []
    homes: dict[str, list[Piece]] = {name: [] for name in plan.cells}
    for number, need in enumerate(needs):
        if number in plan.chunks:
            homes[need.chunk.object] += [_piece(need, block, first) for block, first in need.blocks or ()]
        else:
            extents.append(_whole(need, left))
    extents += _cells(plan, grids, with_cells, homes)
    return Boxes(extents, left)


def _need(local: torch.Tensor, copy: Copy, chunk: Chunk, grids: dict[str, Grid], settings: Settings) -> _Need:
    grid = grids.get(chunk.object)
    if grid is None:
        return _Need(local, copy, chunk, None)
    found = plan_blocks(
        chunk.lengths,
        copy.chunk_offsets,
        copy.lengths,
        item_bytes=local.dtype.itemsize,
        # What is closer than a cell lies in the same one, or in the next.
        gap_bytes=max(settings.read_gap_bytes, grid.cell_bytes - 1),
        most_bytes=settings.max_read_bytes,
    )
    blocks = [(block, _place(block, copy, local)) for block in found]
    # Only what lies flat is carried to a device on the way; the rest of it is copied there when all has been read.
    on_the_way = on_host(local) or all(first is not None for _, first in blocks)
    return _Need(local, copy, chunk, blocks if on_the_way else None)


def _place(block: Block, copy: Copy, local: torch.Tensor) -> int | None:
    """The element of the box's memory from which the block lies in it as it is stored; None if it does not."""
    if math.prod(block.lengths) * local.dtype.itemsize != block.length:
        return None
    return contiguous_start(tuple(local.shape), _moved(block, copy), block.lengths)


def _moved(block: Block, copy: Copy) -> list[int]:
    """Where in the box a block of the chunk belongs."""
    places = zip(block.offsets, copy.chunk_offsets, copy.target_offsets, strict=True)
    return [mine - first + target for mine, first, target in places]


def _piece(need: _Need, block: Block, first: int | None) -> Piece:
    """A block, by its bytes in the object."""
    home: Home
    if first is not None:
        home = Flat(byte_tensor(need.local)[first * need.local.dtype.itemsize :][: block.length])
    else:
        target = narrowed(need.local, _moved(block, need.copy), block.lengths)
        home = Detour(target, _strides(need.chunk.lengths), block.length)
    return Piece(need.chunk.start + block.start, block.length, home, 0)


def _strides(shape: Sequence[int]) -> list[int]:
    """How far apart the neighbours in a row-major array of this shape are, elements per dimension."""
    return [math.prod(shape[dimension + 1 :]) for dimension in range(len(shape))]


def _cells(
    plan: CellPlan,
    grids: dict[str, Grid],
    objects: dict[str, PayloadObject],
    wanted: dict[str, list[Piece]],
) -> list[Extent]:
    """The cells that are read, each with what is wanted of it."""
    found: list[Extent] = []
    for name, numbers in plan.cells.items():
        grid, cells = grids[name], objects[name].cells
        inside: dict[int, list[Piece]] = {number: [] for number in numbers}
        for piece in sorted(wanted[name], key=lambda piece: piece.start):
            for number in grid.reached(piece.start, piece.length):
                start, length = grid.extent(number)
                first, stop = max(start, piece.start), min(start + length, piece.start + piece.length)
                inside[number].append(Piece(first - start, stop - first, piece.home, first - piece.start))
                piece.home.expect()
        for number, pieces in inside.items():
            start, length = grid.extent(number)
            crc32c = cells.crc32c[number] if cells else 0
            found.append(Cell(object=name, start=start, length=length, crc32c=crc32c, wanted=pieces))
    return found


def _whole(need: _Need, left: list[Callable[[], None]]) -> WholeChunk:
    """Chunks that lie in the box as they are stored are read straight into it."""
    local, copy, chunk = need.local, need.copy, need.chunk
    start = contiguous_start(tuple(local.shape), copy.target_offsets, copy.lengths)
    if copy.lengths == chunk.lengths and start is not None:
        return WholeChunk.of(chunk, byte_tensor(local)[start * local.dtype.itemsize :][: chunk.length])
    home = torch.empty(chunk.length, dtype=torch.uint8, device="cpu")

    def assemble() -> None:
        source = typed_view(home, 0, local.dtype, chunk.lengths)
        copy_bits(
            narrowed(local, copy.target_offsets, copy.lengths), narrowed(source, copy.chunk_offsets, copy.lengths)
        )

    left.append(assemble)
    return WholeChunk.of(chunk, home)
