"""The benchmarks' command line.

python -m benchmarks list                 the plans, and what each is
python -m benchmarks PLAN [...]           run one plan, or go on with it, and print its table
python -m benchmarks bars | quick | all   every bar; the bars at 0.5 GiB; everything, then the page
python -m benchmarks profiles             where the processor's time goes in what may miss its bar
python -m benchmarks report               write docs/performance.md and its charts from the results
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

from benchmarks.plans import BARS, LINKS, PLANS, Plan, quick
from benchmarks.profiles import PROFILED, measure_profiles
from benchmarks.report import bars_table, read_results, tables, write_page
from benchmarks.runner import Results, run

_ROOT = Path(__file__).parents[1]
_RESULTS = _ROOT / "benchmarks" / "results"
_WORK = _ROOT / "runs" / "bench"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = ["list", "bars", "quick", "all", "profiles", "report", *PLANS, *BARS]
    parser.add_argument("what", choices=known, metavar="WHAT", help="see above")
    parser.add_argument("--only", help="these cases, with commas between them")
    parser.add_argument("--sizes", help="these states, with commas between them")
    parser.add_argument("--rounds", type=int, help="instead of the plan's")
    parser.add_argument("--fresh", action="store_true", help="begin anew instead of going on")
    parser.add_argument("--out", type=Path, help="folder of the results (benchmarks/results; quick: runs/bench/quick)")
    parser.add_argument("--work", type=Path, default=_WORK, help="scratch folder, on the disk to be measured")
    return parser.parse_args()


def _changed(plan: Plan, given: argparse.Namespace) -> Plan:
    return replace(
        plan,
        cases=tuple(given.only.split(",")) if given.only else plan.cases,
        sizes=tuple(given.sizes.split(",")) if given.sizes else plan.sizes,
        rounds=given.rounds or plan.rounds,
    )


def _chosen(what: str) -> list[Plan]:
    match what:
        case "bars":
            return list(BARS.values())
        case "quick":
            return [small for plan in BARS.values() if (small := quick(plan))]
        case "all":
            return [*BARS.values(), *PLANS.values()]
    return [(PLANS | BARS)[what]]


def _profiled(given: argparse.Namespace, out: Path) -> bool:
    # Among all the plans --only names cases, not bars.
    names = tuple(given.only.split(",")) if given.only and given.what == "profiles" else PROFILED
    if unknown := sorted({*names} - {*PROFILED}):
        # Before a file is opened: results of another source would be begun anew.
        print(f"no profile is made of {', '.join(unknown)}; choose from {', '.join(PROFILED)}", file=sys.stderr)
        return False
    try:
        measure_profiles(Results(out / "profiles.jsonl", fresh=given.fresh), names, given.work)
    except (OSError, RuntimeError, subprocess.TimeoutExpired) as exc:
        print(f"profiles could not be made: {exc}", file=sys.stderr)
        return False
    return True


def main() -> int:
    """Do what the command line says; the exit status is 0 even where a bar is missed, which the table tells."""
    given = _arguments()
    # So that being ended takes the case and the server along, as Ctrl-C does.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    out: Path = given.out or (_WORK / "quick" if given.what == "quick" else _RESULTS)
    if given.what == "list":
        for plan in (BARS | PLANS).values():
            print(f"{plan.name:20} {plan.rounds:2} rounds at {', '.join(plan.sizes)}; {LINKS[plan.link].said}")
        return 0
    if given.what == "report":
        write_page(out, _ROOT / "docs")
        return 0
    if given.what == "profiles":
        return 0 if _profiled(given, out) else 2
    for plan in _chosen(given.what):
        began = time.monotonic()
        try:
            run(_changed(plan, given), Results(out / f"{plan.name}.jsonl", fresh=given.fresh), work=given.work)
        except ValueError as exc:
            print(f"{plan.name}: {exc}", file=sys.stderr)
            return 2
        except (OSError, RuntimeError) as exc:
            # A server that does not start, a tool that is missing: the other plans are run all the same.
            print(f"{plan.name} could not be run: {exc}", file=sys.stderr)
            continue
        print(f"{plan.name}: {time.monotonic() - began:.0f} s", flush=True)
    results = read_results(out)
    if given.what in {"bars", "quick", "all"}:
        print(bars_table(results, measured_only=given.what == "quick"))
    else:
        print(tables(given.what, results.rows.get(given.what, [])))
    if given.what == "all":
        _profiled(given, out)
        write_page(out, _ROOT / "docs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
