"""The direct lane of GCS: what it sends, what it does when something goes wrong, and when it leaves payload alone.

(Past 350 lines: everything that may happen between the lane and one strict store is one list.)
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
import subprocess
import sys
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientSession
from google.oauth2.credentials import Credentials

from cloudckpt import ObjectNotFoundError, Settings, StorageError
from cloudckpt.storage import Conditions, GCSStorage
from cloudckpt.storage.base import Part
from cloudckpt.storage.gcs_lane import GCSLane
from cloudckpt.storage.redacting import Redactor
from cloudckpt.testing import BytesSource, FakeGCS
from cloudckpt.testing.fault_proxy import FaultProxy
from cloudckpt.testing.servers import FakeGcsServer

MIB = 1024 * 1024
PART = 5 * MIB
FAST = Settings(
    part_size_bytes=PART, connections=4, retry_base_s=0.01, retry_cap_s=0.05, storage_deadline_s=5, request_timeout_s=5
)
KEY = "checkpoint-1.00000000/payload"
BODY = os.urandom(2 * PART + 12_345)

Uploading = Callable[[str, str, Any], AbstractContextManager[Any]]

UPLOADER = r"""
import contextlib, os, sys
from cloudckpt import Settings
from cloudckpt.storage import GCSStorage
from cloudckpt.testing import BytesSource
class Endless(BytesSource):
    size_bytes = 1 << 40
    @contextlib.contextmanager
    def hold(self, start, length):
        with super().hold(0, 5 * 1024 * 1024) as part:
            os.write(1, b"sending\n")
            yield part
storage = GCSStorage(sys.argv[1], "run", {}, Settings(part_size_bytes=5 * 1024 * 1024, connections=2))
try:
    storage.put("checkpoint-1.00000000/payload", Endless(bytes(5 * 1024 * 1024)), size_bytes=1 << 40)
except KeyboardInterrupt:
    print("interrupted", flush=True)
