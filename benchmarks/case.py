"""One case in this process, printed as one line of JSON.

python -m benchmarks.case GROUP CASE SIZE PATH [--hold]

A tiny state first (imports, connections, credentials), then twice at size. The second time is reported: what the first
one costs more (pages that were never touched, a run's claim) is reported beside it. Memory is the larger of both.
With ``--hold`` the second time begins when a line comes on standard input, so that several processes begin together.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

# Before torch is imported: one thread computes, as in a trainer that shares its machine with others.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from benchmarks.cases.base import CASES, Case, Place, kinds_of
from benchmarks.meter import Meter
from benchmarks.sink.process import Statistics, statistics_of
from benchmarks.state import State, make_state, size_bytes, tensors

__all__ = ["measure"]


def _check(size: str, found: State) -> None:
    """Every byte that was saved has come.

    Raises:
        ValueError: names the first tensor that differs.
    """
    got = tensors(found)
    for name, tensor in tensors(make_state(size)).items():
        if not torch.equal(got[name], tensor):
            raise ValueError(f"{name} is not what was saved")


def _asked() -> Statistics:
    url = os.environ.get("AWS_ENDPOINT_URL")
    # Only the sink counts; a real server is asked nothing.
    return statistics_of(url) if url and os.environ.get("BENCH_COUNTS") else Statistics()


def measure(group: str, name: str, size: str, place: Place, *, hold: bool = False) -> dict[str, Any]:
    """Run a save or a load twice and say what it cost."""
    loads = group.startswith("load")
    state = make_state(size, empty=loads)
    case = CASES[group][name](place)
    if not isinstance(case, Case):
        raise TypeError(f"{group} {name} runs beside training: use benchmarks.stall")
    case.prepare(state)
    meters: list[Meter] = []
    asked = Statistics()
    found: State | None = None
    for repetition in range(2):
        found = None
        if hold and repetition:
            print("READY", flush=True)
            sys.stdin.readline()
        before = _asked()
        with Meter(watch_children=case.children) as meter:
            found = case.run(state, repetition)
        case.settle()
        asked = _asked().since(before)
        meters.append(meter)
    if loads:
        _check(size, state if found is None else found)
    case.close()
    return {
        "bytes": size_bytes(state),
        "wall_s": meters[1].wall_s,
        "cpu_s": meters[1].cpu_s,
        "peak_bytes": max(meter.peak_bytes for meter in meters),
        "first_wall_s": meters[0].wall_s,
        "first_cpu_s": meters[0].cpu_s,
        "requests": {kind: count for kind, count in asked.requests.items() if count},
        "bytes_in": asked.bytes_in,
        "bytes_out": asked.bytes_out,
    }


def _run(group: str, name: str, size: str, path: str, *, hold: bool) -> dict[str, Any]:
    if group.startswith("stall"):
        from benchmarks.stall import measure_stall

        return measure_stall(group, name, size, path)
    if group == "discover":
        from benchmarks.cases.discovery import measure_discovery

        return measure_discovery(name, size, Place(path))
    base = Place(path)
    if group.startswith("load"):
        measure(group, name, "tiny", base / "tiny")
        return measure(group, name, size, base / size)
    for kind in ("tiny", "full"):
        if path.startswith("/"):
            Path(f"{path}/{kind}").mkdir(parents=True)
    measure(group, name, "tiny", base / "tiny")
    return measure(group, name, size, base / "full", hold=hold)


def main() -> None:
    """Run the case that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("group")
    parser.add_argument("case")
    parser.add_argument("size")
    parser.add_argument("path")
    parser.add_argument("--hold", action="store_true")
    given = parser.parse_args()
    warnings.simplefilter("ignore")  # the peers'; what they cost is the subject
    torch.set_num_threads(1)
    kinds_of(given.group)
    result = _run(given.group, given.case, given.size, given.path, hold=given.hold)
    print("RESULT " + json.dumps(result), flush=True)
    os._exit(0)  # some clients keep native threads that slow or break a clean exit


if __name__ == "__main__":
    main()
