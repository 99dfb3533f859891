"""A document may be as long, as deep and as strange as it likes: it is refused within bounds, and in our own words.

(Past 350 lines: a list of documents, each with its test.)
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import cloudckpt
from cloudckpt import CheckpointManager, CloudCkptError, CorruptCheckpointError, FormatError, StorageError
from cloudckpt.core import index_json, manifest_json
from cloudckpt.core.index_json import INDEX_LIMIT_BYTES, decode_index
from cloudckpt.core.manifest_json import MANIFEST_LIMIT_BYTES, decode_manifest, entry_from_bytes
from cloudckpt.core.values import Codec
from cloudckpt.storage import MemoryStorage, Storage
from cloudckpt.testing import Crash, Fault, FaultProxy, ScriptedStorage
from tests.security.hostile import QUICK, Hostile, looked_at, resealed, state_of

#: JSON that costs more than it looks.
BOMBS: dict[str, bytes] = {
    "deep arrays": b'{"format": 1, "x": ' + b"[" * 200_000 + b"]" * 200_000 + b"}",
    "deep objects": b'{"format": 1, "x": ' + b'{"a":' * 200_000 + b"1" + b"}" * 200_000 + b"}",
    "deep and never closed": b"[" * 1_000_000,
    "a number without end": b'{"format": 1, "x": ' + b"9" * 1_000_000 + b"}",
    "a number that is too large": b'{"format": 1, "x": 1e999999999}',
    "a format without end": b'{"format": ' + b"9" * 5_000 + b"}",
    "many names": b'{"format": 1, ' + b", ".join(b'"%d": 0' % n for n in range(200_000)) + b"}",
    "a name many times": b'{"format": 1, ' + b", ".join([b'"x": 0'] * 200_000) + b"}",
    "many empty arrays": b'{"format": 1, "entries": [' + b",".join([b"[]"] * 20_000) + b"]}",
    "many strange entries": b'{"format": 1, "entries": [' + b",".join([b'{"id": 7}'] * 20_000) + b"]}",
    "a long string": b'{"format": 1, "x": "' + b"a" * 5_000_000 + b'"}',
    "escapes": b'{"format": 1, "x": "' + b"\\u0000" * 500_000 + b'"}',
    "not a number": b'{"format": 1, "x": NaN}',
    "an endless word": b'{"format": 1, "x": Infinity}',
    "a lone surrogate": b'{"format": 1, "x": "\\ud800"}',
    "another encoding": '{"format": 1}'.encode("utf-16"),
    "a byte order mark": b"\xef\xbb\xbf" + b'{"format": 1}',
    "no object": b"[1]",
    "nothing": b"",
    "zeros": bytes(1000),
}


@pytest.mark.timeout(120)
@pytest.mark.parametrize("bomb", BOMBS)
def test_json_that_costs_more_than_it_looks(bomb: str) -> None:
    """As a manifest, an index and an entry it is a FormatError whose message is a few lines."""
    for decode in (decode_manifest, decode_index, entry_from_bytes):
        with pytest.raises(FormatError) as refused:
            decode(BOMBS[bomb])
        assert len(str(refused.value)) < 10_000


#: Values that a careless decoder would spend all of its memory or time on.
COSTLY: dict[str, Any] = {
    "a power of ten as text": {"$fraction": ["1e999999999", 1]},
    "a decimal power of ten": {"$decimal": "1e999999999"},
    "an integer of many digits": {"$int": "0x" + "f" * 200_000},
    "a range without end": {"$range": [0, {"$int": hex(2**400)}, 1]},
    "a deque without end": {"$deque": {"items": [], "maxlen": 2**63}},
    "a size without end": {"$torch": {"size": [2**62, 2**62]}},
    "a text of zeros": {"$numpy": {"dtype": "<U1000000000", "bytes": ""}},
    "bytes of a billion": {"$numpy": {"dtype": "S1000000000", "bytes": ""}},
    "a tower": {"$tuple": [{"$tuple": [{"$tuple": [{"$tuple": [[[[[[[[1]]]]]]]]}]}]}]},
    "a complex power": {"$complex": ["1e999999999", "0"]},
    "many days": {"$timedelta": [10**18, 0, 0]},
}


@pytest.mark.timeout(120)
@pytest.mark.parametrize("what", COSTLY)
def test_values_that_cost_more_than_they_look(tmp_path: Path, what: str) -> None:
    """In an index: loaded at once as a small value, or refused by name; never computed out."""
    run = Hostile(tmp_path / "run")
    index = run.index
    index["structure"]["extra"] = {"leaf": COSTLY[what]}
    run.put_index(index)
    for name, given in looked_at(run.root):
        if name == "load":
            assert isinstance(given, dict | CloudCkptError)


@pytest.mark.timeout(120)
def test_a_tower_of_values_is_refused_where_it_gets_too_high(tmp_path: Path) -> None:
    """Values nested deeper than any state are an error with the beginning of the path."""
    run = Hostile(tmp_path / "run")
    index = run.index
    leaf: Any = 1
    for _ in range(400):
        leaf = [leaf]
    index["structure"]["extra"] = leaf
    run.put_index(index)
    given = dict(looked_at(run.root))
    assert isinstance(given["load"], FormatError | CorruptCheckpointError)
    assert len(str(given["load"])) < 1000


@pytest.mark.parametrize(
    ("shape", "lengths"),
    [
        ([2**62, 2**62, 0], None),
        ([2**40], [2**40]),
        ([300, 2**62], None),
        ([-1], [-1]),
        ([], None),
        ([300, 1, 1, 1], None),
    ],
)
def test_shapes_that_no_tensor_has(tmp_path: Path, shape: list[int], lengths: list[int] | None) -> None:
    """A shape that its bytes cannot fill, or that nothing can have, is damage; no memory is taken for it."""
    run = Hostile(tmp_path / "run")
    index = run.index
    tensor = index["tensors"]["model"]["w"]
    tensor["shape"] = shape
    if 0 in shape:
        tensor["chunks"] = []
    if lengths is not None:
        for chunk in tensor["chunks"]:
            chunk["lengths"] = lengths
    run.put_index(index)
    given = dict(looked_at(run.root, also_write=True))
    if isinstance(given["load"], dict):
        assert 0 in shape  # some torch have such a tensor, without elements: it takes nothing either
        return
    assert isinstance(given["load"], CorruptCheckpointError | FormatError), given["load"]
    assert isinstance(given["load shapes"], CorruptCheckpointError | FormatError)


@pytest.mark.parametrize("power", [50, 59])
def test_tensors_that_no_host_has_room_for(tmp_path: Path, power: int) -> None:
    """An index that is consistent, and describes more bytes than there are: an error before any of them is touched."""
    run = Hostile(tmp_path / "run")
    index = run.index
    size = 4 << power
    tensor = index["tensors"]["model"]["w"]
    (chunk,) = tensor["chunks"]
    tensor["shape"], chunk["lengths"], chunk["length"] = [1 << power], [1 << power], size
    for item in index["objects"]:
        if item["name"] == chunk["object"]:
            item["size_bytes"] = chunk["start"] + size
    run.put_index(index)
    with pytest.raises((MemoryError, CorruptCheckpointError)):
        cloudckpt.open(run.root).load(2)
    assert cloudckpt.open(run.root).load(2, components=["extra"])["extra"]["step"] == 2


def test_a_manifest_that_is_too_large_is_not_read() -> None:
    """What is longer than any manifest is refused by its size; the message names the object and both numbers."""
    storage = MemoryStorage()
    storage.create("manifest.json", bytes(MANIFEST_LIMIT_BYTES + 1))
    with pytest.raises(StorageError, match=rf"manifest\.json has {MANIFEST_LIMIT_BYTES + 1} bytes, more than"):
        cloudckpt.open(storage).checkpoints()


def test_an_index_that_is_too_large_stops_neither_repair_nor_gc(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Repair refuses that folder by name and admits the others; gc reports it and leaves it to a person."""
    run = Hostile(tmp_path / "run")
    limit = 100_000
    for module in ("cloudckpt.repairing", "cloudckpt.sweeping"):
        monkeypatch.setattr(f"{module}.INDEX_LIMIT_BYTES", limit)
    (run.folder / "checkpoint.json").write_bytes(b" " * (limit + 1))
    orphan = run.root / "checkpoint-7.0badc0de"
    orphan.mkdir()
    (orphan / "checkpoint.json").write_bytes(b" " * (limit + 1))
    plan = cloudckpt.repair(run.root, dry_run=False)
    assert {c.step for c in plan.admitted} == {1}
    assert set(plan.refused) == {run.folder.name, orphan.name}
    assert all(f"{limit + 1} bytes" in reason for reason in plan.refused.values())
    report = cloudckpt.gc(run.root, dry_run=False)
    assert f"{orphan.name}/checkpoint.json" in report.failed
    assert (orphan / "checkpoint.json").exists()
    assert [c.step for c in cloudckpt.open(run.root).checkpoints()] == [1]


