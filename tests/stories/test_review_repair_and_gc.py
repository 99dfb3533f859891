"""Defects of repair and gc that a review found, each as it was found."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

import cloudckpt
from cloudckpt import CheckpointManager, CorruptCheckpointError, Settings, State, StorageError
from cloudckpt.core.index_json import INDEX_LIMIT_BYTES, decode_index, encode_index
from cloudckpt.core.manifest_json import MANIFEST_LIMIT_BYTES, decode_manifest, encode_manifest
from cloudckpt.storage import Listed, ManifestStore, MemoryStorage
from cloudckpt.sweeping import gc_run
from cloudckpt.testing import ScriptedStorage, check_store

pytestmark = pytest.mark.memory_only

FAST = Settings(retry_base_s=1e-3, retry_cap_s=1e-2, manifest_deadline_s=1, storage_deadline_s=1)


def state_of(step: int) -> dict[str, Any]:
    """A state whose every bit follows from its step."""
    return {"w": torch.full((1000,), float(step))}


def saved(storage: MemoryStorage, *steps: int, **words: Any) -> None:
    """A closed run with these steps."""
    with CheckpointManager(storage, settings=FAST, **words) as ckpts:
        for step in steps:
            ckpts.save(step, state_of(step), block=True)


def manifest_of(storage: MemoryStorage) -> Any:
    """The manifest as it lies there."""
    return decode_manifest(storage.read("manifest.json", limit_bytes=MANIFEST_LIMIT_BYTES).body)


def put(storage: MemoryStorage, key: str, body: bytes) -> None:
    """Write an object as it is."""
    storage.put(key, [body], size_bytes=len(body))


def index_key(storage: MemoryStorage, step: int) -> str:
    """The key of one step's index."""
    return next(item.key for item in storage.list(f"checkpoint-{step}.") if item.key.endswith("checkpoint.json"))


def change_index(storage: MemoryStorage, step: int, **fields: Any) -> None:
    """Replace one step's index by another valid one."""
    key = index_key(storage, step)
    index = decode_index(storage.read(key, limit_bytes=INDEX_LIMIT_BYTES).body)
    put(storage, key, encode_index(replace(index, **fields)))


def test_two_histories_with_one_seq_are_repaired_into_a_manifest_that_can_be_read() -> None:
    """A rolled-back run gave seq 2 twice: the repaired run opens, saves on, and can be repaired again."""
    storage = MemoryStorage()
    saved(storage, 1, 2, keep_last=None)
    change_index(storage, 2, seq=1)
    put(storage, "manifest.json", b"garbled")
    for item in [*storage.list("manifest-")]:
        storage.delete([item.key])
    plan = cloudckpt.repair(storage, dry_run=False)
    assert [c.seq for c in plan.admitted] == [1, 2]
    assert plan.manifest.next_seq == 3
    saved(storage, 3)
    assert [c.step for c in cloudckpt.open(storage).checkpoints()] == [1, 2, 3]


def test_repair_does_not_bless_an_index_that_was_changed() -> None:
    """An index that is not the committed one stays an error, is said in the plan, and is chosen by no rule."""
    storage = MemoryStorage()
    saved(storage, 1, 2, keep_last=None)
    change_index(storage, 2, sealed_at="2030-01-01T00:00:00.000Z")
    plan = cloudckpt.repair(storage, dry_run=False)
    assert any("is damaged" in sentence for sentence in plan.could_not_know)
    run = cloudckpt.open(storage)
    assert run.select(2).damaged is not None
    assert run.latest() == run.select(1)
    with pytest.raises(CorruptCheckpointError):
        run.load(2)


