"""GCSStorage keeps every promise of a storage, on a strict fake and on the usual emulator."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any

import pytest

from cloudckpt.config import Settings
from cloudckpt.storage import GCSStorage, Storage
from cloudckpt.testing import StorageContract
from cloudckpt.testing.servers import FakeGcsServer

FAST = Settings(retry_base_s=0.01, retry_cap_s=0.1, storage_deadline_s=10, request_timeout_s=10)


class _OnServer(StorageContract):
    prefix = "a prefix/with+odd %41 chars/é"

    @pytest.fixture
    def server(self) -> Any:
        raise NotImplementedError

    @pytest.fixture
    def second_storage(self, server: Any, storage: GCSStorage) -> Iterator[Storage]:
        other = GCSStorage(storage._bucket, self.prefix, server.storage_options(), FAST)
        yield other
        other.close()

    @pytest.fixture
    def storage(self, server: Any) -> Iterator[Storage]:
        bucket = f"t-{uuid.uuid4().hex[:10]}"
        server.create_bucket(bucket)
        found = GCSStorage(bucket, self.prefix, server.storage_options(), FAST)
        yield found
        found.close()


class TestStrictFake(_OnServer):
    @pytest.fixture
    def server(self, gcs_server: Any) -> Any:
        return gcs_server


@pytest.mark.processes
class TestFakeGcsServer(_OnServer):
    @pytest.fixture
    def server(self, fake_gcs_server: FakeGcsServer) -> FakeGcsServer:
        return fake_gcs_server
