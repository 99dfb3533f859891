"""What the ranks of a job do with PyTorch's own ``dcp.save`` and ``dcp.load``: each function runs on every rank."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from cloudckpt import Settings, StorageError
from cloudckpt.dcp import StorageReader, StorageWriter
from cloudckpt.storage import LocalStorage
from tests.distributed.scenarios import digest
from tests.distributed.sharded import filled, full, meshed, sharded

#: Any: the package imports its names without exporting them.
dcp: Any = torch.distributed.checkpoint

QUICK = Settings(retry_base_s=0.01, retry_cap_s=0.05)


def _digests(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, str]:
    return {"model": digest(full(model.state_dict())), "optimizer": digest(full(optimizer.state_dict()["state"]))}


def save(root: str, kind: str, ranks: int, how: str = "save") -> dict[str, Any] | None:
    """Save a model and its optimizer from the first so many ranks, by the names that PyTorch gives them."""
    group, mesh = meshed(ranks)
    if dist.get_rank() >= ranks:
        return None
    model, optimizer = sharded(kind, mesh, seed=3)
    filled(model, optimizer, 3)
    weights, moments = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": moments, "step": 3, "options": {"lr": (0.1, 0.2)}}
    writer = StorageWriter(root, step=3, metrics={"loss": 0.5}, settings=QUICK)
    found = _digests(model, optimizer)
    if how == "async_save":
        future = dcp.async_save(state, storage_writer=writer, process_group=group)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        getattr(future, "upload_completion", future).result()
    else:
        dcp.save(state, storage_writer=writer, process_group=group)
    assert writer.checkpoint is not None
    return {"name": writer.checkpoint.name, **found}


def load(root: str, kind: str, ranks: int) -> dict[str, Any] | None:
    """Load it on the first so many ranks, into fresh objects."""
    group, mesh = meshed(ranks)
    if dist.get_rank() >= ranks:
        return None
    model, optimizer = sharded(kind, mesh, seed=4)
    weights, moments = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": moments}
    reader = StorageReader(root, settings=QUICK)
    dcp.load(state, storage_reader=reader, process_group=group)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    assert reader.checkpoint is not None
    return {"name": reader.checkpoint.name, **_digests(model, optimizer)}


def save_and_load_stages(root: str) -> dict[str, Any]:
    """Pipeline stages: each rank has layers, and values, that no other has; all have some in common."""
    rank = dist.get_rank()
    state: dict[str, Any] = {
        "model": {"shared": torch.ones(3), f"layers.{rank}.weight": torch.full((4, 4), float(rank))},
        "options": {"all": 1, f"stage-{rank}": {"lr": 0.1 * (rank + 1), "seen": (rank, torch.full((2,), rank))}},
    }
    dcp.save(state, storage_writer=StorageWriter(root, step=1, settings=QUICK))
    fresh: dict[str, Any] = {
        "model": {"shared": torch.zeros(3), f"layers.{rank}.weight": torch.zeros(4, 4)},
        "options": {"all": 0, f"stage-{rank}": {"lr": 0.0, "seen": ()}},
    }
    dcp.load(fresh, storage_reader=StorageReader(root, settings=QUICK))
    return {"same": digest(fresh) == digest(state)}


class _Full(LocalStorage):
    """A disk that is full for payload."""

    def put(self, key: str, buffers: Any, *, size_bytes: int, progress: Any = None) -> None:
        if key.endswith(".safetensors"):
            raise StorageError(f"{key}: No space left on device")
        super().put(key, buffers, size_bytes=size_bytes, progress=progress)


def one_rank_cannot(root: str, bad_rank: int, how: str) -> dict[str, Any]:
    """One rank fails at some moment of a save; afterwards all of them save again."""
    rank = dist.get_rank()
    state: dict[str, Any] = {"x": {f"part-{rank}": torch.full((1000,), float(rank))}, "y": {f"of-{rank}": rank}}
    dcp.save(state, storage_writer=StorageWriter(root, step=0, settings=QUICK))
    bad = rank == bad_rank
    place: Any = _Full(root) if bad and how == "upload" else root
    broken = {**state, "y": {f"of-{rank}": threading.Lock()}} if bad and how == "value" else state
    said: dict[int, str] = {}
    try:
        dcp.save(broken, storage_writer=StorageWriter(place, step=1, settings=QUICK))
    except CheckpointException as exc:
        said = {number: f"{type(error).__name__}: {error}" for number, (error, _) in exc.failures.items()}
    dist.barrier()
    committed = sorted(name for name in os.listdir(root) if name.startswith("checkpoint-0."))  # noqa: PTH208 - words are JSON
    dcp.save(state, storage_writer=StorageWriter(root, step=2, settings=QUICK))
    return {"said": {str(number): text for number, text in said.items()}, "committed": len(committed)}


def folders_that_are_not_shared(root: str) -> str:
    """As on nodes with disks of their own: each rank has another working directory."""
    own = os.path.join(root, f"node-{dist.get_rank()}")  # noqa: PTH118 - the scenario's words are JSON
    os.makedirs(own)  # noqa: PTH103 - as above
    before = os.getcwd()  # noqa: PTH109 - as above
    os.chdir(own)
    try:
        state = {"x": {str(dist.get_rank()): torch.ones(4)}}
        dcp.save(state, storage_writer=StorageWriter("./runs", step=1, settings=QUICK))
        return ""
    except CheckpointException as exc:
        return "; ".join(f"{type(error).__name__}: {error}" for error, _ in exc.failures.values())
    finally:
        os.chdir(before)


def choices_that_differ(root: str, odd_rank: int) -> dict[str, Any]:
    """One rank finds another checkpoint than the others do."""
    for step in (1, 2):
        dcp.save({"x": torch.full((8,), float(step))}, storage_writer=StorageWriter(root, step=step, settings=QUICK))
    state = {"x": torch.zeros(8)}
    select = 1 if dist.get_rank() == odd_rank else "latest"
    said = ""
    try:
        dcp.load(state, storage_reader=StorageReader(root, select, settings=QUICK))
    except CheckpointException as exc:
        said = "; ".join(f"{type(error).__name__}: {error}" for error, _ in exc.failures.values())
    return {"said": said, "changed": bool(state["x"].any())}


def steps_that_differ(root: str, odd_rank: int) -> str:
    """One rank saves another step than the others do."""
    try:
        writer = StorageWriter(root, step=7 if dist.get_rank() == odd_rank else 1, settings=QUICK)
        dcp.save({"x": {str(dist.get_rank()): torch.ones(4)}}, storage_writer=writer)
        return ""
    except CheckpointException as exc:
        return "; ".join(f"{rank}: {type(error).__name__}: {error}" for rank, (error, _) in exc.failures.items())


class _Deadly(LocalStorage):
    """A disk that kills whoever writes payload to it."""

    def put(self, key: str, buffers: Any, *, size_bytes: int, progress: Any = None) -> None:
        if key.endswith(".safetensors"):
            os.kill(os.getpid(), signal.SIGKILL)
        super().put(key, buffers, size_bytes=size_bytes, progress=progress)


def die_in_upload(root: str, victim: int) -> str:
    """One rank is killed with SIGKILL while all of them upload."""
    state = {"x": {str(dist.get_rank()): torch.ones(1000)}}
    dcp.save(state, storage_writer=StorageWriter(root, step=0, settings=QUICK))
    place: Any = _Deadly(root) if dist.get_rank() == victim else root
    try:
        dcp.save(state, storage_writer=StorageWriter(place, step=1, settings=QUICK))
        return ""
    except Exception as exc:
        return type(exc).__name__
