"""How fast this disk takes a payload object durably, by each way of writing it, against write + fsync.

    python benchmarks/disk.py --folder ./scratch --gib 0.5 2 --rounds 11

One JSON line per size and way: the medians of wall seconds and of CPU seconds a GiB, and the median of the ratio to
write + fsync of the same bytes in the same round, with the bounds that hold it with 95 % confidence (by the order
statistics of the rounds, which assume nothing of the noise). The ways are taken in turn, round after round, in another
order each time, with a sync before each and the file deleted after it, so that drift hits all alike.

A virtual machine may give freed memory back to its host; the page cache is then slow at first, which ``--warm`` takes
out: just before each way, as much is written to another file, which is deleted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import mmap
import os
import random
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import crc32c
from cloudckpt.storage import Landed, LocalStorage
from cloudckpt.storage.base import Part
from cloudckpt.storage.body import NeverStopped
from cloudckpt.storage.local_calls import start_write_back

MIB = 1 << 20
GIB = 1 << 30
PART = 8 * MIB


class MemorySource(NeverStopped):
    """Plain page-aligned memory, summed as it is handed out."""

    def __init__(self, memory: memoryview) -> None:
        self._memory = memory

    @property
    def size_bytes(self) -> int:
        """Bytes in all."""
        return len(self._memory)

    @property
    def together_bytes(self) -> int:
        """It goes alone."""
        return len(self._memory)

    @contextlib.contextmanager
    def hold(self, start: int, length: int) -> Iterator[Part]:
        """A part and its sum."""
        view = self._memory[start : start + length]
        yield Part((view,), crc32c.crc32c(view))

    def __iter__(self) -> Iterator[memoryview]:
        for start in range(0, len(self._memory), PART):
            yield self._memory[start : start + PART]


Way = Callable[[Path, memoryview], None]


def _finish(descriptor: int, folder: Path) -> None:
    os.fsync(descriptor)
    os.close(descriptor)
    place = os.open(folder, os.O_RDONLY)
    os.fsync(place)
    os.close(place)


def _new(folder: Path, flags: int = 0) -> int:
    return os.open(folder / "object", os.O_WRONLY | os.O_CREAT | flags, 0o666)


def write_fsync(folder: Path, memory: memoryview) -> None:
    """The floor: no sum, no rename."""
    descriptor, at = _new(folder), 0
    while at < len(memory):
        at += os.write(descriptor, memory[at:])
    _finish(descriptor, folder)


def _in_parts(
    folder: Path,
    memory: memoryview,
    *,
    part: int = PART,
    threads: int = 1,
    early: bool = True,
    flags: int = 0,
    allocate: bool = False,
) -> None:
    descriptor = _new(folder, flags)
    if allocate:
        os.posix_fallocate(descriptor, 0, len(memory))

    def one(start: int) -> None:
        view = memory[start : start + part]
        crc32c.crc32c(view)
        done = 0
        while done < len(view):
            done += os.pwrite(descriptor, view[done:], start + done)
        if early:
            start_write_back(descriptor, start, len(view))

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(one, range(0, len(memory), part)))
    _finish(descriptor, folder)


def put(folder: Path, memory: memoryview) -> None:
    """The product, past the page cache."""
    LocalStorage(folder).put("object", MemorySource(memory), size_bytes=len(memory))


def put_unaligned(folder: Path, memory: memoryview) -> None:
    """The same from memory that is not aligned, as tensors' own is not."""
    put(folder, memory[64:])


def put_cached(folder: Path, memory: memoryview) -> None:
    """The product through the page cache."""
    LocalStorage(folder, direct_io=False).put("object", MemorySource(memory), size_bytes=len(memory))


def save_like(folder: Path, memory: memoryview) -> None:
    """The product and the three small durable writes of a save: announce, index, commit."""
    storage = LocalStorage(folder)
    body = b"{}" * 10_000
    announced = storage.create("manifest.json", body)
    storage.put("checkpoint-1.0123abcd/model", MemorySource(memory), size_bytes=len(memory))
    storage.put("checkpoint-1.0123abcd/checkpoint.json", [body], size_bytes=len(body))
    if not isinstance(announced, Landed) or not isinstance(
        storage.replace("manifest.json", body + b" ", expecting=announced.version), Landed
    ):
        raise SystemExit("the disk refused a small write")


def three_small(folder: Path, memory: memoryview) -> None:
    """Only the three small durable writes."""
    save_like(folder, memory[:4096])


