"""What the page knows of the runs: each look is one GET of a manifest, and one LIST for each upload in flight."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

from cloudckpt.core import keys
from cloudckpt.core.manifest_json import MANIFEST_LIMIT_BYTES, decode_manifest
from cloudckpt.core.model import Manifest
from cloudckpt.errors import CheckpointNotFoundError, CloudCkptError, FormatError, ObjectNotFoundError, StorageError
from cloudckpt.listing import RunSummary, arrived_bytes, find_runs
from cloudckpt.storage import ManifestStore
from cloudckpt.view import RunView

__all__ = ["Place", "SeenRun", "WatchedRun"]


class SeenRun(RunView):
    """A run as it was at one look: every question is answered from that manifest, and asks the store nothing.

    Attributes:
        seen: the manifest.
        arrived: by save id, how many bytes of an upload in flight were in place.
    """

    def __init__(self, store: ManifestStore, seen: Manifest, arrived: Mapping[str, int]) -> None:
        super().__init__(store)
        self.seen = seen
        self.arrived = arrived

    def manifest(self) -> Manifest:
        """The manifest of the look."""
        return self.seen

    def _manifest_or_none(self) -> Manifest | None:
        return self.seen


class WatchedRun:
    """One run that the page looks at again and again. Several requests at once queue here.

    A manifest whose version (on S3 its ETag) has not changed is not decoded again, and a look that finds all as it was
    gives the same ``SeenRun``.
    """

    def __init__(self, store: ManifestStore) -> None:
        self.store = store
        self._mutex = threading.Lock()
        self._last: SeenRun | None = None
        self._version = ""

    @property
    def url(self) -> str:
        """The run's URL."""
        return self.store.storage.url

    def look(self) -> SeenRun:
        """The run as it is now.

        Raises:
            CheckpointNotFoundError: nothing was ever saved here.
            FormatError: the root holds something else, or a manifest that cannot be read.
            StorageError: the store refused.
        """
        with self._mutex:
            return self._look()

    def seen(self) -> SeenRun:
        """The run as it was at the last look, without a request; the first look, if there was none."""
        # Not behind the mutex: a preview must not wait for a store that is being asked.
        if (last := self._last) is not None:
            return last
        with self._mutex:
            return self._last or self._look()

    def _look(self) -> SeenRun:
        manifest, version = self._manifest()
        arrived = self._arrived(manifest)
        if self._last is None or manifest is not self._last.seen or arrived != self._last.arrived:
            self._last = SeenRun(self.store, manifest, arrived)
        # With the look that it is the version of, and never before: a look that failed half-way must be had again.
        self._version = version
        return self._last

    def _manifest(self) -> tuple[Manifest, str]:
        try:
            found = self.store.storage.read(keys.MANIFEST, limit_bytes=MANIFEST_LIMIT_BYTES)
            if self._last is not None and found.version == self._version:
                return self._last.seen, found.version
            return decode_manifest(found.body, what=f"{self.url}/{keys.MANIFEST}"), found.version
        except (ObjectNotFoundError, FormatError):
            # What lies there instead, and what to do about it, is told by whoever opens a run for everybody else.
            return RunView(self.store).manifest(), ""

    def _arrived(self, manifest: Manifest) -> Mapping[str, int]:
        try:
            return arrived_bytes(self.store, manifest.entries)
        except StorageError:
            return {}  # without the right to list, an upload has no percentage


class Place:
    """The root that the page was opened for: a run, or a prefix with runs below it.

    Args:
        root: as the user wrote it; a URL in canonical form has lost what is secret in it.
        open_store: gives the store of a root.
    """

    def __init__(self, root: str, open_store: Callable[[str], ManifestStore]) -> None:
        self._root = root.rstrip("/")
        self._open = open_store
        self._here = WatchedRun(open_store(root))
        self._names: frozenset[str] = frozenset()
        self._below: dict[str, WatchedRun] = {}
        self._mutex = threading.Lock()

    @property
    def url(self) -> str:
        """The root's URL."""
        return self._here.url

    def run(self, name: str = "") -> WatchedRun:
        """The run of this name below the root; the root itself without a name.

        Raises:
            CheckpointNotFoundError: the last listing did not have it. A name from outside is never made a path.
        """
        if not name:
            return self._here
        with self._mutex:
            if name not in self._names:
                raise CheckpointNotFoundError(f"there is no run {name!r} below {self.url}: list the runs again")
            if name not in self._below:
                self._below[name] = WatchedRun(self._open(f"{self._root}/{name}"))
            return self._below[name]

    def runs(self) -> tuple[RunSummary, ...]:
        """The runs below the root, by name; none if it is a run itself, below which nothing is listed.

        Raises:
            StorageError: the store refused.
        """
        try:
            self._here.look()
        except (CheckpointNotFoundError, FormatError) as why:
            found = self._runs_below(why)
        else:
            found = ()
        with self._mutex:
            self._names = frozenset(run.name for run in found)
        return found

    def _runs_below(self, why: CloudCkptError) -> tuple[RunSummary, ...]:
        try:
            return find_runs(self._here.store.storage)
        except StorageError as exc:
            # Both: who opened one run has to hear what is wrong with it, though nobody may list what is beside it.
            raise StorageError(f"{why}\nWhat lies below it cannot be listed: {exc}", retryable=exc.retryable) from exc
