"""The state of a training loop by the names of its parameters."""

from __future__ import annotations

import random
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import cloudckpt
from cloudckpt import CheckpointManager, PerRank, Settings, StateMismatchError, TrainState


def loop(seed: int, names: tuple[str, str] = ("a", "b"), width: int = 5) -> tuple[torch.nn.Module, torch.optim.AdamW]:
    """A model and an optimizer."""
    torch.manual_seed(seed)
    layers: OrderedDict[str, torch.nn.Module] = OrderedDict(
        {names[0]: torch.nn.Linear(3, width), names[1]: torch.nn.Linear(width, 2)}
    )
    model = torch.nn.Sequential(layers)
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """One step."""
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_a_loop_goes_on_where_it_was(tmp_path: Path) -> None:
    """Weights, moments, scheduler, counters and generators come back; the next step is the same one."""
    model, optimizer = loop(0)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    state = TrainState(model, optimizer, scheduler=schedule, seen=10, rng=PerRank(cloudckpt.rng_state()))
    step(model, optimizer)
    schedule.step()
    state["seen"] = 11
    with CheckpointManager(tmp_path / "run") as ckpts:
        ckpts.save(1, state, block=True)
        drawn = [random.random(), float(np.random.random()), torch.rand(1).item()]  # noqa: NPY002 - the global one
        step(model, optimizer)
        fresh, other = loop(1)
        again = torch.optim.lr_scheduler.StepLR(other, 1, 0.5)
        resumed = TrainState(fresh, other, scheduler=again, seen=0, rng=PerRank(cloudckpt.rng_state()))
        assert ckpts.restore(resumed) is not None
    assert resumed["seen"] == 11
    assert other.param_groups[0]["lr"] == 0.05
    assert [random.random(), float(np.random.random()), torch.rand(1).item()] == drawn  # noqa: NPY002 - as above
    step(fresh, other)
    for name, value in model.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], value), name


def test_moments_are_named_as_the_parameters_are(tmp_path: Path) -> None:
    """Without numbers that mean other parameters elsewhere."""
    model, optimizer = loop(0)
    step(model, optimizer)
    with CheckpointManager(tmp_path / "run") as ckpts:
        ckpts.save(1, TrainState(model, [optimizer]), block=True)
    loaded: dict[str, Any] = cloudckpt.open(tmp_path / "run").load()
    assert set(loaded["optimizer"]["state"]) == {"a.weight", "a.bias", "b.weight", "b.bias"}
    assert loaded["optimizer"]["param_groups"][0]["params"] == ["a.weight", "a.bias", "b.weight", "b.bias"]


def _in_two_groups(model: torch.nn.Module, lrs: tuple[float, float]) -> torch.optim.AdamW:
    named = dict(model.named_parameters())
    groups = [[named[n] for n in ("b.weight", "a.weight")], [named[n] for n in ("b.bias", "a.bias")]]
    found = torch.optim.AdamW([{"params": own, "lr": lr} for own, lr in zip(groups, lrs, strict=True)])
    step(model, found)
    return found


def test_options_come_back_by_the_names_of_parameters(tmp_path: Path) -> None:
    """However they are grouped and ordered now; parameters of one group that had different ones are refused by name."""
    model, _ = loop(0)
    optimizer = _in_two_groups(model, (0.5, 0.25))
    fresh, single = loop(1)
    apart = torch.optim.AdamW([{"params": [p]} for p in fresh.parameters()], lr=1.0)
    with CheckpointManager(tmp_path / "run") as ckpts:
        ckpts.save(1, TrainState(model, optimizer), block=True)
        ckpts.restore(TrainState(fresh, apart))
        assert [group["lr"] for group in apart.param_groups] == [0.5, 0.25, 0.5, 0.25]
        before = fresh.state_dict()["a.weight"].clone()
        said = r"optimizer: a.weight and a.bias are in one group, and were saved with different lr"
        with pytest.raises(StateMismatchError, match=said):
            ckpts.restore(TrainState(fresh, single))
        assert torch.equal(fresh.state_dict()["a.weight"], before)
        ckpts.restore(TrainState(fresh, single), strict=False)
        assert single.param_groups[0]["lr"] == 0.5


def test_a_group_without_parameters_keeps_its_options(tmp_path: Path) -> None:
    """Nothing can be stored for it by a parameter's name."""
    model, _ = loop(0)
    lists: list[dict[str, Any]] = [{"params": [*model.parameters()]}, {"params": [], "lr": 0.75}]
    optimizer = torch.optim.AdamW(lists, lr=0.5)
    step(model, optimizer)
    with CheckpointManager(tmp_path / "run") as ckpts:
        ckpts.save(1, TrainState(model, optimizer), block=True)
        optimizer.param_groups[0]["lr"] = 0.0
        ckpts.restore(TrainState(model, optimizer))
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.75]


def test_moments_that_do_not_fit_are_left_out_whole(tmp_path: Path) -> None:
    """With ``strict=False`` an optimizer has all moments of a parameter or none, and can step either way."""
    model, optimizer = loop(0)
    step(model, optimizer)
    wider, other = loop(1, width=6)
    step(wider, other)
    with CheckpointManager(tmp_path / "run") as ckpts:
        ckpts.save(1, TrainState(model, optimizer), block=True)
        ckpts.restore(TrainState(wider, other), strict=False)
    assert torch.equal(wider.state_dict()["b.bias"], model.state_dict()["b.bias"])
    assert [p.shape for p in other.state] == [(2,)]  # that of b.bias: the others' begin anew
    step(wider, other)


def test_a_renamed_or_reshaped_model_is_refused_by_name(tmp_path: Path) -> None:
    """Missing, unexpected and mis-shaped names of model and optimizer; ``strict=False`` takes what fits."""
    model, optimizer = loop(0)
    step(model, optimizer)
    with CheckpointManager(tmp_path / "run") as ckpts:
        ckpts.save(1, TrainState(model, optimizer), block=True)
        renamed, other = loop(1, names=("a", "c"))
        before = {name: value.clone() for name, value in renamed.state_dict().items()}
        with pytest.raises(StateMismatchError) as refused:
            ckpts.restore(TrainState(renamed, other))
        text = str(refused.value)
        assert "model: missing in the checkpoint: c.weight, c.bias" in text
        assert "model: unexpected: b.weight, b.bias" in text
        assert "optimizer: unexpected: b.weight, b.bias" in text
        assert all(torch.equal(before[name], value) for name, value in renamed.state_dict().items())
        wider, third = loop(1, width=6)
        with pytest.raises(StateMismatchError, match=r"mis-shaped: a\.weight \(a tensor of shape \(6, 3\) here"):
            ckpts.restore(TrainState(wider, third))
        ckpts.restore(TrainState(renamed, other), strict=False)
        assert torch.equal(renamed.state_dict()["a.weight"], model.state_dict()["a.weight"])
        assert torch.equal(renamed.state_dict()["c.weight"], before["c.weight"])


def test_the_copy_of_a_train_state_may_overlap(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its optimizers are known: the save holds the values of the moment, whatever the next step does."""
    model, optimizer = loop(0)
    step(model, optimizer)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with CheckpointManager(tmp_path / "run", settings=Settings(stage="overlap")) as ckpts:
        pending = ckpts.save(1, TrainState(model, optimizer))
        step(model, optimizer)
        pending.wait(60)
    assert not [record for record in caplog.records if "overlap" in record.message]
    loaded = cloudckpt.open(tmp_path / "run").load()["model"]
    assert all(torch.equal(loaded[name], value) for name, value in before.items())
    assert not torch.equal(loaded["a.weight"], model.state_dict()["a.weight"])
