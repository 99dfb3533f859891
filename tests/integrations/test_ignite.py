"""Ignite, the real one: its ``Checkpoint`` collects, the run keeps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import cloudckpt
from tests.integrations.jobs import Place, finished, killed_when_held, start, word

pytestmark = pytest.mark.processes

SCRIPT = "ignite_train.py"


def test_a_killed_engine_goes_on_at_its_iteration(new_place: Callable[[], Place], tmp_path: Path) -> None:
    """SIGKILL after iteration 10: the engine's own state comes back with the model's, and the end is the same."""
    undisturbed = finished(start(SCRIPT, new_place(), tmp_path / "undisturbed"))
    place = new_place()
    killed_when_held(start(SCRIPT, place, tmp_path / "first", "--hold-after", "10"))
    resumed = finished(start(SCRIPT, place, tmp_path / "second"))
    assert word(resumed, "begins") == "10"
    assert word(resumed, "weights") == word(undisturbed, "weights")
    run = cloudckpt.open(place.root, storage_options=place.options)
    kept = run.checkpoints()
    assert [c.step for c in kept][-2:] == [15, 20]
    best = run.best()
    assert best is not None
    assert best.metrics["loss"] == min(c.metrics["loss"] for c in kept)
    assert kept[-1].tags == ("checkpoint_20.pt",)
    assert list(run.index("latest").structure) == ["model", "optimizer", "trainer"]


def test_a_step_has_what_was_measured_at_it(new_place: Callable[[], Place], tmp_path: Path) -> None:
    """Evaluated after every second save: step 20 has its val_loss, and step 15 has none of step 10's."""
    place = new_place()
    finished(start(SCRIPT, place, tmp_path / "work", "--evaluate", "2"))
    kept = {c.step: set(c.metrics) for c in cloudckpt.open(place.root, storage_options=place.options).checkpoints()}
    assert kept[15] == {"loss"}
    assert kept[20] == {"loss", "val_loss"}
