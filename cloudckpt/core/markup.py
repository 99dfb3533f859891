"""Runs, checkpoints and plans as HTML for notebooks: plain markup, no script, nothing that is fetched."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape

from cloudckpt.core.model import Checkpoint, Manifest, State
from cloudckpt.core.retention import PrunePlan, metric_value
from cloudckpt.core.text import format_bytes, format_metric

__all__ = ["checkpoint_html", "plan_html", "run_html", "sparkline", "state_text"]

_WIDTH, _HEIGHT, _MARGIN = 160.0, 32.0, 3.0


def state_text(checkpoint: Checkpoint) -> str:
    """``committed, damaged, tag:release``: where a save stands and what people said of it."""
    words = ["uploading" if checkpoint.state is State.PENDING else str(checkpoint.state)]
    if checkpoint.damaged is not None:
        words.append("damaged")
    words += [f"marked {mark}" for mark in checkpoint.marks]
    words += [f"tag:{tag}" for tag in checkpoint.tags]
    return ", ".join(words)


def run_html(manifest: Manifest, url: str) -> str:
    """A run: its monitored metric as a line, and its checkpoints, newest first."""
    shown = [c for c in manifest.entries if c.state is not State.RETIRED]
    committed = manifest.committed
    rule = manifest.policy.monitor
    line = sparkline([metric_value(c.metrics, rule.metric) for c in committed]) if rule else ""
    total = format_bytes(sum(c.size_bytes for c in committed))
    count = "1 checkpoint" if len(committed) == 1 else f"{len(committed)} checkpoints"
    metric = f" {escape(rule.metric)} ({rule.mode}) {line}" if rule and line else ""
    return (
        f"<div><b>{escape(url)}</b><br>{count}, {total}; policy: {escape(str(manifest.policy))}{metric}"
        f"{_checkpoints(shown)}</div>"
    )


def checkpoint_html(checkpoint: Checkpoint) -> str:
    """One checkpoint: its facts, one in a row."""
    facts = [
        ("checkpoint", checkpoint.url),
        ("step", str(checkpoint.step)),
        ("state", state_text(checkpoint)),
        ("committed", checkpoint.committed_at or "-"),
        ("size", f"{format_bytes(checkpoint.size_bytes)} in {checkpoint.object_count} objects"),
        *((name, format_metric(value)) for name, value in sorted(checkpoint.metrics.items())),
        ("kept because", ", ".join(checkpoint.kept_because) or "-"),
        ("world size", str(checkpoint.world_size)),
    ]
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in facts)
    return f"<table>{rows}</table>"


def plan_html(plan: PrunePlan) -> str:
    """A retention plan: each checkpoint, whether it stays, and why."""
    rows = (
        (
            "keep" if d.keep else "retire",
            str(d.checkpoint.step),
            format_bytes(d.checkpoint.size_bytes),
            ", ".join(d.reasons),
        )
        for d in reversed(plan.decisions)
    )
    table = _table(["", "step", "size", "because"], rows)
    return f"<div>would free {format_bytes(plan.size_bytes)}{table}</div>"


def _checkpoints(checkpoints: Sequence[Checkpoint]) -> str:
    metrics = sorted({name for c in checkpoints for name in c.metrics})
    rows = (
        (
            str(c.step),
            c.committed_at or c.announced_at,
            format_bytes(c.size_bytes),
            *(format_metric(c.metrics[name]) if name in c.metrics else "-" for name in metrics),
            ", ".join(c.kept_because) if c.state is State.COMMITTED else "-",
            state_text(c),
        )
        for c in sorted(checkpoints, key=lambda c: -c.seq)
    )
    return _table(["step", "at", "size", *metrics, "kept because", "state"], rows)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def sparkline(values: Sequence[float | None]) -> str:
    """A small line of values in order, as SVG; a gap where there is none. Nothing for fewer than two values."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    if len(known) < 2:
        return ""
    low, high = min(known), max(known)
    span = (high - low) or 1.0
    across = (_WIDTH - 2 * _MARGIN) / (len(values) - 1)
    points = [
        f"{_MARGIN + n * across:.1f},{_MARGIN + (_HEIGHT - 2 * _MARGIN) * (1 - (value - low) / span):.1f}"
        for n, value in enumerate(values)
        if value is not None and math.isfinite(value)
    ]
    return (
        f'<svg width="{_WIDTH:.0f}" height="{_HEIGHT:.0f}" role="img" aria-label="{len(known)} values, from '
        f'{format_metric(known[0])} to {format_metric(known[-1])}"><polyline fill="none" stroke="currentColor" '
        f'stroke-width="1.5" points="{" ".join(points)}"/></svg>'
    )
