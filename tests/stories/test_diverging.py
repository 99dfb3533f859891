"""Training diverges: it is noticed, the best stays, and nobody goes on with what came out of it."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import torch

from cloudckpt import CheckpointManager, DivergenceDetector
from cloudckpt.storage import MemoryStorage
from cloudckpt.testing import check_store


def state_of(step: int, detector: DivergenceDetector) -> dict[str, Any]:
    """A state whose every bit follows from its step, with the detector beside it."""
    return {"w": torch.full((8,), float(step)), "detector": detector}


def train(ckpts: CheckpointManager, detector: DivergenceDetector, losses: dict[int, float]) -> int | None:
    """A loop as the guide has it; the step at which it ended."""
    for step, loss in losses.items():
        metrics = {"val_loss": loss}
        ckpts.save(step, state_of(step, detector), metrics=metrics)
        if detector.update(step, metrics):
            detector.mark(ckpts)
            return step
    return None


LOSSES = {1250: 3.6, 2500: 3.154, 3750: 7.860, 5000: 8.272, 6250: 8.389, 7500: 8.407}


def test_after_a_divergence_latest_and_best_are_from_before(caplog: pytest.LogCaptureFixture) -> None:
    """The loop ends, what was saved since the loss exploded is marked, and both a resume and the best are older."""
    storage = MemoryStorage()
    caplog.set_level(logging.WARNING, logger="cloudckpt")
    with CheckpointManager(storage, monitor="val_loss", mode="min", keep_best=2, keep_last=3) as ckpts:
        detector = DivergenceDetector("val_loss", "min", threshold=1.0)
        assert train(ckpts, detector, LOSSES) == 6250
        assert {c.step: c.marks for c in ckpts.checkpoints()} == {
            1250: (), 2500: (), 3750: ("diverged",), 5000: ("diverged",), 6250: ("diverged",),
        }  # fmt: skip
        latest, best = ckpts.latest(), ckpts.best()
        assert latest is not None
        assert best is not None
        assert (latest.step, best.step) == (2500, 2500)
        assert detector.mark(ckpts) == (), "nothing is marked twice"
        fresh = state_of(0, DivergenceDetector("val_loss", "min", threshold=1.0))
        resumed = ckpts.restore(fresh)
        assert resumed is not None
        assert (resumed.step, fresh["w"][0].item()) == (2500, 2500.0)
        named = ckpts.restore(state_of(0, detector), 6250)
        assert named is not None, "whoever names it gets it, to look at"
        assert named.step == 6250
    check_store(storage)
    lines = [record.getMessage() for record in caplog.records]
    assert [line for line in lines if line.startswith("Training divergence detected! val_loss=8.3890 at step 6250")]
    (done,) = [line for line in lines if line.startswith("marked as diverged, since the metric is bad from step 3750")]
    assert "latest is now checkpoint-2500." in done


def test_a_nan_marks_the_save_that_has_it() -> None:
    """The very first value may be no number; then nothing usable is left, and the log says so instead of guessing."""
    storage = MemoryStorage()
    with CheckpointManager(storage, keep_last=None) as ckpts:
        detector = DivergenceDetector("val_loss", "min")
        assert train(ckpts, detector, {1: math.nan}) == 1
        assert ckpts.latest() is None
        assert detector.divergence is not None
        ckpts.save(2, state_of(2, detector), metrics={"val_loss": math.nan})
        assert [c.step for c in detector.mark(ckpts)] == [2], "a trainer's last save comes after the stop"
        assert ckpts.latest() is None


def test_the_detector_goes_on_where_it_was() -> None:
    """Restored with the model, it finds the divergence at the same step as one that was never stopped."""
    storage = MemoryStorage()
    items = [*LOSSES.items()]
    with CheckpointManager(storage, keep_last=None) as ckpts:
        for step, loss in items[:3]:
            detector = DivergenceDetector("val_loss", "min", threshold=1.0)
            state = state_of(step, detector)
            ckpts.restore(state)  # a new process at every step
            assert detector.update(step, {"val_loss": loss}) is None
            ckpts.save(step, state, block=True)
    with CheckpointManager(storage) as ckpts:
        detector = DivergenceDetector("val_loss", "min", threshold=1.0)
        ckpts.restore(state_of(0, detector))
        assert train(ckpts, detector, dict(items[3:])) == 6250
        assert {c.step for c in ckpts.checkpoints() if c.marks} == {3750, 5000, 6250}


def test_a_metric_is_one_series() -> None:
    """A step counts once; the name that came first is the one that is watched; what is not reported changes nothing."""
    detector = DivergenceDetector("loss", "min", threshold=0.5)
    assert detector.update(1, {"accuracy": 0.1}) is None
    assert detector.state_dict()["averages"]["short"] is None
    for step in range(2, 6):
        assert detector.update(step, {"eval_loss": 1.0}) is None
        assert detector.update(step, {"eval_loss": 100.0}) is None, "told twice, by a log and by an evaluation"
        assert detector.update(step, {"loss": 100.0}) is None, "of the training, not of the evaluation"
    assert detector.update(6, {"eval_loss": 100.0}) is not None
    assert detector.update(7, {"eval_loss": 1.0}) is not None, "what was found stays found"
