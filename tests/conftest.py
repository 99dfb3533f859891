"""Fixtures that more than one suite uses."""

from __future__ import annotations

import contextlib
import os
import signal
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

import pytest

from cloudckpt.config import Settings
from cloudckpt.storage import Conditions, GCSStorage, LocalStorage, MemoryStorage, S3Storage, Storage
from cloudckpt.testing.servers import FakeGcsServer, RcloneS3, SeaweedFS, ServerMissing
from tests.sampling import divided, turn

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
    parser.addoption("--sample", action="store_true", help="of large families run a part, as make test")


#: How many cases ``--sample`` left out.
_LEFT_OUT = pytest.StashKey[int]()


@pytest.hookimpl(trylast=True)  # of what -m and -k leave
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what ``--sample`` does not take (see ``tests.sampling``); workers begin with the long files."""
    if config.getoption("--sample"):
        items[:], left_out = divided(items)
        config.hook.pytest_deselected(items=left_out)
        config.stash[_LEFT_OUT] = len(left_out)
    worker_output: dict[str, Any] | None = getattr(config, "workeroutput", None)
    if worker_output is not None:
        items.sort(key=turn)
        worker_output["left_out"] = config.stash.get(_LEFT_OUT, 0)


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_testnodedown(node: Any) -> None:
    """Every worker has collected the same, and left out the same; one that crashed says nothing."""
    left_out = getattr(node, "workeroutput", {}).get("left_out", 0)
    stash = node.config.stash
    stash[_LEFT_OUT] = max(stash.get(_LEFT_OUT, 0), left_out)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """A run of a sample says that it is one."""
    if left_out := config.stash.get(_LEFT_OUT, 0):
        terminalreporter.section("a sample")
        terminalreporter.write_line(
            f"cases of large families (tests/sampling.py) that were left out: {left_out}; make full runs them as well"
        )


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
