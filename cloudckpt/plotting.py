"""The metric over the steps, with what became of each checkpoint: in the terminal, as SVG or PNG, as a web page."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from cloudckpt.core.model import Checkpoint, Manifest, State
from cloudckpt.core.retention import metric_value
from cloudckpt.errors import CheckpointNotFoundError, ConfigError
from cloudckpt.extras import extra
from cloudckpt.storage.local_errors import mapped
from cloudckpt.view import RunView

__all__ = ["Plot", "Point", "plot_of", "plot_text", "write_plot"]

#: What a point can be, its mark in the terminal, its mark and colour in a picture, and what comes near that colour of
#: the ones that every terminal has. Later ones are drawn on top. Shapes tell them apart as well as colours do (the
#: Okabe-Ito palette).
_KINDS: Mapping[str, tuple[str, str, str, str]] = {
    "deleted": ("x", "x", "#999999", "gray"),
    "failed": ("!", "v", "#D55E00", "red"),
    "uploading": ("^", "^", "#56B4E9", "cyan"),
    "saved": ("o", "o", "#0072B2", "blue+"),
    "pinned": ("P", "s", "#CC79A7", "magenta+"),
    "best": ("*", "*", "#009E73", "green"),
}
_SUFFIXES = (".svg", ".png", ".html")


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One checkpoint in a plot. ``kind``: saved, best, pinned, uploading, deleted, failed; no ``value`` if unknown."""

    step: int
    value: float | None
    kind: str
    name: str
    note: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Plot:
    """What is drawn: the points in order of step, and their words."""

    url: str
    metric: str
    points: tuple[Point, ...]

    @property
    def drawn(self) -> tuple[Point, ...]:
        """The points that have a value."""
        return tuple(point for point in self.points if point.value is not None)


def plot_of(view: RunView, metric: str | None = None) -> Plot:
    """What to draw of a run.

    Checkpoints that are gone are told by the journal, which remembers the last hundred events; their metrics went with
    their entries, so they are marked on the axis.

    Args:
        metric: by default the run's monitor, else the only metric there is.

    Raises:
        CheckpointNotFoundError: there is no run, or nothing in it has the metric.
        ConfigError: there are several metrics, and none is monitored.
    """
    manifest = view.manifest()
    name = metric or _usual_metric(manifest)
    # Whatever ended a save, the journal says that it was given up.
    abandoned = {event.id for event in manifest.journal if event.event == "abandon"}
    points = [_point(entry, name, manifest, abandoned=entry.id in abandoned) for entry in manifest.entries]
    known = {entry.id for entry in manifest.entries}
    for event in manifest.journal:
        if event.id is not None and event.step is not None and event.id not in known and event.event == "delete":
            known.add(event.id)
            points.append(
                Point(
                    step=event.step,
                    value=None,
                    kind="failed" if event.id in abandoned else "deleted",
                    name=f"checkpoint-{event.step}.{event.id}",
                    note=event.detail or "",
                )
            )
    plot = Plot(url=view.url, metric=name, points=tuple(sorted(points, key=lambda p: (p.step, p.name))))
    if not plot.drawn:
        there = sorted({m for entry in manifest.entries for m in entry.metrics})
        raise CheckpointNotFoundError(
            f"nothing in {view.url} has a finite {name!r}; the metrics there are: {', '.join(there) or 'none'}"
        )
    return plot


def _usual_metric(manifest: Manifest) -> str:
    if (rule := manifest.policy.monitor) is not None:
        return rule.metric
    there = sorted({m for entry in manifest.entries for m in entry.metrics})
    if len(there) != 1:
        raise ConfigError(f"no metric is monitored in this run: say which of {', '.join(there) or 'none'} to draw")
    return there[0]


def _point(entry: Checkpoint, metric: str, manifest: Manifest, *, abandoned: bool) -> Point:
    best = {ids[0] for ids in (b.ids for b in manifest.best if b.metric == metric) if ids}
    if entry.damaged is not None or entry.marks or abandoned:
        kind = "failed"
    elif entry.state is State.RETIRED:
        kind = "deleted"
    elif entry.state is State.PENDING:
        kind = "uploading"
    elif entry.id in best:
        kind = "best"
    else:
        kind = "pinned" if entry.pinned else "saved"
    words = (entry.damaged, *entry.marks, entry.retired_because, *entry.kept_because)
    return Point(
        step=entry.step,
        value=metric_value(entry.metrics, metric),
        kind=kind,
        name=entry.name,
        note=", ".join(word for word in words if word),
    )


