"""Stores on their bad days, under a whole run: 503 for hours, answers cut or changed, listings of yesterday, hands.

(Past 350 lines: the days share one trainer and one proxy.)
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, suppress
from typing import Any

import pytest
import torch

import cloudckpt
from cloudckpt import (
    CheckpointManager,
    CorruptCheckpointError,
    FormatError,
    SaveError,
    Settings,
    State,
    StorageError,
)
from cloudckpt.repairing import repair_run
from cloudckpt.storage import Conditions, Listed, ManifestStore, MemoryStorage, S3Storage, Storage, open_storage
from cloudckpt.sweeping import gc_run, sweep_run
from cloudckpt.testing import Crash, FakeGCS, Fault, ScriptedStorage, check_store
from cloudckpt.testing.servers import MotoServer
from cloudckpt.verifying import verify_run
from tests.crash.test_faults_on_the_wire import Wire, wire
from tests.records import Recording

__all__ = ["wire"]  # a fixture

QUICK = Settings(
    retry_base_s=0.005, retry_cap_s=0.05, manifest_deadline_s=0.5, storage_deadline_s=0.5, request_timeout_s=0.5
)


def state_of(step: int) -> dict[str, Any]:
    """A state whose every bit follows from its step."""
    return {"model": {"w": torch.arange(20_000.0) * step}, "extra": {"step": step}}


def is_step(state: dict[str, Any], step: int) -> bool:
    """Whether it is that of a step, to the last bit."""
    return torch.equal(state["model"]["w"], state_of(step)["model"]["w"]) and state["extra"]["step"] == step


#: What a store does to every request, from some moment on, until it is well again.
DAYS: dict[str, dict[str, Any]] = {
    "503 for ever": {"action": "status", "status": 503},
    "500 for ever": {"action": "status", "status": 500},
    "429 for ever": {"action": "status", "status": 429, "headers": {"Retry-After": "1"}},
    "403 for ever": {"action": "status", "status": 403},
    "black hole": {"action": "hang"},
    "connections dropped": {"action": "drop_before"},
    "answers dropped": {"action": "drop_after"},
    "answers cut": {"action": "truncate"},
}


@pytest.mark.processes
@pytest.mark.parametrize("day", DAYS)
def test_a_bad_day_costs_the_saves_made_in_it_and_nothing_else(wire: Wire, day: str, record: Recording) -> None:
    """Saves fail in time and say so, nothing good is deleted, and once the store is well the next save works."""
    with record("a trainer through a bad day", day, wire.name) as case:
        through, past = wire.pair(QUICK)
        wire.proxy.clear()
        told: list[int] = []
        with CheckpointManager(through, monitor="loss", mode="min", keep_best=1, keep_last=4, settings=QUICK) as ckpts:
            for step in (1, 2):
                ckpts.save(step, state_of(step), metrics={"loss": float(step)}, block=True)
            words = dict(DAYS[day])
            wire.proxy.inject(words.pop("action"), times=None, **words)
            for step in (3, 4):
                # An answer to a write need not have a body that could be cut.
                fails: AbstractContextManager[Any] = (
                    pytest.raises((SaveError, StorageError))
                    if day != "answers cut"
                    else suppress(SaveError, StorageError)
                )
                with fails:
                    ckpts.save(step, state_of(step), metrics={"loss": 0.1}, block=True)
                case.points += 1
            with pytest.raises(StorageError):
                cloudckpt.open(through, settings=QUICK).load(1)
            wire.proxy.clear()
            check_store(past)
            for step in (1, 2):
                assert is_step(cloudckpt.open(past).load(step), step)
            for step in (5, 6):
                ckpts.save(step, state_of(step), metrics={"loss": float(step)}, block=True)
                told.append(step)
        assert {c.step for c in cloudckpt.open(past).checkpoints()} >= {*told}
        assert [c.damaged for c in cloudckpt.open(past).checkpoints() if c.damaged] == []
        gc_run(ManifestStore(past, QUICK), dry_run=False)
        check_store(past, settled=True)
        through.close()
        past.close()


@pytest.mark.processes
@pytest.mark.parametrize("what", ["manifest.json", "checkpoint.json", "safetensors"])
@pytest.mark.parametrize("day", ["truncate", "flip", "hang", "drop_after"])
def test_downloads_that_are_broken_for_a_while(wire: Wire, day: Any, what: str, record: Recording) -> None:
    """Each download of a kind is cut, changed, hung or lost once: the restore is exact, nothing is called damaged."""
    with record(f"a restore: {what}", f"downloads broken once: {day}", wire.name) as case:
        through, past = wire.pair(QUICK)
        with CheckpointManager(past, settings=QUICK, keep_last=None) as ckpts:
            for step in (1, 2):
                ckpts.save(step, state_of(step), block=True)
        wire.proxy.clear()
        seen: set[str] = set()

        def first_time(request: Any) -> bool:
            part = next((value for name, value in request.headers.items() if name.lower() == "range"), "")
            place = f"{request.path} {part}"
            if request.method != "GET" or what not in request.path or place in seen:
                return False
            seen.add(place)
            return True

        wire.proxy.inject(day, when=first_time, times=None)
        patient = Settings(
            retry_base_s=0.005, retry_cap_s=0.05, manifest_deadline_s=10, storage_deadline_s=10, request_timeout_s=1
        )
        fresh = state_of(0)
        try:
            with CheckpointManager(through, settings=patient) as ckpts:
                resumed = ckpts.restore(fresh)
                assert resumed is not None
                assert resumed.step == 2
        except FormatError:
            # A manifest that no checksum came with: it cannot be read, which is said, and nothing is done about it.
            assert (day, what) == ("flip", "manifest.json")
            fresh = cloudckpt.open(past).load(2)
        assert is_step(fresh, 2)
        assert [c.damaged for c in cloudckpt.open(past).checkpoints()] == [None, None]
        case.points = len(seen)
        wire.proxy.clear()
        through.close()
        past.close()


@pytest.mark.processes
def test_downloads_that_stay_cut_are_no_damage(wire: Wire, caplog: pytest.LogCaptureFixture) -> None:
    """Half of every payload answer, for good: a StorageError, no fall-back to an older step, and no mark."""
    through, past = wire.pair(QUICK)
    with CheckpointManager(past, settings=QUICK, keep_last=None) as ckpts:
        for step in (1, 2):
            ckpts.save(step, state_of(step), block=True)
    wire.proxy.clear()
    wire.proxy.inject("truncate", method="GET", match="safetensors", times=None)
    with CheckpointManager(through, settings=QUICK) as ckpts, pytest.raises(StorageError) as caught:
        ckpts.restore(state_of(0))
    assert not isinstance(caught.value, CorruptCheckpointError)
    assert [c.damaged for c in cloudckpt.open(past).checkpoints()] == [None, None]
    assert not [r for r in caplog.records if r.levelno == logging.WARNING and "damaged" in r.getMessage()]
    wire.proxy.clear()
    through.close()
    past.close()


# -- listings of yesterday -----------------------------------------------------------------------------------


class Yesterday(MemoryStorage):
    """A storage whose listings are those of an earlier moment, as eventually consistent stores had them."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen: list[Listed] | None = None

    def freeze(self) -> None:
        """From now on it lists what is there now."""
        self.frozen = [*super().list("")]

    def list(self, prefix: str = "", *, limit: int | None = None) -> Iterator[Listed]:
        """See ``Storage.list``."""
        if self.frozen is None:
            return super().list(prefix, limit=limit)
        return iter([item for item in self.frozen if item.key.startswith(prefix)][:limit])


