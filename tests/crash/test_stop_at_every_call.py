"""Stop the program at every storage call of one history, in every way a call can go wrong."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from cloudckpt import CloudCkptError
from cloudckpt.storage import Storage
from cloudckpt.testing import Fault, History, ScriptedStorage, check_recovery
from tests.records import Recording


def count_calls(storage: Storage) -> int:
    """How many requests the history makes when nothing goes wrong."""
    scripted = ScriptedStorage(storage)
    history = History(scripted)
    history.run()
    assert [c.step for c in history.acknowledged] == [1, 2, 3, 4, 5]
    return len(scripted.calls)


def survive(make: Callable[[], Storage], fault: Fault, stride: int) -> int:
    """Fault every ``stride``-th call of the history in turn, and check what is left after each; how many those were."""
    total = count_calls(make())
    assert total > 50
    failures = []
    points = range(list(Fault).index(fault) % stride, total, stride)
    for call in points:
        inner = make()
        scripted = ScriptedStorage(inner, call, fault)
        history = History(scripted)
        history.run()
        assert scripted.fired
        scripted.land()
        try:
            check_recovery(inner, history, late=fault is Fault.LATE)
        except (AssertionError, CloudCkptError) as exc:
            failures.append(f"call {call} ({scripted.calls[call]}): {type(exc).__name__}: {exc}")
        inner.close()
    assert not failures, f"{len(failures)} of {total}:\n" + "\n".join(failures)
    return len(points)


@pytest.mark.parametrize("fault", list(Fault))
@pytest.mark.parametrize("kind", ["memory", "local"])
def test_the_store_survives_every_fault_at_every_call(
    kind: str, fault: Fault, new_storage: Callable[[str], Storage], record: Recording
) -> None:
    """Whatever call fails, and however, every invariant holds and the next writer can go on."""
    with record("a history of two jobs", fault, kind) as case:
        case.points = survive(lambda: new_storage(kind), fault, 1)


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("fault", list(Fault))
@pytest.mark.parametrize("kind", ["moto", "seaweedfs", "gcs", "fake-gcs-server"])
def test_every_store_survives_every_fault_at_every_call(
    kind: str, fault: Fault, new_storage: Callable[[str], Storage], pytestconfig: pytest.Config, record: Recording
) -> None:
    """The same on the object stores; ``--stride`` thins it out."""
    with record("a history of two jobs", fault, kind) as case:
        case.points = survive(lambda: new_storage(kind), fault, int(pytestconfig.getoption("--stride")))
