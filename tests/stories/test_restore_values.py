"""restore_values: for host libraries that fill their objects themselves, with all that restore protects."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import cloudckpt
from cloudckpt import CheckpointManager, CheckpointNotFoundError, CorruptCheckpointError, PerRank
from cloudckpt.storage import MemoryStorage
from cloudckpt.testing import check_store


def state_of(step: int) -> dict[str, Any]:
    """What a trainer collects: tensors and plain values, nested."""
    return {
        "state_dict": {"w": torch.full((50,), float(step))},
        "loops": {"epoch": step, "seen": [1, (2, None)]},
        "rng": PerRank({"seed": step}),
    }


def run_of(*steps: int, **policy: Any) -> MemoryStorage:
    """A closed run with these steps."""
    storage = MemoryStorage()
    with CheckpointManager(storage, **{"keep_last": None, **policy}) as ckpts:
        for step in steps:
            ckpts.save(step, state_of(step), block=True)
    return storage


def flip(storage: MemoryStorage, step: int) -> None:
    """One bit of the weights is another."""
    key = f"{cloudckpt.open(storage).select(step).name}/state_dict-00000-of-00001.safetensors"
    body = bytearray(storage.read(key, limit_bytes=10**6).body)
    body[-1] ^= 1
    storage.put(key, [bytes(body)], size_bytes=len(body))


def test_a_first_run_gives_none_and_a_later_one_everything() -> None:
    """Every component with every value; of what each rank has for itself this rank's own."""
    storage = MemoryStorage()
    with CheckpointManager(storage) as ckpts:
        assert ckpts.restore_values() is None
        ckpts.save(5, state_of(5), block=True)
        values = ckpts.restore_values()
    assert values is not None
    assert list(values) == ["state_dict", "loops", "rng"]
    assert torch.equal(values["state_dict"]["w"], torch.full((50,), 5.0))
    assert values["loops"] == {"epoch": 5, "seen": [1, (2, None)]}
    assert values["rng"] == {"seed": 5}
    with pytest.raises(TypeError, match="restore_values"):
        with CheckpointManager(storage) as ckpts:
            ckpts.restore_values(step=5)


def test_what_is_gone_on_with_is_protected() -> None:
    """Going on from an older one keeps it until the first commit, whatever the rules say."""
    storage = run_of(1, 2, 3)
    with CheckpointManager(storage, keep_last=1) as ckpts:
        values = ckpts.restore_values(1)
        assert values is not None
        assert values["loops"]["epoch"] == 1
        assert ckpts.manifest().resumed_from == ckpts.select(1).id
        ckpts.prune()
        assert {c.step for c in ckpts.checkpoints()} == {1, 3}
    check_store(storage)


def test_only_proven_damage_leads_to_an_earlier_one() -> None:
    """The newest is damaged: recorded, and the one before is given; by name it raises, and nothing starts anew."""
    storage = run_of(1, 2, 3)
    flip(storage, 3)
    with CheckpointManager(storage) as ckpts:
        values = ckpts.restore_values()
        assert values is not None
        assert values["loops"]["epoch"] == 2
        assert [c.step for c in ckpts.checkpoints() if c.damaged] == [3]
        with pytest.raises(CorruptCheckpointError, match="checkpoint-3"):
            ckpts.restore_values(3)
        with pytest.raises(CheckpointNotFoundError):
            ckpts.restore_values(99)
