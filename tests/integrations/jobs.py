"""Real trainings in processes of their own: started, held at a step, killed, started again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


@dataclass(frozen=True)
class Place:
    """Where the job saves to, and how it gets there.

    Attributes:
        root: the run's URL.
        environment: variables for its process.
        options: for reading the run from here.
    """

    root: str
    environment: dict[str, str]
    options: dict[str, object]


@dataclass(frozen=True)
class Job:
    """A training that runs, and the folder it runs in."""

    process: subprocess.Popen[str]
    work: Path

    def errors(self) -> str:
        """The end of what it wrote to its standard error."""
        return (self.work / "stderr.txt").read_text(errors="replace")[-4000:]


def start(script: str, place: Place, work: Path, *words: str, ranks: int = 1) -> Job:
    """Start a training; under torchrun if there are several ranks. It runs in ``work``, an empty folder at first."""
    work.mkdir(parents=True, exist_ok=True)
    program = [sys.executable]
    if ranks > 1:
        launcher = ["--nproc-per-node", str(ranks), "--local-addr", "127.0.0.1", "--rdzv-backend", "c10d"]
        program += ["-m", "torch.distributed.run", *launcher, "--rdzv-endpoint", "127.0.0.1:0"]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        **place.environment,
    }
    # Into a file: nobody reads a pipe of it while the job is listened to, and a full one would stop the job.
    with (work / "stderr.txt").open("a") as errors:
        process = subprocess.Popen(
            [*program, str(HERE / script), "--root", place.root, "--work", str(work), *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            cwd=work,
            env=environment,
        )
    return Job(process, work)


def finished(job: Job) -> list[str]:
    """What a job printed that ended well."""
    try:
        out, _ = job.process.communicate(timeout=240)
    except BaseException:
        job.process.kill()
        job.process.communicate()
        raise
    assert job.process.returncode == 0, f"{out}\n{job.errors()}"
    return out.splitlines()


def killed_when_held(job: Job) -> list[str]:
    """Read what a job prints until it says that it holds, then kill it: no handler runs, nothing is cleaned up."""
    assert job.process.stdout is not None
    lines = []
    for line in job.process.stdout:
        lines.append(line.strip())
        if lines[-1] == "held":
            job.process.send_signal(signal.SIGKILL)
            job.process.communicate()
            return lines
    job.process.communicate()
    raise AssertionError(f"it ended before it held:\n{lines}\n{job.errors()}")


def word(lines: list[str], name: str) -> str:
    """The rest of the one line that begins with this word."""
    (found,) = [line for line in lines if line.split(" ", 1)[0] == name]
    return found.partition(" ")[2]
