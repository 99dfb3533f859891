"""One connection of the sink: heads read, bodies taken (dropped in the kernel, or kept), bodies sent, at a set pace."""

from __future__ import annotations

import os
import socket
import ssl
import time
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import parse_qsl, unquote

from benchmarks.sink.objects import Body, MemoryFile

__all__ = ["Connection", "Gone", "Head", "Pace"]

_KEPT_SMALL = 1 << 20
_AT_ONCE = 1 << 20
_ZEROS = memoryview(bytes(_AT_ONCE))


class Gone(Exception):  # noqa: N818 - the client, and that is no error
    """The client has closed the connection."""


@dataclass(frozen=True, slots=True)
class Head:
    """A request's first lines."""

    method: str
    bucket: str
    key: str
    query: dict[str, str]
    fields: dict[str, str]

    @property
    def place(self) -> str:
        """The object's name in the sink."""
        return f"{self.bucket}/{self.key}"

    @property
    def size_bytes(self) -> int:
        """The body's length as the wire has it; 0 when it comes in chunks."""
        return int(self.fields.get("content-length", 0))

    @property
    def decoded_bytes(self) -> int | None:
        """The payload's length when it comes wrapped as ``aws-chunked``."""
        found = self.fields.get("x-amz-decoded-content-length")
        return None if found is None else int(found)


class Pace:
    """Holds one body to a rate; 0 is unlimited."""

    def __init__(self, bytes_per_s: float) -> None:
        self._rate = bytes_per_s
        self._began = time.perf_counter()
        self._done = 0

    def passed(self, size_bytes: int) -> None:
        """Wait until that many further bytes may have passed."""
        if self._rate:
            self._done += size_bytes
            ahead = self._done / self._rate - (time.perf_counter() - self._began)
            if ahead > 0.001:
                time.sleep(ahead)


