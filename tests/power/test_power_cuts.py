"""The power goes at many moments of a real trainer: what it was told is saved is there, whole, on every file system."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import cloudckpt
from cloudckpt import CheckpointManager, CloudCkptError, State
from cloudckpt.storage import LocalStorage
from cloudckpt.testing import check_store
from tests.crash.test_kill import PATIENCE_S, Nursery, check_after_kill, expected
from tests.power.disks import KINDS, Disk
from tests.records import Recording

pytestmark = [pytest.mark.processes, pytest.mark.slow, pytest.mark.timeout(1800)]

SIZE = 50_000
#: Seconds between two cuts: several saves each.
PAUSE_S = (0.05, 0.6)


@pytest.fixture
def nursery() -> Iterator[Nursery]:
    """A warm process to fork trainers from."""
    found = Nursery()
    yield found
    found.close()


def acknowledged(notes: Path) -> list[str]:
    """The lines of the saves that the trainer was told had succeeded. They lie on the machine's own disk."""
    text = Path(f"{notes}.ack").read_text()
    return text[: text.rfind("\n") + 1].splitlines()


def cut_often(nursery: Nursery, disk: Disk, folder: Path, cuts: int, *, synced: bool) -> dict[int, list[str]]:
    """Cut the power under a trainer; for each cut what had been acknowledged before it."""
    rng = random.Random(20261127)
    notes = folder / "notes"
    Path(f"{notes}.phase").write_bytes(b"\0")
    Path(f"{notes}.ack").touch()
    job = {"root": str(disk.place / "run"), "options": {}, "notes": str(notes), "size": SIZE, "synced": synced}
    pid = nursery.start(job)
    found: dict[int, list[str]] = {}
    try:
        end = time.monotonic() + PATIENCE_S
        while not acknowledged(notes) and time.monotonic() < end:
            time.sleep(0.01)
        for _ in range(cuts):
            time.sleep(rng.uniform(*PAUSE_S))  # a moment like any other
            before = acknowledged(notes)
            found[disk.cut()] = before
    finally:
        os.kill(pid, signal.SIGKILL)
        assert nursery.reap() == -signal.SIGKILL
    disk.pull_out()
    return found


def look(disk: Disk, cut: int, before: list[str], folder: Path) -> str | None:
    """What is wrong with the run after a cut; None if nothing is, and the next job goes on."""
    notes = folder / f"cut-{cut}"
    Path(f"{notes}.ack").write_text("".join(f"{line}\n" for line in before))
    with disk.after(cut) as place:
        storage = LocalStorage(place / "run")
        try:
            check_after_kill(storage, notes, SIZE)
            with CheckpointManager(storage) as ckpts:
                resumed = ckpts.restore({"model": {"w": expected(0, SIZE)}, "extra": {"step": 0}})
                assert resumed is not None, "nothing to resume from"
                assert resumed.seq >= json.loads(before[-1])["seq"], "an acknowledged save was rolled back"
            cloudckpt.gc(storage, dry_run=False)
            check_store(storage, settled=True)
            assert {c.state for c in cloudckpt.open(storage).checkpoints(state=None)} == {State.COMMITTED}
        except (AssertionError, CloudCkptError) as exc:
            return f"cut {cut}, {len(before)} acknowledged: {type(exc).__name__}: {exc}"
    return None


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_acknowledged_is_lost_when_the_power_goes(
    kind: str, nursery: Nursery, tmp_path: Path, pytestconfig: pytest.Config, record: Recording
) -> None:
    """After every cut the acknowledged newest and best are there to the last bit, and training goes on."""
    cuts = int(pytestconfig.getoption("--cuts"))
    with record("a trainer on a local disk", "power cut", kind) as case:
        with Disk(tmp_path, kind) as disk:
            found = cut_often(nursery, disk, tmp_path, cuts, synced=True)
            assert all(found.values()), "the trainer had not saved anything"
            wrong = [problem for cut, before in found.items() if (problem := look(disk, cut, before, tmp_path))]
        case.points = cuts
        case.figures["acknowledged"] = len(acknowledged(tmp_path / "notes"))
        assert not wrong, f"{len(wrong)} of {cuts} on {kind}:\n" + "\n".join(wrong)


@pytest.mark.parametrize("kind", KINDS)
def test_without_syncing_the_same_cuts_lose_saves(
    kind: str, nursery: Nursery, tmp_path: Path, pytestconfig: pytest.Config, record: Recording
) -> None:
    """The other way round, so that the test above could fail: whoever syncs nothing loses what it was told."""
    cuts = int(pytestconfig.getoption("--cuts"))
    with record("a trainer that syncs nothing (control)", "power cut", kind) as case:
        with Disk(tmp_path, kind) as disk:
            found = cut_often(nursery, disk, tmp_path, cuts, synced=False)
            wrong = [problem for cut, before in found.items() if (problem := look(disk, cut, before, tmp_path))]
        case.points = cuts
        case.figures["cuts that lost something"] = len(wrong)
        assert wrong, f"{cuts} cuts on {kind} found nothing wrong with a trainer that syncs nothing"
