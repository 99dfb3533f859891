"""At which call a rank stops: at once in a job of one process, together with all others in one of many.

As long as nothing happens a rank sends nothing: a call costs a lock and a comparison. ``coordination.stopping`` says
what happens once something does.
"""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from cloudckpt.coordination.channel import Arbiter, Channel, Outgoing, Peer
from cloudckpt.coordination.group import Group
from cloudckpt.coordination.meeting import meet, unmet
from cloudckpt.coordination.stopping import Order, Rally, Standing, Told
from cloudckpt.errors import RankError

__all__ = ["Agreement", "Alone", "Stop", "Together"]

_HERE, _NOTICE, _ASK, _STANDS, _ORDER, _FINISHED = "here", "notice", "ask", "stands", "order", "finished"
#: How long the ranks may take to say where they stand. Their channels answer, not their training: milliseconds, but
#: for a rank whose interpreter is held up by something that does not let go of it.
_AGREE_S = 10.0
#: It is rank zero that decides when it is too late.
_PATIENCE = 2
#: While the main thread waits, so often it looks whether it was interrupted.
_LOOK_S = 0.5
_ADVICE = (
    "A save needs all of them: leave without one, the next start resumes from the checkpoint that was committed last"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """What all ranks have agreed on.

    Attributes:
        reason: why, for people.
        ends_at: until when there is time, by this process's ``time.monotonic``; None if nobody knows.
    """

    reason: str
    ends_at: float | None


class Agreement(Protocol):
    """The ranks of a job, as far as stopping goes."""

    def tell(self, reason: str, left_s: float | None) -> None:
        """This process was told to stop. Any thread, but no signal handler."""
        ...

    def passes(self, step: int) -> Stop | None:
        """The training has come to the end of a step: None to go on. What it is told once it is told from then on.

        Raises:
            RankError: it is time to stop, and not all ranks can.
        """
        ...

    def leave(self, reason: str, *, in_order: bool) -> None:
        """This rank takes part no more; ``in_order`` if its loop has ended as it should. Idempotent."""
        ...


class Alone:
    """A job of one process."""

    def __init__(self) -> None:
        self._stop: Stop | None = None

    def tell(self, reason: str, left_s: float | None) -> None:
        """See ``Agreement``."""
        if self._stop is None:
            self._stop = Stop(reason=reason, ends_at=None if left_s is None else time.monotonic() + left_s)

    def passes(self, step: int) -> Stop | None:
        """See ``Agreement``."""
        del step
        return self._stop

    def leave(self, reason: str, *, in_order: bool) -> None:
        """See ``Agreement``."""


class Together:
    """The ranks of a process group, over a line of their own. Connects at the first call of ``passes``.

    Args:
        group: who they are.
        timeout_s: how long rank zero is looked for, and after how much silence a rank counts as gone, in seconds. So
            long a rank zero that has finished is still to be found by those who make their first call later.
        agree_s: how long the ranks may take to agree, in seconds.
    """

    def __init__(self, group: Group, *, timeout_s: float, agree_s: float = _AGREE_S) -> None:
        self._group = group
        self._key = group.next_key("guard")
        self._timeout_s = timeout_s
        self._agree_s = agree_s
        self._changed = threading.Condition()
        self._channel: Channel | None = None
        self._early: deque[tuple[str, float | None]] = deque()
        self._calls = 0
        self._step: int | None = None
        self._asked = False
        self._order: Order | None = None
        self._ends_at: float | None = None
        self._alone: str | None = None
        # On rank zero: whether all have come; and, once it has finished, what it says to them and until when it waits.
        self._complete = False
        self._lingers: tuple[str, float] | None = None

    # -- the caller's side -----------------------------------------------------------------------------------

    def tell(self, reason: str, left_s: float | None) -> None:
        """See ``Agreement``."""
        with self._changed:
            self._asked = True  # from here on no further call is passed without an answer
            channel = self._channel
            if channel is None:
                self._early.append((reason, None if left_s is None else time.monotonic() + left_s))
        if channel is not None:
            self._post_notice(channel, reason, left_s)

    @staticmethod
    def _post_notice(channel: Channel, reason: str, left_s: float | None) -> None:
        channel.post(0, _NOTICE, json.dumps({"reason": reason, "left_s": left_s}).encode())

    def passes(self, step: int) -> Stop | None:
        """See ``Agreement``."""
        if self._channel is None:
            self._connect()
        end = time.monotonic() + _PATIENCE * self._agree_s
        with self._changed:
            while self._asked and self._order is None and self._alone is None and time.monotonic() < end:
                self._changed.wait(_LOOK_S)
            order = self._order
            if order is None and self._asked:
                silent = f"rank 0 has not answered within {_PATIENCE * self._agree_s:g} s"
                raise RankError(
                    "this rank has to stop, and cannot agree with the others on when: "
                    f"{self._alone or silent}. {_ADVICE}"
                )
            if order is None or not (order.problem or (order.call is not None and self._calls + 1 >= order.call)):
                self._calls += 1
                self._step = step
                return None
        if order.problem:
            raise RankError(
                f"the job has to stop ({order.reason}), and its ranks cannot stop together: {order.problem}. {_ADVICE}"
            )
        return Stop(reason=order.reason, ends_at=self._ends_at)

    def _connect(self) -> None:
        rank = self._group.rank
        names = unmet(self._group)
        channel = meet(
            self._group, self._key, timeout_s=self._timeout_s, arbiter=_Rallying(Rally(names, self._agree_s), self)
        )
        if rank:
            channel.watch(_ASK, lambda _: channel.post(0, _STANDS, self.asked().to_bytes()), self._left_alone)
            channel.watch(_ORDER, lambda body: self.ordered(Order.from_bytes(body)), self._left_alone)
            channel.post(0, _HERE, b"")
        with self._changed:
            self._channel = channel
            early = [*self._early]
        for reason, ends_at in early:
            self._post_notice(channel, reason, None if ends_at is None else ends_at - time.monotonic())

    def leave(self, reason: str, *, in_order: bool) -> None:
        """See ``Agreement``."""
        with self._changed:
            channel = self._channel
            standing = Standing(calls=self._calls, step=self._step, final=True)
        if channel is None:
            return
        # Whoever is told to stop in its last step finds the others gone, and nothing wrong with that.
        if in_order and self._group.rank:
            channel.post(0, _STANDS, standing.to_bytes())
        elif in_order:
            channel.post(0, _FINISHED, b"")
            with self._changed:
                if not self._complete:
                    # A rank may be on its way into its first call still, which is its last as well in a loop of one
                    # step: it must find somebody. The channel's thread waits for it, and this one does not.
                    self._lingers = reason, time.monotonic() + self._timeout_s
                    return
        channel.leave(reason)

    # -- in the channel's thread -----------------------------------------------------------------------------

    def asked(self) -> Standing:
        """Where this rank stands; it passes no further call without an order."""
        with self._changed:
            self._asked = True
            return Standing(calls=self._calls, step=self._step)

    def ordered(self, order: Order) -> None:
        """What all ranks do; the first word counts."""
        with self._changed:
            if self._order is None:
                self._order = order
                self._ends_at = None if order.left_s is None else time.monotonic() + order.left_s
            self._changed.notify_all()

    def may_end(self, now: float, *, complete: bool) -> None:
        """On rank zero: leave if this rank has finished, and all have come or have had the time for it."""
        with self._changed:
            self._complete = complete
            lingers, channel = self._lingers, self._channel
            if lingers is None or channel is None or not (complete or now >= lingers[1]):
                return
            self._lingers = None
        channel.leave(lingers[0])

    def _left_alone(self, reason: str) -> None:
        with self._changed:
            self._alone = self._alone or reason
            self._changed.notify_all()


class _Rallying(Arbiter):
    """Asks, and answers, in rank zero's channel thread."""

    def __init__(self, rally: Rally, zero: Together) -> None:
        self._rally = rally
        self._zero = zero

    def hears(self, peer: Peer, topic: str, body: bytes, now: float) -> Outgoing | None:
        self._rally.rename(peer.rank, str(peer))
        if topic == _HERE:
            return self._sent(self._rally.comes(peer.rank), now)
        if topic == _NOTICE:
            said = json.loads(body)
            return self._sent(self._rally.notice(peer.rank, said["reason"], said["left_s"], now=now), now)
        if topic == _STANDS:
            return self._sent(self._rally.stands(peer.rank, Standing.from_bytes(body), now=now), now)
        if topic == _FINISHED:
            return self._sent(self._rally.finish(), now)
        return None

    def ticks(self, now: float) -> Outgoing:
        self._zero.may_end(now, complete=self._rally.complete)
        return self._sent(self._rally.tick(now), now)

    def loses(self, rank: int, why: str, now: float) -> Outgoing:
        return self._sent(self._rally.lost(rank, why, now=now), now)

    def _sent(self, told: Sequence[Told], now: float) -> list[tuple[int, str, bytes]]:
        """What goes to the others. Rank zero is in this process: it is asked and told at once."""
        going: list[tuple[int, str, bytes]] = []
        for rank, order in told:
            if rank:
                going.append((rank, _ASK, b"") if order is None else (rank, _ORDER, order.to_bytes()))
            elif order is None:
                going += self._sent(self._rally.stands(0, self._zero.asked(), now=now), now)
            else:
                self._zero.ordered(order)
        return going
