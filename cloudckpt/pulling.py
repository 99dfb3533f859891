"""A checkpoint from the store into a local folder that other programs read: verified, side by side, resumable.

What is under way lies in a hidden folder beside the final one, which gets its name at the very end. Nothing keeps a
record of how far a pull came: every range has a checksum in the index, so the next pull looks at the bytes that are
there, keeps those that are right, whoever brought them, and asks the store for the others only.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from cloudckpt.bringing import Bringing, LocalFile, Piece
from cloudckpt.core import keys
from cloudckpt.core.folder import stored_files
from cloudckpt.core.model import Checkpoint, Index, State, TensorEntry
from cloudckpt.core.text import format_bytes
from cloudckpt.core.whole import WholeFile, as_they_are, plan_whole
from cloudckpt.core.wire import canonical
from cloudckpt.errors import CheckpointNotFoundError, ConfigError, CorruptCheckpointError, FormatError, StorageError
from cloudckpt.progress import Meter
from cloudckpt.storage import ManifestStore
from cloudckpt.storage.local_errors import mapped
from cloudckpt.storage.pulled import PULLED_NAME, pulled_note, read_note
from cloudckpt.view import RunView, read_index, read_proven

__all__ = ["Pulled", "pull_checkpoint", "write_component"]

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
        read_bytes: what came from the store; the rest was there already, and is proven as well. 0 for a dry run.
        opaque: tensors whose dtype safetensors cannot name: they are plain bytes (U8) in the files.
    """

    checkpoint: Checkpoint
    folder: Path
    files: tuple[str, ...]
    size_bytes: int
    read_bytes: int
    opaque: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Recipe:
    files: tuple[LocalFile, ...]
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
    dry_run: bool = False,
    meter: Meter | None = None,
) -> Pulled:
    """Bring one checkpoint into ``into/checkpoint-<step>``.

    All of it: the payload objects and the index as they are, which ``cloudckpt.open`` reads, and a
    ``model.safetensors.index.json`` where ``from_pretrained`` can read the model's objects by it. Or components: one
    safetensors file with whole tensors for each, such as ``model.safetensors``. What was saved from a folder of files
    (``save_folder``, ``staging``) comes back as those files, under their own names.

    A pull that was broken off, in whatever way, is gone on with by the next one. A folder that was pulled before is
    proven, and mended where it is damaged.

    Args:
        select: ``latest``, ``best``, a step, ``tag:NAME`` or a save id.
        into: the folder above; made if need be.
        components: only the tensors of these.
        dry_run: only say what would be brought, and whether it could be: what lies on the disk is not looked into.
        meter: told how far it is, and which objects are under way.

    Raises:
        CheckpointNotFoundError: nothing matches, or it was retired while it was being pulled.
        ConfigError: no such component, or something else is in the place of the folder.
        FormatError: the index is malformed, or names a file that would lie outside of the folder.
        CorruptCheckpointError: bytes on the store are not what was sealed; names the object and the range.
        StorageError: the store, or the local disk, refused.
    """
    view = RunView(store)
    checkpoint = view.select(select)
    with _retired_meanwhile(store, checkpoint):
        return _pull(store, checkpoint, Path(into), _checked(components), meter, dry_run=dry_run)


def _checked(components: Collection[str] | None) -> tuple[str, ...] | None:
    if isinstance(components, str):
        raise ConfigError(f"components={components!r}: expected a list, write [{components!r}]")
    if components is not None and not components:
        raise ConfigError("components=[] names none: leave it out to pull all of the checkpoint")
    return None if components is None else tuple(dict.fromkeys(components))


def _pull(
    store: ManifestStore,
    checkpoint: Checkpoint,
    into: Path,
    components: tuple[str, ...] | None,
    meter: Meter | None,
    *,
    dry_run: bool,
) -> Pulled:
    index, body = read_proven(store.storage, checkpoint)
    noted = checkpoint
    files = stored_files(index, checkpoint.url) if components is None and len(index.structure) == 1 else None
    if files is not None:
        recipe = _originals(checkpoint, files)
    elif components is None:
        recipe = _mirror(checkpoint, index, body)
    else:
        recipe = _wholes(checkpoint, index, components)
        noted = replace(checkpoint, extra={**checkpoint.extra, _SCOPE: sorted(components)})
    names, small = [file.name for file in recipe.files], dict(recipe.small)
    if PULLED_NAME not in names:  # a file of that name was saved: nothing is put in its place
        small[PULLED_NAME] = pulled_note(noted)
    final = into / f"checkpoint-{checkpoint.step}"
    place = _place(final, noted)
    pulled = Pulled(
        checkpoint=checkpoint,
        folder=final,
        files=(*names, *small),
        size_bytes=recipe.size_bytes,
        read_bytes=0,
        opaque=recipe.opaque,
    )
    if dry_run:
        return pulled
    with mapped(place):
        place.mkdir(parents=True, exist_ok=True)
        _check_room(place, recipe)
    bringing = Bringing(store, place, recipe.files, meter)
    bringing.run()
    for name, content in small.items():
        _write_small(place / name, content)
    if place != final:
        with mapped(final):
            for here, _, _ in os.walk(place):
                _sync_folder(Path(here))
            os.replace(place, final)  # noqa: PTH105 - the call whose atomicity this stands on, by its own name
            _sync_folder(into)
    return replace(pulled, read_bytes=bringing.read_bytes)


