"""Results as Markdown tables: medians, and ratios to the floor paired by round."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.bars import BARS, Verdict, judge
from benchmarks.state import GIB

__all__ = ["Results", "bars_table", "floor_of", "good", "judged", "median_of", "read_results", "tables"]

Row = Mapping[str, Any]
_FLOORS = {"save-local": "write_fsync", "load-local": "read", "stall-local": "memcpy", "stall-s3": "memcpy"}


@dataclass(frozen=True, slots=True)
class Results:
    """Every results file of a folder: rows and facts by plan."""

    rows: dict[str, list[Row]]
    machines: dict[str, dict[str, str]]


def read_results(folder: Path) -> Results:
    """Read every ``*.jsonl`` of a folder; a last line that was broken off is left out."""
    rows: dict[str, list[Row]] = {}
    machines: dict[str, dict[str, str]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
        if lines:
            machines[path.stem] = lines[0]["machine"]
            rows[path.stem] = lines[1:]
    return Results(rows, machines)


def good(rows: Iterable[Row], case: str, size: str, processes: int = 0) -> dict[int, Row]:
    """The rows of a case that has not failed, by round."""
    return {
        row["round"]: row
        for row in rows
        if (row["case"], row["size"], row["processes"]) == (case, size, processes) and "error" not in row
    }


def median_of(rows: Mapping[int, Row], metric: Callable[[Row], float]) -> float:
    """The median over the rounds."""
    return statistics.median(map(metric, rows.values()))


def floor_of(group: str, link: str) -> str:
    """The case that a table's ratios refer to."""
    return _FLOORS.get(group) or ("socket_16" if link == "far" else "socket_1")


def _ratio(ours: Mapping[int, Row], theirs: Mapping[int, Row], metric: Callable[[Row], float]) -> str:
    both = [metric(ours[number]) / metric(theirs[number]) for number in ours.keys() & theirs.keys()]
    return f"{statistics.median(both):.2f}" if both else "–"


def tables(plan: str, rows: Sequence[Row]) -> str:
    """One table a size."""
    if not rows:
        return f"{plan}: no results yet"
    sizes = list(dict.fromkeys(row["size"] for row in rows))
    return "\n\n".join(_table([row for row in rows if row["size"] == size], size) for size in sizes)


def _table(rows: Sequence[Row], size: str) -> str:
    group, link = rows[0]["group"], rows[0]["link"]
    cases = list(dict.fromkeys((row["case"], row["processes"]) for row in sorted(rows, key=_order)))
    floor = floor_of(group, link)
    if group.startswith("stall"):
        head = (
            "| case | n | first save blocks, s | later saves block, s | / memcpy | durable after, s | training lost, s"
        )
        head += " | steps slowed | memory / state |"
        lines = [_stall_line(rows, name, size, floor) for name, _ in cases]
    elif group == "discover":
        head = "| case | n | wall, s | CPU, s | requests |"
        lines = [_question_line(rows, name, size) for name, _ in cases]
    else:
        head = f"| case | n | wall, s (min–max) | GiB/s | wall / {floor} | CPU s/GiB | CPU / {floor}"
        head += " | memory / state | requests |"
        lines = [_transfer_line(rows, name, size, processes, floor) for name, processes in cases]
    columns = head.count("|") - 1
    title = f"**{_size_in_words(rows, size)}**"
    return "\n".join([title, "", head, "|" + " --- |" * columns, *lines])


def _order(row: Row) -> tuple[int, int, str]:
    return ("floor", "ours", "client", "peer").index(row["kind"]), row["processes"], row["case"]


def _size_in_words(rows: Sequence[Row], size: str) -> str:
    found = next((row["bytes"] for row in rows if row.get("bytes")), 0)
    if not found:
        return f"{size} retained"
    return f"{size}: {found / GIB:.2f} GiB" if found >= GIB / 10 else f"{size}: {found / 2**20:.1f} MiB"


def _failed(rows: Sequence[Row], name: str, shown: str, processes: int = 0) -> str:
    said = next(r["error"] for r in rows if r["case"] == name and r["processes"] == processes and "error" in r)
    return f"| {shown} | 0 | failed: {re.sub('[|`]', ' ', said)} |"


def _shown(rows: Sequence[Row], name: str, processes: int = 0) -> str:
    kind = next(row["kind"] for row in rows if row["case"] == name)
    text = f"{name} ×{processes}" if processes else name
    return {"ours": f"**{text}**", "floor": f"*{text}*"}.get(kind, text)


