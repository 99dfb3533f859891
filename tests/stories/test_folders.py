"""Files that a host library writes: any folder goes in, the same folder comes out, by the rules of every save.

(Past 350 lines: one kind of checkpoint, from saving to what is refused.)
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch

import cloudckpt
from cloudckpt import (
    CheckpointManager,
    CheckpointNotFoundError,
    ConfigError,
    CorruptCheckpointError,
    FormatError,
    SaveError,
    Settings,
    State,
    StateMismatchError,
    StorageError,
)
from cloudckpt.filing import FolderState, _Pull
from cloudckpt.own_folder import OwnFolder
from cloudckpt.storage import Buffer, MemoryStorage
from cloudckpt.tensors.fetch import fetch
from cloudckpt.tensors.outline import Outline
from cloudckpt.tensors.tree import unflatten
from cloudckpt.testing import check_store


def files_of(step: int) -> dict[str, bytes]:
    """What a host library might write: nested, empty, large, oddly named."""
    return {
        "config.json": f'{{"step": {step}}}\n'.encode(),
        "model.safetensors": bytes([step % 256]) * (3 * 1024 * 1024 + 17),
        "optimizer/0/exp_avg.pt": os.urandom(70_000),
        "optimizer/0/empty.bin": b"",
        "größe mit raum.txt": b"\xff\x00",
        "$dollar": b"$",
        "a.b": b"1",
        "a/b": b"2",
    }


def write(folder: Path, files: dict[str, bytes]) -> Path:
    """Write the files."""
    for name, body in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(body)
    return folder


def read(folder: Path | None) -> dict[str, bytes]:
    """The files of a folder."""
    assert folder is not None
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run_of(tmp_path: Path, *steps: int) -> tuple[MemoryStorage, dict[int, dict[str, bytes]]]:
    """A closed run of folders with these steps, and what is in them."""
    storage = MemoryStorage()
    saved: dict[int, dict[str, bytes]] = {}
    with CheckpointManager(storage, keep_last=None) as ckpts:
        for step in steps:
            saved[step] = files_of(step)
            folder = write(tmp_path / f"written-{step}", saved[step])
            ckpts.save_folder(step, folder, block=True)
            shutil.rmtree(folder)
    return storage, saved


def payload_of(storage: MemoryStorage, step: int) -> str:
    """The key of the one payload object of a step."""
    return f"{cloudckpt.open(storage).select(step).name}/folder-00000-of-00001.safetensors"


def test_a_folder_comes_back_as_it_was(tmp_path: Path) -> None:
    """Every file with every byte, under checkpoint-<step>, from a writer and from a reader; the store is consistent."""
    storage = MemoryStorage()
    files = files_of(7)
    with CheckpointManager(storage) as ckpts:
        folder = write(tmp_path / "out", files)
        pending = ckpts.save_folder(7, folder, metrics={"loss": 0.5}, tags=["first"])
        shutil.rmtree(folder)  # as a trainer's own rotation would, with the upload still on its way
        committed = pending.wait()
        assert (committed.step, committed.metrics, committed.tags) == (7, {"loss": 0.5}, ("first",))
    check_store(storage)
    assert cloudckpt.verify(storage, deep=True).ok
    with CheckpointManager(storage) as ckpts:
        back = ckpts.restore_folder(tmp_path / "back")
        assert back == tmp_path / "back" / "checkpoint-7"
        assert read(back) == files
    assert read(cloudckpt.open(storage).load_folder(tmp_path / "read", "tag:first")) == files
    assert [path.name for path in (tmp_path / "back").iterdir()] == ["checkpoint-7"]


def test_what_is_in_the_staging_folder_at_the_end_is_saved(tmp_path: Path) -> None:
    """The body writes, the save follows, retention is that of every save, and the folder is gone once it has ended."""
    storage = MemoryStorage()
    seen: list[Path] = []
    with CheckpointManager(storage, monitor="loss", mode="min", keep_best=1, keep_last=1) as ckpts:
        for step, loss in ((1, 0.1), (2, 0.9), (3, 0.5)):
            metrics: dict[str, float] = {}
            with ckpts.staging(step, metrics=metrics, within=tmp_path) as folder:
                seen.append(folder)
                assert list(folder.iterdir()) == []
                assert folder.stat().st_mode & 0o077 == 0, "nobody else reads the weights on their way"
                write(folder, {"weights.bin": bytes([step])})
                metrics["loss"] = loss  # measured while the folder is written
        ckpts.wait()
        assert [c.step for c in ckpts.checkpoints()] == [1, 3]
        assert read(ckpts.load_folder(tmp_path / "best", "best")) == {"weights.bin": b"\x01"}
    assert len(set(seen)) == 3
    assert not any(folder.exists() for folder in seen)
    check_store(storage)


def test_a_body_that_raises_saves_nothing(tmp_path: Path) -> None:
    """Nothing is announced, the folder is gone, the error is the caller's own, and the next save works."""
    storage = MemoryStorage()
    with CheckpointManager(storage) as ckpts:
        with pytest.raises(ZeroDivisionError):
            with ckpts.staging(1, within=tmp_path) as folder:
                write(folder, {"half": b"written"})
                raise ZeroDivisionError
        assert not folder.exists()
        assert ckpts.checkpoints(state=None) == ()
        with ckpts.staging(2, within=tmp_path, block=True) as folder:
            write(folder, {"whole": b"written"})
        assert [(c.step, c.state) for c in ckpts.checkpoints(state=None)] == [(2, State.COMMITTED)]


