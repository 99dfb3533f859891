"""The page's server: one port of 127.0.0.1, one connection a request, and GET alone."""

from __future__ import annotations

import socketserver
import sys
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from cloudckpt.cli.ui.site import Answer, Site, refusal
from cloudckpt.errors import ConfigError

__all__ = ["PageServer"]

_LOOPBACK = "127.0.0.1"


class _Handler(BaseHTTPRequestHandler):
    server: PageServer
    #: Browsers open connections ahead of need and leave them idle; each holds a thread that long.
    timeout = 30.0

    def do_GET(self) -> None:
        """Answer from the site."""
        self._send(
            self.server.site.answer(
                self.path, hosts=self.headers.get_all("Host", []), known=self.headers.get("If-None-Match")
            )
        )

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:  # noqa: ARG002
        """What http.server refuses by itself (another method, a line that is no request), with our headers."""
        self._send(refusal(HTTPStatus(code), message or "this request cannot be answered"))

    def _send(self, answer: Answer) -> None:
        self.send_response(answer.status)
        for name, value in answer.headers:
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(answer.body)

    def version_string(self) -> str:
        """Nothing about the versions that run here."""
        return "cloudckpt"

    def log_message(self, *_: object) -> None:
        """No line for each request: the terminal is the user's."""


class PageServer(ThreadingHTTPServer):
    """Serves a site until it is shut down.

    Args:
        port: to listen on; 0 for a free one.

    Raises:
        ConfigError: the port is taken, or not for this user.
    """

    daemon_threads = True
    #: Two servers must not share a port: each would get half of the requests.
    allow_reuse_port = False

    def __init__(self, site: Site, *, port: int = 0) -> None:
        self.site = site
        try:
            super().__init__((_LOOPBACK, port), _Handler)
        except OSError as exc:
            raise ConfigError(
                f"port {port} of {_LOOPBACK} cannot be used ({exc.strerror or exc}): give another --port, or 0 for any "
                "free one"
            ) from exc

    def server_bind(self) -> None:
        """Bind, and no more: HTTPServer's own asks the name service what 127.0.0.1 is called, which can take long."""
        socketserver.TCPServer.server_bind(self)
        self.server_name = _LOOPBACK
        self.server_port = self.socket.getsockname()[1]

    @property
    def url(self) -> str:
        """The page's address; whoever has it can read the runs while this process lasts."""
        return f"http://{_LOOPBACK}:{self.server_port}{self.site.path}"

    @property
    def opening_url(self) -> str:
        """Leads to the page once: for a browser's command line, which others can see."""
        return f"http://{_LOOPBACK}:{self.server_port}{self.site.opening}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that left in mid-answer is no error."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)
