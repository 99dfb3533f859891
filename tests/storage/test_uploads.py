"""An upload in parts leaves nothing behind, however it ends, and gives back exactly what was sent."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest

from cloudckpt import Settings, StorageError
from cloudckpt.storage import Conditions, GCSStorage, S3Storage
from cloudckpt.storage.base import Buffer
from cloudckpt.testing import BytesSource, FakeGCS
from cloudckpt.testing.fault_proxy import FaultProxy
from cloudckpt.testing.servers import MotoServer, SeaweedFS

PART = 5 * 1024 * 1024
SMALL_PARTS = Settings(
    part_size_bytes=PART, retry_base_s=0.01, retry_cap_s=0.05, storage_deadline_s=5, request_timeout_s=5
)
KEY = "checkpoint-1.00000000/payload"

Uploading = Callable[[str, str, Any], AbstractContextManager[Any]]

UPLOADER = """
import sys
from cloudckpt import Settings
from cloudckpt.storage import S3Storage
bucket, part = sys.argv[1], 5 * 1024 * 1024
import os
storage = S3Storage(bucket, "run", {}, Settings(part_size_bytes=part))
def buffers():
    yield bytes(2 * part)
    print("sending", flush=True)
    while True:
        yield bytes(part)
try:
    storage.put("checkpoint-1.00000000/payload", buffers(), size_bytes=1 << 40)
except KeyboardInterrupt:
    print("interrupted", flush=True)
storage.close()
"""


@pytest.fixture
def bucket(server: MotoServer | SeaweedFS) -> str:
    """A fresh bucket."""
    name = f"u-{uuid.uuid4().hex[:10]}"
    server.create_bucket(name)
    return name


@pytest.fixture
def storage(server: MotoServer | SeaweedFS, bucket: str) -> Iterator[S3Storage]:
    """A storage that sends small parts."""
    found = S3Storage(bucket, "run", server.storage_options(), SMALL_PARTS)
    found.conditions = Conditions.HONOURED
    yield found
    found.close()


@pytest.mark.processes
@pytest.mark.parametrize("size", [PART, PART + 1, 2 * PART, 2 * PART - 1, 3 * PART + 7])
def test_what_comes_back_is_what_was_sent(storage: S3Storage, server: Any, bucket: str, size: int) -> None:
    """Objects around the size of a part are whole, in whatever buffers they came, and leave no upload."""
    body = os.urandom(size)
    storage.put(KEY, (body[at : at + 999_983] for at in range(0, size, 999_983)), size_bytes=size)
    found = bytearray(size)
    storage.read_into(KEY, 0, memoryview(found))
    assert found == body
    assert storage.size(KEY) == size
    assert server.uploads(bucket) == []


class _Stop(Exception):
    """What the caller's own iterator raises."""


@pytest.mark.processes
@pytest.mark.parametrize("ends_by", [_Stop, KeyboardInterrupt, GeneratorExit, SystemExit])
@pytest.mark.parametrize("after", [0, 1, 3])
def test_no_exit_leaves_an_upload(
    storage: S3Storage, server: Any, bucket: str, ends_by: type[BaseException], after: int
) -> None:
    """Whatever is raised between two parts, the upload is aborted, and the exception is the caller's own."""

    def buffers() -> Iterator[Buffer]:
        for _ in range(after):
            yield bytes(PART)
        raise ends_by

    with pytest.raises(ends_by):
        storage.put(KEY, buffers(), size_bytes=9 * PART)
    assert server.uploads(bucket) == []
    assert [*storage.list("")] == []


@pytest.mark.processes
def test_ctrl_c_of_a_real_process_leaves_no_upload(
    server: MotoServer | SeaweedFS, bucket: str, uploading: Uploading
) -> None:
    """A process in the middle of an upload gets SIGINT: it ends at once, and nothing is left or appears later."""
    with uploading(UPLOADER, bucket, server) as process:
        said = process.interrupt()
    assert said == ["interrupted"]
    assert server.uploads(bucket) == []


@pytest.mark.processes
def test_kill_9_leaves_an_upload_that_can_be_aborted_by_its_folder(
    server: MotoServer | SeaweedFS, bucket: str, storage: S3Storage, uploading: Uploading
) -> None:
    """Only SIGKILL leaves something: invisible, and gone when its folder's uploads are aborted; others are spared."""
    with uploading(UPLOADER, bucket, server) as process:
        process.kill()
    assert len(server.uploads(bucket)) == 1
    assert [*storage.list("")] == []
    assert storage.abort_uploads("checkpoint-2.00000000/") == 0
    assert storage.abort_uploads("checkpoint-1.00000000/") == 1
    assert server.uploads(bucket) == []


