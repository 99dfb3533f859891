"""Candidates for the direct payload lane: the same bytes in the same parts, sent and received by different clients.

All are fed the tensors' own memory and fill it; none serialises, commits or keeps a manifest. What decides is the
client CPU a GiB, and whether a copy is made. See docs/adr/0012.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlsplit

from benchmarks.cases.base import Case, Place, case, peer, s3_options
from benchmarks.cases.floors import joined
from benchmarks.cases.s3_clients import obstore_of
from benchmarks.state import State, tensors, view

__all__: list[str] = []

_PART_BYTES = 16 << 20
_THREADS = 16


def _views(state: State) -> list[memoryview]:
    return joined([view(tensor) for tensor in tensors(state).values()])


def _cut(views: Sequence[memoryview]) -> Iterator[list[memoryview]]:
    """Parts of one size, each as views, without a copy."""
    part: list[memoryview] = []
    room = _PART_BYTES
    for whole in views:
        rest = whole
        while rest:
            part.append(rest[:room])
            room, rest = room - len(part[-1]), rest[len(part[-1]) :]
            if not room:
                yield part
                part, room = [], _PART_BYTES
    if part:
        yield part


class _OurStorage(Case):
    """cloudckpt's own storage of S3, over the lane or over the session's client."""

    is_direct = True

    def prepare(self, state: State) -> None:
        from cloudckpt import Settings
        from cloudckpt.storage import S3Storage

        settings = Settings(direct_lane=self.is_direct, connections=_THREADS, part_size_bytes=_PART_BYTES)
        self.storage = S3Storage(self.place.bucket, self.place.key, s3_options(), settings)
        self.storage.put("manifest.json", [b"{}"], size_bytes=2)

    def close(self) -> None:
        self.storage.close()


class _Up(_OurStorage):
    def run(self, state: State, repetition: int) -> None:
        from cloudckpt.testing import BytesSource

        source = BytesSource(*_views(state), slice_bytes=_PART_BYTES)
        self.storage.put(f"{repetition}/payload", source, size_bytes=source.size_bytes)


@case("save-lanes", "ours")
class http_client(_Up):  # noqa: N801 - the case's name
    """The lane: http.client in threads, parts with their CRC-32C."""


@case("save-lanes", "client")
class aiobotocore(_Up):  # noqa: N801 - the same
    """The session's client: what the lane falls back to."""

    is_direct = False


