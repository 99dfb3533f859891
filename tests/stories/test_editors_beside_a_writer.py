"""People and evaluators may change labels and collect garbage while a trainer runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cloudckpt
from cloudckpt import CheckpointManager, State
from cloudckpt.storage import LocalStorage
from cloudckpt.testing import check_store

WORKER = Path(__file__).with_name("editor_worker.py")


def state_of(step: int) -> dict[str, torch.Tensor]:
    """A state whose every bit follows from its step."""
    return {"w": torch.full((1000,), float(step))}


@pytest.mark.processes
@pytest.mark.timeout(300)  # some 190 writes of the manifest against a writer that never rests
def test_a_hundred_pins_and_twenty_gcs_disturb_no_save(tmp_path: Path) -> None:
    """100 pins and 20 gcs from another process beside a running trainer: no save fails and nothing good is lost."""
    root = str(tmp_path / "run")
    saved = 0
    best: tuple[float, int] = (float("inf"), -1)
    with CheckpointManager(root, monitor="loss", mode="min", keep_best=2, keep_last=3) as ckpts:
        ckpts.save(0, state_of(0), metrics={"loss": 1.0}, block=True)
        with subprocess.Popen([sys.executable, str(WORKER), root, "100", "20"]) as editor:
            step = 1
            while editor.poll() is None:
                loss = float((step * 7919) % 101)
                best = min(best, (loss, step))
                ckpts.save(step, state_of(step), metrics={"loss": loss})
                saved += 1
                step += 1
            assert editor.wait() == 0
        ckpts.wait()
        assert Path(f"{root}.editor").read_text() == "100 20"
        assert saved >= 20
        run = cloudckpt.open(root)
        found = run.best()
        assert found is not None
        assert found.metrics["loss"] <= best[0]
        newest = run.latest()
        assert newest is not None
        assert newest.step == step - 1
        pinned = [c for c in run.checkpoints() if c.pinned]
        for checkpoint in run.checkpoints():
            assert torch.equal(run.load(checkpoint.name)["w"], state_of(checkpoint.step)["w"])
        assert pinned
    cloudckpt.gc(root, dry_run=False)
    check_store(LocalStorage(root), settled=True)
    assert {c.state for c in cloudckpt.open(root).checkpoints(state=None)} == {State.COMMITTED}


def test_an_editor_never_touches_a_save_in_flight(tmp_path: Path) -> None:
    """Pruning, sweeping and collecting garbage leave the pending entry of the current writer and its bytes alone."""
    root = str(tmp_path / "run")
    seen: list[State] = []

    class Meddler(LocalStorage):
        """After the first payload object of step 2 is in place, a person collects garbage."""

        def put(self, key: str, *args: object, **kwargs: object) -> None:
            super().put(key, *args, **kwargs)  # type: ignore[arg-type]  # handed through
            if key.startswith("checkpoint-2.") and "checkpoint.json" not in key:
                cloudckpt.gc(root, dry_run=False)
                cloudckpt.sweep(root, dry_run=False)
                seen.extend(c.state for c in cloudckpt.open(root).checkpoints(state=None) if c.step == 2)

    with CheckpointManager(Meddler(root), keep_last=1) as ckpts:
        ckpts.save(1, state_of(1), block=True)
        ckpts.save(2, state_of(2), block=True)
    assert seen == [State.PENDING]
    assert torch.equal(cloudckpt.open(root).load("latest")["w"], state_of(2)["w"])
    check_store(LocalStorage(root), settled=True)
