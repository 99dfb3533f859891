"""Notices that training has diverged, and sees to it that nobody goes on with what came out of it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, SupportsFloat

from cloudckpt.core.arguments import checked_label, checked_step
from cloudckpt.core.divergence import Averages, Divergence, DivergenceRule, observe, saved_since
from cloudckpt.core.model import Checkpoint
from cloudckpt.core.text import format_metric
from cloudckpt.errors import CheckpointNotFoundError

if TYPE_CHECKING:
    from cloudckpt.manager import CheckpointManager

__all__ = ["DIVERGED", "DivergenceDetector"]

logger = logging.getLogger("cloudckpt")

#: The mark of what came out of a divergence.
DIVERGED: Final = "diverged"


class DivergenceDetector:
    """Watches one metric; says so when its fast moving average runs away from the slow one, or it is no number.

    ``if detector.update(step, metrics): break`` ends the loop, and ``detector.mark(ckpts)`` marks what was saved since
    the metric went bad, so that neither ``latest`` nor ``best`` means it. The best checkpoints stay what they are.

    It has a state dict: saved as a component beside the model it goes on where it was.

    Args:
        monitor: the metric; ``eval_<monitor>`` stands in for it where only that is reported.
        mode: "min" if lower is better, "max" if higher is; never guessed.
        threshold: how far apart the averages must be, in units of the metric.
        short_alpha: the weight of a new value in the fast average.
        long_alpha: the same in the slow one; less.

    Raises:
        ConfigError: one of them cannot be used.
    """

    def __init__(
        self,
        monitor: str,
        mode: str,
        *,
        threshold: float = 2.0,
        short_alpha: float = 0.1,
        long_alpha: float = 0.01,
    ) -> None:
        self.monitor = checked_label(monitor, "a metric's name")
        self.rule = DivergenceRule(mode=mode, threshold=threshold, short_alpha=short_alpha, long_alpha=long_alpha)
        self._averages = Averages()
        self._name: str | None = None
        self._last_step: int | None = None
        self._found: Divergence | None = None
        self._told = False

    @property
    def divergence(self) -> Divergence | None:
        """What was found; None as long as all is well. It stays found."""
        return self._found

    def update(self, step: int, metrics: Mapping[str, SupportsFloat]) -> Divergence | None:
        """Take note of the metrics of a step; a step counts once. Returns what is, or was, found.

        Raises:
            ConfigError: a step that is none.
        """
        at = checked_step(step)
        name = self._name or next((n for n in (self.monitor, f"eval_{self.monitor}") if n in metrics), None)
        if self._found is None and name is not None and name in metrics and at != self._last_step:
            # One of the two names from here on: a training and an evaluation loss in turn would be no series.
            self._name, self._last_step = name, at
            self._averages, self._found = observe(self.rule, self._averages, at, float(metrics[name]))
        return self._found

    def mark(self, ckpts: CheckpointManager) -> tuple[Checkpoint, ...]:
        """Mark what was saved since the metric went bad as "diverged", and log what was done.

        Call it once a divergence is found, and after any later save; nothing is marked twice. Of several ranks only
        rank zero does anything.

        Returns:
            what is newly marked, newest first.

        Raises:
            SaveError: an earlier save failed and nobody was told yet.
            StorageError: the store refused.
            ConflictError: the run was changed in a way that this process cannot build upon.
        """
        found = self._found
        if found is None or not ckpts.is_rank_zero:
            return ()
        if not self._told:
            self._told = True
            said = f"{self.monitor}={format_metric(found.value)} at step {found.step}: {found.reason}"
            logger.warning("Training divergence detected! %s", said)
        ckpts.wait()  # what is still being announced is in no manifest yet
        marked = []
        for entry in saved_since(ckpts.checkpoints(state=None), found.since):
            if DIVERGED not in entry.marks:
                with contextlib.suppress(CheckpointNotFoundError):  # retired meanwhile: as good as marked
                    marked.append(ckpts.mark(entry.name, DIVERGED))
        if marked:
            latest = ckpts.latest()
            logger.warning(
                "marked as diverged, since the metric is bad from step %d on: %s; latest is now %s",
                found.since,
                ", ".join(entry.name for entry in marked),
                latest.name if latest is not None else "none: what is left is loaded by name only",
            )
        return tuple(marked)

    def state_dict(self) -> dict[str, Any]:
        """The averages. Not what was found: whoever goes on from a checkpoint wants to go on."""
        return {"averages": self._averages.to_json(), "name": self._name, "last_step": self._last_step}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on with these averages."""
        self._averages = Averages.from_json(state_dict["averages"])
        self._name = state_dict["name"]
        self._last_step = state_dict["last_step"]
        self._found, self._told = None, False
