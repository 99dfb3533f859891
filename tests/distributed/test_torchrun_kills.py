"""A job of four ranks under torchrun, killed with SIGKILL again and again: the whole of it, or one rank."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

import cloudckpt
from cloudckpt import State
from cloudckpt.storage import LocalStorage
from cloudckpt.testing import check_store
from tests.distributed.test_torchrun_signals import AGENT_FAILED, FOR_EVER, PROGRAM, Job
from tests.records import Recording

pytestmark = [
    pytest.mark.processes,
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="the signals of Linux"),
]
RANKS = 4
#: None is the whole job, torchrun first, as when its machine is gone.
VICTIMS = (None, *range(RANKS))


def start(root: Path, steps: int) -> Job:
    """A job of four ranks that trains from where the run is."""
    words = {"root": str(root), "steps": steps, "signals": {"SIGTERM": 25}}
    return Job(PROGRAM, [json.dumps(words)], "--nproc-per-node", str(RANKS))  # the last one given counts


def begun(job: Job) -> dict[int, tuple[int, int]]:
    """The pid of each rank, and the step that it began with."""
    found = [re.match(r"rank (\d) pid (\d+) begins at (\d+)", line) for line in job.lines]
    return {int(match[1]): (int(match[2]), int(match[3])) for match in found if match}


def told(job: Job) -> list[int]:
    """The steps of which rank zero was told that they are committed."""
    return [int(match[1]) for line in job.lines if (match := re.match(r"committed (\d+)", line))]


def kill(job: Job, victim: int | None) -> None:
    """SIGKILL to a rank, or to torchrun and all of its ranks."""
    pids = {rank: pid for rank, (pid, _) in begun(job).items()}
    if victim is None:
        job.process.kill()
    for pid in [*pids.values()] if victim is None else [pids[victim]]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def trained(root: Path) -> int:
    """The newest committed step: it holds as much as was trained until then, on whichever ranks."""
    run = cloudckpt.open(root)
    newest = run.latest()
    assert newest is not None
    assert torch.equal(run.load(newest.name)["w"], torch.full((1000,), newest.step + 1.0))
    return newest.step


@pytest.mark.timeout(3600)
def test_nothing_acknowledged_is_lost_when_a_job_of_four_ranks_is_killed(
    tmp_path: Path, pytestconfig: pytest.Config, record: Recording
) -> None:
    """Whoever dies, and whenever: the next start goes on after what was told, on all ranks, and trains nothing twice."""
    rounds = max(int(pytestconfig.getoption("--kills")) // 6, 3)
    chance = random.Random(20261127)
    root = tmp_path / "run"
    storage = LocalStorage(root)
    hits: Counter[str] = Counter()
    newest = -1
    with record("a job of four ranks under torchrun", "kill -9", "local") as case:
        for number in range(rounds):
            victim = VICTIMS[number % len(VICTIMS)]
            job = start(root, FOR_EVER)
            try:
                for _ in range(chance.randint(1, 3)):
                    job.hears(r"^committed \d+")
                # A save is made every five steps of some 10 ms: somewhere in it, or between two.
                until = time.monotonic() + chance.uniform(0.0, 0.2)
                while time.monotonic() < until:
                    pass
                kill(job, victim)
                output = job.rest()
            finally:
                job.close()
            assert job.process.returncode == (-signal.SIGKILL if victim is None else AGENT_FAILED), output
            firsts = {rank: first for rank, (_, first) in begun(job).items()}
            assert sorted(firsts) == [*range(RANKS)], output
            assert len({*firsts.values()}) == 1, f"the ranks did not go on from one checkpoint: {output}"
            assert firsts[0] > newest, output  # later still, where a save was sealed and the claim has committed it
            check_store(storage)
            newest = trained(root)
            assert newest >= told(job)[-1], f"what was acknowledged is gone (I5): {output}"
            hits["all" if victim is None else f"rank {victim}"] += 1
        last = start(root, newest + 8)
        try:
            output = last.rest()
        finally:
            last.close()
        assert last.process.returncode == 0, output
        assert sorted(re.findall(r"rank (\d) finished with w (\d+)", output)) == [
            (str(rank), str(newest + 8)) for rank in range(RANKS)
        ]
        cloudckpt.gc(storage, dry_run=False)
        check_store(storage, settled=True)
        assert {c.state for c in cloudckpt.open(root).checkpoints(state=None)} == {State.COMMITTED}
        case.points = hits.total()
        case.figures.update(hits)
    print(f"\n{rounds} kills of a job of {RANKS} ranks: {dict(hits)}")
