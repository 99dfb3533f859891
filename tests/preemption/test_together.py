"""All ranks stop after the same step; the ranks are threads here, with real connections between them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch.distributed as dist

from cloudckpt.coordination.group import Group
from cloudckpt.errors import RankError
from cloudckpt.preemption.agreeing import Stop, Together

RANKS = 3
LAST = 60


class Numbered(Group):
    """Ranks of one process: the number of their channel is given, not counted."""

    def next_key(self, whose: str = "manager") -> str:
        return f"the-first/{whose}"


def together(*, agree_s: float = 30, timeout_s: float = 30) -> list[Together]:
    """The ranks of a new job."""
    store = dist.HashStore()  # type: ignore[attr-defined]  # torch exports it without saying so
    ranks = tuple(range(RANKS))
    return [
        Together(Numbered(rank=rank, ranks=ranks, store=store), timeout_s=timeout_s, agree_s=agree_s) for rank in ranks
    ]


def on_all(job: list[Together], loop: Callable[[int, Together], Any]) -> list[Any]:
    """What a function gives on every rank, each in a thread of its own; all leave in the end."""
    with ThreadPoolExecutor(RANKS) as pool:
        try:
            waits = [pool.submit(loop, rank, own) for rank, own in enumerate(job)]
            return [wait.result(60) for wait in waits]
        finally:
            for own in job:
                own.leave("done", in_order=False)


def channels() -> set[threading.Thread]:
    """The threads of channels that are there, of whatever test."""
    return {thread for thread in threading.enumerate() if thread.name == "cloudckpt-ranks"}


@pytest.mark.parametrize("told_at", range(0, 12, 2))
def test_whoever_is_told_all_stop_after_the_same_step(told_at: int) -> None:
    """Between two steps the ranks meet, as in a collective: one that stopped a step before the others would break it."""
    collective = threading.Barrier(RANKS, timeout=30)

    def loop(rank: int, own: Together) -> tuple[int, Stop]:
        for step in range(LAST):
            collective.wait()
            if step == told_at and rank == told_at % RANKS:
                own.tell("SIGTERM", 25.0)
            if (stop := own.passes(step)) is not None:
                return step, stop
        raise AssertionError("nobody stopped")

    before = channels()
    found = on_all(together(), loop)
    steps = {step for step, _ in found}
    assert len(steps) == 1
    assert min(steps) in {told_at, told_at + 1}
    assert all(f"SIGTERM on rank {told_at % RANKS}" in stop.reason for _, stop in found)
    assert all(stop.ends_at is not None for _, stop in found)
    assert channels() <= before


def test_told_from_another_thread_at_any_moment() -> None:
    """A watcher's thread speaks in the middle of a step, and several at once."""
    for _ in range(5):
        collective, go = threading.Barrier(RANKS, timeout=30), threading.Event()

        def loop(rank: int, own: Together, collective: threading.Barrier = collective, go: threading.Event = go) -> int:
            def speak() -> None:
                go.wait(30)
                own.tell(f"notice {rank}", 25.0 + rank)

            speaker = threading.Thread(target=speak)
            speaker.start()
            try:
                step = 0
                while True:
                    collective.wait()
                    if step == 3 and rank == 0:
                        go.set()
                    if own.passes(step) is not None:
                        return step
                    step += 1
            finally:
                go.set()
                speaker.join(30)

        assert len({*on_all(together(), loop)}) == 1


def test_a_notice_before_the_ranks_have_met_is_kept() -> None:
    """It came while the first step was being compiled."""
    collective = threading.Barrier(RANKS, timeout=30)

    def loop(rank: int, own: Together) -> tuple[int, str]:
        if rank == 1:
            own.tell("SIGTERM", None)
        for step in range(LAST):
            collective.wait()
            if (stop := own.passes(step)) is not None:
                assert stop.ends_at is None
                return step, stop.reason
        raise AssertionError("nobody stopped")

    found = on_all(together(), loop)
    assert len({reason for _, reason in found}) == 1
    assert len({step for step, _ in found}) == 1


