"""The page about reliability says what was run, names tests that exist, and leaves none of the failures out."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.records import Recording

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "reliability.md"
ROW = re.compile(r"^\| (\d+) \| (.+?) \| (.+?) \| (.+) \|$", re.MULTILINE)
TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    """``tools/reliability.py``."""
    spec = importlib.util.spec_from_file_location("reliability", ROOT / "tools" / "reliability.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["reliability"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_tables_are_what_the_runs_say(tool: ModuleType) -> None:
    """Nothing in them is typed by hand; ``python tools/reliability.py --write`` writes them."""
    assert tool.check() == ""
    assert {name for _, name, *_ in tool._BLOCK.findall(PAGE.read_text())} == set(tool.TABLES)


def test_no_case_that_failed_is_published_as_if_it_had_held(tool: ModuleType) -> None:
    """The runs behind the page may have skips, and no failure."""
    assert [case.name for case in tool.read(tool.RUNS) if case.outcome == "failed"] == []


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
    assert all(json.loads(line)["where"] == "" for line in (tmp_path / "kept.jsonl").read_text().splitlines())
    page = "<!-- from runs: skipped -->\nold\n<!-- /from runs -->\n"
    assert "no loop devices" in tool.renewed(page, cases)


def test_without_a_file_nothing_is_written(tmp_path: Path) -> None:
    """Without ``--record`` a test runs as ever."""
    with Recording(None, "tests/x.py::test_a")("gc", "refused", "memory") as case:
        case.points = 1
    assert [*tmp_path.iterdir()] == []
