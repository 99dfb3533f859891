"""The ranks' own line: one connection from every rank to rank zero, and one thread on each end.

A rank that is killed is known at once: its connection ends. One that is stopped, or whose machine is gone, is known
by its silence. Why no TCPStore: it tells neither, and a wait in it cannot be interrupted (docs/adr/0018).

Messages have a topic and wait in a mailbox, by topic and sender, until somebody takes them.

(Past 350 lines: one protocol, and both of its ends are the same thread.)
"""

from __future__ import annotations

import contextlib
import hmac
import json
import logging
import os
import selectors
import socket
import struct
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from cloudckpt.errors import RankError

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]  # as a module that is not there

__all__ = ["Arbiter", "Channel", "Meeting", "Peer"]

_LOG = logging.getLogger("cloudckpt")
_HEAD = struct.Struct("!HQ")  # length of the topic, length of the body
#: No message is larger: a plan of a million tensors has about 100 MiB.
_MOST_BYTES = 4 * 1024**3
#: Before a connection has said who it is.
_MOST_BEFORE_HELLO = 4096
_HELLO_S = 10.0
_SLICE_BYTES = 1024 * 1024
_HELLO, _WELCOME, _PING, _BYE = ".hello", ".welcome", ".ping", ".bye"
#: While threads wait for a message, so often they look whether they were interrupted.
_LOOK_S = 0.5
_LEAVE_S = 2.0
_REMEMBERED = 64
#: What a process has open beside the ranks.
_OTHER_FILES = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Meeting:
    """Where rank zero is met.

    Attributes:
        hosts: its addresses, the likeliest first.
        port: where it listens.
        token: what proves that one belongs to the job.
    """

    hosts: tuple[str, ...]
    port: int
    token: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """A process of the job."""

    rank: int
    host: str
    pid: int

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.host}, pid {self.pid})" if self.pid else f"rank {self.rank}"


#: Told of every message on rank zero, and of every moment; gives what to send: rank, topic, body.
Outgoing = Iterable[tuple[int, str, bytes]]


class Arbiter:
    """Answers at once what the channel's thread of rank zero hears. Does nothing by itself."""

    def hears(self, peer: Peer, topic: str, body: bytes, now: float) -> Outgoing | None:
        """A message. None if it is for the mailbox."""
        del peer, topic, body, now
        return None

    def ticks(self, now: float) -> Outgoing:
        """Time has passed."""
        del now
        return ()

    def loses(self, rank: int, why: str, now: float) -> Outgoing:
        """A rank is gone."""
        del rank, why, now
        return ()


@dataclass(eq=False, slots=True)
class _Line:
    """One connection."""

    socket: socket.socket
    heard_at: float
    sent_at: float
    peer: Peer | None = None
    came: bytearray = field(default_factory=bytearray)
    going: deque[memoryview] = field(default_factory=deque)


