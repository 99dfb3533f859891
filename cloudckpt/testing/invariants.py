"""The invariants of the spec, checked on what a store holds right now, whoever crashed."""

from __future__ import annotations

from collections.abc import Iterator

import crc32c

from cloudckpt.core import keys
from cloudckpt.core.checksum import format_crc32c
from cloudckpt.core.garbage import COPIES_KEPT
from cloudckpt.core.index_json import INDEX_LIMIT_BYTES, decode_index, index_digest
from cloudckpt.core.manifest import recompute
from cloudckpt.core.manifest_json import MANIFEST_LIMIT_BYTES, decode_manifest
from cloudckpt.core.model import Checkpoint, Index, Manifest, PayloadObject, State
from cloudckpt.core.retention import plan_prune
from cloudckpt.errors import FormatError, ObjectNotFoundError, StorageError
from cloudckpt.storage.base import Storage

__all__ = ["check_store"]


def check_store(storage: Storage, *, settled: bool = False) -> None:
    """Check every invariant that can be seen from outside, reading every byte of every committed checkpoint.

    An empty root is a run that has not begun. Nothing is written.

    Args:
        storage: the run, as it is; no retries are made.
        settled: also I8: a claim, a sweep and a gc are done, so that every object is accounted for.

    Raises:
        AssertionError: lists every violation with the invariant's number.
    """
    if violations := [*_violations(storage, settled=settled)]:
        raise AssertionError(f"{storage.url} breaks {len(violations)} invariants:\n  " + "\n  ".join(violations))


def _violations(storage: Storage, *, settled: bool) -> Iterator[str]:
    try:
        body = storage.read(keys.MANIFEST, limit_bytes=MANIFEST_LIMIT_BYTES).body
    except ObjectNotFoundError:
        yield from (f"I7 {key.text} lies there and no manifest was ever written" for key in _objects(storage))
        return
    try:
        manifest = decode_manifest(body)
    except FormatError as exc:
        yield f"I3 the manifest cannot be read: {exc}"
        return
    indexes: dict[str, Index] = {}
    for entry in manifest.committed:
        if entry.damaged is None:
            yield from _check_bytes(storage, entry, indexes)
    yield from _check_lists(manifest)
    yield from _check_protected(manifest)
    yield from _check_epochs(manifest)
    yield from _check_copies(storage, manifest)
    if settled:
        yield from _check_accounted(storage, manifest, indexes)


# -- I1 ------------------------------------------------------------------------------------------------------


def _check_bytes(storage: Storage, entry: Checkpoint, indexes: dict[str, Index]) -> Iterator[str]:
    key = keys.index_key(entry.step, entry.id)
    try:
        body = storage.read(key, limit_bytes=INDEX_LIMIT_BYTES).body
        index = decode_index(body)
    except (StorageError, FormatError) as exc:
        yield f"I1 {key}: {exc}"
        return
    indexes[entry.id] = index
    if index_digest(body) != entry.index_digest:
        yield f"I1 {key} has digest {index_digest(body)}, committed as {entry.index_digest}"
    if (index.id, index.step) != (entry.id, entry.step):
        yield f"I1 {key} describes checkpoint-{index.step}.{index.id}"
    size_bytes = len(body) + sum(item.size_bytes for item in index.objects)
    if (size_bytes, len(index.objects) + 1) != (entry.size_bytes, entry.object_count):
        yield (
            f"I1 {entry.name} has {size_bytes} bytes in {len(index.objects) + 1} objects by its index, "
            f"{entry.size_bytes} in {entry.object_count} by the manifest"
        )
    for item in index.objects:
        yield from _check_object(storage, keys.payload_key(entry.step, entry.id, item.name), item)


def _check_object(storage: Storage, key: str, item: PayloadObject) -> Iterator[str]:
    try:
        found = storage.size(key)
        target = bytearray(found)
        storage.read_into(key, 0, memoryview(target))
    except StorageError as exc:
        yield f"I1 {key}: {exc}"
        return
    if found != item.size_bytes:
        yield f"I1 {key} has {found} bytes, sealed with {item.size_bytes}"
    checksum = crc32c.crc32c(target)
    if checksum != item.crc32c:
        yield f"I1 {key} has checksum {format_crc32c(checksum)}, sealed as {format_crc32c(item.crc32c)}"


