"""Lightning: a callback that says when to save, a plugin that saves to a run, and one retention for all of it.

    cloud = CloudCheckpoint("s3://bucket/runs/demo", monitor="val_loss", mode="min", keep_best=2, keep_last=1)
    trainer = Trainer(callbacks=[cloud], plugins=[cloud.io], ...)
    trainer.fit(model, ckpt_path=cloud.latest())

As Lightning has it, rank zero alone saves what it is given; every rank loads.
"""

# ruff: noqa: ARG002 - hooks have the shape in which the trainer calls them

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any

from cloudckpt.diverging import DivergenceDetector
from cloudckpt.errors import ConfigError
from cloudckpt.integrations.lightning_io import CloudCheckpointIO, host_module
from cloudckpt.storage import Storage

__all__ = ["CloudCheckpoint", "CloudCheckpointIO"]

logger = logging.getLogger("cloudckpt")

_AsyncCheckpointIO: Any = host_module("plugins").AsyncCheckpointIO
_Checkpoint: Any = host_module("callbacks").Checkpoint
_ModelCheckpoint: Any = host_module("callbacks").ModelCheckpoint


class CloudCheckpoint(_Checkpoint):
    """Saves at the end of each epoch, or every so many steps, with all metrics that were logged for that step.

    Pass its ``io`` as a plugin of the same trainer. No ``ModelCheckpoint`` is needed beside it.

    Args:
        root: of the run: a folder, a URL or a storage.
        every_n_train_steps: how often it saves; None for the end of each epoch, or after each validation within it.
        divergence: ends the training when it finds something, and keeps the outcome from being resumed from.
        words: as for ``CheckpointManager``.
    """

    def __init__(
        self,
        root: str | os.PathLike[str] | Storage,
        *,
        every_n_train_steps: int | None = None,
        divergence: DivergenceDetector | None = None,
        **words: Any,
    ) -> None:
        if every_n_train_steps is not None and every_n_train_steps < 1:
            raise ConfigError(f"every_n_train_steps={every_n_train_steps}: write a positive number, or leave it out")
        super().__init__()
        self.io = CloudCheckpointIO(root, **words)
        self._every = every_n_train_steps
        self._divergence = divergence
        self._saved_at = -1
        #: Metric of a validation -> the step at which it was measured last.
        self._measured: dict[str, int] = {}
        self._known_before: dict[str, Any] = {}

    def latest(self, select: str | int = "latest") -> str | None:
        """The name of the checkpoint to go on from, for ``fit(ckpt_path=...)``; None on a first run.

        Raises:
            CheckpointNotFoundError: there are checkpoints, and none of them can be meant.
        """
        run = self.io.reader()
        if select in {"latest", "best"} and not run.checkpoints():
            return None
        return run.select(select).name

    @property
    def best_model_path(self) -> str:
        """What Lightning means by ``ckpt_path="best"``."""
        best = self.io.reader().best()
        return best.name if best is not None else ""

    # -- Lightning's hooks -----------------------------------------------------------------------------------

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Look whether the trainer saves through us, and through us only."""
        io = trainer.strategy.checkpoint_io
        elsewhere = False
        while io is not self.io and hasattr(io, "checkpoint_io"):
            elsewhere = elsewhere or isinstance(io, _AsyncCheckpointIO)
            io = io.checkpoint_io
        if io is not self.io:
            raise ConfigError("CloudCheckpoint saves nothing without its plugin: Trainer(plugins=[cloud.io], ...)")
        if elsewhere:
            # It would save in a thread, where the metrics of this step are gone, and would not have the run closed.
            raise ConfigError(
                "saves are in the background already: pass Trainer(plugins=[cloud.io], ...) without AsyncCheckpointIO"
            )
        self.io.is_resuming = stage == "fit"
        if stage == "fit":
            self._saved_at, self._measured = -1, {}
        others = [c for c in trainer.callbacks if isinstance(c, _ModelCheckpoint)]
        if others and trainer.is_global_zero:
            logger.warning("ModelCheckpoint saves to the same run; its save_top_k deletes nothing: keep_best= decides")

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Say so if a run that can be gone on with is begun anew: its checkpoints are let go of one by one.

        With ``ckpt_path="last"`` Lightning looks for files of ``ModelCheckpoint``'s, finds none, and starts at step 0.
        """
        if not trainer.is_global_zero or trainer.global_step or trainer.fast_dev_run:
            return
        if (newest := self.io.reader().latest()) is not None:
            logger.warning(
                "training starts at step 0, and %s is there: to go on from it, pass fit(ckpt_path=cloud.latest())",
                newest.url,
            )

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any, **kwargs: Any) -> None:
        """Save, if so many steps were made."""
        if self._every is not None and trainer.global_step % self._every == 0:
            self._save(trainer)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Save, unless the steps are counted or it validates within the epoch."""
        if self._every is None and not _validates_within(trainer):
            self._save(trainer)

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Mapping[str, Any]) -> None:
        """Take note that the step which is gone on from is in the run.

        Under ``max_steps`` Lightning ends the epoch of that step a second time, without another validation: a save
        there would be the same checkpoint again, without its metrics.
        """
        if self.io.is_resuming:
            self._saved_at = int(checkpoint["global_step"])

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Remember what was known before."""
        self._known_before = dict(trainer.callback_metrics)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Take note of what was measured; save, if it is time; look whether training has diverged."""
        if trainer.sanity_checking or not self.io.is_resuming:
            return
        # What was measured is a new object, also where its number is the same; what was not is the one from before.
        known, before = trainer.callback_metrics, self._known_before
        measured = {name for name, value in known.items() if value is not before.get(name)}
        self._known_before = {}
        self._measured |= dict.fromkeys(measured, trainer.global_step)
        metrics = self._of_this_step(trainer)
        if self._every is None and _validates_within(trainer):
            self._save(trainer)
        elif self._saved_at == trainer.global_step and trainer.is_global_zero:
            self.io.ckpts.report_metrics(self._saved_at, {n: v for n, v in metrics.items() if n in measured})
        if self._divergence is not None:
            found = self._divergence.update(trainer.global_step, metrics)
            if trainer.strategy.reduce_boolean_decision(found is not None, all=False):
                trainer.should_stop = True
                self._mark(trainer)

    def _of_this_step(self, trainer: Any) -> dict[str, float]:
        """All metrics but those that a validation measured at another step: Lightning still has them."""
        step = trainer.global_step
        known = _numbers(trainer.callback_metrics)
        return {name: value for name, value in known.items() if self._measured.get(name, step) == step}

    def _save(self, trainer: Any) -> None:
        if trainer.fast_dev_run or trainer.global_step in {0, self._saved_at}:
            return
        self._saved_at = trainer.global_step
        self.io.metrics = self._of_this_step(trainer)
        try:
            trainer.save_checkpoint(f"step={trainer.global_step}.ckpt")
        finally:
            self.io.metrics = None
        self._mark(trainer)

    def _mark(self, trainer: Any) -> None:
        if self._divergence is not None and self._divergence.divergence is not None and trainer.is_global_zero:
            self._divergence.mark(self.io.ckpts)

    def state_dict(self) -> dict[str, Any]:
        """The detector's, if there is one."""
        return {} if self._divergence is None else {"divergence": self._divergence.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the detector was."""
        if self._divergence is not None and "divergence" in state_dict:
            self._divergence.load_state_dict(state_dict["divergence"])


def _validates_within(trainer: Any) -> bool:
    """Whether validation comes more often, or less often, than the epochs end, as ModelCheckpoint has it."""
    batches = trainer.num_val_batches
    some = sum(batches) if isinstance(batches, list) else batches
    return bool(some) and (trainer.check_val_every_n_epoch != 1 or trainer.val_check_interval != 1.0)


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items() if getattr(value, "numel", lambda: 1)() == 1}