def test_a_copy_that_is_too_large_does_not_hide_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Repair passes over a copy of the manifest that nobody can have written, and takes the one before it."""
    run = Hostile(tmp_path / "run")
    limit = (run.root / "manifest.json").stat().st_size + 1000
    monkeypatch.setattr("cloudckpt.repairing.MANIFEST_LIMIT_BYTES", limit)
    (run.root / "manifest.json").unlink()
    (run.root / "manifest-000900.json").write_bytes(b" " * (limit + 1))
    plan = cloudckpt.repair(run.root, dry_run=False)
    assert plan.basis.startswith("manifest-")
    assert {c.step for c in plan.admitted} == {1, 2}
    assert plan.manifest.revision > 900


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes with names here")
@pytest.mark.timeout(60)
@pytest.mark.parametrize("mmap", [False, True], ids=["read", "mapped"])
def test_a_pipe_in_place_of_a_payload_object_is_not_waited_for(tmp_path: Path, mmap: bool) -> None:
    """Whether it is read or mapped: an error at once, which says what lies there."""
    run = Hostile(tmp_path / "run")
    payload = run.folder / "model-00000-of-00001.safetensors"
    payload.unlink()
    os.mkfifo(payload)
    with pytest.raises(StorageError, match="a pipe or a device"):
        cloudckpt.open(run.root).load(2, mmap=mmap)
    assert [c.damaged for c in cloudckpt.open(run.root).checkpoints()] == [None, None]


def test_an_object_that_is_too_large_is_not_downloaded(faulty_s3_root: str, s3_faults: FaultProxy) -> None:
    """S3 is asked once, and its body is left where it is: the answer's length is enough."""
    from cloudckpt.storage import open_storage

    storage = open_storage(faulty_s3_root)
    body = bytes(4 * 1024 * 1024)
    storage.put("manifest.json", [body], size_bytes=len(body))
    s3_faults.clear()
    with pytest.raises(StorageError, match=f"it has {len(body)} bytes, more than the 1000 expected") as refused:
        storage.read("manifest.json", limit_bytes=1000)
    assert not refused.value.retryable
    assert [request.method for request in s3_faults.requests] == ["GET"]
    storage.close()


