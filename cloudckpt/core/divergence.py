"""Has training diverged? A fast and a slow moving average of one metric, and how far the fast one is on the bad side.

A single bad value moves neither much; a lasting excursion pulls the fast one away. What is no finite number is a
divergence at once, and moves no average.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cloudckpt.core.model import Checkpoint, State
from cloudckpt.errors import ConfigError

__all__ = ["Averages", "Divergence", "DivergenceRule", "observe", "saved_since"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DivergenceRule:
    """What counts as a divergence.

    Attributes:
        mode: "min" if lower values are better, "max" if higher ones are.
        threshold: how far apart the averages must be, in units of the metric.
        short_alpha: the weight of a new value in the fast average, 0 to 1.
        long_alpha: the same in the slow one; less.

    Raises:
        ConfigError: one of them cannot be used.
    """

    mode: str
    threshold: float = 2.0
    short_alpha: float = 0.1
    long_alpha: float = 0.01

    def __post_init__(self) -> None:
        if self.mode not in {"min", "max"}:
            raise ConfigError(f'mode={self.mode!r}: write "min" if lower is better, "max" if higher is')
        if not (math.isfinite(self.threshold) and self.threshold > 0):
            raise ConfigError(f"threshold={self.threshold!r}: write a positive number, in units of the metric")
        if not 0 < self.long_alpha < self.short_alpha <= 1:
            raise ConfigError(
                f"short_alpha={self.short_alpha!r}, long_alpha={self.long_alpha!r}: both are above 0 and at most 1, "
                "and the short one is the larger: otherwise it never runs ahead"
            )

    def worse_by(self, value: float, than: float) -> float:
        """How much worse one value is than another; negative if it is better."""
        return value - than if self.mode == "min" else than - value


@dataclass(frozen=True, slots=True, kw_only=True)
class Averages:
    """What is remembered from value to value.

    Attributes:
        short: the fast average; None before the first value.
        long: the slow one.
        since: the step at which the values of now became worse than the slow average by the threshold; None if they are
            not.
    """

    short: float | None = None
    long: float | None = None
    since: int | None = None

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {"short": self.short, "long": self.long, "since": self.since}

    @classmethod
    def from_json(cls, said: Mapping[str, Any]) -> Averages:
        """The same again."""
        return cls(short=said["short"], long=said["long"], since=said["since"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Divergence:
    """Training has diverged.

    Attributes:
        step: at which it was found.
        value: the metric there.
        since: the step from which on it was bad already: what was saved from there on is not to be gone on with.
        reason: why, for people.
    """

    step: int
    value: float
    since: int
    reason: str


def observe(rule: DivergenceRule, before: Averages, step: int, value: float) -> tuple[Averages, Divergence | None]:
    """The averages with one more value, and whether that makes it a divergence."""
    if not math.isfinite(value):
        since = step if before.since is None else before.since
        now = Averages(short=before.short, long=before.long, since=since)
        return now, Divergence(step=step, value=value, since=since, reason=f"{value} is no finite number")
    if before.short is None or before.long is None:
        return Averages(short=value, long=value), None
    is_bad = rule.worse_by(value, before.long) >= rule.threshold
    bad_since = (step if before.since is None else before.since) if is_bad else None
    short = before.short + rule.short_alpha * (value - before.short)
    long = before.long + rule.long_alpha * (value - before.long)
    now = Averages(short=short, long=long, since=bad_since)
    apart = rule.worse_by(short, long)
    if apart < rule.threshold:
        return now, None
    reason = f"its short average {short:.4f} is worse than its long one {long:.4f} by {apart:.4f} >= {rule.threshold:g}"
    return now, Divergence(step=step, value=value, since=step if bad_since is None else bad_since, reason=reason)


def saved_since(entries: Sequence[Checkpoint], since: int) -> list[Checkpoint]:
    """What this run of training has saved from a step on, newest first.

    Args:
        entries: all entries of the run, by rising seq. Looking back from the newest, a higher step than the one after
            it belongs to an earlier attempt, which training went back from.
    """
    found: list[Checkpoint] = []
    for entry in reversed(entries):
        if entry.state is State.RETIRED:
            continue
        if entry.step < since or (found and entry.step > found[-1].step):
            break
        found.append(entry)
    return found