def faulty(server: MotoServer, proxy: FaultProxy, bucket: str) -> S3Storage:
    """A storage behind the proxy."""
    found = S3Storage(bucket, "run", {**server.storage_options(), "endpoint_url": proxy.url}, SMALL_PARTS)
    found.conditions = Conditions.HONOURED
    proxy.clear()
    return found


@pytest.mark.parametrize("begin", ["lost answers", "interrupted"])
def test_an_upload_whose_id_was_never_learnt_is_aborted_too(
    s3_server: MotoServer, s3_faults: FaultProxy, begin: str
) -> None:
    """The store has begun the upload and we do not know its id: it is found by its key and aborted."""
    name = f"u-{uuid.uuid4().hex[:10]}"
    s3_server.create_bucket(name)
    storage = faulty(s3_server, s3_faults, name)
    s3_faults.inject("drop_after", method="POST", match="uploads", times=2 if begin == "lost answers" else None)

    def buffers() -> Iterator[Buffer]:
        yield bytes(2 * PART)

    if begin == "lost answers":
        storage.put(KEY, buffers(), size_bytes=2 * PART)
        assert storage.size(KEY) == 2 * PART
    else:
        with pytest.raises(StorageError):
            storage.put(KEY, buffers(), size_bytes=2 * PART)
    assert s3_server.uploads(name) == []
    storage.close()


@pytest.mark.parametrize("source", [list, lambda buffers: BytesSource(*buffers)], ids=["buffers", "source"])
def test_an_upload_that_was_refused_is_not_looked_for(
    s3_server: MotoServer, s3_faults: FaultProxy, source: Any
) -> None:
    """A plain no to the beginning has begun nothing: one request, by the client or for the lane, and no listing."""
    name = f"u-{uuid.uuid4().hex[:10]}"
    s3_server.create_bucket(name)
    storage = faulty(s3_server, s3_faults, name)
    storage.put(KEY, [b"whole"], size_bytes=5)
    s3_faults.clear()
    s3_faults.inject("status", method="POST", match="uploads", status=403)
    with pytest.raises(StorageError, match=f"{KEY}.*403"):
        storage.put(KEY, source([bytes(2 * PART)]), size_bytes=2 * PART)
    assert [(request.method, request.status) for request in s3_faults.requests] == [("POST", 403)]
    storage.close()


def test_a_server_that_knows_no_checksums_is_asked_without(s3_server: MotoServer, s3_faults: FaultProxy) -> None:
    """A server that refuses the checksum headers with 501 gets the same object without them, from then on."""
    name = f"u-{uuid.uuid4().hex[:10]}"
    s3_server.create_bucket(name)
    storage = faulty(s3_server, s3_faults, name)

    def has_checksum(request: Any) -> bool:
        return any(header.lower().startswith("x-amz-checksum-") for header in request.headers)

    refused: Any = s3_faults.inject("status", status=501, when=has_checksum, times=None)
    storage.put(KEY, [b"12345"], size_bytes=5)
    storage.put("other", [b"12345"], size_bytes=5)
    assert storage.size(KEY) == storage.size("other") == 5
    assert refused.hits == 1
    storage.close()


@pytest.mark.processes
def test_a_body_that_is_damaged_on_the_way_is_refused_by_a_server_that_checks(seaweedfs: SeaweedFS) -> None:
    """A checksum that does not fit is an error, and nothing becomes visible."""
    seaweedfs.create_bucket("damage")
    with FaultProxy(seaweedfs.url) as proxy:
        storage = S3Storage("damage", "run", {**seaweedfs.storage_options(), "endpoint_url": proxy.url}, SMALL_PARTS)
        proxy.inject("flip_request", method="PUT")
        with pytest.raises(StorageError, match=r"BadDigest|InvalidDigest|XAmzContentSHA256Mismatch|checksum"):
            storage.put(KEY, [os.urandom(1000)], size_bytes=1000)
        assert [*storage.list("")] == []
        storage.close()


