"""GenericFsspecStorage on fsspec's own memory, on a folder, and on a real SFTP server; for one writer each."""

from __future__ import annotations

import asyncio
import os
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import asyncssh
import fsspec
import pytest
import torch

from cloudckpt import CheckpointManager, ConfigError, StorageError, UnsafeStorageError
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

    def begin_auth(self, username: str) -> bool:
        return True

    def password_auth_supported(self) -> bool:
        return True

    def validate_password(self, username: str, password: str) -> bool:
        return (username, password) == (USER, PASSWORD)


class SFTPServer:
    """A real SFTP server in a thread, with a key of its own."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._stop: asyncio.Event | None = None
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._serve(),), daemon=True)
        self.port = 0

    async def _serve(self) -> None:
        self._stop = asyncio.Event()
        key = asyncssh.generate_private_key("ssh-ed25519")
        server = await asyncssh.listen(
            "127.0.0.1", 0, server_host_keys=[key], server_factory=_Password, sftp_factory=asyncssh.SFTPServer
        )
        self.port = server.get_port()
        self._ready.set()
        await self._stop.wait()
        server.close()
        await server.wait_closed()

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._ready.wait(30)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._stop is not None
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)
        self._loop.close()


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


def test_no_secret_is_shown() -> None:
    """Neither the URL nor an error has the password."""
    storage = open_storage(f"sftp://{USER}:{PASSWORD}@127.0.0.1:1/run", storage_options={"timeout": 2})
    with pytest.raises(StorageError) as refused:
        storage.size("object")
    assert PASSWORD not in f"{refused.value} {storage.url} {storage!r}"


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
