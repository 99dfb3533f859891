"""The commands. Each asks the package one question and prints the answer; it decides nothing itself."""

from __future__ import annotations

import functools
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Annotated, Any

import typer

from cloudckpt._version import __version__
from cloudckpt.cli.doctor import examine
from cloudckpt.cli.render import age, as_json, checkpoints_table, errors, output, print_json
from cloudckpt.core.model import Checkpoint, Index, State
from cloudckpt.core.retention import metric_value
from cloudckpt.core.rights import Role
from cloudckpt.core.text import format_bytes, format_metric
from cloudckpt.errors import CheckpointNotFoundError, CloudCkptError, ConfigError
from cloudckpt.tools import open_store, repair, verify
from cloudckpt.verifying import Finding
from cloudckpt.view import RunView

__all__ = ["app", "run"]

FINDINGS = 3

app = typer.Typer(
    name="cloudckpt",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    help="Look at, check and mend the checkpoints of a training run.\n\nThe run comes from the argument, from "
    "-r/--root, or from CLOUDCKPT_ROOT. Exit codes: 0 fine, 1 failure, 2 usage, 3 findings, 4 nothing matches, 5 "
    "conflict.",
)

Place = Annotated[str | None, typer.Argument(metavar="[ROOT]", help="The run's folder or URL.")]
Root = Annotated[str | None, typer.Option("--root", "-r", envvar="CLOUDCKPT_ROOT", help="The run's folder or URL.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document instead of a table.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Only what a script needs.")]
Select = Annotated[
    str, typer.Argument(metavar="SELECT", help="latest, best, a step, tag:NAME, a save id; or ROOT#SELECT.")
]


def _root(*places: str | None) -> str:
    found = next((place for place in places if place), None)
    if found is None:
        raise ConfigError("which run? Give its root: cloudckpt ls ROOT, -r ROOT, or set CLOUDCKPT_ROOT")
    return found


def _split(select: str, root: str | None) -> tuple[str, str]:
    """A selector may carry its root: ``s3://bucket/run#best``."""
    place, mark, selector = select.rpartition("#")
    return (_root(place, root), selector) if mark else (_root(root), select)


def _view(root: str) -> RunView:
    return RunView(open_store(root))


@app.command("ls")
def list_checkpoints(
    place: Place = None,
    root: Root = None,
    json: Json = False,
    quiet: Quiet = False,
    everything: Annotated[bool, typer.Option("--all", "-a", help="Retired ones as well.")] = False,
) -> None:
    """List the checkpoints of a run and why each is kept.

    Example: cloudckpt ls ./runs/demo
    """
    view = _view(_root(place, root))
    manifest = view.manifest()
    found = [c for c in view.checkpoints(state=None) if everything or c.state is not State.RETIRED]
    committed = [c for c in found if c.state is State.COMMITTED]
    if json:
        print_json(
            {
                "root": view.url,
                "run_id": manifest.run_id,
                "revision": manifest.revision,
                "policy": as_json(manifest.policy),
                "best": as_json(manifest.best),
                "recent": list(manifest.recent),
                "checkpoints": found,
            }
        )
    elif quiet:
        sys.stdout.writelines(f"{c.name}\n" for c in sorted(committed, key=lambda c: -c.seq))
    else:
        console = output()
        console.print(checkpoints_table(found))
        newest = max((c.committed_at for c in committed if c.committed_at), default=None)
        total = format_bytes(sum(c.size_bytes for c in committed))
        last = f", newest committed {age(newest)} ago" if newest else ""
        console.print(f"{len(committed)} checkpoints, {total}{last}; policy: {manifest.policy}", markup=False)


@app.command()
def show(select: Select, root: Root = None, json: Json = False) -> None:
    """Show one checkpoint: what is in it, where, and why it is kept.

    Example: cloudckpt show best -r ./runs/demo
    """
    place, selector = _split(select, root)
    view = _view(place)
    checkpoint = view.select(selector)
    index = view.index(checkpoint.name)
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


@app.command()
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
    view = _view(_root(place, root))
    manifest = view.manifest()
    found = view.best(metric, mode)
    rule = manifest.policy.monitor
    name = metric or (rule.metric if rule else "")
    if found is None:
        raise CheckpointNotFoundError(f"no usable checkpoint of {view.url} has a finite {name!r}")
    if json:
        print_json({"metric": name, "value": metric_value(found.metrics, name), "checkpoint": found})
    elif quiet:
        sys.stdout.write(f"{found.url}\n")
    else:
        value = metric_value(found.metrics, name)
        shown = format_metric(value) if value is not None else "-"
        output().print(f"{found.url}: {name}={shown}", markup=False)


@app.command()
def log(
    place: Place = None,
    root: Root = None,
    json: Json = False,
    count: Annotated[int, typer.Option("-n", min=1, help="How many events, the newest.")] = 30,
) -> None:
    """Print what happened to the run, newest last.

    Example: cloudckpt log ./runs/demo -n 10
    """
    view = _view(_root(place, root))
    events = view.journal()[-count:]
    if json:
        print_json({"root": view.url, "events": list(events)})
        return
    console = output()
    for event in events:
        name = f" checkpoint-{event.step}.{event.id}" if event.id else ""
        detail = f": {event.detail}" if event.detail else ""
        console.print(f"{event.at}  r{event.revision:<5} {event.event}{name}{detail}", markup=False)


