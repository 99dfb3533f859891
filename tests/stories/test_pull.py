"""A checkpoint in a local folder: verified, resumable, readable by others, and a run of one checkpoint to us.

(Past 350 lines: one operation, with all that may lie in its way.)
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import cloudckpt
from cloudckpt import (
    CheckpointManager,
    CheckpointNotFoundError,
    ConfigError,
    CorruptCheckpointError,
    FormatError,
    StorageError,
    editing,
)
from cloudckpt.core import keys
from cloudckpt.core.index_json import encode_index, index_digest
from cloudckpt.core.model import Manifest
from cloudckpt.progress import Meter
from cloudckpt.pulling import pull_checkpoint
from cloudckpt.storage import ManifestStore, MemoryStorage, Storage
from cloudckpt.testing import ScriptedStorage
from cloudckpt.tools import open_store
from cloudckpt.view import read_index


def big_state() -> dict[str, Any]:
    """More than one cell of bytes, a tied tensor, an odd dtype, and plain values."""
    weight = torch.arange(6_000_000, dtype=torch.float32)
    model = {"weight": weight, "tied": weight, "bias": torch.ones(3, dtype=torch.bfloat16), "none": torch.zeros(0, 4)}
    odd = {"z": torch.ones(2, dtype=torch.complex64)}
    return {"model": model, "optimizer": {"lr": 0.1, "m": torch.full((5,), 2.0)}, "odd": odd}


@pytest.fixture
def run() -> Iterator[Storage]:
    """A run with one checkpoint, step 1500."""
    storage = MemoryStorage()
    with CheckpointManager(storage) as ckpts:
        ckpts.save(1500, big_state(), metrics={"loss": 0.5}, block=True)
        ckpts.tag(1500, "late")
    yield storage
    storage.close()


class Counted:
    """A storage that counts what is read, and can break a read off."""

    def __init__(self, inner: Storage, *, fail_after: int | None = None) -> None:
        self._inner = inner
        self._fail_after = fail_after
        self._mutex = threading.Lock()
        self.read_bytes = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def read_into(self, key: str, start: int, *targets: memoryview) -> None:
        """Read, until it is enough."""
        length = sum(map(len, targets))
        with self._mutex:
            if self._fail_after is not None and self.read_bytes + length > self._fail_after:
                raise StorageError("the line was cut")
            self.read_bytes += length
        self._inner.read_into(key, start, *targets)


def test_all_of_it_lies_in_a_folder_named_by_the_step(run: Storage, tmp_path: Path) -> None:
    """checkpoint-1500 holds the payload and the index as they are on the store, and nothing half-done beside it."""
    pulled = pull_checkpoint(ManifestStore(run), "latest", tmp_path)
    assert pulled.folder == tmp_path / "checkpoint-1500"
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1500"]
    name = pulled.checkpoint.name
    for item in run.list(f"{name}/"):
        body = run.read(item.key, limit_bytes=2**26).body
        assert (pulled.folder / item.key.rpartition("/")[2]).read_bytes() == body
    assert pulled.read_bytes == sum(i.size_bytes for i in run.list(f"{name}/") if i.key.endswith(".safetensors"))
    own = safetensors.torch.load_file(pulled.folder / "model-00000-of-00001.safetensors")
    assert torch.equal(own["weight"], big_state()["model"]["weight"])


def test_the_index_is_kept_as_it_was_proven(run: Storage, tmp_path: Path) -> None:
    """It is read once: the bytes in the folder are those that were compared with the manifest."""
    asked: list[str] = []

    class Noted(Counted):
        def read(self, key: str, *, limit_bytes: int) -> Any:
            asked.append(key.rpartition("/")[2])
            return self._inner.read(key, limit_bytes=limit_bytes)

    noted: Any = Noted(run)
    pull_checkpoint(ManifestStore(noted), 1500, tmp_path)
    assert asked.count("checkpoint.json") == 1


def test_what_was_pulled_reads_as_a_run(run: Storage, tmp_path: Path) -> None:
    """``cloudckpt.open`` of the folder loads, verifies and shows it, with tags that came after the save."""
    folder = pull_checkpoint(ManifestStore(run), 1500, tmp_path).folder
    local = cloudckpt.open(folder)
    latest = local.latest()
    assert latest is not None
    assert (latest.step, latest.tags, latest.metrics) == (1500, ("late",), {"loss": 0.5})
    assert torch.equal(local.load()["model"]["weight"], big_state()["model"]["weight"])
    assert cloudckpt.verify(folder, deep=True).ok
    with pytest.raises(StorageError, match="nothing is written into it"):
        editing.pin(open_store(folder), 1500)
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(StorageError, match="cloudckpt import"), CheckpointManager(folder) as ckpts:
        ckpts.save(1501, {"w": torch.zeros(1)}, block=True)
    assert sorted(path.name for path in folder.iterdir()) == before


def test_a_component_is_one_file_that_load_file_reads(run: Storage, tmp_path: Path) -> None:
    """``components=["model"]`` gives model.safetensors with whole tensors, tied ones under each of their names."""
    pulled = pull_checkpoint(ManifestStore(run), 1500, tmp_path, components=["model"])
    loaded = safetensors.torch.load_file(pulled.folder / "model.safetensors")
    wanted = big_state()["model"]
    assert loaded.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
    assert pulled.opaque == ()
    odd = pull_checkpoint(ManifestStore(run), 1500, tmp_path / "odd", components=["odd"])
    assert odd.opaque == ("z",)
    assert safetensors.torch.load_file(odd.folder / "odd.safetensors")["z"].view(torch.complex64).tolist() == [1, 1]


def test_a_pull_that_was_broken_off_goes_on(run: Storage, tmp_path: Path) -> None:
    """Only what is missing is read again; until then there is no folder of that name."""
    cut: Any = Counted(run, fail_after=20 * 2**20)
    with pytest.raises(StorageError, match="the line was cut"):
        pull_checkpoint(ManifestStore(cut), 1500, tmp_path)
    assert not (tmp_path / "checkpoint-1500").exists()
    rest: Any = Counted(run)
    pulled = pull_checkpoint(ManifestStore(rest), 1500, tmp_path)
    assert rest.read_bytes == pulled.read_bytes == pulled_payload(run) - cut.read_bytes
    assert cloudckpt.verify(pulled.folder, deep=True).ok


def test_what_is_left_of_a_pull_does_not_come_along_with_other_components(run: Storage, tmp_path: Path) -> None:
    """Each choice of components is brought in a place of its own."""
    cut: Any = Counted(run, fail_after=0)
    with pytest.raises(StorageError, match="the line was cut"):
        pull_checkpoint(ManifestStore(cut), 1500, tmp_path, components=["model", "optimizer"])
    folder = pull_checkpoint(ManifestStore(run), 1500, tmp_path, components=["optimizer"]).folder
    assert sorted(path.name for path in folder.iterdir()) == ["optimizer.safetensors", "pulled.json"]


def pulled_payload(run: Storage) -> int:
    """All payload bytes."""
    return sum(item.size_bytes for item in run.list("") if item.key.endswith(".safetensors"))


def test_a_second_pull_reads_nothing_and_mends_what_is_damaged(run: Storage, tmp_path: Path) -> None:
    """What is there is proven where it lies; a flipped byte costs its cell and nothing else."""
    store = ManifestStore(run)
    pull_checkpoint(store, 1500, tmp_path)
    assert pull_checkpoint(store, 1500, tmp_path).read_bytes == 0
    path = tmp_path / "checkpoint-1500" / "model-00000-of-00001.safetensors"
    body = bytearray(path.read_bytes())
    body[-5] ^= 1
    path.write_bytes(body)
    mended = pull_checkpoint(store, 1500, tmp_path)
    assert 0 < mended.read_bytes < len(body)
    assert cloudckpt.verify(mended.folder, deep=True).ok


def test_something_else_in_its_place_is_never_touched(run: Storage, tmp_path: Path) -> None:
    """A folder that was not pulled, another checkpoint, or other components of it: refused, and left as it is."""
    store = ManifestStore(run)
    (tmp_path / "a" / "checkpoint-1500").mkdir(parents=True)
    (tmp_path / "a" / "checkpoint-1500" / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="something that was not pulled"):
        pull_checkpoint(store, 1500, tmp_path / "a")
    assert (tmp_path / "a" / "checkpoint-1500" / "mine.txt").read_text() == "mine"
    pull_checkpoint(store, 1500, tmp_path / "b", components=["model"])
    with pytest.raises(ConfigError, match="other components of the same checkpoint"):
        pull_checkpoint(store, 1500, tmp_path / "b")
    pull_checkpoint(store, 1500, tmp_path / "c")
    with CheckpointManager(run, keep_last=None) as ckpts:
        ckpts.save(1500, {"model": {"w": torch.zeros(1)}}, block=True)
    with pytest.raises(ConfigError, match=r"holds checkpoint-1500\."):
        pull_checkpoint(store, 1500, tmp_path / "c")


def test_damage_on_the_store_is_named_and_nothing_is_left_in_its_name(run: Storage, tmp_path: Path) -> None:
    """A changed byte on the store: the error names object and range, and no folder appears."""
    key = next(item.key for item in run.list("") if item.key.endswith("model-00000-of-00001.safetensors"))
    body = bytearray(run.read(key, limit_bytes=2**26).body)
    body[-1] ^= 1
    run.put(key, [bytes(body)], size_bytes=len(body))
    for components in (None, ["model"]):
        with pytest.raises(CorruptCheckpointError, match=rf"{key} bytes \d+\.\.{len(body)}: checksum"):
            pull_checkpoint(ManifestStore(run), 1500, tmp_path, components=components)
    assert not (tmp_path / "checkpoint-1500").exists()


class Flaky(Counted):
    """A storage on whose way the last byte of a range is changed, at the first ``wrong`` reads of it, each time otherwise."""

    def __init__(self, inner: Storage, *, wrong: int) -> None:
        super().__init__(inner)
        self._wrong = wrong
        self._seen: dict[tuple[str, int], int] = {}

    def read_into(self, key: str, start: int, *targets: memoryview) -> None:
        """Read, and change a byte."""
        super().read_into(key, start, *targets)
        with self._mutex:
            number = self._seen[key, start] = self._seen.get((key, start), 0) + 1
        if number <= self._wrong:
            targets[-1][-1] ^= number


def test_bytes_that_change_on_the_way_are_no_damage(run: Storage, tmp_path: Path) -> None:
    """Wrong once, or twice and otherwise: read again, and all is well. Otherwise each time: an error of the way, no damage."""
    for wrong in (1, 2):
        flaky: Any = Flaky(run, wrong=wrong)
        folder = pull_checkpoint(ManifestStore(flaky), 1500, tmp_path / str(wrong)).folder
        assert cloudckpt.verify(folder, deep=True).ok
    never: Any = Flaky(run, wrong=9)
    with pytest.raises(StorageError, match="other bytes came each time"):
        pull_checkpoint(ManifestStore(never), 1500, tmp_path / "never")
    assert not (tmp_path / "never" / "checkpoint-1500").exists()


def test_retired_while_it_is_being_pulled_is_no_damage(run: Storage, tmp_path: Path) -> None:
    """Bytes that are gone because the run let them go: not found, with what to do about it."""
    mutex = threading.Lock()

    class LetsGo(Counted):
        def read_into(self, key: str, start: int, *targets: memoryview) -> None:
            with mutex:
                if cloudckpt.open(run).checkpoints():
                    editing.remove(ManifestStore(run), [1500])
                    cloudckpt.sweep(run, dry_run=False)
            super().read_into(key, start, *targets)

    letting_go: Any = LetsGo(run)
    with pytest.raises(CheckpointNotFoundError, match="retired while it was being read"):
        pull_checkpoint(ManifestStore(letting_go), 1500, tmp_path)


@pytest.mark.parametrize(
    ("components", "message"),
    [(["nope"], "has no component 'nope'"), ("model", r"write \['model'\]"), ([], "names none")],
)
def test_components_that_cannot_be_pulled(run: Storage, tmp_path: Path, components: Any, message: str) -> None:
    """A component that is not there, a string in place of a list, or none at all: refused, by a dry run as well."""
    store = ManifestStore(run)
    for dry_run in (True, False):
        with pytest.raises(ConfigError, match=message):
            pull_checkpoint(store, 1500, tmp_path, components=components, dry_run=dry_run)
    assert list(tmp_path.iterdir()) == []


def test_transformers_finds_every_tensor_by_the_index_beside_the_payload(run: Storage, tmp_path: Path) -> None:
    """model.safetensors.index.json names the payload object of each tensor, as from_pretrained looks it up."""
    folder = pull_checkpoint(ManifestStore(run), 1500, tmp_path).folder
    document = json.loads((folder / "model.safetensors.index.json").read_text())
    for name, file in document["weight_map"].items():
        with safetensors.safe_open(folder / file, framework="pt") as opened:
            assert torch.equal(opened.get_tensor(name), big_state()["model"][name])
    assert keys.is_payload_name(document["weight_map"]["weight"])


def test_progress_tells_bytes_done_of_all(run: Storage, tmp_path: Path) -> None:
    """All of it is expected, and all of it is done; no object is under way afterwards."""
    meter = Meter("pulling")
    pull_checkpoint(ManifestStore(run), 1500, tmp_path, meter=meter)
    found = meter.transfer
    assert (found.bytes_done, found.bytes_total, found.objects) == (pulled_payload(run), pulled_payload(run), ())


def folder_run(written: Path, files: dict[str, bytes]) -> Storage:
    """A run whose only checkpoint, step 7, was saved from a folder with these files."""
    for name, body in files.items():
        path = written / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(body)
    storage = MemoryStorage()
    with CheckpointManager(storage) as ckpts:
        ckpts.save_folder(7, written, block=True)
    return storage


def files_below(folder: Path) -> dict[str, bytes]:
    """Every file of a folder by its path."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


