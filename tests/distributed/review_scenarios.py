"""What the ranks of a job do in the tests of a review: each function runs on every rank.

(Past 350 lines: a table of scenarios, each on its own.)
"""

from __future__ import annotations

import contextlib
import gc
import logging
import time
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from cloudckpt import CheckpointManager, PerRank, Settings, TrainState

QUICK = Settings(coordination_timeout_s=5, retry_base_s=0.01, retry_cap_s=0.05)


def _said(act: Any) -> str:
    try:
        act()
    except BaseException as exc:
        return f"{type(exc).__name__}: {exc}"
    return ""


def _storage(ckpts: CheckpointManager) -> Any:
    storage: Any = ckpts._store.storage
    return getattr(storage, "inner", storage)


def _read_from(ckpts: CheckpointManager) -> set[str]:
    """The numbers of the ranks whose payload objects are read from now on, as they come."""
    read: set[str] = set()
    inner = _storage(ckpts)
    read_into = inner.read_into

    def noted(key: str, *words: Any, **named: Any) -> Any:
        read.add(key.split("-of-", maxsplit=1)[0][-5:])
        return read_into(key, *words, **named)

    inner.read_into = noted
    return read


def upload_fails_after_the_others(root: str) -> dict[str, Any]:
    """Rank one fails to upload while rank zero, which has nothing to upload, waits for its report."""
    rank = dist.get_rank()
    state = {"m": {"a": torch.ones(8)} if rank else {}}
    ckpts = CheckpointManager(root, settings=QUICK)
    if rank:
        inner = _storage(ckpts)

        def failing(key: str, *_: Any, **__: Any) -> None:
            raise OSError(28, "No space left on device", key)

        inner.put = failing
    pending = ckpts.save(1, state)
    said = _said(lambda: pending.wait(15))
    if not said.startswith("Timeout"):
        with contextlib.suppress(Exception):
            ckpts.close()
    return {"said": said}


class Holder:
    """Gives a fresh copy at every save, as many samplers and EMA wrappers do."""

    def __init__(self) -> None:
        self.given: list[weakref.ref[torch.Tensor]] = []

    def state_dict(self) -> dict[str, Any]:
        copy = torch.ones(1000)
        self.given.append(weakref.ref(copy))
        return {"copy": copy}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing is kept."""


def copies_left(root: str, saves: int) -> dict[str, Any]:
    """How many states of ended saves are still in memory."""
    held = Holder()
    with CheckpointManager(root, settings=QUICK) as ckpts:
        for step in range(saves):
            ckpts.save(step, {"held": PerRank(held)}).wait(30)
        gc.collect()
        alive = sum(ref() is not None for ref in held.given)
        channel: Any = ckpts._coordinator._channel  # type: ignore[attr-defined]  # many ranks have one
        sizes = {
            "watchers": len(channel._watchers),
            "unwanted": len(channel._unwanted),
            "letters": len(channel._letters),
        }
    return {"alive": alive, **sizes}


def save_state(root: str, which: str) -> dict[str, Any]:
    """Save a made-up state, and restore it; what either says."""
    rank = dist.get_rank()

    def state(filled: bool) -> dict[str, Any]:
        own = {"n": rank if filled else -1}
        if which == "tuple":
            return {"x": (PerRank(own), 1)}
        if which == "one rank only":
            return {"x": {"all": 1, **({"rng": PerRank(own)} if rank else {})}}
        if which == "lists":
            return {"x": [PerRank({**own}) for _ in range(1 + rank)]}
        if which == "stages in a tuple":
            return {"x": ({f"stage{rank}": torch.full((2,), float(rank)) if filled else torch.zeros(2)}, 1)}
        raise ValueError(which)

    found: dict[str, Any] = {}
    with CheckpointManager(root, settings=QUICK) as ckpts:
        found["saved"] = _said(lambda: ckpts.save(1, state(True)).wait(30))
    with CheckpointManager(root, settings=QUICK) as ckpts:
        found["restored"] = _said(lambda: ckpts.restore(state(False)))
    return found


def index_unreadable_for_one(root: str) -> dict[str, Any]:
    """Rank one's network fails while it reads the index."""
    rank = dist.get_rank()
    with CheckpointManager(root, settings=QUICK) as ckpts:
        ckpts.save(1, {"x": torch.ones(4)}).wait(30)
    ckpts = CheckpointManager(root, settings=QUICK)
    inner = _storage(ckpts)
    if rank:
        read = inner.read

        def failing(key: str, *words: Any, **named: Any) -> Any:
            if key.endswith("checkpoint.json"):
                raise PermissionError(13, "no permission for the index", key)
            return read(key, *words, **named)

        inner.read = failing
    began = time.monotonic()
    said = _said(lambda: ckpts.restore({"x": torch.zeros(4)}))
    took = time.monotonic() - began
    with contextlib.suppress(Exception):
        ckpts.close()
    return {"said": said, "took": took}


