"""What a second review of options by name found: each test states what should be true, and fails while it is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cloudckpt import CheckpointManager, StateMismatchError, TrainState


def made(seed: int, *names: str) -> torch.nn.ModuleDict:
    """A model of layers with these names."""
    torch.manual_seed(seed)
    return torch.nn.ModuleDict({name: torch.nn.Linear(2, 2) for name in names})


def stepped(model: torch.nn.Module, *optimizers: torch.optim.Optimizer) -> None:
    """One step."""
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    for optimizer in optimizers:
        optimizer.step()
    model.zero_grad()


def of(model: torch.nn.ModuleDict, *groups: dict[str, Any], kind: Any = torch.optim.Adam, **words: Any) -> Any:
    """An optimizer with groups of layers, by their names."""
    return kind(
        [{**own, "params": [p for n in own["params"] for p in model[n].parameters()]} for own in groups], **words
    )


def restored(root: Path, saved: TrainState, into: TrainState, **words: Any) -> None:
    """Save one state, and restore it into another."""
    with CheckpointManager(root / "run") as ckpts:
        ckpts.save(1, saved, block=True)
        ckpts.restore(into, **words)


def test_rates_that_are_tensors_are_compared_too(tmp_path: Path) -> None:
    """Their values are not known before they are read: one group of what had two is refused, not made up."""
    model, fresh = made(0, "a", "b"), made(1, "a", "b")
    rates = torch.tensor(0.5), torch.tensor(0.25)
    optimizer = of(model, *({"params": [n], "lr": rate} for n, rate in zip("ab", rates, strict=True)))
    stepped(model, optimizer)
    other = of(fresh, {"params": ["a", "b"]}, lr=torch.tensor(0.1))
    with pytest.raises(StateMismatchError, match=r"a\.weight and b\.weight are in one group.* different lr"):
        restored(tmp_path, TrainState(model, optimizer), TrainState(fresh, other))


def test_groups_have_no_rate_in_common_after_a_restore(tmp_path: Path) -> None:
    """A scheduler writes into a learning rate that is a tensor: two groups that were one keep a tensor each."""
    model, fresh = made(0, "a", "b"), made(1, "a", "b")
    optimizer = of(model, {"params": ["a", "b"]}, lr=torch.tensor(0.5))
    stepped(model, optimizer)
    other = of(fresh, *({"params": [n], "lr": torch.tensor(0.1)} for n in "ab"))
    restored(tmp_path, TrainState(model, optimizer), TrainState(fresh, other))
    first, second = (group["lr"] for group in other.param_groups)
    assert (first.item(), second.item()) == (0.5, 0.5)
    first.fill_(0.0)
    assert second.item() == 0.5


@pytest.mark.parametrize("is_empty", [True, False])
def test_options_that_torch_has_a_default_for_are_not_lost(tmp_path: Path, is_empty: bool) -> None:
    """Of a group of which nothing was saved, also those that optimizers fill in when they are restored."""
    model, fresh = made(0, "a"), made(1, "a") if is_empty else made(1, "a", "b")
    optimizer = of(model, {"params": ["a"]})
    stepped(model, optimizer)
    other = of(fresh, {"params": ["a"]}, {"params": [] if is_empty else ["b"], "maximize": True, "amsgrad": True})
    restored(tmp_path, TrainState(model, optimizer), TrainState(fresh, other), strict=is_empty)
    assert [(group["maximize"], group["amsgrad"]) for group in other.param_groups] == [(False, False), (True, True)]


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_several_groups_may_be_empty_in_any_place(tmp_path: Path, kind: Any) -> None:
    """Each keeps its own options, also beside a second optimizer, and where there are no moments at all."""
    model = made(0, "a", "b")
    groups = [{"params": [], "lr": 0.5}, {"params": ["a"], "lr": 0.25}, {"params": [], "lr": 0.125}]
    optimizers = [of(model, *groups, kind=kind), of(model, {"params": ["b"]}, kind=kind, lr=0.75)]
    stepped(model, *optimizers)
    state = TrainState(model, optimizers)
    with CheckpointManager(tmp_path / "run") as ckpts:
        ckpts.save(1, state, block=True)
        optimizers[0].param_groups[1]["lr"] = optimizers[1].param_groups[0]["lr"] = 0.0
        ckpts.restore(state)
    assert [group["lr"] for o in optimizers for group in o.param_groups] == [0.5, 0.25, 0.125, 0.75]


def test_what_has_no_groups_is_refused_in_words(tmp_path: Path) -> None:
    """It is no optimizer's state, and that is said rather than a KeyError raised."""
    model = made(0, "a")
    with CheckpointManager(tmp_path / "run") as ckpts:
        ckpts.save(1, {"model": model, "optimizer": {"state": {}}}, block=True)
        with pytest.raises(StateMismatchError, match="optimizers by parameter names"):
            ckpts.restore(TrainState(model, of(model, {"params": ["a"]})))


def test_names_that_are_no_strings_are_unexpected(tmp_path: Path) -> None:
    """A dict may have any keys, and stand where a module is now."""
    model = made(0, "a")
    with CheckpointManager(tmp_path / "run") as ckpts:
        ckpts.save(1, {"model": {1: 2, (1, 2): 3, b"x": 4, "y": 5}}, block=True)
        with pytest.raises(StateMismatchError, match=r"unexpected: 1, \(1, 2\), b'x', y"):
            ckpts.restore({"model": model})
        ckpts.restore({"model": model}, strict=False)


def test_options_that_were_not_saved_are_missed(tmp_path: Path) -> None:
    """A list of groups that lacks a parameter (as of a pipeline, whose first stage's was stored) is not passed over."""
    model = made(0, "a", "b")
    optimizer = of(model, {"params": ["a"]}, kind=torch.optim.SGD, lr=0.5)
    whole = of(model, {"params": ["a"]}, {"params": ["b"]}, kind=torch.optim.SGD, lr=0.25)
    listed = {"state": {}, "param_groups": [{"lr": 0.5, "params": ["a.weight", "a.bias"]}]}
    with CheckpointManager(tmp_path / "run") as ckpts:
        ckpts.save(1, {"model": TrainState(model)["model"], "optimizer": listed}, block=True)
        with pytest.raises(StateMismatchError, match=r"no options were saved for b\.weight, b\.bias"):
            ckpts.restore(TrainState(model, whole))
        ckpts.restore(TrainState(model, optimizer))
        ckpts.restore(TrainState(model, whole), strict=False)
    assert [group["lr"] for group in whole.param_groups] == [0.5, 0.25]
