"""load(mmap=True): tensors over the files of a local run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import cloudckpt
from cloudckpt import CheckpointManager, ConfigError, CorruptCheckpointError
from cloudckpt.storage import MemoryStorage


def saved(root: Path, state: dict[str, Any], step: int = 1) -> Path:
    """The payload file of ``m`` in a run with this state."""
    with CheckpointManager(root) as ckpts:
        ckpts.save(step, state, block=True)
    (file,) = root.glob(f"checkpoint-{step}.*/m-*.safetensors")
    return file


def mapped(file: Path, tensor: torch.Tensor) -> bool:
    """Whether the tensor's first byte lies in a mapping of the file."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        place, _, _, _, _, *name = line.split(maxsplit=5)
        start, end = (int(number, 16) for number in place.split("-"))
        if name == [str(file)] and start <= tensor.data_ptr() < end:
            return True
    return False


STATE = {"m": {"a": torch.arange(64.0), "b": torch.arange(1000, 1003.0), "c": torch.arange(32.0), "n": 1}}


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="looks where memory comes from")
@pytest.mark.parametrize("verify", [True, False])
def test_tensors_lie_over_the_file_where_they_are_aligned_in_it(tmp_path: Path, verify: bool) -> None:
    """On a 64-byte boundary of the file: mapped. Off it: copied to one. All with the right values."""
    file = saved(tmp_path / "run", STATE)
    back = cloudckpt.open(tmp_path / "run").load(mmap=True, verify=verify)["m"]
    assert back["n"] == 1
    assert all(torch.equal(back[name], STATE["m"][name]) for name in "abc")  # type: ignore[arg-type]  # tensors
    assert {name: mapped(file, back[name]) for name in "abc"} == {"a": True, "b": True, "c": False}
    assert all(back[name].data_ptr() % 64 == 0 for name in "abc")
    with CheckpointManager(tmp_path / "run") as ckpts:
        assert mapped(file, ckpts.load(mmap=True, names=["a"])["m"]["a"])


def test_writing_to_a_mapped_tensor_changes_neither_file_nor_another_load(tmp_path: Path) -> None:
    """Pages are copied when they are written to, so training may go on from what was mapped."""
    file = saved(tmp_path / "run", STATE)
    before = file.read_bytes()
    run = cloudckpt.open(tmp_path / "run")
    one, two = run.load(mmap=True)["m"], run.load(mmap=True)["m"]
    one["a"].fill_(-1)
    one["c"].fill_(-1)
    assert torch.equal(two["a"], torch.arange(64.0))
    assert file.read_bytes() == before
    assert run.load(mmap=True)["m"]["a"][1] == 1


def test_a_mapped_tensor_outlives_its_checkpoint(tmp_path: Path) -> None:
    """A checkpoint that retention deletes stays readable through what was mapped."""
    file = saved(tmp_path / "run", STATE)
    back = cloudckpt.open(tmp_path / "run").load(mmap=True, verify=False)["m"]
    with CheckpointManager(tmp_path / "run", keep_last=1) as ckpts:
        ckpts.save(2, STATE, block=True)
        ckpts.save(3, STATE, block=True)
    assert not file.exists()
    assert torch.equal(back["a"], torch.arange(64.0))


def test_every_kind_of_value_comes_back_mapped(tmp_path: Path) -> None:
    """Ties, arrays, scalars, empty tensors and other dtypes are what they are without mmap."""
    weight = torch.randn(64).to(torch.bfloat16)
    state = {"m": {"w": weight, "tied": weight, "array": np.arange(7), "s": torch.tensor(2), "none": torch.empty(0, 2)}}
    saved(tmp_path / "run", state)
    back = cloudckpt.open(tmp_path / "run").load(mmap=True)["m"]
    assert back["w"] is back["tied"]
    assert torch.equal(back["w"], weight)
    assert back["array"].tolist() == [*range(7)]
    assert (back["s"].item(), back["none"].shape) == (2, (0, 2))


def _flip(file: Path) -> None:
    body = bytearray(file.read_bytes())
    body[-300] ^= 1  # inside of "a"
    file.write_bytes(body)


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:300])


def _empty(file: Path) -> None:
    file.write_bytes(b"")


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (_flip, "checksum .*, sealed as"),
        (_cut, "the file has 300 bytes"),
        (_empty, "empty"),
        (Path.unlink, "not exist"),
    ],
    ids=["flip", "cut", "empty", "gone"],
)
def test_damage_is_found_before_anything_is_mapped_for_good(tmp_path: Path, harm: Any, message: str) -> None:
    """A changed byte, a short, an empty and a missing file are named; the newest falls back as ever."""
    root = tmp_path / "run"
    saved(root, {"m": {"a": torch.arange(64.0)}})
    file = saved(root, STATE, 2)
    harm(file)
    run = cloudckpt.open(root)
    with pytest.raises(CorruptCheckpointError, match=message):
        run.load(2, mmap=True)
    assert list(run.load(mmap=True)["m"]) == ["a"]


def test_without_verify_only_what_is_touched_is_read(tmp_path: Path) -> None:
    """verify=False gives a tensor whose bytes nobody has compared: a flipped one comes through."""
    file = saved(tmp_path / "run", {"m": {"a": torch.arange(1.0, 101.0)}})
    body = bytearray(file.read_bytes())
    body[-1] ^= 0x80
    file.write_bytes(body)
    assert cloudckpt.open(tmp_path / "run").load(mmap=True, verify=False)["m"]["a"][-1] == -100


def test_mmap_is_for_local_roots_on_the_host(tmp_path: Path) -> None:
    """An object store, a device, and verify=False without mmap are refused, each with what to write instead."""
    storage = MemoryStorage()
    with CheckpointManager(storage) as ckpts:
        ckpts.save(1, STATE, block=True)
    with pytest.raises(ConfigError, match=r"memory:.*mmap=True needs files on a local disk; leave it out"):
        cloudckpt.open(storage).load(mmap=True)
    saved(tmp_path / "run", STATE)
    with pytest.raises(ConfigError, match="mmap=True gives tensors on the CPU: leave out device='meta'"):
        cloudckpt.open(tmp_path / "run").load(mmap=True, device="meta")
    with pytest.raises(ConfigError, match="verify=False goes with mmap=True"):
        cloudckpt.open(tmp_path / "run").load(verify=False)
