"""What a request is answered with, and whom. The only door to the page, so every guard is here.

Any web page that a browser on this machine shows can send requests to loopback, and so can every user of the machine:

- ``Host`` must name this machine: a foreign name that was rebound to 127.0.0.1 is refused (DNS rebinding);
- the path must begin with a random token, which only the terminal shows;
- the address that a browser is started with is seen by others in the list of processes, so it holds a ticket that is
  good once, and leads to the token;
- no other page may frame this one, or read or embed what it answers; and this one may load nothing from elsewhere.
"""

from __future__ import annotations

import hashlib
import logging
import re
import secrets
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from importlib import resources
from pathlib import PurePath
from typing import Any
from urllib.parse import parse_qsl

from cloudckpt.cli.ui import documents
from cloudckpt.cli.ui.reading import Place, SeenRun
from cloudckpt.errors import CheckpointNotFoundError, CloudCkptError, ConfigError

__all__ = ["Answer", "Site", "refusal"]

_LOG = logging.getLogger("cloudckpt")

#: Any port: behind ``ssh -L`` it is another one than ours.
_HOST = re.compile(r"(?:127\.0\.0\.1|localhost|\[::1\])(?::[0-9]{1,5})?", re.IGNORECASE)

_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_ALWAYS = (
    ("Content-Security-Policy", _POLICY),
    ("Cross-Origin-Resource-Policy", "same-origin"),
    ("Referrer-Policy", "no-referrer"),  # the address holds the token
    ("X-Content-Type-Options", "nosniff"),
    ("X-Frame-Options", "DENY"),
    ("Cache-Control", "no-store"),
)
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_JSON = "application/json"
_TEXT = "text/plain; charset=utf-8"
_INDEX = "index.html"
_OPEN = "open"
_API = "api/"
#: More words than any document takes.
_WORDS_LIMIT = 32

#: The document that looks at a run anew.
_LOOK = "ls"
#: name -> the document, from the last look.
_OF_A_LOOK: Mapping[str, Callable[[SeenRun, Mapping[str, str]], dict[str, Any]]] = {
    "log": lambda run, _: documents.log(run),
    "plot": lambda run, query: documents.plot(run, query.get("metric") or None),
    "prune": lambda run, query: documents.preview(run, documents.words_of(query)),
}


@dataclass(frozen=True, slots=True)
class Answer:
    """What is sent back; the headers that every answer has are among ``headers``."""

    status: HTTPStatus
    body: bytes
    headers: tuple[tuple[str, str], ...]


def _answer(status: HTTPStatus, kind: str, body: bytes, *more: tuple[str, str]) -> Answer:
    length = () if status is HTTPStatus.NOT_MODIFIED else (("Content-Length", str(len(body))),)
    return Answer(status, body, (("Content-Type", kind), *length, *more, *_ALWAYS))


def refusal(status: HTTPStatus, why: str) -> Answer:
    """A request that is not answered, and why, as plain text."""
    return _answer(status, _TEXT, f"{why}\n".encode("ascii", "backslashreplace"))


def _same(one: str, other: str) -> bool:
    return secrets.compare_digest(one.encode(), other.encode())


def _files() -> dict[str, tuple[str, bytes]]:
    """The page's own files by name, with their types; there is no way from a request to any other file."""
    folder = resources.files("cloudckpt.cli.ui").joinpath("static")
    found = {item.name: _TYPES.get(PurePath(item.name).suffix) for item in folder.iterdir()}
    return {name: (kind, folder.joinpath(name).read_bytes()) for name, kind in found.items() if kind is not None}


