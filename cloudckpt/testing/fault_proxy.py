"""A proxy between a real client and a real server that breaks the requests it is told to break.

It forwards method, path, query, headers (the Host that the client signed included) and body as they are. A fault is
injected for requests that match; each request is recorded, so that tests can count them exactly.

Past 350 lines, because every fault is a turn that the one way of a request through here may take.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from aiohttp import ClientSession, ClientTimeout, TCPConnector, web

from cloudckpt.storage.loop import hang_up
from cloudckpt.testing.listening import serve_until

__all__ = ["Action", "FaultProxy", "Injected", "Request"]

Action = Literal[
    "drop_before", "drop_after", "status", "truncate", "flip", "flip_request", "hang", "hold_after", "delay", "late"
]
_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "te", "trailer", "upgrade", "proxy-connection"}
_S3_CODES = {
    400: "InvalidRequest",
    403: "AccessDenied",
    404: "NoSuchKey",
    409: "ConditionalRequestConflict",
    412: "PreconditionFailed",
    429: "TooManyRequests",
    500: "InternalError",
    501: "NotImplemented",
    503: "SlowDown",
}


@dataclass(frozen=True, slots=True)
class Request:
    """One request as it came.

    Attributes:
        number: from 0, since the proxy was made or cleared.
        status: of the answer that the client got; None if it got none (yet).
        fault: what was done to it, if anything.
    """

    number: int
    method: str
    path: str
    query: str
    headers: Mapping[str, str] = field(repr=False)
    status: int | None = None
    fault: Action | None = None


@dataclass(eq=False)
class Injected:
    """A fault in place. ``hits`` counts the requests it was done to."""

    action: Action
    matches: Callable[[Request], bool]
    skip: int
    times: int | None
    status: int
    body: bytes | None
    headers: Mapping[str, str]
    delay_s: float
    hits: int = 0
    _seen: int = 0
    _hit: threading.Event = field(default_factory=threading.Event)
    _released: threading.Event = field(default_factory=threading.Event)
    _landed: threading.Event = field(default_factory=threading.Event)
    _wake: Callable[[], None] = lambda: None
    _remove: Callable[[], None] = lambda: None

    def wait(self, timeout: float = 30.0) -> bool:
        """Until it was done to a request for the first time; False after ``timeout`` seconds."""
        return self._hit.wait(timeout)

    def release(self) -> None:
        """Let what ``hang``, ``hold_after`` or ``late`` keeps go on."""
        self._released.set()
        self._wake()

    def land(self, timeout: float = 30.0) -> bool:
        """Release what ``late`` keeps, and wait until the server has answered it; False after ``timeout`` seconds."""
        self.release()
        return self._landed.wait(timeout)

    def remove(self) -> None:
        """No further request is broken by it."""
        self._remove()

    def takes(self, request: Request) -> bool:
        """Whether this request is the one; counts."""
        if self.times is not None and self.hits >= self.times:
            return False
        if not self.matches(request):
            return False
        self._seen += 1
        if self._seen <= self.skip:
            return False
        self.hits += 1
        self._hit.set()
        return True


class FaultProxy:
    """An HTTP proxy on 127.0.0.1 before one server; a context manager.

    Args:
        upstream: the server's URL.
        port: to listen on; 0 takes a free one.
    """

    def __init__(self, upstream: str, *, port: int = 0) -> None:
        self._upstream = upstream.rstrip("/")
        self._port = port
        self.url = ""
        self._mutex = threading.Lock()
        self._faults: list[Injected] = []
        self._requests: list[Request] = []
        self._loop = asyncio.new_event_loop()
        self._changed: asyncio.Condition | None = None
        self._thread = threading.Thread(target=self._serve, name="cloudckpt-fault-proxy", daemon=True)
        self._ready = threading.Event()
        self._end: asyncio.Event | None = None

    # -- for tests -------------------------------------------------------------------------------------------

    @property
    def requests(self) -> list[Request]:
        """Every request since the start or the last ``clear``, in the order in which they came."""
        with self._mutex:
            return [*self._requests]

    def clear(self) -> None:
        """Forget requests and faults, to count from here."""
        with self._mutex:
            faults, self._faults = self._faults, []
            self._requests = []
        for fault in faults:
            fault.release()

    def inject(
        self,
        action: Action,
        *,
        method: str | None = None,
        match: str | None = None,
        when: Callable[[Request], bool] | None = None,
        skip: int = 0,
        times: int | None = 1,
        status: int = 503,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        delay_s: float = 0.05,
    ) -> Injected:
        """Break requests from now on.

        Args:
            action: ``drop_before`` closes the connection and forwards nothing; ``drop_after`` forwards, and closes
                without an answer; ``status`` answers by itself; ``truncate`` cuts the answer's body in half;
                ``flip`` turns one bit of it; ``flip_request`` turns one of the request's; ``hang`` never answers;
                ``hold_after`` forwards, and answers when released; ``delay`` forwards later; ``late`` forwards when
                released, though the client may have given up and gone.
            method: only requests of this method.
            match: only requests in whose ``path?query`` this regular expression is found.
            when: only requests for which this is true.
            skip: let so many of them through first.
            times: how many are broken; None for all.
            status: for ``status``; its body is the error that S3 or Google would send, unless ``body`` is given.
            delay_s: for ``delay``, in seconds.
        """
        pattern = re.compile(match) if match else None

        def matches(request: Request) -> bool:
            return (
                (method is None or request.method == method)
                and (pattern is None or pattern.search(f"{request.path}?{request.query}") is not None)
                and (when is None or when(request))
            )

        fault = Injected(action, matches, skip, times, status, body, dict(headers or {}), delay_s)
        fault._wake = self._notify  # noqa: SLF001 - two halves of one thing
        fault._remove = lambda: self._forget(fault)  # noqa: SLF001 - its own, handed out
        with self._mutex:
            self._faults.append(fault)
        return fault

    def _forget(self, fault: Injected) -> None:
        with self._mutex, contextlib.suppress(ValueError):
            self._faults.remove(fault)
        fault.release()

    def __enter__(self) -> Self:
        self._thread.start()
        self._ready.wait(30)
        if not self.url:
            raise RuntimeError("the fault proxy could not listen")
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()
        if self._end is not None:
            self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join(10)

    # -- the server ------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        try:
            self._loop.run_until_complete(self._main())
            self._loop.run_until_complete(_ended())
        finally:
            self._ready.set()
            self._loop.close()

    async def _main(self) -> None:
        self._end = asyncio.Event()
        self._changed = asyncio.Condition()
        connector = TCPConnector(limit=0, force_close=False)
        # No time-out: the server behind may take as long as it likes, the client decides.
        self._session = ClientSession(
            connector=connector, auto_decompress=False, timeout=ClientTimeout(total=None), skip_auto_headers=_ADDED
        )
        server = web.Server(self._handle, access_log=None)
        runner = web.ServerRunner(server, shutdown_timeout=0.1)
        try:
            await serve_until(self._end, runner, started=self._listens, port=self._port)
        finally:
            await self._session.close()
            await connector.close()

    def _listens(self, url: str) -> None:
        self.url = url
        self._ready.set()

    def _notify(self) -> None:
        async def wake() -> None:
            if self._changed is not None:
                async with self._changed:
                    self._changed.notify_all()

        if not self._loop.is_closed():
            asyncio.run_coroutine_threadsafe(wake(), self._loop)

    async def _released(self, fault: Injected) -> None:
        if self._changed is None:
            return
        async with self._changed:
            await self._changed.wait_for(fault._released.is_set)  # noqa: SLF001 - the same

    def _begin(self, incoming: web.BaseRequest) -> tuple[Request, Injected | None]:
        path, _, query = incoming.raw_path.partition("?")
        with self._mutex:
            request = Request(len(self._requests), incoming.method, path, query, dict(incoming.headers))
            # Every fault counts every request, whichever of them is done.
            taking = [fault for fault in self._faults if fault.takes(request)]
            fault = taking[0] if taking else None
            request = Request(
                request.number, request.method, path, query, request.headers, None, fault.action if fault else None
            )
            self._requests.append(request)
            return request, fault

    def _answered(self, request: Request, status: int) -> None:
        with self._mutex:
            if request.number < len(self._requests) and self._requests[request.number] == request:
                self._requests[request.number] = Request(
                    request.number, request.method, request.path, request.query, request.headers, status, request.fault
                )

    async def _handle(self, incoming: web.BaseRequest) -> web.StreamResponse:
        request, fault = self._begin(incoming)
        if fault is None:
            return await self._forwarded(incoming, request)
        return await self._broken(incoming, request, fault)

    async def _broken(self, incoming: web.BaseRequest, request: Request, fault: Injected) -> web.StreamResponse:
        if fault.action == "drop_before":
            raise self._dropped(incoming)
        if fault.action == "hang":
            await self._released(fault)
            raise self._dropped(incoming)
        if fault.action == "status":
            await _body(incoming)
            self._answered(request, fault.status)
            return _refusal(request, fault)
        if fault.action == "late":
            body = await _body(incoming)  # as long as there is somebody to send it
            await self._released(fault)
            try:
                status, headers, body = await self._ask(incoming, body)
            finally:
                fault._landed.set()  # noqa: SLF001 - the same
            return await _sent(incoming, status, headers, body)
        if fault.action == "delay":
            await asyncio.sleep(fault.delay_s)
            return await self._forwarded(incoming, request)
        status, headers, body = await self._ask(incoming, flipped=fault.action == "flip_request")
        if fault.action == "drop_after":
            raise self._dropped(incoming)
        if fault.action == "hold_after":
            await self._released(fault)
        elif fault.action == "flip" and body:
            body = _flipped(body)
        elif fault.action == "truncate" and body:
            self._answered(request, status)
            answer = web.StreamResponse(status=status, headers=headers)
            answer.content_length = len(body)
            await answer.prepare(incoming)
            await answer.write(body[: len(body) // 2])
            raise self._dropped(incoming)
        self._answered(request, status)
        return await _sent(incoming, status, headers, body)

    async def _forwarded(self, incoming: web.BaseRequest, request: Request) -> web.StreamResponse:
        status, headers, body = await self._ask(incoming)
        self._answered(request, status)
        return await _sent(incoming, status, headers, body)

    async def _ask(
        self, incoming: web.BaseRequest, body: bytes | None = None, *, flipped: bool = False
    ) -> tuple[int, Any, bytes]:
        from multidict import CIMultiDict  # noqa: PLC0415 - comes with aiohttp
        from yarl import URL  # noqa: PLC0415 - comes with aiohttp

        sent = CIMultiDict((k, v) for k, v in incoming.headers.items() if k.lower() not in {*_HOP_BY_HOP, "expect"})
        if body is None:
            body = await _body(incoming)
        if flipped and body:
            body = _flipped(body)
        async with self._session.request(
            incoming.method,
            URL(self._upstream + incoming.raw_path, encoded=True),
            headers=sent,
            data=io.BytesIO(body) if body else None,
            allow_redirects=False,
        ) as answer:
            headers = CIMultiDict((k, v) for k, v in answer.headers.items() if k.lower() not in _HOP_BY_HOP)
            return answer.status, headers, await answer.read()

    def _dropped(self, incoming: web.BaseRequest) -> BaseException:
        if incoming.transport is not None:
            incoming.transport.abort()
        return asyncio.CancelledError()


async def _ended() -> None:
    """A client that broke off leaves its handler behind, which the server has forgotten: let it end."""
    left = asyncio.all_tasks() - {asyncio.current_task()}
    for task in left:
        task.cancel()
    await asyncio.gather(*left, return_exceptions=True)
    await hang_up()


#: What aiohttp's client would add by itself.
_ADDED = ("Accept", "Accept-Encoding", "User-Agent", "Content-Type")


def _flipped(body: bytes) -> bytes:
    middle = len(body) // 2
    return body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]


async def _body(incoming: web.BaseRequest) -> bytes:
    if incoming.headers.get("Expect", "").lower() == "100-continue" and incoming.transport is not None:
        incoming.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    body = bytearray()
    async for chunk in incoming.content.iter_chunked(1 << 20):
        body += chunk
    return bytes(body)


async def _sent(incoming: web.BaseRequest, status: int, headers: Any, body: bytes) -> web.StreamResponse:
    if incoming.method == "HEAD":
        # The length is that of the body which is not sent.
        answer = web.StreamResponse(status=status, headers=headers)
        await answer.prepare(incoming)
        return answer
    headers.pop("Content-Length", None)
    return web.Response(status=status, headers=headers, body=body)


def _refusal(request: Request, fault: Injected) -> web.Response:
    body, kind = fault.body, "application/xml"
    if body is None and "/storage/v1" in request.path:
        kind = "application/json"
        body = f'{{"error": {{"code": {fault.status}, "message": "injected"}}}}'.encode()
    elif body is None:
        code = _S3_CODES.get(fault.status, "Injected")
        body = f"<Error><Code>{code}</Code><Message>injected</Message></Error>".encode()
    return web.Response(
        status=fault.status,
        body=b"" if request.method == "HEAD" else body,
        headers={"Content-Type": kind, **fault.headers},
    )
