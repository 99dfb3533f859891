"""A process that stands still in mid-save, is replaced by another one, and wakes up: SIGSTOP, take-over, SIGCONT."""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import random
import signal
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import cloudckpt
from cloudckpt import CheckpointManager, FencedError, State
from cloudckpt.config import Settings
from cloudckpt.core.keys import LOCK
from cloudckpt.storage import LocalStorage, S3Storage, Storage
from cloudckpt.testing import check_store
from cloudckpt.testing.servers import SeaweedFS
from tests.crash.test_kill import PATIENCE_S, PHASES, Nursery, expected
from tests.records import Recording

pytestmark = [pytest.mark.processes, pytest.mark.timeout(900)]

#: Steps of the second job, which no first one reaches.
SECOND = 10**6


@pytest.fixture
def nursery() -> Iterator[Nursery]:
    """A warm process to fork trainers from."""
    found = Nursery()
    yield found
    found.close()


def is_stopped(pid: int) -> bool:
    """Whether every thread of the process stands still (Linux)."""
    try:
        stats = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/stat")]
    except (FileNotFoundError, ProcessLookupError):
        return False  # one of them has ended meanwhile
    return all(stat[stat.rfind(")") + 2] in "Tt" for stat in stats)


def until(pid: int, note: mmap.mmap, phase: str) -> None:
    """Wait until the trainer is in a phase of a save, whichever."""
    wanted, end = PHASES.index(phase), time.monotonic() + PATIENCE_S
    while note[0] != wanted:
        assert time.monotonic() < end, f"the trainer never came to {phase}"
        os.kill(pid, 0)


def holds_lock(root: str) -> bool:
    """Whether a process holds the lock of a run on a local disk: nobody can write there until it goes on."""
    with Path(root, LOCK).open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False  # and it is given back with the file


def stop_in(phase: str, pid: int, note: mmap.mmap, rng: random.Random, root: str) -> str:
    """Stop the trainer in a phase, as far as that can be hit; the phase it stands still in."""
    for _ in range(1000):
        until(pid, note, phase)
        time.sleep(rng.uniform(0.0, 0.0005))  # somewhere in it
        os.kill(pid, signal.SIGSTOP)
        while not is_stopped(pid):
            pass
        hit = PHASES[note[0]]
        if hit != "claim" and ("://" in root or not holds_lock(root)):
            return hit
        os.kill(pid, signal.SIGCONT)
    raise AssertionError(f"the trainer could not be stopped in {phase}")


def take_over(storage: Storage, size: int) -> tuple[list[str], dict[str, Any]]:
    """A second job claims, resumes and saves; the ids it saved, and the entries that its claim found, by id."""
    saved = []
    with CheckpointManager(storage, keep_last=3) as ckpts:
        state = {"model": {"w": expected(0, size)}, "extra": {"step": 0}}
        ckpts.restore(state)
        found = {c.id: c for c in ckpts.checkpoints(state=None)}
        for number in range(2):
            step = SECOND + number
            state = {"model": {"w": expected(step, size)}, "extra": {"step": step}}
            # Never better than what there is: the first job's best stays.
            saved.append(ckpts.save(step, state, metrics={"loss": 2.0 + number}, block=True).checkpoint.id)
    cloudckpt.gc(storage, dry_run=False)
    return saved, found


def wake_often(
    nursery: Nursery,
    make: Any,
    *,
    options: dict[str, Any],
    notes: Path,
    rounds: int,
    size: int,
    phases: list[str],
) -> Counter[str]:
    """Stop, take over, wake up, check; the phases that were hit."""
    rng = random.Random(20261128)
    hits: Counter[str] = Counter()
    for number in range(rounds):
        storage: Storage = make(number)
        Path(f"{notes}.phase").write_bytes(b"\0")
        Path(f"{notes}.ack").write_bytes(b"")
        with Path(f"{notes}.phase").open("r+b") as file, mmap.mmap(file.fileno(), 1) as note:
            pid = nursery.start({"root": storage.url, "options": options, "notes": str(notes), "size": size})
            for _ in range(rng.randint(2, 5)):  # some saves first
                until(pid, note, "seal-to-commit")
                until(pid, note, "announce")
            hits[stop_in(phases[number % len(phases)], pid, note, rng, storage.url)] += 1
            acked = Path(f"{notes}.ack").read_text().splitlines()
            saved, found = take_over(storage, size)
            os.kill(pid, signal.SIGCONT)
            assert nursery.reap() == FencedError.exit_code, "the zombie was not told that it was replaced"
        check_store(storage)
        run = cloudckpt.open(storage)
        now = {c.id: c for c in run.checkpoints(state=None)}
        assert set(saved) <= set(now), "the zombie took something from its successor (I5, I7)"
        for save_id in saved:
            checkpoint = now[save_id]
            assert torch.equal(run.load(checkpoint.name)["model"]["w"], expected(checkpoint.step, size))
        for line in Path(f"{notes}.ack").read_text().splitlines()[len(acked) :]:
            # Its commit had landed before it was stopped, and the claim of its successor has seen that.
            entry = found.get(json.loads(line)["id"])
            assert entry is not None, "the zombie was told that a save had succeeded that never was (I6)"
            assert entry.state is State.COMMITTED
        if acked:
            best = min((json.loads(line) for line in acked), key=lambda a: (float((a["step"] * 7919) % 101), a["seq"]))
            better = [c for c in now.values() if c.metrics.get("loss", 9.0) <= float((best["step"] * 7919) % 101) / 101]
            assert better, "the best acknowledged before the take-over is gone (I9)"
        cloudckpt.gc(storage, dry_run=False)
        check_store(storage, settled=True)
        assert {c.state for c in run.checkpoints(state=None)} == {State.COMMITTED}
        storage.close()
    return hits


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="whether a process stands still is read from /proc")
def test_a_process_that_wakes_up_after_it_was_replaced_harms_nothing(
    nursery: Nursery, tmp_path: Path, record: Recording
) -> None:
    """Stopped in upload, between seal and commit, or in a delete: it is told, harms nothing, and exits with 5."""
    with record("a trainer that sleeps through a take-over", "SIGSTOP, SIGCONT", "local") as case:
        hits = wake_often(
            nursery,
            lambda number: LocalStorage(tmp_path / f"run-{number}"),
            options={},
            notes=tmp_path / "notes",
            rounds=6,
            size=100_000,
            phases=["upload", "seal-to-commit", "delete"],
        )
        case.points = hits.total()
        case.figures.update(hits)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="whether a process stands still is read from /proc")
def test_the_same_on_an_object_store(
    nursery: Nursery, tmp_path: Path, seaweedfs: SeaweedFS, pytestconfig: pytest.Config, record: Recording
) -> None:
    """There it may stand still in the middle of a request for the manifest as well, or of a part of an upload."""
    bucket = f"zombie-{uuid.uuid4().hex[:8]}"
    seaweedfs.create_bucket(bucket)
    options = seaweedfs.storage_options()
    with record("a trainer that sleeps through a take-over", "SIGSTOP, SIGCONT", "seaweedfs") as case:
        hits = wake_often(
            nursery,
            lambda number: S3Storage(bucket, f"run-{number}", options, Settings()),
            options=options,
            notes=tmp_path / "notes",
            rounds=max(int(pytestconfig.getoption("--kills")) // 2, 4),
            size=1_500_000,
            phases=["announce", "upload", "seal-to-commit", "delete"],
        )
        case.points = hits.total()
        case.figures.update(hits)
        assert seaweedfs.uploads(bucket) == []
