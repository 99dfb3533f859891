"""What a run keeps: rules as values, the stored policy, and how words given today meet it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Final, TypeVar

from cloudckpt.errors import ConfigError

__all__ = [
    "INHERIT",
    "Inherit",
    "KeepBest",
    "KeepEvery",
    "KeepLast",
    "KeepWithin",
    "Policy",
    "PolicyWords",
    "resolve",
    "tightened",
]

MODES: Final = ("min", "max")

_T = TypeVar("_T")


def _is_count(value: object, *, least: int) -> bool:
    return type(value) is int and value >= least


class Inherit:
    """The type of ``INHERIT``: a policy word that was left out, so that the stored one rules."""

    def __repr__(self) -> str:
        return "INHERIT"


INHERIT: Final = Inherit()


@dataclass(frozen=True, slots=True)
class KeepLast:
    """Keep the newest ``n`` by commit order; None keeps all. At least 1: the newest is always kept."""

    n: int | None

    def __post_init__(self) -> None:
        if self.n is not None and not _is_count(self.n, least=1):
            raise ConfigError(
                f"keep_last={self.n!r}: expected an integer >= 1. The newest checkpoint is always kept, so write "
                "keep_last=1 for only that, or keep_last=None to keep all"
            )


@dataclass(frozen=True, slots=True)
class KeepBest:
    """Keep the best ``n`` by one metric; ``mode`` is "min" or "max"; 0 keeps none, None keeps all scored ones.

    NaN, infinities and missing values are never best. Equal values: the older one ranks first.
    """

    metric: str
    mode: str
    n: int | None = 1

    def __post_init__(self) -> None:
        if not isinstance(self.metric, str) or not self.metric:
            raise ConfigError('monitor needs the name of a metric, such as monitor="val_loss"')
        if self.mode not in MODES:
            raise ConfigError(f'mode={self.mode!r} for {self.metric!r}: write mode="min" or mode="max"')
        if self.n is not None and not _is_count(self.n, least=0):
            raise ConfigError(
                f"keep_best={self.n!r}: expected an integer >= 0; 0 keeps none for being best, None keeps all"
            )


@dataclass(frozen=True, slots=True)
class KeepEvery:
    """Keep every checkpoint whose step is a multiple of ``steps``."""

    steps: int

    def __post_init__(self) -> None:
        if not _is_count(self.steps, least=1):
            raise ConfigError(f"keep_every={self.steps!r}: expected an integer number of steps >= 1, or None")


@dataclass(frozen=True, slots=True)
class KeepWithin:
    """Keep what was committed at most ``seconds`` before the newest commit (not before now: no clock is read)."""

    seconds: float

    def __post_init__(self) -> None:
        if type(self.seconds) not in {int, float} or not 0 < self.seconds < math.inf:
            raise ConfigError(f"keep_within={self.seconds!r}: expected a positive number of seconds, or None")


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """The stored retention policy: a union of rules. What no rule keeps is retired by the next commit.

    Attributes:
        keep_last: newest N by commit order; None keeps all.
        keep_best: one rule per monitored metric, the first is *the* monitor.
        keep_every: every N steps, or None.
        keep_within_s: seconds before the newest commit, or None.
        keep_unscored: under a monitor, the newest N entries that lack the metric.
        extra: fields written by a newer version, carried along untouched.
    """

    keep_last: int | None = 3
    keep_best: tuple[KeepBest, ...] = ()
    keep_every: int | None = None
    keep_within_s: float | None = None
    keep_unscored: int = 2
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        KeepLast(self.keep_last)
        if self.keep_every is not None:
            KeepEvery(self.keep_every)
        if self.keep_within_s is not None:
            KeepWithin(self.keep_within_s)
        if not _is_count(self.keep_unscored, least=0):
            raise ConfigError(f"keep_unscored={self.keep_unscored!r}: expected an integer >= 0")
        metrics = [rule.metric for rule in self.keep_best]
        if twice := sorted({metric for metric in metrics if metrics.count(metric) > 1}):
            raise ConfigError(f"keep_best names {', '.join(map(repr, twice))} more than once: one rule per metric")

    @property
    def monitor(self) -> KeepBest | None:
        """The first best rule, which log lines and ``best()`` speak of."""
        return self.keep_best[0] if self.keep_best else None

    def __str__(self) -> str:
        words = ["keep all" if self.keep_last is None else f"last {self.keep_last}"]
        words += [f"best {'all' if r.n is None else r.n} by {r.metric} ({r.mode})" for r in self.keep_best]
        if self.keep_every is not None:
            words.append(f"every {self.keep_every} steps")
        if self.keep_within_s is not None:
            words.append(f"within {self.keep_within_s:g} s of the newest")
        return ", ".join(words)


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyWords:
    """The policy keywords as a user gave them; ``INHERIT`` for each one left out."""

    monitor: str | Inherit | None = INHERIT
    mode: str | Inherit | None = INHERIT
    keep_last: int | Inherit | None = INHERIT
    keep_best: int | Sequence[KeepBest] | Inherit | None = INHERIT
    keep_every: int | Inherit | None = INHERIT
    keep_within_s: float | Inherit | None = INHERIT
    keep_unscored: int | Inherit = INHERIT

    @property
    def silent(self) -> bool:
        """Whether nothing was given at all."""
        return all(isinstance(getattr(self, field.name), Inherit) for field in fields(self))


def resolve(words: PolicyWords, stored: Policy | None, *, has_entries: bool, change_policy: bool = False) -> Policy:
    """The policy that rules from now on: the words given, and the stored policy for each word left out.

    A new run (``stored`` is None) starts with the last 3 and, under a monitor, the best 1.

    Raises:
        ConfigError: a monitor without a direction; or another metric or direction than the stored one while
            the run has entries and ``change_policy`` is not set.
    """
    base = stored or Policy()
    policy = Policy(
        keep_last=_or(words.keep_last, base.keep_last),
        keep_best=_best_rules(words, base),
        keep_every=_or(words.keep_every, base.keep_every),
        keep_within_s=_or(words.keep_within_s, base.keep_within_s),
        keep_unscored=_or(words.keep_unscored, base.keep_unscored),
        extra=base.extra,
    )
    if stored and has_entries and not change_policy:
        _refuse_other_direction(stored, policy)
    return policy


def _or(given: _T | Inherit, stored: _T) -> _T:
    return stored if isinstance(given, Inherit) else given


def _best_rules(words: PolicyWords, base: Policy) -> tuple[KeepBest, ...]:
    if isinstance(words.keep_best, Sequence) and not isinstance(words.keep_best, str):
        if not all(isinstance(rule, KeepBest) for rule in words.keep_best):
            raise ConfigError('keep_best as a list needs rules in it, such as keep_best=[Best("val_loss", "min", 2)]')
        if not isinstance(words.monitor, Inherit) or not isinstance(words.mode, Inherit):
            raise ConfigError("keep_best as a list of rules names its own metrics: leave monitor and mode out")
        return tuple(words.keep_best)
    before = base.monitor
    monitor = _or(words.monitor, before.metric if before else None)
    if monitor is None:
        if not isinstance(words.keep_best, Inherit) and words.keep_best != 0:
            raise ConfigError(
                f'keep_best={words.keep_best} needs to know the metric: add monitor="val_loss", mode="min"'
            )
        if isinstance(words.mode, str):
            raise ConfigError(f'mode="{words.mode}" needs to know the metric: add monitor="val_loss"')
        return ()
    same = before is not None and monitor == before.metric
    mode = _or(words.mode, before.mode if before and same else None)
    if mode is None:
        raise ConfigError(_direction_hint(monitor))
    n = _or(words.keep_best, before.n if before and same else 1)
    return (KeepBest(monitor, mode, n), *(base.keep_best[1:] if same else ()))


def _direction_hint(monitor: str) -> str:
    last = monitor.replace("/", "_").rsplit("_", 1)[-1]
    hint = '; a loss is usually mode="min"' if last == "loss" else ""
    return f'monitor="{monitor}" needs a direction, nobody guesses it: add mode="min" or mode="max"{hint}'


def _refuse_other_direction(stored: Policy, policy: Policy) -> None:
    before = [(rule.metric, rule.mode) for rule in stored.keep_best]
    after = [(rule.metric, rule.mode) for rule in policy.keep_best]
    # A further rule keeps more, never less; another first one changes what "best" means.
    if before and (before[:1] != after[:1] or not set(before) <= set(after)):
        raise ConfigError(
            f"this run keeps {_spelled(before)}, and now {_spelled(after)} was asked for; its best checkpoints "
            "would be judged anew and some could be retired. Leave monitor and mode out to go on as before, or "
            "pass change_policy=True"
        )


def _spelled(rules: Sequence[tuple[str, str]]) -> str:
    return "its best by " + ", ".join(f"{metric} ({mode})" for metric, mode in rules) if rules else "no best"


def tightened(before: Policy, after: Policy) -> bool:
    """Whether ``after`` may retire what ``before`` would have kept."""
    best_after = {(rule.metric, rule.mode): rule.n for rule in after.keep_best}
    unscored_after = {rule.metric: after.keep_unscored for rule in after.keep_best}
    return (
        _fewer(before.keep_last, after.keep_last)
        or any(_fewer(rule.n, best_after.get((rule.metric, rule.mode), 0)) for rule in before.keep_best)
        or any(before.keep_unscored > unscored_after.get(rule.metric, 0) for rule in before.keep_best)
        or (before.keep_every is not None and (after.keep_every is None or before.keep_every % after.keep_every > 0))
        or (before.keep_within_s or 0) > (after.keep_within_s or 0)
    )


def _fewer(before: int | None, after: int | None) -> bool:
    return after is not None and (before is None or after < before)
