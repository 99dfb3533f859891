"""``transact``: the only thing that writes the manifest.

A conditional write has three outcomes: landed, lost, unknown. Anything but a plain success means: read again.
Our write id is current or in the history: it landed. The version is unchanged: the same bytes are sent again
with the same condition, so at most one copy can win. The version changed without us: lost for good; the
decision is made again from what is there now. The deadline is over: ``CommitUnknownError``, and nothing is
ever deleted on the doubt (I11).

(Past 350 lines: the loop, and every sentence that says why it refuses, belong together.)
"""

from __future__ import annotations

import contextlib
import functools
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TypeGuard, TypeVar

from cloudckpt.config import Settings, settings_of
from cloudckpt.core import keys
from cloudckpt.core.garbage import COPIES_KEPT
from cloudckpt.core.manifest import stamped
from cloudckpt.core.manifest_json import MANIFEST_LIMIT_BYTES, decode_manifest, encode_manifest
from cloudckpt.core.model import HISTORY_LENGTH, Manifest
from cloudckpt.core.wire import LARGEST_INTEGER
from cloudckpt.errors import (
    CloudCkptError,
    CommitUnknownError,
    ConflictError,
    FormatError,
    ObjectNotFoundError,
    StorageError,
)
from cloudckpt.storage.base import Connecting, Landed, Outcome, Storage, Unknown, Versioned
from cloudckpt.storage.conditions import ConditionalWrites, conditional_writes
from cloudckpt.storage.retry import Backoff, RetryingStorage

__all__ = ["Held", "ManifestStore", "utc_now"]

_Facts = TypeVar("_Facts")


def utc_now() -> str:
    """The wall clock as a label for people: UTC, ISO 8601, milliseconds."""
    now = datetime.now(UTC)  # noqa: TID251 - this is the one clock
    return now.isoformat(timespec="milliseconds").replace("+00:00", "Z")


@dataclass(frozen=True, slots=True)
class Held:
    """A manifest and the version of exactly these bytes; no version means that none exists yet."""

    manifest: Manifest
    version: str | None


def _read(storage: Storage, url: str) -> Held:
    found = storage.read(keys.MANIFEST, limit_bytes=MANIFEST_LIMIT_BYTES)
    try:
        return Held(decode_manifest(found.body, what=url), found.version)
    except FormatError:
        # A bit may have turned on the way: only what a second look finds as well is the store's own.
        again = storage.read(keys.MANIFEST, limit_bytes=MANIFEST_LIMIT_BYTES)
        if again.body == found.body:
            raise
        return Held(decode_manifest(again.body, what=url), again.version)


def _means_nothing(key: str) -> bool:
    """Whether a key says nothing about a run: what a probe, a lock or a write under the lock left behind."""
    parsed = keys.parse(key)
    return parsed.kind in {keys.Kind.LOCK, keys.Kind.PROBE} or (
        parsed.kind is keys.Kind.TEMPORARY and parsed.id is None
    )


def _is_ours(key: str) -> bool:
    return keys.parse(key).kind is not keys.Kind.FOREIGN and not _means_nothing(key)


def _is_refusal(outcome: Outcome) -> TypeGuard[Unknown]:
    return isinstance(outcome, Unknown) and isinstance(outcome.cause, StorageError) and not outcome.cause.retryable