storage.close()
"""


@pytest.fixture
def bucket(gcs_server: FakeGCS) -> str:
    """A fresh bucket on the strict fake."""
    name = f"l-{uuid.uuid4().hex[:10]}"
    gcs_server.create_bucket(name)
    return name


@pytest.fixture
def storage(gcs_server: FakeGCS, gcs_faults: FaultProxy, bucket: str) -> Iterator[GCSStorage]:
    """A storage that sends small parts through the proxy."""
    found = GCSStorage(bucket, "run", {**gcs_server.storage_options(), "endpoint_url": gcs_faults.url}, FAST)
    found.conditions = Conditions.HONOURED
    gcs_faults.clear()
    yield found
    found.close()


def put(storage: GCSStorage, body: bytes = BODY, key: str = KEY, **words: Any) -> BytesSource:
    """Write an object from memory."""
    source = BytesSource(body[:1000], body[1000:])
    storage.put(key, source, size_bytes=len(body), **words)
    return source


def got(storage: GCSStorage, size: int = len(BODY), start: int = 0, key: str = KEY) -> bytes:
    """Read a range, into two targets."""
    found = bytearray(size)
    view = memoryview(found)
    storage.read_into(key, start, view[: size // 3], view[size // 3 :])
    return bytes(found)


def sent(proxy: FaultProxy) -> Counter[str]:
    """The requests since the last look, each by what it does."""
    names = {"uploads": "create", "partNumber": "part", "uploadId": "complete"}
    found: Counter[str] = Counter()
    for request in proxy.requests:
        asked = [name for name in names if re.search(rf"(^|&){name}(=|&|$)", request.query)]
        what = "abort" if request.method == "DELETE" and asked else names.get(asked[0] if asked else "", "")
        what = "list uploads" if request.method == "GET" and what == "create" else what
        found[what or f"{request.method}{' media' if 'alt=media' in request.query else ''}"] += 1
    proxy.clear()
    return found


def kinds(gcs_server: FakeGCS, since: int) -> list[str]:
    """What the fake was asked for."""
    return [seen.operation for seen in gcs_server.requests[since:]]


# -- what is sent ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, PART, PART + 1, 2 * PART, 2 * PART - 1, 3 * PART + 7])
def test_what_comes_back_is_what_was_sent(
    storage: GCSStorage, gcs_faults: FaultProxy, gcs_server: FakeGCS, bucket: str, size: int
) -> None:
    """One request for what fits into a part, else one to begin, one for each part, one to complete; no other."""
    body = os.urandom(size)
    told: list[int] = []
    source = put(storage, body, progress=told.append)
    parts = -(-size // PART)
    assert sent(gcs_faults) == ({"PUT": 1} if parts == 1 else {"create": 1, "part": parts, "complete": 1})
    assert gcs_server.objects(bucket) == {f"run/{KEY}": body}
    assert gcs_server.uploads() == []
    assert (sum(told), len(told)) == (size, parts)
    assert sorted(source.held) == [(at, min(PART, size - at)) for at in range(0, size, PART)]
    assert got(storage, size) == body
    assert sent(gcs_faults) == {"GET media": 1}
    assert storage.size(KEY) == size


def test_every_byte_that_leaves_is_announced_with_its_sum(storage: GCSStorage, gcs_faults: FaultProxy) -> None:
    """Each part and each whole object carries a CRC-32C, which the store holds against what arrives."""
    put(storage)
    put(storage, b"whole", "checkpoint-1.00000000/small")
    puts = [request for request in gcs_faults.requests if request.method == "PUT"]
    assert len(puts) == 4
    assert all(re.fullmatch(r"crc32c=[\w+/]{6}==", request.headers["x-goog-hash"]) for request in puts)


class SmallParts(BytesSource):
    """Sent in parts of the least size, however few connections share it."""

    @property
    def together_bytes(self) -> int:
        return 1


def test_parts_go_side_by_side_and_no_more_than_allowed(storage: GCSStorage, gcs_faults: FaultProxy) -> None:
    """With four connections there are at most four parts held, and the first is not waited for by the others."""
    first: Any = gcs_faults.inject("hold_after", match="partNumber=1&")
    others = threading.Event()

    def progress(_: int) -> None:
        if len(told := [*done, 1]) == 5:
            others.set()
        done.append(len(told))

    done: list[int] = []
    source = SmallParts(os.urandom(6 * PART))
    thread = threading.Thread(target=lambda: storage.put(KEY, source, size_bytes=6 * PART, progress=progress))
    thread.start()
    assert others.wait(60)
    first.release()
    thread.join(60)
    assert storage.size(KEY) == 6 * PART
    assert 2 <= source.most_held <= 4


def test_large_objects_have_larger_parts() -> None:
    """Never more than 9,000 of them, never below five mebibytes, in whole mebibytes, and enough for each connection."""
    facts: Any = None
    lane = GCSLane(facts, "b", Settings(part_size_bytes=1), Redactor({}))

    class Sized(BytesSource):
        def __init__(self, size_bytes: int) -> None:
            super().__init__()
            self._size = size_bytes

        @property
        def size_bytes(self) -> int:
            return self._size

    for size in (1, 100 * MIB, 1 << 30, 1 << 36, 5 << 40):
        part = lane.part_bytes(Sized(size))
        assert part % MIB == 0
        assert part >= 5 * MIB
        assert -(-size // part) <= 9_000


@pytest.mark.parametrize(
    "name", ["a space/and another", "plus+plus", "50%25", "über/日本語", "q?x=1&y=2", "f#1", "~(a)'"]
)
def test_names_survive_the_way(storage: GCSStorage, gcs_server: FakeGCS, bucket: str, name: str) -> None:
    """In parts, whole and read by range, every name is the one that was given."""
    put(storage, key=f"{name}/parts")
    put(storage, b"whole", f"{name}/whole")
    assert set(gcs_server.objects(bucket)) == {f"run/{name}/parts", f"run/{name}/whole"}
    assert got(storage, key=f"{name}/parts") == BODY
    with contextlib.suppress(StorageError):
        storage.abort_uploads(f"{name}/")
    assert gcs_server.uploads() == []


# -- reading ---------------------------------------------------------------------------------------------------


def test_a_range_that_does_not_exist_is_told_so(storage: GCSStorage) -> None:
    """Beyond the end, half beyond it, or of an object that is not there."""
    put(storage, b"0123456789")
    assert got(storage, 4, 6) == b"6789"
    for start, size, key in ((10, 1, KEY), (6, 5, KEY), (0, 1, "checkpoint-1.00000000/nothing")):
        with pytest.raises(ObjectNotFoundError, match=re.escape(key)):
            got(storage, size, start, key)


def test_a_server_without_ranges_is_read_all_the_same(storage: GCSStorage, gcs_faults: FaultProxy) -> None:
    """It answers with everything: the session takes the part that was asked for, from then on without trying again."""
    put(storage, b"0123456789")
    gcs_faults.inject("status", status=200, body=b"0123456789", match="alt=media", times=None)
    assert got(storage, 4, 3) == b"3456"
    assert got(storage, 4, 5) == b"5678"
    assert sent(gcs_faults)["GET media"] == 3


def test_an_answer_with_other_bytes_than_asked_for_is_no_answer(storage: GCSStorage, gcs_faults: FaultProxy) -> None:
    """A Content-Range that is not ours is an error that may be tried again."""
    put(storage, b"0123456789")
    lie = {"Content-Range": "bytes 0-3/10"}
    gcs_faults.inject("status", status=206, body=b"0123", headers=lie, match="alt=media")
    with pytest.raises(StorageError, match="of 4 bytes came") as refused:
        got(storage, 4, 3)
    assert refused.value.retryable


# -- when something goes wrong ---------------------------------------------------------------------------------


BROKEN = ("drop_before", "drop_after", "truncate", "503", "429", "500", "409")


@pytest.mark.parametrize(
    ("action", "number"),
    # One bit of a part; a beginning has no body, and one bit of a completion makes another request of it.
    [*((action, number) for action in BROKEN for number in range(5)), *(("flip_request", n) for n in (1, 2, 3))],
)
def test_a_fault_at_any_request_is_got_over(
    storage: GCSStorage, gcs_faults: FaultProxy, gcs_server: FakeGCS, bucket: str, action: Any, number: int
) -> None:
    """Whichever request is broken and however, the object is whole and no upload is left."""
    how: dict[str, Any] = {"status": int(action)} if action.isdigit() else {}
    broken = gcs_faults.inject("status" if action.isdigit() else action, skip=number, **how)
    put(storage)
    assert broken.hits == 1
    gcs_faults.clear()
    assert gcs_server.objects(bucket) == {f"run/{KEY}": BODY}
    assert gcs_server.uploads() == []
    assert got(storage) == BODY


@pytest.mark.parametrize("connections", [1, 4])
def test_a_store_that_is_too_busy_gets_fewer_requests_at_once(
    gcs_server: FakeGCS, gcs_faults: FaultProxy, bucket: str, connections: int
) -> None:
    """A 503 halves what is under way together; the upload ends well."""
    settings = Settings(part_size_bytes=PART, connections=connections, retry_base_s=0.001, retry_cap_s=0.01)
    storage = GCSStorage(bucket, "run", {**gcs_server.storage_options(), "endpoint_url": gcs_faults.url}, settings)
    gcs_faults.inject("status", status=503, match="partNumber", times=6)
    put(storage)
    assert storage._lane._crew.limit <= connections
    assert got(storage) == BODY
    storage.close()


def test_a_completion_whose_answer_was_lost_is_recognised(storage: GCSStorage, gcs_faults: FaultProxy) -> None:
    """The second one is told that there is no such upload: the object tells that it is ours, by size and sum."""
    gcs_faults.inject("drop_after", method="POST", match="uploadId=")
    put(storage)
    assert sent(gcs_faults) == {"create": 1, "part": 3, "complete": 2, "GET": 1}
    assert got(storage) == BODY


@pytest.mark.parametrize("there", [None, b"of somebody else"])
def test_an_upload_that_somebody_aborted_is_an_error(
    storage: GCSStorage, gcs_faults: FaultProxy, gcs_server: FakeGCS, bucket: str, there: bytes | None
) -> None:
    """No object, or another one than ours, is never taken for a success, and is left where it is."""
    if there is not None:
        storage.put(KEY, [there], size_bytes=len(there))
    held: Any = gcs_faults.inject("delay", method="POST", match="uploadId=", delay_s=0)

    class Aborted(SmallParts):
        @contextlib.contextmanager
        def hold(self, start: int, length: int) -> Iterator[Part]:
            with super().hold(start, length) as part:
                yield part
            if start + length == self.size_bytes:
                other = GCSStorage(bucket, "run", gcs_server.storage_options(), FAST)
                assert other.abort_uploads("checkpoint-1") == 1
                other.close()

    one = Settings(part_size_bytes=PART, connections=1, storage_deadline_s=5, retry_base_s=0.01, retry_cap_s=0.05)
    alone = GCSStorage(bucket, "run", {**gcs_server.storage_options(), "endpoint_url": gcs_faults.url}, one)
    match = "aborted by somebody else" if there is None else "another object of this name"
    with pytest.raises(StorageError, match=match):
        alone.put(KEY, Aborted(BODY), size_bytes=len(BODY))
    assert held.hits == 1
    assert gcs_server.objects(bucket) == ({} if there is None else {f"run/{KEY}": there})
    alone.close()


@pytest.mark.parametrize("header", [None, "crc32c=AAAAAA=="])
def test_what_google_says_it_has_is_compared(
    storage: GCSStorage, gcs_faults: FaultProxy, gcs_server: FakeGCS, bucket: str, header: str | None
) -> None:
    """A completion that tells another checksum, or none, is looked into; damage is an error and taken away again."""
    gcs_faults.inject(
        "status",
        status=200,
        method="POST",
        match="uploadId=",
        body=b"<CompleteMultipartUploadResult/>",
        headers={} if header is None else {"x-goog-hash": header},
    )
    storage.put(KEY, [b"damaged"], size_bytes=7)
    with pytest.raises(StorageError, match="damaged on the way, and taken away again"):
        put(storage)
    assert gcs_server.objects(bucket) == {}
    gcs_faults.clear()
    assert storage.abort_uploads("") == 1  # the fake never got the completion


def test_memory_that_changes_while_it_is_sent_fails_the_upload(storage: GCSStorage, gcs_faults: FaultProxy) -> None:
    """The store refuses bytes that are not those of the sum, and a look at them tells that it is the memory."""
    body = bytearray(os.urandom(2 * PART))

    class Changing(BytesSource):
        @contextlib.contextmanager
        def hold(self, start: int, length: int) -> Iterator[Part]:
            with super().hold(start, length) as part:
                body[start] ^= 1
                yield part

    with pytest.raises(StorageError, match="bytes in memory changed while they were being sent"):
        storage.put(KEY, Changing(body), size_bytes=len(body))
    gcs_faults.clear()
    assert [*storage.list("")] == []
    assert storage.abort_uploads("") == 0


# -- nothing is left behind ------------------------------------------------------------------------------------


class _Stop(Exception):
    """What the caller's own source raises."""


