"""What Google Cloud Storage answers, sorted into what a caller can do about it.

Statuses and reasons are those of "HTTP status and error codes for JSON", and "… for XML", in the Cloud Storage
documentation.
"""

from __future__ import annotations

import asyncio
import html
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cloudckpt.errors import ObjectNotFoundError, StorageError

__all__ = ["Answer", "UnauthorizedError", "explained", "without_answer"]

#: So much of an answer that is no error document is shown; of so much of it the secrets are taken out before.
_SHOWN = 300
_LOOKED_AT = 16 * 1024

_LOGIN = (
    "run `gcloud auth application-default login`, set GOOGLE_APPLICATION_CREDENTIALS, or give the machine a service "
    "account"
)
_ERROR = re.compile(rb"\s*(<\?xml[^>]*>)?\s*<Error>")
_RETRYABLE = {408, 409, 429, 500, 502, 503, 504}


class UnauthorizedError(StorageError):
    """The access token is not accepted; a fresh one may be."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One HTTP answer, whole."""

    status: int
    headers: Any  # a case-insensitive multi-dictionary
    body: bytes

    @property
    def json(self) -> dict[str, object]:
        """The body as a JSON object; empty if it is none."""
        try:
            found = json.loads(self.body or b"{}")
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}

    @property
    def code(self) -> str:
        """The XML API's name for an error; empty where the answer is none of its."""
        return _inside("Code", self.body) if _ERROR.match(self.body) else ""

    @property
    def told_crc32c(self) -> str:
        """The CRC-32C of the object, as a header tells it; empty if none does."""
        headers = self.headers
        said = headers.getall("x-goog-hash", []) if hasattr(headers, "getall") else [headers.get("x-goog-hash", "")]
        for part in ",".join(said).split(","):
            name, _, value = part.strip().partition("=")
            if name == "crc32c":
                return value
        return ""

    def message(self, hide: Callable[[str], str]) -> str:
        """What the store said in words.

        Args:
            hide: takes out what is secret; before a long text is cut, or the first half of a token would be left.
        """
        if self.code:
            return hide(f"{self.code}: {_inside('Message', self.body)}")
        error = self.json.get("error")
        if isinstance(error, dict):
            return hide(str(error.get("message", "")))
        return hide(str(error)) if error else hide(self.body[:_LOOKED_AT].decode(errors="replace"))[:_SHOWN].strip()


def _inside(tag: str, body: bytes) -> str:
    found = re.search(rf"<{tag}>(.*?)</{tag}>".encode(), body, re.DOTALL)
    return html.unescape(found[1].decode(errors="replace")) if found else ""


def explained(  # noqa: PLR0911 - a table of statuses
    answer: Answer, what: str, *, bucket: str, hide: Callable[[str], str]
) -> StorageError:
    """An answer that is no success, as an error of ours; ``hide`` takes out what is secret."""
    status, said = answer.status, answer.message(hide)
    detail = f"{what}: {status}" + (f" ({said})" if said else "")
    if status == 404:
        if "bucket does not exist" in said.lower():
            return StorageError(f"{detail}: bucket {bucket!r} does not exist: create it, or fix the URL")
        return ObjectNotFoundError(f"{what}: the object does not exist")
    if status == 401:
        return UnauthorizedError(f"{detail}: the credentials are missing, wrong or expired: {_LOGIN}", retryable=True)
    if status == 403:
        return StorageError(
            f"{detail}: no permission: a trainer needs roles/storage.objectUser on bucket {bucket!r} (replacing "
            "the manifest is a create and a delete); `cloudckpt doctor` tells which right is missing"
        )
    if status in _RETRYABLE:
        return StorageError(detail, retryable=True)
    if status == 400 and "requester pays" in said.lower():
        return StorageError(f"{detail}: pass storage_options={{'requester_pays': 'your-project'}}")
    return StorageError(detail)


def without_answer(exc: BaseException, what: str, *, hide: Callable[[str], str]) -> StorageError:
    """A request that was never answered, or never sent, as an error of ours; ``hide`` takes out what is secret."""
    if isinstance(exc, StorageError):
        return exc
    said = hide(str(exc)) or type(exc).__name__
    module = type(exc).__module__
    if type(exc).__name__ == "DefaultCredentialsError":
        return StorageError(
            f"{what}: there are no credentials ({said}): {_LOGIN}; for a public bucket pass "
            "storage_options={'token': 'anon'}"
        )
    if module.startswith(("google.auth", "gcsfs")):
        # Refreshing a token goes over the network as well.
        return UnauthorizedError(f"{what}: no access token ({said}): {_LOGIN}", retryable=True)
    if isinstance(exc, OSError | EOFError | asyncio.TimeoutError) or module.startswith(("aiohttp", "requests")):
        return StorageError(f"{what}: {type(exc).__name__}: {said}", retryable=True)
    return StorageError(f"{what}: {type(exc).__name__}: {said}")
