"""What a hostile look at Google's lane found: each test is one way in which it went wrong."""

from __future__ import annotations

import pytest

from cloudckpt import StorageError
from cloudckpt.storage import GCSStorage
from cloudckpt.testing.fault_proxy import FaultProxy
from tests.storage.direct.test_gcs_lane import KEY, bucket, put, storage

__all__ = ["bucket", "storage"]  # fixtures


def test_a_refused_read_says_nothing_about_the_line(storage: GCSStorage, gcs_faults: FaultProxy) -> None:
    """A quick 503 to a large range is no fast connection, and no success that lets more requests be under way."""
    put(storage, bytes(1000))
    before = storage._lane._crew.worthwhile, storage._lane._crew.limit
    gcs_faults.inject("status", method="GET", match="alt=media", status=503)
    with pytest.raises(StorageError, match="503"):
        storage.read_into(KEY, 0, memoryview(bytearray(8 * 1024 * 1024)))
    assert (storage._lane._crew.worthwhile, storage._lane._crew.limit) == before
