"""Ranges of stored objects into local files: side by side, each proven, and only those that are not there yet."""

from __future__ import annotations

import contextlib
import os
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import crc32c

from cloudckpt.core.checksum import format_crc32c
from cloudckpt.errors import CorruptCheckpointError, ObjectNotFoundError, StorageError
from cloudckpt.progress import Meter
from cloudckpt.storage import ManifestStore, Paced
from cloudckpt.storage.local_errors import mapped

__all__ = ["Bringing", "LocalFile", "Piece"]

#: One request brings about this much; a piece that is larger comes in several.
_READ_BYTES = 16 * 1024 * 1024

#: How often bytes are asked for. Wrong twice in the same way is damage; wrong otherwise each time, something between.
_LOOKS = 3


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes of an object that can be proven alone.

    Attributes:
        key: the object.
        start: the first of them.
        length: how many.
        crc32c: their checksum.
        runs: (byte of the local file, length) where they go, in order.
    """

    key: str
    start: int
    length: int
    crc32c: int
    runs: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalFile:
    """A local file to be made. ``head`` are bytes that do not come from the store."""

    name: str
    size_bytes: int
    pieces: tuple[Piece, ...]
    head: bytes = b""


class Bringing:
    """The pieces of some files, from the store or proven where they lie."""

    def __init__(
        self, store: ManifestStore, folder: Path, files: Sequence[LocalFile], meter: Meter | None = None
    ) -> None:
        self._store = store
        self._folder = folder
        self._files = files
        self._meter = meter or Meter("bringing")
        self._mutex = threading.Lock()
        self._stopped = threading.Event()
        self.read_bytes = 0

    def run(self) -> None:
        """Bring everything; every file is complete, proven and durable when it returns."""
        self._meter.expect_further(sum(piece.length for file in self._files for piece in file.pieces))
        jobs = [
            (file, path, fresh, batch)
            for file in self._files
            for path, fresh in [self._made(file)]
            for batch in _batches(file.pieces)
        ]
        storage = self._store.storage
        threads = (storage.reads_at_once if isinstance(storage, Paced) else None) or self._store.settings.io_threads
        pool = ThreadPoolExecutor(max(1, min(threads, len(jobs))), thread_name_prefix="cloudckpt-pull")
        try:
            running = [pool.submit(self._bring, path, batch, fresh=fresh) for _, path, fresh, batch in jobs]
            wait(running, return_when=FIRST_EXCEPTION)
        finally:
            # Whatever ends this, a Ctrl-C too: what is under way ends at its next request, and what came stays.
            self._stopped.set()
            pool.shutdown(cancel_futures=True)
        errors = [e for f in running if not f.cancelled() and (e := f.exception()) is not None]
        # What is no proof of damage comes first.
        for error in sorted(errors, key=lambda e: isinstance(e, CorruptCheckpointError)):
            raise error
        for file in self._files:
            with mapped(self._folder / file.name), (self._folder / file.name).open("rb") as opened:
                os.fsync(opened.fileno())

    def _made(self, file: LocalFile) -> tuple[Path, bool]:
        """The file at its full size with its head in place, and whether there was none before."""
        path = self._folder / file.name
        with mapped(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
        fresh = True
        with mapped(path), contextlib.ExitStack() as stack:
            try:
                # Never "w": a second pull that comes at the same moment must not empty the file of the first.
                opened = stack.enter_context(path.open("x+b"))
            except FileExistsError:
                opened, fresh = stack.enter_context(path.open("r+b")), False
            opened.truncate(file.size_bytes)
            opened.write(file.head)
        return path, fresh

    def _bring(self, path: Path, batch: Sequence[Piece], *, fresh: bool) -> None:
        if self._stopped.is_set():
            return
        missing = [*batch] if fresh else [piece for piece in batch if not _is_there(path, piece)]
        self._advance(sum(piece.length for piece in batch) - sum(piece.length for piece in missing), read=0)
        for group in _batches(missing):
            before: tuple[Piece, int] | None = None
            for _ in range(_LOOKS):
                if self._stopped.is_set():
                    return
                wrong = self._fetch(path, group)
                if wrong is None:
                    break
                if wrong == before:
                    raise self._damaged(*wrong)
                before = wrong
            else:
                raise self._unsteady(group)
            length = sum(piece.length for piece in group)
            self._advance(length, read=length)

    def _fetch(self, path: Path, group: Sequence[Piece]) -> tuple[Piece, int] | None:
        """Bring neighbouring pieces; gives the first that does not have its checksum, and what it has instead."""
        if len(group) == 1 and group[0].length > _READ_BYTES:
            return self._fetch_large(path, group[0])
        buffer = memoryview(bytearray(sum(piece.length for piece in group)))
        self._read(group[0].key, group[0].start, buffer)
        at = 0
        with mapped(path), path.open("r+b", buffering=0) as file:
            for piece in group:
                body = buffer[at : at + piece.length]
                at += piece.length
                if (found := crc32c.crc32c(body)) != piece.crc32c:
                    return piece, found
                for start, part in _spread(deque(piece.runs), body):
                    file.seek(start)
                    _write_all(file.fileno(), part)
        return None

    def _fetch_large(self, path: Path, piece: Piece) -> tuple[Piece, int] | None:
        """In several requests: proven at the end, and again before it is taken for complete by any later pull."""
        found = 0
        buffer = memoryview(bytearray(_READ_BYTES))
        runs = deque(piece.runs)
        with mapped(path), path.open("r+b", buffering=0) as file:
            for offset in range(0, piece.length, _READ_BYTES):
                if self._stopped.is_set():
                    return None
                body = buffer[: min(_READ_BYTES, piece.length - offset)]
                self._read(piece.key, piece.start + offset, body)
                found = crc32c.crc32c(body, found)
                for start, part in _spread(runs, body):
                    file.seek(start)
                    _write_all(file.fileno(), part)
        return None if found == piece.crc32c else (piece, found)

    def _read(self, key: str, start: int, target: memoryview) -> None:
        try:
            with self._meter.carrying(key):
                self._store.storage.read_into(key, start, target)
        except ObjectNotFoundError as exc:
            raise CorruptCheckpointError(str(exc), key=key) from exc

    def _damaged(self, piece: Piece, found: int) -> CorruptCheckpointError:
        return CorruptCheckpointError(
            f"{self._store.storage.url}/{piece.key} bytes {piece.start}..{piece.start + piece.length}: checksum "
            f"{format_crc32c(found)}, sealed as {format_crc32c(piece.crc32c)}. Pull another checkpoint, and look at "
            f"the run: cloudckpt verify {self._store.storage.url} --deep",
            key=piece.key,
        )

    def _unsteady(self, group: Sequence[Piece]) -> StorageError:
        first, last = group[0], group[-1]
        return StorageError(
            f"{self._store.storage.url}/{first.key} bytes {first.start}..{last.start + last.length}: the same range "
            f"was read {_LOOKS} times, and other bytes came each time. Something between the store and this process "
            "changes them (memory, a proxy, a network card); nothing is known to be wrong with what is stored",
            retryable=True,
        )

    def _advance(self, done: int, *, read: int) -> None:
        with self._mutex:
            self.read_bytes += read
        self._meter.advance(done)


def _batches(pieces: Sequence[Piece]) -> Iterator[list[Piece]]:
    """Neighbours together, as many as one request brings."""
    batch: list[Piece] = []
    size = 0
    for piece in pieces:
        last = batch[-1] if batch else None
        follows = last is not None and last.key == piece.key and last.start + last.length == piece.start
        if batch and not (follows and size + piece.length <= _READ_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(piece)
        size += piece.length
    if batch:
        yield batch


def _spread(runs: deque[tuple[int, int]], body: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Where the next bytes go in the file; what is left of the runs stays."""
    while body:
        start, length = runs.popleft()
        count = min(length, len(body))
        if count < length:
            runs.appendleft((start + count, length - count))
        yield start, body[:count]
        body = body[count:]


def _is_there(path: Path, piece: Piece) -> bool:
    """Whether the file has these bytes already."""
    found = 0
    with mapped(path), path.open("rb", buffering=0) as file:
        for start, length in piece.runs:
            file.seek(start)
            left = length
            while left:
                part = file.read(min(left, _READ_BYTES))
                if not part:
                    return False
                found = crc32c.crc32c(part, found)
                left -= len(part)
    return bool(found == piece.crc32c)


def _write_all(descriptor: int, body: memoryview) -> None:
    while body:
        body = body[os.write(descriptor, body) :]
