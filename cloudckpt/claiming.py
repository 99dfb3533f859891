"""Becoming the writer: take the next epoch, settle what an earlier process left, fence it."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cloudckpt.core import keys
from cloudckpt.core import manifest as transitions
from cloudckpt.core.manifest import Settlement
from cloudckpt.core.model import Manifest, Owner, State
from cloudckpt.core.policy import Policy, PolicyWords, resolve, tightened
from cloudckpt.core.retention import plan_prune
from cloudckpt.errors import FencedError, StorageError, UnsafeStorageError
from cloudckpt.events import Claimed, Listener, PolicyTightened, Warned
from cloudckpt.sealed import settlement_of
from cloudckpt.storage import LocalStorage, ManifestStore
from cloudckpt.storage.mounts import doubt_about, mount_of
from cloudckpt.view import placed

__all__ = ["Claim", "claim_run", "run_key_from_environment"]

#: What schedulers call a job, stable when they restart it; the first that is set names the run.
_RUN_KEYS = ("TORCHELASTIC_RUN_ID", "SLURM_JOB_ID", "KUBERNETES_JOB_UID", "AWS_BATCH_JOB_ID", "LSB_JOBID", "PBS_JOBID")


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """What this process holds after its claim."""

    manifest: Manifest
    writer_epoch: int
    token: str


def run_key_from_environment(environment: Mapping[str, str] = os.environ) -> str | None:
    """The scheduler's name for this job, or None on a machine without one."""
    values = (environment.get(name, "") for name in _RUN_KEYS)
    # torchrun's default run id is the word "none", the same for everybody.
    return next((value for value in values if value and value != "none"), None)


def claim_run(
    store: ManifestStore, words: PolicyWords, *, change_policy: bool, takeover: str, listener: Listener
) -> Claim:
    """Claim the run, making it first if the root is empty.

    Raises:
        ConflictError: refused by ``takeover``, or a duel of two jobs.
        UnsafeStorageError: ``takeover="refuse"``, on a disk whose locks do not keep other machines out.
        FencedError: another job claimed the run at the same moment, after this one.
        ConfigError: the policy words do not fit the stored policy.
        FormatError: the root holds something that is not a run, or a manifest that cannot be read or written.
        StorageError: the store refused; a 403 is never taken for a new run.
    """
    _check_locks(store, takeover, listener)
    owner = Owner(
        token=store.owner_token,
        host=socket.gethostname(),
        pid=os.getpid(),
        run_key=run_key_from_environment(),
        claimed_at=store.clock(),
    )
    before: list[Manifest] = []

    def new() -> Manifest:
        return Manifest(run_id=store.token(32), policy=resolve(words, None, has_entries=False))

    def prepare(current: Manifest) -> dict[str, Settlement]:
        return {entry.id: settlement_of(store.storage, entry) for entry in current.in_state(State.PENDING)}

    def change(current: Manifest, settlements: dict[str, Settlement]) -> Manifest:
        before[:] = [current]
        stored = current.policy if current.revision else None
        policy = resolve(words, stored, has_entries=bool(current.entries), change_policy=change_policy)
        return transitions.claim(
            current, owner, policy=policy, settlements=settlements, takeover=takeover, at=store.clock()
        )

    # A manager that only read before must decide on what is there now.
    store.drop_base()
    after = store.transact(change, prepare=prepare, new=new)
    store.refuse_rollback = True
    if after.owner is None or after.owner.token != owner.token:
        # Our claim landed and its answer was lost, and somebody has claimed on top of it meanwhile: their epoch
        # is not ours (I6).
        raise FencedError(
            f"{store.storage.url} was claimed by {after.owner} while this process was claiming it: stop this process. "
            "It has deleted nothing"
        )
    _abort_uploads(store, before[0], after, listener)
    _tell(before[0], after, store.storage.url, owner, listener)
    return Claim(manifest=after, writer_epoch=after.writer_epoch, token=owner.token)


def _check_locks(store: ManifestStore, takeover: str, listener: Listener) -> None:
    """Look once at what a local root lies on: a manifest is replaced under a lock, which must hold for every writer.

    Where it does not, the last claim still wins and who comes late finds out, but for writes at the same moment: that
    is worth a warning. ``takeover="refuse"`` promises that there is one writer, which nothing can promise there.
    """
    storage = store.unretried
    if not isinstance(storage, LocalStorage):
        return
    mount = mount_of(Path(storage.url))
    doubt = doubt_about(mount) if mount is not None else None
    if doubt is None:
        return
    danger = f"{storage.url} lies on {doubt}"
    if takeover == "refuse" and not store.single_writer:
        raise UnsafeStorageError(
            f'{danger}. takeover="refuse" cannot keep a second writer out there: two that start at once would '
            "both get the run. If only one process ever writes, promise it with single_writer=True, or say "
            'takeover="last_wins" (--takeover). Nothing was written'
        )
    said = (
        f"{danger}. Until then let only one process write to this run: of two that write at once, one can "
        "undo what the other has just recorded, and checkpoints would be missing from the list"
    )
    if store.is_news(said):
        listener(Warned(message=said))


def _abort_uploads(store: ManifestStore, before: Manifest, after: Manifest, listener: Listener) -> None:
    """Abort what dead processes were uploading: one listing for each save that is given up, none after a clean end."""
    for entry in before.in_state(State.PENDING):
        settled = after.find(entry.id)
        if settled is None or settled.state is not State.RETIRED:
            continue
        try:
            store.storage.abort_uploads(f"{keys.checkpoint_prefix(entry.step, entry.id)}/", spare=_is_foreign)
        except StorageError as exc:
            # Unfinished uploads are invisible; they cost money, and `gc` aborts them too.
            listener(Warned(message=f"{entry.name}: its unfinished uploads could not be aborted: {exc}"))


def _is_foreign(key: str) -> bool:
    """What somebody else is uploading into a folder of ours is not ours to abort (I12)."""
    return keys.parse(key).kind is keys.Kind.FOREIGN


def _tell(before: Manifest, after: Manifest, url: str, owner: Owner, listener: Listener) -> None:
    settled = [after.find(entry.id) for entry in before.in_state(State.PENDING)]
    open_before = (
        before.owner if before.owner and not before.owner.closed and before.owner.token != owner.token else None
    )
    listener(
        Claimed(
            url=url,
            writer_epoch=after.writer_epoch,
            took_over_from=str(open_before) if open_before else None,
            rolled_forward=tuple(placed(e, url) for e in settled if e and e.state is State.COMMITTED),
            abandoned=tuple(placed(e, url) for e in settled if e and e.state is State.RETIRED),
        )
    )
    if before.entries and tightened(before.policy, after.policy):
        _tell_tightened(before.policy, after, url, listener)


def _tell_tightened(stored: Policy, after: Manifest, url: str, listener: Listener) -> None:
    plan = plan_prune(after.entries, after.policy, resumed_from=after.resumed_from)
    listener(
        PolicyTightened(
            url=url,
            before=str(stored),
            after=str(after.policy),
            will_retire=tuple(placed(c, url) for c in plan.retired),
        )
    )
