"""A checkpoint of another program into a run. Nothing is unpickled that could run code, unless it is allowed."""

from __future__ import annotations

import importlib
import json
import os
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, SupportsFloat

import torch

from cloudckpt.config import Settings
from cloudckpt.copying import copy_pulled, refuse_held
from cloudckpt.core.arguments import checked_step
from cloudckpt.core.layout import read_header, torch_name
from cloudckpt.errors import ConfigError, CorruptCheckpointError, FormatError
from cloudckpt.foreign import OURS, Imported, ImportPart, ImportPlan, check_given, plan_import
from cloudckpt.manager import CheckpointManager
from cloudckpt.storage import ManifestStore, Storage, open_storage
from cloudckpt.storage.local_errors import mapped
from cloudckpt.tensors.memory import dtype_named

__all__ = ["import_folder", "import_planned", "load_safetensors"]

#: A Lightning checkpoint's key -> component; other keys keep their names.
_LIGHTNING = {"state_dict": "model", "optimizer_states": "optimizers"}


def import_folder(
    path: str | os.PathLike[str],
    root: str | os.PathLike[str] | Storage,
    *,
    step: int | None = None,
    metrics: Mapping[str, SupportsFloat] | None = None,
    tags: Iterable[str] = (),
    pin: bool = False,
    skip: Iterable[str] = (),
    allow_pickle: bool = False,
    takeover: str = "refuse",
    storage_options: Mapping[str, object] | None = None,
    settings: Settings | None = None,
) -> Imported:
    """Bring a checkpoint of forgather, Hugging Face's Trainer, Lightning, or a plain folder into a run.

    A new run keeps all that is imported into it; one that is there goes by its own policy.

    Args:
        path: the folder, or a Lightning ``.ckpt`` file; or a folder that was pulled.
        root: the run.
        step: the training step, where the folder does not tell it, or tells another one.
        metrics: further metrics; they win over those that the folder tells.
        tags: labels.
        pin: exempt it from every rule.
        skip: names of files to leave out; ``*`` and ``?`` stand for other characters.
        allow_pickle: unpickle what needs it, which runs code from the files.
        takeover: "last_wins" writes into a run whose last writer has not closed it, and fences that one.
        storage_options: for the root's filesystem.
        settings: numbers such as deadlines.

    Raises:
        ConfigError: there is nothing to import, nobody knows the step, or a file needs ``allow_pickle=True``.
        ConflictError: another process holds the run.
        CorruptCheckpointError: a file is cut short or damaged.
        FormatError: a file is not what its name says.
        TypeError: something in it cannot be stored; names its path.
        StorageError: the store, or the local disk, refused.
    """
    plan = plan_import(path, skip=skip)
    return import_planned(
        plan,
        root,
        step=step,
        metrics=metrics,
        tags=tags,
        pin=pin,
        allow_pickle=allow_pickle,
        takeover=takeover,
        storage_options=storage_options,
        settings=settings,
    )


def import_planned(
    plan: ImportPlan,
    root: str | os.PathLike[str] | Storage,
    *,
    step: int | None = None,
    metrics: Mapping[str, SupportsFloat] | None = None,
    tags: Iterable[str] = (),
    pin: bool = False,
    allow_pickle: bool = False,
    takeover: str = "refuse",
    storage_options: Mapping[str, object] | None = None,
    settings: Settings | None = None,
) -> Imported:
    """Carry out a plan of ``plan_import``. See ``import_folder``."""
    check_given(plan, step=step, metrics=metrics)
    storage = open_storage(root, storage_options=storage_options, settings=settings)
    store = ManifestStore(storage, settings)
    try:
        if plan.kind == OURS:
            source = ManifestStore(open_storage(plan.path, settings=settings), settings)
            copied, components = copy_pulled(source, store, tags=tags, pin=pin, takeover=takeover)
            return Imported(checkpoint=copied.checkpoint, plan=plan, components=components)
        found = store.read()
        if takeover == "refuse":
            refuse_held(found, store)
        state, told_step, told_metrics = _loaded(plan, allow_pickle=allow_pickle)
        number = next((s for s in (step, plan.step, told_step) if s is not None), None)
        if number is None:
            raise ConfigError(f"{plan.path} does not tell its training step: say it, with step=N (--step N)")
        words: dict[str, Any] = {} if found is not None else {"keep_last": None}
        with CheckpointManager(
            storage, takeover=takeover, allow_pickle=allow_pickle, process_group=False, settings=settings, **words
        ) as ckpts:
            pending = ckpts.save(
                checked_step(number),
                state,
                metrics={**told_metrics, **plan.metrics, **(metrics or {})},
                tags=tags,
                pin=pin,
                block=True,
            )
        return Imported(checkpoint=pending.checkpoint, plan=plan, components=tuple(state))
    finally:
        if storage is not root:
            storage.close()