@pytest.mark.parametrize("saves_since", [0, 1, 4])
def test_a_stale_listing_only_misses_garbage(saves_since: int, record: Recording) -> None:
    """With a listing of before some saves nothing that is committed is deleted, and a fresh one settles the rest."""
    with record("gc and sweep", "a stale listing", "memory") as case:
        storage = Yesterday()
        ckpts = CheckpointManager(storage, keep_last=2, settings=QUICK)
        for step in (1, 2, 3):
            ckpts.save(step, state_of(step), block=True)
        storage.put("checkpoint-7.deadbeef/model-00000-of-00001.safetensors", [b"x"], size_bytes=1)
        storage.freeze()
        for step in range(4, 4 + saves_since):
            ckpts.save(step, state_of(step), block=True)
        for act in (gc_run, sweep_run):
            act(ManifestStore(storage, QUICK), dry_run=False)
            check_store(storage)
        ckpts.save(9, state_of(9), block=True)
        ckpts.close()
        for checkpoint in cloudckpt.open(storage).checkpoints():
            assert is_step(cloudckpt.open(storage).load(checkpoint.name), checkpoint.step)
        storage.frozen = None
        gc_run(ManifestStore(storage, QUICK), dry_run=False)
        check_store(storage, settled=True)
        case.points = 2


