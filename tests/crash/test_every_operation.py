"""Stop the program at every storage call of every operation, in every way a call can go wrong."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from cloudckpt.storage import Storage
from cloudckpt.testing import Fault
from tests.crash.stories import STORIES, Story, count_calls, survive
from tests.records import Recording


@pytest.mark.parametrize("fault", list(Fault))
@pytest.mark.parametrize("story", STORIES, ids=lambda story: story.name)
def test_every_operation_survives_every_fault_at_every_call(
    story: Story, fault: Fault, new_storage: Callable[[str], Storage], record: Recording
) -> None:
    """Whatever call fails, and however: what was told is so, nothing good is lost, and the next job goes on."""
    with record(story.name, fault, "memory") as case:
        total = count_calls(story, new_storage("memory"))
        case.points = survive(story, lambda: new_storage("memory"), fault, range(total))
