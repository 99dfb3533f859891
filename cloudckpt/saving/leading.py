"""What rank zero does of a save besides its own bytes: it keeps the records, and tells the others how it ended.

It alone announces, checks every rank's report against the plan, seals, commits and deletes. A process that saves alone
is rank zero of one.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from cloudckpt.claiming import Claim
from cloudckpt.coordination import Coordinator
from cloudckpt.core.manifest_json import entry_to_bytes
from cloudckpt.core.merging import merge
from cloudckpt.core.model import Checkpoint
from cloudckpt.errors import ConflictError, SaveError
from cloudckpt.events import Listener
from cloudckpt.saving.following import topic
from cloudckpt.saving.job import Job, Uploaded
from cloudckpt.saving.recording import Recorder
from cloudckpt.storage import ManifestStore
from cloudckpt.tensors.planning import Overall

__all__ = ["Leading"]


class Leading:
    """Rank zero.

    Args:
        store: the run's manifest.
        claim: what makes this process its writer.
        coordinator: the other ranks.
        listener: told what happens.
    """

    def __init__(self, store: ManifestStore, claim: Claim, coordinator: Coordinator, listener: Listener) -> None:
        self._coordinator = coordinator
        self._heard: Exception | None = None
        self._recorder = Recorder(store, claim, listener)

    @property
    def fenced(self) -> bool:
        """See ``Side``."""
        return self._recorder.fenced

    def clean_up_after_others(self) -> None:
        """Delete what an earlier process retired and did not delete."""
        self._recorder.clean_up_after_others()

    def begin(self, job: Job) -> None:
        """See ``Side``."""
        entry = job.pending.checkpoint
        self._recorder.expect(entry.id, [name for name, _ in _overall(job).objects])
        self._coordinator.watch(topic("uploaded", entry), job.break_off)

    def announce(self, job: Job) -> Checkpoint:
        """See ``Side``."""
        announced = self._recorder.announce(job.pending.checkpoint)
        self._coordinator.tell(topic("announced", announced), json.dumps({"seq": announced.seq}).encode())
        self._recorder.tell_started(announced)
        return announced

    def commit(self, job: Job, announced: Checkpoint) -> Checkpoint:
        """See ``Side``."""
        assert job.uploaded is not None
        reports = self._reports(announced)
        uploaded = [job.uploaded, *map(Uploaded.from_bytes, reports)]
        overall = _overall(job)
        _check_reports(overall, uploaded, announced)
        job.pending.enter("seal")
        sealed = self._recorder.seal(
            announced,
            objects=[item for own in uploaded for item in own.objects],
            tensors=overall.text.filled([value for own in uploaded for value in own.sums]),
            structure=_merged(job.plan.flat.structure, uploaded),
            pickled=job.plan.flat.pickled or overall.pickled,
        )
        job.pending.enter("commit")
        committed = self._recorder.commit(announced, sealed)
        self._coordinator.tell(topic("ended", announced), entry_to_bytes(committed))
        return committed

    def committed(self, job: Job, entry: Checkpoint) -> None:
        """See ``Side``."""
        self._coordinator.forget(topic("uploaded", entry))
        self._recorder.tell_committed(entry, seconds=time.monotonic() - job.started, blocked_seconds=job.blocked)
        job.pending.enter("delete")
        self._recorder.clean_up()

    def hurry(self, *, hurried: bool) -> None:
        """See ``Side``."""
        self._recorder.deletes = not hurried

    def failed(self, job: Job, error: BaseException) -> BaseException:
        """See ``Side``."""
        entry = job.pending.checkpoint
        if job.broken_off is not None and not isinstance(error, ConflictError):
            # What ended the upload here is somebody else's failure: that is the one to tell.
            error = self._others_failure(entry, error)
        self._heard = None
        self._recorder.give_up(entry, error)
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
        if self._heard is None:
            with contextlib.suppress(Exception):  # it is kept
                self._reports(entry)
        return self._heard or error

    def _reports(self, entry: Checkpoint) -> Sequence[bytes]:
        """What the others report. A failure among them is taken out of the mailbox once, so it is kept."""
        try:
            return self._coordinator.reports(topic("uploaded", entry))
        except Exception as exc:
            self._heard = exc
            raise

    def close(self) -> None:
        """See ``Recorder.close``."""
        self._recorder.close()


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
