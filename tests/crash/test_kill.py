"""kill -9 at many moments of a real trainer on a real disk, spread over the phases of a save."""

from __future__ import annotations

import json
import mmap
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import cloudckpt
from cloudckpt import CheckpointManager, State
from cloudckpt.config import Settings
from cloudckpt.storage import LocalStorage, S3Storage, Storage
from cloudckpt.testing import check_store
from cloudckpt.testing.servers import SeaweedFS
from tests.records import Recording

WORKER = Path(__file__).with_name("kill_worker.py")
PHASES = ("other", "claim", "announce", "upload", "seal", "seal-to-commit", "delete")
AIMED_AT = ("announce", "upload", "seal-to-commit", "delete")
PATIENCE_S = 60.0
#: What the trainer keeps, of the best and of the last.
KEPT = 2


class Nursery:
    """The warm process that forks trainers."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def start(self, job: dict[str, Any]) -> int:
        """Fork a trainer; its pid."""
        assert self._process.stdin is not None
        print(json.dumps(job), file=self._process.stdin, flush=True)
        return self._number()

    def reap(self) -> int:
        """The exit code of the trainer started last."""
        return self._number()

    def _number(self) -> int:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the nursery died"
        return int(line)

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(PATIENCE_S)
        self._process.stdout.close()


@pytest.fixture
def nursery() -> Iterator[Nursery]:
    """A warm process to fork trainers from."""
    found = Nursery()
    yield found
    found.close()


def kill_in(phase: str | None, pid: int, note: mmap.mmap, rng: random.Random) -> str:
    """Kill the trainer, in ``phase`` or after a random time; the phase it was in when the signal left."""
    deadline = time.monotonic() + PATIENCE_S
    if phase is None:
        until = time.monotonic() + rng.uniform(0.0, 0.15)
        while time.monotonic() < until:
            pass
    else:
        wanted = PHASES.index(phase)
        # Skip a random number of times, so that the kill does not always meet the first save of a process.
        for _ in range(rng.randint(1, 4)):
            while note[0] == wanted and time.monotonic() < deadline:
                pass
            while note[0] != wanted and time.monotonic() < deadline:
                pass
        until = time.monotonic() + rng.uniform(0.0, 0.0008)
        while time.monotonic() < until:
            pass
    hit = PHASES[note[0]]
    os.kill(pid, signal.SIGKILL)
    return hit


def expected(step: int, size: int) -> torch.Tensor:
    """The weights that the trainer saves at a step."""
    return torch.arange(size, dtype=torch.int64) * (step + 1)


def loss_of(step: int) -> float:
    """The loss that the trainer reports at a step."""
    return float((step * 7919) % 101) / 101


def check_after_kill(storage: Storage, notes: Path, size: int) -> None:
    """The listing is consistent; the acknowledged newest and the acknowledged best load and match bit for bit."""
    check_store(storage)
    acks = [json.loads(line) for line in Path(f"{notes}.ack").read_text().splitlines()]
    if not acks:
        return
    run = cloudckpt.open(storage)
    committed = {c.id: c for c in run.checkpoints()}
    newest = acks[-1]
    best = min(acks, key=lambda ack: (loss_of(ack["step"]), ack["seq"]))
    # Only newer saves, or better ones, may have taken their places: rolled forward, or killed before the answer.
    newer = [c for c in committed.values() if c.seq > newest["seq"]]
    better = [c for c in committed.values() if c.metrics["loss"] < loss_of(best["step"])]
    assert newest["id"] in committed or len(newer) >= KEPT, f"the newest acknowledged, {newest}, is gone"
    assert best["id"] in committed or len(better) >= KEPT, f"the best acknowledged, {best}, is gone"
    for name in {c for c in (newest["id"], best["id"]) if c in committed} | {"latest", "best"}:
        checkpoint = run.select(name)
        loaded = run.load(checkpoint.name)
        assert torch.equal(loaded["model"]["w"], expected(checkpoint.step, size))
        assert loaded["extra"]["step"] == checkpoint.step


def kill_often(
    nursery: Nursery, storage: Storage, *, options: dict[str, Any], notes: Path, kills: int, size: int
) -> Counter[str]:
    """Start, kill, check; then start once more and go on. How often each phase was hit."""
    rng = random.Random(20261123)
    phase_file, ack_file = Path(f"{notes}.phase"), Path(f"{notes}.ack")
    phase_file.write_bytes(b"\0")
    ack_file.touch()
    job = {"root": storage.url, "options": options, "notes": str(notes), "size": size}
    hits: Counter[str] = Counter()
    with phase_file.open("r+b") as file, mmap.mmap(file.fileno(), 1) as note:
        for number in range(kills):
            note[0] = PHASES.index("other")
            pid = nursery.start(job)
            # Four of five are aimed, each phase in turn; the rest falls where it falls.
            aim = None if number % 5 == 4 else AIMED_AT[number % 5 % 4]
            hits[kill_in(aim, pid, note, rng)] += 1
            assert nursery.reap() == -signal.SIGKILL
            check_after_kill(storage, notes, size)
    acknowledged = len(ack_file.read_text().splitlines())
    print(f"\n{kills} kills on {storage.url}, {acknowledged} acknowledged saves; phase hit:")
    for phase in PHASES:
        print(f"  {phase:<15} {hits[phase]:>4} {'#' * hits[phase]}")
    for phase in AIMED_AT:
        assert hits[phase] >= kills // 20, f"{phase} was hit {hits[phase]} times in {kills}"

    with CheckpointManager(storage) as ckpts:
        assert ckpts.restore({"model": {"w": expected(0, size)}, "extra": {"step": 0}}) is not None
    cloudckpt.gc(storage, dry_run=False)
    check_store(storage, settled=True)
    assert {c.state for c in cloudckpt.open(storage).checkpoints(state=None)} == {State.COMMITTED}
    return hits


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.timeout(1800)
def test_nothing_acknowledged_is_lost_by_kill_9(
    nursery: Nursery, tmp_path: Path, pytestconfig: pytest.Config, record: Recording
) -> None:
    """A trainer killed with SIGKILL at any moment loses nothing it was told is saved, and the next start goes on."""
    kills = int(pytestconfig.getoption("--kills"))
    storage = LocalStorage(tmp_path / "run")
    with record("a trainer", "kill -9", "local") as case:
        hits = kill_often(nursery, storage, options={}, notes=tmp_path / "notes", kills=kills, size=200_000)
        case.points = hits.total()
        case.figures.update(hits)


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.timeout(1800)
def test_nothing_acknowledged_is_lost_by_kill_9_on_s3(
    nursery: Nursery, tmp_path: Path, pytestconfig: pytest.Config, seaweedfs: SeaweedFS, record: Recording
) -> None:
    """The same on a real S3 server with uploads in several parts, a quarter as often; no upload is left unfinished."""
    kills = max(int(pytestconfig.getoption("--kills")) // 4, 6)
    bucket = f"kill-{uuid.uuid4().hex[:8]}"
    seaweedfs.create_bucket(bucket)
    options = seaweedfs.storage_options()
    storage = S3Storage(bucket, "run", options, Settings())
    try:
        with record("a trainer", "kill -9", "seaweedfs") as case:
            hits = kill_often(nursery, storage, options=options, notes=tmp_path / "notes", kills=kills, size=1_500_000)
            case.points = hits.total()
            case.figures.update(hits)
        assert storage.abort_uploads("") == 0
    finally:
        storage.close()
