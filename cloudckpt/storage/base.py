"""The promises every storage keeps, spelled out once. ``cloudckpt.testing.StorageContract`` holds them to it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol, runtime_checkable

from cloudckpt.errors import StorageError

__all__ = [
    "Attested",
    "Attesting",
    "Buffer",
    "Conditions",
    "Connecting",
    "Copying",
    "Described",
    "Governed",
    "Landed",
    "Listed",
    "Lost",
    "Outcome",
    "Paced",
    "Part",
    "Source",
    "Storage",
    "Unknown",
    "Versioned",
    "scatter",
]

Buffer = bytes | bytearray | memoryview


class Conditions(StrEnum):
    """What is known of a storage's conditional writes.

    Attributes:
        HONOURED: the store promises them, or a probe has seen them work.
        UNPROVEN: many servers ignore them and answer as if they had not; a probe must tell before the first write.
        ABSENT: there are none, so only one process may ever write.
    """

    HONOURED = "honoured"
    UNPROVEN = "unproven"
    ABSENT = "absent"


@dataclass(frozen=True, slots=True)
class Landed:
    """The conditional write is in place; ``version`` is the condition for the next one."""

    version: str


@dataclass(frozen=True, slots=True)
class Lost:
    """The condition did not hold, as far as the store says. It can still be our own write, seen twice."""

    detail: str = ""


@dataclass(frozen=True, slots=True)
class Unknown:
    """No usable answer: the write may have landed, may land later, or never."""

    cause: Exception


Outcome = Landed | Lost | Unknown


@dataclass(frozen=True, slots=True)
class Versioned:
    """A small object's bytes and the version of exactly these bytes, from one request."""

    body: bytes
    version: str


@dataclass(frozen=True, slots=True)
class Listed:
    """One key, relative to the root, and its size in bytes."""

    key: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Attested:
    """What a store says of an object: its size in bytes and, where it keeps one, the CRC-32C of all of it."""

    size_bytes: int
    crc32c: int | None


@dataclass(frozen=True, slots=True)
class Part:
    """A range of a payload object, in memory.

    Attributes:
        views: its bytes, laid end to end; the tensors' own memory or a staged copy of it.
        crc32c: the CRC-32C of these bytes, as they were when they were first looked at.
    """

    views: tuple[memoryview, ...]
    crc32c: int

    @property
    def size_bytes(self) -> int:
        """Bytes in all views together."""
        return sum(view.nbytes for view in self.views)


@runtime_checkable
class Source(Protocol):
    """A payload object's bytes that can be had by range, from several threads, without a copy.

    Iterating it gives all of its bytes in order, in buffers that are good until the next one is asked for. A storage
    that sends parts side by side holds ranges instead: a held range stays as it is until it is let go, so it can be
    sent again.
    """

    @property
    def size_bytes(self) -> int:
        """The whole object's size in bytes."""
        ...

    @property
    def together_bytes(self) -> int:
        """How much is sent at the same time, this object included, in bytes: what the connections are shared by."""
        ...

    def hold(self, start: int, length: int) -> AbstractContextManager[Part]:
        """``length`` bytes from ``start``. May wait until memory is free or the bytes are staged.

        Raises:
            SaveError: the bytes changed while they were being saved.
        """
        ...

    def stopping(self, act: Callable[[], None]) -> AbstractContextManager[None]:
        """While the block runs, ``act`` is called as soon as nothing more is to be sent, by the thread that says so.

        From then on ``hold`` raises; this is for a transfer that can be broken off in mid-part (the direct lanes).
        """
        ...

    def __iter__(self) -> Iterator[memoryview]:
        """All bytes in order."""
        ...


