"""Fixtures that more than one suite uses."""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
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
from cloudckpt.testing.servers import FakeGcsServer, MotoServer, RcloneS3, SeaweedFS, ServerMissing
from tests.records import Recording
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


def pytest_collection_finish() -> None:
    """Let the garbage collector pass over what was imported: it would walk a million such objects every time."""
    gc.collect()
    gc.freeze()


def _from_here(text: str) -> Path:
    """A file where it was asked for, wherever a test may go."""
    return Path(text).absolute()


def pytest_addoption(parser: pytest.Parser) -> None:
    """How often the kill suite kills a real process."""
    parser.addoption("--kills", type=int, default=24, help="at how many moments the kill suite kills a trainer")
    parser.addoption("--on", default="memory", choices=BACKENDS, help="which storage the stories run on")
    parser.addoption("--stride", type=int, default=1, help="break every n-th call only, in the slow crash suites")
    parser.addoption("--sample", action="store_true", help="of large families run a part, as make test")
    parser.addoption("--cuts", type=int, default=6, help="how often the power is cut on each file system")
    parser.addoption("--soak", type=int, default=1000, help="how many saves the long runs make")
    parser.addoption("--fuzz-seconds", type=float, default=2.0, help="for how long each parser is fuzzed")
    parser.addoption(
        "--record", type=_from_here, default=None, help="append what was run to this file, a line of JSON each"
    )
    parser.addoption(
        "--stories", default="ci", choices=("ci", "some", "long"), help="how many stories the stateful suite tells"
    )
    parser.addoption(
        "--model-depth",
        type=int,
        default=1,
        choices=(1, 2, 3),
        help="how far the protocol model is searched: 1 as in CI",
    )


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


@pytest.fixture(scope="session")
def models_read_once() -> Iterator[None]:
    """What clients and moto's server read from files is read once a process: each client would do so, and there are thousands.

    What botocore knows of services is already shared by the clients of a session; here the sessions share it as well.
    """
    with pytest.MonkeyPatch.context() as patch:
        with contextlib.suppress(ImportError):
            session = importlib.import_module("botocore.session")
            patch.setattr(session, "create_loader", functools.cache(session.create_loader))
        with contextlib.suppress(ImportError, AttributeError):  # moto's server lists its folders for every request
            backends = importlib.import_module("moto.backends")
            folders = tuple(backends.list_of_moto_modules())
            patch.setattr(backends, "list_of_moto_modules", lambda: folders)
        with contextlib.suppress(ImportError, AttributeError):  # older versions do it elsewhere
            http = importlib.import_module("aiobotocore.httpsession").AIOHTTPSession
            patch.setattr(http, "_build_ssl_contexts", _read_once(http._build_ssl_contexts))
        yield


def _read_once(build: Callable[[Any, str | None], Any]) -> Callable[[Any, str | None], Any]:
    """The file of the authorities to trust is read once too: each client would, for a plain HTTP endpoint as well."""
    shared: dict[tuple[object, int], Any] = {}

    def built(client: Any, proxy_url: str | None) -> Any:
        trusted = client._verify
        # A certificate of the client's own, or a proxy's, goes into the context: that one is nobody else's.
        if not trusted or client._cert_file or proxy_url:
            return build(client, proxy_url)
        # True for those that come with the library; a file can be written anew by a test.
        try:
            key = trusted, 0 if trusted is True else Path(trusted).stat().st_mtime_ns
        except OSError:  # which the client says in its own words
            return build(client, proxy_url)
        if key not in shared:
            shared[key] = build(client, proxy_url)
        return shared[key]

    return built


@pytest.fixture
def record(request: pytest.FixtureRequest, pytestconfig: pytest.Config) -> Recording:
    """Writes down what a test runs: the story, the fault and the backend, around a block."""
    return Recording(pytestconfig.getoption("--record"), str(request.node.nodeid))


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
def s3_server(s3_server: MotoServer, models_read_once: None) -> MotoServer:
    """The plugin's, whose clients are made a little faster."""
    return s3_server


@pytest.fixture(scope="session")
def seaweedfs(models_read_once: None) -> Iterator[SeaweedFS]:
    """A real S3 server, which checks signatures and conditions."""
    yield from _started(SeaweedFS)


@pytest.fixture(scope="session")
def rclone(models_read_once: None) -> Iterator[RcloneS3]:
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
