"""How the ranks of one job agree. One process agrees with itself; the protocol is the seam for many.

Every collective call of the manager starts with one vote, so that no rank decides alone; rank zero alone
writes the manifest and the index, prunes, deletes and logs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol, TypeVar

__all__ = ["Ballot", "Coordinator", "SingleProcess", "Verdict"]

_T = TypeVar("_T")


class Verdict(StrEnum):
    """What all ranks do now."""

    GO = "go"
    SKIP = "skip"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ballot:
    """One rank's view at the start of a collective call.

    Attributes:
        call: "restore", "save" or "close".
        step: the step it was called with, where there is one.
        components: the top-level keys of the state.
        busy: whether this rank must leave the call out (a save in flight and ``on_busy="skip"``).
    """

    call: str
    step: int | None = None
    components: tuple[str, ...] = ()
    busy: bool = False


class Coordinator(Protocol):
    """What the manager needs of the other ranks. Every method but the properties is collective."""

    @property
    def rank(self) -> int:
        """This process's number in the job, from 0."""
        ...

    @property
    def world_size(self) -> int:
        """How many processes the job has."""
        ...

    def vote(self, ballot: Ballot) -> Verdict:
        """Agree on one answer for all ranks, before anything else of a collective call happens."""
        ...

    def share(self, value: _T | None) -> _T:
        """Rank zero's ``value``, on every rank."""
        ...

    def collect(self, value: _T) -> Sequence[_T]:
        """Every rank's ``value`` by rank, on every rank."""
        ...


class SingleProcess:
    """A job of one process."""

    rank = 0
    world_size = 1

    def vote(self, ballot: Ballot) -> Verdict:
        """The only ballot decides."""
        return Verdict.SKIP if ballot.busy else Verdict.GO

    def share(self, value: _T | None) -> _T:
        """The value itself."""
        if value is None:
            raise TypeError("rank zero has nothing to share")
        return value

    def collect(self, value: _T) -> Sequence[_T]:
        """The only value."""
        return [value]
