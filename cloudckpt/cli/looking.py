"""Commands that only look: ls, show, best, latest, log, diff."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from cloudckpt.cli.common import Json, Place, Quiet, Root, Select, root_of, split, store_at, view_at
from cloudckpt.cli.render import age, as_json, checkpoints_table, event_line, output, print_json, runs_table
from cloudckpt.core.model import Checkpoint, Index, Manifest, State
from cloudckpt.core.retention import metric_value
from cloudckpt.core.selection import select_best
from cloudckpt.core.text import format_bytes, format_metric
from cloudckpt.errors import CheckpointNotFoundError, FormatError, StorageError
from cloudckpt.listing import RunSummary, arrived_bytes, find_runs
from cloudckpt.storage import ManifestStore
from cloudckpt.view import RunView, placed, read_index

__all__ = ["best", "diff", "latest", "list_checkpoints", "log", "show"]


def list_checkpoints(
    place: Place = None,
    root: Root = None,
    json: Json = False,
    quiet: Quiet = False,
    everything: Annotated[bool, typer.Option("--all", "-a", help="Retired ones as well.")] = False,
) -> None:
    """List the checkpoints of a run and why each is kept; or the runs below a prefix, with the best of each.

    Examples: cloudckpt ls ./runs/demo; cloudckpt ls s3://bucket/runs/
    """
    store = store_at(root_of(place, root))
    view = RunView(store)
    try:
        manifest = view.manifest()
    except (CheckpointNotFoundError, FormatError):
        # No run here: perhaps there are some below.
        if not (runs := _runs_below(store)):
            raise
        _print_runs(view.url, runs, json=json, quiet=quiet)
        return
    # All of it from one revision of the manifest.
    found = [placed(e, view.url) for e in manifest.entries if everything or e.state is not State.RETIRED]
    arrived = _arrived(store, found)
    if json:
        print_json(_listing_json(view, manifest, found, arrived))
    elif quiet:
        committed = [c for c in found if c.state is State.COMMITTED]
        sys.stdout.writelines(f"{c.name}\n" for c in sorted(committed, key=lambda c: -c.seq))
    else:
        _print_listing(manifest, found, arrived)


def _listing_json(
    view: RunView, manifest: Manifest, found: list[Checkpoint], arrived: dict[str, int]
) -> dict[str, Any]:
    return {
        "root": view.url,
        "run_id": manifest.run_id,
        "revision": manifest.revision,
        "policy": as_json(manifest.policy),
        "best": as_json(manifest.best),
        "recent": list(manifest.recent),
        "uploaded_bytes": arrived,
        "checkpoints": found,
    }


def _print_listing(manifest: Manifest, found: list[Checkpoint], arrived: dict[str, int]) -> None:
    console = output()
    console.print(checkpoints_table(found, arrived))
    committed = [c for c in found if c.state is State.COMMITTED]
    newest = max((c.committed_at for c in committed if c.committed_at), default=None)
    total = format_bytes(sum(c.size_bytes for c in committed))
    last = f", newest committed {age(newest)} ago" if newest else ""
    console.print(f"{len(committed)} checkpoints, {total}{last}; policy: {manifest.policy}", markup=False)


def _runs_below(store: ManifestStore) -> tuple[RunSummary, ...]:
    try:
        return find_runs(store.storage)
    except StorageError:
        return ()  # what was wrong with the root itself is the error to tell


def _arrived(store: ManifestStore, found: list[Checkpoint]) -> dict[str, int]:
    try:
        return arrived_bytes(store, found)
    except StorageError:
        return {}  # without the right to list, a listing has no percentages


def _print_runs(url: str, runs: tuple[RunSummary, ...], *, json: bool, quiet: bool) -> None:
    if json:
        print_json({"root": url, "runs": list(runs)})
    elif quiet:
        sys.stdout.writelines(f"{run.url}\n" for run in runs)
    else:
        output().print(runs_table(runs))


def show(select: Select, root: Root = None, json: Json = False, quiet: Quiet = False) -> None:
    """Show one checkpoint: what is in it, where, and why it is kept.

    Example: cloudckpt show best -r ./runs/demo
    """
    place, selector = split(select, root)
    store = store_at(place)
    checkpoint = RunView(store).select(selector)
    if quiet:
        sys.stdout.write(f"{checkpoint.url}\n")
        return
    index = read_index(store.storage, checkpoint)
    if json:
        print_json({"checkpoint": checkpoint, "index": _index_json(index)})
        return
    console = output()
    for label, value in _facts(checkpoint, index):
        console.print(f"[bold]{label:<12}[/bold] {value}")
    for item in index.objects:
        console.print(f"  {item.name}  {format_bytes(item.size_bytes)}  crc32c {item.crc32c:08x}", markup=False)


def _facts(checkpoint: Checkpoint, index: Index) -> list[tuple[str, str]]:
    count = {component: len(tensors) for component, tensors in index.tensors.items()}
    facts = [
        ("checkpoint", checkpoint.url),
        ("step", f"{checkpoint.step} (save {checkpoint.seq} of the run)"),
        ("committed", f"{checkpoint.committed_at} ({age(checkpoint.committed_at)} ago)"),
        ("size", f"{format_bytes(checkpoint.size_bytes)} in {checkpoint.object_count} objects"),
        ("metrics", ", ".join(f"{k}={format_metric(v)}" for k, v in sorted(checkpoint.metrics.items())) or "-"),
        ("kept because", ", ".join(checkpoint.kept_because) or "-"),
        ("components", ", ".join(f"{name} ({n} tensors)" for name, n in count.items())),
        ("world size", str(checkpoint.world_size)),
        ("versions", ", ".join(f"{k} {v}" for k, v in index.versions.items())),
    ]
    facts += [("tags", ", ".join(checkpoint.tags))] if checkpoint.tags else []
    facts += [("marks", ", ".join(checkpoint.marks))] if checkpoint.marks else []
    facts += [("damaged", checkpoint.damaged)] if checkpoint.damaged else []
    facts += [("pickled", "some values need allow_pickle=True")] if index.pickled else []
    return [(label, value.replace("[", r"\[")) for label, value in facts]


def _index_json(index: Index) -> dict[str, Any]:
    whole: dict[str, Any] = as_json(index)
    return {name: value for name, value in whole.items() if name != "structure"}


def best(
    place: Place = None,
    root: Root = None,
    metric: Annotated[str | None, typer.Option(help="Rank by this metric instead of the monitored one.")] = None,
    mode: Annotated[str | None, typer.Option(help="min or max; needed for another metric.")] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Print the best checkpoint by the run's monitor, or by any metric.

    Example: cloudckpt best ./runs/demo --metric accuracy --mode max
    """
    view = view_at(root_of(place, root))
    manifest = view.manifest()
    found = placed(select_best(manifest, metric, mode), view.url)
    rule = manifest.policy.monitor
    name = metric or (rule.metric if rule else "")
    if json:
        print_json({"metric": name, "value": metric_value(found.metrics, name), "checkpoint": found})
    elif quiet:
        sys.stdout.write(f"{found.url}\n")
    else:
        value = metric_value(found.metrics, name)
        shown = format_metric(value) if value is not None else "-"
        output().print(f"{found.url}: {name}={shown}", markup=False)


