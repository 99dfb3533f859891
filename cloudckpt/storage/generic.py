"""Any filesystem that fsspec knows: SFTP, WebHDFS, SMB, Azure, and whatever registers itself.

fsspec promises little about them, so little is promised here: there are no conditional writes, and only a filesystem
with a rename of its own makes an object visible at once. A file is never opened for writing over the network, because
leaving such a ``with`` block by an exception *publishes* the half-written file; it is written to a local disk first
and sent whole.

Past 350 lines, because the verbs of one backend stand together, with what is asked of a filesystem before it is used.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import os
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from operator import methodcaller
from typing import Any, TypeVar

import fsspec
from fsspec.asyn import AsyncFileSystem

from cloudckpt.core import keys as grammar
from cloudckpt.errors import ConfigError, ObjectNotFoundError, StorageError
from cloudckpt.storage.base import Buffer, Conditions, Listed, Outcome, Versioned, scatter
from cloudckpt.storage.emulated import emulated_create, emulated_replace
from cloudckpt.storage.redacting import Redactor

__all__ = ["GenericFsspecStorage"]

_T = TypeVar("_T")
_MISSING = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
_PASSING = (ConnectionError, TimeoutError, EOFError, InterruptedError, fsspec.FSTimeoutError)
#: They can be opened for writing by their class, and refuse it when it comes to it.
_READ_ONLY = {"github", "reference"}
#: Errors whose kind says what is wrong, even where they have no number.
_TOLD = (*_MISSING, PermissionError, ConnectionError, TimeoutError, InterruptedError)
_FOLDER_TRIES = 10


class _NotBegunError(Exception):
    """The folder of a file came or went while it was to be written; nothing of the file was.

    Attributes:
        problem: what the filesystem said.
    """

    def __init__(self, problem: OSError) -> None:
        super().__init__(str(problem))
        self.problem = problem


class GenericFsspecStorage:
    """A storage on one fsspec filesystem, for one writer.

    Args:
        url: the root, with what fsspec reads from a URL (host, port, user).
        options: for the filesystem, as they are.

    Raises:
        ConfigError: the filesystem's library is not installed, or it can only be read.
    """

    def __init__(self, url: str, options: Mapping[str, object]) -> None:
        self.conditions = Conditions.ABSENT
        scheme = url.partition("://")[0]
        self._url = _without_password(url).rstrip("/")
        try:
            self._class: Any = fsspec.get_filesystem_class(scheme)
        except ImportError as exc:
            raise ConfigError(f"{self._url!r} needs a library that is not installed: {exc}") from exc
        if scheme in _READ_ONLY or not _can_write(self._class):
            raise ConfigError(
                f"{self._url!r}: {self._class.__name__} can only be read; a run needs a filesystem that can be written"
            )
        try:
            given = self._class._get_kwargs_from_urls(url)  # noqa: SLF001 - fsspec's way to read a URL
        except ValueError:
            # Neither the URL nor what is said about it: where the host cannot be found, it may be in the password.
            raise ConfigError(
                f"a {scheme}:// URL whose host and port cannot be told: write {scheme}://user@host:port/folder. Signs "
                "such as / and @ in a password are percent-encoded; or pass it in storage_options"
            ) from None
        self._options = {**given, **options}
        self._secrets = Redactor(self._options, url)
        self._root = str(self._class._strip_protocol(url)).rstrip("/")  # noqa: SLF001 - the same
        self._renames = _renames(self._class)
        self._mutex = threading.RLock()
        self._filesystem: Any = None
        self._pid = os.getpid()

    def __repr__(self) -> str:
        return f"<GenericFsspecStorage {self.url}>"

    @property
    def url(self) -> str:
        """The root, without user and password."""
        return self._url

    @property
    def limits(self) -> str:
        """What this filesystem cannot promise, as a sentence for people."""
        whole = (
            "objects appear whole, by its rename"
            if self._renames
            else "an upload that breaks off may leave part of an object under its name (never listed as a checkpoint)"
        )
        return f"{self._class.__name__} has no conditional writes, so only one process may ever write; {whole}"

    def describe(self) -> dict[str, str]:
        """Facts for people."""
        package = self._class.__module__.partition(".")[0]
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            version = "of unknown version"
        return {
            "filesystem": f"{self._class.__name__} ({package} {version})",
            "lane": "whole files through fsspec, staged on the local disk",
            "not promised": self.limits,
        }

    # -- the filesystem --------------------------------------------------------------------------------------

    def _fs(self) -> Any:
        if self._filesystem is None:
            self._filesystem = self._class(**self._options, skip_instance_cache=True)
        return self._filesystem

    def _ask(self, what: str, act: Callable[[Any], _T]) -> _T:
        if self._pid != os.getpid():
            # A connection that was inherited over a fork is the parent's, and so is whoever held the mutex.
            self._filesystem, self._mutex, self._pid = None, threading.RLock(), os.getpid()
        # Most of these clients speak over one connection and are not meant for several threads.
        with self._mutex:
            try:
                return act(self._fs())
            except StorageError:
                raise
            except _MISSING as exc:
                raise ObjectNotFoundError(f"{what}: it does not exist") from self._secrets.clean(exc)
            except Exception as exc:  # noqa: BLE001 - chained, unless it would show a secret
                if not isinstance(exc, PermissionError | FileExistsError):
                    self._filesystem = None  # a broken connection does not heal; the next try makes another
                said = self._secrets.hide(f"{type(exc).__name__}: {exc}")
                raise StorageError(f"{what}: {said}", retryable=_is_passing(exc)) from self._secrets.clean(exc)

    def _path(self, key: str) -> str:
        if not {"", ".", ".."}.isdisjoint(key.split("/")):
            raise StorageError(f"{key!r} is not a key under {self.url}")
        return f"{self._root}/{key}"

    def _named(self, doing: str, key: str) -> str:
        return f"{doing} {self.url}/{key}"

    # -- the verbs -------------------------------------------------------------------------------------------

    def read(self, key: str, *, limit_bytes: int) -> Versioned:
        """See ``Storage.read``; the version is the content's SHA-256, since every manifest differs."""
        what, path = self._named("reading", key), self._path(key)

        def ask(filesystem: Any) -> bytes:
            size = self._size(filesystem, path)
            if size > limit_bytes:
                raise StorageError(f"{what}: it has {size} bytes, more than the {limit_bytes} expected")
            return bytes(filesystem.cat_file(path))

        body = self._ask(what, ask)
        if len(body) > limit_bytes:
            raise StorageError(f"{what}: it has more than the {limit_bytes} bytes expected")
        return Versioned(body, hashlib.sha256(body).hexdigest())

    def create(self, key: str, body: bytes) -> Outcome:
        """See ``Storage.create``; emulated, for one writer."""
        return emulated_create(self, key, body)

    def replace(self, key: str, body: bytes, *, expecting: str) -> Outcome:
        """See ``Storage.replace``; emulated, for one writer."""
        return emulated_replace(self, key, body, expecting=expecting)

    def put(
        self, key: str, buffers: Iterable[Buffer], *, size_bytes: int, progress: Callable[[int], None] | None = None
    ) -> None:
        """See ``Storage.put``; the file is sent once it is complete on the local disk."""
        what, path = self._named("writing", key), self._path(key)
        with tempfile.NamedTemporaryFile(prefix="cloudckpt-", suffix=".staged") as staged:
            written = 0
            for buffer in buffers:
                written += memoryview(buffer).nbytes
                if written > size_bytes:
                    break
                staged.write(buffer)
                if progress is not None:
                    progress(memoryview(buffer).nbytes)
            if written != size_bytes:
                raise StorageError(f"{what}: {written} bytes came, {size_bytes} were announced")
            staged.flush()
            self._ask(what, lambda filesystem: self._send(filesystem, staged.name, key, path))

    def _send(self, filesystem: Any, staged: str, key: str, path: str) -> None:
        problem: OSError = FileNotFoundError(path)
        for _ in range(_FOLDER_TRIES):
            try:
                _make_folder(filesystem, path.rpartition("/")[0])
                self._send_into(filesystem, staged, key, path)
            except FileNotFoundError:
                problem = FileNotFoundError(path)  # a delete beside this has taken the folder, empty for a moment
            except _NotBegunError as exc:
                problem = exc.problem  # or has taken it, and another put has made it again
            else:
                return
        raise problem

    def _send_into(self, filesystem: Any, staged: str, key: str, path: str) -> None:
        if not self._renames:
            _put_file(filesystem, staged, path, is_new=False)
            return
        temporary = self._path(grammar.temporary_key(key))
        try:
            _put_file(filesystem, staged, temporary, is_new=True)
            try:
                filesystem.mv(temporary, path)
            except Exception:
                if not filesystem.exists(path):
                    raise
                self._change_places(filesystem, temporary, path)
        except BaseException:
            with contextlib.suppress(Exception):
                filesystem.rm_file(temporary)
            raise

    @staticmethod
    def _change_places(filesystem: Any, temporary: str, path: str) -> None:
        """Some refuse to rename over a file that is there: it steps aside, and comes back if need be."""
        folder, _, name = path.rpartition("/")
        aside = f"{folder}/.{name}.old"
        filesystem.mv(path, aside)
        try:
            filesystem.mv(temporary, path)
        except BaseException:
            filesystem.mv(aside, path)
            raise
        filesystem.rm_file(aside)

    def read_into(self, key: str, start: int, *targets: memoryview) -> None:
        """See ``Storage.read_into``."""
        what, path = self._named("reading", key), self._path(key)
        length = sum(map(len, targets))
        end = start + length

        def ask(filesystem: Any) -> None:
            if self._size(filesystem, path) < end:
                raise ObjectNotFoundError(f"{what}: bytes {start}..{end} do not exist")
            if start == end:
                return
            body = filesystem.cat_file(path, start=start, end=end)
            if len(body) != length:
                raise StorageError(f"{what}: {len(body)} of {length} bytes came", retryable=True)
            scatter(body, targets)

        self._ask(what, ask)

    def size(self, key: str) -> int:
        """See ``Storage.size``."""
        path = self._path(key)
        return self._ask(self._named("looking at", key), lambda filesystem: self._size(filesystem, path))

    @staticmethod
    def _size(filesystem: Any, path: str) -> int:
        filesystem.invalidate_cache()
        info = filesystem.info(path)
        if info["type"] != "file":
            raise FileNotFoundError(path)
        return int(info["size"])

    def list(self, prefix: str = "", *, limit: int | None = None) -> Iterator[Listed]:
        """See ``Storage.list``."""
        folder = prefix.rpartition("/")[0]
        if not {"", ".", ".."}.isdisjoint(folder.split("/")) and folder:
            return iter(())
        place = f"{self._root}/{folder}".rstrip("/")

        def ask(filesystem: Any) -> dict[str, Any]:
            filesystem.invalidate_cache()
            filesystem.ls(place, detail=False)  # raises what find() leaves out: a folder that may not be listed
            return dict(filesystem.find(place, detail=True))

        try:
            found = self._ask(f"listing {self.url}", ask)
        except ObjectNotFoundError:
            return iter(())
        root = self._root.lstrip("/")
        start = len(root) + 1 if root else 0
        infos = {path.lstrip("/")[start:]: info for path, info in found.items()}
        kept = sorted(key for key in infos if key.startswith(prefix))
        return (Listed(key, int(infos[key]["size"])) for key in kept[:limit])

    def delete(self, keys: Iterable[str]) -> dict[str, StorageError]:
        """See ``Storage.delete``; key by key, and the folders that are empty then."""
        failed: dict[str, StorageError] = {}
        folders: set[str] = set()
        for key in [*keys]:
            path = self._path(key)
            try:
                self._ask(self._named("deleting", key), methodcaller("rm_file", path))
            except ObjectNotFoundError:
                pass
            except StorageError as exc:
                failed[key] = exc
                continue
            if "/" in key:
                folders.add(key.rpartition("/")[0])
        for folder in sorted(folders, key=len, reverse=True):
            # rmdir refuses a folder that is not empty, which is what is wanted.
            with contextlib.suppress(StorageError, NotImplementedError):
                self._ask("tidying", partial(_remove_if_empty, path=self._path(folder)))
        return failed

    def abort_uploads(
        self,
        prefix: str,  # noqa: ARG002 - the verb's shape
        *,
        spare: Callable[[str], bool] = lambda _: False,  # noqa: ARG002 - the same
    ) -> int:
        """See ``Storage.abort_uploads``; there is nothing of the kind."""
        return 0

    def close(self) -> None:
        """See ``Storage.close``."""
        with self._mutex:
            self._filesystem = None


