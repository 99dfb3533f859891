"""Bring a run back whose manifest is lost, unreadable or rolled back: from its copies and the sealed indexes.

Every sealed save is admitted, what has lost an object as *damaged*, and all of it is *held*: no rule deletes it until
a person releases it, and what is damaged goes only by the hand of a person. What was retired stays retired.

(Past 350 lines: one proposal, from what is read to what is said of it.)
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cloudckpt.core import keys
from cloudckpt.core.index_json import INDEX_LIMIT_BYTES, decode_index
from cloudckpt.core.manifest import note, recompute
from cloudckpt.core.manifest_json import MANIFEST_LIMIT_BYTES, decode_manifest
from cloudckpt.core.model import Checkpoint, Index, Manifest, State
from cloudckpt.core.policy import Policy
from cloudckpt.errors import CheckpointNotFoundError, FormatError, ObjectNotFoundError
from cloudckpt.sealed import Sealed, judge_folder
from cloudckpt.storage import ManifestStore, Storage, Versioned
from cloudckpt.view import placed

__all__ = ["RepairPlan", "repair_run"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RepairPlan:
    """What a repair would do, or did.

    Attributes:
        url: the root.
        carried_out: whether it was done; otherwise it is a proposal.
        basis: what the proposal starts from: the manifest, a copy of it, or the indexes alone.
        admitted: the checkpoints that are whole, and the damaged ones; all of them held.
        refused: folder -> why it was not admitted.
        gc_deletes: the folders among them that the next ``gc`` deletes; it leaves the others to a person.
        could_not_know: what may have been lost, one sentence each.
        manifest: the proposed manifest.
    """

    url: str
    carried_out: bool
    basis: str
    admitted: tuple[Checkpoint, ...]
    refused: Mapping[str, str]
    gc_deletes: tuple[str, ...]
    could_not_know: tuple[str, ...]
    manifest: Manifest


@dataclass(frozen=True, slots=True)
class _Refusal:
    """Why a folder is not admitted, its index if that can be read, and whether ``gc`` takes the folder for garbage."""

    why: str
    index: Index | None = None
    gc_deletes: bool = False


def repair_run(store: ManifestStore, *, dry_run: bool = True) -> RepairPlan:
    """Propose a manifest from what is there; with ``dry_run=False`` put it in place, which fences every writer.

    Raises:
        CheckpointNotFoundError: the root holds nothing of ours.
        FormatError: it was written by a newer version, or needs what this one does not know: upgrade instead.
        ConflictError: somebody wrote a manifest during the repair.
        StorageError: the store refused.
    """
    storage = store.storage
    listing = {item.key: item.size_bytes for item in storage.list("")}
    current = _current(storage)
    basis, basis_name, retired = _basis(storage, listing, current)
    judged, refused = _judge_folders(storage, listing)
    sealed = _one_of_each(judged, refused, [*retired.values(), *(basis.entries if basis else ())])
    _refuse_unknown(storage, basis, sealed)
    if basis is None and not sealed:
        raise CheckpointNotFoundError(f"{storage.url} holds no manifest, no copy of one and no checkpoint to admit")
    entries = [
        *_entries(sealed, basis, retired, at=store.clock()),
        *_without_their_index(basis, retired, refused, listing),
    ]
    indexes = [*(s.index for s in judged), *(r.index for r in refused.values() if r.index is not None)]
    manifest = _proposal(
        store,
        basis,
        entries,
        indexes,
        policy=basis.policy if basis else max(sealed, key=lambda s: s.index.seq).index.policy,
        revision=_highest_revision(listing, basis) + 1,
    )
    if not dry_run:
        manifest = store.rebuild(manifest, over=current)
    return RepairPlan(
        url=storage.url,
        carried_out=not dry_run,
        basis=basis_name,
        admitted=tuple(placed(e, storage.url) for e in manifest.committed),
        refused={folder: refusal.why for folder, refusal in refused.items()},
        gc_deletes=tuple(folder for folder, refusal in refused.items() if refusal.gc_deletes),
        could_not_know=(*_could_not_know(basis, basis_name, sealed), *_damaged(manifest)),
        manifest=manifest,
    )


def _refuse_unknown(storage: Storage, basis: Manifest | None, sealed: Sequence[Sealed]) -> None:
    needed = {name for s in sealed for name in s.index.requires} | set(basis.requires if basis else ())
    if needed:
        raise FormatError(
            f"{storage.url} needs {', '.join(sorted(needed))}, which this version does not know: upgrade cloudckpt and "
            "repair with that. Nothing was changed"
        )


def _current(storage: Storage) -> Versioned | None:
    try:
        return storage.read(keys.MANIFEST, limit_bytes=MANIFEST_LIMIT_BYTES)
    except ObjectNotFoundError:
        return None


def _basis(
    storage: Storage, listing: Mapping[str, int], current: Versioned | None
) -> tuple[Manifest | None, str, dict[str, Checkpoint]]:
    """The newest readable manifest, its name, and what is retired by earlier ones and unknown to it.

    That is the current one or a copy, whichever has the higher revision.
    """
    found: list[tuple[Manifest, str]] = []
    if current is not None:
        found += _decoded(current.body, keys.MANIFEST)
    # A copy that nobody could have written does not keep the others from being read.
    copies = (key for key, size in listing.items() if size <= MANIFEST_LIMIT_BYTES)
    for key in sorted((key for key in copies if keys.parse(key).kind is keys.Kind.COPY), reverse=True):
        with contextlib.suppress(ObjectNotFoundError):  # a writer that is still there has dropped it
            found += _decoded(storage.read(key, limit_bytes=MANIFEST_LIMIT_BYTES).body, key)
    if not found:
        return None, "the indexes alone", {}
    basis, name = max(found, key=lambda pair: pair[0].revision)
    retired = {entry.id: entry for manifest, _ in found for entry in manifest.in_state(State.RETIRED)}
    return basis, name, {save_id: entry for save_id, entry in retired.items() if basis.find(save_id) is None}


def _decoded(body: bytes, name: str) -> list[tuple[Manifest, str]]:
    try:
        manifest = decode_manifest(body, what=name)
    except FormatError as exc:
        if "upgrade cloudckpt" in str(exc):
            raise
        return []
    epochs = [manifest.writer_epoch, *(entry.writer_epoch for entry in manifest.entries)]
    if max(manifest.revision, manifest.next_seq, manifest.commits, *epochs) > keys.COUNT_LIMIT:
        return []  # edited by hand: there would soon be no next number
    return [(manifest, name)]


def _judge_folders(storage: Storage, listing: Mapping[str, int]) -> tuple[list[Sealed], dict[str, _Refusal]]:
    """What was sealed, by folder, and what is refused."""
    folders: dict[str, dict[str, int]] = {}
    for key, size in listing.items():
        folder, slash, name = key.partition("/")
        if slash and keys.parse_prefix(folder):
            folders.setdefault(folder, {})[name] = size
    sealed: list[Sealed] = []
    refused: dict[str, _Refusal] = {}
    for folder, sizes in sorted(folders.items()):
        judged = _judged(storage, folder, sizes)
        if isinstance(judged, Sealed):
            sealed.append(judged)
        else:
            refused[folder] = judged
    return sealed, refused


def _judged(storage: Storage, folder: str, sizes: Mapping[str, int]) -> Sealed | _Refusal:
    step, save_id = keys.parse_prefix(folder) or (0, "")
    index_bytes = sizes.get(keys.INDEX_NAME)
    if index_bytes is None:
        ours = any(keys.parse(f"{folder}/{name}").kind is not keys.Kind.FOREIGN for name in sizes)
        return _Refusal("it was never sealed: no index", gc_deletes=ours)
    if index_bytes > INDEX_LIMIT_BYTES:
        return _Refusal(f"its index has {index_bytes} bytes, more than the {INDEX_LIMIT_BYTES} that are read")
    key = f"{folder}/{keys.INDEX_NAME}"
    try:
        body = storage.read(key, limit_bytes=INDEX_LIMIT_BYTES).body
    except ObjectNotFoundError:
        return _Refusal("its index went away while it was being looked at", gc_deletes=True)
    judged = judge_folder(body, save_id=save_id, step=step, sizes=sizes, what=f"{storage.url}/{key}")
    if isinstance(judged, str):
        return _Refusal(judged, index=_readable(body))
    if (uncounted := _uncounted(judged.index)) is not None:
        return _Refusal(uncounted, index=judged.index)
    return judged


def _readable(body: bytes) -> Index | None:
    try:
        return decode_index(body)
    except FormatError:
        return None


def _uncounted(index: Index) -> str | None:
    """Why no entry can be made of an index whose whole save may be there; None if nothing speaks against it.

    Only here: a claim has the entry already, and loses no save for what its index counts.
    """
    if max(index.seq, index.writer_epoch) <= keys.COUNT_LIMIT:
        return None
    return f"its index has numbers that no run counts to (seq {index.seq}, writer {index.writer_epoch})"


def _one_of_each(sealed: Sequence[Sealed], refused: dict[str, _Refusal], known: Sequence[Checkpoint]) -> list[Sealed]:
    """Of two folders with one save id, which is no accident: that of a manifest, else a whole one, else the earlier."""
    steps = {entry.id: entry.step for entry in known}
    kept = []
    for found in sorted(sealed, key=lambda s: (s.damaged is not None, s.index.seq)):
        save_id, step = found.index.id, found.index.step
        if steps.setdefault(save_id, step) == step:
            kept.append(found)
        else:
            why = f"{save_id} is the save of step {steps[save_id]}"
            refused[keys.checkpoint_prefix(step, save_id)] = _Refusal(
                why, index=found.index, gc_deletes=not found.index.requires
            )
    return kept


def _highest_revision(listing: Mapping[str, int], basis: Manifest | None) -> int:
    copies = [key.revision for key in map(keys.parse, listing) if key.revision is not None]
    return max([*copies, basis.revision if basis else 0], default=0)


def _entries(
    sealed: Sequence[Sealed], basis: Manifest | None, retired: Mapping[str, Checkpoint], *, at: str
) -> list[Checkpoint]:
    named = {entry.id: entry for entry in (basis.entries if basis else ())}
    entries = []
    for found in sealed:
        # An earlier manifest's word is enough to take a part of a save for the rest of a delete, not for a whole one.
        known = named.get(found.index.id) or (None if found.damaged is None else retired.get(found.index.id))
        # Retired is terminal, even here: their bytes may be half deleted by somebody who is still at it.
        entries.append(_still_retired(_entry(found, known, at), known))
    return entries


def _without_their_index(
    basis: Manifest | None, retired: Mapping[str, Checkpoint], refused: dict[str, _Refusal], listing: Mapping[str, int]
) -> list[Checkpoint]:
    """Entries that are known from a manifest alone, as their index tells nothing; they are refused no longer.

    Those that were retired, so that their deletion goes on, and committed ones of which the index is gone: a delete
    takes it last, so payload without it is damage. An index that is there and wrong stays refused.
    """
    with_payload = {(key.step, key.id) for key in map(keys.parse, listing) if key.kind is keys.Kind.PAYLOAD}
    kept = []
    for entry in (*retired.values(), *(basis.entries if basis else ())):
        if entry.name not in refused:
            continue
        lost = keys.index_key(entry.step, entry.id) not in listing and (entry.step, entry.id) in with_payload
        if entry.state is State.RETIRED:
            kept.append(entry)
        elif entry.state is State.COMMITTED and lost:
            kept.append(replace(entry, held=True, damaged=entry.damaged or f"{keys.INDEX_NAME} is missing"))
        else:
            continue
        del refused[entry.name]
    return kept


def _proposal(
    store: ManifestStore,
    basis: Manifest | None,
    entries: Sequence[Checkpoint],
    indexes: Sequence[Index],
    *,
    policy: Policy,
    revision: int,
) -> Manifest:
    entries = _distinct(entries)
    # Above everything found, what was refused included: gc takes a sealed save that is newer than the manifest for
    # the sign of a manifest that was rolled back.
    counted = [index for index in indexes if max(index.seq, index.writer_epoch) <= keys.COUNT_LIMIT]
    found: list[Checkpoint | Index] = [*entries, *counted]
    epochs = [e.writer_epoch for e in found] + ([basis.writer_epoch] if basis else [])
    seqs = [e.seq for e in found] + ([basis.next_seq - 1] if basis else [])
    manifest = Manifest(
        run_id=store.token(32),
        # Above everything found, so that no copy that turns up later looks newer than this.
        revision=revision,
        writer_epoch=max(epochs, default=0) + 1,
        next_seq=max(seqs, default=0) + 1,
        commits=max(basis.commits if basis else 0, len(entries)),
        resumed_from=None,
        policy=policy,
        entries=tuple(sorted(entries, key=lambda e: e.seq)),
        journal=basis.journal if basis else (),
        extra=basis.extra if basis else {},
    )
    detail = f"{len(manifest.committed)} checkpoints admitted and held"
    return recompute(note(manifest, "repair", at=store.clock(), detail=detail))


def _still_retired(entry: Checkpoint, known: Checkpoint | None) -> Checkpoint:
    if known is None or known.state is not State.RETIRED:
        return entry
    return replace(entry, state=State.RETIRED, held=False, retired_because=known.retired_because)


def _entry(sealed: Sealed, known: Checkpoint | None, at: str) -> Checkpoint:
    index, facts = sealed.index, sealed.facts
    if known is not None and known.index_digest not in {None, facts.index_digest}:
        # Whatever it names may be right by size, and is not what was committed.
        changed = "repair found another index than the one that was committed"
        return replace(known, state=State.COMMITTED, held=True, damaged=known.damaged or changed)
    facts_now: dict[str, Any] = {
        "state": State.COMMITTED,
        "held": True,
        "size_bytes": facts.size_bytes,
        "object_count": facts.object_count,
        "index_digest": facts.index_digest,
        "damaged": (known.damaged if known else None) or sealed.damaged,
    }
    if known is not None:
        # What a person or a rule wrote down about it stays written.
        return replace(known, committed_at=known.committed_at or at, **facts_now)
    return Checkpoint(
        id=index.id,
        step=index.step,
        seq=index.seq,
        writer_epoch=index.writer_epoch,
        announced_at=index.announced_at,
        committed_at=at,
        metrics=index.metrics,
        world_size=index.world_size,
        tags=index.tags,
        pinned=index.pinned,
        **facts_now,
    )


def _distinct(entries: Sequence[Checkpoint]) -> list[Checkpoint]:
    """Two histories of a rolled-back run may have given one seq twice: the later announce goes after the other."""
    ordered: list[Checkpoint] = []
    for entry in sorted(entries, key=lambda e: (e.seq, e.announced_at, e.id)):
        least = ordered[-1].seq + 1 if ordered else 1
        ordered.append(replace(entry, seq=max(entry.seq, least)))
    return ordered


def _damaged(manifest: Manifest) -> tuple[str, ...]:
    return tuple(
        f"{entry.name} is damaged ({entry.damaged}): it is admitted and held, never chosen by a rule, and deleted only "
        "by cloudckpt rm"
        for entry in manifest.committed
        if entry.damaged is not None
    )


def _could_not_know(basis: Manifest | None, basis_name: str, sealed: Sequence[Sealed]) -> tuple[str, ...]:
    everything = "all that were sealed are admitted and held; a damaged one may be what a delete has left"
    if basis is None:
        return (
            "pins, tags, marks and metrics that were added after a save: each checkpoint is as it was saved",
            f"which checkpoints had been retired: {everything}",
        )
    if basis_name == keys.MANIFEST:
        return ()
    known = {e.id for e in basis.entries}
    newer = sum(s.index.id not in known for s in sealed)
    later = f"changes after revision {basis.revision} ({basis_name}): later pins, tags, marks and reported metrics"
    return (
        f"{later}; {newer} checkpoints are known from their own index only",
        f"which checkpoints were retired after that revision: {everything}",
    )
