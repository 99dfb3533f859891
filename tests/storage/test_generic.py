"""GenericFsspecStorage on fsspec's own memory, on a folder, and on a real SFTP server; for one writer each.

(Past 350 lines: three filesystems are held to one contract.)
"""

from __future__ import annotations

import asyncio
import os
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Self

import asyncssh
import fsspec
import pytest
import torch
from fsspec.implementations.local import LocalFileSystem

from cloudckpt import CheckpointManager, ConfigError, StorageError, UnsafeStorageError
from cloudckpt.cli.doctor import examine
from cloudckpt.storage import Conditions, GenericFsspecStorage, Storage, open_storage
from cloudckpt.testing import StorageContract, check_store

USER, PASSWORD = "trainer", "hunter2hunter2"


class TestOnMemory(StorageContract):
    @pytest.fixture
    def url(self) -> Iterator[str]:
        url = f"memory://{uuid.uuid4().hex}/run"
        yield url
        filesystem = fsspec.filesystem("memory")
        if filesystem.exists(url):
            filesystem.rm(url, recursive=True)

    @pytest.fixture
    def storage(self, url: str) -> Storage:
        return GenericFsspecStorage(url, {})

    @pytest.fixture
    def second_storage(self, url: str, storage: Storage) -> Storage:
        return GenericFsspecStorage(url, {})


class TestOnAFolder(StorageContract):
    @pytest.fixture
    def storage(self, tmp_path: Path) -> Storage:
        return GenericFsspecStorage(f"file://{tmp_path}/run", {})

    @pytest.fixture
    def second_storage(self, tmp_path: Path, storage: Storage) -> Storage:
        return GenericFsspecStorage(f"file://{tmp_path}/run", {})


class _Password(asyncssh.SSHServer):
    """Lets one user in."""

    connections: ClassVar[set[asyncssh.SSHServerConnection]] = set()

    def connection_made(self, conn: asyncssh.SSHServerConnection) -> None:
        self.connections.add(conn)

    def begin_auth(self, username: str) -> bool:
        return True

    def password_auth_supported(self) -> bool:
        return True

    def validate_password(self, username: str, password: str) -> bool:
        return (username, password) == (USER, PASSWORD)


class SFTPServer:
    """A real SFTP server in a thread, with a key of its own."""

    def __init__(self, port: int = 0) -> None:
        self.port = port
        self._ready = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        key = asyncssh.generate_private_key("ssh-ed25519")
        server = await asyncssh.listen(
            "127.0.0.1",
            self.port,
            server_host_keys=[key],
            server_factory=_Password,
            sftp_factory=asyncssh.SFTPServer,
            reuse_address=True,
        )
        self.port = server.get_port()
        self._ready.set()
        await self._stop.wait()
        server.close()
        for connection in [*_Password.connections]:
            connection.abort()
        await server.wait_closed()

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._ready.wait(30)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._stop is not None
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)


@pytest.fixture(scope="module")
def sftp() -> Iterator[SFTPServer]:
    """One server for this module."""
    with SFTPServer() as server:
        yield server


def sftp_storage(sftp: SFTPServer, folder: Path) -> GenericFsspecStorage:
    """A storage that speaks to the server."""
    url = f"sftp://{USER}@127.0.0.1:{sftp.port}{folder}/run"
    # The server's key is its own and new, so no known_hosts file knows it: paramiko takes it as it is.
    return GenericFsspecStorage(url, {"password": PASSWORD})


@pytest.mark.processes
@pytest.mark.filterwarnings("ignore::cryptography.utils.CryptographyDeprecationWarning")
class TestOnSFTP(StorageContract):
    @pytest.fixture
    def storage(self, sftp: SFTPServer, tmp_path: Path) -> Iterator[Storage]:
        found = sftp_storage(sftp, tmp_path)
        yield found
        found.close()

    @pytest.fixture
    def second_storage(self, sftp: SFTPServer, tmp_path: Path, storage: Storage) -> Iterator[Storage]:
        found = sftp_storage(sftp, tmp_path)
        yield found
        found.close()


def state_of(step: int) -> dict[str, Any]:
    """A state whose every bit follows from its step."""
    return {"model": {"w": torch.full((50,), float(step))}}


@pytest.mark.processes
@pytest.mark.filterwarnings("ignore::cryptography.utils.CryptographyDeprecationWarning")
def test_a_connection_that_was_lost_is_made_again(tmp_path: Path) -> None:
    """The server is restarted: the call that notices may be tried again, and the next one works."""
    with SFTPServer() as first:
        storage = sftp_storage(first, tmp_path)
        storage.put("object", [b"12345"], size_bytes=5)
    with SFTPServer(first.port):
        with pytest.raises(StorageError) as lost:
            storage.size("object")
        assert lost.value.retryable
        assert storage.size("object") == 5
    storage.close()


