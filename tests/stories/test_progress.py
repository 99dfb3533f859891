"""How far a save or a load is: numbers, words, and the warning that names rank and object when nothing moves."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

import cloudckpt
from cloudckpt import CheckpointManager
from cloudckpt.events import Event, LoggingListener, TransferProgress, TransferStalled
from cloudckpt.progress import Meter, Watch
from cloudckpt.storage import MemoryStorage


class Clock:
    """Goes on when it is told to."""

    def __init__(self) -> None:
        self.at = 100.0

    def __call__(self) -> float:
        return self.at


def test_a_transfer_in_numbers_and_words() -> None:
    """Bytes, share, rate of late, and what is left at that rate."""
    clock = Clock()
    meter = Meter("saving checkpoint-5", 100 * 2**20, rank=3, now=clock)
    clock.at += 2
    meter.advance(20 * 2**20)
    found = meter.transfer
    assert (found.rank, found.bytes_done, found.rate) == (3, 20 * 2**20, 10 * 2**20)
    assert (found.eta_s, found.idle_s) == (8.0, 0.0)
    assert str(found) == "saving checkpoint-5: 20.0 MiB of 100.0 MiB (20 %), 10 MiB/s, 8.0 s left"
    for _ in range(60):
        clock.at += 1
        meter.advance(2**20)
    assert meter.transfer.rate == pytest.approx(2**20, rel=0.05)
    meter.advance(20 * 2**20)
    assert meter.transfer.eta_s == 0.0
    meter.expect_further(5)
    assert meter.transfer.bytes_total == 100 * 2**20 + 5
    assert str(Meter("x", now=clock).transfer) == "x: 0 B, 0 B/s"


def test_objects_are_named_while_they_are_under_way() -> None:
    """Also one of which two parts are on their way; none afterwards."""
    meter = Meter("x")
    with meter.carrying("a"), meter.carrying("b"):
        with meter.carrying("a"):
            assert meter.transfer.objects == ("a", "b")
        assert meter.transfer.objects == ("a", "b")
    assert not meter.transfer.objects


def test_a_watch_speaks_once_a_minute_and_once_when_nothing_moves() -> None:
    """No word in the first minute, then one a minute; a stall is told once, and again after bytes have moved."""
    clock = Clock()
    told: list[Event] = []
    meter = Meter("saving x", 1000, rank=3, now=clock)
    watch = Watch(meter, told.append, every_s=60, stall_after_s=90, now=clock)
    with meter.carrying("model-00003-of-00008.safetensors"):
        for _ in range(200):
            clock.at += 1
            meter.advance(1)
            watch.look()
        assert [type(e) for e in told] == [TransferProgress] * 3
        told.clear()
        for _ in range(200):
            clock.at += 1
            watch.look()
        stalls = [e for e in told if isinstance(e, TransferStalled)]
        assert [(e.rank, e.objects, e.bytes_done) for e in stalls] == [(3, ("model-00003-of-00008.safetensors",), 200)]
        assert stalls[0].seconds >= 90
        meter.advance(1)
        watch.look()
        clock.at += 91
        watch.look()
    assert isinstance(told[-1], TransferStalled)
    assert len([e for e in told if isinstance(e, TransferStalled)]) == 2


@pytest.mark.parametrize("rank", [0, 3])
def test_a_stall_is_a_warning_on_every_rank(rank: int, caplog: pytest.LogCaptureFixture) -> None:
    """The log line names rank, object, how long and how far."""
    event = TransferStalled(
        what="saving checkpoint-5.0a1b2c3d",
        rank=rank,
        objects=("model-a",),
        seconds=95.0,
        bytes_done=10,
        bytes_total=20,
    )
    with caplog.at_level(logging.INFO, logger="cloudckpt"):
        LoggingListener(rank)(event)
    assert caplog.messages == [
        f"[rank {rank}] saving checkpoint-5.0a1b2c3d: nothing has moved for 95.0 s, at 10 B of 20 B; under way: model-a"
    ]
    assert caplog.records[0].levelno == logging.WARNING


def test_progress_is_logged_by_rank_zero_alone(caplog: pytest.LogCaptureFixture) -> None:
    """One line for the job, not one from each rank."""
    event = TransferProgress(what="x", rank=0, bytes_done=1, bytes_total=2, rate=1.0, eta_s=1.0, line="x: half")
    with caplog.at_level(logging.INFO, logger="cloudckpt"):
        LoggingListener(3)(event)
        LoggingListener(0)(event)
    assert caplog.messages == ["x: half"]


def test_a_save_and_a_load_are_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both count every byte that they carry, and name the objects; the watch ends with them."""
    meters: list[Meter] = []
    plain = Watch.__init__

    def noted(self: Watch, meter: Meter, listener: Any, **words: Any) -> None:
        meters.append(meter)
        plain(self, meter, listener, **words)

    monkeypatch.setattr(Watch, "__init__", noted)
    storage = MemoryStorage()
    with CheckpointManager(storage) as ckpts:
        done = ckpts.save(1, {"model": {"w": torch.ones(1000)}}, block=True).progress
    assert (done.bytes_done, done.eta_s, done.rank) == (done.bytes_total, 0.0, 0)
    cloudckpt.open(storage).load()
    seen = [(m.transfer.what.split(".")[0], m.transfer.bytes_done, m.transfer.bytes_total) for m in meters]
    payload = next(item.size_bytes for item in storage.list("") if "-of-" in item.key)
    assert seen[0] == ("saving checkpoint-1", payload, payload)
    assert seen[1][0] == "loading checkpoint-1"
    assert seen[1][1] == seen[1][2] >= 4000
