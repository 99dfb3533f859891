"""A long run in a process of its own: thousands of saves with retention, a reader beside it, faults at random.

Prints one line of JSON: what was done, and what the process had (memory, files, threads) while it went on.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch

import cloudckpt
from cloudckpt import CheckpointManager, CheckpointNotFoundError, CloudCkptError, Settings, StorageError
from cloudckpt.storage import (
    Buffer,
    Conditions,
    Listed,
    LocalStorage,
    ManifestStore,
    MemoryStorage,
    Outcome,
    Storage,
    Unknown,
    Versioned,
    open_storage,
)
from cloudckpt.sweeping import gc_run
from cloudckpt.testing import check_store

_T = TypeVar("_T")

SETTINGS = Settings(
    retry_base_s=0.001, retry_cap_s=0.02, manifest_deadline_s=20, storage_deadline_s=20, request_timeout_s=10
)
SAMPLES = 8


class Flaky:
    """A storage of which a share of the requests is dropped on the way there, or on the way back. Counts them all."""

    def __init__(self, inner: Storage, rate: float, seed: int) -> None:
        self.counts: Counter[str] = Counter()
        self.faults = 0
        self._inner = inner
        self._rate = rate
        self._random = random.Random(seed)
        self._mutex = threading.Lock()

    @property
    def conditions(self) -> Conditions:
        """See ``Storage.conditions``."""
        return self._inner.conditions

    @conditions.setter
    def conditions(self, found: Conditions) -> None:
        self._inner.conditions = found

    @property
    def url(self) -> str:
        """See ``Storage.url``."""
        return self._inner.url

    def _do(self, verb: str, act: Callable[[], _T]) -> _T:
        with self._mutex:
            self.counts[verb] += 1
            fate = self._random.random()
            self.faults += fate < self._rate
        if fate < self._rate / 2:
            raise StorageError(f"a {verb} was dropped", retryable=True)
        answer = act()
        if fate < self._rate:
            raise StorageError(f"the answer to a {verb} was lost", retryable=True)
        return answer

    def _write(self, verb: str, act: Callable[[], Outcome]) -> Outcome:
        try:
            return self._do(verb, act)
        except StorageError as exc:
            return Unknown(exc)

    def read(self, key: str, *, limit_bytes: int) -> Versioned:
        """See ``Storage.read``."""
        return self._do("read", lambda: self._inner.read(key, limit_bytes=limit_bytes))

    def create(self, key: str, body: bytes) -> Outcome:
        """See ``Storage.create``."""
        return self._write("create", lambda: self._inner.create(key, body))

    def replace(self, key: str, body: bytes, *, expecting: str) -> Outcome:
        """See ``Storage.replace``."""
        return self._write("replace", lambda: self._inner.replace(key, body, expecting=expecting))

    def put(
        self, key: str, buffers: Iterable[Buffer], *, size_bytes: int, progress: Callable[[int], None] | None = None
    ) -> None:
        """See ``Storage.put``."""
        self._do("put", lambda: self._inner.put(key, buffers, size_bytes=size_bytes, progress=progress))

    def read_into(self, key: str, start: int, *targets: memoryview) -> None:
        """See ``Storage.read_into``."""
        self._do("read_into", lambda: self._inner.read_into(key, start, *targets))

    def size(self, key: str) -> int:
        """See ``Storage.size``."""
        return self._do("size", lambda: self._inner.size(key))

    def list(self, prefix: str = "", *, limit: int | None = None) -> Iterator[Listed]:
        """See ``Storage.list``."""
        return iter(self._do("list", lambda: [*self._inner.list(prefix, limit=limit)]))

    def delete(self, keys: Iterable[str]) -> dict[str, StorageError]:
        """See ``Storage.delete``."""
        going = [*keys]
        return self._do("delete", lambda: self._inner.delete(going))

    def abort_uploads(self, prefix: str, *, spare: Callable[[str], bool] = lambda _: False) -> int:
        """See ``Storage.abort_uploads``."""
        return self._do("abort_uploads", lambda: self._inner.abort_uploads(prefix, spare=spare))

    def close(self) -> None:
        """See ``Storage.close``."""
        self._inner.close()


def state_of(step: int) -> dict[str, Any]:
    """256 KiB of bits that follow from the step."""
    return {"model": {"w": torch.full((65_536,), float(step))}, "extra": {"step": step}}


def loss_of(step: int) -> float:
    """Up and down, so that the best is sometimes old and sometimes new."""
    return float((step * 7919) % 1009) / 1009


def sample() -> dict[str, int]:
    """What this process has: memory that is in use, open files, threads."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return {
        "rss_kib": int(status["VmRSS"].split()[0]),
        "files": len(list(Path("/proc/self/fd").iterdir())),
        "threads": int(status["Threads"]),
    }


