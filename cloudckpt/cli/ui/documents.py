"""What the page is given: the very documents that ``--json`` prints, from one look at a run."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from cloudckpt.cli.render import as_json
from cloudckpt.cli.ui.reading import SeenRun
from cloudckpt.collecting import policy_with
from cloudckpt.core.policy import INHERIT, Inherit, PolicyWords
from cloudckpt.core.retention import plan_prune
from cloudckpt.errors import ConfigError
from cloudckpt.listing import RunSummary
from cloudckpt.plotting import plot_of
from cloudckpt.view import placed

__all__ = ["encoded", "listing", "log", "plot", "preview", "runs", "words_of"]

_N = TypeVar("_N", int, float)

#: How a query writes "without this rule", which for the newest and the best means all of them.
_NONE = "none"


def encoded(document: Mapping[str, Any]) -> bytes:
    """A document as JSON. ASCII, so that a name with half a surrogate pair can be sent as well."""
    return json.dumps(as_json(document), allow_nan=False).encode("ascii")


def runs(url: str, found: Sequence[RunSummary]) -> dict[str, Any]:
    """As ``cloudckpt ls PREFIX --json``."""
    return {"root": url, "runs": list(found)}


def listing(run: SeenRun) -> dict[str, Any]:
    """As ``cloudckpt ls --all --json``."""
    return {
        "root": run.url,
        "run_id": run.seen.run_id,
        "revision": run.seen.revision,
        "policy": run.seen.policy,
        "best": run.seen.best,
        "recent": run.seen.recent,
        "uploaded_bytes": run.arrived,
        "checkpoints": run.checkpoints(state=None),
    }


def log(run: SeenRun) -> dict[str, Any]:
    """As ``cloudckpt log --json``, with all events that there are."""
    return {"root": run.url, "events": run.seen.journal}


def plot(run: SeenRun, metric: str | None) -> dict[str, Any]:
    """As ``cloudckpt plot --json``.

    Args:
        metric: None for the monitored one, or the only one.

    Raises:
        CheckpointNotFoundError: nothing has the metric.
        ConfigError: no metric is monitored and there are several.
    """
    drawn = plot_of(run, metric)
    return {"root": drawn.url, "metric": drawn.metric, "points": drawn.points, "path": None}


def preview(run: SeenRun, words: PolicyWords) -> dict[str, Any]:
    """As ``cloudckpt prune --dry-run --json`` with these words: decided by the package's own retention.

    Raises:
        ConfigError: the words cannot be used as given.
    """
    stored = run.seen.policy
    if words.keep_best is None and stored.monitor is not None:
        # As a number would be, "all" is for each of several rules.
        stored = replace(stored, keep_best=tuple(replace(rule, n=None) for rule in stored.keep_best))
        words = replace(words, keep_best=INHERIT)
    policy = policy_with(stored, words) or stored
    entries = tuple(placed(entry, run.url) for entry in run.seen.entries)
    plan = plan_prune(entries, policy, resumed_from=run.seen.resumed_from)
    return {"root": run.url, "dry_run": True, "decisions": plan.decisions, "size_bytes": plan.size_bytes}


def words_of(query: Mapping[str, str]) -> PolicyWords:
    """The retention words of a query; what it does not name is inherited from the stored policy.

    Raises:
        ConfigError: one is no number.
    """
    return PolicyWords(
        keep_last=_word(query, "keep_last", int),
        keep_best=_word(query, "keep_best", int),
        keep_every=_word(query, "keep_every", int),
        keep_within_s=_word(query, "keep_within_s", float),
    )


def _word(query: Mapping[str, str], name: str, number: Callable[[str], _N]) -> _N | Inherit | None:
    text = query.get(name)
    if text is None:
        return INHERIT
    if text == _NONE:
        return None
    try:
        return number(text)
    except ValueError:
        raise ConfigError(f"{name}={text!r}: expected a number, or {_NONE}") from None
