"""The threads of a lane: side by side, ended together, fewer when the store says so."""

from __future__ import annotations

import os
import threading
import time

import pytest

from cloudckpt.errors import StorageError
from cloudckpt.storage.direct import BrokenOff, Crew, Stop, Throttle
from cloudckpt.storage.direct.computing import Computing
from cloudckpt.storage.retry import Backoff

QUICK = Backoff(deadline_s=5, base_s=0.001, cap_s=0.002)


def never(_: StorageError) -> bool:
    """Whether a refusal is about too much: not here."""
    return False


def test_jobs_run_side_by_side_and_answer_in_order() -> None:
    """Four jobs that wait for one another all end, and their answers come in the order of the jobs."""
    crew = Crew(4)
    together = threading.Barrier(4, timeout=30)

    def job(number: int, _: Stop) -> int:
        together.wait()
        return number

    assert crew.each([lambda stop, n=n: job(n, stop) for n in range(4)]) == [0, 1, 2, 3]  # type: ignore[misc]  # n=n
    crew.close()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_one_failure_ends_all(error: type[BaseException]) -> None:
    """When one job fails the others are woken, none goes on, and the first error is told."""
    crew = Crew(2)
    asleep = threading.Event()
    ended = threading.Event()

    def sleeper(stop: Stop) -> None:
        try:
            asleep.set()
            stop.sleep(3600)
        finally:
            ended.set()

    def failing(_: Stop) -> None:
        assert asleep.wait(30)
        raise error("the first")

    never_run = threading.Event()
    with pytest.raises(error, match="the first"):
        crew.each([sleeper, failing, lambda _: never_run.set()])
    assert ended.is_set()
    assert not never_run.is_set()
    assert crew.each([lambda _: 7]) == [7]
    crew.close()


def test_a_request_is_tried_again_while_waiting_may_help() -> None:
    """A retryable error is tried again, a plain one is raised at once, and the tries are counted."""
    crew = Crew(1)
    left = [StorageError("busy", retryable=True), StorageError("busy", retryable=True), StorageError("no")]
    attempts = crew.attempts(Stop(), QUICK)

    def attempt() -> None:
        raise left.pop(0)

    with pytest.raises(StorageError, match="no"):
        attempts.run(attempt, is_throttled=never)
    assert attempts.count == 3


def test_the_deadline_ends_the_tries() -> None:
    """A store that stays busy is given up when the deadline is over; the error says how often it was tried."""
    now = [0.0]
    backoff = Backoff(deadline_s=1, base_s=0.001, cap_s=0.001, now=lambda: now[0])

    def attempt() -> None:
        now[0] += 0.6
        raise StorageError("busy", retryable=True)

    attempts = Crew(1).attempts(Stop(), backoff)
    with pytest.raises(StorageError, match=r"^busy \(tried 2 times in 1 s\)$") as told:
        attempts.run(attempt, is_throttled=never)
    assert told.value.retryable
    assert attempts.count == 2


def test_a_throttled_store_gets_fewer_requests_and_slowly_more_again() -> None:
    """The number is halved once a second of refusals, and grows by about one for each round of successes."""
    now = [0.0]
    crew = Crew(16, now=lambda: now[0])

    def refused(times: int) -> None:
        left = [StorageError("SlowDown", retryable=True)] * times

        def attempt() -> None:
            if left:
                raise left.pop()

        crew.attempts(Stop(), QUICK).run(attempt, is_throttled=lambda _: True)

    refused(3)
    assert crew.limit == 8
    now[0] += 1.5
    refused(1)
    assert crew.limit == 4
    for _ in range(9):
        refused(0)
    assert crew.limit in {5, 6}
    for _ in range(500):
        refused(0)
    assert crew.limit == 16


def test_no_more_requests_than_the_limit_are_under_way() -> None:
    """With the limit lowered to two, four threads never have more than two requests open."""
    crew = Crew(4)
    crew._gate.limit = 2.0
    mutex, inside, most = threading.Lock(), [0], [0]
    pair = threading.Barrier(2, timeout=30)

    def job(stop: Stop) -> None:
        def attempt() -> None:
            with mutex:
                inside[0] += 1
                most[0] = max(most[0], inside[0])
            pair.wait()
            with mutex:
                inside[0] -= 1
            crew._gate.limit = 2.0

        crew.attempts(stop, QUICK).run(attempt, is_throttled=never)

    crew.each([job] * 8)
    assert most == [2]
    crew.close()


def test_who_waits_for_the_gate_is_woken_by_the_end() -> None:
    """A transfer that waits for its turn behind another one ends when it is given up."""
    crew = Crew(2)
    crew._gate.limit = 1.0
    first, second, inside = Stop(), Stop(), threading.Event()
    ended: list[BaseException] = []

    def hold() -> None:
        with pytest.raises(BrokenOff), crew.once(first, 1):
            inside.set()
            first.sleep(3600)

    def wait() -> None:
        try:
            with crew.once(second, 1):
                pytest.fail("it was not its turn")
        except BrokenOff as exc:
            ended.append(exc)

    holder, waiter = threading.Thread(target=hold), threading.Thread(target=wait)
    holder.start()
    assert inside.wait(30)
    waiter.start()
    second()
    waiter.join(30)
    assert len(ended) == 1
    first()
    holder.join(30)