class Refusing:
    """Refuses its state on one rank."""

    def state_dict(self) -> dict[str, Any]:
        return {"n": 1}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if dist.get_rank():
            raise ValueError("the data set has another length on this node")


def refused_by_one(root: str) -> dict[str, Any]:
    """An object of rank one refuses what was stored for it."""
    with CheckpointManager(root, settings=QUICK) as ckpts:
        ckpts.save(1, {"x": PerRank(Refusing())}).wait(30)
    ckpts = CheckpointManager(root, settings=QUICK)
    said = _said(lambda: ckpts.restore({"x": PerRank(Refusing())}))
    _said(ckpts.close)
    return {"said": said}


def manifest_unreadable_at_second_restore(root: str) -> dict[str, Any]:
    """Rank zero cannot read the manifest when the loop goes back."""
    rank = dist.get_rank()
    ckpts = CheckpointManager(root, settings=QUICK)
    ckpts.save(1, {"x": torch.ones(4)}).wait(30)
    if rank == 0:
        store: Any = ckpts._store

        def failing() -> Any:
            raise PermissionError(13, "no permission for the manifest")

        store.read = failing
    began = time.monotonic()
    said = _said(lambda: ckpts.restore({"x": torch.zeros(4)}))
    took = time.monotonic() - began
    _said(ckpts.close)
    return {"said": said, "took": took}


def protecting_fails(root: str) -> dict[str, Any]:
    """Rank zero cannot write down which checkpoint was restored."""
    rank = dist.get_rank()
    with CheckpointManager(root, settings=QUICK) as ckpts:
        for step in (1, 2):
            ckpts.save(step, {"x": torch.ones(4)}).wait(30)
    ckpts = CheckpointManager(root, settings=QUICK)
    if rank == 0:
        transact = ckpts._store.transact
        store: Any = ckpts._store

        def failing(*words: Any, **named: Any) -> Any:
            if ckpts._saver is not None:
                raise PermissionError(13, "no permission to write the manifest")
            return transact(*words, **named)

        store.transact = failing
    said = _said(lambda: ckpts.restore({"x": torch.zeros(4)}, 1))
    _said(ckpts.close)
    return {"said": said}


def slow_deletes(root: str) -> dict[str, Any]:
    """Rank zero deletes old checkpoints for longer than twice the timeout, while the next save is called."""
    rank = dist.get_rank()
    settings = Settings(coordination_timeout_s=1, retry_base_s=0.01, retry_cap_s=0.05)
    ckpts = CheckpointManager(root, keep_last=1, settings=settings)
    ckpts.save(1, {"x": torch.ones(4)}).wait(30)
    if rank == 0:
        saver: Any = ckpts._saver
        recorder = saver._side._recorder
        clean_up = recorder.clean_up

        def slow() -> None:
            time.sleep(4)
            clean_up()

        recorder.clean_up = slow
    ckpts.save(2, {"x": torch.ones(4)})
    found: list[Any] = []
    said = _said(lambda: found.append(ckpts.save(3, {"x": torch.ones(4)})))
    ended = _said(lambda: found[0].wait(10)) if found else ""
    _said(ckpts.close)
    return {"said": said, "ended": ended}


