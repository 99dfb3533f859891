"""The list of what users asked for is whole, and the tests that it names exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROW = re.compile(r"^\| (\d+) \| .+ \| (.+) \|$", re.MULTILINE)
TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


def rows() -> list[tuple[str, str]]:
    """Number, and where it is shown."""
    return ROW.findall((ROOT / "docs" / "asked-for.md").read_text(encoding="utf-8"))


def test_all_eighteen_are_there() -> None:
    """The numbers 1 to 18 are in the table, each once, in order, and each names a test."""
    assert [number for number, _ in rows()] == [str(number) for number in range(1, 19)]
    assert [number for number, where in rows() if not TEST.search(where)] == []


def test_every_test_named_exists() -> None:
    """Each test named in the table is defined in the file named."""
    for number, where in rows():
        for file, name in TEST.findall(where):
            tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
            assert name in {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}, f"{number}: {name}"
