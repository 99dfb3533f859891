"""At which call all ranks stop: one answer for all, found while they train. Pure; rank zero's channel holds one.

Each rank counts its calls of ``should_stop``. As long as nothing happens nobody says anything. Once one rank has a
notice, rank zero asks all of them how many calls they have passed; a rank that was asked passes no further call until
it has the answer, which is the call after the furthest that any rank has passed. What ranks pass together, collectives
between two calls, is thereby passed by all or by none. It is the channels' threads that ask and answer, so no rank
waits for the training of another.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from cloudckpt.core.deadline import earlier

__all__ = ["Order", "Rally", "Standing", "Told"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """Where a rank stands.

    Attributes:
        calls: how many calls it has passed: answered with "go on".
        step: the training step of the last of them.
        final: whether it takes no further call, because its loop has ended.
    """

    calls: int
    step: int | None = None
    final: bool = False

    def to_bytes(self) -> bytes:
        """As it goes over the channel."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_bytes(cls, body: bytes) -> Standing:
        """The same again."""
        return cls(**json.loads(body))


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What all ranks do from now on.

    Attributes:
        call: the number of the call, from 1, at which they stop; None if they never do.
        left_s: how long they have from now on; None if nobody knows.
        reason: why, for people.
        problem: what keeps them from stopping together, for people; then all of them raise.
    """

    call: int | None = None
    left_s: float | None = None
    reason: str = ""
    problem: str = ""

    def to_bytes(self) -> bytes:
        """As it goes over the channel."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_bytes(cls, body: bytes) -> Order:
        """The same again."""
        return cls(**json.loads(body))


#: Who is told what: an order, or None to ask where a rank stands.
Told = tuple[int, Order | None]


class Rally:
    """How the ranks of one job come to stop together.

    Args:
        names: each rank in words, such as "rank 3 (node-1, pid 4711)".
        timeout_s: how long the ranks may take to say where they stand, in seconds.
    """

    def __init__(self, names: Sequence[str], timeout_s: float) -> None:
        self._names = list(names)
        self._timeout_s = timeout_s
        self._there = {0}
        self._lost: dict[int, str] = {}
        self._standing: dict[int, Standing] = {}
        self._reason = ""
        self._asked_at: float | None = None
        self._ends_at: float | None = None
        self.order: Order | None = None

    def rename(self, rank: int, name: str) -> None:
        """What is known of a rank by now."""
        self._names[rank] = name

    def comes(self, rank: int) -> list[Told]:
        """A rank can be asked from now on."""
        self._there.add(rank)
        if self.order is not None:
            return [(rank, self.order)]
        return [(rank, None)] if self._asked_at is not None else []

    def notice(self, rank: int, reason: str, left_s: float | None, *, now: float) -> list[Told]:
        """A rank was told to stop. The first notice asks everybody; those until the answer may bring it forward."""
        self._ends_at = earlier(self._ends_at, None if left_s is None else now + left_s)
        if self._asked_at is not None or self.order is not None:
            return []
        self._asked_at = now
        self._reason = f"{reason} on {self._names[rank]}"
        return [(other, None) for other in sorted(self._there)] + self._check(now)

    def stands(self, rank: int, standing: Standing, *, now: float) -> list[Told]:
        """A rank says where it stands; one whose loop has ended does so unasked."""
        self._standing[rank] = standing
        return self._check(now)

    def lost(self, rank: int, why: str, *, now: float) -> list[Told]:
        """A rank takes part no more."""
        self._lost.setdefault(rank, why)
        return self._check(now)

    @property
    def complete(self) -> bool:
        """Whether every rank has come, be it gone again or not."""
        return len(self._there) == len(self._names)

    def finish(self) -> list[Told]:
        """Rank zero's loop has ended as it should, and nobody had to stop: nobody will. Who comes late is told so."""
        return [] if self.order is not None else self._end(Order())

    def tick(self, now: float) -> list[Told]:
        """Time has passed."""
        return self._check(now)

    def _check(self, now: float) -> list[Told]:
        if self._asked_at is None or self.order is not None:
            return []
        absent = [rank for rank in range(len(self._names)) if rank not in self._standing]
        if gone := [f"{self._names[rank]} {self._lost[rank]}" for rank in absent if rank in self._lost]:
            return self._end(Order(problem="; ".join(gone), reason=self._reason))
        if absent and now - self._asked_at < self._timeout_s:
            return []
        if absent:
            missing = ", ".join(self._names[rank] for rank in absent)
            problem = (
                f"{missing} has not said within {self._timeout_s:g} s where it is: every rank must make a "
                "PreemptionGuard of its own and call should_stop() after each step"
            )
            return self._end(Order(problem=problem, reason=self._reason))
        if odd := self._out_of_step():
            return self._end(Order(problem=odd, reason=self._reason))
        left_s = None if self._ends_at is None else self._ends_at - now
        furthest = max(standing.calls for standing in self._standing.values())
        return self._end(Order(call=furthest + 1, left_s=left_s, reason=self._reason))

    def _out_of_step(self) -> str:
        """Ranks that have passed as many calls have passed the same steps; who has not, in words."""
        by_calls: dict[int, dict[int | None, int]] = {}
        for rank, standing in sorted(self._standing.items()):
            by_calls.setdefault(standing.calls, {}).setdefault(standing.step, rank)
        for calls, steps in by_calls.items():
            if len(steps) > 1:
                said = ", ".join(f"{self._names[rank]} at step {step}" for step, rank in steps.items())
                return f"after {calls} calls of should_stop() the ranks are at different steps: {said}"
        return ""

    def _end(self, order: Order) -> list[Told]:
        self.order = order
        return [(rank, order) for rank in sorted(self._there - {*self._lost})]
