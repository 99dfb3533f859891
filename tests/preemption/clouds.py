"""The metadata servers of the clouds, on loopback: what they ask of a request, and what they say."""

from __future__ import annotations

import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

#: What EC2's server believes the time is; far from this machine's own.
DATE = "Mon, 18 Sep 2017 08:20:00 GMT"

Reply = tuple[int, str, dict[str, str]]


class Cloud:
    """One server; a context manager.

    Attributes:
        requests: method and path of each, in order.
    """

    def __init__(self) -> None:
        self.requests: list[tuple[str, str]] = []
        self.changed = threading.Condition()
        self.ended = False
        cloud = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._reply(cloud.reply("GET", self.path, self.headers.get))

            def do_PUT(self) -> None:
                self._reply(cloud.reply("PUT", self.path, self.headers.get))

            def _reply(self, reply: Reply) -> None:
                status, body, headers = reply
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body.encode())

            def date_time_string(self, timestamp: float | None = None) -> str:
                return DATE

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the standard library's name
                """Tests are quiet."""

        class Server(ThreadingHTTPServer):
            def handle_error(self, request: Any, client_address: Any) -> None:
                """Clients that break off a request are what some tests are about."""

        self._server = Server(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})
        self.address = f"127.0.0.1:{self._server.server_port}"

    def reply(self, method: str, path: str, header: Callable[[str], str | None]) -> Reply:
        """Status, body and headers."""
        raise NotImplementedError

    def asked(self, count: int) -> bool:
        """Wait until so many requests have come."""
        with self.changed:
            return self.changed.wait_for(lambda: len(self.requests) >= count, 30)

    def _note(self, method: str, path: str) -> None:
        with self.changed:
            self.requests.append((method, path))
            self.changed.notify_all()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self.changed:
            self.ended = True
            self.changed.notify_all()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class EC2(Cloud):
    """The instance metadata service, version 2: nothing without a token.

    Attributes:
        action: the body of ``spot/instance-action``; None for 404.
        rebalance: the body of ``events/recommendations/rebalance``; None for 404.
        token: the only one that is good.
        status: of every answer to a good request, where it is not 200 or 404.
        out_of_order: paths that are answered with 500.
    """

    def __init__(self) -> None:
        super().__init__()
        self.action: str | None = None
        self.rebalance: str | None = None
        self.token = "first"
        self.status: int | None = None
        self.out_of_order: set[str] = set()

    def reply(self, method: str, path: str, header: Callable[[str], str | None]) -> Reply:
        self._note(method, path)
        if (method, path) == ("PUT", "/latest/api/token"):
            lives = header("X-aws-ec2-metadata-token-ttl-seconds") or ""
            return (200, self.token, {}) if lives.isdecimal() and 0 < int(lives) <= 21600 else (400, "", {})
        if header("X-aws-ec2-metadata-token") != self.token:
            return 401, "", {}
        if self.status is not None:
            return self.status, "", {}
        if path in self.out_of_order:
            return 500, "", {}
        bodies = {
            "/latest/meta-data/spot/instance-action": self.action,
            "/latest/meta-data/events/recommendations/rebalance": self.rebalance,
        }
        body = bodies.get(path) if method == "GET" else None
        return (
            (404, "<html>Not Found</html>", {}) if body is None else (200, body, {"Content-Type": "application/json"})
        )


class ComputeEngine(Cloud):
    """Google's metadata server: requests wait until a value changes, and must say that they are meant for it.

    Attributes:
        waiting: how many requests wait for a change.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waiting = 0
        self._values = {"preempted": ("FALSE", "a"), "maintenance-event": ("NONE", "a")}

    def set(self, key: str, value: str) -> None:
        """Change a value; whoever waits is answered."""
        with self.changed:
            self._values[key] = (value, self._values[key][1] + "x")
            self.changed.notify_all()

    def wait_until_asked(self, waiting: int) -> bool:
        """Until so many requests wait."""
        with self.changed:
            return self.changed.wait_for(lambda: self.waiting >= waiting, 30)

    def reply(self, method: str, path: str, header: Callable[[str], str | None]) -> Reply:
        self._note(method, path)
        if header("Metadata-Flavor") != "Google":
            return 403, "", {}
        found = urlsplit(path)
        query = {name: values[0] for name, values in parse_qs(found.query).items()}
        key = found.path.removeprefix("/computeMetadata/v1/instance/")
        if method != "GET" or key not in self._values:
            return 404, "", {"Metadata-Flavor": "Google"}
        with self.changed:
            if query.get("wait_for_change") == "true":
                self.waiting += 1
                self.changed.notify_all()
                self.changed.wait_for(
                    lambda: self.ended or self._values[key][1] != query.get("last_etag"), int(query["timeout_sec"])
                )
                self.waiting -= 1
            value, etag = self._values[key]
        return 200, f"{value}\n", {"Metadata-Flavor": "Google", "ETag": etag}
