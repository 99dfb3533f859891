"""Ready-made listeners: a file of JSON lines, and a file that Prometheus' node exporter reads.

    CheckpointManager(root, listeners=[JsonLines("events.jsonl"), PrometheusFile("/var/lib/node_exporter/ckpt.prom")])

Python's own logging needs none: the manager writes its lines to the logger ``cloudckpt``. All ranks are given events of
their own; what concerns the whole job comes from rank zero.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cloudckpt.core.model import Checkpoint
from cloudckpt.events import (
    Deleted,
    DeleteFailed,
    Event,
    FellBack,
    SaveCommitted,
    SaveDeclined,
    SaveFailed,
    SaveSkipped,
    TransferStalled,
    Warned,
)
from cloudckpt.storage import utc_now

__all__ = ["JsonLines", "PrometheusFile", "event_to_json"]


def event_to_json(event: Event) -> dict[str, Any]:
    """An event as plain values: its name under ``event``, and its fields. A stable form: fields are only added."""
    fields = {field.name: _plain(getattr(event, field.name)) for field in dataclasses.fields(event)}
    return {"event": type(event).__name__, **fields}


def _plain(value: Any) -> Any:
    if isinstance(value, Checkpoint):
        return {
            "id": value.id,
            "step": value.step,
            "url": value.url,
            "state": value.state.value,
            "size_bytes": value.size_bytes,
            "metrics": {name: _plain(number) for name, number in value.metrics.items()},
            "tags": list(value.tags),
            "kept_because": list(value.kept_because),
            "retired_because": value.retired_because,
        }
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, BaseException):
        return f"{type(value).__name__}: {value}"
    # JSON has no other numbers.
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


class JsonLines:
    """Appends each event to a file, as one line of JSON with the time.

    Args:
        path: of the file; its folder must exist. Several processes may write to one file: a line is one write.
        clock: gives the time.
    """

    def __init__(self, path: str | os.PathLike[str], *, clock: Callable[[], str] = utc_now) -> None:
        self._path = Path(path)
        self._clock = clock

    def __call__(self, event: Event, /) -> None:
        """Note it."""
        line = json.dumps({"at": self._clock(), **event_to_json(event)}, ensure_ascii=False) + "\n"
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)


#: name -> kind, what it means.
_METRICS = {
    "cloudckpt_saves_total": ("counter", "Saves that were committed."),
    "cloudckpt_save_failures_total": ("counter", "Saves that did not become visible."),
    "cloudckpt_saves_skipped_total": ("counter", "Saves that were left out because one was in flight."),
    "cloudckpt_saves_declined_total": ("counter", "Saves that a deadline left no time for."),
    "cloudckpt_saved_bytes_total": ("counter", "Bytes of the saves that were committed."),
    "cloudckpt_deleted_total": ("counter", "Retired checkpoints whose bytes are gone."),
    "cloudckpt_delete_failures_total": ("counter", "Deletes that are tried again."),
    "cloudckpt_damaged_total": ("counter", "Checkpoints that were found damaged by a load."),
    "cloudckpt_stalls_total": ("counter", "Saves and loads of which nothing moved for long."),
    "cloudckpt_warnings_total": ("counter", "Warnings."),
    "cloudckpt_last_step": ("gauge", "Step of the newest commit."),
    "cloudckpt_last_save_seconds": ("gauge", "How long the newest save took."),
    "cloudckpt_last_blocked_seconds": ("gauge", "How long training stood still for the newest save."),
    "cloudckpt_last_size_bytes": ("gauge", "Size of the newest commit."),
}

#: event -> which counter goes up by one.
_COUNTED: dict[type, str] = {
    SaveFailed: "cloudckpt_save_failures_total",
    SaveSkipped: "cloudckpt_saves_skipped_total",
    SaveDeclined: "cloudckpt_saves_declined_total",
    Deleted: "cloudckpt_deleted_total",
    DeleteFailed: "cloudckpt_delete_failures_total",
    FellBack: "cloudckpt_damaged_total",
    TransferStalled: "cloudckpt_stalls_total",
    Warned: "cloudckpt_warnings_total",
}


class PrometheusFile:
    """Keeps a file in Prometheus' text format up to date, for the textfile collector of the node exporter.

    The counters begin at zero with each process, as Prometheus expects of a restart.

    Args:
        path: of the file, which ends in ``.prom``. It is replaced as a whole.
        labels: put on every value, such as ``{"run": "demo"}``.
    """

    def __init__(self, path: str | os.PathLike[str], *, labels: dict[str, str] | None = None) -> None:
        self._path = Path(path)
        inner = ",".join(f'{name}="{_escaped(value)}"' for name, value in (labels or {}).items())
        self._labels = f"{{{inner}}}" if inner else ""
        self._values = {name: 0.0 for name, (kind, _) in _METRICS.items() if kind == "counter"}
        self._mutex = threading.Lock()

    def __call__(self, event: Event, /) -> None:
        """Count it."""
        with self._mutex:
            if isinstance(event, SaveCommitted):
                self._committed(event)
            elif (name := _COUNTED.get(type(event))) is not None:
                self._values[name] += 1
            else:
                return
            self._write()

    def _committed(self, event: SaveCommitted) -> None:
        self._values["cloudckpt_saves_total"] += 1
        self._values["cloudckpt_saved_bytes_total"] += event.checkpoint.size_bytes
        self._values["cloudckpt_last_step"] = event.checkpoint.step
        self._values["cloudckpt_last_size_bytes"] = event.checkpoint.size_bytes
        self._values["cloudckpt_last_save_seconds"] = event.seconds
        if event.blocked_seconds is not None:
            self._values["cloudckpt_last_blocked_seconds"] = event.blocked_seconds

    def text(self) -> str:
        """The file's content."""
        lines = []
        for name, (kind, meaning) in _METRICS.items():
            if name in self._values:
                lines += [f"# HELP {name} {meaning}", f"# TYPE {name} {kind}"]
                lines.append(f"{name}{self._labels} {self._values[name]!r}")
        return "".join(f"{line}\n" for line in lines)

    def _write(self) -> None:
        # The collector may look at any moment: it sees the old file or the new one.
        scratch = self._path.with_name(f".{self._path.name}.{os.getpid()}.tmp")
        scratch.write_text(self.text(), encoding="utf-8")
        scratch.replace(self._path)


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