@pytest.mark.parametrize("ends_by", [_Stop, KeyboardInterrupt, GeneratorExit, SystemExit])
@pytest.mark.parametrize("where", ["first hold", "last hold", "progress"])
def test_no_exit_leaves_an_upload(
    storage: GCSStorage, gcs_server: FakeGCS, ends_by: type[BaseException], where: str
) -> None:
    """Whatever is raised between two parts, the upload is aborted, and the exception is the caller's own."""

    class Ending(BytesSource):
        @contextlib.contextmanager
        def hold(self, start: int, length: int) -> Iterator[Part]:
            if where == ("first hold" if start == 0 else "last hold" if start + length == self.size_bytes else ""):
                raise ends_by
            with super().hold(start, length) as part:
                yield part

    def progress(_: int) -> None:
        if where == "progress":
            raise ends_by

    with pytest.raises(ends_by):
        storage.put(KEY, Ending(BODY), size_bytes=len(BODY), progress=progress)
    assert gcs_server.uploads() == []
    assert [*storage.list("")] == []


@pytest.mark.parametrize("begin", ["lost answers", "interrupted"])
def test_an_upload_whose_id_was_never_learnt_is_aborted_too(
    storage: GCSStorage, gcs_faults: FaultProxy, gcs_server: FakeGCS, begin: str
) -> None:
    """The store has begun the upload and we do not know its id: it is found by its key and aborted."""
    gcs_faults.inject("drop_after", method="POST", match="uploads", times=2 if begin == "lost answers" else None)
    if begin == "lost answers":
        put(storage)
        assert got(storage) == BODY
    else:
        quick = Settings(part_size_bytes=PART, storage_deadline_s=0.2, retry_base_s=0.01, request_timeout_s=5)
        other = GCSStorage(storage._bucket, "run", {"endpoint_url": gcs_faults.url, "token": "anon"}, quick)
        with pytest.raises(StorageError):
            put(other)
        other.close()
    assert gcs_server.uploads() == []