def tied_and_uneven(root: str) -> dict[str, Any]:
    """Tied distributed tensors with fewer rows than would fill all ranks."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = DeviceMesh("cpu", list(range(dist.get_world_size())))
    weight = distribute_tensor(torch.arange(10.0).reshape(5, 2), mesh, [Shard(0)])
    with CheckpointManager(root, settings=QUICK) as ckpts:
        said = _said(lambda: ckpts.save(1, {"m": {"a": weight, "b": weight}}).wait(30))
    return {"said": said}


def partial(root: str) -> dict[str, Any]:
    """A distributed tensor whose ranks hold summands."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Partial

    mesh = DeviceMesh("cpu", list(range(dist.get_world_size())))
    value = DTensor.from_local(torch.ones(4), mesh, [Partial()])
    whole = value.full_tensor().tolist()
    with CheckpointManager(root, settings=QUICK) as ckpts:
        said = _said(lambda: ckpts.save(1, {"m": {"a": value}}).wait(30))
    return {"said": said, "whole": whole}


def drift_between_groups(root: str) -> dict[str, Any]:
    """HSDP: two copies of two shards; a plain buffer drifts apart between the shards, after the first save."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("r", "s"))
    weight = distribute_tensor(torch.arange(8.0).reshape(4, 2), mesh, [Replicate(), Shard(0)])
    buffer = torch.zeros(4)
    settings = Settings(coordination_timeout_s=20, check_replicas="full")
    with CheckpointManager(root, settings=settings) as ckpts:
        first = _said(lambda: ckpts.save(1, {"m": {"w": weight, "buf": buffer}}).wait(30))
        buffer += rank % 2
        second = _said(lambda: ckpts.save(2, {"m": {"w": weight, "buf": buffer}}).wait(30))
    return {"first": first, "second": second}


def outside_of_the_group(root: str) -> dict[str, Any]:
    """Ranks two and three save a distributed tensor that only zero and one hold."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Shard, distribute_tensor

    rank = dist.get_rank()
    group = dist.new_group([2, 3])
    mesh = DeviceMesh("cpu", [0, 1])
    weight = distribute_tensor(torch.arange(8.0).reshape(4, 2), mesh, [Shard(0)])
    said = ""
    if rank >= 2:
        with CheckpointManager(root, process_group=group, settings=QUICK) as ckpts:
            said = _said(lambda: ckpts.save(1, {"m": {"w": weight, "x": torch.ones(2)}}).wait(30))
    return {"said": said}


