"""Runs a plan: every case of every size in turn, round after round, so that drift hits all alike."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.cases.base import kinds_of
from benchmarks.machine import facts, without_paths
from benchmarks.plans import LINKS, Link, Plan
from benchmarks.sink.process import SinkProcess, make_certificate
from benchmarks.state import GIB, expected_bytes

__all__ = ["Results", "Row", "Server", "case_command", "fill", "run", "serving"]

_ROOT = Path(__file__).parents[1]
#: What the load cases read, by what their names begin with.
_FORMATS = {
    "socket": "raw", "read": "raw", "cloudckpt": "cloudckpt", "dcp": "dcp", "s3torchconnector_dcp": "dcp",
    "safetensors": "safetensors", "runai": "safetensors",
}  # fmt: skip
#: To write every format of a few gigabytes, on a busy machine.
_FILL_S = 1800
Row = dict[str, Any]


class Results:
    """A results file: a line of facts, then a line a case and round.

    What is there already is not run again, unless it comes from another machine, from other versions, or from another
    state of cloudckpt's own source: then the file begins anew.
    """

    def __init__(self, path: Path, *, fresh: bool = False) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        now = facts()
        text = "" if fresh or not path.exists() else path.read_text()
        lines = [json.loads(line) for line in text.splitlines() if line.endswith("}")]  # but one broken off
        before = lines[0]["machine"] if lines else now
        if differ := [name for name in now if before.get(name) != now[name]]:
            print(f"{path.name} was made with another {', '.join(differ)}: beginning it anew", flush=True)
            lines = []
        # What failed is tried again by a new run.
        self.rows: list[Row] = [row for row in lines[1:] if "error" not in row]
        kept = [{"machine": now}, *self.rows]
        path.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self._there = {self._key(row) for row in self.rows}

    @staticmethod
    def _key(row: Row) -> tuple[object, ...]:
        return (row["size"], row["case"], row["processes"], row["round"])

    def __contains__(self, row: Row) -> bool:
        return self._key(row) in self._there

    def add(self, row: Row) -> None:
        """Write a row at once, so that a run that is broken off loses nothing."""
        self.rows.append(row)
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")


@dataclass(slots=True)
class Server:
    """What a plan's cases speak to."""

    environment: dict[str, str]
    sink: SinkProcess | None = None

    def cpu_s(self) -> float:
        return self.sink.cpu_s() if self.sink else 0.0


@contextlib.contextmanager
def serving(link: Link, *, discard: bool, work: Path) -> Iterator[Server]:
    """Start the server of a link, and stop it."""
    if link.server == "sink":
        tls = make_certificate(work) if link.tls else None
        with SinkProcess(
            discard=discard, delay_ms=link.delay_ms, connection_mb_per_s=link.connection_mb_per_s, tls=tls
        ) as sink:
            yield Server(sink.environment() | {"BENCH_COUNTS": "1"}, sink)
    elif link.server == "seaweedfs":
        from cloudckpt.testing.servers import SeaweedFS

        with SeaweedFS() as real:
            real.create_bucket("bench")
            yield Server({**real.environment(), "AWS_REGION": "us-east-1", "AWS_S3_FORCE_PATH_STYLE": "true"})
    else:
        yield Server({})


def run(plan: Plan, results: Results, *, work: Path) -> None:
    """Run what the results lack. A case that fails is written down and not tried again in this run."""
    known = kinds_of(plan.group)
    if unknown := [name for name in plan.cases if name not in known]:
        raise ValueError(f"{plan.group} has no case {', '.join(unknown)}; it has {', '.join(known)}")
    names = plan.cases or tuple(known)
    missing = [row for row in _rounds(plan, names) if row not in results]
    if not missing:
        return
    work.mkdir(parents=True, exist_ok=True)
    loads = plan.group.startswith("load")
    failed: set[tuple[object, ...]] = set()
    with serving(LINKS[plan.link], discard=plan.group.startswith(("save", "stall")), work=work) as server:
        if loads:
            fill(plan, names, server, work)
        for at, row in enumerate(missing):
            which = (row["size"], row["case"], row["processes"])
            if which in failed:
                continue
            named = {"plan": plan.name, "group": plan.group, "link": plan.link, "kind": known[str(row["case"])]}
            found = named | row | _measured(plan, row, server, work, at)
            results.add(found)
            _tell(found, at + 1, len(missing))
            if "error" in found:
                failed.add(which)
    if loads:
        shutil.rmtree(work / "filled", ignore_errors=True)


def _rounds(plan: Plan, names: tuple[str, ...]) -> Iterator[Row]:
    """Every case of every size in turn, there and back: what one does to the next one's caches, both neighbours get."""
    for number in range(plan.rounds):
        onward = slice(None, None, -1 if number % 2 else 1)
        for size in plan.sizes[onward]:
            for processes in plan.processes:
                for name in names[onward]:
                    yield {"size": size, "case": name, "processes": processes, "round": number}


def fill(plan: Plan, names: tuple[str, ...], server: Server, work: Path) -> None:
    """Write what the load cases read, in each format that they name."""
    formats = {next((made for begin, made in _FORMATS.items() if name.startswith(begin)), "pt") for name in names}
    shutil.rmtree(work / "filled", ignore_errors=True)
    sizes = list(dict.fromkeys(["tiny", *plan.sizes]))  # every case begins with a tiny one
    print(f"{plan.name}: writing what is read at {', '.join(sizes)}", flush=True)
    path = str(work / "filled") if plan.link == "disk" else "bench/filled"
    command = [sys.executable, "-m", "benchmarks.fill", path, "--sizes", *sizes, "--only", *sorted(formats)]
    subprocess.run(command, env={**os.environ, **server.environment}, cwd=_ROOT, check=False, timeout=_FILL_S)


