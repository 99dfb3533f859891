"""What a hostile look at the lane's connections found: each test is one way in which they went wrong.

(Past 350 lines: the ways a connection can go wrong are one list.)
"""

from __future__ import annotations

import contextlib
import linecache
import os
import resource
import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from cloudckpt.storage.direct import Address, BrokenOff, Declined, Request, Stop, Throttle, Wire, WireError
from tests.storage.direct.conftest import Forked
from tests.storage.direct.test_wire import Server, answer, echo, read_request, wire_to

GET = Request(method="GET", target="/x", headers={"Host": "x"})


def after_line(path: str, function: str, line: str, act: Callable[[], None], body: Callable[[], object]) -> None:
    """Run ``body``, and ``act`` just before the line of ``function`` that holds ``line``, as another thread might."""

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if event == "line":
            if line in linecache.getline(frame.f_code.co_filename, frame.f_lineno):
                act()
        elif frame.f_code.co_name != function or not frame.f_code.co_filename.endswith(path):
            return None
        return trace

    sys.settrace(trace)
    try:
        body()
    finally:
        sys.settrace(None)


def client_end(wire: Wire) -> Any:
    """The one idle connection of a wire."""
    (exchange,) = wire._idle
    return exchange


def test_giving_up_a_connection_never_lets_plain_bytes_out(certificate: Path) -> None:
    """While a TLS connection is being broken off, what another thread sends is still encrypted, or not sent at all."""
    server_side = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_side.load_cert_chain(certificate)
    raw: list[bytes] = []
    done = threading.Event()

    def sniff(connection: socket.socket) -> None:
        head, _ = read_request(connection)
        connection.sendall(answer(head[:1]))
        plain = socket.socket(fileno=os.dup(connection.fileno()))
        plain.settimeout(10)
        try:
            while got := plain.recv(65536):
                raw.append(got)
        except OSError:
            pass
        plain.close()
        done.set()

    with Server(sniff, tls=server_side) as server:
        tls = ssl.create_default_context(cafile=str(certificate))
        wire = Wire(Address.of(f"https://localhost:{server.port}", tls=tls), progress_s=30)
        wire.send(GET, Stop())
        exchange = client_end(wire)
        sock = exchange.connection.sock

        def send_meanwhile() -> None:
            with contextlib.suppress(OSError):
                sock.sendall(b"the weights of the model")

        after_line("ssl.py", "shutdown", "super().shutdown", send_meanwhile, exchange.break_off)
        exchange.close()
        assert done.wait(10)
    assert b"the weights of the model" not in b"".join(raw)


def test_giving_up_a_connection_that_is_being_closed_is_no_error() -> None:
    """Whoever gives a transfer up while its thread closes the connection goes on to the others."""
    with Server(echo) as server:
        wire = wire_to(server)
        wire.send(GET, Stop())
        exchange = client_end(wire)
        after_line("wire.py", "break_off", ".shutdown(", exchange.connection.close, exchange.break_off)


def test_a_request_is_not_sent_when_the_end_comes_while_connecting(monkeypatch: pytest.MonkeyPatch) -> None:
    """The end of a transfer that comes during the connect is noticed before the request leaves."""
    stop = Stop()
    came: list[bytes] = []

    def serve(connection: socket.socket) -> None:
        while head := read_request(connection)[0]:
            came.append(head)
            connection.sendall(answer(b"stored", "200 OK", 'ETag: "x"'))

    with Server(serve) as server:
        wire = wire_to(server)
        create = socket.create_connection

        def connect(*args: Any, **words: Any) -> socket.socket:
            found = create(*args, **words)
            stop()  # another part failed at this moment
            return found

        monkeypatch.setattr(socket, "create_connection", connect)
        with pytest.raises(BrokenOff):
            wire.send(Request(method="PUT", target="/x", headers={"Host": "x"}, views=[memoryview(b"body")]), stop)
    assert came == []


