"""A checkpoint from one run into another: by the store itself where both are on one, else through this process.

The target is a run of its own, new or there already. The copy is a save like any other: announced before its first
byte, committed after its last, under a claim that is given back; a copy that is broken off costs nothing but itself.

(Past 350 lines: announce, bytes, seal and commit of one copy are one story.)
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace

import crc32c

from cloudckpt.claiming import Claim, claim_run
from cloudckpt.core import keys
from cloudckpt.core import manifest as transitions
from cloudckpt.core.arguments import checked_labels
from cloudckpt.core.checksum import combine_all, format_crc32c
from cloudckpt.core.index_json import encode_index
from cloudckpt.core.manifest import Abandon, RollForward
from cloudckpt.core.model import Checkpoint, Index, Manifest, PayloadObject, State
from cloudckpt.core.policy import PolicyWords
from cloudckpt.core.retention import plan_prune
from cloudckpt.errors import (
    CloudCkptError,
    CommitUnknownError,
    ConfigError,
    ConflictError,
    CorruptCheckpointError,
    FormatError,
    ObjectNotFoundError,
)
from cloudckpt.events import Listener, Listeners, LoggingListener
from cloudckpt.progress import Meter
from cloudckpt.sealed import summed
from cloudckpt.storage import Body, Copying, ManifestStore, Part, Storage
from cloudckpt.storage.body import NeverStopped
from cloudckpt.sweeping import sweep_run
from cloudckpt.view import RunView, placed, read_index

__all__ = ["Copied", "copy_checkpoint", "copy_pulled", "refuse_held"]

#: Objects under way at once; a large one is sent in several parts side by side as well.
_OBJECTS_AT_ONCE = 4

#: Parts in memory at once, of all objects together: at 64 MiB at most each, half a GiB.
_PARTS_AT_ONCE = 8

#: What may become of a writer that has not closed the target.
_TAKEOVERS = ("refuse", "last_wins", "force")

#: Whoever takes the bytes in order gets them in slices of this size.
_SLICE_BYTES = 8 * 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Copied:
    """What a copy made, or would make.

    Attributes:
        source: the checkpoint that was copied.
        checkpoint: what it is at the target; for a dry run as it would be announced.
        dry_run: nothing was written.
        new_run: whether the target was no run before.
        stored_bytes: copied by the store itself.
        carried_bytes: carried by this process.
        retired: older ones of the target that its policy lets go at this commit, or would.
    """

    source: Checkpoint
    checkpoint: Checkpoint
    dry_run: bool
    new_run: bool
    stored_bytes: int = 0
    carried_bytes: int = 0
    retired: tuple[Checkpoint, ...] = ()


def copy_checkpoint(
    store: ManifestStore,
    select: str | int,
    target: ManifestStore,
    *,
    tags: Iterable[str] = (),
    pin: bool = False,
    dry_run: bool = False,
    takeover: str = "refuse",
    meter: Meter | None = None,
    listener: Listener | None = None,
) -> Copied:
    """Copy one committed checkpoint into the run at ``target``, as the newest there.

    A new run keeps all that is copied into it, and goes on ranking by what the source's policy monitors. One that is
    there already goes by its own policy, which may let older ones go at this commit. Metrics and tags come along.

    Args:
        select: ``latest``, ``best``, a step, ``tag:NAME`` or a save id of the source.
        tags: further tags of the copy.
        pin: exempt the copy from every rule.
        dry_run: only say what would be done.
        takeover: "last_wins" writes into a run whose last writer has not closed it, and fences that one; "force" does
            so even in a duel.
        meter: told how far it is, and which objects are under way.
        listener: told what happens to the target; by default the log is.

    Raises:
        CheckpointNotFoundError: nothing matches.
        ConfigError: source and target are one run, or a word or tag cannot be used.
        ConflictError: another process holds the target.
        CorruptCheckpointError: bytes of the source are not what was sealed.
        FormatError: the target holds something else, or the checkpoint needs what this version does not know.
        StorageError: one of the stores refused.
    """
    further = checked_labels(tags, "a tag")
    if takeover not in _TAKEOVERS:
        raise ConfigError(f"takeover={takeover!r}: write one of {', '.join(_TAKEOVERS)}")
    if store.storage.url == target.storage.url:
        raise ConfigError(f"{target.storage.url} is the run that is copied from: choose another root for the copy")
    view = RunView(store)
    source = view.select(select)
    index = read_index(store.storage, source)
    if index.requires:
        raise FormatError(f"{source.url} needs {', '.join(index.requires)}, which this version does not know: upgrade")
    found = target.read()
    if takeover == "refuse":
        refuse_held(found, target)
    entry = Checkpoint(
        id=target.token(8),
        step=source.step,
        seq=0,
        state=State.PENDING,
        writer_epoch=1,
        announced_at=target.clock(),
        metrics=source.metrics,
        size_bytes=source.size_bytes,
        object_count=source.object_count,
        world_size=source.world_size,
        tags=tuple(dict.fromkeys((*source.tags, *further))),
        pinned=pin,
    )
    if dry_run:
        return Copied(
            source=source,
            checkpoint=placed(entry, target.storage.url),
            dry_run=True,
            new_run=found is None,
            retired=_outlived(found, entry, target),
        )
    rules = view.manifest().policy.keep_best
    words = PolicyWords() if found is not None else PolicyWords(keep_last=None, keep_best=list(rules) or 0)
    told = listener or Listeners([LoggingListener()])
    claim = claim_run(target, words, change_policy=False, takeover=takeover, listener=told)
    copy = _Copy(
        store=store,
        target=target,
        claim=claim,
        source=source,
        index=index,
        entry=replace(entry, writer_epoch=claim.writer_epoch),
        meter=meter or Meter("copying"),
    )
    committed, retired = copy.run()
    return Copied(
        source=source,
        checkpoint=placed(committed, target.storage.url),
        dry_run=False,
        new_run=found is None,
        stored_bytes=copy.stored_bytes,
        carried_bytes=copy.carried_bytes,
        retired=tuple(placed(other, target.storage.url) for other in retired),
    )


def _outlived(found: Manifest | None, entry: Checkpoint, target: ManifestStore) -> tuple[Checkpoint, ...]:
    """What the target's own policy lets go once the copy is committed. A new run keeps all."""
    if found is None:
        return ()
    committed = replace(entry, seq=found.next_seq, state=State.COMMITTED, committed_at=target.clock())
    plan = plan_prune((*found.entries, committed), found.policy)
    return tuple(placed(other, target.storage.url) for other in plan.retired)