@pytest.mark.processes
def test_ctrl_c_of_a_real_process_leaves_no_upload(gcs_server: FakeGCS, bucket: str, uploading: Uploading) -> None:
    """A process in the middle of an upload gets SIGINT: it ends at once, and nothing is left or appears later."""
    with uploading(UPLOADER, bucket, gcs_server) as process:
        said = process.interrupt()
    assert said[-1] == "interrupted"
    assert gcs_server.uploads() == []
    assert gcs_server.objects(bucket) == {}


@pytest.mark.processes
def test_kill_9_leaves_an_upload_that_can_be_aborted_by_its_folder(
    gcs_server: FakeGCS, bucket: str, storage: GCSStorage, uploading: Uploading
) -> None:
    """Only SIGKILL leaves something: invisible, billed, and gone when its folder's uploads are aborted."""
    with uploading(UPLOADER, bucket, gcs_server) as process:
        process.kill()
    assert gcs_server.uploads() == [f"run/{KEY}"]
    assert [*storage.list("")] == []
    assert storage.abort_uploads("checkpoint-2.00000000/") == 0
    assert storage.abort_uploads("checkpoint-1.", spare=lambda key: key == KEY) == 0
    assert storage.abort_uploads("checkpoint-1.00000000/") == 1
    assert gcs_server.uploads() == []


