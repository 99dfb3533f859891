"""A storage whose every write and delete is held against the invariants at the moment it happens.

A look at the store afterwards misses what was wrong only for a while: bytes that were there before any manifest named
them, a delete that was one write too early. ``Watch`` sees each request before it is carried out.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator

from cloudckpt.core import keys
from cloudckpt.core.manifest_json import MANIFEST_LIMIT_BYTES, decode_manifest
from cloudckpt.core.model import Manifest
from cloudckpt.errors import ObjectNotFoundError, StorageError
from cloudckpt.storage.base import Buffer, Conditions, Landed, Listed, Outcome, Storage, Versioned
from cloudckpt.testing.invariants import delete_violations, put_violations, step_violations

__all__ = ["Watch", "WatchedStorage"]

_ANY_SIZE = 2**62


class Watch:
    """One run under observation. Everybody gets a ``view`` of its own; what they do is seen in one place.

    Args:
        inner: where the run lies. It must carry out a request before it answers.

    Attributes:
        violations: what was wrong, oldest first, each with its invariant's number.
        named: the ids of all saves that any manifest has named.
        committed: the ids of all saves that any manifest has called committed.
        doubted: the ids of saves whose commit ended with an unknown outcome; whoever sees that adds them.
    """

    def __init__(self, inner: Storage) -> None:
        self.inner = inner
        self.violations: list[str] = []
        self.named: set[str] = set()
        self.committed: set[str] = set()
        self.doubted: set[str] = set()
        self._mutex = threading.RLock()
        self._note(self.manifest())

    def view(self, *, by_hand: bool = False) -> WatchedStorage:
        """The run as somebody sees it; ``by_hand`` for a person or an evaluator."""
        return WatchedStorage(self, by_hand=by_hand)

    def manifest(self) -> Manifest | None:
        """The manifest as it is now."""
        try:
            body = self.inner.read(keys.MANIFEST, limit_bytes=MANIFEST_LIMIT_BYTES).body
        except ObjectNotFoundError:
            return None
        return decode_manifest(body)

    def _note(self, manifest: Manifest | None) -> None:
        for entry in manifest.entries if manifest is not None else ():
            self.named.add(entry.id)
            if entry.committed_at is not None:
                self.committed.add(entry.id)

    # -- what the views do -----------------------------------------------------------------------------------

    def write(self, key: str, body: bytes, act: Callable[[], Outcome], *, by_hand: bool) -> Outcome:
        """Carry out a conditional write, and look at the step if it landed."""
        with self._mutex:
            before = self.manifest() if key == keys.MANIFEST else None
            outcome = act()
            if not isinstance(outcome, Landed):
                return outcome
            if key == keys.MANIFEST:
                after = decode_manifest(body)
                self.violations += step_violations(before, after, by_hand=by_hand)
                self._note(after)
            else:
                self.violations += put_violations(key, overwrites=False, named=self.named)
            return outcome

    def put(self, key: str, buffers: Iterable[Buffer], size_bytes: int, progress: Callable[[int], None] | None) -> None:
        """Carry out a put, and look at it before it becomes visible."""
        # A source may wait for its bytes, and be told to stop, while it is read: not under the lock.
        body = b"".join(bytes(buffer) for buffer in buffers)
        with self._mutex:
            overwrites = self._body(key) not in {None, body}
            self.violations += put_violations(key, overwrites=overwrites, named=self.named)
            self.inner.put(key, [body], size_bytes=size_bytes, progress=progress)

    def _body(self, key: str) -> bytes | None:
        try:
            return self.inner.read(key, limit_bytes=_ANY_SIZE).body
        except ObjectNotFoundError:
            return None

    def delete(self, going: list[str]) -> dict[str, StorageError]:
        """Carry out a delete, and look at each key before it goes."""
        with self._mutex:
            manifest = self.manifest()
            for key in going:
                if self._body(key) is not None:
                    self.violations += delete_violations(key, manifest, doubted=self.doubted)
            return self.inner.delete(going)


class WatchedStorage:
    """One participant's view of a watched run. See ``Storage`` for the verbs."""

    def __init__(self, watch: Watch, *, by_hand: bool) -> None:
        self._watch = watch
        self._by_hand = by_hand

    @property
    def conditions(self) -> Conditions:
        """See ``Storage.conditions``."""
        return self._watch.inner.conditions

    @conditions.setter
    def conditions(self, found: Conditions) -> None:
        self._watch.inner.conditions = found

    @property
    def url(self) -> str:
        """See ``Storage.url``."""
        return self._watch.inner.url

    def read(self, key: str, *, limit_bytes: int) -> Versioned:
        """See ``Storage.read``."""
        return self._watch.inner.read(key, limit_bytes=limit_bytes)

    def create(self, key: str, body: bytes) -> Outcome:
        """See ``Storage.create``."""
        inner = self._watch.inner
        return self._watch.write(key, body, lambda: inner.create(key, body), by_hand=self._by_hand)

    def replace(self, key: str, body: bytes, *, expecting: str) -> Outcome:
        """See ``Storage.replace``."""
        inner = self._watch.inner
        return self._watch.write(
            key, body, lambda: inner.replace(key, body, expecting=expecting), by_hand=self._by_hand
        )

    def put(
        self, key: str, buffers: Iterable[Buffer], *, size_bytes: int, progress: Callable[[int], None] | None = None
    ) -> None:
        """See ``Storage.put``."""
        self._watch.put(key, buffers, size_bytes, progress)

    def read_into(self, key: str, start: int, *targets: memoryview) -> None:
        """See ``Storage.read_into``."""
        self._watch.inner.read_into(key, start, *targets)

    def size(self, key: str) -> int:
        """See ``Storage.size``."""
        return self._watch.inner.size(key)

    def list(self, prefix: str = "", *, limit: int | None = None) -> Iterator[Listed]:
        """See ``Storage.list``."""
        return self._watch.inner.list(prefix, limit=limit)

    def delete(self, keys: Iterable[str]) -> dict[str, StorageError]:
        """See ``Storage.delete``."""
        return self._watch.delete([*keys])

    def abort_uploads(self, prefix: str, *, spare: Callable[[str], bool] = lambda _: False) -> int:
        """See ``Storage.abort_uploads``."""
        return self._watch.inner.abort_uploads(prefix, spare=spare)

    def close(self) -> None:
        """See ``Storage.close``; the run under observation stays open."""
