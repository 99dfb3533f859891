"""What the server holds, and the one place where a name gets a new generation."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from cloudckpt.testing.fake_gcs.answers import RefusedError, no_bucket, no_permission
from cloudckpt.testing.fake_gcs.objects import OF_THE_UPLOADER, Bucket, Conditions, Object, Sum
from cloudckpt.testing.fake_gcs.requests import Asked

__all__ = ["Store"]


class Store:
    """Buckets and their objects. Whoever calls holds the lock of ``FakeGCS``.

    Args:
        denied: whether nobody has a permission.
        spacing_s: least time between two writes of one object.
        page_size: most entries of one page of a listing.
        now: the clock for the spacing, in seconds.
    """

    def __init__(
        self, denied: Callable[[str], bool], *, spacing_s: float, page_size: int, now: Callable[[], float]
    ) -> None:
        self.buckets: dict[str, Bucket] = {}
        self.page_size = page_size
        self._denied = denied
        self._spacing_s = spacing_s
        self._now = now
        self._last_us = 0

    def create_bucket(self, name: str, *, versioning: bool, requester_pays: bool) -> None:
        """Make an empty bucket.

        Raises:
            ValueError: there is one of this name.
        """
        if name in self.buckets:
            raise ValueError(f"there is a bucket {name!r} already")
        self.buckets[name] = Bucket(name, versioning, self.tick(), requester_pays=requester_pays)

    def tick(self) -> int:
        """Microseconds since 1970 that never come twice: generations are made of them."""
        self._last_us = max(self._last_us + 1, time.time_ns() // 1000)
        return self._last_us

    def bucket(self, name: str) -> Bucket:
        """The bucket of this name, or the answer that there is none."""
        if name not in self.buckets:
            raise no_bucket()
        return self.buckets[name]

    def check_payer(self, asked: Asked) -> None:
        """A bucket whose requester pays wants to know who that is."""
        bucket = self.buckets.get(asked.bucket)
        if bucket is not None and bucket.requester_pays and not asked.payer:
            raise RefusedError(
                400,
                "required",
                "Bucket is a requester pays bucket but no user project provided.",
                code="UserProjectMissing",
            )

    def permit(self, permission: str) -> None:
        """Go on, unless nobody has this permission."""
        if self._denied(permission):
            raise no_permission(permission)

    def write(
        self,
        bucket: Bucket,
        name: str,
        data: bytes | bytearray,
        *,
        sums: Sum,
        metadata: Mapping[str, object],
        conditions: Conditions,
        with_md5: bool = True,
    ) -> Object:
        """Store an object if everything holds: the one place where a name gets a new generation."""
        found = bucket.live.get(name)
        conditions.check(found)
        if found is not None:
            self.permit("storage.objects.delete")
        self.space(bucket, name)
        about = {key: metadata[key] for key in OF_THE_UPLOADER if metadata.get(key)}
        generation = self.tick()
        bucket.retire(name)
        bucket.live[name] = stored = Object(
            bucket.name,
            name,
            data,
            sums.crc32c,
            sums.md5 if with_md5 else None,
            generation,
            1,
            about,
            updated_us=generation,
        )
        return stored

    def space(self, bucket: Bucket, name: str) -> None:
        """Refuse a write that comes too soon after the last one of this object."""
        moment = self._now()
        last = bucket.written.get(name)
        if last is not None and moment - last < self._spacing_s:
            raise RefusedError(
                429,
                "rateLimitExceeded",
                f"The object {bucket.name}/{name} exceeded the rate limit for object mutation operations (create, "
                "update, and delete). Please reduce your request rate. See "
                "https://cloud.google.com/storage/docs/gcs429.",
                domain="usageLimits",
            )
        bucket.written[name] = moment
