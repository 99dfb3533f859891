"""What a piece of work costs this process and its children: seconds, CPU seconds, and memory above the start."""

from __future__ import annotations

import contextlib
import os
import resource
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Self

__all__ = ["Meter", "cpu_s_of", "memory_bytes", "wait_until_still"]

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_LOOK_EVERY_S = 0.02


def memory_bytes(field: str = "VmRSS") -> int:
    """A memory field of this process: ``VmRSS`` is what is resident, ``VmHWM`` the most since the last reset."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def wait_until_still(*, most_s: float, still_s: float = 1.5) -> float:
    """Wait until resident memory has not grown for a while: what is made in the background is there. Seconds waited."""
    began = grown = time.monotonic()
    highest = memory_bytes()
    while (now := time.monotonic()) - began < most_s and now - grown < still_s:
        time.sleep(_LOOK_EVERY_S)
        if (found := memory_bytes()) > highest + (1 << 20):
            highest, grown = found, time.monotonic()
    return time.monotonic() - began


def cpu_s_of(pid: int) -> float:
    """CPU seconds of a process and of the children it has waited for; 0 when it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    except OSError:
        return 0.0
    return sum(map(int, fields[11:15])) / _TICKS_PER_S


def _descendants(pid: int) -> list[int]:
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in map(int, (task / "children").read_text(encoding="ascii").split()):
                found += [child, *_descendants(child)]
    return found


def _private_bytes(pid: int) -> int:
    """Resident memory that a process does not share; what it shares is already in its maker's."""
    try:
        resident, shared = map(int, Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1:3])
    except OSError:
        return 0
    return (resident - shared) * _PAGE_BYTES


class Meter:
    """``with Meter() as meter: work()``, then its attributes.

    Attributes:
        wall_s: seconds.
        cpu_s: CPU seconds of this process and of all of its descendants, those that live on included.
        peak_bytes: the most memory above the start, descendants' private memory included if they are watched.
    """

    def __init__(self, *, watch_children: bool = False) -> None:
        self._watch_children = watch_children
        self._ended = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._children_before = self._children_most = 0
        self.wall_s = self.cpu_s = 0.0
        self.peak_bytes = 0

    def __enter__(self) -> Self:
        # VmHWM becomes VmRSS: proc(5), clear_refs.
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        self._resident = memory_bytes()
        if self._watch_children:
            self._children_before = self._children_most = self._children_bytes()
            self._watcher.start()
        self._cpu = self._cpu_s()
        self._began = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.wall_s = time.perf_counter() - self._began
        self.cpu_s = self._cpu_s() - self._cpu
        self._ended.set()
        if self._watch_children:
            self._watcher.join()
        own = max(0, memory_bytes("VmHWM") - self._resident)
        self.peak_bytes = own + max(0, self._children_most - self._children_before)

    @staticmethod
    def _cpu_s() -> float:
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(u.ru_utime + u.ru_stime for u in used) + sum(map(cpu_s_of, _descendants(os.getpid())))

    @staticmethod
    def _children_bytes() -> int:
        return sum(map(_private_bytes, _descendants(os.getpid())))

    def _watch(self) -> None:
        while not self._ended.wait(_LOOK_EVERY_S):
            self._children_most = max(self._children_most, self._children_bytes())
