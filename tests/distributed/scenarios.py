"""What the ranks of a job do in the tests: each function runs on every rank.

(Past 350 lines: a table of scenarios, each on its own.)
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from cloudckpt import CheckpointManager, PerRank, RankError, Settings

QUICK = Settings(coordination_timeout_s=20, retry_base_s=0.01, retry_cap_s=0.05)


def digest(state: Any) -> str:
    """Of all tensors and values of a state, in order."""
    found = hashlib.sha256()

    def walk(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            found.update(str((value.dtype, tuple(value.shape))).encode())
            found.update(
                value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b""
            )
        elif isinstance(value, dict):
            for key, inner in value.items():
                found.update(repr(key).encode())
                walk(inner)
        elif isinstance(value, list | tuple):
            for inner in value:
                walk(inner)
        else:
            found.update(repr(value).encode())

    walk(state)
    return found.hexdigest()


def model_of(seed: int) -> torch.nn.Module:
    """A small model, the same for equal seeds."""
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))


def trained(seed: int, steps: int = 2) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """A model and its optimizer after some steps, the same on every rank."""
    model = model_of(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(steps):
        torch.manual_seed(1000 + step)
        model(torch.randn(8, 64)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def save_replicated(root: str, saves: int = 1) -> dict[str, Any]:
    """What DDP has: the same state on every rank, and a random generator of each rank's own."""
    model, optimizer = trained(0)
    rank = dist.get_rank()
    own = torch.full((3,), float(rank))
    state = {"model": model, "optimizer": optimizer, "step": 7, "rng": PerRank({"own": own, "rank": rank})}
    with CheckpointManager(root, keep_last=None, settings=QUICK) as ckpts:
        names = [ckpts.save(step, state, metrics={"loss": 1.0}).wait(30).name for step in range(saves)]
    return {"names": names, "model": digest(model.state_dict()), "optimizer": digest(optimizer.state_dict())}


def restore_replicated(root: str) -> dict[str, Any]:
    """The same objects, fresh, and filled."""
    model, optimizer = trained(1, steps=1)
    rank = dist.get_rank()
    mine = {"own": torch.zeros(3), "rank": -1}
    state: dict[str, Any] = {"model": model, "optimizer": optimizer, "step": 0, "rng": PerRank(mine)}
    with CheckpointManager(root, keep_last=None, settings=QUICK) as ckpts:
        found = ckpts.restore(state)
    assert found is not None
    own = state["rng"].value
    assert own["rank"] == rank, own
    assert own["own"].tolist() == [float(rank)] * 3
    assert state["step"] == 7
    return {"name": found.name, "model": digest(model.state_dict()), "optimizer": digest(optimizer.state_dict())}


def save_with_steps(root: str, steps: list[int]) -> str:
    """Every rank saves with a step of its own."""
    with CheckpointManager(root, settings=QUICK) as ckpts:
        return ckpts.save(steps[dist.get_rank()], {"x": torch.ones(4)}).wait(30).name


def save_components(root: str, names: list[list[str]]) -> str:
    """Every rank saves components of its own."""
    with CheckpointManager(root, settings=QUICK) as ckpts:
        return ckpts.save(1, {name: torch.ones(4) for name in names[dist.get_rank()]}).wait(30).name


def one_rank_cannot(root: str, bad_rank: int, how: str) -> dict[str, Any]:
    """One rank fails at some moment of a save; afterwards all of them save again."""
    rank = dist.get_rank()
    state: dict[str, Any] = {"x": torch.arange(100_000, dtype=torch.float32) + rank, "y": torch.ones(5)}
    state = {"x": PerRank(state["x"]), "y": state["y"]}
    said = ""
    began = time.monotonic()
    with CheckpointManager(root, settings=QUICK) as ckpts:
        ckpts.save(0, state).wait(30)
        undo = _break(ckpts, how) if rank == bad_rank else (lambda: None)
        broken = {**state, "y": object()} if how == "plan" and rank == bad_rank else state
        try:
            ckpts.save(1, broken).wait(30)
        except Exception as exc:
            said = f"{type(exc).__name__}: {exc}"
        undo()
        took = time.monotonic() - began
        name = ckpts.save(2, state).wait(30).name
        steps = [c.step for c in ckpts.checkpoints()]
    return {"said": said, "name": name, "steps": steps, "took": took}