@pytest.mark.parametrize(
    "cut", [b"HTTP/1.1 206 Partial Content\r\nContent-Range: bytes 0-99/10", b'HTTP/1.1 200 OK\r\nETag: "ab']
)
def test_an_answer_cut_in_its_headers_is_none(cut: bytes) -> None:
    """Half a header is not believed: it may be half a number."""

    def serve(connection: socket.socket) -> None:
        read_request(connection)
        connection.sendall(cut)

    with Server(serve) as server, pytest.raises(WireError):
        wire_to(server).send(GET, Stop())


def test_a_length_that_is_no_number_is_no_usable_answer() -> None:
    """Two lengths, as some proxies send, end in an error of the wire, which is tried again."""

    def serve(connection: socket.socket) -> None:
        read_request(connection)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 2\r\n\r\nok")

    with Server(serve) as server:
        try:
            found = wire_to(server).send(GET, Stop())
        except WireError:
            return
        assert found.body == b"ok"


def test_a_range_in_chunks_goes_into_the_targets() -> None:
    """A server or proxy that sends a range without its length, in chunks, has answered all the same."""

    def serve(connection: socket.socket) -> None:
        while read_request(connection)[0]:
            connection.sendall(
                b"HTTP/1.1 206 Partial Content\r\nContent-Range: bytes 0-9/10\r\nTransfer-Encoding: chunked\r\n\r\n"
                b"4\r\n0123\r\n6\r\n456789\r\n0\r\n\r\n"
            )

    with Server(serve) as server:
        wire = wire_to(server)
        for _ in range(2):
            first, second = bytearray(3), bytearray(7)
            targets = (memoryview(first), memoryview(second))
            found = wire.send(Request(method="GET", target="/x", headers={"Host": "x"}, targets=targets), Stop())
            assert (found.status, found.filled) == (206, 10)
            assert bytes(first + second) == b"0123456789"
        assert server.accepted == 1


def test_more_chunks_than_a_range_has_bytes_are_no_usable_answer() -> None:
    """A chunked answer that goes on after the last target is full is another range than was asked for."""

    def serve(connection: socket.socket) -> None:
        read_request(connection)
        connection.sendall(
            b"HTTP/1.1 206 Partial Content\r\nContent-Range: bytes 0-9/10\r\nTransfer-Encoding: chunked\r\n\r\n"
            b"4\r\n0123\r\n6\r\n456789\r\n0\r\n\r\n"
        )

    with Server(serve) as server:
        targets = (memoryview(bytearray(9)),)
        found = wire_to(server).send(Request(method="GET", target="/x", headers={"Host": "x"}, targets=targets), Stop())
        assert found.filled != 9


