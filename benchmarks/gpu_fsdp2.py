"""Several GPUs of one host: a transformer under FSDP2 that is saved every few steps, with cloudckpt and with DCP.

``python benchmarks/gpu_fsdp2.py [--gib 1.5] [--to s3 local] [--folder DIR]``

One JSON line per case, times in seconds. It starts one process a GPU, and an S3 server on loopback (``sink``, which
keeps what it is given in memory); it needs this checkout, torch with CUDA and NCCL, cloudckpt's core dependencies, and
s3fs. ``--device cpu --ranks 2 --gib 0.02`` runs the same lines with gloo, to see that they run.

The state is fp32 parameters and AdamW's two moments, ``--gib`` of it per rank. Every case trains the same model: a few
quiet steps, a save, steps beside it until it is durable on every rank, and so on. Then a fresh model is restored, and
compared by SHA-256 of all whole tensors with what was saved.

Cases: ``copy`` and ``overlap`` are cloudckpt's stages; ``thread`` and ``process`` are ``dcp.async_save`` with pinned
staging, through torch's own file writer to local disk and through its fsspec writer (s3fs) to S3. ``blocks_s`` is what
the call that saves takes, on the slowest rank, over all saves but the first; ``slowdown`` is the median step beside an
upload by the median quiet one; ``host_gib`` is the most memory above the start, on the rank with the most, of the
process and its helpers, with what torch has pinned. ``killed``: rank one is killed with SIGKILL in mid-upload, the
others say so, and the job is started again on fewer ranks.

(Past 350 lines: one program that runs from a bare checkout, and nothing else of it is shared.)
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))
from cloudckpt import CheckpointManager, CloudCkptError, PerRank, Settings, TrainState, rng_state
from cloudckpt.testing.servers import free_ports

from benchmarks.meter import Meter
from benchmarks.sink.process import SinkProcess

GIB = 1 << 30
CASES = ("copy", "overlap", "thread", "process")
#: A case saves so often, unless that takes longer than this; the first save is told apart.
SAVES, MOST_S = 25, 60.0
#: Bytes a second while a rank is killed, so that the upload is surely under way.
SLOWLY = 64e6
Pending = Callable[[], bool]


def out(**words: Any) -> None:
    """One line of the results."""
    print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in words.items()}), flush=True)


# -- one rank ------------------------------------------------------------------------------------------------------


class Trainer:
    """A transformer under FSDP2 with fp32 AdamW, the same on every number of ranks."""

    def __init__(self, gib: float, device: torch.device) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        self.device, self.world = device, dist.get_world_size()
        width = 1024 if device.type == "cuda" else 64
        each = 12 * (12 * width * width + 13 * width)
        self.layers = max(1, round(gib * GIB / each))
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(
            *(torch.nn.TransformerEncoderLayer(width, 16, 4 * width, 0.0, batch_first=True) for _ in range(self.layers))
        ).to(device)
        mesh = init_device_mesh(device.type, (self.world,))
        for layer in self.model:
            fully_shard(layer, mesh=mesh)
        fully_shard(self.model, mesh=mesh)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.shape = (16, 512, width) if device.type == "cuda" else (2, 16, width)
        self.state = TrainState(self.model, self.optimizer, seen=0, rng=PerRank(rng_state()))

    def step(self) -> float:
        """One step, and how long it took."""
        began = time.perf_counter()
        with torch.autocast(self.device.type, torch.bfloat16):
            loss = self.model(torch.randn(self.shape, device=self.device)).square().mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.sync()
        return time.perf_counter() - began

    def sync(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def tensors(self) -> list[torch.Tensor]:
        """All of the state."""
        moments = [t for own in self.optimizer.state.values() for t in own.values()]
        return [*self.model.state_dict().values(), *moments]

    def bytes_here(self) -> int:
        """Of them, what this rank holds."""
        return sum(getattr(t, "_local_tensor", t).nbytes for t in self.tensors())

    def digest(self) -> str:
        """SHA-256 of all whole tensors; every rank takes part."""
        found = hashlib.sha256()
        for tensor in self.tensors():
            whole: Any = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
            found.update(whole.detach().reshape(-1).view(torch.uint8).cpu().numpy().data)
        return found.hexdigest()[:16]


class Ours:
    """cloudckpt, as the README has it."""

    def __init__(self, root: str, stage: str) -> None:
        self.ckpts = CheckpointManager(root, keep_last=1, settings=Settings(stage=stage))

    def prepare(self, trainer: Trainer) -> None:
        """As every run begins: there is nothing to restore yet. Ends when the staging memory is there."""
        self.ckpts.restore(trainer.state)
        self.ckpts.wait()

    def save(self, trainer: Trainer, number: int) -> Pending:
        """Give back what tells whether it is durable."""
        pending = self.ckpts.save(number, trainer.state)
        return lambda: pending.done() and pending.wait() is not None

    def restore(self, trainer: Trainer, _: int) -> None:
        """Into a fresh model."""
        self.ckpts.restore(trainer.state)

    def close(self) -> None:
        """Of every case."""
        self.ckpts.close()


class Dcp:
    """torch's own asynchronous saves, pinned, the newest kept."""

    def __init__(self, root: str, kind: str) -> None:
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.staging import BlockingAsyncStager
        from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

        self.dcp: Any = dcp
        self.root = root
        # Pinned, shared, and kept from save to save. The newer DefaultStager cannot copy DTensors in torch 2.11.
        self.stager = BlockingAsyncStager(cache_staged_state_dict=True)
        self.kind = AsyncCheckpointerType.PROCESS if kind == "process" else AsyncCheckpointerType.THREAD
        # Its messages go over gloo, or they would stand in line with training's on NCCL.
        self.group = dist.new_group(backend="gloo")

    def prepare(self, trainer: Trainer) -> None:
        """Nothing of the kind."""

    def _state(self, trainer: Trainer) -> dict[str, Any]:
        from torch.distributed.checkpoint.state_dict import get_state_dict

        model, optimizer = get_state_dict(trainer.model, trainer.optimizer)
        return {"model": model, "optimizer": optimizer}

    def save(self, trainer: Trainer, number: int) -> Pending:
        """Give back what tells whether it is durable."""
        place = f"{self.root}/{number}"
        writer: Any
        if "://" in self.root:
            from torch.distributed.checkpoint._fsspec_filesystem import FsspecWriter

            writer = FsspecWriter(place, sync_files=False)
        else:
            writer = self.dcp.FileSystemWriter(place)
        made = self.dcp.async_save(
            self._state(trainer),
            storage_writer=writer,
            process_group=self.group,
            async_checkpointer_type=self.kind,
            async_stager=self.stager,
        )
        future: Future[Any] = getattr(made, "upload_completion", made)

        def done() -> bool:
            if not future.done():
                return False
            future.result()
            if "://" not in self.root and dist.get_rank() == 0:
                shutil.rmtree(f"{self.root}/{number - 1}", ignore_errors=True)
            return True

        return done

    def restore(self, trainer: Trainer, number: int) -> None:
        """Into a fresh model."""
        from torch.distributed.checkpoint.state_dict import set_state_dict

        reader: Any
        place = f"{self.root}/{number}"
        if "://" in self.root:
            from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader

            reader = FsspecReader(place)
        else:
            reader = self.dcp.FileSystemReader(place)
        state = self._state(trainer)
        self.dcp.load(state, storage_reader=reader, process_group=self.group)
        model, optimizer = state["model"], state["optimizer"]
        set_state_dict(trainer.model, trainer.optimizer, model_state_dict=model, optim_state_dict=optimizer)

    def close(self) -> None:
        """Of every case."""
        self.stager.close()
        dist.destroy_process_group(self.group)


