"""Payload to a local disk at the disk's own speed: by range, several parts under way from the first moment on.

A source sums its bytes as it hands them out. So a few threads take parts in turn: while one sums, others write. They
write past the page cache (``O_DIRECT``), which saves the kernel's copy of every byte and leaves the memory to the
training; memory that is not aligned for it goes through one aligned buffer per thread. Where there is no such thing,
they write to the page cache, and tell the kernel after each part to begin with the disk, which it would otherwise
leave idle until the fsync. See ``docs/adr/0017-local-lane.md`` for what was measured.
"""

from __future__ import annotations

import errno
import functools
import mmap
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Self

from cloudckpt.errors import StorageError
from cloudckpt.storage.base import Source
from cloudckpt.storage.local_calls import allocate, bytes_of, move, start_write_back
from cloudckpt.storage.local_errors import mapped

__all__ = ["can_write_ranges", "write_source"]

#: One part: small, so that the threads overlap and progress moves; large, so that it is worth its system calls.
_PART_BYTES = 8 * 1024 * 1024

#: Threads of one object. Through the page cache a third would wait: the kernel lets one at a time into a file.
_DIRECT_THREADS = 4
_BUFFERED_THREADS = 2

#: A direct write is made of whole blocks; no disk has larger ones.
_BLOCK_BYTES = 4096

#: Memory that is not aligned is copied in pieces that the processor's own cache holds until the disk takes them.
_COPY_BYTES = 2 * 1024 * 1024

#: What a file system says that cannot write past the page cache, or not from this memory.
_NOT_DIRECT = {errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP}


def can_write_ranges() -> bool:
    """Whether this system can write many buffers at a place of their own (Windows cannot)."""
    return hasattr(os, "pwritev")


def write_source(
    descriptor: int,
    temporary: Path,
    source: Source,
    path: Path,
    *,
    progress: Callable[[int], None],
    direct_io: bool,
) -> None:
    """Write all of a source into the open, empty file ``temporary``. Not durable until it is fsynced.

    Args:
        path: what the file will be called, for errors.
        direct_io: past the page cache, as far as file system and memory allow.

    Raises:
        StorageError: the disk refused.
        BaseException: whatever ``source`` or ``progress`` raised, as it was.
    """
    with mapped(path):
        allocate(descriptor, source.size_bytes)
        direct = _open_direct(temporary, descriptor) if direct_io else None
    try:
        _Writing(source, path, progress, descriptor, direct).run()
    finally:
        if direct is not None:
            os.close(direct)


