"""The product's own shells, one request at a time: a call is run again with the answers that it has had so far.

A model that copies a protocol checks the copy. Here ``transact``, ``claim_run``, ``Recorder``, ``sweep_run``, ``gc_run``
and the editors run as they are, on a storage that gives the answers it was handed and stops the call at the first
request beyond them. What a process does next is thus a pure function of what it remembers and of what it was answered,
and can be stored, compared and gone on with in any order.

Clock and names are functions of the place, pauses take no time; a deadline is a number of tries.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from cloudckpt.config import Settings
from cloudckpt.core import keys
from cloudckpt.core.manifest import Settlement
from cloudckpt.core.manifest_json import decode_manifest, encode_manifest, entry_to_bytes
from cloudckpt.core.model import Checkpoint, Manifest
from cloudckpt.errors import ObjectNotFoundError, StorageError
from cloudckpt.storage import Conditions, Landed, Listed, Lost, ManifestStore, Outcome, Storage, Unknown, Versioned
from cloudckpt.storage.base import Buffer
from cloudckpt.storage.retry import Backoff
from cloudckpt.testing.builders import at

T = TypeVar("T")

#: Two tries of everything, as ``PatientStore`` counts: a write that is in doubt twice is given up.
SETTINGS = Settings(
    manifest_deadline_s=1, storage_deadline_s=1, retry_base_s=1, retry_cap_s=10**9, copy_every_revisions=10**6
)


#: What bytes say that were decoded or encoded before. Manifests are values: everybody may have the same one.
_READ: dict[bytes, Manifest] = {}
_MANY = 10_000


def decode(body: bytes, *, what: str = keys.MANIFEST) -> Manifest:
    """``decode_manifest``, once for the same bytes."""
    found = _READ.get(body)
    return _remembered(body, decode_manifest(body, what=what)) if found is None else found


def encode(manifest: Manifest) -> bytes:
    """``encode_manifest``; nobody has to decode that again."""
    body = encode_manifest(manifest)
    _remembered(body, manifest)
    return body


def _remembered(body: bytes, manifest: Manifest) -> Manifest:
    if len(_READ) >= _MANY:
        _READ.clear()
    return _READ.setdefault(body, manifest)


class Table(Generic[T]):
    """Values by number: equal ones have one number, so that states are small and quickly compared."""

    def __init__(self) -> None:
        self._numbers: dict[T, int] = {}
        self._values: list[T] = []

    def number(self, value: T) -> int:
        """The number of a value; a new one for a new value."""
        found = self._numbers.setdefault(value, len(self._values))
        if found == len(self._values):
            self._values.append(value)
        return found

    def __getitem__(self, number: int) -> T:
        return self._values[number]

    def __len__(self) -> int:
        return len(self._values)


@dataclass(frozen=True, slots=True)
class Slot:
    """A manifest as it lies on the store. Its write id is its version: no two manifests of one run share one.

    Attributes:
        content: the number of everything but the following, and but the journal, which decides nothing.
        history: of the write ids it remembers those that somebody may still ask for.
    """

    content: int
    revision: int
    write_id: str
    history: frozenset[str]


@dataclass(frozen=True, slots=True)
class Body:
    """Any other object's bytes, by number."""

    number: int


@dataclass(frozen=True, slots=True)
class Gone:
    """The answer that there is no such object."""


@dataclass(frozen=True, slots=True)
class Trouble:
    """No usable answer (``retryable``), or a plain no."""

    retryable: bool


