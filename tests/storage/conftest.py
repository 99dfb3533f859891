"""The real S3 servers that uploads are tried on."""

from __future__ import annotations

import pytest

from cloudckpt.testing.servers import MotoServer, SeaweedFS


@pytest.fixture(params=["s3_server", "seaweedfs"], ids=["moto", "seaweedfs"])
def server(request: pytest.FixtureRequest) -> MotoServer | SeaweedFS:
    """Each S3 server; the second one checks signatures."""
    found: MotoServer | SeaweedFS = request.getfixturevalue(str(request.param))
    return found
