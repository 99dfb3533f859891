"""Requests: every wanted byte once, few of them, none too big, the lanes evenly loaded."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudckpt.core.ranges import Read, Span, Wanted, contiguous_start, plan_reads

MIB = 1024 * 1024

wanted = st.builds(
    Wanted,
    object=st.sampled_from(["a", "b"]),
    start=st.integers(min_value=0, max_value=500),
    length=st.integers(min_value=0, max_value=60),
)


def shape_of(plan: tuple[Read, ...]) -> list[tuple[str, int, int]]:
    """Each request as object, start, length, in the order of the object's bytes."""
    return sorted((read.object, read.start, read.length) for read in plan)


def test_neighbours_are_merged_and_objects_are_not() -> None:
    """Ranges closer than the gap become one request, the bytes between named as nobody's; two objects never do."""
    asked = [Wanted("a", 0, 10), Wanted("a", 15, 5), Wanted("a", 100, 1), Wanted("b", 20, 5), Wanted("a", 3, 0)]
    plan = plan_reads(asked, gap_bytes=5, most_bytes=1000, lanes=1)
    assert plan == (
        Read(object="a", start=0, length=20, spans=(Span(0, 0, 10), Span(None, 0, 5), Span(1, 0, 5))),
        Read(object="b", start=20, length=5, spans=(Span(3, 0, 5),)),
        Read(object="a", start=100, length=1, spans=(Span(2, 0, 1),)),
    )
    assert shape_of(plan_reads(asked, gap_bytes=4, most_bytes=1000, lanes=1))[:2] == [("a", 0, 10), ("a", 15, 5)]


def test_big_ranges_are_cut_across_what_was_wanted() -> None:
    """A cut falls where the size says, in the middle of a range if need be; the rest of it is in the next request."""
    plan = plan_reads([Wanted("a", 0, 10), Wanted("a", 10, 10)], gap_bytes=0, most_bytes=8, lanes=1)
    assert plan == (
        Read(object="a", start=0, length=8, spans=(Span(0, 0, 8),)),
        Read(object="a", start=8, length=8, spans=(Span(0, 8, 2), Span(1, 0, 6))),
        Read(object="a", start=16, length=4, spans=(Span(1, 6, 4),)),
    )


def test_nothing_wanted_is_no_request() -> None:
    """No range, or only empty ones, need nothing."""
    assert plan_reads([], gap_bytes=1, most_bytes=1, lanes=1) == ()
    assert plan_reads([Wanted("a", 3, 0)], gap_bytes=1, most_bytes=1, lanes=1) == ()


def test_overlapping_ranges_are_read_apart() -> None:
    """Each gets all of its bytes from a request of its own."""
    plan = plan_reads([Wanted("a", 0, 10), Wanted("a", 5, 10)], gap_bytes=100, most_bytes=100, lanes=4)
    assert shape_of(plan) == [("a", 0, 10), ("a", 5, 10)]


@given(st.lists(wanted), st.integers(min_value=0, max_value=40), st.integers(1, 50), st.integers(1, 5))
def test_every_wanted_byte_comes_once(asked: list[Wanted], gap: int, most: int, lanes: int) -> None:
    """The spans of all requests put together are exactly what was wanted, and little else is read."""
    plan = plan_reads(asked, gap_bytes=gap, most_bytes=most, lanes=lanes)
    found: dict[int, list[tuple[int, int]]] = {}
    for read in plan:
        assert 0 < read.length <= most
        at = read.start
        for span in read.spans:
            assert span.length > 0
            if span.item is None:
                assert span.length <= gap
            else:
                item = asked[span.item]
                assert (item.object, item.start + span.start) == (read.object, at)
                found.setdefault(span.item, []).append((span.start, span.length))
            at += span.length
        assert at == read.start + read.length
    for n, item in enumerate(asked):
        at = 0
        for start, length in sorted(found.get(n, [])):
            assert start == at
            at += length
        assert at == item.length
    assert all(one.length >= two.length for one, two in itertools.pairwise(plan))


def makespan(plan: tuple[Read, ...], lanes: int) -> int:
    """Bytes on the busiest of the lanes, each taking the next request when it is free."""
    loads = [0] * lanes
    for read in plan:
        loads[loads.index(min(loads))] += read.length
    return max(loads)


@pytest.mark.parametrize("mib", [65, 200, 300, 512, 513, 614, 1000, 2048, 5000])
@pytest.mark.parametrize("shares", [(1,), (1, 2), (1, 1, 4, 1)])
def test_sixteen_connections_get_about_the_same(mib: int, shares: tuple[int, ...]) -> None:
    """The busiest connection reads at most one eighth more than the mean, or one smallest request."""
    total = mib * MIB
    objects = [Wanted(str(n), 320, total * share // sum(shares)) for n, share in enumerate(shares)]
    plan = plan_reads(objects, gap_bytes=0, most_bytes=16 * MIB, lanes=16)
    assert max(read.length for read in plan) <= 16 * MIB
    mean = total / 16
    assert makespan(plan, 16) <= max(mean * 1.125, mean + 4 * MIB)
    assert len(plan) <= 2 * math.ceil(mib / 16) + 16 + len(shares)


def test_half_a_gibibyte_is_enough_for_16_connections_twice() -> None:
    """0.5 GiB gives each of 16 connections two requests of 16 MiB; 10 MiB are not cut below 4 MiB."""
    plan = plan_reads([Wanted("a", 0, 512 * MIB)], gap_bytes=0, most_bytes=16 * MIB, lanes=16)
    assert [read.length for read in plan] == [16 * MIB] * 32
    small = plan_reads([Wanted("a", 0, 10 * MIB)], gap_bytes=0, most_bytes=16 * MIB, lanes=16)
    assert [read.length for read in small] == [4 * MIB, 4 * MIB, 2 * MIB]


def test_requests_past_32_bits() -> None:
    """Ranges past 2**40 are arithmetic."""
    plan = plan_reads([Wanted("a", 2**40, 2**32 + 1)], gap_bytes=0, most_bytes=2**31, lanes=1)
    assert shape_of(plan)[-1][1] + shape_of(plan)[-1][2] == 2**40 + 2**32 + 1
    assert sum(read.length for read in plan) == 2**32 + 1


@given(st.lists(st.integers(1, 4), max_size=4), st.data())
def test_a_box_without_holes_is_known_by_where_it_begins(shape: list[int], data: st.DataObject) -> None:
    """The answer is the first element's number if the box's elements are consecutive, and None if they are not."""
    lengths = [data.draw(st.integers(1, size)) for size in shape]
    offsets = [data.draw(st.integers(0, size - length)) for size, length in zip(shape, lengths, strict=True)]
    numbers = []
    for index in itertools.product(*[range(o, o + n) for o, n in zip(offsets, lengths, strict=True)]):
        number = 0
        for place, size in zip(index, shape, strict=True):
            number = number * size + place
        numbers.append(number)
    consecutive = numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    assert contiguous_start(shape, offsets, lengths) == (numbers[0] if consecutive else None)
