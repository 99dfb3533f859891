"""Objects as files under a folder, durable and atomic across processes.

How one file becomes durable is told in ``local_write``, how payload gets to the disk and back in ``local_lane``.
Conditions are checked under a lock file in the root; everybody who writes a manifest takes it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import filelock

from cloudckpt.core import keys as grammar
from cloudckpt.errors import ObjectNotFoundError, StorageError
from cloudckpt.storage.base import Buffer, Conditions, Landed, Listed, Lost, Outcome, Unknown, Versioned
from cloudckpt.storage.local_calls import read_at
from cloudckpt.storage.local_errors import GONE, explained, mapped, reading
from cloudckpt.storage.local_write import make_folder, write_durably

__all__ = ["LocalStorage"]

#: How long to wait for another process that holds the lock; it holds it for one small durable write.
_LOCK_TIMEOUT_S = 60.0
_LOCK_POLL_S = 0.002


class LocalStorage:
    """A storage in one folder of a local or network file system.

    Args:
        root: the folder; the first write makes it.
        direct_io: write payload past the page cache (``O_DIRECT``) where file system and memory allow.
    """

    def __init__(self, root: str | os.PathLike[str], *, direct_io: bool = True) -> None:
        self._direct_io = direct_io
        self.conditions = Conditions.HONOURED  # by the lock
        self._root = Path(os.path.abspath(os.path.expanduser(root)))  # noqa: PTH100, PTH111 - resolve() would follow links
        # Threads of this process queue here; polling the file would let them starve one another.
        self._threads = threading.Lock()
        self._lock = self._new_lock()
        self._pid = os.getpid()

    @property
    def url(self) -> str:
        """The folder's absolute path."""
        return str(self._root)

    def _new_lock(self) -> filelock.BaseFileLock:
        return filelock.FileLock(self._root / grammar.LOCK, timeout=_LOCK_TIMEOUT_S)

    @property
    def exists(self) -> bool:
        """Whether the folder is there already; the first write makes it."""
        return self._root.is_dir()

    def check_writable(self) -> None:
        """Fail early, without writing anything, where the folder could never be written.

        Raises:
            StorageError: the folder, or the nearest existing one above it, cannot be written.
        """
        # os.path.exists, unlike Path.exists, takes what this user may not even look at as not there.
        places = (self._root, *self._root.parents)
        place = next((p for p in places if os.path.exists(p)), self._root)  # noqa: PTH110 - see above
        if not place.is_dir():
            raise StorageError(f"{place} is a file; the root of a run must be a folder")
        if not os.access(place, os.W_OK | os.X_OK):
            raise StorageError(f"{place}: permission denied: {self._root} cannot be written by this user")

    def _path(self, key: str) -> Path:
        if not {"", ".", ".."}.isdisjoint(key.split("/")) or "\0" in key:
            raise StorageError(f"{key!r} is not a key under {self._root}")
        return self._root / key

    def read(self, key: str, *, limit_bytes: int) -> Versioned:
        """See ``Storage.read``; the version is the content's SHA-256, since every manifest differs."""
        path = self._path(key)
        with reading(path), open(path, "rb", opener=_open_regular) as file:
            size = os.fstat(file.fileno()).st_size
            if size > limit_bytes:
                raise StorageError(f"{path} has {size} bytes, more than the {limit_bytes} expected")
            body = file.read(size)  # no more, whatever becomes of the file meanwhile
        return Versioned(body, _version(body))

    def create(self, key: str, body: bytes) -> Outcome:
        """See ``Storage.create``."""
        return self._conditional(key, body, expecting=None)

    def replace(self, key: str, body: bytes, *, expecting: str) -> Outcome:
        """See ``Storage.replace``."""
        return self._conditional(key, body, expecting=expecting)

    def _conditional(self, key: str, body: bytes, *, expecting: str | None) -> Outcome:
        path = self._path(key)
        try:
            if expecting is not None and not self._root.exists():
                return Lost(f"{self._root} does not exist")  # and is not made again to hold a lock file
            make_folder(self._root)
            with self._threads, self._locked():
                found = _version_at(path)
                if found != expecting:
                    return Lost(f"{path} is at version {found}")
                # Under the lock there is one writer, so one name serves all and a crash leaves at most one.
                write_durably(self._path(grammar.SWAP), [body], path)
        except filelock.Timeout as exc:
            late = f"{path}: another process held the lock for {_LOCK_TIMEOUT_S:g} s: {exc}"
            return Unknown(StorageError(late, retryable=True))
        except StorageError as exc:
            return Unknown(exc)
        except OSError as exc:
            # The rename may have happened before the folder's fsync failed: nobody knows.
            return Unknown(explained(exc, path))
        return Landed(_version(body))

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        # Made here, not by filelock, so that it gets the mode of the user's umask and colleagues can lock too.
        if self._pid != os.getpid():
            # A forked child must not share its parent's lock, nor a mutex that another thread may have held.
            self._lock, self._pid = self._new_lock(), os.getpid()
        os.close(os.open(self._lock.lock_file, os.O_RDWR | os.O_CREAT, 0o666))
        with self._lock.acquire(poll_interval=_LOCK_POLL_S):
            yield

    def put(
        self, key: str, buffers: Iterable[Buffer], *, size_bytes: int, progress: Callable[[int], None] | None = None
    ) -> None:
        """See ``Storage.put``."""
        path = self._path(key)
        temporary = self._path(grammar.temporary_key(key))
        write_durably(
            temporary, buffers, path, size_bytes=size_bytes, progress=progress or _ignore, direct_io=self._direct_io
        )

    def read_into(self, key: str, start: int, *targets: memoryview) -> None:
        """See ``Storage.read_into``."""
        path = self._path(key)
        end = start + sum(target.nbytes for target in targets)
        with reading(path), open(path, "rb", buffering=0, opener=_open_regular) as file:
            size = os.fstat(file.fileno()).st_size
            if size >= end:
                # Cut short since its size was asked, it has what came.
                size = start + read_at(file.fileno(), start, targets)
            if size < end:
                raise ObjectNotFoundError(f"{path} has {size} bytes; bytes {start}..{end} do not exist")

    def size(self, key: str) -> int:
        """See ``Storage.size``."""
        path = self._path(key)
        with reading(path):
            found = path.stat()
            if stat.S_ISDIR(found.st_mode):
                raise IsADirectoryError(errno.EISDIR, "a folder", str(path))
            return found.st_size

    def list(self, prefix: str = "", *, limit: int | None = None) -> Iterator[Listed]:
        """See ``Storage.list``. The lock file is not an object."""
        folder, _, _ = prefix.rpartition("/")
        given = 0
        for path in self._files(self._path(folder) if folder else self._root, prefix):
            key = path.relative_to(self._root).as_posix()
            if not key.startswith(prefix) or key == grammar.LOCK:
                continue
            if limit is not None and given >= limit:
                return
            try:
                with reading(path):
                    size = path.lstat().st_size
            except ObjectNotFoundError:
                continue  # deleted since the folder was read
            given += 1
            yield Listed(key, size)

    def _files(self, folder: Path, prefix: str) -> Iterator[Path]:
        try:
            with mapped(folder), os.scandir(folder) as found:
                entries = sorted((entry.name, entry.is_dir(follow_symlinks=False)) for entry in found)
        except StorageError as exc:
            gone = isinstance(exc.__cause__, OSError) and exc.__cause__.errno in GONE
            # A root that is a file or a link to nowhere is no empty run; one that is a folder now was made since. A
            # folder below it can vanish, or be a file's name.
            if gone and not (folder == self._root and os.path.lexists(folder) and not folder.is_dir()):
                return
            raise
        for name, is_folder in entries:
            path = folder / name
            if not is_folder:
                yield path
            elif _may_hold(path.relative_to(self._root).as_posix() + "/", prefix):
                yield from self._files(path, prefix)

    def delete(self, keys: Iterable[str]) -> dict[str, StorageError]:
        """See ``Storage.delete``; folders left empty go as well."""
        failed: dict[str, StorageError] = {}
        folders: set[Path] = set()
        for key in keys:
            try:
                path = self._path(key)
                path.unlink()
            except StorageError as exc:
                failed[key] = exc
                continue
            except OSError as exc:
                if exc.errno not in GONE:
                    failed[key] = explained(exc, path)
                    continue
            folders.add(path.parent)
        for folder in folders - {self._root}:
            # Not empty, or already gone: either way there is nothing of ours to remove.
            with contextlib.suppress(OSError):
                folder.rmdir()
        return failed

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


def _open_regular(path: str, flags: int) -> int:
    # A pipe of this name would wait for whoever writes into it, and a device never ends.
    descriptor = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):  # a folder is refused by whoever opens it, in its own words
        return descriptor
    os.close(descriptor)
    raise StorageError(f"{path} is a pipe or a device, and no object of a run")


def _ignore(_: int) -> None:
    """Nobody asked for progress."""


def _version(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


def _version_at(path: Path) -> str | None:
    try:
        return _version(path.read_bytes())
    except FileNotFoundError:
        return None


def _may_hold(folder: str, prefix: str) -> bool:
    return folder.startswith(prefix) or prefix.startswith(folder)
