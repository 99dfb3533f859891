"""Bytes that change on the way are a fault of the network: they are read again, and no checkpoint is called damaged."""

from __future__ import annotations

import json
import logging
import threading
from collections import Counter
from typing import Any

import pytest
import torch

import cloudckpt
from cloudckpt import CheckpointManager, CorruptCheckpointError, FormatError, Settings, StorageError
from cloudckpt.storage import MemoryStorage, Versioned
from cloudckpt.tensors import extents
from cloudckpt.testing import check_store

pytestmark = pytest.mark.memory_only

#: Requests of a thousand bytes, so that one chunk comes in several.
SMALL = Settings(max_read_bytes=1000, io_threads=3, read_gap_bytes=64)
QUICK = Settings(retry_base_s=1e-3, retry_cap_s=1e-2, manifest_deadline_s=1, storage_deadline_s=0.2)


class OnTheWay(MemoryStorage):
    """Memory behind a line that turns a bit of some answers.

    Attributes:
        times: how often each range, or each small object, comes wrong from now on.
        steady: whether it is the same bit every time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.times = 0
        self.steady = False
        self.only = ""
        self.asked: Counter[tuple[str, int]] = Counter()
        self.turned = 0
        self._count = threading.Lock()

    def _turns(self, key: str, start: int) -> int | None:
        """A number of its own for this answer, if a bit of it turns."""
        with self._count:
            if not self.times or self.only not in key or key == "manifest.json":
                return None
            self.asked[key, start] += 1
            number = self.asked[key, start]
            if number > self.times:
                return None
            self.turned += 1
            return self.turned

    def _place(self, size: int, number: int) -> int:
        return (size // 2 + (0 if self.steady else number)) % size

    def read(self, key: str, *, limit_bytes: int) -> Versioned:
        """See ``Storage.read``."""
        found = super().read(key, limit_bytes=limit_bytes)
        if (number := self._turns(key, 0)) is None:
            return found
        body = bytearray(found.body)
        body[self._place(len(body), number)] ^= 1
        return Versioned(bytes(body), found.version)

    def read_into(self, key: str, start: int, *targets: memoryview) -> None:
        """See ``Storage.read_into``."""
        super().read_into(key, start, *targets)
        if (number := self._turns(key, start)) is not None:
            target = max(targets, key=len)
            target[self._place(len(target), number)] ^= 1


def state_of(step: int) -> dict[str, Any]:
    """Several tensors, one of which is longer than a request of ``SMALL``."""
    return {
        "model": {"w": torch.arange(3000.0) * step, "b": torch.full((40,), float(step))},
        "extra": {"counts": torch.arange(100) * step},
    }


@pytest.fixture
def line() -> OnTheWay:
    """A run of two checkpoints behind a line that is fine so far."""
    storage = OnTheWay()
    with CheckpointManager(storage, settings=QUICK, keep_last=None) as ckpts:
        for step in (1, 2):
            ckpts.save(step, state_of(step), block=True)
    return storage


def is_step(values: dict[str, Any], step: int) -> bool:
    """Whether these are the values of a step, to the last bit."""
    wanted = state_of(step)
    return all(torch.equal(values[c][n], tensor) for c, own in wanted.items() for n, tensor in own.items())


@pytest.mark.parametrize("settings", [QUICK, SMALL], ids=["whole", "in pieces"])
@pytest.mark.parametrize("only", ["safetensors", "checkpoint.json", ""], ids=["payload", "index", "both"])
def test_what_came_wrong_once_is_read_again(
    line: OnTheWay, settings: Settings, only: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Each answer has a wrong bit the first time: restore and load are exact, nothing is marked, nobody is warned."""
    line.times, line.only = 1, only
    fresh = state_of(0)
    with CheckpointManager(line, settings=settings) as ckpts:
        resumed = ckpts.restore(fresh)
        assert resumed is not None
        assert resumed.step == 2
    assert is_step(fresh, 2)
    assert line.asked.total() > 0
    line.asked.clear()
    assert is_step(cloudckpt.open(line, settings=settings).load(), 2)
    assert [c.damaged for c in cloudckpt.open(line).checkpoints()] == [None, None]
    assert [r for r in caplog.records if r.levelno >= logging.WARNING] == []
    line.times = 0
    check_store(line)


