"""Bring a run back whose manifest is lost, unreadable or rolled back: from its copies and the sealed indexes.

Only what is provably whole is admitted, and all of it is *held*: no rule deletes it until a person releases it.
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
from cloudckpt.errors import CheckpointNotFoundError, FormatError, ObjectNotFoundError
from cloudckpt.sealed import Whole, judge_folder
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
        admitted: the checkpoints that are whole; all of them held.
        refused: folder -> why it was not admitted.
        could_not_know: what may have been lost, one sentence each.
        manifest: the proposed manifest.
    """

    url: str
    carried_out: bool
    basis: str
    admitted: tuple[Checkpoint, ...]
    refused: Mapping[str, str]
    could_not_know: tuple[str, ...]
    manifest: Manifest


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
    basis, basis_name = _basis(storage, listing, current)
    whole, refused, sealed = _judge_folders(storage, listing)
    whole = _one_of_each(whole, refused, basis)
    _refuse_unknown(storage, basis, whole)
    if basis is None and not whole:
        raise CheckpointNotFoundError(f"{storage.url} holds no manifest, no copy of one and no whole checkpoint")
    manifest = _proposal(store, basis, whole, sealed, revision=_highest_revision(listing, basis) + 1)
    if not dry_run:
        manifest = store.rebuild(manifest, over=current)
    return RepairPlan(
        url=storage.url,
        carried_out=not dry_run,
        basis=basis_name,
        admitted=tuple(placed(e, storage.url) for e in manifest.committed),
        refused=refused,
        could_not_know=(*_could_not_know(basis, basis_name, whole), *_damaged(manifest)),
        manifest=manifest,
    )


def _refuse_unknown(storage: Storage, basis: Manifest | None, whole: Sequence[Whole]) -> None:
    needed = {name for w in whole for name in w.index.requires} | set(basis.requires if basis else ())
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


def _basis(storage: Storage, listing: Mapping[str, int], current: Versioned | None) -> tuple[Manifest | None, str]:
    """The newest readable manifest: the current one or a copy, whichever has the higher revision."""
    found: list[tuple[Manifest, str]] = []
    if current is not None:
        found += _decoded(current.body, keys.MANIFEST)
    # A copy that nobody could have written does not keep the others from being read.
    copies = (key for key, size in listing.items() if size <= MANIFEST_LIMIT_BYTES)
    for key in sorted((key for key in copies if keys.parse(key).kind is keys.Kind.COPY), reverse=True):
        with contextlib.suppress(ObjectNotFoundError):  # a writer that is still there has dropped it
            found += _decoded(storage.read(key, limit_bytes=MANIFEST_LIMIT_BYTES).body, key)
    if not found:
        return None, "the indexes alone"
    return max(found, key=lambda pair: pair[0].revision)


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


def _judge_folders(storage: Storage, listing: Mapping[str, int]) -> tuple[list[Whole], dict[str, str], list[Index]]:
    """What is whole, what is refused and why, and every index that can be read, of refused folders too."""
    folders: dict[str, dict[str, int]] = {}
    for key, size in listing.items():
        folder, slash, name = key.partition("/")
        if slash and keys.parse_prefix(folder):
            folders.setdefault(folder, {})[name] = size
    whole: list[Whole] = []
    refused: dict[str, str] = {}
    sealed: list[Index] = []
    for folder, sizes in sorted(folders.items()):
        step, save_id = keys.parse_prefix(folder) or (0, "")
        if keys.INDEX_NAME not in sizes:
            refused[folder] = "it was never sealed: no index"
            continue
        if (index_bytes := sizes[keys.INDEX_NAME]) > INDEX_LIMIT_BYTES:
            refused[folder] = f"its index has {index_bytes} bytes, more than the {INDEX_LIMIT_BYTES} that are read"
            continue
        key = f"{folder}/{keys.INDEX_NAME}"
        try:
            body = storage.read(key, limit_bytes=INDEX_LIMIT_BYTES).body
        except ObjectNotFoundError:
            refused[folder] = "its index went away while it was being looked at"
            continue
        judged = judge_folder(body, save_id=save_id, step=step, sizes=sizes, what=f"{storage.url}/{key}")
        if isinstance(judged, Whole):
            sealed.append(judged.index)
            if (uncounted := _uncounted(judged.index)) is None:
                whole.append(judged)
            else:
                refused[folder] = uncounted
        else:
            refused[folder] = judged
            with contextlib.suppress(FormatError):
                sealed.append(decode_index(body, what=key))
    return whole, refused, sealed