class Reader(threading.Thread):
    """An evaluator beside the trainer: loads the latest and the best, again and again."""

    def __init__(self, storage: Storage) -> None:
        super().__init__(name="reader", daemon=True)
        self._storage = storage
        self._end = threading.Event()
        self.loads = 0
        self.wrong: list[str] = []
        self.missed: Counter[str] = Counter()

    def run(self) -> None:
        """Until it is told to stop."""
        run = cloudckpt.open(self._storage, settings=SETTINGS)
        while not self._end.is_set():
            for select in ("latest", "best"):
                try:
                    found = run.load(select)
                except (CheckpointNotFoundError, StorageError) as exc:
                    self.missed[type(exc).__name__] += 1
                    continue
                except CloudCkptError as exc:
                    self.wrong.append(f"{type(exc).__name__}: {exc}")
                    continue
                step = found["extra"]["step"]
                if not torch.equal(found["model"]["w"], state_of(step)["model"]["w"]):
                    self.wrong.append(f"{select}: step {step} is torn or mixed")
                self.loads += 1
            self._end.wait(0.01)  # others want to use the processor as well

    def stop(self) -> None:
        """Let the load under way end."""
        self._end.set()
        self.join(60)


def soak(inner: Storage, *, saves: int, rate: float, restarts: int) -> dict[str, Any]:
    """Save so often; the job is started anew a few times on the way."""
    flaky = Flaky(inner, rate, 20261127)
    told: list[cloudckpt.Checkpoint] = []
    failed: Counter[str] = Counter()
    samples: list[dict[str, int]] = []
    each = max(saves // restarts, 1)
    reader: Reader | None = None
    step = 0
    for _ in range(restarts):
        ckpts = CheckpointManager(
            flaky, monitor="loss", mode="min", keep_best=2, keep_last=3, settings=SETTINGS, listeners=()
        )
        try:
            with contextlib.suppress(CloudCkptError):
                ckpts.restore(state_of(0))
            for _ in range(each):
                step += 1
                try:
                    pending = ckpts.save(step, state_of(step), metrics={"loss": loss_of(step)}, block=step % 3 == 0)
                    if step % 3 == 0:
                        told.append(pending.wait())
                except CloudCkptError as exc:
                    failed[type(exc).__name__] += 1
                if reader is None and told:
                    reader = Reader(inner)
                    reader.start()
                if step % max(saves // SAMPLES, 1) == 0:
                    samples.append(sample())
        finally:
            with contextlib.suppress(CloudCkptError):
                ckpts.close()
    if reader is not None:
        reader.stop()
    # The faults on the wire go on while it is looked: what looks must try again, as the product does.
    steady = ManifestStore(inner, SETTINGS)
    check_store(steady.storage)
    run = cloudckpt.open(inner)
    newest = run.latest()
    best = run.best()
    gc_run(steady, dry_run=False)
    with CheckpointManager(inner, settings=SETTINGS) as last:
        last.restore(state_of(0))
    gc_run(steady, dry_run=False)
    check_store(steady.storage, settled=True)
    return {
        "saves": step,
        "told": len(told),
        "failed": dict(failed),
        "faults": flaky.faults,
        "requests": dict(flaky.counts),
        "samples": samples,
        "loads": reader.loads if reader else 0,
        "wrong": reader.wrong[:10] if reader else [],
        "missed": dict(reader.missed) if reader else {},
        "newest_told": max((c.seq for c in told), default=0),
        "newest": newest.seq if newest else 0,
        "best_told": min((c.metrics["loss"] for c in told), default=9.0),
        "best": best.metrics["loss"] if best else 9.0,
        "kept": len(run.checkpoints(state=None)),
        "manifest_bytes": len(steady.storage.read("manifest.json", limit_bytes=10**8).body),
    }


def main() -> None:
    """Read the arguments, soak, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("root")
    parser.add_argument("--saves", type=int, required=True)
    parser.add_argument("--rate", type=float, required=True)
    parser.add_argument("--restarts", type=int, default=4)
    parser.add_argument("--options", default="{}")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.root == "memory":
        inner: Storage = MemoryStorage()
    elif "://" in given.root:
        inner = open_storage(given.root, storage_options=json.loads(given.options), settings=SETTINGS)
    else:
        inner = LocalStorage(given.root)
    found = soak(inner, saves=given.saves, rate=given.rate, restarts=given.restarts)
    inner.close()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
