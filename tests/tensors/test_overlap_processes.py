"""Copies beside training when the process ends, forks, or is one of several."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("overlap_worker.py")
ROOT = Path(__file__).parents[2]


def start(name: str, file: Path, *more: object) -> subprocess.Popen[str]:
    """The worker as a process."""
    command = [sys.executable, "-W", "ignore", str(WORKER), name, str(file), *map(str, more)]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        # These are about memory of the CPU. Where torch sees a GPU, every step asks it whether it captures a graph, and
        # CUDA cannot be asked in a forked child.
        env={"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    """What it printed; it must have ended well."""
    try:
        out, errors = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode == 0, errors
    return out.strip()


@pytest.mark.processes
@pytest.mark.parametrize("name", ["leave", "leave_late", "fork"])
def test_a_process_that(name: str, tmp_path: Path) -> None:
    """A process that ends in the middle of a copy completes it; a forked child waits for nobody, and can save."""
    expected = finish(start(name, tmp_path / "target"))
    assert hashlib.sha256((tmp_path / "target").read_bytes()).hexdigest() == expected


@pytest.mark.processes
def test_several_processes(tmp_path: Path) -> None:
    """Under DistributedDataParallel and with DTensors steps wait and changes are named, on every rank."""
    ranks = [start("parallel", tmp_path / "store", rank) for rank in range(2)]
    for rank in ranks:
        assert finish(rank) == ""
