"""What ``dcp.load`` reads with: a checkpoint of a run, chosen by its manifest."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch.distributed.checkpoint import storage as dcp_storage
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.futures import Future

from cloudckpt.config import Settings
from cloudckpt.core.model import Checkpoint, State
from cloudckpt.core.selection import parse_selector, select
from cloudckpt.dcp.place import Place, Root
from cloudckpt.errors import CheckpointNotFoundError, ConfigError, CorruptCheckpointError, RankError
from cloudckpt.storage import ManifestStore
from cloudckpt.tensors.dcp_described import Described
from cloudckpt.view import placed, read_index

__all__ = ["StorageReader"]


class StorageReader(dcp_storage.StorageReader):
    """Reads a checkpoint of a run for ``dcp.load``, whoever wrote it, on any number of ranks.

    Every rank looks for the checkpoint itself, as DCP has it; if they find different ones, because a save was committed
    at that very moment, the load fails on all of them and nothing was changed. It claims and writes nothing, and there
    is no falling back from a damaged checkpoint: ``CheckpointManager.restore`` does that.

    Args:
        root: a folder, a URL, or a storage.
        select: ``latest``, ``best``, a step, ``tag:NAME`` or a save id.
        component: the component that is the whole state, such as "model"; by default the state's top-level keys are
            the components.
        allow_pickle: whether pickled leaves may be loaded, which runs code from the checkpoint.
        storage_options: passed to the filesystem as they are, and never printed.
        settings: numbers such as deadlines.

    Attributes:
        checkpoint: what was chosen; None before.

    Raises:
        ConfigError: an argument cannot be used.
    """

    def __init__(
        self,
        root: Root,
        select: str | int = "latest",
        *,
        component: str | None = None,
        allow_pickle: bool = False,
        storage_options: Mapping[str, object] | None = None,
        settings: Settings | None = None,
    ) -> None:
        super().__init__()
        self._selector = parse_selector(select)
        self._component = component
        self._allow_pickle = allow_pickle
        self._place = Place(root, storage_options, settings)
        self._described: Described | None = None
        self.checkpoint: Checkpoint | None = None

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether it spells a selection, such as "latest" or "1500"."""
        with contextlib.suppress(ConfigError):
            parse_selector(str(checkpoint_id))
            return True
        return False

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """See DCP. ``checkpoint_id`` is what to select from now on.

        Raises:
            ConfigError: it is none of the spellings.
        """
        if checkpoint_id is not None:
            self._selector = parse_selector(str(checkpoint_id))
        self._described = self.checkpoint = None

    def read_metadata(self, *_args: Any, **_kwargs: Any) -> Metadata:
        """See DCP. Chooses the checkpoint; everything in the metadata comes out of its index, and nothing is unpickled.

        Raises:
            CheckpointNotFoundError: nothing matches.
            CorruptCheckpointError: its index is missing or was changed.
            ConfigError: no such component, or a pickled leaf without ``allow_pickle=True``.
            StorageError: the store refused.
        """
        with self._opened() as store:
            manifest = store.read()
            if manifest is None:
                raise CheckpointNotFoundError(f"{store.storage.url} holds no run: nothing was ever saved there")
            self.checkpoint = placed(select(manifest, self._selector), store.storage.url)
            with _retired_meanwhile(store, self.checkpoint):
                index = read_index(store.storage, self.checkpoint)
        self._described = Described(self.checkpoint, index, component=self._component, allow_pickle=self._allow_pickle)
        return self._described.metadata

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:  # noqa: FBT001 - DCP's
        """See DCP."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """See DCP."""
        return replace(plan, storage_data=self._chosen().checkpoint.name)

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """See DCP.

        Raises:
            RankError: the ranks have chosen different checkpoints; nothing was changed.
        """
        names = {str(plan.storage_data) for plan in plans}
        if len(names) > 1:
            raise RankError(
                f"the ranks have chosen different checkpoints, {', '.join(sorted(names))}: one was committed while "
                "they were looking. Load again, or name one: StorageReader(..., select=...). Nothing was changed"
            )
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """See DCP. Bytes go straight into the planner's tensors where these can take them, and are proven on the way.

        Raises:
            CorruptCheckpointError: an object is missing, too short, or a checksum differs; names object and range.
            CheckpointNotFoundError: the run has let it go meanwhile.
            StorageError: the store refused. In each case the tensors are partly overwritten.
        """
        described = self._chosen()
        with self._opened() as store, _retired_meanwhile(store, described.checkpoint):
            described.read(store.storage, plan, planner, store.settings)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def _chosen(self) -> Described:
        if self._described is None:
            raise ConfigError("this StorageReader has read no metadata: it is for dcp.load(state, storage_reader=...)")
        return self._described

    @contextlib.contextmanager
    def _opened(self) -> Iterator[ManifestStore]:
        store = self._place.open(self)
        try:
            yield store
        finally:
            self._place.close(store)


@contextlib.contextmanager
def _retired_meanwhile(store: ManifestStore, checkpoint: Checkpoint) -> Iterator[None]:
    """Tell bytes that are gone because the run let them go from damage."""
    try:
        yield
    except CorruptCheckpointError as exc:
        manifest = store.read()
        now = manifest.find(checkpoint.id) if manifest else None
        if now is None or now.state is not State.COMMITTED:
            raise CheckpointNotFoundError(f"{checkpoint.url} was retired while it was being read: load again") from exc
        raise
