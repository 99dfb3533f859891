"""Many ranks as one job: votes, exchanges and reports over the channel."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict

from cloudckpt.coordination.channel import Arbiter, Channel, Outgoing, Peer
from cloudckpt.coordination.failure import Failure, is_common, mark_common
from cloudckpt.coordination.group import Group
from cloudckpt.coordination.meeting import meet, unmet
from cloudckpt.coordination.protocol import Ballot, Decide, Verdict
from cloudckpt.coordination.tally import Answer, Tally
from cloudckpt.errors import CloudCkptError, RankError

__all__ = ["ManyRanks"]

_BALLOT = "ballot"
#: First byte of a message: a word, one rank's failure, or what rank zero finds wrong with all words together.
_WORD, _FAILURE, _FINDING = b"+", b"-", b"!"
#: Where a topic's name is none that people know.
_DOING = {
    "save-deadline": "save",
    "save-plan": "save",
    "save-replicas": "save",
    "uploaded": "save",
    "choice": "choosing a checkpoint",
    "fits": "restore",
    "loaded": "load",
    "root": "claim",
}
#: How much longer than rank zero the others wait for its answer: it is rank zero that decides when it is too late.
_PATIENCE = 2


class _Polls(Arbiter):
    """Counts the votes in rank zero's channel thread, so that there is an answer even while rank zero trains."""

    def __init__(self, tally: Tally) -> None:
        self._tally = tally

    def hears(self, peer: Peer, topic: str, body: bytes, now: float) -> Outgoing | None:
        if topic != _BALLOT:
            return None
        said = json.loads(body)
        number = int(said.pop("number"))
        self._tally.rename(peer.rank, str(peer))
        ballot = Ballot(**{**said, "components": tuple(said["components"])})
        return self._told(self._tally.cast(peer.rank, number, ballot, now=now))

    def ticks(self, now: float) -> Outgoing:
        return self._told(self._tally.tick(now))

    def loses(self, rank: int, why: str, now: float) -> Outgoing:
        return self._told(self._tally.lost(rank, why, now=now))

    @staticmethod
    def _told(answers: Sequence[tuple[int, int, Answer]]) -> Outgoing:
        return [(rank, f"{_BALLOT}/{number}", _answer_bytes(answer)) for rank, number, answer in answers]


def _answer_bytes(answer: Answer) -> bytes:
    return json.dumps({"verdict": answer.verdict, "problem": answer.problem}).encode()


