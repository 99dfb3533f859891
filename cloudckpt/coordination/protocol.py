"""What the manager needs of the other ranks, and the job of one process, which needs nobody."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

__all__ = ["Ballot", "Coordinator", "Decide", "SingleProcess", "Verdict"]

#: What rank zero makes of every rank's word, by rank: the answer to each, by rank.
Decide = Callable[[Sequence[bytes]], Sequence[bytes]]


class Verdict(StrEnum):
    """What all ranks do now."""

    GO = "go"
    SKIP = "skip"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ballot:
    """One rank's view at the start of a collective call.

    Attributes:
        call: "restore", "load", "save", "staging" or "close".
        root: the run's URL.
        step: the step it was called with, where there is one.
        components: the top-level keys of the state.
        options: whatever else must be the same on all ranks, in words.
        busy: whether this rank must leave the call out (a save in flight and ``on_busy="skip"``).
        problem: why this rank cannot even begin.
        within_s: how long this rank can wait for the others, in seconds, where that is less than the job's own limit.
    """

    call: str
    root: str = ""
    step: int | None = None
    components: tuple[str, ...] = ()
    options: str = ""
    busy: bool = False
    problem: str = ""
    within_s: float | None = None

    def __str__(self) -> str:
        return self.call if self.step is None else f"{self.call}(step={self.step})"


class Coordinator(Protocol):
    """The ranks of a job, as one of them sees them.

    ``vote`` and ``exchange`` are collective, and raise the same error on every rank. ``tell``, ``hear``, ``report`` and
    ``reports`` are for the background of one save: nobody is held up by them but who asks.
    """

    @property
    def rank(self) -> int:
        """This process's number in the job, from 0."""
        ...

    @property
    def world_size(self) -> int:
        """How many processes the job has."""
        ...

    @property
    def host(self) -> str:
        """This machine's name, for messages."""
        ...

    def vote(self, ballot: Ballot) -> Verdict:
        """Agree on one answer for all ranks, before anything else of a collective call happens.

        Raises:
            RankError: a rank is gone, did not call in time, or called something else.
        """
        ...

    def exchange(self, topic: str, word: bytes | BaseException, decide: Decide, *, patient: bool = False) -> bytes:
        """Every rank's word to rank zero, and rank zero's answer to each.

        Args:
            topic: what it is about; each topic is used once in a call.
            word: this rank's word, or what kept it from having one.
            decide: asked on rank zero only.
            patient: whether to wait for as long as the others live, because it may take them long.

        Raises:
            CloudCkptError: on every rank, if any rank had an error, or ``decide`` had.
            RankError: a rank is gone, or said nothing in time.
        """
        ...

    def tell(self, topic: str, word: bytes | BaseException) -> None:
        """From rank zero to all others; or what kept it from having a word."""
        ...

    def hear(self, topic: str) -> bytes:
        """What rank zero tells. Waits as long as rank zero lives.

        Raises:
            CloudCkptError: rank zero told an error.
            RankError: rank zero is gone.
        """
        ...

    def report(self, topic: str, word: bytes | BaseException) -> None:
        """From another rank to rank zero."""
        ...

    def reports(self, topic: str) -> Sequence[bytes]:
        """What all other ranks report, by rank, from rank one on. Waits as long as they live.

        Raises:
            CloudCkptError: a rank reported an error; the first that came.
            RankError: a rank is gone.
        """
        ...

    def watch(self, topic: str, act: Callable[[str], None]) -> None:
        """Call ``act`` with the reason as soon as somebody reports or tells an error about this topic, or is gone.

        It is called once at most, in a thread of the channel's, until the topic is forgotten.
        """
        ...

    def forget(self, topic: str) -> None:
        """What is still to come about this topic is not wanted any more."""
        ...

    def leave(self, reason: str) -> None:
        """This rank takes part no more; whoever waits for it is told why. Idempotent."""
        ...


class SingleProcess:
    """A job of one process."""

    rank = 0
    world_size = 1

    @property
    def host(self) -> str:
        """See ``Coordinator``."""
        return f"{socket.gethostname()}, pid {os.getpid()}"

    def vote(self, ballot: Ballot) -> Verdict:
        """The only ballot decides."""
        return Verdict.SKIP if ballot.busy else Verdict.GO

    def exchange(self, topic: str, word: bytes | BaseException, decide: Decide, *, patient: bool = False) -> bytes:
        """The only word decides."""
        del topic, patient
        if isinstance(word, BaseException):
            raise word
        (answer,) = decide([word])
        return answer

    def tell(self, topic: str, word: bytes | BaseException) -> None:
        """Nobody is there."""

    def hear(self, topic: str) -> bytes:
        """Nobody tells anything."""
        raise TypeError(f"{topic}: rank zero hears nobody")

    def report(self, topic: str, word: bytes | BaseException) -> None:  # noqa: ARG002 - the protocol's
        """Nobody asks."""
        raise TypeError(f"{topic}: rank zero reports to nobody")

    def reports(self, topic: str) -> Sequence[bytes]:  # noqa: ARG002 - the protocol's
        """Nobody reports."""
        return []

    def watch(self, topic: str, act: Callable[[str], None]) -> None:
        """Nobody reports."""

    def forget(self, topic: str) -> None:
        """Nothing comes."""

    def leave(self, reason: str) -> None:
        """Nobody waits."""
