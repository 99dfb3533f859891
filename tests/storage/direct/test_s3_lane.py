"""S3's direct lane on real servers: what was sent comes back, faults cost a part, refusals go to the client.

(Past 350 lines: everything that may happen between the lane and a store is one list.)
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cloudckpt import ObjectNotFoundError, SaveError, Settings, StorageError
from cloudckpt.storage import Conditions, S3Storage
from cloudckpt.storage.base import Part
from cloudckpt.testing import BytesSource
from cloudckpt.testing.fault_proxy import FaultProxy
from cloudckpt.testing.servers import MotoServer, SeaweedFS

PART = 5 * 1024 * 1024
SMALL_PARTS = Settings(
    part_size_bytes=PART, connections=4, retry_base_s=0.01, retry_cap_s=0.05, storage_deadline_s=5, request_timeout_s=5
)
KEY = "checkpoint-1.00000000/pay load+é"

UPLOADER = """
import os, sys
from cloudckpt import Settings
from cloudckpt.storage import S3Storage
from cloudckpt.testing import BytesSource
part = 5 * 1024 * 1024
storage = S3Storage(sys.argv[1], "run", {}, Settings(part_size_bytes=part, connections=2, max_bandwidth=4 * part))
storage.put("manifest.json", [b"{}"], size_bytes=2)
try:
    storage.put("checkpoint-1.00000000/payload", BytesSource(bytes(1000 * part)), size_bytes=1000 * part,
                progress=lambda _: print("sending", flush=True))
except KeyboardInterrupt:
    print("interrupted", storage._lane.declined, flush=True)
storage.close()
"""


@pytest.fixture
def bucket() -> str:
    """One bucket for all: SeaweedFS reserves volumes for each."""
    return "lane"


Make = Callable[..., S3Storage]


@pytest.fixture
def opened(bucket: str) -> Iterator[Make]:
    """Makes storages whose lane has seen the way already; ``through`` is a proxy in front of the server."""
    made: list[S3Storage] = []

    def make(server: Any, *, through: str | None = None, settings: Settings = SMALL_PARTS, **options: Any) -> S3Storage:
        server.create_bucket(bucket)
        asked = {**server.storage_options(), **options}
        if through is not None:
            asked["endpoint_url"] = through
        found = S3Storage(bucket, uuid.uuid4().hex, asked, settings)
        found.conditions = Conditions.HONOURED
        found.put("manifest.json", [b"{}"], size_bytes=2)
        made.append(found)
        return found

    yield make
    for storage in made:
        storage.close()


def sent_and_back(storage: S3Storage, size: int) -> BytesSource:
    """Send random bytes, read them back in two targets, compare; gives the source."""
    body = os.urandom(size)
    source = BytesSource(body[: size // 3], body[size // 3 :])
    told: list[int] = []
    storage.put(KEY, source, size_bytes=size, progress=told.append)
    assert sum(told) == size
    found = [bytearray(size // 2), bytearray(size - size // 2)]
    storage.read_into(KEY, 0, *[memoryview(target) for target in found])
    assert found[0] + found[1] == body
    return source


@pytest.mark.processes
@pytest.mark.parametrize("size", [1, PART, PART + 1, 3 * PART + 7])
def test_what_comes_back_is_what_was_sent(server: Any, opened: Make, bucket: str, size: int) -> None:
    """Objects around the size of a part go over the lane, every byte is asked for once, and no upload is left."""
    storage = opened(server)
    source = sent_and_back(storage, size)
    assert storage._lane.declined is None
    assert sorted(source.held) == [(at, min(PART, size - at)) for at in range(0, size, PART)]
    assert server.uploads(bucket) == []


@pytest.mark.processes
def test_a_range_that_is_not_there_is_proven_missing(server: Any, opened: Make) -> None:
    """No object, a range after its end, a range over its end: all three are told as missing."""
    storage = opened(server)
    sent_and_back(storage, 1000)
    for key, start in (("nothing", 0), (KEY, 1000), (KEY, 996)):
        with pytest.raises(ObjectNotFoundError):
            storage.read_into(key, start, memoryview(bytearray(5)))
    assert storage._lane.declined is None


def test_requests_are_the_parts_and_nothing_else(s3_server: MotoServer, opened: Make) -> None:
    """Three parts: create, three PUTs, complete; a range: one GET. No LIST, HEAD or COPY."""
    with FaultProxy(s3_server.url) as proxy:
        storage = opened(s3_server, through=proxy.url)
        proxy.clear()
        sent_and_back(storage, 2 * PART + 1)
        methods = sorted(request.method for request in proxy.requests)
        assert methods == ["GET", "POST", "POST", "PUT", "PUT", "PUT"]
        checked = [r for r in proxy.requests if r.method == "PUT" and "x-amz-checksum-crc32c" in r.headers]
        assert len(checked) == 3


@pytest.mark.parametrize("action", ["drop_before", "drop_after", "status"])
@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_fault_costs_a_part_and_not_the_upload(
    s3_server: MotoServer, opened: Make, bucket: str, action: Any, number: int
) -> None:
    """Whichever part is dropped, unanswered or refused with 503, it is sent again, and the object is whole."""
    with FaultProxy(s3_server.url) as proxy:
        storage = opened(s3_server, through=proxy.url)
        proxy.inject(action, method="PUT", match="partNumber", skip=number)
        sent_and_back(storage, 3 * PART)
        assert storage._lane.declined is None
        assert s3_server.uploads(bucket) == []


class Stopped(BytesSource):
    """Stopped by somebody else as soon as its first part is under way."""

    def __init__(self, size: int) -> None:
        super().__init__(bytes(size))
        self.acts: list[Callable[[], None]] = []
        self.reason: str | None = None

    @contextlib.contextmanager
    def stopping(self, act: Callable[[], None]) -> Iterator[None]:
        self.acts.append(act)
        yield
        self.acts.remove(act)

    @contextlib.contextmanager
    def hold(self, start: int, length: int) -> Iterator[Part]:
        if self.reason:
            raise SaveError(self.reason)
        with super().hold(start, length) as part:
            yield part


def test_parts_under_way_are_broken_off_when_the_source_is_stopped(
    s3_server: MotoServer, opened: Make, bucket: str
) -> None:
    """At once and not when they have been sent; with the source's reason, and without an upload left."""
    with FaultProxy(s3_server.url) as proxy:
        storage = opened(s3_server, through=proxy.url, settings=replace(SMALL_PARTS, request_timeout_s=600))
        held: Any = proxy.inject("hold_after", method="PUT", match="partNumber=1&")
        source = Stopped(3 * PART)

        def stop() -> None:
            held.wait(60)
            source.reason = "another rank is gone"
            for act in [*source.acts]:
                act()

        stopping = threading.Thread(target=stop)
        stopping.start()
        with pytest.raises(SaveError, match="another rank is gone"):
            storage.put(KEY, source, size_bytes=3 * PART)
        stopping.join()
        held.release()
        assert storage._lane.declined is None
        assert s3_server.uploads(bucket) == []


