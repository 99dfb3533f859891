"""GCSStorage keeps every promise of a storage, on a strict fake and on the usual emulator, by either lane."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar

import pytest

from cloudckpt.config import Settings
from cloudckpt.storage import GCSStorage, Storage
from cloudckpt.storage.base import Buffer
from cloudckpt.testing import BytesSource, StorageContract
from cloudckpt.testing.servers import FakeGcsServer

FAST = Settings(retry_base_s=0.01, retry_cap_s=0.1, storage_deadline_s=10, request_timeout_s=10)


class _Sourced(GCSStorage):
    """Whatever buffers are put, they are put as a source, which can be had by range."""

    def put(
        self, key: str, buffers: Iterable[Buffer], *, size_bytes: int, progress: Callable[[int], None] | None = None
    ) -> None:
        # A copy of each: a buffer is good until the next one is asked for.
        source = BytesSource(*(bytes(buffer) for buffer in buffers))
        super().put(key, source, size_bytes=size_bytes, progress=progress)


class _OnServer(StorageContract):
    prefix = "a prefix/with+odd %41 chars/é"
    made: ClassVar[type[GCSStorage]] = GCSStorage

    @pytest.fixture
    def server(self) -> Any:
        raise NotImplementedError

    @pytest.fixture
    def second_storage(self, server: Any, storage: GCSStorage) -> Iterator[Storage]:
        other = self.made(storage._bucket, self.prefix, server.storage_options(), FAST)
        yield other
        other.close()

    @pytest.fixture
    def storage(self, server: Any) -> Iterator[Storage]:
        bucket = f"t-{uuid.uuid4().hex[:10]}"
        server.create_bucket(bucket)
        found = self.made(bucket, self.prefix, server.storage_options(), FAST)
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


class TestStrictFakeOverTheLane(TestStrictFake):
    made = _Sourced


@pytest.mark.processes
class TestFakeGcsServerOverTheLane(TestFakeGcsServer):
    made = _Sourced
