"""Requests end: by their answer, by whoever waits, by a close in another thread, by garbage collection, by a fork."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import socket
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from cloudckpt import Settings, StorageError
from cloudckpt.storage import GCSStorage, S3Storage
from cloudckpt.storage.gcs_errors import Answer
from cloudckpt.storage.gcs_upload import ResumableUpload, Session
from cloudckpt.storage.loop import Loop, LoopClosed, Running
from cloudckpt.testing import FakeGCS
from cloudckpt.testing.fault_proxy import FaultProxy
from cloudckpt.testing.servers import MotoServer

QUICK = Settings(retry_base_s=0.001, retry_cap_s=0.01, storage_deadline_s=0.3, request_timeout_s=10)


async def nothing() -> None:
    """No clean-up."""


def test_a_coroutine_gives_what_it_returns_or_raises() -> None:
    """A result and an error come through; after the end nothing more is taken."""
    loop = Loop("test", nothing)

    async def one() -> int:
        return 1

    async def fail() -> int:
        raise ValueError("no")

    assert loop.run(one()) == 1
    with pytest.raises(ValueError, match="no"):
        loop.run(fail())
    loop.close()
    loop.close()
    late = one()
    with pytest.raises(LoopClosed):
        loop.run(late)
    late.close()


def test_whoever_cancels_waits_for_the_clean_up() -> None:
    """A coroutine that is broken off has cleaned up when cancel returns; one not begun never begins."""
    loop = Loop("test", nothing)
    begun, said = threading.Event(), []

    async def work() -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            said.append("cleaned up")

    running: Running[None] = Running(loop, work)
    running.begin()
    assert begun.wait(10)
    running.cancel()
    assert said == ["cleaned up"]
    never: Running[None] = Running(loop, work)
    never.cancel()
    loop.close()
    assert said == ["cleaned up"]


def test_a_close_ends_every_request_with_an_error_that_can_be_tried_again() -> None:
    """Requests under way in other threads, and those that come at that very moment, end; none hangs."""
    for _ in range(30):
        loop = Loop("test", nothing)
        begun = threading.Semaphore(0)

        async def work(begun: threading.Semaphore = begun) -> None:
            begun.release()
            await asyncio.Event().wait()

        def one(_: int, loop: Loop = loop, work: Any = work) -> str:
            try:
                Running(loop, work).result()
            except StorageError as exc:
                assert exc.retryable
                return "closed"
            except LoopClosed:
                return "too late"
            return "ended"

        with ThreadPoolExecutor(4) as pool:
            ends = [pool.submit(one, number) for number in range(8)]
            assert begun.acquire(timeout=10)
            loop.close()
            assert {end.result(10) for end in ends} <= {"closed", "too late"}


@pytest.mark.parametrize("kind", ["s3", "gcs"])
def test_a_storage_may_be_closed_while_others_use_it(kind: str, s3_server: MotoServer, gcs_server: FakeGCS) -> None:
    """Threads write and read while another closes again and again: every call ends well, or can be tried again."""
    server: Any = s3_server if kind == "s3" else gcs_server
    bucket = f"l-{uuid.uuid4().hex[:10]}"
    server.create_bucket(bucket)
    storage = (S3Storage if kind == "s3" else GCSStorage)(bucket, "run", server.storage_options(), QUICK)

    def use(number: int) -> None:
        for _ in range(5):
            try:
                storage.put(f"{number}", [b"12345"], size_bytes=5)
                assert storage.read(f"{number}", limit_bytes=10).body == b"12345"
            except StorageError as exc:
                assert exc.retryable, exc

    with ThreadPoolExecutor(5) as pool:
        uses = [pool.submit(use, number) for number in range(4)]
        while not all(done.done() for done in uses):
            storage.close()
        for done in uses:
            done.result()
    storage.close()


def test_a_storage_that_is_forgotten_ends_its_thread(s3_server: MotoServer) -> None:
    """Without a close the thread ends with the storage."""
    storage = S3Storage("nobody", "run", s3_server.storage_options(), QUICK)
    with pytest.raises(StorageError):
        storage.read("object", limit_bytes=1)
    thread = storage._running()._thread
    del storage
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("kind", ["s3", "gcs"])
def test_a_forked_child_has_connections_of_its_own(kind: str, s3_server: MotoServer, gcs_server: FakeGCS) -> None:
    """A child uses the parent's storage, and the parent's is not disturbed."""
    server: Any = s3_server if kind == "s3" else gcs_server
    bucket = f"l-{uuid.uuid4().hex[:10]}"
    server.create_bucket(bucket)
    storage = (S3Storage if kind == "s3" else GCSStorage)(bucket, "run", server.storage_options(), QUICK)
    storage.put("object", [b"12345"], size_bytes=5)
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(0 if storage.size("object") == 5 else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert storage.size("object") == 5
    storage.close()


def test_a_body_that_trickles_is_given_up_in_time(s3_server: MotoServer) -> None:
    """The time-out covers the body of an answer as well."""
    bucket = f"l-{uuid.uuid4().hex[:10]}"
    s3_server.create_bucket(bucket)
    with FaultProxy(s3_server.url) as proxy:
        options = {**s3_server.storage_options(), "endpoint_url": proxy.url}
        storage = S3Storage(bucket, "run", options, Settings(request_timeout_s=1, storage_deadline_s=1))
        storage.put("object", [b"12345"], size_bytes=5)
        proxy.inject("hold_after", method="GET")
        with pytest.raises(StorageError, match=r"no answer within|[Tt]imeout"):
            storage.read_into("object", 0, memoryview(bytearray(5)))
        storage.close()


def test_the_uploads_of_a_longer_key_are_spared(s3_server: MotoServer) -> None:
    """Strays are those of the very key, not of one that begins alike."""
    bucket = f"l-{uuid.uuid4().hex[:10]}"
    s3_server.create_bucket(bucket)
    storage = S3Storage(bucket, "run", s3_server.storage_options(), QUICK)
    client = s3_server.client()
    for key in ("run/a", "run/ab"):
        client.create_multipart_upload(Bucket=bucket, Key=key)
    client.close()
    storage.abort_strays("run/a")
    assert s3_server.uploads(bucket) == ["run/ab"]
    storage.close()


def test_a_store_that_takes_no_further_bytes_is_given_up() -> None:
    """An upload session that answers 308 without progress ends with an error, and with pauses in between."""
    asked: list[str] = []

    class Stuck:
        def __init__(self) -> None:
            self.loop = Loop("test", nothing)
            self.tries = 0

        def run(self, work: Any) -> Any:
            return self.loop.run(work)

        async def again(self, attempt: Any) -> Any:
            for _ in range(3):
                try:
                    return await attempt()
                except StorageError as exc:
                    last = exc
            raise last

        async def begin(self) -> str:
            return "http://session"

        async def send(self, method: str, url: str, headers: dict[str, str], data: bytes | None) -> Answer:
            asked.append(headers.get("Content-Range", method))
            return Answer(308, {}, b"")

        async def stored(self) -> Answer:
            raise AssertionError

        async def compare(self, answer: Answer, size_bytes: int, crc: int) -> None:
            raise AssertionError

    stuck = Stuck()
    session = Session(
        stuck.run,
        stuck.again,
        stuck.begin,
        stuck.send,
        stuck.stored,
        stuck.compare,
        explained=lambda _, what: StorageError(what),
    )
    upload = ResumableUpload(session, what="writing", size_bytes=20)
    with pytest.raises(StorageError, match="takes no further bytes"):
        upload.send(iter([bytearray(10), bytearray(10)]), lambda _: None)
    stuck.loop.close()
    assert len(asked) < 10


def test_a_peer_that_does_not_read_keeps_no_socket_open() -> None:
    """Who closes a connection waits for what is not sent yet; the loop's end cuts it, and its socket is let go."""
    made: list[asyncio.Transport] = []

    async def let_go() -> None:
        for transport in made:
            transport.close()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        host, port = listener.getsockname()

        async def send() -> None:
            transport, _ = await asyncio.get_running_loop().create_connection(asyncio.Protocol, host, port)
            made.append(transport)
            transport.write(bytes(1 << 26))

        loop = Loop("test", let_go)
        loop.run(send())
        (transport,) = made
        found = transport.get_extra_info("socket")
        assert transport.get_write_buffer_size() > 0
        assert found.fileno() >= 0
        loop.close()
        assert found.fileno() == -1


def test_a_request_that_does_not_end_keeps_no_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections are given back in the end, whatever a request does with its being broken off."""
    monkeypatch.setattr("cloudckpt.storage.loop.CLEAN_UP_S", 0.1)
    begun, given_back = threading.Event(), threading.Event()

    async def clean_up() -> None:
        given_back.set()

    async def stubborn() -> None:
        begun.set()
        while not given_back.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(0.05)

    loop = Loop("test", clean_up)
    running = Running(loop, stubborn).begin()
    assert begun.wait(60)
    loop.close()
    assert given_back.is_set()
    with contextlib.suppress(StorageError):  # it has ended meanwhile, or it is told that it was closed
        running.result()
