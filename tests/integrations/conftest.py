"""Where the trainings save to: a real S3 server, and moto."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable

import pytest

from cloudckpt.testing.servers import MotoServer, SeaweedFS
from tests.integrations.jobs import Place


@pytest.fixture(params=["seaweedfs", pytest.param("moto", marks=pytest.mark.slow)])
def new_place(request: pytest.FixtureRequest) -> Callable[[], Place]:
    """Makes an empty root on a server; each call another one."""
    server: SeaweedFS | MotoServer = request.getfixturevalue(
        {"seaweedfs": "seaweedfs", "moto": "s3_server"}[request.param]
    )
    with contextlib.suppress(ValueError):
        server.create_bucket("shared")

    def make() -> Place:
        return Place(f"s3://shared/{uuid.uuid4().hex}", server.environment(), server.storage_options())

    return make
