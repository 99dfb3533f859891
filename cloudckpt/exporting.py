"""A checkpoint in the form that another program reads: safetensors, ``torch.save``, a Hugging Face folder, DCP.

Everything is written beside its final place and gets its name at the end.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from cloudckpt.config import Settings
from cloudckpt.core import keys
from cloudckpt.core.model import Checkpoint, Index
from cloudckpt.core.whole import plan_whole, weight_map
from cloudckpt.core.wire import canonical
from cloudckpt.errors import ConfigError, StorageError
from cloudckpt.events import Listeners
from cloudckpt.pulling import write_component
from cloudckpt.run import Run
from cloudckpt.storage import ManifestStore, Storage, open_storage
from cloudckpt.storage.local_errors import mapped
from cloudckpt.view import read_index

__all__ = ["FORMATS", "Exported", "export", "export_checkpoint"]

#: What a checkpoint can be exported to, and what that gives.
FORMATS: Mapping[str, str] = {
    "safetensors": "one safetensors file for each component, with whole tensors",
    "torch": "one file that torch.load reads, with everything",
    "hf": "the model's weights as from_pretrained reads them, in shards with an index where they are large",
    "dcp": "a folder that torch.distributed.checkpoint.load reads, with everything",
}

#: Hugging Face's own default for max_shard_size ("5GB").
_SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """What was written.

    Attributes:
        checkpoint: which one.
        format: one of ``FORMATS``.
        path: the folder, or the file.
        files: the names of the files in it.
        left_out: components that this format has no place for.
    """

    checkpoint: Checkpoint
    format: str
    path: Path
    files: tuple[str, ...]
    left_out: tuple[str, ...]


def export(
    root: str | os.PathLike[str] | Storage,
    select: str | int = "latest",
    *,
    to: str,
    path: str | os.PathLike[str],
    components: Collection[str] | None = None,
    allow_pickle: bool = False,
    storage_options: Mapping[str, object] | None = None,
    settings: Settings | None = None,
) -> Exported:
    """Export a checkpoint of the run at ``root``. See ``export_checkpoint``."""
    storage = open_storage(root, storage_options=storage_options, settings=settings)
    store = ManifestStore(storage, settings)
    try:
        return export_checkpoint(store, select, to=to, path=path, components=components, allow_pickle=allow_pickle)
    finally:
        if storage is not root:
            storage.close()


def export_checkpoint(
    store: ManifestStore,
    select: str | int,
    *,
    to: str,
    path: str | os.PathLike[str],
    components: Collection[str] | None = None,
    allow_pickle: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,  # noqa: ARG005 - the shape of a progress
) -> Exported:
    """Write a checkpoint in another format.

    Args:
        select: ``latest``, ``best``, a step, ``tag:NAME`` or a save id.
        to: one of ``FORMATS``.
        path: the folder to make, or the file for "torch". It must not be there.
        components: only these; by default all, and "model" for "hf".
        allow_pickle: load pickled leaves, which runs code from the checkpoint.
        progress: told of bytes done and of all, for the formats that are written without torch.

    Raises:
        CheckpointNotFoundError: nothing matches.
        ConfigError: no such format or component, or the path is there already.
        CorruptCheckpointError: bytes on the store are not what was sealed.
        StorageError: the store, or the local disk, refused.
    """
    if to not in FORMATS:
        raise ConfigError(f"{to!r} is none of the formats there are: {', '.join(FORMATS)}")
    final = Path(path)
    if os.path.lexists(final):
        raise ConfigError(f"{final} is there already: choose another path, or move it away")
    run = Run(store, Listeners(), allow_pickle=allow_pickle)
    checkpoint = run.select(select)
    asked, left_out = _asked(read_index(store.storage, checkpoint), checkpoint, to, components)
    partial = final.with_name(f".{final.name}.partial")
    with mapped(partial):
        final.parent.mkdir(parents=True, exist_ok=True)
        _clear(partial)
    try:
        match to:
            case "torch":
                files = _to_torch(run, checkpoint, asked, partial, final.name)
            case "dcp":
                files = _to_dcp(run, checkpoint, asked, partial)
            case "hf":
                files = _to_hf(store, checkpoint, asked[0], partial, progress)
            case _:
                files = _to_safetensors(store, checkpoint, asked, partial, progress)
        with mapped(final):
            os.replace(partial, final)  # noqa: PTH105 - the call whose atomicity this stands on, by its own name
    except BaseException:
        _clear(partial)
        raise
    return Exported(checkpoint=checkpoint, format=to, path=final, files=files, left_out=left_out)


def _asked(
    index: Index, checkpoint: Checkpoint, to: str, components: Collection[str] | None
) -> tuple[list[str], tuple[str, ...]]:
    """The components to export, and those among them that the format has no place for."""
    if isinstance(components, str):
        raise ConfigError(f"components={components!r}: expected a list, write [{components!r}]")
    asked = (["model"] if to == "hf" else [*index.structure]) if components is None else [*components]
    if unknown := [name for name in asked if name not in index.structure]:
        raise ConfigError(
            f"{checkpoint.url} has no component {', '.join(map(repr, unknown))}; it has "
            f"{', '.join(map(repr, index.structure))}. Say which to export"
        )
    if to == "hf" and len(asked) != 1:
        raise ConfigError('to="hf" writes one model: name one component')
    if to in {"torch", "dcp"}:
        return asked, ()
    fit = [name for name in asked if index.tensors.get(name)]
    if not fit:
        raise ConfigError(f"{', '.join(asked)}: there are no tensors in it, so nothing for a safetensors file")
    return fit, tuple(name for name in asked if name not in fit)


def _clear(path: Path) -> None:
    """What an earlier export left."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _made(folder: Path) -> Path:
    with mapped(folder):
        folder.mkdir()
    return folder


