"""How the session reaches Google Cloud Storage, and whether the direct lane can go the same way."""

from __future__ import annotations

import ssl
import sys
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from cloudckpt.storage.direct import Address, Declined, proxy_of

__all__ = ["Way", "location_of", "refuse_interception", "way_of"]

#: What of ``session_kwargs`` the lane does as aiohttp does.
_UNDERSTOOD = {"trust_env", "proxy"}


@dataclass(frozen=True, slots=True)
class Way:
    """The session's endpoint.

    Attributes:
        location: its URL, without a slash at the end.
        proxy: the proxy's URL; None for a direct connection.
        payer: the project that pays, where the requester does; else empty.
    """

    location: str
    proxy: str | None = field(repr=False)
    payer: str

    @property
    def path(self) -> str:
        """What every path begins with; empty at Google."""
        return urlsplit(self.location).path

    @property
    def address(self) -> Address:
        """Where to connect to. The certificates are checked as aiohttp does: by Python's own defaults.

        Raises:
            Declined: the endpoint or the proxy is of a kind that the lane does not speak to.
        """
        tls = ssl.create_default_context() if self.location.startswith("https://") else None
        return Address.of(self.location, proxy=self.proxy, tls=tls)


def location_of(filesystem: Any) -> str:
    """The URL that a gcsfs filesystem sends its requests to."""
    return str(filesystem._location)  # noqa: SLF001 - nothing public tells it


def way_of(filesystem: Any) -> Way:
    """The way of a gcsfs filesystem whose session is open.

    Raises:
        Declined: the session does what the lane does not.
    """
    from aiohttp import ClientSession  # noqa: PLC0415 - comes with gcsfs, an extra

    if type(filesystem.session) is not ClientSession:
        raise Declined(f"the session is a {type(filesystem.session).__name__}, not aiohttp's own")
    options = dict(filesystem.session_kwargs)
    if strange := sorted(set(options) - _UNDERSTOOD):
        raise Declined(f"session_kwargs has {', '.join(strange)}, which only aiohttp understands")
    location = location_of(filesystem).rstrip("/")
    if location.startswith("https://") and getattr(filesystem, "_use_client_cert", False):
        raise Declined("the session shows a certificate of the client")
    parts = urlsplit(location)
    proxy = options.get("proxy")
    if proxy is None and options.get("trust_env"):  # else aiohttp does not look at the environment either
        proxy = proxy_of(f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}")
    payer = filesystem._get_params({}).get("userProject")  # noqa: SLF001 - nothing public tells it
    return Way(location, None if proxy is None else str(proxy), str(payer or ""))


def refuse_interception() -> None:
    """Decline where somebody stands in for aiohttp: a mock or a recorder in this process must see every request.

    Raises:
        Declined: somebody does.
    """
    client: Any = getattr(sys.modules.get("aiohttp"), "ClientSession", None)
    # What mocks and recorders replace.
    if client is not None and getattr(client._request, "__module__", "") != "aiohttp.client":  # noqa: SLF001 - see above
        raise Declined("aiohttp's requests are intercepted in this process, and whoever does it must see them all")
