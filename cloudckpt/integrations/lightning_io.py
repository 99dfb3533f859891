"""What Lightning's ``Trainer`` hands its checkpoints to: a plugin that saves them to a run, and loads them from it.

Works with ``lightning`` and with ``pytorch_lightning``: with the one that is imported already, else with the one that
is installed.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import sys
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from cloudckpt.core.selection import parse_selector
from cloudckpt.errors import CheckpointNotFoundError, ConfigError
from cloudckpt.manager import CheckpointManager
from cloudckpt.run import Run, open_run
from cloudckpt.storage import Storage

__all__ = ["CloudCheckpointIO", "host_module"]

logger = logging.getLogger("cloudckpt")

_HOSTS = {"lightning.pytorch": "lightning", "pytorch_lightning": "pytorch_lightning"}
_HOST = next((name for name in _HOSTS if name in sys.modules), None) or next(
    (name for name, package in _HOSTS.items() if importlib.util.find_spec(package)), "lightning.pytorch"
)


def host_module(name: str) -> Any:
    """A module of the Lightning that is in use."""
    return importlib.import_module(f"{_HOST}.{name}")


_CheckpointIO: Any = host_module("plugins").CheckpointIO
_rank_zero_only: Any = host_module("utilities.rank_zero").rank_zero_only


class CloudCheckpointIO(_CheckpointIO):
    """Saves each checkpoint that Lightning writes to a run, and loads it by the name that Lightning gave it.

    ``remove_checkpoint`` removes nothing: what stays is for the run's rules to say, and they never let go of what was
    resumed from. Metrics are those that ``ModelCheckpoint`` monitors, or what ``CloudCheckpoint`` gives.

    Args:
        root: of the run: a folder, a URL or a storage.
        words: as for ``CheckpointManager``.
    """

    def __init__(self, root: str | os.PathLike[str] | Storage, **words: Any) -> None:
        self._root = root
        self._words = words
        self._ckpts: CheckpointManager | None = None
        #: What was measured, for the next save; None to look at ModelCheckpoint's.
        self.metrics: Mapping[str, float] | None = None
        #: Whether what is loaded is trained on: the run is claimed then, and protects it.
        self.is_resuming = False

    @property
    def ckpts(self) -> CheckpointManager:
        """The run; a new manager of it for each ``fit``. On rank zero only."""
        if self._ckpts is None:
            self._ckpts = CheckpointManager(self._root, process_group=False, **self._words)
        return self._ckpts

    def reader(self) -> Run:
        """The run, for reading, on any rank."""
        words = ("allow_pickle", "storage_options", "settings")
        return open_run(self._root, **{name: self._words[name] for name in words if name in self._words})

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Save it; back once it is copied, and uploaded in the background."""
        if storage_options is not None:
            raise TypeError("save_checkpoint(storage_options=...): give them to CloudCheckpointIO(storage_options=...)")
        metrics = self.metrics if self.metrics is not None else _monitored(checkpoint, str(path))
        self.ckpts.save(int(checkpoint["global_step"]), checkpoint, metrics=metrics, tags=[_name(path)])

    def load_checkpoint(self, path: Any, map_location: Any = None, **_: Any) -> dict[str, Any]:  # noqa: ARG002
        """The checkpoint of that name: one that Lightning gave, or a selector such as ``best`` or a step."""
        name = _name(path)
        try:
            parse_selector(name)
        except ConfigError:
            name = f"tag:{name}"
        if not (self.is_resuming and _rank_zero_only.rank == 0):
            return self.reader().load(name)
        if (values := self.ckpts.restore_values(name)) is None:
            raise CheckpointNotFoundError(f"{self.ckpts.url} has nothing to resume from: leave ckpt_path out")
        return values

    def remove_checkpoint(self, path: Any) -> None:
        """Lightning needs it no longer; whether it goes is for the run's rules to say."""
        logger.debug("released %s: the run's own rules decide what stays", path)

    def teardown(self) -> None:
        """Wait until everything is committed, and close the run."""
        ckpts, self._ckpts = self._ckpts, None
        if ckpts is not None:
            ckpts.close()


def _name(path: Any) -> str:
    return PurePosixPath(str(path)).name


def _monitored(checkpoint: Mapping[str, Any], path: str) -> dict[str, float]:
    """What each ModelCheckpoint has measured for this very file, from the state that Lightning saves with it."""
    found = {}
    for state in checkpoint.get("callbacks", {}).values():
        if isinstance(state, Mapping) and state.get("monitor") and path in (state.get("best_k_models") or {}):
            found[str(state["monitor"])] = float(state["best_k_models"][path])
    return found
