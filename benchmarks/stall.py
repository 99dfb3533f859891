"""What a save costs a training loop that runs beside it: one thread of matrix products, about 10 ms a step.

Reported of each save: ``stall_s``, how long save() blocked; ``total_s``, until it was durable; ``lost_s``, training
time lost in all = total minus the steps made meanwhile at their quiet time; ``slowdown`` of the steps made meanwhile.
"""

from __future__ import annotations

import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases.base import CASES, Place, StallCase
from benchmarks.meter import Meter
from benchmarks.state import State, make_state, size_bytes

__all__ = ["measure_stall"]

_LATER = 3
_WIDTH = 900


class _Training:
    """Steps of one matrix product, with their quiet time measured beside each save, so that drift hits both alike."""

    def __init__(self) -> None:
        self._left = torch.randn(_WIDTH, _WIDTH)
        self._right = torch.randn(_WIDTH, _WIDTH)

    def step(self) -> None:
        torch.mm(self._left, self._right)

    def quiet_s(self, for_s: float) -> float:
        """The median time of a step when nothing else goes on."""
        took: list[float] = []
        end = time.perf_counter() + for_s
        while time.perf_counter() < end:
            began = time.perf_counter()
            self.step()
            took.append(time.perf_counter() - began)
        return statistics.median(took)


def _one(training: _Training, case: StallCase, state: State, repetition: int) -> dict[str, float | None]:
    before = training.quiet_s(0.5)
    began = time.perf_counter()
    handle = case.save(state, repetition)
    stall_s = time.perf_counter() - began
    steps = 0
    while not handle.done():
        training.step()
        steps += 1
    total_s = time.perf_counter() - began
    handle.result()
    quiet = (before + training.quiet_s(0.5)) / 2
    meanwhile = total_s - stall_s
    return {
        "stall_s": stall_s,
        "total_s": total_s,
        "lost_s": total_s - steps * quiet,
        "slowdown": meanwhile / (steps * quiet) if steps else None,
        "step_s": quiet,
    }


def measure_stall(group: str, name: str, size: str, path: str) -> dict[str, Any]:
    """A first save and three later ones, with training between them."""
    # A folder that is there for every case: DCP's process mode starts a process group of its own.
    for kind in ("tiny", "full"):
        if path.startswith("/"):
            Path(f"{path}/{kind}").mkdir(parents=True)
    tiny = make_state("tiny")
    warm = CASES[group][name](Place(f"{path}/tiny"))
    if not isinstance(warm, StallCase):
        raise TypeError(f"{group} {name} does not run beside training")
    warm.prepare(tiny)
    warm.save(tiny, 0).result()  # imports, connections, helper processes
    warm.close()
    state = make_state(size)
    training = _Training()
    training.quiet_s(1.0)
    with Meter(watch_children=True) as meter:
        case = CASES[group][name](Place(f"{path}/full"))
        if not isinstance(case, StallCase):
            raise TypeError(f"{group} {name} does not run beside training")
        case.prepare(state)
        cpu_before = time.process_time()
        saves = []
        for repetition in range(1 + _LATER):
            saves.append(_one(training, case, state, repetition))
            if path.startswith("/"):
                os.sync()  # the next save does not pay for this one's pages
    case.close()
    later = {
        field: statistics.median(found) if (found := [v for s in saves[1:] if (v := s[field]) is not None]) else None
        for field in saves[0]
    }
    return {
        "bytes": size_bytes(state),
        "first": saves[0],
        "later": later,
        "peak_bytes": meter.peak_bytes,
        "process_cpu_s": time.process_time() - cpu_before,
    }
