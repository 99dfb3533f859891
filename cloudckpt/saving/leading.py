"""What rank zero does of a save besides its own bytes: it writes the manifest and the index, and deletes.

It alone announces, checks every rank's report against the plan, seals, commits, retires, and tells the others how it
ended. A process that saves alone is rank zero of one.

(Past 350 lines: the story is one, and told in one place.)
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from cloudckpt._version import __version__
from cloudckpt.claiming import Claim
from cloudckpt.coordination import Coordinator
from cloudckpt.core import keys
from cloudckpt.core import manifest as transitions
from cloudckpt.core.index_json import INDEX_LIMIT_BYTES, StructureText, encode_index
from cloudckpt.core.manifest import Abandon, RollForward, Settlement
from cloudckpt.core.manifest_json import entry_to_bytes
from cloudckpt.core.merging import merge
from cloudckpt.core.model import Checkpoint, Index, Manifest, State
from cloudckpt.core.retention import metric_value
from cloudckpt.core.text import format_bytes
from cloudckpt.errors import CommitUnknownError, ConflictError, FencedError, SaveError, StorageError
from cloudckpt.events import BestChanged, Deleted, DeleteFailed, Listener, SaveCommitted, SaveStarted, Warned
from cloudckpt.saving.following import topic
from cloudckpt.saving.job import Job, Uploaded
from cloudckpt.sealed import summed
from cloudckpt.storage import Body, ManifestStore
from cloudckpt.sweeping import delete_bytes
from cloudckpt.tensors.planning import Overall
from cloudckpt.view import placed

__all__ = ["Leading"]

#: A store's own message can be as long as it likes, and the manifest keeps the reason.
_REASON_LENGTH = 500


class Leading:
    """Rank zero.

    Args:
        store: the run's manifest.
        claim: what makes this process its writer.
        coordinator: the other ranks.
        listener: told what happens.
    """

    def __init__(self, store: ManifestStore, claim: Claim, coordinator: Coordinator, listener: Listener) -> None:
        self._store = store
        self._claim = claim
        self._coordinator = coordinator
        self._listener = listener
        self._structure = StructureText()
        # What the next announce settles: saves of ours that failed, or whose commit nobody confirmed.
        self._unresolved: dict[str, Settlement] = {}
        # Names of payload objects of saves of ours, so that deleting them needs no request to find out.
        self._names: dict[str, list[str]] = {}
        self._gone: set[str] = set()
        self.fenced = False

    def clean_up_after_others(self) -> None:
        """Delete what an earlier process retired and did not delete."""
        self._clean_up(self._claim.manifest)

    # -- one save --------------------------------------------------------------------------------------------

    def begin(self, job: Job) -> None:
        """See ``Side``."""
        entry = job.pending.checkpoint
        self._names[entry.id] = [name for name, _ in _overall(job).objects]
        self._coordinator.watch(topic("uploaded", entry), job.break_off)

    def announce(self, job: Job) -> Checkpoint:
        """See ``Side``."""
        announced = self._announce(job.pending.checkpoint)
        self._coordinator.tell(topic("announced", announced), json.dumps({"seq": announced.seq}).encode())
        self._listener(SaveStarted(checkpoint=placed(announced, self._store.storage.url)))
        return announced

    def commit(self, job: Job, announced: Checkpoint) -> Checkpoint:
        """See ``Side``."""
        assert job.uploaded is not None
        reports = self._coordinator.reports(topic("uploaded", announced))
        uploaded = [job.uploaded, *map(Uploaded.from_bytes, reports)]
        _check_reports(_overall(job), uploaded, announced)
        job.pending.enter("seal")
        sealed = self._seal(job, announced, uploaded)
        job.pending.enter("commit")
        committed = self._commit(announced, sealed)
        self._coordinator.tell(topic("ended", announced), entry_to_bytes(committed))
        return committed

    def committed(self, job: Job, entry: Checkpoint) -> None:
        """See ``Side``."""
        self._coordinator.forget(topic("uploaded", entry))
        self._tell_committed(job, entry)
        job.pending.enter("delete")
        self._clean_up(self._store.last_seen)

    def failed(self, job: Job, error: BaseException) -> BaseException:
        """See ``Side``."""
        entry = job.pending.checkpoint
        if job.broken_off is not None and not isinstance(error, ConflictError):
            # What ended the upload here is somebody else's failure: that is the one to tell.
            error = self._others_failure(entry, error)
        if isinstance(error, FencedError):
            self.fenced = True
        if entry.id not in self._unresolved:
            self._unresolved[entry.id] = Abandon(reason=f"the save failed: {error}"[:_REASON_LENGTH])
        if not isinstance(error, SaveError | ConflictError) and isinstance(error, Exception):
            cause = error
            where = f" on rank 0 ({self._coordinator.host})" if self._coordinator.world_size > 1 else ""
            error = SaveError(
                f"saving step {entry.step} to {entry.url} failed at {job.pending.progress.phase}{where}: {cause}. "
                "Earlier checkpoints are untouched; training may go on, and the next save cleans up after this one"
            )
            error.__cause__ = cause
        for moment in ("announced", "ended"):
            self._coordinator.tell(topic(moment, entry), error)
        self._coordinator.forget(topic("uploaded", entry))
        return error

    def _others_failure(self, entry: Checkpoint, error: BaseException) -> BaseException:
        try:
            self._coordinator.reports(topic("uploaded", entry))
        except Exception as exc:  # noqa: BLE001 - handed on
            return exc
        return error

    def _announce(self, entry: Checkpoint) -> Checkpoint:
        settled, gone = dict(self._unresolved), set(self._gone)

        def change(current: Manifest, _: None) -> Manifest:
            return transitions.announce(
                current,
                entry,
                writer_epoch=self._claim.writer_epoch,
                settlements=settled,
                gone=gone,
                at=self._store.clock(),
            )

        after = self._store.transact(change, prepare=lambda _: None)
        for save_id in settled:
            self._unresolved.pop(save_id, None)
        self._gone -= gone
        found = after.find(entry.id)
        if found is None:
            raise ConflictError(f"{entry.name} was announced and is gone from the manifest: save again")
        return found

    # -- sealing and committing ------------------------------------------------------------------------------

    def _seal(self, job: Job, entry: Checkpoint, uploaded: Sequence[Uploaded]) -> RollForward:
        index = self._index(job, entry, uploaded)
        sums = [value for own in uploaded for value in own.sums]
        tensors, structure = _overall(job).text.filled(sums), self._structure.of(index.structure)
        body = encode_index(index, tensors=tensors, structure=structure)
        if len(body) > INDEX_LIMIT_BYTES:
            raise SaveError(_too_large(entry, index, len(body)))
        key = keys.index_key(entry.step, entry.id)
        # The folder belongs to this save alone, so an index that is already there is this one, sent before.
        self._store.storage.put(key, Body(body), size_bytes=len(body))
        return summed(index, body)

    def _index(self, job: Job, entry: Checkpoint, uploaded: Sequence[Uploaded]) -> Index:
        manifest = self._store.last_seen
        if manifest is None:
            raise SaveError(f"{entry.url}: sealed before it was announced")
        return Index(
            run_id=manifest.run_id,
            id=entry.id,
            step=entry.step,
            seq=entry.seq,
            writer_epoch=entry.writer_epoch,
            announced_at=entry.announced_at,
            sealed_at=self._store.clock(),
            world_size=entry.world_size,
            metrics=entry.metrics,
            tags=entry.tags,
            pinned=entry.pinned,
            policy=manifest.policy,
            versions={
                "cloudckpt": __version__,
                "torch": str(torch.__version__),
                "python": platform.python_version(),
            },
            objects=tuple(item for own in uploaded for item in own.objects),
            tensors={},  # as text, from the plan
            structure=_merged(job.plan.flat.structure, uploaded),
            pickled=job.plan.flat.pickled or _overall(job).pickled,
        )

    def _commit(self, entry: Checkpoint, sealed: RollForward) -> Checkpoint:
        def change(current: Manifest, _: None) -> Manifest:
            return transitions.commit(
                current, entry.id, sealed, writer_epoch=self._claim.writer_epoch, at=self._store.clock()
            )

        try:
            after = self._store.transact(change, prepare=lambda _: None)
        except (CommitUnknownError, StorageError):
            # Everything is in place: if the commit has not landed, the next announce or claim completes it.
            self._unresolved[entry.id] = sealed
            raise
        found = after.find(entry.id)
        if found is None or found.committed_at is None:
            raise ConflictError(f"{entry.name} was retired by somebody else before it was committed")
        if found.state is not State.COMMITTED:
            # Marked while it was on its way, for example: the rules let it go in the very write that committed it.
            self._listener(Warned(message=f"{found.name} was committed and is let go already: {found.retired_because}"))
        return found

    def _tell_committed(self, job: Job, committed: Checkpoint) -> None:
        manifest = self._store.last_seen
        checkpoint = placed(committed, job.pending.checkpoint.root)
        seconds = time.monotonic() - job.started
        self._listener(SaveCommitted(checkpoint=checkpoint, seconds=seconds, blocked_seconds=job.blocked))
        for best in manifest.best if manifest else ():
            if manifest is not None and best.ids and best.ids[0] == committed.id:
                kept = [placed(e, checkpoint.root) for e in map(manifest.find, best.ids) if e is not None]
                values = [value for c in kept if (value := metric_value(c.metrics, best.metric)) is not None]
                self._listener(BestChanged(metric=best.metric, values=tuple(values), best=tuple(kept)))

    def _clean_up(self, manifest: Manifest | None) -> None:
        """Delete the bytes of retired entries. A failure is an event, and tried again after the next save."""
        if manifest is not None and manifest.writer_epoch != self._claim.writer_epoch:
            self.fenced = True  # a replaced writer sends no DELETE, even if its last save was rolled forward
        began = time.monotonic()
        for entry in manifest.in_state(State.RETIRED) if manifest else ():
            if self.fenced or entry.id in self._gone:
                continue
            checkpoint = placed(entry, self._store.storage.url)
            try:
                # Tried once each time: what fails is tried again after the next save, and nobody waits for it.
                problem = delete_bytes(self._store.unretried, entry, self._names.get(entry.id))
            except Exception as exc:  # noqa: BLE001 - housekeeping never fails training; it is told and repeated
                problem = str(exc)
            if problem is None:
                self._gone.add(entry.id)
                self._names.pop(entry.id, None)
                # What was never visible was never somebody's checkpoint: no line for it.
                if entry.committed_at is not None:
                    self._listener(Deleted(checkpoint=checkpoint))
            else:
                self._listener(DeleteFailed(checkpoint=checkpoint, error=problem))
                if time.monotonic() - began > self._store.settings.retry_cap_s:
                    return  # a store in trouble; each further request would cost its time-out, and a save may wait

    # -- the end ---------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Settle what failed, delete what was retired, drop it, and mark the run as closed by its owner.

        Raises:
            FencedError: a newer writer owns the run; nothing was changed.
            CommitUnknownError: the store never told.
        """
        if self.fenced:
            return
        if self._unresolved:
            settled = dict(self._unresolved)
            self._store.transact(
                lambda m, _: transitions.settle(
                    m, settled, writer_epoch=self._claim.writer_epoch, at=self._store.clock()
                ),
                prepare=lambda _: None,
            )
            self._unresolved.clear()
        manifest = self._store.last_seen
        if manifest is not None and any(entry.id not in self._gone for entry in manifest.in_state(State.RETIRED)):
            # This process may have been replaced, or the run repaired, since it last looked: a replaced writer sends
            # no DELETE, and what a repair has admitted again is not to be deleted by anybody.
            manifest = self._store.read()
            if manifest is not None:
                transitions.check_fence(manifest, self._claim.writer_epoch)
        self._clean_up(manifest)

        def change(current: Manifest, _: None) -> Manifest:
            transitions.check_fence(current, self._claim.writer_epoch)
            dropped = transitions.forget(current, self._gone, at=self._store.clock())
            return transitions.close(dropped, self._claim.token, at=self._store.clock())

        self._store.transact(change, prepare=lambda _: None, keep_copy=True)
        self._gone.clear()


