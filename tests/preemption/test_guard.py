"""What a training loop holds, in a job of one process."""

from __future__ import annotations

import logging
import queue
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from cloudckpt import ConfigError, PreemptionGuard
from cloudckpt.events import Event, StopAgreed, StopNoticed, Warned
from tests.preemption.clouds import EC2, ComputeEngine

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="signals are POSIX here")
USR1, USR2 = "SIGUSR1", "SIGUSR2"


@pytest.fixture(autouse=True)
def _handlers_come_back() -> Iterator[None]:
    """Whatever a test does, the signals that it uses mean afterwards what they meant before."""
    before = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        assert signal.getsignal(number) is handler or signal.getsignal(number) == handler, number


class Heard:
    """What the guard tells, to be waited for."""

    def __init__(self) -> None:
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()

    def __call__(self, event: Event, /) -> None:
        self._events.put(event)

    def next(self) -> Event:
        """The next event."""
        return self._events.get(timeout=30)


def test_a_signal_is_a_flag_and_a_deadline() -> None:
    """The step under way ends, and from then on the answer is yes; a second signal brings nothing forward."""
    heard = Heard()
    with PreemptionGuard(signals={USR1: 100}, listeners=[heard]) as guard:
        assert not guard.should_stop(1)
        assert (guard.left_s, guard.reason, guard.noticed) == (None, None, False)
        assert guard.exit_code == 0
        signal.raise_signal(signal.SIGUSR1)
        assert guard.noticed
        assert guard.should_stop(2)
        left_s = guard.left_s
        assert left_s is not None
        assert 0 < left_s <= 100
        signal.raise_signal(signal.SIGUSR1)
        assert guard.should_stop(3)
        assert guard.left_s is not None
        assert guard.left_s <= left_s
        assert guard.reason == USR1
        assert guard.exit_code == 143
    noticed, agreed = heard.next(), heard.next()
    assert isinstance(noticed, StopNoticed)
    assert isinstance(agreed, StopAgreed)
    assert (noticed.reason, agreed.step, agreed.ranks) == (USR1, 2, 1)


def test_the_earliest_deadline_counts() -> None:
    """Of different notices, whichever came first."""
    with PreemptionGuard(signals={USR1: 100, USR2: 10}) as guard:
        signal.raise_signal(signal.SIGUSR1)
        assert guard.should_stop(1)
        signal.raise_signal(signal.SIGUSR2)
        assert guard.should_stop(2)
        assert guard.left_s is not None
        assert guard.left_s <= 10
        assert guard.reason == USR1


def test_the_handler_that_was_there_is_still_called_and_comes_back() -> None:
    """As if nobody had come in between."""
    called: list[int] = []

    def mine(number: int, frame: FrameType | None) -> None:
        called.append(number)

    before = signal.signal(signal.SIGUSR1, mine)
    try:
        with PreemptionGuard(signals=[USR1]) as guard:
            signal.raise_signal(signal.SIGUSR1)
            assert guard.should_stop(1)
            assert called == [signal.SIGUSR1]
        assert signal.getsignal(signal.SIGUSR1) is mine
        signal.raise_signal(signal.SIGUSR1)
        assert len(called) == 2
    finally:
        signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize("inner_ends_first", [True, False])
def test_guards_in_guards(inner_ends_first: bool) -> None:
    """Both notice; whichever is closed first, what was there before them is there after them."""
    before = signal.getsignal(signal.SIGUSR1)
    outer, inner = PreemptionGuard(signals=[USR1]).start(), PreemptionGuard(signals=[USR1]).start()
    signal.raise_signal(signal.SIGUSR1)
    assert inner.should_stop(1)
    assert outer.should_stop(1)
    for guard in (inner, outer) if inner_ends_first else (outer, inner):
        guard.close()
        guard.close()
    assert signal.getsignal(signal.SIGUSR1) == before


