"""The benchmarks' S3 server keeps what it promises: conditions, small objects, ranges, uploads, counts, discarding."""

from __future__ import annotations

import http.client
import shutil
import socket
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import botocore.exceptions
import botocore.session
import pytest
import torch

from benchmarks.sink.process import SinkProcess, Statistics, make_certificate, statistics_of
from cloudckpt import CheckpointManager
from cloudckpt.config import Settings
from cloudckpt.storage import Storage
from cloudckpt.storage.s3 import S3Storage
from cloudckpt.testing import StorageContract

pytestmark = pytest.mark.processes

FAST = Settings(retry_base_s=0.01, retry_cap_s=0.1, storage_deadline_s=10, request_timeout_s=10)
MIB = 1 << 20


def _options(sink: SinkProcess) -> dict[str, Any]:
    client = {"region_name": "us-east-1"} | ({"verify": str(sink.certificate)} if sink.certificate else {})
    return {"endpoint_url": sink.url, "key": "sink", "secret": "sink", "client_kwargs": client}


@pytest.fixture(scope="module")
def keeping() -> Iterator[SinkProcess]:
    """A sink that keeps payload."""
    with SinkProcess() as sink:
        yield sink


@pytest.fixture(scope="module")
def discarding() -> Iterator[SinkProcess]:
    """A sink that drops payload."""
    with SinkProcess(discard=True) as sink:
        yield sink


def _client(sink: SinkProcess) -> Any:
    return botocore.session.get_session().create_client(
        "s3",
        endpoint_url=sink.url,
        aws_access_key_id="sink",
        aws_secret_access_key="sink",
        region_name="us-east-1",
    )


class TestContract(StorageContract):
    """The whole contract of a storage holds on it: cloudckpt's protocol needs no more of a store than this."""

    @pytest.fixture
    def prefix(self) -> str:
        return f"{uuid.uuid4().hex}/a prefix/with+odd %41 chars/é"

    @pytest.fixture
    def storage(self, keeping: SinkProcess, prefix: str) -> Iterator[Storage]:
        found = S3Storage("contract", prefix, _options(keeping), FAST)
        yield found
        found.close()

    @pytest.fixture
    def second_storage(self, keeping: SinkProcess, storage: Storage, prefix: str) -> Iterator[Storage]:
        found = S3Storage("contract", prefix, _options(keeping), FAST)
        yield found
        found.close()


def _state(fill: float) -> dict[str, Any]:
    return {"model": {"big": torch.full((600, 1000), fill), "small": torch.full((3,), fill)}, "epoch": int(fill)}


def _saved_and_restored(sink: SinkProcess) -> tuple[dict[str, Any], Statistics]:
    root = f"s3://bench/{uuid.uuid4().hex}"
    with CheckpointManager(root, storage_options=_options(sink)) as ckpts:
        ckpts.save(1, _state(0), block=True)
        before = statistics_of(sink.url)
        ckpts.save(2, _state(5), block=True)
        asked = statistics_of(sink.url).since(before)
    found = _state(0)
    with CheckpointManager(root, storage_options=_options(sink)) as ckpts:
        ckpts.restore(found)
    return found, asked


def test_a_run_is_saved_and_restored(keeping: SinkProcess) -> None:
    """What cloudckpt saved into a keeping sink comes back bit for bit."""
    found, _ = _saved_and_restored(keeping)
    assert torch.equal(found["model"]["big"], _state(5)["model"]["big"])
    assert torch.equal(found["model"]["small"], _state(5)["model"]["small"])
    assert found["epoch"] == 5


@pytest.mark.skipif(shutil.which("openssl") is None, reason="the certificate is made with the openssl program")
def test_a_run_is_saved_and_restored_over_tls(tmp_path: Path) -> None:
    """The same over TLS, with a certificate that the client verifies."""
    with SinkProcess(tls=make_certificate(tmp_path)) as sink:
        found, _ = _saved_and_restored(sink)
    assert sink.url.startswith("https://")
    assert torch.equal(found["model"]["big"], _state(5)["model"]["big"])


def test_requests_and_bytes_are_counted_by_kind(keeping: SinkProcess) -> None:
    """A steady save is told as what it is: one payload object, one index, two writes of the manifest."""
    _, asked = _saved_and_restored(keeping)
    assert asked.requests == {"Put": 4}
    assert asked.bytes_in > 600 * 1000 * 4
    assert asked.bytes_out == 0


def test_payload_is_dropped_and_json_is_kept(discarding: SinkProcess) -> None:
    """A discarding sink remembers a large body's size alone and gives zeros; a small or a JSON body it gives back."""
    store = _client(discarding)
    large = b"x" * (3 * MIB)
    for key in ("payload.bin", "index.json"):
        store.put_object(Bucket="b", Key=key, Body=large)
    store.put_object(Bucket="b", Key="small.bin", Body=b"small")
    assert store.get_object(Bucket="b", Key="payload.bin")["Body"].read() == bytes(3 * MIB)
    assert store.get_object(Bucket="b", Key="index.json")["Body"].read() == large
    assert store.get_object(Bucket="b", Key="small.bin")["Body"].read() == b"small"


