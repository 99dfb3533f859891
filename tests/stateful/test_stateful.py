"""Anybody may do anything at any moment, and no invariant falls."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.records import Recording
from tests.stateful.machine import RunMachine

#: How many stories are told, and how long each may be.
PROFILES = {"ci": (60, 30), "some": (1_000, 50), "long": (5_000, 60)}


@pytest.mark.timeout(0)
def test_no_story_breaks_an_invariant(pytestconfig: pytest.Config, record: Recording) -> None:
    """I1 to I12, after every step of every story; ``--stories some`` tells a thousand of them, ``long`` thousands."""
    stories, steps = PROFILES[str(pytestconfig.getoption("--stories"))]
    with record("two jobs, people and readers beside each other", "random histories", "memory") as case:

        class Counted(RunMachine):
            def __init__(self) -> None:
                super().__init__()
                case.points += 1

        run_state_machine_as_test(
            Counted,
            settings=settings(
                max_examples=stories,
                stateful_step_count=steps,
                deadline=None,  # the clock of a busy machine fails no story
                suppress_health_check=[*HealthCheck],
                print_blob=True,
            ),
        )
        assert case.points >= stories // 2
