"""Fixtures that more than one suite uses."""

from __future__ import annotations

import contextlib
import os
import signal
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TypeVar

import pytest

from cloudckpt.config import Settings
from cloudckpt.storage import Conditions, GCSStorage, LocalStorage, MemoryStorage, S3Storage, Storage
from cloudckpt.testing.servers import FakeGcsServer, RcloneS3, SeaweedFS, ServerMissing

_T = TypeVar("_T")

#: For tests in which something goes wrong on purpose.
IMPATIENT = Settings(
    retry_base_s=0.01, retry_cap_s=0.1, manifest_deadline_s=5, storage_deadline_s=5, request_timeout_s=5
)
#: What the stories and the crash suite can be run on: ``--on seaweedfs``.
BACKENDS = ("memory", "local", "moto", "seaweedfs", "gcs", "fake-gcs-server")


def pytest_configure() -> None:
    """Give SIGINT its meaning back where a shell took it (``&``, ``nohup``): children that get Ctrl-C would inherit it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    """How often the kill suite kills a real process."""
    parser.addoption("--kills", type=int, default=24, help="at how many moments the kill suite kills a trainer")
    parser.addoption("--on", default="memory", choices=BACKENDS, help="which storage the stories run on")
    parser.addoption("--stride", type=int, default=1, help="break every n-th call only, in the slow crash suites")


def _started(make: Callable[[], AbstractContextManager[_T]]) -> Iterator[_T]:
    """A real server, or a skip that says what is missing; in CI nothing may be missing."""
    try:
        server = make()
        running = server.__enter__()
    except ServerMissing as exc:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(exc))
    try:
        yield running
    finally:
        server.__exit__(None, None, None)


@pytest.fixture(scope="session")
def seaweedfs() -> Iterator[SeaweedFS]:
    """A real S3 server, which checks signatures and conditions."""
    yield from _started(SeaweedFS)


@pytest.fixture(scope="session")
def rclone() -> Iterator[RcloneS3]:
    """A real S3 server that ignores conditions."""
    yield from _started(RcloneS3)


@pytest.fixture(scope="session")
def fake_gcs_server() -> Iterator[FakeGcsServer]:
    """The emulator of Google Cloud Storage that most people use."""
    yield from _started(FakeGcsServer)


@pytest.fixture
def new_storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[str], Storage]]:
    """Makes an empty storage of a kind named in ``BACKENDS``; each call another place."""
    made: list[Storage] = []

    def make(kind: str) -> Storage:
        if kind == "memory":
            found: Storage = MemoryStorage()
        elif kind == "local":
            found = LocalStorage(tmp_path / uuid.uuid4().hex)
        else:
            found = _remote(kind, request)
        made.append(found)
        return found

    yield make
    for storage in made:
        storage.close()


def _remote(kind: str, request: pytest.FixtureRequest) -> Storage:
    fixture = {"moto": "s3_server", "seaweedfs": "seaweedfs", "gcs": "gcs_server", "fake-gcs-server": "fake_gcs_server"}
    server = request.getfixturevalue(fixture[kind])
    storage_class = S3Storage if kind in {"moto", "seaweedfs"} else GCSStorage
    # One bucket for all: SeaweedFS reserves volumes for each, and runs out of them after a hundred.
    with contextlib.suppress(ValueError):  # the fake says so when it is there already
        server.create_bucket("shared")
    found = storage_class("shared", f"{uuid.uuid4().hex} run", server.storage_options(), IMPATIENT)
    # Probed once in tests of its own; here every request is counted.
    found.conditions = Conditions.HONOURED
    return found


@pytest.fixture
def memory_storage() -> MemoryStorage:
    """An empty storage in memory."""
    return MemoryStorage()


@pytest.fixture
def local_storage(tmp_path: Path) -> LocalStorage:
    """A storage in a folder that does not exist yet."""
    return LocalStorage(tmp_path / "run")