#: What a host library may write: in folders, empty, oddly named.
FILES = {
    "config.json": b"{}\n",
    "weights/0/model.bin": bytes(range(256)) * 20_000,
    "weights/empty.bin": b"",
    "$dollar und größe": b"\xff\x00",
}


def test_what_was_saved_from_a_folder_comes_back_as_its_files(tmp_path: Path) -> None:
    """Under their own names, whatever their folders; a second pull reads nothing, and mends a file that was changed."""
    storage = folder_run(tmp_path / "written", FILES)
    store = ManifestStore(storage)
    pulled = pull_checkpoint(store, "latest", tmp_path / "into")
    assert pulled.folder == tmp_path / "into" / "checkpoint-7"
    there = files_below(pulled.folder)
    assert {name: body for name, body in there.items() if name != "pulled.json"} == FILES
    assert set(pulled.files) == there.keys()
    assert pulled.read_bytes == pulled.size_bytes == sum(map(len, FILES.values()))
    assert [path.name for path in (tmp_path / "into").iterdir()] == ["checkpoint-7"]

    assert pull_checkpoint(store, 7, tmp_path / "into").read_bytes == 0
    (pulled.folder / "config.json").write_bytes(b"[]\n")
    assert pull_checkpoint(store, 7, tmp_path / "into").read_bytes == len(FILES["config.json"])
    assert (pulled.folder / "config.json").read_bytes() == FILES["config.json"]
    storage.close()