@runtime_checkable
class Storage(Protocol):
    """The objects under one root. Keys are relative, ``/``-separated, and never start with a slash.

    Every verb is safe to call from several threads. Errors are ``StorageError`` (``retryable`` set where
    waiting helps) or its subclass ``ObjectNotFoundError`` where the store *proved* that bytes do not exist.
    Reading verbs, ``put`` and ``delete`` may be retried by a wrapper; ``create`` and ``replace`` never are,
    because only ``transact`` knows what an unknown answer means.

    Attributes:
        conditions: what is known of ``create`` and ``replace``; a probe writes down here what it found.
    """

    conditions: Conditions

    @property
    def url(self) -> str:
        """The root in canonical form, without a trailing slash and without secrets."""
        ...

    def read(self, key: str, *, limit_bytes: int) -> Versioned:
        """The whole of a small object and its version, from one request, never from a cache.

        Raises:
            ObjectNotFoundError: there is no such object.
            StorageError: the store refused, or the object is larger than ``limit_bytes``.
        """
        ...

    def create(self, key: str, body: bytes) -> Outcome:
        """Write a small object if, and only if, nothing has this key. Durable once ``Landed``."""
        ...

    def replace(self, key: str, body: bytes, *, expecting: str) -> Outcome:
        """Replace a small object if, and only if, its version is still ``expecting``. Durable once ``Landed``."""
        ...

    def put(
        self, key: str, buffers: Iterable[Buffer], *, size_bytes: int, progress: Callable[[int], None] | None = None
    ) -> None:
        """Write one payload object from buffers laid end to end: all of it becomes visible, or nothing.

        The key belongs to one save alone, so there is no condition; repeating a put with the same bytes is
        harmless. ``buffers`` is consumed once and in order; of a ``Source`` ranges may be taken instead, in any order
        and several at once. ``progress`` is called with the number of further bytes handed over, by one thread at a
        time. Durable on return. An exit before the last buffer, ``KeyboardInterrupt`` included, leaves nothing
        visible; after a later error the whole object may be there.

        Raises:
            StorageError: the store refused, or the buffers do not add up to ``size_bytes``.
            BaseException: whatever ``buffers`` or ``progress`` raised, as it was.
        """
        ...

    def read_into(self, key: str, start: int, *targets: memoryview) -> None:
        """Fill ``targets`` (writable, contiguous bytes), one after the other, from byte ``start`` of an object.

        One request, however many targets there are. After an error they may hold anything.

        Raises:
            ObjectNotFoundError: there is no such object, or it ends before the last target is full.
        """
        ...

    def size(self, key: str) -> int:
        """An object's size in bytes, without reading it.

        Raises:
            ObjectNotFoundError: there is no such object.
        """
        ...

    def list(self, prefix: str = "", *, limit: int | None = None) -> Iterator[Listed]:
        """Every object whose key starts with ``prefix``, never from a cache, at most ``limit`` of them."""
        ...

    def delete(self, keys: Iterable[str]) -> dict[str, StorageError]:
        """Delete objects in bulk. What was already gone counts as deleted.

        Returns:
            the keys that are *not* known to be gone, each with its reason; empty when all are.
        """
        ...

    def abort_uploads(self, prefix: str, *, spare: Callable[[str], bool] = lambda _: False) -> int:
        """Abort unfinished multipart uploads whose key starts with ``prefix``; returns how many.

        Args:
            spare: asked for the key of each, once all of them have been listed: what it learns then about a key is
                newer than the upload. True leaves the upload alone.
        """
        ...

    def close(self) -> None:
        """Give back connections and threads. Idempotent."""
        ...


@runtime_checkable
class Attesting(Protocol):
    """A storage whose store keeps checksums of objects, and tells them without the objects' bytes."""

    def attest(self, key: str) -> Attested:
        """An object's size and checksum, in one request, without reading it.

        Raises:
            ObjectNotFoundError: there is no such object.
        """
        ...


@runtime_checkable
class Paced(Protocol):
    """A storage that knows how many reads are worth having at once."""

    @property
    def reads_at_once(self) -> int | None:
        """More of them would only take turns; None if nobody knows."""
        ...


@runtime_checkable
class Connecting(Protocol):
    """A storage whose first request waits for more than an answer: a client library, a session, credentials, TLS."""

    def connect(self, key: str, *, limit_bytes: int) -> None:
        """Begin, in the background, to read a small object, and drop it: what comes later finds everything made.

        Returns at once. What goes wrong is told by the first request that somebody waits for.
        """
        ...


@runtime_checkable
class Described(Protocol):
    """A storage that can say more about itself to a person than its URL."""

    def describe(self) -> dict[str, str]:
        """Facts by name: endpoint, identity, the lane that payload takes, what is not promised. No secrets.

        Raises:
            StorageError: there are no credentials, or they could not be fetched.
            ConfigError: the filesystem does not take the options it was given.
        """
        ...


@runtime_checkable
class Copying(Protocol):
    """A storage whose store copies objects by itself: their bytes do not pass through this process."""

    def copy_from(self, source: Storage, source_key: str, key: str, *, size_bytes: int, checksum: int) -> bool:
        """Copy one payload object from another root; durable on return.

        Args:
            source: the other root's storage.
            checksum: the CRC-32C of the object.

        Returns:
            False if the two are not on one store, or the store will not do it: then the bytes have to be carried.

        Raises:
            StorageError: the store failed on the way, or other bytes arrived (and were taken away again).
        """
        ...


@runtime_checkable
class Governed(Protocol):
    """A storage whose store may delete objects by rules of its own."""

    def lifecycle_dangers(self) -> Sequence[str]:
        """What its rules would do to live objects of this root, a sentence each; empty if nothing.

        Raises:
            StorageError: the rules may not be looked at.
        """
        ...


def scatter(body: Buffer, targets: Sequence[memoryview]) -> None:
    """Copy bytes into targets, one after the other. For whoever got the bytes in one piece."""
    view, at = memoryview(body), 0
    for target in targets:
        target[:] = view[at : at + len(target)]
        at += len(target)
