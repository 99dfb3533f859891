"""Programs that the tests of copies beside training start as processes: ``overlap_worker.py NAME FILE [RANK]``."""

from __future__ import annotations

import atexit
import hashlib
import os
import sys
import threading
from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from cloudckpt.errors import SaveError
from cloudckpt.tensors.memory import copy_bits
from cloudckpt.tensors.overlap import Copying, Snapshot, begin, why_not

SHAPE = (512, 512)


def digest(tensor: torch.Tensor) -> str:
    """The SHA-256 of its elements."""
    return hashlib.sha256(tensor.detach().contiguous().numpy().tobytes()).hexdigest()


def shared(path: str) -> torch.Tensor:
    """Memory that outlives this process."""
    return torch.from_file(path, shared=True, size=SHAPE[0] * SHAPE[1], dtype=torch.float32).view(SHAPE)


def trained() -> tuple[nn.Linear, torch.optim.Optimizer]:
    """A model and its optimizer after one step."""
    torch.manual_seed(1)
    model = nn.Linear(SHAPE[1], SHAPE[0], bias=False)
    optimizer = torch.optim.AdamW(model.parameters())
    step(model, optimizer)
    return model, optimizer


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Forward, backward, step."""
    model(torch.randn(8, SHAPE[1])).square().mean().backward()
    optimizer.step()


def leave(path: str) -> None:
    """End while a copy is held back by a thread that lets it go when the interpreter waits for its threads."""
    model, optimizer = trained()
    held = threading.Event()

    def when_main_has_ended() -> None:
        threading.main_thread().join()
        held.set()

    threading.Thread(target=when_main_has_ended).start()

    def copy(copying: Copying) -> None:
        assert held.wait(60)
        copy_bits(copying.target, copying.source)

    print(digest(model.weight))
    begin([Copying(path="w", source=model.weight, target=shared(path))], [optimizer], copy=copy)


def leave_late(path: str) -> None:
    """Save from a handler that runs when the interpreter is on its way out."""
    model, optimizer = trained()

    def last_words() -> None:
        print(digest(model.weight))
        begin([Copying(path="w", source=model.weight, target=shared(path))], [optimizer]).wait(60)

    atexit.register(last_words)


def fork(path: str) -> None:
    """Fork while a copy is held; the child steps the same optimizer, and saves by itself."""
    torch.set_num_threads(1)  # OpenMP's own threads do not survive a fork
    model, optimizer = trained()
    held = threading.Event()

    def copy(copying: Copying) -> None:
        assert held.wait(60)
        copy_bits(copying.target, copying.source)

    before = digest(model.weight)
    target = torch.zeros(SHAPE)
    snapshot = begin([Copying(path="w", source=model.weight, target=target)], [optimizer], copy=copy)
    child = os.fork()
    if child == 0:
        model.weight.grad = torch.ones(SHAPE)
        optimizer.step()
        print(digest(model.weight), flush=True)
        begin([Copying(path="w", source=model.weight, target=shared(path))], [optimizer]).wait(60)
        os._exit(0)
    try:
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0
    finally:
        held.set()  # or the end of this process waits for the copy
    step(model, optimizer)
    snapshot.wait(60)
    assert digest(target) == before != digest(model.weight)


def _exact(tensors: Mapping[str, torch.Tensor], optimizer: torch.optim.Optimizer, go_on: Callable[[], None]) -> None:
    """Copy beside one step, and compare; then write in between, and be told."""
    go, stepped = threading.Event(), threading.Event()

    def copy(copying: Copying) -> None:
        if threading.current_thread() is not threading.main_thread():
            assert go.wait(60)
            stepped.wait(0.02)
        copy_bits(copying.target, copying.source)

    def start() -> tuple[Snapshot, list[Copying]]:
        go.clear()
        stepped.clear()
        copies = [Copying(path=p, source=t, target=torch.zeros(t.shape, dtype=t.dtype)) for p, t in tensors.items()]
        return begin(copies, [optimizer], copy=copy), copies

    assert why_not([optimizer], tensors.values()) is None
    before = {path: digest(t) for path, t in tensors.items()}
    snapshot, copies = start()
    assert not snapshot.done()
    go.set()
    go_on()
    stepped.set()
    snapshot.wait(60)
    assert {c.path: digest(c.target) for c in copies} == before
    assert any(digest(t) != before[path] for path, t in tensors.items())

    snapshot, _ = start()
    with torch.no_grad():
        optimizer.param_groups[0]["params"][0].add_(1)
    go.set()
    go_on()
    try:
        snapshot.wait(60)
    except SaveError as exc:
        assert "weight" in str(exc), exc
    else:
        raise AssertionError("a change was not seen")


def _local(tensor: torch.Tensor) -> torch.Tensor:
    assert isinstance(tensor, DTensor)
    local: torch.Tensor = DTensor.to_local(tensor)
    return local.detach()


def parallel(path: str, rank: int) -> None:
    """DistributedDataParallel, and a DTensor with its local parts, among two processes."""
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(path, 2),  # type: ignore[attr-defined]  # its stub forgets it
        rank=rank,
        world_size=2,
    )
    model = nn.parallel.DistributedDataParallel(nn.Linear(SHAPE[1], SHAPE[0]))
    optimizer = torch.optim.AdamW(model.parameters())
    step(model, optimizer)
    state = optimizer.state[model.module.weight]
    _exact(
        {"weight": model.module.weight.detach(), "exp_avg": state["exp_avg"]}, optimizer, lambda: step(model, optimizer)
    )

    mesh = init_device_mesh("cpu", (2,))
    for placement in (Shard(0), Replicate()):
        weight = nn.Parameter(distribute_tensor(torch.ones(SHAPE), mesh, [placement]))
        sharded = torch.optim.AdamW([weight], lr=0.1)

        def go_on(weight: nn.Parameter = weight, sharded: torch.optim.Optimizer = sharded) -> None:
            weight.grad = distribute_tensor(torch.full(SHAPE, 0.5), mesh, [placement])  # noqa: B023 - used within
            sharded.step()

        go_on()
        local = {"weight": _local(weight), "exp_avg": _local(sharded.state[weight]["exp_avg"])}
        _exact(local, sharded, go_on)
    dist.destroy_process_group()


if __name__ == "__main__":
    name, file, *more = sys.argv[1:]
    if name == "parallel":
        parallel(file, int(more[0]))
    else:
        {"leave": leave, "leave_late": leave_late, "fork": fork}[name](file)