def _signed(method: str, key: str, query: str = "") -> tuple[str, dict[str, str]]:
    from cloudckpt.storage.direct.sigv4 import Credentials, quoted_path, signed

    endpoint = os.environ["AWS_ENDPOINT_URL"]
    path = quoted_path(f"/{key}")
    headers = signed(
        method,
        path,
        query,
        {"Host": urlsplit(endpoint).netloc},
        credentials=Credentials(os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"]),
        region="us-east-1",
        service="s3",
        now=datetime.fromtimestamp(time.time(), UTC),
    )
    return f"{endpoint}{path}" + (f"?{query}" if query else ""), headers


@functools.cache
def _pool() -> Any:
    trust = os.environ.get("BENCH_CERTIFICATE")
    return (
        peer("urllib3").PoolManager(maxsize=_THREADS, ca_certs=trust)
        if trust
        else peer("urllib3").PoolManager(maxsize=_THREADS)
    )


@case("save-lanes", "client")
class urllib3(Case):  # noqa: N801 - the same
    """The same threads over urllib3, whose body may be an iterator of views."""

    def run(self, state: State, repetition: int) -> None:
        import re

        from cloudckpt.storage.s3_errors import AnsweredError

        key = f"{self.place.path}/{repetition}"
        url, headers = _signed("POST", key, "uploads=")
        begun = _pool().request("POST", url, headers=headers)
        found = re.search(rb"<UploadId>(.*?)</UploadId>", begun.data)
        if found is None:
            raise AnsweredError.of(begun.status, {}, begun.data)
        upload = found[1].decode()

        def send(numbered: tuple[int, list[memoryview]]) -> str:
            import crc32c

            number, part = numbered
            value = 0
            for piece in part:
                value = crc32c.crc32c(piece, value)
            url, headers = _signed("PUT", key, f"partNumber={number}&uploadId={upload}")
            headers["content-length"] = str(sum(map(len, part)))
            answer = _pool().request("PUT", url, headers=headers, body=iter(part))
            return str(answer.headers["ETag"])

        with ThreadPoolExecutor(_THREADS) as threads:
            tags = [*threads.map(send, enumerate(_cut(_views(state)), 1))]
        parts = "".join(f"<Part><PartNumber>{n}</PartNumber><ETag>{tag}</ETag></Part>" for n, tag in enumerate(tags, 1))
        url, headers = _signed("POST", key, f"uploadId={upload}")
        _pool().request(
            "POST", url, headers=headers, body=f"<CompleteMultipartUpload>{parts}</CompleteMultipartUpload>"
        )


@case("save-lanes", "client")
def obstore(state: State, place: Place) -> None:
    """Obstore (Rust), fed an iterator of views."""
    put = peer("obstore").put
    put(obstore_of(place.bucket), place.key, iter(_views(state)), chunk_size=_PART_BYTES, max_concurrency=_THREADS)


@functools.cache
def _opendal(bucket: str) -> Any:
    return peer("opendal").Operator(
        "s3",
        bucket=bucket,
        endpoint=os.environ["AWS_ENDPOINT_URL"],
        region="us-east-1",
        access_key_id=os.environ["AWS_ACCESS_KEY_ID"],
        secret_access_key=os.environ["AWS_SECRET_ACCESS_KEY"],
        enable_virtual_host_style="false",
    )


@case("save-lanes", "client")
def opendal(state: State, place: Place) -> None:
    """Opendal (Rust): a file that is written to, in parts."""
    with _opendal(place.bucket).open(place.key, "wb", chunk=_PART_BYTES, concurrent=_THREADS) as file:
        for piece in _views(state):
            file.write(bytes(piece))  # it takes bytes only


# -- down --------------------------------------------------------------------------------------------------------

Read = Callable[[int, list[memoryview]], None]


def _down(state: State, read: Read) -> None:
    """Fill the tensors by ranges of one part each, side by side."""
    parts = [*_cut([view(tensor) for tensor in tensors(state).values()])]
    starts = [n * _PART_BYTES for n in range(len(parts))]
    with ThreadPoolExecutor(_THREADS) as threads:
        for _ in threads.map(read, starts, parts):
            pass


class _Down(_OurStorage):
    def run(self, state: State, repetition: int) -> None:
        _down(state, lambda start, part: self.storage.read_into("raw", start, *part))


@case("load-lanes", "ours", name="http_client")
class _HttpClientDown(_Down):
    """The lane: http.client in threads, into the tensors' memory."""


@case("load-lanes", "client", name="aiobotocore")
class _AiobotocoreDown(_Down):
    """The session's client: what the lane falls back to."""

    is_direct = False


@case("load-lanes", "client", name="urllib3")
def _urllib3_down(state: State, place: Place) -> None:
    """The same threads over urllib3, whose readinto reads bytes first."""

    def read(start: int, part: list[memoryview]) -> None:
        url, headers = _signed("GET", f"{place.path}/raw")
        headers["range"] = f"bytes={start}-{start + sum(map(len, part)) - 1}"
        answer = _pool().request("GET", url, headers=headers, preload_content=False)
        for target in part:
            done = 0
            while done < len(target) and (count := answer.readinto(target[done:])):
                done += count
        answer.drain_conn()
        answer.release_conn()

    _down(state, read)


@case("load-lanes", "client", name="obstore")
def _obstore_down(state: State, place: Place) -> None:
    """Obstore (Rust): ranges as buffers, copied into place."""
    get = peer("obstore").get_range

    def read(start: int, part: list[memoryview]) -> None:
        found = memoryview(get(obstore_of(place.bucket), f"{place.key}/raw", start=start, length=sum(map(len, part))))
        at = 0
        for target in part:
            target[:] = found[at : at + len(target)]
            at += len(target)

    _down(state, read)
