"""Change one small thing at a time in the code that decides, and see whether a test notices.

    python tools/mutation.py run                   every target of tests/mutation/targets.toml; goes on where it stopped
    python tools/mutation.py run manifest garbage  these
    python tools/mutation.py run --every 10        a sample: every tenth change of each target
    python tools/mutation.py run --again           those that had survived, with the tests as they are now
    python tools/mutation.py report                what is known by now
    python tools/mutation.py report --record FILE  the same as lines for tools/reliability.py

Made with cosmic-ray (``pip install "cloudckpt[mutation]"``), which changes files in place: each target is worked on in
a copy of its own, below ``--work``, so that nothing here is touched and several targets can run side by side. Whatever
survives must stand in ``tests/mutation/survivors.toml`` with the reason why it is harmless; otherwise this ends with 1.

A run may be broken off at any moment, by a signal too: the next one goes on, with the module as it was at first.

(Past 350 lines: one command, with what it needs of cosmic-ray.)
"""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import shlex
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TARGETS = ROOT / "tests/mutation/targets.toml"
SURVIVORS = ROOT / "tests/mutation/survivors.toml"

#: Texts are for people: another word in a message is no other decision.
_NOT_A_DECISION = ("StringReplacer",)
#: Why a change was not tried.
_NO_DECISION, _NOT_DRAWN = "no decision", "not drawn"
#: The module as it was when its changes were listed: a run that is broken off leaves one of them behind.
_ORIGINAL = "mutated-module-as-it-was.txt"


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A module, the tests that hold it, and how long these may take when nothing is wrong."""

    module: str
    tests: tuple[str, ...]
    timeout_s: float

    @property
    def name(self) -> str:
        """What it is called on the command line."""
        return Path(self.module).stem


@dataclass(frozen=True, slots=True, order=True)
class Survivor:
    """A change that no test notices: what it was, and what it became.

    The lines, not their numbers: they stay the same when something is added further up.
    """

    module: str
    operator: str
    before: str
    after: str


def read_targets(path: Path = TARGETS) -> list[Target]:
    """What is mutated."""
    document = tomllib.loads(path.read_text(encoding="utf-8"))
    return [
        Target(module=t["module"], tests=tuple(t["tests"]), timeout_s=float(t.get("timeout_s", document["timeout_s"])))
        for t in document["target"]
    ]


def read_survivors(path: Path = SURVIVORS) -> dict[Survivor, str]:
    """What is known to survive, and why that is harmless."""
    found = tomllib.loads(path.read_text(encoding="utf-8")).get("survivor", [])
    return {Survivor(s["module"], s["operator"], s["before"], s["after"]): s["reason"] for s in found}


# -- what is worth changing ----------------------------------------------------------------------------------

#: (first line, first column, last line, column after the last), lines from 1.
Span = tuple[int, int, int, int]


def annotation_spans(source: str) -> list[Span]:
    """Where types are written. With ``from __future__ import annotations`` nobody evaluates them."""
    spans: list[Span] = []
    for node in ast.walk(ast.parse(source)):
        found: list[ast.expr | None] = []
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found.append(node.returns)
        if isinstance(node, ast.arg | ast.AnnAssign):
            found.append(node.annotation)
        spans.extend(
            (part.lineno, part.col_offset, part.end_lineno, part.end_col_offset)
            for part in found
            if part is not None and part.end_lineno is not None and part.end_col_offset is not None
        )
    return spans


def inside(start: tuple[int, int], end: tuple[int, int], spans: Iterable[Span]) -> bool:
    """Whether a piece of text lies within one of the spans."""
    return any((s[0], s[1]) <= start and end <= (s[2], s[3]) for s in spans)


def changed_lines(diff: str) -> tuple[str, str]:
    """What a unified diff takes away and puts in, without the indentation."""
    lines = [line for line in diff.splitlines() if not line.startswith(("---", "+++"))]
    before = " ".join(line[1:].strip() for line in lines if line.startswith("-"))
    after = " ".join(line[1:].strip() for line in lines if line.startswith("+"))
    return before, after


# -- the verdict ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What became of the mutants of one target."""

    target: Target
    outcomes: Counter[str]
    survivors: frozenset[Survivor]

    def __str__(self) -> str:
        drawn = f", {self.outcomes[_NOT_DRAWN]} not drawn" if self.outcomes[_NOT_DRAWN] else ""
        return (
            f"{self.target.module}: {self.tried} tried, {self.noticed} noticed, "
            f"{self.outcomes['survived']} survived, {self.outcomes['skipped']} left out (types and texts), "
            f"{self.outcomes['pending']} to go{drawn}"
        )

    @property
    def tried(self) -> int:
        """How many changes were made."""
        return self.outcomes.total() - sum(self.outcomes[name] for name in ("skipped", "pending", _NOT_DRAWN))

    @property
    def noticed(self) -> int:
        """How many of those a test noticed."""
        return self.tried - self.outcomes["survived"]

    def line(self, left: Sequence[str]) -> str:
        """A case for ``tools/reliability.py``. It holds if nothing is left to do."""
        notes = []
        if self.outcomes["survived"] and not left:
            notes.append("each survivor has a reason")
        if self.outcomes[_NOT_DRAWN]:
            notes.append(f"a sample: {self.outcomes[_NOT_DRAWN]} more were not tried")
        case = {
            "story": self.target.module,
            "fault": "a code mutant",
            "backend": "no store",
            "test": "tools/mutation.py",
            "points": self.tried,
            "outcome": "failed" if left else "held",
            "note": "; ".join(notes),
            "figures": {"noticed": self.noticed},
        }
        return json.dumps(case, sort_keys=True)


