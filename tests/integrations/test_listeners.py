"""Listeners: what happened, for machines."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from prometheus_client.parser import text_string_to_metric_families

from cloudckpt import CheckpointManager, SaveError
from cloudckpt.integrations.listeners import JsonLines, PrometheusFile
from cloudckpt.integrations.opentelemetry import OpenTelemetryListener
from cloudckpt.storage import MemoryStorage
from cloudckpt.testing import Fault, ScriptedStorage


def train(*listeners: Any) -> None:
    """Three saves, of which one has no metric that is a number and one is deleted."""
    with CheckpointManager(
        MemoryStorage(), monitor="loss", mode="min", keep_best=1, keep_last=1, listeners=listeners
    ) as ckpts:
        for step, loss in ((1, 0.5), (2, math.nan), (3, 0.25)):
            ckpts.save(step, {"w": torch.full((100,), float(step))}, metrics={"loss": loss}, block=True)


def test_each_event_is_a_line_of_json(tmp_path: Path) -> None:
    """Every line parses with strict JSON, in order, with the time and what the event says; a second run appends."""
    path = tmp_path / "events.jsonl"
    train(JsonLines(path, clock=lambda: "2026-01-31T12:00:00.000Z"))
    events = [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]
    assert {event["at"] for event in events} == {"2026-01-31T12:00:00.000Z"}
    names = [event["event"] for event in events]
    assert names[0] == "Claimed"
    assert names.count("SaveStarted") == names.count("SaveCommitted") == 3
    assert names[-1] == "RunClosed"
    committed = [event["checkpoint"] for event in events if event["event"] == "SaveCommitted"]
    assert [(c["step"], c["metrics"]["loss"]) for c in committed] == [(1, 0.5), (2, "nan"), (3, 0.25)]
    assert all(c["state"] == "committed" and c["url"].endswith(c["id"]) for c in committed)
    (first_deleted, *_) = [event for event in events if event["event"] == "Deleted"]
    assert first_deleted["checkpoint"]["retired_because"]
    train(JsonLines(path))
    assert len(path.read_text().splitlines()) == 2 * len(events)


def test_a_failure_is_told_as_well(tmp_path: Path) -> None:
    """A save that fails is a line, and a counter."""
    lines, counters = JsonLines(tmp_path / "events.jsonl"), PrometheusFile(tmp_path / "ckpt.prom")
    probe = ScriptedStorage(MemoryStorage())
    with CheckpointManager(probe) as ckpts:
        ckpts.save(1, {"w": torch.ones(4)}, block=True)
    first_put = next(n for n, call in enumerate(probe.calls) if call.verb == "put")
    storage = ScriptedStorage(MemoryStorage(), first_put, Fault.REFUSED)
    with CheckpointManager(storage, listeners=[lines, counters]) as ckpts:
        with pytest.raises(SaveError):
            ckpts.save(1, {"w": torch.ones(4)}, block=True)
    (failed,) = [
        event
        for event in map(json.loads, (tmp_path / "events.jsonl").read_text().splitlines())
        if event["event"] == "SaveFailed"
    ]
    assert failed["step"] == 1
    assert failed["error"].startswith("SaveError: ")
    assert samples(tmp_path / "ckpt.prom")["cloudckpt_save_failures_total"] == (1.0, {})


def samples(path: Path) -> dict[str, tuple[float, dict[str, str]]]:
    """What Prometheus' own parser reads."""
    families = text_string_to_metric_families(path.read_text())
    return {s.name: (s.value, dict(s.labels)) for family in families for s in family.samples}


def test_prometheus_reads_the_file(tmp_path: Path) -> None:
    """Its own parser finds every value with its labels, odd characters included, and no half-written file is left."""
    path = tmp_path / "ckpt.prom"
    train(PrometheusFile(path, labels={"run": 'de"mo\\ 1'}))
    found = samples(path)
    labels = {"run": 'de"mo\\ 1'}
    assert found["cloudckpt_saves_total"] == (3.0, labels)
    assert found["cloudckpt_last_step"] == (3.0, labels)
    assert found["cloudckpt_save_failures_total"] == (0.0, labels)
    assert found["cloudckpt_deleted_total"][0] >= 1
    assert found["cloudckpt_saved_bytes_total"][0] > 3 * 400
    assert found["cloudckpt_last_save_seconds"][0] > 0
    assert [item.name for item in tmp_path.iterdir()] == ["ckpt.prom"]


def test_opentelemetry_is_given_counts_and_times() -> None:
    """The SDK collects saves by outcome, bytes, deletions and durations, with the attributes that were given."""
    reader = InMemoryMetricReader()
    provider = MeterProvider(metric_readers=[reader])
    train(OpenTelemetryListener(provider.get_meter("test"), attributes={"run": "demo"}))
    data = reader.get_metrics_data()
    assert data is not None
    points = {
        metric.name: list(metric.data.data_points)
        for resource in data.resource_metrics
        for scope in resource.scope_metrics
        for metric in scope.metrics
    }
    (saves,) = points["cloudckpt.saves"]
    assert (saves.value, dict(saves.attributes)) == (3, {"run": "demo", "outcome": "committed"})
    (durations,) = points["cloudckpt.save.duration"]
    assert durations.count == 3
    assert points["cloudckpt.saved"][0].value > 3 * 400
    assert points["cloudckpt.deleted"][0].value >= 1
    provider.shutdown()
