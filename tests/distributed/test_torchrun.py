"""``examples/fsdp2_train.py`` under torchrun: to its end, killed and started again, and on more ranks."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from cloudckpt.testing.fault_proxy import FaultProxy

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(
        not hasattr(torch.cpu.Stream, "record_event"),
        reason="FSDP2 of this torch does not train on CPUs: its forward asks torch.cpu.Stream for record_event",
    ),
]

ROOT = Path(__file__).parents[2]
STEPS, SAVED = 8, [1, 3, 5, 7]


def torchrun(root: str, ranks: int, *, restarts: int = 0) -> subprocess.Popen[str]:
    """Start the example under torchrun; all that its ranks print comes out of one pipe."""
    launcher = ["--nproc-per-node", str(ranks), "--max-restarts", str(restarts), "--local-addr", "127.0.0.1"]
    launcher += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    words = ["--root", root, "--steps", str(STEPS), "--save-every", "2", "--width", "32", "--layers", "2"]
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *launcher, str(ROOT / "examples" / "fsdp2_train.py"), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Ranks that are started again would find each other's old addresses in a store that outlives them.
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        },
    )


def end(job: subprocess.Popen[str]) -> None:
    """End torchrun, which ends its ranks."""
    job.terminate()
    job.communicate()


def lines_of(job: subprocess.Popen[str]) -> list[str]:
    """What the job printed, once it has ended well."""
    try:
        out, err = job.communicate(timeout=200)
    except BaseException:
        end(job)
        raise
    assert job.returncode == 0, err
    return out.splitlines()


def weights_in(lines: list[str]) -> str:
    """The digest that the job printed last, once."""
    (found,) = [line for line in lines if line.startswith("weights ")]
    return found


def worker(job: subprocess.Popen[str], rank: int) -> int:
    """The pid of a rank."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = path.joinpath("stat").read_text().rpartition(")")[2].split()[1]
            environment = path.joinpath("environ").read_bytes().split(b"\0")
        except OSError:  # it ended meanwhile, or is none of ours
            continue
        if int(parent) == job.pid and f"RANK={rank}".encode() in environment:
            return int(path.name)
    raise AssertionError(f"torchrun has no rank {rank}")


@dataclass(frozen=True)
class Undisturbed:
    """A job of two ranks that nothing happened to: where it saved, and what it printed."""

    root: str
    lines: list[str]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """The example, once, from the beginning to the end."""
    root = str(tmp_path_factory.mktemp("torchrun") / "run")
    return Undisturbed(root, lines_of(torchrun(root, 2)))


def steps_of(lines: list[str], what: str) -> list[int]:
    """The steps of the lines that begin so, in their order."""
    return [int(found[1]) for line in lines if (found := re.match(rf"{what} checkpoint-(\d+)\b", line))]


def test_the_example_runs_to_its_end_and_logs_once(undisturbed: Undisturbed) -> None:
    """Two ranks, and each INFO line comes out once."""
    assert steps_of(undisturbed.lines, "saving") == SAVED
    assert steps_of(undisturbed.lines, "saved") == SAVED
    said = Counter(
        line for line in undisturbed.lines if re.search(r"checkpoint-\d+ \(|^saving|^New best|^Training", line)
    )
    assert said
    assert {*said.values()} == {1}, said
    assert weights_in(undisturbed.lines)


@pytest.mark.skipif(sys.platform != "linux", reason="finds the ranks in /proc")
@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_killed_job_ends_with_the_same_weights(
    undisturbed: Undisturbed, faulty_s3_root: str, s3_faults: FaultProxy, victim: int
) -> None:
    """SIGKILL in mid-upload: torchrun starts all ranks again, they resume from what was committed, and nothing differs."""
    payload = rf"checkpoint-5\.\w+/model-0000{victim}-of-00002\.safetensors"
    held = s3_faults.inject("hang", method="PUT", match=payload)
    job = torchrun(faulty_s3_root, 2, restarts=1)
    try:
        assert held.wait(120)
        os.kill(worker(job, victim), signal.SIGKILL)
    except BaseException:
        end(job)
        raise
    finally:
        held.release()
    lines = lines_of(job)
    assert steps_of(lines, "saved") == SAVED
    assert steps_of(lines, "saving") == [1, 3, 5, 5, 7]
    assert sum(line.startswith("resumed from ") and "checkpoint-3." in line for line in lines) == 1, lines
    assert weights_in(lines) == weights_in(undisturbed.lines)


def test_four_ranks_restore_what_two_saved(undisturbed: Undisturbed) -> None:
    """All steps are done, so what they print is what they restored."""
    lines = lines_of(torchrun(undisturbed.root, 4))
    assert steps_of(lines, "saving") == []
    assert weights_in(lines) == weights_in(undisturbed.lines)
