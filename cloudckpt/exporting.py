"""A checkpoint in the form that another program reads: safetensors, ``torch.save``, a Hugging Face folder, DCP.

Everything is written beside its final place and gets its name at the end.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint
from torch.distributed.checkpoint.api import CheckpointException

from cloudckpt.config import Settings
from cloudckpt.core import keys
from cloudckpt.core.model import Checkpoint
from cloudckpt.core.whole import plan_whole, weight_map
from cloudckpt.core.wire import canonical
from cloudckpt.errors import StorageError
from cloudckpt.events import Listeners
from cloudckpt.exportable import ExportPlan, plan_export
from cloudckpt.progress import Meter
from cloudckpt.pulling import write_component
from cloudckpt.run import Run
from cloudckpt.storage import ManifestStore, Storage, open_storage
from cloudckpt.storage.local_errors import mapped
from cloudckpt.view import read_index

__all__ = ["Exported", "export", "export_checkpoint", "export_planned"]

#: Any: the package imports its names without exporting them.
_dcp: Any = torch.distributed.checkpoint

#: Hugging Face's own default for max_shard_size ("5GB").
_SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """What was written.

    Attributes:
        checkpoint: which one.
        format: one of ``exportable.FORMATS``.
        path: the folder, or the file.
        components: what went in.
        files: the names of the files in it.
        left_out: components that this format has no place for.
    """

    checkpoint: Checkpoint
    format: str
    path: Path
    components: tuple[str, ...]
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
    meter: Meter | None = None,
) -> Exported:
    """Write a checkpoint in another format.

    Args:
        select: ``latest``, ``best``, a step, ``tag:NAME`` or a save id.
        to: one of ``exportable.FORMATS``.
        path: the folder to make, or the file for "torch". It must not be there.
        components: only these; by default all, and "model" for "hf".
        allow_pickle: load pickled leaves, which runs code from the checkpoint.
        meter: told how far it is, and which objects are under way.

    Raises:
        CheckpointNotFoundError: nothing matches.
        ConfigError: no such format or component, or the path is there already.
        CorruptCheckpointError: bytes on the store are not what was sealed.
        StorageError: the store, or the local disk, refused.
    """
    plan = plan_export(store, select, to=to, path=path, components=components)
    return export_planned(store, plan, allow_pickle=allow_pickle, meter=meter)


def export_planned(store: ManifestStore, plan: ExportPlan, *, allow_pickle: bool, meter: Meter | None) -> Exported:
    """Carry out a plan of ``plan_export``. See ``export_checkpoint``."""
    checkpoint, components, final = plan.checkpoint, plan.components, plan.path
    meter = meter or Meter("exporting")
    run = Run(store, Listeners(), allow_pickle=allow_pickle, meter=meter)
    partial = final.with_name(f".{final.name}.partial")
    with mapped(partial):
        final.parent.mkdir(parents=True, exist_ok=True)
        _clear(partial)
    try:
        match plan.format:
            case "torch":
                files = _to_torch(run, plan, partial, meter)
            case "dcp":
                files = _to_dcp(run, checkpoint, components, partial, meter)
            case "hf":
                files = _to_hf(store, checkpoint, components[0], partial, meter)
            case _:
                files = _to_safetensors(store, checkpoint, components, partial, meter)
        with mapped(final):
            os.replace(partial, final)  # noqa: PTH105 - the call whose atomicity this stands on, by its own name
    except BaseException:
        with contextlib.suppress(OSError):  # the first error is the one to tell
            _clear(partial)
        raise
    return Exported(
        checkpoint=checkpoint,
        format=plan.format,
        path=final,
        components=components,
        files=files,
        left_out=plan.left_out,
    )


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
    components: Sequence[str],
    folder: Path,
    meter: Meter,
) -> tuple[str, ...]:
    _made(folder)
    files: list[str] = []
    for component in components:
        files += write_component(store, checkpoint, component, folder, meter=meter)
    return tuple(files)


def _to_torch(run: Run, plan: ExportPlan, path: Path, meter: Meter) -> tuple[str, ...]:
    values = run.load(plan.checkpoint.name, components=plan.components)
    with mapped(path), meter.carrying(plan.path.name):
        try:
            torch.save(values, path)
        except RuntimeError as exc:  # how torch tells of a full disk
            raise StorageError(f"{path}: {exc}") from exc
    return (plan.path.name,)


def _to_dcp(run: Run, checkpoint: Checkpoint, components: Sequence[str], folder: Path, meter: Meter) -> tuple[str, ...]:
    values: dict[str, Any] = run.load(checkpoint.name, components=components)
    many = torch.distributed.is_available() and torch.distributed.is_initialized()
    alone: dict[str, Any] = {"no_dist": True} if many else {}
    with warnings.catch_warnings():
        # That one process saves alone is meant.
        warnings.filterwarnings("ignore", message=r"torch\.distributed is .*unavailable or uninitialized")
        with mapped(folder), meter.carrying(folder.name):
            try:
                _dcp.save(values, checkpoint_id=str(_made(folder)), **alone)
            except CheckpointException as exc:  # which is no Exception
                reason, _ = next(iter(exc.failures.values()))
                raise StorageError(f"{folder}: {reason}") from exc
    return tuple(sorted(path.name for path in folder.iterdir()))


def _to_hf(store: ManifestStore, checkpoint: Checkpoint, component: str, folder: Path, meter: Meter) -> tuple[str, ...]:
    index = read_index(store.storage, checkpoint)
    planned = plan_whole(index, component, most_bytes=_SHARD_BYTES)
    stem = keys.payload_name(component, 0, 1).partition("-00000-of-")[0]
    files = write_component(store, checkpoint, component, _made(folder), most_bytes=_SHARD_BYTES, meter=meter)
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
