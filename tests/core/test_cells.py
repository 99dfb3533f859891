"""Boxes as blocks of bytes, and the cells they reach into: all that is needed, little else, nothing twice."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudckpt.core.cells import Block, CellPlan, Grid, Reached, plan_blocks, plan_cells

ITEM = 2


@dataclass(frozen=True)
class Box:
    """A box of an array."""

    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    lengths: tuple[int, ...]

    def elements(self, offsets: tuple[int, ...], lengths: tuple[int, ...]) -> list[int]:
        """The numbers of a box's elements in row-major order."""
        found = []
        for index in itertools.product(*[range(o, o + n) for o, n in zip(offsets, lengths, strict=True)]):
            number = 0
            for place, size in zip(index, self.shape, strict=True):
                number = number * size + place
            found.append(number)
        return found


@st.composite
def boxes(draw: st.DrawFn) -> Box:
    """Any box of an array of up to four dimensions that is not empty."""
    shape = draw(st.lists(st.integers(1, 6), max_size=4).map(tuple))
    lengths = tuple(draw(st.integers(1, size)) for size in shape)
    offsets = tuple(draw(st.integers(0, size - length)) for size, length in zip(shape, lengths, strict=True))
    return Box(shape, offsets, lengths)


def blocks_of(box: Box, *, gap_bytes: int = 0, most_bytes: int = 10**9) -> tuple[Block, ...]:
    """The box's blocks, its elements being of two bytes."""
    return plan_blocks(box.shape, box.offsets, box.lengths, item_bytes=ITEM, gap_bytes=gap_bytes, most_bytes=most_bytes)


# -- blocks --------------------------------------------------------------------------------------------------


@given(boxes(), st.integers(0, 40), st.integers(1, 60))
def test_the_blocks_are_the_box_in_the_order_of_its_bytes(box: Box, gap: int, most: int) -> None:
    """Each element of the box is in one block, each block spans its elements, is small enough, and has no wide gap."""
    found, end = [], 0
    for block in blocks_of(box, gap_bytes=gap, most_bytes=most):
        inside = box.elements(block.offsets, block.lengths)
        assert (block.start, block.length) == (inside[0] * ITEM, (inside[-1] + 1 - inside[0]) * ITEM)
        assert block.start >= end
        assert block.length <= most or len(inside) == 1
        assert all((two - one - 1) * ITEM <= gap for one, two in itertools.pairwise(inside))
        end = block.start + block.length
        found += inside
    assert found == box.elements(box.offsets, box.lengths)


@given(boxes(), st.integers(0, 40))
def test_runs_that_lie_close_are_one_block(box: Box, gap: int) -> None:
    """Between two blocks there is more than the gap; where nothing is cut, that is all that makes a second block."""
    inside = box.elements(box.offsets, box.lengths)
    apart = sum((two - one - 1) * ITEM > gap for one, two in itertools.pairwise(inside))
    assert len(blocks_of(box, gap_bytes=gap)) == apart + 1


def test_an_empty_box_has_no_blocks() -> None:
    """Nothing is needed of it."""
    assert blocks_of(Box((3, 4), (0, 0), (3, 0))) == ()


def test_a_block_of_a_third_dimension_is_cut_within_its_slices() -> None:
    """Where one slice is too much already, its own slices are put together as far as they go."""
    found = blocks_of(Box((2, 5, 4), (0, 0, 0), (2, 5, 4)), most_bytes=20)
    assert [block.lengths for block in found] == [(1, 2, 4), (1, 2, 4), (1, 1, 4)] * 2


def test_columns_of_a_large_matrix_are_a_block_for_each_row() -> None:
    """A quarter of 4 rows of 64 MiB each is 4 blocks of 16 MiB; of 4096 rows of 64 KiB it is blocks of many rows."""
    mib = 2**20
    wide = blocks_of(Box((4, 32 * mib), (0, 8 * mib), (4, 8 * mib)), gap_bytes=2 * mib - 1, most_bytes=32 * mib)
    assert [(block.start, block.length) for block in wide] == [((64 * n + 16) * mib, 16 * mib) for n in range(4)]
    narrow = blocks_of(Box((4096, 32768), (0, 0), (4096, 8192)), gap_bytes=2 * mib - 1, most_bytes=32 * mib)
    assert [block.lengths[0] for block in narrow] == [512] * 8


# -- cells ---------------------------------------------------------------------------------------------------


