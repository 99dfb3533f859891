"""The transitions of a manifest: pure, idempotent by id, refused when the writer was replaced.

Each takes a manifest and gives the next one, or *the same object* when there is nothing to do. ``stamped`` is
the last step before a write. An answer that was lost, a condition that no longer holds: the caller reads again
and applies the same transition again (I6, I11).

The life of an entry::

    (none) --announce--> pending --commit--> committed --retire--> retired --forget--> (gone)
                            |                                         ^
                            +-------------- abandon ------------------+
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace

from cloudckpt.core.model import (
    HISTORY_LENGTH,
    JOURNAL_LENGTH,
    Checkpoint,
    Claim,
    JournalEvent,
    Manifest,
    Owner,
    State,
)
from cloudckpt.core.policy import Policy
from cloudckpt.core.retention import plan_prune
from cloudckpt.errors import ConflictError, FencedError

__all__ = [
    "Abandon",
    "RollForward",
    "Settlement",
    "Takeover",
    "announce",
    "change_entry",
    "check_fence",
    "claim",
    "close",
    "commit",
    "forget",
    "note",
    "prune",
    "recompute",
    "resume_from",
    "retire_one",
    "settle",
    "stamped",
]

#: How a claim treats a previous owner that has not closed.
Takeover = str

_DUEL = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class RollForward:
    """A pending save whose index and payload are all in place: it becomes committed."""

    index_digest: str
    size_bytes: int
    object_count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Abandon:
    """A pending save that will never be committed: it becomes retired, for this reason."""

    reason: str


Settlement = RollForward | Abandon


def stamped(manifest: Manifest, *, base: Manifest, write_id: str, at: str) -> Manifest:
    """The manifest as it will be written on top of ``base``: revision + 1, a fresh write id, history extended."""
    history = (*base.history, write_id)[-HISTORY_LENGTH:]
    return replace(manifest, revision=base.revision + 1, write_id=write_id, history=history, updated_at=at)


def note(
    manifest: Manifest,
    event: str,
    *,
    at: str,
    entry: Checkpoint | None = None,
    detail: str | None = None,
) -> Manifest:
    """Add a line to the journal, which keeps the last hundred."""
    line = JournalEvent(
        at=at,
        revision=manifest.revision + 1,
        event=event,
        id=entry.id if entry else None,
        step=entry.step if entry else None,
        detail=detail,
    )
    return replace(manifest, journal=(*manifest.journal, line)[-JOURNAL_LENGTH:])


def change_entry(manifest: Manifest, save_id: str, change: Callable[[Checkpoint], Checkpoint]) -> Manifest:
    """The manifest with one entry changed; the same object if the entry is missing or stays as it is."""
    entry = manifest.find(save_id)
    changed = change(entry) if entry else None
    if changed is None or changed == entry:
        return manifest
    return replace(manifest, entries=tuple(changed if e.id == save_id else e for e in manifest.entries))


def recompute(manifest: Manifest) -> Manifest:
    """The manifest whose ``best``, ``recent`` and ``kept_because`` follow from its entries and policy (I4)."""
    plan = plan_prune(manifest.entries, manifest.policy, resumed_from=manifest.resumed_from)
    because = {d.checkpoint.id: d.reasons if d.keep else () for d in plan.decisions}
    entries = tuple(replace(e, kept_because=because.get(e.id, e.kept_because)) for e in manifest.entries)
    recomputed = replace(manifest, entries=entries, best=plan.best, recent=plan.recent)
    return manifest if recomputed == manifest else recomputed


def check_fence(manifest: Manifest, writer_epoch: int) -> None:
    """Refuse to go on for a writer that was replaced (I6).

    Raises:
        FencedError: somebody claimed a newer epoch.
    """
    if manifest.writer_epoch != writer_epoch:
        raise FencedError(
            f"this process is writer {writer_epoch} of the run and was replaced by writer "
            f"{manifest.writer_epoch}, {manifest.owner}: stop this process. It has deleted nothing"
        )


# -- the writer ----------------------------------------------------------------------------------------------


def claim(
    manifest: Manifest,
    owner: Owner,
    *,
    policy: Policy,
    settlements: Mapping[str, Settlement],
    takeover: Takeover,
    at: str,
) -> Manifest:
    """The manifest in which ``owner`` holds the next writer epoch and every pending save is settled.

    Args:
        policy: what rules from now on. It retires nothing here: retention runs in a commit.
        settlements: one for each pending entry of ``manifest``, from a look at its folder.
        takeover: "last_wins", "refuse" (fail if the previous owner has not closed) or "force" (last wins, and
            not even a duel is refused).

    Raises:
        ConflictError: refused by ``takeover``, or the third claim of a duel.
    """
    before = manifest.owner
    if before is not None and before.token == owner.token:
        return manifest
    open_before = before if before is not None and not before.closed else None
    if open_before is not None:
        _check_takeover(open_before, owner, takeover)
    pending = [(entry, settlements[entry.id]) for entry in manifest.in_state(State.PENDING)]
    # A save that rolls forward is a commit since the last claim, and so the end of any duel.
    progress = any(isinstance(settlement, RollForward) for _, settlement in pending)
    earlier = manifest.claims if open_before is not None and not progress else ()
    writer_epoch = manifest.writer_epoch + 1
    claims = (*earlier, Claim(writer_epoch=writer_epoch, identity=owner.identity))[-_DUEL:]
    if takeover != "force" and _is_duel(claims):
        raise ConflictError(
            f"two jobs fight over this run: {open_before} has claimed it between two claims by "
            f"{owner.identity}, and nothing was committed meanwhile. Stop one of them. To go on with this one, "
            'pass takeover="force" once. A supervisor must not restart this process (exit code 5)'
        )
    claimed = replace(manifest, writer_epoch=writer_epoch, owner=owner, claims=claims, policy=policy)
    detail = f"{owner}" + (f", taking over from {open_before}" if open_before else "")
    claimed = note(claimed, "claim", at=at, detail=detail)
    for entry, settlement in pending:
        claimed = _settle_one(claimed, entry, settlement, at=at)
    return recompute(claimed)


def _check_takeover(before: Owner, owner: Owner, takeover: Takeover) -> None:
    same_job = owner.run_key is not None and owner.run_key == before.run_key
    if takeover == "refuse" and not same_job:
        raise ConflictError(
            f"this run is held by {before} since {before.claimed_at}, which has not closed it, and "
            f'takeover="refuse" was asked for by {owner}. If that process is dead, start with '
            'takeover="last_wins"'
        )


def _is_duel(claims: tuple[Claim, ...]) -> bool:
    names = [c.identity for c in claims]
    return len(names) == _DUEL and names[0] == names[2] != names[1]


def settle(manifest: Manifest, settlements: Mapping[str, Settlement], *, writer_epoch: int, at: str) -> Manifest:
    """The manifest in which this writer's own unresolved saves are settled.

    Raises:
        FencedError: somebody claimed a newer epoch.
    """
    check_fence(manifest, writer_epoch)
    settled = manifest
    for save_id, settlement in settlements.items():
        entry = settled.find(save_id)
        if entry is not None and entry.state is State.PENDING:
            settled = _settle_one(settled, entry, settlement, at=at)
    if settled.commits != manifest.commits:
        settled = replace(settled, claims=())
    return settled if settled is manifest else recompute(settled)


def _settle_one(manifest: Manifest, entry: Checkpoint, settlement: Settlement, *, at: str) -> Manifest:
    if isinstance(settlement, Abandon):
        return retire_one(manifest, entry, settlement.reason, event="abandon", at=at)
    return _commit_one(manifest, entry, settlement, event="roll-forward", at=at)


def announce(
    manifest: Manifest,
    entry: Checkpoint,
    *,
    writer_epoch: int,
    settlements: Mapping[str, Settlement],
    gone: Collection[str],
    at: str,
) -> Manifest:
    """The manifest that names the save ``entry`` before its first byte (I7), as the newest in the run's order.

    The same write settles this writer's earlier unresolved saves and drops the retired entries whose bytes
    are ``gone``. A pending entry protects nothing and evicts nothing.

    Raises:
        FencedError: somebody claimed a newer epoch.
        ConflictError: another save has this id already (one in four billion): its folder must not be written to.
    """
    check_fence(manifest, writer_epoch)
    known = manifest.find(entry.id)
    if known is not None:
        if (known.step, known.writer_epoch) != (entry.step, writer_epoch):
            raise ConflictError(f"the save id {entry.id} is taken by {known.name}: save again, with a new one")
        return manifest
    settled = forget(settle(manifest, settlements, writer_epoch=writer_epoch, at=at), gone, at=at)
    pending = replace(entry, seq=settled.next_seq, state=State.PENDING, writer_epoch=writer_epoch, announced_at=at)
    expected = plan_prune(
        (*settled.entries, replace(pending, state=State.COMMITTED, committed_at=at)), settled.policy
    ).decisions[-1]
    pending = replace(pending, kept_because=expected.reasons)
    named = replace(settled, next_seq=settled.next_seq + 1, entries=(*settled.entries, pending))
    return note(named, "announce", at=at, entry=pending)


def commit(manifest: Manifest, save_id: str, sealed: RollForward, *, writer_epoch: int, at: str) -> Manifest:
    """The manifest in which a pending save is committed and retention has run over the new set.

    An earlier best leaves only here, in the write that makes its successor durable (I9).

    Raises:
        FencedError: somebody claimed a newer epoch and has not rolled this save forward.
        ConflictError: the save was settled as abandoned.
    """
    entry = manifest.find(save_id)
    if entry is not None and entry.committed_at is not None:
        return manifest
    check_fence(manifest, writer_epoch)
    if entry is None or entry.state is not State.PENDING:
        why = f" ({entry.retired_because})" if entry else ""
        raise ConflictError(f"save {save_id} was abandoned{why}: save again")
    committed = _commit_one(manifest, entry, sealed, event="commit", at=at)
    # The first commit of this epoch is the newer, better protection of what the run resumed from.
    return prune(replace(committed, claims=(), resumed_from=None), at=at)


def _commit_one(manifest: Manifest, entry: Checkpoint, sealed: RollForward, *, event: str, at: str) -> Manifest:
    committed = replace(
        entry,
        state=State.COMMITTED,
        committed_at=at,
        index_digest=sealed.index_digest,
        size_bytes=sealed.size_bytes,
        object_count=sealed.object_count,
    )
    counted = replace(manifest, commits=manifest.commits + 1)
    return note(change_entry(counted, entry.id, lambda _: committed), event, at=at, entry=entry)


def resume_from(manifest: Manifest, save_id: str, *, writer_epoch: int, at: str) -> Manifest:
    """The manifest that protects the older checkpoint this epoch resumed from, until its first commit.

    One that was retired meanwhile cannot be protected any more.

    Raises:
        FencedError: somebody claimed a newer epoch.
    """
    check_fence(manifest, writer_epoch)
    entry = manifest.find(save_id)
    if manifest.resumed_from == save_id or entry is None or entry.state is not State.COMMITTED:
        return manifest
    noted = note(manifest, "resume", at=at, entry=entry)
    return recompute(replace(noted, resumed_from=save_id))


def close(manifest: Manifest, token: str, *, at: str) -> Manifest:
    """The manifest in which the owner with this token has closed the run."""
    owner = manifest.owner
    if owner is None or owner.token != token or owner.closed:
        return manifest
    return note(replace(manifest, owner=replace(owner, closed=True), claims=()), "close", at=at, detail=str(owner))


# -- retention -----------------------------------------------------------------------------------------------


def prune(manifest: Manifest, *, at: str, policy: Policy | None = None) -> Manifest:
    """The manifest in which what no rule keeps is retired. ``policy`` stands in for the stored one, once."""
    plan = plan_prune(manifest.entries, policy or manifest.policy, resumed_from=manifest.resumed_from)
    pruned = manifest
    for decision in plan.decisions:
        if not decision.keep:
            reason = ", ".join(decision.reasons)
            pruned = retire_one(pruned, decision.checkpoint, reason, event="retire", at=at)
    return recompute(pruned)


def retire_one(manifest: Manifest, entry: Checkpoint, reason: str, *, event: str, at: str) -> Manifest:
    """The manifest in which one entry is retired, for this reason; the journal calls it ``event``."""
    retired = replace(entry, state=State.RETIRED, retired_because=reason, kept_because=())
    return note(change_entry(manifest, entry.id, lambda _: retired), event, at=at, entry=entry, detail=reason)


def forget(manifest: Manifest, gone: Collection[str], *, at: str) -> Manifest:
    """The manifest without the retired entries whose bytes are gone."""
    dropped = [e for e in manifest.entries if e.id in gone and e.state is State.RETIRED]
    if not dropped:
        return manifest
    ids = {e.id for e in dropped}
    changed = replace(manifest, entries=tuple(e for e in manifest.entries if e.id not in ids))
    for entry in dropped:
        changed = note(changed, "delete", at=at, entry=entry, detail=entry.retired_because)
    return changed