def _break(ckpts: CheckpointManager, how: str) -> Callable[[], None]:
    storage = ckpts._store.storage
    inner: Any = getattr(storage, "inner", storage)
    if how == "upload":
        put = inner.put

        def failing(key: str, *words: Any, **named: Any) -> None:
            if key.endswith(".safetensors"):
                raise OSError(28, "No space left on device", key)
            put(key, *words, **named)

        inner.put = failing
        return lambda: setattr(inner, "put", put)
    if how == "stage":
        saver: Any = ckpts._saver
        sources = saver._arena_sources

        def none(*_: Any, **__: Any) -> None:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

        saver._arena_sources = none
        return lambda: setattr(saver, "_arena_sources", sources)
    return lambda: None


def _signal_in_upload(ckpts: CheckpointManager, number: signal.Signals) -> None:
    """This process gets the signal when it begins to put payload."""
    storage: Any = ckpts._store.unretried
    put = storage.put

    def struck(key: str, *words: Any, **named: Any) -> None:
        if key.endswith(".safetensors"):
            os.kill(os.getpid(), number)
        put(key, *words, **named)

    storage.put = struck


def die_in_upload(root: str, victim: int) -> dict[str, Any]:
    """One rank is killed with SIGKILL while all of them upload."""
    rank = dist.get_rank()
    with CheckpointManager(root, settings=QUICK) as ckpts:
        ckpts.save(0, {"x": PerRank(torch.ones(1000))}).wait(30)
        if rank == victim:
            _signal_in_upload(ckpts, signal.SIGKILL)
        began = time.monotonic()
        try:
            ckpts.save(1, {"x": PerRank(torch.ones(1000))}).wait(60)
        except Exception as exc:
            said = f"{type(exc).__name__}: {exc}"
            took = time.monotonic() - began
        else:
            said, took = "", 0.0
        committed = [c.step for c in ckpts.checkpoints()]
        try:
            ckpts.close()
        except Exception as exc:
            closing = f"{type(exc).__name__}: {exc}"
        else:
            closing = ""
    return {"said": said, "took": took, "committed": committed, "closing": closing}


