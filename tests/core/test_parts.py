"""The parts of an upload: whole rounds over the connections, within what the store takes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudckpt.core.parts import plan_part_bytes

MIB = 1024 * 1024


@pytest.mark.parametrize(
    ("size_mib", "together_mib", "connections", "part_mib"),
    [
        (345, 517, 18, 34),  # one round over all of them
        (172, 517, 18, 34),  # the same for the smaller object beside it
        (345, 517, 2, 52),  # few connections: rounds of large parts
        (10, 10, 16, 16),  # never less than asked for
        (2048, 2048, 16, 50),
    ],
)
def test_parts_of_usual_states(size_mib: int, together_mib: int, connections: int, part_mib: int) -> None:
    """The sizes that a save of half a GiB or two has."""
    found = plan_part_bytes(
        size_mib * MIB, together_mib * MIB, connections=connections, least_bytes=16 * MIB, most_parts=9000
    )
    assert found == part_mib * MIB


@given(
    size=st.integers(1, 5 << 40),
    others=st.integers(0, 1 << 40),
    connections=st.integers(1, 256),
    least=st.integers(1, 128 * MIB),
)
def test_no_object_has_too_many_parts(size: int, others: int, connections: int, least: int) -> None:
    """Up to 5 TiB an object fits into the parts that the store takes, and no part is smaller than asked for."""
    found = plan_part_bytes(size, size + others, connections=connections, least_bytes=least, most_parts=9000)
    assert -(-size // found) <= 9000
    assert found >= least
    assert found <= MIB or found % MIB == 0
