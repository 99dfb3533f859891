"""What a run costs: requests and bytes of each save, and money at prices that the user gives. Arithmetic only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cloudckpt.core.parts import plan_part_bytes

__all__ = ["Costs", "Prices", "SaveRequests", "plan_costs", "requests_of_save"]

#: Hours in a month, as the stores' own calculators have it.
HOURS_A_MONTH = 730.0

_GIB = 1024**3
_MOST_PARTS = 9_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Prices:
    """Prices in one currency. Zero for what nobody charges.

    Attributes:
        put: of 1,000 requests that write or list (S3's class A).
        get: of 1,000 requests that read.
        gib_month: of a GiB kept for a month.
        egress_gib: of a GiB that leaves the store's network.
    """

    put: float = 0.0
    get: float = 0.0
    gib_month: float = 0.0
    egress_gib: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveRequests:
    """The requests of one save in the steady state.

    Attributes:
        payload: parts, and what begins and completes uploads in parts.
        index: one for the index.
        manifest: the announce and the commit.
        deletes: what removes the checkpoint that this one replaces; most stores charge nothing for these.
    """

    payload: int
    index: int
    manifest: int
    deletes: int

    @property
    def writing(self) -> int:
        """All that are charged as writes."""
        return self.payload + self.index + self.manifest


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Of one save, and of a month.

    Attributes:
        requests: of one save.
        save_bytes: that a save sends.
        kept_bytes: that are kept at any time.
        saves_a_month: how many saves a month has.
        requests_a_month: that are charged as writes.
        bytes_a_month: that are sent in a month.
        restores_a_month: how often a checkpoint is read.
        request_cost: of a month's requests.
        storage_cost: of what is kept, for a month.
        egress_cost: of what is read outside of the store's network, in a month.
    """

    requests: SaveRequests
    save_bytes: int
    kept_bytes: int
    saves_a_month: float
    requests_a_month: float
    bytes_a_month: float
    restores_a_month: float
    request_cost: float
    storage_cost: float
    egress_cost: float

    @property
    def total(self) -> float:
        """All of a month."""
        return self.request_cost + self.storage_cost + self.egress_cost


def requests_of_save(
    object_bytes: Sequence[int], *, connections: int, least_part_bytes: int, delete_at_once: int = 1000
) -> SaveRequests:
    """The requests of a save with payload objects of these sizes.

    Args:
        connections: how many requests are under way at once.
        least_part_bytes: the smallest part that is sent.
        delete_at_once: how many objects one request deletes.
    """
    together = sum(object_bytes)
    payload = 0
    for size in object_bytes:
        part = plan_part_bytes(
            size, together, connections=connections, least_bytes=least_part_bytes, most_parts=_MOST_PARTS
        )
        parts = -(-size // part)
        payload += parts + 2 if parts > 1 else 1
    # The payload objects in bulk, then the index.
    deletes = -(-len(object_bytes) // delete_at_once) + 1
    return SaveRequests(payload=payload, index=1, manifest=2, deletes=deletes)


def plan_costs(
    requests: SaveRequests,
    *,
    save_bytes: int,
    kept_bytes: int,
    save_every_s: float,
    restores_a_month: float,
    hours_a_month: float,
    prices: Prices,
    reading_requests: int = 2,
) -> Costs:
    """The costs of a run that saves this often.

    Args:
        save_bytes: that a save sends.
        kept_bytes: that are kept at any time.
        save_every_s: seconds from save to save.
        restores_a_month: how often a whole checkpoint is read.
        hours_a_month: how many hours of a month it trains.
        reading_requests: of one restore: the manifest, the index and the ranges.
    """
    saves = hours_a_month * 3600.0 / save_every_s
    writing = saves * requests.writing
    return Costs(
        requests=requests,
        save_bytes=save_bytes,
        kept_bytes=kept_bytes,
        saves_a_month=saves,
        requests_a_month=writing,
        bytes_a_month=saves * save_bytes,
        restores_a_month=restores_a_month,
        request_cost=(writing * prices.put + restores_a_month * reading_requests * prices.get) / 1000.0,
        storage_cost=kept_bytes / _GIB * prices.gib_month,
        egress_cost=restores_a_month * save_bytes / _GIB * prices.egress_gib,
    )
