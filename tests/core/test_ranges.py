"""Which byte ranges are asked for."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from cloudckpt.core.ranges import Wanted, pieces, plan_extents

wanted = st.builds(
    Wanted,
    object=st.sampled_from(["a", "b"]),
    start=st.integers(min_value=0, max_value=500),
    length=st.integers(min_value=0, max_value=60),
)


def test_neighbours_are_merged_and_objects_are_not() -> None:
    """Ranges closer than the gap become one; ranges of two objects never do."""
    asked = [Wanted("a", 0, 10), Wanted("a", 15, 5), Wanted("a", 100, 1), Wanted("b", 20, 5), Wanted("a", 3, 0)]
    plan = plan_extents(asked, gap_bytes=5)
    assert [(e.object, e.start, e.length) for e in plan] == [("a", 0, 20), ("a", 100, 1), ("b", 20, 5)]
    assert plan[0].wanted == (Wanted("a", 0, 10), Wanted("a", 15, 5))


@given(st.lists(wanted), st.integers(min_value=0, max_value=40))
def test_every_wanted_byte_is_covered_once(asked: list[Wanted], gap: int) -> None:
    """Each non-empty range lies in exactly one extent, extents do not touch within the gap, and read little else."""
    plan = plan_extents(asked, gap_bytes=gap)
    assert sorted(w for e in plan for w in e.wanted) == sorted(w for w in asked if w.length)
    for extent in plan:
        for item in extent.wanted:
            assert extent.object == item.object
            assert extent.start <= item.start
            assert item.start + item.length <= extent.start + extent.length
    for one, two in itertools.pairwise(plan):
        assert one.object < two.object or one.start + one.length + gap < two.start


@given(st.integers(0, 100), st.integers(0, 5000), st.integers(1, 700))
def test_pieces_cover_a_range_in_order(start: int, length: int, most: int) -> None:
    """Pieces are at most so large, lie end to end, and add up to the range."""
    at = start
    for piece_start, piece_length in pieces(start, length, most_bytes=most):
        assert piece_start == at
        assert 0 < piece_length <= most
        at += piece_length
    assert at == start + length


def test_pieces_past_32_bits() -> None:
    """Ranges past 2**40 are arithmetic."""
    found = list(pieces(2**40, 2**32 + 1, most_bytes=2**31))
    assert found == [(2**40, 2**31), (2**40 + 2**31, 2**31), (2**40 + 2**32, 1)]