def test_repair_keeps_what_a_person_wrote_about_a_save_in_flight() -> None:
    """Marked and tagged while it was uploaded, sealed, never committed: repair admits it with mark and tag."""
    storage = MemoryStorage()
    saved(storage, 1, 2, keep_last=None)
    manifest = manifest_of(storage)
    pending = replace(
        manifest.entries[-1],
        state=State.PENDING,
        committed_at=None,
        index_digest=None,
        kept_because=(),
        marks=("diverged",),
        tags=("mine",),
    )
    changed = replace(manifest, entries=(manifest.entries[0], pending), recent=(manifest.entries[0].id,))
    put(storage, "manifest.json", encode_manifest(changed))
    cloudckpt.repair(storage, dry_run=False)
    run = cloudckpt.open(storage)
    assert (run.select(2).marks, run.select(2).tags) == (("diverged",), ("mine",))
    assert run.latest() == run.select(1)


def test_gc_goes_on_after_a_repair_that_refused_a_folder() -> None:
    """A second folder of one save is refused by repair; gc then takes it away and asks for no other repair."""
    storage = MemoryStorage()
    saved(storage, 1, 2, keep_last=None)
    key = index_key(storage, 2)
    index = decode_index(storage.read(key, limit_bytes=INDEX_LIMIT_BYTES).body)
    put(storage, key.replace("checkpoint-2.", "checkpoint-10."), encode_index(replace(index, step=10, seq=77)))
    put(storage, "manifest.json", b"garbled")
    for item in [*storage.list("manifest-")]:
        storage.delete([item.key])
    plan = cloudckpt.repair(storage, dry_run=False)
    assert [*plan.refused] == [*plan.gc_deletes] == [f"checkpoint-10.{index.id}"]
    cloudckpt.gc(storage, dry_run=False)
    check_store(storage, settled=True)


def test_of_two_folders_of_one_save_the_whole_one_is_admitted() -> None:
    """Without a manifest to ask, the one that has lost its payload is the copy, even if it is numbered earlier."""
    storage = MemoryStorage()
    saved(storage, 1, 2, keep_last=None)
    key = index_key(storage, 2)
    index = decode_index(storage.read(key, limit_bytes=INDEX_LIMIT_BYTES).body)
    put(storage, key.replace("checkpoint-2.", "checkpoint-10."), encode_index(replace(index, step=10, seq=1)))
    for item in [*storage.list("manifest")]:
        storage.delete([item.key])
    plan = cloudckpt.repair(storage, dry_run=False)
    assert [(c.step, c.damaged) for c in plan.admitted] == [(1, None), (2, None)]
    assert [*plan.refused] == [f"checkpoint-10.{index.id}"]


def test_gc_counts_the_copy_of_the_manifest_that_its_own_write_leaves() -> None:
    """The repaired manifest names no copy of the time before, so whoever writes the third one does not take it away."""
    storage = MemoryStorage()
    saved(storage, 1, keep_last=None)
    cloudckpt.repair(storage, dry_run=False)
    saved(storage, 2)
    gc_run(ManifestStore(storage, replace(FAST, copy_every_revisions=1)), dry_run=False)
    assert len([*storage.list("manifest-0")]) == 2
    check_store(storage, settled=True)


class Uploading(MemoryStorage):
    """Memory whose payload puts are uploads that can be aborted while they are held."""

    def __init__(self) -> None:
        super().__init__()
        self.open: set[str] = set()
        self.hold = threading.Event()
        self.hold.set()
        self.begun = threading.Event()

    def put(self, key: str, buffers: Any, *, size_bytes: int, progress: Any = None) -> None:
        if not self.hold.is_set() and key.endswith(".safetensors"):
            self.open.add(key)
            self.begun.set()
            assert self.hold.wait(30)
            if key not in self.open:
                raise StorageError(f"NoSuchUpload: {key}")
            self.open.discard(key)
        super().put(key, buffers, size_bytes=size_bytes, progress=progress)

    def abort_uploads(self, prefix: str, *, spare: Callable[[str], bool] = lambda _: False) -> int:
        going = [key for key in sorted(self.open) if key.startswith(prefix) and not spare(key)]
        self.open -= set(going)
        return len(going)


class Undeletable(ScriptedStorage):
    """A storage as a job sees it that may not delete."""

    def delete(self, keys: Iterable[str]) -> dict[str, StorageError]:
        return {key: StorageError("403") for key in keys}


