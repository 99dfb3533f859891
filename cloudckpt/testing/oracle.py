"""What the rules of retention say, written a second time and as plainly as possible.

A check that asks ``core.retention`` whether ``core.retention`` was right finds nothing. Nothing here is shared with it
but the nouns: no ``Checkpoint.usable``, no ``ranked``, no plan. Slow, and only for tests.
"""

from __future__ import annotations

import math

from cloudckpt.core.model import Checkpoint, Manifest, State
from cloudckpt.core.policy import KeepBest

__all__ = ["best_ids", "counts", "protected", "recent_ids"]


def counts(entry: Checkpoint) -> bool:
    """Whether rules may choose it: committed, and neither damaged nor marked by anybody."""
    return entry.state is State.COMMITTED and entry.damaged is None and len(entry.marks) == 0


def _newest_first(manifest: Manifest) -> list[Checkpoint]:
    return sorted((e for e in manifest.entries if counts(e)), key=lambda e: e.seq, reverse=True)


def recent_ids(manifest: Manifest) -> tuple[str, ...]:
    """The newest N, newest first; all of them where no N is set."""
    return tuple(entry.id for entry in _newest_first(manifest)[: manifest.policy.keep_last])


def _value(entry: Checkpoint, metric: str) -> float | None:
    name = metric if metric in entry.metrics else f"eval_{metric}"
    value = entry.metrics.get(name)
    # A float, as every number that is compared: larger integers are equal long before they are the same.
    return float(value) if value is not None and math.isfinite(value) else None


def best_ids(manifest: Manifest, rule: KeepBest) -> tuple[str, ...]:
    """The best N by one rule, best first. The older of two equal ones is the better one."""
    left = [(value, e.id) for e in reversed(_newest_first(manifest)) if (value := _value(e, rule.metric)) is not None]
    found: list[str] = []
    while left and (rule.n is None or len(found) < rule.n):
        top = left[0]
        for candidate in left[1:]:
            if candidate[0] < top[0] if rule.mode == "min" else candidate[0] > top[0]:
                top = candidate
        left.remove(top)
        found.append(top[1])
    return tuple(found)


def protected(manifest: Manifest) -> dict[str, str]:
    """The committed entries that no rule may retire, and why: what I5 names."""
    committed = [e for e in manifest.entries if e.state is State.COMMITTED]
    why: dict[str, str] = {}
    for entry in committed:
        if entry.pinned:
            why[entry.id] = "pinned"
        elif entry.held:
            why[entry.id] = "held"
        elif entry.damaged is not None:
            why[entry.id] = "damaged, which only a person deletes"
        elif entry.id == manifest.resumed_from:
            why[entry.id] = "what the run resumed from"
    for rule in manifest.policy.keep_best:
        why |= dict.fromkeys(best_ids(manifest, rule), f"among the best by {rule.metric}")
    why |= dict.fromkeys(recent_ids(manifest), "among the newest")
    usable = _newest_first(manifest)
    whole = [e for e in committed if e.damaged is None]
    if usable:
        why[usable[0].id] = "the newest usable"
    elif whole:
        why[max(whole, key=lambda e: e.seq).id] = "the newest, and none is usable"
    return why
