"""Objects in a dictionary: for tests, notebooks and the crash suite. One process only."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator

from cloudckpt.errors import ObjectNotFoundError, StorageError
from cloudckpt.storage.base import Buffer, Conditions, Landed, Listed, Lost, Outcome, Versioned, scatter

__all__ = ["MemoryStorage"]


class MemoryStorage:
    """A storage whose objects live as long as the instance, or as the process for ``named`` ones."""

    _named: dict[str, MemoryStorage] = {}  # noqa: RUF012 - the registry is what makes memory:// URLs mean one thing
    _naming = threading.Lock()

    def __init__(self, url: str = "memory://") -> None:
        self.conditions = Conditions.HONOURED
        self._url = url
        self._lock = threading.Lock()
        self._objects: dict[str, bytes] = {}
        self._versions: dict[str, str] = {}
        self._writes = 0

    @classmethod
    def named(cls, url: str) -> MemoryStorage:
        """The storage every ``memory://`` URL of this spelling means in this process."""
        with cls._naming:
            return cls._named.setdefault(url, cls(url))

    @classmethod
    def forget(cls, url: str) -> None:
        """Let go of a ``named`` storage and everything in it."""
        with cls._naming:
            cls._named.pop(url, None)

    @property
    def url(self) -> str:
        """See ``Storage.url``."""
        return self._url

    def _found(self, key: str) -> bytes:
        body = self._objects.get(key)
        if body is None:
            raise ObjectNotFoundError(f"{self._url}/{key} does not exist")
        return body

    def _store(self, key: str, body: bytes) -> str:
        self._writes += 1
        self._objects[key] = body
        self._versions[key] = str(self._writes)
        return self._versions[key]

    def read(self, key: str, *, limit_bytes: int) -> Versioned:
        """See ``Storage.read``."""
        with self._lock:
            body = self._found(key)
            if len(body) > limit_bytes:
                raise StorageError(f"{self._url}/{key} has {len(body)} bytes, more than the {limit_bytes} expected")
            return Versioned(body, self._versions[key])

    def create(self, key: str, body: bytes) -> Outcome:
        """See ``Storage.create``."""
        with self._lock:
            if key in self._objects:
                return Lost(f"{key} exists")
            return Landed(self._store(key, bytes(body)))

    def replace(self, key: str, body: bytes, *, expecting: str) -> Outcome:
        """See ``Storage.replace``."""
        with self._lock:
            if self._versions.get(key) != expecting:
                return Lost(f"{key} is at version {self._versions.get(key)}")
            return Landed(self._store(key, bytes(body)))

    def put(
        self, key: str, buffers: Iterable[Buffer], *, size_bytes: int, progress: Callable[[int], None] | None = None
    ) -> None:
        """See ``Storage.put``."""
        body = bytearray()
        for buffer in buffers:
            body += buffer
            if progress is not None:
                progress(memoryview(buffer).nbytes)
        if len(body) != size_bytes:
            raise StorageError(f"{self._url}/{key}: {len(body)} bytes came, {size_bytes} were announced")
        with self._lock:
            self._store(key, bytes(body))

    def read_into(self, key: str, start: int, *targets: memoryview) -> None:
        """See ``Storage.read_into``."""
        with self._lock:
            body = self._found(key)
        end = start + sum(map(len, targets))
        if end > len(body):
            raise ObjectNotFoundError(f"{self._url}/{key} has {len(body)} bytes; bytes {start}..{end} do not exist")
        scatter(memoryview(body)[start:end], targets)

    def size(self, key: str) -> int:
        """See ``Storage.size``."""
        with self._lock:
            return len(self._found(key))

    def list(self, prefix: str = "", *, limit: int | None = None) -> Iterator[Listed]:
        """See ``Storage.list``."""
        with self._lock:
            found = [Listed(key, len(body)) for key, body in sorted(self._objects.items()) if key.startswith(prefix)]
        return iter(found[:limit])

    def delete(self, keys: Iterable[str]) -> dict[str, StorageError]:
        """See ``Storage.delete``."""
        going = [*keys]  # the caller's iterator may ask this storage something
        with self._lock:
            for key in going:
                self._objects.pop(key, None)
                self._versions.pop(key, None)
        return {}

    def abort_uploads(
        self,
        prefix: str,  # noqa: ARG002 - the verb's shape
        *,
        spare: Callable[[str], bool] = lambda _: False,  # noqa: ARG002 - the same
    ) -> int:
        """See ``Storage.abort_uploads``."""
        return 0

    def close(self) -> None:
        """See ``Storage.close``."""
