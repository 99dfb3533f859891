"""A TrainState that is looked at before the first step changes no step."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from cloudckpt import CheckpointManager, TrainState

Make = Callable[[torch.nn.Module], torch.optim.Optimizer]

OPTIMIZERS: dict[str, Make] = {
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2),
    "adam-decay": lambda model: torch.optim.Adam(model.parameters(), lr=1e-2, weight_decay=0.1),
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9, weight_decay=0.1),
}


def made(make: Make) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """The same each time."""
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    return model, make(model)


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> list[float]:
    """Some steps; the weights after them."""
    for step in range(first, last):
        torch.manual_seed(step)
        model(torch.randn(5, 4)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [value for weight in model.parameters() for value in weight.flatten().tolist()]


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_first_restore_leaves_the_training_alone(memory_root: str, make: Make) -> None:
    """With nothing to resume, every step is what it would be without checkpoints."""
    model, optimizer = made(make)
    with CheckpointManager(memory_root) as ckpts:
        assert ckpts.restore(TrainState(model, optimizer)) is None
    assert train(model, optimizer, 0, 3) == train(*made(make), 0, 3)


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_what_was_restored_is_not_forgotten(memory_root: str, make: Make) -> None:
    """Saved after three steps and restored into fresh objects, the next three are the same."""
    model, optimizer = made(make)
    train(model, optimizer, 0, 3)
    with CheckpointManager(memory_root) as ckpts:
        ckpts.save(2, TrainState(model, optimizer), block=True)
    fresh, its_optimizer = made(make)
    with CheckpointManager(memory_root) as ckpts:
        assert ckpts.restore(TrainState(fresh, its_optimizer)) is not None
    assert train(fresh, its_optimizer, 3, 6) == train(model, optimizer, 3, 6)
