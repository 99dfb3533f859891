"""At which call all ranks stop."""

from __future__ import annotations

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cloudckpt.coordination.stopping import Order, Rally, Standing, Told

NAMES = ["rank 0 (a, pid 1)", "rank 1 (a, pid 2)", "rank 2 (b, pid 3)"]


def rally(*, there: tuple[int, ...] = (1, 2)) -> Rally:
    """Three ranks, of which these have come."""
    found = Rally(NAMES, 10)
    for rank in there:
        assert found.comes(rank) == []
    return found


def at(calls: int, step: int | None = None, *, final: bool = False) -> Standing:
    """A rank that has passed so many calls."""
    return Standing(calls=calls, step=calls if step is None else step, final=final)


def orders(told: list[Told]) -> list[tuple[int, Order]]:
    """Who is told what, without the questions."""
    return [(rank, order) for rank, order in told if order is not None]


def test_the_call_after_the_furthest_is_the_one_at_which_all_stop() -> None:
    """A notice on one rank asks all; once the last has answered, all are told the same."""
    found = rally()
    assert found.notice(1, "SIGTERM", 25.0, now=100.0) == [(0, None), (1, None), (2, None)]
    assert found.stands(1, at(7), now=100.1) == []
    assert found.stands(0, at(8), now=100.2) == []
    told = orders(found.stands(2, at(7), now=101.0))
    order = Order(call=9, left_s=24.0, reason="SIGTERM on rank 1 (a, pid 2)")
    assert told == [(0, order), (1, order), (2, order)]
    assert found.order == order


def test_the_earliest_deadline_counts() -> None:
    """Of all notices until the answer; one that names no deadline changes none."""
    found = rally()
    found.notice(2, "EC2 rebalance recommendation", None, now=0.0)
    assert found.notice(0, "SIGTERM", 25.0, now=1.0) == []
    assert found.notice(1, "EC2 spot", 110.0, now=2.0) == []
    for rank in (0, 1, 2):
        found.stands(rank, at(3), now=3.0)
    assert found.order == Order(call=4, left_s=23.0, reason="EC2 rebalance recommendation on rank 2 (b, pid 3)")
    assert found.notice(0, "again", 1.0, now=4.0) == []


def test_nobody_knows_when() -> None:
    """No notice named a deadline: neither does the order."""
    found = rally()
    found.notice(0, "a file", None, now=0.0)
    for rank in (0, 1, 2):
        found.stands(rank, at(0, None), now=0.0)
    assert found.order is not None
    assert found.order.left_s is None
    assert found.order.call == 1


def test_who_comes_late_is_asked_when_it_comes() -> None:
    """A rank that is still on its way to its first call is not left out; after the order it is told that."""
    found = rally(there=(1,))
    assert found.notice(0, "SIGTERM", 25.0, now=0.0) == [(0, None), (1, None)]
    found.stands(0, at(1), now=0.0)
    found.stands(1, at(1), now=0.0)
    assert found.comes(2) == [(2, None)]
    told = orders(found.stands(2, at(0, None), now=0.5))
    assert [rank for rank, _ in told] == [0, 1, 2]
    assert told[0][1].call == 2
    assert found.comes(2) == [(2, told[0][1])]


def test_a_rank_that_is_gone_makes_it_impossible() -> None:
    """Whether it was gone before the notice or goes after it; the others are told who and how."""
    for before in (True, False):
        found = rally()
        told: list[Told] = []
        if before:
            assert found.lost(1, "is gone: its process ended", now=0.0) == []
        told += found.notice(0, "SIGTERM", 25.0, now=1.0)
        if not before:
            told += found.lost(1, "is gone: its process ended", now=2.0)
        assert {rank for rank, _ in orders(told)} == {0, 2}
        assert found.order == Order(
            problem="rank 1 (a, pid 2) is gone: its process ended", reason="SIGTERM on rank 0 (a, pid 1)"
        )


