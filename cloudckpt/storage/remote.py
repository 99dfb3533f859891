"""What the two object stores have in common: keys in a bucket, a filesystem per process, requests that end."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gc
import os
import threading
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, TypeVar

from cloudckpt.config import Settings
from cloudckpt.errors import ObjectNotFoundError, StorageError
from cloudckpt.storage.base import Buffer, Versioned
from cloudckpt.storage.loop import Loop, LoopClosed, Running
from cloudckpt.storage.redacting import Redactor
from cloudckpt.storage.retry import Backoff, given_up

__all__ = ["RemoteStorage", "crc32c_b64", "crc32c_of", "each", "parts_of"]

_T = TypeVar("_T")

#: Bytes a second: a part of 16 MiB may take two minutes more than a small request.
_SLOWEST_LINE = 128 * 1024
#: How long credentials that are refused are read again, in seconds: whoever renews them may be late by a moment.
_RENEWAL_S = 15.0


@dataclass(slots=True)
class _Filesystems:
    """The filesystem in use, and those whose credentials were found expired: other requests may still use them."""

    current: Any = None
    outdated: list[Any] = field(default_factory=list)
    #: Held while a session is being made: two requests that come first would make two.
    opening: asyncio.Lock = field(default_factory=asyncio.Lock)


class RemoteStorage(ABC):
    """A loop and a filesystem instance, made at the first request and again in a forked child.

    A filesystem that was inherited over a fork shares sockets with the parent, and fsspec refuses it; a new one
    works. The instance is never the one fsspec caches: its listings and its sessions belong to somebody else.

    Args:
        bucket: its name.
        prefix: the keys' beginning, without slashes around it; may be empty.
        options: for the filesystem, as they are.
        settings: part sizes, time-outs and deadlines.
    """

    scheme: ClassVar[str]

    def __init__(self, bucket: str, prefix: str, options: Mapping[str, object], settings: Settings) -> None:
        self._bucket = bucket
        self._prefix = f"{prefix}/" if prefix else ""
        self._options = dict(options)
        #: What the store says passes through it before anybody is told.
        self._secrets = Redactor(options)
        self._settings = settings
        self._mutex = threading.Lock()
        self._loop: Loop | None = None
        # One set for each loop: a session belongs to the loop that it was made on.
        self._sets: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Filesystems] = weakref.WeakKeyDictionary()
        self._pid = os.getpid()
        # When the store first refused credentials that have not worked since.
        self._refused_at: float | None = None

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.url}>"

    @property
    def url(self) -> str:
        """The root as ``scheme://bucket/prefix``."""
        return f"{self.scheme}://{self._bucket}/{self._prefix}".rstrip("/")

    def _key(self, key: str) -> str:
        if not {"", ".", ".."}.isdisjoint(key.split("/")):
            raise StorageError(f"{key!r} is not a key under {self.url}")
        return self._prefix + key

    def _named(self, doing: str, key: str) -> str:
        return f"{doing} {self.scheme}://{self._bucket}/{self._prefix}{key}"

    def _redacted(self, problem: StorageError, cause: BaseException | None = None) -> StorageError:
        """An error of ours, without the secrets that the store or a library put into it or its cause."""
        if cause is not None:
            self._secrets.clean(cause)
        self._secrets.clean(problem)
        return problem

    # -- the filesystem and its loop -------------------------------------------------------------------------

    @abstractmethod
    def _make_filesystem(self, loop: asyncio.AbstractEventLoop) -> Any:
        """A new filesystem instance for this loop; sends nothing."""

    @staticmethod
    @abstractmethod
    async def _close_filesystem(filesystem: Any) -> None:
        """Give back the connections of a filesystem."""

    def _running(self) -> Loop:
        if self._pid != os.getpid():
            # The parent's thread does not exist here, its sockets are the parent's, and a thread that held the mutex
            # when the process was forked will never give it back.
            if self._loop is not None:
                self._loop.abandon()
            self._loop, self._mutex, self._pid = None, threading.Lock(), os.getpid()
        with self._mutex:
            if self._loop is None:
                filesystems = _Filesystems()
                clean_up = partial(_close_all, filesystems, self._close_filesystem)
                self._loop = Loop(f"cloudckpt-{type(self).__name__}", clean_up)
                self._sets[self._loop.asyncio] = filesystems
            return self._loop

    @property
    def _filesystems(self) -> _Filesystems:
        return self._sets[asyncio.get_running_loop()]

    async def _fs(self) -> Any:
        """The filesystem; only on the loop, so that no two are made."""
        if self._filesystems.current is None:
            self._filesystems.current = self._make_filesystem(asyncio.get_running_loop())
        return self._filesystems.current

    def _renew(self) -> None:
        """Let the next request read the credentials anew. On the loop only."""
        if self._filesystems.current is not None:
            self._filesystems.outdated.append(self._filesystems.current)
            self._filesystems.current = None

    def _gave_up_on_credentials(self) -> bool:
        """Whether reading the credentials again has not helped for so long that it will not."""
        now = time.monotonic()
        if self._refused_at is None:
            self._refused_at = now
        return now - self._refused_at > _RENEWAL_S

    def connect(self, key: str, *, limit_bytes: int) -> None:
        """See ``Connecting.connect``."""
        with contextlib.suppress(LoopClosed):
            Running(self._running(), lambda: self._warm_up(key, limit_bytes)).begin()

    async def _warm_up(self, key: str, limit_bytes: int) -> None:
        try:
            await self._read(key, limit_bytes)
        finally:
            if gc.isenabled():
                # The client's library has made so many objects that the collector is due: it walks all that there is,
                # now or in the middle of the first save.
                gc.collect()

    def _run(self, work: Coroutine[Any, Any, _T]) -> _T:
        while True:
            with contextlib.suppress(LoopClosed):  # somebody closed the storage this moment; it opens again
                return self._running().run(work)

    async def _in_time(self, what: str, work: Awaitable[_T], *, size_bytes: int = 0) -> _T:
        """One request, under one time-out of ours over everything the libraries below do.

        A body of ``size_bytes`` may take longer than a small answer, at a rate that no usable line is below.
        """
        limit = self._settings.request_timeout_s + size_bytes / _SLOWEST_LINE
        try:
            async with asyncio.timeout(limit):
                return await work
        except TimeoutError as exc:
            raise StorageError(f"{what}: no answer within {limit:g} s", retryable=True) from exc

    async def _again(self, attempt: Callable[[], Awaitable[_T]]) -> _T:
        """Try until the store takes it, while it says that waiting may help and the deadline is not over."""
        backoff = Backoff(
            deadline_s=self._settings.storage_deadline_s,
            base_s=self._settings.retry_base_s,
            cap_s=self._settings.retry_cap_s,
        )
        pauses = backoff.pauses()
        tries = 0
        while True:
            try:
                tries += 1
                return await attempt()
            except StorageError as exc:
                if not exc.retryable:
                    raise
                pause = next(pauses, None)
                if pause is None:
                    raise given_up(exc, tries, backoff.deadline_s) from exc
            await asyncio.sleep(pause)

    # -- small objects ---------------------------------------------------------------------------------------

    def read(self, key: str, *, limit_bytes: int) -> Versioned:
        """See ``Storage.read``."""
        return self._run(self._read(key, limit_bytes))

    @abstractmethod
    async def _read(self, key: str, limit_bytes: int) -> Versioned:
        """As ``read``."""

    # -- payload ---------------------------------------------------------------------------------------------

    def put(
        self, key: str, buffers: Iterable[Buffer], *, size_bytes: int, progress: Callable[[int], None] | None = None
    ) -> None:
        """See ``Storage.put``: one request for what fits into a part, else an upload in parts that any exit aborts."""
        parts = parts_of(buffers, self._part_bytes(size_bytes))
        told = progress or (lambda _: None)
        if size_bytes > self._part_bytes(size_bytes):
            self._put_parts(key, parts, size_bytes, told)
            return
        body = next(parts)
        if len(body) != size_bytes or next(parts, None) is not None:
            raise self._does_not_add_up(key, len(body), size_bytes)
        told(size_bytes)
        whole = bytes(body)
        self._run(self._again(lambda: self._send_whole(key, whole)))

    @abstractmethod
    def _part_bytes(self, size_bytes: int) -> int:
        """How large the parts of an object of this size are."""

    @abstractmethod
    async def _send_whole(self, key: str, body: bytes) -> None:
        """Write an object in one request."""

    @abstractmethod
    def _put_parts(
        self, key: str, parts: Iterator[bytearray], size_bytes: int, progress: Callable[[int], None]
    ) -> None:
        """Write an object of more than one part."""

    def _does_not_add_up(self, key: str, found: int, size_bytes: int) -> StorageError:
        more = "at least " if found >= size_bytes else ""
        return StorageError(f"{self._named('writing', key)}: {more}{found} bytes came, {size_bytes} were announced")

    def read_into(self, key: str, start: int, *targets: memoryview) -> None:
        """See ``Storage.read_into``: one ranged GET."""
        if any(map(len, targets)):
            self._run(self._read_into(key, start, targets))
        elif start > self.size(key):
            raise self._no_such_range(key, start, 0)

    @abstractmethod
    async def _read_into(self, key: str, start: int, targets: Sequence[memoryview]) -> None:
        """As ``read_into``, for a range that is not empty."""

    @abstractmethod
    def size(self, key: str) -> int:
        """See ``Storage.size``."""

    def _no_such_range(self, key: str, start: int, length: int) -> ObjectNotFoundError:
        return ObjectNotFoundError(f"{self._named('reading', key)}: bytes {start}..{start + length} do not exist")

    # -- the end ---------------------------------------------------------------------------------------------

    def close(self) -> None:
        """See ``Storage.close``; a closed storage opens again at its next request."""
        if self._pid != os.getpid():
            return  # the loop is the parent's
        with self._mutex:
            loop, self._loop = self._loop, None
        if loop is not None:
            loop.close()


