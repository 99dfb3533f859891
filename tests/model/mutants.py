"""Ways to get the protocol wrong, each of which somebody has shipped: applied to the product, one at a time.

``MUTANTS`` says where each is looked for, and which invariant falls. A mutant that no search finds is a hole in the
search, not a proof that the mistake is harmless.

(Past 350 lines: a list.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest

from cloudckpt import claiming, editing, sealed, sweeping
from cloudckpt.claiming import Claim
from cloudckpt.core import garbage, keys, retention
from cloudckpt.core import manifest as transitions
from cloudckpt.core.garbage import GarbagePlan, Orphan
from cloudckpt.core.index_json import decode_index
from cloudckpt.core.manifest import Abandon, RollForward, Settlement
from cloudckpt.core.manifest_json import decode_manifest
from cloudckpt.core.model import Checkpoint, Manifest, State
from cloudckpt.core.selection import parse_selector, select
from cloudckpt.errors import CommitUnknownError, FencedError
from cloudckpt.saving.recording import Recorder
from cloudckpt.storage import Landed, ManifestStore, Outcome, Storage, Unknown
from cloudckpt.storage.conditions import ConditionalWrites
from cloudckpt.sweeping import SweepReport, delete_bytes

__all__ = ["MUTANTS", "Mutant"]

Patch = pytest.MonkeyPatch


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutant:
    """One mistake: how it is made, in which scenario it shows, and the invariant that falls."""

    make: Callable[[Patch], None]
    scenario: str
    falls: str


# -- saving --------------------------------------------------------------------------------------------------


def delete_before_commit(patch: Patch) -> None:
    """The losers' bytes go first, and then the manifest says so."""
    plain = Recorder.commit

    def commit(self: Recorder, entry: Checkpoint, sealed_as: RollForward) -> Checkpoint:
        before = self._store.last_seen
        assert before is not None
        planned = transitions.commit(
            before, entry.id, sealed_as, writer_epoch=self.writer_epoch, at=self._store.clock()
        )
        for going in planned.in_state(State.RETIRED):
            delete_bytes(self._store.unretried, going)
        return plain(self, entry, sealed_as)

    patch.setattr(Recorder, "commit", commit)


def evict_at_announce(patch: Patch) -> None:
    """Room is made for a save before it is there."""
    plain = transitions.announce

    def announce(manifest: Manifest, entry: Checkpoint, **words: Any) -> Manifest:
        announced = plain(manifest, entry, **words)
        if announced is manifest:
            return manifest
        there = transitions.change_entry(
            announced, entry.id, lambda e: replace(e, state=State.COMMITTED, committed_at=words["at"])
        )
        pruned = transitions.prune(there, at=words["at"])
        return transitions.recompute(
            transitions.change_entry(pruned, entry.id, lambda e: replace(e, state=State.PENDING, committed_at=None))
        )

    patch.setattr(transitions, "announce", announce)


def unknown_is_failure(patch: Patch) -> None:
    """A commit without an answer has failed, so its bytes are cleaned up."""
    plain = Recorder.commit

    def commit(self: Recorder, entry: Checkpoint, sealed_as: RollForward) -> Checkpoint:
        try:
            return plain(self, entry, sealed_as)
        except CommitUnknownError:
            delete_bytes(self._store.unretried, entry)
            raise

    patch.setattr(Recorder, "commit", commit)


def unknown_is_success(patch: Patch) -> None:
    """A commit without an answer has probably landed, so the save is reported as done."""
    plain = Recorder.commit

    def commit(self: Recorder, entry: Checkpoint, sealed_as: RollForward) -> Checkpoint:
        try:
            return plain(self, entry, sealed_as)
        except CommitUnknownError:
            return entry

    patch.setattr(Recorder, "commit", commit)


def write_is_assumed_to_land(patch: Patch) -> None:
    """Nobody looks again after a manifest write without an answer."""
    plain = ManifestStore._write

    def write(self: ManifestStore, body: bytes, version: str | None) -> Outcome:
        outcome = plain(self, body, version)
        return Landed(decode_manifest(body).write_id) if isinstance(outcome, Unknown) else outcome

    patch.setattr(ManifestStore, "_write", write)


def blind_overwrite(patch: Patch) -> None:
    """The condition of a write is whatever is there."""

    def blind(self: ConditionalWrites, key: str, body: bytes, *, expecting: str) -> Outcome:
        current = self._storage.read(key, limit_bytes=2**30).version
        return self._storage.replace(key, body, expecting=current)

    patch.setattr(ConditionalWrites, "replace", blind)


# -- claiming ------------------------------------------------------------------------------------------------


def no_epoch_check(patch: Patch) -> None:
    """A writer that was replaced goes on."""
    patch.setattr(transitions, "check_fence", lambda manifest, writer_epoch: None)


