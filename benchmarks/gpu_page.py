"""The results page's part about one GPU, from the lines that ``gpu_saves.py`` printed."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["gpu_section"]

Line = Mapping[str, Any]
_SAID = {
    "copy": '`stage="copy"`: `save()` returns when the copy is made',
    "accumulated": '`stage="overlap"`, an update in every other step',
    "borrowed": '`stage="overlap"`, an update in every step, half of the state copied within the device first',
    "overlap": '`stage="overlap"`, an update in every step: it waits for the rest of the copy',
}
_RATE_BAR, _FIRST_BAR, _LOST_BAR = 0.9, 2.0, 0.05


def gpu_section(path: Path) -> str:
    """Markdown; empty if there are no results."""
    if not path.exists():
        return ""
    lines: list[Line] = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    by_case: dict[str, list[Line]] = {}
    for line in lines:
        by_case.setdefault(line["case"], []).append(line)
    (machine,), (raw,), (restored,) = by_case["machine"], by_case["raw"], by_case["restore"]
    exact = "equal bit for bit" if restored["exact"] else "NOT EQUAL"
    copy_s = machine["gib"] / raw["gib_s"]
    facts = (
        f"{machine['device']}, torch {machine['torch']}; {machine['gib']:.1f} GiB of parameters under fused AdamW, a "
        f"step of {machine['step_s']:.2f} s. Floor: the link's own rate to pinned memory, {raw['gib_s']:.1f} GiB/s: "
        f"a copy takes {copy_s:.2f} s, whoever makes it. An update within that time waits for the rest of it, unless "
        "`overlap_device_bytes` lends memory of the device. Command: `python benchmarks/gpu_saves.py --gib 20 > "
        "benchmarks/results/gpu/saves.jsonl`, then `make bench-report`."
    )
    head = "| mode | first save blocks, s | later | × raw rate | lost by a running loop, of a step (min–max) |"
    rows = [_row(said, by_case[name]) for name, said in _SAID.items() if name in by_case]
    back = f"Restored into the GPU in {restored['s']:.2f} s ({restored['gib_s']:.1f} GiB/s), {exact}."
    parts = ["## One GPU", "", facts, "", *_bars(by_case), "", head, "| --- | --- | --- | --- | --- |", *rows, "", back]
    return "\n".join(parts) + "\n"


def _row(said: str, saves: Sequence[Line]) -> str:
    first, *later = (save["blocked_s"] for save in saves)
    lost = [save["lost_of_step"] for save in saves]
    rate = statistics.median(save["of_raw"] for save in saves)
    shown = f"{rate:.2f}" if 'copy"' in said else ""
    return (
        f"| {said} | {first:.3f} | {statistics.median(later):.3f} | {shown} | {statistics.median(lost):.1%} "
        f"({min(lost):.1%}–{max(lost):.1%}) |"
    )


def _bars(by_case: Mapping[str, Sequence[Line]]) -> list[str]:
    copies = by_case["copy"]
    first, *later = (save["blocked_s"] for save in copies)
    slow = max(line["worst_step"] for line in by_case["prepare"])
    said = [
        (
            "`save()` blocks, copy mode, of the raw rate",
            min(save["of_raw"] for save in copies),
            _RATE_BAR,
            "≥",
            "{:.1%}",
        ),
        (
            "first save, 30 s after `prepare`, by a later one",
            first / statistics.median(later),
            _FIRST_BAR,
            "≤",
            "{:.2f}",
        ),
    ]
    said += [
        (
            f"training lost, {name}, of a step",
            max(save["lost_of_step"] for save in by_case[name]),
            _LOST_BAR,
            "≤",
            "{:.1%}",
        )
        for name in ("accumulated", "borrowed", "overlap")
        if name in by_case
    ]
    rows = ["| what (the worst of its saves) | bar | value | |", "| --- | --- | --- | --- |"]
    for what, value, bar, sign, shown in said:
        met = value >= bar if sign == "≥" else value <= bar
        rows.append(
            f"| {what} | {sign} {shown.format(bar)} | {shown.format(value)} | {'met' if met else '**missed**'} |"
        )
    rows += [
        "",
        f"While the staging memory is made and pinned in the background, the slowest step took {slow:.2f} × its time.",
    ]
    return rows