def test_nothing_is_said_as_long_as_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand calls send no message but the one with which a rank says that it is there."""
    from cloudckpt.coordination.channel import Channel

    said: list[str] = []
    post = Channel.post

    def counted(self: Channel, rank: int, topic: str, body: bytes) -> None:
        said.append(topic)
        post(self, rank, topic, body)

    monkeypatch.setattr(Channel, "post", counted)

    def loop(rank: int, own: Together) -> bool:
        return all(own.passes(step) is None for step in range(1000))

    assert on_all(together(), loop) == [True] * RANKS
    assert said == ["here"] * (RANKS - 1)


@pytest.mark.parametrize("victim", range(RANKS))
def test_without_one_of_them_nobody_stops_in_order(victim: int) -> None:
    """A rank went with an error: who is told to stop is told that it cannot, and by whom; nobody waits for ever."""
    met, gone = threading.Barrier(RANKS, timeout=30), threading.Event()

    def loop(rank: int, own: Together) -> str:
        assert own.passes(0) is None
        met.wait()
        if rank == victim:
            own.leave("its training ended with ValueError: nan", in_order=False)
            gone.set()
            return ""
        gone.wait(30)
        own.tell("SIGTERM", 25.0)
        try:
            own.passes(1)
        except RankError as exc:
            return str(exc)
        raise AssertionError("nobody was missed")

    found = on_all(together(), loop)
    for rank, said in enumerate(found):
        if rank != victim:
            assert f"rank {victim} (" in said
            assert "its training ended with ValueError: nan" in said
            assert "the next start resumes from the checkpoint that was committed last" in said


@pytest.mark.parametrize("victim", range(RANKS))
def test_whoever_has_finished_is_not_missed(victim: int) -> None:
    """A notice in the last step, when others have left their loops already: it is finished as well."""
    done = threading.Event()

    def loop(rank: int, own: Together) -> bool:
        for step in range(5):
            assert own.passes(step) is None
        if rank == victim:
            own.leave("done", in_order=True)
            done.set()
        else:
            done.wait(30)
            if rank == (victim + 1) % RANKS:
                own.tell("SIGTERM", 25.0)
        return rank == victim or own.passes(5) is None

    found = on_all(together(), loop)
    # Both of the others go past the last call, or both are stopped at it.
    assert len({*found[:victim], *found[victim + 1 :]}) == 1


def test_who_comes_once_rank_zero_has_finished_is_not_missed_and_misses_nobody() -> None:
    """A loop of one step: the first rank has left it before the others make their first call. One is told in that."""
    before = channels()
    job = together()
    assert job[0].passes(0) is None
    job[0].leave("done", in_order=True)

    def loop(rank: int, own: Together) -> bool:
        if rank == 1:
            own.tell("SIGTERM", 25.0)
        return rank == 0 or own.passes(0) is None

    assert on_all(job, loop) == [True] * RANKS
    assert channels() <= before


def test_rank_zero_stays_until_the_last_has_come() -> None:
    """Not longer: it ends by itself, and nobody waits for it."""
    before = channels()
    job = together()
    assert job[0].passes(0) is None
    (its_thread,) = channels() - before
    job[0].leave("done", in_order=True)
    for own in job[1:]:
        assert its_thread.is_alive()
        assert own.passes(0) is None
        own.leave("done", in_order=True)
    its_thread.join(30)
    assert not its_thread.is_alive()


def test_rank_zero_does_not_stay_for_ever() -> None:
    """The others never make a call: it stays as long as it would have been looked for, and its process may go on."""
    before = channels()
    zero, *_ = together(timeout_s=0.5)
    assert zero.passes(0) is None
    (its_thread,) = channels() - before
    zero.leave("done", in_order=True)
    its_thread.join(30)
    assert not its_thread.is_alive()


def test_a_rank_that_never_asks_is_named() -> None:
    """Rank two has no guard, or does not call it: the others are told so, and do not wait for ever."""

    def loop(rank: int, own: Together) -> str:
        if rank == 2:
            return ""
        if rank == 1:
            own.tell("SIGTERM", 25.0)
        try:
            step = 0
            while own.passes(step) is None:
                step += 1
        except RankError as exc:
            return str(exc)
        raise AssertionError("nobody was missed")

    found = on_all(together(agree_s=3), loop)
    for said in found[:2]:
        assert "the job has to stop (SIGTERM on rank 1" in said
        assert "rank 2 has not said within 3 s where it is" in said
