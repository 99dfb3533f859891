"""Ray Train, the real one: a worker that is killed is started again by Ray, and goes on by itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import cloudckpt
from tests.integrations.jobs import HERE, ROOT

pytestmark = [pytest.mark.processes, pytest.mark.slow]  # a cluster takes half a minute to start


def test_a_killed_worker_goes_on_from_the_last_commit(tmp_path: Path) -> None:
    """One worker dies after step 10, once; Ray starts it again, and all steps are made, each once or after the kill."""
    root = str(tmp_path / "run")
    command = [sys.executable, str(HERE / "ray_train.py"), "--root", root, "--work", str(tmp_path / "ray")]
    done = subprocess.run(
        [*command, "--die-after", "10"],
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    begins = [line.removeprefix("begins ") for line in (tmp_path / "ray" / "begins.txt").read_text().splitlines()]
    assert begins == ["0", "10"]
    run = cloudckpt.open(root)
    assert [c.step for c in run.checkpoints()][-2:] == [15, 20]
    assert "ended None" in done.stdout