def die_in_long_upload(root: str, notes: str, mib: int) -> dict[str, Any]:
    """Rank one is killed while all of them send a part that would take a minute."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    settings = replace(QUICK, max_bandwidth=float(mib * 2**20 // 60), coordination_timeout_s=120)
    with contextlib.suppress(RankError), CheckpointManager(root, settings=settings) as ckpts:
        storage: Any = ckpts._store.storage
        throttle = storage.inner._lane._throttle
        pause = throttle.pause

        def sending(size_bytes: int) -> float:
            Path(notes, f"{rank}").touch()
            if rank == 1 and len(list(Path(notes).iterdir())) == ranks:
                os.kill(os.getpid(), signal.SIGKILL)
            return float(pause(size_bytes))

        ckpts.save(0, {"x": PerRank(torch.ones(8))}).wait(60)
        throttle.pause = sending
        pending = ckpts.save(1, {"x": PerRank(torch.zeros(mib * 2**18))})
        said = ""
        try:
            pending.wait(120)
        except Exception as exc:
            said = f"{type(exc).__name__}: {exc}"
    return {"said": said, "sent": pending.progress.bytes_done, "of": pending.progress.bytes_total}


def save_stages(root: str) -> dict[str, Any]:
    """Pipeline stages: each rank has layers, and values, that no other has."""
    rank = dist.get_rank()
    state: dict[str, Any] = {
        "model": {f"layers.{rank}.weight": torch.full((4, 4), float(rank)), "shared": torch.ones(3)},
        "options": {f"stage-{rank}": {"lr": 0.1 * (rank + 1)}, "all": 1},
    }
    with CheckpointManager(root, settings=QUICK) as ckpts:
        ckpts.save(0, state).wait(30)
        state["options"][f"stage-{rank}"]["lr"] = 0.2 * (rank + 1)
        ckpts.save(1, state).wait(30)
        fresh: dict[str, Any] = {
            "model": {f"layers.{rank}.weight": torch.zeros(4, 4), "shared": torch.zeros(3)},
            "options": {f"stage-{rank}": {"lr": 0.0}, "all": 0},
        }
        assert ckpts.restore(fresh, strict=True) is not None
        loaded = ckpts.load()
    assert fresh["model"][f"layers.{rank}.weight"].tolist() == [[float(rank)] * 4] * 4
    assert fresh["options"][f"stage-{rank}"] == {"lr": 0.2 * (rank + 1)}
    return {"names": sorted(loaded["model"]), "options": loaded["options"]}


def save_while_busy(root: str, busy_rank: int) -> dict[str, Any]:
    """With ``on_busy="skip"``, one rank alone is still busy with the save before."""
    settings = Settings(coordination_timeout_s=20, on_busy="skip")
    rank = dist.get_rank()
    with CheckpointManager(root, settings=settings) as ckpts:
        first = ckpts.save(0, {"x": torch.ones(4)})
        first.wait(30)
        saver: Any = ckpts._saver
        if rank == busy_rank:
            first.done = lambda: False  # type: ignore[method-assign]  # as it is for a moment after the others
        second = ckpts.save(1, {"x": torch.ones(4)})
        if rank == busy_rank:
            del first.done
        assert saver.last is first
        third = ckpts.save(2, {"x": torch.ones(4)}).wait(30)
        return {"second": second.checkpoint.step, "third": third.step, "steps": [c.step for c in ckpts.checkpoints()]}


def one_rank_skips_a_save(root: str, lazy_rank: int) -> dict[str, Any]:
    """One rank leaves a save out: a clear error for all, in time, and no hang."""
    settings = Settings(coordination_timeout_s=2)
    said = []
    began = time.monotonic()
    with CheckpointManager(root, settings=settings) as ckpts:
        ckpts.save(0, {"x": torch.ones(4)}).wait(30)
        if dist.get_rank() != lazy_rank:
            try:
                ckpts.save(1, {"x": torch.ones(4)})
            except Exception as exc:
                said.append(f"{type(exc).__name__}: {exc}")
        dist.barrier()
        if dist.get_rank() == lazy_rank:
            try:
                ckpts.save(2, {"x": torch.ones(4)})
            except Exception as exc:
                said.append(f"{type(exc).__name__}: {exc}")
        dist.barrier()
        name = ckpts.save(3, {"x": torch.ones(4)}).wait(30).name
    return {"said": said, "took": time.monotonic() - began, "name": name}


def bad_arguments_on_one_rank(root: str, bad_rank: int) -> str:
    """A wrong step on one rank is told to all."""
    with CheckpointManager(root, settings=QUICK) as ckpts:
        try:
            ckpts.save(-1 if dist.get_rank() == bad_rank else 1, {"x": torch.ones(4)})
        except Exception as exc:
            said = f"{type(exc).__name__}: {exc}"
        ckpts.save(2, {"x": torch.ones(4)}).wait(30)
        return said


def folders_that_are_not_shared(root: str) -> str:
    """As on nodes with disks of their own: each rank has another working directory."""
    own = os.path.join(root, f"node-{dist.get_rank()}")  # noqa: PTH118 - the scenario's words are JSON
    os.makedirs(own)  # noqa: PTH103 - as above
    before = os.getcwd()  # noqa: PTH109 - as above
    os.chdir(own)
    try:
        with CheckpointManager("./runs", settings=QUICK) as ckpts:
            ckpts.save(1, {"x": torch.ones(4)})
        return ""
    except Exception as exc:
        return f"{type(exc).__name__}: {exc}"
    finally:
        os.chdir(before)


def restore_state_that_fits_on_some(root: str, bad_rank: int) -> dict[str, Any]:
    """One rank's model has another shape: every rank is told, and nothing is changed anywhere."""
    with CheckpointManager(root, settings=QUICK) as ckpts:
        ckpts.save(1, {"w": torch.ones(8), "rng": PerRank({"seed": dist.get_rank()})}).wait(30)
        mine = torch.zeros(9 if dist.get_rank() == bad_rank else 8)
        state: dict[str, Any] = {"w": mine, "rng": PerRank({"seed": -1})}
        try:
            ckpts.restore(state)
        except Exception as exc:
            said = f"{type(exc).__name__}: {exc}"
        return {"said": said, "changed": bool(mine.any()) or state["rng"].value != {"seed": -1}}


