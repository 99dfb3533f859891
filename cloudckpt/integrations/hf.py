"""Hugging Face ``Trainer``: what it writes to ``checkpoint-<step>`` goes to the run, and comes back to be resumed from.

    callback = CloudCheckpointCallback("s3://bucket/runs/demo", keep_best=3, keep_last=2)
    trainer = Trainer(model, args, callbacks=[callback], ...)
    trainer.train(resume_from_checkpoint=callback.pull())

The trainer goes on writing and rotating its folders on the local disk. Every rank takes part in each save, and when
``on_save`` returns the files are copied: a folder that is rotated away while it is uploaded does no harm.
"""

# ruff: noqa: ARG002 - hooks have the shape in which the trainer calls them

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from cloudckpt.diverging import DivergenceDetector
from cloudckpt.errors import ConfigError
from cloudckpt.manager import CheckpointManager
from cloudckpt.storage import Storage

__all__ = ["CloudCheckpointCallback"]

logger = logging.getLogger("cloudckpt")


class CloudCheckpointCallback(TrainerCallback):
    """Saves each of the trainer's checkpoints to a run, with what was evaluated at its step.

    Without ``monitor=`` the metric and its direction are the trainer's own (``metric_for_best_model`` and
    ``greater_is_better``), and the log says which.

    Args:
        root: of the run: a folder, a URL or a storage.
        divergence: ends the training when it finds something, and keeps the outcome from being resumed from. Training
            losses reach it only with ``logging_nan_inf_filter=False`` as they are.
        words: as for ``CheckpointManager``.
    """

    def __init__(
        self,
        root: str | os.PathLike[str] | Storage,
        *,
        divergence: DivergenceDetector | None = None,
        **words: Any,
    ) -> None:
        self._root = root
        self._words = words
        self._divergence = divergence
        self._ckpts: CheckpointManager | None = None
        self._output_dir: str | None = None
        self._measured: tuple[int, dict[str, float]] = (-1, {})
        self._saved_at = -1

    @property
    def ckpts(self) -> CheckpointManager:
        """The run; a new manager of it for each training."""
        if self._ckpts is None:
            self._ckpts = CheckpointManager(self._root, **self._words)
        return self._ckpts

    def pull(self, into: str | os.PathLike[str] | None = None, select: str | int = "latest") -> str | None:
        """The checkpoint to resume from, as a folder of this machine: for ``train(resume_from_checkpoint=...)``.

        Call it once the trainer is made, on every rank. None on a first run: then the trainer starts from scratch.

        Args:
            into: where ``checkpoint-<step>`` is put; the trainer's ``output_dir`` by default.
            select: ``latest``, ``best``, a step, ``tag:NAME`` or a save id.

        Raises:
            ConfigError: no trainer has this callback yet, and ``into`` was not given.
            CloudCkptError: as ``CheckpointManager.restore_folder``. Nothing is silently started from the beginning.
        """
        where = into if into is not None else self._output_dir
        if where is None:
            raise ConfigError("pull() has no folder yet: make the Trainer with this callback first, or pass into=")
        found = self.ckpts.restore_folder(where, select)
        return None if found is None else str(found)

    def close(self) -> None:
        """Wait for the save in flight, and close the run. The end of ``train()`` does it too."""
        ckpts, self._ckpts = self._ckpts, None
        if ckpts is not None:
            ckpts.close()

    # -- the trainer's events --------------------------------------------------------------------------------

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The trainer is made: take over what it says about metrics, unless we were told something else."""
        self._output_dir = args.output_dir
        metric = getattr(args, "metric_for_best_model", None)
        if "monitor" not in self._words and metric and args.greater_is_better is not None:
            monitor = metric if metric.startswith("eval_") else f"eval_{metric}"
            mode = "max" if args.greater_is_better else "min"
            self._words = {**self._words, "monitor": monitor, "mode": self._words.get("mode", mode)}
            if state.is_world_process_zero:
                logger.info(
                    "monitor=%r, mode=%r: metric_for_best_model and greater_is_better say so; pass both to decide",
                    monitor,
                    self._words["mode"],
                )

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        """Remember what was measured, for the checkpoint of this step."""
        found = _numbers(metrics)
        step, known = self._measured
        # Several evaluation sets are reported one after the other.
        self._measured = (state.global_step, {**known, **found} if step == state.global_step else found)
        if self._saved_at == state.global_step and self.ckpts.is_rank_zero:
            self.ckpts.report_metrics(state.global_step, found)
        self._watch(state, control, found)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Look at the training loss, if that is what is watched."""
        self._watch(state, control, _numbers(logs))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The trainer has written its folder: take it in. Collective, and back once the files are copied."""
        step, metrics = self._measured
        folder = Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
        self.ckpts.save_folder(state.global_step, folder, metrics=metrics if step == state.global_step else {})
        self._saved_at = state.global_step
        if self._divergence is not None:
            self._divergence.mark(self.ckpts)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Wait until everything is committed: what ``train()`` has returned from is safe."""
        self.close()

    def _watch(self, state: Any, control: Any, metrics: Mapping[str, float]) -> None:
        detector = self._divergence
        if detector is None or detector.divergence is not None:
            return
        if detector.update(state.global_step, metrics) is not None:
            control.should_training_stop = True
            detector.mark(self.ckpts)


def _numbers(metrics: Any) -> dict[str, float]:
    """The metrics that are numbers; a trainer logs other things as well."""
    given = metrics if isinstance(metrics, Mapping) else {}
    return {str(name): float(v) for name, v in given.items() if isinstance(v, int | float) and not isinstance(v, bool)}