def test_many_unfinished_uploads_are_found_page_by_page() -> None:
    """More than a page holds, several of one key among them; those of another prefix are spared."""
    with FakeGCS(page_size=3) as server:
        server.create_bucket("pages")
        storage = GCSStorage("pages", "run", server.storage_options(), FAST)
        for n in range(8):
            storage._parts.begin("beginning", f"run/checkpoint-{n // 3}.0/é+ {n // 2}", "t/u").result()
        assert storage.abort_uploads("checkpoint-1.") == 3
        assert len(server.uploads()) == 5
        assert storage.abort_uploads("") == 5
        assert server.uploads() == []
        storage.close()


# -- who asks --------------------------------------------------------------------------------------------------


def bearer(token: str) -> Any:
    """Credentials that are this token and no more."""
    never = datetime(2100, 1, 1)  # noqa: DTZ001 - google-auth wants it naive
    return Credentials(token=token, expiry=never)  # type: ignore[no-untyped-call]  # google-auth has no types


class _Changing(Credentials):
    """Credentials whose token is another one as soon as the store takes no longer the first."""

    tokens: list[str]

    def apply(self, headers: dict[str, str], token: str | None = None) -> None:
        headers["authorization"] = f"Bearer {self.tokens[0]}"


def test_the_token_is_the_session_s_and_renewed_in_mid_upload() -> None:
    """A token that the store takes no longer is replaced by a fresh one; no part is lost, and no request is anonymous."""
    with FakeGCS(required_token="first") as server, FaultProxy(server.url) as proxy:
        server.create_bucket("tokens")
        credentials = _Changing(token="x", expiry=datetime(2100, 1, 1))  # type: ignore[no-untyped-call]  # noqa: DTZ001 - naive
        credentials.tokens = ["first", "second"]
        options = {"endpoint_url": proxy.url, "token": credentials}
        storage = GCSStorage("tokens", "run", options, FAST)
        expired = threading.Event()

        def progress(_: int) -> None:
            if not expired.is_set():
                expired.set()
                server._required_token = "second"
                credentials.tokens.pop(0)

        source = BytesSource(os.urandom(12 * PART))
        storage.put(KEY, source, size_bytes=source.size_bytes, progress=progress)
        statuses = Counter(request.status for request in proxy.requests)
        assert statuses[401] >= 1
        assert set(statuses) == {200, 401}
        assert storage.size(KEY) == source.size_bytes
        assert server.uploads() == []
        storage.close()