def claim_keeps_the_epoch(patch: Patch) -> None:
    """A new owner writes under the number of the old one."""
    plain = transitions.claim

    def claim(manifest: Manifest, owner: Any, **words: Any) -> Manifest:
        claimed = plain(manifest, owner, **words)
        return claimed if claimed is manifest else replace(claimed, writer_epoch=manifest.writer_epoch)

    patch.setattr(transitions, "claim", claim)


def claim_shares_an_epoch(patch: Patch) -> None:
    """A claim whose answer was lost takes over the epoch of whoever claimed on top of it."""
    plain = claiming.claim_run

    def claim_run(store: ManifestStore, *arguments: Any, **words: Any) -> Claim:
        try:
            return plain(store, *arguments, **words)
        except FencedError:
            found = store.last_seen
            assert found is not None
            return Claim(manifest=found, writer_epoch=found.writer_epoch, token=store.owner_token)

    patch.setattr(claiming, "claim_run", claim_run)


def pending_saves_are_left(patch: Patch) -> None:
    """A claim leaves alone what another process had begun."""
    patch.setattr(transitions, "_settle_one", lambda manifest, entry, settlement, *, at: manifest)


def sealed_saves_are_abandoned(patch: Patch) -> None:
    """A claim gives up whatever was not committed, without a look at it."""

    def settlement_of(storage: Storage, entry: Checkpoint) -> Settlement:
        return Abandon(reason="its process ended")

    patch.setattr(claiming, "settlement_of", settlement_of)


def rolled_forward_unchecked(patch: Patch) -> None:
    """An index is proof enough: nobody looks whether the payload has the sizes that it was sealed with."""
    plain = sealed.judge_folder

    def judge_folder(body: bytes, *, save_id: str, step: int, sizes: Mapping[str, int], what: str) -> Any:
        believed = {item.name: item.size_bytes for item in decode_index(body).objects}
        return plain(body, save_id=save_id, step=step, sizes=believed, what=what)

    patch.setattr(sealed, "judge_folder", judge_folder)


# -- deleting ------------------------------------------------------------------------------------------------


def gc_writes_before_it_lists(patch: Patch) -> None:
    """Gc takes the manifest first and the listing second."""

    def gc_run(store: ManifestStore, *, dry_run: bool = True) -> SweepReport:
        manifest = store.transact(
            lambda current, _: transitions.note(current, "gc", at=store.clock()), prepare=lambda _: None
        )
        listing = [(item.key, item.size_bytes) for item in store.storage.list("")]
        plan = garbage.plan_garbage(manifest, listing)
        store.storage.delete([orphan.key for orphan in plan.orphans])
        return SweepReport(dry_run=False, retired=(), failed={}, garbage=plan)

    patch.setattr(sweeping, "gc_run", gc_run)


def _other_plan(patch: Patch, change: Callable[[GarbagePlan, Manifest, list[tuple[str, int]]], GarbagePlan]) -> None:
    plain = garbage.plan_garbage

    def plan_garbage(manifest: Manifest, listing: Iterable[tuple[str, int]]) -> GarbagePlan:
        items = [*listing]
        return change(plain(manifest, items), manifest, items)

    patch.setattr(sweeping, "plan_garbage", plan_garbage)


def gc_takes_what_is_pending(patch: Patch) -> None:
    """What is not committed is garbage."""

    def change(plan: GarbagePlan, manifest: Manifest, items: list[tuple[str, int]]) -> GarbagePlan:
        pending = {entry.id for entry in manifest.in_state(State.PENDING)}
        more = [
            Orphan(key=key, size_bytes=size, reason="pending") for key, size in items if keys.parse(key).id in pending
        ]
        return replace(plan, orphans=(*plan.orphans, *more))

    _other_plan(patch, change)


def gc_takes_what_is_foreign(patch: Patch) -> None:
    """What is not ours is garbage."""

    def change(plan: GarbagePlan, manifest: Manifest, items: list[tuple[str, int]]) -> GarbagePlan:
        more = [Orphan(key=key, size_bytes=0, reason="foreign") for key in plan.foreign]
        return replace(plan, orphans=(*plan.orphans, *more))

    _other_plan(patch, change)


def gc_leaves_what_nobody_names(patch: Patch) -> None:
    """Gc only looks at retired entries, and the late bytes of a dead process stay for ever."""

    def change(plan: GarbagePlan, manifest: Manifest, items: list[tuple[str, int]]) -> GarbagePlan:
        named = [o for o in plan.orphans if (found := keys.parse(o.key).id) is None or manifest.find(found) is not None]
        return replace(plan, orphans=tuple(named))

    _other_plan(patch, change)


# -- retention -----------------------------------------------------------------------------------------------


def best_by_step(patch: Patch) -> None:
    """The best is the one that was trained longest."""

    def ranked(checkpoints: Iterable[Checkpoint], metric: str, mode: str) -> list[Checkpoint]:
        return sorted((c for c in checkpoints if c.usable), key=lambda c: -c.step)

    patch.setattr(retention, "ranked", ranked)