def test_a_handler_on_top_stays_and_is_served() -> None:
    """Somebody sets a handler after the guard: it is not taken away, and what it passes on does no harm."""
    passed: list[Any] = []
    before = signal.getsignal(signal.SIGUSR1)
    guard = PreemptionGuard(signals=[USR1]).start()
    below = signal.getsignal(signal.SIGUSR1)

    def on_top(number: int, frame: FrameType | None) -> None:
        passed.append(number)
        assert callable(below)
        below(number, frame)

    signal.signal(signal.SIGUSR1, on_top)
    try:
        signal.raise_signal(signal.SIGUSR1)
        assert guard.should_stop(1)
        guard.close()
        assert signal.getsignal(signal.SIGUSR1) is on_top
        signal.raise_signal(signal.SIGUSR1)
        assert len(passed) == 2
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_close_in_another_thread_hides_no_signal() -> None:
    """No handler can be put back there; the next signal does what it did before the guard."""
    called: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: called.append(number))
    try:
        guard = PreemptionGuard(signals=[USR1]).start()
        with ThreadPoolExecutor(1) as pool:
            pool.submit(guard.close).result(30)
        signal.raise_signal(signal.SIGUSR1)
        assert called == [signal.SIGUSR1]
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_signals_belong_to_the_main_thread() -> None:
    """Elsewhere the guard is refused, unless it watches none."""
    with ThreadPoolExecutor(1) as pool:
        with pytest.raises(ConfigError, match="from the main thread only"):
            pool.submit(PreemptionGuard(signals=[USR1]).start).result(30)
        guard = pool.submit(PreemptionGuard(signals=()).start).result(30)
        assert not pool.submit(guard.should_stop, 1).result(30)
        guard.close()


def test_a_file_that_appears_is_a_notice(tmp_path: Path) -> None:
    """Its first line is the reason."""
    heard, flag = Heard(), tmp_path / "stop"
    with PreemptionGuard(signals=(), file=flag, poll_s=0.01, notice_s=50, listeners=[heard]) as guard:
        assert not guard.should_stop(1)
        flag.with_name("new").write_text("the queue closes at noon\nsaid the administrator\n")
        flag.with_name("new").rename(flag)
        assert isinstance(noticed := heard.next(), StopNoticed)
        assert noticed.reason == f"{flag} is there: the queue closes at noon"
        assert guard.should_stop(2)
        assert guard.left_s is not None
        assert guard.left_s <= 50


def test_a_function_is_asked_beside_the_training() -> None:
    """In a thread of its own; a text is the reason, and one that fails is told once and asked again."""
    heard, answers = Heard(), iter([ZeroDivisionError("no"), ZeroDivisionError("no"), False, None, "enough is enough"])
    threads: set[int] = set()

    def ask() -> object:
        threads.add(threading.get_ident())
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    with PreemptionGuard(signals=(), when=ask, poll_s=0.01, listeners=[heard]) as guard:
        warned, noticed = heard.next(), heard.next()
        assert guard.should_stop(1)
    assert isinstance(warned, Warned)
    assert "ask() cannot be looked at (no)" in warned.message
    assert isinstance(noticed, StopNoticed)
    assert noticed.reason == "enough is enough"
    assert threading.get_ident() not in threads


def test_ec2_is_asked_if_one_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    """End to end: the server of this machine, by the variable that AWS's libraries read, past any proxy."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("AWS_EC2_METADATA_DISABLED", raising=False)
    heard = Heard()
    with EC2() as cloud:
        monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", f"http://{cloud.address}")
        cloud.action = '{"action": "terminate", "time": "2017-09-18T08:21:00Z"}'
        with PreemptionGuard(signals=(), aws=True, listeners=[heard]) as guard:
            noticed = heard.next()
            assert guard.should_stop(1)
            assert guard.left_s is not None
            assert guard.left_s <= 50
    assert isinstance(noticed, StopNoticed)
    assert noticed.reason == "EC2 spot instance: terminate at 2017-09-18T08:21:00Z"


def test_a_recommendation_and_then_a_notice(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first stops the training without a deadline; the second, if it comes in time, brings one."""
    monkeypatch.delenv("AWS_EC2_METADATA_DISABLED", raising=False)
    heard = Heard()
    with EC2() as cloud:
        monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", f"http://{cloud.address}")
        cloud.rebalance = '{"noticeTime": "2017-09-18T08:10:00Z"}'
        with PreemptionGuard(signals=[USR1], aws=True, rebalance=True, listeners=[heard]) as guard:
            assert heard.next() == StopNoticed(reason="EC2 rebalance recommendation", left_s=None)
            assert guard.should_stop(1)
            assert guard.left_s is None
            signal.raise_signal(signal.SIGUSR1)
            assert guard.should_stop(2)
            assert guard.left_s is not None


