"""Story 1: one save. Announce, stage, upload, seal, commit, delete.

The manifest is updated before the upload: no payload byte leaves until the announce is *known* to have landed.
Staging runs in the caller's thread, at the same time as the announce; everything after it runs in the
background. A save that blocks anyway, or that finds no memory to stage in, sends the tensors from where they are, and
the caller gets the state back once they are sent. A save that fails costs nothing but itself: the next announce
settles it.

(Past 350 lines: the story is one, and told in one place.)
"""

from __future__ import annotations

import contextlib
import json
import platform
import threading
import time
import traceback
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch

from cloudckpt._version import __version__
from cloudckpt.claiming import Claim
from cloudckpt.coordination import Coordinator
from cloudckpt.core import keys
from cloudckpt.core import manifest as transitions
from cloudckpt.core.index_json import INDEX_LIMIT_BYTES, StructureText, encode_index
from cloudckpt.core.manifest import Abandon, RollForward, Settlement
from cloudckpt.core.model import Checkpoint, Index, Manifest, PayloadObject, State
from cloudckpt.core.retention import metric_value
from cloudckpt.core.text import format_bytes
from cloudckpt.errors import CommitUnknownError, ConflictError, FencedError, SaveError, StorageError
from cloudckpt.events import (
    BestChanged,
    Deleted,
    DeleteFailed,
    Listener,
    SaveCommitted,
    SaveFailed,
    SaveStarted,
    Warned,
)
from cloudckpt.pending import PendingSave
from cloudckpt.sealed import summed
from cloudckpt.storage import Body, ManifestStore
from cloudckpt.sweeping import delete_bytes
from cloudckpt.tensors.ahead import summed_ahead
from cloudckpt.tensors.arena import Arena, positions
from cloudckpt.tensors.beside import Beside, stage_beside, why_not_beside
from cloudckpt.tensors.forecast import optimizer_growth_bytes
from cloudckpt.tensors.planning import Plan, Planner
from cloudckpt.tensors.sources import ArenaSource, Buffers, PayloadSource, TensorSource
from cloudckpt.tensors.staging import Staged, Staging, stage
from cloudckpt.view import placed

__all__ = ["SaveRequest", "Saver"]

#: A store's own message can be as long as it likes, and the manifest keeps the reason.
_REASON_LENGTH = 500

#: Payload objects of this size are put side by side; smaller ones in order, where a second connection gains nothing.
_LARGE_BYTES = 8 * 1024 * 1024

#: More objects than this at once gain nothing: each is sent in several parts at a time.
_OBJECTS_AT_ONCE = 2  # by the thread that saves and one more


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveRequest:
    """One call of ``save``, checked at the border."""

    step: int
    state: Mapping[str, object]
    metrics: Mapping[str, float]
    tags: tuple[str, ...]
    pin: bool
    block: bool
    allow_pickle: bool


@dataclass(slots=True)
class _Job:
    """One save's own things, handed from phase to phase."""

    plan: Plan
    sources: list[PayloadSource]
    pending: PendingSave
    started: float
    direct: bool
    blocked: float = 0.0
    staging: Staging = field(default_factory=Staged)
    staged: threading.Event = field(default_factory=threading.Event)
    stage_failed: BaseException | None = None
    objects: list[PayloadObject] = field(default_factory=list)
    sums: list[int] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        return [payload.name for payload in self.plan.payloads]

    def give_back(self) -> None:
        # What went wrong with the copy is told as the save's failure, once.
        with contextlib.suppress(SaveError):
            self.staging.give_back()

    def stop(self, reason: str) -> None:
        for source in self.sources:
            source.stop(reason)


