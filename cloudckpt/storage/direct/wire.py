"""Connections that send views of memory and receive into memory; ``http.client`` does the speaking.

A connection is used again while both sides keep it. A request on one that the server had given up meanwhile is sent
anew at once: all requests of a lane (a part by its number, a range) can be repeated. Nothing waits for ever: each
slice of a body, and each answer, must come within one time-out.

Past 350 lines, because what one connection can do wrong is told in one place.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import select
import socket
import ssl
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from cloudckpt.storage.direct.address import Address
from cloudckpt.storage.direct.crew import Stop
from cloudckpt.storage.direct.nearness import keep_queue_short
from cloudckpt.storage.direct.throttle import Throttle

__all__ = ["Answer", "Request", "Wire", "WireError"]

#: What is handed to the socket at once: large enough to cost nothing, and on a line that is slow small enough for the
#: time-out to mean silence: 32 connections that share 5 Mbit/s each move the smaller one in less than a minute.
_SLICE_BYTES = 4 * 1024 * 1024
_SLOW_SLICE_BYTES = 1024 * 1024
#: So many times as long as the last rate tells may a large slice take within the time-out.
_MARGIN = 4
_CONNECT_S = 10.0
#: Answers that are no payload are small; more than this is not read.
_SMALL_BYTES = 1024 * 1024
_BODILESS = {204, 304}
_WITH_BODY = {"PUT", "POST"}
#: Interim answers; http.client itself passes over 100.
_NOT_YET = {102, 103}


class WireError(OSError):
    """No usable answer came; says why. The request may or may not have been carried out."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a server said.

    Attributes:
        status: the HTTP status.
        headers: by lower-case name; repeated ones joined with a comma.
        body: the body, unless it went into the targets.
        filled: how many bytes went into the targets.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes
    filled: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is asked of a server.

    Attributes:
        method: the HTTP method.
        target: path and query, as signed.
        headers: all of them but ``Content-Length``, which is taken from the views.
        views: the body.
        targets: where the body of the answer goes, one after the other, if it succeeds and is just as long.
    """

    method: str
    target: str
    headers: Mapping[str, str]
    views: Sequence[memoryview] = ()
    targets: Sequence[memoryview] = ()


class _Exchange:
    """One connection; not shared between threads while a request is under way."""

    def __init__(self, address: Address) -> None:
        self._through_proxy = address.proxy is not None and address.scheme == "http"
        place = urlsplit(address.proxy) if address.proxy is not None else None
        host, port = (address.host, address.port) if place is None else (place.hostname or "", place.port or 80)
        if address.tls is not None:
            self.connection: http.client.HTTPConnection = _Secure(
                host, port, timeout=_CONNECT_S, tls=address.tls, server_name=address.host
            )
        else:
            self.connection = http.client.HTTPConnection(host, port, timeout=_CONNECT_S)
        self.connection.response_class = _Response
        if place is not None and not self._through_proxy:
            self.connection.set_tunnel(address.host, address.port, address.proxy_headers)
        self._prefix = f"{address.scheme}://{address.name}" if self._through_proxy else ""
        self._proxy_headers = address.proxy_headers if self._through_proxy else {}
        self.used = False
        #: Set when the watcher has given up on it.
        self.late = False

    def connect(self) -> None:
        self.connection.connect()
        # From here on the watcher keeps the time: a socket with a time-out polls before each call.
        self._socket.settimeout(None)
        keep_queue_short(self._socket)

    @property
    def _socket(self) -> socket.socket:
        found = self.connection.sock
        if found is None:
            raise WireError("the connection was closed")
        return found

    @property
    def is_dropped(self) -> bool:
        """Whether the server has closed it, or sent something nobody asked for."""
        sock = self.connection.sock
        if sock is None:
            return True
        if not hasattr(select, "poll"):  # Windows, where any number will do for select
            return bool(select.select([sock], [], [], 0)[0])
        asked = select.poll()
        asked.register(sock, select.POLLIN)
        return bool(asked.poll(0))

    def break_off(self) -> None:
        """From another thread: whoever waits for this connection stops waiting."""
        sock = self.connection.sock  # looked at once: its own thread may be closing it
        if sock is not None:
            with contextlib.suppress(OSError):
                # Not ``SSLSocket.shutdown``: it forgets the encryption first, and what the other thread then sends or
                # receives, before the socket is down, goes as it is.
                socket.socket.shutdown(sock, socket.SHUT_RDWR)

    def close(self) -> None:
        self.connection.close()

    def send(self, request: Request, moved: Callable[[int], None], pace: _Pace) -> None:
        connection = self.connection
        connection.putrequest(request.method, self._prefix + request.target, skip_host=True, skip_accept_encoding=True)
        for name, value in (*request.headers.items(), *self._proxy_headers.items()):
            connection.putheader(name, value)
        if request.views or request.method in _WITH_BODY:
            connection.putheader("Content-Length", str(sum(view.nbytes for view in request.views)))
        connection.endheaders()
        sock = self._socket
        for view in request.views:
            at = 0
            while at < len(view):
                piece = view[at : at + pace.slice_bytes]
                moved(len(piece))
                with pace.of(len(piece)):
                    sock.sendall(piece)
                at += len(piece)

    def receive(self, targets: Sequence[memoryview], moved: Callable[[int], None], pace: _Pace) -> tuple[Answer, bool]:
        """The answer, and whether the connection can be used again."""
        response = self.connection.getresponse()
        headers: dict[str, str] = {}
        for name, value in response.headers.items():
            known = headers.get(name.lower())
            headers[name.lower()] = value if known is None else f"{known}, {value}"
        filled, body = 0, b""
        if targets and self._is_wanted(response, sum(map(len, targets))):
            for target in targets:
                filled += self._fill(response, target, moved, pace)
            # Of a body in chunks the end is to be read, and more than was asked for is something else.
            if response.chunked and response.read(1):
                filled = 0
        elif response.status not in _BODILESS:
            body = response.read(_SMALL_BYTES)
        keeps = response.isclosed() or (response.length == 0 and not response.will_close)
        if keeps:
            response.close()
        return Answer(response.status, headers, body, filled), keeps and self.connection.sock is not None

    @staticmethod
    def _is_wanted(response: http.client.HTTPResponse, size_bytes: int) -> bool:
        """Whether the body is what the targets are for, as far as its headers tell."""
        if response.chunked:  # its length shows at its end
            return response.status == 206
        # A whole object that was asked for by its whole range may come as a plain 200.
        return response.status in {200, 206} and response.length == size_bytes

    @staticmethod
    def _fill(response: http.client.HTTPResponse, target: memoryview, moved: Callable[[int], None], pace: _Pace) -> int:
        done = 0
        while done < len(target):
            piece = target[done : done + pace.slice_bytes]
            with pace.of(len(piece)):
                count = response.readinto(piece)
            if not count:
                break
            done += count
            moved(count)
        return done


class _Pace:
    """How much of a body is moved between two looks at the clock.

    Args:
        progress_s: how long one slice may take, in seconds.
        most_bytes: of a slice.
    """

    def __init__(self, progress_s: float, most_bytes: int) -> None:
        self._progress_s = progress_s
        self._most_bytes = most_bytes
        self.slice_bytes = min(_SLOW_SLICE_BYTES, most_bytes)

    @contextlib.contextmanager
    def of(self, size_bytes: int) -> Iterator[None]:
        """The block moves this many bytes; a quick line is given more the next time, a slow one less."""
        began = time.monotonic()
        yield
        if size_bytes >= self.slice_bytes:
            expected_s = (time.monotonic() - began) * self._most_bytes / size_bytes
            is_quick = expected_s * _MARGIN < self._progress_s
            self.slice_bytes = self._most_bytes if is_quick else min(_SLOW_SLICE_BYTES, self._most_bytes)


class _Response(http.client.HTTPResponse):
    """An answer whose headers came to their end, after whatever a server says before its answer."""

    def begin(self) -> None:
        lines = _Lines(self.fp)
        self.fp: Any = lines
        try:
            super().begin()
        finally:
            if self.fp is not None:
                self.fp = lines.file
        if lines.last not in {b"\r\n", b"\n"}:
            # http.client takes the end of the connection for the end of the headers, and half a number for a number.
            raise http.client.IncompleteRead(lines.last)

    def _read_status(self) -> tuple[str, int, str]:
        while True:
            found: tuple[str, int, str] = super()._read_status()  # type: ignore[misc]  # its stub lacks it
            if found[1] in _NOT_YET:
                http.client.parse_headers(self.fp)
            else:
                return found


class _Lines:
    """A file that remembers the line it gave out last."""

    def __init__(self, file: Any) -> None:
        self.file = file
        self.last = b""

    def readline(self, limit: int = -1) -> bytes:
        self.last = self.file.readline(limit)
        return self.last

    def close(self) -> None:
        self.file.close()


class _Secure(http.client.HTTPConnection):
    """TLS with a context of ours, made once; ``HTTPSConnection`` reads the trust store for each connection."""

    default_port = 443

    def __init__(self, host: str, port: int, *, timeout: float, tls: ssl.SSLContext, server_name: str) -> None:
        super().__init__(host, port, timeout=timeout)
        self._tls = tls
        self._server_name = server_name

    def connect(self) -> None:
        super().connect()
        # In this order, so that whoever gives up finds the socket while hands are being shaken.
        self.sock = self._tls.wrap_socket(self.sock, server_hostname=self._server_name, do_handshake_on_connect=False)
        self.sock.do_handshake()


class _Watcher:
    """Breaks off exchanges that do not move. One thread, which ends when there is nothing to watch."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._due: dict[_Exchange, float] = {}
        self._running = False
        self._rests = False

    def expect(self, exchange: _Exchange, within_s: float) -> None:
        """It must move within so many seconds."""
        due = time.monotonic() + within_s
        with self._changed:
            known = exchange in self._due
            self._due[exchange] = due
            self._rests = False
            if not self._running:
                try:
                    threading.Thread(target=self._watch, name="cloudckpt-lane-watch", daemon=True).start()
                except RuntimeError as exc:  # too many of them, or the process is ending
                    del self._due[exchange]
                    raise WireError(f"no thread to watch the connection: {exc}") from exc
                self._running = True
            elif not known and len(self._due) == 1:
                self._changed.notify_all()

    def forget(self, exchange: _Exchange) -> None:
        with self._changed:
            self._due.pop(exchange, None)

    def rest(self) -> None:
        """Nothing more is to come for now: the thread need not wait for it."""
        with self._changed:
            self._rests = True
            self._changed.notify_all()

    def _watch(self) -> None:
        with self._changed:
            while True:
                now = time.monotonic()
                for exchange, due in [*self._due.items()]:
                    if due <= now:
                        del self._due[exchange]
                        exchange.late = True
                        exchange.break_off()
                nearest = min(self._due.values(), default=None)
                if nearest is not None:
                    self._changed.wait(max(nearest - now, 0.001))
                elif self._rests or not (self._changed.wait(_CONNECT_S) or self._due):
                    # Idle for a while: the thread goes, and the next request brings another.
                    self._running = False
                    return


