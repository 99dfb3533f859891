"""Tell an experiment tracker where each checkpoint is: listeners for Weights & Biases and for MLflow.

    CheckpointManager(root, listeners=[WandbReferences(wandb.init(project="demo"))])

The bytes stay in the run, under its own rules; the tracker has a reference, and the page of each run shows it.
"""

from __future__ import annotations

from typing import Any

from cloudckpt.events import BestChanged, Event, SaveCommitted


class WandbReferences:
    """Logs each commit as a version of one artifact that refers to it, and moves the alias ``best``."""

    def __init__(self, run: Any) -> None:
        self._run = run

    def __call__(self, event: Event, /) -> None:
        if isinstance(event, SaveCommitted):
            self._log(event.checkpoint.url, ["latest", f"step-{event.checkpoint.step}"], dict(event.checkpoint.metrics))
        elif isinstance(event, BestChanged):
            self._log(event.best[0].url, ["best"], {event.metric: event.values[0]})

    def _log(self, url: str, aliases: list[str], metadata: dict[str, float]) -> None:
        import wandb  # noqa: PLC0415 - whoever uses this has it

        artifact = wandb.Artifact(f"checkpoint-{self._run.id}", type="checkpoint", metadata={**metadata, "url": url})
        # Without checksums: the run has its own, and W&B would list the bucket for each.
        artifact.add_reference(url, checksum=False)
        self._run.log_artifact(artifact, aliases=aliases)


class MlflowReferences:
    """Sets tags of the active MLflow run: which checkpoint is the newest, and which the best."""

    def __call__(self, event: Event, /) -> None:
        import mlflow  # noqa: PLC0415 - whoever uses this has it

        if isinstance(event, SaveCommitted):
            checkpoint = event.checkpoint
            mlflow.set_tag("cloudckpt.latest", checkpoint.url)
            mlflow.log_metric("checkpoint_seconds", event.seconds, step=checkpoint.step)
        elif isinstance(event, BestChanged):
            mlflow.set_tag("cloudckpt.best", event.best[0].url)
            mlflow.set_tag("cloudckpt.best_value", f"{event.metric}={event.values[0]}")
