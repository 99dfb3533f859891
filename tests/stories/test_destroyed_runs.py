"""A real run whose manifest is destroyed, in every way that happens to files: it comes back to the last bit.

(Past 350 lines: every way to destroy a run, over the same few runs.)
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

import cloudckpt
from cloudckpt import CheckpointManager, ConflictError, FencedError, FormatError, Settings, editing
from cloudckpt.collecting import remove_checkpoints
from cloudckpt.core import keys
from cloudckpt.core.index_json import INDEX_LIMIT_BYTES
from cloudckpt.core.manifest_json import MANIFEST_LIMIT_BYTES
from cloudckpt.core.model import State
from cloudckpt.repairing import repair_run
from cloudckpt.storage import ManifestStore, MemoryStorage, Storage
from cloudckpt.sweeping import gc_run
from cloudckpt.testing import check_store

#: Long enough for the slowest of the backends that these stories are told on.
QUICK = Settings(retry_base_s=1e-3, retry_cap_s=1e-2, manifest_deadline_s=5, storage_deadline_s=5)

Bodies = dict[str, bytes]


def state_of(step: int) -> dict[str, Any]:
    """A state whose every bit follows from its step, the optimizer's included."""
    return {
        "model": {"w": torch.arange(500.0) * step, "b": torch.full((3,), -float(step))},
        "optimizer": {"exp_avg": torch.arange(500.0) / step if step else torch.zeros(500)},
        "extra": {"step": step, "betas": (0.9, 0.999)},
    }


def a_run(storage: Storage) -> Bodies:
    """Steps 1 to 4: 2 is the best, 1 is pinned, 3 is tagged. What the manifest was after each of them."""
    bodies: Bodies = {}
    with CheckpointManager(storage, monitor="loss", mode="min", keep_best=1, keep_last=2, settings=QUICK) as ckpts:
        for step, loss in ((1, 0.5), (2, 0.1), (3, 0.4), (4, 0.3)):
            ckpts.save(step, state_of(step), metrics={"loss": loss}, pin=step == 1, block=True)
            bodies[str(step)] = storage.read("manifest.json", limit_bytes=MANIFEST_LIMIT_BYTES).body
        ckpts.tag(3, "release")
    bodies["now"] = storage.read("manifest.json", limit_bytes=MANIFEST_LIMIT_BYTES).body
    return bodies


def put(storage: Storage, body: bytes | None, *, copies: bool) -> None:
    """Replace the manifest by these bytes, or by nothing; with or without its copies."""
    going = [item.key for item in storage.list("manifest") if copies is False or item.key == "manifest.json"]
    assert storage.delete(going) == {}
    if body is not None:
        storage.put("manifest.json", [body], size_bytes=len(body))


def edited(body: bytes, change: Callable[[dict[str, Any]], object]) -> bytes:
    """The manifest after somebody opened it in an editor."""
    document = json.loads(body)
    change(document)
    return json.dumps(document, indent=2).encode()


