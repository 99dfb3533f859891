"""One save's own things, handed from phase to phase."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from cloudckpt.core.checksum import format_crc32c, format_sums, parse_crc32c, parse_sums
from cloudckpt.core.model import Cells, Checkpoint, PayloadObject
from cloudckpt.errors import SaveError
from cloudckpt.pending import PendingSave
from cloudckpt.tensors.planning import Plan
from cloudckpt.tensors.sources import PayloadSource
from cloudckpt.tensors.staging import Staged, Staging

__all__ = ["Job", "SaveRequest", "Side", "Uploaded"]


def _nothing() -> None:
    """There is nothing to look at."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveRequest:
    """One call of ``save``, checked at the border.

    ``confirm`` is called once the state is copied, or sent from where it is; it raises what keeps that from being one
    state.
    """

    step: int
    state: Mapping[str, object]
    metrics: Mapping[str, float]
    tags: tuple[str, ...]
    pin: bool
    block: bool
    allow_pickle: bool
    confirm: Callable[[], None] = _nothing


@dataclass(slots=True)
class Job:
    """A save on its way, on one rank.

    Attributes:
        plan: what this rank writes.
        sources: its payload objects.
        pending: what the caller holds.
        started: when the caller's call began, on the monotonic clock.
        direct: whether tensors are sent from where they are.
        blocked: how long the caller was blocked, in seconds.
        staging: the copy into host memory.
        staged: set once that has begun, or failed.
        stage_failed: what it failed with.
        uploaded: what this rank has put, once it has.
        broken_off: why another rank's trouble ended the upload here.
        confirm: see ``SaveRequest``.
        agreed: when all ranks had agreed on it, on the monotonic clock.
    """

    plan: Plan
    sources: list[PayloadSource]
    pending: PendingSave
    started: float
    direct: bool
    blocked: float = 0.0
    staging: Staging = field(default_factory=Staged)
    staged: threading.Event = field(default_factory=threading.Event)
    stage_failed: BaseException | None = None
    uploaded: Uploaded | None = None
    broken_off: str | None = None
    confirm: Callable[[], None] = _nothing
    agreed: float = field(default_factory=time.monotonic)

    def give_back(self) -> None:
        """Wait until the state may be changed in whatever way."""
        # What went wrong with the copy is told as the save's failure, once.
        with contextlib.suppress(SaveError):
            self.staging.give_back()

    def stop(self, reason: str) -> None:
        """Send nothing more."""
        for source in self.sources:
            source.stop(reason)

    def break_off(self, reason: str) -> None:
        """Another rank has trouble: nothing will come of this save."""
        self.broken_off = reason
        self.stop(reason)


@dataclass(frozen=True, slots=True, kw_only=True)
class Uploaded:
    """What one rank has put.

    Attributes:
        objects: its payload objects.
        sums: the sums of their boxes, object after object.
        structure: values that only this rank has, by component.
    """

    objects: tuple[PayloadObject, ...]
    sums: tuple[int, ...]
    structure: Mapping[str, Any] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """As it goes over the channel."""
        return json.dumps(
            {
                "objects": [[o.name, o.size_bytes, format_crc32c(o.crc32c), *_told(o.cells)] for o in self.objects],
                "sums": format_sums(self.sums),
                "structure": self.structure,
            },
            separators=(",", ":"),
        ).encode()

    @classmethod
    def from_bytes(cls, body: bytes) -> Uploaded:
        """The same again."""
        said = json.loads(body)
        sums = said["sums"]
        return cls(
            objects=tuple(
                PayloadObject(name=name, size_bytes=size, crc32c=parse_crc32c(value), cells=_heard(*cells))
                for name, size, value, *cells in said["objects"]
            ),
            sums=parse_sums(sums, len(sums) // 8),
            structure=said["structure"],
        )


def _told(cells: Cells | None) -> tuple[int, str] | tuple[()]:
    return () if cells is None else (cells.size_bytes, format_sums(cells.crc32c))


def _heard(size_bytes: int = 0, sums: str = "") -> Cells | None:
    return Cells(size_bytes=size_bytes, crc32c=parse_sums(sums, len(sums) // 8)) if size_bytes else None


class Side(Protocol):
    """What a rank does of a save besides its own bytes: rank zero all that concerns the run, the others nothing."""

    @property
    def fenced(self) -> bool:
        """Whether this process was replaced as the writer."""
        ...

    def begin(self, job: Job) -> None:
        """A save has been agreed upon; nothing has happened yet."""
        ...

    def announce(self, job: Job) -> Checkpoint:
        """Return once the manifest names the save."""
        ...

    def commit(self, job: Job, announced: Checkpoint) -> Checkpoint:
        """This rank's part is in place: return once the save is committed."""
        ...

    def committed(self, job: Job, entry: Checkpoint) -> None:
        """Whatever comes after a commit; a failure here does not fail the save."""
        ...

    def hurry(self, *, hurried: bool) -> None:
        """Whether the process is about to be ended: then no bytes are deleted, and what is retired waits."""
        ...

    def failed(self, job: Job, error: BaseException) -> BaseException:
        """The save failed here; gives what everybody is told."""
        ...

    def close(self) -> None:
        """End the run in order."""
        ...
