"""Races of editors, probes and late answers that a review found, each as it was found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import cloudckpt
from cloudckpt import CheckpointManager, ConfigError, FormatError, SaveError, Settings, StorageError, editing
from cloudckpt.core.manifest_json import MANIFEST_LIMIT_BYTES
from cloudckpt.storage import Conditions, ManifestStore, MemoryStorage, Outcome, Unknown
from cloudckpt.storage.probe import probe

pytestmark = pytest.mark.memory_only

FAST = Settings(retry_base_s=1e-4, retry_cap_s=1e-3, manifest_deadline_s=0.5, storage_deadline_s=0.1)


def state_of(step: int) -> dict[str, Any]:
    """A state whose every bit follows from its step."""
    return {"w": torch.full((8,), float(step))}


class Broken(MemoryStorage):
    """Memory that refuses payload while ``full``, and calls ``meanwhile`` before each conditional write."""

    def __init__(self) -> None:
        super().__init__("memory://broken")
        self.full = False
        self.down = False
        self.create_hook: Callable[[str, Callable[[], Outcome]], Outcome] = lambda _, write: write()
        self.replace_hook: Callable[[str, Callable[[], Outcome]], Outcome] = lambda _, write: write()

    def put(self, key: str, *args: Any, **words: Any) -> None:
        if self.full:
            raise StorageError("no space left")
        super().put(key, *args, **words)

    def read(self, *args: Any, **words: Any) -> Any:
        if self.down:
            raise StorageError("503", retryable=True)
        return super().read(*args, **words)

    def create(self, key: str, body: bytes) -> Outcome:
        return self.create_hook(key, lambda: MemoryStorage.create(self, key, body))

    def replace(self, key: str, body: bytes, *, expecting: str) -> Outcome:
        return self.replace_hook(key, lambda: MemoryStorage.replace(self, key, body, expecting=expecting))


@pytest.mark.parametrize("beside", [False, True], ids=["by the manager", "by an editor"])
def test_a_pin_of_a_step_whose_second_save_failed_protects_the_first(*, beside: bool) -> None:
    """Step 5 is committed, saved again in vain, and pinned: the committed one stays, with the metric it was given."""
    storage = Broken()
    with CheckpointManager(storage, settings=FAST, keep_last=1) as ckpts:
        good = ckpts.save(5, state_of(5), block=True).checkpoint
        storage.full = True
        with pytest.raises(SaveError, match="no space left"):
            ckpts.save(5, state_of(5), block=True)
        storage.full = False
        if beside:
            store = ManifestStore(storage, FAST)
            editing.pin(store, 5)
            assert editing.report_metrics(store, 5, {"acc": 1.0})
        else:
            ckpts.pin(5)
            assert ckpts.report_metrics(5, {"acc": 1.0})
        for step in (6, 7):
            ckpts.save(step, state_of(step), block=True)
    kept = {c.id: c for c in cloudckpt.open(storage).checkpoints()}
    assert kept[good.id].pinned
    assert kept[good.id].metrics == {"acc": 1.0}


def test_an_ambiguous_beginning_is_a_usage_error() -> None:
    """Two save ids begin alike: whoever writes the beginning is asked for more, not told that nothing is there."""
    storage = MemoryStorage()
    ckpts = CheckpointManager(storage, settings=FAST)
    given = iter(["aaaa1111", "aaaa2222"])
    real = ckpts._store.token
    ckpts._store.token = lambda digits: next(given) if digits == 8 else real(digits)
    with ckpts:
        ckpts.save(1, state_of(1), block=True)
        ckpts.save(2, state_of(2), block=True)
        with pytest.raises(ConfigError, match="beginning of 2 save ids, write more of it: aaaa1111, aaaa2222"):
            ckpts.report_metrics("aaaa", {"acc": 1.0})


def test_a_doubt_of_the_proposal_before_does_not_hide_a_plain_no() -> None:
    """An answer is lost, somebody else wrote, and the next try is refused with 403: that 403 is raised at once."""
    storage = Broken()
    with CheckpointManager(storage, settings=FAST) as ckpts:
        ckpts.save(1, state_of(1), block=True)
    tries: list[str] = []

    def replace(key: str, write: Callable[[], Outcome]) -> Outcome:
        tries.append(key)
        if len(tries) == 1:
            storage.replace_hook = lambda _, again: again()
            editing.tag(ManifestStore(storage, FAST), 1, add=["other"])
            storage.replace_hook = replace
            return Unknown(StorageError("timeout", retryable=True))
        return Unknown(StorageError("403 forbidden"))

    storage.replace_hook = replace
    with pytest.raises(StorageError, match="403 forbidden"):
        editing.pin(ManifestStore(storage, FAST), 1)
    assert len(tries) == 2


def test_a_probe_whose_object_gc_takes_away_condemns_no_store() -> None:
    """Somebody's gc deletes the probe between its two creates: the probe asks again under another name."""
    storage = Broken()
    seen: list[str] = []

    def create(key: str, write: Callable[[], Outcome]) -> Outcome:
        seen.append(key)
        if len(seen) == 2:
            storage.delete([key])
        return write()

    storage.create_hook = create
    assert probe(storage).conditions is Conditions.HONOURED
    assert len(set(seen)) == 2
    assert [*storage.list()] == []


def test_refuse_does_not_refuse_this_process_its_own_late_claim() -> None:
    """The claim lands, the store is silent past the deadline; the second try finds that it is its own."""
    storage = Broken()

    def create(key: str, write: Callable[[], Outcome]) -> Outcome:
        write()
        storage.down = True
        return Unknown(StorageError("timeout", retryable=True))

    storage.create_hook = create
    ckpts = CheckpointManager(storage, settings=FAST, takeover="refuse")
    with pytest.raises(SaveError, match="never told"):
        ckpts.restore(state_of(0))
    storage.down = False
    storage.create_hook = lambda _, write: write()
    assert ckpts.restore(state_of(0)) is None
    ckpts.close()
    manifest = ManifestStore(storage).read()
    assert manifest is not None
    assert manifest.writer_epoch == 1


def test_a_manifest_that_no_reader_would_take_is_not_written() -> None:
    """Metrics of absurd size are refused before they make the whole run unreadable."""
    storage = MemoryStorage()
    many = {f"metric-{n:06d}-{'x' * 150}": float(n) for n in range(MANIFEST_LIMIT_BYTES // 160)}
    with CheckpointManager(storage, settings=FAST) as ckpts:
        ckpts.save(1, state_of(1), block=True)
        with pytest.raises(FormatError, match="readers take no more than"):
            ckpts.report_metrics(1, many)
    assert [c.step for c in cloudckpt.open(storage).checkpoints()] == [1]
