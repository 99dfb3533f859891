"""One answer for every ballot of a round."""

from __future__ import annotations

from cloudckpt.coordination import Ballot, Verdict
from cloudckpt.coordination.tally import Answer, Tally, decide

NAMES = ["rank 0 (a)", "rank 1 (a)", "rank 2 (b)", "rank 3 (b)"]
SAVE = Ballot(call="save", root="s3://b/r", step=5, components=("model",))
GO = Answer(verdict=Verdict.GO)


def test_all_in_means_go() -> None:
    """Nobody is answered before the last one, and then all are."""
    tally = Tally(NAMES, 10)
    assert [tally.cast(rank, 1, SAVE, now=0) for rank in range(3)] == [[], [], []]
    assert tally.cast(3, 1, SAVE, now=9) == [(rank, 1, GO) for rank in range(4)]
    assert tally.tick(100) == []


def test_one_that_is_busy_makes_all_skip() -> None:
    """Whoever is busy."""
    busy = Ballot(call="save", step=5, busy=True)
    ballots = {0: Ballot(call="save", step=5), 1: busy}
    assert decide(ballots, NAMES) == Answer(verdict=Verdict.SKIP)


def test_whoever_comes_late_gets_the_answer_that_the_others_had() -> None:
    """Too late is decided once, names who is missing, and holds for the late one as well."""
    tally = Tally(NAMES, 10)
    for rank in (0, 1, 3):
        tally.cast(rank, 1, SAVE, now=0)
    assert tally.tick(9.9) == []
    told = tally.tick(10)
    assert [rank for rank, _, _ in told] == [0, 1, 3]
    answer = told[0][2]
    assert answer.verdict is None
    assert "save(step=5): no call of it came from rank 2 (b) within 10 s" in answer.problem
    assert tally.cast(2, 1, Ballot(call="close"), now=50) == [(2, 1, answer)]
    assert [tally.cast(rank, 2, SAVE, now=60) for rank in range(3)] == [[], [], []]
    assert len(tally.cast(3, 2, SAVE, now=60)) == 4


def test_a_rank_that_is_gone_is_not_waited_for() -> None:
    """Not now, and not in a later round."""
    tally = Tally(NAMES, 1000)
    tally.cast(0, 1, SAVE, now=0)
    told = tally.lost(2, "is gone: its process ended", now=1)
    assert [(rank, number) for rank, number, _ in told] == [(0, 1)]
    assert told[0][2].problem == "save(step=5): rank 2 (b) is gone: its process ended"
    (late,) = tally.cast(1, 1, SAVE, now=2)
    assert late[2] == told[0][2]
    ((rank, number, answer),) = tally.cast(3, 2, SAVE, now=3)
    assert (rank, number, answer.verdict) == (3, 2, None)


def test_disagreement_says_who_says_what() -> None:
    """The many by their numbers, one alone with its host."""
    ballots = dict.fromkeys(range(4), SAVE) | {2: Ballot(call="save", root="s3://b/r", step=6, components=("model",))}
    answer = decide(ballots, NAMES)
    assert answer.problem == (
        "the ranks disagree about what to do: ranks 0-1, 3: save(step=5); rank 2 (b): save(step=6)"
    )
    ballots[2] = Ballot(call="save", root="s3://b/other", step=5, components=("model",))
    assert "the root: ranks 0-1, 3: s3://b/r; rank 2 (b): s3://b/other" in decide(ballots, NAMES).problem
    ballots[2] = Ballot(call="save", root="s3://b/r", step=5, components=("model", "ema"))
    assert "the components" in decide(ballots, NAMES).problem
    ballots[2] = Ballot(call="save", root="s3://b/r", step=5, components=("model",), options="strict=False")
    assert "the options: ranks 0-1, 3: none; rank 2 (b): strict=False" in decide(ballots, NAMES).problem


def test_what_keeps_one_rank_from_calling_is_told_to_all() -> None:
    """Bad arguments on one rank."""
    ballots = {0: SAVE, 1: Ballot(call="save", problem="step='x': write a whole number")}
    assert decide(ballots, NAMES).problem == "save(step=5): rank 1 (a): step='x': write a whole number"


def test_a_rank_in_a_hurry_is_not_kept_as_long_as_the_others() -> None:
    """The round of a save with a deadline ends with it, and nobody is told to wait longer."""
    tally = Tally(NAMES, 600)
    hurried = Ballot(call="save", step=5, within_s=25.0)
    for rank in (0, 1, 2):
        assert tally.cast(rank, 1, hurried, now=rank) == []
    assert tally.tick(24.9) == []
    problem = tally.tick(25.0)[0][2].problem
    assert "no call of it came from rank 3 (b) within 25 s" in problem
    assert problem.endswith("alike; that was all the time there is")
