"""The results page's part about several GPUs, from the lines that ``gpu_fsdp2.py`` printed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["several_gpus_section"]

Line = Mapping[str, Any]
_SAID = {
    "copy": 'cloudckpt, `stage="copy"`',
    "overlap": 'cloudckpt, `stage="overlap"`',
    "thread": "`dcp.async_save`, thread, pinned",
    "process": "`dcp.async_save`, process, pinned",
}
_PLACES = {"s3": "an S3 server on loopback (the sink)", "local": "local disk"}
_COLUMNS = ("blocks, ms (p99)", "first", "step beside", "durable after, s", "restore, s", "host memory")


def several_gpus_section(path: Path) -> str:
    """Markdown; empty if there are no results."""
    if not path.exists():
        return ""
    lines: list[Line] = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    machine = next(line for line in lines if line["case"] == "machine")
    facts = (
        f"{machine['ranks']} × {machine['device']}, torch {machine['torch']}, {machine['cores']} cores; a transformer "
        f"under FSDP2 (NCCL) with fp32 AdamW, {machine['gib']:g} GiB of state a rank. *Blocks* is the call that saves, "
        "on the slowest rank, median and 99th percentile; *step beside* is the median step during an upload by the "
        "median step between saves; *host memory* is the most above the start on one rank, helpers and pinned memory "
        "included, by that rank's state. The peers write to S3 by torch's own fsspec writer (s3fs), and locally by its "
        "file writer. Command: `python benchmarks/gpu_fsdp2.py > benchmarks/results/gpu/fsdp2.jsonl`, then "
        "`make bench-report`."
    )
    parts = ["## Several GPUs", "", facts, ""]
    for kind, said in _PLACES.items():
        if rows := [_row(line) for line in lines if line.get("to") == kind]:
            parts += [f"| to {said} | {' | '.join(_COLUMNS)} |", "| --- " * (1 + len(_COLUMNS)) + "|", *rows, ""]
    parts += [_killed(lines), *(f"{line['case']}: {line['error']}" for line in lines if "error" in line)]
    return "\n".join(parts).rstrip() + "\n"


def _row(line: Line) -> str:
    values = (
        _SAID[line["case"]] + ("" if line["exact"] else " **NOT EQUAL**"),
        f"{1000 * line['blocks_s']:.0f} ({1000 * line['blocks_p99_s']:.0f})",
        f"{1000 * line['first_blocks_s']:.0f}",
        "" if line["slowdown"] is None else f"× {line['slowdown']:.2f}",
        f"{line['total_s']:.2f}",
        f"{line['restore_s']:.2f}",
        f"× {line['host_gib'] / line['state_gib']:.2f}",
    )
    return f"| {' | '.join(values)} |"


def _killed(lines: Sequence[Line]) -> str:
    killed = next((line for line in lines if line["case"] == "killed"), None)
    again = next((line for line in lines if line["case"] == "restarted"), None)
    if killed is None or again is None:
        return ""
    exact = "equal bit for bit" if again["exact"] else "NOT EQUAL"
    return (
        f"Rank 1 of {killed['ranks']} was killed with SIGKILL in mid-upload: after {killed['told_after_s']:.2f} s the "
        f"others raised `{killed['said']}`. Started again on {again['ranks']}, the job went on from the last committed "
        f"save (step {again['step']}), {exact}."
    )