def test_files_that_were_pulled_are_what_load_folder_would_write(tmp_path: Path) -> None:
    """``load_folder`` into the same place takes the pulled files as they are: what the pull noted is no file of theirs."""
    storage = folder_run(tmp_path / "written", FILES)
    folder = pull_checkpoint(ManifestStore(storage), 7, tmp_path / "into").folder
    asked = ScriptedStorage(storage)
    assert cloudckpt.open(asked).load_folder(tmp_path / "into", 7) == folder
    assert asked.counts()["read_into"] == 0
    assert [path.name for path in (tmp_path / "into").iterdir()] == ["checkpoint-7"]
    storage.close()


def test_a_file_of_the_notes_name_is_the_users(tmp_path: Path) -> None:
    """A folder that has a ``pulled.json`` of its own gets that one back, and no note in its place."""
    files = {"pulled.json": b"mine", "weights.bin": b"\x01"}
    storage = folder_run(tmp_path / "written", files)
    pulled = pull_checkpoint(ManifestStore(storage), 7, tmp_path / "into")
    assert files_below(pulled.folder) == files
    assert sorted(pulled.files) == sorted(files)
    storage.close()


@pytest.mark.parametrize("path", ["../out", "/tmp/out", "a/../../out", "a//out", ""])
def test_no_file_of_a_folder_is_written_outside_of_it(tmp_path: Path, path: str) -> None:
    """An index, sealed by somebody hostile, that names a path leading elsewhere: refused before anything is written."""
    storage = folder_run(tmp_path / "written", {"out": b"bad"})
    store = ManifestStore(storage)
    entry = cloudckpt.open(storage).select(7)
    index = read_index(storage, entry)
    files = index.structure["folder"]["files"]
    hostile = replace(index, structure={"folder": {"folder": 1, "files": {path: files["out"]}}})
    body = encode_index(hostile)
    storage.delete([keys.index_key(entry.step, entry.id)])
    storage.put(keys.index_key(entry.step, entry.id), [body], size_bytes=len(body))

    def sealed_so(manifest: Manifest, _: None) -> Manifest:
        entries = tuple(replace(e, index_digest=index_digest(body)) for e in manifest.entries)
        return replace(manifest, entries=entries)

    store.transact(sealed_so, prepare=lambda _: None)
    with pytest.raises(FormatError, match="cannot be given back"):
        pull_checkpoint(ManifestStore(storage), 7, tmp_path / "into" / "deep")
    assert not (tmp_path / "into").exists()
    assert not (tmp_path / "out").exists()
    storage.close()
