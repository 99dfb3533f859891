"""What the ranks of a job do where each restores a part of what one process saved."""

from __future__ import annotations

import threading
from typing import Any

import torch
import torch.distributed as dist

from cloudckpt import CheckpointManager
from tests.distributed.scenarios import QUICK

#: Four rows of 16 MiB, and many short ones: each shape needs its cells in another way.
WIDE = (4, 4 * 1024 * 1024)
TALL = (1024, 8192)


def module() -> torch.nn.Module:
    """A module of 64 MiB, the same everywhere."""
    torch.manual_seed(5)
    return torch.nn.Sequential(torch.nn.Linear(2048, 4096), torch.nn.ReLU(), torch.nn.Linear(4096, 2048))


def rows(shape: tuple[int, int]) -> torch.Tensor:
    """A tensor of which every element is another, the same everywhere."""
    return torch.arange(shape[0] * shape[1], dtype=torch.int32).reshape(shape)


def _counted(ckpts: CheckpointManager) -> list[int]:
    """How many bytes each read of payload from now on asks for."""
    inner: Any = getattr(ckpts._store.storage, "inner", ckpts._store.storage)
    read_into, lengths, mutex = inner.read_into, [], threading.Lock()

    def counting(key: str, start: int, *targets: memoryview) -> None:
        with mutex:
            lengths.append(sum(map(len, targets)))
        read_into(key, start, *targets)

    inner.read_into = counting
    return lengths


def restore_module(root: str, kind: str) -> dict[str, int]:
    """Restore the module's share of this rank under FSDP2 or tensor parallelism."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import distribute_tensor
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    expected = module().state_dict()
    model = module()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    if kind == "fsdp":
        fully_shard(model, mesh=mesh)
    else:
        parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": ColwiseParallel()})
    with CheckpointManager(root, settings=QUICK) as ckpts:
        lengths = _counted(ckpts)
        assert ckpts.restore({"model": model}) is not None
    share = 0
    for name, parameter in model.named_parameters():
        shown: Any = parameter
        reference = distribute_tensor(expected[name], mesh, shown.placements)
        assert torch.equal(shown.to_local(), reference.to_local()), name
        share += shown.to_local().nbytes
    return {"read": sum(lengths), "share": share, "runs": len(expected)}


def restore_rows(root: str, component: str, kind: str) -> dict[str, int]:
    """Restore columns of all rows, or of some."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    if kind == "columns":
        mesh, placements, runs = init_device_mesh("cpu", (4,)), [Shard(1)], 4
    else:
        mesh, placements, runs = init_device_mesh("cpu", (2, 2)), [Shard(0), Shard(1)], 2
    shape = WIDE if component == "wide" else TALL
    target = distribute_tensor(torch.zeros(shape, dtype=torch.int32), mesh, placements)
    with CheckpointManager(root, settings=QUICK) as ckpts:
        lengths = _counted(ckpts)
        assert ckpts.restore({component: target}) is not None
    assert torch.equal(target.to_local(), distribute_tensor(rows(shape), mesh, placements).to_local())
    return {"read": sum(lengths), "share": target.to_local().nbytes, "runs": runs}