def copy_pulled(
    folder: ManifestStore,
    target: ManifestStore,
    *,
    tags: Iterable[str] = (),
    pin: bool = False,
    takeover: str = "refuse",
) -> tuple[Copied, tuple[str, ...]]:
    """Copy the one checkpoint of a pulled folder, whatever it is marked as; with the names of its components.

    Raises:
        CheckpointNotFoundError: the folder holds none.
        CloudCkptError: as for ``copy_checkpoint``.
    """
    view = RunView(folder)
    name = view.manifest().entries[0].name
    copied = copy_checkpoint(folder, name, target, tags=tags, pin=pin, takeover=takeover)
    return copied, tuple(view.index(name).structure)


def refuse_held(found: Manifest | None, target: ManifestStore) -> None:
    """Refuse to write into a run that another process may be writing.

    Raises:
        ConflictError: its owner has not closed it.
    """
    # A claim would let the same job take over from itself: here that would fence a trainer in the middle of its run.
    if found is not None and found.owner is not None and not found.owner.closed:
        raise ConflictError(
            f"{target.storage.url} is held by {found.owner}, which has not closed it: choose another root, or wait "
            'for that process to end. If it is dead, pass takeover="last_wins" (--takeover). Nothing was changed'
        )


class _Copy:
    """One copy on its way."""

    def __init__(
        self,
        *,
        store: ManifestStore,
        target: ManifestStore,
        claim: Claim,
        source: Checkpoint,
        index: Index,
        entry: Checkpoint,
        meter: Meter,
    ) -> None:
        self._store = store
        self._target = target
        self._claim = claim
        self._source = source
        self._index = index
        self._entry = entry
        self._meter = meter
        self._mutex = threading.Lock()
        self._slots = threading.BoundedSemaphore(_PARTS_AT_ONCE)
        self._stopped = threading.Event()
        self.stored_bytes = 0
        self.carried_bytes = 0

    def run(self) -> tuple[Checkpoint, tuple[Checkpoint, ...]]:
        """Announce, bring every object, seal, commit, close the run; the copy, and what its commit let go."""
        epoch, store = self._claim.writer_epoch, self._target
        try:
            after = store.transact(
                lambda m, _: transitions.announce(
                    m, self._entry, writer_epoch=epoch, settlements={}, gone=(), at=store.clock()
                ),
                prepare=lambda _: None,
            )
            announced = after.find(self._entry.id)
            if announced is None:
                raise ConflictError(f"{self._entry.name} was announced and is gone from the manifest: copy again")
            self._objects(announced)
            sealed = self._seal(announced, after)
            done = self._commit(announced, sealed)
            committed = done.find(announced.id)
            if committed is None:
                raise ConflictError(f"{announced.name} was retired by somebody else before it was committed")
        except BaseException as exc:
            if not isinstance(exc, CommitUnknownError):
                # The first error is the one to tell; what cannot be settled now, the next claim settles.
                with contextlib.suppress(CloudCkptError):
                    self._give_up(exc)
            raise
        self._close()
        with contextlib.suppress(CloudCkptError):
            # What the target's policy lets go at this commit; a later sweep finds what stays.
            sweep_run(store, dry_run=False)
        before = {entry.id for entry in after.committed}
        return committed, tuple(entry for entry in done.in_state(State.RETIRED) if entry.id in before)

    def _objects(self, announced: Checkpoint) -> None:
        items = self._index.objects
        self._meter.expect_further(sum(item.size_bytes for item in items))
        pool = ThreadPoolExecutor(max(1, min(_OBJECTS_AT_ONCE, len(items))), thread_name_prefix="cloudckpt-copy")
        try:
            running = [pool.submit(self._bring, announced, item) for item in items]
            wait(running, return_when=FIRST_EXCEPTION)
        finally:
            self._stopped.set()
            pool.shutdown(cancel_futures=True)
        errors = [e for f in running if not f.cancelled() and (e := f.exception()) is not None]
        for error in sorted(errors, key=lambda e: isinstance(e, _BrokenOffError)):
            raise error

    def _bring(self, announced: Checkpoint, item: PayloadObject) -> None:
        there = keys.payload_key(self._source.step, self._source.id, item.name)
        here = keys.payload_key(announced.step, announced.id, item.name)
        to, of, size = self._target.unretried, self._store.unretried, item.size_bytes
        with self._meter.carrying(here):
            if isinstance(to, Copying) and to.copy_from(of, there, here, size_bytes=size, checksum=item.crc32c):
                self._meter.advance(size)
                with self._mutex:
                    self.stored_bytes += size
                return
            source = _StoredObject(self._store.storage, there, item, self._slots, self._stopped)
            self._target.storage.put(here, source, size_bytes=size, progress=self._meter.advance)
            source.prove()
            with self._mutex:
                self.carried_bytes += size

    def _seal(self, announced: Checkpoint, manifest: Manifest) -> RollForward:
        index = replace(
            self._index,
            run_id=manifest.run_id,
            id=announced.id,
            seq=announced.seq,
            writer_epoch=announced.writer_epoch,
            announced_at=announced.announced_at,
            sealed_at=self._target.clock(),
            metrics=announced.metrics,
            tags=announced.tags,
            pinned=announced.pinned,
            policy=manifest.policy,
        )
        body = encode_index(index)
        key = keys.index_key(announced.step, announced.id)
        self._target.storage.put(key, Body(body), size_bytes=len(body))
        return summed(index, body)

    def _commit(self, announced: Checkpoint, sealed: RollForward) -> Manifest:
        store, epoch = self._target, self._claim.writer_epoch

        def change(current: Manifest, _: None) -> Manifest:
            committed = transitions.commit(current, announced.id, sealed, writer_epoch=epoch, at=store.clock())
            if committed is current:
                return current
            return transitions.note(
                committed, "copy", at=store.clock(), entry=announced, detail=f"from {self._source.url}"
            )

        return store.transact(change, prepare=lambda _: None)

    def _give_up(self, error: BaseException) -> None:
        store, epoch = self._target, self._claim.writer_epoch
        settled = {self._entry.id: Abandon(reason=f"the copy failed: {str(error) or type(error).__name__}"[:500])}

        def change(current: Manifest, _: None) -> Manifest:
            after = transitions.settle(current, settled, writer_epoch=epoch, at=store.clock())
            return transitions.close(after, self._claim.token, at=store.clock())

        store.transact(change, prepare=lambda _: None)
        sweep_run(store, dry_run=False)

    def _close(self) -> None:
        store = self._target
        store.transact(
            lambda m, _: transitions.close(m, self._claim.token, at=store.clock()),
            prepare=lambda _: None,
            keep_copy=True,
        )


