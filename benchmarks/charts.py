"""Charts for the page: small SVG files that can be read on a light and on a dark background."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["draw_bars", "draw_lines"]

#: Enough contrast on white and on near-black.
_TEXT = "#7d8590"
_COLOURS = {"ours": "#2f81f7", "peer": "#9aa4ae", "client": "#b8860b", "floor": "#3fa45b"}
_OWN = "cloudckpt"
_OTHERS = ("#d1732c", "#3fa45b", "#a371f7", "#9aa4ae", "#b8860b")


def _figure(height: float) -> tuple[Any, Any, Any]:
    matplotlib = importlib.import_module("matplotlib")
    matplotlib.use("svg")
    pyplot = importlib.import_module("matplotlib.pyplot")
    matplotlib.rcParams.update(
        {
            "svg.fonttype": "none",  # text stays text: small files, and the reader's own font
            "svg.hashsalt": "cloudckpt",  # the same numbers give the same file
            "font.size": 9,
            "text.color": _TEXT,
            "axes.edgecolor": _TEXT,
            "axes.labelcolor": _TEXT,
            "xtick.color": _TEXT,
            "ytick.color": _TEXT,
        }
    )
    figure, axes = pyplot.subplots(figsize=(7.2, height))
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return pyplot, figure, axes


def _save(pyplot: Any, figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # No date and no version: the same results give the same file.
    figure.savefig(path, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None, "Creator": None})
    pyplot.close(figure)


def draw_bars(
    path: Path, *, label: str, rows: Sequence[tuple[str, float, str]], reference: float | None = None
) -> None:
    """One bar a case, shortest first, on a scale that starts at zero; ``rows`` are name, value and kind."""
    ordered = sorted(rows, key=lambda row: row[1], reverse=True)
    pyplot, figure, axes = _figure(0.24 * len(ordered) + 0.8)
    names, values, kinds = zip(*ordered, strict=True)
    drawn = axes.barh(names, values, color=[_COLOURS[kind] for kind in kinds], height=0.7)
    axes.bar_label(drawn, fmt="%.2f", padding=3, fontsize=8, color=_TEXT)
    if reference is not None:
        axes.axvline(reference, color=_TEXT, linewidth=0.8, linestyle="--")
    axes.set_xlabel(label)
    axes.margins(x=0.1)
    _save(pyplot, figure, path)


def draw_lines(
    path: Path, *, x_label: str, y_label: str, lines: Mapping[str, Sequence[tuple[float, float]]], log_y: bool = True
) -> None:
    """One line a case over a logarithmic scale."""
    pyplot, figure, axes = _figure(3.2)
    others = iter(_OTHERS)
    for name, points in lines.items():
        across, up = zip(*sorted(points), strict=True)
        colour = _COLOURS["ours"] if name.startswith(_OWN) else next(others, _TEXT)
        axes.plot(across, up, marker="o", markersize=3.5, linewidth=1.5, color=colour, label=name)
    axes.set_xscale("log")
    at = sorted({x for points in lines.values() for x, _ in points})
    axes.set_xticks(at, [f"{x:,.0f}" for x in at])
    axes.set_xticks([], minor=True)
    if log_y:
        axes.set_yscale("log")
        plain = importlib.import_module("matplotlib.ticker").FormatStrFormatter("%g")
        axes.yaxis.set_major_formatter(plain)
        axes.yaxis.set_minor_formatter(plain)
    else:
        axes.set_ylim(bottom=0)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(visible=True, color=_TEXT, alpha=0.2, linewidth=0.5)
    axes.legend(frameon=False, labelcolor=_TEXT, fontsize=8)
    _save(pyplot, figure, path)