def test_a_store_that_is_busy_gets_fewer_requests_at_once(s3_server: MotoServer, opened: Make) -> None:
    """SlowDown halves how many requests are under way."""
    with FaultProxy(s3_server.url) as proxy:
        storage = opened(s3_server, through=proxy.url)
        proxy.inject("status", method="PUT", match="partNumber", status=503, times=3)
        sent_and_back(storage, 3 * PART)
        assert storage._lane._crew.limit < 4


@pytest.mark.processes
def test_a_part_that_is_damaged_on_the_way_is_sent_again(seaweedfs: SeaweedFS, opened: Make) -> None:
    """The store compares the checksum of each part; memory is as it was, so the part goes again and the object is whole."""
    with FaultProxy(seaweedfs.url) as proxy:
        storage = opened(seaweedfs, through=proxy.url)
        flipped = proxy.inject("flip_request", method="PUT", match="partNumber=2")
        sent_and_back(storage, 2 * PART + 5)
        assert flipped.hits == 1


def test_bytes_that_change_during_the_save_are_not_sent_again(s3_server: MotoServer, opened: Make, bucket: str) -> None:
    """A part that must be sent again and has other bytes by then fails the save by name; nothing is visible."""
    body = bytearray(2 * PART)
    with FaultProxy(s3_server.url) as proxy:
        storage = opened(s3_server, through=proxy.url)

        def change(request: Any) -> bool:
            body[7] ^= 1
            return True

        proxy.inject("status", method="PUT", match="partNumber=1", when=change)
        with pytest.raises(StorageError, match="changed while they were being sent"):
            storage.put(KEY, BytesSource(body), size_bytes=len(body))
        assert [item.key for item in storage.list("checkpoint")] == []
    assert s3_server.uploads(bucket) == []


def test_endless_refusals_end_at_the_deadline(s3_server: MotoServer, opened: Make, bucket: str) -> None:
    """503 for ever: an error within the deadline, and the upload is aborted."""
    patient = Settings(part_size_bytes=PART, retry_base_s=0.01, retry_cap_s=0.05, storage_deadline_s=0.5)
    with FaultProxy(s3_server.url) as proxy:
        storage = opened(s3_server, through=proxy.url, settings=patient)
        proxy.inject("status", method="PUT", match="partNumber=2", status=503, times=None)
        with pytest.raises(StorageError, match="503"):
            storage.put(KEY, BytesSource(bytes(2 * PART)), size_bytes=2 * PART)
    assert s3_server.uploads(bucket) == []