def strided_and_uneven(root: str) -> dict[str, Any]:
    """FSDP over tensor parallelism, with a number of rows that neither divides."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 7, bias=True))
    whole = {name: value.detach().clone().tolist() for name, value in model.state_dict().items()}
    parallelize_module(model, mesh["tp"], {"0": ColwiseParallel()})
    fully_shard(model, mesh=mesh["dp"])
    with CheckpointManager(root, settings=QUICK) as ckpts:
        said = _said(lambda: ckpts.save(1, {"m": model}).wait(30))
    return {"said": said, "whole": whole}


def _stages(*numbers: int, lrs: Sequence[float]) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """Some stages of a pipeline, each with a learning rate of its own, after a step."""
    torch.manual_seed(sum(numbers))
    model = torch.nn.ModuleDict({f"layer{n}": torch.nn.Linear(2, 2) for n in numbers})
    groups = [{"params": [*model[f"layer{n}"].parameters()], "lr": lr} for n, lr in zip(numbers, lrs, strict=True)]
    optimizer = torch.optim.AdamW(groups)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return model, optimizer


def stages_with_options(root: str) -> dict[str, Any]:
    """Pipeline stages, each with an optimizer of its own and a learning rate of its own."""
    rank = dist.get_rank()
    stage, optimizer = _stages(rank, lrs=[[0.25, 0.125][rank]])
    with CheckpointManager(root, settings=QUICK) as ckpts:
        saved = _said(lambda: ckpts.save(1, TrainState(stage, optimizer)).wait(30))
    stage, optimizer = _stages(rank, lrs=[0.5])
    whole, of_whole = _stages(0, 1, lrs=[0.5, 0.5])
    whole.zero_grad()
    one = torch.optim.AdamW(whole.parameters(), lr=0.5)
    with CheckpointManager(root, settings=QUICK) as ckpts:
        restored = _said(lambda: ckpts.restore(TrainState(stage, optimizer)))
        ckpts.restore(TrainState(whole, of_whole))
        said = _said(lambda: ckpts.restore(TrainState(whole, one)))
    return {
        "saved": saved,
        "restored": restored,
        "lr": optimizer.param_groups[0].get("lr"),
        "whole": [group["lr"] for group in of_whole.param_groups],
        "one": said,
    }


@contextlib.contextmanager
def _warnings() -> Iterator[list[str]]:
    """What cloudckpt warns of in this process meanwhile."""
    told: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            told.append(record.getMessage())

    handler = Keep(logging.WARNING)
    logging.getLogger("cloudckpt").addHandler(handler)
    try:
        yield told
    finally:
        logging.getLogger("cloudckpt").removeHandler(handler)


def lists_of_different_lengths(root: str) -> dict[str, Any]:
    """Rank n has n + 1 schedules, in a list."""
    rank = dist.get_rank()
    with _warnings() as told, CheckpointManager(root, settings=QUICK) as ckpts:
        saved = _said(lambda: ckpts.save(1, {"x": {"schedules": [0.5] * (rank + 1)}}).wait(30))
    return {"saved": saved, "told": sum("x.schedules has another value" in text for text in told)}


class Interrupted:
    """Ctrl-C reaches every process of the job."""

    def state_dict(self) -> dict[str, Any]:
        raise KeyboardInterrupt

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing."""


def interrupted_everywhere(root: str) -> dict[str, Any]:
    """Every rank gets Ctrl-C while it looks at its state."""
    ckpts = CheckpointManager(root, settings=QUICK)
    said = _said(lambda: ckpts.save(1, {"x": Interrupted()}))
    _said(ckpts.close)
    return {"said": said}


def keys_move(root: str) -> dict[str, Any]:
    """A stage's dict with int keys gets another key."""
    rank = dist.get_rank()
    with CheckpointManager(root, settings=QUICK) as ckpts:
        ckpts.save(1, {"x": {0: "zero"}}).wait(30)
        said = _said(lambda: ckpts.save(2, {"x": {rank: "own"}}).wait(30))
    return {"said": said}


def report_everywhere(root: str) -> dict[str, Any]:
    """Every rank calls the same lines."""
    with CheckpointManager(root, settings=QUICK) as ckpts:
        ckpts.save(1, {"x": torch.ones(4)}).wait(30)
        dist.barrier()
        before = ckpts.manifest().revision
        dist.barrier()
        ckpts.report_metrics(1, {"loss": 0.5})
        ckpts.pin(1)
        ckpts.tag(1, "release")
        dist.barrier()
        after = ckpts.manifest().revision
        dist.barrier()
    return {"writes": after - before}


def blocks_on_one(root: str) -> dict[str, Any]:
    """With on_busy="skip", rank one saves with block=True while a save is in flight."""
    rank = dist.get_rank()
    settings = Settings(coordination_timeout_s=2, on_busy="skip")
    ckpts = CheckpointManager(root, settings=settings)
    ckpts.save(1, {"x": PerRank(torch.ones(4))}).wait(30)
    inner = _storage(ckpts)
    put = inner.put

    def slow(key: str, *words: Any, **named: Any) -> Any:
        while not Path(f"{root}.go").exists():
            time.sleep(0.05)
        return put(key, *words, **named)

    inner.put = slow
    ckpts.save(2, {"x": PerRank(torch.ones(4))})
    steps: list[int] = []
    said = _said(lambda: steps.append(ckpts.save(3, {"x": PerRank(torch.ones(4))}, block=bool(rank)).checkpoint.step))
    if rank == 0:
        Path(f"{root}.go").touch()
    _said(ckpts.close)
    return {"said": said, "steps": steps}


