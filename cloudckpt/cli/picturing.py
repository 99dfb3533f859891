"""Commands to look at rather than to read: plot, watch; and cost."""

from __future__ import annotations

import math
import shutil
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console, Group, RenderableType
from rich.text import Text

from cloudckpt.cli.common import Json, Place, Quiet, Root, root_of, store_at, view_at
from cloudckpt.cli.pipes import wait_for_reader
from cloudckpt.cli.render import age, checkpoints_table, event_line, output, print_json
from cloudckpt.core.model import Checkpoint, JournalEvent, Manifest, State
from cloudckpt.core.text import format_bytes, format_duration
from cloudckpt.errors import CheckpointNotFoundError, StorageError
from cloudckpt.listing import arrived_bytes
from cloudckpt.storage import ManifestStore
from cloudckpt.view import RunView, placed

__all__ = ["cost", "follow", "plot", "screen", "watch"]

# Imported when they are used, so that the other commands start sooner.
# ruff: noqa: PLC0415

#: Events shown below the table by ``watch``.
_EVENTS_SHOWN = 8
#: The longest pause of ``watch``: nobody waits for more, and no platform's timer ends below it.
_DAY_S = 86_400


def _a_number(value: float) -> float:
    if math.isnan(value):  # which is neither below a minimum nor above a maximum
        raise typer.BadParameter("nan is no number")
    return value