def _merged(structure: Mapping[str, Any], uploaded: Sequence[Uploaded]) -> dict[str, Any]:
    """What all ranks have besides tensors: rank zero's, and what the others have alone."""
    found = dict(structure)
    for own in uploaded:
        for component, node in own.structure.items():
            found[component] = merge(found[component], node) if component in found else node
    return found


def _overall(job: Job) -> Overall:
    assert job.plan.overall is not None
    return job.plan.overall


def _check_reports(overall: Overall, uploaded: Sequence[Uploaded], entry: Checkpoint) -> None:
    """Compare what the ranks put with what was planned.

    Raises:
        SaveError: an object is missing, one too many, or of another size.
    """
    put = [(item.name, item.size_bytes) for own in uploaded for item in own.objects]
    if put != [*overall.objects]:
        differing = sorted({name for name, _ in {*put} ^ {*overall.objects}})
        raise SaveError(
            f"{entry.url}: what the ranks report is not what was planned: {', '.join(differing[:5]) or 'another order'}"
        )


def _too_large(entry: Checkpoint, index: Index, size_bytes: int) -> str:
    parts = {name: len(json.dumps(value, default=str)) for name, value in index.structure.items()}
    largest = sorted(parts, key=lambda name: -parts[name])[:3]
    shown = ", ".join(f"{name!r} ({format_bytes(parts[name])})" for name in largest)
    return (
        f"the index of {entry.name} would have {format_bytes(size_bytes)}, and readers take no more than "
        f"{format_bytes(INDEX_LIMIT_BYTES)}: large plain values belong into tensors. The largest components: {shown}. "
        "Nothing of it became visible"
    )
