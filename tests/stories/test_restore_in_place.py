"""A restore that reads into the caller's own tensors: what an error leaves behind, and how a fall-back still ends exact."""

from __future__ import annotations

import traceback
from typing import Any

import pytest
import torch
from torch import nn

import cloudckpt
from cloudckpt import CheckpointManager, CorruptCheckpointError, Settings, StateMismatchError, StorageError
from cloudckpt.storage import MemoryStorage

PARTLY = "The objects you passed are partly overwritten: build fresh ones before you go on"


def run_of(*states: dict[str, Any]) -> MemoryStorage:
    """A closed run with these states, as steps from 1 on."""
    storage = MemoryStorage()
    with CheckpointManager(storage, keep_last=None) as ckpts:
        for step, state in enumerate(states, start=1):
            ckpts.save(step, state, block=True)
    return storage


def damage(storage: MemoryStorage, step: int, component: str = "model") -> None:
    """One bit of the component's last byte is another."""
    key = f"{cloudckpt.open(storage).select(step).name}/{component}-00000-of-00001.safetensors"
    body = bytearray(storage.read(key, limit_bytes=10**6).body)
    body[-1] ^= 1
    storage.put(key, [bytes(body)], size_bytes=len(body))


def filled(value: float) -> nn.Sequential:
    """A model whose every element is this."""
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    for parameter in model.parameters():
        nn.init.constant_(parameter, value)
    return model


def values(model: nn.Module) -> set[float]:
    """The distinct elements of a model."""
    return {value for tensor in model.state_dict().values() for value in tensor.flatten().tolist()}


@pytest.mark.parametrize("damaged", ["model", "other"])
def test_a_fall_back_ends_exact(damaged: str) -> None:
    """After damage half-way, everything that had been read is overwritten by the earlier checkpoint, to the last bit."""
    storage = run_of(*({"model": filled(n), "other": {"t": torch.full((5,), float(n))}} for n in (1, 2)))
    damage(storage, 2, damaged)
    model, tensor = filled(9), torch.full((5,), 9.0)
    with CheckpointManager(storage) as ckpts:
        resumed = ckpts.restore({"model": model, "other": {"t": tensor}})
    assert resumed is not None
    assert resumed.step == 1
    assert values(model) == {1}
    assert tensor.tolist() == [1] * 5


def test_a_fall_back_over_an_optimizer_leaves_none_of_its_later_state() -> None:
    """An earlier checkpoint of an optimizer that had not stepped yet gives it back without a state."""
    model = filled(1)
    optimizer = torch.optim.AdamW(model.parameters())
    storage = run_of({"o": optimizer, "model": model})
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    with CheckpointManager(storage, keep_last=None) as ckpts:
        ckpts.save(2, {"o": optimizer, "model": model}, block=True)
    damage(storage, 2)
    with CheckpointManager(storage) as ckpts:
        resumed = ckpts.restore({"o": optimizer, "model": model})
    assert resumed is not None
    assert resumed.step == 1
    assert not optimizer.state
    assert values(model) == {1}


def test_a_fall_back_that_would_leave_a_mixture_is_refused() -> None:
    """An earlier checkpoint without a tensor that was overwritten is not restored: the error names it and says what to do."""
    storage = run_of({"x": {"a": torch.ones(3)}}, {"x": {"a": torch.ones(3), "late": torch.ones(4)}})
    damage(storage, 2, "x")
    state = {"x": {"a": torch.zeros(3), "late": torch.zeros(4)}}
    with CheckpointManager(storage) as ckpts:
        with pytest.raises(StateMismatchError, match=rf"has nothing for x\.late, .* a mixture.*{PARTLY}$"):
            ckpts.restore(state, strict=False)
        # Nothing is wrong with that checkpoint itself.
        assert [c.step for c in ckpts.checkpoints() if c.damaged] == [2]
        fresh = {"x": {"a": torch.zeros(3), "late": torch.zeros(4)}}
        assert ckpts.restore(fresh, strict=False) is not None
        assert fresh["x"]["late"].tolist() == [0] * 4


def test_an_optimizer_that_would_keep_damaged_moments_is_refused() -> None:
    """Where strict=False would leave an optimizer as it is, because the earlier one has other groups, it is not as it was."""

    def stepped(parts: int) -> torch.optim.Optimizer:
        parameters = [nn.Parameter(torch.ones(2)) for _ in range(2)]
        groups = [parameters[:1], parameters[1:]] if parts == 2 else [parameters]
        optimizer = torch.optim.SGD([{"params": group} for group in groups], lr=0.1, momentum=0.9)
        for parameter in parameters:
            parameter.grad = torch.ones(2)
        optimizer.step()
        return optimizer

    storage = run_of({"o": stepped(1)}, {"o": stepped(2)})
    damage(storage, 2, "o")
    with CheckpointManager(storage) as ckpts:
        with pytest.raises(StateMismatchError, match=rf"has nothing for o\.state\[0\]\.momentum_buffer.*{PARTLY}$"):
            ckpts.restore({"o": stepped(2)}, strict=False)
        assert ckpts.restore({"o": stepped(1)}) is not None


