"""Ranks that are told to stop: all of them after the same step, with one checkpoint, or none of them with any."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import cloudckpt
from tests.distributed import preemption_scenarios as scenarios
from tests.distributed.ranks import Outcome, Ranks

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="signals are POSIX here"),
]


def values(outcomes: Sequence[Outcome]) -> list[Any]:
    """What the ranks answered; their errors fail the test."""
    for outcome in outcomes:
        assert outcome.error is None, outcome.error["traceback"]
    return [outcome.value for outcome in outcomes]


@pytest.mark.parametrize(("told", "at"), [([0], 0), ([1], 3), ([0, 1], 4)])
def test_a_signal_on_any_rank_stops_all_after_the_same_step(
    two_ranks: Ranks, tmp_path: Path, told: list[int], at: int
) -> None:
    """The checkpoint is of that step, committed when the call has returned; each fact is logged once."""
    outcomes = two_ranks.run(scenarios.stop_together, root=str(tmp_path / "run"), told=told, at=at)
    found = values(outcomes)
    (step,) = {value["step"] for value in found}
    assert step in {at, at + 1}
    assert len({value["id"] for value in found}) == 1
    assert len({value["reason"] for value in found}) == 1
    assert all(0 < value["left_s"] <= 100 for value in found)
    newest = cloudckpt.open(tmp_path / "run").latest()
    assert newest is not None
    assert (newest.step, newest.id) == (step, found[0]["id"])
    lines = [line for outcome in outcomes for line in outcome.lines("WARNING")]
    assert sum("told to stop: SIGUSR1" in line for line in lines) == len(told)
    assert sum(line.startswith(f"all 2 ranks stop after step {step}: SIGUSR1 on rank ") for line in lines) == 1
    assert sum(line.startswith("[rank 1] told to stop") for line in lines) == (1 in told)


def test_four_ranks_of_which_one_is_told(four_ranks: Ranks, tmp_path: Path) -> None:
    """A spot notice hits one node of many."""
    found = values(four_ranks.run(scenarios.stop_together, root=str(tmp_path / "run"), told=[3], at=5))
    assert len({value["step"] for value in found}) == 1
    assert all("SIGUSR1 on rank 3 (" in value["reason"] for value in found)


@pytest.mark.parametrize("victim", [0, 1])
def test_without_one_rank_no_save_is_tried(tmp_path: Path, victim: int) -> None:
    """SIGTERM does not mean preemption: torchrun sends it when another rank has died. Who is left is told so at once."""
    ranks = Ranks(2)
    try:
        ranks.start(scenarios.stop_without_one, {"root": str(tmp_path / "run"), "victim": victim})
        (found,) = values(ranks.outcomes_of([1 - victim]))
    finally:
        ranks.close()
    assert f"rank {victim} (" in found["stopping"]
    assert "leave without one" in found["stopping"]
    assert found["saving"].startswith("RankError: ")
    assert f"rank {victim} (" in found["saving"]
    assert found["took"] < 15
    assert [c.step for c in cloudckpt.open(tmp_path / "run").checkpoints()] == [0]


def test_all_decline_if_one_rank_is_too_slow(two_ranks: Ranks, tmp_path: Path) -> None:
    """The slowest rank decides, and rank zero says why, once."""
    outcomes = two_ranks.run(scenarios.decline_together, root=str(tmp_path / "run"), slow=1)
    assert [value["phase"] for value in values(outcomes)] == ["declined", "declined"]
    lines = [line for outcome in outcomes for line in outcome.lines("WARNING") if "not saving step 1" in line]
    assert len(lines) == 1
    assert "by the slowest of the last saves" in lines[0]
    assert [c.step for c in cloudckpt.open(tmp_path / "run").checkpoints()] == [0]


def test_a_deadline_is_given_by_all_or_none(two_ranks: Ranks, tmp_path: Path) -> None:
    """``guard.left_s`` is a number on all ranks, or None on all; whoever passes something else is told."""
    for value in values(two_ranks.run(scenarios.hurry_on_one, root=str(tmp_path / "run"))):
        assert "the ranks disagree about the options" in value["said"]
        assert "deadline_s" in value["said"]


def test_who_does_not_come_in_time_is_named(two_ranks: Ranks, tmp_path: Path) -> None:
    """The vote of a save with a deadline ends with it; the run goes on after that."""
    found = values(two_ranks.run(scenarios.absent, root=str(tmp_path / "run"), late=1))
    assert len({value["said"] for value in found}) == 1
    assert "save(step=1): no call of it came from rank 1 (" in found[0]["said"]
    assert "within 5 s" in found[0]["said"]
    assert 2 in {c.step for c in cloudckpt.open(tmp_path / "run").checkpoints()}


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("fits", [True, False])
def test_an_earlier_failure_is_told_unless_it_is_made_good(
    two_ranks: Ranks, tmp_path: Path, victim: int, fits: bool
) -> None:
    """I10: it keeps no rank from the last save; without that, every rank is told at the end, and told the same."""
    outcomes = two_ranks.run(scenarios.hurry_after_a_failure, root=str(tmp_path / "run"), victim=victim, fits=fits)
    found = values(outcomes)
    assert [value["declined"] for value in found] == [not fits] * 2
    assert len({value["said"] for value in found}) == 1
    assert ("the disk is on fire" in found[0]["said"]) is not fits
    assert [c.step for c in cloudckpt.open(tmp_path / "run").checkpoints()] == ([0, 2] if fits else [0])
