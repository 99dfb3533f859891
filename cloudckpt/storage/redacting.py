"""What is secret, and how it is taken out of every text that comes from a store or from the libraries that speak to it.

A server, or a proxy before it, may repeat whatever it was shown: a key, a token, a password. Each remote storage has
one ``Redactor``, and no message, log line or chained error leaves the storage but through it.
"""

from __future__ import annotations

import base64
import contextlib
import html
import json
import os
import re
import urllib.request
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import quote, unquote

__all__ = ["Redactor"]

_MASK = "***"
#: Shorter values are left alone. "s3" or "me" or "true" stands in every other message: replaced there, nothing could be
#: read any more, and each gap would tell what is secret. No real key, token or signature is as short as that.
_LEAST = 6
#: Names of options, and of fields in them, whose values nobody should see.
_SECRET_NAME = re.compile(
    r"secret|token|passw|passphrase|pwd|credential|signature|private|assertion|cookie|auth|bearer|(^|_)sas|key$|"
    r"conn(ection)?_str",
    re.IGNORECASE,
)
#: Names that look like those, of what is no secret: where something is, or what it is called.
_PLAIN_NAME = re.compile(r"(uri|url|id|email|file|filename|path|type|method|duration|expiry)$", re.IGNORECASE)
#: What gcsfs takes as a token and is none, and a file with one.
_PLAIN_VALUE = re.compile(r"google_default|browser|anonymous|.*\.json", re.IGNORECASE)
#: Where credentials keep what is secret of them. Looked up, never asked for: asking may send a request.
_HELD = (
    "secret_key",
    "_secret_key",
    "token",
    "_token",
    "refresh_token",
    "_refresh_token",
    "_client_secret",
    "_id_token",
)
#: Secrets that came later than the options and are remembered: tokens are renewed hourly, and a run lasts for weeks.
_MOST_LEARNED = 1000
_DEPTH = 8
_LONG_LINE = 16
#: What is secret wherever it is said, known to us or not.
_PATTERNS = (
    # The user before the host of a URL.
    (re.compile(r"//[^/\s]*@"), f"//{_MASK}@"),
    # Queries and headers that are signatures and tokens: of S3, Google, Azure, OAuth.
    (
        re.compile(
            r"(?<![\w-])((?:x-(?:amz|goog)-(?:signature|credential|security-token)|x-amz-s3session-token|signature|"
            r"credential|sig|access_token|refresh_token|id_token|client_secret|assertion)\\?['\"]?\s*[=:]\s*(?:b(?=\\?['\"]))?\\?['\"]?)"
            r"(?!\s)[^\s&'\",;()<>\\]+",
            re.IGNORECASE,
        ),
        rf"\1{_MASK}",
    ),
    (
        re.compile(
            r"((?:proxy-)?authorization\\?['\"]?\s*[:=]\s*(?:b(?=\\?['\"]))?\\?['\"]?)"
            r"(?:(?:basic|bearer|digest|negotiate|aws4-hmac-sha256)\s+)?[^\s'\",;()<>\\]+",
            re.IGNORECASE,
        ),
        rf"\1{_MASK}",
    ),
    (re.compile(r"\b(bearer|basic)\s+[\w.~+/-]{16,}=*", re.IGNORECASE), rf"\1 {_MASK}"),
    (re.compile(r"\bya29\.[\w.-]+"), _MASK),  # Google's access tokens
)


class _HiddenError(Exception):
    """Stands in a chain for an error whose text has a secret in it and cannot be changed."""


