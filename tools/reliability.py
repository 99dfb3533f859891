"""Write the tables of ``docs/reliability.md`` from what was run, or check that they are from nothing else.

    python -m pytest tests/crash tests/model --record runs.jsonl    (what else: docs/reliability.md)
    python tools/mutation.py run --record runs.jsonl
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
#: What the suites call what is no fault at a call, so that it is shown and counted by itself.
_SEARCHED, _HISTORIES = "searched", "random histories"
_PROTOCOL_MUTANT, _CODE_MUTANT = "a protocol mutant", "a code mutant"
_OWN_TABLES = ("fuzz", _SEARCHED, _PROTOCOL_MUTANT, _CODE_MUTANT)
_BESIDE = ("looked at", "in between")
#: Faults that are counted in a line of their own, or are none.
_OTHERS = (*_OWN_TABLES, _HISTORIES, *_BESIDE, "kill", "SIGSTOP", "power cut", "none", "5 %")
_NOTHING = "No run has been recorded yet.\n"


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


def _number(value: float) -> str:
    """Whole numbers in full: a manifest has 4312345 bytes, and not 4.31234e+06."""
    return f"{value:.0f}" if value == round(value) else f"{value:g}"


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


#: How often the runs on the page were made; without these options each file is content with less.
_OFTEN = {
    "tests/crash/test_kill.py": "--kills 200",
    "tests/crash/test_zombie.py": "--kills 200",
    "tests/distributed/test_torchrun_kills.py": "--kills 100",
    "tests/power/test_power_cuts.py": "--cuts 50",
    "tests/soak/test_long_runs.py": "--soak 10000",
    "tests/stateful/test_stateful.py": "--stories long",
}


def _command(cases: Iterable[Case]) -> str:
    """What to type to have these again: the whole files, slow cases and all."""
    files = sorted({case.test.partition("::")[0] for case in cases})
    often = sorted({_OFTEN[file] for file in files if file in _OFTEN})
    return "`" + " ".join(["python -m pytest", *files, '-m "slow or not slow"', *often]) + "`"


def crash_matrix(cases: Sequence[Case]) -> str:
    """Story and fault by backend: points run and outcome; and the command."""
    chosen = [case for case in cases if case.fault not in _OWN_TABLES and "control" not in case.story]
    if not chosen:
        return _NOTHING
    backends = sorted({case.backend for case in chosen})
    cells: defaultdict[tuple[str, str], defaultdict[str, list[Case]]] = defaultdict(lambda: defaultdict(list))
    for case in chosen:
        cells[case.story, case.fault][case.backend].append(case)
    rows = [
        [*name, *(_cell(by[backend]) for backend in backends), _command(case for of in by.values() for case in of)]
        for name, by in sorted(cells.items())
    ]
    return _table(["story", "fault", *backends, "command"], rows)


def model(cases: Sequence[Case]) -> str:
    """How far each scenario of the protocol was searched. The same scenario at another depth replaces it."""
    rows = [
        [
            case.story,
            case.points,
            _number(case.figures.get("steps", 0)),
            _number(case.figures.get("stores recovered", 0)),
            "yes" if case.figures.get("all of them") else "no, stopped at the bound",
            case.outcome,
        ]
        for case in cases
        if case.fault == _SEARCHED
    ]
    head = ["scenario", "states", "steps", "stores recovered", "all that can be reached", "outcome"]
    return _table(head, rows) if rows else _NOTHING


def mutants(cases: Sequence[Case]) -> str:
    """What was made wrong on purpose, how often, and how often a test noticed."""
    rows: list[list[object]] = []
    known = [case for case in cases if case.fault == _PROTOCOL_MUTANT and case.outcome != "skipped"]
    if known:
        caught = sum(case.outcome == "held" for case in known)
        rows.append(["mistakes in the protocol, made by hand", len(known), caught, len(known) - caught, ""])
    for case in cases:
        if case.fault == _CODE_MUTANT:
            noticed = case.figures.get("noticed", 0)
            rows.append([f"`{case.story}`", case.points, _number(noticed), _number(case.points - noticed), case.note])
    return _table(["what", "mutants", "noticed", "survived", "remark"], rows) if rows else _NOTHING


def fuzzing(cases: Sequence[Case]) -> str:
    """Targets and executions."""
    chosen = [case for case in cases if case.fault == "fuzz"]
    rows = [[case.story, case.points, f"{case.seconds:.0f}", case.outcome] for case in chosen]
    return _table(["target", "executions", "seconds", "outcome"], rows) if rows else _NOTHING


def controls(cases: Sequence[Case]) -> str:
    """What must go wrong, so that the rest means something."""
    chosen = [case for case in cases if "control" in case.story]
    rows: list[list[object]] = []
    for case in chosen:
        if case.outcome == "held":
            found = ", ".join(f"{_number(value)} {name}" for name, value in case.figures.items())
            rows.append([case.story, case.fault, case.backend, case.points, found])
    head = ["control", "fault", "backend", "points", "found"]
    return _table(head, rows) if rows else _NOTHING


def figures(cases: Sequence[Case]) -> str:
    """Sums over everything, and the figures of the long runs."""
    if not cases:
        return _NOTHING
    ran = [case for case in cases if case.outcome != "skipped"]
    kinds: dict[str, Callable[[Case], bool]] = {
        "states of the protocol that were searched": lambda c: c.fault == _SEARCHED,
        "random histories that were told": lambda c: c.fault == _HISTORIES,
        "points at which a call or a request was broken": lambda c: not any(word in c.fault for word in _OTHERS),
        "moments at which somebody else was at work": lambda c: any(word in c.fault for word in _BESIDE),
        "fuzz executions": lambda c: c.fault == "fuzz",
        "power cuts": lambda c: c.fault == "power cut" and "control" not in c.story,
        "real processes killed or stopped": lambda c: "kill" in c.fault or "SIGSTOP" in c.fault,
    }
    rows: list[list[object]] = [[name, sum(c.points for c in ran if chosen(c))] for name, chosen in kinds.items()]
    made = [c for c in ran if c.fault == _PROTOCOL_MUTANT]
    caught = sum(c.outcome == "held" for c in made)
    rows.append(["mistakes in the protocol that were caught", f"{caught} of {len(made)}"])
    changed = [c for c in ran if c.fault == _CODE_MUTANT]
    noticed = sum(c.figures.get("noticed", 0) for c in changed)
    rows.append(["changes of the code that were noticed", f"{_number(noticed)} of {sum(c.points for c in changed)}"])
    rows.append(["cases run", len(ran)])
    rows.append(["cases that failed", sum(c.outcome == "failed" for c in ran)])
    rows.append(["cases skipped", len(cases) - len(ran)])
    rows.append(["minutes that they took, one after the other", f"{sum(c.seconds for c in ran) / 60:.0f}"])
    text = _table(["figure", "value"], rows)
    long = [c for c in ran if c.figures and c.fault not in _OWN_TABLES and "control" not in c.story]
    if long:
        told = [", ".join(f"{name}: {_number(value)}" for name, value in c.figures.items()) for c in long]
        rows = [[c.story, c.fault, c.backend, own] for c, own in zip(long, told, strict=True)]
        text += "\n" + _table(["case", "fault", "backend", "figures"], rows)
    machines = sorted({case.where for case in ran if case.where})
    return text + "".join(f"\nMade on: {machine}.\n" for machine in machines)


def skipped(cases: Sequence[Case]) -> str:
    """What could not be run, and why."""
    if not cases:
        return _NOTHING
    rows = [[c.story, c.fault, c.backend, c.note] for c in cases if c.outcome == "skipped"]
    return _table(["story", "fault", "backend", "why"], rows) if rows else "Nothing was skipped.\n"


TABLES: dict[str, Callable[[Sequence[Case]], str]] = {
    "crash-matrix": crash_matrix,
    "model": model,
    "mutants": mutants,
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
        new = [Case(**{"where": _here(), **json.loads(line)}) for p in given.add for line in p.read_text().splitlines()]
        write(merged(read(RUNS), new), RUNS)
    if given.add or given.write:
        PAGE.write_text(renewed(PAGE.read_text(encoding="utf-8"), read(RUNS)), encoding="utf-8", newline="\n")
        return 0
    diff = check()
    sys.stdout.write(diff)
    return 1 if diff else 0


if __name__ == "__main__":
    sys.exit(main())
