"""What an export takes from a checkpoint: known before anything is written, and without torch."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from cloudckpt.core.model import Checkpoint, Index
from cloudckpt.errors import ConfigError
from cloudckpt.storage import ManifestStore
from cloudckpt.view import RunView, read_index

__all__ = ["FORMATS", "ExportPlan", "plan_export"]

#: What a checkpoint can be exported to, and what that gives.
FORMATS: Mapping[str, str] = {
    "safetensors": "one safetensors file for each component, with whole tensors",
    "torch": "one file that torch.load reads, with everything",
    "hf": "the model's weights as from_pretrained reads them, in shards with an index where they are large",
    "dcp": "a folder that torch.distributed.checkpoint.load reads, with everything",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportPlan:
    """What will be written.

    Attributes:
        checkpoint: which one.
        format: one of ``FORMATS``.
        path: the folder, or the file for "torch"; not there yet.
        components: what goes in.
        left_out: components that this format has no place for.
    """

    checkpoint: Checkpoint
    format: str
    path: Path
    components: tuple[str, ...]
    left_out: tuple[str, ...]


def plan_export(
    store: ManifestStore,
    select: str | int,
    *,
    to: str,
    path: str | os.PathLike[str] | None = None,
    components: Collection[str] | None = None,
) -> ExportPlan:
    """Look at what an export would write. Reads the index, and no payload.

    Args:
        select: ``latest``, ``best``, a step, ``tag:NAME`` or a save id.
        to: one of ``FORMATS``.
        path: the folder to make, or the file for "torch"; by default one that is named by the step, here.
        components: only these; by default all, and "model" for "hf".

    Raises:
        CheckpointNotFoundError: nothing matches.
        ConfigError: no such format or component, or the path is there already.
        CorruptCheckpointError: the index is missing or was changed.
        StorageError: the store refused.
    """
    if to not in FORMATS:
        raise ConfigError(f"{to!r} is none of the formats there are: {', '.join(FORMATS)}")
    checkpoint = RunView(store).select(select)
    suffix = ".pt" if to == "torch" else f"-{to}"
    final = Path(path) if path is not None else Path(f"checkpoint-{checkpoint.step}{suffix}")
    if os.path.lexists(final):
        raise ConfigError(f"{final} is there already: choose another path, or move it away")
    fit, left_out = _asked(read_index(store.storage, checkpoint), checkpoint, to, components)
    return ExportPlan(checkpoint=checkpoint, format=to, path=final, components=fit, left_out=left_out)


def _asked(
    index: Index, checkpoint: Checkpoint, to: str, components: Collection[str] | None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The components to export, and those among them that the format has no place for."""
    if isinstance(components, str):
        raise ConfigError(f"components={components!r}: expected a list, write [{components!r}]")
    everything = ("model",) if to == "hf" else tuple(index.structure)
    asked = everything if components is None else tuple(dict.fromkeys(components))
    if components is not None and not components:
        raise ConfigError("components=[] names none: leave it out to export all of the checkpoint")
    if unknown := [name for name in asked if name not in index.structure]:
        raise ConfigError(
            f"{checkpoint.url} has no component {', '.join(map(repr, unknown))}; it has "
            f"{', '.join(map(repr, index.structure))}. Say which to export"
        )
    if to == "hf" and len(asked) != 1:
        raise ConfigError('to="hf" writes one model: name one component')
    if to in {"torch", "dcp"}:
        return asked, ()
    fit = tuple(name for name in asked if index.tensors.get(name))
    if not fit:
        raise ConfigError(f"{', '.join(asked)}: there are no tensors in it, so nothing for a safetensors file")
    return fit, tuple(name for name in asked if name not in fit)
