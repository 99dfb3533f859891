"""Connections of a lane against servers that behave, and against servers that do not.

(Past 350 lines: every way a server may behave is one list.)
"""

from __future__ import annotations

import contextlib
import gc
import http.server
import os
import socket
import ssl
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import pytest

from cloudckpt.storage.direct import Address, BrokenOff, Declined, Request, Stop, Throttle, Wire, WireError, proxy_of
from cloudckpt.testing.servers import free_ports

Script = Callable[[socket.socket], None]


class Server:
    """Listens on loopback and hands connection number n to the n-th script (the last one again and again)."""

    def __init__(self, *scripts: Script, tls: ssl.SSLContext | None = None) -> None:
        self.accepted = 0
        self._scripts, self._tls = scripts, tls
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._open: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._acceptor = threading.Thread(target=self._accept, daemon=True)
        self._acceptor.start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            script = self._scripts[min(self.accepted, len(self._scripts) - 1)]
            self.accepted += 1
            self._open.append(connection)
            thread = threading.Thread(target=self._serve, args=(script, connection), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, script: Script, connection: socket.socket) -> None:
        try:
            if self._tls is not None:
                connection = self._tls.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
                self._open.append(connection)
                connection.do_handshake()
            script(connection)
        except OSError:
            pass
        finally:
            connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for connection in self._open:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)  # which wakes who reads from it, as a close does not
            connection.close()
        for thread in (self._acceptor, *self._threads):
            thread.join(10)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