def test_compute_engine_is_waited_for_if_one_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    """A preemption is known when it happens, not at the next look; closing breaks off both requests that wait."""
    heard = Heard()
    with ComputeEngine() as cloud:
        monkeypatch.setenv("GCE_METADATA_HOST", cloud.address)
        with PreemptionGuard(signals=(), gcp=True, listeners=[heard]) as guard:
            assert cloud.wait_until_asked(2)
            assert not guard.should_stop(1)
            cloud.set("preempted", "TRUE")
            assert isinstance(noticed := heard.next(), StopNoticed)
            assert guard.should_stop(2)
    assert noticed.reason == "Compute Engine: preempted is TRUE"
    assert not [thread for thread in threading.enumerate() if thread.name == "cloudckpt-notices"]


def test_the_log_says_what_and_how_long(caplog: pytest.LogCaptureFixture) -> None:
    """One line when the notice is taken, one when the training stops."""
    caplog.set_level(logging.INFO, logger="cloudckpt")
    with PreemptionGuard(signals={USR1: 100_000}) as guard:
        signal.raise_signal(signal.SIGUSR1)
        assert guard.should_stop(17)
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [
        ("WARNING", "told to stop: SIGUSR1; 28 h left"),
        ("WARNING", "stopping after step 17: SIGUSR1; 28 h left"),
    ]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"signals": ["SIGNONSENSE"]}, "is no signal of this system"),
        ({"signals": [True]}, "is no signal of this system"),
        ({"signals": [12345]}, "is no signal of this system"),
        ({"signals": "SIGTERM"}, r"write \['SIGTERM'\]"),
        ({"signals": ["SIGKILL"]}, "nothing can catch SIGKILL"),
        ({"signals": {USR1: 0}}, r"signals\['SIGUSR1'\]=0: write a positive number of seconds"),
        ({"notice_s": float("nan")}, "notice_s=nan: write a positive number of seconds"),
        ({"poll_s": True}, "poll_s=True: write a positive number of seconds"),
        ({"rebalance": True}, "pass aws=True as well"),
    ],
)
def test_what_cannot_be_used_is_refused(words: dict[str, Any], said: str) -> None:
    """With what to write instead, and before anything is set."""
    with pytest.raises(ConfigError, match=said):
        PreemptionGuard(**words)


def test_a_guard_is_used_between_its_beginning_and_its_end() -> None:
    """Before, after, and twice: refused with what to do."""
    guard = PreemptionGuard(signals=())
    with pytest.raises(ConfigError, match="in a with statement, or call start"):
        guard.should_stop(1)
    guard.close()
    with guard:
        assert not guard.should_stop(1)
        with pytest.raises(ConfigError, match="expected an integer"):
            guard.should_stop("x")  # type: ignore[arg-type]  # on purpose
        with pytest.raises(ConfigError, match="started once"):
            guard.start()
    with pytest.raises(ConfigError, match="is closed"):
        guard.should_stop(2)


def test_an_error_in_the_training_goes_on_its_way() -> None:
    """The guard puts the handlers back, and hides nothing."""
    before = signal.getsignal(signal.SIGUSR1)
    with pytest.raises(ZeroDivisionError), PreemptionGuard(signals=[USR1]):
        raise ZeroDivisionError
    assert signal.getsignal(signal.SIGUSR1) == before