def _to_safetensors(
    store: ManifestStore,
    checkpoint: Checkpoint,
    components: list[str],
    folder: Path,
    progress: Callable[[int, int], None],
) -> tuple[str, ...]:
    _made(folder)
    written = [write_component(store, checkpoint, c, folder, progress=progress) for c in components]
    return tuple(name for names in written for name in names)


def _to_torch(run: Run, checkpoint: Checkpoint, components: list[str], path: Path, name: str) -> tuple[str, ...]:
    values = run.load(checkpoint.name, components=components)
    with mapped(path):
        try:
            torch.save(values, path)
        except RuntimeError as exc:  # how torch tells of a full disk
            raise StorageError(f"{path}: {exc}") from exc
    return (name,)


def _to_dcp(run: Run, checkpoint: Checkpoint, components: list[str], folder: Path) -> tuple[str, ...]:
    values: dict[str, Any] = run.load(checkpoint.name, components=components)
    many = torch.distributed.is_available() and torch.distributed.is_initialized()
    alone: dict[str, Any] = {"no_dist": True} if many else {}
    with warnings.catch_warnings():
        # That one process saves alone is meant.
        warnings.filterwarnings("ignore", message=r"torch\.distributed is .*unavailable or uninitialized")
        with mapped(folder):
            dcp.save(values, checkpoint_id=str(_made(folder)), **alone)
    return tuple(sorted(path.name for path in folder.iterdir()))


def _to_hf(
    store: ManifestStore, checkpoint: Checkpoint, component: str, folder: Path, progress: Callable[[int, int], None]
) -> tuple[str, ...]:
    index = read_index(store.storage, checkpoint)
    planned = plan_whole(index, component, most_bytes=_SHARD_BYTES)
    stem = keys.payload_name(component, 0, 1).partition("-00000-of-")[0]
    files = write_component(store, checkpoint, component, _made(folder), most_bytes=_SHARD_BYTES, progress=progress)
    named = [(name, "model" + name.removeprefix(stem)) for name in files]
    with mapped(folder):
        for name, wanted in named:
            if name != wanted:
                (folder / name).rename(folder / wanted)
    if len(files) == 1:
        return (named[0][1],)
    # The names that from_pretrained looks for, whatever the component is called.
    document = weight_map(planned)
    new = dict(named)
    places: Any = document["weight_map"]
    document["weight_map"] = {tensor: new[file] for tensor, file in places.items()}
    with mapped(folder):
        (folder / "model.safetensors.index.json").write_bytes(canonical(document, readable=True))
    return (*(wanted for _, wanted in named), "model.safetensors.index.json")
