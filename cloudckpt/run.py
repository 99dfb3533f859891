"""A run opened for reading, with tensors: evaluators, servers, notebooks. It never writes."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Collection, Mapping
from typing import Any

import torch

from cloudckpt.config import Settings
from cloudckpt.core.model import Checkpoint
from cloudckpt.core.selection import parse_selector
from cloudckpt.errors import CorruptCheckpointError
from cloudckpt.events import FellBack, Listener, Listeners, LoggingListener
from cloudckpt.loading import LoadRequest, load_chosen
from cloudckpt.storage import ManifestStore, Storage, open_storage
from cloudckpt.view import RunView
from cloudckpt.vocabulary import unknown_keyword

__all__ = ["Run", "moved", "open_run"]


class Run(RunView):
    """A run opened for reading. Every question reads the manifest afresh; nothing is claimed or written."""

    def __init__(self, store: ManifestStore, listener: Listener, *, allow_pickle: bool = False) -> None:
        super().__init__(store)
        self._listener = listener
        self._allow_pickle = allow_pickle

    def load(
        self,
        select: str | int = "latest",
        *,
        components: Collection[str] | None = None,
        names: Collection[str] | None = None,
        device: str | torch.device | None = "cpu",
        **unknown: object,
    ) -> dict[str, Any]:
        """The checkpoint's values as plain tensors and Python values, by component.

        Args:
            select: ``latest``, ``best``, a step, ``tag:NAME`` or a save id.
            components: only these top-level keys.
            names: only these tensors, by their names inside the components; gives ``{component: {name: tensor}}``.
            device: where the tensors go; None leaves them on the CPU.

        Raises:
            CheckpointNotFoundError: nothing matches.
            CorruptCheckpointError: it is damaged, and no earlier one may stand in.
            ConfigError: no such component or name, or a pickled leaf without ``allow_pickle=True``.
            StorageError: the store refused.
        """
        for word in unknown:
            raise unknown_keyword("load", word, ["select", "components", "names", "device"])
        request = LoadRequest(
            selector=parse_selector(select), components=components, names=names, allow_pickle=self._allow_pickle
        )
        loaded = load_chosen(self._store, self.manifest(), request, on_damage=self._on_damage)
        return {name: moved(value, device) for name, value in loaded.values.items()}

    def _on_damage(self, checkpoint: Checkpoint, error: CorruptCheckpointError) -> None:
        self._listener(FellBack(checkpoint=checkpoint, reason=str(error)))


def moved(value: Any, device: str | torch.device | None) -> Any:
    """The value with every tensor in it on ``device``, tied ones still tied; containers are changed in place."""
    if device is None or torch.device(device).type == "cpu":
        return value
    return _moved(value, torch.device(device), {})


def _moved(value: Any, device: torch.device, seen: dict[int, tuple[torch.Tensor, torch.Tensor]]) -> Any:
    if isinstance(value, torch.Tensor):
        # The tensor itself is remembered beside its copy, so that its id stays its own.
        _, copy = seen.setdefault(id(value), seen.get(id(value)) or (value, value.to(device)))
        return copy
    if isinstance(value, dict):
        for key in value:
            value[key] = _moved(value[key], device, seen)
        return value
    if isinstance(value, list | deque):
        for n, item in enumerate(value):
            value[n] = _moved(item, device, seen)
        return value
    if type(value) is tuple:
        return tuple(_moved(item, device, seen) for item in value)
    return value


def open_run(
    root: str | os.PathLike[str] | Storage,
    *,
    allow_pickle: bool = False,
    storage_options: Mapping[str, object] | None = None,
    settings: Settings | None = None,
) -> Run:
    """Open a run for reading: nothing is claimed and nothing is written, so a running trainer never notices.

    Args:
        root: a folder, a URL, or a storage.
        allow_pickle: whether pickled leaves may be loaded, which runs code from the checkpoint.
        storage_options: passed to the filesystem as they are, and never printed.
        settings: numbers such as deadlines.

    Raises:
        ConfigError: the root cannot be used as given.
    """
    storage = open_storage(root, storage_options=storage_options, settings=settings)
    return Run(ManifestStore(storage, settings), Listeners([LoggingListener()]), allow_pickle=allow_pickle)
