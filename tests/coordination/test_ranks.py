"""Many ranks as one job, all of them in this process."""

from __future__ import annotations

import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import torch.distributed as dist

from cloudckpt.coordination import Ballot, ManyRanks, Verdict
from cloudckpt.coordination.channel import Meeting
from cloudckpt.coordination.group import Group


class Numbered(Group):
    """Ranks of one process: the number of their channel is given, not counted."""

    def next_key(self, whose: str = "manager") -> str:
        return "the-first"


def test_a_guard_more_does_not_shift_where_managers_meet() -> None:
    """A rank that has made a ``PreemptionGuard`` and others that have not still meet for their saves."""
    group = Group(rank=0, ranks=(7001, 7002), store=None)
    stem, _, number = group.next_key().rpartition("/")
    guards = [group.next_key("guard"), group.next_key("guard")]
    assert group.next_key() == f"{stem}/{int(number) + 1}"
    assert len({*guards}) == 2
    assert not any(key.startswith(f"{stem}/") for key in guards)
    assert Group(rank=0, ranks=(7001, 7003), store=None).next_key().rpartition("/")[0] != stem


def test_an_address_of_an_earlier_start_is_looked_up_again() -> None:
    """A launcher that starts the ranks again may keep the store, and with it the place where rank zero was before."""
    store = dist.HashStore()  # type: ignore[attr-defined]  # torch exports it without saying so
    zero, one = (Numbered(rank=rank, ranks=(0, 1), store=store) for rank in (0, 1))
    with socket.create_server(("127.0.0.1", 0)) as before, ThreadPoolExecutor(2) as pool:
        stale = Meeting(hosts=("127.0.0.1",), port=before.getsockname()[1], token="of the start before")
        zero.announce("the-first", stale)
        ranks = [ManyRanks(group, timeout_s=30) for group in (zero, one)]
        try:
            other = pool.submit(ranks[1].vote, Ballot(call="save", step=1))
            met, _ = before.accept()
            met.close()  # whoever has that port by now does not know the ranks
            assert ranks[0].vote(Ballot(call="save", step=1)) is Verdict.GO
            assert other.result(30) is Verdict.GO
        finally:
            for rank in ranks:
                rank.leave("done")
    assert not [thread for thread in threading.enumerate() if thread.name == "cloudckpt-ranks"]
