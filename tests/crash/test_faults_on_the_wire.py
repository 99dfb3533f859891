"""One fault at each request of a whole history, on the wire between the real client and a server.

Not one save may fail by it: a lost answer, a refused connection, a throttled or broken reply are everyday things.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from typing import Any

import pytest

from cloudckpt import CloudCkptError, Settings
from cloudckpt.storage import Conditions, GCSStorage, S3Storage, Storage
from cloudckpt.testing import History, check_recovery
from cloudckpt.testing.fault_proxy import Action, FaultProxy
from tests.records import Recording

QUICK = Settings(
    retry_base_s=0.001, retry_cap_s=0.01, manifest_deadline_s=10, storage_deadline_s=10, request_timeout_s=5
)
#: What the proxy does to one request.
FAULTS: dict[str, tuple[Action, dict[str, Any]]] = {
    "dropped before": ("drop_before", {}),
    "answer lost": ("drop_after", {}),
    "delayed": ("delay", {"delay_s": 0.02}),
    "409": ("status", {"status": 409}),
    "429": ("status", {"status": 429}),
    "500": ("status", {"status": 500}),
    "503": ("status", {"status": 503}),
    "truncated": ("truncate", {}),
}
#: Gives a request up soon, so that it can land after that.
HASTY = Settings(
    retry_base_s=0.001, retry_cap_s=0.01, manifest_deadline_s=10, storage_deadline_s=10, request_timeout_s=0.7
)
PART = 5 * 1024 * 1024


class Wire:
    """A server behind a proxy: storages whose requests can be broken, and storages that see what is there."""

    def __init__(self, server: Any, proxy: FaultProxy, name: str) -> None:
        self.name = name
        self.proxy = proxy
        self._server = server
        self._class: type[S3Storage | GCSStorage] = S3Storage if server.storage_options().get("key") else GCSStorage

    def pair(self, settings: Settings = QUICK) -> tuple[Storage, Storage]:
        """The same fresh place through the proxy and past it."""
        bucket, prefix = "wire", uuid.uuid4().hex
        with contextlib.suppress(ValueError):  # the fake says so when it is there already
            self._server.create_bucket(bucket)
        options = self._server.storage_options()
        through = self._class(bucket, prefix, {**options, "endpoint_url": self.proxy.url}, settings)
        past = self._class(bucket, prefix, options, settings)
        through.conditions = past.conditions = Conditions.HONOURED
        return through, past


@pytest.fixture(params=["moto", "seaweedfs", "gcs"])
def wire(request: pytest.FixtureRequest) -> Iterator[Wire]:
    """Each server behind a proxy of its own."""
    fixture = {"moto": "s3_server", "seaweedfs": "seaweedfs", "gcs": "gcs_server"}[request.param]
    server = request.getfixturevalue(fixture)
    with FaultProxy(server.url) as proxy:
        yield Wire(server, proxy, str(request.param))


def requests_of_a_history(wire: Wire) -> int:
    """How many requests the history makes when nothing goes wrong."""
    through, past = wire.pair()
    wire.proxy.clear()
    history = History(through, QUICK)
    history.run()
    assert len(history.acknowledged) == 5
    total = len(wire.proxy.requests)
    past.close()
    return total


def survive(wire: Wire, fault: str, stride: int) -> int:
    """Break every ``stride``-th request in turn; every save must be acknowledged all the same. How many those were."""
    action, how = FAULTS[fault]
    total = requests_of_a_history(wire)
    assert total > 50
    failures = []
    points = range([*FAULTS].index(fault) % stride, total, stride)
    for number in points:
        through, past = wire.pair()
        wire.proxy.clear()
        broken: Any = wire.proxy.inject(action, skip=number, times=1, **how)
        history = History(through, QUICK)
        history.run()
        hit = wire.proxy.requests[number]
        wire.proxy.clear()
        try:
            assert broken.hits == 1
            assert [c.step for c in history.acknowledged] == [1, 2, 3, 4, 5], "a save failed"
            check_recovery(past, history, QUICK)
        except (AssertionError, CloudCkptError) as exc:
            failures.append(f"request {number} ({hit.method} {hit.path}): {type(exc).__name__}: {exc}")
        through.close()
        past.close()
    assert not failures, f"{len(failures)} of {total}:\n" + "\n".join(failures)
    return len(points)


@pytest.mark.processes
@pytest.mark.parametrize("fault", FAULTS)
def test_no_save_fails_by_a_fault_on_the_wire(wire: Wire, fault: str, record: Recording) -> None:
    """A sample of the requests of the history, each broken once in each way."""
    with record("a history of two jobs, on the wire", fault, wire.name) as case:
        case.points = survive(wire, fault, 59)


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("fault", FAULTS)
def test_no_save_fails_by_a_fault_at_any_request(
    wire: Wire, fault: str, pytestconfig: pytest.Config, record: Recording
) -> None:
    """Every request of the history; ``--stride`` thins it out."""
    with record("a history of two jobs, on the wire", fault, wire.name) as case:
        case.points = survive(wire, fault, int(pytestconfig.getoption("--stride")))


def survive_late(wire: Wire, stride: int) -> int:
    """Keep every ``stride``-th request of the history until it is over, and let it land then. How many those were."""
    total = requests_of_a_history(wire)
    failures = []
    points = range(0, total, stride)
    for number in points:
        through, past = wire.pair(HASTY)
        wire.proxy.clear()
        late = wire.proxy.inject("late", skip=number, times=1)
        history = History(through, HASTY)
        history.run()
        landed = late.land()
        hit = wire.proxy.requests[number]
        wire.proxy.clear()
        try:
            assert late.hits == 1
            assert landed, "it never reached the server"
            assert [c.step for c in history.acknowledged] == [1, 2, 3, 4, 5], "a save failed"
            check_recovery(past, history, QUICK, late=True)
        except (AssertionError, CloudCkptError) as exc:
            failures.append(f"request {number} ({hit.method} {hit.path}): {type(exc).__name__}: {exc}")
        through.close()
        past.close()
    assert not failures, f"{len(failures)} of {total}:\n" + "\n".join(failures)
    return len(points)


@pytest.mark.processes
def test_no_save_fails_by_a_request_that_lands_too_late(wire: Wire, record: Recording) -> None:
    """A sample of the requests, each of which reaches the server when its client has long given it up and gone on."""
    with record("a history of two jobs, on the wire", "lands after its deadline", wire.name) as case:
        case.points = survive_late(wire, 41)


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.timeout(1800)
def test_no_save_fails_by_any_request_that_lands_too_late(
    wire: Wire, pytestconfig: pytest.Config, record: Recording
) -> None:
    """Every request of the history; ``--stride`` thins it out."""
    with record("a history of two jobs, on the wire", "lands after its deadline", wire.name) as case:
        case.points = survive_late(wire, int(pytestconfig.getoption("--stride")))


def upload(storage: Storage, body: bytes) -> None:
    """Write an object of three parts."""
    storage.put("checkpoint-1.00000000/payload", iter([body[:1000], body[1000:]]), size_bytes=len(body))


@pytest.mark.processes
@pytest.mark.parametrize("fault", FAULTS)
def test_an_upload_in_parts_survives_a_fault_at_any_request(wire: Wire, fault: str) -> None:
    """Each request of an upload in parts, broken once: the object is whole, and no upload is left unfinished."""
    body = os.urandom(2 * PART + 12_345)
    settings = Settings(
        part_size_bytes=PART, retry_base_s=0.001, retry_cap_s=0.01, storage_deadline_s=10, request_timeout_s=5
    )
    action, how = FAULTS[fault]
    through, past = wire.pair(settings)
    wire.proxy.clear()
    upload(through, body)
    total = len(wire.proxy.requests)
    assert total >= 4
    for number in range(total):
        assert past.delete(["checkpoint-1.00000000/payload"]) == {}
        wire.proxy.clear()
        broken: Any = wire.proxy.inject(action, skip=number, times=1, **how)
        upload(through, body)
        assert broken.hits == 1
        found = bytearray(len(body))
        past.read_into("checkpoint-1.00000000/payload", 0, memoryview(found))
        assert found == body, f"request {number}: {wire.proxy.requests[number]}"
        assert past.abort_uploads("") == 0, f"request {number} left an upload behind"
    through.close()
    past.close()


@pytest.mark.processes
@pytest.mark.parametrize("fault", ["503", "answer lost", "dropped before"])
def test_an_upload_that_is_refused_for_ever_fails_in_time_and_leaves_nothing(wire: Wire, fault: str) -> None:
    """From the second part on the store never takes one: an error within the deadline, no object, no open upload."""
    settings = Settings(
        part_size_bytes=PART, retry_base_s=0.001, retry_cap_s=0.01, storage_deadline_s=0.3, request_timeout_s=5
    )
    through, past = wire.pair(settings)
    wire.proxy.clear()
    action, how = FAULTS[fault]
    seen: list[int] = []

    def part(request: Any) -> bool:
        if request.method != "PUT":
            return False
        seen.append(1)
        return len(seen) > 1

    wire.proxy.inject(action, when=part, times=None, **how)
    with pytest.raises(CloudCkptError):
        upload(through, os.urandom(2 * PART + 12_345))
    wire.proxy.clear()
    assert [*past.list("")] == []
    assert past.abort_uploads("") == 0
    through.close()
    past.close()
