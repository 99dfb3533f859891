"""How far a transfer is, on standard error: a bar on a terminal, otherwise a line a minute."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator

from rich.console import Console

from cloudckpt.cli.render import errors
from cloudckpt.config import Settings
from cloudckpt.core.text import format_duration
from cloudckpt.events import Event, TransferProgress, TransferStalled
from cloudckpt.progress import Meter, watched

__all__ = ["shown"]

#: Objects that a warning names; how many more there are, it says.
_NAMED = 3


@contextlib.contextmanager
def shown(what: str, *, quiet: bool, now: Callable[[], float] = time.monotonic) -> Iterator[Meter]:
    """Show what the meter is told during the block; nothing if ``quiet``, or CLOUDCKPT_PROGRESS=0.

    Args:
        now: the meter's clock.
    """
    meter = Meter(what, now=now)
    if quiet or os.environ.get("CLOUDCKPT_PROGRESS") == "0":
        yield meter
        return
    console = Console(stderr=True, highlight=False)
    with (
        watched(meter, _Lines(), Settings()),
        _bar(meter, console) if console.is_terminal else contextlib.nullcontext(),
    ):
        yield meter


def _bar(meter: Meter, console: Console) -> contextlib.AbstractContextManager[object]:
    from rich.console import RenderableType  # noqa: PLC0415 - only where there is a terminal
    from rich.progress import (  # noqa: PLC0415
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    class Bar(Progress):
        """Looks at the meter whenever it is drawn."""

        def get_renderables(self) -> Iterator[RenderableType]:
            """The bar as it is now."""
            found = meter.transfer
            for task in self.task_ids:
                self.update(task, completed=found.bytes_done, total=found.bytes_total or None)
            yield from super().get_renderables()

    bar = Bar(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(compact=True),
        console=console,
        transient=True,
    )
    bar.add_task(meter.transfer.what, total=None)
    return bar


class _Lines:
    """Writes what a watch says, a line each; of a transfer that goes on only where no bar does."""

    def __call__(self, event: Event, /) -> None:
        """Write it."""
        console = errors()
        if isinstance(event, TransferStalled):
            console.print(
                f"{event.what}: nothing has moved for {format_duration(event.seconds)}{_waited_for(event.objects)}",
                markup=False,
            )
        elif isinstance(event, TransferProgress) and not console.is_terminal:
            console.print(event.line, markup=False)


def _waited_for(objects: tuple[str, ...]) -> str:
    if not objects:
        return ""
    more = f" and {len(objects) - _NAMED} more" if len(objects) > _NAMED else ""
    return f"; under way: {', '.join(objects[:_NAMED])}{more}"
