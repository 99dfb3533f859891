"""What a cloud tells its machine on the machine's own metadata server: AWS and Google Cloud.

Only this machine's server is asked, over plain HTTP to its link-local address, past any proxy. Where the clouds' own
libraries are sent elsewhere by an environment variable (``AWS_EC2_METADATA_SERVICE_ENDPOINT``, ``GCE_METADATA_HOST``),
so are we.

Sources: "Spot Instance interruption notices", "EC2 instance rebalance recommendations" and "Use IMDSv2" in the Amazon
EC2 User Guide; "Preemptible VM instances", "Query VM metadata" and "Query metadata server for maintenance event
notices" in the Compute Engine documentation.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit

from cloudckpt.errors import ConfigError
from cloudckpt.preemption.watching import Sighting, Watch

__all__ = ["AwsSpot", "GcpKey", "Metadata", "aws_watches", "gcp_watches"]

_LINK_LOCAL = "169.254.169.254"
_CONNECT_S = 1.0
_ANSWER_S = 1.0
_MOST_BYTES = 64 * 1024
_OK, _UNAUTHORIZED, _NOT_FOUND = 200, 401, 404
#: What AWS asks for.
_AWS_EVERY_S = 5.0
_AWS_TOKEN_S = 21_600
#: A notice comes two minutes before the end. The last ten seconds belong to whatever else has to be ended.
_AWS_NOTICE_S = 110.0
_AWS_MARGIN_S = 10.0
#: Of the 30 s of a preempted virtual machine.
_GCP_NOTICE_S = 25.0
#: Of the 60 s before maintenance; machines with GPUs are told an hour before.
_GCP_MAINTENANCE_S = 50.0
#: How long Google's server holds a request that waits for a change.
_GCP_WAIT_S = 60
_GCP_PAUSE_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What the server said."""

    status: int
    headers: Mapping[str, str]
    body: str


class Metadata:
    """A metadata server, one request at a time.

    Args:
        address: its URL or host, as the clouds' environment variables have it.
        variable: that variable's name, for errors.

    Raises:
        ConfigError: that is no address of plain HTTP.
    """

    def __init__(self, address: str, variable: str) -> None:
        try:
            found = urlsplit(address if "//" in address else f"http://{address}")
            host, port = found.hostname, found.port or 80
        except ValueError as exc:
            raise ConfigError(f"{variable}={address!r} cannot be used: {exc}") from None
        if found.scheme != "http" or not host:
            raise ConfigError(f"{variable}={address!r}: expected something like http://{_LINK_LOCAL}")
        self.address = f"{host}:{port}"
        self._host, self._port = host, port
        self._mutex = threading.Lock()
        self._socket: socket.socket | None = None
        self._closed = False

    def ask(self, method: str, path: str, headers: Mapping[str, str], *, patience_s: float = _ANSWER_S) -> Answer:
        """Send a request and wait for the answer.

        Raises:
            OSError: nobody answers, or not in time; or this was closed.
            http.client.HTTPException: what answers does not speak HTTP.
        """
        connection = http.client.HTTPConnection(self._host, self._port, timeout=_CONNECT_S)
        try:
            connection.connect()
            with self._mutex:
                if self._closed:
                    raise OSError("closed")
                self._socket = connection.sock
            connection.sock.settimeout(patience_s)
            connection.request(method, path, headers=dict(headers))
            with contextlib.closing(connection.getresponse()) as response:
                body = response.read(_MOST_BYTES).decode(errors="replace")
                return Answer(status=response.status, headers=dict(response.getheaders()), body=body.strip())
        finally:
            with self._mutex:
                self._socket = None
            connection.close()

    def close(self) -> None:
        """Break off the request that waits, and take no further one."""
        with self._mutex:
            self._closed = True
            if self._socket is not None:
                with contextlib.suppress(OSError):
                    self._socket.shutdown(socket.SHUT_RDWR)


def _unexpected(server: Metadata, path: str, answer: Answer) -> OSError:
    return OSError(f"{server.address}{path} answered {answer.status}")