@pytest.mark.processes
@pytest.mark.filterwarnings("ignore::cryptography.utils.CryptographyDeprecationWarning")
def test_a_run_over_sftp(sftp: SFTPServer, tmp_path: Path) -> None:
    """One writer saves, prunes and resumes over SFTP; without that promise nothing is written."""
    root = f"sftp://{USER}:{PASSWORD}@127.0.0.1:{sftp.port}{tmp_path}/run"
    with pytest.raises(UnsafeStorageError, match="single_writer=True"):
        CheckpointManager(root).save(1, state_of(1), block=True)
    assert [*tmp_path.rglob("*")] == []
    with CheckpointManager(root, single_writer=True, keep_last=2) as ckpts:
        for step in (1, 2, 3):
            ckpts.save(step, state_of(step), block=True)
        assert PASSWORD not in ckpts.url
    fresh = state_of(0)
    with CheckpointManager(root, single_writer=True) as ckpts:
        assert ckpts.restore(fresh) is not None
    assert torch.equal(fresh["model"]["w"], torch.full((50,), 3.0))
    storage = open_storage(root)
    check_store(storage, settled=True)
    storage.close()


def test_what_it_cannot_promise_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """At open, one warning says what the filesystem does not have."""
    storage = GenericFsspecStorage(f"file://{tmp_path}/run", {})
    with CheckpointManager(storage, single_writer=True):
        pass
    said = [r.message for r in caplog.records if "no conditional writes" in r.message]
    assert len(said) == 1
    assert storage.conditions is Conditions.ABSENT
    assert "only one process may ever write" in storage.describe()["not promised"]


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("https://example.com/run", "can only be read; a run needs a filesystem that can be written"),
        ("github://o:r@main/run", "can only be read"),
        ("abfs://c/run", "needs a library that is not installed: .*adlfs"),
    ],
)
def test_what_cannot_hold_a_run_is_refused(url: str, message: str) -> None:
    """A filesystem that cannot be written, or whose library is missing, is refused by the constructor."""
    with pytest.raises(ConfigError, match=message):
        open_storage(url)


class Picky(LocalFileSystem):  # type: ignore[misc]  # fsspec has no types
    """A folder whose rename refuses a target that is there, and fails when it is told to."""

    protocol = "picky"
    fail_after: ClassVar[int | None] = None

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.removeprefix("picky://")))

    def mv(self, path1: str, path2: str, **words: Any) -> None:
        if Path(path2).exists():
            raise FileExistsError(path2)
        if Picky.fail_after is not None:
            Picky.fail_after -= 1
            if Picky.fail_after < 0:
                Picky.fail_after = None
                raise OSError("quota exceeded")
        os.rename(path1, path2)  # noqa: PTH104 - the call itself


@pytest.mark.parametrize("fail_after", [None, 0, 1])
def test_a_rename_that_refuses_or_fails_never_takes_the_old_object_with_it(
    tmp_path: Path, fail_after: int | None
) -> None:
    """Where a rename does not replace, the old object steps aside; whatever fails, one of the two is there, whole."""
    fsspec.register_implementation("picky", Picky, clobber=True)
    storage = open_storage(f"picky://{tmp_path}/run")
    storage.put("manifest.json", [b"old"], size_bytes=3)
    Picky.fail_after = fail_after
    try:
        storage.put("manifest.json", [b"new"], size_bytes=3)
    except StorageError:
        assert fail_after is not None
        assert storage.read("manifest.json", limit_bytes=10).body == b"old"
    else:
        assert storage.read("manifest.json", limit_bytes=10).body == b"new"
    assert [item.key for item in storage.list()] == ["manifest.json"]


class Raced(LocalFileSystem):  # type: ignore[misc]  # fsspec has no types
    """A folder whose files fail to be sent as over SFTP: by an error without a number."""

    protocol = "raced"
    #: So many files are not begun, for their folder has come meanwhile.
    races: ClassVar[int] = 0
    #: The first file breaks off with its beginning sent.
    is_full: ClassVar[bool] = False
    sent: ClassVar[int] = 0

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.removeprefix("raced://")))

    def put_file(self, path1: str, path2: str, callback: Any = None, **words: Any) -> None:
        Raced.sent += 1
        if Raced.sent <= Raced.races:
            raise OSError("Failure")
        if Raced.is_full:
            Path(path2).write_bytes(b"h")
            raise OSError("Failure")
        super().put_file(path1, path2, callback, **words)


