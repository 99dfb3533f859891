"""How the ranks find rank zero: it listens, and the job's key-value store hands over where."""

from __future__ import annotations

import os
import socket
import time

from cloudckpt.coordination.channel import Arbiter, Channel, Meeting, Peer
from cloudckpt.coordination.group import Group, new_token, own_addresses
from cloudckpt.errors import RankError

__all__ = ["meet", "unmet"]

#: How often the others look whether rank zero is to be met somewhere else by now.
_LOOK_AGAIN_S = 0.2


def unmet(group: Group) -> list[str]:
    """Each rank in words, before anybody has come."""
    return [str(Peer(rank=rank, host="", pid=0)) for rank in range(group.world_size)]


def meet(group: Group, key: str, *, timeout_s: float, arbiter: Arbiter | None = None) -> Channel:
    """This rank's end of a new line to the others, connected; rank zero's listens.

    Args:
        key: under which the store hands over where rank zero is; on every rank the same.
        timeout_s: how long rank zero is looked for, and after how much silence a rank counts as gone, in seconds.
        arbiter: on rank zero, answers some messages at once.

    Raises:
        RankError: rank zero cannot listen, or is not to be found.
    """
    me = Peer(rank=group.rank, host=socket.gethostname(), pid=os.getpid())
    if me.rank == 0:
        return _be_met(group, key, me, timeout_s, arbiter)
    return _find_zero(group, key, me, timeout_s)


def _be_met(group: Group, key: str, me: Peer, timeout_s: float, arbiter: Arbiter | None) -> Channel:
    try:
        channel = Channel(me, group.world_size, silence_s=timeout_s, arbiter=arbiter)
        address, hosts = own_addresses()
        token = new_token()
        port = channel.listen(address, token)
    except OSError as exc:
        error = RankError(f"rank 0 ({me.host}) cannot listen for the other ranks: {exc}")
        group.announce(key, error)
        raise error from exc
    group.announce(key, Meeting(hosts=tuple(hosts), port=port, token=token))
    return channel


def _find_zero(group: Group, key: str, me: Peer, timeout_s: float) -> Channel:
    end = time.monotonic() + timeout_s
    tried: Meeting | None = None
    while True:
        meeting = group.find(key, max(0.1, end - time.monotonic()))
        if meeting == tried and time.monotonic() < end:
            time.sleep(_LOOK_AGAIN_S)
            continue
        tried = meeting
        channel = Channel(me, group.world_size, silence_s=timeout_s)  # one that could not join is used up
        try:
            channel.join(meeting, max(0.1, end - time.monotonic()))
        except RankError:
            # torchrun keeps the store when it starts the ranks again: this may be where rank zero was before.
            if time.monotonic() >= end:
                raise
        else:
            return channel