class Channel:
    """One end of the line: rank zero's, with a connection to everybody, or another rank's, with one.

    Args:
        me: this process.
        world_size: how many processes the job has.
        silence_s: after how many seconds without a sign of life a rank counts as gone.
        arbiter: on rank zero, answers some messages at once.
    """

    def __init__(self, me: Peer, world_size: int, *, silence_s: float, arbiter: Arbiter | None = None) -> None:
        self.me = me
        self.world_size = world_size
        self._silence_s = silence_s
        self._ping_s = min(silence_s / 4, 15.0)
        self._arbiter = arbiter or Arbiter()
        self._pid = os.getpid()
        self._changed = threading.Condition()
        self._letters: dict[tuple[str, int], bytes] = {}
        # A save's letters come within the save: of long ago there are none any more.
        self._unwanted: deque[str] = deque(maxlen=_REMEMBERED)
        self._watchers: dict[str, tuple[Callable[[bytes], None], Callable[[str], None]]] = {}
        self._peers: dict[int, Peer] = {me.rank: me}
        self._lost: dict[int, str] = {}
        self._outbox: deque[tuple[int, str, bytes]] = deque()
        self._leaving: str | None = None
        self._selector = selectors.DefaultSelector()
        self._waker, self._woken = socket.socketpair()
        for end in (self._waker, self._woken):
            end.setblocking(False)
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._lines: dict[socket.socket, _Line] = {}
        self._by_rank: dict[int, _Line] = {}
        self._listener: socket.socket | None = None
        self._token = ""
        self._thread: threading.Thread | None = None
        _OPEN.add(self)

    # -- beginning -------------------------------------------------------------------------------------------

    def listen(self, address: str, token: str) -> int:
        """Be rank zero's end; gives the port.

        Raises:
            OSError: nobody may listen there.
        """
        self._token = token
        _make_room(self.world_size)
        backlog = min(self.world_size, 1024)
        if not address and socket.has_dualstack_ipv6():
            self._listener = socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=backlog)
        else:
            self._listener = socket.create_server((address, 0), backlog=backlog)
        self._listener.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._start()
        return int(self._listener.getsockname()[1])

    def join(self, meeting: Meeting, timeout_s: float) -> None:
        """Be another rank's end.

        Raises:
            RankError: rank zero cannot be reached.
        """
        end = time.monotonic() + timeout_s
        problems: list[str] = []
        for host in meeting.hosts:
            try:
                found = socket.create_connection((host, meeting.port), timeout=max(1.0, min(10.0, timeout_s / 4)))
                self._greet(found, meeting.token, end)
            except (OSError, ValueError) as exc:
                problems.append(f"{host}: {exc}")
                continue
            self._start()
            return
        self.abandon()
        raise RankError(
            f"{self.me} cannot reach rank 0 on port {meeting.port} ({'; '.join(problems)}): the ranks must be able to "
            "open TCP connections to each other; set MASTER_ADDR to an address of rank 0's machine that all can reach"
        )

    def _greet(self, found: socket.socket, token: str, end: float) -> None:
        try:
            found.settimeout(max(0.1, min(_HELLO_S, end - time.monotonic())))
            found.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            hello = {"token": token, "rank": self.me.rank, "host": self.me.host, "pid": self.me.pid}
            found.sendall(_framed(_HELLO, json.dumps(hello).encode()))
            came = bytearray()
            while (frame := _cut_frame(came, _MOST_BEFORE_HELLO)) is None:
                more = found.recv(4096)
                if not more:
                    raise OSError("somebody else answered, or refused")
                came += more
            topic, body = frame
            if topic != _WELCOME:
                raise OSError("somebody else answered")
            host = json.loads(body)
            peer = Peer(rank=0, host=str(host["host"]), pid=int(host["pid"]))
        except BaseException:
            found.close()
            raise
        self._admit(_Line(found, time.monotonic(), time.monotonic(), peer, came), peer)

    def _admit(self, line: _Line, peer: Peer) -> None:
        line.peer = peer
        line.socket.setblocking(False)
        with contextlib.suppress(OSError):
            line.socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._lines[line.socket] = line
        self._by_rank[peer.rank] = line
        with self._changed:
            self._peers[peer.rank] = peer
            self._changed.notify_all()

    def _start(self) -> None:
        for line in self._lines.values():
            self._selector.register(line.socket, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name="cloudckpt-ranks", daemon=True)
        self._thread.start()

    # -- the caller's side -----------------------------------------------------------------------------------

    def peer(self, rank: int) -> Peer:
        """What is known of a rank."""
        with self._changed:
            return self._peers.get(rank) or Peer(rank=rank, host="", pid=0)

    def post(self, rank: int, topic: str, body: bytes) -> None:
        """Send a message; returns at once. One to a rank that is gone goes nowhere."""
        with self._changed:
            self._outbox.append((rank, topic, body))
        self._wake()

    def take(self, topic: str, rank: int, *, timeout_s: float | None = None) -> bytes:
        """The message of a rank about a topic, once it is there.

        Raises:
            RankError: the rank is gone, or was silent too long.
        """
        (found,) = self.gather(topic, [rank], timeout_s=timeout_s)
        return found

    def gather(
        self,
        topic: str,
        ranks: Sequence[int],
        *,
        timeout_s: float | None = None,
        ends_early: Callable[[bytes], bool] = lambda _: False,
    ) -> list[bytes]:
        """The messages of several ranks about a topic, in their order, once all are there.

        Args:
            timeout_s: how long to wait, in seconds; None for as long as they live.
            ends_early: whether a message ends the waiting: it alone is returned then.

        Raises:
            RankError: one of them is gone, or said nothing in time; names all of these.
        """
        end = None if timeout_s is None else time.monotonic() + timeout_s
        found: dict[int, bytes] = {}
        with self._changed:
            while True:
                for rank in ranks:
                    if (letter := self._letters.pop((topic, rank), None)) is not None:
                        found[rank] = letter
                        if ends_early(letter):
                            return [letter]
                missing = [rank for rank in ranks if rank not in found]
                if not missing:
                    return [found[rank] for rank in ranks]
                if self._leaving is not None:
                    raise RankError(f"{self.me} has left: {self._leaving}")
                if gone := [rank for rank in missing if rank in self._lost]:
                    raise RankError("; ".join(f"{self._named(rank)} {self._lost[rank]}" for rank in gone))
                left = None if end is None else end - time.monotonic()
                if left is not None and left <= 0:
                    raise RankError(
                        f"nothing came from {', '.join(self._named(rank) for rank in missing)} within {timeout_s:g} s"
                    )
                self._changed.wait(_LOOK_S if left is None else min(_LOOK_S, left))

    def _named(self, rank: int) -> str:
        return str(self._peers.get(rank) or Peer(rank=rank, host="", pid=0))

    def watch(self, topic: str, look: Callable[[bytes], None], lost: Callable[[str], None]) -> None:
        """Call ``look`` with each message about a topic, and ``lost`` with the reason once any rank is gone.

        Both in the channel's thread, until the topic is forgotten. The messages stay to be taken.
        """
        with self._changed:
            self._watchers[topic] = look, lost
            came = [body for (about, _), body in self._letters.items() if about == topic]
            gone = [f"{self._named(rank)} {why}" for rank, why in self._lost.items()]
        for body in came:
            look(body)
        for reason in gone[:1]:
            lost(reason)

    def forget(self, topic: str) -> None:
        """Throw away what came about a topic, and what still comes."""
        with self._changed:
            self._unwanted.append(topic)
            self._watchers.pop(topic, None)
            for key in [key for key in self._letters if key[0] == topic]:
                del self._letters[key]

    def leave(self, reason: str) -> None:
        """Say good-bye and end. Whoever waits for this rank is told the reason. Idempotent."""
        if self._pid != os.getpid():
            return
        with self._changed:
            if self._leaving is None:
                self._leaving = reason
                for rank in [*self._by_rank]:
                    self._outbox.append((rank, _BYE, reason.encode()))
            self._changed.notify_all()
        self._wake()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(2 * _LEAVE_S)

    def abandon(self) -> None:
        """Let go of the connections without a word: in a forked child, where they would outlive the parent."""
        for line in [*self._lines.values()]:
            line.socket.close()
        for end in (self._waker, self._woken, self._listener):
            if end is not None:
                end.close()
        self._selector.close()

    def _wake(self) -> None:
        with contextlib.suppress(OSError):  # full: it will wake; closed: nobody is there
            self._waker.send(b"\0")

    # -- the thread ------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._work()
        except Exception as exc:  # noqa: BLE001 - whoever waits must not wait for ever
            _LOG.exception("the ranks' channel of %s broke", self.me)
            with self._changed:
                self._leaving = self._leaving or f"its channel broke: {exc}"
        finally:
            self.abandon()
            with self._changed:
                self._changed.notify_all()

    def _work(self) -> None:
        leave_by: float | None = None
        while True:
            for key, events in self._selector.select(0.0 if self._outbox else min(self._ping_s, 1.0)):
                if key.fileobj is self._woken:
                    with contextlib.suppress(BlockingIOError):
                        self._woken.recv(4096)
                elif key.fileobj is self._listener:
                    self._accept()
                elif (line := self._lines.get(key.fileobj)) is not None:  # type: ignore[call-overload]  # a socket
                    if events & selectors.EVENT_READ:
                        self._receive(line)
                    if events & selectors.EVENT_WRITE and line.socket in self._lines:
                        self._flush(line)
            now = time.monotonic()
            self._deliver(now)
            self._watch(now)
            self._send_all(self._arbiter.ticks(now))
            if self._leaving is not None:
                leave_by = leave_by or now + _LEAVE_S
                self._hang_up()
                if now >= leave_by or not (self._by_rank or self._outbox):
                    return

    def _hang_up(self) -> None:
        """Close each line once its last word is out; the other end closes when it has read that."""
        for line in [*self._by_rank.values()]:
            if not self._outbox and not line.going:
                with contextlib.suppress(OSError):
                    line.socket.shutdown(socket.SHUT_WR)

    def _accept(self) -> None:
        assert self._listener is not None
        with contextlib.suppress(BlockingIOError, ConnectionAbortedError):
            found, _ = self._listener.accept()
            found.setblocking(False)
            found.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            now = time.monotonic()
            self._lines[found] = _Line(found, now, now)
            self._selector.register(found, selectors.EVENT_READ)

    def _receive(self, line: _Line) -> None:
        try:
            while more := line.socket.recv(_SLICE_BYTES):
                line.came += more
                line.heard_at = time.monotonic()
                if len(more) < _SLICE_BYTES:
                    break
            ended = not more
        except BlockingIOError:
            ended = False
        except OSError:
            ended = True
        try:
            while line.socket in self._lines:
                frame = _cut_frame(line.came, _MOST_BYTES if line.peer else _MOST_BEFORE_HELLO)
                if frame is None:
                    break
                self._hear(line, *frame)
        except (ValueError, TypeError, KeyError, RecursionError):  # whoever that is, it is none of ours
            self._drop(line, "sent something that is no message")
            return
        if ended:
            self._drop(line, "is gone: its process ended, or the connection to it broke")

    def _hear(self, line: _Line, topic: str, body: bytes) -> None:
        peer = line.peer
        if peer is None:
            self._meet(line, topic, body)
        elif topic == _BYE:
            self._drop(line, f"has left: {body.decode(errors='replace')}")
        elif topic != _PING:
            self._put(peer, topic, body)

    def _meet(self, line: _Line, topic: str, body: bytes) -> None:
        said = json.loads(body) if topic == _HELLO else {}
        if not isinstance(said, dict) or not hmac.compare_digest(str(said.get("token")), self._token):
            raise ValueError("a stranger")
        peer = Peer(rank=int(said["rank"]), host=str(said["host"]), pid=int(said["pid"]))
        if not 0 < peer.rank < self.world_size or peer.rank in self._by_rank or peer.rank in self._lost:
            # One that was lost has been told to everybody as lost; who comes under its number belongs to a later job.
            raise ValueError("a rank that is there, that counts as gone, or that there is none of")
        self._admit(line, peer)
        self._queue(line, _WELCOME, json.dumps({"host": self.me.host, "pid": self.me.pid}).encode())

    def _put(self, peer: Peer, topic: str, body: bytes) -> None:
        outgoing = self._arbiter.hears(peer, topic, body, time.monotonic())
        if outgoing is not None:
            self._send_all(outgoing)
            return
        with self._changed:
            if topic in self._unwanted:
                return
            self._letters[topic, peer.rank] = body
            self._changed.notify_all()
            watcher = self._watchers.get(topic)
        if watcher is not None:
            watcher[0](body)

    def _send_all(self, outgoing: Outgoing) -> None:
        for rank, topic, body in outgoing:
            if rank == self.me.rank:
                with self._changed:
                    self._letters[topic, rank] = body
                    self._changed.notify_all()
            elif (line := self._by_rank.get(rank)) is not None:
                self._queue(line, topic, body)

    def _deliver(self, now: float) -> None:
        while True:
            with self._changed:
                if not self._outbox:
                    break
                rank, topic, body = self._outbox.popleft()
            if rank == self.me.rank:
                self._put(self.me, topic, body)
            elif (line := self._by_rank.get(rank)) is not None:
                self._queue(line, topic, body)
        for line in [*self._by_rank.values()]:
            if not line.going and now - line.sent_at >= self._ping_s:
                self._queue(line, _PING, b"")

    def _queue(self, line: _Line, topic: str, body: bytes) -> None:
        line.going.append(memoryview(_framed(topic, body)))
        self._flush(line)

    def _flush(self, line: _Line) -> None:
        try:
            while line.going:
                sent = line.socket.send(line.going[0])
                line.sent_at = time.monotonic()
                if sent < len(line.going[0]):
                    line.going[0] = line.going[0][sent:]
                else:
                    line.going.popleft()
        except BlockingIOError:
            pass
        except OSError:
            self._drop(line, "is gone: its process ended, or the connection to it broke")
            return
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if line.going else 0)
        if line.socket in self._lines and self._selector.get_key(line.socket).events != wanted:
            self._selector.modify(line.socket, wanted)

    def _watch(self, now: float) -> None:
        for line in [*self._lines.values()]:
            if line.peer is None and now - line.heard_at >= _HELLO_S:
                self._drop(line, "")
            elif line.peer is not None and now - line.heard_at >= self._silence_s:
                self._drop(line, f"has been silent for {now - line.heard_at:.0f} s: stopped, or its machine is gone")

    def _drop(self, line: _Line, why: str) -> None:
        if self._lines.pop(line.socket, None) is None:
            return
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(line.socket)
        line.socket.close()
        peer = line.peer
        if peer is None or self._by_rank.get(peer.rank) is not line:
            return
        del self._by_rank[peer.rank]
        with self._changed:
            self._lost[peer.rank] = why
            self._changed.notify_all()
            watchers = [lost for _, lost in self._watchers.values()]
        for lost in watchers:
            lost(f"{peer} {why}")
        self._send_all(self._arbiter.loses(peer.rank, why, time.monotonic()))


def _framed(topic: str, body: bytes) -> bytes:
    name = topic.encode()
    return _HEAD.pack(len(name), len(body)) + name + body


def _cut_frame(came: bytearray, most_bytes: int) -> tuple[str, bytes] | None:
    """The first message of what came, taken off; None if it is not all there.

    Raises:
        ValueError: it is no message.
    """
    if len(came) < _HEAD.size:
        return None
    name_bytes, body_bytes = _HEAD.unpack_from(came)
    if name_bytes > 1024 or body_bytes > most_bytes:
        raise ValueError("too large")
    end = _HEAD.size + name_bytes + body_bytes
    if len(came) < end:
        return None
    topic = came[_HEAD.size : _HEAD.size + name_bytes].decode()
    body = bytes(memoryview(came)[_HEAD.size + name_bytes : end])
    del came[:end]
    return topic, body


def _make_room(connections: int) -> None:
    """Many systems allow 1,024 open files by default, which a job of that many ranks needs for itself."""
    if resource is None:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + _OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


#: The channels of this process, for its forked children: a copy of a connection in there would hide that we died.
_OPEN: weakref.WeakSet[Channel] = weakref.WeakSet()


def _close_in_child() -> None:
    for channel in [*_OPEN]:
        channel.abandon()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)
