"""Checkpoints as tables for people and as JSON for programs. Both say the same."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from cloudckpt.core.markup import state_text
from cloudckpt.core.model import Checkpoint, JournalEvent, State
from cloudckpt.core.text import format_bytes, format_duration, format_metric
from cloudckpt.listing import RunSummary

__all__ = [
    "age",
    "as_json",
    "checkpoint_json",
    "checkpoints_table",
    "errors",
    "event_line",
    "output",
    "print_json",
    "runs_table",
]


#: A pipe has no width; tables take what they need of this.
_PIPE_WIDTH = 1000


def output() -> Console:
    """Standard output; without a terminal neither colours nor a guessed width."""
    piped = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    return Console(soft_wrap=not sys.stdout.isatty(), highlight=False, width=_PIPE_WIDTH if piped else None)


def errors() -> Console:
    """Standard error."""
    return Console(stderr=True, soft_wrap=True, highlight=False)


def as_json(value: Any) -> Any:  # noqa: PLR0911 - a case a type
    """A value as JSON types: dataclasses by field, NaN and infinities as strings."""
    if isinstance(value, Checkpoint):
        return checkpoint_json(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: as_json(getattr(value, f.name)) for f in dataclasses.fields(value) if f.name != "extra"}
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {str(key): as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    return value


def checkpoint_json(checkpoint: Checkpoint) -> dict[str, Any]:
    """A checkpoint as every ``--json`` gives it."""
    fields = {f.name: as_json(getattr(checkpoint, f.name)) for f in dataclasses.fields(checkpoint)}
    hidden = {"extra", "root"}
    return {
        **{k: str(v) if k == "state" else v for k, v in fields.items() if k not in hidden},
        "name": checkpoint.name,
        "url": checkpoint.url,
    }


def print_json(document: Any, *, as_line: bool = False) -> None:
    """One JSON document on standard output; on a line of its own, sent at once, where more are to follow."""
    sys.stdout.write(json.dumps(as_json(document), indent=None if as_line else 2, ensure_ascii=False) + "\n")
    if as_line:
        sys.stdout.flush()


def event_line(event: JournalEvent, *, quiet: bool = False) -> str:
    """An event of the journal on a line: when, in which revision, what, which save, and more about it."""
    name = f" checkpoint-{event.step}.{event.id}" if event.id else ""
    if quiet:
        return f"{event.event}{name}"
    detail = f": {event.detail}" if event.detail else ""
    return f"{event.at}  r{event.revision:<5} {event.event}{name}{detail}"


def age(at: str | None) -> str:
    """How long ago, for people."""
    if at is None:
        return "-"
    now = datetime.now(UTC)  # noqa: TID251 - an age for people is relative to now
    return format_duration(max(0.0, (now - datetime.fromisoformat(at)).total_seconds()))


def checkpoints_table(checkpoints: Sequence[Checkpoint], arrived: Mapping[str, int] | None = None) -> Table:
    """The listing, newest first: what each is, what it measured, and why it is kept.

    Args:
        arrived: by save id, how many bytes of an upload in flight are in place.
    """
    # What people wrote goes in as Text: brackets in a string would be taken for rich's markup.
    metrics = sorted({name for c in checkpoints for name in c.metrics})
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("STEP", justify="right")
    table.add_column("AGE", justify="right")
    table.add_column("SIZE", justify="right")
    for name in metrics:
        table.add_column(Text(name), justify="right")
    table.add_column("KEPT BECAUSE", overflow="fold")
    table.add_column("STATE", overflow="fold")
    for c in sorted(checkpoints, key=lambda c: -c.seq):
        table.add_row(
            str(c.step),
            age(c.committed_at or c.announced_at),
            format_bytes(c.size_bytes),
            *(format_metric(c.metrics[name]) if name in c.metrics else "-" for name in metrics),
            Text(", ".join(c.kept_because) if c.state is State.COMMITTED else "-"),
            Text(_state(c, arrived)),
            style="dim" if c.state is State.RETIRED else None,
        )
    return table


def _state(checkpoint: Checkpoint, arrived: Mapping[str, int] | None) -> str:
    text = state_text(checkpoint)
    done = (arrived or {}).get(checkpoint.id)
    if checkpoint.state is not State.PENDING or done is None or not checkpoint.size_bytes:
        return text
    share = min(99, 100 * done // checkpoint.size_bytes)  # not whole before it is committed
    return text.replace("uploading", f"uploading {share} %", 1)


def runs_table(runs: Sequence[RunSummary]) -> Table:
    """Several runs: the newest and the best of each."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("RUN", overflow="fold")
    for name in ("CHECKPOINTS", "SIZE", "LATEST", "AGE"):
        table.add_column(name, justify="right")
    table.add_column("BEST", overflow="fold")
    table.add_column("STATE", overflow="fold")
    for run in runs:
        value = "" if run.best_value is None else f" ({run.metric}={format_metric(run.best_value)})"
        words = [f"{run.uploading} uploading"] if run.uploading else []
        words += ["closed" if run.closed else "open"]
        table.add_row(
            Text(run.name),
            str(run.checkpoints),
            format_bytes(run.size_bytes),
            str(run.latest.step) if run.latest else "-",
            age(run.latest.committed_at) if run.latest else "-",
            Text(f"{run.best.step}{value}" if run.best else "-"),
            Text(run.problem or ", ".join(words)),
        )
    return table