class ManyRanks:
    """The ranks of a process group. Connects at its first collective call.

    Args:
        group: who they are.
        timeout_s: how long the ranks wait for each other in a collective call, and after how much silence one counts
            as gone, in seconds.
    """

    def __init__(self, group: Group, *, timeout_s: float) -> None:
        self.rank = group.rank
        self.world_size = group.world_size
        self.host = socket.gethostname()
        self._group = group
        self._timeout_s = timeout_s
        self._mutex = threading.Lock()
        self._channel: Channel | None = None
        self._key = group.next_key()
        self._calls = 0
        self._gone: str | None = None

    # -- the line --------------------------------------------------------------------------------------------

    def _line(self) -> Channel:
        with self._mutex:
            if self._gone is not None:
                raise RankError(f"rank {self.rank} has left: {self._gone}")
            if self._channel is None:
                polls = _Polls(Tally(unmet(self._group), self._timeout_s))
                self._channel = meet(self._group, self._key, timeout_s=self._timeout_s, arbiter=polls)
            return self._channel

    # -- in the foreground -----------------------------------------------------------------------------------

    def vote(self, ballot: Ballot) -> Verdict:
        """See ``Coordinator``."""
        line = self._line()
        self._calls += 1
        with self._out_if_interrupted(ballot.call):
            said = {name: value for name, value in asdict(ballot).items() if value is not None}
            line.post(0, _BALLOT, json.dumps({"number": self._calls, **said}).encode())
            patience_s = None if ballot.within_s is None else _PATIENCE * ballot.within_s
            answer = json.loads(line.take(f"{_BALLOT}/{self._calls}", 0, timeout_s=patience_s))
        if answer["verdict"] is None:
            raise RankError(answer["problem"])
        return Verdict(answer["verdict"])

    def exchange(self, topic: str, word: bytes | BaseException, decide: Decide, *, patient: bool = False) -> bytes:
        """See ``Coordinator``."""
        timeout_s = None if patient else self._timeout_s
        line, name = self._line(), f"{topic}/{self._calls}"
        with self._out_if_interrupted(topic):
            if self.rank:
                line.post(0, name, self._word(word))
                answer = line.take(f"{name}/answer", 0, timeout_s=timeout_s and _PATIENCE * timeout_s)
            else:
                answers = self._decided(line, name, word, decide, timeout_s)
                for rank in range(1, self.world_size):
                    line.post(rank, f"{name}/answer", answers[rank])
                answer = answers[0]
        if answer[:1] == _WORD:
            return answer[1:]
        if isinstance(word, BaseException) and not isinstance(word, Exception):
            raise word  # Ctrl-C here is Ctrl-C, whatever has happened elsewhere
        failure = Failure.from_bytes(answer[1:])
        if answer[:1] == _FINDING:
            if isinstance(word, Exception) and is_common(word) and str(word) == failure.message:
                raise word  # with its cause
            raise mark_common(failure.again())
        if failure.rank == self.rank and isinstance(word, BaseException):
            raise mark_common(failure.error(_doing(topic))) from word
        raise mark_common(failure.error(_doing(topic)))

    @contextlib.contextmanager
    def _out_if_interrupted(self, call: str) -> Iterator[None]:
        """Whoever is interrupted in a collective call has said yes to what it will not do: it takes part no more."""
        try:
            yield
        except BaseException as exc:
            if not isinstance(exc, Exception):
                self.leave(f"it was interrupted in {call}: {type(exc).__name__}")
            raise

    def _decided(
        self, line: Channel, topic: str, word: bytes | BaseException, decide: Decide, timeout_s: float | None
    ) -> list[bytes]:
        """Rank zero's answers; the same failure for everybody if there is any."""
        try:
            said = line.gather(topic, range(1, self.world_size), timeout_s=timeout_s)
            said.insert(0, self._word(word))
            if failures := [message for message in said if message[:1] != _WORD]:
                # One rank's own failure says more than what all of them were told before.
                return [min(failures, key=lambda message: message[:1] == _FINDING)] * self.world_size
            try:
                return [_WORD + answer for answer in decide([message[1:] for message in said])]
            except CloudCkptError as exc:
                return [_FINDING + self._message(exc)[1:]] * self.world_size
        except BaseException as exc:
            # Whatever ends us, Ctrl-C included: the others learn of it now, not by waiting.
            failed = [self._message(exc)] * self.world_size
            if isinstance(exc, Exception):
                return failed
            for rank in range(1, self.world_size):
                line.post(rank, f"{topic}/answer", failed[rank])
            raise

    def _word(self, word: bytes | BaseException) -> bytes:
        """A word for an exchange; an error that an exchange has told to all ranks already goes on as it is."""
        told = is_common(word)
        return _FINDING + self._message(word)[1:] if told else self._message(word)

    def _message(self, word: bytes | BaseException) -> bytes:
        if isinstance(word, bytes):
            return _WORD + word
        return _FAILURE + Failure.of(word, rank=self.rank, host=self.host).to_bytes()

    # -- in the background -----------------------------------------------------------------------------------

    def tell(self, topic: str, word: bytes | BaseException) -> None:
        """See ``Coordinator``. To a rank that is gone it goes nowhere."""
        for rank in range(1, self.world_size):
            self._send(rank, topic, word)

    def report(self, topic: str, word: bytes | BaseException) -> None:
        """See ``Coordinator``."""
        self._send(0, topic, word)

    def _send(self, rank: int, topic: str, word: bytes | BaseException) -> None:
        with self._mutex:
            channel = self._channel
        if channel is not None:
            channel.post(rank, topic, self._message(word))

    def hear(self, topic: str) -> bytes:
        """See ``Coordinator``."""
        message = self._line().take(topic, 0)
        if message[:1] == _FAILURE:
            raise mark_common(Failure.from_bytes(message[1:]).again())
        return message[1:]

    def reports(self, topic: str) -> Sequence[bytes]:
        """See ``Coordinator``."""
        messages = self._line().gather(topic, range(1, self.world_size), ends_early=_is_failure)
        if messages and _is_failure(messages[0]):
            raise Failure.from_bytes(messages[0][1:]).error(_doing(topic))
        return [message[1:] for message in messages]

    def watch(self, topic: str, act: Callable[[str], None]) -> None:
        """See ``Coordinator``."""

        def look(message: bytes) -> None:
            if _is_failure(message):
                act(str(Failure.from_bytes(message[1:])))

        self._line().watch(topic, look, act)

    def forget(self, topic: str) -> None:
        """See ``Coordinator``."""
        with self._mutex:
            channel = self._channel
        if channel is not None:
            channel.forget(topic)

    def leave(self, reason: str) -> None:
        """See ``Coordinator``."""
        with self._mutex:
            channel, self._gone = self._channel, self._gone or reason
        if channel is not None:
            channel.leave(reason)


def _doing(topic: str) -> str:
    """What people call what a topic is about: topics have numbers of attempts, and ids of saves."""
    stem = topic.partition("/")[0].rstrip("-0123456789")
    return _DOING.get(stem, stem)


def _is_failure(message: bytes) -> bool:
    return message[:1] == _FAILURE