def test_a_rank_whose_loop_has_ended_is_not_missed() -> None:
    """It said so before it left, and its last call counts."""
    found = rally()
    assert found.stands(2, at(9, final=True), now=0.0) == []
    assert found.lost(2, "has left: it closed its PreemptionGuard", now=0.0) == []
    found.notice(0, "SIGTERM", 25.0, now=1.0)
    found.stands(0, at(8), now=1.0)
    told = orders(found.stands(1, at(9), now=1.0))
    assert [(rank, order.call) for rank, order in told] == [(0, 10), (1, 10)]


def test_once_rank_zero_has_finished_nobody_stops() -> None:
    """Those who are there are told so, and who comes later as well; a notice asks nobody any more."""
    found = rally(there=(1,))
    assert not found.complete
    assert found.finish() == [(0, Order()), (1, Order())]
    assert found.notice(1, "SIGTERM", 25.0, now=1.0) == []
    assert found.tick(100.0) == []
    assert found.comes(2) == [(2, Order())]
    assert found.complete
    assert found.finish() == []


def test_whoever_was_asked_when_rank_zero_finished_goes_on() -> None:
    """It waits for an answer; after one that says when to stop, the end of rank zero's loop changes nothing."""
    found = rally()
    found.notice(1, "SIGTERM", 25.0, now=0.0)
    assert orders(found.finish()) == [(rank, Order()) for rank in (0, 1, 2)]
    assert found.stands(1, at(1), now=0.1) == []
    found = rally()
    found.notice(1, "SIGTERM", 25.0, now=0.0)
    for rank in (0, 1, 2):
        found.stands(rank, at(1), now=0.1)
    assert found.finish() == []
    assert found.order is not None
    assert found.order.call == 2


def test_who_does_not_answer_is_named() -> None:
    """After the time for it, and not before."""
    found = rally(there=(1,))
    found.notice(1, "SIGTERM", 25.0, now=0.0)
    found.stands(0, at(1), now=0.0)
    found.stands(1, at(1), now=0.0)
    assert found.tick(9.9) == []
    told = orders(found.tick(10.0))
    assert [rank for rank, _ in told] == [0, 1]
    assert told[0][1].problem.startswith("rank 2 (b, pid 3) has not said within 10 s where it is")
    assert found.tick(11.0) == []
    assert found.comes(2) == [(2, told[0][1])]


def test_ranks_that_are_not_in_step_are_told_so() -> None:
    """As many calls and another step: stopping at the same call would stop at different steps."""
    found = rally()
    found.notice(0, "SIGTERM", 25.0, now=0.0)
    found.stands(0, at(5, 50), now=0.0)
    found.stands(1, at(5, 51), now=0.0)
    told = orders(found.stands(2, at(6, 60), now=0.0))
    assert {order.problem for _, order in told} == {
        (
            "after 5 calls of should_stop() the ranks are at different steps: rank 0 (a, pid 1) at step 50, "
            "rank 1 (a, pid 2) at step 51"
        )
    }


def test_a_rank_is_called_what_it_is_known_as_by_now() -> None:
    """Names come with the connections."""
    found = Rally(["rank 0", "rank 1"], 10)
    found.rename(1, "rank 1 (node-1, pid 4711)")
    found.notice(1, "SIGTERM", 25.0, now=0.0)
    found.stands(0, at(0, None), now=0.0)
    assert found.comes(1) == [(1, None)]
    found.stands(1, at(0, None), now=0.0)
    assert found.order is not None
    assert found.order.reason == "SIGTERM on rank 1 (node-1, pid 4711)"


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.integers(0, 50), min_size=3, max_size=3),
    st.permutations([0, 1, 2]),
    st.integers(0, 2),
)
def test_no_rank_has_passed_the_call_at_which_all_stop(calls: list[int], order: list[int], noticed: int) -> None:
    """In whatever order they answer, and wherever they stand; and one of them is right before it."""
    found = rally()
    found.notice(noticed, "SIGTERM", 25.0, now=0.0)
    for rank in order:
        assert found.order is None
        found.stands(rank, at(calls[rank]), now=0.0)
    assert found.order is not None
    assert found.order.call == max(calls) + 1


