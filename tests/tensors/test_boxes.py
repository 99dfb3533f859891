"""A box out of stored chunks: its bits, the bytes that are read for it, and how damage in them is found."""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from crc32c import crc32c
from hypothesis import given, settings
from hypothesis import strategies as st

from cloudckpt.config import Settings
from cloudckpt.core import keys
from cloudckpt.core.model import Cells, Chunk, PayloadObject, TensorEntry
from cloudckpt.errors import CorruptCheckpointError
from cloudckpt.storage import MemoryStorage
from cloudckpt.tensors import boxes, extents
from cloudckpt.tensors.boxes import plan_boxes
from cloudckpt.tensors.memory import dtype_name
from cloudckpt.tensors.reading import Reading
from cloudckpt.tensors.targets import Part
from cloudckpt.testing.builders import checkpoint

CELL = 4096
NAME = keys.payload_name("model", 0, 1)
SETTINGS = Settings(read_gap_bytes=1, io_threads=4)


class Counted(MemoryStorage):
    """Remembers which bytes were asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.ranges: list[tuple[int, int]] = []
        self._count = threading.Lock()

    def read_into(self, key: str, start: int, *targets: memoryview) -> None:
        """See ``Storage.read_into``."""
        with self._count:
            self.ranges.append((start, sum(map(len, targets))))
        super().read_into(key, start, *targets)

    @property
    def bytes_read(self) -> int:
        """How many bytes were asked for."""
        return sum(length for _, length in self.ranges)


@dataclass(frozen=True)
class Wanted:
    """A box of a tensor, and what the tensor is."""

    whole: torch.Tensor
    offsets: tuple[int, ...]
    lengths: tuple[int, ...]

    def part(self) -> Part:
        """Memory for it, of which every bit is wrong."""
        local = torch.full(self.lengths, 99, dtype=self.whole.dtype)
        return Part(value=local, local=local, offsets=self.offsets)

    def expected(self) -> torch.Tensor:
        """What it is."""
        box = self.whole
        for dimension, (offset, length) in enumerate(zip(self.offsets, self.lengths, strict=True)):
            box = box.narrow(dimension, offset, length)
        return box


class Stored:
    """Tensors in one payload object, in chunks of any boxes."""

    def __init__(self, *, cells: bool = True) -> None:
        self.storage = Counted()
        self.entry = checkpoint(100)
        self.key = keys.payload_key(self.entry.step, self.entry.id, NAME)
        self._body = bytearray(320)
        self._cells = cells

    def add(self, tensor: torch.Tensor, parts: Sequence[int] | None = None) -> TensorEntry:
        """Store a tensor, cut into so many pieces along each dimension."""
        self._body += bytes(-len(self._body) % 16)
        cuts = [
            sorted({size * n // count for n in range(count + 1)})
            for size, count in zip(tensor.shape, parts or [1] * tensor.dim(), strict=True)
        ]
        chunks = []
        for box in itertools.product(*[itertools.pairwise(cut) for cut in cuts]):
            piece = tensor[tuple(slice(a, b) for a, b in box)] if box else tensor
            body = piece.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            chunks.append(
                Chunk(
                    object=NAME,
                    start=len(self._body),
                    length=len(body),
                    offsets=tuple(a for a, _ in box),
                    lengths=tuple(piece.shape),
                    crc32c=crc32c(body),
                )
            )
            self._body += body
        return TensorEntry(dtype=dtype_name(tensor.dtype), shape=tuple(tensor.shape), chunks=tuple(chunks))

    def sealed(self) -> PayloadObject:
        """The object as the index tells it."""
        body = bytes(self._body)
        cells = Cells(size_bytes=CELL, crc32c=tuple(crc32c(body[at : at + CELL]) for at in range(0, len(body), CELL)))
        return PayloadObject(name=NAME, size_bytes=len(body), crc32c=crc32c(body), cells=cells if self._cells else None)

    def read(
        self, wanted: Sequence[tuple[TensorEntry, Part]], settings: Settings = SETTINGS, *, damaged: int | None = None
    ) -> None:
        """Fill the boxes, perhaps after a byte of the object was damaged."""
        body = bytearray(self._body)
        if damaged is not None:
            body[damaged] ^= 1
        self.storage.put(self.key, [body], size_bytes=len(body))
        planned = plan_boxes(wanted, [self.sealed()], settings)
        Reading(self.storage, self.entry, planned.extents, settings).run()
        planned.assemble()


def numbers(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    """A tensor of which each element is another."""
    return torch.arange(math.prod(shape), dtype=dtype).reshape(shape)


@st.composite
def wanted(draw: st.DrawFn) -> tuple[Wanted, list[int]]:
    """A box of a tensor of up to three dimensions, and into how many pieces along each of them it is stored."""
    shape = draw(st.lists(st.sampled_from([1, 2, 3, 7, 40, 150]), max_size=3))
    if math.prod(shape) > 30_000:
        shape[0] = 1
    lengths = tuple(draw(st.integers(0 if size > 2 else 1, size)) for size in shape)
    offsets = tuple(draw(st.integers(0, size - length)) for size, length in zip(shape, lengths, strict=True))
    dtype = draw(st.sampled_from([torch.int32, torch.int64, torch.uint8, torch.bfloat16]))
    return Wanted(numbers(*shape, dtype=dtype), offsets, lengths), [draw(st.integers(1, 3)) for _ in shape]


@settings(deadline=None)
@given(st.lists(wanted(), min_size=1, max_size=4), st.sampled_from([1, 5000]), st.sampled_from([3000, 2**25]))
def test_any_boxes_of_any_chunks_have_their_bits(
    tensors: list[tuple[Wanted, list[int]]], gap_bytes: int, most_bytes: int
) -> None:
    """Whatever is cut how, and whatever the requests: each box is that part of its tensor, with cells or without."""
    chosen = Settings(read_gap_bytes=gap_bytes, max_read_bytes=most_bytes, io_threads=2)
    read = []
    for cells in (True, False):
        stored = Stored(cells=cells)
        entries = [stored.add(box.whole, parts) for box, parts in tensors]
        parts = [box.part() for box, _ in tensors]
        stored.read(list(zip(entries, parts, strict=True)), chosen)
        for (box, _), part in zip(tensors, parts, strict=True):
            assert torch.equal(part.local, box.expected())
        read.append(stored.storage.bytes_read)
    assert read[0] <= read[1] + CELL


@pytest.mark.parametrize("host", [(), (torch.int32,)], ids=["all on a device", "some on the host"])
@settings(deadline=None)
@given(tensors=st.lists(wanted(), min_size=1, max_size=4), most_bytes=st.sampled_from([6000, 2**25]))
def test_what_belongs_on_a_device_goes_by_way_of_buffers(
    host: tuple[torch.dtype, ...], tensors: list[tuple[Wanted, list[int]]], most_bytes: int
) -> None:
    """As if their memory were not the host's: read into a buffer, proven there, carried on."""
    stored = Stored()
    entries = [stored.add(box.whole, parts) for box, parts in tensors]
    parts = [box.part() for box, _ in tensors]
    here = {part.local.untyped_storage().data_ptr() for part in parts if part.local.dtype in host}
    there = {part.local.untyped_storage().data_ptr() for part in parts} - here
    with pytest.MonkeyPatch.context() as patch:
        for module in (boxes, extents):
            patch.setattr(module, "on_host", lambda tensor: tensor.untyped_storage().data_ptr() not in there)
        stored.read(list(zip(entries, parts, strict=True)), replace(SETTINGS, max_read_bytes=most_bytes))
    for (box, _), part in zip(tensors, parts, strict=True):
        assert torch.equal(part.local, box.expected())