def test_a_truncated_or_broken_download_is_an_error(s3_server: MotoServer, opened: Make) -> None:
    """Half of a body, or none: a retryable error, never a success with other bytes."""
    with FaultProxy(s3_server.url) as proxy:
        storage = opened(s3_server, through=proxy.url)
        sent_and_back(storage, 1000)
        for action in ("truncate", "drop_after", "drop_before"):
            proxy.inject(action, method="GET")
            with pytest.raises(StorageError) as told:
                storage.read_into(KEY, 0, memoryview(bytearray(1000)))
            assert told.value.retryable


@pytest.mark.processes
def test_credentials_that_expire_in_mid_upload_are_renewed(seaweedfs: SeaweedFS, opened: Make) -> None:
    """ExpiredToken for a part: the session reads its credentials anew, and the part is sent again."""
    with FaultProxy(seaweedfs.url) as proxy:
        storage = opened(seaweedfs, through=proxy.url)
        expired = b"<Error><Code>ExpiredToken</Code><Message>The provided token has expired.</Message></Error>"
        proxy.inject("status", method="PUT", match="partNumber=2", status=400, body=expired)
        before = storage._running().asyncio
        sent_and_back(storage, 3 * PART)
        assert storage._lane.declined is None
        assert len(storage._sets[before].outdated) == 1


def test_a_refusal_of_the_first_request_is_taken_to_the_client(
    s3_server: MotoServer, opened: Make, caplog: pytest.LogCaptureFixture
) -> None:
    """A server that refuses what only the lane sends gets the payload from the client; the reason is logged once."""
    with FaultProxy(s3_server.url) as proxy:
        storage = opened(s3_server, through=proxy.url)

        def is_unsigned(request: Any) -> bool:
            return bool(request.headers.get("x-amz-content-sha256") == "UNSIGNED-PAYLOAD")

        proxy.inject("status", status=403, when=is_unsigned, times=None)
        with caplog.at_level(logging.INFO, "cloudckpt"):
            sent_and_back(storage, 2 * PART)
            sent_and_back(storage, 2 * PART)
        assert storage._lane.declined == "the store refused its first request (403 AccessDenied)"
        assert "s3fs" in storage.describe()["lane"]
        assert "403 AccessDenied" in storage.describe()["lane"]
        assert [r.message for r in caplog.records if "direct lane" in r.message] == [
            "payload goes through s3fs, not over the direct lane: the store refused its first request (403 AccessDenied)"
        ]


def test_what_the_client_carries_instead_is_told_once(s3_server: MotoServer, opened: Make) -> None:
    """An object of one request, refused to the lane and sent by the client: its bytes are progress once."""
    with FaultProxy(s3_server.url) as proxy:
        storage = opened(s3_server, through=proxy.url)
        refused = proxy.inject("status", method="PUT", status=403)
        sent_and_back(storage, 1000)
        assert refused.hits == 1
        assert storage._lane.declined is not None


def test_a_right_that_is_missing_is_told_by_the_client_and_not_held_against_the_lane(
    s3_server: MotoServer, opened: Make
) -> None:
    """403 to everybody: the error is the client's, and when the right is there the lane is used."""
    with FaultProxy(s3_server.url) as proxy:
        storage = opened(s3_server, through=proxy.url)
        refused = proxy.inject("status", method="PUT", status=403, times=None)
        with pytest.raises(StorageError, match="no permission"):
            storage.put(KEY, BytesSource(b"12345"), size_bytes=5)
        refused.remove()
        sent_and_back(storage, 2 * PART)
        assert storage._lane.declined is None


def test_a_server_without_checksums_gets_none(s3_server: MotoServer, opened: Make) -> None:
    """501 to a checksum header: the same part goes without, from then on."""
    with FaultProxy(s3_server.url) as proxy:
        storage = opened(s3_server, through=proxy.url)

        def has_checksum(request: Any) -> bool:
            return any(name.lower().startswith("x-amz-checksum-") for name in request.headers)

        proxy.inject("status", status=501, when=has_checksum, times=None)
        sent_and_back(storage, 2 * PART)
        assert storage._lane.declined is None


