"""Retire by policy as an editor: a person's explicit command beside a running writer."""

from __future__ import annotations

from dataclasses import replace

from cloudckpt.core import manifest as transitions
from cloudckpt.core.model import Checkpoint, Manifest
from cloudckpt.core.policy import Policy
from cloudckpt.core.retention import PrunePlan, plan_prune
from cloudckpt.errors import CheckpointNotFoundError
from cloudckpt.storage import ManifestStore
from cloudckpt.view import placed

__all__ = ["prune"]


def prune(store: ManifestStore, *, policy: Policy | None = None, dry_run: bool = False) -> PrunePlan:
    """Retire what no rule keeps. Metadata only; ``sweep`` deletes the bytes.

    The plan that is carried out is made from the manifest that it changes, in the same write.

    Args:
        policy: stands in for the stored policy this once.
        dry_run: only say what would be done.

    Raises:
        CheckpointNotFoundError: there is no run here.
    """
    found = store.read()
    if found is None:
        raise CheckpointNotFoundError(f"{store.storage.url} holds no run: nothing was ever saved there")
    if dry_run:
        return _plan(store, found, policy)
    made: list[PrunePlan] = []

    def change(current: Manifest, _: None) -> Manifest:
        made[:] = [_plan(store, current, policy)]
        if not made[0].retired:
            return current
        return transitions.prune(current, policy=policy, at=store.clock())

    store.transact(change, prepare=lambda _: None)
    return made[0]


def _plan(store: ManifestStore, manifest: Manifest, policy: Policy | None) -> PrunePlan:
    plan = plan_prune(manifest.entries, policy or manifest.policy, resumed_from=manifest.resumed_from)

    def named(checkpoint: Checkpoint) -> Checkpoint:
        return placed(checkpoint, store.storage.url)

    return replace(plan, decisions=tuple(replace(d, checkpoint=named(d.checkpoint)) for d in plan.decisions))