async def _close_all(filesystems: _Filesystems, close: Callable[[Any], Awaitable[None]]) -> None:
    left = [found for found in (*filesystems.outdated, filesystems.current) if found is not None]
    filesystems.outdated, filesystems.current = [], None
    # Side by side: one that does not end keeps no other open.
    await asyncio.gather(*map(close, left), return_exceptions=True)


async def each(
    keys: Iterable[str], act: Callable[[str], Awaitable[object]], *, at_once: int = 8
) -> dict[str, StorageError]:
    """Do something to every key, some at a time; the keys where it failed. What is not there needs no doing."""
    some = asyncio.Semaphore(at_once)

    async def one(key: str) -> tuple[str, StorageError | None]:
        async with some:
            try:
                await act(key)
            except ObjectNotFoundError:
                return key, None
            except StorageError as exc:
                return key, exc
            return key, None

    done = await asyncio.gather(*(one(key) for key in keys))
    return {key: problem for key, problem in done if problem is not None}


def crc32c_b64(value: int) -> str:
    """A CRC-32C as both stores write it: base64 of its four bytes, big-endian."""
    return base64.b64encode(value.to_bytes(4, "big")).decode()


def crc32c_of(text: str) -> int | None:
    """The other way round; None for anything else, such as the sum of parts' sums that S3 keeps of some objects."""
    try:
        found = base64.b64decode(text, validate=True)
    except ValueError:
        return None
    return int.from_bytes(found, "big") if len(found) == 4 else None


def parts_of(buffers: Iterable[Buffer], part_bytes: int) -> Iterator[bytearray]:
    """The same bytes in parts of one size, the last one shorter (possibly empty only if there are no bytes at all).

    A copy each: the HTTP clients below take no views.
    """
    part = bytearray()
    for buffer in buffers:
        view = memoryview(buffer)
        if view.nbytes == 0:
            continue
        view = view.cast("B")
        while len(view):
            room = part_bytes - len(part)
            if room == 0:
                yield part
                part = bytearray()
                continue
            part += view[:room]
            view = view[room:]
    yield part
