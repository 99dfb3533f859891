"""A checkpoint from the store into a local folder that other programs read: verified, side by side, resumable.

What is under way lies in a hidden folder beside the final one, which gets its name at the very end. Nothing keeps a
record of how far a pull came: every range has a checksum in the index, so the next pull looks at the bytes that are
there, keeps those that are right, whoever brought them, and asks the store for the others only.

(Past 350 lines: what is brought, how, and when it counts as there are one story.)
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from pathlib import Path

import crc32c

from cloudckpt.core import keys
from cloudckpt.core.checksum import format_crc32c
from cloudckpt.core.model import Checkpoint, Index, State
from cloudckpt.core.text import format_bytes
from cloudckpt.core.whole import WholeFile, as_they_are, plan_whole
from cloudckpt.core.wire import canonical
from cloudckpt.errors import (
    CheckpointNotFoundError,
    ConfigError,
    CorruptCheckpointError,
    ObjectNotFoundError,
    StorageError,
)
from cloudckpt.storage import ManifestStore, Paced, Storage
from cloudckpt.storage.local_errors import mapped
from cloudckpt.storage.pulled import PULLED_NAME, pulled_note, read_note
from cloudckpt.view import RunView, read_index, read_index_body

__all__ = ["Pulled", "pull_checkpoint", "write_component"]

#: One request brings about this much; a piece that is larger comes in several.
_READ_BYTES = 16 * 1024 * 1024

#: Bytes that do not have their checksum are asked for once more before they count as damaged.
_TRIES = 2

#: In the note's entry: the components that were pulled, where these are not all.
_SCOPE = "pulled_components"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pulled:
    """What a pull brought.

    Attributes:
        checkpoint: which one.
        folder: where it lies now.
        files: its files' names.
        size_bytes: all of them together.
        read_bytes: what came from the store; the rest was there already, and is proven as well.
        opaque: tensors whose dtype safetensors cannot name: they are plain bytes (U8) in the files.
    """

    checkpoint: Checkpoint
    folder: Path
    files: tuple[str, ...]
    size_bytes: int
    read_bytes: int
    opaque: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Piece:
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
class _File:
    """A local file to be made. ``head`` are bytes that do not come from the store."""

    name: str
    size_bytes: int
    pieces: tuple[_Piece, ...]
    head: bytes = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Recipe:
    files: tuple[_File, ...]
    small: dict[str, bytes] = field(default_factory=dict)
    opaque: tuple[str, ...] = ()

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files) + sum(map(len, self.small.values()))


def pull_checkpoint(
    store: ManifestStore,
    select: str | int,
    into: str | os.PathLike[str],
    *,
    components: Collection[str] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,  # noqa: ARG005 - the shape of a progress
) -> Pulled:
    """Bring one checkpoint into ``into/checkpoint-<step>``.

    All of it: the payload objects and the index as they are, which ``cloudckpt.open`` reads, and
    ``model.safetensors.index.json`` where ``from_pretrained`` can read the model's objects by it. Or components, each as
    one safetensors file with whole tensors, ``model.safetensors``.

    A pull that was broken off, in whatever way, is gone on with by the next one. A folder that was pulled before is
    proven, and mended where it is damaged.

    Args:
        select: ``latest``, ``best``, a step, ``tag:NAME`` or a save id.
        into: the folder above; made if need be.
        components: only the tensors of these.
        progress: told of bytes done and of all, from any thread.

    Raises:
        CheckpointNotFoundError: nothing matches, or it was retired while it was being pulled.
        ConfigError: no such component, or something else is in the place of the folder.
        CorruptCheckpointError: bytes on the store are not what was sealed; names the object and the range.
        StorageError: the store, or the local disk, refused.
    """
    view = RunView(store)
    checkpoint = view.select(select)
    with _retired_meanwhile(store, checkpoint):
        return _pull(store, checkpoint, Path(into), _checked(components), progress)


def _checked(components: Collection[str] | None) -> tuple[str, ...] | None:
    if isinstance(components, str):
        raise ConfigError(f"components={components!r}: expected a list, write [{components!r}]")
    return None if components is None else tuple(dict.fromkeys(components))


def _pull(
    store: ManifestStore,
    checkpoint: Checkpoint,
    into: Path,
    components: tuple[str, ...] | None,
    progress: Callable[[int, int], None],
) -> Pulled:
    index = read_index(store.storage, checkpoint)
    noted = checkpoint
    if components is None:
        recipe = _mirror(store.storage, checkpoint, index)
    else:
        recipe = _wholes(checkpoint, index, components)
        noted = replace(checkpoint, extra={**checkpoint.extra, _SCOPE: sorted(components)})
    final = into / f"checkpoint-{checkpoint.step}"
    place = _place(final, noted)
    with mapped(place):
        place.mkdir(parents=True, exist_ok=True)
        _check_room(place, recipe)
    bringing = _Bringing(store, place, recipe, progress)
    bringing.run()
    for name, body in {**recipe.small, PULLED_NAME: pulled_note(noted)}.items():
        _write_small(place / name, body)
    if place != final:
        with mapped(final):
            _sync_folder(place)
            os.replace(place, final)  # noqa: PTH105 - the call whose atomicity this stands on, by its own name
            _sync_folder(into)
    return Pulled(
        checkpoint=checkpoint,
        folder=final,
        files=(*(file.name for file in recipe.files), *recipe.small, PULLED_NAME),
        size_bytes=recipe.size_bytes,
        read_bytes=bringing.read_bytes,
        opaque=recipe.opaque,
    )


def _place(final: Path, noted: Checkpoint) -> Path:
    """Where the bytes go first: beside the final folder; or into it, where the same was pulled before.

    Raises:
        ConfigError: something else is there.
    """
    scope = noted.extra.get(_SCOPE)
    if not os.path.lexists(final):
        words = "" if scope is None else "." + "+".join(keys.payload_name(c, 0, 1).split("-00000")[0] for c in scope)
        return final.parent / f".{final.name}.{noted.id}{words[:150]}.partial"
    try:
        found = read_note((final / PULLED_NAME).read_bytes())
    except OSError:
        found = None
    if found is not None and (found.id, found.index_digest, found.extra.get(_SCOPE)) == (
        noted.id,
        noted.index_digest,
        scope,
    ):
        return final
    what = "something that was not pulled" if found is None else f"{found.name}"
    if found is not None and found.id == noted.id:
        what = "other components of the same checkpoint" if found.extra.get(_SCOPE) else "all of this checkpoint"
    raise ConfigError(f"{final} is there and holds {what}: move it away, or pull into another folder")


def _mirror(storage: Storage, checkpoint: Checkpoint, index: Index) -> _Recipe:
    """The folder as it is on the store."""
    files = []
    for item in index.objects:
        key = keys.payload_key(checkpoint.step, checkpoint.id, item.name)
        spans = [(0, item.size_bytes, item.crc32c)]
        if item.cells is not None:
            size = item.cells.size_bytes
            spans = [
                (start, min(size, item.size_bytes - start), value)
                for start, value in zip(range(0, item.size_bytes, size), item.cells.crc32c, strict=True)
            ]
        pieces = (_Piece(key, start, length, value, ((start, length),)) for start, length, value in spans if length)
        files.append(_File(name=item.name, size_bytes=item.size_bytes, pieces=tuple(pieces)))
    small: dict[str, bytes] = {}
    found = as_they_are(index, "model")
    if found is not None:
        small["model.safetensors.index.json"] = canonical(found, readable=True)
    # The index comes last: a folder without it is none that was pulled.
    small[keys.INDEX_NAME] = read_index_body(storage, checkpoint)
    return _Recipe(files=tuple(files), small=small)


def _wholes(checkpoint: Checkpoint, index: Index, components: Sequence[str]) -> _Recipe:
    """Each component as one file with whole tensors."""
    made = [whole for component in components for whole in plan_whole(index, component)]
    return _Recipe(
        files=tuple(_file(checkpoint, whole) for whole in made),
        opaque=tuple(name for whole in made for name in whole.opaque),
    )


def _file(checkpoint: Checkpoint, whole: WholeFile) -> _File:
    pieces = (
        _Piece(
            keys.payload_key(checkpoint.step, checkpoint.id, move.chunk.object),
            move.chunk.start,
            move.chunk.length,
            move.chunk.crc32c,
            move.runs,
        )
        for move in whole.moves
    )
    return _File(name=whole.name, size_bytes=whole.size_bytes, pieces=tuple(pieces), head=whole.header)


def write_component(
    store: ManifestStore,
    checkpoint: Checkpoint,
    component: str,
    folder: Path,
    *,
    most_bytes: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,  # noqa: ARG005 - the shape of a progress
) -> tuple[str, ...]:
    """Write a component as safetensors files with whole tensors into a folder that is there; gives their names.

    Raises:
        ConfigError: no such component.
        CorruptCheckpointError: bytes on the store are not what was sealed.
        StorageError: the store, or the local disk, refused.
    """
    with _retired_meanwhile(store, checkpoint):
        index = read_index(store.storage, checkpoint)
        whole = plan_whole(index, component, most_bytes=most_bytes)
        files = tuple(_file(checkpoint, file) for file in whole)
        _Bringing(store, folder, _Recipe(files=files), progress).run()
    return tuple(file.name for file in whole)


def _check_room(place: Path, recipe: _Recipe) -> None:
    """Fail before the first byte where the disk cannot hold it."""
    there = sum(getattr(path.stat(), "st_blocks", 0) * 512 for path in place.iterdir() if path.is_file())
    needed, free = recipe.size_bytes - there, shutil.disk_usage(place).free
    if needed > free:
        raise StorageError(f"{place.parent} has {format_bytes(free)} free, and {format_bytes(needed)} are to come")


class _Bringing:
    """The pieces of some files, from the store or proven where they lie."""

    def __init__(
        self, store: ManifestStore, folder: Path, recipe: _Recipe, progress: Callable[[int, int], None]
    ) -> None:
        self._store = store
        self._folder = folder
        self._recipe = recipe
        self._progress = progress
        self._total = sum(piece.length for file in recipe.files for piece in file.pieces)
        self._mutex = threading.Lock()
        self._done = 0
        self._stopped = threading.Event()
        self.read_bytes = 0

    def run(self) -> None:
        """Bring everything; every file is complete, proven and durable when it returns."""
        jobs = [
            (file, path, fresh, batch)
            for file in self._recipe.files
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
        for file in self._recipe.files:
            with mapped(self._folder / file.name), (self._folder / file.name).open("rb") as opened:
                os.fsync(opened.fileno())

    def _made(self, file: _File) -> tuple[Path, bool]:
        """The file at its full size with its head in place, and whether there was none before."""
        path = self._folder / file.name
        with mapped(path):
            fresh = not path.exists()
            with path.open("w+b" if fresh else "r+b") as opened:
                opened.truncate(file.size_bytes)
                if file.head:
                    opened.write(file.head)
        return path, fresh

    def _bring(self, path: Path, batch: Sequence[_Piece], *, fresh: bool) -> None:
        if self._stopped.is_set():
            return
        missing = [*batch] if fresh else [piece for piece in batch if not _is_there(path, piece)]
        self._advance(sum(piece.length for piece in batch) - sum(piece.length for piece in missing), read=0)
        for group in _batches(missing):
            for attempt in range(_TRIES):
                if self._stopped.is_set():
                    return
                wrong = self._fetch(path, group)
                if wrong is None:
                    break
                if attempt == _TRIES - 1:
                    raise self._damaged(*wrong)
            length = sum(piece.length for piece in group)
            self._advance(length, read=length)

    def _fetch(self, path: Path, group: Sequence[_Piece]) -> tuple[_Piece, int] | None:
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

    def _fetch_large(self, path: Path, piece: _Piece) -> tuple[_Piece, int] | None:
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
            self._store.storage.read_into(key, start, target)
        except ObjectNotFoundError as exc:
            raise CorruptCheckpointError(str(exc), key=key) from exc

    def _damaged(self, piece: _Piece, found: int) -> CorruptCheckpointError:
        return CorruptCheckpointError(
            f"{self._store.storage.url}/{piece.key} bytes {piece.start}..{piece.start + piece.length}: checksum "
            f"{format_crc32c(found)}, sealed as {format_crc32c(piece.crc32c)}. Pull another checkpoint, and look at the "
            f"run: cloudckpt verify {self._store.storage.url} --deep",
            key=piece.key,
        )

    def _advance(self, done: int, *, read: int) -> None:
        with self._mutex:
            self._done += done
            self.read_bytes += read
            self._progress(self._done, self._total)


def _batches(pieces: Sequence[_Piece]) -> Iterator[list[_Piece]]:
    """Neighbours together, as many as one request brings."""
    batch: list[_Piece] = []
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


def _is_there(path: Path, piece: _Piece) -> bool:
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


def _write_small(path: Path, body: bytes) -> None:
    """A small file, whole or not there."""
    temporary = path.with_name(f".{path.name}.tmp")
    with mapped(path):
        with temporary.open("wb") as file:
            file.write(body)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)  # noqa: PTH105 - the call whose atomicity this stands on, by its own name


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # Windows has no handle of a folder to flush
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _retired_meanwhile(store: ManifestStore, checkpoint: Checkpoint) -> Iterator[None]:
    """Tell bytes that are gone because the run let them go from damage."""
    try:
        yield
    except CorruptCheckpointError as exc:
        manifest = store.read()
        now = manifest.find(checkpoint.id) if manifest else None
        if now is None or now.state is not State.COMMITTED:
            raise CheckpointNotFoundError(
                f"{checkpoint.url} was retired while it was being read: choose another, or pin it first"
            ) from exc
        raise
