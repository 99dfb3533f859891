"""Change one small thing at a time in the code that decides, and see whether a test notices.

    python tools/mutation.py run                   every target of tests/mutation/targets.toml; goes on where it stopped
    python tools/mutation.py run manifest garbage  these
    python tools/mutation.py report                what is known by now

Made with cosmic-ray (``pip install "cloudckpt[mutation]"``), which changes files in place: each target is worked on in
a copy of its own, below ``--work``, so that nothing here is touched and several targets can run side by side. Whatever
survives must stand in ``tests/mutation/survivors.toml`` with the reason why it is harmless; otherwise this ends with 1.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import shlex
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TARGETS = ROOT / "tests/mutation/targets.toml"
SURVIVORS = ROOT / "tests/mutation/survivors.toml"

#: Texts are for people: another word in a message is no other decision.
_NOT_A_DECISION = ("StringReplacer",)


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
        tried = sum(self.outcomes.values()) - self.outcomes["skipped"] - self.outcomes["pending"]
        return (
            f"{self.target.module}: {tried} tried, {tried - self.outcomes['survived']} noticed, "
            f"{self.outcomes['survived']} survived, {self.outcomes['skipped']} left out (types and texts), "
            f"{self.outcomes['pending']} to go"
        )


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
        tried = sum(result.outcomes.values()) - result.outcomes["pending"]
        known = {s for s in listed if s.module == result.target.module}
        if tried and not result.outcomes["pending"]:
            for survivor in sorted(known - result.survivors):
                yield f"{survivor.module}: is noticed by now, and still listed as harmless: {survivor.after}"


# -- cosmic-ray ----------------------------------------------------------------------------------------------


def _cosmic_ray(*arguments: str, cwd: Path) -> None:
    subprocess.run([sys.executable, "-m", "cosmic_ray.cli", *arguments], cwd=cwd, check=True)


def _copy(target: Target, work: Path) -> Path:
    """A copy of what git knows, for this target alone."""
    place = work / target.name
    if not place.exists():
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True)
        for name in filter(None, listed.stdout.decode().split("\0")):
            if (ROOT / name).is_file():
                (place / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, place / name)
    return place


def _config(target: Target) -> str:
    # "python -m" puts the copy before the installed package; one seed, so that a verdict can be had again.
    words = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--hypothesis-seed=0", *target.tests]
    command = shlex.join(words).replace("\\", "\\\\").replace('"', '\\"')
    return (
        f'[cosmic-ray]\nmodule-path = "{target.module}"\ntimeout = {target.timeout_s}\nexcluded-modules = []\n'
        f'test-command = "{command}"\n\n[cosmic-ray.distributor]\nname = "local"\n'
    )


def _leave_out(target: Target, place: Path, session: Path) -> None:
    """Mark what is no decision as skipped."""
    work_db, work_item = (importlib.import_module(f"cosmic_ray.{name}") for name in ("work_db", "work_item"))
    spans = annotation_spans((place / target.module).read_text(encoding="utf-8"))
    with work_db.use_db(str(session), work_db.WorkDB.Mode.open) as found:
        for item in found.pending_work_items:
            mutation = item.mutations[0]
            is_text = any(word in mutation.operator_name for word in _NOT_A_DECISION)
            if is_text or inside(tuple(mutation.start_pos), tuple(mutation.end_pos), spans):
                skipped = work_item.WorkResult(output="no decision", worker_outcome=work_item.WorkerOutcome.SKIPPED)
                found.set_result(item.job_id, skipped)


def run(target: Target, work: Path) -> Result:
    """Try all mutants of a target that were not tried yet."""
    place = _copy(target, work)
    config, session = place / "cosmic-ray.toml", place / "cosmic-ray.sqlite"
    if not session.exists():
        config.write_text(_config(target), encoding="utf-8")
        _cosmic_ray("baseline", config.name, cwd=place)  # fails if a test fails without any change
        _cosmic_ray("init", config.name, session.name, cwd=place)
        _leave_out(target, place, session)
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
    options = parser.parse_args(argv)
    targets = read_targets()
    known = {target.name for target in targets}
    if unknown := [name for name in options.names if name not in known]:
        parser.error(f"no such target: {', '.join(unknown)}; there are {', '.join(sorted(known))}")
    chosen = [target for target in targets if not options.names or target.name in options.names]
    options.work.mkdir(parents=True, exist_ok=True)
    act = run if options.command == "run" else read_result
    with ThreadPoolExecutor(options.jobs) as pool:
        results = [*pool.map(lambda target: act(target, options.work), chosen)]
    listed = read_survivors()
    for result in results:
        print(result)
    left = [*complaints(results, listed)]
    print("\n".join(left) or "every survivor has a reason")
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