HARMS: dict[str, Callable[[Bodies], bytes | None]] = {
    "lost": lambda _: None,
    "truncated": lambda bodies: bodies["now"][: len(bodies["now"]) // 3],
    "empty": lambda _: b"",
    "zeros": lambda bodies: bytes(len(bodies["now"])),
    "half zeros": lambda bodies: bodies["now"][:4096] + bytes(max(len(bodies["now"]) - 4096, 1)),
    "text in it": lambda bodies: bodies["now"].replace(b'"entries"', b'// mine\n "entries"', 1),
    "a number as text": lambda bodies: edited(bodies["now"], lambda m: m.update(next_seq="5")),
    "an entry twice": lambda bodies: edited(bodies["now"], lambda m: m["entries"].append(m["entries"][0])),
    "entries out of order": lambda bodies: edited(bodies["now"], lambda m: m["entries"].reverse()),
    "a field removed": lambda bodies: edited(bodies["now"], lambda m: m.pop("run_id")),
    "another file": lambda _: b"<html><body>503 Service Unavailable</body></html>",
}


@pytest.mark.parametrize("copies", [True, False], ids=["with copies", "without copies"])
@pytest.mark.parametrize("harm", HARMS)
def test_a_destroyed_manifest_is_repaired(harm: str, copies: bool) -> None:
    """Refused until a person repairs it; then every whole checkpoint is there, held, with its bits."""
    storage = MemoryStorage()
    bodies = a_run(storage)
    kept = {c.step for c in cloudckpt.open(storage).checkpoints()}
    put(storage, HARMS[harm](bodies), copies=copies)
    for act in (
        lambda: CheckpointManager(storage, settings=QUICK).restore(state_of(0)),
        lambda: cloudckpt.open(storage).latest(),
        lambda: gc_run(ManifestStore(storage, QUICK), dry_run=False),
    ):
        with pytest.raises(FormatError, match="cloudckpt repair"):
            act()
    before = {item.key for item in storage.list("")}
    proposal = repair_run(ManifestStore(storage, QUICK))
    assert {item.key for item in storage.list("")} == before, "a proposal writes nothing"
    done = repair_run(ManifestStore(storage, QUICK), dry_run=False)
    assert {c.step for c in done.admitted} == {c.step for c in proposal.admitted} == kept
    assert all(c.held for c in done.admitted)
    assert done.could_not_know
    for step in kept:
        loaded = cloudckpt.open(storage).load(step)
        assert torch.equal(loaded["model"]["w"], state_of(step)["model"]["w"])
        assert torch.equal(loaded["optimizer"]["exp_avg"], state_of(step)["optimizer"]["exp_avg"])
        assert loaded["extra"] == state_of(step)["extra"]
    run = cloudckpt.open(storage)
    assert run.select(1).pinned, "a pin is in the index as well"
    if copies:
        assert "release" in run.select(3).tags, "a tag that was given later is in a copy"
    fresh = state_of(0)
    with CheckpointManager(storage, settings=QUICK) as ckpts:
        resumed = ckpts.restore(fresh)
        assert resumed is not None
        assert resumed.step == 4
        for step in (5, 6, 7):
            ckpts.save(step, state_of(step), metrics={"loss": 1.0}, block=True)
        assert kept <= {c.step for c in ckpts.checkpoints()}, "what is held is let go by a person only"
        best = ckpts.best()
        assert best is not None
        assert best.step == 2
        for step in kept:
            ckpts.release(step)
        ckpts.save(8, state_of(8), metrics={"loss": 1.0}, block=True)
    assert torch.equal(fresh["model"]["w"], state_of(4)["model"]["w"])
    assert {c.step for c in cloudckpt.open(storage).checkpoints()} == {1, 2, 7, 8}
    gc_run(ManifestStore(storage, QUICK), dry_run=False)
    check_store(storage, settled=True)


@pytest.mark.parametrize("back_to", ["1", "2", "3"])
def test_a_rolled_back_manifest_is_found_out(back_to: str) -> None:
    """An older manifest was put back: gc refuses to delete what is newer, and repair admits all that is whole."""
    storage = MemoryStorage()
    bodies = a_run(storage)
    there = {item.key.split(".")[0] for item in storage.list("checkpoint-")}
    put(storage, bodies[back_to], copies=True)
    with pytest.raises(ConflictError, match="an older manifest was put back"):
        gc_run(ManifestStore(storage, QUICK), dry_run=False)
    done = repair_run(ManifestStore(storage, QUICK), dry_run=False)
    assert {f"checkpoint-{c.step}" for c in done.admitted} == there
    with CheckpointManager(storage, settings=QUICK) as ckpts:
        fresh = state_of(0)
        assert ckpts.restore(fresh) is not None
        ckpts.save(9, state_of(9), block=True)
    assert torch.equal(fresh["model"]["w"], state_of(4)["model"]["w"])
    check_store(storage)


@pytest.mark.parametrize("field", ["format", "requires"])
def test_a_manifest_of_tomorrow_is_not_repaired_by_today(field: str) -> None:
    """What a newer version wrote is nobody's damage: repair says to upgrade, and changes nothing."""
    storage = MemoryStorage()
    bodies = a_run(storage)
    tomorrow = {"format": 2, "requires": ["shared-bytes"]}[field]
    put(storage, edited(bodies["now"], lambda m: m.update({field: tomorrow})), copies=True)
    before = {item.key: item.size_bytes for item in storage.list("")}
    for dry_run in (True, False):
        with pytest.raises(FormatError, match="upgrade cloudckpt"):
            repair_run(ManifestStore(storage, QUICK), dry_run=dry_run)
    assert {item.key: item.size_bytes for item in storage.list("")} == before


def test_repair_fences_whoever_still_writes() -> None:
    """A trainer that goes on beside a repair is told at its next save, and what was repaired stays as it is."""
    storage = MemoryStorage()
    a_run(storage)
    with pytest.raises((ConflictError, FencedError)), CheckpointManager(storage, settings=QUICK) as ckpts:
        ckpts.save(5, state_of(5), metrics={"loss": 0.2}, block=True)
        put(storage, b"garbage", copies=True)
        done = repair_run(ManifestStore(storage, QUICK), dry_run=False)
        ckpts.save(6, state_of(6), metrics={"loss": 0.2}, block=True)
    admitted = {c.id for c in done.admitted}
    assert {c.id for c in cloudckpt.open(storage).checkpoints(state=None)} == admitted
    check_store(storage)


def test_a_repair_beside_a_repair_is_a_conflict_and_no_loss() -> None:
    """Two people repair at once: one of them is told, and the run is the other's."""
    storage = MemoryStorage()
    a_run(storage)
    put(storage, b"garbage", copies=True)

    store = ManifestStore(storage, QUICK)
    token = store.token

    def meanwhile(digits: int) -> str:
        store.token = token
        repair_run(ManifestStore(storage, QUICK), dry_run=False)
        return token(digits)

    store.token = meanwhile
    with pytest.raises(ConflictError, match="during the repair"):
        repair_run(store, dry_run=False)
    assert len(cloudckpt.open(storage).checkpoints()) >= 3
    check_store(storage)


# -- checkpoints of which a part is lost as well --------------------------------------------------------------


def keys_of(storage: Storage, step: int) -> list[str]:
    """What lies in the folder of a step."""
    return [item.key for item in storage.list(f"checkpoint-{step}.")]


def key_of(storage: Storage, step: int, stem: str) -> str:
    """The one object of a step whose name begins like that."""
    (key,) = (key for key in keys_of(storage, step) if key.partition("/")[2].startswith(stem))
    return key


def lose(storage: Storage, key: str) -> None:
    """Delete one object."""
    assert storage.delete([key]) == {}


def shorten(storage: Storage, key: str) -> None:
    """Cut one object down to three bytes."""
    storage.put(key, [b"cut"], size_bytes=3)


def keep_copy(storage: Storage) -> None:
    """Leave a copy of the manifest as it is now, as a writer does at each 20th revision."""
    body = storage.read("manifest.json", limit_bytes=MANIFEST_LIMIT_BYTES).body
    storage.put(keys.manifest_copy(json.loads(body)["revision"]), [body], size_bytes=len(body))


def collect(storage: Storage) -> dict[str, str]:
    """What gc could not delete, or left to a person."""
    return gc_run(ManifestStore(storage, QUICK), dry_run=False).failed


@pytest.mark.parametrize("copies", [True, False], ids=["with copies", "without copies"])
@pytest.mark.parametrize(
    ("harm", "says"), [(lose, "is missing"), (shorten, "has 3 bytes and was sealed with")], ids=["missing", "short"]
)
def test_a_checkpoint_that_has_lost_an_object_is_a_persons_to_delete(
    harm: Callable[[Storage, str], None], says: str, copies: bool
) -> None:
    """It comes back as damaged, with its pin, tags and metrics; neither gc nor a rule takes what is left of it."""
    storage = MemoryStorage()
    a_run(storage)
    before = cloudckpt.open(storage).select(1)
    lost, left = key_of(storage, 1, "optimizer"), key_of(storage, 1, "model")
    harm(storage, lost)
    harm(storage, key_of(storage, 3, "model"))
    put(storage, None, copies=copies)
    proposal = repair_run(ManifestStore(storage, QUICK))
    done = repair_run(ManifestStore(storage, QUICK), dry_run=False)
    assert [c.step for c in done.admitted] == [c.step for c in proposal.admitted] == [1, 2, 3, 4]
    assert done.refused == {}
    for plan in (proposal, done):
        assert any(f"{before.name} is damaged" in told and "cloudckpt rm" in told for told in plan.could_not_know)
    run = cloudckpt.open(storage)
    found = run.select(1)
    assert found.damaged is not None
    assert f"{lost.partition('/')[2]} {says}" in found.damaged
    assert (found.pinned, found.tags, found.metrics) == (True, before.tags, before.metrics)
    assert (found.size_bytes, found.object_count) == (before.size_bytes, before.object_count)
    assert found.index_digest == before.index_digest
    assert ("release" in run.select(3).tags) is copies
    assert {finding.key for finding in cloudckpt.verify(storage, 1).findings} == {lost}
    latest = run.latest()
    assert latest is not None
    assert latest.step == 4

    assert collect(storage) == {}
    assert left in keys_of(storage, 1)
    with CheckpointManager(storage, settings=QUICK) as ckpts:
        assert ckpts.restore(state_of(0)) is not None
        for step in (1, 2, 3, 4):
            ckpts.release(step)
        ckpts.unpin(1)
        for step in (5, 6, 7):
            ckpts.save(step, state_of(step), metrics={"loss": 1.0}, block=True)
    assert collect(storage) == {}
    assert {c.step for c in cloudckpt.open(storage).checkpoints()} == {1, 2, 3, 6, 7}
    assert left in keys_of(storage, 1)

    assert remove_checkpoints(ManifestStore(storage, QUICK), [1, 3]).failed == {}
    assert keys_of(storage, 1) == keys_of(storage, 3) == []
    check_store(storage, settled=True)


def test_a_run_of_which_every_checkpoint_has_lost_an_object_comes_back() -> None:
    """Nothing is whole and no copy is left: what remains is damaged, not garbage."""
    storage = MemoryStorage()
    a_run(storage)
    steps = [c.step for c in cloudckpt.open(storage).checkpoints()]
    for step in steps:
        lose(storage, key_of(storage, step, "model"))
    put(storage, None, copies=False)
    done = repair_run(ManifestStore(storage, QUICK), dry_run=False)
    assert [c.step for c in done.admitted if c.damaged is not None] == steps
    assert collect(storage) == {}
    assert all(keys_of(storage, step) for step in steps)


def test_a_checkpoint_that_has_lost_its_index_is_damaged_as_well() -> None:
    """A delete takes the index last: payload without one, of what was committed, is no rest of a delete."""
    storage = MemoryStorage()
    a_run(storage)
    lose(storage, key_of(storage, 1, "checkpoint"))
    put(storage, None, copies=True)
    done = repair_run(ManifestStore(storage, QUICK), dry_run=False)
    assert done.refused == {}
    found = cloudckpt.open(storage).select(1)
    assert (found.damaged, found.pinned, found.held) == ("checkpoint.json is missing", True, True)
    assert collect(storage) == {}
    assert len(keys_of(storage, 1)) == 2
    assert not cloudckpt.verify(storage, 1).ok


def test_where_nothing_says_that_it_was_committed_payload_without_an_index_is_refused() -> None:
    """It may be an unfinished save: repair says that gc deletes it, and gc does."""
    storage = MemoryStorage()
    a_run(storage)
    name = cloudckpt.open(storage).select(1).name
    lose(storage, key_of(storage, 1, "checkpoint"))
    put(storage, None, copies=False)
    done = repair_run(ManifestStore(storage, QUICK), dry_run=False)
    assert done.refused == {name: "it was never sealed: no index"}
    assert done.gc_deletes == (name,)
    assert collect(storage) == {}
    assert keys_of(storage, 1) == []


@pytest.mark.parametrize("stem", ["model", "checkpoint"], ids=["payload is gone", "the index is gone"])
@pytest.mark.parametrize("basis", ["the newest copy", "an older copy"])
def test_what_was_let_go_does_not_come_back(basis: str, stem: str) -> None:
    """A delete that was cut short leaves a part; a copy says that it was retired, so that gc deletes the rest."""
    storage = MemoryStorage()
    a_run(storage)
    editing.remove(ManifestStore(storage, QUICK), [3])
    keep_copy(storage)
    lose(storage, key_of(storage, 3, stem))
    body = storage.read("manifest.json", limit_bytes=MANIFEST_LIMIT_BYTES).body
    if basis == "an older copy":

        def another(document: dict[str, Any]) -> None:
            document["revision"] += 1
            document["entries"] = [entry for entry in document["entries"] if entry["step"] != 3]

        body = edited(body, another)
        storage.put(keys.manifest_copy(json.loads(body)["revision"]), [body], size_bytes=len(body))
    put(storage, None, copies=True)
    done = repair_run(ManifestStore(storage, QUICK), dry_run=False)
    assert 3 not in {c.step for c in done.admitted}
    assert {c.step for c in cloudckpt.open(storage).checkpoints(state=State.RETIRED)} == {3}
    assert collect(storage) == {}
    assert keys_of(storage, 3) == []
    check_store(storage, settled=True)


def test_a_folder_of_somebody_elses_files_is_nothing_that_gc_deletes() -> None:
    """A checkpoint was let go and a foreign file lay beside it: repair refuses the folder and gc does not touch it."""
    storage = MemoryStorage()
    a_run(storage)
    folder = cloudckpt.open(storage).select(1).name
    storage.put(f"{folder}/notes.txt", [b"mine"], size_bytes=4)
    keep_copy(storage)
    for key in keys_of(storage, 1):
        if not key.endswith(".txt"):
            lose(storage, key)
    put(storage, None, copies=True)
    done = repair_run(ManifestStore(storage, QUICK), dry_run=False)
    assert [*done.refused] == [folder]
    assert done.gc_deletes == ()
    assert collect(storage) == {}
    assert keys_of(storage, 1) == [f"{folder}/notes.txt"]


def garble(storage: Storage, folder: str) -> None:
    """Write over the index."""
    storage.put(f"{folder}/{keys.INDEX_NAME}", [b"{}"], size_bytes=2)


def of_another(storage: Storage, folder: str) -> None:
    """Put the index of step 4 in place of this one's."""
    body = storage.read(key_of(storage, 4, "checkpoint"), limit_bytes=INDEX_LIMIT_BYTES).body
    storage.put(f"{folder}/{keys.INDEX_NAME}", [body], size_bytes=len(body))


@pytest.mark.parametrize("copies", [True, False], ids=["with copies", "without copies"])
@pytest.mark.parametrize("harm", [garble, of_another])
def test_gc_leaves_what_repair_refused_for_its_index(harm: Callable[[Storage, str], None], copies: bool) -> None:
    """Nobody can tell what it was: repair names it, and gc reports it and leaves it to a person."""
    storage = MemoryStorage()
    a_run(storage)
    folder = cloudckpt.open(storage).select(1).name
    harm(storage, folder)
    put(storage, None, copies=copies)
    done = repair_run(ManifestStore(storage, QUICK), dry_run=False)
    assert [*done.refused] == [folder]
    assert done.gc_deletes == ()
    before = keys_of(storage, 1)
    assert [*collect(storage)] == [f"{folder}/{keys.INDEX_NAME}"]
    assert keys_of(storage, 1) == before


def test_gc_deletes_a_retired_checkpoint_whose_index_cannot_be_read() -> None:
    """A person let it go: that holds through a repair, whatever its index has become."""
    storage = MemoryStorage()
    a_run(storage)
    folder = editing.remove(ManifestStore(storage, QUICK), [3])[0].name
    garble(storage, folder)
    keep_copy(storage)
    put(storage, None, copies=True)
    done = repair_run(ManifestStore(storage, QUICK), dry_run=False)
    assert done.refused == {}
    assert collect(storage) == {}
    assert keys_of(storage, 3) == []
    check_store(storage, settled=True)