def test_a_first_run_has_nothing_to_give_back(tmp_path: Path) -> None:
    """None, and not even a folder; a reader is told that nothing was ever saved there."""
    storage = MemoryStorage()
    with CheckpointManager(storage) as ckpts:
        assert ckpts.restore_folder(tmp_path / "back") is None
    assert not (tmp_path / "back").exists()
    with pytest.raises(CheckpointNotFoundError):
        cloudckpt.open(storage).load_folder(tmp_path / "back")


def test_proven_damage_gives_the_folder_before(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One flipped bit: a warning, the folder of the step before, and no trace of the damaged one on the disk."""
    storage, saved = run_of(tmp_path, 1, 2)
    key = payload_of(storage, 2)
    body = bytearray(storage.read(key, limit_bytes=10**8).body)
    body[-1] ^= 1
    storage.put(key, [bytes(body)], size_bytes=len(body))
    with CheckpointManager(storage) as ckpts:
        back = ckpts.restore_folder(tmp_path / "back")
        assert back is not None
        assert (back.name, read(back)) == ("checkpoint-1", saved[1])
        assert [c.step for c in ckpts.checkpoints() if c.damaged] == [2]
        assert sum("is damaged" in record.getMessage() for record in caplog.records) == 1
        with pytest.raises(CorruptCheckpointError, match="checkpoint-2"):
            ckpts.restore_folder(tmp_path / "back", 2)
    assert [path.name for path in (tmp_path / "back").iterdir()] == ["checkpoint-1"]


def test_a_folder_that_is_there_already_is_not_read_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The very same files are used as they are, without a byte of payload; others are moved aside, with a warning."""
    storage, saved = run_of(tmp_path, 1)
    run = cloudckpt.open(storage)
    back = run.load_folder(tmp_path / "back")
    inode = (back / "config.json").stat().st_ino
    payload = storage.read(payload_of(storage, 1), limit_bytes=10**8).body
    storage.delete([payload_of(storage, 1)])
    assert run.load_folder(tmp_path / "back") == back
    assert (back / "config.json").stat().st_ino == inode
    storage.put(payload_of(storage, 1), [payload], size_bytes=len(payload))
    (back / "config.json").write_bytes(b'{"step": 2}\n')  # of the same size
    caplog.set_level(logging.WARNING, logger="cloudckpt")
    assert read(run.load_folder(tmp_path / "back")) == saved[1]
    (aside,) = (path for path in (tmp_path / "back").iterdir() if path != back)
    assert aside.name.startswith(".replaced-checkpoint-1-")
    assert (aside / "config.json").read_bytes() == b'{"step": 2}\n'
    assert [str(aside) in record.getMessage() for record in caplog.records] == [True]


def test_two_machines_on_one_disk_put_one_folder_in_place(tmp_path: Path) -> None:
    """Both have read the files before either is done: the second finds the first one's folder, and moves nothing aside."""
    storage, saved = run_of(tmp_path, 1)
    run = cloudckpt.open(storage)
    index = run.index(1)
    said: list[str] = []
    back = tmp_path / "back"
    back.mkdir()
    pulls = [_Pull(back, said.append, leads=True) for _ in range(2)]
    for pull in pulls:
        outline = Outline(run.select(1), index)
        values = unflatten(index.structure, outline.tensor, outline.array)
        fetch(storage, outline, pull.find_homes(outline, values), Settings())
    for pull in pulls:
        pull.finish()
    for pull in pulls:
        pull.discard()
    assert [path.name for path in back.iterdir()] == ["checkpoint-1"]
    assert read(pulls[1].target) == saved[1]
    assert said == []


def test_what_cannot_be_stored_is_refused_by_name(tmp_path: Path) -> None:
    """An empty folder, a pipe, a link to a folder, no folder at all, a URL: refused before anything is announced."""
    storage = MemoryStorage()
    empty, piped, linked = (tmp_path / name for name in ("empty", "piped", "linked"))
    (empty / "inner").mkdir(parents=True)
    os.mkfifo(write(piped, {"a": b"1"}) / "pipe")
    (write(linked, {"a": b"1"}) / "elsewhere").symlink_to(empty, target_is_directory=True)
    with CheckpointManager(storage) as ckpts:
        for folder, said in ((empty, "has no files"), (piped, "pipe is no file"), (linked, "a link to a folder")):
            with pytest.raises(ConfigError, match=said):
                ckpts.save_folder(1, folder)
        with pytest.raises(ConfigError, match="is no folder of this machine"):
            ckpts.save_folder(1, "s3://bucket/run")
        with pytest.raises(StorageError, match="cannot be read"):
            ckpts.save_folder(1, tmp_path / "missing" / "folder")
        with pytest.raises(TypeError, match="save_folder"):
            ckpts.save_folder(1, linked, path="x")
        assert ckpts.checkpoints(state=None) == ()
        ckpts.save_folder(1, write(tmp_path / "fine", {"a": b"1"}), block=True)
    assert [c.step for c in cloudckpt.open(storage).checkpoints()] == [1]


class Meddling(MemoryStorage):
    """A store during whose upload somebody writes to a file in place."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path: Path | None = path

    def put(
        self, key: str, buffers: Iterable[Buffer], *, size_bytes: int, progress: Callable[[int], None] | None = None
    ) -> None:
        super().put(key, buffers, size_bytes=size_bytes, progress=progress)
        if self._path is not None and key.endswith(".safetensors"):
            path, self._path = self._path, None
            with path.open("r+b") as file:
                file.write(b"{}")


def aged(folder: Path) -> Path:
    """As if its files had been written long ago: two writes within one tick of the clock cannot be told apart."""
    for path in folder.rglob("*"):
        os.utime(path, ns=(0, 0))
    return folder


def test_a_file_that_is_written_to_while_it_is_sent_fails_the_save(tmp_path: Path) -> None:
    """What was sent is perhaps of no one moment: the error names the file, nothing is committed, the next save works."""
    folder = aged(write(tmp_path / "out", {"config.json": b"[]", "weights.bin": bytes(5000)}))
    storage = Meddling(folder / "config.json")
    with CheckpointManager(storage) as ckpts:
        with pytest.raises(SaveError, match=r"config\.json changed while being saved"):
            ckpts.save_folder(1, folder, block=True)
        assert ckpts.checkpoints() == ()
        ckpts.save_folder(2, folder, block=True)
        assert [c.step for c in ckpts.checkpoints()] == [2]
    expected = {"config.json": b"{}", "weights.bin": bytes(5000)}
    assert read(cloudckpt.open(storage).load_folder(tmp_path / "back")) == expected
    check_store(storage)


def test_a_file_that_is_removed_or_replaced_stays_what_it_was(tmp_path: Path) -> None:
    """Rotation removes files, and careful writers rename new ones into place: neither is a change of what is mapped."""
    folder = aged(write(tmp_path / "out", {"removed": b"1", "replaced": b"2", "written": b"3"}))
    taken = FolderState(folder)
    files = taken.state_dict()["files"]
    taken.confirm()
    (folder / "removed").unlink()
    (tmp_path / "new").write_bytes(b"4")
    (tmp_path / "new").replace(folder / "replaced")
    taken.confirm()
    mapped = {name: bytes(row.numpy()) for name, row in files.items()}
    assert mapped == {"removed": b"1", "replaced": b"2", "written": b"3"}
    (folder / "written").write_bytes(b"5")
    with pytest.raises(SaveError, match="written changed while being saved"):
        taken.confirm()


def test_a_link_to_a_file_is_stored_as_the_file(tmp_path: Path) -> None:
    """Caches link to their blobs: what is behind the link is saved."""
    storage = MemoryStorage()
    blob = write(tmp_path, {"blob": b"weights"}) / "blob"
    folder = write(tmp_path / "out", {"config.json": b"{}"})
    (folder / "model.bin").symlink_to(blob)
    with CheckpointManager(storage) as ckpts:
        ckpts.save_folder(1, folder, block=True)
    back = cloudckpt.open(storage).load_folder(tmp_path / "back")
    assert read(back) == {"config.json": b"{}", "model.bin": b"weights"}
    assert not (back / "model.bin").is_symlink()


def test_states_and_folders_are_told_apart(tmp_path: Path) -> None:
    """Each refuses the other by name, and changes nothing; load() shows the files as rows of bytes."""
    storage, saved = run_of(tmp_path, 1)
    weights = torch.zeros(3)
    with CheckpointManager(storage, keep_last=None) as ckpts:
        ckpts.save(2, {"model": {"w": torch.ones(3)}}, block=True)
        with pytest.raises(FormatError, match=r"checkpoint-2\.\w+ was not saved from a folder"):
            ckpts.restore_folder(tmp_path / "back")
        with pytest.raises(StateMismatchError, match="no such component"):
            ckpts.restore({"model": {"w": weights}}, 1)
        assert read(ckpts.restore_folder(tmp_path / "back", 1)) == saved[1]
    assert weights.tolist() == [0, 0, 0]
    rows = cloudckpt.open(storage).load(1)["folder"]["files"]
    assert {name: bytes(row.numpy()) for name, row in rows.items()} == saved[1]


@pytest.mark.parametrize("name", ["../evil", "/tmp/evil", "a/../../evil"])
def test_no_file_is_written_outside(tmp_path: Path, name: str) -> None:
    """A checkpoint that somebody made up with a path that leads out is refused, and nothing is written anywhere."""
    storage = MemoryStorage()
    rows = {"fine": torch.zeros(4, dtype=torch.uint8), name: torch.ones(4, dtype=torch.uint8)}
    with CheckpointManager(storage) as ckpts:
        ckpts.save(1, {"folder": {"folder": 1, "files": rows}}, block=True)
    with pytest.raises(FormatError, match="cannot be given back"):
        cloudckpt.open(storage).load_folder(tmp_path / "back")
    assert not (tmp_path / "evil").exists()
    assert list((tmp_path / "back").iterdir()) == []


@pytest.mark.parametrize("row", [torch.ones(4), torch.ones(2, 2, dtype=torch.uint8), "text"])
def test_a_file_is_a_row_of_bytes(tmp_path: Path, row: object) -> None:
    """Anything else under a file's name, which only a made-up checkpoint has, is refused."""
    storage = MemoryStorage()
    with CheckpointManager(storage) as ckpts:
        ckpts.save(1, {"folder": {"folder": 1, "files": {"a": row}}}, block=True)
    with pytest.raises(FormatError, match="is no row of bytes"):
        cloudckpt.open(storage).load_folder(tmp_path / "back")


ABANDONING = """
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from cloudckpt.filing import FolderState, _Pull
from cloudckpt.own_folder import OwnFolder
folder = OwnFolder(Path(sys.argv[1]), "staging-", sys.argv[2])
(folder.path / "weights.bin").write_bytes(bytes(1000))
print("made", flush=True)
sys.stdin.read()
"""


def test_the_folder_of_a_killed_process_is_removed_by_the_next(tmp_path: Path) -> None:
    """What is in use stays, of this process and of others; what a killed process left is gone; others' stays."""
    (tmp_path / "staging-not-a-folder").write_bytes(b"somebody else's")
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", ABANDONING, str(tmp_path), name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in ("killed", "alive")
    ]
    try:
        for worker in workers:
            assert worker.stdout is not None
            assert worker.stdout.readline() == "made\n"
        mine = OwnFolder(tmp_path, "staging-", "mine")
        assert {path.name for path in tmp_path.iterdir()} == {
            "staging-killed", "staging-alive", "staging-mine", "staging-not-a-folder",
        }  # fmt: skip
        workers[0].send_signal(signal.SIGKILL)
        workers[0].wait()
        other = OwnFolder(tmp_path, "staging-", "other")
        assert {path.name for path in tmp_path.iterdir()} == {
            "staging-alive", "staging-mine", "staging-other", "staging-not-a-folder",
        }  # fmt: skip
        other.remove()
        mine.remove()
        mine.remove()
        assert {path.name for path in tmp_path.iterdir()} == {"staging-alive", "staging-not-a-folder"}
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()
