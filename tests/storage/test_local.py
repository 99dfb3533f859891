"""LocalStorage keeps every promise of a storage, and those that only a disk can be asked to keep.

(Past 350 lines: what a disk can be asked to keep is one list.)
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import filelock
import pytest

from cloudckpt.core import keys
from cloudckpt.errors import ObjectNotFoundError, StorageError
from cloudckpt.storage import Landed, Listed, LocalStorage, Lost, Storage, Unknown
from cloudckpt.testing import StorageContract

PAYLOAD = "checkpoint-1.0123abcd/model-00000-of-00001.safetensors"
TEMPORARY = "checkpoint-1.0123abcd/.model-00000-of-00001.safetensors.tmp"


class TestLocal(StorageContract):
    @pytest.fixture
    def storage(self, local_storage: LocalStorage) -> Storage:
        return local_storage

    @pytest.fixture
    def second_storage(self, tmp_path: Path) -> Storage:
        return LocalStorage(tmp_path / "run")


def files(root: Path) -> list[str]:
    """Every file under a folder, without the lock."""
    found = (path for path in root.rglob("*") if not path.is_dir())
    return sorted(path.relative_to(root).as_posix() for path in found if path.name != keys.LOCK)


# -- modes ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def umask(mask: int) -> Iterator[None]:
    """The user's umask for a while."""
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@pytest.mark.parametrize(
    ("mask", "file_mode", "folder_mode"), [(0o022, 0o644, 0o755), (0o002, 0o664, 0o775), (0o077, 0o600, 0o700)]
)
def test_files_get_the_modes_of_the_umask(tmp_path: Path, mask: int, file_mode: int, folder_mode: int) -> None:
    """Payload, manifest and lock get 0666 and folders 0777, less the user's umask: colleagues see what they may."""
    root = tmp_path / "runs" / "demo"
    with umask(mask):
        storage = LocalStorage(root)
        storage.put(PAYLOAD, [b"bytes"], size_bytes=5)
        first = storage.create("manifest.json", b"1")
        assert isinstance(first, Landed)
        assert isinstance(storage.replace("manifest.json", b"2", expecting=first.version), Landed)

    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in (root.parent, root, *root.rglob("*"))}
    assert {path.name for path in modes} >= {"manifest.json", keys.LOCK, PAYLOAD.split("/")[1]}
    assert {mode for path, mode in modes.items() if path.is_dir()} == {folder_mode}
    assert {mode for path, mode in modes.items() if path.is_file()} == {file_mode}
    assert not [path for path, mode in modes.items() if mode & stat.S_IWOTH]


# -- durability ----------------------------------------------------------------------------------------------


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """What was synced and renamed under the root, in order."""
    log: list[str] = []
    fsync, replace, mkdir = os.fsync, os.replace, os.mkdir

    def name(path: str | os.PathLike[str]) -> str:
        return os.path.relpath(path, tmp_path)

    def traced_fsync(descriptor: int) -> None:
        log.append(f"fsync {name(Path(f'/proc/self/fd/{descriptor}').readlink())}")
        fsync(descriptor)

    def traced_replace(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
        log.append(f"replace {name(source)} {name(target)}")
        replace(source, target)

    def traced_mkdir(path: str | os.PathLike[str], mode: int = 0o777) -> None:
        mkdir(path, mode)
        log.append(f"mkdir {name(path)}")

    monkeypatch.setattr(os, "fsync", traced_fsync)
    monkeypatch.setattr(os, "replace", traced_replace)
    monkeypatch.setattr(os, "mkdir", traced_mkdir)
    return log


needs_proc = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="reads the names of descriptors from /proc")


@needs_proc
def test_a_put_is_synced_renamed_and_synced(local_storage: LocalStorage, traced: list[str]) -> None:
    """Bytes reach the disk before the rename, the rename before the return, and each new folder its parent."""
    local_storage.put(PAYLOAD, [b"bytes"], size_bytes=5)

    folder = "run/checkpoint-1.0123abcd"
    assert traced == [
        "mkdir run",
        "fsync .",
        f"mkdir {folder}",
        "fsync run",
        f"fsync run/{TEMPORARY}",
        f"replace run/{TEMPORARY} run/{PAYLOAD}",
        f"fsync {folder}",
    ]