class _BrokenOffError(CloudCkptError):
    """Ends an object because another one failed; that one's failure is told."""


class _StoredObject(NeverStopped):
    """A payload object on another store as a ``Source``: ranges of it are read as they are sent."""

    def __init__(
        self,
        storage: Storage,
        key: str,
        item: PayloadObject,
        slots: threading.BoundedSemaphore,
        stopped: threading.Event,
    ) -> None:
        self._storage = storage
        self._key = key
        self._item = item
        self._slots = slots
        self._stopped = stopped
        self._mutex = threading.Lock()
        self._sums: dict[int, tuple[int, int]] = {}

    @property
    def size_bytes(self) -> int:
        """See ``Source.size_bytes``."""
        return self._item.size_bytes

    @property
    def together_bytes(self) -> int:
        """See ``Source.together_bytes``."""
        return self._item.size_bytes

    @contextlib.contextmanager
    def hold(self, start: int, length: int) -> Iterator[Part]:
        """See ``Source.hold``: read from the other store."""
        if self._stopped.is_set():
            raise _BrokenOffError(f"{self._key} is not copied any further: another object failed")
        if not length:
            yield Part((), 0)
            return
        with self._slots:
            body = memoryview(bytearray(length))
            try:
                self._storage.read_into(self._key, start, body)
            except ObjectNotFoundError as exc:
                raise CorruptCheckpointError(str(exc), key=self._key) from exc
            value = crc32c.crc32c(body)
            with self._mutex:
                self._sums[start] = (value, length)
            yield Part((body,), value)

    def __iter__(self) -> Iterator[memoryview]:
        """See ``Source.__iter__``."""
        with self._mutex:
            self._sums.clear()  # of ranges that were sent another way, which was given up
        for start in range(0, self.size_bytes, _SLICE_BYTES):
            with self.hold(start, min(_SLICE_BYTES, self.size_bytes - start)) as part:
                yield from part.views

    def prove(self) -> None:
        """Compare what passed with what was sealed, once all of it was sent.

        Raises:
            CorruptCheckpointError: other bytes came from the source.
        """
        found, at = [], 0
        while at < self.size_bytes and at in self._sums:
            found.append(self._sums[at])
            at += self._sums[at][1]
        value = combine_all(found)
        if at != self.size_bytes or value != self._item.crc32c:
            raise CorruptCheckpointError(
                f"{self._storage.url}/{self._key}: checksum {format_crc32c(value)}, sealed as "
                f"{format_crc32c(self._item.crc32c)}: the source is damaged. Look at it: cloudckpt verify "
                f"{self._storage.url} --deep",
                key=self._key,
            )