class Library:
    """What manifests, bodies and entries the numbers mean."""

    def __init__(self) -> None:
        self._contents: Table[str] = Table()
        self._manifests: dict[int, Manifest] = {}
        self._whole: dict[Slot, tuple[Manifest, bytes]] = {}
        self._bodies: Table[bytes] = Table()
        self._entries: Table[bytes] = Table()
        self._noted: dict[int, Checkpoint] = {}

    def shelve(self, manifest: Manifest) -> Slot:
        """A manifest's place among all that there ever were."""
        # Why an entry was retired is a sentence for people, and holds revision numbers.
        entries = tuple(
            replace(e, retired_because="retired") if e.retired_because is not None else e for e in manifest.entries
        )
        plain = replace(manifest, revision=1, write_id="", history=(), journal=(), updated_at="", entries=entries)
        content = self._contents.number(repr(plain))  # to the last digit, and no NaN is equal to nothing
        self._manifests.setdefault(content, plain)
        return Slot(content, manifest.revision, manifest.write_id, frozenset(manifest.history))

    def content(self, slot: Slot) -> Manifest:
        """The manifest without what tells two equal ones apart."""
        return self._manifests[slot.content]

    def manifest(self, slot: Slot) -> Manifest:
        """The manifest as it was written."""
        return self._found(slot)[0]

    def body(self, slot: Slot) -> bytes:
        """The manifest's bytes."""
        return self._found(slot)[1]

    def _found(self, slot: Slot) -> tuple[Manifest, bytes]:
        if slot not in self._whole:
            history = (*sorted(slot.history - {slot.write_id}), slot.write_id)
            whole = replace(
                self._manifests[slot.content],
                revision=slot.revision,
                write_id=slot.write_id,
                history=history,
                updated_at=at(0),
            )
            self._whole[slot] = whole, encode(whole)
        return self._whole[slot]

    def keep(self, key: str, body: bytes) -> Body:
        """An object's bytes; of a manifest's copy what is not the same on every way to it is left out."""
        if keys.parse(key).kind is keys.Kind.COPY:
            found = decode(body)
            body = encode_manifest(replace(found, history=(found.write_id,), journal=()))
        return Body(self._bodies.number(body))

    def bytes_of(self, body: Body) -> bytes:
        """The bytes again."""
        return self._bodies[body.number]

    def note(self, entry: Checkpoint) -> int:
        """An entry's number."""
        number = self._entries.number(entry_to_bytes(entry))
        self._noted.setdefault(number, entry)
        return number

    def entry(self, number: int) -> Checkpoint:
        """The entry again."""
        return self._noted[number]


@dataclass(frozen=True, slots=True)
class Request:
    """What a process waits for: one request to the store, or (``hear``) a word of another rank."""

    verb: str
    keys: tuple[str, ...] = ()
    slot: Slot | None = None
    body: Body | None = None
    expecting: str | None = None
    limit: int | None = None

    def __str__(self) -> str:
        return f"{self.verb}({', '.join(self.keys)})"


class Blocked(BaseException):
    """No answer is there yet. No ``Exception``, so that no handler takes it for trouble."""

    def __init__(self, request: Request) -> None:
        super().__init__(str(request))
        self.request = request


