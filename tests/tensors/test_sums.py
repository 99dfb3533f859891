"""Sums that are taken ahead, part by part, or twice: they are the sums of the bytes, however these were cut."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable

import pytest
import torch
from crc32c import crc32c
from hypothesis import given
from hypothesis import strategies as st

import cloudckpt.tensors.sources
import cloudckpt.tensors.sums
from cloudckpt.core.model import Cells
from cloudckpt.tensors.ahead import summed_ahead
from cloudckpt.tensors.sources import PayloadSource
from cloudckpt.tensors.sums import Sums
from tests.tensors.test_sources import both, expected, from_tensors, odd_state, planned

CELL = 64


@pytest.fixture(autouse=True)
def _small_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (cloudckpt.tensors.sums, cloudckpt.tensors.sources):
        monkeypatch.setattr(module, "CELL_BYTES", CELL)


def cut(data: st.DataObject, stop: int) -> list[int]:
    """Points from 0 to ``stop``."""
    points = data.draw(st.lists(st.integers(0, stop), max_size=12))
    return sorted({0, stop, *points})


@given(st.data())
def test_however_the_bytes_are_cut_their_sums_are_the_same(data: st.DataObject) -> None:
    """Any cells ahead, any parts after them, views of any lengths: every piece and the whole have their own sum."""
    body = data.draw(st.binary(min_size=1, max_size=600))
    bounds = cut(data, len(body))
    view = memoryview(body)
    sums = Sums(bounds)
    grid = range(0, len(body), CELL)
    for start in data.draw(st.lists(st.sampled_from([*grid]), unique=True)):
        sums.cell(start, [view[start : start + CELL]])
    for start, stop in itertools.pairwise(cut(data, len(body))):
        inner = sorted({start, stop, *data.draw(st.lists(st.integers(start, stop), max_size=3))})
        views = [view[a:b] for a, b in itertools.pairwise(inner)]
        assert sums.part(start, views) == crc32c(body[start:stop])
        assert sums.part(start, views) == crc32c(body[start:stop])

    def again(start: int, length: int) -> None:
        pytest.fail(f"{start}, {length} was never summed")

    whole, pieces = sums.finish(again)

    assert whole == crc32c(body)
    assert pieces == [crc32c(body[a:b]) for a, b in itertools.pairwise(bounds)]
    assert sums.cells(again) == tuple(crc32c(body[start : start + CELL]) for start in grid)


@given(st.data())
def test_what_overlaps_or_was_never_summed_has_its_sums_as_well(data: st.DataObject) -> None:
    """Parts of a source that nobody cut evenly, and some that nobody asked for: the sums are those of the bytes."""
    body = data.draw(st.binary(min_size=1, max_size=400))
    bounds = cut(data, len(body))
    sums = Sums(bounds)

    def hold(start: int, length: int) -> None:
        assert sums.part(start, [memoryview(body)[start : start + length]]) == crc32c(body[start : start + length])

    for start, stop in data.draw(st.lists(st.tuples(*[st.integers(0, len(body))] * 2).map(sorted), max_size=5)):
        hold(start, stop - start)

    whole, pieces = sums.finish(hold)

    assert whole == crc32c(body)
    assert pieces == [crc32c(body[a:b]) for a, b in itertools.pairwise(bounds)]
    assert sums.cells(hold) == tuple(crc32c(body[at : at + CELL]) for at in range(0, len(body), CELL))


@both
@pytest.mark.parametrize("part_bytes", [CELL * 40, 1000, 1_000_000])
def test_sums_taken_ahead_are_those_of_the_bytes(source_of: Callable[[object], PayloadSource], part_bytes: int) -> None:
    """What lies in memory as it is stored is summed before anybody asks; parts and boxes have the same sums then."""
    payload = planned(odd_state())
    body = expected(payload)
    source, plain = source_of(payload), source_of(payload)
    source.sum_ahead()
    for start in range(0, len(body), part_bytes):
        with source.hold(start, min(part_bytes, len(body) - start)) as part:
            assert part.crc32c == crc32c(body[start : start + part_bytes])
    b"".join(plain)

    assert source.seal() == plain.seal()


@both
@pytest.mark.parametrize("part_bytes", [CELL * 40, 1_000_000])
def test_the_seal_knows_the_sum_of_every_cell(source_of: Callable[[object], PayloadSource], part_bytes: int) -> None:
    """Of an object that is larger than one; the size of a cell is told with them."""
    payload = planned(odd_state())
    body, source = expected(payload), source_of(payload)
    for start in range(0, len(body), part_bytes):
        with source.hold(start, min(part_bytes, len(body) - start)):
            pass
    sealed, _ = source.seal()
    sums = tuple(crc32c(body[start : start + CELL]) for start in range(0, len(body), CELL))
    assert sealed.cells == Cells(size_bytes=CELL, crc32c=sums)


def test_an_object_that_fits_into_a_cell_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own sum says the same."""
    payload = planned({"w": torch.ones(3)})
    monkeypatch.setattr(cloudckpt.tensors.sources, "CELL_BYTES", payload.size_bytes)
    sealed, _ = from_tensors(payload).seal()
    assert sealed.cells is None


def _hold(source: PayloadSource) -> None:
    with source.hold(0, 10):
        pass


@pytest.mark.parametrize("end", [_hold, lambda source: source.stop("enough")], ids=["held", "stopped"])
def test_whoever_asks_for_the_bytes_ends_the_summing_ahead(end: Callable[[PayloadSource], None]) -> None:
    """Once a part is held, or the source stopped, nothing more is looked at ahead of it."""
    source = from_tensors(planned({"w": torch.randn(100_000)}))
    end(source)
    before = dict(source._sums._cells)
    source.sum_ahead()
    assert source._sums._cells == before


def test_no_thread_looks_at_the_bytes_after_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the block ends well or not, its threads have ended; what goes wrong in them is nobody's business."""
    monkeypatch.setattr("cloudckpt.tensors.ahead._THREAD_BYTES", 1)
    payload = planned({"w": torch.randn(100_000)})
    before = set(threading.enumerate())
    with pytest.raises(ZeroDivisionError), summed_ahead([from_tensors(payload)]):
        raise ZeroDivisionError
    assert set(threading.enumerate()) <= before

    broken = from_tensors(payload)
    monkeypatch.setattr(broken, "_at_rest", lambda *_: 1 / 0)
    with summed_ahead([broken]):
        pass
    assert set(threading.enumerate()) <= before