# -- what is read ------------------------------------------------------------------------------------------------


def test_rows_are_read_with_the_cells_they_end_in() -> None:
    """A quarter of the rows of a tensor: its bytes and at most two cells, straight into place but for the ends."""
    stored = Stored()
    box = Wanted(numbers(64, 1024), (16, 0), (16, 1024))
    part, entry = box.part(), stored.add(box.whole)
    stored.read([(entry, part)])
    assert torch.equal(part.local, box.expected())
    ((start, length),) = stored.storage.ranges
    assert (start % CELL, length) == (0, 17 * CELL)


def test_columns_of_long_rows_are_read_without_the_others() -> None:
    """A quarter of each of four long rows is four ranges, each with at most two cells more."""
    stored = Stored()
    box = Wanted(numbers(4, 64 * 1024), (0, 16 * 1024), (4, 16 * 1024))
    part, entry = box.part(), stored.add(box.whole)
    stored.read([(entry, part)])
    assert torch.equal(part.local, box.expected())
    assert sorted(length for _, length in stored.storage.ranges) == [17 * CELL] * 4


def test_columns_of_some_rows_are_read_with_these_rows_only() -> None:
    """Sharded in two dimensions: the rows that the box is in, through memory for a few of them at a time."""
    stored = Stored()
    box = Wanted(numbers(256, 512), (64, 128), (64, 128))
    part, entry = box.part(), stored.add(box.whole)
    stored.read([(entry, part)], Settings(read_gap_bytes=1, max_read_bytes=8 * CELL))
    assert torch.equal(part.local, box.expected())
    assert stored.storage.bytes_read <= 64 * 512 * 4 + 2 * CELL