def test_options_of_the_filesystem_go_along(s3_server: MotoServer, opened: Make) -> None:
    """SSE-KMS, storage class and requester pays are sent where the client would send them, signed."""
    with FaultProxy(s3_server.url) as proxy:
        storage = opened(
            s3_server,
            through=proxy.url,
            requester_pays=True,
            s3_additional_kwargs={
                "ServerSideEncryption": "aws:kms",
                "SSEKMSKeyId": "a-key",
                "ExpectedBucketOwner": "1",
            },
        )
        proxy.clear()
        storage.put(KEY, BytesSource(b"12345"), size_bytes=5)
        storage.read_into(KEY, 0, memoryview(bytearray(5)))
        put, get = proxy.requests
        assert put.headers["x-amz-server-side-encryption"] == "aws:kms"
        assert put.headers["x-amz-server-side-encryption-aws-kms-key-id"] == "a-key"
        assert put.headers["x-amz-request-payer"] == get.headers["x-amz-request-payer"] == "requester"
        assert get.headers["x-amz-expected-bucket-owner"] == "1"
        assert "x-amz-server-side-encryption" not in get.headers


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"s3_additional_kwargs": {"SSECustomerAlgorithm": "AES256", "SSECustomerKey": "k" * 32}}, "SSECustomer"),
        ({"s3_additional_kwargs": {"Metadata": {"a": "b"}}}, "Metadata"),
        ({"config_kwargs": {"signature_version": "s3"}}, "signed with AWS"),
    ],
)
def test_what_the_lane_cannot_honour_is_left_to_the_client(
    s3_server: MotoServer, opened: Make, options: dict[str, Any], reason: str
) -> None:
    """Customer keys, metadata, old signatures: the payload arrives all the same, and the reason is shown."""
    storage = opened(s3_server, **options)
    storage.put(KEY, BytesSource(b"12345"), size_bytes=5)
    assert storage.size(KEY) == 5
    assert reason in (storage._lane.declined or "")


def test_the_lane_can_be_switched_off(s3_server: MotoServer, opened: Make) -> None:
    """Settings(direct_lane=False) leaves everything to the client."""
    storage = opened(s3_server, settings=Settings(direct_lane=False, part_size_bytes=PART))
    sent_and_back(storage, 2 * PART)
    assert storage._lane.declined == "Settings(direct_lane=False)"


def test_no_socket_is_opened_while_moto_mocks_in_process(
    s3_server: MotoServer, opened: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With mock_aws active the lane declines before it connects."""
    import moto

    storage = opened(s3_server)
    monkeypatch.setattr(socket, "create_connection", lambda *_, **__: pytest.fail("a socket was opened"))
    with moto.mock_aws():
        storage._lane.close()
        with pytest.raises(Exception, match="mock_aws"):
            storage._lane.check_uploads()


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_sends_and_receives(s3_server: MotoServer, opened: Make) -> None:
    """A child uses the parent's storage over connections of its own, and the parent's go on."""
    storage = opened(s3_server)
    sent_and_back(storage, 2 * PART)
    pid = os.fork()
    if pid == 0:
        try:
            sent_and_back(storage, 2 * PART)
            os._exit(0 if storage._lane.declined is None else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    sent_and_back(storage, 2 * PART)


@pytest.mark.processes
def test_ctrl_c_of_a_real_process_leaves_no_upload(
    server: Any, bucket: str, uploading: Callable[[str, str, Any], AbstractContextManager[Any]]
) -> None:
    """A process in the middle of an upload gets SIGINT: it ends at once, and nothing is left or appears later."""
    server.create_bucket(bucket)
    with uploading(UPLOADER, bucket, server) as process:
        said = process.interrupt()
    assert said[-1] == "interrupted None"
    assert server.uploads(bucket) == []


def test_over_tls_with_a_certificate_of_ones_own(
    s3_server: MotoServer, opened: Make, certificate: Path, tls_before: Callable[[str], AbstractContextManager[str]]
) -> None:
    """AWS_CA_BUNDLE or verify= is honoured as the client honours it, and without it the host is refused."""
    region = {"region_name": "us-east-1"}
    with tls_before(s3_server.url) as url:
        trusted = opened(s3_server, through=url, client_kwargs={**region, "verify": str(certificate)})
        sent_and_back(trusted, 2 * PART + 1)
        assert trusted._lane.declined is None
        careless = opened(s3_server, through=url, client_kwargs={**region, "verify": False})
        sent_and_back(careless, 1000)
        assert careless._lane.declined is None
        with pytest.raises(StorageError, match=r"(?i)certificate"):
            opened(s3_server, through=url)


def test_through_the_proxy_of_the_environment(
    s3_server: MotoServer, opened: Make, http_proxy: tuple[str, list[str]]
) -> None:
    """A proxy of the environment, or of the client's configuration, carries the payload too."""
    url, seen = http_proxy
    storage = opened(s3_server, config_kwargs={"proxies": {"http": url}})
    seen.clear()
    sent_and_back(storage, 2 * PART)
    assert storage._lane.declined is None
    assert sum("PUT http://" in line and "partNumber" in line for line in seen) == 2
