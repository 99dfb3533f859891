"""Ray Train: each worker saves and restores through the manager; Ray is told the metrics, and where they belong.

    def train_func(config):
        with CheckpointManager(config["root"], monitor="loss", mode="min", keep_best=2, keep_last=2) as ckpts:
            state = {"model": model, "optimizer": optimizer}
            resumed = ckpts.restore(state)          # after a failure Ray starts the workers again, and here they go on
            for step in range(resumed.step + 1 if resumed else 0, config["steps"]):
                loss = train_one(step)
                report(ckpts, step, state, {"loss": loss})

No ``ray.train.Checkpoint`` is handed over: Ray would count it, delete it by a rule of its own, and copy it to its own
storage. What restarts a worker is ``ckpts.restore``, which needs no Ray.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ray.train

from cloudckpt.manager import CheckpointManager
from cloudckpt.pending import PendingSave

__all__ = ["report"]

#: Under which names the reported metrics say where the state is that they belong to.
_STEP, _URL = "checkpoint_step", "checkpoint_url"


def report(
    ckpts: CheckpointManager, step: int, state: Mapping[str, object], metrics: Mapping[str, Any], **words: Any
) -> PendingSave:
    """Save ``state`` as of ``step``, and report the metrics to Ray. Every worker calls it.

    Args:
        step: training step, >= 0.
        state: as for ``CheckpointManager.save``.
        metrics: reported as they are; those that are numbers are saved with the state.
        words: further ones for ``CheckpointManager.save``, such as ``pin=True``.

    Returns:
        the save on its way. What Ray is told names it while it is: it exists for readers once it is committed.

    Raises:
        CloudCkptError: as ``CheckpointManager.save``.
    """
    numbers = {n: v for n, v in metrics.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    pending = ckpts.save(step, state, metrics=numbers, **words)
    ray.train.report({**metrics, _STEP: step, _URL: pending.checkpoint.url})
    return pending