class Wire:
    """Connections to one address, and requests over them.

    Args:
        address: where to.
        progress_s: how long a slice of a body, or an answer, may take, in seconds.
        throttle: caps what is sent.
    """

    def __init__(self, address: Address, *, progress_s: float, throttle: Throttle | None = None) -> None:
        self.address = address
        self._progress_s = progress_s
        self._throttle = throttle or Throttle(None)
        self._mutex = threading.Lock()
        self._idle: list[_Exchange] = []
        self._watcher = _Watcher()
        self._pid = os.getpid()
        # A wire that is forgotten gives its connections back.
        self._finish = weakref.finalize(self, _close_idle, self._idle, self._pid)
        self._finish.atexit = False

    def _check_fork(self) -> None:
        if self._pid != os.getpid():
            # The sockets are the parent's, and what a thread of it held stays held here.
            self._finish.detach()
            self._mutex, self._idle, self._watcher, self._pid = threading.Lock(), [], _Watcher(), os.getpid()
            self._finish = weakref.finalize(self, _close_idle, self._idle, self._pid)
            self._finish.atexit = False

    def send(self, request: Request, stop: Stop) -> Answer:
        """One request and its answer.

        Raises:
            WireError: no usable answer came.
            BrokenOff: the transfer was given up.
        """
        self._check_fork()
        while True:
            exchange = self._take(stop)
            try:
                with stop.calls(exchange.break_off):
                    return self._exchange(exchange, request, stop)
            except (OSError, http.client.HTTPException) as exc:
                stop.check()
                if exchange.used and not exchange.late and isinstance(exc, _STALE):
                    continue  # the server had given up this connection; a new one tells more
                raise self._explained(exchange, exc) from exc

    def _exchange(self, exchange: _Exchange, request: Request, stop: Stop) -> Answer:
        keeps = False

        def moving(size_bytes: int) -> None:
            stop.check()  # it may have come before there was a socket to shut down
            if pause := self._throttle.pause(size_bytes):
                self._watcher.forget(exchange)  # it is us who wait
                stop.sleep(pause)
            self._watcher.expect(exchange, self._progress_s)

        def moved(_: int) -> None:
            self._watcher.expect(exchange, self._progress_s)

        try:
            if not exchange.used:
                self._watcher.expect(exchange, self._progress_s)
                exchange.connect()
                stop.check()
            broken = self._send(exchange, request, moving)
            answer, keeps = self._receive(exchange, request, moved, broken)
            if exchange.late:
                # The end that the watcher made may have looked like the end of the headers.
                raise WireError("too late")
            return answer
        finally:
            self._watcher.forget(exchange)
            self._give_back(exchange, keeps=keeps and not exchange.late)

    def _send(self, exchange: _Exchange, request: Request, moving: Callable[[int], None]) -> OSError | None:
        """Send it. A server may refuse in mid-body and hang up: what it said explains more than the broken pipe."""
        self._watcher.expect(exchange, self._progress_s)
        try:
            exchange.send(request, moving, _Pace(self._progress_s, self._throttle.slice_bytes or _SLICE_BYTES))
        except _STALE as exc:
            return exc
        return None

    def _receive(
        self, exchange: _Exchange, request: Request, moved: Callable[[int], None], broken: OSError | None
    ) -> tuple[Answer, bool]:
        self._watcher.expect(exchange, self._progress_s)
        try:
            answer, keeps = exchange.receive(request.targets, moved, _Pace(self._progress_s, _SLICE_BYTES))
        except (OSError, http.client.HTTPException):
            if broken is not None:
                raise broken from None
            raise
        if broken is not None and answer.status < 400:
            raise broken
        return answer, keeps and broken is None

    def _explained(self, exchange: _Exchange, exc: Exception) -> WireError:
        if exchange.late:
            return WireError(f"no answer within {self._progress_s:g} s (or no further bytes of it)")
        said = str(exc) or type(exc).__name__
        return WireError(f"{type(exc).__name__}: {said}" if type(exc).__name__ not in said else said)

    def _take(self, stop: Stop) -> _Exchange:
        stop.check()
        while True:
            with self._mutex:
                exchange = self._idle.pop() if self._idle else None
            if exchange is None:
                return _Exchange(self.address)
            if not exchange.is_dropped:
                exchange.used = True
                return exchange
            exchange.close()

    def _give_back(self, exchange: _Exchange, *, keeps: bool) -> None:
        if keeps:
            with self._mutex:
                self._idle.append(exchange)
        else:
            exchange.close()

    def close(self) -> None:
        """Close the connections that nobody uses. Idempotent; others are made when needed."""
        if self._pid != os.getpid():
            return
        with self._mutex:
            _close_idle(self._idle, self._pid)
        self._watcher.rest()


def _close_idle(idle: list[_Exchange], pid: int) -> None:
    while idle and pid == os.getpid():
        idle.pop().close()


#: What a kept connection ends with when the server had closed it before the request came.
_STALE = (BrokenPipeError, ConnectionResetError, ConnectionAbortedError, http.client.RemoteDisconnected)