class _Writing:
    """One source on its way to disk: ranges are taken in order by a few threads, until the end or a failure."""

    def __init__(
        self, source: Source, path: Path, progress: Callable[[int], None], buffered: int, direct: int | None
    ) -> None:
        self._source = source
        self._path = path
        self._progress = progress
        self._buffered = buffered
        self._direct = direct
        self._starts = iter(range(0, source.size_bytes, _PART_BYTES))
        self._taking = threading.Lock()
        self._telling = threading.Lock()
        self._failure: BaseException | None = None

    def run(self) -> None:
        """Write everything, in this thread and its helpers; raises what the first of them failed with."""
        parts = -(-self._source.size_bytes // _PART_BYTES)
        wanted = _BUFFERED_THREADS if self._direct is None else _DIRECT_THREADS
        helpers = [
            threading.Thread(target=self._help, name="cloudckpt-write", daemon=True)
            for _ in range(min(parts, wanted) - 1)
        ]
        started: list[threading.Thread] = []
        try:
            with suppress(RuntimeError):  # no more threads in this process, or it is ending: one is enough
                for helper in helpers:
                    helper.start()
                    started.append(helper)
            self._write()
        except BaseException as exc:
            self._fail(exc)
            raise
        finally:
            self._join(started)
        if self._failure is not None:
            raise self._failure

    def _join(self, helpers: list[threading.Thread]) -> None:
        """Wait until nobody reads the source any more. A Ctrl-C ends the work first, and only a second one the wait."""
        try:
            for helper in helpers:
                helper.join()
        except BaseException as exc:
            self._fail(exc)
            for helper in helpers:
                helper.join()
            raise

    def _help(self) -> None:
        try:
            self._write()
        except BaseException as exc:  # noqa: BLE001 - raised by run, in the caller's thread
            self._fail(exc)

    def _fail(self, exc: BaseException) -> None:
        with self._taking:
            if self._failure is None:
                self._failure = exc

    def _take(self) -> int | None:
        with self._taking:
            return None if self._failure is not None else next(self._starts, None)

    def _write(self) -> None:
        with mapped(self._path):
            descriptors = _Descriptors(self._buffered, self._direct)
        with descriptors as file:
            while (start := self._take()) is not None:
                length = min(_PART_BYTES, self._source.size_bytes - start)
                with self._source.hold(start, length) as part:
                    views = bytes_of(part.views)
                    found = sum(map(len, views))
                    if found != length:
                        raise StorageError(f"{self._path}: of {length} bytes from {start} on, {found} came")
                    with mapped(self._path):
                        file.write(views, start)
                with self._telling:
                    self._progress(length)


class _Descriptors:
    """The file as one thread has it: through the page cache, and past it while the file system goes along.

    The descriptors are this thread's own: a second Ctrl-C ends the wait for a helper, whose numbers could by then
    belong to another file.
    """

    def __init__(self, buffered: int, direct: int | None) -> None:
        self._aligned: mmap.mmap | None = None
        self._buffered = os.dup(buffered)
        try:
            self._direct = None if direct is None else os.dup(direct)
        except OSError:
            os.close(self._buffered)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._buffered)
        self._forget_direct()

    def _forget_direct(self) -> None:
        if self._direct is not None:
            os.close(self._direct)
        self._direct = None

    def write(self, views: list[memoryview], start: int) -> None:
        """Write one part. Its end is the file's or a block's, so that direct and other writes share no page."""
        total = sum(map(len, views))
        done = self._write_direct(views, start, total - total % _BLOCK_BYTES)
        if done < total:
            rest = _between(views, done, total)
            if move(functools.partial(os.pwritev, self._buffered), rest, start + done) < total - done:
                raise OSError(errno.EIO, "the file system took nothing")
            start_write_back(self._buffered, start + done, total - done)

    def _write_direct(self, views: list[memoryview], start: int, length: int) -> int:
        """How many of the first ``length`` bytes went past the page cache."""
        if self._direct is None or not length:
            return 0
        whole = _between(views, 0, length)
        # The kernel knows best which memory will do; asking costs a few microseconds.
        for write in (self._write_views, self._write_copied):
            try:
                return write(self._direct, whole, start)
            except OSError as exc:
                if exc.errno not in _NOT_DIRECT:
                    raise
        self._forget_direct()
        return 0

    @staticmethod
    def _write_views(direct: int, views: list[memoryview], start: int) -> int:
        return move(functools.partial(os.pwritev, direct), views, start)

    def _write_copied(self, direct: int, views: list[memoryview], start: int) -> int:
        done = 0
        for piece in self._copied(views):
            count = self._write_views(direct, [piece], start + done)
            done += count
            if count < len(piece):
                break  # in the middle of a block, perhaps: the rest goes the other way
        return done

    def _copied(self, views: list[memoryview]) -> Iterator[memoryview]:
        """The same bytes, piece by piece, in memory that begins with a page; each is good until the next."""
        if self._aligned is None:
            self._aligned = mmap.mmap(-1, _COPY_BYTES)
        target, end = memoryview(self._aligned), 0
        for view in views:
            at = 0
            while at < len(view):
                count = min(len(view) - at, _COPY_BYTES - end)
                target[end : end + count] = view[at : at + count]
                at, end = at + count, end + count
                if end == _COPY_BYTES:
                    yield target
                    end = 0
        if end:
            yield target[:end]


def _between(views: list[memoryview], start: int, end: int) -> list[memoryview]:
    """Bytes ``start``..``end`` of the views laid end to end."""
    found = []
    for view in views:
        if start < len(view) and end > 0:
            found.append(view[max(start, 0) : end])
        start, end = start - len(view), end - len(view)
    return found


def _open_direct(temporary: Path, descriptor: int) -> int | None:
    """The same file once more, past the page cache; None where there is no such thing."""
    flag = getattr(os, "O_DIRECT", 0)
    if not flag:
        return None
    try:
        direct = os.open(temporary, os.O_WRONLY | os.O_NOFOLLOW | flag)
    except OSError:
        # No such thing here, or not twice: a file that its umask has made read-only can be opened for writing once.
        return None
    if os.path.sameopenfile(direct, descriptor):
        return direct
    os.close(direct)  # somebody has put another file there
    return None
