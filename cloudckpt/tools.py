"""The run-wide tools as functions of a root: what ``cloudckpt.sweep(...)`` and the command line call."""

from __future__ import annotations

import os
from collections.abc import Mapping

from cloudckpt.config import Settings
from cloudckpt.repairing import RepairPlan, repair_run
from cloudckpt.storage import ManifestStore, Storage, open_storage
from cloudckpt.sweeping import SweepReport, gc_run, sweep_run
from cloudckpt.verifying import VerifyReport, verify_run

__all__ = ["gc", "open_store", "repair", "sweep", "verify"]

Root = str | os.PathLike[str] | Storage
Options = Mapping[str, object] | None


def open_store(
    root: Root, *, storage_options: Options = None, settings: Settings | None = None, single_writer: bool = False
) -> ManifestStore:
    """The manifest store of a root. Opens no connection.

    Args:
        single_writer: the promise that no other process writes to this run, for stores without conditional writes.

    Raises:
        ConfigError: the root cannot be used as given.
    """
    storage = open_storage(root, storage_options=storage_options, settings=settings)
    return ManifestStore(storage, settings, single_writer=single_writer)


def sweep(
    root: Root, *, dry_run: bool = True, storage_options: Options = None, single_writer: bool = False
) -> SweepReport:
    """Delete the bytes of retired checkpoints; by default only say which. See ``sweeping.sweep_run``."""
    store = open_store(root, storage_options=storage_options, single_writer=single_writer)
    return sweep_run(store, dry_run=dry_run)


def gc(
    root: Root, *, dry_run: bool = True, storage_options: Options = None, single_writer: bool = False
) -> SweepReport:
    """Delete whatever no entry of the manifest can need; by default only say what. See ``sweeping.gc_run``."""
    store = open_store(root, storage_options=storage_options, single_writer=single_writer)
    return gc_run(store, dry_run=dry_run)


def repair(
    root: Root, *, dry_run: bool = True, storage_options: Options = None, single_writer: bool = False
) -> RepairPlan:
    """Bring back a run whose manifest is lost; by default only propose. See ``repairing.repair_run``."""
    store = open_store(root, storage_options=storage_options, single_writer=single_writer)
    return repair_run(store, dry_run=dry_run)


def verify(
    root: Root, select: str | int | None = None, *, deep: bool = False, storage_options: Options = None
) -> VerifyReport:
    """Check one committed checkpoint, or all of them. See ``verifying.verify_run``."""
    return verify_run(open_store(root, storage_options=storage_options), select, deep=deep)