@settings(deadline=None)
@given(st.builds(Order, call=st.none() | st.integers(1), left_s=st.none() | st.floats(0, 1e6), reason=st.text()))
def test_an_order_goes_over_the_channel(drawn: Order) -> None:
    """And comes back the same."""
    assert Order.from_bytes(drawn.to_bytes()) == drawn


@settings(deadline=None)
@given(st.builds(Standing, calls=st.integers(0), step=st.none() | st.integers(0), final=st.booleans()))
def test_a_standing_goes_over_the_channel(drawn: Standing) -> None:
    """And comes back the same."""
    assert Standing.from_bytes(drawn.to_bytes()) == drawn


class Job:
    """Ranks that train in step, and messages that take any time: every moment at which something can happen is chosen.

    Between its call n and its next one a rank is in a collective, which ends once all ranks have passed call n.
    """

    def __init__(self, ranks: int) -> None:
        self.rally = Rally([f"rank {rank}" for rank in range(ranks)], 1000)
        for rank in range(1, ranks):
            self.rally.comes(rank)
        self.ranks = range(ranks)
        self.calls = [0] * ranks
        self.asked = [False] * ranks
        self.stopped = [False] * ranks
        self.orders: list[Order | None] = [None] * ranks
        self.up: list[list[Standing | None]] = [[] for _ in self.ranks]
        self.down: list[list[Order | None]] = [[] for _ in self.ranks]

    def possible(self) -> list[tuple[str, int]]:
        """What can happen next: messages first, then calls."""
        found = [("up", rank) for rank in self.ranks if self.up[rank]]
        found += [("down", rank) for rank in self.ranks if self.down[rank]]
        waits = [self.asked[rank] and self.orders[rank] is None for rank in self.ranks]
        slowest = min(self.calls)
        found += [
            ("call", rank)
            for rank in self.ranks
            if not self.stopped[rank] and not waits[rank] and self.calls[rank] <= slowest
        ]
        return found

    def happens(self, what: str, rank: int) -> None:
        """It does."""
        if what == "tell":
            self.asked[rank] = True
            self.up[rank].append(None)
        elif what == "up":
            said = self.up[rank].pop(0)
            if said is None:
                told = self.rally.notice(rank, "SIGTERM", 25.0, now=0.0)
            else:
                told = self.rally.stands(rank, said, now=0.0)
            for other, order in told:
                self.down[other].append(order)
        elif what == "down":
            order = self.down[rank].pop(0)
            if order is None:
                self.asked[rank] = True
                self.up[rank].append(at(self.calls[rank]))
            else:
                self.orders[rank] = order
        else:
            given = self.orders[rank]
            if given is not None and given.call is not None and self.calls[rank] + 1 >= given.call:
                self.stopped[rank] = True
            else:
                self.calls[rank] += 1


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data(), st.integers(2, 4))
def test_whenever_what_happens_all_stop_at_the_same_call(data: st.DataObject, ranks: int) -> None:
    """Several ranks are told at any moments, and messages arrive late: nobody is left alone in a collective."""
    job = Job(ranks)
    told = data.draw(st.lists(st.integers(0, ranks - 1), min_size=1, max_size=3))
    for _ in range(data.draw(st.integers(0, 40))):
        choices = [*job.possible(), *(("tell", rank) for rank in told[:1])]
        if not choices:
            break
        what, rank = data.draw(st.sampled_from(choices))
        job.happens(what, rank)
        if what == "tell":
            told = told[1:]
    for rank in told:
        job.happens("tell", rank)
    while not all(job.stopped):
        assert job.possible(), (job.calls, job.stopped)
        job.happens(*job.possible()[0])
    assert len({*job.calls}) == 1
