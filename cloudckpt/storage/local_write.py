"""One file, whole and durable or not there at all.

It is written beside its final place, fsynced, renamed with ``os.replace``, and its folder is fsynced. With any of
these left out, power cuts lost or tore acknowledged files on ext4, xfs and btrfs alike. Files get the modes that the
user's umask gives.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable
from io import FileIO
from pathlib import Path

from cloudckpt.errors import StorageError
from cloudckpt.storage.base import Buffer, Source
from cloudckpt.storage.local_calls import start_write_back
from cloudckpt.storage.local_errors import mapped
from cloudckpt.storage.local_lane import can_write_ranges, write_source

__all__ = ["make_folder", "write_durably"]

#: A delete removes a folder it has emptied, between another thread's making it and writing into it, at most
#: once for each delete under way; more tries than this means that something else is wrong.
_FOLDER_TRIES = 20

#: The disk is told to begin after this many bytes, instead of at the fsync: it then works while more is written.
_WRITE_BACK_BYTES = 8 * 1024 * 1024


def write_durably(
    temporary: Path,
    buffers: Iterable[Buffer] | Source,
    path: Path,
    *,
    size_bytes: int | None = None,
    progress: Callable[[int], None] = lambda _: None,
    direct_io: bool = True,
) -> None:
    """Make ``path`` hold exactly these bytes, through ``temporary`` in the same folder, which is made if need be.

    Raises:
        StorageError: the disk refused, or the bytes are not as many as announced.
        BaseException: whatever ``buffers`` or ``progress`` raised, as it was.
    """
    with mapped(path):
        descriptor = _open_new(temporary, path.parent)
    try:
        with open(descriptor, "wb", buffering=0) as file:  # noqa: PTH123 - a descriptor, not a path
            if isinstance(buffers, Source) and can_write_ranges():
                written = buffers.size_bytes
                if size_bytes in {None, written}:  # otherwise it is refused below, without a byte written
                    write_source(file.fileno(), temporary, buffers, path, progress=progress, direct_io=direct_io)
            else:
                written = _write_all(file, buffers, path, progress)
            if size_bytes is not None and written != size_bytes:
                raise StorageError(f"{path}: {written} bytes came, {size_bytes} were announced")
            with mapped(path):
                os.fsync(file.fileno())
        with mapped(path):
            os.replace(temporary, path)  # noqa: PTH105 - the call whose atomicity this module stands on, by its own name
    except BaseException:
        # Whatever ended it, a full disk above all, must not keep the bytes.
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    with mapped(path):
        _fsync_folder(path.parent)


def _write_all(file: FileIO, buffers: Iterable[Buffer], path: Path, progress: Callable[[int], None]) -> int:
    written = told = 0
    # The caller's iterator runs outside of mapped: what it raises is about the caller's own files.
    for buffer in buffers:
        view = memoryview(buffer)
        # A view with a zero in its shape cannot be cast, and has nothing to write.
        view = view.cast("B") if view.nbytes else memoryview(b"")
        while view:
            with mapped(path):
                count = file.write(view)
            written += count
            view = view[count:]
            if written - told >= _WRITE_BACK_BYTES:
                start_write_back(file.fileno(), told, written - told)
                told = written
            progress(count)
    return written


def _open_new(temporary: Path, folder: Path) -> int:
    # 0o666 less the umask is what the user's own files get; tempfile's 0o600 would lock colleagues out.
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_BINARY", 0) | getattr(os, "O_NOFOLLOW", 0)
    for _ in range(_FOLDER_TRIES):
        with contextlib.suppress(FileNotFoundError):
            make_folder(folder)
            return os.open(temporary, flags, 0o666)
    raise StorageError(f"{folder} is removed each time it is made", retryable=True)


def make_folder(folder: Path) -> None:
    """Make a folder and those above it; each new one is made durable in the folder that holds it."""
    missing = []
    for place in (folder, *folder.parents):
        if place.is_dir():
            break
        missing.append(place)
    for place in reversed(missing):
        place.mkdir(exist_ok=True)
        _fsync_folder(place.parent)


def _fsync_folder(folder: Path) -> None:
    if os.name == "nt":  # Windows has no handle of a folder to flush
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
