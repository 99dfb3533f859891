"""What the ranks do in the tests of resharding: one run, saved under one parallelism after the other."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
import torch.distributed as dist

from cloudckpt import CheckpointManager, TrainState
from tests.distributed.scenarios import QUICK, digest

#: Name -> the shape of its mesh. Each one's place in here is the step under which it is saved.
KINDS = {
    "plain-1": (1,),
    "ddp-2": (2,),
    "ddp-4": (4,),
    "fsdp2-1": (1,),
    "fsdp2-2": (2,),
    "fsdp2-4": (4,),
    "tp-1": (1,),
    "tp-2": (2,),
    "tp-4": (4,),
    "fsdp2+tp-2x2": (2, 2),
    "hsdp-2x2": (2, 2),
}


@functools.cache
def _meshed(shape: tuple[int, ...]) -> tuple[Any, Any]:
    """A process group and a mesh of the first so many ranks. Every rank takes part in making them."""
    from torch.distributed.device_mesh import DeviceMesh

    if len(shape) == 2:
        return dist.group.WORLD, DeviceMesh("cpu", torch.arange(4).view(shape), mesh_dim_names=("outer", "inner"))
    (size,) = shape
    return dist.new_group(list(range(size))), DeviceMesh("cpu", list(range(size)))


def _trainable(kind: str, seed: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """A model and its optimizer under a parallelism. The last layer's seven rows divide by no number of ranks."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
    from torch.nn.parallel import DistributedDataParallel

    torch.manual_seed(seed)
    model: torch.nn.Module = torch.nn.Sequential(
        torch.nn.Linear(48, 104), torch.nn.ReLU(), torch.nn.Linear(104, 12), torch.nn.Linear(12, 7)
    )
    group, mesh = _meshed(KINDS[kind])
    name = kind.rpartition("-")[0]
    if "tp" in name.split("+"):
        within = mesh["inner"] if mesh.ndim == 2 else mesh
        parallelize_module(model, within, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    if "fsdp2" in name.split("+"):
        fully_shard(model, mesh=mesh["outer"] if mesh.ndim == 2 else mesh)
    elif name == "hsdp":
        fully_shard(model, mesh=mesh)
    elif name == "ddp":
        model = DistributedDataParallel(model, process_group=group)
    # Not all at once: parameters on meshes of one dimension and of two cannot be mixed in one operation.
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False)


def _step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Steps with made-up gradients, which need no forward."""
    for step in range(steps):
        for number, parameter in enumerate(model.parameters()):
            parameter.grad = (parameter.detach() * 0.5 + 0.01 * (number + step)).clone()
        optimizer.step()


def _whole(state: Any) -> Any:
    """The same with all tensors whole."""
    if isinstance(state, dict):
        return {key: _whole(value) for key, value in state.items()}
    if isinstance(state, torch.Tensor) and hasattr(state, "full_tensor"):
        return state.full_tensor()
    return state


def _digests(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, str]:
    plain = getattr(model, "module", model)
    return {"model": digest(_whole(plain.state_dict())), "moments": digest(_whole(optimizer.state_dict()["state"]))}


def _state(model: torch.nn.Module, optimizer: torch.optim.Optimizer, given: str) -> Any:
    if given == "train-state":
        return TrainState(model, optimizer)
    return {"model": getattr(model, "module", model), "optimizer": optimizer}


def save_each(root: str, given: str) -> dict[str, dict[str, str]]:
    """Save under every parallelism, each as one step, from the ranks that it has; what each saved, on rank zero."""
    found = {}
    for step, (kind, shape) in enumerate(KINDS.items()):
        group, mesh = _meshed(shape)
        if dist.get_rank() >= mesh.size():
            continue
        model, optimizer = _trainable(kind, seed=step)
        _step(model, optimizer, 3)
        with CheckpointManager(root, keep_last=None, settings=QUICK, process_group=group) as ckpts:
            ckpts.save(step, _state(model, optimizer, given)).wait(30)
        found[kind] = _digests(model, optimizer)
    return found


def restore_each(root: str, given: str, kind: str) -> dict[str, dict[str, str]]:
    """Restore what every parallelism saved, into fresh objects under one; what came back."""
    group, mesh = _meshed(KINDS[kind])
    found: dict[str, dict[str, str]] = {}
    if dist.get_rank() >= mesh.size():
        return found
    with CheckpointManager(root, keep_last=None, settings=QUICK, process_group=group) as ckpts:
        for step, saved in enumerate(KINDS):
            model, optimizer = _trainable(kind, seed=100)
            restored = ckpts.restore(_state(model, optimizer, given), select=step)
            assert restored is not None
            assert restored.step == step
            found[saved] = _digests(model, optimizer)
    return found


def _under_fsdp1(ranks: int, seed: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """The same model under FSDP1, which gives ShardedTensors."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    torch.manual_seed(seed)
    plain = torch.nn.Sequential(
        torch.nn.Linear(48, 104), torch.nn.ReLU(), torch.nn.Linear(104, 12), torch.nn.Linear(12, 7)
    )
    group, _ = _meshed((ranks,))
    model = FullyShardedDataParallel(plain, process_group=group, device_id=torch.device("cpu"), use_orig_params=True)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False)


def save_in_turns(root: str, turns: list[tuple[str, int]]) -> None:
    """One state goes from parallelism to parallelism, on so many ranks each; each saves what it has restored.

    The first two turns make the same state, each for itself.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of FSDP1 and of ShardedTensor
        for step, (name, ranks) in enumerate(turns):
            group, _ = _meshed((ranks,))
            if dist.get_rank() >= ranks:
                continue
            first = step < 2
            kind = "plain-1" if name == "plain" else f"fsdp2-{ranks}"
            seed = 5 if first else 100 + step
            model, optimizer = _under_fsdp1(ranks, seed) if name == "fsdp1" else _trainable(kind, seed)
            with CheckpointManager(root, keep_last=None, settings=QUICK, process_group=group) as ckpts:
                if first:
                    _step(model, optimizer, 3)
                else:
                    assert ckpts.restore(TrainState(model, optimizer), select=step - 1) is not None
                ckpts.save(step, TrainState(model, optimizer)).wait(30)


def restore_shards_in_a_dict(root: str) -> list[bool]:
    """ShardedTensors that stand in a dict are saved and restored in place, also on a rank without any rows."""
    from torch.distributed._shard import sharded_tensor
    from torch.distributed._shard.sharding_spec import ChunkShardingSpec

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        spec = ChunkShardingSpec(dim=0, placements=[f"rank:{rank}/cpu" for rank in range(4)])
        tensor: Any = sharded_tensor.rand(spec, 5, 3)  # 2, 2, 1 and no rows
        before = [shard.tensor.clone() for shard in tensor.local_shards()]
        with CheckpointManager(root, settings=QUICK) as ckpts:
            ckpts.save(1, {"x": {"sharded": tensor, "plain": 3}}).wait(30)
            for shard in tensor.local_shards():
                shard.tensor.zero_()
            ckpts.restore({"x": {"sharded": tensor, "plain": 0}})
    return [torch.equal(a, shard.tensor) for a, shard in zip(before, tensor.local_shards(), strict=True) if a.numel()]