def latest(place: Place = None, root: Root = None, json: Json = False, quiet: Quiet = False) -> None:
    """Print the newest checkpoint that is neither marked nor damaged: the one that a restart goes on from.

    Example: cloudckpt latest -q ./runs/demo
    """
    found = view_at(root_of(place, root)).select("latest")
    if json:
        print_json({"checkpoint": found})
    elif quiet:
        sys.stdout.write(f"{found.url}\n")
    else:
        metrics = "".join(f" {name}={format_metric(value)}" for name, value in sorted(found.metrics.items()))
        output().print(f"{found.url}: committed {age(found.committed_at)} ago{metrics}", markup=False)


def log(
    place: Place = None,
    root: Root = None,
    json: Json = False,
    quiet: Quiet = False,
    count: Annotated[int, typer.Option("-n", min=1, help="How many events, the newest.")] = 30,
) -> None:
    """Print what happened to the run, newest last.

    With -q each line is an event and the save it is about. Example: cloudckpt log ./runs/demo -n 10
    """
    view = view_at(root_of(place, root))
    events = view.journal()[-count:]
    if json:
        print_json({"root": view.url, "events": list(events)})
        return
    console = output()
    for event in events:
        if quiet:
            sys.stdout.write(f"{event_line(event, quiet=True)}\n")
        else:
            console.print(event_line(event), markup=False)


def diff(
    before: Select,
    after: Select,
    root: Root = None,
    values: Annotated[
        bool, typer.Option("--values", help="Read the tensors that differ and say by how much. Needs torch.")
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare two checkpoints: metrics, components, names, shapes and dtypes of tensors, and which bytes differ.

    Reads two indexes and no payload. With -q only the names of the tensors that differ.
    Examples: cloudckpt diff best latest -r ./runs/demo; cloudckpt diff ./runs/a#best ./runs/b#best --values
    """
    from cloudckpt.diffing import diff_checkpoints  # noqa: PLC0415 - so that others start sooner

    (place_before, one), (place_after, two) = split(before, root), split(after, root)
    store_before, store_after = store_at(place_before), store_at(place_after)
    found = diff_checkpoints(store_before, one, store_after, two)
    changes: tuple[Any, ...] = ()
    if values:
        from cloudckpt.cli import with_tensors  # noqa: PLC0415 - torch

        changes = with_tensors.compare(store_before, store_after, found)
    if json:
        print_json({**as_json(found), "same": found.same, "by_how_much": list(changes) if values else None})
        return
    if quiet:
        sys.stdout.writelines(f"{tensor.name}\n" for tensor in found.tensors)
        return
    console = output()
    console.print(f"--- {found.before.url}\n+++ {found.after.url}", markup=False)
    for change in (*found.metrics, *found.facts, *found.components):
        console.print(f"{change.name}: {_side(change.before)} -> {_side(change.after)}", markup=False)
    known = {change.name: change for change in changes}
    for tensor in found.tensors:
        if values and tensor.kind == "unknown" and tensor.name not in known:
            continue  # read, and found to be the same
        sides = f" {tensor.before or '-'} -> {tensor.after or '-'}" if tensor.before != tensor.after else ""
        console.print(f"{tensor.kind:<8} {tensor.name}{sides}{_much(known.get(tensor.name))}", markup=False)
    for component in found.values:
        console.print(f"values   {component}: plain values differ", markup=False)
    console.print(f"{len(found.tensors)} tensors differ, {found.same_tensors} have the same bytes")


def _much(change: Any) -> str:
    if change is None:
        return ""
    changed = f", {change.changed} of {change.elements} elements"
    return f"{changed}, at most {change.largest:.3g}, relative {change.relative:.3g}"


def _side(value: float | str | None) -> str:
    if value is None:
        return "-"
    return format_metric(value) if isinstance(value, float) else str(value)
