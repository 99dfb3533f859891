"""The probe tells a store that honours conditions from one that ignores them, one that refuses them, and trouble."""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Callable
from typing import Any

import pytest

from cloudckpt import Settings, StorageError, UnsafeStorageError
from cloudckpt.storage import Conditions, MemoryStorage, Outcome, S3Storage, Storage, Unknown
from cloudckpt.storage.base import Landed, Lost
from cloudckpt.storage.conditions import conditional_writes
from cloudckpt.storage.probe import probe
from cloudckpt.testing import FaultProxy
from cloudckpt.testing.servers import MotoServer, RcloneS3, SeaweedFS

QUICK = Settings(retry_base_s=0.001, retry_cap_s=0.01, storage_deadline_s=0.5, request_timeout_s=5)


class Store(MemoryStorage):
    """Memory whose conditions are as good as it is told."""

    def __init__(self, *, ignores: bool = False, refuses: bool = False, wants_quotes: bool = False) -> None:
        super().__init__()
        self.conditions = Conditions.UNPROVEN
        self.ignores, self.refuses, self.wants_quotes = ignores, refuses, wants_quotes
        self.quotes = False
        self.asked = 0
        self.trouble: list[StorageError] = []

    def create(self, key: str, body: bytes) -> Outcome:
        self.asked += 1
        if self.trouble:
            return Unknown(self.trouble.pop(0))
        if self.ignores:
            self.put(key, [body], size_bytes=len(body))
            return Landed(self.read(key, limit_bytes=100).version)
        return super().create(key, body)

    def replace(self, key: str, body: bytes, *, expecting: str) -> Outcome:
        if self.refuses or (self.wants_quotes and not self.quotes):
            return Lost("412")
        return super().replace(key, body, expecting=expecting)

    def respell(self) -> None:
        """Quotes, or none again."""
        self.quotes = not self.quotes


@pytest.mark.parametrize(
    ("store", "found"),
    [
        (Store(), Conditions.HONOURED),
        (Store(wants_quotes=True), Conditions.HONOURED),
        (Store(ignores=True), Conditions.ABSENT),
        (Store(refuses=True), Conditions.ABSENT),
    ],
    ids=["honours", "wants quotes", "ignores", "refuses"],
)
def test_what_it_finds(store: Store, found: Conditions) -> None:
    """Each kind of store is recognised, and the throw-away object is thrown away."""
    report = probe(store)
    assert report.conditions is found
    assert report.ok == (found is Conditions.HONOURED)
    assert [*store.list()] == []


@pytest.mark.processes
@pytest.mark.parametrize(
    ("kind", "found"),
    [("moto", Conditions.HONOURED), ("seaweedfs", Conditions.HONOURED), ("rclone", Conditions.ABSENT)],
)
def test_what_it_finds_on_real_servers(kind: str, found: Conditions, request: pytest.FixtureRequest) -> None:
    """Moto and SeaweedFS honour conditions, rclone ignores them; it costs five requests where all is well."""
    names = {"moto": "s3_server", "seaweedfs": "seaweedfs", "rclone": "rclone"}
    server: MotoServer | SeaweedFS | RcloneS3 = request.getfixturevalue(names[kind])
    server.create_bucket("probed")
    with FaultProxy(server.url) as proxy:
        storage = S3Storage("probed", uuid.uuid4().hex, {**server.storage_options(), "endpoint_url": proxy.url}, QUICK)
        assert storage.conditions is Conditions.UNPROVEN
        assert probe(storage).conditions is found
        if found is Conditions.HONOURED:
            assert len(proxy.requests) == 5
        assert [*storage.list("")] == []
        storage.close()


def test_it_is_asked_once_for_each_place(s3_server: MotoServer) -> None:
    """Within a process a second storage on the same bucket is not probed again."""
    s3_server.create_bucket("asked-once")
    first, second = (S3Storage("asked-once", name, s3_server.storage_options(), QUICK) for name in ("one", "two"))
    conditional_writes(first, single_writer=False, settings=QUICK)
    assert second.conditions is Conditions.HONOURED
    first.close()
    second.close()


@pytest.mark.parametrize("action", ["drop_before", "drop_after", "status"])
def test_trouble_on_the_way_condemns_no_store(s3_server: MotoServer, action: Any) -> None:
    """A fault at any of its requests is asked about again, and the verdict is right."""
    s3_server.create_bucket("trouble")
    patient = dataclasses.replace(QUICK, storage_deadline_s=60)
    for number in range(5):
        with FaultProxy(s3_server.url) as proxy:
            options = {**s3_server.storage_options(), "endpoint_url": proxy.url}
            storage = S3Storage("trouble", uuid.uuid4().hex, options, patient)
            proxy.inject(action, skip=number)
            conditional_writes(storage, single_writer=False, settings=patient)
            assert storage.conditions is Conditions.HONOURED
            storage.close()


def test_a_refusal_is_raised_and_not_taken_for_missing_conditions() -> None:
    """A 403 while probing is that 403, at once; trouble that does not end is told as such after the deadline."""
    store = Store()
    store.trouble = [StorageError("403 forbidden")]
    with pytest.raises(StorageError, match="403 forbidden"):
        conditional_writes(store, single_writer=False, settings=QUICK)
    assert store.asked == 1
    store.trouble = [StorageError("503", retryable=True)] * 100_000
    with pytest.raises(StorageError, match="503"):
        conditional_writes(store, single_writer=False, settings=QUICK)
    assert store.conditions is Conditions.UNPROVEN


def test_a_promise_stands_in_for_conditions() -> None:
    """Without conditions there is an error; with the promise of one writer, look-compare-write and a sentence."""
    store = Store(ignores=True)
    with pytest.raises(UnsafeStorageError, match="does not honour conditional writes"):
        conditional_writes(store, single_writer=False, settings=QUICK)
    said: list[str] = []
    writes = conditional_writes(store, single_writer=True, settings=QUICK, tell=said.append)
    assert len(said) == 1
    first = writes.create("key", b"1")
    assert isinstance(first, Landed)
    assert isinstance(writes.create("key", b"2"), Lost)
    assert isinstance(writes.replace("key", b"3", expecting="stale"), Lost)
    assert isinstance(writes.replace("key", b"4", expecting=first.version), Landed)
    assert store.read("key", limit_bytes=10).body == b"4"


@pytest.mark.parametrize("make", [lambda: MemoryStorage()])
def test_what_is_known_is_not_asked(make: Callable[[], Storage]) -> None:
    """A storage that vouches for its conditions is not probed at all."""
    storage = make()
    conditional_writes(storage, single_writer=False, settings=QUICK)
    assert [*storage.list()] == []
