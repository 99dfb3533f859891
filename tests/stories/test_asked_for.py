"""What users of other tools asked for in their issue trackers, and has no story of its own elsewhere here.

``docs/asked-for.md`` has the whole list, with the threads.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import cloudckpt
from cloudckpt import CheckpointManager
from cloudckpt.storage import MemoryStorage, Storage


def state_of(step: int) -> dict[str, Any]:
    """A state whose every bit follows from its step."""
    return {"model": {"w": torch.full((20,), float(step))}, "note": f"s{step}"}


def steps_of(storage: Storage) -> list[int]:
    """The steps that are kept, in the order of saving."""
    return [checkpoint.step for checkpoint in cloudckpt.open(storage).checkpoints()]


def test_a_run_that_was_only_read_from_is_left_alone() -> None:
    """Weights of run A begin run B, which keeps the last one only: every object of A is still there, and no byte differs."""
    source = MemoryStorage()
    with CheckpointManager(source, keep_last=None) as ckpts:
        for step in range(3):
            ckpts.save(step, state_of(step), block=True)
    before = {item.key: source.read(item.key, limit_bytes=2**20).body for item in source.list("")}

    weights = cloudckpt.open(source).load(components=["model"])["model"]
    target = MemoryStorage()
    with CheckpointManager(target, keep_last=1) as ckpts:
        assert ckpts.restore(state_of(0)) is None
        for step in range(3, 6):
            ckpts.save(step, {"model": weights}, block=True)

    assert steps_of(target) == [5]
    assert {item.key: source.read(item.key, limit_bytes=2**20).body for item in source.list("")} == before


@pytest.mark.parametrize(
    ("losses", "kept"),
    [
        ((0.1, 0.2, 0.3), [0, 2]),  # the best is not the newest
        ((0.3, 0.2, 0.1), [2]),  # it is
    ],
)
def test_one_best_and_one_last_are_two_or_one(losses: tuple[float, ...], kept: list[int]) -> None:
    """keep_best=1 and keep_last=1 keep exactly two checkpoints where the newest is not the best, and one where it is."""
    storage = MemoryStorage()
    with CheckpointManager(storage, monitor="loss", mode="min", keep_best=1, keep_last=1) as ckpts:
        for step, loss in enumerate(losses):
            ckpts.save(step, state_of(step), metrics={"loss": loss}, block=True)
    assert steps_of(storage) == kept


def test_restarts_do_not_make_it_more() -> None:
    """A run that is started anew for each save keeps, after each, what the same run without a restart keeps."""
    losses = [0.5, 0.2, 0.9, 0.4, 0.3, 0.8, 0.7]
    words: dict[str, Any] = {"monitor": "loss", "mode": "min", "keep_best": 2, "keep_last": 2}
    restarted = MemoryStorage()
    with CheckpointManager(MemoryStorage(), **words) as undisturbed:
        for step, loss in enumerate(losses):
            undisturbed.save(step, state_of(step), metrics={"loss": loss}, block=True)
            with CheckpointManager(restarted, **words) as ckpts:
                resumed = ckpts.restore(state_of(0))
                assert (resumed.step if resumed else -1) == step - 1
                ckpts.save(step, state_of(step), metrics={"loss": loss}, block=True)
            assert steps_of(restarted) == [c.step for c in undisturbed.checkpoints()]


def test_a_lower_step_than_before_is_the_newest() -> None:
    """Step 100 is saved after step 2000, and only the last one is kept: that is step 100."""
    storage = MemoryStorage()
    with CheckpointManager(storage, keep_last=1) as ckpts:
        for step in (1000, 2000, 100):
            ckpts.save(step, state_of(step), block=True)
    assert steps_of(storage) == [100]
    latest = cloudckpt.open(storage).latest()
    assert latest is not None
    assert latest.step == 100


def test_a_copied_folder_is_a_run_at_its_new_place(tmp_path: Path) -> None:
    """Latest, best and tags of a run that was copied file by file mean the copy's own checkpoints, and they load."""
    first, second = tmp_path / "first", tmp_path / "elsewhere" / "second"
    with CheckpointManager(first, monitor="loss", mode="min", keep_best=1, keep_last=2) as ckpts:
        for step, loss in enumerate([0.1, 0.3, 0.2]):
            ckpts.save(step, state_of(step), metrics={"loss": loss}, block=True)
        ckpts.tag("best", "release")
    shutil.copytree(first, second)
    shutil.rmtree(first)

    run = cloudckpt.open(second)
    assert [run.select(selector).step for selector in ("latest", "best", "tag:release")] == [2, 0, 0]
    assert run.select("best").url.startswith(str(second))
    assert torch.equal(run.load("best")["model"]["w"], torch.full((20,), 0.0))
    assert cloudckpt.verify(second, deep=True).ok


def test_no_url_goes_through_a_function_for_paths() -> None:
    """Nothing in the package calls normpath, which turns gs://bucket/run into gs:/bucket/run."""
    package = Path(cloudckpt.__file__).parent
    assert [path.name for path in package.rglob("*.py") if "normpath(" in path.read_text(encoding="utf-8")] == []
