"""A pull that is stopped anywhere: at each request to the store, in every way, and at each call to the local disk."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cloudckpt import CloudCkptError
from cloudckpt.storage import Storage
from cloudckpt.testing import Crash, Fault, ScriptedStorage
from tests.crash.pull_worker import SCENARIOS, contents, damage, pull, save
from tests.records import Recording

ROOT = Path(__file__).parents[2]
STORES = ("moto", "seaweedfs", "gcs", "fake-gcs-server")


@pytest.mark.parametrize("fault", list(Fault))
@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("kind", ["memory", *(pytest.param(kind, marks=pytest.mark.slow) for kind in STORES)])
def test_a_pull_survives_every_fault_at_every_request(
    kind: str,
    scenario: str,
    fault: Fault,
    tmp_path: Path,
    new_storage: Callable[[str], Storage],
    record: Recording,
) -> None:
    """Whatever request fails, and however: no half a checkpoint has the final name, and the next pull goes on."""
    components, damaged = SCENARIOS[scenario], scenario == "over a damaged copy"
    storage = new_storage(kind)
    save(storage)
    before = {item.key: item.size_bytes for item in storage.list("")}
    with record(f"pull: {scenario}", fault, kind) as case:
        wanted = contents(pull(storage, tmp_path / "fine", components))

        def prepared(name: str) -> Path:
            if damaged:
                damage(pull(storage, tmp_path / name, components))
            return tmp_path / name

        rehearsal = ScriptedStorage(storage)
        pull(rehearsal, prepared("rehearsal"), components)
        total = len(rehearsal.calls)
        assert total >= 4  # the manifest, the index, and two objects at least
        for number in range(total):
            into = prepared(str(number))
            final = into / "checkpoint-3"
            scripted = ScriptedStorage(storage, number, fault)
            with contextlib.suppress(Crash, CloudCkptError):
                pull(scripted, into, components)
            assert scripted.fired, f"call {number} was never made"
            if final.exists() and not damaged:
                assert contents(final) == wanted, f"{scripted.calls[number]}: half a checkpoint has the final name"
            assert contents(pull(storage, into, components)) == wanted, scripted.calls[number]
            assert [path.name for path in into.iterdir()] == [final.name], scripted.calls[number]
            case.points += 1
        # Who reads changes nothing, whatever becomes of it.
        assert {item.key: item.size_bytes for item in storage.list("")} == before


@pytest.mark.processes
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks a process for each call")
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_pull_that_is_killed_at_any_call_to_the_disk(scenario: str, tmp_path: Path, record: Recording) -> None:
    """SIGKILL before each open, mkdir, rename and fsync, and in the middle of each write: the next pull completes it."""
    worker = Path(__file__).with_name("pull_worker.py")
    with record(f"pull: {scenario}", "kill -9 at every call to the disk", "local") as case:
        done = subprocess.run(
            [sys.executable, str(worker), str(tmp_path), scenario],
            capture_output=True,
            text=True,
            check=False,
            timeout=250,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        assert done.returncode == 0, done.stderr[-5000:]
        case.points = int(done.stdout.split()[-1])
        assert case.points > 10
