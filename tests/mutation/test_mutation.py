"""The tool that mutates the core says what is left to do, and its lists are about the code as it is."""

from __future__ import annotations

from collections import Counter
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


def result(*survivors: Survivor, pending: int = 0) -> Result:
    """What a run has found: ten that were noticed, three that are no decisions, and these."""
    outcomes = Counter({"killed": 10, "survived": len(survivors), "skipped": 3, "pending": pending})
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
