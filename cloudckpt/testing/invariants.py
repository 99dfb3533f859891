"""The invariants of the spec, as questions: to what a store holds right now, and to each write and delete on the way.

``check_store`` looks at a store, whoever crashed. The others look at one step, before it is made or just after: the
protocol model asks them in every state that it reaches, ``Watch`` at every request of the stateful suite.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace

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
from cloudckpt.testing import oracle

__all__ = ["check_store", "delete_violations", "manifest_violations", "put_violations", "step_violations"]


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
    yield from manifest_violations(manifest)
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


def manifest_violations(manifest: Manifest) -> Iterator[str]:
    """What is wrong with a manifest, whatever led to it: I4, I5, I6."""
    yield from _check_lists(manifest)
    yield from _check_protected(manifest)
    yield from _check_epochs(manifest)


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
    plain = tuple((rule.metric, oracle.best_ids(manifest, rule)) for rule in manifest.policy.keep_best)
    if tuple((best.metric, best.ids) for best in manifest.best) != plain:
        yield f"I4 best is {manifest.best}, and {plain} by a plain reading of the policy"
    if manifest.recent != oracle.recent_ids(manifest):
        yield f"I4 recent is {manifest.recent}, and {oracle.recent_ids(manifest)} by a plain reading of the policy"


def _check_protected(manifest: Manifest) -> Iterator[str]:
    plan = plan_prune(manifest.entries, manifest.policy, resumed_from=manifest.resumed_from)
    kept = {checkpoint.id for checkpoint in plan.kept}
    protected = oracle.protected(manifest)
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


# -- one step ------------------------------------------------------------------------------------------------


def step_violations(before: Manifest | None, after: Manifest, *, by_hand: bool = False) -> Iterator[str]:
    """What is wrong with a manifest that was put in place of another: I5, I6, I7, I9, and what ``after`` breaks itself.

    Args:
        before: what was there; None for a new run.
        by_hand: a person or an evaluator did it, who may take from ``best`` what they like.
    """
    if before is not None and before.run_id == after.run_id:  # a repair begins another run
        yield from _check_writer(before, after)
        yield from _check_arrows(before, after)
        if not by_hand:
            yield from _check_retired(before, after)
            yield from _check_best_left(before, after)
    yield from manifest_violations(after)


def _check_writer(before: Manifest, after: Manifest) -> Iterator[str]:
    if after.writer_epoch < before.writer_epoch:
        yield f"I6 the writer epoch falls from {before.writer_epoch} to {after.writer_epoch}"
    if after.writer_epoch > before.writer_epoch + 1:
        yield f"I6 the writer epoch jumps from {before.writer_epoch} to {after.writer_epoch}"
    tokens = [manifest.owner.token if manifest.owner else None for manifest in (before, after)]
    if tokens[0] != tokens[1] and after.writer_epoch == before.writer_epoch:
        yield f"I6 writer {after.writer_epoch} is {tokens[1]} and was {tokens[0]}: a claim without an epoch of its own"
    if after.revision != before.revision + 1:
        yield f"I6 revision {after.revision} was written upon {before.revision}: a write in between is lost"


_ARROWS = {
    (None, State.PENDING),
    (State.PENDING, State.PENDING),
    (State.PENDING, State.COMMITTED),
    (State.PENDING, State.RETIRED),
    (State.COMMITTED, State.COMMITTED),
    (State.COMMITTED, State.RETIRED),
    (State.RETIRED, State.RETIRED),
    (State.RETIRED, None),
}


def _check_arrows(before: Manifest, after: Manifest) -> Iterator[str]:
    was = {entry.id: entry for entry in before.entries}
    now = {entry.id: entry for entry in after.entries}
    for save_id in sorted(was.keys() | now.keys()):
        old, new = was.get(save_id), now.get(save_id)
        arrow = (old.state if old else None, new.state if new else None)
        if arrow not in _ARROWS:
            yield f"I7 {save_id} goes from {arrow[0] or 'nowhere'} to {arrow[1] or 'nowhere'}"
        if new is not None and old is None and new.writer_epoch != after.writer_epoch:
            yield f"I6 {new.name} is announced by writer {new.writer_epoch}, and {after.writer_epoch} holds the run"
        if old is None or new is None or old.committed_at is not None or new.committed_at is None:
            continue
        # A claim rolls forward what an earlier writer sealed, in the write that fences that writer.
        if after.writer_epoch == before.writer_epoch != new.writer_epoch:
            yield f"I6 {new.name} commits under writer {new.writer_epoch}, and {after.writer_epoch} holds the run"


def _check_retired(before: Manifest, after: Manifest) -> Iterator[str]:
    stood = {entry.id for entry in before.committed}
    # As if the rules had let nothing go in this write: what would have been protected?
    spared = [entry.id for entry in after.entries if entry.id in stood and entry.state is State.RETIRED]
    protected = oracle.protected(_unretired(after, spared))
    for save_id in spared:
        if save_id in protected:
            yield f"I5 {save_id} is {protected[save_id]}, and a rule retired it"


def _unretired(manifest: Manifest, ids: Collection[str]) -> Manifest:
    entries = tuple(replace(e, state=State.COMMITTED) if e.id in ids else e for e in manifest.entries)
    return replace(manifest, entries=entries)


def _check_best_left(before: Manifest, after: Manifest) -> Iterator[str]:
    if before.policy.keep_best != after.policy.keep_best:
        return  # a person said what is best from now on
    earlier = {entry.id for entry in before.entries if entry.committed_at is not None}
    came = {entry.id for entry in after.entries if entry.committed_at is not None} - earlier
    now = {best.metric: best.ids for best in after.best}
    unusable = {entry.id for entry in after.entries if entry.damaged is not None}  # proven so: not a rule's doing
    for best in before.best:
        for save_id in best.ids:
            stays = save_id in now.get(best.metric, ()) or save_id in unusable
            if not stays and not came & set(now.get(best.metric, ())):
                yield f"I9 {save_id} leaves the best by {best.metric}, and no better one is committed"


def put_violations(text: str, *, overwrites: bool, named: Collection[str]) -> Iterator[str]:
    """What is wrong with putting an object: I2, I7, I12.

    Args:
        overwrites: other bytes lie under this key.
        named: the ids of all saves that any manifest of this run has named so far.
    """
    key = keys.parse(text)
    if key.kind is keys.Kind.FOREIGN:
        yield f"I12 {text} is not one of our keys, and is written"
    if overwrites and key.kind not in {keys.Kind.MANIFEST, keys.Kind.PROBE}:
        yield f"I2 {text} is overwritten with other bytes"
    if key.id is not None and key.id not in named:
        yield f"I7 {text} is written before any manifest has named its save"


def delete_violations(text: str, manifest: Manifest | None, *, doubted: Collection[str] = ()) -> Iterator[str]:
    """What is wrong with deleting an object while this manifest stands: I2, I7, I11, I12.

    Args:
        doubted: the ids of saves whose commit ended with an unknown outcome.
    """
    key = keys.parse(text)
    if key.kind is keys.Kind.FOREIGN:
        yield f"I12 {text} is not one of our keys, and is deleted"
    if key.kind in {keys.Kind.MANIFEST, keys.Kind.LOCK}:
        yield f"I2 {text} is deleted"
    entry = manifest.find(key.id) if manifest is not None and key.id is not None else None
    if entry is None or entry.step != key.step or entry.state is State.RETIRED:
        return
    if entry.state is State.COMMITTED and key.kind is keys.Kind.TEMPORARY:
        return  # left by a put that never ended; nobody writes there any more
    number = "I11" if entry.id in doubted else "I7"
    yield f"{number} {text} is deleted while its save is {entry.state}"


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
