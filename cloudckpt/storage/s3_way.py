"""How the session's client reaches the store: what one of its requests shows, and what it says of itself."""

from __future__ import annotations

import re
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cloudckpt.storage.direct import Declined

__all__ = ["Way", "header_names", "tls_context"]

#: Arguments that become headers only after more work than naming them.
_UNNAMEABLE = re.compile(r"SSECustomer|CopySource|Metadata$")


@dataclass(frozen=True, slots=True)
class Way:
    """What a request of the session's client showed, and what the client says of itself.

    Attributes:
        url: the URL of the request, without its query.
        authorization: its Authorization header; empty for an anonymous one.
        is_session_bound: whether it was signed for a session of the bucket (S3 Express).
        endpoint: the client's own endpoint, before a bucket is put into it.
        verify: False, True, or a file of certificates.
        client_certificate: a file, or a file and its key's file.
        proxies: by scheme.
        headers: operation -> headers that the options add to it.
    """

    url: str
    authorization: str
    is_session_bound: bool
    endpoint: str
    verify: bool | str
    client_certificate: str | tuple[str, str] | None
    proxies: Mapping[str, str]
    headers: Mapping[str, Mapping[str, str]]


def tls_context(way: Way) -> ssl.SSLContext:
    """What proves the store's identity, and ours, just as the client has it."""
    if way.verify is False:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    else:
        from botocore.httpsession import get_cert_path  # noqa: PLC0415 - the extra's

        context = ssl.create_default_context(cafile=get_cert_path(way.verify))
    if way.client_certificate is not None:
        files = (way.client_certificate,) if isinstance(way.client_certificate, str) else way.client_certificate
        context.load_cert_chain(*files)
    return context


def header_names(operation: Any, arguments: Mapping[str, object]) -> dict[str, str]:
    """Arguments of an operation as the headers that the service model makes of them.

    Raises:
        Declined: one is no plain header.
    """
    found: dict[str, str] = {}
    for name, value in arguments.items():
        member = operation.input_shape.members.get(name)
        place = getattr(member, "serialization", {})
        if place.get("location") != "header" or _UNNAMEABLE.match(name) or not isinstance(value, str | int):
            raise Declined(f"the option {name} of s3_additional_kwargs is no plain header of {operation.name}")
        found[place["name"]] = str(value).lower() if isinstance(value, bool) else str(value)
    return found
