"""The tool that mutates the core says what is left to do, and its lists are about the code as it is."""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from contextlib import closing
from pathlib import Path

import pytest

from tools import mutation
from tools.mutation import Result, Survivor, Target

SOURCE = """\
from __future__ import annotations

LIMIT: int | None = 3 | 4


def first(items: list[int] | None, *, n: int = 1 | 2) -> int | None:
    found: dict[str, int | str] = {} | {}
    return items[0] if items and n > LIMIT else None
"""

TARGET = Target(module="cloudckpt/core/edits.py", tests=("tests/core/test_edits.py",), timeout_s=60)
KNOWN = Survivor(TARGET.module, "core/NumberReplacer", "a = 1", "a = 2")
NEW = Survivor(TARGET.module, "core/ReplaceTrueWithFalse", "b = True", "b = False")
KNOWN_TO_GIT = pytest.mark.skipif(not (mutation.ROOT / ".git").exists(), reason="copies what git knows")


def result(*survivors: Survivor, pending: int = 0, not_drawn: int = 0) -> Result:
    """What a run has found: ten that were noticed, three that are no decisions, and these."""
    outcomes = Counter({"killed": 10, "survived": len(survivors), "skipped": 3, "pending": pending})
    if not_drawn:
        outcomes["not drawn"] = not_drawn
    return Result(target=TARGET, outcomes=outcomes, survivors=frozenset(survivors))


def test_types_are_no_decisions() -> None:
    """A ``|`` in an annotation is left out, one in an expression is not."""
    spans = mutation.annotation_spans(SOURCE)
    found = {}
    for number, line in enumerate(SOURCE.splitlines(), 1):
        for column, character in enumerate(line):
            if character == "|":
                found[number, column] = mutation.inside((number, column), (number, column + 1), spans)
    assert list(found.values()) == [True, False, True, False, True, True, False]


def test_a_diff_is_read_without_its_headers() -> None:
    """What was there and what came, without indentation and line numbers."""
    diff = "--- mutation diff ---\n--- a/x.py\n+++ b/x.py\n@@ -1,3 +1,3 @@\n def f():\n-    return 1\n+    return 2\n"
    assert mutation.changed_lines(diff) == ("return 1", "return 2")


def test_every_survivor_needs_a_reason_and_every_reason_a_survivor() -> None:
    """An unknown survivor, a reason that nothing needs any more, and untried mutants are each told; else nothing is."""
    listed = {KNOWN: "an alias"}
    assert [*mutation.complaints([result(KNOWN)], listed)] == []
    (unknown,) = mutation.complaints([result(KNOWN, NEW)], listed)
    assert "no test notices core/ReplaceTrueWithFalse:\n    - b = True\n    + b = False" in unknown
    (stale,) = mutation.complaints([result()], listed)
    assert "is noticed by now, and still listed as harmless: a = 2" in stale
    (untried,) = mutation.complaints([result(pending=7)], listed)
    assert "7 mutants were not tried" in untried
    assert str(result(KNOWN)) == (
        "cloudckpt/core/edits.py: 11 tried, 10 noticed, 1 survived, 3 left out (types and texts), 0 to go"
    )


def test_every_module_that_decides_is_mutated() -> None:
    """All of core, and the loop that writes the manifest; the tests that are named for them exist."""
    targets = mutation.read_targets()
    core = {f"cloudckpt/core/{path.name}" for path in (mutation.ROOT / "cloudckpt/core").glob("*.py")}
    assert {t.module for t in targets} >= core - {"cloudckpt/core/__init__.py"} | {
        "cloudckpt/storage/manifest_store.py"
    }
    assert len({t.name for t in targets}) == len(targets)
    for target in targets:
        assert (mutation.ROOT / target.module).is_file()
        for path in target.tests:
            assert (mutation.ROOT / path).exists(), path


def test_the_list_of_survivors_is_about_the_code_as_it_is() -> None:
    """Each survivor is of a line that is still there, and its reason is a sentence."""
    for survivor, reason in mutation.read_survivors().items():
        lines = [line.strip() for line in (mutation.ROOT / survivor.module).read_text(encoding="utf-8").splitlines()]
        assert survivor.before in lines or survivor.before in " ".join(lines), survivor
        assert survivor.after != survivor.before
        assert len(reason.split()) > 3, survivor


