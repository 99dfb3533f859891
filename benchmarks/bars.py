"""The bars: what must be reached, as ratios to a floor or a peer of the same run, and whether it is."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cloudckpt import Settings

from benchmarks.stats import paired_ratio

__all__ = ["BARS", "Bar", "Verdict", "judge"]

Row = Mapping[str, Any]
Metric = Callable[[Row], float]
_MIB = 1 << 20
#: Named as a base: the peer whose median is the lowest in the run.
BEST_PEER = "the best peer"
#: Named as a base: nothing; the value itself is held against the limit, in its worst round.
ALONE = ""


def _wall(row: Row) -> float:
    return float(row["wall_s"])


def _cpu(row: Row) -> float:
    return float(row["cpu_s"])


def _first_stall(row: Row) -> float:
    return float(row["first"]["stall_s"])


def _later_stall(row: Row) -> float:
    return float(row["later"]["stall_s"])


def _lost(row: Row) -> float:
    return float(row["later"]["lost_s"])


def _peak_mib(row: Row) -> float:
    return float(row["peak_bytes"]) / _MIB


def _peak_beyond_arena_mib(row: Row) -> float:
    return float(row["peak_bytes"] - row["bytes"]) / _MIB


def _asked(row: Row, *kinds: str) -> float:
    return float(sum(row["requests"].get(kind, 0) for kind in kinds))


def _all_but(row: Row, *kinds: str) -> float:
    return float(sum(row["requests"].values())) - _asked(row, *kinds)


def _looking_around(row: Row) -> float:
    return _asked(row, "List", "ListUploads", "Copy", "Head", "HeadBucket")


def _beside_payload(row: Row) -> float:
    return _all_but(row, "UploadPart", "CreateMultipart", "CompleteMultipart")


def _beside_gets(row: Row) -> float:
    return _all_but(row, "Get")


def _gets(row: Row) -> float:
    return _asked(row, "Get")


def _downloaded(row: Row) -> float:
    return float(row["bytes_out"]) / float(row["bytes"])


def _budget_mib() -> float:
    """64 MiB and two parts a thread, at the settings that cloudckpt comes with."""
    settings = Settings()
    return 64 + 2 * settings.part_size_bytes * settings.parts_in_flight / _MIB


@dataclass(frozen=True, slots=True)
class Bar:
    """One line of the table.

    Attributes:
        name: for notes, and to look it up.
        what: in words.
        plan: the results file.
        size: of the state.
        case: whose value.
        metric: of its rows.
        base: the case it is held against, ``BEST_PEER``, or ``ALONE``.
        limit: the most that is allowed.
        base_metric: of the base's rows, if another.
        base_size: the base's state, if another.
        unit: of a value that stands alone.
    """

    name: str
    what: str
    plan: str
    size: str
    case: str
    metric: Metric
    base: str
    limit: float
    base_metric: Metric | None = None
    base_size: str | None = None
    unit: str = ""


@dataclass(frozen=True, slots=True)
class Verdict:
    """How a bar stands.

    Attributes:
        bar: which.
        value: the median ratio, or the worst value of those that stand alone.
        upper: what is held against the limit.
        pairs: behind it; 0 if nothing was measured.
        median: of the case's own metric.
        base_median: of the base's.
        base: which peer was the best, or the base's name.
        why_not: why there is no value.
    """

    bar: Bar
    value: float = math.nan
    upper: float = math.nan
    pairs: int = 0
    median: float = math.nan
    base_median: float = math.nan
    base: str = ""
    why_not: str = ""

    @property
    def met(self) -> bool:
        """Whether the upper bound meets the limit."""
        return self.upper <= self.bar.limit


def judge(bar: Bar, rows: Iterable[Row]) -> Verdict:
    """Hold a bar against the rows of its results file."""
    kept = list(rows)
    ours = _by_round(kept, bar.case, bar.size)
    if not ours:
        return Verdict(bar, why_not=_failure(kept, bar.case, bar.size))
    own = [bar.metric(row) for row in ours.values()]
    if bar.base == ALONE:
        return Verdict(bar, value=max(own), upper=max(own), pairs=len(own), median=statistics.median(own))
    metric = bar.base_metric or bar.metric
    size = bar.base_size or bar.size
    base = _best_peer(kept, size, metric) if bar.base == BEST_PEER else bar.base
    theirs = _by_round(kept, base, size)
    rounds = sorted(ours.keys() & theirs.keys())
    if not rounds:
        return Verdict(bar, base=base, why_not=_failure(kept, base, size))
    values = [bar.metric(ours[number]) for number in rounds]
    bases = [metric(theirs[number]) for number in rounds]
    ratio = paired_ratio(values, bases)
    return Verdict(
        bar,
        value=ratio.median,
        upper=ratio.upper,
        pairs=ratio.pairs,
        median=statistics.median(values),
        base_median=statistics.median(bases),
        base=base,
    )


def _by_round(rows: Sequence[Row], case: str, size: str) -> dict[int, Row]:
    return {row["round"]: row for row in rows if row["case"] == case and row["size"] == size and "error" not in row}


def _failure(rows: Sequence[Row], case: str, size: str) -> str:
    said = [row["error"] for row in rows if row["case"] == case and row["size"] == size and "error" in row]
    return f"{case or 'no peer'}: {said[-1]}" if said else f"{case or 'no peer'} was not run at {size}"


def _best_peer(rows: Sequence[Row], size: str, metric: Metric) -> str:
    peers = {row["case"] for row in rows if row["kind"] == "peer" and row["size"] == size and "error" not in row}
    medians = {name: statistics.median(map(metric, _by_round(rows, name, size).values())) for name in peers}
    return min(medians, key=lambda name: medians[name], default="")


def _bars() -> tuple[Bar, ...]:
    budget = _budget_mib()
    save, far, local, load = "bars-save-s3", "bars-save-s3-far", "bars-save-local", "bars-load-s3"
    own, restore, one = "cloudckpt", "cloudckpt_restore", "socket_1"
    small, large = "45m", "180m"
    return (
        Bar("save-s3", "save to S3, 0.5 GiB, wall", save, small, own, _wall, one, 1.2),
        Bar("save-s3-2g", "save to S3, 2 GiB, wall", save, large, own, _wall, one, 0.8),
        Bar("save-s3-cpu", "save to S3, 0.5 GiB, client CPU", save, small, own, _cpu, one, 1.2),
        Bar("save-s3-cpu-2g", "save to S3, 2 GiB, client CPU", save, large, own, _cpu, one, 1.2),
        Bar("save-s3-tls", "save to S3 over TLS, wall", "bars-save-s3-tls", small, own, _wall, one, 1.0),
        Bar("save-s3-far", "save to a far store, wall", far, small, own, _wall, "socket_16", 1.2),
        Bar("save-s3-far-peers", "save to a far store, against every peer", far, small, own, _wall, BEST_PEER, 1.0),
        Bar("save-local", "save to local disk, durable, 0.5 GiB, wall", local, small, own, _wall, "write_fsync", 1.15),
        Bar("save-local-2g", "save to local disk, durable, 2 GiB, wall", local, large, own, _wall, "write_fsync", 1.15),
        Bar(
            "stall-first", "time the first save() blocks, after prepare()", "bars-stall", small, own, _first_stall,
            "memcpy", 1.5, base_metric=_later_stall,
        ),
        Bar(
            "stall-later", "time a later save() blocks, checksummed in the same pass", "bars-stall", small, own,
            _later_stall, "memcpy", 1.3,
        ),
        Bar("lost", "training time lost per async save to S3", "bars-stall", small, own, _lost, BEST_PEER, 0.25),
        Bar("load-s3", "load from S3 in place, 0.5 GiB, wall", load, small, restore, _wall, one, 1.0),
        Bar("load-s3-2g", "load from S3 in place, 2 GiB, wall", load, large, restore, _wall, one, 1.0),
        Bar("load-s3-tls", "load from S3 in place over TLS, wall", "bars-load-s3-tls", small, restore, _wall, one, 1.2),
        Bar(
            "load-s3-far", "load from a far store in place, wall", "bars-load-s3-far", small, restore, _wall,
            "socket_16", 0.60 / 0.45,
        ),
        Bar(
            "load-s3-far-bytes", "bytes downloaded from a far store", "bars-load-s3-far", small, restore, _downloaded,
            ALONE, 1.005, unit="× the state",
        ),
        Bar("memory-save", "memory of a sync save, 2 GiB", save, large, own, _peak_mib, ALONE, budget, unit="MiB"),
        Bar(
            "memory-async", "memory of async saves beyond the arena", "bars-stall", small, own,
            _peak_beyond_arena_mib, ALONE, budget, unit="MiB",
        ),
        Bar("memory-load", "memory of a load in place, 2 GiB", load, large, restore, _peak_mib, ALONE, budget,
            unit="MiB"),
        Bar("requests-save", "requests of a save beside its payload", save, small, own, _beside_payload, ALONE, 3,
            unit="requests"),
        Bar("requests-around", "LIST, COPY, HEAD of a save", save, small, own, _looking_around, ALONE, 0,
            unit="requests"),
        Bar("requests-load", "requests of a restore other than GET", load, small, restore, _beside_gets, ALONE, 0,
            unit="requests"),
        Bar(
            "tensors", "100,000 small tensors, time of the same bytes in large ones", "bars-tensors",
            "tensors-100000", own, _wall, own, 2.0, base_size="flat-100000",
        ),
        Bar("latest", "requests to find the latest of 10,000", "bars-discover", "10000", "cloudckpt_latest", _gets,
            ALONE, 1, unit="GET"),
        Bar("best", "requests to find the best of 10,000", "bars-discover", "10000", "cloudckpt_best", _gets, ALONE, 1,
            unit="GET"),
    )  # fmt: skip


BARS = _bars()
