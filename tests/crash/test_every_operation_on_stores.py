"""The same as ``test_every_operation`` on the object stores: at calls of the storage, and at requests on the wire.

``--stride`` thins the points out; with 1, as in ``make crash-full``, they are all there are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from cloudckpt import CloudCkptError
from cloudckpt.storage import Storage
from cloudckpt.testing import Fault
from tests.crash.stories import STORIES, Story, check, count_calls, live, sample, survive
from tests.crash.test_faults_on_the_wire import FAULTS, QUICK, Wire, wire
from tests.records import Recording

__all__ = ["wire"]  # a fixture

pytestmark = [pytest.mark.slow, pytest.mark.processes, pytest.mark.timeout(3600)]

#: So that the samples of different stories are of different calls and faults.
OFFSETS = {story.name: 7 * number for number, story in enumerate(STORIES)}


@pytest.mark.parametrize("kind", ["moto", "seaweedfs", "gcs", "fake-gcs-server"])
@pytest.mark.parametrize("story", STORIES, ids=lambda story: story.name)
def test_every_operation_survives_on_every_store(
    story: Story, kind: str, new_storage: Callable[[str], Storage], pytestconfig: pytest.Config, record: Recording
) -> None:
    """Every fault at every call: what was told is so, nothing good is lost, and the next job goes on."""
    faults, stride = list(Fault), int(pytestconfig.getoption("--stride"))
    total = count_calls(story, new_storage(kind))
    for number, points in sample(total, len(faults), stride, OFFSETS[story.name]).items():
        with record(story.name, faults[number], kind) as case:
            case.points = survive(story, lambda: new_storage(kind), faults[number], points)


@pytest.mark.parametrize("story", STORIES, ids=lambda story: story.name)
def test_no_operation_is_broken_by_a_fault_at_a_request(
    story: Story, wire: Wire, pytestconfig: pytest.Config, record: Recording
) -> None:
    """A lost answer, a dropped connection, a throttled or broken reply at any request: everything holds afterwards."""
    through, past = wire.pair(QUICK)
    story.prepare(past)
    wire.proxy.clear()
    live(story, through)
    total = len(wire.proxy.requests)
    through.close()
    past.close()
    faults, stride = list(FAULTS), int(pytestconfig.getoption("--stride"))
    # There are more requests than calls, and more ways to break one.
    thinner = stride if stride == 1 else 4 * stride
    for number, points in sample(total, len(faults), thinner, OFFSETS[story.name]).items():
        fault = faults[number]
        with record(f"{story.name}, on the wire", fault, wire.name) as case:
            ends = [broken(story, wire, fault, point) for point in points]
            failures = [problem for _, problem in ends if problem is not None]
            case.points = sum(hit for hit, _ in ends)
            assert not failures, f"{story.name}, {fault}: {len(failures)} of {total}:\n" + "\n".join(failures)
            # As in ``survive``: of requests side by side there may be fewer at another time.
            assert case.points >= len(points) - 2


def broken(story: Story, wire: Wire, fault: str, point: int) -> tuple[bool, str | None]:
    """Break one request of a story; whether it was reached, and what does not hold afterwards, if anything."""
    action, how = FAULTS[fault]
    through, past = wire.pair(QUICK)
    story.prepare(past)
    wire.proxy.clear()
    words: dict[str, Any] = {"skip": point, "times": 1, **how}
    wire.proxy.inject(action, **words)
    told = live(story, through)
    hit = [f"{request.method} {request.path}" for request in wire.proxy.requests if request.fault]
    wire.proxy.clear()
    try:
        check(story, past, told)
    except (AssertionError, CloudCkptError) as exc:
        return bool(hit), f"request {point} ({hit}): {type(exc).__name__}: {exc}"
    finally:
        through.close()
        past.close()
    return bool(hit), None
