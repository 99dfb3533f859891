"""Who writes what several ranks have."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cloudckpt.core.spreading import spread

pieces = st.integers(1, 6).flatmap(
    lambda world: st.tuples(
        st.just(world),
        st.dictionaries(
            st.integers(),
            st.tuples(st.integers(0, 1000), st.lists(st.integers(0, world - 1), min_size=1, unique=True)),
            max_size=30,
        ),
    )
)


@given(pieces)
def test_each_piece_is_written_once_by_one_that_has_it(drawn: tuple[int, dict[int, tuple[int, list[int]]]]) -> None:
    """And equal questions get equal answers."""
    world, asked = drawn
    found = spread(asked, world)
    assert found.keys() == asked.keys()
    assert all(found[piece] in ranks for piece, (_, ranks) in asked.items())
    assert spread(asked, world) == found


@given(st.integers(1, 8), st.lists(st.integers(1, 1000), max_size=60))
def test_what_all_have_is_spread_evenly(world: int, sizes: list[int]) -> None:
    """No rank has more than the average and one piece."""
    found = spread({n: (size, range(world)) for n, size in enumerate(sizes)}, world)
    load = [sum(sizes[n] for n, rank in found.items() if rank == r) for r in range(world)]
    assert max(load) <= sum(sizes) / world + max(sizes, default=0)


def test_what_one_rank_has_anyway_counts() -> None:
    """Shared pieces go where there is less of one's own."""
    assert spread({"own": (100, [0]), "a": (60, [0, 1]), "b": (50, [1, 0])}, 2) == {"own": 0, "a": 1, "b": 1}


def test_the_largest_go_first() -> None:
    """In the order given, the two small ones would part, and the large one would come on top of one of them."""
    found = spread({"small": (1, [0, 1]), "too": (1, [0, 1]), "large": (2, [0, 1])}, 2)
    assert found == {"large": 0, "small": 1, "too": 1}
