"""``check_store`` finds each violation and names its number; a sound store passes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import crc32c
import pytest

from cloudckpt.core import keys
from cloudckpt.core.index_json import encode_index, index_digest
from cloudckpt.core.manifest_json import decode_manifest, encode_manifest
from cloudckpt.core.model import Checkpoint, Manifest, PayloadObject, State
from cloudckpt.storage import MemoryStorage
from cloudckpt.testing import builders, check_store

NAME = "model-00000-of-00001.safetensors"
BODY = bytes(range(160))


def put(storage: MemoryStorage, key: str, body: bytes) -> None:
    """Write an object, whatever was there."""
    storage.put(key, [body], size_bytes=len(body))


def saved(storage: MemoryStorage, step: int) -> Checkpoint:
    """A whole checkpoint on the store and the entry that names it."""
    item = PayloadObject(name=NAME, size_bytes=len(BODY), crc32c=crc32c.crc32c(BODY))
    body = encode_index(builders.index(step, objects=(item,)))
    entry = builders.checkpoint(step, index_digest=index_digest(body), size_bytes=len(body) + len(BODY), object_count=2)
    put(storage, keys.payload_key(step, entry.id, NAME), BODY)
    put(storage, keys.index_key(step, entry.id), body)
    return entry


@pytest.fixture
def store(memory_storage: MemoryStorage) -> MemoryStorage:
    """A sound store with two checkpoints, two copies of the manifest and nothing else."""
    entries = (saved(memory_storage, 100), saved(memory_storage, 200))
    manifest = builders.manifest(*entries, revision=41, copies=(20, 40))
    put(memory_storage, keys.MANIFEST, encode_manifest(manifest))
    for revision in manifest.copies:
        put(memory_storage, keys.manifest_copy(revision), encode_manifest(replace(manifest, revision=revision)))
    return memory_storage


def rewrite(change: Callable[[Manifest], Manifest]) -> Callable[[MemoryStorage], None]:
    """A fault of the manifest."""

    def apply(storage: MemoryStorage) -> None:
        found = decode_manifest(storage.read(keys.MANIFEST, limit_bytes=10**6).body)
        put(storage, keys.MANIFEST, encode_manifest(change(found)))

    return apply


def entry(change: Callable[[Checkpoint], Checkpoint]) -> Callable[[MemoryStorage], None]:
    """A fault of the newest entry, whose lists stay as they were."""
    return rewrite(lambda m: replace(m, entries=(*m.entries[:-1], change(m.entries[-1]))))


PAYLOAD = f"checkpoint-200.000000c8/{NAME}"
INDEX = "checkpoint-200.000000c8/checkpoint.json"

FAULTS: dict[str, tuple[Callable[[MemoryStorage], object], str]] = {
    "payload missing": (lambda s: s.delete([PAYLOAD]), f"I1 {PAYLOAD}"),
    "payload shorter": (lambda s: put(s, PAYLOAD, BODY[:-1]), f"I1 {PAYLOAD} has 159 bytes, sealed with 160"),
    "payload changed": (lambda s: put(s, PAYLOAD, BODY[::-1]), f"I1 {PAYLOAD} has checksum"),
    "index missing": (lambda s: s.delete([INDEX]), f"I1 {INDEX}"),
    "index torn": (lambda s: put(s, INDEX, s.read(INDEX, limit_bytes=10**6).body[:-9]), f"I1 {INDEX}"),
    "index of another": (
        lambda s: put(s, INDEX, s.read(INDEX.replace("200.000000c8", "100.00000064"), limit_bytes=10**6).body),
        "describes checkpoint-100.00000064",
    ),
    "index not the committed": (entry(lambda e: replace(e, index_digest=builders.DIGEST)), "committed as sha256:ddd"),
    "size not summed": (entry(lambda e: replace(e, size_bytes=1)), "I1 checkpoint-200.000000c8 has"),
    "manifest torn": (lambda s: put(s, keys.MANIFEST, b"{"), "I3 the manifest cannot be read"),
    "manifest gone": (lambda s: s.delete([keys.MANIFEST]), "I7 .* no manifest was ever written"),
    "recent wrong": (rewrite(lambda m: replace(m, recent=m.recent[::-1])), "I4 recent is"),
    "recent retired": (entry(lambda e: replace(e, state=State.RETIRED)), "I4 000000c8 is listed .* not committed"),
    "epoch of nobody": (entry(lambda e: replace(e, writer_epoch=9)), "I6 .* has epoch 9"),
    "pending of a former": (
        rewrite(
            lambda m: replace(
                m,
                writer_epoch=2,
                entries=(m.entries[0], replace(m.entries[1], state=State.PENDING)),
                recent=("00000064",),
            )
        ),
        "I6 .* is pending under 1, and 2 is claimed",
    ),
    "copy of another revision": (
        lambda s: put(s, keys.manifest_copy(40), s.read(keys.manifest_copy(20), limit_bytes=10**6).body),
        "I2 manifest-000040.json holds revision 20",
    ),
    "copy torn": (lambda s: put(s, keys.manifest_copy(40), b"{"), "I2 manifest-000040.json"),
}

UNSETTLED: dict[str, tuple[Callable[[MemoryStorage], object], str]] = {
    "retired entry": (
        rewrite(
            lambda m: replace(
                m, entries=(m.entries[0], replace(m.entries[1], state=State.RETIRED)), recent=("00000064",)
            )
        ),
        "I8 checkpoint-200.000000c8 is still retired",
    ),
    "pending entry": (
        rewrite(
            lambda m: replace(
                m, entries=(m.entries[0], replace(m.entries[1], state=State.PENDING)), recent=("00000064",)
            )
        ),
        "I8 checkpoint-200.000000c8 is still pending",
    ),
    "folder of nobody": (
        lambda s: put(s, PAYLOAD.replace("000000c8", "0000beef"), b"1"),
        r"I8 checkpoint-200.0000beef/.* \(payload\)",
    ),
    "folder of another step": (lambda s: put(s, PAYLOAD.replace("-200", "-201"), b"1"), "I8 checkpoint-201"),
    "object not in the index": (lambda s: put(s, PAYLOAD.replace("model", "optimizer"), b"1"), "I8 .*optimizer"),
    "temporary": (lambda s: put(s, keys.temporary_key(PAYLOAD), b"1"), r"I8 .*\(temporary\)"),
    "older copy": (lambda s: put(s, keys.manifest_copy(10), b"1"), "I8 manifest-000010.json"),
    "probe": (lambda s: put(s, ".cloudckpt-probe-0123abcd", b"1"), r"I8 .*\(probe\)"),
    "foreign": (lambda s: put(s, "notes.txt", b"1"), r"I8 notes.txt \(foreign\)"),
}

HARMLESS: dict[str, Callable[[MemoryStorage], object]] = {
    "nothing": lambda s: None,
    "an empty root": lambda s: s.delete([item.key for item in s.list()]),
    "damaged, and recorded as such": lambda s: (
        s.delete([PAYLOAD]),
        entry(lambda e: replace(e, damaged="missing"))(s),
        rewrite(lambda m: replace(m, recent=("00000064",)))(s),
    ),
    "a copy that could not be written": lambda s: s.delete([keys.manifest_copy(40)]),
    "what a crash left under the lock": lambda s: put(s, keys.SWAP, b"1"),
    "what repair put aside": lambda s: put(s, keys.replaced_manifest("0123abcd"), b"1"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_violation_is_found(store: MemoryStorage, fault: str) -> None:
    """What breaks an invariant is reported with its number and its place."""
    spoil, says = FAULTS[fault]
    spoil(store)
    with pytest.raises(AssertionError, match=says):
        check_store(store)


@pytest.mark.parametrize("fault", UNSETTLED)
def test_what_is_not_accounted_for_is_found(store: MemoryStorage, fault: str) -> None:
    """What a sweep and a gc would clear is fine before them and a violation of I8 after them."""
    spoil, says = UNSETTLED[fault]
    spoil(store)
    check_store(store)
    with pytest.raises(AssertionError, match=says):
        check_store(store, settled=True)


@pytest.mark.parametrize("what", HARMLESS)
def test_a_sound_store_passes(store: MemoryStorage, what: str) -> None:
    """A store that breaks nothing passes, settled or not, and is not changed by the check."""
    HARMLESS[what](store)
    before = [*store.list()]
    check_store(store)
    check_store(store, settled=True)
    assert [*store.list()] == before


def test_every_violation_is_listed(store: MemoryStorage) -> None:
    """One report tells all of them."""
    store.delete([PAYLOAD])
    put(store, "notes.txt", b"1")
    with pytest.raises(AssertionError, match="breaks 2 invariants") as report:
        check_store(store, settled=True)
    assert "I1" in str(report.value)
    assert "I8" in str(report.value)
