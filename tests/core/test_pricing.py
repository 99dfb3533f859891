from __future__ import annotations

import pytest

from cloudckpt.core.pricing import Prices, SaveRequests, plan_costs, requests_of_save

MIB = 1024**2
GIB = 1024**3


@pytest.mark.parametrize(
    ("sizes", "payload", "deletes"),
    [
        ([], 0, 1),
        ([0], 1, 2),
        ([MIB], 1, 2),
        ([16 * MIB], 1, 2),
        ([17 * MIB], 4, 2),  # begin, two parts, complete
        ([MIB, 17 * MIB], 5, 2),
    ],
)
def test_the_requests_of_a_save(sizes: list[int], payload: int, deletes: int) -> None:
    """One for what fits into a part, else its parts and two more; then the index, the announce and the commit."""
    found = requests_of_save(sizes, connections=32, least_part_bytes=16 * MIB)
    assert found == SaveRequests(payload=payload, index=1, manifest=2, deletes=deletes)
    assert found.writing == payload + 3


def test_costs_of_a_month() -> None:
    """Requests by the thousand, bytes by the GiB, at the prices given."""
    requests = SaveRequests(payload=7, index=1, manifest=2, deletes=2)
    costs = plan_costs(
        requests,
        save_bytes=2 * GIB,
        kept_bytes=10 * GIB,
        save_every_s=1800,
        restores_a_month=4,
        hours_a_month=100,
        prices=Prices(put=0.005, get=0.0004, gib_month=0.023, egress_gib=0.09),
        reading_requests=50,
    )
    assert costs.saves_a_month == 200
    assert costs.requests_a_month == 2000
    assert costs.bytes_a_month == 400 * GIB
    assert costs.request_cost == pytest.approx(2000 / 1000 * 0.005 + 200 / 1000 * 0.0004)
    assert costs.storage_cost == pytest.approx(0.23)
    assert costs.egress_cost == pytest.approx(0.72)
    assert costs.total == pytest.approx(0.23 + 0.72 + 0.01008)
