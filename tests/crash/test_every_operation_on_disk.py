"""The same as ``test_every_operation`` on a local disk: in a file of its own, so that two workers share them."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from cloudckpt.storage import Storage
from cloudckpt.testing import Fault
from tests.crash.stories import STORIES, Story, count_calls, survive
from tests.records import Recording


@pytest.mark.parametrize("fault", list(Fault))
@pytest.mark.parametrize("story", STORIES, ids=lambda story: story.name)
def test_every_operation_survives_every_fault_on_a_disk(
    story: Story, fault: Fault, new_storage: Callable[[str], Storage], record: Recording
) -> None:
    """Whatever call fails, and however: what was told is so, nothing good is lost, and the next job goes on."""
    with record(story.name, fault, "local") as case:
        total = count_calls(story, new_storage("local"))
        case.points = survive(story, lambda: new_storage("local"), fault, range(total))