def plot(
    place: Place = None,
    root: Root = None,
    metric: Annotated[str | None, typer.Option(help="By default the monitored one.")] = None,
    path: Annotated[Path | None, typer.Option("--output", "-o", help="A file to write: .svg, .png or .html.")] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Draw a metric over the steps, with saved, best, pinned, uploading, deleted and failed ones marked.

    Needs the extra "plot". Examples: cloudckpt plot ./runs/demo; cloudckpt plot ./runs/demo -o loss.svg
    """
    from cloudckpt.plotting import plot_of, plot_text, write_plot

    drawn = plot_of(view_at(root_of(place, root)), metric)
    if path is not None:
        write_plot(drawn, path)
    if json:
        print_json({"root": drawn.url, "metric": drawn.metric, "points": list(drawn.points), "path": path})
    elif path is not None:
        sys.stdout.write(f"{path}\n")
    elif not quiet:
        console = output()
        size = shutil.get_terminal_size()
        height = max(12, min(size.lines - 4, 30))
        coloured = console.is_terminal and console.color_system is not None and not console.no_color
        text = plot_text(
            drawn,
            width=min(size.columns, 140),
            height=height,
            colour=coloured,
            rgb=console.color_system == "truecolor",
        )
        sys.stdout.write(f"{text}\n")


def watch(
    place: Place = None,
    root: Root = None,
    every: Annotated[
        float,
        typer.Option("--every", min=0.2, max=_DAY_S, callback=_a_number, help="Seconds between two looks."),
    ] = 2.0,
    count: Annotated[int | None, typer.Option("--count", "-n", min=1, help="Stop after so many looks.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Each new event as one line of JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Of each new event its name and its save.")] = False,
) -> None:
    """Watch a run: its checkpoints, uploads in flight and what happens. Ends with Ctrl-C.

    On a terminal the screen is drawn anew; in a pipe, with --json or -q each new event is a line.
    Examples: cloudckpt watch ./runs/demo; cloudckpt watch s3://bucket/run --json
    """
    store = store_at(root_of(place, root))
    console = output()
    if json or quiet or not console.is_terminal:
        tell = partial(_tell_json, store.storage.url) if json else _tell_quietly if quiet else partial(_tell, console)
        follow(store, tell, every_s=every, count=count)
        return
    from rich.live import Live

    with Live(console=console, screen=False, auto_refresh=False) as live:
        looks = 0
        while True:
            live.update(screen(store), refresh=True)
            looks += 1
            if looks == count:
                return
            time.sleep(every)


def screen(store: ManifestStore) -> RenderableType:
    """What ``watch`` shows at one moment. An error of the store is shown and does not end it."""
    view = RunView(store)
    try:
        manifest = view.manifest()
        entries = [placed(e, view.url) for e in manifest.entries if e.state is not State.RETIRED]
        arrived = _arrived(store, entries)
    except CheckpointNotFoundError:
        return Text(f"{view.url}: nothing was saved there yet", style="dim")
    except StorageError as exc:
        return Text(f"{view.url}: {exc}", style="red")
    title = Text(f"{view.url}  revision {manifest.revision}, {_writer(manifest)}", style="bold")
    events = [Text(event_line(event), style="dim") for event in manifest.journal[-_EVENTS_SHOWN:]]
    return Group(title, checkpoints_table(entries, arrived), Text(""), *events)


def _arrived(store: ManifestStore, entries: list[Checkpoint]) -> dict[str, int]:
    try:
        return arrived_bytes(store, entries)
    except StorageError:
        return {}


def _writer(manifest: Manifest) -> str:
    if manifest.owner is None:
        return "no writer yet"
    state = "closed by" if manifest.owner.closed else "open, writer"
    return f"{state} {manifest.owner}, written {age(manifest.updated_at)} ago"


def _tell(console: Console, news: JournalEvent | StorageError) -> None:
    console.print(event_line(news) if isinstance(news, JournalEvent) else str(news), markup=False)


def _tell_quietly(news: JournalEvent | StorageError) -> None:
    if isinstance(news, JournalEvent):
        sys.stdout.write(f"{event_line(news, quiet=True)}\n")
        sys.stdout.flush()
    else:
        sys.stderr.write(f"{news}\n")


def _tell_json(url: str, news: JournalEvent | StorageError) -> None:
    event, problem = (news, None) if isinstance(news, JournalEvent) else (None, str(news))
    print_json({"root": url, "event": event, "problem": problem}, as_line=True)


def follow(
    store: ManifestStore,
    tell: Callable[[JournalEvent | StorageError], None],
    *,
    every_s: float,
    count: int | None,
    wait: Callable[[float], None] = wait_for_reader,
) -> None:
    """Tell each event of the journal once, as it comes.

    Args:
        tell: also told of each look that the store did not answer.
        every_s: seconds between two looks.
        count: how many looks; None for no end.
        wait: waits that many seconds.
    """
    view = RunView(store)
    known: set[str] = set()
    looks = 0
    while True:
        try:
            journal = view.journal()
        except CheckpointNotFoundError:
            pass  # not begun yet
        except StorageError as exc:
            tell(exc)
        else:
            # A repair mints a new run with a journal of its own: what is not known is told, whatever its number.
            for event in journal:
                if event_line(event) not in known:
                    tell(event)
            known = set(map(event_line, journal))
        looks += 1
        if looks == count:
            return
        wait(every_s)


def cost(
    place: Place = None,
    root: Root = None,
    every: Annotated[
        float | None, typer.Option("--every", help="Seconds from save to save; by default as the journal tells.")
    ] = None,
    restores: Annotated[float, typer.Option("--restores", min=0, help="Whole checkpoints read a month.")] = 0.0,
    hours: Annotated[float, typer.Option("--hours", min=0, help="Hours of training a month.")] = 730.0,
    price_put: Annotated[float, typer.Option("--price-put", min=0, help="Of 1,000 writing requests.")] = 0.0,
    price_get: Annotated[float, typer.Option("--price-get", min=0, help="Of 1,000 reading requests.")] = 0.0,
    price_storage: Annotated[float, typer.Option("--price-gib-month", min=0, help="Of a GiB for a month.")] = 0.0,
    price_egress: Annotated[float, typer.Option("--price-egress", min=0, help="Of a GiB read from outside.")] = 0.0,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Reckon what a run costs: requests and bytes of each save and of a month, at prices that you give.

    The prices are your store's, in any currency; nothing is looked up. -q prints the total alone.
    Example: cloudckpt cost s3://bucket/run --price-put 0.005 --price-gib-month 0.023
    """
    from cloudckpt.core.pricing import Prices
    from cloudckpt.costing import cost_of_run

    prices = Prices(put=price_put, get=price_get, gib_month=price_storage, egress_gib=price_egress)
    found = cost_of_run(
        store_at(root_of(place, root)),
        prices=prices,
        save_every_s=every,
        restores_a_month=restores,
        hours_a_month=hours,
    )
    costs = found.costs
    if json:
        print_json({"found": found, "total": costs.total})
        return
    if quiet:
        sys.stdout.write(f"{costs.total:.2f}\n")
        return
    requests = costs.requests
    lines = [
        (
            f"one save      {format_bytes(costs.save_bytes)}, {requests.writing} writing requests ({requests.payload} "
            f"of payload, {requests.index} index, {requests.manifest} manifest), {requests.deletes} deletes"
        ),
        (
            f"a month       {costs.saves_a_month:.0f} saves (every {format_duration(found.save_every_s)}, "
            f"{'as given' if found.every_from == 'given' else 'by the journal'}; {found.hours_a_month:g} h), "
            f"{costs.requests_a_month:.0f} writing requests, {format_bytes(costs.bytes_a_month)} sent"
        ),
        f"kept          {format_bytes(costs.kept_bytes)} in {found.kept} checkpoints",
    ]
    if costs.total:
        lines.append(
            f"at your prices  {costs.total:.2f} a month: {costs.storage_cost:.2f} kept, {costs.request_cost:.2f} "
            f"requests, {costs.egress_cost:.2f} read from outside"
        )
    else:
        lines.append("give --price-put, --price-get, --price-gib-month and --price-egress to see what that costs")
    for line in lines:
        output().print(line, markup=False)