def _too_large(plan: Plan, row: Row) -> str:
    """Why a state is not tried: a machine that runs out of memory kills more than the case."""
    if plan.group == "discover":
        return ""
    # The state, an arena or a serialised copy of it, and half as much again for parts and buffers.
    needed = expected_bytes(row["size"]) * max(1, row["processes"]) * 5 // 2
    told = Path("/proc/meminfo").read_text(encoding="ascii")
    there = next(int(line.split()[1]) * 1024 for line in told.splitlines() if line.startswith("MemAvailable:"))
    return f"not tried: it takes {needed / GIB:.0f} GiB, and {there / GIB:.0f} are free" if needed > there else ""


def case_command(group: str, case: str, size: str, path: str, server: Server) -> tuple[list[str], dict[str, str]]:
    """What runs one case in a fresh process, and its environment."""
    return [sys.executable, "-m", "benchmarks.case", group, case, size, path], {**os.environ, **server.environment}


def _measured(plan: Plan, row: Row, server: Server, work: Path, at: int) -> Row:
    if why := _too_large(plan, row):
        return {"error": why}
    loads, disk = plan.group.startswith("load"), plan.link == "disk"
    if loads:
        path = str(work / "filled") if disk else "bench/filled"
    else:
        path = str(work / "case") if disk else f"bench/{row['case']}-{at}"
    if plan.group == "discover":
        path = "bench/discover"
    if disk and not loads:
        shutil.rmtree(path, ignore_errors=True)
    os.sync()  # what others wrote is not paid for by this case
    before = server.cpu_s()
    command, environment = case_command(plan.group, str(row["case"]), str(row["size"]), path, server)
    if count := int(row["processes"]):
        found = _together(command, count, environment, plan.timeout_s)
    else:
        found = _alone(command, environment, plan.timeout_s)
    if disk and not loads:
        shutil.rmtree(path, ignore_errors=True)
    return found | {"server_cpu_s": server.cpu_s() - before}


def _start(command: list[str], environment: dict[str, str]) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    # A session of its own: a case that hangs is stopped with its helpers.
    return subprocess.Popen(
        command, env=environment, cwd=_ROOT, stdin=pipe, stdout=pipe, stderr=pipe, text=True, start_new_session=True
    )


def _alone(command: list[str], environment: dict[str, str], timeout_s: float) -> Row:
    process = _start(command, environment)
    try:
        out, err = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        _stop(process)
        return {"error": f"took longer than {timeout_s:g} s"}
    finally:
        _stop_helpers(process)
    return _result_of(out, err)


def _result_of(out: str, err: str) -> Row:
    for line in out.splitlines():
        if line.startswith("RESULT "):
            found: Row = json.loads(line.removeprefix("RESULT "))
            return found
    said = [line for line in err.splitlines() if line.strip() and not line.startswith((" ", "Traceback"))]
    return {"error": without_paths(said[-1]) if said else "ended without a word"}


def _stop(process: subprocess.Popen[str]) -> None:
    _stop_helpers(process)
    process.communicate()


def _stop_helpers(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _together(command: list[str], count: int, environment: dict[str, str], timeout_s: float) -> Row:
    """Independent savers that begin at one moment: the wall time is until the last one has ended."""
    *first, path = command
    processes = [_start([*first, f"{path}-{number}", "--hold"], environment) for number in range(count)]
    try:
        for process in processes:
            _wait_for_word(process)
        began = time.perf_counter()
        for process in processes:
            if process.stdin is not None:
                process.stdin.write("go\n")
                process.stdin.flush()
        found = []
        for process in processes:
            out, err = process.communicate(timeout=timeout_s)
            found.append(_result_of(out, err))
        together_s = time.perf_counter() - began
    except (subprocess.TimeoutExpired, EOFError, BrokenPipeError) as exc:
        return {"error": f"{count} processes: {without_paths(str(exc)) or type(exc).__name__}"}
    finally:
        for process in processes:
            _stop_helpers(process)
            process.wait()
    if failures := [row for row in found if "error" in row]:
        return failures[0]
    summed = ("bytes", "cpu_s", "peak_bytes", "bytes_in", "bytes_out")
    # Each tells its own time, without the moment its process needs to end.
    wall_s = max(row["wall_s"] for row in found)
    return {"wall_s": wall_s, "together_s": together_s} | {name: sum(row[name] for row in found) for name in summed}


def _wait_for_word(process: subprocess.Popen[str]) -> None:
    if process.stdout is None:
        raise EOFError("no output to read")
    for line in process.stdout:
        if line.startswith("READY"):
            return
    said = process.stderr.read().splitlines() if process.stderr is not None else []
    raise EOFError(said[-1] if said else "ended before it was ready")


def _tell(row: Row, at: int, total: int) -> None:
    if "error" in row:
        said = f"FAILED: {row['error']}"
    elif "later" in row:
        said = f"blocks {row['later']['stall_s']:.3f} s, loses {row['later']['lost_s']:.3f} s"
    else:
        said = f"{row['wall_s']:.3f} s"
    with_others = f" x{row['processes']}" if row["processes"] else ""
    print(f"{row['plan']} {at}/{total}  {row['size']} {row['case']}{with_others}  {said}", flush=True)
