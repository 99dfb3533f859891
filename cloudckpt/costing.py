"""What a run costs a month: its own sizes and rhythm, at prices that the user gives."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from cloudckpt.core.model import JournalEvent, Manifest
from cloudckpt.core.pricing import HOURS_A_MONTH, Costs, Prices, plan_costs, requests_of_save
from cloudckpt.errors import CheckpointNotFoundError, ConfigError
from cloudckpt.storage import ManifestStore
from cloudckpt.view import RunView, read_index

__all__ = ["RunCosts", "cost_of_run"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunCosts:
    """Costs, and what they were reckoned from.

    Attributes:
        root: the run.
        checkpoint: the name of the one whose objects were counted: the newest.
        kept: how many checkpoints are kept now.
        save_every_s: seconds from save to save.
        every_from: "given", or "journal" where the run's own journal told it.
        hours_a_month: for how many hours of a month it trains.
        prices: as given.
        costs: the outcome.
    """

    root: str
    checkpoint: str
    kept: int
    save_every_s: float
    every_from: str
    hours_a_month: float
    prices: Prices
    costs: Costs


def cost_of_run(
    store: ManifestStore,
    *,
    prices: Prices | None = None,
    save_every_s: float | None = None,
    restores_a_month: float = 0.0,
    hours_a_month: float = HOURS_A_MONTH,
) -> RunCosts:
    """Reckon a month of a run that goes on as it does now. Two requests.

    Args:
        prices: all zero by default, so that only requests and bytes are told.
        save_every_s: seconds from save to save; by default the median of what the journal remembers.
        restores_a_month: how often a whole checkpoint is read outside of the store's network.
        hours_a_month: for how many hours of a month it trains.

    Raises:
        CheckpointNotFoundError: nothing is committed yet.
        ConfigError: nobody knows how often it saves, or a number is not positive.
        StorageError: the store refused.
    """
    view = RunView(store)
    manifest = view.manifest()
    newest = view.latest()
    if newest is None:
        raise CheckpointNotFoundError(f"{view.url}: nothing is committed yet that could be counted")
    every, told_by = _rhythm(manifest, save_every_s, view.url)
    if not 0 < hours_a_month <= HOURS_A_MONTH + 14 or restores_a_month < 0:
        raise ConfigError(
            f"hours_a_month={hours_a_month:g} must be above 0 and at most 744, and restores_a_month="
            f"{restores_a_month:g} at least 0"
        )
    sizes = [item.size_bytes for item in read_index(store.storage, newest).objects]
    settings = store.settings
    requests = requests_of_save(sizes, connections=settings.connections, least_part_bytes=settings.part_size_bytes)
    costs = plan_costs(
        requests,
        save_bytes=newest.size_bytes,
        kept_bytes=sum(entry.size_bytes for entry in manifest.committed),
        save_every_s=every,
        restores_a_month=restores_a_month,
        hours_a_month=hours_a_month,
        prices=prices or Prices(),
        reading_requests=2 + sum(-(-size // settings.max_read_bytes) for size in sizes),
    )
    return RunCosts(
        root=view.url,
        checkpoint=newest.name,
        kept=len(manifest.committed),
        save_every_s=every,
        every_from=told_by,
        hours_a_month=hours_a_month,
        prices=prices or Prices(),
        costs=costs,
    )


def _rhythm(manifest: Manifest, given: float | None, url: str) -> tuple[float, str]:
    if given is not None:
        if given <= 0:
            raise ConfigError(f"save_every_s={given:g}: expected a positive number of seconds")
        return given, "given"
    found = _median_gap(manifest.journal)
    if found is None:
        raise ConfigError(f"{url} has not saved often enough to tell how often it saves: say it (--every SECONDS)")
    return found, "journal"


def _median_gap(journal: Sequence[JournalEvent]) -> float | None:
    """Seconds between announces; the median, so that a night without training does not count."""
    times = [datetime.fromisoformat(event.at) for event in journal if event.event == "announce"]
    gaps = [(after - before).total_seconds() for before, after in itertools.pairwise(times)]
    positive = [gap for gap in gaps if gap > 0]
    return statistics.median(positive) if positive else None
