"""Stores that copy objects by themselves: small ones, ones in parts, and what they decline."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import crc32c
import pytest

from cloudckpt.config import Settings
from cloudckpt.storage import Copying, GCSStorage, MemoryStorage, S3Storage, Storage, s3_copy
from cloudckpt.testing import FakeGCS
from cloudckpt.testing.servers import MotoServer, SeaweedFS

FAST = Settings(retry_base_s=0.01, retry_cap_s=0.1, storage_deadline_s=5, request_timeout_s=10)
BODY = bytes(range(256)) * 48 * 1024  # 12 MiB


@pytest.fixture
def s3(server: MotoServer | SeaweedFS) -> Iterator[tuple[S3Storage, S3Storage]]:
    """Two roots of one server, whose keys need escaping."""
    server.create_bucket("copies")
    made = [S3Storage("copies", f"{uuid.uuid4().hex}/a b+é", server.storage_options(), FAST) for _ in range(2)]
    yield made[0], made[1]
    for storage in made:
        storage.close()


@pytest.fixture
def gcs(gcs_server: FakeGCS) -> Iterator[tuple[GCSStorage, GCSStorage]]:
    """Two buckets of one server."""
    buckets = [f"copies-{uuid.uuid4().hex[:8]}" for _ in range(2)]
    for bucket in buckets:
        gcs_server.create_bucket(bucket)
    made = [GCSStorage(bucket, "a b+é", gcs_server.storage_options(), FAST) for bucket in buckets]
    yield made[0], made[1]
    for storage in made:
        storage.close()


def copied(source: Storage, target: Storage, body: bytes) -> bool:
    """Whether the target's store has copied an object by itself; then it is the same, or this fails."""
    source.put("from here", [body], size_bytes=len(body))
    assert isinstance(target, Copying)
    done = target.copy_from(source, "from here", "to/there", size_bytes=len(body), checksum=crc32c.crc32c(body))
    if done:
        found = bytearray(len(body))
        target.read_into("to/there", 0, memoryview(found))
        assert found == body
    return done


@pytest.mark.parametrize("body", [b"", b"x", BODY], ids=["empty", "one", "large"])
def test_s3_copies_an_object(s3: tuple[S3Storage, S3Storage], body: bytes) -> None:
    """One request, whatever the key needs to be escaped."""
    assert copied(*s3, body)


def test_s3_copies_a_large_object_in_parts(s3: tuple[S3Storage, S3Storage], monkeypatch: pytest.MonkeyPatch) -> None:
    """More than fits into one request: in parts, and no upload is left unfinished."""
    monkeypatch.setattr(s3_copy, "COPY_PART_BYTES", 5 * 2**20)
    assert copied(*s3, BODY)
    left: list[str] = []

    def spare(key: str) -> bool:
        left.append(key)
        return True

    s3[1].abort_uploads("", spare=spare)
    assert left == []


def test_gcs_copies_an_object(gcs: tuple[GCSStorage, GCSStorage]) -> None:
    """A rewrite, from one bucket to another; its size and checksum are compared."""
    assert copied(*gcs, BODY)
    assert copied(*gcs, b"")


def test_what_is_not_on_the_same_store_is_declined(
    s3: tuple[S3Storage, S3Storage], gcs: tuple[GCSStorage, GCSStorage]
) -> None:
    """Another kind of store, another endpoint: False, and nothing was written."""
    assert not copied(gcs[0], s3[0], b"x")
    assert not copied(s3[0], gcs[0], b"x")
    assert not copied(MemoryStorage(), s3[1], b"x")
    assert [item.key for item in s3[1].list("to/")] == []


def test_an_object_that_is_not_there_is_declined(
    s3: tuple[S3Storage, S3Storage], gcs: tuple[GCSStorage, GCSStorage]
) -> None:
    """Whoever carries the bytes instead finds out by itself, and says it better."""
    assert not s3[1].copy_from(s3[0], "nothing", "to/there", size_bytes=1, checksum=0)
    assert not gcs[1].copy_from(gcs[0], "nothing", "to/there", size_bytes=1, checksum=0)
