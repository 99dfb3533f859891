"""Commands that let go: prune, gc, rm. Each shows first what it would do, from the plan that it then carries out."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from cloudckpt.cli.common import FINDINGS, DryRun, Json, Place, Quiet, Root, Yes, agreed, root_of, split, store_at
from cloudckpt.cli.render import output, print_json
from cloudckpt.collecting import Collected, collect_garbage, policy_with, remove_checkpoints
from cloudckpt.core.policy import INHERIT, PolicyWords
from cloudckpt.core.retention import PrunePlan
from cloudckpt.core.text import format_bytes
from cloudckpt.errors import ConfigError
from cloudckpt.pruning import prune
from cloudckpt.view import RunView

__all__ = ["gc", "prune_command", "rm"]

KeepLast = Annotated[int | None, typer.Option("--keep-last", help="Keep the newest N, this once.")]
KeepBest = Annotated[int | None, typer.Option("--keep-best", help="Keep the best K, this once.")]
KeepEvery = Annotated[int | None, typer.Option("--keep-every", help="Keep every N steps, this once.")]
KeepWithin = Annotated[
    float | None, typer.Option("--keep-within", help="Keep this many seconds before the newest, this once.")
]
Metric = Annotated[str | None, typer.Option("--metric", help="Another metric for --keep-best.")]
Mode = Annotated[str | None, typer.Option("--mode", help="min or max, with --metric.")]


def _words(
    last: int | None, best: int | None, every: int | None, within: float | None, metric: str | None, mode: str | None
) -> PolicyWords:
    return PolicyWords(
        keep_last=INHERIT if last is None else last,
        keep_best=INHERIT if best is None else best,
        keep_every=INHERIT if every is None else every,
        keep_within_s=INHERIT if within is None else within,
        monitor=INHERIT if metric is None else metric,
        mode=INHERIT if mode is None else mode,
    )


def prune_command(
    place: Place = None,
    root: Root = None,
    keep_last: KeepLast = None,
    keep_best: KeepBest = None,
    keep_every: KeepEvery = None,
    keep_within: KeepWithin = None,
    metric: Metric = None,
    mode: Mode = None,
    yes: Yes = False,
    dry_run: DryRun = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Retire what no rule keeps, by the run's stored policy or by other numbers this once. Deletes no bytes: gc does.

    Examples: cloudckpt prune ./runs/demo --dry-run; cloudckpt prune ./runs/demo --keep-last 1 --yes
    """
    store = store_at(root_of(place, root))
    words = _words(keep_last, keep_best, keep_every, keep_within, metric, mode)
    policy = policy_with(RunView(store).manifest().policy, words)
    plan = prune(store, policy=policy, dry_run=True)
    if not json and not quiet:
        output().print(_plan_table(plan))
        output().print(f"would retire {len(plan.retired)}, {format_bytes(plan.size_bytes)}")
    done = bool(plan.retired) and agreed("Retire these?", yes=yes, dry_run=dry_run, unseen=json or quiet)
    if done:
        plan = prune(store, policy=policy)
    _report(plan, done=done, json=json, quiet=quiet, root=store.storage.url)


def _report(plan: PrunePlan, *, done: bool, json: bool, quiet: bool, root: str) -> None:
    if json:
        print_json({"root": root, "dry_run": not done, **_plan_json(plan)})
    elif quiet:
        sys.stdout.writelines(f"{c.name}\n" for c in plan.retired)
    else:
        retired = f"retired {len(plan.retired)}; cloudckpt gc deletes their bytes"
        output().print(retired if done else "nothing was changed")


def _plan_json(plan: PrunePlan) -> dict[str, Any]:
    return {"decisions": list(plan.decisions), "size_bytes": plan.size_bytes}


def _plan_table(plan: PrunePlan, *, word: str = "retire") -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    # Where there is little room, the reasons alone fold.
    table.add_column(no_wrap=True, overflow="fold")
    table.add_column(no_wrap=True, overflow="fold", justify="right")
    table.add_column(no_wrap=True, overflow="fold", justify="right")
    table.add_column(overflow="fold")
    for decision in reversed(plan.decisions):
        table.add_row(
            "keep" if decision.keep else word,
            str(decision.checkpoint.step),
            format_bytes(decision.checkpoint.size_bytes),
            Text(", ".join(decision.reasons)),
        )
    return table


