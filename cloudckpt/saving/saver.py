"""What every rank does of a save: agree on what it is, stage it, upload its own payload, and wait for the end.

The manifest is updated before the upload: no payload byte leaves until the announce is *known* to have landed.
Staging runs in the caller's thread, at the same time as the announce; everything after it runs in the
background. A save that blocks anyway, or that finds no memory to stage in, sends the tensors from where they are, and
the caller gets the state back once they are sent. A save that fails costs nothing but itself: the next announce
settles it.
"""

from __future__ import annotations

import contextlib
import time
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

from cloudckpt.coordination import Coordinator
from cloudckpt.core.deadline import Judgement
from cloudckpt.core.model import Checkpoint, State
from cloudckpt.errors import SaveError
from cloudckpt.events import Listener, SaveFailed, Warned
from cloudckpt.pending import PendingSave
from cloudckpt.progress import Meter, watched
from cloudckpt.saving.agreeing import Agreement
from cloudckpt.saving.hurrying import Hurrying
from cloudckpt.saving.job import Job, SaveRequest, Side, Uploaded
from cloudckpt.saving.uploading import put_all, tensor_sources
from cloudckpt.storage import ManifestStore
from cloudckpt.tensors.ahead import summed_ahead
from cloudckpt.tensors.arena import Arena, positions
from cloudckpt.tensors.beside import Beside, stage_beside, why_not_beside
from cloudckpt.tensors.forecast import optimizer_growth_bytes
from cloudckpt.tensors.planning import Plan, Planner
from cloudckpt.tensors.sources import ArenaSource, PayloadSource
from cloudckpt.tensors.staging import Staged, stage
from cloudckpt.view import placed

__all__ = ["Saver"]


