"""Each way in which torchrun passes a signal on, or does not: what was trained is saved, or the run goes on from before."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.run import get_args_parser

import cloudckpt

pytestmark = [
    pytest.mark.processes,
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="the signals of Linux"),
]
ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "spot_train.py"
PROGRAM = Path(__file__).with_name("signalled.py")
FOR_EVER = 10**6
AGENT_FAILED = 1


def run_options() -> set[str]:
    """What this version of torchrun can be told."""
    return set(get_args_parser()._option_string_actions)


class Job:
    """Two ranks under torchrun; all that they and it print comes out of one pipe."""

    def __init__(self, program: Path, words: list[str], *options: str) -> None:
        launcher = ["--nproc-per-node", "2", "--local-addr", "127.0.0.1", *options]
        launcher += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *launcher, str(program), *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": str(ROOT),
                "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
            },
        )

    def _read(self) -> Iterator[str]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))
            yield self.lines[-1]

    def hears(self, pattern: str) -> re.Match[str]:
        """The first of the lines to come that matches."""
        for line in self._read():
            if found := re.search(pattern, line):
                return found
        raise AssertionError(f"no line matches {pattern}: {self.lines[-200:]}")

    def rest(self) -> str:
        """All lines, once torchrun has ended, and whatever it has left behind."""
        for _ in self._read():
            pass
        self.process.wait(60)
        return "\n".join(self.lines)

    def close(self) -> None:
        """End torchrun and the ranks that are known, if any of them still is there."""
        ranks = [int(found[1]) for line in self.lines if (found := re.match(r"rank \d+ pid (\d+) begins", line))]
        if self.process.poll() is None:
            self.process.terminate()  # it ends its ranks, with SIGKILL after half a minute
        for pid in ranks:
            # The number may belong to somebody else by now: only what still runs our program is ended.
            with contextlib.suppress(OSError):
                if str(PROGRAM).encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(pid, signal.SIGKILL)
        assert self.process.stdout is not None
        self.process.stdout.close()
        self.process.wait()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Job]]:
    """Starts jobs on one root, and ends them after the test."""
    made: list[Job] = []

    def begin(*options: str, **words: Any) -> Job:
        said = {"root": str(tmp_path / "run"), "steps": FOR_EVER, "signals": {"SIGTERM": 25}, **words}
        made.append(Job(PROGRAM, [json.dumps(said)], *options))
        return made[-1]

    yield begin
    for job in made:
        job.close()


def stopped(output: str) -> int:
    """The step after which both ranks stopped: the same one, and as much was trained."""
    found = re.findall(r"rank (\d) stopped after step (\d+) with w (\d+)", output)
    assert sorted(rank for rank, _, _ in found) == ["0", "1"], output
    ((step, trained),) = {(int(step), int(trained)) for _, step, trained in found}
    assert trained == step + 1
    return step


def newest(root: Path) -> int:
    """The newest committed step."""
    checkpoint = cloudckpt.open(root / "run").latest()
    assert checkpoint is not None
    return checkpoint.step


def test_sigterm_reaches_all_ranks_and_one_checkpoint_is_made(start: Callable[..., Job], tmp_path: Path) -> None:
    """Torchrun passes it on and waits; it says that it failed all the same; the next start goes on with the next step."""
    job = start()
    job.hears(r"^committed \d+")
    job.process.terminate()
    output = job.rest()
    step = stopped(output)
    assert job.process.returncode == AGENT_FAILED
    assert newest(tmp_path) == step, output
    again = start(steps=step + 8)
    output = again.rest()
    assert again.process.returncode == 0, output
    assert re.findall(r"rank \d pid \d+ begins at (\d+)", output) == [str(step + 1)] * 2
    assert re.findall(r"rank \d finished with w (\d+)", output) == [str(step + 8)] * 2


def test_a_signal_to_one_rank_stops_both(start: Callable[..., Job], tmp_path: Path) -> None:
    """As a notice of one machine of many: the others hear of it from the rank that had it."""
    job = start()
    pid = int(job.hears(r"^rank 1 pid (\d+) begins")[1])
    job.hears(r"^committed \d+")
    os.kill(pid, signal.SIGTERM)
    output = job.rest()
    step = stopped(output)
    assert job.process.returncode == 0
    assert newest(tmp_path) == step, output


@pytest.mark.skipif("--shutdown-timeout" not in run_options(), reason="this torchrun has no --shutdown-timeout")
def test_ranks_that_do_not_come_to_their_next_step_are_killed(start: Callable[..., Job], tmp_path: Path) -> None:
    """After ``--shutdown-timeout``, with SIGKILL: what was committed before is what the next start goes on from."""
    job = start("--shutdown-timeout", "2", hang=True)
    job.hears(r"^committed \d+")
    job.process.terminate()
    job.hears(r"^rank \d hangs")
    job.rest()
    assert job.process.returncode == AGENT_FAILED
    step = newest(tmp_path)
    again = start(steps=step + 4)
    assert "stopped after step" not in again.rest()
    assert again.process.returncode == 0
    assert f"begins at {step + 1}" in "\n".join(again.lines)


def test_sigusr1_kills_torchrun_and_leaves_orphans_that_are_fenced(start: Callable[..., Job], tmp_path: Path) -> None:
    """The usual recipe for Slurm: torchrun is gone at once and its ranks train on; the next start takes the run from them."""
    job = start(signals={"SIGTERM": 25, "SIGUSR1": 100})
    job.hears(r"^committed \d+")
    job.process.send_signal(signal.SIGUSR1)
    job.process.wait(60)
    assert job.process.returncode == -signal.SIGUSR1
    job.hears(r"^committed \d+")  # nobody told the ranks
    job.hears(r"^committed \d+")
    again = start(steps=newest(tmp_path) + 200)
    orphans = job.rest()
    assert "FencedError" in orphans
    assert "stopped after step" not in orphans
    output = again.rest()
    assert again.process.returncode == 0, output
    assert len(re.findall(r"rank \d finished", output)) == 2


def test_sigusr1_is_passed_on_where_torchrun_is_told_to(start: Callable[..., Job], tmp_path: Path) -> None:
    """``--signals-to-handle``: as SIGTERM is."""
    job = start("--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1", signals={"SIGTERM": 25, "SIGUSR1": 100})
    job.hears(r"^committed \d+")
    job.process.send_signal(signal.SIGUSR1)
    output = job.rest()
    step = stopped(output)
    assert job.process.returncode not in {0, -signal.SIGUSR1}
    assert newest(tmp_path) == step, output


def test_a_rank_that_fails_brings_sigterm_to_the_others(start: Callable[..., Job], tmp_path: Path) -> None:
    """SIGTERM does not mean preemption: the survivor waits for nobody, and torchrun starts both again."""
    job = start("--max-restarts", "1", steps=40, fail_at=17)
    output = job.rest()
    assert job.process.returncode == 0, output
    begun = [int(step) for step in re.findall(r"rank \d pid \d+ begins at (\d+)", output)]
    assert begun == [0, 0, 15, 15]
    assert re.findall(r"rank \d finished with w (\d+)", output) == ["40", "40"]
    assert newest(tmp_path) == 39


def test_the_example_stops_with_its_data_loaders(tmp_path: Path) -> None:
    """Torchrun signals whole process groups; the workers of both ranks live through it."""
    words = ["--root", str(tmp_path / "run"), "--steps", str(FOR_EVER), "--save-every", "20", "--workers", "2"]
    job = Job(EXAMPLE, words)
    try:
        job.hears(r"^saved checkpoint-\d+")
        job.process.terminate()
        output = job.rest()
    finally:
        job.close()
    found = re.findall(r"rank (\d) of 2 stopped after step (\d+)", output)
    assert sorted(rank for rank, _ in found) == ["0", "1"], output
    assert {int(step) for _, step in found} == {newest(tmp_path)}
