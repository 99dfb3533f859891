"""A pulled folder as a storage: the keys that it would have in a run, and no way to write."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import cloudckpt
from cloudckpt import CheckpointManager, FormatError, ObjectNotFoundError, StorageError
from cloudckpt.core import keys
from cloudckpt.core.manifest_json import decode_manifest
from cloudckpt.core.model import Manifest
from cloudckpt.storage import MemoryStorage, PulledFolder, Storage, Unknown, open_storage
from cloudckpt.storage.pulled import PULLED_NAME


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of step 7, pulled."""
    run = MemoryStorage()
    with CheckpointManager(run, monitor="loss", mode="min") as ckpts:
        ckpts.save(7, {"w": torch.arange(5)}, metrics={"loss": 0.5}, block=True)
    return cloudckpt.pull(run, 7, tmp_path).folder


def manifest_of(storage: Storage) -> Manifest:
    """The manifest that is made up."""
    return decode_manifest(storage.read(keys.MANIFEST, limit_bytes=2**20).body)


def test_the_url_of_such_a_folder_means_this_storage(folder: Path, tmp_path: Path) -> None:
    """A path, a Path and a file:// URL; a folder with a manifest, or without an index, is something else."""
    for root in (str(folder), folder, f"file://{folder}"):
        found = open_storage(root)
        assert isinstance(found, PulledFolder)
        assert found.url == str(folder)
    assert not isinstance(open_storage(tmp_path), PulledFolder)
    (folder / "manifest.json").write_text("{}")
    assert not isinstance(open_storage(folder), PulledFolder)


def test_it_has_one_committed_entry_and_its_objects(folder: Path) -> None:
    """The manifest names the checkpoint as best and newest; the listing has its objects and nothing else."""
    storage = open_storage(folder)
    (folder / "mine.txt").write_text("mine")
    manifest = manifest_of(storage)
    (entry,) = manifest.entries
    assert (entry.step, entry.metrics, entry.kept_because) == (7, {"loss": 0.5}, ("best #1", "last #1"))
    names = {item.key for item in storage.list("")}
    assert names == {f"{entry.name}/checkpoint.json", f"{entry.name}/w-00000-of-00001.safetensors"}
    assert [item.key for item in storage.list(f"{entry.name}/w")] == [f"{entry.name}/w-00000-of-00001.safetensors"]
    assert len([*storage.list("", limit=1)]) == 1
    key = f"{entry.name}/checkpoint.json"
    assert storage.size(key) == (folder / "checkpoint.json").stat().st_size
    head = bytearray(1)
    storage.read_into(key, 0, memoryview(head))
    assert head == b"{"
    with pytest.raises(ObjectNotFoundError, match="alone"):
        storage.read("checkpoint-8.00000000/checkpoint.json", limit_bytes=10)


def test_nothing_can_be_written(folder: Path) -> None:
    """Every verb that writes is refused, and says how to go on from here."""
    storage = open_storage(folder)
    for outcome in (storage.create("x", b""), storage.replace(keys.MANIFEST, b"", expecting="pulled")):
        assert isinstance(outcome, Unknown)
        assert "cloudckpt import" in str(outcome.cause)
    with pytest.raises(StorageError, match="nothing is written into it"):
        storage.put("x", [b""], size_bytes=0)
    assert [*storage.delete(["x"])] == ["x"]
    assert storage.abort_uploads("") == 0
    storage.close()


def test_a_note_of_another_checkpoint_is_not_believed(folder: Path) -> None:
    """The index is what counts: a note that does not fit it, or cannot be read, is passed over."""
    for body in (b"{", (folder / PULLED_NAME).read_bytes().replace(b'"step": 7', b'"step": 7, "id": "00000000"')):
        (folder / PULLED_NAME).write_bytes(body)
        assert manifest_of(open_storage(folder)).entries[0].step == 7
    (folder / PULLED_NAME).unlink()
    assert manifest_of(open_storage(folder)).entries[0].metrics == {"loss": 0.5}


def test_something_else_called_checkpoint_json_is_refused(tmp_path: Path) -> None:
    """A file of this name that is no index of ours: an error that names it."""
    (tmp_path / "checkpoint.json").write_text('{"epoch": 3}')
    with pytest.raises(FormatError, match=r"checkpoint\.json"):
        cloudckpt.open(tmp_path).checkpoints()