def complaints(results: Sequence[Result], listed: dict[Survivor, str]) -> Iterator[str]:
    """What is left to do: survivors without a reason, reasons without a survivor, mutants that were not tried."""
    for result in results:
        if result.outcomes["pending"]:
            yield f"{result.target.module}: {result.outcomes['pending']} mutants were not tried"
        for survivor in sorted(result.survivors - listed.keys()):
            yield (
                f"{survivor.module}: no test notices {survivor.operator}:\n"
                f"    - {survivor.before}\n    + {survivor.after}"
            )
        known = {s for s in listed if s.module == result.target.module}
        if result.tried and not result.outcomes["pending"] and not result.outcomes[_NOT_DRAWN]:
            for survivor in sorted(known - result.survivors):
                yield f"{survivor.module}: is noticed by now, and still listed as harmless: {survivor.after}"


# -- cosmic-ray ----------------------------------------------------------------------------------------------


def _cosmic_ray(*arguments: str, cwd: Path) -> None:
    subprocess.run([sys.executable, "-m", "cosmic_ray.cli", *arguments], cwd=cwd, check=True)


def _copy(target: Target, work: Path, *, again: bool) -> Path:
    """A copy of what git knows, for this target alone; ``again``: as it is now.

    Raises:
        SystemExit: the module is not the one whose changes were listed.
    """
    place = work / target.name
    if again or not place.exists():
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True)
        for name in filter(None, listed.stdout.decode().split("\0")):
            if (ROOT / name).is_file():
                (place / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, place / name)
    original = place / _ORIGINAL
    if not original.exists():
        shutil.copy2(ROOT / target.module, original)
    if original.read_bytes() != (ROOT / target.module).read_bytes():
        raise SystemExit(f"{target.module} has changed since its mutants were listed: remove {place} and run again")
    shutil.copy2(original, place / target.module)
    return place


def _config(target: Target) -> str:
    # "python -m" puts the copy before the installed package; one seed, so that a verdict can be had again. -B: bytecode
    # goes by the second and the size, and a change of one digit within a second would not be seen.
    words = [
        sys.executable,
        "-B",
        "-m",
        "pytest",
        "-x",
        "-q",
        "-p",
        "no:cacheprovider",
        "--hypothesis-seed=0",
        *target.tests,
    ]
    command = shlex.join(words).replace("\\", "\\\\").replace('"', '\\"')
    return (
        f'[cosmic-ray]\nmodule-path = "{target.module}"\ntimeout = {target.timeout_s}\nexcluded-modules = []\n'
        f'test-command = "{command}"\n\n[cosmic-ray.distributor]\nname = "local"\n'
    )


def _leave_out(target: Target, place: Path, session: Path, every: int) -> None:
    """Mark what is no decision as skipped, and of the others all but every so-manyth, in the order of the source."""
    work_db, work_item = (importlib.import_module(f"cosmic_ray.{name}") for name in ("work_db", "work_item"))
    spans = annotation_spans((place / target.module).read_text(encoding="utf-8"))
    with work_db.use_db(str(session), work_db.WorkDB.Mode.open) as found:
        items = [(item.job_id, item.mutations[0]) for item in found.pending_work_items]
        items.sort(key=lambda item: (item[1].start_pos, item[1].operator_name, item[1].occurrence))
        decisions = 0
        for job_id, mutation in items:
            is_text = any(word in mutation.operator_name for word in _NOT_A_DECISION)
            why = None
            if is_text or inside(tuple(mutation.start_pos), tuple(mutation.end_pos), spans):
                why = _NO_DECISION
            else:
                if decisions % every:
                    why = _NOT_DRAWN
                decisions += 1
            if why is not None:
                found.set_result(
                    job_id, work_item.WorkResult(output=why, worker_outcome=work_item.WorkerOutcome.SKIPPED)
                )


