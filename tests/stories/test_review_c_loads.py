"""A fresh reader's list of what could go wrong while loading: what was found by breaking it, one story each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

import cloudckpt
from cloudckpt import CheckpointManager, ConfigError, Settings
from cloudckpt.storage import MemoryStorage

pytestmark = pytest.mark.memory_only


def saved(state: dict[str, Any]) -> MemoryStorage:
    """A storage with one checkpoint of this state."""
    storage = MemoryStorage()
    with CheckpointManager(storage) as ckpts:
        ckpts.save(1, state)
    return storage


def test_a_gap_larger_than_a_read_is_no_damage() -> None:
    """max_read_bytes below read_gap_bytes: what is asked for arrives, and nothing is called damaged."""
    state = {"m": {str(n): torch.full((50_000,), float(n)) for n in range(3)}}
    storage = saved(state)
    run = cloudckpt.open(storage, settings=Settings(max_read_bytes=64 * 1024))
    found = run.load(1, names=["0", "2"])["m"]
    assert found.keys() == {"0", "2"}
    for name, tensor in found.items():
        assert torch.equal(tensor, state["m"][name])


@pytest.mark.parametrize("call", ["load", "names", "restore", "on a device"])
def test_torchs_default_device_does_not_matter(call: str) -> None:
    """Under torch.set_default_device, or a device as a context, everything loads as ever: host tensors on the host."""
    state = {"m": {"w": torch.arange(6.0), "n": np.arange(3)}}
    storage = saved(state)
    target = {"m": {"w": torch.zeros(6), "n": np.zeros(3)}}
    found: Any
    with torch.device("meta"):
        if call == "restore":
            with CheckpointManager(storage) as ckpts:
                ckpts.restore(target)
            found = target["m"]
        elif call == "on a device":
            found = cloudckpt.open(storage).load(device=None)["m"]
        else:
            found = cloudckpt.open(storage).load(names=["w"] if call == "names" else None)["m"]
    assert found["w"].device.type == "cpu"
    assert found["w"].tolist() == [0, 1, 2, 3, 4, 5]
    assert call == "names" or found["n"].tolist() == [0, 1, 2]


class Looked(list[str]):
    """Names that count how often somebody goes through them to look for one."""

    def __init__(self, names: list[str]) -> None:
        super().__init__(names)
        self.looks = 0

    def __contains__(self, name: object) -> bool:
        self.looks += 1
        return super().__contains__(name)

    def __iter__(self) -> Iterator[str]:
        return super().__iter__()


def test_many_names_are_not_compared_each_with_each() -> None:
    """load(names=) takes a time that grows with the names, not with their square."""
    names = [f"layers.{n}" for n in range(200)]
    asked = Looked(names)
    found = cloudckpt.open(saved({"m": {name: torch.zeros(1) for name in names}})).load(names=asked)
    assert len(found["m"]) == 200
    assert asked.looks == 0


@pytest.mark.parametrize(
    "name",
    ["io_threads", "max_fallbacks", "connections", "parts_in_flight", "copy_every_revisions", "part_size_bytes",
     "staging_limit_bytes", "max_read_bytes", "read_gap_bytes", "overlap_device_bytes"],
)  # fmt: skip
def test_a_count_that_is_no_whole_number_is_refused_at_once(name: str) -> None:
    """Settings(io_threads=2.5) is an error that says so, not a TypeError in the middle of a save or a restore."""
    with pytest.raises(ConfigError, match=rf"{name}=2\.5: write a positive whole number"):
        Settings(**{name: 2.5})  # type: ignore[arg-type]  # on purpose


def test_a_whole_number_may_be_spelled_as_a_float() -> None:
    """8e9 bytes are 8,000,000,000: what people write for sizes works, and is whole from then on."""
    settings = Settings(staging_limit_bytes=8e9, io_threads=4.0)  # type: ignore[arg-type]  # on purpose
    assert (settings.staging_limit_bytes, settings.io_threads) == (8_000_000_000, 4)
    assert type(settings.staging_limit_bytes) is type(settings.io_threads) is int


class Wrapper(torch.optim.Optimizer):
    """What many trainers make: an optimizer by name, that passes everything on and has nothing of its own."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner = inner

    def state_dict(self) -> dict[str, Any]:
        return self.inner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.inner.load_state_dict(state_dict)


def test_an_optimizer_without_groups_of_its_own_is_restored() -> None:
    """A wrapper without param_groups is given its state dict, like anything else that has one."""
    model = torch.nn.Linear(3, 3)
    storage = saved({"optimizer": Wrapper(torch.optim.SGD(model.parameters(), lr=0.25))})
    inner = torch.optim.SGD(model.parameters(), lr=0.5)
    with CheckpointManager(storage) as ckpts:
        ckpts.restore({"optimizer": Wrapper(inner)})
    assert inner.param_groups[0]["lr"] == 0.25