class Connection:
    """A client's connection, with what was read ahead of its current place."""

    def __init__(self, sock: socket.socket, *, bytes_per_s: float = 0.0) -> None:
        self._sock = sock
        self._tls = isinstance(sock, ssl.SSLSocket)
        self._rate = bytes_per_s
        self._ahead = b""
        # Never touched by the kernel under MSG_TRUNC; under TLS it takes what is dropped.
        self._scratch = memoryview(bytearray(_AT_ONCE))

    # -- receiving -------------------------------------------------------------------------------------------

    def head(self) -> Head:
        """The next request.

        Raises:
            Gone: the client has closed the connection.
        """
        while b"\r\n\r\n" not in self._ahead:
            self._more()
        text, _, self._ahead = self._ahead.partition(b"\r\n\r\n")
        first, *lines = text.decode("latin-1").split("\r\n")
        method, target, _ = first.split(" ", 2)
        if "://" in target:
            target = "/" + target.split("://", 1)[1].partition("/")[2]
        path, _, query = target.partition("?")
        bucket, _, key = unquote(path.lstrip("/")).partition("/")
        fields = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        return Head(method, bucket, key, dict(parse_qsl(query, keep_blank_values=True)), fields)

    def body(self, head: Head, *, keep: bool) -> Body:
        """The request's body: kept, or dropped where it is large and ``keep`` is false."""
        if head.fields.get("expect", "").startswith("100"):
            self._sock.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        pace = Pace(self._rate)
        decoded = head.decoded_bytes
        size = head.size_bytes if decoded is None else decoded
        if head.fields.get("transfer-encoding") == "chunked":
            return self._chunked_twice(decoded, pace, keep=keep)
        if decoded is not None:
            return _kept(b"".join(self._chunks(pace, drop=False)), size)
        if not keep and size >= _KEPT_SMALL:
            self._drop(size, pace)
            return Body(size)
        if size < _KEPT_SMALL:
            target = bytearray(size)
            self._fill(memoryview(target), pace)
            return Body(size, small=bytes(target))
        memory = MemoryFile(size)
        with memoryview(memory.map) as view:
            self._fill(view, pace)
        return Body(size, memory=memory)

    def _more(self) -> None:
        got = self._sock.recv(65536)
        if not got:
            raise Gone
        self._ahead += got

    def _line(self) -> bytes:
        while b"\r\n" not in self._ahead:
            self._more()
        line, _, self._ahead = self._ahead.partition(b"\r\n")
        return line

    def _fill(self, view: memoryview, pace: Pace) -> None:
        took = min(len(view), len(self._ahead))
        view[:took] = self._ahead[:took]
        self._ahead = self._ahead[took:]
        while took < len(view):
            got = self._sock.recv_into(view[took : took + _AT_ONCE])
            if not got:
                raise Gone
            took += got
            pace.passed(got)

    def _drop(self, size: int, pace: Pace) -> None:
        left = size - min(size, len(self._ahead))
        self._ahead = self._ahead[size - left :]
        # MSG_TRUNC drops in the kernel without a copy; OpenSSL has to see what it decrypts.
        flags = 0 if self._tls else socket.MSG_TRUNC
        while left:
            got = self._sock.recv_into(self._scratch, min(left, _AT_ONCE), flags)
            if not got:
                raise Gone
            left -= got
            pace.passed(got)

    def _chunks(self, pace: Pace, *, drop: bool) -> Iterator[bytes]:
        # HTTP's chunks and aws-chunked are alike: SIZE;extension CRLF data CRLF ... 0 CRLF trailers CRLF
        while size := int(self._line().partition(b";")[0], 16):
            if drop:
                self._drop(size, pace)
            else:
                chunk = bytearray(size)
                self._fill(memoryview(chunk), pace)
                yield bytes(chunk)
            self._line()
        while self._line():
            pass

    def _chunked_twice(self, decoded: int | None, pace: Pace, *, keep: bool) -> Body:
        # botocore's aws-chunked framing is HTTP's; aiohttp puts HTTP's own around it.
        drop = not keep and (decoded or 0) >= _KEPT_SMALL
        body = b"".join(self._chunks(pace, drop=drop))
        if drop:
            return Body(decoded or 0)
        if decoded is None or len(body) == decoded:
            return _kept(body, len(body))
        return _kept(_unwrapped(body, decoded), decoded)

    # -- sending ---------------------------------------------------------------------------------------------

    def send(self, data: bytes) -> None:
        """Send a head, or a small answer whole."""
        self._sock.sendall(data)

    def send_bodies(self, bodies: tuple[Body, ...], start: int, end: int) -> None:
        """Send a range of an object: zeros where it was dropped."""
        pace, at = Pace(self._rate), 0
        for body in bodies:
            low, high = max(start, at), min(end, at + body.size_bytes)
            if low < high:
                self._send_body(body, low - at, high - at, pace)
            at += body.size_bytes

    def _send_body(self, body: Body, start: int, end: int, pace: Pace) -> None:
        if body.memory is not None and not self._tls:
            while start < end:
                sent = os.sendfile(self._sock.fileno(), body.memory.fd, start, min(end - start, _AT_ONCE))
                if not sent:
                    raise Gone
                start += sent
                pace.passed(sent)
            return
        if body.small is not None:
            self._sock.sendall(body.small[start:end])
            return
        while start < end:
            size = min(end - start, _AT_ONCE)
            if body.memory is None:
                self._sock.sendall(_ZEROS[:size])
            else:
                with memoryview(body.memory.map) as view, view[start : start + size] as part:
                    self._sock.sendall(part)
            start += size
            pace.passed(size)


def _kept(data: bytes, size: int) -> Body:
    if size < _KEPT_SMALL:
        return Body(size, small=data)
    memory = MemoryFile(size)
    memory.map[:] = data
    return Body(size, memory=memory)


def _unwrapped(wrapped: bytes, size: int) -> bytes:
    found, at = bytearray(), 0
    while len(found) < size:
        end = wrapped.index(b"\r\n", at)
        length = int(wrapped[at:end].partition(b";")[0], 16)
        found += wrapped[end + 2 : end + 2 + length]
        at = end + 2 + length + 2
    return bytes(found)
