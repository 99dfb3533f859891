"""System calls on open files that do part of what they were asked, or that Python has no name for."""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

__all__ = ["allocate", "bytes_of", "move", "read_at", "start_write_back"]

#: SYNC_FILE_RANGE_WRITE of <linux/fs.h>: begin, and do not wait.
_BEGIN = 2

#: There is no room for the file, whoever writes it. Whatever else an allocation says, the writes go without.
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def bytes_of(views: Sequence[memoryview]) -> list[memoryview]:
    """The views as plain bytes, without the empty ones: those cannot be cast, and have nothing to move."""
    return [view.cast("B") for view in views if view.nbytes]


def move(call: Callable[[list[memoryview], int], int], views: Sequence[memoryview], start: int) -> int:
    """Repeat ``call(some of the views, where)``, which may move less than asked, until it moves nothing.

    Returns:
        how many bytes were moved; less than all of them only at the end of a file that is read.
    """
    left, first, at = list(views), 0, start
    while first < len(left):
        count = call(left[first : first + _iov_max()], at)
        if not count:
            break
        at += count
        while count:
            if count < len(left[first]):
                left[first] = left[first][count:]
                break
            count -= len(left[first])
            first += 1
    return at - start


@functools.cache
def _iov_max() -> int:
    with suppress(AttributeError, ValueError, OSError):
        return max(os.sysconf("SC_IOV_MAX"), 1)
    return 16  # what POSIX promises everywhere


def read_at(descriptor: int, start: int, targets: Sequence[memoryview]) -> int:
    """Fill targets, one after the other, from byte ``start`` of a file; returns how many bytes there were."""
    if hasattr(os, "preadv"):
        return move(functools.partial(os.preadv, descriptor), bytes_of(targets), start)
    with open(descriptor, "rb", buffering=0, closefd=False) as file:
        file.seek(start)
        return move(lambda some, _: file.readinto(some[0]) or 0, bytes_of(targets), start)


def start_write_back(descriptor: int, start: int, length: int) -> None:
    """Let the disk begin with these bytes now. Promises nothing and never fails: the fsync tells (Linux)."""
    call = _linux("sync_file_range", ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    if call is not None and length:
        call(descriptor, start, length, _BEGIN)


def allocate(descriptor: int, size_bytes: int) -> None:
    """Have the file system set room aside, so that a full disk is known before a byte is written (Linux).

    Not ``os.posix_fallocate``: where a file system cannot, the C library writes into every block instead.

    Raises:
        OSError: there is no room.
    """
    call = _linux("fallocate", ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    if (
        call is not None
        and size_bytes
        and call(descriptor, 0, 0, size_bytes)
        and (found := ctypes.get_errno()) in _NO_ROOM
    ):
        raise OSError(found, os.strerror(found))


@functools.cache
def _linux(name: str, *types: Any) -> Callable[..., int] | None:
    if sys.platform != "linux":
        return None
    with suppress(OSError, AttributeError):
        call = getattr(ctypes.CDLL(None, use_errno=True), name)
        call.argtypes = types
        call.restype = ctypes.c_int
        found: Callable[..., int] = call
        return found
    return None
