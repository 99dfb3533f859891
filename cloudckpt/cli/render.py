"""Checkpoints as tables for people and as JSON for programs. Both say the same."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from rich.cells import cell_len, chop_cells
from rich.console import Console, ConsoleOptions, RenderableType
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


#: A column that folds is as wide as its cells, or at least so wide; below that a table is hard to read.
_FOLDED_WIDTH = 12

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


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a ``Listing``.

    Attributes:
        name: its heading.
        line: the columns of one number are on one line of a block.
        words: in a table its cells stand on the left and may fold; others are numbers, on the right and in one piece.
    """

    name: str
    line: int
    words: bool = False


class Listing:
    """Rows as a table; where the terminal is too narrow for one, a block of lines for each row. Nothing is ever cut."""

    def __init__(self, columns: Sequence[Column]) -> None:
        self._columns = columns
        self._rows: list[tuple[tuple[str, ...], str]] = []

    def add(self, *cells: str, style: str = "") -> None:
        """Add a row: as many cells as there are columns."""
        self._rows.append((cells, style))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        table = self._table()
        if console.measure(table, options=options.update(width=_PIPE_WIDTH)).minimum <= options.max_width:
            yield table
            return
        for cells, style in self._rows:
            first, *others = self._block(cells, options.max_width)
            text = Text(style=style)
            yield text.append(first, style="bold").append("".join(f"\n{line}" for line in others))

    def _table(self) -> Table:
        # What people wrote goes in as Text: brackets in a string would be taken for rich's markup.
        table = Table(box=None, pad_edge=False, header_style="bold")
        for number, column in enumerate(self._columns):
            widest = max(cell_len(text) for text in (column.name, *(cells[number] for cells, _ in self._rows)))
            table.add_column(
                Text(column.name),
                justify="left" if column.words else "right",
                overflow="fold",
                no_wrap=not column.words,
                min_width=min(widest, _FOLDED_WIDTH) if column.words else widest,
            )
        for cells, style in self._rows:
            table.add_row(*map(Text, cells), style=style)
        return table

    def _block(self, cells: Sequence[str], width: int) -> Iterator[str]:
        """Each cell behind the name of its column; only the lines after the first are indented."""
        indent = ""
        for line in sorted({column.line for column in self._columns}):
            found = zip(self._columns, cells, strict=True)
            items = [f"{column.name} {cell}" for column, cell in found if column.line == line and cell not in {"", "-"}]
            for text in _filled(items, width - 2 if indent else width):
                yield indent + text
                indent = "  "


def _filled(items: Sequence[str], width: int) -> Iterator[str]:
    """As many items on a line as go there; what is longer than a line goes on on the next."""
    line = ""
    for item in items:
        if line and cell_len(line) + 2 + cell_len(item) > width:
            yield line
            line = ""
        line = f"{line}  {item}" if line else item
        while cell_len(line) > width:
            first = chop_cells(line, max(1, width))[0]
            if (space := first.rfind(" ")) > 0:
                first = first[:space]
            yield first
            line = line[len(first) :].lstrip()
    if line:
        yield line


def checkpoints_table(checkpoints: Sequence[Checkpoint], arrived: Mapping[str, int] | None = None) -> Listing:
    """The listing, newest first: what each is, what it measured, and why it is kept.

    Args:
        arrived: by save id, how many bytes of an upload in flight are in place.
    """
    metrics = sorted({name for c in checkpoints for name in c.metrics})
    listing = Listing(
        [
            *(Column(name, 0) for name in ("STEP", "AGE", "SIZE")),
            *(Column(name, 1) for name in metrics),
            Column("KEPT BECAUSE", 2, words=True),
            Column("STATE", 3, words=True),
        ]
    )
    for c in sorted(checkpoints, key=lambda c: -c.seq):
        listing.add(
            str(c.step),
            age(c.committed_at or c.announced_at),
            format_bytes(c.size_bytes),
            *(format_metric(c.metrics[name]) if name in c.metrics else "-" for name in metrics),
            ", ".join(c.kept_because) if c.state is State.COMMITTED else "-",
            _state(c, arrived),
            style="dim" if c.state is State.RETIRED else "",
        )
    return listing


def _state(checkpoint: Checkpoint, arrived: Mapping[str, int] | None) -> str:
    text = state_text(checkpoint)
    done = (arrived or {}).get(checkpoint.id)
    if checkpoint.state is not State.PENDING or done is None or not checkpoint.size_bytes:
        return text
    share = min(99, 100 * done // checkpoint.size_bytes)  # not whole before it is committed
    return text.replace("uploading", f"uploading {share} %", 1)


def runs_table(runs: Sequence[RunSummary]) -> Listing:
    """Several runs: the newest and the best of each."""
    listing = Listing(
        [
            Column("RUN", 0, words=True),
            *(Column(name, 1) for name in ("CHECKPOINTS", "SIZE", "LATEST", "AGE")),
            Column("BEST", 2, words=True),
            Column("STATE", 3, words=True),
        ]
    )
    for run in runs:
        value = "" if run.best_value is None else f" ({run.metric}={format_metric(run.best_value)})"
        words = [f"{run.uploading} uploading"] if run.uploading else []
        words += ["closed" if run.closed else "open"]
        listing.add(
            run.name,
            str(run.checkpoints),
            format_bytes(run.size_bytes),
            str(run.latest.step) if run.latest else "-",
            age(run.latest.committed_at) if run.latest else "-",
            f"{run.best.step}{value}" if run.best else "-",
            run.problem or ", ".join(words),
        )
    return listing
