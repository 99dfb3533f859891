"""What a hostile look at S3's lane found: each test is one way in which it went wrong."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import uuid
from dataclasses import replace
from typing import Any

import pytest

import cloudckpt
from cloudckpt import ObjectNotFoundError, Settings, StorageError
from cloudckpt.storage import Conditions, S3Storage, remote
from cloudckpt.storage.direct import Address, Wire
from cloudckpt.testing import BytesSource
from cloudckpt.testing.fault_proxy import FaultProxy
from cloudckpt.testing.servers import MotoServer, free_ports
from tests.storage.direct.conftest import Forked
from tests.storage.direct.test_s3_lane import KEY, PART, SMALL_PARTS, Make, bucket, opened, sent_and_back
from tests.storage.direct.test_wire import Server, read_request

__all__ = ["bucket", "opened"]  # fixtures

#: One connection, so that an object of more than 64 MiB goes in two parts, one after the other.
ONE_BY_ONE = Settings(part_size_bytes=PART, connections=1, retry_base_s=0.01, retry_cap_s=0.05, storage_deadline_s=5)
TWO_PARTS = 65 * 1024 * 1024
EXPIRED = b"<Error><Code>ExpiredToken</Code><Message>The provided token has expired.</Message></Error>"


def test_a_bucket_called_like_the_host_is_still_found_in_the_path(s3_server: MotoServer) -> None:
    """Bucket ``127`` on ``127.0.0.1``, or ``minio`` on ``minio.svc``: payload goes into the bucket that was named."""
    prefix = f"run-{uuid.uuid4().hex[:8]}"
    s3_server.create_bucket("127")
    s3_server.create_bucket(prefix)  # where an object whose bucket was taken for the host's would go
    storage = S3Storage("127", prefix, s3_server.storage_options(), SMALL_PARTS)
    storage.conditions = Conditions.HONOURED
    client = s3_server.client()
    try:
        storage.put("manifest.json", [b"{}"], size_bytes=2)
        storage.put("checkpoint-1.00000000/payload", BytesSource(b"weights"), size_bytes=7)
        assert storage._lane.declined is None
        assert "Contents" not in client.list_objects_v2(Bucket=prefix)
        found = [item["Key"] for item in client.list_objects_v2(Bucket="127", Prefix=prefix)["Contents"]]
        assert found == [f"{prefix}/checkpoint-1.00000000/payload", f"{prefix}/manifest.json"]
    finally:
        client.close()
        storage.close()


def test_bytes_of_another_range_are_not_taken_for_those_asked_for(s3_server: MotoServer, opened: Make) -> None:
    """A cache that answers with another range of the same length has not answered."""
    with FaultProxy(s3_server.url) as proxy:
        storage = opened(s3_server, through=proxy.url)
        storage.put(KEY, BytesSource(b"0123456789"), size_bytes=10)
        proxy.inject(
            "status", method="GET", match="pay", status=206, body=b"56789", headers={"Content-Range": "bytes 5-9/10"}
        )
        with pytest.raises(StorageError) as caught:
            storage.read_into(KEY, 0, memoryview(bytearray(5)))
    assert caught.value.retryable


def test_a_total_in_a_cut_header_is_not_believed(s3_server: MotoServer, opened: Make) -> None:
    """An answer that broke off in its headers proves nothing about what exists: "/1" was the beginning of "/100"."""

    def cut(connection: socket.socket) -> None:
        read_request(connection)
        connection.sendall(b"HTTP/1.1 206 Partial Content\r\nContent-Range: bytes 0-99/1")

    storage = opened(s3_server)
    with Server(cut) as server:
        route = storage._lane._find_route()
        storage._lane._route = replace(route, wire=Wire(Address.of(server.url), progress_s=5))
        with pytest.raises(StorageError) as caught:
            storage.read_into(KEY, 0, memoryview(bytearray(100)))
    assert not isinstance(caught.value, ObjectNotFoundError)


def test_credentials_that_expire_twice_in_one_upload_are_renewed_twice(
    s3_server: MotoServer, opened: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the store took in between shows that reading the credentials again does help."""
    monkeypatch.setattr(remote, "_RENEWAL_S", 0.0)  # an hour lies between two expiries; here nothing does
    with FaultProxy(s3_server.url) as proxy:
        storage = opened(s3_server, through=proxy.url, settings=ONE_BY_ONE)
        expired = [
            proxy.inject("status", method="PUT", match=f"partNumber={number}&", status=400, body=EXPIRED)
            for number in (1, 2)
        ]
        sent_and_back(storage, TWO_PARTS)
        assert [fault.hits for fault in expired] == [1, 1]
        assert storage._lane.declined is None


