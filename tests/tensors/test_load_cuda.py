"""Onto a GPU: read into pinned memory, copied on a stream of its own. Skipped where there is none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import cloudckpt
from cloudckpt import CheckpointManager, CorruptCheckpointError, Settings
from cloudckpt.storage import MemoryStorage
from cloudckpt.tensors.targets import Part
from tests.tensors.test_boxes import CELL, SETTINGS, Stored, Wanted, numbers

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

SMALL = Settings(max_read_bytes=100_000, io_threads=3, read_gap_bytes=64)


def saved(state: dict[str, Any]) -> MemoryStorage:
    """A run with this state as its one checkpoint."""
    storage = MemoryStorage()
    with CheckpointManager(storage) as ckpts:
        ckpts.save(1, state, block=True)
    return storage


def weights() -> dict[str, torch.Tensor]:
    """Tensors of many sizes and dtypes on the host."""
    torch.manual_seed(0)
    made = {f"w{n}": torch.randn(n * 997 + 1) for n in range(60)}
    return made | {"bf16": torch.randn(5000).to(torch.bfloat16), "long": torch.arange(999), "none": torch.empty(0, 3)}


@pytest.mark.parametrize("settings", [Settings(), SMALL], ids=["default", "small"])
@pytest.mark.parametrize("device", ["cuda", torch.device("cuda", 0)], ids=str)
def test_load_gives_tensors_on_the_device(device: Any, settings: Settings) -> None:
    """Every tensor is on the GPU with its exact bits, ties included; other values stay what they are."""
    state = weights()
    state["tied"] = state["w3"]
    back = cloudckpt.open(saved({"m": state, "n": 3}), settings=settings).load(device=device)
    assert back["n"] == 3
    assert back["m"]["tied"] is back["m"]["w3"]
    assert all(tensor.device == torch.device("cuda", 0) for tensor in back["m"].values())
    assert all(torch.equal(back["m"][name].cpu(), tensor) for name, tensor in state.items())


@pytest.mark.parametrize("in_place", [True, False])
def test_a_model_and_its_optimizer_on_the_device_are_restored(in_place: bool) -> None:
    """Parameters keep their memory, moments are made on the device or read into, and training goes on."""
    model = nn.Sequential(nn.Linear(300, 200), nn.BatchNorm1d(200)).cuda()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(4, 300, device="cuda")).square().sum().backward()
    optimizer.step()
    storage = saved({"model": model, "optimizer": optimizer})
    other = nn.Sequential(nn.Linear(300, 200), nn.BatchNorm1d(200)).cuda()
    fresh = torch.optim.AdamW(other.parameters())
    places = [parameter.data_ptr() for parameter in other.parameters()]
    for _ in range(2):  # once without a state of its own, once with
        with CheckpointManager(storage, settings=Settings(read_in_place=in_place)) as ckpts:
            ckpts.restore({"model": other, "optimizer": fresh})
        assert [parameter.data_ptr() for parameter in other.parameters()] == places
        for name, tensor in model.state_dict().items():
            assert torch.equal(other.state_dict()[name], tensor)
        for one, two in zip(optimizer.state.values(), fresh.state.values(), strict=True):
            assert all(torch.equal(one[name], two[name]) and one[name].device == two[name].device for name in one)
    other(torch.randn(4, 300, device="cuda")).square().sum().backward()
    fresh.step()


def test_kernels_that_were_queued_before_are_done_with_the_memory_first() -> None:
    """A tensor that a long kernel still writes to has the restored values in the end."""
    storage = saved({"x": torch.ones(1_000_000)})
    target = torch.zeros(1_000_000, device="cuda")
    big = torch.randn(4096, 4096, device="cuda")
    for _ in range(20):
        big = big @ big / 64
    target += big.flatten()[:1_000_000]
    with CheckpointManager(storage) as ckpts:
        ckpts.restore({"x": target})
    assert target.eq(1).all()


def test_other_dtypes_and_layouts_on_the_device_are_converted() -> None:
    """A half-precision or transposed target gets the values by a copy."""
    stored = torch.randn(30, 20)
    half = torch.zeros(30, 20, dtype=torch.float16, device="cuda")
    turned = torch.zeros(20, 30, device="cuda").t()
    with CheckpointManager(saved({"x": {"half": stored, "turned": stored.clone()}})) as ckpts:
        ckpts.restore({"x": {"half": half, "turned": turned}})
    assert torch.equal(half.cpu(), stored.half())
    assert torch.equal(turned.cpu(), stored)


def test_damage_is_found_before_it_reaches_the_device() -> None:
    """The sums are taken on the host, and the error is the same."""
    storage = saved({"w": torch.ones(100)})
    run = cloudckpt.open(storage)
    key = f"{run.select('latest').name}/w-00000-of-00001.safetensors"
    body = bytearray(storage.read(key, limit_bytes=10**6).body)
    body[-1] ^= 1
    storage.put(key, [bytes(body)], size_bytes=len(body))
    with pytest.raises(CorruptCheckpointError, match="checksum"):
        run.load(1, device="cuda")


@pytest.mark.parametrize(
    ("lengths", "read"),
    [
        ((16, 1024), 17 * CELL),
        ((16, 100), 64 * CELL),  # its rows lie apart
    ],
)
def test_a_part_on_the_device_has_its_bits(lengths: tuple[int, int], read: int) -> None:
    """By cells where it lies on the device as it is stored, otherwise by whole chunks."""
    stored = Stored()
    box = Wanted(numbers(64, 1024), (16, 0), lengths)
    local = torch.zeros(lengths, dtype=torch.int32, device="cuda")
    stored.read([(stored.add(box.whole), Part(value=local, local=local, offsets=box.offsets))], SETTINGS)
    assert torch.equal(local.cpu(), box.expected())
    assert stored.storage.bytes_read == read
