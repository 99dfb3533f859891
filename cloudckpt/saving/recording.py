"""What a save leaves in the run's records: the manifest's entry, the index, and the deletion of what it replaced.

Whoever holds the claim does this, once for all that write payload: rank zero under a ``CheckpointManager``, the
coordinator of a save that PyTorch's distributed checkpoint leads.
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
from cloudckpt.core import keys
from cloudckpt.core import manifest as transitions
from cloudckpt.core.index_json import INDEX_LIMIT_BYTES, StructureText, encode_index
from cloudckpt.core.manifest import Abandon, RollForward, Settlement
from cloudckpt.core.model import Checkpoint, Index, Manifest, PayloadObject, State, Tensors
from cloudckpt.core.retention import metric_value
from cloudckpt.core.text import format_bytes
from cloudckpt.errors import CommitUnknownError, ConflictError, FencedError, SaveError, StorageError
from cloudckpt.events import BestChanged, Deleted, DeleteFailed, Listener, SaveCommitted, SaveStarted, Warned
from cloudckpt.sealed import summed
from cloudckpt.storage import Body, ManifestStore
from cloudckpt.sweeping import delete_bytes
from cloudckpt.view import placed

__all__ = ["Recorder"]

#: A store's own message can be as long as it likes, and the manifest keeps the reason.
_REASON_LENGTH = 500


class Recorder:
    """Keeps the records of the saves of one claim.

    Args:
        store: the run's manifest.
        claim: what makes this process its writer.
        listener: told what happens.

    Attributes:
        fenced: whether this process was replaced as the writer.
        deletes: whether bytes of retired entries are deleted now; otherwise that waits for the next claim.
    """

    def __init__(self, store: ManifestStore, claim: Claim, listener: Listener) -> None:
        self._store = store
        self._claim = claim
        self._listener = listener
        self._structure = StructureText()
        # What the next announce settles: saves of ours that failed, or whose commit nobody confirmed.
        self._unresolved: dict[str, Settlement] = {}
        # Names of payload objects of saves of ours, so that deleting them needs no request to find out.
        self._names: dict[str, list[str]] = {}
        self._gone: set[str] = set()
        self.fenced = False
        self.deletes = True

    @property
    def writer_epoch(self) -> int:
        """The number under which everything is written."""
        return self._claim.writer_epoch

    # -- one save --------------------------------------------------------------------------------------------

    def expect(self, save_id: str, names: Sequence[str]) -> None:
        """Note what payload objects a save has."""
        self._names[save_id] = [*names]

    def announce(self, entry: Checkpoint) -> Checkpoint:
        """Put a save into the manifest as pending, and settle what became of those before it.

        Raises:
            FencedError: a newer writer owns the run.
            CommitUnknownError: the store never told.
        """
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

    def tell_started(self, entry: Checkpoint) -> None:
        """Say that it is on its way."""
        self._listener(SaveStarted(checkpoint=placed(entry, self._store.storage.url)))

    def seal(
        self,
        entry: Checkpoint,
        *,
        objects: Sequence[PayloadObject],
        tensors: Tensors | str,
        structure: Mapping[str, Any],
        pickled: bool,
    ) -> RollForward:
        """Write the index, once every payload object is in place.

        Args:
            tensors: the index's part about tensors; as text, where the caller has it.

        Raises:
            SaveError: it would be larger than readers take.
        """
        index = self._index(
            entry, objects, {} if isinstance(tensors, str) else tensors, structure=structure, pickled=pickled
        )
        text = tensors if isinstance(tensors, str) else None
        body = encode_index(index, tensors=text, structure=self._structure.of(index.structure))
        if len(body) > INDEX_LIMIT_BYTES:
            raise SaveError(_too_large(entry, index, len(body)))
        key = keys.index_key(entry.step, entry.id)
        # The folder belongs to this save alone, so an index that is already there is this one, sent before.
        self._store.storage.put(key, Body(body), size_bytes=len(body))
        return summed(index, body)

    def _index(
        self,
        entry: Checkpoint,
        objects: Sequence[PayloadObject],
        tensors: Tensors,
        *,
        structure: Mapping[str, Any],
        pickled: bool,
    ) -> Index:
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
            objects=tuple(objects),
            tensors=tensors,
            structure=structure,
            pickled=pickled,
        )

    def commit(self, entry: Checkpoint, sealed: RollForward) -> Checkpoint:
        """Make a sealed save visible, and retire what it replaces.

        Raises:
            FencedError: a newer writer owns the run.
            ConflictError: somebody retired it meanwhile.
            CommitUnknownError: the store never told.
        """

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

    def give_up(self, entry: Checkpoint, error: BaseException) -> None:
        """Note that a save failed, for the next announce, unless all of it is in place."""
        if isinstance(error, FencedError):
            self.fenced = True
        if entry.id not in self._unresolved:
            self._unresolved[entry.id] = Abandon(reason=f"the save failed: {error}"[:_REASON_LENGTH])

    def tell_committed(self, committed: Checkpoint, *, seconds: float, blocked_seconds: float | None) -> None:
        """Say that it is there, and if it is the best."""
        manifest = self._store.last_seen
        checkpoint = placed(committed, self._store.storage.url)
        self._listener(SaveCommitted(checkpoint=checkpoint, seconds=seconds, blocked_seconds=blocked_seconds))
        for best in manifest.best if manifest else ():
            if manifest is not None and best.ids and best.ids[0] == committed.id:
                kept = [placed(e, checkpoint.root) for e in map(manifest.find, best.ids) if e is not None]
                values = [value for c in kept if (value := metric_value(c.metrics, best.metric)) is not None]
                self._listener(BestChanged(metric=best.metric, values=tuple(values), best=tuple(kept)))

    # -- deleting --------------------------------------------------------------------------------------------

    def clean_up_after_others(self) -> None:
        """Delete what an earlier process retired and did not delete."""
        self._delete_retired(self._claim.manifest)

    def clean_up(self) -> None:
        """Delete the bytes of retired entries. A failure is an event, and tried again after the next save."""
        self._delete_retired(self._store.last_seen)

    def _delete_retired(self, manifest: Manifest | None) -> None:
        if manifest is not None and manifest.writer_epoch != self._claim.writer_epoch:
            self.fenced = True  # a replaced writer sends no DELETE, even if its last save was rolled forward
        began = time.monotonic()
        for entry in manifest.in_state(State.RETIRED) if manifest else ():
            # Looked at each time: a process that is about to be ended does not finish what it was deleting.
            if self.fenced or not self.deletes or entry.id in self._gone:
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
        waiting = manifest.in_state(State.RETIRED) if manifest is not None and self.deletes else ()
        if any(entry.id not in self._gone for entry in waiting):
            # This process may have been replaced, or the run repaired, since it last looked: a replaced writer sends
            # no DELETE, and what a repair has admitted again is not to be deleted by anybody.
            manifest = self._store.read()
            if manifest is not None:
                transitions.check_fence(manifest, self._claim.writer_epoch)
        self._delete_retired(manifest)

        def change(current: Manifest, _: None) -> Manifest:
            transitions.check_fence(current, self._claim.writer_epoch)
            dropped = transitions.forget(current, self._gone, at=self._store.clock())
            return transitions.close(dropped, self._claim.token, at=self._store.clock())

        self._store.transact(change, prepare=lambda _: None, keep_copy=True)
        self._gone.clear()


def _too_large(entry: Checkpoint, index: Index, size_bytes: int) -> str:
    parts = {name: len(json.dumps(value, default=str)) for name, value in index.structure.items()}
    largest = sorted(parts, key=lambda name: -parts[name])[:3]
    shown = ", ".join(f"{name!r} ({format_bytes(parts[name])})" for name in largest)
    return (
        f"the index of {entry.name} would have {format_bytes(size_bytes)}, and readers take no more than "
        f"{format_bytes(INDEX_LIMIT_BYTES)}: large plain values belong into tensors. The largest components: {shown}. "
        "Nothing of it became visible"
    )