def test_a_slow_line_is_not_a_dead_one() -> None:
    """Bytes that keep coming are no silence: a body that takes longer than the time-out arrives."""
    size, piece = 4 * 1024 * 1024, 128 * 1024

    def serve(connection: socket.socket) -> None:
        read_request(connection)
        connection.sendall(f"HTTP/1.1 200 OK\r\nContent-Length: {size}\r\n\r\n".encode())
        for _ in range(size // piece):
            time.sleep(0.1)  # a line of 1.3 MB/s
            connection.sendall(bytes(piece))

    with Server(serve) as server:
        targets = (memoryview(bytearray(size)),)
        request = Request(method="GET", target="/x", headers={"Host": "x"}, targets=targets)
        assert wire_to(server, progress_s=2).send(request, Stop()).filled == size


def test_a_watcher_that_cannot_start_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """No thread for the watcher is an error of that request; the next request is watched."""

    def mute(connection: socket.socket) -> None:
        while read_request(connection)[0]:
            pass

    start = threading.Thread.start
    failures = [RuntimeError("can't start new thread")]

    def failing(thread: threading.Thread) -> None:
        if thread.name.startswith("cloudckpt-lane-watch") and failures:
            raise failures.pop()
        start(thread)

    with Server(mute) as server:
        wire = wire_to(server, progress_s=0.2)
        monkeypatch.setattr(threading.Thread, "start", failing)
        with pytest.raises(WireError, match="thread"):
            wire.send(GET, Stop())
        ended = threading.Event()

        def ask() -> None:
            with pytest.raises(WireError, match="no answer"):
                wire.send(GET, Stop())
            ended.set()

        threading.Thread(target=ask, daemon=True).start()
        assert ended.wait(20)


def test_a_cap_can_be_kept_by_a_forked_child(forked_while_held: Forked) -> None:
    """Another thread was reckoning with the cap when the process was forked; the child is not kept waiting by it."""
    throttle = Throttle(1e9)
    assert forked_while_held(throttle._mutex, lambda: throttle.pause(1)) == 0


@pytest.mark.parametrize("interim", ["102 Processing", "103 Early Hints"])
def test_an_interim_answer_is_not_the_answer(interim: str) -> None:
    """What a server says before its answer is passed over; the next request gets its own answer, not the last one's."""
    asked = threading.Event()

    def serve(connection: socket.socket) -> None:
        first, _ = read_request(connection)
        connection.sendall(f"HTTP/1.1 {interim}\r\nLink: </x>\r\n\r\n".encode())
        asked.wait(5)
        connection.sendall(answer(first.split()[1]))
        while head := read_request(connection)[0]:
            connection.sendall(answer(head.split()[1]))

    with Server(serve) as server:
        wire = wire_to(server)
        releasing = threading.Timer(0.2, asked.set)
        releasing.start()
        found = [wire.send(Request(method="GET", target=name, headers={"Host": "x"}), Stop()) for name in ("/a", "/b")]
        releasing.join()
        assert [(one.status, one.body) for one in found] == [(200, b"/a"), (200, b"/b")]


def test_a_tunnel_to_an_ipv6_address_is_asked_for_as_such_or_declined() -> None:
    """``CONNECT ::1:443`` means nothing to a proxy."""
    came: list[bytes] = []

    def proxy(connection: socket.socket) -> None:
        came.append(read_request(connection)[0].split(b"\r\n")[0])

    with Server(proxy) as server:
        try:
            address = Address.of("https://[::1]:8443", proxy=server.url, tls=ssl.create_default_context())
        except Declined:
            return
        with pytest.raises(WireError):
            Wire(address, progress_s=5).send(GET, Stop())
    assert came[0].startswith(b"CONNECT [::1]:8443 ")


def test_an_ipv6_address_is_spoken_to() -> None:
    """An endpoint may be ``http://[::1]:9000``."""
    listener = socket.create_server(("::1", 0), family=socket.AF_INET6)

    def serve() -> None:
        connection, _ = listener.accept()
        head, _ = read_request(connection)
        connection.sendall(answer(head))
        connection.close()

    thread = threading.Thread(target=serve)
    thread.start()
    address = Address.of(f"http://[::1]:{listener.getsockname()[1]}")
    request = Request(method="GET", target="/x", headers={"Host": address.name})
    assert b"Host: [::1]:" in Wire(address, progress_s=5).send(request, Stop()).body
    thread.join()
    listener.close()


def test_closing_a_wire_ends_its_watcher() -> None:
    """No thread of a wire is left once it was closed."""
    before = {*threading.enumerate()}
    with Server(echo) as server:
        wire = wire_to(server)
        wire.send(GET, Stop())
        watchers = [t for t in {*threading.enumerate()} - before if t.name == "cloudckpt-lane-watch"]
        assert len(watchers) == 1
        wire.close()
        watchers[0].join(5)
        assert not watchers[0].is_alive()
        assert wire.send(GET, Stop()).status == 200
        wire.close()


def test_a_proxy_that_never_ends_its_answer_is_given_up() -> None:
    """A tunnel is made within the time-out or not at all, however busily the proxy talks."""
    closed = threading.Event()

    def proxy(connection: socket.socket) -> None:
        read_request(connection)
        connection.sendall(b"HTTP/1.1 200 OK\r\n")
        try:
            while not closed.wait(0.05):
                connection.sendall(b"X: y\r\n")
        except OSError:
            closed.set()

    with Server(proxy) as server:
        address = Address.of("https://store.example", proxy=server.url, tls=ssl.create_default_context())
        wire = Wire(address, progress_s=0.5)
        failed: list[BaseException] = []

        def ask() -> None:
            try:
                wire.send(GET, Stop())
            except WireError as exc:
                failed.append(exc)

        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        gave_up = closed.wait(20)
        closed.set()
        thread.join(20)
        assert gave_up
        assert "no answer within" in str(failed[0])


def test_giving_up_ends_a_handshake() -> None:
    """A server that takes the connection and says nothing to the TLS client keeps nobody who has given up."""
    stop = Stop()
    closed = threading.Event()

    def serve(connection: socket.socket) -> None:
        connection.recv(65536)
        stop()
        while connection.recv(65536):
            pass
        closed.set()

    with Server(serve) as server:
        wire = Wire(Address.of(server.url.replace("http", "https"), tls=ssl.create_default_context()), progress_s=600)

        def ask() -> None:
            with pytest.raises(BrokenOff):
                wire.send(GET, stop)

        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        assert closed.wait(5)
        thread.join(20)
        assert not thread.is_alive()


def test_a_process_with_a_thousand_open_files_uses_connections_again() -> None:
    """The number of a socket may be larger than what ``select`` takes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 1200
    if hard != resource.RLIM_INFINITY and hard < wanted:
        pytest.skip(f"this machine allows {hard} open files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    with contextlib.ExitStack() as files:
        files.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        for _ in range(1050):
            files.enter_context(open(os.devnull, "rb"))  # noqa: PTH123 - a number of its own is all it is for
        with Server(echo) as server:
            wire = wire_to(server)
            assert [wire.send(GET, Stop()).status for _ in range(3)] == [200, 200, 200]
            assert server.accepted == 1
            wire.close()


def test_a_refusal_in_mid_body_is_heard_over_tls(certificate: Path) -> None:
    """A server that refuses while the body is still coming, and hangs up, is understood over TLS as well."""
    server_side = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_side.load_cert_chain(certificate)

    def refuse(connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(answer(b"<Code>AccessDenied</Code>", "403 Forbidden", "Connection: close"))
        socket.socket.shutdown(connection, socket.SHUT_WR)
        while socket.socket.recv(connection, 65536):
            pass

    with Server(refuse, tls=server_side) as server:
        tls = ssl.create_default_context(cafile=str(certificate))
        wire = Wire(Address.of(f"https://localhost:{server.port}", tls=tls), progress_s=30)
        views = [memoryview(bytes(16 * 1024 * 1024))]
        assert wire.send(Request(method="PUT", target="/x", headers={"Host": "x"}, views=views), Stop()).status == 403


def test_a_refusal_and_a_reset_in_mid_body_over_tls_is_tried_again(certificate: Path) -> None:
    """A server that hangs up in mid-body is an error of the wire, whatever TLS calls it."""
    server_side = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_side.load_cert_chain(certificate)

    def refuse(connection: socket.socket) -> None:
        connection.recv(65536)

    with Server(refuse, tls=server_side) as server:
        tls = ssl.create_default_context(cafile=str(certificate))
        wire = Wire(Address.of(f"https://localhost:{server.port}", tls=tls), progress_s=30)
        views = [memoryview(bytes(16 * 1024 * 1024))]
        with pytest.raises(WireError):
            wire.send(Request(method="PUT", target="/x", headers={"Host": "x"}, views=views), Stop())


def test_a_kept_tls_connection_that_the_server_gave_up_is_replaced_at_once(certificate: Path) -> None:
    """As over plain HTTP: a request on a connection that the server has closed is sent over a new one."""
    server_side = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_side.load_cert_chain(certificate)

    def half(connection: socket.socket) -> None:
        read_request(connection)
        connection.sendall(answer(b"once"))
        read_request(connection)  # the next one comes, and gets no answer

    with Server(half, echo, tls=server_side) as server:
        tls = ssl.create_default_context(cafile=str(certificate))
        wire = Wire(Address.of(f"https://localhost:{server.port}", tls=tls), progress_s=30)
        assert [wire.send(GET, Stop()).status for _ in range(2)] == [200, 200]
        assert server.accepted == 2