def _place(final: Path, noted: Checkpoint) -> Path:
    """Where the bytes go first: beside the final folder; or into it, where the same was pulled before.

    Raises:
        ConfigError: something else is there.
    """
    scope = noted.extra.get(_SCOPE)
    if not os.path.lexists(final):
        # Other components get a place of their own: what is left of them must not come along.
        words = "" if scope is None else "." + hashlib.sha256("\0".join(scope).encode()).hexdigest()[:8]
        return final.parent / f".{final.name}.{noted.id}{words}.partial"
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


def _mirror(checkpoint: Checkpoint, index: Index, body: bytes) -> _Recipe:
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
        pieces = (Piece(key, start, length, value, ((start, length),)) for start, length, value in spans if length)
        files.append(LocalFile(name=item.name, size_bytes=item.size_bytes, pieces=tuple(pieces)))
    small: dict[str, bytes] = {}
    found = as_they_are(index, "model")
    if found is not None:
        small["model.safetensors.index.json"] = canonical(found, readable=True)
    # The index comes last: a folder without it is none that was pulled.
    small[keys.INDEX_NAME] = body
    return _Recipe(files=tuple(files), small=small)


def _originals(checkpoint: Checkpoint, files: Mapping[str, TensorEntry]) -> _Recipe:
    """The files that a folder was saved from, under their own names.

    Raises:
        FormatError: the index says of one what no file is.
    """
    made = []
    for name, entry in files.items():
        whole = all(chunk.lengths == (chunk.length,) for chunk in entry.chunks)
        if entry.dtype != "uint8" or not whole or entry.shape != (sum(chunk.length for chunk in entry.chunks),):
            raise FormatError(f"{checkpoint.url}: {name!r} is no row of bytes")
        pieces = (
            Piece(
                keys.payload_key(checkpoint.step, checkpoint.id, chunk.object),
                chunk.start,
                chunk.length,
                chunk.crc32c,
                ((chunk.offsets[0], chunk.length),),
            )
            for chunk in entry.chunks
            if chunk.length
        )
        made.append(LocalFile(name=name, size_bytes=entry.shape[0], pieces=tuple(pieces)))
    return _Recipe(files=tuple(made))


def _wholes(checkpoint: Checkpoint, index: Index, components: Sequence[str]) -> _Recipe:
    """Each component as one file with whole tensors."""
    made = [whole for component in components for whole in plan_whole(index, component)]
    return _Recipe(
        files=tuple(_file(checkpoint, whole) for whole in made),
        opaque=tuple(name for whole in made for name in whole.opaque),
    )


def _file(checkpoint: Checkpoint, whole: WholeFile) -> LocalFile:
    pieces = (
        Piece(
            keys.payload_key(checkpoint.step, checkpoint.id, move.chunk.object),
            move.chunk.start,
            move.chunk.length,
            move.chunk.crc32c,
            move.runs,
        )
        for move in whole.moves
    )
    return LocalFile(name=whole.name, size_bytes=whole.size_bytes, pieces=tuple(pieces), head=whole.header)


def write_component(
    store: ManifestStore,
    checkpoint: Checkpoint,
    component: str,
    folder: Path,
    *,
    most_bytes: int | None = None,
    meter: Meter | None = None,
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
        Bringing(store, folder, files, meter).run()
    return tuple(file.name for file in whole)


def _check_room(place: Path, recipe: _Recipe) -> None:
    """Fail before the first byte where the disk cannot hold it."""
    there = sum(getattr(path.stat(), "st_blocks", 0) * 512 for path in place.rglob("*") if path.is_file())
    needed, free = recipe.size_bytes - there, shutil.disk_usage(place).free
    if needed > free:
        raise StorageError(f"{place.parent} has {format_bytes(free)} free, and {format_bytes(needed)} are to come")


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
