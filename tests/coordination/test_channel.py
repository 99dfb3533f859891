"""The ranks' own line, both ends of it in one process."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from cloudckpt.coordination.channel import Arbiter, Channel, Meeting, Peer
from cloudckpt.errors import RankError

TOKEN = "0123456789abcdef"


def channel(rank: int, world: int = 3, silence_s: float = 30, arbiter: Arbiter | None = None) -> Channel:
    """One end."""
    return Channel(Peer(rank=rank, host=f"node-{rank}", pid=rank + 1), world, silence_s=silence_s, arbiter=arbiter)


@pytest.fixture
def job() -> Iterator[list[Channel]]:
    """Three ends that know each other."""
    with ExitStack() as stack:
        yield connected(stack)


def connected(stack: ExitStack, silence_s: float = 30) -> list[Channel]:
    """Three ends, closed with the stack."""
    zero = channel(0, silence_s=silence_s)
    stack.callback(zero.leave, "done")
    port = zero.listen("127.0.0.1", TOKEN)
    ends = [zero]
    for rank in (1, 2):
        end = channel(rank, silence_s=silence_s)
        stack.callback(end.leave, "done")
        end.join(Meeting(hosts=("127.0.0.1",), port=port, token=TOKEN), 10)
        ends.append(end)
    return ends


def test_messages_arrive_by_topic_and_sender(job: list[Channel]) -> None:
    """In whatever order they come, however large they are."""
    zero, one, two = job
    large = os.urandom(5_000_000)
    two.post(0, "b", b"from two")
    one.post(0, "b", large)
    one.post(0, "a", b"first")
    assert zero.gather("b", [1, 2], timeout_s=30) == [large, b"from two"]
    assert zero.take("a", 1, timeout_s=30) == b"first"
    zero.post(2, "c", large)
    zero.post(1, "c", b"")
    assert two.take("c", 0, timeout_s=30) == large
    assert one.take("c", 0, timeout_s=30) == b""


def test_what_is_missing_in_time_is_named(job: list[Channel]) -> None:
    """With host and pid; what has come is not lost for the next who asks."""
    zero, one, _ = job
    one.post(0, "t", b"x")
    with pytest.raises(RankError, match=r"nothing came from rank 2 \(node-2, pid 3\) within 0.2 s"):
        zero.gather("t", [1, 2], timeout_s=0.2)


def test_a_rank_that_leaves_says_why(job: list[Channel]) -> None:
    """And whoever waits for it is told at once."""
    zero, one, two = job
    said: list[str] = []
    zero.watch("t", lambda _: None, said.append)
    one.leave("its training ended with ValueError: nan")
    with pytest.raises(RankError, match=r"rank 1 \(node-1, pid 2\) has left: its training ended with ValueError: nan"):
        zero.take("t", 1)
    assert said == ["rank 1 (node-1, pid 2) has left: its training ended with ValueError: nan"]
    zero.leave("done")
    with pytest.raises(RankError, match=r"rank 0 .* has left: done"):
        two.take("t", 0)
    with pytest.raises(RankError, match=r"rank 1 .* has left"):
        one.take("t", 0)


def test_a_connection_that_breaks_is_known_at_once(job: list[Channel]) -> None:
    """As when the process is killed."""
    zero, one, _ = job
    for line in [*one._lines.values()]:
        socket.socket.shutdown(line.socket, socket.SHUT_RDWR)
    with pytest.raises(RankError, match=r"rank 1 \(node-1, pid 2\) is gone"):
        zero.take("t", 1, timeout_s=30)


def test_silence_is_noticed() -> None:
    """Ends that say nothing for too long count as gone; pings keep the others."""
    with ExitStack() as stack:
        zero, one, two = connected(stack, silence_s=1.0)
        one._ping_s = 1000  # as if it were stopped
        with pytest.raises(RankError, match=r"rank 1 .* has been silent for"):
            zero.take("t", 1, timeout_s=30)
        two.post(0, "t", b"still here")
        assert zero.take("t", 2, timeout_s=30) == b"still here"


def test_strangers_are_not_let_in() -> None:
    """A wrong token, a rank that is there already, garbage: the connection ends, and the job goes on."""
    with ExitStack() as stack:
        zero, one, _ = connected(stack)
        assert zero._listener is not None
        port = zero._listener.getsockname()[1]
        for rank, token in ((1, TOKEN), (2, "wrong"), (7, TOKEN)):
            end = channel(rank)
            with pytest.raises(RankError, match="cannot reach rank 0"):
                end.join(Meeting(hosts=("127.0.0.1",), port=port, token=token), 5)
        with socket.create_connection(("127.0.0.1", port)) as stranger:
            stranger.sendall(b"GET / HTTP/1.1\r\n\r\n" * 100)
            assert stranger.recv(100) == b""
        one.post(0, "t", b"x")
        assert zero.take("t", 1, timeout_s=30) == b"x"


def test_whoever_is_not_there_cannot_be_joined() -> None:
    """Each address is tried, and each problem told."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    end = channel(1)
    with pytest.raises(RankError, match=r"rank 1 .* cannot reach rank 0 on port .*127\.0\.0\.1: .*MASTER_ADDR"):
        end.join(Meeting(hosts=("127.0.0.1",), port=port, token=TOKEN), 5)


def test_what_nobody_wants_is_not_kept(job: list[Channel]) -> None:
    """A topic that was forgotten takes no memory, whether its messages come before or after."""
    zero, one, _ = job
    one.post(0, "t", b"x")
    one.post(0, "mark", b"x")
    zero.take("mark", 1, timeout_s=30)
    zero.forget("t")
    assert zero._letters == {}
    one.post(0, "t", b"y")
    one.post(0, "mark", b"x")
    zero.take("mark", 1, timeout_s=30)
    assert zero._letters == {}


def test_who_waits_can_be_interrupted(job: list[Channel]) -> None:
    """A wait ends within a second of the end of this rank."""
    _, one, _ = job
    failed: list[BaseException] = []

    def wait() -> None:
        try:
            one.take("never", 0)
        except RankError as exc:
            failed.append(exc)

    waiter = threading.Thread(target=wait)
    waiter.start()
    one.leave("closed")
    waiter.join(30)
    assert len(failed) == 1
