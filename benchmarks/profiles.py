"""Where the processor's time goes in what misses its bar: sampled by py-spy, told by function.

python -m benchmarks profiles [--only BAR,...]     writes benchmarks/results/profiles.jsonl

A case runs as in its bar (a tiny state, then twice at size); the samples taken while one of cloudckpt's functions is
anywhere on a thread's stack and the thread computes are counted for the innermost function of that stack. py-spy sees
Python's functions: what a C extension or the kernel does counts for the function that calls it.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.bars import BARS
from benchmarks.plans import BARS as BAR_PLANS
from benchmarks.plans import LINKS
from benchmarks.runner import Results, Row, case_command, fill, serving

__all__ = ["PROFILED", "Share", "measure_profiles", "profile_section", "shares"]

#: Bars whose limit is the processor, by name; one that is met is profiled all the same, and left out of the page.
PROFILED = ("save-s3-cpu", "save-s3-tls", "save-s3-far", "load-s3", "load-s3-tls", "tensors")
_SAMPLES_PER_S = 50  # each stops the process for a moment
_OURS = "cloudckpt/"
#: ``function (path/of/file.py:line)``, as py-spy writes a frame.
_FRAME = re.compile(r"^(?P<function>.+) \((?P<file>[^:()]+)(?::\d+)?\)$")
#: The arena is made before a save is timed, and modules are imported once.
_LEFT_OUT = re.compile(r"prepare \(\S*cloudckpt/|<frozen importlib")
#: A thread that waits here is taken for one that computes.
_WAITING = (
    "_work (cloudckpt/storage/direct/threads.py)",
    "Condition.wait (threading.py)",
    "Condition.__enter__ (threading.py)",
    "EpollSelector.select (selectors.py)",
)
_TIMES = 3
_SHOWN = 8


@dataclass(frozen=True, slots=True)
class Share:
    """One function's share of the samples.

    Attributes:
        function: its name and file.
        share: of all that were counted, 0 to 1.
    """

    function: str
    share: float


def shares(folded: Iterable[str]) -> list[Share]:
    """What each innermost function took, largest first, from py-spy's raw format: ``frame;frame;frame count``."""
    counted: Counter[str] = Counter()
    for line in folded:
        stack, _, count = line.rpartition(" ")
        frames = stack.split(";")
        if not count.isdigit() or not any(_OURS in frame for frame in frames) or _LEFT_OUT.search(stack):
            continue
        counted[_name(frames[-1])] += int(count)
    total = sum(counted.values())
    return [Share(name, count / total) for name, count in counted.most_common()]


def _name(frame: str) -> str:
    if (found := _FRAME.match(frame)) is None:
        return frame
    path = found["file"]
    short = path[path.rindex(_OURS) :] if _OURS in path else "/".join(path.split("/")[-2:])
    return f"{found['function']} ({short})"


def _measure(name: str, work: Path) -> Row:
    """Run the case of a bar a few times under py-spy."""
    bar = next(bar for bar in BARS if bar.name == name)
    plan = BAR_PLANS[bar.plan]
    work.mkdir(parents=True, exist_ok=True)
    folded = work / "profile.folded"
    spy = str(Path(sys.executable).with_name("py-spy"))
    record = [spy, "record", "--format", "raw", "--rate", str(_SAMPLES_PER_S), "--output", str(folded)]
    lines: list[str] = []
    loads = plan.group.startswith("load")
    with serving(LINKS[plan.link], discard=not loads, work=work) as server:
        if loads:
            fill(replace(plan, sizes=(bar.size,)), (bar.case,), server, work)
        for number in range(_TIMES):
            path = "bench/filled" if loads else f"bench/profile-{number}"
            command, environment = case_command(plan.group, bar.case, bar.size, path, server)
            done = subprocess.run(
                [*record, "--", *command],
                env=environment,
                capture_output=True,
                text=True,
                check=False,
                timeout=plan.timeout_s,
            )
            if "RESULT " not in done.stdout or not folded.exists():
                raise RuntimeError(f"{name}: {(done.stderr or done.stdout).strip()[-400:]}")
            lines += folded.read_text(encoding="utf-8").splitlines()
            folded.unlink()
    found = shares(lines)
    at = {"size": bar.size, "case": bar.case, "processes": 0, "round": 0}
    return {"bar": name, **at, "shares": [[one.function, round(one.share, 4)] for one in found[:40]]}


def measure_profiles(results: Results, names: Iterable[str], work: Path) -> None:
    """Measure what the results lack.

    Raises:
        OSError: py-spy is not there.
        RuntimeError: a case failed, or py-spy may not look into its own child.
    """
    known = {row["bar"] for row in results.rows}
    for name in names:
        if name not in known:
            results.add(_measure(name, work))
            print(f"profiles: {name}", flush=True)


def profile_section(rows: Iterable[Mapping[str, Any]], missed: Mapping[str, str]) -> str:
    """The page's section: one list a missed bar. ``missed`` are their titles by name."""
    lines: list[str] = []
    for row in rows:
        if row["bar"] not in missed:
            continue
        computing = [(function, share) for function, share in row["shares"] if function not in _WAITING]
        whole = 1 - sum(share for function, share in row["shares"] if function in _WAITING)
        told = ", ".join(f"`{function}` {share / whole:.0%}" for function, share in computing[:_SHOWN])
        lines.append(f"- **{missed[row['bar']]}**: {told}")
    if not lines:
        return ""
    said = (
        "The innermost functions among the samples in which cloudckpt computes; what the kernel and C extensions do\n"
        "counts for the function that calls them. Command: `.venv-bench/bin/python -m benchmarks profiles`"
    )
    return "\n".join(["### Where the time goes in them", "", said, "", *lines, ""])
