"""What a save costs training on one GPU, through the manager.

``python benchmarks/gpu_saves.py [--gib 20] [--root DIR]``

One JSON line per case, times in seconds. It needs torch with CUDA, this checkout and its core dependencies. The state
is fp32 parameters under fused AdamW in GPT-like shapes; a step is bf16 products (0.24 s on an H200) and a real update.

Cases: ``raw`` the link's own rate · ``prepare`` how long making the staging memory takes beside training · ``copy``
what ``save()`` blocks, the first time and later · ``overlap`` what training loses beside the copy, with an update in
every step; ``accumulated`` with one in every other (gradient accumulation); ``borrowed`` with one in every step, half
of the state copied within the device first · ``restore`` back into the GPU, compared bit for bit with what was saved.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from cloudckpt import CheckpointManager, Settings

GIB = 1 << 30
SHAPES = ((4096, 4096),) * 4 + ((11008, 4096),) * 2 + ((4096, 11008), (4096,), (4096,))


def out(**words: Any) -> None:
    """One line of the results."""
    print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in words.items()}), flush=True)


def timed(act: Callable[[], object]) -> float:
    """Seconds until the device has done it."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    act()
    torch.cuda.synchronize()
    return time.perf_counter() - began


class Trainer:
    """Parameters under fused AdamW, with gradients that stay as they are, and products that take most of a step."""

    def __init__(self, gib: float) -> None:
        parameters = []
        size = 0
        while size < gib * GIB / 3:
            for shape in SHAPES:
                parameters.append(torch.nn.Parameter(torch.randn(shape, device="cuda")))
                size += parameters[-1].nbytes
        self.model = torch.nn.ParameterList(parameters)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        for parameter in parameters:
            parameter.grad = torch.full_like(parameter, 1e-3)
        self.factor = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
        self.step()

    @property
    def state(self) -> dict[str, object]:
        """What is saved."""
        return {"model": self.model, "optimizer": self.optimizer}

    def step(self, *, updates: bool = True) -> None:
        """Products, then the update."""
        for _ in range(150):
            self.factor @ self.factor
        if updates:
            self.optimizer.step()


def size_bytes(trainer: Trainer) -> int:
    """The state's bytes."""
    states = trainer.optimizer.state.values()
    return int(sum(p.nbytes for p in trainer.model) + sum(t.nbytes for s in states for t in s.values()))


def raw_rate() -> float:
    """GiB/s from the device to pinned memory."""
    flat = torch.empty(2 * GIB, dtype=torch.uint8, device="cuda")
    pinned = torch.empty(flat.numel(), dtype=torch.uint8, pin_memory=True)
    return statistics.median([2 / timed(lambda: pinned.copy_(flat, non_blocking=True)) for _ in range(6)][1:])


def checksum(trainer: Trainer) -> int:
    """A sum over every bit of the state, computed where it lies."""
    tensors = [*trainer.model, *(t for s in trainer.optimizer.state.values() for t in s.values())]
    total = torch.zeros((), dtype=torch.int64, device="cuda")
    for number, tensor in enumerate(tensors, 1):
        bits = tensor.detach().reshape(-1).view(torch.int32)
        places = torch.arange(bits.numel(), device=bits.device, dtype=torch.int32)
        total += number * (bits * (2 * places + 1)).sum(dtype=torch.int64)
    return int(total)


def main() -> None:
    """Run every case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=20)
    parser.add_argument("--root", default="/dev/shm")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    trainer = Trainer(given.gib)
    gib = size_bytes(trainer) / GIB
    step_s = statistics.median(timed(trainer.step) for _ in range(7))
    out(case="machine", device=torch.cuda.get_device_name(), torch=torch.__version__, gib=gib, step_s=step_s)

    raw = raw_rate()
    out(case="raw", gib_s=raw)
    with tempfile.TemporaryDirectory(dir=given.root) as folder:
        half = int(gib * GIB / 2)
        _saves(trainer, f"{folder}/copy", "copy", Settings(stage="copy"), raw=raw, every=1)
        beside = Settings(stage="overlap")
        _saves(trainer, f"{folder}/accumulated", "accumulated", beside, raw=raw, every=2)
        borrowing = Settings(stage="overlap", overlap_device_bytes=half)
        _saves(trainer, f"{folder}/borrowed", "borrowed", borrowing, raw=raw, every=1)
        _saves(trainer, f"{folder}/overlap", "overlap", beside, raw=raw, every=1)
        _restored(trainer, f"{folder}/overlap", given.gib)


def _saves(trainer: Trainer, root: str, mode: str, settings: Settings, *, raw: float, every: int) -> None:
    gib = size_bytes(trainer) / GIB
    step_s = statistics.median(timed(lambda: _eight(trainer, every)) for _ in range(5)) / 8
    with CheckpointManager(root, keep_last=1, settings=settings) as ckpts:
        began = time.perf_counter()
        ckpts.prepare(trainer.state)
        returned = time.perf_counter() - began
        slow = []
        while time.perf_counter() - began < 30:
            slow.append(timed(trainer.step))
        ckpts.wait()
        out(
            case="prepare", mode=mode, returned_s=returned, ready_within_s=time.perf_counter() - began,
            step_slowdown=statistics.median(slow) / step_s, worst_step=max(slow) / step_s,
        )  # fmt: skip
        for number in range(4):
            # With the device idle, to see what the call itself takes; then in a running loop, which launches ahead.
            torch.cuda.synchronize()
            began = time.perf_counter()
            pending = ckpts.save(2 * number, trainer.state)
            blocked = time.perf_counter() - began
            pending.wait()
            total = time.perf_counter() - began
            torch.cuda.synchronize()
            began = time.perf_counter()
            _eight(trainer, every)
            pending = ckpts.save(2 * number + 1, trainer.state)
            _eight(trainer, every)
            torch.cuda.synchronize()
            lost = time.perf_counter() - began - 16 * step_s
            pending.wait()
            out(
                case=mode, save=number, blocked_s=blocked, gib_s=gib / blocked, of_raw=gib / blocked / raw,
                lost_s=lost, lost_of_step=lost / step_s, total_s=total,
            )  # fmt: skip
        sum_before = checksum(trainer)
        ckpts.save(10, trainer.state)
        trainer.step()
    if mode != "overlap":  # the one that is restored; they are large
        shutil.rmtree(root)
    out(case="saved", mode=mode, checksum=sum_before, changed_since=checksum(trainer) != sum_before)
    Path(f"{root}.checksum").write_text(str(sum_before), encoding="ascii")


def _eight(trainer: Trainer, every: int) -> None:
    for number in range(1, 9):
        trainer.step(updates=number % every == 0)


def _restored(trainer: Trainer, root: str, gib: float) -> None:
    expected = int(Path(f"{root}.checksum").read_text(encoding="ascii"))
    del trainer
    fresh = Trainer(gib)
    with CheckpointManager(root) as ckpts:
        seconds = timed(lambda: ckpts.restore(fresh.state))
    out(case="restore", s=seconds, gib_s=gib / seconds, exact=checksum(fresh) == expected)


if __name__ == "__main__":
    main()