def damaged_for_one(root: str, seeing_rank: int) -> dict[str, Any]:
    """One rank alone finds the newest checkpoint damaged: all fall back to the one before."""
    with CheckpointManager(root, keep_last=None, settings=QUICK) as ckpts:
        for step in (1, 2):
            ckpts.save(step, {"x": PerRank(torch.full((1000,), float(step)))}).wait(30)
        dist.barrier()
        if dist.get_rank() == seeing_rank:
            newest = ckpts.latest()
            assert newest is not None
            path = os.path.join(newest.url, f"x-{seeing_rank:05}-of-{dist.get_world_size():05}.safetensors")  # noqa: PTH118 - JSON
            with open(path, "r+b") as file:  # noqa: PTH123 - as above
                file.seek(-8, 2)
                file.write(b"\xff" * 8)
        dist.barrier()
        state = {"x": PerRank(torch.zeros(1000))}
        found = ckpts.restore(state)
        assert found is not None
        return {"step": found.step, "value": state["x"].value[0].item()}


def save_with_rank_state(root: str) -> str:
    """Four parts, one of each rank."""
    state = {"x": torch.ones(3), "rng": PerRank({"seed": dist.get_rank()})}
    with CheckpointManager(root, settings=QUICK) as ckpts:
        return ckpts.save(1, state).wait(30).name


def restore_rank_state_on_two(root: str, strict: bool) -> dict[str, Any] | None:
    """Half as many ranks as saved it."""
    group = dist.new_group([0, 1])
    if dist.get_rank() > 1:
        return None
    state: dict[str, Any] = {"x": torch.zeros(3), "rng": PerRank({"seed": -1})}
    with CheckpointManager(root, settings=QUICK, process_group=group) as ckpts:
        try:
            ckpts.restore(state, strict_world_size=strict)
        except Exception as exc:
            return {"said": f"{type(exc).__name__}: {exc}"}
    return {"x": state["x"].tolist(), "seed": state["rng"].value["seed"]}


def stop_one(root: str, victim: int) -> dict[str, Any]:
    """One rank is stopped (SIGSTOP) in mid-upload: the others name it once it was silent too long."""
    settings = Settings(coordination_timeout_s=3)
    rank = dist.get_rank()
    said = ""
    with CheckpointManager(root, settings=settings) as ckpts:
        ckpts.save(0, {"x": PerRank(torch.ones(1000))}).wait(30)
        if rank == victim:
            _signal_in_upload(ckpts, signal.SIGSTOP)
        began = time.monotonic()
        try:
            ckpts.save(1, {"x": PerRank(torch.ones(1000))}).wait(60)
        except Exception as exc:
            said = f"{type(exc).__name__}: {exc}"
        took = time.monotonic() - began
        steps = [c.step for c in ckpts.checkpoints()]
        with contextlib.suppress(Exception):
            ckpts.close()
    return {"said": said, "took": took, "steps": steps}