def _put_file(filesystem: Any, staged: str, target: str, *, is_new: bool) -> None:
    """Send a file, and tell apart what failed before its first byte because its folder came or went meanwhile.

    fsspec makes the folder once more by itself: it asks whether it is there, and makes it if not. In between another
    put may have made it. A file system says "exists" to that; an SFTP server says no more than that it failed, and then
    a file that is not there tells that not even its beginning was sent.

    Args:
        is_new: nothing is at ``target`` yet, so that what is there afterwards is of this call.
    """
    try:
        filesystem.put_file(staged, target)
    except FileExistsError as exc:
        raise _NotBegunError(exc) from exc
    except OSError as exc:
        told = exc.errno is not None or isinstance(exc, _TOLD)
        if told or not is_new or filesystem.exists(target):
            raise
        raise _NotBegunError(exc) from exc


def _make_folder(filesystem: Any, folder: str) -> None:
    problem: OSError | None = None
    for _ in range(_FOLDER_TRIES):
        try:
            filesystem.makedirs(folder, exist_ok=True)
        except NotImplementedError:
            return  # an object store: there are no folders
        except PermissionError:
            raise
        except OSError as exc:
            # Another one made it a moment ago, and a delete may have taken it since.
            problem = exc
        if problem is None or filesystem.isdir(folder):
            return
    if problem is not None:
        raise problem


