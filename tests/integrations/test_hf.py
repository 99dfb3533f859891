"""The Hugging Face ``Trainer``, the real one: killed, and gone on with on another machine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import cloudckpt
from tests.integrations.jobs import Place, finished, killed_when_held, start, word

pytestmark = pytest.mark.processes

SCRIPT = "hf_train.py"


def test_a_killed_training_goes_on_on_an_empty_disk(new_place: Callable[[], Place], tmp_path: Path) -> None:
    """SIGKILL after step 10; started again with nothing but the URL it resumes there and ends with the same weights."""
    undisturbed = finished(start(SCRIPT, new_place(), tmp_path / "undisturbed"))
    assert word(undisturbed, "pulled") == word(undisturbed, "last") == "None"
    assert word(undisturbed, "begins") == "0"
    place = new_place()
    killed = killed_when_held(start(SCRIPT, place, tmp_path / "first", "--hold-after", "10"))
    assert word(killed, "begins") == "0"
    run = cloudckpt.open(place.root, storage_options=place.options)
    assert [c.step for c in run.checkpoints()] == [5, 10], "what was rotated away on the disk was saved before"
    resumed = finished(start(SCRIPT, place, tmp_path / "second"))
    pulled = word(resumed, "pulled")
    assert pulled == str(tmp_path / "second" / "out" / "checkpoint-10")
    assert word(resumed, "last") == pulled, "transformers finds it by itself as well"
    assert word(resumed, "begins") == "10"
    assert word(resumed, "weights") == word(undisturbed, "weights")
    assert cloudckpt.verify(place.root, deep=True, storage_options=place.options).ok


def test_the_trainers_metric_decides_and_local_rotation_does_not(
    new_place: Callable[[], Place], tmp_path: Path
) -> None:
    """One folder is left on the disk, the last two and the best in the run; the metrics are those of each step."""
    place = new_place()
    lines = finished(start(SCRIPT, place, tmp_path / "work", "--steps", "25"))
    assert "monitor='eval_loss', mode='min'" in "\n".join(lines)
    # Which one transformers leaves is its own business: with save_total_limit=1 the best, and the newest is gone.
    assert word(lines, "local").count("checkpoint-") in {1, 2}
    run = cloudckpt.open(place.root, storage_options=place.options)
    kept = run.checkpoints()
    assert [c.step for c in kept][-2:] == [20, 25]
    assert len(kept) <= 3
    assert all("eval_loss" in c.metrics for c in kept)
    best = run.best()
    assert best is not None
    assert best.metrics["eval_loss"] == min(c.metrics["eval_loss"] for c in kept)
    names = {path.name for path in run.load_folder(tmp_path / "best", "best").iterdir()}
    assert {"model.safetensors", "config.json", "optimizer.pt", "scheduler.pt", "trainer_state.json"} <= names


def test_a_training_that_diverges_is_stopped_and_not_resumed_from(
    new_place: Callable[[], Place], tmp_path: Path
) -> None:
    """Weights become NaN after step 10: the next evaluation ends it, and what was saved since is marked."""
    place = new_place()
    lines = finished(start(SCRIPT, place, tmp_path / "work", "--steps", "40", "--explode-after", "10"))
    assert any(line.startswith("Training divergence detected! eval_loss=nan at step 15") for line in lines)
    run = cloudckpt.open(place.root, storage_options=place.options)
    latest = run.latest()
    assert latest is not None
    assert latest.step == 10
    assert {c.step for c in run.checkpoints() if "diverged" in c.marks} <= {15}
    assert max(c.step for c in run.checkpoints()) <= 15, "it was stopped there"
    again = finished(start(SCRIPT, place, tmp_path / "again", "--steps", "15"))
    assert word(again, "begins") == "10"