def test_credentials_that_expire_for_all_parts_are_renewed_once(
    s3_server: MotoServer, opened: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four parts are told that the same token has expired: the session reads its credentials once, not four times."""
    many = Settings(part_size_bytes=PART, connections=4, retry_base_s=0.01, retry_cap_s=0.05, storage_deadline_s=5)
    with FaultProxy(s3_server.url) as proxy:
        storage = opened(s3_server, through=proxy.url, settings=many)
        sent_and_back(storage, PART)
        together = threading.Barrier(4)

        def is_part(request: Any) -> bool:
            return "partNumber" in request.query

        proxy.inject("status", method="PUT", when=is_part, status=400, body=EXPIRED, times=4)
        explain, renew = storage.explain, storage.renew_credentials
        renewed: list[int] = []

        def all_at_once(exc: BaseException, what: str) -> StorageError:
            if "ExpiredToken" in str(exc):
                together.wait(10)
            return explain(exc, what)

        def counted() -> None:
            renewed.append(1)
            renew()

        monkeypatch.setattr(storage, "explain", all_at_once)
        monkeypatch.setattr(storage, "renew_credentials", counted)
        sent_and_back(storage, 4 * PART)
        assert len(renewed) == 1


def test_the_lane_takes_the_proxy_that_the_session_takes(
    s3_server: MotoServer, opened: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ALL_PROXY is not read by botocore, so the lane does not either."""
    (nobody,) = free_ports(1)
    for name in ("http_proxy", "HTTP_PROXY", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ALL_PROXY", f"http://127.0.0.1:{nobody}")
    storage = opened(s3_server)
    sent_and_back(storage, PART + 1)
    assert storage._lane.declined is None


def test_progress_is_told_once_although_the_client_takes_over(s3_server: MotoServer, opened: Make) -> None:
    """A small object that the lane is refused and the client sends counts once."""
    with FaultProxy(s3_server.url) as proxy:
        storage = opened(s3_server, through=proxy.url)

        def is_unsigned(request: Any) -> bool:
            return bool(request.headers.get("x-amz-content-sha256") == "UNSIGNED-PAYLOAD")

        proxy.inject("status", status=403, when=is_unsigned, times=None)
        sent_and_back(storage, 1000)


def test_a_refusal_that_is_not_about_checksums_keeps_them(s3_server: MotoServer, opened: Make) -> None:
    """An upload that is refused with and without its checksum says nothing about checksums: the next one has them."""
    with FaultProxy(s3_server.url) as proxy:
        storage = opened(s3_server, through=proxy.url)
        sent_and_back(storage, 2 * PART)
        refused = proxy.inject("status", method="PUT", match="partNumber", status=400, times=None)
        with pytest.raises(StorageError, match="400 InvalidRequest"):
            storage.put(KEY, BytesSource(bytes(2 * PART)), size_bytes=2 * PART)
        refused.remove()
        proxy.clear()
        sent_and_back(storage, 2 * PART)
        parts = [request for request in proxy.requests if "partNumber" in request.query]
        assert all("x-amz-checksum-crc32c" in request.headers for request in parts)


def test_a_close_in_mid_upload_is_an_error_of_the_storage(s3_server: MotoServer, opened: Make, bucket: str) -> None:
    """Somebody closes the storage while a part is on its way: the upload ends, or fails by name and is aborted."""
    with FaultProxy(s3_server.url) as proxy:
        storage = opened(s3_server, through=proxy.url, settings=ONE_BY_ONE)
        held = proxy.inject("hold_after", method="PUT", match="partNumber=1&")
        closing: list[threading.Thread] = []

        def close() -> None:
            assert held.wait()
            thread = threading.Thread(target=storage.close)
            thread.start()
            closing.append(thread)
            while storage._lane._crew._pool is not None:
                threading.Event().wait(0.001)
            held.release()

        closer = threading.Thread(target=close)
        closer.start()
        try:
            storage.put(KEY, BytesSource(bytes(TWO_PARTS)), size_bytes=TWO_PARTS)
        except StorageError:
            pass
        finally:
            closer.join(30)
            closing[0].join(30)
    assert s3_server.uploads(bucket) == []


def test_a_forked_child_can_close_a_storage_that_was_in_use(
    s3_server: MotoServer, opened: Make, forked_while_held: Forked
) -> None:
    """Another thread was finding the way when the process was forked; the child does not wait for it."""
    storage = opened(s3_server)
    sent_and_back(storage, 10)
    assert forked_while_held(storage._lane._mutex, storage.close) == 0


LAST_SAVE = """
import sys
import torch
import cloudckpt
manager = cloudckpt.CheckpointManager(sys.argv[1])
manager.save(1, {"w": torch.ones(3_000_000)})
"""


def test_a_save_in_the_background_survives_the_end_of_the_program(s3_root: str) -> None:
    """A program that ends without waiting for its last save has saved it."""
    done = subprocess.run(
        [sys.executable, "-c", LAST_SAVE, s3_root], check=False, capture_output=True, text=True, timeout=100
    )
    with cloudckpt.CheckpointManager(s3_root) as manager:
        assert [c.step for c in manager.checkpoints()] == [1], done.stderr


@pytest.mark.processes
@pytest.mark.parametrize(
    "name",
    ["a b", "é", "a+b", "~", "%41", "%", "x.", "a'(b)*!", "=&;:@,$", "a?b#c", "日本", "a\\b", "[x]", "..a", '`{|}^<>"'],
)
def test_odd_names_are_signed_as_the_store_reads_them(seaweedfs: Any, opened: Make, name: str) -> None:
    """The store that checks signatures takes every name; the client finds the object that the lane wrote."""
    storage = opened(seaweedfs)
    key = f"checkpoint-1.00000000/{name}"
    storage.put(key, BytesSource(b"12345"), size_bytes=5)
    assert storage._lane.declined is None
    target = bytearray(5)
    storage.read_into(key, 0, memoryview(target))
    assert target == b"12345"
    assert storage.size(key) == 5


def test_a_store_that_is_too_busy_to_read_from_gets_fewer_requests_at_once(s3_server: MotoServer, opened: Make) -> None:
    """SlowDown means the same for a read as for a write."""
    with FaultProxy(s3_server.url) as proxy:
        storage = opened(s3_server, through=proxy.url)
        storage.put(KEY, BytesSource(b"12345"), size_bytes=5)
        proxy.inject("status", method="GET", status=503)
        with pytest.raises(StorageError, match="503"):
            storage.read_into(KEY, 0, memoryview(bytearray(5)))
        assert storage._lane._crew.limit < 4
