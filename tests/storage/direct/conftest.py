"""What stands between a lane and its server: a certificate, TLS before a server that speaks none, and a proxy."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import http.server
import ipaddress
import os
import signal
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate that ``localhost`` has signed for itself, and its key, in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    now = datetime.fromtimestamp(time.time(), UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path = tmp_path_factory.mktemp("tls") / "localhost.pem"
    path.write_bytes(secret + made.public_bytes(serialization.Encoding.PEM))
    return path


@pytest.fixture(scope="session")
def tls_before(certificate: Path) -> Callable[[str], AbstractContextManager[str]]:
    """Speaks TLS as ``localhost`` to clients, and plain HTTP to the server behind; gives its URL."""

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.CancelledError):
            while data := await reader.read(1 << 20):
                writer.write(data)
                await writer.drain()
        writer.close()

    @contextlib.contextmanager
    def started(behind: str) -> Iterator[str]:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        host, _, port = behind.removeprefix("http://").partition(":")
        ready, ports = threading.Event(), list[int]()
        loop = asyncio.new_event_loop()
        end = asyncio.Event()

        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            far_reader, far_writer = await asyncio.open_connection(host, int(port))
            await asyncio.gather(carry(reader, far_writer), carry(far_reader, writer))

        async def serve() -> None:
            server = await asyncio.start_server(connected, "127.0.0.1", 0, ssl=context)
            ports.append(server.sockets[0].getsockname()[1])
            ready.set()
            await end.wait()
            server.close()

        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            thread = threading.Thread(target=runner.run, args=(serve(),))
            thread.start()
            ready.wait(30)
            try:
                yield f"https://localhost:{ports[0]}"
            finally:
                loop.call_soon_threadsafe(end.set)
                thread.join(30)

    return started


@pytest.fixture
def http_proxy() -> Iterator[tuple[str, list[str]]]:
    """A plain HTTP proxy, which asks for the absolute URL that it was given: its own URL, and the lines it got."""
    lines: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _carry(self) -> None:
            lines.append(self.requestline)
            place = urlsplit(self.path)
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            far = http.client.HTTPConnection(place.netloc, timeout=30)
            far.putrequest(
                self.command, self.path.partition(place.netloc)[2], skip_host=True, skip_accept_encoding=True
            )
            for name, value in self.headers.items():
                if name.lower() not in {"proxy-connection", "expect"}:
                    far.putheader(name, value)
            far.endheaders(body or None)
            answer = far.getresponse()
            data = answer.read()
            self.send_response_only(answer.status, answer.reason)
            for name, value in answer.headers.items():
                if name.lower() not in {"transfer-encoding", "connection", "content-length"}:
                    self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
            far.close()

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _carry  # noqa: N815 - the names that http.server looks for

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", lines
        server.shutdown()
        thread.join(10)


#: What ``forked_while_held`` gives: called with the lock and with what the child does.
Forked = Callable[[AbstractContextManager[object], Callable[[], object]], int]


@pytest.fixture
def forked_while_held() -> Forked:
    """Does something in a child that is forked while another thread holds a lock; 0 if it did not hang."""

    def run(lock: AbstractContextManager[object], act: Callable[[], object]) -> int:
        held, release = threading.Event(), threading.Event()

        def hold() -> None:
            with lock:
                held.set()
                release.wait(30)

        holder = threading.Thread(target=hold)
        holder.start()
        assert held.wait(30)
        child = os.fork()
        if child == 0:
            signal.alarm(10)
            act()
            os._exit(0)
        try:
            return os.waitpid(child, 0)[1]
        finally:
            release.set()
            holder.join()

    return run
