"""Where a lane connects to: host, port, the proxy in between, and what proves the host's identity."""

from __future__ import annotations

import base64
import ssl
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit

__all__ = ["Address", "Declined", "proxy_of"]

_PORTS = {"http": 80, "https": 443}


class Declined(Exception):  # noqa: N818 - no error: the filesystem's own client takes over
    """The direct lane cannot honour something that was asked for; the message says what."""


@dataclass(frozen=True, slots=True)
class Address:
    """One endpoint of a store.

    Attributes:
        scheme: ``http`` or ``https``.
        host: name or IP address, without brackets.
        port: TCP port.
        proxy: the proxy's URL, which may hold a user and a password; None for a direct connection.
        tls: what proves the host's identity; only for https.
    """

    scheme: str
    host: str
    port: int
    proxy: str | None = field(default=None, repr=False)
    tls: ssl.SSLContext | None = field(default=None, repr=False, compare=False)

    @classmethod
    def of(cls, url: str, *, proxy: str | None = None, tls: ssl.SSLContext | None = None) -> Address:
        """The address that a URL leads to.

        Raises:
            Declined: it is neither http nor https, or the proxy is of a kind that the lane does not speak to.
        """
        parts = urlsplit(url)
        if parts.scheme not in _PORTS or not parts.hostname:
            raise Declined("the endpoint is neither http:// nor https://")
        if (parts.scheme == "https") != (tls is not None):
            raise Declined("what proves the host's identity is not known")
        if proxy is not None and urlsplit(proxy).scheme != "http":
            raise Declined(f"the proxy speaks {urlsplit(proxy).scheme or 'no known protocol'}, not http")
        if proxy is not None and tls is not None and ":" in parts.hostname:
            # http.client asks for it without brackets, up to Python 3.12.
            raise Declined("the endpoint is an IPv6 address behind a proxy")
        return cls(parts.scheme, parts.hostname, parts.port or _PORTS[parts.scheme], proxy, tls)

    @property
    def name(self) -> str:
        """The value of the Host header: the port only where it is not the scheme's own."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"

    @property
    def proxy_headers(self) -> dict[str, str]:
        """What the proxy wants to know of whoever connects."""
        parts = urlsplit(self.proxy or "")
        if parts.username is None:
            return {}
        user = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        return {"Proxy-Authorization": f"Basic {base64.b64encode(user.encode()).decode()}"}


def proxy_of(url: str, given: Mapping[str, str] | None = None) -> str | None:
    """The proxy for a URL: the one given for its scheme, else the environment's (HTTPS_PROXY, NO_PROXY, …).

    Not ALL_PROXY: neither botocore nor aiohttp looks at it, and the lane goes where the session goes.
    """
    parts = urlsplit(url)
    if given is not None:
        found = given.get(parts.scheme)
    else:
        found = urllib.request.getproxies().get(parts.scheme)
        if found and urllib.request.proxy_bypass(parts.netloc.rpartition("@")[2]):
            return None
    if not found:
        return None
    return found if "://" in found else f"http://{found}"