@pytest.mark.parametrize("settings", [QUICK, SMALL], ids=["whole", "in pieces"])
def test_what_goes_by_way_of_buffers_is_read_again_too(
    line: OnTheWay, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same for memory that is not the host's: wrong bytes are on their way there already, and right ones follow."""
    monkeypatch.setattr(extents, "on_host", lambda _: False)
    line.times = 1
    assert is_step(cloudckpt.open(line, settings=settings).load(), 2)


def test_a_line_that_turns_another_bit_each_time_damages_nothing(line: OnTheWay) -> None:
    """If every answer is wrong in another way the restore fails with a StorageError, and no checkpoint is marked."""
    line.times, line.only = 10**6, "safetensors"
    with (
        CheckpointManager(line, settings=QUICK) as ckpts,
        pytest.raises(StorageError, match="other bytes came each time") as caught,
    ):
        ckpts.restore(state_of(0))
    assert caught.value.retryable
    assert [c.damaged for c in cloudckpt.open(line).checkpoints()] == [None, None]


def test_what_is_wrong_in_the_same_way_twice_is_damage(line: OnTheWay) -> None:
    """The same wrong bit at every look is what lies in the store: the checkpoint is marked, the one before restored."""
    line.times, line.steady, line.only = 10**6, True, f"{cloudckpt.open(line).select(2).name}/model"
    fresh = state_of(0)
    with CheckpointManager(line, settings=QUICK) as ckpts:
        resumed = ckpts.restore(fresh)
        assert resumed is not None
        assert resumed.step == 1
    assert is_step(fresh, 1)
    assert [c.damaged is not None for c in cloudckpt.open(line).checkpoints()] == [False, True]
    with pytest.raises(CorruptCheckpointError, match="checksum"):
        cloudckpt.open(line).load(2)


def test_verify_looks_twice_as_well(line: OnTheWay) -> None:
    """A deep verify over such a line finds nothing; where the bit is wrong in the store it names object and range."""
    line.times = 1
    report = cloudckpt.verify(line, deep=True)
    assert report.ok, report.findings
    line.times, line.steady = 10**6, True
    line.only = f"{cloudckpt.open(line).select(2).name}/model"
    findings = cloudckpt.verify(line, deep=True).findings
    assert {f.checkpoint.step for f in findings} == {2}
    assert all("checksum" in f.problem for f in findings)


class Wrong(MemoryStorage):
    """Memory behind a line that changes manifests.

    Attributes:
        times: how many more manifests come like that.
    """

    def __init__(self) -> None:
        super().__init__()
        self.times = 0

    def read(self, key: str, *, limit_bytes: int) -> Versioned:
        """See ``Storage.read``."""
        found = super().read(key, limit_bytes=limit_bytes)
        if key != "manifest.json" or not self.times:
            return found
        self.times -= 1
        return Versioned(self.changed(found.body), found.version)

    def changed(self, body: bytes) -> bytes:
        """What comes of these bytes."""
        raise NotImplementedError  # each line has a way of its own


class Misread(Wrong):
    """Changes a digit of the newest checkpoint's digest; the manifest has none of its own, as before there was one."""

    def changed(self, body: bytes) -> bytes:
        """See ``Wrong.changed``."""
        digest = json.loads(body)["entries"][-1]["index_digest"]
        other = digest[:-1] + ("1" if digest[-1] == "0" else "0")
        rest, _ = body.rsplit(b',\n "digest": ', 1)
        return rest.replace(digest.encode(), other.encode()) + b"\n}\n"


@pytest.mark.parametrize("select", ["latest", 2])
def test_a_digest_that_came_wrong_with_the_manifest_damages_nothing(
    select: str | int, caplog: pytest.LogCaptureFixture
) -> None:
    """Of a store that tells no checksum of the manifest: it is read again, has another digest, and that one fits."""
    storage = Misread()
    with CheckpointManager(storage, settings=QUICK, keep_last=None) as ckpts:
        for step in (1, 2):
            ckpts.save(step, state_of(step), block=True)
    storage.times = 1
    assert is_step(cloudckpt.open(storage, settings=QUICK).load(select), 2)
    assert storage.times == 0
    assert [c.damaged for c in cloudckpt.open(storage).checkpoints()] == [None, None]
    assert [r for r in caplog.records if r.levelno >= logging.WARNING] == []


class Turning(Wrong):
    """Turns a metric into another one."""

    def changed(self, body: bytes) -> bytes:
        """See ``Wrong.changed``."""
        return body.replace(b'"loss": 0.125', b'"loss": 8.125')


def test_a_metric_that_turned_on_the_way_costs_no_best() -> None:
    """Believed, it would make the next commit retire the best: the manifest is read again."""
    storage = Turning()
    words: dict[str, Any] = {"settings": QUICK, "keep_last": 1, "keep_best": 1, "monitor": "loss", "mode": "min"}
    with CheckpointManager(storage, **words) as ckpts:
        ckpts.save(1, state_of(1), metrics={"loss": 0.125}, block=True)
    storage.times = 1
    with CheckpointManager(storage, **words) as ckpts:
        for step in (2, 3):
            ckpts.save(step, state_of(step), metrics={"loss": 0.5}, block=True)
    assert storage.times == 0
    assert [c.step for c in cloudckpt.open(storage).checkpoints()] == [1, 3]


def test_a_metric_that_turned_in_the_store_is_refused_and_repaired() -> None:
    """Twice the same is the store's own: nothing goes on with it, and a repair takes the copy and the indexes."""
    storage = Turning()
    with CheckpointManager(storage, settings=QUICK, keep_best=1, monitor="loss", mode="min") as ckpts:
        ckpts.save(1, state_of(1), metrics={"loss": 0.125}, block=True)
        ckpts.save(2, state_of(2), metrics={"loss": 0.5}, block=True)
    storage.times = 10**6
    with pytest.raises(FormatError, match=r"(?s)changed after it was written.*cloudckpt repair"):
        cloudckpt.open(storage, settings=QUICK).best()
    cloudckpt.repair(storage, dry_run=False)
    storage.times = 0
    best = cloudckpt.open(storage, settings=QUICK).best()
    assert best is not None
    assert best.step == 1
    check_store(storage)