@app.command("verify")
def verify_command(
    select: Annotated[
        str | None, typer.Argument(metavar="[SELECT|ROOT]", help="One checkpoint, or a root for all.")
    ] = None,
    root: Root = None,
    deep: Annotated[bool, typer.Option("--deep", help="Read every byte and compare checksums.")] = False,
    json: Json = False,
) -> None:
    """Check that what was sealed is still there; exit 3 if something is not.

    Example: cloudckpt verify ./runs/demo --deep
    """
    place, selector = _verify_target(select, root)
    report = verify(place, selector, deep=deep)
    if json:
        print_json({"ok": report.ok, **as_json(report)})
    else:
        console = output()
        for finding in report.findings:
            console.print(_damage(finding), markup=False)
        how = f"{format_bytes(report.bytes_read)} read" if deep else "sizes only; --deep reads every byte"
        console.print(f"{len(report.checkpoints)} checkpoints checked ({how}), {len(report.findings)} findings")
    if not report.ok:
        raise typer.Exit(FINDINGS)


def _damage(finding: Finding) -> str:
    start, length = finding.start, finding.length or 0
    where = "" if start is None else f" bytes {start}..{start + length}"
    return f"DAMAGED {finding.checkpoint.root}/{finding.key}{where}: {finding.problem}"


def _verify_target(select: str | None, root: str | None) -> tuple[str, str | None]:
    if select is None:
        return _root(root), None
    if "#" in select:
        return _split(select, root)
    # With a root from elsewhere the argument is a selector; alone it is the root itself.
    return (select, None) if root is None or os.sep in select or "://" in select else (root, select)


@app.command("repair")
def repair_command(
    place: Place = None,
    root: Root = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Carry it out without asking.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", "-n", help="Only show the proposal.")] = False,
    json: Json = False,
) -> None:
    """Bring back a run whose manifest is lost, unreadable or rolled back.

    Shows the proposal first. Everything it admits is held until you release it, and every running writer is
    fenced. Example: cloudckpt repair ./runs/demo
    """
    target = _root(place, root)
    plan = repair(target, dry_run=True)
    if not json:
        console = output()
        console.print(f"from {plan.basis}: {len(plan.admitted)} checkpoints are whole and would be admitted and held")
        console.print(checkpoints_table(plan.admitted))
        for folder, why in plan.refused.items():
            console.print(f"not admitted: {folder}: {why}", markup=False)
        for sentence in plan.could_not_know:
            console.print(f"could not know: {sentence}", markup=False)
    if not dry_run and (yes or (not json and typer.confirm("Put this manifest in place?", default=False))):
        plan = repair(target, dry_run=False)
        if not json:
            output().print(f"done: revision {plan.manifest.revision}, run {plan.manifest.run_id}")
    elif not json:
        output().print("nothing was changed")
    if json:
        print_json(plan)


@app.command()
def doctor(
    place: Place = None,
    root: Root = None,
    role: Annotated[
        Role | None, typer.Option(help="Ask for exactly the rights of this role in a bucket (docs/guide/rights.md).")
    ] = None,
    json: Json = False,
) -> None:
    """Check a root before a run depends on it: rights, conditions, latencies, and the state of the run.

    Example: cloudckpt doctor ./runs/demo
    Example: cloudckpt doctor s3://bucket/run --role trainer
    """
    report = examine(_root(place, root), role)
    if json:
        print_json(report)
    else:
        console = output()
        for check in report.checks:
            mark = "[green]ok[/green]  " if check.ok else "[red]FAIL[/red]"
            detail = check.detail.replace("[", r"\[")
            console.print(f"{mark}  {check.name:<36} {detail}")
        console.print(f"verdict: {'ready' if report.ok else 'not ready'}")
    if not report.ok:
        raise typer.Exit(1)


@app.callback(invoke_without_command=True)
def _options(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.", envvar="CLOUDCKPT_DEBUG")] = False,
) -> None:
    global _debug  # noqa: PLW0603 - one process runs one command
    _debug = debug
    if version:
        sys.stdout.write(f"cloudckpt {__version__}\n")
        raise typer.Exit


_debug = False


def _guarded(command: Callable[[], object]) -> int:
    try:
        command()
    except CloudCkptError as exc:
        if _debug:
            raise
        errors().print(f"cloudckpt: {exc}", markup=False)
        return exc.exit_code
    except BrokenPipeError:
        # The reader of the pipe has seen enough; keep the interpreter from complaining at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except SystemExit as exc:
        return exc.code if isinstance(exc.code, int) else 0
    return 0


def _stop(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - a signal handler's shape
    # 130 and 143, as shells say it; nothing here is half-done that the next call does not finish.
    raise SystemExit(128 + number)


def run() -> None:
    """Run the command line and exit with its code; 130 after Ctrl-C, 143 after SIGTERM."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    sys.exit(_guarded(functools.partial(app, standalone_mode=True)))