def everyone(value: Any) -> list[Any]:
    """What every rank says."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def measured(given: argparse.Namespace, trainer: Trainer, device: torch.device) -> None:
    """One case, told by rank zero."""
    for _ in range(5):
        trainer.step()
    quiet: list[float] = []
    here = trainer.bytes_here()
    saver: Any = Ours(given.root, given.case) if given.case in {"copy", "overlap"} else Dcp(given.root, given.case)
    blocks, beside, totals = [], [], []
    with Meter(watch_children=True) as meter:
        saver.prepare(trainer)
        began_all = time.perf_counter()
        number = 0
        while number < given.saves and max(everyone(time.perf_counter() - began_all)) < MOST_S:
            number += 1
            # In between, since the device and its host are not as fast at any time.
            quiet += [trainer.step() for _ in range(4)]
            dist.barrier()
            trainer.sync()
            began = time.perf_counter()
            done = saver.save(trainer, number)
            blocks.append(time.perf_counter() - began)
            steps = []
            while True:
                # All ranks go on as long as one of them is not done, or their steps would wait for each other.
                own = done()
                if all(everyone(own)):
                    break
                steps.append(trainer.step())
            totals.append(time.perf_counter() - began)
            beside.append(steps)
        pinned = torch.cuda.host_memory_stats().get("allocated_bytes.peak", 0) if device.type == "cuda" else 0
    last = number + 1  # the one that is compared
    done = saver.save(trainer, last)
    sums = trainer.digest()
    while not all(everyone(done())):
        time.sleep(0.01)
    fresh = Trainer(given.gib_whole, device)
    dist.barrier()
    began = time.perf_counter()
    saver.restore(fresh, last)
    fresh.sync()
    restored = time.perf_counter() - began
    exact = fresh.digest() == sums
    saver.close()
    said = everyone((blocks, quiet, beside, totals, meter.peak_bytes + pinned, restored, here))
    if dist.get_rank() == 0:
        worst = [max(rank[0][n] for rank in said) for n in range(number)]
        # The first step beside a save may wait for its copy, and is told apart.
        rest = [step for rank in said for steps in rank[2][1:] for step in steps[1:]]
        firsts = [steps[0] for rank in said for steps in rank[2][1:] if steps]
        still = statistics.median(step for rank in said for step in rank[1])
        out(
            case=given.case, to=given.kind, saves=number, first_blocks_s=worst[0],
            blocks_s=statistics.median(worst[1:]), blocks_p99_s=sorted(worst[1:])[math.ceil(0.99 * (number - 1)) - 1],
            step_s=still, steps_beside=len(rest), slowdown=statistics.median(rest) / still if rest else None,
            first_step_slowdown=statistics.median(firsts) / still if firsts else None,
            total_s=statistics.median(said[0][3][1:]), host_gib=max(rank[4] for rank in said) / GIB,
            state_gib=max(rank[6] for rank in said) / GIB, restore_s=max(rank[5] for rank in said), exact=exact,
        )  # fmt: skip


def killed(given: argparse.Namespace, trainer: Trainer) -> None:
    """Save; save again, slowly; rank one dies in the middle; the others say what they know."""
    rank = dist.get_rank()
    with CheckpointManager(given.root) as ckpts:
        trainer.step()
        ckpts.save(1, trainer.state).wait()
        sums = trainer.digest()
        if rank == 0:
            Path(given.note).write_text(sums, encoding="ascii")
    trainer.step()
    ckpts = CheckpointManager(given.root, settings=Settings(max_bandwidth=SLOWLY))
    pending = ckpts.save(2, trainer.state)
    dist.barrier()
    if rank == 1:
        time.sleep(2)  # into the upload, which takes many times as long: not to wait for anything
        Path(f"{given.note}.at").write_text(repr(time.time()), encoding="ascii")
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        pending.wait(120)
        said = "nothing"
    except CloudCkptError as exc:
        said = f"{type(exc).__name__}: {exc}"
    after = time.time() - float(Path(f"{given.note}.at").read_text(encoding="ascii"))
    if rank == 0:
        out(case="killed", ranks=dist.get_world_size(), told_after_s=after, said=said[:300])
        sys.stdout.flush()
    # Not through torch's own end, which would wait for the dead.
    os._exit(0)


def restarted(given: argparse.Namespace, trainer: Trainer) -> None:
    """On other ranks: the last committed save, bit for bit."""
    with CheckpointManager(given.root) as ckpts:
        found = ckpts.restore(trainer.state, strict_world_size=False)
    sums = trainer.digest()
    trainer.step()
    if dist.get_rank() == 0:
        exact = sums == Path(given.note).read_text(encoding="ascii")
        out(case="restarted", ranks=dist.get_world_size(), step=found.step if found else None, exact=exact)


def worker(given: argparse.Namespace) -> None:
    """One rank of one case."""
    warnings.simplefilter("ignore")
    on_gpu = given.device == "cuda"
    device = torch.device("cuda", int(os.environ["RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    trainer = Trainer(given.gib_whole, device)
    {"killed": killed, "restarted": restarted}.get(given.case, lambda g, t: measured(g, t, device))(given, trainer)
    dist.barrier()
    dist.destroy_process_group()


# -- the whole -----------------------------------------------------------------------------------------------------


def start(given: argparse.Namespace, ranks: int, *words: str, environment: dict[str, str]) -> None:
    """A job of so many ranks, which is waited for; of a rank that fails one line tells."""
    (port,) = free_ports(1)
    job = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
    # No multicast over NVLink: it is not to be had in every container.
    job |= {"MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "NCCL_NVLS_ENABLE": "0", **environment}
    command = [sys.executable, __file__, "--worker", "--device", given.device, "--saves", str(given.saves), *words]
    processes = [
        subprocess.Popen(command, env={**os.environ, **job, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(ranks)
    ]
    try:
        codes = [process.wait(600) for process in processes]
    finally:
        for process in processes:
            process.kill()
    if wrong := [code for code in codes if code not in {0, -signal.SIGKILL}]:
        out(case=words[1], error=f"a rank ended with {wrong[0]}")


def run(given: argparse.Namespace, kind: str, ranks: int) -> None:
    """All cases to one kind of store; each with a fresh one, since it lies in memory or fills the disk."""
    jobs = [[(case, ranks)] for case in given.cases]
    # To local disk nothing can be slowed down so that it is surely under way.
    if kind == "s3" and ranks > 1 and not given.without_kill:
        jobs.append([("killed", ranks), ("restarted", ranks // 2)])
    for job in jobs:
        with tempfile.TemporaryDirectory(dir=given.folder) as folder, ExitStack() as stack:
            environment = stack.enter_context(SinkProcess()).environment() if kind == "s3" else {}
            root = "s3://bench/run" if kind == "s3" else f"{folder}/run"
            words = ["--root", root, "--kind", kind, "--gib-whole", str(given.gib * ranks), "--note", f"{folder}/note"]
            for case, count in job:
                start(given, count, "--case", case, *words, environment=environment)


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=1.5, help="of state, per rank")
    parser.add_argument("--to", nargs="+", choices=["s3", "local"], default=["s3", "local"])
    parser.add_argument("--cases", nargs="*", choices=CASES, default=[*CASES])
    parser.add_argument("--folder", help="where local saves go; the system's folder for temporary files by default")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--ranks", type=int, help="as many as there are GPUs by default")
    parser.add_argument("--saves", type=int, default=SAVES)
    parser.add_argument("--without-kill", action="store_true")
    for name in ("--worker", "--case", "--root", "--kind", "--gib-whole", "--note"):
        kind = {"action": "store_true"} if name == "--worker" else {"type": float if name == "--gib-whole" else str}
        parser.add_argument(name, help=argparse.SUPPRESS, **kind)
    return parser.parse_args(words)


def main() -> None:
    """Every case, or one rank of one."""
    given = arguments()
    if given.worker:
        worker(given)
        return
    ranks = given.ranks or torch.cuda.device_count()
    name = torch.cuda.get_device_name() if given.device == "cuda" else "cpu"
    out(case="machine", device=name, ranks=ranks, torch=torch.__version__, gib=given.gib, cores=os.cpu_count())
    for kind in given.to:
        run(given, kind, ranks)


if __name__ == "__main__":
    main()
