"""What the other ranks do of a save besides their own bytes: wait for rank zero, report to it, hear how it ended."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace

from cloudckpt.coordination import Coordinator, is_common
from cloudckpt.core.manifest_json import entry_from_bytes
from cloudckpt.core.model import Checkpoint
from cloudckpt.errors import FencedError, RankError
from cloudckpt.saving.job import Job

__all__ = ["Following", "topic"]


def topic(what: str, entry: Checkpoint) -> str:
    """What the ranks call a moment of one save."""
    return f"{what}/{entry.id}"


class Following:
    """Every rank but zero.

    Args:
        coordinator: the other ranks.
    """

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator
        self._told: tuple[str, Exception] | None = None
        self.fenced = False

    def begin(self, job: Job) -> None:
        """See ``Side``."""
        self._coordinator.watch(topic("ended", job.pending.checkpoint), job.break_off)

    def announce(self, job: Job) -> Checkpoint:
        """See ``Side``."""
        entry = job.pending.checkpoint
        said = json.loads(self._coordinator.hear(topic("announced", entry)))
        return replace(entry, seq=said["seq"])

    def commit(self, job: Job, announced: Checkpoint) -> Checkpoint:
        """See ``Side``."""
        assert job.uploaded is not None
        self._coordinator.report(topic("uploaded", announced), job.uploaded.to_bytes())
        return self._end(job, announced)

    def _end(self, job: Job, entry: Checkpoint) -> Checkpoint:
        """How the save ended, as rank zero tells it once."""
        try:
            return entry_from_bytes(self._coordinator.hear(topic("ended", entry)))
        except RankError as exc:
            if is_common(exc) or job.uploaded is None:
                self._told = entry.id, exc
                raise
            # Rank zero went without a word, and may have had all that it needed.
            doubt = RankError(
                f"{exc}. Whether it had committed {entry.url} before that is not known here; the next restore() finds "
                "it if so"
            )
            self._told = entry.id, doubt
            raise doubt from exc
        except Exception as exc:
            self._told = entry.id, exc
            raise

    def committed(self, job: Job, entry: Checkpoint) -> None:  # noqa: ARG002 - the protocol's
        """See ``Side``."""
        self._forget(entry)

    def hurry(self, *, hurried: bool) -> None:
        """See ``Side``. Rank zero deletes."""

    def failed(self, job: Job, error: BaseException) -> BaseException:
        """See ``Side``. The error that all ranks have, if rank zero can still tell it."""
        entry = job.pending.checkpoint
        if self._told is None or self._told[0] != entry.id:
            self._coordinator.report(topic("uploaded", entry), error)
            with contextlib.suppress(Exception):  # it is kept
                self._end(job, entry)
        self._forget(entry)
        if self._told is None or self._told[0] != entry.id:
            return error
        common = self._told[1]
        if job.broken_off is None and common is not error and isinstance(error, Exception):
            common.__cause__ = error
        self.fenced = self.fenced or isinstance(common, FencedError)
        return common

    def _forget(self, entry: Checkpoint) -> None:
        for moment in ("announced", "ended"):
            self._coordinator.forget(topic(moment, entry))

    def close(self) -> None:
        """See ``Side``."""