def _let_go_of_values(error: BaseException | None) -> None:
    """An error that is kept would keep the state alive: the frames it came through have ended, and need no values."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _too_large(entry: Checkpoint, index: Index, size_bytes: int) -> str:
    parts = {name: len(json.dumps(value, default=str)) for name, value in index.structure.items()}
    largest = sorted(parts, key=lambda name: -parts[name])[:3]
    shown = ", ".join(f"{name!r} ({format_bytes(parts[name])})" for name in largest)
    return (
        f"the index of {entry.name} would have {format_bytes(size_bytes)}, and readers take no more than "
        f"{format_bytes(INDEX_LIMIT_BYTES)}: large plain values belong into tensors. The largest components: {shown}. "
        "Nothing of it became visible"
    )


class Saver:
    """Makes the saves of one writer, one at a time, in one background thread."""

    def __init__(
        self,
        store: ManifestStore,
        claim: Claim,
        coordinator: Coordinator,
        listener: Listener,
        *,
        planner: Planner,
        arena: Arena,
    ) -> None:
        self._store = store
        self._claim = claim
        self._coordinator = coordinator
        self._planner = planner
        self._arena = arena
        self._listener = listener
        self._structure = StructureText()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="cloudckpt-save")
        self._current: PendingSave | None = None
        # What the next announce settles: saves of ours that failed, or whose commit nobody confirmed.
        self._unresolved: dict[str, Settlement] = {}
        # Names of payload objects of saves of ours, so that deleting them needs no request to find out.
        self._names: dict[str, list[str]] = {}
        self._gone: set[str] = set()
        self._told_streaming = False
        self._told_overlap: set[str] = set()
        self.fenced = False
        # What an earlier process retired and did not delete.
        self._pool.submit(self._clean_up, claim.manifest)

    # -- the caller's thread ---------------------------------------------------------------------------------

    @property
    def busy_with(self) -> PendingSave | None:
        """The save in flight."""
        return self._current if self._current is not None and not self._current.done() else None

    def raise_failure(self) -> None:
        """Raise what an earlier save failed with, once, if nobody was told (I10)."""
        failure = self._current.failure if self._current is not None else None
        if failure is not None and self._current is not None:
            self._current.wait()

    def start(self, request: SaveRequest, began: float) -> PendingSave:
        """Plan, announce in the background, stage. The state may change after the save's ``wait_staged``.

        Args:
            began: when the caller's call began, by ``time.monotonic``: what it is blocked counts from there.

        Raises:
            TypeError: the state holds something that cannot be stored; nothing was announced.
        """
        plan = self._planner.plan(request.state, allow_pickle=request.allow_pickle)
        sources = None if request.block else self._arena_sources(plan, optimizer_growth_bytes(request.state))
        entry = Checkpoint(
            id=self._store.token(8),
            step=request.step,
            seq=0,
            state=State.PENDING,
            writer_epoch=self._claim.writer_epoch,
            announced_at=self._store.clock(),
            metrics=request.metrics,
            size_bytes=plan.size_bytes,
            object_count=len(plan.payloads) + 1,
            world_size=self._coordinator.world_size,
            tags=request.tags,
            pinned=request.pin,
            root=self._store.storage.url,
        )
        pending = PendingSave(entry, plan.size_bytes)
        direct = sources is None
        job = _Job(plan, sources if sources is not None else self._tensor_sources(plan), pending, began, direct)
        submitted = False
        try:
            # In here, so that an interrupt leaves no save that nobody ends, and that everybody waits for.
            self._current = pending
            self._names[entry.id] = job.names
            self._pool.submit(self._run, [job])
            submitted = True
            if not direct:
                self._stage(job, request.state)
        except BaseException as exc:
            job.stage_failed = exc
            pending.mark_seen()
            if not submitted:
                pending.end(exc)
            raise
        finally:
            job.blocked = time.monotonic() - began
            job.staged.set()
            if job.stage_failed is not None or (not direct and isinstance(job.staging, Staged)):
                pending.mark_staged()
        if not direct:
            pending.lend_state(job.give_back)
        else:
            # Whoever is interrupted has the state back at once: what was not sent by then is never sent.
            pending.keep_state(lambda: job.stop("the call that saves was interrupted"))
        return pending

    def _arena_sources(self, plan: Plan, growth_bytes: int) -> list[PayloadSource] | None:
        """The payload objects as they will lie in the arena; None where there is no memory for it."""
        starts, size_bytes = positions([payload.size_bytes for payload in plan.payloads])
        try:
            self._arena.fit(size_bytes, soon_bytes=size_bytes + growth_bytes)
        except MemoryError as exc:
            if not self._told_streaming:
                self._told_streaming = True
                self._listener(
                    Warned(
                        message=f"{exc}. Saves send the tensors from where they are instead, and save() returns only "
                        "once they are uploaded"
                    )
                )
            return None
        placed_at = zip(plan.payloads, starts, strict=True)
        return [ArenaSource(p, self._arena, start, together_bytes=plan.size_bytes) for p, start in placed_at]

    def _stage(self, job: _Job, state: Mapping[str, object]) -> None:
        # The job knows of the copy before it begins: whatever interrupts it, the next save waits for what still copies.
        payloads = job.plan.payloads
        if self._store.settings.stage == "overlap":
            reason = why_not_beside(state, payloads)
            if reason is None:
                borrow_bytes = self._store.settings.overlap_device_bytes or 0
                job.staging = beside = Beside()
                stage_beside(beside, state, payloads, self._arena, borrow_bytes=borrow_bytes)
                return
            if reason not in self._told_overlap:
                self._told_overlap.add(reason)
                self._listener(
                    Warned(message=f'stage="overlap" is not used, save() copies before it returns: {reason}')
                )
        job.staging = staged = Staged()
        stage(payloads, self._arena, staged)

    def _tensor_sources(self, plan: Plan) -> list[PayloadSource]:
        devices = {tensor.device for payload in plan.payloads for tensor in payload.tensors if tensor.is_cuda}
        for device in devices:
            # The threads that send look at the tensors from streams of their own.
            torch.cuda.synchronize(device)
        settings = self._store.settings
        at_once = max(_OBJECTS_AT_ONCE * settings.parts_in_flight, settings.connections)
        buffers = Buffers(at_once, pinned=bool(devices))
        return [TensorSource(payload, buffers, together_bytes=plan.size_bytes) for payload in plan.payloads]

    def shut_down(self) -> None:
        """Wait for the background to end."""
        self._pool.shutdown(wait=True)

    # -- the background thread -------------------------------------------------------------------------------

    def _run(self, box: list[_Job]) -> None:
        # The job is taken out of the box: a failure that is kept knows this frame and the pool's, and these the box.
        _let_go_of_values(self._save_and_tell(box))

    def _save_and_tell(self, box: list[_Job]) -> BaseException | None:
        job = box.pop()
        entry = job.pending.checkpoint
        try:
            committed = self._save(job, entry)
        except BaseException as exc:  # noqa: BLE001 - handed to whoever waits; a crash included
            # The next save uses the same memory: what still copies into it must have ended.
            job.staged.wait()
            with contextlib.suppress(SaveError):
                job.staging.wait_staged()
            job.pending.mark_staged()
            error = self._failed(job, entry, exc)
            try:
                self._listener(SaveFailed(url=entry.url, step=entry.step, error=error))
            finally:
                job.pending.end(error)
            return None if exc is job.stage_failed else error
        # From here on the save has succeeded, whatever becomes of the clean-up.
        try:
            self._tell_committed(job, committed)
            job.pending.enter("delete")
            self._clean_up(self._store.last_seen)
            job.pending.enter("done")
        finally:
            job.pending.end(placed(committed, entry.root))
        return None

    def _failed(self, job: _Job, entry: Checkpoint, exc: BaseException) -> BaseException:
        if isinstance(exc, FencedError):
            self.fenced = True
        if entry.id not in self._unresolved:
            self._unresolved[entry.id] = Abandon(reason=f"the save failed: {exc}"[:_REASON_LENGTH])
        if isinstance(exc, SaveError | ConflictError) or not isinstance(exc, Exception):
            return exc
        error = SaveError(
            f"saving step {entry.step} to {entry.url} failed at {job.pending.progress.phase}: {exc}. Earlier "
            "checkpoints are untouched; training may go on, and the next save cleans up after this one"
        )
        error.__cause__ = exc
        return error

    def _save(self, job: _Job, entry: Checkpoint) -> Checkpoint:
        with summed_ahead(job.sources if job.direct else ()):
            announced = self._announce(entry)
            job.pending.mark_announced()
            self._listener(SaveStarted(checkpoint=placed(announced, entry.root)))
            job.staged.wait()
            if job.stage_failed is not None:
                raise job.stage_failed
            job.staging.wait_staged()
            if not job.direct:
                job.pending.mark_staged()
            job.pending.enter("upload")
            self._upload(job, announced)
        if job.direct:
            job.blocked = time.monotonic() - job.started
            job.pending.mark_staged()
        job.staging.confirm()
        job.pending.enter("seal")
        sealed = self._seal(job, announced)
        job.pending.enter("commit")
        return self._commit(announced, sealed)

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

    def _upload(self, job: _Job, entry: Checkpoint) -> None:
        large = [source for source in job.sources if source.size_bytes >= _LARGE_BYTES]
        side_by_side = large if len(large) > 1 else []
        for source in job.sources:
            if source not in side_by_side:
                self._put(job, entry, source)
        if side_by_side:
            self._put_side_by_side(job, entry, side_by_side)
        for source in job.sources:
            # Here and not when the index is written: the caller may have the state back before.
            sealed, sums = source.seal()
            job.objects.append(sealed)
            job.sums += sums

    def _put_side_by_side(self, job: _Job, entry: Checkpoint, sources: Sequence[PayloadSource]) -> None:
        """Put them in this thread and one more. No pool: while a process ends, it takes no work any more."""
        left = deque(sources)
        failures: list[BaseException] = []

        def put_what_is_left() -> None:
            while not failures:
                try:
                    source = left.popleft()
                except IndexError:
                    return
                try:
                    self._put(job, entry, source)
                except BaseException as exc:  # noqa: BLE001 - raised below, in the thread that saves
                    failures.append(exc)
                    job.stop(f"another object failed: {exc}")

        helper = threading.Thread(target=put_what_is_left, name="cloudckpt-put", daemon=False)
        try:
            helper.start()
        except RuntimeError:  # no further thread is to be had: one after the other
            put_what_is_left()
        else:
            put_what_is_left()
            helper.join()
        if failures:
            raise failures[0]

    def _put(self, job: _Job, entry: Checkpoint, source: PayloadSource) -> None:
        self._store.storage.put(
            keys.payload_key(entry.step, entry.id, source.payload.name),
            source,
            size_bytes=source.size_bytes,
            progress=job.pending.advance,
        )

    def _seal(self, job: _Job, entry: Checkpoint) -> RollForward:
        index = self._index(job, entry)
        tensors, structure = job.plan.text.filled(job.sums), self._structure.of(index.structure)
        body = encode_index(index, tensors=tensors, structure=structure)
        if len(body) > INDEX_LIMIT_BYTES:
            raise SaveError(_too_large(entry, index, len(body)))
        key = keys.index_key(entry.step, entry.id)
        # The folder belongs to this save alone, so an index that is already there is this one, sent before.
        self._store.storage.put(key, Body(body), size_bytes=len(body))
        return summed(index, body)

    def _index(self, job: _Job, entry: Checkpoint) -> Index:
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
            objects=tuple(job.objects),
            tensors={},  # as text, from the plan
            structure=job.plan.flat.structure,
            pickled=job.plan.flat.pickled,
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

    def _tell_committed(self, job: _Job, committed: Checkpoint) -> None:
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

    def settle_and_close(self) -> None:
        """Settle what failed, delete what was retired, drop it, and mark the run as closed by its owner.

        Raises:
            FencedError: a newer writer owns the run; nothing was changed.
            CommitUnknownError: the store never told.
        """
        self.shut_down()
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
