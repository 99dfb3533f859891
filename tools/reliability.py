"""Write the tables of ``docs/reliability.md`` from what was run, or check that they are from nothing else.

    python -m pytest tests/crash tests/power tests/security tests/soak -m "slow or not slow" --record runs.jsonl
    python tools/reliability.py --add runs.jsonl     take them over into docs/reliability.jsonl, and write the tables
    python tools/reliability.py --write              write the tables
    python tools/reliability.py                      exit 1 and a diff if they are stale

``docs/reliability.jsonl`` has one line for each case: story, fault, backend, test, and how its last run ended. A case
that is run again replaces its line. Nothing is typed into a table by hand: a cell without a run behind it says so.
"""

from __future__ import annotations

import argparse
import difflib
import json
import platform
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RUNS = ROOT / "docs" / "reliability.jsonl"
PAGE = ROOT / "docs" / "reliability.md"
_BLOCK = re.compile(r"(<!-- from runs: ([a-z-]+) -->\n)(.*?)(<!-- /from runs -->)", re.DOTALL)
#: Faults that are counted in a line of their own, or are none.
_OTHERS = ("fuzz", "kill", "SIGSTOP", "power cut", "none", "5 %")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One line of the runs. ``where`` is the machine they were made on, in words."""

    story: str
    fault: str
    backend: str
    test: str
    points: int
    outcome: str
    note: str = ""
    figures: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    where: str = ""

    @property
    def name(self) -> tuple[str, str, str, str]:
        """What makes it the same case as another."""
        return self.story, self.fault, self.backend, self.test


def read(path: Path) -> list[Case]:
    """The cases of a file, oldest first; none if there is no file."""
    if not path.exists():
        return []
    return [Case(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def merged(before: Iterable[Case], new: Iterable[Case]) -> list[Case]:
    """The last run of each case, by name. A skip does not replace a run: it says nothing about the program."""
    found = {case.name: case for case in before}
    for case in new:
        if case.outcome == "skipped" and case.name in found and found[case.name].outcome != "skipped":
            continue
        found[case.name] = case
    return [found[name] for name in sorted(found)]


def write(cases: Sequence[Case], path: Path) -> None:
    """Put the cases into a file, a line each."""
    lines = [json.dumps(asdict(case), sort_keys=True) for case in cases]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", newline="\n")


# -- the tables ----------------------------------------------------------------------------------------------


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def _cell(cases: Sequence[Case]) -> str:
    """How often, and how it ended: what failed is named before what held, and what was skipped is not passed over."""
    if not cases:
        return ""
    failed = [case for case in cases if case.outcome == "failed"]
    if failed:
        return f"**failed** ({len(failed)} of {len(cases)} cases)"
    ran = [case for case in cases if case.outcome == "held"]
    skipped = len(cases) - len(ran)
    if not ran:
        return f"skipped: {cases[0].note[:60]}"
    return f"{sum(case.points for case in ran)} held" + (f", {skipped} skipped" if skipped else "")


def crash_matrix(cases: Sequence[Case]) -> str:
    """Story and fault by backend: points run and outcome."""
    chosen = [case for case in cases if case.fault != "fuzz" and "control" not in case.story]
    if not chosen:
        return "No run has been recorded yet.\n"
    backends = sorted({case.backend for case in chosen})
    cells: defaultdict[tuple[str, str], defaultdict[str, list[Case]]] = defaultdict(lambda: defaultdict(list))
    for case in chosen:
        cells[case.story, case.fault][case.backend].append(case)
    rows = [[*name, *(_cell(by[backend]) for backend in backends)] for name, by in sorted(cells.items())]
    return _table(["story", "fault", *backends], rows)


def fuzzing(cases: Sequence[Case]) -> str:
    """Targets and executions."""
    chosen = [case for case in cases if case.fault == "fuzz"]
    rows = [[case.story, case.points, f"{case.seconds:.0f}", case.outcome] for case in chosen]
    return _table(["target", "executions", "seconds", "outcome"], rows) if rows else "No run has been recorded yet.\n"


def controls(cases: Sequence[Case]) -> str:
    """What must go wrong, so that the rest means something."""
    chosen = [case for case in cases if "control" in case.story]
    rows = [
        [case.story, case.fault, case.backend, case.points, ", ".join(f"{v:g} {k}" for k, v in case.figures.items())]
        for case in chosen
        if case.outcome == "held"
    ]
    head = ["control", "fault", "backend", "points", "found"]
    return _table(head, rows) if rows else "No run has been recorded yet.\n"


def figures(cases: Sequence[Case]) -> str:
    """Sums over everything, and the figures of the long runs."""
    if not cases:
        return "No run has been recorded yet.\n"
    ran = [case for case in cases if case.outcome != "skipped"]
    kinds: dict[str, Callable[[Case], bool]] = {
        "points at which a call or a request was broken": lambda c: not any(word in c.fault for word in _OTHERS),
        "fuzz executions": lambda c: c.fault == "fuzz",
        "power cuts": lambda c: c.fault == "power cut",
        "real processes killed or stopped": lambda c: "kill" in c.fault or "SIGSTOP" in c.fault,
    }
    rows: list[list[object]] = [[name, sum(c.points for c in ran if chosen(c))] for name, chosen in kinds.items()]
    rows.append(["cases run", len(ran)])
    rows.append(["cases that failed", sum(c.outcome == "failed" for c in ran)])
    rows.append(["cases skipped", len(cases) - len(ran)])
    text = _table(["figure", "value"], rows)
    long = [case for case in ran if case.figures and "control" not in case.story]
    if long:
        text += "\n" + _table(
            ["case", "fault", "backend", "figures"],
            [
                [c.story, c.fault, c.backend, ", ".join(f"{name}: {value:g}" for name, value in c.figures.items())]
                for c in long
            ],
        )
    machines = sorted({case.where for case in ran if case.where})
    return text + "".join(f"\nMade on: {machine}.\n" for machine in machines)


def skipped(cases: Sequence[Case]) -> str:
    """What could not be run, and why."""
    if not cases:
        return "No run has been recorded yet.\n"
    rows = [[c.story, c.fault, c.backend, c.note] for c in cases if c.outcome == "skipped"]
    return _table(["story", "fault", "backend", "why"], rows) if rows else "Nothing was skipped.\n"


TABLES: dict[str, Callable[[Sequence[Case]], str]] = {
    "crash-matrix": crash_matrix,
    "fuzzing": fuzzing,
    "controls": controls,
    "figures": figures,
    "skipped": skipped,
}


def renewed(text: str, cases: Sequence[Case]) -> str:
    """The page with every table made anew."""
    return _BLOCK.sub(lambda match: f"{match[1]}\n{TABLES[match[2]](cases).rstrip()}\n\n{match[4]}", text)


def check(page: Path = PAGE, runs: Path = RUNS) -> str:
    """A diff of what is stale; empty if nothing is."""
    text = page.read_text(encoding="utf-8")
    wanted = renewed(text, read(runs))
    return "".join(
        difflib.unified_diff(
            text.splitlines(keepends=True), wanted.splitlines(keepends=True), page.name, "as the runs say"
        )
    )


def _here() -> str:
    return f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"


def main() -> int:
    """Check, write, or take runs over."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the tables")
    parser.add_argument("--add", type=Path, nargs="+", default=[], help="runs to take over, as --record wrote them")
    given = parser.parse_args()
    if given.add:
        new = [Case(**{**json.loads(line), "where": _here()}) for p in given.add for line in p.read_text().splitlines()]
        write(merged(read(RUNS), new), RUNS)
    if given.add or given.write:
        PAGE.write_text(renewed(PAGE.read_text(encoding="utf-8"), read(RUNS)), encoding="utf-8", newline="\n")
        return 0
    diff = check()
    sys.stdout.write(diff)
    return 1 if diff else 0


if __name__ == "__main__":
    sys.exit(main())