def die_beside_a_forked_child(root: str, victim: int) -> dict[str, Any]:
    """A rank that has forked a data loader's worker is killed: the worker's copy of the connection hides nothing."""
    ckpts = CheckpointManager(root, settings=QUICK)
    ckpts.save(0, {"x": torch.ones(4)}).wait(30)
    if dist.get_rank() == victim:
        child = os.fork()
        if child == 0:
            time.sleep(30)
            os._exit(0)
        os.kill(os.getpid(), signal.SIGKILL)
    began = time.monotonic()
    try:
        ckpts.save(1, {"x": torch.ones(4)})
    except Exception as exc:
        said = f"{type(exc).__name__}: {exc}"
    took = time.monotonic() - began
    with contextlib.suppress(RankError):
        ckpts.close()
    return {"said": said, "took": took}


def replicas_that_differ(root: str, how: str, odd_rank: int, element: int) -> dict[str, Any]:
    """One rank's copy of one tensor has drifted, after the first save."""
    settings = Settings(coordination_timeout_s=20, check_replicas=how)
    model = {f"layer{n}.weight": torch.full((40, 50), float(n)) for n in range(20)}
    said = ""
    with CheckpointManager(root, settings=settings) as ckpts:
        ckpts.save(0, {"model": model}).wait(30)
        ckpts.save(1, {"model": model}).wait(30)
        if dist.get_rank() == odd_rank:
            model["layer7.weight"].view(-1)[element] = -1.0
        for step in range(2, 12):  # a sample looks at 16 of the 20 tensors each time
            try:
                ckpts.save(step, {"model": model}).wait(30)
            except Exception as exc:
                said = f"{type(exc).__name__}: {exc}"
                break
    return {"said": said}


def interrupted_in_a_vote(root: str, victim: int) -> dict[str, Any]:
    """Ctrl-C on one rank while it waits for the others to save."""
    rank = dist.get_rank()
    ckpts = CheckpointManager(root, settings=QUICK)
    ckpts.save(0, {"x": torch.ones(4)}).wait(30)
    if rank == victim:
        coordinator: Any = ckpts._coordinator
        line = coordinator._line()
        take = line.take

        def interrupted(*words: Any, **named: Any) -> bytes:
            os.kill(os.getpid(), signal.SIGINT)
            return take(*words, **named)  # type: ignore[no-any-return]  # a patched method

        line.take = interrupted
    else:
        dist.barrier()  # the victim comes to it after its interrupt
    try:
        ckpts.save(1, {"x": torch.ones(4)})
    except BaseException as exc:
        said = f"{type(exc).__name__}: {exc}"
    if rank == victim:
        dist.barrier()
    try:
        ckpts.close()
    except RankError as exc:
        closing = str(exc)
    return {"said": said, "closing": closing}


def values_that_differ(root: str) -> int:
    """A number that is another one on each rank, and was not declared so."""
    with CheckpointManager(root, settings=QUICK) as ckpts:
        for step in range(2):
            state = {"options": {"lr": 0.1, "best": [1.0 * dist.get_rank()]}, "rng": PerRank({"seed": dist.get_rank()})}
            ckpts.save(step, state).wait(30)
        stored: list[Any] = ckpts.load()["options"]["best"]
    assert stored == [0.0]
    return len(ckpts._coordinator._channel._watchers)  # type: ignore[attr-defined]  # many ranks


def save_summands(root: str) -> str:
    """A DTensor of which each rank has a summand."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Partial

    mesh = DeviceMesh("cpu", list(range(dist.get_world_size())))
    summand = DTensor.from_local(torch.ones(4), mesh, [Partial()], run_check=False)
    with CheckpointManager(root, settings=QUICK) as ckpts:
        try:
            ckpts.save(1, {"x": summand})
        except Exception as exc:
            return f"{type(exc).__name__}: {exc}"
    return ""