def plot_text(plot: Plot, *, width: int = 80, height: int = 20, colour: bool = True, rgb: bool = False) -> str:
    """The plot for a terminal.

    Args:
        plot: what is drawn.
        width: columns.
        height: lines.
        colour: whether the terminal has colours.
        rgb: whether it has all of them (24 bits); one that has not shows others, or parts of the escapes.

    Raises:
        ConfigError: plotext is not installed.
    """
    plt = extra("plotext", "plot", "a plot in the terminal")
    plt.clear_figure()
    plt.limit_size(False, False)  # to what the terminal is taken to have, which is not known in a pipe
    plt.plotsize(width, height)
    plt.xlabel("step")
    line = [p for p in plot.drawn if p.kind != "failed"]
    plt.theme("clear")
    if line:
        plt.plot([p.step for p in line], [p.value for p in line], marker="braille", color="blue")
    drawn: list[str] = []  # not in the picture's own legend, which would hide points
    for kind, (mark, _, hexadecimal, indexed) in _KINDS.items():
        found = [p for p in plot.drawn if p.kind == kind]
        if found:
            drawn.append(f"{mark} {kind}")
            shade = tuple(bytes.fromhex(hexadecimal[1:])) if rgb else indexed
            plt.scatter([p.step for p in found], [p.value for p in found], marker=mark, color=shade)
    text = str(plt.build())
    if not colour:
        text = str(plt.uncolorize(text))
    text = f"{plot.metric} of {plot.url}\n{text.rstrip()}\n{', '.join(drawn)}"
    gone = [p for p in plot.points if p.value is None]
    if gone:
        text += f"\nwithout a value: {', '.join(f'{p.step} ({p.kind})' for p in gone)}"
    return text


def write_plot(plot: Plot, path: Path) -> None:
    """Write the plot as a picture, or as a page with the picture and a table, by the path's suffix.

    Raises:
        ConfigError: matplotlib is not installed, or the suffix is none of .svg, .png and .html.
        StorageError: the disk refused.
    """
    suffix = path.suffix.lower()
    if suffix not in _SUFFIXES:
        raise ConfigError(f"{path}: write a name that ends in {', '.join(_SUFFIXES)}")
    body = _page(plot, _drawn(plot, "svg").decode()).encode() if suffix == ".html" else _drawn(plot, suffix[1:])
    with mapped(path):
        path.write_bytes(body)


def _drawn(plot: Plot, form: str) -> bytes:
    matplotlib = extra("matplotlib", "plot", "a plot as a picture")
    figure_module = extra("matplotlib.figure", "plot", "a plot as a picture")
    # A figure of its own, without pyplot: no window system, and nothing that outlives this.
    with matplotlib.rc_context({"svg.hashsalt": "cloudckpt", "svg.fonttype": "none"}):
        figure: Any = figure_module.Figure(figsize=(9, 5), layout="constrained")
        axes = figure.subplots()
        line = [p for p in plot.drawn if p.kind != "failed"]
        axes.plot([p.step for p in line], [p.value for p in line], color="#56B4E9", linewidth=1, zorder=1)
        for kind, (_, mark, colour, _) in _KINDS.items():
            _scatter(axes, kind, [p for p in plot.points if p.kind == kind], mark, colour)
        axes.set_xlabel("step")
        axes.set_ylabel(plot.metric)
        axes.set_title(plot.url, fontsize="medium")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(visible=True, linewidth=0.3)
        axes.legend(frameon=False)
        out = io.BytesIO()
        # Without the date, so that equal runs give equal pictures.
        figure.savefig(out, format=form, dpi=150, metadata={"Date": None} if form == "svg" else None)
    return out.getvalue()


def _scatter(axes: Any, kind: str, points: Sequence[Point], mark: str, colour: str) -> None:
    valued = [p for p in points if p.value is not None]
    others = [p for p in points if p.value is None]
    size = 110 if kind == "best" else 45
    if valued:
        steps, values = [p.step for p in valued], [p.value for p in valued]
        axes.scatter(steps, values, marker=mark, c=colour, s=size, label=kind, zorder=2)
    if others:
        # On the axis: only their steps are known.
        label = None if valued else kind
        axes.scatter(
            [p.step for p in others],
            [0.0] * len(others),
            marker=mark,
            c=colour,
            s=size,
            label=label,
            transform=axes.get_xaxis_transform(),
            clip_on=False,
            zorder=2,
        )


def _page(plot: Plot, svg: str) -> str:
    rows = "".join(
        f"<tr><td>{p.step}</td><td>{'-' if p.value is None else f'{p.value:g}'}</td><td>{escape(p.kind)}</td>"
        f"<td>{escape(p.note)}</td></tr>"
        for p in plot.points
    )
    picture = svg[svg.index("<svg") :]
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        f"<title>{escape(plot.metric)} of {escape(plot.url)}</title>"
        "<style>body{font-family:system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
        "svg{max-width:100%;height:auto}td,th{padding:.2rem .8rem;text-align:left}"
        "td:first-child{text-align:right}</style>"
        f"<h1>{escape(plot.metric)}</h1><p>{escape(plot.url)}</p>{picture}"
        f"<table><thead><tr><th>step</th><th>{escape(plot.metric)}</th><th></th><th>because</th></tr></thead>"
        f"<tbody>{rows}</tbody></table></html>\n"
    )
