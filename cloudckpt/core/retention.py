"""Which checkpoints a policy keeps, and why: a plan is a value with a reason for each one.

The rules form a union: a checkpoint is kept if any rule keeps it. The best ones do not count against the last
ones, so ``keep_last=3, keep_best=2`` keeps between 3 and 5. Retention sees committed entries only; what is
pending protects nothing and evicts nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from cloudckpt.core.model import Best, Checkpoint, State
from cloudckpt.core.policy import KeepBest, KeepEvery, KeepLast, KeepWithin, Policy

__all__ = ["Decision", "PrunePlan", "metric_value", "plan_prune", "ranked"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """Keep or retire one checkpoint, and why. ``reasons`` say why it is kept, or why nothing keeps it."""

    checkpoint: Checkpoint
    keep: bool
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PrunePlan:
    """What retention decides about every committed checkpoint of a manifest, oldest first.

    Attributes:
        decisions: one per committed checkpoint.
        best: per best rule the ids it ranks within its number, best first.
        recent: the ids within the last-N rule, newest first.
    """

    decisions: tuple[Decision, ...]
    best: tuple[Best, ...]
    recent: tuple[str, ...]

    @property
    def kept(self) -> tuple[Checkpoint, ...]:
        """The checkpoints that stay."""
        return tuple(d.checkpoint for d in self.decisions if d.keep)

    @property
    def retired(self) -> tuple[Checkpoint, ...]:
        """The checkpoints that are let go."""
        return tuple(d.checkpoint for d in self.decisions if not d.keep)

    @property
    def size_bytes(self) -> int:
        """How many bytes carrying it out would free."""
        return sum(checkpoint.size_bytes for checkpoint in self.retired)

    def _repr_html_(self) -> str:
        """For notebooks."""
        from cloudckpt.core.markup import plan_html  # noqa: PLC0415 - which speaks of this class

        return plan_html(self)


def metric_value(metrics: Mapping[str, float], metric: str) -> float | None:
    """The value that ranks, or None. ``eval_<metric>`` stands in where ``metric`` is absent; 0.0 is a value.

    NaN and infinities give None: they are never best.
    """
    value = metrics.get(metric, metrics.get(f"eval_{metric}"))
    return value if value is not None and math.isfinite(value) else None


def _has_metric(metrics: Mapping[str, float], metric: str) -> bool:
    """Whether the metric was reported at all; NaN is a report too."""
    return metric in metrics or f"eval_{metric}" in metrics


def ranked(checkpoints: Iterable[Checkpoint], metric: str, mode: str) -> list[Checkpoint]:
    """The usable checkpoints that have the metric, best first; of equal ones the older first."""
    scored = [(value, c) for c in checkpoints if c.usable and (value := metric_value(c.metrics, metric)) is not None]
    sign = 1.0 if mode == "min" else -1.0
    return [c for _, c in sorted(scored, key=lambda pair: (sign * pair[0], pair[1].seq))]


def plan_prune(entries: Sequence[Checkpoint], policy: Policy, *, resumed_from: str | None = None) -> PrunePlan:
    """Decide about every committed entry.

    keep = newest usable, last N, best K per metric, every N steps, within a time of the newest, newest
    unscored, pinned, held, resumed-from, and whatever is damaged (only a person deletes that) (I5).
    """
    committed = sorted((e for e in entries if e.state is State.COMMITTED), key=lambda e: e.seq)
    usable = [e for e in committed if e.usable]
    reasons: dict[str, list[str]] = {e.id: [] for e in committed}
    lists = tuple(_best(rule, usable) for rule in policy.keep_best)
    recent = _last(KeepLast(policy.keep_last), usable)

    for best in lists:
        by = f" by {best.metric}" if len(lists) > 1 else ""
        _note(reasons, {save_id: f"best #{rank}{by}" for rank, save_id in enumerate(best.ids, 1)})
    _note(reasons, {save_id: f"last #{rank}" for rank, save_id in enumerate(recent, 1)})
    _note(reasons, _every(policy, usable))
    _note(reasons, _within(policy, usable))
    _note(reasons, _unscored(policy, usable))
    _note(reasons, _protected(committed, resumed_from))
    if not usable:
        # Everything left is marked or damaged: a run that has whole checkpoints never ends up without one.
        _note(reasons, {e.id: "newest" for e in [e for e in committed if e.damaged is None][-1:]})

    against = _why_nothing_keeps_it(policy)
    decisions = tuple(
        Decision(checkpoint=e, keep=bool(reasons[e.id]), reasons=tuple(reasons[e.id]) or _against(e, against))
        for e in committed
    )
    return PrunePlan(decisions=decisions, best=lists, recent=recent)


def _note(reasons: dict[str, list[str]], found: Mapping[str, str]) -> None:
    for save_id, reason in found.items():
        reasons[save_id].append(reason)


def _best(rule: KeepBest, usable: Sequence[Checkpoint]) -> Best:
    order = ranked(usable, rule.metric, rule.mode)
    return Best(metric=rule.metric, mode=rule.mode, ids=tuple(c.id for c in order[: rule.n]))


def _last(rule: KeepLast, usable: Sequence[Checkpoint]) -> tuple[str, ...]:
    return tuple(c.id for c in reversed(usable[-rule.n :] if rule.n is not None else usable))


def _every(policy: Policy, usable: Sequence[Checkpoint]) -> dict[str, str]:
    if policy.keep_every is None:
        return {}
    rule = KeepEvery(policy.keep_every)
    return {c.id: f"every {rule.steps} steps" for c in usable if c.step % rule.steps == 0}


def _within(policy: Policy, usable: Sequence[Checkpoint]) -> dict[str, str]:
    times = {c.id: datetime.fromisoformat(c.committed_at) for c in usable if c.committed_at is not None}
    if policy.keep_within_s is None or not times:
        return {}
    rule = KeepWithin(policy.keep_within_s)
    newest = max(times.values())
    ages = {save_id: (newest - at).total_seconds() for save_id, at in times.items()}
    return {save_id: f"within {rule.seconds:g} s" for save_id, age in ages.items() if age <= rule.seconds}


def _unscored(policy: Policy, usable: Sequence[Checkpoint]) -> dict[str, str]:
    kept: dict[str, str] = {}
    for rule in policy.keep_best:
        # NaN is no gap that a late report will fill: it must not take the place of one that is still evaluated.
        lacking = [c for c in reversed(usable) if not _has_metric(c.metrics, rule.metric)]
        kept |= {c.id: f"unscored #{rank}" for rank, c in enumerate(lacking[: policy.keep_unscored], 1)}
    return kept


def _protected(committed: Sequence[Checkpoint], resumed_from: str | None) -> dict[str, str]:
    why: dict[str, str] = {}
    for c in committed:
        words = [
            word
            for word, holds in [
                ("pinned", c.pinned),
                ("held", c.held),
                ("resumed from", c.id == resumed_from),
                ("damaged: only a person deletes it", c.damaged is not None),
            ]
            if holds
        ]
        if words:
            why[c.id] = ", ".join(words)
    return why


def _why_nothing_keeps_it(policy: Policy) -> tuple[str, ...]:
    words = [
        f"not in best {rule.n}" + (f" by {rule.metric}" if len(policy.keep_best) > 1 else "")
        for rule in policy.keep_best
        if rule.n
    ]
    if policy.keep_last is not None:
        words.append(f"not in last {policy.keep_last}")
    if policy.keep_every is not None:
        words.append(f"not a multiple of {policy.keep_every} steps")
    if policy.keep_within_s is not None:
        words.append(f"not within {policy.keep_within_s:g} s of the newest")
    return tuple(words)


def _against(checkpoint: Checkpoint, against: tuple[str, ...]) -> tuple[str, ...]:
    return (f"marked {', '.join(checkpoint.marks)}",) if checkpoint.marks else against