def test_a_multipart_upload_is_the_sum_of_its_parts(keeping: SinkProcess) -> None:
    """Parts that came in any order make one object, of which every range can be had."""
    store = _client(keeping)
    parts = {1: b"a" * (2 * MIB), 2: b"b" * 100, 3: b"c" * (1 * MIB)}
    upload = store.create_multipart_upload(Bucket="b", Key="parts")["UploadId"]
    assert [u["UploadId"] for u in store.list_multipart_uploads(Bucket="b", Prefix="parts")["Uploads"]] == [upload]
    tags = {
        number: store.upload_part(Bucket="b", Key="parts", UploadId=upload, PartNumber=number, Body=parts[number])[
            "ETag"
        ]
        for number in (3, 1, 2)
    }
    told = [{"PartNumber": number, "ETag": tags[number]} for number in sorted(tags)]
    store.complete_multipart_upload(Bucket="b", Key="parts", UploadId=upload, MultipartUpload={"Parts": told})
    start, end = 2 * MIB - 2, 2 * MIB + 101
    got = store.get_object(Bucket="b", Key="parts", Range=f"bytes={start}-{end}")
    assert got["Body"].read() == b"aa" + b"b" * 100 + b"cc"
    assert got["ContentRange"] == f"bytes {start}-{end}/{3 * MIB + 100}"
    assert "Uploads" not in store.list_multipart_uploads(Bucket="b", Prefix="parts")


def test_an_aborted_upload_leaves_nothing(keeping: SinkProcess) -> None:
    """After an abort there is no object, and neither a part nor a completion is taken any more."""
    store = _client(keeping)
    upload = store.create_multipart_upload(Bucket="b", Key="aborted")["UploadId"]
    store.abort_multipart_upload(Bucket="b", Key="aborted", UploadId=upload)
    too_late: tuple[Callable[[], Any], ...] = (
        lambda: store.upload_part(Bucket="b", Key="aborted", UploadId=upload, PartNumber=1, Body=b"late"),
        lambda: store.complete_multipart_upload(
            Bucket="b", Key="aborted", UploadId=upload, MultipartUpload={"Parts": []}
        ),
    )
    for late in too_late:
        with pytest.raises(botocore.exceptions.ClientError, match="NoSuchUpload"):
            late()
    assert store.list_objects_v2(Bucket="b", Prefix="aborted")["KeyCount"] == 0


def test_a_listing_is_whole_over_its_pages(keeping: SinkProcess) -> None:
    """Every key comes once, in order; with a delimiter, every folder once."""
    store = _client(keeping)
    keys = sorted(f"listed/{number % 7}/{number:03}&<>" for number in range(40))
    for key in keys:
        store.put_object(Bucket="b", Key=key, Body=b"1")
    pages = store.get_paginator("list_objects_v2")
    found = [entry["Key"] for page in pages.paginate(Bucket="b", Prefix="listed/", PaginationConfig={"PageSize": 6})
             for entry in page["Contents"]]  # fmt: skip
    folders = [entry["Prefix"] for page in
               pages.paginate(Bucket="b", Prefix="listed/", Delimiter="/", PaginationConfig={"PageSize": 3})
               for entry in page["CommonPrefixes"]]  # fmt: skip
    assert found == keys
    assert folders == [f"listed/{number}/" for number in range(7)]


@pytest.mark.parametrize("size", [10, 3 * MIB], ids=["small", "large"])
@pytest.mark.parametrize("outer", [False, True], ids=["framed", "framed twice"])
def test_a_body_in_chunks_is_its_payload(keeping: SinkProcess, size: int, *, outer: bool) -> None:
    """The payload of an aws-chunked body is what is kept, whether or not HTTP frames it once more."""
    payload = bytes(range(256)) * (size // 256) + b"z" * (size % 256)
    half = len(payload) // 2
    framed = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in (payload[:half], payload[half:]))
    framed += b"0\r\nx-amz-checksum-crc32:AAAAAA==\r\n\r\n"
    headers = {"x-amz-decoded-content-length": str(len(payload)), "content-encoding": "aws-chunked"}
    url = urlsplit(keeping.url)
    connection = http.client.HTTPConnection(url.hostname or "", url.port)
    if outer:
        connection.request("PUT", "/b/chunked", iter([framed[:7], framed[7:]]), headers, encode_chunked=True)
    else:
        connection.request("PUT", "/b/chunked", framed, headers)
    assert connection.getresponse().read() == b""
    connection.request("GET", "/b/chunked")
    assert connection.getresponse().read() == payload
    connection.close()


def test_it_ends_when_its_holder_lets_go() -> None:
    """When its standard input closes the process is gone, and nobody listens on its port."""
    with SinkProcess() as sink:
        url = urlsplit(sink.url)
        socket.create_connection((url.hostname or "", url.port or 0)).close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((url.hostname or "", url.port or 0))
