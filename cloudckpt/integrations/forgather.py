"""forgather: its ``CheckpointInterface``, with its arguments and its log lines, over a run.

    checkpoints = ForgatherCheckpoints("s3://bucket/runs/demo", trainer, model, save_total_limit=3,
                                       preserve_best_model=True, best_model_metric="loss", preserve_n_best=2)

Recent and best are kept side by side, as its documentation has it; an old best leaves only when its successor is
committed. State that is shared by a group or a node only is refused by name.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cloudckpt.core.retention import metric_value
from cloudckpt.errors import CheckpointNotFoundError, ConfigError
from cloudckpt.manager import CheckpointManager
from cloudckpt.storage import Storage
from cloudckpt.tensors.per_rank import PerRank

__all__ = ["ForgatherCheckpoints"]

logger = logging.getLogger("cloudckpt.forgather")

_STEP = re.compile(r"(?:.*[/\\])?(?:checkpoint-)?(\d+)(?:\.([0-9a-f]{8}))?/?")


class ForgatherCheckpoints:
    """What forgather's trainer asks of a checkpoint manager.

    Args:
        root: of the run: a folder, a URL or a storage.
        stateful_provider: the trainer, or whatever has ``get_state_components()``.
        model: its model, unless that is among the components.
        output_dir: where the trainer writes its own small files; what ``save_checkpoint`` returns is named after it.
        save_total_limit: how many recent ones stay; None for all.
        preserve_best_model: whether the best are kept, besides.
        best_model_metric: by which metric; ``eval_<metric>`` stands in for it.
        best_model_greater_is_better: its direction. Only of a loss it need not be said.
        preserve_n_best: how many.
        words: further ones for ``CheckpointManager``.

    Raises:
        ConfigError: the direction is not known.
    """

    def __init__(
        self,
        root: str | os.PathLike[str] | Storage,
        stateful_provider: Any,
        model: Any,
        *,
        output_dir: str | None = None,
        save_total_limit: int | None = 2,
        preserve_best_model: bool = False,
        best_model_metric: str = "loss",
        best_model_greater_is_better: bool | None = None,
        preserve_n_best: int = 1,
        **words: Any,
    ) -> None:
        best: dict[str, Any] = {}
        if preserve_best_model:
            mode = _mode(best_model_metric, best_model_greater_is_better)
            best = {"monitor": best_model_metric, "mode": mode, "keep_best": preserve_n_best}
        self.ckpts = CheckpointManager(root, **{"keep_last": save_total_limit, **best, **words})
        self.trainer: Any = None  # forgather's trainer sets it
        self.preserve_n_best = preserve_n_best
        self._provider = stateful_provider
        self._model = model
        self._output_dir = output_dir
        self._measured: dict[int, dict[str, float]] = {}

    @property
    def best_checkpoints(self) -> list[tuple[str, float]]:
        """The committed best, best first: URL and value."""
        _, values, best = self.ckpts.best_list()
        return [(c.url, value) for c, value in zip(best, values, strict=True)]

    def update_best_checkpoints(  # noqa: PLR0917 - forgather's signature
        self,
        checkpoint_path: str,
        metrics: Mapping[str, float],
        metric_key: str,
        greater_is_better: bool | None,  # noqa: FBT001
        preserve_n_best: int,
        is_world_process_zero: bool = True,  # noqa: FBT001, FBT002
    ) -> bool:
        """Take note of what was measured, before the save of this path; whether it will be one of the best.

        Raises:
            SaveError: an earlier save failed and nobody was told yet.
        """
        self._measured[self._step(checkpoint_path)] = dict(metrics)
        self.ckpts.wait()  # as the save that follows would: what is still on its way counts
        value = metric_value(metrics, metric_key)
        if value is None:
            if is_world_process_zero:
                given = list(metrics)
                logger.warning("Metric %r not found in evaluation metrics. Available: %s", metric_key, given)
            return False
        _, values, _ = self.ckpts.best_list(metric_key)
        sign = 1 if _mode(metric_key, greater_is_better) == "max" else -1
        return len(values) < preserve_n_best or any(sign * value > sign * known for known in values)

    def get_best_checkpoints_summary(self, metric_key: str = "loss") -> str:
        """The committed best, as text."""
        return self.ckpts.get_best_checkpoints_summary(metric_key)

    def set_best_checkpoint(self, best_checkpoint: str) -> None:
        """Keep this one, whatever the rules say (forgather's older interface)."""
        if self.ckpts.is_rank_zero:
            self.ckpts.pin(self._selector(best_checkpoint))

    def save_checkpoint(self, checkpoint_path: str | None = None, checkpoint_id: str | None = None) -> str:
        """Save everything; back once it is copied. Collective. Gives the path that forgather knows it by."""
        named = checkpoint_path or checkpoint_id
        step = self._step(named) if named is not None else self._global_step()
        if self.ckpts.is_rank_zero:
            logger.info("Saving checkpoint at %s/checkpoint-%d", self.ckpts.url, step)
        pending = self.ckpts.save(step, self._state(), metrics=self._measured.pop(step, None))
        if checkpoint_path is None and self._output_dir is not None:
            return str(Path(self._output_dir, "checkpoints", f"checkpoint-{step}"))
        return checkpoint_path or pending.checkpoint.url

    def resolve_checkpoint_path(self, checkpoint_path: str | None) -> str | None:
        """The URL of the checkpoint that is meant, the newest by default; None, with a warning, if there is none."""
        try:
            select = "latest" if checkpoint_path is None else self._selector(checkpoint_path)
            return self.ckpts.select(select).url
        except (CheckpointNotFoundError, ConfigError) as exc:
            if checkpoint_path is None and self.ckpts.checkpoints():
                raise  # there are some, and none is usable: nothing to be taken for a first run
            logger.warning("No model checkpoints found in %s: %s", self.ckpts.url, exc)
            return None

    def load_checkpoint(self, checkpoint_path: str | None = None) -> None:
        """Restore everything from it, the newest by default. Collective.

        Raises:
            CheckpointNotFoundError: there is none.
            CloudCkptError: as ``CheckpointManager.restore``.
        """
        select = "latest" if checkpoint_path is None else self._selector(checkpoint_path)
        if self.ckpts.restore(self._state(), select) is None:
            raise CheckpointNotFoundError(f"Could not load checkpoint: {self.ckpts.url} has none yet")

    def save_model(
        self,
        output_dir: str | os.PathLike[str] | None = None,
        overwrite_output_dir: bool = False,  # noqa: FBT001, FBT002 - forgather's signature
    ) -> None:
        """Write the model as ``from_pretrained`` reads it, with rank zero, to a folder of this machine.

        Raises:
            ConfigError: a model is there already, or no folder is known.
        """
        target = Path(output_dir or self._output_dir or "")
        if not (output_dir or self._output_dir):
            raise ConfigError("save_model() has no folder: pass output_dir")
        if not overwrite_output_dir and any(target.glob("*.safetensors")):
            raise ConfigError(f"Would overwrite output model in output directory {target}: pass overwrite_output_dir")
        if self.ckpts.is_rank_zero:
            self._model.save_pretrained(target)

    def _state(self) -> dict[str, Any]:
        get: Any = getattr(self._provider, "get_active_state_components", self._provider.get_state_components)
        components: Iterable[Any] = get()
        state = {component.key: _shared(component) for component in components}
        return state if "model" in state else {"model": self._model, **state}

    def _step(self, path: str) -> int:
        found = _STEP.fullmatch(str(path))
        return int(found[1]) if found else self._global_step()

    def _global_step(self) -> int:
        source = self.trainer if self.trainer is not None else self._provider
        return int(source.state.global_step)

    @staticmethod
    def _selector(path: str) -> str | int:
        found = _STEP.fullmatch(path)
        if found is None:
            return path
        # A step that was saved again has several: a URL means the one that it names.
        return f"checkpoint-{int(found[1])}.{found[2]}" if found[2] else int(found[1])


def _shared(component: Any) -> Any:
    pattern = str(component.sharing_pattern.value)
    if pattern in {"global", "replicated"}:
        return component.stateful
    if pattern == "per_rank":
        # A stage's weights have names of their own; everything else has the same names on every rank.
        return component.stateful if component.key == "model" else PerRank(component.stateful)
    raise ConfigError(f"{component.key} is shared {pattern}, which is not supported: declare it global or per_rank")


def _mode(metric: str, greater_is_better: bool | None) -> str:  # noqa: FBT001 - forgather's setting
    if greater_is_better is None:
        if metric.removeprefix("eval_") != "loss" and not metric.endswith("_loss"):
            raise ConfigError(f"{metric!r} needs a direction: say best_model_greater_is_better=True or False")
        greater_is_better = False
    return "max" if greater_is_better else "min"
