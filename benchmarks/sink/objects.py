"""What the sink holds: objects made of bodies, unfinished uploads, and the counts of everything that was asked."""

from __future__ import annotations

import bisect
import hashlib
import itertools
import mmap
import os
import threading
from collections import Counter
from dataclasses import dataclass, field

__all__ = ["Body", "Counts", "Listing", "Object", "Objects", "Upload"]


@dataclass(frozen=True, slots=True)
class Body:
    """One run of bytes: in ``small``, in the memory file ``fd``, or (neither) dropped, with only its size known."""

    size_bytes: int
    small: bytes | None = None
    memory: MemoryFile | None = None


class MemoryFile:
    """An anonymous file in memory: filled through a map, sent by the kernel with ``sendfile``."""

    def __init__(self, size_bytes: int) -> None:
        self.fd = os.memfd_create("sink")
        os.ftruncate(self.fd, size_bytes)
        self.map = mmap.mmap(self.fd, size_bytes)

    def __del__(self) -> None:
        os.close(self.fd)


@dataclass(frozen=True, slots=True)
class Object:
    """What a GET of its key gives."""

    bodies: tuple[Body, ...]
    etag: str

    @property
    def size_bytes(self) -> int:
        """Bytes in all bodies together."""
        return sum(body.size_bytes for body in self.bodies)


@dataclass(slots=True)
class Upload:
    """A multipart upload that is neither completed nor aborted."""

    key: str
    parts: dict[int, tuple[Body, str]] = field(default_factory=dict)


@dataclass(slots=True)
class Counts:
    """What was asked since the last reset. Bytes are of payload: bodies, not headers."""

    requests: Counter[str] = field(default_factory=Counter)
    bytes_in: int = 0
    bytes_out: int = 0


@dataclass(frozen=True, slots=True)
class Listing:
    """One page: keys with their objects, common prefixes, and where the next page starts (or nothing)."""

    found: tuple[tuple[str, Object], ...]
    prefixes: tuple[str, ...]
    next_after: str | None


class Objects:
    """All objects, by ``bucket/key``. Every method is one atomic step."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._objects: dict[str, Object] = {}
        self._sorted: list[str] | None = []
        self._uploads: dict[str, Upload] = {}
        self._ids = itertools.count(1)
        self._counts = Counts()

    def etag_of(self, body: Body) -> str:
        """As S3's: the MD5 of what is kept; of what was dropped nobody asks, so it is only fresh."""
        if body.small is not None:
            return hashlib.md5(body.small).hexdigest()
        return f"{next(self._ids):032x}"

    def put(self, key: str, new: Object, *, if_match: str | None = None, if_none_match: bool = False) -> str:
        """Put an object under its condition; gives "", or the S3 error code of the condition that does not hold."""
        with self._mutex:
            there = self._objects.get(key)
            if if_none_match and there is not None:
                return "PreconditionFailed"
            if if_match is not None and there is None:
                return "NoSuchKey"
            if if_match is not None and there is not None and there.etag != if_match.strip('"'):
                return "PreconditionFailed"
            if there is None:
                self._sorted = None
            self._objects[key] = new
            return ""

    def get(self, key: str) -> Object | None:
        """The object of a key."""
        with self._mutex:
            return self._objects.get(key)

    def delete(self, *keys: str) -> None:
        """Forget objects; those that are not there are fine."""
        with self._mutex:
            for key in keys:
                if self._objects.pop(key, None) is not None:
                    self._sorted = None

    def page(self, bucket: str, prefix: str, delimiter: str, after: str, limit: int) -> Listing:
        """A page of the keys that begin with ``prefix``, after ``after``, in order; all without the bucket's name."""
        base = f"{bucket}/"
        with self._mutex:
            if self._sorted is None:
                self._sorted = sorted(self._objects)
            keys = self._sorted
            at = max(bisect.bisect_left(keys, base + prefix), bisect.bisect_right(keys, base + after) if after else 0)
            found: list[tuple[str, Object]] = []
            prefixes: list[str] = []
            last = after
            while at < len(keys) and keys[at].startswith(base + prefix):
                if len(found) + len(prefixes) == limit:
                    return Listing(tuple(found), tuple(prefixes), last)
                key = keys[at].removeprefix(base)
                head, cut, _ = key[len(prefix) :].partition(delimiter) if delimiter else ("", "", "")
                if cut:
                    prefixes.append(prefix + head + cut)
                    last = prefixes[-1] + "\U0010ffff"
                    at = bisect.bisect_right(keys, base + last)
                    continue
                found.append((key, self._objects[keys[at]]))
                last = key
                at += 1
            return Listing(tuple(found), tuple(prefixes), None)

    # -- uploads ---------------------------------------------------------------------------------------------

    def begin(self, key: str) -> str:
        """A new upload's id."""
        with self._mutex:
            name = f"upload-{next(self._ids)}"
            self._uploads[name] = Upload(key)
            return name

    def add_part(self, upload_id: str, number: int, body: Body) -> str | None:
        """The part's ETag; None if there is no such upload."""
        etag = self.etag_of(body)
        with self._mutex:
            if (upload := self._uploads.get(upload_id)) is None:
                return None
            upload.parts[number] = (body, etag)
            return etag

    def finish(self, upload_id: str) -> Object | None:
        """Make its object of all of its parts; None if there is no such upload."""
        with self._mutex:
            if (upload := self._uploads.pop(upload_id, None)) is None:
                return None
            bodies = tuple(body for _, (body, _) in sorted(upload.parts.items()))
            new = Object(bodies, f"{next(self._ids):032x}-{len(bodies)}")
            if upload.key not in self._objects:
                self._sorted = None
            self._objects[upload.key] = new
            return new

    def abort(self, upload_id: str) -> bool:
        """Whether there was such an upload."""
        with self._mutex:
            return self._uploads.pop(upload_id, None) is not None

    def uploads(self, bucket: str, prefix: str) -> list[tuple[str, str]]:
        """Key (without the bucket's name) and id of every unfinished upload of a prefix."""
        base = f"{bucket}/{prefix}"
        with self._mutex:
            return [
                (u.key.removeprefix(f"{bucket}/"), name) for name, u in self._uploads.items() if u.key.startswith(base)
            ]

    # -- counts ----------------------------------------------------------------------------------------------

    def count(self, kind: str, *, bytes_in: int = 0, bytes_out: int = 0) -> None:
        """Count one request."""
        with self._mutex:
            self._counts.requests[kind] += 1
            self._counts.bytes_in += bytes_in
            self._counts.bytes_out += bytes_out

    def counted(self) -> Counts:
        """A copy of the counts."""
        with self._mutex:
            return Counts(self._counts.requests.copy(), self._counts.bytes_in, self._counts.bytes_out)

    def clear(self) -> None:
        """Forget all objects and uploads."""
        with self._mutex:
            self._objects.clear()
            self._uploads.clear()
            self._sorted = []