def _transfer_line(rows: Sequence[Row], name: str, size: str, processes: int, floor: str) -> str:
    found, base = good(rows, name, size, processes), good(rows, floor, size, processes)
    shown = _shown(rows, name, processes)
    if not found:
        return _failed(rows, name, shown, processes)
    walls = [row["wall_s"] for row in found.values()]
    wall = statistics.median(walls)
    gib = next(iter(found.values()))["bytes"] / GIB
    cpu = median_of(found, lambda row: row["cpu_s"])
    peak = median_of(found, lambda row: row["peak_bytes"] / row["bytes"])
    last = found[max(found)].get("requests", {})
    asked = ", ".join(f"{count} {kind}" for kind, count in sorted(last.items()))
    return (
        f"| {shown} | {len(walls)} | {wall:.3f} ({min(walls):.3f}–{max(walls):.3f}) | {gib / wall:.2f} "
        f"| {_ratio(found, base, lambda row: row['wall_s'])} | {cpu / gib:.2f} "
        f"| {_ratio(found, base, lambda row: row['cpu_s'])} | {peak:.2f} | {asked} |"
    )


def _stall_line(rows: Sequence[Row], name: str, size: str, floor: str) -> str:
    found, base = good(rows, name, size), good(rows, floor, size)
    shown = _shown(rows, name)
    if not found:
        return _failed(rows, name, shown)
    slowed = [row["later"]["slowdown"] for row in found.values() if row["later"]["slowdown"]]

    def later(field: str) -> float:
        return median_of(found, lambda row: row["later"][field])

    return (
        f"| {shown} | {len(found)} | {median_of(found, lambda row: row['first']['stall_s']):.3f} "
        f"| {later('stall_s'):.3f} | {_ratio(found, base, lambda row: row['later']['stall_s'])} "
        f"| {later('total_s'):.2f} | {later('lost_s'):.3f} "
        f"| {f'{statistics.median(slowed):.2f} ×' if slowed else '–'} "
        f"| {median_of(found, lambda row: row['peak_bytes'] / row['bytes']):.2f} |"
    )


def _question_line(rows: Sequence[Row], name: str, size: str) -> str:
    found = good(rows, name, size)
    shown = _shown(rows, name)
    if not found:
        return _failed(rows, name, shown)
    asked = ", ".join(f"{count:g} {kind}" for kind, count in sorted(found[max(found)]["requests"].items()))
    wall, cpu = median_of(found, lambda row: row["wall_s"]), median_of(found, lambda row: row["cpu_s"])
    return f"| {shown} | {len(found)} | {wall:.4f} | {cpu:.4f} | {asked} |"


# -- the bars ----------------------------------------------------------------------------------------------------


def judged(results: Results) -> list[Verdict]:
    """Every bar against the results there are."""
    return [judge(bar, results.rows.get(bar.plan, [])) for bar in BARS]


def bars_table(results: Results, *, measured_only: bool = False) -> str:
    """Every bar with what was measured and whether it is met; or only those that something was measured for."""
    head = "| what | must | measured | upper 95 % bound | pairs | verdict | command |\n" + "|" + " --- |" * 7
    verdicts = [verdict for verdict in judged(results) if not (measured_only and verdict.why_not)]
    return "\n".join([head, *map(_bar_line, verdicts)])


def _bar_line(verdict: Verdict) -> str:
    bar = verdict.bar
    against = f"× {verdict.base or bar.base}" if bar.base else bar.unit
    if bar.base_size:
        against = "×"
    must = f"≤ {bar.limit:.4g} {against}"
    command = f"`python -m benchmarks {bar.plan}`"
    if verdict.why_not:
        return f"| {bar.what} | {must} | {verdict.why_not} | – | 0 | **not measured** | {command} |"
    if bar.base:
        seconds = f" ({verdict.median:.3f} s : {verdict.base_median:.3f} s)"
        upper = f"{verdict.upper:.2f}" if math.isfinite(verdict.upper) else "none: too few pairs"
        measured = f"{verdict.value:.2f}{seconds}"
    else:
        measured, upper = f"{verdict.value:.4g} at most", f"{verdict.upper:.4g}"
    said = "met" if verdict.met else "**not met**"
    return f"| {bar.what} | {must} | {measured} | {upper} | {verdict.pairs} | {said} | {command} |"