def test_a_stale_listing_makes_no_new_run_of_an_old_one() -> None:
    """The manifest is read, never looked for in a listing: an empty listing beside it changes nothing."""
    storage = Yesterday()
    storage.freeze()
    with CheckpointManager(storage, keep_last=None, settings=QUICK) as ckpts:
        ckpts.save(1, state_of(1), block=True)
    with CheckpointManager(storage, settings=QUICK) as ckpts:
        fresh = state_of(0)
        assert ckpts.restore(fresh) is not None
        ckpts.save(2, state_of(2), block=True)
    assert is_step(fresh, 1)
    assert [c.step for c in cloudckpt.open(storage).checkpoints()] == [1, 2]


# -- versions, and objects removed or replaced by hand ---------------------------------------------------------


@pytest.fixture(params=["moto", "gcs"])
def versioned(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The root of a run in a bucket that keeps old versions."""
    bucket = f"kept-{uuid.uuid4().hex[:8]}"
    if request.param == "gcs":
        gcs: FakeGCS = request.getfixturevalue("gcs_server")
        request.getfixturevalue("gcs_root")
        gcs.create_bucket(bucket, versioning=True)
        return f"gs://{bucket}/run"
    moto: MotoServer = request.getfixturevalue("s3_server")
    request.getfixturevalue("s3_root")
    moto.create_bucket(bucket)
    client = moto.client()
    client.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
    client.close()
    return f"s3://{bucket}/run"


def test_a_manifest_under_a_delete_marker_is_no_new_run(versioned: str, record: Recording) -> None:
    """A create would succeed where only a delete marker lies: the run is refused all the same, and repaired."""
    with record("open, save, repair", "the manifest is deleted", versioned.partition(":")[0] + ", versioned") as case:
        with CheckpointManager(versioned, keep_last=None, settings=QUICK) as ckpts:
            for step in (1, 2):
                ckpts.save(step, state_of(step), block=True)
        storage = open_storage(versioned, settings=QUICK)
        assert storage.delete(["manifest.json"]) == {}
        acts: list[Callable[[], object]] = [
            lambda: CheckpointManager(versioned, settings=QUICK).restore(state_of(0)),
            lambda: CheckpointManager(versioned, settings=QUICK).save(3, state_of(3), block=True),
            lambda: cloudckpt.open(versioned, settings=QUICK).latest(),
        ]
        for act in acts:
            with pytest.raises(FormatError, match=r"no manifest\.json.*cloudckpt repair"):
                act()
        repair_run(ManifestStore(storage, QUICK), dry_run=False)
        fresh = state_of(0)
        with CheckpointManager(versioned, settings=QUICK) as ckpts:
            assert ckpts.restore(fresh) is not None
            ckpts.save(3, state_of(3), block=True)
        assert is_step(fresh, 2)
        check_store(storage)
        storage.close()
        case.points = len(acts)


def _replace_payload(storage: Storage, key: str) -> None:
    size = storage.size(key)
    storage.put(key, [b"\xff" * size], size_bytes=size)


#: What people do to a bucket by hand, to the newest checkpoint.
HANDS: dict[str, tuple[str, Callable[[Storage, str], object]]] = {
    "payload removed": ("safetensors", lambda storage, key: storage.delete([key])),
    "payload replaced": ("safetensors", _replace_payload),
    "payload cut": ("safetensors", lambda storage, key: storage.put(key, [b"x"], size_bytes=1)),
    "index removed": ("checkpoint.json", lambda storage, key: storage.delete([key])),
    "index replaced": ("checkpoint.json", lambda storage, key: storage.put(key, [b"{}"], size_bytes=2)),
}


@pytest.mark.processes
@pytest.mark.parametrize("hand", HANDS)
def test_what_was_removed_or_replaced_by_hand(wire: Wire, hand: str, record: Recording) -> None:
    """Verify names it without a download where the store has checksums, restore takes the one before, gc goes on."""
    with record("verify, restore, gc", hand, wire.name) as case:
        through, storage = wire.pair(QUICK)
        with CheckpointManager(storage, keep_last=None, settings=QUICK) as ckpts:
            for step in (1, 2):
                ckpts.save(step, state_of(step), block=True)
        kind, harm = HANDS[hand]
        folder = cloudckpt.open(storage).select(2).name
        key = next(item.key for item in storage.list(f"{folder}/") if item.key.endswith(kind))
        harm(storage, key)
        shallow = verify_run(ManifestStore(storage, QUICK))
        deep = verify_run(ManifestStore(storage, QUICK), deep=True)
        assert not deep.ok
        assert {finding.checkpoint.step for finding in (*deep.findings, *shallow.findings)} == {2}
        if shallow.attested:
            assert not shallow.ok, "the store keeps checksums, and one of them tells"
        if wire.name == "gcs":
            assert shallow.attested > 0, "every object of Google's has a checksum"
        if hand != "payload replaced":
            assert not shallow.ok
        fresh = state_of(0)
        with CheckpointManager(storage, settings=QUICK) as ckpts:
            resumed = ckpts.restore(fresh)
            assert resumed is not None
            assert resumed.step == 1
            ckpts.save(3, state_of(3), block=True)
        assert is_step(fresh, 1)
        gc_run(ManifestStore(storage, QUICK), dry_run=False)
        found = {c.step: c for c in cloudckpt.open(storage).checkpoints()}
        assert found.keys() == {1, 2, 3}
        assert found[2].damaged is not None
        assert {c.state for c in found.values()} == {State.COMMITTED}
        case.points = 3
        through.close()
        storage.close()


# -- whose uploads are aborted -----------------------------------------------------------------------------------


def _begun(server: Any, bucket: str, keys: Iterable[str]) -> None:
    client = server.client()
    for key in keys:
        client.create_multipart_upload(Bucket=bucket, Key=key)
    client.close()


@pytest.mark.processes
@pytest.mark.parametrize("kind", ["s3_server", "seaweedfs"])
@pytest.mark.parametrize("by", ["claim", "gc"])
def test_only_our_own_unfinished_uploads_are_aborted(
    kind: str, by: str, request: pytest.FixtureRequest, record: Recording
) -> None:
    """After kill -9 the next claim, or gc, aborts what was left of that save; uploads of anybody else go on."""
    server = request.getfixturevalue(kind)
    bucket = f"up-{uuid.uuid4().hex[:8]}"
    server.create_bucket(bucket)
    with record(f"{by}, after a job that died", "its uploads are unfinished", kind) as case:
        storage = S3Storage(bucket, "run", server.storage_options(), QUICK)
        storage.conditions = Conditions.HONOURED
        scripted = ScriptedStorage(storage, 4, Fault.CRASH_BEFORE)  # read, list, create, announce, and no put
        with pytest.raises(Crash):
            dying = CheckpointManager(scripted, keep_last=None, settings=QUICK)
            try:
                dying.save(1, state_of(1), block=True)
            finally:
                dying.close()
        pending = next(c for c in cloudckpt.open(storage).checkpoints(state=None) if c.state is State.PENDING)
        ours = [f"run/{pending.name}/model-00000-of-00001.safetensors"]
        orphaned = ["run/checkpoint-7.deadbeef/model-00000-of-00001.safetensors"]
        theirs = [
            f"run/{pending.name}/notes.txt",
            "run/other.bin",
            "run/checkpoint-old/model.bin",
            "run2/checkpoint-1.00000000/model-00000-of-00001.safetensors",
            "elsewhere.bin",
        ]
        _begun(server, bucket, [*ours, *orphaned, *theirs])
        with CheckpointManager(storage, settings=QUICK) as ckpts:
            ckpts.restore(state_of(0))
        assert sorted(server.uploads(bucket)) == sorted([*orphaned, *theirs])
        if by == "gc":
            gc_run(ManifestStore(storage, QUICK), dry_run=False)
            assert sorted(server.uploads(bucket)) == sorted(theirs)
        case.points = len(ours) + (len(orphaned) if by == "gc" else 0)
        storage.close()