@needs_proc
def test_a_conditional_write_is_synced_renamed_and_synced(local_storage: LocalStorage, traced: list[str]) -> None:
    """A manifest write is durable before it is reported as landed."""
    created = local_storage.create("manifest.json", b"1")
    assert isinstance(created, Landed)
    write = [f"fsync run/{keys.SWAP}", f"replace run/{keys.SWAP} run/manifest.json", "fsync run"]
    assert traced == ["mkdir run", "fsync .", *write]

    traced.clear()
    local_storage.replace("manifest.json", b"2", expecting=created.version)
    assert traced == write


def test_what_a_killed_put_leaves_is_no_object(local_storage: LocalStorage, tmp_path: Path) -> None:
    """Bytes that never got their name are not read; a listing shows them as temporary, so that gc finds them."""
    local_storage.put(PAYLOAD, [b"bytes"], size_bytes=5)
    (tmp_path / "run" / PAYLOAD).rename(tmp_path / "run" / TEMPORARY)

    with pytest.raises(ObjectNotFoundError):
        local_storage.read(PAYLOAD, limit_bytes=10)
    assert [*local_storage.list()] == [Listed(TEMPORARY, 5)]
    assert keys.parse(TEMPORARY).kind is keys.Kind.TEMPORARY

    local_storage.put(PAYLOAD, [b"again"], size_bytes=5)
    assert files(tmp_path / "run") == [PAYLOAD]


def test_what_a_killed_write_leaves_is_written_over(local_storage: LocalStorage, tmp_path: Path) -> None:
    """A process killed under the lock leaves at most one file, and the next write takes its place."""
    local_storage.create("manifest.json", b"1")
    (tmp_path / "run" / keys.SWAP).write_bytes(b"half of a manif" * 100)

    found = local_storage.read("manifest.json", limit_bytes=10)
    assert isinstance(local_storage.replace("manifest.json", b"2", expecting=found.version), Landed)
    assert files(tmp_path / "run") == ["manifest.json"]
    assert local_storage.read("manifest.json", limit_bytes=10).body == b"2"


# -- the lock ------------------------------------------------------------------------------------------------


def test_the_lock_is_no_object(local_storage: LocalStorage, tmp_path: Path) -> None:
    """The lock file stays, so that nobody locks a file that somebody else has removed, and is never listed."""
    local_storage.create("manifest.json", b"1")

    assert (tmp_path / "run" / keys.LOCK).exists()
    assert [item.key for item in local_storage.list()] == ["manifest.json"]