def nan_is_best(patch: Patch) -> None:
    """NaN is a value like any other."""
    patch.setattr(retention, "metric_value", lambda metrics, metric: metrics.get(metric))


def the_newer_of_equals_is_best(patch: Patch) -> None:
    """Of two equal ones the newer takes the place of the older."""

    def ranked(checkpoints: Iterable[Checkpoint], metric: str, mode: str) -> list[Checkpoint]:
        scored = [
            (v, c) for c in checkpoints if c.usable and (v := retention.metric_value(c.metrics, metric)) is not None
        ]
        sign = 1.0 if mode == "min" else -1.0
        return [c for _, c in sorted(scored, key=lambda pair: (sign * pair[0], -pair[1].seq))]

    patch.setattr(retention, "ranked", ranked)


def damaged_counts(patch: Patch) -> None:
    """What is known to be damaged takes a place among the best and the newest."""
    usable = property(lambda entry: entry.state is State.COMMITTED and not entry.marks)
    patch.setattr(Checkpoint, "usable", usable)


def pending_counts(patch: Patch) -> None:
    """A save on its way takes a place among the best and the newest."""
    plain = retention.plan_prune

    def plan_prune(entries: Sequence[Checkpoint], policy: Any, *, resumed_from: str | None = None) -> Any:
        there = [
            replace(e, state=State.COMMITTED, committed_at=e.announced_at) if e.state is State.PENDING else e
            for e in entries
        ]
        return plain(there, policy, resumed_from=resumed_from)

    patch.setattr(transitions, "plan_prune", plan_prune)


def the_oldest_are_recent(patch: Patch) -> None:
    """The last N are counted from the wrong end."""

    def last(rule: Any, usable: Sequence[Checkpoint]) -> tuple[str, ...]:
        return tuple(c.id for c in usable[: rule.n])

    patch.setattr(retention, "_last", last)


def pins_are_ignored(patch: Patch) -> None:
    """Rules retire what a person has pinned."""
    patch.setattr(retention, "_protected", lambda committed, resumed_from: {})


def lists_are_not_recomputed(patch: Patch) -> None:
    """``best`` and ``recent`` stay as they were when what they list is gone."""
    patch.setattr(transitions, "recompute", lambda manifest: manifest)


def late_metrics_go_into_the_index(patch: Patch) -> None:
    """A late metric is also written where the other metrics of the save are."""
    plain = editing.report_metrics

    def report_metrics(store: ManifestStore, selector: str | int, metrics: Mapping[str, Any]) -> bool:
        landed = plain(store, selector, metrics)
        manifest = store.read()
        if landed and manifest is not None:
            entry = select(manifest, parse_selector(selector))
            key = keys.index_key(entry.step, entry.id)
            body = store.storage.read(key, limit_bytes=2**30).body
            store.storage.put(key, [body, b" "], size_bytes=len(body) + 1)
        return landed

    patch.setattr(editing, "report_metrics", report_metrics)


MUTANTS: dict[str, Mutant] = {
    make.__name__: Mutant(make=make, scenario=scenario, falls=falls)
    for make, scenario, falls in (
        (delete_before_commit, "readers_and_a_sweeper", "I7"),
        (evict_at_announce, "readers_and_a_sweeper", "I5"),
        (unknown_is_failure, "doubtful_store", "I11"),
        (unknown_is_success, "doubtful_store", "I10"),
        (write_is_assumed_to_land, "doubtful_store", "I7"),
        (blind_overwrite, "two_writers", "I6"),
        (no_epoch_check, "duel", "I6"),
        (claim_keeps_the_epoch, "duel", "I6"),
        (claim_shares_an_epoch, "after_a_crash", "I6"),
        (pending_saves_are_left, "after_a_torn_save", "I6"),
        (sealed_saves_are_abandoned, "after_a_crash", "I8"),
        (rolled_forward_unchecked, "after_a_torn_save", "I1"),
        (gc_writes_before_it_lists, "gc_beside_a_save", "I7"),
        (gc_takes_what_is_pending, "gc_beside_a_save", "I7"),
        (gc_takes_what_is_foreign, "gc_beside_a_save", "I12"),
        (gc_leaves_what_nobody_names, "gc_beside_a_save", "I8"),
        (best_by_step, "readers_and_a_sweeper", "I4"),
        (nan_is_best, "odd_metrics", "I4"),
        (the_newer_of_equals_is_best, "odd_metrics", "I4"),
        (damaged_counts, "damaged_and_marked", "I4"),
        (pending_counts, "editors_beside_a_save", "I4"),
        (the_oldest_are_recent, "readers_and_a_sweeper", "I4"),
        (pins_are_ignored, "editors_beside_a_save", "I5"),
        (lists_are_not_recomputed, "readers_and_a_sweeper", "I4"),
        (late_metrics_go_into_the_index, "odd_metrics", "I2"),
    )
}