class Redactor:
    """Knows the secrets of one storage, and replaces them by ``***``.

    Args:
        options: the storage's: what stands under the name of a secret, at any depth, and users in URLs.
        url: the storage's own, with its user and password if it has them.
    """

    def __init__(self, options: Mapping[str, object], url: str = "") -> None:
        self._given: dict[str, None] = {}
        self._learned: dict[str, None] = {}
        self._holder: Any = None
        for text in _proxies():
            self._note_url(text, self._given)
        self._note_url(url, self._given)
        self._look_into(options, secret=False, depth=0)

    # -- what is secret --------------------------------------------------------------------------------------

    def learn(self, *texts: object) -> None:
        """Remember secrets that came later: a session's token, a key that was read from a profile."""
        for text in texts:
            if isinstance(text, str) and text not in self._learned and text not in self._given:
                _note(text, self._learned)
        while len(self._learned) > _MOST_LEARNED:
            with contextlib.suppress(KeyError, StopIteration, RuntimeError):  # another thread has done it
                del self._learned[next(iter(self._learned))]

    def learn_headers(self, headers: Mapping[str, Any]) -> None:
        """Remember what a request shows the store of whoever sends it."""
        for name, value in headers.items():
            said = value.decode("latin-1") if isinstance(value, bytes) else str(value)
            if name.lower() in {"x-amz-security-token", "x-amz-s3session-token"}:
                self.learn(said)
            elif name.lower() in {"authorization", "proxy-authorization"} and not said.startswith("AWS4"):
                self.learn(said.rpartition(" ")[2])  # a signature is another one each time, and known by its name

    def learn_url(self, *urls: str | None) -> None:
        """Remember the passwords of an endpoint or a proxy."""
        for url in urls:
            self._note_url(url or "", self._learned)

    def watch(self, credentials: object) -> None:
        """Whatever these credentials hold is secret, now and after they were renewed."""
        self._holder = credentials
        self._learn_held()

    def _learn_held(self) -> None:
        # From the object's own fields: a property of credentials may renew them, and wait for a server.
        fields = getattr(self._holder, "__dict__", {})
        self.learn(*(fields.get(name) for name in _HELD))

    def _look_into(self, value: object, *, secret: bool, depth: int) -> None:
        if depth > _DEPTH:
            return
        if isinstance(value, bytes):
            value = value.decode("latin-1")
        if isinstance(value, str):
            self._note_url(value, self._given)
            if secret and not _PLAIN_VALUE.fullmatch(value):
                _note(value, self._given)
        elif isinstance(value, Mapping):
            for name, item in value.items():
                text = str(name)
                hidden = (secret or _SECRET_NAME.search(text) is not None) and _PLAIN_NAME.search(text) is None
                self._look_into(item, secret=hidden, depth=depth + 1)
        elif isinstance(value, list | tuple | set | frozenset):
            for item in value:
                self._look_into(item, secret=secret, depth=depth + 1)
        elif secret and value is not None and not isinstance(value, bool | int | float):
            self.watch(value)

    @staticmethod
    def _note_url(text: str, among: dict[str, None]) -> None:
        _, slashes, rest = text.partition("://")
        user, at, _ = rest.rpartition("@")
        if not slashes or not at:
            return
        name, colon, password = user.partition(":")
        if colon:
            plain = f"{unquote(name)}:{unquote(password)}"
            for secret in (password, unquote(password), base64.b64encode(plain.encode()).decode()):
                _note(secret, among)
        elif "/" not in name:
            _note(name, among)  # a token in the place of a user

    # -- taking it out ---------------------------------------------------------------------------------------

    def hide(self, text: str) -> str:
        """The text with ``***`` for all that is secret. Hiding twice changes nothing more."""
        self._learn_held()
        # The longest first: one may be a part of another.
        for secret in sorted({*[*self._given], *[*self._learned]}, key=len, reverse=True):
            text = text.replace(secret, _MASK)
        for pattern, instead in _PATTERNS:
            text = pattern.sub(instead, text)
        return text

    def clean(self, exc: BaseException) -> BaseException | None:
        """Take what is secret out of an error, where it stands, and out of all that is chained to it.

        It is shown as the cause of ours, and Python prints the whole chain. An error further down whose text cannot be
        changed gets another in its place.

        Returns:
            what can be chained: the error; None if its own text cannot be changed.
        """
        seen: set[int] = set()
        waiting = [exc]
        while waiting:
            here = waiting.pop()
            if id(here) in seen:
                continue
            seen.add(id(here))
            self._rewrite(here, 0)
            for link in ("__cause__", "__context__"):
                linked: BaseException | None = getattr(here, link)
                if linked is None:
                    continue
                self._rewrite(linked, 0)
                if self._shows(linked):
                    linked = self._stand_in(linked)
                    setattr(here, link, linked)
                waiting.append(linked)
        return None if self._shows(exc) else exc

    @staticmethod
    def _stand_in(exc: BaseException) -> BaseException:
        instead = _HiddenError(f"{type(exc).__name__}: what it says has a secret in it, and is not shown")
        instead.__context__ = exc.__context__
        if exc.__cause__ is not None:
            instead.__cause__ = exc.__cause__
        instead.__suppress_context__ = exc.__suppress_context__
        return instead

    def _shows(self, exc: BaseException) -> bool:
        try:
            said = f"{exc!s}\n{exc!r}"
        except Exception:  # noqa: BLE001 - somebody else's; what cannot be looked at is not shown
            return True
        return self.hide(said) != said or (
            isinstance(exc, BaseExceptionGroup) and any(map(self._shows_in_chain, exc.exceptions))
        )

    def _shows_in_chain(self, exc: BaseException) -> bool:
        return self.clean(exc) is None

    def _rewrite(self, exc: BaseException, depth: int) -> None:
        for name in ("args", "strerror", "filename", "filename2", *getattr(exc, "__dict__", {})):
            value = getattr(exc, name, None)
            hidden = self._hidden(value, depth)
            if hidden is not value:
                # Some have fields that cannot be set: whether it still shows something is looked at afterwards.
                with contextlib.suppress(Exception):
                    setattr(exc, name, hidden)

    def _hidden(self, value: Any, depth: int) -> Any:
        """The same object where nothing is to be hidden in it; dictionaries and lists are changed in place."""
        if depth > _DEPTH:
            return value
        if isinstance(value, str):
            text = self.hide(value)
            return value if text == value else text
        if isinstance(value, bytes):
            text = value.decode("latin-1")
            hidden = self.hide(text)
            return value if hidden == text else hidden.encode("latin-1")
        if isinstance(value, BaseException):
            self._rewrite(value, depth + 1)
        return self._hidden_in(value, depth)

    def _hidden_in(self, value: Any, depth: int) -> Any:
        if isinstance(value, dict):
            for name, item in [*value.items()]:
                if (found := self._hidden(item, depth + 1)) is not item:
                    value[name] = found
        elif isinstance(value, list):
            value[:] = [self._hidden(item, depth + 1) for item in value]
        elif type(value) is tuple:
            items = tuple(self._hidden(item, depth + 1) for item in value)
            if any(new is not old for new, old in zip(items, value, strict=True)):
                return items
        return value


def _note(secret: str, among: dict[str, None]) -> None:
    """Remember a secret as it is, and as it is written in URLs, in XML, in JSON and in Python."""
    if len(secret) < _LEAST or secret == _MASK:
        return
    # A private key is shown line by line as well.
    lines = [line for line in secret.splitlines() if len(line) >= _LONG_LINE and not line.startswith("-----")]
    for text in (secret, *lines):
        for spelling in (
            text,
            quote(text),
            quote(text, safe=""),
            html.escape(text),
            json.dumps(text)[1:-1],
            repr(text)[1:-1],
        ):
            among[spelling] = None


def _proxies() -> Iterator[str]:
    yield from urllib.request.getproxies().values()
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "STORAGE_EMULATOR_HOST"):
        yield os.environ.get(name, "")