def test_a_lock_that_is_held_too_long_is_no_answer(
    local_storage: LocalStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writer that waits in vain for another process's lock reports no outcome, and has written nothing."""
    local_storage.create("manifest.json", b"1")
    monkeypatch.setattr(local_storage._lock, "timeout", 0.0)
    found = local_storage.read("manifest.json", limit_bytes=10)

    with filelock.FileLock(tmp_path / "run" / keys.LOCK):
        outcome = local_storage.replace("manifest.json", b"2", expecting=found.version)

    assert isinstance(outcome, Unknown)
    assert isinstance(outcome.cause, StorageError)
    assert outcome.cause.retryable
    assert "another process held the lock" in str(outcome.cause)
    assert local_storage.read("manifest.json", limit_bytes=10) == found


def test_a_replace_makes_no_root(local_storage: LocalStorage, tmp_path: Path) -> None:
    """A run that somebody removed is not made again by the next write of a process that knew it."""
    assert isinstance(local_storage.replace("manifest.json", b"2", expecting="0" * 64), Lost)
    assert not (tmp_path / "run").exists()


# -- what the disk refuses -----------------------------------------------------------------------------------


def failing(error: int) -> Callable[..., None]:
    """A system call that fails in one way."""

    def fail(*_: object) -> None:
        raise OSError(error, os.strerror(error))

    return fail


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_says_what_to_do(
    local_storage: LocalStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A put onto a full disk says to free space, makes nothing visible, and keeps none of the space."""
    real = os.open

    def onto_full(path: str | os.PathLike[str], flags: int, mode: int = 0o777) -> int:
        descriptor = real(path, flags, mode)
        if os.fspath(path).endswith(".tmp"):
            full = real("/dev/full", os.O_WRONLY)
            os.dup2(full, descriptor)
            os.close(full)
        return descriptor

    monkeypatch.setattr(os, "open", onto_full)
    with pytest.raises(StorageError, match=r"no space left on the device: free some, then save again") as refused:
        local_storage.put(PAYLOAD, [b"x" * 100], size_bytes=100)
    assert not refused.value.retryable
    assert PAYLOAD in str(refused.value)
    outcome = local_storage.create("manifest.json", b"1")
    assert isinstance(outcome, Unknown)
    assert "free some" in str(outcome.cause)

    monkeypatch.undo()
    assert files(tmp_path / "run") == []
    assert [*local_storage.list()] == []


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (errno.ENOSPC, "free some"),
        (errno.EDQUOT, "quota"),
        (errno.EROFS, "read-only"),
        (errno.EXDEV, "link"),
        (errno.EIO, "input/output error"),
        (errno.ESTALE, "stale handle"),
    ],
)
def test_what_the_system_says_becomes_advice(
    local_storage: LocalStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int, says: str
) -> None:
    """Each refusal names the file, says in words what is wrong, and knows whether waiting helps."""
    monkeypatch.setattr(os, "replace", failing(error))
    retryable = error in {errno.EIO, errno.ESTALE}

    with pytest.raises(StorageError, match=says) as refused:
        local_storage.put(PAYLOAD, [b"bytes"], size_bytes=5)
    assert refused.value.retryable is retryable
    assert PAYLOAD in str(refused.value)
    outcome = local_storage.create("manifest.json", b"1")
    assert isinstance(outcome, Unknown)
    assert isinstance(outcome.cause, StorageError)
    assert outcome.cause.retryable is retryable
    assert files(tmp_path / "run") == []


def test_a_write_that_may_have_landed_is_unknown(local_storage: LocalStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the folder's sync fails after the rename, nobody knows what a power cut would leave: no outcome."""
    created = local_storage.create("manifest.json", b"1")
    assert isinstance(created, Landed)
    real = os.fsync

    def fail_for_folders(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fail_for_folders)

    assert isinstance(local_storage.replace("manifest.json", b"2", expecting=created.version), Unknown)
    assert local_storage.read("manifest.json", limit_bytes=10).body == b"2"


def test_what_the_callers_iterator_raises_is_its_own(local_storage: LocalStorage) -> None:
    """An ``OSError`` of the caller's buffers comes out as it was: it says nothing about the run's disk."""

    def buffers() -> Iterator[bytes]:
        yield b"bytes"
        raise FileNotFoundError(errno.ENOENT, "gone", "data.bin")

    with pytest.raises(FileNotFoundError, match=r"data\.bin") as raised:
        local_storage.put(PAYLOAD, buffers(), size_bytes=10)
    assert not isinstance(raised.value, StorageError)


def test_a_folder_that_vanishes_is_made_again(
    local_storage: LocalStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder that a delete empties and removes, just after a put has made it, is made once more."""
    real = os.open
    removed: list[str | os.PathLike[str]] = []

    def open_after_rmdir(path: str | os.PathLike[str], flags: int, mode: int = 0o777) -> int:
        if os.fspath(path).endswith(".tmp") and not removed:
            removed.append(path)
            Path(path).parent.rmdir()
        return real(path, flags, mode)

    monkeypatch.setattr(os, "open", open_after_rmdir)
    local_storage.put(PAYLOAD, [b"bytes"], size_bytes=5)

    assert removed
    assert files(tmp_path / "run") == [PAYLOAD]


def test_a_folder_that_always_vanishes_is_an_error(
    local_storage: LocalStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A put gives up in the end, and does not say that the object, which it was to make, does not exist."""
    real = os.open

    def never(path: str | os.PathLike[str], flags: int, mode: int = 0o777) -> int:
        if os.fspath(path).endswith(".tmp"):
            raise FileNotFoundError(errno.ENOENT, "gone", str(path))
        return real(path, flags, mode)

    monkeypatch.setattr(os, "open", never)
    with pytest.raises(StorageError) as refused:
        local_storage.put(PAYLOAD, [b"bytes"], size_bytes=5)
    assert not isinstance(refused.value, ObjectNotFoundError)


# -- roots and keys ------------------------------------------------------------------------------------------


def test_a_root_may_begin_with_a_tilde_or_be_relative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The URL is the absolute path that the user meant when the storage was made."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)

    assert LocalStorage("~/runs/demo").url == str(tmp_path / "runs" / "demo")
    assert LocalStorage("runs/../demo/").url == str(tmp_path / "demo")


def test_a_file_is_no_root(tmp_path: Path) -> None:
    """A root that is a file, or lies below one, is refused at once, and never listed as if it were empty."""
    (tmp_path / "file").write_text("mine")

    for root in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(StorageError, match="is a file; the root of a run must be a folder"):
            LocalStorage(root).check_writable()
    with pytest.raises(StorageError, match="a file, not a folder"):
        [*LocalStorage(tmp_path / "file").list()]


def test_a_root_that_somebody_makes_just_now_is_listed_as_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of several processes that begin at once, one makes the folder while another finds that there is none."""
    root = tmp_path / "run"

    def too_early(folder: Path) -> NoReturn:
        root.mkdir()
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(folder))

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", too_early)
        assert list(LocalStorage(root).list()) == []
    root.rmdir()
    root.symlink_to("nowhere")
    with pytest.raises(StorageError, match="No such file"):
        list(LocalStorage(root).list())


def test_check_writable_writes_nothing(tmp_path: Path) -> None:
    """A root that can be made is accepted without being made."""
    LocalStorage(tmp_path / "a" / "b").check_writable()

    assert [*tmp_path.iterdir()] == []


NOBODY = """
import os, sys
from cloudckpt.errors import StorageError
from cloudckpt.storage import LocalStorage
os.setgroups([]); os.setgid(65534); os.setuid(65534)  # after the imports: an interpreter may lie in root's home
storage = LocalStorage(sys.argv[1])
try:
    storage.check_writable()
except StorageError as exc:
    print("check:", exc)
print("create:", storage.create("manifest.json", b"1").cause)
try:
    storage.put("folder/object", [b"1"], size_bytes=1)
except StorageError as exc:
    print("put:", exc)
"""


@pytest.mark.processes
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="becomes another user, which needs root")
@pytest.mark.parametrize("mode", [0o555, 0o700, 0o000], ids=oct)
@pytest.mark.parametrize("below", ["", "new/run"], ids=["root", "below"])
def test_a_folder_of_somebody_else_is_refused(tmp_path: Path, mode: int, below: str) -> None:
    """A user who may not write gets "permission denied" with the path, from the check and from every write."""
    for folder in (tmp_path, *tmp_path.parents):
        if "pytest" in str(folder):
            folder.chmod(0o755)  # pytest closes its own folders to others
    root = tmp_path / "theirs"
    root.mkdir()
    root.chmod(mode)

    done = subprocess.run(
        [sys.executable, "-c", NOBODY, str(root / below)], capture_output=True, text=True, check=False, timeout=120
    )

    assert done.returncode == 0, done.stderr
    told = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert told.keys() == {"check", "create", "put"}
    assert all("permission denied" in sentence and str(root) in sentence for sentence in told.values()), told


@pytest.mark.parametrize("key", ["../outside", "a/../../outside", "/etc/outside", "a//b", "a/./b", "", "nul\0"])
def test_no_key_leads_out_of_the_root(local_storage: LocalStorage, tmp_path: Path, key: str) -> None:
    """A key that is no plain path below the root is refused by every verb, and deletes nothing."""
    (tmp_path / "outside").write_text("mine")
    local_storage.create("manifest.json", b"1")

    asks: list[Callable[[], object]] = [
        lambda: local_storage.read(key, limit_bytes=10),
        lambda: local_storage.size(key),
        lambda: local_storage.create(key, b"1"),
        lambda: local_storage.put(key, [b"1"], size_bytes=1),
    ]
    for ask in asks:
        with pytest.raises(StorageError, match="is not a key under"):
            ask()
    assert key in local_storage.delete([key])
    assert (tmp_path / "outside").read_text() == "mine"


def test_a_listing_follows_no_link(local_storage: LocalStorage, tmp_path: Path) -> None:
    """A link to a folder elsewhere is one foreign key; what lies behind it is not the run's."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "theirs").write_text("mine")
    local_storage.create("manifest.json", b"1")
    (tmp_path / "run" / "link").symlink_to(elsewhere, target_is_directory=True)
    (tmp_path / "run" / "dangling").symlink_to(tmp_path / "nowhere")

    assert [item.key for item in local_storage.list()] == ["dangling", "link", "manifest.json"]
    assert local_storage.delete(["link"]) == {}
    assert (elsewhere / "theirs").exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes with names here")
@pytest.mark.timeout(60)
def test_a_pipe_or_a_device_is_no_object(local_storage: LocalStorage, tmp_path: Path) -> None:
    """A pipe that nobody writes into, or a link to an endless device, is an error at once and no endless read."""
    folder = tmp_path / "run" / "checkpoint-1.0123abcd"
    folder.mkdir(parents=True)
    os.mkfifo(folder / "checkpoint.json")
    (tmp_path / "run" / "manifest.json").symlink_to("/dev/zero")

    for key in ("checkpoint-1.0123abcd/checkpoint.json", "manifest.json"):
        with pytest.raises(StorageError, match="is a pipe or a device") as refused:
            local_storage.read(key, limit_bytes=1000)
        assert not refused.value.retryable
        with pytest.raises(StorageError, match="is a pipe or a device"):
            local_storage.read_into(key, 0, memoryview(bytearray(1)))


def test_deleting_the_last_object_removes_the_folder(local_storage: LocalStorage, tmp_path: Path) -> None:
    """A checkpoint's folder goes with its last object; a file that is not ours keeps it, and the root stays."""
    for folder in ("checkpoint-1.0123abcd", "checkpoint-2.0123abce"):
        local_storage.put(f"{folder}/checkpoint.json", [b"1"], size_bytes=1)
    (tmp_path / "run" / "checkpoint-2.0123abce" / "notes.txt").write_text("mine")

    local_storage.delete(["checkpoint-1.0123abcd/checkpoint.json", "checkpoint-2.0123abce/checkpoint.json"])

    assert files(tmp_path / "run") == ["checkpoint-2.0123abce/notes.txt"]
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoint-2.0123abce"]


def test_a_delete_that_the_disk_refuses_is_reported(
    local_storage: LocalStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A key that could not be deleted comes back with its reason, and the others are gone."""
    for name in ("a", "b"):
        local_storage.put(f"folder/{name}", [b"1"], size_bytes=1)
    real = os.unlink

    def refuse_a(path: str | os.PathLike[str], **_: object) -> None:
        if os.fspath(path).endswith("/a"):
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        real(path)

    monkeypatch.setattr(os, "unlink", refuse_a)

    failed = local_storage.delete(["folder/a", "folder/b"])
    assert {key: exc.retryable for key, exc in failed.items()} == {"folder/a": True}
    assert [item.key for item in local_storage.list()] == ["folder/a"]