def gcs(server: FakeGCS, proxy: FaultProxy, **words: Any) -> GCSStorage:
    """A GCS storage behind the proxy, in a fresh bucket."""
    bucket = f"u-{uuid.uuid4().hex[:10]}"
    server.create_bucket(bucket)
    options = {**server.storage_options(), "endpoint_url": proxy.url}
    found = GCSStorage(bucket, "run", options, SMALL_PARTS, **words)
    found.conditions = Conditions.HONOURED
    proxy.clear()
    return found


@pytest.mark.parametrize("action", ["drop_after", "drop_before", "status"])
@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_resumable_upload_goes_on_where_the_store_has_come(
    gcs_server: FakeGCS, gcs_faults: FaultProxy, action: Any, number: int
) -> None:
    """Whichever chunk's answer is lost, no byte is stored twice and none is missing."""
    storage = gcs(gcs_server, gcs_faults)
    body = os.urandom(2 * PART + 77)
    gcs_faults.inject(action, method="PUT", skip=number)
    storage.put(KEY, [body], size_bytes=len(body))
    found = bytearray(len(body))
    storage.read_into(KEY, 0, memoryview(found))
    assert found == body
    assert gcs_server.uploads() == []
    storage.close()


@pytest.mark.parametrize("ends_by", [_Stop, KeyboardInterrupt])
def test_a_resumable_upload_is_cancelled_by_any_exit(
    gcs_server: FakeGCS, gcs_faults: FaultProxy, ends_by: type[BaseException]
) -> None:
    """The session is cancelled, and nothing is visible."""
    storage = gcs(gcs_server, gcs_faults)

    def buffers() -> Iterator[Buffer]:
        yield bytes(2 * PART)
        raise ends_by

    with pytest.raises(ends_by):
        storage.put(KEY, buffers(), size_bytes=4 * PART)
    assert gcs_server.uploads() == []
    assert [*storage.list("")] == []
    storage.close()


def test_what_google_says_it_has_is_compared(gcs_server: FakeGCS, gcs_faults: FaultProxy) -> None:
    """An answer that names another checksum than ours is an error, and the object is taken away again."""
    storage = gcs(gcs_server, gcs_faults)
    storage.put(KEY, [b"12345"], size_bytes=5)
    lie = b'{"name": "run/x", "size": "5", "crc32c": "AAAAAA==", "generation": "1"}'
    gcs_faults.inject("status", status=200, body=lie, method="POST")
    with pytest.raises(StorageError, match="damaged on the way"):
        storage.put(KEY, [b"12345"], size_bytes=5)
    deletes = [request for request in gcs_faults.requests if request.method == "DELETE"]
    assert len(deletes) == 1
    assert "ifGenerationMatch=1" in deletes[0].query
    storage.close()


def test_manifest_writes_are_spaced_for_google(gcs_server: FakeGCS, gcs_faults: FaultProxy) -> None:
    """A store that takes one write per 0.2 s of one object never answers 429 to a writer that spaces them by that."""
    with FakeGCS(write_spacing_s=0.2) as strict, FaultProxy(strict.url) as proxy:
        storage = gcs(strict, proxy, spacing_s=0.22)
        outcome: Any = storage.create("manifest.json", b"0")
        for n in range(1, 4):
            outcome = storage.replace("manifest.json", b"%d" % n, expecting=outcome.version)
        assert storage.read("manifest.json", limit_bytes=10).body == b"3"
        assert [request.status for request in proxy.requests] == [200] * 4 + [206]
        storage.close()


@pytest.mark.parametrize("kind", ["s3", "gcs"])
def test_a_server_that_never_answers_is_given_up_in_time(kind: str, s3_server: MotoServer, gcs_server: FakeGCS) -> None:
    """A request that hangs is an error that says for how long it was waited."""
    patience = Settings(request_timeout_s=1, storage_deadline_s=0.5, retry_base_s=0.01)
    server: Any = s3_server if kind == "s3" else gcs_server
    bucket = f"u-{uuid.uuid4().hex[:10]}"
    server.create_bucket(bucket)
    with FaultProxy(server.url) as proxy:
        options = {**server.storage_options(), "endpoint_url": proxy.url}
        storage = (S3Storage if kind == "s3" else GCSStorage)(bucket, "run", options, patience)
        assert [*storage.list("")] == []  # the session is there: what follows is one request and no more
        hanging = proxy.inject("hang", times=None)
        with pytest.raises(StorageError, match=r"no answer within 1 s|[Tt]imeout"):
            storage.read("manifest.json", limit_bytes=10)
        assert hanging.hits >= 1
        storage.close()