def test_parts_that_begin_together_show_one_token(storage: GCSStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each may ask the session, and all show what came first: a refusal of any is one of all, and renews it once."""
    both = threading.Barrier(2, timeout=30)
    ask = storage.permission

    def asked() -> Any:
        found = ask()
        both.wait()
        return found

    monkeypatch.setattr(storage, "permission", asked)
    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(lambda _: storage._lane._who_asks(), range(2))
    assert one is other
    assert [storage._lane._forget(one), storage._lane._forget(other)] == [True, False]


def test_a_token_that_is_not_taken_is_an_error_that_does_not_show_it() -> None:
    """Neither lane gets in, and the message says what to do."""
    with FakeGCS(required_token="right") as server:
        server.create_bucket("tokens")
        storage = GCSStorage("tokens", "run", {"endpoint_url": server.url, "token": bearer("wrong-secret-token")}, FAST)
        for body in (b"small", BODY):
            with pytest.raises(StorageError, match=r"401.*gcloud auth application-default login") as refused:
                put(storage, body)
            assert "wrong-secret-token" not in str(refused.value)
        storage.close()


def test_the_requester_pays_on_every_request(gcs_server: FakeGCS) -> None:
    """With ``requester_pays`` each request of either API names the project; without, the store says what is missing."""
    bucket = f"l-{uuid.uuid4().hex[:10]}"
    gcs_server.create_bucket(bucket, requester_pays=True)
    options = gcs_server.storage_options()
    storage = GCSStorage(bucket, "run", {**options, "requester_pays": "my-project"}, FAST)
    since = len(gcs_server.requests)
    put(storage)
    put(storage, b"small", "small")
    assert got(storage) == BODY
    assert storage.abort_uploads("") == 0
    assert "xml-upload-part" in kinds(gcs_server, since)
    assert "insert" not in kinds(gcs_server, since)
    storage.close()
    penniless = GCSStorage(bucket, "run", options, FAST)
    with pytest.raises(StorageError, match="requester_pays"):
        put(penniless)
    penniless.close()


def test_the_right_to_upload_in_parts_may_be_missing(gcs_server: FakeGCS, bucket: str, storage: GCSStorage) -> None:
    """Whoever may create objects but no uploads in parts saves through the session, as before there was a lane."""
    gcs_server.denied.add("storage.multipartUploads.create")
    since = len(gcs_server.requests)
    try:
        put(storage)
    finally:
        gcs_server.denied.clear()
    assert got(storage) == BODY
    assert kinds(gcs_server, since)[:2] == ["xml-upload-start", "resumable-start"]
    assert "403 AccessDenied" in storage.describe()["lane"]


@pytest.mark.parametrize("body", [b"small", BODY], ids=len)
def test_who_may_create_nothing_is_told_so(gcs_server: FakeGCS, bucket: str, storage: GCSStorage, body: bytes) -> None:
    """Both lanes are refused: the 403 is told, and the lane is tried again once the right is there."""
    gcs_server.denied.add("storage.objects.create")
    try:
        with pytest.raises(StorageError, match=r"403.*roles/storage\.objectUser"):
            put(storage, body)
    finally:
        gcs_server.denied.clear()
    since = len(gcs_server.requests)
    put(storage, body)
    assert all(kind.startswith("xml-") for kind in kinds(gcs_server, since))


def test_a_missing_bucket_is_named(gcs_server: FakeGCS) -> None:
    """An upload into it says that it is the bucket."""
    storage = GCSStorage("nobody-made-this", "run", gcs_server.storage_options(), FAST)
    for body in (b"small", BODY):
        with pytest.raises(StorageError, match="bucket 'nobody-made-this' does not exist: create it"):
            put(storage, body)
    storage.close()


# -- when it leaves payload alone ------------------------------------------------------------------------------


@pytest.mark.processes
def test_an_emulator_without_the_xml_api_is_asked_once(
    fake_gcs_server: FakeGcsServer, caplog: pytest.LogCaptureFixture
) -> None:
    """Its first answer says so: resumable uploads from then on, for every storage of this process; ranges stay."""
    caplog.set_level(logging.INFO, "cloudckpt")
    with FaultProxy(fake_gcs_server.url) as proxy:
        fake_gcs_server.create_bucket("without")
        options = {**fake_gcs_server.storage_options(), "endpoint_url": proxy.url}
        for n in range(2):
            storage = GCSStorage("without", f"run-{n}", options, FAST)
            put(storage, b"small")
            put(storage, b"other", "other")
            assert got(storage, 5) == b"small"
            assert "the store does not know the XML API (it answers 404)" in storage.describe()["lane"]
            assert storage.abort_uploads("") == 0
            storage.close()
        strange = [request for request in proxy.requests if not re.match("/(storage|upload|download)/", request.path)]
        assert [(request.method, request.status) for request in strange] == [("PUT", 404)]
    said = [record.message for record in caplog.records if "direct lane" in record.message]
    assert len(said) == 2  # once for each storage


@pytest.mark.processes
def test_unfinished_uploads_of_an_emulator_without_the_xml_api_are_none(fake_gcs_server: FakeGcsServer) -> None:
    """A claim that looks for them finds nothing to abort, and no error."""
    with FaultProxy(fake_gcs_server.url) as proxy:
        fake_gcs_server.create_bucket("without")
        storage = GCSStorage("without", "run", {**fake_gcs_server.storage_options(), "endpoint_url": proxy.url}, FAST)
        assert [storage.abort_uploads("checkpoint-1/") for _ in range(3)] == [0, 0, 0]
        assert len(proxy.requests) == 1
        storage.close()


@pytest.mark.parametrize(
    ("options", "settings", "reason"),
    [
        ({}, {"direct_lane": False}, r"Settings\(direct_lane=False\)"),
        ({"session_kwargs": {"read_bufsize": 1 << 17}}, {}, "session_kwargs has read_bufsize, which only aiohttp"),
    ],
)
def test_what_it_cannot_do_is_left_to_the_session(
    gcs_server: FakeGCS, bucket: str, options: dict[str, Any], settings: dict[str, Any], reason: str
) -> None:
    """The payload arrives all the same, by the JSON API, and the reason is shown."""
    words = {**gcs_server.storage_options(), **options}
    storage = GCSStorage(bucket, "run", words, Settings(part_size_bytes=PART, **settings))
    since = len(gcs_server.requests)
    put(storage)
    assert got(storage) == BODY
    assert not any(kind.startswith("xml-") for kind in kinds(gcs_server, since))
    assert re.search(reason, storage.describe()["lane"])
    storage.close()


def test_whoever_stands_in_for_aiohttp_sees_every_request(
    gcs_server: FakeGCS, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a mock or a recorder of this process intercepts aiohttp, no socket is opened beside it."""
    real: Callable[..., Any] = ClientSession._request
    seen: list[str] = []

    async def recorded(self: ClientSession, method: str, url: Any, **words: Any) -> Any:
        seen.append(method)
        return await real(self, method, url, **words)

    storage = GCSStorage(bucket, "run", gcs_server.storage_options(), FAST)
    assert [*storage.list("")] == []
    monkeypatch.setattr(ClientSession, "_request", recorded)
    since = len(gcs_server.requests)
    opened: list[str] = []
    connect: Callable[..., Any] = socket.create_connection

    def counted(*words: Any, **more: Any) -> Any:
        opened.append("one")
        return connect(*words, **more)

    monkeypatch.setattr(socket, "create_connection", counted)
    put(storage)
    assert got(storage) == BODY
    assert opened == []
    assert len(seen) == len(gcs_server.requests) - since
    assert "intercepted" in storage.describe()["lane"]
    storage.close()


def test_buffers_without_ranges_go_through_the_session(storage: GCSStorage, gcs_faults: FaultProxy) -> None:
    """Only a source can be sent in parts side by side."""
    storage.put(KEY, iter([BODY]), size_bytes=len(BODY))
    assert not {"create", "part", "complete"} & set(sent(gcs_faults))
    assert got(storage) == BODY


def test_a_source_of_another_size_is_refused(storage: GCSStorage, gcs_server: FakeGCS, bucket: str) -> None:
    """What was announced must be what comes."""
    with pytest.raises(StorageError, match="were announced"):
        storage.put(KEY, BytesSource(BODY), size_bytes=len(BODY) + 1)
    assert gcs_server.objects(bucket) == {}


# -- processes and the way -------------------------------------------------------------------------------------


def test_a_forked_child_has_connections_of_its_own(
    storage: GCSStorage, gcs_faults: FaultProxy, gcs_server: FakeGCS, bucket: str
) -> None:
    """Parent and child write and read at the same time, and neither answers the other's requests."""
    put(storage)
    with contextlib.suppress(ChildProcessError):
        pid = os.fork()
        if pid == 0:
            code = 1
            with contextlib.suppress(BaseException):
                put(storage, BODY[::-1], "checkpoint-2.00000000/payload")
                code = 0 if got(storage) == BODY else 2
                storage.close()
            os._exit(code)
        for _ in range(3):
            assert got(storage) == BODY
        _, status = os.waitpid(pid, 0)
        assert os.waitstatus_to_exitcode(status) == 0
    assert gcs_server.objects(bucket)["run/checkpoint-2.00000000/payload"] == BODY[::-1]
    put(storage)
    assert got(storage) == BODY


@pytest.mark.parametrize("by", ["trust_env", "proxy"])
def test_a_proxy_of_the_session_is_gone_through(
    gcs_server: FakeGCS, bucket: str, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    """The lane goes where aiohttp goes: through the proxy it was given, or the environment's if it is told to look."""
    passed: list[str] = []
    with FaultProxy(gcs_server.url) as proxy:
        for name in ("http_proxy", "HTTP_PROXY"):
            monkeypatch.setenv(name, proxy.url)
        monkeypatch.setenv("no_proxy", "")
        given: dict[str, Any] = {"trust_env": True} if by == "trust_env" else {"proxy": proxy.url}
        options = {"endpoint_url": "http://storage.invalid", "token": "anon", "session_kwargs": given}
        storage = GCSStorage(bucket, "run", options, FAST)
        try:
            way = storage.way()
            passed.append(str(way.proxy))
            assert way.address.proxy == proxy.url
        finally:
            storage.close()
        plain = GCSStorage(bucket, "run", gcs_server.storage_options(), FAST)
        assert plain.way().proxy is None  # aiohttp does not look at the environment unasked
        plain.close()
    assert passed == [proxy.url]


SECURE = r"""
import os, sys
from cloudckpt import Settings, StorageError
from cloudckpt.storage import GCSStorage
from cloudckpt.testing import BytesSource
bucket, url = sys.argv[1:]
settings = Settings(part_size_bytes=5 * 1024 * 1024, storage_deadline_s=1, retry_base_s=0.01, request_timeout_s=5)
storage = GCSStorage(bucket, "run", {"endpoint_url": url, "token": "anon"}, settings)
body = os.urandom(11 * 1024 * 1024)
try:
    storage.put("checkpoint-1.00000000/payload", BytesSource(body), size_bytes=len(body))
    found = bytearray(len(body))
    storage.read_into("checkpoint-1.00000000/payload", 0, memoryview(found))
    print("same" if found == body else "other", storage.describe()["lane"].partition(",")[0])
except StorageError as exc:
    print(exc)
storage.close()
"""


@pytest.mark.processes
def test_over_tls_the_host_proves_who_it_is(
    gcs_server: FakeGCS, bucket: str, certificate: Path, tls_before: Callable[[str], AbstractContextManager[str]]
) -> None:
    """With the certificates of Python's own defaults (SSL_CERT_FILE among them), as aiohttp has them; else refused."""
    with tls_before(gcs_server.url) as url:
        said = {
            trusted: subprocess.run(
                [sys.executable, "-c", SECURE, bucket, url],
                env={**os.environ, **({"SSL_CERT_FILE": str(certificate)} if trusted else {})},
                check=True,
                capture_output=True,
                text=True,
            ).stdout
            for trusted in (False, True)
        }
    assert "certificate verify failed" in said[False].lower()
    assert said[True] == "same direct\n"
    assert len(gcs_server.objects(bucket)) == 1


def test_a_storage_that_was_closed_opens_again(storage: GCSStorage) -> None:
    """Threads and connections come back with the next request."""
    put(storage)
    storage.close()
    storage.close()
    assert got(storage) == BODY
    put(storage)
