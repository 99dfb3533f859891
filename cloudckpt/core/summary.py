"""The best checkpoints, as the last lines of a training and ``Run.summary()`` list them."""

from __future__ import annotations

from collections.abc import Sequence

from cloudckpt.core.model import Checkpoint
from cloudckpt.core.text import format_metric

__all__ = ["summary_lines", "valued"]


def valued(metric: str, value: float) -> str:
    """``val_loss=0.2971``."""
    return f"{metric}={format_metric(value)}"


def summary_lines(metric: str | None, values: Sequence[float], best: Sequence[Checkpoint]) -> list[str]:
    """The best checkpoints, best first, with their values; a line that says so if there are none."""
    if not best or metric is None:
        return ["No best checkpoints tracked"]
    lines = [f"  {c.url}: {valued(metric, value)}" for c, value in zip(best, values, strict=True)]
    return [f"Best checkpoints (N={len(best)}):", *lines]
