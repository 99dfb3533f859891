"""cloudckpt keeps the checkpoints of a PyTorch training run, on local disk or in an object store.

A checkpoint is whole or absent; the manifest is updated before the upload; nothing good is ever lost.

    with CheckpointManager("./runs/demo", monitor="val_loss", mode="min", keep_best=2, keep_last=3) as ckpts:
        resumed = ckpts.restore(state)
        ckpts.save(step, state, metrics={"val_loss": loss})

Importing this package imports no torch; the names that need it load it when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from cloudckpt._version import __version__

if TYPE_CHECKING:
    from cloudckpt.config import Settings
    from cloudckpt.core.model import Checkpoint, State
    from cloudckpt.core.policy import KeepBest, KeepEvery, KeepLast, KeepWithin, Policy
    from cloudckpt.core.policy import KeepBest as Best
    from cloudckpt.core.retention import Decision, PrunePlan
    from cloudckpt.diverging import DivergenceDetector
    from cloudckpt.errors import (
        CheckpointNotFoundError,
        CloudCkptError,
        CommitUnknownError,
        ConfigError,
        ConflictError,
        CorruptCheckpointError,
        FencedError,
        FormatError,
        ObjectNotFoundError,
        RankError,
        SaveError,
        StateMismatchError,
        StorageError,
        UnsafeStorageError,
    )
    from cloudckpt.exporting import export
    from cloudckpt.importing import import_folder
    from cloudckpt.manager import CheckpointManager
    from cloudckpt.pending import PendingSave, Progress
    from cloudckpt.preemption import PreemptionGuard
    from cloudckpt.repairing import RepairPlan
    from cloudckpt.run import Run
    from cloudckpt.run import open_run as open  # noqa: A004 - cloudckpt.open() reads as the built-in does
    from cloudckpt.storage.base import Storage
    from cloudckpt.sweeping import SweepReport
    from cloudckpt.tensors.per_rank import PerRank
    from cloudckpt.tensors.train_state import TrainState, rng_state
    from cloudckpt.tools import copy, diff, gc, pull, repair, runs, sweep, verify
    from cloudckpt.verifying import Finding, VerifyReport

__all__ = [
    "Best",
    "Checkpoint",
    "CheckpointManager",
    "CheckpointNotFoundError",
    "CloudCkptError",
    "CommitUnknownError",
    "ConfigError",
    "ConflictError",
    "CorruptCheckpointError",
    "Decision",
    "DivergenceDetector",
    "FencedError",
    "Finding",
    "FormatError",
    "KeepBest",
    "KeepEvery",
    "KeepLast",
    "KeepWithin",
    "ObjectNotFoundError",
    "PendingSave",
    "PerRank",
    "Policy",
    "PreemptionGuard",
    "Progress",
    "PrunePlan",
    "RankError",
    "RepairPlan",
    "Run",
    "SaveError",
    "Settings",
    "State",
    "StateMismatchError",
    "Storage",
    "StorageError",
    "SweepReport",
    "TrainState",
    "UnsafeStorageError",
    "VerifyReport",
    "__version__",
    "copy",
    "diff",
    "export",
    "gc",
    "import_folder",
    "open",
    "pull",
    "repair",
    "rng_state",
    "runs",
    "sweep",
    "verify",
]

#: public name -> (module, name there)
_PLACES: dict[str, tuple[str, str]] = {
    "Best": ("core.policy", "KeepBest"),
    "Checkpoint": ("core.model", "Checkpoint"),
    "CheckpointManager": ("manager", "CheckpointManager"),
    "Decision": ("core.retention", "Decision"),
    "DivergenceDetector": ("diverging", "DivergenceDetector"),
    "Finding": ("verifying", "Finding"),
    "KeepBest": ("core.policy", "KeepBest"),
    "KeepEvery": ("core.policy", "KeepEvery"),
    "KeepLast": ("core.policy", "KeepLast"),
    "KeepWithin": ("core.policy", "KeepWithin"),
    "PendingSave": ("pending", "PendingSave"),
    "PerRank": ("tensors.per_rank", "PerRank"),
    "Policy": ("core.policy", "Policy"),
    "PreemptionGuard": ("preemption", "PreemptionGuard"),
    "Progress": ("pending", "Progress"),
    "PrunePlan": ("core.retention", "PrunePlan"),
    "RepairPlan": ("repairing", "RepairPlan"),
    "Run": ("run", "Run"),
    "Settings": ("config", "Settings"),
    "State": ("core.model", "State"),
    "Storage": ("storage.base", "Storage"),
    "SweepReport": ("sweeping", "SweepReport"),
    "TrainState": ("tensors.train_state", "TrainState"),
    "VerifyReport": ("verifying", "VerifyReport"),
    "copy": ("tools", "copy"),
    "diff": ("tools", "diff"),
    "export": ("exporting", "export"),
    "gc": ("tools", "gc"),
    "import_folder": ("importing", "import_folder"),
    "open": ("run", "open_run"),
    "pull": ("tools", "pull"),
    "repair": ("tools", "repair"),
    "rng_state": ("tensors.train_state", "rng_state"),
    "runs": ("tools", "runs"),
    "sweep": ("tools", "sweep"),
    "verify": ("tools", "verify"),
}


if not TYPE_CHECKING:  # to type checkers it would say that there is whatever name they meet

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module 'cloudckpt' has no attribute {name!r}")
        module, attribute = _PLACES.get(name, ("errors", name))
        return getattr(importlib.import_module(f"cloudckpt.{module}"), attribute)


def __dir__() -> list[str]:
    return __all__
