"""Signature Version 4 of requests whose payload is not signed.

Source: "Signature Calculations for the Authorization Header: Transferring Payload in a Single Chunk", S3 API reference.
Signing costs the same whatever the size of the body; the body itself is protected by TLS and by its CRC-32C header,
which is signed.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from urllib.parse import quote

__all__ = ["Credentials", "quoted_path", "quoted_query", "signed"]

_UNSIGNED = "UNSIGNED-PAYLOAD"


@dataclass(frozen=True, slots=True)
class Credentials:
    """An access key; what is secret of it is never shown."""

    access_key: str
    secret_key: str = field(repr=False)
    token: str | None = field(default=None, repr=False)


def quoted_path(path: str) -> str:
    """A path as it is both sent and signed: UTF-8, percent-encoded but for unreserved characters and slashes."""
    return quote(path, safe="/~")


def quoted_query(query: Mapping[str, str]) -> str:
    """A query as it is both sent and signed: sorted by name."""
    pairs = sorted((quote(name, safe="~"), quote(value, safe="~")) for name, value in query.items())
    return "&".join(f"{name}={value}" for name, value in pairs)


def signed(
    method: str,
    path: str,
    query: str,
    headers: Mapping[str, str],
    *,
    credentials: Credentials,
    region: str,
    service: str,
    now: datetime,
) -> dict[str, str]:
    """The headers of a request with those that prove who sends it.

    Args:
        path: as sent, see ``quoted_path``.
        query: as sent, see ``quoted_query``; without the question mark.
        headers: by name; all of them are signed, and ``Host`` must be among them.
        region: such as ``us-east-1``.
        service: such as ``s3``.
        now: the time, in UTC; the store accepts a quarter of an hour.
    """
    stamp = now.strftime("%Y%m%dT%H%M%SZ")
    found = {name.lower(): value.strip() for name, value in headers.items()}
    found["x-amz-date"] = stamp
    found["x-amz-content-sha256"] = _UNSIGNED
    if credentials.token:
        found["x-amz-security-token"] = credentials.token
    names = sorted(found)
    lines = "".join(f"{name}:{' '.join(found[name].split())}\n" for name in names)
    listed = ";".join(names)
    request = f"{method}\n{path}\n{query}\n{lines}\n{listed}\n{_UNSIGNED}"
    scope = f"{stamp[:8]}/{region}/{service}/aws4_request"
    text = f"AWS4-HMAC-SHA256\n{stamp}\n{scope}\n{hashlib.sha256(request.encode()).hexdigest()}"
    key = _key(credentials.secret_key, stamp[:8], region, service)
    signature = hmac.new(key, text.encode(), "sha256").hexdigest()
    found["authorization"] = (
        f"AWS4-HMAC-SHA256 Credential={credentials.access_key}/{scope}, SignedHeaders={listed}, Signature={signature}"
    )
    return found


@lru_cache(maxsize=16)
def _key(secret: str, day: str, region: str, service: str) -> bytes:
    key = f"AWS4{secret}".encode()
    for part in (day, region, service, "aws4_request"):
        key = hmac.digest(key, part.encode(), "sha256")
    return key
