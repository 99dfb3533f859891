"""How long a save keeps a GPU from training: ``python benchmarks/gpu_staging.py [--gib 20] > gpu.jsonl``.

One JSON line per case, times in seconds, medians where ``n`` is given. It needs torch and this checkout, nothing else.
About six minutes at 20 GiB, of which DCP takes half.

The state is what mixed-precision training has: bf16 parameters, and in the optimizer fp32 master weights and Adam's
two moments, in GPT-like shapes. A step is a loop of bf16 products (0.24 s on an H100 or H200) and a real update in
place of every tensor, so that a torn copy cannot go unnoticed. Every copy is compared, by the SHA-256 of all tensors,
with one that was made at once at the same moment; the arena is overwritten in between.

Cases: ``crossing`` whether one copy may cross two separately registered segments · ``register`` what pinning costs, by
kind of memory, and beside training · ``raw`` the link's own rate · ``copy`` everything at once · ``overlap`` beside
steps; a step comes every 0.24 s and the copy takes longer, so without borrowed device memory the first one waits ·
``dcp`` PyTorch's own asynchronous saves to a RAM disk.

``--device cpu --gib 0.05`` runs the same lines without a GPU, to see that they run.

(Past 350 lines: one program that runs from a bare checkout, and nothing else of it is shared.)
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import hashlib
import json
import mmap
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from cloudckpt.tensors.overlap import Copying, begin, watch, why_not

SEGMENT_BYTES = 256 << 20
SHAPES = ((4096, 4096),) * 4 + ((11008, 4096),) * 2 + ((4096, 11008), (4096,), (4096,))
GIB = 1 << 30


def out(case: str, **values: Any) -> None:
    """One result."""
    rounded = {k: round(v, 5) if isinstance(v, float) else v for k, v in values.items()}
    print(json.dumps({"case": case, **rounded}), flush=True)


class MasterAdamW(torch.optim.Optimizer):
    """AdamW over fp32 master weights that are kept beside bf16 parameters."""

    def __init__(self, params: Sequence[torch.Tensor]) -> None:
        super().__init__(params, {"lr": 1e-4})
        for p in params:
            self.state[p] = {
                "master": p.float(),
                "exp_avg": torch.randn(p.shape, device=p.device) * 1e-3,
                "exp_avg_sq": torch.rand(p.shape, device=p.device),
            }

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no closure
        """Update every tensor in place."""
        for p in self.param_groups[0]["params"]:
            state, grad = self.state[p], p.grad.float()
            state["exp_avg"].lerp_(grad, 0.1)
            state["exp_avg_sq"].mul_(0.999).addcmul_(grad, grad, value=0.001)
            state["master"].mul_(1 - 1e-6).addcdiv_(
                state["exp_avg"], state["exp_avg_sq"].sqrt().add_(1e-8), value=-1e-4
            )
            p.copy_(state["master"])


class Bench:
    """The state, the steps, and the arena of one run."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.device = options.device
        self.options = options
        self.cuda = self.device == "cuda"
        params, total = [], 0
        scale = 1 if self.cuda else 16
        while total < options.gib * GIB:
            for shape in [tuple(max(side // scale, 1) for side in shape) for shape in SHAPES]:
                p = torch.nn.Parameter(torch.randn(shape, device=self.device, dtype=torch.bfloat16))
                p.grad = torch.randn_like(p) * 1e-2
                params.append(p)
                total += p.numel() * 14
        self.optimizer = MasterAdamW(params)
        self.state: dict[str, torch.Tensor] = {}
        for n, p in enumerate(params):
            self.state[f"m.{n}"] = p.detach()
            self.state |= {f"o.{name}.{n}": t for name, t in self.optimizer.state[p].items()}
        self.size_bytes = sum(t.nbytes for t in self.state.values())
        self.gib = self.size_bytes / GIB
        self.a = torch.randn(options.matmul, options.matmul, device=self.device, dtype=torch.bfloat16)
        self.registered = False
        self.hashers = ThreadPoolExecutor(os.cpu_count())

    def sync(self) -> None:
        """Wait for the device."""
        if self.cuda:
            torch.cuda.synchronize()

    def products(self) -> None:
        """Forward and backward."""
        for _ in range(self.options.products):
            torch.mm(self.a, self.a)

    def step(self, accumulate: int = 1) -> None:
        """One training step."""
        for _ in range(accumulate):
            self.products()
        self.optimizer.step()

    def timed(self, run: Callable[[], object]) -> float:
        """Seconds until the device has done it."""
        self.sync()
        began = time.perf_counter()
        run()
        self.sync()
        return time.perf_counter() - began

    # -- the arena -------------------------------------------------------------------------------------------

    def make_arena(self) -> None:
        """Segments side by side, each pinned by itself in a thread, beside training."""
        count = -(-self.size_bytes // SEGMENT_BYTES)
        self.memory = anonymous(count * SEGMENT_BYTES)
        advise_huge(self.memory)
        self.arena = torch.frombuffer(self.memory, dtype=torch.uint8)
        times: list[float] = []
        errors: list[str] = []
        quiet = statistics.median(self.timed(self.step) for _ in range(7))
        out("step", s=quiet, n=7, products_s=statistics.median(self.timed(self.products) for _ in range(5)))

        def register_all() -> None:
            start = self.arena.data_ptr()
            try:
                times.extend(registered(start + n * SEGMENT_BYTES, touch=True, cuda=self.cuda) for n in range(count))
            except RuntimeError as exc:
                errors.append(str(exc))

        thread = threading.Thread(target=register_all)
        began = time.perf_counter()
        thread.start()
        beside = []
        while thread.is_alive():
            beside.append(self.timed(self.step))
        thread.join()
        if errors:
            out("register", beside_training=True, error=errors[0])
            self.arena = torch.empty(count * SEGMENT_BYTES, dtype=torch.uint8, pin_memory=self.cuda)
            return
        self.registered = self.cuda
        out(
            "register",
            memory="huge pages advised, touched",
            beside_training=True,
            segments=count,
            segment_s=statistics.median(times),
            worst_segment_s=max(times),
            total_s=time.perf_counter() - began,
            step_slowdown=statistics.median(beside) / quiet,
            worst_step_slowdown=max(beside) / quiet,
            steps=len(beside),
        )

    def copies(self) -> list[Copying]:
        """Every tensor to its place; one that crosses from a segment into the next in two copies."""
        found, start = [], 0
        for path, source in self.state.items():
            flat, at = source.view(-1), 0
            while at < flat.numel():
                room = (SEGMENT_BYTES - start % SEGMENT_BYTES) // flat.itemsize
                piece = flat[at : at + room]
                target = self.arena[start : start + piece.nbytes].view(piece.dtype)
                found.append(Copying(path=f"{path}[{at}:]" if at else path, source=piece, target=target))
                at, start = at + piece.numel(), start + piece.nbytes
        return found

    def digest(self, copies: Sequence[Copying]) -> str:
        """The SHA-256 over the SHA-256 of every tensor that was copied."""

        def one(copying: Copying) -> bytes:
            return hashlib.sha256(copying.target.view(torch.uint8).numpy().data).digest()

        return hashlib.sha256(b"".join(self.hashers.map(one, copies))).hexdigest()

    # -- the cases -------------------------------------------------------------------------------------------

    def raw(self) -> float:
        """The link's own rate: one pinned buffer that torch made, and segment by segment of the arena."""
        size = min(self.size_bytes, 2 * GIB)
        source = torch.empty(size, dtype=torch.uint8, device=self.device)
        target = torch.empty(size, dtype=torch.uint8, pin_memory=self.cuda)
        took = statistics.median(self.timed(lambda: target.copy_(source, non_blocking=True)) for _ in range(7))
        out("raw", memory="torch, pinned", s=took, n=7, gib_s=size / GIB / took)
        best = size / GIB / took

        def segments() -> None:
            for start in range(0, size, SEGMENT_BYTES):
                end = min(start + SEGMENT_BYTES, size)
                self.arena[start:end].copy_(source[start:end], non_blocking=True)

        took = statistics.median(self.timed(segments) for _ in range(7))
        out("raw", memory="registered segments", s=took, n=7, gib_s=size / GIB / took)
        return max(best, size / GIB / took)

    def copy(self, raw_gib_s: float) -> None:
        """What ``save()`` blocks for in copy mode."""
        copies = self.copies()
        times = [self.timed(lambda: begin(copies, []).wait()) for _ in range(5)]
        out(
            "copy",
            s=statistics.median(times),
            worst_s=max(times),
            n=5,
            gib_s=self.gib / statistics.median(times),
            of_raw=self.gib / statistics.median(times) / raw_gib_s,
            copies=len(copies),
        )

    def overlap(self, name: str, *, borrow: float, accumulate: int = 1) -> None:
        """What training loses to a save beside it, and whether the bytes are those of the moment of the save."""
        steps, copies = max(self.options.steps // accumulate, 2), self.copies()
        declined = why_not([self.optimizer], self.state.values())
        assert declined is None, declined
        lost, blocked, staged, exact = [], [], [], []

        def train() -> None:
            for _ in range(steps):
                self.step(accumulate)

        one_step = statistics.median(self.timed(lambda: self.step(accumulate)) for _ in range(3))
        for _ in range(self.options.rounds):
            plain = self.timed(train)
            begin(copies, []).wait()
            expected = self.digest(copies)
            self.arena.fill_(0xA5)
            self.sync()
            began = time.perf_counter()
            snapshot = begin(copies, [self.optimizer], borrow_bytes=int(borrow * self.size_bytes))
            blocked.append(time.perf_counter() - began)

            def note(began: float = began, snapshot: Any = snapshot) -> None:
                snapshot.wait_copied()
                staged.append(time.perf_counter() - began)

            noting = threading.Thread(target=note)
            noting.start()
            train()
            self.sync()
            lost.append(time.perf_counter() - began - plain)
            noting.join()
            snapshot.confirm()
            exact.append(self.digest(copies) == expected)
        out(
            "overlap",
            name=name,
            borrowed_gib=borrow * self.gib,
            n=len(lost),
            lost_s=statistics.median(lost),
            lost_all_s=[round(one, 4) for one in lost],
            lost_of_step=statistics.median(lost) / one_step,
            step_s=one_step,
            blocked_s=statistics.median(blocked),
            staged_s=statistics.median(staged),
            exact=exact,
        )

    def drop_arena(self) -> None:
        """Give the memory back."""
        self.sync()
        if self.registered:
            for start in range(0, len(self.memory), SEGMENT_BYTES):
                cudart().cudaHostUnregister(self.arena.data_ptr() + start)
        del self.arena, self.memory
        gc.collect()

    def dcp(self) -> None:
        """PyTorch's own asynchronous saves."""
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        quiet = statistics.median(self.timed(self.step) for _ in range(5))
        ram_disk = Path("/dev/shm")
        fits = shutil.disk_usage(ram_disk).free > 1.5 * self.size_bytes
        root = tempfile.mkdtemp(dir=ram_disk if fits else None)
        kinds: list[tuple[str, Callable[[], Any], int]] = [
            ("async, default", lambda: None, 2),
            (
                "async, pinned and staged aside",
                lambda: DefaultStager(
                    StagingOptions(
                        use_pinned_memory=self.cuda,
                        use_shared_memory=False,
                        use_async_staging=self.cuda,
                        use_non_blocking_copy=self.cuda,
                    )
                ),
                1,
            ),
        ]
        for name, make, rounds in kinds:
            try:
                stager = make()
                for n in range(rounds):
                    self.sync()
                    began = time.perf_counter()
                    more = {"async_stager": stager} if stager else {}
                    pending: Any = dcp.async_save(  # type: ignore[attr-defined]  # its stub forgets it
                        {"s": self.state}, checkpoint_id=f"{root}/{n}", **more
                    )
                    blocked = time.perf_counter() - began
                    future = getattr(pending, "upload_completion", pending)
                    steps = 0
                    while not future.done():
                        self.timed(self.products)  # no update: nothing holds it back until the copy is over
                        steps += 1
                    future.result()
                    took = time.perf_counter() - began
                    products = statistics.median(self.timed(self.products) for _ in range(3))
                    out(
                        "dcp",
                        name=name,
                        round=n,
                        blocked_s=blocked,
                        total_s=took,
                        lost_s=took - steps * products,
                        step_s=quiet,
                        to=str(Path(root).parent),
                    )
                    shutil.rmtree(f"{root}/{n}", ignore_errors=True)
                if stager:
                    stager.close()
            except Exception as exc:
                out("dcp", name=name, error=repr(exc)[:300])
        shutil.rmtree(root, ignore_errors=True)


def cudart() -> Any:
    """The CUDA runtime."""
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]  # torch's own


def anonymous(size_bytes: int) -> mmap.mmap:
    """Memory of the kind that the arena is made of."""
    return mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def advise_huge(memory: mmap.mmap) -> None:
    """Ask for huge pages, where the system has them."""
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)


def registered(address: int, *, touch: bool, cuda: bool = True) -> float:
    """Pin one segment; seconds it took. The interpreter lock is let go meanwhile."""
    began = time.perf_counter()
    if touch:
        ctypes.memset(address, 0, SEGMENT_BYTES)
    if cuda:
        code = cudart().cudaHostRegister(address, SEGMENT_BYTES, 1)
        if int(code) != 0:
            raise RuntimeError(f"cudaHostRegister failed: {code}")
    return time.perf_counter() - began


def register() -> None:
    """What it costs to pin a segment of each kind of memory, with nothing beside it."""
    torch.empty(1, device="cuda")
    for name, huge, touch in (("untouched", False, False), ("touched", False, True), ("huge, touched", True, True)):
        memory = anonymous(4 * SEGMENT_BYTES)
        if huge:
            advise_huge(memory)
        address = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
        times = [registered(address + n * SEGMENT_BYTES, touch=touch) for n in range(4)]
        out("register", memory=name, beside_training=False, segments=4, segment_s=statistics.median(times))
        for n in range(4):
            cudart().cudaHostUnregister(address + n * SEGMENT_BYTES)


def crossing() -> None:
    """One copy over the border of two segments, and the same in two. In a process of its own: it may break CUDA."""
    memory = anonymous(2 * SEGMENT_BYTES)
    arena = torch.frombuffer(memory, dtype=torch.uint8)
    torch.empty(1, device="cuda")
    for n in range(2):
        registered(arena.data_ptr() + n * SEGMENT_BYTES, touch=False)
    size = 128 << 20
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device="cuda")
    start = SEGMENT_BYTES - size // 2
    halves = ((start, 0, size // 2), (SEGMENT_BYTES, size // 2, size))
    for name, pieces in (("split", halves), ("in one", ((start, 0, size),))):
        arena.fill_(0)
        times, error, issued = [], None, []
        try:
            for _ in range(5):
                torch.cuda.synchronize()
                began = time.perf_counter()
                for at, first, end in pieces:
                    arena[at : at + end - first].copy_(source[first:end], non_blocking=True)
                issued.append(time.perf_counter() - began)
                torch.cuda.synchronize()
                times.append(time.perf_counter() - began)
        except RuntimeError as exc:
            error = str(exc).splitlines()[0]
        exact = error is None and torch.equal(arena[start : start + size], source.cpu())
        rate = size / GIB / statistics.median(times) if times else None
        issue = statistics.median(issued) if issued else None
        pinned = arena[start : start + size].is_pinned()
        out("crossing", how=name, exact=exact, error=error, gib_s=rate, host_blocked_s=issue, is_pinned=pinned)


def apart(name: str) -> None:
    """Run one case in a process of its own, and pass on what it says."""
    done = subprocess.run([sys.executable, __file__, "--only", name], capture_output=True, text=True, check=False)
    sys.stdout.write(done.stdout)
    sys.stdout.flush()
    if done.returncode:
        out(name, error=done.stderr[-300:])


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=20)
    parser.add_argument("--steps", type=int, default=12, help="steps beside each save")
    parser.add_argument("--rounds", type=int, default=4, help="saves of each kind of overlap")
    parser.add_argument("--products", type=int, default=150, help="matrix products in a step")
    parser.add_argument("--matmul", type=int, default=8192, help="their size")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--without-dcp", action="store_true")
    parser.add_argument("--only", choices=["crossing", "register"])
    options = parser.parse_args(arguments)
    if options.only:
        {"crossing": crossing, "register": register}[options.only]()
        return
    warnings.filterwarnings("ignore")
    began = time.perf_counter()
    if options.device == "cuda":
        apart("crossing")
        apart("register")
    watch()
    bench = Bench(options)
    about: Mapping[str, Any] = {"torch": torch.__version__, "tensors": len(bench.state), "gib": bench.gib}
    out("machine", device=torch.cuda.get_device_name() if bench.cuda else "cpu", **about)
    for _ in range(2):
        bench.step()
    bench.make_arena()
    raw_gib_s = bench.raw()
    bench.copy(raw_gib_s)
    bench.overlap("an update every step", borrow=0)
    bench.overlap("an update every step, half of the state through the device", borrow=0.5)
    bench.overlap("an update every step, all of the state through the device", borrow=1)
    bench.overlap("an update every other step", borrow=0, accumulate=2)
    bench.drop_arena()
    if not options.without_dcp:
        bench.dcp()
    out("end", s=time.perf_counter() - began)


if __name__ == "__main__":
    main()
