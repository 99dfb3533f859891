"""All that cleaning up is, in one go: retire by policy, delete what is retired, and what no entry names.

A dry run says what the real one would do, from the same plans: what it names is what goes, unless somebody writes to
the run in between.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from cloudckpt.core import edits
from cloudckpt.core import keys as grammar
from cloudckpt.core import manifest as transitions
from cloudckpt.core.model import Checkpoint, Manifest
from cloudckpt.core.policy import INHERIT, Policy, PolicyWords, resolve
from cloudckpt.core.retention import PrunePlan
from cloudckpt.core.selection import parse_selector, select
from cloudckpt.errors import ConfigError
from cloudckpt.pruning import prune
from cloudckpt.storage import ManifestStore
from cloudckpt.sweeping import SweepReport, gc_run, sweep_run
from cloudckpt.view import RunView, placed

__all__ = ["Collected", "Removed", "collect_garbage", "policy_with", "remove_checkpoints"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Collected:
    """What was cleaned up, or would be.

    Attributes:
        plan: what retention decides about each committed checkpoint, and why.
        swept: what else goes, and what could not be deleted.
    """

    plan: PrunePlan
    swept: SweepReport

    @property
    def size_bytes(self) -> int:
        """How many bytes were (or would be) freed, as far as the listing tells."""
        return self.swept.garbage.size_bytes if self.swept.garbage is not None else 0

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of the objects that go, sorted; without those that must stay, and what belongs to them."""
        garbage, failed = self.swept.garbage, self.swept.failed
        spared = {grammar.parse(key).id for key in failed} - {None}
        orphans = garbage.orphans if garbage is not None else ()
        return tuple(sorted(o.key for o in orphans if o.key not in failed and grammar.parse(o.key).id not in spared))


def policy_with(stored: Policy, words: PolicyWords) -> Policy | None:
    """The stored policy with some words changed for one command; None if none is.

    Raises:
        ConfigError: the words cannot be used as given.
    """
    if words.silent:
        return None
    if isinstance(words.keep_best, int) and stored.monitor is not None and words.monitor is INHERIT:
        # Of several rules each keeps that many: what is best by whichever metric is not for one number to decide.
        rules = tuple(replace(rule, n=words.keep_best) for rule in stored.keep_best)
        words, stored = replace(words, keep_best=INHERIT), replace(stored, keep_best=rules)
    # The user asks for it in a command that shows what it does, so that another metric is no accident.
    return resolve(words, stored, has_entries=True, change_policy=True)


def collect_garbage(store: ManifestStore, *, words: PolicyWords | None = None, dry_run: bool = True) -> Collected:
    """Retire what no rule keeps and delete whatever nobody can need; by default only say what.

    Args:
        words: stand in for the stored policy this once.
        dry_run: change nothing.

    Raises:
        CheckpointNotFoundError: there is no run here.
        ConfigError: the words cannot be used as given.
        ConflictError: the root holds checkpoints that are newer than the manifest.
        StorageError: the store refused.
    """
    policy = policy_with(RunView(store).manifest().policy, words or PolicyWords())
    plan = prune(store, policy=policy, dry_run=dry_run)

    def pruned(found: Manifest) -> Manifest:
        return transitions.prune(found, policy=policy, at=store.clock())

    return Collected(plan=plan, swept=gc_run(store, dry_run=dry_run, expecting=pruned))


@dataclass(frozen=True, slots=True, kw_only=True)
class Removed:
    """Checkpoints that a person let go.

    Attributes:
        dry_run: nothing was changed.
        checkpoints: those that were named.
        failed: those whose bytes could not be deleted yet, and why; gc tries again.
    """

    dry_run: bool
    checkpoints: tuple[Checkpoint, ...]
    failed: Mapping[str, str]


def remove_checkpoints(
    store: ManifestStore, selectors: Sequence[str | int], *, force: bool = False, dry_run: bool = False
) -> Removed:
    """Retire checkpoints by hand, whatever the rules say, and delete their bytes.

    Args:
        force: also pinned ones, the one that a running job resumed from, and the last usable one.
        dry_run: only say which.

    Raises:
        CheckpointNotFoundError: a selector means nothing; then none is removed.
        ConfigError: one of them needs ``force``; then none is removed.
        StorageError: the store refused.
    """
    parsed = [parse_selector(selector) for selector in selectors]
    chosen: dict[str, Checkpoint] = {}

    def choose(current: Manifest) -> Manifest:
        chosen.clear()
        chosen.update((entry.id, entry) for entry in (select(current, selector) for selector in parsed))
        if not force:
            _refuse_precious(current, [*chosen.values()])
        return current

    if dry_run:
        choose(RunView(store).manifest())
        found = tuple(placed(entry, store.storage.url) for entry in chosen.values())
        return Removed(dry_run=True, checkpoints=found, failed={})
    store.transact(
        lambda current, _: edits.retire(choose(current), [*chosen], "removed by hand", at=store.clock()),
        prepare=lambda _: None,
    )
    found = tuple(placed(entry, store.storage.url) for entry in chosen.values())
    swept = sweep_run(store, dry_run=False)
    names = {entry.name for entry in found}
    failed = {name: why for name, why in swept.failed.items() if name in names}
    return Removed(dry_run=False, checkpoints=found, failed=failed)


def _refuse_precious(manifest: Manifest, chosen: Sequence[Checkpoint]) -> None:
    ids = {entry.id for entry in chosen}
    for entry in chosen:
        why = "pinned" if entry.pinned else "what this run resumed from" if entry.id == manifest.resumed_from else None
        if why is not None:
            raise ConfigError(f"{entry.name} is {why}: unpin it first, or pass --force. Nothing was removed")
    usable = {entry.id for entry in manifest.committed if entry.usable}
    if usable and usable <= ids:
        raise ConfigError(
            f"that would leave no usable checkpoint of {len(usable)}: keep one, or pass --force. Nothing was removed"
        )