def test_the_limits_are_those_that_the_documents_need() -> None:
    """A manifest of 10,000 entries and an index of a hundred thousand tensors lie well within what is read."""
    assert MANIFEST_LIMIT_BYTES == manifest_json.MANIFEST_LIMIT_BYTES >= 4 * 10_000 * 1024
    assert INDEX_LIMIT_BYTES == index_json.INDEX_LIMIT_BYTES >= 2 * 100_000 * 1024


def test_a_decoder_of_values_says_where_and_not_what() -> None:
    """A value of megabytes that is malformed is named by its place; the message does not repeat it."""
    with pytest.raises(FormatError) as refused:
        Codec().decode({"a": {"$set": ["x" * 10_000_000, "x" * 10_000_000]}})
    assert str(refused.value).startswith("a: ")
    assert len(str(refused.value)) < 1000


def test_a_hostile_document_makes_no_endless_message(tmp_path: Path) -> None:
    """Two thousand wrong entries are twenty lines and a count, wherever the manifest is read."""
    run = Hostile(tmp_path / "run")
    manifest = run.manifest
    manifest["entries"] = [{"id": "../../etc"}] * 2_000
    run.put_manifest(manifest)
    for name, given in looked_at(run.root, also_write=True):
        if isinstance(given, CloudCkptError):
            assert len(str(given)) < 10_000, name
    json.loads((run.root / "manifest.json").read_bytes())


# -- numbers that no run counts to ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["revision", "writer_epoch", "next_seq", "commits"])
def test_a_counter_at_its_end_is_not_counted_past(tmp_path: Path, name: str) -> None:
    """Whoever writes is refused before the manifest becomes one that nobody can read; a repair counts anew."""
    run = Hostile(tmp_path / "run")
    run.put_manifest(run.manifest | {name: 2**63 - 1})
    with pytest.raises(CloudCkptError), CheckpointManager(run.root, settings=QUICK) as ckpts:
        ckpts.restore(state_of(0))
        ckpts.save(3, state_of(3), block=True)
    decode_manifest((run.root / "manifest.json").read_bytes())
    plan = cloudckpt.repair(run.root, dry_run=False)
    assert plan.basis != "manifest.json"
    assert {1, 2} <= {c.step for c in plan.admitted}
    with CheckpointManager(run.root, settings=QUICK) as ckpts:
        ckpts.restore(state_of(0))
        ckpts.save(4, state_of(4), block=True)
    assert {1, 2, 4} <= {c.step for c in cloudckpt.open(run.root).checkpoints()}
    assert cloudckpt.gc(run.root, dry_run=False).failed == {}