def test_a_list_of_survivors_is_read(tmp_path: Path) -> None:
    """Tables become survivors with their reasons; an empty file is an empty list."""
    listed = tmp_path / "survivors.toml"
    listed.write_text("", encoding="utf-8")
    assert mutation.read_survivors(listed) == {}
    listed.write_text(
        '[[survivor]]\nmodule = "cloudckpt/core/edits.py"\noperator = "core/NumberReplacer"\nbefore = "a = 1"\n'
        'after = "a = 2"\nreason = "an alias"\n',
        encoding="utf-8",
    )
    assert mutation.read_survivors(listed) == {KNOWN: "an alias"}


def test_an_unknown_target_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """A name that is no target ends with a usage error that lists them."""
    with pytest.raises(SystemExit) as refused:
        mutation.main(["report", "nothing"])
    assert refused.value.code == 2
    assert "no such target: nothing; there are arguments," in capsys.readouterr().err


def test_nothing_tried_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A report before any run shows zeros, and does not need cosmic-ray."""
    assert mutation.main(["report", "garbage", "--work", str(tmp_path)]) == 0
    assert "cloudckpt/core/garbage.py: 0 tried, 0 noticed" in capsys.readouterr().out


def test_a_sample_says_that_it_is_one() -> None:
    """What was not drawn is not counted as tried, and a reason whose mutant may be among it is not called stale."""
    found = result(NEW, not_drawn=90)
    assert str(found).endswith("11 tried, 10 noticed, 1 survived, 3 left out (types and texts), 0 to go, 90 not drawn")
    assert len([*mutation.complaints([found], {})]) == 1
    assert [*mutation.complaints([found], {NEW: "an alias of it", KNOWN: "an alias"})] == []


def test_what_was_found_is_a_case_of_the_reliability_page() -> None:
    """It holds if every survivor has a reason; a sample is remarked."""
    good = json.loads(result(KNOWN, not_drawn=90).line([]))
    assert (good["story"], good["points"], good["figures"], good["outcome"]) == (
        TARGET.module,
        11,
        {"noticed": 10},
        "held",
    )
    assert good["note"] == "each survivor has a reason; a sample: 90 more were not tried"
    assert json.loads(result(NEW).line(["no test notices it"]))["outcome"] == "failed"


@KNOWN_TO_GIT
def test_a_run_that_was_broken_off_begins_with_the_module_as_it_was(tmp_path: Path) -> None:
    """What cosmic-ray has left in the copy is undone; a module that has changed meanwhile is refused with advice."""
    place = mutation._copy(TARGET, tmp_path, again=False)
    module = (mutation.ROOT / TARGET.module).read_bytes()
    (place / TARGET.module).write_bytes(module + b"MUTANT = True\n")
    assert mutation._copy(TARGET, tmp_path, again=False) == place
    assert (place / TARGET.module).read_bytes() == module
    (place / mutation._ORIGINAL).write_bytes(b"another")
    with pytest.raises(SystemExit, match=r"edits\.py has changed since its mutants were listed: remove .*edits and"):
        mutation._copy(TARGET, tmp_path, again=False)


@KNOWN_TO_GIT
def test_tests_are_renewed_for_survivors(tmp_path: Path) -> None:
    """``--again`` copies what is there now over what was copied once."""
    place = mutation._copy(TARGET, tmp_path, again=False)
    (place / TARGET.tests[0]).write_text("", encoding="utf-8")
    mutation._copy(TARGET, tmp_path, again=True)
    assert (place / TARGET.tests[0]).read_bytes() == (mutation.ROOT / TARGET.tests[0]).read_bytes()


def test_survivors_are_forgotten_and_nothing_else(tmp_path: Path) -> None:
    """The database is cosmic-ray's: one row a result, with the name of what became of it."""
    session = tmp_path / "session.sqlite"
    with closing(sqlite3.connect(session)) as connection:
        connection.execute("CREATE TABLE work_results (job_id TEXT, test_outcome TEXT)")
        rows = [("1", "KILLED"), ("2", "SURVIVED"), ("3", None), ("4", "INCOMPETENT")]
        connection.executemany("INSERT INTO work_results VALUES (?, ?)", rows)
        connection.commit()
        mutation._forget_survivors(session)
        left = [*connection.execute("SELECT job_id FROM work_results ORDER BY job_id")]
    assert left == [("1",), ("3",), ("4",)]
