"""S3Storage keeps every promise of a storage, on moto and on a real server."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest

from cloudckpt.config import Settings
from cloudckpt.storage import Storage
from cloudckpt.storage.s3 import S3Storage
from cloudckpt.testing import StorageContract
from cloudckpt.testing.servers import MotoServer, SeaweedFS

FAST = Settings(retry_base_s=0.01, retry_cap_s=0.1, storage_deadline_s=10, request_timeout_s=10)


class _OnServer(StorageContract):
    @pytest.fixture
    def prefix(self) -> str:
        return f"{uuid.uuid4().hex}/a prefix/with+odd %41 chars/é"

    @pytest.fixture
    def second_storage(self, server: MotoServer | SeaweedFS, storage: S3Storage, prefix: str) -> Iterator[Storage]:
        other = S3Storage("contract", prefix, server.storage_options(), FAST)
        yield other
        other.close()

    @pytest.fixture
    def storage(self, server: MotoServer | SeaweedFS, prefix: str) -> Iterator[Storage]:
        server.create_bucket("contract")
        found = S3Storage("contract", prefix, server.storage_options(), FAST)
        yield found
        found.close()


class TestMoto(_OnServer):
    @pytest.fixture
    def server(self, s3_server: MotoServer) -> MotoServer:
        return s3_server


@pytest.mark.processes
class TestSeaweedFS(_OnServer):
    @pytest.fixture
    def server(self, seaweedfs: SeaweedFS) -> SeaweedFS:
        return seaweedfs