_DIRECT = getattr(os, "O_DIRECT", 0)

WAYS: dict[str, Way] = {
    "write_fsync": write_fsync,
    "put": put,
    "put_unaligned": put_unaligned,
    "put_cached": put_cached,
    "save_like": save_like,
    "three_small": three_small,
    "sum_then_write": lambda f, m: _in_parts(f, m, early=False),
    "early": _in_parts,
    "early_2_threads": lambda f, m: _in_parts(f, m, threads=2),
    "late_2_threads": lambda f, m: _in_parts(f, m, threads=2, early=False),
    "early_allocated": lambda f, m: _in_parts(f, m, threads=2, allocate=True),
    "direct_1_thread": lambda f, m: _in_parts(f, m, early=False, flags=_DIRECT),
    "direct_2_threads": lambda f, m: _in_parts(f, m, threads=2, early=False, flags=_DIRECT),
    "direct_4_threads": lambda f, m: _in_parts(f, m, threads=4, early=False, flags=_DIRECT),
    "direct_allocated": lambda f, m: _in_parts(f, m, threads=4, early=False, flags=_DIRECT, allocate=True),
}


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _bounds(values: list[float]) -> tuple[float, float]:
    """The narrowest order statistics that hold the median with 95 %; the extremes if there are too few."""
    ordered, n = sorted(values), len(values)
    tail, below = 0, 0.0
    while tail < n // 2 and (below + math.comb(n, tail) / 2**n) * 2 <= 0.05:
        below += math.comb(n, tail) / 2**n
        tail += 1
    at = max(tail - 1, 0)
    return ordered[at], ordered[n - 1 - at]


def _once(way: Way, base: Path, memory: memoryview, *, warm: bool) -> tuple[float, float]:
    folder = Path(tempfile.mkdtemp(dir=base))
    os.sync()
    if warm:
        with tempfile.TemporaryFile(dir=base, buffering=0) as file:
            file.write(memory)
    cpu, began = _cpu(), time.perf_counter()
    try:
        way(folder, memory)
        return time.perf_counter() - began, _cpu() - cpu
    finally:
        shutil.rmtree(folder)


def measure(base: Path, size_bytes: int, rounds: int, names: list[str], *, warm: bool) -> Iterator[dict[str, object]]:
    """Run everything and give one row per way."""
    memory = memoryview(mmap.mmap(-1, size_bytes))
    noise = random.Random(0).randbytes(MIB)
    for start in range(0, size_bytes, MIB):
        memory[start : start + MIB] = noise[: min(MIB, size_bytes - start)]
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for number in range(rounds + 1):
        order = random.Random(number).sample(names, len(names))
        for name in order:
            found = _once(WAYS[name], base, memory, warm=warm)
            if number:  # the first round touches what the others find warm
                times[name].append(found)
    for name in names:
        walls, cpus = zip(*times[name], strict=True)
        ratios = [w / f for w, (f, _) in zip(walls, times["write_fsync"], strict=True)]
        low, high = _bounds(ratios)
        yield {
            "way": name,
            "gib": size_bytes / GIB,
            "warm": warm,
            "rounds": rounds,
            "wall_s": round(statistics.median(walls), 4),
            "wall_min_s": round(min(walls), 4),
            "wall_max_s": round(max(walls), 4),
            "ratio": round(statistics.median(ratios), 3),
            "ratio_95_low": round(low, 3),
            "ratio_95_high": round(high, 3),
            "cpu_s_per_gib": round(statistics.median(cpus) / (size_bytes / GIB), 3),
        }


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(), help="a folder on the disk to be measured")
    parser.add_argument("--gib", type=float, nargs="+", default=[0.5])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--warm", action="store_true", help="have pages ready for the page cache")
    parser.add_argument("--ways", nargs="+", choices=[*WAYS], default=[*WAYS])
    words = parser.parse_args()
    words.folder.mkdir(parents=True, exist_ok=True)
    names = list(dict.fromkeys(["write_fsync", *words.ways]))
    with tempfile.TemporaryDirectory(dir=words.folder, prefix="cloudckpt-disk-") as base:
        for gib in words.gib:
            for row in measure(Path(base), int(gib * GIB), words.rounds, names, warm=words.warm):
                sys.stdout.write(json.dumps(row) + "\n")
                sys.stdout.flush()


if __name__ == "__main__":
    main()