def read_request(connection: socket.socket) -> tuple[bytes, bytes]:
    """The head and the body of one request; empty ones at the end of the connection."""
    data = b""
    while b"\r\n\r\n" not in data:
        got = connection.recv(65536)
        if not got:
            return b"", b""
        data += got
    head, _, body = data.partition(b"\r\n\r\n")
    length = next((int(line[15:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")), 0)
    while len(body) < length:
        body += connection.recv(65536)
    return head, body


def answer(body: bytes, status: str = "200 OK", *headers: str) -> bytes:
    """An answer as it goes over the wire."""
    lines = "".join(f"{header}\r\n" for header in headers)
    return f"HTTP/1.1 {status}\r\n{lines}Content-Length: {len(body)}\r\n\r\n".encode() + body


def echo(connection: socket.socket) -> None:
    """Answers every request with what came."""
    while True:
        head, body = read_request(connection)
        if not head:
            return
        connection.sendall(answer(head.split(b"\r\n")[0] + b"|" + body))


def once(connection: socket.socket) -> None:
    """Answers one request and closes without having said so."""
    read_request(connection)
    connection.sendall(answer(b"once"))


def mute(connection: socket.socket) -> None:
    """Takes the request and says nothing."""
    while read_request(connection)[0]:
        pass


def wire_to(server: Server, *, progress_s: float = 30, **words: Any) -> Wire:
    """A wire to a server of this file."""
    return Wire(Address.of(server.url), progress_s=progress_s, **words)


def ask(method: str = "GET", target: str = "/x", **words: Any) -> Request:
    """Some request."""
    return Request(method=method, target=target, headers={"Host": "h"}, **words)


def test_views_go_out_in_order_and_targets_are_filled_in_turn() -> None:
    """A body of several views arrives as one, and an answer of the same length fills the targets without a copy."""
    with Server(echo) as server:
        wire = wire_to(server)
        sent = [memoryview(b"abc"), memoryview(b""), memoryview(b"de")]
        targets = [memoryview(bytearray(size)) for size in (15, 0, 8)]
        found = wire.send(ask("PUT", "/x?y", views=sent, targets=targets), Stop())
        assert (found.status, found.filled, found.body) == (200, 23, b"")
        assert b"".join(targets) == b"PUT /x?y HTTP/1.1|abcde"
        found = wire.send(ask("PUT", "/x?y", views=sent), Stop())
        assert found.body == b"PUT /x?y HTTP/1.1|abcde"
        wire.close()


def test_an_answer_of_another_length_is_given_back_whole() -> None:
    """Only an answer that fits goes into the targets; any other is told, and the targets are left alone."""
    with Server(echo) as server:
        wire, target = wire_to(server), bytearray(b"....")
        found = wire.send(ask(targets=[memoryview(target)]), Stop())
        assert found.filled == 0
        assert target == b"...."
        assert found.body == b"GET /x HTTP/1.1|"
        wire.close()


def test_a_connection_is_used_again() -> None:
    """Many requests in turn need one connection."""
    with Server(echo) as server:
        wire = wire_to(server)
        for _ in range(5):
            assert wire.send(ask(), Stop()).status == 200
        assert server.accepted == 1
        wire.close()


def test_a_connection_that_the_server_gave_up_is_replaced_at_once() -> None:
    """The second request comes after the server closed: it goes over a new connection, without an error."""
    with Server(once, echo) as server:
        wire = wire_to(server)
        assert wire.send(ask(), Stop()).body == b"once"
        assert wire.send(ask("PUT", views=[memoryview(b"again")]), Stop()).body.endswith(b"|again")
        wire.close()


def test_a_new_connection_that_breaks_is_an_error() -> None:
    """A server that closes at once is not asked for ever."""
    with Server(lambda connection: None) as server:
        with pytest.raises(WireError):
            wire_to(server).send(ask("PUT", views=[memoryview(bytes(100))]), Stop())
        assert server.accepted == 1


def test_a_refusal_in_mid_body_is_heard() -> None:
    """A server that refuses before it has read the body and hangs up: its answer is what is told."""

    def refuse(connection: socket.socket) -> None:
        connection.recv(1000)
        connection.sendall(answer(b"<Code>AccessDenied</Code>", "403 Forbidden", "Connection: close"))
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(1 << 20):  # until the client hangs up: a reset could overtake the answer
            pass

    with Server(refuse) as server:
        found = wire_to(server).send(ask("PUT", views=[memoryview(bytes(32 << 20))]), Stop())
        assert found.status == 403
        assert b"AccessDenied" in found.body


@pytest.mark.parametrize(
    "script", [mute, lambda c: (read_request(c), c.sendall(b"HTTP/1.1 200 OK\r\nContent-Le"), c.recv(1))]
)
def test_a_server_that_hangs_is_given_up(script: Script) -> None:
    """No answer, or half a one: an error after the time-out, and the next request takes another connection."""
    with Server(script, echo) as server:
        wire = wire_to(server, progress_s=0.2)
        with pytest.raises(WireError, match=r"no answer within 0\.2 s"):
            wire.send(ask(), Stop())
        assert wire.send(ask(), Stop()).status == 200
        wire.close()


def test_a_body_that_stops_coming_is_given_up() -> None:
    """Half of a body and then nothing is an error, not a wait."""

    def half(connection: socket.socket) -> None:
        read_request(connection)
        connection.sendall(b"HTTP/1.1 206 Partial\r\nContent-Length: 1000\r\n\r\n" + bytes(500))
        connection.recv(1)

    with Server(half) as server:
        target = memoryview(bytearray(1000))
        try:
            found = wire_to(server, progress_s=0.2).send(ask(targets=[target]), Stop())
        except WireError:
            return
        assert found.filled < 1000


def test_a_truncated_body_is_short() -> None:
    """A body that ends early is told by how much was filled, and its connection is not used again."""

    def short(connection: socket.socket) -> None:
        read_request(connection)
        connection.sendall(b"HTTP/1.1 206 Partial\r\nContent-Length: 1000\r\n\r\n" + bytes(999))

    with Server(short, echo) as server:
        wire, target = wire_to(server), memoryview(bytearray(1000))
        assert wire.send(ask(targets=[target]), Stop()).filled == 999
        assert wire.send(ask(), Stop()).status == 200
        assert server.accepted == 2
        wire.close()


def test_giving_up_wakes_whoever_waits_for_a_socket() -> None:
    """A transfer that is given up ends at once, although the server never answers."""
    taken = threading.Event()

    def waiting(connection: socket.socket) -> None:
        read_request(connection)
        taken.set()
        connection.recv(1)

    with Server(waiting) as server:
        stop, ended = Stop(), []

        def work() -> None:
            try:
                wire_to(server).send(ask(), stop)
            except BrokenOff as exc:
                ended.append(exc)

        thread = threading.Thread(target=work)
        thread.start()
        assert taken.wait(30)
        stop()
        thread.join(30)
        assert len(ended) == 1


def test_a_wire_that_is_forgotten_gives_its_connections_back() -> None:
    """Without close(), the connection is closed when the wire is collected, and nothing warns."""
    with Server(echo) as server:
        wire = wire_to(server)
        assert wire.send(ask(), Stop()).status == 200
        connection = wire._idle[0].connection
        del wire
        gc.collect()
        assert connection.sock is None


def test_a_plain_proxy_is_asked_for_the_whole_url() -> None:
    """Over http a proxy gets the absolute URL and its own credentials; the Host stays the store's."""
    seen = []

    def proxy(connection: socket.socket) -> None:
        seen.append(read_request(connection)[0])
        connection.sendall(answer(b"by proxy"))

    with Server(proxy) as server:
        address = Address.of("http://store.example:9000", proxy=f"http://me:pass%20word@127.0.0.1:{server.port}")
        wire = Wire(address, progress_s=30)
        assert (
            wire.send(Request(method="GET", target="/b/k", headers={"Host": address.name}), Stop()).body == b"by proxy"
        )
        wire.close()
    assert seen[0].startswith(b"GET http://store.example:9000/b/k HTTP/1.1\r\n")
    assert b"Host: store.example:9000" in seen[0]
    assert b"Proxy-Authorization: Basic bWU6cGFzcyB3b3Jk" in seen[0]
    assert "word" not in repr(address)


def server_tls(certificate: Path) -> ssl.SSLContext:
    """The server's side of TLS."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    return context


def test_tls_proves_the_host(certificate: Path) -> None:
    """With the right trust the bytes go through; with another one the host is refused, by name."""
    trusted = ssl.create_default_context(cafile=str(certificate))
    with Server(echo, tls=server_tls(certificate)) as server:
        url = f"https://localhost:{server.port}"
        wire = Wire(Address.of(url, tls=trusted), progress_s=30)
        body = os.urandom(300_000)
        assert wire.send(ask("PUT", views=[memoryview(body)]), Stop()).body.endswith(body)
        wire.close()
        with pytest.raises(WireError, match="CERTIFICATE_VERIFY_FAILED"):
            Wire(Address.of(url, tls=ssl.create_default_context()), progress_s=30).send(ask(), Stop())


def test_tls_goes_through_a_tunnel(certificate: Path) -> None:
    """Over https a proxy is asked for a tunnel, and the store proves itself through it."""
    seen = []
    tls = server_tls(certificate)

    def tunnel(connection: socket.socket) -> None:
        seen.append(read_request(connection)[0])
        connection.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
        with tls.wrap_socket(connection, server_side=True) as inside:
            echo(inside)

    with Server(tunnel) as server:
        trusted = ssl.create_default_context(cafile=str(certificate))
        address = Address.of("https://localhost:4443", proxy=f"http://u:p@127.0.0.1:{server.port}", tls=trusted)
        wire = Wire(address, progress_s=30)
        assert wire.send(ask(), Stop()).body == b"GET /x HTTP/1.1|"
        wire.close()
    assert seen[0].startswith(b"CONNECT localhost:4443 HTTP/1.")
    assert b"Proxy-Authorization: Basic dTpw" in seen[0]


def test_what_the_lane_does_not_speak_to_is_declined() -> None:
    """Other schemes, other proxies, and https without knowing what proves the host."""
    with pytest.raises(Declined):
        Address.of("ftp://x")
    with pytest.raises(Declined, match="socks5"):
        Address.of("http://x", proxy="socks5://localhost:1080")
    with pytest.raises(Declined):
        Address.of("https://x")


def test_the_proxy_is_the_environments_unless_one_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """HTTP_PROXY and NO_PROXY are read as everybody reads them; what was given goes first."""
    for name in ("HTTP_PROXY", "http_proxy", "no_proxy", "NO_PROXY", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    assert proxy_of("http://store.example") is None
    monkeypatch.setenv("http_proxy", "proxy.example:3128")
    monkeypatch.setenv("no_proxy", "near.example,127.0.0.1")
    assert proxy_of("http://store.example") == "http://proxy.example:3128"
    assert proxy_of("http://near.example") is None
    assert proxy_of("http://127.0.0.1:9000") is None
    assert proxy_of("http://store.example", {}) is None
    assert proxy_of("http://store.example", {"http": "http://other:1"}) == "http://other:1"


def test_nobody_there_is_an_error_that_says_so() -> None:
    """A port that nobody listens on."""
    with pytest.raises(WireError, match="refused"):
        Wire(Address.of(f"http://127.0.0.1:{free_ports(1)[0]}"), progress_s=5).send(ask(), Stop())


def test_the_cap_spreads_a_body(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a cap a body goes out in small slices with pauses that add up to its time."""
    paused: list[float] = []
    monkeypatch.setattr(Stop, "sleep", lambda _, seconds: paused.append(seconds))
    with Server(echo) as server:
        wire = wire_to(server, throttle=Throttle(1_000_000, now=lambda: 0.0))
        assert wire.send(ask("PUT", views=[memoryview(bytes(200_000))]), Stop()).status == 200
        wire.close()
    assert len(paused) == 3
    assert max(paused) == pytest.approx(0.15)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_has_connections_of_its_own() -> None:
    """The child opens a connection; the parent's is still good afterwards."""
    with Server(echo) as server:
        wire = wire_to(server)
        assert wire.send(ask(), Stop()).status == 200
        pid = os.fork()
        if pid == 0:
            try:
                os._exit(0 if wire.send(ask(), Stop()).status == 200 else 1)
            finally:
                os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert wire.send(ask(), Stop()).status == 200
        assert server.accepted == 2
        wire.close()


class _Files(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.0"

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"until the end")

    def log_message(self, *_: object) -> None:
        pass


def test_an_old_server_that_ends_a_body_by_closing() -> None:
    """HTTP/1.0 without a length: the body is read to its end."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Files) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        wire = Wire(Address.of(f"http://127.0.0.1:{server.server_port}"), progress_s=30)
        assert wire.send(ask(), Stop()).body == b"until the end"
        assert wire.send(ask(), Stop()).body == b"until the end"
        server.shutdown()
        thread.join(10)