class ManifestStore:
    """The manifest of one run, and the storage it lies on.

    Args:
        storage: where the run lies; wrapped so that reads, lists and deletes are tried again.
        settings: deadlines and pauses.
        single_writer: the user's promise that no two processes ever write, for stores without conditions.
        tell: is given a sentence when that promise is all there is.
        clock: gives the time labels.
        token: gives that many random hex digits.
    """

    def __init__(
        self,
        storage: Storage,
        settings: Settings | None = None,
        *,
        single_writer: bool = False,
        tell: Callable[[str], None] = lambda _: None,
        clock: Callable[[], str] = utc_now,
        token: Callable[[int], str] = lambda digits: secrets.token_hex(digits // 2),
    ) -> None:
        self.settings = settings_of(settings)
        self.storage: Storage = RetryingStorage(storage, self._backoff(self.settings.storage_deadline_s))
        # transact tries again by itself, under its own one deadline.
        self._once = storage
        self._single_writer = single_writer
        self._tell = tell
        self._told: set[str] = set()
        self._writes: ConditionalWrites | None = None
        self.clock = clock
        self.token = token
        #: Whether a manifest that went back in time stops this process. A writer sets it with its claim;
        #: readers and editors take the run as they find it.
        self.refuse_rollback = False
        #: Until when a write's outcome is asked for, by ``time.monotonic``, where the settings allow longer: a process
        #: that is about to be ended has no two minutes.
        self.hurry_until: float | None = None
        self._base: Held | None = None
        # A background save and a pin from the training thread share one base.
        self._mutex = threading.RLock()

    def _backoff(self, deadline_s: float) -> Backoff:
        return Backoff(deadline_s=deadline_s, base_s=self.settings.retry_base_s, cap_s=self.settings.retry_cap_s)

    @property
    def _patience_s(self) -> float:
        most_s = self.settings.manifest_deadline_s
        return most_s if self.hurry_until is None else min(most_s, max(0.0, self.hurry_until - time.monotonic()))

    @property
    def unretried(self) -> Storage:
        """The storage without retries around it: for housekeeping that is tried again later anyway."""
        return self._once

    @functools.cached_property
    def owner_token(self) -> str:
        """Names whoever writes through this store; the same for every try, so that a late claim is recognised."""
        return self.token(16)

    @property
    def single_writer(self) -> bool:
        """Whether the user has promised that no two processes ever write."""
        return self._single_writer

    def is_news(self, text: str) -> bool:
        """Whether whoever uses this store was not told so before; from now on, he was."""
        was_told = text in self._told
        self._told.add(text)
        return not was_told

    @property
    def last_seen(self) -> Manifest | None:
        """The manifest this process last read or wrote, without a request."""
        return self._base.manifest if self._base else None

    def connect(self) -> None:
        """Begin to make what the first request would wait for, where the storage has such things. Returns at once."""
        if isinstance(self._once, Connecting):
            self._once.connect(keys.MANIFEST, limit_bytes=MANIFEST_LIMIT_BYTES)

    def read(self) -> Manifest | None:
        """The manifest as it is now; None if the root is empty.

        Raises:
            FormatError: there is something, but no readable manifest; says what to do.
            ConflictError: the run went back in time, or became another run, since this process last looked.
            StorageError: the store refused; a 403 is never taken for a new run.
        """
        with self._mutex:
            held = self._fetch(self.storage)
            if held is not None:
                self._base = held
                return held.manifest
            if self.refuse_rollback:
                raise ConflictError(
                    f"{self.storage.url}/{keys.MANIFEST} was there and is gone: somebody deleted it. Stop every "
                    f"writer and run: cloudckpt repair {self.storage.url}"
                )
            try:
                self._refuse_leftovers()
            except FormatError:
                # Another process may have made the run between our look at the manifest and our listing.
                held = self._fetch(self.storage)
                if held is None:
                    raise
                self._base = held
                return held.manifest
            return None

    def drop_base(self) -> None:
        """Read the manifest again before the next change."""
        with self._mutex:
            self._base = None

    def _fetch(self, storage: Storage) -> Held | None:
        url = f"{self.storage.url}/{keys.MANIFEST}"
        try:
            held = _read(storage, url)
        except ObjectNotFoundError:
            return None
        except FormatError as exc:
            if "upgrade cloudckpt" in str(exc):
                raise
            raise FormatError(
                f"{exc}\nNo checkpoint was touched. To rebuild the manifest from its copies and the indexes, run: "
                f"cloudckpt repair {self.storage.url}"
            ) from exc
        self._check_not_rolled_back(held.manifest)
        return held

    def _check_not_rolled_back(self, found: Manifest) -> None:
        seen = self.last_seen
        if seen is None or seen.revision == 0 or not self.refuse_rollback:
            return
        if found.run_id != seen.run_id:
            raise ConflictError(
                f"{self.storage.url} was run {seen.run_id} and is now run {found.run_id}: it was repaired or "
                "replaced while this process was writing. Stop this process and start again"
            )
        if found.revision < seen.revision:
            raise ConflictError(
                f"{self.storage.url}/{keys.MANIFEST} was at revision {seen.revision} and is now at "
                f"{found.revision}: an older one was put back. Stop every writer and run: cloudckpt repair "
                f"{self.storage.url}"
            )
        if found.revision < seen.revision + HISTORY_LENGTH and seen.write_id not in found.history:
            raise ConflictError(
                f"{self.storage.url}/{keys.MANIFEST} is at revision {found.revision} and knows nothing of revision "
                f"{seen.revision} that this process saw: an older one was put back and written upon. Stop every "
                f"writer and run: cloudckpt repair {self.storage.url}"
            )

    def _refuse_leftovers(self) -> None:
        # The only LIST of an open, and only when there is no manifest. A probe or a swap file is nothing to refuse
        # for, but however many there are, what sorts after them must not be overlooked.
        found = next((item.key for item in self.storage.list("", limit=1)), None)
        if found is not None and _means_nothing(found):
            found = next((item.key for item in self.storage.list("") if not _means_nothing(item.key)), None)
        if found is None:
            return
        if not _is_ours(found):
            # Foreign files may lie beside a run of ours: the advice depends on it.
            ours = (item.key for start in ("checkpoint-", "manifest-") for item in self.storage.list(start))
            found, foreign = next(filter(_is_ours, ours), None), found
            if found is None:
                raise FormatError(
                    f"{self.storage.url} is not empty and holds no run of ours (there is {foreign!r}): choose an "
                    "empty or new root, for example a subfolder. Nothing was changed"
                )
        raise FormatError(
            f"{self.storage.url} holds checkpoints ({found!r}) but no {keys.MANIFEST}: it was deleted. Nothing "
            f"was changed. To rebuild it, run: cloudckpt repair {self.storage.url}"
        )

    def transact(  # noqa: C901, PLR0912 - the one loop of the protocol, read from top to bottom
        self,
        change: Callable[[Manifest, _Facts], Manifest],
        *,
        prepare: Callable[[Manifest], _Facts],
        new: Callable[[], Manifest] | None = None,
        keep_copy: bool = False,
    ) -> Manifest:
        """Apply ``change`` to the manifest, whoever else is writing.

        Starts from the last manifest this process read or wrote: in the steady state there is no GET.

        Args:
            change: pure and idempotent by id; gives back the same object when there is nothing to do.
            prepare: does the I/O that the decision needs, for one certain manifest.
            new: the manifest of a run that does not exist yet; without it a missing run is an error.
            keep_copy: also keep an immutable copy of the revision written, for ``repair``.

        Returns:
            the manifest after the change.

        Raises:
            CommitUnknownError: the store never told the outcome before ``settings.manifest_deadline_s``.
            StorageError: the store said no for good, and the manifest is as it was.
            ConflictError: raised by ``change``; or the manifest was rolled back or replaced.
            FormatError: the manifest needs features this version does not know, or cannot be read.
        """
        with self._mutex:
            remembered = self._base is not None
            base = self._base or self._start(new)
            proposal: Manifest | None = None
            outcome: Outcome | None = None
            doubt: Exception | None = None
            patience_s = self._patience_s
            for _ in self._backoff(patience_s).tries():
                if proposal is not None and outcome is not None:
                    # Looked at after the pause, not before it: what is decided next must be fresh when it is
                    # written, or a writer that never rests would win every time.
                    try:
                        current = self._look_again(base)
                    except StorageError as exc:
                        doubt = exc
                        continue
                    if proposal.write_id in current.manifest.history:
                        # It was ours: the answer had been lost.
                        return self._landed(current, proposal, base.manifest)
                    if current.version != base.version:
                        self._base = base = current
                        proposal, outcome, doubt, remembered = None, None, None, False
                    elif doubt is None and _is_refusal(outcome):
                        # A plain no to the only request sent, and nothing landed: there is nothing to be in doubt
                        # about, and two minutes of asking again would not help.
                        raise outcome.cause
                if proposal is None:
                    changed, base = self._decided(base, change, prepare, remembered=remembered)
                    if changed is base.manifest:
                        return changed
                    proposal = self._stamped(changed, base.manifest, keep_copy=keep_copy)
                if outcome is not None and isinstance(outcome, Unknown):
                    doubt = outcome.cause
                outcome = self._write(self._encoded(proposal), base.version)
                if isinstance(outcome, Landed):
                    return self._landed(Held(proposal, outcome.version), proposal, base.manifest)
            if isinstance(outcome, Unknown):
                doubt = doubt or outcome.cause
            elif proposal is not None and outcome is not None and doubt is None:
                # The last answer was a plain no; it can still be our own write, seen twice.
                current = self._look_again(base)
                if proposal.write_id in current.manifest.history:
                    return self._landed(current, proposal, base.manifest)
            if proposal is None or doubt is None:
                raise ConflictError(
                    f"gave up on {self.storage.url}/{keys.MANIFEST} after "
                    f"{round(patience_s, 1):g} s: other writers kept winning"
                )
            raise CommitUnknownError(
                f"the store never told whether revision {proposal.revision} of {self.storage.url}/{keys.MANIFEST} "
                f"landed ({doubt}). Nothing was deleted; the next write finds out"
            ) from doubt

    def _encoded(self, proposal: Manifest) -> bytes:
        highest = max(proposal.revision, proposal.writer_epoch, proposal.next_seq, proposal.commits)
        if highest > LARGEST_INTEGER:
            raise FormatError(
                f"{self.storage.url}/{keys.MANIFEST} counts to {highest}: no run does, and no reader takes that. It "
                f"was edited by hand; nothing was written. Run: cloudckpt repair {self.storage.url}"
            )
        body = encode_manifest(proposal)
        if len(body) > MANIFEST_LIMIT_BYTES:
            raise FormatError(
                f"revision {proposal.revision} of {self.storage.url}/{keys.MANIFEST} would have {len(body)} bytes, and "
                f"readers take no more than {MANIFEST_LIMIT_BYTES}: give fewer or shorter metrics and tags, or keep "
                "fewer checkpoints. Nothing was written"
            )
        return body

    def _decided(
        self,
        base: Held,
        change: Callable[[Manifest, _Facts], Manifest],
        prepare: Callable[[Manifest], _Facts],
        *,
        remembered: bool,
    ) -> tuple[Manifest, Held]:
        """What ``change`` makes of the manifest, and of which one.

        A write made upon a remembered manifest that is out of date fails its condition. "Nothing to do" and a
        refusal send no write that could: they are decided again upon what is there now.
        """
        self.check_known(base.manifest)
        try:
            changed = change(base.manifest, prepare(base.manifest))
        except StorageError:
            raise
        except CloudCkptError:
            if not remembered:
                raise
            changed = base.manifest
        if changed is not base.manifest or not remembered:
            return changed, base
        held = self._fetch(self.storage)
        if held is None:
            raise self._gone()
        self._base = held
        return self._decided(held, change, prepare, remembered=False)

    def _gone(self) -> ConflictError:
        return ConflictError(
            f"{self.storage.url}/{keys.MANIFEST} is gone: somebody deleted it while this process was writing. Stop "
            f"every writer and run: cloudckpt repair {self.storage.url}"
        )

    def _write(self, body: bytes, version: str | None) -> Outcome:
        if self._writes is None:
            self._writes = conditional_writes(
                self._once, single_writer=self._single_writer, settings=self.settings, tell=self._tell
            )
        if version is None:
            return self._writes.create(keys.MANIFEST, body)
        return self._writes.replace(keys.MANIFEST, body, expecting=version)

    def _look_again(self, base: Held) -> Held:
        """What is there now; ``base`` itself while a run that is being made is not there yet."""
        current = self._fetch(self._once)
        if current is not None:
            return current
        if base.version is None:
            return base
        raise self._gone()

    def _start(self, new: Callable[[], Manifest] | None) -> Held:
        found = self.read()
        if found is not None and self._base is not None:
            return self._base
        if new is None:
            raise FormatError(f"{self.storage.url} holds no run yet: nothing was ever saved there")
        return Held(new(), None)

    def check_known(self, manifest: Manifest) -> None:
        """Refuse to write or delete in a run that needs what this version does not know.

        Raises:
            FormatError: names the features.
        """
        if manifest.requires:
            raise FormatError(
                f"{self.storage.url} needs {', '.join(manifest.requires)}, which this version does not know: it may "
                "read this run but will not write or delete anything in it. Upgrade cloudckpt"
            )

    def rebuild(self, manifest: Manifest, *, over: Versioned | None) -> Manifest:
        """Put a repaired manifest in place of what is there, or of nothing. Only ``repair`` calls this.

        What was there is kept under a key of its own. The new manifest has another run id, which fences everybody.

        Raises:
            ConflictError: somebody wrote a manifest meanwhile; nothing was changed.
            CommitUnknownError: the store never told.
        """
        with self._mutex:
            self._base = None
            write_id = self.token(16)
            stamp = replace(manifest, write_id=write_id, history=(write_id,), updated_at=self.clock())
            body = encode_manifest(stamp)
            # Whatever a repair found out there: what is put in place of it can be read.
            decode_manifest(body, what="the repaired manifest")
            if over is not None:
                self.storage.put(keys.replaced_manifest(self.token(8)), [over.body], size_bytes=len(over.body))
            doubt: Exception | None = None
            for _ in self._backoff(self.settings.manifest_deadline_s).tries():
                outcome = self._write(body, over.version if over else None)
                if isinstance(outcome, Landed):
                    self._base = Held(stamp, outcome.version)
                    return stamp
                doubt = outcome.cause if isinstance(outcome, Unknown) else doubt
                try:
                    found = self.storage.read(keys.MANIFEST, limit_bytes=MANIFEST_LIMIT_BYTES)
                except ObjectNotFoundError:
                    continue
                except StorageError as exc:
                    doubt = exc
                    continue
                if found.body == body:
                    self._base = Held(stamp, found.version)
                    return stamp
                if over is None or found.version != over.version:
                    raise ConflictError(
                        f"somebody else wrote {self.storage.url}/{keys.MANIFEST} during the repair: look at the run "
                        "again"
                    )
            raise CommitUnknownError(
                f"the store never told whether the repaired manifest of {self.storage.url} landed ({doubt}); run "
                "repair again"
            ) from doubt

    def _stamped(self, changed: Manifest, base: Manifest, *, keep_copy: bool) -> Manifest:
        proposal = stamped(changed, base=base, write_id=self.token(16), at=self.clock())
        due = keep_copy or proposal.revision % self.settings.copy_every_revisions == 0
        # A copy costs two requests, one of them a delete: a process that is about to be ended leaves it to the next.
        if due and self.hurry_until is None:
            # Named before it is written, like everything else here: a copy nobody named is never left over.
            return replace(proposal, copies=(*base.copies, proposal.revision)[-COPIES_KEPT:])
        return proposal

    def _landed(self, held: Held, written: Manifest, base: Manifest) -> Manifest:
        self._base = held
        if written.revision in written.copies:
            # A failure is harmless: copies only serve repair, and gc clears what is left of older ones.
            self.storage.create(keys.manifest_copy(written.revision), encode_manifest(written))
            if dropped := sorted(set(base.copies) - set(written.copies)):
                with contextlib.suppress(StorageError):
                    self.storage.delete([keys.manifest_copy(revision) for revision in dropped])
        return held.manifest
