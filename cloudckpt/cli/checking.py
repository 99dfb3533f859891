"""Commands that check and mend: verify, repair, doctor."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from cloudckpt.cli.common import FINDINGS, DryRun, Json, Place, Quiet, Root, Yes, agreed, root_of, split, view_at
from cloudckpt.cli.render import as_json, checkpoints_table, output, print_json
from cloudckpt.core.rights import Role
from cloudckpt.core.selection import parse_selector
from cloudckpt.core.text import format_bytes
from cloudckpt.errors import CheckpointNotFoundError, CloudCkptError, ConfigError
from cloudckpt.repairing import RepairPlan
from cloudckpt.tools import repair, verify
from cloudckpt.verifying import Finding, VerifyReport

__all__ = ["doctor", "repair_command", "verify_command"]


def verify_command(
    select: Annotated[
        str | None, typer.Argument(metavar="[SELECT|ROOT]", help="One checkpoint, or a root for all.")
    ] = None,
    root: Root = None,
    deep: Annotated[bool, typer.Option("--deep", help="Read every byte and compare checksums.")] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Check that what was sealed is still there; exit 3 if something is not.

    Example: cloudckpt verify ./runs/demo --deep
    """
    place, selector = _verify_target(select, root)
    report = verify(place, selector, deep=deep)
    if json:
        print_json({"ok": report.ok, **as_json(report)})
    elif quiet:
        sys.stdout.writelines(f"{name}\n" for name in dict.fromkeys(f.checkpoint.name for f in report.findings))
    else:
        console = output()
        for finding in report.findings:
            console.print(_damage(finding), markup=False)
        found = f"{len(report.findings)} findings"
        console.print(f"{len(report.checkpoints)} checkpoints checked ({_how(report)}), {found}")
    if not report.ok:
        raise typer.Exit(FINDINGS)


def _how(report: VerifyReport) -> str:
    if report.deep:
        return f"{format_bytes(report.bytes_read)} read"
    if not report.attested:
        return "sizes only; --deep reads every byte"
    compared = f"{report.attested} of {report.objects}"
    return f"sizes, and the checksums that the store keeps of {compared} objects; --deep reads every byte"


def _damage(finding: Finding) -> str:
    start, length = finding.start, finding.length or 0
    where = "" if start is None else f" bytes {start}..{start + length}"
    return f"DAMAGED {finding.checkpoint.root}/{finding.key}{where}: {finding.problem}"


def _verify_target(select: str | None, root: str | None) -> tuple[str, str | None]:
    """The run and the selector that the argument means: a selector if it selects something, else a root."""
    if select is None:
        return root_of(None, root), None
    if "#" in select:
        return split(select, root)
    if "://" in select or (os.sep in select and not select.startswith("tag:")):
        return root_of(select, root), None  # no selector is spelled like that
    try:
        return _selected(select, root), select
    except (CheckpointNotFoundError, ConfigError) as exc:
        try:
            view_at(select).manifest()
        except CheckpointNotFoundError as nothing:
            kind = type(exc) if root else CheckpointNotFoundError
            raise kind(
                f"{select!r} is neither a selector nor a root. As a selector: {exc}. As a root: {nothing}"
            ) from exc
        except CloudCkptError:
            pass  # somebody's run, with something wrong about it: that is to be told
        return root_of(select, root), None


def _selected(select: str, root: str | None) -> str:
    parse_selector(select)
    place = root_of(None, root)
    view_at(place).select(select)
    return place


def repair_command(
    place: Place = None,
    root: Root = None,
    yes: Yes = False,
    dry_run: DryRun = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Bring back a run whose manifest is lost, unreadable or rolled back.

    Shows the proposal first. Everything it admits is held until you release it, what has lost an object is marked
    damaged, and every running writer is fenced. -q prints the names of what is admitted.
    Example: cloudckpt repair ./runs/demo
    """
    target = root_of(place, root)
    plan = repair(target, dry_run=True)
    unseen = json or quiet
    if not unseen:
        _print_proposal(plan)
    if done := agreed("Put this manifest in place?", yes=yes, dry_run=dry_run, unseen=unseen):
        plan = repair(target, dry_run=False)
    if json:
        print_json(plan)
    elif quiet:
        sys.stdout.writelines(f"{checkpoint.name}\n" for checkpoint in plan.admitted)
    elif done:
        output().print(f"done: revision {plan.manifest.revision}, run {plan.manifest.run_id}")
    else:
        output().print("nothing was changed")


def _print_proposal(plan: RepairPlan) -> None:
    console = output()
    damaged = sum(checkpoint.damaged is not None for checkpoint in plan.admitted)
    found = f"{len(plan.admitted) - damaged} checkpoints are whole and {damaged} damaged"
    console.print(f"from {plan.basis}: {found}: they would be admitted and held")
    console.print(checkpoints_table(plan.admitted))
    for folder, why in plan.refused.items():
        console.print(f"not admitted: {folder}: {why}", markup=False)
    for folder in plan.gc_deletes:
        console.print(f"gc would delete {folder}: to keep it, copy it out of {plan.url} first", markup=False)
    for sentence in plan.could_not_know:
        console.print(f"could not know: {sentence}", markup=False)


def doctor(
    place: Place = None,
    root: Root = None,
    role: Annotated[
        Role | None, typer.Option(help="Ask for exactly the rights of this role in a bucket (docs/guide/rights.md).")
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Check a root before a run depends on it: rights, conditions, latencies, and the state of the run.

    Example: cloudckpt doctor ./runs/demo
    Example: cloudckpt doctor s3://bucket/run --role trainer
    """
    from cloudckpt.cli.doctor import examine  # noqa: PLC0415 - it asks every kind of store in its own words

    report = examine(root_of(place, root), role)
    if json:
        print_json(report)
    else:
        console = output()
        for check in report.checks:
            if quiet and check.ok:
                continue
            mark = "[green]ok[/green]  " if check.ok else "[red]FAIL[/red]"
            detail = check.detail.replace("[", r"\[")
            console.print(f"{mark}  {check.name:<36} {detail}")
        if not quiet:
            console.print(f"verdict: {'ready' if report.ok else 'not ready'}")
    if not report.ok:
        raise typer.Exit(1)