class Site:
    """The page of one place. Safe to ask from several threads.

    Attributes:
        path: where the page is; nobody without it is let in.
        opening: leads there once.
    """

    def __init__(self, place: Place) -> None:
        self._place = place
        self._files = _files()
        self._token = secrets.token_urlsafe(24)
        self._ticket: str | None = secrets.token_urlsafe(24)
        self._mutex = threading.Lock()
        self._spelled: weakref.WeakKeyDictionary[SeenRun, bytes] = weakref.WeakKeyDictionary()
        self.path = f"/{self._token}/"
        self.opening = f"/{_OPEN}/{self._ticket}"

    def answer(self, target: str, *, hosts: Sequence[str], known: str | None = None) -> Answer:
        """The answer to a GET. Never raises.

        Args:
            target: path and query, as they came.
            hosts: every ``Host`` header.
            known: the ``If-None-Match`` header, if there is one.
        """
        if len(hosts) != 1 or _HOST.fullmatch(hosts[0].strip()) is None:
            return refusal(HTTPStatus.FORBIDDEN, "this page is for 127.0.0.1 and localhost only")
        path, _, query = target.partition("?")
        _, _, inside = path.partition("/")
        first, _, name = inside.partition("/")
        if first == _OPEN:
            return self._opened(name)
        if not path.startswith("/") or not _same(first, self._token):
            return refusal(HTTPStatus.NOT_FOUND, "nothing here: open the address that cloudckpt ui has printed")
        if inside == first:
            return self._sent_to_the_page()  # whose files are named relative to it
        if name.startswith(_API):
            return self._document(name.removeprefix(_API), query, known)
        return self._file(name or _INDEX)

    def _file(self, name: str) -> Answer:
        if (file := self._files.get(name)) is None:
            return refusal(HTTPStatus.NOT_FOUND, "the page has no such file")
        kind, body = file
        return _answer(HTTPStatus.OK, kind, body)

    def _sent_to_the_page(self) -> Answer:
        return _answer(HTTPStatus.SEE_OTHER, _TEXT, b"", ("Location", self.path))

    def _opened(self, ticket: str) -> Answer:
        with self._mutex:
            good = self._ticket is not None and _same(ticket, self._ticket)
            if good:
                self._ticket = None
        if not good:
            return refusal(
                HTTPStatus.NOT_FOUND, "this link has been used: open the address that cloudckpt ui has printed"
            )
        return self._sent_to_the_page()

    def _document(self, name: str, query: str, known: str | None) -> Answer:
        try:
            words = dict(parse_qsl(query, keep_blank_values=True, max_num_fields=_WORDS_LIMIT))
        except ValueError:
            return refusal(HTTPStatus.BAD_REQUEST, "the query cannot be read")
        try:
            body = self._made(name, words)
        except CloudCkptError as exc:
            return _problem(_status(exc), type(exc).__name__, str(exc))
        except Exception as exc:  # noqa: BLE001 - a server goes on
            # Ours, not the user's: the terminal has the traceback, and the page goes on.
            _LOG.exception("cloudckpt ui could not make %s", name)
            return _problem(HTTPStatus.INTERNAL_SERVER_ERROR, type(exc).__name__, f"cloudckpt itself failed: {exc}")
        etag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
        if known == etag:
            return _answer(HTTPStatus.NOT_MODIFIED, _JSON, b"", ("ETag", etag))
        return _answer(HTTPStatus.OK, _JSON, body, ("ETag", etag))

    def _made(self, name: str, words: Mapping[str, str]) -> bytes:
        if name == "runs":
            return documents.encoded(documents.runs(self._place.url, self._place.runs()))
        if name not in {_LOOK, *_OF_A_LOOK}:
            known = ", ".join(sorted({_LOOK, *_OF_A_LOOK, "runs"}))
            raise ConfigError(f"there is no document {name!r}: ask for {known}")
        run = self._place.run(words.get("run", ""))
        if name == _LOOK:
            return self._listed(run.look())
        return documents.encoded(_OF_A_LOOK[name](run.seen(), words))

    def _listed(self, run: SeenRun) -> bytes:
        # Asked for every few seconds, and mostly nothing has changed: ten thousand checkpoints are spelled once.
        if (body := self._spelled.get(run)) is None:
            body = self._spelled[run] = documents.encoded(documents.listing(run))
        return body


def _status(exc: CloudCkptError) -> HTTPStatus:
    if isinstance(exc, CheckpointNotFoundError):
        return HTTPStatus.NOT_FOUND
    return HTTPStatus.BAD_REQUEST if isinstance(exc, ConfigError) else HTTPStatus.BAD_GATEWAY


def _problem(status: HTTPStatus, kind: str, why: str) -> Answer:
    return _answer(status, _JSON, documents.encoded({"kind": kind, "error": why}))