def test_tensors_beside_each_other_share_a_cell() -> None:
    """The end of one and the beginning of the next lie in the same cell, which is read once, and so does a small one."""
    stored = Stored()
    first, small, second = numbers(10_000), numbers(7), numbers(10_000)
    wholes = [(stored.add(t), t) for t in (first, small, second)]
    asked = [Wanted(first, (9_000,), (1_000,)), Wanted(small, (0,), (7,)), Wanted(second, (0,), (1_000,))]
    parts = [box.part() for box in asked]
    stored.read(list(zip([entry for entry, _ in wholes], parts, strict=True)))
    for box, part in zip(asked, parts, strict=True):
        assert torch.equal(part.local, box.expected())
    assert len(stored.storage.ranges) == 1
    assert stored.storage.bytes_read == 3 * CELL


@pytest.mark.parametrize("lengths", [(60, 1024), (64, 1024)])
def test_what_is_needed_for_the_most_part_is_read_as_a_whole(lengths: tuple[int, int]) -> None:
    """Exactly the chunk's own bytes, and no cells."""
    stored = Stored()
    box = Wanted(numbers(64, 1024), (0, 0), lengths)
    part, entry = box.part(), stored.add(box.whole)
    stored.read([(entry, part)])
    assert torch.equal(part.local, box.expected())
    assert stored.storage.bytes_read == 64 * 1024 * 4


def test_an_index_without_cells_is_read_by_chunks() -> None:
    """What was written before there were cells: the whole chunk, whatever is needed of it."""
    stored = Stored(cells=False)
    box = Wanted(numbers(64, 1024), (3, 0), (1, 1024))
    part, entry = box.part(), stored.add(box.whole)
    stored.read([(entry, part)])
    assert torch.equal(part.local, box.expected())
    assert stored.storage.bytes_read == 64 * 1024 * 4


def test_a_box_in_inference_mode_is_filled() -> None:
    """Memory that was made under ``torch.inference_mode`` is written to under it, whichever thread does it."""
    stored = Stored()
    with torch.inference_mode():
        box = Wanted(numbers(256, 512), (64, 128), (64, 128))
        part, entry = box.part(), stored.add(box.whole)
        stored.read([(entry, part)])
        assert torch.equal(part.local, box.expected())


# -- damage ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [(0, 1024), (100, 50)], ids=["straight into place", "through other memory"])
def test_damage_in_a_cell_that_is_read_is_found(columns: tuple[int, int]) -> None:
    """Also where nobody wants the byte itself; the object and the cell's bytes are named."""
    stored = Stored()
    first, count = columns
    box = Wanted(numbers(64, 1024), (16, first), (8, count))
    entry = stored.add(box.whole)
    start = entry.chunks[0].start + 16 * CELL
    begin = start + first * 4 - (start + first * 4) % CELL
    for damaged in (begin, start + first * 4, start + 3 * CELL):
        cell = damaged - damaged % CELL
        with pytest.raises(CorruptCheckpointError, match=rf"{NAME} bytes {cell}\.\.{cell + CELL}: checksum"):
            stored.read([(entry, box.part())], damaged=damaged)


def test_damage_in_other_cells_is_not_looked_for() -> None:
    """What is not read is not proven, and the box is what was saved."""
    stored = Stored()
    box = Wanted(numbers(64, 1024), (16, 0), (8, 1024))
    part, entry = box.part(), stored.add(box.whole)
    stored.read([(entry, part)], damaged=entry.chunks[0].start + 40 * CELL)
    assert torch.equal(part.local, box.expected())


def test_an_object_that_is_cut_short_is_damaged() -> None:
    """A cell that is not there is no network fault."""
    stored = Stored()
    box = Wanted(numbers(64, 1024), (60, 0), (4, 1024))
    entry = stored.add(box.whole)
    stored.storage.put(stored.key, [b"\0" * 1000], size_bytes=1000)
    planned = plan_boxes([(entry, box.part())], [stored.sealed()], SETTINGS)
    with pytest.raises(CorruptCheckpointError, match="1000 bytes"):
        Reading(stored.storage, stored.entry, planned.extents, SETTINGS).run()