def _let_go_of_values(error: BaseException | None) -> None:
    """An error that is kept would keep the state alive: the frames it came through have ended, and need no values."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


class Saver:
    """Makes the saves of one rank, one at a time, in one background thread.

    Args:
        store: the run.
        side: what this rank does besides its own bytes.
        coordinator: the other ranks.
        listener: told what goes wrong.
        writer_epoch: under which the job writes.
        planner: decides what is written.
        arena: host memory to stage in.
    """

    def __init__(
        self,
        store: ManifestStore,
        side: Side,
        coordinator: Coordinator,
        listener: Listener,
        *,
        writer_epoch: int,
        planner: Planner,
        arena: Arena,
    ) -> None:
        self._store = store
        self._side = side
        self._coordinator = coordinator
        self._listener = listener
        self._writer_epoch = writer_epoch
        self._arena = arena
        self._agreement = Agreement(
            planner,
            coordinator,
            lambda: store.token(8),
            lambda text: listener(Warned(message=text)),
            check_replicas=store.settings.check_replicas,
        )
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="cloudckpt-save")
        self._current: PendingSave | None = None
        # Failed before a save against a deadline, which came first: told afterwards, unless that one was committed.
        self._aside: PendingSave | None = None
        self._told_streaming = False
        self._told_overlap: set[str] = set()
        self._hurrying = Hurrying(planner, coordinator)

    def submit(self, work: Callable[[], None]) -> None:
        """Have something done in the background, before the next save."""
        self._pool.submit(work)

    # -- the caller's thread ---------------------------------------------------------------------------------

    @property
    def fenced(self) -> bool:
        """Whether this process was replaced as the writer."""
        return self._side.fenced

    @property
    def last(self) -> PendingSave | None:
        """The last save, ended or not."""
        return self._current

    @property
    def busy_with(self) -> PendingSave | None:
        """The save in flight."""
        return self._current if self._current is not None and not self._current.done() else None

    def raise_failure(self) -> None:
        """Raise what an earlier save failed with, once, if nobody was told (I10)."""
        last, aside = self._current, self._aside
        self._aside = None
        made_good = last is not None and last.checkpoint.committed_at is not None
        if aside is not None and aside.failure is not None and not made_good:
            aside.wait()
        if last is not None and last.failure is not None:
            last.wait()

    def start(self, request: SaveRequest, began: float, *, ready: Callable[[], None]) -> PendingSave:
        """Plan, announce in the background, stage. The state may change after the save's ``wait_staged``.

        Args:
            began: when the caller's call began, by ``time.monotonic``: what it is blocked counts from there.
            ready: raises what keeps this rank from saving.

        Raises:
            TypeError: the state holds something that cannot be stored; nothing was announced.
            SaveError: the same, or anything else, on any rank of many.
        """
        save_id, plan = self._agreement.reach(request, ready=ready)
        overall = plan.overall
        entry = self._entry(
            save_id,
            request,
            size_bytes=overall.size_bytes if overall else plan.size_bytes,
            objects=len(overall.objects) if overall else len(plan.payloads),
        )
        pending = PendingSave(entry, plan.size_bytes)
        job = Job(plan, [], pending, began, direct=request.block, confirm=request.confirm)
        submitted, problem = False, None
        try:
            # In here, so that an interrupt leaves no save that nobody ends, and that everybody waits for.
            if self._current is not None and self._current.failure is not None:
                self._aside = self._current
            self._current = pending
            self._side.begin(job)
            sources = None if request.block else self._arena_sources(plan, optimizer_growth_bytes(request.state))
            job.direct = sources is None
            job.sources = sources if sources is not None else tensor_sources(plan.payloads, self._store.settings)
            self._pool.submit(self._run, [job])
            submitted = True
            if not job.direct:
                self._stage(job, request.state)
                job.confirm()
        except BaseException as exc:
            problem = job.stage_failed = exc
            pending.mark_seen()
            if not submitted:
                pending.end(self._side.failed(job, exc))
            if self._coordinator.world_size == 1 or not isinstance(exc, Exception):
                raise
        finally:
            job.blocked = time.monotonic() - began
            job.staged.set()
            if job.stage_failed is not None or (not job.direct and isinstance(job.staging, Staged)):
                pending.mark_staged()
        if problem is not None:
            pending.raise_common(problem)
        if not job.direct:
            pending.lend_state(job.give_back)
        else:
            # Whoever is interrupted has the state back at once: what was not sent by then is never sent.
            pending.keep_state(job.stop)
        return pending

    def _entry(self, save_id: str, request: SaveRequest, *, size_bytes: int = 0, objects: int = 0) -> Checkpoint:
        return Checkpoint(
            id=save_id,
            step=request.step,
            seq=0,
            state=State.PENDING,
            writer_epoch=self._writer_epoch,
            announced_at=self._store.clock(),
            metrics=request.metrics,
            size_bytes=size_bytes,
            object_count=objects + 1,
            world_size=self._coordinator.world_size,
            tags=request.tags,
            pinned=request.pin,
            root=self._store.storage.url,
        )

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

    def _stage(self, job: Job, state: Mapping[str, object]) -> None:
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

    def shut_down(self) -> None:
        """Wait for the background to end."""
        self._pool.shutdown(wait=True)

    # -- against a deadline -----------------------------------------------------------------------------------

    def hurry(self, *, hurried: bool) -> None:
        """Whether this process is about to be ended. See ``Side.hurry``."""
        self._side.hurry(hurried=hurried)

    def judge(self, request: SaveRequest, until: float) -> Judgement:
        """Whether a save that has to be committed by a moment is begun. See ``Hurrying.judge``."""
        return self._hurrying.judge(request, until, self._current)

    def declined(self, request: SaveRequest, reason: str) -> PendingSave:
        """A save that is not begun: whoever waits for it is told why."""
        declined = PendingSave(self._entry(self._store.token(8), request), 0)
        declined.decline(SaveError(f"step {request.step} was not saved: {reason}"))
        return declined

    # -- the background thread -------------------------------------------------------------------------------

    def _run(self, box: list[Job]) -> None:
        # The job is taken out of the box: a failure that is kept knows this frame and the pool's, and these the box.
        _let_go_of_values(self._save_and_tell(box))

    def _save_and_tell(self, box: list[Job]) -> BaseException | None:
        job = box.pop()
        entry = job.pending.checkpoint
        try:
            committed = self._save(job)
        except BaseException as exc:  # noqa: BLE001 - handed to whoever waits; a crash included
            # The next save uses the same memory: what still copies into it must have ended.
            job.staged.wait()
            with contextlib.suppress(SaveError):
                job.staging.wait_staged()
            job.pending.mark_staged()
            for source in job.sources:
                source.let_go()
            error = self._side.failed(job, exc)
            try:
                self._listener(SaveFailed(url=entry.url, step=entry.step, error=error))
            finally:
                job.pending.end(error)
            return None if exc is job.stage_failed else error
        # From here on the save has succeeded, whatever becomes of the clean-up.
        self._hurrying.note(committed.size_bytes, time.monotonic() - job.agreed)
        try:
            self._side.committed(job, committed)
            job.pending.enter("done")
        finally:
            job.pending.end(placed(committed, entry.root))
        return None

    def _save(self, job: Job) -> Checkpoint:
        with summed_ahead(job.sources if job.direct else ()):
            announced = self._side.announce(job)
            job.pending.mark_announced()
            job.staged.wait()
            if job.stage_failed is not None:
                raise job.stage_failed
            job.staging.wait_staged()
            if not job.direct:
                job.pending.mark_staged()
            job.pending.enter("upload")
            self._upload(job, announced)
        if job.direct:
            job.confirm()
            job.blocked = time.monotonic() - job.started
            job.pending.mark_staged()
        job.staging.confirm()
        return self._side.commit(job, announced)

    def _upload(self, job: Job, entry: Checkpoint) -> None:
        pending = job.pending
        total = sum(source.size_bytes for source in job.sources)
        meter = Meter(f"saving {entry.name}", total, rank=self._coordinator.rank)
        pending.measure_by(meter)

        # Not the job: a frame that is kept with an error keeps its function, and what that closes over stays with it.
        def moved(count: int) -> None:
            pending.advance(count)
            meter.advance(count)

        with watched(meter, self._listener, self._store.settings):
            objects, sums = put_all(self._store.storage, entry, job.sources, progress=moved, meter=meter)
        structure = {component: job.plan.flat.structure[component] for component in job.plan.sends}
        job.uploaded = Uploaded(objects=tuple(objects), sums=tuple(sums), structure=structure)

    # -- the end ---------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Wait for the background, then end the run in order. See ``Leading.close``."""
        self.shut_down()
        self._side.close()
