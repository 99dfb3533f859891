"""The nouns of a run, as frozen values. Parsed at the border (``wire``), trusted everywhere else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from cloudckpt.core import keys
from cloudckpt.core.policy import Policy

__all__ = [
    "FORMAT",
    "HISTORY_LENGTH",
    "JOURNAL_LENGTH",
    "Best",
    "Cells",
    "Checkpoint",
    "Chunk",
    "Claim",
    "Index",
    "JournalEvent",
    "Manifest",
    "Owner",
    "PayloadObject",
    "State",
    "TensorEntry",
    "Tensors",
]

#: The on-store format this code writes, and the newest it reads.
FORMAT = 1

#: How many write ids a manifest remembers. A lost answer is recognised as long as fewer writes than this
#: came in between; one save makes two.
HISTORY_LENGTH = 32

#: How many journal events a manifest keeps.
JOURNAL_LENGTH = 100

Json = Any


class State(StrEnum):
    """Where a save stands. There is no way back from ``RETIRED``: that makes late deletes harmless."""

    PENDING = "pending"
    COMMITTED = "committed"
    RETIRED = "retired"


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """One manifest entry: one save and what became of it.

    Attributes:
        id: the save id, 8 hex digits; names the folder, never reused.
        step: training step, >= 0.
        seq: place in the run's order, given by the announce; "recent" means highest ``seq``.
        state: pending, committed or retired.
        writer_epoch: fencing number of the writer that announced it.
        announced_at: UTC time of the announce, ISO 8601; a label for people, never used to decide a delete.
        committed_at: UTC time of the commit, or None.
        metrics: the metrics known for this step. Values may be NaN or infinite; those are never best.
        size_bytes: payload bytes plus index; while pending, what is expected.
        object_count: payload objects plus the index; while pending, what is expected.
        world_size: number of ranks that wrote it.
        tags: labels given by people; ``tag:NAME`` selects the newest that carries one.
        pinned: no rule retires it.
        held: admitted by ``repair``; no rule retires it until a person releases it.
        damaged: why its bytes are known to be unusable, or None. Damaged entries count in no rule.
        marks: labels such as "diverged"; a marked entry counts in no rule and is only loaded by name.
        kept_because: the reasons of the last retention plan; while pending, what they are expected to be.
        index_digest: ``sha256:<hex>`` of the index, set at commit.
        retired_because: the reason it was let go, or None.
        extra: fields written by a newer version, carried along untouched.
        root: the URL of the run it was read from; not stored.
    """

    id: str
    step: int
    seq: int
    state: State
    writer_epoch: int
    announced_at: str
    committed_at: str | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    size_bytes: int = 0
    object_count: int = 0
    world_size: int = 1
    tags: tuple[str, ...] = ()
    pinned: bool = False
    held: bool = False
    damaged: str | None = None
    marks: tuple[str, ...] = ()
    kept_because: tuple[str, ...] = ()
    index_digest: str | None = None
    retired_because: str | None = None
    extra: Mapping[str, Json] = field(default_factory=dict)
    root: str = field(default="", compare=False)

    @property
    def name(self) -> str:
        """The folder's name, ``checkpoint-<step>.<id>``."""
        return keys.checkpoint_prefix(self.step, self.id)

    @property
    def url(self) -> str:
        """Where it lies: the run's URL and the folder's name."""
        return f"{self.root}/{self.name}" if self.root else self.name

    @property
    def usable(self) -> bool:
        """Committed, not damaged and not marked: what ``latest`` and ``best`` choose from."""
        return self.state is State.COMMITTED and self.damaged is None and not self.marks

    def _repr_html_(self) -> str:
        """For notebooks."""
        from cloudckpt.core.markup import checkpoint_html  # noqa: PLC0415 - which speaks of this class

        return checkpoint_html(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Owner:
    """Who holds the current writer epoch. ``token`` (16 hex digits) is this claim's own name."""

    token: str
    host: str
    pid: int
    run_key: str | None
    claimed_at: str
    closed: bool = False
    extra: Mapping[str, Json] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"pid {self.pid} on {self.host}" + (f" (run {self.run_key})" if self.run_key else "")

    @property
    def identity(self) -> str:
        """What stays the same when a supervisor restarts the same job: its run key, else its host."""
        return f"run {self.run_key}" if self.run_key else f"host {self.host}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """One claim since the last commit; three by alternating owners are a duel."""

    writer_epoch: int
    identity: str


@dataclass(frozen=True, slots=True, kw_only=True)
class JournalEvent:
    """One line of the run's bounded history, for people."""

    at: str
    revision: int
    event: str
    id: str | None = None
    step: int | None = None
    detail: str | None = None
    extra: Mapping[str, Json] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Best:
    """The ids that one best rule keeps, best first."""

    metric: str
    mode: str
    ids: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The whole truth about a run at one revision.

    Attributes:
        format: on-store format number.
        requires: features a writer or deleter must know; an unknown one makes us refuse to write or delete.
        run_id: 32 hex digits, minted with the run and again by ``repair``.
        revision: +1 per write.
        write_id: fresh per write; how a lost answer is recognised.
        history: the last write ids, oldest first, including ``write_id``.
        writer_epoch: the fencing number; 0 before the first claim.
        owner: who claimed ``writer_epoch``.
        claims: the claims since the last commit, oldest first, at most three.
        next_seq: the ``seq`` the next announce gives.
        commits: how many saves were ever committed.
        resumed_from: id of an older checkpoint this epoch resumed from; protected until its first commit.
        policy: what retention keeps.
        entries: every pending, committed or retired save, by ``seq``.
        best: per best rule the ids it keeps; recomputable.
        recent: ids that the last-N rule keeps, newest first; recomputable.
        journal: the last events, oldest first.
        copies: revisions of the immutable copies that are kept, oldest first.
        updated_at: UTC time of this write.
        extra: fields written by a newer version, carried along untouched.
    """

    format: int = FORMAT
    requires: tuple[str, ...] = ()
    run_id: str
    revision: int = 0
    write_id: str = ""
    history: tuple[str, ...] = ()
    writer_epoch: int = 0
    owner: Owner | None = None
    claims: tuple[Claim, ...] = ()
    next_seq: int = 1
    commits: int = 0
    resumed_from: str | None = None
    policy: Policy = field(default_factory=Policy)
    entries: tuple[Checkpoint, ...] = ()
    best: tuple[Best, ...] = ()
    recent: tuple[str, ...] = ()
    journal: tuple[JournalEvent, ...] = ()
    copies: tuple[int, ...] = ()
    updated_at: str = ""
    extra: Mapping[str, Json] = field(default_factory=dict)

    def find(self, save_id: str) -> Checkpoint | None:
        """The entry with this save id, or None."""
        return next((entry for entry in self.entries if entry.id == save_id), None)

    def in_state(self, state: State) -> tuple[Checkpoint, ...]:
        """The entries in one state, by ``seq``."""
        return tuple(entry for entry in self.entries if entry.state is state)

    @property
    def committed(self) -> tuple[Checkpoint, ...]:
        """The committed entries, oldest first, the damaged and marked ones included."""
        return self.in_state(State.COMMITTED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cells:
    """A payload object in cells of one size, counted from its first byte: each can be read and proven alone.

    Attributes:
        size_bytes: the size of a cell, a power of two; the last one of an object may be shorter.
        crc32c: the CRC-32C of each cell.
    """

    size_bytes: int
    crc32c: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PayloadObject:
    """One object with tensor bytes: its name inside the folder, its size and its CRC-32C (RFC 3720).

    ``cells`` are None for an object that fits into one, and in an index from before there were any.
    """

    name: str
    size_bytes: int
    crc32c: int
    cells: Cells | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """A box of one tensor and the byte range that holds it, in row-major order.

    ``offsets`` and ``lengths`` (elements per dimension) place the box in the tensor; a whole tensor has
    offsets of zero and its own shape. ``stored_as`` is its name inside the safetensors object where that
    differs from the tensor's name.
    """

    object: str
    start: int
    length: int
    offsets: tuple[int, ...]
    lengths: tuple[int, ...]
    crc32c: int
    stored_as: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorEntry:
    """One tensor of one component. ``alias_of`` names the tensor that holds the bytes of a tied one."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...] = ()
    alias_of: str | None = None


#: component -> tensor name -> entry
Tensors = Mapping[str, Mapping[str, TensorEntry]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Index:
    """What one checkpoint contains: the object ``checkpoint.json``, written after every payload object.

    Attributes:
        structure: per component the tree of Python values, tensors replaced by references (``core.values``).
        pickled: whether any leaf was pickled (only ever with ``allow_pickle=True``).
        policy: the retention policy at save time, so that ``repair`` can propose it again.
    """

    format: int = FORMAT
    requires: tuple[str, ...] = ()
    run_id: str
    id: str
    step: int
    seq: int
    writer_epoch: int
    announced_at: str
    sealed_at: str
    world_size: int
    metrics: Mapping[str, float]
    tags: tuple[str, ...]
    pinned: bool
    policy: Policy
    versions: Mapping[str, str]
    objects: tuple[PayloadObject, ...]
    tensors: Tensors
    structure: Mapping[str, Json]
    pickled: bool = False
    extra: Mapping[str, Json] = field(default_factory=dict)
