"""A run opened for reading, with tensors: evaluators, servers, notebooks. It never writes."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from cloudckpt.config import Settings
from cloudckpt.coordination import Coordinator, SingleProcess
from cloudckpt.core.model import Checkpoint, Manifest
from cloudckpt.core.selection import parse_selector
from cloudckpt.errors import ConfigError, CorruptCheckpointError
from cloudckpt.events import FellBack, Listener, Listeners, LoggingListener
from cloudckpt.filing import checked_folder, give_back
from cloudckpt.loading import LoadRequest, load_chosen
from cloudckpt.progress import Meter
from cloudckpt.storage import ManifestStore, Storage, open_storage
from cloudckpt.view import RunView
from cloudckpt.vocabulary import unknown_keyword

__all__ = ["Run", "open_run"]


class Run(RunView):
    """A run opened for reading. Every question reads the manifest afresh; nothing is claimed or written."""

    def __init__(
        self, store: ManifestStore, listener: Listener, *, allow_pickle: bool = False, meter: Meter | None = None
    ) -> None:
        super().__init__(store)
        self._meter = meter
        self._listener = listener
        self._allow_pickle = allow_pickle
        self._coordinator: Coordinator = SingleProcess()

    def load(
        self,
        select: str | int = "latest",
        *,
        components: Collection[str] | None = None,
        names: Collection[str] | None = None,
        device: str | torch.device | None = "cpu",
        mmap: bool = False,
        verify: bool = True,
        **unknown: object,
    ) -> dict[str, Any]:
        """The checkpoint's values as plain tensors and Python values, by component.

        Args:
            select: ``latest``, ``best``, a step, ``tag:NAME`` or a save id.
            components: only these top-level keys.
            names: only these tensors, by their names inside the components; gives ``{component: {name: tensor}}``.
            device: where the tensors go; None leaves them on the CPU. On a GPU they are read through pinned memory,
                each piece copied while the next ones are read. "meta" gives shapes and dtypes, and reads no payload.
            mmap: for a run on a local disk: tensors over the files themselves, copy-on-write, so that nothing takes
                memory before it is touched, and writing to them changes no file. What does not begin on a 64-byte
                boundary of its file is read as usual.
            verify: False leaves out the checksums of mapped tensors, which make ``mmap=True`` read all pages once.

        Raises:
            CheckpointNotFoundError: nothing matches.
            CorruptCheckpointError: it is damaged, and no earlier one may stand in.
            ConfigError: no such component or name, a pickled leaf without ``allow_pickle=True``, a device that does not
                exist, or ``mmap`` of a run that is not on a local disk.
            StorageError: the store refused.
        """
        for word in unknown:
            raise unknown_keyword("load", word, ["select", "components", "names", "device", "mmap", "verify"])
        request = LoadRequest(
            selector=parse_selector(select),
            components=components,
            names=names,
            allow_pickle=self._allow_pickle,
            device=_checked_device(device, mmap=mmap),
            mmap=mmap,
            verify=verify,
            listener=self._listener,
            rank=self._coordinator.rank,
            meter=self._meter,
        )
        if not verify and not mmap:
            raise ConfigError("verify=False goes with mmap=True: where bytes are read, their checksums cost nothing")
        manifest = self._manifest_to_load(f"select={select!r}, components={components!r}, names={names!r}")
        return load_chosen(
            self._store, manifest, request, coordinator=self._coordinator, on_damage=self._on_damage
        ).values

    def load_folder(self, into: str | os.PathLike[str], select: str | int = "latest", **unknown: object) -> Path:
        """Give the files of a checkpoint back that was saved from a folder, as ``<into>/checkpoint-<step>``.

        The bytes are read straight into the files, and the folder appears once all of them are proven. If it is there
        with the very same files, nothing is read; with others, it is moved aside, with a warning.

        Args:
            into: a folder of this machine, made if need be.
            select: ``latest``, ``best``, a step, ``tag:NAME`` or a save id.

        Raises:
            CheckpointNotFoundError: nothing matches.
            CorruptCheckpointError: it is damaged, and no earlier one may stand in.
            FormatError: it was not saved from a folder.
            ConfigError: ``into`` is no folder of this machine.
            StorageError: the store or the disk refused.
        """
        for word in unknown:
            raise unknown_keyword("load_folder", word, ["into", "select"])
        selector, folder = parse_selector(select), checked_folder(into)
        manifest = self._manifest_to_load(f"select={select!r}, files")
        _, target = give_back(
            self._store,
            manifest,
            selector,
            folder,
            coordinator=self._coordinator,
            on_damage=self._on_damage,
            listener=self._listener,
        )
        return target

    def _manifest_to_load(self, asked: str) -> Manifest | None:
        """What is chosen from; None where another rank chooses.

        Args:
            asked: what must be asked alike on all ranks.
        """
        del asked
        return self.manifest()

    def _on_damage(self, checkpoint: Checkpoint, error: CorruptCheckpointError) -> None:
        self._listener(FellBack(checkpoint=checkpoint, reason=str(error)))


def _checked_device(device: str | torch.device | None, *, mmap: bool) -> torch.device | None:
    """The device, if it is another than the host.

    Raises:
        ConfigError: it does not exist here, or memory of it cannot be mapped.
    """
    try:
        found = torch.device(device or "cpu")
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as exc:
        # Without CUDA torch answers with an assertion, and with the first line of a long text.
        reason = str(exc).partition("\n")[0]
        raise ConfigError(f"device={str(device)!r} cannot be used here: {reason}") from exc
    if found.type == "cpu":
        return None
    if mmap:
        raise ConfigError(f"mmap=True gives tensors on the CPU: leave out device={str(device)!r}, or mmap=True")
    return found


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
