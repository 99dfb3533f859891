"""Many writers of one manifest: no landed change is ever lost."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from cloudckpt.config import Settings
from cloudckpt.core.model import Manifest
from cloudckpt.storage import ManifestStore, MemoryStorage, Storage
from cloudckpt.sweeping import gc_run
from cloudckpt.testing import check_store

WORKER = Path(__file__).parent / "workers" / "increment.py"


@pytest.mark.processes
@pytest.mark.parametrize("kind", ["local", "moto", "seaweedfs", "gcs", "fake-gcs-server"])
def test_eight_processes_count_to_four_hundred(
    kind: str, new_storage: Callable[[str], Storage], request: pytest.FixtureRequest
) -> None:
    """8 processes that count up 50 times each by compare-and-swap, on every store, count to exactly 400."""
    storage = new_storage(kind)
    servers = {
        "moto": "s3_server",
        "seaweedfs": "seaweedfs",
        "gcs": "gcs_server",
        "fake-gcs-server": "fake_gcs_server",
    }
    environment = request.getfixturevalue(servers[kind]).environment() if kind in servers else {}
    with contextlib.ExitStack() as stack:
        workers = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, str(WORKER), storage.url, "50"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                    env={**os.environ, **environment},
                )
            )
            for _ in range(8)
        ]
        for worker in workers:
            assert worker.stdout is not None
            assert worker.stdout.readline() == "ready\n"
        for worker in workers:
            assert worker.stdin is not None
            worker.stdin.write("go\n")
            worker.stdin.flush()
        errors = [worker.communicate(timeout=240)[1] for worker in workers]

    assert [worker.returncode for worker in workers] == [0] * 8, "\n".join(errors)
    found = ManifestStore(storage).read()
    assert found is not None
    assert (found.next_seq - 1, found.revision) == (400, 400)
    # A writer that is slow between its write and its copy may leave one that fell out of the list meanwhile.
    gc_run(ManifestStore(storage), dry_run=False)
    check_store(storage, settled=True)


def one_store_each(storage: Storage) -> Callable[[], ManifestStore]:
    """As eight processes would have it."""
    return lambda: ManifestStore(storage, Settings(retry_base_s=0.0001, retry_cap_s=0.001))


def one_store_for_all(storage: Storage) -> Callable[[], ManifestStore]:
    """As the threads of one process have it."""
    store = one_store_each(storage)()
    return lambda: store


@pytest.mark.parametrize("share", [one_store_each, one_store_for_all])
def test_eight_threads_count_to_a_hundred_and_sixty(
    memory_storage: MemoryStorage, share: Callable[[Storage], Callable[[], ManifestStore]]
) -> None:
    """8 threads that count up 20 times each count to exactly 160, with a store each and with one for all."""
    store_of = share(memory_storage)

    def count(_: int) -> None:
        store = store_of()
        for _ in range(20):
            store.transact(
                lambda m, _: replace(m, next_seq=m.next_seq + 1),
                prepare=lambda _: None,
                new=lambda: Manifest(run_id="0" * 32),
            )

    with ThreadPoolExecutor(8) as pool:
        [*pool.map(count, range(8))]
    found = ManifestStore(memory_storage).read()
    assert found is not None
    assert (found.next_seq - 1, found.revision) == (160, 160)
    gc_run(ManifestStore(memory_storage), dry_run=False)
    check_store(memory_storage, settled=True)