def test_a_mismatch_after_damage_does_not_claim_that_nothing_was_changed() -> None:
    """With strict the earlier checkpoint is refused by its names, and the error says that the state is overwritten."""
    storage = run_of({"x": {"a": torch.ones(3)}}, {"x": {"a": torch.ones(3), "late": torch.ones(4)}})
    damage(storage, 2, "x")
    with CheckpointManager(storage) as ckpts, pytest.raises(StateMismatchError) as caught:
        ckpts.restore({"x": {"a": torch.zeros(3), "late": torch.zeros(4)}})
    assert "x.late: missing in the checkpoint" in str(caught.value)
    assert "nothing was changed" not in str(caught.value)
    assert str(caught.value).endswith(PARTLY)


def test_named_damage_says_that_the_objects_are_overwritten() -> None:
    """Asked for by name there is no fall-back: the error names the damage, and what became of the objects."""
    storage = run_of({"model": filled(1)}, {"model": filled(2)})
    damage(storage, 2)
    model = filled(9)
    with CheckpointManager(storage) as ckpts, pytest.raises(CorruptCheckpointError) as caught:
        ckpts.restore({"model": model}, select=2)
    assert "checksum" in str(caught.value)
    assert str(caught.value).endswith(PARTLY)
    with CheckpointManager(storage) as ckpts:
        assert ckpts.restore({"model": model}) is not None
    assert values(model) == {1}


class Failing(MemoryStorage):
    """The run of another storage, whose payload cannot be read."""

    def __init__(self, inner: MemoryStorage, error: BaseException) -> None:
        super().__init__()
        self.inner_storage, self.error = inner, error

    def read(self, key: str, *, limit_bytes: int) -> Any:
        """See ``Storage.read``."""
        return self.inner_storage.read(key, limit_bytes=limit_bytes)

    def replace(self, key: str, body: bytes, *, expecting: str) -> Any:
        """See ``Storage.replace``."""
        return self.inner_storage.replace(key, body, expecting=expecting)

    def read_into(self, key: str, start: int, *targets: memoryview) -> None:
        """See ``Storage.read_into``."""
        raise self.error


@pytest.mark.parametrize("in_place", [True, False])
def test_a_network_fault_says_what_became_of_the_objects(in_place: bool) -> None:
    """The class and the reason stay what they were; only with read_in_place does the error speak of the objects."""
    settings = Settings(read_in_place=in_place, storage_deadline_s=0.1, retry_base_s=0.01)
    storage = Failing(run_of({"model": filled(1)}), StorageError("503: slow down", retryable=True))
    with CheckpointManager(storage, settings=settings) as ckpts, pytest.raises(StorageError) as caught:
        ckpts.restore({"model": filled(9)})
    assert "503: slow down" in str(caught.value)
    assert caught.value.retryable
    assert str(caught.value).endswith(PARTLY) is in_place


def test_an_interrupt_says_it_too() -> None:
    """What is not ours keeps its own words and gets a note."""
    storage = Failing(run_of({"model": filled(1)}), KeyboardInterrupt())
    with CheckpointManager(storage) as ckpts, pytest.raises(KeyboardInterrupt) as caught:
        ckpts.restore({"model": filled(9)})
    assert PARTLY in "".join(traceback.format_exception(caught.value))


def test_an_error_before_anything_was_read_says_nothing_of_it() -> None:
    """A state that does not fit, or has nothing that could be read into, is as it was."""
    storage = Failing(run_of({"model": filled(1), "n": {"t": torch.ones(2)}}), StorageError("403"))
    with CheckpointManager(storage) as ckpts:
        with pytest.raises(StateMismatchError, match="nothing was changed") as mismatch:
            ckpts.restore({"model": nn.Linear(1, 1)})
        with pytest.raises(StorageError, match="403") as refused:
            ckpts.restore({"n": {"t": torch.zeros(2, dtype=torch.float64)}})
    assert "overwritten" not in f"{mismatch.value} {refused.value}"


def test_with_read_in_place_off_everything_is_proven_first() -> None:
    """The state of whoever catches the error and goes on is as it was, whatever went wrong."""
    storage = run_of({"model": filled(1)}, {"model": filled(2)})
    damage(storage, 2)
    model = filled(9)
    with CheckpointManager(storage, settings=Settings(read_in_place=False)) as ckpts:
        with pytest.raises(CorruptCheckpointError) as caught:
            ckpts.restore({"model": model}, select=2)
        assert values(model) == {9}
        assert ckpts.restore({"model": model}) is not None
    assert "overwritten" not in str(caught.value)
    assert values(model) == {1}


def test_read_in_place_is_a_yes_or_no() -> None:
    """A setting that is no yes or no is refused like any other."""
    with pytest.raises(cloudckpt.ConfigError, match="read_in_place='no': write True or False"):
        Settings(read_in_place="no")  # type: ignore[arg-type]  # what a configuration file might say