def gc(
    place: Place = None,
    root: Root = None,
    keep_last: KeepLast = None,
    keep_best: KeepBest = None,
    keep_every: KeepEvery = None,
    keep_within: KeepWithin = None,
    metric: Metric = None,
    mode: Mode = None,
    yes: Yes = False,
    dry_run: DryRun = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Clean up: retire what no rule keeps, delete what is retired, what no entry names, and unfinished uploads.

    What --dry-run lists is what --yes deletes. Safe beside a running trainer. Exit 3 if something could not be
    deleted; the next gc tries again. Examples: cloudckpt gc ./runs/demo --dry-run; cloudckpt gc ./runs/demo --yes
    """
    store = store_at(root_of(place, root))
    words = _words(keep_last, keep_best, keep_every, keep_within, metric, mode)
    found = collect_garbage(store, words=words, dry_run=True)
    if not json and not quiet:
        _print_preview(found)
    done = _has_work(found) and agreed("Delete these?", yes=yes, dry_run=dry_run, unseen=json or quiet)
    if done:
        found = collect_garbage(store, words=words, dry_run=False)
    _tell_collected(found, done=done, json=json, quiet=quiet, root=store.storage.url)
    if done and found.swept.failed:
        raise typer.Exit(FINDINGS)


def _has_work(found: Collected) -> bool:
    return bool(found.keys or found.plan.retired or found.swept.retired or found.swept.aborted_uploads)


def _print_preview(found: Collected) -> None:
    console = output()
    console.print(_plan_table(found.plan, word="delete"))
    planned = {checkpoint.id for checkpoint in found.plan.retired}
    garbage = found.swept.garbage
    of_retired = {checkpoint.name for checkpoint in found.swept.retired}
    for checkpoint in found.swept.retired:
        if checkpoint.id not in planned:
            console.print(f"delete  {checkpoint.name}  retired: {checkpoint.retired_because}", markup=False)
    for orphan in garbage.orphans if garbage is not None else ():
        if orphan.key.partition("/")[0] not in of_retired:
            console.print(f"orphan  {orphan.key}  {format_bytes(orphan.size_bytes)}  {orphan.reason}", markup=False)
    for key, why in found.swept.failed.items():
        console.print(f"stays   {key}  {why}", markup=False)
    for key in garbage.foreign if garbage is not None else ():
        console.print(f"foreign {key}  not ours, never touched", markup=False)
    if found.swept.aborted_uploads:
        console.print(f"abort   {found.swept.aborted_uploads} unfinished uploads")
    console.print(f"would free {format_bytes(found.size_bytes)} ({len(found.keys)} objects)")


def _tell_collected(found: Collected, *, done: bool, json: bool, quiet: bool, root: str) -> None:
    garbage = found.swept.garbage
    if json:
        print_json(
            {
                "root": root,
                "dry_run": not done,
                **_plan_json(found.plan),
                "size_bytes": found.size_bytes,
                "retired": list(found.swept.retired),
                "objects": list(found.keys),
                "foreign": list(garbage.foreign) if garbage is not None else [],
                "aborted_uploads": found.swept.aborted_uploads,
                "failed": found.swept.failed,
            }
        )
    elif quiet:
        sys.stdout.writelines(f"{key}\n" for key in found.keys)
    elif done:
        for key, why in found.swept.failed.items():
            output().print(f"could not delete {key}: {why}", markup=False)
        output().print(f"freed {format_bytes(found.size_bytes)} ({len(found.keys)} objects)")
    else:
        output().print("nothing was changed")


def rm(
    selects: Annotated[list[str], typer.Argument(metavar="SELECT...", help="What to remove: steps, tag:NAME, ids.")],
    root: Root = None,
    force: Annotated[bool, typer.Option("--force", help="Also pinned ones, and the last usable one.")] = False,
    yes: Yes = False,
    dry_run: DryRun = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Remove checkpoints, whatever the rules say: retire them and delete their bytes.

    Example: cloudckpt rm 500 1000 -r ./runs/demo
    """
    targets = [split(select, root) for select in selects]
    places = {place for place, _ in targets}
    if len(places) > 1:
        raise ConfigError(f"one run at a time, not {', '.join(sorted(places))}")
    store = store_at(targets[0][0])
    selectors = [selector for _, selector in targets]
    found = remove_checkpoints(store, selectors, force=force, dry_run=True)
    if not json and not quiet:
        for checkpoint in found.checkpoints:
            because = ", ".join(checkpoint.kept_because) or "nothing keeps it"
            output().print(
                f"delete  {checkpoint.name}  {format_bytes(checkpoint.size_bytes)}  kept because: {because}",
                markup=False,
            )
    done = agreed("Delete these for good?", yes=yes, dry_run=dry_run, unseen=json or quiet)
    if done:
        # By id: a name such as "best" must not mean another one after the question.
        names = [checkpoint.name for checkpoint in found.checkpoints]
        found = remove_checkpoints(store, names, force=force)
    if json:
        print_json(found)
    elif quiet:
        sys.stdout.writelines(f"{checkpoint.name}\n" for checkpoint in found.checkpoints)
    else:
        for name, why in found.failed.items():
            output().print(f"could not delete {name} yet: {why}; cloudckpt gc tries again", markup=False)
        output().print(f"removed {len(found.checkpoints)}" if done else "nothing was changed")
    if found.failed:
        raise typer.Exit(FINDINGS)
