"""OpenTelemetry: a listener that records saves, failures, bytes and times as metrics of a meter.

    from opentelemetry import metrics
    CheckpointManager(root, listeners=[OpenTelemetryListener(metrics.get_meter("my-training"))])

It needs ``opentelemetry-api``; where the values go is for the SDK that the program sets up.
"""

from __future__ import annotations

from collections.abc import Mapping

from opentelemetry.metrics import Meter, get_meter

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

__all__ = ["OpenTelemetryListener"]

#: event -> the outcome or kind that is counted.
_OUTCOMES: dict[type, str] = {
    SaveCommitted: "committed",
    SaveFailed: "failed",
    SaveSkipped: "skipped",
    SaveDeclined: "declined",
}
_INCIDENTS: dict[type, str] = {
    FellBack: "damaged",
    DeleteFailed: "delete_failed",
    TransferStalled: "stalled",
    Warned: "warned",
}


class OpenTelemetryListener:
    """Records each event.

    Args:
        meter: whose metrics they are; the global provider's one of the name ``cloudckpt`` by default.
        attributes: put on every value, such as ``{"run": "demo"}``.
    """

    def __init__(self, meter: Meter | None = None, *, attributes: Mapping[str, str] | None = None) -> None:
        found = meter if meter is not None else get_meter("cloudckpt")
        self._attributes = dict(attributes or {})
        self._saves = found.create_counter("cloudckpt.saves", unit="{save}", description="Saves, by outcome.")
        self._bytes = found.create_counter("cloudckpt.saved", unit="By", description="Bytes that were committed.")
        self._deleted = found.create_counter("cloudckpt.deleted", unit="{checkpoint}", description="Were deleted.")
        self._incidents = found.create_counter("cloudckpt.incidents", unit="{incident}", description="What went wrong.")
        self._duration = found.create_histogram("cloudckpt.save.duration", unit="s", description="How long saves took.")
        self._blocked = found.create_histogram("cloudckpt.save.blocked", unit="s", description="Training stood still.")

    def __call__(self, event: Event, /) -> None:
        """Record it."""
        if (outcome := _OUTCOMES.get(type(event))) is not None:
            self._saves.add(1, {**self._attributes, "outcome": outcome})
        if (kind := _INCIDENTS.get(type(event))) is not None:
            self._incidents.add(1, {**self._attributes, "kind": kind})
        if isinstance(event, Deleted):
            self._deleted.add(1, self._attributes)
        if isinstance(event, SaveCommitted):
            self._bytes.add(event.checkpoint.size_bytes, self._attributes)
            self._duration.record(event.seconds, self._attributes)
            if event.blocked_seconds is not None:
                self._blocked.record(event.blocked_seconds, self._attributes)