def _uncounted(index: Index) -> str | None:
    """Why no entry can be made of an index whose whole save may be there; None if nothing speaks against it.

    Only here: a claim has the entry already, and loses no save for what its index counts.
    """
    if max(index.seq, index.writer_epoch) <= keys.COUNT_LIMIT:
        return None
    return f"its index has numbers that no run counts to (seq {index.seq}, writer {index.writer_epoch})"


def _one_of_each(whole: Sequence[Whole], refused: dict[str, str], basis: Manifest | None) -> list[Whole]:
    """Of two folders with one save id, which is no accident: that of the basis, or that of the earlier save."""
    steps = {entry.id: entry.step for entry in (basis.entries if basis else ())}
    kept = []
    for found in sorted(whole, key=lambda w: w.index.seq):
        save_id, step = found.index.id, found.index.step
        if steps.setdefault(save_id, step) == step:
            kept.append(found)
        else:
            refused[keys.checkpoint_prefix(step, save_id)] = f"{save_id} is the save of step {steps[save_id]}"
    return kept


def _highest_revision(listing: Mapping[str, int], basis: Manifest | None) -> int:
    copies = [key.revision for key in map(keys.parse, listing) if key.revision is not None]
    return max([*copies, basis.revision if basis else 0], default=0)


def _proposal(
    store: ManifestStore, basis: Manifest | None, whole: Sequence[Whole], sealed: Sequence[Index], *, revision: int
) -> Manifest:
    at = store.clock()
    known = {entry.id: entry for entry in (basis.entries if basis else ())}
    newest = max(whole, key=lambda w: w.index.seq, default=None)
    policy = basis.policy if basis else newest.index.policy if newest else Manifest(run_id="").policy
    entries = [_entry(w, known.get(w.index.id), at) for w in whole]
    # Retired is terminal, even here: their bytes may be half deleted by somebody who is still at it.
    entries = _distinct([_still_retired(e, known.get(e.id)) for e in entries])
    # Above everything found, what was refused included: gc takes a sealed save that is newer than the manifest for
    # the sign of a manifest that was rolled back.
    counted = (index for index in sealed if max(index.seq, index.writer_epoch) <= keys.COUNT_LIMIT)
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
    return recompute(note(manifest, "repair", at=at, detail=f"{len(manifest.committed)} checkpoints admitted and held"))


def _still_retired(entry: Checkpoint, known: Checkpoint | None) -> Checkpoint:
    if known is None or known.state is not State.RETIRED:
        return entry
    return replace(entry, state=State.RETIRED, held=False, retired_because=known.retired_because)


def _entry(whole: Whole, known: Checkpoint | None, at: str) -> Checkpoint:
    index, facts = whole.index, whole.facts
    if known is not None and known.index_digest not in {None, facts.index_digest}:
        # Its bytes are as many as they should be, and they are not the ones that were committed.
        changed = "repair found another index than the one that was committed"
        return replace(known, state=State.COMMITTED, held=True, damaged=known.damaged or changed)
    facts_now: dict[str, Any] = {
        "state": State.COMMITTED,
        "held": True,
        "size_bytes": facts.size_bytes,
        "object_count": facts.object_count,
        "index_digest": facts.index_digest,
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
        f"{entry.name} is damaged ({entry.damaged}): it is admitted and held, and never chosen by a rule"
        for entry in manifest.committed
        if entry.damaged is not None
    )


def _could_not_know(basis: Manifest | None, basis_name: str, whole: Sequence[Whole]) -> tuple[str, ...]:
    if basis is None:
        return (
            "pins, tags, marks and metrics that were added after a save: each checkpoint is as it was saved",
            "which checkpoints had been retired: all that are whole were admitted, and are held",
        )
    if basis_name == keys.MANIFEST:
        return ()
    known = {e.id for e in basis.entries}
    newer = sum(w.index.id not in known for w in whole)
    later = f"changes after revision {basis.revision} ({basis_name}): later pins, tags, marks and reported metrics"
    return (
        f"{later}; {newer} checkpoints are known from their own index only",
        "which checkpoints were retired after that revision: all that are whole were admitted, and are held",
    )
