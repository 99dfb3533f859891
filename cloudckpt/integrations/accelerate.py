"""Accelerate: what ``save_state`` writes goes to a run, from all ranks; ``load_state`` reads what comes back.

    with CheckpointManager("s3://bucket/runs/demo", keep_last=2) as ckpts:
        resumed = load_state(accelerator, ckpts, "./out")
        for step in range(resumed + 1 if resumed is not None else 0, total_steps):
            train_one(step)
            if step % 500 == 0:
                save_state(accelerator, ckpts, step, metrics={"loss": loss})

They are thin: ``with ckpts.staging(step) as folder: accelerator.save_state(folder)`` is the first of them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any, SupportsFloat

from cloudckpt.errors import ConfigError
from cloudckpt.manager import CheckpointManager

__all__ = ["load_state", "save_state"]


def save_state(
    accelerator: Any,
    ckpts: CheckpointManager,
    step: int,
    *,
    metrics: Mapping[str, SupportsFloat] | None = None,
    tags: Iterable[str] = (),
    pin: bool = False,
    block: bool = False,
    within: str | os.PathLike[str] | None = None,
    **save_state_words: Any,
) -> None:
    """Have the accelerator write its state, and save that as of ``step``. Collective.

    Args:
        accelerator: an ``accelerate.Accelerator``.
        step: training step, >= 0.
        metrics: what was measured at this step.
        tags: labels.
        pin: exempt it from every rule.
        block: return only once it is committed.
        within: where the folder is made that it is written into; see ``CheckpointManager.staging``.
        save_state_words: for ``Accelerator.save_state``, such as ``safe_serialization=False``.

    Raises:
        ConfigError: the accelerator names its folders itself.
        CloudCkptError: as ``CheckpointManager.staging``.
    """
    # It would write beside the folder it is given, and delete by a rule of its own.
    if accelerator.project_configuration.automatic_checkpoint_naming:
        raise ConfigError(
            "this Accelerator names its checkpoints itself (automatic_checkpoint_naming=True) and ignores where it "
            "is to write: leave that and total_limit out of its ProjectConfiguration; keep_last=N is the same here"
        )
    with ckpts.staging(step, metrics=metrics, tags=tags, pin=pin, block=block, within=within) as folder:
        accelerator.save_state(str(folder), **save_state_words)


def load_state(
    accelerator: Any,
    ckpts: CheckpointManager,
    into: str | os.PathLike[str],
    select: str | int = "latest",
    **load_state_words: Any,
) -> int | None:
    """Load the accelerator's state from the run; gives its step, or None on a first run. Collective.

    Args:
        accelerator: an ``accelerate.Accelerator`` with everything prepared.
        into: a folder of this machine, in which ``checkpoint-<step>`` appears.
        select: ``latest``, ``best``, a step, ``tag:NAME`` or a save id.
        load_state_words: for ``Accelerator.load_state``, such as ``map_location="cpu"``.

    Raises:
        CloudCkptError: as ``CheckpointManager.restore_folder``.
    """
    folder = ckpts.restore_folder(into, select)
    if folder is None:
        return None
    accelerator.load_state(str(folder), **load_state_words)
    return int(folder.name.removeprefix("checkpoint-"))
