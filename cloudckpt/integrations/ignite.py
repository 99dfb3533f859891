"""PyTorch-Ignite: a save handler for its ``Checkpoint``, so that a run's rules decide what stays.

    handler = CloudSaver(ckpts, trainer)
    to_save = {"model": model, "optimizer": optimizer, "trainer": trainer}
    trainer.add_event_handler(Events.EPOCH_COMPLETED, Checkpoint(to_save, handler, n_saved=None))
    if (values := handler.load()) is not None:
        Checkpoint.load_objects(to_load=to_save, checkpoint=values)
    trainer.run(loader, max_epochs=10)

Leave ``n_saved=None``: Ignite would otherwise decide by itself which checkpoints reach the handler at all.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from ignite.engine import Events
from ignite.handlers.checkpoint import BaseSaveHandler

from cloudckpt.manager import CheckpointManager

__all__ = ["CloudSaver"]

logger = logging.getLogger("cloudckpt")


class CloudSaver(BaseSaveHandler):
    """Saves what Ignite's ``Checkpoint`` collects, each object a component, as of the trainer's iteration.

    Every rank calls it, as Ignite has every rank call its handler. A score with a name becomes a metric of that name,
    and every number among the trainer's and the evaluator's metrics as well; of the evaluator's those that it measured
    at the very iteration that is saved, before or after the save.

    Args:
        ckpts: the run; close it when the training has ended.
        trainer: the engine whose iteration is the step.
        evaluator: an engine whose metrics belong to the checkpoint.
    """

    def __init__(self, ckpts: CheckpointManager, trainer: Any, evaluator: Any = None) -> None:
        self._ckpts = ckpts
        self._trainer = trainer
        self._evaluator = evaluator
        self._evaluated_at = self._saved_at = -1
        if evaluator is not None:
            evaluator.add_event_handler(Events.COMPLETED, self._evaluated)

    def __call__(self, checkpoint: Mapping[str, Any], filename: str, metadata: Mapping[str, Any] | None = None) -> None:
        """Save it; back once it is copied, and uploaded in the background."""
        state: Mapping[str, Any] = checkpoint
        said = metadata or {}
        name = said.get("basename", "checkpoint")
        if name != "checkpoint" and not name.endswith("_checkpoint"):
            state = {name: checkpoint}  # of a single object Ignite passes on its bare state
        step = self._trainer.state.iteration
        # An engine goes on to show what it measured last, at whichever step that was.
        metrics = {**_numbers(self._trainer), **(_numbers(self._evaluator) if self._evaluated_at == step else {})}
        if said.get("score_name"):
            metrics[said["score_name"]] = float(said["priority"])
        self._ckpts.save(step, state, metrics=metrics, tags=[filename])
        self._saved_at = step

    def _evaluated(self, engine: Any) -> None:  # noqa: ARG002 - a handler's shape
        """The evaluator has measured: that is of this step, which may be saved already."""
        self._evaluated_at = self._trainer.state.iteration
        if self._saved_at == self._evaluated_at and self._ckpts.is_rank_zero:
            self._ckpts.report_metrics(self._saved_at, _numbers(self._evaluator))

    def remove(self, filename: str) -> None:
        """Ignite needs it no longer; whether it goes is for the run's rules to say."""
        logger.debug("released %s: the run's own rules decide what stays", filename)

    def load(self, select: str | int = "latest") -> Any:
        """What was collected, for ``Checkpoint.load_objects``; None on a first run. Every rank calls it.

        Raises:
            CloudCkptError: as ``CheckpointManager.restore``.
        """
        values = self._ckpts.restore_values(select)
        if values is None:
            return None
        return next(iter(values.values())) if len(values) == 1 else values


def _numbers(engine: Any) -> dict[str, float]:
    metrics = engine.state.metrics if engine is not None else {}
    return {str(name): float(v) for name, v in metrics.items() if isinstance(v, int | float)}
