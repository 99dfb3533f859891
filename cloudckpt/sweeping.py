"""Deleting bytes that nobody can need: of retired entries (``sweep``), and what no entry names (``gc``).

The only module that deletes checkpoints. The manifest says *retired* first, and retired is terminal, so a
delete that comes late, comes twice or comes from another process harms nothing (I7).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from cloudckpt.core import keys
from cloudckpt.core.garbage import GarbagePlan, plan_garbage
from cloudckpt.core.index_json import INDEX_LIMIT_BYTES, decode_index
from cloudckpt.core.manifest import forget, note
from cloudckpt.core.model import Checkpoint, Index, Manifest, State
from cloudckpt.errors import CheckpointNotFoundError, ConflictError, FormatError, ObjectNotFoundError, StorageError
from cloudckpt.storage import ManifestStore, Storage
from cloudckpt.view import placed, read_index_body

__all__ = ["SweepReport", "delete_bytes", "delete_retired", "gc_run", "sweep_run"]

#: What a failure to look for unfinished uploads is called among what failed.
_UPLOADS = "unfinished uploads"


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepReport:
    """What a sweep or gc deleted, or would delete.

    Attributes:
        dry_run: nothing was changed.
        retired: the retired checkpoints whose bytes are (or would be) gone.
        failed: what could not be deleted, and why, by key or checkpoint name.
        garbage: what ``gc`` found beside the run; None for ``sweep``.
        aborted_uploads: unfinished multipart uploads that were (or would be) aborted.
    """

    dry_run: bool
    retired: tuple[Checkpoint, ...]
    failed: dict[str, str]
    garbage: GarbagePlan | None = None
    aborted_uploads: int = 0


def delete_bytes(storage: Storage, checkpoint: Checkpoint, names: Sequence[str] | None = None) -> str | None:
    """Delete a retired checkpoint's objects, payload first and index last; None once all are gone, else why not.

    Args:
        names: the payload objects' names where the caller knows them; otherwise they come from the index, or
            from a listing of this one folder if the index is lost.
    """
    prefix = keys.checkpoint_prefix(checkpoint.step, checkpoint.id)
    index = keys.index_key(checkpoint.step, checkpoint.id)
    try:
        payload = _payload_keys(storage, checkpoint, names, prefix)
    except FormatError as exc:
        return str(exc)
    failed = storage.delete(payload)
    if not failed:
        # The index goes last: whoever finds it can still learn the names of the rest.
        failed = storage.delete([index])
    return "; ".join(f"{key}: {exc}" for key, exc in failed.items()) or None


def _payload_keys(storage: Storage, checkpoint: Checkpoint, names: Sequence[str] | None, prefix: str) -> list[str]:
    if names is not None:
        return [f"{prefix}/{name}" for name in names]
    try:
        index = decode_index(read_index_body(storage, checkpoint))
    except (ObjectNotFoundError, FormatError) as exc:
        if "upgrade cloudckpt" in str(exc):
            raise
        listed = [keys.parse(item.key) for item in storage.list(f"{prefix}/")]
        # Foreign files in the folder stay, and so does the folder (I12).
        return [key.text for key in listed if key.kind not in {keys.Kind.FOREIGN, keys.Kind.INDEX}]
    if index.requires:
        raise FormatError(f"{prefix} needs {', '.join(index.requires)}, which this version does not know")
    return [f"{prefix}/{item.name}" for item in index.objects]


def delete_retired(store: ManifestStore, entries: Iterable[Checkpoint]) -> tuple[list[Checkpoint], dict[str, str]]:
    """Delete the bytes of retired entries: those that are gone, and why the others are not."""
    gone: list[Checkpoint] = []
    failed: dict[str, str] = {}
    for entry in entries:
        problem = delete_bytes(store.storage, entry)
        if problem is None:
            gone.append(placed(entry, store.storage.url))
        else:
            failed[entry.name] = problem
    return gone, failed


def sweep_run(store: ManifestStore, *, dry_run: bool = True) -> SweepReport:
    """Delete the bytes of retired entries and drop the entries. Lists nothing but folders without an index.

    Raises:
        CheckpointNotFoundError: there is no run here.
        StorageError: the store refused.
    """
    manifest = _required(store)
    store.check_known(manifest)
    retired = manifest.in_state(State.RETIRED)
    if dry_run:
        placed_ = tuple(placed(entry, store.storage.url) for entry in retired)
        return SweepReport(dry_run=True, retired=placed_, failed={})
    gone, failed = delete_retired(store, retired)
    _forget(store, [entry.id for entry in gone])
    return SweepReport(dry_run=False, retired=tuple(gone), failed=failed)


def gc_run(
    store: ManifestStore, *, dry_run: bool = True, expecting: Callable[[Manifest], Manifest] = lambda found: found
) -> SweepReport:
    """Delete whatever of ours no entry of the manifest can need, and report what is not ours.

    LIST first, *then* a manifest write of our own, and only then a plan made from what that write holds: a
    save that is announced in between is named by it. No clock and no age takes part (I7, I8).

    Args:
        expecting: for a preview, what else will have been changed by then: it is told as if that were done.

    Raises:
        CheckpointNotFoundError: there is no run here.
        ConflictError: the root holds sealed checkpoints that are newer than the manifest: it was rolled back.
        StorageError: the store refused.
    """
    storage = store.storage
    before = _required(store)
    listing = [(item.key, item.size_bytes) for item in storage.list("")]
    if dry_run:
        manifest = expecting(_required(store))
    else:
        manifest = store.transact(lambda current, _: note(current, "gc", at=store.clock()), prepare=lambda _: None)
    plan = plan_garbage(manifest, listing)
    unknown = _look_into_indexes(storage, manifest, plan)
    retired = tuple(placed(entry, storage.url) for entry in manifest.in_state(State.RETIRED))
    if dry_run:
        stale, failed = _stale_uploads(store), dict(unknown)
        if isinstance(stale, StorageError):
            failed[_UPLOADS], stale = str(stale), 0
        return SweepReport(dry_run=True, retired=retired, failed=failed, garbage=plan, aborted_uploads=stale)
    spared = {keys.parse(key).id for key in unknown}
    going = [o.key for o in plan.orphans if keys.parse(o.key).id is None or keys.parse(o.key).id not in spared]
    failed = unknown | {key: str(exc) for key, exc in _delete_index_last(storage, going).items()}
    kept_back = {keys.parse(key).id for key in failed}
    aborted = 0
    try:
        aborted = storage.abort_uploads("checkpoint-", spare=_in_flight(store))
    except StorageError as exc:
        failed[_UPLOADS] = str(exc)
    # The listing shows all bytes of an entry that was retired before it; of one that was retired after it, perhaps
    # not: that one waits for the next sweep.
    listed_whole = {entry.id for entry in before.in_state(State.RETIRED)}
    gone = [entry for entry in retired if entry.id in listed_whole and entry.id not in kept_back]
    _forget(store, [entry.id for entry in gone])
    return SweepReport(dry_run=False, retired=tuple(gone), failed=failed, garbage=plan, aborted_uploads=aborted)


def _required(store: ManifestStore) -> Manifest:
    manifest = store.read()
    if manifest is None:
        raise CheckpointNotFoundError(f"{store.storage.url} holds no run: nothing was ever saved there")
    return manifest


def _look_into_indexes(storage: Storage, manifest: Manifest, plan: GarbagePlan) -> dict[str, str]:
    """Read the indexes that are about to go: those that this version must not delete, and why, by key.

    Raises:
        ConflictError: one of them is of a save that is newer than the manifest.
    """
    unknown: dict[str, str] = {}
    for orphan in plan.orphans:
        key = keys.parse(orphan.key)
        if key.kind is not keys.Kind.INDEX:
            continue
        if orphan.size_bytes > INDEX_LIMIT_BYTES:
            # Nobody can have written it, and nobody can look into it: a person has to.
            unknown[key.text] = f"it has {orphan.size_bytes} bytes, more than the {INDEX_LIMIT_BYTES} that are read"
            continue
        entry = manifest.find(key.id or "")
        try:
            index = decode_index(storage.read(key.text, limit_bytes=INDEX_LIMIT_BYTES).body)
        except ObjectNotFoundError:
            continue
        except FormatError as exc:
            if not _let_go(key, entry) or "upgrade cloudckpt" in str(exc):
                unknown[key.text] = str(exc)
            continue
        if entry is None:
            _refuse_newer(storage, manifest, key, index)
        if (why := _why_it_stays(key, entry, index)) is not None:
            unknown[key.text] = why
    return unknown


def _let_go(key: keys.Key, entry: Checkpoint | None) -> bool:
    """Whether the manifest itself calls the save retired; of any other, a repair may have refused the index."""
    return entry is not None and entry.step == key.step


def _why_it_stays(key: keys.Key, entry: Checkpoint | None, index: Index) -> str | None:
    if _beyond_counting(index):
        return f"it has numbers that no run counts to (seq {index.seq}, writer {index.writer_epoch})"
    if index.requires:
        return f"it needs {', '.join(index.requires)}, which this version does not know"
    if not _let_go(key, entry) and (index.id, index.step) != (key.id, key.step):
        return f"it describes {keys.checkpoint_prefix(index.step, index.id)}"
    return None


def _beyond_counting(index: Index) -> bool:
    """Whether a repair would refuse it for its numbers: they are no sign of a manifest that was rolled back."""
    return max(index.seq, index.writer_epoch) > keys.COUNT_LIMIT


def _refuse_newer(storage: Storage, manifest: Manifest, key: keys.Key, index: Index) -> None:
    newer = index.seq >= manifest.next_seq or index.writer_epoch > manifest.writer_epoch
    if newer and not _beyond_counting(index):
        raise ConflictError(
            f"{storage.url}/{key.text} is a sealed checkpoint that is newer than the manifest (seq "
            f"{index.seq}, writer {index.writer_epoch}): an older manifest was put back. Nothing was deleted. "
            f"Run: cloudckpt repair {storage.url}"
        )


def _delete_index_last(storage: Storage, orphans: Sequence[str]) -> dict[str, Exception]:
    indexes = [key for key in orphans if keys.parse(key).kind is keys.Kind.INDEX]
    rest = [key for key in orphans if keys.parse(key).kind is not keys.Kind.INDEX]
    failed: dict[str, Exception] = dict(storage.delete(rest))
    spared = {keys.parse(key).id for key in failed}
    failed.update(storage.delete([key for key in indexes if keys.parse(key).id not in spared]))
    return failed


def _stale_uploads(store: ManifestStore) -> int | StorageError:
    """How many unfinished uploads there are that nobody is busy with, or why that cannot be told. Aborts none."""
    in_flight, stale = _in_flight(store), 0

    def counted(key: str) -> bool:
        nonlocal stale
        stale += not in_flight(key)
        return True

    try:
        store.storage.abort_uploads("checkpoint-", spare=counted)
    except StorageError as exc:
        return exc
    return stale


def _in_flight(store: ManifestStore) -> Callable[[str], bool]:
    """Whether an unfinished upload may be somebody's save that is under way.

    A save is announced before its upload begins, so a manifest that is read after the listing of uploads names every
    save that the listing can have met.
    """
    pending: set[str] | None = None

    def spare(key: str) -> bool:
        nonlocal pending
        if pending is None:
            pending = {entry.id for entry in _required(store).in_state(State.PENDING)}
        parsed = keys.parse(key)
        return parsed.kind is keys.Kind.FOREIGN or parsed.id in pending

    return spare


def _forget(store: ManifestStore, ids: Sequence[str]) -> None:
    if ids:
        store.transact(lambda current, _: forget(current, ids, at=store.clock()), prepare=lambda _: None)