def no_state_on_one(root: str) -> dict[str, Any]:
    """Rank one gives None for a state."""
    rank = dist.get_rank()
    ckpts = CheckpointManager(root, settings=QUICK)
    state: Any = None if rank else {"x": torch.ones(4)}
    began = time.monotonic()
    said = _said(lambda: ckpts.save(1, state))
    took = time.monotonic() - began
    dist.barrier()
    _said(ckpts.close)
    return {"said": said, "took": took}


def letters_after_failures(root: str) -> dict[str, Any]:
    """Saves that fail on rank zero while it uploads; what is left in the mailboxes."""
    rank = dist.get_rank()
    ckpts = CheckpointManager(root, settings=QUICK)
    ckpts.save(0, {"x": torch.ones(4)}).wait(30)
    if rank == 0:

        def failing(key: str, *_: Any, **__: Any) -> None:
            raise OSError(28, "No space left on device", key)

        _storage(ckpts).put = failing
    for step in range(1, 6):
        _said(ckpts.save(step, {"x": PerRank(torch.ones(4))}).wait)
    channel: Any = ckpts._coordinator._channel  # type: ignore[attr-defined]  # many ranks have one
    left = sorted(topic for topic, _ in channel._letters)
    _said(ckpts.close)
    return {"left": left}


def corner_tensors(root: str, in_place: bool, converted: bool) -> dict[str, Any]:
    """Distributed tensors of all sorts, saved and restored."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = DeviceMesh("cpu", list(range(dist.get_world_size())))
    half = DeviceMesh("cpu", [0, 1])

    def made(factor: float, dtype: torch.dtype) -> dict[str, Any]:
        def new(*shape: int) -> torch.Tensor:
            count = int(torch.tensor(shape).prod()) if shape else 1
            return (torch.arange(float(count)).reshape(shape) + 1).mul(factor).to(dtype)

        return {
            "scalar": distribute_tensor(new(), mesh, [Replicate()]),
            "none": distribute_tensor(new(0, 3), mesh, [Shard(0)]),
            "rows": distribute_tensor(new(5, 2), mesh, [Shard(0)]),
            "columns": distribute_tensor(new(3, 5), mesh, [Shard(1)]),
            "copies": distribute_tensor(new(3, 5), mesh, [Replicate()]),
            "half": distribute_tensor(new(4, 2), half, [Shard(0)]),
            "half copies": distribute_tensor(new(4, 2), half, [Replicate()]),
            "turned": distribute_tensor(new(6, 4), mesh, [Shard(0)]).t(),
        }

    settings = Settings(coordination_timeout_s=5, read_in_place=in_place)
    state, fresh = made(1.0, torch.float32), made(0.0, torch.float64 if converted else torch.float32)
    with CheckpointManager(root, settings=settings) as ckpts:
        saved = _said(lambda: ckpts.save(1, {"m": state}).wait(30))
        restored = _said(lambda: ckpts.restore({"m": fresh}))
    differ = [n for n, v in state.items() if not torch.equal(v.to_local(), fresh[n].to_local().to(torch.float32))]
    return {"saved": saved, "restored": restored, "differ": differ}


def untied(root: str, kind: str) -> dict[str, Any]:
    """Saved as one tied tensor; restored into a distributed one and a plain one, or one with other placements."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = DeviceMesh("cpu", list(range(dist.get_world_size())))
    weight = torch.arange(8.0).reshape(4, 2)
    with CheckpointManager(root, settings=QUICK) as ckpts:
        ckpts.save(1, {"m": {"a": weight, "b": weight}}).wait(30)
    first = distribute_tensor(torch.zeros(4, 2), mesh, [Shard(0)])
    other: Any = torch.zeros(4, 2)
    if kind == "replicated":
        other = distribute_tensor(other, mesh, [Replicate()])
    state: Any = {"a": first, "b": other}
    if kind in {"plain in a module", "plain in a train state"}:
        state = torch.nn.Module()
        state.register_buffer("a", first)
        state.register_buffer("b", other)
        state = TrainState(state)["model"] if kind == "plain in a train state" else state
    with CheckpointManager(root, settings=QUICK) as ckpts:
        said = _said(lambda: ckpts.restore({"m": state}))
    local = other.to_local() if kind == "replicated" else other
    return {"said": said, "a": first.full_tensor().tolist(), "b": local.tolist()}


