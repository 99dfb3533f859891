"""Stop the program at every storage call of every operation, in every way a call can go wrong."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from cloudckpt import CloudCkptError
from cloudckpt.storage import Storage
from cloudckpt.testing import Fault, ScriptedStorage
from tests.crash.stories import STORIES, Story, check, live
from tests.records import Recording


def count_calls(story: Story, storage: Storage) -> int:
    """How many requests the story makes when nothing goes wrong, and that it ends well then."""
    story.prepare(storage)
    scripted = ScriptedStorage(storage)
    told = live(story, scripted)
    assert told, f"{story.name}: nothing was done"
    check(story, storage, told)
    return len(scripted.calls)


def survive(story: Story, make: Callable[[], Storage], fault: Fault, stride: int) -> int:
    """Fault every ``stride``-th call of a story in turn, and check what is left after each; how many were hit."""
    total = count_calls(story, make())
    failures, hit = [], 0
    for number in range(list(Fault).index(fault) % stride, total, stride):
        inner = make()
        story.prepare(inner)
        scripted = ScriptedStorage(inner, number, fault)
        told = live(story, scripted)
        scripted.land()
        hit += scripted.fired
        where = scripted.calls[number] if scripted.fired else "never reached"
        try:
            check(story, inner, told)
        except (AssertionError, CloudCkptError) as exc:
            failures.append(f"call {number} ({where}): {type(exc).__name__}: {exc}")
        inner.close()
    assert not failures, f"{story.name}, {fault}: {len(failures)} of {total}:\n" + "\n".join(failures)
    # Requests of threads that run side by side may be fewer once one of them has failed, and no more than that.
    assert hit >= total // stride - 2
    return hit


@pytest.mark.parametrize("fault", list(Fault))
@pytest.mark.parametrize("kind", ["memory", "local"])
@pytest.mark.parametrize("story", STORIES, ids=lambda story: story.name)
def test_every_operation_survives_every_fault_at_every_call(
    story: Story, kind: str, fault: Fault, new_storage: Callable[[str], Storage], record: Recording
) -> None:
    """Whatever call fails, and however: what was told is so, nothing good is lost, and the next job goes on."""
    with record(story.name, fault, kind) as case:
        case.points = survive(story, lambda: new_storage(kind), fault, 1)


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("fault", list(Fault))
@pytest.mark.parametrize("kind", ["moto", "seaweedfs", "gcs"])
@pytest.mark.parametrize("story", STORIES, ids=lambda story: story.name)
def test_every_operation_survives_on_every_store(
    story: Story,
    kind: str,
    fault: Fault,
    new_storage: Callable[[str], Storage],
    pytestconfig: pytest.Config,
    record: Recording,
) -> None:
    """The same on the object stores; ``--stride`` thins it out."""
    with record(story.name, fault, kind) as case:
        case.points = survive(story, lambda: new_storage(kind), fault, int(pytestconfig.getoption("--stride")))