# -- the manifest by itself ----------------------------------------------------------------------------------


def _check_lists(manifest: Manifest) -> Iterator[str]:
    expected = recompute(manifest)
    if manifest.best != expected.best:
        yield f"I4 best is {manifest.best}, and {expected.best} by its entries"
    if manifest.recent != expected.recent:
        yield f"I4 recent is {manifest.recent}, and {expected.recent} by its entries"
    committed = {entry.id for entry in manifest.committed}
    listed = {save_id for best in manifest.best for save_id in best.ids} | set(manifest.recent)
    for save_id in sorted(listed - committed):
        yield f"I4 {save_id} is listed as best or recent and is not committed"


def _check_protected(manifest: Manifest) -> Iterator[str]:
    plan = plan_prune(manifest.entries, manifest.policy, resumed_from=manifest.resumed_from)
    kept = {checkpoint.id for checkpoint in plan.kept}
    usable = [entry for entry in manifest.committed if entry.usable]
    protected = {entry.id: "pinned or held" for entry in manifest.committed if entry.pinned or entry.held}
    protected |= {entry.id: "resumed from" for entry in manifest.committed if entry.id == manifest.resumed_from}
    protected |= {save_id: f"best by {best.metric}" for best in plan.best for save_id in best.ids}
    protected |= {entry.id: "the newest usable" for entry in usable[-1:]}
    for save_id in sorted(protected.keys() - kept):
        yield f"I5 {save_id} is {protected[save_id]} and the next prune would retire it"


def _check_epochs(manifest: Manifest) -> Iterator[str]:
    for entry in manifest.entries:
        if entry.writer_epoch > manifest.writer_epoch:
            yield f"I6 {entry.name} has epoch {entry.writer_epoch}; nobody claimed more than {manifest.writer_epoch}"
        elif entry.state is State.PENDING and entry.writer_epoch < manifest.writer_epoch:
            yield f"I6 {entry.name} is pending under {entry.writer_epoch}, and {manifest.writer_epoch} is claimed"


def _check_copies(storage: Storage, manifest: Manifest) -> Iterator[str]:
    for revision in manifest.copies:
        key = keys.manifest_copy(revision)
        try:
            found = decode_manifest(storage.read(key, limit_bytes=MANIFEST_LIMIT_BYTES).body)
        except ObjectNotFoundError:
            continue  # a copy that could not be written is harmless
        except (StorageError, FormatError) as exc:
            yield f"I2 {key}: {exc}"
            continue
        if found.revision != revision:
            yield f"I2 {key} holds revision {found.revision}"


# -- I8 ------------------------------------------------------------------------------------------------------


def _objects(storage: Storage) -> list[keys.Key]:
    """What lies under the root, without a lock and what a crash left under it, which the next write replaces."""
    found = [keys.parse(item.key) for item in storage.list("")]
    return [
        key
        for key in found
        if key.kind is not keys.Kind.LOCK and not (key.kind is keys.Kind.TEMPORARY and key.id is None)
    ]


def _check_accounted(storage: Storage, manifest: Manifest, indexes: dict[str, Index]) -> Iterator[str]:
    for entry in manifest.entries:
        if entry.state is not State.COMMITTED:
            yield f"I8 {entry.name} is still {entry.state}"
    found = _objects(storage)
    # Only the newest copies stay, and one that could not be written leaves its predecessor among them.
    newest = sorted(key.revision for key in found if key.revision is not None)[-COPIES_KEPT:]
    for key in found:
        if not _accounted(key, manifest, indexes, {*manifest.copies, *newest}):
            yield f"I8 {key.text} ({key.kind}): nothing accounts for it"


def _accounted(key: keys.Key, manifest: Manifest, indexes: dict[str, Index], copies: set[int]) -> bool:
    if key.kind in {keys.Kind.MANIFEST, keys.Kind.REPLACED}:
        return True
    if key.kind is keys.Kind.COPY:
        return key.revision in copies
    entry = manifest.find(key.id) if key.id is not None else None
    if entry is None or entry.step != key.step or entry.state is State.RETIRED:
        return False
    index = indexes.get(entry.id)
    if index is None or key.kind is keys.Kind.INDEX:
        return True  # pending, or damaged: its folder is its own
    return key.text in {keys.payload_key(entry.step, entry.id, item.name) for item in index.objects}
