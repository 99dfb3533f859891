"""Host memory as addresses: how much there is, and the plain copy of bytes."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from pathlib import Path

__all__ = ["available_bytes", "copy_large", "copy_small", "cpus"]

_GROUP = Path("/sys/fs/cgroup")

#: ``(target, source, size_bytes)`` by address. Lets other Python threads run meanwhile.
copy_large: Callable[[int, int, int], object] = ctypes.memmove

#: The same without letting go of the interpreter, which for a few KiB costs more than the copy.
copy_small: Callable[[int, int, int], object] = ctypes.PYFUNCTYPE(
    ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t
)(ctypes.cast(ctypes.memmove, ctypes.c_void_p).value or 0)


def cpus() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def available_bytes() -> int | None:
    """How much memory can be touched before the kernel starts to kill; None where it does not say.

    The least of what the machine has and what the container is allowed. An allocation alone tells nothing: Linux
    grants more than there is, and ends the process at the page that is too much.
    """
    known = [found for found in (_machine(), _container()) if found is not None]
    return min(known, default=None)


def _machine() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
    except (OSError, ValueError):
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _container() -> int | None:
    try:
        limit, used = ((_GROUP / name).read_text("ascii").strip() for name in ("memory.max", "memory.current"))
        stat = dict(line.split() for line in (_GROUP / "memory.stat").read_text("ascii").splitlines())
        # File pages that nobody used lately count as used, and are given up at once.
        return None if limit == "max" else max(0, int(limit) - int(used) + int(stat.get("inactive_file", 0)))
    except (OSError, ValueError):
        return None
