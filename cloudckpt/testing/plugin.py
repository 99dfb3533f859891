"""A pytest plugin for everyone's tests: a fresh root to save to, on each kind of store, without an account.

Loaded by pytest by itself once ``cloudckpt`` is installed; the servers need ``cloudckpt[testing]``. Every fixture gives
a root of its own, empty, as the string that ``CheckpointManager`` takes. Servers run on 127.0.0.1, are started when
a test first asks for one, and are shared by the session; the environment that points at them is set for the one test
and inherited by the processes it starts.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import pytest

if TYPE_CHECKING:
    from cloudckpt.testing.fake_gcs import FakeGCS
    from cloudckpt.testing.fault_proxy import FaultProxy
    from cloudckpt.testing.servers import MotoServer

# Imports are inside the fixtures: the plugin is loaded into every pytest run on this machine.
# ruff: noqa: PLC0415

__all__ = [
    "faulty_gcs_root",
    "faulty_s3_root",
    "gcs_faults",
    "gcs_root",
    "gcs_server",
    "local_root",
    "memory_root",
    "s3_faults",
    "s3_root",
    "s3_server",
]


_T = TypeVar("_T")


def _fresh() -> str:
    return f"t-{uuid.uuid4().hex[:12]}"


@pytest.fixture
def local_root(tmp_path: Path) -> str:
    """A folder that does not exist yet."""
    return str(tmp_path / "run")


@pytest.fixture
def memory_root() -> Iterator[str]:
    """A ``memory://`` URL that nobody else uses; what is there is forgotten after the test."""
    from cloudckpt.storage import MemoryStorage

    url = f"memory://{_fresh()}/run"
    yield url
    MemoryStorage.forget(url)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[MotoServer]:
    """A moto server: an S3 with conditional writes, strong listings and multipart uploads."""
    from cloudckpt.testing.servers import MotoServer

    with _started(MotoServer) as server:
        yield server


@pytest.fixture
def s3_root(s3_server: MotoServer, monkeypatch: pytest.MonkeyPatch) -> str:
    """An ``s3://`` URL in a fresh bucket; the AWS variables of the environment point at the server."""
    return _new_s3_root(s3_server, s3_server.environment(), monkeypatch)


@pytest.fixture
def s3_faults(s3_server: MotoServer) -> Iterator[FaultProxy]:
    """The proxy that ``faulty_s3_root`` goes through: ``s3_faults.inject("drop_after", method="PUT")``."""
    from cloudckpt.testing.fault_proxy import FaultProxy

    with FaultProxy(s3_server.url) as proxy:
        yield proxy


@pytest.fixture
def faulty_s3_root(s3_server: MotoServer, s3_faults: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> str:
    """As ``s3_root``, but every request passes ``s3_faults``."""
    environment = {**s3_server.environment(), "AWS_ENDPOINT_URL": s3_faults.url}
    return _new_s3_root(s3_server, environment, monkeypatch)


def _new_s3_root(server: MotoServer, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> str:
    bucket = _fresh()
    server.create_bucket(bucket)
    _isolate(monkeypatch)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return f"s3://{bucket}/run"


#: What this machine's own settings would otherwise do to a test: another endpoint, another identity, a proxy.
_FOREIGN = (
    *("AWS_PROFILE", "AWS_DEFAULT_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3", "S3_ENDPOINT_URL"),
    *("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS", "AWS_ROLE_ARN", "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CA_BUNDLE"),
    *(
        "GOOGLE_APPLICATION_CREDENTIALS",
        "HTTP_PROXY",
        "HTTPS_PROXY",
        "ALL_PROXY",
        "http_proxy",
        "https_proxy",
        "all_proxy",
    ),
)


def _isolate(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in _FOREIGN:
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, os.devnull)


def _started(make: Callable[[], _T]) -> _T:
    """A server; a skip that says what to install where it is missing, and a failure in CI."""
    from cloudckpt.testing.servers import ServerMissing

    try:
        return make()
    except (ServerMissing, ImportError) as exc:
        if os.environ.get("CI"):
            raise
        pytest.skip(f'{exc}: pip install "cloudckpt[testing]"')


@pytest.fixture(scope="session")
def gcs_server() -> Iterator[FakeGCS]:
    """A strict fake of Google Cloud Storage: generations, preconditions on every verb, resumable uploads."""

    def make() -> FakeGCS:
        from cloudckpt.testing.fake_gcs import FakeGCS

        return FakeGCS()

    with _started(make) as server:
        yield server


@pytest.fixture
def gcs_root(gcs_server: FakeGCS, monkeypatch: pytest.MonkeyPatch) -> str:
    """A ``gs://`` URL in a fresh bucket; ``STORAGE_EMULATOR_HOST`` points at the server."""
    return _new_gcs_root(gcs_server, gcs_server.url, monkeypatch)


@pytest.fixture
def gcs_faults(gcs_server: FakeGCS) -> Iterator[FaultProxy]:
    """The proxy that ``faulty_gcs_root`` goes through."""
    from cloudckpt.testing.fault_proxy import FaultProxy

    with FaultProxy(gcs_server.url) as proxy:
        yield proxy


@pytest.fixture
def faulty_gcs_root(gcs_server: FakeGCS, gcs_faults: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> str:
    """As ``gcs_root``, but every request passes ``gcs_faults``."""
    return _new_gcs_root(gcs_server, gcs_faults.url, monkeypatch)


def _new_gcs_root(server: FakeGCS, endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    bucket = _fresh()
    server.create_bucket(bucket)
    _isolate(monkeypatch)
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", endpoint)
    # For gcsfs used beside cloudckpt: it would ask an emulator over gRPC and wait for minutes.
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    return f"gs://{bucket}/run"