def _forget_survivors(session: Path) -> None:
    """Have them tried again. Cosmic-ray can only overwrite a result, and what has one is not tried."""
    with closing(sqlite3.connect(session)) as connection, connection:
        connection.execute("DELETE FROM work_results WHERE upper(test_outcome) = 'SURVIVED'")


def run(target: Target, work: Path, *, every: int = 1, again: bool = False, baseline: bool = True) -> Result:
    """Try all mutants of a target that were not tried yet, or of a sample of them; ``again``: survivors as well."""
    place = _copy(target, work, again=again)
    config, session = place / "cosmic-ray.toml", place / "cosmic-ray.sqlite"
    if again and session.exists():
        _forget_survivors(session)
    if not session.exists():
        config.write_text(_config(target), encoding="utf-8")
        if baseline:
            _cosmic_ray("baseline", config.name, cwd=place)  # fails if a test fails without any change
        listing = place / "listing.sqlite"  # a session is one once everything that is left out is marked
        listing.unlink(missing_ok=True)
        _cosmic_ray("init", config.name, listing.name, cwd=place)
        _leave_out(target, place, listing, every)
        listing.rename(session)
    _cosmic_ray("exec", config.name, session.name, cwd=place)
    return read_result(target, work)


def read_result(target: Target, work: Path) -> Result:
    """What is known of a target by now."""
    session = work / target.name / "cosmic-ray.sqlite"
    outcomes: Counter[str] = Counter()
    survivors: set[Survivor] = set()
    if session.exists():
        work_db: Any = importlib.import_module("cosmic_ray.work_db")
        with work_db.use_db(str(session), work_db.WorkDB.Mode.open) as found:
            outcomes["pending"] = len([*found.pending_work_items])
            for item, result in found.completed_work_items:
                outcome = "skipped" if result.test_outcome is None else str(result.test_outcome.value)
                if result.output == _NOT_DRAWN:
                    outcome = _NOT_DRAWN
                outcomes[outcome] += 1
                if outcome == "survived":
                    before, after = changed_lines(result.diff or "")
                    survivors.add(Survivor(target.module, item.mutations[0].operator_name, before, after))
    return Result(target=target, outcomes=outcomes, survivors=frozenset(survivors))


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["run", "report"])
    parser.add_argument("names", nargs="*", metavar="TARGET")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "cloudckpt-mutation")
    parser.add_argument("--jobs", type=int, default=2, help="how many targets are worked on at once")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="every Nth change only, in a place apart")
    parser.add_argument("--again", action="store_true", help="try survivors once more, with the tests as they are now")
    parser.add_argument(
        "--no-baseline", dest="baseline", action="store_false", help="the tests are known to pass without a change"
    )
    parser.add_argument("--record", type=Path, help="append what was found to this file, a line of JSON a target")
    options = parser.parse_intermixed_args(argv)
    targets = read_targets()
    known = {target.name for target in targets}
    if unknown := [name for name in options.names if name not in known]:
        parser.error(f"no such target: {', '.join(unknown)}; there are {', '.join(sorted(known))}")
    if options.every < 1:
        parser.error(f"--every {options.every}: expected 1 or more")
    chosen = [target for target in targets if not options.names or target.name in options.names]
    work = options.work if options.every == 1 else options.work / f"every-{options.every}"
    work.mkdir(parents=True, exist_ok=True)

    def act(target: Target) -> Result:
        if options.command == "run":
            return run(target, work, every=options.every, again=options.again, baseline=options.baseline)
        return read_result(target, work)

    with ThreadPoolExecutor(options.jobs) as pool:
        results = [*pool.map(act, chosen)]
    listed = read_survivors()
    for result in results:
        print(result)
    if options.record is not None:
        with options.record.open("a", encoding="utf-8", newline="\n") as file:
            file.writelines(f"{r.line([*complaints([r], listed)])}\n" for r in results if r.tried)
    left = [*complaints(results, listed)]
    print("\n".join(left) or "every survivor has a reason")
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
