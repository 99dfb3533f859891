"""What a hostile look at the lane's threads found: each test is one way in which they went wrong."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading

import pytest

from cloudckpt.storage.direct import Crew, Stop


def test_a_thread_that_cannot_start_leaves_no_job_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """When no further thread can be started, the job that was to have it is not done after ``each`` has ended."""
    crew = Crew(4)
    first, may_end, late = threading.Event(), threading.Event(), list[str]()
    start = threading.Thread.start

    def failing(thread: threading.Thread) -> None:
        if first.is_set():
            raise RuntimeError("can't start new thread")
        start(thread)
        first.wait(30)

    def begun(stop: Stop) -> None:
        first.set()
        with stop.calls(may_end.set):
            may_end.wait(2)

    ended = threading.Event()

    def other(stop: Stop) -> None:
        if ended.wait(1):
            late.append("a job was done that nobody waits for")

    monkeypatch.setattr(threading.Thread, "start", failing)
    with contextlib.suppress(RuntimeError):
        crew.each([begun, other])
    ended.set()
    monkeypatch.undo()
    crew.each([lambda _: None])
    crew.close()
    assert late == []


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_interrupt_while_a_thread_starts_hangs_nobody(when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C as a thread of the crew starts: work goes on with the next call, and a close ends."""
    crew = Crew(1)
    start = threading.Thread.start

    def interrupted(thread: threading.Thread) -> None:
        if when == "after":
            start(thread)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", interrupted)
        with pytest.raises(KeyboardInterrupt):
            crew.each([lambda _: None])
    assert crew.each([lambda _: 1, lambda _: 2]) == [1, 2]
    closer = threading.Thread(target=crew.close, daemon=True)
    closer.start()
    closer.join(30)
    assert not closer.is_alive()


AT_EXIT = """
import threading
from cloudckpt.storage.direct import Crew
crew = Crew(2)
def work():
    threading.main_thread().join()
    print(crew.each([lambda stop: 1, lambda stop: 2]), flush=True)
threading.Thread(target=work).start()
"""


def test_a_crew_works_while_the_program_ends() -> None:
    """A transfer that begins when the main thread has ended already (a save in the background) is done."""
    done = subprocess.run([sys.executable, "-c", AT_EXIT], check=False, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("[1, 2]\n", "")
