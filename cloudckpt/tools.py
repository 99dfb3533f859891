"""The run-wide tools as functions of a root: what ``cloudckpt.sweep(...)`` and the command line call.

All take ``storage_options`` for the filesystem, which are never printed, and ``settings``: numbers such as how long a
store that does not answer is asked again.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping

from cloudckpt.config import Settings
from cloudckpt.copying import Copied, copy_checkpoint
from cloudckpt.diffing import CheckpointDiff, diff_checkpoints
from cloudckpt.listing import RunSummary, find_runs
from cloudckpt.pulling import Pulled, pull_checkpoint
from cloudckpt.repairing import RepairPlan, repair_run
from cloudckpt.storage import Storage, open_store
from cloudckpt.sweeping import SweepReport, gc_run, sweep_run
from cloudckpt.verifying import VerifyReport, verify_run

__all__ = ["copy", "diff", "gc", "open_store", "pull", "repair", "runs", "sweep", "verify"]

Root = str | os.PathLike[str] | Storage
Options = Mapping[str, object] | None


def sweep(
    root: Root,
    *,
    dry_run: bool = True,
    storage_options: Options = None,
    settings: Settings | None = None,
    single_writer: bool = False,
) -> SweepReport:
    """Delete the bytes of retired checkpoints; by default only say which. See ``sweeping.sweep_run``."""
    store = open_store(root, storage_options=storage_options, settings=settings, single_writer=single_writer)
    return sweep_run(store, dry_run=dry_run)


def gc(
    root: Root,
    *,
    dry_run: bool = True,
    storage_options: Options = None,
    settings: Settings | None = None,
    single_writer: bool = False,
) -> SweepReport:
    """Delete whatever no entry of the manifest can need; by default only say what. See ``sweeping.gc_run``."""
    store = open_store(root, storage_options=storage_options, settings=settings, single_writer=single_writer)
    return gc_run(store, dry_run=dry_run)


def repair(
    root: Root,
    *,
    dry_run: bool = True,
    storage_options: Options = None,
    settings: Settings | None = None,
    single_writer: bool = False,
) -> RepairPlan:
    """Bring back a run whose manifest is lost; by default only propose. See ``repairing.repair_run``."""
    store = open_store(root, storage_options=storage_options, settings=settings, single_writer=single_writer)
    return repair_run(store, dry_run=dry_run)


def verify(
    root: Root,
    select: str | int | None = None,
    *,
    deep: bool = False,
    storage_options: Options = None,
    settings: Settings | None = None,
) -> VerifyReport:
    """Check one committed checkpoint, or all of them. See ``verifying.verify_run``."""
    return verify_run(open_store(root, storage_options=storage_options, settings=settings), select, deep=deep)


def pull(
    root: Root,
    select: str | int = "latest",
    into: str | os.PathLike[str] = ".",
    *,
    components: Collection[str] | None = None,
    storage_options: Options = None,
    settings: Settings | None = None,
) -> Pulled:
    """Bring a checkpoint into ``into/checkpoint-<step>``, verified; goes on where it was broken off.

    See ``pulling.pull_checkpoint``.
    """
    return pull_checkpoint(
        open_store(root, storage_options=storage_options, settings=settings), select, into, components=components
    )


def copy(
    root: Root,
    select: str | int,
    target: Root,
    *,
    tags: Iterable[str] = (),
    pin: bool = False,
    dry_run: bool = False,
    takeover: str = "refuse",
    storage_options: Options = None,
    target_options: Options = None,
    settings: Settings | None = None,
) -> Copied:
    """Copy a checkpoint into another run, new or there already. See ``copying.copy_checkpoint``."""
    return copy_checkpoint(
        open_store(root, storage_options=storage_options, settings=settings),
        select,
        open_store(target, storage_options=target_options, settings=settings),
        tags=tags,
        pin=pin,
        dry_run=dry_run,
        takeover=takeover,
    )


def diff(
    root: Root,
    before: str | int,
    after: str | int,
    *,
    other_root: Root | None = None,
    storage_options: Options = None,
    settings: Settings | None = None,
) -> CheckpointDiff:
    """What differs between two checkpoints, without reading their payload; ``after`` may be of another run.

    See ``diffing.diff_checkpoints``.
    """
    store = open_store(root, storage_options=storage_options, settings=settings)
    other = store if other_root is None else open_store(other_root, storage_options=storage_options, settings=settings)
    return diff_checkpoints(store, before, other, after)


def runs(root: Root, *, storage_options: Options = None, settings: Settings | None = None) -> tuple[RunSummary, ...]:
    """The runs below a prefix, with the newest and the best of each. See ``listing.find_runs``."""
    return find_runs(open_store(root, storage_options=storage_options, settings=settings).storage)
