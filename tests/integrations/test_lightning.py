"""Lightning's ``Trainer``, the real one: killed and gone on with, with the last checkpoint and the best side by side."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import cloudckpt
from tests.integrations.jobs import Place, finished, killed_when_held, start, word

pytestmark = pytest.mark.processes

SCRIPT = "lightning_train.py"


def test_a_killed_training_goes_on_from_the_last_epoch(new_place: Callable[[], Place], tmp_path: Path) -> None:
    """SIGKILL after step 10: it resumes there from a URL, which Lightning's own "last" never does, to the same end."""
    undisturbed = finished(start(SCRIPT, new_place(), tmp_path / "undisturbed"))
    assert word(undisturbed, "latest") == "None"
    assert word(undisturbed, "begins") == "0"
    place = new_place()
    killed_when_held(start(SCRIPT, place, tmp_path / "first", "--hold-after", "10"))
    run = cloudckpt.open(place.root, storage_options=place.options)
    assert [c.step for c in run.checkpoints()] == [5, 10]
    resumed = finished(start(SCRIPT, place, tmp_path / "second"))
    assert word(resumed, "latest").startswith("checkpoint-10.")
    assert word(resumed, "begins") == "10"
    assert word(resumed, "ended") == word(undisturbed, "ended") == "20"
    assert word(resumed, "weights") == word(undisturbed, "weights")
    kept = run.checkpoints()
    assert [c.step for c in kept][-2:] == [15, 20]
    assert len({c.step for c in kept}) == len(kept) <= 3, "step 10 is not saved again by a training that begins there"
    assert all(set(c.metrics) == {"val_loss"} for c in kept), "each with what was measured at its step"
    best = run.best()
    assert best is not None
    assert best.metrics["val_loss"] == min(c.metrics["val_loss"] for c in kept)
    assert word(resumed, "best") == best.name
    assert all("step=" in tag for c in kept for tag in c.tags)
    assert set(run.index("latest").structure) >= {"state_dict", "optimizer_states", "loops", "global_step"}
    assert not list(tmp_path.rglob("*.ckpt")), "nothing is left on the disk"


def test_a_step_has_what_was_measured_at_it(new_place: Callable[[], Place], tmp_path: Path) -> None:
    """Saved every third step, validated every fifth: of what is saved, 15 alone has a val_loss, the one measured there."""
    counted, epochs = new_place(), new_place()
    finished(start(SCRIPT, counted, tmp_path / "counted", "--every", "3"))
    finished(start(SCRIPT, epochs, tmp_path / "epochs", "--steps", "15"))
    kept = {c.step: c.metrics for c in cloudckpt.open(counted.root, storage_options=counted.options).checkpoints()}
    assert set(kept) == {12, 15, 18}, "the best, the last two, and the newest two without the metric"
    measured = cloudckpt.open(epochs.root, storage_options=epochs.options).select(15).metrics["val_loss"]
    assert kept[15] == {"val_loss": measured}
    assert "val_loss" not in {*kept[12], *kept[18]}


def test_a_training_that_diverges_is_stopped_and_not_resumed_from(
    new_place: Callable[[], Place], tmp_path: Path
) -> None:
    """Weights become NaN after step 10: the next validation ends it, and what was saved since is marked."""
    place = new_place()
    lines = finished(start(SCRIPT, place, tmp_path / "work", "--steps", "100", "--explode-after", "10"))
    assert word(lines, "ended") == "15"
    assert any(line.startswith("Training divergence detected! val_loss=nan at step 15") for line in lines)
    run = cloudckpt.open(place.root, storage_options=place.options)
    assert {c.step: c.marks for c in run.checkpoints()}[15] == ("diverged",)
    again = finished(start(SCRIPT, place, tmp_path / "again", "--steps", "15"))
    assert word(again, "begins") == "10"


def test_a_run_that_is_begun_anew_says_so(new_place: Callable[[], Place], tmp_path: Path) -> None:
    """Lightning's own "last" finds no file and starts at step 0: the log says what is there, and how to go on from it."""
    place = new_place()
    first = finished(start(SCRIPT, place, tmp_path / "first", "--steps", "10"))
    assert not any(line.startswith("training starts at step 0") for line in first)
    anew = finished(start(SCRIPT, place, tmp_path / "anew", "--steps", "5", "--ckpt-path", "last"))
    assert word(anew, "begins") == "0"
    (said,) = [line for line in anew if line.startswith("training starts at step 0")]
    assert f"{place.root}/checkpoint-10." in said
    assert "ckpt_path=cloud.latest()" in said


def test_what_lightning_removes_the_run_keeps(new_place: Callable[[], Place], tmp_path: Path) -> None:
    """ModelCheckpoint with save_top_k=1 over the plugin alone: it deletes nothing, and its names load."""
    place = new_place()
    lines = finished(start(SCRIPT, place, tmp_path / "work", "--top-k", "1"))
    run = cloudckpt.open(place.root, storage_options=place.options)
    kept = run.checkpoints()
    assert len(kept) > 1, "each was better than the one before, which Lightning then removed"
    assert all(set(c.metrics) == {"val_loss"} for c in kept)
    best = run.best()
    assert best is not None
    assert best.tags == (word(lines, "top"),)
    assert f"{best.metrics['val_loss']:.6f}" == word(lines, "score") == word(lines, "validated")
    assert not list(tmp_path.rglob("*.ckpt"))


def test_a_pinned_one_that_lightning_removes_stays(new_place: Callable[[], Place], tmp_path: Path) -> None:
    """save_top_k=1 wants it removed, and the run's rules, which let go of others, want it gone: it stays, and loads."""
    place = new_place()
    lines = finished(start(SCRIPT, place, tmp_path / "work", "--top-k", "1", "--pin", "5"))
    run = cloudckpt.open(place.root, storage_options=place.options)
    pinned = run.select(5)
    removed = [line.rpartition("/")[2] for line in lines if line.startswith("removes ")]
    assert pinned.tags[0] in removed, "Lightning did ask for it"
    assert pinned.pinned
    assert pinned.kept_because == ("pinned",), "no rule keeps it"
    retired = [event.step for event in run.journal() if event.event == "retire"]
    assert retired == [10, 15], "and by the rules others went"
    assert [c.step for c in run.checkpoints()] == [5, 20]
    assert run.load(5)["global_step"] == 5
    assert set(run.load(pinned.name)) >= {"state_dict", "optimizer_states", "loops"}
    assert cloudckpt.verify(place.root, 5, deep=True, storage_options=place.options).ok


def test_a_plugin_that_saves_in_a_thread_of_its_own_is_refused(new_place: Callable[[], Place], tmp_path: Path) -> None:
    """Around ours it would lose each step's metrics: the error, before the first step, says what to leave out."""
    place = new_place()
    job = start(SCRIPT, place, tmp_path / "work", "--wrapped")
    job.process.communicate(timeout=240)
    assert job.process.returncode == 1
    assert "saves are in the background already" in job.errors()
    assert cloudckpt.open(place.root, storage_options=place.options).checkpoints() == ()