@pytest.fixture
def raced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Storage:
    """A storage on it, with nothing wrong yet."""
    fsspec.register_implementation("raced", Raced, clobber=True)
    for name, value in (("races", 0), ("is_full", False), ("sent", 0)):
        monkeypatch.setattr(Raced, name, value)
    return open_storage(f"raced://{tmp_path}/run")


@pytest.mark.parametrize(("races", "lands"), [(0, True), (1, True), (9, True), (10, False)])
def test_a_folder_that_comes_while_a_file_is_sent_ends_no_put(raced: Storage, races: int, lands: bool) -> None:
    """Where fsspec fails over a folder that another put has made, the put is begun again, and not for ever."""
    Raced.races = races
    if lands:
        raced.put("folder/object", [b"here"], size_bytes=4)
        assert raced.read("folder/object", limit_bytes=10).body == b"here"
    else:
        with pytest.raises(StorageError, match="Failure"):
            raced.put("folder/object", [b"here"], size_bytes=4)
        assert [*raced.list()] == []
    assert Raced.sent == min(races + 1, 10)


def test_a_file_that_breaks_off_is_not_sent_again_by_a_put(raced: Storage) -> None:
    """Once its beginning is there it is no matter of folders: whoever called decides, and nothing of it is left."""
    Raced.is_full = True
    with pytest.raises(StorageError, match="Failure") as told:
        raced.put("folder/object", [b"here"], size_bytes=4)
    assert told.value.retryable
    assert Raced.sent == 1
    assert [*raced.list()] == []


def test_a_listing_that_is_refused_is_not_an_empty_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What fsspec leaves out because it may not list it: here a refused folder is an error, never a new run."""

    def refused(*_: Any, **__: Any) -> Any:
        raise PermissionError("may not list")

    storage = GenericFsspecStorage(f"file://{tmp_path}/run", {})
    storage.put("object", [b"1"], size_bytes=1)
    monkeypatch.setattr(LocalFileSystem, "ls", refused)
    with pytest.raises(StorageError, match="may not list"):
        storage.list()


def test_keys_at_the_root_of_a_filesystem_are_whole() -> None:
    """Where the root has no path, keys keep their first letter."""
    filesystem = fsspec.filesystem("memory")
    storage = GenericFsspecStorage("memory://", {})
    storage.put("a-root-object", [b"1"], size_bytes=1)
    try:
        assert "a-root-object" in [item.key for item in storage.list("a-root")]
    finally:
        filesystem.rm("/a-root-object")


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("sftp://me:p@SECRET@host/run", "sftp://me@host/run"),
        ("sftp://me@host/run/", "sftp://me@host/run"),
    ],
)
def test_the_url_has_a_user_and_no_password(url: str, shown: str) -> None:
    """The password goes, wherever its signs are; a name before the host is part of the place."""
    assert open_storage(url).url == shown


def test_doctor_does_not_take_the_emulation_for_conditions(tmp_path: Path) -> None:
    """The doctor says that there are none, and what that means."""
    fsspec.register_implementation("picky", Picky, clobber=True)
    report = examine(f"picky://{tmp_path}/run")
    conditions = next(check for check in report.checks if check.name == "conditional writes")
    assert not conditions.ok
    assert "single_writer=True" in conditions.detail


def test_no_secret_is_shown() -> None:
    """Neither the URL nor an error has the password."""
    storage = open_storage(f"sftp://{USER}:{PASSWORD}@127.0.0.1:1/run", storage_options={"timeout": 2})
    with pytest.raises(StorageError) as refused:
        storage.size("object")
    assert PASSWORD not in f"{refused.value} {storage.url} {storage!r}"
    for root in ("s3://AKIA:abc/SECRET@bucket/run", "nosuch://me:SE/CRET@host/run", "minio://me:SE/CRET@bucket/run"):
        with pytest.raises(ConfigError) as config:
            open_storage(root)
        assert "CRET" not in str(config.value)


def test_a_forked_child_makes_its_own_instance(tmp_path: Path) -> None:
    """A child does not speak over its parent's connection."""
    storage = GenericFsspecStorage(f"file://{tmp_path}/run", {})
    storage.put("object", [b"12345"], size_bytes=5)
    before = storage._filesystem
    pid = os.fork()
    if pid == 0:
        fine = storage.size("object") == 5 and storage._filesystem is not before
        os._exit(0 if fine else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert storage._filesystem is before
