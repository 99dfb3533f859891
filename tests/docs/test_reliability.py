"""The page about reliability says what was run, names tests that exist, and leaves none of the failures out."""

from __future__ import annotations

import ast
import json
import platform
import re
from pathlib import Path
from types import ModuleType

import pytest

from tests.records import Recording
from tests.tooling import tool_module

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "reliability.md"
ROW = re.compile(r"^\| (\d+) \| (.+?) \| (.+?) \| (.+) \|$", re.MULTILINE)
TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    """``tools/reliability.py``."""
    return tool_module("reliability")


def test_the_tables_are_what_the_runs_say(tool: ModuleType) -> None:
    """Nothing in them is typed by hand; ``python tools/reliability.py --write`` writes them."""
    assert tool.check() == ""
    assert {name for _, name, *_ in tool._BLOCK.findall(PAGE.read_text())} == set(tool.TABLES)


def test_no_case_that_failed_is_published_as_if_it_had_held(tool: ModuleType) -> None:
    """The runs behind the page may have skips, and no failure."""
    assert [case.name for case in tool.read(tool.RUNS) if case.outcome == "failed"] == []


def test_every_run_is_of_a_test_that_is_there(tool: ModuleType) -> None:
    """A case whose test was renamed or removed is not published any more: run it again, and take its old line out."""
    for case in tool.read(tool.RUNS):
        file, _, name = case.test.partition("::")
        assert (ROOT / file).is_file(), case.name
        if name:
            assert f"def {name.partition('[')[0].rpartition('::')[2]}(" in (ROOT / file).read_text(), case.name


def test_every_failure_is_there_once_and_has_a_test() -> None:
    """All thirty-three, in order, each with a test."""
    rows = ROW.findall(PAGE.read_text())
    assert [int(number) for number, *_ in rows] == [*range(1, 34)]
    for number, _, _, tests in rows:
        assert TEST.search(tests), number


def test_every_test_named_exists() -> None:
    """Each test named on the pages about reliability and security is defined in the file named."""
    for page in (PAGE, ROOT / "docs" / "security.md"):
        for file, name in TEST.findall(page.read_text()):
            tree = ast.parse((ROOT / file).read_text())
            assert name in {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}, f"{file}::{name}"


def test_runs_become_a_table(tool: ModuleType, tmp_path: Path) -> None:
    """What a test writes down is read again: the last run of a case counts, a skip replaces none, a failure shows."""
    path = tmp_path / "runs.jsonl"
    for points in (3, 7):
        with Recording(path, "tests/x.py::test_a")("gc", "refused", "memory") as case:
            case.points = points
    with pytest.raises(pytest.skip.Exception), Recording(path, "tests/x.py::test_a")("gc", "refused", "memory"):
        pytest.skip("no loop devices")
    with pytest.raises(pytest.skip.Exception), Recording(path, "tests/x.py::test_b")("gc", "power cut", "ext4"):
        pytest.skip("no loop devices")
    with pytest.raises(ZeroDivisionError), Recording(path, "tests/x.py::test_c")("sweep", "refused", "local"):
        1 / 0  # noqa: B018 - to fail
    cases = tool.merged([], tool.read(path))
    assert [(case.outcome, case.points) for case in cases] == [("skipped", 0), ("held", 7), ("failed", 0)]
    table = tool.crash_matrix(cases)
    assert "| gc | refused |  |  | 7 held |" in table
    assert "skipped: no loop devices" in table
    assert "**failed** (1 of 1 cases)" in table
    tool.write(cases, tmp_path / "kept.jsonl")
    assert tool.read(tmp_path / "kept.jsonl") == cases
    assert f"Python {platform.python_version()}" in {
        json.loads(line)["where"].rpartition(", ")[2] for line in path.read_text().splitlines()
    }
    line = '| gc | refused |  |  | 7 held | `python -m pytest tests/x.py -m "slow or not slow"` |'
    assert line in table, "the command is told"
    page = "<!-- from runs: skipped -->\nold\n<!-- /from runs -->\n"
    assert "no loop devices" in tool.renewed(page, cases)


def test_without_a_file_nothing_is_written(tmp_path: Path) -> None:
    """Without ``--record`` a test runs as ever."""
    with Recording(None, "tests/x.py::test_a")("gc", "refused", "memory") as case:
        case.points = 1
    assert [*tmp_path.iterdir()] == []


def test_mutants_and_searches_are_counted(tool: ModuleType, tmp_path: Path) -> None:
    """States, mistakes and changes have tables and figures of their own, and are no row of the crash matrix."""
    path = tmp_path / "runs.jsonl"
    with Recording(path, "tests/x.py::test_a")("two_writers", "searched", "the model") as case:
        case.points, case.figures = 8000, {"steps": 20000, "stores recovered": 30, "all of them": 0}
    with Recording(path, "tests/x.py::test_b")("blind_overwrite", "a protocol mutant", "the model") as case:
        case.points = 1
    with pytest.raises(ZeroDivisionError), Recording(path, "tests/x.py::test_b")("m", "a protocol mutant", "the model"):
        1 / 0  # noqa: B018 - it was not noticed
    with Recording(path, "tools/mutation.py")("cloudckpt/core/edits.py", "a code mutant", "no store") as case:
        case.points, case.figures = 50, {"noticed": 48}
    with Recording(path, "tests/x.py::test_c")("uploads", "its uploads are unfinished", "moto") as case:
        case.points = 1
    cases = tool.merged([], tool.read(path))
    assert "| two_writers | 8000 | 20000 | 30 | no, stopped at the bound | held |" in tool.model(cases)
    assert "| mistakes in the protocol, made by hand | 2 | 1 | 1 |" in tool.mutants(cases)
    assert "| `cloudckpt/core/edits.py` | 50 | 48 | 2 |" in tool.mutants(cases)
    assert [line.split(" | ")[0] for line in tool.crash_matrix(cases).splitlines()[2:]] == ["| uploads"]
    found = tool.figures(cases)
    assert "| states of the protocol that were searched | 8000 |" in found
    assert "| mistakes in the protocol that were caught | 1 of 2 |" in found
    assert "| changes of the code that were noticed | 48 of 50 |" in found
    assert "| points at which a call or a request was broken | 1 |" in found
    assert "| real processes killed or stopped | 0 |" in found


def test_large_figures_are_written_in_full(tool: ModuleType, tmp_path: Path) -> None:
    """Bytes to the last one; seconds as they were measured."""
    path = tmp_path / "runs.jsonl"
    with Recording(path, "tests/x.py::test_a")("a save on top of many", "none", "memory") as case:
        case.points, case.figures = 10_002, {"bytes": 4_312_345, "announce and commit, s": 0.187}
    found = tool.figures(tool.read(path))
    assert "bytes: 4312345" in found
    assert "announce and commit, s: 0.187" in found