@pytest.mark.parametrize("name", ["seq", "writer_epoch"])
def test_an_index_that_no_run_counts_to_stops_neither_repair_nor_gc(tmp_path: Path, name: str) -> None:
    """That folder is refused by name, the others are admitted, and gc leaves it to a person."""
    run = Hostile(tmp_path / "run")
    run.put_index(run.index | {name: 2**63 - 1})
    for path in run.root.glob("manifest*.json"):
        path.unlink()
    plan = cloudckpt.repair(run.root, dry_run=False)
    assert {c.step for c in plan.admitted} == {1}
    assert "numbers that no run counts to" in plan.refused[run.folder.name]
    with CheckpointManager(run.root, settings=QUICK) as ckpts:
        ckpts.save(3, state_of(3), block=True)
    assert [*cloudckpt.gc(run.root, dry_run=False).failed] == [f"{run.folder.name}/checkpoint.json"]
    assert (run.folder / "checkpoint.json").exists()


def _counting_from_far_away() -> MemoryStorage:
    """A run of one save whose next one gets a number that no run counts to."""
    storage = MemoryStorage()
    with CheckpointManager(storage, settings=QUICK, keep_last=None) as ckpts:
        ckpts.save(1, state_of(1), block=True)
    held = storage.read("manifest.json", limit_bytes=MANIFEST_LIMIT_BYTES)
    document = json.loads(held.body) | {"next_seq": 2**62 + 5}
    storage.replace("manifest.json", json.dumps(document).encode(), expecting=held.version)
    return storage


def _save_another(storage: Storage) -> None:
    ckpts = CheckpointManager(storage, settings=QUICK)
    try:
        ckpts.save(2, state_of(2), block=True)
    finally:
        ckpts.close()


def test_a_claim_loses_no_sealed_save_for_its_number() -> None:
    """Only a repair makes entries of what indexes count: a save killed between seal and commit is rolled forward."""
    rehearsal = ScriptedStorage(_counting_from_far_away())
    _save_another(rehearsal)
    sealing = next(n for n, c in enumerate(rehearsal.calls) if c.verb == "put" and c.keys[0].endswith(".json"))
    storage = _counting_from_far_away()
    with pytest.raises(Crash):
        _save_another(ScriptedStorage(storage, sealing, Fault.CRASH_AFTER))
    fresh = state_of(0)
    with CheckpointManager(storage, settings=QUICK) as ckpts:
        resumed = ckpts.restore(fresh)
    assert resumed is not None
    assert (resumed.step, resumed.seq > 2**62) == (2, True)
    assert torch.equal(fresh["model"]["w"], state_of(2)["model"]["w"])


def test_a_copy_of_a_number_that_no_run_counts_to_is_not_ours(tmp_path: Path) -> None:
    """It is no basis, the new manifest does not count from it, and gc does not take the real copies for older ones."""
    run = Hostile(tmp_path / "run")
    copies = {path.name for path in run.root.glob("manifest-*.json")}
    assert copies
    strange = {f"manifest-{number}.json" for number in (2**62 + 1, 2**63, 10**19)}
    for name in strange:
        (run.root / name).write_bytes((run.root / "manifest.json").read_bytes())
    report = cloudckpt.gc(run.root, dry_run=False)
    assert report.garbage is not None
    assert strange <= {*report.garbage.foreign}
    assert copies <= {path.name for path in run.root.glob("manifest-*.json")}
    assert cloudckpt.repair(run.root, dry_run=False).manifest.revision < 1000


@pytest.mark.parametrize("copies", [True, False], ids=["with copies", "without copies"])
def test_two_folders_with_one_save_id_do_not_stop_a_repair(tmp_path: Path, copies: bool) -> None:
    """The real one is admitted with its bits, the other one is refused by name, and gc takes it away."""
    run = Hostile(tmp_path / "run")
    twin = run.root / f"checkpoint-10.{run.index['id']}"
    shutil.copytree(run.folder, twin)
    (twin / "checkpoint.json").write_bytes(resealed(run.index | {"step": 10, "seq": 77}))
    for path in run.root.glob("manifest*.json" if not copies else "manifest.json"):
        path.unlink()
    plan = cloudckpt.repair(run.root, dry_run=False)
    assert {c.step for c in plan.admitted} == {1, 2}
    assert twin.name in plan.refused
    assert torch.equal(cloudckpt.open(run.root).load(2)["model"]["w"], state_of(2)["model"]["w"])
    assert cloudckpt.gc(run.root, dry_run=False).failed == {}
    assert not (twin / "checkpoint.json").exists()
    assert (run.folder / "checkpoint.json").exists()