def crew_that_has_seen(*, rate: float, cost_s: float = 0.0, processors: int = 2) -> Crew:
    """A crew after twenty requests at so many bytes a second each, a byte costing so many seconds of a processor."""
    now, computed = [0.0], [0.0]

    def computing() -> Computing:
        return Computing(lambda: lambda: computed[0], processors)

    crew = Crew(32, now=lambda: now[0], computing=computing)
    for _ in range(20):
        with crew.once(Stop(), 16 << 20):
            now[0] += (16 << 20) / rate
            computed[0] += (16 << 20) * cost_s
    return crew


def test_connections_are_as_many_as_are_worth_having() -> None:
    """A fast store gets two, a slow one all there are; until a rate is known more are tried while nothing arrives."""
    assert crew_that_has_seen(rate=1.4e9).worthwhile == 2
    assert crew_that_has_seen(rate=100e6).worthwhile == 27
    assert crew_that_has_seen(rate=20e6).worthwhile == 32
    crew = Crew(8)
    assert crew.worthwhile == 8
    together = threading.Barrier(8, timeout=60)
    assert len(crew.each([lambda _: together.wait()] * 8)) == 8  # none ends before all have begun
    crew.close()


def test_connections_are_no_more_than_the_processors_carry() -> None:
    """What slows each connection down is the machine: fewer of them, unless it has processors to spare."""
    tls = 1.2e-9
    assert crew_that_has_seen(rate=25e6, cost_s=tls, processors=2).worthwhile == 23
    assert crew_that_has_seen(rate=100e6, cost_s=tls, processors=2).worthwhile == 5
    assert crew_that_has_seen(rate=100e6, cost_s=tls, processors=16).worthwhile == 27


def test_no_more_are_tried_while_those_there_are_compute() -> None:
    """As long as no part has arrived, threads that keep the lane's processors busy get no company; idle ones do."""
    now, computed, begun = [0.0], [0.0], threading.Semaphore(0)
    may_end = threading.Event()

    def crew_of(cost: float) -> int:
        may_end.clear()
        crew = Crew(
            32, now=lambda: now[0], computing=lambda: Computing(lambda: lambda: computed[0] * cost, processors=2)
        )

        def job(stop: Stop) -> None:
            with crew.once(stop, 16 << 20):
                begun.release()
                assert may_end.wait(60)

        working = threading.Thread(target=crew.each, args=([job] * 64,))
        working.start()
        for _ in range(4):
            begun.acquire()
        for _ in range(3):
            computed[0] += 0.04  # first: the crew looks at the clock by itself as well
            now[0] += 0.04
            crew._gate.grow()
        found = crew._gate.room
        may_end.set()
        working.join(60)
        crew.close()
        while begun.acquire(blocking=False):
            pass
        return found

    assert crew_of(cost=0.9 / 4) == 4  # four of them, 90 % of one processor
    assert crew_of(cost=0.1 / 4) == 32


def test_what_threads_compute_is_seen_while_they_do() -> None:
    """The processor time of another thread is read while it works, and what it was in the end when it leaves."""
    computing, spent = Computing(processors=1), list[float]()
    inside, seen = threading.Event(), threading.Event()

    def work() -> None:
        computing.enter()
        end = time.thread_time() + 0.05
        while time.thread_time() < end:
            pass
        inside.set()
        assert seen.wait(60)
        spent.append(computing.leave())

    thread = threading.Thread(target=work)
    thread.start()
    assert inside.wait(60)
    while_working = computing.since_last()
    seen.set()
    thread.join(60)
    assert spent[0] >= 0.05
    assert computing.allowed == 1
    if hasattr(time, "pthread_getcpuclockid"):
        assert while_working >= 0.05
    assert while_working + computing.since_last() == pytest.approx(spent[0])


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_has_threads_of_its_own() -> None:
    """A crew that has worked in the parent works in a child, and goes on in the parent."""
    crew = Crew(2)
    assert crew.each([lambda _: 1, lambda _: 2]) == [1, 2]
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(0 if crew.each([lambda _: 3]) == [3] else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert crew.each([lambda _: 4]) == [4]
    crew.close()


def test_the_cap_is_kept_by_all_together() -> None:
    """Bytes are let through at the rate; a pause that nobody used is not saved up."""
    now = [100.0]
    throttle = Throttle(1000.0, now=lambda: now[0])
    assert throttle.pause(500) == 0
    assert throttle.pause(500) == pytest.approx(0.5)
    assert throttle.pause(1) == pytest.approx(1.0)
    now[0] += 60
    assert throttle.pause(1000) == 0
    assert throttle.pause(1) == pytest.approx(1.0)
    assert Throttle(None).pause(1 << 40) == 0
