"""Accelerate, the real one: what ``save_state`` writes, from all ranks, killed and gone on with."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

import cloudckpt
from tests.integrations.jobs import Place, finished, killed_when_held, start, word

pytestmark = pytest.mark.processes

SCRIPT = "accelerate_train.py"


def test_a_killed_loop_goes_on_on_an_empty_disk(new_place: Callable[[], Place], tmp_path: Path) -> None:
    """SIGKILL after step 10; with nothing but the URL it resumes there and ends with the same weights."""
    undisturbed = finished(start(SCRIPT, new_place(), tmp_path / "undisturbed"))
    assert word(undisturbed, "begins") == "0"
    place = new_place()
    killed_when_held(start(SCRIPT, place, tmp_path / "first", "--hold-after", "10"))
    resumed = finished(start(SCRIPT, place, tmp_path / "second"))
    assert word(resumed, "begins") == "10"
    assert word(resumed, "weights") == word(undisturbed, "weights")
    run = cloudckpt.open(place.root, storage_options=place.options)
    names = {path.name for path in run.load_folder(tmp_path / "back").iterdir()}
    assert {"model.safetensors", "optimizer.bin", "random_states_0.pkl"} <= names
    assert list((tmp_path / "second" / "staging").iterdir()) == [], "no folder is left behind"
    assert cloudckpt.verify(place.root, deep=True, storage_options=place.options).ok


def test_two_ranks_write_one_checkpoint(new_place: Callable[[], Place], tmp_path: Path) -> None:
    """Both are killed after step 10 and started again: the files of each are there, and the end is the same."""
    undisturbed = finished(start(SCRIPT, new_place(), tmp_path / "undisturbed", ranks=2))
    place = new_place()
    killed = start(SCRIPT, place, tmp_path / "first", "--die-after", "10", ranks=2)
    killed.process.communicate(timeout=240)
    assert killed.process.returncode != 0
    run = cloudckpt.open(place.root, storage_options=place.options)
    assert [c.step for c in run.checkpoints()] == [5, 10]
    names = [path.name for path in run.load_folder(tmp_path / "back", 10).iterdir()]
    assert sorted(name for name in names if re.match(r"random_states_\d", name)) == [
        "random_states_0.pkl",
        "random_states_1.pkl",
    ]
    resumed = finished(start(SCRIPT, place, tmp_path / "second", ranks=2))
    assert word(resumed, "begins") == "10"
    assert word(resumed, "weights") == word(undisturbed, "weights")
    assert [path.name for path in (tmp_path / "second" / "back").iterdir()] == ["checkpoint-10"]


def test_an_accelerator_that_names_its_own_folders_is_refused() -> None:
    """It would write somewhere else and delete by a rule of its own: the error says what to leave out."""
    from accelerate import Accelerator
    from accelerate.utils import ProjectConfiguration

    from cloudckpt import CheckpointManager, ConfigError
    from cloudckpt.integrations.accelerate import save_state
    from cloudckpt.storage import MemoryStorage

    project = ProjectConfiguration(project_dir="x", automatic_checkpoint_naming=True, total_limit=1)
    accelerator = Accelerator(cpu=True, project_config=project)
    with CheckpointManager(MemoryStorage()) as ckpts, pytest.raises(ConfigError, match="keep_last=N"):
        save_state(accelerator, ckpts, 1)