class ReplayStorage:
    """Gives the answers there are, and stops the call at the next request.

    Attributes:
        mentions: the write ids that the process has sent or read in this call.
    """

    def __init__(self, library: Library, answers: Sequence[Any]) -> None:
        self.conditions = Conditions.HONOURED
        self.mentions: set[str] = set()
        self._library = library
        self._answers = answers
        self._next = 0
        self._stopped: Blocked | None = None

    @property
    def url(self) -> str:
        return "memory://model"

    def ask(self, request: Request) -> Any:
        """The next answer."""
        if self._stopped is None and self._next == len(self._answers):
            self._stopped = Blocked(request)
        if self._stopped is not None:
            raise self._stopped
        answer = self._answers[self._next]
        self._next += 1
        if isinstance(answer, Gone):
            raise ObjectNotFoundError(f"{request.keys[0]} does not exist")
        if isinstance(answer, Trouble):
            raise StorageError(f"{request.verb} had no answer", retryable=answer.retryable)
        return answer

    def read(self, key: str, *, limit_bytes: int) -> Versioned:
        found = self.ask(Request("read", (key,)))
        if isinstance(found, Slot):
            self.mentions.add(found.write_id)
            return Versioned(self._library.body(found), found.write_id)
        return Versioned(self._library.bytes_of(found), "1")

    def create(self, key: str, body: bytes) -> Outcome:
        return self._write("create", key, body, None)

    def replace(self, key: str, body: bytes, *, expecting: str) -> Outcome:
        return self._write("replace", key, body, expecting)

    def _write(self, verb: str, key: str, body: bytes, expecting: str | None) -> Outcome:
        if key == keys.MANIFEST:
            slot = self._library.shelve(decode(body))
            self.mentions.add(slot.write_id)
            request = Request(verb, (key,), slot=slot, expecting=expecting)
        else:
            request = Request(verb, (key,), body=self._library.keep(key, body), expecting=expecting)
        try:
            answer = self.ask(request)
        except StorageError as exc:
            return Unknown(exc)
        assert isinstance(answer, Landed | Lost)
        return answer

    def put(
        self, key: str, buffers: Iterable[Buffer], *, size_bytes: int, progress: Callable[[int], None] | None = None
    ) -> None:
        body = b"".join(bytes(buffer) for buffer in buffers)
        assert len(body) == size_bytes
        self.ask(Request("put", (key,), body=self._library.keep(key, body)))

    def read_into(self, key: str, start: int, *targets: memoryview) -> None:
        raise AssertionError("nobody in the model reads payload")

    def size(self, key: str) -> int:
        found = self.ask(Request("size", (key,)))
        assert isinstance(found, int)
        return found

    def list(self, prefix: str = "", *, limit: int | None = None) -> Iterator[Listed]:
        return iter([Listed(key, size) for key, size in self.ask(Request("list", (prefix,), limit=limit))])

    def delete(self, keys: Iterable[str]) -> dict[str, StorageError]:
        going = tuple(keys)
        if not going:
            return {}
        failed = self.ask(Request("delete", going))
        return {key: StorageError("refused", retryable=False) for key in failed}

    def abort_uploads(self, prefix: str, *, spare: Callable[[str], bool] = lambda _: False) -> int:
        return 0

    def close(self) -> None:
        pass


class PatientStore(ManifestStore):
    """A manifest store on which no time passes: each look at the clock is a second."""

    def _backoff(self, deadline_s: float) -> Backoff:
        ticks = itertools.count()
        return Backoff(
            deadline_s=deadline_s,
            now=lambda: float(next(ticks)),
            sleep=lambda _: None,
            uniform=lambda low, high: 0.0,
        )


def patient_store(storage: Storage, name: str) -> PatientStore:
    """A store whose time never changes, and whose random digits follow from who asks, and upon which revision."""
    found: list[PatientStore] = []

    def token(digits: int) -> str:
        seen = found[0].last_seen
        text = f"{name}/{seen.revision if seen else 0}/{digits}"
        return hashlib.sha256(text.encode()).hexdigest()[:digits]

    found.append(PatientStore(storage, SETTINGS, clock=lambda: at(0), token=token))
    return found[0]


@dataclass(frozen=True, slots=True)
class Mind:
    """What a process remembers between two calls. All of it is gone when the process is.

    Attributes:
        base: the manifest it last read or wrote.
        claimed: the manifest of its claim, and its epoch and token.
        entry: the save it is at, by number, and what sealing it gave.
        unresolved, names, gone, fenced: as in ``Recorder``.
    """

    base: Slot | None = None
    claimed: Slot | None = None
    writer_epoch: int = 0
    token: str = ""
    entry: int | None = None
    sealed: Settlement | None = None
    unresolved: tuple[tuple[str, Settlement], ...] = ()
    names: tuple[tuple[str, tuple[str, ...]], ...] = ()
    gone: frozenset[str] = frozenset()
    fenced: bool = False
