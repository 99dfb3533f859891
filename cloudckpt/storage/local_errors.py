"""What the operating system says of a file, in words that tell the user what to do."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

from cloudckpt.errors import ObjectNotFoundError, StorageError

__all__ = ["GONE", "explained", "mapped", "reading"]

#: errno -> (what to say, whether waiting helps): the one place that knows what the operating system means.
_ERRORS: dict[int, tuple[str, bool]] = {
    errno.EACCES: ("permission denied: check the owner and mode of the folder", False),
    errno.EPERM: ("operation not permitted: check the owner and mode of the folder", False),
    errno.EROFS: ("the file system is read-only", False),
    errno.ENOSPC: ("no space left on the device: free some, then save again", False),
    errno.EDQUOT: ("the disk quota is used up: free some, then save again", False),
    errno.EFBIG: ("the file would be larger than this file system, or ulimit -f, allows", False),
    errno.ENOTDIR: ("a part of the path is a file, not a folder", False),
    errno.EEXIST: ("there is a file where a folder should be", False),
    errno.EISDIR: ("there is a folder where a file should be", False),
    errno.ENAMETOOLONG: ("the name is too long for this file system", False),
    errno.ESTALE: ("the network file system lost the file (stale handle)", True),
    errno.EIO: ("the disk reported an input/output error", True),
    errno.EAGAIN: ("the resource is busy", True),
    errno.EBUSY: ("the resource is busy", True),
    errno.EINTR: ("interrupted", True),
    errno.ETIMEDOUT: ("timed out", True),
    errno.EMFILE: ("too many open files", True),
    errno.ENFILE: ("too many open files", True),
}
#: What a system call says where there is no object of this name: a part of its path is missing, or is a file.
GONE = {errno.ENOENT, errno.ENOTDIR}


def explained(exc: OSError, place: Path | str) -> StorageError:
    """The error as a sentence about ``place``, and whether waiting helps."""
    what, retryable = _ERRORS.get(exc.errno or 0, (exc.strerror or str(exc), False))
    return StorageError(f"{place}: {what}", retryable=retryable)


@contextlib.contextmanager
def mapped(place: Path | str) -> Iterator[None]:
    """Every ``OSError`` of the body as a ``StorageError``."""
    try:
        yield
    except StorageError:
        raise
    except OSError as exc:
        raise explained(exc, place) from exc


@contextlib.contextmanager
def reading(place: Path | str) -> Iterator[None]:
    """As ``mapped``, for verbs to which a missing file is an answer."""
    with mapped(place):
        try:
            yield
        except OSError as exc:
            # A folder of this name is no object either; object stores say "no such key" to it.
            if exc.errno in {*GONE, errno.EISDIR}:
                raise ObjectNotFoundError(f"{place} does not exist") from exc
            raise
