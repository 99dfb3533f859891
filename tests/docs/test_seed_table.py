"""The table of old defects is complete, and the tests it names exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROW = re.compile(r"^\| ([SHLC]\d+) \| (.+?) \| (.+) \|$", re.MULTILINE)
TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")
NUMBERS = [
    *(f"S{n}" for n in range(1, 11)),
    *(f"H{n}" for n in range(1, 27)),
    *(f"L{n}" for n in range(1, 35)),
    *(f"C{n}" for n in range(1, 19)),
]


def rows() -> list[tuple[str, str, str]]:
    """Number, defect, and where it is answered."""
    return ROW.findall((ROOT / "docs" / "seed-scenarios.md").read_text())


def test_every_number_is_there_once() -> None:
    """All 88 numbers are in the table, each once, in order."""
    assert [number for number, _, _ in rows()] == NUMBERS


def test_every_number_has_an_answer() -> None:
    """Each number names a test, or why it does not apply."""
    for number, _, where in rows():
        assert TEST.search(where) or where.startswith("not applicable, because "), number


def test_every_test_named_exists() -> None:
    """Each test named in the table is defined in the file named."""
    for number, _, where in rows():
        for file, name in TEST.findall(where):
            tree = ast.parse((ROOT / file).read_text())
            assert name in {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}, f"{number}: {name}"
