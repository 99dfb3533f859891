"""A run goes on for thousands of saves: nothing is lost, nothing grows, no request is made that was not budgeted."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import cloudckpt
from cloudckpt import CheckpointManager, Settings
from cloudckpt.core.manifest import recompute
from cloudckpt.core.manifest_json import MANIFEST_LIMIT_BYTES, decode_manifest, encode_manifest
from cloudckpt.storage import Landed, Storage
from cloudckpt.testing import FaultProxy, ScriptedStorage
from cloudckpt.testing.builders import checkpoint
from cloudckpt.testing.servers import SeaweedFS
from tests.records import Recording

WORKER = Path(__file__).with_name("worker.py")

#: What a warm process may still grow by from one quarter of a run to another: an allocator's slack and a few threads,
#: not a state (256 KiB), a file or a thread for every save.
SLACK = {"rss_kib": 32 * 1024, "files": 2, "threads": 2}

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc"),
]


def soaked(root: str, saves: int, rate: float, **options: Any) -> dict[str, Any]:
    """What a worker found."""
    done = subprocess.run(
        [
            *(sys.executable, "-W", "error", str(WORKER), root, "--saves", str(saves), "--rate", str(rate)),
            *("--options", json.dumps(options)),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=3000,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def check(found: dict[str, Any], saves: int) -> None:
    """What must hold of any long run."""
    assert found["wrong"] == []
    assert found["loads"] > 0
    assert found["newest"] >= found["newest_told"], "the newest acknowledged is gone (I5)"
    assert found["best"] <= found["best_told"], "the best acknowledged is gone (I9)"
    assert found["kept"] <= 2 + 3 + 2, "retention does not keep up"
    # The journal, the history and the copies are bounded: the manifest does not know how long the run is.
    assert found["manifest_bytes"] < 64 * 1024
    # From the second quarter on, when everything has been made that is made once.
    for what, slack in SLACK.items():
        assert growth(found, what) <= slack, f"{what}: {[s[what] for s in found['samples']]}"
    assert found["saves"] >= saves - 4


def growth(found: dict[str, Any], what: str) -> int:
    """By how much the least of the last quarter is above the most of the second one.

    Loads and saves that are under way at one sample and not at another are no growth; a leak is there in all of them.
    """
    values: list[int] = [sample[what] for sample in found["samples"]]
    quarter = len(values) // 4
    assert quarter >= 2, values
    return min(values[-quarter:]) - max(values[quarter : 2 * quarter])


def figures(found: dict[str, Any]) -> dict[str, float]:
    """What is worth writing down."""
    return {
        "saves": found["saves"],
        "saves that failed": sum(found["failed"].values()),
        "requests": sum(found["requests"].values()),
        "faults": found["faults"],
        "loads beside it": found["loads"],
        "memory growth, KiB": growth(found, "rss_kib"),
        "open files at the end": found["samples"][-1]["files"],
        "manifest, bytes": found["manifest_bytes"],
    }


@pytest.mark.parametrize("kind", ["memory", "local"])
def test_some_hundred_saves_with_faults(kind: str, tmp_path: Path, record: Recording) -> None:
    """A twentieth of all requests fails: what was told is there, the reader saw nothing torn, nothing grew."""
    with record("a long run with a reader", "5 % of requests", kind) as case:
        found = soaked("memory" if kind == "memory" else str(tmp_path / "run"), 240, 0.05)
        check(found, 240)
        assert found["faults"] > 20
        assert sum(found["failed"].values()) < found["saves"] / 2
        case.points, case.figures = found["saves"], figures(found)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", ["memory", "local"])
def test_thousands_of_saves_with_faults(
    kind: str, tmp_path: Path, pytestconfig: pytest.Config, record: Recording
) -> None:
    """The same for ``--soak`` saves."""
    saves = int(pytestconfig.getoption("--soak"))
    with record("a long run with a reader", "5 % of requests", kind) as case:
        found = soaked("memory" if kind == "memory" else str(tmp_path / "run"), saves, 0.05)
        check(found, saves)
        case.points, case.figures = found["saves"], figures(found)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_thousands_of_saves_on_an_object_store(
    seaweedfs: SeaweedFS, pytestconfig: pytest.Config, record: Recording
) -> None:
    """The same over real requests, a twentieth of which is dropped, lost or throttled on the wire."""
    saves = int(pytestconfig.getoption("--soak")) // 4
    bucket = f"soak-{uuid.uuid4().hex[:8]}"
    seaweedfs.create_bucket(bucket)
    chance = random.Random(20261127)

    def share(part: float) -> Callable[[Any], bool]:
        return lambda _: chance.random() < part

    with record("a long run with a reader", "5 % of requests", "seaweedfs") as case, FaultProxy(seaweedfs.url) as proxy:
        broken = [
            proxy.inject("drop_before", when=share(0.015), times=None),
            proxy.inject("drop_after", when=share(0.015), times=None),
            proxy.inject("status", status=503, when=share(0.02), times=None),
        ]
        found = soaked(f"s3://{bucket}/run", saves, 0.0, **{**seaweedfs.storage_options(), "endpoint_url": proxy.url})
        check(found, saves)
        # On the wire everything is tried again: not one save may fail by a fault that passes.
        assert found["failed"] == {}
        found["faults"] = sum(fault.hits for fault in broken)
        case.points, case.figures = found["saves"], figures(found)
    assert seaweedfs.uploads(bucket) == []


def test_a_long_run_makes_the_requests_that_are_budgeted(record: Recording) -> None:
    """Without faults each save is its payload, one index and two manifest writes, plus two deletes and the copies."""
    with record("a long run", "none: requests are counted", "memory") as case:
        saves = 200
        found = soaked("memory", saves, 0.0)
        check(found, saves)
        requests = found["requests"]
        assert found["failed"] == {}
        assert requests["put"] == 2 * saves  # one payload object (plain values are in the index) and one index
        restarts = 4
        # Two a save; a claim for each start but the first, which creates; one more to close each.
        assert requests["replace"] == 2 * saves + (restarts - 1) + restarts
        assert requests.get("list", 0) == 1, "the first claim of an empty root looks whether it is empty"
        assert requests.get("size", 0) == 0
        assert requests.get("abort_uploads", 0) == 0
        case.points, case.figures = saves, figures(found)


@pytest.mark.parametrize("kind", ["memory", "local", pytest.param("seaweedfs", marks=pytest.mark.slow)])
def test_ten_thousand_kept_checkpoints(kind: str, new_storage: Callable[[str], Storage], record: Recording) -> None:
    """A manifest of 10,000 entries is within what is read; a save, a restore and a listing on top of it work."""
    with record("a save on top of 10,000 kept checkpoints", "none", kind) as case:
        storage = new_storage(kind)
        settings = Settings(copy_every_revisions=10**6)
        with CheckpointManager(storage, monitor="loss", mode="min", keep_last=None, settings=settings) as ckpts:
            ckpts.save(10_001, {"w": torch.ones(3)}, metrics={"loss": 0.5}, block=True)
        held = storage.read("manifest.json", limit_bytes=MANIFEST_LIMIT_BYTES)
        manifest = decode_manifest(held.body)
        (real,) = manifest.entries
        older = [
            checkpoint(
                step,
                id=f"{step:08x}",
                metrics={"loss": 1.0 + step / 1e6, "accuracy": step / 1e5, "learning_rate": 1e-4},
                tags=("nightly",) if step % 100 == 0 else (),
            )
            for step in range(1, 10_001)
        ]
        entries = (*older, replace(real, seq=10_001))
        grown = recompute(replace(manifest, entries=entries, next_seq=10_002, commits=10_001))
        swapped = storage.replace("manifest.json", encode_manifest(grown), expecting=held.version)
        assert isinstance(swapped, Landed), swapped

        scripted = ScriptedStorage(storage)
        with CheckpointManager(scripted, settings=settings) as ckpts:
            assert ckpts.restore({"w": torch.zeros(3)}) is not None
            scripted.forget()
            began = time.monotonic()
            ckpts.save(10_002, {"w": torch.ones(3)}, metrics={"loss": 0.4}, block=True)
            seconds = time.monotonic() - began
            assert scripted.counts() == {"put": 2, "replace": 2}
        began = time.monotonic()
        run = cloudckpt.open(storage)
        assert len(run.checkpoints()) == 10_002
        listing = time.monotonic() - began
        best = run.best()
        assert best is not None
        assert best.step == 10_002
        size = len(storage.read("manifest.json", limit_bytes=MANIFEST_LIMIT_BYTES).body)
        assert size < MANIFEST_LIMIT_BYTES // 2
        case.points = 10_002
        case.figures = {"announce and commit, s": round(seconds, 3), "listing, s": round(listing, 3), "bytes": size}
