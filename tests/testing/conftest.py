"""The strict fake that its own tests speak to."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from cloudckpt.testing import FakeGCS


@pytest.fixture
def gcs() -> Iterator[FakeGCS]:
    """A server with an empty bucket."""
    with FakeGCS() as server:
        server.create_bucket("bkt")
        yield server