def _loaded(plan: ImportPlan, *, allow_pickle: bool) -> tuple[dict[str, Any], int | None, dict[str, float]]:
    """State, and the step and metrics that the contents tell.

    Raises:
        ConfigError: files need ``allow_pickle=True``; names all of them.
    """
    folder = plan.path if plan.path.is_dir() else plan.path.parent
    state: dict[str, Any] = {}
    refused: list[str] = []
    for part in plan.parts:
        try:
            state[part.component] = _part(folder, part, allow_pickle=allow_pickle)
        except _NeedsPickleError as exc:
            refused.append(str(exc))
    if refused:
        skips = " ".join(f"--skip {name}" for name in refused)
        raise ConfigError(
            f"{', '.join(refused)} in {folder} can only be read by running code from it. If you trust whoever wrote "
            f"it: allow_pickle=True (--allow-pickle). Otherwise leave it out: {skips}"
        )
    if plan.kind == "lightning":
        return _of_lightning(state["*"], plan)
    trainer = state.get("trainer")
    told = trainer.get("global_step") if isinstance(trainer, dict) else None
    return state, told if type(told) is int else None, {}


class _NeedsPickleError(Exception):
    """A file that torch reads only by unpickling; its name."""


def _part(folder: Path, part: ImportPart, *, allow_pickle: bool) -> Any:
    if part.how == "json":
        path = folder / part.files[0]
        try:
            with mapped(path):
                return json.loads(path.read_bytes())
        except ValueError as exc:
            raise FormatError(f"{path} is not valid JSON: {exc}") from exc
    if part.how == "safetensors":
        return {name: tensor for file in part.files for name, tensor in load_safetensors(folder / file).items()}
    found = [_unpickled(folder / file, allow_pickle=allow_pickle) for file in part.files]
    if len(found) == 1:
        return found[0]
    if not all(isinstance(shard, dict) for shard in found):
        raise FormatError(f"{folder}: {', '.join(part.files)} are no shards of one state dict")
    return {name: tensor for shard in found for name, tensor in shard.items()}


def _unpickled(path: Path, *, allow_pickle: bool) -> Any:
    if not allow_pickle and torch.distributed.is_available():
        # It is its import that tells torch.load that DTensors, and what they are made of, are no code.
        importlib.import_module("torch.distributed.tensor")
    try:
        with mapped(path):
            return torch.load(path, map_location="cpu", weights_only=not allow_pickle)
    except pickle.UnpicklingError as exc:
        if allow_pickle:
            raise FormatError(f"{path} is not a file of torch.save: {exc}") from exc
        raise _NeedsPickleError(path.name) from exc
    except (ImportError, AttributeError) as exc:
        raise ConfigError(
            f"{path} holds an object of a class that cannot be imported here ({exc}): install what it comes from, or "
            f"leave the file out: --skip {path.name}"
        ) from exc
    except (RuntimeError, EOFError) as exc:
        # torch's own words for a zip archive without its end.
        raise CorruptCheckpointError(f"{path} cannot be read, it is probably cut short: {exc}") from exc


def load_safetensors(path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, on the CPU.

    Raises:
        FormatError: it is none, or has a dtype that torch does not.
        CorruptCheckpointError: it is cut short.
        StorageError: the disk refused.
    """
    place = Path(path)
    tensors: dict[str, torch.Tensor] = {}
    with mapped(place), place.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        file.seek(0)
        try:
            entries = read_header(file.read(8 + min(length, size)), object_size_bytes=size)
        except FormatError as exc:
            raise FormatError(f"{place}: {exc}") from exc
        for name, (dtype, shape, start, count) in entries.items():
            known = torch_name(dtype)
            if known is None:
                raise FormatError(f"{place}: {name!r} has the dtype {dtype}, which is not known here")
            if not count:
                tensors[name] = torch.empty(shape, dtype=dtype_named(known))
                continue
            body = bytearray(count)
            file.seek(start)
            if file.readinto(body) != count:
                raise CorruptCheckpointError(f"{place} is cut short: {name!r} is not all there")
            tensors[name] = torch.frombuffer(body, dtype=torch.uint8).view(dtype_named(known)).reshape(shape)
    return tensors


def _of_lightning(checkpoint: object, plan: ImportPlan) -> tuple[dict[str, Any], int | None, dict[str, float]]:
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), dict):
        raise FormatError(f"{plan.path} is no checkpoint of Lightning: it has no state_dict")
    state = {_LIGHTNING.get(str(key), str(key)): value for key, value in checkpoint.items()}
    step = checkpoint.get("global_step")
    metrics: dict[str, float] = {}
    callbacks = checkpoint.get("callbacks")
    for callback in callbacks.values() if isinstance(callbacks, dict) else ():
        # What ModelCheckpoint noted when it saved: the monitored metric of this very step.
        if isinstance(callback, dict) and isinstance(callback.get("monitor"), str):
            score = callback.get("current_score")
            if isinstance(score, int | float | torch.Tensor):
                metrics[callback["monitor"]] = float(score)
    return state, step if type(step) is int else None, metrics
