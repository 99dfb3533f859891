"""Folders for files that are on their way: each is locked by the processes that use it, and never outlives them long.

A process that is killed leaves its folder behind, as large as a checkpoint. The lock goes with the process, so whoever
makes the next folder in the same place finds out, and removes it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

from cloudckpt.errors import StorageError

__all__ = ["OwnFolder"]


class OwnFolder:
    """An empty folder of the processes that make it under one name; each of them locks it until it removes it.

    Args:
        parent: where it is made. A local disk, or one on which locks work; elsewhere nothing abandoned is removed.
        prefix: what the names of folders of this kind begin with, in this place.
        token: the rest of its name.
        private: whether other users are kept out.

    Raises:
        StorageError: it cannot be made.
    """

    def __init__(self, parent: Path, prefix: str, token: str, *, private: bool = False) -> None:
        self.path = parent / f"{prefix}{token}"
        self._descriptor: int | None = None
        try:
            parent.mkdir(parents=True, exist_ok=True)
            _remove_abandoned(parent, prefix)
            self._descriptor = self._made(0o700 if private else 0o777)
        except OSError as exc:
            raise StorageError(f"{self.path} cannot be made: {exc.strerror or exc}") from exc

    def _made(self, mode: int) -> int:
        while True:
            with contextlib.suppress(FileExistsError):  # by another rank of this machine
                self.path.mkdir(mode=mode)
            # Until it is locked somebody may take it for abandoned, and remove it.
            try:
                descriptor = _opened(self.path)
            except FileNotFoundError:
                continue
            with contextlib.suppress(OSError):  # no locks here: nobody else can take it either
                _lock(descriptor, shared=True)
            owner = os.fstat(descriptor).st_uid
            if owner == os.getuid() and _is_there(descriptor, self.path):
                return descriptor
            os.close(descriptor)
            if owner != os.getuid():
                raise PermissionError(f"it belongs to somebody else (uid {owner})")

    def keep(self, target: Path) -> None:
        """It becomes ``target``, which must not be there, and is nobody's own any more.

        Raises:
            OSError: something is there.
        """
        self.path.rename(target)
        self._release()

    def remove(self) -> None:
        """Remove it with all that is in it, or what other ranks have left of it. Idempotent."""
        if self._descriptor is not None:
            shutil.rmtree(self.path, ignore_errors=True)
            self._release()

    def _release(self) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)


def _opened(path: Path) -> int:
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)


def _lock(descriptor: int, *, shared: bool) -> None:
    import fcntl  # noqa: PLC0415 - not on every system, and nothing else here needs it

    fcntl.flock(descriptor, fcntl.LOCK_SH if shared else fcntl.LOCK_EX | fcntl.LOCK_NB)


def _remove_abandoned(parent: Path, prefix: str) -> None:
    for path in parent.glob(f"{prefix}*"):
        # Somebody else's, in use, or gone meanwhile: all of them are left alone.
        with contextlib.suppress(OSError):
            if path.lstat().st_uid == os.getuid():
                descriptor = _opened(path)
                try:
                    _lock(descriptor, shared=False)
                    shutil.rmtree(path, ignore_errors=True)
                finally:
                    os.close(descriptor)


def _is_there(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
