"""One answer for every ballot of a round: go, skip, or what is wrong. Pure; the channel of rank zero holds one.

Every rank numbers its collective calls. The n-th ballots of all ranks are one round: it ends when all are in, when a
rank is known to be gone, or when the first ballot has waited too long. Whoever comes after the end is given the
answer that the others had, so no rank ever decides alone, and none waits for ever.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from cloudckpt.coordination.protocol import Ballot, Verdict

__all__ = ["Answer", "Tally", "decide"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a round came to.

    Attributes:
        verdict: what all ranks do; None if they raise.
        problem: what is wrong, for people.
    """

    verdict: Verdict | None
    problem: str = ""


@dataclass(slots=True)
class _Round:
    began: float
    ballots: dict[int, Ballot] = field(default_factory=dict)
    answer: Answer | None = None


class Tally:
    """The rounds of one job.

    Args:
        names: each rank in words, such as "rank 3 (node-1, pid 4711)".
        timeout_s: how long the first ballot of a round waits for the last one, in seconds.
    """

    def __init__(self, names: Sequence[str], timeout_s: float) -> None:
        self._names = list(names)
        self._timeout_s = timeout_s
        self._rounds: dict[int, _Round] = {}
        self._lost: dict[int, str] = {}

    def rename(self, rank: int, name: str) -> None:
        """What is known of a rank by now."""
        self._names[rank] = name

    def cast(self, rank: int, number: int, ballot: Ballot, *, now: float) -> list[tuple[int, int, Answer]]:
        """A rank votes in round ``number``. Returns who is answered what: (rank, round, answer)."""
        known = self._rounds.setdefault(number, _Round(now))
        known.ballots[rank] = ballot
        if known.answer is not None:
            self._forget_full_rounds()
            return [(rank, number, known.answer)]
        if len(known.ballots) == len(self._names):
            return self._end(number, decide(known.ballots, self._names))
        return self._check(number, now)

    def lost(self, rank: int, why: str, *, now: float) -> list[tuple[int, int, Answer]]:
        """A rank takes part no more."""
        self._lost.setdefault(rank, why)
        return self.tick(now)

    def tick(self, now: float) -> list[tuple[int, int, Answer]]:
        """Time has passed."""
        open_rounds = [number for number, known in self._rounds.items() if known.answer is None]
        return [told for number in open_rounds for told in self._check(number, now)]

    def _check(self, number: int, now: float) -> list[tuple[int, int, Answer]]:
        known = self._rounds[number]
        absent = [rank for rank in range(len(self._names)) if rank not in known.ballots]
        call = next(iter(known.ballots.values()))
        if gone := [f"{self._names[rank]} {self._lost[rank]}" for rank in absent if rank in self._lost]:
            return self._end(number, Answer(verdict=None, problem=f"{call}: {'; '.join(gone)}"))
        limit_s = min([self._timeout_s, *(b.within_s for b in known.ballots.values() if b.within_s is not None)])
        if now - known.began >= limit_s:
            missing = ", ".join(self._names[rank] for rank in absent)
            longer = (
                "that was all the time there is"
                if limit_s < self._timeout_s
                else "longer is waited with Settings(coordination_timeout_s=...)"
            )
            problem = (
                f"{call}: no call of it came from {missing} within {limit_s:g} s. Every rank must call "
                f"save(), restore(), load() and close() alike; {longer}"
            )
            return self._end(number, Answer(verdict=None, problem=problem))
        return []

    def _end(self, number: int, answer: Answer) -> list[tuple[int, int, Answer]]:
        known = self._rounds[number]
        known.answer = answer
        told = [(rank, number, answer) for rank in known.ballots]
        self._forget_full_rounds()
        return told

    def _forget_full_rounds(self) -> None:
        for number, known in [*self._rounds.items()]:
            late = [r for r in range(len(self._names)) if r not in known.ballots and r not in self._lost]
            if known.answer is not None and not late:
                del self._rounds[number]


def decide(ballots: Mapping[int, Ballot], names: Sequence[str]) -> Answer:
    """What the ballots of all ranks come to."""
    if problems := [f"{names[rank]}: {ballot.problem}" for rank, ballot in sorted(ballots.items()) if ballot.problem]:
        return Answer(verdict=None, problem=f"{next(iter(ballots.values()))}: {'; '.join(problems)}")
    for what, views in (
        ("what to do", {rank: str(ballot) for rank, ballot in ballots.items()}),
        ("the root", {rank: ballot.root for rank, ballot in ballots.items()}),
        ("the components", {rank: ", ".join(sorted(ballot.components)) for rank, ballot in ballots.items()}),
        ("the options", {rank: ballot.options for rank, ballot in ballots.items()}),
    ):
        if len(set(views.values())) > 1:
            return Answer(verdict=None, problem=f"the ranks disagree about {what}: {_grouped(views, names)}")
    busy = any(ballot.busy for ballot in ballots.values())
    return Answer(verdict=Verdict.SKIP if busy else Verdict.GO)


def _grouped(views: Mapping[int, str], names: Sequence[str]) -> str:
    """Who says what: the many by their numbers, one alone with its host."""
    by_view: dict[str, list[int]] = {}
    for rank in sorted(views):
        by_view.setdefault(views[rank], []).append(rank)
    said = []
    for view, ranks in by_view.items():
        who = names[ranks[0]] if len(ranks) == 1 else f"ranks {_numbers(ranks)}"
        said.append(f"{who}: {view or 'none'}")
    return "; ".join(said)


def _numbers(ranks: Sequence[int]) -> str:
    """``0-2, 5``."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