class Loader:
    """An object that declares a part of its own state per rank."""

    def __init__(self) -> None:
        self.state: Any = {"rng": PerRank({"n": dist.get_rank()}), "k": 1}
        self.got: Any = None

    def state_dict(self) -> dict[str, Any]:
        return dict(self.state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.got = repr(state)


def more_ranks_than_parts(root: str) -> dict[str, Any]:
    """Saved by two ranks, restored by four with strict_world_size=False."""
    group = dist.new_group([0, 1])
    if dist.get_rank() < 2:
        with CheckpointManager(root, process_group=group, settings=QUICK) as ckpts:
            ckpts.save(1, {"x": Loader(), "y": {"rng": PerRank(1)}}).wait(30)
    dist.barrier()
    loader = Loader()
    state: dict[str, Any] = {"x": loader, "y": {}}
    with CheckpointManager(root, settings=QUICK) as ckpts:
        said = _said(lambda: ckpts.restore(state, strict_world_size=False, strict=False))
    return {"said": said, "got": loader.got, "y": repr(state["y"])}


def stages_strictly(root: str, kind: str) -> dict[str, Any]:
    """Pipeline stages restore what they saved, as modules or with their optimizers; then some that lack a layer."""
    rank = dist.get_rank()

    def state(stage: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Any:
        return {"model": stage} if kind == "modules" else TrainState(stage, optimizer)

    stage, optimizer = _stages(rank, lrs=[0.25])
    with CheckpointManager(root, settings=QUICK) as ckpts:
        ckpts.save(1, state(stage, optimizer)).wait(30)
    fresh, other = _stages(rank, lrs=[0.25])
    for tensor in fresh.state_dict().values():
        tensor.zero_()
    with CheckpointManager(root, settings=QUICK) as ckpts:
        read = _read_from(ckpts)
        said = _said(lambda: ckpts.restore(state(fresh, other)))
        first, its = _stages(0, lrs=[0.25])
        of_one_only = _said(lambda: ckpts.restore(state(first, its)))
    right = all(torch.equal(value, stage.state_dict()[name]) for name, value in fresh.state_dict().items())
    return {"said": said, "right": right, "read_from": [*read], "own": [f"{rank:05}"], "of one only": of_one_only}


def _layers(*names: str) -> torch.nn.Module:
    return torch.nn.ModuleDict({name: torch.nn.Linear(2, 2) for name in names})


def names_to_spare(root: str, where: str) -> dict[str, Any]:
    """What was saved for rank zero alone has more names than its object has now."""
    rank = dist.get_rank()

    def state(*names: str) -> dict[str, Any]:
        if where == "per rank":
            return {"m": PerRank(_layers(*(names if rank == 0 else ["own"])))}
        return {"m": {f"stage{rank}": _layers(*names)}}

    with CheckpointManager(root, settings=QUICK) as ckpts:
        ckpts.save(1, state("own", "other")).wait(30)
    with CheckpointManager(root, settings=QUICK) as ckpts:
        return {"said": _said(lambda: ckpts.restore(state("own")))}


def experts(root: str) -> dict[str, Any]:
    """Each rank has an expert of its own and the same router, in one group of options."""
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = _layers(f"experts{rank}", "router")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    with _warnings() as told, CheckpointManager(root, settings=QUICK) as ckpts:
        saved = _said(lambda: ckpts.save(1, TrainState(model, optimizer)).wait(30))
    optimizer.zero_grad()
    fresh = torch.optim.AdamW(model.parameters(), lr=0.25)
    with CheckpointManager(root, settings=QUICK) as ckpts:
        restored = _said(lambda: ckpts.restore(TrainState(model, fresh)))
    lr = fresh.param_groups[0]["lr"]
    return {"saved": saved, "restored": restored, "lr": lr, "told": [t for t in told if "another value" in t]}


def damaged_for_one(root: str, step: int | None) -> dict[str, Any]:
    """Rank one reads another index of step 2 than the one that was committed."""
    rank = dist.get_rank()
    with CheckpointManager(root, settings=QUICK) as ckpts:
        for saved in (1, 2):
            ckpts.save(saved, {"x": torch.full((4,), float(saved))}).wait(30)
    x = torch.zeros(4)
    with CheckpointManager(root, settings=QUICK) as ckpts:
        inner = _storage(ckpts)
        read, read_into = inner.read, inner.read_into
        touched: list[str] = []

        def damaged(key: str, *words: Any, **named: Any) -> Any:
            found = read(key, *words, **named)
            wrong = rank and key.startswith("checkpoint-2") and key.endswith("checkpoint.json")
            return replace(found, body=found.body + b" ") if wrong else found

        def noted(key: str, *words: Any, **named: Any) -> Any:
            touched.append(key.partition(".")[0])
            return read_into(key, *words, **named)

        inner.read, inner.read_into = damaged, noted
        said = _said(lambda: ckpts.restore({"x": x}, *([] if step is None else [step])))
    return {"said": said, "x": x.tolist(), "touched": [*dict.fromkeys(touched)]}


class Counting(torch.nn.Linear):
    """Has an array beside its parameters."""

    def get_extra_state(self) -> Any:
        return {"counts": np.arange(5.0)}

    def set_extra_state(self, state: Any) -> None:
        self.counts = state["counts"]


def arrays_of_stages(root: str) -> dict[str, Any]:
    """Each stage has an array of its own."""
    rank = dist.get_rank()
    layer = Counting(2, 2)
    stage = torch.nn.ModuleDict({f"layer{rank}": layer})
    with CheckpointManager(root, settings=QUICK) as ckpts:
        ckpts.save(1, {"model": stage}).wait(30)
    with CheckpointManager(root, settings=QUICK) as ckpts:
        read = _read_from(ckpts)
        said = _said(lambda: ckpts.restore({"model": stage}))
    return {"said": said, "counts": layer.counts.tolist(), "read_from": [*read]}


class Versioned(torch.nn.Linear):
    """Migrates what older versions of it have saved."""

    _version = 7
    read_version: int | None = None

    def _load_from_state_dict(self, state: Any, prefix: str, local_metadata: Any, *words: Any) -> None:
        self.read_version = local_metadata.get("version")
        super()._load_from_state_dict(state, prefix, local_metadata, *words)


def versions_of_stages(root: str) -> dict[str, Any]:
    """Each stage has a module that has a version."""
    rank = dist.get_rank()
    layer = Versioned(2, 2)
    stage = torch.nn.ModuleDict({f"layer{rank}": layer})
    with CheckpointManager(root, settings=QUICK) as ckpts:
        ckpts.save(1, {"model": stage}).wait(30)
    with CheckpointManager(root, settings=QUICK) as ckpts:
        said = _said(lambda: ckpts.restore({"model": stage}))
    return {"said": said, "version": layer.read_version}


def stage_without_parameters(root: str) -> dict[str, Any]:
    """Rank one's stage has nothing to optimize, and a list of no optimizers."""
    model, optimizer = _stages(0, lrs=[0.5])
    state = (
        TrainState(model, [optimizer])
        if dist.get_rank() == 0
        else TrainState(torch.nn.BatchNorm1d(2, affine=False), [])
    )
    with CheckpointManager(root, settings=QUICK) as ckpts:
        saved = _said(lambda: ckpts.save(1, state).wait(30))
    optimizer.param_groups[0]["lr"] = 0.0
    with CheckpointManager(root, settings=QUICK) as ckpts:
        restored = _said(lambda: ckpts.restore(state))
    return {"saved": saved, "restored": restored, "lr": optimizer.param_groups[0]["lr"]}
