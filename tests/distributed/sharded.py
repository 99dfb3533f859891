"""A sharded model and its optimizer, saved and restored by the first so many ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from cloudckpt import CheckpointManager, TrainState
from tests.distributed.scenarios import QUICK, digest


def meshed(size: int) -> tuple[Any, Any]:
    """A process group and a mesh of the first so many ranks. Every rank takes part in making them."""
    from torch.distributed.device_mesh import DeviceMesh

    return dist.new_group(list(range(size))), DeviceMesh("cpu", list(range(size)))


def filled(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Steps with made-up gradients: the same for equal parameters, however they are sharded."""
    for step in range(steps):
        for number, parameter in enumerate(model.parameters()):
            parameter.grad = (parameter.detach() * 0.5 + 0.01 * (number + step)).clone()
        optimizer.step()


def sharded(kind: str, mesh: Any, seed: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """A model under FSDP2, tensor parallelism or nothing, over the first so many ranks."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(48, 101), torch.nn.ReLU(), torch.nn.Linear(101, 10))
    if kind == "tp":
        torch.manual_seed(seed)
        model = torch.nn.Sequential(torch.nn.Linear(48, 104), torch.nn.ReLU(), torch.nn.Linear(104, 10))
    if kind == "fsdp":
        fully_shard(model, mesh=mesh)
    elif kind == "tp":
        parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def full(state: Any) -> Any:
    """The same with all tensors whole."""
    if isinstance(state, dict):
        return {key: full(value) for key, value in state.items()}
    if isinstance(state, list):
        return [full(value) for value in state]
    if isinstance(state, torch.Tensor) and hasattr(state, "full_tensor"):
        return state.full_tensor()
    return state


def save_sharded(root: str, kind: str, ranks: int, wrapped: bool) -> dict[str, Any] | None:
    """Save from the first so many ranks."""
    group, mesh = meshed(ranks)
    if dist.get_rank() >= ranks:
        return None
    model, optimizer = sharded(kind, mesh, seed=3)
    filled(model, optimizer, 3)
    state = TrainState(model, optimizer) if wrapped else {"model": model, "optimizer": optimizer}
    with CheckpointManager(root, settings=QUICK, process_group=group) as ckpts:
        name = ckpts.save(3, state).wait(30).name
    whole = full(model.state_dict())
    return {"name": name, "model": digest(whole), "optimizer": digest(full(optimizer.state_dict()["state"]))}


def restore_sharded(root: str, kind: str, ranks: int, wrapped: bool) -> dict[str, Any] | None:
    """Restore on the first so many ranks, into fresh objects."""
    group, mesh = meshed(ranks)
    if dist.get_rank() >= ranks:
        return None
    model, optimizer = sharded(kind, mesh, seed=4)
    state = TrainState(model, optimizer) if wrapped else {"model": model, "optimizer": optimizer}
    with CheckpointManager(root, settings=QUICK, process_group=group) as ckpts:
        found = ckpts.restore(state)
        assert found is not None
    whole = full(model.state_dict())
    return {"name": found.name, "model": digest(whole), "optimizer": digest(full(optimizer.state_dict()["state"]))}
