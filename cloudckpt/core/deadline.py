"""Whether one more save fits before a deadline.

Nobody looks at a clock here: what is measured and what is left are durations in seconds, as each rank has them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from cloudckpt.core.text import format_bytes, format_duration

__all__ = ["REMEMBERED", "SHARE", "Judgement", "Pace", "View", "earlier", "expected_seconds", "judge"]

#: Of what is left, so much may be planned for. The rest is for a store that is slower than it was, and for the end.
SHARE = 0.7

#: How many saves are remembered: the slowest of them counts, and one slow night long ago does not.
REMEMBERED = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """One save that was committed.

    Attributes:
        size_bytes: the payload that all ranks put. What one of them puts says little: it may be nothing, and the save
            takes as long for it as for the others.
        seconds: from the agreement on the save until its commit.
    """

    size_bytes: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """What one rank knows once the save before has ended, or the deadline has come.

    Attributes:
        left_s: until the deadline; negative once it is over.
        size_bytes: about what this rank would put.
        paces: the last saves, as far as this rank has measured them.
        busy: the name of a save that is still on its way here.
    """

    left_s: float
    size_bytes: int
    paces: tuple[Pace, ...] = ()
    busy: str = ""

    def to_bytes(self) -> bytes:
        """As it goes over the channel."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_bytes(cls, body: bytes) -> View:
        """The same again."""
        found = json.loads(body)
        return cls(**{**found, "paces": tuple(Pace(**pace) for pace in found["paces"])})


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """What all ranks do.

    Attributes:
        go: whether the save is begun.
        left_s: until the earliest deadline of all ranks.
        reason: why, for people.
    """

    go: bool
    left_s: float
    reason: str

    def to_bytes(self) -> bytes:
        """As it goes over the channel."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_bytes(cls, body: bytes) -> Judgement:
        """The same again."""
        return cls(**json.loads(body))


def earlier(one: float | None, other: float | None) -> float | None:
    """The earlier of two moments on one clock, where None is never."""
    return min((moment for moment in (one, other) if moment is not None), default=None)


def expected_seconds(size_bytes: int, paces: Sequence[Pace]) -> float | None:
    """How long a save of this size takes, by the slowest of the measured ones; None if there are none.

    More bytes take longer in proportion. Fewer are not trusted to be quicker: small saves are mostly round trips.
    """
    return max((pace.seconds * max(1.0, size_bytes / max(pace.size_bytes, 1)) for pace in paces), default=None)


def judge(views: Sequence[View], *, share: float = SHARE) -> Judgement:
    """Whether the ranks begin a save: all of them or none.

    Where nothing was measured yet it is begun: leaving it out loses for certain what trying may keep, and a save that
    is not committed in time costs nothing but itself.
    """
    left_s = min(view.left_s for view in views)
    go, reason = _judged(views, left_s, share)
    return Judgement(go=go, left_s=left_s, reason=reason)


def _judged(views: Sequence[View], left_s: float, share: float) -> tuple[bool, str]:
    if busy := [view.busy for view in views if view.busy]:
        return False, f"its deadline came while {busy[0]} was still being saved"
    if left_s <= 0:
        return False, "its deadline has come"
    size_bytes = sum(view.size_bytes for view in views)
    expected_s = expected_seconds(size_bytes, [pace for view in views for pace in view.paces])
    if expected_s is None:
        return True, "no save of this process has been measured yet, so it is tried"
    facts = (
        f"{format_bytes(size_bytes)} would take about {format_duration(expected_s)} by the slowest of the last saves, "
        f"and {format_duration(left_s)} are left, of which {share:.0%} may be used"
    )
    return expected_s <= share * left_s, facts