class Seen:
    """A storage as another process sees it, with something that happens in between. For a store, not for a manager."""

    def __init__(self, inner: MemoryStorage, **hooks: Any) -> None:
        self.inner = inner
        self.hooks = hooks

    def __getattr__(self, name: str) -> Any:
        return self.hooks.get(name) or getattr(self.inner, name)


def test_gc_never_aborts_the_upload_of_a_save_that_was_announced_meanwhile() -> None:
    """A save announced after gc's own write keeps its upload; one that nobody announced is aborted."""
    storage = Uploading()
    with CheckpointManager(storage, settings=FAST, keep_last=3) as ckpts:
        ckpts.save(1, state_of(1), block=True)
        put(storage, "checkpoint-7.deadbeef/w-00000-of-00001.safetensors", b"x")
        storage.open.add("checkpoint-8.deadbeef/w-00000-of-00001.safetensors")
        pending: list[Any] = []

        def delete(keys: Iterable[str]) -> Any:
            if not pending:
                storage.hold.clear()
                pending.append(ckpts.save(2, state_of(2)))
                assert storage.begun.wait(30)
            return storage.delete(keys)

        seen: Any = Seen(storage, delete=delete)
        report = gc_run(ManifestStore(seen, FAST), dry_run=False)
        storage.hold.set()
        pending[0].wait()
    assert report.aborted_uploads == 1
    assert [c.step for c in cloudckpt.open(storage).checkpoints()] == [1, 2]


def test_gc_forgets_only_what_it_has_seen_whole() -> None:
    """A save that was committed and retired while gc was listing keeps its entry until its bytes are gone."""
    storage = MemoryStorage()
    with CheckpointManager(Undeletable(storage), settings=FAST, keep_last=1) as ckpts:
        ckpts.save(1, state_of(1), block=True)

        def listing(prefix: str = "", limit: int | None = None) -> Iterator[Listed]:
            found = [*storage.list(prefix, limit=limit)]
            ckpts.save(2, state_of(2), block=True)
            ckpts.save(3, state_of(3), block=True)
            return iter(found)

        seen: Any = Seen(storage, list=listing)
        gc_run(ManifestStore(seen, FAST), dry_run=False)
    entries = {entry.step: entry.state for entry in manifest_of(storage).entries}
    assert entries[2] is State.RETIRED
    cloudckpt.gc(storage, dry_run=False)
    check_store(storage, settled=True)


def test_gc_leaves_what_needs_a_newer_version() -> None:
    """An index with a feature that this version does not know is left by gc as it is by sweep, and reported."""
    storage = MemoryStorage()
    with CheckpointManager(Undeletable(storage), settings=FAST, keep_last=1) as ckpts:
        for step in (1, 2):
            ckpts.save(step, state_of(step), block=True)
    change_index(storage, 1, requires=("shared-bytes",))
    before = [item.key for item in storage.list("checkpoint-1.")]
    report = cloudckpt.gc(storage, dry_run=False)
    assert "shared-bytes" in "".join(report.failed.values())
    assert [item.key for item in storage.list("checkpoint-1.")] == before
    assert [entry.step for entry in manifest_of(storage).entries] == [1, 2]


def test_a_failing_abort_is_reported_and_hides_nothing() -> None:
    """Gc without the right to list uploads says so in its report, and has done the rest."""
    storage = MemoryStorage()
    saved(storage, 1)
    put(storage, "checkpoint-7.deadbeef/w-00000-of-00001.safetensors", b"x")

    def forbidden(prefix: str, *, spare: Any = None) -> int:
        raise StorageError("403 s3:ListBucketMultipartUploads")

    seen: Any = Seen(storage, abort_uploads=forbidden)
    report = gc_run(ManifestStore(seen, FAST), dry_run=False)
    assert "403" in report.failed["unfinished uploads"]
    assert [*storage.list("checkpoint-7.")] == []
