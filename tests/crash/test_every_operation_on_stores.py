"""The same as ``test_every_operation`` on the object stores: at calls of the storage, and at requests on the wire."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from cloudckpt import CloudCkptError
from cloudckpt.storage import Storage
from cloudckpt.testing import Fault
from tests.crash.stories import STORIES, Story, check, live, survive
from tests.crash.test_faults_on_the_wire import FAULTS, QUICK, Wire, wire
from tests.records import Recording

__all__ = ["wire"]  # a fixture

pytestmark = [pytest.mark.slow, pytest.mark.processes, pytest.mark.timeout(3600)]


@pytest.mark.parametrize("kind", ["moto", "seaweedfs", "gcs"])
@pytest.mark.parametrize("story", STORIES, ids=lambda story: story.name)
def test_every_operation_survives_on_every_store(
    story: Story, kind: str, new_storage: Callable[[str], Storage], pytestconfig: pytest.Config, record: Recording
) -> None:
    """Every fault at every call; ``--stride`` thins them out."""
    stride = int(pytestconfig.getoption("--stride"))
    for fault in Fault:
        with record(story.name, fault, kind) as case:
            case.points = survive(story, lambda: new_storage(kind), fault, stride)


@pytest.mark.parametrize("story", STORIES, ids=lambda story: story.name)
def test_no_operation_is_broken_by_a_fault_at_a_request(
    story: Story, wire: Wire, pytestconfig: pytest.Config, record: Recording
) -> None:
    """A lost answer, a dropped connection, a throttled or broken reply at any request: everything holds afterwards."""
    stride = int(pytestconfig.getoption("--stride"))
    through, past = wire.pair(QUICK)
    story.prepare(past)
    wire.proxy.clear()
    live(story, through)
    total = len(wire.proxy.requests)
    through.close()
    past.close()
    for place, (fault, (action, how)) in enumerate(FAULTS.items()):
        with record(f"{story.name}, on the wire", fault, wire.name) as case:
            failures = []
            for number in range(place % stride, total, stride):
                through, past = wire.pair(QUICK)
                story.prepare(past)
                wire.proxy.clear()
                words: dict[str, Any] = {"skip": number, "times": 1, **how}
                wire.proxy.inject(action, **words)
                told = live(story, through)
                hit = [request for request in wire.proxy.requests if request.fault]
                wire.proxy.clear()
                case.points += len(hit)
                try:
                    check(story, past, told)
                except (AssertionError, CloudCkptError) as exc:
                    failures.append(f"request {number} ({hit}): {type(exc).__name__}: {exc}")
                through.close()
                past.close()
            assert not failures, f"{story.name}, {fault}: {len(failures)} of {total}:\n" + "\n".join(failures)