class AwsSpot:
    """EC2's notices for spot instances, over IMDSv2.

    Args:
        server: this machine's.
        rebalance: whether a rebalance recommendation is a notice: it says that an end is likely, not when.
    """

    name = "the metadata service of EC2 (in a container it takes a hop limit of 2)"
    every_s = _AWS_EVERY_S

    def __init__(self, server: Metadata, *, rebalance: bool) -> None:
        self.close = server.close
        self._server = server
        self._token: str | None = None
        self._paths = {"/latest/meta-data/spot/instance-action": _aws_action}
        if rebalance:
            self._paths["/latest/meta-data/events/recommendations/rebalance"] = _aws_rebalance
        self._seen: set[str] = set()

    def look(self) -> Sequence[Sighting]:
        """See ``Watch``."""
        found: list[Sighting] = []
        problem: Exception | None = None
        for path, read in self._paths.items():
            try:
                answer = self._asked(path)
            except (OSError, http.client.HTTPException) as exc:
                problem = problem or exc  # what the other path has said is not lost to it
                continue
            if answer is not None and answer.body not in self._seen:
                self._seen.add(answer.body)
                found.append(read(answer))
        if problem is not None and not found:
            raise problem
        return found

    def _asked(self, path: str) -> Answer | None:
        """What there is to be read; None if there is nothing."""
        answer = self._get(path)
        if answer.status not in {_OK, _NOT_FOUND}:
            raise _unexpected(self._server, path, answer)
        return answer if answer.status == _OK else None

    def _get(self, path: str) -> Answer:
        answer = self._server.ask("GET", path, self._authorized())
        if answer.status == _UNAUTHORIZED:
            self._token = None  # it has run out
            answer = self._server.ask("GET", path, self._authorized())
        return answer

    def _authorized(self) -> dict[str, str]:
        if self._token is None:
            path, ttl = "/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": str(_AWS_TOKEN_S)}
            answer = self._server.ask("PUT", path, ttl)
            if answer.status != _OK:
                raise _unexpected(self._server, path, answer)
            self._token = answer.body
        return {"X-aws-ec2-metadata-token": self._token}


def _aws_action(answer: Answer) -> Sighting:
    """``{"action": "terminate", "time": "2017-09-18T08:22:00Z"}``.

    The time is compared with the server's own: this machine's clock takes no part.
    """
    notice_s = _AWS_NOTICE_S
    action, when = "interruption", "an unknown time"
    with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError):
        said = json.loads(answer.body)
        action, when = str(said["action"]), str(said["time"])
        ends = datetime.fromisoformat(when)
        left_s = (ends - parsedate_to_datetime(_header(answer, "Date"))).total_seconds()
        notice_s = max(0.0, min(notice_s, left_s - _AWS_MARGIN_S))
    return Sighting(reason=f"EC2 spot instance: {action} at {when}", notice_s=notice_s)


def _aws_rebalance(answer: Answer) -> Sighting:
    """``{"noticeTime": "2020-10-27T08:22:00Z"}``."""
    del answer
    return Sighting(reason="EC2 rebalance recommendation", notice_s=None)


def _header(answer: Answer, name: str) -> str:
    return next((value for key, value in answer.headers.items() if key.lower() == name.lower()), "")


class GcpKey:
    """One value of a Compute Engine machine, by requests that wait until it changes.

    Args:
        server: this machine's.
        key: below ``instance/``.
        alarming: the values that are a notice.
        notice_s: how long there is from then on.
    """

    every_s = _GCP_PAUSE_S

    def __init__(self, server: Metadata, key: str, alarming: Collection[str], *, notice_s: float) -> None:
        self.name = "the metadata server of Google Cloud"
        self.close = server.close
        self._server = server
        self._key = key
        self._alarming = alarming
        self._notice_s = notice_s
        self._etag = "0"  # matches nothing: the first answer comes at once
        self._value = ""

    def look(self) -> Sequence[Sighting]:
        """See ``Watch``."""
        path = f"/computeMetadata/v1/instance/{self._key}"
        query = f"?wait_for_change=true&timeout_sec={_GCP_WAIT_S}&last_etag={self._etag}"
        answer = self._server.ask("GET", path + query, {"Metadata-Flavor": "Google"}, patience_s=_GCP_WAIT_S + 5.0)
        if answer.status != _OK or _header(answer, "Metadata-Flavor") != "Google":
            raise _unexpected(self._server, path, answer)
        self._etag = _header(answer, "ETag") or "0"
        before, self._value = self._value, answer.body
        if answer.body in self._alarming and answer.body != before:
            return (Sighting(reason=f"Compute Engine: {self._key} is {answer.body}", notice_s=self._notice_s),)
        return ()


def aws_watches(environment: Mapping[str, str], *, rebalance: bool) -> list[Watch]:
    """What to look at on EC2.

    Raises:
        ConfigError: the environment forbids it.
    """
    if environment.get("AWS_EC2_METADATA_DISABLED", "").lower() == "true":
        raise ConfigError(
            "aws=True, and AWS_EC2_METADATA_DISABLED=true in the environment: unset that, or leave out aws=True"
        )
    variable = "AWS_EC2_METADATA_SERVICE_ENDPOINT"
    server = Metadata(environment.get(variable) or f"http://{_LINK_LOCAL}", variable)
    return [AwsSpot(server, rebalance=rebalance)]


def gcp_watches(environment: Mapping[str, str]) -> list[Watch]:
    """What to look at on Compute Engine: each value has a request of its own that waits.

    Raises:
        ConfigError: the environment names no server.
    """
    variable = "GCE_METADATA_HOST"
    address = environment.get(variable) or _LINK_LOCAL
    ends = ("TERMINATE_ON_HOST_MAINTENANCE", "SHUTDOWN_ON_HOST_MAINTENANCE")
    return [
        GcpKey(Metadata(address, variable), "preempted", ("TRUE",), notice_s=_GCP_NOTICE_S),
        GcpKey(Metadata(address, variable), "maintenance-event", ends, notice_s=_GCP_MAINTENANCE_S),
    ]
