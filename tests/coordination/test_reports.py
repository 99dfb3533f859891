"""What a rank tells rank zero of its upload."""

from __future__ import annotations

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cloudckpt.core.model import Index
from cloudckpt.saving.job import Uploaded
from cloudckpt.testing.strategies import indexes


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=40)
@given(indexes(), st.lists(st.integers(0, 2**32 - 1)))
def test_a_report_survives_its_bytes(drawn: Index, sums: list[int]) -> None:
    """Objects with the sums of their cells, or without, the sums of the boxes, and the rank's own values."""
    told = Uploaded(objects=drawn.objects, sums=tuple(sums), structure=drawn.structure)

    assert Uploaded.from_bytes(told.to_bytes()) == told
