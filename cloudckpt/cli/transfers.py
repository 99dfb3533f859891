"""How far a transfer is, on standard error: a bar on a terminal, otherwise a line a minute."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator

from rich.console import Console

from cloudckpt.cli.render import errors
from cloudckpt.config import Settings
from cloudckpt.core.text import format_duration
from cloudckpt.events import Event, TransferProgress, TransferStalled
from cloudckpt.progress import Meter, watched

__all__ = ["shown"]


@contextlib.contextmanager
def shown(what: str, *, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """Show what is told (bytes done, of how many) during the block; nothing if ``quiet``, or CLOUDCKPT_PROGRESS=0."""
    meter = Meter(what)
    if quiet or os.environ.get("CLOUDCKPT_PROGRESS") == "0":
        yield meter.reach
        return
    console = Console(stderr=True, highlight=False)
    with watched(meter, _Lines(), Settings()):
        if not console.is_terminal:
            yield meter.reach
            return
        from rich.progress import (  # noqa: PLC0415 - only where there is a terminal
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            TimeRemainingColumn(compact=True),
        )
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task(what, total=None)

            def reach(done: int, total: int) -> None:
                meter.reach(done, total)
                bar.update(task, completed=done, total=total)

            yield reach


class _Lines:
    """Writes what a watch says, a line each."""

    def __call__(self, event: Event, /) -> None:
        """Write it."""
        console = errors()
        if isinstance(event, TransferStalled):
            console.print(f"{event.what}: nothing has moved for {format_duration(event.seconds)}", markup=False)
        elif isinstance(event, TransferProgress) and not console.is_terminal:
            console.print(event.line, markup=False)