def _remove_if_empty(filesystem: Any, path: str) -> None:
    filesystem.invalidate_cache()
    if filesystem.isdir(path) and not filesystem.ls(path, detail=False):
        filesystem.rmdir(path)


def _without_password(url: str) -> str:
    scheme, _, rest = url.partition("://")
    authority, slash, path = rest.partition("/")
    user, at, host = authority.rpartition("@")
    return f"{scheme}://{user.partition(':')[0]}{at}{host}{slash}{path}"


def _is_passing(exc: Exception) -> bool:
    if isinstance(exc, _PASSING) or (isinstance(exc, OSError) and exc.errno is None):
        return True
    # paramiko's errors of a session, but not of a login.
    kinds = {kind.__name__ for kind in type(exc).__mro__}
    return "SSHException" in kinds and not kinds & {"AuthenticationException", "BadHostKeyException"}


def _can_write(kind: Any) -> bool:
    base = AsyncFileSystem if issubclass(kind, AsyncFileSystem) else fsspec.AbstractFileSystem

    def has(*names: str) -> bool:
        """Whether one of these is its own, and not fsspec's, which only raises."""
        return any(getattr(kind, name) is not getattr(base, name) for name in names)

    if base is AsyncFileSystem:
        return has("_put_file") and has("_rm_file")
    return has("_open") and has("_rm", "rm_file", "rm")


def _renames(kind: Any) -> bool:
    """Whether the filesystem moves by a rename of its own, and not by fsspec's copy and delete."""
    return kind.mv is not fsspec.AbstractFileSystem.mv and not issubclass(kind, AsyncFileSystem)