def test_a_cell_is_counted_from_the_first_byte_of_the_object() -> None:
    """The last one may be shorter; a range reaches from the cell of its first byte to that of its last."""
    grid = Grid(25, 10)
    assert [grid.extent(number) for number in range(3)] == [(0, 10), (10, 10), (20, 5)]
    assert grid.reached(9, 1) == range(1)
    assert grid.reached(9, 2) == range(2)
    assert grid.reached(10, 15) == range(1, 3)


@pytest.mark.parametrize(
    ("runs", "read"),
    [
        (((105, 10),), (10, 11)),
        (((110, 10), (190, 5)), (11, 19)),
        (((100, 80),), (10, 11, 12, 13, 14, 15, 16, 17)),
        (((100, 81),), ()),  # nine cells of ten
        (None, ()),
    ],
)
def test_a_chunk_is_read_by_cells_where_that_is_clearly_less(
    runs: tuple[tuple[int, int], ...] | None, read: tuple[int, ...]
) -> None:
    """Of ten cells at most eight; otherwise, and if it can only be taken as a whole, it is read as a whole."""
    plan = plan_cells([Reached("a", 100, 100, runs)], {"a": Grid(1000, 10)})
    assert plan == (CellPlan(frozenset({0}), {"a": read}) if read else CellPlan(frozenset(), {}))


def test_an_object_without_cells_is_read_by_chunks() -> None:
    """What was written before there were cells is read as before."""
    assert plan_cells([Reached("a", 0, 100, ((0, 1),))], {"b": Grid(1000, 10)}) == CellPlan(frozenset(), {})


def test_neighbours_share_a_cell_and_a_small_chunk_in_it_comes_along() -> None:
    """Two chunks' runs end in the same cell, which is read once; the chunk between them lies in it."""
    chunks = [
        Reached("a", 0, 95, ((85, 10),)),
        Reached("a", 95, 3, ((95, 3),)),
        Reached("a", 98, 102, ((98, 10),)),
        Reached("a", 200, 3, ((200, 3),)),
    ]
    assert plan_cells(chunks, {"a": Grid(1000, 10)}) == CellPlan(frozenset({0, 1, 2}), {"a": (8, 9, 10)})


def test_chunks_that_share_bytes_are_read_as_a_whole() -> None:
    """Each byte that is read belongs to one chunk only; in another object nothing changes."""
    chunks = [
        Reached("model", 0, 100, ((0, 10),)),
        Reached(str(b"model", "ascii"), 99, 100, ((100, 10),)),  # an equal name, as each that was decoded
        Reached("other", 0, 100, ((0, 10),)),
    ]
    grids = {name: Grid(1000, 10) for name in ("model", "other")}
    assert plan_cells(chunks, grids) == CellPlan(frozenset({2}), {"other": (0,)})


@st.composite
def reached(draw: st.DrawFn, object_bytes: int) -> list[Reached]:
    """Chunks of an object that share no bytes, and some runs of each."""
    points = sorted(draw(st.lists(st.integers(0, object_bytes), max_size=10)))
    found = []
    for start, stop in itertools.pairwise(points):
        ends = sorted(draw(st.lists(st.integers(start, stop), max_size=6, unique=True)))
        runs = tuple((a, b - a) for a, b in itertools.pairwise(ends))[::2]
        found.append(Reached("a", start, stop - start, draw(st.sampled_from([runs, runs, None]))))
    return found


@given(st.data(), st.integers(1, 400), st.sampled_from([1, 4, 16, 64]))
def test_the_cells_are_what_is_needed_and_little_else(data: st.DataObject, size: int, cell: int) -> None:
    """Every run of a chosen chunk is covered, every cell is reached by one, and no run brings two cells too much."""
    chunks, grid = data.draw(reached(size)), Grid(size, cell)
    plan = plan_cells(chunks, {"a": grid})
    cells = plan.cells.get("a", ())
    assert list(cells) == sorted({*cells})
    covered = {byte for number in cells for byte in range(grid.extent(number)[0], sum(grid.extent(number)))}
    runs = [run for number in plan.chunks for run in chunks[number].runs or ()]
    needed = {byte for start, length in runs for byte in range(start, start + length)}
    assert needed <= covered
    assert all(needed & {*range(grid.extent(number)[0], sum(grid.extent(number)))} for number in cells)
    assert len(covered) - len(needed) <= 2 * (cell - 1) * len(runs)
    for number in {*range(len(chunks))} - plan.chunks:
        reaching = {cell for run in chunks[number].runs or () for cell in grid.reached(*run)}
        assert sum(grid.extent(n)[1] for n in reaching) >= chunks[number].length * 7 / 8 or not chunks[number].runs
